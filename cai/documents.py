"""YAML files read with the line of every key, so that each error can name file, line, key and the fix."""

from __future__ import annotations

import inspect
import json
import reprlib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError, ValidationInfo, field_validator

from cai.errors import ConfigError, nearest

Model = TypeVar("Model", bound=BaseModel)
Text = Annotated[str, StringConstraints(min_length=1)]
"""A text that is not empty."""
Loc = tuple[str | int, ...]
_WHOLE_NUMBER, _NUMBER, _TRUTH = "expected a whole number", "expected a number", "expected true or false"
_MESSAGES = {
    "missing": "this key is required",
    "int_type": _WHOLE_NUMBER,
    "int_parsing": _WHOLE_NUMBER,
    "int_from_float": _WHOLE_NUMBER,
    "float_type": _NUMBER,
    "float_parsing": _NUMBER,
    "bool_type": _TRUTH,
    "bool_parsing": _TRUTH,
    "string_type": "expected a text (in quotes where it reads like a number)",
    "string_unicode": "expected a text of valid Unicode",
    "string_too_short": "expected a text that is not empty",
    "model_type": "expected a section with keys",
    "tuple_type": "expected a list",
}


class Part(BaseModel):
    """A part of a document: frozen; an unknown key is an error, and so is true or false for a number or a text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def __hash__(self) -> int:
        """Over its JSON, since a free mapping in it has no hash."""
        return hash(json.dumps(self.model_dump(mode="json"), sort_keys=True))

    @field_validator("*", mode="before")
    @classmethod
    def _no_stray_truth(cls, value: Any, info: ValidationInfo) -> Any:
        expected = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (expected, *typing.get_args(expected)):
            raise ValueError(f"expected something else than true or false, found {value}; yes, no, on and off mean these too")
        return value


class _Loader(yaml.SafeLoader):
    """YAML in which a date is a text: `revision: 2026-01-31` is the name of a branch."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class Document:
    """A YAML mapping from a file or a string: `data`, its `text`, and for each key's path where it stands."""

    def __init__(self, text: str, name: str, error: type[ConfigError] = ConfigError) -> None:
        """Parse `text`; `name` is how errors call it. Raises `error` with the line for anything but a mapping."""
        self.name, self.text, self.error = name, text, error
        self._lines: dict[Loc, str] = {}
        try:
            node = yaml.compose(text, Loader=_Loader)
            data = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as exc:
            line, problem = _yaml_problem(exc, text)
            raise error(f"{name}{line and f':{line}'}: not valid YAML: {problem}") from exc
        if not isinstance(data, dict):
            found = "nothing" if data is None else type(data).__name__
            raise error(f"{name}: expected a mapping of keys to values, found {found}")
        self.data: dict[str, Any] = data
        self._walk(node, (), set())

    @classmethod
    def read(cls, path: Path, error: type[ConfigError] = ConfigError) -> Document:
        """Read a file; raises `error` where it is missing, no file or no UTF-8."""
        try:
            return cls(path.read_text(encoding="utf-8"), str(path), error)
        except OSError as exc:
            raise error(f"{path}: cannot be read: {exc.strerror}") from exc
        except UnicodeDecodeError as exc:
            raise error(f"{path}: not UTF-8 text (byte {exc.start})") from exc

    def _walk(self, node: yaml.Node | None, loc: Loc, seen: set[int]) -> None:
        if id(node) in seen:  # an alias; it may stand inside itself
            return
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._lines[(*loc, index)] = f"{self.name}:{item.start_mark.line + 1}"
                self._walk(item, (*loc, index), seen)
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                self._walk(value, self._enter(key, loc), seen)

    def _enter(self, key: yaml.Node, loc: Loc) -> Loc:
        path, where = (*loc, key.value), f"{self.name}:{key.start_mark.line + 1}"
        if not key.tag.endswith((":str", ":merge")):
            raise self.error(f"{where}: {show(path)}: expected a text as the key; put it in quotes")
        if path in self._lines:
            raise self.error(f"{where}: {show(path)}: this key stands here twice; remove one")
        self._lines[path] = where
        return path

    def below(self, *path: str) -> Document:
        """A part of it as a document of its own, whose keys keep their lines."""
        part = object.__new__(Document)
        part.name, part.text, part.error, part.data = self.name, self.text, self.error, self.data
        for key in path:
            part.data = part.data[key]
        part._lines = {loc[len(path) :]: where for loc, where in self._lines.items() if loc[: len(path)] == path}
        return part

    def override(self, dotted: str, value: object, source: str) -> None:
        """Set `section.key` to a value that came from `source` (a flag), replacing what the file says."""
        path = tuple(dotted.split("."))
        target = self.data
        for depth, section in enumerate(path[:-1], 1):
            below = {} if target.get(section) is None else target[section]
            if not isinstance(below, dict):
                raise self.error(f"{source}: '{'.'.join(path[:depth])}' is a value and has no key '{path[depth]}'")
            self._lines.setdefault(path[:depth], source)
            target[section] = dict(below)  # a copy: an alias of it elsewhere keeps its value
            target = target[section]
        target[path[-1]] = value
        self._lines = {loc: where for loc, where in self._lines.items() if loc[: len(path)] != path}
        self._lines[path] = source

    def where(self, loc: Loc) -> str:
        """File and line (or flag) of a key, or of the nearest thing around it."""
        while loc and loc not in self._lines:
            loc = loc[:-1]
        return self._lines.get(loc, self.name)

    def validate(self, model: type[Model]) -> Model:
        """The document as a model; raises one error that lists everything that is wrong, a line each."""
        try:
            return model.model_validate(self.data)
        except ValidationError as exc:
            problems: dict[Loc, list[Any]] = {}
            for detail in exc.errors(include_url=False):
                problems.setdefault(self._blamed(_loc(model, detail), detail), []).append(detail)
            raise self.error("\n".join(self._problem(model, loc, found) for loc, found in problems.items())) from exc

    def _blamed(self, loc: Loc, detail: Any) -> Loc:
        """Of two keys that do not go together, the one that was set last: a flag, or what stands further down."""
        context = detail.get("ctx", {})
        if "or_at" not in context:
            return loc
        other = (*loc[: len(loc) - len(context["at"])], *context["or_at"])
        order = [one for one in self._lines if one in (loc, other)]
        return order[-1] if order else loc

    def _problem(self, model: type[BaseModel], loc: Loc, details: list[Any]) -> str:
        """All that is wrong with one key; for a key of several types that is what each of them expects."""
        prefix = f"{self.where(loc)}: {show(loc)}: " if loc else f"{self.name}: "
        kind = details[0]["type"]
        if kind == "extra_forbidden":
            return f"{prefix}unknown key{_hint(model, loc)}"
        first, *others = (_MESSAGES.get(detail["type"]) or _plain(detail["msg"]) for detail in details)
        message = " or ".join([first, *(other.removeprefix("expected ") for other in others)])
        found = "" if kind in ("missing", "value_error") else f", found {reprlib.repr(details[0]['input'])}"
        return f"{prefix}{message}{found}"


def show(loc: Loc) -> str:
    """`("principles", 2, "critique")` as `principles[2].critique`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")


def _yaml_problem(exc: Exception, text: str) -> tuple[int | str, str]:
    """The line, or an empty string where that is not known, and what is wrong there."""
    if isinstance(exc, yaml.MarkedYAMLError) and exc.problem_mark:
        line = exc.problem_mark.line + 1
        return line, f"{exc.problem}{_layout_hint(str(exc.problem), line)}"
    if isinstance(exc, yaml.reader.ReaderError):
        return text.count("\n", 0, exc.position) + 1, f"the character {text[exc.position]!a} is not allowed"
    return "", "nested too deeply" if isinstance(exc, RecursionError) else str(exc)


def _layout_hint(problem: str, line: int) -> str:
    """What to do about a problem that YAML's parser tells in its own terms."""
    if problem.startswith("mapping values"):
        return f"; check the indentation of line {line}, and put a text that holds ': ' in quotes"
    if problem.startswith("expected <block end>"):
        return f"; check the indentation of line {line}"
    return f"; indent line {line} with spaces" if problem.startswith("found character '\\t'") else ""


def _plain(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should be", "expected")


def _loc(model: type[BaseModel], detail: Any) -> Loc:
    """Where a problem is: without the types that pydantic names in a union, and with the `at` of our own validators."""
    loc: Loc = tuple(detail["loc"])
    while loc and isinstance(loc[-1], str) and not _fields_at(model, loc[:-1]):
        loc = loc[:-1]
    return (*loc, *detail.get("ctx", {}).get("at", ()))


def _hint(model: type[BaseModel], loc: Loc) -> str:
    """The key that was probably meant: of the same name elsewhere, or of a similar name here."""
    *_, word = map(str, loc)
    elsewhere = " or ".join(f"'{dotted}'" for dotted in _dotted_keys(model) if dotted.split(".")[-1] == word)
    known = _fields_at(model, loc[:-1])
    return f" (did you mean {elsewhere}?)" if elsewhere else nearest(word, known) or f"; known keys: {', '.join(known)}"


def _dotted_keys(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            yield from (f"{name}.{below}" for below in _dotted_keys(field.annotation))
        else:
            yield name


def _fields_at(model: type[BaseModel], loc: Loc) -> list[str]:
    current: Any = model
    for part in loc:
        if isinstance(part, str) and typing.get_origin(current) is dict:
            current = typing.get_args(current)[1]
        elif isinstance(part, str):
            fields = _model_in(current)
            known = {field.alias or name: field.annotation for name, field in fields.model_fields.items()} if fields else {}
            current = known.get(part)
    found = _model_in(current)
    return [field.alias or name for name, field in found.model_fields.items()] if found else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside `Model`, `Model | None`, `tuple[Model, ...]`."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, typing.get_args(annotation))), None)


class _Dumper(yaml.SafeDumper):
    """Keeps the rarer line breaks, which the plain style would read back as spaces."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if set(data) & set("\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


def dump(data: dict[str, Any]) -> str:
    """A mapping as YAML in its own order, long texts folded, all scripts readable."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))


def parse_scalar(text: str) -> object:
    """The value of `--set key=value`, read as YAML: `4`, `true`, `all`, `[a, b]`. A lone `-` is a text, no list."""
    try:
        return text if text.strip() == "-" else yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
