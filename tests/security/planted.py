"""Breaches on purpose, one of each kind: what the watch has to see."""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def _writes_outside() -> None:
    Path("../../outside").write_text("x")


def _writes_outside_unseen() -> None:
    ctypes.CDLL(None).creat(b"../../outside", 0o600)


def _moves_outside() -> None:
    Path("x").touch()
    os.rename("x", "../../outside")


def _runs_code() -> None:
    Path("evil.py").write_text("1")
    runpy.run_path(os.path.abspath("evil.py"))


def _springs_a_trap() -> None:
    Path("canary").touch()


def _starts_a_program() -> None:
    subprocess.run(["true"], check=True)


def _connects() -> None:
    socket.create_connection(("127.0.0.1", 9))


def _unpickles() -> None:
    sys.audit("pickle.find_class", "os", "system")


def _raises() -> None:
    raise ValueError("planted")


def _crashes() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _takes_memory() -> None:
    bytearray(2 << 30)


def _works_for_ever() -> None:
    while True:
        pass


def _stays() -> None:
    if not ctypes.CDLL(None).fork():
        signal.pause()


def _is_a_bug() -> int:
    return 70


PLANTED: dict[str, Callable[[], int | None]] = {
    "opens": _writes_outside,
    "wrote outside": _writes_outside_unseen,
    "os.rename": _moves_outside,
    "compile of": _runs_code,
    "canary": _springs_a_trap,
    "starts": _starts_a_program,
    "socket.getaddrinfo": _connects,
    "pickle.find_class": _unpickles,
    "Traceback": _raises,
    "ended with -11": _crashes,
    "said": _takes_memory,
    "ended with -24": _works_for_ever,
    "left running": _stays,
    "ended with 70": _is_a_bug,
}
"""What the watch says of it -> what is done."""
