"""The documented path of the limits with which threads are shown."""

from __future__ import annotations

import textwrap

WRAP_WIDTH = 90
"""Characters of a line; longer lines are wrapped."""
MAX_TOOL_RESPONSE_LEN = 500
"""Characters shown of a tool's response."""


def wrapped(line: str) -> str:
    """The line in lines of at most WRAP_WIDTH characters, the later ones indented; spaces in it are kept."""
    return "\n    ".join(textwrap.wrap(line, WRAP_WIDTH, drop_whitespace=False, replace_whitespace=False) or [line])
