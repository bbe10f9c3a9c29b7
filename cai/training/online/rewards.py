"""Rewards of completions while they are written: reward models, judges, checks, and Python functions, as TRL calls them.

Each is asked for a number for each completion, or None where it has none. Any other answer ends the training with an error that
names the reward: a wrong one would be learned.
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import inspect
import json
import math
import os
import runpy
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from copy import copy, deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from cai.config import JudgeConfig, Recipe
from cai.constitution import Constitution, Principle, load_constitution
from cai.engines import build_engine
from cai.errors import CaiError, CapabilityError, ConfigError, ContextLengthError, EngineError, VerdictError, nearest, raised
from cai.judging import NEEDS
from cai.judging.checks import ChecksJudge, prepare
from cai.judging.likelihood import LikelihoodJudge
from cai.judging.pointwise import PointwiseJudge
from cai.judging.score import ScoreJudge
from cai.rewards.model import RewardModel, check_reward_model
from cai.training.online.settings import OnlineSettings, Source
from cai.training.online.versions import function_file, version_of
from cai.types import Message, Messages

Dialogue = Sequence[Mapping[str, str]]
Rewards = list[float | None]
Tell = Callable[[str, Sequence[Dialogue], Sequence[str], Rewards], object]
"""Is told a reward's name, the prompts, the texts of the completions, and what each was worth."""


class Reward:
    """One reward, checked: what TRL takes for a reward function."""

    def __init__(self, name: str, score: Callable[..., Any], tell: Tell | None = None, kind: str = "reward") -> None:
        """`score` takes `prompts`, `completions` and columns, and may be `async`; `tell` is told each answer; `kind` is what
        errors call it."""
        self.__name__, self._score, self._tell = name, score, tell
        self._called = f"{kind} '{name}'"
        self._runner = asyncio.Runner()  # one loop for all calls: a session of HTTP belongs to the loop that it began in
        weakref.finalize(self, _close, self._runner)

    def __call__(self, /, prompts: Sequence[Dialogue], completions: Sequence[Dialogue], **columns: Any) -> Rewards:
        """A number or None for each completion, of which functions get copies. Raises `EngineError` for any other answer."""
        columns = {"log_metric": _nowhere, "log_extra": _nowhere, **columns}
        rows = [json.loads(one) for one in columns.pop("columns", ())]
        names = {name for row in rows for name in row} - columns.keys() - {"prompts", "completions"}
        columns |= {name: [row.get(name) for row in rows] for name in names}
        if "completion_ids" in columns:
            columns["completion_ids"] = deepcopy(columns["completion_ids"])
        if "trainer_state" in columns:
            columns["trainer_state"] = copy(columns["trainer_state"])
        log = columns["log_metric"]
        columns["log_metric"] = partial(self._note, log)
        try:
            with _as_before():
                answer = self._score(prompts=deepcopy(prompts), completions=deepcopy(completions), **columns)
                answer = self._runner.run(answer) if inspect.iscoroutine(answer) else answer
                answer = [*answer] if isinstance(answer, Iterator) else answer
        except CaiError:
            raise
        except (Exception, SystemExit) as exc:  # the boundary of the user's own code
            raise EngineError(f"{self._called} raised {raised(exc)}{_where(exc)}") from exc
        rewards = self._checked(answer, completions)
        log(f"rewards/{self.__name__}/none", rewards.count(None) / max(1, len(rewards)))
        if self._tell:
            self._tell(self.__name__, prompts, [one[-1]["content"] for one in completions], rewards)
        return rewards

    def _note(self, log: Callable[[str, float], object], name: str, value: Any) -> None:
        """What a function logs."""
        try:
            number = float(value)
            if not isinstance(name, str):
                raise TypeError("not a name")
        except (TypeError, ValueError) as exc:
            raise EngineError(
                f"{self._called}: log_metric takes a name and a number, found {_short(name)}, {_short(value)}"
            ) from exc
        log(name, number)

    def _checked(self, answer: Any, completions: Sequence[Dialogue]) -> Rewards:
        try:
            if isinstance(answer, str | bytes | Mapping | Set):
                raise TypeError("not a list, though its items can be numbers")
            if any(isinstance(one, str | bytes) for one in answer):
                raise TypeError("texts, though they can be numbers")
            rewards = [None if one is None else float(one) for one in answer]
        except (TypeError, ValueError, OverflowError) as exc:
            raise EngineError(
                f"{self._called} returned {_short(answer)}; expected a list with a number for each completion"
            ) from exc
        if len(rewards) != len(completions):
            raise EngineError(f"{self._called} returned {len(rewards)} numbers, and there are {len(completions)} completions")
        for place, one in enumerate(rewards):
            if one is not None and not math.isfinite(one):
                text = completions[place][-1]["content"]
                raise EngineError(
                    f"{self._called} is {one} for the completion {text!r:.120}; return None where there is no reward"
                )
        return rewards


def _short(value: Any) -> str:
    """On one line."""
    return " ".join(repr(value).split())[:80]


def _nowhere(*given: Any, **named: Any) -> None:
    """What functions log by where nothing is logged, as while a policy is measured."""


@contextmanager
def _as_before() -> Iterator[None]:
    """What a function may change for the whole process is put back: the working folder, and whether gradients are taken."""
    import torch

    folder = None
    with suppress(OSError):  # it may be gone, which is no function's fault
        folder = os.getcwd()
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        if folder is not None:
            with suppress(OSError):
                os.chdir(folder)


def _where(exc: BaseException) -> str:
    """` (FILE:LINE)` of what raised in a user's function, in the file that the function is in; empty for what is no function of
    Python."""
    frames = traceback.extract_tb(exc.__traceback__)[1:]  # the first is the call, others what runs a coroutine
    frames = [one for one in frames if Path(one.filename).parent != Path(asyncio.__file__).parent]
    if not frames or frames[0].filename == __file__:
        return ""
    last = [one for one in frames if one.filename == frames[0].filename][-1]
    return f" ({Path(last.filename).name}:{last.lineno})"


def build_reward(source: Source, tell: Tell | None = None, kind: str = "reward") -> Reward:
    """The reward of a source, or what else of that kind it is. Raises `ConfigError` for what cannot be had, `EngineError` for
    weights that do not load."""
    if source.model is not None:
        return Reward(source.name, ModelReward(RewardModel.load(source.model)), tell, kind)
    if source.function is not None:
        return Reward(source.name, find_function(source.function), tell, kind)
    constitution = load_constitution(source.constitution or "")
    return Reward(source.name, JudgeReward(constitution, source.judge or JudgeConfig(method="checks")), tell, kind)


def check_rewards(settings: OnlineSettings, unmade: Collection[str] = ()) -> None:
    """Raises `ConfigError` for a reward, gold measure or critic that can be seen to be wrong without loading a model, and for a
    gold measure that is trained on; `unmade` are reward models that are not there yet."""
    sources = {f"reward[{place}]" if settings.reward[1:] else "reward": one for place, one in enumerate(settings.reward)}
    for key, source in (sources | ({"gold": settings.gold} if settings.gold else {})).items():
        try:
            check_source(source, unmade)
        except ConfigError as exc:
            raise type(exc)(f"{key}: {exc}") from exc
    if settings.gold and settings.gold.model not in unmade:
        gold = version_of(settings.gold)
        if any(version_of(one) == gold for one in settings.reward if one.model not in unmade):
            raise ConfigError("gold: this is trained on as a reward; an honest measure is one that is not")
    critic = getattr(settings, "critic", None)
    if critic is not None and critic not in unmade:
        try:
            check_reward_model(critic)
        except ConfigError as exc:
            raise ConfigError(f"critic: {exc}") from exc


def check_source(source: Source, unmade: Collection[str] = ()) -> None:
    """Raises `ConfigError` for what can be seen to be wrong without loading a model."""
    if source.model is not None and source.model not in unmade:
        check_reward_model(source.model)
    if source.function is not None:
        check_function(source.function)
    if source.constitution is not None:
        judge = source.judge or JudgeConfig(method="checks")
        _principles(load_constitution(source.constitution), judge)
        _pointwise(judge)


class ModelReward:
    """Rewards of a reward model, normalised as it was trained to be; how far its members disagree goes into the log."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model

    def __call__(self, /, prompts: Sequence[Dialogue], completions: Sequence[Dialogue], **columns: Any) -> Rewards:
        """One reward each, None where a dialogue does not fit into the model's context. Raises as `RewardModel.score` does."""
        dialogues = [[*prompt, *one] for prompt, one in zip(prompts, completions, strict=True)]
        try:
            places = list(range(len(dialogues)))
            scores = self.model.score(dialogues)
        except ContextLengthError:
            places = [place for place in places if self._fits(dialogues[place])]
            if not places:
                return [None] * len(dialogues)
            scores = self.model.score([dialogues[place] for place in places])
        if scores.members.shape[1] > 1 and (log := columns.get("log_metric")):
            log("reward_disagreement", float(scores.members.std(axis=1).mean()))
        found = dict(zip(places, map(float, scores.reward), strict=True))
        return [found.get(place) for place in range(len(dialogues))]

    def _fits(self, dialogue: Dialogue) -> bool:
        try:
            self.model.encode(dialogue)
        except ContextLengthError:
            return False
        return True


class JudgeReward:
    """What a judge of single completions says under the principles of a constitution, averaged by their weights (direct RLAIF,
    Lee et al. 2023, arXiv 2309.00267, section 2.3).

    Of `checks` in [0, 1]; of `score` a rating from 1 to 10 moved into [-1, 1]; of `likelihood` nats. A completion of which the
    judge's answer is none, or that does not fit into its context, has no reward.
    """

    def __init__(self, constitution: Constitution, config: JudgeConfig) -> None:
        """Raises `ConfigError` where nothing of the constitution can be judged so."""
        self._principles, self._config = _principles(constitution, config), config
        self._judge = _pointwise(config)

    async def __call__(self, /, prompts: Sequence[Dialogue], completions: Sequence[Dialogue], **columns: Any) -> Rewards:
        """One reward each."""
        pairs = zip(prompts, completions, strict=True)
        return list(await asyncio.gather(*(self._one(_messages(prompt), one[-1]["content"]) for prompt, one in pairs)))

    async def _one(self, prompt: Messages, text: str) -> float | None:
        try:
            ratings = await self._judge.rate(prompt, text, self._principles)
        except (VerdictError, ContextLengthError):
            return None
        weights = [one.weight for one in self._principles]
        mean = sum(rating * weight for rating, weight in zip(ratings, weights, strict=True)) / sum(weights)
        return (mean - 5.5) / 4.5 if self._config.method == "score" else mean


def _close(runner: asyncio.Runner) -> None:
    """In a thread of its own where this one runs another loop, in which none can be closed."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        runner.close()
    else:
        threading.Thread(target=runner.close).start()


def _pointwise(config: JudgeConfig) -> PointwiseJudge:
    if config.method == "checks":
        return ChecksJudge()
    engine = build_engine(Recipe(judge=config).judge_model(config), section="judge")
    if missing := sorted(NEEDS[config.method] - engine.capabilities):
        raise CapabilityError(f"judge.method: {config.method} needs {missing[0]}, which {config.model} does not offer")
    return ScoreJudge(engine) if config.method == "score" else LikelihoodJudge(engine, config)


def _principles(constitution: Constitution, config: JudgeConfig) -> list[Principle]:
    """Those that the judge can judge by."""
    by_checks = config.method == "checks"
    found = [one for one in constitution.comparing if bool(one.check) == by_checks]
    if not found:
        missing = "check; add one, or name a judge beside it" if by_checks else "preference question"
        raise ConfigError(f"constitution '{constitution.name}' has no principle with a {missing}")
    prepare(found, config.allow_python)
    return found


def _messages(dialogue: Dialogue) -> Messages:
    return tuple(Message(turn["role"], turn["content"]) for turn in dialogue)  # type: ignore[arg-type]


def check_function(target: str) -> None:
    """Raises `ConfigError` where FILE.py:NAME or package.module:NAME is seen to mean nothing; runs no code of it."""
    file, name = function_file(target), target.rpartition(":")[2]
    if file.suffix != ".py":
        return
    try:
        known = set(_bound(ast.parse(file.read_bytes(), str(file))))
    except (SyntaxError, ValueError) as exc:
        raise ConfigError(f"function '{target}': {raised(exc)}") from exc
    if name not in known and not known & {"*", "__getattr__"}:
        raise ConfigError(f"function '{target}': {file.name} has no such function{nearest(name, known)}")


def _bound(module: ast.Module) -> Iterator[str]:
    """The names that a module binds, those within `if`, `try` and `with` too."""
    waiting: list[ast.AST] = [module]
    while waiting:
        one = waiting.pop()
        if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield one.name
            continue
        if isinstance(one, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in one.names)
        if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store):
            yield one.id
        waiting += ast.iter_child_nodes(one)


def find_function(target: str) -> Callable[..., Any]:
    """The function that FILE.py:NAME or package.module:NAME means, whose code is run. Raises `ConfigError`."""
    place, _, name = target.rpartition(":")
    file = function_file(target)
    try:
        names = _run(file) if place.endswith(".py") else vars(importlib.import_module(place))
    except (Exception, SystemExit) as exc:  # the user's own code may raise anything
        raise ConfigError(f"function '{target}': {raised(exc)}") from exc
    if not callable(function := names.get(name)):
        known = [one for one, value in names.items() if callable(value)]
        what = f"is {function!r:.60}, and no function" if name in names else f"has no such function{nearest(name, known)}"
        raise ConfigError(f"function '{target}': {name if name in names else file.name} {what}")
    return function  # type: ignore[no-any-return]


def _run(file: Path) -> dict[str, Any]:
    """The names of a file, which may import what lies beside it, as under `python FILE`."""
    beside = str(file.absolute().parent)
    sys.path.insert(0, beside)
    try:
        return runpy.run_path(str(file))
    finally:
        with suppress(ValueError):  # unless the file took it out itself
            sys.path.remove(beside)
