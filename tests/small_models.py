"""Model directories of a few kilobytes, written without torch, for tests of what only looks at files."""

from __future__ import annotations

import json
import random
import struct
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
SIZES = {"vocab": 12, "d": 8, "intermediate": 16, "heads": 4, "kv": 2, "head_dim": 2}


def write_safetensors(path: Path, tensors: Mapping[str, tuple[int, ...]], seed: int = 0, dtype: str = "F32") -> None:
    """Random numbers under the given names and shapes."""
    rng = random.Random(seed)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, shape in tensors.items():
        count = 1
        for size in shape:
            count *= size
        begin = len(data)
        values = array("f", [rng.gauss(0, 0.3) for _ in range(count)]).tobytes()
        data += values if dtype == "F32" else b"".join(values[i + 2 : i + 4] for i in range(0, len(values), 4))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))


def shapes(family: str = "llama", layers: int = 2, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor of a small model."""
    d, i, v = SIZES["d"], SIZES["intermediate"], SIZES["vocab"]
    q, kv = SIZES["heads"] * SIZES["head_dim"], SIZES["kv"] * SIZES["head_dim"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    for layer in range(layers):
        one: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (d,),
            "post_attention_layernorm.weight": (d,),
            "self_attn.q_proj.weight": (q, d),
            "self_attn.k_proj.weight": (kv, d),
            "self_attn.v_proj.weight": (kv, d),
            "self_attn.o_proj.weight": (d, q),
            "mlp.gate_proj.weight": (i, d),
            "mlp.up_proj.weight": (i, d),
            "mlp.down_proj.weight": (d, i),
        }
        if family == "qwen2":
            one |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
        if family == "gemma3_text":
            one |= dict.fromkeys(("pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"), (d,))
        if family in ("qwen3", "gemma3_text"):
            one |= dict.fromkeys(("self_attn.q_norm.weight", "self_attn.k_norm.weight"), (SIZES["head_dim"],))
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in one.items()}
    if not tied:
        found["lm_head.weight"] = (v, d)
    return found


def config(family: str = "llama", layers: int = 2, tied: bool = False) -> dict[str, Any]:
    """The config that belongs to `shapes`."""
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": SIZES["vocab"],
        "hidden_size": SIZES["d"],
        "intermediate_size": SIZES["intermediate"],
        "num_hidden_layers": layers,
        "num_attention_heads": SIZES["heads"],
        "num_key_value_heads": SIZES["kv"],
        "head_dim": SIZES["head_dim"],
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }


def tokenizer() -> dict[str, Any]:
    """Twelve tokens: "a" to "l"."""
    return {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {chr(97 + n): n for n in range(12)}, "merges": [], "unk_token": "a"},
    }


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_model(
    directory: Path,
    family: str = "llama",
    *,
    layers: int = 2,
    tied: bool = False,
    seed: int = 0,
    dtype: str = "F32",
    shards: int = 1,
    with_tokenizer: bool = True,
) -> Path:
    """A whole Hugging Face directory; with several shards, also the index."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config(family, layers, tied))
    tensors = shapes(family, layers, tied)
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors, seed, dtype)
    else:
        mapping = {}
        for shard in range(shards):
            name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = {tensor: shape for n, (tensor, shape) in enumerate(tensors.items()) if n % shards == shard}
            write_safetensors(directory / name, part, seed + shard, dtype)
            mapping |= dict.fromkeys(part, name)
        write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": mapping})
    if with_tokenizer:
        write_json(directory / "tokenizer.json", tokenizer())
        write_json(directory / "tokenizer_config.json", {"chat_template": "{{ messages[0].content }}"})
    return directory


def make_scalar(directory: Path, family: str = "llama", labels: int = 1) -> Path:
    """Turn a model of `write_model`, one file, into a sequence classifier with random head."""
    name = ARCHITECTURES[family].replace("ForCausalLM", "ForSequenceClassification").replace("Gemma3F", "Gemma3TextF")
    settings = json.loads((directory / "config.json").read_text())
    names = {str(n): f"LABEL_{n}" for n in range(labels)}
    write_json(directory / "config.json", settings | {"architectures": [name], "id2label": names})
    tensors = {k: s for k, s in shapes(family, settings["num_hidden_layers"]).items() if k != "lm_head.weight"}
    write_safetensors(directory / "model.safetensors", tensors | {"score.weight": (labels, SIZES["d"])})
    return directory


def write_adapter(directory: Path, base: str = "", rank: int = 2, layers: int = 2, **settings: Any) -> Path:
    """A peft LoRA adapter on q_proj and down_proj of the small model."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(
        directory / "adapter_config.json",
        {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "bias": "none"}
        | ({"base_model_name_or_path": base} if base else {})
        | settings,
    )
    tensors: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        for module, (out, into) in {"self_attn.q_proj": (8, 8), "mlp.down_proj": (8, 16)}.items():
            name = f"base_model.model.model.layers.{layer}.{module}."
            tensors |= {name + "lora_A.weight": (rank, into), name + "lora_B.weight": (out, rank)}
    write_safetensors(directory / "adapter_model.safetensors", tensors, seed=7)
    return directory
