"""Removing versions, unless something still needs them; and saying, while one is used, that it is."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from harmony_core.errors import ConflictError, NotFoundError, UsageError, VerificationError
from harmony_core.registry import manifest as manifests
from harmony_core.registry.entry import NAME as ENTRY_NAME
from harmony_core.registry.entry import Entry, entry_lock, read_entry, write_entry
from harmony_core.registry.files import discard, refuse_links, storage_error
from harmony_core.registry.keys import BUILTIN, SCHEME, Reference, parse_reference

if TYPE_CHECKING:
    from harmony_core.registry.store import Registry


@contextlib.contextmanager
def in_use(manifest: Path) -> Iterator[None]:
    """Say with a shared lock on its manifest that a version is being used. Nothing happens on a disk without locks."""
    descriptor = os.open(manifest, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _users(manifest: Path) -> str:
    """Who uses a version, in words; "" for nobody."""
    try:
        descriptor = os.open(manifest, os.O_RDONLY)
    except OSError:
        return ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        inode = os.fstat(descriptor).st_ino
        return f"a running process{_pids(inode)}"
    except OSError:
        return ""
    finally:
        os.close(descriptor)
    return ""


def _pids(inode: int) -> str:
    """Processes with a lock on an inode, from /proc/locks: `1: FLOCK ADVISORY READ 1234 08:01:5678 0 EOF`."""
    with contextlib.suppress(OSError):
        lines = [line.split() for line in Path("/proc/locks").read_text(encoding="ascii").splitlines()]
        found = [line[4] for line in lines if len(line) > 5 and line[5].rpartition(":")[2] == str(inode)]
        if found:
            return f" (pid {', '.join(found)})"
    return ""


def remove(registry: Registry, ref: str, every: bool) -> list[str]:
    """Remove one version, or with `every` all versions of a key; returns the references removed.

    Raises ConflictError naming what still refers to one of them.
    """
    if ref.removeprefix(SCHEME).startswith(BUILTIN):
        raise UsageError(f"{ref!r} is generated, not stored: there is nothing to remove")
    reference = parse_reference(ref)
    refuse_links(registry.home.models, registry.home.models / reference.key)
    numbers = _chosen(registry, reference, every)
    doomed = {f"{reference.key}@{number}" for number in numbers}
    _refuse_when_needed(registry, reference.key, numbers, doomed)
    try:
        with entry_lock(registry.home, reference.key):
            for number in numbers:
                directory = registry.directory(reference.key, number)
                refuse_links(registry.home.models, directory)
                with contextlib.suppress(FileNotFoundError):
                    discard(registry.home, directory)
            _tidy(registry, reference.key, max(numbers))
    except OSError as error:
        raise storage_error(f"cannot remove {ref!r}", error) from error
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
    adapters = [name for name, base in _adapters(registry) if base in doomed and name not in doomed]
    if adapters:
        raise ConflictError(
            f"{', '.join(sorted(doomed))}: still the base of {', '.join(adapters)}", hint="remove the adapter first"
        )
    for number in numbers:
        user = _users(registry.directory(key, number) / manifests.NAME)
        if user:
            raise ConflictError(f"{key}@{number} is used by {user}", hint="wait for it to end, or stop it")
    left = set(registry.versions(key)) - set(numbers)
    with contextlib.suppress(VerificationError):
        aliases = [name for name, number in read_entry(registry.home, key).aliases.items() if number in numbers]
        if left and aliases:
            raise ConflictError(
                f"{', '.join(sorted(doomed))}: has the alias {aliases[0]!r}",
                hint=f"move it first: adaptive models alias {key} {aliases[0]}={max(left)}",
            )


def _adapters(registry: Registry) -> Iterator[tuple[str, str]]:
    """(adapter, its base) for every stored adapter that can be read."""
    for key in registry.names():
        for number in registry.versions(key):
            with contextlib.suppress(VerificationError, NotFoundError):
                record = manifests.read_manifest(registry.directory(key, number), key)
                if record.base:
                    yield f"{key}@{number}", record.base.ref


def _tidy(registry: Registry, key: str, highest: int) -> None:
    """Remember the numbers that were given, or, with nothing left, take the key's directories away."""
    directory = registry.home.models / key
    if registry.versions(key):
        try:
            entry = read_entry(registry.home, key)
        except VerificationError:
            entry = Entry(key=key)
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
