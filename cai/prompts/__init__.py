"""Prompt sources, and the prompt sets that come with the package."""

from cai.prompts.sources import Row, built_in_sets, count_prompts, read_prompts

__all__ = ["Row", "built_in_sets", "count_prompts", "read_prompts"]
