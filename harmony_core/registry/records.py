"""The registry's records of a model: its key, the manifest of each version, and the settings of the key.

A key is checked against one allow-list before it becomes a path. manifest.json is the last file written into a version:
a directory without it is not a version. model.json holds the settings, and may be missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from harmony_core.errors import NotFoundError, UsageError, VerificationError
from harmony_core.home import Home
from harmony_core.model.spec import ModelSpec
from harmony_core.model.weight_files import PICKLE_SUFFIXES, model_names
from harmony_core.plain_files import MIB, damaged, exists, file_hash, lock, read_struct, write_json

SCHEME = "model_registry://"
BUILTIN = "builtin:"

_SEGMENT = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
_VERSION = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
_ALIAS = re.compile(r"[a-z][a-z0-9._-]{0,63}", re.ASCII)
_HUB = re.compile(r"(hf:)?[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
_RULE = "up to four segments joined by '/', each of a-z, 0-9, '.', '_' and '-', starting with a letter or digit"

MANIFEST = "manifest.json"
FORMAT = 1
OPTIMIZER = "optimizer.safetensors"
"""The optimizer's state, which a save may leave beside the weights."""
SMALL_BYTES = MIB
"""Files up to this size are hashed at every check."""
CONFIGS = {"hf": "config.json", "peft": "adapter_config.json"}
SCALAR = "scalar"
"""The kind of models with a scalar head in place of the vocabulary's; other models are of kind "lm"."""
Default = int | dict[str, Any] | None
ENTRY_NAME = "model.json"
DEFAULT_NAMES = ("tp", "kv_cache_len", "tokens_to_generate", "chat_template_kwargs")
LIBRARY_DEFAULTS: dict[str, Default] = {"tp": 1, "kv_cache_len": None, "tokens_to_generate": 2048}
"""Defaults of settings that are not stored. kv_cache_len None: as many tokens as fit, up to 131,072."""


@dataclass(frozen=True)
class Reference:
    """A parsed reference: a key, with a version number, an alias, or neither (the newest version)."""

    key: str
    version: int | None = None
    alias: str | None = None

    def __str__(self) -> str:
        tail = self.version if self.version is not None else self.alias
        return self.key if tail is None else f"{self.key}@{tail}"


def first_reason(*checks: tuple[object, str]) -> str:
    """The reason of the first check that is true; "" if all are false."""
    return next((reason for wrong, reason in checks if wrong), "")


def _segment_problem(segment: str) -> str:
    taken = re.fullmatch(r"v\d{6,}", segment) or segment.endswith((".json", ".tmp"))  # the layout's own names
    return first_reason(
        (not _SEGMENT.fullmatch(segment), _RULE),
        (".." in segment or segment.endswith("."), "no segment holds '..' or ends in '.'"),
        (taken, "v000001 and names ending in .json or .tmp are the registry's own"),
    )


def key_problem(key: str) -> str:
    """The reason why a key is not valid; "" for a valid one."""
    segments = key.split("/")
    return _RULE if len(segments) > 4 else next(filter(None, map(_segment_problem, segments)), "")


def check_key(key: str, kind: str = "model") -> None:
    """Raise UsageError, with the rule and a valid example, for an invalid key."""
    if problem := key_problem(key):
        raise UsageError(f"{key[:100]!r} cannot be a {kind} key: {problem}", hint=f"for example {slugify(key)!r}")


def check_alias(alias: str) -> None:
    """Raise UsageError for an invalid alias; it starts with a letter, so that it cannot be mistaken for a version."""
    if not _ALIAS.fullmatch(alias):
        raise UsageError(f"{alias[:100]!r} cannot be an alias: a-z first, then a-z, 0-9, '.', '_' and '-'")


def parse_reference(text: str) -> Reference:
    """Parse `key`, `key@3` or `key@alias`, with or without `model_registry://`. Raises NotFoundError if invalid."""
    key, at, tail = text.removeprefix(SCHEME).partition("@")
    if problem := key_problem(key):
        raise NotFoundError(f"there is no model {text[:200]!r}: a key has {problem}", hint=source_hint(text), ref=text)
    if not at or _ALIAS.fullmatch(tail):
        return Reference(key, alias=tail or None)
    if _VERSION.fullmatch(tail):
        return Reference(key, version=int(tail))
    raise NotFoundError(f"there is no model {text[:200]!r}: {tail[:100]!r} is neither a version nor an alias", ref=text)


def source_hint(text: str) -> str:
    """The `models add` line for a name that looks like a hub id or a path, else ""."""
    if _HUB.fullmatch(text):
        name = text.removeprefix("hf:")
        return f"adaptive models add {slugify(name.split('/')[1])} hf:{name}"
    if text.startswith(("/", "./", "../", "~")) and text.isprintable():
        return f"a path is added first: adaptive models add KEY {text[:200]}"
    return ""


def slugify(name: str) -> str:
    """The nearest key to any name: "My Model (v2)" -> "my-model-v2"; a key is returned unchanged."""
    if not key_problem(name):
        return name
    segments = []
    for segment in name.split("/")[:4]:
        plain = re.sub(r"[^a-z0-9._-]+", "-", segment.lower(), flags=re.ASCII)
        if plain := re.sub(r"\.{2,}", ".", plain).strip("-._")[:64].strip("-._"):
            segments.append(f"model-{plain.replace('.', '-')[:58]}" if _segment_problem(plain) else plain)
    return "/".join(segments) or "model"


class FileRecord(msgspec.Struct, frozen=True):
    """One file: its path within the version, size in bytes, sha256 in hex."""

    path: str
    size: int
    sha256: str


class BaseRecord(msgspec.Struct, frozen=True):
    """The base of an adapter."""

    ref: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Description:
    """A version's format, kind and origin."""

    key: str
    format: str
    """"hf" (full weights) or "peft" (an adapter)."""
    kind: str
    digest: str
    """sha256 over the config and the weights of this version."""
    source: str = ""
    """Where it was imported from, such as "hf:org/name@commit"; "" when a run saved it."""
    parent: str = ""
    run_id: str = ""
    step: int | None = None
    notes: tuple[str, ...] = ()
    """Files left out and missing parts, in words."""
    created: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest(Description):
    """The record of one version."""

    manifest: int = FORMAT
    files: tuple[FileRecord, ...]
    base: BaseRecord | None = None
    location: str = ""
    """The directory of files that were left in place (`--reference`); "" if they are beside the manifest."""
    harmony_core: str = ""

    def write(self, directory: Path) -> None:
        """Make the directory a version."""
        write_json(directory / MANIFEST, msgspec.to_builtins(self))


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
    return sorted(path for path in found if path != directory / MANIFEST)


def record_files(directory: Path, paths: list[Path]) -> tuple[FileRecord, ...]:
    """Size and hash of each file. Reads several in parallel: one thread hashes more slowly than most disks read."""
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
    path = directory / MANIFEST
    found = read_struct(path, Manifest, "a manifest")
    known = found.format in CONFIGS
    outside = [file.path for file in found.files if file.path.startswith("/") or ".." in Path(file.path).parts]
    reason = first_reason(
        (found.manifest != FORMAT, f"written by a newer version (format {found.manifest})"),
        (found.key != key, f"was published as {found.key!r}, and lies under {key!r}"),
        (not known or not found.files, f"unknown format {found.format!r}, or no files"),
        (known and found.digest != digest_of(found.format, found.files), "its digest does not belong to its files"),
        (outside, f"file name {''.join(outside[:1])[:100]!r} leads elsewhere"),
        (
            found.location and not _was_added(found),
            f"its location {found.location[:200]!r} is not what was added ({found.source[:200]})",
        ),
    )
    if reason:
        raise damaged(path, reason)
    return found


def _was_added(manifest: Manifest) -> bool:
    """Whether a version that was left in place is at the location of its source, with no new link on the path."""
    name, source = Path(manifest.location).name, manifest.source
    if source.startswith("hf:"):
        same = name == source.rpartition("@")[2]
    elif source.startswith(BUILTIN):
        same = name.rpartition("-")[0] == source.removeprefix(BUILTIN)
    else:
        same = manifest.location == source
    return same and os.path.realpath(manifest.location) == manifest.location


def check_files(directory: Path, manifest: Manifest, full: bool = False, trusted: int = -1) -> None:
    """Compare the files with the record: sizes, and hashes of small files; with `full`, every hash.

    Every file that a reader would open must be recorded; with `full`, every file of a directory of the registry. A
    large file last written at or before `trusted` (in nanoseconds since 1970) is not hashed.
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
    if spare := sorted({*names, *model_names(directory)} - {record.path for record in manifest.files}):
        more = f" ({', '.join(spare[1:9])} neither)" if spare[1:] else ""
        raise damaged(directory / spare[0], f"is not in {MANIFEST}{more}: remove it, or add the model again with it")


@dataclass(frozen=True)
class Defaults:
    """Inference defaults stored with a model; None if a value is not stored. `sources` names the source of each."""

    tp: int | None = None
    kv_cache_len: int | None = None
    tokens_to_generate: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    sources: dict[str, str] = field(default_factory=dict)

    def effective(self) -> dict[str, tuple[Default, str]]:
        """Name -> (value, source), with the library's default for a value that is not stored."""
        stored = {name: getattr(self, name) for name in DEFAULT_NAMES}
        known = {name: (value, self.sources.get(name, "")) for name, value in stored.items() if value is not None}
        return {name: (value, "library default") for name, value in LIBRARY_DEFAULTS.items()} | known


@dataclass(frozen=True, kw_only=True)
class ModelVersion(Description):
    """One immutable version. `path` holds config.json or adapter_config.json and is directly loadable."""

    version: int
    ref: str
    """The exact reference, such as "key@3"."""
    path: Path
    trainable: bool
    base: ModelVersion | None
    """The model that an adapter belongs to."""
    spec: ModelSpec
    """The specification of the base weights."""
    defaults: Defaults
    bytes: int = 0

    @property
    def scalar(self) -> bool:
        """Whether it scores with a scalar head and therefore cannot generate."""
        return self.kind == SCALAR

    @property
    def weights_dir(self) -> Path:
        """The directory of the base weights."""
        return self.base.path if self.base else self.path

    @property
    def weights_digest(self) -> str:
        """The digest of the base weights."""
        return self.base.digest if self.base else self.digest

    @property
    def tokenizer_dir(self) -> Path | None:
        """The directory of the tokenizer, an adapter's own before its base's; None if it takes raw tokens only."""
        return next((path for path in (self.path, self.weights_dir) if exists(path / "tokenizer.json")), None)


@dataclass(frozen=True)
class ModelEntry:
    """One key in a listing. `problem` is the reason why the newest version cannot be read."""

    key: str
    versions: tuple[int, ...]
    aliases: dict[str, int]
    description: str
    newest: ModelVersion | None
    problem: str = ""


class Entry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The editable side of a key."""

    key: str
    description: str = ""
    trainable: bool = True
    aliases: dict[str, int] = msgspec.field(default_factory=dict)
    defaults: dict[str, int | dict[str, Any]] = msgspec.field(default_factory=dict)
    last_version: int = 0
    """The highest number ever used, so that numbers are not reused after a removal."""


def read_entry(home: Home, key: str) -> Entry:
    """The entry of a key. Raises VerificationError when model.json is damaged."""
    path = home.models / key / ENTRY_NAME
    try:
        return read_struct(path, Entry, "a model.json; delete it to start from nothing")
    except VerificationError:
        if exists(path):
            raise
        return Entry(key=key)


@contextlib.contextmanager
def edited_entry(home: Home, key: str) -> Iterator[Entry]:
    """Yield an entry to change, under the key's lock. It is written if the block ends without an error."""
    with entry_lock(home, key):
        entry = read_entry(home, key)
        yield entry
        write_entry(home, key, entry)


def entry_lock(home: Home, key: str) -> AbstractContextManager[None]:
    """The lock that guards a key's model.json."""
    return lock(home.locks / f"{key.replace('/', '~')}.lock")


def write_entry(home: Home, key: str, entry: Entry) -> None:
    """Replace a key's model.json, even while another process removes the key's directory."""
    path = home.models / key / ENTRY_NAME
    for last in (*[False] * 100, True):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return write_json(path, msgspec.to_builtins(entry))
        except FileNotFoundError:
            if last:
                raise
