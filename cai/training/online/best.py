"""The policy with the best gold so far, kept in run/best/STEP while it trains, and in the end as the model folder OUT/best.

At most three are there: the best one, and those that were best when the last two checkpoints were written, from which a
training that is killed goes on; run/best.json says which one OUT/best is.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from pathlib import Path
from typing import Any

from accelerate import PartialState

from cai.store import write_whole
from cai.training.base_settings import TrainSettings
from cai.training.saving import keep_weights, save_kept

_CHECKPOINTS = 2
"""As many as there are by default (`save_total_limit`): where the last one is broken, training goes on from the one before."""


class Best:
    """The kept policies of a stage that trains into `out`."""

    def __init__(self, out: Path) -> None:
        self._out, self._place = out, out / "run" / "best"
        self._of_checkpoints = deque[int | None](maxlen=_CHECKPOINTS)

    def go_on(self, step: int | None) -> None:
        """The checkpoint that training goes on from, or that was just written, had its best at `step`."""
        self._of_checkpoints.append(step)
        self._drop_all_but(*self._of_checkpoints)

    def keep(self, trainer: Any, step: int) -> None:
        """The policy as it is, at `step`, is the best. All processes call this."""
        keep_weights(trainer, self._place / str(step))
        self._drop_all_but(step, *self._of_checkpoints)

    def is_there(self, step: int) -> bool:
        """Whether the policy at `step` is kept, here or as OUT/best."""
        return self._is_kept(step) or self._saved == step

    def save(self, trainer: Any, settings: TrainSettings, step: int | None) -> bool:
        """Make OUT/best the policy at `step`, or nothing where that is not there any more; whether it is."""
        is_there = step is not None and self.is_there(step)
        if PartialState().is_main_process and not is_there:
            shutil.rmtree(self._out / "best", ignore_errors=True)
        elif PartialState().is_main_process and step is not None and self._is_kept(step):
            self._record.unlink(missing_ok=True)
            save_kept(trainer, settings, self._place / str(step), self._out / "best")
            write_whole(self._record, json.dumps({"step": step}) + "\n")
        return is_there

    def _is_kept(self, step: int) -> bool:
        return (self._place / str(step)).is_dir()

    @property
    def _record(self) -> Path:
        return self._out / "run" / "best.json"

    @property
    def _saved(self) -> int | None:
        """The step that OUT/best is of."""
        if not ((self._out / "best").is_dir() and self._record.exists()):
            return None
        return int(json.loads(self._record.read_bytes())["step"])

    def _drop_all_but(self, *steps: int | None) -> None:
        if not PartialState().is_main_process:
            return
        wanted = {str(step) for step in steps}
        for path in self._place.glob("*"):
            if path.name not in wanted:
                shutil.rmtree(path)
