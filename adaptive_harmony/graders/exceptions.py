"""Exceptions of graders."""

from harmony_core.graders import IgnoreGradeException

__all__ = ["IgnoreGradeException"]
