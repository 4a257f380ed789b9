"""Splits a model's layers over tensor-parallel ranks, taking transformers' `tp_plan` as the recipe.

Runs on a model whose parameters are still on the meta device; the loader fills them afterwards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from harmony_core.engine.models.parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallel,
    VocabParallelEmbedding,
    copy_to,
)
from harmony_core.errors import ModelRefused

HEAD_STYLES = frozenset({"colwise_gather_output", "colwise_rep"})


@dataclass(frozen=True)
class KVSelection:
    """The one key-value head that this rank's query heads read, when there are fewer of them than ranks.

    Every rank computes all key-value heads; the gradient that comes back through the one it used is summed over the
    ranks, so that the projections' gradients are complete and equal everywhere.
    """

    head: int
    tp: TensorParallel

    def __call__(self, states: Tensor) -> Tensor:
        """`[batch, kv_heads, T, D]` -> `[batch, 1, T, D]`."""
        return copy_to(states, self.tp)[:, self.head : self.head + 1]


def check_heads(num_heads: int, num_kv_heads: int, intermediate_size: int, tp: int) -> None:
    """Refuse a tensor-parallel size that does not fit the model, naming those that do."""

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

    Returns the names of parameters that every rank holds but uses on its own heads only, whose gradients must be
    summed (norms inside a head).
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
            _replace(model, name, _split(module, name, style, tp))
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
    # Embedding and head are always split by the vocabulary; not every version of transformers lists both.
    head = model.get_output_embeddings()  # type: ignore[operator]
    heads = {} if head is None else {_name_of(model, head): "vocab_head"}
    embedding: str = _name_of(model, model.get_input_embeddings())  # type: ignore[operator]
    return {**plan, embedding: "embedding_rowwise", **heads}


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    names: list[str] = [name for name, module in model.named_modules() if module is wanted]
    return names[0]


def _split(module: nn.Module, name: str, style: str, tp: TensorParallel) -> nn.Module:
    # transformers keeps the number that an embedding is multiplied by beside its buffer, on the meta device too.
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


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
