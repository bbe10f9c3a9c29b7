"""What is watched while a stage trains: a loss that is no number, a Ctrl-C; and a line of measures for each logged step."""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from cai.errors import EngineError


class Watch(TrainerCallback):
    """Stops where gradients are no numbers, or when asked; writes each logged line to a file as JSON."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self.stopping = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Clipping spreads one gradient that is no number over all, so that the first one tells."""
        gradients = (one.grad for one in given["model"].parameters() if one.grad is not None)
        first = next(gradients, None)
        if first is not None and not torch.isfinite(first).all():
            raise EngineError(_no_number("a gradient", state))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Save and stop where it was asked for."""
        if self.stopping:
            control.should_training_stop = control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **given: Any) -> None:
        """One line of JSON."""
        if state.is_world_process_zero and logs:
            numbers = {key: value for key, value in logs.items() if not isinstance(value, float) or math.isfinite(value)}
            with self._log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **numbers}) + "\n")

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """At first SIGINT or SIGTERM the step that is under way ends and is saved; the next one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def stop(number: int, frame: Any) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True

        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def check_losses(trainer: Any) -> None:
    """Make the trainer raise `EngineError` for a loss that is no number."""
    compute = trainer.compute_loss

    def checked(*given: Any, **named: Any) -> Any:
        result = compute(*given, **named)
        loss = result[0] if isinstance(result, tuple) else result
        if not torch.isfinite(loss).all():
            raise EngineError(_no_number("the loss", trainer.state))
        return result

    trainer.compute_loss = checked


def _no_number(what: str, state: Any) -> str:
    return (
        f"{what} is not a finite number at step {state.global_step + 1} of {state.max_steps} (epoch {state.epoch or 0:.2f}); "
        "lower trl.learning_rate, or set dtype: float32, and start over with --fresh"
    )
