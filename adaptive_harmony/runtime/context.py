"""The context."""

from harmony_client.runtime.context import *
