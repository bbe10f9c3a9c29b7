"""Log-probabilities of completions on a CPU: equal to plain code, and so are their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def logprobs():
    from cai.training.ppo import logprobs

    return logprobs


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_plain_code(bias, temperature, logprobs, monkeypatch):
    """Of what counts; with no gradients asked for too."""
    monkeypatch.setattr(logprobs, "_AT_ONCE", 4)  # several parts, the last one smaller
    torch.manual_seed(0)
    head = nn.Linear(8, 30, bias=bias).requires_grad_(False)
    tokens, weights = torch.randint(0, 30, (3, 5)), torch.randn(3, 5)
    hidden, plain = (torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    found, entropy = logprobs.token_logprobs(hidden, head, tokens, mask, temperature)
    logs = (head(plain) / temperature).log_softmax(-1)
    wanted = logs.gather(-1, tokens.unsqueeze(-1))[..., 0] * mask
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(entropy, -(logs.exp() * logs).sum(-1) * mask)
    with torch.no_grad():
        torch.testing.assert_close(logprobs.token_logprobs(hidden, head, tokens, mask, temperature), (found, entropy))
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(hidden.grad, plain.grad)


def test_no_entropy_is_negative(logprobs):
    torch.manual_seed(0)
    head, tokens = nn.Linear(64, 300, bias=False).requires_grad_(False), torch.randint(0, 300, (1, 200))
    nn.init.normal_(head.weight, std=0.3)
    words = head.weight[tokens]
    sure = (30 * words / words.square().sum(dim=-1, keepdim=True)).requires_grad_()
    _, entropy = logprobs.token_logprobs(sure, head, tokens, torch.ones_like(tokens), 1.0)
    assert entropy.min() >= 0
    assert entropy.max() < 0.01


def test_in_bfloat16_they_are_close(logprobs):
    torch.manual_seed(0)
    head = nn.Linear(32, 300, bias=False).requires_grad_(False)
    tokens, hidden = torch.randint(0, 300, (3, 5)), torch.randn(3, 5, 32)
    half, plain = hidden.bfloat16().requires_grad_(), hidden.clone().requires_grad_()
    found, entropy = logprobs.token_logprobs(half, head.bfloat16(), tokens, torch.ones_like(tokens), 0.7)
    logs = nn.functional.linear(plain / 0.7, head.weight.float()).log_softmax(-1)
    torch.testing.assert_close(found, logs.gather(-1, tokens.unsqueeze(-1))[..., 0], atol=0.05, rtol=0)
    torch.testing.assert_close(entropy, -(logs.exp() * logs).sum(-1), atol=0.05, rtol=0)
    with torch.no_grad():  # gradients of so few bits say too little of an entropy
        again = logprobs.token_logprobs(half, head, tokens, torch.ones_like(tokens), 0.7)
    torch.testing.assert_close(entropy, again[1])
    found.sum().backward()
    logs.gather(-1, tokens.unsqueeze(-1)).sum().backward()
    torch.testing.assert_close(half.grad.float(), plain.grad, atol=0.02, rtol=0.05)


def test_an_output_layer_that_is_trained_or_scaled_is_left_to_trl(tmp_path, logprobs):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path))
    assert not logprobs.is_plain(model)
    model.requires_grad_(False)
    assert logprobs.is_plain(model)
    model.config.logits_scaling = 8.0
    assert not logprobs.is_plain(model)
