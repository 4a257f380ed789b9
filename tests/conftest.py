"""Fixtures for every test."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Before torch is imported, here and in whatever the tests start: models as small as theirs gain nothing from a second
# thread, which only spins.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import small_models
from engines import one_rank, two_ranks
from harmony_core.home import Home
from harmony_core.registry import Registry
from leftovers import no_leftovers
from ranks import rank_pool

__all__ = ["no_leftovers", "one_rank", "rank_pool", "two_ranks"]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws does not depend on which others ran before it in this process."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """An empty one."""
    return Registry(Home.open(tmp_path / "home"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model's directory to add."""
    return small_models.write_model(tmp_path / "source")
