"""A wheel that is built and put elsewhere finds its constitutions, prompts, templates and recipes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from cai.cli.doctor import EXTRAS

REPOSITORY = Path(__file__).parent.parent


def test_a_wheel_carries_what_it_needs(tmp_path: Path) -> None:
    build = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "-w", str(tmp_path), str(REPOSITORY)]
    subprocess.run([sys.executable, *build], check=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "elsewhere")
    assert "cai/py.typed" in names
    assert {"cai/_shipped/pipelines/demo.yaml", "cai/_shipped/pipelines/demo/brief.yaml"} <= set(names)
    assert "cai/training/launch/fsdp.yaml" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "constitutions/"))]

    code = (
        "import sys, pathlib, cai, cai.prompts, cai.constitution as c\n"
        "assert str(pathlib.Path(cai.__file__)).startswith(sys.argv[1]), cai.__file__\n"
        "print(c.built_in_names(), cai.prompts.built_in_sets(), cai.load_recipe('demo-dataset', []).prompts.limit)\n"
        "recipe = cai.Recipe.model_validate({'policy': {'model': sys.argv[2]}, 'prompts': {'limit': 3}})\n"
        "print(cai.generate(recipe, pathlib.Path('run'))['dataset']['records'])\n"
    )
    script = f"scripted:{Path(__file__).parent / 'scripted.py'}:respond"
    elsewhere = str(tmp_path / "elsewhere")
    done = subprocess.run(
        [sys.executable, "-c", code, elsewhere, script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": elsewhere},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "['concise-and-clear', 'harmless', 'helpful-honest-harmless'] ['benign', 'red-team'] 16" in done.stdout
    assert done.stdout.strip().endswith("3")


def test_doctor_knows_each_extra_and_what_it_brings() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert project.keys() - EXTRAS.keys() == {"dev"}
    for extra, needed in EXTRAS.items():
        named = [re.split(r"[\[><=; ]", one)[0].replace("scikit-learn", "sklearn") for one in project[extra]]
        own = [name for name in named if name != "cai-toolkit"]
        assert sorted((*own, *(EXTRAS["local"] if "cai-toolkit" in named else ()))) == sorted(needed), extra
