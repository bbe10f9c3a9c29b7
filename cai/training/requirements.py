"""The packages that training needs."""

from __future__ import annotations

from importlib.util import find_spec

from cai.errors import ConfigError

REQUIREMENTS = ("torch", "transformers", "gguf", "trl", "accelerate", "peft", "scipy")


def check_installed() -> None:
    """Raises `ConfigError` where one of them is missing."""
    if missing := [name for name in REQUIREMENTS if find_spec(name) is None]:
        raise ConfigError(f"training needs {', '.join(missing)}: pip install 'cai-toolkit[train]'")
