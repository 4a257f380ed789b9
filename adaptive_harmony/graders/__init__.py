"""Graders and what they return."""

from harmony_core.graders import BaseGrader, Grade

__all__ = ["BaseGrader", "Grade"]
