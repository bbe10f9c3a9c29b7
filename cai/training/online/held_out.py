"""Prompts that are kept from training, and answers to them, asked for without a trace in the training."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import set_seed

from cai.errors import ConfigError
from cai.training.data import StageData
from cai.training.online.distance import log_ratios
from cai.training.online.rewards import Reward
from cai.training.reading import Row

_LARGEST_SHARE = 5
"""At most one in so many training prompts is kept from training."""


class HeldOut(NamedTuple):
    """The prompts to train on, and those that are only answered."""

    train: Dataset
    prompts: Dataset


class Answer(NamedTuple):
    """An answer to the held-out prompt of that number; what each reward says of it, and the gold measure; its log-ratio of
    policy and reference in nats."""

    number: int
    text: str
    rewards: list[float | None]
    gold: float | None
    log_ratio: float | None = None


def hold_out(data: StageData, count: int, seed: int) -> HeldOut:
    """Up to `count` different prompts: of the test rows those that are not trained on too; without such, a draw of the
    training prompts, with all rows that have them taken from training. Raises `ConfigError` where there is one prompt alone.
    """
    train = [repr(one) for one in data.train["prompt"]]
    trained = set(train)
    draw = random.Random(f"{seed} held-out prompts")
    if data.test is not None:
        places = {repr(one): place for place, one in enumerate(data.test["prompt"])}
        if apart := [place for key, place in places.items() if key not in trained]:
            return HeldOut(data.train, data.test.select(sorted(draw.sample(apart, min(count, len(apart))))))
    different = list(dict.fromkeys(train))
    if len(different) < 2:
        raise ConfigError("gold: needs prompts that are not trained on, and data has one prompt alone; add more")
    taken = set(draw.sample(different, min(count, max(1, len(different) // _LARGEST_SHARE))))
    first = {key: place for place, key in reversed(list(enumerate(train))) if key in taken}
    rest = [place for place, key in enumerate(train) if key not in taken]
    return HeldOut(data.train.select(rest), data.train.select(sorted(first.values())))


def tell_sources(data: StageData, held: HeldOut, change: Callable[[Row], Row] = dict) -> tuple[Row, ...]:
    """What is told of the sources of `data`, whose rows lie one source after another: with the prompts that `hold_out` took
    from training among the held-out ones. A prompt of several sources is counted as held out of the first. `change` makes of
    a row of `data` what was held out of."""
    taken, known, told = {repr(one) for one in held.prompts["prompt"]}, set[str](), []
    rows = iter(data.train.select_columns(["prompt"]))
    for source in data.sources:
        prompts = (repr(change(row)["prompt"]) for row in islice(rows, source["train"]))
        here = [one for one in prompts if one in taken]
        new = set(here) - known
        known |= new
        told.append({**source, "train": source["train"] - len(here), "test": source["test"] + len(new)})
    return tuple(told)


def check_enough(prompts: int, arguments: Any, given: Mapping[str, Any]) -> None:
    """Raises `ConfigError` where there are fewer prompts to train on than one rollout takes: TRL leaves an incomplete one out,
    but for online DPO, which takes what there is. `given` is what stands under `trl:`."""
    if not hasattr(arguments, "generation_batch_size"):
        return
    groups = arguments.num_generations
    needed = arguments.generation_batch_size // groups
    if prompts >= needed:
        return
    many = "1 prompt is" if prompts == 1 else f"{prompts} prompts are"
    factors = _factors(arguments, given)
    made = " x ".join(f"{name} {count}" for name, count in factors.items())
    of_groups = f", divided by trl.num_generations {groups}" if groups > 1 else ""
    raise ConfigError(
        f"data: {many} left to train on, and a rollout takes {needed} ({made}{of_groups}): add prompts, or lower "
        f"{next(iter(factors))}"
    )


def _factors(arguments: Any, given: Mapping[str, Any]) -> dict[str, int]:
    """What makes the completions of a rollout as many as they are, without what is 1."""
    if given.get("generation_batch_size"):
        return {"trl.generation_batch_size": arguments.generation_batch_size}
    steps = "steps_per_generation" if given.get("steps_per_generation") else "gradient_accumulation_steps"
    factors = {
        "trl.per_device_train_batch_size": arguments.per_device_train_batch_size,
        f"trl.{steps}": arguments.steps_per_generation,
        "processes": arguments.world_size,
    }
    return {name: count for name, count in factors.items() if count > 1}


def answer(trainer: Any, prompts: Dataset, rewards: Sequence[Reward], gold: Reward, seed: int) -> list[Answer]:
    """An answer to each prompt, sampled as the training samples, in the order of the prompts. All processes call this, each of
    them answers its part, and all get all answers. The same weights and seed give the same answers, but for vLLM's.
    """
    processes, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    shared = -(-len(prompts) // processes)
    mine = [min(place, len(prompts) - 1) for place in range(rank * shared, (rank + 1) * shared)]
    size, found = _together(trainer), []
    with _undisturbed(trainer, seed):
        for start in range(0, shared, size):
            numbers = mine[start : start + size]
            rows = prompts.select(numbers)
            asked = list(rows["prompt"])
            before, ids, answers = _generate(trainer, asked)
            ratios: Sequence[float | None] = log_ratios(trainer, before, ids) or [None] * len(ids)
            given = {"completion_ids": ids, "columns": list(rows["columns"]), "trainer_state": trainer.state}
            said = [reward(asked, answers, **given) for reward in (*rewards, gold)]
            for number, one, ratio, *values, honest in zip(numbers, answers, ratios, *said, strict=True):
                found.append(Answer(number, one[-1]["content"], values, honest, ratio))
    return list({one.number: one for one in gather_object(found)}.values())


def _together(trainer: Any) -> int:
    """How many prompts are answered at once: as many completions as the training writes at once."""
    return int(trainer.args.per_device_train_batch_size * getattr(trainer.args, "steps_per_generation", 1))


class _Made(NamedTuple):
    """Tokens of prompts and of one completion of each, and the turns of these."""

    before: list[list[int]]
    ids: list[list[int]]
    turns: list[Any]


def _generate(trainer: Any, prompts: list[Any]) -> _Made:
    if not hasattr(trainer, "num_generations_eval"):
        return _generate_of_pairs(trainer, prompts)
    usual, trainer.num_generations_eval = trainer.num_generations_eval, 1
    try:
        made = trainer._generate(prompts)
    finally:
        trainer.num_generations_eval = usual
        trainer._metrics["eval"].clear()
    return _Made(made[0], made[1], made[2] if len(made) == 3 else made[3])  # of RLOO three values, of GRPO eight


def _generate_of_pairs(trainer: Any, prompts: list[Any]) -> _Made:
    """By online DPO, which writes two completions of each prompt, the first ones of all before the second ones."""
    made = trainer._generate_vllm(prompts) if trainer.args.use_vllm else trainer._generate(trainer.model_wrapped, prompts)
    tokens = [one[: len(prompts)] for one in made[:4]]
    before, after = (
        [one[of.bool()].tolist() for one, of in zip(ids, mask, strict=True)] for ids, mask in (tokens[:2], tokens[2:])
    )
    texts = trainer.processing_class.batch_decode(after, skip_special_tokens=True)
    return _Made(before, after, [[{"role": "assistant", "content": text}] for text in texts])


@contextmanager
def _undisturbed(trainer: Any, seed: int) -> Iterator[None]:
    """With the model in evaluation mode and random numbers of their own; afterwards all is as it was before."""
    modes = [(module, module.training) for module in trainer.model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        set_seed(seed + trainer.accelerator.process_index)
        trainer.model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            random.setstate(python)
            np.random.set_state(numpy)
