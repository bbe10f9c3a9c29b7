"""A recipe that was checked: everything it names is found, before anything is written or paid for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from cai.config import JudgeConfig, ModelConfig, PanelMember, RayConfig, Recipe
from cai.constitution import Constitution, load_constitution
from cai.engines import Engine, build_engine
from cai.errors import CapabilityError, ConfigError
from cai.generation import Engines, template_hash
from cai.generation.estimate import Estimate, estimate
from cai.judging import NEEDS, judge_sections, section_names, usable_principles
from cai.judging.calibration import LoadedCalibration, check_fits, judge_identity, load_calibration
from cai.judging.checks import prepare as prepare_checks
from cai.judging.checks import python_hashes
from cai.prompts import read_prompts
from cai.servers import is_url

Section = TypeVar("Section", JudgeConfig, PanelMember)
_NO_ENGINE = "checks"
"""Who judges where no model does."""


@dataclass(frozen=True)
class Plan:
    """A recipe that was checked, with its constitution and the engines that it names."""

    recipe: Recipe
    constitution: Constitution
    policy: Engine | None
    """None where pairs that are there already are labelled, and nothing is generated."""
    judges: dict[JudgeConfig, Engine]
    """The engine of the judge, or of each member of a panel."""
    calibrations: dict[str, LoadedCalibration]
    """What was read from each file that the judge, or a member of a panel, names as its calibration."""

    @property
    def engines(self) -> Engines:
        """Who works."""
        return Engines(self.policy, self.judges, self.calibrations)

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
            **python_hashes(self.constitution.comparing),
            **{f"prompts.{key}": value for key, value in prompts.items()},
            **{f"generation.{key}": value for key, value in generation.items()},
        }

    def _judge_section(self) -> dict[str, Any]:
        """What the judge's section decides; models are named by their fingerprints, a calibration by its content."""
        keys = ("model", "revision", "allow_python", "server", "vllm")
        leave_out: dict[str, Any] = {**dict.fromkeys(keys, True), "members": {"__all__": {"server"}}}
        section = self.recipe.judge.model_dump(mode="json", exclude=leave_out)
        for named in (section, *section["members"]):
            if named["calibration"]:
                named["calibration"] = self.calibrations[named["calibration"]].hash
        return section

    @property
    def calibration_files(self) -> dict[str, str]:
        """What the run folder keeps of calibrations: the files' names there, which the pinned recipe has, and their texts."""
        judge = self.recipe.judge
        named = {_copy(): judge.calibration} | {_copy(n): one.calibration for n, one in enumerate(judge.members, 1)}
        return {name: self.calibrations[path].text for name, path in named.items() if path}

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
        members = tuple(self._pinned(one, _copy(number)) for number, one in enumerate(judge.members, 1))
        return self._pinned(judge, _copy()).model_copy(update={"members": members})

    def _pinned(self, one: Section, copy: str) -> Section:
        """A judge's or a member's section; of a panel, the model that is shared is pinned by a member that uses it."""
        engines = (
            engine for judge, engine in self.judges.items() if (judge.model, judge.revision) == (one.model, one.revision)
        )
        revision = next((engine.revision for engine in engines), one.revision) if one.model else None
        return one.model_copy(update={"revision": revision, "calibration": copy if one.calibration else None})


def _copy(member: int | None = None) -> str:
    return f"calibration-{member}.yaml" if member else "calibration.yaml"


def plan(recipe: Recipe) -> Plan:
    """Find and check all that a recipe names, before anything is written or paid for. Raises `ConfigError`."""
    _check_ray(recipe)
    constitution = load_constitution(recipe.constitution)
    if lacking := lacking_principles(constitution, recipe.generation.rounds):
        raise ConfigError(f"generation.rounds: {lacking}")
    if recipe.dataset.ranking != "none" and (missing := [name for name in ("choix", "scipy") if find_spec(name) is None]):
        raise ConfigError(f"dataset.ranking needs {' and '.join(missing)}: pip install 'cai-toolkit[judge]'")
    _check_prices(recipe, with_policy=True)
    policy = build_engine(recipe.policy)
    judges = plan_judges(recipe, constitution, {(recipe.policy, False): policy})
    return Plan(recipe, constitution, policy, judges, plan_calibrations(recipe, constitution, judges))


def plan_judges(
    recipe: Recipe, constitution: Constitution, engines: dict[tuple[ModelConfig, bool], Engine]
) -> dict[JudgeConfig, Engine]:
    """The engines of all judges, made where `engines` has none for the model yet. Raises `ConfigError`."""
    prepare_checks(constitution.comparing, recipe.judge.allow_python)
    found = {}
    for section, name in zip(judge_sections(recipe.judge), section_names(recipe), strict=True):
        if section.method != "reward-model" and not usable_principles(section, constitution):
            what = "check" if section.method == "checks" else "preference"
            raise ConfigError(f"constitution '{constitution.name}' has no principle with a '{what}' for the judge; add one")
        if section.method != "checks":
            found[section] = _judge_engine(recipe, section, engines, name)
    return found


def plan_calibrations(
    recipe: Recipe, constitution: Constitution, judges: dict[JudgeConfig, Engine]
) -> dict[str, LoadedCalibration]:
    """The calibrations of all judges, by the path that the recipe names. Raises `ConfigError` for one that does not fit."""
    found: dict[str, LoadedCalibration] = {}
    for section in judge_sections(recipe.judge):
        if path := section.calibration:
            found[path] = found.get(path) or load_calibration(Path(path))
            name = _judge_name(section, judges[section]) if section in judges else _NO_ENGINE
            check_fits(found[path].calibration, judge_identity(section, name, constitution))
    return found


def _judge_names(judges: dict[JudgeConfig, Engine]) -> str:
    return ", ".join(dict.fromkeys(_judge_name(*judge) for judge in judges.items())) or _NO_ENGINE


def _judge_name(section: JudgeConfig, engine: Engine) -> str:
    """The engine's fingerprint, and how choices are read where the method reads them."""
    form = engine.choice_form if "choice_logprobs" in NEEDS[section.method] else ""
    return f"{engine.fingerprint} {form}".rstrip()


def _judge_engine(recipe: Recipe, section: JudgeConfig, engines: dict[tuple[ModelConfig, bool], Engine], name: str) -> Engine:
    """Made where there is none for the model yet; `name` is what errors call the section of its settings."""
    model, reward = recipe.judge_model(section), section.method == "reward-model"
    key = model, reward and not model.model.startswith("scripted:")
    if reward and section.model is None:
        raise ConfigError("judge.method: reward-model needs a reward model of its own; name it by --judge-model")
    if key not in engines:
        engines[key] = build_engine(model, reward, name)
    missing = sorted(NEEDS[section.method] - engines[key].capabilities)
    if missing:
        raise CapabilityError(
            f"judge.method: {section.method} needs {missing[0]}, which {model.model} does not offer{_instead(engines[key])}"
        )
    return engines[key]


def _instead(engine: Engine) -> str:
    """Which methods the engine can serve."""
    able = [method for method, needed in NEEDS.items() if needed and needed <= engine.capabilities]
    return f"; it can serve judge.method: {', '.join(able)}" if able else ""


def plan_labels(recipe: Recipe) -> Plan:
    """The same for a run that only judges. Raises `ConfigError`."""
    _check_ray(recipe)
    constitution = load_constitution(recipe.constitution)
    _check_prices(recipe, with_policy=False)
    judges = plan_judges(recipe, constitution, {})
    return Plan(recipe, constitution, None, judges, plan_calibrations(recipe, constitution, judges))


def _check_ray(recipe: Recipe) -> None:
    if recipe.ray.address is None:
        return
    if find_spec("ray") is None:
        raise ConfigError("--ray needs ray, which is not installed: pip install 'cai-toolkit[ray]'")
    if recipe.budget.tokens is not None or recipe.budget.money is not None:
        raise ConfigError("budget: the workers of a Ray cluster do not share one yet; remove it, or run without --ray")
    if any(model.server.batch for model in (recipe.policy, *map(recipe.judge_model, judge_sections(recipe.judge)))):
        raise ConfigError("server.batch: only a run on one machine notes its batches; remove it, or run without --ray")


def _check_prices(recipe: Recipe, with_policy: bool) -> None:
    """Raises `ConfigError` where money is to be counted, and nobody said what a served model costs."""
    if recipe.budget.money is None:
        return
    judges = zip(section_names(recipe), judge_sections(recipe.judge), strict=True)
    working = [("policy", recipe.policy)] * with_policy
    working += [(name, recipe.judge_model(one)) for name, one in judges if one.method != "checks"]
    for name, model in working:
        if is_url(model.model) and model.server.input_price is None and model.server.output_price is None:
            raise ConfigError(
                f"budget.money: what {model.model} costs is not known; set {name}.server.input_price and "
                f"{name}.server.output_price to the price of a million tokens (0 where they cost nothing)"
            )


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
