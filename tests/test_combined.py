"""Judges made of judges: weights, names and order of what their parts say, and a panel in a run."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai.config import JudgeConfig, PanelMember, load_recipe
from cai.constitution import Check, Principle, load_constitution
from cai.engines import ChoiceRequest, LoglikelihoodRequest, ScriptedEngine
from cai.errors import ConfigError, VerdictError
from cai.judging import ChoiceJudge, build_judge
from cai.judging.base import leaning, principle_verdict, verdict
from cai.judging.checks import ChecksJudge
from cai.judging.combined import Member, PanelJudge, WithChecks
from cai.pipeline import label, plan_labels, read_records
from cai.types import Verdict
from tests.judges import assert_turns, compare, principle, sigmoid
from tests.runs import SCRIPTED, SMALL, command, log_lines, manifest, model, quarantine, recipe, written_rows
from tests.tiny_model import make_tiny_model

BRIEF = Principle(id="brief", check=Check(max_characters=4), weight=3.0)


class Fixed:
    """Likes a text by a number; remembers under which principles it was asked."""

    def __init__(self, likes, name="fixed", fails=False):
        self.likes, self.name, self.fails, self.asked = likes, name, fails, []

    async def compare(self, prompt, pair, principles, source, seed):
        self.asked.append(([one.id for one in principles], seed))
        if self.fails:
            raise VerdictError("no idea")
        (_, first), (_, second) = pair
        reading = self.likes[first], self.likes[second]
        lean = leaning(reading[0] - reading[1])
        return verdict(
            pair, source, [principle_verdict(self.name, one.id, one.weight, [reading], [lean]) for one in principles]
        )


# --- a model beside checks


def test_principles_go_where_they_belong_and_come_back_in_their_order():
    one = Fixed({"long text": 2.0, "text": 0.0})
    found = compare(WithChecks(one, ChecksJudge()), principles=[principle(1), BRIEF, principle(2, 2.0)], seed=5)
    judges = [(each.principle_id, each.judge) for each in found.principles]
    assert judges == [("q1", "fixed"), ("brief", "checks"), ("q2", "fixed")]
    assert found.probability == pytest.approx((1 * sigmoid(2) + 3 * 0.0 + 2 * sigmoid(2)) / 6, abs=1e-11)
    assert one.asked == [(["q1", "q2"], 5)]


def test_where_all_principles_are_checks_no_model_is_asked():
    one = Fixed({})
    found = compare(WithChecks(one, ChecksJudge()), principles=[BRIEF])
    assert (found.probability, one.asked) == (0.0, [])
    assert compare(WithChecks(None, ChecksJudge()), principles=[BRIEF]) == found


def test_where_none_is_a_check_the_models_verdict_stays_as_it_is():
    one = Fixed({"long text": 0.3, "text": 0.1})
    assert compare(WithChecks(one, ChecksJudge())) == compare(one)


@settings(deadline=None, max_examples=60)
@given(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3))
def test_a_swapped_verdict_is_the_verdict_on_the_swapped_pair(likes, weights):
    scores = dict(zip(("one", "other"), likes, strict=True))
    brief = BRIEF.model_copy(update={"weight": weights[0]})
    principles = [principle(1, weights[1]), brief, principle(2, weights[2])]
    assert_turns(lambda: WithChecks(Fixed(scores), ChecksJudge()), principles=principles)
    members = [Member("x", weights[1], Fixed(scores)), Member("y", weights[2], WithChecks(Fixed(scores), ChecksJudge()))]
    assert_turns(lambda: PanelJudge(members), principles=principles)


# --- a panel


def test_a_panels_verdict_is_the_weighted_mean_of_its_members_whatever_their_principles_weigh():
    members = [Fixed({"long text": 2.0, "text": 0.0}, "choice"), Fixed({"long text": 0.0, "text": 1.0}, "choice")]
    panel = PanelJudge([Member("large", 3.0, members[0]), Member("small", 1.0, members[1])])
    found = compare(panel, principles=[principle(1, 5.0), principle(2, 0.1)], seed=4)
    assert found.probability == pytest.approx((3 * sigmoid(2) + sigmoid(-1)) / 4, abs=1e-11)
    names = [(one.judge, one.principle_id) for one in found.principles]
    assert names == [("large", "q1"), ("large", "q2"), ("small", "q1"), ("small", "q2")]
    assert [one.weight for one in found.principles] == pytest.approx([3 * 5 / 5.1, 3 * 0.1 / 5.1, 5 / 5.1, 0.1 / 5.1])
    assert [one.asked for one in members] == [[(["q1", "q2"], 4)]] * 2


def test_a_member_with_more_principles_has_no_more_say():
    class Reward(Fixed):
        async def compare(self, prompt, pair, principles, source, seed):
            return await super().compare(prompt, pair, [principle(9)], source, seed)

    likes, dislikes = {"long text": 1.0, "text": 0.0}, {"long text": 0.0, "text": 1.0}
    panel = PanelJudge([Member("one", 1.0, Fixed(likes)), Member("other", 1.0, Reward(dislikes))])
    assert compare(panel, principles=[principle(number) for number in range(4)]).probability == pytest.approx(0.5, abs=1e-11)


def test_a_member_that_fails_fails_the_panel():
    panel = PanelJudge(
        [Member("one", 1.0, Fixed({"long text": 1.0, "text": 0.0})), Member("other", 1.0, Fixed({}, fails=True))]
    )
    with pytest.raises(VerdictError, match="no idea"):
        compare(panel)


def members(*given):
    return [{"name": name, "method": method, **more} for name, method, more in given]


def test_each_member_is_built_by_its_own_method_from_its_own_engine():
    engines = {"small": ScriptedEngine(lambda request: [-0.1, -2.1]), "large": ScriptedEngine(lambda request: -1.0)}
    config = JudgeConfig(
        method="panel",
        model="small",
        members=(PanelMember(name="a"), PanelMember(name="b", model="large", method="likelihood", weight=2)),
    )
    found = compare(build_judge(config, load_constitution(str(SMALL)), lambda section: engines[section.model]))
    assert [(one.judge, len(one.readings), one.weight) for one in found.principles] == [("a", 2, 1), ("b", 1, 2)]
    assert config.member(config.members[0]).model == "small"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, "two members or more, with different names"),
        ({"members": members(("a", "choice", {}))}, "two members or more, with different names"),
        ({"members": members(("a", "choice", {}), ("a", "score", {}))}, "two members or more, with different names"),
        ({"members": members(("a", "choice", {}), ("b", "panel", {}))}, "cannot be a panel"),
        ({"method": "choice", "members": members(("a", "choice", {}), ("b", "score", {}))}, "only a panel has members"),
        ({"members": members(("a", "choice", {}), ("b", "score", {"weight": 0}))}, "greater than 0"),
    ],
)
def test_a_panel_that_cannot_be_is_refused(changes, problem):
    with pytest.raises(ValueError, match=problem):
        recipe(judge={"method": "panel"} | changes)


# --- a panel in a run


PANEL = (
    "def respond(request):\n"
    "    if isinstance(request, LoglikelihoodRequest):\n"
    "        text = request.continuation\n"
    "        return (1.0 if 'good' in text else 0.0) if 'would choose' in request.messages[-1].content else 0.0\n"
    "    text = request.messages[0].content\n"
    "    if 'unclear' in text: return [float('nan'), 0.0]\n"
    "    wrong = 'odd' in text\n"
    "    return [-0.1, -2.3] if (text.index('good') < text.index('worse')) != wrong else [-2.3, -0.1]\n"
)


def panel_recipe(folder, kinds, **judge):
    given = [
        {"id": f"{n}", "prompt": f"An {kind} question {n}?", "chosen": "good", "rejected": "worse"}
        for n, kind in enumerate(kinds)
    ]
    both = members(("picks", "choice", {}), ("measures", "likelihood", {"weight": 3}))
    name = model(folder, PANEL)
    source = {"source": written_rows(folder, *given), "limit": None}
    return recipe(judge={"model": name, "method": "panel", "members": both, **judge}, prompts=source)


def test_members_of_one_model_share_its_engine(tmp_path):
    checked = plan_labels(panel_recipe(tmp_path, ["even"]))
    assert len(checked.judges) == 2
    assert len({id(engine) for engine in checked.judges.values()}) == 1
    assert ", " not in checked.judge_names


def test_members_of_different_models_are_both_named(tmp_path):
    other = {"model": f"scripted:{SCRIPTED}:respond"}
    both = members(("picks", "choice", {}), ("measures", "likelihood", other), ("checks", "likelihood", other))
    checked = plan_labels(panel_recipe(tmp_path, ["even"], members=both))
    assert len({id(engine) for engine in checked.judges.values()}) == 2
    assert checked.judge_names.count("scripted:") == 2
    assert checked.identity["judge.members"][1]["method"] == "likelihood"


def test_members_may_be_of_different_engines_and_a_reward_model_is_one_of_its_own(tmp_path):
    one = panel_recipe(tmp_path, ["even"], model=None, members=members(("a", "choice", {}), ("b", "reward-model", {})))
    with pytest.raises(ConfigError, match="reward-model needs a reward model of its own"):
        plan_labels(one)
    tiny = make_tiny_model(tmp_path / "tiny")
    one = panel_recipe(tmp_path, ["even"], members=members(("a", "choice", {}), ("b", "choice", {"model": str(tiny)})))
    assert len(plan_labels(one).judges) == 2


def test_the_error_of_a_member_sets_the_pair_aside(tmp_path):
    one = panel_recipe(tmp_path, ["even", "unclear", "odd"])
    assert label(one, tmp_path / "run")["prompts"]["quarantined"] == {"no verdict": 1}
    assert [row["prompt_id"] for row in quarantine(tmp_path / "run")] == ["1"]
    records = {record.prompt.id: record.verdicts[0] for record in read_records(tmp_path / "run")}
    assert {one.judge for one in records["0"].principles} == {"picks", "measures"}
    assert records["0"].probability == pytest.approx((sigmoid(2.2) + 3 * sigmoid(1)) / 4, abs=1e-9)
    assert records["2"].probability == pytest.approx((sigmoid(-2.2) + 3 * sigmoid(1)) / 4, abs=1e-9)


def test_evaluate_shows_how_far_the_members_agree(tmp_path):
    """They agree on three pairs of four; alpha by hand: 1 - (observed / expected disagreement)."""
    kinds = ["even", "odd", "even", "even"] * 5
    file = tmp_path / "recipe.yaml"
    file.write_text(panel_recipe(tmp_path, kinds).to_yaml())
    done = command("judge", "evaluate", tmp_path / "prompts.jsonl", "--recipe", file, "-o", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "run" / "evaluation.json").read_text())["agreement"]
    pairs, disagreeing = 2 * len(kinds), 2 * kinds.count("odd")
    values = 2 * pairs
    expected = 2 * (values / 2) ** 2 / (values * (values - 1))
    alpha = pytest.approx(1 - disagreeing / pairs / expected, abs=1e-5)
    assert told["panel"] == {"judges": ["picks", "measures"], "alpha": alpha}
    assert "Krippendorff's alpha" in done.stdout
    assert f"{told['panel']['alpha']:.2f}" in done.stdout
    assert told["accuracy"]["value"] == 1.0
    assert manifest(tmp_path / "run")["usage"]["judge"]["calls"] == len(kinds) * 4 * (2 + 2 * 2)


def test_a_call_that_two_members_both_make_is_paid_once(tmp_path, log):
    name = f"scripted:{SCRIPTED}:logged"
    given = [{"id": "0", "prompt": "Why?", "chosen": "short", "rejected": "longer than that"}]
    both = members(("a", "likelihood", {}), ("b", "likelihood", {"weight": 2}))
    judge = {"model": name, "method": "panel", "members": both, "principles": 1}
    label(recipe(judge=judge, prompts={"source": written_rows(tmp_path, *given)}), tmp_path / "run")
    assert manifest(tmp_path / "run")["usage"]["judge"]["calls"] == 4
    assert len(log_lines(log)) == 4


def test_no_request_is_of_a_kind_that_no_member_makes(tmp_path):
    seen = set()

    def respond(request):
        seen.add(type(request))
        return [-1, -2] if isinstance(request, ChoiceRequest) else -1.0

    engine = ScriptedEngine(respond)
    config = JudgeConfig(method="panel", members=(PanelMember(name="a"), PanelMember(name="b", method="likelihood")))
    compare(build_judge(config, load_constitution(str(SMALL)), lambda section: engine))
    assert seen == {ChoiceRequest, LoglikelihoodRequest}
    assert isinstance(build_judge(JudgeConfig(), load_constitution(str(SMALL)), lambda section: engine), ChoiceJudge)


# --- members with a calibration


def test_a_member_whose_verdict_is_no_mean_of_its_principles_has_the_say_of_its_verdict():
    class Calibrated(Fixed):
        async def compare(self, prompt, pair, principles, source, seed):
            found = await super().compare(prompt, pair, principles, source, seed)
            return Verdict(found.first, found.second, source, 0.25, found.principles)

    likes = {"long text": 2.0, "text": 0.0}
    panel = PanelJudge([Member("one", 3.0, Calibrated(likes)), Member("other", 1.0, Fixed(likes))])
    assert compare(panel).probability == pytest.approx((3 * 0.25 + sigmoid(2)) / 4, abs=1e-11)


def calibrated_panel(folder):
    """Two equal members on `odd` pairs, where both are wrong; one of them is turned round by its calibration."""
    (folder / "small.yaml").write_text(SMALL.read_text())
    one = panel_recipe(folder, [*["odd"] * 20, "even"], principles="all").model_copy(update={"constitution": "small.yaml"})
    file = folder / "recipe.yaml"
    picks = one.judge.member(one.judge.members[0]).model_dump(mode="json")
    file.write_text(one.model_copy(update={"judge": JudgeConfig(**picks)}).to_yaml())
    pairs = folder / "prompts.jsonl"
    done = command("judge", "calibrate", pairs, "--recipe", file, "-o", folder / "fit", "--save", folder / "turned.yaml")
    assert done.returncode == 0, done.stderr
    both = members(("turned", "choice", {"calibration": "turned.yaml", "weight": 3}), ("plain", "choice", {}))
    config = one.judge.model_dump(mode="json") | {"members": both}
    file.write_text(one.model_copy(update={"judge": JudgeConfig(**config)}).to_yaml())
    return pairs, file


def test_a_member_is_calibrated_by_a_file_beside_the_recipe_and_the_folder_makes_the_run_again(tmp_path):
    pairs, file = calibrated_panel(tmp_path)
    done = command("judge", "label", pairs, "--recipe", file, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    first = read_records(tmp_path / "run")
    verdict = first[0].verdicts[0]
    assert verdict.probability > 0.6
    (turned,) = {one.probability > 0.5 for one in verdict.principles if one.judge == "turned"}
    (plain,) = {one.probability > 0.5 for one in verdict.principles if one.judge == "plain"}
    assert (turned, plain) == (True, False)
    saved = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "calibration: calibration-1.yaml" in saved
    assert (tmp_path / "run" / "calibration-1.yaml").read_text() == (tmp_path / "turned.yaml").read_text()
    again = tmp_path / "again"
    done = command("judge", "label", pairs, "--recipe", tmp_path / "run" / "recipe.yaml", "-o", again)
    assert done.returncode == 0, done.stderr
    assert [one.verdicts for one in read_records(again)] == [one.verdicts for one in first]
    identity = [json.loads((out / "run" / "identity.json").read_text()) for out in (tmp_path / "run", again)]
    assert identity[0]["judge.members"] == identity[1]["judge.members"]


def test_a_members_calibration_must_fit_it(tmp_path):
    pairs, file = calibrated_panel(tmp_path)
    done = command("judge", "label", pairs, "--recipe", file, "-o", tmp_path / "run", "--set", "judge.layout=principle-first")
    assert done.returncode == 2
    assert "judge.layout: fitted for 'principle-last', this is 'principle-first'" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_panels_own_calibration_points_to_its_members():
    with pytest.raises(ValueError, match=r"a calibration is of one judge; give its members theirs"):
        JudgeConfig(method="panel", calibration="c.yaml", members=(PanelMember(name="a"), PanelMember(name="b")))


def test_the_panels_shared_model_is_pinned_and_a_members_own_too(tmp_path, monkeypatch):
    """As `judge.model` of a judge alone is: the commit that its engine found."""
    commits = {"shared": "c" * 40, "own": "d" * 40}

    def build(config, reward=False, section="policy"):
        engine = ScriptedEngine(lambda request: [-0.1, -2.1], f"hub:{config.model}")
        engine.revision = commits[config.model]
        return engine

    monkeypatch.setattr("cai.pipeline.planning.build_engine", build)
    both = members(("a", "choice", {}), ("b", "choice", {"model": "own"}))
    one = panel_recipe(tmp_path, ["even"], model="shared", members=both)
    label(one, tmp_path / "run")
    judge = load_recipe(tmp_path / "run" / "recipe.yaml", []).judge
    assert (judge.model, judge.revision) == ("shared", "c" * 40)
    assert [(one.model, one.revision) for one in judge.members] == [(None, None), ("own", "d" * 40)]
