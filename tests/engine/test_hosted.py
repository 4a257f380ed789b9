"""The table of live models: which spawns run compiled layers, and what is said of it."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from harmony_core.engine import hosted
from harmony_core.engine.hosted import ModelTable
from harmony_core.engine.models.compiling import COMPILE_ERRORS
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.errors import EngineError, ResourceError
from harmony_core.rpc.protocol import LoraSettings, ModelSource, Save, Spawn
from tiny_models import build

CPU = torch.device("cpu")
SINGLE = TensorParallel.single()


def request(directory: Path, name: str, **changes: Any) -> Spawn:
    usual = {"name": name, "source": ModelSource(weights=str(directory), digest="d"), "tp": 1, "train": False}
    return Spawn(**{**usual, "max_batch_tokens": 64, "kv_tokens": 64, "compile": True, **changes})


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compile without generating code; what was asked for."""
    asked: list[str] = []
    real = CausalLM.compile

    def compile(model: CausalLM, backend: str = "inductor") -> None:
        asked.append(backend)
        real(model, "eager")

    monkeypatch.setattr(CausalLM, "compile", compile)
    monkeypatch.setattr(hosted, "missing_tool", lambda: "")
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
    slot = live.trainer.gradients.slots[3]
    with torch.no_grad():
        slot.parameter.view(-1)[1] = bad
    with pytest.raises(EngineError, match=f"'policy' is not saved: {slot.name} holds NaN or infinite values"):
        table.save(save, write=True)


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

    monkeypatch.setattr(hosted.Trainer, "rehearse", fail)
    table = ModelTable(CPU)
    with pytest.raises(ResourceError, match=r"'policy' could not be compiled.*no libcuda.so") as refused:
        table.spawn(request(build(tmp_path), "policy", train=True), SINGLE, None)
    assert "--no-compile" in refused.value.hint
    with pytest.raises(hosted.ConflictError):
        table.get("policy")
