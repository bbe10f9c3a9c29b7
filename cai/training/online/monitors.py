"""What completions look like, from their texts alone: what shows that a policy collapses, or earns its reward by length."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import regex

from cai.training.length_effect import length_correlation

if TYPE_CHECKING:
    from collections.abc import Callable

_WORD = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]|[\p{L}\p{M}\p{N}_'’]+")
_NGRAM = 4
_LONG = 40
"""Characters from which on a text with less than an n-gram of words is looked at by its characters."""
_BEGINNING = 200
"""Characters in which a refusal is looked for: later on, the same words tell of someone else."""
_REFUSAL = regex.compile(
    r"""\bI(?:['’]m|\ am)\ (?:really\ |very\ |so\ )?(?:sorry|unable|not\ able|not\ (?:comfortable|willing))
    | \bI\ (?:can['’]?t|cannot|can\ not|won['’]?t|will\ not|must\ decline|refuse|have\ to\ decline)\b
    | \b(?:I\ apologi[sz]e|my\ apologies)\b
    | \bas\ an?\ (?:AI|artificial\ intelligence|language\ model)\b
    | \b(?:not\ something|nothing)\ I\ can\ (?:help|assist)\b""",
    regex.VERBOSE | regex.IGNORECASE,
)
_LEAST_WORDS = 5
"""Of a prompt and of a completion whose languages are compared: that of less cannot be told."""


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case; of scripts without spaces each character."""
    return [str(one).lower() for one in _WORD.findall(text)]


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Distinct-n (Li et al. 2016, arXiv 1510.03055): of all n-grams of words the share that are different ones; None where
    there are none."""
    grams = [gram for text in texts for gram in _grams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(texts: Sequence[str], n: int = _NGRAM) -> float | None:
    """Of the n-grams of one completion the share that stand in it before (Welleck et al. 2020, arXiv 1908.04319, seq-rep-n),
    as a mean over completions, of which those without any have none of it; None where all are such. They are of words, and of
    characters where a long text has fewer than `n` words."""
    grams = [found for text in texts if (found := _grams(words(text), n) or _grams(text if len(text) >= _LONG else "", n))]
    return math.fsum(1 - len(set(one)) / len(one) for one in grams) / len(texts) if grams else None


def _grams(sequence: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(sequence[place : place + n]) for place in range(len(sequence) - n + 1)]


def alike(dialogues: Sequence[str], texts: Sequence[str]) -> float | None:
    """Of all pairs of completions to different dialogues the share that are the same text; None where there is one of them."""
    pairs = _pairs([len(texts)]) - _pairs(Counter(dialogues).values())
    same = _pairs(Counter(texts).values()) - _pairs(Counter(zip(dialogues, texts, strict=True)).values())
    return same / pairs if pairs else None


def _pairs(counts: Iterable[int]) -> int:
    """Within groups of so many."""
    return sum(math.comb(one, 2) for one in counts)


def refusals(texts: Sequence[str]) -> float:
    """The share of completions that begin as refusals do, in English."""
    return sum(_REFUSAL.search(text[:_BEGINNING]) is not None for text in texts) / len(texts)


def language_changes(prompts: Sequence[str], texts: Sequence[str]) -> float | None:
    """The share of completions in another language than their prompt's, of those where both are long enough to tell; None
    where none is, or py3langid is not installed."""
    classify = _classifier()
    pairs = [
        (prompt, text)
        for prompt, text in zip(prompts, texts, strict=True)
        if min(len(words(prompt)), len(words(text))) >= _LEAST_WORDS
    ]
    if classify is None or not pairs:
        return None
    return sum(classify(prompt) != classify(text) for prompt, text in pairs) / len(pairs)


@cache
def _classifier() -> Callable[[str], str] | None:
    try:
        from py3langid import classify
    except ImportError:
        return None
    return lambda text: str(classify(text)[0])


def describe(
    prompts: Sequence[str], texts: Sequence[str], rewards: Sequence[float | None], dialogues: Sequence[str]
) -> dict[str, float]:
    """All of these of one rollout of at least one completion, each with the last words of its prompt, its reward and which
    dialogue it goes on with; without those that cannot be told. Lengths are in words."""
    lengths = [len(words(text)) for text in texts]
    found = {
        "completions": len(texts),
        "words": math.fsum(lengths) / len(texts),
        "empty": lengths.count(0) / len(texts),
        "alike": alike(dialogues, texts),
        "repetition": repetition(texts),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "refusals": refusals(texts),
        "language_changes": language_changes(prompts, texts),
        **_of_rewards(rewards, lengths, dialogues),
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def _of_rewards(rewards: Sequence[float | None], lengths: Sequence[int], dialogues: Sequence[str]) -> dict[str, Any]:
    known = [place for place, one in enumerate(rewards) if one is not None]
    if not known:
        return {}
    values = np.array([rewards[place] for place in known], dtype=float)
    of = np.unique([dialogues[place] for place in known], return_inverse=True)[1]
    found = length_correlation(values, np.array([lengths[place] for place in known], dtype=float), of)
    told = {"reward": float(values.mean()), "reward_spread": float(values.std())}
    return told | {f"length_correlation_{name}": value for name, value in found.items()}
