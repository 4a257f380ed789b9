"""model.json: what is said about a key rather than about one version. It may be missing; then nothing is said."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec

from harmony_core.errors import UsageError, did_you_mean
from harmony_core.home import Home
from harmony_core.registry.files import lock, retry_missing, write_json
from harmony_core.registry.versions import DEFAULT_NAMES
from harmony_core.weight_files import damaged

NAME = "model.json"
SETTABLE = (*DEFAULT_NAMES, "trainable", "description")


class Entry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The editable side of a key."""

    key: str
    description: str = ""
    trainable: bool = True
    aliases: dict[str, int] = msgspec.field(default_factory=dict)
    defaults: dict[str, int] = msgspec.field(default_factory=dict)
    last_version: int = 0
    """The highest number ever given, so that no number is given twice after a removal."""


def read_entry(home: Home, key: str) -> Entry:
    """The entry of a key. Raises VerificationError when model.json is damaged."""
    path = home.models / key / NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=Entry)
    except FileNotFoundError:
        return Entry(key=key)
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise damaged(path, f"not a model.json ({error}); delete it to start from nothing") from error


def edit_entry(home: Home, key: str, change: Callable[[Entry], None]) -> Entry:
    """Read, change and replace an entry under the key's lock."""
    with entry_lock(home, key):
        entry = read_entry(home, key)
        change(entry)
        write_entry(home, key, entry)
    return entry


def entry_lock(home: Home, key: str) -> AbstractContextManager[None]:
    """The lock that guards a key's model.json."""
    return lock(home.locks / f"{key.replace('/', '~')}.lock")


def write_entry(home: Home, key: str, entry: Entry) -> None:
    """Replace a key's model.json."""
    directory: Path = home.models / key
    directory.mkdir(parents=True, exist_ok=True)
    retry_missing(lambda: write_json(directory / NAME, msgspec.to_builtins(entry)))


def apply_setting(entry: Entry, name: str, value: object) -> None:
    """Set one thing; None takes it back. Raises UsageError for a name that cannot be set, or a value it cannot have."""
    if name not in SETTABLE:
        raise UsageError(f"{name[:100]!r} cannot be set on a model", hint=did_you_mean(name, SETTABLE))
    if name == "description":
        entry.description = _text(value)
    elif name == "trainable":
        if value is not None and type(value) is not bool:
            raise UsageError(f"trainable must be true or false, not {str(value)[:60]!r}")
        entry.trainable = True if value is None else value
    elif value is None:
        entry.defaults.pop(name, None)
    elif type(value) is int and 0 < value < 2**31:
        entry.defaults[name] = value
    else:
        raise UsageError(f"{name} must be a whole number above 0, or null to unset it, not {str(value)[:60]!r}")


def _text(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > 4000:
        raise UsageError("description must be a text of at most 4,000 characters")
    return value
