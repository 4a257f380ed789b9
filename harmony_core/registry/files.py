"""Files of the registry: durable writes, cheap copies, hashes, and the hands off symbolic links."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from harmony_core.errors import HarmonyError, ResourceError, VerificationError
from harmony_core.home import Home

_FICLONE = 0x40049409  # linux/fs.h: share the blocks of another file, on filesystems that can
SMALL_BYTES = 1024 * 1024
"""Up to here a file is hashed whenever it is looked at."""
_HASH_CHUNK = 8 * 1024 * 1024


def storage_error(doing: str, error: OSError) -> HarmonyError:
    """The typed error for a failing disk: what was being done, where, and the system's reason."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    where = f" ({error.filename})" if error.filename else ""
    return ResourceError(
        f"{doing}: {error.strerror or error}{where}",
        hint="free some space and try again; nothing stored before was touched" if full else "",
        errno=error.errno or 0,
    )


def fsync_path(path: Path) -> None:
    """Make a file's content, or a directory's entries, survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object, durable: bool = True) -> None:
    """Replace a small file atomically and, with `durable`, past a power loss; permissions as the umask says."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        fsync_path(path.parent)


def place_file(source: Path, target: Path, share: bool) -> None:
    """Put a copy of `source` at `target`; with `share`, as a reflink or a hard link where that works."""
    real = source.resolve(strict=True)
    if share:
        if _reflink(real, target):
            return
        with contextlib.suppress(OSError):
            os.link(real, target)
            return
    shutil.copyfile(real, target)


def _reflink(source: Path, target: Path) -> bool:
    with source.open("rb") as reader, target.open("xb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
        except OSError:
            target.unlink()
            return False
    return True


def file_hash(path: Path, home: Home | None = None) -> str:
    """sha256 of a file, in hex. With a home, a large file's is remembered there by inode, time of change and size."""
    state = path.stat()
    name = f"{state.st_dev:x}-{state.st_ino:x}.json"
    memory = home.cache / "hashes" / name if home and state.st_size > SMALL_BYTES else None
    identity = [state.st_mtime_ns, state.st_size]
    if memory:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            known = json.loads(memory.read_text(encoding="utf-8"))
            if known["identity"] == identity:
                return str(known["sha256"])
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    if memory:
        # Only a shortcut: a home that cannot be written must not fail a verification.
        with contextlib.suppress(OSError):
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, {"identity": identity, "sha256": digest.hexdigest()}, durable=False)
    return digest.hexdigest()


def refuse_links(root: Path, path: Path) -> None:
    """Raise VerificationError when a component of `path` below `root` is a symbolic link."""
    current = root
    for part in path.relative_to(root).parts:
        current = current / part
        if current.is_symlink():
            raise VerificationError(
                f"{current} is a symbolic link, which the registry does not follow",
                hint="remove the link; weights kept elsewhere are added with --reference",
            )


def discard(home: Home, path: Path) -> None:
    """Delete a directory: out of sight in one step, then for good. Links inside are removed, not followed."""
    grave = home.trash / uuid.uuid4().hex
    os.rename(path, grave)
    shutil.rmtree(grave, ignore_errors=True)


def retry_missing(action: Callable[[], None]) -> None:
    """Repeat an action that fails because another process removed a directory under it."""
    for _ in range(100):
        with contextlib.suppress(FileNotFoundError):
            return action()
    action()


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock while reading and rewriting a small file. On a disk without locks it does nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
