"""What a checkpoint has of PPO beside what TRL writes: the value function, its optimizer, and its counters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cai.errors import EngineError
from cai.training.checkpoints import OF_PPO

_WEIGHTS, _OPTIMIZER, _STATE = OF_PPO


class Counters(NamedTuple):
    """What is neither a weight nor an optimizer's."""

    kl_coefficient: float
    is_level: bool
    """Whether scores have set the level that values begin at."""


def save_value(folder: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, counters: Counters) -> None:
    """Write all of it."""
    save_file({name: one.detach().contiguous() for name, one in weights.items()}, folder / _WEIGHTS)
    torch.save(optimizer.state_dict(), folder / _OPTIMIZER)
    (folder / _STATE).write_text(json.dumps(counters._asdict()))


def check_whole(checkpoint: Path) -> None:
    """Raises `EngineError` where some of it is not there."""
    missing = [one for one in OF_PPO if not (checkpoint / one).is_file()]
    if missing:
        raise EngineError(
            f"{checkpoint} was not written whole ({missing[0]} is not there): delete it, then the same command continues "
            "from the checkpoint before"
        )


def load_value(folder: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Counters:
    """Read it into `weights` and `optimizer`, wherever they are. Raises `EngineError` for other weights or counters."""
    saved = load_file(folder / _WEIGHTS)
    if saved.keys() != weights.keys():
        raise EngineError(f"{folder} is of another value function; --fresh starts over")
    with torch.no_grad():
        for name, one in weights.items():
            one.copy_(saved[name])
    optimizer.load_state_dict(torch.load(folder / _OPTIMIZER, map_location="cpu", weights_only=True))
    state = json.loads((folder / _STATE).read_bytes())
    if not isinstance(state, dict) or state.keys() != set(Counters._fields):
        raise EngineError(f"{folder / _STATE} is not what this version writes; --fresh starts over")
    return Counters(**state)
