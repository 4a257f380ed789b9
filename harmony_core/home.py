"""The home directory of this machine: models, runs, and files that are being written.

It defines paths and the format version; the format of the files belongs to their modules.
"""

from __future__ import annotations

import os
from pathlib import Path

from harmony_core.errors import ResourceError
from harmony_core.plain_files import expanded, write_text

ENVIRONMENT = "ADAPTIVE_HOME"
FORMAT = 1


class Home:
    """The home directory. Everything below it is addressed relative to it, so that `mv` moves it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.models = path / "models"
        """Published models, one directory for each key."""
        self.staging = path / "staging"
        """Versions that are being written; on the same filesystem as `models`."""
        self.runs = path / "runs"
        """One directory for each run."""
        self.locks = path / "locks"
        self.cache = path / "cache"
        """Files that can be made again: generated models, hashes."""
        self.trash = path / "trash"
        """Directories that are being deleted."""

    @classmethod
    def open(cls, path: Path | str | None = None, writes: bool = True) -> Home:
        """The given directory, else `$ADAPTIVE_HOME`, else `~/.adaptive`; created when it is missing.

        Raises ResourceError for a home of a newer version, and for one that cannot be written; with `writes=False` a
        readable one is enough.
        """
        chosen = expanded(path or os.environ.get(ENVIRONMENT) or "~/.adaptive")
        home = cls(Path(os.path.abspath(chosen)))
        try:
            home._create()
        except OSError as error:
            if not writes and os.access(home.path, os.R_OK | os.X_OK):
                return home
            raise ResourceError(
                f"the home directory {home.path} cannot be used: {error.strerror or error}",
                hint=f"set {ENVIRONMENT} to a directory that you can write",
                path=str(home.path),
            ) from error
        return home

    def _create(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        version = self.path / "VERSION"
        try:
            text = version.read_text(encoding="utf-8", errors="replace").strip()
        except FileNotFoundError:
            text = str(FORMAT)
            write_text(version, f"{text}\n")  # another process may open the same new home at this moment
        if text != str(FORMAT):
            raise ResourceError(
                f"the home directory {self.path} has format {text[:40]!r}, and this version reads format {FORMAT}",
                hint=f"upgrade harmony-core, or set {ENVIRONMENT} to another directory",
                path=str(self.path),
            )
        for directory in (self.models, self.staging, self.runs, self.locks, self.cache, self.trash):
            directory.mkdir(exist_ok=True)
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise PermissionError(13, "it is not writable")
