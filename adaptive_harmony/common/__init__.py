"""Training classes and callbacks."""

from harmony_core.algorithms import *
