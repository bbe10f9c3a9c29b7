"""Pairs with labels: every form of a row, what is wrong with the others, ids, sources, and the real HH data."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cai.config import PromptsConfig
from cai.errors import ConfigError, RowError
from cai.prompts import Pair, Row, read_pairs
from cai.prompts.pairs import to_pair
from cai.prompts.rows import COLUMNS, to_prompt
from cai.types import Message
from tests.sources import written

HH = Path(__file__).resolve().parents[2] / "shared" / "data" / "hh_harmless_dev.jsonl.gz"


def said(text: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": text}


Q, SYSTEM = said("q", "user"), said("s", "system")
AB: dict[str, Any] = {"prompt": "q", "chosen": "a", "rejected": "b"}
QA, QB = "\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q\n\nAssistant: b"


def pair_error(row: Any, column: str | None = None) -> str:
    with pytest.raises(RowError) as caught:
        to_pair(row, column)
    return str(caught.value)


def pair_of(row: Row) -> Pair | None:
    return Pair(row.prompt, *row.given) if row.prompt else None


def read(source: Path, **options: Any) -> list[Row]:
    return list(read_pairs(PromptsConfig(source=str(source), **options)))


# --- one row


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": QA, "rejected": QB},
        {"chosen": "Human: q\n\nAssistant:a \n", "rejected": QB},
        {"chosen": [Q, said("a")], "rejected": [Q, said("b")]},
        {"chosen": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "rejected": (Q, said(" b\n"))},
        {"chosen": QA, "rejected": [Q, said("b")]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": " a", "rejected": "b\n"},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a", "rejected": " b"},
        {"prompt": [Q], "chosen": [said("a")], "rejected": [said("b")]},
        {"prompt": "q", "chosen": "a", "rejected": [said("b")]},
        {"prompt": "q", "chosen": [Q, said("a")], "rejected": [Q, said("b")]},
        {"prompt": "q", "chosen": QA, "rejected": QB},
        {"prompt": [Q], "chosen": QA, "rejected": QB, "messages": [Q, said("a")]},
        *({column: "q", "chosen": "a", "rejected": "b"} for column in COLUMNS if column != "chosen"),
        {"prompt": "", "question": "q", "chosen": "a", "rejected": "b"},
        {"prompt": None, "chosen": QA, "rejected": QB},
        {"prompt": "q", "chosen": "a", "rejected": "b", "id": None, "pair_id": None, "prompt_id": "p", "category": None},
    ],
)
def test_every_form_of_the_same_pair_is_the_same_pair(row: Any) -> None:
    pair = to_pair(row)
    assert pair == to_pair(AB)
    assert (pair.prompt.messages, pair.chosen, pair.rejected) == ((Message("user", "q"),), "a", "b")


def test_the_preference_view_of_a_run_is_read() -> None:
    row = {
        "prompt": [SYSTEM, Q],
        "chosen": [said("Human: a")],
        "rejected": [said("b")],
        "chosen_probability": 0.77,
        "source": "revision",
        "principle_ids": ["x"],
        "pair_id": "p/candidate-0/revision-1",
        "prompt_id": "p",
    }
    prompt, chosen, rejected = to_pair(row)
    assert (prompt.id, chosen, rejected) == ("p/candidate-0/revision-1", "Human: a", "b")
    assert prompt.messages == (Message("system", "s"), Message("user", "q"))


def test_a_dialogue_may_begin_before_the_prompt_of_its_row() -> None:
    turns = [SYSTEM, said("x", "user"), said("y"), Q]
    pair = to_pair({"prompt": "q", "chosen": [*turns, said("a")], "rejected": [*turns, said("b")]})
    assert [(turn.role, turn.content) for turn in pair.prompt.messages] == [(turn["role"], turn["content"]) for turn in turns]


def test_an_answer_in_parts_is_one() -> None:
    transcripts = {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nAssistant:  c", "rejected": QB}
    lists = {"chosen": [Q, said("a"), said("c")], "rejected": [Q, said("b")]}
    assert to_pair(transcripts) == to_pair(lists)
    assert to_pair(lists).chosen == "a\n\nc"


def test_the_column_that_is_asked_for_holds_the_prompt() -> None:
    row = {"prompt": "x", "mine": "q", "chosen": "a", "rejected": "b"}
    assert to_pair(row, "mine").prompt.messages == (Message("user", "q"),)
    assert pair_error(row, "mime").startswith("no column 'mime' (did you mean 'mine'?); columns here: prompt, mine, ")
    assert pair_error(row, "chosen").startswith("no prompt: 'chosen' and 'rejected' are only answers; expected one of prompt,")
    row = {"prompt": "x", "chosen": QA, "rejected": QB}
    assert to_pair(row, "chosen").prompt.messages == (Message("user", "q"),)


EMPTY = "is empty: there is no assistant's turn with text"
DIFFER = "'chosen' and 'rejected' do not answer the same dialogue: they differ from turn"
MORE = "\n\nHuman: r\n\nAssistant: c"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("q", "the row is str ('q'); expected columns 'chosen' and 'rejected'"),
        (None, "the row is NoneType (None); expected columns"),
        ([[[]]], "the row is list ([[[]]]); expected columns"),
        ({}, "no column 'chosen'; columns here: none; expected the better completion in 'chosen', the worse one in 'rejected'"),
        (
            {"choosen": "a", "rejected": "b"},
            "no column 'chosen' (did you mean 'choosen'?); columns here: choosen, rejected; exp",
        ),
        (
            {"chosen": "a", "reject": "b"},
            "no column 'rejected' (did you mean 'reject'?); columns here: chosen, reject; expected",
        ),
        (
            {"prompt": "q", "response_0": "a", "response_1": "b"},
            "no column 'chosen'; columns here: prompt, response_0, response_1; expected the better completion in 'chosen', the "
            "worse one in 'rejected', and 'prompt' unless both are whole dialogues",
        ),
        ({"completion_a": "a", "completion_b": "b"}, "no column 'chosen'; columns here: completion_a, completion_b; expected"),
        (
            AB | {"rejected": None},
            "'rejected' is empty; columns here: prompt, chosen, rejected; expected the better completion",
        ),
        (AB | {"chosen": 1}, "'chosen' is int (1); expected a text or a list of messages"),
        (AB | {"rejected": said("b")}, "'rejected' is dict ({'content': 'b', 'role': 'assistant'}); expected a text or a list"),
        (AB | {"chosen": [["a"]]}, "'chosen'[0] is list; expected a message with 'role' and 'content'"),
        (AB | {"rejected": [said("b", "tool")]}, "'rejected'[0] has the role 'tool'; expected system, user or assistant"),
        (AB | {"chosen": [{"role": "assistant"}]}, "'chosen'[0] has NoneType as its content; expected a text"),
        (AB | {"chosen": ""}, f"'chosen' {EMPTY}"),
        (AB | {"rejected": " \n"}, f"'rejected' {EMPTY}"),
        (AB | {"chosen": []}, f"'chosen' {EMPTY}"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: ", "rejected": QB}, f"'chosen' {EMPTY}"),
        ({"chosen": QA, "rejected": "\n\nHuman: q"}, "'rejected' ends with a user message; expected it to end with the assist"),
        ({"chosen": [said("s", "system")], "rejected": QB}, "'chosen' ends with a system message; expected it to end with the"),
        ({"chosen": QA, "rejected": QA + "\n"}, "'chosen' and 'rejected' are equal; expected two different completions"),
        (AB | {"rejected": " a "}, "'chosen' and 'rejected' are equal; expected two different completions"),
        ({"chosen": QA, "rejected": "\n\nHuman: p\n\nAssistant: b"}, f"{DIFFER} 1 on"),
        ({"chosen": QA + MORE, "rejected": QB + MORE}, f"{DIFFER} 2 on"),
        ({"chosen": QA + MORE, "rejected": QB}, f"{DIFFER} 2 on"),
        (AB | {"chosen": QA}, f"{DIFFER} 1 on"),
        ({"prompt": "p", "chosen": QA, "rejected": QB}, "'prompt' is not what 'chosen' and 'rejected' answer: their dialogues"),
        ({"chosen": "a", "rejected": "b"}, "no prompt: 'chosen' and 'rejected' are only answers; expected one of prompt, mess"),
        (
            {"prompt": "", "chosen": [said("a")], "rejected": "b"},
            "no prompt: 'chosen' and 'rejected' are only answers; expected",
        ),
        (AB | {"prompt": " "}, "'prompt' is empty: there is no user's turn with text to answer"),
        (AB | {"prompt": 5}, "'prompt' is int (5); expected a text or a list of messages"),
        ({"chosen": [SYSTEM, said("a")], "rejected": [SYSTEM, said("b")]}, "'chosen' ends with a system message; expected it"),
        (AB | {"category": []}, "its category is list ([]); expected a text"),
        (AB | {"id": True}, "its id is True; expected a text of 1 to 200 characters or a whole number"),
        (AB | {"pair_id": ""}, "its id is ''; expected a text of 1 to 200 characters or a whole number"),
        (AB | {"prompt_id": [1]}, "its id is [1]; expected a text of 1 to 200 characters or a whole number"),
    ],
)
def test_a_bad_row_says_what_it_is_and_what_was_expected(row: Any, message: str) -> None:
    assert pair_error(row).startswith(message)


# --- ids


def test_an_id_is_taken_from_the_row_or_made_of_all_three_texts() -> None:
    assert to_pair(AB | {"id": 7, "prompt_id": "p"}).prompt.id == "7"
    assert to_pair(AB | {"id": 7, "pair_id": 8}).prompt.id == "8"
    assert to_pair(AB).prompt.id == "31abf0aec6c205d4"
    others = [{"prompt": "Q"}, {"chosen": "A"}, {"rejected": "B"}, {"chosen": "b", "rejected": "a"}, {"prompt": [SYSTEM, Q]}]
    assert len({to_pair(AB | other).prompt.id for other in [{}, *others]}) == 6


def test_a_category_is_that_of_the_prompt() -> None:
    assert to_pair(AB | {"category": 3}).prompt.category == "3"
    assert to_pair({"chosen": QA, "rejected": QB, "category": "c"}).prompt.category == "c"


def test_pairs_of_one_prompt_have_ids_of_their_own_though_they_share_its_id() -> None:
    ids = {to_pair(AB | {"prompt_id": "p", "rejected": worse}).prompt.id for worse in "bcd"}
    assert len(ids) == 3
    assert "p" not in ids


def test_the_pair_id_of_a_run_may_be_longer_than_an_id() -> None:
    row = AB | {"prompt_id": "x" * 200}
    assert to_pair(row | {"pair_id": "x" * 200}).prompt.id == "x" * 200
    assert to_pair(row | {"pair_id": "x" * 200 + "/candidate-0/revision-1"}) == to_pair(row)


# --- any text, and any JSON

TEXT = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: text.strip())
PLAIN = TEXT.filter(lambda text: not text.lstrip("\n").startswith("Human:"))
TURN = PLAIN.map(str.strip).filter(lambda text: "\n\nHuman:" not in text and "\n\nAssistant:" not in text)


@given(st.lists(PLAIN, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2), PLAIN, PLAIN)
def test_lists_of_messages_and_texts_are_read_back(turns: list[str], chosen: str, rejected: str) -> None:
    if chosen.strip() == rejected.strip():
        return
    dialogue = [said(turn, ("user", "assistant")[index % 2]) for index, turn in enumerate(turns)]
    whole = to_pair({"chosen": [*dialogue, said(chosen)], "rejected": [*dialogue, said(rejected)]})
    assert [turn.content for turn in whole.prompt.messages] == turns
    assert (whole.chosen, whole.rejected) == (chosen.strip(), rejected.strip())
    assert whole == to_pair({"prompt": dialogue, "chosen": chosen, "rejected": rejected})
    assert whole == to_pair({"prompt": dialogue, "chosen": [said(chosen)], "rejected": [said(rejected)]})


@given(st.lists(TURN, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2), TURN, TURN)
def test_transcripts_are_read_back(turns: list[str], chosen: str, rejected: str) -> None:
    if chosen == rejected:
        return
    dialogue = "".join(f"\n\n{('Human', 'Assistant')[index % 2]}: {turn}" for index, turn in enumerate(turns))
    pair = to_pair({"chosen": f"{dialogue}\n\nAssistant: {chosen}", "rejected": f"{dialogue}\n\nAssistant: {rejected}"})
    assert [turn.content for turn in pair.prompt.messages] == turns
    assert pair.prompt.messages == to_prompt(dialogue).messages
    assert (pair.chosen, pair.rejected) == (chosen, rejected)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(), max_size=4) | st.sampled_from([QA, QB, "user"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": inner})
        | st.dictionaries(st.text(st.characters(), max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)
COLUMN = st.fixed_dictionaries({}, optional=dict.fromkeys(("prompt", "question", "id", "pair_id", "category"), JSON))


@given(JSON, JSON, COLUMN)
@example("\ud800", "\udfff \x00", {"prompt": "\ud83d\ude00 \x00", "category": "\ud800", "pair_id": "\udfff"})
@example("\ud83d\ude00", "\U0001f600", {"prompt": "q"})
@example([{"role": "\ud800", "content": "x"}], "b", {"\ud800": "x"})
def test_whatever_json_a_row_is_it_becomes_a_pair_or_a_row_error(chosen: Any, rejected: Any, others: dict[str, Any]) -> None:
    for row in ({"chosen": chosen, "rejected": rejected, **others}, {"chosen": chosen, **others}, chosen):
        try:
            pair = to_pair(row)
        except RowError as exc:
            str(exc).encode()
            continue
        assert pair.prompt.messages[-1].role == "user"
        assert pair.chosen != pair.rejected
        for text in (pair.prompt.id, pair.chosen, pair.rejected):
            assert text.encode()
            assert text.strip()


# --- sources


def test_a_bad_row_is_told_where_it_is_and_the_others_are_read(tmp_path: Path) -> None:
    deep = "[" * 100_000
    good = json.dumps({"chosen": QA, "rejected": QB})
    lines = f'{good}\nnot json\n\n"x"\n{{"chosen": {deep}\n{{"chosen": "{"a" * 10**6}", "rejected": 0}}\n{good}\n'
    rows = read(written(tmp_path, "a.jsonl.gz", gzip.compress(lines.encode())))
    assert [(row.origin, row.prompt is None, row.error is None) for row in rows] == [
        (f"a.jsonl.gz:{line}", bad, not bad)
        for line, bad in ((1, False), (2, True), (4, True), (5, True), (6, True), (7, False))
    ]
    assert [pair_of(row) for row in (rows[0], rows[-1])] == [to_pair(json.loads(good))] * 2
    assert [len(row.raw) for row in rows] == [0, 0, 3, 0, 2000, 0]
    assert str(rows[4].error).startswith("'rejected' is int (0); expected a text")


def test_a_row_nested_as_deeply_as_can_be_read_is_a_row_error(tmp_path: Path) -> None:
    lines = [f'{{"prompt": "q", "chosen": "a", "rejected": {"[" * depth}{"]" * depth}}}' for depth in range(1, 2000, 7)]
    rows = read(written(tmp_path, "a.jsonl", "\n".join(lines)))
    assert len(rows) == len(lines)
    assert all(row.error and not row.prompt for row in rows)


def test_every_kind_of_file_holds_pairs(tmp_path: Path) -> None:
    lists = {"prompt": [Q], "chosen": [said("a")], "rejected": [said("b")]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([lists]), tmp_path / "a.parquet")
    for name, content in (("a.json", json.dumps([AB])), ("a.csv", "prompt,chosen,rejected\nq,a,b\n")):
        written(tmp_path, name, content)
    for name in ("a.json", "a.csv", "a.parquet"):
        assert [pair_of(found) for found in read(tmp_path / name)] == [to_pair(AB)]


def test_a_source_is_read_lazily_up_to_the_limit(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", f"{json.dumps({'mine': 'q', 'chosen': 'a', 'rejected': 'b'})}\n" * 3)
    assert [row.prompt is None for row in read(path, limit=2, column="mine")] == [False, False]
    cut_short = written(tmp_path, "a.jsonl.gz", gzip.compress(path.read_bytes() * 10_000)[:-20])
    assert len(list(islice(read_pairs(PromptsConfig(source=str(cut_short))), 2))) == 2


def test_a_source_that_is_not_there_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"^prompts 'none.jsonl': there is no such file"):
        read_pairs(PromptsConfig(source="none.jsonl"))


# --- the real data


@pytest.mark.skipif(not HH.exists(), reason="the real HH data are not here")
def test_the_real_hh_data() -> None:
    rows = read(HH)
    assert Counter(row.prompt is not None for row in rows) == {True: 582, False: 1}
    assert [(row.origin, str(row.error)) for row in rows if row.error] == [
        ("hh_harmless_dev.jsonl.gz:21", "'chosen' is empty: there is no assistant's turn with text")
    ]
    assert len({row.prompt.id for row in rows if row.prompt}) == 582
    not_as_written = []
    with gzip.open(HH) as lines:
        for found, line in zip(rows, map(json.loads, lines), strict=True):
            if found.prompt:
                assert found.prompt.messages == to_prompt(line).messages
                if not (all(line[name].endswith(text) for name, text in zip(("chosen", "rejected"), found.given, strict=True))):
                    not_as_written.append(found.origin)
    assert not_as_written == ["hh_harmless_dev.jsonl.gz:485"], "an answer in two turns"


def test_an_answer_that_begins_like_a_transcript_is_an_answer_where_nobody_replies_in_it():
    pair = to_pair({"prompt": "Translate: Mensch:", "chosen": "Human: a person.", "rejected": "Dog"})
    assert (pair.chosen, pair.rejected) == ("Human: a person.", "Dog")
