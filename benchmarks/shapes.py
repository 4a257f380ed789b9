"""Models of named shapes with random weights, and prompts of an exact number of tokens for them. No torch here.

The tokenizer has one token for each word "w123", as many as the shape's vocabulary, so that prompts use all of the
embedding and a thread of n words has a known length. The rows of its special tokens are close to zero in embedding and
head: a greedy completion never ends early, because a logit of almost 0 is never the largest of a hundred thousand.
"""

from __future__ import annotations

import json
import random
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harmony_core.home import Home
from harmony_core.registry import ModelVersion, Registry
from harmony_core.text.threads import StringThread

SPECIAL = ("<|pad|>", "<|start|>", "<|end|>")
ROLES = ("system", "user", "assistant")
RESERVED = len(SPECIAL) + len(ROLES)
TEMPLATE = (
    "{% for message in messages %}<|start|> {{ message['role'] }} {{ message['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|start|> assistant {% endif %}"
)
PROMPT_OVERHEAD = 5
"""Tokens of a prompt of one user turn beside its words: start, role, end, start, role."""
SAMPLE_OVERHEAD = 7
"""Tokens of a sample of a user turn of one word and an assistant turn beside the assistant's words."""


@dataclass(frozen=True)
class Shape:
    """A decoder: sizes as in its config.json, and what it counts as in the formulas of the tables."""

    name: str
    model_type: str
    architecture: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    positions: int
    theta: float = 10000.0

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.theta},
            "attention_bias": False,
            "tie_word_embeddings": self.tied,
            "bos_token_id": None,
            "eos_token_id": SPECIAL.index("<|end|>"),
            "pad_token_id": 0,
            "dtype": "bfloat16",
        }

    @property
    def matmul_parameters(self) -> int:
        """Parameters that every token is multiplied with: those of the layers, and the head once."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = self.hidden * (2 * q + 2 * kv) + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All of them, tied ones once."""
        norms = self.hidden * (2 * self.layers + 1) + (2 * self.head_dim * self.layers) * (self.model_type == "qwen3")
        return self.matmul_parameters + norms + (0 if self.tied else self.vocab * self.hidden)

    def kv_bytes(self, element: int) -> int:
        """Bytes of one token's keys and values."""
        return self.layers * 2 * self.kv_heads * self.head_dim * element

    def step_bytes(self, element: int, live_tokens: float) -> float:
        """Fewest bytes that a decode step reads: weights (of an untied embedding next to nothing) and live KV."""
        return self.matmul_parameters * element + live_tokens * self.kv_bytes(element)


QWEN3_1B7 = Shape("qwen3-1.7b", "qwen3", "Qwen3ForCausalLM", 151936, 2048, 6144, 28, 16, 8, 128, True, 40960, 1e6)
LLAMA_8B = Shape("llama-3.1-8b", "llama", "LlamaForCausalLM", 128256, 4096, 14336, 32, 32, 8, 128, False, 131072, 5e5)
SMOLLM2 = Shape("smollm2-135m", "llama", "LlamaForCausalLM", 49152, 576, 1536, 30, 9, 3, 64, True, 8192, 1e5)
TINY_QWEN3 = Shape("tiny-qwen3", "qwen3", "Qwen3ForCausalLM", 512, 64, 128, 2, 4, 2, 16, True, 2048)
TINY_LLAMA = Shape("tiny-llama", "llama", "LlamaForCausalLM", 512, 64, 128, 2, 4, 2, 16, False, 2048)
SHAPES = {shape.name: shape for shape in (QWEN3_1B7, LLAMA_8B, SMOLLM2, TINY_QWEN3, TINY_LLAMA)}
TINY = {"qwen3-1.7b": TINY_QWEN3, "llama-3.1-8b": TINY_LLAMA, "smollm2-135m": TINY_LLAMA}
"""What stands in for a shape where only the code is tried."""


def write_tokenizer(shape: Shape, directory: Path) -> None:
    """Everything of a model directory but the weights."""
    words = (*SPECIAL, *ROLES, *(f"w{index}" for index in range(RESERVED, shape.vocab)))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": text, **flags} for index, text in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": SPECIAL[0]},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": SPECIAL[0], "eos_token": SPECIAL[2]}
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in (
        ("config.json", shape.config),
        ("generation_config.json", {"eos_token_id": 2, "pad_token_id": 0}),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", settings),
    ):
        (directory / name).write_text(json.dumps(value) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def register(home: Home, shape: Shape, directory: Path) -> ModelVersion:
    """Add a written model under its shape's name, its weights left in place."""
    return Registry(home).add(shape.name, str(directory), reference=True)


class Words:
    """Random words of a shape's vocabulary. Never the same ones twice, so that no prefix is found in a cache."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self._shape = shape
        self._draw = random.Random(seed)
        self._lock = threading.Lock()

    def ids(self, count: int) -> list[int]:
        """Token ids of `count` words."""
        with self._lock:
            return [self._draw.randrange(RESERVED, self._shape.vocab) for _ in range(count)]

    def text(self, count: int) -> str:
        """`count` words."""
        return " ".join(f"w{index}" for index in self.ids(count))

    def prompt(self, tokens: int) -> StringThread:
        """A thread whose prompt has exactly `tokens` tokens."""
        return StringThread([("user", self.text(tokens - PROMPT_OVERHEAD))])

    def sample(self, tokens: int) -> StringThread:
        """A thread of exactly `tokens` tokens, of which all but the first six are trained on."""
        turns = [("user", self.text(1)), ("assistant", self.text(tokens - SAMPLE_OVERHEAD))]
        return StringThread(turns).with_weight_last_assistant_turn()


def lognormal(draw: random.Random, median: float, sigma: float, least: int, most: int) -> int:
    """One length."""
    return max(least, min(most, round(median * draw.lognormvariate(0.0, sigma))))


def packed_lengths(inputs: int, median: float, sigma: float, most: int, seed: int = 0) -> list[int]:
    """Lengths of samples, log-normal between 16 and `most`, whose inputs (a token less each) add up to `inputs`."""
    draw = random.Random(seed)
    lengths: list[int] = []
    left = inputs
    while left:
        length = lognormal(draw, median, sigma, 16, most)
        if left - (length - 1) < 15:
            length = left + 1
        if length > most:
            length = most - 16
        lengths.append(length)
        left -= length - 1
    return lengths
