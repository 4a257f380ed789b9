"""What the registry tells about a model: plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from harmony_core.model_spec import ModelSpec

SCALAR = "scalar"
"""The kind of models that have a scalar head in place of the vocabulary's; the others are of kind "lm"."""

DEFAULT_NAMES = ("tp", "kv_cache_len", "tokens_to_generate")
LIBRARY_DEFAULTS = {"tp": 1, "kv_cache_len": None, "tokens_to_generate": 2048}
"""What holds when nobody says otherwise. kv_cache_len None: up to 131,072 tokens, as much as fits."""


@dataclass(frozen=True)
class Defaults:
    """Inference defaults stored with a model; None where nothing is stored. `sources` names where each comes from."""

    tp: int | None = None
    kv_cache_len: int | None = None
    tokens_to_generate: int | None = None
    sources: dict[str, str] = field(default_factory=dict)

    def effective(self) -> dict[str, tuple[int | None, str]]:
        """Name -> (value, where it comes from), the library's own default where nothing is stored."""
        found: dict[str, tuple[int | None, str]] = {}
        for name in DEFAULT_NAMES:
            value = getattr(self, name)
            stored = value is not None
            found[name] = (value, self.sources.get(name, "")) if stored else (LIBRARY_DEFAULTS[name], "library default")
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
            if (directory / "tokenizer.json").is_file():
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
