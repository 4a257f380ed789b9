"""The documented path of `growth`."""

from harmony_core.text.row_lengths import growth as growth
