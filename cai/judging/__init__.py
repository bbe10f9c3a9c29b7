"""Judges: one file a method, all giving a `Verdict`. `build_judge` chooses by `judge.method`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from cai.config import JudgeConfig, Method
from cai.constitution import Constitution, Principle
from cai.engines import Capability, Engine
from cai.judging.base import Judge
from cai.judging.calibration import CalibratedJudge, LoadedCalibration
from cai.judging.checks import ChecksJudge
from cai.judging.choice import ChoiceJudge
from cai.judging.combined import Member, PanelJudge, WithChecks
from cai.judging.likelihood import LikelihoodJudge
from cai.judging.reasoning import ReasoningJudge
from cai.judging.reward_model import RewardModelJudge
from cai.judging.score import ScoreJudge
from cai.judging.sections import judge_sections, section_names
from cai.judging.text import MAX_TOKENS, TextJudge

__all__ = [
    "NEEDS",
    "Judge",
    "build_judge",
    "generated_tokens",
    "judge_calls",
    "judge_sections",
    "section_names",
    "usable_principles",
]

NEEDS: dict[Method, frozenset[Capability]] = {
    "choice": frozenset({"choice_logprobs"}),
    "reasoning": frozenset({"generate", "choice_logprobs"}),
    "likelihood": frozenset({"loglikelihood"}),
    "score": frozenset({"choice_logprobs"}),
    "text": frozenset({"generate"}),
    "checks": frozenset(),
    "reward-model": frozenset({"reward"}),
    "panel": frozenset(),
}
"""What each method asks of its engine; a panel's members ask for themselves."""
_NO_CALIBRATIONS: Mapping[str, LoadedCalibration] = MappingProxyType({})


def build_judge(
    config: JudgeConfig,
    constitution: Constitution,
    engine: Callable[[JudgeConfig], Engine],
    calibrations: Mapping[str, LoadedCalibration] = _NO_CALIBRATIONS,
) -> Judge:
    """The judge of a recipe; `engine` gives the engine of a judge section (a panel has one for each member).

    `calibrations` holds what was read from each file that the section or a member names.
    """
    if config.method == "panel":
        return PanelJudge(
            [
                Member(one.name, one.weight, build_judge(config.member(one), constitution, engine, calibrations))
                for one in config.members
            ]
        )
    judge = _judge(config, constitution, engine)
    return CalibratedJudge(judge, calibrations[config.calibration].calibration) if config.calibration else judge


def _judge(config: JudgeConfig, constitution: Constitution, engine: Callable[[JudgeConfig], Engine]) -> Judge:
    model = None if config.method == "checks" else _model_judge(config, constitution, engine(config))
    if _has_checks(config, constitution):
        return WithChecks(model, ChecksJudge(), config.method == "reward-model")
    return model or ChecksJudge()


def _model_judge(config: JudgeConfig, constitution: Constitution, engine: Engine) -> Judge:
    match config.method:
        case "choice":
            return ChoiceJudge(engine, config, constitution)
        case "reasoning":
            return ReasoningJudge(engine, config)
        case "likelihood":
            return LikelihoodJudge(engine, config)
        case "score":
            return ScoreJudge(engine)
        case "text":
            return TextJudge(engine, config)
        case _:
            return RewardModelJudge(engine)


def _has_checks(config: JudgeConfig, constitution: Constitution) -> bool:
    return any(principle.check for principle in usable_principles(config, constitution))


def usable_principles(config: JudgeConfig, constitution: Constitution) -> tuple[Principle, ...]:
    """The principles that a judge of this method can judge by."""
    if config.method == "checks":
        return tuple(principle for principle in constitution.comparing if principle.check)
    return constitution.comparing


def judge_calls(config: JudgeConfig, constitution: Constitution, completions: int, comparisons: int) -> int:
    """The model calls of `comparisons` comparisons among `completions` completions; a call is one prompt to the judge.

    What `text` draws again, since it was no answer, comes on top.
    """
    if config.method == "panel":
        return sum(judge_calls(config.member(one), constitution, completions, comparisons) for one in config.members)
    able = usable_principles(config, constitution)
    asked = [principle for principle in able if not principle.check]
    drawn = len(asked) if config.principles == "all" else min(config.principles, len(asked))
    match config.method:
        case "choice":
            return comparisons * drawn * 2
        case "reasoning":
            return comparisons * drawn * 2 * config.samples * 2
        case "text":
            return comparisons * drawn * 2 * config.samples
        case "likelihood":
            return completions * drawn * 2
        case "score":
            return completions * drawn
        case "reward-model":
            return completions
        case _:
            return 0


def generated_tokens(config: JudgeConfig, constitution: Constitution, comparisons: int) -> int:
    """The most tokens that the judge generates for so many comparisons."""
    if config.method == "panel":
        return sum(generated_tokens(config.member(one), constitution, comparisons) for one in config.members)
    each = {"reasoning": config.max_tokens / 2, "text": MAX_TOKENS}.get(config.method, 0)  # a thought, then a choice
    return int(each * judge_calls(config, constitution, 0, comparisons)) if each else 0
