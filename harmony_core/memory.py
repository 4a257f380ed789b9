"""The closed-form memory plan of a spawn: which bytes each rank will hold, from the model's shape alone, without torch.

Every term is derived from what the engine allocates; tests compare the sums with measured memory.

Shapes: T tokens in a micro-batch, d hidden size, q = heads x head_dim and kv = kv_heads x head_dim (a rank's part),
i feed-forward width (a rank's part), v vocabulary (a rank's part), r adapter rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from harmony_core.ledger import Plan
from harmony_core.model_spec import LocalSizes, ModelSpec, fitting_tp
from harmony_core.rpc.protocol import LoraSettings

DEFAULT_KV_TOKENS = 131_072
"""Most tokens of a pool whose size nobody asked for."""

BATCH_STEP = 16
"""Computed micro-batch sizes are multiples of this."""

_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_HEAD_HOST_BYTES, _HEAD_DEVICE_BYTES, _HEAD_TILES = 64 << 20, 1 << 30, 4
"""Logits of one tile on CPU; logits of one and gradients of several on CUDA: the head's own constants."""
_PADDING = 1.2
"""Attention pads sequences of like length to groups, by at most a fifth."""
_OUTER_HIDDEN = 3
"""Hidden states outside of the layers: the last one, its normalised form, the gradient that comes from the head."""
_ROPE_TABLES = 2
_MAX_RUNNING = 256
"""Sequences that the scheduler lets run at once: its own constant."""
_SAMPLED_AT_ONCE = 8 << 20
"""Logits that the sampler takes at once: its own constant."""
_PAGE_TOKENS = 16
_SPLIT_TOKENS = 256
"""Tokens of a context that a decode step attends to at a time: the kernel's own constant."""
_SHARING = 8
"""How often a decode step may count each page: the runner's own constant."""
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
        decode=decode_bytes(shape) if shape.device == "cuda" and not shape.scalar else 0,
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
    splits = min(
        _MAX_RUNNING * (longest // _SPLIT_TOKENS + 1), _MAX_RUNNING + _SHARING * shape.kv_tokens // _SPLIT_TOKENS + 1
    )
    stay = _MAX_RUNNING * (shape.accumulate * shape.spec.vocab_size + 4 * (longest // _PAGE_TOKENS + 1))
    stay += _PAGE_TOKENS * kv_token_bytes(shape)
    gathered = 3 if shape.tp > 1 else 1 if shape.element >= 4 else 0
    step = _MAX_RUNNING * (shape.element * (4 * n.d + 3 * n.i + 2 * n.q + 2 * n.kv) + shape.spec.vocab_size // 16)
    step += _MAX_RUNNING * gathered * shape.accumulate * shape.spec.vocab_size
    scratch = 4 * (splits + _MAX_RUNNING) * (n.q + n.heads)
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
        rows = min(shape.max_batch_tokens, max(1, _HEAD_HOST_BYTES // (4 * n.v)))
        return rows * n.v * shape.accumulate
    row = (4 + _HEAD_TILES * shape.element) * n.v
    rows = min(shape.max_batch_tokens, max(1, _HEAD_DEVICE_BYTES // row // 128) * 128)
    return rows * (row if shape.train else 4 * n.v)


def _inference(shape: Shape) -> int:
    """Bytes that a pass over `max_batch_tokens` tokens, or the sampling after it, needs beside weights and pages.

    No layer keeps anything: at the widest point there are two hidden states and either three tensors of the
    feed-forward's width, or query, key and value with their padded groups and the output in both orders.
    """
    n = LocalSizes.of(shape.spec, shape.tp)
    attention = n.q + 2 * n.kv + int(_PADDING * (2 * n.q + 2 * n.kv)) + n.q
    widest = shape.max_batch_tokens * ((2 * n.d + max(3 * n.i, attention)) * shape.element + _INDEX_BYTES)
    # One row of logits for each sequence, the draw's working copy, and two temporaries.
    drawn = 0 if shape.scalar else min(_MAX_RUNNING * shape.spec.vocab_size, _SAMPLED_AT_ONCE)
    sampling = 4 * shape.accumulate * drawn
    # A decode step gathers one layer's keys and values at a time.
    gathered = 2 * shape.kv_tokens * n.kv * shape.element if shape.device == "cpu" else 0
    return max(widest, sampling, gathered, _head_chunks(shape, n))


def choose_checkpointing(shape: Shape, free: int, transient: int = 0) -> int:
    """The fewest layers to recompute so that the spawn fits; as many as helps most if it does not fit anyhow.

    `free`: bytes per rank that no model holds; `transient`: what the largest live model needs while it works.
    """
    if not shape.train:
        return 0

    def enough(layers: int) -> bool:
        return _fits(plan(replace(shape, checkpointed_layers=layers)), free, transient)

    last = _tightest(shape).checkpointed_layers
    layers = _least(enough, 0, shape.spec.num_layers)
    return last if layers == shape.spec.num_layers else layers


def largest_batch(shape: Shape, free: int, transient: int = 0) -> int:
    """The most tokens of a micro-batch that fit, recomputing as many layers as it takes; a multiple of 16, or 0."""

    def too_large(steps: int) -> bool:
        return not _fits(plan(_tightest(replace(shape, max_batch_tokens=steps * BATCH_STEP))), free, transient)

    return (_least(too_large, 1, max(1, free // BATCH_STEP)) - 1) * BATCH_STEP


def default_kv_tokens(shape: Shape, free: int, transient: int = 0) -> int:
    """Tokens of a pool that nobody sized: up to 131,072, as many as fit after everything else, 0 if none."""

    def too_many(tokens: int) -> bool:
        return not _fits(plan(replace(shape, kv_tokens=tokens)), free, transient)

    return _least(too_many, 1, DEFAULT_KV_TOKENS + 1) - 1


def ways_out(shape: Shape, free: int, world: int, transient: int = 0, *, base_live: bool = False) -> list[str]:
    """Changes, each enough by itself, with which the spawn would fit; every one has been planned.

    `base_live`: the model's base weights are on the ranks, so that an adapter in place of full weights shares them.
    """
    found: list[str] = []

    def fits(changed: Shape) -> bool:
        return _fits(plan(_tightest(changed)), free, transient)

    batch = largest_batch(shape, free, transient)
    if 0 < batch < shape.max_batch_tokens:
        found.append(f"max_batch_size={batch}")
    for tp in fitting_tp(shape.spec, world):
        # Weights on the ranks already are sharded for the present tp.
        if tp > shape.tp and fits(replace(shape, tp=tp, weights_shared=False)):
            found.append(f"tp={tp}")
            break
    tokens = default_kv_tokens(_tightest(shape), free, transient)
    if 0 < tokens < shape.kv_tokens:
        found.append(f"kv_cache_len={tokens}")
    if shape.train and shape.lora is None:
        adapter = replace(shape, lora=LoraSettings(), weights_shared=base_live, headless=shape.spec.scalar)
        if fits(adapter):
            found.append("with_adapter()")
        elif not found:
            batch = largest_batch(adapter, free, transient)
            found += [f"with_adapter() and max_batch_size={batch}"] if batch else []
    return found


def _fits(needed: Plan, free: int, transient: int) -> bool:
    return needed.resident + max(needed.transient, transient) <= free


def _tightest(shape: Shape) -> Shape:
    """With the number of recomputed layers that needs least memory."""
    if not shape.train:
        return shape
    # The deepest layer is needed again at once: recomputing it saves only what would lie there beside the head's work.
    layers = shape.spec.num_layers
    choices = (replace(shape, checkpointed_layers=count) for count in (layers - 1, layers))
    return min(choices, key=lambda choice: plan(choice).total)


def _least(good: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest number in [low, high) for which a monotonic `good` holds, by bisection; `high` if none."""
    while low < high:
        middle = (low + high) // 2
        if good(middle):
            high = middle
        else:
            low = middle + 1
    return low
