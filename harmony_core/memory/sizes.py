"""Sizes at which the engine works, from which the memory plan computes what that takes, and times. Plain numbers."""

from __future__ import annotations

PAGE_SIZE = 16
"""Tokens in a page of the KV cache."""
MAX_RUNNING = 256
"""Most sequences that hold pages at once, and so most in one decode step."""
LOGITS_AT_ONCE = 8 << 20
"""Elements of the logits that are sampled from at once."""
DECODE_SPLIT = 256
"""Tokens of a context that one work item of a decode step covers; a multiple of every page size."""
PAGE_SHARING = 8
"""How often each page of the pool may count in one decode step; beyond that it runs without the static tensors."""
HEAD_HOST_BYTES = 64 << 20
"""Logits of one tile of the head in plain torch."""
HEAD_DEVICE_BYTES = 1 << 30
"""On CUDA: the float32 logits of one tile of the head, and the gradients of `HEAD_TILES` tiles."""
HEAD_TILES = 4
"""Tiles whose gradients are multiplied at once on CUDA: each product reads and writes all of the head's gradient."""
PADDING_SHARE = 0.2
"""Padded tokens allowed in a group of sequences of like length, as a share of its real ones."""
MAX_SECONDS = 3650 * 86400
LEAST_SECONDS = {"hang_timeout": 0.0, "silence_timeout": 2.0, "fault_grace": 0.0, "save_wait": 0.0}
"""The bounds of the times that a run's author may set."""
