"""Progress of a run, for people and programs: a job has stages, a stage has samples done out of a total.

A notifier writes to stderr, since stdout is the recipe's own. The command line gives it a `sink` that draws a bar, and
the run's event writer. `StdoutJobNotifier` is the documented name of `JobNotifier`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

if TYPE_CHECKING:
    from harmony_core.artifacts import BaseArtifact
    from harmony_core.runs.resuming import RunCheckpoints

logger = logging.getLogger(__name__)

ProgressSink = Callable[[str, int, int], None]
"""Called with the stage's name, samples done, and total samples."""

PROGRESS_SECONDS = 30.0
"""Seconds between two progress lines of a stage."""


class EventWriter(Protocol):
    """Appends one line to a run's `events.jsonl`."""

    def __call__(self, type: str, data: dict[str, Any], /) -> None:
        """Write one event."""


class PendingArtifact(NamedTuple):
    """An artifact that is finalised when the job ends, and its file until then."""

    artifact: BaseArtifact
    file_path: str


_silent: ContextVar[bool] = ContextVar("silent", default=False)


@contextmanager
def silenced(silent: bool = True) -> Iterator[None]:
    """Silence `say` inside the block, and in tasks and threads begun in it."""
    token = _silent.set(silent)
    try:
        yield
    finally:
        _silent.reset(token)


def say(text: str, error: bool = False) -> None:
    """Write one line for people to stderr. An error is written even if `say` is silenced."""
    if _silent.get() and not error:
        return
    # Looked up for each line, because a progress bar or a test may have replaced the stream.
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


class PlainProgress:
    """A sink that writes plain lines to stderr when a stage begins and ends, and at intervals in between."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Write the line, unless the last one is too recent."""
        now = time.monotonic()
        if stage in self._last and done < total and now - self._last[stage] < PROGRESS_SECONDS:
            return
        self._last[stage] = now
        say(f"{stage}: {done}/{total}")


class StageNotifier:
    """Reports progress of one stage of a job."""

    job_notifier: JobNotifier
    stage_name: str
    monitoring_link: str | None = None

    def __init__(self, notifier: JobNotifier, stage: str) -> None:
        self.job_notifier = notifier
        self.stage_name = stage

    def set_monitoring_link(self, monitoring_link: str) -> None:
        """Set the link for watching this stage; it overrides the job's link."""
        self.monitoring_link = monitoring_link

    def report_progress(
        self,
        tot_num_samples: int | None = None,
        processed_num_samples: int | None = None,
        monitoring_link: str | None = None,
        checkpoints: Sequence[str] | None = None,
    ) -> None:
        """Report total samples and samples done; more than the total is reported as the total, with a warning."""
        done, total = processed_num_samples, tot_num_samples
        if total is not None and done is not None and done > total:
            logger.warning("%s: %d samples of %d done", self.stage_name, done, total)
            done = total
        link = monitoring_link or self.monitoring_link or self.job_notifier.monitoring_link
        self.job_notifier.report_progress(self.stage_name, total, done, link, checkpoints)


class JobNotifier:
    """Reports the progress of a job, to people through a sink and to `events.jsonl` in a run.

    A context manager that closes. Keeps no state outside itself.
    """

    checkpoints: RunCheckpoints | None = None
    """The checkpoints that the job's training classes save and continue from; None disables saving."""
    directory: Path | None = None
    """The run's directory."""
    artifacts_dir: Path | None = None
    """Where the job's artifacts go; None: it has no run, and keeps none."""

    def __init__(
        self, job_id: str = "local", *, sink: ProgressSink | None = None, events: EventWriter | None = None
    ) -> None:
        self.job_id = job_id
        self.stages: list[str] = []
        self.monitoring_link: str | None = None
        self._sink = sink or PlainProgress()
        self._events = events
        self._announced: str | None = None
        self._pending: dict[str, PendingArtifact] = {}

    def _event(self, type: str, **data: Any) -> None:
        if self._events is not None:
            self._events(type, data)

    def set_monitoring_link(self, monitoring_link: str) -> None:
        """Set the link for watching the job."""
        self.monitoring_link = monitoring_link
        self._event("job.link", link=monitoring_link)

    def register_stages(self, stages: Sequence[str]) -> None:
        """Name the stages in the order in which they will run."""
        self.stages = list(stages)
        self._event("job.stages", stages=self.stages)

    def stage_notifier(self, stage: str) -> StageNotifier:
        """The notifier of one stage; any name is taken."""
        return StageNotifier(self, stage)

    def report_progress(
        self,
        stage: str,
        tot_num_samples: int | None = None,
        processed_num_samples: int | None = None,
        monitoring_link: str | None = None,
        checkpoints: Sequence[str] | None = None,
    ) -> None:
        """Report samples done of one stage; with a total of 0 or None the stage has only begun."""
        done, total = processed_num_samples or 0, tot_num_samples or 0
        self._sink(stage, done, total)
        if monitoring_link and monitoring_link != self._announced:
            self._announced = monitoring_link
            say(f"{stage}: watch at {monitoring_link}")
        extra = {"checkpoints": list(checkpoints)} if checkpoints else {}
        self._event("progress", stage=stage, done=done, total=total, **extra)

    def report_checkpoint(
        self,
        checkpoint_id: str,
        step: int,
        completion_percentage: float,
        model_checkpoint_names: dict[str, str] | None = None,
        user_data: dict[str, Any] | None = None,
        stage_name: str | None = None,
    ) -> None:
        """A checkpoint was saved; `completion_percentage` from 0 to 100."""
        models = model_checkpoint_names or {}
        self._event(
            "checkpoint", id=checkpoint_id, step=step, percent=completion_percentage, models=models, stage=stage_name
        )

    def register_artifact(self, artifact: BaseArtifact, session_id: str | None = None) -> None:
        """Write an artifact into the run's record: from now on it is listed. A pending one is finalised."""
        if artifact.id in self._pending:
            return self.finalize_artifact(artifact, self._pending[artifact.id].file_path)
        self._event("artifact", **artifact.record())

    def add_pending_artifact(self, artifact: BaseArtifact, file_path: str) -> None:
        """Finalise the artifact when the job ends, also after a failure."""
        self._pending[artifact.id] = PendingArtifact(artifact, file_path)

    def remove_pending_artifact(self, artifact_id: str) -> None:
        """Forget a pending artifact; it is not listed."""
        self._pending.pop(artifact_id, None)

    def finalize_artifact(self, artifact: BaseArtifact, file_path: str) -> None:
        """Publish the artifact's file and register it. Raises ResourceError."""
        artifact.publish()
        self.remove_pending_artifact(artifact.id)
        self.register_artifact(artifact)

    def finalize_pending_artifacts(self) -> None:
        """Finalise all pending artifacts. The failure of one is logged."""
        while self._pending:
            artifact, file = self._pending.pop(next(iter(self._pending)))
            try:
                self.finalize_artifact(artifact, file)
            except Exception as error:  # one artifact must not take the others, or the outcome of the run, with it
                logger.warning("artifact %s is lost: %s", artifact.id, error)

    def report_error(self, error: str) -> None:
        """The job failed; the command line shows the error itself. Pending artifacts are finalised."""
        self.finalize_pending_artifacts()
        self._event("job.error", error=error)

    def mark_running(self) -> None:
        """The job has begun."""
        self._event("job.running", id=self.job_id)

    def complete(self) -> None:
        """The job ended well. Pending artifacts are finalised."""
        self.finalize_pending_artifacts()
        self._event("job.complete", id=self.job_id)

    def heartbeat(self) -> None:
        """Report that the job is alive; does nothing here."""

    def start_heartbeat(self, interval_seconds: float = 30.0) -> None:
        """Call `heartbeat` regularly; does nothing here."""

    def stop_heartbeat(self) -> None:
        """End `start_heartbeat`; does nothing here."""

    def close(self) -> None:
        """Finalise pending artifacts and stop the notifier's background work."""
        self.finalize_pending_artifacts()
        self.stop_heartbeat()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


StdoutJobNotifier = JobNotifier
StdoutStageNotifier = StageNotifier


class SimpleProgressNotifier:
    """A stage without samples: 0 of 1 on entry and 1 of 1 on a good exit. Works with `with` and `async with`."""

    def __init__(self, job_notifier: StageNotifier, monitoring_link: str | None = None) -> None:
        self._stage = job_notifier
        self._link = monitoring_link

    def __enter__(self) -> Self:
        self._stage.report_progress(1, 0, self._link)
        return self

    def __exit__(self, exc_type: object, *rest: object) -> None:
        if exc_type is None:
            self._stage.report_progress(1, 1, self._link)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, *exc: object) -> None:
        self.__exit__(*exc)
