"""GSPO of trajectories."""

from harmony_core.algorithms.env_grpo import ENVGSPO as ENVGSPO, Sample as Sample
from harmony_core.algorithms.helpers import ENVGSPO_HYPERPARAMS as ENVGSPO_HYPERPARAMS, FloatArray as FloatArray
