"""`python -m harmony_core.launch.stub PARENT COMMAND...`: become COMMAND, ended by the kernel when PARENT ends.

A child that asked for this before exec needs no code between fork and exec in the parent, which may have threads.
"""

from __future__ import annotations

import os
import signal
import sys

from harmony_core.rpc.platform import die_with_parent


def main() -> None:
    """Ask for the signal, see that the parent is still there, exec."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if not die_with_parent(parent, signal.SIGTERM):
        sys.exit(0)
    os.environ["ADAPTIVE_LAUNCHER_PID"] = str(os.getpid())
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
