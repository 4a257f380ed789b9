"""Progress of a job."""

from harmony_core.notifiers import (
    JobNotifier as JobNotifier,
    PendingArtifact as PendingArtifact,
    StageNotifier as StageNotifier,
    StdoutJobNotifier as StdoutJobNotifier,
    StdoutStageNotifier as StdoutStageNotifier,
)
from harmony_core.recipe.platform import (
    ControlPlaneJobNotifier as ControlPlaneJobNotifier,
    ControlPlaneStageNotifier as ControlPlaneStageNotifier,
)
