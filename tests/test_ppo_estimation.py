"""PPO's arithmetic beside plain loops over lists."""

from __future__ import annotations

import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what trl imports
    from cai.training.ppo.estimation import (
        KLControl,
        Moments,
        advantages_and_returns,
        explained_variance,
        kl_estimate,
        token_rewards,
        value_errors,
        whiten,
    )

NUMBERS = st.floats(-3, 3, width=32)
NAN = math.nan


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over one process."""
    return tensor


@st.composite
def batches(draw: Any, tables: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Tables of numbers and a mask with holes, padding and maybe rows of which nothing counts; NaN where nothing counts."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    whole = st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows, max_size=rows)
    mask = torch.tensor(draw(whole)).long()
    numbers = st.lists(st.lists(NUMBERS, min_size=length, max_size=length), min_size=rows, max_size=rows)
    drawn = [torch.tensor(draw(numbers), dtype=torch.float64) for _ in range(tables)]
    return [torch.where(mask > 0, one, NAN) for one in drawn], mask


def plain_advantages(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Equation 16 as it is written: the discounted sum of all surprises to come."""
    following = [*values, 0.0][1:]
    surprises = [reward + gamma * after - value for reward, value, after in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** ahead * one for ahead, one in enumerate(surprises[place:])) for place in range(len(surprises))]


@settings(max_examples=150, deadline=None)
@given(batches(2), st.sampled_from([1.0, 0.9, 0.0]), st.sampled_from([1.0, 0.95, 0.5, 0.0]))
def test_advantages_and_returns_skip_what_does_not_count(batch, gamma, lam):
    (rewards, values), mask = batch
    advantages, returns = advantages_and_returns(rewards, values, mask, gamma, lam)
    for row, counts in enumerate(mask.bool()):
        plain = torch.tensor(plain_advantages(rewards[row][counts].tolist(), values[row][counts].tolist(), gamma, lam))
        torch.testing.assert_close(advantages[row][counts], plain.double(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(returns[row][counts], plain.double() + values[row][counts], atol=1e-5, rtol=1e-5)
    assert (advantages[mask == 0] == 0).all()
    assert (returns[mask == 0] == 0).all()


def test_with_lambda_1_returns_are_the_rewards_to_come_whatever_the_values():
    rewards, values, mask = (
        torch.tensor([[1.0, 2.0, 9.0, 4.0]]),
        torch.tensor([[5.0, -6.0, 7.0, 8.0]]),
        torch.tensor([[1, 1, 0, 1]]),
    )
    advantages, returns = advantages_and_returns(rewards, values, mask, 1.0, 1.0)
    assert returns.tolist() == [[7.0, 6.0, 0.0, 4.0]]
    assert advantages.tolist() == [[2.0, 12.0, 0.0, -4.0]]


@settings(max_examples=100, deadline=None)
@given(batches(1), st.floats(0, 2, width=32))
def test_the_last_token_that_counts_is_paid_the_score_and_each_its_kl(batch, coefficient):
    (kl,), mask = batch
    score = torch.arange(1.0, len(mask) + 1)
    rewards = token_rewards(score, kl, mask, coefficient)
    for row, counts in enumerate(mask.tolist()):
        places = [place for place, one in enumerate(counts) if one]
        plain = [-coefficient * float(kl[row, place]) if place in places else 0.0 for place in range(len(counts))]
        if places:
            plain[places[-1]] += float(score[row])
        assert rewards[row].tolist() == pytest.approx(plain, abs=1e-5)


def test_kl_estimates():
    logps, reference = (
        torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64),
        torch.tensor([-1.5, -1.0, -0.5], dtype=torch.float64),
    )
    assert kl_estimate(logps, reference, "k1").tolist() == [0.5, -1.0, 0.0]
    assert kl_estimate(logps, reference, "k3").tolist() == pytest.approx(
        [math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0, 0.0]
    )


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_the_expectation_of_both_estimates_is_the_kl(kind):
    policy, reference = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.3, 0.3, 0.4]).double()
    exact = float((policy * (policy / reference).log()).sum())
    assert float((policy * kl_estimate(policy.log(), reference.log(), kind)).sum()) == pytest.approx(exact)


@settings(max_examples=100, deadline=None)
@given(batches(1))
def test_whitened_is_mean_0_and_variance_1_over_what_counts(batch):
    (values,), mask = batch
    white, counted = whiten(values, mask, alone), values[mask > 0].tolist()
    assert (white[mask == 0] == 0).all()
    if counted:
        mean = sum(counted) / len(counted)
        variance = sum((one - mean) ** 2 for one in counted) / len(counted)
        plain = [(one - mean) / math.sqrt(variance + 1e-8) for one in counted]
        assert white[mask > 0].tolist() == pytest.approx(plain, abs=1e-4)


class Together:
    """The sum over threads that stand for processes, each of which calls this with its part."""

    def __init__(self, processes: int) -> None:
        self.parts: list[torch.Tensor] = []
        self.all_told, self.all_read = Barrier(processes), Barrier(processes, self.parts.clear)

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        self.parts.append(tensor)
        self.all_told.wait(10)
        total = torch.stack(self.parts).sum(dim=0)
        self.all_read.wait(10)
        return total


def test_whitened_and_explained_over_all_processes_alike():
    torch.manual_seed(0)
    values, returns, mask = torch.randn(6, 5), torch.randn(6, 5), (torch.rand(6, 5) > 0.4).long()
    parts, total = [slice(0, 1), slice(1, 6)], Together(2)
    with ThreadPoolExecutor(2) as pool:
        white = list(pool.map(lambda part: whiten(values[part], mask[part], total), parts))
        explained = list(pool.map(lambda part: explained_variance(values[part], returns[part], mask[part], total), parts))
    torch.testing.assert_close(torch.cat(white), whiten(values, mask, alone))
    assert explained == pytest.approx([explained_variance(values, returns, mask, alone)] * 2)


def test_moments_of_nothing_are_0():
    moments = Moments.of(torch.full((2, 3), NAN), torch.zeros(2, 3), alone)
    assert (float(moments.mean), float(moments.variance)) == (0.0, 0.0)


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, NAN]]), torch.tensor([[1, 1, 1, 0]])

    def explained(*values: float) -> float:
        return explained_variance(torch.tensor([[*values, 50.0]]), returns, mask, alone)

    assert explained(1.0, 2.0, 3.0) == pytest.approx(1.0)
    assert explained(11.0, 12.0, 13.0) == pytest.approx(1.0), "what is off by the same everywhere explains the variance"
    assert explained(2.0, 2.0, 2.0) == pytest.approx(0.0)
    assert explained(3.0, 2.0, 1.0) == pytest.approx(-3.0)
    assert explained(1.5, 2.0, 2.5) == pytest.approx(0.75)
    assert math.isnan(explained_variance(returns, torch.ones(1, 4), mask, alone)), "nothing is to be explained"


@settings(max_examples=200, deadline=None)
@given(NUMBERS, NUMBERS, NUMBERS, st.sampled_from([None, 0.2, 1.0]))
def test_value_errors(value, old, target, clip):
    errors, is_clipped = value_errors(*(torch.tensor([[one]], dtype=torch.float64) for one in (value, old, target)), clip)
    plain = (value - target) ** 2
    clipped = plain if clip is None else (min(max(value, old - clip), old + clip) - target) ** 2
    assert float(errors) == pytest.approx(max(plain, clipped) / 2, abs=1e-9)
    assert bool(is_clipped) == (clipped > plain + 1e-12) or clipped == pytest.approx(plain)


def test_a_clipped_value_that_moved_on_towards_its_return_has_no_gradient():
    def gradient(value: float, old: float, target: float) -> float:
        one = torch.tensor([[value]], requires_grad=True)
        value_errors(one, torch.tensor([[old]]), torch.tensor([[target]]), 0.2)[0].sum().backward()
        return float(one.grad)

    assert gradient(0.5, 0.0, 1.0) == 0.0
    assert gradient(0.1, 0.0, 1.0) == pytest.approx(-0.9)
    assert gradient(-0.5, 0.0, 1.0) == pytest.approx(-1.5), "what moved away is brought back"
    assert gradient(0.0, 0.0, 1.0) == pytest.approx(-1.0)


def test_the_coefficient_is_steered_as_ziegler_does():
    control = KLControl(0.1, target=6.0, horizon=10_000)
    for kl, factor in ((6.0, 1.0), (6.6, 1 + 0.1 * 0.0256), (60.0, 1 + 0.2 * 0.0256), (0.0, 1 - 0.2 * 0.0256)):
        before = control.coefficient
        control.update(kl, 256)
        assert control.coefficient == pytest.approx(before * factor)
    fixed = KLControl(0.1)
    fixed.update(60.0, 256)
    assert fixed.coefficient == 0.1
