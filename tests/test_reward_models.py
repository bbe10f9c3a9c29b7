"""Reward models trained on what a run wrote: ensembles, objectives, length, measures; against code that is written plainly."""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardTrainer

from cai import generate
from cai.config import ModelConfig
from cai.engines import RewardRequest, build_engine
from cai.engines.reward_model import RewardModelEngine
from cai.errors import ConfigError, ContextLengthError, Interrupted
from cai.intervals import gathered
from cai.pipeline import label, read_records
from cai.rewards.combining import combine, normalised
from cai.rewards.dialogues import DialogueTokenizer
from cai.rewards.heads import ExactHead
from cai.rewards.model import RewardModel
from cai.rewards.spec import LengthLine, MemberSpec, RewardSpec
from cai.training import members, objectives
from cai.training.arguments import make_arguments
from cai.training.base_settings import SourceSettings
from cai.training.checkpoints import find_last
from cai.training.data import StageData, load_data
from cai.training.length_effect import length_correlation, length_line
from cai.training.loading import load_tokenizer
from cai.training.running import train
from cai.training.settings import DpoSettings, RewardSettings
from cai.training.stage import Parts, build_trainer
from cai.training.watching import Watch
from cai.types import Message
from tests.runs import SMALL, command, recipe, rows, written_rows
from tests.test_reward_model import make_reward_model
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
TAGS = {"kind": "harmless", "honest": "honest", "short": "helpful", "clear": "helpful", "calm": "harmless"}
QUICK = {"max_steps": 2, "per_device_train_batch_size": 4, "disable_tqdm": True, "eval_strategy": "no"}
BOTH = {"helpful": 1.0, "harmless": -2.0}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For models so tiny a second thread is only waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """What `cai generate` wrote, by a constitution whose principles have tags."""
    folder = tmp_path_factory.mktemp("run")
    text = SMALL.read_text()
    for principle, tag in TAGS.items():
        text = text.replace(f"  - id: {principle}\n", f"  - id: {principle}\n    tags: [{tag}]\n")
    (folder / "tagged.yaml").write_text(text)
    made = recipe(constitution=str(folder / "tagged.yaml"), prompts={"limit": 24}, dataset={"test_fraction": 0.3})
    generate(made, folder / "run")
    return folder / "run"


def settings(base: Path, *data: Any, **more: Any) -> RewardSettings:
    trl = QUICK | more.pop("trl", {})
    given = {"model": str(base), "data": [one if isinstance(one, dict) else str(one) for one in data], "dtype": "float32"}
    return RewardSettings.model_validate({**given, "trl": trl, **more})


@pytest.fixture(scope="module")
def trained(base, run, tmp_path_factory):
    """Folders of reward models by name, each trained once."""
    folder, kinds = (
        tmp_path_factory.mktemp("trained"),
        {
            "one": {"length": "fitted"},
            "adapters": {
                "lora": True,
                "members": 3,
                "combine": "mean-variance",
                "variance_weight": 0.5,
                "trl": {"save_steps": 1},
            },
            "objectives": {"members": 2, "combine": "min", "objectives": BOTH},
            "whole": {"members": 2, "combine": "min", "objectives": BOTH, "length": "fitted"},
            "unmerged": {"lora": {"merge": False}, "objectives": {"honest": 1.0}},
        },
    )

    def get(name: str) -> Path:
        if not (folder / name).exists():
            train("reward", settings(base, run, **kinds[name]), folder / name)
        return folder / name

    return get


def dialogues(run: Path, count: int = 8) -> list[list[dict[str, str]]]:
    """Of unlike lengths."""
    given = rows(run, "preference")[:count]
    return [[*row["prompt"], *row[side]] for row in given for side in ("chosen", "rejected")]


def load(folder: Path) -> RewardModel:
    return RewardModel.load(folder, device="cpu", dtype="float32")


def plain_outputs(folder: Path, spec: dict[str, Any], dialogue: list[dict[str, str]]) -> list[list[float]]:
    """Each member's outputs for one dialogue, by nothing but transformers and peft."""
    from peft import PeftModel

    found = []
    for member in spec["members"]:
        own = folder / member["folder"]
        outputs = len(spec["objectives"])
        if member["base"]:
            network = AutoModelForSequenceClassification.from_pretrained(member["base"], num_labels=outputs)
            network = PeftModel.from_pretrained(network, own)
        else:
            network = AutoModelForSequenceClassification.from_pretrained(own)
        given = AutoTokenizer.from_pretrained(own).apply_chat_template(dialogue, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            found.append(network.eval()(given["input_ids"]).logits[0].tolist())
    return found


def plain_reward(spec: dict[str, Any], outputs: list[list[float]], characters: int) -> float:
    """One reward, number by number."""
    rewards = []
    for member, values in zip(spec["members"], outputs, strict=True):
        normal = [(value - m) / d for value, m, d in zip(values, member["mean"], member["deviation"], strict=True)]
        rewards.append(sum(weight * one for weight, one in zip(spec["objectives"].values(), normal, strict=True)))
    mean = sum(rewards) / len(rewards)
    variance = sum((one - mean) ** 2 for one in rewards) / len(rewards)
    whole = {"mean": mean, "min": min(rewards), "mean-variance": mean - spec["variance_weight"] * variance}[spec["combine"]]
    return whole - (spec["length"]["slope"] * (characters - spec["length"]["mean"]) if spec["length"] else 0)


@pytest.mark.parametrize("name", ["one", "adapters", "objectives", "unmerged"])
def test_scores_agree_with_plain_code(trained, run, name):
    folder = trained(name)
    spec = json.loads((folder / "reward.json").read_text())
    given = dialogues(run, 3)
    found = load(folder).score(given)
    for place, dialogue in enumerate(given):
        outputs = plain_outputs(folder, spec, dialogue)
        assert found.reward[place] == pytest.approx(plain_reward(spec, outputs, len(dialogue[-1]["content"])), abs=1e-3)
    assert found.members.shape == (len(given), len(spec["members"]))
    assert found.objectives.shape == (len(given), len(spec["objectives"]))


def test_a_batch_says_what_each_dialogue_says_alone_in_any_order(trained, run):
    model, given = load(trained("objectives")), dialogues(run)
    together = model.score(given)
    alone = [model.score([one]).reward[0] for one in given]
    assert together.reward == pytest.approx(alone, abs=1e-4)
    assert together.reward == pytest.approx(model.score(given[::-1]).reward[::-1], abs=1e-4)
    assert len(set(together.tokens)) > 1


def test_adapters_share_their_base(trained, run):
    model = load(trained("adapters"))
    assert len({id(one.network) for one in model.members}) == 1
    network = model.members[0].network
    weights = [name for name, _ in network.named_parameters() if name.endswith("q_proj.base_layer.weight")]
    assert len(weights) == 2, "one in each of the two layers"
    adapters = {name.split(".")[-2] for name, _ in network.named_parameters() if "lora_A" in name}
    assert adapters == {one.adapter for one in model.members}
    assert len({repr(row) for row in model.outputs(dialogues(run, 2))[0].transpose(1, 0, 2).tolist()}) == 3, "each is its own"
    assert not list(trained("adapters").glob("**/members/*/model.safetensors"))


def test_members_of_unlike_bases_have_tokenizers_of_their_own(base, run, tmp_path):
    other = make_tiny_model(tmp_path / "other", context=1500)
    told = json.loads((other / "tokenizer_config.json").read_text())
    (other / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}\n{% endfor %}")
    assert "chat_template" not in told
    given = settings(base, run, members=2, bases=[str(base), str(other)], lora=True, trl={"max_steps": 1})
    assert given.model == str(base)
    train("reward", given, tmp_path / "out")
    model = load(tmp_path / "out")
    first, second = (one.tokenizer.encode(dialogues(run, 1)[0]) for one in model.members)
    assert len(second) < len(first)
    assert len({id(one.network) for one in model.members}) == 2
    assert model.score(dialogues(run, 1)).tokens[0] == len(first)


def reward_engine(folder: Path, **options: Any) -> RewardModelEngine:
    return RewardModelEngine(ModelConfig(model=str(folder), **{"dtype": "float32", "device": "cpu"} | options))


def asked(dialogue: list[dict[str, str]]) -> RewardRequest:
    return RewardRequest(tuple(Message(**turn) for turn in dialogue))


@pytest.mark.parametrize("name", ["one", "adapters", "whole", "unmerged"])
@pytest.mark.parametrize("options", [{}, {"batch_size": 3, "batch_tokens": 300}, {"exact": True}], ids=repr)
async def test_a_judge_is_told_the_rewards_of_all_members_objectives_and_length(trained, run, name, options):
    given, model, engine = dialogues(run, 4), load(trained(name)), reward_engine(trained(name), **options)
    found = await asyncio.gather(*(engine.reward(asked(one)) for one in given))
    scores = model.score(given)
    assert [one.reward for one in found] == pytest.approx(scores.reward.tolist(), abs=1e-4)
    assert [one.computed_tokens for one in found] == (scores.tokens * len(model.members)).tolist()
    assert (name in ("one", "whole")) == bool(scores.length.any())
    await engine.close()


def test_an_ensemble_with_objectives_and_length_labels_pairs(trained, run, tmp_path):
    given = rows(run, "preference")[:4]
    pairs = [{"prompt": one["prompt"], **{side: one[side][0]["content"] for side in ("chosen", "rejected")}} for one in given]
    judge = {"model": str(trained("whole")), "method": "reward-model"}
    policy = {"model": "smollm2-135m", "dtype": "float32", "device": "cpu"}
    prompts = {"source": written_rows(tmp_path, *pairs), "limit": None}
    label(recipe(judge=judge, prompts=prompts, policy=policy), tmp_path / "run")
    reward = load(trained("whole")).score(dialogues(run, 4)).reward
    readings = [one.verdicts[0].principles[0].readings[0] for one in read_records(tmp_path / "run")]
    assert np.ravel(readings) == pytest.approx(reward, abs=1e-4)


def test_what_an_ensemble_is_called_follows_every_member_and_how_they_are_combined(trained, tmp_path):
    folder = shutil.copytree(trained("whole"), tmp_path / "there" / "whole")
    before = reward_engine(folder).fingerprint
    assert before == reward_engine(trained("whole")).fingerprint
    spec = json.loads((folder / "reward.json").read_text())
    (folder / "reward.json").write_text(json.dumps({**spec, "combine": "mean"}))
    combined = reward_engine(folder).fingerprint
    torch.manual_seed(1)
    weights = AutoModelForSequenceClassification.from_pretrained(folder / "members" / "1")
    weights.score.reset_parameters()
    weights.save_pretrained(folder / "members" / "1")
    assert len({before, combined, reward_engine(folder).fingerprint}) == 3


def test_an_ensemble_is_nothing_but_a_reward_model(trained, base, run, tmp_path):
    with pytest.raises(ConfigError, match=r"is a reward model of several members, .*judge.method: reward-model"):
        build_engine(ModelConfig(model=str(trained("whole")), device="cpu"))
    with pytest.raises(ConfigError, match="is a reward model of several members"):
        train("dpo", DpoSettings.model_validate({"model": str(trained("whole")), "data": [str(run)]}), tmp_path / "out")


def test_one_member_is_a_plain_classifier(trained):
    network = AutoModelForSequenceClassification.from_pretrained(trained("one"))
    assert network.config.num_labels == 1
    assert (trained("one") / "tokenizer.json").is_file()
    names = AutoModelForSequenceClassification.from_pretrained(trained("objectives") / "members" / "0").config.id2label
    assert list(names.values()) == ["helpful", "harmless"]


def test_members_differ_in_their_rows_and_go_on_where_they_were_stopped(trained, base, run, tmp_path, monkeypatch):
    begun = []
    fit = members.fit

    def counted(trainer, watch, checkpoints, show):
        last, _ = find_last(checkpoints)
        begun.append((checkpoints.name, last and last.name, len(trainer.train_dataset)))
        fit(trainer, watch, checkpoints, show)

    def stop(self, args, state, control, **given):
        self.stopping = "member-1" in args.output_dir
        usual(self, args, state, control, **given)

    usual = Watch.on_step_end
    monkeypatch.setattr(members, "fit", counted)
    monkeypatch.setattr(Watch, "on_step_end", stop)
    whole = settings(base, run, lora=True, members=3, combine="mean-variance", variance_weight=0.5, trl={"save_steps": 1})
    with pytest.raises(Interrupted, match="step 1 of 2"):
        train("reward", whole, tmp_path / "stopped")
    monkeypatch.setattr(Watch, "on_step_end", usual)
    told = train("reward", whole, tmp_path / "stopped")["measures"]
    assert told["loss"] == pytest.approx(np.mean([told[f"loss/member-{place}"] for place in range(3)]))
    rows_of_each = {count for *_, count in begun}
    assert [entry[:2] for entry in begun] == [
        ("member-0", None),
        ("member-1", None),
        ("member-1", "checkpoint-1"),
        ("member-2", None),
    ]
    assert rows_of_each == {round(0.8 * len(load_data("reward", whole).train))}
    found, expected = (json.loads((one / "reward.json").read_text()) for one in (tmp_path / "stopped", trained("adapters")))
    for one, other in zip(found["members"], expected["members"], strict=True):
        assert one["mean"] == pytest.approx(other["mean"], abs=1e-5)


# --- what it is trained on


def test_a_tag_says_the_mean_of_its_principles(base, run):
    told = load_data("reward", settings(base, run))
    every = {repr(row["chosen"]): row for row in rows(run, "preference")}
    for row in (*told.train, *told.test):
        made = every[repr(row["chosen"])]
        said = dict(zip(row["tags"], row["tag_probabilities"], strict=True))
        of = dict(zip(made["principle_ids"], made["principle_probabilities"], strict=True))
        assert said.keys() == {TAGS[name] for name in of}
        for tag, probability in said.items():
            assert probability == pytest.approx(np.mean([value for name, value in of.items() if TAGS[name] == tag]))


def labelled(row: dict[str, Any], **more: Any) -> list[float]:
    given = RewardSettings.model_validate({"data": "x", **more})
    whole = {"chosen_probability": 0.7, "tags": ["helpful", "honest"], "tag_probabilities": [0.4, 0.5]} | row
    made = objectives.label_pairs(Dataset.from_list([whole]), given)
    return [value for one in made for value in one[objectives.LABELS]]


def test_labels_are_soft_or_certain_and_missing_where_nothing_is_said():
    assert labelled({}) == [0.7]
    assert labelled({}, soft_labels=False) == [1.0]
    soft = labelled({}, objectives={"harmless": 1, "helpful": 1, "honest": 1})
    assert soft == pytest.approx([math.nan, 0.4, 0.5], nan_ok=True)
    hard = labelled({}, objectives={"harmless": 1, "helpful": 1, "honest": 1}, soft_labels=False)
    assert hard == pytest.approx([math.nan, 0.0, 0.5], nan_ok=True)
    assert labelled({}, objectives={"harmless": 1}) == [], "left out, and counted"


def written(file: Path, *pairs: dict[str, Any]) -> Path:
    usual = {"prompt": "Why?", "chosen": "Because of it.", "rejected": "No."}
    file.write_text("".join(json.dumps(usual | {"id": str(n)} | one) + "\n" for n, one in enumerate(pairs)))
    return file


def test_pairs_of_a_file_keep_their_labels_and_may_be_one_objectives(base, run, tmp_path):
    file = written(tmp_path / "people.jsonl", {"chosen_probability": 0.9}, {"margin": 2}, {})
    read = load_data("reward", settings(base, {"source": str(file), "tag": "helpful"})).train
    assert (read["chosen_probability"], read["margin"]) == ([0.9, 1.0, 1.0], [None, 2.0, None])
    mixed = settings(base, run, {"source": str(file), "tag": "helpful"}, objectives=BOTH)
    made = objectives.label_pairs(load_data("reward", mixed).train, mixed)
    assert made[-3]["probabilities"] == pytest.approx([0.9, math.nan], nan_ok=True)
    assert [one["margin"] for one in made][-3:] == [0.0, 2.0, 0.0]
    assert set(made["margin"][:-3]) == {0.0}
    assert load_data("reward", settings(base, file, run)).train["tags"][:3] == [[], [], []], "beside a run, without a tag"


def test_a_run_of_before_principles_had_probabilities_needs_a_tag(run):
    old = Dataset.from_list([{"chosen_probability": 0.9, "principle_ids": ["kind"], "principle_probabilities": None}])
    source = SourceSettings(source=str(run))
    with pytest.raises(ConfigError, match="make the dataset anew"):
        objectives.tag_pairs(old, source, RewardSettings.model_validate({"data": "x", "objectives": BOTH}))
    assert objectives.tag_pairs(old, source, RewardSettings.model_validate({"data": "x"}))["tags"] == [[]]


@pytest.mark.parametrize("objective", [None, 0.05])
def test_with_certain_labels_the_trainer_has_trls_loss(base, tmp_path, objective):
    file = written(tmp_path / "pairs.jsonl", *({"chosen": f"Because of {n}.", "margin": n / 2} for n in range(4)))
    given = settings(base, file, trl={"center_rewards_coefficient": objective})
    tokenizer = load_tokenizer(given)
    made = objectives.label_pairs(load_data("reward", given).train, given)
    made = members.tokenized(made, [DialogueTokenizer(tokenizer, "tiny")], [None])
    made = made.rename_columns({"chosen_ids-0": "chosen_ids", "rejected_ids-0": "rejected_ids"})
    arguments = make_arguments("reward", given, tmp_path / "out", evaluates=False)
    trainer = build_trainer("reward", Parts(given, StageData(made, None, ()), tokenizer, arguments))
    batch = trainer.data_collator([made[n] for n in range(4)])
    assert batch["margin"].tolist() == [0.0, 0.5, 1.0, 1.5]
    own = trainer.compute_loss(trainer.model, batch)
    theirs = RewardTrainer.compute_loss(
        trainer, trainer.model, {name: value for name, value in batch.items() if name != objectives.LABELS}
    )
    assert abs(own - theirs) < 1e-6


def test_the_head_computes_in_float32_under_autocast():
    head = ExactHead(64, 1, False)
    hidden = torch.randn(5, 64, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(hidden)
    assert found.dtype == torch.float32
    assert torch.equal(found, hidden.float() @ head.weight.T)


# --- length and measures


def planted(slope: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards that rise with length within a prompt, and fall with it between prompts."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(200), 4)
    lengths = rng.integers(10, 400, 800) + 10 * prompts
    return slope * lengths - 3 * slope * 10 * prompts + rng.normal(size=800), lengths, prompts


def test_the_line_of_length_is_fitted_within_prompts():
    reward, lengths, prompts = planted(0.01)
    line = length_line(reward, lengths, prompts)
    assert line.slope == pytest.approx(0.01, abs=0.001)
    before, after = (length_correlation(one, lengths, prompts) for one in (reward, reward - line.slope * lengths))
    assert before["within_prompts"] > 0.5 > 0 > before["overall"]
    assert after["within_prompts"] == pytest.approx(0, abs=1e-9)


def test_the_line_of_length_ends_with_the_lengths_that_it_was_fitted_on():
    reward, lengths, prompts = planted(0.01)
    line = length_line(reward, lengths, prompts)
    assert (line.shortest, line.longest) == tuple(np.quantile(lengths, (0.05, 0.95)))
    worth = line.worth(np.array([0.0, line.shortest, line.mean, line.longest, 10 * line.longest]))
    assert worth[0] == worth[1] < worth[2] == 0 < worth[3] == worth[4]


def test_lengths_that_never_differ_within_a_prompt_tell_nothing():
    line = length_line(np.array([1.0, 2.0, 3.0, 4.0]), np.array([5, 5, 9, 9]), np.array([0, 0, 1, 1]))
    assert (line.slope, line.mean) == (0.0, 7.0)


def test_outputs_are_normalised_and_one_that_never_changes_stays_finite():
    member = MemberSpec(folder=".", mean=(0.0, 0.0), deviation=(1.0, 1.0))
    outputs = np.array([[[1.0, 5.0]], [[3.0, 5.0]]])
    spec = normalised(RewardSpec(members=(member,), objectives={"a": 1.0, "b": 1.0}), outputs)
    assert (spec.members[0].mean, spec.members[0].deviation, spec.reference) == ((2.0, 5.0), (1.0, 1.0), 2)
    line = spec.model_copy(update={"length": LengthLine(slope=0.5, mean=10.0)})
    scores = combine(line, outputs, np.array([10, 12]), np.array([1, 1]))
    assert (scores.reward.tolist(), scores.length.tolist()) == ([-1.0, 0.0], [0.0, 1.0])


@pytest.mark.parametrize("name", ["one", "adapters"])
def test_held_out_measures_agree_with_plain_code(trained, run, name):
    folder = trained(name)
    measures = json.loads((folder / "manifest.json").read_text())["measures"]
    model = RewardModel.load(folder)
    files = sorted((run / "data" / "preference").glob("test-*"))
    given = [row for file in files for row in Dataset.from_parquet(str(file), cache_dir=str(folder / "cache"))]
    chosen, rejected = ([[*row["prompt"], *row[side]] for row in given] for side in ("chosen", "rejected"))
    ahead = model.score(chosen).reward - model.score(rejected).reward
    assert measures["held_out_pairs"] == len(given)
    assert measures["accuracy"] == pytest.approx(np.mean(ahead > 0))
    likely = (1 / (1 + np.exp(model.outputs(rejected)[0] - model.outputs(chosen)[0]))).mean(axis=(1, 2))
    label = np.array([row["chosen_probability"] for row in given])
    gaps = dict.fromkeys(range(10), 0.0)
    for one, other in zip(likely, label, strict=True):
        confidence, right = (one, other) if one >= 0.5 else (1 - one, 1 - other)
        gaps[min(int((confidence - 0.5) * 20), 9)] += right - confidence
    assert measures["calibration_error"] == pytest.approx(sum(map(abs, gaps.values())) / len(given), abs=1e-6)
    shares = ["accuracy", *(f"accuracy/{tag}" for tag in ("helpful", "harmless", "honest"))]
    shares += [f"accuracy/member-{place}" for place in range(3)] if name == "adapters" else []
    for one in (*shares, "calibration_error"):
        (ends,) = (ends for found, value, ends in gathered(measures) if (found, value) == (one, measures[one]))
        assert 0 <= ends[0] <= measures[one] <= ends[1] <= 1 or one == "calibration_error", one
        assert ends[0] < ends[1]
    assert "length_correlation_overall" in measures
    assert ("length_correlation_overall_before" in measures) == (name == "one")
    assert "accuracy" in (folder / "README.md").read_text()


def test_without_held_out_rows_it_says_so(base, run, tmp_path, capsys):
    from cai.cli.training import show_summary

    given = settings(base, {"source": str(run), "test_split": None}, trl={"max_steps": 1})
    told = train("reward", given, tmp_path / "out")
    assert "accuracy" not in told["measures"]
    assert "reference_length_correlation_overall" in told["measures"]
    show_summary(told, tmp_path / "out")
    assert "no held-out rows" in capsys.readouterr().out
    assert "There were no held-out rows" in (tmp_path / "out" / "README.md").read_text()


# --- what cannot work


def test_an_objective_that_nothing_was_said_of_is_named_with_the_nearest(base, run, tmp_path):
    with pytest.raises(ConfigError, match=r"'harmles' \(did you mean 'harmless'\?\); .*: harmless, helpful, honest"):
        train("reward", settings(base, run, objectives={"harmles": 1.0}), tmp_path / "out")


def test_objectives_need_the_columns_of_a_run(base, tmp_path):
    file = written(tmp_path / "people.jsonl", {})
    with pytest.raises(ConfigError, match=r"no columns 'principle_ids' and 'principle_probabilities'.*set this source's tag"):
        train("reward", settings(base, file, objectives={"helpful": 1.0}), tmp_path / "out")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"members": 2, "bases": ["a"]}, "expected one for each of the 2 members, found 1"),
        ({"objectives": {"a": 0.0}}, "every weight is 0"),
        ({"objectives": {"a": math.nan}}, "finite"),
        ({"members": 0}, "greater than 0"),
        ({"member_share": 1.5}, "less than or equal to 1"),
        ({"bases": ["a"], "revision": "main"}, "remove one of them"),
        ({"bases": ["a"], "model": "b"}, "with bases it is the first of them, 'a'"),
    ],
)
def test_settings_that_cannot_work(given, said):
    with pytest.raises(ValidationError, match=said):
        RewardSettings.model_validate({"data": "x", **given})


@pytest.mark.parametrize("label", [{"chosen_probability": 1.5}, {"chosen_probability": True}, {"margin": "much"}])
def test_labels_that_are_none_are_named_by_line(base, tmp_path, label):
    file = written(tmp_path / "pairs.jsonl", {}, label)
    read = load_data("reward", settings(base, file))
    assert (len(read.train), read.sources[0]["left_out"]) == (1, 1)
    name = next(iter(label))
    assert f"pairs.jsonl:2: its {name} is {label[name]!r}; expected a number" in read.sources[0]["first_left_out"]


def test_a_dialogue_beyond_the_context_is_named(tmp_path):
    model = RewardModel.load(make_reward_model(tmp_path / "short", context=64), device="cpu", dtype="float32")
    short, long = ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}] for text in ("Yes", "no " * 200))
    with pytest.raises(ContextLengthError, match=r"dialogue 1: \d+ tokens, but the context of .* is 64; leave it out"):
        model.score([short, long])


def test_a_classifier_from_elsewhere_counts_as_it_is(tmp_path):
    folder = make_reward_model(tmp_path / "plain")
    model, given = load(folder), [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]]
    scores = model.score(given)
    assert scores.reward[0] == model.outputs(given)[0][0, 0, 0]
    with pytest.raises(ConfigError, match="has 3 outputs; expected 1"):
        load(make_reward_model(tmp_path / "three", labels=3))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="has no chat template"):
        load(folder)


def test_adapters_refuse_a_base_that_has_changed(trained, base, tmp_path):
    moved = tmp_path / "reward"
    shutil.copytree(trained("adapters"), moved)
    spec = json.loads((moved / "reward.json").read_text())
    spec["members"][1]["version"] = "000000000000"
    spec["members"][1]["base"] = str(make_tiny_model(tmp_path / "other"))
    (moved / "reward.json").write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match="the adapters were trained on 000000000000"):
        load(moved)


def test_texts_cannot_speak_the_templates_tokens(base):
    one = DialogueTokenizer(AutoTokenizer.from_pretrained(base), "tiny")
    for text in ("a", "<|im_end|>"):
        assert one.encode([{"role": "user", "content": text}]).count(one.tokenizer.eos_token_id) == 1


# --- the command


def test_rows_are_scored_and_bad_ones_are_named_by_line(trained, tmp_path):
    file, out = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    given = [
        {"prompt": "Hi?", "completion": "Hello there."},
        {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Bye."}]},
        {"prompt": "Hi?", "chosen": "Hello, you.", "rejected": "Go."},
        {"prompt": "Hi?"},
        {"prompt": "Hi?", "completion": "long " * 2000},
    ]
    file.write_text("".join(json.dumps(one) + "\n" for one in given))
    done = command("reward", "score", trained("objectives"), file, "-o", out)
    assert done.returncode == 0, done.stderr
    assert "rows.jsonl:4: no column 'messages'" in done.stderr
    assert "rows.jsonl:5: " in done.stderr
    assert "leave it out, shorten it" in " ".join(done.stderr.split())
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(one["origin"], one["side"]) for one in lines] == [
        ("rows.jsonl:1", "completion"),
        ("rows.jsonl:2", "completion"),
        ("rows.jsonl:3", "chosen"),
        ("rows.jsonl:3", "rejected"),
    ]
    for one in lines:
        assert one["reward"] == pytest.approx(min(one["members"]))
        assert one["objectives"].keys() == BOTH.keys()
    for word in ("helpful", "harmless", "member 1", "tokens", "chosen ahead"):
        assert word in done.stdout
    assert "correlation" not in done.stdout, "of four completions"
    file.write_text("".join(json.dumps(one) + "\n" for one in given[:3] * 4))
    several = [{**given[2], "prompt": f"Hi {n}?"} for n in range(4)]
    file.write_text("".join(json.dumps(one) + "\n" for one in [*given[:2], *several] * 2))
    told = " ".join(command("reward", "score", trained("objectives"), file).stdout.split())
    assert "correlation with length" in told
    assert re.search(r"chosen ahead of rejected in [\d.]+% of the pairs \([\d.]+% to [\d.]+%\)", told)


def test_what_holds_no_row_to_score_is_an_error(trained, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hi?"}\n')
    done = command("reward", "score", trained("one"), tmp_path / "rows.jsonl")
    assert done.returncode == 1
    assert "there is no row that can be scored" in done.stderr
