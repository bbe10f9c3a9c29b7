"""Completions that nothing is learned from."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


class LeavesOut:
    """Comes before a trainer of TRL's, which leaves out a completion of which no reward says anything: also where one of weight
    0 does, which is only logged."""

    def _calculate_rewards(self: Any, *given: Any, **named: Any) -> Tensor:
        """TRL's (completions of all processes, rewards)."""
        rewards: Tensor = super()._calculate_rewards(*given, **named)  # type: ignore[misc]
        counted = self.reward_weights.to(rewards.device) != 0
        rewards[rewards[:, counted].isnan().all(dim=1)] = math.nan
        return rewards
