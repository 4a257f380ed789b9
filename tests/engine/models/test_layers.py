"""Layers that read one input compute the same as one product, and train as before; a model goes when it is given up."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import tiny_models
from harmony_core.engine.models.adapters import add_lora
from harmony_core.engine.models.context import ForwardContext, PackedAttention, forward_context
from harmony_core.engine.models.layers import ColumnParallelLinear, fuse_layers
from harmony_core.engine.models.loading import load_model
from harmony_core.engine.models.model import CausalLM
from harmony_core.engine.models.parallel import TensorParallel
from harmony_core.rpc.protocol import LoraSettings

LENGTHS = (5, 1, 7)


def load(directory: Path, joined: bool) -> CausalLM:
    model = load_model(directory, TensorParallel.single(), torch.device("cpu"), torch.float64)
    if joined:
        for name in list(model.base_parameters):
            fuse_layers(model.module, name)
    return model


def run(model: CausalLM, adapter: str | None = None) -> Tensor:
    ids = torch.tensor([t for s in tiny_models.random_tokens(list(LENGTHS), seed=1) for t in s])
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    with forward_context(ForwardContext(PackedAttention(LENGTHS), adapter)):
        return model.hidden_states(ids, positions)


class Products(TorchFunctionMode):
    """Counts products with a weight matrix."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is nn.functional.linear
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
def test_four_products_a_layer_in_place_of_seven(tmp_path: Path, family: str) -> None:
    directory = tiny_models.build(tmp_path / "model", family, layers=2, tied=family == "gemma3_text")
    plain, joined = load(directory, joined=False), load(directory, joined=True)
    with torch.no_grad():
        expected = run(plain)
        with Products() as products:
            found = run(joined)
    assert products.count == 2 * 4
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_parameters_stay_what_they_were(tmp_path: Path) -> None:
    """Names, values, gradients; a change in place is seen by the one product at once."""
    directory = tiny_models.build(tmp_path / "model", "qwen2")
    plain, joined = load(directory, joined=False), load(directory, joined=True)
    assert list(dict(joined.module.named_parameters())) == list(plain.base_parameters)
    for model in (plain, joined):
        model.trainable_parameters(None)
        run(model).square().sum().backward()
    for name, parameter in joined.base_parameters.items():
        other = plain.base_parameters[name]
        assert torch.equal(parameter, other)
        if other.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for model in (plain, joined):
            model.base_parameters["model.layers.0.self_attn.k_proj.weight"].mul_(-2.0)
            model.base_parameters["model.layers.1.self_attn.v_proj.bias"].add_(1.0)
        torch.testing.assert_close(run(joined), run(plain), rtol=1e-12, atol=1e-12)


def test_adapters_add_to_joined_layers(tmp_path: Path) -> None:
    directory = tiny_models.build(tmp_path / "model")
    found = []
    for joined in (False, True):
        model = load(directory, joined)
        add_lora(model, "lora", LoraSettings(rank=2))
        with torch.no_grad():
            for index, parameter in enumerate(model.adapters["lora"].parameters.values()):
                parameter.normal_(generator=torch.Generator().manual_seed(index))
            found.append(run(model, "lora"))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


class Block(nn.Module):
    """As much of a feed-forward part as one rank of two holds."""

    def __init__(self) -> None:
        super().__init__()
        tp = TensorParallel(size=2, rank=1, group=None)
        self.gate_proj, self.up_proj = (ColumnParallelLinear(nn.Linear(8, 12, bias=False), tp) for _ in range(2))
        self.inner = nn.Module()


def test_slices_of_a_rank_are_joined_and_other_layers_are_not() -> None:
    block = Block()
    for layer in (block.gate_proj, block.up_proj):
        nn.init.normal_(layer.weight)
    x = torch.randn(3, 8)
    with torch.no_grad():
        expected = block.gate_proj(x), block.up_proj(x)
        outer = nn.ModuleDict({"mlp": block})
        fuse_layers(outer, "mlp.gate_proj.weight")
        assert block.gate_proj.product is nn.functional.linear, "the group was not complete"
        fuse_layers(outer, "mlp.up_proj.weight")
        with Products() as products:
            found = block.gate_proj(x), block.up_proj(x)
    assert products.count == 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    gathered = nn.ModuleDict({"mlp": Block()})
    gathered["mlp"].up_proj.gather_output = True  # type: ignore[union-attr]
    fuse_layers(gathered, "mlp.up_proj.weight")
    assert gathered["mlp"].gate_proj.product is nn.functional.linear  # type: ignore[union-attr]


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
def test_a_model_that_is_given_up_leaves_no_weights_without_a_collection(tmp_path: Path) -> None:
    model = load(tiny_models.build(tmp_path / "model"), joined=True)
    add_lora(model, "lora", LoraSettings(rank=2))
    model.trainable_parameters("lora")
    run(model, "lora").sum().backward()
    left = {name: weakref.ref(parameter) for name, parameter in model.module.named_parameters()}
    del model
    assert [name for name, parameter in left.items() if parameter() is not None] == []
