"""The documented import paths of the native client. Every name comes from `harmony_core`."""

from harmony_client import artifacts as artifacts, parameters as parameters, runtime as runtime
from harmony_client.harmony_client import *
