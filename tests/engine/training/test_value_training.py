"""Training a scalar head and what is below it: gradients of plain autograd, and the same step however it is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.training.trainer_cases import difference, gradients, micro_batch, optim_step, samples
from engine.training.value_cases import LENGTHS, LOSSES, head_values, make_critic, places, value_batch
from harmony_core.engine.models.heads import SCORE, head_of, scores
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.engine.training.trainer import Trainer
from harmony_core.errors import InternalError
from harmony_core.rpc.wire import pack_ints
from ranks import RankPool
from tiny_models import build

TOLERANCE = {"float32": 1e-5, "float64": 1e-9}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": build(root / "llama", "llama"),
        "qwen3 tied, one kv head": build(root / "qwen3", "qwen3", tied=True, kv_heads=1),
    }


@pytest.mark.parametrize(("ranks", "tp"), [(1, 1), (2, 2), (4, 2), (2, 1)], ids=["tp1", "tp2", "dp2-tp2", "dp2"])
def test_gradients_are_those_of_plain_autograd(
    rank_pool: RankPool, models: dict[str, Path], ranks: int, tp: int
) -> None:
    kinds = [
        *(("llama", loss, dtype, False) for loss in LOSSES for dtype in TOLERANCE),
        *(("qwen3 tied, one kv head", loss, dtype, True) for loss in LOSSES[2:] for dtype in TOLERANCE),
        ("qwen3 tied, one kv head", "mse_per_token", "float64", False),
    ]
    cases: list[dict[str, Any]] = [
        {"directory": str(models[name]), "loss": loss, "tp": tp, "dtype": dtype, "lora": lora}
        for name, loss, dtype, lora in kinds
    ]
    for of_rank in rank_pool.run("engine.training.value_cases:against_autograd", ranks=ranks, cases=cases):
        for case, result in zip(cases, of_rank, strict=True):
            assert max(result["loss"], result["gradient"]) < TOLERANCE[case["dtype"]], (case, result)


CUTS = ([list(range(8))], [[0, 1], [2, 3], [4, 5], [6, 7]], [[6, 7, 2, 3], [4, 5, 0, 1]])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
@pytest.mark.parametrize("loss", LOSSES)
def test_cutting_and_order_do_not_change_the_step(
    models: dict[str, Path], loss: str, dtype: str, tolerance: float
) -> None:
    found = []
    for cuts in CUTS:
        trainer = make_critic(models["llama"], dtype)
        numerator = sum(trainer.accumulate(value_batch(loss, cut)).numerator for cut in cuts)
        found.append((numerator, gradients(trainer), trainer.optim_step(optim_step(8.0))))
    numerator, expected, metrics = found[0]
    largest = max(g.abs().max().item() for g in expected.values())
    for other, grads, others in found[1:]:
        assert other == pytest.approx(numerator, rel=tolerance)
        assert max((grads[k] - expected[k]).abs().max().item() for k in expected) < 3 * tolerance * largest
        for key in metrics.keys() - {"seconds"}:
            assert others[key] == pytest.approx(metrics[key], rel=3 * tolerance), key
    assert metrics["num_samples"] == (4 if loss == "ranking" else 8)
    names = {"ranking": {"reward_accuracy", "reward_margin"}, "trust_region_mse": {"mse", "value_clipfrac"}}
    assert names.get(loss, {"mse"}) <= metrics.keys()


def test_a_new_head_is_zero_and_the_second_step_reaches_the_layers(models: dict[str, Path]) -> None:
    model = load_model(models["llama"], TensorParallel.single(), torch.device("cpu"), torch.float32, scalar=True)
    assert not model.has_vocabulary_head and "lm_head.weight" not in model.base_parameters
    trainer = Trainer(model, None, score=head_of(model, None))
    done = trainer.accumulate(value_batch("ranking", list(range(8))))
    assert done.numerator == pytest.approx(4 * torch.tensor(2.0).log().item(), abs=1e-6)
    first = gradients(trainer)
    assert first[SCORE].any() and not any(g.any() for name, g in first.items() if name != SCORE)
    trainer.optim_step(optim_step(4.0))
    trainer.accumulate(value_batch("ranking", list(range(8))))
    assert all(g.any() for g in gradients(trainer).values())


def test_unscored_positions_have_no_part(models: dict[str, Path]) -> None:
    """A value depends on the tokens before it only: those after the last scored one change nothing."""
    sample, cut = 1, 4
    assert LENGTHS[sample] == cut + 1 and places("mse_per_token", sample)[-1] == cut - 1
    shorter = value_batch("mse_per_token", [sample])
    for name, width in (("tokens", 4), ("targets", 4), ("coefficients", 8)):
        setattr(shorter, name, getattr(shorter, name)[: cut * width])
    shorter.lengths = pack_ints([cut])
    found = []
    for batch in (value_batch("mse_per_token", [sample]), shorter):
        trainer = make_critic(models["llama"], "float64")
        found.append((trainer.accumulate(batch).numerator, gradients(trainer)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    assert difference(found[0][1], found[1][1]) < 1e-9


def test_a_value_is_not_rounded_to_half_precision(models: dict[str, Path]) -> None:
    model = load_model(models["llama"], TensorParallel.single(), torch.device("cpu"), torch.bfloat16, scalar=True)
    hidden = torch.randn(5, model.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    head = torch.nn.Parameter(head_values().bfloat16())
    found = scores(model, hidden, head)
    torch.testing.assert_close(
        found.detach().double(), hidden.double() @ head[0].detach().double(), rtol=1e-5, atol=1e-5
    )
    assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())
    found.sum().backward()
    assert head.grad is not None and head.grad.dtype == torch.bfloat16


def test_a_loss_on_log_probs_is_refused(models: dict[str, Path]) -> None:
    with pytest.raises(InternalError, match="linear"):
        make_critic(models["llama"]).accumulate(micro_batch(samples(2)))
