"""The rollout that a training is in the midst of, kept in its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

_ROLLOUT = "rollout-{}.pt"
"""Of each process its own."""


class KeepsRollout:
    """Comes before a trainer of TRL's that trains on a rollout for several steps: a resumed training goes on with it, and does
    not write another one."""

    def _save_checkpoint(self: Any, model: Any, trial: Any) -> None:
        """The rollout; then TRL's, whose state of the trainer comes last: where that is, all processes have written."""
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        self._save_beside(folder)
        rollout = {"step": self._step, "batches": self._buffered_inputs}
        torch.save(rollout, folder / _ROLLOUT.format(self.accelerator.process_index))
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _save_beside(self, folder: Path) -> None:
        """What else a checkpoint has."""

    def _load_optimizer_and_scheduler(self: Any, checkpoint: str | None) -> None:
        """TRL's, then the rollout."""
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        rollout, device = Path(checkpoint) / _ROLLOUT.format(self.accelerator.process_index), self.accelerator.device
        there = self.accelerator.reduce(torch.tensor(int(rollout.is_file()), device=device), reduction="sum")
        if int(there) == self.accelerator.num_processes:  # else all of them write a new one
            kept = torch.load(rollout, map_location="cpu", weights_only=True)
            self._step, self._buffered_inputs = kept["step"], send_to_device(kept["batches"], device)
