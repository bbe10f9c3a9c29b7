"""PPO on TRL: `PPOTrainer` and `PPOConfig` can be used without the rest of cai, as any trainer of TRL."""

from cai.training.ppo.config import PPOConfig
from cai.training.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
