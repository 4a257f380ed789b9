"""What this machine has for making code at run time: compiled layers need a C compiler and Python's headers."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path


def find_compiler() -> str | None:
    """The C compiler that Triton and inductor would find; None when there is none."""
    for name in (os.environ.get("CC", ""), "gcc", "cc", "clang"):
        found = shutil.which(name.split()[0]) if name.strip() else None
        if found is not None:
            return found
    return None


def find_headers() -> Path | None:
    """Python.h, which the code that launches kernels is compiled with; None when it is not installed."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    return header if header.is_file() else None


def missing_tool() -> str:
    """What is missing for compiling layers, in words; "" when nothing is."""
    if find_compiler() is None:
        return "no C compiler"
    return "" if find_headers() is not None else "no Python.h"
