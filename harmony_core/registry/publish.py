"""Publish a version, which is written into a private directory and renamed once; remove versions.

A version becomes visible completely or not at all. Two writers of one key get two numbers, because renaming onto an
existing version fails. The next writer removes the files of a killed one once its owner is known to be dead. This
is also correct without locks. A version that is still needed is not removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Iterator, Set as AbstractSet
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from harmony_core import __version__
from harmony_core.errors import (
    ConflictError,
    NotFoundError,
    ResourceError,
    UsageError,
    VerificationError,
    storing,
)
from harmony_core.home import Home
from harmony_core.plain_files import check_space, discard, fsync_path, refuse_links, try_lock
from harmony_core.registry.content import complete, inspect, take_tokenizer
from harmony_core.registry.records import (
    BUILTIN,
    DEFAULT_NAMES,
    ENTRY_NAME,
    MANIFEST,
    SCALAR,
    SCHEME,
    BaseRecord,
    Entry,
    FileRecord,
    Manifest,
    ModelVersion,
    Reference,
    check_key,
    digest_of,
    entry_lock,
    parse_reference,
    read_entry,
    read_manifest,
    record_files,
    write_entry,
)
from harmony_core.rpc.platform import start_time

if TYPE_CHECKING:
    from harmony_core.registry.store import Registry

_FOREIGN_SECONDS = 24 * 3600


@contextlib.contextmanager
def stage(registry: Registry, expected_bytes: int = 0) -> Iterator[Staging]:
    """See `Registry.stage`."""
    home = registry.home
    hint = "adaptive models list shows what can go; ADAPTIVE_HOME may name another disk"
    check_space(home.path, expected_bytes, "a model", hint)
    sweep(home)
    directory = home.staging / f"{_owner(os.getpid())}~{uuid.uuid4().hex}"
    with storing("cannot write a model"):
        directory.mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        try_lock(stack.enter_context(_opened(directory)))
        yield Staging(registry, directory)


class Staging:
    """A directory to write one version into: fill `directory`, then publish it."""

    def __init__(self, registry: Registry, directory: Path) -> None:
        self._registry = registry
        self._home = registry.home
        self.directory = directory

    def publish(
        self,
        key: str,
        *,
        parent: ModelVersion | None = None,
        base: ModelVersion | str | None = None,
        run_id: str = "",
        step: int | None = None,
        source: str = "",
        notes: tuple[str, ...] = (),
        location: Path | None = None,
        resumed: bool = False,
        stop_ids: AbstractSet[int] | None = None,
    ) -> ModelVersion:
        """Check, record and publish the directory as the next version of `key`; returns it resolved.

        `parent` supplies the tokenizer if the directory lacks one, and a new key's inference defaults. `base` is the
        model of an adapter; if unset, the name in its adapter_config.json is looked up. With `location` the files stay
        there and only the record is stored. With `resumed` a version that run `run_id` has published with the same
        bytes is returned instead. Pass `stop_ids`, the tokens that end a turn, for files written by this library: they
        are completed for other libraries. Raises ModelRefused, VerificationError, or ResourceError (disk).
        """
        check_key(key)
        registry = self._registry
        if parent and not location:
            take_tokenizer(parent, self.directory)
        if stop_ids is not None:
            complete(self.directory, parent.weights_dir if parent else self.directory, stop_ids)
        content = inspect(location or self.directory, registry, base, in_place=location is not None)
        with storing(f"cannot store {key!r}"):
            files = record_files(content.directory, content.files)
            if resumed and (published := self._published(key, run_id, files)):
                return published
            record = Manifest(
                key=key,
                format=content.format,
                kind=SCALAR if content.scalar else "lm",
                digest=digest_of(content.format, files),
                files=files,
                base=BaseRecord(content.base.ref, content.base.digest) if content.base else None,
                location=str(location.resolve()) if location else "",
                source=source,
                parent=parent.ref if parent else "",
                run_id=run_id,
                step=step,
                notes=(*notes, *content.notes),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                harmony_core=__version__,
            )
            if not location:
                self._make_durable(content.files)
            record.write(self.directory)
            number = self._rename(key)
            self._describe(key, None if content.base else parent)
        return registry.resolve(f"{key}@{number}")

    def _published(self, key: str, run_id: str, files: tuple[FileRecord, ...]) -> ModelVersion | None:
        """The version that a run has already made of these files; damaged ones are skipped."""
        for ref, record in _records(self._registry, key):
            with contextlib.suppress(VerificationError, NotFoundError):
                if record.run_id == run_id and record.files == files:
                    return self._registry.resolve(ref)
        return None

    def _make_durable(self, files: list[Path]) -> None:
        """Sync files to disk and apply the umask's permissions: some libraries write files for the owner only."""
        mode = stat.S_IMODE(self.directory.stat().st_mode) & 0o666
        for path in files:
            state = path.stat()
            if state.st_nlink == 1 and stat.S_IMODE(state.st_mode) != mode:  # a shared file keeps its permissions
                path.chmod(mode)
        for path in {*files, *(path.parent for path in files)}:
            fsync_path(path)

    def _rename(self, key: str) -> int:
        """Become the next version. Another writer may take the number or remove the key at any moment."""
        models, parent = self._home.models, self._home.models / key
        for _ in range(10_000):
            refuse_links(models, parent)
            parent.mkdir(parents=True, exist_ok=True)
            number = max([*self._registry.versions(key), _settings(self._home, key).last_version]) + 1
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

    def _describe(self, key: str, parent: ModelVersion | None) -> None:
        """Give a new key its parent's settings. An adapter needs no copy: it uses its base's current settings."""
        with entry_lock(self._home, key):
            if (self._home.models / key / ENTRY_NAME).exists():
                return
            known = {name: getattr(parent.defaults, name) for name in DEFAULT_NAMES} if parent else {}
            defaults = {name: value for name, value in known.items() if value is not None}
            write_entry(self._home, key, Entry(key=key, defaults=defaults))


def _owner(pid: int) -> str:
    """Host, process namespace, process and start time: identifies a process even after its number is reused."""
    host = "".join(c if c.isalnum() or c in "-." else "-" for c in socket.gethostname())
    space = Path("/proc/self/ns/pid")
    return f"{host}~{space.stat().st_ino if space.exists() else 0}~{pid}~{start_time(pid)}"


def sweep(home: Home) -> list[str]:
    """Remove directories of dead writers from staging, and empty the trash. Returns the names removed."""
    removed = []
    for path in home.staging.iterdir():
        if _abandoned(path):
            with contextlib.suppress(OSError):
                discard(home, path)
                removed.append(path.name)
    for path in home.trash.iterdir():
        shutil.rmtree(path, ignore_errors=True)
    return removed


def _abandoned(path: Path) -> bool:
    """Whether the writer is gone: its lock is free, and its process dead or, on another machine, the directory old."""
    with contextlib.suppress(OSError), _opened(path) as descriptor:
        if not try_lock(descriptor):
            return False
        owner, _, _ = path.name.rpartition("~")
        pid = owner.split("~")[2] if owner.count("~") == 3 else ""
        if pid.isascii() and pid.isdigit() and owner.split("~")[:2] == _owner(0).split("~")[:2]:
            return _owner(int(pid)) != owner
        return time.time() - path.stat().st_mtime > _FOREIGN_SECONDS
    return False


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor to lock a file or a directory by. Raises OSError for a link."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def in_use(manifest: Path) -> Iterator[None]:
    """Mark a version as used by a shared lock on its manifest. It has no effect on a disk without locks."""
    with _opened(manifest) as descriptor:
        try_lock(descriptor, shared=True)
        yield


def _users(manifest: Path) -> str:
    """The processes that use a version, in words; "" for an unused one."""
    with contextlib.suppress(OSError), _opened(manifest) as descriptor:
        if not try_lock(descriptor):
            return f"a running process{_pids(os.fstat(descriptor).st_ino)}"
    return ""


def _pids(inode: int) -> str:
    """Processes with a lock on an inode, from /proc/locks: `1: FLOCK ADVISORY READ 1234 08:01:5678 0 EOF`."""
    with contextlib.suppress(OSError):
        lines = [line.split() for line in Path("/proc/locks").read_text(encoding="ascii").splitlines()]
        if found := [line[4] for line in lines if len(line) > 5 and line[5].rpartition(":")[2] == str(inode)]:
            return f" (pid {', '.join(found)})"
    return ""


def remove(registry: Registry, ref: str, every: bool) -> list[str]:
    """Remove one version, or with `every` all versions of a key; returns the references removed.

    Raises ConflictError naming the adapter, process or alias that still needs one of them.
    """
    if ref.removeprefix(SCHEME).startswith(BUILTIN):
        raise UsageError(f"{ref!r} is generated, not stored: there is nothing to remove")
    reference = parse_reference(ref)
    refuse_links(registry.home.models, registry.home.models / reference.key)
    numbers = _chosen(registry, reference, every)
    doomed = {f"{reference.key}@{number}" for number in numbers}
    _refuse_when_needed(registry, reference.key, numbers, doomed)
    with storing(f"cannot remove {ref!r}"), entry_lock(registry.home, reference.key):
        for number in numbers:
            directory = registry.directory(reference.key, number)
            refuse_links(registry.home.models, directory)
            with contextlib.suppress(FileNotFoundError):
                discard(registry.home, directory)
        _tidy(registry, reference.key, max(numbers))
    return [f"{reference.key}@{number}" for number in numbers]


def _chosen(registry: Registry, reference: Reference, every: bool) -> list[int]:
    known = registry.versions(reference.key)
    if not known or reference.version is not None or reference.alias is not None:
        return [registry.number(reference)]
    if len(known) > 1 and not every:
        raise ConflictError(
            f"{reference.key!r} has {len(known)} versions ({', '.join(map(str, known))})",
            hint=f"name one, such as {reference.key}@{known[0]}, or pass --all",
        )
    return known


def _refuse_when_needed(registry: Registry, key: str, numbers: list[int], doomed: set[str]) -> None:
    records = [found for stored in registry.names() for found in _records(registry, stored)]
    adapters = [ref for ref, record in records if record.base and record.base.ref in doomed and ref not in doomed]
    if adapters:
        raise ConflictError(
            f"{', '.join(sorted(doomed))}: still the base of {', '.join(adapters)}", hint="remove the adapter first"
        )
    for number in numbers:
        if user := _users(registry.directory(key, number) / MANIFEST):
            raise ConflictError(f"{key}@{number} is used by {user}", hint="wait for it to end, or stop it")
    left = set(registry.versions(key)) - set(numbers)
    aliases = [name for name, number in _settings(registry.home, key).aliases.items() if number in numbers]
    if left and aliases:
        raise ConflictError(
            f"{', '.join(sorted(doomed))}: has the alias {aliases[0]!r}",
            hint=f"move it first: adaptive models alias {key} {aliases[0]}={max(left)}",
        )


def _settings(home: Home, key: str) -> Entry:
    """The settings of a key. A damaged model.json counts as empty, so that a trained model is not lost."""
    with contextlib.suppress(VerificationError):
        return read_entry(home, key)
    return Entry(key=key)


def _records(registry: Registry, key: str) -> Iterator[tuple[str, Manifest]]:
    """Reference and manifest of each version of a key that can be read."""
    for number in registry.versions(key):
        with contextlib.suppress(VerificationError, NotFoundError):
            yield f"{key}@{number}", read_manifest(registry.directory(key, number), key)


def _tidy(registry: Registry, key: str, highest: int) -> None:
    """Record the highest number used; if no version is left, remove the key's directories."""
    directory = registry.home.models / key
    if registry.versions(key):
        entry = _settings(registry.home, key)
        entry.last_version = max(entry.last_version, highest)
        write_entry(registry.home, key, entry)
        return
    (directory / ENTRY_NAME).unlink(missing_ok=True)
    while directory != registry.home.models:
        try:
            directory.rmdir()
        except OSError:
            return  # another key lives below, or another process just wrote here
        directory = directory.parent
