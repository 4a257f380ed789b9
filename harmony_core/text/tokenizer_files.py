"""Read and try a model's tokenizer files: vocabulary, special tokens, chat template, tokens that end a turn.

Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja and the template for tools
beside it, generation_config.json and config.json. These files are not trusted: any fault is a TokenizationError that
names the file.

`python -m harmony_core.text.tokenizer_files DIRECTORY` runs the tokenizer on difficult texts. `check` starts it under
limits (`confined`) before a tokenizer is accepted, so that a crash, a hang or exhausted memory affects only this check.
"""

from __future__ import annotations

import hashlib
import json
import string
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken, Tokenizer

from harmony_core import confined
from harmony_core.errors import HarmonyError, TokenizationError, VerificationError
from harmony_core.model.weight_files import TEMPLATES
from harmony_core.plain_files import MIB, exists, parse_json, read_json, read_plain
from harmony_core.text.chat_template import MAX_SOURCE, ChatTemplate

T = TypeVar("T")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """The contents of a tokenizer directory; `template` is None without a chat template."""

    directory: Path
    tokenizer: Tokenizer
    specials: dict[str, str]
    template: ChatTemplate | None
    stop_ids: frozenset[int]
    # Equal for two tokenizers that give the same tokens.
    fingerprint: str


def read(directory: Path) -> TokenizerFiles:
    """Read the directory of a model or a tokenizer. Raises TokenizationError."""
    config = _json(directory / "tokenizer_config.json")
    named = _json(directory / "special_tokens_map.json") | config
    # Each is a string, or an object with `content`.
    texts = {n: v.get("content") if isinstance(v := named.get(n), dict) else v for n in _SPECIAL_NAMES}
    specials = {name: text for name, text in texts.items() if isinstance(text, str)}
    tokenizer = _tokenizer(directory / "tokenizer.json", config)
    # tokenizer.json and the tokens that _add_declared adds to it.
    parts = _read(directory / "tokenizer.json", bytes), json.dumps(config.get("added_tokens_decoder")).encode()
    fingerprint = hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()
    template, stop_ids = _template(directory, config, specials), _stop_ids(directory, tokenizer, specials)
    return TokenizerFiles(directory, tokenizer, specials, template, stop_ids, fingerprint)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, unchanged. Raises TokenizationError."""
    if not exists(path):
        raise TokenizationError(f"{path.parent} has no tokenizer.json", hint="only raw tokens work with this model")
    data = _read(path, bytes)
    try:
        return Tokenizer.from_buffer(data)
    except Exception as error:
        # The tokenizers library raises a bare Exception for every malformed file.
        raise TokenizationError(f"{path}: not a tokenizer: {error}") from None


def _tokenizer(path: Path, config: dict[str, Any]) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Special tokens come from the template; a post-processor would only trim spaces from the offsets.
    tokenizer.post_processor = None
    declared = config.get("added_tokens_decoder")
    if isinstance(declared, dict):
        _add_declared(tokenizer, declared, path.with_name("tokenizer_config.json"))
    return tokenizer


def _add_declared(tokenizer: Tokenizer, declared: dict[str, Any], path: Path) -> None:
    """Add the tokens that only tokenizer_config.json declares, at their ids; in one call, because each call is slow."""
    missing: dict[str, tuple[int, AddedToken]] = {}
    try:
        for token_id, fields in sorted((int(token_id), dict(fields)) for token_id, fields in declared.items()):
            content = str(fields.pop("content"))
            if content not in missing and tokenizer.token_to_id(content) is None:
                flags = {name: value for name, value in fields.items() if name in _FLAGS}
                missing[content] = token_id, AddedToken(content, **flags)
    except (TypeError, ValueError, KeyError) as error:
        raise TokenizationError(f"{path}: added_tokens_decoder: {error!r}") from None
    tokenizer.add_tokens([token for _, token in missing.values()])
    for content, (token_id, _) in missing.items():
        if tokenizer.token_to_id(content) != token_id:
            raise TokenizationError(f"{path}: token {content!r} does not get its declared id {token_id}")


_FLAGS = frozenset({"single_word", "lstrip", "rstrip", "normalized", "special"})


def _template(directory: Path, config: dict[str, Any], specials: dict[str, str]) -> ChatTemplate | None:
    """The templates in the directory's files, otherwise in its configuration; one of several must be the default."""
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
    return _read(path, lambda data: parse_json(path, data)) if exists(path) else {}


def _text(path: Path) -> str:
    try:
        return _read(path, bytes.decode, 4 * MAX_SOURCE)
    except UnicodeDecodeError as error:
        raise TokenizationError(f"{path}: cannot be read: {error}") from None


def _read(path: Path, parse: Callable[[bytes], T], limit: int | None = None) -> T:
    try:
        return parse(read_plain(path, limit))
    except VerificationError as error:
        raise TokenizationError(error.message) from None


_ODD = "na\u00efve \u4e2d\u6587 \U0001f600 \u0378\ufdfa\u200b\u0301\x00\x7f\U0010fffd \r\n\t"
_LONG = 16 * 1024
_RUN = 256
# The most tokens for a byte of text.
_MAX_TOKENS = 8
_PARTS = ("normalizer", "pre_tokenizer", "decoder", "added_tokens")


def check(directory: Path) -> None:
    """Try a directory's tokenizer, if it has one, in a process of its own.

    Raises VerificationError if the process fails, TokenizationError if the tokenizer cannot encode a text.
    """
    path = directory / "tokenizer.json"
    if exists(path):
        size = len(read_plain(path))
        limits = confined.Limits(memory=1024 * MIB + 16 * size, work=4 + size // (8 * MIB), seconds=60 + size / MIB)
        confined.run(__name__, [str(directory)], limits, path, "using this tokenizer")


def _texts(settings: dict[str, Any], vocabulary: list[str]) -> Iterator[str]:
    """Texts for every tokenizer, then texts made from this tokenizer's settings and vocabulary."""
    yield f"The quick brown fox jumps over the lazy dog. {string.printable} {_ODD}"
    for text in ("a", " ", "ab ", "\n", "0", _ODD):
        yield text * (_LONG // len(text))
    own = [text for name in _PARTS for text in _strings(settings.get(name))] + vocabulary
    yield "".join(own)[:_LONG]
    yield " ".join(own)[:_LONG]
    for text in own[:32]:
        yield (text * _RUN)[:_LONG]
    for character in {*string.printable, *"".join(own[:1000])[:1000]}:
        yield character * _RUN + "\u0378"


def _strings(value: object) -> Iterator[str]:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            yield item[:_RUN]
        elif isinstance(item, dict | list):
            pending.extend(item.values() if isinstance(item, dict) else item)


def try_out(directory: Path) -> None:
    """Encode and decode every text. Raises TokenizationError."""
    path = directory / "tokenizer.json"
    try:
        tokenizer, settings = read(directory).tokenizer, read_json(path)
    except HarmonyError:
        return
    vocabulary = list(islice(tokenizer.get_vocab(with_added_tokens=True), 20_000))
    texts = _texts(settings, sorted(vocabulary, key=len)[-200:])
    for text in texts:
        try:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            back = tokenizer.decode(ids, skip_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower
            raise TokenizationError(f"{path}: cannot encode {text[:24]!a}: {error}") from error
        size = len(text.encode())
        if len(ids) > _MAX_TOKENS * size + _RUN or len(back) > _LONG * (len(ids) + 1):
            raise TokenizationError(f"{path}: makes {len(ids)} tokens of {size} bytes such as {text[:24]!a}")


def main() -> None:
    """Try the directory on the command line and write one line of JSON."""
    try:
        try_out(Path(sys.argv[1]))
    except TokenizationError as error:
        confined.answer(error)
    else:
        confined.answer()


if __name__ == "__main__":
    main()
