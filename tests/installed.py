"""Packages that only slow tests need."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest


def needs(package: str) -> pytest.MarkDecorator:
    """Skips a slow test without a package that `make test-slow` installs; in CI the test fails instead."""
    missing = find_spec(package) is None and "CI" not in os.environ
    return pytest.mark.skipif(missing, reason=f'no {package}: make test-slow, or pip install "harmony-core[peers]"')
