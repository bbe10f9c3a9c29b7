"""Measures with the ends of their intervals: how they are named, gathered and shown."""

from __future__ import annotations

import numpy as np
import pytest

from cai.cli.run import _result
from cai.intervals import Estimate, gathered, named, numbered
from cai.reliability import bins, calibration_error, expected_error


def test_a_measure_is_gathered_with_its_ends():
    told = named("accuracy", Estimate(0.8, 0.7, 0.9, 50)) | named("accuracy/brief", Estimate(0.5, 0.4, 0.6, 20))
    told |= named("accuracy/member-0", Estimate(1.0, None, None, 1)) | {"accuracy_high_ground": 3.0, "text": "x"}
    assert list(gathered(told)) == [
        ("accuracy", 0.8, (0.7, 0.9)),
        ("accuracy/brief", 0.5, (0.4, 0.6)),
        ("accuracy/member-0", 1.0, None),
        ("accuracy_high_ground", 3.0, None),
    ]


def test_the_table_of_a_pipeline_shows_the_ends():
    measures = {"accuracy": 0.81, "accuracy_low": 0.7, "accuracy_high": 0.9, "loss": 0.4, "more": 1.0}
    assert _result({"kind": "reward", "measures": measures}) == "accuracy 0.81 (0.7 to 0.9), loss 0.4"
    assert _result({"kind": "dpo", "measures": {"eval_loss": 0.5}}) == "loss 0.5"


def test_prompts_that_are_written_the_same_have_one_number():
    assert numbered([[{"content": "a"}], "b", [{"content": "a"}]]).tolist() == [0, 1, 0]


def test_the_calibration_error_has_an_interval_where_there_are_prompts_to_draw_from():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 300)
    right = (rng.random(300) < confidence).astype(float)
    found = calibration_error(confidence, right, np.arange(300), 0)
    assert found.value == pytest.approx(expected_error(bins(confidence, right)))
    assert found.low < found.high < 0.2
    one = calibration_error(confidence, right, np.zeros(300), 0)
    assert (one.low, one.high) == (None, None)
