"""What decides what a step makes, as hashes: where all of them are as they were, a finished step is not made again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cai.config import Recipe
from cai.constitution import load_constitution
from cai.models import folder_version, locate
from cai.pipeline.manifest import file_hashes
from cai.pipeline.steps import Step
from cai.training import OnlineSettings, TrainSettings
from cai.training.base_settings import QUIET
from cai.training.online.versions import function_file

_NEUTRAL = ("ray", "budget", "generation.concurrency", "policy.batch_size", "policy.batch_tokens", "dataset.shard_rows")
"""Keys of a recipe that change nothing in its rows."""


def inputs_of(step: Step) -> dict[str, str]:
    """By what it is, a hash of everything that decides what the step makes. All steps that it reads have to be finished."""
    parts = {"settings": _hash(settings_told(step))}
    for text, target in step.bound.items():
        parts[f"@{target.name}" if isinstance(target, Step) else text] = (
            output_of(target) if isinstance(target, Step) else target
        )
    own = step.with_places(lambda target: f"@{target.folder.name}")
    return parts | dict(_of_recipe(own) if isinstance(own, Recipe) else _of_training(own))


def settings_told(step: Step) -> dict[str, Any]:
    """The settings that decide something and are no defaults; references stand as they are."""
    settings: dict[str, Any] = step.section.model_dump(mode="json", exclude_defaults=True)
    for dotted in _NEUTRAL if step.kind == "generate" else [f"trl.{key}" for key in QUIET]:
        section, _, key = dotted.rpartition(".")
        (settings.get(section, {}) if section else settings).pop(key, None)
        if settings.get(section) == {}:
            settings.pop(section)
    return settings


def _of_recipe(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "constitution", load_constitution(recipe.constitution).hash
    yield from _content("prompts", recipe.prompts.source)
    for path in filter(None, (recipe.judge.calibration, *(one.calibration for one in recipe.judge.members))):
        yield from _content(f"calibration {path}", path)
    for vllm in filter(None, (recipe.policy.vllm, recipe.judge.vllm)):
        if vllm.adapter and (folder := Path(os.path.expanduser(vllm.adapter))).is_dir():
            yield f"adapter {vllm.adapter}", folder_version(folder)
    models = {recipe.policy.model, recipe.judge.model, *(one.model for one in recipe.judge.members)}
    for model in sorted(filter(None, models)):
        yield from _model(model)


def _of_training(settings: TrainSettings) -> Iterator[tuple[str, str]]:
    others = [getattr(settings, "reference", None), *getattr(settings, "bases", ())]
    for model in dict.fromkeys(filter(None, (settings.model, *others))):
        yield from _model(model, settings.revision if model == settings.model else None)
    for source in settings.data:
        yield from _content(f"data {source.source}", source.source)
    if isinstance(settings, OnlineSettings):
        yield from _of_rewards(settings)


def _of_rewards(settings: OnlineSettings) -> Iterator[tuple[str, str]]:
    sources = [*settings.reward, *filter(None, [settings.gold])]
    judges = [one.judge.model for one in sources if one.judge]
    models = [*(one.model for one in sources), *judges, getattr(settings, "critic", None)]
    for model in dict.fromkeys(filter(None, models)):
        yield from _model(model)
    for source in sources:
        if source.constitution:
            yield f"constitution {source.constitution}", load_constitution(source.constitution).hash
        if source.function:
            yield from _content(f"function {source.function}", str(function_file(source.function)))


def _content(name: str, source: str) -> Iterator[tuple[str, str]]:
    """The hash of a file, of a run's data, or of any other folder that rows are read from; what is elsewhere has none."""
    path = Path(os.path.expanduser(source))
    if source.startswith("@"):
        return
    if path.is_file():
        yield name, _digest(path)[:16]
    elif (path / "manifest.json").is_file() and (path / "data").is_dir():
        yield name, _hash(file_hashes(path / "data"))
    elif path.is_dir():
        yield (
            name,
            _hash({str(file.relative_to(path)): _digest(file) for file in sorted(path.rglob("*")) if _is_data(file, path)}),
        )


def _is_data(file: Path, folder: Path) -> bool:
    """Not what is hidden, and not what `datasets` keeps there of its own computing."""
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.is_file() and not hidden and not file.match("cache-*.arrow")


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _model(name: str, revision: str | None = None) -> Iterator[tuple[str, str]]:
    """The version of the weights, where they are on this machine; what is elsewhere is known by its name."""
    path = name.removeprefix("vllm:")
    if not path.startswith(("@", "scripted:")) and os.path.exists(os.path.expanduser(path)):
        yield f"model {name}", locate(path, revision, rewards=True).version


def output_of(step: Step) -> str:
    """16 hex digits over what a finished step made: the rows of a dataset, the weights of a model."""
    if step.kind == "generate":
        return _hash(file_hashes(step.folder / "data"))
    inside = sorted({file.parent for file in step.folder.rglob("*.safetensors")} | {step.folder})
    kept = [one for one in inside if not {"checkpoints", "run"} & set(one.relative_to(step.folder).parts)]
    return _hash([folder_version(one) for one in kept])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:16]
