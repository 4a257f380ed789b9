"""The base of graders."""

from harmony_core.graders import BaseGrader as BaseGrader
from harmony_core.graders.records import get_model as get_model
