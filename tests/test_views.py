"""Views of records: which rows they make, and that whatever makes no row is counted with its reason."""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.config import DatasetConfig
from cai.dataset import views
from cai.dataset.ranking import strengths
from cai.dataset.statistics import Statistics
from cai.errors import ConfigError
from cai.types import Message, PrincipleVerdict, Prompt, Record, Verdict
from tests.records import HOSTILE, completion, record, revision, sure, verdict

CONFIG = DatasetConfig()
RANKED = DatasetConfig(ranking="bradley-terry")


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
        "principle_probabilities": [one.swap().probability for one in one.verdicts[0].principles],
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
    assert list(views.sft(made, CONFIG)) == [
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
    assert dropped(views.sft(record(revisions=[revision(1, "", problem="empty")]), CONFIG)) == ["no usable revision"]
    assert dropped(views.sft(record(candidates=[" \n"]), CONFIG)) == ["empty completion"]
    assert list(views.sft(record(), CONFIG)) == [], "where the recipe asks for no rounds"


def sampled(*verdicts) -> Record:
    return record(candidates=["best", "middle", "worst"], verdicts=verdicts)


def answers(rows) -> list[str]:
    return [row.reason if isinstance(row, views.Dropped) else row["messages"][-1]["content"] for row in rows]


def test_sft_on_all_revisions_takes_each_text_once():
    made = record(revisions=[revision(1, "one"), revision(2, "x", problem="refusal"), revision(3, "one"), revision(4, "two")])
    found = list(views.sft(made, DatasetConfig(sft="all")))
    assert answers(found) == ["one", "two", "unusable revision"]
    assert found[0]["messages"][:-1] == [{"role": "user", "content": "Why is the sky blue?"}]


BEST = DatasetConfig(sft="best")
A, B, C, D = (f"candidate-{n}" for n in range(4))


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([(A, B, 0.9)], "best"),
        ([(A, B, 0.2)], "middle"),
        ([(A, B, 0.5)], "no best candidate: a tie"),
        ([], "no best candidate: nothing to compare"),
        ([(A, B, 0.4), (A, C, 0.9), (B, C, 0.6)], "best"),  # by the mean, although it lost once
        ([(A, B, 0.51), (C, D, 0.99), (A, C, 0.51)], "best"),  # a tournament's winner, although its mean is less
        ([(A, B, 0.6), (B, C, 0.6), (C, A, 0.6)], "no best candidate: a tie"),
    ],
)
def test_sft_on_the_candidate_that_the_verdicts_rank_first(verdicts, expected):
    given = [sure(first, second, p, "samples") for first, second, p in verdicts]
    made = record(candidates=["best", "middle", "worst", "last"], verdicts=given)
    assert answers(views.sft(made, BEST)) == [expected]


def test_sft_on_the_best_leaves_out_one_that_is_cut_off_and_looks_at_candidates_alone():
    cut = record(candidates=[completion("a", length=True), "b"], verdicts=[sure(A, B, 0.9, "samples")])
    assert answers(views.sft(cut, BEST)) == ["best candidate is cut off by the token limit"]
    revised = record(revisions=[revision(1, "r")], verdicts=[sure(A, "revision-1", 0.1)])
    assert answers(views.sft(revised, BEST)) == ["no best candidate: nothing to compare"]


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


# --- a ranking


def planted(logits: list[float], noise: float = 0.0, seed: int = 0) -> Record:
    """A record in which each candidate is compared with each; the judge's log-odds are the strengths' difference."""
    draw = random.Random(seed)
    verdicts = []
    for one, other in combinations(range(len(logits)), 2):
        probability = 1 / (1 + math.exp(logits[other] - logits[one] + draw.gauss(0, noise)))
        verdicts.append(sure(f"candidate-{one}", f"candidate-{other}", probability, "samples"))
    return record(candidates=[f"text {number}" for number in range(len(logits))], verdicts=verdicts, prompt_id="id")


@pytest.mark.parametrize("count", [2, 3, 5, 16])
def test_planted_strengths_are_found_again(count):
    logits = random.Random(count).sample([step / 4 for step in range(-8, 8)], count)
    found = strengths(planted(logits).verdicts)
    mean = sum(logits) / count
    assert [found[f"candidate-{number}"] for number in range(count)] == pytest.approx(
        [logit - mean for logit in logits], abs=0.25
    )
    order = sorted(range(count), key=logits.__getitem__)
    assert sorted(found, key=found.__getitem__) == [f"candidate-{number}" for number in order]
    assert sum(found.values()) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_planted_strengths_are_found_in_order_by_a_judge_that_errs(seed):
    logits = [0.0, 3.0, -3.0, 1.5, -1.5]
    found = strengths(planted(logits, noise=0.5, seed=seed).verdicts)
    assert sorted(found, key=found.__getitem__) == [f"candidate-{number}" for number in (2, 4, 0, 3, 1)]


def test_strengths_of_a_judge_that_is_certain_are_finite():
    found = strengths([sure("candidate-0", "candidate-1", 1.0), sure("candidate-1", "candidate-2", 1.0)])
    assert all(map(math.isfinite, found.values()))
    assert found["candidate-0"] > found["candidate-1"] > found["candidate-2"]


def test_strengths_do_not_depend_on_how_verdicts_are_turned_or_ordered():
    made = planted([0.3, -1.0, 2.0, 0.7], noise=1.0)
    turned = [verdict.swap() for verdict in reversed(made.verdicts)]
    assert strengths(turned) == pytest.approx(strengths(made.verdicts))


def test_of_ranked_candidates_one_pair_is_left_the_best_against_the_worst():
    made = planted([0.5, -1.0, 2.0, 1.0])
    assert len(list(views.preference(made, CONFIG))) == 6
    (row,) = views.preference(made, RANKED)
    assert (row["chosen"], row["rejected"]) == (assistant("text 2"), assistant("text 1"))
    assert (row["pair_id"], row["source"]) == ("id/candidate-1/candidate-2", "samples")
    found = strengths(made.verdicts)
    logit = found["candidate-2"] - found["candidate-1"]
    assert row["chosen_probability"] == pytest.approx(1 / (1 + math.exp(-logit)))
    assert [row["label"] for row in views.unpaired(made, RANKED)] == [True, False]


def test_a_ranking_outvotes_the_one_verdict_on_its_pair():
    """The first wins against all others; that it lost once, to the last, does not make the last one better."""
    made = planted([3.0, 1.0, 0.0, -3.0])
    odd = [sure("candidate-0", "candidate-3", 0.45, "samples") if one.second == "candidate-3" and one.first == "candidate-0"
           else one for one in made.verdicts]  # fmt: skip
    made = Record(made.prompt, made.candidates, (), tuple(odd))
    (pair,) = views.pairs(made, RANKED)
    assert (pair.chosen, pair.rejected) == ("text 0", "text 3")
    assert pair.chosen_probability > 0.5 > pair.verdict.probability == 0.45


def test_revisions_stand_beside_a_ranking_and_a_record_without_samples_is_as_it_was():
    made = record(
        candidates=["a", "b", "c"],
        revisions=[revision(1, "revised")],
        verdicts=[sure("candidate-0", "revision-1", 0.2), *planted([0.0, 1.0, 2.0]).verdicts],
    )
    found = [(pair.chosen, pair.rejected) for pair in views.pairs(made, RANKED)]
    assert found == [("revised", "a"), ("c", "a")]
    assert list(views.preference(revised(0.3), RANKED)) == list(views.preference(revised(0.3), CONFIG))
    assert dropped(views.preference(record(), RANKED)) == ["nothing to compare"]


def test_ranked_pairs_are_left_out_for_the_same_reasons():
    assert dropped(views.preference(planted([0.0, 0.0, 0.0]), RANKED)) == ["tie"]
    unsure = DatasetConfig(ranking="bradley-terry", min_probability=0.9)
    assert dropped(views.preference(planted([0.0, 0.2, 0.4]), unsure)) == ["less sure than dataset.min_probability"]
    made = planted([0.0, 1.0])
    cut = Record(made.prompt, (made.candidates[0], completion("text 1", length=True)), (), made.verdicts)
    assert dropped(views.preference(cut, RANKED)) == ["chosen is cut off by the token limit"]


def test_a_ranking_whose_best_and_worst_were_not_compared_is_counted():
    """Two candidates say the same, so they were not compared; a judge that contradicts itself puts them at both ends."""
    made = record(
        candidates=["same", "same", "other"],
        verdicts=[sure("candidate-0", "candidate-2", 0.9, "samples"), sure("candidate-1", "candidate-2", 0.1, "samples")],
    )
    assert len(list(views.preference(made, RANKED))) == 1, "a row, or a reason why there is none"


def test_without_choix_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "choix", None)
    with pytest.raises(ConfigError, match=r"dataset\.ranking: bradley-terry needs choix: pip install 'cai-toolkit\[judge\]'"):
        strengths([sure("candidate-0", "candidate-1", 0.7)])


# --- texts and splits


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


def test_statistics_count_the_records_that_gave_a_pair():
    statistics = Statistics()
    for probability in (0.5, 0.2, 0.9):
        statistics.add(revised(probability), CONFIG)
    statistics.add(record(), CONFIG)
    found = statistics.to_json()
    assert (found["records"], found["paired"]) == (4, 2)


def test_ties_count_as_half_of_a_preference_for_the_revision():
    statistics = Statistics()
    for probability in (0.5, 0.2, 0.9, 0.4):
        statistics.add(revised(probability), CONFIG)
    assert statistics.to_json()["means"]["revision_preferred"] == 0.625


def test_readings_of_a_judge_that_shows_no_order_count_for_no_order():
    statistics = Statistics()
    rated = PrincipleVerdict("q", 1.0, ((3.0, 7.0),), 0.2, "score")
    made = record(revisions=[revision(1, "c")], verdicts=[Verdict("candidate-0", "revision-1", "revision", 0.2, (rated,))])
    statistics.add(made, CONFIG)
    means = statistics.to_json()["means"]
    assert (means["order_flips"], means["first_shown"], means["revision_preferred"]) == (None, None, 1.0)


def test_statistics_of_nothing_are_no_numbers():
    assert set(Statistics().to_json()["means"].values()) == {None}
