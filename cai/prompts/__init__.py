"""Prompt sources, and the prompt sets that come with the package."""

from cai.prompts.pairs import Pair, read_pairs
from cai.prompts.sources import Row, built_in_sets, count_prompts, read_prompts

__all__ = ["Pair", "Row", "built_in_sets", "count_prompts", "read_pairs", "read_prompts"]
