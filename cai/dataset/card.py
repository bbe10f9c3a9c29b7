"""The dataset card `OUT/README.md`, written from the manifest; the template lies beside it in `card.md.jinja`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import jinja2

from cai.config import DatasetConfig, Method, Recipe
from cai.constitution import Constitution
from cai.dataset import views
from cai.dataset.parquet import CONFIGS
from cai.documents import dump
from cai.judging import judge_sections
from cai.models import public_name
from cai.types import PreferencePair, Record

_FOLDER = Path(__file__).parent
_EXAMPLE_CHARACTERS = 600
_EXAMPLES = 1000
"""Records that are looked at for the card's example."""
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters, but for tabs and line feeds, and what reorders or breaks lines unseen."""


_LABELS: dict[Method, str] = {
    "choice": "probability of the letter A against B, both orders averaged",
    "reasoning": "probability of the letter A against B after a thought, clamped, both orders averaged",
    "text": "share of generated answers, both orders averaged",
    "likelihood": "contrastive likelihood where the principle is held and violated",
    "score": "difference of expected ratings from 1 to 10",
    "checks": "programs that verify a principle",
    "reward-model": "difference of a reward model's rewards",
    "panel": "the weighted mean of several judges",
}


def choose_example(records: Iterator[Record], config: DatasetConfig) -> Record:
    """The record that the card shows: the first of the first thousand with a pair, else the very first."""
    first = next(records)
    looked_at = islice(chain([first], records), _EXAMPLES)
    return next((record for record in looked_at if _first_pair(record, config)), first)


def _first_pair(record: Record, config: DatasetConfig) -> PreferencePair | None:
    return next((pair for pair in views.pairs(record, config) if not isinstance(pair, views.Dropped)), None)


def render_card(manifest: dict[str, Any], recipe: Recipe, constitution: Constitution, example: Record) -> str:
    """The card: Hub metadata, what the data is and how it was made, counts, how to load it, limits."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(_FOLDER), trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.1f} %"
    environment.filters |= {"quoted": quoted, "code": code}
    models = _models(recipe)
    return environment.get_template("card.md.jinja").render(
        metadata=dump(_metadata(manifest, recipe, constitution, models["policy" if manifest["policy"] else "judge"])),
        manifest=manifest,
        recipe=recipe,
        constitution=constitution,
        example=example,
        pair=_first_pair(example, recipe.dataset),
        models=models,
        source=public_name(recipe.prompts.source),
        label=_LABELS[recipe.judge.method],
        exemplars=len(constitution.exemplars[: recipe.generation.exemplars]),
        principles=len(example.verdicts[0].principles) if example.verdicts else recipe.judge.principles,
    )


def _models(recipe: Recipe) -> dict[str, str]:
    judges = judge_sections(recipe.judge)
    names = (public_name(recipe.judge_model(one).model) for one in judges if one.method != "checks")
    return {"policy": public_name(recipe.policy.model), "judge": ", ".join(dict.fromkeys(names)) or "checks"}


def _metadata(manifest: dict[str, Any], recipe: Recipe, constitution: Constitution, author: str) -> dict[str, Any]:
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
        "pretty_name": f"{constitution.name} by {author}",
        **({"license": recipe.dataset.license} if recipe.dataset.license else {}),
        "tags": ["constitutional-ai", "rlaif", "preference", "synthetic", "cai"],
        "task_categories": ["text-generation"],
        "configs": configs,
    }


def _version(manifest: dict[str, Any], name: str) -> str:
    """A hash of the files of one view: `datasets` takes a cached copy for the folder's wherever these lines are the same."""
    files = sorted(item for item in manifest.get("files", {}).items() if item[0].startswith(f"{name}/"))
    return "version " + hashlib.sha256(repr(files).encode()).hexdigest()[:16]


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
