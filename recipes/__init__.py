"""Built in: quickstart sft generate dpo reward_model grpo gspo ppo sft_then_grpo evaluate, each with its YAML."""
