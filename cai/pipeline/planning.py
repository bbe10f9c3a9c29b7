"""A recipe that was checked: everything it names is found, before anything is written or paid for."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cai.config import JudgeConfig, ModelConfig, RayConfig, Recipe
from cai.constitution import Constitution, load_constitution
from cai.engines import Engine, build_engine
from cai.errors import CapabilityError, ConfigError
from cai.generation import template_hash
from cai.generation.estimate import Estimate, estimate
from cai.judging import NEEDS, usable_principles
from cai.judging.calibration import check_fits, load_calibration
from cai.judging.checks import prepare as prepare_checks
from cai.prompts import read_prompts


@dataclass(frozen=True)
class Plan:
    """A recipe that was checked, with its constitution and the engines that it names."""

    recipe: Recipe
    constitution: Constitution
    policy: Engine | None
    """None where pairs that are there already are labelled, and nothing is generated."""
    judges: dict[JudgeConfig, Engine]
    """The engine of the judge, or of each member of a panel."""

    @property
    def judge_names(self) -> str:
        """Who judges, as the manifest says it."""
        return _judge_names(self.judges)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the records of a run. Two runs that agree in it can share a folder."""
        prompts = self.recipe.prompts.model_dump(exclude={"limit"})
        prompts["source"] = os.path.normpath(prompts["source"])
        generation = self.recipe.generation.model_dump(exclude={"concurrency"}) if self.policy else {}
        return {
            "cai": f"generation code and templates {template_hash()}",
            "constitution": f"{self.constitution.name}@{self.constitution.hash}",
            "seed": self.recipe.seed,
            "policy": self.policy.fingerprint if self.policy else "the completions are given",
            "judge": self.judge_names,
            **{f"judge.{key}": value for key, value in self._judge_section().items()},
            **{f"prompts.{key}": value for key, value in prompts.items()},
            **{f"generation.{key}": value for key, value in generation.items()},
        }

    def _judge_section(self) -> dict[str, Any]:
        """What the judge's section decides; models are named by their fingerprints, a calibration by its content."""
        section = self.recipe.judge.model_dump(mode="json", exclude={"model", "revision", "allow_python"})
        if self.recipe.judge.calibration:
            section["calibration"] = hashlib.sha256(Path(self.recipe.judge.calibration).read_bytes()).hexdigest()[:16]
        return section

    @property
    def pinned_recipe(self) -> Recipe:
        """The recipe that makes the same requests again, for the run folder: models of the Hub by their commit."""
        recipe = self.recipe.model_copy(update={"ray": RayConfig()})  # another machine has another cluster
        revision = self.policy.revision if self.policy else recipe.policy.revision
        policy = recipe.policy.model_copy(update={"revision": revision})
        pinned = {"constitution": "constitution.yaml", "policy": policy, "judge": self._pinned_judge()}
        return recipe.model_copy(update=pinned)

    def _pinned_judge(self) -> JudgeConfig:
        judge = self.recipe.judge
        if judge.model is not None and judge in self.judges:
            judge = judge.model_copy(update={"revision": self.judges[judge].revision})
        members = tuple(
            one.model_copy(update={"revision": self.judges[judge.member(one)].revision})
            if one.model and one.method != "checks"
            else one
            for one in judge.members
        )
        return judge.model_copy(update={"members": members, "calibration": "calibration.yaml" if judge.calibration else None})


def plan(recipe: Recipe) -> Plan:
    """Find and check all that a recipe names, before anything is written or paid for. Raises `ConfigError`."""
    _refuse_missing_ray(recipe)
    constitution = load_constitution(recipe.constitution)
    if lacking := lacking_principles(constitution, recipe.generation.rounds):
        raise ConfigError(f"generation.rounds: {lacking}")
    if recipe.dataset.ranking != "none" and (missing := [name for name in ("choix", "scipy") if find_spec(name) is None]):
        raise ConfigError(f"dataset.ranking needs {' and '.join(missing)}: pip install 'cai-toolkit[judge]'")
    policy = build_engine(recipe.policy)
    return Plan(recipe, constitution, policy, plan_judges(recipe, constitution, {(recipe.policy, False): policy}))


def plan_judges(
    recipe: Recipe, constitution: Constitution, engines: dict[tuple[ModelConfig, bool], Engine]
) -> dict[JudgeConfig, Engine]:
    """The engines of all judges, made where `engines` has none for the model yet. Raises `ConfigError`."""
    judge = recipe.judge
    prepare_checks(constitution.comparing, judge.allow_python)
    sections = [judge.member(one) for one in judge.members] or [judge]
    found = {}
    for section in sections:
        if section.method != "reward-model" and not usable_principles(section, constitution):
            what = "check" if section.method == "checks" else "preference"
            raise ConfigError(f"constitution '{constitution.name}' has no principle with a '{what}' for the judge; add one")
        if section.method != "checks":
            found[section] = _judge_engine(recipe, section, engines)
    if judge.calibration:
        fingerprint = _judge_names(found)
        calibration = load_calibration(Path(judge.calibration))
        check_fits(calibration, judge.method, fingerprint, f"{constitution.name}@{constitution.hash}")
    return found


def _judge_names(judges: dict[JudgeConfig, Engine]) -> str:
    return ", ".join(engine.fingerprint for engine in dict.fromkeys(judges.values())) or "checks"


def _judge_engine(recipe: Recipe, section: JudgeConfig, engines: dict[tuple[ModelConfig, bool], Engine]) -> Engine:
    model, reward = recipe.judge_model(section), section.method == "reward-model"
    key = model, reward and not model.model.startswith("scripted:")
    if reward and section.model is None:
        raise ConfigError("judge.method: reward-model needs a reward model of its own; name it by --judge-model")
    if key not in engines:
        engines[key] = build_engine(model, reward)
    missing = sorted(NEEDS[section.method] - engines[key].capabilities)
    if missing:
        raise CapabilityError(f"judge.method: {section.method} needs {missing[0]}, which {model.model} does not offer")
    return engines[key]


def plan_labels(recipe: Recipe) -> Plan:
    """The same for a run that only judges. Raises `ConfigError`."""
    _refuse_missing_ray(recipe)
    constitution = load_constitution(recipe.constitution)
    return Plan(recipe, constitution, None, plan_judges(recipe, constitution, {}))


def _refuse_missing_ray(recipe: Recipe) -> None:
    if recipe.ray.address is not None and find_spec("ray") is None:
        raise ConfigError("--ray needs ray, which is not installed: pip install 'cai-toolkit[ray]'")


def lacking_principles(constitution: Constitution, rounds: int) -> str | None:
    """Why a constitution cannot serve so many rounds, and the flags with which it can serve; None where it can."""
    there = len(constitution.critiquing)
    if rounds <= there:
        return None
    flags = f"--set generation.rounds={there}"
    if not there:
        flags += " --set generation.candidates=2 --set generation.pairs=samples"
    return (
        f"{rounds} {'rounds draw' if rounds > 1 else 'round draws'} a principle each without repeating, but constitution "
        f"'{constitution.name}' has {there or 'none'} with critique and revision; this works: {flags}"
    )


def dry_run(recipe: Recipe) -> tuple[Plan, Estimate]:
    """What a run would do; reads the prompts and makes no call."""
    checked = plan(recipe)
    return checked, estimate(recipe, checked.constitution, read_prompts(recipe.prompts))
