"""An engine driven by a function, for tests of the project and of its users. No model is involved.

def respond(request):
    if isinstance(request, GenerateRequest):
        return "a completion"                       # or a Completion
    if isinstance(request, ChoiceRequest):
        return [-0.1, -2.3]                         # a log-probability for each of request.choices
    return -12.5                                    # a LoglikelihoodRequest: the log-probability; a RewardRequest: the reward
"""

from __future__ import annotations

import hashlib
import inspect
import math
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cai.engines.base import (
    Capability,
    ChoiceLogprobs,
    ChoiceRequest,
    GenerateRequest,
    Loglikelihood,
    LoglikelihoodRequest,
    Reward,
    RewardRequest,
)
from cai.errors import ConfigError, RequestError, nearest, raised
from cai.types import Completion, Messages

Request = GenerateRequest | ChoiceRequest | LoglikelihoodRequest | RewardRequest


class ScriptedEngine:
    """Answers each request with what `function` returns for it; the function may be async and may raise."""

    capabilities: frozenset[Capability] = frozenset({"generate", "choice_logprobs", "loglikelihood", "reward"})

    revision: str | None = None
    choice_form = ""

    def __init__(self, function: Callable[[Any], Any], fingerprint: str = "scripted") -> None:
        """`fingerprint` stands for the function in the journal: give another one when its answers change."""
        self._function = function
        self.fingerprint = fingerprint

    async def _ask(self, request: Request) -> Any:
        try:
            answer = self._function(request)
            return await answer if inspect.isawaitable(answer) else answer
        except (SystemExit, GeneratorExit) as exc:  # a script may not end the run that asks it
            raise RequestError(f"the scripted function raised {raised(exc)}") from exc

    async def generate(self, request: GenerateRequest) -> Completion:
        """The function's text; tokens are counted as words."""
        answer = await self._ask(request)
        if isinstance(answer, Completion):
            return answer
        if not isinstance(answer, str):
            raise RequestError(f"the scripted function returned {answer!r:.60} to a GenerateRequest; expected a str")
        words = sum(_words(message.content) for message in request.messages)
        return Completion(str(answer), "stop", words, _words(answer), request.seed)

    async def choice_logprobs(self, prompts: Sequence[Messages], choices: Sequence[str]) -> list[ChoiceLogprobs]:
        """The function's log-probabilities, asked for one prompt at a time."""
        results = []
        for messages in prompts:
            answer = await self._ask(ChoiceRequest(messages, tuple(choices)))
            try:
                logprobs = tuple(float(number) for number in answer)
            except (TypeError, ValueError):
                logprobs = ()
            if len(logprobs) != len(choices) or isinstance(answer, str):
                raise RequestError(
                    f"the scripted function returned {answer!r:.60} to a ChoiceRequest; expected {len(choices)} numbers"
                )
            results.append(ChoiceLogprobs(logprobs, 0))
        return results

    async def loglikelihood(self, request: LoglikelihoodRequest) -> Loglikelihood:
        """The function's number; tokens are counted as words."""
        answer = await self._ask(request)
        if not isinstance(answer, int | float) or math.isnan(answer):
            raise RequestError(f"the scripted function returned {answer!r:.60} to a LoglikelihoodRequest; expected a number")
        return Loglikelihood(float(answer), _words(request.continuation), 0)

    async def reward(self, request: RewardRequest) -> Reward:
        """The function's number."""
        answer = await self._ask(request)
        if not isinstance(answer, int | float) or math.isnan(answer):
            raise RequestError(f"the scripted function returned {answer!r:.60} to a RewardRequest; expected a number")
        return Reward(float(answer), 0)

    async def close(self) -> None:
        """Nothing is held."""


def _words(text: str) -> int:
    return len(text.split())


def load_scripted(target: str) -> ScriptedEngine:
    """The engine for `FILE.py:FUNCTION`; the file's content is its fingerprint. Raises `ConfigError`."""
    file, colon, name = target.rpartition(":")
    path = Path(file).expanduser()
    if not colon or not file.endswith(".py"):
        raise ConfigError(f"scripted:{target}: expected scripted:FILE.py:FUNCTION")
    if not path.is_file():
        raise ConfigError(f"scripted:{target}: there is no file {path}")
    try:
        namespace = runpy.run_path(str(path))
    except (Exception, SystemExit) as exc:  # the user's own code may raise anything at import
        raise ConfigError(f"scripted:{target}: {path} failed to run: {raised(exc)}") from exc
    function = namespace.get(name)
    if not callable(function):
        names = [key for key, value in namespace.items() if inspect.isfunction(value)]
        raise ConfigError(f"scripted:{target}: {path} has no function '{name}'{nearest(name, names)}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return ScriptedEngine(function, f"scripted:{path.name}:{name}@{digest}")
