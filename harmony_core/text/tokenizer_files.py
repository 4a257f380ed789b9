"""What a model's directory says about its tokenizer: vocabulary, special tokens, chat template, tokens that end a turn.

Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja and the one beside it for
tools, generation_config.json and config.json. Every file is somebody else's: whatever is wrong with one is a
TokenizationError naming it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from harmony_core.errors import TokenizationError, VerificationError
from harmony_core.model.weight_files import TEMPLATES
from harmony_core.plain_files import exists, parse_json, read_plain
from harmony_core.text.chat_template import MAX_SOURCE, ChatTemplate

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """Everything of a directory that tokenizing needs; `template` is None where there is none."""

    directory: Path
    tokenizer: Tokenizer
    specials: dict[str, str]
    template: ChatTemplate | None
    stop_ids: frozenset[int]
    fingerprint: str
    """Equal for two tokenizers that give the same tokens."""


def read(directory: Path) -> TokenizerFiles:
    """Read a model's or tokenizer's directory. Raises TokenizationError."""
    config = _json(directory / "tokenizer_config.json")
    named = _json(directory / "special_tokens_map.json") | config
    # Each is a string, or an object with `content`.
    texts = {n: v.get("content") if isinstance(v := named.get(n), dict) else v for n in _SPECIAL_NAMES}
    specials = {name: text for name, text in texts.items() if isinstance(text, str)}
    tokenizer = _tokenizer(directory / "tokenizer.json", config)
    template = _template(directory, config, specials)
    # tokenizer.json, and what _add_declared adds to it.
    parts = _bytes(directory / "tokenizer.json"), json.dumps(config.get("added_tokens_decoder")).encode()
    fingerprint = hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()
    stop_ids = _stop_ids(directory, tokenizer, specials)
    return TokenizerFiles(directory, tokenizer, specials, template, stop_ids, fingerprint)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, as it stands there. Raises TokenizationError."""
    if not exists(path):
        raise TokenizationError(f"{path.parent} has no tokenizer.json", hint="only raw tokens work with this model")
    data = _bytes(path)
    try:
        return Tokenizer.from_buffer(data)
    except Exception as error:
        # The tokenizers library raises a bare Exception for every malformed file.
        raise TokenizationError(f"{path}: not a tokenizer: {error}") from None


def _tokenizer(path: Path, config: dict[str, Any]) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Special tokens come from the template; a post-processor would only trim spaces out of the offsets.
    tokenizer.post_processor = None
    declared = config.get("added_tokens_decoder")
    if isinstance(declared, dict):
        _add_declared(tokenizer, declared, path.with_name("tokenizer_config.json"))
    return tokenizer


def _add_declared(tokenizer: Tokenizer, declared: dict[str, Any], path: Path) -> None:
    """Add the tokens that only tokenizer_config.json knows, at the ids it gives: all at once, for each time costs."""
    missing: dict[str, int] = {}
    added: list[AddedToken] = []
    try:
        for token_id, fields in sorted((int(token_id), dict(fields)) for token_id, fields in declared.items()):
            content = str(fields.pop("content"))
            if content not in missing and tokenizer.token_to_id(content) is None:
                missing[content] = token_id
                added.append(AddedToken(content, **{k: v for k, v in fields.items() if k in _FLAGS}))
    except (TypeError, ValueError, KeyError) as error:
        raise TokenizationError(f"{path}: added_tokens_decoder: {error!r}") from None
    tokenizer.add_tokens(added)
    for content, token_id in missing.items():
        if tokenizer.token_to_id(content) != token_id:
            raise TokenizationError(f"{path}: token {content!r} does not get its declared id {token_id}")


_FLAGS = frozenset({"single_word", "lstrip", "rstrip", "normalized", "special"})


def _template(directory: Path, config: dict[str, Any], specials: dict[str, str]) -> ChatTemplate | None:
    """The templates of the directory's files, else of its configuration; one of several must be the default."""
    origin = str(directory / "tokenizer_config.json")
    files = {name: directory / path for name, path in TEMPLATES.items() if exists(directory / path)}
    origins = {name: str(path) for name, path in files.items()}
    named: dict[str, Any] = {name: _text(path) for name, path in files.items()}
    if not files:
        value = config.get("chat_template")
        if value is None:
            return None
        listed = value if isinstance(value, list) else [{"name": "default", "template": value}]
        named = {str(item.get("name")): item.get("template") for item in listed if isinstance(item, dict)}
    if named.get("default") is None:
        origin, names = origins.get("tool_use", origin), sorted(named)
        raise TokenizationError(f"{origin}: chat_template has no entry named 'default', only {names}")
    made = {}
    for name in TEMPLATES.keys() & named:
        if not isinstance(named[name], str):
            raise TokenizationError(f"{origin}: chat_template must be a string, not {type(named[name]).__name__}")
        made[name] = ChatTemplate(named[name], origins.get(name, origin), specials)
    return made["default"].with_tools(made.get("tool_use"))


def _stop_ids(directory: Path, tokenizer: Tokenizer, specials: dict[str, str]) -> frozenset[int]:
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _json(directory / name).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
            raise TokenizationError(f"{directory / name}: eos_token_id must be token ids, not {value!r}")
        found.update(ids)
    end = tokenizer.token_to_id(specials["eos_token"]) if "eos_token" in specials else None
    return frozenset(found if end is None else {*found, end})


def _json(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path, _bytes(path)) if exists(path) else {}
    except VerificationError as error:
        raise TokenizationError(error.message) from None


def _text(path: Path) -> str:
    try:
        return _bytes(path, 4 * MAX_SOURCE).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizationError(f"{path}: cannot be read: {error}") from None


def _bytes(path: Path, limit: int | None = None) -> bytes:
    try:
        return read_plain(path, limit)
    except VerificationError as error:
        raise TokenizationError(error.message) from None
