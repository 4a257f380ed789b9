"""The format of an external model's key: `openai://MODEL` or `anthropic://MODEL`, and `?base_url=URL`."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Self
from urllib.parse import parse_qsl, urlsplit

from harmony_core.errors import ResourceError, UsageError

HOSTS = {"openai": "https://api.openai.com/v1", "anthropic": "https://api.anthropic.com"}
"""The providers, each named as its SDK, its extra and (in capitals) its variables, with its own server."""


@dataclass(frozen=True)
class Address:
    """An external model's key and its parts. `base_url` is "" unless the key names another server."""

    key: str
    provider: str
    model: str
    base_url: str

    @classmethod
    def parse(cls, key: str) -> Self | None:
        """None for a key of the registry. Raises UsageError, which shows nothing of what follows the model's name."""
        scheme, found, rest = key.partition("://")
        if not found or scheme == "model_registry":
            return None
        model, _, query = rest.partition("?")
        given = dict(parse_qsl(query, keep_blank_values=True))
        url = urlsplit(given.pop("base_url", ""))
        wrong = ""
        if scheme not in HOSTS:
            wrong = f"{scheme}:// is not a provider of models"
        elif "api_key" in given:
            wrong = f"its key is taken from the variable {scheme.upper()}_API_KEY only, not from api_key="
        elif given or not model:
            wrong = f"it cannot have {' and '.join(given)}" if given else "the model's name is missing"
        elif any(url) and (url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc):
            wrong = "base_url must be http:// or https:// and a host, without a password"
        if wrong:
            hint = "openai://MODEL, anthropic://MODEL, or openai://MODEL?base_url=URL for OpenAI's protocol elsewhere"
            raise UsageError(f"'{scheme}://{model}': {wrong}", hint=hint)
        return cls(key, scheme, model, url.geturl())

    @property
    def secret(self) -> str:
        """The provider's key, "" if its variable is not set."""
        return os.environ.get(f"{self.provider.upper()}_API_KEY", "")

    @property
    def server(self) -> str:
        """Where requests go: to the server in the key, else in the environment, else the provider's own."""
        return self.base_url or os.environ.get(f"{self.provider.upper()}_BASE_URL") or HOSTS[self.provider]

    def check(self) -> None:
        """Raise ResourceError without the SDK, or without a key for the provider's own server."""
        if importlib.util.find_spec(self.provider) is None:
            hint = f"pip install 'harmony-core[{self.provider}]'"
            raise ResourceError(f"{self.key} needs the package {self.provider}, which is not installed", hint=hint)
        if self.server == HOSTS[self.provider] and not self.secret:
            raise ResourceError(f"{self.key} needs a key: {self.provider.upper()}_API_KEY is not set")
