"""Measures of what a run made: how far its judge agrees with people."""

from cai.evaluation.agreement import Agreement, measure

__all__ = ["Agreement", "measure"]
