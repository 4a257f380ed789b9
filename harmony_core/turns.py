"""What text and token conversations have in common: turns of fragments, each with a training weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic, Self, TypeVar

from harmony_core.fragments import AnyFragment, Fragment, text_of


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn: role, fragments, and the weight of each of its tokens."""

    role: str
    fragments: tuple[AnyFragment, ...]
    weight: float

    @property
    def text(self) -> str:
        """Text fragments joined."""
        return text_of(self.fragments)


TurnT = TypeVar("TurnT", bound=Turn)


class Conversation(Generic[TurnT]):
    """Turns, metadata and an identifier; it never changes, save for its `metadata`."""

    __slots__ = ("__weakref__", "_turns", "_uuid", "metadata")

    _turns: tuple[TurnT, ...]
    _uuid: str | None
    metadata: Any

    def get_fragments(self) -> list[tuple[str, list[Fragment]]]:
        """Role and fragments of every turn."""
        return [(turn.role, [fragment.public() for fragment in turn.fragments]) for turn in self._turns]

    def get_turn_weights(self) -> list[float]:
        """The weight of every turn."""
        return [turn.weight for turn in self._turns]

    def uuid(self) -> str | None:
        """The identifier it was stored with, if any."""
        return self._uuid

    def with_weight_all_assistant_turns(self) -> Self:
        """A copy that trains every assistant turn. Raises TokenizationError if one's tokens are not known."""
        return self._weighted(lambda index, count: True)

    def with_weight_last_assistant_turn(self) -> Self:
        """A copy that trains the last assistant turn. Raises TokenizationError if its tokens are not known."""
        return self._weighted(lambda index, count: index == count - 1)

    def with_weight_assistant_turns_from_index(self, start_index: int) -> Self:
        """A copy that trains assistant turns from the given one on, counted from 0. Raises TokenizationError."""
        if start_index < 0:
            raise OverflowError(f"start_index must be 0 or more, not {start_index}")
        return self._weighted(lambda index, count: index >= start_index)

    def _weighted(self, chosen: Callable[[int, int], bool]) -> Self:
        """Weight 1 for assistant turns for which `chosen(index among them, their count)`, else 0."""
        count, seen, turns = [turn.role for turn in self._turns].count("assistant"), 0, []
        for turn in self._turns:
            is_assistant = turn.role == "assistant"
            turns.append(replace(turn, weight=float(is_assistant and chosen(seen, count))))
            seen += is_assistant
        return self._with_turns(tuple(turns))

    def _with_turns(self, turns: tuple[TurnT, ...]) -> Self:
        raise NotImplementedError

    def _shown(self, title: str, describe: Callable[[TurnT], str]) -> str:
        """The thread's repr."""
        lines = [f"{title} ({len(self._turns)} turns, * trained)"]
        for turn in self._turns:
            scale = "" if turn.weight in (0.0, 1.0) else f" ×{turn.weight:g}"
            line = f"{'*' if turn.weight else ' '} [{turn.role}{scale}] {describe(turn)}"
            lines.append(line.replace("\n", "\n    "))
        if self.metadata is not None:
            lines.append(f"  metadata: {self.metadata!r}")
        return "\n".join(lines)
