"""An actor: engines of its own, and for each row of a block the same coroutine as on one machine."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Protocol

import msgspec

from cai.config import ModelConfig, Recipe
from cai.constitution import Constitution
from cai.distributed.jobs import Block, Item, Job, Outcome, RowOutcome, decode_block, described, encode, unpacked_recipe
from cai.distributed.jobs import code as code_here
from cai.documents import Document
from cai.engines import Engine, build_engine
from cai.errors import CaiError, ConfigError, Interrupted
from cai.generation import Engines, Runner, Tally, journaled_generator
from cai.judging import judge_sections, section_names
from cai.judging.calibration import Calibration, LoadedCalibration
from cai.judging.checks import prepare as prepare_checks
from cai.prompts import Row
from cai.store import Call, Database

_LISTEN = 0.5
"""Seconds between two questions whether to stop."""
_GATHER = 0.002
"""Seconds in which questions for finished calls are gathered into one."""


class Driver(Protocol):
    """What a worker can ask where the run was started."""

    async def asked_to_stop(self) -> bool:
        """Whether no call is to be begun any more."""
        raise NotImplementedError

    async def find(self, keys: list[bytes]) -> dict[bytes, bytes]:
        """The results of those calls that the run's journal has."""
        raise NotImplementedError


class Worker:
    """Works on several blocks at once, on one loop, so that engines batch over all of them."""

    def __init__(self, job: Job, place: str, driver: Driver) -> None:
        """`place` names the node in errors."""
        self._job, self._place, self._driver = job, place, driver
        self._before = _Before(driver) if job.begun else None
        self._prepared: tuple[Recipe, Constitution, Engines] | None = None
        self._preparing = asyncio.Lock()
        self._stopped = False
        self._tallies: list[Tally] = []
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop)

    def work(self, encoded: bytes) -> bytes:
        """The outcome of a block; called from several threads at once."""
        return encode(asyncio.run_coroutine_threadsafe(self._work(decode_block(encoded)), self._loop).result())

    async def _listen(self) -> None:
        while not await self._driver.asked_to_stop():
            await asyncio.sleep(_LISTEN)
        self._stopped = True
        for tally in self._tallies:
            tally.stopping = True

    async def _work(self, block: Block) -> Outcome:
        tally, journal = Tally(stopping=self._stopped), _BlockJournal(block, self._before)
        self._tallies.append(tally)
        fatal = None
        try:
            async with self._preparing:
                if self._prepared is None:
                    self._prepared = await asyncio.to_thread(_prepare, self._job)
            recipe, constitution, engines = self._prepared
            generator = journaled_generator(recipe, constitution, engines, journal, tally)
            rows = (Row("", item.prompt, None, "", item.given) for item in block.items)
            await Runner(generator, journal, tally, len(block.items)).run(rows)
        except Interrupted:
            pass
        except CaiError as exc:
            fatal = type(exc).__name__, f"a worker on {self._place}: {exc}"
        except Exception as exc:  # the boundary of a block: what nobody foresaw ends the run, and is told where it runs
            fatal = "EngineError", f"a worker on {self._place}: {type(exc).__name__}: {exc}"
        finally:
            self._tallies = [one for one in self._tallies if one is not tally]
        with journal:
            return Outcome(block.number, journal.outcomes(), journal.made, tally.calls_replayed, fatal)


class _Before:
    """The calls that were finished before: looked for where the run was started, many at a time."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._asked: list[bytes] = []
        self._answer: asyncio.Task[dict[bytes, bytes]] | None = None

    async def find(self, keys: list[bytes]) -> dict[bytes, bytes]:
        """The results of those that are finished."""
        self._asked += keys
        if self._answer is None:
            self._answer = asyncio.create_task(self._ask())
        found = await asyncio.shield(self._answer)
        return {key: found[key] for key in keys if key in found}

    async def _ask(self) -> dict[bytes, bytes]:
        await asyncio.sleep(_GATHER)
        asked, self._asked, self._answer = self._asked, [], None
        return await self._driver.find(asked)


class _BlockJournal(Database):
    """A block's journal, in memory; what is not in it may be in the run's, `before`."""

    def __init__(self, block: Block, before: _Before | None) -> None:
        super().__init__(Path(":memory:"))
        self._items: list[Item] = block.items
        self._before = before
        self.made: list[Call] = []

    async def find(self, keys: list[bytes]) -> dict[bytes, bytes]:
        """The results of those calls that are finished, here or before."""
        here = self.call_results(keys)
        missing = [key for key in keys if key not in here]
        return here | (await self._before.find(missing) if missing and self._before else {})

    def add_calls(self, calls: list[Call]) -> None:
        """Keep finished calls, and remember that they are new."""
        super().add_calls(calls)
        self.made += calls

    def outcomes(self) -> list[RowOutcome]:
        """One for each row, in their order."""
        rows = [RowOutcome()] * len(self._items)
        for failed in self.quarantined():
            rows[failed.position] = RowOutcome(reason=failed.reason, detail=failed.detail)
        places = {item.prompt.id: position for position, item in enumerate(self._items)}
        for record in self.records():
            rows[places[record.prompt.id]] = RowOutcome(record=msgspec.json.encode(record))
        return rows

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.close()


def _prepare(job: Job) -> tuple[Recipe, Constitution, Engines]:
    """What all blocks of a worker share. Raises `ConfigError` where this node cannot do what the driver asks."""
    if job.code != code_here():
        raise ConfigError(f"cai is {code_here()} here, and {job.code} where the run was started; install the same version")
    recipe, constitution = unpacked_recipe(job), Constitution.model_validate_json(job.constitution)
    prepare_checks(constitution.comparing, recipe.judge.allow_python)
    engines = _build_engines(recipe, job.policy is not None, job.calibrations)
    here = [described(one) for one in (engines.policy, *engines.judges.values()) if one]
    for there, found in zip([*filter(None, [job.policy]), *job.judges], here, strict=True):
        if there != found:
            raise ConfigError(f"the model is {found} here, and {there} where the run was started; put the same one here")
    return recipe, constitution, engines


def _build_engines(recipe: Recipe, with_policy: bool, files: dict[str, str]) -> Engines:
    """As the driver planned them: one for each model, and another where the same one gives rewards."""
    made: dict[tuple[ModelConfig, bool], Engine] = {}

    def engine(model: ModelConfig, reward: bool = False, section: str = "policy") -> Engine:
        reward = reward and not model.model.startswith("scripted:")
        if (model, reward) not in made:
            made[model, reward] = build_engine(model, reward, section)
        return made[model, reward]

    policy = engine(recipe.policy) if with_policy else None
    sections = zip(judge_sections(recipe.judge), section_names(recipe), strict=True)
    asked = [(one, name) for one, name in sections if one.method != "checks"]
    judges = {one: engine(recipe.judge_model(one), one.method == "reward-model", name) for one, name in asked}
    calibrations = {name: Document(text, name).validate(Calibration) for name, text in files.items()}
    return Engines(policy, judges, {name: LoadedCalibration(one, files[name]) for name, one in calibrations.items()})
