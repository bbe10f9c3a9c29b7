"""From a prompt to a record, and the runner that drives many."""

from cai.generation.budget import Budget, Price
from cai.generation.journaled import JournaledEngine
from cai.generation.record import Generator, calls_per_prompt, template_hash
from cai.generation.runner import Runner
from cai.generation.tally import Tally

__all__ = ["Budget", "Generator", "JournaledEngine", "Price", "Runner", "Tally", "calls_per_prompt", "template_hash"]
