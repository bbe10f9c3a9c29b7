"""Principles that a program verifies (after rule-based rewards, Mu et al. 2024, arXiv 2411.01111): no model is asked.

    - id: brief
      check: {max_words: 120}
    - id: no-boilerplate
      check: {must_not_match: "(?i)as an ai language model"}
    - id: ours
      check: {python: mypackage.rules:polite}        only where the user allows it

A completion passes or fails (1 or 0; a Python function may say anything between), and the first of two is preferred with
probability 0.5 + (its score - the other's) / 2.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import regex

from cai.constitution import Check, Principle
from cai.errors import ConfigError, VerdictError, raised
from cai.judging.base import Reading
from cai.judging.pointwise import PointwiseJudge
from cai.store import content_hash
from cai.types import Messages

_SECONDS = 2.0
"""After so long, a regular expression on one completion is given up: some take years."""


class ChecksJudge(PointwiseJudge):
    """Checks each completion under those principles that have a check."""

    name = "checks"

    async def rate(self, prompt: Messages, text: str, principles: Sequence[Principle]) -> list[float]:
        """1 where a check is passed, 0 where not."""
        return [score(principle, prompt, text) for principle in principles]

    def leaning(self, reading: Reading) -> float:
        """Half the difference of the scores."""
        return (reading[0] - reading[1]) / 2


def score(principle: Principle, prompt: Messages, text: str) -> float:
    """The score of one completion in [0, 1]. Raises `VerdictError` where a check itself fails."""
    check = principle.check
    assert check is not None
    try:
        return _score(check, prompt, text)
    except TimeoutError as exc:
        raise VerdictError(f"principle '{principle.id}': its regular expression took over {_SECONDS:.0f} s") from exc


def _score(check: Check, prompt: Messages, text: str) -> float:
    [(kind, wanted)] = check.model_dump(exclude_none=True).items()
    match kind:
        case "max_words":
            passed = len(text.split()) <= wanted
        case "min_words":
            passed = len(text.split()) >= wanted
        case "max_characters":
            passed = len(text) <= wanted
        case "min_characters":
            passed = len(text) >= wanted
        case "must_match":
            passed = _matches(wanted, text)
        case "must_not_match":
            passed = not _matches(wanted, text)
        case "valid_json":
            passed = _is_json(text) == wanted
        case "language":
            passed = _language(text) == wanted
        case "max_grade":
            passed = _grade(text) <= wanted
        case _:
            return _python(wanted, prompt, text)
    return float(passed)


def _matches(pattern: str, text: str) -> bool:
    return regex.search(pattern, text, timeout=_SECONDS) is not None


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _no_constant(name: str) -> NoReturn:
    """NaN and the infinities, which Python reads, are no JSON (RFC 8259, section 6)."""
    raise ValueError(name)


def _language(text: str) -> str:
    """The ISO 639-1 code of a text's language."""
    from py3langid import classify

    return str(classify(text)[0])


def _grade(text: str) -> float:
    """The years of school that a text asks for (Flesch-Kincaid, Kincaid et al. 1975); without a word, 0.

    Syllables are counted as pyphen hyphenates: textstat's own count downloads a dictionary, and differs where it cannot.
    """
    import textstat

    words = [word for word in text.lower().split() if any(map(str.isalnum, word))]
    if not words:
        return 0.0
    syllables = sum(len(_hyphenation().positions(word)) + 1 for word in words)
    return float(0.39 * len(words) / textstat.sentence_count(text) + 11.8 * syllables / len(words) - 15.59)


@cache
def _hyphenation() -> Any:
    from pyphen import Pyphen

    return Pyphen(lang="en_US")


def _python(target: str, prompt: Messages, text: str) -> float:
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
    try:
        value = float(find_function(target)(turns, text))
    except ConfigError:
        raise
    except (Exception, SystemExit) as exc:  # the boundary of one completion: the user's own code
        raise VerdictError(f"check {target} raised {raised(exc)}") from exc
    if not 0 <= value <= 1:
        raise VerdictError(f"check {target} returned {value}; expected a bool or a number from 0 to 1")
    return value


def find_function(target: str) -> Any:
    """The function that `package.module:function` names. Raises `ConfigError`."""
    module, _, name = target.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as exc:  # the user's own code may raise anything at import
        problem = f"{raised(exc)}; expected package.module:function, installed or in a folder of PYTHONPATH"
        raise ConfigError(f"check {target}: {problem}") from exc
    if not callable(function):
        raise ConfigError(f"check {target}: this is no function")
    return function


def python_hashes(principles: Sequence[Principle]) -> dict[str, str]:
    """For each check in Python the hash of the file that defines its function; what that imports is not looked at."""
    targets = [principle.check.python for principle in principles if principle.check and principle.check.python]
    return {f"check {target}": _file_hash(target, id(find_function(target))) for target in targets}


@cache
def _file_hash(target: str, loaded: int) -> str:
    """Taken once for what was `loaded`, an object's id: a file that changes later is not what runs."""
    function = inspect.unwrap(find_function(target))
    try:
        file = inspect.getsourcefile(function if inspect.isroutine(function) else type(function))
        return content_hash(Path(file or "").read_text(encoding="utf-8", errors="replace"))
    except (TypeError, OSError):  # it is compiled, or made on the spot
        return "without a source"


def prepare(principles: Sequence[Principle], allow_python: bool) -> None:
    """Refuse what could not be checked, before the run: code that is not allowed or not there, packages that are missing."""
    for principle in principles:
        check = principle.check
        if check is None:
            continue
        where = f"principle '{principle.id}'"
        if check.python is not None:
            if not allow_python:
                raise ConfigError(f"{where} runs the code of {check.python}; if you trust it: --set judge.allow_python=true")
            find_function(check.python)
        for key, wanted, package in (("language", check.language, "py3langid"), ("max_grade", check.max_grade, "textstat")):
            if wanted is not None and not _installed(package):
                raise ConfigError(f"{where} checks {key}, which needs {package}: pip install 'cai-toolkit[judge]'")


def _installed(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True
