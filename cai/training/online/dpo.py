"""TRL's online DPO, to whose log rewards can add measures, as they can to that of TRL's other online trainers."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from trl.experimental.online_dpo import OnlineDPOTrainer


class OnlineDpo(OnlineDPOTrainer):
    """Its log has the means of what rewards gave to `log_metric` since the last line."""

    def __init__(self, *given: Any, **named: Any) -> None:
        self._said: dict[str, list[float]] = {}
        super().__init__(*given, **named)

    def _calculate_rewards_from_functions(self, *given: Any, **named: Any) -> Any:
        """TRL's."""
        return super()._calculate_rewards_from_functions(*given, log_metric=self._note, **named)

    def _note(self, name: str, value: float) -> None:
        self._said.setdefault(name, []).append(value)

    def log(self, logs: dict[str, float], *given: Any, **named: Any) -> None:
        """TRL's."""
        said, self._said = self._said, {}
        super().log({**logs, **{name: fmean(values) for name, values in said.items()}}, *given, **named)
