"""The dataset card `OUT/README.md`, written from the manifest; the template lies beside it in `card.md.jinja`."""

from __future__ import annotations

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


def render_card(manifest: dict[str, Any], recipe: Recipe, constitution: Constitution, example: Record) -> str:
    """The card: Hub metadata, what the data is and how it was made, counts, how to load it, limits."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(_FOLDER), trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.1f} %"
    environment.filters["plain"] = quoted
    return environment.get_template("card.md.jinja").render(
        metadata=dump(_metadata(manifest, recipe, constitution)),
        manifest=manifest,
        recipe=recipe,
        constitution=constitution,
        example=example,
        models={role: _name(getattr(recipe, f"{role}_model", recipe.policy).model) for role in ("policy", "judge")},
        source=_name(recipe.prompts.source),
    )


def _metadata(manifest: dict[str, Any], recipe: Recipe, constitution: Constitution) -> dict[str, Any]:
    """The YAML that the Hub and `load_dataset` read: a configuration for each view, a path for each split."""
    rows = manifest["dataset"]["rows"]
    configs = [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": f"data/{name}/{split}-*"} for split in rows[name]],
            **({"default": True} if name == "preference" else {}),
        }
        for name in CONFIGS
    ]
    return {
        "pretty_name": f"{constitution.name} by {_name(recipe.policy.model)}",
        **({"license": recipe.dataset.license} if recipe.dataset.license else {}),
        "tags": ["constitutional-ai", "rlaif", "preference", "synthetic", "cai"],
        "task_categories": ["text-generation"],
        "configs": configs,
    }


def _name(value: str) -> str:
    """A model's or source's name without the folders of the machine that it lies on."""
    scheme, colon, rest = value.rpartition(":")
    if Path(value).expanduser().is_absolute() or value.startswith(("~", ".")):
        return Path(value).name
    if scheme.startswith("scripted"):
        return f"scripted:{Path(scheme.removeprefix('scripted:')).name}{colon}{rest}"
    return value


def quoted(text: str) -> str:
    """A text inside a Markdown quotation: it cannot end the quotation, and control characters are gone."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)
    text = text[:_EXAMPLE_CHARACTERS] + (" …" if len(text) > _EXAMPLE_CHARACTERS else "")
    escaped = re.sub(r"([\\`*_{}\[\]<>#|$~])", r"\\\1", text)
    return "\n".join(f"> {line}" for line in escaped.splitlines() or [""])
