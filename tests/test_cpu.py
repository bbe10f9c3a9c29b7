"""What makes a model fast on a CPU leaves what it computes as it is."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def models(tmp_path):
    """The same model twice: as it comes, and with short attention."""
    from transformers import AutoModelForCausalLM

    from cai.cpu import short_attention

    usual, short = (AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path), dtype=torch.float32) for _ in range(2))
    short_attention(short)
    return usual, short


def padded(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.randint(5, 200, (3, length)), torch.ones(3, length, dtype=torch.long)
    mask[0, : length // 2] = 0
    return ids, mask


@pytest.mark.parametrize("length", [9, 300])
def test_short_attention_gives_the_values_and_gradients_of_the_fused_one(length, models):
    ids, mask = padded(length)
    found = []
    for model in models:
        logits = model(ids, attention_mask=mask).logits[mask.bool()]
        logits.logsumexp(-1).sum().backward()
        found.append((logits, model.model.layers[0].self_attn.k_proj.weight.grad))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


def test_short_attention_is_used_for_short_sequences_alone(models, monkeypatch):
    from cai import cpu

    asked = []

    def fused(module, query, key, *given, **named):
        asked.append(key.size(2))
        return torch.zeros_like(query).transpose(1, 2), None

    monkeypatch.setattr(cpu, "sdpa_attention_forward", fused)
    with torch.no_grad():
        models[1](torch.ones(1, 256, dtype=torch.long))
        assert asked == []
        models[1](torch.ones(1, 257, dtype=torch.long))
    assert set(asked) == {257}


def test_a_model_with_another_attention_keeps_it(tmp_path):
    from transformers import AutoModelForCausalLM

    from cai.cpu import short_attention

    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path), attn_implementation="eager")
    short_attention(model)
    assert model.config._attn_implementation == "eager"


def test_the_output_layer_reads_contiguous_features_and_is_told_once(models):
    from cai.cpu import tune_for_cpu

    model, read = models[0], []
    tune_for_cpu(model)
    tune_for_cpu(model)
    assert len(model.lm_head._forward_pre_hooks) == 1
    model.lm_head.register_forward_pre_hook(lambda _, given: read.append(given[0].is_contiguous()))
    model(torch.ones(2, 7, dtype=torch.long), logits_to_keep=1)
    assert read == [True]
