"""Progress of a job, told here."""

from harmony_core.notifiers import StdoutJobNotifier as StdoutJobNotifier, StdoutStageNotifier as StdoutStageNotifier
