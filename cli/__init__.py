"""The `adaptive` command: parse, call, draw. What it calls lives in `harmony_core`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` by default) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        from harmony_core import __version__

        sys.stdout.write(f"harmony-core {__version__}\n")
        return 0
    if sys.platform == "win32":
        sys.stderr.write("error: harmony-core does not run on Windows itself\nhint: use it inside WSL\n")
        return 4
    from .app import dispatch

    return dispatch(words)
