"""The closed-form memory plan of a spawn: the bytes on each rank, computed from the `Spawn` record, without torch.

Every term is derived from the engine's allocations; tests compare the sums with measured memory.

Shapes: T tokens in a micro-batch, d hidden size, q = heads x head_dim and kv = kv_heads x head_dim (a rank's part),
i feed-forward width (a rank's part), v vocabulary (a rank's part), r adapter rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from msgspec.structs import replace

from harmony_core.memory.ledger import MemoryPlan
from harmony_core.model.spec import LocalSizes, ModelSpec, fitting_tp
from harmony_core.rpc.protocol import LoraSettings, Spawn

PAGE_SIZE = 16
"""Tokens in a page of the KV cache."""
MAX_RUNNING = 256
"""Most sequences that hold pages at once, so also the most in a decode step."""
LOGITS_AT_ONCE = 8 << 20
"""Elements of logits in one sampling call."""
DECODE_SPLIT = 256
"""Tokens of a context that one work item of a decode step covers; a multiple of every page size."""
PAGE_SHARING = 8
"""Limit on the uses of a page in one decode step, on average; above it the step runs without the static tensors."""
HEAD_HOST_BYTES = 64 << 20
"""Bytes of logits in one tile of the head in plain torch."""
HEAD_DEVICE_BYTES = 1 << 30
"""On CUDA: bytes of float32 logits in one tile of the head, and of the gradients of `HEAD_TILES` tiles."""
HEAD_TILES = 4
"""Tiles whose gradients are multiplied at once on CUDA: each product reads and writes all of the head's gradient."""
PADDING_SHARE = 0.2
"""Padding tokens allowed in a group of sequences of similar length, as a share of its real tokens."""

_PADDING = 1 + PADDING_SHARE
"""Factor for the padding of attention groups."""
_OUTER_HIDDEN = 3
"""Hidden states outside the layers: the last one, its normalised form, the gradient from the head."""
_ROPE_TABLES = 2
_GRAPH_BYTES = 192 << 20
"""The graphs, workspaces of matrix products during recording, and losses to rounding."""
_INDEX_BYTES = 80
"""Ten 64-bit numbers a token: ids, positions, targets, coefficients, gather indices."""


def plan(spawn: Spawn) -> MemoryPlan:
    """The bytes that a spawn holds on each rank."""
    own_weights = spawn.train and spawn.lora is None
    base = weight_elements(spawn.spec, spawn.tp, spawn.headless)
    adapter = adapter_elements(spawn.spec, spawn.lora, spawn.tp) if spawn.lora else 0
    # Its own scalar head, unless that is part of the weights.
    adapter += spawn.spec.hidden_size if spawn.scalar and (spawn.lora or not spawn.headless) else 0
    trained = (adapter if spawn.lora else base) if spawn.train else 0
    state = 2 if spawn.element >= 4 else 3
    activations, workspace = _training(spawn) if spawn.train else (0, 0)
    masks = _window_masks(spawn)
    activations, inference = activations + (masks if spawn.train else 0), _inference(spawn) + masks
    # A training model also samples and scores, but not during a micro-batch.
    workspace = max(workspace, inference - activations)
    return MemoryPlan(
        weights=0 if spawn.weights_shared and not own_weights else base * spawn.element,
        adapter=adapter * spawn.element,
        gradients=trained * spawn.accumulate,
        optimizer=trained * state * spawn.accumulate,
        kv=spawn.kv_tokens * kv_token_bytes(spawn),
        decode=decode_bytes(spawn) if spawn.device == "cuda" and spawn.generates else 0,
        activations=activations,
        workspace=workspace,
    )


def weight_elements(spec: ModelSpec, tp: int, headless: bool = False) -> int:
    """Elements of the base weights on a rank; with `headless`, a scalar head replaces the vocabulary's."""
    n = LocalSizes.of(spec, tp)
    attention = n.d * (n.q + 2 * n.projected_kv) + n.q * n.d
    attention += (n.q + 2 * n.projected_kv) if spec.attention_bias else 0
    attention += 2 * spec.head_dim if spec.qk_norm else 0
    layer = attention + 3 * n.d * n.i + (4 if spec.post_norms else 2) * n.d
    head = n.d if headless else 0 if spec.tied else n.v * n.d
    return spec.num_layers * layer + n.v * n.d + head + n.d


def _window_masks(spawn: Spawn) -> int:
    """Bytes of the masks for sliding windows on CPU, which all layers share.

    The maximum is reached by one sequence that fills the micro-batch.
    """
    window, tokens = spawn.spec.window, spawn.max_batch_tokens
    return tokens * tokens * spawn.element if spawn.device == "cpu" and window and tokens > window else 0


def adapter_elements(spec: ModelSpec, lora: LoraSettings, tp: int) -> int:
    """Elements of an adapter on a rank; A or B is split if its layer's dimension is split."""
    sides = _lora_sides(spec, lora, tp)
    return lora.rank * sum(layers * (inside + outside) for layers, inside, outside in sides)


def kv_token_bytes(spawn: Spawn) -> int:
    """Bytes of one token's keys and values on a rank."""
    return spawn.spec.num_layers * 2 * LocalSizes.of(spawn.spec, spawn.tp).kv * spawn.element


def decode_bytes(spawn: Spawn) -> int:
    """Bytes of decode steps as CUDA graphs on a rank: static tensors, the graphs, and the memory that they share.

    Logits are written in place, except for slices that ranks gather; attention writes float32 results of each split.
    """
    n = LocalSizes.of(spawn.spec, spawn.tp)
    longest = min(spawn.kv_tokens, spawn.spec.max_positions)
    by_rows = MAX_RUNNING * (longest // DECODE_SPLIT + 1)
    by_pages = MAX_RUNNING + PAGE_SHARING * spawn.kv_tokens // DECODE_SPLIT + 1
    splits = min(by_rows, by_pages)
    stay = MAX_RUNNING * (spawn.accumulate * spawn.spec.vocab_size + 4 * (longest // PAGE_SIZE + 1))
    stay += PAGE_SIZE * kv_token_bytes(spawn)
    gathered = 3 if spawn.tp > 1 else 1 if spawn.element >= 4 else 0
    step = MAX_RUNNING * (spawn.element * (4 * n.d + 3 * n.i + 2 * n.q + 2 * n.kv) + spawn.spec.vocab_size // 16)
    step += MAX_RUNNING * gathered * spawn.accumulate * spawn.spec.vocab_size
    scratch = 4 * (splits + MAX_RUNNING) * (n.q + n.heads)
    return stay + step + scratch + _GRAPH_BYTES


def _lora_sides(spec: ModelSpec, lora: LoraSettings, tp: int) -> list[tuple[int, int, int]]:
    """For each target: its number of layers, and the widths of its input and output on a rank."""
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
    # A target is the name of a module in every layer, or the path of one module.
    named = [(target.rpartition(".")[2], 1 if "layers." in target else spec.num_layers) for target in lora.targets]
    return [(layers, *widths[leaf]) for leaf, layers in named if leaf in widths]


def _training(spawn: Spawn) -> tuple[int, int]:
    """Bytes that the forward pass keeps for the backward pass, and the most additional bytes at any time."""
    spec, tokens, n = spawn.spec, spawn.max_batch_tokens, LocalSizes.of(spawn.spec, spawn.tp)
    layer = _layer_activations(spawn, n)
    recomputed = spawn.checkpointed_layers
    # A recomputed layer keeps only its input.
    kept = (
        (spec.num_layers - recomputed) * layer + recomputed * n.d + _OUTER_HIDDEN * n.d + _ROPE_TABLES * spec.head_dim
    )
    activations = tokens * (kept * spawn.element + _INDEX_BYTES)

    # The head's gradient is added to the gradient buffer, so the head needs only chunks of logits.
    at_head = _head_chunks(spawn, n)
    # In the deepest layer, with all its recomputed activations: two tensors of feed-forward width that are not freed
    # yet, two hidden states, and gradients of weights before they are added up (if compiled, the feed-forward's).
    in_layers = tokens * (2 * n.i + 2 * n.d) * spawn.element
    if recomputed == spec.num_layers:
        in_layers += tokens * layer * spawn.element
    # At the end, when all activations are freed, the embedding's gradient.
    at_end = 0
    if spawn.lora is None:
        in_layers += n.d * (3 * n.i if spawn.compile else max(n.i, n.q)) * spawn.element
        at_end = n.v * n.d * spawn.element - activations
    return activations, max(at_head, in_layers, at_end)


def _layer_activations(spawn: Spawn, n: LocalSizes) -> int:
    """Elements that one layer keeps for the backward pass, per token.

    Each norm keeps its input and output, and if its weight is trained the normalised state (half precision normalises
    in float32, so its input counts twice); a norm inside the heads does not keep its output, which rotation replaces.
    Attention keeps query, key, value, output and the softmax's sums; on CPU these are in padded groups, and the output
    also in row order. The feed-forward keeps four tensors: gate, its activation, up and their product.
    """
    if spawn.compile:
        return _compiled_activations(spawn, n)
    # A norm keeps, per width: its input in float32, and the normalised state if its weight is trained.
    wide = 4 // min(4, spawn.element)
    norm = wide + (1 if spawn.lora is None else 0)
    norms = 2 * (norm * n.d + n.d) + 2 * wide
    if spawn.spec.post_norms:
        # Two more norms, whose outputs are added and not kept; these models apply norm and weight in float32.
        norm = wide + (wide if spawn.lora is None else 0)
        norms = 4 * norm * n.d + 2 * n.d + 4 * wide
    if spawn.spec.qk_norm:
        norms += norm * (n.q + n.projected_kv) + wide * (n.q + n.projected_kv) // spawn.spec.head_dim
    attention = 2 * n.q + 2 * n.kv + wide * n.heads
    if spawn.device == "cpu":
        attention = int(_PADDING * attention) + n.q
    return norms + attention + 4 * n.i + (_adapter_activations(spawn) if spawn.lora else 0)


def _compiled_activations(spawn: Spawn, n: LocalSizes) -> int:
    """The same for a compiled layer, which recomputes all tensors that need no matrix product.

    It keeps inputs and outputs of both norms (with four norms, one more); query and key before a norm inside the heads;
    the tensors kept by attention; gate, up and their product.
    """
    wide = 4 // min(4, spawn.element)
    hidden = (5 if spawn.spec.post_norms else 4) * n.d
    attention = 2 * n.q + 2 * n.kv + wide * n.heads
    if spawn.spec.qk_norm:
        attention += n.q + n.projected_kv + wide * (n.q + n.projected_kv) // spawn.spec.head_dim
    return hidden + attention + 3 * n.i + 2 * wide + (_adapter_activations(spawn) if spawn.lora else 0)


def _adapter_activations(spawn: Spawn) -> int:
    """Elements per token that an adapter keeps in one layer: r between A and B; with dropout also mask and result."""
    assert spawn.lora is not None
    sides = _lora_sides(spawn.spec, spawn.lora, spawn.tp)
    kept = sum(layers * (spawn.lora.rank + (2 * inside if spawn.lora.dropout else 0)) for layers, inside, _ in sides)
    return -(-kept // spawn.spec.num_layers)


def _head_chunks(spawn: Spawn, n: LocalSizes) -> int:
    """Bytes of the current logits and, on CUDA in training, of the buffered gradients of earlier tiles."""
    if spawn.scalar:
        # In half precision, the widened hidden states and their gradient.
        return spawn.max_batch_tokens * (2 * n.d if spawn.element < 4 else 4) * spawn.accumulate
    if spawn.device == "cpu" or spawn.element > 4:
        rows = min(spawn.max_batch_tokens, max(1, HEAD_HOST_BYTES // (4 * n.v)))
        return rows * n.v * spawn.accumulate
    row = (4 + HEAD_TILES * spawn.element) * n.v
    rows = min(spawn.max_batch_tokens, max(1, HEAD_DEVICE_BYTES // row // 128) * 128)
    return rows * (row if spawn.train else 4 * n.v)


def _inference(spawn: Spawn) -> int:
    """Bytes for a pass over `max_batch_tokens` tokens and the sampling after it, besides weights and pages.

    Layers keep no activations: at the peak there are two hidden states and either three tensors of feed-forward width,
    or query, key and value with their padded groups and the output in both orders.
    """
    n = LocalSizes.of(spawn.spec, spawn.tp)
    attention = n.q + 2 * n.kv + int(_PADDING * (2 * n.q + 2 * n.kv)) + n.q
    widest = spawn.max_batch_tokens * ((2 * n.d + max(3 * n.i, attention)) * spawn.element + _INDEX_BYTES)
    # A row of logits for each sequence, and nine times as much while top-p sorts some of the rows in float64.
    drawn = min(MAX_RUNNING * spawn.spec.vocab_size, LOGITS_AT_ONCE) if spawn.generates else 0
    sampling = 10 * spawn.accumulate * drawn
    # A decode step gathers one layer's keys and values at a time.
    gathered = 2 * spawn.kv_tokens * n.kv * spawn.element if spawn.device == "cpu" else 0
    return max(widest, sampling, gathered, _head_chunks(spawn, n))


DEFAULT_KV_TOKENS = 131_072
"""Most tokens of a pool whose size is chosen by the plan."""

BATCH_STEP = 16
"""Computed micro-batch sizes are multiples of this."""


def choose_checkpointing(spawn: Spawn, free: int, transient: int = 0) -> int:
    """The fewest layers to recompute so that the spawn fits; if none suffices, the number that needs least memory.

    `free`: free bytes per rank; `transient`: bytes of the largest live model while it works.
    """
    if not spawn.train:
        return 0

    def enough(layers: int) -> bool:
        return _fits(plan(replace(spawn, checkpointed_layers=layers)), free, transient)

    last = _tightest(spawn).checkpointed_layers
    layers = _least(enough, 0, spawn.spec.num_layers)
    return last if layers == spawn.spec.num_layers else layers


def largest_batch(spawn: Spawn, free: int, transient: int = 0) -> int:
    """The most tokens of a micro-batch that fit with any number of recomputed layers; a multiple of 16, or 0."""

    def fits(steps: int) -> bool:
        return could_fit(replace(spawn, max_batch_tokens=steps * BATCH_STEP), free, transient)

    return _most(fits, max(0, free // BATCH_STEP - 1)) * BATCH_STEP


def default_kv_tokens(spawn: Spawn, free: int, transient: int = 0) -> int:
    """Tokens of a pool without a given size: as many as fit after all other memory, up to 131,072; 0 if none fit."""

    def fits(tokens: int) -> bool:
        return _fits(plan(replace(spawn, kv_tokens=tokens)), free, transient)

    return _most(fits, DEFAULT_KV_TOKENS)


def ways_out(
    spawn: Spawn, free: int, world: int, transient: int = 0, *, base_live: bool = False, beside: Iterable[int] = ()
) -> list[str]:
    """Changes that each suffice for the spawn to fit; each has been checked with a plan.

    `base_live`: the model's base weights are on the ranks, so that an adapter in place of full weights shares them.
    `beside`: the tp values in use; each must divide tp or be a multiple of it.
    """
    found: list[str] = []

    def fits(changed: Spawn) -> bool:
        return could_fit(changed, free, transient)

    batch = largest_batch(spawn, free, transient) if spawn.train else 0
    if 0 < batch < spawn.max_batch_tokens:
        found.append(f"max_batch_size={batch}")
    for tp in fitting_tp(spawn.spec, world):
        if any(tp % other and other % tp for other in beside):
            continue
        # Weights that are already on the ranks are sharded for the present tp.
        if tp > spawn.tp and fits(replace(spawn, tp=tp, weights_shared=False)):
            found.append(f"tp={tp}")
            break
    tokens = default_kv_tokens(_tightest(spawn), free, transient)
    if 0 < tokens < spawn.kv_tokens:
        found.append(f"kv_cache_len={tokens}")
    if spawn.train and spawn.lora is None:
        adapter = replace(spawn, lora=LoraSettings(), weights_shared=base_live, private=False)
        if fits(adapter):
            found.append("with_adapter()")
        elif not found:
            batch = largest_batch(adapter, free, transient)
            found += [f"with_adapter() and max_batch_size={batch}"] if batch else []
    return found


def ways_out_with_copy(source: Spawn, free: int, transient: int, *, generating: bool = False) -> list[str]:
    """Changes of a training spawn that each suffice for a copy of it to fit as well.

    `free`: bytes per rank that no other model holds; `transient`: most transient bytes of any other model.
    `generating`: the copy has a pool as large as the spawn's.
    """

    def fits(changed: Spawn) -> bool:
        rest = free - plan(changed.copied("")).resident
        own = plan(replace(changed, checkpointed_layers=choose_checkpointing(changed, rest, transient)))
        copy = plan(changed.copied("", changed.kv_tokens if generating else 0))
        return own.resident + copy.resident + max(own.transient, copy.transient, transient) <= free

    found: list[str] = []
    steps = source.max_batch_tokens // BATCH_STEP
    batch = _most(lambda n: fits(replace(source, max_batch_tokens=n * BATCH_STEP)), steps) * BATCH_STEP
    tokens = _most(lambda n: fits(replace(source, kv_tokens=n)), source.kv_tokens)
    found += [f"max_batch_size={batch}"] if 0 < batch < source.max_batch_tokens else []
    found += [f"kv_cache_len={tokens}"] if 0 < tokens < source.kv_tokens else []
    if source.lora is None and fits(replace(source, lora=LoraSettings(), private=False)):
        found.append("with_adapter()")
    return found


def could_fit(spawn: Spawn, free: int, transient: int) -> bool:
    """Whether it fits with the number of recomputed layers that needs least memory."""
    return _fits(plan(_tightest(spawn)), free, transient)


def _fits(needed: MemoryPlan, free: int, transient: int) -> bool:
    return needed.resident + max(needed.transient, transient) <= free


def _tightest(spawn: Spawn) -> Spawn:
    """The spawn with the number of recomputed layers that needs least memory."""
    if not spawn.train:
        return spawn
    # The deepest layer is recomputed at once, so recomputing it saves memory only during the head's work.
    layers = spawn.spec.num_layers
    choices = (replace(spawn, checkpointed_layers=count) for count in (layers - 1, layers))
    return min(choices, key=lambda choice: plan(choice).total)


def _most(good: Callable[[int], bool], high: int) -> int:
    """The largest number in [1, high] up to which `good` holds, by bisection; 0 if it does not hold for 1."""
    return _least(lambda number: not good(number), 1, high + 1) - 1


def _least(good: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest number in [low, high) for which a monotonic `good` holds, by bisection; `high` if none."""
    while low < high:
        middle = (low + high) // 2
        if good(middle):
            high = middle
        else:
            low = middle + 1
    return low
