"""How many CUDA devices a run would see, found without torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping


def installed_devices() -> int:
    """CUDA devices of this machine, as the driver's own tool lists them; 0 without one."""
    try:
        shown = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in shown.splitlines())


def visible_devices(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Identifiers of the CUDA devices that a process with this environment sees, in its order."""
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(index) for index in range(installed_devices())]
    seen: list[str] = []
    installed = installed_devices()
    for name in (part.strip() for part in chosen.split(",")):
        # The CUDA driver stops at the first name that is none.
        if not name or name.startswith("-") or (name.isdigit() and int(name) >= installed):
            break
        seen.append(name)
    return seen if installed else []
