"""The short-lived directory of a launch: socket, launcher's configuration, torch elastic's files.

It lies outside the run directory because a socket's path may not exceed about 100 bytes. It is removed as soon as all
ranks are connected, and where the process is ended at once; what a killed driver left behind, the next launch sweeps.
An engine without a run has one for its logs, too.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

from harmony_core.rpc.platform import start_time

_PREFIX = "adaptive-"
_OWNER = "owner"
_LONGEST_BASE = 64
_own: set[Path] = set()


def create() -> Path:
    """A new directory that only this user can enter; abandoned ones are swept."""
    base = _base()
    _sweep(base)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    _own.add(directory)
    (directory / _OWNER).write_text(f"{os.getpid()} {start_time(os.getpid())}")
    return directory


def remove(directory: Path) -> None:
    """Remove it; that it is gone already is no error."""
    shutil.rmtree(directory, ignore_errors=True)
    _own.discard(directory)


def remove_own() -> None:
    """Remove what this process has made: for the end of a process that cleans up no further."""
    for directory in list(_own):
        remove(directory)


def _base() -> Path:
    """XDG_RUNTIME_DIR where it is ours and short enough, else /tmp, whatever TMPDIR says: paths must stay short."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and len(os.fsencode(runtime)) <= _LONGEST_BASE and os.access(runtime, os.W_OK | os.X_OK):
        status = os.stat(runtime)
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid():
            return Path(runtime)
    return Path("/tmp") if os.access("/tmp", os.W_OK) else Path(tempfile.gettempdir())


def _sweep(base: Path) -> None:
    for directory in base.glob(_PREFIX + "*"):
        if _abandoned(directory):
            remove(directory)


def _abandoned(directory: Path) -> bool:
    """Whether it is ours, and the process that made it is gone for certain."""
    try:
        status = directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return False
        pid, started = (directory / _OWNER).read_text().split(" ")
        return bool(started) and start_time(int(pid)) != started
    except (OSError, ValueError):
        return False
