"""Built in: quickstart sft generate dpo reward_model grpo gspo ppo env_grpo sft_then_grpo evaluate, each with YAML."""
