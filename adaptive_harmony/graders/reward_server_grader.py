"""Grades of a server."""

from harmony_core.graders import RewardServerGrader as RewardServerGrader
