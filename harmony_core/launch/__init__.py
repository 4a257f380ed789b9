"""Starts the ranks, watches them, and ends them."""
