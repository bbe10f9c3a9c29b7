"""From a prompt to a record, and the runner that drives many."""

from cai.generation.budget import Budget, Price
from cai.generation.journaled import Engines, Journal, JournaledEngine, journaled_generator
from cai.generation.record import Generator, calls_per_prompt, template_hash
from cai.generation.runner import RecordMaker, Runner
from cai.generation.tally import Tally

__all__ = [
    "Budget",
    "Engines",
    "Generator",
    "Journal",
    "JournaledEngine",
    "Price",
    "RecordMaker",
    "Runner",
    "Tally",
    "calls_per_prompt",
    "journaled_generator",
    "template_hash",
]
