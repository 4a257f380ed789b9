"""Returns and advantages of one trajectory."""

from harmony_core.returns import discounted_cumulative_rewards, gae_advantages, gae_td_returns

__all__ = ["discounted_cumulative_rewards", "gae_advantages", "gae_td_returns"]
