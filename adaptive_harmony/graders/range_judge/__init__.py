"""A score within a range."""

from adaptive_harmony.graders.range_judge.range_judge import *
from adaptive_harmony.graders.range_judge.types import *
