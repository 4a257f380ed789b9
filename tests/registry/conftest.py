"""What most tests of the registry begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

import small_models
from harmony_core.home import Home
from harmony_core.registry import Registry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """An empty one."""
    return Registry(Home.open(tmp_path / "home"))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model's directory to add."""
    return small_models.write_model(tmp_path / "source")
