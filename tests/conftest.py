"""Fixtures for every test."""

from __future__ import annotations

import os

# Before torch is imported, here and in whatever the tests start: models as small as theirs gain nothing from a second
# thread, which only spins.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from engines import one_rank, two_ranks
from leftovers import no_leftovers
from ranks import rank_pool

__all__ = ["no_leftovers", "one_rank", "rank_pool", "two_ranks"]
