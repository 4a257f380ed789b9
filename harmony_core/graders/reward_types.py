"""The requests and replies of a reward server, a format of its own: JSON over HTTP."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat

SCORE_PATH = "/score"
BATCH_PATH = "/batch_score"
INFO_PATH = "/info"
METADATA_SCHEMA_PATH = "/metadata_schema"

MAX_BODY = 16 * 2**20
"""Bytes of a request or a reply."""
MAX_BATCH = 64
"""Requests sent at once."""


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Turn(_Message):
    """One turn of the conversation."""

    role: str
    content: str


class Request(_Message):
    """A conversation to score."""

    turns: list[Turn]
    metadata: dict[str, Any] | None = None
    id: int | None = None


class Response(_Message):
    """A score; `metadata["reason"]` is the server's reason, if it gives one."""

    reward: FiniteFloat
    metadata: dict[str, Any] = {}
    id: int | None = None


class Failure(_Message):
    """In the place of a Response: the grader failed on the sample, or ignores it."""

    error: str
    ignored: bool = False
    id: int | None = None


class ServerInfo(_Message):
    """What a server says of itself."""

    version: str
    name: str
    description: str


class MetadataValidationResponse(_Message):
    """Whether metadata have what the server needs."""

    is_valid: bool
    error_message: str | None = None
