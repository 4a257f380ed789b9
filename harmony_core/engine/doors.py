"""Who may connect to the ports over which ranks find each other: nobody, once they have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from harmony_core.errors import EngineError
from harmony_core.rpc import platform


@contextmanager
def closing_doors() -> Iterator[None]:
    """For making gloo groups: each listens, for anyone, until it is freed. Once it is complete, nothing gets in.

    Raises EngineError if another user was there before.
    """
    before = platform.listening_sockets()
    yield
    for descriptor in platform.listening_sockets() - before:
        platform.drop_connections(descriptor)
    if strangers := platform.foreign_peers():
        raise EngineError(
            f"user {strangers[0]} has connected to a port over which the ranks find each other",
            hint="start the run again, out of that user's reach: in a network namespace of its own",
        )
