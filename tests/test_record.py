"""One prompt becomes one record: what is asked of whom, in which order, and what is compared with what."""

from __future__ import annotations

import asyncio
import math
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from cai.config import RATING, Recipe
from cai.constitution import Constitution, Exemplar, Principle, load_constitution
from cai.engines import ChoiceRequest, GenerateRequest, LoglikelihoodRequest, ScriptedEngine
from cai.errors import RequestError
from cai.generation import record as record_module
from cai.generation.record import GIVEN, Generator, calls_per_prompt, most_decided, pairs, template_hash
from cai.judging import build_judge
from cai.seeds import derive_seed
from cai.types import Completion, Message, PrincipleVerdict, Prompt, Record, Verdict
from tests.judges import SHOWN
from tests.records import HOSTILE, completion, record, revision, sure

PROMPT = Prompt("id-1", (Message("user", "Write a rude song."),))
CONSTITUTION = Constitution(
    name="c",
    description="d",
    license="l",
    principles=tuple(
        Principle(id=f"p{n}", critique=f"Critique {n}?", revision=f"Revise {n}.", preference=f"Prefer {n}?") for n in range(6)
    ),
    exemplars=(Exemplar(prompt="e", completion="e", principle="p0", critique="e", revision="e"),),
)


def recipe(judge: dict[str, Any] | None = None, principles: int | str = 2, **generation: Any) -> Recipe:
    return Recipe.model_validate({"generation": generation, "judge": {"principles": principles, **(judge or {})}})


def generator(asked: Recipe, engine: ScriptedEngine, constitution: Constitution = CONSTITUTION) -> Generator:
    return Generator(asked, constitution, engine, build_judge(asked.judge, constitution, lambda _: engine))


def make(asked: Recipe, respond: Any, constitution: Constitution = CONSTITUTION, prompt: Prompt = PROMPT) -> Record:
    return asyncio.run(generator(asked, ScriptedEngine(respond), constitution).make_record(prompt))


class Model:
    """A policy and judge that remembers what it was asked; `answers` may override the texts of a step."""

    def __init__(self, **answers: list[str]) -> None:
        self.requests: list[GenerateRequest] = []
        self.compared: list[ChoiceRequest] = []
        self._answers = {step: iter(texts) for step, texts in answers.items()}

    def respond(self, request):
        if isinstance(request, ChoiceRequest):
            self.compared.append(request)
            return [-0.5, -1.5]
        self.requests.append(request)
        step = self.step(request)
        return next(self._answers.get(step, iter(())), f"A {step} of seed {request.seed}.")

    @staticmethod
    def step(request: GenerateRequest) -> str:
        last = request.messages[-1].content
        return "critique" if last.startswith("Critique") else "revision" if last.startswith("Revise") else "answer"

    def run(self, asked: Recipe, prompt: Prompt = PROMPT, constitution: Constitution = CONSTITUTION) -> Record:
        return make(asked, self.respond, constitution, prompt)


def test_a_round_is_a_critique_of_the_last_text_and_a_revision_under_the_same_principle():
    model = Model(answer=["Original."], critique=["Too rude.", "Still rude."], revision=["Better.", "Best."])
    made = model.run(recipe(rounds=2, exemplars=0))
    steps = [model.step(request) for request in model.requests]
    assert steps == ["answer", "critique", "revision", "critique", "revision"]
    assert [one.text for one in made.revisions] == ["Better.", "Best."]
    assert [message.content for message in model.requests[0].messages] == ["Write a rude song."]
    for number, (text, critique) in enumerate([("Original.", "Too rude."), ("Better.", "Still rude.")]):
        asked, revised = model.requests[2 * number + 1 : 2 * number + 3]
        assert [message.content for message in asked.messages[:2]] == ["Write a rude song.", text]
        assert revised.messages[:3] == asked.messages
        assert revised.messages[3] == Message("assistant", critique)
        digit = made.revisions[number].principle_id[1:]
        assert asked.messages[-1].content.startswith(f"Critique {digit}?")
        assert revised.messages[-1].content.startswith(f"Revise {digit}.")
    assert made.revisions[0].principle_id != made.revisions[1].principle_id


def test_every_call_has_a_seed_of_its_own_that_its_name_gives():
    model = Model()
    made = model.run(recipe(candidates=3, rounds=3, pairs="both"))
    seeds = [request.seed for request in model.requests]
    assert len(set(seeds)) == len(seeds) == 9
    assert [one.seed for one in made.candidates] == [derive_seed(0, "id-1", "answer", number) for number in range(3)]
    assert [one.critique.seed for one in made.revisions] == [derive_seed(0, "id-1", "critique", n) for n in (1, 2, 3)]
    assert [one.revision.seed for one in made.revisions] == [derive_seed(0, "id-1", "revision", n) for n in (1, 2, 3)]


def test_sampling_is_that_of_the_recipe():
    model = Model()
    model.run(recipe(temperature=0.3, top_p=0.8, max_tokens=11, rounds=1))
    assert {(one.temperature, one.top_p, one.max_tokens) for one in model.requests} == {(0.3, 0.8, 11)}


@pytest.mark.parametrize(("exemplars", "turns"), [(None, 6), (0, 0), (1, 6)])
def test_exemplars_stand_before_critiques_and_never_before_answers(exemplars, turns):
    model = Model()
    model.run(recipe(rounds=1, exemplars=exemplars))
    answer, critique, revised = (len(request.messages) for request in model.requests)
    assert (answer, critique, revised) == (1, turns + 3, turns + 5)


def test_a_revision_that_is_none_is_kept_with_its_reason_and_the_next_round_starts_before_it():
    model = Model(answer=["Original."], revision=["I can't help with that.", "Sure, here is the revised response: Best."])
    made = model.run(recipe(rounds=2, exemplars=0))
    assert [(one.text, one.problem, one.cleaned) for one in made.revisions] == [
        ("I can't help with that.", "refusal", ()),
        ("Best.", None, ("preamble",)),
    ]
    assert model.requests[3].messages[1] == Message("assistant", "Original.")
    assert [(one.first, one.second) for one in made.verdicts] == [("candidate-0", "revision-2")]


def test_where_no_round_gave_a_revision_nothing_is_compared():
    model = Model(answer=["Original."], revision=["", "original"])
    made = model.run(recipe(rounds=2))
    assert [one.problem for one in made.revisions] == ["empty", "unchanged"]
    assert made.verdicts == ()
    assert model.compared == []


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_answer_is_not_critiqued(empty):
    model = Model(answer=[empty])
    made = model.run(recipe(rounds=2))
    assert [model.step(request) for request in model.requests] == ["answer"]
    assert (made.revisions, made.verdicts) == ((), ())


def test_a_revision_cut_off_by_the_token_limit_is_none():
    made = make(recipe(rounds=1), lambda request: Completion("Half a", "length", 1, 1, request.seed))
    assert [one.problem for one in made.revisions] == ["truncated"]


def test_all_candidates_are_compared_with_each_other_and_the_first_with_its_revision():
    made = Model().run(recipe(candidates=3, rounds=1, pairs="both", principles="all"))
    assert [(one.first, one.second, one.source) for one in made.verdicts] == [
        ("candidate-0", "revision-1", "revision"),
        ("candidate-0", "candidate-1", "samples"),
        ("candidate-0", "candidate-2", "samples"),
        ("candidate-1", "candidate-2", "samples"),
    ]
    assert all([one.principle_id for one in each.principles] == [f"p{n}" for n in range(6)] for each in made.verdicts)


def test_pairs_leave_out_what_is_empty_or_equal():
    def named(asked, made):
        return [(first, second) for first, second, _ in pairs(made, asked)]

    samples = recipe(candidates=5, pairs="samples")
    made = record(candidates=["a", "", "a\n", "b", " "], revisions=[revision(1, "c")])
    assert named(samples, made) == [("candidate-0", "candidate-3"), ("candidate-2", "candidate-3")]
    back = record(candidates=["a "], revisions=[revision(1, "b"), revision(2, "a")])
    assert named(recipe(), back) == []
    restored = record(candidates=["The river runs."], revisions=[revision(1, "b"), revision(2, "the river  runs!")])
    assert named(recipe(), restored) == []
    assert named(samples, record(candidates=["A b.", "**a b**", "c"])) == [
        ("candidate-0", "candidate-2"),
        ("candidate-1", "candidate-2"),
    ]
    assert named(recipe(), record(revisions=[revision(1, "b"), revision(2, "c", problem="empty")])) == [
        ("candidate-0", "revision-1")
    ]


def test_each_pair_is_judged_by_principles_of_its_own_drawing():
    judged = Counter()
    for number in range(60):
        made = Model().run(recipe(rounds=1, principles=2), Prompt(f"id-{number}", PROMPT.messages))
        ids = [one.principle_id for one in made.verdicts[0].principles]
        assert len(set(ids)) == 2
        judged.update(ids)
    assert set(judged) == {f"p{n}" for n in range(6)}
    assert min(judged.values()) > 5


def test_records_do_not_depend_on_what_runs_beside_them():
    asked = recipe(candidates=2, rounds=2, pairs="both")
    prompts = [Prompt(f"id-{number}", PROMPT.messages) for number in range(8)]
    alone = {prompt.id: Model().run(asked, prompt) for prompt in prompts}
    shared = generator(asked, ScriptedEngine(slowly(Model().respond)))

    async def together():
        return await asyncio.gather(*(shared.make_record(prompt) for prompt in reversed(prompts)))

    assert {made.prompt.id: made for made in asyncio.run(together())} == alone


def slowly(respond):
    async def answer(request):
        await asyncio.sleep(hash(request) % 7 / 2000)
        return respond(request)

    return answer


def test_another_seed_makes_another_record():
    first = Model().run(Recipe(seed=1))
    second = Model().run(Recipe(seed=2))
    assert first.candidates != second.candidates


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_pass_through_to_the_letter(text):
    prompt = Prompt(text, (Message("user", text),), text)
    model = Model(answer=[text], critique=[text * 2], revision=[f"{text} better"])
    made = model.run(recipe(rounds=1), prompt)
    assert made.prompt == prompt
    assert made.candidates[0].text == text
    assert made.revisions[0].critique.text == text * 2
    assert made.revisions[0].revision.text == f"{text} better"
    asked = model.requests[-1].messages
    assert [message.content for message in asked[-4:-1:2]] == [text.strip(), text * 2]


def test_a_request_that_can_never_succeed_raises():
    def respond(request):
        raise RequestError("too long")

    with pytest.raises(RequestError, match="too long"):
        make(recipe(), respond)


@pytest.mark.parametrize("principles", [1, 4, 100, "all"])
@pytest.mark.parametrize(
    "generation",
    [
        {"rounds": 2},
        {"rounds": 3, "candidates": 2},
        {"rounds": 0, "candidates": 3, "pairs": "samples"},
        {"rounds": 1, "candidates": 4, "pairs": "both"},
    ],
)
def test_the_calls_of_a_prompt_are_those_that_were_promised(generation, principles):
    asked, model = recipe(**generation, principles=principles), Model()
    constitution = load_constitution("concise-and-clear")
    promised = calls_per_prompt(asked, constitution)
    made = model.run(asked, constitution=constitution)
    assert len(model.compared) == promised["judge"]
    assert len(model.requests) == promised["answer"] + promised["critique"] + promised["revision"]
    assert (len(made.candidates), len(made.revisions)) == (promised["answer"], promised["revision"])


def test_the_hash_in_a_runs_identity_follows_templates_and_the_code_that_draws_words_and_filters(tmp_path, monkeypatch):
    package = Path(record_module.__file__).parent.parent
    for name in ("generation", "judging"):
        shutil.copytree(package / name, tmp_path / name)
    monkeypatch.setattr(record_module, "__file__", str(tmp_path / "generation" / "record.py"))
    hashes = [template_hash(), template_hash()]
    assert hashes[0] == hashes[1]
    names = ["critique.txt", "revision.txt", "quality.py", "draws.py", "dialogues.py"]
    for file in [*(tmp_path / "generation" / name for name in names), *sorted((tmp_path / "judging").glob("*.txt"))]:
        file.write_text(file.read_text() + " ")
        hashes.append(template_hash())
    assert len(set(hashes)) == len(hashes) - 1 >= 7


def test_a_completion_is_kept_as_the_engine_gave_it():
    given = completion("  Original.\n", length=True, seed=None)
    made = make(recipe(candidates=2, rounds=0, pairs="samples"), lambda request: given)
    assert made.candidates == (given, given)


# --- which candidates are compared


class Strengths:
    """Candidates of planted strengths, answered in an order of their own, and a judge of any method that sees them."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.strengths = random.Random(seed).sample(range(count), count)
        self.asked: list[Any] = []
        self._answers = iter(f"Candidate of strength {strength}." for strength in self.strengths)

    def respond(self, request: Any) -> Any:
        last = request.messages[-1]
        if isinstance(request, GenerateRequest) and last.content.startswith("Write"):
            return next(self._answers)
        self.asked.append(request)
        if isinstance(request, LoglikelihoodRequest):
            held = "would choose" in last.content
            return (-1.0 if held else 1.0) * (20 - strength(request.continuation)) / 10
        if isinstance(request, GenerateRequest):
            return self.thought(request)
        if not isinstance(request, ChoiceRequest):
            return strength(last.content) / 3
        if len(request.choices) == 10:
            return [-abs(number - strength(request.messages[0].content) / 2) for number in range(10)]
        first, second = map(strength, SHOWN.findall(request.messages[0].content)[0])
        return [(first - second) / 4 - 3, (second - first) / 4 - 3]

    @staticmethod
    def thought(request: GenerateRequest) -> str:
        first, second = map(strength, SHOWN.findall(request.messages[-1].content)[0])
        return "A" if first > second else "B"

    def run(self, asked: Recipe, constitution: Constitution = CONSTITUTION) -> Record:
        return make(asked, self.respond, constitution)


def strength(text: str) -> int:
    return int(text.split("strength ")[1].partition(".")[0])


def samples(comparisons: str, candidates: int, judge: dict[str, Any] | None = None, **more: Any) -> Recipe:
    return recipe(judge, candidates=candidates, comparisons=comparisons, **{"rounds": 0, "pairs": "samples", **more})


def rounds_of(verdicts: Sequence[Verdict], players: int) -> list[list[Verdict]]:
    """A tournament's verdicts by rounds: half of the players fight, one who is left over goes on."""
    found, left = [], list(verdicts)
    while players > 1:
        found.append(left[: players // 2])
        left, players = left[players // 2 :], players - players // 2
    assert left == []
    return found


def test_by_default_each_candidate_is_compared_with_each():
    made = Strengths(7).run(samples("all", 7))
    names = [f"candidate-{number}" for number in range(7)]
    assert [(one.first, one.second) for one in made.verdicts] == list(combinations(names, 2))


@pytest.mark.parametrize("count", range(2, 17))
def test_a_tournament_is_won_by_the_strongest_after_one_comparison_less_than_there_are_candidates(count):
    model = Strengths(count, seed=count)
    made = model.run(samples("tournament", count))
    assert len(made.verdicts) == count - 1
    still = {f"candidate-{number}" for number in range(count)}
    for fought in rounds_of(made.verdicts, count):
        players = [name for one in fought for name in (one.first, one.second)]
        assert len(set(players)) == len(players)
        assert set(players) <= still, "who has lost is out"
        still -= {one.second if one.probability > 0.5 else one.first for one in fought}
    assert still == {f"candidate-{model.strengths.index(count - 1)}"}


def test_a_tournament_is_drawn_from_the_seed_and_the_prompt_alone():
    def drawn(seed=0, prompt=PROMPT):
        asked = samples("tournament", 8).model_copy(update={"seed": seed})
        return [(one.first, one.second) for one in make(asked, Strengths(8).respond, prompt=prompt).verdicts]

    assert drawn() == drawn()
    others = [drawn(seed=1), drawn(prompt=Prompt("id-2", PROMPT.messages))]
    assert all(other != drawn() for other in others)
    firsts = Counter(name for seed in range(40) for name in drawn(seed)[0])
    assert len(firsts) == 8, "any candidate may begin"


def test_a_tie_in_a_tournament_is_won_by_whom_was_drawn_first():
    made = make(
        samples("tournament", 5), lambda request: [-1.0, -1.0] if isinstance(request, ChoiceRequest) else f"{request.seed}"
    )
    rounds = rounds_of(made.verdicts, 5)
    winners = [one.first for one in rounds[0]]
    assert [rounds[1][0].first, rounds[1][0].second] == winners
    assert rounds[2][0].first == winners[0]
    assert {one.probability for one in made.verdicts} == {0.5}


@pytest.mark.parametrize("texts", [["a", "a", "b", "b", "c"], ["a", "", "b"], ["a", "a", "a"], ["", "", "b"]])
def test_no_tournament_pits_equal_or_empty_completions_against_each_other(texts):
    for seed in range(8):
        answers = iter(texts)
        asked = samples("tournament", len(texts)).model_copy(update={"seed": seed})
        made = make(asked, lambda request, left=answers: [-1.0, -2.0] if isinstance(request, ChoiceRequest) else next(left))
        fought = [{made.text(one.first), made.text(one.second)} for one in made.verdicts]
        assert all(len(pair) == 2 and "" not in pair for pair in fought)
        assert len(fought) == max(0, len(set(texts) - {""}) - 1)


def test_revisions_are_compared_beside_a_tournament():
    made = Model().run(recipe(candidates=5, rounds=1, pairs="both", comparisons="tournament"))
    assert [one.source for one in made.verdicts] == ["revision"] + ["samples"] * 4
    assert (made.verdicts[0].first, made.verdicts[0].second) == ("candidate-0", "revision-1")


@pytest.mark.parametrize("method", RATING)
@pytest.mark.parametrize("count", [2, 4, 9, 16])
def test_best_worst_rates_each_candidate_once_and_keeps_the_best_against_the_worst(count, method):
    constitution = CHECKED if method == "checks" else CONSTITUTION
    model = Strengths(count, seed=count)
    made = model.run(samples("best-worst", count, {"method": method, "model": "m"}, principles=2), constitution)
    (only,) = made.verdicts
    best = only if only.probability > 0.5 else only.swap()
    if method != "checks":
        assert (strength(made.text(best.first)), strength(made.text(best.second))) == (count - 1, 0)
    each = {"likelihood": 4, "score": 2, "reward-model": 1, "checks": 0}[method]
    assert len(set(model.asked)) == len(model.asked) == each * count


def test_best_worst_keeps_the_widest_of_the_candidates_verdicts_and_every_revision():
    one, other = sure("candidate-0", "candidate-1", 0.6, "samples"), sure("candidate-0", "candidate-2", 0.3, "samples")
    revised = sure("candidate-0", "revision-1", 0.9)
    assert most_decided([revised, one, other]) == [revised, other]
    assert most_decided([revised]) == [revised]
    assert most_decided([]) == []


# --- completions that are given


def test_given_completions_are_compared_and_nothing_is_generated():
    model = Model()
    asked = recipe(candidates=3, rounds=2, pairs="both")
    engine = ScriptedEngine(model.respond)
    labels = Generator(asked, CONSTITUTION, None, build_judge(asked.judge, CONSTITUTION, lambda _: engine))
    made = asyncio.run(labels.make_record(PROMPT, ("Chosen.", "Rejected.")))
    assert [one.text for one in made.candidates] == ["Chosen.", "Rejected."]
    (only,) = made.verdicts
    assert (only.first, only.second, only.source) == (*GIVEN, "samples")
    assert (model.requests, made.revisions) == ([], ())
    assert len(model.compared) == calls_per_prompt(asked, CONSTITUTION, given=True)["judge"] == 2 * 2
    assert set(calls_per_prompt(asked, CONSTITUTION, given=True)) == {"judge"}


# --- what it costs


CHECKED = Constitution(
    name="c",
    description="d",
    license="l",
    principles=(
        *CONSTITUTION.principles,
        Principle.model_validate({"id": "long", "check": {"max_characters": 24}}),
        Principle.model_validate({"id": "odd", "check": {"must_match": "[13579][.]"}}),
    ),
)
PANEL = [{"name": "one"}, {"name": "two", "method": "score"}, {"name": "three", "method": "reasoning"}]
METHODS = [
    *({"method": method} for method in ("choice", "likelihood", "score", "reward-model", "checks")),
    *({"method": method, "samples": number} for method in ("reasoning", "text") for number in (1, 3)),
    {"method": "panel", "members": PANEL, "samples": 2},
]


@pytest.mark.parametrize("principles", [2, "all"])
@pytest.mark.parametrize("judge", METHODS, ids=lambda judge: f"{judge['method']}-{judge.get('samples', 1)}")
@pytest.mark.parametrize("comparisons", ["all", "tournament", "best-worst"])
def test_the_judges_calls_are_those_that_were_promised(comparisons, judge, principles):
    if comparisons == "best-worst" and judge["method"] not in RATING:
        pytest.skip("a recipe that is refused")
    constitution = CHECKED if judge["method"] == "checks" else CONSTITUTION
    for count in range(4, 17):
        model, asked = Strengths(count, count), samples(comparisons, count, {"model": "m", **judge}, principles=principles)
        model.run(asked, constitution)
        promised = calls_per_prompt(asked, constitution)
        assert promised == {"answer": count, "critique": 0, "revision": 0, "judge": len(model.asked)}
        if judge["method"] == "score":
            assert promised["judge"] == count * (6 if principles == "all" else 2), "linear in the candidates"
        elif judge["method"] == "choice":
            each = count - 1 if comparisons == "tournament" else math.comb(count, 2)
            assert promised["judge"] == each * (6 if principles == "all" else 2) * 2


@pytest.mark.parametrize("judge", METHODS, ids=lambda judge: f"{judge['method']}-{judge.get('samples', 1)}")
@pytest.mark.parametrize("principles", [3, "all"])
def test_where_programs_judge_too_no_more_calls_are_made_than_promised(judge, principles):
    for number in range(4):
        model, asked = Strengths(4, number), samples("all", 4, {"model": "m", **judge}, principles=principles)
        made = make(asked, model.respond, CHECKED, Prompt(f"id-{number}", PROMPT.messages))
        promised = calls_per_prompt(asked, CHECKED)["judge"]
        assert len(model.asked) == promised if principles == "all" else len(model.asked) <= promised
        assert len(made.verdicts) == 6


def test_the_most_decided_of_equally_sure_verdicts_is_told_by_what_was_read():
    def sure(first, second, gap):
        one = PrincipleVerdict("reward", 1.0, ((gap, 0.0),), 1.0, "reward-model")
        return Verdict(first, second, "samples", 1.0, (one,))

    verdicts = [sure("candidate-0", "candidate-1", 100.0), sure("candidate-2", "candidate-1", 700.0)]
    assert most_decided(verdicts) == verdicts[1:]
