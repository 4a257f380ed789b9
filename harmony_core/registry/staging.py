"""Writing a version: everything into a private directory first, then one rename. Correct also where locks are not.

A version becomes visible whole or not at all. Two writers of one key get two numbers, because renaming onto an
existing version fails. What a killed writer leaves is swept by the next one, once its owner is known to be dead.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import stat
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec

from harmony_core import __version__
from harmony_core.errors import NotFoundError, ResourceError, VerificationError
from harmony_core.home import Home
from harmony_core.registry import manifest as manifests
from harmony_core.registry.content import inspect, take_tokenizer
from harmony_core.registry.entry import Entry, entry_lock, read_entry, write_entry
from harmony_core.registry.files import fsync_path, refuse_links, storage_error, write_json
from harmony_core.registry.keys import check_key
from harmony_core.registry.versions import DEFAULT_NAMES, SCALAR, ModelVersion
from harmony_core.rpc.platform import start_time

if TYPE_CHECKING:
    from harmony_core.registry.store import Registry

RESERVE_BYTES = 256 * 1024 * 1024
_FOREIGN_SECONDS = 24 * 3600


class Staging:
    """A directory to write one version into: `with registry.stage() as staging`, fill `staging.directory`, publish.

    Leaving the block without `publish` removes what was written.
    """

    def __init__(self, registry: Registry, expected_bytes: int = 0) -> None:
        self._registry = registry
        self._home = registry.home
        _check_space(self._home, expected_bytes)
        sweep(self._home)
        self.directory = self._home.staging / f"{_owner(os.getpid())}~{uuid.uuid4().hex}"
        try:
            self.directory.mkdir()
            self._descriptor = os.open(self.directory, os.O_RDONLY)
        except OSError as error:
            raise storage_error("cannot write a model", error) from error
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        os.close(self._descriptor)

    def publish(
        self,
        key: str,
        *,
        parent: ModelVersion | str | None = None,
        base: ModelVersion | str | None = None,
        run_id: str = "",
        step: int | None = None,
        source: str = "",
        notes: tuple[str, ...] = (),
        location: Path | None = None,
        resumed: bool = False,
    ) -> ModelVersion:
        """Check, record and publish the directory as the next version of `key`; returns it resolved.

        `parent` gives the tokenizer, where none was written, and a new key's inference defaults. `base` is what an
        adapter belongs to; unset, the name in its adapter_config.json is looked up. With `location` the files stay
        there and only the record is stored. With `resumed` a version that run `run_id` has published with the same
        bytes is returned instead. Raises ModelRefused, VerificationError, or ResourceError (disk).
        """
        check_key(key)
        registry = self._registry
        ancestor = registry.resolve(parent) if isinstance(parent, str) else parent
        if ancestor and not location:
            take_tokenizer(ancestor, self.directory)
        content = inspect(location or self.directory, registry, base, in_place=location is not None)
        try:
            files = manifests.record_files(content.directory, content.files, self._home)
            published = self._published(key, run_id, files) if resumed else None
            if published is not None:
                return published
            record = manifests.Manifest(
                key=key,
                format=content.format,
                kind=SCALAR if content.scalar else "lm",
                digest=manifests.digest_of(content.format, files),
                files=files,
                base=manifests.BaseRecord(content.base.ref, content.base.digest) if content.base else None,
                location=str(location.resolve()) if location else "",
                source=source,
                parent=ancestor.ref if ancestor else "",
                run_id=run_id,
                step=step,
                notes=(*notes, *content.notes),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                harmony_core=__version__,
            )
            if not location:
                self._make_durable(content.files)
            write_json(self.directory / manifests.NAME, msgspec.to_builtins(record))
            number = self._rename(key)
            self._describe(key, None if content.base else ancestor)
        except OSError as error:
            raise storage_error(f"cannot store {key!r}", error) from error
        return registry.resolve(f"{key}@{number}")

    def _published(self, key: str, run_id: str, files: tuple[manifests.FileRecord, ...]) -> ModelVersion | None:
        """The version that a run has made of these files already; one that is damaged counts for nothing."""
        for number in self._registry.versions(key):
            with contextlib.suppress(VerificationError, NotFoundError):
                record = manifests.read_manifest(self._registry.directory(key, number), key)
                if record.run_id == run_id and record.files == files:
                    return self._registry.resolve(f"{key}@{number}")
        return None

    def _make_durable(self, files: list[Path]) -> None:
        """On the disk, and with the permissions that the umask gives: some libraries write for the owner alone."""
        mode = stat.S_IMODE(self.directory.stat().st_mode) & 0o666
        for path in files:
            state = path.stat()
            if state.st_nlink == 1 and stat.S_IMODE(state.st_mode) != mode:  # a shared file keeps its owner's
                path.chmod(mode)
        for path in {*files, *(path.parent for path in files)}:
            fsync_path(path)

    def _rename(self, key: str) -> int:
        """Become the next version. Another writer may take the number, or remove the key, between any two lines."""
        models, parent = self._home.models, self._home.models / key
        for _ in range(10_000):
            refuse_links(models, parent)
            parent.mkdir(parents=True, exist_ok=True)
            number = max([*self._registry.versions(key), self._last_version(key)]) + 1
            try:
                os.rename(self.directory, parent / f"v{number:06d}")
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT) and self.directory.is_dir():
                    continue
                raise
            while parent != models.parent:
                fsync_path(parent)
                parent = parent.parent
            return number
        raise ResourceError(f"cannot store {key!r}: another process keeps changing it")

    def _last_version(self, key: str) -> int:
        try:
            return read_entry(self._home, key).last_version
        except VerificationError:
            return 0  # a damaged model.json must not cost a trained model

    def _describe(self, key: str, parent: ModelVersion | None) -> None:
        """A new key begins with its parent's settings; an adapter has its base's anyway, as they are at the time."""
        with entry_lock(self._home, key):
            if (self._home.models / key / "model.json").exists():
                return
            known = {name: getattr(parent.defaults, name) for name in DEFAULT_NAMES} if parent else {}
            defaults = {name: value for name, value in known.items() if value is not None}
            write_entry(self._home, key, Entry(key=key, defaults=defaults))


def _check_space(home: Home, expected_bytes: int) -> None:
    free = shutil.disk_usage(home.path).free
    needed = expected_bytes + expected_bytes // 20 + RESERVE_BYTES if expected_bytes else 0
    if free < needed:
        raise ResourceError(
            f"the disk of {home.path} has {free / 2**30:.1f} GiB free, and {needed / 2**30:.1f} GiB are needed",
            hint="adaptive models list shows what can go; ADAPTIVE_HOME may name another disk",
            free=free,
            needed=needed,
        )


def _owner(pid: int) -> str:
    """Host, process namespace, process and its start time: names one process, also after its number is used again."""
    host = "".join(c if c.isalnum() or c in "-." else "-" for c in socket.gethostname())
    return f"{host}~{_namespace()}~{pid}~{start_time(pid)}"


def _namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def sweep(home: Home) -> list[str]:
    """Remove what dead writers left in staging, and what is left in the trash. Returns the names removed."""
    removed = []
    for path in home.staging.iterdir():
        if _abandoned(path):
            with contextlib.suppress(OSError):
                grave = home.trash / uuid.uuid4().hex
                os.rename(path, grave)
                removed.append(path.name)
    for path in home.trash.iterdir():
        shutil.rmtree(path, ignore_errors=True)
    return removed


def _abandoned(path: Path) -> bool:
    """Whether the writer is gone. Its lock must be free, and its process dead or, when not of this machine, old."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # no locks on this disk: the owner's name decides
        owner, _, _ = path.name.rpartition("~")
        pid = owner.split("~")[2] if owner.count("~") == 3 else ""
        if pid.isascii() and pid.isdigit() and owner.split("~")[:2] == _owner(0).split("~")[:2]:
            return _owner(int(pid)) != owner
        return time.time() - path.stat().st_mtime > _FOREIGN_SECONDS
    except OSError:
        return False
    finally:
        os.close(descriptor)
