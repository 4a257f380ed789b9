"""What a model's directory says about its tokenizer: vocabulary, special tokens, chat template, tokens that end a turn.

Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja, generation_config.json and
config.json. Every file is somebody else's: whatever is wrong with one is a TokenizationError naming it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from harmony_core.chat_template import MAX_SOURCE, ChatTemplate
from harmony_core.errors import TokenizationError, VerificationError
from harmony_core.weight_files import read_json

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """Everything of a directory that tokenizing needs; `template` is None where there is none."""

    directory: Path
    tokenizer: Tokenizer
    specials: dict[str, str]
    template: ChatTemplate | None
    stop_ids: frozenset[int]


def read(directory: Path) -> TokenizerFiles:
    """Read a model's or tokenizer's directory. Raises TokenizationError."""
    config = _json(directory / "tokenizer_config.json")
    specials = _specials(_json(directory / "special_tokens_map.json") | config)
    tokenizer = _tokenizer(directory / "tokenizer.json", config)
    template = _template(directory, config, specials)
    return TokenizerFiles(directory, tokenizer, specials, template, _stop_ids(directory, tokenizer, specials))


def _tokenizer(path: Path, config: dict[str, Any]) -> Tokenizer:
    if not path.is_file():
        raise TokenizationError(f"{path.parent} has no tokenizer.json", hint="only raw tokens work with this model")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        # The tokenizers library raises a bare Exception for every malformed file.
        raise TokenizationError(f"{path}: not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Special tokens come from the template; a post-processor would only trim spaces out of the offsets.
    tokenizer.post_processor = None
    declared = config.get("added_tokens_decoder")
    if isinstance(declared, dict):
        _add_declared(tokenizer, declared, path.with_name("tokenizer_config.json"))
    return tokenizer


def _add_declared(tokenizer: Tokenizer, declared: dict[str, Any], path: Path) -> None:
    """Add the tokens that only tokenizer_config.json knows, at the ids it gives."""
    try:
        listed = sorted((int(token_id), dict(fields)) for token_id, fields in declared.items())
        for token_id, fields in listed:
            content = str(fields.pop("content"))
            if tokenizer.token_to_id(content) is None:
                tokenizer.add_tokens([AddedToken(content, **{k: v for k, v in fields.items() if k in _FLAGS})])
                if tokenizer.token_to_id(content) != token_id:
                    raise TokenizationError(f"{path}: token {content!r} does not get its declared id {token_id}")
    except (TypeError, ValueError, KeyError) as error:
        raise TokenizationError(f"{path}: added_tokens_decoder: {error!r}") from None


_FLAGS = frozenset({"single_word", "lstrip", "rstrip", "normalized", "special"})


def _specials(config: dict[str, Any]) -> dict[str, str]:
    """Named special tokens; each is a string, or an object with `content`."""
    found = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _template(directory: Path, config: dict[str, Any], specials: dict[str, str]) -> ChatTemplate | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return ChatTemplate(_text(path), str(path), specials)
    origin = str(directory / "tokenizer_config.json")
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
        if value is None:
            raise TokenizationError(
                f"{origin}: chat_template has no entry named 'default', only {sorted(map(str, named))}"
            )
    if value is None:
        return None
    if not isinstance(value, str):
        raise TokenizationError(f"{origin}: chat_template must be a string, not {type(value).__name__}")
    return ChatTemplate(value, origin, specials)


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
        return read_json(path) if path.is_file() else {}
    except VerificationError as error:
        raise TokenizationError(error.message) from None


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_SOURCE + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizationError(f"{path}: cannot be read: {error}") from None
