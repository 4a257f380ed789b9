"""manifest.json, the last file written into a version: what its bytes are and where they come from.

A directory without a manifest is not a version.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from harmony_core.errors import VerificationError
from harmony_core.model.weight_files import PICKLE_SUFFIXES, model_names
from harmony_core.plain_files import MIB, damaged, file_hash, read_struct
from harmony_core.registry.keys import BUILTIN

NAME = "manifest.json"
FORMAT = 1
OPTIMIZER = "optimizer.safetensors"
"""What a save may leave beside the weights."""
SMALL_BYTES = MIB
"""Up to here a file is hashed whenever it is looked at."""
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


def record_files(directory: Path, paths: list[Path]) -> tuple[FileRecord, ...]:
    """Size and hash of each file. Some are read at once: one thread hashes more slowly than most disks read."""
    with ThreadPoolExecutor(8) as pool:
        hashes = pool.map(file_hash, paths)
        return tuple(
            FileRecord(path.relative_to(directory).as_posix(), path.stat().st_size, digest)
            for path, digest in zip(paths, hashes, strict=True)
        )


def digest_of(format: str, files: tuple[FileRecord, ...]) -> str:
    """sha256 over the hashes of the config and the weights: equal digests load to equal models."""
    parts = [
        f"{record.path} {record.sha256}\n"
        for record in sorted(files, key=lambda record: record.path)
        if record.path == CONFIGS[format]
        or ("/" not in record.path and record.path.endswith(".safetensors") and record.path != OPTIMIZER)
    ]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def read_manifest(directory: Path, key: str) -> Manifest:
    """The manifest of a version directory of `key`. Raises VerificationError."""
    path = directory / NAME
    manifest = read_struct(path, Manifest, "a manifest")
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
    if manifest.location and not _was_added(manifest):
        raise damaged(path, f"its location {manifest.location[:200]!r} is not what was added ({manifest.source[:200]})")
    return manifest


def _was_added(manifest: Manifest) -> bool:
    """Whether the location of a version that was left in place is that of its source, and no link on the way is new."""
    name = Path(manifest.location).name
    if os.path.realpath(manifest.location) != manifest.location:
        return False
    if manifest.source.startswith("hf:"):
        return name == manifest.source.rpartition("@")[2]
    if manifest.source.startswith(BUILTIN):
        return name.rpartition("-")[0] == manifest.source.removeprefix(BUILTIN)
    return manifest.location == manifest.source


def check_files(directory: Path, manifest: Manifest, full: bool = False, trusted: int = -1) -> None:
    """Compare the files with the record: sizes, and hashes of small files; with `full`, every hash.

    What would be read of the directory must be recorded; with `full` every file of one that is the registry's own. A
    large file that was last written at `trusted` (in nanoseconds since 1970) or before is not hashed.
    """
    own = [] if manifest.location else list_files(directory)
    for record in manifest.files:
        path = directory / record.path
        try:
            state = path.stat()
        except OSError as error:
            raise damaged(path, error.strerror or str(error)) from error
        if state.st_size != record.size:
            raise damaged(path, f"{state.st_size} bytes, and {record.size} were recorded")
        hashed = state.st_size <= SMALL_BYTES or (full and state.st_mtime_ns > trusted)
        if hashed and (found := file_hash(path)) != record.sha256:
            raise VerificationError(
                f"{path}: its content differs from what was recorded (sha256 {found[:12]}, not {record.sha256[:12]})",
                hint="add the model again, or restore the file",
                path=str(path),
                reason="content",
            )
    names = [path.relative_to(directory).as_posix() for path in own if full]
    spare = sorted({*names, *model_names(directory)} - {record.path for record in manifest.files})
    if spare:
        more = f" ({', '.join(spare[1:9])} neither)" if spare[1:] else ""
        raise damaged(directory / spare[0], f"is not in {NAME}{more}: remove it, or add the model again with it")
