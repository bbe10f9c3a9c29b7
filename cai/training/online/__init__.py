"""Training on completions that the policy writes while it trains: PPO, RLOO, GRPO, online DPO; rewards and safeguards."""
