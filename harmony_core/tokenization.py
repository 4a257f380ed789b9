"""`harmony_core.tokenization.growth`, the path under which the documentation names it."""

from harmony_core.text.tokenization import growth as growth
