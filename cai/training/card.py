"""The card of a trained model: what it was trained from, on which rows, by which constitution, and how well it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from cai.documents import dump
from cai.training.settings import StageName, TrainSettings

_WHAT: dict[StageName, str] = {
    "sft": "supervised fine-tuning",
    "reward": "training as a reward model",
    "dpo": "direct preference optimisation (DPO)",
    "kto": "Kahneman-Tversky optimisation (KTO)",
    "orpo": "odds ratio preference optimisation (ORPO)",
    "cpo": "contrastive preference optimisation (CPO)",
}


def render_card(stage: StageName, settings: TrainSettings, manifest: dict[str, Any], name: str) -> str:
    """The README.md of a model folder called `name`."""
    template = (Path(__file__).parent / "card.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined, autoescape=False)
    measures = {key: _shown(value) for key, value in manifest["measures"].items() if isinstance(value, int | float)}
    return environment.from_string(template).render(
        stage=stage,
        title=name,
        base=settings.model,
        what=_WHAT[stage],
        versions=manifest["versions"],
        sources=manifest["data"],
        too_long=manifest["too_long"],
        measures=measures,
        recipe=dump({stage: settings.model_dump(mode="json", exclude_defaults=True)}),
    )


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
