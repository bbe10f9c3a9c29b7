"""The rollouts of a training as rewards see them, whatever trainer writes them, and the lines that tell of each.

{"step": 12, "completions": 64, "words": 41.2, "distinct_2": 0.71, "reward": 0.4, "rewards": {"brief": 0.4},
 "unscored": {"brief": 0}, "kl": 3.1, ...}
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

from accelerate.utils import gather_object

from cai.errors import EngineError
from cai.training.online.monitors import describe
from cai.training.online.rewards import Dialogue, Rewards

SHOWN = 8
"""Answers that are written into run/samples.jsonl each time."""
_ENOUGH = 32
"""Completions that have to be worth the same before that is told of a reward."""
_LOGGED = {
    "unfinished": ("completions/clipped_ratio",),
    "tokens": ("completions/mean_length",),
    "entropy": ("entropy",),
}
"""What a line has of the trainer's own measures, and their names there."""


class Rollout(NamedTuple):
    """Completions, the last words of their prompts, of each reward what each was worth, and the identities of the prompts."""

    prompts: list[str]
    texts: list[str]
    rewards: list[Rewards]
    dialogues: list[str]


class Rollouts:
    """Collects what rewards are told between two steps, in this process."""

    def __init__(self, names: Sequence[str], weights: Sequence[float]) -> None:
        self.names, self.weights = list(names), list(weights)
        self._clear()
        self._values: list[set[float]] = [set() for _ in names]
        self._seen = 0
        self._told_constant: set[int] = set()
        self._told_flat = False

    def _clear(self) -> None:
        self._prompts: list[str] = []
        self._dialogues: list[str] = []
        self._texts: list[str] = []
        self._rewards: list[Rewards] = [[] for _ in self.names]

    def add(self, place: int, prompts: Sequence[Dialogue], texts: Sequence[str], rewards: Rewards) -> None:
        """What the reward at `place` says of completions; all rewards are asked about the same ones."""
        if place == 0:
            self._prompts += [one[-1]["content"] for one in prompts]
            self._dialogues += map(identity, prompts)
            self._texts += texts
        self._rewards[place] += rewards

    def take(self) -> Rollout | None:
        """What was collected since, in all processes, which call this together; None where that is nothing."""
        if not self._texts:
            return None
        mine = Rollout(self._prompts, self._texts, self._rewards, self._dialogues)
        self._clear()
        parts: list[Rollout] = gather_object([mine])
        rewards = [[value for part in parts for value in part.rewards[place]] for place in range(len(self.names))]
        prompts, texts, _, dialogues = (list(chain.from_iterable(field)) for field in zip(*parts, strict=True))
        return Rollout(prompts, texts, rewards, dialogues)

    def line(self, step: int, rollout: Rollout, logged: dict[str, float]) -> dict[str, Any]:
        """What is written of a rollout."""
        said = {
            name: math.fsum(known) / len(known)
            for name, given in zip(self.names, rollout.rewards, strict=True)
            if (known := [one for one in given if one is not None])
        }
        none = {name: sum(one is None for one in given) for name, given in zip(self.names, rollout.rewards, strict=True)}
        described = describe(rollout.prompts, rollout.texts, weighted(rollout.rewards, self.weights), rollout.dialogues)
        return {"step": step, **described, "rewards": said, "unscored": none, **logged}

    def samples(self, step: int, rollout: Rollout) -> list[dict[str, Any]]:
        """A few of its completions, as they are shown."""
        proxies = weighted(rollout.rewards, self.weights)
        shown = zip(rollout.prompts, rollout.dialogues, rollout.texts, proxies, strict=True)
        return [sample(step, *one) for one in islice(shown, SHOWN)]

    def check(self, rollout: Rollout) -> None:
        """Raises `EngineError` where no completion has a number from any reward with a weight."""
        if all(one is None for one in weighted(rollout.rewards, self.weights)):
            named = f"{'rewards' if self.names[1:] else 'reward'} {', '.join(map(repr, self.names))}"
            raise EngineError(
                f"{named}: no number for any of {len(rollout.texts)} completions, so nothing can be learned; a completion "
                "without a number is left out, and where all are the reward does not apply to these prompts: look at what it "
                "returns None for, or give other prompts"
            )

    def constant(self, step: int, rollout: Rollout) -> list[str]:
        """A line for the first rollout whose completions are all worth the same, and one for each of several rewards that has
        been the same for every completion so far."""
        self._seen += len(rollout.texts)
        flat = [] if self._told_flat else self._flat(step, rollout)
        self._told_flat = self._told_flat or bool(flat)
        if self._told_flat and not self.names[1:]:
            return flat
        for values, given in zip(self._values, rollout.rewards, strict=True):
            if len(values) < 2:
                values |= {one for one in given if one is not None}
        if self._seen < _ENOUGH:
            return flat
        found = [place for place, one in enumerate(self._values) if len(one) < 2 and place not in self._told_constant]
        self._told_constant |= set(found)
        return [*flat, *(self._says(place) for place in found)]

    def _flat(self, step: int, rollout: Rollout) -> list[str]:
        known = [one for one in weighted(rollout.rewards, self.weights) if one is not None]
        if len(known) < 2 or len(set(known)) > 1:
            return []
        return [
            f"all {len(known)} completions of the rollout at step {step} have the same reward ({known[0]:g}): nothing can be "
            "learned from it; look at what is measured"
        ]

    def _says(self, place: int) -> str:
        name, values = self.names[place], self._values[place]
        if not values:
            return f"reward '{name}' has no number for any of {self._seen} completions so far: nothing can be learned from it"
        return (
            f"reward '{name}' is the same ({min(values):g}) for all {self._seen} completions so far: nothing can be learned "
            "from it; look at what it measures, and at completions in run/samples.jsonl"
        )


def identity(dialogue: Dialogue) -> str:
    """The same for dialogues that are the same, in all processes: many end with the same words."""
    return hashlib.blake2b(repr(dialogue).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def sample(step: int, prompt: str, dialogue: str, text: str, proxy: float | None, gold: float | None = None) -> dict[str, Any]:
    """A line of run/samples.jsonl: `prompt` is the last message of the dialogue with this `identity`."""
    return {"step": step, "prompt": prompt, "dialogue": dialogue, "completion": text, "proxy": proxy, "gold": gold}


def weighted(rewards: Sequence[Rewards], weights: Sequence[float]) -> Rewards:
    """The weighted sum of what several rewards say of each completion, of those that say something; what has weight 0 says
    nothing, and is only logged."""
    sums: Rewards = []
    for said in zip(*rewards, strict=True):
        known = [weight * one for weight, one in zip(weights, said, strict=True) if weight and one is not None]
        sums.append(math.fsum(known) if known else None)
    return sums


class Logged:
    """What a trainer has measured since the last time that was asked, out of what it will log."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._read: dict[str, int] = {}

    def forget(self) -> None:
        """The trainer has logged, and begins anew."""
        self._read.clear()

    def take(self) -> dict[str, float]:
        """`unfinished` (share without an end), `tokens` a completion, `entropy` in nats a token, `kl` in nats a completion;
        without unknown ones."""
        store = self._trainer._metrics["train"] if hasattr(self._trainer, "_metrics") else self._trainer.stats
        found = {name: self._mean(store, keys) for name, keys in _LOGGED.items()}
        if (ended := self._mean(store, ("val/contain_eos_token",))) is not None:
            found["unfinished"] = 1 - ended
        found["kl"] = self._kl(store, found["tokens"])
        return {name: value for name, value in found.items() if value is not None}

    def _kl(self, store: Any, tokens: float | None) -> float | None:
        """PPO tells it. TRL's GRPO and RLOO tell that of a token; online DPO a sum over padding too, but also beta times the
        log-ratios of both completions without it."""
        if "rewards/chosen" in store:
            chosen, rejected, beta = (self._mean(store, (name,)) for name in ("rewards/chosen", "rewards/rejected", "beta"))
            return (chosen + rejected) / (2 * beta) if beta and chosen is not None and rejected is not None else None
        whole, of_token = self._mean(store, ("objective/kl",)), self._mean(store, ("kl",))
        if whole is not None:
            return whole
        return None if of_token is None or tokens is None else of_token * tokens

    def _mean(self, store: Any, names: Sequence[str]) -> float | None:
        for name in names:
            values = store.get(name) or []
            new = [one for one in values[self._read.get(name, 0) :] if not math.isnan(one)]
            self._read[name] = len(values)
            if new:
                return math.fsum(new) / len(new)
        return None
