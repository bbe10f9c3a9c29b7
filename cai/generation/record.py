"""One prompt becomes one `Record`: answer, critique, revise, compare. Read `make_record` top to bottom.

As in Constitutional AI (Bai et al. 2022, arXiv 2212.08073, section 3.1 and 4.1): the policy answers; in each round it
criticises its answer under a principle drawn at random and revises it; the judge then compares completions.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from cai.config import Recipe
from cai.constitution import Constitution, Principle
from cai.engines import Engine, GenerateRequest
from cai.generation.dialogues import critique_request, few_shot, revision_request, with_few_shot
from cai.generation.draws import derive_seed, draw_evenly, draw_weighted
from cai.generation.quality import clean_revision, find_problem, plain
from cai.judging import ChoiceJudge
from cai.types import Completion, Messages, Prompt, Record, Revision, Source, Verdict


@dataclass(frozen=True)
class Generator:
    """What every prompt of a run shares: the recipe, the constitution, the policy and the judge."""

    recipe: Recipe
    constitution: Constitution
    policy: Engine
    judge: ChoiceJudge

    async def make_record(self, prompt: Prompt) -> Record:
        """All that happens to one prompt. Raises `RequestError` where a call of it can never succeed."""
        candidates = await self._answer(prompt)
        revisions = await self._revise(prompt, candidates[0])
        record = Record(prompt, candidates, revisions, ())
        verdicts = await asyncio.gather(*(self._compare(record, *names) for names in pairs(record, self.recipe)))
        return Record(prompt, candidates, revisions, tuple(verdicts))

    async def _answer(self, prompt: Prompt) -> tuple[Completion, ...]:
        count = self.recipe.generation.candidates
        asked = (self._generate(prompt, prompt.messages, "answer", number) for number in range(count))
        return tuple(await asyncio.gather(*asked))

    async def _revise(self, prompt: Prompt, original: Completion) -> tuple[Revision, ...]:
        text, revisions = original.text.strip(), []
        rounds = self.recipe.generation.rounds if text else 0
        seed = derive_seed(self.recipe.seed, prompt.id, "critique principles")
        drawn = draw_weighted(self.constitution.critiquing, rounds, seed)
        exemplars = few_shot(self.constitution, self.constitution.exemplars[: self.recipe.generation.exemplars])
        shown = with_few_shot(exemplars, prompt.messages)
        for number, principle in enumerate(drawn, 1):
            revision = await self._one_round(prompt, shown, text, (number, principle))
            revisions.append(revision)
            text = revision.text if revision.problem is None else text
        return tuple(revisions)

    async def _one_round(self, prompt: Prompt, shown: Messages, text: str, drawn: tuple[int, Principle]) -> Revision:
        number, principle = drawn
        asked = critique_request(shown, text, principle)
        critique = await self._generate(prompt, asked, "critique", number)
        asked += revision_request(critique.text, principle)
        revision = await self._generate(prompt, asked, "revision", number)
        cleaned = clean_revision(revision.text)
        problem = find_problem(cleaned.text, text, critique.text, revision.finish_reason == "length")
        return Revision(number, principle.id, critique, revision, cleaned.text, cleaned.cleaned, problem)

    async def _compare(self, record: Record, first: str, second: str, source: Source) -> Verdict:
        count = self.recipe.judge.principles
        able = self.constitution.comparing
        seed = derive_seed(self.recipe.seed, record.prompt.id, "judge principles", first, second)
        principles = able if count == "all" else draw_evenly(able, count, seed)
        named = ((first, record.text(first)), (second, record.text(second)))
        return await self.judge.compare(record.prompt.messages, named, principles, source)

    async def _generate(self, prompt: Prompt, messages: Messages, step: str, number: int) -> Completion:
        sampling = self.recipe.generation
        seed = derive_seed(self.recipe.seed, prompt.id, step, number)
        return await self.policy.generate(
            GenerateRequest(messages, sampling.max_tokens, sampling.temperature, sampling.top_p, seed)
        )


def pairs(record: Record, recipe: Recipe) -> list[tuple[str, str, Source]]:
    """The names of the completions to compare: the original with its final revision, the candidates among themselves.

    Completions that are empty, or equal but for case and punctuation, are not compared.
    """
    chosen: list[tuple[str, str, Source]] = []
    final = record.final_revision
    if recipe.generation.pairs != "samples" and final and plain(final.text) != plain(record.text("candidate-0")):
        chosen.append(("candidate-0", f"revision-{final.round}", "revision"))
    if recipe.generation.pairs != "revision":
        names = [f"candidate-{index}" for index in range(len(record.candidates))]
        texts = {name: plain(record.text(name)) for name in names if record.text(name)}
        chosen += [(one, other, "samples") for one, other in combinations(texts, 2) if texts[one] != texts[other]]
    return chosen


def template_hash() -> str:
    """8 hex digits over the texts that models are shown, and the code that draws, words and filters: records made with
    others belong to another run."""
    here = Path(__file__).parent
    files = [file for folder in (here, here.parent / "judging") for file in sorted(folder.glob("*.txt"))]
    files += [here / name for name in ("dialogues.py", "draws.py", "quality.py")]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:8]


def calls_per_prompt(recipe: Recipe, constitution: Constitution) -> dict[str, int]:
    """The most model calls that one prompt makes, by step; a judge's call is one principle in one order."""
    generation = recipe.generation
    comparisons = 0 if generation.pairs == "samples" else 1
    comparisons += 0 if generation.pairs == "revision" else math.comb(generation.candidates, 2)
    able = len(constitution.comparing)
    principles = able if recipe.judge.principles == "all" else min(recipe.judge.principles, able)
    return {
        "answer": generation.candidates,
        "critique": generation.rounds,
        "revision": generation.rounds,
        "judge": comparisons * principles * 2,
    }
