"""What is watched while a stage trains: a loss that is no number, a Ctrl-C; how far it is, for whoever shows it."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from cai.errors import EngineError, Interrupted
from cai.training.folder import STARTS_OVER

_SPARE = 60.0
"""Seconds of work that a checkpoint has to be worth, unless it was said when they are written."""
STOPPING = "stopping: the step under way ends and is saved; Ctrl-C again stops at once"
ENDED = "stopped, and the training has ended: the model is in {}"
SAVING = "stopping when the model is saved, the training having ended; Ctrl-C again stops at once"


class Show(Protocol):
    """Who shows how far a training is."""

    def note(self, text: str) -> None:
        """What is done next, or has happened."""

    def step(self, done: int, total: int, measures: Mapping[str, float]) -> None:
        """So many steps are done, and what was measured, if anything was."""


class Silent:
    """Shows nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def step(self, done: int, total: int, measures: Mapping[str, float]) -> None:
        """Nothing."""


class AllSteps(Exception):
    """The checkpoint that training goes on from has all steps, and is loaded."""


class Watch(TrainerCallback):
    """Stops where gradients are no numbers, or when asked; writes each logged line to a file as JSON.

    In several processes all do the same thing at the same step: save, or stop.
    """

    def __init__(
        self,
        log: Path,
        show: Show,
        spare: float = _SPARE,
        stop_file: Path | None = None,
        saved: Callable[[], None] | None = None,
    ) -> None:
        """`spare`: least seconds between two checkpoints; `stop_file`: where it appears, training stops as by Ctrl-C; `saved`
        is called after each checkpoint."""
        self._log, self._show, self._spare, self._stop_file, self._saved = log, show, spare, stop_file, saved
        self._saved_at = time.monotonic()
        self.stopping = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Time runs from the first step on. Raises `AllSteps` where a checkpoint has them all: the trainer would add one, and
        `Interrupted` where it is to stop before it has begun."""
        if state.global_step >= state.max_steps:
            raise AllSteps
        (self.stopping,) = _any_process(args, self._asked)
        if self.stopping:
            raise Interrupted("stopped before another step; the same command continues")
        self._saved_at = time.monotonic()
        self._show.step(state.global_step, state.max_steps, {})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """All gradients are looked at: clipping spreads NaN over all, but of an infinite one it makes NaN in its place and
        0 elsewhere. fp16 skips such steps."""
        gradients = [one.grad for one in given["model"].parameters() if one.grad is not None]
        if not args.fp16 and not _all_finite(gradients):
            raise EngineError(_no_number("a gradient", args, state))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Save and stop where it was asked for; let a checkpoint be that is not worth its time. The last of all callbacks, for
        others take their time: what is asked for meanwhile is done here."""
        too_soon = time.monotonic() - self._saved_at < self._spare
        self.stopping, too_soon = _any_process(args, self._asked, too_soon)
        if self.stopping:
            control.should_training_stop = control.should_save = True
        elif too_soon and not (control.should_training_stop and state.global_step < state.max_steps):
            control.should_save = False
        if state.is_world_process_zero:
            self._show.step(state.global_step, state.max_steps, {})

    @property
    def _asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self.stopping or bool(self._stop_file and self._stop_file.exists())

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The next checkpoint is so much later."""
        self._saved_at = time.monotonic()
        if self._saved:
            self._saved()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **given: Any) -> None:
        """One line of JSON."""
        if not (state.is_world_process_zero and logs):
            return
        numbers = {key: value for key, value in logs.items() if not isinstance(value, float) or math.isfinite(value)}
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **numbers}) + "\n")
        self._show.step(state.global_step, state.max_steps, numbers)

    @contextmanager
    def on_signals(self, what: str = STOPPING) -> Iterator[None]:
        """At first SIGINT or SIGTERM what is under way ends, as `what` says; the next one stops at once."""
        if threading.current_thread() is not threading.main_thread() or self._stop_file is not None:
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, frame: Any) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True
            self._show.note(what)

        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _any_process(args: Any, *flags: bool) -> tuple[bool, ...]:
    """Each flag, set where any process has it set."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flags
    shared = torch.tensor([float(one) for one in flags], device=args.device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return tuple(bool(one) for one in shared.tolist())


def _all_finite(gradients: Sequence[torch.Tensor]) -> bool:
    """Whether every element is, told by the largest of each tensor, so that a GPU is waited for once. Of what is spread over
    processes each looks at its own part."""
    parts = [one.to_local() if isinstance(one, DTensor) else one for one in gradients]
    parts = [one for one in parts if one.numel()]
    if not parts:
        return True
    largest = torch._foreach_norm(parts, ord=math.inf)
    return bool(torch.isfinite(torch.stack([one.to(parts[0].device, torch.float32) for one in largest])).all())


def check_losses(trainer: Any) -> None:
    """Make the trainer raise `EngineError` for a loss that is no number."""
    compute = trainer.compute_loss

    def checked(*given: Any, **named: Any) -> Any:
        result = compute(*given, **named)
        loss = result[0] if isinstance(result, tuple) else result
        if not torch.isfinite(loss).all():
            raise EngineError(_no_number("the loss", trainer.args, trainer.state))
        return result

    trainer.compute_loss = checked


def _no_number(what: str, args: Any, state: Any) -> str:
    kept = sorted(Path(args.output_dir).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    where = f"{kept[-1]} is from before; " if kept else ""
    return (
        f"{what} is not a finite number at step {state.global_step + 1} of {state.max_steps} (epoch {state.epoch or 0:.2f}); "
        f"{where}lower trl.learning_rate, or set dtype: float32; then {STARTS_OVER}"
    )
