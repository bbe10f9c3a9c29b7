"""Datasets as pure functions of records: sft, preference, unpaired, trace. Changing one makes no model call.

A preference row, abridged:

    {"prompt": [{"role": "user", "content": "Write a mean joke about ..."}],
     "chosen": [{"role": "assistant", "content": "How about ..."}],
     "rejected": [{"role": "assistant", "content": "Why did ..."}],
     "chosen_probability": 0.77, "source": "revision",
     "principle_ids": ["no-harassment", ...], "principle_probabilities": [0.81, ...],
     "pair_id": "red-team-insults-001/candidate-0/revision-1", "prompt_id": "red-team-insults-001"}
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from cai.config import DatasetConfig
from cai.dataset.ranking import strengths
from cai.judging.base import leaning, probability
from cai.types import Messages, PreferencePair, Record, Verdict

Row = dict[str, Any]


class Dropped(NamedTuple):
    """Something that became no row of a view, and why; counted in the manifest."""

    reason: str


def split_of(record: Record, test_fraction: float) -> str:
    """`train` or `test`, by a hash of the prompt's letters and digits, so that near-equal prompts stay together."""
    whole = unicodedata.normalize("NFKC", " ".join(turn.content for turn in record.prompt.messages))
    text = " ".join(re.findall(r"\w+", whole.casefold()))
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
    return "test" if share < test_fraction else "train"


def sft(record: Record, config: DatasetConfig) -> Iterator[Row | Dropped]:
    """The prompt with what `dataset.sft` names, by default its final revision, as the supervised phase of Bai et al. 2022."""
    match config.sft:
        case "final":
            texts = _final(record)
        case "all":
            texts = _revised(record)
        case "best":
            texts = _best(record)
    for text in texts:
        if isinstance(text, Dropped):
            yield text
        else:
            yield {"messages": _plain(record.prompt.messages) + _answer(text), "prompt_id": record.prompt.id}


def _final(record: Record) -> Iterator[str | Dropped]:
    final = record.final_revision
    if final:
        yield final.text
    elif record.revisions:
        yield Dropped("no usable revision")
    elif not record.text("candidate-0"):
        yield Dropped("empty completion")


def _revised(record: Record) -> Iterator[str | Dropped]:
    """Every revision that is one, equal ones once."""
    usable = dict.fromkeys(one.text for one in record.revisions if one.problem is None)
    yield from usable
    yield from (Dropped("unusable revision") for one in record.revisions if one.problem is not None)


def _best(record: Record) -> Iterator[str | Dropped]:
    samples = [verdict for verdict in record.verdicts if verdict.source == "samples"]
    name = best_of(samples) if samples else None
    if name is None:
        yield Dropped("no best candidate: a tie" if samples else "no best candidate: nothing to compare")
    elif record.truncated(name):
        yield Dropped("best candidate is cut off by the token limit")
    else:
        yield record.text(name)


def best_of(verdicts: list[Verdict]) -> str | None:
    """Who comes first by these comparisons; None where several do.

    Where all were compared as often, that is the highest mean probability of being preferred; of a tournament, whose winner
    met the strongest, the fewest defeats.
    """
    chances: dict[str, list[float]] = {}
    for verdict in verdicts:
        chances.setdefault(verdict.first, []).append(verdict.probability)
        chances.setdefault(verdict.second, []).append(1 - verdict.probability)
    alike = len({len(found) for found in chances.values()}) == 1
    rank = {
        name: (0 if alike else -sum(one < 0.5 for one in found), round(sum(one - 0.5 for one in found), 9))
        for name, found in chances.items()
    }
    best = max(rank.values())
    first, *others = [name for name, value in rank.items() if value == best]
    return None if others else first


def pairs(record: Record, config: DatasetConfig) -> Iterator[PreferencePair | Dropped]:
    """The judged pairs that carry a preference."""
    if not record.verdicts:
        yield Dropped("nothing to compare")
    for pair in ranked(record) if config.ranking != "none" else (_preferred(record, one) for one in record.verdicts):
        if isinstance(pair, Dropped):
            yield pair
        elif pair.chosen_probability == 0.5:
            yield Dropped("tie")
        elif pair.chosen_probability <= config.min_probability:
            yield Dropped("less sure than dataset.min_probability")
        elif record.truncated(pair.verdict.first):
            yield Dropped("chosen is cut off by the token limit")
        else:
            yield pair


def ranked(record: Record) -> Iterator[PreferencePair | Dropped]:
    """Of the candidates the best against the worst by Bradley and Terry's strengths; and every other judged pair."""
    samples = [verdict for verdict in record.verdicts if verdict.source == "samples"]
    yield from (_preferred(record, verdict) for verdict in record.verdicts if verdict.source != "samples")
    if not samples:
        return
    found = strengths(samples)
    best, worst = max(found, key=found.__getitem__), min(found, key=found.__getitem__)
    for verdict in samples:  # of equal texts only one was compared, so there may be no verdict on these two
        if {verdict.first, verdict.second} == {best, worst}:
            turned = verdict if verdict.first == best else verdict.swap()
            likely = probability(leaning(found[best] - found[worst]))
            yield PreferencePair(record.text(best), record.text(worst), likely, turned)
            return
    yield Dropped("tie")  # all are as strong, or the worst is the best's very text


def _preferred(record: Record, verdict: Verdict) -> PreferencePair:
    """The pair with its verdict turned so that the first completion is the chosen one."""
    turned = verdict if verdict.probability >= 0.5 else verdict.swap()
    return PreferencePair(record.text(turned.first), record.text(turned.second), turned.probability, turned)


def preference(record: Record, config: DatasetConfig) -> Iterator[Row | Dropped]:
    """Chosen and rejected, with the judge's probability as a soft label, and that of each principle beside its id."""
    for pair in pairs(record, config):
        if isinstance(pair, Dropped):
            yield pair
            continue
        names = sorted((pair.verdict.first, pair.verdict.second))
        yield {
            "prompt": _plain(record.prompt.messages),
            "chosen": _answer(pair.chosen),
            "rejected": _answer(pair.rejected),
            "chosen_probability": pair.chosen_probability,
            "pair_id": "/".join((record.prompt.id, *names)),
            "prompt_id": record.prompt.id,
            "source": pair.verdict.source,
            "principle_ids": [verdict.principle_id for verdict in pair.verdict.principles],
            "principle_probabilities": [verdict.probability for verdict in pair.verdict.principles],
        }


def unpaired(record: Record, config: DatasetConfig) -> Iterator[Row | Dropped]:
    """Each completion of a pair by itself, labelled; one that is chosen here and rejected there is left out."""
    labels: dict[str, set[bool]] = {}
    for pair in pairs(record, config):
        if not isinstance(pair, Dropped):
            labels.setdefault(pair.chosen, set()).add(True)
            labels.setdefault(pair.rejected, set()).add(False)
    for text, seen in labels.items():
        if len(seen) == 2:
            yield Dropped("chosen in one pair, rejected in another")
            continue
        yield {
            "prompt": _plain(record.prompt.messages),
            "completion": _answer(text),
            "label": True in seen,
            "prompt_id": record.prompt.id,
        }


def trace(record: Record) -> Row:
    """Everything in a record, flat enough to read with pandas: lists of structs, one row a prompt."""
    return {
        "prompt_id": record.prompt.id,
        "category": record.prompt.category,
        "prompt": _plain(record.prompt.messages),
        "candidates": msgspec.to_builtins(record.candidates),
        "revisions": msgspec.to_builtins(record.revisions),
        "verdicts": [msgspec.to_builtins(verdict) for verdict in record.verdicts],
    }


def _plain(messages: Messages) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
