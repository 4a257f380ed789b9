"""Tiny models for tests: Hugging Face-shaped directories with random weights, norms and biases that are not trivial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text")

HEAD_DIM = {"qwen3": 16, "gemma3_text": 16}
WINDOW = 20
"""Tokens that one sees in the windowed layers of mistral and gemma3_text."""


def build(
    directory: Path,
    family: str = "llama",
    *,
    tied: bool = False,
    heads: int = 4,
    kv_heads: int = 2,
    layers: int = 2,
    hidden: int = 32,
    intermediate: int = 64,
    vocab: int = 67,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a random model into `directory` and return it. Head width 16 in qwen3 and gemma3_text, else hidden / heads.

    Every other layer of a gemma3_text has a window, all of a mistral unless `sliding_window` is None.
    """
    if family in HEAD_DIM:
        config.setdefault("head_dim", HEAD_DIM[family])
    if family in ("mistral", "gemma3_text"):
        config.setdefault("sliding_window", WINDOW)
    if family == "gemma3_text":
        config.setdefault("layer_types", [("sliding_attention", "full_attention")[i % 2] for i in range(layers)])
    settings = AutoConfig.for_model(
        family,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=512,
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **config},
    )
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * values if parameter.ndim == 1 else values / parameter.shape[1] ** 0.5)
        for name, parameter in model.named_parameters():
            # The norms of gemma3_text add the 1 themselves; those behind a part make it count beside the embedding.
            plus_one = family == "gemma3_text" and parameter.ndim == 1 and "post_" not in name
            if name.endswith("bias") or plus_one:
                parameter.sub_(1)
    model.to(dtype).save_pretrained(directory)
    return directory


def golden(directory: Path) -> Path:
    """A tiny Llama: the k-th parameter by name is 0.2 * sin(0.7 * index + k) over its flattened index, norms are 1."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for k, (name, parameter) in enumerate(sorted(model.named_parameters())):
            index = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_((0.2 * torch.sin(0.7 * index + k)).view_as(parameter))
            if "norm" in name:
                parameter.fill_(1.0)
    model.save_pretrained(directory)
    return directory


def reference(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The same model as plain transformers runs it, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").eval()


def random_tokens(lengths: list[int], vocab: int = 67, seed: int = 0) -> list[list[int]]:
    """Sequences of random token ids, 3 and above."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]
