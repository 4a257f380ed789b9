"""What the machine offers and lacks, without importing torch here: what needs it is asked in another process."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from harmony_core.errors import HarmonyError
from harmony_core.home import Home
from harmony_core.ledger import format_size, host_capacity
from harmony_core.recipe_file import check_alias_package
from harmony_core.toolchain import find_compiler, find_headers

Status = Literal["ok", "warn", "fail"]

NEEDED = ("torch", "transformers", "accelerate", "peft", "tokenizers", "safetensors")
SHM_BYTES = 64 * 2**20
DISK_BYTES = 5 * 2**30

_TORCH_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__,
    "cuda_build": torch.version.cuda,
    "cuda": cuda,
    "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
    "nccl": torch.distributed.is_available() and torch.distributed.is_nccl_available(),
    "devices": [[torch.cuda.get_device_name(i), *torch.cuda.mem_get_info(i)] for i in range(torch.cuda.device_count())]
    if cuda else [],
}))
"""


@dataclass(frozen=True)
class Check:
    """One finding. `fail`: runs will not work; `warn`: something is slower or refused."""

    name: str
    status: Status
    detail: str
    hint: str = ""


def examine() -> list[Check]:
    """Every check, in the order in which problems are best solved."""
    checks: list[Check] = []
    for check in (_python, _packages, _alias, _home, _disk, _shared_memory, _memory, _compiler):
        checks += check()
    return [*checks, *_torch()]


def _python() -> list[Check]:
    found = platform.python_version()
    good = sys.version_info[:2] >= (3, 11)
    system: Status = "ok" if sys.platform == "linux" else "warn"
    hint = "" if system == "ok" else "only Linux is tested"
    return [
        Check("python", "ok" if good else "fail", found, "Python 3.11 or newer is needed"),
        Check("system", system, platform.platform(), hint),
    ]


def _packages() -> list[Check]:
    found, missing = [], []
    for package in NEEDED:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        return [Check("packages", "fail", f"missing: {', '.join(missing)}", "pip install " + " ".join(missing))]
    return [Check("packages", "ok", ", ".join(found))]


def _alias() -> list[Check]:
    try:
        check_alias_package()
    except HarmonyError as error:
        return [Check("adaptive_harmony", "fail", error.message, error.hint)]
    return [Check("adaptive_harmony", "ok", "the alias package is ours")]


def _home() -> list[Check]:
    try:
        home = Home.open()
    except HarmonyError as error:
        return [Check("home", "fail", error.message, error.hint)]
    return [Check("home", "ok", str(home.path)), _locks(home)]


def _locks(home: Home) -> Check:
    """Whether a lock that another holds is refused: on some network disks every lock succeeds."""
    try:
        with tempfile.NamedTemporaryFile(dir=home.locks) as first, open(first.name) as second:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return Check("locks", "ok", "file locks hold")
    except OSError as error:
        return Check("locks", "fail", f"no file locks under {home.locks}: {error}", "put ADAPTIVE_HOME on a local disk")
    return Check("locks", "warn", "file locks do not hold", "put ADAPTIVE_HOME on a local disk")


def _disk() -> list[Check]:
    path = Path(os.environ.get("ADAPTIVE_HOME") or "~/.adaptive").expanduser()
    while not path.exists() and path != path.parent:
        path = path.parent
    free = shutil.disk_usage(path).free
    return [Check("disk", "ok" if free > DISK_BYTES else "warn", f"{format_size(free)} free", "models need room")]


def _shared_memory() -> list[Check]:
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        return [Check("/dev/shm", "fail" if sys.platform == "linux" else "warn", "not writable", "mount a tmpfs there")]
    free = shutil.disk_usage(shm).free
    good = free >= SHM_BYTES
    hint = "in a container: --shm-size=1g; NCCL needs it with several GPUs"
    return [Check("/dev/shm", "ok" if good else "warn", f"{format_size(free)} free", hint)]


def _memory() -> list[Check]:
    free = host_capacity()
    return [
        Check(
            "memory", "ok" if free >= 2 * 2**30 else "warn", f"{format_size(free)} for models", "close other programs"
        )
    ]


def _compiler() -> list[Check]:
    compiler, header = find_compiler(), find_headers()
    why = "without it layers run uncompiled on CUDA; CPU does not need it"
    return [
        Check("compiler", "ok" if compiler else "warn", compiler or "no C compiler", why),
        Check("headers", "ok" if header else "warn", str(header or "no Python.h"), why),
    ]


def _torch() -> list[Check]:
    """Ask torch in a process of its own: importing it takes seconds, and a broken build may take the process down."""
    done = _output([sys.executable, "-c", _TORCH_PROBE], timeout=120)
    try:
        found = json.loads((done or "").splitlines()[-1])
    except (ValueError, IndexError):
        return [Check("torch", "fail", "cannot be imported", f"try: {sys.executable} -c 'import torch'")]
    checks = [Check("torch", "ok", f"{found['version']}, CUDA build {found['cuda_build'] or 'none'}")]
    if not found["gloo"]:
        checks.append(Check("gloo", "fail", "this torch has no gloo", "install an official build of torch"))
    driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], timeout=30)
    return checks + _cuda(found, driver.splitlines()[0].strip() if driver else None)


def _cuda(found: dict[str, object], driver: str | None) -> list[Check]:
    """Devices, and why there are none where a driver says there should be."""
    devices = found["devices"]
    assert isinstance(devices, list)
    if devices:
        rows = [
            Check(f"cuda:{i}", "ok", f"{name}, {format_size(free)} of {format_size(total)} free")
            for i, (name, free, total) in enumerate(devices)
        ]
        nccl: list[Check] = []
        if not found["nccl"] and len(devices) > 1:
            nccl = [Check("nccl", "fail", "this torch has no NCCL", "install an official CUDA build of torch")]
        return [Check("driver", "ok", f"{driver or 'unknown'}, works with this torch"), *rows, *nccl]
    if driver is None:
        return [Check("devices", "ok", "no NVIDIA driver: runs use the CPU")]
    if found["cuda_build"] is None:
        hint = "install a CUDA build of torch to use the GPUs"
        return [Check("devices", "warn", f"driver {driver} is there, torch is a CPU build", hint)]
    hint = "update the driver, or install a torch built for an older CUDA; or CUDA_VISIBLE_DEVICES hides the GPUs"
    return [Check("devices", "fail", f"driver {driver} does not serve CUDA {found['cuda_build']}", hint)]


def _output(command: list[str], timeout: float) -> str | None:
    """What a command prints, or None when it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
