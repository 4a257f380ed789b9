from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from harmony_core.engine.inference.sampler import Sampled, _floors, put, sample
from harmony_core.engine.inference.step import (
    SamplingParameters,
    Setting,
    pack_sampling,
    stream,
    uniforms,
    unpack_sampling,
)
from harmony_core.rpc.protocol import Sampling

Settings = tuple[float, int, float, float]
"""temperature, top_k, top_p, min_p"""

PLAIN: Settings = (1.0, 0, 1.0, 0.0)


def draws_of(settings: Sequence[Settings], seeds: Sequence[int] | None = None, position: int = 0) -> SamplingParameters:
    keys = [stream(seed) for seed in (range(len(settings)) if seeds is None else seeds)]
    numbers = uniforms(keys, [position] * len(settings))
    return draws_with(settings, numbers)


def draws_with(settings: Sequence[Settings], numbers: NDArray[np.float64]) -> SamplingParameters:
    samplings = [Sampling(temperature=t, top_k=k, top_p=p, min_p=m) for t, k, p, m in settings]
    return unpack_sampling(pack_sampling([Setting.of(sampling) for sampling in samplings], numbers))


def random_logits(rows: int, vocab: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def keep(scaled: Tensor, parameters: SamplingParameters) -> Tensor:
    """Which ids top-k, top-p and min-p leave, `[N, V]`, for logits already divided by the temperature."""
    scaled = scaled - scaled.amax(-1, keepdim=True)
    return scaled >= _floors(scaled, put(parameters.copy(), scaled.device), ranked=True)


def warped(logits: Tensor, setting: Settings) -> Tensor:
    """transformers' own warpers, in the order in which `generate` applies them."""
    temperature, top_k, top_p, min_p = setting
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    scores = TemperatureLogitsWarper(temperature)(ids, logits) if temperature != 1 else logits
    if top_k:
        scores = TopKLogitsWarper(int(top_k))(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(ids, scores)
    return scores


SETTINGS: list[Settings] = [
    (1.0, 1, 1.0, 0.0),
    (1.0, 50, 1.0, 0.0),
    (1.0, 5000, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (3.0, 0, 0.99, 0.0),
    (0.5, 0, 0.3, 0.0),
    (1.0, 0, 1e-9, 0.0),
    (1.0, 0, 1.0, 0.05),
    (1.0, 0, 1.0, 1.0),
    (0.7, 40, 0.95, 0.02),
    (1.5, 400, 0.97, 0.001),
]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("vocab", [7, 3000])
def test_top_k_top_p_and_min_p_keep_the_sets_that_transformers_keeps(setting: Settings, vocab: int) -> None:
    logits = random_logits(8, vocab)
    kept = keep(logits / setting[0], draws_of([setting] * 8))
    assert torch.equal(kept, warped(logits, setting).isfinite())
    assert kept.any(-1).all()


def test_a_flat_distribution_keeps_most_of_a_vocabulary() -> None:
    logits = random_logits(3, 6000, spread=0.1)
    setting: Settings = (1.0, 0, 0.8, 0.0)
    kept = keep(logits, draws_of([setting] * 3))
    assert torch.equal(kept, warped(logits, setting).isfinite())
    assert (kept.sum(-1) > 4000).all()


def test_equal_logits_are_kept_together() -> None:
    logits = torch.tensor([[2.0, 3.0, 2.0, 1.0, 2.0]])
    assert keep(logits, draws_of([(1.0, 2, 1.0, 0.0)])).tolist() == [[True, True, True, False, True]]


@pytest.mark.parametrize("setting", [PLAIN, (0.6, 0, 1.0, 0.0), (2.5, 0, 1.0, 0.0), *SETTINGS])
def test_log_probs_are_those_of_the_raw_and_of_the_processed_distribution(setting: Settings) -> None:
    logits = random_logits(16, 2000)
    drawn = sample(logits, draws_of([setting] * 16))
    rows = torch.arange(16)
    raw = logits.double().log_softmax(-1)[rows, drawn.tokens]
    processed = warped(logits, setting).double().log_softmax(-1)[rows, drawn.tokens]
    torch.testing.assert_close(drawn.logprobs.double(), raw, atol=1e-5, rtol=0)
    torch.testing.assert_close(drawn.sampled_logprobs.double(), processed, atol=1e-5, rtol=1e-6)
    assert drawn.logprobs.isfinite().all()


def test_greedy_takes_the_lowest_of_the_best_and_is_certain_of_it() -> None:
    logits = torch.zeros(2, 50)
    logits[0, [7, 30]] = 4.0
    drawn = sample(logits, draws_of([(0.0, 0, 1.0, 0.0)] * 2))
    assert drawn.tokens.tolist() == [7, 0]
    assert drawn.sampled_logprobs.tolist() == [0, 0]
    torch.testing.assert_close(drawn.logprobs, logits.log_softmax(-1)[[0, 1], [7, 0]])


def test_a_token_is_found_by_inverse_cdf_over_ids() -> None:
    probabilities = torch.tensor([0.1, 0.0, 0.4, 0.2, 0.3])
    edges = [(0.0, 0), (0.09, 0), (0.11, 2), (0.49, 2), (0.51, 3), (0.69, 3), (0.71, 4), (1 - 2.0**-53, 4)]
    count = len(edges)
    draws = draws_with([PLAIN] * count, np.array([number for number, _ in edges]))
    drawn = sample(probabilities.log().expand(count, -1), draws)
    assert drawn.tokens.tolist() == [token for _, token in edges]


@pytest.mark.parametrize("vocab", [2048, 2049, 5000])
def test_a_large_vocabulary_is_searched_as_a_small_one_is(vocab: int) -> None:
    count = 3000
    logits = random_logits(1, vocab, seed=6)
    logits[0, : vocab // 2] = float("-inf")
    logits[0, -300:-5] = float("-inf")
    numbers = np.concatenate([uniforms([1] * count, range(count)), [0.0, 1 - 2.0**-53, 1e-300]])
    drawn = sample(logits.expand(len(numbers), -1), draws_with([PLAIN] * len(numbers), numbers)).tokens
    ends = np.cumsum((logits[0] - logits.max()).exp().double().numpy())
    assert drawn.tolist() == np.searchsorted(ends, numbers * ends[-1], side="right").tolist()
    assert drawn.min() == vocab // 2 and drawn.max() == vocab - 1


MIXED: list[Settings] = [PLAIN, (0.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (1.0, 5, 1.0, 0.0), (0.9, 0, 0.9, 0.01)] * 4


def test_neighbours_with_other_settings_change_nothing() -> None:
    logits = random_logits(len(MIXED), 3000)
    together = sample(logits, draws_of(MIXED), {3: [1, 2]})
    for row, setting in enumerate(MIXED):
        alone = sample(logits[row : row + 1], draws_of([setting], [row]), {0: [1, 2]} if row == 3 else {})
        assert alone.tokens[0] == together.tokens[row]
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[row], atol=1e-6, rtol=0)
        torch.testing.assert_close(alone.sampled_logprobs[0], together.sampled_logprobs[row], atol=1e-6, rtol=0)


def chi_square(tokens: Tensor, probabilities: Tensor) -> tuple[float, int]:
    """Statistic and degrees of freedom; ids that are expected less than 5 times are counted together."""
    observed = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    assert observed[probabilities == 0].sum() == 0
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    used = expected > 0
    return float(((observed - expected)[used] ** 2 / expected[used]).sum()), int(used.sum()) - 1


@pytest.mark.parametrize(
    "setting", [PLAIN, (0.5, 0, 1.0, 0.0), (1.3, 20, 1.0, 0.0), (1.0, 0, 0.8, 0.0), (1, 9, 0.9, 0.1)]
)
@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_twenty_thousand_draws_follow_the_probabilities(setting: Settings, over: str) -> None:
    count = 20_000
    logits = random_logits(1, 60, seed=4, spread=1.5)
    streams = [stream(seed) for seed in range(count)]
    numbers = uniforms(streams, [3] * count) if over == "seeds" else uniforms(streams[3:4] * count, range(count))
    draws = draws_with([setting] * count, numbers)
    tokens = sample(logits.expand(count, -1), draws).tokens
    statistic, freedom = chi_square(tokens, warped(logits, setting).softmax(-1)[0])
    # Mean `freedom`, variance twice that: 4.5 standard deviations.
    assert statistic < freedom + 4.5 * (2 * freedom) ** 0.5
    uniform, _ = chi_square(tokens[:2000], torch.full((60,), 1 / 60))
    assert uniform > 59 + 4.5 * (2 * 59) ** 0.5, "the test could not tell one distribution from another"


def test_suppressed_ids_are_not_drawn_and_the_raw_log_prob_ignores_that() -> None:
    logits = random_logits(400, 6)
    logits[:, 2] += 20
    settings = [PLAIN, (0.0, 0, 1.0, 0.0), (1.0, 2, 1.0, 0.0), (1.0, 0, 0.5, 0.0)] * 100
    drawn = sample(logits, draws_of(settings), {row: [2, 4] for row in range(400)})
    assert not torch.isin(drawn.tokens, torch.tensor([2, 4])).any()
    raw = logits.log_softmax(-1).gather(-1, drawn.tokens[:, None])[:, 0]
    torch.testing.assert_close(drawn.logprobs, raw)
    assert (drawn.logprobs < -5).all() and (drawn.sampled_logprobs > -15).all()
    assert (sample(logits, draws_of(settings), {5: [2, 4]}).tokens[:5] == 2).all()


@pytest.mark.parametrize("hidden", [range(1900, 2000), (0, 7, 1999), (3,)])
def test_ids_without_a_token_are_not_drawn_and_the_raw_log_prob_counts_them(hidden: Sequence[int]) -> None:
    settings: list[Settings] = [PLAIN, (0.0, 0, 1.0, 0.0), (0.6, 0, 1.0, 0.0), *SETTINGS] * 8
    logits, ids = random_logits(len(settings), 2000), torch.tensor(list(hidden))
    logits[:, ids[0]] += 20
    masked = logits.index_fill(-1, ids, float("-inf"))
    held = {row: [5] for row in range(0, len(settings), 3)}
    drawn = sample(logits.clone(), draws_of(settings), held, ids)
    assert not torch.isin(drawn.tokens, ids).any()
    plain = sample(masked, draws_of(settings), held)
    assert torch.equal(drawn.tokens, plain.tokens) and torch.equal(drawn.sampled_logprobs, plain.sampled_logprobs)
    raw = logits.double().log_softmax(-1).gather(-1, drawn.tokens[:, None])[:, 0]
    torch.testing.assert_close(drawn.logprobs.double(), raw, atol=1e-5, rtol=1e-6)
    only = sample(logits.clone(), draws_of([PLAIN] * len(logits)), None, ids)
    assert ((only.sampled_logprobs - only.logprobs) > 1).float().mean() > 0.9


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_no_distribution_are_reported_and_disturb_nobody(bad: float) -> None:
    settings = MIXED
    logits = random_logits(len(settings), 500)
    good = sample(logits, draws_of(settings))
    spoilt = logits.clone()
    for row in range(5, 10):
        spoilt[row, 17] = bad
    drawn = sample(spoilt, draws_of(settings))
    healthy = torch.tensor([row not in range(5, 10) for row in range(len(settings))])
    assert torch.equal(drawn.logprobs.isfinite() & drawn.sampled_logprobs.isfinite(), healthy)
    assert torch.equal(drawn.tokens[healthy], good.tokens[healthy])
    assert drawn.tokens.max() < 500


def same(a: Sampled, b: Sampled) -> bool:
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.logprobs, b.logprobs)


def test_a_tiny_temperature_is_greedy_and_not_a_number_is_never_met() -> None:
    logits = random_logits(8, 300)
    cold = sample(logits, draws_of([(1e-300, 0, 1.0, 0.0), (1e-45, 3, 0.9, 0.1)] * 4))
    assert same(cold, sample(logits, draws_of([(0.0, 0, 1.0, 0.0)] * 8)))
    assert cold.sampled_logprobs.isfinite().all()


def test_double_precision_logits_are_taken_as_they_are() -> None:
    logits = random_logits(len(MIXED), 300)
    assert torch.equal(sample(logits.double(), draws_of(MIXED)).tokens, sample(logits, draws_of(MIXED)).tokens)
