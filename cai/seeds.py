"""Everything random comes from a hash of (run seed, prompt id, step): the same whatever runs beside it or ran before."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *step: str | int) -> int:
    """A number below 2**63 for one step of what `seed` is for."""
    text = ascii((seed, *step))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
