"""SFT."""

from harmony_core.algorithms import SFT as SFT
from harmony_core.algorithms.helpers import SFT_HYPERPARAMS as SFT_HYPERPARAMS
