"""Graders and their grades."""

from harmony_core.graders import BaseGrader, Grade

__all__ = ["BaseGrader", "Grade"]
