"""Packed micro-batches, losses, the optimizer and the trainer of one rank."""
