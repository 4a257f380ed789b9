"""A stage without samples."""

from harmony_client.runtime.simple_notifier import *
