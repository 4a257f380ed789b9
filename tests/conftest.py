"""Fixtures for every test."""

from __future__ import annotations

from engines import one_rank, two_ranks
from leftovers import no_leftovers
from ranks import rank_pool

__all__ = ["no_leftovers", "one_rank", "rank_pool", "two_ranks"]
