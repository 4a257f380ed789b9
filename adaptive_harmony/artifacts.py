"""What a run leaves."""

from harmony_client.artifacts import *
