"""Whether an answer keeps to the question."""

from adaptive_harmony.graders.answer_relevancy_judge.answer_relevancy_judge import *
