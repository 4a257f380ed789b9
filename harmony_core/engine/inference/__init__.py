"""Continuous batching over a paged KV cache, and sampling."""
