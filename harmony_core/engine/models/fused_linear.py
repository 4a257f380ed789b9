"""Linear layers that read the same input, applied as one product where no gradient is asked for.

A decoder layer projects one input to queries, keys and values, and another to the two halves of its feed-forward part.
For a few rows each of these products is shorter than what it takes to start it and to fill the device; one product of
all their outputs is not. The layers keep their parameters, which become views of one matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harmony_core.engine.models.parallel import ColumnParallelLinear, set_product

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers in one module that read the same tensor, in the order in which transformers calls them."""


class FusedWeights(nn.Module):
    """One matrix whose rows are the weights of several layers; a module, so that compiled layers take its shape as
    fixed. It belongs to no other module: nothing finds its parameters a second time."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        """Copies the layers' weights, which must be on their device, and makes them views of the copy."""
        super().__init__()
        self.rows = [layer.weight.shape[0] for layer in layers]
        self.weight = _join([layer.weight for layer in layers])
        self.bias = None if layers[0].bias is None else _join([layer.bias for layer in layers])
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def forward(self, index: int, rows: Tensor) -> Tensor:
        """What layer `index` makes of `rows`. Called for each layer in turn, with one tensor."""
        if index == 0:
            product = F.linear(rows, self.weight, self.bias)
            self._input, self._outputs = rows, torch.split(product, self.rows, -1)
        assert self._input is rows, "layers of one group were given different inputs"
        output = self._outputs[index]
        if index == len(self.rows) - 1:
            self._input, self._outputs = None, ()
        return output


class _Part:
    """Applies one layer of a group; takes the place of `F.linear` there."""

    def __init__(self, joined: FusedWeights, index: int) -> None:
        self.joined, self.index = joined, index

    def __call__(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled():
            # Gradients belong to the parameters, not to what they are views of.
            return F.linear(rows, weight, bias)
        output: Tensor = self.joined(self.index, rows)
        return output


def fuse_layers(module: nn.Module, name: str) -> None:
    """Join the group of layers that is complete with the parameter `name` of `module`, which was filled last, if it
    completes one whose layers can be joined."""
    path, _, leaf = name.rpartition(".")
    parent, _, last = path.rpartition(".")
    for group in GROUPS:
        if last != group[-1]:
            continue
        layers: list[Any] = [getattr(module.get_submodule(parent), member, None) for member in group]
        biased = {getattr(layer, "bias", None) is not None for layer in layers}
        if all(map(_plain, layers)) and biased == {leaf == "bias"}:
            joined = FusedWeights(layers)
            for index, layer in enumerate(layers):
                set_product(layer, _Part(joined, index))


def _plain(layer: object) -> bool:
    if type(layer) is ColumnParallelLinear:
        return not layer.gather_output
    return type(layer) is nn.Linear


def _join(pieces: list[Any]) -> nn.Parameter:
    whole = torch.cat([piece.detach() for piece in pieces])
    start = 0
    for piece in pieces:
        piece.data = whole[start : start + len(piece)]
        start += len(piece)
    return nn.Parameter(whole, requires_grad=False)
