"""The messages between the driver and the ranks: typed, plain data only. `rpc.methods` says what answers what.

A *global* request goes to every leader with a number that the driver counts up over the run; leaders execute them in
that order. A *replica* request goes to the leader of one replica's domain. Token ids travel as int32, values as float32
or float64 bytes in the machine's order (`rpc.wire` packs them).
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import structs

from harmony_core.grammar import Constraint
from harmony_core.model.spec import ModelSpec

PROTOCOL_VERSION = 1
_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class Message(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Base of all messages."""


class Hello(Message):
    """A rank's first frame."""

    token: str
    protocol: int
    version: str
    rank: int
    world_size: int
    pid: int
    device: str
    torch: str


class Beat(Message):
    """Sent by a separate thread of a rank every second: the engine thread's activity, and seconds without progress."""

    phase: str
    seconds: float
    step: int


class Event(Message):
    """A line for `events.jsonl`."""

    type: str
    data: dict[str, Any]


class Nothing(Message):
    """The empty result of a request."""


class LoraSettings(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """A new adapter. `targets` are leaf names of linear modules."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    seed: int = 0


Ranges = tuple[tuple[int, int], ...]
"""Ranges of ids, each as (first, last + 1)."""


class ModelSource(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """The locations of a model's files. Paths are absolute.

    `weights` is a directory with config.json and safetensors; `adapter` one with adapter_config.json, "" without one.
    Spawns with equal `digest` (of the base weights) and tp share them.
    """

    weights: str
    digest: str
    adapter: str = ""


class Spawn(Message, frozen=True):  # type: ignore[misc]  # msgspec takes a frozen one beside others
    """One spawn: made by its builder, completed by the plan, executed by the ranks, kept while the model lives."""

    spec: ModelSpec
    """The model's architecture."""
    name: str = ""
    ref: str = ""
    """The exact reference of its version in the registry."""
    source: ModelSource = ModelSource(weights="", digest="")
    device: str = "cpu"
    dtype: str = ""  # float32 on CPU, bfloat16 on CUDA
    tp: int = 1
    train: bool = False
    private: bool = False
    """Whether the base weights are not shared and may change in place, as full training needs."""
    weights_shared: bool = False
    """Whether the ranks already held the base weights when the spawn was planned."""
    lora: LoraSettings | None = None
    """Settings of the source's adapter or of a new one; None for full weights."""
    scalar: bool = False
    """Whether it has a scalar head and only scores. The head is new if neither adapter nor weights have one."""
    max_batch_tokens: int = 0
    """Most tokens in one micro-batch (training), or in one scoring or prefill batch."""
    kv_cache_len: int | None = None
    """Requested tokens of the page pool; None leaves the size to the plan."""
    kv_tokens: int = 0
    """Tokens in the page pool of each replica."""
    max_seqlen: int | None = None
    """Most tokens of a sequence, prompt and completion together; None for the model's context."""
    tokens_to_generate: int = 2048
    """Most new tokens of one request."""
    tokenless: Ranges = ()
    """Ids without a token, which are never drawn."""
    tokenizer: str = ""
    """The directory of its tokenizer, which constrained requests need; "" without one."""
    checkpointed_layers: int = 0
    """Number of layers that recompute their activations in the backward pass."""
    compile: bool = False
    rehearse: bool = False
    """Whether to rehearse in full: worst-case micro-batch, all pages. Otherwise the rehearsal is short."""
    seed: int = 0
    """The seed of all randomness in training, such as adapter dropout."""
    promised_bytes: int = 0
    copied_from: str = ""
    """The live model that this spawn is a frozen copy of."""

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return _DTYPE_BYTES[self.dtype or ("bfloat16" if self.device == "cuda" else "float32")]

    @property
    def accumulate(self) -> int:
        """Bytes of a gradient or a moment: at least those of float32."""
        return max(4, self.element)

    @property
    def generates(self) -> bool:
        """Whether it has a page pool, and so generates."""
        return self.kv_tokens > 0 and not self.scalar

    @property
    def shared_key(self) -> str:
        """Equal for spawns that can share base weights."""
        return f"{self.source.digest}/{self.tp}/{self.dtype}"

    @property
    def weights_key(self) -> str:
        """`shared_key` if the weights are shared, else ""."""
        return "" if self.private else self.shared_key

    @property
    def headless(self) -> bool:
        """Whether its weights have a scalar head in place of the vocabulary head."""
        return self.spec.scalar or (self.scalar and self.private)

    def copied(self, name: str, kv_tokens: int = 0) -> Spawn:
        """A frozen copy; with an adapter it shares the base weights. Without pages it only scores."""
        changed = {"train": False, "checkpointed_layers": 0, "weights_shared": self.lora is not None}
        return structs.replace(self, name=name, copied_from=self.name, kv_tokens=kv_tokens, **changed)


class Clone(Message):
    """Make a frozen copy of a live model's trained state under a new name. It has no page pool, so it only scores."""

    source: str
    name: str


class MakePool(Message):
    """Give a model without a page pool one of `kv_tokens` tokens on each replica. It can generate afterwards."""

    model: str
    kv_tokens: int


class Inspect(Message):
    """Request a model's counters and the memory of its ranks."""

    model: str


class Inspected(Message):
    """Counters since the spawn, and bytes of the device. Peaks are those since the last `Inspect`."""

    values: dict[str, float]


class OptimStep(Message):
    """Divide by the step's denominator, clip, update, clear."""

    model: str
    lr: float
    weight_decay: float
    max_grad_norm: float
    skip_nan: bool
    normalise: str = "mean"
    """"mean" divides by the denominator (one unit per step); "sum" does not divide."""
    denominator: float = 1.0
    """The total over all replicas, counted by the driver."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


class StepMetrics(Message):
    """Numbers of one optimizer step."""

    values: dict[str, float]


class AbandonStep(Message):
    """Clear a model's accumulated gradients on every rank."""

    model: str


class Save(Message):
    """Write a model's weights (or its adapter) and, unless `inference_only`, its optimizer state, into a directory."""

    model: str
    directory: str
    inference_only: bool
    base: str = ""
    """The base named in a saved adapter: a path, or a hub id with `base_revision`, its commit."""
    base_revision: str = ""


class Load(Message):
    """Load stored weights (and optimizer state, if stored) into a live model."""

    model: str
    source: ModelSource


class SetStep(Message):
    """Set the optimizer's step counter."""

    model: str
    step: int


class Dealloc(Message):
    """Free a model."""

    model: str


class Regroup(Message):
    """Regroup ranks into domains of `size`. The driver sends it only while no replica request is in flight."""

    size: int


class Shutdown(Message):
    """End normally."""


class Sampling(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """Sampling settings."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 2048
    min_tokens: int = 0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    constraint: Constraint | None = None
    """What the completion must match. It ends, whatever `min_tokens` says, where nothing else may follow."""


class Generate(Message):
    """One prompt, one completion."""

    model: str
    replica: int
    tokens: bytes
    sampling: Sampling


class Generated(Message):
    """Tokens with their records; all lists are as long as `tokens`. A drawn stop token is included."""

    tokens: bytes
    logprobs: bytes
    """Log-probs under the raw distribution (temperature 1), float32."""
    sampled_logprobs: bytes
    """Log-probs under the distribution that was sampled from, float32."""
    versions: bytes
    """Policy version (optimizer steps seen by the weights) of each token, int32."""
    finish_reason: str
    """"stop" or "length"."""
    seconds_to_first: float
    seconds: float
    seconds_to_pages: float = 0.0
    """How long the request waited for pages."""
    masked_logprobs: bytes = b""
    """Of a constrained completion: log-probs at temperature 1 over the allowed tokens, before other filters, float32;
    empty without a constraint."""


class Cancel(Message):
    """Withdraw a `Generate` by its call id. This message is not answered."""

    call: int


class Score(Message):
    """Raw log-probs of `targets`, each given the tokens up to its position. Negative targets are not scored.

    For a model with a scalar head: the values at these positions, for any target. allowed, masks: as in `MicroBatch`.
    """

    model: str
    replica: int
    tokens: bytes
    targets: bytes
    embed: bool = False
    """Answer with the hidden state of the last token instead."""
    allowed: bytes = b""
    masks: bytes = b""


class Scored(Message):
    """float32, one for each target; for an `embed`, one for each dimension."""

    logprobs: bytes


class CustomLoss(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """A loss of the recipe: a function at the top level of the recipe's file, which ranks import by its name."""

    path: str
    sha256: str
    function: str


class MicroBatch(Message):
    """Samples back to back, at most `max_batch_tokens` tokens, and the loss that they contribute to.

    tokens, targets: int32; coefficients: float64; lengths: int32, one for each sample. Positions with coefficient 0
    are not scored. The loss "linear" is -sum(coefficient * logprob(target)): a coefficient is a token's weight
    (language modelling) or its tangent. Every other loss is a function of all scored tokens, with the coefficients as
    their weights.
    sampler_logprobs: float32, or empty: the sampler's log-prob of each target under the present weights (raw
    distribution), for comparison; NaN where it is missing.
    loss: a name in the ranks' table of losses, or "custom". settings: its hyper-parameters. fields: float64, one for
    each scored position, in order. group: the number of adjacent samples that belong together, 2 for pairs.
    parts: int32, or empty: for one group whose samples do not fit together, the numbers of samples to pass through the
    model at once; each part has at most `max_batch_tokens`. dropout: whether an adapter's dropout is on.
    allowed: int32, or empty: for each target 0, or 1 + the number of the mask of the tokens that its log-prob is
    renormalised over. masks: back to back, each the vocabulary's bits in int32 words (bit i of word w: token 32 w + i).
    """

    model: str
    replica: int
    tokens: bytes
    targets: bytes
    coefficients: bytes
    lengths: bytes
    sampler_logprobs: bytes = b""
    loss: str = "linear"
    custom: CustomLoss | None = None
    settings: dict[str, float] = {}
    fields: dict[str, bytes] = {}
    group: int = 1
    parts: bytes = b""
    dropout: bool = True
    allowed: bytes = b""
    masks: bytes = b""


class MicroBatchDone(Message):
    """The result of the forward and backward passes; each pass takes the tokens of one part."""

    numerator: float
    """The sum of the loss."""
    tokens: list[int]
    samples: int
    seconds: float
