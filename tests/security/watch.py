"""What a command must not do, told by Python's own events: a breach is written down and refused.

It is installed in the command and, as `sitecustomize`, in whatever that starts. Nothing of the project is imported.
"""

from __future__ import annotations

import os
import sys
from typing import Any

FOLDER, RECORD = "ADAPTIVE_TEST_FOLDER", "ADAPTIVE_TEST_RECORD"
"""Names of the variables with the only folder that may be written to, and the file that breaches are written to."""

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    **dict.fromkeys(("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "os.utime"), (0,)),
    "os.rename": (0, 1),
    "os.link": (1,),
    "os.symlink": (1,),
}
"""What changes files -> which of its arguments name them."""
_NEVER = {
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn", "pickle.find_class"),
    *("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo"),
}
_CODE = {"compile": 1, "import": 1, "ctypes.dlopen": 0}
"""What makes code of a file -> which of its arguments names it."""
_OURS = ([sys.executable, "-P", "-m", "harmony_core.confined"], ["nvidia-smi", "-L"])


def watch() -> None:
    """From now on, for as long as the process lives."""
    folder = os.environ[FOLDER]
    record = os.open(os.environ[RECORD], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def heed(event: str, arguments: tuple[Any, ...]) -> None:
        breach = _breach(event, arguments, folder)
        if breach:
            os.write(record, f"{breach}\n".encode("utf-8", "replace"))
            raise PermissionError(breach)

    sys.addaudithook(heed)


def _breach(event: str, arguments: tuple[Any, ...], folder: str) -> str:
    """What an event does that is forbidden, or ""."""
    if event in _NEVER:
        return f"{event}{arguments!r:.300}"
    if event == "subprocess.Popen" and [*map(str, arguments[1])][:4] not in _OURS:
        return f"starts {arguments[1]!r:.300}"
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
        path = arguments[0]
        if isinstance(path, str | bytes) and os.fsdecode(path) != os.devnull and not _lies_in(path, folder):
            return f"opens {path!r} for writing"
    for at in _CHANGES.get(event, ()):
        # The last arguments are the descriptors of folders that relative paths start from, or -1.
        start = -1 if event == "os.truncate" else arguments[-2 if (event, at) == ("os.rename", 0) else -1]
        if isinstance(arguments[at], str | bytes) and not _parent_lies_in(arguments[at], start, folder):
            return f"{event}{arguments!r:.300}"
    name = arguments[0].co_filename if event == "exec" else arguments[_CODE[event]] if event in _CODE else ""
    if event == "ctypes.dlopen" and "/" not in str(name):
        return ""  # looked for where libraries are
    if isinstance(name, str) and name and not name.startswith("<") and _lies_in(name, folder):
        return f"{event} of {name!r}"
    return ""


def _lies_in(path: str | bytes, folder: str) -> bool:
    return f"{os.path.realpath(os.fsdecode(path))}/".startswith(f"{folder}/")


def _parent_lies_in(path: str | bytes, start: object, folder: str) -> bool:
    """Of a name that is made or removed: a link is not followed."""
    base = os.readlink(f"/proc/self/fd/{start}") if isinstance(start, int) and start >= 0 else os.getcwd()
    return _lies_in(os.path.dirname(os.path.join(base, os.fsdecode(path))), folder)


if __name__ == "sitecustomize" and FOLDER in os.environ:
    watch()
