"""Whether documents help with the question."""

from adaptive_harmony.graders.context_relevancy_judge.context_relevancy_judge import *
