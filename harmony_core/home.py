"""Where things lie on this machine: one directory that holds models, runs and what is being written.

It knows paths and the format version, not what is in the files.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from harmony_core.errors import ResourceError

ENVIRONMENT = "ADAPTIVE_HOME"
FORMAT = 1


@dataclass(frozen=True)
class Home:
    """The home directory. Everything below it is addressed relative to it, so that `mv` moves it."""

    path: Path

    @classmethod
    def open(cls, path: Path | str | None = None) -> Home:
        """The given directory, else `$ADAPTIVE_HOME`, else `~/.adaptive`; created when it is missing.

        Raises ResourceError when it cannot be written or was made by a newer version.
        """
        chosen = Path(path or os.environ.get(ENVIRONMENT) or "~/.adaptive").expanduser()
        home = cls(Path(os.path.abspath(chosen)))
        try:
            home._create()
        except OSError as error:
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
            text = self._write_version(version)
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

    def _write_version(self, version: Path) -> str:
        """Through a temporary name: another process may open the same new home at this moment."""
        text = str(FORMAT)
        temporary = version.with_name(f"VERSION.{os.getpid()}")
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, version)
        return text

    @property
    def models(self) -> Path:
        """Published models, one directory for each key."""
        return self.path / "models"

    @property
    def staging(self) -> Path:
        """Versions that are being written; on the same filesystem as `models`."""
        return self.path / "staging"

    @property
    def runs(self) -> Path:
        """One directory for each run."""
        return self.path / "runs"

    @property
    def locks(self) -> Path:
        """Lock files."""
        return self.path / "locks"

    @property
    def cache(self) -> Path:
        """What can be made again: generated models, hashes."""
        return self.path / "cache"

    @property
    def trash(self) -> Path:
        """What is being deleted."""
        return self.path / "trash"
