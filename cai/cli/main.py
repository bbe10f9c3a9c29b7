"""`cai`: argv becomes a recipe becomes one call. No logic here, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from typing import Annotated, NoReturn

import typer

from cai.cli import constitution, doctor, judge, reward, train
from cai.cli import recipe as recipes
from cai.cli.options import (
    FOLDER,
    INPUTS,
    MODELS,
    Constitution,
    Fresh,
    Limit,
    Ray,
    RecipeFile,
    Seed,
    Set,
    Update,
    WithRay,
    Workers,
    Yes,
    choose_folder,
    choose_mode,
    option,
    refuse_lone_workers,
    resolve_recipe,
)
from cai.errors import BudgetError, CaiError, ConfigError, Interrupted

app = typer.Typer(
    name="cai",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train a language model from a written constitution instead of from human labels.",
)
app.add_typer(constitution.app, name="constitution")
app.add_typer(judge.app, name="judge")
app.add_typer(recipes.app, name="recipe")
app.add_typer(train.app, name="train")
app.add_typer(reward.app, name="reward")
app.command("doctor")(doctor.doctor)

_EXAMPLES = """
Examples:

# built-in prompts, a small real model
cai generate

# your own prompts, principles and model
cai generate prompts.jsonl -c my.yaml -m Qwen/Qwen3-4B -o runs/mine

# a recipe, with one key changed
cai generate --recipe demo --set judge.principles=all

All keys of a recipe: cai recipe keys. One written out: cai recipe show demo.
"""


def _print_version(asked: bool) -> None:
    if asked:
        print(f"cai {doctor.version('cai-toolkit')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", metavar="", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options that stand before any command."""


@app.command(epilog=_EXAMPLES, cls=WithRay)
def generate(
    prompts: Annotated[
        str | None,
        typer.Argument(
            help="A file, a `datasets` folder, a Hub id, - (stdin), or a built-in set: red-team, benign.",
            metavar="PROMPTS",
        ),
    ] = None,
    constitution: Constitution = None,
    limit: Limit = None,
    recipe: RecipeFile = None,
    set_: Set = None,
    seed: Seed = None,
    model: Annotated[
        str | None,
        option("-m", "--model", panel=MODELS, metavar="MODEL", help="The policy: alias, folder, Hub id, URL, scripted:…"),
    ] = None,
    judge_model: Annotated[
        str | None, option("--judge-model", panel=MODELS, metavar="MODEL", help="The judge; by default the policy's model.")
    ] = None,
    out: Annotated[
        str | None,
        option("-o", "--out", panel=FOLDER, metavar="FOLDER|URL", help="Where to (also s3://…); default runs/CONSTITUTION."),
    ] = None,
    update: Update = False,
    fresh: Fresh = False,
    yes: Yes = False,
    ray: Ray = None,
    workers: Workers = None,
    dry_run: Annotated[bool, option("--dry-run", panel=FOLDER, help="Print recipe, calls and tokens; call nothing.")] = False,
) -> None:
    """Make a preference dataset from a constitution and prompts.

    The same command again continues a run that was stopped; no finished model call is made twice.
    """
    from cai.cli import generate as command
    from cai.constitution import load_constitution

    flags = {
        "prompts.source": ("PROMPTS", prompts),
        "constitution": ("-c", constitution),
        "policy.model": ("-m", model),
        "judge.model": ("--judge-model", judge_model),
        "prompts.limit": ("-n", limit),
        "seed": ("--seed", seed),
        "ray.address": ("--ray", ray),
        "ray.workers": ("--workers", workers),
    }
    resolved = resolve_recipe(recipe, set_ or (), flags)
    refuse_lone_workers(resolved, workers)
    folder = choose_folder(out, load_constitution(resolved.constitution).name)
    mode = choose_mode(folder, update, fresh, yes or dry_run)
    if dry_run:
        command.show_dry_run(resolved, folder)
        return
    command.run(resolved, folder, mode)


_RUN_EXAMPLES = """
Examples:

# from constitution to trained model, on a CPU
cai run demo

# what would run, and with what calls
cai run demo --dry-run --set stages.data.generate.prompts.limit=8

# a part of your own
cai run mine.yaml -o runs/mine --from dpo
"""


@app.command(epilog=_RUN_EXAMPLES)
def run(
    recipe: Annotated[str, typer.Argument(help="A pipeline: built in (demo) or YAML.", metavar="RECIPE")],
    set_: Set = None,
    start: Annotated[
        str | None, option("--from", panel=INPUTS, metavar="STAGE", help="Begin there; earlier stages stay as they are.")
    ] = None,
    until: Annotated[str | None, option("--until", panel=INPUTS, metavar="STAGE", help="End with that stage.")] = None,
    out: Annotated[
        str | None, option("-o", "--out", panel=FOLDER, metavar="FOLDER", help="Where to; default runs/NAME-pipeline.")
    ] = None,
    fresh: Annotated[bool, option("--fresh", panel=FOLDER, help="Make the stages anew; asks if models would be lost.")] = False,
    yes: Yes = False,
    dry_run: Annotated[bool, option("--dry-run", panel=FOLDER, help="Print stages, calls, rows; make nothing.")] = False,
    launch: train.Launch = None,
) -> None:
    """Run a pipeline: datasets, SFT, reward models, DPO, in the order of its stages.

    The same command again continues. A stage that is finished and has the same inputs is skipped.
    """
    from cai.cli import run as command
    from cai.config import parse_set
    from cai.pipeline import Choice, load_pipeline

    loaded = load_pipeline(recipe, [parse_set(one) for one in set_ or ()])
    folder = choose_folder(out, f"{loaded.name}-pipeline")
    if isinstance(folder, str):
        raise ConfigError(f"-o {folder}: a pipeline runs in a folder on this machine")
    choice = Choice(start, until, fresh)
    if dry_run:
        command.show_dry_run(loaded, folder, choice, launch)
        return
    given = [("-o", out), ("--from", start), ("--until", until), ("--launch", launch), *(("--set", one) for one in set_ or ())]
    words = ["cai", "run", recipe, *(word for flag, value in given if value for word in (flag, value))]
    command.run(loaded, folder, choice, yes, launch, [*words, *(["--yes"] if yes else [])])


def main() -> None:
    """The `cai` command. Exit codes: 0 done, 1 the run could not do its job, 2 wrong usage, 130 interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # what it retries is told by our own error, once
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # --help says which stages are experimental
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8, a file name with odd bytes
    try:
        app()
    except Interrupted as exc:
        _fail(exc, 1 if isinstance(exc, BudgetError) else 130)
    except ConfigError as exc:
        _fail(exc, 2)
    except CaiError as exc:
        _fail(exc, 1)
    except OSError as exc:  # what has no better name by now: the disk or the terminal under the output
        _fail(CaiError(str(exc)), 1)
    finally:
        _flush()


def _fail(error: CaiError, code: int) -> NoReturn:
    from cai.cli.terminal import printable

    print(f"cai: {printable(str(error))}", file=sys.stderr, flush=True)
    if threading.active_count() > 1:  # one that still loads a model or waits for standard input would hold up the exit
        _flush()
        os._exit(code)
    sys.exit(code)


def _flush() -> None:
    """Write out what was printed. Where the reader is gone (`cai ... | head`) that is no failure, a full disk is."""
    try:
        sys.stdout.flush()
    except OSError as exc:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(exc, BrokenPipeError):
            _fail(CaiError(f"standard output cannot be written: {exc.strerror}"), 1)
