"""What sampler, scorer and trainer make of the same tokens, compared bit for bit; on one rank or as one of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.inference.generation_cases import add_adapter
from generator import Generator
from harmony_core.engine.models.context import ForwardContext, PackedAttention, forward_context
from harmony_core.engine.models.heads import linear_logprob_loss
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.engine.worker import score
from harmony_core.rpc.protocol import Sampling, Score
from harmony_core.rpc.wire import pack_ints, unpack_floats, unpack_ints
from ranks import Group
from tiny_models import random_tokens

LENGTHS = [1, 5, 15, 16, 17, 60, 63, 64, 65, 100, 33, 64]
"""Prompts around the edges of pages and of blocks of queries and keys. The last repeats another one."""
CANCELLED = 4
ALONE = (0, 3, 9)

Answers = dict[int, tuple[list[int], list[float]]]


def differences(group: Group, directory: str, deterministic: bool, vocab: int = 67) -> dict[str, int]:
    """`compare` on the tensor-parallel ranks of one replica."""
    tp, _, _ = group.grid(group.size)
    return compare(load(Path(directory), deterministic, tp), vocab)


def load(directory: Path, deterministic: bool, tp: TensorParallel | None = None) -> CausalLM:
    """The model in `directory`."""
    return load_model(
        directory,
        tp or TensorParallel.single(),
        torch.device("cpu"),
        torch.float32,
        **({"deterministic": True} if deterministic else {}),
    )


def compare(model: CausalLM, vocab: int = 67, adapter: str | None = None, tokens: int = 6) -> dict[str, int]:
    """How many tokens or log-probs differ between ways to compute them, and how many were compared in all.

    Requests have `tokens` new ones and up to 33 more. Every rank of a replica plans the same steps, since all draw the
    same tokens.
    """
    if adapter:
        add_adapter(model, adapter)
    prompts = random_tokens(LENGTHS, vocab=vocab)
    prompts[-1] = prompts[7]
    numbered = dict(enumerate(prompts))
    generator = Generator(model, 4096, adapter=adapter)
    company = generate(generator, numbered, tokens)
    hit = generate(generator, numbered, tokens)
    assert generator.scheduler.statistics["prefix_hit_tokens"] > 100
    chunked = generate(Generator(model, 4096, adapter=adapter, prefill_tokens=24, max_running=5), numbered, tokens)
    # Hardly more than the longest: sequences wait, lose their pages, and are read again.
    crowded = generate(Generator(model, 192, adapter=adapter), numbered, tokens)
    alone: Answers = {}
    for id in ALONE:
        alone |= generate(Generator(model, 4096, adapter=adapter), {id: prompts[id]}, tokens)
    sequences = {id: prompts[id] + new for id, (new, _) in company.items()}
    sampled = np.concatenate([np.array(logprobs, dtype=np.float32) for _, logprobs in company.values()])
    drawn = {id: len(new) for id, (new, _) in company.items()}
    together = scores(model, adapter, list(sequences.values()))
    apart = [scores(model, adapter, [sequence])[0] for sequence in sequences.values()]
    trained = train(model, adapter, list(sequences.values()))

    def of_drawn(values: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        return np.concatenate([value[-count:] for value, count in zip(values, drawn.values(), strict=True)])

    return {
        "compared": len(sampled),
        "chunked": sum(chunked[id] != answer for id, answer in company.items()),
        "prefix hits": sum(hit[id] != answer for id, answer in company.items()),
        "crowded": sum(crowded[id] != answer for id, answer in company.items()),
        "alone": sum(company[id] != answer for id, answer in alone.items()),
        "scored": int((of_drawn(together) != sampled).sum()),
        "scored apart": int((of_drawn(apart) != sampled).sum()),
        "trained": int((of_drawn(trained) != sampled).sum()),
        "prompts": int(sum((a != b).sum() for a, b in zip(together, trained, strict=True))),
    }


def generate(generator: Generator, prompts: dict[int, list[int]], tokens: int) -> Answers:
    """Tokens and raw log-probs by request. One arrives every second step, and one leaves before its end."""
    waiting, steps = list(prompts.items()), 0
    found: Answers = {}
    while waiting or generator.has_work:
        if waiting and steps % 2 == 0:
            id, prompt = waiting.pop(0)
            generator.submit(id, prompt, Sampling(temperature=1.0, max_tokens=tokens + 3 * id, seed=id))
        if steps == 14:
            generator.cancel(CANCELLED)
        steps += 1
        for finished in generator.step():
            answer = finished.generated
            assert answer is not None, finished.error
            assert unpack_floats(answer.logprobs) == unpack_floats(answer.sampled_logprobs)
            found[finished.id] = unpack_ints(answer.tokens), unpack_floats(answer.logprobs)
    assert CANCELLED not in found
    return dict(sorted(found.items()))


def scores(model: CausalLM, adapter: str | None, sequences: list[list[int]]) -> list[np.ndarray[Any, Any]]:
    """Log-probs of all tokens but the first, packed into one row."""
    requests = [
        Score(model="m", replica=0, tokens=pack_ints(tokens[:-1]), targets=pack_ints(tokens[1:]))
        for tokens in sequences
    ]
    return [np.frombuffer(found, "<f4") for found in score(model, adapter, requests)]


def train(model: CausalLM, adapter: str | None, sequences: list[list[int]]) -> list[np.ndarray[Any, Any]]:
    """The log-probs that a training pass makes of all tokens but the first, its gradients taken."""
    lengths = tuple(len(tokens) - 1 for tokens in sequences)
    rows = torch.tensor([token for tokens in sequences for token in tokens[:-1]])
    targets = torch.tensor([token for tokens in sequences for token in tokens[1:]])
    positions = torch.cat([torch.arange(length) for length in lengths])
    weights = torch.ones(len(rows), dtype=torch.float64)
    trained = model.trainable_parameters(adapter)
    with forward_context(ForwardContext(PackedAttention(lengths), adapter)):
        loss, logprobs = linear_logprob_loss(model, model.hidden_states(rows, positions), targets, weights)
        loss.backward()
    for parameter in trained.values():
        assert parameter.grad is not None and parameter.grad.isfinite().all()
        parameter.requires_grad_(False).grad = None
    return [part.numpy() for part in logprobs.split(lengths)]
