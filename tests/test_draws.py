"""Draws: the same for the same names, without repeating, as heavy as the weights say."""

from __future__ import annotations

import math
from collections import Counter
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.constitution import Principle
from cai.generation.draws import draw_evenly, draw_weighted
from cai.seeds import derive_seed

seeds = st.integers(0, 2**63 - 1)
names = st.text(max_size=20)
steps = st.lists(st.text(max_size=8) | st.integers(-5, 5), max_size=3)


def principles(*weights: float) -> list[Principle]:
    return [Principle(id=f"p{index}", preference="Which?", weight=weight) for index, weight in enumerate(weights)]


@given(seeds, names, steps)
def test_a_seed_depends_on_its_names_alone_and_fits_everywhere(run_seed, prompt_id, step):
    seed = derive_seed(run_seed, prompt_id, *step)
    assert seed == derive_seed(run_seed, prompt_id, *step)
    assert 0 <= seed < 2**63


@given(st.lists(st.tuples(seeds, names, steps.map(tuple)), min_size=2, max_size=8, unique_by=repr))
def test_different_names_give_different_seeds(named):
    assert len({derive_seed(run_seed, prompt_id, *step) for run_seed, prompt_id, step in named}) == len(named)


def test_names_cannot_run_into_each_other():
    assert derive_seed(0, "a\x1fb", "c") != derive_seed(0, "a", "b", "c")
    assert derive_seed(0, "a", "b, 1") != derive_seed(0, "a", "b", 1)
    assert derive_seed(0, "a", "', 'b") != derive_seed(0, "a", "", "b")
    assert derive_seed(0, "a", 1) != derive_seed(0, "a", "1")


def test_seeds_are_the_same_on_every_machine_and_release():
    assert derive_seed(0, "red-team-insults-001", "critique", 1) == 2501347809474917747
    assert derive_seed(7, "हिन्दी 🎉 \ud800", "answer", 0) == 5879044974772888425


@given(seeds, st.integers(0, 12), st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=8))
def test_weighted_draws_repeat_nothing_and_are_deterministic(seed, count, weights):
    pool = principles(*weights)
    drawn = draw_weighted(pool, count, seed)
    assert drawn == draw_weighted(pool, count, seed)
    assert len({one.id for one in drawn}) == len(drawn) == min(count, len(pool))
    assert draw_weighted(pool, 1, seed) == draw_weighted(pool, len(pool), seed)[:1]


@given(seeds, st.integers(0, 12), st.integers(1, 8))
def test_even_draws_repeat_nothing_and_keep_the_order(seed, count, size):
    pool = principles(*[1.0] * size)
    drawn = draw_evenly(pool, count, seed)
    assert drawn == draw_evenly(pool, count, seed)
    assert drawn == [one for one in pool if one in drawn]
    assert len(drawn) == min(count, size)


def chi_square(counts: Counter, expected: dict, total: int) -> float:
    return sum((counts[key] - total * share) ** 2 / (total * share) for key, share in expected.items())


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-200, 1e6])
def test_sequences_are_as_likely_as_drawing_by_weight_without_putting_back(scale):
    weights = [1.0, 2.0, 5.0]
    pool = principles(*(weight * scale for weight in weights))
    expected = {}
    for order in permutations(range(3), 2):
        first, second = (weights[index] for index in order)
        expected[order] = first / 8 * second / (8 - first)
    assert math.isclose(sum(expected.values()), 1)
    total = 6000
    counts = Counter(
        tuple(int(one.id[1:]) for one in draw_weighted(pool, 2, derive_seed(0, f"prompt {n}"))) for n in range(total)
    )
    assert chi_square(counts, expected, total) < 20.5  # 5 degrees of freedom, p = 0.001


def test_even_draws_are_even_whatever_the_weights():
    pool = principles(1.0, 100.0, 1.0, 1.0)
    total = 6000
    counts = Counter(
        tuple(int(one.id[1:]) for one in draw_evenly(pool, 2, derive_seed(0, f"prompt {n}"))) for n in range(total)
    )
    expected = {(one, other): 1 / 6 for one in range(4) for other in range(one + 1, 4)}
    assert chi_square(counts, expected, total) < 20.5


def test_steps_of_one_prompt_draw_independently():
    pool = principles(1.0, 1.0)
    pairs = Counter(
        tuple(draw_weighted(pool, 1, derive_seed(0, f"prompt {n}", step))[0].id for step in ("one", "other"))
        for n in range(4000)
    )
    assert chi_square(pairs, {(one, other): 1 / 4 for one in ("p0", "p1") for other in ("p0", "p1")}, 4000) < 16.3
