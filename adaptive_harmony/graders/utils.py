"""Entries of a grader's logs."""

from harmony_core.graders import FailedJudgeLog, SuccessJudgeLog

__all__ = ["FailedJudgeLog", "SuccessJudgeLog"]
