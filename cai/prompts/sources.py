"""Where prompts come from: built-in sets, files, standard input, `datasets` folders and the Hub, all read lazily.

A source is an iterator of `Row`s: the place of the row (`prompts.jsonl:12`), and its prompt or what is wrong with it.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from cai.config import PromptsConfig
from cai.errors import ConfigError, PromptSourceError, RowError, nearest
from cai.prompts.rows import to_prompt
from cai.types import Prompt

BUILT_IN = Path(__file__).resolve().parent
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
Raw = tuple[str, Any]
"""The place of a row, and the row as it was read, or the RowError that reading it raised."""


class Row(NamedTuple):
    """One row of a source; exactly one of `prompt` and `error` is there. `raw` is for the quarantine."""

    origin: str
    prompt: Prompt | None
    error: RowError | None
    raw: str


def built_in_sets() -> list[str]:
    """The names of the prompt sets that come with the package."""
    return sorted(path.stem for path in BUILT_IN.glob("*.jsonl"))


def read_prompts(config: PromptsConfig) -> Iterator[Row]:
    """The rows of a source, one at a time, up to `limit`.

    Raises `ConfigError` at once where there is no such source, `PromptSourceError` where it cannot be read.
    """
    return islice(_rows(_raw_rows(config), config.column), config.limit)


def _rows(raw_rows: Iterable[Raw], column: str | None) -> Iterator[Row]:
    for origin, raw in raw_rows:
        try:
            if isinstance(raw, RowError):
                raise raw
            yield Row(origin, to_prompt(raw, column), None, "")
        except RowError as exc:
            yield Row(origin, None, exc, "" if isinstance(raw, RowError) else ascii(raw)[:2000])


def _raw_rows(config: PromptsConfig) -> Iterator[Raw]:
    name = config.source
    if name == "-":
        return _lines("stdin", lambda: sys.stdin.buffer, None)
    path = Path(name).expanduser()
    if path.is_dir():
        return _dataset_folder(path, config)
    if path.is_file():
        return _file(path)
    if name in built_in_sets():
        return _file(BUILT_IN / f"{name}.jsonl")
    if path.suffix or name.startswith((".", "/", "~")) or name.count("/") != 1:
        hint = nearest(name, built_in_sets())
        raise ConfigError(
            f"prompts '{name}': there is no such file{hint}; expected a file, a `datasets` folder, a Hub id "
            f"(owner/name), - for standard input, or a built-in set: {', '.join(built_in_sets())}"
        )
    return _hub(name, config)


def _file(path: Path) -> Iterator[Raw]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = next((suffix for suffix in reversed(suffixes) if suffix not in _COMPRESSED), "")

    def opened() -> IO[bytes]:
        return _open(path)

    match kind:
        case ".parquet":
            return _parquet(path)
        case ".csv" | ".tsv":
            return _csv(path, "\t" if kind == ".tsv" else ",")
        case ".json":
            return _json(path)
        case ".jsonl" | ".ndjson":
            return _lines(path.name, opened, True)
        case ".txt" | ".text" | "":
            return _lines(path.name, opened, False)
    raise ConfigError(f"prompts '{path}': unknown file type '{kind}'; expected .jsonl, .json, .csv, .tsv, .parquet or .txt")


def _open(path: Path) -> IO[bytes]:
    import fsspec

    try:
        return cast(IO[bytes], fsspec.open(str(path.resolve()), "rb", compression="infer").open())
    except (OSError, ValueError) as exc:
        raise PromptSourceError(f"{path}: cannot be read: {exc}") from exc


def _lines(name: str, opened: Callable[[], IO[bytes]], is_json: bool | None) -> Iterator[Raw]:
    """One row a line: JSON, or text as it stands; where `is_json` is None, the first line decides."""
    with opened() as file:
        number = 0
        while line := _next_line(file, name):
            number += 1
            if not line.strip():
                continue
            if is_json is None:
                is_json = line.lstrip().startswith((b"{", b"[", b'"'))
            yield f"{name}:{number}", _parse_line(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, is_json)


def _next_line(file: IO[bytes], name: str) -> bytes:
    try:
        return file.readline()
    except (OSError, EOFError) as exc:
        raise PromptSourceError(f"{name}: reading stopped: {exc}; the file is damaged or cut short") from exc


def _parse_line(line: bytes, is_json: bool) -> Any:
    try:
        text = line.decode("utf-8")
        return json.loads(text) if is_json else text.strip()
    except UnicodeDecodeError as exc:
        return RowError(f"invalid UTF-8 at byte {exc.start} of the line")
    except (ValueError, RecursionError) as exc:
        return RowError(f"not valid JSON: {exc}")


def _json(path: Path) -> Iterator[Raw]:
    """A JSON array of rows, streamed; or one object whose first array holds them."""
    import ijson

    with _open(path) as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        prefix = "item"
        if start.startswith(b"{"):
            file.seek(0)
            key = next((prefix for prefix, event, _ in ijson.parse(file) if event == "start_array"), None)
            if key is None:
                raise PromptSourceError(f"{path}: expected a list of rows, found one object; for a row a line use .jsonl")
            prefix = f"{key}.item"
        file.seek(0)
        index = 0
        try:
            for index, row in enumerate(ijson.items(file, prefix, use_float=True), 1):
                yield f"{path.name}[{index - 1}]", row
        except (ijson.JSONError, UnicodeDecodeError) as exc:
            raise PromptSourceError(f"{path}: not valid JSON after row {index}: {exc}") from exc


def _csv(path: Path, delimiter: str) -> Iterator[Raw]:
    import io

    csv.field_size_limit(2**31 - 1)
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        try:
            for row in reader:
                if any("\udc80" <= char <= "\udcff" for value in row.values() for char in str(value)):
                    yield f"{path.name}:{reader.line_num}", RowError("invalid UTF-8")
                elif None in row:
                    yield f"{path.name}:{reader.line_num}", RowError("more fields than the header has columns")
                else:
                    yield f"{path.name}:{reader.line_num}", row
        except csv.Error as exc:
            raise PromptSourceError(f"{path}:{reader.line_num}: not valid CSV: {exc}") from exc


def _parquet(path: Path) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                yield f"{path.name}[{number}]", row
                number += 1
    except (OSError, pyarrow.ArrowException) as exc:
        raise PromptSourceError(f"{path}: not readable as Parquet: {exc}") from exc


def _dataset_folder(path: Path, config: PromptsConfig) -> Iterator[Raw]:
    """A folder of `save_to_disk` or one that `load_dataset` reads."""
    import datasets

    saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            data = datasets.load_from_disk(str(path))
            data = data[config.split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(str(path), config.subset, split=config.split, streaming=True)
    except (OSError, KeyError, ValueError, datasets.exceptions.DatasetsError) as exc:
        raise PromptSourceError(f"{path}: no prompts could be read from this folder: {exc}") from exc
    return ((f"{path.name}[{index}]", row) for index, row in enumerate(data))


def _hub(name: str, config: PromptsConfig) -> Iterator[Raw]:
    import datasets
    import huggingface_hub.errors

    try:
        data = datasets.load_dataset(name, config.subset, split=config.split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, huggingface_hub.errors.HfHubHTTPError) as exc:
        raise PromptSourceError(
            f"prompts '{name}': neither a file nor a built-in set, and the Hub gave no such dataset: {exc}"
        ) from exc
    return ((f"{name}[{index}]", row) for index, row in enumerate(data))


def count_prompts(config: PromptsConfig) -> int | None:
    """How many rows there are at most, where that can be told without parsing them."""
    path = Path(config.source).expanduser()
    path = BUILT_IN / f"{config.source}.jsonl" if not path.exists() and config.source in built_in_sets() else path
    if path.is_file() and any(suffix in (".jsonl", ".ndjson", ".txt") for suffix in path.suffixes):
        with _open(path) as file:
            rows = sum(1 for line in file if line.strip())
        return min(rows, config.limit or rows)
    return config.limit
