"""Several graders as one."""

from harmony_core.graders import CombinedGrader as CombinedGrader
