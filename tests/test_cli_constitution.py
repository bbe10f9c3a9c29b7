"""`cai constitution`: what it prints and the exit codes, as a shell sees them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cai.cli.constitution import app
from cai.constitution import built_in_names, load_constitution

MINE = "name: mine\ndescription: d\nlicense: MIT\nextends: [harmless]\nprinciples:\n  - {id: mine, preference: p}\n"


def cai(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`cai constitution ...` in a process of its own: it may leave by `os._exit`."""
    command = [sys.executable, "-m", "cai", "constitution", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_list_names_each_built_in_constitution_with_its_counts() -> None:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["list"])
    assert done.exit_code == 0
    header, *rows = done.output.splitlines()
    assert header.split() == ["name", "principles", "exemplars", "what", "it", "is", "for"]
    assert [row.split()[:3] for row in rows] == [
        [name, str(len(load_constitution(name).principles)), str(len(load_constitution(name).exemplars))]
        for name in built_in_names()
    ]


def test_list_never_cuts_a_name() -> None:
    done = CliRunner(env={"COLUMNS": "50"}).invoke(app, ["list"])
    assert {line.split()[0] for line in done.output.splitlines() if not line.startswith(" ")} == {"name", *built_in_names()}


@pytest.mark.parametrize("name", built_in_names())
def test_show_prints_a_constitution_that_is_the_same_again(tmp_path: Path, name: str) -> None:
    done = CliRunner().invoke(app, ["show", name])
    assert done.exit_code == 0
    (tmp_path / "shown.yaml").write_text(done.stdout)
    assert load_constitution(str(tmp_path / "shown.yaml")) == load_constitution(name)


def test_show_merges_what_is_extended_and_what_it_prints_validates(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    shown = cai("show", tmp_path / "mine.yaml")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "extends" not in shown.stdout
    (tmp_path / "shown.yaml").write_text(shown.stdout)
    validated = cai("validate", tmp_path / "shown.yaml")
    one = load_constitution(str(tmp_path / "mine.yaml"))
    assert (validated.returncode, validated.stderr) == (0, "")
    assert validated.stdout == (
        f"{tmp_path}/shown.yaml: valid. mine 1.0, hash {one.hash}: 19 principles "
        "(18 for critique and revision, 19 for comparison), 5 exemplars\n"
    )


def test_validate_notes_what_the_default_recipe_needs_besides(tmp_path: Path) -> None:
    head = "name: few\ndescription: d\nlicense: MIT\nprinciples:\n"
    (tmp_path / "asks.yaml").write_text(f"{head}- {{id: a, preference: p}}\n")
    (tmp_path / "mends.yaml").write_text(f"{head}- {{id: a, critique: c, revision: r}}\n")
    asks, mends = cai("validate", tmp_path / "asks.yaml"), cai("validate", tmp_path / "mends.yaml")
    assert (asks.returncode, mends.returncode) == (0, 0)
    assert asks.stdout.splitlines()[1:] == [
        "note: for the default recipe 2 rounds draw a principle each without repeating, but constitution 'few' has none with "
        "critique and revision; this works: --set generation.rounds=0 --set generation.candidates=2 "
        "--set generation.pairs=samples"
    ]
    notes = mends.stdout.splitlines()[1:]
    assert [note.rsplit("; ")[-1] for note in notes[:1]] == ["this works: --set generation.rounds=1"]
    assert notes[1:] == ["note: no principle has a 'preference', which the judge of every recipe needs: add one"]


def test_validate_tells_every_fault_with_its_line_and_exits_with_2(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: bad\ndescripton: d\nlicense: MIT\nprinciples:\n  - id: a\n    critque: c\n")
    done = cai("validate", tmp_path / "bad.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"cai: {tmp_path}/bad.yaml: description: this key is required",
        f"{tmp_path}/bad.yaml:6: principles[0].critque: unknown key (did you mean 'critique'?)",
        f"{tmp_path}/bad.yaml:2: descripton: unknown key (did you mean 'description'?)",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "harmles"], "no constitution 'harmles': neither a file nor a built-in name (did you mean 'harmless'?)"),
        (["show"], "Missing argument"),
        (["shwo"], "No such command 'shwo'"),
        ([], "Usage: "),
    ],
)
def test_wrong_usage_exits_with_2_and_no_traceback(arguments: list[str], message: str) -> None:
    done = cai(*arguments)
    assert done.returncode == 2
    assert message in " ".join((done.stderr + done.stdout).split())
    assert "Traceback" not in done.stderr


def test_what_a_file_holds_cannot_rewrite_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text(MINE + 'version: "1\\e[2J"\n')
    (tmp_path / "worse.yaml").write_text(MINE + 'version: "1"\n"\\e[2J": 1\n')
    good, bad = cai("validate", tmp_path / "evil.yaml"), cai("validate", tmp_path / "worse.yaml")
    assert (good.returncode, bad.returncode) == (0, 2)
    assert "mine 1�[2J, hash" in good.stdout
    assert "�[2J: unknown key" in bad.stderr
    assert "\x1b" not in good.stdout + bad.stderr
    shown = cai("show", tmp_path / "evil.yaml").stdout
    assert "\x1b" not in shown
    assert r'version: "1\e[2J"' in shown


def test_a_path_that_is_no_unicode_is_shown_as_well_as_can_be(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.yaml"
    with open(path, "w") as file:
        file.write(MINE)
    command = [sys.executable, "-m", "cai", "constitution", "validate", os.fsdecode(path)]
    done = subprocess.run(command, capture_output=True, check=True, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    assert done.stdout.decode().startswith(f"{tmp_path}/�.yaml: valid.")
