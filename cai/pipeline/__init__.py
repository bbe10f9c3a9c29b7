"""Runs a recipe: `planning` checks it, `running` makes the records and the dataset, `manifest` says what came of it.

Runs a pipeline of several stages: `recipe` is what it is told, `steps` unfolds it, `inputs` hashes what decides a step,
`checking` checks every step first, `forecasting` says what is to be done, `stages` does it.
"""

from cai.pipeline.forecasting import Choice, forecast
from cai.pipeline.planning import Plan, dry_run, lacking_principles, plan, plan_labels
from cai.pipeline.recipe import Pipeline, load_pipeline
from cai.pipeline.running import Watch, generate, label, local_folder, read_records
from cai.pipeline.stages import Watcher, run_pipeline

__all__ = [
    "Choice",
    "Pipeline",
    "Plan",
    "Watch",
    "Watcher",
    "dry_run",
    "forecast",
    "generate",
    "label",
    "lacking_principles",
    "load_pipeline",
    "local_folder",
    "plan",
    "plan_labels",
    "read_records",
    "run_pipeline",
]
