"""A stage without samples."""

from harmony_core.notifiers import SimpleProgressNotifier as SimpleProgressNotifier
