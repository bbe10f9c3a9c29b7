"""Judges: one file a method, all giving a `Verdict`."""

from cai.judging.choice import ChoiceJudge

__all__ = ["ChoiceJudge"]
