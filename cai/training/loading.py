"""The model and tokenizer that a stage begins with: found, loaded and checked in one place for all of them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from cai.cpu import tune_for_cpu
from cai.errors import ConfigError, EngineError
from cai.models import ModelPlace, holds_adapters, is_classifier, locate
from cai.rewards.model import reward_context
from cai.training.arguments import weights_dtype
from cai.training.base_settings import TrainSettings
from cai.training.online.settings import OnlineSettings
from cai.training.settings import DpoSettings, RewardSettings
from cai.weights import best_device, config_of_place, context_of_place, loading, pretrained, vocabulary_of_place

_DIALOGUE = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
"""What every chat template can write."""


def find_model(settings: TrainSettings) -> ModelPlace:
    """Where the model is. Raises `ConfigError` for none, for adapters alone, for a classifier where text is to be written,
    and for quantization that cannot be had."""
    if settings.quantization and settings.lora is None:
        raise ConfigError("quantization: quantized weights cannot be trained themselves; set lora")
    if settings.quantization and best_device() != "cuda":
        raise ConfigError(f"quantization: {settings.quantization} needs an NVIDIA GPU, and there is none; remove it")
    place = locate(settings.model, settings.revision)
    if holds_adapters(Path(place.source)):
        raise ConfigError(
            f"model '{settings.model}' holds adapters alone; begin with a model that was saved with lora.merge: true"
        )
    if not isinstance(settings, RewardSettings):
        _refuse_classifier("model", settings.model, place)
    if isinstance(settings, DpoSettings) and settings.reference:
        _refuse_classifier("reference", settings.reference, _named("reference", settings.reference))
    return place


def _named(key: str, model: str) -> ModelPlace:
    """Where another model is that a key names."""
    try:
        return locate(model)
    except ConfigError as exc:
        raise ConfigError(f"{key}: {exc}") from exc


def _refuse_classifier(key: str, name: str, place: ModelPlace) -> None:
    if is_classifier(Path(place.source)):
        raise ConfigError(f"{key} '{name}' is a reward model (a classifier), which writes nothing; name a language model")


def check_reference(settings: TrainSettings) -> None:
    """Raises `ConfigError` where the reference that is named has another text for a token of the model's, or none: it reads
    the model's tokens. How many its embeddings have room for may differ."""
    if not isinstance(settings, DpoSettings) or not settings.reference:
        return
    place, other = find_model(settings), _named("reference", settings.reference)
    with loading(f"the tokenizer of '{settings.model}'"):
        own = vocabulary_of_place(place)
    with loading(f"the configuration of '{settings.reference}'"):
        room = config_of_place(other).get_text_config().vocab_size
    theirs: dict[str, int] = {}
    with suppress(EngineError), loading("a tokenizer"):  # the reference can do without
        theirs = vocabulary_of_place(other)
    what = ""
    if (needed := max(own.values()) + 1) > room:
        what = f"{room:,} tokens where model '{settings.model}' has {needed:,}"
    elif any(own.get(text, number) != number for text, number in theirs.items()):
        what = f"other tokens than model '{settings.model}'"
    if what:
        raise ConfigError(f"reference '{settings.reference}' has {what}, whose it reads; name one with the same tokenizer")


def check_rewards_of(settings: TrainSettings) -> None:
    """Raises `ConfigError` for what an online stage is rewarded or measured by, where that can be seen to be wrong."""
    if isinstance(settings, OnlineSettings):
        from cai.training.online.rewards import check_rewards

        check_rewards(settings)


def context_of(settings: TrainSettings) -> int | None:
    """Tokens that the model takes."""
    place = find_model(settings)
    with loading(f"the configuration of '{settings.model}'"):
        return context_of_place(place)


def context_with_rewards(settings: TrainSettings, context: int | None) -> int | None:
    """Tokens that the model, whose `context` this is, and all reward models of an online stage take."""
    models = [one.model for one in settings.reward if one.model] if isinstance(settings, OnlineSettings) else []
    known = [length for length in (context, *map(reward_context, models)) if length is not None]
    return min(known, default=None)


def load_policy(settings: TrainSettings) -> Any:
    """A causal language model."""
    return _load(AutoModelForCausalLM, settings)


def load_reference(settings: TrainSettings, arguments: Any, named: str | None = None) -> Any:
    """The reference that is named; else beside a policy of which all weights are trained, unless what it says is computed
    before; else None."""
    if named is not None:
        return load_policy(settings.model_copy(update={"model": named, "revision": None}))
    return None if settings.lora or arguments.precompute_ref_log_probs else load_policy(settings)


def reference_arguments(settings: TrainSettings) -> dict[str, Any]:
    """What `from_pretrained` is to be told besides the name of the policy's model, so that it loads the same weights."""
    revision = pretrained(find_model(settings))[1]
    dtype = str(weights_dtype(settings)).removeprefix("torch.")
    return {"dtype": dtype} | ({"revision": revision} if revision else {})


def load_classifier(settings: TrainSettings, outputs: int) -> Any:
    """A sequence classifier with so many outputs, new where the model has none."""
    return _load(AutoModelForSequenceClassification, settings, num_labels=outputs)


def _load(auto: Any, settings: TrainSettings, **more: Any) -> Any:
    source, revision = pretrained(find_model(settings))
    if settings.quantization:
        more["quantization_config"] = _quantized(settings)
    with loading(f"model '{settings.model}'"):
        torch.manual_seed(settings.seed)  # of new weights
        model = auto.from_pretrained(source, revision=revision, dtype=weights_dtype(settings), **more)
    if best_device() == "cpu":
        tune_for_cpu(model)
    return model


def _quantized(settings: TrainSettings) -> BitsAndBytesConfig:
    if settings.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=weights_dtype(settings),
    )


def load_tokenizer(settings: TrainSettings) -> Any:
    """The model's tokenizer, with a token to pad with. Raises `ConfigError` where it has no chat template."""
    source, revision = pretrained(find_model(settings))
    with loading(f"the tokenizer of '{settings.model}'"):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"model '{settings.model}' has no chat template; use an instruct model, or save a chat_template.jinja beside its "
            "tokenizer"
        )
    with loading(f"the chat template of '{settings.model}'"):
        tokenizer.apply_chat_template(_DIALOGUE, tokenize=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def adapters(settings: TrainSettings, task: str = "CAUSAL_LM") -> Any:
    """PEFT's config of the adapters; None where all weights are trained. `task` as PEFT spells it."""
    if settings.lora is None:
        return None
    from peft import LoraConfig

    lora = settings.lora
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type=task, bias="none"
    )
