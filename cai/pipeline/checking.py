"""Every step of a pipeline checked before the first one runs."""

from __future__ import annotations

from pathlib import Path

from cai.config import Recipe
from cai.errors import CaiError, ConfigError
from cai.pipeline.planning import plan
from cai.pipeline.recipe import Pipeline, Settings
from cai.pipeline.steps import Step, base_model
from cai.prompts import find_source, read_prompts
from cai.training import OnlineSettings, TrainSettings


def check_step(pipeline: Pipeline, step: Step, finished: set[Step]) -> Settings:
    """Check a step as far as that can be without what earlier steps have yet to make, and return its settings, in which the
    model that an earlier step begins with stands for the one that it will train. Raises `ConfigError`."""
    settings = step.with_places(lambda one: _stand_in(one, step, finished))
    try:
        if isinstance(settings, Recipe):
            plan(settings)
            unmade = any(one.kind == "generate" and one not in finished for one in step.reads)
            if settings.prompts.source == "-":
                raise ConfigError("prompts.source: standard input cannot be read again; save the prompts to a file")
            if not unmade:
                read_prompts(settings.prompts)
        else:
            _check_training(pipeline, step, settings)
            if isinstance(settings, OnlineSettings):
                _check_online(step, settings, finished)
    except CaiError as exc:
        shown = str(exc)
        raise ConfigError(shown if shown.startswith(step.where.rpartition(":")[0]) else f"{step.where}: {shown}") from exc
    return settings


def _stand_in(made: Step, step: Step, finished: set[Step]) -> Path | str:
    """What stands for what an earlier step makes: where it is not there yet, for a model that is trained on the one that
    training begins with. For a reward model of an online stage nothing does."""
    if made in finished or made.kind == "generate":
        return made.made
    is_reward = made.kind == "reward" and isinstance(step.section, OnlineSettings)
    return made.folder if is_reward else base_model(made)


def _check_online(step: Step, settings: OnlineSettings, finished: set[Step]) -> None:
    from cai.training.arguments import make_arguments, room_for_prompts
    from cai.training.loading import context_of
    from cai.training.online.rewards import check_rewards

    check_rewards(settings, {str(one.folder) for one in step.reads if one not in finished})
    room_for_prompts(settings, make_arguments(step.training, settings, step.folder), context_of(settings))


def _check_training(pipeline: Pipeline, step: Step, settings: TrainSettings) -> None:
    from cai.training.arguments import check_arguments, make_arguments
    from cai.training.data import VIEWS
    from cai.training.loading import check_reference, context_of, find_model
    from cai.training.reading import called

    loc = ("stages", step.name, step.kind, "trl")
    check_arguments(step.training, settings.trl, lambda key: pipeline.where((*loc, key)))
    make_arguments(step.training, settings, step.folder)
    find_model(settings)
    bases = getattr(settings, "bases", ())
    for key, models in (("reference", (getattr(settings, "reference", None),)), ("bases", bases)):
        for model in filter(None, models):
            _find_other(key, settings.model_copy(update={"model": model, "revision": None}))
    check_reference(settings)
    if "max_length" in settings.trl:
        for model in bases or (settings.model,):
            own = settings.model_copy(update={"model": model})
            make_arguments(step.training, own, step.folder, context=context_of(own))
    for text, source in zip((one.source for one in step.section.data), settings.data, strict=True):
        if text == "-":
            raise ConfigError("data '-': standard input cannot be read again; save the rows to a file")
        if text not in step.bound:
            find_source(source.source, called(VIEWS[step.training]))


def _find_other(key: str, settings: TrainSettings) -> None:
    from cai.training.loading import find_model

    try:
        find_model(settings)
    except CaiError as exc:
        raise ConfigError(f"{key}: {exc}") from exc
