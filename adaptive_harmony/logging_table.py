"""Tables as metrics."""

from harmony_client.logging_table import *
