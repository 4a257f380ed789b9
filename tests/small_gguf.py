"""GGUF files of small models, with a byte-level tokenizer of twelve tokens and a chat template."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import gguf
import numpy as np

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
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers.": "blk.",
}
TOKENS = ("<|endoftext|>", *"abcdefghij", "ab")
SPECIAL = ("bos", "eos", "unk")


def renamed(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def write(
    path: Path,
    tensors: dict[str, np.ndarray],
    architecture: str = "llama",
    *,
    tokens: Collection[str] = TOKENS,
    control: Collection[str] = TOKENS[:1],
    end: str = TOKENS[0],
    special: Collection[str] = SPECIAL,
    rope_theta: float = 10000.0,
    template: str = "{{ messages[0].content }}<|endoftext|>",
) -> Path:
    """Two layers, hidden size 8, 4 heads of width 2 and 2 key-value heads. `special` names the ids that are stored."""
    writer: Any = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(2)
    writer.add_feed_forward_length(16)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(rope_theta)
    writer.add_vocab_size(12)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    if tokens:
        writer.add_token_list(list(tokens))
        writer.add_token_types([3 if token in control else 1 for token in tokens])
    writer.add_token_merges(["a b"])
    for name in special:
        getattr(writer, f"add_{name}_token_id")(list(tokens).index(end) if end in tokens else 0)
    writer.add_chat_template(template)
    for name, tensor in tensors.items():
        writer.add_tensor(renamed(name), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
