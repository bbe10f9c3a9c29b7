"""Ray: connecting, what fits, and the stream of blocks through Ray Data to a pool of actors and back.

    driver --put--> feeder --> one read task --> Ray Data --> pool of actors --> Ray Data --> outcomes, to the driver

The feeder and the read task are on the driver's own node, so they live as long as the driver. Ray Data does a block again
whose actor or node died; it starts a dead actor anew where there is room. The driver bounds how many rows are on their
way, so memory stays flat whatever the source holds.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow
import ray
import ray.data
from ray.data.block import BlockMetadata

from cai.config import RayConfig
from cai.distributed.jobs import Job
from cai.distributed.worker import Worker
from cai.errors import ConfigError, EngineError
from cai.store import Database

_STORE = 256 * 2**20
"""Bytes of shared memory of a local cluster: blocks are small."""
_RESTARTS = 4
"""How often an actor is started again after it died, before the run stops: something kills it each time."""
_WAIT_FOR_ROOM = 60.0
"""Seconds for which a cluster without room for a single worker is waited for."""
_PATIENCE = 10.0
"""Seconds in which a cluster's head has to answer."""
_KEYS = 500
"""Calls that are looked up in one query."""
_LOOK = 2.0
"""Seconds between two looks at the cluster."""


class RayCluster:
    """A `Cluster` of Ray actors."""

    def __init__(self, config: RayConfig, job: Job, journal: Path, blocks_at_once: int) -> None:
        """`blocks_at_once` of a worker. Raises `ConfigError` where the workers do not fit into the cluster."""
        self._config = config
        _refuse_too_many(config)
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        self._feeder = ray.remote(num_cpus=0, label_selector=here, max_concurrency=1000)(_Feeder).remote(journal)
        self._dataset = _through_actors(self._feeder, here, config, job, blocks_at_once)

    def outcomes(self) -> Iterator[bytes]:
        """As `Cluster`. Raises `EngineError` where workers die again and again, or no node has room for one any more."""
        received: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._receive, args=(received,), daemon=True).start()
        without_room = 0.0
        while True:
            try:
                item = received.get(timeout=_LOOK)
            except queue.Empty:
                without_room = 0.0 if _room(self._config) else without_room + _LOOK
                if without_room >= _WAIT_FOR_ROOM:
                    raise EngineError(_no_room_left(self._config)) from None
                continue
            if item is None:
                return
            if isinstance(item, Exception):
                raise EngineError(_failure(item)) from item
            yield from item

    def _receive(self, received: queue.Queue[Any]) -> None:
        try:
            for table in self._dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                received.put(table["outcome"].to_pylist())
            received.put(None)
        except Exception as exc:  # the boundary of Ray: the other thread says it
            received.put(exc)

    async def put(self, number: int, block: bytes) -> None:
        """As `Cluster`."""
        await self._feeder.put.remote(number, block)

    async def done(self, number: int) -> None:
        """As `Cluster`."""
        await self._feeder.done.remote(number)

    async def stop(self) -> None:
        """As `Cluster`."""
        await self._feeder.stop.remote()

    async def end(self) -> None:
        """As `Cluster`."""
        await self._feeder.end.remote()


def _through_actors(feeder: Any, here: dict[str, str], config: RayConfig, job: Job, blocks_at_once: int) -> ray.data.Dataset:
    """The outcomes of a feeder's blocks, computed when they are asked for."""
    pool = ray.data.ActorPoolStrategy(
        size=config.workers,
        max_tasks_in_flight_per_actor=blocks_at_once + 1,
        max_concurrent_calls_per_actor=blocks_at_once,
        enable_true_multi_threading=True,
    )
    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size, context.enable_progress_bars
    context.target_max_block_size, context.enable_progress_bars = 1, False  # or Ray Data would join blocks
    try:
        blocks = ray.data.read_datasource(_Blocks(feeder), override_num_blocks=1, num_cpus=0, label_selector=here)
        with warnings.catch_warnings():  # Ray 2.64 will name `max_restarts`; until then it goes by the old way
            warnings.simplefilter("ignore")
            return blocks.map_batches(
                _Actor,
                fn_constructor_args=(job, feeder),
                batch_size=None,
                batch_format="pyarrow",
                zero_copy_batch=True,
                compute=pool,
                num_cpus=config.cpus_per_worker,
                num_gpus=config.gpus_per_worker,
                max_restarts=_RESTARTS,
            )
    finally:
        context.target_max_block_size, context.enable_progress_bars = before


class _Feeder:
    """On the driver's node: what the driver says to workers, and the journal to look into.

    Keeps each block until its outcome is in the journal, so that a read task that is begun anew finds it again.
    """

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._database: Database | None = None
        self._blocks: dict[int, bytes] = {}
        self._last = 0
        self._ended = self._stopping = False
        self._news = asyncio.Condition()

    async def put(self, number: int, block: bytes) -> None:
        async with self._news:
            self._blocks[number] = block
            self._last = number
            self._news.notify_all()

    async def next(self, number: int) -> bytes | None:
        """The block of that number, once it is there; empty where it is done, None after the last."""
        async with self._news:
            await self._news.wait_for(lambda: number <= self._last or self._ended)
            return self._blocks.get(number, b"") if number <= self._last else None

    async def done(self, number: int) -> None:
        self._blocks.pop(number, None)

    async def stop(self) -> None:
        self._stopping = True

    async def is_stopping(self) -> bool:
        return self._stopping

    async def find(self, keys: list[bytes]) -> dict[bytes, bytes]:
        self._database = self._database or Database(self._journal)
        slices = (keys[at : at + _KEYS] for at in range(0, len(keys), _KEYS))
        return {key: result for some in slices for key, result in self._database.call_results(some).items()}

    async def end(self) -> None:
        async with self._news:
            self._ended = True
            self._news.notify_all()


class _Blocks(ray.data.Datasource):  # type: ignore[misc]
    """The blocks of a feeder, read by one task as they come."""

    def __init__(self, feeder: Any) -> None:
        self._feeder = feeder

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, *_: Any, **__: Any) -> list[ray.data.ReadTask]:
        feeder = self._feeder

        def read() -> Iterator[pyarrow.Table]:
            number = 1
            while (block := ray.get(feeder.next.remote(number))) is not None:
                yield pyarrow.table({"block": pyarrow.array([block], pyarrow.large_binary())})
                number += 1

        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ray.data.ReadTask(read, unknown)]


class _FeederAsDriver:
    """What a worker can ask."""

    def __init__(self, feeder: Any) -> None:
        self._feeder = feeder

    async def asked_to_stop(self) -> bool:
        return bool(await self._feeder.is_stopping.remote())

    async def find(self, keys: list[bytes]) -> dict[bytes, bytes]:
        return dict(await self._feeder.find.remote(keys))


class _Actor:
    """What Ray Data calls for each block, from several threads at once."""

    def __init__(self, job: Job, feeder: Any) -> None:
        self._worker = Worker(job, f"{socket.gethostname()} ({ray.util.get_node_ip_address()})", _FeederAsDriver(feeder))

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        outcomes = [self._worker.work(block) for block in table["block"].to_pylist() if block]
        return pyarrow.table({"outcome": pyarrow.array(outcomes, pyarrow.large_binary())})


@contextmanager
def connected(config: RayConfig) -> Iterator[None]:
    """In the block, this process is a driver of the cluster; a local one is started, and ended after it.

    Raises `ConfigError` where the cluster cannot be reached. One that this process is connected to already is used as it is.
    """
    if ray.is_initialized():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    try:
        _connect(config)
        for number, handler in handlers.items():  # Ray sets its own
            with suppress(ValueError):  # not the main thread
                signal.signal(number, handler)
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        yield
    finally:
        ray.shutdown()


def _connect(config: RayConfig) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.CRITICAL, "configure_logging": False}
    if config.address == "local":
        ray.init("local", include_dashboard=False, object_store_memory=_STORE, **quiet)
        _refuse_open_ports()
        return
    try:
        _knock(config.address or "")
        ray.init(config.address, **quiet)
    except Exception as exc:  # ConnectionError, RuntimeError, AuthenticationError, gRPC's: Ray has no common one
        raise ConfigError(
            f"ray.address: no Ray cluster could be reached at '{config.address}': {_first_line(exc)}; is it running "
            "(`ray status`), and is this one of its nodes (`ray start --address=HOST:PORT`)?"
        ) from exc


def _knock(address: str) -> None:
    """Raises `OSError` at once where nobody listens; Ray itself would wait for minutes."""
    host, colon, port = address.rpartition(":")
    if colon:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()


def _refuse_open_ports() -> None:
    address = ray.nodes()[0]["NodeManagerAddress"]
    if address != "127.0.0.1":
        ray.shutdown()
        raise ConfigError(
            f"a local Ray cluster would listen on {address}, for others too: ray was imported before cai; set "
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 in the environment before, or start a cluster yourself and give its address"
        )


def _rooms(config: RayConfig) -> dict[str, int]:
    """How many workers each living node can hold by all its CPUs and GPUs, whatever else runs there."""
    needs = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    rooms = {}
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            fits = [int(has.get(name, 0) / need + 1e-9) for name, need in needs.items() if need]
            rooms[node["NodeManagerAddress"] + " " + node["NodeID"][:6]] = min(fits, default=config.workers)
    return rooms


def _room(config: RayConfig) -> int:
    with suppress(Exception):  # the head is away for a moment; should it stay away, Ray itself says so
        return sum(_rooms(config).values())
    return 1


def _each(config: RayConfig) -> str:
    gpus = f" and {config.gpus_per_worker:g} GPUs" if config.gpus_per_worker else ""
    return f"{config.cpus_per_worker:g} CPUs{gpus} each"


def _refuse_too_many(config: RayConfig) -> None:
    rooms = _rooms(config)
    if (fits := sum(rooms.values())) < config.workers:
        nodes = ", ".join(f"{count} on {node}" for node, count in rooms.items())
        raise ConfigError(
            f"ray.workers: {config.workers} workers with {_each(config)} do not fit: there is room for {fits} ({nodes}); "
            "lower --workers, or ray.cpus_per_worker and ray.gpus_per_worker"
        )


def _no_room_left(config: RayConfig) -> str:
    return (
        f"no node of the Ray cluster has room for a worker with {_each(config)} any more, for {_WAIT_FOR_ROOM:.0f} s; "
        "bring nodes back, then the same command continues"
    )


def _failure(exc: Exception) -> str:
    text = str(exc)
    if "No module named 'cai" in text:
        return "a node of the Ray cluster has no cai: install the same cai-toolkit on every node; the same command continues"
    if "ActorDied" in type(exc).__name__ or "ActorDied" in text or "actor died" in text:
        return (
            f"workers died more than {_RESTARTS} times, so something kills them each time (too little memory?): "
            f"{_first_line(exc)}; their logs are in {_logs()}; the same command continues"
        )
    return (
        f"the Ray cluster failed: {type(exc).__name__}: {_first_line(exc)}; logs are in {_logs()}; the same command continues"
    )


def _logs() -> Path:
    return Path("/tmp/ray/session_latest/logs")


def _first_line(exc: BaseException) -> str:
    return next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
