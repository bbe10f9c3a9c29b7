"""The dataset card `OUT/README.md`, written from the manifest; the template lies beside it in `card.md.jinja`."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import jinja2

from cai.config import Recipe
from cai.constitution import Constitution
from cai.dataset.parquet import CONFIGS
from cai.documents import dump
from cai.types import Record

_FOLDER = Path(__file__).parent
_EXAMPLE_CHARACTERS = 600
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters, but for tabs and line feeds, and what reorders or breaks lines unseen."""


def render_card(manifest: dict[str, Any], recipe: Recipe, constitution: Constitution, example: Record) -> str:
    """The card: Hub metadata, what the data is and how it was made, counts, how to load it, limits."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(_FOLDER), trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.1f} %"
    environment.filters |= {"quoted": quoted, "code": code}
    return environment.get_template("card.md.jinja").render(
        metadata=dump(_metadata(manifest, recipe, constitution)),
        manifest=manifest,
        recipe=recipe,
        constitution=constitution,
        example=example,
        models={"policy": _name(recipe.policy.model), "judge": _name(recipe.judge_model.model)},
        source=_name(recipe.prompts.source),
        exemplars=len(constitution.exemplars[: recipe.generation.exemplars]),
        principles=len(example.verdicts[0].principles) if example.verdicts else recipe.judge.principles,
    )


def _metadata(manifest: dict[str, Any], recipe: Recipe, constitution: Constitution) -> dict[str, Any]:
    """The YAML that the Hub and `load_dataset` read: a configuration for each view, a path for each split that has rows.

    One split without rows would make `load_dataset` refuse all of its configuration.
    """
    configs = []
    for name in CONFIGS:
        splits = [split for split, count in manifest["dataset"]["rows"][name].items() if count]
        paths = [{"split": split, "path": f"data/{name}/{split}-*"} for split in splits]
        default = {"default": True} if name == "preference" else {}
        if paths:
            configs.append({"config_name": name, "description": _version(manifest, name), "data_files": paths, **default})
    return {
        "pretty_name": f"{constitution.name} by {_name(recipe.policy.model)}",
        **({"license": recipe.dataset.license} if recipe.dataset.license else {}),
        "tags": ["constitutional-ai", "rlaif", "preference", "synthetic", "cai"],
        "task_categories": ["text-generation"],
        "configs": configs,
    }


def _version(manifest: dict[str, Any], name: str) -> str:
    """A hash of the files of one view: `datasets` takes a cached copy for the folder's wherever these lines are the same."""
    files = sorted(item for item in manifest.get("files", {}).items() if item[0].startswith(f"{name}/"))
    return "version " + hashlib.sha256(repr(files).encode()).hexdigest()[:16]


def _name(value: str) -> str:
    """A model's or source's name without the folders of the machine that it lies on."""
    scheme, colon, rest = value.rpartition(":")
    if value.startswith(("~", ".")) or Path(value).is_absolute():
        return os.path.basename(os.path.abspath(os.path.expanduser(value)))
    if scheme.startswith("scripted"):
        return f"scripted:{Path(scheme.removeprefix('scripted:')).name}{colon}{rest}"
    return value


def quoted(text: str) -> str:
    """A text inside a Markdown quotation: it cannot end the quotation, and what it marks up is shown as it stands."""
    text = _UNSEEN.sub("", text)
    text = text[:_EXAMPLE_CHARACTERS] + (" …" if len(text) > _EXAMPLE_CHARACTERS else "")
    escaped = re.sub(r"([\\`*_{}\[\]<>#|$~&])", r"\\\1", text)
    return "\n".join(f"> {line}" for line in escaped.split("\n"))


def code(text: str) -> str:
    """A text as Markdown's inline code, in a table too: it stays on its line and in its cell."""
    line = " ".join(_UNSEEN.sub("", text).split()).replace("|", "\\|")
    fence = "`" * (max(map(len, re.findall(r"`+", line)), default=0) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"
