"""A stage in two processes on the CPU: the same loss as in one, and what fails there is told here."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from cai import weights
from cai.cli import train as command
from cai.documents import Document
from cai.errors import ConfigError, EngineError, Interrupted
from cai.training import ONLINE, launching, running
from cai.training.data import load_data
from cai.training.folder import TrainFolder
from cai.training.launching import find_config, launch
from cai.training.running import train
from tests import runs
from tests.stages import Shown, dialogue, losses, make_settings, pair, write_rows
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_two_processes_train_as_one_with_the_same_global_batch(tiny, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [pair(n, 0.5 + n / 40) for n in range(16)])
    one, two, show = tmp_path / "one", tmp_path / "two", Shown()
    trl = {"max_steps": 3, "max_grad_norm": 0.1}
    train("dpo", make_settings("dpo", tiny, rows, trl=trl | {"per_device_train_batch_size": 4}), one)
    settings = make_settings("dpo", tiny, rows, trl=trl | {"per_device_train_batch_size": 2})
    manifest = launch("dpo", settings, two, "continue", "2", show)
    assert (manifest["status"], manifest["steps"]) == ("done", 3)
    assert json.loads((two / "run" / "identity.json").read_text())["processes"] == 2
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    first, second = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-5
    assert show.notes[0] == "reading the data"
    assert show.notes.count("training") == 1, "the first process alone shows"
    assert show.steps[-1] == (3, 3)
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())


def test_ctrl_c_while_a_launched_training_ends_is_told_to_whoever_launched_it(tiny, tmp_path, monkeypatch):
    def ends(command: list[str], folder: Path, *given: object) -> int:
        (folder / launching.STOP).touch()
        return 0

    monkeypatch.setattr(launching, "_run", ends)
    settings = make_settings("sft", tiny, write_rows(tmp_path / "rows.jsonl", [dialogue(n) for n in range(8)]))
    with pytest.raises(Interrupted, match=f"^stopped, and the training has ended: the model is in {tmp_path}"):
        launching.launch("sft", settings, tmp_path / "out", "continue", None, Shown())


def test_a_training_is_not_gone_on_with_in_another_number_of_processes(tiny, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [dialogue(n) for n in range(8)])
    settings = make_settings("sft", tiny, rows)
    told = running.identity("sft", settings, "1", load_data("sft", settings), 4)
    with TrainFolder(tmp_path / "out", told) as folder:
        (folder.checkpoints / "checkpoint-1").mkdir(parents=True)
        (folder.checkpoints / "checkpoint-1" / "trainer_state.json").write_text("{}")
    alone = running.identity("sft", settings, "1", load_data("sft", settings))
    with pytest.raises(ConfigError, match=r"holds another training:\n  processes: 4 there, 1 now\nuse another -o, or --fresh"):
        TrainFolder(tmp_path / "out", alone)
    with TrainFolder(tmp_path / "out", told) as folder:
        assert folder.finished is None


@pytest.mark.slow
def test_what_a_process_raises_is_raised_here(tiny, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [dialogue(n) for n in range(8)])
    settings = make_settings("sft", tiny, rows, trl={"max_length": 3})
    with pytest.raises(ConfigError, match=r"^all 8 rows are longer than 3 tokens; raise trl.max_length"):
        launch("sft", settings, tmp_path / "out", "continue", "2", Shown())


@pytest.mark.slow
def test_a_ctrl_c_stops_all_processes_after_the_same_step_and_the_same_command_goes_on(tiny, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [dialogue(n) for n in range(64)])
    settings, out = make_settings("sft", tiny, rows, trl={"max_steps": 400}), tmp_path / "out"
    (tmp_path / "sft.yaml").write_text(settings.model_dump_json())
    command = ("train", "sft", "--recipe", tmp_path / "sft.yaml", "-o", out, "--launch", 2)
    process = runs.start(*command)
    runs.wait_until(lambda: process.poll() is not None or (out / "run" / "log.jsonl").exists(), 120)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "stopped after step " in said
    (kept,) = (out / "checkpoints").glob("checkpoint-*")
    shorter = runs.start(*command)
    runs.wait_until(lambda: shorter.poll() is not None or len(losses(out)) > int(kept.name.split("-")[1]), 120)
    shorter.kill()  # its processes end with it
    _, said = shorter.communicate(timeout=60)
    assert f"training goes on from {kept.name}" in said
    time.sleep(3)
    grown = len(losses(out))
    time.sleep(1)
    assert len(losses(out)) == grown


@pytest.mark.parametrize("begun", [False, True])
def test_a_second_ctrl_c_ends_the_processes_and_says_where_it_goes_on(tiny, tmp_path, monkeypatch, begun):
    def impatient(command: list[str], *given: Any) -> int:
        (out / "members" / "0").mkdir(parents=True)
        if begun:
            (out / "members" / "0" / "done.json").write_text("{}")
        return usual(["sleep", "60"], *given)

    def interrupt(*given: Any) -> int:
        raise KeyboardInterrupt

    usual, out = launching._run, tmp_path / "out"
    monkeypatch.setattr(launching, "_run", impatient)
    monkeypatch.setattr(launching, "_show_events", interrupt)
    settings, show = make_settings("sft", tiny, write_rows(tmp_path / "rows.jsonl", [dialogue(n) for n in range(8)])), Shown()
    where = "with the next reward model" if begun else "from the start, there being no checkpoint yet"
    with pytest.raises(Interrupted, match=f"^stopped at once; the same command continues {where}$"):
        launching.launch("sft", settings, out, "continue", None, show)
    assert len(show.notes) == 1, "at the first one"


def test_configurations_that_come_with_the_package():
    for file in (Path(launching.__file__).parent / "launch").glob("*.yaml"):
        told = yaml.safe_load(file.read_text())
        assert told["num_processes"] == -1, "given by --launch"
        assert told["mixed_precision"] == "no", "as TRL's arguments have it"
    config, processes = find_config("4")
    assert (config.name, processes) == ("ddp.yaml", 4)


def test_a_configuration_of_ones_own(tmp_path):
    (tmp_path / "mine.yaml").write_text("distributed_type: MULTI_CPU")
    assert find_config(str(tmp_path / "mine.yaml")) == (tmp_path / "mine.yaml", None)


@pytest.mark.parametrize(
    ("name", "written", "message"),
    [
        ("mine.yaml", "{", "while parsing a flow node"),
        ("mine.yaml", "- 2", "expected a mapping of keys, such as distributed_type: MULTI_GPU"),
        ("mine.yaml", "", "expected a mapping of keys"),
        ("mine.yaml", "num_processes: 2", "A `distributed_type` must be specified in the config file"),
        ("mine.yaml", "distributed_type: MANY", "'MANY' is not a valid DistributedType"),
        ("mine.yaml", "{distributed_type: MULTI_GPU, model: tiny}", r"unknown keys \(\['model'\]\)"),
        ("mine.json", "{num_processes: 2}", "Expecting property name enclosed in double quotes"),
        ("mine.yaml", b"\xff\xfe\x00", "."),
    ],
)
def test_a_file_that_is_no_configuration_of_accelerate(tmp_path, name, written, message):
    file = tmp_path / name
    file.write_bytes(written if isinstance(written, bytes) else written.encode())
    with pytest.raises(
        ConfigError, match=rf"^--launch {file}: this is no configuration of accelerate: .*{message}.*; write one"
    ):
        find_config(str(file))


@pytest.mark.parametrize("how", ["1", "0", "many", "none.yaml", "zero4"])
def test_what_names_no_configuration(how):
    with pytest.raises(ConfigError, match=r"expected a number of processes from 2 on, one of ddp, fsdp, zero2, zero3"):
        find_config(how)


def test_a_configuration_for_gpus_without_any(monkeypatch):
    monkeypatch.setattr(launching, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"--launch fsdp: one process for each GPU, of which there are 0; give a number"):
        find_config("fsdp")


DEEPSPEED = {"distributed_type": "DEEPSPEED"}
MERGES = {"lora": {"merge": True}}


@pytest.mark.parametrize(
    ("stage", "keys", "message"),
    [
        ("sft", MERGES, "adapters are merged in one process, which ZeRO 3 cannot; set lora.merge: false, or use fsdp or zero2"),
        ("reward", {}, "reward models are measured in one process, which ZeRO 3 cannot; use fsdp or zero2"),
    ],
)
def test_zero_3_with_what_loads_a_model_in_one_process(tiny, tmp_path, monkeypatch, stage, keys, message):
    monkeypatch.setattr(launching, "device_count", lambda: 2)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**DEEPSPEED, "deepspeed_config": {"zero_stage": 3}}))
    (tmp_path / "named.yaml").write_text(
        yaml.safe_dump({**DEEPSPEED, "deepspeed_config": {"deepspeed_config_file": str(tmp_path / "ds.json")}})
    )
    settings = make_settings(stage, tiny, tmp_path / "rows.jsonl", **keys)
    for how in ("zero3", str(tmp_path / "mine.yaml"), str(tmp_path / "named.yaml")):
        with pytest.raises(ConfigError, match=f"^--launch {how}: {message}$"):
            launch(stage, settings, tmp_path / "out", "continue", how, Shown())
    for how in ("zero2", "fsdp", "2"):
        launching.check_launch(stage, settings, how)


@pytest.mark.parametrize("stage", ONLINE)
def test_zero_3_with_completions_that_are_rewarded(tiny, tmp_path, monkeypatch, stage):
    monkeypatch.setattr(launching, "device_count", lambda: 2)
    settings = make_settings(stage, tiny, tmp_path / "rows.jsonl", reward="checked")
    with pytest.raises(ConfigError, match=r"^--launch zero3: reward models are loaded whole, .*; use fsdp or zero2$"):
        launching.check_launch(stage, settings, "zero3")
    for how in ("zero2", "fsdp", "2"):
        launching.check_launch(stage, settings, how)


@pytest.mark.parametrize("keys", [{"lora": True}, {"trl": {"value_function": "head"}}])
def test_a_value_function_on_weights_that_are_spread(tiny, tmp_path, monkeypatch, keys):
    monkeypatch.setattr(launching, "device_count", lambda: 2)
    settings = make_settings("ppo", tiny, tmp_path / "rows.jsonl", reward="checked", **keys)
    for how in ("zero2", "zero3", "fsdp"):
        with pytest.raises(ConfigError, match=rf"^--launch {how}: with .* the value function shares .* each process holds all"):
            launching.check_launch("ppo", settings, how)
    for how in ("ddp", "2"):
        launching.check_launch("ppo", settings, how)


def test_zero_3_with_what_it_can(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "device_count", lambda: 2)
    for keys in ({}, {"lora": {"merge": False}}):
        settings = make_settings("dpo", tiny, tmp_path / "rows.jsonl", **keys)
        launching.check_launch("dpo", settings, "zero3")


def test_what_was_written_down_is_raised_as_it_was(tmp_path):
    launching.write_failure(tmp_path, 1, Interrupted("stopped after step 3"))
    time.sleep(0.01)
    launching.write_failure(tmp_path, 0, EngineError("later"))
    with pytest.raises(Interrupted, match="stopped after step 3"):
        launching._raise_failure(tmp_path, 1)


def test_processes_that_could_tell_nothing(tmp_path):
    (tmp_path / launching.LOG).write_text("\n".join(f"line {n}" for n in range(20)))
    with pytest.raises(EngineError, match=r"(?s)ended with exit code -9 .*the same command continues.*line 12\n.*line 19$"):
        launching._raise_failure(tmp_path, -9)
    launching._raise_failure(tmp_path, 0)


@pytest.mark.parametrize(
    ("given", "gpus", "added"),
    [
        ({}, 4, {"CUDA_VISIBLE_DEVICES": "0"}),
        ({"CUDA_VISIBLE_DEVICES": "3,1"}, 2, {"CUDA_VISIBLE_DEVICES": "3"}),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937, GPU-1a2b3c4d"}, 2, {"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}),
        ({"CUDA_VISIBLE_DEVICES": "2"}, 1, {}),
        ({}, 0, {}),
        ({"LOCAL_RANK": "1"}, 4, {}),
    ],
)
def test_one_process_sees_one_gpu(monkeypatch, given, gpus, added):
    monkeypatch.setattr(weights, "device_count", lambda: gpus)
    assert weights.one_gpu(given) == added


@pytest.mark.parametrize(("how", "visible"), [(None, "5"), ("2", "5,6")])
def test_what_a_process_gets_of_several_gpus(tiny, tmp_path, monkeypatch, how, visible):
    seen = tmp_path / "seen"
    program = f"import os; open({str(seen)!r}, 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    run = launching._run
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    monkeypatch.setattr(weights, "device_count", lambda: 2)
    monkeypatch.setattr(launching, "_run", lambda command, *more: run([sys.executable, "-c", program], *more))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("{}")
    launch("sft", make_settings("sft", tiny, tmp_path / "rows.jsonl"), tmp_path / "out", "continue", how, Shown())
    assert seen.read_text() == visible


def test_a_training_in_the_process_of_the_command_sees_one_gpu(tiny, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    monkeypatch.setattr(weights, "device_count", lambda: 2)
    monkeypatch.setattr(running, "train", lambda *given: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setattr("cai.cli.training.show_summary", lambda *given: None)
    command.run("sft", make_settings("sft", tiny, "rows.jsonl"), tmp_path, "continue", None, Document("{}", "none"))
    assert seen == ["5"]
