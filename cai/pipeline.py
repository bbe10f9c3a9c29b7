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
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cai.config import JudgeConfig, ModelConfig, Recipe
from cai.constitution import Constitution, load_constitution, to_yaml
from cai.engines import Engine, build_engine
from cai.errors import CaiError, CapabilityError, ConfigError, EngineError, Interrupted, PromptSourceError, StoreError
from cai.generation import Generator, JournaledEngine, Runner, Tally, calls_per_prompt, template_hash
from cai.generation.estimate import Estimate, estimate
from cai.judging import NEEDS, build_judge, usable_principles
from cai.judging.calibration import check_fits, load_calibration
from cai.judging.checks import prepare as prepare_checks
from cai.prompts import PairRow, Row, count_prompts, read_pairs, read_prompts
from cai.store import Database, Mode, RunFolder
from cai.types import Record

Watch = Callable[[Tally, int | None], AbstractContextManager[None]]
"""Shows a pass while it runs: gets its counters and how many rows there are, where that is known."""
_PATIENCE = 5.0
"""Seconds that a run in a thread has to end when it is to stop at once."""
_CAUSE = 300
"""Characters of the first bad row's detail, in the error of a run that made nothing."""
_VERSIONS = ("cai-toolkit", "torch", "transformers", "datasets", "pyarrow")


@dataclass(frozen=True)
class Plan:
    """A recipe that was checked, with its constitution and the engines that it names."""

    recipe: Recipe
    constitution: Constitution
    policy: Engine | None
    """None where pairs that are there already are labelled, and nothing is generated."""
    judges: dict[JudgeConfig, Engine]
    """The engine of the judge, or of each member of a panel."""

    @property
    def judge_names(self) -> str:
        """Who judges, as the manifest says it."""
        return _judge_names(self.judges)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the records of a run. Two runs that agree in it can share a folder."""
        prompts = self.recipe.prompts.model_dump(exclude={"limit"})
        prompts["source"] = os.path.normpath(prompts["source"])
        generation = self.recipe.generation.model_dump(exclude={"concurrency"}) if self.policy else {}
        return {
            "cai": f"generation code and templates {template_hash()}",
            "constitution": f"{self.constitution.name}@{self.constitution.hash}",
            "seed": self.recipe.seed,
            "policy": self.policy.fingerprint if self.policy else "the completions are given",
            "judge": self.judge_names,
            **{f"judge.{key}": value for key, value in self._judge_section().items()},
            **{f"prompts.{key}": value for key, value in prompts.items()},
            **{f"generation.{key}": value for key, value in generation.items()},
        }

    def _judge_section(self) -> dict[str, Any]:
        """What the judge's section decides; models are named by their fingerprints, a calibration by its content."""
        section = self.recipe.judge.model_dump(mode="json", exclude={"model", "revision", "allow_python"})
        if self.recipe.judge.calibration:
            section["calibration"] = hashlib.sha256(Path(self.recipe.judge.calibration).read_bytes()).hexdigest()[:16]
        return section


def plan(recipe: Recipe) -> Plan:
    """Find and check all that a recipe names, before anything is written or paid for. Raises `ConfigError`."""
    constitution = load_constitution(recipe.constitution)
    if lacking := lacking_principles(constitution, recipe.generation.rounds):
        raise ConfigError(f"generation.rounds: {lacking}")
    if recipe.dataset.ranking != "none" and (missing := [name for name in ("choix", "scipy") if find_spec(name) is None]):
        raise ConfigError(f"dataset.ranking needs {' and '.join(missing)}: pip install 'cai-toolkit[judge]'")
    policy = build_engine(recipe.policy)
    return Plan(recipe, constitution, policy, plan_judges(recipe, constitution, {(recipe.policy, False): policy}))


def plan_judges(
    recipe: Recipe, constitution: Constitution, engines: dict[tuple[ModelConfig, bool], Engine]
) -> dict[JudgeConfig, Engine]:
    """The engines of all judges, made where `engines` has none for the model yet. Raises `ConfigError`."""
    judge = recipe.judge
    prepare_checks(constitution.comparing, judge.allow_python)
    sections = [judge.member(one) for one in judge.members] or [judge]
    found = {}
    for section in sections:
        if section.method != "reward-model" and not usable_principles(section, constitution):
            what = "check" if section.method == "checks" else "preference"
            raise ConfigError(f"constitution '{constitution.name}' has no principle with a '{what}' for the judge; add one")
        if section.method != "checks":
            found[section] = _judge_engine(recipe, section, engines)
    if judge.calibration:
        fingerprint = _judge_names(found)
        calibration = load_calibration(Path(judge.calibration))
        check_fits(calibration, judge.method, fingerprint, f"{constitution.name}@{constitution.hash}")
    return found


def _judge_names(judges: dict[JudgeConfig, Engine]) -> str:
    return ", ".join(engine.fingerprint for engine in dict.fromkeys(judges.values())) or "checks"


def _judge_engine(recipe: Recipe, section: JudgeConfig, engines: dict[tuple[ModelConfig, bool], Engine]) -> Engine:
    model, reward = recipe.judge_model(section), section.method == "reward-model"
    key = model, reward and not model.model.startswith("scripted:")
    if reward and section.model is None:
        raise ConfigError("judge.method: reward-model needs a reward model of its own; name it by --judge-model")
    if key not in engines:
        engines[key] = build_engine(model, reward)
    missing = sorted(NEEDS[section.method] - engines[key].capabilities)
    if missing:
        raise CapabilityError(f"judge.method: {section.method} needs {missing[0]}, which {model.model} does not offer")
    return engines[key]


def plan_labels(recipe: Recipe) -> Plan:
    """The same for a run that only judges. Raises `ConfigError`."""
    constitution = load_constitution(recipe.constitution)
    return Plan(recipe, constitution, None, plan_judges(recipe, constitution, {}))


def lacking_principles(constitution: Constitution, rounds: int) -> str | None:
    """Why a constitution cannot serve so many rounds, and the flags with which it can serve; None where it can."""
    there = len(constitution.critiquing)
    if rounds <= there:
        return None
    flags = f"--set generation.rounds={there}"
    if not there:
        flags += " --set generation.candidates=2 --set generation.pairs=samples"
    return (
        f"{rounds} {'rounds draw' if rounds > 1 else 'round draws'} a principle each without repeating, but constitution "
        f"'{constitution.name}' has {there or 'none'} with critique and revision; this works: {flags}"
    )


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
    return _run_anywhere(partial(_generate, recipe, Path(out), mode, watch, tally), tally)


def label(recipe: Recipe, out: Path, mode: Mode = "continue", watch: Watch | None = None) -> dict[str, Any]:
    """Judge the labelled pairs that `recipe.prompts` names (columns `chosen` and `rejected`), into the folder `out`.

    Of each record, `candidate-0` is the completion that people chose. Returns the manifest, raises as `generate` does.
    """
    tally = Tally()
    return _run_anywhere(partial(_label, recipe, Path(out), mode, watch, tally), tally)


def _run_anywhere(run: Callable[[], dict[str, Any]], tally: Tally) -> dict[str, Any]:
    return _beside_a_loop(run, tally) if _in_event_loop() else run()


def _generate(recipe: Recipe, out: Path, mode: Mode, watch: Watch | None, tally: Tally) -> dict[str, Any]:
    return _make(plan(recipe), read_prompts(recipe.prompts), out, mode, watch, tally)


def _label(recipe: Recipe, out: Path, mode: Mode, watch: Watch | None, tally: Tally) -> dict[str, Any]:
    return _make(plan_labels(recipe), map(_pair_row, read_pairs(recipe.prompts)), out, mode, watch, tally)


def _pair_row(row: PairRow) -> Row:
    if row.pair is None:
        return Row(row.origin, None, row.error, row.raw)
    return Row(row.origin, row.pair.prompt, None, "", (row.pair.chosen, row.pair.rejected))


def read_records(out: Path) -> list[Record]:
    """The records of the last pass in a run folder."""
    database = Database(out / "run" / "journal.sqlite")
    try:
        return list(database.records())
    finally:
        database.close()


def _make(checked: Plan, rows: Iterator[Row], out: Path, mode: Mode, watch: Watch | None, tally: Tally) -> dict[str, Any]:
    recipe = checked.recipe
    _refuse_folder(recipe, out)
    if mode == "fresh" and recipe.judge.calibration and Path(recipe.judge.calibration).resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"judge.calibration: --fresh would delete {recipe.judge.calibration} with the rest of {out}; copy it")
    with RunFolder(out, checked.identity, mode) as folder:
        each = calls_per_prompt(recipe, checked.constitution, checked.policy is None)
        tally.calls_each, tally.judge_calls_each = sum(each.values()), each["judge"]
        manifest = _Manifest(checked, folder, tally)
        try:
            if not (out / "README.md").exists():  # else they describe the dataset that is there until the new one is
                _save_recipe(checked, folder)
            with watch(manifest.tally, count_prompts(recipe.prompts)) if watch else nullcontext():
                _run(checked, folder, manifest.tally, rows)
            _check_result(recipe, manifest.tally, folder)
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
    revision = checked.policy.revision if checked.policy else recipe.policy.revision
    policy = recipe.policy.model_copy(update={"revision": revision})
    judge = _pinned_judge(checked)
    pinned = {"constitution": "constitution.yaml", "policy": policy, "judge": judge}
    folder.write_text("constitution.yaml", to_yaml(checked.constitution))
    if recipe.judge.calibration:
        folder.write_text("calibration.yaml", Path(recipe.judge.calibration).read_text(encoding="utf-8"))
    folder.write_text("recipe.yaml", recipe.model_copy(update=pinned).to_yaml())


def _pinned_judge(checked: Plan) -> JudgeConfig:
    judge = checked.recipe.judge
    if judge.model is not None and judge in checked.judges:
        judge = judge.model_copy(update={"revision": checked.judges[judge].revision})
    members = tuple(
        one.model_copy(update={"revision": checked.judges[judge.member(one)].revision})
        if one.model and one.method != "checks"
        else one
        for one in judge.members
    )
    return judge.model_copy(update={"members": members, "calibration": "calibration.yaml" if judge.calibration else None})


def _run(checked: Plan, folder: RunFolder, tally: Tally, rows: Iterator[Row]) -> None:
    policy = JournaledEngine(checked.policy, folder.database, "policy", tally) if checked.policy else None
    judges = {key: JournaledEngine(engine, folder.database, "judge", tally) for key, engine in checked.judges.items()}
    judge = build_judge(checked.recipe.judge, checked.constitution, judges.__getitem__)
    generator = Generator(checked.recipe, checked.constitution, policy, judge)

    async def run() -> None:
        try:
            await Runner(generator, folder.database, tally).run(rows)
        finally:
            if not tally.aborted:  # an engine that is loading its weights would make us wait
                for engine in filter(None, dict.fromkeys((checked.policy, *checked.judges.values()))):
                    await engine.close()

    asyncio.run(run())


def _check_result(recipe: Recipe, tally: Tally, folder: RunFolder) -> None:
    if tally.read == 0:
        raise PromptSourceError(f"prompts '{recipe.prompts.source}': there are none in it")
    if tally.done != tally.read:
        raise EngineError(f"unaccounted for: {tally.read - tally.done} of {tally.read} rows; the same command continues")
    if not tally.records_made and not tally.records_kept:
        counted = sorted(tally.quarantined.items(), key=lambda item: (-item[1], item[0]))
        reasons = ", ".join(f"{reason}: {count}" for reason, count in counted)
        what = f"none of {tally.read} rows became a record" if tally.read > 1 else "the only row became no record"
        first = next(folder.database.quarantined())
        cause = " ".join(first.detail.split())[:_CAUSE]
        file = folder.run / "quarantine.jsonl"
        raise PromptSourceError(f"{what} ({reasons}); the first, {first.origin}: {cause}; more in {file}")


def _write_dataset(checked: Plan, folder: RunFolder, manifest: _Manifest) -> dict[str, Any]:
    from cai.dataset import choose_example, render_card, write_dataset

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
    example = choose_example(folder.database.records(), checked.recipe.dataset)
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
            "policy": checked.policy.fingerprint if checked.policy else None,
            "judge": checked.judge_names,
            "judge_is_policy": checked.policy in checked.judges.values(),
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
