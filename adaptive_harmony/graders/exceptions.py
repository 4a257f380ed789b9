"""What graders raise."""

from harmony_core.errors import IgnoreGradeException as IgnoreGradeException
