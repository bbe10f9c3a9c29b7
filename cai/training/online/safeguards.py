"""What keeps an online training honest: it watches rollouts, measures the policy by a judge that is not trained on, keeps the
best one, and stops where the training goes astray. One line is told each time it acts.

run/rollouts.jsonl    a line for each rollout          run/gold.jsonl       a line for each gold measure
run/stopped.json      what stopped the training        run/samples.jsonl    answers to a few held-out prompts, each time;
                                                                            without gold, of rollouts
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from cai.errors import EngineError
from cai.report.written import best_of, read_lines, unscored
from cai.store import write_whole
from cai.training.folder import PAGE
from cai.training.online import gold as golden
from cai.training.online import lines
from cai.training.online.best import Best
from cai.training.online.drift import Drift
from cai.training.online.held_out import HeldOut, answer, check_enough, hold_out
from cai.training.online.limits import check_kl, collapsed, over_kl
from cai.training.online.rewards import Dialogue, Rewards, build_reward
from cai.training.online.rollouts import SHOWN, Logged, Rollouts, identity, sample
from cai.training.online.settings import OnlineSettings, Source
from cai.training.online.versions import version_of
from cai.training.stage import Parts
from cai.training.watching import AllSteps

_UNSEEN = (
    "no gold measure: where answers get worse while rewards rise (over-optimisation), nothing shows it; name by --gold, or "
    "under gold, a judge or a reward model that is not trained on"
)
_NO_LANGUAGES = "py3langid is not installed: whether completions change their language is not watched"
_STOPPED = "stopped.json"
_SHOWINGS = 10
"""How often completions are kept to be shown where no held-out prompts are answered."""
_PAGE_EVERY = 30.0
"""Seconds at least between two writings of the page while it trains."""


class Safeguards(TrainerCallback):
    """Of one training. All processes do all of this together; the first one writes and tells."""

    def __init__(self, parts: Parts) -> None:
        settings = parts.settings
        assert isinstance(settings, OnlineSettings)
        self.settings, self._show, self._out, self._run = settings, parts.show, parts.folder, parts.folder / "run"
        gold = settings.gold
        self.held_out = hold_out(parts.data, gold.prompts, settings.seed) if gold else HeldOut(parts.data.train, None)
        check_enough(len(self.held_out.train), parts.arguments, settings.trl)
        check_kl(settings.limits.kl, getattr(parts.arguments, "target_kl", None))
        self._rollouts = Rollouts([one.name for one in settings.reward], [one.weight for one in settings.reward])
        self.rewards = [build_reward(one, partial(self._tell, place)) for place, one in enumerate(settings.reward)]
        self._gold = build_reward(gold, kind="gold") if gold else None
        self._functions = {"gold": gold and _function(gold), "reward": [_function(one) for one in settings.reward]}
        self._leads = PartialState().is_main_process
        self._best, self._drift = Best(parts.folder), Drift()
        self._lines: list[dict[str, Any]] = []
        self._golds: list[dict[str, Any]] = []
        self._stopped: dict[str, Any] | None = None
        self._trainer: Any = None
        self._went_on = False
        self._is_changed = False
        self._told = set[str]()
        self._page_at = time.monotonic()

    def guard(self, trainer: Any) -> Any:
        """The trainer, guarded."""
        self._trainer, self._logged = trainer, Logged(trainer)
        trainer.add_callback(self)
        trainer.safeguards = self
        return trainer

    def _tell(self, place: int, name: str, prompts: list[Dialogue], texts: list[str], rewards: Rewards) -> None:
        if self._trainer.model.training:  # not what is measured
            self._rollouts.add(place, prompts, texts, rewards)

    # ------------------------------------------------------------------------------------------------ while it trains
    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Measure what it begins with. Raises `AllSteps` where the checkpoint is the one that it was stopped at."""
        self._go_on(state.global_step)
        if not self._stopped:
            self._note_unseen(args)
        if not self._golds:  # where a training goes on, the next measure comes when it is due
            self._measure(state.global_step)
            if state.global_step:
                self._best.go_on(self._best_step)
        if self._stopped:
            raise AllSteps
        if state.global_step < (warming := getattr(args, "value_warmup_steps", 0)):
            self._note(f"to step {warming} the value function alone learns (trl.value_warmup_steps)")
        self._note_steps(args, state.max_steps)
        if self._leads:
            (self._run / _STOPPED).unlink(missing_ok=True)

    def _note_steps(self, args: Any, last: int) -> None:
        """What a rollout is; and where the steps end after the first one, or before the last."""
        if rollout := getattr(args, "generation_batch_size", None):
            epochs, minibatches = args.num_iterations, args.steps_per_generation / args.gradient_accumulation_steps
            steps = epochs * minibatches
            self._note(f"each rollout is {rollout} completions, {_how_used(epochs, minibatches, rollout)}")
            if last <= steps:
                self._note(
                    f"all {last} steps are trained on one rollout, so that reward and KL are those from before; raise "
                    f"trl.max_steps above {steps:g}"
                )
        limit = self.settings.limits.steps
        if limit is not None and limit < last:
            self._note(f"limits.steps ends this after {limit:,} of its {last:,} steps; set limits.steps: null for all of them")

    def _note_unseen(self, args: Any) -> None:
        """What nothing watches or stops."""
        if self._gold is None:
            self._note(_UNSEEN)
        elif self.settings.gold is not None and self.settings.gold.stop and len(self.held_out.prompts) < golden.FEW:
            few = len(self.held_out.prompts)
            self._note(f"gold: too few held-out prompts ({few}) to stop the training by; give {golden.FEW} or more")
        if find_spec("py3langid") is None:
            self._note(_NO_LANGUAGES)
        if self.settings.limits.kl is not None and getattr(args, "beta", None) == 0:
            self._note(
                "limits.kl: with trl.beta 0 there is no reference, so the KL is not known and does not stop the training"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look at the rollout, measure where it is time to, and stop where there is reason to."""
        step, limits = state.global_step, self.settings.limits
        reason = self._look(step)
        if not reason and limits.steps is not None and step >= limits.steps:
            reason = ("steps", f"limits.steps is {limits.steps:,}")
        [reason] = broadcast_object_list([reason])
        if reason or self._is_due(step, state.max_steps):
            [reason] = broadcast_object_list([self._measure(step) or reason])
        if reason and step < state.max_steps:
            self._stop(step, *reason)
            control.should_training_stop = control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The trainer's own measures begin anew; what it logs of an evaluation leaves those of the training."""
        if self._trainer.model.training:
            self._logged.forget()

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """What was best at the checkpoint before is not needed any more."""
        self._best.go_on(self._best_step)
        self._redraw()

    def _go_on(self, step: int) -> None:
        """Take up what was written until `step`, the one of the checkpoint that training goes on from; without one, nothing."""
        if self._went_on:
            return
        self._went_on, step = True, step or -1
        golds = list[dict[str, Any]]()
        if self._leads:
            for name in ("samples", "log"):
                lines.keep_until(self._run / f"{name}.jsonl", step)
            self._lines = lines.keep_until(self._run / "rollouts.jsonl", step)
            golds = lines.keep_until(self._run / "gold.jsonl", step)
            self._golds = self._comparable(golds)
            self._stopped = self._stopped_at(step, by_gold=self._golds == golds)
        self._lines, golds, self._golds, self._stopped = broadcast_object_list([self._lines, golds, self._golds, self._stopped])
        self._is_changed = bool(golds) and not self._golds  # and what the other function measured is kept until this one has
        best = _step_of(best_of(golds))
        if best is not None and not self._best.is_there(best):
            self._note(f"run/best/{best}, the policy with the best gold, is not there any more: best/ will be of a better one")
        self._best.go_on(best)
        self._drift.new(self._lines)  # was told before

    def _comparable(self, golds: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What is kept of them where a function was changed since, told. If nothing is, they lie there until there are new."""
        found = golden.comparable(golds, self._functions)
        if found and found != golds:
            self._note("a function that rewards has changed: gold and best/ stay, rewards are compared with those from now on")
            lines.write(self._run / "gold.jsonl", found)
        elif golds and not found:
            self._note("the function that measures gold has changed: gold is measured anew, and best/ is by that")
        return found

    def _stopped_at(self, step: int, by_gold: bool) -> dict[str, Any] | None:
        """What stopped the training at that step and does so still; gold, only `by_gold`."""
        file = self._run / _STOPPED
        told: dict[str, Any] | None = json.loads(file.read_bytes()) if file.exists() else None
        if told is None or told["step"] != step or told.get("stops") != self.settings.stops:
            return None
        return told if by_gold or told["reason"] != "gold" else None

    def _look(self, step: int) -> tuple[str, str] | None:
        """Write down what the rollout since the last step is like; why to stop, if there is a reason."""
        rollout = self._rollouts.take()
        if rollout is None:
            return None
        if not self._lines:
            self._rollouts.check(rollout)
        line = self._rollouts.line(step, rollout, self._logged.take())
        if self._leads and self._gold is None and self._shows(step):
            lines.append(self._run / "samples.jsonl", *self._rollouts.samples(step, rollout))
        self._lines.append(line)
        for text in (*self._rollouts.constant(step, rollout), *self._drift.new(self._lines)):
            self._note(text)
        if self._leads:
            lines.append(self._run / "rollouts.jsonl", line)
        limits = self.settings.limits
        if limits.kl is not None and (text := over_kl(self._lines, limits.kl)):
            return "kl", text
        if limits.collapse and (text := collapsed(self._lines)):
            return "collapse", text
        return None

    def _shows(self, step: int) -> bool:
        """Whether completions of the rollout at that step are shown: the first one, and one in each tenth of the steps."""
        all_steps = self._trainer.state.max_steps
        return not self._lines or _SHOWINGS * step // all_steps > _SHOWINGS * self._lines[-1]["step"] // all_steps

    def _is_due(self, step: int, all_steps: int) -> bool:
        gold, limit = self.settings.gold, self.settings.limits.steps
        if gold is None:
            return False
        last = min(all_steps, limit or all_steps)
        every = math.ceil(gold.every * last) if gold.every < 1 else round(gold.every)
        return step % every == 0 or step == last

    def _measure(self, step: int) -> tuple[str, str] | None:
        """Measure the policy, unless that was done at this step; in the first process, why to stop, if there is a reason."""
        if self._gold is None or any(line["step"] == step for line in self._golds):
            return None
        assert self.settings.gold is not None
        is_first = not self._golds
        if is_first:
            self._note(
                f"measuring gold by answers to {len(self.held_out.prompts)} held-out prompts, as often as gold.every says"
            )
        seed = self.settings.seed
        answers = answer(self._trainer, self.held_out.prompts, self.rewards, self._gold, seed)
        line = {**golden.measured(step, answers, self._rollouts.weights, seed), "functions": self._functions}
        if is_first and self._is_changed and line["gold"] is None:
            name = self.settings.gold.name
            raise EngineError(
                f"gold by the changed '{name}' has no number for any answer at step {step}; mend it: what was measured before "
                "is kept until it has"
            )
        if best_of([*self._golds, line]) is line:
            self._best.keep(self._trainer, step)
        self._golds.append(line)
        for kind, lack in golden.gaps(self._golds, self.settings.gold.stop).items():
            if kind not in self._told:
                self._note(f"{lack}; look at answers in run/samples.jsonl")
            self._told.add(kind)
        if not self._leads:
            return None
        samples, measures = self._run / "samples.jsonl", self._run / "gold.jsonl"
        if is_first:  # what another function said is not told beside what this one says
            lines.write(samples, [{**one, "gold": None} for one in read_lines(samples) if one["step"] != step])
            lines.write(measures, [line])
        else:
            lines.append(measures, line)
        lines.append(samples, *self._samples(step, answers))
        self._redraw()
        text = golden.over_optimised(self._golds) if self.settings.gold.stop else ""
        return ("gold", f"{text}; best/ holds step {self._best_step}") if text else None

    def _samples(self, step: int, answers: list[Any]) -> list[dict[str, Any]]:
        shown, rows = answers[:SHOWN], self.held_out.prompts
        asked = [rows[one.number]["prompt"] for one in shown]
        told = zip(asked, shown, golden.proxies_of(shown, self._rollouts.weights), strict=True)
        return [sample(step, prompt[-1]["content"], identity(prompt), one.text, proxy, one.gold) for prompt, one, proxy in told]

    def _stop(self, step: int, reason: str, text: str) -> None:
        if reason in ("kl", "collapse"):
            unmeasured = self._best_step is None
            kept = "earlier ones are in checkpoints/ if any were saved" if unmeasured else "best/ holds the best one by gold"
            text += f"; the model is the policy after that, past the limit, and {kept}"
        self._stopped = {"reason": reason, "step": step, "why": text, "stops": self.settings.stops}
        self._note(f"stopped after step {step}: {text}")
        if self._leads:
            write_whole(self._run / _STOPPED, json.dumps(self._stopped) + "\n")

    def _note(self, text: str) -> None:
        if self._leads:
            self._show.note(text)

    # ------------------------------------------------------------------------------------------------ at the end
    def finish(self) -> dict[str, Any]:
        """Write OUT/best and the page; what the manifest tells of all this: among its `measures` the last KL, in nats a
        completion, how many rollouts there were, and as `rollout` the step of the last one, which measures are of. All
        processes call this."""
        self._go_on(self._trainer.state.global_step)
        has_best = self._best.save(self._trainer, self.settings, self._best_step)
        self.draw()
        kls, found = [line["kl"] for line in self._lines if "kl" in line], unscored(self._lines)
        return {
            "measures": {"kl": kls[-1]} if kls else {},
            **self._told_rollouts(),
            **({"stopped": self._stopped} if self._stopped else {}),
            **({"unscored": {name: {"none": none, "of": of} for name, (none, of) in found.items()}} if found else {}),
            **self._told_gold(has_best),
        }

    def _told_rollouts(self) -> dict[str, Any]:
        if not self._lines:
            return {}
        completions = sum(line["completions"] for line in self._lines)
        return {"rollout": self._lines[-1]["step"], "rollouts": {"count": len(self._lines), "completions": int(completions)}}

    @property
    def _best_step(self) -> int | None:
        return _step_of(best_of(self._golds))

    def _told_gold(self, has_best: bool) -> dict[str, Any]:
        if self.settings.gold is None or not self._golds:
            return {}
        best, first, last = best_of(self._golds), self._golds[0], self._golds[-1]
        counted = {"prompts": last["answers"], "unscored": sum(line["unscored"] for line in self._golds)}
        told = {"by": self.settings.gold.name, **counted, "first": _short(first), "last": _short(last)}
        return {"gold": told, **({"best": _short(best)} if best and has_best else {})}

    def _redraw(self) -> None:
        if time.monotonic() - self._page_at >= _PAGE_EVERY:
            self.draw()

    def draw(self) -> None:
        """Write the page, in the first process; where that fails a note says so, and the training goes on."""
        if not self._leads:
            return
        self._page_at = time.monotonic()
        if find_spec("matplotlib") is None:
            self._note("pictures need matplotlib: pip install matplotlib")
            return
        try:
            from cai.report.training import write_page

            write_page(self._out / PAGE, self._trainer.state.max_steps)
        except Exception as exc:  # a picture is no reason to end a training
            cause = exc.__cause__ or exc
            self._note(f"training.html could not be drawn: {type(cause).__name__}: {cause}")


def _how_used(epochs: int, minibatches: float, rollout: int) -> str:
    """How a rollout is gone over, which is less than a step's where `minibatches` is below 1."""
    if minibatches >= 1:
        return f"trained on {'once' if epochs == 1 else f'{epochs} times'} in minibatches of {rollout / minibatches:g}"
    held = f"{1 / minibatches:g}"
    if epochs == 1:
        return f"and a step takes {held} of them"
    return (
        f"and a step goes over it {min(float(held), epochs):g} times with the same weights, of which once is enough; "
        "raise trl.steps_per_generation to trl.gradient_accumulation_steps, or set trl.num_iterations: 1"
    )


def _function(source: Source) -> str | None:
    """A function as NAME@VERSION."""
    return version_of(source)["function"] if source.function is not None else None


def _step_of(line: Mapping[str, Any] | None) -> int | None:
    return int(line["step"]) if line else None


def _short(line: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest has of a measure."""
    return {name: line[name] for name in ("step", "gold", "low", "high", "proxy") if line.get(name) is not None}
