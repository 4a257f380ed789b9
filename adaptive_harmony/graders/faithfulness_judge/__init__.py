"""Whether an answer is true to its context."""

from adaptive_harmony.graders.faithfulness_judge.faithfulness_judge import *
