"""`cai doctor`: what is installed, what can run here, and what to install for the rest."""

from __future__ import annotations

import platform
import sys
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec

from cai.engines import REQUIREMENTS, describe_devices, missing_packages
from cai.training import REQUIREMENTS as TRAINING

_PACKAGES = (
    "cai-toolkit",
    "torch",
    "transformers",
    "datasets",
    "huggingface_hub",
    "pyarrow",
    "pydantic",
    "trl",
    "peft",
    "vllm",
)
_LOCAL = ("torch", "transformers", "gguf")
_JUDGE = ("choix", "krippendorff", "matplotlib", "py3langid", "pyphen", "sklearn", "scipy", "textstat")
EXTRAS = {
    "local": _LOCAL,
    "judge": _JUDGE,
    "ray": ("ray",),
    "server": ("aiohttp", "aiolimiter", "tenacity", *(("uvloop",) if sys.platform != "win32" else ())),
    "train": (*TRAINING, "matplotlib", "py3langid"),
    "vllm": (*_LOCAL, "psutil", "vllm"),
}
"""What each extra brings, by the names under which it is imported."""


def doctor() -> None:
    """Print versions, devices, which engines are usable, and what to install for the rest."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    console.print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in _PACKAGES:
        console.print(f"  {package:<16} {version(package)}")
    extras = {name: (needed, name) for name, needed in EXTRAS.items()}
    for kind, parts in (("engines", REQUIREMENTS), ("extras", extras)):
        console.print(f"\n[bold]{kind}[/]")
        for name, (needed, extra) in parts.items():
            console.print(f"  {name:<16} {_state(needed, extra)}", soft_wrap=True)
    console.print("\n[bold]models[/]")
    for alias, place in _aliases().items():
        console.print(f"  {alias:<16} {place}", soft_wrap=True)
    console.print("\n[bold]devices[/]")
    for line in _devices():
        console.print(f"  {escape(line)}", soft_wrap=True)


def _state(needed: tuple[str, ...], extra: str) -> str:
    missing = [package for package in needed if find_spec(package) is None]
    return f"[red]missing {', '.join(missing)}[/]: pip install 'cai-toolkit\\[{extra}]'" if missing else "[green]usable[/]"


def version(package: str) -> str:
    """The version of a package that is installed, under its own name or as its build for CPUs, else a dash."""
    for name in (package, f"{package}-cpu"):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "–"


def _aliases() -> dict[str, str]:
    from cai.models import ALIASES

    return {
        name: f"from the package {alias.package}" if find_spec(alias.package) else f"from the Hub: {alias.hub_id}"
        for name, alias in ALIASES.items()
    }


def _devices() -> list[str]:
    if missing_packages("transformers"):
        return ["none that a local model could use: see the engines"]
    try:
        return describe_devices()
    except Exception as exc:  # a torch that is installed and broken: saying so is what this command is for
        return [f"torch or transformers cannot be imported: {type(exc).__name__}: {exc}"]
