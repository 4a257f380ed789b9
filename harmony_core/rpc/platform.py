"""Everything that depends on the machine: calls that only Linux has, and the tools for making code at run time.

Death signals, peer credentials and /proc do nothing or return "unknown" on other systems. No other module checks
which system it runs on.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import struct
import sys
import sysconfig
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
_SO_ATTACH_FILTER = 26


def die_with_parent(parent: int, signal_number: int = signal.SIGKILL) -> bool:
    """Ask the kernel to signal this process when the thread that started it ends. False: `parent` is already gone.

    The request is lost by fork, kept by exec. The parent is compared with the expected process, never with 1: in a
    container the parent may be process 1.
    """
    if LINUX:
        _libc.prctl(_PR_SET_PDEATHSIG, int(signal_number))
    return os.getppid() == parent


def peer(sock: socket.socket) -> tuple[int, int] | None:
    """(pid, uid) of the process at the other end of a unix socket; None if the system does not provide it."""
    if not LINUX:
        return None
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", credentials)
    return pid, uid


def _stat_fields(pid: int) -> list[str]:
    """/proc/<pid>/stat from the state on (field 3), or an empty result."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return []


def state(pid: int) -> str:
    """One letter: R running, S asleep, D in the kernel, T stopped, Z dead and not yet collected; "" unknown or gone."""
    fields = _stat_fields(pid)
    return fields[0] if fields else ""


def is_ending(pid: int) -> bool:
    """Whether a process is exiting: the kernel signals its children before its own exit can be collected."""
    fields = _stat_fields(pid)
    return len(fields) > 6 and bool(int(fields[6]) & _PF_EXITING)


def start_time(pid: int) -> str:
    """The start time of the process in kernel ticks, "" if unknown. With the pid it identifies one process for ever."""
    fields = _stat_fields(pid)
    return fields[19] if len(fields) > 19 else ""


def zombie_status(pid: int) -> int | None:
    """Exit status of a process that is not collected yet; negative for a signal, as in subprocess."""
    fields = _stat_fields(pid)
    if len(fields) < 50 or fields[0] not in "ZX":
        return None
    return os.waitstatus_to_exitcode(int(fields[49]))


def oom_kills() -> int:
    """Number of processes that the kernel has killed for lack of memory since it started; 0 if unknown."""
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


def _sockets() -> Iterator[tuple[int, str]]:
    """Descriptor and inode of each socket of this process."""
    descriptors = _PROC / "self/fd"
    for entry in descriptors.iterdir() if descriptors.exists() else ():
        with contextlib.suppress(OSError):
            kind, _, inode = os.readlink(entry).partition(":")
            if kind == "socket":
                yield int(entry.name), inode.strip("[]")


def listening_sockets() -> set[int]:
    """Descriptors of this process's TCP sockets that accept connections."""
    found = set()
    for descriptor, _ in _sockets():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as sock:
            if sock.family != socket.AF_UNIX and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                found.add(descriptor)
    return found


def drop_connections(descriptor: int) -> None:
    """Make the kernel drop every packet for a listening socket; its owner sees no difference."""
    nothing = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # a filter's "return 0 bytes"
    # A sandbox without filters has a network of its own.
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(nothing)))


def foreign_peers() -> list[int]:
    """Other users' ids at the local ends of this process's TCP connections."""
    mapped = "0000000000000000FFFF0000"  # an IPv4 address as an IPv6 one
    tables = (_PROC / "self/net/tcp", _PROC / "self/net/tcp6")
    lines = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    rows = [(row[1].removeprefix(mapped), row[2].removeprefix(mapped), int(row[7]), row[9]) for row in lines]
    # A connection that its listener has not accepted yet has no inode and no meaningful owner.
    owner = {(local, remote): uid for local, remote, uid, inode in rows if inode != "0"}
    ours = {inode for _, inode in _sockets()}
    found = {owner.get((remote, local), os.geteuid()) for local, remote, _, inode in rows if inode in ours}
    return sorted(found - {os.geteuid()})


def processor_vendor() -> str:
    """The processor's vendor as reported by the kernel, such as "AuthenticAMD"; "" if unknown."""
    try:
        lines = (_PROC / "cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def set_heap_limits(mapped: int, trimmed: int) -> None:
    """Set the size in bytes from which allocations are mapped one by one, and the free bytes kept at the heap's end."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_MMAP_THRESHOLD, mapped)
        _libc.mallopt(_M_TRIM_THRESHOLD, trimmed)


def trim_heap() -> None:
    """Return unused pages of the heap to the system."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)


def find_compiler() -> str | None:
    """The C compiler that Triton and inductor would find, or None."""
    for name in (os.environ.get("CC", ""), "gcc", "cc", "clang"):
        found = shutil.which(name.split()[0]) if name.strip() else None
        if found is not None:
            return found
    return None


def find_headers() -> Path | None:
    """Python.h, needed to compile the code that launches kernels; None if it is not installed."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    return header if header.is_file() else None


def missing_tool() -> str:
    """The missing tool for compiling layers, in words: a C compiler or Python's headers; "" if both are there."""
    if find_compiler() is None:
        return "no C compiler"
    return "" if find_headers() is not None else "no Python.h"
