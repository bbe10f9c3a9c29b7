"""Prompt sources, and the prompt sets that come with the package."""

from cai.prompts.completions import read_completions, to_completion
from cai.prompts.pairs import Pair, read_pairs, to_pair
from cai.prompts.rows import to_prompt
from cai.prompts.sources import Row, built_in_sets, count_prompts, find_source, read_prompts, read_raw

__all__ = [
    "Pair",
    "Row",
    "built_in_sets",
    "count_prompts",
    "find_source",
    "read_completions",
    "read_pairs",
    "read_prompts",
    "read_raw",
    "to_completion",
    "to_pair",
    "to_prompt",
]
