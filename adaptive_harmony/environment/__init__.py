"""Environments."""

from adaptive_harmony.environment.environment import *
