"""Imports point one way, and what is heavy is imported only where it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cai"
ORDER = [
    {"errors"},
    {"documents"},
    {"servers", "recipes"},
    {"config"},
    {"types", "seeds"},
    {"store", "prompts", "constitution", "models"},
    {"weights", "cpu", "control_tokens", "intervals", "report"},
    {"reliability", "rewards"},
    {"engines"},
    {"judging"},
    {"generation"},
    {"distributed"},
    {"dataset", "training"},
    {"evaluation"},
    {"review"},
    {"pipeline"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
HEAVY = {"torch", "transformers", "trl", "vllm", "ray", "peft", "accelerate", "aiohttp"}
MAY_BE_HEAVY = {"weights", "cpu", "rewards", "engines", "training", "evaluation"}
ONLY_HERE = {"ray": PACKAGE / "distributed" / "cluster.py"}
"""What is imported in one file alone."""
FILES = [
    file for file in sorted(PACKAGE.rglob("*.py")) if file.name not in ("__init__.py", "__main__.py") or file.parent != PACKAGE
]


def part(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> Iterator[str]:
    """Every imported module, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"cai.{alias.name}" for alias in node.names) if node.module == "cai" else (node.module or "",)


def test_every_part_has_a_place_in_the_order() -> None:
    assert {part(file) for file in FILES} <= RANK.keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file: Path) -> None:
    for module in imported(file):
        if module.startswith("cai."):
            target = module.split(".")[1]
            assert target == part(file) or RANK[target] < RANK[part(file)], f"{part(file)} imports {module}"
        top = module.split(".")[0]
        if top in ONLY_HERE:
            assert file == ONLY_HERE[top], f"{file} imports {module}"
        elif top in HEAVY:
            assert part(file) in MAY_BE_HEAVY, f"{part(file)} imports {module}"


@pytest.mark.parametrize("command", ["import cai", "import cai.cli.main"])
def test_nothing_heavy_is_loaded_before_it_is_needed(command: str) -> None:
    heavy = sorted(HEAVY | {"datasets", "pyarrow", "pandas", "numpy"})
    code = f"{command}; import sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_exported_names_exist() -> None:
    import cai

    assert [name for name in cai.__all__ if not hasattr(cai, name)] == []
