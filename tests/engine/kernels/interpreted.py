"""Runs the checks of the kernels under Triton's interpreter, on a CPU, and prints what went wrong as JSON.

A program of its own: the interpreter has to be chosen before Triton is imported.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_with_index(tensor: Any, scope: Any) -> None:
    """Triton 3.6 makes an index of a number by a conversion that numpy 2.4 no longer does."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_with_index


def main() -> None:
    from engine.kernels import decode_steps, sampling_cases

    checks: dict[str, Callable[[torch.device], None]] = {**decode_steps.CHECKS, **sampling_cases.CHECKS}
    wrong = {}
    for seed, (name, check) in enumerate(checks.items()):
        torch.manual_seed(seed)
        try:
            check(torch.device("cpu"))
        except Exception:
            wrong[name] = traceback.format_exc()
    print(json.dumps({"ran": list(checks), "wrong": wrong}))


if __name__ == "__main__":
    main()
