"""Prompts: every form of a row, standard input, folders, the Hub, and the built-in sets."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
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
from cai.prompts import built_in_sets, count_prompts, read_prompts
from cai.prompts.files import read_lines
from cai.prompts.rows import COLUMNS, to_prompt
from cai.prompts.sources import _rows
from cai.types import Message, Prompt
from tests.sources import read, source_error, texts, written

HH = Path(__file__).resolve().parents[2] / "shared" / "data" / "hh_harmless_dev.jsonl.gz"
USER = Message("user", "q")


def row_error(row: Any, column: str | None = None) -> str:
    with pytest.raises(RowError) as caught:
        to_prompt(row, column)
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
        ({"prompt": None}, "'prompt' is empty; columns here: prompt; expected one of prompt, messages, "),
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
    rows = _rows(read_lines("stdin", nullcontext(io.BytesIO(content)), None), lambda raw: (to_prompt(raw), ()))
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


def test_a_hub_dataset_is_asked_for_with_its_subset_folder_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Hub is reached here: `datasets` is asked, and answers with rows that name what it was asked for."""
    import datasets

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        row = {"prompt": json.dumps([path, name, options], sort_keys=True)}
        return datasets.Dataset.from_list([row]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    asked = {"split": "test", "revision": "abc123", "data_dir": "helpful", "streaming": True}
    assert texts("owner/name", subset="easy", split="test", revision="abc123", data_dir="helpful") == [
        json.dumps(["owner/name", "easy", asked], sort_keys=True)
    ]


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
