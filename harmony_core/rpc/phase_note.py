"""What a rank does now, in a file that both sides hold open. A beat says it once a second; a rank dies in between."""

from __future__ import annotations

import os
from pathlib import Path

_BYTES = 64


class PhaseNote:
    """The note of one rank, beside the socket. It stays readable when the rank is dead and the file is removed."""

    def __init__(self, socket: str | Path, rank: int) -> None:
        self._file = os.open(Path(socket).with_name(f"phase-{rank}"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, phase: str) -> None:
        """Replace the note; about a microsecond."""
        os.pwrite(self._file, phase.encode()[:_BYTES].ljust(_BYTES), 0)

    def read(self) -> str:
        """What was written last, "" before that and once it is closed."""
        return "" if self._file < 0 else os.pread(self._file, _BYTES, 0).decode("utf-8", "replace").strip()

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)
        self._file = -1
