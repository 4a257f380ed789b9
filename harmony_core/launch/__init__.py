"""Starts the ranks, watches them, and ends what is left of them."""
