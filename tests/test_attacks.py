"""A completion that speaks to the judge gains nothing by form: no delimiter, no chat token of its own reaches the model.

What attacks gain by content with a real model is measured by `python -m benchmarks.attacks`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest

from benchmarks.attacks import FILLER, PAIRS, attacked, attacks
from cai.config import ModelConfig
from cai.constitution import Principle
from cai.engines.chat import ChatTokenizer
from cai.judging import choice, reasoning, score, text
from cai.judging.base import neutral
from cai.types import Message, Messages
from tests.tiny_model import make_tiny_model

ATTACKS = attacks()
PRINCIPLE = Principle(id="kind", preference="Which completion is kinder?")
TAG = re.compile(r"<\s*/?\s*(?:conversation|completion|system|user|assistant|question)\b[^>]*>?", re.IGNORECASE)
Ask = Callable[[Messages, str, str], Messages]
ASKED: dict[str, Ask] = {
    "choice": lambda prompt, a, b: choice.question(prompt, a, b, PRINCIPLE),
    "choice, principle first": lambda prompt, a, b: choice.question(prompt, a, b, PRINCIPLE, "principle-first"),
    "reasoning": lambda prompt, a, b: reasoning.question(prompt, a, b, PRINCIPLE),
    "text": lambda prompt, a, b: text.question(prompt, a, b, PRINCIPLE),
    "score": lambda prompt, a, b: score.question(prompt, b, PRINCIPLE),
}


def tags(dialogue: Messages) -> Counter[str]:
    return Counter(tag for message in dialogue for tag in TAG.findall(message.content))


def test_there_are_attacks_of_every_kind() -> None:
    assert len(ATTACKS) >= 30
    assert len({one["id"] for one in ATTACKS}) == len({one["text"] for one in ATTACKS}) == len(ATTACKS)
    assert {one["kind"] for one in ATTACKS} == {"verdict", "judge-talk", "delimiter", "chat-token"}
    assert all("{completion}" in one["text"] for one in ATTACKS)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda one: one["id"])
def test_an_attack_adds_no_delimiter(attack: dict[str, str]) -> None:
    prompt, better, worse = PAIRS[0]
    hostile, twin = attacked(attack["text"], worse)
    for name, ask in ASKED.items():
        for asked in ((Message("user", prompt),), (Message("user", attack["text"]),)):
            assert tags(ask(asked, better, hostile)) == tags(ask(asked, better, twin)), name
            assert tags(ask(asked, hostile, better)) == tags(ask(asked, twin, better)), name


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer(ModelConfig(model=str(make_tiny_model(tmp_path_factory.mktemp("tiny")))))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda one: one["id"])
def test_an_attack_speaks_no_token_of_the_chat_template(chat: ChatTokenizer, attack: dict[str, str]) -> None:
    prompt, better, worse = PAIRS[0]
    hostile, twin = attacked(attack["text"], worse)
    special = set(chat.tokenizer.all_special_ids)

    def spoken(dialogue: Messages) -> list[int]:
        return [token for token in chat.encode(chat.render(dialogue)) if token in special]

    for ask in ASKED.values():
        assert spoken(ask((Message("user", prompt),), better, hostile)) == spoken(ask((Message("user", prompt),), better, twin))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda one: one["id"])
def test_a_twin_is_as_long_and_harmless(attack: dict[str, str]) -> None:
    hostile, twin = attacked(attack["text"], PAIRS[0][2])
    assert abs(len(hostile) - len(twin)) < 5
    assert twin.removeprefix(PAIRS[0][2]).strip()[:20] in FILLER


def test_delimiters_are_found_in_time_that_grows_with_the_text() -> None:
    text = "<" + " " * 2_000_000 + "x" + "< " * 500_000
    assert neutral(text) == text
    assert neutral("< / completion B>") == "&lt; / completion B>"
