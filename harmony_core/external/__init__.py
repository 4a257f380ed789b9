"""Models of external providers, which take and give text: their keys, their messages, and calls through their SDKs."""
