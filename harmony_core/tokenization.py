"""The documented path of `growth`."""

from harmony_core.text.tokenization import growth as growth
