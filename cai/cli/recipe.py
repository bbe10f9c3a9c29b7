"""`cai recipe keys | show`."""

from __future__ import annotations

import json
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel

app = typer.Typer(no_args_is_help=True, help="Look at recipes, and at every key that one may have.")
_WIDTH = 79
_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", types.NoneType: "null"}


@app.command(epilog="Example: cai recipe show demo > mine.yaml")
def show(name: Annotated[str | None, typer.Argument(help="A built-in name (demo) or a YAML file.", metavar="")] = None) -> None:
    """Print a recipe with every key spelled out; without a name, the defaults. Of a pipeline, what it says."""
    from cai.config import load_recipe
    from cai.pipeline import load_pipeline
    from cai.recipes import is_pipeline

    whole = load_pipeline(name) if name is not None and is_pipeline(name) else load_recipe(name, [])
    print(whole.to_yaml(), end="")


@app.command(epilog="Examples: cai recipe keys; cai recipe keys dpo")
def keys(
    stage: Annotated[str, typer.Argument(help="generate, pipeline, sft, reward, dpo, ...", metavar="STAGE")] = "generate",
) -> None:
    """Print every key of a stage's recipe with its type, its default and what it does, for a YAML file or for --set."""
    from cai.config import Recipe
    from cai.errors import ConfigError, nearest
    from cai.pipeline import Pipeline
    from cai.training import SETTINGS

    known: dict[str, type[BaseModel]] = {"generate": Recipe, "pipeline": Pipeline, **dict(SETTINGS.items())}
    if stage not in known:
        raise ConfigError(f"no stage '{stage}'{nearest(stage, known)}; expected one of {', '.join(known)}")
    print("\n".join(_described(known[stage])))
    if stage == "ppo":
        print("\n".join(_of_ppo()))


def _of_ppo() -> Iterator[str]:
    """Keys of PPO's config class that TRL's has not, or with another default."""
    import dataclasses

    from cai.training.arguments import config_class

    config = config_class("ppo")
    yield "\ntrl\n  What PPO adds to TRL's GRPOConfig, or begins otherwise:"
    for one in dataclasses.fields(config):
        if one.name in config.__annotations__:
            yield f"  trl.{one.name}: {json.dumps(one.default)}"
            yield from _wrapped(one.metadata["help"], "      ")


def _described(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    from cai.documents import Part

    indent = "  " if prefix else ""
    for name, field in model.model_fields.items():
        default, about = field.get_default(), field.description or ""
        if isinstance(default, Part):
            yield f"\n{prefix}{name}"
            yield from _wrapped(about, "  ")
            yield from _described(type(default), f"{prefix}{name}.")
        else:
            value = "required" if field.is_required() else json.dumps(default)
            line = f"{indent}{prefix}{name}: {value}  ({_type(field.annotation)})"
            yield from [line] if len(line) <= _WIDTH else _wrapped(line.strip(), indent)
            yield from _wrapped(about, f"{indent}    ")
            inner = next((one for one in _parts(field.annotation) if one is not model), None)
            if inner is not None and not prefix:
                yield from _described(inner, f"{name}{'[]' * (typing.get_origin(field.annotation) is tuple)}.")


def _parts(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a value may be, or be a list of."""
    from cai.documents import Part

    if isinstance(annotation, type) and issubclass(annotation, Part):
        yield annotation
    for one in typing.get_args(annotation):
        yield from _parts(one)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)


def _type(annotation: Any) -> str:
    """A key's type in words: `whole number or 'all'`."""
    if typing.get_origin(annotation) is Annotated:
        return _type(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is Literal:
        return " or ".join(f"'{choice}'" for choice in typing.get_args(annotation))
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is dict:
        return "keys with values"
    if typing.get_origin(annotation) is tuple:
        return f"list of {_type(parts[0])}" if parts[-1] is ... else f"[{', '.join(map(_type, parts))}]"
    if parts:
        return " or ".join(map(_type, parts))
    return _WORDS.get(annotation) or f"section with {', '.join(annotation.model_fields)}"
