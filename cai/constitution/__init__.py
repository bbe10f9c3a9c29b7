"""Principles as data: schema, loading and composition."""

from cai.constitution.loading import BUILT_IN, built_in_names, load_constitution, to_yaml
from cai.constitution.schema import Check, Constitution, Example, Exemplar, Principle

__all__ = [
    "BUILT_IN",
    "Check",
    "Constitution",
    "Example",
    "Exemplar",
    "Principle",
    "built_in_names",
    "load_constitution",
    "to_yaml",
]
