"""From a recipe to a run folder: checks everything first, generates the records, writes the dataset."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cai.config import ModelConfig, Recipe
from cai.constitution import to_yaml
from cai.engines import Batching, Engine
from cai.errors import CaiError, ConfigError, EngineError, Interrupted, PromptSourceError, StoreError
from cai.generation import Budget, Price, Runner, Tally, calls_per_prompt, journaled_generator
from cai.models import cache_folder
from cai.pipeline.manifest import Manifest, file_hashes, installed_versions
from cai.pipeline.planning import Plan, plan, plan_labels
from cai.prompts import Row, count_prompts, read_pairs, read_prompts
from cai.servers import ServerConfig, is_url
from cai.store import Database, Mirror, Mode, RunFolder, is_remote, local_copy
from cai.types import Record

Watch = Callable[[Tally, int | None], AbstractContextManager[None]]
"""Shows a pass while it runs: gets its counters and how many rows there are, where that is known."""
_COLLECT_AFTER = 50_000
"""New objects between two looks for cycles while calls are made; some MB."""
_AT_ONCE_IN_BATCHES = 10_000
"""Prompts in flight where a server is asked in batches: each waits for hours, and a batch holds what is in flight."""
_PATIENCE = 5.0
"""Seconds that a run in a thread has to end when it is to stop at once."""
_CAUSE = 300
"""Characters of the first bad row's detail, in the error of a run that made nothing."""


def generate(recipe: Recipe, out: Path | str, mode: Mode = "continue", watch: Watch | None = None) -> dict[str, Any]:
    """Run a recipe into the folder `out` and return its manifest; a run that was begun there is continued.

    Raises `ConfigError` before anything is written, `Interrupted` after a Ctrl-C, other `CaiError`s where the run
    cannot go on. Whatever was finished is kept, and the same call continues. `out` may be a URL (`s3://bucket/run`): the
    run then works in a local copy, which is mirrored there.
    """
    tally = Tally()
    return _run_anywhere(partial(_generate, recipe, out, mode, watch, tally), tally)


def label(recipe: Recipe, out: Path, mode: Mode = "continue", watch: Watch | None = None) -> dict[str, Any]:
    """Judge the labelled pairs that `recipe.prompts` names (columns `chosen` and `rejected`), into the folder `out`.

    Of each record, `candidate-0` is the completion that people chose. Returns the manifest, raises as `generate` does.
    """
    tally = Tally()
    return _run_anywhere(partial(_label, recipe, Path(out), mode, watch, tally), tally)


def _run_anywhere(run: Callable[[], dict[str, Any]], tally: Tally) -> dict[str, Any]:
    return _beside_a_loop(run, tally) if _in_event_loop() else run()


def _generate(recipe: Recipe, out: Path | str, mode: Mode, watch: Watch | None, tally: Tally) -> dict[str, Any]:
    checked, rows = plan(recipe), read_prompts(recipe.prompts)
    if not is_remote(out):
        return _make(checked, rows, Path(out), mode, watch, tally)
    local = local_folder(out)

    def stop() -> None:
        tally.stops += 1

    with Mirror(str(out), local).writing(mode == "fresh", stop):
        return _make(checked, rows, local, mode, watch, tally)


def local_folder(out: Path | str) -> Path:
    """Where a run folder is on this machine: itself, or the local copy of one behind a URL."""
    return local_copy(str(out), cache_folder()) if is_remote(out) else Path(out)


def _label(recipe: Recipe, out: Path, mode: Mode, watch: Watch | None, tally: Tally) -> dict[str, Any]:
    return _make(plan_labels(recipe), read_pairs(recipe.prompts), out, mode, watch, tally)


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
    inside = [path for path in checked.calibrations if Path(path).resolve().is_relative_to(out.resolve())]
    if mode == "fresh" and inside:
        raise ConfigError(f"judge.calibration: --fresh would delete {inside[0]} with the rest of {out}; copy it")
    with RunFolder(out, checked.identity, mode) as folder:
        each = calls_per_prompt(recipe, checked.constitution, checked.policy is None)
        tally.calls_each, tally.judge_calls_each = sum(each.values()), each["judge"]
        manifest = Manifest(checked, folder, tally)
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
    folder.write_text("constitution.yaml", to_yaml(checked.constitution))
    for name, text in checked.calibration_files.items():
        folder.write_text(name, text)
    folder.write_text("recipe.yaml", checked.pinned_recipe.to_yaml())


def _run(checked: Plan, folder: RunFolder, tally: Tally, rows: Iterator[Row]) -> None:
    if checked.recipe.ray.address:
        _run_on_ray(checked, folder.database, tally, rows)
        return
    budget = Budget(checked.recipe.budget, _prices(checked), folder.database.usage(), tally)
    told = checked.recipe, checked.constitution, checked.engines
    generator = journaled_generator(*told, folder.database, tally, budget)

    at_once = checked.recipe.generation.concurrency
    if any(model.server.batch for model in _models(checked)):
        at_once = max(at_once, _AT_ONCE_IN_BATCHES)
    for engine in filter(None, (checked.policy, *checked.judges.values())):
        if isinstance(engine, Batching):
            engine.keep_batches(folder.database, tally.batches)

    async def run() -> None:
        try:
            await Runner(generator, folder.database, tally, at_once).run(rows)
        finally:
            for engine in _closing(checked, tally):
                await engine.close()

    with _rare_collections(), asyncio.Runner(loop_factory=_fast_loop(checked)) as runner:
        runner.run(run())


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Look for reference cycles less often, and not among what is there already: with hundreds of calls in flight that was 20
    to 45 % of the work of asking a server."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _closing(checked: Plan, tally: Tally) -> list[Engine]:
    """The engines to close: all; after a stop at once those of servers, since one that loads weights would make us wait."""
    recipe = checked.recipe
    models = {engine: recipe.judge_model(section).model for section, engine in checked.judges.items()}
    if checked.policy:
        models[checked.policy] = recipe.policy.model
    return [engine for engine, model in models.items() if is_url(model) or not tally.aborted]


def _prices(checked: Plan) -> dict[str, Price]:
    """What the policy and the judge cost; of several judges the dearest price, since the journal does not tell them apart."""
    recipe = checked.recipe
    judges = [_price(recipe.judge_model(section).server) for section in checked.judges]
    dearest = (max((one.prompt for one in judges), default=0.0), max((one.completion for one in judges), default=0.0))
    return {"policy": _price(recipe.policy.server), "judge": Price(*dearest)}


def _price(server: ServerConfig) -> Price:
    return Price(server.input_price or 0.0, server.output_price or 0.0)


def _models(checked: Plan) -> list[ModelConfig]:
    """Of the policy, where it answers, and of each judge."""
    judges = [checked.recipe.judge_model(section) for section in checked.judges]
    return [checked.recipe.policy, *judges] if checked.policy else judges


def _fast_loop(checked: Plan) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed and a server is asked; else asyncio's own."""
    models = [checked.recipe.policy.model, *(checked.recipe.judge_model(section).model for section in checked.judges)]
    if not any(map(is_url, models)) or find_spec("uvloop") is None:
        return None
    import uvloop

    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _run_on_ray(checked: Plan, database: Database, tally: Tally, rows: Iterator[Row]) -> None:
    from cai.distributed import run_on_ray

    run_on_ray(checked.recipe, checked.constitution, checked.engines, database, tally, rows)


def _check_result(recipe: Recipe, tally: Tally, folder: RunFolder) -> None:
    if tally.read == 0:
        raise PromptSourceError(f"'{recipe.prompts.source}': there are no rows in it")
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


def _write_dataset(checked: Plan, folder: RunFolder, manifest: Manifest) -> dict[str, Any]:
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
    manifest.described = {"dataset": dataset, "source_hash": source, "files": file_hashes(folder.path / "data")}
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
    versions = installed_versions()
    settings = checked.recipe.dataset.model_dump_json()
    digest = hashlib.sha256(f"{versions.get('cai-toolkit')}\n{versions.get('pyarrow')}\n{settings}\n".encode())
    for code in sorted((Path(__file__).parent.parent / "dataset").glob("*.py")):
        digest.update(code.read_bytes())
    for record in folder.database.encoded_records():
        digest.update(record)
    return digest.hexdigest()
