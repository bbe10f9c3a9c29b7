"""A tiny random Llama with a byte-level tokenizer and a chat template, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(folder: Path, context: int = 2048, head: int = 8, tied: bool = False) -> Path:
    """Write the model and its tokenizer into `folder`; `head` is the size of one attention head; `tied`: the output layer has
    the weights of the embeddings."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["Which completion is better? The answer is A or B."] * 4, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>"
    )
    wrapped.chat_template = TEMPLATE
    LlamaForCausalLM(tiny_config(wrapped, context, head_dim=head, tie_word_embeddings=tied)).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


def tiny_config(tokenizer: Any, context: int = 2048, **more: Any) -> Any:
    """Of a tiny Llama behind that tokenizer; torch's seed is set, so that the same weights are drawn from it."""
    import torch
    from transformers import LlamaConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": context}
    tokens = {name: getattr(tokenizer, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    return LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.3, **(sizes | heads | tokens | more))
