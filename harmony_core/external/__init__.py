"""Models of external providers, which take and give text: their keys and messages, and calls by their SDKs."""
