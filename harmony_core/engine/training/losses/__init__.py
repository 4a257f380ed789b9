"""Losses as functions of the log-probs of scored tokens, or of the values that a scalar head gives them."""
