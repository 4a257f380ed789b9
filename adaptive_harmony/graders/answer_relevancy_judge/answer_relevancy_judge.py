"""Whether an answer keeps to the question."""

from harmony_core.graders import (
    AnswerRelevancyGrader as AnswerRelevancyGrader,
    AnswerRelevancyResults as AnswerRelevancyResults,
    StatementRelevancy as StatementRelevancy,
)
