"""`--ray [ADDRESS]` and `--workers N`, which need no Ray to be read."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from cai.cli import generate
from cai.cli.main import app
from cai.config import Recipe
from tests.runs import SCRIPTED, SMALL, command

ARGUMENTS = ("generate", "-c", str(SMALL), "-m", f"scripted:{SCRIPTED}:respond", "--dry-run")


@pytest.mark.parametrize(
    ("arguments", "address", "source"),
    [
        (("--ray",), "local", "red-team"),
        (("--ray", "auto"), "auto", "red-team"),
        (("--ray", "head-1.cluster:6379", "benign"), "head-1.cluster:6379", "benign"),
        (("--ray", "[fd00::1]:6379"), "[fd00::1]:6379", "red-team"),
        (("--ray=10.0.0.1:6379",), "10.0.0.1:6379", "red-team"),
        (("--ray", "benign"), "local", "benign"),
        (("--ray", "--workers", "3"), "local", "red-team"),
        (("--", "benign"), None, "benign"),
        ((), None, "red-team"),
    ],
)
def test_an_address_may_follow_and_is_told_from_prompts(arguments, address, source, monkeypatch):
    seen: list[Recipe] = []
    monkeypatch.setattr(generate, "show_dry_run", lambda recipe, out: seen.append(recipe))
    done: Any = CliRunner().invoke(app, [*ARGUMENTS, *arguments])
    assert done.exit_code == 0, done.output
    [recipe] = seen
    assert recipe.ray.address == address
    assert recipe.prompts.source == source
    assert recipe.ray.workers == (3 if "--workers" in arguments else 1)


def test_workers_without_a_cluster_are_refused():
    done = command(*ARGUMENTS, "--workers", 2)
    assert done.returncode == 2
    assert "--workers is for a Ray cluster: add --ray" in done.stderr


@pytest.mark.parametrize("address", ["ray://head:10001", "head"])
def test_an_address_that_is_none_is_refused(address):
    done = command(*ARGUMENTS, f"--ray={address}")
    assert done.returncode == 2
    assert "ray.address: expected local, auto or HOST:PORT" in done.stderr
    assert ("`ray job submit`" in done.stderr) == ("://" in address)
