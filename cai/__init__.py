"""Train a language model from a written constitution instead of from human labels.

    from pathlib import Path
    import cai

    recipe = cai.Recipe(constitution="harmless", prompts={"source": "red-team", "limit": 24})
    manifest = cai.generate(recipe, Path("runs/mine"))

`import cai` loads none of torch, transformers, datasets or trl.
"""

from cai.config import Recipe, load_recipe
from cai.constitution import Constitution, load_constitution
from cai.errors import CaiError
from cai.pipeline import generate, load_pipeline, run_pipeline
from cai.types import Completion, Message, PreferencePair, Prompt, Record, Revision, Verdict

__all__ = [
    "CaiError",
    "Completion",
    "Constitution",
    "Message",
    "PreferencePair",
    "Prompt",
    "Recipe",
    "Record",
    "Revision",
    "Verdict",
    "generate",
    "load_constitution",
    "load_pipeline",
    "load_recipe",
    "run_pipeline",
]
