"""Files of prompts, read lazily: every kind, whole or broken; what is bad is one row's error or one clear message."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cai.config import PromptsConfig
from cai.errors import ConfigError, PromptSourceError
from cai.prompts import count_prompts, read_prompts
from cai.prompts.json_rows import json_rows
from cai.prompts.rows import to_prompt
from cai.types import Message, Prompt
from tests.sources import read, source_error, texts, written

USER = Message("user", "q")
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
    "a.v2.jsonl.gz": gzip.compress(JSONL, mtime=0),
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


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (as_parquet(), "this is Parquet; let its name end in .parquet"),
        (gzip.compress(JSONL, mtime=0), "this is compressed by gzip; let its name end in .gz"),
        (gzip.compress(gzip.compress(JSONL, mtime=0), mtime=0), "this is compressed by gzip; let its name end in .gz"),
    ],
)
@pytest.mark.parametrize("name", ["noextension", "a.jsonl", "a.csv"])
def test_what_is_no_text_is_told_by_what_it_is(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    assert source_error(written(tmp_path, name, content)).endswith(told)


def test_a_name_with_a_colon_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "a:b.parquet", as_parquet())
    monkeypatch.chdir(tmp_path)
    assert len(list(read_prompts(PromptsConfig(source="a:b.parquet")))) == len(ROWS)


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
