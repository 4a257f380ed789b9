"""Drawing by kernels against the sampler: mixed settings, chunk edges, ties, rows that are no distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from harmony_core.engine.inference.sampler import hide, sample, with_lost
from harmony_core.engine.inference.step import (
    FILTERED,
    GREEDY,
    PLAIN,
    SamplingParameters,
    Setting,
    pack_sampling,
    unpack_sampling,
)
from harmony_core.rpc.protocol import Sampling

KINDS: dict[int, list[Sampling]] = {
    GREEDY: [Sampling(temperature=0.0)],
    PLAIN: [
        Sampling(temperature=1.0),
        Sampling(temperature=0.6),
        Sampling(temperature=2.0),
        Sampling(temperature=1e-40),
    ],
    FILTERED: [
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_k=20),
        Sampling(temperature=1.3, top_p=0.9),
        Sampling(temperature=0.7, top_p=0.5, top_k=50),
        Sampling(temperature=1.0, min_p=0.1),
        Sampling(temperature=1.0, top_k=100000, top_p=0.95, min_p=0.001),
        Sampling(temperature=1.0, top_p=1e-9),
    ],
}


def kernel_draw(logits: Tensor, draws: SamplingParameters, tail: int) -> tuple[Tensor, Tensor]:
    """Outputs `[3, N]` and the last tokens of the slots, both poisoned before."""
    from harmony_core.engine.kernels.sampling import draw_tokens

    rows, device = len(logits), logits.device
    slots = torch.randperm(rows + 3, device=device)[:rows]
    last = torch.full((rows + 3,), -1, dtype=torch.long, device=device)
    outputs = torch.full((3, rows), float("nan"), dtype=torch.float64, device=device)
    settings = torch.from_numpy(draws.copy()).to(device)
    draw_tokens(logits, settings, slots, last, outputs, warm=tail != GREEDY, filtered=tail == FILTERED)
    return outputs.cpu(), last[slots].cpu()


def settings_up_to(tail: int) -> list[Sampling]:
    return [sampling for kind, group in KINDS.items() if kind <= tail for sampling in group]


def draws_of(samplings: list[Sampling], numbers: np.ndarray[Any, Any]) -> SamplingParameters:
    return unpack_sampling(pack_sampling([Setting.of(sampling) for sampling in samplings], numbers))


def check(vocab: int, tail: int, device: torch.device, repeats: int = 1) -> None:
    samplings = settings_up_to(tail) * repeats
    rows = len(samplings)
    random = np.random.default_rng(vocab + tail)
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    logits[0, : vocab // 2] = 2.5
    logits[-1, vocab // 3 :] = float("-inf")
    logits[rows // 2, 0] = float("-inf")
    numbers = random.random(rows)
    numbers[0], numbers[-1] = 0.0, 1 - 2.0**-53
    draws = draws_of(samplings, numbers)
    expected = sample(logits, draws)
    outputs, last = kernel_draw(logits.to(device), draws, tail)
    assert outputs[0].long().tolist() == expected.tokens.tolist() == last.tolist(), (vocab, tail)
    torch.testing.assert_close(outputs[1], expected.logprobs.double(), atol=2e-5, rtol=1e-6)
    torch.testing.assert_close(outputs[2], expected.sampled_logprobs.double(), atol=2e-5, rtol=1e-6)


def check_no_distribution(vocab: int, device: torch.device) -> None:
    for bad, tail in ((float("nan"), GREEDY), (float("inf"), PLAIN), (float("nan"), FILTERED)):
        samplings = settings_up_to(tail)[-4:]
        rows = len(samplings)
        draws = draws_of(samplings * 2, np.full(2 * rows, 0.5))
        logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1))
        spoilt = logits.clone()
        spoilt[0, 17] = bad
        spoilt[-1] = bad
        outputs, last = kernel_draw(torch.cat([logits, spoilt]).to(device), draws, tail)
        wrong = [rows, 2 * rows - 1]
        assert not outputs[1:, wrong].isfinite().any(), (bad, tail)
        assert int(last.min()) >= 0 and int(last.max()) < vocab
        assert torch.equal(outputs[:, 1 : rows - 1], outputs[:, rows + 1 : -1])
        assert outputs[:, :rows].isfinite().all()


def check_tokenless(vocab: int, tail: int, device: torch.device) -> None:
    samplings = settings_up_to(tail)
    rows = len(samplings)
    draws = draws_of(samplings, np.random.default_rng(tail).random(rows))
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    hidden = torch.tensor([3, *range(vocab - 40, vocab)])
    logits[:, hidden] += 9
    expected = sample(logits.clone(), draws, None, hidden)
    logits, hidden = logits.to(device), hidden.to(device)
    lost = hide(logits, hidden)
    outputs, last = kernel_draw(logits, draws, tail)
    tokens = outputs[0].long()
    assert tokens.tolist() == expected.tokens.tolist() == last.tolist()
    raw = with_lost(outputs[1], logits.cpu().gather(1, tokens[:, None])[:, 0], lost.cpu())
    torch.testing.assert_close(raw, expected.logprobs.double(), atol=2e-5, rtol=1e-6)
    torch.testing.assert_close(outputs[2], expected.sampled_logprobs.double(), atol=2e-5, rtol=1e-6)


def check_masks(vocab: int, device: torch.device) -> None:
    """Logits that are masked in place, the mass of all of them, and both log-probs of a drawn id."""
    from harmony_core.engine.kernels.sampling import mask_rows, record_masked

    generator = torch.Generator().manual_seed(vocab)
    logits = 20 * torch.randn(5, vocab, generator=generator)
    logits[2, : vocab // 2] = -torch.inf
    keeps = torch.rand(3, vocab, generator=generator) < 0.3
    keeps[:, vocab - 1] = True
    bits = np.packbits(keeps.numpy(), axis=-1, bitorder="little")
    masks = torch.from_numpy(np.pad(bits, ((0, 0), (0, -bits.shape[1] % 4))).view(np.int32).copy()).to(device)
    rows, held = torch.tensor([0, 2, 3], device=device), logits.clone().to(device)
    totals = mask_rows(held, rows, masks)
    expected = logits.clone()
    expected[rows.cpu()] = logits[rows.cpu()].masked_fill(~keeps, -torch.inf)
    assert torch.equal(held.cpu(), expected)
    torch.testing.assert_close(totals.cpu(), logits[rows.cpu()].double().logsumexp(-1), rtol=1e-6, atol=1e-6)
    outputs = torch.zeros(4, 5, dtype=torch.float64)
    outputs[0], outputs[1] = vocab - 1, torch.arange(5) / 7
    found = outputs.clone().to(device)
    record_masked(held, rows, totals, found)
    wanted = outputs.clone()
    wanted[3, rows.cpu()] = outputs[1, rows.cpu()]
    wanted[1, rows.cpu()] = logits.double().log_softmax(-1)[rows.cpu(), vocab - 1]
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-6, atol=1e-5)


CHECKS = {
    "masks of a small vocabulary": lambda device: check_masks(67, device),
    "masks over several chunks": lambda device: check_masks(9001, device),
    "a draw, greedy": lambda device: check(5000, GREEDY, device),
    "a draw, plain": lambda device: check(9001, PLAIN, device),
    "a draw, filtered": lambda device: check(4500, FILTERED, device),
    "a draw from a small vocabulary": lambda device: check(67, FILTERED, device),
    "a draw from whole chunks": lambda device: check(8192, PLAIN, device),
    "a draw without the ids that no token has, greedy": lambda device: check_tokenless(5000, GREEDY, device),
    "a draw without the ids that no token has": lambda device: check_tokenless(4500, FILTERED, device),
    "a draw from rows that are no distribution": lambda device: check_no_distribution(300, device),
}
