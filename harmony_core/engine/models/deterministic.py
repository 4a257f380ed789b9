"""The deterministic mode: a token's numbers have the same bits whatever is computed beside it. CPU, float32.

A matrix product, a reduction or an exponential may be evaluated in another order, or by other instructions, when the
number of rows changes; so the sampler, which sees a few rows, and the trainer, which sees thousands, would differ in
the last bits. Here every product runs over tiles of exactly 16 rows; the rows of a pass are padded so that no
elementwise kernel has a remainder that it treats otherwise than the rest; attention is cut by position
(`attention_tiled`); sums over ranks are taken in the order of ranks; and a rank has one thread. What is left is that a
row's result does not depend on its place within a tile, which is checked for every shape when a model is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harmony_core.engine.models.matmul import plain_matmul
from harmony_core.engine.models.model import CausalLM
from harmony_core.errors import ResourceError

TILE = 16
"""Rows of every matrix product. Decode pads its sequences to a multiple of it, so it is no larger than it must be."""
NARROW = 16
"""Fewest columns of a product's result; zeros make up for those that are missing."""
LANES = 32
"""Numbers that an elementwise kernel takes at a time at most: two registers of 16 float32."""


def make_deterministic(model: CausalLM) -> None:
    """Switch a freshly loaded model to the deterministic mode, for good. Its ranks must have one thread each.

    Raises ResourceError when this machine's matrix products depend on a row's place.
    """
    assert model.device.type == "cpu" and model.dtype == torch.float32, "the deterministic mode is for float32 on CPU"
    linear = TiledLinear()
    for module in model.module.modules():
        if isinstance(module, nn.Linear):
            linear.check(module.weight)
        elif hasattr(module, "layer_idx") and hasattr(module, "q_proj"):
            module.tiled = True  # type: ignore[assignment]
    decoder: nn.Module = model.module.base_model  # type: ignore[assignment]
    # Not the head's: its parts need not be alike, and all ranks must pad alike.
    sizes = {size for m in decoder.modules() if isinstance(m, nn.Linear) for size in m.weight.shape}
    _pad_rows(decoder, LANES if any(size % (LANES // TILE) for size in sizes) else TILE)
    model.use_product(linear)
    model.row_multiple = LANES


class TiledLinear:
    """`F.linear` by tiles of 16 rows. The backward pass is an ordinary one: nothing is compared with it."""

    def __init__(self) -> None:
        self._checked: set[torch.Size] = set()

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., in]` -> `[..., out]`. Raises ResourceError as `check` does."""
        self.check(weight)
        rows = x.reshape(-1, x.shape[-1])
        output = _Linear.apply(rows, weight) if torch.is_grad_enabled() else _by_tiles(rows, weight)  # type: ignore[no-untyped-call]
        output = output.reshape(*x.shape[:-1], len(weight))
        return output if bias is None else output + bias

    def check(self, weight: Tensor) -> None:
        """Raise ResourceError unless one row gives the same bits at every place of a tile, for a matrix of this shape.

        Each shape is looked at once.
        """
        if weight.shape in self._checked:
            return
        row = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0))
        found = _by_tiles(row.repeat(TILE, 1), weight.detach())
        if not torch.equal(found, found[:1].expand_as(found)):
            raise ResourceError(
                f"this machine's product of {TILE} x {weight.shape[1]} and {weight.shape[1]} x {len(weight)} matrices "
                "depends on a row's place, so the deterministic mode cannot hold what it promises",
                hint="leave --deterministic out, or use another kind of processor",
            )
        self._checked.add(weight.shape)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        # A frozen weight needs no input kept for it.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _by_tiles(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return (
            plain_matmul(grads[0], weight) if ctx.needs_input_grad[0] else None,
            plain_matmul(grads[0].t(), x) if ctx.needs_input_grad[1] else None,
        )


def _by_tiles(x: Tensor, weight: Tensor) -> Tensor:
    """`[N, in]` -> `[N, out]`."""
    count, width = len(x), len(weight)
    x = _with_rows(x, -(-count // TILE) * TILE).contiguous()
    # Libraries take another way for narrow results, an adapter's for one, and there a row's place can matter.
    columns = _with_rows(weight, max(width, NARROW)).t()
    output = x.new_empty(len(x), columns.shape[1])
    for start in range(0, len(x), TILE):
        tile, place = x[start : start + TILE], output[start : start + TILE]
        # The head's rows are padded with whole tiles of zeros; the product of those is known.
        if start < count - TILE or tile.any():
            plain_matmul(tile, columns, out=place)
        else:
            place.zero_()
    return output[:count, :width]


def _with_rows(x: Tensor, count: int) -> Tensor:
    return x if len(x) == count else F.pad(x, (0, 0, 0, count - len(x)))


def _pad_rows(decoder: nn.Module, multiple: int) -> None:
    """Let a decoder compute a multiple of this many rows, and return those it was given."""
    plain = decoder.forward

    def forward(input_ids: Tensor, position_ids: Tensor, **options: Any) -> Any:
        count = input_ids.shape[1]
        missing = -count % multiple
        output = plain(
            input_ids=F.pad(input_ids, (0, missing)), position_ids=F.pad(position_ids, (0, missing)), **options
        )
        output.last_hidden_state = output.last_hidden_state[:, :count]
        return output

    decoder.forward = forward
