"""Triton kernels, imported only where a CUDA device computes, and by their own tests."""
