"""`python -m harmony_core.text.tokenizer_trial DIRECTORY`: a tokenizer at work on texts that are hard on it.

It is tried so before it is taken, under limits (`confined`): what panics, never ends or takes all memory does so here.
What is merely malformed is told by those who read the files.
"""

from __future__ import annotations

import string
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from harmony_core import confined
from harmony_core.errors import HarmonyError, TokenizationError
from harmony_core.plain_files import MIB, exists, read_json, read_plain
from harmony_core.text.tokenizer_files import read

_ODD = "na\u00efve \u4e2d\u6587 \U0001f600 \u0378\ufdfa\u200b\u0301\x00\x7f\U0010fffd \r\n\t"
_LONG = 16 * 1024
_RUN = 256
_MAX_TOKENS = 8
"""A byte of text becomes at most so many tokens; a token so many times that much text."""
_PARTS = ("normalizer", "pre_tokenizer", "decoder", "added_tokens")


def check(directory: Path) -> None:
    """Try a directory's tokenizer, if it has one, in a process of its own. Raises VerificationError for one that fails
    there, TokenizationError for one that cannot encode any text.
    """
    path = directory / "tokenizer.json"
    if exists(path):
        size = len(read_plain(path))
        limits = confined.Limits(memory=1024 * MIB + 16 * size, work=4 + size // (8 * MIB), seconds=60 + size / MIB)
        confined.run(__name__, [str(directory)], limits, path, "using this tokenizer")


def _texts(settings: dict[str, Any], vocabulary: list[str]) -> Iterator[str]:
    """What every tokenizer may meet, then what this one has something to do with."""
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
    """The process: a directory in, one line of JSON out."""
    try:
        try_out(Path(sys.argv[1]))
    except TokenizationError as error:
        confined.answer(error)
    else:
        confined.answer()


if __name__ == "__main__":
    main()
