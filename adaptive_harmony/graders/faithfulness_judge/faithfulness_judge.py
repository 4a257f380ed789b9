"""Whether an answer is true to its context."""

from harmony_core.graders import (
    FaithfulnessGrader as FaithfulnessGrader,
    FaithfulnessGraderOutput as FaithfulnessGraderOutput,
    SingleStatementFaithfulnessJudgeOutput as SingleStatementFaithfulnessJudgeOutput,
    SupportedLanguages as SupportedLanguages,
)
