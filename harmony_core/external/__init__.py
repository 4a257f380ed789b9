"""Models of external providers, which take and give text: their keys, their messages, and the calls of their SDKs."""

from harmony_core.external.address import Address
from harmony_core.external.endpoint import REQUEST, Endpoint

__all__ = ["REQUEST", "Address", "Endpoint"]
