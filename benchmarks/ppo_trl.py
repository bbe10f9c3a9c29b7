"""The PPO that TRL had until 1.12, on the job of `benchmarks.ppo`. Runs on a copy of TRL 1.12.0 alone.

Its value function is a model of its own of which all weights are trained, which is all that it has; ours are adapters.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from benchmarks.ppo import BATCH, EPOCHS, KL, MINIBATCHES, PPO_RATE, worth


def apart(name: str, completions: str, folder: str, result: str, tokens: str, seed: str, model: str) -> None:
    """Train and write what came of it."""
    Path(result).write_text(json.dumps(measure(int(completions), Path(folder), int(tokens), int(seed), model)))


def measure(completions: int, folder: Path, tokens: int, seed: int, place: str) -> dict[str, Any]:
    """Its trainer takes reward models alone: the one that it is given is a stand-in, for which the check answers."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    from cai.config import ModelConfig
    from cai.weights import resolve_dtype

    set_seed(seed)  # which its trainer sets too late for what the value model begins with
    tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})
    rows = load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train")
    rows = rows.map(lambda row: encode(tokenizer, row["prompt"]), remove_columns=["prompt"])
    dtype = resolve_dtype(ModelConfig())
    classifier = {"num_labels": 1, "dtype": dtype}
    value, stand_in = (AutoModelForSequenceClassification.from_pretrained(place, **classifier) for _ in range(2))
    model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
    asked, written, ask = [], [], ppo_trainer.get_reward

    def get_reward(network: Any, texts: Any, padding: int, context: int) -> Any:
        if network is not stand_in:
            return ask(network, texts, padding, context)
        answers = tokenizer.batch_decode(texts[:, context:], skip_special_tokens=True)
        written.append(int((texts[:, context:] != padding).sum()))
        asked.extend(worth(one) for one in answers)
        return None, torch.tensor([worth(one) for one in answers]), None

    ppo_trainer.get_reward = get_reward
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder / "trl-ppo"),
            use_cpu=True,
            bf16=dtype == torch.bfloat16,
            gradient_checkpointing=False,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=1,
            local_rollout_forward_batch_size=BATCH,
            num_ppo_epochs=EPOCHS,
            num_mini_batches=MINIBATCHES,
            num_sample_generations=0,
            total_episodes=completions,
            response_length=tokens,
            temperature=1.0,
            stop_token="eos",
            kl_coef=KL,
            learning_rate=PPO_RATE,
            lr_scheduler_type="constant",
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            seed=seed,
        ),
        processing_class=tokenizer,
        model=model,
        ref_model=None,
        reward_model=stand_in,
        value_model=value,
        train_dataset=rows,
        eval_dataset=rows.select(range(BATCH)),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    told = [line for line in trainer.state.log_history if "objective/kl" in line]
    batches = [asked[start : start + BATCH] for start in range(0, len(asked), BATCH)]
    return {
        "rewards": [sum(one) / len(one) for one in batches],
        "deviation": float(torch.tensor(batches[0]).std()),
        "kl": [line["objective/kl"] for line in told],
        "explained": [],
        "seconds": seconds,
        "tokens": sum(written),
    }


def encode(tokenizer: Any, prompt: Any) -> dict[str, Any]:
    """The prompt's tokens."""
    return {"input_ids": tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]}
