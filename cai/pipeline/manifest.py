"""What `manifest.json` says of a run: counts, drops by reason, token usage, versions, hashes, timings."""

from __future__ import annotations

import datetime
import hashlib
import platform
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from cai.errors import CaiError, Interrupted, StoreError
from cai.generation import Tally
from cai.pipeline.planning import Plan
from cai.store import RunFolder

_VERSIONS = ("cai-toolkit", "torch", "transformers", "datasets", "pyarrow")


class Manifest:
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
            if before.get("source_hash") != source_hash or before.get("files") != file_hashes(self._folder.path / "data"):
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
            "versions": {"python": platform.python_version(), **installed_versions()},
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


def installed_versions() -> dict[str, str]:
    """Of the packages that decide what a run makes, where they are installed."""
    versions = {}
    for package in _VERSIONS:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def file_hashes(data: Path) -> dict[str, str]:
    """SHA-256 of every file, by its path below `data`."""
    hashes = {}
    for file in sorted(data.rglob("*.parquet")):
        with file.open("rb") as handle:
            hashes[str(file.relative_to(data))] = hashlib.file_digest(handle, "sha256").hexdigest()
    return hashes
