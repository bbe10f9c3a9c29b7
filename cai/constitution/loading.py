"""Constitutions found by name or path, composed through `extends`, and written back."""

from __future__ import annotations

import os
from pathlib import Path

from cai.constitution.schema import Constitution, Exemplar, Principle
from cai.documents import Document, Loc, dump, show
from cai.errors import ConstitutionError, nearest

_PACKAGE = Path(__file__).resolve().parent.parent
_SHIPPED = _PACKAGE / "_shipped" / "constitutions"
BUILT_IN = _SHIPPED if _SHIPPED.is_dir() else _PACKAGE.parent / "constitutions"
"""In a wheel they lie inside the package; in a checkout beside it."""


def built_in_names() -> list[str]:
    """The names of the constitutions that come with the package."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def find(name: str, beside: Path | None = None) -> Path:
    """The file of a constitution given by built-in name or by path (relative to `beside`, then to here)."""
    if name in built_in_names():
        return BUILT_IN / f"{name}.yaml"
    path = Path(os.path.expanduser(name))
    for place in [path] if beside is None else [beside / path, path]:
        if os.path.isfile(place):
            return place
    names = built_in_names()
    raise ConstitutionError(
        f"no constitution '{name}': neither a file nor a built-in name{nearest(name, names)}; built in: {', '.join(names)}"
    )


def load_constitution(name: str) -> Constitution:
    """A constitution with everything that it extends merged in, checked as a whole.

    Raises `ConstitutionError` naming file, line, key, what was expected and the nearest right key.
    """
    return _load(find(name), (), {})


def _load(path: Path, above: tuple[Path, ...], loaded: dict[Path, Constitution]) -> Constitution:
    path = path.resolve()
    if path in loaded:
        return loaded[path]
    if path in above:
        chain = " -> ".join(one.stem for one in (*above, path))
        raise ConstitutionError(f"{path}: extends itself: {chain}; remove one of these 'extends'")
    document = Document.read(path, ConstitutionError)
    written = document.validate(Constitution)
    bases = []
    for index, name in enumerate(written.extends):
        try:
            bases.append(_load(find(name, path.parent), (*above, path), loaded))
        except ConstitutionError as exc:
            raise ConstitutionError(f"{document.where(('extends', index))}: extends[{index}]: {exc}") from exc
    resolved = _merge(written, bases)
    _check_whole(resolved, written, document)
    loaded[path] = resolved
    return resolved


def _merge(written: Constitution, bases: list[Constitution]) -> Constitution:
    principles: dict[str, Principle] = {}
    exemplars: list[Exemplar] = []
    for constitution in (*bases, written):
        principles.update({principle.id: principle for principle in constitution.principles})
        exemplars += [exemplar for exemplar in constitution.exemplars if exemplar not in exemplars]
    merged = {"extends": (), "principles": tuple(principles.values()), "exemplars": tuple(exemplars)}
    return written.model_copy(update=merged)


def _check_whole(resolved: Constitution, written: Constitution, document: Document) -> None:
    if not resolved.principles:
        raise ConstitutionError(f"{document.where(('principles',))}: principles: expected at least one principle")
    able = [principle.id for principle in resolved.critiquing]
    for exemplar in resolved.exemplars:
        if exemplar.principle not in able:
            loc, problem = _orphaned(exemplar, written, able)
            raise ConstitutionError(f"{document.where(loc)}: {show(loc)}: {problem}")


def _orphaned(exemplar: Exemplar, written: Constitution, able: list[str]) -> tuple[Loc, str]:
    """Where it was written that an exemplar answers a principle without critique and revision, and how that came about."""
    name = exemplar.principle
    if exemplar in written.exemplars:
        hint = nearest(name, able) or f"; those that have both: {', '.join(able) or 'none'}"
        loc: Loc = ("exemplars", written.exemplars.index(exemplar), "principle")
        return loc, f"there is no principle '{name}' with a critique and a revision{hint}"
    own = [principle.id for principle in written.principles]
    loc = ("principles", own.index(name)) if name in own else ("extends",)
    return loc, f"an inherited exemplar answers '{name}', which must keep a critique and a revision"


def to_yaml(constitution: Constitution) -> str:
    """A constitution as YAML that `load_constitution` reads back."""
    head = {"name": constitution.name, "version": constitution.version}
    return dump(head | constitution.model_dump(mode="json", exclude_defaults=True))
