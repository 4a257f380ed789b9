"""Tokenizers that break, hang or explode are found in a process of their own; honest ones pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import small_models
from harmony_core.errors import HarmonyError, TokenizationError, VerificationError
from harmony_core.registry import Registry
from harmony_core.text.tokenizer_files import check


def byte_pairs(**parts: Any) -> dict[str, Any]:
    return small_models.tokenizer() | parts


def with_model(kind: str, **fields: Any) -> dict[str, Any]:
    return {"version": "1.0", "added_tokens": [], "model": {"type": kind, **fields}}


def replacing(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


GROWING = {"type": "Sequence", "normalizers": [replacing({"String": "a"}, "aa")] * 40}
"""2 ** 40 times as much text."""
LETTER = {"type": "Sequence", "normalizers": [replacing({"String": "\u00e9"}, "\u00e9" * 1000)] * 4}
"""Only in a text with this letter."""

HOSTILE: dict[str, tuple[dict[str, Any], type[HarmonyError]]] = {
    "a table that is none": (
        byte_pairs(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        VerificationError,
    ),
    "a normaliser that grows": (byte_pairs(normalizer=GROWING), VerificationError),
    "one that grows by a letter": (byte_pairs(normalizer=LETTER), VerificationError),
    "one that grows a little": (
        byte_pairs(normalizer=replacing({"String": "\u00e9"}, "a" * 100)),
        TokenizationError,
    ),
    "no token for the unknown": (
        with_model("WordLevel", vocab={"a": 0}, unk_token="[UNK]"),
        TokenizationError,
    ),
    "an unknown one that is none": (
        with_model("BPE", vocab={"a": 0}, merges=[], unk_token="[UNK]"),
        TokenizationError,
    ),
    "none in a unigram": (with_model("Unigram", vocab=[["a", 0.0]], unk_id=None), TokenizationError),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tokenizer_is_refused_when_it_is_added(registry: Registry, source: Path, name: str) -> None:
    content, error = HOSTILE[name]
    small_models.write_json(source / "tokenizer.json", content)
    with pytest.raises(error) as caught:
        registry.add("m", str(source))
    assert caught.value.exit_code in (2, 7)
    assert str(source / "tokenizer.json") in caught.value.message
    assert "panic" not in caught.value.message and "Traceback" not in caught.value.message
    assert registry.list() == []


def test_honest_ones_pass(tmp_path: Path, registry: Registry) -> None:
    check(registry.resolve("builtin:tiny-lm").path)
    vocabulary = {"[UNK]": 0, "[PAD]": 1, "a": 2, "##b": 3}
    pieces = [["<unk>", 0.0], ["\u2581", -1.0], ["a", -1.5], *([chr(0x4E00 + n), -9.0] for n in range(20_000))]
    spaces = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": False}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    honest = {
        "pairs": byte_pairs(normalizer={"type": "NFKD"}, pre_tokenizer=letters),
        "words": with_model("WordPiece", vocab=vocabulary, unk_token="[UNK]", continuing_subword_prefix="##")
        | {"normalizer": {"type": "Lowercase"}},
        "pieces": with_model("Unigram", vocab=pieces, unk_id=0) | {"pre_tokenizer": spaces, "decoder": spaces},
    }
    for name, content in honest.items():
        directory = small_models.write_model(tmp_path / name)
        small_models.write_json(directory / "tokenizer.json", content)
        check(directory)
    (tmp_path / "none").mkdir()
    check(tmp_path / "none")


def test_many_tokens_declared_beside_the_tokenizer_cost_no_more_than_as_many_in_it(
    registry: Registry, source: Path
) -> None:
    declared = {str(12 + n): {"content": f"<{n}>", "special": n % 2 == 0} for n in range(20_000)}
    settings = {"added_tokens_decoder": declared, "chat_template": "{{ messages[0].content }}"}
    small_models.write_json(source / "tokenizer_config.json", settings)
    assert registry.add("m", str(source)).tokenizer_dir
    del declared["13"]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TokenizationError, match="does not get its declared id 14"):
        registry.add("m", str(source))
