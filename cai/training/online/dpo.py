"""TRL's online DPO, to whose log rewards can add measures, as they can to that of TRL's other online trainers."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from accelerate.utils import gather_object
from trl.experimental.online_dpo import OnlineDPOTrainer


class OnlineDpo(OnlineDPOTrainer):
    """Its log has the means of what rewards gave to `log_metric` since the last line, in all processes."""

    def __init__(self, *given: Any, **named: Any) -> None:
        self._said: dict[str, list[float]] = {}
        super().__init__(*given, **named)

    def _calculate_rewards_from_functions(self, *given: Any, **named: Any) -> Any:
        """TRL's."""
        return super()._calculate_rewards_from_functions(*given, log_metric=self._note, **named)

    def _note(self, name: str, value: float) -> None:
        self._said.setdefault(name, []).append(value)

    def log(self, logs: dict[str, float], *given: Any, **named: Any) -> None:
        """TRL's; all processes call it."""
        said: dict[str, list[float]] = {}
        for part in gather_object([self._said]):
            for name, values in part.items():
                said.setdefault(name, []).extend(values)
        self._said = {}
        super().log({**logs, **{name: fmean(values) for name, values in said.items()}}, *given, **named)
