"""Records of range judges."""

from harmony_core.graders import (
    PromptBuildingBlocks as PromptBuildingBlocks,
    RangeJudgeShot as RangeJudgeShot,
    ReasonedScore as ReasonedScore,
    SubrangeExpectations as SubrangeExpectations,
)
