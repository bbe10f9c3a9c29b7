"""Prompt sources: every kind of file, folder and row, read lazily; what is bad is one row's error or one clear message."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cai.config import PromptsConfig
from cai.errors import ConfigError, PromptSourceError, RowError
from cai.prompts import Row, built_in_sets, count_prompts, read_prompts
from cai.prompts.files import read_lines
from cai.prompts.json_rows import json_rows
from cai.prompts.rows import COLUMNS, to_prompt
from cai.prompts.sources import _rows
from cai.types import Message, Prompt

HH = Path(__file__).resolve().parents[2] / "shared" / "data" / "hh_harmless_dev.jsonl.gz"
USER = Message("user", "q")


def read(source: Path | str, **options: Any) -> list[Row]:
    return list(read_prompts(PromptsConfig(source=str(source), **options)))


def texts(source: Path | str, **options: Any) -> list[str | None]:
    return [row.prompt.messages[-1].content if row.prompt else None for row in read(source, **options)]


def written(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def row_error(row: Any, column: str | None = None) -> str:
    with pytest.raises(RowError) as caught:
        to_prompt(row, column)
    return str(caught.value)


def source_error(source: Path | str, **options: Any) -> str:
    with pytest.raises(PromptSourceError) as caught:
        read(source, **options)
    return str(caught.value)


# --- one row


@pytest.mark.parametrize(
    "row",
    [
        "q",
        {"prompt": "q"},
        {"prompt": [{"role": "user", "content": "q"}]},
        [{"role": "User", "content": "q"}],
        ({"role": "user", "content": "q"},),
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"prompt": "\n\nHuman: q\n\nAssistant:"},
        "Human: q",
        *({column: "q"} for column in COLUMNS),
        {"prompt": None, "question": "", "text": [], "query": "q"},
    ],
)
def test_every_form_of_the_same_prompt_is_the_same_prompt(row: Any) -> None:
    assert to_prompt(row) == to_prompt("q")
    assert to_prompt(row).messages == (USER,)


def test_the_column_that_is_asked_for_wins() -> None:
    assert to_prompt({"prompt": "x", "mine": "q"}, "mine").messages == (USER,)
    assert row_error({"prompt": "x", "mime": "q"}, "mine").startswith("no column 'mine' (did you mean 'mime'?); columns here: ")
    assert row_error({"mine": None}, "mine").startswith("'mine' is empty; columns here: mine; expected one of prompt, ")


def test_a_dialogue_keeps_its_turns_up_to_the_users_last() -> None:
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    assert [(turn.role, turn.content) for turn in to_prompt(row).messages] == turns[:-1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "no prompt; columns here: none; expected one of prompt, messages, "),
        ({"Prompt": "q"}, "no prompt; columns here: Prompt; expected one of prompt, messages, "),
        ({"prompt": None}, "no prompt; columns here: prompt; expected one of prompt, messages, "),
        (3, "the row is int (3); expected a text or a list of messages"),
        (None, "the row is NoneType (None); expected a text or a list of messages"),
        ({"prompt": 0}, "'prompt' is int (0); expected a text or a list of messages"),
        ({"prompt": False}, "'prompt' is bool (False); expected a text or a list of messages"),
        ({"prompt": {"role": "user", "content": "q"}}, "'prompt' is dict ("),
        ({"prompt": b"q"}, "'prompt' is bytes (b'q'); expected a text or a list of messages"),
        ({"prompt": ""}, "'prompt' is empty: there is no user's turn with text to answer"),
        ({"prompt": " \n\t"}, "'prompt' is empty: there is no user's turn with text to answer"),
        ({"prompt": []}, "'prompt' is empty: there is no user's turn with text to answer"),
        ({"prompt": "\n\nHuman: \n\nAssistant: a"}, "'prompt' is empty: there is no user's turn with text to answer"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, "'prompt' is empty: there is no user's turn"),
        ({"prompt": [{"role": "system", "content": "a"}]}, "'prompt' ends with a system message; expected it to end with"),
        ({"prompt": ["q"]}, "'prompt'[0] is str; expected a message with 'role' and 'content'"),
        ({"prompt": [{"content": "q"}]}, "'prompt'[0] has the role None; expected system, user or assistant"),
        ({"messages": [{"role": "tool", "content": "q"}]}, "'messages'[0] has the role 'tool'; expected system, user or"),
        ({"messages": [{"role": "user", "content": None}]}, "'messages'[0] has NoneType as its content; expected a text"),
        ({"prompt": "q", "category": ["c"]}, "its category is list (['c']); expected a text"),
        ({"prompt": "q", "id": ""}, "its id is ''; expected a text of 1 to 200 characters or a whole number"),
        ({"prompt": "q", "id": " \t"}, "its id is ' \\t'; expected a text of 1 to 200 characters or a whole number"),
        ({"prompt": "q", "id": "x" * 201}, "its id is 'xxxxx"),
        ({"prompt": "q", "id": 1.5}, "its id is 1.5; expected a text of 1 to 200 characters or a whole number"),
        ({"prompt": "q", "id": True}, "its id is True; expected a text of 1 to 200 characters or a whole number"),
        ({"prompt": "q", "prompt_id": ["x"]}, "its id is ['x']; expected a text of 1 to 200 characters or a whole number"),
    ],
)
def test_a_bad_row_says_what_it_is_and_what_was_expected(row: Any, message: str) -> None:
    assert row_error(row).startswith(message)


def test_ids_are_taken_or_made_of_the_dialogue() -> None:
    assert to_prompt({"prompt": "q", "id": 7}).id == to_prompt({"prompt": "q", "prompt_id": "7"}).id == "7"
    assert to_prompt({"prompt": "q", "id": "x" * 200}).id == "x" * 200
    assert to_prompt({"prompt": "q", "id": None, "prompt_id": "p"}).id == "p"
    assert to_prompt("q").id == "923bc7e3aa446a4f"
    assert to_prompt("q ").id != to_prompt("q").id
    assert to_prompt({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}).id != to_prompt("q").id


def test_categories_are_texts() -> None:
    assert [to_prompt({"prompt": "q", "category": one}).category for one in ("c", 3, None)] == ["c", "3", None]


@given(st.text(st.characters()))
@example("\ud83d\ude00")
@example("\ud800 x \udfff")
@example("a\x00b {braces} {{ jinja }} \x1b[31m <|im_start|>")
def test_any_text_becomes_a_prompt_that_can_be_stored(text: str) -> None:
    if not text.strip() or text.lstrip("\n").startswith("Human:"):
        return
    prompt = to_prompt({"prompt": text, "category": text})
    content = prompt.messages[0].content
    joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    assert content == re.sub("[\ud800-\udfff]", "\ufffd", joined)
    assert prompt.category == content


def test_surrogates_that_make_a_pair_become_their_character_and_lone_ones_are_replaced() -> None:
    text, clean = "\ud83d\ude00 \ud800", "😀 \ufffd"
    assert to_prompt(text).messages[0].content == clean
    assert to_prompt({"prompt": f"\n\nHuman: {text}", "id": text}) == Prompt(clean, (Message("user", clean),))
    assert to_prompt([{"role": "user", "content": text}]).messages[0].content == clean


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(st.characters(), max_size=4),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.text(st.characters(), max_size=2), inner)
            | st.fixed_dictionaries(
                {},
                optional=dict.fromkeys(("prompt", "messages", "id", "category", "role", "content", "from", "value"), inner),
            )
        ),
        max_leaves=8,
    )
)
@example({"\ud800": "x"})
@example({"prompt": [{"role": "\ud800", "content": "x"}]})
def test_whatever_json_a_row_is_it_becomes_a_prompt_or_a_row_error(row: Any) -> None:
    try:
        prompt = to_prompt(row)
    except RowError as exc:
        str(exc).encode()
        return
    prompt.id.encode()
    assert prompt.messages[-1].role == "user"
    assert prompt.messages[-1].content.strip()


# --- transcripts

TURN = (
    st.text(min_size=1).map(str.strip).filter(lambda text: text and "\n\nHuman:" not in text and "\n\nAssistant:" not in text)
)


@given(st.lists(TURN, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2))
def test_a_transcript_is_read_back_turn_by_turn(turns: list[str]) -> None:
    speakers = ("Human", "Assistant")
    transcript = "".join(f"\n\n{speakers[index % 2]}: {turn}" for index, turn in enumerate(turns))
    roles = ("user", "assistant")
    expected = tuple(Message(roles[index % 2], turn) for index, turn in enumerate(turns))  # type: ignore[arg-type]
    assert to_prompt(transcript).messages == expected
    assert to_prompt({"chosen": transcript + "\n\nAssistant: the answer\n\nwith a paragraph"}).messages == expected


def test_turns_of_one_speaker_in_a_row_are_one() -> None:
    messages = to_prompt("\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant:\n\nAssistant: d\n\nHuman: e").messages
    assert [(turn.role, turn.content) for turn in messages] == [("user", "a\n\nb"), ("assistant", "c\n\nd"), ("user", "e")]


def test_speakers_inside_a_turn_are_text() -> None:
    messages = to_prompt("\n\nHuman: Say 'Assistant: hi'.\nHuman: is a word\n\nAssistant:ok\n\nHuman:\n\n  why?  ").messages
    assert [turn.content for turn in messages] == ["Say 'Assistant: hi'.\nHuman: is a word", "ok", "why?"]


def test_a_text_that_only_mentions_speakers_is_one_turn() -> None:
    text = "Continue this:\n\nHuman: hi\n\nAssistant: hello"
    assert to_prompt(text).messages == (Message("user", text),)


@pytest.mark.skipif(not HH.exists(), reason="the real HH data are not here")
def test_every_row_of_the_real_hh_data_becomes_a_prompt() -> None:
    rows = read(HH)
    assert len(rows) == 583 == count_prompts(PromptsConfig(source=str(HH)))
    for row in rows:
        assert row.error is None
        assert row.prompt
        assert row.prompt.messages[-1].role == "user"
        for before, after in zip(row.prompt.messages, row.prompt.messages[1:], strict=False):
            assert "\n\nHuman:" not in before.content
            assert before.role != after.role
    assert len({row.prompt.id for row in rows if row.prompt}) > 500


# --- files

ROWS = [{"prompt": "one", "id": "1", "category": "c"}, {"prompt": "zwei\nü😀", "id": "2", "category": "d"}]


def as_csv(delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["prompt", "id", "category"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


def as_parquet() -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), out)
    return out.getvalue()


JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FILES = {
    "a.jsonl": JSONL,
    "a.ndjson": JSONL.replace(b"\n", b"\r\n\r\n"),
    "A.JSONL": b"\xef\xbb\xbf" + JSONL,
    "noextension": JSONL.rstrip(b"\n"),
    "a.json": json.dumps(ROWS).encode(),
    "b.json": b"\xef\xbb\xbf" + json.dumps({"version": 1, "by": ["me"], "n": {"m": []}, "data": ROWS}, indent=2).encode(),
    "a.csv": as_csv(","),
    "b.csv": b"\xef\xbb\xbf" + as_csv(","),
    "a.tsv": as_csv("\t"),
    "a.parquet": as_parquet(),
    "a.v2.jsonl.gz": gzip.compress(JSONL),
    "a.jsonl.bz2": bz2.compress(JSONL),
    "a.jsonl.xz": lzma.compress(JSONL),
    "a.jsonl.zst": bytes(pyarrow.compress(JSONL, "zstd", asbytes=True)),
    "a.csv.gz": gzip.compress(as_csv(",")),
    "a.json.GZ": gzip.compress(json.dumps({"rows": ROWS}).encode()),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_prompts(tmp_path: Path, name: str) -> None:
    rows = read(written(tmp_path, name, FILES[name]))
    expected = [Prompt(row["id"], (Message("user", row["prompt"]),), row["category"]) for row in ROWS]
    assert [row.prompt for row in rows] == expected
    assert all(row.origin.startswith(name) and row.raw == "" for row in rows)


def test_origins_are_lines_or_positions(tmp_path: Path) -> None:
    origins = {
        "a.jsonl": (b'"x"\n\n"y"\n', ["a.jsonl:1", "a.jsonl:3"]),
        "a.csv": (b'prompt\nx\n"a\nb"\n', ["a.csv:2", "a.csv:4"]),
        "a.json": (b'["x", "y"]', ["a.json[0]", "a.json[1]"]),
    }
    for name, (content, expected) in origins.items():
        assert [row.origin for row in read(written(tmp_path, name, content))] == expected


def test_a_text_file_has_a_prompt_a_line_as_it_stands(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbfone\n\n  two \r\n{"prompt": "x"}\n{a} {{ b }} \x1b[31m\x00 <|im_start|>\n\xff\n# last'
    rows = read(written(tmp_path, "a.txt", content))
    found = [row.prompt.messages[0].content if row.prompt else str(row.error) for row in rows]
    assert found == [
        "one",
        "two",
        '{"prompt": "x"}',
        "{a} {{ b }} \x1b[31m\x00 <|im_start|>",
        "invalid UTF-8 at byte 0 of the line",
        "# last",
    ]
    assert [row.origin for row in rows] == ["a.txt:1", "a.txt:3", "a.txt:4", "a.txt:5", "a.txt:6", "a.txt:7"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "\xff"}', "invalid UTF-8 at byte 12 of the line"),
        (b'{"prompt": ', "not valid JSON: Expecting value"),
        (b"\x00", "not valid JSON: Expecting value"),
        (b'{"prompt": "a\x00b"}', "not valid JSON: Invalid control character"),
        (b'{"prompt": ' + b"[" * 100_000, "not readable JSON: nested too deeply"),
        (b'{"prompt": "q", "id": ' + b"9" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
        (b'{"prompt": NaN}', "'prompt' is float (nan); expected a text"),
    ],
)
def test_a_bad_line_is_one_rows_error_and_the_next_is_read(tmp_path: Path, line: bytes, message: str) -> None:
    rows = read(written(tmp_path, "a.jsonl", line + b'\n{"prompt": "next"}\n'))
    assert len(rows) == 2
    assert str(rows[0].error).startswith(message)
    assert rows[0].prompt is None
    assert rows[1].prompt == to_prompt("next")


def test_the_quarantine_gets_the_row_as_ascii_and_not_all_of_a_long_one(tmp_path: Path) -> None:
    content = [{"promt": "\ud800ü"}, {"promt": "x" * 5000}]
    rows = read(written(tmp_path, "a.json", json.dumps(content)))
    assert rows[0].raw == r"{'promt': '\ud800\xfc'}"
    assert len(rows[1].raw) == 2000


@pytest.mark.parametrize("column", ["prompt", "other", "id", "category"])
def test_no_depth_of_nesting_breaks_the_reading(tmp_path: Path, column: str) -> None:
    depths = range(930, 1000, 3)
    lines = [f'{{"{column}": ' + "[" * depth + "]" * depth + "}\n" for depth in depths]
    rows = read(written(tmp_path, "a.jsonl", "".join(lines)))
    assert len(rows) == len(depths)
    assert all(row.error and row.prompt is None for row in rows)


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt", "a.csv", "a.tsv", "empty"):
        assert read(written(tmp_path, name, "")) == []
    assert read(written(tmp_path, "a.jsonl", "\n \n\n")) == []
    assert read(written(tmp_path, "a.csv", "prompt,id\n")) == []
    assert read(written(tmp_path, "a.json", " [ ] ")) == []


def test_limit(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "one\n\ntwo\nthree\n")
    assert texts(path, limit=2) == ["one", "two"]
    assert texts("benign", limit=1) == texts("benign")[:1]


# --- files that are broken


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, "zstd", asbytes=True))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.json"])
@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstd)]
)
def test_a_compressed_file_that_is_cut_short_gives_its_rows_and_then_an_error(
    tmp_path: Path, name: str, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    values = [os.urandom(30).hex() for _ in range(8000 if suffix == ".zst" or name == "a.json" else 2000)]
    content = json.dumps(values) if name == "a.json" else "\n".join(["prompt", *values] if name == "a.csv" else values)
    if name == "a.jsonl":
        content = "\n".join(f'"{value}"' for value in values)
    packed = compress(content.encode())
    path = written(tmp_path, name + suffix, packed[: len(packed) // 2] if suffix != ".bz2" else packed[:-100])
    rows = read_prompts(PromptsConfig(source=str(path)))
    if suffix != ".bz2":
        assert next(rows).prompt == to_prompt(values[0])
    with pytest.raises(PromptSourceError, match=f"^{path}: ") as caught:
        list(rows)
    assert any(word in str(caught.value) for word in ("damaged or cut short", "cannot be read"))
    assert count_prompts(PromptsConfig(source=str(path), limit=5)) in (5, None)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.json.bz2", "a.txt.xz", "a.jsonl.zst", "a.parquet"])
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, name: str) -> None:
    message = source_error(written(tmp_path, name, "plainly no such thing"))
    assert message.startswith(f"{tmp_path / name}: ")
    assert count_prompts(PromptsConfig(source=str(tmp_path / name))) is None


@pytest.mark.parametrize("name", ["a.md", "a.zip", "a.v2", "a.md.gz", "a.jsonl.bak"])
def test_an_unknown_kind_of_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown file type '\.\w+'; expected one of \.jsonl, \.ndjson, \.json, \.csv"):
        read_prompts(PromptsConfig(source=str(written(tmp_path, name, "x\n"))))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_told(tmp_path: Path, name: str, encoding: str) -> None:
    mark = b"\xfe\xff" if encoding.endswith("be") else b""
    assert source_error(written(tmp_path, name, mark + "one\ntwo\n".encode(encoding))).endswith(
        "this is UTF-16; save it as UTF-8"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '"x"\n')
    path.chmod(0)
    assert source_error(path) == f"{path}: cannot be read: Permission denied"


@pytest.mark.parametrize(
    ("content", "rows", "message"),
    [
        (b"", 0, "expected a list of rows, or an object that holds one"),
        (b'"x"', 0, "expected a list of rows, or an object that holds one"),
        (b'{"prompt": "x"}', 0, "expected a list of rows, or an object that holds one; for a row a line use .jsonl"),
        (b'{"prompt": "x"}\n{"prompt": "y"}\n', 0, "expected a list of rows, or an object that holds one; for a row a line"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', 0, "expected a list of rows, or an object that holds one"),
        (b'["x", "y"', 2, "not valid JSON after 2 rows: Expecting ','"),
        (b'["x" "y"]', 1, "not valid JSON after 1 rows: Expecting ','"),
        (b'["x"]]', 1, "not valid JSON after 1 rows: Expecting the end"),
        (b'["x", {"prompt": "y]', 1, "not valid JSON after 1 rows: Unterminated string"),
        (b'["x", tru', 1, "not valid JSON after 1 rows: Expecting value"),
        (b"[" * 100_000, 0, "not readable JSON after 0 rows: nested too deeply"),
        (b'{"rows": ["x", 1 2]}', 0, "not valid JSON after 0 rows: Expecting ','"),
        (b'{"rows" ["x"]}', 0, "not valid JSON after 0 rows: Expecting ':'"),
    ],
)
def test_json_that_is_broken_or_no_list(tmp_path: Path, content: bytes, rows: int, message: str) -> None:
    reading = read_prompts(PromptsConfig(source=str(written(tmp_path, "a.json", content))))
    assert len(list(islice(reading, rows))) == rows
    with pytest.raises(PromptSourceError) as caught:
        list(reading)
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'}: {message}")


@pytest.mark.parametrize(
    "value",
    [
        {"rows": ["x", "y"]},
        {"by": ["me"], "rows": [{"prompt": "x"}, {"prompt": "y"}]},
        {"text": ["no"], "messages": [{"role": "user"}], "deep": {"rows": [1]}, "rows": [{"prompt": "x"}, {"prompt": "y"}]},
        {"a.b": [{"text": "x"}, {"text": "y"}], "more": [{"text": "z"}]},
    ],
)
def test_the_rows_of_a_json_object_are_its_first_list_of_objects_or_else_of_texts(tmp_path: Path, value: Any) -> None:
    assert texts(written(tmp_path, "a.json", json.dumps(value))) == ["x", "y"]


def test_one_row_of_json_that_is_no_utf_8_is_one_rows_error(tmp_path: Path) -> None:
    rows = read(written(tmp_path, "a.json", b'["x", "\xff", "\\udcff", "y"]'))
    assert [str(row.error) if row.error else None for row in rows] == [None, "invalid UTF-8", None, None]


@given(
    st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=6,
        )
    ),
    st.integers(0, 80),
    st.booleans(),
)
@example([1e22], 7, True)
def test_json_rows_are_what_json_says_wherever_a_read_ends(rows: list[Any], position: int, ascii_only: bool) -> None:
    padding = " " * ((1 << 16) - position)
    text = json.dumps([{}, *rows], ensure_ascii=ascii_only)
    assert list(json_rows(lambda: io.BytesIO((padding + text).encode()))) == [{}, *rows]
    wrapped = json.dumps({"first": 1}).rstrip("}") + f', {padding} "rows": {text}, "last": []}}'
    assert list(json_rows(lambda: io.BytesIO(wrapped.encode()))) == [{}, *rows]


def test_a_json_row_may_be_longer_than_a_read(tmp_path: Path) -> None:
    long = ["x" * size for size in (1, 65_534, 65_535, 65_536, 200_000, 1)]
    assert texts(written(tmp_path, "a.json", json.dumps(long))) == long


def test_bad_rows_of_csv_are_rows_errors(tmp_path: Path) -> None:
    rows = read(
        written(tmp_path, "a.csv", b"prompt,category\na\x00b,c\n\nx,y,z\n\xff,c\n,c\nshort\n" + b"l" * 300_000 + b",c\n")
    )
    found = [row.prompt.messages[0].content[:9] if row.prompt else str(row.error) for row in rows]
    assert found == [
        "a\x00b",
        "more fields than the header has columns",
        "invalid UTF-8",
        "'prompt' is empty: there is no user's turn with text to answer",
        "short",
        "l" * 9,
    ]
    assert [row.origin for row in rows] == [f"a.csv:{line}" for line in (2, 4, 5, 6, 7, 8)]


def test_a_quote_that_is_never_closed_swallows_no_rows_in_silence(tmp_path: Path) -> None:
    reading = read_prompts(PromptsConfig(source=str(written(tmp_path, "a.csv", 'prompt\nx\n"y\nz\n'))))
    assert next(reading).prompt == to_prompt("x")
    with pytest.raises(PromptSourceError, match=r"a\.csv: not valid CSV after line 2: unexpected end of data"):
        list(reading)


def test_a_csv_without_a_prompts_column_names_its_columns(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "prompt;id\nx;1\n")
    assert "columns here: prompt;id; expected one of prompt, " in str(read(path)[0].error)
    assert texts(written(tmp_path, "b.csv", "mine,id\nx,1\n"), column="mine") == ["x"]


def test_bad_rows_of_parquet_are_rows_errors(tmp_path: Path) -> None:
    strings = [pyarrow.py_buffer(bytes(buffer)) for buffer in (b"\0\0\0\0\2\0\0\0\4\0\0\0\4\0\0\0", b"\xff\xfeok")]
    table = pyarrow.table({"prompt": pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, *strings])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    assert str(rows[0].error).startswith("not readable: 'utf-8' codec can't decode byte 0xff")
    assert rows[1].prompt == to_prompt("ok")
    assert str(rows[2].error).startswith("'prompt' is empty")


def test_parquet_holds_dialogues_and_columns_of_any_type(tmp_path: Path) -> None:
    dialogue = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    table = pyarrow.table({"messages": [dialogue, None], "id": [1, 2], "when": [0, 1], "blob": [b"\xff", None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    assert rows[0].prompt == Prompt("1", (USER,))
    assert rows[1].error is not None


def test_parquet_that_is_damaged(tmp_path: Path) -> None:
    values = [os.urandom(50).hex() for _ in range(3000)]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": values}), tmp_path / "a.parquet", row_group_size=1000)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 9000] = bytes(9000)
    reading = read_prompts(PromptsConfig(source=str(written(tmp_path, "b.parquet", bytes(content)))))
    assert next(reading).prompt == to_prompt(values[0])
    with pytest.raises(PromptSourceError, match=r"b\.parquet: not readable as Parquet after 1000 rows: "):
        list(reading)


# --- laziness


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv", "a.json", "b.json", "a.jsonl.gz"])
def test_the_first_row_comes_without_reading_the_rest_and_memory_stays_flat(tmp_path: Path, name: str) -> None:
    line = json.dumps("x" * 1000).encode()
    start, between = {"a.csv": (b"prompt\n", b"\n"), "a.json": (b"[", b","), "b.json": (b'{"rows":[', b",")}.get(
        name, (b"", b"\n")
    )
    content = start + (line + between) * 20_000 + line + {"a.json": b"]", "b.json": b"]}"}.get(name, b"\n")
    path = written(tmp_path, name, gzip.compress(content, 1) if name.endswith(".gz") else content)
    tracemalloc.start()
    try:
        rows = read_prompts(PromptsConfig(source=str(path)))
        assert next(rows).prompt
        _, first = tracemalloc.get_traced_memory()
        count = 1 + sum(row.prompt is not None for row in islice(rows, 3000))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 3001
    assert first < 2_000_000
    assert peak < 4_000_000


def test_a_pipe_is_read_as_it_comes(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    program = "import sys, time; file = open(sys.argv[1], 'wb', 0); file.write(b'x' + bytes([10])); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program, str(pipe)]) as writer:
        try:
            assert next(read_prompts(PromptsConfig(source=str(pipe)))).prompt == to_prompt("x")
        finally:
            writer.kill()


# --- standard input

FROM_STDIN = """
import sys
from cai.config import PromptsConfig
from cai.prompts import read_prompts
for row in read_prompts(PromptsConfig(source="-", limit=int(sys.argv[1]))):
    print(row.origin, ascii(row.prompt.messages[-1].content) if row.prompt else row.error)
"""


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'\n{"prompt": "x"}\n"y"\n', ["stdin:2 'x'", "stdin:3 'y'"]),
        (b'["x"]\n', ["stdin:1 the row[0] is str; expected a message with 'role' and 'content'"]),
        (b'\xef\xbb\xbf"x"\n"\xff"\n', ["stdin:1 'x'", "stdin:2 invalid UTF-8 at byte 1 of the line"]),
        (b'\xef\xbb\xbfx\n{"prompt": "y"}\n', ["stdin:1 'x'", "stdin:2 '{\"prompt\": \"y\"}'"]),
        (b'"Hello," she said.\nWhy?', ["stdin:1 '\"Hello,\" she said.'", "stdin:2 'Why?'"]),
        (b"3\n[draft] x\n", ["stdin:1 '3'", "stdin:2 '[draft] x'"]),
        (b"", []),
    ],
)  # fmt: skip
def test_standard_input_is_json_lines_or_text_as_its_first_line_says(content: bytes, expected: list[str]) -> None:
    rows = _rows(read_lines("stdin", nullcontext(io.BytesIO(content)), None), None)
    assert [f"{row.origin} {ascii(row.prompt.messages[-1].content) if row.prompt else row.error}" for row in rows] == expected


def test_standard_input_is_read_as_it_comes() -> None:
    command = [sys.executable, "-c", FROM_STDIN, "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdin
        assert reader.stdout
        reader.stdin.write(b"first\n")
        reader.stdin.flush()
        assert reader.stdout.read() == b"stdin:1 'first'\n"


def test_a_closed_standard_input_is_told() -> None:
    program = "import cai.prompts as p, cai.config as c; p.read_prompts(c.PromptsConfig(source='-'))"
    done = subprocess.run(["sh", "-c", f'{sys.executable} -c "{program}" <&-'], capture_output=True, text=True, check=False)
    assert "ConfigError: prompts '-': standard input is closed" in done.stderr


# --- folders and the Hub


def test_a_folder_that_save_to_disk_wrote(tmp_path: Path) -> None:
    import datasets

    split = datasets.Dataset.from_list([{"prompt": "x", "id": 1}, {"prompt": "y", "id": 2}])
    split.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": split, "test": split.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert texts(tmp_path / "one") == texts(tmp_path / "two") == ["x", "y"]
    assert texts(tmp_path / "two", split="test") == ["y"]
    assert [row.origin for row in read(tmp_path / "one")] == ["one[0]", "one[1]"]
    assert read(tmp_path / "one")[0].prompt == Prompt("1", (Message("user", "x"),))
    message = source_error(tmp_path / "two", split="tset")
    assert message.endswith(
        "two: no prompts could be read from this folder: no split 'tset' (did you mean 'test'?); it has train, test"
    )


def test_a_dataset_saved_in_numpy_format_is_read_as_plain_python(tmp_path: Path) -> None:
    import datasets

    dialogue = [{"role": "user", "content": "q"}]
    datasets.Dataset.from_dict({"messages": [dialogue], "id": [7]}).with_format("numpy").save_to_disk(str(tmp_path / "d"))
    assert [row.prompt for row in read(tmp_path / "d")] == [Prompt("7", (USER,))]


def test_a_folder_of_parquet_files_is_streamed(tmp_path: Path) -> None:
    for name, values in (("train-00000-of-00002", ["a", "b"]), ("train-00001-of-00002", ["c"]), ("test-00000-of-00001", ["d"])):
        (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"question": values}), tmp_path / "set" / "data" / f"{name}.parquet")
    assert texts(tmp_path / "set") == ["a", "b", "c"]
    assert texts(tmp_path / "set", split="test") == ["d"]
    assert texts(tmp_path / "set", limit=1) == ["a"]
    assert "train" in source_error(tmp_path / "set", split="dev")


def test_a_subset_of_a_folder(tmp_path: Path) -> None:
    for name in ("easy", "hard"):
        (tmp_path / name).mkdir()
        written(tmp_path / name, "train.jsonl", json.dumps({"prompt": name}))
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/train.jsonl\n" for name in ("easy", "hard"))
    written(tmp_path, "README.md", f"---\nconfigs:\n{configs}---\n")
    assert texts(tmp_path, subset="hard") == ["hard"]
    assert "easy" in source_error(tmp_path)


def test_a_folder_may_have_the_name_of_a_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json").mkdir()
    written(tmp_path / "json", "train.txt", "x\n")
    monkeypatch.chdir(tmp_path)
    assert texts("json") == ["x"]


def test_a_folder_that_is_no_dataset(tmp_path: Path) -> None:
    assert source_error(tmp_path).startswith(f"{tmp_path}: no prompts could be read from this folder: ")
    written(tmp_path, "notes.md", "x")
    assert source_error(tmp_path).startswith(f"{tmp_path}: no prompts could be read from this folder: ")
    written(tmp_path, "state.json", "{")
    assert source_error(tmp_path).startswith(f"{tmp_path}: no prompts could be read from this folder: ")


def test_a_folder_with_a_damaged_file_is_told_while_it_is_read(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"]}), tmp_path / "train-0.parquet")
    written(tmp_path, "train-1.parquet", "no parquet at all")
    rows = read_prompts(PromptsConfig(source=str(tmp_path)))
    assert next(rows).prompt == to_prompt("a")
    with pytest.raises(PromptSourceError, match=f"^{tmp_path.name}: reading stopped: "):
        list(rows)


def test_a_dataset_that_the_hub_does_not_give_is_told_at_once() -> None:
    program = (
        "from cai.prompts import read_prompts; from cai.config import PromptsConfig; from cai.errors import PromptSourceError\n"
        "for name in ('nobody/nothing', 'nobody/v1.1'):\n"
        "    try: read_prompts(PromptsConfig(source=name))\n"
        "    except PromptSourceError as exc: print(exc)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith(
        "prompts 'nobody/nothing': neither a file nor a built-in set, and no such dataset could be had"
    )


@pytest.mark.parametrize(
    "name",
    [
        "none.jsonl",
        "./none",
        "/none",
        "~nobody-there/x",
        "bening",
        "a/b/c",
        "How do I bake bread?",
        "x" * 5000,
        "a\0b",
        "http://h/x",
    ],
)
def test_a_source_that_is_not_there(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_prompts(PromptsConfig(source=name))
    assert str(caught.value).startswith(f"prompts '{name}': there is no such file")
    assert ("did you mean 'benign'?" in str(caught.value)) == (name == "bening")


# --- built in


def built_in(name: str) -> Iterator[Prompt]:
    for row in read(name):
        assert row.prompt
        yield row.prompt


def test_the_built_in_sets() -> None:
    assert built_in_sets() == ["benign", "red-team"]


@pytest.mark.parametrize("name", ["benign", "red-team"])
def test_a_built_in_set_has_200_different_prompts_with_id_and_category(name: str) -> None:
    prompts = list(built_in(name))
    assert len(prompts) == count_prompts(PromptsConfig(source=name)) == 200
    assert len({prompt.id for prompt in prompts}) == 200
    assert len({" ".join(prompt.messages[-1].content.lower().split()) for prompt in prompts}) == 200
    assert all(prompt.id.startswith(f"{name}-{prompt.category}-") for prompt in prompts)
    assert len({prompt.category for prompt in prompts}) >= 10
    assert sum(len(prompt.messages) > 1 for prompt in prompts) >= 20


@pytest.mark.parametrize("name", ["benign", "red-team"])
def test_a_built_in_dialogue_takes_turns_and_has_clean_texts(name: str) -> None:
    for prompt in built_in(name):
        assert [turn.role for turn in prompt.messages] == [("user", "assistant")[n % 2] for n in range(len(prompt.messages))]
        assert prompt.messages[-1].role == "user"
        for turn in prompt.messages:
            assert turn.content == turn.content.strip()
            assert turn.content.isprintable() or "\n" in turn.content
            assert 10 <= len(turn.content) <= 1500


def test_every_harm_category_has_its_share_and_so_has_every_beginning() -> None:
    categories = Counter(prompt.category for prompt in built_in("red-team"))
    assert min(categories.values()) >= 10
    assert len({prompt.category for prompt in islice(built_in("red-team"), 24)}) >= 10


def test_60_benign_prompts_look_dangerous_and_are_not() -> None:
    categories = Counter(prompt.category for prompt in built_in("benign"))
    assert categories["looks-dangerous"] == 60
    assert any("kill" in prompt.messages[-1].content.lower() for prompt in built_in("benign"))


def test_the_sets_do_not_share_a_prompt() -> None:
    ids = [prompt.id for name in built_in_sets() for prompt in built_in(name)]
    contents = [prompt.messages for name in built_in_sets() for prompt in built_in(name)]
    assert len(set(ids)) == len(set(contents)) == 400


def test_a_built_in_name_is_never_a_folder_that_happens_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benign").mkdir()
    written(tmp_path, "red-team", "x\n")
    assert len(read("benign")) == len(read("red-team")) == 200
    assert texts("./red-team") == ["x"]


# --- counting


def test_rows_are_counted_where_that_is_quick(tmp_path: Path) -> None:
    assert count_prompts(PromptsConfig(source=str(written(tmp_path, "a.jsonl", '"x"\n\n"y"\n ')))) == 2
    assert count_prompts(PromptsConfig(source=str(tmp_path / "a.jsonl"), limit=1)) == 1
    assert count_prompts(PromptsConfig(source=str(written(tmp_path, "a.txt.gz", gzip.compress(b"x\n" * 7))))) == 7
    assert count_prompts(PromptsConfig(source=str(written(tmp_path, "a.csv", "prompt\nx\n")), limit=5)) == 5
    for source in ("-", "a/b", str(tmp_path)):
        assert count_prompts(PromptsConfig(source=source)) is None
    with (tmp_path / "huge.jsonl").open("wb") as file:
        file.truncate(1 << 30)
    assert count_prompts(PromptsConfig(source=str(tmp_path / "huge.jsonl"))) is None
