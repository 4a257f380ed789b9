"""The registry: versioned models by name. It has no index and reads the directory tree each time."""

from __future__ import annotations

import builtins
import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import msgspec

from harmony_core.errors import HarmonyError, NotFoundError, UsageError, VerificationError, did_you_mean
from harmony_core.home import Home
from harmony_core.model.spec import ModelSpec, model_tp
from harmony_core.plain_files import refuse_links
from harmony_core.registry.builtin import DEFAULTS, NAMES, REVISION, write_builtin
from harmony_core.registry.publish import Staging, in_use, remove, stage
from harmony_core.registry.records import (
    BUILTIN,
    DEFAULT_NAMES,
    MANIFEST,
    SCHEME,
    Defaults,
    Description,
    Entry,
    Manifest,
    ModelEntry,
    ModelVersion,
    Reference,
    check_alias,
    check_files,
    edited_entry,
    key_problem,
    parse_reference,
    read_entry,
    read_manifest,
    source_hint,
)
from harmony_core.registry.sources import ImportOptions, import_model
from harmony_core.text.turns import TemplateKwargs

_COUNT = (Annotated[int, msgspec.Meta(gt=0, lt=2**31)], "a whole number above 0, or null to unset it", "")
_SETTINGS: dict[str, tuple[Any, str, str]] = {
    **dict.fromkeys(("tp", "kv_cache_len", "tokens_to_generate"), _COUNT),
    "chat_template_kwargs": (dict[str, Any], "a JSON object", "chat_template_kwargs='{\"enable_thinking\": false}'"),
    "trainable": (bool, "true or false", ""),
    "description": (Annotated[str, msgspec.Meta(max_length=4000)], "a text of at most 4,000 characters", ""),
}
"""For each setting its type, the type in words, and an example."""
_VERSION_DIRECTORY = re.compile(r"v(\d{6,9})", re.ASCII)


class Registry:
    """Models of one home."""

    def __init__(self, home: Home) -> None:
        self.home = home

    def resolve(self, ref: str) -> ModelVersion:
        """The version that a reference names: `key`, `key@3`, `key@alias`, `builtin:NAME`, or behind `model_registry://`.

        `Llama-3` stands for the key under which it would be saved, `llama-3`.
        Sizes, small files and weight headers are checked; `verify` reads everything.
        Raises NotFoundError (with the nearest keys) or VerificationError (naming the file).
        """
        plain = ref.removeprefix(SCHEME)
        if plain.startswith(BUILTIN):
            return self._builtin(plain)
        name, at, tail = plain.partition("@")
        if self.versions(name.lower()):
            ref = f"{name.lower()}{at}{tail}"
        try:
            reference = parse_reference(ref)
        except NotFoundError as error:
            error.hint = error.hint or did_you_mean(plain.lower(), self.names())
            raise
        number = self.number(reference)
        directory = self.directory(reference.key, number)
        refuse_links(self.home.models, directory)
        try:
            return self._load(f"{reference.key}@{number}", directory, read_entry(self.home, reference.key), number)
        except VerificationError as error:
            others = [f"{reference.key}@{n}" for n in self.versions(reference.key) if n != number]
            if not error.hint and others:
                error.hint = f"other versions: {', '.join(others[-5:])}"
            raise

    def _builtin(self, key: str) -> ModelVersion:
        """A generated model, written first if it is missing or damaged."""
        name = key.removeprefix(BUILTIN)
        if name not in NAMES:
            known = ", ".join(BUILTIN + known for known in NAMES)
            raise NotFoundError(f"there is no model '{BUILTIN}{name[:100]}'", hint=f"there is: {known}")
        directory = self.home.cache / "builtin" / f"{name}-{REVISION}"
        entry = Entry(key=key, defaults=DEFAULTS)
        with contextlib.suppress(VerificationError):
            return self._load(key, directory, entry, 1)
        write_builtin(self.home, directory, key)
        return self._load(key, directory, entry, 1)

    def number(self, reference: Reference) -> int:
        """The version number that a reference refers to. Raises NotFoundError."""
        key = reference.key
        if not (known := self.versions(key)):
            hint = source_hint(str(reference)) or did_you_mean(key, self.names()) or "adaptive models list"
            raise NotFoundError(f"there is no model {str(reference)!r}", hint=hint, ref=str(reference))
        number = known[-1] if reference.version is None else reference.version
        if reference.alias is not None:
            aliases = read_entry(self.home, key).aliases
            if reference.alias not in aliases:
                hint = did_you_mean(reference.alias, aliases)
                raise NotFoundError(f"{key!r} has no alias {reference.alias!r}", hint=hint)
            number = aliases[reference.alias]
        if number not in known:
            versions = ", ".join(map(str, known[-12:]))
            raise NotFoundError(f"{key!r} has no version {number}", hint=f"versions: {versions}", ref=str(reference))
        return number

    def _load(self, ref: str, directory: Path, entry: Entry, number: int) -> ModelVersion:
        record = read_manifest(directory, entry.key)
        path = Path(record.location) if record.location else directory
        check_files(path, record)
        base = self._base(ref, record)
        lineage = {name: getattr(record, name) for name in Description.__dataclass_fields__}
        return ModelVersion(
            **lineage,
            version=number,
            ref=ref,
            path=path,
            trainable=entry.trainable,
            base=base,
            spec=base.spec if base else ModelSpec.read(path),
            defaults=_defaults(entry, base),
            bytes=sum(file.size for file in record.files),
        )

    def _base(self, ref: str, record: Manifest) -> ModelVersion | None:
        if record.base is None:
            return None
        try:
            base = self.resolve(record.base.ref)
        except NotFoundError as error:
            raise NotFoundError(f"{ref} is an adapter of {record.base.ref}, which is gone", hint=error.hint) from error
        if base.digest != record.base.digest:
            raise VerificationError(f"{ref} is an adapter of {record.base.ref}, which is not the same model any more")
        return base

    def directory(self, key: str, number: int) -> Path:
        """The directory of a version's record."""
        return self.home.models / key / f"v{number:06d}"

    def versions(self, key: str) -> list[int]:
        """Published version numbers of a key, ascending; empty for an unknown or invalid key."""
        if key_problem(key):
            return []
        try:
            names = os.listdir(self.home.models / key)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(match[1]) for name in names if (match := _VERSION_DIRECTORY.fullmatch(name)))

    def _walk(self, prefix: str = "") -> Iterator[str]:
        try:
            children = sorted(os.scandir(self.home.models / prefix), key=lambda child: child.name)
        except OSError:
            return
        if prefix and any(_VERSION_DIRECTORY.fullmatch(child.name) for child in children):
            yield prefix
        for child in children:
            key = f"{prefix}/{child.name}".lstrip("/")
            if not key_problem(key) and child.is_dir(follow_symlinks=False):
                yield from self._walk(key)

    def names(self) -> list[str]:
        """Every name that `resolve` takes without a version, the builtin ones last."""
        return [*self._walk(), *(BUILTIN + name for name in NAMES)]

    def list(self) -> list[ModelEntry]:
        """Every stored key with its newest version; one that cannot be read is listed with its problem."""
        return [self._entry(key) for key in self._walk()]

    def _entry(self, key: str) -> ModelEntry:
        newest, problem, entry = None, "", Entry(key=key)
        try:
            entry = read_entry(self.home, key)
            newest = self.resolve(key)
        except HarmonyError as error:
            problem = error.message
        return ModelEntry(key, tuple(self.versions(key)), dict(entry.aliases), entry.description, newest, problem)

    def stage(self, expected_bytes: int = 0) -> AbstractContextManager[Staging]:
        """Write a version: `with registry.stage() as staging`, fill `staging.directory`, then `staging.publish`.

        An unpublished directory is removed at the end of the block. Raises ResourceError if `expected_bytes` do not fit
        on the disk.
        """
        return stage(self, expected_bytes)

    def add(
        self,
        key: str,
        source: str,
        *,
        reference: bool = False,
        base: str | None = None,
        chat_template: Path | None = None,
    ) -> ModelVersion:
        """Import a model as the next version of `key`.

        `source`: a directory (Hugging Face shape, or a peft adapter), `hf:org/name[@revision]`, a .gguf file,
        `package:NAME` (the .gguf file in an installed Python package), `builtin:NAME`. With `reference` the weights
        stay where they are. `base` names an adapter's base, `chat_template` a file that replaces the template.
        """
        return import_model(self, key, source, ImportOptions(reference, base, chat_template))

    def remove(self, ref: str, every: bool = False) -> builtins.list[str]:
        """Remove a version, or with `every` all versions of a key. Raises ConflictError while something needs one."""
        return remove(self, ref, every)

    @contextlib.contextmanager
    def hold(self, version: ModelVersion) -> Iterator[None]:
        """Protect a version and its base from removal while the block runs."""
        with contextlib.ExitStack() as stack:
            for used in (version, version.base):
                if used and not used.key.startswith(BUILTIN):
                    stack.enter_context(in_use(self.directory(used.key, used.version) / MANIFEST))
            yield

    def verify(self, ref: str, quick: bool = False) -> ModelVersion:
        """Read and hash every file of a version; with `quick`, large files unchanged since it was added are trusted.

        Raises VerificationError naming the first file that differs.
        """
        version = self.resolve(ref)
        record_at = version.path if version.key.startswith(BUILTIN) else self.directory(version.key, version.version)
        record = read_manifest(record_at, version.key)
        trusted = (record_at / MANIFEST).stat().st_mtime_ns if quick else -1
        check_files(version.path, record, full=True, trusted=trusted)
        return version

    def set_alias(self, key: str, alias: str, version: int | None) -> Entry:
        """Point an alias at a version of a key; None removes the alias. Raises UsageError or NotFoundError."""
        check_alias(alias)
        self.number(Reference(key, version=version))
        with edited_entry(self.home, key) as entry:
            if version is not None:
                entry.aliases[alias] = version
            elif entry.aliases.pop(alias, None) is None:
                raise NotFoundError(f"{key!r} has no alias {alias!r}", hint=did_you_mean(alias, entry.aliases))
        return entry

    def imported_from(self, name: str) -> ModelVersion | None:
        """The newest full model that was imported from a hub id or a path, or is at that path, if any."""
        for found in self.list():
            source = found.newest.source if found.newest and not found.newest.base else ""
            if source == name or source.partition("@")[0] == f"hf:{name}":
                return found.newest
        path = Path(name)
        if (number := _VERSION_DIRECTORY.fullmatch(path.name)) and path.is_relative_to(self.home.models):
            return self.resolve(f"{path.parent.relative_to(self.home.models)}@{int(number[1])}")
        generated = (self._builtin(BUILTIN + known) for known in NAMES)
        return next((version for version in generated if version.path == path), None)

    def set_defaults(self, key: str, values: dict[str, object]) -> ModelVersion:
        """Edit a key's inference defaults (`tp`, `kv_cache_len`, ...), description, trainability.

        None unsets a value. All values are checked before one is stored. Returns the newest version.
        """
        version = self.resolve(key)
        if version.key.startswith(BUILTIN):
            raise UsageError(
                f"{version.key} is generated and keeps no settings", hint=f"adaptive models add KEY {version.key}"
            )
        if (given := values.get("chat_template_kwargs")) and isinstance(given, Mapping):
            _check_variables(version, given)
        with edited_entry(self.home, version.key) as entry:
            for name, value in values.items():
                _apply_setting(entry, name, value)
            tp, allowed = entry.defaults.get("tp"), model_tp(version.spec)
            if tp is not None and tp not in allowed:
                raise UsageError(
                    f"tp={tp} does not divide {key!r} ({version.spec.num_heads} heads)",
                    hint=f"tp may be {', '.join(map(str, allowed))}",
                )
        return self.resolve(version.key)


def _check_variables(version: ModelVersion, given: Mapping[str, Any]) -> None:
    """Raise UsageError for variables that the chat template does not read."""
    from harmony_core.text import tokenizer_files
    from harmony_core.text.tokenization import ChatTokenizer

    if version.tokenizer_dir is None:
        raise UsageError(f"{version.ref} has no tokenizer, and so no chat template that could read {', '.join(given)}")
    ChatTokenizer(tokenizer_files.read(version.tokenizer_dir), given)


def _defaults(entry: Entry, base: ModelVersion | None) -> Defaults:
    """A key's defaults; an adapter inherits the others from its base."""
    origin = entry.key if entry.key.startswith(BUILTIN) else f"stored with {entry.key}"
    known: dict[str, Any] = {name: (value, origin) for name, value in entry.defaults.items()}
    if base:
        inherited = {name: getattr(base.defaults, name) for name in DEFAULT_NAMES}
        sources = base.defaults.sources
        known = {n: (v, sources.get(n, base.ref)) for n, v in inherited.items() if v is not None} | known
    values = {name: known[name][0] for name in DEFAULT_NAMES if name in known}
    return Defaults(**values, sources={name: known[name][1] for name in values})


def _apply_setting(entry: Entry, name: str, value: object) -> None:
    """Set one value; None unsets it. Raises UsageError for an unknown name or an invalid value."""
    if name not in _SETTINGS:
        raise UsageError(f"{name[:100]!r} cannot be set on a model", hint=did_you_mean(name, _SETTINGS))
    wanted, words, example = _SETTINGS[name]
    plain = dict(value) if isinstance(value, Mapping) else value
    try:
        given = msgspec.convert(plain, wanted | None)
    except msgspec.ValidationError:
        raise UsageError(f"{name} must be {words}, not {str(value)[:60]!r}", hint=example) from None
    if name == "description":
        entry.description = given or ""
    elif name == "trainable":
        entry.trainable = given is not False
    elif given is None:
        entry.defaults.pop(name, None)
    else:
        entry.defaults[name] = dict(TemplateKwargs(given)) if isinstance(given, dict) else given
