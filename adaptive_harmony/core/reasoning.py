"""Thoughts in completions."""

from harmony_core.structured_output import remove_reasoning as remove_reasoning
