"""Training classes: what to learn and from what. No tensors here."""
