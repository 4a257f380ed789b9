"""Judges by template."""

from harmony_core.graders import (
    OPENAI_MODEL_FAMILIES_TEMPERATURE_1_ONLY as OPENAI_MODEL_FAMILIES_TEMPERATURE_1_ONLY,
    BaseTemplatedPromptJudgeOutput as BaseTemplatedPromptJudgeOutput,
    BinaryJudgeOutput as BinaryJudgeOutput,
    SimpleReasonedFloatOutput as SimpleReasonedFloatOutput,
    TemplatedPromptJudgeGrader as TemplatedPromptJudgeGrader,
)
