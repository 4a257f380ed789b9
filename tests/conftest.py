"""Fixtures for every test."""

from __future__ import annotations

from ranks import rank_pool

__all__ = ["rank_pool"]
