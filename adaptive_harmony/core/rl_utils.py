"""Returns and advantages of one trajectory."""

from harmony_core.returns import (
    discounted_cumulative_rewards as discounted_cumulative_rewards,
    gae_advantages as gae_advantages,
    gae_td_returns as gae_td_returns,
)
