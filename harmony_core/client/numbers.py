"""Whole numbers that users give: a float of one would not be read on the ranks, and end the run there."""

from __future__ import annotations

import operator

from harmony_core.errors import UsageError


def whole(name: str, value: int, least: int) -> int:
    """`value` as an int. Raises UsageError naming the argument unless it is whole and at least `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise UsageError(f"{name} must be a whole number, not {value!r}") from None
    if number < least:
        raise UsageError(f"{name} must be at least {least}, not {value}")
    return number
