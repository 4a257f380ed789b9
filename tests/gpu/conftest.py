"""What every test of this directory needs."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_compiling_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's helpers would stay until this process ends."""
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
