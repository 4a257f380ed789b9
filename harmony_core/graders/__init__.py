"""Graders: coroutines that turn a thread into a score, and the logs of their scores."""

from harmony_core.errors import IgnoreGradeException
from harmony_core.graders.base import BaseGrader, FailedJudgeLog, Grade, SuccessJudgeLog, score_or_refuse

__all__ = ["BaseGrader", "FailedJudgeLog", "Grade", "IgnoreGradeException", "SuccessJudgeLog", "score_or_refuse"]
