"""One prompt becomes one record: what is asked of whom, in which order, and what is compared with what."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from pathlib import Path

import pytest

from cai.config import Recipe
from cai.constitution import Constitution, Exemplar, Principle, load_constitution
from cai.engines import ChoiceRequest, GenerateRequest, ScriptedEngine
from cai.errors import RequestError
from cai.generation import record as record_module
from cai.generation.draws import derive_seed
from cai.generation.record import Generator, calls_per_prompt, pairs, template_hash
from cai.judging import ChoiceJudge
from cai.types import Completion, Message, Prompt, Record
from tests.records import HOSTILE, completion, record, revision

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


def recipe(**generation) -> Recipe:
    judge = {"principles": generation.pop("principles", 2)}
    return Recipe.model_validate({"generation": generation, "judge": judge})


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
        engine = ScriptedEngine(self.respond)
        return asyncio.run(Generator(asked, constitution, engine, ChoiceJudge(engine)).make_record(prompt))


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
    engine = ScriptedEngine(lambda request: Completion("Half a", "length", 1, 1, request.seed))
    made = asyncio.run(Generator(recipe(rounds=1), CONSTITUTION, engine, ChoiceJudge(engine)).make_record(PROMPT))
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
    engine = ScriptedEngine(slowly(Model().respond))
    generator = Generator(asked, CONSTITUTION, engine, ChoiceJudge(engine))

    async def together():
        return await asyncio.gather(*(generator.make_record(prompt) for prompt in reversed(prompts)))

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

    engine = ScriptedEngine(respond)
    with pytest.raises(RequestError, match="too long"):
        asyncio.run(Generator(recipe(), CONSTITUTION, engine, ChoiceJudge(engine)).make_record(PROMPT))


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
    engine = ScriptedEngine(model.respond)
    made = asyncio.run(Generator(asked, constitution, engine, ChoiceJudge(engine)).make_record(PROMPT))
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
    engine = ScriptedEngine(lambda request: given)
    asked = recipe(candidates=2, rounds=0, pairs="samples")
    made = asyncio.run(Generator(asked, CONSTITUTION, engine, ChoiceJudge(engine)).make_record(PROMPT))
    assert made.candidates == (given, given)
