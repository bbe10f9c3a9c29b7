"""How much of a pass is done, told while prompts are still in the making."""

from __future__ import annotations

from collections import Counter

import pytest

from cai.generation import Tally


def test_calls_of_unfinished_prompts_count() -> None:
    tally = Tally(calls_each=10, read=4)
    assert tally.share(4) == 0
    tally.calls_made, tally.calls_replayed = 15, 5
    assert tally.share(4) == 0.5


def test_prompts_that_needed_fewer_calls_are_done_all_the_same() -> None:
    tally = Tally(calls_each=10, records_made=4, calls_made=12)
    assert tally.share(4) == 1


def test_what_was_settled_before_counts_without_calls() -> None:
    tally = Tally(calls_each=10, records_kept=1, duplicates=1, quarantined=Counter({"no verdict": 1}))
    assert tally.share(4) == 0.75


def test_calls_that_generate_weigh_more_than_those_that_compare() -> None:
    tally = Tally(calls_each=13, judge_calls_each=8, read=2, calls_made=10)
    assert tally.share(2) == pytest.approx(50 / 58), "all that is generated is there"
    tally.calls_made = 26
    assert tally.share(2) == 1
    tally.records_made, tally.calls_made = 1, 13 + 2
    assert tally.share(2) == pytest.approx((1 + 20 / 58) / 2)


def test_prompts_in_the_making_never_count_for_more_or_less_than_they_are() -> None:
    tally = Tally(calls_each=13, judge_calls_each=8, read=3, records_made=2, calls_made=5)
    assert tally.share(4) == 0.5
    tally.calls_made = 900
    assert tally.share(4) == 0.75


def test_nothing_is_known_without_a_total() -> None:
    assert Tally().share(None) is None
    assert Tally().share(0) is None
