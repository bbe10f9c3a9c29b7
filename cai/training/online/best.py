"""The policy with the best gold so far, kept in run/best/STEP while it trains, and in the end as the model folder OUT/best.

At most two are there: the best one, and the one that was best when the last checkpoint was written, from which a training that
is killed goes on.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState

from cai.training.base_settings import TrainSettings
from cai.training.saving import keep_weights, save_kept


class Best:
    """The kept policies of a stage that trains into `out`."""

    def __init__(self, out: Path) -> None:
        self._out, self._place = out, out / "run" / "best"
        self._of_checkpoint: int | None = None

    def go_on(self, step: int | None) -> None:
        """The checkpoint that training goes on from, or that was just written, had its best at `step`."""
        self._of_checkpoint = step
        self._drop_all_but(step)

    def keep(self, trainer: Any, step: int) -> None:
        """The policy as it is, at `step`, is the best. All processes call this."""
        keep_weights(trainer, self._place / str(step))
        self._drop_all_but(step, self._of_checkpoint)

    def holds(self, step: int) -> bool:
        """Whether the policy at `step` is kept."""
        return (self._place / str(step)).is_dir()

    def save(self, trainer: Any, settings: TrainSettings, step: int) -> None:
        """Write OUT/best."""
        if PartialState().is_main_process:
            save_kept(trainer, settings, self._place / str(step), self._out / "best")

    def _drop_all_but(self, *steps: int | None) -> None:
        if not PartialState().is_main_process:
            return
        wanted = {str(step) for step in steps}
        for path in self._place.glob("*"):
            if path.name not in wanted:
                shutil.rmtree(path)
