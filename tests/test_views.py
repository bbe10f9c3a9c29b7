"""Views of records: which rows they make, and that whatever makes no row is counted with its reason."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.config import DatasetConfig
from cai.dataset import views
from cai.dataset.statistics import Statistics
from cai.types import Message, Prompt, Record
from tests.records import HOSTILE, completion, record, revision, sure, verdict

CONFIG = DatasetConfig()


def dropped(rows) -> list[str]:
    return [row.reason for row in rows if isinstance(row, views.Dropped)]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def revised(probability: float, **kwargs) -> Record:
    """A record whose judge prefers the original with this probability."""
    return record(
        candidates=["original"],
        revisions=[revision(1, "revised", **kwargs)],
        verdicts=[sure("candidate-0", "revision-1", probability)],
        prompt_id="id",
    )


def test_a_preference_row():
    one = record(
        "Why?",
        ["original"],
        [revision(1, "no"), revision(2, "revised")],
        [verdict("candidate-0", "revision-2", (-2.0, 1.0), (-1.0, 0.5))],
        prompt_id="a/b",
    )
    (row,) = views.preference(one, CONFIG)
    probability = row.pop("chosen_probability")
    assert probability == 1 - one.verdicts[0].probability > 0.5
    assert row == {
        "prompt": [{"role": "user", "content": "Why?"}],
        "chosen": assistant("revised"),
        "rejected": assistant("original"),
        "pair_id": "a/b/candidate-0/revision-2",
        "prompt_id": "a/b",
        "source": "revision",
        "principle_ids": ["q0", "q1"],
    }


def test_the_name_of_a_pair_does_not_depend_on_who_won():
    assert len({row["pair_id"] for p in (0.2, 0.8) for row in views.preference(revised(p), CONFIG)}) == 1


@given(st.floats(0, 1))
def test_chosen_is_whom_the_judge_prefers_and_the_probability_is_the_judges(probability):
    rows = list(views.preference(revised(probability), CONFIG))
    if probability == 0.5:
        assert dropped(rows) == ["tie"]
        return
    (row,) = rows
    assert row["chosen"] == assistant("original" if probability > 0.5 else "revised")
    assert row["chosen_probability"] == max(probability, 1 - probability)


@pytest.mark.parametrize(
    ("probability", "least", "reasons"),
    [
        (0.5, 0.5, ["tie"]),
        (0.5, 0.9, ["tie"]),
        (0.51, 0.5, []),
        (0.49, 0.5, []),
        (0.8, 0.8, ["less sure than dataset.min_probability"]),
        (0.25, 0.75, ["less sure than dataset.min_probability"]),
        (0.81, 0.8, []),
        (0.1, 0.8, []),
    ],
)
def test_ties_and_unsure_pairs_are_left_out_with_a_reason(probability, least, reasons):
    assert dropped(views.preference(revised(probability), DatasetConfig(min_probability=least))) == reasons


@pytest.mark.parametrize(("probability", "reasons"), [(0.1, ["chosen is cut off by the token limit"]), (0.9, [])])
def test_a_truncated_completion_may_be_rejected_but_not_chosen(probability, reasons):
    assert dropped(views.preference(revised(probability, length=True), CONFIG)) == reasons
    original = record(
        candidates=[completion("original", length=True)],
        revisions=[revision(1, "revised")],
        verdicts=[sure("candidate-0", "revision-1", 1 - probability)],
    )
    assert dropped(views.preference(original, CONFIG)) == reasons


def test_a_record_without_a_pair_says_so():
    bare = record(revisions=[revision(1, "", problem="empty")])
    assert dropped(views.preference(bare, CONFIG)) == ["nothing to compare"]


def test_sft_takes_the_final_revision():
    given_messages = (Message("system", "s"), Message("user", "u"))
    made = record(revisions=[revision(1, "one"), revision(2, "two"), revision(3, "x", problem="refusal")])
    made = Record(Prompt("id", given_messages), made.candidates, made.revisions, ())
    assert list(views.sft(made)) == [
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "u"},
                {"role": "assistant", "content": "two"},
            ],
            "prompt_id": "id",
        }
    ]


def test_sft_of_a_record_without_a_revision():
    assert dropped(views.sft(record(revisions=[revision(1, "", problem="empty")]))) == ["no usable revision"]
    assert dropped(views.sft(record(candidates=[" \n"]))) == ["empty completion"]
    assert list(views.sft(record())) == [], "where the recipe asks for no rounds"


def sampled(*verdicts) -> Record:
    return record(candidates=["best", "middle", "worst"], verdicts=verdicts)


def test_unpaired_labels_each_completion_once_and_leaves_out_contradictions():
    made = sampled(
        sure("candidate-0", "candidate-1", 0.9, "samples"),
        sure("candidate-0", "candidate-2", 0.9, "samples"),
        sure("candidate-1", "candidate-2", 0.9, "samples"),
    )
    rows = list(views.unpaired(made, CONFIG))
    labels = [(row["completion"][0]["content"], row["label"]) for row in rows if isinstance(row, dict)]
    assert labels == [("best", True), ("worst", False)]
    assert dropped(rows) == ["chosen in one pair, rejected in another"]
    assert rows[0]["prompt"] == [{"role": "user", "content": "Why is the sky blue?"}]


def test_unpaired_leaves_out_what_preference_leaves_out():
    made = sampled(sure("candidate-0", "candidate-1", 0.5, "samples"), sure("candidate-1", "candidate-2", 0.7, "samples"))
    assert [row["label"] for row in views.unpaired(made, CONFIG)] == [True, False]
    assert list(views.unpaired(made, DatasetConfig(min_probability=0.8))) == []


def test_equal_texts_of_two_candidates_are_one_completion():
    made = record(
        candidates=["same", "same\n", "other"],
        verdicts=[sure("candidate-0", "candidate-2", 0.9, "samples"), sure("candidate-1", "candidate-2", 0.1, "samples")],
    )
    rows = list(views.unpaired(made, CONFIG))
    assert dropped(rows) == ["chosen in one pair, rejected in another"] * 2
    assert len(rows) == 2


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_reach_the_rows_to_the_letter(text):
    made = record(text, [text], [revision(1, f"{text}!")], [sure("candidate-0", "revision-1", 0.1)])
    (row,) = views.preference(made, CONFIG)
    assert row["prompt"][0]["content"] == text
    assert row["rejected"] == assistant(text.strip())
    assert row["chosen"] == assistant(f"{text}!".strip())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Why is the sky blue?", "  why is the SKY blue"),
        ("don't", "Don’t!"),
        ("Is it café?", "Is it cafe\u0301?"),
        ("full width", "full width"),
        ("**why?**", "why"),
    ],
)
def test_near_equal_prompts_are_in_one_split(one, other):
    one, other = (record(text) for text in (one, other))
    assert {views.split_of(one, share / 100) == views.split_of(other, share / 100) for share in range(100)} == {True}


@given(st.text(), st.floats(0, 0.99))
def test_a_split_depends_on_the_prompt_alone_and_grows_with_its_share(text, share):
    made = record(text)
    assert views.split_of(made, share) == views.split_of(record(text, ["x"], [revision(1, "y")], prompt_id="z"), share)
    assert views.split_of(made, 0) == "train"
    if views.split_of(made, share) == "test":
        assert views.split_of(made, min(share + 0.005, 0.999)) == "test"


def test_splits_have_about_the_share_asked_for():
    counts = Counter(views.split_of(record(f"prompt {number}"), 0.2) for number in range(5000))
    assert 900 < counts["test"] < 1100


def test_statistics_count_what_the_views_drop():
    statistics = Statistics()
    made = record(
        candidates=["a", "", " a", completion("b", length=True)],
        revisions=[revision(1, "", problem="empty", cleaned=("preamble",)), revision(2, "c", cleaned=("preamble", "quotes"))],
        verdicts=[verdict("candidate-0", "revision-2", (-2.0, 1.0), (1.0, 1.0), (0.0, -1.0))],
    )
    statistics.add(made, CONFIG)
    found = statistics.to_json()
    assert found["dropped"] == {
        "candidates: empty": 1,
        "candidates: the same as an earlier one": 1,
        "revisions: empty": 1,
    }
    assert found["cleaned"] == {"preamble": 2, "quotes": 1}
    assert (found["records"], found["revisions"]) == (1, 2)
    means = found["means"]
    assert means["candidates_truncated"] == 0.25
    assert means["order_flips"] == 0.3333
    # what is shown first wins in: (no, yes), (yes, yes), (tie, no)
    assert means["first_shown"] == round((0 + 1 + 1 + 1 + 0.5 + 0) / 6, 4)


def test_ties_count_as_half_of_a_preference_for_the_revision():
    statistics = Statistics()
    for probability in (0.5, 0.2, 0.9, 0.4):
        statistics.add(revised(probability), CONFIG)
    assert statistics.to_json()["means"]["revision_preferred"] == 0.625


def test_statistics_of_nothing_are_no_numbers():
    assert set(Statistics().to_json()["means"].values()) == {None}
