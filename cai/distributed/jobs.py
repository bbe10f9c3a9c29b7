"""What the driver and the workers tell each other, as bytes: a job once, then blocks of rows, and their outcomes."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

import msgspec

from cai.config import Recipe
from cai.constitution import Constitution
from cai.engines import Engine
from cai.generation import Engines, template_hash
from cai.store import Call
from cai.types import Prompt

_SCRIPTED = "scripted:"


class Job(NamedTuple):
    """All that a worker needs beside the rows. Files travel with their contents: another node does not have them."""

    recipe: str
    constitution: str
    scripts: dict[str, bytes]
    """By the path as the recipe names it."""
    calibrations: dict[str, str]
    """The same."""
    policy: str | None
    """The policy's engine as `described`; None where the completions are given."""
    judges: list[str]
    """The judges' engines as `described`."""
    code: str
    """As `code()` says it where the run was started."""
    begun: bool
    """Whether there were finished calls before: then each is looked for in the journal before it is made."""


class Item(msgspec.Struct, frozen=True):
    """One row to be worked on."""

    prompt: Prompt
    given: tuple[str, ...] = ()


class Block(msgspec.Struct, frozen=True):
    """Some rows."""

    number: int
    items: list[Item]


class RowOutcome(msgspec.Struct, frozen=True):
    """What became of one row: its record in JSON, or why there is none; neither where the worker was told to stop."""

    record: bytes | None = None
    reason: str | None = None
    detail: str = ""


class Outcome(msgspec.Struct, frozen=True):
    """What became of a block; `calls` are the new ones, of rows that failed too."""

    number: int
    rows: list[RowOutcome]
    calls: list[Call]
    replayed: int = 0
    fatal: tuple[str, str] | None = None
    """The kind and the message of an error after which no call can succeed."""


_encoder = msgspec.msgpack.Encoder()
_block, _outcome = msgspec.msgpack.Decoder(Block), msgspec.msgpack.Decoder(Outcome)


def encode(value: Block | Outcome) -> bytes:
    """As it travels."""
    return _encoder.encode(value)


def decode_block(value: bytes) -> Block:
    """What `encode` made of a block."""
    return _block.decode(value)


def decode_outcome(value: bytes) -> Outcome:
    """What `encode` made of an outcome."""
    return _outcome.decode(value)


def code() -> str:
    """The version of the package and of its templates, which must be the same everywhere."""
    return f"{metadata.version('cai-toolkit')} with generation code and templates {template_hash()}"


def described(engine: Engine) -> str:
    """What of an engine must be the same everywhere."""
    return f"{engine.fingerprint} {engine.choice_form}".rstrip()


def make_job(recipe: Recipe, constitution: Constitution, engines: Engines, begun: bool) -> Job:
    """A job with the contents of the files that its recipe names."""
    policy = described(engines.policy) if engines.policy else None
    judges = [described(engine) for engine in engines.judges.values()]
    scripts = {name: Path(name).expanduser().read_bytes() for name in sorted(_scripts(recipe))}
    calibrations = {name: loaded.text for name, loaded in engines.calibrations.items()}
    told = recipe.model_dump_json(), constitution.model_dump_json()
    return Job(*told, scripts, calibrations, policy, judges, code(), begun)


def _scripts(recipe: Recipe) -> set[str]:
    models = [recipe.policy.model, recipe.judge.model, *(member.model for member in recipe.judge.members)]
    return {model.removeprefix(_SCRIPTED).rpartition(":")[0] for model in models if model and model.startswith(_SCRIPTED)}


def unpacked_recipe(job: Job) -> Recipe:
    """The job's recipe, with its scripts where it says that they are: here already, or in a new temporary folder."""
    here = {name: _unpacked(name, content) for name, content in job.scripts.items()}
    recipe = Recipe.model_validate_json(job.recipe)
    judge = recipe.judge
    members = tuple(member.model_copy(update={"model": _renamed(member.model, here)}) for member in judge.members)
    moved = judge.model_copy(update={"model": _renamed(judge.model, here), "members": members})
    policy = recipe.policy.model_copy(update={"model": _renamed(recipe.policy.model, here)})
    return recipe.model_copy(update={"policy": policy, "judge": moved})


def _unpacked(name: str, content: bytes) -> str:
    path = Path(name).expanduser()
    try:
        if path.read_bytes() == content:  # a script may read what lies beside it
            return name
    except OSError:
        pass
    copy = Path(mkdtemp(prefix="cai-")) / path.name
    copy.write_bytes(content)
    return str(copy)


def _renamed(model: str | None, here: Mapping[str, str]) -> str | None:
    if model is None or not model.startswith(_SCRIPTED):
        return model
    file, _, function = model.removeprefix(_SCRIPTED).rpartition(":")
    return f"{_SCRIPTED}{here[file]}:{function}"
