"""PPO of trajectories."""

from harmony_core.algorithms.env_ppo import ENVPPO as ENVPPO, Sample as Sample
from harmony_core.algorithms.helpers import PPO_HYPERPARAMS as PPO_HYPERPARAMS
