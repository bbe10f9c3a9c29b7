"""What a checkpoint has of PPO beside what TRL writes: the value function, its optimizer, and the coefficient of the KL."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cai.errors import EngineError
from cai.training.checkpoints import OF_PPO

_WEIGHTS, _OPTIMIZER, _STATE = OF_PPO


def save_value(folder: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, coefficient: float) -> None:
    """Write all of it."""
    save_file({name: one.detach().contiguous() for name, one in weights.items()}, folder / _WEIGHTS)
    torch.save(optimizer.state_dict(), folder / _OPTIMIZER)
    (folder / _STATE).write_text(json.dumps({"kl_coefficient": coefficient}))


def check_whole(checkpoint: Path) -> None:
    """Raises `EngineError` where some of it is not there."""
    missing = [one for one in OF_PPO if not (checkpoint / one).is_file()]
    if missing:
        raise EngineError(
            f"{checkpoint} was not written whole ({missing[0]} is not there): delete it, then the same command continues "
            "from the checkpoint before"
        )


def load_value(folder: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    """Read it into `weights` and `optimizer`; returns the coefficient. Raises `EngineError` where it has other weights."""
    saved = load_file(folder / _WEIGHTS, device=str(device))
    if saved.keys() != weights.keys():
        raise EngineError(f"{folder} is of another value function; --fresh starts over")
    with torch.no_grad():
        for name, one in weights.items():
            one.copy_(saved[name])
    optimizer.load_state_dict(torch.load(folder / _OPTIMIZER, map_location=device, weights_only=True))
    return float(json.loads((folder / _STATE).read_bytes())["kl_coefficient"])
