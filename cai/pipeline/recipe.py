"""The recipe of a pipeline: named stages in order, each what `cai generate` or `cai train` is told.

name: demo
stages:
  data: {generate: {constitution: concise-and-clear, prompts: {source: benign, limit: 24}}}
  sft: {sft: {model: smollm2-135m, data: "@data", lora: true}}
  dpo: {dpo: {model: "@sft", data: "@data", lora: true, trl: {max_steps: 20}}}

`"@data"` is what the stage `data` made. With `rounds: 3` all stages run three times, and `"@dpo or smollm2-135m"` is the
model of the round before, in the first round the one that is named after it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from pydantic import Field, PositiveInt, PrivateAttr, field_validator, model_validator
from pydantic_core import PydanticCustomError

from cai.config import Recipe
from cai.documents import Document, Loc, Part, Text, dump, show
from cai.errors import ConfigError, nearest
from cai.recipes import beside, find_recipe, resolve_paths
from cai.training import (
    CpoSettings,
    DpoSettings,
    GrpoSettings,
    KtoSettings,
    OnlineDpoSettings,
    OrpoSettings,
    PpoSettings,
    RewardSettings,
    RlooSettings,
    SftSettings,
    StageName,
    TrainSettings,
)

Kind = Literal["generate"] | StageName
Settings = Recipe | TrainSettings
_NAME = re.compile(r"[A-Za-z0-9][\w-]*")
_REFERENCE = re.compile(r"(?P<scheme>vllm:)?@(?P<stage>[\w-]+)(?: or (?P<first>\S.*))?")


class Reference(NamedTuple):
    """What `vllm:@dpo or smollm2-135m` says."""

    scheme: str
    stage: str
    first: str | None
    """What stands in its place in the first round."""


def reference_in(text: Any) -> Reference | None:
    """The reference that a value of a stage is; None for any other value. Raises `ValueError` for one that is none."""
    if not isinstance(text, str) or not text.startswith(("@", "vllm:@")):
        return None
    found = _REFERENCE.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r}: expected '@STAGE', or '@STAGE or MODEL' in rounds")
    return Reference(found["scheme"] or "", found["stage"], found["first"])


class Stage(Part):
    """One stage: exactly one of these sections."""

    generate: Recipe | None = None
    """A dataset from a constitution and prompts; the keys of `cai recipe keys`."""
    sft: SftSettings | None = None
    """Supervised fine-tuning."""
    reward: RewardSettings | None = None
    """A reward model."""
    dpo: DpoSettings | None = None
    """Direct preference optimisation."""
    kto: KtoSettings | None = None
    """KTO on single completions."""
    orpo: OrpoSettings | None = None
    """ORPO."""
    cpo: CpoSettings | None = None
    """CPO or SimPO."""
    ppo: PpoSettings | None = None
    """PPO on prompts."""
    rloo: RlooSettings | None = None
    """REINFORCE leave-one-out on prompts."""
    grpo: GrpoSettings | None = None
    """GRPO on prompts."""
    online_dpo: OnlineDpoSettings | None = Field(default=None, alias="online-dpo")
    """DPO on pairs that the policy writes."""
    once: bool = False
    """Whether it runs in the first round only."""

    @model_validator(mode="after")
    def _one_kind(self) -> Stage:
        if len(self._given) != 1:
            kinds = ", ".join(field.alias or name for name, field in type(self).model_fields.items() if name != "once")
            raise ValueError(f"expected exactly one of {kinds}, found {' and '.join(self._given) or 'none'}")
        return self

    @property
    def _given(self) -> dict[str, Any]:
        """The sections by the names that they have in a recipe."""
        fields = type(self).model_fields
        found = {field.alias or name: getattr(self, name) for name, field in fields.items() if name != "once"}
        return {name: section for name, section in found.items() if section is not None}

    @property
    def kind(self) -> Kind:
        """What it does."""
        return cast(Kind, next(iter(self._given)))

    @property
    def section(self) -> Any:
        """Its settings."""
        return self._given[self.kind]


class Pipeline(Part):
    """All of it."""

    name: Text
    """What the pipeline is called; its default folder is `runs/NAME-pipeline`."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """The seed of every stage that has none of its own; each round adds one."""
    rounds: PositiveInt = 1
    """How often the stages run, each round going on from the one before."""
    stages: dict[Text, Stage] = Field(min_length=1)
    """By name, in the order in which they run."""

    _where: Callable[[Loc], str] | None = PrivateAttr(default=None)

    @field_validator("name")
    @classmethod
    def _a_word(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("expected letters, digits, - and _: it names a folder")
        return value

    @model_validator(mode="after")
    def _names_and_references(self) -> Pipeline:
        for name, stage in self.stages.items():
            if not _NAME.fullmatch(name):
                raise _wrong(("stages", name), "expected letters, digits, - and _ in the name of a stage")
            for loc, text in texts_in(stage.section):
                if problem := self._problem(name, loc, text):
                    raise _wrong(("stages", name, stage.kind, *loc), problem)
        return self

    def _problem(self, name: str, loc: Loc, text: str) -> str | None:
        """What is wrong with a text of the stage `name`, where it is a reference."""
        try:
            found = reference_in(text)
        except ValueError as exc:
            return str(exc)
        if found is None:
            return None
        names = list(self.stages)
        earlier = names[: names.index(name)]
        if found.stage in earlier:
            unneeded = f"'@{found.stage}' is always there before '{name}' runs; remove ' or {found.first}'"
            return unneeded if found.first else self._unfit(name, loc, found.stage)
        if found.stage in names and self.rounds > 1 and not self.stages[name].once:
            if found.first is None:
                return f"in the first round there is no '@{found.stage}' yet; write '{text} or MODEL'"
            return self._unfit(name, loc, found.stage) or self._problem(name, loc, found.first)
        return f"'@{found.stage}' {_no_stage(found.stage, name, names)}; {_earlier(earlier)}{nearest(found.stage, earlier)}"

    def _unfit(self, name: str, loc: Loc, target: str) -> str | None:
        """Why what the stage `target` makes cannot stand there."""
        kind, key = self.stages[target].kind, _last_key(loc)
        rewards = loc[0] in ("reward", "gold", "critic") and "judge" not in loc
        if key == "source" and kind != "generate":
            return f"'@{target}' is a trained model, and rows are read here; name a stage that generates"
        if key != "source" and kind == "generate":
            return f"'@{target}' is a dataset, and a model is needed here; name a stage that trains"
        if rewards:
            wanted = f"'@{target}' gives no reward, and a reward model is needed here; name a stage of the kind reward"
            return None if kind == "reward" and key in ("model", "critic") else wanted
        lora = getattr(self.stages[target].section, "lora", None)
        if (
            key in ("model", "reference")
            and lora
            and not lora.merge
            and "judge" not in loc
            and not {kind, self.stages[name].kind} & {"reward", "generate"}
        ):
            return f"'@{target}' saves adapters alone, which no training begins with; set lora.merge of '{target}' to true"
        judging = loc[0] == "judge" or self.stages[name].kind == "reward"
        if key in ("model", "reference") and kind == "reward" and not judging:
            return f"'@{target}' is a reward model, which answers nothing; name another stage, or use it as a judge's model"
        return None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pipeline) and self.model_dump() == other.model_dump()

    __hash__ = Part.__hash__

    def where(self, loc: Loc) -> str:
        """File and line of a key and its name, for an error."""
        return f"{self._where(loc)}: {show(loc)}" if self._where else show(loc)

    def to_yaml(self) -> str:
        """What was given, as YAML."""
        return dump(self.model_dump(mode="json", exclude_unset=True, by_alias=True))


def _wrong(loc: Loc, problem: str) -> PydanticCustomError:
    return PydanticCustomError("value_error", "{problem}", {"problem": problem, "at": loc})


def _no_stage(target: str, name: str, names: list[str]) -> str:
    if target == name:
        return "is this very stage"
    return "comes later" if target in names else "is no stage"


def _earlier(names: list[str]) -> str:
    return f"stages before it: {', '.join(f'@{one}' for one in names)}" if names else "there is no stage before it"


def _last_key(loc: Loc) -> str:
    return next((part for part in reversed(loc) if isinstance(part, str)), "")


def texts_in(section: Any) -> Iterator[tuple[Loc, str]]:
    """Every text of a stage's settings, and where it stands."""
    yield from _walk(section.model_dump(mode="json", exclude_unset=True), ())


def _walk(value: Any, loc: Loc) -> Iterator[tuple[Loc, str]]:
    if isinstance(value, str):
        yield loc, value
    elif isinstance(value, Mapping):
        for key, below in value.items():
            yield from _walk(below, (*loc, str(key)))
    elif isinstance(value, list | tuple):
        for index, below in enumerate(value):
            yield from _walk(below, (*loc, index))


def replaced(value: Any, change: Callable[[str], str]) -> Any:
    """Plain data with every text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: replaced(below, change) for key, below in value.items()}
    return [replaced(below, change) for below in value] if isinstance(value, list) else value


def load_pipeline(name: str | Path, overrides: list[tuple[str, object, str]] | None = None) -> Pipeline:
    """A pipeline from a file or by built-in name, with what `--set` assigns on top.

    `overrides` are (dotted key, value, the flag they came from). Raises `ConfigError` naming file, line, key and fix.
    Constitutions, prompts and data that are named by a path are looked for beside the file first.
    """
    path = find_recipe(name)
    document = Document.read(path)
    if "stages" not in document.data:
        raise ConfigError(
            f"{path}: 'stages' is missing, so it is no pipeline; a recipe of one dataset runs by: cai generate --recipe {name}"
        )
    _resolve_paths(document.data, path.parent)
    for dotted, value, source in overrides or ():
        _check_stage(document, dotted, source)
        document.override(dotted, value, source)
    pipeline = document.validate(Pipeline)
    pipeline._where = document.where
    return pipeline


def _resolve_paths(data: dict[str, Any], folder: Path) -> None:
    stages = data["stages"]
    for stage in stages.values() if isinstance(stages, dict) else ():
        for kind, section in stage.items() if isinstance(stage, dict) else ():
            if kind == "generate":
                resolve_paths(section, folder)
            elif isinstance(section, dict):
                beside(section, folder, "data")
                for source in _listed(section.get("data")):
                    beside(source, folder, "source")
                for key in ("reward", "gold"):
                    if key in section:
                        section[key] = _reward_beside(section[key], folder)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _reward_beside(value: Any, folder: Path) -> Any:
    """A reward, or several, with what is a file beside the recipe (a constitution, a function's) written out."""
    if isinstance(value, list):
        return [_reward_beside(one, folder) for one in value]
    if isinstance(value, dict):
        files = {key: _reward_beside(value[key], folder) for key in ("constitution", "function") if key in value}
        return {**value, **files}
    place, colon, name = value.rpartition(":") if isinstance(value, str) and ".py:" in value else (value, "", "")
    return f"{folder / place}{colon}{name}" if isinstance(place, str) and os.path.isfile(folder / place) else value


def _check_stage(document: Document, dotted: str, source: str) -> None:
    """A flag adds no stage by a slip of the pen."""
    first, *rest = dotted.split(".")
    stages = document.data["stages"]
    if first == "stages" and rest and isinstance(stages, dict) and rest[0] not in stages:
        raise ConfigError(f"{source}: no stage '{rest[0]}'{nearest(rest[0], stages)}; stages: {', '.join(stages)}")
