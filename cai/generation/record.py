"""One prompt becomes one `Record`: answer, critique, revise, compare. Read `make_record` top to bottom.

As in Constitutional AI (Bai et al. 2022, arXiv 2212.08073, section 3.1 and 4.1): the policy answers; in each round it
criticises its answer under a principle drawn at random and revises it; the judge then compares completions.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import msgspec

from cai.config import RATING, Recipe
from cai.constitution import Constitution, Principle
from cai.engines import Engine, GenerateRequest
from cai.generation.dialogues import critique_request, few_shot, revision_request, with_few_shot
from cai.generation.draws import draw_evenly, draw_weighted
from cai.generation.quality import clean_revision, find_problem, plain
from cai.judging import Judge, judge_calls, usable_principles
from cai.seeds import derive_seed
from cai.types import Completion, Messages, Prompt, Record, Revision, Source, Verdict

GIVEN = ("candidate-0", "candidate-1")
"""The names of the better and the worse one of a labelled pair, as people see it."""


@dataclass(frozen=True)
class Generator:
    """What every prompt of a run shares: the recipe, the constitution, the policy and the judge."""

    recipe: Recipe
    constitution: Constitution
    policy: Engine | None
    judge: Judge

    async def make_record(self, prompt: Prompt, given: tuple[str, ...] = ()) -> Record:
        """All that happens to one prompt. Raises `RequestError` where a call of it can never succeed.

        Where two completions are `given`, they are compared, and that is all.
        """
        if given:
            record = Record(prompt, tuple(Completion(text, "stop", 0, 0) for text in given), (), ())
            return msgspec.structs.replace(record, verdicts=(await self.compare(record, *GIVEN, "samples"),))
        candidates = await self._answer(prompt)
        revisions = await self._revise(prompt, candidates[0])
        record = Record(prompt, candidates, revisions, ())
        return Record(prompt, candidates, revisions, await self._judge(record))

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

    async def _judge(self, record: Record) -> tuple[Verdict, ...]:
        comparisons, found = self.recipe.generation.comparisons, pairs(record, self.recipe)
        if comparisons != "tournament":
            verdicts = list(await asyncio.gather(*(self.compare(record, *names) for names in found)))
            return tuple(most_decided(verdicts) if comparisons == "best-worst" else verdicts)
        revised = [await self.compare(record, *names) for names in found if names[2] == "revision"]
        drawn = [name for first, second, source in found if source == "samples" for name in (first, second)]
        players = sorted({record.text(name): name for name in reversed(drawn)}.values())  # of equal texts the first
        return (*revised, *await self._tournament(record, players))

    async def _tournament(self, record: Record, players: list[str]) -> list[Verdict]:
        """Who is preferred goes on to the next round; a tie is won by the one that was drawn first."""
        random.Random(derive_seed(self.recipe.seed, record.prompt.id, "tournament")).shuffle(players)
        verdicts: list[Verdict] = []
        while len(players) > 1:
            drawn = list(zip(players[::2], players[1::2], strict=False))
            fought = await asyncio.gather(*(self.compare(record, *pair, "samples") for pair in drawn))
            winners = [one.first if one.probability >= 0.5 else one.second for one in fought]
            players = winners + players[2 * len(drawn) :]
            verdicts += fought
        return verdicts

    @property
    def _rates_alone(self) -> bool:
        judge = self.recipe.judge
        return bool({member.method for member in judge.members or (judge,)} & set(RATING))

    async def compare(self, record: Record, first: str, second: str, source: Source) -> Verdict:
        """The verdict on two completions of a record, under principles drawn for them."""
        able = usable_principles(self.recipe.judge, self.constitution)
        count, names = self.recipe.judge.principles, sorted((first, second))
        whose = () if self._rates_alone else names  # who rates each alone needs the same principles for every pair
        seed = derive_seed(self.recipe.seed, record.prompt.id, "judge principles", *whose)
        principles = able if count == "all" else draw_evenly(able, count, seed)
        named = ((first, record.text(first)), (second, record.text(second)))
        sampled = derive_seed(self.recipe.seed, record.prompt.id, "judge", *names)
        return await self.judge.compare(record.prompt.messages, named, principles, source, sampled)

    async def _generate(self, prompt: Prompt, messages: Messages, step: str, number: int) -> Completion:
        sampling = self.recipe.generation
        seed = derive_seed(self.recipe.seed, prompt.id, step, number)
        assert self.policy
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


def most_decided(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Of the candidates' verdicts the one furthest from a tie, which is the best against the worst; and all others."""
    samples = [verdict for verdict in verdicts if verdict.source == "samples"]
    widest = max(samples, key=_decidedness, default=None)
    return [verdict for verdict in verdicts if verdict.source != "samples" or verdict is widest]


def _decidedness(verdict: Verdict) -> tuple[float, float]:
    """How far from a tie; where probabilities have come to their end, by what was read."""
    gap = sum(one.weight * (first - second) for one in verdict.principles for first, second in one.readings)
    return abs(verdict.probability - 0.5), abs(gap)


def template_hash() -> str:
    """8 hex digits over the texts that models are shown, and the code that draws, words, filters and judges: records made with
    others belong to another run."""
    here = Path(__file__).parent
    files = [file for folder in (here, here.parent / "judging") for file in sorted(folder.glob("*.txt"))]
    files += [here / name for name in ("dialogues.py", "draws.py", "quality.py", "record.py")]
    files += sorted((here.parent / "judging").glob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:8]


def calls_per_prompt(recipe: Recipe, constitution: Constitution, given: bool = False) -> dict[str, int]:
    """The most model calls that one prompt makes, by step; a judge's call is one principle in one order."""
    if given:
        return {"judge": judge_calls(recipe.judge, constitution, 2, 1)}
    generation = recipe.generation
    revised, sampled = generation.pairs != "samples", generation.pairs != "revision"
    completions = (generation.candidates if sampled else 1) + revised
    return {
        "answer": generation.candidates,
        "critique": generation.rounds,
        "revision": generation.rounds,
        "judge": judge_calls(recipe.judge, constitution, completions, comparisons_per_prompt(recipe)),
    }


def comparisons_per_prompt(recipe: Recipe) -> int:
    """The most pairs of one prompt that are judged."""
    generation = recipe.generation
    each = generation.candidates - 1 if generation.comparisons == "tournament" else math.comb(generation.candidates, 2)
    return (generation.pairs != "samples") + (generation.pairs != "revision") * each
