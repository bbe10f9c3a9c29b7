"""The dataset card: its metadata is YAML that the Hub reads, and no text of the data can break out of its place."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import get_args

import huggingface_hub
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from cai.config import Method, Recipe
from cai.constitution import Constitution, Principle, load_constitution
from cai.dataset import CONFIGS, Statistics, choose_example, render_card
from cai.dataset.card import code, quoted
from cai.types import Record
from tests.records import HOSTILE, record, revision, sure

CONSTITUTION = load_constitution("harmless")
EXAMPLE = record("Write a rude song.", ["You stink."], [revision(1, "You are fine.")])


def manifest(**dataset) -> dict:
    statistics = Statistics(rows={name: {"train": 9, "test": 1} for name in CONFIGS}, **dataset)
    return {
        "constitution": {"hash": CONSTITUTION.hash},
        "policy": "the policy's fingerprint",
        "judge_is_policy": False,
        "prompts": {"read": 12, "duplicates": 1, "quarantined": {"too long for the context": 1}},
        "dataset": statistics.to_json(),
    }


def card(example: Record = EXAMPLE, constitution: Constitution = CONSTITUTION, given=None, **recipe) -> str:
    return render_card(given or manifest(), Recipe.model_validate(recipe), constitution, example)


def split(text: str) -> tuple[dict, str]:
    """The metadata and the page, cut as the Hub cuts them: at the first line of three dashes."""
    empty, metadata, page = re.split(r"(?m)^---\s*$", text, maxsplit=2)
    assert empty == ""
    return yaml.safe_load(metadata), page


def test_metadata_as_the_hub_reads_it(tmp_path: Path):
    text = card(dataset={"license": "cc-by-4.0"}, policy={"model": "owner/model"})
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    data = huggingface_hub.DatasetCard.load(tmp_path / "README.md").data
    assert data.license == "cc-by-4.0"
    assert data.pretty_name == "harmless by owner/model"
    assert [(one["config_name"], one.get("default")) for one in data.configs] == [
        ("sft", None),
        ("preference", True),
        ("unpaired", None),
        ("trace", None),
    ]
    assert data.configs[0]["data_files"] == [
        {"split": "train", "path": "data/sft/train-*"},
        {"split": "test", "path": "data/sft/test-*"},
    ]


def test_splits_and_configurations_without_rows_are_not_in_the_metadata():
    given = manifest()
    given["dataset"]["rows"] |= {"unpaired": {"train": 0}, "preference": {"train": 0, "test": 3}}
    metadata, page = split(card(given=given))
    assert [one["config_name"] for one in metadata["configs"]] == ["sft", "preference", "trace"]
    assert metadata["configs"][1]["data_files"] == [{"split": "test", "path": "data/preference/test-*"}]
    assert "`label`: chosen or rejected | 0 train |" in page


def test_without_a_licence_the_card_names_none_and_says_so():
    metadata, page = split(card())
    assert "license" not in metadata
    assert "set `dataset.license` in the recipe" in page


def test_the_card_says_how_the_data_was_made_and_what_was_dropped():
    given = manifest(dropped=Counter({"preference: tie": 3, "revisions: refusal": 2, "nothing": 0}))
    _, page = split(
        card(
            given=given,
            policy={"model": "owner/policy"},
            judge={"model": "owner/judge", "principles": "all"},
            generation={"candidates": 3, "rounds": 1, "temperature": 0.7, "max_tokens": 99, "pairs": "both"},
            seed=41,
        )
    )
    for said in (
        "| preference: tie | 3 |",
        "| revisions: refusal | 2 |",
        "| rows set aside: too long for the context | 1 |",
        "| policy | `owner/policy` |",
        "| judge | `owner/judge` |",
        "12 read, 1 duplicates left out",
        f"hash `{CONSTITUTION.hash}`",
        "18 principles",
        "temperature 0.7, top-p 1.0, at most 99 tokens, seed 41",
        "3 candidates, 1 rounds of critique and revision after 5 few-shot dialogues, pairs from both",
        "all principles a pair",
        "| `preference` | `prompt`, `chosen`, `rejected`, the judge's `chosen_probability`, and by `principle_ids` its "
        "`principle_probabilities` | 9 train, 1 test |",
        "> Write a rude song.",
        "> You stink.",
        "> You are fine.",
    ):
        assert said in page
    assert "| nothing | 0 |" not in page


def test_measures_that_could_not_be_taken_are_dashes_and_those_that_could_are_shares():
    assert "| the revision was preferred to the original | – |" in card()
    given = manifest()
    given["dataset"]["means"] |= {"order_flips": 0.125, "chosen_length": 120.4, "rejected_length": 80.0}
    page = card(given=given)
    assert "12.5 %" in page
    assert "| 120, 80 |" in page


def test_nothing_dropped_is_said():
    given = manifest()
    given["prompts"]["quarantined"] = {}
    assert "| nothing | 0 |" in card(given=given)


def test_a_policy_that_judged_itself_is_named_so():
    given = manifest()
    given["judge_is_policy"] = True
    assert "(the policy judged itself)" in card(given=given)
    assert "(the policy judged itself)" not in card()


def test_labels_on_given_pairs_name_no_policy():
    given = manifest() | {"policy": None}
    metadata, page = split(card(given=given, policy={"model": "owner/policy"}, judge={"model": "owner/judge"}))
    assert "# harmless by `owner/judge`" in page
    assert metadata["pretty_name"] == "harmless by owner/judge"
    assert "owner/policy" not in page
    assert "temperature" not in page
    assert "pairs of completions from `red-team`, labelled anew" in page


@pytest.mark.parametrize("method", [one for one in get_args(Method) if one != "panel"])
def test_the_card_says_how_the_label_came_to_be(method):
    _, page = split(card(judge={"method": method, "model": "m"}))
    assert re.search(rf"(?m)^\| label \| `{method}`: \w.* 4 principles a pair", page)
    assert "calibrated" not in page
    assert "calibrated on labelled pairs" in card(judge={"method": method, "model": "m", "calibration": "c.yaml"})


def test_a_panels_models_are_all_named():
    members = [{"name": "a", "model": "owner/one"}, {"name": "b", "model": "owner/two"}, {"name": "c", "model": "owner/one"}]
    _, page = split(card(judge={"method": "panel", "members": members}))
    assert "`owner/one, owner/two`" in page
    assert "the weighted mean of several judges" in page


def test_an_example_without_a_revision_shows_none():
    assert "and after critique and revision" not in card(record("p", ["a"], [revision(1, "", "empty")]))


def test_an_example_with_a_pair_shows_it_with_the_judges_probability():
    _, page = split(card(record("p", ["a"], [revision(1, "b")], [sure("candidate-0", "revision-1", 0.23)])))
    shown = page[page.index("## One example") : page.index("## How it was made")]
    assert [line for line in shown.splitlines() if line.startswith(">")] == ["> p", "> b", "> a"]
    assert "The judge preferred, with a probability of 0.77," in shown
    assert "first answered" not in shown


def test_the_example_is_the_first_record_with_a_pair_that_is_kept():
    plain, tie, unsure, good = (
        record(str(number), ["a"], [revision(1, "b")], [sure("candidate-0", "revision-1", one)] if one else [])
        for number, one in enumerate((None, 0.5, 0.55, 0.9))
    )
    config = Recipe.model_validate({"dataset": {"min_probability": 0.6}}).dataset
    assert choose_example(iter([plain, tie, unsure, good]), config) is good
    assert choose_example(iter([plain, tie, unsure]), config) is plain
    late = iter([plain] * 1000 + [good])
    assert choose_example(late, config) is plain
    assert next(late) is good, "no more are read"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("/home/me/models/mine", "mine"),
        ("/home/me/models/mine/", "mine"),
        ("~/models/mine", "mine"),
        ("~nobody-here/mine", "mine"),
        ("./models/mine", "mine"),
        ("owner/model", "owner/model"),
        ("scripted:/home/me/tests/fake.py:respond", "scripted:fake.py:respond"),
        ("smollm2-135m", "smollm2-135m"),
    ],
)
def test_names_do_not_tell_where_they_lie_on_the_machine(model, name):
    text = card(policy={"model": model}, prompts={"source": model})
    assert f"| policy | `{name}` |" in text
    assert "/home/me" not in text


def skeleton(text: str) -> list[str]:
    """The lines of a card that are not quotations."""
    return [line for line in text.splitlines() if not line.startswith("> ")]


PLAIN = skeleton(card())


@pytest.mark.parametrize("text", [*HOSTILE, "\n\n\n", "", "> quote\n\nafter", "line\r\n---\r\nline", "x" * 5000])
def test_texts_of_the_data_stay_in_their_quotation(text):
    made = card(record(text, [text], [revision(1, text)]))
    metadata, _ = split(made)
    assert metadata == split(card())[0]
    assert skeleton(made) == PLAIN
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2028]", made)


@settings(max_examples=200)
@given(st.text(st.sampled_from("ab `*_[]()<>!#|$~&\\-{}%>\n\r\x1b\x85\u2028:"), max_size=60))
def test_a_quotation_shows_every_mark_as_it_stands(text):
    lines = quoted(text).split("\n")
    assert all(line.startswith("> ") for line in lines)
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_{}\[\]<>#|$~&]", "\n".join(line[2:] for line in lines))
    shown = "\n".join(line[2:] for line in lines)
    assert re.sub(r"\\(.)", r"\1", shown) == re.sub(r"[\r\x1b\x85\u2028]", "", text)


def test_html_and_images_render_as_text():
    markdown = MarkdownIt("js-default")
    for text in HOSTILE:
        html = markdown.render(quoted(text) + "\n\nafter")
        assert html.startswith("<blockquote>")
        assert html.rstrip().endswith("</blockquote>\n<p>after</p>")
        assert not re.search(r"<(script|img|a|table|h1|strong|em|b)\b", html)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model", "`model`"),
        ("a`b", "``a`b``"),
        ("``a", "``` ``a ```"),
        ("a|b", "`a\\|b`"),
        ("a\n---\nb\x1b[0m", "`a --- b[0m`"),
        ("<b>{{ x }}</b>", "`<b>{{ x }}</b>`"),
    ],
)
def test_names_stay_in_their_code(text, shown):
    assert code(text) == shown


@pytest.mark.parametrize(
    "name", ["a\n---\nlicense: mit\n---", "{{ metadata }}", "`|x|`\n# Big", "x: [y", "\x1b[31mred", "😀 'q' \"r\""]
)
def test_no_name_breaks_the_metadata_or_the_page(name):
    text = card(policy={"model": name}, prompts={"source": name}, judge={"model": name}, dataset={"license": name})
    metadata, page = split(text)
    assert metadata["pretty_name"] == f"harmless by {name}"
    assert metadata["license"] == name
    assert [one["config_name"] for one in metadata["configs"]] == list(CONFIGS)
    headings = [line for line in page.splitlines() if line.startswith("#")]
    assert [heading for heading in headings if heading.startswith("## ")] == [
        "## One example",
        "## How it was made",
        "## What to know before using it",
        "## Licence",
    ]
    assert page.count("\n| policy | ") == 1


def test_a_constitution_is_described_in_its_own_words():
    principle = Principle(id="p", preference="Which?")
    own = Constitution(
        name="own", version="2|3", description="Uses {{ jinja }} and ${dollars}.", license="a|b", principles=(principle,)
    )
    page = card(constitution=own)
    assert "\n> Uses {{ jinja }} and ${dollars}.\n" in page.replace("\\", "")
    assert "`2\\|3`, 1 principles" in page
    assert "licence `a\\|b` |" in page
