"""`cai doctor`: what is installed, what can run here, and what to install for the rest."""

from __future__ import annotations

import platform
from importlib import metadata
from importlib.util import find_spec

_PACKAGES = ("cai-toolkit", "torch", "transformers", "datasets", "huggingface_hub", "pyarrow", "pydantic", "trl")
_ENGINES = {
    "transformers": (("torch", "transformers"), "pip install 'cai-toolkit[local]'"),
    "scripted": ((), ""),
}


def doctor() -> None:
    """Print versions, devices, which engines are usable, and what to install for the rest."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in _PACKAGES:
        console.print(f"  {package:<16} {_version(package)}")
    console.print("\n[bold]engines[/]")
    for engine, (needed, install) in _ENGINES.items():
        missing = [package for package in needed if find_spec(package) is None]
        state = f"[red]missing {', '.join(missing)}[/]: {install}" if missing else "[green]usable[/]"
        console.print(f"  {engine:<16} {state}", soft_wrap=True)
    console.print("\n[bold]models[/]")
    for alias, place in _aliases().items():
        console.print(f"  {alias:<16} {place}", soft_wrap=True)
    if find_spec("torch"):
        console.print("\n[bold]devices[/]")
        for line in _devices():
            console.print(f"  {line}")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "–"


def _aliases() -> dict[str, str]:
    from cai.models import ALIASES

    return {
        name: f"from the package {alias.package}" if find_spec(alias.package) else f"from the Hub: {alias.hub_id}"
        for name, alias in ALIASES.items()
    }


def _devices() -> list[str]:
    from cai.engines import describe_devices

    return describe_devices()
