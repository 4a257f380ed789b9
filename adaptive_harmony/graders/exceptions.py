"""What a grader raises."""

from harmony_core.graders import IgnoreGradeException

__all__ = ["IgnoreGradeException"]
