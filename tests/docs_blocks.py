"""Fenced blocks of the documentation: sessions to run, and files that they use.

A comment on the line before a fence says what is special about a block, several things with commas:

    slow                 it belongs to the slow tests
    file: NAME           the block is a file of that name, beside the sessions of its page
    exit: N              each command of the session ends with N
    hub: ORG/NAME        a hub on this machine serves a small model under that name
    needs: PACKAGE       the session needs an optional package
    shape: KIND          each line is a row of a dataset, of that kind
    elsewhere: FILE      the commands are run by that file
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(
    r"(?:^<!-- (?P<notes>[^\n]*?) -->\n)?^```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)
_NOTES = {"elsewhere", "exit", "file", "hub", "needs", "shape", "slow"}


@dataclass(frozen=True)
class Block:
    """One fenced block. `kind` is the fence's language; `notes` what the comment before it says."""

    page: str
    line: int
    kind: str
    body: str
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def commands(self) -> list[str]:
        """What a session's lines with a prompt type."""
        return [line.removeprefix("$ ") for line in self.body.splitlines() if line.startswith("$ ")]


def blocks_in(text: str, page: str) -> list[Block]:
    """Every fenced block of a page."""
    found = []
    for match in _BLOCK.finditer(text):
        notes = {}
        for note in (match["notes"] or "").split(","):
            name, _, value = note.strip().partition(": ")
            if name:
                assert name in _NOTES, f"{page}: what does {note!r} mean?"
                notes[name] = value
        found.append(Block(page, text.count("\n", 0, match.start()) + 1, match["kind"], match["body"], notes))
    return found


def all_blocks() -> list[Block]:
    """Every fenced block of README.md and docs/."""
    return [block for page in PAGES for block in blocks_in(page.read_text("utf-8"), page.relative_to(ROOT).as_posix())]
