"""The configuration."""

from harmony_client.runtime.data import *
