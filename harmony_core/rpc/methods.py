"""The closed table of methods: which requests go to every rank, which to one replica, and what answers each."""

from __future__ import annotations

from harmony_core.rpc.protocol import (
    AbandonStep,
    Cancel,
    Clone,
    Dealloc,
    Generate,
    Generated,
    Inspect,
    Inspected,
    Load,
    MakePool,
    Message,
    MicroBatch,
    MicroBatchDone,
    Nothing,
    OptimStep,
    Regroup,
    Save,
    Score,
    Scored,
    SetStep,
    Shutdown,
    Spawn,
    StepMetrics,
)

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
"""Requests that every rank executes in the same order, with the type of each answer."""

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
