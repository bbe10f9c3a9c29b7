"""Fixtures: a scripted engine's file, recipes for it, and a folder that is a run's."""

from __future__ import annotations

from pathlib import Path

import pytest

from cai.config import Recipe

SCRIPTED = Path(__file__).parent / "scripted.py"


@pytest.fixture
def scripted_recipe() -> Recipe:
    """A recipe on the scripted engine: benign prompts, deterministic answers."""
    return Recipe.model_validate(
        {"policy": {"model": f"scripted:{SCRIPTED}:respond"}, "prompts": {"source": "benign", "limit": 12}}
    )
