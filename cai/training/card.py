"""The card of a trained model: what it was trained from, on which rows, by which constitution, and how well it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from cai.documents import dump
from cai.intervals import gathered
from cai.models import ALIASES, public_name
from cai.report.written import named
from cai.training.base_settings import TrainSettings
from cai.training.online.settings import OnlineSettings, Source
from cai.training.settings import RewardSettings, StageName

_WHAT: dict[StageName, str] = {
    "sft": "supervised fine-tuning",
    "reward": "training as a reward model",
    "dpo": "direct preference optimisation (DPO)",
    "kto": "Kahneman-Tversky optimisation (KTO)",
    "orpo": "odds ratio preference optimisation (ORPO)",
    "cpo": "contrastive preference optimisation (CPO)",
    "ppo": "proximal policy optimisation (PPO)",
    "rloo": "REINFORCE leave-one-out (RLOO)",
    "grpo": "group relative policy optimisation (GRPO)",
    "online-dpo": "online direct preference optimisation",
}
_UNKNOWN = {"constitution": "", "constitution_hash": "", "judge": "", "left_out": 0}
"""Of a source that is no run folder."""
_SERVED = "a model of a server"
_PRIVATE = {
    "hub_token",
    "push_to_hub_token",
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_group_port",
}
"""TRL's arguments that say where on a network something is, or are keys."""


def render_card(stage: StageName, settings: TrainSettings, manifest: dict[str, Any], name: str, is_best: bool = False) -> str:
    """The README.md of a model folder called `name`; nothing in it names a folder of the machine. `is_best`: of the policy with
    the best gold measure, which may not be the last."""
    template = (Path(__file__).parent / "card.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined, autoescape=False)
    rollout = manifest.get("rollout")
    measures = {named(name, rollout): _with_ends(value, ends) for name, value, ends in gathered(manifest["measures"])}
    base = ALIASES[settings.model].hub_id if settings.model in ALIASES else public_name(settings.model)
    return environment.from_string(template).render(
        stage=stage,
        title=name,
        base=base,
        metadata=dump(_metadata(stage, settings, base)),
        what=_WHAT[stage],
        rewards=[(_rewarded_by(one), one.weight) for one in settings.reward] if isinstance(settings, OnlineSettings) else [],
        versions=manifest["versions"],
        sources=[{**_UNKNOWN, **one, "source": public_name(one["source"])} for one in manifest["data"]],
        training=manifest["training"],
        steps=manifest["steps"],
        too_long=manifest["too_long"],
        unlabelled=manifest["unlabelled"],
        held_out=sum(one["test"] for one in manifest["data"]),
        measures=measures,
        is_online=isinstance(settings, OnlineSettings),
        stopped=manifest.get("stopped"),
        changes=manifest.get("changes", ()),
        rollouts=manifest.get("rollouts"),
        members=settings.members if isinstance(settings, RewardSettings) else 1,
        best=manifest.get("best"),
        is_best=is_best,
        gold=manifest.get("gold"),
        gold_by=_rewarded_by(settings.gold) if isinstance(settings, OnlineSettings) and settings.gold else "",
        unscored=manifest.get("unscored", {}),
        recipe=dump({stage: _recipe(settings)}),
    )


def _metadata(stage: StageName, settings: TrainSettings, base: str) -> dict[str, Any]:
    """What the Hub reads."""
    adapters = settings.lora is not None and not settings.lora.merge
    return {
        "library_name": "peft" if adapters else "transformers",
        **({"base_model": base} if base.count("/") == 1 else {}),
        "pipeline_tag": "text-classification" if stage == "reward" else "text-generation",
        "tags": [stage, "trl", "constitutional-ai", *(["reward-model"] if stage == "reward" else [])],
    }


def _rewarded_by(source: Source) -> str:
    """What says what a completion is worth, in words."""
    if source.model is not None:
        return f"the reward model `{public_name(source.model)}`"
    if source.function is not None:
        return f"the function `{source.name}`"
    constitution = f"the constitution `{public_name(source.constitution or '')}`"
    if source.judge is None or source.judge.method == "checks":
        return f"the checks of {constitution}"
    server = source.judge.server
    judge = _judge_name(source.judge.model or "", server.name if server else None)
    return f"what `{judge}` says under {constitution} (`{source.judge.method}`)"


def _judge_name(model: str, served: str | None) -> str:
    """Of a server's model the name that it has there, never the URL."""
    return served or _SERVED if "://" in model else public_name(model)


def _recipe(settings: TrainSettings) -> dict[str, Any]:
    told = settings.model_dump(mode="json", exclude_defaults=True)
    sources = [{**one, "source": public_name(one["source"])} for one in told["data"]]
    if isinstance(settings, OnlineSettings):
        told |= {"reward": [_named(one) for one in told["reward"]]}
        told |= {key: change(told[key]) for key, change in (("gold", _named), ("critic", public_name)) if key in told}
    if "trl" in told:
        told["trl"] = {key: one for key, one in told["trl"].items() if key not in _PRIVATE}
    return {**told, "model": public_name(settings.model), "data": sources}


def _named(source: dict[str, Any]) -> dict[str, Any]:
    """A reward or gold measure without the folders of the machine, and its judge without the server."""
    told = {key: public_name(one) if key in ("model", "constitution") else one for key, one in source.items()}
    if "function" in source:
        place, _, name = source["function"].rpartition(":")
        told["function"] = f"{public_name(place)}:{name}"
    if judge := source.get("judge"):
        served = (judge.get("server") or {}).get("name")
        named = {"model": _judge_name(judge["model"], served)} if judge.get("model") else {}
        told["judge"] = {**{key: one for key, one in judge.items() if key != "server"}, **named}
    return told


def _with_ends(value: float, ends: tuple[float, float] | None) -> str:
    return _shown(value) + (f" ({_shown(ends[0])} to {_shown(ends[1])})" if ends else "")


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
