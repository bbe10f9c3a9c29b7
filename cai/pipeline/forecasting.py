"""What is to be done about each step of a pipeline, told before it is done."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai.errors import ConfigError
from cai.pipeline.checking import check_step
from cai.pipeline.inputs import inputs_of, settings_told
from cai.pipeline.recipe import Pipeline, Settings
from cai.pipeline.steps import Step, find_step, unfold

Entry = dict[str, Any]
"""What the manifest of a pipeline says of one step."""
ASKED = "as asked"
_OF_THE_END = ("limits", "gold.stop")
"""Keys that say where a training ends; with others it goes on."""


@dataclass(frozen=True)
class Choice:
    """Which stages run."""

    start: str | None = None
    """The first one; those before it are taken as they are."""
    until: str | None = None
    """The last one."""
    fresh: bool = False
    """Whether they are made anew in any case."""


@dataclass(frozen=True)
class Verdict:
    """What is to be done about a step."""

    does: str
    """`skip`, `run`, `continue`, `remake`; `maybe` where that hangs on a step before it."""
    why: str = ""


@dataclass(frozen=True)
class Forecast:
    """What a pipeline would do."""

    steps: list[Step]
    verdicts: dict[Step, Verdict]
    """Of the chosen steps."""
    settings: dict[Step, Settings]
    """Of each step that would run, as it was checked."""
    finished: set[Step]
    """The steps whose folders are as they will be."""


def read_manifest(out: Path) -> dict[str, Any]:
    """What `manifest.json` says; empty where there is none, or a damaged one."""
    with suppress(OSError, ValueError):
        found = json.loads((out / "manifest.json").read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


def entries_of(manifest: dict[str, Any]) -> dict[str, Entry]:
    """By folder, what a manifest says of the steps, those among them that were in the pipeline once; nothing where it is of
    something else."""
    told = [*manifest["stages"], *manifest.get("former_stages", ())] if "pipeline" in manifest else []
    return {entry["folder"]: entry for entry in told}


def verdict_on(step: Step, entry: Entry | None) -> Verdict:
    """What is to be done about a step all of whose inputs are there."""
    if entry is None:
        return Verdict("run")
    if entry["state"] == "anew":
        return Verdict("remake", ASKED)
    if changed := _changed(entry, step, inputs_of(step)):
        only_end = all(key.startswith("limits.") or key in _OF_THE_END for key in changed)
        return Verdict("continue" if only_end else "remake", f"changed: {', '.join(changed)}")
    if entry["state"] == "done" and is_done(step):
        return Verdict("skip")
    return Verdict("continue", entry["state"])


def is_done(step: Step) -> bool:
    """Whether its folder says that it was made to the end."""
    return read_manifest(step.folder).get("status") == "done"


def _changed(entry: Entry, step: Step, now: dict[str, str]) -> list[str]:
    """What differs from the inputs that the step was made of, in words."""
    if entry["kind"] != step.kind:
        return [f"{step.kind} in place of {entry['kind']}"]
    before = entry["inputs"]
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    others = [name for name in names if name != "settings"]
    told = json.loads(json.dumps(settings_told(step)))
    keys = _differing(entry.get("settings", {}), told) if "settings" in names else []
    return [*keys, *others] or names


def _differing(before: Any, now: Any, path: str = "") -> list[str]:
    """Dotted keys whose values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        below = [_differing(before.get(key), now.get(key), f"{path}.{key}") for key in sorted({*before, *now})]
        return [key for keys in below for key in keys]
    return [] if before == now else [path.lstrip(".")]


def choose(steps: list[Step], choice: Choice) -> list[Step]:
    """The steps from `start` to `until`. Raises `ConfigError` where one before them has not been made."""
    first = find_step(steps, choice.start, "--from") if choice.start else 0
    last = find_step(steps, choice.until, "--until") if choice.until else len(steps) - 1
    if last < first:
        raise ConfigError(f"--until {choice.until} comes before --from {choice.start}")
    chosen = steps[first : last + 1]
    for step in (one for later in chosen for one in later.reads if one not in chosen):
        if not is_done(step):
            raise ConfigError(f"--from {choice.start}: '{step.name}' ({step.folder}) is not finished; leave out --from")
    return chosen


def forecast(pipeline: Pipeline, out: Path, choice: Choice | None = None) -> Forecast:
    """Check every stage that is to run, and tell what would be done about each; makes nothing. Raises `ConfigError`."""
    choice = choice or Choice()
    entries = entries_of(read_manifest(out))
    steps = unfold(pipeline, out, {(one["name"], one["round"]): folder for folder, one in entries.items()})
    chosen = choose(steps, choice)
    finished = {step for step in steps if step not in chosen and is_done(step)}
    verdicts: dict[Step, Verdict] = {}
    settings: dict[Step, Settings] = {}
    for step in chosen:
        unmade = [one for one in step.reads if one not in finished]
        verdicts[step] = _foreseen(step, entries.get(step.folder.name), unmade, choice.fresh)
        if verdicts[step].does == "skip":
            finished.add(step)
        else:
            settings[step] = check_step(pipeline, step, finished)
    return Forecast(steps, verdicts, settings, finished)


def _foreseen(step: Step, entry: Entry | None, unmade: list[Step], fresh: bool) -> Verdict:
    if entry is None:
        return Verdict("run")
    if fresh:
        return Verdict("remake", ASKED)
    if unmade:
        return Verdict("maybe", f"if {' or '.join(f'@{one.name}' for one in unmade)} comes out differently")
    return verdict_on(step, entry)
