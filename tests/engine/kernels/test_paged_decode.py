"""The Triton kernels on a CPU, under Triton's interpreter in one process for all checks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("there is no Triton for this system", allow_module_level=True)

from engine.kernels import decode_steps, sampling_cases

pytestmark = pytest.mark.slow  # a minute of one processor


@pytest.fixture(scope="module")
def outcome() -> dict[str, Any]:
    script = Path(__file__).with_name("interpreted.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=840, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", [*decode_steps.CHECKS, *sampling_cases.CHECKS])
def test_interpreted(outcome: dict[str, Any], name: str) -> None:
    assert name in outcome["ran"]
    assert name not in outcome["wrong"], outcome["wrong"][name]
