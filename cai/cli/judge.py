"""`cai judge`: label pairs that are there already, measure a judge on pairs that people labelled, calibrate it on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cai.cli.options import (
    FOLDER,
    MODELS,
    Constitution,
    Fresh,
    Limit,
    RecipeFile,
    Set,
    Update,
    Yes,
    choose_folder,
    choose_mode,
    option,
    resolve_recipe,
)
from cai.errors import ConfigError

if TYPE_CHECKING:
    from cai.config import Recipe
    from cai.store import Mode

app = typer.Typer(no_args_is_help=True, help="Label pairs; measure and calibrate a judge on pairs that people labelled.")

Pairs = Annotated[
    str, typer.Argument(metavar="PAIRS", help="A file, `datasets` folder, Hub id or -: rows with `chosen` and `rejected`.")
]
Model = Annotated[
    str | None, option("-m", "--model", panel=MODELS, metavar="MODEL", help="The judge: alias, folder, Hub id, URL, scripted:…")
]
Method = Annotated[
    str | None,
    option(
        "--method",
        panel=MODELS,
        metavar="METHOD",
        help="choice, reasoning, likelihood, score, text, checks, reward-model or panel.",
    ),
]
Out = Annotated[
    str | None, option("-o", "--out", panel=FOLDER, metavar="FOLDER", help="The run folder; default runs/COMMAND-METHOD.")
]


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
    folder, mode = _folder("evaluate", resolved, out, update, fresh, yes)
    judging.evaluate(resolved, folder, mode)


@app.command(epilog="Example:\n\n    cai judge calibrate pairs.jsonl -m Qwen/Qwen3-4B --save calibration.yaml")
def calibrate(
    pairs: Pairs,
    constitution: Constitution = None,
    model: Model = None,
    method: Method = None,
    limit: Limit = None,
    out: Out = None,
    save: Annotated[
        Path | None, option("--save", panel=FOLDER, metavar="FILE", help="The calibration; default OUT/calibration.yaml.")
    ] = None,
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
    folder, mode = _folder("calibrate", resolved, out, update, fresh, yes)
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
    folder, mode = _folder("label", resolved, out, update, fresh, yes)
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
    flags = {
        "prompts.source": ("PAIRS", pairs),
        "constitution": ("-c", constitution),
        "judge.model": ("-m", model),
        "judge.method": ("--method", method),
        "prompts.limit": ("-n", limit),
    }
    return resolve_recipe(recipe, assignments or (), flags)


def _folder(command: str, recipe: Recipe, out: str | None, update: bool, fresh: bool, yes: bool) -> tuple[Path, Mode]:
    folder = choose_folder(out, f"{command}-{recipe.judge.method}")
    if isinstance(folder, str):
        raise ConfigError(f"-o {folder}: a judge's results go to a folder on this machine")
    return folder, choose_mode(folder, update, fresh, yes)
