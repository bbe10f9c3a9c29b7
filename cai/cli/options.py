"""The options that commands share, and the run folder that some of them choose."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from cai.errors import ConfigError

if TYPE_CHECKING:
    from cai.config import Recipe
    from cai.store import Mode


def option(*names: str, panel: str, metavar: str = "", help: str) -> Any:
    """An option in a panel of the help; without a metavar it is a flag."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel)


INPUTS, MODELS, FOLDER, MACHINES = "Inputs", "Models", "Run folder", "Many machines"
Constitution = Annotated[
    str | None,
    option("-c", "--constitution", panel=INPUTS, metavar="NAME|FILE", help="The principles; built in: harmless."),
]
Limit = Annotated[int | None, option("-n", panel=INPUTS, metavar="N", help="Use the first N rows.")]
RecipeFile = Annotated[
    str | None,
    option("--recipe", panel=INPUTS, metavar="NAME|FILE", help="A recipe: built in (demo) or YAML; flags win over it."),
]
Set = Annotated[list[str] | None, option("--set", panel=INPUTS, metavar="KEY=VALUE", help="Any key of the recipe; repeatable.")]
Seed = Annotated[int | None, option("--seed", panel=INPUTS, metavar="N", help="The run's seed.")]
Update = Annotated[bool, option("--update", panel=FOLDER, help="Recipe changed: keep finished calls, redo the rest.")]
Fresh = Annotated[bool, option("--fresh", panel=FOLDER, help="Start over; asks if finished calls would be lost.")]
Yes = Annotated[bool, option("--yes", "-y", panel=FOLDER, help="Do not ask.")]

Ray = Annotated[
    str | None,
    option(
        "--ray",
        panel=MACHINES,
        metavar="[ADDRESS]",
        help="On a Ray cluster: auto or HOST:PORT; without an address, a local one for this run.",
    ),
]
Workers = Annotated[
    int | None, option("--workers", panel=MACHINES, metavar="N", help="How many workers, each with its own engines; default 1.")
]
_ADDRESS = re.compile(r"local|auto|\[?[\w.:-]+\]?:\d+|\w+://.*")


class WithRay(TyperCommand):
    """A command whose `--ray` may stand without a value: what follows is one only if it looks like an address."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put in what `--ray` alone means."""
        end = args.index("--") if "--" in args else len(args)
        whole = [word for one, then in zip(args[:end], [*args[1:end], ""], strict=True) for word in _with_address(one, then)]
        return super().parse_args(ctx, [*whole, *args[end:]])


def _with_address(word: str, following: str) -> list[str]:
    return [word, "local"] if word == "--ray" and not _ADDRESS.fullmatch(following) else [word]


def refuse_lone_workers(recipe: Recipe, workers: int | None) -> None:
    """Raises `ConfigError` for workers without a cluster."""
    if workers is not None and recipe.ray.address is None:
        raise ConfigError("--workers is for a Ray cluster: add --ray (or ray.address in the recipe)")


def resolve_recipe(recipe: str | None, assignments: Sequence[str], flags: Mapping[str, tuple[str, object]]) -> Recipe:
    """The recipe with what `--set` assigns on top, and then the flags: by key, the flag and its value or None."""
    from cai.config import load_recipe, parse_set

    overrides = [parse_set(one) for one in assignments]
    overrides += [(key, value, flag) for key, (flag, value) in flags.items() if value is not None]
    return load_recipe(recipe, overrides)


def choose_folder(out: str | None, default: str) -> Path | str:
    """The folder of `-o`, a str where that is a URL, or the default one below `runs/`. Raises `ConfigError`."""
    if out is not None and not out.strip():
        raise ConfigError("-o is empty: expected a folder")
    if out and "://" in out:
        return out
    return Path(os.path.expanduser(out)) if out else Path("runs") / default


def choose_mode(folder: Path | str, update: bool, fresh: bool, yes: bool) -> Mode:
    """What is done about a run that is in the folder; asks before what was paid for is deleted. Raises `ConfigError`."""
    if update and fresh:
        raise ConfigError("--update keeps what --fresh deletes: give one of them")
    if fresh and not yes:
        _confirm_loss(folder)
    return "fresh" if fresh else "update" if update else "continue"


def _confirm_loss(out: Path | str) -> None:
    from cai.cli.terminal import printable
    from cai.pipeline import local_folder
    from cai.store import Mirror, is_remote, would_lose

    loss = would_lose(local_folder(out))
    if loss is None and is_remote(out) and Mirror(str(out), local_folder(out)).holds_run():
        loss = "a run"
    if loss is None:
        return
    if not sys.stdin.isatty():
        raise ConfigError(f"--fresh would delete {loss} in {out}; add --yes if that is meant")
    typer.confirm(f"{printable(str(out))} holds {loss}. Delete and start over?", abort=True)
