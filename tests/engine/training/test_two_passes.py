"""Losses that are no linear function of the log-probs, through the trainer: cuts, fields, groups and metrics."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from engine.training.layout_cases import largest_error, loss_batch, scored_places
from engine.training.trainer_cases import Sample, gradients, make_trainer, micro_batch, optim_step, samples
from harmony_core.engine.models.adapters import add_lora
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.engine.training.loss_evaluation import evaluate
from harmony_core.engine.training.packing import unpack
from harmony_core.engine.training.trainer import Trainer
from harmony_core.engine.worker import score
from harmony_core.errors import InternalError
from harmony_core.rpc.protocol import LoraSettings, Score
from harmony_core.rpc.wire import pack_doubles, pack_ints, unpack_floats
from tiny_models import build, reference


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("llama"), "llama", layers=2)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-6)])
@pytest.mark.parametrize("loss", ["grpo", "gspo", "dpo"])
def test_cutting_and_order_do_not_change_the_step(llama: Path, loss: str, dtype: str, tolerance: float) -> None:
    everything = samples(8)
    found = []
    for cuts in ([list(range(8))], [[0, 1], [2, 3], [4, 5], [6, 7]], [[6, 7, 2, 3], [0, 1, 4, 5]]):
        trainer = make_trainer(llama, dtype)
        numerator = sum(trainer.accumulate(loss_batch(loss, everything, cut)).numerator for cut in cuts)
        found.append((numerator, gradients(trainer), trainer.optim_step(optim_step(11.0))))
    numerator, expected, metrics = found[0]
    for other, grads, others in found[1:]:
        assert other == pytest.approx(numerator, rel=tolerance)
        assert largest_error(grads, expected) < 3 * tolerance
        assert others.keys() == metrics.keys()
        for key in metrics.keys() - {"seconds"}:
            assert others[key] == pytest.approx(metrics[key], rel=3 * tolerance), key


def test_metrics_belong_to_their_step(llama: Path) -> None:
    trainer = make_trainer(llama)
    trainer.accumulate(loss_batch("grpo", samples(2), [0, 1]))
    assert "pg_clipfrac" in trainer.optim_step(optim_step(1.0))
    trainer.accumulate(micro_batch(samples(2)))
    assert "pg_clipfrac" not in trainer.optim_step(optim_step(1.0))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-6)])
@pytest.mark.parametrize("loss", ["grpo", "gspo", "dpo"])
def test_a_loss_has_the_gradient_of_its_tangents(
    llama: Path, loss: str, dtype: str, tolerance: float, lora: bool
) -> None:
    """Its tangents at the log-probs of another implementation, where that has the same weights."""
    everything = samples(4)
    places = scored_places(everything)
    batch = loss_batch(loss, everything, list(range(4)))
    native, linear = make_trainer(llama, dtype, lora), make_trainer(llama, dtype, lora)
    at = trained_logprobs(native, everything) if lora else logprobs(llama, everything)
    packed = unpack(batch, native.model.device)
    total, (direction,), _ = evaluate(loss, packed.given(torch.tensor(at, dtype=torch.float64)))
    assert native.accumulate(batch).numerator == pytest.approx(total, rel=tolerance)
    given = micro_batch(everything)
    tangents = dict(zip(places, direction.tolist(), strict=True))
    every = ((s, t) for s, (ids, _) in enumerate(everything) for t in range(len(ids) - 1))
    given.coefficients = pack_doubles(tangents.get(place, 0.0) for place in every)
    linear.accumulate(given)
    assert largest_error(gradients(native), gradients(linear)) < 3 * tolerance


def logprobs(directory: Path, chosen: list[Sample]) -> list[float]:
    """Of the scored tokens, by transformers in float64."""
    model = reference(directory, torch.float64)
    found: list[float] = []
    for ids, weights in chosen:
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        row = scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
        found += [x for x, w in zip(row, weights[1:], strict=True) if w]
    return found


def trained_logprobs(trainer: Trainer, chosen: list[Sample]) -> list[float]:
    """Of the scored tokens, with the trainer's adapter: each by itself, from what its linear loss is."""
    found = []
    for ids, weights in chosen:
        for place in (t for t, w in enumerate(weights[1:]) if w):
            alone = [0.0] * len(ids)
            alone[place + 1] = 1.0
            found.append(-trainer.accumulate(micro_batch([(ids, alone)])).numerator)
    trainer.abandon()
    return found


def test_malformed_losses_are_refused(llama: Path) -> None:
    trainer = make_trainer(llama)
    for field, value in (
        ("loss", "linearr"),
        ("fields", {"trajectory_logprobs": pack_doubles([1.0])}),
        ("group", 2),
        ("group", 0),
        ("parts", pack_ints([1, 1])),
        ("parts", pack_ints([0, 3])),
    ):
        batch = loss_batch("grpo", samples(3), [0, 1, 2])
        setattr(batch, field, value)
        with pytest.raises(InternalError):
            trainer.accumulate(batch)


def test_both_passes_over_a_part_drop_the_same(llama: Path) -> None:
    """With dropout the gradient is that of the loss at the log-probs which the same dropout gives."""
    everything = [(ids, [float(w > 0) for w in weights]) for ids, weights in samples(2)]
    model = load_model(llama, TensorParallel.single(), torch.device("cpu"), torch.float64)
    add_lora(model, "policy", LoraSettings(rank=4, dropout=0.5))
    for parameter in model.adapters["policy"].parameters.values():
        parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    trainer = Trainer(model, "policy")

    def linear(*scales: float) -> list[float]:
        """Log-probs of both samples, which are micro-batches here, and so parts of the same numbers."""
        trainer.abandon()
        found = []
        for (ids, weights), scale in zip(everything, scales, strict=True):
            done = trainer.accumulate(micro_batch([(ids, [scale * w for w in weights])]))
            found.append(-done.numerator / scale)
        return found

    sums = linear(1.0, 1.0)
    rewards = [0.1 * (x + 4.2 * len(ids) - s) for s, (x, (ids, _)) in enumerate(zip(sums, everything, strict=True))]
    pull = 0.1 / (1 + math.exp(rewards[0] - rewards[1]))
    linear(pull, -pull)
    expected = gradients(trainer)
    trainer.abandon()
    batch = loss_batch("dpo", everything, [0, 1])
    batch.parts = pack_ints([1, 1])
    loss = math.log1p(math.exp(rewards[1] - rewards[0]))
    assert trainer.accumulate(batch).numerator == pytest.approx(loss, rel=1e-9)
    assert largest_error(gradients(trainer), expected) < 1e-9


def test_a_ratio_to_what_was_sampled_is_taken_without_dropout(llama: Path) -> None:
    """The trainer's log-probs are the scorer's: on what it drew itself nothing is clipped."""
    everything = samples(3)
    model = load_model(llama, TensorParallel.single(), torch.device("cpu"), torch.float64)
    add_lora(model, "policy", LoraSettings(rank=4, dropout=0.5))
    for parameter in model.adapters["policy"].parameters.values():
        parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    trainer = Trainer(model, "policy")
    found = {}
    for dropout in (True, False):
        batch = loss_batch("grpo", everything, [0, 1, 2])
        batch.dropout = dropout
        logprobs = [x for b in trained_scores(model, everything) for x in b]
        batch.fields["trajectory_logprobs"] = pack_doubles(logprobs)
        trainer.accumulate(batch)
        found[dropout] = trainer.optim_step(optim_step(7.0, lr=0.0, weight_decay=0.0))
    assert found[True]["pg_clipfrac"] > 0.1 and found[True]["inner_kl_div"] > 1e-3
    assert found[False]["pg_clipfrac"] == 0.0 and found[False]["inner_kl_div"] < 1e-10


def trained_scores(model: CausalLM, chosen: list[Sample]) -> list[list[float]]:
    """Log-probs of the scored tokens of each sample, as `logprobs_per_token` gives them."""
    requests = [
        Score(
            model="policy",
            replica=0,
            tokens=pack_ints(ids[:-1]),
            targets=pack_ints(t if w else -1 for t, w in zip(ids[1:], weights[1:], strict=True)),
        )
        for ids, weights in chosen
    ]
    parts = [unpack_floats(part) for part in score(model, "policy", requests)]
    return [[x for x, w in zip(p, ws[1:], strict=True) if w] for p, (_, ws) in zip(parts, chosen, strict=True)]
