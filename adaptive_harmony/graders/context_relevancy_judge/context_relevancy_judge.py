"""Whether documents help with the question."""

from harmony_core.graders import (
    ContextRelevancyGrader as ContextRelevancyGrader,
    DocumentRelevancyResult as DocumentRelevancyResult,
)
