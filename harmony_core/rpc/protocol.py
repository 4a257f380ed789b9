"""The requests that a rank takes from the driver: a closed table of typed messages, plain data only.

A *global* request goes to every leader with a number that the driver counts up over the run; leaders execute them in
that order. A *replica* request goes to the leader of one replica's domain. Token ids travel as int32, values as float32
or float64 bytes in the machine's order (`rpc.wire` packs them).
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import structs

from harmony_core.model.spec import ModelSpec

PROTOCOL_VERSION = 1
_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class Message(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Base of everything that crosses the wire."""


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
    """Sent by a rank's own thread every second: what the engine thread does, and for how long without progress."""

    phase: str
    seconds: float
    step: int


class Event(Message):
    """A line for `events.jsonl`."""

    type: str
    data: dict[str, Any]


class Nothing(Message):
    """The result of a request that only succeeds."""


class LoraSettings(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """A new adapter. `targets` are leaf names of linear modules."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    seed: int = 0


Ranges = tuple[tuple[int, int], ...]
"""Ranges of ids: the first, and the one behind the last."""


class ModelSource(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """Where a model's bytes are. Paths are absolute.

    `weights` is a directory with config.json and safetensors; `adapter` one with adapter_config.json, or "" for none.
    Spawns with equal `digest` (of the base weights) and tp share them.
    """

    weights: str
    digest: str
    adapter: str = ""


class Spawn(Message, frozen=True):  # type: ignore[misc]  # msgspec takes a frozen one beside others
    """One spawn: made by its builder, completed by the plan, executed by the ranks, kept while the model lives."""

    spec: ModelSpec
    """The model on paper."""
    name: str = ""
    ref: str = ""
    """The exact reference of its version in the registry."""
    source: ModelSource = ModelSource(weights="", digest="")
    device: str = "cpu"
    dtype: str = ""  # float32 on CPU, bfloat16 on CUDA
    tp: int = 1
    train: bool = False
    private: bool = False
    """Whether its base weights are its own, as full training needs, and so may change in place."""
    weights_shared: bool = False
    """Whether the ranks held its base weights already when it was planned."""
    lora: LoraSettings | None = None
    """Of the adapter that the source holds, or else of a new one; None for full weights."""
    scalar: bool = False
    """With a scalar head: it scores and does not generate. A new head where neither adapter nor weights have one."""
    max_batch_tokens: int = 0
    """Most tokens in one micro-batch (training), or in one scoring or prefill batch."""
    kv_cache_len: int | None = None
    """Tokens of the page pool that were asked for; None leaves the size to the plan."""
    kv_tokens: int = 0
    """Tokens in the page pool of each replica."""
    max_seqlen: int | None = None
    """Most tokens of a sequence, prompt and completion together; None for the model's context."""
    tokens_to_generate: int = 2048
    """Most new tokens of one request."""
    tokenless: Ranges = ()
    """Ids that no token has: they are never drawn."""
    checkpointed_layers: int = 0
    """How many layers recompute their activations in the backward pass."""
    compile: bool = False
    rehearse: bool = False
    """A full rehearsal: worst-case micro-batch, all pages. Else a short one."""
    seed: int = 0
    """Of everything random in its training, such as adapter dropout."""
    promised_bytes: int = 0
    copied_from: str = ""
    """The live model of which it is a frozen copy."""

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return _DTYPE_BYTES[self.dtype or ("bfloat16" if self.device == "cuda" else "float32")]

    @property
    def accumulate(self) -> int:
        """Bytes of a gradient or a moment: float32 at least."""
        return max(4, self.element)

    @property
    def generates(self) -> bool:
        """Whether it has pages."""
        return self.kv_tokens > 0 and not self.scalar

    @property
    def shared_key(self) -> str:
        """Equal for spawns whose base weights could be shared."""
        return f"{self.source.digest}/{self.tp}/{self.dtype}"

    @property
    def weights_key(self) -> str:
        """`shared_key` where its weights are shared, else ""."""
        return "" if self.private else self.shared_key

    @property
    def headless(self) -> bool:
        """Whether its weights have a scalar head in place of the vocabulary's."""
        return self.spec.scalar or (self.scalar and self.private)

    def copied(self, name: str, kv_tokens: int = 0) -> Spawn:
        """A frozen copy; beside an adapter it shares the base weights. Without pages it scores only."""
        changed = {"train": False, "checkpointed_layers": 0, "weights_shared": self.lora is not None}
        return structs.replace(self, name=name, copied_from=self.name, kv_tokens=kv_tokens, **changed)


class Clone(Message):
    """A frozen copy of a live model's trained state under a new name. It has no page pool: it scores only."""

    source: str
    name: str


class MakePool(Message):
    """Give a model without a page pool one of `kv_tokens` tokens on each replica: from now on it generates."""

    model: str
    kv_tokens: int


class Inspect(Message):
    """Ask for a model's counters and the memory of its ranks."""

    model: str


class Inspected(Message):
    """Counters since the spawn, and bytes of the device; peaks are those since the last `Inspect`."""

    values: dict[str, float]


class OptimStep(Message):
    """Divide by the step's denominator, clip, update, clear."""

    model: str
    lr: float
    weight_decay: float
    max_grad_norm: float
    skip_nan: bool
    normalise: str = "mean"
    """"mean" divides by the denominator (one unit per step); "sum" divides by nothing."""
    denominator: float = 1.0
    """Over all replicas, counted by the driver."""
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
    """The base that a saved adapter names: a path, or a hub id with `base_revision`, its commit."""
    base_revision: str = ""


class Load(Message):
    """Put stored weights (and optimizer state where there is one) into a live model."""

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
    """Leave in good order."""


class Sampling(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """How to draw tokens."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 2048
    min_tokens: int = 0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()


class Generate(Message):
    """One prompt, one completion."""

    model: str
    replica: int
    tokens: bytes
    sampling: Sampling


class Generated(Message):
    """Tokens with their records; all lists are as long as `tokens`. The stop token is included when one was drawn."""

    tokens: bytes
    logprobs: bytes
    """Raw distribution (temperature 1), float32."""
    sampled_logprobs: bytes
    """The distribution that was drawn from, float32."""
    versions: bytes
    """Policy version (optimizer steps seen by the weights) of each token, int32."""
    finish_reason: str
    """"stop" or "length"."""
    seconds_to_first: float
    seconds: float


class Cancel(Message):
    """Withdraw a `Generate` by its call id. One way: no answer."""

    call: int


class Score(Message):
    """Raw log-probs of `targets`, position by position, given the tokens up to there; negative ones are not asked for.

    Of a model with a scalar head: the values there, for any target.
    """

    model: str
    replica: int
    tokens: bytes
    targets: bytes


class Scored(Message):
    """float32, one for each target."""

    logprobs: bytes


class CustomLoss(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """A loss of the recipe's own: a function at the top level of the recipe's file, which ranks import by its name."""

    path: str
    sha256: str
    function: str


class MicroBatch(Message):
    """Samples back to back, at most `max_batch_tokens` tokens, and the loss that they contribute to.

    tokens, targets: int32; coefficients: float64; lengths: int32, one for each sample. Positions with coefficient 0
    are not scored. The loss "linear" is -sum(coefficient * logprob(target)): a coefficient is a token's weight
    (language modelling) or its tangent. Every other loss is a function of all scored tokens, in which a coefficient
    is the weight of its token.
    sampler_logprobs: float32, or empty: the sampler's record of each target under the present weights (raw
    distribution), to be compared with; NaN where there is none.
    loss: a name in the ranks' table of losses, or "custom". settings: its hyper-parameters. fields: float64, one for
    each scored position, in order. group: so many adjacent samples belong together, 2 for pairs.
    parts: int32, or empty: one group whose samples do not fit together, and how many of them go through the model at
    once; each part has at most `max_batch_tokens`. dropout: whether an adapter's is on.
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


class MicroBatchDone(Message):
    """The result of the forward and backward passes, of which one has the tokens of a part."""

    numerator: float
    """The loss, summed."""
    tokens: list[int]
    samples: int
    seconds: float


GLOBAL: dict[type[Message], type[Message]] = {
    Spawn: Nothing,
    Clone: Nothing,
    MakePool: Nothing,
    OptimStep: StepMetrics,
    AbandonStep: Nothing,
    Save: Nothing,
    Load: Nothing,
    SetStep: Nothing,
    Inspect: Inspected,
    Dealloc: Nothing,
    Regroup: Nothing,
    Shutdown: Nothing,
}
"""Requests that every rank executes in one order, with the type of each answer."""

REPLICA: dict[type[Message], type[Message]] = {
    Generate: Generated,
    Score: Scored,
    MicroBatch: MicroBatchDone,
    Cancel: Nothing,
}
"""Requests to one replica."""

METHODS: dict[str, tuple[type[Message], type[Message]]] = {
    request.__name__: (request, answer) for request, answer in (GLOBAL | REPLICA).items()
}
"""The closed table of methods: name -> (request type, answer type)."""
