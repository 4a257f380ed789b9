"""AdamW against torch's, against float64, and in pieces of any size; its state on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from engine.training.trainer_cases import difference, make_trainer, micro_batch, optim_step, parameters, samples
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.engine.training import optimizer
from harmony_core.engine.training.optimizer import FILE, AdamW, FlatGradients
from harmony_core.errors import VerificationError
from tiny_models import build

SHAPES = {"matrix": (40, 30), "bias": (40,), "wide": (3, 500), "scalar": (1,), "cube": (4, 5, 6)}
SETTINGS = {"lr": 3e-3, "weight_decay": 0.2, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("llama"), "llama")


def _parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in SHAPES.items()}


def _torch_adamw(parameters: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": SETTINGS["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}]
    betas = (SETTINGS["beta1"], SETTINGS["beta2"])
    return torch.optim.AdamW(groups, lr=SETTINGS["lr"], betas=betas, eps=SETTINGS["eps"])


@pytest.mark.parametrize("chunk", [1 << 20, 700, 64])
@pytest.mark.parametrize(
    ("ours", "theirs", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-13),
        (torch.float32, torch.float32, 2e-6),
        (torch.float32, torch.float64, 2e-5),
    ],
)
def test_updates_equal_those_of_torch(
    ours: torch.dtype, theirs: torch.dtype, tolerance: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(optimizer.CHUNK_ELEMENTS, "cpu", chunk)
    mine, other = _parameters(ours), _parameters(torch.float32)
    other = {name: nn.Parameter(p.detach().to(theirs)) for name, p in other.items()}
    gradients = FlatGradients(mine, TensorParallel.single())
    adam, reference = AdamW(gradients), _torch_adamw(other)
    generator = torch.Generator().manual_seed(1)
    for step in range(30):
        gradients.clear()
        for name, p in mine.items():
            gradient = torch.randn(p.shape, generator=generator) * (1 + step % 3)
            assert p.grad is not None
            p.grad.add_(gradient)
            other[name].grad = gradient.to(theirs) * 0.25
        adam.update(**SETTINGS, scale=0.25)
        reference.step()
    error = difference(
        {k: p.detach().double() for k, p in mine.items()}, {k: p.detach().double() for k, p in other.items()}
    )
    assert error < tolerance


def test_the_norm_is_that_of_all_gradients() -> None:
    values = _parameters(torch.float32)
    gradients = FlatGradients(values, TensorParallel.single())
    gradients.buffer.copy_(torch.randn(gradients.buffer.shape, generator=torch.Generator().manual_seed(2)))
    assert gradients.squared_norm().item() == pytest.approx(gradients.buffer.double().square().sum().item(), rel=1e-6)
    assert gradients.first_bad() is None
    gradients.views[2][0] = float("inf")
    assert gradients.first_bad() == gradients.spans[2].name


def test_optimizer_state_round_trips_exactly_and_goes_on_as_if_never_stopped(llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(llama)
    for seed in range(3):
        trainer.accumulate(micro_batch(samples(3, seed=seed)))
        trainer.optim_step(optim_step(10.0))
    trainer.save_optimizer(tmp_path, write=True)
    other = make_trainer(llama)
    with torch.no_grad():
        for mine, theirs in zip(other.gradients.spans, trainer.gradients.spans, strict=True):
            mine.parameter.copy_(theirs.parameter)
    other.load_optimizer(tmp_path)
    assert other.step == 3
    for t in (trainer, other):
        t.accumulate(micro_batch(samples(3, seed=9)))
        t.optim_step(optim_step(10.0))
    for name, buffer in trainer.optimizer.state().items():
        assert torch.equal(buffer, other.optimizer.state()[name])
    assert difference(parameters(other), parameters(trainer)) == 0.0


def test_the_file_is_plain_safetensors_with_the_parameters_names(llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(llama)
    trainer.step = 7
    trainer.save_optimizer(tmp_path, write=True)
    with safe_open(tmp_path / FILE, framework="pt") as file:
        names = set(file.keys())
        assert file.metadata()["step"] == "7"
        assert file.get_slice("exp_avg.lm_head.weight").get_shape() == [67, 32]
    expected = {f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in trainer.model.base_parameters}
    assert names == expected


def test_half_precision_stores_its_masters(llama: Path, tmp_path: Path) -> None:
    from harmony_core.engine.models.loading import load_model
    from harmony_core.engine.training.trainer import Trainer

    trainers = [
        Trainer(load_model(llama, TensorParallel.single(), torch.device("cpu"), torch.bfloat16), None) for _ in range(2)
    ]
    trainers[0].accumulate(micro_batch(samples(3)))
    trainers[0].optim_step(optim_step(10.0, lr=1e-5))
    trainers[0].save_optimizer(tmp_path, write=True)
    trainers[1].load_optimizer(tmp_path)
    for name, buffer in trainers[0].optimizer.state().items():
        assert torch.equal(buffer, trainers[1].optimizer.state()[name])
    assert set(trainers[0].optimizer.state()) == {"exp_avg", "exp_avg_sq", "master"}


def _damage(path: Path, how: str) -> None:
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "missing":
        path.unlink()
    else:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            metadata = file.metadata()
        if how == "tensor missing":
            del tensors["exp_avg.lm_head.weight"]
        elif how == "another shape":
            tensors["exp_avg.lm_head.weight"] = torch.zeros(3, 3)
        elif how == "another tensor":
            tensors["exp_avg.other"] = torch.zeros(3)
        else:
            metadata = {"step": "many"}
        save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "how", ["truncated", "missing", "tensor missing", "another shape", "another tensor", "no step"]
)
def test_damaged_state_is_refused_and_nothing_changes(llama: Path, tmp_path: Path, how: str) -> None:
    trainer = make_trainer(llama)
    trainer.accumulate(micro_batch(samples(3)))
    trainer.optim_step(optim_step(10.0))
    trainer.save_optimizer(tmp_path, write=True)
    _damage(tmp_path / FILE, how)
    fresh = make_trainer(llama)
    with pytest.raises(VerificationError, match=FILE):
        fresh.load_optimizer(tmp_path)
    assert fresh.step == 0
    assert not any(buffer.any() for buffer in fresh.optimizer.state().values())


def test_the_header_is_json_at_an_aligned_offset(llama: Path, tmp_path: Path) -> None:
    make_trainer(llama).save_optimizer(tmp_path, write=True)
    data = (tmp_path / FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert len(data) == 8 + length + max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
