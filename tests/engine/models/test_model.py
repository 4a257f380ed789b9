"""Compiled layers compute what plain ones do, and are compiled once: not for each layer, length or micro-batch.

The quick tests trace; the slow ones split forward and backward passes too, and one of them generates code.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import tiny_models
from harmony_core.engine.models.adapters import add_lora, remove_adapter
from harmony_core.engine.models.context import ForwardContext, PackedAttention, forward_context
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.rpc.protocol import LoraSettings
from ranks import RankPool

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def load(directory: Path) -> CausalLM:
    return load_model(directory, TensorParallel.single(), CPU, torch.float32)


def run(model: CausalLM, lengths: tuple[int, ...], adapter: str | None = None, seed: int = 0) -> torch.Tensor:
    ids = torch.tensor([t for s in tiny_models.random_tokens(list(lengths), seed=sum(lengths)) for t in s])
    positions = torch.cat([torch.arange(length) for length in lengths])
    with forward_context(ForwardContext(PackedAttention(lengths), adapter, seed, dropout=True)):
        hidden = model.hidden_states(ids, positions)
        if hidden.requires_grad:
            hidden.square().sum().backward()
    return hidden.detach()


def train(model: CausalLM, adapter: str | None, checkpointed: int, seed: int = 3) -> dict[str, torch.Tensor]:
    """Hidden states and gradients of one micro-batch by name."""
    parameters = model.trainable_parameters(adapter)
    model.set_checkpointed_layers(checkpointed)
    found = {"hidden": run(model, (5, 1, 7), adapter, seed)}
    for name, parameter in parameters.items():
        assert parameter.grad is not None or "head" in name, name
        if parameter.grad is not None:
            found[name] = parameter.grad
            parameter.grad = None
    return found


def add(model: CausalLM, name: str, **settings: Any) -> None:
    # Few targets: each is traced.
    add_lora(model, name, LoraSettings(rank=4, targets=("q_proj", "down_proj"), **settings))
    with torch.no_grad():
        for key, parameter in model.adapters[name].parameters.items():
            if "lora_B" in key:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(key)))


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(((found[k] - e).abs().max() / e.abs().max().clamp_min(1e-6)).item() for k, e in expected.items())


def compiled() -> int:
    """Functions handed to the compiler so far."""
    return int(counters["frames"]["total"])


def compare_training(
    directory: Path, backend: str, cases: Sequence[tuple[str | None, int]], inferred: Sequence[tuple[int, ...]] = ()
) -> None:
    """Outputs and gradients for (adapter, recomputed layers); outputs without gradients for lengths."""
    plain, other = load(directory), load(directory)
    other.compile(backend)
    for model in (plain, other):
        add(model, "lora")
        add(model, "dropping", dropout=0.3)
    for adapter, checkpointed in cases:
        assert worst(train(other, adapter, checkpointed), train(plain, adapter, 0)) < 1e-5, (adapter, checkpointed)
    with torch.inference_mode():
        for lengths in inferred:
            assert worst({"x": run(other, lengths)}, {"x": run(plain, lengths)}) < 1e-5


def test_compiled_layers_compute_the_same(tmp_path: Path) -> None:
    compare_training(tiny_models.build(tmp_path), "eager", [("dropping", 1)])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_generated_code_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    cases = [("dropping", 1), ("lora", 1), (None, 1)]  # one layer of two is recomputed
    compare_training(tiny_models.build(tmp_path / "model", "qwen3"), "inductor", cases, [(9,), (1,), (2, 3)])


def test_layers_share_what_is_compiled_and_no_length_adds_to_it(tmp_path: Path) -> None:
    counts = []
    for layers in (2, 3):
        model = load(tiny_models.build(tmp_path / str(layers), layers=layers))
        model.compile("eager")
        add(model, "lora")
        model.trainable_parameters("lora")
        before = compiled()
        for lengths in ((4, 3), (6, 6), (9, 2, 2)):
            run(model, lengths, "lora", seed=lengths[0])
        after_training = compiled()
        for lengths in ((40, 3, 5), (8, 8, 8)):
            run(model, lengths, "lora", seed=lengths[0])
        assert compiled() == after_training, "another micro-batch compiled something"
        counts.append(after_training - before)
        with torch.no_grad():
            run(model, (4, 3), "lora")
            sampling = compiled()
            run(model, (5, 3, 9), "lora")
        assert compiled() == sampling
        torch._dynamo.reset()
    assert counts[0] == counts[1] > 0


def test_adapters_come_and_go(tmp_path: Path) -> None:
    """Another adapter's values are never used, whatever was compiled for which."""
    directory = tiny_models.build(tmp_path)
    model, plain = load(directory), load(directory)
    model.compile("eager")
    with torch.inference_mode():
        assert torch.equal(run(model, (1,)), run(plain, (1,)))
    with torch.no_grad():
        assert torch.equal(run(model, (5, 4)), run(plain, (5, 4)))
        for name in ("a", "b.c"):
            for each in (model, plain):
                add(each, name, seed=len(name))
            for adapter in (None, *model.adapters):
                assert torch.allclose(run(model, (5, 4), adapter), run(plain, (5, 4), adapter), atol=1e-6)
        assert not torch.allclose(run(model, (5, 4), "a"), run(model, (5, 4), "b.c"), atol=1e-2)
        remove_adapter(model, "a")
        for adapter in (None, "b.c"):
            assert torch.allclose(run(model, (5, 4), adapter), run(plain, (5, 4), adapter), atol=1e-6)
        remove_adapter(model, "b.c")
        assert torch.equal(run(model, (7,)), run(plain, (7,)))


def test_a_copy_is_compiled_too_and_weights_may_change(tmp_path: Path) -> None:
    model = load(tiny_models.build(tmp_path))
    model.compile("eager")
    with torch.no_grad():
        before = run(model, (5, 4))
        copy = model.copy_weights()
        assert copy.compiled
        copy.base_parameters["model.layers.1.mlp.up_proj.weight"].mul_(2)
        count = compiled()
        assert not torch.equal(run(copy, (5, 4)), before)
        assert compiled() == count, "the copy has what the original compiled"
        assert torch.equal(run(model, (5, 4)), before)


@pytest.mark.parametrize(
    ("backend", "more"),
    [
        ("eager", {"checkpointed": 1}),
        pytest.param("aot_eager", {"checkpointed": 1}, marks=pytest.mark.slow),
        pytest.param("aot_eager", {"adapter": True}, marks=pytest.mark.slow),
    ],
)
def test_collectives_inside_layers(rank_pool: RankPool, tmp_path: Path, backend: str, more: dict[str, Any]) -> None:
    """Those of halves of a layer, of norms inside the heads, of an adapter; some run twice."""
    case = {"directory": str(tiny_models.build(tmp_path, "qwen3")), "tp": 2, "dtype": "float32", "compiled": backend}
    cases = [case | more]
    for (result,) in rank_pool.run("engine.models.parallel_cases:against_transformers", ranks=2, cases=cases):
        for what in ("logits", "logprobs", "loss", "gradient"):
            assert result[what] < 1e-5, result
