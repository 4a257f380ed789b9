"""Losses that are no linear function of the log-probs, through the trainer: cuts, fields, groups and metrics."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from engine.training.trainer_cases import Sample, difference, gradients, make_trainer, micro_batch, optim_step, samples
from harmony_core.errors import InternalError
from harmony_core.rpc.protocol import MicroBatch, pack_doubles
from tiny_models import build

SETTINGS = {"clip_low": 0.1, "clip_high": 0.2, "kl_beta": 0.04}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("llama"), "llama", layers=2)


def scored_places(chosen: list[Sample]) -> list[tuple[int, int]]:
    return [(s, t) for s, (_, weights) in enumerate(chosen) for t, w in enumerate(weights[1:]) if w]


def grpo_batch(everything: list[Sample], chosen: list[int]) -> MicroBatch:
    """Those of `everything` with the indices `chosen`; a token's numbers depend on its place in `everything` only."""
    places = scored_places([everything[i] for i in chosen])
    numbers = [(chosen[s], t) for s, t in places]
    batch = micro_batch([everything[i] for i in chosen])
    batch.loss, batch.settings = "grpo", SETTINGS
    batch.fields = {
        "trajectory": pack_doubles(-4.2 + 0.3 * math.sin(7 * s + t) for s, t in numbers),
        "reference": pack_doubles(-4.2 + 0.2 * math.cos(5 * s + t) for s, t in numbers),
        "advantages": pack_doubles((-1) ** s * (0.5 + 0.1 * s) for s, _ in numbers),
    }
    return batch


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-6)])
def test_cutting_and_order_do_not_change_the_step(llama: Path, dtype: str, tolerance: float) -> None:
    everything = samples(8)
    found = []
    for cuts in ([list(range(8))], [[i] for i in range(8)], [[7, 2, 4], [6, 0, 1], [5, 3]]):
        trainer = make_trainer(llama, dtype)
        numerator = sum(trainer.accumulate(grpo_batch(everything, cut)).numerator for cut in cuts)
        found.append((numerator, gradients(trainer), trainer.optim_step(optim_step(11.0))))
    numerator, expected, metrics = found[0]
    assert 0 < metrics["pg_clipfrac"] < 1 and metrics["Dkl"] > 0 and metrics["inner_kl_div"] > 0
    largest = max(g.abs().max().item() for g in expected.values())
    for other, grads, others in found[1:]:
        assert other == pytest.approx(numerator, rel=tolerance)
        assert max((grads[k] - expected[k]).abs().max().item() for k in expected) < 3 * tolerance * largest
        assert others.keys() == metrics.keys()
        for key in ("loss", "grad_norm", "num_tokens", "num_samples", "pg_clipfrac", "inner_kl_div", "Dkl"):
            assert others[key] == pytest.approx(metrics[key], rel=3 * tolerance), key


def test_metrics_belong_to_their_step(llama: Path) -> None:
    trainer = make_trainer(llama)
    trainer.accumulate(grpo_batch(samples(2), [0, 1]))
    assert "pg_clipfrac" in trainer.optim_step(optim_step(1.0))
    trainer.accumulate(micro_batch(samples(2)))
    assert "pg_clipfrac" not in trainer.optim_step(optim_step(1.0))


def test_a_loss_has_the_gradient_of_its_tangents(llama: Path) -> None:
    """At a ratio of 1 and without a reference the ascent direction is the advantage."""
    chosen = [(ids, [float(w > 0) for w in weights]) for ids, weights in samples(4)]
    probe = make_trainer(llama, "float64")
    batch = micro_batch(chosen)
    places = scored_places(chosen)
    advantages = [(-1.0) ** s * (1 + 0.1 * t) for s, t in places]
    batch.loss, batch.settings = "grpo", {"clip_low": 0.1, "clip_high": 0.1}
    batch.fields = {"trajectory": pack_doubles(logprobs(llama, chosen)), "advantages": pack_doubles(advantages)}
    done = probe.accumulate(batch)
    assert done.numerator == pytest.approx(-sum(advantages), rel=1e-9)
    linear = make_trainer(llama, "float64")
    given = micro_batch(chosen)
    tangents = dict(zip(places, advantages, strict=True))
    every = ((s, t) for s, (ids, _) in enumerate(chosen) for t in range(len(ids) - 1))
    given.coefficients = pack_doubles(tangents.get(place, 0.0) for place in every)
    linear.accumulate(given)
    assert difference(gradients(probe), gradients(linear)) < 1e-9


def logprobs(directory: Path, chosen: list[Sample]) -> list[float]:
    """Of the scored tokens, by transformers in float64."""
    import torch

    from tiny_models import reference

    model = reference(directory, torch.float64)
    found: list[float] = []
    for ids, weights in chosen:
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        row = scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        found += [x for x, w in zip(row, weights[1:], strict=True) if w]
    return found


def test_malformed_losses_are_refused(llama: Path) -> None:
    trainer = make_trainer(llama)
    for field, value in (
        ("loss", "linearr"),
        ("fields", {"trajectory": pack_doubles([1.0])}),
        ("group", 2),
        ("group", 0),
    ):
        batch = grpo_batch(samples(3), [0, 1, 2])
        setattr(batch, field, value)
        with pytest.raises(InternalError):
            trainer.accumulate(batch)
