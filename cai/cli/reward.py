"""`cai reward score`: what a reward model thinks of completions, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cai.cli.options import INPUTS, Limit, option

app = typer.Typer(no_args_is_help=True, help="Score completions by a reward model.")


@app.callback()
def _reward() -> None:
    """Keeps `score` a command of its own."""


@app.command(epilog="Example:\n\n    cai reward score models/reward completions.jsonl -o scores.jsonl")
def score(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder of cai train reward, or a sequence classifier: folder or Hub id.")
    ],
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="Rows with `prompt` and `completion`, or `messages`, or `chosen` and `rejected`; - for stdin."
        ),
    ],
    limit: Limit = None,
    out: Annotated[
        Path | None, option("-o", "--out", panel=INPUTS, metavar="FILE", help="Write the scores of all rows as JSON lines.")
    ] = None,
) -> None:
    """The reward of each completion, with its parts: objectives, members, what was taken out for length.

    Rewards are normalised: 0 is the mean of completions of the model's training data, 1 their standard deviation.
    """
    from cai.cli import scoring

    scoring.score(model, file, limit, out)
