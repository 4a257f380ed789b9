"""`adaptive doctor` checks this machine. It imports torch in a process of its own."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import typer

from harmony_core.errors import HarmonyError
from harmony_core.home import Home
from harmony_core.memory.ledger import format_size, host_capacity
from harmony_core.plain_files import expanded
from harmony_core.recipe_file import check_alias_package
from harmony_core.rpc.platform import find_compiler, find_headers, loopback_interface

from . import output

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


def _check(name: str, good: bool, detail: str, hint: str = "", bad: Status = "warn") -> Check:
    return Check(name, "ok" if good else bad, detail, hint)


def app(json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False) -> int:
    """Check Python, packages, devices, memory, compiler, home and locks; exit code 4 when something is missing."""
    linux = sys.platform == "linux"
    checks = [
        _check(
            "python", sys.version_info >= (3, 11), platform.python_version(), "Python 3.11 or newer is needed", "fail"
        ),
        _check("system", linux, platform.platform(), "" if linux else "only Linux is tested"),
        *(_packages(), _tried("adaptive_harmony", _alias), *_home(), *_machine(), *_compiler(), *_torch()),
    ]
    code = 4 if any(check.status == "fail" for check in checks) else 0
    rows: list[tuple[str, str, str]] = []
    for check in checks:
        rows.append((check.status, check.name, check.detail))
        if check.hint and check.status != "ok":
            rows.append(("", "", check.hint))
    output.answer(json, {"checks": [vars(check) for check in checks]}, *output.table(rows), ok=code == 0, code=code)
    return code


def _tried(name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", look())
    except HarmonyError as error:
        return Check(name, "fail", error.message, error.hint)


def _packages() -> Check:
    found, missing = [], []
    for package in NEEDED:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        return Check("packages", "fail", f"missing: {', '.join(missing)}", "pip install " + " ".join(missing))
    return Check("packages", "ok", ", ".join(found))


def _alias() -> str:
    check_alias_package()
    return "the alias package is ours"


def _home() -> list[Check]:
    found = _tried("home", lambda: str(Home.open().path))
    return [found, _locks(Home.open())] if found.status == "ok" else [found]


def _locks(home: Home) -> Check:
    """Check that a lock held elsewhere is refused: on some network disks every lock succeeds."""
    hint = "put ADAPTIVE_HOME on a local disk"
    try:
        with tempfile.NamedTemporaryFile(dir=home.locks) as first, open(first.name) as second:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return Check("locks", "ok", "file locks hold")
    except OSError as error:
        return Check("locks", "fail", f"no file locks under {home.locks}: {error}", hint)
    return Check("locks", "warn", "file locks do not hold", hint)


def _machine() -> list[Check]:
    path, shm = expanded(os.environ.get("ADAPTIVE_HOME") or "~/.adaptive"), Path("/dev/shm")
    while not path.exists() and path != path.parent:
        path = path.parent
    disk, memory = shutil.disk_usage(path).free, host_capacity()
    if os.access(shm, os.W_OK):
        free = shutil.disk_usage(shm).free
        hint = "in a container: --shm-size=1g; NCCL needs it with several GPUs"
        shared = _check("/dev/shm", free >= SHM_BYTES, f"{format_size(free)} free", hint)
    else:
        status: Status = "fail" if sys.platform == "linux" else "warn"
        shared = Check("/dev/shm", status, "not writable", "mount a tmpfs there")
    return [
        _check("disk", disk > DISK_BYTES, f"{format_size(disk)} free", "models need room"),
        shared,
        _check("memory", memory >= 2 * 2**30, f"{format_size(memory)} for models", "close other programs"),
        _network(),
    ]


def _network() -> Check:
    """The network interfaces that a run listens on, and the variables that change them."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    chosen = {name: value for name in names if (value := os.environ.get(name)) and value != loopback_interface()}
    where = " and ".join(f"{name}={value}" for name, value in chosen.items()) or "the loopback interface"
    ports = f"a run listens on {where}: ports of gloo, shut once the ranks have met, and of NCCL between GPUs"
    return _check("network", not chosen, ports, "unset it: a run needs the loopback interface only")


def _compiler() -> list[Check]:
    compiler, header = find_compiler(), find_headers()
    why = "without it layers run uncompiled on CUDA; CPU does not need it"
    return [
        _check("compiler", bool(compiler), compiler or "no C compiler", why),
        _check("headers", bool(header), str(header or "no Python.h"), why),
    ]


def _torch() -> list[Check]:
    """Check torch in a subprocess: importing it takes seconds, and a broken build may crash the process."""
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
    """The CUDA devices, and why they are missing although there is a driver."""
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
    """The output of a command; None if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
