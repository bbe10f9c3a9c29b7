"""A pipeline unfolded into steps: rounds counted out, every reference bound to the step that it means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from cai.errors import ConfigError, nearest
from cai.models import best_model
from cai.pipeline.recipe import Kind, Pipeline, Reference, Settings, reference_in, replaced, texts_in
from cai.training import StageName

StageRound = tuple[str, int]
"""The name of a stage, and in which round it is."""


@dataclass(frozen=True)
class Step:
    """One stage in one round."""

    round: int
    name: str
    kind: Kind
    folder: Path
    section: Any
    """The settings as they stand in the pipeline, with a seed."""
    bound: dict[str, str | Step]
    """By reference: the step that it means, or what stands in its place in the first round."""
    where: str
    """File, line and key, for errors."""

    @property
    def label(self) -> str:
        """Its name, with the round where that is not the first."""
        return f"{self.name} (round {self.round})" if self.round > 1 else self.name

    @property
    def training(self) -> StageName:
        """Its kind, of a step that trains."""
        assert self.kind != "generate"
        return self.kind

    @property
    def reads(self) -> list[Step]:
        """The steps whose folders it reads."""
        return list(dict.fromkeys(one for one in self.bound.values() if isinstance(one, Step)))

    @property
    def settings(self) -> Settings:
        """The settings with the models and rows that were made in place of the references."""
        return self.with_places(lambda step: str(step.made))

    @property
    def made(self) -> Path:
        """The folder of what it made: rows, or the model, of which there may be a better one than the last."""
        return self.folder if self.kind == "generate" else best_model(self.folder)

    def with_places(self, place: Any) -> Settings:
        """The same, with what `place` says of each step that is referred to."""

        def change(text: str) -> str:
            found = reference_in(text)
            if found is None:
                return text
            target = self.bound[text]
            return f"{found.scheme}{place(target)}" if isinstance(target, Step) else target

        data = self.section.model_dump(mode="json", exclude_unset=True)
        return type(self.section).model_validate(replaced(data, change))  # type: ignore[no-any-return]

    def __hash__(self) -> int:
        return hash(self.folder)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Step) and self.folder == other.folder


def unfold(pipeline: Pipeline, out: Path, made: Mapping[StageRound, str] | None = None) -> list[Step]:
    """All steps in order, each with a folder `out`/NUMBER-NAME.

    A step for which `made` has a folder keeps that, whatever number it would have in this pipeline: others name the folder.
    """
    made = made or {}
    taken = set(made.values())
    steps: list[Step] = []
    latest: dict[str, Step] = {}
    for number_of_round in range(1, pipeline.rounds + 1):
        for name, stage in pipeline.stages.items():
            if stage.once and number_of_round > 1:
                continue
            section = _seeded(stage.section, pipeline.seed, number_of_round - 1)
            folder = made.get((name, number_of_round)) or _free_folder(len(steps) + 1, name, taken)
            taken.add(folder)
            step = Step(
                round=number_of_round,
                name=name,
                kind=stage.kind,
                folder=out / folder,
                section=section,
                bound=_bind(section, latest),
                where=pipeline.where(("stages", name, stage.kind)),
            )
            steps.append(step)
            latest[name] = step
    return steps


def _free_folder(number: int, name: str, taken: set[str]) -> str:
    """NUMBER-NAME by the first number from this one on that is not taken."""
    return next(folder for one in count(number) if (folder := f"{one}-{name}") not in taken)


def _seeded(section: Any, seed: int, more: int) -> Any:
    own = section.seed if "seed" in section.model_fields_set else seed
    return section.model_copy(update={"seed": own + more})


def _bind(section: Any, latest: dict[str, Step]) -> dict[str, str | Step]:
    bound: dict[str, str | Step] = {}
    for _, text in texts_in(section):
        found = reference_in(text)
        if found is not None:
            bound[text] = _target(found, latest)
    return bound


def _target(found: Reference, latest: dict[str, Step]) -> str | Step:
    if found.stage in latest:
        return latest[found.stage]
    instead = reference_in(found.first)
    return _target(instead, latest) if instead else str(found.first)


def find_step(steps: list[Step], word: str, flag: str) -> int:
    """The index of a step by its name, or where there are rounds by its folder. Raises `ConfigError`."""
    found = [index for index, step in enumerate(steps) if word in (step.name, step.folder.name)]
    if len(found) == 1:
        return found[0]
    if found:
        folders = ", ".join(steps[index].folder.name for index in found)
        raise ConfigError(f"{flag} {word}: there is one in each round; name {folders}")
    names = list(dict.fromkeys(step.name for step in steps))
    raise ConfigError(f"{flag} {word}: no such stage{nearest(word, names)}; stages: {', '.join(names)}")


def base_model(step: Step) -> str:
    """The model that training begins with, through all steps before: it can stand for one that is not there yet."""
    model = step.section.model
    target = step.bound.get(model, model)
    return base_model(target) if isinstance(target, Step) else str(target)
