"""Products by oneDNN against torch's own, in every direction and layout that the engine uses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tiny_models
from harmony_core.engine.models import loading, matmul
from harmony_core.engine.models.context import ForwardContext, PackedAttention, forward_context
from harmony_core.engine.models.heads import linear_logprob_loss
from harmony_core.engine.models.layers import set_product
from harmony_core.engine.models.parallel import TensorParallel

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.backends.mkldnn.is_available(),
    reason="this torch is built without oneDNN",
)

WIDE, NARROW = 640, 512


def random(*shape: int) -> Tensor:
    return torch.randn(*shape)


def close(found: Tensor, expected: Tensor) -> None:
    found, expected = found.detach(), expected.detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()) + 1e-6)


@pytest.mark.parametrize("rows", [1, 3, 4, 37])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_linear_with_the_gradients_of_linear(rows: int, bias: bool) -> None:
    x, weight = random(1, rows, WIDE), random(NARROW, WIDE)
    offset = random(NARROW) if bias else None
    output_gradient = random(rows, 1, NARROW).transpose(0, 1)  # as a packed row's comes back
    found = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    if offset is not None:
        found.append(offset.clone().requires_grad_())
        expected.append(offset.clone().requires_grad_())
    a, b = matmul.onednn_linear(*found), F.linear(*expected)
    close(a, b)
    a.backward(output_gradient)
    b.backward(output_gradient)
    for one, other in zip(found, expected, strict=True):
        assert one.grad is not None and other.grad is not None
        close(one.grad, other.grad)


def test_a_frozen_weight_takes_no_gradient() -> None:
    x, weight = random(8, WIDE).requires_grad_(), random(NARROW, WIDE)
    matmul.onednn_linear(x, weight).sum().backward()
    assert weight.grad is None and x.grad is not None
    close(x.grad, weight.sum(0).expand_as(x))


def test_nothing_and_little_take_the_ordinary_way() -> None:
    weight = random(NARROW, WIDE)
    assert matmul.onednn_linear(random(0, WIDE), weight).shape == (0, NARROW)
    x, small = random(5, 8), random(4, 8)
    assert torch.equal(matmul.onednn_linear(x, small), F.linear(x, small))


def test_products_of_views_and_their_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the head: columns of a wide matrix, transposed, in blocks that do not divide it."""
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda device, dtype: True)
    gradient, hidden = random(300, 5000), random(300, 64)
    total = random(5000, 64)
    expected = total + gradient.t() @ hidden
    matmul.add_matmul(total, gradient.t(), hidden)
    close(total, expected)
    close(
        matmul.plain_matmul(gradient[:, ::2], random(2500, 80).mul_(0).add_(1)),
        gradient[:, ::2].sum(1, True).expand(-1, 80),
    )


def test_every_linear_layer_takes_part() -> None:
    layer, seen = nn.Linear(4, 3), []

    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append((x, weight, bias))
        return F.linear(x, weight, bias)

    set_product(layer, product)
    x = random(2, 4)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert len(seen) == 1 and seen[0][1] is layer.weight and seen[0][2] is layer.bias


def test_a_model_trains_alike_with_either_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs and every gradient, the head's included, with products of any size sent to oneDNN."""
    directory = tiny_models.build(tmp_path / "model", "qwen2")
    tokens, lengths = torch.randint(3, 60, (30,)), (17, 13)
    positions = torch.cat([torch.arange(length) for length in lengths])
    found = []
    for chosen in (False, True):
        for module in (matmul, loading):
            monkeypatch.setattr(module, "onednn_is_faster", lambda device, dtype, chosen=chosen: chosen)
        monkeypatch.setattr(matmul, "_FEWEST_WEIGHTS", 1)
        monkeypatch.setattr(matmul, "_FEWEST_PRODUCTS", 1)
        model = loading.load_model(directory, TensorParallel.single(), torch.device("cpu"), torch.float32)
        assert (model.matmul is matmul.onednn_linear) == chosen
        parameters = model.trainable_parameters(None)
        with forward_context(ForwardContext(PackedAttention(lengths))):
            hidden = model.hidden_states(tokens, positions)
            loss, logprobs = linear_logprob_loss(model, hidden, tokens.roll(-1), torch.ones(30))
            loss.backward()
        found.append({name: p.grad for name, p in parameters.items()} | {"logprobs": logprobs})
    for name, expected in found[0].items():
        assert expected is not None and found[1][name] is not None, name
        close(found[1][name], expected)
