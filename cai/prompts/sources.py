"""Where prompts come from: built-in sets, files, standard input, `datasets` folders and the Hub, all read lazily.

A source is an iterator of `Row`s: the place of the row (`prompts.jsonl:12`), and its prompt or what is wrong with it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cai.config import PromptsConfig
from cai.errors import ConfigError, PromptSourceError, RowError, nearest
from cai.prompts.files import KINDS, Raw, kind_of, opened, read_file, read_lines
from cai.prompts.rows import to_prompt
from cai.types import Prompt

BUILT_IN = Path(__file__).resolve().parent
What = Literal["prompts", "data"]
"""What a source is called where it is named, for errors."""
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf", "members/*/*.safetensors")
"""What a model's folder holds."""
_COUNTABLE = 1 << 28
"""Bytes of a file whose lines are counted before a run, for its progress bar: a second's work."""


class Row(NamedTuple):
    """One row of a source; exactly one of `prompt` and `error` is there. `raw` is for the quarantine.

    `given` are completions that came with the prompt: of a labelled pair the better one, then the worse one.
    """

    origin: str
    prompt: Prompt | None
    error: RowError | None
    raw: str
    given: tuple[str, ...] = ()


def built_in_sets() -> list[str]:
    """The names of the prompt sets that come with the package."""
    return sorted(path.stem for path in BUILT_IN.glob("*.jsonl"))


def read_prompts(config: PromptsConfig) -> Iterator[Row]:
    """The rows of a source, one at a time, up to `limit`.

    Raises `ConfigError` at once where there is no such source, `PromptSourceError` where it cannot be read.
    """
    return read_rows(config, lambda raw: (to_prompt(raw, config.column), ()))


def read_rows(config: PromptsConfig, parse: Callable[[Any], tuple[Prompt, tuple[str, ...]]]) -> Iterator[Row]:
    """The same by `parse`, which makes of what a source holds the prompt and what is given with it, or raises `RowError`."""
    return _rows(read_raw(config), parse)


def read_raw(config: PromptsConfig, what: What = "prompts") -> Iterator[Raw]:
    """What a source holds, one row at a time, each with its place, up to `limit`. Raises as `read_prompts` does."""
    return islice(_raw_rows(config, what), config.limit)


def find_source(name: str, what: What = "prompts") -> Path | None:
    """Where a source is on this machine; None for a dataset of the Hub. Only prompts have built-in sets.

    Raises `ConfigError` where there is no such source, or a model in its place.
    """
    sets = built_in_sets() if what == "prompts" else []
    path = _path(name, sets)
    if os.path.isdir(path) and any(any(path.glob(one)) for one in _WEIGHTS):
        raise ConfigError(f"{what} '{name}': this is a model, not a dataset; models are named by -m, or by a recipe's 'model'")
    if os.path.exists(path):
        return path
    if kind_of(path) in KINDS or name.startswith((".", "/", "~")) or name.count("/") != 1:
        more = f", or a built-in set: {', '.join(sets)}" if sets else ""
        raise ConfigError(
            f"{what} '{name}': there is no such file{nearest(name, sets)}; expected a file, a `datasets` folder, "
            f"a Hub id (owner/name), - for standard input{more}"
        )
    return None


def _rows(raw_rows: Iterable[Raw], parse: Callable[[Any], tuple[Prompt, tuple[str, ...]]]) -> Iterator[Row]:
    for origin, raw in raw_rows:
        try:
            if isinstance(raw, RowError):
                raise raw
            prompt, given = parse(raw)
            yield Row(origin, prompt, None, "", given)
        except RowError as exc:
            yield Row(origin, None, exc, "" if isinstance(raw, RowError) else ascii(raw)[:2000])


def _raw_rows(config: PromptsConfig, what: What) -> Iterator[Raw]:
    name = config.source
    if name == "-":
        if sys.stdin is None:
            raise ConfigError(f"{what} '-': standard input is closed")
        return read_lines("stdin", nullcontext(sys.stdin.buffer), None)
    path = find_source(name, what)
    if path is None:
        return _hub(name, config, what)
    return _dataset_folder(path.resolve(), config, what) if path.is_dir() else read_file(path)


def _path(name: str, sets: list[str]) -> Path:
    return BUILT_IN / f"{name}.jsonl" if name in sets else Path(os.path.expanduser(name))


def _dataset_folder(path: Path, config: PromptsConfig, what: What) -> Iterator[Raw]:
    """A folder of `save_to_disk`, or one that `load_dataset` reads."""
    import datasets

    with _failures(f"{path}: no {what} could be read from this folder"):
        if not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            data = datasets.load_dataset(str(path), config.subset, data_dir=config.data_dir, split=config.split, streaming=True)
        else:
            data = datasets.load_from_disk(str(path))
            if isinstance(data, datasets.DatasetDict) and config.split not in data:
                raise ValueError(f"no split '{config.split}'{nearest(config.split, data)}; it has {', '.join(data)}")
            data = data[config.split] if isinstance(data, datasets.DatasetDict) else data
    return _each(path.name, data)


def _hub(name: str, config: PromptsConfig, what: What) -> Iterator[Raw]:
    import datasets

    neither = "neither a file nor a built-in set" if what == "prompts" else "no file"
    with _failures(f"{what} '{name}': {neither}, and no such dataset could be had from the Hub"):
        where = {"data_dir": config.data_dir, "revision": config.revision}
        data = datasets.load_dataset(name, config.subset, split=config.split, streaming=True, **where)
    return _each(name, data)


def _each(name: str, data: Any) -> Iterator[Raw]:
    with _failures(f"{name}: reading stopped"):
        for index, row in enumerate(data.with_format(None)):
            yield f"{name}[{index}]", row


@contextmanager
def _failures(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as exc:  # `datasets` reads by many libraries, and what they raise has no common type
        raise PromptSourceError(f"{what}: {exc}") from exc


def count_prompts(config: PromptsConfig) -> int | None:
    """How many rows there are at most, where that can soon be told without parsing them."""
    path = _path(config.source, built_in_sets())
    if not os.path.isfile(path) or kind_of(path) not in (".jsonl", ".ndjson", ".txt", ".text"):
        return config.limit
    if path.stat().st_size > _COUNTABLE:
        return config.limit
    try:
        with opened(path) as file:
            return sum(1 for _ in islice(filter(bytes.strip, file), config.limit))
    except PromptSourceError:  # told where the rows are read, after those before it
        return config.limit
