"""How the training that a folder holds differs from another one: two identities, key by key."""

from __future__ import annotations

from typing import Any

_ABSENT = object()
Changes = dict[str, tuple[Any, Any]]
"""Keys with what they are in a folder, and now."""


def differences(before: dict[str, Any], now: dict[str, Any]) -> Changes:
    """By the names of single keys."""
    there, here = (_flat(one) for one in (before, now))
    keys = sorted({*there, *here})
    found = {key: (there.get(key, _ABSENT), here.get(key, _ABSENT)) for key in keys}
    return {key: both for key, both in found.items() if both[0] != both[1] and not _is_named_by_parts(key, both, keys)}


def _is_named_by_parts(key: str, both: tuple[Any, Any], keys: list[str]) -> bool:
    """Whether it is empty on one side, and what it has on the other is named key by key."""
    is_empty = all(one is _ABSENT or one in (None, {}, []) for one in both)
    return is_empty and any(one.startswith((f"{key}.", f"{key}[")) for one in keys)


def changed_code(before: dict[str, Any], now: dict[str, Any]) -> Changes:
    """The differences, if all of them are other files of the same functions."""
    found = differences(before, now)
    named = all(_name(one) == _name(other) for one, other in found.values())
    return found if named and all(key.rpartition(".")[2] == "function" for key in found) else {}


def _name(version: Any) -> str:
    """Of NAME@VERSION."""
    return str(version).rpartition("@")[0]


def describe(before: dict[str, Any], now: dict[str, Any], is_code: bool) -> str:
    """What a folder holds that holds another training, and what to do."""
    use = "use another -o, or --fresh to start over"
    if before.get("stage") != now["stage"]:
        return f"a training of the stage {before.get('stage')}; {use}"
    found = differences(before, now).items()
    lines = "\n".join(f"  {key}: {_told(there)} there, {_told(here)} now" for key, (there, here) in found)
    if is_code:
        use = f"the file of a function has changed; --changed-code goes on with it from the last checkpoint; or {use}"
    return f"another training:\n{lines}\n{use} (in cai run with --from and --until this stage, or all stages begin anew)"


def _told(value: Any) -> str:
    return "nothing" if value is _ABSENT else repr(value)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """What is in dictionaries and lists of dictionaries, under names with dots and places."""
    if isinstance(value, dict) and value:
        parts = [(f"{name}.{key}" if name else str(key), one) for key, one in value.items()]
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        parts = [(f"{name}[{place}]", one) for place, one in enumerate(value)]
    else:
        return {name: value}
    return {key: one for part, inner in parts for key, one in _flat(inner, part).items()}
