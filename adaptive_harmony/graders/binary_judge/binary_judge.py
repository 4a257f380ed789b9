"""Pass or fail."""

from harmony_core.graders import (
    OPENAI_MODEL_FAMILIES_TEMPERATURE_1_ONLY as OPENAI_MODEL_FAMILIES_TEMPERATURE_1_ONLY,
    BinaryJudgeGrader as BinaryJudgeGrader,
    BinaryJudgeOutput as BinaryJudgeOutput,
    BinaryJudgeShot as BinaryJudgeShot,
    ScoresMap as ScoresMap,
)
