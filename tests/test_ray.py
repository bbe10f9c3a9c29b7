"""On real Ray: the same bytes as without, and nothing lost or paid for twice when an actor, a node or the driver dies."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from cai.errors import ConfigError, EngineError
from cai.pipeline import generate
from tests.runs import (
    CALLS,
    data_bytes,
    kept_calls,
    log_lines,
    manifest,
    model,
    quarantine,
    recipe,
    start,
    wait_until,
    written_rows,
)

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("default")

PROMPTS = 48
SOURCE = """
import asyncio, json, os
async def respond(request):
    await asyncio.sleep({seconds})
    with open({log!r}, "a") as file:
        file.write(json.dumps(dict(event="answered", key=key(request), pid=os.getpid())) + chr(10))
    return usual(request)
"""


class Case(NamedTuple):
    """A model that notes each call in a log, and a recipe on it."""

    log: Path
    settings: dict[str, Any]

    def recipe(self, prompts: int = PROMPTS, **ray: Any) -> Any:
        settings = {"address": None, "workers": 2, "cpus_per_worker": 1, "block_rows": 4, **ray}
        return recipe("respond", policy=self.settings, prompts={"limit": prompts}, generation={"concurrency": 8}, ray=settings)

    def calls(self) -> Counter[str]:
        return Counter(line["key"] for line in log_lines(self.log))

    def pids(self) -> set[int]:
        return {int(line["pid"]) for line in log_lines(self.log)}


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return made(tmp_path, 0.02)


def made(folder: Path, seconds: float) -> Case:
    log = folder / "calls.jsonl"
    return Case(log, {"model": model(folder, SOURCE.format(log=str(log), seconds=seconds))})


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with two CPUs each; the driver is on the first."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def connected(cluster: Any) -> Iterator[Any]:
    """This process stays a driver, which saves each test some seconds."""
    ray.init(cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()


def reference(case: Case, out: Path, prompts: int = PROMPTS) -> dict[str, bytes]:
    generate(case.recipe(prompts), out)
    case.log.unlink()
    return data_bytes(out)


def test_the_same_dataset_byte_for_byte_and_an_actor_that_is_killed_costs_only_its_blocks(case, connected, tmp_path):
    expected = reference(case, tmp_path / "without")
    killed: list[int] = []

    def kill() -> None:
        wait_until(lambda: len(log_lines(case.log)) > 3 * CALLS, 60)
        killed.append(max(case.pids()))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    done = generate(case.recipe(address="auto", workers=3), tmp_path / "with")
    killer.join()
    assert killed
    assert data_bytes(tmp_path / "with") == expected
    assert done["sessions"][-1]["records_made"] == PROMPTS
    assert kept_calls(tmp_path / "with") == PROMPTS * CALLS == len(case.calls())
    again = sum(case.calls().values()) - PROMPTS * CALLS
    assert 0 < again <= 3 * 4 * CALLS, "what was in the actor's blocks, and nothing else"
    assert len(case.pids()) >= 3

    before = case.calls()
    assert generate(case.recipe(address="auto", workers=1), tmp_path / "with")["sessions"][-1]["calls_made"] == 0
    assert case.calls() == before, "the same command again pays for nothing"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_bytes_with_any_number_of_workers(case, connected, tmp_path, workers):
    expected = reference(case, tmp_path / "without")
    generate(case.recipe(address="auto", workers=workers), tmp_path / "with")
    assert data_bytes(tmp_path / "with") == expected
    assert max(case.calls().values()) == 1


@pytest.mark.slow
def test_rows_that_fail_are_set_aside_as_on_one_machine(connected, tmp_path):
    texts = ["fault:raise", "fine", "fault:nan", "fault:number", "also fine", "fault:nothing", "fault:file"]
    source = written_rows(tmp_path, *({"id": text, "prompt": text} for text in texts), {"no": "prompt"}, {"prompt": "fine"})
    prompts = {"source": source, "limit": None}
    generate(recipe("faulty", prompts=prompts), tmp_path / "without")
    generate(recipe("faulty", prompts=prompts, ray={"address": "auto", "block_rows": 2}), tmp_path / "with")
    assert quarantine(tmp_path / "with") == quarantine(tmp_path / "without")
    assert [one["prompt_id"] for one in quarantine(tmp_path / "with")] == [*texts[:1], *texts[2:4], *texts[5:], None]
    assert data_bytes(tmp_path / "with") == data_bytes(tmp_path / "without")


def test_more_workers_than_there_is_room_for_are_refused(case, connected, tmp_path):
    with pytest.raises(ConfigError, match=r"5 workers with 1 CPUs each do not fit: there is room for 4 \(2 on .*, 2 on .*\)"):
        generate(case.recipe(address="auto", workers=5), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"2 workers with 1 CPUs and 1 GPUs each do not fit: there is room for 0"):
        generate(case.recipe(address="auto", gpus_per_worker=1), tmp_path / "run")


@pytest.mark.slow
def test_an_actor_that_dies_each_time_ends_the_run_with_what_to_do(connected, tmp_path):
    deadly = model(tmp_path, "import os\ndef respond(request):\n    os._exit(1)\n")
    with pytest.raises(EngineError, match=r"workers died more than 4 times.*the same command continues"):
        generate(recipe(policy={"model": deadly}, ray={"address": "auto"}), tmp_path / "run")


@pytest.mark.slow
def test_another_model_on_a_node_is_refused(connected, tmp_path):
    (tmp_path / "model.py").write_text(
        "import os\nif os.environ.get('RAY_RAYLET_PID'):\n    raise SystemError('no such file here')\n"
    )
    with (tmp_path / "model.py").open("a") as file:
        file.write("from tests.scripted import respond\n")
    with pytest.raises(ConfigError, match=r"a worker on .*: scripted:.*failed to run: SystemError: no such file here"):
        generate(recipe(policy={"model": f"scripted:{tmp_path}/model.py:respond"}, ray={"address": "auto"}), tmp_path / "run")


def command(case: Case, out: Path, cluster: Any) -> subprocess.Popen[str]:
    file = out.parent / "recipe.yaml"
    file.write_text(case.recipe().to_yaml())
    return start("generate", "--recipe", file, "-o", out, "--ray", cluster.address, "--workers", 2)


@pytest.mark.slow
def test_a_driver_that_is_killed_loses_only_unfinished_blocks(cluster, tmp_path):
    case = made(tmp_path, 0.1)
    expected = reference(case, tmp_path / "without")
    process = command(case, tmp_path / "with", cluster)
    wait_until(lambda: kept_calls(tmp_path / "with") >= 8 * CALLS, 60)
    process.kill()
    process.communicate()
    kept, before = kept_calls(tmp_path / "with"), sum(case.calls().values())
    assert 0 < kept < PROMPTS * CALLS
    process = command(case, tmp_path / "with", cluster)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert data_bytes(tmp_path / "with") == expected
    assert sum(case.calls().values()) - before <= PROMPTS * CALLS - kept + 2 * 3 * 4 * CALLS
    session = manifest(tmp_path / "with")["sessions"][-1]
    assert session["calls_made"] == PROMPTS * CALLS - kept
    assert kept_calls(tmp_path / "with") == PROMPTS * CALLS


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_calls_in_flight_finish_and_keeps_them(cluster, tmp_path, number):
    case = made(tmp_path, 0.1)
    process = command(case, tmp_path / "run", cluster)
    wait_until(lambda: kept_calls(tmp_path / "run") >= CALLS, 60)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped before the end; the same command continues" in err
    assert "Traceback" not in err
    assert kept_calls(tmp_path / "run") == len(case.calls()) == sum(case.calls().values()) < PROMPTS * CALLS


@pytest.mark.slow
def test_a_node_that_dies_has_its_blocks_done_elsewhere(tmp_path, cluster):
    case = made(tmp_path, 0.05)
    expected = reference(case, tmp_path / "without")
    lost = cluster.add_node(num_cpus=1, resources={"lost": 1}, object_store_memory=80 * 2**20)
    process = start(
        *("generate", "--recipe", saved(case.recipe(), tmp_path), "-o", tmp_path / "with", "--ray", cluster.address),
        *("--workers", 5),
    )
    wait_until(lambda: len(log_lines(case.log)) > 4 * CALLS and len(case.pids()) == 5, 60)
    cluster.remove_node(lost, allow_graceful=False)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert data_bytes(tmp_path / "with") == expected
    assert kept_calls(tmp_path / "with") == PROMPTS * CALLS == len(case.calls())
    assert sum(case.calls().values()) > PROMPTS * CALLS, "the blocks of the node were done again"


def saved(made: Any, folder: Path) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(made.to_yaml())
    return file


@pytest.mark.slow
def test_a_local_cluster_listens_on_this_machine_alone_and_ends_with_the_run(tmp_path):
    case = made(tmp_path, 0.05)
    process = start("generate", "--recipe", saved(case.recipe(), tmp_path), "-o", tmp_path / "run", "--ray", "--workers", 1)
    wait_until(lambda: case.log.exists() or process.poll() is not None, 60)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    listening = [(one.name(), found.laddr.ip) for one in family for found in one.net_connections() if found.status == "LISTEN"]
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert {"raylet", "gcs_server"} <= {name for name, _ in listening}
    assert [(name, address) for name, address in listening if "127.0.0.1" not in address] == []
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_an_address_where_no_cluster_is(case, tmp_path):
    process = start("generate", "--recipe", saved(case.recipe(), tmp_path), "-o", tmp_path / "run", "--ray", "127.0.0.1:1")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "no Ray cluster could be reached at '127.0.0.1:1'" in err
    assert "Traceback" not in err
