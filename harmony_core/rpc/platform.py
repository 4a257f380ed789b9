"""Every call that only Linux has: death signals, peer credentials, process handles, /proc.

Elsewhere each of them does nothing or answers "unknown"; nothing else in the project asks which system it runs on.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LINUX = sys.platform == "linux"
_libc: Any = ctypes.CDLL(None) if os.name == "posix" else None
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_PR_SET_PDEATHSIG = 1
_PF_EXITING = 0x4
_PROC = Path("/proc")


def die_with_parent(parent: int, signal_number: int = signal.SIGKILL) -> bool:
    """Ask the kernel to signal this process when the thread that started it ends. False: `parent` is gone already.

    The request is lost by fork, kept by exec. The parent is compared with the process that is expected, never with 1:
    in a container the parent may well be process 1.
    """
    if LINUX:
        _libc.prctl(_PR_SET_PDEATHSIG, int(signal_number))
    return os.getppid() == parent


def peer(sock: socket.socket) -> tuple[int, int] | None:
    """(pid, uid) of the process at the other end of a unix socket; None where the system does not tell."""
    if not LINUX:
        return None
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", credentials)
    return pid, uid


class ProcessHandle:
    """One process, held so that its number cannot come to mean another one (a pidfd, where there is one)."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._descriptor = -1
        self._gone = False
        if LINUX:
            try:
                self._descriptor = os.pidfd_open(pid)
            except OSError:
                self._gone = True

    def alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        if self._gone:
            return False
        if self._descriptor >= 0:
            poll = select.poll()
            poll.register(self._descriptor, select.POLLIN)
            self._gone = bool(poll.poll(0))
        else:
            try:
                os.kill(self.pid, 0)
            except OSError:
                self._gone = True
        return not self._gone

    def send(self, signal_number: int) -> None:
        """Signal it if it still runs."""
        if not self.alive():
            return
        try:
            if self._descriptor >= 0:
                signal.pidfd_send_signal(self._descriptor, signal_number)
            else:
                os.kill(self.pid, signal_number)
        except ProcessLookupError:
            self._gone = True

    def close(self) -> None:
        """Let go of the handle; the process is not touched."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self._gone = True


def _stat_fields(pid: int) -> list[str]:
    """/proc/<pid>/stat from the state on (field 3), or nothing."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return []


def state(pid: int) -> str:
    """One letter: R running, S asleep, D in the kernel, T stopped, Z dead and not yet collected; "" unknown or gone."""
    fields = _stat_fields(pid)
    return fields[0] if fields else ""


def is_ending(pid: int) -> bool:
    """Whether a process is on its way out: the kernel signals its children before its own exit can be collected."""
    fields = _stat_fields(pid)
    return len(fields) > 6 and bool(int(fields[6]) & _PF_EXITING)


def start_time(pid: int) -> str:
    """When the process started, in the kernel's ticks: with the pid it names one process for ever. "" unknown."""
    fields = _stat_fields(pid)
    return fields[19] if len(fields) > 19 else ""


def zombie_status(pid: int) -> int | None:
    """Exit status of a process that nobody has collected yet: negative for a signal, as subprocess has it."""
    fields = _stat_fields(pid)
    if len(fields) < 50 or fields[0] not in "ZX":
        return None
    return os.waitstatus_to_exitcode(int(fields[49]))


def processes_with(variable: str, value: str) -> Iterator[int]:
    """Pids whose starting environment holds `variable=value`: those that were started by whoever made it up."""
    if not LINUX:
        return
    wanted = f"{variable}={value}".encode()
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if wanted in environment.split(b"\0"):
            yield int(entry.name)


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since it started; 0 where it does not say."""
    try:
        for line in (_PROC / "vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def loopback_interface() -> str:
    """The name of the loopback interface when it is the usual one, else ""."""
    return "lo" if Path("/sys/class/net/lo").exists() else ""


def processor_vendor() -> str:
    """The maker of the processor as the kernel names it, such as "AuthenticAMD"; "" where the system does not tell."""
    try:
        lines = (_PROC / "cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def set_heap_limits(mapped: int, trimmed: int) -> None:
    """What the C library asks of the system piece by piece, in bytes, and how much it keeps free at the heap's end."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_MMAP_THRESHOLD, mapped)
        _libc.mallopt(_M_TRIM_THRESHOLD, trimmed)


def trim_heap() -> None:
    """Give the pages of the heap that hold nothing back to the system."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
