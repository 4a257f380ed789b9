"""Write keys and values of new tokens to their slots of the pages. T tokens, K key-value heads, D head width."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


# fmt: off
@triton.jit
def _write(
    k: tl.tensor, v: tl.tensor, slots: tl.tensor, keys: tl.tensor, values: tl.tensor,
    k_token: int, k_head: int, v_token: int, v_head: int,
    keys_slot: int, keys_head: int, values_slot: int, values_head: int,
    HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr,
) -> None:
    # fmt: on
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    head = tl.arange(0, HEADS_PADDED)[:, None]
    lane = tl.arange(0, WIDTH_PADDED)[None, :]
    real = (head < HEADS) & (lane < WIDTH)
    new_k = tl.load(k + token * k_token + head * k_head + lane, mask=real)
    new_v = tl.load(v + token * v_token + head * v_head + lane, mask=real)
    tl.store(keys + slot * keys_slot + head * keys_head + lane, new_k, mask=real)
    tl.store(values + slot * values_slot + head * values_head + lane, new_v, mask=real)


def write_kv(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """`keys[slots], values[slots] = k, v` in one launch; `k`, `v` `[T, K, D]` with any strides but 1 along D.

    `slots` `[T]`, int32 or int64, distinct. `keys`, `values` `[token slots, K, D]`.
    """
    tokens, heads, width = k.shape
    assert k.stride(2) == v.stride(2) == keys.stride(2) == values.stride(2) == 1
    assert slots.shape == (tokens,) and slots.is_contiguous()
    _write[(tokens,)](
        k,
        v,
        slots,
        keys,
        values,
        *(k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
        *(keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)),
        HEADS=heads,
        HEADS_PADDED=triton.next_power_of_2(heads),
        WIDTH=width,
        WIDTH_PADDED=triton.next_power_of_2(width),
    )
