"""Packages that only some loggers need."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

from harmony_core.errors import ResourceError


def is_installed(package: str) -> bool:
    """Whether the package can be imported; it is not. A folder of its name, such as a service's logs, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def how_to_install(package: str) -> str:
    """The command that brings the extra of the package's name."""
    return f'pip install "harmony-core[{package}]"'


def required(package: str, user: str) -> Any:
    """The package's module. Raises ResourceError that names the extra."""
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ResourceError(
            f"{user} needs the package {package}, which is not installed ({error})", hint=how_to_install(package)
        ) from error
    if isinstance(module, ModuleType) and module.__file__ is None:
        found = ", ".join(module.__path__)
        raise ResourceError(
            f"{user} needs the package {package}, and there is only a folder of that name: {found}",
            hint=how_to_install(package),
        )
    return module
