"""YAML with lines: what is wrong is told with file, line, key, what was expected and the nearest right key."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from cai.cli.terminal import printable, shortened
from cai.documents import Document, Part, dump, parse_scalar, show
from cai.errors import (
    CaiError,
    CapabilityError,
    ConfigError,
    ConstitutionError,
    ContextLengthError,
    RequestError,
    StoreError,
    VerdictError,
    nearest,
)

KEY = st.text("abcxyz", min_size=1, max_size=8)
TEXT = st.text(max_size=20)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=3),
    max_leaves=10,
)


class Inner(Part):
    """A section."""

    size: int = 1
    mode: Literal["fast", "slow"] | None = None
    loud: bool = False


class Outer(Part):
    """A document."""

    title: str
    inner: Inner = Inner()
    inners: tuple[Inner, ...] = ()
    count: int | Literal["all"] = 1


def fault(text: str, model: type[BaseModel] = Outer) -> str:
    with pytest.raises(ConfigError) as caught:
        Document(text, "f.yaml").validate(model)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.yaml: expected a mapping of keys to values, found nothing"),
        ("# only a comment\n", "f.yaml: expected a mapping of keys to values, found nothing"),
        ("- title\n", "f.yaml: expected a mapping of keys to values, found list"),
        ("title", "f.yaml: expected a mapping of keys to values, found str"),
        ("title: a\ninner: [", "f.yaml:2: not valid YAML: expected the node content, but found '<stream end>'"),
        (
            "title: a\n\tinner: 3",
            "f.yaml:2: not valid YAML: found character '\\t' that cannot start any token; indent line 2 with spaces",
        ),
        (
            "inner:\n  size: 1\n    mode: fast\n",
            "f.yaml:3: not valid YAML: mapping values are not allowed here; check the indentation of line 3, "
            "and put a text that holds ': ' in quotes",
        ),
        (
            "inner:\n    size: 1\n  mode: fast\n",
            "f.yaml:3: not valid YAML: expected <block end>, but found '<block mapping start>'; "
            "check the indentation of line 3",
        ),
        (
            "inners:\n  - size: 1\n   mode: fast\n",
            "f.yaml:3: not valid YAML: expected <block end>, but found '<block mapping start>'; "
            "check the indentation of line 3",
        ),
        ("title: a\n---\ntitle: b\n", "f.yaml:2: not valid YAML: but found another document"),
        ("title: a\nb: \x00", "f.yaml:2: not valid YAML: the character '\\x00' is not allowed"),
        ("title: a\nb: \ud800", "f.yaml:2: not valid YAML: the character '\\ud800' is not allowed"),
        ("title: *x", "f.yaml:1: not valid YAML: found undefined alias 'x'"),
        ("title: a\n? [b]\n: 3", "f.yaml:2: not valid YAML: found unhashable key"),
        ("title: " + "[" * 1500, "f.yaml: not valid YAML: nested too deeply"),
        ("title: a\ntitle: b\n", "f.yaml:2: title: this key stands here twice; remove one"),
        ("title: a\ninner:\n  size: 1\n  'size': 2", "f.yaml:4: inner.size: this key stands here twice; remove one"),
        ("inners:\n- size: 1\n- size: 1\n  size: 2", "f.yaml:4: inners[1].size: this key stands here twice; remove one"),
        ("title: a\n3: b", "f.yaml:2: 3: expected a text as the key; put it in quotes"),
        ("title: a\ninner:\n  ~: b", "f.yaml:3: inner.~: expected a text as the key; put it in quotes"),
    ],
)
def test_what_is_no_document_is_told_with_its_line(text: str, message: str) -> None:
    assert fault(text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inner: {}", "f.yaml: title: this key is required"),
        ("title: 3", "f.yaml:1: title: expected a text (in quotes where it reads like a number), found 3"),
        ("title: no", "f.yaml:1: title: expected something else than true or false, found False; yes, no, on and off"),
        ("title: a\ninner:\n  size: many", "f.yaml:3: inner.size: expected a whole number, found 'many'"),
        ("title: a\ninner:\n  size: 1.5", "f.yaml:3: inner.size: expected a whole number, found 1.5"),
        ("title: a\ninner:\n  size: true", "f.yaml:3: inner.size: expected something else than true or false, found True"),
        ("title: a\ninner:\n  loud: perhaps", "f.yaml:3: inner.loud: expected true or false, found 'perhaps'"),
        ("title: a\ninner:\n  mode: quick", "f.yaml:3: inner.mode: expected 'fast' or 'slow', found 'quick'"),
        ("title: a\ncount: some", "f.yaml:2: count: expected a whole number or 'all', found 'some'"),
        ("title: a\ncount: {b: 3}", "f.yaml:2: count: expected a whole number or 'all', found {'b': 3}"),
        ("title: a\ninner: 3", "f.yaml:2: inner: expected a section with keys, found 3"),
        ("title: a\ninners: 3", "f.yaml:2: inners: expected a list, found 3"),
        ("title: a\ninners:\n- 3", "f.yaml:3: inners[0]: expected a section with keys, found 3"),
        ("title: a\ninner:\n  sise: 3", "f.yaml:3: inner.sise: unknown key (did you mean 'size'?)"),
        ("title: a\nzzz: 3", "f.yaml:2: zzz: unknown key; known keys: title, inner, inners, count"),
        ("title: a\ninners:\n- size: 2\n  zzz: 3", "f.yaml:4: inners[0].zzz: unknown key; known keys: size, mode, loud"),
        ("title: a\nsize: 3", "f.yaml:2: size: unknown key (did you mean 'inner.size'?)"),
    ],
)
def test_what_does_not_validate_is_told_with_line_key_and_what_was_expected(text: str, message: str) -> None:
    assert fault(text).startswith(message)


def test_everything_wrong_is_told_at_once() -> None:
    problems = fault("inner:\n  size: x\n  zzz: 1\ncount: y\n").split("\n")
    assert [problem.split(": ")[1] for problem in problems] == ["title", "inner.size", "inner.zzz", "count"]


def test_a_huge_value_is_shown_shortened() -> None:
    assert len(fault("title: [" + "1, " * 2000 + "]")) < 200


def test_an_alias_inside_itself_is_an_error_and_no_endless_loop() -> None:
    assert fault("title: &a [*a]").startswith("f.yaml:1: title: expected a text")


def test_nested_aliases_do_not_multiply() -> None:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
    assert "title: this key is required" in fault(bomb)


def test_dates_are_texts() -> None:
    assert Document("title: 2026-01-31", "f").validate(Outer).title == "2026-01-31"
    assert Document("title: 2026-99-99", "f").validate(Outer).title == "2026-99-99"


def test_merge_keys_and_aliases_work() -> None:
    text = "title: a\ninners:\n- &one {size: 3}\n- {<<: *one, mode: fast}\n- *one\n"
    assert [(one.size, one.mode) for one in Document(text, "f").validate(Outer).inners] == [(3, None), (3, "fast"), (3, None)]


def test_parts_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Inner().size = 2


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "latin.yaml"
    broken.write_bytes(b"title: \xff")
    for path, message in (
        (tmp_path / "none.yaml", "cannot be read: No such file or directory"),
        (tmp_path, "cannot be read: Is a directory"),
        (broken, "not UTF-8 text (byte 7)"),
    ):
        with pytest.raises(ConstitutionError) as caught:
            Document.read(path, ConstitutionError)
        assert str(caught.value) == f"{path}: {message}"


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbftitle: a\n")
    assert Document.read(tmp_path / "bom.yaml").data == {"title": "a"}


def test_override_replaces_creates_and_is_named_in_errors() -> None:
    document = Document("title: a\ninner:\n", "f.yaml")
    document.override("inner.size", 5, "--size 5")
    document.override("count", "all", "--all")
    assert document.validate(Outer) == Outer(title="a", inner=Inner(size=5), count="all")
    document.override("inner.size", "x", "--size x")
    document.override("inners", [{"size": 1, "zzz": 2}], "--inners")
    with pytest.raises(ConfigError) as caught:
        document.validate(Outer)
    assert str(caught.value).split("\n") == [
        "--size x: inner.size: expected a whole number, found 'x'",
        "--inners: inners[0].zzz: unknown key; known keys: size, mode, loud",
    ]


def test_override_of_a_whole_section_forgets_the_lines_below_it() -> None:
    document = Document("title: a\ninner:\n  size: 1\n", "f.yaml")
    document.override("inner", {"size": "x"}, "--inner")
    with pytest.raises(ConfigError, match=r"^--inner: inner.size: expected a whole number"):
        document.validate(Outer)


def test_override_below_a_value_is_an_error() -> None:
    document = Document("title: a\n", "f.yaml")
    with pytest.raises(ConfigError, match=r"^--x: 'title' is a value and has no key 'x'$"):
        document.override("title.x", 1, "--x")


def test_override_of_an_unknown_section_names_the_flag() -> None:
    document = Document("title: a\n", "f.yaml")
    document.override("iner.size", 1, "--set iner.size=1")
    with pytest.raises(ConfigError, match=r"^--set iner.size=1: iner: unknown key \(did you mean 'inner'\?\)$"):
        document.validate(Outer)


def test_override_leaves_an_alias_elsewhere_as_it_was() -> None:
    document = Document("title: a\ninner: &i {size: 1}\ninners: [*i]\n", "f.yaml")
    document.override("inner.size", 2, "--size")
    validated = document.validate(Outer)
    assert (validated.inner.size, validated.inners[0].size) == (2, 1)


@given(st.dictionaries(KEY, VALUE, max_size=4))
def test_dump_and_read_is_the_same(data: dict[str, object]) -> None:
    assert Document(dump(data), "f").data == data


@given(VALUE)
def test_a_dumped_value_parses_as_itself(value: object) -> None:
    assert parse_scalar(yaml.safe_dump(value)) == value


@given(st.text())
def test_parse_scalar_takes_any_text(text: str) -> None:
    parse_scalar(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("", None),
        ("all", "all"),
        ("[a, 2]", ["a", 2]),
        ("-", "-"),
        ("[", "["),
        ("a:b", "a:b"),
        ("2026-99-99", "2026-99-99"),
        ("[" * 1500, "[" * 1500),
        ("!!python/name:os.system x", "!!python/name:os.system x"),
    ],
)
def test_parse_scalar(text: str, value: object) -> None:
    assert parse_scalar(text) == value


def test_show() -> None:
    assert show(("principles", 2, "critique")) == "principles[2].critique"
    assert show(()) == ""


def test_nearest() -> None:
    assert nearest("principels", ["critique", "principles"]) == " (did you mean 'principles'?)"
    assert nearest("zzz", ["critique", "principles"]) == nearest("x", []) == ""


def test_each_error_is_also_of_the_standard_librarys_type() -> None:
    assert issubclass(ConstitutionError, ConfigError)
    assert issubclass(CapabilityError, ConfigError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(StoreError, OSError)
    assert issubclass(ContextLengthError, RequestError)
    assert issubclass(VerdictError, RequestError)
    assert issubclass(RequestError, RuntimeError)
    assert all(issubclass(one, CaiError) for one in (ConfigError, StoreError, RequestError))
    assert len({RequestError.reason, ContextLengthError.reason, VerdictError.reason}) == 3


@given(st.text(st.characters()))
def test_printable_lets_no_control_character_through(text: str) -> None:
    shown = printable(text)
    shown.encode()
    assert len(shown) == len(text)
    assert not any((ord(char) < 32 and char not in "\t\n") or 0x7F <= ord(char) < 0xA0 for char in shown)
    assert printable(shown) == shown


def test_printable_keeps_what_people_write() -> None:
    assert printable("naïve 日本語 🙂\n\tx") == "naïve 日本語 🙂\n\tx"
    assert printable("\x1b[2J\u202egpj\ud800") == "�[2J�gpj�"


@given(st.text(), st.integers(1, 30))
def test_shortened_is_one_line_of_at_most_so_many_characters(text: str, characters: int) -> None:
    short = shortened(text, characters)
    assert len(short) <= characters
    assert len(short.splitlines()) <= 1
    assert shortened("a  b\nc", 99) == "a b c"
