"""Environments, and the histories of their trajectories."""

from harmony_core.environments import *
