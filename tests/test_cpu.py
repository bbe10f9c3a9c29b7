"""What makes a model fast on a CPU leaves what it computes as it is."""

from __future__ import annotations

import pytest
import torch

from cai import cpu
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def model(tmp_path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path), dtype=torch.float32)


@pytest.fixture
def fused(monkeypatch):
    """The lengths and masks that torch's fused attention was asked with, from here on."""
    asked, usual = [], cpu.sdpa_attention_forward

    def forward(module, query, key, value, mask, **named):
        asked.append((key.size(2), mask))
        return usual(module, query, key, value, mask, **named)

    monkeypatch.setattr(cpu, "sdpa_attention_forward", forward)
    cpu.plain_attention()
    return asked


def passed(model, length: int, is_padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and a gradient."""
    torch.manual_seed(0)
    ids, mask = torch.randint(5, 200, (3, length)), torch.ones(3, length, dtype=torch.long)
    mask[0, : length // 2 if is_padded else 0] = 0
    model.zero_grad()
    logits = model(ids, attention_mask=mask).logits[mask.bool()]
    logits.logsumexp(-1).sum().backward()
    return logits.detach(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("length", [9, 256])
def test_plain_attention_gives_the_values_and_gradients_of_the_fused_one(length, is_padded, model, fused, monkeypatch):
    short = passed(model, length, is_padded)
    assert fused == []
    monkeypatch.setattr("cai.cpu._SHORT", 0)
    torch.testing.assert_close(short, passed(model, length, is_padded), atol=1e-4, rtol=1e-4)
    assert fused


def test_longer_sequences_are_left_to_the_fused_one_as_they_were(model, fused):
    passed(model, 257, False)
    assert {(length, mask) for length, mask in fused} == {(257, None)}
    fused.clear()
    passed(model, 257, True)
    assert {mask.dtype for _, mask in fused} == {torch.bool}


def test_many_rows_are_written_with_the_scores_of_the_fused_one(model, fused, monkeypatch):
    ids, mask = torch.randint(5, 200, (4, 7)), torch.ones(4, 7, dtype=torch.long)
    mask[1, :3] = 0
    told = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    short = model.generate(ids, attention_mask=mask, **told).logits
    assert fused == []
    monkeypatch.setattr("cai.cpu._ROWS", 5)
    torch.testing.assert_close(short, model.generate(ids, attention_mask=mask, **told).logits, atol=1e-4, rtol=1e-4)
    assert len(fused) == 3 * 2, "each token after the first, in both layers"


@pytest.mark.parametrize("queries", [1, 5])
def test_values_may_be_narrower_than_queries(queries, fused):
    query, key, value = torch.randn(4, 4, queries, 24), torch.randn(4, 4, 5, 24), torch.randn(4, 4, 5, 16)
    mask, module = torch.ones(4, 1, queries, 5, dtype=torch.bool).tril(5 - queries), torch.nn.Module()
    found = cpu._attend(module, query, key, value, mask)[0]
    assert fused == []
    torch.testing.assert_close(found, cpu.sdpa_attention_forward(module, query, key, value, mask)[0])
    torch.testing.assert_close(cpu._attend(module, query[:, :, -1:], key, value, None)[0], found[:, -1:])


def test_a_mask_may_be_added_too(model, fused, monkeypatch):
    ids = torch.randint(5, 200, (2, 7))
    mask = torch.zeros(2, 1, 7, 7).masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), torch.finfo(torch.float32).min)
    short = model(ids, attention_mask=mask).logits
    assert fused == []
    monkeypatch.setattr("cai.cpu._SHORT", 0)
    torch.testing.assert_close(short, model(ids, attention_mask=mask).logits, atol=1e-4, rtol=1e-4)


def test_the_output_layer_reads_contiguous_features_and_is_told_once(model):
    from cai.cpu import tune_for_cpu

    read = []
    tune_for_cpu(model)
    tune_for_cpu(model)
    assert len(model.lm_head._forward_pre_hooks) == 1
    model.lm_head.register_forward_pre_hook(lambda _, given: read.append(given[0].is_contiguous()))
    model(torch.ones(2, 7, dtype=torch.long), logits_to_keep=1)
    assert read == [True]
