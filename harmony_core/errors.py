"""The one tree of errors.

    HarmonyError                     1  anything of ours; caught by a recipe that wants all of it
    ├── UsageError                   2  the caller's input is wrong, nothing was started
    │   ├── ConfigError              2  a configuration value; carries every problem found (`issues`)
    │   ├── RecipeLoadError          2  the recipe file itself
    │   ├── ModelRefused             2  architecture, kind, tp, or weights we do not take
    │   ├── TokenizationError        2  a thread or template from which tokens or weights cannot be derived
    │   ├── UndescribedField         2  a field of a pydantic model that has no description
    │   └── DataError                2  a dataset line, a sample, a prompt
    │       ├── TooLong              2  more tokens than a limit; details: tokens, limit, needed, setting, context
    │       │   ├── SampleTooLong    2
    │       │   └── PromptTooLong    2
    │       ├── NothingToTrain       2  a sample, batch or step without a weighted token
    │       ├── GradeFailed          2  a grader raised, or gave no finite number; details: grader
    │       │   └── GradeTimedOut    2  it gave none within its timeout
    │       ├── OutputParserException 2 a completion that cannot be read as JSON of a schema; details: llm_output
    │       ├── JsonParseError       2  a model that gave no JSON of a schema; details: completion
    │       ├── IgnoreGradeException 2  a grader asks that its sample does not count
    │       ├── EnvironmentFailed    2  an environment raised, or gave something else than documented
    │       │   └── EnvironmentTimeout 2  an environment did not answer in time
    │       └── TooManyFailures      2  more failed than is tolerated; details: failures, and batch_size or rows
    ├── NotFoundError                3  a named thing does not exist
    ├── ResourceError                4  devices, packages, disk
    │   └── MemoryRefused            4  a spawn that cannot fit; message holds the table, hint the ways out
    ├── EngineError                  5  the engine failed under the recipe
    │   ├── RankDied                 5  details: rank, pid, cause, phase
    │   ├── LauncherDied             5
    │   ├── RankError                5  an exception on a rank; details: rank, type, traceback
    │   └── StepFailed               5  an accepted sample failed; the step's gradients are gone
    │       └── LossFailed           1  it failed in the recipe's own loss
    ├── ProviderError                1  an external model's provider failed; details: status, None without a reply
    ├── ConflictError                6  exists already, in use, name taken
    ├── VerificationError            7  bytes differ from what was recorded, or a file that must not be read
    ├── InternalError               70  our bug
    ├── Preempted                   75  stopped by SIGTERM or SIGHUP with a committed checkpoint
    └── RunTimeout                 124  `--timeout` passed, or a rank hung

To add one: subclass the nearest class, set `exit_code` only if it differs, and draw it above.
Every error is built from a message, a hint and plain details, so that it can cross the wire as data.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar


class HarmonyError(Exception):
    """Base of the tree: a message for people, a hint with the way out, and plain values for programs.

    `details` holds only what msgpack and JSON can carry.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message

    @property
    def code(self) -> str:
        """Stable dotted name for machine output, derived from the class: `SampleTooLong` -> `sample_too_long`."""
        name = type(self).__name__
        return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))


class UsageError(HarmonyError):
    """The caller's input is wrong; nothing was started."""

    exit_code = 2


class ConfigError(UsageError):
    """Configuration problems, all of them: `issues` holds one line of text each."""

    def __init__(self, message: str, *, hint: str = "", issues: Iterable[str] = (), **details: Any) -> None:
        self.issues = list(issues)
        super().__init__(message, hint=hint, issues=self.issues, **details)


class RecipeLoadError(UsageError):
    """The recipe file cannot be loaded or does not declare one entry point."""


class ModelRefused(UsageError):
    """A model, or a way to run it, that is not supported."""


class TokenizationError(UsageError):
    """Tokens or weights cannot be derived from a thread."""


class DataError(UsageError):
    """A dataset line, a sample or a prompt that cannot be used."""


class TooLong(DataError):
    """More tokens than a limit allows: training drops the sample that raises it, and takes another.

    Details: tokens, limit; if known, also needed (the limit that would be enough), setting (the name of the limit's
    setting, "" if there is none) and context (the largest limit that any setting allows).
    """


class SampleTooLong(TooLong):
    """A sample with more tokens than are trained at once."""


class NothingToTrain(DataError):
    """A sample, batch or step without a weighted token."""


class GradeFailed(DataError):
    """A grader raised on a sample, or gave a score that is no finite number. Details: grader."""


class GradeTimedOut(GradeFailed):
    """A grader gave no score within its `timeout`. Details: grader."""


class IgnoreGradeException(DataError):
    """Raised by a grader: this sample does not count. Where samples are counted by reason, `grade_ignored`."""

    def __init__(self, message: str | None = None, *, hint: str = "", **details: Any) -> None:
        super().__init__(message or "the grader ignores this sample", hint=hint, **details)

    @property
    def code(self) -> str:
        """The reason under which the sample is counted."""
        return "grade_ignored"


class UndescribedField(UsageError, ValueError):
    """A field of a pydantic model without the description that is to be shown."""


class OutputParserException(DataError, ValueError):
    """The text of a completion, `llm_output`, cannot be read as an instance of a pydantic model."""

    def __init__(self, message: str, llm_output: str | None = None, *, hint: str = "", **details: Any) -> None:
        super().__init__(message, hint=hint, llm_output=llm_output, **details)
        self.llm_output = llm_output


class JsonParseError(DataError, ValueError):
    """A model gave no instance of a pydantic model; `completion` is the text that it gave last."""

    def __init__(self, message: str, completion: str = "", *, hint: str = "", **details: Any) -> None:
        super().__init__(message, hint=hint, completion=completion, **details)
        self.completion = completion


class EnvironmentFailed(DataError, ValueError):
    """An environment raised, or gave something else than documented: its trajectory does not count."""


class EnvironmentTimeout(EnvironmentFailed):
    """An environment did not answer in time."""


class TooManyFailures(DataError, RuntimeError):
    """More items failed, not for their length, than is tolerated. Details: failures, and batch_size or rows."""


class PromptTooLong(TooLong):
    """A prompt that leaves no room to generate, or a thread that is too long to score."""


class NotFoundError(HarmonyError):
    """A named thing does not exist; the hint names the nearest ones."""

    exit_code = 3


class ResourceError(HarmonyError):
    """The machine lacks something: devices, memory, disk, a package."""

    exit_code = 4


class MemoryRefused(ResourceError):
    """A spawn that cannot fit. The message holds the table, the hint computed ways out."""


class EngineError(HarmonyError):
    """The engine failed under the recipe."""

    exit_code = 5


class RankDied(EngineError):
    """A rank process is gone. Details: rank, pid, cause, phase, log (its last lines)."""


class LauncherDied(EngineError):
    """The launcher is gone, or never brought the ranks up."""


class RankError(EngineError):
    """An exception on a rank. Details: rank, type, traceback."""


class StepFailed(EngineError):
    """A sample that was accepted failed on a rank; the step's gradients were cleared everywhere."""


class LossFailed(StepFailed):
    """The recipe's own loss raised, or returned an invalid value. The engine is sound, and so is the next step."""

    exit_code = 1


class ProviderError(HarmonyError):
    """The provider of an external model refused a request, failed, or did not answer. Details: status."""

    @property
    def status(self) -> int | None:
        """The HTTP status; None if there was no reply, or it could not be read."""
        status: int | None = self.details.get("status")
        return status


class ConflictError(HarmonyError):
    """Something with this name exists already, or is in use."""

    exit_code = 6


class VerificationError(HarmonyError):
    """Stored bytes differ from what was recorded, or a file of a kind that is never read."""

    exit_code = 7


class InternalError(HarmonyError):
    """A bug of ours."""

    exit_code = 70


class Preempted(HarmonyError):
    """Stopped by SIGTERM or SIGHUP with a committed checkpoint: resume me."""

    exit_code = 75


class RunTimeout(HarmonyError):
    """`--timeout` passed, or a rank hung."""

    exit_code = 124


MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE)
"""Error numbers with which the machine refuses a file, as opposed to errors of a program."""


def storage_error(doing: str, error: OSError) -> HarmonyError:
    """The typed error for a failing disk: the action, the file, and the system's reason."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    few = "allow more open files: ulimit -n 4096" if error.errno in (errno.EMFILE, errno.ENFILE) else ""
    where = f" ({error.filename})" if error.filename and str(error.filename) not in doing else ""
    return ResourceError(
        f"{doing}: {error.strerror or error}{where}",
        hint="free some space and try again; nothing stored before was touched" if full else few,
        errno=error.errno or 0,
    )


@contextlib.contextmanager
def storing(doing: str) -> Iterator[None]:
    """Turn an OSError of the block into the typed error for a failing disk."""
    try:
        yield
    except OSError as error:
        raise storage_error(doing, error) from error


def all_errors() -> dict[str, type[HarmonyError]]:
    """Every class of the tree by name: the closed table by which an error crosses the wire."""
    found: dict[str, type[HarmonyError]] = {}
    pending: list[type[HarmonyError]] = [HarmonyError]
    while pending:
        cls = pending.pop()
        found[cls.__name__] = cls
        pending.extend(cls.__subclasses__())
    return found


def nearest(name: str, options: Iterable[str], count: int = 3) -> list[str]:
    """The options most like `name`, best first; for hints of the form "did you mean ...?"."""
    return difflib.get_close_matches(name, list(options), count, 0.5)


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """A hint with the nearest options, or with all if there are few, or ""."""
    known = sorted(set(options))
    close = nearest(name, known)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there is: {', '.join(known)}" if 0 < len(known) <= 12 else ""
