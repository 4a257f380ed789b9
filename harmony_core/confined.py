"""Work on untrusted files in a separate process: no input, a deadline, limits, and an end with its parent.

`python -m harmony_core.confined PARENT MEMORY SECONDS MODULE ARGUMENTS...` runs a module this way. Its result is its
last line of output, JSON: {"ok": true, ...} or {"error": {"type": ..., "message": ..., "hint": ...}}.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harmony_core.errors import HarmonyError, InternalError, ResourceError, VerificationError, all_errors
from harmony_core.plain_files import last_lines
from harmony_core.rpc.platform import die_with_parent


@dataclass(frozen=True)
class Limits:
    """Limits of one process: bytes that it may allocate, seconds of CPU time, and seconds in all."""

    memory: int
    work: int
    seconds: float


def run(module: str, arguments: list[str], limits: Limits, subject: Path, doing: str) -> dict[str, Any]:
    """Run the module and return its answer. Raises the error in the answer, or VerificationError without an answer.

    `doing` describes the work on `subject` in errors, such as "reading it".
    """
    # -P: a file in the working directory must not replace a package.
    command = [sys.executable, "-P", "-m", __name__, str(os.getpid()), str(limits.memory), str(limits.work), module]
    offline = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # One thread each: the stacks and buffers of a pool as wide as the machine would count towards the memory limit.
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [*command, *arguments],
            env=os.environ | offline | single | {"MALLOC_ARENA_MAX": "1"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            start_new_session=True,
        )
        try:
            status = child.wait(limits.seconds)
        except BaseException as error:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise VerificationError(f"{subject}: {doing} takes longer than {limits.seconds:.0f} s") from None
            raise
        lines, printed = ([line.rstrip() for line in last_lines(file) if line.strip()] for file in (out, log))
    try:
        found = json.loads(lines[-1]) if lines else {}
    except ValueError:
        found = {}
    if not isinstance(found, dict) or not found.keys() & {"ok", "error"}:
        raise _ended(status, limits, f"{subject}: {doing}")
    if told := found.get("error"):
        # The libraries' errors refer to their earlier prints.
        logged = [line for line in printed if "it/s]" not in line][-15:] if told.get("logged") else []
        kind = all_errors().get(str(told.get("type")), InternalError)
        raise kind("\n".join([str(told.get("message")), *logged]), hint=str(told.get("hint", "")))
    return found


def answer(error: HarmonyError | None = None, logged: bool = False) -> None:
    """Print the child's last line: success, or its error. With `logged`, earlier prints belong to the error."""
    found: dict[str, Any] = {"ok": True}
    if error:
        told = {"type": type(error).__name__, "message": error.message, "hint": error.hint, "logged": logged}
        found = {"error": told}
    sys.stdout.write(json.dumps(found) + "\n")


def _ended(status: int, limits: Limits, what: str) -> VerificationError | ResourceError:
    """The error for a process without an answer. The prints of a crashing library are left out."""
    if status == -signal.SIGKILL:
        return ResourceError(f"{what}: the process was killed, most likely for want of memory")
    if status == -signal.SIGXCPU:
        return VerificationError(f"{what} takes more than {limits.work} s of a processor's time")
    room = f"{limits.memory / 2**30:.1f} GiB"
    return VerificationError(
        f"{what} fails: the library broke down over it (status {status}), or {room} of memory are not enough"
    )


def main() -> None:
    """The child: take the limits, then become the module."""
    parent, memory, work, module, *arguments = sys.argv[1:]
    if not die_with_parent(int(parent)):
        sys.exit(1)
    wanted = {resource.RLIMIT_CORE: 0, resource.RLIMIT_DATA: int(memory), resource.RLIMIT_CPU: int(work)}
    for kind, value in wanted.items():
        most = resource.getrlimit(kind)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, most))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
