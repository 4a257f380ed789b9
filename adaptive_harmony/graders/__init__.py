"""Graders and judges."""

from harmony_core.graders import *
