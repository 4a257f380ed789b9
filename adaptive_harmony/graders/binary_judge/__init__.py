"""Pass or fail."""

from adaptive_harmony.graders.binary_judge.binary_judge import *
