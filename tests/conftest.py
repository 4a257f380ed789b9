"""Fixtures for every test."""

from __future__ import annotations

import os
import sys

import pytest

# Before torch is imported, here and in whatever the tests start: models as small as theirs gain nothing from a second
# thread, which only spins.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from engines import one_rank, two_ranks
from leftovers import no_leftovers
from ranks import rank_pool

__all__ = ["no_leftovers", "one_rank", "rank_pool", "two_ranks"]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws does not depend on which others ran before it in this process."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
