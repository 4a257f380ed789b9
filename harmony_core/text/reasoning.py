"""Completions without a model's reasoning; behind the documented path `core.reasoning`."""

from __future__ import annotations

_OPEN, _CLOSE = "<think>", "</think>"


def remove_reasoning(completion: str) -> str:
    """The completion without its first `<think>...</think>`, or without all before a `</think>` that none opens.

    Some templates open the reasoning in the prompt, so that a completion has only its end. Reasoning that never ends
    is the whole rest of the completion.
    """
    before, opened, rest = completion.partition(_OPEN)
    if _CLOSE in before or not opened:
        return completion.partition(_CLOSE)[2] if _CLOSE in completion else completion
    return before + rest.partition(_CLOSE)[2]
