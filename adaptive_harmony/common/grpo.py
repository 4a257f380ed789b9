"""GRPO."""

from harmony_core.algorithms.grpo import GRPO as GRPO, Sample as Sample
from harmony_core.algorithms.helpers import GRPO_HYPERPARAMS as GRPO_HYPERPARAMS, FloatArray as FloatArray
