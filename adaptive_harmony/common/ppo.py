"""PPO."""

from harmony_core.algorithms.helpers import PPO_HYPERPARAMS as PPO_HYPERPARAMS
from harmony_core.algorithms.ppo import PPO as PPO, Sample as Sample
