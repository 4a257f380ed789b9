"""What every test of this directory needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch._inductor import config as inductor_config

from engines import LiveEngine, start_engine, stop_engine


@pytest.fixture(autouse=True)
def no_compiling_processes() -> Iterator[None]:
    """The compiler's helpers would stay until this process ends."""
    with inductor_config.patch(compile_threads=1):
        yield


@pytest.fixture(scope="package")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveEngine]:
    """An engine with one rank on the device."""
    engine = start_engine(tmp_path_factory.mktemp("cuda"), 1, device="cuda")
    yield engine
    stop_engine(engine)
