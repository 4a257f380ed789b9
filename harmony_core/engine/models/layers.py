"""The engine's linear layers and embeddings: with a product of its choice, split over ranks, or fused.

A linear layer is split by its output rows (column-parallel) or by its input columns (row-parallel), the embedding by
its vocabulary (Shoeybi et al., Megatron-LM, 2019). `shard_modules` splits a model whose parameters are still on the
meta device, following transformers' `tp_plan`; the loader fills them afterwards.

A decoder layer projects one input to queries, keys and values, and another to the two halves of its feed-forward part.
On CUDA, a product of a few rows takes less time than its launch, so `fuse_layers` makes each group one product when no
gradient is needed. The layers keep their parameters, which become views of one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harmony_core.engine.models.parallel import Shard, TensorParallel, copy_to, gather_from, reduce_from, set_shard
from harmony_core.errors import ModelRefused

Product = Callable[..., Tensor]
"""Function that applies a weight matrix, like `F.linear`: (rows, weight, bias) -> rows."""


class ProductLinear(nn.Linear):
    """A linear layer that applies its weight with its own `Product`."""

    product: Product = staticmethod(F.linear)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        return self.product(input, self.weight, self.bias)


def set_product(layer: nn.Linear, product: Product) -> None:
    """Let a linear layer apply its weight with `product`."""
    if type(layer) is nn.Linear:
        # Change the class instead of setting a method on the layer: such a reference cycle would outlive the model.
        layer.__class__ = ProductLinear
    layer.product = product  # type: ignore[assignment]


class ColumnParallelLinear(nn.Linear):
    """A linear layer split by output rows; `in_features` and `out_features` stay those of the full layer.

    With `gather_output` every rank gets the full output, otherwise its own slice.
    """

    product: Product = staticmethod(F.linear)

    def __init__(self, full: nn.Linear, tp: TensorParallel, gather_output: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = full.in_features, full.out_features
        self.tp, self.gather_output = tp, gather_output
        shard = Shard.of(tp, 0, full.out_features)
        self.weight = _empty_slice(full.weight, shard)
        self.register_parameter("bias", None if full.bias is None else _empty_slice(full.bias, shard))

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` on all ranks -> this rank's slice of `[..., out]`, or all of it."""
        output = self.product(copy_to(input, self.tp), self.weight, self.bias)
        return gather_from(output, self.out_features, self.tp) if self.gather_output else output


class RowParallelLinear(nn.Linear):
    """A linear layer split by input columns: partial results are summed over ranks. Every rank has the full bias."""

    product: Product = staticmethod(F.linear)

    def __init__(self, full: nn.Linear, tp: TensorParallel) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.tp = full.in_features, full.out_features, tp
        self.weight = _empty_slice(full.weight, Shard.of(tp, 1, full.in_features))
        self.register_parameter("bias", full.bias)

    def forward(self, input: Tensor) -> Tensor:
        """This rank's slice of `[..., in]` -> `[..., out]` on all ranks."""
        output = reduce_from(self.product(input, self.weight), self.tp)
        return output if self.bias is None else output + self.bias


class VocabParallelEmbedding(nn.Embedding):
    """An embedding split by its rows; the vocabulary need not divide evenly. `scale` multiplies the output."""

    def __init__(self, full: nn.Embedding, tp: TensorParallel, scale: float | None = None) -> None:
        nn.Module.__init__(self)
        # Rounded to the type of the weights, as in models that scale their embeddings.
        self.scale = None if scale is None else torch.tensor(scale, dtype=full.weight.dtype).item()
        self.num_embeddings, self.embedding_dim = full.num_embeddings, full.embedding_dim
        self.padding_idx, self.tp = full.padding_idx, tp
        self.shard = Shard.of(tp, 0, full.num_embeddings)
        # As in torch, the row of the pad token gets no gradient from the embedding.
        pad = -1 if full.padding_idx is None else full.padding_idx
        self.local_padding_idx = pad - self.shard.start if self.shard.start <= pad < self.shard.stop else None
        self.weight = _empty_slice(full.weight, self.shard)

    def forward(self, input: Tensor) -> Tensor:
        """Token ids `[...]` -> `[..., d]` on all ranks."""
        local = input - self.shard.start
        mine = (local >= 0) & (local < self.weight.shape[0])
        rows = F.embedding(local.clamp(0, self.weight.shape[0] - 1), self.weight, self.local_padding_idx)
        whole = reduce_from(rows * mine.unsqueeze(-1), self.tp)
        return whole if self.scale is None else whole * self.scale


def _empty_slice(full: Tensor, shard: Shard) -> nn.Parameter:
    """An empty parameter for a slice, on the device of the full one; the loader writes its values."""
    parameter = nn.Parameter(torch.empty_like(shard.take(full.detach())), requires_grad=full.requires_grad)
    set_shard(parameter, shard)
    return parameter


GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers in one module with the same input, in the order in which transformers calls them."""


class FusedWeights(nn.Module):
    """One matrix with the weights of several layers as its rows. It is a module so that compiled layers treat its
    shape as fixed, and no other module holds it, so its parameters are not listed twice."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        """Copy the layers' weights, which must be on their final device, and make them views of the copy."""
        super().__init__()
        self.rows = [layer.weight.shape[0] for layer in layers]
        self.weight = _stack([layer.weight for layer in layers])
        self.bias = None if layers[0].bias is None else _stack([layer.bias for layer in layers])
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    def forward(self, index: int, rows: Tensor) -> Tensor:
        """The output of layer `index` for `rows`. Call it for each layer in turn, with the same tensor."""
        if index == 0:
            product = F.linear(rows, self.weight, self.bias)
            self._input, self._outputs = rows, torch.split(product, self.rows, -1)
        assert self._input is rows, "layers of one group were given different inputs"
        output = self._outputs[index]
        if index == len(self.rows) - 1:
            self._input, self._outputs = None, ()
        return output


class _FusedPart:
    """Applies one layer of a group; replaces `F.linear` in it."""

    def __init__(self, fused: FusedWeights, index: int) -> None:
        self.fused, self.index = fused, index

    def __call__(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled():
            # Gradients go to the parameters, not to the fused matrix.
            return F.linear(rows, weight, bias)
        output: Tensor = self.fused(self.index, rows)
        return output


def fuse_layers(module: nn.Module, name: str) -> None:
    """Fuse a group of layers if parameter `name` of `module`, which was filled last, completes it and its layers can be
    fused."""
    path, _, leaf = name.rpartition(".")
    parent, _, last = path.rpartition(".")
    for group in GROUPS:
        if last != group[-1]:
            continue
        layers: list[Any] = [getattr(module.get_submodule(parent), member, None) for member in group]
        biased = {getattr(layer, "bias", None) is not None for layer in layers}
        if all(map(_plain, layers)) and biased == {leaf == "bias"}:
            fused = FusedWeights(layers)
            for index, layer in enumerate(layers):
                set_product(layer, _FusedPart(fused, index))


def _plain(layer: object) -> bool:
    if type(layer) is ColumnParallelLinear:
        return not layer.gather_output
    return type(layer) is nn.Linear


def _stack(pieces: list[Any]) -> nn.Parameter:
    whole = torch.cat([piece.detach() for piece in pieces])
    start = 0
    for piece in pieces:
        piece.data = whole[start : start + len(piece)]
        start += len(piece)
    return nn.Parameter(whole, requires_grad=False)


HEAD_STYLES = frozenset({"colwise_gather_output", "colwise_rep"})


@dataclass(frozen=True)
class KVSelection:
    """Selects the key-value head for this rank's query heads, if there are fewer key-value heads than ranks.

    Every rank computes all key-value heads. The gradient through the selected head is summed over the ranks, so that
    the projections' gradients are complete and equal on all ranks.
    """

    head: int
    tp: TensorParallel

    def __call__(self, states: Tensor) -> Tensor:
        """`[batch, kv_heads, T, D]` -> `[batch, 1, T, D]`."""
        return copy_to(states, self.tp)[:, self.head : self.head + 1]


def check_heads(num_heads: int, num_kv_heads: int, intermediate_size: int, tp: int) -> None:
    """Raise ModelRefused for a tensor-parallel size that does not fit the model; the message lists those that do."""

    def fits(size: int) -> bool:
        return (
            num_heads % size == 0
            and (num_kv_heads % size == 0 or size % num_kv_heads == 0)
            and intermediate_size % size == 0
        )

    if not fits(tp):
        works = [size for size in range(1, num_heads + 1) if fits(size)]
        raise ModelRefused(
            f"tp={tp} does not divide this model: {num_heads} heads, {num_kv_heads} key-value heads, "
            f"feed-forward width {intermediate_size}",
            hint=f"tp values that work: {', '.join(map(str, works))}",
        )


def shard_modules(model: nn.Module, tp: TensorParallel) -> frozenset[str]:
    """Replace the planned layers of a meta-device model by split ones, in place.

    Returns the names of parameters whose gradients must be summed over the ranks, because every rank applies them only
    to its own heads (norms inside a head).
    """
    if tp.size == 1:
        return frozenset()
    config = model.config.get_text_config()  # type: ignore[union-attr,operator]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    check_heads(heads, kv_heads, config.intermediate_size, tp.size)
    replicated = () if kv_heads % tp.size == 0 else ("k_proj", "v_proj", "k_norm")
    plan = _plan(model)
    summed = []
    for name, module in list(model.named_modules()):
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style is None or name.rpartition(".")[2] in replicated:
            continue
        if style == "replicated_with_grad_allreduce":
            summed += [f"{name}.{leaf}" for leaf, _ in module.named_parameters()]
        else:
            model.set_submodule(name, _split(module, name, style, tp))
    if replicated:
        for module in model.modules():
            if hasattr(module, "k_proj"):
                # tp is a multiple of kv_heads here: each run of tp / kv_heads ranks reads one head.
                selection = KVSelection(tp.rank // (tp.size // kv_heads), tp)
                module.kv_selection = selection  # type: ignore[assignment]
    return frozenset(summed)


def _plan(model: nn.Module) -> dict[str, str]:
    plan: dict[str, str] | None = getattr(model, "tp_plan", None)
    if not plan:
        raise ModelRefused(f"{type(model).__name__} has no tensor-parallel plan", hint="use tp=1")
    # Embedding and head are always split by the vocabulary; some versions of transformers do not list both.
    head = model.get_output_embeddings()  # type: ignore[operator]
    heads = {} if head is None else {_name_of(model, head): "vocab_head"}
    embedding: str = _name_of(model, model.get_input_embeddings())  # type: ignore[operator]
    return {**plan, embedding: "embedding_rowwise", **heads}


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    names: list[str] = [name for name, module in model.named_modules() if module is wanted]
    return names[0]


def _split(module: nn.Module, name: str, style: str, tp: TensorParallel) -> nn.Module:
    # transformers stores the scale of an embedding as a number besides its buffer, also on the meta device.
    embedding = style == "embedding_rowwise"
    scale: float | None = getattr(module, "scalar_embed_scale", None) if embedding else None
    if type(module) is not (nn.Embedding if embedding else nn.Linear) and scale is None:
        raise ModelRefused(f"{name}: cannot split a {type(module).__name__} over {tp.size} ranks", hint="use tp=1")
    if isinstance(module, nn.Embedding):
        return VocabParallelEmbedding(module, tp, scale)
    assert isinstance(module, nn.Linear)
    if style == "vocab_head":
        return ColumnParallelLinear(module, tp, gather_output=True)
    if style == "colwise":
        _divisible(module.out_features, name, tp)
        return ColumnParallelLinear(module, tp)
    if style in HEAD_STYLES:
        return ColumnParallelLinear(module, tp, gather_output=True)
    if style == "rowwise":
        _divisible(module.in_features, name, tp)
        return RowParallelLinear(module, tp)
    raise ModelRefused(f"{name}: unknown tensor-parallel style {style!r}", hint="use tp=1")


def _divisible(size: int, name: str, tp: TensorParallel) -> None:
    if size % tp.size:
        raise ModelRefused(f"{name}: its size {size} is not divisible by tp={tp.size}")
