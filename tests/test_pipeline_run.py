"""`cai run`: stages in order, finished ones skipped, what is made of changed inputs made anew, and what goes wrong told."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from cai.cli import run as cli_run
from cai.config import load_recipe
from cai.documents import Document
from cai.errors import ConfigError, EngineError
from cai.pipeline import Choice, Pipeline, Watcher, forecast, load_pipeline, run_pipeline
from cai.pipeline.inputs import inputs_of
from cai.pipeline.recipe import Stage
from cai.pipeline.stages import train_apart
from cai.pipeline.steps import Step, unfold
from cai.recipes import built_in_recipes
from cai.training import DpoSettings, SftSettings, StageName, TrainSettings
from tests.runs import ROOT, SCRIPTED, SMALL, command, log_lines, manifest, start, wait_until
from tests.test_config import sections
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def data(function: str = "logged", **more: Any) -> dict[str, Any]:
    return {
        "constitution": str(SMALL),
        "policy": {"model": f"scripted:{SCRIPTED}:{function}"},
        "prompts": {"source": "benign", "limit": 6},
        "generation": {"concurrency": 4},
        "dataset": {"test_fraction": 0},
        **more,
    }


def training(model: Path | str, **more: Any) -> dict[str, Any]:
    trl = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, **more}
    return {"model": str(model), "data": "@data", "dtype": "float32", "trl": trl}


def stages(tiny: Path) -> dict[str, Any]:
    return {
        "data": {"generate": data()},
        "sft": {"sft": training(tiny)},
        "reward": {"reward": training(tiny)},
        "dpo": {"dpo": training("@sft")},
    }


def pipeline(stages: dict[str, Any], **more: Any) -> Pipeline:
    return Pipeline.model_validate({"name": "test", "stages": stages, **more})


def changed(tiny: Path, dotted: str, value: Any) -> Pipeline:
    """The four stages with one key changed."""
    given = stages(tiny)
    *path, key = dotted.split(".")
    target: Any = given
    for part in path:
        target = target[part]
    target[key] = value
    return pipeline(given)


class Planted:
    """In place of training: writes a model folder whose content hangs on all that it was told, and notes its calls."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.fails = ""

    def __call__(self, stage: StageName, settings: TrainSettings, out: Path, show: Any) -> dict[str, Any]:
        self.made.append(out.name)
        out.mkdir(exist_ok=True)
        if out.name == self.fails:
            raise EngineError("out of memory")
        inputs = [(Path(settings.model) / "config.json").read_text(), manifest(Path(settings.data[0].source))["files"]]
        told_to = settings.model_dump(mode="json", exclude={"data", "model"})
        (out / "config.json").write_text(json.dumps([stage, told_to, str(inputs)]))
        told = {"status": "done", "measures": {"loss": 0.5}}
        (out / "manifest.json").write_text(json.dumps(told))
        return told


class Agreeing(Watcher):
    """Agrees to every loss; notes what is done about each stage."""

    def __init__(self) -> None:
        self.lost: list[str] = []
        self.did: dict[str, str] = {}

    def agree(self, lost: list[Step]) -> None:
        self.lost = [step.folder.name for step in lost]

    def begin(self, step: Step, verdict: Any) -> None:
        self.did[step.folder.name] = verdict.does


@pytest.fixture
def train() -> Planted:
    return Planted()


def test_all_stages_train_on_what_those_before_made_and_a_second_call_makes_nothing(tmp_path: Path, tiny: Path, log: Path):
    def train(stage: StageName, settings: TrainSettings, out: Path, show: Any) -> dict[str, Any]:
        return running.train(stage, settings, out, show=show)

    from cai.training import running

    out, given = tmp_path / "out", pipeline(stages(tiny))
    made = run_pipeline(given, out, train=train)
    assert made == manifest(out)
    assert made["status"] == "done"
    assert [(entry["folder"], entry["kind"], entry["state"]) for entry in made["stages"]] == [
        ("1-data", "generate", "done"),
        ("2-sft", "sft", "done"),
        ("3-reward", "reward", "done"),
        ("4-dpo", "dpo", "done"),
    ]
    assert made["stages"][0]["measures"]["preference"] == sum(
        manifest(out / "1-data")["dataset"]["rows"]["preference"].values()
    )
    assert all(entry["measures"]["loss"] > 0 for entry in made["stages"][1:])
    assert manifest(out / "4-dpo")["model"] == str(out / "2-sft")
    assert load_pipeline(out / "recipe.yaml") == given

    before, calls = (out / "4-dpo" / "model.safetensors").stat().st_mtime_ns, len(log_lines(log))
    watcher = Agreeing()
    assert run_pipeline(given, out, watcher=watcher, train=train) == made
    assert set(watcher.did.values()) == {"skip"}
    assert ((out / "4-dpo" / "model.safetensors").stat().st_mtime_ns, len(log_lines(log))) == (before, calls)


@pytest.mark.parametrize(
    ("dotted", "value", "remade"),
    [
        ("sft.sft.trl.max_steps", 3, ["2-sft", "4-dpo"]),
        ("dpo.dpo.seed", 7, ["4-dpo"]),
        ("data.generate.prompts.limit", 5, ["1-data", "2-sft", "3-reward", "4-dpo"]),
        ("data.generate.dataset.min_probability", 0.51, ["1-data"]),  # every pair is surer, so the rows are the same
        ("data.generate.generation.concurrency", 2, []),
        ("sft.sft.trl.logging_steps", 5, []),
        ("sft.sft.lora", True, ["2-sft", "4-dpo"]),
    ],
)
def test_what_is_made_of_a_changed_input_is_made_anew(tmp_path, tiny, log, train, dotted, value, remade):
    run_pipeline(pipeline(stages(tiny)), tmp_path / "out", train=train)
    calls, watcher = len(log_lines(log)), Agreeing()
    run_pipeline(changed(tiny, dotted, value), tmp_path / "out", watcher=watcher, train=train)
    assert [name for name, does in watcher.did.items() if does == "remake"] == remade
    assert train.made == ["2-sft", "3-reward", "4-dpo", *(name for name in remade if name != "1-data")]
    assert {name for name in remade if name != "1-data"} <= set(watcher.lost)
    assert len(log_lines(log)) == calls, "no finished call was made again"
    watcher = Agreeing()
    run_pipeline(changed(tiny, dotted, value), tmp_path / "out", watcher=watcher, train=train)
    assert set(watcher.did.values()) == {"skip"}


def test_a_changed_file_is_a_changed_input(tmp_path: Path, tiny: Path, log: Path, train: Planted):
    mine = tmp_path / "mine.yaml"
    mine.write_text(SMALL.read_text())
    given = changed(tiny, "data.generate.constitution", str(mine))
    run_pipeline(given, tmp_path / "out", train=train)
    mine.write_text(SMALL.read_text().replace("not kind", "unkind"))
    watcher = Agreeing()
    run_pipeline(given, tmp_path / "out", watcher=watcher, train=train)
    assert watcher.did["1-data"] == "remake"


def test_a_trained_model_is_not_deleted_without_consent(tmp_path: Path, tiny: Path, log: Path, train: Planted):
    run_pipeline(pipeline(stages(tiny)), tmp_path / "out", train=train)
    before = (tmp_path / "out" / "2-sft" / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"delete what was made in .*2-sft, .*4-dpo; add --yes"):
        run_pipeline(changed(tiny, "sft.sft.seed", 3), tmp_path / "out", train=train)
    assert (tmp_path / "out" / "2-sft" / "config.json").read_bytes() == before
    assert train.made == ["2-sft", "3-reward", "4-dpo"]


def does(given: Pipeline, out: Path) -> dict[str, str]:
    """What would be done about each stage."""
    return {step.name: verdict.does for step, verdict in forecast(given, out).verdicts.items()}


def test_a_changed_folder_of_prompts_or_rows_is_a_changed_input(tmp_path: Path, tiny: Path, log: Path, train: Planted):
    def save(name: str, word: str) -> str:
        rows = [{"prompt": f"Why {word}?", "completion": "So."}, {"prompt": "What?", "completion": "That."}]
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        Dataset.from_list(rows).save_to_disk(str(tmp_path / name))
        return str(tmp_path / name)

    out, prompts = tmp_path / "out", save("prompts", "now")
    given = {"data": {"generate": data(prompts={"source": prompts})}, "sft": {"sft": training(tiny)}}
    given["more"] = {"sft": training(tiny) | {"data": ["@data", save("rows", "now")]}}
    run_pipeline(pipeline(given), out, train=train)
    (tmp_path / "rows" / "cache-12ab.arrow").write_text("what datasets keeps")
    assert does(pipeline(given), out) == {"data": "skip", "sft": "skip", "more": "skip"}
    save("rows", "then")
    assert does(pipeline(given), out) == {"data": "skip", "sft": "skip", "more": "remake"}
    save("prompts", "then")
    assert does(pipeline(given), out) == {"data": "remake", "sft": "maybe", "more": "maybe"}


def test_a_run_elsewhere_counts_by_its_data(tmp_path: Path, tiny: Path, log: Path, train: Planted):
    from cai.config import Recipe
    from cai.pipeline import generate

    out, other = tmp_path / "out", tmp_path / "other"
    generate(Recipe.model_validate(data("respond")), other)
    given = pipeline({"sft": {"sft": training(tiny) | {"data": str(other)}}})
    run_pipeline(given, out, train=train)
    generate(Recipe.model_validate(data("respond")), other)
    assert does(given, out) == {"sft": "skip"}, "another session changes its manifest alone"
    generate(Recipe.model_validate(data("respond", prompts={"source": "benign", "limit": 4})), other, "update")
    assert does(given, out) == {"sft": "remake"}


def test_a_changed_adapter_is_a_changed_input(tmp_path: Path, tiny: Path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_model.safetensors").write_text("one")
    adapter = {"model": f"vllm:{tiny}", "vllm": {"adapter": str(tmp_path / "lora")}}
    for given in (data(policy=adapter), data(judge=adapter)):
        (step,) = unfold(pipeline({"data": {"generate": given}}), tmp_path)
        before = inputs_of(step)
        (tmp_path / "lora" / "adapter_model.safetensors").write_text(str(len(before)) + given["policy"]["model"])
        after = inputs_of(step)
        assert [name for name in after if after[name] != before.get(name)] == [f"adapter {tmp_path / 'lora'}"]


@pytest.mark.parametrize(
    "kept",
    [
        "checkpoints/checkpoint-3/trainer_state.json",
        "checkpoints/member-1/checkpoint-3/trainer_state.json",
        "members/0/done.json",
    ],
)
def test_nor_is_what_a_training_that_was_stopped_has_made(tmp_path: Path, tiny: Path, log: Path, train: Planted, kept: str):
    train.fails = "3-reward"
    with pytest.raises(EngineError):
        run_pipeline(pipeline(stages(tiny)), tmp_path / "out", train=train)
    file = tmp_path / "out" / "3-reward" / kept
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with pytest.raises(ConfigError, match=r"delete what was made in .*3-reward; add --yes"):
        run_pipeline(changed(tiny, "reward.reward.seed", 3), tmp_path / "out", train=train)
    assert file.read_text() == "{}"


def test_from_and_until_bound_what_runs(tmp_path: Path, tiny: Path, log: Path, train: Planted):
    out, given = tmp_path / "out", pipeline(stages(tiny))
    with pytest.raises(ConfigError, match=r"--from dpo: 'sft' \(.*2-sft\) is not finished"):
        run_pipeline(given, out, Choice(start="dpo"), train=train)
    assert not out.exists()
    made = run_pipeline(given, out, Choice(until="sft"), train=train)
    assert (made["status"], [entry["name"] for entry in made["stages"]]) == ("partial", ["data", "sft"])
    made = run_pipeline(changed(tiny, "data.generate.seed", 1), out, Choice(start="dpo"), train=train)
    assert [entry["name"] for entry in made["stages"]] == ["data", "sft", "dpo"]
    assert train.made == ["2-sft", "4-dpo"], "what stands before --from is taken as it is"
    for choice, problem in (
        (Choice(start="dop"), r"--from dop: no such stage \(did you mean 'dpo'\?\); stages: data, sft, reward, dpo"),
        (Choice("dpo", "sft"), "--until sft comes before --from dpo"),
    ):
        with pytest.raises(ConfigError, match=problem):
            run_pipeline(given, out, choice, train=train)


def test_a_stage_is_found_again_where_others_are_put_before_it_or_left_out(tmp_path, tiny, log, train):
    def run(*names: str) -> dict[str, str]:
        watcher = Agreeing()
        given = pipeline({name: stages(tiny)[name] for name in names})
        made = run_pipeline(given, out, watcher=watcher, train=train)
        assert [(entry["name"], entry["state"]) for entry in made["stages"]] == [(name, "done") for name in names]
        assert manifest(out) == made
        assert watcher.lost == []
        return watcher.did

    out = tmp_path / "out"
    assert run("data", "sft", "dpo") == {"1-data": "run", "2-sft": "run", "3-dpo": "run"}
    model = (out / "3-dpo" / "config.json").stat().st_mtime_ns
    both = {"1-data": "skip", "2-sft": "skip", "3-reward": "run", "3-dpo": "skip"}
    assert run("data", "sft", "reward", "dpo") == both
    assert run("data", "reward") == {"1-data": "skip", "3-reward": "skip"}
    assert run("data", "reward", "sft", "dpo") == dict.fromkeys(both, "skip")
    assert (out / "3-dpo" / "config.json").stat().st_mtime_ns == model
    assert train.made == ["2-sft", "3-dpo", "3-reward"]
    assert "former_stages" not in manifest(out)


def test_a_stopped_stage_goes_on_where_another_is_put_before_it(tmp_path, tiny, log, train):
    out, given, train.fails = tmp_path / "out", stages(tiny), "3-dpo"
    short = {name: given[name] for name in ("data", "sft", "dpo")}
    with pytest.raises(EngineError):
        run_pipeline(pipeline(short), out, train=train)
    (out / "3-dpo" / "checkpoint").write_text("kept")
    train.fails, watcher = "", Agreeing()
    run_pipeline(pipeline(given), out, watcher=watcher, train=train)
    assert watcher.did == {"1-data": "skip", "2-sft": "skip", "3-reward": "run", "3-dpo": "continue"}
    assert (out / "3-dpo" / "checkpoint").read_text() == "kept"


def test_no_two_steps_have_one_folder(tmp_path, tiny):
    made = {("data", 1): "3-data", ("dpo", 1): "4-dpo"}
    steps = unfold(rounds(tiny), tmp_path, made)
    assert [step.folder.name for step in steps] == ["3-data", "4-dpo", "4-data", "5-dpo", "5-data", "6-dpo"]


def test_another_kind_of_stage_with_the_same_settings_is_made_anew(tmp_path, tiny, log, train):
    out, given = tmp_path / "out", stages(tiny)
    begin = {name: given[name] for name in ("data", "sft")}
    run_pipeline(pipeline({**begin, "last": {"orpo": training("@sft")}}), out, train=train)
    told = forecast(pipeline({**begin, "last": {"cpo": training("@sft")}}), out).verdicts
    assert [(verdict.does, verdict.why) for verdict in told.values()][2] == ("remake", "changed: cpo in place of orpo")


def test_fresh_makes_all_chosen_stages_anew_also_after_it_was_stopped(tmp_path, tiny, log, train):
    given, watcher = pipeline(stages(tiny)), Agreeing()
    run_pipeline(given, tmp_path / "out", train=train)
    train.fails = "3-reward"
    with pytest.raises(EngineError):
        run_pipeline(given, tmp_path / "out", Choice("sft", fresh=True), watcher, train)
    assert watcher.lost == ["2-sft", "3-reward", "4-dpo"]
    with pytest.raises(ConfigError, match=r"delete what was made in .*1-data; add --yes"):
        run_pipeline(given, tmp_path / "out", Choice(until="data", fresh=True), train=train)
    train.made, train.fails = [], ""
    run_pipeline(given, tmp_path / "out", watcher=watcher, train=train)
    assert train.made == ["3-reward", "4-dpo"]
    assert watcher.did == {"1-data": "skip", "2-sft": "skip", "3-reward": "continue", "4-dpo": "remake"}


def test_a_stage_that_fails_is_named_and_goes_on_with_the_same_call(tmp_path: Path, tiny: Path, log: Path, train: Planted):
    given, train.fails = pipeline(stages(tiny)), "3-reward"
    with pytest.raises(EngineError, match=r"^stage 'reward' \(.*3-reward\): out of memory$"):
        run_pipeline(given, tmp_path / "out", train=train)
    told = manifest(tmp_path / "out")
    assert told["status"] == "failed"
    assert [entry["state"] for entry in told["stages"]] == ["done", "done", "failed"]
    assert told["stages"][2]["error"] == "out of memory"
    train.made, train.fails = [], ""
    assert run_pipeline(given, tmp_path / "out", train=train)["status"] == "done"
    assert train.made == ["3-reward", "4-dpo"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, tiny: Path, train: Planted):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"holds thesis\.tex, but no pipeline of cai run; use another -o"):
        run_pipeline(pipeline(stages(tiny)), tmp_path, Choice(until="data"), train=train)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_error_comes_out_of_the_process_that_trains_with_its_type(tmp_path: Path, tiny: Path):
    settings = SftSettings(model=str(tiny), data=str(tmp_path / "rows.jsonl"))  # type: ignore[arg-type]
    (tmp_path / "rows.jsonl").write_text('{"question": "Why?"}\n')
    from cai.training.watching import Silent

    with pytest.raises(ConfigError, match="its only row is not a dialogue that ends with the assistant's turn"):
        train_apart("sft", settings, tmp_path / "out", Silent())


def test_launch_is_passed_to_each_training_and_checked_before_anything_is_made(tmp_path, tiny, log, monkeypatch, train):
    from cai.training import launching

    seen = []

    def launch(stage: StageName, settings: TrainSettings, out: Path, mode: str, how: str | None, show: Any) -> dict[str, Any]:
        seen.append((stage, how))
        return train(stage, settings, out, show)

    monkeypatch.setattr(launching, "launch", launch)
    with pytest.raises(ConfigError, match="--launch many: expected a number of processes"):
        cli_run.run(pipeline(stages(tiny)), tmp_path / "out", Choice(), False, "many", [])
    assert not (tmp_path / "out").exists()
    (tmp_path / "zero3.yaml").write_text("{distributed_type: DEEPSPEED, deepspeed_config: {zero_stage: 3}}")
    with pytest.raises(ConfigError, match="reward models are measured in one process, which ZeRO 3 cannot"):
        cli_run.run(pipeline(stages(tiny)), tmp_path / "out", Choice(), False, str(tmp_path / "zero3.yaml"), [])
    assert not (tmp_path / "out").exists()
    cli_run.run(pipeline(stages(tiny)), tmp_path / "out", Choice(), False, "2", [])
    assert seen == [("sft", "2"), ("reward", "2"), ("dpo", "2")]


# --- rounds


def rounds(tiny: Path, **dpo: Any) -> Pipeline:
    begin = {"policy": {"model": f"@dpo or scripted:{SCRIPTED}:respond"}}
    given = {"data": {"generate": data(**begin)}, "dpo": {"dpo": {**training(f"@dpo or {tiny}"), **dpo}}}
    return pipeline(given, rounds=3, seed=5)


def test_each_round_goes_on_from_the_model_of_the_round_before(tmp_path: Path, tiny: Path):
    steps = unfold(rounds(tiny, reference=str(tiny)), tmp_path)
    assert [step.folder.name for step in steps] == ["1-data", "2-dpo", "3-data", "4-dpo", "5-data", "6-dpo"]
    told = [step.settings.model_dump() for step in steps]
    assert [one["policy"]["model"] for one in told[::2]] == [
        f"scripted:{SCRIPTED}:respond",
        str(tmp_path / "2-dpo"),
        str(tmp_path / "4-dpo"),
    ]
    assert [one["model"] for one in told[1::2]] == [str(tiny), str(tmp_path / "2-dpo"), str(tmp_path / "4-dpo")]
    assert [one["data"][0]["source"] for one in told[1::2]] == [str(tmp_path / f"{number}-data") for number in (1, 3, 5)]
    assert [one["seed"] for one in told] == [5, 5, 6, 6, 7, 7]
    assert {one["reference"] for one in told[1::2]} == {str(tiny)}


def test_what_stands_once_runs_in_the_first_round_only(tmp_path: Path, tiny: Path):
    given = {
        "first": {"generate": data(), "once": True},
        "sft": {"sft": {**training(tiny), "data": "@first"}, "once": True},
        "data": {"generate": data()},
        "dpo": {"dpo": training("@dpo or @sft")},
    }
    steps = unfold(pipeline(given, rounds=2), tmp_path)
    assert [step.label for step in steps] == ["first", "sft", "data", "dpo", "data (round 2)", "dpo (round 2)"]
    assert [steps[index].settings.model_dump()["model"] for index in (3, 5)] == [
        str(tmp_path / "2-sft"),
        str(tmp_path / "4-dpo"),
    ]


def test_a_stage_of_rounds_is_named_by_its_folder(tmp_path: Path, tiny: Path, train: Planted):
    with pytest.raises(ConfigError, match="--until dpo: there is one in each round; name 2-dpo, 4-dpo, 6-dpo"):
        run_pipeline(rounds(tiny), tmp_path / "out", Choice(until="dpo"), train=train)
    made = run_pipeline(rounds(tiny), tmp_path / "out", Choice(until="2-dpo"), train=train)
    assert [entry["folder"] for entry in made["stages"]] == ["1-data", "2-dpo"]


def test_dpo_is_held_near_the_reference_that_is_named(tmp_path: Path, tiny: Path):
    """At the first step the policy is where it begins: exactly as near as ln 2 says to itself, and not to another model."""
    from cai.config import Recipe
    from cai.pipeline import generate
    from cai.training.running import train

    generate(Recipe.model_validate(data("respond")), tmp_path / "data")
    given = training(tiny, max_steps=1) | {"data": str(tmp_path / "data")}
    trained = train(
        "dpo", DpoSettings.model_validate(given | {"trl": given["trl"] | {"learning_rate": 0.1}}), tmp_path / "other"
    )
    assert trained["measures"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    named = DpoSettings.model_validate(given | {"reference": str(tmp_path / "other")})
    assert abs(train("dpo", named, tmp_path / "named")["measures"]["loss"] - math.log(2)) > 1e-3


# --- rewards


def online(tiny: Path, **more: Any) -> dict[str, Any]:
    """A stage of PPO on prompts of `@data`."""
    given = training(tiny, per_device_train_batch_size=4, max_completion_length=6)
    return {**given, **more}


def test_ppo_is_rewarded_by_what_the_stage_before_trained(tmp_path: Path, tiny: Path):
    from cai.training import running

    def train(stage: StageName, settings: TrainSettings, out: Path, show: Any) -> dict[str, Any]:
        return running.train(stage, settings, out, show=show)

    (tmp_path / "fun.py").write_text("def f(completions, **columns): return [float(len(one)) for one in completions]\n")
    reward = {"reward": training(tiny) | {"members": 2, "lora": {"rank": 2}}}
    short = {"max_steps": 1, "per_device_train_batch_size": 2, "max_new_tokens": 6}
    gold = {"function": f"{tmp_path}/fun.py:f"}
    given = {
        "data": {"generate": data("respond")},
        "reward": reward,
        "other": {"reward": training(tiny) | {"seed": 3}},
        "ppo": {"ppo": online(tiny, reward="@reward", critic="@other", gold=gold)},
        "more": {"online-dpo": online(Path("@ppo"), reward=[{"model": "@other", "weight": 2}], trl=short)},
    }
    made = run_pipeline(pipeline(given), tmp_path / "out", train=train)
    assert [entry["state"] for entry in made["stages"]] == ["done"] * 5
    assert "reward" in made["stages"][3]["measures"]
    assert "objective/scores" in made["stages"][4]["measures"]
    assert sorted(made["stages"][3]["inputs"]) == sorted(
        ["settings", "@data", "@reward", "@other", f"model {tiny}", f"function {tmp_path}/fun.py:f"]
    )
    assert load_pipeline(tmp_path / "out" / "recipe.yaml") == pipeline(given)
    assert set(does(pipeline(given), tmp_path / "out").values()) == {"skip"}


def test_with_other_limits_a_training_goes_on(tmp_path: Path, tiny: Path):
    from cai.training import running

    def train(stage: StageName, settings: TrainSettings, out: Path, show: Any) -> dict[str, Any]:
        return running.train(stage, settings, out, show=show)

    (tmp_path / "fun.py").write_text("def f(completions, **columns): return [float(len(one)) for one in completions]\n")
    stage = online(tiny, data="benign", reward={"function": f"{tmp_path}/fun.py:f"})
    stage["trl"] |= {"max_steps": 3, "save_strategy": "steps"}
    seen = []
    for limits in ({"steps": 1}, {"steps": 2}, {}):
        watcher = Agreeing()
        made = run_pipeline(
            pipeline({"ppo": {"ppo": {**stage, "limits": limits}}}), tmp_path / "out", watcher=watcher, train=train
        )
        lines = (tmp_path / "out" / "1-ppo" / "run" / "log.jsonl").read_text().splitlines()
        steps = [line["step"] for line in map(json.loads, lines) if "loss" in line]
        seen.append((watcher.did["1-ppo"], watcher.lost, steps, made["status"]))
    assert seen == [
        ("run", [], [1], "done"),
        ("continue", [], [1, 2], "done"),
        ("continue", [], [1, 2, 3], "done"),
    ]


def test_a_changed_reward_is_a_changed_input(tmp_path: Path, tiny: Path):
    function, constitution, model = tmp_path / "fun.py", tmp_path / "own.yaml", tmp_path / "model"
    model.mkdir()
    judge = {"model": str(model), "method": "score"}
    rewards = [{"function": f"{function}:f"}, {"constitution": str(constitution), "judge": judge}]
    stage = {"ppo": online(tiny, data="benign", reward=rewards, gold={"constitution": str(constitution)})}

    def inputs() -> dict[str, str]:
        (step,) = unfold(pipeline({"ppo": stage}), tmp_path)
        return inputs_of(step)

    function.write_text("one")
    constitution.write_text(SMALL.read_text())
    (model / "config.json").write_text("{}")
    seen = [inputs()]
    function.write_text("two")
    seen.append(inputs())
    constitution.write_text(SMALL.read_text().replace("not kind", "unkind"))
    seen.append(inputs())
    (model / "config.json").write_text('{"a": 1}')
    seen.append(inputs())
    changes = [[name for name in new if new[name] != old.get(name)] for old, new in pairwise(seen)]
    assert changes == [[f"function {function}:f"], [f"constitution {constitution}"], [f"model {model}"]]


def test_two_reward_models_that_are_not_there_yet_are_not_taken_for_one(tmp_path: Path, tiny: Path):
    both = {name: {"reward": training(tiny)} for name in ("one", "two")}
    given = {"data": {"generate": data()}, **both, "ppo": {"ppo": online(tiny, reward="@one", gold="@two")}}
    assert does(pipeline(given), tmp_path / "out") == dict.fromkeys(given, "run")


def test_what_comes_after_ppo_begins_with_its_best_model(tmp_path: Path, tiny: Path, log: Path):
    class WithBest(Planted):
        def __call__(self, stage: StageName, settings: TrainSettings, out: Path, show: Any) -> dict[str, Any]:
            begins.append(Path(settings.model).name)
            told = super().__call__(stage, settings, out, show)
            if stage == "ppo" and model == "best":
                (out / "best").mkdir()
                (out / "best" / "config.json").write_text("{}")
            return told

    ppo = {"ppo": online(tiny, reward={"constitution": "demo/brief.yaml"})}
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "brief.yaml").write_text((ROOT / "pipelines" / "demo" / "brief.yaml").read_text())
    after = {"generate": data(policy={"model": "@ppo"}, judge={"method": "checks", "principles": "all"})}
    recipe = written(tmp_path, {"data": {"generate": data()}, "ppo": ppo, "dpo": {"dpo": training("@ppo")}, "after": after})
    for model in ("best", "2-ppo"):
        begins: list[str] = []
        out = tmp_path / model
        run_pipeline(load_pipeline(recipe), out, Choice(until="dpo"), train=WithBest())
        assert begins == [tiny.name, model]
        step = unfold(load_pipeline(recipe), out)[-1]
        assert Path(step.settings.policy.model).name == model  # type: ignore[union-attr]


# --- what a recipe may say


HEAD = 'name: test\nstages:\n  data: {generate: {prompts: {source: benign}}}\n  sft: {sft: {data: "@data"}}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\n", "'stages' is missing, so it is no pipeline"),
        ("name: a b\nstages: {data: {generate: {}}}\n", "p.yaml:1: name: expected letters, digits, - and _"),
        ("name: a\nstages: {}\n", "p.yaml:2: stages: "),
        ("name: a\nstages:\n  x y: {generate: {}}\n", "p.yaml:3: stages.x y: expected letters, digits"),
        ("name: a\nstages:\n  data: {}\n", "p.yaml:3: stages.data: expected exactly one of generate, sft, "),
        (f"{HEAD}  x: {{generate: {{}}, sft: {{data: '@data'}}}}\n", "p.yaml:5: stages.x: expected exactly one of "),
        (f"{HEAD}  x:\n    dpu: {{}}\n", "p.yaml:6: stages.x.dpu: unknown key (did you mean 'dpo'?)"),
        (
            f"{HEAD}  x:\n    dpo:\n      data: '@data'\n      modle: y\n",
            "p.yaml:8: stages.x.dpo.modle: unknown key (did",
        ),
        (
            f"{HEAD}  x:\n    generate:\n      prompts: {{limt: 3}}\n",
            "p.yaml:7: stages.x.generate.prompts.limt: unknown key",
        ),
        (f"{HEAD}  x: {{dpo: {{}}}}\n", "p.yaml:5: stages.x.dpo.data: this key is required"),
        (
            f"{HEAD}  x:\n    dpo:\n      model: '@stf'\n      data: '@data'\n",
            "p.yaml:7: stages.x.dpo.model: '@stf' is no stage; stages before it: @data, @sft (did you mean 'sft'?)",
        ),
        (f"{HEAD}  x: {{dpo: {{model: '@x', data: '@data'}}}}\n", "'@x' is this very stage; stages before it: @data, @sft"),
        (
            HEAD.replace("benign", "'@sft'"),
            "p.yaml:3: stages.data.generate.prompts.source: '@sft' comes later; there is no",
        ),
        (f"{HEAD}  x: {{dpo: {{data: '@sft'}}}}\n", "'@sft' is a trained model, and rows are read here"),
        (f"{HEAD}  x: {{dpo: {{model: '@data', data: '@data'}}}}\n", "'@data' is a dataset, and a model is needed here"),
        (
            f"{HEAD}  x: {{dpo: {{model: '@sft or y', data: '@data'}}}}\n",
            "'@sft' is always there before 'x' runs; rem",
        ),
        (f"{HEAD}  x: {{dpo: {{model: '@sft y', data: '@data'}}}}\n", "'@sft y': expected '@STAGE', or '@STAGE or MODEL'"),
        (
            f"{HEAD}  a: {{sft: {{data: '@data', lora: {{merge: false}}}}}}\n  x: {{dpo: {{model: '@a', data: '@data'}}}}\n",
            "p.yaml:6: stages.x.dpo.model: '@a' saves adapters alone",
        ),
        (
            f"{HEAD}  r: {{reward: {{data: '@data'}}}}\n  x: {{dpo: {{model: '@r', data: '@data'}}}}\n",
            "p.yaml:6: stages.x.dpo.model: '@r' is a reward model",
        ),
        (
            f"{HEAD}  r: {{reward: {{data: '@data'}}}}\n  x: {{ppo: {{model: '@r', data: '@data', reward: '@r'}}}}\n",
            "p.yaml:6: stages.x.ppo.model: '@r' is a reward model",
        ),
        (
            f"{HEAD}  x:\n    online-dpo:\n      data: '@data'\n      reward: '@sft'\n",
            "p.yaml:8: stages.x.online-dpo.reward[0].model: '@sft' gives no reward, and a reward model is needed here",
        ),
        (
            f"{HEAD}  x:\n    ppo:\n      data: '@data'\n      reward: r.py:f\n      gold: '@sft'\n",
            "p.yaml:9: stages.x.ppo.gold.model: '@sft' gives no reward",
        ),
        (
            f"{HEAD}  x:\n    ppo:\n      data: '@data'\n      reward: r.py:f\n      critic: '@sft'\n",
            "p.yaml:9: stages.x.ppo.critic: '@sft' gives no reward",
        ),
        (f"{HEAD}  x: {{ppo: {{data: '@sft', reward: 'r.py:f'}}}}\n", "'@sft' is a trained model, and rows are read here"),
        (f"{HEAD}  x:\n    online_dpo: {{}}\n", "p.yaml:6: stages.x.online_dpo: unknown key (did you mean 'online-dpo'?)"),
        (f"{HEAD}  x:\n    online-dpo:\n      rewrad: a\n", "p.yaml:7: stages.x.online-dpo.rewrad: unknown key (did you"),
        (f"{HEAD}  x:\n    grpo:\n      data: '@data'\n", "p.yaml:6: stages.x.grpo.reward: this key is required"),
        (
            f"rounds: 2\n{HEAD.replace('benign', 'benign}, policy: {model: vllm:@sft')}",
            "in the first round there is no '@sft'",
        ),
    ],
)
def test_a_bad_pipeline_is_told_with_file_line_and_key(tmp_path: Path, text: str, message: str):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_pipeline(tmp_path / "p.yaml")
    assert message in str(caught.value).replace(f"{tmp_path}/", "")


def test_a_flag_changes_a_key_and_adds_no_stage(tmp_path: Path):
    (tmp_path / "p.yaml").write_text(HEAD)
    loaded = load_pipeline(tmp_path / "p.yaml", [("stages.data.generate.prompts.limit", 3, "--set")])
    assert loaded.stages["data"].section.prompts.limit == 3
    with pytest.raises(ConfigError, match=r"--set x: no stage 'dta' \(did you mean 'data'\?\); stages: data, sft"):
        load_pipeline(tmp_path / "p.yaml", [("stages.dta.generate.prompts.limit", 3, "--set x")])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            "    dpo:\n      data: '@data'\n      trl:\n        max_stebs: 3\n",
            "p.yaml:9: stages.x.dpo.trl.max_stebs: DPOConfig",
        ),
        (
            "    dpo: {data: '@data', trl: {beta: x, warmup_steps: -3}}\n",
            "p.yaml:6: stages.x.dpo.trl.beta: expected a number, found 'x'",
        ),
        ("    dpo: {data: '@data', model: ./nowhere}\n", "p.yaml:6: stages.x.dpo: model './nowhere': there is no such folder"),
        ("    dpo: {data: nowhere.jsonl}\n", "p.yaml:6: stages.x.dpo: data 'nowhere.jsonl': there is no such file"),
        ("    dpo: {data: '-'}\n", "p.yaml:6: stages.x.dpo: data '-': standard input cannot be read again; save the rows"),
        ("    dpo: {data: MODEL}\n", "p.yaml:6: stages.x.dpo: data 'MODEL': this is a model, not a dataset"),
        ("    generate: {generation: {rounds: 99}}\n", "p.yaml:6: stages.x.generate: generation.rounds: 99 rounds"),
        (
            "    generate: {prompts: {source: gone.jsonl}}\n",
            "p.yaml:6: stages.x.generate: prompts 'gone.jsonl': there is no such",
        ),
        ("    generate: {prompts: {source: '-'}}\n", "standard input cannot be read again"),
        (
            "    ppo: {data: '@data', reward: './fun.py:brief'}\n",
            "p.yaml:6: stages.x.ppo: reward: function './fun.py:brief': there is no ./fun.py",
        ),
        (
            "    rloo: {data: '@data', reward: smollm2-135m}\n",
            "p.yaml:6: stages.x.rloo: reward: 'smollm2-135m' is a language model, which gives no reward",
        ),
        (
            "    grpo: {data: '@data', reward: {constitution: harmless}}\n",
            "p.yaml:6: stages.x.grpo: reward: constitution 'harmless' has no principle with a check",
        ),
        (
            "    ppo: {data: '@data', reward: 'FUN:f', gold: {constitution: harmless}}\n",
            "p.yaml:6: stages.x.ppo: gold: constitution 'harmless' has no principle with a check",
        ),
        (
            "    ppo: {data: '@data', reward: 'FUN:f', trl: {max_completion_length: 9000}}\n",
            "stages.x.ppo: trl: completions of 9000 tokens leave no room for prompts in a context of 8192",
        ),
    ],
)
def test_every_stage_is_checked_before_the_first_one_runs(tmp_path, tiny, more: str, message: str, train: Planted):
    more, message = (text.replace("MODEL", str(tiny)) for text in (more, message))
    (tmp_path / "function.py").write_text("def f(completions, **columns): return [0.0 for _ in completions]\n")
    (tmp_path / "p.yaml").write_text(f"{HEAD}  x:\n{more}".replace("FUN", f"{tmp_path}/function.py"))
    with pytest.raises(ConfigError) as caught:
        run_pipeline(load_pipeline(tmp_path / "p.yaml"), tmp_path / "out", train=train)
    assert message in str(caught.value).replace(f"{tmp_path}/", "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("dpo", {"reference": "./nowhere"}, "reference: model './nowhere': there is no such folder"),
        ("dpo", {"reference": "FEWER"}, "has 100 tokens where model"),
        (
            "reward",
            {"bases": ["TINY", "./nowhere"], "members": 2},
            "bases: model './nowhere': there is no such folder",
        ),
        ("dpo", {"trl": {"max_length": 4096}}, "trl.max_length: 4096 is more than the 2048 tokens"),
        ("dpo", {"model": "@sft", "trl": {"max_length": 4096}}, "trl.max_length: 4096 is more than the 2048 tokens"),
        (
            "reward",
            {"bases": ["TINY", "SHORT"], "members": 2, "trl": {"max_length": 1024}},
            "trl.max_length: 1024 is more than the 512 tokens",
        ),
    ],
)
def test_what_training_alone_reads_is_checked_before_anything_is_generated(tmp_path, tiny, train, kind, more, message):
    more = {"model": "TINY", **more} if kind == "dpo" else more
    short = make_tiny_model(tmp_path / "short", context=512)
    fewer = make_tiny_model(tmp_path / "fewer")
    (fewer / "config.json").write_text((fewer / "config.json").read_text().replace('"vocab_size": 291', '"vocab_size": 100'))
    places = {"TINY": tiny, "SHORT": short, "FEWER": fewer}
    named = json.loads(re.sub("TINY|SHORT|FEWER", lambda found: str(places[found[0]]), json.dumps(more)))
    given = {"data": {"generate": data()}, "sft": {"sft": training(tiny)}, "x": {kind: {"data": "@data", **named}}}
    with pytest.raises(ConfigError) as caught:
        run_pipeline(pipeline(given), tmp_path / "out", train=train)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", built_in_recipes())
def test_shipped_pipelines_are_found_and_their_arguments_are_trls(name: str):
    from cai.training.arguments import check_arguments

    loaded = load_pipeline(name)
    assert loaded == load_pipeline(ROOT / "pipelines" / f"{name}.yaml")
    assert loaded.name == name
    for stage in loaded.stages.values():
        if isinstance(stage.section, TrainSettings):
            check_arguments(stage.kind, stage.section.trl)
            assert type(stage.section).model_validate(stage.section.model_dump(mode="json")) == stage.section
    assert load_recipe(name, []).constitution, "its first stage, for cai generate"


@pytest.mark.slow
def test_harmless_rm_ppo_runs_as_it_is_shipped_but_for_its_size(tmp_path: Path):
    tiny, program = str(make_tiny_model(tmp_path / "tiny", context=1024)), f"scripted:{SCRIPTED}:hashed"
    smaller = {
        "revisions.generate": {"policy.model": program, "prompts.limit": 12},
        "sft.sft": {"model": tiny, "trl.max_steps": 2},
        "pairs.generate": {"judge.model": program, "prompts.limit": 40, "generation.max_tokens": 8},
        "reward.reward": {"trl.max_steps": 2},
        "ppo.ppo": {
            "gold.judge.model": program,
            "gold.prompts": 4,
            "gold.every": 8,
            "trl.per_device_train_batch_size": 2,
            "trl.max_steps": 16,
            "trl.max_completion_length": 8,
        },
    }
    told = [(f"stages.{stage}.{key}", value, "--set") for stage, keys in smaller.items() for key, value in keys.items()]
    made = run_pipeline(load_pipeline("harmless-rm-ppo", told), tmp_path / "out")
    assert [entry["state"] for entry in made["stages"]] == ["done"] * 5
    gold = [json.loads(line) for line in (tmp_path / "out" / "5-ppo" / "run" / "gold.jsonl").read_text().splitlines()]
    assert [line["step"] for line in gold] == [0, 8, 16]
    assert all(-1 <= line["gold"] <= 1 for line in gold), "of a rating from 1 to 10"
    assert (tmp_path / "out" / "5-ppo" / "best" / "model.safetensors").is_file()


def test_the_modules_example_is_a_pipeline():
    import cai.pipeline.recipe

    _, _, example = (cai.pipeline.recipe.__doc__ or "").partition("\n\n")
    assert list(Document(example.partition("\n\n")[0], "docstring").validate(Pipeline).stages) == ["data", "sft", "dpo"]


@pytest.mark.parametrize("section", [*sections(Stage), Pipeline])
def test_every_key_has_a_docstring(section: Any):
    assert [name for name, field in section.model_fields.items() if not field.description] == []


# --- the command


def written(tmp_path: Path, stages: dict[str, Any]) -> Path:
    (tmp_path / "p.yaml").write_text(json.dumps({"name": "test", "stages": stages}))
    return tmp_path / "p.yaml"


def test_the_command_names_itself_where_a_stage_fails(tmp_path: Path):
    bad = {"prompts": {"source": str(tmp_path / "bad.jsonl")}}
    (tmp_path / "bad.jsonl").write_text('{"prompt": "fault:raise"}\n')
    recipe = written(tmp_path, {"data": {"generate": data("faulty", **bad)}})
    done = command("run", recipe, "-o", tmp_path / "my out", "--set", "seed=3")
    assert done.returncode == 1
    assert "cai: stage 'data' (" in done.stderr
    assert f"this command continues: cai run {recipe} -o '{tmp_path}/my out' --set seed=3" in done.stderr


def test_a_refused_command_is_not_said_to_continue(tmp_path: Path, log: Path):
    recipe = written(tmp_path, {"data": {"generate": data()}})
    assert command("run", recipe, "-o", tmp_path / "out").returncode == 0
    for more, message in (
        (["--fresh"], "this would delete what was made in"),
        (["--until", "dta"], "no such stage (did you mean 'data'?)"),
    ):
        refused = command("run", recipe, "-o", tmp_path / "out", *more)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert "continues" not in refused.stderr


def test_a_dry_run_tells_and_makes_nothing(tmp_path: Path, tiny: Path):
    recipe = written(tmp_path, {name: stage for name, stage in stages(tiny).items() if name in ("data", "sft")})
    args = ("run", recipe, "-o", tmp_path / "out")
    done = command(*args, "--dry-run", "--until", "data", env={"COLUMNS": "200"})
    assert done.returncode == 0
    assert "6 prompts, at most 78 calls" in done.stdout
    assert "left as it is" in done.stdout
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_with_130_and_the_command_that_continues(tmp_path: Path, log: Path):
    recipe = written(tmp_path, {"data": {"generate": data("slow")}})
    process = start("run", recipe, "-o", tmp_path / "out", env={"SLOW": "0.5"})
    wait_until(lambda: len(log_lines(log)) >= 4)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"this command continues: cai run {recipe} -o {tmp_path}/out" in told
    assert manifest(tmp_path / "out")["stages"][0]["state"] == "stopped"
    finished = len(log_lines(log))
    done = command("run", recipe, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "data (generate): goes on" in done.stdout
    assert len(log_lines(log)) == 78, f"{finished} calls were not made again"


def test_a_training_that_is_killed_with_its_pipeline_goes_on(tmp_path: Path, tiny: Path, log: Path):
    sft = training(tiny, max_steps=80, save_steps=10)
    recipe, out = written(tmp_path, {"data": {"generate": data()}, "sft": {"sft": sft}}), tmp_path / "out"
    process = start("run", recipe, "-o", out, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = out / "2-sft" / "checkpoints" / "checkpoint-10" / "trainer_state.json"
    wait_until(checkpoint.exists, 120)
    process.kill()
    process.wait()
    assert manifest(out)["stages"][1]["state"] == "running"
    again = start("run", recipe, "-o", out)
    said, told = again.communicate(timeout=240)
    assert again.returncode == 0, told
    assert "data (generate): finished, skipped" in said
    assert "sft (sft): goes on" in said
    steps = [json.loads(line)["step"] for line in (out / "2-sft" / "run" / "log.jsonl").read_text().splitlines()]
    assert steps.count(1) == 1, "the second process began at a checkpoint"
    assert manifest(out)["status"] == "done"
