"""Models, datasets and graders in a configuration."""

from harmony_client.parameters import *
