"""The closed-form memory plan of a spawn: which bytes each rank will hold, from the model's shape alone, without torch.

Every term is derived from what the engine allocates; tests compare the sums with measured memory.

Shapes: T tokens in a micro-batch, d hidden size, q = heads x head_dim and kv = kv_heads x head_dim (a rank's part),
i feed-forward width (a rank's part), v vocabulary (a rank's part), r adapter rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from harmony_core.memory import sizes as limits
from harmony_core.memory.ledger import Plan
from harmony_core.model.spec import LocalSizes, ModelSpec
from harmony_core.rpc.protocol import LoraSettings

_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_PADDING = 1 + limits.PADDING_SHARE
"""Attention pads sequences of like length to groups."""
_OUTER_HIDDEN = 3
"""Hidden states outside of the layers: the last one, its normalised form, the gradient that comes from the head."""
_ROPE_TABLES = 2
_GRAPH_BYTES = 192 << 20
"""Graphs themselves, workspaces of matrix products while they are recorded, and what is lost to rounding."""
_INDEX_BYTES = 80
"""Ten 64-bit numbers a token: ids, positions, targets, coefficients, gather indices."""


@dataclass(frozen=True)
class Shape:
    """One spawn, as far as memory is concerned.

    `lora` holds the settings of its adapter, new or stored; None means full weights. `weights_shared`: the base
    weights are on the ranks already. `kv_tokens`: those of the pool that are promised. `compiled`: its layers are.
    `scalar`: it scores with a scalar head; `headless`: and its weights have no vocabulary head.
    """

    spec: ModelSpec
    tp: int
    train: bool
    lora: LoraSettings | None
    max_batch_tokens: int
    kv_tokens: int
    device: str = "cpu"
    dtype: str = ""
    compiled: bool = False
    checkpointed_layers: int = 0
    weights_shared: bool = False
    scalar: bool = False
    headless: bool = False

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return _DTYPE_BYTES[self.dtype or ("bfloat16" if self.device == "cuda" else "float32")]

    @property
    def generates(self) -> bool:
        """Whether it has pages; without, it scores only."""
        return self.kv_tokens > 0 and not self.scalar

    @property
    def accumulate(self) -> int:
        """Bytes of a gradient or a moment: float32 at least."""
        return max(4, self.element)


def plan(shape: Shape) -> Plan:
    """What a spawn of this shape holds on each rank."""
    own_weights = shape.train and shape.lora is None
    base = weight_elements(shape.spec, shape.tp, shape.headless)
    adapter = adapter_elements(shape.spec, shape.lora, shape.tp) if shape.lora else 0
    # A scalar head of its own, where it is not part of the weights.
    adapter += shape.spec.hidden_size if shape.scalar and (shape.lora or not shape.headless) else 0
    trained = (adapter if shape.lora else base) if shape.train else 0
    state = 2 if shape.element >= 4 else 3
    activations, workspace = _training(shape) if shape.train else (0, 0)
    masks = _window_masks(shape)
    activations, inference = activations + (masks if shape.train else 0), _inference(shape) + masks
    # A training model samples and scores too, but not while it is in a micro-batch.
    workspace = max(workspace, inference - activations)
    return Plan(
        weights=0 if shape.weights_shared and not own_weights else base * shape.element,
        adapter=adapter * shape.element,
        gradients=trained * shape.accumulate,
        optimizer=trained * state * shape.accumulate,
        kv=shape.kv_tokens * kv_token_bytes(shape),
        decode=decode_bytes(shape) if shape.device == "cuda" and shape.generates else 0,
        activations=activations,
        workspace=workspace,
    )


def weight_elements(spec: ModelSpec, tp: int, headless: bool = False) -> int:
    """Elements of the base weights on a rank; `headless` ones have a scalar head in place of the vocabulary's."""
    n = LocalSizes.of(spec, tp)
    attention = n.d * (n.q + 2 * n.projected_kv) + n.q * n.d
    attention += (n.q + 2 * n.projected_kv) if spec.attention_bias else 0
    attention += 2 * spec.head_dim if spec.qk_norm else 0
    layer = attention + 3 * n.d * n.i + (4 if spec.post_norms else 2) * n.d
    head = n.d if headless else 0 if spec.tied else n.v * n.d
    return spec.num_layers * layer + n.v * n.d + head + n.d


def _window_masks(shape: Shape) -> int:
    """Bytes of what says, on CPU, which tokens lie in each other's sliding window; all layers share it.

    The most is that of one sequence which fills the micro-batch.
    """
    window, tokens = shape.spec.window, shape.max_batch_tokens
    return tokens * tokens * shape.element if shape.device == "cpu" and window and tokens > window else 0


def adapter_elements(spec: ModelSpec, lora: LoraSettings, tp: int) -> int:
    """Elements of an adapter on a rank: the half that meets a split dimension is split with it."""
    sides = _lora_sides(spec, lora, tp)
    return lora.rank * sum(layers * (inside + outside) for layers, inside, outside in sides)


def kv_token_bytes(shape: Shape) -> int:
    """Bytes of one token's keys and values on a rank."""
    return shape.spec.num_layers * 2 * LocalSizes.of(shape.spec, shape.tp).kv * shape.element


def decode_bytes(shape: Shape) -> int:
    """Bytes of decode steps as CUDA graphs on a rank: tensors that stay, the graphs, the memory that they share.

    Logits are written where they stay, but for parts that ranks gather; attention leaves float32 for each split.
    """
    n = LocalSizes.of(shape.spec, shape.tp)
    longest = min(shape.kv_tokens, shape.spec.max_positions)
    by_rows = limits.MAX_RUNNING * (longest // limits.DECODE_SPLIT + 1)
    by_pages = limits.MAX_RUNNING + limits.PAGE_SHARING * shape.kv_tokens // limits.DECODE_SPLIT + 1
    splits = min(by_rows, by_pages)
    stay = limits.MAX_RUNNING * (shape.accumulate * shape.spec.vocab_size + 4 * (longest // limits.PAGE_SIZE + 1))
    stay += limits.PAGE_SIZE * kv_token_bytes(shape)
    gathered = 3 if shape.tp > 1 else 1 if shape.element >= 4 else 0
    step = limits.MAX_RUNNING * (shape.element * (4 * n.d + 3 * n.i + 2 * n.q + 2 * n.kv) + shape.spec.vocab_size // 16)
    step += limits.MAX_RUNNING * gathered * shape.accumulate * shape.spec.vocab_size
    scratch = 4 * (splits + limits.MAX_RUNNING) * (n.q + n.heads)
    return stay + step + scratch + _GRAPH_BYTES


def _lora_sides(spec: ModelSpec, lora: LoraSettings, tp: int) -> list[tuple[int, int, int]]:
    """For each target: the layers that it names, and the widths of its input and output on a rank."""
    n = LocalSizes.of(spec, tp)
    widths = {
        "q_proj": (n.d, n.q),
        "k_proj": (n.d, n.projected_kv),
        "v_proj": (n.d, n.projected_kv),
        "o_proj": (n.q, n.d),
        "gate_proj": (n.d, n.i),
        "up_proj": (n.d, n.i),
        "down_proj": (n.i, n.d),
    }
    # A target is the name of a module in every layer, or the path of one.
    named = [(target.rpartition(".")[2], 1 if "layers." in target else spec.num_layers) for target in lora.targets]
    return [(layers, *widths[leaf]) for leaf, layers in named if leaf in widths]


def _training(shape: Shape) -> tuple[int, int]:
    """Bytes that the forward pass keeps for the backward pass, and the most that comes on top of them at once."""
    spec, tokens, n = shape.spec, shape.max_batch_tokens, LocalSizes.of(shape.spec, shape.tp)
    layer = _layer_activations(shape, n)
    recomputed = shape.checkpointed_layers
    # A recomputed layer keeps its input only.
    kept = (
        (spec.num_layers - recomputed) * layer + recomputed * n.d + _OUTER_HIDDEN * n.d + _ROPE_TABLES * spec.head_dim
    )
    activations = tokens * (kept * shape.element + _INDEX_BYTES)

    # The head's gradient goes where all gradients are, so that it holds chunks of logits only.
    at_head = _head_chunks(shape, n)
    # In the deepest layer, which is all there once recomputed: two tensors as wide as the feed-forward beyond what is
    # freed, two hidden states, and the gradients of weights before they are added up: compiled, the feed-forward's.
    in_layers = tokens * (2 * n.i + 2 * n.d) * shape.element
    if recomputed == spec.num_layers:
        in_layers += tokens * layer * shape.element
    # At the end, when nothing is kept any more, the embedding's gradient.
    at_end = 0
    if shape.lora is None:
        in_layers += n.d * (3 * n.i if shape.compiled else max(n.i, n.q)) * shape.element
        at_end = n.v * n.d * shape.element - activations
    return activations, max(at_head, in_layers, at_end)


def _layer_activations(shape: Shape, n: LocalSizes) -> int:
    """Elements that one layer keeps for the backward pass, per token.

    Of each norm its input and its output, and where its weight is trained the normalised state between (half precision
    normalises in float32, so that its input counts twice); of a norm inside the heads not its output, which rotation
    replaces. Query, key, value and output of attention, and the softmax's sums; on CPU these lie in padded groups, and
    the output once more in row order. Of the feed-forward four tensors: gate, its activation, up and their product.
    """
    if shape.compiled:
        return _compiled_activations(shape, n)
    # A norm keeps, per width: its input in float32, and what it normalised where its weight is trained.
    wide = 4 // min(4, shape.element)
    norm = wide + (1 if shape.lora is None else 0)
    norms = 2 * (norm * n.d + n.d) + 2 * wide
    if shape.spec.post_norms:
        # Two norms more, whose outputs are added and not kept; these models normalise and weight in float32.
        norm = wide + (wide if shape.lora is None else 0)
        norms = 4 * norm * n.d + 2 * n.d + 4 * wide
    if shape.spec.qk_norm:
        norms += norm * (n.q + n.projected_kv) + wide * (n.q + n.projected_kv) // shape.spec.head_dim
    attention = 2 * n.q + 2 * n.kv + wide * n.heads
    if shape.device == "cpu":
        attention = int(_PADDING * attention) + n.q
    return norms + attention + 4 * n.i + (_adapter_activations(shape) if shape.lora else 0)


def _compiled_activations(shape: Shape, n: LocalSizes) -> int:
    """The same of a compiled layer, which makes again what takes no matrix product.

    Inputs and outputs of both norms (where there are four norms, one more); query and key before a norm inside the
    heads; what attention keeps; gate, up and their product.
    """
    wide = 4 // min(4, shape.element)
    hidden = (5 if shape.spec.post_norms else 4) * n.d
    attention = 2 * n.q + 2 * n.kv + wide * n.heads
    if shape.spec.qk_norm:
        attention += n.q + n.projected_kv + wide * (n.q + n.projected_kv) // shape.spec.head_dim
    return hidden + attention + 3 * n.i + 2 * wide + (_adapter_activations(shape) if shape.lora else 0)


def _adapter_activations(shape: Shape) -> int:
    """Elements per token that an adapter keeps in one layer: r between its halves; with dropout, mask and result."""
    assert shape.lora is not None
    sides = _lora_sides(shape.spec, shape.lora, shape.tp)
    kept = sum(layers * (shape.lora.rank + (2 * inside if shape.lora.dropout else 0)) for layers, inside, _ in sides)
    return -(-kept // shape.spec.num_layers)


def _head_chunks(shape: Shape, n: LocalSizes) -> int:
    """Bytes of the logits being scored and, on CUDA in training, of gradients with respect to logits before them."""
    if shape.scalar:
        # In half precision the hidden states and their gradient, widened.
        return shape.max_batch_tokens * (2 * n.d if shape.element < 4 else 4) * shape.accumulate
    if shape.device == "cpu" or shape.element > 4:
        rows = min(shape.max_batch_tokens, max(1, limits.HEAD_HOST_BYTES // (4 * n.v)))
        return rows * n.v * shape.accumulate
    row = (4 + limits.HEAD_TILES * shape.element) * n.v
    rows = min(shape.max_batch_tokens, max(1, limits.HEAD_DEVICE_BYTES // row // 128) * 128)
    return rows * (row if shape.train else 4 * n.v)


def _inference(shape: Shape) -> int:
    """Bytes that a pass over `max_batch_tokens` tokens, or the sampling after it, needs beside weights and pages.

    No layer keeps anything: at the widest point there are two hidden states and either three tensors of the
    feed-forward's width, or query, key and value with their padded groups and the output in both orders.
    """
    n = LocalSizes.of(shape.spec, shape.tp)
    attention = n.q + 2 * n.kv + int(_PADDING * (2 * n.q + 2 * n.kv)) + n.q
    widest = shape.max_batch_tokens * ((2 * n.d + max(3 * n.i, attention)) * shape.element + _INDEX_BYTES)
    # A row of logits for each sequence, and nine times as much while top-p sorts them in float64 for some of the rows.
    drawn = min(limits.MAX_RUNNING * shape.spec.vocab_size, limits.LOGITS_AT_ONCE) if shape.generates else 0
    sampling = 10 * shape.accumulate * drawn
    # A decode step gathers one layer's keys and values at a time.
    gathered = 2 * shape.kv_tokens * n.kv * shape.element if shape.device == "cpu" else 0
    return max(widest, sampling, gathered, _head_chunks(shape, n))


def copy_of(shape: Shape, kv_tokens: int = 0) -> Shape:
    """A frozen copy of a training spawn; beside an adapter it shares the base weights. Without pages it scores only."""
    shared = shape.lora is not None
    return replace(shape, train=False, checkpointed_layers=0, kv_tokens=kv_tokens, weights_shared=shared)
