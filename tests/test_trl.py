"""What a run writes loads straight into TRL's trainers: two steps each, on a tiny model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest

from cai import generate
from cai.config import Recipe
from tests.tiny_model import make_tiny_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

pytestmark = pytest.mark.filterwarnings("ignore")
TRAINERS = {
    "sft": [(SFTTrainer, SFTConfig)],
    "preference": [(DPOTrainer, DPOConfig), (RewardTrainer, RewardConfig)],
    "unpaired": [(KTOTrainer, KTOConfig)],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run(tmp_path: Path, scripted_recipe: Recipe) -> Path:
    generate(scripted_recipe, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(("name", "trainer", "config"), [(name, *pair) for name, pairs in TRAINERS.items() for pair in pairs])
def test_two_steps_of_training(run: Path, tiny: Path, tmp_path: Path, name: str, trainer: Any, config: Any) -> None:
    data = datasets.load_dataset(str(run), name, split="train", cache_dir=str(tmp_path / "cache"))
    arguments = config(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
    )
    model = str(tiny)
    one = trainer(model=model, args=arguments, train_dataset=data)
    result = one.train()
    assert result.global_step == 2
    assert result.training_loss > 0
