"""The contract of a grader."""

from harmony_core.graders import BaseGrader

__all__ = ["BaseGrader"]
