"""A score within a range."""

from harmony_core.graders import RangeJudgeGrader as RangeJudgeGrader
