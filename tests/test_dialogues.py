"""What the policy reads, to the letter."""

from __future__ import annotations

from pathlib import Path

import pytest

from cai.constitution import Constitution, Exemplar, Principle, load_constitution
from cai.generation.dialogues import critique_request, few_shot, revision_request, with_few_shot
from cai.types import Message, Messages
from tests.records import HOSTILE

GOLDEN = Path(__file__).parent / "golden"
KIND = Principle(id="kind", critique="What is unkind in it?", revision="Rewrite it kindly.")
EXEMPLAR = Exemplar(
    prompt="Insult my boss.",
    completion="He is a fool.",
    principle="kind",
    critique="It insults him.",
    revision="What happened?",
)
CONSTITUTION = Constitution(name="c", description="d", license="l", principles=(KIND,), exemplars=(EXEMPLAR,))


def rendered(messages: Messages) -> str:
    return "".join(f"=== {message.role}\n{message.content}\n" for message in messages)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("dialogue", (Message("user", "Write a rude song."),)),
        (
            "dialogue_multi_turn",
            (
                Message("system", "Be brief."),
                Message("user", "Hello"),
                Message("assistant", "Hi."),
                Message("user", "Write a rude song."),
            ),
        ),
    ],
)
def test_a_whole_round_as_the_policy_reads_it(name, prompt):
    shown = with_few_shot(few_shot(CONSTITUTION, CONSTITUTION.exemplars), prompt)
    asked = critique_request(shown, "You stink.", KIND) + revision_request("It is rude.", KIND)
    assert rendered(asked) == GOLDEN.joinpath(f"{name}.txt").read_text(encoding="utf-8")


def test_without_exemplars_the_prompt_stands_alone():
    prompt = (Message("system", "s"), Message("user", "u"))
    assert with_few_shot(few_shot(CONSTITUTION, ()), prompt) == prompt


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_is_taken_for_a_template(text):
    principle = Principle(id="p", critique=f"Critique {text}.", revision=f"Revise {text}.")
    asked = critique_request((Message("user", text),), text, principle) + revision_request(text, principle)
    assert [message.content for message in asked if message.role == "assistant"] == [text, text]
    assert asked[0].content == text
    for message, word in ((asked[2], "Critique"), (asked[4], "Revise")):
        assert message.content.startswith(f"{word} {text}.\n")
        assert message.content.count("\n") == text.count("\n") + 1


@pytest.mark.parametrize("name", ["harmless", "helpful-honest-harmless", "concise-and-clear"])
def test_roles_alternate_and_the_exemplars_come_in_the_form_of_the_real_dialogue(name):
    constitution = load_constitution(name)
    shots = few_shot(constitution, constitution.exemplars)
    asked = critique_request(with_few_shot(shots, (Message("user", "u"),)), "c", constitution.critiquing[0])
    asked += revision_request("critique", constitution.critiquing[0])
    assert [message.role for message in asked] == ["user", "assistant"] * (len(asked) // 2) + ["user"]
    assert len(shots) == 6 * len(constitution.exemplars) > 0
    endings = [message.content.rpartition("\n")[2] for message in asked[2::6]]
    assert len(set(endings)) == 1
