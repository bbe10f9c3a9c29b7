"""Recipe files: by name or path, and the paths that stand in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cai.documents import Document
from cai.errors import ConfigError, nearest

_PACKAGE = Path(__file__).resolve().parent
_SHIPPED = _PACKAGE / "_shipped" / "pipelines"
BUILT_IN = _SHIPPED if _SHIPPED.is_dir() else _PACKAGE.parent / "pipelines"
"""Recipes that come with the package: in a wheel they lie inside it; in a checkout beside it."""
_PATHS = ("constitution", "prompts.source", "judge.calibration", "policy.vllm.adapter", "judge.vllm.adapter")
"""Keys of a recipe of `cai generate` that may name a file."""


def built_in_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe given by path or by built-in name: `demo`, and where no such file is here, `pipelines/demo.yaml`."""
    path, names = Path(os.path.expanduser(name)), built_in_recipes()
    if os.path.isfile(path):
        return path
    if str(name) in {spelled for one in names for spelled in (one, f"{one}.yaml", f"pipelines/{one}.yaml")}:
        return BUILT_IN / f"{path.stem}.yaml"
    if os.path.exists(path):
        raise ConfigError(f"recipe '{name}' is a folder; expected a file or a built-in name: {', '.join(names)}")
    raise ConfigError(
        f"no recipe '{name}': neither a file nor a built-in name{nearest(path.stem, names)}; built in: {', '.join(names)}"
    )


def is_pipeline(name: str | Path) -> bool:
    """Whether a recipe has stages, for `cai run`."""
    return "stages" in Document.read(find_recipe(name)).data


def generate_document(name: str | Path) -> Document:
    """A recipe of `cai generate`; where the file is a pipeline, its first stage. Raises `ConfigError`."""
    path = find_recipe(name)
    document = Document.read(path)
    stages = document.data.get("stages")
    if isinstance(stages, dict) and stages:
        first = next(iter(stages))
        if not isinstance(stages[first], dict) or not isinstance(stages[first].get("generate"), dict):
            raise ConfigError(f"{path} is a pipeline whose first stage generates nothing; run it by: cai run {name}")
        seed = document.data.get("seed")
        document = document.below("stages", first, "generate")
        if seed is not None:
            document.data.setdefault("seed", seed)
    resolve_paths(document.data, path.parent)
    return document


def resolve_paths(recipe: Any, folder: Path) -> None:
    """Write out what a recipe of `cai generate` (as data) names by a path beside it; the rest stays."""
    for dotted in _PATHS:
        beside(recipe, folder, dotted)
    judge = recipe.get("judge") if isinstance(recipe, dict) else None
    members = judge.get("members") if isinstance(judge, dict) else None
    for member in members if isinstance(members, list) else []:
        beside(member, folder, "calibration")


def beside(target: Any, folder: Path, dotted: str) -> None:
    """Write out the path under that key of a document where it names a file beside the recipe."""
    *sections, key = dotted.split(".")
    for section in sections:
        target = target.get(section) if isinstance(target, dict) else None
    value = target.get(key) if isinstance(target, dict) else None
    if isinstance(value, str) and value != "-" and is_meant(folder / value, value):
        target[key] = str(folder / value)


def is_meant(path: Path, value: str) -> bool:
    """Whether a path is what the recipe names: a plain word is no folder (`benign`, beside a run in `benign/`)."""
    return os.path.isfile(path) or ("/" in value and os.path.isdir(path))
