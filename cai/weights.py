"""Weights and tokenizers of local models: which device, which dtype, and what `from_pretrained` takes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cai.config import ModelConfig
from cai.errors import CaiError, EngineError
from cai.models import ModelPlace, cache_folder, locate

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Quietly; a fault of weights or tokenizers becomes an `EngineError` that says what could not be loaded."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    except CaiError:
        raise
    except Exception as exc:  # the boundary of others' files and libraries, whose faults have no common type
        raise EngineError(f"{what} could not be loaded: {type(exc).__name__}: {exc}") from exc


def context_length(config: Any) -> int | None:
    """The most tokens that a model of this configuration takes, under whatever name it has that; None where it has not."""
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length


def best_device() -> str:
    """`cuda`, `mps` or `cpu`."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_count() -> int:
    """How many GPUs there are."""
    return int(torch.cuda.device_count())


def one_gpu(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to the environment of a process that trains alone, so that it sees the first GPU only: TRL refuses several
    in one process. Nothing where there is one or none, and under a launcher, which gives each process its own. It has to be
    there before the process first asks CUDA for anything.
    """
    if "LOCAL_RANK" in environment or device_count() < 2:
        return {}
    visible = environment.get("CUDA_VISIBLE_DEVICES", "0")
    return {"CUDA_VISIBLE_DEVICES": visible.partition(",")[0].strip()}


def resolve_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype asked for; `auto` is bfloat16 where the device computes in it, and float32 in exact mode."""
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    if config.exact:
        return torch.float32
    device = config.device or best_device()
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    abilities = torch.cpu.get_capabilities()
    has_bf16 = device == "cpu" and any(abilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if has_bf16 else torch.float32


def describe_devices() -> list[str]:
    """The devices that torch sees, and the dtype that `auto` means on the best of them."""
    names = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    names += ["mps"] if torch.backends.mps.is_available() else []
    dtype = str(resolve_dtype(ModelConfig())).removeprefix("torch.")
    return [*names, f"cpu, {torch.get_num_threads()} threads", f"dtype auto on {best_device()}: {dtype}"]


def load_tokenizer(config: ModelConfig, place: ModelPlace | None = None) -> Any:
    """The model's tokenizer."""
    source, revision = pretrained(place or locate(config.model, config.revision))
    return AutoTokenizer.from_pretrained(source, revision=revision)


def pretrained(place: ModelPlace) -> tuple[str, str | None]:
    """What `from_pretrained` takes for a model: a folder or Hub id, and the revision. Converts a GGUF file."""
    return (str(_converted(place)), None) if place.is_gguf else (place.source, place.revision)


def context_of_place(place: ModelPlace) -> int | None:
    """Tokens that a model takes. Raises as `config_of_place` does."""
    return context_length(config_of_place(place))


@cache
def config_of_place(place: ModelPlace) -> Any:
    """A model's configuration. Raises what transformers does."""
    source, where = _unconverted(place)
    return AutoConfig.from_pretrained(source, **where)


@cache
def vocabulary_of_place(place: ModelPlace) -> dict[str, int]:
    """The numbers of a model's tokens. Raises what transformers does."""
    source, where = _unconverted(place)
    vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(source, **where).get_vocab()
    return vocabulary


def _unconverted(place: ModelPlace) -> tuple[str, dict[str, str | None]]:
    """What `from_pretrained` of a configuration or a tokenizer takes; a GGUF file is not converted for that."""
    if place.is_gguf and not _converted_folder(place).is_dir():
        gguf = Path(place.source)
        return str(gguf.parent), {"gguf_file": gguf.name}
    source, revision = pretrained(place)
    return source, {"revision": revision}


def _converted_folder(place: ModelPlace) -> Path:
    return cache_folder() / "models" / f"{Path(place.source).stem}-{place.version}"


def _converted(place: ModelPlace) -> Path:
    """A GGUF file's folder in the cache, dequantised to float32 safetensors with its tokenizer; made on first use."""
    gguf, target = Path(place.source), _converted_folder(place)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    folder, file = str(gguf.parent), gguf.name
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    for holder in (model, model.config):
        for name in ("hf_quantizer", "quantization_config", "quantization_method", "is_quantized", "_is_quantized"):
            vars(holder).pop(name, None)
    part = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(part)
        part.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was faster, and its copy is as good
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target
