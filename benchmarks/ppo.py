"""Does PPO learn, how fast, and beside what? SmolLM2 with LoRA is rewarded for short words, which a program can count.

The reward of an answer is the share of its words of at most four letters, in tenths above one half. Each trainer writes the
same number of tokens, to the same prompts with the same seed: our PPO with a critic, with a head on the policy's trunk, and
with a critic and vLLM in its process to write; TRL's RLOO and GRPO, and the PPO that TRL had until 1.12, with the settings of
ours. That one runs on a copy of TRL 1.12.0, which is fetched into a folder beside the results on first use. Told for each:
reward at the start and the end (the mean of the first two rollouts and of the last tenth, and how many deviations of single
answers that is), KL to the reference, the explained variance of the value function, and tokens that were written and trained on
a second. Goals: the reward rises by 2 deviations within 15 minutes under a KL of 30 nats; explained variance over 0.3; 3 times
the tokens a second of TRL's PPO.

    python -m benchmarks.ppo [TRAINERS] [COMPLETIONS] [FOLDER] [TOKENS] [SEED] [PROMPTS]

(default all, 640, a temporary folder, 24, 0, short questions; PROMPTS is a built-in set or a file)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from cai.config import PromptsConfig
from cai.errors import ConfigError
from cai.models import locate
from cai.prompts import Row, read_prompts
from cai.weights import pretrained

MODEL, BATCH, EPOCHS, MINIBATCHES = "smollm2-135m", 32, 2, 2
TRAINERS = ("ppo", "ppo-head", "ppo-vllm", "rloo", "grpo", "trl-ppo")
KL, PPO_RATE, VALUE_RATE = 0.05, 3e-4, 5e-3
THINGS = (
    "apples bees bread bridges cats cheese clouds coffee copper dogs dreams elephants fire fish flowers forests glass gold "
    "grass hats history honey horses houses ice islands jazz kings kites lakes lions maps mice milk money moons mountains "
    "music oceans oil onions paper pearls pianos pigs planets poems rain rice rivers roads robots salt sand schools ships "
    "snow stars stones storms tea tigers trains trees volcanoes water whales wheat wind wine wolves wood wool"
)
"""What is asked about."""
_TRL = "trl==1.12.0"


def worth(text: str) -> float:
    """The share of words of at most four letters, in tenths above one half: answers differ by about 1, and begin near 0."""
    words = ["".join(filter(str.isalpha, word)) for word in text.split()]
    return 10 * (mean(len(word) <= 4 for word in words) - 0.5) if words else -5.0


def reward(completions: Any, **columns: Any) -> list[float]:
    """What trainers ask."""
    return [worth(one[-1]["content"]) for one in completions]


def settings_of(name: str, steps: int, rows: Path, tokens: int, seed: int) -> dict[str, Any]:
    """What `cai train` is told."""
    shared = {
        "max_steps": steps * (EPOCHS * MINIBATCHES if name.startswith("ppo") else 1),
        "max_completion_length": tokens,
        "learning_rate": PPO_RATE if name.startswith("ppo") else 5e-4,
        "lr_scheduler_type": "constant",
        "beta": KL,
        "save_strategy": "no",
    }
    ours = {
        "num_iterations": EPOCHS,
        "per_device_train_batch_size": BATCH // MINIBATCHES,
        "steps_per_generation": MINIBATCHES,
        "value_learning_rate": VALUE_RATE,
    }
    groups = {"per_device_train_batch_size": BATCH, "num_generations": 4}
    vllm = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.2, "vllm_max_model_length": 512}
    own = {"ppo": ours, "ppo-head": ours | {"value_function": "head"}, "ppo-vllm": ours | vllm, "rloo": groups, "grpo": groups}
    source = {"function": f"{Path(__file__).resolve()}:reward"}
    return {
        "model": MODEL,
        "data": {"source": str(rows), "test_split": None},
        "lora": {},
        "reward": source,
        "limits": {"kl": None, "collapse": False},
        "seed": seed,
        "trl": {**shared, **own[name]},
    }


def measure(name: str, completions: int, folder: Path, tokens: int, seed: int) -> dict[str, Any]:
    """Train in this process, and what came of it."""
    from cai.training import SETTINGS
    from cai.training.running import train

    rows = folder / "prompts.jsonl"
    stage: Any = name.partition("-")[0]
    settings = SETTINGS[stage].model_validate(settings_of(name, completions // BATCH, rows, tokens, seed))  # type: ignore[index]
    train(stage, settings, folder / name, "fresh")
    lines = [json.loads(line) for line in (folder / name / "run" / "log.jsonl").read_text().splitlines()]
    told = [line for line in lines if "reward" in line]
    seconds = next(line["train_runtime"] for line in lines if "train_runtime" in line)
    return {
        "rewards": [line["reward"] for line in told],
        "deviation": told[0]["reward_std"],
        "kl": [line.get("objective/kl", line.get("kl", 0.0) * line["completions/mean_length"]) for line in told],
        "explained": [line["value/explained_variance"] for line in told if "value/explained_variance" in line],
        "seconds": seconds,
        "tokens": round(sum(line["completions/mean_length"] for line in told) * BATCH),
    }


def main() -> None:
    given = dict(enumerate(sys.argv[1:]))
    names, completions = given.get(0, ",".join(TRAINERS)).split(","), int(given.get(1, "640"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.get(2, temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        write_prompts(folder / "prompts.jsonl", given.get(5))
        for name in names:
            show(name, run_apart(name, completions, folder, given.get(3, "24"), given.get(4, "0")))


def write_prompts(file: Path, source: str | None = None) -> None:
    """Those of a source, or short questions. Where they have no system prompt, the model's chat template adds its own."""
    if source is None:
        prompts = [[{"role": "user", "content": f"Tell me about {one}."}] for one in THINGS.split()]
    else:
        prompts = [messages_of(row) for row in read_prompts(PromptsConfig(source=source))]
    if len(prompts) < BATCH:
        raise ConfigError(f"{source}: {len(prompts)} prompts; a rollout has {BATCH}")
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def messages_of(row: Row) -> list[dict[str, str]]:
    """Of a prompt. Raises what makes it none."""
    if row.prompt is None:
        raise ConfigError(f"{row.origin}: {row.error}")
    return [{"role": one.role, "content": one.content} for one in row.prompt.messages]


def run_apart(name: str, completions: int, folder: Path, tokens: str, seed: str) -> dict[str, Any]:
    """In a process of its own, so that nothing of the one before is in memory."""
    result, more = folder / f"{name}.json", {}
    if name == "trl-ppo":
        place = folder / "trl"
        if not place.is_dir():
            subprocess.run(
                [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(place), _TRL], check=True
            )
        more = {"PYTHONPATH": os.pathsep.join([str(place), str(Path(__file__).resolve().parents[1])])}
    job = [name, str(completions), str(folder), str(result), tokens, seed, pretrained(locate(MODEL))[0]]
    code = (
        "import sys; from benchmarks import ppo, ppo_trl; (ppo_trl if sys.argv[1] == 'trl-ppo' else ppo).apart(*sys.argv[1:])"
    )
    subprocess.run([sys.executable, "-c", code, *job], check=True, env={**os.environ, **more})
    return dict(json.loads(result.read_text()))


def apart(name: str, completions: str, folder: str, result: str, tokens: str, seed: str, model: str) -> None:
    """What the process does."""
    Path(result).write_text(json.dumps(measure(name, int(completions), Path(folder), int(tokens), int(seed))))


def show(name: str, found: dict[str, Any]) -> None:
    """One line."""
    rewards, kl, explained = found["rewards"], found["kl"], found["explained"]
    few = max(1, len(rewards) // 10)
    first, last = mean(rewards[:2]), mean(rewards[-few:])
    rise = (last - first) / found["deviation"] if found["deviation"] else 0.0
    value = f", explained variance {mean(explained[-few:]):.2f}" if explained else ""
    print(
        f"{name:<8} reward {first:.3f} -> {last:.3f} ({rise:+.1f} deviations), KL {mean(kl[-few:]):.1f}{value}, "
        f"{found['tokens']:,} tokens in {found['seconds']:.0f} s: {found['tokens'] / found['seconds']:.0f} a second",
        flush=True,
    )


if __name__ == "__main__":
    main()
