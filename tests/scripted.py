"""A scripted engine for tests: every text is a function of the request, and the judge likes short completions."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cai.engines import ChoiceRequest, GenerateRequest, LoglikelihoodRequest

_COMPLETION = re.compile(r"<completion ([AB])>\n(.*?)\n</completion \1>", re.DOTALL)


def respond(request: GenerateRequest | ChoiceRequest | LoglikelihoodRequest) -> str | list[float] | float:
    """Answers of differing lengths; a preference for the shorter completion, with a leaning towards what stands first."""
    if isinstance(request, GenerateRequest):
        return f"A completion of seed {request.seed}. " + "More words follow here. " * (request.seed % 5)
    if isinstance(request, ChoiceRequest):
        lengths = {letter: len(text) for letter, text in _COMPLETION.findall(request.messages[0].content)}
        leaning = (lengths["B"] - lengths["A"]) / 50 + 0.3
        return [-1.0 + leaning / 2, -1.0 - leaning / 2]
    return -float(len(request.continuation))


def logged(request: GenerateRequest | ChoiceRequest | LoglikelihoodRequest) -> str | list[float] | float:
    """The same, with a line in the file `$CALLS_LOG` for every answer that was given."""
    answer = respond(request)
    with Path(os.environ["CALLS_LOG"]).open("a") as log:
        log.write(f"{hash(request)} {type(request).__name__} {request.messages!r:.60}\n")
    return answer
