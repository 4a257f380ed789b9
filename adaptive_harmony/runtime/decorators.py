"""The mark of the main function."""

from harmony_client.runtime.decorators import *
