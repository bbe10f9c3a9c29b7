"""What goes wrong where completions are rewarded: each a clear error, and early where it can be seen early."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cai.errors import CapabilityError, ConfigError, EngineError
from cai.rewards.model import RewardModel
from cai.training import arguments
from cai.training.arguments import make_arguments, room_for_prompts
from cai.training.failing import refusals
from cai.training.online.rewards import ModelReward, Reward, check_function, find_function
from cai.training.running import train
from tests import runs
from tests.stages import Shown, resolve_settings, write_rows
from tests.test_online import CHECKED, HERE, settings
from tests.test_reward_model import make_reward_model
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")
BAD = """\
def raises(completions, **columns):
    raise KeyError("score")
def not_a_number(completions, **columns):
    return [1.0] * (len(completions) - 1) + [float("nan")]
def too_few(completions, **columns):
    return [1.0]
def no_list(completions, **columns):
    return None
def words(completions, **columns):
    return ["good"] * len(completions)
def mapping(completions, **columns):
    return {place: 0.5 for place in range(len(completions))}
def numerals(completions, **columns):
    return "1" * len(completions)
def too_large(completions, **columns):
    return [10**400] * len(completions)
def texts(completions, **columns):
    return ["1.5"] * len(completions)
def matrix(completions, **columns):
    import numpy
    return numpy.arange(8.0).reshape(4, 2)
def loud(completions, log_metric, **columns):
    log_metric("loss", "high")
def broken_off(completions, **columns):
    yield 1.0
    raise KeyError("score")
class Mute(Exception):
    def __str__(self):
        raise ValueError("no words")
def mute(completions, **columns):
    raise Mute
async def awaited(completions, **columns):
    import asyncio
    await asyncio.sleep(0)
    raise KeyError("score")
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), context=256)


@pytest.fixture
def rows(tmp_path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", [{"prompt": f"What is {number}?"} for number in range(8)])


@pytest.fixture
def functions(tmp_path) -> Path:
    (tmp_path / "fun.py").write_text(BAD)
    return tmp_path / "fun.py"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"^reward 'raises' raised KeyError: 'score' \(fun.py:2\)$"),
        ("not_a_number", r"reward 'not_a_number' is nan for the completion '.*'; return None where there is no reward"),
        ("too_few", "reward 'too_few' returned 1 numbers, and there are 4 completions"),
        ("no_list", "reward 'no_list' returned None; expected a list with a number for each completion"),
        ("words", r"reward 'words' returned \['good', .*; expected a list with a number for each"),
        ("mapping", "reward 'mapping' returned {0: 0.5, 1: 0.5, .*; expected a list with a number for each"),
        ("numerals", "reward 'numerals' returned '1111'; expected a list with a number for each"),
        ("texts", r"reward 'texts' returned \['1.5', .*; expected a list with a number for each"),
        ("matrix", r"^reward 'matrix' returned array\(\[\[0., 1.\], .*; expected a list with a number for each"),
        ("loud", "^reward 'loud': log_metric takes a name and a number, found 'loss', 'high'$"),
        ("too_large", r"reward 'too_large' returned \[10000.*; expected a list with a number for each"),
        ("mute", r"^reward 'mute' raised Mute: <exception str\(\) failed> \(fun.py:31\)$"),
        ("broken_off", r"^reward 'broken_off' raised KeyError: 'score' \(fun.py:26\)$"),
        ("awaited", r"^reward 'awaited' raised KeyError: 'score' \(fun.py:35\)$"),
    ],
)
def test_what_a_function_must_not_answer(tiny, rows, functions, tmp_path, name, message):
    with pytest.raises(EngineError, match=message):
        train("ppo", settings("ppo", tiny, rows, reward=f"{functions}:{name}"), tmp_path / "out")


def test_what_a_function_does_to_its_arguments_and_the_process_stays_with_it(tmp_path):
    def careless(prompts: Any, completions: Any, log_metric: Any, trainer_state: Any, **columns: Any) -> list[float]:
        os.chdir(tmp_path)
        torch.set_grad_enabled(False)
        log_metric("seen", 1.0)
        trainer_state.max_steps = 1
        for one in (*prompts, *completions):
            one[-1]["content"] = "hacked"
        prompts.clear()
        return [0.5]

    def honest(completions: Any, **columns: Any) -> list[float]:
        return [float(completions[0][-1]["content"] == "four")]

    before, told = os.getcwd(), []
    prompts, completions = ([[{"role": role, "content": text}]] for role, text in (("user", "2 + 2?"), ("assistant", "four")))
    rewards = [Reward(one.__name__, one, lambda *given: told.append(given)) for one in (careless, honest)]
    state = SimpleNamespace(max_steps=8)
    columns = {"columns": [json.dumps({"log_metric": "of a row", "self": "too"})], "trainer_state": state}
    assert [one(prompts, completions, **columns) for one in rewards] == [[0.5], [1.0]]
    assert (os.getcwd(), torch.is_grad_enabled(), state.max_steps) == (before, True, 8)
    assert [given[1:] for given in told] == [(prompts, ["four"], [0.5]), (prompts, ["four"], [1.0])]


def test_gold_that_raises_is_called_gold_and_its_place_is_in_the_users_file(tiny, rows, tmp_path):
    (tmp_path / "deep.py").write_text(
        "import json\ndef inner():\n    json.loads('')\ndef outer(completions, **columns):\n    inner()\n"
    )
    given = settings("ppo", tiny, rows, gold={"function": f"{tmp_path}/deep.py:outer", "prompts": 2})
    with pytest.raises(EngineError, match=r"^gold 'outer' raised JSONDecodeError: Expecting value.* \(deep.py:3\)$"):
        train("ppo", given, tmp_path / "out")


def test_the_command_tells_it_in_one_line(tiny, rows, functions, tmp_path):
    named = ("train", "ppo", rows, "-m", tiny, "--reward", f"{functions}:raises", "-o", tmp_path / "out")
    done = runs.command(*named, "--set", "trl={max_steps: 1, per_device_train_batch_size: 4, max_completion_length: 4}")
    assert done.returncode == 1
    assert "cai: reward 'raises' raised KeyError: 'score' (fun.py:2)" in done.stderr.splitlines()
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("FUN:raise", r"reward: function '.*fun.py:raise': fun.py has no such function \(did you mean 'raises'\?\)"),
        ("./nowhere.py:brief", r"reward: function './nowhere.py:brief': there is no ./nowhere.py; expected FILE.py:NAME or"),
        ("no.such.module:brief", "reward: function 'no.such.module:brief': there is no no.such.module; expected"),
        ({"function": "brief"}, "reward: function 'brief': there is no file; expected FILE.py:NAME or package.module:NAME"),
        ("BROKEN:brief", "reward: function '.*broken.py:brief': SyntaxError"),
        ("./nowhere", "reward: model './nowhere': there is no such folder"),
        ("TINY", "reward: '.*tiny.*' is a language model, which gives no reward; name a folder of cai train reward, or"),
        ("smollm2-135m", "reward: 'smollm2-135m' is a language model, which gives no reward"),
        ("THREE", "reward: '.*three' has 3 outputs; expected 1, as a reward model has"),
        (["FUN:raises", "THREE"], r"reward\[1\]: '.*three' has 3 outputs"),
        ("harmless", "reward: constitution 'harmless' has no principle with a check; add one, or name a judge beside it"),
        ("nowhere.yaml", "reward: no constitution 'nowhere.yaml': neither a file nor a built-in name"),
        (
            {"constitution": "harmless", "judge": {"method": "score", "model": "./nowhere"}},
            "reward: model './nowhere': there is no such folder",
        ),
        (
            {"constitution": "harmless", "judge": {"method": "score", "model": "THREE"}},
            "reward: model '.*three' is a reward model",
        ),
    ],
)
def test_what_rewards_nothing_is_told_before_anything_is_read(tiny, functions, tmp_path, reward, message):
    (tmp_path / "broken.py").write_text("def brief(:\n")
    make_reward_model(tmp_path / "three", labels=3)
    places = {"FUN": functions, "BROKEN": tmp_path / "broken.py", "TINY": tiny, "THREE": tmp_path / "three"}
    text = json.dumps(reward)
    for name, place in places.items():
        text = text.replace(name, str(place))
    with pytest.raises(ConfigError, match=message):
        train("rloo", settings("rloo", tiny, tmp_path / "not there.jsonl", reward=json.loads(text)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_function_is_told_as_it_is_and_errors_of_several_lines_as_one(tiny, rows, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("level = 3\ndef late(completions, **columns):\n    raise ValueError('late\\n  failure')\n")
    with pytest.raises(ConfigError, match=r"mine\.py:level': level is 3, and no function$"):
        find_function(f"{file}:level")
    with pytest.raises(EngineError, match=r"^reward 'late' raised ValueError: late failure \(mine\.py:3\)$"):
        train("ppo", settings("ppo", tiny, rows, reward=f"{file}:late"), tmp_path / "out")


def test_a_check_runs_no_code_of_a_function(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("if True:\n    1 / 0\n    def brief(completions): ...\n    alias, other = brief, 1\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("1 / 0\n")
    (tmp_path / "package" / "module.py").write_text("from elsewhere import brief\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for target in (f"{tmp_path}/own.py:brief", f"{tmp_path}/own.py:alias", "package.module:brief"):
        check_function(target)
        with pytest.raises(ConfigError, match=r"^function '.*': ZeroDivisionError: division by zero$"):
            find_function(target)
    for target in ("package.module:brie", f"{tmp_path}/own.py:brie"):
        with pytest.raises(ConfigError, match=r"has no such function \(did you mean 'brief'\?\)$"):
            check_function(target)
    assert "package" not in sys.modules


def test_a_function_may_import_what_lies_beside_its_file(tmp_path):
    (tmp_path / "beside_it.py").write_text("NUMBER = 3.0\n")
    (tmp_path / "own.py").write_text("from beside_it import NUMBER\ndef flat(completions):\n    return [NUMBER]\n")
    before = list(sys.path)
    assert find_function(f"{tmp_path}/own.py:flat")([]) == [3.0]
    assert sys.path == before


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"reward": []}, "at least 1 item"),
        ({"reward": {"weight": 2}}, "expected exactly one of model, constitution, function, found none"),
        ({"reward": {"model": "a", "function": "b:c"}}, "found model and function"),
        ({"reward": {"model": "a", "judge": {"method": "checks"}}}, "judge: judges by a constitution; name one beside it"),
        ({"reward": {"constitution": "harmless", "judge": {"model": "m"}}}, "judge.method: 'choice' compares completions"),
        ({"reward": {"constitution": "harmless", "judge": {"method": "score"}}}, "judge.model: a model is needed that judges"),
        (
            {"reward": {"constitution": "harmless", "judge": {"method": "score", "model": "m", "samples": 3}}},
            "judge.samples: says nothing of one completion",
        ),
        ({"reward": "a/b", "gold": {"model": "c", "weight": -1}}, "gold.weight\n.*not permitted"),
        ({"reward": "a/b", "gold": "a/b"}, "gold: this is trained on as a reward; an honest measure is one that is not"),
    ],
)
def test_what_a_source_cannot_be(tiny, rows, keys, message):
    with pytest.raises(ValidationError, match=message):
        settings("ppo", tiny, rows, **keys)


def test_a_gold_measure_that_is_a_reward_under_another_name(tiny, rows, tmp_path):
    make_reward_model(tmp_path / "model")
    (tmp_path / "again").symlink_to(tmp_path / "model")
    given = settings("ppo", tiny, rows, reward=str(tmp_path / "model"), gold=f"{tmp_path}/./model")
    with pytest.raises(ConfigError, match="gold: this is trained on as a reward"):
        train("ppo", given, tmp_path / "out")


def test_a_reward_is_asked_for_by_its_flag(tmp_path):
    with pytest.raises(ConfigError, match="no reward: name one, for example: cai train grpo benign --reward models/reward"):
        resolve_settings("grpo", None, [], {"data": ["benign"]})
    done = runs.command("train", "ppo", "benign", "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "no reward: name one" in done.stderr
    assert "--reward" in runs.command("train", "ppo", "--help").stdout
    assert "--reward" not in runs.command("train", "sft", "--help").stdout


def test_what_a_flag_rewards_by_follows_from_what_it_is():
    flags = ["models/reward", "owner/name", "rewards.py:brief", "package.module:polite", "harmless", "mine/own.yaml"]
    given = resolve_settings("ppo", None, [], {"data": ["benign"], "reward": flags})
    named = [one.model_dump(exclude_defaults=True) for one in given.reward]
    kinds = ["model", "model", "function", "function", "constitution", "constitution"]
    assert named == [{kind: flag} for kind, flag in zip(kinds, flags, strict=True)]


def test_a_judge_that_cannot_answer_so_is_refused(tiny, rows, tmp_path):
    from cai.engines import ScriptedEngine
    from cai.training.online import rewards

    class Writing(ScriptedEngine):
        capabilities = frozenset({"generate"})

    judge = {"method": "score", "model": f"scripted:{HERE}:ten_choices"}
    given = settings("ppo", tiny, rows, reward={"constitution": "harmless", "judge": judge})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, "build_engine", lambda *_, **__: Writing(lambda request: "text"))
        with pytest.raises(CapabilityError, match=r"reward: judge.method: score needs choice_logprobs, which scripted:"):
            train("ppo", given, tmp_path / "out")


def test_a_language_model_is_no_reward_model_whatever_its_config_says(tiny, tmp_path):
    for name in ("plain", "lying"):
        make_tiny_model(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["architectures"] = None if name == "plain" else ["LlamaForSequenceClassification"]
        config["num_labels"] = 1
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match=f"'.*{name}' is a language model, which gives no reward"):
            RewardModel.load(tmp_path / name)
    make_reward_model(tmp_path / "two", labels=2)
    with pytest.raises(ConfigError, match="has 2 outputs; expected 1"):
        RewardModel.load(tmp_path / "two")


def swap_tokens(folder: Path) -> None:
    """Let the tokenizer's first two letters stand for one another."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_what_a_critic_cannot_begin_with(tiny, rows, tmp_path):
    make_reward_model(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"critic: '.*' is a language model"):
        train("ppo", settings("ppo", tiny, rows, critic=str(tiny)), tmp_path / "language")
    head = settings("ppo", tiny, rows, critic=str(tmp_path / "model"), trl={"value_function": "head"})
    with pytest.raises(ConfigError, match=r"critic: with trl.value_function: head there is none; remove one of them"):
        train("ppo", head, tmp_path / "head")
    swap_tokens(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"critic: '.*' has another tokenizer than the policy, whose tokens it would read"):
        train("ppo", settings("ppo", tiny, rows, critic=str(tmp_path / "model")), tmp_path / "out")


def test_a_critic_begins_with_a_reward_model_that_reads_the_policys_tokens(tiny, rows, tmp_path, monkeypatch):
    from cai.training import running

    built: list[Any] = []
    build = running.build_trainer
    monkeypatch.setattr(running, "build_trainer", lambda *given: built.append(build(*given)) or built[-1])
    make_reward_model(tmp_path / "same")
    for name, started in (("same", True), ("other", False)):
        if name == "other":
            swap_tokens(make_reward_model(tmp_path / "other"))
        train("ppo", settings("ppo", tiny, rows, reward=str(tmp_path / name), trl={"max_steps": 1}), tmp_path / f"out-{name}")
        assert (built[-1].critic_note is None) is started


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"answer": "a"}, {"answer": "b"}], "none of its 2 rows is a prompt; the first, bad.jsonl:1: no prompt; columns here"),
        ([{"prompt": ""}], "its only row is not a prompt; the first, bad.jsonl:1: 'prompt' is empty"),
        ([{"prompt": "long " * 500}] * 3, "all 3 prompts are longer than the 250 tokens that completions leave of the model's"),
    ],
)
def test_rows_that_are_no_prompts(tiny, tmp_path, rows, message):
    file = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ConfigError, match=message):
        train("ppo", settings("ppo", tiny, file), tmp_path / "out")


@pytest.mark.parametrize(
    ("stage", "trl", "gold", "message"),
    [
        (
            "ppo",
            {"gradient_accumulation_steps": 3},
            None,
            r"data: 8 prompts are left to train on, and a rollout takes 12 \(trl.per_device_train_batch_size 4 x "
            r"trl.gradient_accumulation_steps 3\): add prompts, or lower trl.per_device_train_batch_size$",
        ),
        (
            "rloo",
            {"steps_per_generation": 6, "max_steps": -1},
            None,
            r"8 prompts are left to train on, and a rollout takes 12 \(trl.per_device_train_batch_size 4 x "
            r"trl.steps_per_generation 6, divided by trl.num_generations 2\)",
        ),
        (
            "grpo",
            {"generation_batch_size": 32, "num_generations": 2},
            None,
            r"and a rollout takes 16 \(trl.generation_batch_size 32, divided by trl.num_generations 2\): add prompts, or lower "
            "trl.generation_batch_size$",
        ),
        ("ppo", {"per_device_train_batch_size": 8}, "counted", r"data: 7 prompts are left to train on, and a rollout takes 8 "),
    ],
)
def test_fewer_prompts_than_a_rollout_takes(tiny, rows, tmp_path, monkeypatch, stage, trl, gold, message):
    from cai.training.online import building

    monkeypatch.setattr(building, "load_policy", lambda given: pytest.fail("a model was loaded"))
    keys = {"gold": {"function": f"{HERE}:{gold}"}} if gold else {}
    with pytest.raises(ConfigError, match=message):
        train(stage, settings(stage, tiny, rows, trl=trl, **keys), tmp_path / "out")


@pytest.mark.parametrize(("stage", "trl"), [("ppo", {}), ("rloo", {"gradient_accumulation_steps": 4}), ("online-dpo", {})])
def test_as_many_prompts_as_a_rollout_takes_train(tiny, tmp_path, stage, trl):
    count = {"ppo": 4, "rloo": 8, "online-dpo": 1}[stage]
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"What is {number}?"} for number in range(count)])
    assert train(stage, settings(stage, tiny, rows, trl={**trl, "max_steps": 1}), tmp_path / "out")["steps"] == 1


def test_a_prompt_that_leaves_no_room_for_its_completion_is_left_out_and_counted(tiny, tmp_path):
    from cai.training.lengths import row_lengths
    from cai.training.loading import load_tokenizer

    def prompt(words: int) -> dict[str, Any]:
        return {"prompt": [{"role": "user", "content": "a" + " a" * words}]}

    tokenizer = load_tokenizer(settings("ppo", tiny, "x"))
    lengths = {row_lengths(prompt(words), tokenizer)[0]: words for words in range(250)}
    ids = tokenizer.apply_chat_template(prompt(3)["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert lengths[len(ids["input_ids"])] == 3
    limit = max(one for one in lengths if one <= 250)
    above = min(one for one in lengths if one > 250)
    rows = [prompt(lengths[limit]), prompt(lengths[above]), prompt(1), prompt(2), prompt(3)]
    manifest = train("ppo", settings("ppo", tiny, write_rows(tmp_path / "rows.jsonl", rows)), tmp_path / "out")
    assert manifest["too_long"] == {"train": 1}


def test_prompts_are_limited_by_the_shortest_context_of_all_reward_models_too(tiny, tmp_path):
    make_reward_model(tmp_path / "short", context=80)
    rows = [*({"prompt": one} for one in "abde"), {"prompt": "c " * 80}]
    given = settings("ppo", tiny, write_rows(tmp_path / "rows.jsonl", rows), reward=str(tmp_path / "short"))
    assert train("ppo", given, tmp_path / "out")["too_long"] == {"train": 1}


@pytest.mark.parametrize(
    ("given", "context", "room"),
    [
        ({"use_vllm": True, "vllm_max_model_length": 128}, 256, 122),
        ({"use_vllm": True, "vllm_max_model_length": 512}, 256, 250),
        ({"use_vllm": True, "vllm_max_model_length": 128}, None, 122),
        ({"use_vllm": True, "vllm_max_model_length": -1}, 256, 250),
        ({"use_vllm": True}, 256, 250),
        ({"vllm_max_model_length": 128}, 256, 250),
    ],
)
@pytest.mark.parametrize("stage", ["ppo", "rloo", "grpo"])
def test_prompts_are_limited_by_the_context_that_vllm_is_given(tiny, rows, tmp_path, monkeypatch, stage, given, context, room):
    monkeypatch.setattr(arguments, "find_spec", lambda name: name)
    one = settings(stage, tiny, rows, trl=given)
    assert room_for_prompts(one, make_arguments(stage, one, tmp_path), context) == room


@pytest.mark.parametrize(("given", "room"), [({}, 58), ({"max_length": 48}, 42), ({"max_length": 512}, 58)])
def test_online_dpo_is_given_no_prompt_that_it_would_cut(tiny, rows, tmp_path, given, room):
    one = settings("online-dpo", tiny, rows, trl=given)
    assert room_for_prompts(one, make_arguments("online-dpo", one, tmp_path), 64) == room


def test_a_completion_that_takes_all_that_vllm_is_given(tiny, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "find_spec", lambda name: name)
    one = settings("ppo", tiny, rows, trl={"use_vllm": True, "vllm_max_model_length": 6})
    with pytest.raises(ConfigError, match=r"completions of 6 tokens leave no room .* of 6 \(.*vllm_max_model_length\)"):
        room_for_prompts(one, make_arguments("ppo", one, tmp_path), 256)


def test_a_completion_that_a_reward_model_cannot_read_has_no_reward_and_is_counted(tmp_path):
    make_reward_model(tmp_path / "model")
    model = RewardModel.load(tmp_path / "model", device="cpu", dtype="float32")
    limit = model.members[0].network.config.max_position_embeddings
    prompts = [[{"role": "user", "content": "Why?"}]] * 3
    turns = [[{"role": "assistant", "content": text}] for text in ("Because.", "word " * limit, "No.")]
    told: dict[str, float] = {}
    rewards = Reward("model", ModelReward(model))(prompts, turns, log_metric=told.__setitem__)
    assert [one is None for one in rewards] == [False, True, False]
    assert rewards[2] == pytest.approx(model.score([[*prompts[2], *turns[2]]]).reward[0])
    assert told["rewards/model/none"] == pytest.approx(1 / 3)
    assert ModelReward(model)(prompts[:1], turns[1:2]) == [None]


@pytest.mark.parametrize(
    ("stage", "trl", "message"),
    [
        ("online-dpo", {"max_completion_length": 9}, r"OnlineDPOConfig has no such key \(did you mean 'max_new_tokens'\?\)"),
        ("ppo", {"max_completion_length": 256}, "trl: completions of 256 tokens leave no room for prompts in a context of 256"),
        ("online-dpo", {"max_new_tokens": 300}, "trl: completions of 300 tokens leave no room for prompts"),
        ("grpo", {"num_generations": 8}, r"trl: GRPOConfig refuses these values: generation_batch_size \(4\) must be div"),
        ("rloo", {"num_generations": 8}, r"trl: RLOOConfig refuses these values: generation_batch_size \(4\) must be div"),
        (
            "rloo",
            {"per_device_train_batch_size": 1},
            r"\(1\) must be divisible by num_generations \(2\)\. Make trl.per_device_train_batch_size a multiple of "
            "trl.num_generations$",
        ),
        (
            "grpo",
            {"generation_batch_size": 4, "num_generations": 3},
            r"\(3\)\. Make trl.generation_batch_size a multiple of trl.num_generations$",
        ),
        ("ppo", {"max_completion_length": None}, "trl.max_completion_length: expected a whole number, found None"),
        ("ppo", {"lam": 2}, "trl: PPOConfig refuses these values: lam: expected a number from 0 to 1, found 2"),
        ("ppo", {"value_learning_rate": -1.0}, "value_learning_rate: expected a number from 0 on, found -1.0"),
        ("ppo", {"temperature": 0.0}, "trl.temperature: expected a number above 0, found 0.0"),
        ("ppo", {"max_steps": 0}, "trl.max_steps: expected 1 or more, or -1 for whole epochs, found 0"),
        ("ppo", {"num_train_epochs": 0}, "trl.num_train_epochs: expected a number above 0, found 0"),
        ("ppo", {"generation_kwargs": {"num_return_sequences": 2}}, "trl.generation_kwargs: num_return_sequences changes what"),
        (
            "grpo",
            {"generation_kwargs": {"return_dict_in_generate": True}},
            "generation_kwargs: return_dict_in_generate changes",
        ),
        ("ppo", {"generation_batch_size": 0}, "trl.generation_batch_size: expected a number from 1 on, found 0"),
        ("ppo", {"missing_eos_penalty": float("inf")}, "trl.missing_eos_penalty: expected a finite number, found inf"),
        ("grpo", {"top_entropy_quantile": 5.0}, "trl.top_entropy_quantile: expected a number up to 1, found 5.0"),
        ("grpo", {"top_p": 2.0}, "trl.top_p: expected a number up to 1, found 2.0"),
        ("online-dpo", {"beta": [0.1, -1]}, "trl.beta: expected a number from 0 on, found -1"),
        ("grpo", {"reward_weights": [1.0]}, "trl.reward_weights: follows from reward: each has its weight; remove it"),
        ("rloo", {"sync_ref_model": True}, "trl.sync_ref_model: checkpoints do not hold a reference that moves, so that a"),
    ],
)
def test_values_that_do_not_go_together(tiny, rows, tmp_path, stage, trl, message):
    with pytest.raises(ConfigError, match=message):
        train(stage, settings(stage, tiny, rows, trl=trl), tmp_path / "out")


def test_a_vllm_server_that_does_not_answer(tiny, rows, tmp_path):
    pytest.importorskip("vllm")
    server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_timeout": 0.1, "vllm_server_base_url": "http://127.0.0.1:9"}
    with pytest.raises(EngineError, match=r"no vLLM server answers at http://127.0.0.1:9: start one \(.*vllm serve MODEL"):
        train("ppo", settings("ppo", tiny, rows, trl=server), tmp_path / "out", show=(shown := Shown()))
    assert any("waiting for the vLLM server at http://127.0.0.1:9 (at most 0.1 s, trl.vllm_s" in one for one in shown.notes)


def test_online_dpo_has_no_vllm_in_its_process_on_a_cpu(tiny, rows, tmp_path):
    pytest.importorskip("vllm")
    with pytest.raises(ConfigError, match=r"trl.use_vllm: online-dpo cannot have vLLM in its process on a CPU"):
        make_arguments("online-dpo", settings("online-dpo", tiny, rows, trl={"use_vllm": True}), tmp_path)


def test_a_vllm_server_cannot_be_sent_weights_from_a_cpu(monkeypatch):
    """In TRL's own words, which the advice is found by."""
    pytest.importorskip("vllm")
    from trl.generation.vllm_client import VLLMClient

    client = object.__new__(VLLMClient)
    client.base_url, client.group_port = "http://127.0.0.1:9", 9
    monkeypatch.setattr(VLLMClient, "get_server_info", lambda self: {"weight_transfer_config": {"backend": "nccl"}})
    monkeypatch.setattr(VLLMClient, "get_world_size", lambda self: 1)
    with (
        pytest.raises(ConfigError, match=r"which needs a CUDA device.* Without a GPU set trl.vllm_mode: colocate"),
        refusals("ppo"),
    ):
        client.init_communicator("cpu")


def test_vllm_that_is_not_installed(tiny, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"trl.use_vllm: vllm is not installed: pip install 'cai-toolkit\[vllm\]'"):
        make_arguments("grpo", settings("grpo", tiny, rows, trl={"use_vllm": True}), tmp_path)


_ON_NODE = "Available memory on node 0 (14.07/23.54 GiB) on"


@pytest.mark.parametrize(
    ("told", "advice"),
    [
        (
            f"{_ON_NODE} kv cache allocation is less than requested memory for kv (-0.61/1.18 GiB). Reduce CPU memory used by "
            "other processes.",
            "This is too little memory for vLLM: raise trl.vllm_gpu_memory_utilization",
        ),
        (
            "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine.",
            "This is too little memory for vLLM: raise trl.vllm_gpu_memory_utilization",
        ),
        (
            "To serve at least one request, 2 GiB is needed. Try increasing `gpu_memory_utilization` or decreasing "
            "`max_model_len`.",
            "This is too little memory for vLLM: raise trl.vllm_gpu_memory_utilization, or set a lower "
            "trl.vllm_max_model_length",
        ),
        (
            f"{_ON_NODE} kv cache allocation is less than requested memory for kv (20.59/22.18 GiB).",
            "This is more memory than is free: lower trl.vllm_gpu_memory_utilization",
        ),
        (
            f"{_ON_NODE} startup is less than desired CPU memory utilization (0.9, 21.19 GiB).",
            "This is more memory than is free: lower trl.vllm_gpu_memory_utilization",
        ),
        (
            "Free memory on device cuda:0 (14.07/23.54 GiB) on startup is less than desired GPU memory utilization (0.9, 21.19 "
            "GiB).",
            "This is more memory than is free: lower trl.vllm_gpu_memory_utilization",
        ),
        (
            "Weight synchronization runs on vLLM's NCCL weight-transfer engine, which needs a CUDA device, got 'cpu'.",
            "Without a GPU set trl.vllm_mode: colocate, or leave trl.use_vllm out",
        ),
        ("Something else.", ""),
    ],
)
def test_what_vllm_lacks_names_the_key_that_gives_it(told, advice):
    with pytest.raises(ConfigError) as caught, refusals("ppo"):
        raise ValueError(told)
    assert str(caught.value) == f"trl: the ppo trainer refuses this: {told} {advice}".rstrip()


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (
            "ppo",
            {"trl": {"gradient_checkpointing": False}},
            r"out of memory: lower trl.max_completion_length \(6 here\) or trl.per_device_train_batch_size \(4 here; .*, a "
            r"multiple of trl.num_generations\), or set trl.gradient_checkpointing: true, or set trl.value_function: head, or "
            r"lora: true to train adapters; then",
        ),
        (
            "ppo",
            {"lora": True, "trl": {"value_function": "head", "gradient_checkpointing": True}},
            r"trl.num_generations\); then",
        ),
        (
            "online-dpo",
            {},
            r"out of memory: lower trl.max_new_tokens \(6 here\) or trl.per_device_train_batch_size \(4 .*lora: true",
        ),
    ],
)
def test_out_of_memory_says_what_to_lower(tiny, rows, tmp_path, stage, changes, message):
    def raising(completions: Any, **columns: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    from cai.training.online import rewards

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards.Reward, "__call__", lambda self, prompts, completions, **columns: raising(completions))
        with pytest.raises(EngineError, match=message):
            train(stage, settings(stage, tiny, rows, **changes), tmp_path / "out")


@pytest.mark.parametrize(
    "raised", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError("can't allocate memory: 9 bytes")]
)
def test_out_of_memory_in_a_reward_model_says_what_to_lower_too(tiny, rows, tmp_path, monkeypatch, raised):
    def rewards(self: Any, batch: Any) -> Any:
        raise raised

    make_reward_model(tmp_path / "model")
    monkeypatch.setattr("cai.rewards.model._Member.rewards", rewards)
    with pytest.raises(EngineError, match=r"^out of memory: lower trl.max_completion_length \(6 here\)"):
        train("ppo", settings("ppo", tiny, rows, reward=str(tmp_path / "model")), tmp_path / "out")


def test_out_of_memory_in_a_judge_names_keys_that_are_there(tiny, rows, tmp_path, monkeypatch):
    def score(self: Any, tails: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("cai.engines.local_model.LocalModel.score", score)
    make_tiny_model(tmp_path / "judge", context=4096)
    judged = {"constitution": "concise-and-clear", "judge": {"model": str(tmp_path / "judge"), "method": "score"}}
    with pytest.raises(EngineError, match=r"^out of memory: lower trl.max_completion_length \(6 here\)"):
        train("ppo", settings("ppo", tiny, rows, reward=judged), tmp_path / "out")


def test_a_constitution_with_a_check_needs_no_judge(tiny, rows, tmp_path):
    (tmp_path / "checked.yaml").write_text(CHECKED)
    given = settings("ppo", tiny, rows, reward=str(tmp_path / "checked.yaml"), trl={"max_steps": 1})
    assert 0 <= train("ppo", given, tmp_path / "out")["measures"]["reward"] <= 1
