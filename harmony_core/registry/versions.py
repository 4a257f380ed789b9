"""What the registry tells about a model: one version, the editable settings of its key, an entry of the listing.

Settings are kept in model.json. It may be missing; then nothing is set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from harmony_core.errors import UsageError, VerificationError, did_you_mean
from harmony_core.home import Home
from harmony_core.model.spec import ModelSpec
from harmony_core.plain_files import exists, lock, read_struct, write_json
from harmony_core.text.turns import TemplateKwargs

SCALAR = "scalar"
"""The kind of models that have a scalar head in place of the vocabulary's; the others are of kind "lm"."""

Default = int | dict[str, Any] | None

ENTRY_NAME = "model.json"
DEFAULT_NAMES = ("tp", "kv_cache_len", "tokens_to_generate", "chat_template_kwargs")
SETTABLE = (*DEFAULT_NAMES, "trainable", "description")
LIBRARY_DEFAULTS: dict[str, Default] = {"tp": 1, "kv_cache_len": None, "tokens_to_generate": 2048}
"""What holds when nobody says otherwise. kv_cache_len None: up to 131,072 tokens, as much as fits."""


@dataclass(frozen=True)
class Defaults:
    """Inference defaults stored with a model; None where nothing is stored. `sources` names where each comes from."""

    tp: int | None = None
    kv_cache_len: int | None = None
    tokens_to_generate: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    sources: dict[str, str] = field(default_factory=dict)

    def effective(self) -> dict[str, tuple[Default, str]]:
        """Name -> (value, where it comes from), the library's own default where nothing is stored."""
        found: dict[str, tuple[Default, str]] = {}
        for name in DEFAULT_NAMES:
            value = getattr(self, name)
            if value is not None:
                found[name] = value, self.sources.get(name, "")
            elif name in LIBRARY_DEFAULTS:
                found[name] = LIBRARY_DEFAULTS[name], "library default"
        return found


@dataclass(frozen=True)
class ModelVersion:
    """One immutable version. `path` holds config.json or adapter_config.json and is directly loadable."""

    key: str
    version: int
    ref: str
    """The exact reference, such as "key@3"."""
    path: Path
    format: str
    """"hf" (full weights) or "peft" (an adapter)."""
    kind: str
    trainable: bool
    base: ModelVersion | None
    """What an adapter belongs to."""
    spec: ModelSpec
    """Of the base weights."""
    defaults: Defaults
    digest: str
    """sha256 over the config and the weights of this version."""
    notes: tuple[str, ...] = ()
    """What was left out or is missing, in words."""
    source: str = ""
    """Where it was imported from, such as "hf:org/name@commit"; "" when a run saved it."""
    parent: str = ""
    run_id: str = ""
    step: int | None = None
    created: str = ""
    bytes: int = 0

    @property
    def scalar(self) -> bool:
        """Whether it scores with a scalar head, and so does not generate."""
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
        """The directory of the tokenizer, an adapter's own before its base's; None: raw tokens only."""
        for directory in (self.path, self.weights_dir):
            if exists(directory / "tokenizer.json"):
                return directory
        return None


@dataclass(frozen=True)
class ModelEntry:
    """One key in a listing. `problem` says why the newest version cannot be read."""

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
    """The highest number ever given, so that no number is given twice after a removal."""


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
    """An entry to change, under the key's lock; it is written when the block ends without an error."""
    with entry_lock(home, key):
        entry = read_entry(home, key)
        yield entry
        write_entry(home, key, entry)


def entry_lock(home: Home, key: str) -> AbstractContextManager[None]:
    """The lock that guards a key's model.json."""
    return lock(home.locks / f"{key.replace('/', '~')}.lock")


def write_entry(home: Home, key: str, entry: Entry) -> None:
    """Replace a key's model.json, also while another process removes the key's directory."""
    path = home.models / key / ENTRY_NAME
    for _ in range(100):
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return write_json(path, msgspec.to_builtins(entry))
    write_json(path, msgspec.to_builtins(entry))


def apply_setting(entry: Entry, name: str, value: object) -> None:
    """Set one thing; None takes it back. Raises UsageError for a name that cannot be set, or a value it cannot have."""
    if name not in SETTABLE:
        raise UsageError(f"{name[:100]!r} cannot be set on a model", hint=did_you_mean(name, SETTABLE))
    if name == "description":
        if value is not None and (not isinstance(value, str) or len(value) > 4000):
            raise UsageError("description must be a text of at most 4,000 characters")
        entry.description = value or ""
    elif name == "trainable":
        if value is not None and type(value) is not bool:
            raise UsageError(f"trainable must be true or false, not {str(value)[:60]!r}")
        entry.trainable = True if value is None else value
    elif value is None:
        entry.defaults.pop(name, None)
    elif name == "chat_template_kwargs":
        if not isinstance(value, Mapping):
            raise UsageError(
                f"chat_template_kwargs must be a JSON object, not {str(value)[:60]!r}",
                hint="chat_template_kwargs='{\"enable_thinking\": false}'",
            )
        entry.defaults[name] = dict(TemplateKwargs(value))
    elif type(value) is int and 0 < value < 2**31:
        entry.defaults[name] = value
    else:
        raise UsageError(f"{name} must be a whole number above 0, or null to unset it, not {str(value)[:60]!r}")
