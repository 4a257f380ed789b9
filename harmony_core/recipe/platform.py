"""What recipes of the platform name besides (documented path `harmony_client`): records, and its control plane.

There is no control plane here: constructing something that speaks to one raises UsageError.
"""

from __future__ import annotations

import math
import os
import time
import uuid
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, TypeVar

from pydantic import BaseModel

from harmony_core.client import ModelBuilder
from harmony_core.errors import UsageError
from harmony_core.recipe import InputConfig

DEFAULT_MAX_DRAFT_STEPS = 1024
"""Most tokens that a draft model would draw at once; there are no draft models here."""


def uuid_v7() -> str:
    """A random identifier that sorts by the millisecond in which it was made (RFC 9562, section 5.7)."""
    number = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    number = number & ~(0xF << 76 | 0x3 << 62) | 0x7 << 76 | 0x2 << 62
    return str(uuid.UUID(int=number))


IN = TypeVar("IN", bound=InputConfig)
MetadataType = TypeVar("MetadataType", bound=BaseModel)

spawn_inference = ModelBuilder.spawn_inference
spawn_train = ModelBuilder.spawn_train


class utils:
    """Where the native module keeps `uuid_v7`."""

    uuid_v7 = staticmethod(uuid_v7)


def _not_here(name: str, instead: str) -> type:
    """A class that cannot be constructed."""

    def refuse(self: object, *args: Any, **kwargs: Any) -> None:
        raise UsageError(f"{name} is not here: there is no control plane", hint=instead)

    return type(name, (), {"__init__": refuse, "__doc__": f"Raises UsageError. Instead: {instead}."})


ControlPlaneClient = _not_here(
    "ControlPlaneClient", "Model.to_builder and Dataset.load read the local registry (adaptive models list) and files"
)
ControlPlaneJobNotifier = _not_here("ControlPlaneJobNotifier", "StdoutJobNotifier; in a run ctx.job")
ControlPlaneStageNotifier = _not_here("ControlPlaneStageNotifier", "ctx.job.stage_notifier(name)")
ResponseAccumulator = _not_here("ResponseAccumulator", "RewardClient.score reads whole answers")
read_task = _not_here("read_task", "RewardClient.score reads whole answers")
main = _not_here("main", "await RewardClient(base_url).score(request)")


@dataclass(frozen=True)
class ModelConfigResponse:
    """A model's settings as the platform answers them; here `adaptive models show` and `models set` do this."""

    model_id: str
    model_key: str
    harmony_url: str
    tp: int | None = None
    kv_cache_len: int | None = None
    max_seq_len: int | None = None
    extra_params: str | None = None


@dataclass(frozen=True)
class DatasetConfigResponse:
    """A dataset's record as the platform answers it."""

    dataset_id: str
    dataset_key: str
    name: str
    file_path: str
    kind: str


class CheckpointArtifactMetadata(BaseModel, protected_namespaces=()):
    """What a checkpoint says of itself; `completion_percentage` from 0 to 100."""

    step: int
    completion_percentage: float
    model_checkpoint_names: dict[str, str] = {}
    user_data: dict[str, Any] | None = None


@dataclass(frozen=True)
class InferenceSettings:
    """Limits of a model that generates, in tokens."""

    kv_cache_len: int
    tokens_to_generate: int

    def to_python_dict(self) -> dict[str, Any]:
        """The limits by name."""
        return asdict(self)


@dataclass(frozen=True)
class StatDuration:
    """Tokens of a stretch of time, in seconds."""

    duration_sec: float
    num_input_tokens: int
    num_output_tokens: int
    num_trained_tokens: int

    num_input_tokens_per_s = property(lambda self: self.num_input_tokens / (self.duration_sec or math.inf))
    num_output_tokens_per_s = property(lambda self: self.num_output_tokens / (self.duration_sec or math.inf))
    num_trained_tokens_per_s = property(lambda self: self.num_trained_tokens / (self.duration_sec or math.inf))

    def combine(self, other: StatDuration) -> StatDuration:
        """Both stretches together."""
        return StatDuration(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class StatInstant(StatDuration):
    """Tokens counted up to an instant, `duration_sec` after the count began."""

    def stats_since(self, other: StatInstant) -> StatDuration:
        """What was counted after `other`."""
        return StatDuration(*(a - b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


class Thread(Enum):
    """The forms of a conversation."""

    StringThread = "text"
    TokenizedThread = "tokens"
    SerializedThread = "token ids, image patches and weights"
