"""One pass over the prompts on a Ray cluster."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Iterator

from cai.config import Recipe
from cai.constitution import Constitution
from cai.distributed.fleet import Fleet
from cai.distributed.jobs import make_job
from cai.generation import Engines, Runner, Tally
from cai.prompts import Row
from cai.store import Database

_BLOCKS_WAITING = 2
"""Of each worker, blocks that wait until it has time for them."""

_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's own switch: with 0, what it starts listens on 127.0.0.1 alone. Read when ray is imported."""
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # tell nobody of this cluster
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # or its C++ writes across our progress bar
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
"""Ray's, in the environment; what is set there already wins."""


def run_on_ray(
    recipe: Recipe, constitution: Constitution, engines: Engines, database: Database, tally: Tally, rows: Iterator[Row]
) -> None:
    """Make a record of every row that has none yet, as a `Runner` does here. Raises what that raises,
    and `ConfigError` for a cluster that cannot be reached or is too small."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if recipe.ray.address == "local":
        os.environ.setdefault(_LOOPBACK, "0")
    from cai.distributed.cluster import RayCluster, connected

    blocks_at_once = math.ceil(recipe.generation.concurrency / recipe.ray.block_rows)
    at_once = recipe.ray.workers * (blocks_at_once + _BLOCKS_WAITING) * recipe.ray.block_rows
    with connected(recipe.ray):
        job = make_job(recipe, constitution, engines, database.count_calls() > 0)
        cluster = RayCluster(recipe.ray, job, database.path, blocks_at_once)
        fleet = Fleet(cluster, database, tally, recipe.ray.block_rows)

        async def run() -> None:
            async with fleet.running():
                await Runner(fleet, database, tally, at_once).run(fleet.counted(rows))

        asyncio.run(run())
