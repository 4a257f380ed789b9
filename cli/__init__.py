"""The `adaptive` command: a thin layer over `harmony_core`."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

from .output import Signals, Streams


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` by default) and return its exit code.

    With `argv` the process is the caller's, and its streams and signals are left alone.
    """
    if sys.platform == "win32":
        sys.stderr.write("error: harmony-core does not run on Windows itself\nhint: use it inside WSL\n")
        return 4
    words = list(sys.argv[1:] if argv is None else argv)
    signals, streams = Signals(), Streams()
    try:
        if argv is None:
            signals.install()
            streams.install()
        if words[:1] == ["--version"]:
            from harmony_core import __version__

            sys.stdout.write(f"harmony-core {__version__}\n")
            return 0
        from .app import dispatch

        return dispatch(words, signals, streams)
    except KeyboardInterrupt as error:
        return int(getattr(error, "exit_code", 130))
    except OSError as error:  # too few descriptors even to load the code that reports it
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        sys.stderr.write(f"error: {error.strerror}: {error.filename}\nhint: allow more open files: ulimit -n 4096\n")
        return 4
