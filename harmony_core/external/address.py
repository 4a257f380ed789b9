"""The format of an external model's key: `openai://MODEL` or `anthropic://MODEL`, and `?base_url=URL`."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Self
from urllib.parse import parse_qsl, quote, urlsplit

from harmony_core.errors import ResourceError, UsageError

HOSTS = {"openai": "https://api.openai.com/v1", "anthropic": "https://api.anthropic.com"}
"""The providers, each named as its SDK, its extra and (in capitals) its variables, with its own address."""


@dataclass(frozen=True)
class Address:
    """An external model's key. `base_url` is "" unless the key names another server of the provider's protocol."""

    provider: str
    model: str
    base_url: str

    @classmethod
    def parse(cls, key: str) -> Self | None:
        """The parts of a key; None for a key of the registry. Raises UsageError, never showing the key's settings."""
        scheme, found, rest = key.partition("://")
        if not found or scheme == "model_registry":
            return None
        shown = f"'{scheme}://{rest.partition('?')[0]}'"
        if scheme not in HOSTS:
            hint = f"{' and '.join(HOSTS)} are; for a server with OpenAI's protocol: openai://MODEL?base_url=URL"
            raise UsageError(f"{shown}: {scheme}:// is not a provider of models", hint=hint)
        model, _, query = rest.partition("?")
        settings = dict(parse_qsl(query, keep_blank_values=True))
        if "api_key" in settings:
            variable = cls(scheme, model, "").key_variable
            raise UsageError(f"{shown}: a key must not be written with api_key=", hint=f"set the variable {variable}")
        url = urlsplit(settings.pop("base_url", ""))
        if settings or not model:
            wrong = f"it has {' and '.join(settings)}" if settings else "the model's name is missing"
            raise UsageError(f"{shown}: {wrong}", hint=f"{scheme}://MODEL or {scheme}://MODEL?base_url=URL")
        if any(url) and (url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc):
            raise UsageError(f"{shown}: base_url must be http:// or https:// and a host, without a password")
        return cls(scheme, model, url.geturl())

    def __str__(self) -> str:
        tail = f"?base_url={quote(self.base_url, safe=':/')}" if self.base_url else ""
        return f"{self.provider}://{self.model}{tail}"

    @property
    def key_variable(self) -> str:
        """The environment variable that holds the provider's key: the only place from which it is taken."""
        return f"{self.provider.upper()}_API_KEY"

    @property
    def server(self) -> str:
        """The address to send requests to: the key's own, else the environment's, else the provider's."""
        return self.base_url or os.environ.get(f"{self.provider.upper()}_BASE_URL") or HOSTS[self.provider]

    def check(self) -> None:
        """Raise ResourceError if the SDK is not installed, or the variable with the provider's key is not set."""
        if importlib.util.find_spec(self.provider) is None:
            hint = f"pip install 'harmony-core[{self.provider}]'"
            raise ResourceError(f"{self} needs the package {self.provider}, which is not installed", hint=hint)
        if self.server == HOSTS[self.provider] and not os.environ.get(self.key_variable):
            raise ResourceError(f"{self} needs a key: {self.key_variable} is not set", hint="set it before the run")
