"""Files on disk: bounded reading of plain files, durable writing, cheap copies, hashes and locks.

A file is read only if it is a plain file within a size limit and no link leads out of its directory. Every defect
raises a VerificationError that names the file and the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from enum import Enum
from io import BufferedReader
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from harmony_core.errors import ResourceError, VerificationError

if TYPE_CHECKING:
    from harmony_core.home import Home

T = TypeVar("T")

MIB = 1 << 20
MAX_BYTES = {"tokenizer.json": 64 * MIB, "model.safetensors.index.json": 64 * MIB, "manifest.json": 64 * MIB}
"""Maximum bytes of a file that is read, by its name."""
MAX_OTHER = 16 * MIB
"""Maximum bytes of every other file that is read whole."""

exists = os.path.lexists
"""Whether the name exists. A dangling link counts, and is refused when it is read."""

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FICLONE = 0x40049409  # linux/fs.h: share the blocks of another file, on filesystems that can
_CODE = ("auto_map", "custom_pipelines", "custom_generate")


def expanded(path: str | Path) -> Path:
    """The path with `~` and `~user` expanded as in a shell; an unknown user is left unchanged."""
    return Path(os.path.expanduser(path))


def damaged(path: Path, reason: str) -> VerificationError:
    """The error for a damaged file."""
    return VerificationError(f"{path}: {reason}", path=str(path), reason=reason)


def open_plain(path: Path) -> BufferedReader:
    """Open a plain file for reading, without waiting; a directory, pipe or device is refused."""
    try:
        descriptor = os.open(real_path(path), _FLAGS)
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise damaged(path, "neither a plain file nor a link to one")
    return os.fdopen(descriptor, "rb")


def real_path(path: Path) -> Path:
    """Resolve links. A link is followed within its directory, and into the hub's cache, which consists of links.

    Raises VerificationError for one that leads elsewhere.
    """
    if not path.is_symlink():
        return path
    real, parent = os.path.realpath(path), os.path.realpath(path.parent)
    roots = [parent, os.path.realpath(_hub_cache())]
    if os.path.basename(os.path.dirname(parent)) == "snapshots":
        roots.append(os.path.join(os.path.dirname(os.path.dirname(parent)), "blobs"))
    if not any(real.startswith(root + os.sep) for root in roots):
        raise damaged(path, "a link that leads out of its directory, which is not followed: put the file there itself")
    return Path(real)


def _hub_cache() -> str:
    """The cache of huggingface_hub, found by its own rules."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    return os.path.expanduser(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub"))


def read_plain(path: Path, limit: int | None = None) -> bytes:
    """Read a whole file of at most `limit` bytes (default: by its name), regardless of the size the system reports."""
    limit = limit or MAX_BYTES.get(path.name, MAX_OTHER)
    with open_plain(path) as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise damaged(path, error.strerror or str(error)) from error
    if len(data) > limit:
        raise damaged(path, f"larger than {limit / MIB:g} MiB")
    return data


def read_json(path: Path, limit: int | None = None) -> dict[str, Any]:
    """The JSON object in a file. A duplicate name is refused, because programs differ in the one they use."""
    return parse_json(path, read_plain(path, limit))


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON object in the bytes of a file."""
    value = decode_json(path, data)
    if not isinstance(value, dict):
        raise damaged(path, "not a JSON object")
    return value


def decode_json(path: Path, data: bytes) -> Any:
    """The JSON value in the bytes of a file."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            name = next(name for n, (name, _) in enumerate(pairs) if name in dict(pairs[:n]))
            raise damaged(path, f"{name[:100]!r} stands in it twice")
        return found

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"not valid JSON ({error})") from error


def read_struct(path: Path, kind: type[T], what: str) -> T:
    """The msgspec struct in a JSON file; errors describe the file as `what`."""
    import msgspec

    try:
        return msgspec.json.decode(read_plain(path), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise damaged(path, f"not {what} ({error})") from error


def last_lines(file: IO[bytes], limit: int = 64 * 1024) -> list[str]:
    """The lines in the last `limit` bytes of a file."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - limit))
    return file.read(limit).decode("utf-8", "replace").splitlines()


def check_kind(path: Path, value: object, kind: Any, where: str = "") -> None:
    """Raise VerificationError if the value in a file is not of type `kind` by msgspec's rules."""
    import msgspec

    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise damaged(path, f"{where}of another type than what was written: {error}") from None


def refuse_code(path: Path, value: object) -> None:
    """Raise VerificationError if a JSON file requests at any depth to run code, its own or from elsewhere."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            for name, inner in item.items():
                if (name in _CODE and inner) or (name.endswith("attn_implementation") and "/" in str(inner)):
                    raise damaged(path, f"asks for code of its own ({name!r}), which is never run")
            if item.get("trust_remote_code"):
                raise damaged(path, "asks for 'trust_remote_code', which is never granted")
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def file_hash(path: Path) -> str:
    """sha256 of a file, in hex."""
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Make a file's content, or a directory's entries, survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, durable: bool = False) -> None:
    """Replace a small file atomically, with the umask's permissions; with `durable` it survives a power loss."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        fsync_path(path.parent)


def write_json(path: Path, value: object) -> None:
    """Replace a small file atomically; it survives a power loss."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n", durable=True)


def place_file(source: Path, target: Path, share: bool) -> None:
    """Copy a small file to `target`; with `share`, a file of any size, as a reflink or hard link if possible."""
    if not share:
        target.write_bytes(read_plain(source))
        return
    with open_plain(source) as reader, target.open("xb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
        except OSError:
            target.unlink()
            try:
                os.link(real_path(source), target)
            except OSError:
                with target.open("xb") as copy:
                    shutil.copyfileobj(reader, copy, 8 * MIB)


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
    """Delete a directory: move it to the trash in one step, then delete it. Links inside are removed, not followed."""
    grave = home.trash / uuid.uuid4().hex
    os.rename(path, grave)
    shutil.rmtree(grave, ignore_errors=True)


def size_of(directory: Path) -> int:
    """Bytes of the files below a directory; links are not followed."""
    total = 0
    for folder, _, files in os.walk(directory):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def check_space(directory: Path, expected: int, what: str, hint: str) -> None:
    """Raise ResourceError when the disk of `directory` has no room for `expected` bytes (0: unknown) and a reserve."""
    free = shutil.disk_usage(directory).free
    needed = expected + expected // 20 + 64 * MIB if expected else 0
    if free < needed:
        raise ResourceError(
            f"{what} needs {needed / 2**30:.1f} GiB, and the disk of {directory} has {free / 2**30:.1f} GiB free",
            hint=hint,
            free=free,
            errno=errno.ENOSPC,
            needed=needed,
        )


def try_lock(file: int | IO[Any], shared: bool = False) -> bool:
    """Take the lock (flock) of an open file or directory until it is closed. False: another process holds it.

    True also on a disk without locks.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file; false if the file cannot be opened."""
    try:
        with path.open("rb") as file:
            return not try_lock(file, shared=True)
    except OSError:
        return False


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock while a small file is read and rewritten. A disk without locks is used unlocked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


_DEEPEST = 32


def plain(value: Any, depth: int = 0) -> Any:
    """Convert a value to types of JSON. Other types, infinite numbers and NaN become text."""
    if isinstance(value, Enum):
        return plain(value.value, depth + 1)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if depth > _DEEPEST or isinstance(value, type):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v, depth + 1) for v in value]
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name), depth + 1) for f in dataclasses.fields(value)}
    if hasattr(value, "model_dump"):  # pydantic's
        return plain(value.model_dump(mode="json"), depth + 1)
    found = unwrapped(value)
    return str(value) if found is value else plain(found, depth + 1)


def unwrapped(value: object) -> Any:
    """The number in a scalar of numpy or torch; other values are returned unchanged."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
