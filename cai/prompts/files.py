"""The rows of a file, one at a time: JSON lines, JSON, CSV, Parquet or plain text, compressed or not."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

from cai.errors import ConfigError, PromptSourceError, RowError
from cai.prompts.json_rows import UNDECODED, json_rows

Raw = tuple[str, Any]
"""The place of a row, and the row as it was read, or the RowError that reading it raised."""
_BOM = b"\xef\xbb\xbf"
_UTF16 = "UTF-16; save it as UTF-8"
_NO_TEXT = {
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
    b"PAR1": "Parquet; let its name end in .parquet",
    b"\x1f\x8b": "compressed by gzip; let its name end in .gz",
    b"PK\x03\x04": "a zip archive; unpack it",
}
_LONGEST_FIELD = 1 << 26
"""Characters in one field of a CSV file; beyond, a quote that is never closed would read all the rest as one field."""


def _open_zst(path: Path, mode: str) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))


_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}


KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".text")


def kind_of(path: Path) -> str:
    """The suffix that says what is in a file, below that of its compression: `.jsonl` for `a.jsonl.gz`."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in _OPEN else path.suffix.lower()


def read_file(path: Path) -> Iterator[Raw]:
    """The rows of a file of any kind. Raises `ConfigError` at once for a kind that is not known."""
    match kind_of(path):
        case ".parquet":
            return _parquet(path)
        case ".csv":
            return _csv(path, ",")
        case ".tsv":
            return _csv(path, "\t")
        case ".json":
            return _json(path)
        case ".jsonl" | ".ndjson":
            return read_lines(path.name, opened(path), True)
        case ".txt" | ".text":
            return read_lines(path.name, opened(path), False)
        case "":
            return read_lines(path.name, opened(path), None)
    raise ConfigError(
        f"{path}: unknown file type '{path.suffix}'; expected one of {', '.join(KINDS)}; "
        f"all but Parquet also with {', '.join(_OPEN)}"
    )


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed. Raises `PromptSourceError` for whatever goes wrong until it is closed."""
    try:
        with _OPEN.get(path.suffix.lower(), open)(path, "rb") as file:
            start = file.peek(4)
            for magic, what in _NO_TEXT.items():
                if start.startswith(magic):
                    raise PromptSourceError(f"{path}: this is {what}")
            yield file
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as exc:
        raise PromptSourceError(f"{path}: reading stopped: {exc}; the file is damaged or cut short") from exc
    except OSError as exc:
        raise PromptSourceError(f"{path}: cannot be read: {exc.strerror or exc}") from exc


def read_lines(name: str, file: AbstractContextManager[IO[bytes]], is_json: bool | None) -> Iterator[Raw]:
    """One row a line: JSON, or text as it stands; where `is_json` is None, the first line decides."""
    with file as lines:
        for number, line in enumerate(lines, 1):
            content = line.removeprefix(_BOM) if number == 1 else line
            if not content.strip():
                continue
            is_json = _looks_like_json(content) if is_json is None else is_json
            yield f"{name}:{number}", _parse_line(content, is_json)


def _looks_like_json(line: bytes) -> bool:
    try:
        return line.lstrip().startswith(b"{") or isinstance(json.loads(line), str | list)
    except (ValueError, RecursionError):
        return False


def _parse_line(line: bytes, is_json: bool) -> Any:
    try:
        text = line.decode("utf-8")
        return json.loads(text) if is_json else text.strip()
    except UnicodeDecodeError as exc:
        return RowError(f"invalid UTF-8 at byte {exc.start} of the line")
    except RecursionError:
        return RowError("not readable JSON: nested too deeply")
    except ValueError as exc:
        return RowError(f"not valid JSON: {exc}")


def _json(path: Path) -> Iterator[Raw]:
    number = 0
    try:
        for row in json_rows(lambda: opened(path)):
            yield f"{path.name}[{number}]", row
            number += 1
    except json.JSONDecodeError as exc:
        raise PromptSourceError(f"{path}: not valid JSON after {number} rows: {exc.msg}") from exc
    except RecursionError as exc:
        raise PromptSourceError(f"{path}: not readable JSON after {number} rows: nested too deeply") from exc
    except PromptSourceError:
        raise
    except ValueError as exc:
        raise PromptSourceError(f"{path}: {exc}") from exc


def _csv(path: Path, delimiter: str) -> Iterator[Raw]:
    csv.field_size_limit(_LONGEST_FIELD)
    line = 0
    with opened(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                line = reader.line_num
                yield f"{path.name}:{line}", _csv_problem(row) or row
        except csv.Error as exc:
            raise PromptSourceError(f"{path}: not valid CSV after line {line}: {exc}") from exc


def _csv_problem(row: dict[Any, Any]) -> RowError | None:
    if None in row:
        return RowError("more fields than the header has columns")
    if any(UNDECODED.search(str(cell)) for entry in row.items() for cell in entry):
        return RowError("invalid UTF-8")
    return None


def _parquet(path: Path) -> Iterator[Raw]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path.absolute()) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in _batch_rows(batch):
                    yield f"{path.name}[{number}]", row
                    number += 1
    except (OSError, pyarrow.ArrowException) as exc:
        raise PromptSourceError(f"{path}: not readable as Parquet after {number} rows: {exc}") from exc


def _batch_rows(batch: Any) -> Iterator[Any]:
    """The rows of a batch; where Python can hold one of them not, that one becomes a RowError."""
    try:
        yield from batch.to_pylist()
    except ValueError:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except ValueError as exc:
                yield RowError(f"not readable: {exc}")
