"""Runs a recipe: `planning` checks it, `running` makes the records and the dataset, `manifest` says what came of it."""

from cai.pipeline.planning import Plan, dry_run, lacking_principles, plan, plan_labels
from cai.pipeline.running import Watch, generate, label, local_folder, read_records

__all__ = [
    "Plan",
    "Watch",
    "dry_run",
    "generate",
    "label",
    "lacking_principles",
    "local_folder",
    "plan",
    "plan_labels",
    "read_records",
]
