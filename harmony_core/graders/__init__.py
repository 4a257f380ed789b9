"""Graders: coroutines that turn a thread into a score, and the logs of their scores."""

from harmony_core.errors import IgnoreGradeException
from harmony_core.graders.base import (
    BaseGrader,
    FailedJudgeLog,
    Grade,
    SuccessJudgeLog,
    grade_or_refuse,
    score_or_refuse,
)
from harmony_core.graders.combined import CombinedGrader
from harmony_core.graders.keys import Grader, GraderRegistry
from harmony_core.graders.reward_server import RewardClient, RewardServerGrader
from harmony_core.graders.verifiable import exact_match_grader, json_grader, math_grader, regex_grader

__all__ = [
    "BaseGrader",
    "CombinedGrader",
    "FailedJudgeLog",
    "Grade",
    "Grader",
    "GraderRegistry",
    "IgnoreGradeException",
    "RewardClient",
    "RewardServerGrader",
    "SuccessJudgeLog",
    "exact_match_grader",
    "grade_or_refuse",
    "json_grader",
    "math_grader",
    "regex_grader",
    "score_or_refuse",
]
