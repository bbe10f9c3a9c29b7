"""The dataset as it lies on disk: loaded through the card, in shards, the same bytes each time, nothing lost."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
import pandas as pd
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

from cai.config import DatasetConfig, Recipe
from cai.constitution import load_constitution
from cai.dataset import CONFIGS, Statistics, render_card, views, write_dataset
from cai.dataset.parquet import SCHEMAS
from cai.types import Message, Record
from tests.records import HOSTILE, completion, record, revision, sure, verdict

datasets.disable_progress_bars()
CONSTITUTION = load_constitution("harmless")
CONFIG = DatasetConfig(test_fraction=0.3)


def some_records(count: int, seed: int = 0) -> list[Record]:
    """Records of every kind: with and without revisions, ties, truncated, with samples, with hostile texts."""
    draw = random.Random(seed)
    return [_some_record(number, draw) for number in range(count)]


def _some_record(number: int, draw: random.Random) -> Record:
    candidates = [completion(f"answer {number} {draw.choice(HOSTILE)}", length=draw.random() < 0.2)]
    candidates += [completion(f"other {number}")] * draw.randint(0, 2) + [completion("")] * draw.randint(0, 1)
    problem = draw.choice([None, None, None, "refusal", "truncated"])
    revisions = [revision(1, f"revised {number} " + "x" * draw.randint(0, 9), problem, ("preamble",) * draw.randint(0, 1))]
    verdicts = []
    if problem is None:
        readings = [(draw.gauss(0, 2), draw.gauss(0, 2)) for _ in range(draw.randint(1, 4))]
        verdicts.append(verdict("candidate-0", "revision-1", *draw.choice([readings, [(1.0, -1.0)], [(0.0, 0.0)]])))
    if len(candidates) > 1 and candidates[1].text:
        verdicts.append(sure("candidate-0", "candidate-1", draw.random(), "samples"))
    return record(f"prompt {number} {draw.choice(HOSTILE)}", candidates, revisions, verdicts, prompt_id=f"id-{number}")


def manifest_of(statistics: Statistics) -> dict[str, Any]:
    return {
        "constitution": {"hash": CONSTITUTION.hash},
        "policy": "the policy's fingerprint",
        "judge_is_policy": True,
        "prompts": {"read": 1, "duplicates": 0, "quarantined": {}},
        "dataset": statistics.to_json(),
    }


def write(records: list[Record], out: Path, config: DatasetConfig = CONFIG) -> Statistics:
    statistics = write_dataset(iter(records), out / "data", config)
    example = records[0] if records else record()
    card = render_card(manifest_of(statistics), Recipe().model_copy(update={"dataset": config}), CONSTITUTION, example)
    (out / "README.md").write_text(card, encoding="utf-8")
    return statistics


def load(out: Path, name: str) -> datasets.DatasetDict:
    return datasets.load_dataset(str(out), name, cache_dir=str(out / "cache"))


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out / "data")): path.read_bytes() for path in sorted((out / "data").rglob("*.parquet"))}


def text_message() -> Any:
    return datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})


FEATURES = {
    "sft": {"messages": text_message(), "prompt_id": datasets.Value("string")},
    "preference": {
        "prompt": text_message(),
        "chosen": text_message(),
        "rejected": text_message(),
        "chosen_probability": datasets.Value("float64"),
        "pair_id": datasets.Value("string"),
        "prompt_id": datasets.Value("string"),
        "source": datasets.Value("string"),
        "principle_ids": datasets.List(datasets.Value("string")),
        "principle_probabilities": datasets.List(datasets.Value("float64")),
    },
    "unpaired": {
        "prompt": text_message(),
        "completion": text_message(),
        "label": datasets.Value("bool"),
        "prompt_id": datasets.Value("string"),
    },
}


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return some_records(80)


@pytest.fixture(scope="module")
def out(records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out")
    write(records, folder)
    return folder


@pytest.mark.parametrize("name", ["sft", "preference", "unpaired"])
def test_load_dataset_finds_columns_types_and_rows_through_the_card(records, out, name):
    loaded = load(out, name)
    view = {"sft": lambda one: views.sft(one, CONFIG), "preference": lambda one: views.preference(one, CONFIG)}
    view["unpaired"] = lambda one: views.unpaired(one, CONFIG)
    assert set(loaded) == {"train", "test"}
    for split, rows in loaded.items():
        assert dict(rows.features) == FEATURES[name]
        expected = [
            row
            for one in records
            if views.split_of(one, CONFIG.test_fraction) == split
            for row in view[name](one)
            if isinstance(row, dict)
        ]
        assert rows.to_list() == expected
        assert rows.num_rows > 3


def test_preference_is_the_default_configuration(out):
    assert load(out, None)["train"].to_list() == load(out, "preference")["train"].to_list()
    assert datasets.get_dataset_config_names(str(out)) == list(CONFIGS)


def test_labels_are_soft_and_never_a_tie(out):
    found = [row["chosen_probability"] for split in load(out, "preference").values() for row in split]
    assert all(0.5 < one <= 1 for one in found)
    assert len(set(found)) > 10


def test_no_prompt_is_in_two_splits(records, tmp_path):
    shouted = [replace(one.prompt, messages=(Message("user", one.prompt.messages[0].content.upper()),)) for one in records]
    doubled = records + [replace(one, prompt=prompt) for one, prompt in zip(records, shouted, strict=True)]
    write(doubled, tmp_path)
    for name in CONFIGS:
        column = "messages" if name == "sft" else "prompt"
        texts = {split: {row[column][0]["content"].casefold() for row in rows} for split, rows in load(tmp_path, name).items()}
        assert texts["train"] & texts["test"] == set()


def test_every_record_is_in_the_trace_and_reads_with_pandas(records, out):
    frame = pd.concat(pd.read_parquet(file) for file in sorted((out / "data" / "trace").glob("*.parquet")))
    rows = {row["prompt_id"]: row for row in frame.to_dict("records")}
    assert len(frame) == len(records)
    for one in records:
        row = rows[one.prompt.id]
        assert row["category"] == "category"
        assert row["prompt"][0]["content"] == one.prompt.messages[0].content
        assert [each["text"] for each in row["candidates"]] == [each.text for each in one.candidates]
        assert [each["critique"]["seed"] for each in row["revisions"]] == [each.critique.seed for each in one.revisions]
        assert [list(each["cleaned"]) for each in row["revisions"]] == [list(each.cleaned) for each in one.revisions]
        assert [each["probability"] for each in row["verdicts"]] == [each.probability for each in one.verdicts]
        for each, kept in zip(row["verdicts"], one.verdicts, strict=True):
            seen = [tuple(tuple(reading) for reading in judged["readings"]) for judged in each["principles"]]
            assert seen == [judged.readings for judged in kept.principles]
    flat = frame.explode("verdicts")["verdicts"].dropna()
    assert flat.map(lambda each: each["probability"]).between(0, 1).all()


@pytest.mark.parametrize("made", [[], [record()], [record(revisions=[revision(1, "", "empty")])]])
def test_train_is_on_disk_without_rows_too_and_test_is_not(made, tmp_path):
    statistics = write(made, tmp_path, DatasetConfig(test_fraction=0))
    for name in CONFIGS:
        table = pq.read_table(tmp_path / "data" / name / "train-00000-of-00001.parquet")
        assert table.schema.equals(SCHEMAS[name])
        assert table.num_rows == (len(made) if name == "trace" else 0)
        assert statistics.rows[name] == {"train": table.num_rows}
    expected = ["trace"] if made else []
    assert re.findall("config_name: (.*)", (tmp_path / "README.md").read_text()) == expected
    if made:
        assert load(tmp_path, "trace")["train"].num_rows == 1


def test_a_configuration_loads_where_only_one_of_its_splits_has_rows(tmp_path):
    made = [record(f"prompt {number}", ["a"], [revision(1, "b")]) for number in range(40)]
    judged = [
        replace(one, verdicts=(sure("candidate-0", "revision-1", 0.1),)) if views.split_of(one, 0.3) == "test" else one
        for one in made
    ]
    statistics = write(judged, tmp_path)
    assert statistics.rows["preference"]["train"] == 0 < statistics.rows["preference"]["test"]
    assert set(load(tmp_path, "preference")) == {"test"}
    assert set(load(tmp_path, "sft")) == {"train", "test"}


@pytest.mark.parametrize(
    ("rows", "shard_rows", "sizes"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (3, 3, [3]), (1, 1, [1]), (0, 3, [0]), (5, 1, [1] * 5)]
)
def test_shards_are_full_and_say_how_many_they_are(tmp_path, rows, shard_rows, sizes):
    made = [record(f"prompt {number}", ["a"], [revision(1, f"b {number}")]) for number in range(rows)]
    write(made, tmp_path, DatasetConfig(test_fraction=0, shard_rows=shard_rows))
    found = sorted((tmp_path / "data" / "sft").iterdir())
    assert [file.name for file in found] == [f"train-{index:05d}-of-{len(sizes):05d}.parquet" for index in range(len(sizes))]
    assert [pq.read_metadata(file).num_rows for file in found] == sizes
    texts = [row["messages"][1]["content"] for file in found for row in pq.read_table(file).to_pylist()]
    assert texts == [f"b {number}" for number in range(rows)]


def test_rows_beyond_one_group_make_no_empty_groups(tmp_path):
    made = [record(f"prompt {number}", ["a"], [revision(1, "b")]) for number in range(2500)]
    write_dataset(made, tmp_path, DatasetConfig(test_fraction=0, shard_rows=2000))
    groups = []
    for file in sorted((tmp_path / "sft").iterdir()):
        metadata = pq.read_metadata(file)
        groups.append([metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)])
    assert groups == [[1000, 1000], [500]]


def test_the_same_records_make_the_same_bytes(records, out, tmp_path):
    write(records, tmp_path)
    assert files(tmp_path) == files(out)


def naive(records: list[Record], config: DatasetConfig) -> dict[str, float]:
    """The means, computed the long way round from the records alone."""
    judged = [judged for one in records for verdict in one.verdicts for judged in verdict.principles]
    kept = []
    for one in records:
        for each in one.verdicts:
            sureness = max(each.probability, 1 - each.probability)
            chosen, rejected = (each.first, each.second) if each.probability > 0.5 else (each.second, each.first)
            if sureness > config.min_probability and not one.truncated(chosen):
                kept.append((sureness, len(one.text(chosen)), len(one.text(rejected))))

    def half(left, right):
        return 0.5 if left == right else float(left > right)

    revised = [each.probability for one in records for each in one.verdicts if each.source == "revision"]
    return {
        "candidates_truncated": fmean(each.finish_reason == "length" for one in records for each in one.candidates),
        "candidate_length": fmean(len(each.text) for one in records for each in one.candidates),
        "order_flips": fmean(
            (each.readings[0][0] - each.readings[0][1]) * (each.readings[1][0] - each.readings[1][1]) < 0 for each in judged
        ),
        "first_shown": fmean(
            score for each in judged for score in (half(*each.readings[0]), half(*reversed(each.readings[1])))
        ),
        "revision_preferred": fmean(half(0.5, probability) for probability in revised),
        "chosen_probability": fmean(one for one, _, _ in kept),
        "chosen_length": fmean(length for _, length, _ in kept),
        "rejected_length": fmean(length for _, _, length in kept),
    }


@pytest.mark.parametrize("least", [0.5, 0.7])
def test_statistics_agree_with_a_naive_count(records, tmp_path, least):
    config = DatasetConfig(test_fraction=0.3, min_probability=least)
    statistics = write(records, tmp_path, config)
    found = statistics.to_json()
    assert found["means"] == pytest.approx(naive(records, config), abs=1e-4)
    assert found["records"] == len(records) == sum(found["rows"]["trace"].values())
    for name in CONFIGS:
        assert found["rows"][name] == {split: rows.num_rows for split, rows in load(tmp_path, name).items()}
    problems = Counter(each.problem for one in records for each in one.revisions if each.problem)
    assert problems == {key[11:]: count for key, count in found["dropped"].items() if key.startswith("revisions: ")}


def test_every_verdict_is_a_row_or_is_counted(records, tmp_path):
    config = DatasetConfig(min_probability=0.7)
    found = write(records, tmp_path, config).to_json()
    dropped = {key: count for key, count in found["dropped"].items() if key.startswith("preference: ")}
    verdicts = sum(max(1, len(one.verdicts)) for one in records)
    assert sum(found["rows"]["preference"].values()) + sum(dropped.values()) == verdicts
    assert {key.partition(": ")[2] for key in dropped} == {
        "tie",
        "less sure than dataset.min_probability",
        "chosen is cut off by the token limit",
        "nothing to compare",
    }
    without = sum(one.final_revision is None for one in records)
    assert found["dropped"]["sft: no usable revision"] == without


def test_records_are_read_once_and_one_by_one(tmp_path):
    alive = 0

    def lazily():
        nonlocal alive
        for one in some_records(5):
            alive += 1
            yield one

    assert write_dataset(lazily(), tmp_path, CONFIG).records == alive == 5


def ranked_records() -> list[Record]:
    return [
        record(
            f"prompt {number}",
            ["one", "two", "three"],
            verdicts=[
                sure("candidate-0", "candidate-1", 0.7, "samples"),
                sure("candidate-0", "candidate-2", 0.9, "samples"),
                sure("candidate-1", "candidate-2", 0.6, "samples"),
            ],
        )
        for number in range(12)
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("test_fraction", 0.5),
        ("min_probability", 0.8),
        ("ranking", "bradley-terry"),
        ("sft", "best"),
        ("shard_rows", 3),
        ("license", "cc-by-4.0"),
    ],
)
def test_no_key_of_the_dataset_is_ignored(tmp_path, key, value):
    assert key in DatasetConfig.model_fields

    def written(name: str, config: DatasetConfig) -> Any:
        write(ranked_records(), tmp_path / name, config)
        return files(tmp_path / name), (tmp_path / name / "README.md").read_text(encoding="utf-8")

    base = written("base", DatasetConfig())
    assert base == written("again", DatasetConfig())
    assert base != written("changed", DatasetConfig.model_validate({key: value}))


def test_every_key_of_the_dataset_is_tried_above():
    tried = {case[0] for case in test_no_key_of_the_dataset_is_ignored.pytestmark[0].args[1]}
    assert tried == set(DatasetConfig.model_fields)


def test_a_ranked_dataset_holds_one_pair_a_prompt_and_all_verdicts_in_its_trace(tmp_path):
    statistics = write(ranked_records(), tmp_path, DatasetConfig(ranking="bradley-terry", test_fraction=0))
    assert statistics.rows["preference"] == {"train": 12}
    loaded = load(tmp_path, "preference")["train"]
    assert {(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in loaded} == {("one", "three")}
    (file,) = (tmp_path / "data" / "trace").glob("train-*")
    assert all(len(row["verdicts"]) == 3 for row in pq.read_table(file).to_pylist())
