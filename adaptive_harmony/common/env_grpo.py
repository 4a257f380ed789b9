"""GRPO of trajectories."""

from harmony_core.algorithms.env_grpo import ENVGRPO as ENVGRPO, Sample as Sample
from harmony_core.algorithms.helpers import ENVGRPO_HYPERPARAMS as ENVGRPO_HYPERPARAMS, flatten as flatten
