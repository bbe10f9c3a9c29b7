"""Constitutions found by name or path, composed through `extends`, and written back."""

from __future__ import annotations

from pathlib import Path

from cai.constitution.schema import Constitution, Exemplar, Principle
from cai.documents import Document, dump
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
    path = Path(name).expanduser()
    places = [path] if beside is None else [beside / path, path]
    found = next((place for place in places if place.is_file()), None)
    if found:
        return found
    if name in built_in_names():
        return BUILT_IN / f"{name}.yaml"
    names = built_in_names()
    raise ConstitutionError(
        f"no constitution '{name}': neither a file nor a built-in name{nearest(name, names)}; built in: {', '.join(names)}"
    )


def load_constitution(name: str) -> Constitution:
    """A constitution with everything that it extends merged in, checked as a whole.

    Raises `ConstitutionError` naming file, line, key, what was expected and the nearest right key.
    """
    return _load(find(name), ())


def _load(path: Path, above: tuple[Path, ...]) -> Constitution:
    path = path.resolve()
    if path in above:
        chain = " -> ".join(one.stem for one in (*above, path))
        raise ConstitutionError(f"{path}: extends itself: {chain}; remove one of these 'extends'")
    document = Document.read(path, ConstitutionError)
    written = document.validate(Constitution)
    bases = []
    for index, name in enumerate(written.extends):
        try:
            bases.append(_load(find(name, path.parent), (*above, path)))
        except ConstitutionError as exc:
            raise ConstitutionError(f"{document.where(('extends', index))}: extends[{index}]: {exc}") from exc
    resolved = _merge(written, bases)
    _check_whole(resolved, document)
    return resolved


def _merge(written: Constitution, bases: list[Constitution]) -> Constitution:
    principles: dict[str, Principle] = {}
    exemplars: list[Exemplar] = []
    for constitution in (*bases, written):
        principles.update({principle.id: principle for principle in constitution.principles})
        exemplars += [exemplar for exemplar in constitution.exemplars if exemplar not in exemplars]
    merged = {"extends": (), "principles": tuple(principles.values()), "exemplars": tuple(exemplars)}
    return written.model_copy(update=merged)


def _check_whole(resolved: Constitution, document: Document) -> None:
    if not resolved.principles:
        raise ConstitutionError(f"{document.name}: principles: expected at least one principle")
    able = [principle.id for principle in resolved.critiquing]
    own = [exemplar.get("principle") for exemplar in document.data.get("exemplars") or ()]
    for exemplar in resolved.exemplars:
        if exemplar.principle not in able:
            at = document.where(("exemplars", own.index(exemplar.principle), "principle") if exemplar.principle in own else ())
            hint = nearest(exemplar.principle, able) or f"; there are: {', '.join(able)}"
            raise ConstitutionError(
                f"{at}: exemplars: no principle '{exemplar.principle}' with a critique and a revision{hint}"
            )


def to_yaml(constitution: Constitution) -> str:
    """A constitution as YAML that `load_constitution` reads back."""
    return dump(constitution.model_dump(mode="json", exclude_defaults=True))
