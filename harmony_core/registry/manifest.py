"""manifest.json, the last file written into a version: what its bytes are and where they come from.

A directory without a manifest is not a version.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec

from harmony_core.errors import VerificationError
from harmony_core.home import Home
from harmony_core.registry.files import SMALL_BYTES, file_hash
from harmony_core.weight_files import PICKLE_SUFFIXES, damaged

NAME = "manifest.json"
FORMAT = 1
CONFIGS = {"hf": "config.json", "peft": "adapter_config.json"}


class FileRecord(msgspec.Struct, frozen=True):
    """One file: its path within the version, size in bytes, sha256 in hex."""

    path: str
    size: int
    sha256: str


class BaseRecord(msgspec.Struct, frozen=True):
    """What an adapter belongs to."""

    ref: str
    digest: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The record of one version."""

    manifest: int = FORMAT
    key: str
    format: str
    kind: str
    digest: str
    files: tuple[FileRecord, ...]
    base: BaseRecord | None = None
    location: str = ""
    """Where the files are, when they were left in place (`--reference`); "" for beside the manifest."""
    source: str = ""
    parent: str = ""
    run_id: str = ""
    step: int | None = None
    notes: tuple[str, ...] = ()
    created: str = ""
    harmony_core: str = ""


def list_files(directory: Path) -> list[Path]:
    """The files below a directory, sorted. Refuses links, special files and pickled files."""
    found: list[Path] = []
    for parent, directories, names in os.walk(directory):
        for name in directories + names:
            path = Path(parent, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise damaged(path, "neither a plain file nor a directory")
            if path.suffix in PICKLE_SUFFIXES:
                raise damaged(path, "a file of a pickled kind, which is never read")
        found.extend(Path(parent, name) for name in names)
    return sorted(path for path in found if path != directory / NAME)


def record_files(directory: Path, paths: list[Path], home: Home | None = None) -> tuple[FileRecord, ...]:
    """Size and hash of each file."""
    return tuple(
        FileRecord(path.relative_to(directory).as_posix(), path.stat().st_size, file_hash(path, home)) for path in paths
    )


def digest_of(format: str, files: tuple[FileRecord, ...]) -> str:
    """sha256 over the hashes of the config and the top-level weights: equal digests load to equal models."""
    weights = "adapter_model" if format == "peft" else "model"
    parts = [
        f"{record.path} {record.sha256}\n"
        for record in sorted(files, key=lambda record: record.path)
        if record.path == CONFIGS[format]
        or ("/" not in record.path and record.path.startswith(weights) and record.path.endswith(".safetensors"))
    ]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def read_manifest(directory: Path, key: str) -> Manifest:
    """The manifest of a version directory of `key`. Raises VerificationError."""
    path = directory / NAME
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise damaged(path, f"not a manifest ({error})") from error
    if manifest.manifest != FORMAT:
        raise damaged(path, f"written by a newer version (format {manifest.manifest})")
    if manifest.key != key:
        raise damaged(path, f"was published as {manifest.key!r}, and lies under {key!r}")
    if manifest.format not in CONFIGS or not manifest.files:
        raise damaged(path, f"unknown format {manifest.format!r}, or no files")
    if manifest.digest != digest_of(manifest.format, manifest.files):
        raise damaged(path, "its digest does not belong to its files")
    for record in manifest.files:
        if record.path.startswith("/") or ".." in Path(record.path).parts:
            raise damaged(path, f"file name {record.path[:100]!r} leads elsewhere")
    return manifest


def check_files(directory: Path, manifest: Manifest, full: bool, home: Home | None = None) -> None:
    """Compare the files with the record: sizes, and hashes of small files; with `full`, every hash."""
    for record in manifest.files:
        path = directory / record.path
        try:
            size = path.stat().st_size
            due = size == record.size and (full or size <= SMALL_BYTES)
            found = file_hash(path, home) if due else record.sha256
        except OSError as error:
            raise damaged(path, error.strerror or str(error)) from error
        if size != record.size:
            raise damaged(path, f"{size} bytes, and {record.size} were recorded")
        if found != record.sha256:
            raise VerificationError(
                f"{path}: its content differs from what was recorded (sha256 {found[:12]}, not {record.sha256[:12]})",
                hint="add the model again, or restore the file",
                path=str(path),
                reason="content",
            )
