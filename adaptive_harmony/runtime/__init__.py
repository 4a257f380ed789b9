"""What a recipe is given, and its job."""

from harmony_client.runtime import *
