"""`cai judge`: label pairs that are there already, measure a judge on pairs that people labelled, calibrate it on them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cai.errors import ConfigError

if TYPE_CHECKING:
    from cai.config import Recipe
    from cai.store import Mode

app = typer.Typer(no_args_is_help=True, help="Label pairs; measure and calibrate a judge on pairs that people labelled.")

Pairs = Annotated[
    str, typer.Argument(metavar="PAIRS", help="A file, `datasets` folder, Hub id or -: rows with `chosen` and `rejected`.")
]
Constitution = Annotated[str | None, typer.Option("-c", "--constitution", help="Built-in name or path.")]
Model = Annotated[str | None, typer.Option("-m", "--model", help="The judge: alias, folder, Hub id, scripted:…")]
Method = Annotated[
    str | None,
    typer.Option(help="choice, reasoning, likelihood, score, text, checks, reward-model or panel."),
]
Limit = Annotated[int | None, typer.Option("-n", help="Use the first N rows.", min=1)]
Out = Annotated[str | None, typer.Option("-o", "--out", help="The run folder; default runs/judge-METHOD.")]
RecipeFile = Annotated[str | None, typer.Option("--recipe", help="A recipe: built in (demo) or YAML; flags win over it.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="key=value of any recipe key; repeatable.")]
Update = Annotated[bool, typer.Option("--update", help="Recipe changed: keep finished calls, redo the rest.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over; asks if finished calls would be lost.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@app.command(
    epilog="Example:\n\n    cai judge evaluate pairs.jsonl -m Qwen/Qwen3-4B --method choice --set judge.principles=all"
)
def evaluate(
    pairs: Pairs,
    constitution: Constitution = None,
    model: Model = None,
    method: Method = None,
    limit: Limit = None,
    out: Out = None,
    recipe: RecipeFile = None,
    set_: Set = None,
    update: Update = False,
    fresh: Fresh = False,
    yes: Yes = False,
) -> None:
    """How far a judge agrees with people: accuracy, biases, calibration, each principle. Writes evaluation.json and .html.

    The same command again continues a run that was stopped; no finished model call is made twice.
    """
    from cai.cli import judging

    resolved = _recipe(pairs, constitution, model, method, limit, recipe, set_)
    folder, mode = _folder(resolved, out, update, fresh, yes)
    judging.evaluate(resolved, folder, mode)


@app.command(epilog="Example:\n\n    cai judge calibrate pairs.jsonl -m Qwen/Qwen3-4B --save calibration.yaml")
def calibrate(
    pairs: Pairs,
    constitution: Constitution = None,
    model: Model = None,
    method: Method = None,
    limit: Limit = None,
    out: Out = None,
    save: Annotated[Path | None, typer.Option(help="The file; default OUT/calibration.yaml.")] = None,
    recipe: RecipeFile = None,
    set_: Set = None,
    update: Update = False,
    fresh: Fresh = False,
    yes: Yes = False,
) -> None:
    """Fit a judge's bias, sharpness, sign and weights on labelled pairs, cross-validated; judges by all principles.

    A run uses it by --set judge.calibration=FILE.
    """
    from cai.cli import judging

    resolved = _recipe(pairs, constitution, model, method, limit, recipe, ["judge.principles=all", *(set_ or ())])
    folder, mode = _folder(resolved, out, update, fresh, yes)
    judging.calibrate(resolved, folder, mode, save or folder / "calibration.yaml")


@app.command(epilog="Example:\n\n    cai judge label pairs.jsonl -m Qwen/Qwen3-4B -o runs/labels")
def label(
    pairs: Pairs,
    constitution: Constitution = None,
    model: Model = None,
    method: Method = None,
    limit: Limit = None,
    out: Out = None,
    recipe: RecipeFile = None,
    set_: Set = None,
    update: Update = False,
    fresh: Fresh = False,
    yes: Yes = False,
) -> None:
    """Label pairs that are there already: a dataset with the judge's choices and probabilities."""
    from cai.cli import judging

    resolved = _recipe(pairs, constitution, model, method, limit, recipe, set_)
    folder, mode = _folder(resolved, out, update, fresh, yes)
    judging.label(resolved, folder, mode)


def _recipe(
    pairs: str,
    constitution: str | None,
    model: str | None,
    method: str | None,
    limit: int | None,
    recipe: str | None,
    assignments: list[str] | None,
) -> Recipe:
    from cai.config import load_recipe, parse_set

    flags = {
        "prompts.source": ("PAIRS", pairs),
        "constitution": ("-c", constitution),
        "judge.model": ("-m", model),
        "judge.method": ("--method", method),
        "prompts.limit": ("-n", limit),
    }
    overrides = [parse_set(one) for one in assignments or ()]
    overrides += [(key, value, flag) for key, (flag, value) in flags.items() if value is not None]
    return load_recipe(recipe, overrides)


def _folder(recipe: Recipe, out: str | None, update: bool, fresh: bool, yes: bool) -> tuple[Path, Mode]:
    from cai.cli.generate import confirm_loss

    if update and fresh:
        raise ConfigError("--update keeps what --fresh deletes: give one of them")
    if out is not None and not out.strip():
        raise ConfigError("-o is empty: expected a folder")
    folder = Path(os.path.expanduser(out)) if out else Path("runs") / f"judge-{recipe.judge.method}"
    if fresh and not yes:
        confirm_loss(folder)
    return folder, "fresh" if fresh else "update" if update else "continue"
