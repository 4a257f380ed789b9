"""Triton kernels of the engine. Its modules are imported only where a CUDA device computes, and by their own tests."""

DECODE_SPLIT = 256
"""Tokens of a context that one work item of a decode step covers; a multiple of every page size."""
