"""Generation on a Ray cluster: blocks of prompts go to actors, what they made comes back to the one journal.

jobs.py      what an actor needs to know, with the contents of files; what a block and its outcome are
worker.py    an actor: its own engines, the same coroutine for each prompt as on one machine; it looks for what the journal
             has already before it makes a call
fleet.py     the driver's side: rows into blocks, outcomes into the journal
running.py   a pass on a cluster, from connecting to the end
cluster.py   Ray itself: connecting, what fits, the stream of blocks through Ray Data; only this file imports ray
"""

from cai.distributed.running import run_on_ray

__all__ = ["run_on_ray"]
