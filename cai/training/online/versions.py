"""What rewards hang on, as names with hashes: where one of them changes, what is trained by it would be another model."""

from __future__ import annotations

import hashlib
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from cai.config import JudgeConfig
from cai.constitution import load_constitution
from cai.errors import ConfigError
from cai.models import locate
from cai.training.online.settings import Source


def version_of(source: Source) -> dict[str, Any]:
    """What a source rewards by, each part as NAME@VERSION. Raises `ConfigError` for what is not there."""
    if source.model is not None:
        return {"model": _model(source.model, rewards=True)}
    if source.function is not None:
        return {"function": f"{source.name}@{_digest(function_file(source.function))}"}
    constitution = load_constitution(source.constitution or "")
    told = {"constitution": f"{constitution.name}@{constitution.hash}"}
    return {**told, "judge": _judge(source.judge)} if source.judge else told


def _model(name: str, revision: str | None = None, rewards: bool = False) -> str:
    return f"{Path(name).name}@{locate(name, revision, rewards).version}"


def _judge(judge: JudgeConfig) -> dict[str, Any]:
    told: dict[str, Any] = judge.model_dump(mode="json", exclude_defaults=True, exclude={"server", "vllm"})
    is_elsewhere = judge.model is None or ":" in judge.model
    return told if is_elsewhere else {**told, "model": _model(judge.model or "", judge.revision)}


def function_file(target: str) -> Path:
    """The file of the function that FILE.py:NAME or package.module:NAME means. Raises `ConfigError`."""
    place = target.rpartition(":")[0]
    path = Path(os.path.expanduser(place))
    if not place.endswith(".py"):
        path = _module_file(place) or path
    if not path.is_file():
        raise ConfigError(f"function '{target}': there is no {place or 'file'}; expected FILE.py:NAME or package.module:NAME")
    return path


def _module_file(module: str) -> Path | None:
    """The file of a module that can be imported; none is, nor the packages above it, as `importlib.util.find_spec` does."""
    folders, spec = None, None
    for end in [place for place, letter in enumerate(module + ".") if letter == "."]:
        found = (finder.find_spec(module[:end], folders, None) for finder in sys.meta_path)
        with suppress(ImportError, ValueError, KeyError):  # the last for a package without __init__ in another such
            spec = next((one for one in found if one is not None), None)
        folders = list(spec.submodule_search_locations or ()) if spec else []
    return Path(spec.origin) if spec and spec.origin else None


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]
