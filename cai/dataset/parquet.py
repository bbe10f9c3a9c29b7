"""Views of records written as Parquet shards, `data/<config>/<split>-00000-of-0000N.parquet`, in flat memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cai.config import DatasetConfig
from cai.dataset import views
from cai.dataset.statistics import Statistics
from cai.types import Record

CONFIGS = ("sft", "preference", "unpaired", "trace")
_ROW_GROUP = 1000

_message = pa.struct([("role", pa.string()), ("content", pa.string())])
_messages = pa.list_(_message)
_completion = pa.struct(
    [
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("seed", pa.int64()),
    ]
)
_revision = pa.struct(
    [
        ("round", pa.int64()),
        ("principle_id", pa.string()),
        ("critique", _completion),
        ("revision", _completion),
        ("text", pa.string()),
        ("cleaned", pa.list_(pa.string())),
        ("problem", pa.string()),
    ]
)
_principle_verdict = pa.struct(
    [
        ("principle_id", pa.string()),
        ("weight", pa.float64()),
        ("readings", pa.list_(pa.list_(pa.float64()))),
        ("probability", pa.float64()),
        ("judge", pa.string()),
    ]
)
_verdict = pa.struct(
    [
        ("first", pa.string()),
        ("second", pa.string()),
        ("source", pa.string()),
        ("probability", pa.float64()),
        ("principles", pa.list_(_principle_verdict)),
    ]
)
SCHEMAS = {
    "sft": pa.schema([("messages", _messages), ("prompt_id", pa.string())]),
    "preference": pa.schema(
        [
            ("prompt", _messages),
            ("chosen", _messages),
            ("rejected", _messages),
            ("chosen_probability", pa.float64()),
            ("pair_id", pa.string()),
            ("prompt_id", pa.string()),
            ("source", pa.string()),
            ("principle_ids", pa.list_(pa.string())),
            ("principle_probabilities", pa.list_(pa.float64())),
        ]
    ),
    "unpaired": pa.schema(
        [("prompt", _messages), ("completion", _messages), ("label", pa.bool_()), ("prompt_id", pa.string())]
    ),
    "trace": pa.schema(
        [
            ("prompt_id", pa.string()),
            ("category", pa.string()),
            ("prompt", _messages),
            ("candidates", pa.list_(_completion)),
            ("revisions", pa.list_(_revision)),
            ("verdicts", pa.list_(_verdict)),
        ]
    ),
}


class _Shards:
    """The files of one configuration and split; their count is known, and in their names, only at the end."""

    def __init__(self, folder: Path, split: str, schema: pa.Schema, shard_rows: int) -> None:
        self._folder, self._split, self._schema, self._shard_rows = folder, split, schema, shard_rows
        self._writer: pq.ParquetWriter | None = None
        self._buffer: list[dict[str, Any]] = []
        self._files: list[Path] = []
        self.rows = 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, row: dict[str, Any]) -> None:
        if self.rows % self._shard_rows == 0 and self.rows:
            self._end_file()
        self._buffer.append(row)
        self.rows += 1
        if len(self._buffer) >= _ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._writer is None:
            self._files.append(self._folder / f"{self._split}.part{len(self._files)}")
            self._writer = pq.ParquetWriter(self._files[-1], self._schema)
        if self._buffer:  # an empty row group would break `load_dataset`; a file without any does not
            self._writer.write_table(pa.Table.from_pylist(self._buffer, schema=self._schema))
        self._buffer = []

    def _end_file(self) -> None:
        self._flush()
        assert self._writer
        self._writer.close()
        self._writer = None

    def close(self) -> None:
        if self._buffer or self._writer or not self._files:
            self._end_file()
        for index, file in enumerate(self._files):
            file.rename(self._folder / f"{self._split}-{index:05d}-of-{len(self._files):05d}.parquet")


def write_dataset(records: Iterable[Record], folder: Path, config: DatasetConfig) -> Statistics:
    """Write every view of the records into `folder`, and say what is in them.

    `train` is always there, `test` only where it has rows.
    """
    statistics = Statistics()
    shards: dict[tuple[str, str], _Shards] = {}

    def add(name: str, split: str, rows: Iterable[views.Row | views.Dropped]) -> None:
        for row in rows:
            if isinstance(row, views.Dropped):
                statistics.dropped[f"{name}: {row.reason}"] += 1
                continue
            if (name, split) not in shards:
                shards[name, split] = _Shards(folder / name, split, SCHEMAS[name], config.shard_rows)
            shards[name, split].add(row)

    for name in CONFIGS:
        shards[name, "train"] = _Shards(folder / name, "train", SCHEMAS[name], config.shard_rows)
    for record in records:
        split = views.split_of(record, config.test_fraction)
        add("sft", split, views.sft(record, config))
        add("preference", split, views.preference(record, config))
        add("unpaired", split, views.unpaired(record, config))
        add("trace", split, [views.trace(record)])
        statistics.add(record, config)
    for (name, split), shard in shards.items():
        shard.close()
        statistics.rows.setdefault(name, {})[split] = shard.rows
    return statistics
