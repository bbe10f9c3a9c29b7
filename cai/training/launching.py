"""A stage in several processes, one for each device, under `accelerate launch`.

The processes show nothing of themselves: the first one writes what it would show into a file, which is shown here, and one that
fails writes why. A Ctrl-C here becomes a file there, which all look for after the same step.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from accelerate.commands.config.config_args import load_config_from_file

from cai import errors
from cai.errors import CaiError, ConfigError, EngineError, Interrupted, nearest
from cai.training.arguments import make_arguments
from cai.training.base_settings import TrainSettings
from cai.training.failing import stopped_at_once
from cai.training.folder import Mode
from cai.training.loading import check_rewards_of, find_model
from cai.training.online.settings import OnlineSettings, PpoSettings
from cai.training.settings import StageName
from cai.training.watching import ENDED, STOPPING, Show
from cai.weights import best_device, device_count, one_gpu

_FOLDER = Path(__file__).parent / "launch"
JOB, EVENTS, STOP, LOG = "job.json", "events.jsonl", "stop", "log.txt"
"""Files of a launched training, in a folder of its own: what to do, what to show, stop, all that was printed."""
_LAST_LINES = 8


def launch(stage: StageName, settings: TrainSettings, out: Path, mode: Mode, how: str | None, show: Show) -> dict[str, Any]:
    """Train as `cai.training.running.train` does, in the processes that `how` names: a number of them (each with a copy of the
    model), the name of a configuration that comes with the package, or a file that `accelerate config` wrote; None is one
    process, on the first GPU, whose memory and whose libraries' state end with it.

    Raises what a process raised, or `EngineError` for one that ended otherwise.
    """
    if how is not None:
        check_launch(stage, settings, how)
    launcher = [sys.executable] if how is None else _accelerate(*find_config(how))
    find_model(settings)
    make_arguments(stage, settings, out)
    check_rewards_of(settings)
    with tempfile.TemporaryDirectory(prefix="cai-launch-") as name:
        folder = Path(name)
        job = {"stage": stage, "settings": settings.model_dump(mode="json"), "out": str(out.absolute()), "mode": mode}
        (folder / JOB).write_text(json.dumps({**job, "parent": os.getpid()}))
        more = one_gpu(os.environ) if how is None else {}
        try:
            code = _run([*launcher, "-m", "cai.training.worker", str(folder)], folder, show, more)
        except KeyboardInterrupt:
            raise stopped_at_once(out) from None
        _raise_failure(folder, code)
        if (folder / STOP).exists():
            raise Interrupted(ENDED.format(out))
    return dict(json.loads((out / "manifest.json").read_bytes()))


def find_config(how: str) -> tuple[Path, int | None]:
    """The configuration of accelerate, and how many processes; None where that is as it says. Raises `ConfigError`."""
    built_in = _built_in()
    if how.isdigit() and int(how) > 1:
        return built_in["ddp"], int(how)
    if how in built_in:
        if (devices := device_count()) < 2:
            raise ConfigError(
                f"--launch {how}: one process for each GPU, of which there are {devices}; give a number: --launch 2"
            )
        return built_in[how], devices
    if (path := Path(os.path.expanduser(how))).is_file():
        _check_config(path)
        return path, None
    raise ConfigError(
        f"--launch {how}: expected a number of processes from 2 on, one of {', '.join(built_in)}{nearest(how, built_in)}, or a "
        "file that `accelerate config` wrote"
    )


def _built_in() -> dict[str, Path]:
    """By name, the configurations that come with the package."""
    return {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}


def _check_config(path: Path) -> None:
    """Raises `ConfigError` for a file that accelerate does not take as its configuration."""
    try:
        if not isinstance(yaml.safe_load(path.read_text()), dict):
            raise ValueError("expected a mapping of keys, such as distributed_type: MULTI_GPU")
        load_config_from_file(str(path))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as exc:
        raise ConfigError(
            f"--launch {path}: this is no configuration of accelerate: {' '.join(str(exc).split()).rstrip('.')}; write one "
            f"with accelerate config --config_file {path}, or name one of {', '.join(_built_in())}"
        ) from exc


def check_launch(stage: str, settings: TrainSettings, how: str) -> None:
    """Raises `ConfigError` where `how` names no configuration, for ZeRO 3 with what loads a model in one process alone (there
    `from_pretrained` waits for all of them, since it spreads the weights while it reads them), and for a value function on
    weights that are spread over processes.
    """
    config, _ = find_config(how)
    if isinstance(settings, PpoSettings) and _spreads(config):
        _check_value_function(settings, how)
    if _zero_stage(config) != 3:
        return
    if isinstance(settings, OnlineSettings):
        raise ConfigError(
            f"--launch {how}: reward models are loaded whole, and the best policy is saved, in one process, which ZeRO 3 "
            "cannot; use fsdp or zero2"
        )
    if stage == "reward":
        raise ConfigError(f"--launch {how}: reward models are measured in one process, which ZeRO 3 cannot; use fsdp or zero2")
    if settings.lora and settings.lora.merge:
        raise ConfigError(
            f"--launch {how}: adapters are merged in one process, which ZeRO 3 cannot; set lora.merge: false, "
            "or use fsdp or zero2"
        )


def _check_value_function(settings: PpoSettings, how: str) -> None:
    """Raises `ConfigError` for one that shares the policy's weights."""
    is_head = settings.trl.get("value_function") == "head"
    if not is_head and settings.lora is None:
        return
    what = "trl.value_function: head" if is_head else "lora"
    raise ConfigError(
        f"--launch {how}: with {what} the value function shares the policy's weights, and cannot be trained while these are "
        f"spread over processes; launch with a number or ddp, or train without {what}: a critic of its own works, but each "
        "process holds all of it"
    )


def _spreads(config: Path) -> bool:
    """Whether a configuration of accelerate spreads a model over processes."""
    with suppress(OSError, AttributeError, yaml.YAMLError):
        return str(yaml.safe_load(config.read_text()).get("distributed_type")) in ("FSDP", "DEEPSPEED")
    return False


def _zero_stage(config: Path) -> int | None:
    """DeepSpeed's stage in a configuration of accelerate, or in the file that it names; None without one."""
    try:
        told = yaml.safe_load(config.read_text()).get("deepspeed_config") or {}
        if file := told.get("deepspeed_config_file"):
            told = {"zero_stage": json.loads(Path(os.path.expanduser(file)).read_bytes())["zero_optimization"]["stage"]}
        return int(told["zero_stage"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):  # what is wrong, accelerate tells
        return None


def _accelerate(config: Path, processes: int | None) -> list[str]:
    count = ["--num_processes", str(processes)] if processes else []
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), *count]
    return [*accelerate, "--main_process_port", "0"]


def _run(command: list[str], folder: Path, show: Show, more: dict[str, str]) -> int:
    """Run the command to its end with `more` in its environment, showing what it tells.

    Raises `KeyboardInterrupt` at the second Ctrl-C.
    """
    env = os.environ | more
    if best_device() == "cpu":
        env["ACCELERATE_USE_CPU"] = "true"
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    shown = 0
    try:
        while True:
            try:
                ended = process.poll() is not None
                shown = _show_events(folder / EVENTS, shown, show)
                if ended:
                    return process.returncode
                time.sleep(0.1)
            except KeyboardInterrupt:
                if (folder / STOP).exists():
                    raise
                (folder / STOP).touch()
                show.note(STOPPING)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Accelerate ends its processes when it is asked to; what does not end in time is killed."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _show_events(file: Path, shown: int, show: Show) -> int:
    """Show what stands in the file beyond `shown` bytes; how many bytes that makes."""
    if not file.exists():
        return shown
    with file.open("rb") as opened:
        opened.seek(shown)
        whole = opened.read().rpartition(b"\n")
    for line in whole[0].splitlines():
        event = json.loads(line)
        if "note" in event:
            show.note(event["note"])
        else:
            show.step(event["done"], event["total"], event["measures"])
    return shown + len(whole[0]) + len(whole[1])


def write_failure(folder: Path, rank: int, error: CaiError) -> None:
    """What `_raise_failure` reads."""
    told = {"kind": type(error).__name__, "message": str(error), "at": time.time()}
    (folder / f"failure-{rank}.json").write_text(json.dumps(told))


def _raise_failure(folder: Path, code: int) -> None:
    """Raise what a process failed by, the first of them; or for one that could not tell, the end of what was printed."""
    told = [json.loads(file.read_text()) for file in folder.glob("failure-*.json")]
    if told:
        first = min(told, key=lambda one: float(one["at"]))
        raise getattr(errors, first["kind"])(first["message"])
    if code:
        lines = (folder / LOG).read_text(errors="replace").strip().splitlines()[-_LAST_LINES:]
        raise EngineError(
            f"the launched processes ended with exit code {code} (killed for memory, perhaps); the same command continues. "
            "The last that they printed:\n" + "\n".join(lines)
        )
