"""`cai constitution list | show | validate`."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Look at constitutions and check them.")


@app.command("list", epilog="Example: cai constitution list")
def list_() -> None:
    """List the built-in constitutions."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from cai.constitution import built_in_names, load_constitution

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("name", "principles", "exemplars"):
        table.add_column(column, no_wrap=True)
    table.add_column("what it is for")
    for name in built_in_names():
        one = load_constitution(name)
        table.add_row(name, str(len(one.principles)), str(len(one.exemplars)), escape(one.description))
    Console().print(table)


@app.command(epilog="Example: cai constitution show harmless")
def show(name: Annotated[str, typer.Argument(help="A built-in name or a path.")]) -> None:
    """Print a constitution as models see it, with all that it extends merged in, as YAML."""
    from cai.constitution import load_constitution, to_yaml

    print(to_yaml(load_constitution(name)), end="")


@app.command(epilog="Example: cai constitution validate my.yaml")
def validate(path: Annotated[str, typer.Argument(help="A path or a built-in name.")]) -> None:
    """Check a constitution; errors name file, line, key and the fix. Exit code 2 where it is not valid."""
    from cai.cli.terminal import printable
    from cai.config import Recipe
    from cai.constitution import load_constitution
    from cai.pipeline import lacking_principles

    one = load_constitution(path)
    print(
        f"{printable(path)}: valid. {one.name} {printable(one.version)}, hash {one.hash}: {len(one.principles)} principles "
        f"({len(one.critiquing)} for critique and revision, {len(one.comparing)} for comparison), "
        f"{len(one.exemplars)} exemplars"
    )
    if lacking := lacking_principles(one, Recipe().generation.rounds):
        print(f"note: for the default recipe {lacking}")
    if not one.comparing:
        print("note: no principle has a 'preference', which the judge of every recipe needs: add one")
