"""YAML files read with the line of every key, so that each error can name file, line, key and the fix."""

from __future__ import annotations

import inspect
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from cai.errors import ConfigError, nearest

Model = TypeVar("Model", bound=BaseModel)
Loc = tuple[str | int, ...]
_MESSAGES = {"missing": "this key is required"}


class Document:
    """A YAML mapping from a file or a string: `data`, and for each key's path where it stands."""

    def __init__(self, text: str, name: str, error: type[ConfigError] = ConfigError) -> None:
        """Parse `text`; `name` is how errors call it. Raises `error` with the line for anything but a mapping."""
        self.name, self.error = name, error
        self._lines: dict[Loc, str] = {}
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            self._walk(node, ())
            data = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError) as exc:
            mark = exc.problem_mark if isinstance(exc, yaml.MarkedYAMLError) else None
            where = f"{name}:{mark.line + 1}" if mark else name
            problem = exc.problem if isinstance(exc, yaml.MarkedYAMLError) else str(exc)
            raise error(f"{where}: not valid YAML: {problem}") from exc
        if not isinstance(data, dict):
            raise error(f"{name}: expected a mapping of keys to values, found {type(data).__name__}")
        self.data: dict[str, Any] = data

    @classmethod
    def read(cls, path: Path, error: type[ConfigError] = ConfigError) -> Document:
        """Read a file; raises `error` where it is missing, no file or no UTF-8."""
        try:
            return cls(path.read_text(encoding="utf-8"), str(path), error)
        except OSError as exc:
            raise error(f"{path}: cannot be read: {exc.strerror}") from exc
        except UnicodeDecodeError as exc:
            raise error(f"{path}: not UTF-8 text (byte {exc.start})") from exc

    def _walk(self, node: yaml.Node | None, loc: Loc) -> None:
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._lines[(*loc, index)] = f"{self.name}:{item.start_mark.line + 1}"
                self._walk(item, (*loc, index))
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                path, where = (*loc, key.value), f"{self.name}:{key.start_mark.line + 1}"
                if path in self._lines:
                    raise self.error(f"{where}: {show(path)}: this key stands here twice; remove one")
                self._lines[path] = where
                self._walk(value, path)

    def override(self, dotted: str, value: object, source: str) -> None:
        """Set `section.key` to a value that came from `source` (a flag), replacing what the file says."""
        *sections, key = dotted.split(".")
        target = self.data
        for depth, section in enumerate(sections):
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise self.error(f"{source}: '{'.'.join(sections[: depth + 1])}' is a value and has no key '{key}'")
        target[key] = value
        self._lines[(*sections, key)] = source

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
            problems = [self._problem(model, detail) for detail in exc.errors(include_url=False)]
            raise self.error("\n".join(problems)) from exc

    def _problem(self, model: type[BaseModel], detail: Any) -> str:
        loc: Loc = tuple(detail["loc"])
        prefix = f"{self.where(loc)}: {show(loc)}: " if loc else f"{self.name}: "
        if detail["type"] == "extra_forbidden":
            known = _fields_at(model, loc[:-1])
            hint = nearest(str(loc[-1]), known) or f"; known keys: {', '.join(known)}"
            return f"{prefix}unknown key{hint}"
        message = _MESSAGES.get(detail["type"]) or detail["msg"].removeprefix("Value error, ")
        if detail["type"] not in ("missing", "value_error"):
            message += f", found {detail['input']!r:.80}"
        return prefix + message


def show(loc: Loc) -> str:
    """`("principles", 2, "critique")` as `principles[2].critique`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")


def _fields_at(model: type[BaseModel], loc: Loc) -> list[str]:
    current: Any = model
    for part in loc:
        if isinstance(part, str):
            fields = _model_in(current)
            current = fields.model_fields[part].annotation if fields and part in fields.model_fields else None
    found = _model_in(current)
    return list(found.model_fields) if found else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside `Model`, `Model | None`, `tuple[Model, ...]`."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, typing.get_args(annotation))), None)


def dump(data: dict[str, Any]) -> str:
    """A mapping as YAML in its own order, long texts folded, all scripts readable."""
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100))


def parse_scalar(text: str) -> object:
    """The value of `--set key=value`, read as YAML: `4`, `true`, `all`, `[a, b]`."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
