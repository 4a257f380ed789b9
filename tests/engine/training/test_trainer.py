"""The trainer on one rank: what a step means, and what leaves it unchanged."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from engine.training.trainer_cases import (
    PlainLoop,
    difference,
    gradients,
    make_trainer,
    micro_batch,
    optim_step,
    parameters,
    samples,
    total_weight,
)
from harmony_core.engine.training.trainer import Trainer
from harmony_core.errors import DataError, EngineError, InternalError, NothingToTrain, StepFailed, UsageError
from harmony_core.rpc.wire import pack_doubles, pack_ints
from tiny_models import build, golden


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("llama"), "llama", layers=3)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("qwen3"), "qwen3", tied=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 5e-7), ("float32", 2e-4)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_steps_equal_those_of_a_plain_loop(
    family: str, dtype: str, tolerance: float, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(family)
    # transformers normalises in float32 whatever the model's type, and rounds gradients of another scale otherwise.
    trainer, plain = make_trainer(directory, dtype), PlainLoop(directory, dtype)
    for step in range(6):
        chosen = samples(7, seed=step)
        trainer.accumulate(micro_batch(chosen[:4]))
        trainer.accumulate(micro_batch(chosen[4:]))
        metrics = trainer.optim_step(optim_step(total_weight(chosen)))
        loss, norm = plain.step(chosen)
        assert metrics["loss"] == pytest.approx(loss, abs=tolerance)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=tolerance)
        assert metrics["clipped"] == float(norm > 1.0)
    expected = {name: p.detach() for name, p in plain.model.named_parameters()}
    assert difference(parameters(trainer), expected) < tolerance * 10


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
@pytest.mark.parametrize("lora", [False, True])
def test_cutting_packing_and_order_do_not_change_the_step(
    llama: Path, dtype: str, tolerance: float, lora: bool
) -> None:
    chosen = samples(9)
    orders = {
        "one micro-batch": [chosen],
        "one each": [[sample] for sample in chosen],
        "cut in three": [chosen[:2], chosen[2:7], chosen[7:]],
        "backwards": [chosen[::-1][:5], chosen[::-1][5:]],
    }
    found = {}
    for name, cuts in orders.items():
        trainer = make_trainer(llama, dtype, lora)
        numerator = sum(trainer.accumulate(micro_batch(cut)).numerator for cut in cuts)
        found[name] = numerator, gradients(trainer), trainer.optim_step(optim_step(total_weight(chosen)))
    numerator, expected, metrics = found.pop("one each")
    for name, (other, grads, others) in found.items():
        assert other == pytest.approx(numerator, rel=tolerance), name
        # A gradient that nearly cancels has few right digits of its own: errors count against the whole.
        largest = max(g.abs().max().item() for g in expected.values())
        assert max((grads[k] - expected[k]).abs().max().item() for k in expected) < 3 * tolerance * largest, name
        for key in ("loss", "grad_norm", "num_tokens", "num_samples"):
            assert others[key] == pytest.approx(metrics[key], rel=2 * tolerance), (name, key)


@pytest.mark.parametrize("packed", [True, False])
def test_golden_loss_and_gradient(tmp_path: Path, packed: bool) -> None:
    first, second = [1, 5, 9, 13, 17, 21, 2], [1, 6, 11, 16, 21, 26, 31, 3, 2]
    chosen = [(ids, [0.0] * 3 + [1.0] * (len(ids) - 3)) for ids in (first, second)]
    trainer = make_trainer(golden(tmp_path))
    cuts = [chosen] if packed else [[sample] for sample in chosen]
    done = [trainer.accumulate(micro_batch(cut)) for cut in cuts]
    assert sum(d.numerator for d in done) == pytest.approx(10.517499923706055 + 19.154621124267578, rel=1e-6)
    head = gradients(trainer)["lm_head.weight"] / 10
    assert head.norm().item() == pytest.approx(1.101690649986267, rel=1e-6)
    metrics = trainer.optim_step(optim_step(total_weight(chosen)))
    assert metrics["loss"] == pytest.approx(2.967212200164795, rel=1e-6)
    assert metrics["num_tokens"] == 10.0


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_recomputed_layers_give_identical_gradients(llama: Path, lora: bool, layers: int) -> None:
    plain, recomputing = make_trainer(llama, lora=lora), make_trainer(llama, lora=lora)
    recomputing.model.set_checkpointed_layers(layers)
    for trainer in (plain, recomputing):
        trainer.accumulate(micro_batch(samples(6)))
    assert torch.equal(plain.gradients.buffer, recomputing.gradients.buffer)
    assert plain.gradients.buffer.any()


def test_tokens_without_weight_give_no_gradient(llama: Path) -> None:
    ids = [5, 6, 7, 8, 9, 10, 11]
    trainer, shorter = make_trainer(llama, "float64"), make_trainer(llama, "float64")
    trainer.accumulate(micro_batch([(ids, [0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])]))
    shorter.accumulate(micro_batch([(ids[:3], [0.0, 1.0, 1.0])]))
    assert difference(gradients(trainer), gradients(shorter)) < 1e-12
    done = trainer.accumulate(micro_batch([(ids, [0.0] * 7)]))
    assert (done.numerator, done.tokens, done.samples) == (0.0, [6], 1)
    assert difference(gradients(trainer), gradients(shorter)) < 1e-12


def test_an_adapter_trains_itself_and_nothing_else(llama: Path) -> None:
    trainer = make_trainer(llama, lora=True)
    base = {name: p.detach().clone() for name, p in trainer.model.base_parameters.items()}
    before = parameters(trainer)
    trainer.accumulate(micro_batch(samples(4)))
    trainer.optim_step(optim_step(10.0))
    assert all(torch.equal(p, base[name]) for name, p in trainer.model.base_parameters.items())
    assert all(p.grad is None for p in trainer.model.base_parameters.values())
    after = parameters(trainer)
    assert all(not torch.equal(after[name], before[name]) for name in before)


def test_parameters_are_updated_where_they_lie(llama: Path) -> None:
    trainer = make_trainer(llama)
    addresses = [p.data_ptr() for p in trainer.model.base_parameters.values()]
    for _ in range(2):
        trainer.accumulate(micro_batch(samples(2)))
        trainer.optim_step(optim_step(5.0))
    assert [p.data_ptr() for p in trainer.model.base_parameters.values()] == addresses


def _everything(trainer: Trainer) -> list[torch.Tensor]:
    return [
        trainer.gradients.buffer.clone(),
        *(buffer.clone() for buffer in trainer.optimizer.state().values()),
        *parameters(trainer).values(),
        torch.get_rng_state(),
    ]


@pytest.mark.parametrize("pending", [False, True])
def test_rehearsing_leaves_no_trace(llama: Path, pending: bool) -> None:
    trainer = make_trainer(llama)
    trainer.accumulate(micro_batch(samples(3)))
    trainer.optim_step(optim_step(10.0))
    if pending:
        trainer.accumulate(micro_batch(samples(3)))
    before = _everything(trainer)
    trainer.rehearse(200)
    after = _everything(trainer)
    # Bits, not values: 0.0 equals -0.0.
    assert all(x.numpy().tobytes() == y.numpy().tobytes() for x, y in zip(before, after, strict=True))
    assert trainer.step == 1


def test_nothing_to_train_is_refused_before_any_update(llama: Path) -> None:
    trainer = make_trainer(llama)
    before = _everything(trainer)
    for request in (optim_step(0.0), optim_step(1.0, normalise="sum"), optim_step(3.0)):
        with pytest.raises(NothingToTrain, match="step 1 of 'policy'"):
            trainer.optim_step(request)
    trainer.accumulate(micro_batch(samples(2)))
    with pytest.raises(NothingToTrain):
        trainer.optim_step(optim_step(0.0))
    assert trainer.step == 0
    assert all(torch.equal(x, y) for x, y in zip(before, _everything(trainer), strict=True))


def test_sum_divides_by_nothing(llama: Path) -> None:
    chosen = samples(3)
    mean, total = make_trainer(llama, "float64"), make_trainer(llama, "float64")
    for trainer in (mean, total):
        trainer.accumulate(micro_batch(chosen))
    weight = total_weight(chosen)
    by_mean = mean.optim_step(optim_step(weight, max_grad_norm=float("inf")))
    by_sum = total.optim_step(optim_step(weight, normalise="sum", max_grad_norm=float("inf")))
    assert by_sum["loss"] == pytest.approx(by_mean["loss"] * weight, rel=1e-12)
    assert by_sum["grad_norm"] == pytest.approx(by_mean["grad_norm"] * weight, rel=1e-12)
    assert by_sum["clipped"] == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_names_its_tensor_and_changes_nothing(llama: Path, bad: float) -> None:
    trainer = make_trainer(llama)
    before = _everything(trainer)
    sample = samples(1)[0]
    trainer.accumulate(micro_batch([(sample[0], [0.0] * (len(sample[0]) - 1) + [bad])]))
    with pytest.raises(EngineError, match=r"step 1 of 'policy'.*NaN") as error:
        trainer.optim_step(optim_step(1.0))
    assert error.value.details["tensor"] in trainer.model.base_parameters
    assert all(torch.equal(x, y) for x, y in zip(before, _everything(trainer), strict=True))
    trainer.accumulate(micro_batch([(sample[0], [0.0] * (len(sample[0]) - 1) + [bad])]))
    metrics = trainer.optim_step(optim_step(1.0, skip_nan=True))
    assert (metrics["skipped"], metrics["step"], metrics["clipped"]) == (1.0, 0.0, 0.0)
    assert all(torch.equal(x, y) for x, y in zip(before, _everything(trainer), strict=True))


def test_a_failed_micro_batch_spoils_the_step_until_it_is_abandoned(llama: Path) -> None:
    trainer = make_trainer(llama)
    trainer.accumulate(micro_batch(samples(2)))
    broken = micro_batch(samples(1))
    broken.tokens = pack_ints([67] * (len(broken.tokens) // 4))
    with pytest.raises(DataError, match="token id 67 is outside the vocabulary of 67"):
        trainer.accumulate(broken)
    with pytest.raises(StepFailed):
        trainer.optim_step(optim_step(1.0))
    trainer.abandon()
    assert not trainer.gradients.buffer.any()
    chosen = samples(2, seed=4)
    trainer.accumulate(micro_batch(chosen))
    fresh = make_trainer(llama)
    fresh.accumulate(micro_batch(chosen))
    metrics = [t.optim_step(optim_step(total_weight(chosen))) for t in (trainer, fresh)]
    assert metrics[0]["loss"] == metrics[1]["loss"] and metrics[0]["num_samples"] == 2.0


def test_metrics_and_the_step_counter(llama: Path) -> None:
    chosen = samples(5)
    trainer = make_trainer(llama)
    trainer.step = 41
    trainer.accumulate(micro_batch(chosen))
    metrics = trainer.optim_step(optim_step(total_weight(chosen), lr=3e-4))
    weighted = sum(w != 0 for _, weights in chosen for w in weights[1:])
    assert (metrics["num_tokens"], metrics["num_samples"], metrics["lr"]) == (weighted, 5.0, 3e-4)
    assert metrics["step"] == trainer.step == 42
    assert metrics["seconds"] > 0
    with pytest.raises(UsageError, match="-1"):
        trainer.step = -1


def test_state_is_allocated_at_spawn(llama: Path) -> None:
    trainer = make_trainer(llama)
    count = sum(p.numel() for p in trainer.model.base_parameters.values())
    assert trainer.num_trainable == count
    assert (trainer.gradient_bytes, trainer.state_bytes) == (4 * count, 8 * count)
    buffers = [trainer.gradients.buffer.data_ptr(), trainer.optimizer.exp_avg.data_ptr()]
    for _ in range(2):
        trainer.accumulate(micro_batch(samples(2)))
        trainer.optim_step(optim_step(1.0))
    assert [trainer.gradients.buffer.data_ptr(), trainer.optimizer.exp_avg.data_ptr()] == buffers
    adapter = make_trainer(llama, lora=True)
    assert adapter.state_bytes == 8 * sum(p.numel() for p in adapter.model.adapters["policy"].parameters.values())


def test_a_closed_trainer_lets_its_parameters_go(llama: Path) -> None:
    trainer = make_trainer(llama)
    trainer.close()
    assert all(p.grad is None for p in trainer.model.base_parameters.values())


def test_half_precision_keeps_float32_masters_and_gradients(llama: Path) -> None:
    """What CUDA does, on CPU: many small updates that bfloat16 alone would round away."""
    from harmony_core.engine.models.loading import load_model
    from harmony_core.engine.models.parallel import TensorParallel

    model = load_model(llama, TensorParallel.single(), torch.device("cpu"), torch.bfloat16)
    trainer = Trainer(model, None)
    assert trainer.gradients.dtype == torch.float32 and trainer.state_bytes == 12 * trainer.num_trainable
    start = model.base_parameters["model.embed_tokens.weight"].detach().float().clone()
    chosen = samples(4)
    losses = []
    for _ in range(40):
        trainer.accumulate(micro_batch(chosen))
        losses.append(trainer.optim_step(optim_step(total_weight(chosen), lr=2e-4, weight_decay=0.0))["loss"])
    assert all(p.grad is None for p in model.base_parameters.values())
    assert losses[-1] < losses[0] - 0.1
    moved = (model.base_parameters["model.embed_tokens.weight"].detach().float() - start).abs().max()
    assert moved > 40 * 2e-4 * 0.5
    master = trainer.optimizer.master
    assert master is not None
    for slot in trainer.gradients.spans:
        assert torch.equal(slot.of(master).to(torch.bfloat16), slot.parameter)


def test_a_replaced_gradient_is_noticed(llama: Path) -> None:
    trainer = make_trainer(llama)
    trainer.accumulate(micro_batch(samples(2)))
    trainer.model.module.zero_grad(set_to_none=True)
    with pytest.raises(InternalError, match="gradient of"):
        trainer.optim_step(optim_step(1.0))


def test_malformed_micro_batches_are_refused(llama: Path) -> None:
    trainer = make_trainer(llama)
    for field, value in itertools.product(
        ("tokens", "targets", "coefficients", "lengths"), (b"", b"12345", pack_doubles([1.0]) * 9)
    ):
        batch = micro_batch(samples(2))
        setattr(batch, field, value)
        with pytest.raises(InternalError):
            trainer.accumulate(batch)
