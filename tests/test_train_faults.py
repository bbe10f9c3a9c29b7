"""What goes wrong while a stage trains: each a clear error, and what was good is kept."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cai.cli.train import check_keys, choose_mode, read_document
from cai.config import ModelConfig
from cai.engines.transformers import TransformersEngine
from cai.errors import ConfigError, EngineError, Interrupted, StoreError
from cai.training import check_installed, watching
from cai.training.arguments import make_arguments
from cai.training.checkpoints import broken_file, find_last
from cai.training.differences import describe
from cai.training.failing import failures
from cai.training.folder import TrainFolder, from_where, kept_in
from cai.training.loading import check_reference, find_model, load_tokenizer
from cai.training.running import train
from tests import runs
from tests.stages import Shown, dialogue, losses, make_settings, pair, resolve_settings, write_rows
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
EACH = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
"""A checkpoint after each of four steps."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), context=256)


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", [dialogue(n) for n in range(16)])


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("checkpoint-*"))


def make_checkpoint(folder: Path) -> None:
    """One that is whole, by the names of what is in it."""
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    for part in ("model", "optimizer", "scheduler", "rng_state"):
        (folder / part).touch()


def at_step(monkeypatch, number, do):
    """Do something before the loss of a step is computed."""
    from trl import SFTTrainer

    compute = SFTTrainer.compute_loss

    def changed(self, *given, **named):
        loss = compute(self, *given, **named)
        return do(loss) if self.state.global_step + 1 == number else loss

    monkeypatch.setattr(SFTTrainer, "compute_loss", changed)


@pytest.mark.parametrize(
    ("trl", "message"),
    [
        ({"learning_rat": 1}, r"trl.learning_rat: SFTConfig has no such key \(did you mean 'learning_rate'\?\)"),
        ({"output_dir": "x"}, r"trl.output_dir: follows from the folder of -o; remove it"),
        ({"seed": 1}, r"trl.seed: follows from seed; remove it"),
        ({"max_steps": -5}, "trl.max_steps: expected 1 or more, or -1 for whole epochs, found -5"),
        ({"save_steps": -1}, "trl.save_steps: expected a number above 0, found -1"),
        ({"dataloader_num_workers": -1}, "trl.dataloader_num_workers: expected a number from 0 on, found -1"),
        ({"use_liger_kernel": True}, "trl.use_liger_kernel: liger_kernel is not installed: pip install liger-kernel"),
        ({"save_only_model": True}, "trl.save_only_model: from weights alone no training goes on as it was; remove it"),
        ({"resume_from_checkpoint": True}, r"trl.resume_from_checkpoint: follows from the same command again; remove it"),
        ({"lr_scheduler_type": "x"}, r"trl: SFTConfig refuses these values: .*x"),
        ({"max_length": 1000}, r"trl.max_length: 1000 is more than the 256 tokens of the model's context; lower it"),
        ({"max_length": 3}, r"all 16 rows are longer than 3 tokens; raise trl.max_length, or use shorter rows"),
        ({"num_train_epochs": "two"}, "trl.num_train_epochs: expected a number, found 'two'"),
        ({"num_train_epochs": None}, "trl.num_train_epochs: expected a number, found None"),
        ({"num_train_epochs": float("nan")}, "trl.num_train_epochs: expected a finite number, found nan"),
        ({"weight_decay": float("inf")}, "trl.weight_decay: expected a finite number, found inf"),
        ({"weight_decay": -1}, "trl.weight_decay: expected a number from 0 on, found -1"),
        ({"max_steps": "3"}, "trl.max_steps: expected a whole number, found '3'"),
        ({"max_length": "long"}, "trl.max_length: expected a whole number or null, found 'long'"),
        ({"learning_rate": True}, "trl.learning_rate: expected a number, found True"),
        ({"learning_rate": -1}, "trl.learning_rate: expected a number from 0 on, found -1"),
        ({"gradient_accumulation_steps": 0}, "trl.gradient_accumulation_steps: expected a number from 1 on, found 0"),
        ({"report_to": ["wandb"]}, r"trl.report_to: wandb is not installed: pip install wandb"),
        ({"report_to": "trackio"}, r"trl.report_to: trackio is not installed: pip install trackio"),
    ],
)
def test_keys_and_values_that_trl_does_not_take(tiny, rows, tmp_path, trl, message, monkeypatch):
    from cai.training import arguments

    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        train("sft", make_settings("sft", tiny, rows, trl=trl), tmp_path / "out")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"quantization": "4bit"}, "quantization: quantized weights cannot be trained themselves; set lora"),
        ({"quantization": "4bit", "lora": True}, "quantization: 4bit needs an NVIDIA GPU, and there is none; remove it"),
    ],
)
def test_models_that_cannot_be_trained_here(tiny, rows, tmp_path, keys, message):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=message):
        train("sft", make_settings("sft", tiny, rows, **keys), tmp_path / "out")
    with pytest.raises(ConfigError, match="model '/none': there is no such folder"):
        train("sft", make_settings("sft", Path("/none"), rows), tmp_path / "out")


def test_a_trainers_own_refusal_is_told(tiny, tmp_path):
    rows = [{"prompt": "a", "completion": "b", "label": n % 2 == 0} for n in range(4)]
    settings = make_settings("kto", tiny, write_rows(tmp_path / "a.jsonl", rows), trl={"per_device_train_batch_size": 1})
    with pytest.raises(ConfigError, match=r"trl: the kto trainer refuses this: .*batch size"):
        train("kto", settings, tmp_path / "out")


def test_a_number_that_yaml_reads_as_a_text(tiny, rows, tmp_path):
    settings = make_settings("sft", tiny, rows, trl={"learning_rate": "1e-4", "lr_scheduler_kwargs": {"min_lr": "2.5E-6"}})
    arguments = make_arguments("sft", settings, tmp_path)
    assert (arguments.learning_rate, arguments.lr_scheduler_kwargs) == (1e-4, {"min_lr": 2.5e-6})


def test_trl_takes_values_of_every_type_that_its_class_has(tiny, rows, tmp_path):
    trl = {"loss_type": "sigmoid", "num_train_epochs": 2, "save_strategy": False, "gradient_checkpointing_kwargs": {"a": True}}
    assert make_arguments("dpo", make_settings("dpo", tiny, rows, trl=trl), tmp_path).loss_type == ["sigmoid"]


def test_a_reward_model_is_no_language_model_to_begin_with_or_to_stay_near(tiny, tmp_path, rows):
    (tmp_path / "classifier").mkdir()
    (tmp_path / "classifier" / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
    with pytest.raises(ConfigError, match=r"model '.*' is a reward model \(a classifier\), which writes nothing"):
        find_model(make_settings("sft", tmp_path / "classifier", rows))
    with pytest.raises(ConfigError, match=r"reference '.*' is a reward model"):
        find_model(make_settings("dpo", tiny, rows, reference=str(tmp_path / "classifier")))
    assert find_model(make_settings("reward", tmp_path / "classifier", rows)).version
    with pytest.raises(ConfigError, match="is a reward model"):
        TransformersEngine(ModelConfig(model=str(tmp_path / "classifier")))


def test_a_reference_reads_the_models_tokens(tiny, tmp_path):
    def other(name, **sizes):
        folder = make_tiny_model(tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | sizes))
        return folder

    rows = write_rows(tmp_path / "rows.jsonl", [pair(n) for n in range(4)])
    turned = other("turned") / "tokenizer.json"
    told = json.loads(turned.read_text())
    numbers = told["model"]["vocab"]
    numbers["a"], numbers["b"] = numbers["b"], numbers["a"]
    turned.write_text(json.dumps(told))
    for reference, message in (
        (other("fewer", vocab_size=100), r"^reference '.*fewer' has 100 tokens where model '.*tiny.*' has 291, whose it reads"),
        (turned.parent, r"^reference '.*turned' has other tokens than model '.*tiny.*'.*; name one with the same tokenizer$"),
    ):
        with pytest.raises(ConfigError, match=message):
            train("dpo", make_settings("dpo", tiny, rows, reference=str(reference)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    bare = other("bare")
    for file in bare.glob("*token*"):
        file.unlink()
    for reference in (other("padded", vocab_size=512), bare):
        check_reference(make_settings("dpo", tiny, rows, reference=str(reference)))


def test_a_chat_template_that_is_broken(tmp_path, rows):
    (make_tiny_model(tmp_path / "broken") / "chat_template.jinja").write_text("{% for message in %}")
    with pytest.raises(EngineError, match=r"the chat template of '.*broken' could not be loaded: TemplateSyntaxError"):
        load_tokenizer(make_settings("sft", tmp_path / "broken", rows))


def test_a_tokenizer_without_a_chat_template(tmp_path, rows):
    (make_tiny_model(tmp_path / "bare") / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"has no chat template; use an instruct model, or save a chat_template.jinja beside"):
        train("sft", make_settings("sft", tmp_path / "bare", rows), tmp_path / "out")


def test_adapters_alone_are_nothing_to_begin_with(tmp_path, rows):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds adapters alone; begin with a model that was saved with lora.merge: true"):
        train("sft", make_settings("sft", tmp_path / "lora", rows), tmp_path / "out")


def test_the_length_follows_the_models_context(tiny, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [dialogue(n, "word " * (200 if n == 3 else 2)) for n in range(8)])
    manifest = train("sft", make_settings("sft", tiny, rows), tmp_path / "out")
    assert manifest["too_long"] == {"train": 1}


def test_a_loss_that_is_no_number_stops_and_the_last_checkpoint_stays(tiny, rows, tmp_path, monkeypatch):
    at_step(monkeypatch, 3, lambda loss: loss * float("nan"))
    with pytest.raises(EngineError) as caught:
        train("sft", make_settings("sft", tiny, rows, trl=EACH), tmp_path / "out")
    told = str(caught.value)
    assert told.startswith("the loss is not a finite number at step 3 of 4 (epoch 0.25); ")
    assert "checkpoint-2 is from before; lower trl.learning_rate" in told
    assert told.endswith("then run again, where cai train needs --fresh (cai run makes a changed stage anew by itself)")
    assert checkpoints(tmp_path / "out") == ["checkpoint-1", "checkpoint-2"]


def test_seconds_are_those_of_all_sessions(tiny, rows, tmp_path, monkeypatch):
    kept, settings = tmp_path / "out" / "run" / "seconds.json", make_settings("sft", tiny, rows, trl=EACH)
    at_checkpoint = []
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda loss: at_checkpoint.append(kept.exists()) or loss * float("nan"))
        with pytest.raises(EngineError):
            train("sft", settings, tmp_path / "out")
    assert at_checkpoint == [True], "one that is killed counts up to its last checkpoint"
    assert 0 < json.loads(kept.read_text())["seconds"] < 500
    kept.write_text('{"seconds": 1000}')
    assert 1000 < train("sft", settings, tmp_path / "out")["seconds"] < 1500
    assert train("sft", settings, tmp_path / "out", "fresh")["seconds"] < 500


def test_a_gradient_that_is_no_number_stops_before_it_is_in_the_weights(tiny, rows, tmp_path, monkeypatch):
    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(context, value):
            return value.clone()

        @staticmethod
        def backward(context, gradient):
            return gradient * float("inf")

    at_step(monkeypatch, 2, Poison.apply)
    with pytest.raises(EngineError, match=r"a gradient is not a finite number at step 2 of 4"):
        train("sft", make_settings("sft", tiny, rows, trl=EACH), tmp_path / "out")
    assert checkpoints(tmp_path / "out") == ["checkpoint-1"]


def test_one_infinite_gradient_of_a_late_parameter_stops_before_it_is_in_the_weights(tiny, rows, tmp_path, monkeypatch):
    """Clipping leaves 0 in all others, so that they look well."""
    from transformers import Trainer

    create, steps = Trainer.create_optimizer, []

    def poisoned(trainer, *given, **named):
        last = list(trainer.model.parameters())[-1]

        def hook(gradient):
            gradient = gradient.clone()
            if trainer.state.global_step == 1:
                gradient.view(-1)[-1] = float("inf")
            return gradient

        last.register_hook(hook)
        optimizer = create(trainer, *given, **named)
        optimizer.register_step_pre_hook(lambda *_: steps.append(trainer.state.global_step))
        return optimizer

    monkeypatch.setattr(Trainer, "create_optimizer", poisoned)
    with pytest.raises(EngineError, match=r"a gradient is not a finite number at step 2 of 4"):
        train("sft", make_settings("sft", tiny, rows, trl=EACH), tmp_path / "out")
    assert steps == [0]
    assert checkpoints(tmp_path / "out") == ["checkpoint-1"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_one_element_that_is_no_number_is_found(dtype, value):
    huge = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype)
    gradients = [huge, torch.zeros(0, dtype=dtype), torch.ones(5)]
    assert watching._all_finite(gradients)
    assert watching._all_finite([])
    gradients[2][3] = value
    assert not watching._all_finite(gradients)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: you tried")]
)
def test_out_of_memory_says_what_to_lower(tiny, rows, tmp_path, monkeypatch, error):
    def raising(loss):
        raise error

    at_step(monkeypatch, 2, raising)
    with pytest.raises(
        EngineError, match=r"out of memory: lower trl.per_device_train_batch_size \(2 here; .*lora: true"
    ) as told:
        train("sft", make_settings("sft", tiny, rows), tmp_path / "out")
    assert str(told.value).endswith(
        "; then run again, where cai train needs --fresh (cai run makes a changed stage anew by itself)"
    )


def test_a_folder_with_another_training_or_something_else(tiny, rows, tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", [pair(n) for n in range(16)])
    settings = make_settings("sft", tiny, rows)
    train("sft", settings, tmp_path / "out")
    other = make_settings("sft", tiny, rows, trl={"learning_rate": 0.5}, seed=3)
    with pytest.raises(
        ConfigError,
        match=r"holds another training:\n  seed: 0 there, 3 now\n  trl.learning_rate: \S+ there, 0.5 now\nuse another -o, or "
        r"--fresh to start over .in cai run with",
    ):
        train("sft", other, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"out holds a training of the stage sft; use another -o, or --fresh to start over$"):
        train("reward", make_settings("reward", tiny, pairs), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"mine holds thesis.txt, but no training of cai; use another -o"):
        train("sft", settings, tmp_path / "mine", "fresh")
    with pytest.raises(ConfigError, match=r"is a file; -o names a folder"):
        train("sft", settings, rows)


def test_a_full_disk_keeps_the_last_whole_checkpoint_and_goes_on_when_there_is_room(tiny, rows, tmp_path, monkeypatch):
    """A limit on the size of files makes the system refuse every larger write, as a full disk or a quota does."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(self, args, state, control, **given):
        if state.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, usual[1]))

    settings, out, show = make_settings("sft", tiny, rows, trl=EACH), tmp_path / "out", Shown()
    monkeypatch.setattr(watching.Watch, "on_save", limit)
    try:
        with pytest.raises(StoreError) as caught:
            train("sft", settings, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert f"{out}: cannot be written: " in str(caught.value)
    assert "; make room, then the same command continues from its last checkpoint" in str(caught.value)
    assert checkpoints(out)[-1] == "checkpoint-2"
    monkeypatch.undo()
    assert train("sft", settings, out, show=show)["steps"] == 4
    assert "training goes on from checkpoint-2" in show.notes


@pytest.fixture(scope="module")
def interrupted(tiny, tmp_path_factory):
    """A training that was stopped after its third step, and the same one uninterrupted."""
    folder = tmp_path_factory.mktemp("interrupted")
    settings = make_settings(
        "sft", tiny, write_rows(folder / "rows.jsonl", [dialogue(n) for n in range(16)]), trl=EACH | {"save_total_limit": 2}
    )
    whole = train("sft", settings, folder / "whole")
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 4, lambda loss: loss * float("nan"))
        with pytest.raises(EngineError):
            train("sft", settings, folder / "part")
    return settings, folder / "part", whole["measures"]["loss"]


@pytest.mark.parametrize("length", [0, 0.5, None], ids=["empty", "half", "gone"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_checkpoint_that_was_cut_off_is_left_out_and_told(interrupted, tmp_path, name, length):
    settings, part, loss = interrupted
    shutil.copytree(part, tmp_path / "out")
    file, show = tmp_path / "out" / "checkpoints" / "checkpoint-3" / name, Shown()
    if length is None:
        file.unlink()
    else:
        os.truncate(file, int(file.stat().st_size * length))
    manifest = train("sft", settings, tmp_path / "out", show=show)
    assert (manifest["steps"], manifest["measures"]["loss"]) == (4, loss)
    told = [one for one in show.notes if "checkpoint-3" in one]
    assert len(told) == 1
    assert told[0].startswith("checkpoint-3 was not written whole (")
    assert file.stem.partition(".")[0] in told[0] or (name, length) == ("model.safetensors", None)
    assert "training goes on from checkpoint-2" in show.notes


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_a_broken_one(interrupted, tmp_path, monkeypatch):
    """So that a disk which fails for a while costs no checkpoint."""
    _, part, _ = interrupted
    shutil.copytree(part, tmp_path / "out")
    usual = Path.open

    def fails(self, *given, **named):
        if self.name == "optimizer.pt":
            raise OSError(errno.EIO, "Input/output error")
        return usual(self, *given, **named)

    monkeypatch.setattr(Path, "open", fails)
    last, left_out = find_last(tmp_path / "out" / "checkpoints")
    assert (last and last.name, left_out) == ("checkpoint-3", [])


def test_names_and_parts_of_checkpoints(tmp_path):
    """What transformers, PEFT and accelerate write, and what others leave beside it."""
    for name in ("checkpoint-2", "checkpoint-10.tmp", "checkpoint-old"):
        (tmp_path / name).mkdir()
    for name, files in {
        "checkpoint-1": ["model.safetensors.index.json", "optimizer_0", "scheduler.pt", "rng_state_0.pth"],
        "checkpoint-3": ["pytorch_model_fsdp_0", "optimizer_0", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"],
        "checkpoint-4": ["global_step4", "adapter_config.json", "zero_to_fp32.py", "latest", "rng_state_0.pth"],
        "checkpoint-5": ["adapter_config.json", "training_args.bin", "critic_optimizer.pt"],
        "checkpoint-6": ["model-1.safetensors"],
    }.items():
        (tmp_path / name).mkdir()
        for file in ("trainer_state.json", *files):
            path = tmp_path / name / file
            if file.startswith("model."):
                path.write_text('{"weight_map": {"a": "model-1.safetensors"}}')
            elif file.endswith((".pt", ".pth")):
                torch.save({}, path)
            elif file.endswith((".json", ".py", ".bin")) or file == "latest":
                path.write_text("{}")
            else:
                path.mkdir()
    found = {path.name: broken_file(path) for path in sorted(tmp_path.glob("checkpoint-?"))}
    assert found == {
        "checkpoint-1": "model-1.safetensors",
        "checkpoint-2": "trainer_state.json",
        "checkpoint-3": None,
        "checkpoint-4": None,
        "checkpoint-5": "critic.safetensors",
        "checkpoint-6": "optimizer",
    }
    assert find_last(tmp_path) == (
        tmp_path / "checkpoint-4",
        [
            "checkpoint-6 was not written whole (optimizer is missing or cut off) and is left out",
            "checkpoint-5 was not written whole (critic.safetensors is missing or cut off) and is left out",
        ],
    )


def test_what_is_no_fault_of_the_disk_is_not_told_as_one(tmp_path):
    from requests.exceptions import ConnectTimeout, ReadTimeout

    from cai.training.failing import failures

    def failing(error):
        with failures(TrainFolder(tmp_path, {}, leads=False), SimpleNamespace(use_vllm=True, vllm_server_base_url="x")):
            raise error

    for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS):
        with pytest.raises(StoreError, match="cannot be written"):
            failing(OSError(number, "full"))
    with pytest.raises(StoreError, match="cannot be written"):  # what torch.save says where the disk fills up
        failing(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 131392 vs 131280"))
    for error in (ReadTimeout("slow"), ConnectTimeout("slow"), ConnectionRefusedError("none")):
        with pytest.raises(EngineError, match="no vLLM server answers at x"):
            failing(error)
    with pytest.raises(FileNotFoundError):
        failing(FileNotFoundError(errno.ENOENT, "no such file", "tokenizer.json"))


def test_no_room_for_the_model_itself(tiny, rows, tmp_path, monkeypatch):
    from cai.training import running

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(running, "save_model", full)
    with pytest.raises(
        StoreError, match="out: cannot be written: No space left on device; make room, then the same command continues from its"
    ):
        train("sft", make_settings("sft", tiny, rows, trl=EACH), tmp_path / "out")
    monkeypatch.undo()
    assert train("sft", make_settings("sft", tiny, rows, trl=EACH), tmp_path / "out")["steps"] == 4
    assert len(losses(tmp_path / "out")) == 4


def slow_process(settings, out):
    """`cai train` with a recipe, each step a second."""
    code = (
        "import sys, time\n"
        "from cai.training import watching\n"
        "step_begins = lambda self, *given, **named: time.sleep(1)\n"
        "watching.Watch.on_step_begin = step_begins\n"
        "from cai.cli.main import main; main()\n"
    )
    file = out.with_suffix(".yaml")
    file.write_text(settings.model_dump_json())
    return runs.start("train", "sft", "--recipe", file, "-o", out, code=code)


def wait_for_step(process, out):
    runs.wait_until(lambda: process.poll() is not None or (out / "run" / "log.jsonl").exists(), 120)
    assert process.poll() is None, process.communicate()


def test_a_folder_in_which_nothing_was_trained_takes_another_training(tiny, rows, tmp_path, monkeypatch):
    def fails(*given):
        raise EngineError("no room")

    settings = make_settings("sft", tiny, rows, seed=3)
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "lock").touch()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for where, one in (("fit", make_settings("sft", tiny, rows)), ("_finish", settings)):
        with monkeypatch.context() as patch:
            patch.setattr(f"cai.training.running.{where}", fails)
            with pytest.raises(EngineError):
                train("sft", one, tmp_path / "out")
        if where == "fit":
            for name in ("training.html", "run/log.jsonl", "run/changes.json"):
                (tmp_path / "out" / name).write_text("{}")
    assert not (tmp_path / "out" / "training.html").exists()
    assert '"loss"' in (tmp_path / "out" / "run" / "log.jsonl").read_text().splitlines()[0], "of this training"
    with pytest.raises(ConfigError, match="seed: 3 there, 0 now"):
        train("sft", make_settings("sft", tiny, rows), tmp_path / "out")
    assert train("sft", settings, tmp_path / "out", "changed-code")["status"] == "done"
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "out" / "run" / "changes.json").exists()


def test_what_a_kill_leaves_of_a_finished_training_is_deleted_and_holds_nothing_up(tiny, rows, tmp_path, monkeypatch):
    settings, out = make_settings("sft", tiny, rows), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("cai.training.running._tidy", lambda folder: None)
        done = train("sft", settings, out)
    [file] = (out / "run" / "rows" / "train").glob("data-*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    (out / "manifest.json").rename(tmp_path / "manifest.json")
    again = train("sft", settings, out)
    assert again["measures"] == done["measures"]
    assert not (out / "run" / "rows").exists()
    (out / "run" / "rows").mkdir()
    assert train("sft", settings, out) == again
    assert not (out / "run" / "rows").exists()


def test_starting_over_that_is_interrupted_leaves_what_the_rest_is_of(tmp_path, monkeypatch):
    before, now = {"stage": "sft", "seed": 1}, {"stage": "sft", "seed": 2}
    with TrainFolder(tmp_path, before) as folder:
        (folder.checkpoints / "checkpoint-4").mkdir(parents=True)
        (folder.checkpoints / "checkpoint-4" / "trainer_state.json").write_text("{}")
    for name in ("manifest.json", *map(str, range(9))):
        (tmp_path / name).write_text("{}")

    def interrupted(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            TrainFolder(tmp_path, now, "fresh")
    with pytest.raises(ConfigError, match="seed: 1 there, 2 now"):
        TrainFolder(tmp_path, now)
    with TrainFolder(tmp_path, now, "fresh") as folder:
        assert not folder.checkpoints.exists()


@pytest.mark.parametrize(("stage", "module"), [("sft", "running"), ("reward", "members")])
def test_a_signal_while_the_model_is_saved_loses_nothing(stage, module, tiny, rows, tmp_path, monkeypatch):
    from cai.training import saving

    def interrupted(*given):
        signal.raise_signal(signal.SIGTERM)
        saving.save_model(*given)

    if stage == "reward":
        rows = write_rows(tmp_path / "pairs.jsonl", [pair(n) for n in range(16)])
    settings, show = make_settings(stage, tiny, rows), Shown()
    with monkeypatch.context() as patch:
        patch.setattr(f"cai.training.{module}.save_model", interrupted)
        with pytest.raises(Interrupted, match=f"^stopped, and the training has ended: the model is in {tmp_path}"):
            train(stage, settings, tmp_path / "out", show=show)
    assert "stopping when the model is saved, the training having ended; Ctrl-C again stops at once" in show.notes
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert train(stage, settings, tmp_path / "out", show=(again := Shown()))["status"] == "done"
    assert "training" not in again.notes


def test_ctrl_c_saves_after_the_step_and_the_second_one_stops_at_once(tiny, rows, tmp_path):
    settings = make_settings("sft", tiny, rows, trl={"max_steps": 12})
    one, two = tmp_path / "one", tmp_path / "two"
    processes = [slow_process(settings, one), slow_process(settings, two)]
    for process, out in zip(processes, (one, two), strict=True):
        wait_for_step(process, out)
        process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    processes[1].send_signal(signal.SIGINT)
    (_, soft), (_, hard) = (process.communicate(timeout=60) for process in processes)
    assert [process.returncode for process in processes] == [130, 130]
    assert "stopping: the step under way ends and is saved; Ctrl-C again stops at once" in soft
    assert "stopped after step " in soft
    assert "stopped at once; the same command continues from the start, there being no checkpoint yet" in hard
    assert "Traceback" not in soft + hard
    (kept,) = checkpoints(one)
    assert checkpoints(two) == []

    manifest = train("sft", settings, one, show=(show := Shown()))
    assert f"training goes on from {kept}" in show.notes
    assert manifest["steps"] == len(losses(one)) == 12


def test_what_is_not_installed_is_said_with_the_command(monkeypatch):
    from cai.training import requirements

    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name in ("trl", "peft") else True)
    with pytest.raises(ConfigError, match=r"training needs trl, peft: pip install 'cai-toolkit\[train\]'"):
        check_installed()


def test_a_second_signal_while_the_card_is_written_says_what_to_do(tiny, rows, tmp_path, monkeypatch):
    def interrupted(*given):
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("cai.training.running._finish", interrupted)
        with pytest.raises(Interrupted, match=r"^stopped at once, while the card was written; the same command continues"):
            train("sft", make_settings("sft", tiny, rows), tmp_path / "out")
    assert train("sft", make_settings("sft", tiny, rows), tmp_path / "out")["status"] == "done"


@pytest.mark.parametrize(
    ("there", "where"),
    [
        ("nothing", "from the start, there being no checkpoint yet"),
        ("members/0/done.json", "with the next reward model"),
        ("checkpoints/member-1/checkpoint-4", "from its last checkpoint"),
    ],
)
def test_ctrl_c_at_any_time_says_where_it_goes_on_from(tmp_path, there, where):
    with TrainFolder(tmp_path, {"stage": "reward"}) as folder:
        if "checkpoint" in there:
            make_checkpoint(tmp_path / there)
        else:
            (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / there).write_text("{}")
        with pytest.raises(Interrupted, match=f"^stopped at once; the same command continues {where}$"), failures(folder, None):
            raise KeyboardInterrupt


def test_a_changed_function_is_told_once_though_its_training_was_killed_as_it_began(tmp_path):
    before, now = ({"stage": "grpo", "reward": [{"function": f"f@{n}"}]} for n in (1, 2))
    with TrainFolder(tmp_path, before) as folder:
        make_checkpoint(folder.checkpoints / "checkpoint-4")
    for _ in range(2):
        with TrainFolder(tmp_path, now, "changed-code") as folder:
            assert folder.changes == [{"step": 4, "key": "reward[0].function", "before": "f@1", "after": "f@2"}]
            folder.write("run/identity.json", json.dumps(before))  # as it is until what has changed is written
    for function, changes in ((now, 1), (before, 2), (now, 3)):  # to and fro
        with TrainFolder(tmp_path, function, "changed-code") as folder:
            assert len(folder.changes) == changes
            assert folder.changes[-1]["after"] == function["reward"][0]["function"]


def test_what_another_training_has_or_lacks_is_named_key_by_key():
    one = {"stage": "ppo", "gold": None, "trl": {}, "reward": [{"function": "f@1"}]}
    other = {"stage": "ppo", "gold": {"function": "g@1", "every": 4}, "trl": {"beta": 0.1}, "reward": [{"model": "m@1"}]}
    told = describe(one, other, False).splitlines()
    assert told[1:-1] == [
        "  gold.every: nothing there, 4 now",
        "  gold.function: nothing there, 'g@1' now",
        "  reward[0].function: 'f@1' there, nothing now",
        "  reward[0].model: nothing there, 'm@1' now",
        "  trl.beta: nothing there, 0.1 now",
    ]
    assert describe({**other, "gold": None}, other, False).count("there,") == 2
    file = {**one, "trl": {"fsdp_config": "a.json"}}
    told = describe(file, {**one, "trl": {"fsdp_config": {"x": 1}}}, False).splitlines()
    assert told[1:-1] == ["  trl.fsdp_config: 'a.json' there, nothing now", "  trl.fsdp_config.x: nothing there, 1 now"]


@pytest.mark.parametrize(
    ("there", "what"),
    [
        ("manifest.json", "a trained model"),
        ("members/0/done.json", "trained reward models"),
        ("checkpoints/checkpoint-4/trainer_state.json", "checkpoints"),
    ],
)
def test_starting_over_asks_where_something_would_be_lost(tmp_path, monkeypatch, there, what):
    asked = []
    monkeypatch.setattr("typer.confirm", lambda text, abort: asked.append(text))
    assert choose_mode(tmp_path, True, False) == "fresh"
    for part in ("checkpoints/checkpoint-2", "members/.0.part"):  # not written to its end
        (tmp_path / part).mkdir(parents=True)
    assert choose_mode(tmp_path, True, False) == "fresh"
    assert asked == []
    (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / there).write_text("{}")
    assert (choose_mode(tmp_path, True, True), choose_mode(tmp_path, False, False)) == ("fresh", "continue")
    assert asked == []
    choose_mode(tmp_path, True, False)
    assert asked == [f"{tmp_path} holds {what}. Delete and start over?"]


def test_a_damaged_checkpoint_is_asked_about_too(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    (checkpoint / "optimizer.pt").write_bytes(b"")
    assert kept_in(tmp_path) == "checkpoints"
    assert from_where(tmp_path) == "from the start, there being no checkpoint yet"


def test_settings_of_a_recipe_are_checked_with_file_and_line(tmp_path):
    file = tmp_path / "sft.yaml"
    file.write_text("model: tiny\nlora: {rnak: 3}\n")
    with pytest.raises(ConfigError, match=r"sft.yaml:2: lora.rnak: unknown key \(did you mean 'rank'\?\)"):
        resolve_settings("sft", str(file), [], {"data": ["x"]})
    file.write_text("model: tiny\ntrl:\n  max_steps: 3\n  learning_rat: 1\n")
    with pytest.raises(ConfigError, match=r"no data: name a run folder, for example: cai train sft runs/harmless"):
        resolve_settings("sft", None, [], {})


def test_keys_of_trl_are_checked_with_file_and_line(tmp_path):
    file = tmp_path / "sft.yaml"
    file.write_text("model: tiny\ntrl:\n  max_steps: 3\n  learning_rat: 1\n")
    for recipe, assigned, message in (
        (str(file), [], r"sft.yaml:4: trl.learning_rat: SFTConfig has no such key \(did you mean 'learning_rate'"),
        (None, ["trl.max_step=1"], r"^--set trl.max_step=1: trl.max_step: SFTConfig has no such key"),
    ):
        document = read_document("sft", recipe, assigned, {"data": ["x"]})
        with pytest.raises(ConfigError, match=message):
            check_keys("sft", resolve_settings("sft", recipe, assigned, {"data": ["x"]}), document)


@pytest.mark.parametrize("stage", ["dpo", "kto", "orpo", "cpo"])
def test_nothing_garbles_a_log(tiny, tmp_path, stage):
    made = [{"prompt": "Why?", "completion": "So.", "label": n % 2 == 0} if stage == "kto" else pair(n) for n in range(6)]
    trl = "trl={max_steps: 2, use_cpu: true, bf16: false, per_device_train_batch_size: 2}"
    rows = write_rows(tmp_path / "rows.jsonl", made)
    command = ["train", stage, rows, "-m", tiny, "-o", tmp_path / "out", "--set", trl]
    done = subprocess.run(
        [sys.executable, "-m", "cai", *map(str, command)], capture_output=True, text=True, timeout=120, env=runs.environment()
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[:3] == ["loading PyTorch and TRL", "reading the data", "preparing the rows"]
    assert lines[3].startswith("loading tiny")
    assert ("computing what it says of each row, as the reference" in lines[3]) == (stage in ("dpo", "kto"))
    assert lines[4] == "training"
    assert all(line.startswith(("step ", "saving")) for line in lines[5:]), lines
    assert "\r" not in done.stderr
    assert "measures after 2 steps" in done.stdout
    assert os.path.exists(tmp_path / "out" / "model.safetensors")
