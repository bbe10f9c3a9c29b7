"""A page with pictures: a template beside this file, filled; it asks for nothing from outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from cai.report import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def render(template: str, filters: Mapping[str, Any], draw: Callable[[], Mapping[str, Figure]], **given: Any) -> str:
    """The page of `template` with what is `given`, escaped, and as `figures` what `draw` draws, as SVG."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= dict(filters)
    with figures.style():
        drawn = {name: Markup(figures.svg(figure, name)) for name, figure in draw().items()}
    return environment.get_template(template).render(figures=drawn, **given)
