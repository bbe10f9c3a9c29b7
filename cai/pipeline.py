"""From a recipe to a run folder: checks everything first, generates the records, writes the dataset."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from cai.config import Recipe
from cai.constitution import Constitution, load_constitution, to_yaml
from cai.engines import Capability, Engine, build_engine
from cai.errors import CaiError, CapabilityError, ConfigError, EngineError, Interrupted, PromptSourceError, StoreError
from cai.generation import Generator, JournaledEngine, Runner, Tally, calls_per_prompt, template_hash
from cai.generation.estimate import Estimate, estimate
from cai.judging import ChoiceJudge
from cai.prompts import Row, count_prompts, read_prompts
from cai.store import Mode, RunFolder

Watch = Callable[[Tally, int | None], AbstractContextManager[None]]
"""Shows a pass while it runs: gets its counters and how many rows there are, where that is known."""
_NEEDS: dict[str, Capability] = {"choice": "choice_logprobs"}
_PATIENCE = 5.0
"""Seconds that a run in a thread has to end when it is to stop at once."""
_VERSIONS = ("cai-toolkit", "torch", "transformers", "datasets", "pyarrow")


@dataclass(frozen=True)
class Plan:
    """A recipe that was checked, with its constitution and the engines that it names."""

    recipe: Recipe
    constitution: Constitution
    policy: Engine
    judge: Engine

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the records of a run. Two runs that agree in it can share a folder."""
        prompts = self.recipe.prompts.model_dump(exclude={"limit"})
        prompts["source"] = os.path.normpath(prompts["source"])
        generation = self.recipe.generation.model_dump(exclude={"concurrency"})
        return {
            "cai": f"generation code and templates {template_hash()}",
            "constitution": f"{self.constitution.name}@{self.constitution.hash}",
            "seed": self.recipe.seed,
            "policy": self.policy.fingerprint,
            "judge": self.judge.fingerprint,
            "judge.method": self.recipe.judge.method,
            "judge.principles": self.recipe.judge.principles,
            **{f"prompts.{key}": value for key, value in prompts.items()},
            **{f"generation.{key}": value for key, value in generation.items()},
        }


def plan(recipe: Recipe) -> Plan:
    """Find and check all that a recipe names, before anything is written or paid for. Raises `ConfigError`."""
    constitution = load_constitution(recipe.constitution)
    generation = recipe.generation
    if generation.rounds > len(constitution.critiquing):
        raise ConfigError(
            f"generation.rounds: {generation.rounds} rounds draw a principle each without repeating, but constitution "
            f"'{constitution.name}' has {len(constitution.critiquing)} with critique and revision; lower it"
        )
    if not constitution.comparing:
        raise ConfigError(f"constitution '{constitution.name}' has no principle with a 'preference' for the judge; add one")
    policy = build_engine(recipe.policy)
    judge = policy if recipe.judge_model == recipe.policy else build_engine(recipe.judge_model)
    needed = _NEEDS[recipe.judge.method]
    if needed not in judge.capabilities:
        raise CapabilityError(
            f"judge.method: {recipe.judge.method} needs {needed}, which {recipe.judge_model.model} does not offer"
        )
    return Plan(recipe, constitution, policy, judge)


def dry_run(recipe: Recipe) -> tuple[Plan, Estimate]:
    """What a run would do; reads the prompts and makes no call."""
    checked = plan(recipe)
    return checked, estimate(recipe, checked.constitution, read_prompts(recipe.prompts))


def generate(recipe: Recipe, out: Path | str, mode: Mode = "continue", watch: Watch | None = None) -> dict[str, Any]:
    """Run a recipe into the folder `out` and return its manifest; a run that was begun there is continued.

    Raises `ConfigError` before anything is written, `Interrupted` after a Ctrl-C, other `CaiError`s where the run
    cannot go on. Whatever was finished is kept, and the same call continues.
    """
    tally = Tally()
    run = partial(_generate, recipe, Path(out), mode, watch, tally)
    return _beside_a_loop(run, tally) if _in_event_loop() else run()


def _generate(recipe: Recipe, out: Path, mode: Mode, watch: Watch | None, tally: Tally) -> dict[str, Any]:
    checked = plan(recipe)
    rows = read_prompts(recipe.prompts)
    _refuse_folder(recipe, out)
    with RunFolder(out, checked.identity, mode) as folder:
        tally.calls_each = sum(calls_per_prompt(recipe, checked.constitution).values())
        manifest = _Manifest(checked, folder, tally)
        try:
            if not (out / "README.md").exists():  # else they describe the dataset that is there until the new one is
                _save_recipe(checked, folder)
            with watch(manifest.tally, count_prompts(recipe.prompts)) if watch else nullcontext():
                _run(checked, folder, manifest.tally, rows)
            _check_result(recipe, manifest.tally)
            return _write_dataset(checked, folder, manifest)
        except CaiError as exc:
            manifest.write_failure(exc)
            raise
        except KeyboardInterrupt:
            stopped = Interrupted("stopped; the same command continues")
            manifest.write_failure(stopped)
            raise stopped from None


def _refuse_folder(recipe: Recipe, out: Path) -> None:
    """Refuse a folder that `datasets` could not read afterwards, or that holds the very prompts of the run."""
    whole = str(out.absolute())
    odd = [mark for mark in ("[", "::", "$") if mark in whole]
    if odd:
        raise ConfigError(f"-o {out}: `datasets` cannot load from a path that holds '{odd[0]}'; use another -o")
    source = Path(os.path.expanduser(recipe.prompts.source))
    if source.exists() and source.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"prompts '{source}' lie in the run folder {out}, which the run rewrites; use another -o")


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _beside_a_loop(run: Callable[[], dict[str, Any]], tally: Tally) -> dict[str, Any]:
    """Run in a thread, as a notebook's loop needs; a Ctrl-C comes here and is handed on."""
    pool = ThreadPoolExecutor(1)
    ended = pool.submit(run)
    pool.shutdown(wait=False)
    while True:
        try:
            wait([ended], _PATIENCE if tally.stops > 1 else None)
            break
        except KeyboardInterrupt:
            tally.stops += 1
    if tally.stops and not (ended.done() and ended.exception()):
        raise Interrupted("stopped; the same command continues")
    return ended.result()


def _save_recipe(checked: Plan, folder: RunFolder) -> None:
    """Recipe and constitution, such that they make the same requests again: the Hub's models by their commit."""
    recipe = checked.recipe
    policy = recipe.policy.model_copy(update={"revision": checked.policy.revision})
    judge = recipe.judge
    if judge.model is not None:
        judge = judge.model_copy(update={"revision": checked.judge.revision})
    pinned = {"constitution": "constitution.yaml", "policy": policy, "judge": judge}
    folder.write_text("constitution.yaml", to_yaml(checked.constitution))
    folder.write_text("recipe.yaml", recipe.model_copy(update=pinned).to_yaml())


def _run(checked: Plan, folder: RunFolder, tally: Tally, rows: Iterator[Row]) -> None:
    policy = JournaledEngine(checked.policy, folder.database, "policy", tally)
    judge = ChoiceJudge(JournaledEngine(checked.judge, folder.database, "judge", tally))
    generator = Generator(checked.recipe, checked.constitution, policy, judge)

    async def run() -> None:
        try:
            await Runner(generator, folder.database, tally).run(rows)
        finally:
            if not tally.aborted:  # an engine that is loading its weights would make us wait
                await checked.policy.close()
                await checked.judge.close()

    asyncio.run(run())


def _check_result(recipe: Recipe, tally: Tally) -> None:
    if tally.read == 0:
        raise PromptSourceError(f"prompts '{recipe.prompts.source}': there are none in it")
    if tally.done != tally.read:
        raise EngineError(f"{tally.read - tally.done} of {tally.read} rows are unaccounted for; the same command continues")
    if not tally.records_made and not tally.records_kept:
        counted = sorted(tally.quarantined.items(), key=lambda item: (-item[1], item[0]))
        reasons = ", ".join(f"{count} {reason}" for reason, count in counted)
        raise PromptSourceError(f"none of {tally.read} rows became a record: {reasons}; see run/quarantine.jsonl")


def _write_dataset(checked: Plan, folder: RunFolder, manifest: _Manifest) -> dict[str, Any]:
    from cai.dataset import render_card, write_dataset

    source = _source_hash(checked, folder)
    dataset = manifest.dataset_of(source)
    if dataset is None:
        with folder.new_data() as data:
            dataset = write_dataset(folder.database.records(), data, checked.recipe.dataset).to_json()
            _refuse_lost(dataset, manifest.tally)
            manifest.described = {}
    else:
        _refuse_lost(dataset, manifest.tally)
    manifest.described = {"dataset": dataset, "source_hash": source, "files": _hashes(folder.path / "data")}
    done = manifest.tell("done", folder.write_quarantine(), {})
    example = next(folder.database.records())
    _save_recipe(checked, folder)
    folder.write_text("README.md", render_card(done, checked.recipe, checked.constitution, example))
    folder.write_json("manifest.json", done)
    return done


def _refuse_lost(dataset: dict[str, Any], tally: Tally) -> None:
    """Records that were made and are not in the dataset are never passed over."""
    expected = tally.records_made + tally.records_kept
    if dataset["records"] != expected:
        raise StoreError(f"the dataset has {dataset['records']} of {expected} records; the same command continues")


def _source_hash(checked: Plan, folder: RunFolder) -> str:
    """Of all that decides the bytes in `data/`: the records in their order, the settings, the code that writes them."""
    versions = _installed()
    settings = checked.recipe.dataset.model_dump_json()
    digest = hashlib.sha256(f"{versions.get('cai-toolkit')}\n{versions.get('pyarrow')}\n{settings}\n".encode())
    for code in sorted((Path(__file__).parent / "dataset").glob("*.py")):
        digest.update(code.read_bytes())
    for record in folder.database.encoded_records():
        digest.update(record)
    return digest.hexdigest()


def _hashes(data: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path below `data`."""
    hashes = {}
    for file in sorted(data.rglob("*.parquet")):
        with file.open("rb") as handle:
            hashes[str(file.relative_to(data))] = hashlib.file_digest(handle, "sha256").hexdigest()
    return hashes


class _Manifest:
    """What `manifest.json` says of a run; each time the run is started adds a session."""

    def __init__(self, checked: Plan, folder: RunFolder, tally: Tally) -> None:
        self._plan, self._folder, self.tally = checked, folder, tally
        self._began = time.time()
        self._before = _earlier(folder)
        self.described: dict[str, Any] = {
            key: self._before[key] for key in ("dataset", "source_hash", "files") if key in self._before
        }
        """What it says of `data/`, which stays as it is until there is a new one."""

    def dataset_of(self, source_hash: str) -> dict[str, Any] | None:
        """What is in `data/`, where that was made from the same and is still as it was written; else None."""
        before = self.described
        try:
            if before.get("source_hash") != source_hash or before.get("files") != _hashes(self._folder.path / "data"):
                return None
        except OSError:  # a dangling link, for one
            return None
        dataset: dict[str, Any] | None = before.get("dataset")
        return dataset

    def write_failure(self, failure: CaiError) -> None:
        """Write what there is to tell of a run that did not end well."""
        status = "interrupted" if isinstance(failure, Interrupted) else "failed"
        with suppress(StoreError):  # where the disk is full, the failure says so already
            told = self.tell(status, self._folder.write_quarantine(), {"error": str(failure)})
            self._folder.write_json("manifest.json", told)

    def tell(self, status: str, quarantined: dict[str, int], extra: dict[str, Any]) -> dict[str, Any]:
        """The manifest; `quarantined` counts the rows that failed, by reason."""
        tally, checked = self.tally, self._plan
        return {
            "status": status,
            "constitution": {
                **checked.constitution.model_dump(include={"name", "version", "license"}),
                "hash": checked.constitution.hash,
            },
            "policy": checked.policy.fingerprint,
            "judge": checked.judge.fingerprint,
            "judge_is_policy": checked.judge is checked.policy,
            "prompts": {
                "source": checked.recipe.prompts.source,
                "read": tally.read,
                "duplicates": tally.duplicates,
                "quarantined": quarantined,
            },
            **extra,
            **self.described,
            "usage": {role: usage._asdict() for role, usage in self._folder.database.usage().items()},
            "sessions": [*self._before.get("sessions", []), self._session()],
            "versions": {"python": platform.python_version(), **_installed()},
        }

    def _session(self) -> dict[str, Any]:
        tally = self.tally
        return {
            "started": datetime.datetime.fromtimestamp(self._began, datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self._began, 1),
            "records_made": tally.records_made,
            "calls_made": tally.calls_made,
            "calls_replayed": tally.calls_replayed,
            "prompt_tokens": tally.prompt_tokens,
            "completion_tokens": tally.completion_tokens,
        }


def _earlier(folder: RunFolder) -> dict[str, Any]:
    """The manifest that is there; a damaged one is written anew without what it said, since it decides nothing."""
    try:
        before = folder.read_json("manifest.json") or {}
    except StoreError:
        return {}
    return before if isinstance(before.get("sessions", []), list) else {}


def _installed() -> dict[str, str]:
    versions = {}
    for package in _VERSIONS:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
