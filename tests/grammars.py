"""A tokenizer of characters and letter sequences for random models, and what a constrained completion must have."""

from __future__ import annotations

import json
from functools import lru_cache
from itertools import product
from string import ascii_lowercase

import numpy as np
import torch
from torch import Tensor

from harmony_core.engine.inference.sampler import keep
from harmony_core.engine.inference.step import Setting, pack_sampling, unpack_sampling
from harmony_core.grammar import Constraint, GrammarTokenizer
from harmony_core.rpc.protocol import Generated, Sampling
from harmony_core.rpc.wire import unpack_floats, unpack_ints

STOPS = (2, 3)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "kind": {"enum": ["red", "green", "blue"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
JSON = Constraint("json", json.dumps(SCHEMA))
REGEX = Constraint("regex", "(ab|cd){3,6}x?")
CHOICE = Constraint("choice", '["yes", "no", "perhaps not"]')
LARK = Constraint("lark", 'start: "<" word ("," word){0,3} ">"\nword: /[a-f]{1,3}/')
ALL = (JSON, REGEX, CHOICE, LARK)


@lru_cache
def tokenizer_json(vocab: int, missing: str = "") -> str:
    """Four special tokens, printable ASCII but for the `missing`, then pairs and triples; the last 3 ids are free."""
    characters = ["\u010a", "\u0120", *(chr(c) for c in range(0x21, 0x7F) if chr(c) not in missing)]
    longer = ("".join(p) for n in (2, 3) for p in product(ascii_lowercase, repeat=n))
    tokens = ["<pad>", "<unk>", "<eos>", "<end>", *characters][: vocab - 3]
    tokens += [token for token, _ in zip(longer, range(vocab - 3 - len(tokens)), strict=False)]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [{"id": id, "content": tokens[id], **special} for id in range(4)],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []},
        }
    )


def text_of(tokens: list[int], vocab: int) -> str:
    """The text of a completion, without its stop token."""
    words = json.loads(tokenizer_json(vocab))["model"]["vocab"]
    known = {id: word for word, id in words.items()}
    text = "".join(known[token] for token in (tokens[:-1] if tokens[-1] in STOPS else tokens))
    return text.replace("\u0120", " ").replace("\u010a", "\n")


def check_records(answer: Generated, sampling: Sampling, logits: Tensor, atol: float = 1e-5) -> None:
    """Compare with a masked softmax in float64 over `logits` `[T, V]`, the model's raw ones for each drawn token."""
    tokens, vocab = unpack_ints(answer.tokens), logits.shape[-1]
    assert sampling.constraint is not None
    grammar = GrammarTokenizer(tokenizer_json(vocab), vocab, sampling.stop_ids)
    found = grammar.replay(sampling.constraint, tokens)
    bits = np.unpackbits(found.masks.view(np.uint8), axis=1, count=vocab, bitorder="little").astype(bool)
    assert not bits[:, -3:].any(), "an id without a token is allowed"
    raw = logits.double()
    masked = raw.masked_fill(~torch.from_numpy(bits)[torch.from_numpy(found.index).long()], float("-inf"))
    if sampling.temperature == 0:
        processed = torch.zeros_like(raw)
        assert (masked.argmax(-1) == torch.tensor(tokens)).all()
    else:
        heated = masked / sampling.temperature
        column = unpack_sampling(pack_sampling([Setting.of(sampling)] * len(tokens), np.zeros(len(tokens))))
        processed = heated.masked_fill(~keep(heated, column), float("-inf")).log_softmax(-1)
    chosen = torch.tensor(tokens)[:, None]
    for name, values in (
        ("logprobs", raw.log_softmax(-1)),
        ("masked_logprobs", masked.log_softmax(-1)),
        ("sampled_logprobs", processed),
    ):
        ours = torch.tensor(unpack_floats(getattr(answer, name)), dtype=torch.float64)
        np.testing.assert_allclose(ours, values.gather(-1, chosen)[:, 0], atol=atol, rtol=0, err_msg=name)
