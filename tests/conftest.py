"""Fixtures: recipes for the scripted engine, and the log that its functions write."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from cai.config import Recipe
from tests.runs import recipe

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts the tests in the background has it ignored

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))


@pytest.fixture
def scripted_recipe() -> Recipe:
    """A recipe on the scripted engine: benign prompts, deterministic answers."""
    return recipe(prompts={"limit": 12})


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the functions of `scripted.py` note their calls."""
    monkeypatch.setenv("CALLS_LOG", str(tmp_path / "calls.log"))
    return tmp_path / "calls.log"
