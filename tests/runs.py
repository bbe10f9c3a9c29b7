"""Runs for tests: recipes on the scripted engine, the command in a process of its own, and what a run left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet

from cai.cli.main import main
from cai.config import Recipe
from cai.pipeline import generate

SCRIPTED = Path(__file__).parent / "scripted.py"
SMALL = SCRIPTED.with_name("small.yaml")
ROOT = Path(__file__).parent.parent
CALLS = 1 + 2 * 2 + 4 * 2
"""Of one prompt by the recipes here: an answer, two rounds, four principles in two orders."""

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["pytest", "pandas", "cai.dataset", "tests.test_resume", "tests.test_cli"])


def recipe(function: str = "respond", **sections: Any) -> Recipe:
    """Six built-in prompts on a function of `scripted.py`, four at once, by a small constitution; `sections` win."""
    data: dict[str, Any] = {
        "constitution": str(SMALL),
        "policy": {"model": f"scripted:{SCRIPTED}:{function}"},
        "prompts": {"source": "benign", "limit": 6},
        "generation": {"concurrency": 4},
    }
    for name, value in sections.items():
        data[name] = {**data.get(name, {}), **value} if isinstance(value, dict) else value
    return Recipe.model_validate(data)


def model(folder: Path, source: str) -> str:
    """The name of a model whose function `respond` is written in `source`."""
    file = folder / "model.py"
    file.write_text("from tests.scripted import *\nfrom tests.scripted import respond as usual\n" + source)
    return f"scripted:{file}:respond"


def written_rows(folder: Path, *rows: Any) -> str:
    """The name of a JSONL file with these rows."""
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def data_bytes(out: Path) -> dict[str, bytes]:
    """Every file of the dataset, by its path."""
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted((out / "data").rglob("*.parquet"))}


def rows(out: Path, name: str) -> list[dict[str, Any]]:
    """All rows of one configuration."""
    files = sorted((out / "data" / name).glob("*.parquet"))
    return [row for file in files for row in pyarrow.parquet.ParquetFile(file).read().to_pylist()]


def manifest(out: Path) -> Any:
    return json.loads((out / "manifest.json").read_text())


def quarantine(out: Path) -> list[Any]:
    file = out / "run" / "quarantine.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def kept_calls(out: Path) -> int:
    """How many finished calls the journal holds."""
    journal = out / "run" / "journal.sqlite"
    if not journal.exists():
        return 0
    with closing(sqlite3.connect(journal)) as db:
        known = db.execute("SELECT 1 FROM sqlite_master WHERE name='calls'").fetchone()
        return int(db.execute("SELECT COUNT(*) FROM calls").fetchone()[0]) if known else 0


def log_lines(log: Path, event: str = "answered") -> list[dict[str, str]]:
    """What the scripted functions wrote into their log."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [line for line in lines if line["event"] == event]


def environment(**variables: Any) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **{name: str(value) for name, value in variables.items()}}


def start(*args: Any, **options: Any) -> subprocess.Popen[str]:
    """`cai ARGS` as a process; `env` adds variables, `code` is Python to run in place of the command's."""
    env = environment(**options.pop("env", {}))
    command = [sys.executable, "-c", options.pop("code", "from cai.cli.main import main; main()"), *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **options}
    return subprocess.Popen(command, env=env, encoding="utf-8", errors="surrogateescape", **pipes)


def real_command(*args: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """`cai ARGS` to its end."""
    process = start(*args, **options)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err, err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def command(
    *args: Any, stdin: str = "", cwd: Path | None = None, env: dict[str, Any] | None = None
) -> subprocess.CompletedProcess[str]:
    """The same, ten times as fast: in a fork of a process that has everything imported."""
    variables = {**os.environ, **{name: str(value) for name, value in (env or {}).items()}}
    with TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdin", "stdout", "stderr")]
        files[0].write_text(stdin)
        process = forked(_main, [str(arg) for arg in args], files, cwd or Path.cwd(), variables)
        process.join(60)
        out, err = (file.read_bytes().decode("utf-8", "surrogateescape") for file in files[1:])
    assert "Traceback" not in err, err
    return subprocess.CompletedProcess(args, process.exitcode, out, err)


def _main(args: list[str], files: list[Path], cwd: Path, variables: dict[str, str]) -> None:
    os.chdir(cwd)
    os.environ.update(variables)
    for number, (file, mode) in enumerate(zip(files, "rww", strict=True)):
        with file.open(mode) as opened:
            os.dup2(opened.fileno(), number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode, encoding="utf-8") for number, mode in enumerate("rww"))
    sys.argv = ["cai", *args]
    main()


def wait_until(condition: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def forked(function: Callable[..., None], *args: Any) -> Any:
    """A process that runs `function`, started in a few milliseconds from a server that has everything imported."""
    process = _processes.Process(target=function, args=args)
    process.start()
    return process


def generate_in(variables: dict[str, str], recipe: Recipe, out: Path) -> None:
    """What a forked process does: the run, with variables in its environment."""
    os.environ.update(variables)
    generate(recipe, out)
