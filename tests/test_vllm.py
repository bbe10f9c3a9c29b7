"""The vllm engine: started for real, once, on a tiny random model with an adapter, against the transformers engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import pytest_asyncio

from cai.config import ModelConfig, Recipe, VllmConfig
from cai.engines import GenerateRequest, LoglikelihoodRequest, RewardRequest, build_engine
from cai.engines.transformers import TransformersEngine
from cai.engines.vllm import VllmEngine, _next_tokens
from cai.engines.vllm_process import VllmProcess, _watch, adapter_rank
from cai.errors import CapabilityError, ConfigError, ContextLengthError, EngineError, RequestError
from cai.types import Message, Messages
from tests.tiny_model import make_tiny_model

installed = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore"),  # what vllm imports warns of this and that
]
SHARED = "Which completion is better? " * 12


class Folders(NamedTuple):
    """A model, an adapter for it, and the model with the adapter merged into its weights."""

    model: Path
    adapter: Path
    merged: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = tmp_path_factory.mktemp("vllm")
    base = make_tiny_model(root / "base", head=32)  # the smallest that vLLM computes on a CPU
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False),
    )
    model.save_pretrained(root / "adapter")
    model.merge_and_unload().save_pretrained(root / "merged")
    AutoTokenizer.from_pretrained(base).save_pretrained(root / "merged")
    return Folders(base, root / "adapter", root / "merged")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folders: Folders) -> AsyncIterator[VllmEngine]:
    settings = VllmConfig(adapter=str(folders.adapter), args={"max_model_len": 1024, "kv_cache_memory_bytes": 1 << 28})
    one = build_engine(ModelConfig(model=f"vllm:{folders.model}", dtype="float32", vllm=settings))
    assert isinstance(one, VllmEngine)
    yield one
    await one.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def peer(folders: Folders) -> AsyncIterator[TransformersEngine]:
    one = TransformersEngine(ModelConfig(model=str(folders.merged), exact=True))
    yield one
    await one.close()


def request(text: str, seed: int = 0, temperature: float = 1.0, stop: tuple[str, ...] = ()) -> GenerateRequest:
    return GenerateRequest((Message("user", text),), 24, temperature, 1.0, seed, stop)


def question(number: int) -> Messages:
    return Message("user", f"{SHARED} {number}"), Message("assistant", "(")


@installed
async def test_greedy_completions_are_those_of_transformers_with_the_adapter_merged(
    engine: VllmEngine, peer: TransformersEngine, folders: Folders
) -> None:
    requests = [request(text, temperature=0) for text in ("A", "Which is it?", "The answer is A or B. " * 5)]
    answers = await asyncio.gather(*map(engine.generate, requests))
    assert answers == [await peer.generate(one) for one in requests]
    plain = TransformersEngine(ModelConfig(model=str(folders.model), exact=True))
    assert [await plain.generate(one) for one in requests] != answers, "the adapter changes nothing"
    await plain.close()


@installed
@pytest.mark.parametrize(
    "choices", [("A", "B"), tuple(map(str, range(1, 11))), ("A B", "A", "The answer is A or B.", "The answer")]
)
async def test_choices_have_the_log_probabilities_that_transformers_gives(
    engine: VllmEngine, peer: TransformersEngine, choices: tuple[str, ...]
) -> None:
    prompts = [question(number) for number in range(5)]
    answers = await engine.choice_logprobs(prompts, choices)
    for answer, expected in zip(answers, await peer.choice_logprobs(prompts, choices), strict=True):
        assert answer.logprobs == pytest.approx(expected.logprobs, abs=2e-3)


@installed
async def test_what_prompts_share_is_computed_once(engine: VllmEngine, peer: TransformersEngine) -> None:
    prompts = [(Message("system", SHARED), *question(number)) for number in range(8)]
    answers, apart = await engine.choice_logprobs(prompts, "AB"), await peer.choice_logprobs(prompts, "AB")
    assert sum(one.computed_tokens for one in answers) * 3 < sum(one.computed_tokens for one in apart)


@installed
async def test_likelihoods_are_those_of_transformers_also_when_asked_again(
    engine: VllmEngine, peer: TransformersEngine
) -> None:
    texts = ["The answer is A or B. " * 20, "B", "The answer is A or B. " * 20]
    for text in texts:
        answer = await engine.loglikelihood(LoglikelihoodRequest(question(1)[:1], text))
        expected = await peer.loglikelihood(LoglikelihoodRequest(question(1)[:1], text))
        assert answer.logprob == pytest.approx(expected.logprob, abs=1e-2)
        assert answer.tokens == expected.tokens


@installed
async def test_a_draw_depends_on_its_seed_and_not_on_its_neighbours(engine: VllmEngine) -> None:
    seeds = list(range(60))
    crowd = await asyncio.gather(*(engine.generate(request("A", seed)) for seed in seeds))
    again = await asyncio.gather(*(engine.generate(request("A", seed)) for seed in seeds[:50:-1]))
    assert [one.text for one in again] == [one.text for one in crowd[:50:-1]]
    assert len({one.text for one in crowd}) > 50


@installed
async def test_more_prompts_with_seeds_than_one_step_takes(engine: VllmEngine) -> None:
    """Where vLLM computes a part of such a prompt on a CPU, its process dies."""
    requests = [request(f"{number} {SHARED * 3}", number) for number in range(40)]
    answers = await asyncio.gather(*map(engine.generate, requests))
    assert sum(one.prompt_tokens for one in answers) > 8192


@installed
async def test_stop_strings_and_limits_end_a_completion(engine: VllmEngine) -> None:
    whole = await engine.generate(request("A", 3))
    stop = whole.text[3:5]
    cut = await engine.generate(request("A", 3, stop=(stop,)))
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)].strip(), "stop")
    assert whole.prompt_tokens == cut.prompt_tokens > 0
    assert whole.completion_tokens <= 24


@installed
async def test_a_request_that_cannot_be_fails_alone(engine: VllmEngine) -> None:
    good, *bad = await asyncio.gather(
        engine.generate(request("A")),
        engine.generate(request("long " * 400)),
        engine.choice_logprobs([(Message("user", "long " * 400),)], "AB"),
        engine.choice_logprobs([question(0)], ("", "B")),
        engine.generate(request("A", temperature=3)),
        return_exceptions=True,
    )
    assert not isinstance(good, BaseException)
    assert [type(one) for one in bad] == [ContextLengthError, ContextLengthError, RequestError, RequestError]
    assert "with 1024" in str(bad[0])
    assert "temperature" in str(bad[3])


@installed
async def test_a_cancelled_request_is_aborted_in_vllm(engine: VllmEngine) -> None:
    await engine._ready()
    running = asyncio.ensure_future(engine.generate(GenerateRequest((Message("user", "A"),), 900, 2.0, 1.0, 5)))
    while not engine._engine.get_num_unfinished_requests():
        await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
    assert engine._engine.get_num_unfinished_requests() == 0


@installed
async def test_a_process_that_dies_stops_the_run_and_leaves_nothing(engine: VllmEngine) -> None:
    """The last one: the engine is of no use after it."""
    await engine._ready()
    processes = [one for one in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(one.cmdline())]
    assert processes
    waiting = asyncio.ensure_future(engine.generate(GenerateRequest((Message("user", "A"),), 900, 2.0, 1.0, 5)))
    while not engine._engine.get_num_unfinished_requests():
        await asyncio.sleep(0.01)
    processes[0].kill()
    with pytest.raises(EngineError, match="the same command continues"):
        await waiting
    with pytest.raises(EngineError, match="died"):
        await engine.generate(request("A"))
    await engine.close()
    assert not psutil.wait_procs(processes, timeout=20)[1]


def test_the_beginnings_of_choices_are_asked_once_each() -> None:
    assert _next_tokens([[5], [5, 6], [7], [5, 6, 8]]) == [((), (5, 7)), ((5,), (6,)), ((5, 6), (8,))]
    many = [[token] for token in range(300)]
    assert [len(named) for _, named in _next_tokens(many)] == [128, 128, 44]


def build(folders: Folders, **settings: object) -> VllmEngine:
    engine = build_engine(ModelConfig.model_validate({"model": f"vllm:{folders.model}", "dtype": "float32", **settings}))
    assert isinstance(engine, VllmEngine)
    return engine


@installed
async def test_the_fingerprint_follows_what_changes_an_answer(folders: Folders) -> None:
    plain = build(folders).fingerprint
    assert plain.startswith("vllm:base@")
    assert build(folders, vllm={"args": {"gpu_memory_utilization": 0.4, "max_num_seqs": 3}}).fingerprint == plain
    others = [
        build(folders, vllm={"adapter": str(folders.adapter)}),
        build(folders, vllm={"args": {"quantization": "fp8"}}),
        build(folders, dtype="bfloat16"),
        build(folders, exact=True),
    ]
    assert len({plain, *(one.fingerprint for one in others)}) == 5


async def test_an_engine_that_was_stopped_does_nothing_when_it_is_collected() -> None:
    class Engine:
        stopped = 0

        def shutdown(self) -> None:
            self.stopped += 1

        def __del__(self) -> None:
            self.shutdown()

    process = VllmProcess.__new__(VllmProcess)
    process.engine, (process._watch, _) = Engine(), _watch()
    process.stop()
    process.engine.__del__()
    assert process.engine.stopped == 1


@installed
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vllm": {"args": {"tensor_paralel_size": 2}}}, "no such argument (did you mean 'tensor_parallel_size'?)"),
        ({"vllm": {"args": {"model": "x"}}}, "vllm.args.model: this is set by the model's name"),
        ({"vllm": {"args": {"hf_token": "x"}}}, "vllm.args.hf_token: this is set by the environment variable HF_TOKEN"),
        ({"vllm": {"adapter": "nowhere"}}, "nowhere/adapter_config.json cannot be read"),
        ({"device": "cuda:1"}, "'cuda:1' cannot be chosen"),
    ],
)
async def test_settings_that_cannot_be_are_told_before_anything_is_started(
    folders: Folders, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as told:
        build(folders, **settings)
    assert message in str(told.value)


@installed
async def test_vllm_runs_no_reward_models(folders: Folders) -> None:
    with pytest.raises(ConfigError, match="leave out 'vllm:'"):
        build_engine(ModelConfig(model=f"vllm:{folders.model}"), reward=True)
    with pytest.raises(CapabilityError, match="does not offer reward"):
        await build(folders).reward(RewardRequest((Message("user", "A"),)))


def test_without_vllm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cai.engines.find_spec", lambda package: None if package == "vllm" else package)
    with pytest.raises(ConfigError, match=r"vllm is not installed: pip install 'cai-toolkit\[vllm\]'"):
        build_engine(ModelConfig(model="vllm:smollm2-135m"))


def test_settings_of_vllm_are_for_models_that_run_on_it() -> None:
    with pytest.raises(ConfigError, match="name it 'vllm:MODEL'"):
        build_engine(ModelConfig(vllm=VllmConfig(args={"max_num_seqs": 3})))


def test_a_judge_has_the_policys_arguments_and_not_its_adapter() -> None:
    policy = {"model": "vllm:a", "vllm": {"adapter": "lora", "args": {"max_num_seqs": 3}}}

    def judge(**section: object) -> VllmConfig:
        recipe = Recipe.model_validate({"policy": policy, "judge": section})
        return recipe.judge_model(recipe.judge).vllm

    assert judge() == VllmConfig(adapter="lora", args={"max_num_seqs": 3})
    assert judge(model="vllm:b") == VllmConfig(args={"max_num_seqs": 3})
    assert judge(model="b") == VllmConfig()
    assert judge(model="vllm:b", vllm={"adapter": "own"}) == VllmConfig(adapter="own")
    members = [{"name": "one"}, {"name": "two", "model": "vllm:c"}]
    recipe = Recipe.model_validate(
        {"policy": policy, "judge": {"method": "panel", "model": "vllm:b", "vllm": {"adapter": "own"}, "members": members}}
    )
    one, two = (recipe.judge_model(recipe.judge.member(member)).vllm for member in recipe.judge.members)
    assert (one, two) == (VllmConfig(adapter="own"), VllmConfig(args={"max_num_seqs": 3}))


@pytest.mark.parametrize(("settings", "rank"), [({"r": 4}, 8), ({"r": 16}, 16), ({"r": 8, "rank_pattern": {"q": 33}}, 64)])
def test_the_rank_is_the_next_that_vllm_has(tmp_path: Path, settings: dict[str, object], rank: int) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert adapter_rank(str(tmp_path)) == rank


@pytest.mark.parametrize(("text", "message"), [('{"r": 999}', "above 512"), ("{}", "KeyError"), ("no", "not what peft saves")])
def test_an_adapter_that_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        adapter_rank(str(tmp_path))
