"""The losses that soft labels make: what they reduce to, their gradients, and what they do without a label."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from cai.training.losses import reward_loss, soft_bradley_terry

NAN = math.nan


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_it_is_the_cross_entropy_of_the_difference(probability):
    ahead = drawn(7) * 5
    expected = binary_cross_entropy_with_logits(ahead, torch.full_like(ahead, probability), reduction="none")
    assert torch.allclose(soft_bradley_terry(ahead, torch.tensor(probability)), expected, atol=1e-12)


def test_a_pair_turned_round_costs_the_same():
    ahead, probability, margin = drawn(7), drawn(7, seed=1).sigmoid(), drawn(7, seed=2).abs()
    turned = soft_bradley_terry(-ahead, 1 - probability, margin)
    assert torch.allclose(soft_bradley_terry(ahead, probability, margin), turned, atol=1e-12)


def test_the_best_difference_is_the_labels_own_logit():
    ahead = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    best = ahead[soft_bradley_terry(ahead, torch.tensor(0.8)).argmin()]
    assert best.item() == pytest.approx(math.log(0.8 / 0.2), abs=1e-3)


@pytest.mark.parametrize("centring", [None, 0.01])
@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_with_certain_labels_and_one_output_it_is_trls_formula(margin, centring):
    chosen, rejected = drawn(9, 1), drawn(9, 1, seed=1)
    found = reward_loss(chosen, rejected, torch.ones(9, 1), margin, centring)
    expected = -logsigmoid(chosen - rejected - margin).mean()
    expected += 0.0 if centring is None else centring * ((chosen + rejected) ** 2).mean()
    assert abs(found - expected) < 1e-9


@pytest.mark.parametrize("centring", [None, 0.1])
@pytest.mark.parametrize("margin", [0.0, 0.4])
def test_gradients_agree_with_finite_differences(margin, centring):
    chosen, rejected = drawn(4, 3).requires_grad_(), drawn(4, 3, seed=1).requires_grad_()
    probability = torch.tensor([[1.0, 0.3, NAN], [0.5, NAN, NAN], [0.9, 0.0, 0.7], [NAN, 0.6, 0.2]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: reward_loss(a, b, probability, margin, centring), (chosen, rejected))


def test_an_output_without_a_label_is_not_trained():
    chosen, rejected = drawn(2, 2).requires_grad_(), drawn(2, 2, seed=1).requires_grad_()
    reward_loss(chosen, rejected, torch.tensor([[1.0, NAN], [NAN, NAN]])).backward()
    assert (chosen.grad != 0).tolist() == [[True, False], [False, False]]


def test_the_loss_of_a_batch_is_the_mean_of_its_parts_whatever_is_labelled():
    chosen, rejected, probability = drawn(4, 2), drawn(4, 2, seed=1), drawn(4, 2, seed=2).sigmoid()
    probability[0] = probability[1, 1] = NAN
    whole = reward_loss(chosen, rejected, probability)
    parts = [reward_loss(*(one[half] for one in (chosen, rejected, probability))) for half in (slice(2), slice(2, 4))]
    assert whole.item() == pytest.approx(sum(parts).item() / 2)
