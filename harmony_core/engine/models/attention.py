"""The one attention function of every model, for training and for sampling; registered with transformers by name.

It reads the forward context: sequences packed back to back, or new tokens against pages. No mask function is
registered under the name, so transformers builds no mask. T tokens, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from harmony_core.engine.models import attention_cpu, attention_cuda, attention_decode, attention_tiled
from harmony_core.engine.models.context import (
    DecodeAttention,
    ForwardContext,
    PackedAttention,
    PagedAttention,
    current_context,
)
from harmony_core.errors import ModelRefused

NAME = "harmony"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`query` `[1, H, T, D]`, `key`, `value` `[1, K, T, D]` -> `[1, T, H, D]`.

    What it computes depends on the forward context, so no compiler traces it: a compiled layer breaks off here.
    """
    if softcap is not None or s_aux is not None or dropout:
        feature = "attention dropout" if dropout else "soft-capped attention" if softcap else "attention sinks"
        raise ModelRefused(f"{type(module).__name__}: {feature} is not supported")
    assert attention_mask is None and query.shape[0] == 1
    selection = getattr(module, "kv_selection", None)
    if selection is not None:
        key, value = selection(key), selection(value)
    # [T, heads, D]: the layout of packed rows and of pages.
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    context = current_context()
    layout = context.attention
    if getattr(module, "tiled", False):
        output = attention_tiled.attend(context, int(module.layer_idx), q, k, v, scaling, sliding_window)  # type: ignore[arg-type]
    elif isinstance(layout, PackedAttention):
        output = _packed(context, layout.lengths, q, k, v, scaling, sliding_window)
    else:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if isinstance(layout, DecodeAttention):
            output = attention_decode.decode(context, layout, layer, q, k, v, scaling, sliding_window)
        else:
            output = _paged(context, layout, layer, q, k, v, scaling, sliding_window)
    return output[None], None


AttentionInterface.register(NAME, torch.compiler.disable(attend))  # type: ignore[no-untyped-call]


def _packed(
    context: ForwardContext,
    lengths: tuple[int, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Each sequence causally with itself; `[T, H, D]`."""
    assert sum(lengths) == q.shape[0], "lengths do not add up to the row"
    if attention_cuda.applies(q):
        return attention_cuda.packed(context, lengths, q, k, v, scale, window)
    return attention_cpu.packed(context, lengths, q, k, v, scale, window)


def _paged(
    context: ForwardContext,
    layout: PagedAttention,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: int | None,
) -> Tensor:
    """Write the new keys and values, then attend to the pages; `[T, H, D]`. Never under autograd."""
    keys, values = layout.keys[layer], layout.values[layer]
    if q.is_cuda:
        attention_cuda.write(keys, values, layout.write_slots, k, v)
    else:
        keys.index_copy_(0, layout.write_slots, k.to(keys.dtype))
        values.index_copy_(0, layout.write_slots, v.to(values.dtype))
    if layout.lengths == layout.context_lengths:
        return _packed(context, layout.lengths, q, k, v, scale, window)
    if attention_cuda.applies(q):
        return attention_cuda.paged(context, layout, q, keys, values, scale, window)
    return attention_cpu.paged(context, layout, layer, q, k, v, scale, window)
