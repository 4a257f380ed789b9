"""Thoughts in completions."""

from harmony_core.text.reasoning import remove_reasoning as remove_reasoning
