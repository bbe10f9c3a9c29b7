"""The reward models of one training, one after the other; then what makes one reward of them, and what that is worth.

OUT/                         one member: a sequence classifier
OUT/members/0, 1, ...        several: classifiers, or adapters of one base
OUT/checkpoints/member-0 ... where each of several goes on
OUT/reward.json              how their outputs become one reward
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset

from cai.errors import ConfigError, Interrupted
from cai.models import ALIASES
from cai.rewards.dialogues import DialogueTokenizer
from cai.rewards.model import RewardModel
from cai.rewards.spec import SPEC, MemberSpec, RewardSpec
from cai.seeds import derive_seed
from cai.store import write_whole
from cai.training.arguments import effective, make_arguments
from cai.training.data import StageData
from cai.training.failing import failures, refusals
from cai.training.folder import TrainFolder
from cai.training.loading import context_of, find_model, load_tokenizer
from cai.training.measuring import finish
from cai.training.objectives import label_pairs
from cai.training.preparing import LeftOut, are_written, read_rows, write_rows
from cai.training.running import fit
from cai.training.saving import save_model
from cai.training.settings import RewardSettings
from cai.training.stage import Outcome, Parts, build_trainer
from cai.training.watching import SAVING, Show, Watch

_SIDES = ("chosen", "rejected")
_DONE = "done.json"
"""In a member's folder: how many steps it took and its last loss."""


@dataclass(frozen=True)
class _Member:
    """One reward model to train: its settings, and where it and its checkpoints go."""

    index: int
    settings: RewardSettings
    path: Path
    name: str

    @property
    def done(self) -> dict[str, Any] | None:
        """What is kept of it, where it was trained to its end."""
        file = self.path / _DONE
        return json.loads(file.read_bytes()) if self.name and file.is_file() else None


def train_members(settings: RewardSettings, data: StageData, folder: TrainFolder, watch: Watch, show: Show) -> Outcome:
    """Train what is not trained yet; then the first process writes reward.json and measures, and the others tell nothing.

    Raises as `running.train` does.
    """
    members, processes = list(_members(settings, folder.path)), PartialState()
    arguments = make_arguments("reward", settings, folder.checkpoints, context=context_of(settings))
    with failures(folder, arguments, settings.lora is not None):
        tokenizers = {
            one.settings.model: DialogueTokenizer(load_tokenizer(one.settings), one.settings.model) for one in members
        }
        show.note("preparing the rows")
        if processes.is_main_process and not are_written(folder.rows):
            write_rows(*_prepare(settings, data, tokenizers), folder.rows)
        processes.wait_for_everyone()
        data, left_out = read_rows(data, folder.rows)
        done = [one.done or _train(one, data, list(tokenizers.values()), folder, watch, show) for one in members]
        if not processes.is_main_process:
            return Outcome(0, {}, left_out, effective(arguments))
        show.note("measuring on held-out rows" if data.test else "measuring on rows that it was trained on")
        with watch.on_signals(SAVING):
            spec, measures = finish(RewardModel.open(_spec(members, settings), folder.path), settings, data)
            folder.write(SPEC, json.dumps(spec.model_dump(mode="json"), indent=2) + "\n")
    losses = {f"loss{one.name and '/'}{one.name}": told["loss"] for one, told in zip(members, done, strict=True)}
    known = {name: loss for name, loss in losses.items() if loss is not None}
    known = {"loss": fmean(known.values()), **known} if known else {}
    return Outcome(sum(one["steps"] for one in done), known | measures, left_out, effective(arguments))


def _members(settings: RewardSettings, path: Path) -> Iterator[_Member]:
    """One trains into the folder itself; each of several into its own, by its own seed, as adapters where there are any."""
    if settings.members == 1:
        yield _Member(0, settings.model_copy(update={"model": (*settings.bases, settings.model)[0]}), path, "")
        return
    lora = settings.lora and settings.lora.model_copy(update={"merge": False})
    for index in range(settings.members):
        model = settings.bases[index] if settings.bases else settings.model
        seed = derive_seed(settings.seed, "member", index) % 2**32
        own = settings.model_copy(update={"model": model, "seed": seed, "lora": lora})
        yield _Member(index, own, path / "members" / str(index), f"member-{index}")


def _prepare(settings: RewardSettings, data: StageData, tokenizers: dict[str, DialogueTokenizer]) -> tuple[StageData, LeftOut]:
    """The rows with labels, and tokens by each model's tokenizer; what has no label, or is too long for one of them."""
    longest = [_longest(settings.model_copy(update={"model": name})) for name in tokenizers]
    kept, too_long, unlabelled = {}, {}, {}
    for split, rows in (("train", data.train), ("test", data.test)):
        if rows is None:
            continue
        labelled = label_pairs(rows, settings)
        kept[split] = tokenized(labelled, list(tokenizers.values()), longest)
        unlabelled[split], too_long[split] = len(rows) - len(labelled), len(labelled) - len(kept[split])
    if not len(kept["train"]):
        found = f"all {len(data.train)} rows are longer than {min(filter(None, longest))} tokens"
        raise ConfigError(f"{found}; raise trl.max_length, or use shorter rows")
    left_out = LeftOut(*({split: count for split, count in one.items() if count} for one in (too_long, unlabelled)))
    return StageData(kept["train"], kept.get("test") or None, data.sources), left_out


def _longest(settings: RewardSettings) -> int | None:
    """The most tokens of a dialogue that the model is trained on. Raises `ConfigError` for a limit beyond its context."""
    context = context_of(settings)
    limit: int | None = make_arguments("reward", settings, Path(), context=context).max_length
    return limit or context


def tokenized(rows: Dataset, tokenizers: Sequence[DialogueTokenizer], longest: Sequence[int | None]) -> Dataset:
    """The rows with columns `chosen_ids-N` and `rejected_ids-N` by tokenizer N, less those longer than that one may be."""

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        return {
            f"{side}_ids-{place}": one.encode([*row["prompt"], *row[side]])
            for place, one in enumerate(tokenizers)
            for side in _SIDES
        }

    def fits(row: dict[str, Any]) -> bool:
        return all(
            limit is None or len(row[f"{side}_ids-{place}"]) <= limit for place, limit in enumerate(longest) for side in _SIDES
        )

    return rows.map(encode, desc="tokens").filter(fits, desc="lengths")


def _train(
    member: _Member,
    data: StageData,
    tokenizers: Sequence[DialogueTokenizer],
    folder: TrainFolder,
    watch: Watch,
    show: Show,
) -> dict[str, Any]:
    """Train a member to its end and save it."""
    settings = member.settings
    (place,) = (place for place, one in enumerate(tokenizers) if one.model == settings.model)
    arguments = make_arguments(
        "reward", settings, folder.checkpoints / member.name, data.test is not None, context_of(settings)
    )
    show.note(f"loading {Path(settings.model).name}{member.name and ' for '}{member.name}")
    parts = Parts(settings, _own_rows(data, place, settings), tokenizers[place].tokenizer, arguments, (watch,))
    with refusals("reward"):
        trainer = build_trainer("reward", parts)
    fit(trainer, watch, folder.checkpoints / member.name, show)
    done = {"steps": trainer.state.global_step, "loss": _last_loss(trainer)}
    with watch.on_signals(SAVING):
        _save(member, trainer, done, folder)
    if watch.stopping and member.name:
        raise Interrupted(f"stopped after {member.name}; the same command continues")
    del trainer
    gc.collect()
    torch.cuda.empty_cache()
    return done


def _own_rows(data: StageData, place: int, settings: RewardSettings) -> StageData:
    """The rows with the tokens of the tokenizer in that place; of several members each has a draw of its own."""
    names = {f"{side}_ids-{place}": f"{side}_ids" for side in _SIDES}
    train, test = data.train.rename_columns(names), data.test and data.test.rename_columns(names)
    if settings.members > 1:
        train = train.shuffle(seed=settings.seed).select(range(max(1, round(settings.member_share * len(train)))))
    return StageData(train, test, data.sources)


def _last_loss(trainer: Any) -> float | None:
    return next((line["loss"] for line in reversed(trainer.state.log_history) if "loss" in line), None)


def _save(member: _Member, trainer: Any, done: dict[str, Any], folder: TrainFolder) -> None:
    """One of several is written beside its place and moved there whole, so that what is there is finished, and its
    checkpoints are deleted. All processes call this.
    """
    if not member.name:
        save_model(trainer, member.settings, member.path)
        return
    part, processes = member.path.with_name(f".{member.path.name}.part"), PartialState()
    if processes.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    processes.wait_for_everyone()
    save_model(trainer, member.settings, part)
    if processes.is_main_process:
        write_whole(part / _DONE, json.dumps(done) + "\n")
        part.rename(member.path)
        shutil.rmtree(folder.checkpoints / member.name, ignore_errors=True)
    processes.wait_for_everyone()


def _spec(members: Sequence[_Member], settings: RewardSettings) -> RewardSpec:
    """What makes one reward of the members, not normalised yet."""
    outputs = len(settings.heads)
    return RewardSpec(
        members=tuple(_member_spec(one, outputs) for one in members),
        objectives=settings.objectives or {"reward": 1.0},
        combine=settings.combine,
        variance_weight=settings.variance_weight,
    )


def _member_spec(member: _Member, outputs: int) -> MemberSpec:
    whole = MemberSpec(
        folder=f"members/{member.index}" if member.name else ".", mean=(0.0,) * outputs, deviation=(1.0,) * outputs
    )
    settings = member.settings
    if settings.lora is None or settings.lora.merge:
        return whole
    place = find_model(settings)
    base = settings.model if settings.model in ALIASES else place.source
    return whole.model_copy(update={"base": base, "revision": place.revision, "version": place.version})
