"""The table of live models: which spawns run compiled layers, and what is said of it."""

from __future__ import annotations

import errno
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from harmony_core.engine import model_table
from harmony_core.engine.model_table import ModelTable
from harmony_core.engine.models import weights
from harmony_core.engine.models.model import COMPILE_ERRORS, CausalLM
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.engine.training import optimizer
from harmony_core.errors import EngineError, MemoryRefused, ResourceError
from harmony_core.model.spec import ModelSpec
from harmony_core.rpc.protocol import Clone, Load, LoraSettings, MakePool, ModelSource, Save, Spawn
from harmony_core.rpc.rank_channel import progress
from tiny_models import build

CPU = torch.device("cpu")
SINGLE = TensorParallel.single()


def request(directory: Path, name: str, **changes: Any) -> Spawn:
    usual = {"name": name, "source": ModelSource(weights=str(directory), digest="d"), "compile": True}
    usual |= {"spec": ModelSpec.read(directory), "max_batch_tokens": 64, "kv_tokens": 64, **changes}
    return Spawn(**usual, private=bool(usual.get("train")) and usual.get("lora") is None)


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compile without generating code; what was asked for."""
    asked: list[str] = []
    real = CausalLM.compile

    def compile(model: CausalLM, backend: str = "inductor") -> None:
        asked.append(backend)
        real(model, "eager")

    monkeypatch.setattr(CausalLM, "compile", compile)
    monkeypatch.setattr(model_table, "missing_tool", lambda: "")
    return asked


def test_spawns_on_one_base_compile_it_once(tmp_path: Path, backends: list[str]) -> None:
    said: list[tuple[str, dict[str, Any]]] = []
    table = ModelTable(CPU, announce=lambda what, fields: said.append((what, fields)))
    directory = build(tmp_path)
    first = table.spawn(request(directory, "policy", train=True, lora=LoraSettings(rank=2)), SINGLE, None)
    second = table.spawn(request(directory, "reference"), SINGLE, None)
    assert first.model is second.model and first.model.compiled
    assert backends == ["inductor"] and said == [("compiling", {"model": "policy"})]
    assert not table.spawn(request(directory, "plain", train=True, compile=False), SINGLE, None).model.compiled


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
def test_a_model_that_is_freed_leaves_nothing(tmp_path: Path, lora: LoraSettings | None) -> None:
    table = ModelTable(CPU)
    live = table.spawn(request(build(tmp_path), "policy", train=True, lora=lora, compile=False), SINGLE, None)
    assert live.trainer is not None
    left = [weakref.ref(p) for p in live.model.module.parameters()] + [weakref.ref(live.trainer.gradients.buffer)]
    del live
    assert all(ref() is not None for ref in left)
    table.dealloc("policy")
    assert not any(ref() is not None for ref in left)


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path, lora: LoraSettings | None, bad: float) -> None:
    table = ModelTable(CPU)
    live = table.spawn(request(build(tmp_path / "m"), "policy", train=True, lora=lora, compile=False), SINGLE, None)
    assert live.trainer is not None
    save = Save(model="policy", directory=str(tmp_path), inference_only=False)
    table.save(save, write=True)
    slot = live.trainer.gradients.spans[3]
    with torch.no_grad():
        slot.parameter.view(-1)[1] = bad
    with pytest.raises(EngineError, match=f"'policy' is not saved: {slot.name} holds NaN or infinite values"):
        table.save(save, write=True)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_a_full_disk_is_told_once_all_ranks_have_gathered(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = ModelTable(CPU)
    table.spawn(request(build(tmp_path / "m"), "policy", train=True, compile=False), SINGLE, None)
    gathered: list[str] = []
    for module in (weights, optimizer):
        real = module.gather_full
        monkeypatch.setattr(module, "gather_full", lambda *given, real=real: (gathered.append("x"), real(*given))[1])
    table.save(Save(model="policy", directory=str(tmp_path), inference_only=False), write=False)
    usual = len(gathered)
    full = tmp_path / "full"
    full.mkdir()
    if file == "model.safetensors":
        (full / file).mkdir()
    else:
        (full / file).symlink_to("/dev/full")
    with pytest.raises(ResourceError, match=f"cannot save 'policy' to {full}") as caught:
        table.save(Save(model="policy", directory=str(full), inference_only=False), write=True)
    assert caught.value.details["errno"] == (errno.EISDIR if file == "model.safetensors" else errno.ENOSPC)
    assert len(gathered) == 2 * usual > 0


def test_without_a_compiler_layers_run_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.delenv("CC", raising=False)
    table = ModelTable(CPU, announce=lambda what, fields: said.append((what, fields)))
    live = table.spawn(request(build(tmp_path), "policy", train=True), SINGLE, None)
    assert not live.model.compiled
    assert said == [("not_compiled", {"model": "policy", "reason": "this machine has no C compiler"})]


def test_what_cannot_be_compiled_names_the_way_out(
    tmp_path: Path, backends: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise COMPILE_ERRORS[0]("no libcuda.so\n\nand where it happened")

    monkeypatch.setattr(model_table.Trainer, "rehearse", fail)
    table = ModelTable(CPU)
    with pytest.raises(ResourceError, match=r"'policy' could not be compiled.*no libcuda.so") as refused:
        table.spawn(request(build(tmp_path), "policy", train=True), SINGLE, None)
    assert "--no-compile" in refused.value.hint
    with pytest.raises(model_table.ConflictError):
        table.get("policy")


def test_a_copy_that_fails_has_no_use_of_the_base_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = ModelTable(CPU)
    policy = request(build(tmp_path), "policy", train=True, lora=LoraSettings(rank=2), compile=False)
    base = table.spawn(policy, SINGLE, None).base

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("the device is full")

    with monkeypatch.context() as patch:
        patch.setattr(model_table.adapters, "copy_adapter", fail)
        with pytest.raises(MemoryRefused, match="'copy' was promised a copy of 'policy', and the device ran out"):
            table.clone(Clone(source="policy", name="copy"))
    assert base.users == 1
    copy = table.clone(Clone(source="policy", name="copy"))
    assert copy.base is base and base.users == 2 and copy.runner is None
    with monkeypatch.context() as patch:
        patch.setattr(model_table.Runner, "prepare", fail)
        with pytest.raises(MemoryRefused, match="the pool of 'copy' was promised"):
            table.make_pool(MakePool(model="copy", kv_tokens=64))
    table.drop_pool("copy")
    assert table.make_pool(MakePool(model="copy", kv_tokens=64)).runner is not None
    table.dealloc("policy")
    table.dealloc("copy")
    assert base.users == 0


def test_what_takes_long_reports_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading and rehearsing, saving and loading again: at least once for each tensor, or layer and pass."""
    pieces: list[int] = []
    monkeypatch.setattr(progress, "_listener", lambda: pieces.append(1))

    def counted() -> int:
        count = len(pieces)
        pieces.clear()
        return count

    table, directory = ModelTable(CPU), build(tmp_path)
    live = table.spawn(request(directory, "policy", train=True, compile=False), SINGLE, None)
    tensors, layers = len(live.model.base_parameters), live.model.num_layers
    assert counted() >= tensors + 2 * layers
    assert live.trainer is not None
    live.trainer.rehearse(8)
    assert counted() >= 2 * layers + 1  # each layer forward and backward, and the head
    saved = tmp_path / "saved"
    saved.mkdir()
    table.save(Save(model="policy", directory=str(saved), inference_only=False), write=True)
    assert counted() >= tensors + 2 * tensors  # the weights, and both of the optimizer's moments
    table.load(Load(model="policy", source=ModelSource(weights=str(saved), digest="d")))
    assert counted() >= tensors + 2 * tensors
