"""Artifacts: files and models that a job leaves, listed by `adaptive runs show` and in the run's report.

An artifact's file is written below `.partial/` in the job's folder of artifacts. When it is finalised, at the latest
when the job ends, the file is flushed to disk and moved to its place in one step, and the run's record gets an
`artifact` event. After a crash, what was not finalised is not listed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

from harmony_core.data.samples import (
    ROWS,
    AdaptiveDatasetKind,
    DatasetMetricSample,
    DatasetPreferenceSample,
    DatasetPromptSample,
    DatasetSample,
    DatasetSampleType,
    SampleMetadata,
    TurnTuple,
)
from harmony_core.errors import UsageError, storing
from harmony_core.graders.evaluation import (
    EvalSample,
    EvaluationArtifactBase,
    evaluation_tables,
    scores_of,
    shown_grade,
)
from harmony_core.journal import current
from harmony_core.notifiers import JobNotifier, say
from harmony_core.plain_files import expanded, fsync_path, plain
from harmony_core.text.image_utils import string_thread_to_html_string
from harmony_core.text.threads import StringThread
from harmony_core.text.turns import Text

if TYPE_CHECKING:
    from harmony_core.client import TrainingModel
    from harmony_core.recipe.context import RecipeContext

PARTIAL = ".partial"


class ArtifactProcessingMode(StrEnum):
    """Whether an artifact is complete when it is made, or when the job ends."""

    ON_REGISTRATION = "on_registration"
    ON_COMPLETION = "on_completion"


class BaseArtifact:
    """An artifact of the job of `ctx`: with a file, whose path is relative to `ctx.artifacts_dir`, or without.

    Without a file it is registered at once, else by `finalize` or when the job ends. Raises UsageError for a file
    outside of that folder.
    """

    def __init__(
        self,
        ctx: RecipeContext,
        id: str,
        name: str,
        kind: str,
        file_path: str | None = None,
        processing_mode: ArtifactProcessingMode = ArtifactProcessingMode.ON_COMPLETION,
        **metadata: Any,
    ) -> None:
        self.ctx, self.id, self.name, self.kind = ctx, id, name, kind
        self.processing_mode, self.metadata = processing_mode, metadata
        self._finalized = False
        self._folder = Path(os.path.realpath(ctx.job.artifacts_dir or ""))
        self._place = None if file_path is None else Path(os.path.realpath(self._folder / file_path))
        if self._place is None:
            return self.finalize()
        place, folder = self._place, self._folder
        if not file_path or not place.is_relative_to(folder) or place == folder or PARTIAL in place.parts:
            raise UsageError(
                f"artifact {name!r}: {file_path!r} is not a file below {folder}",
                hint="give its name there, such as 'table.csv'; copy_from() takes a file from elsewhere",
            )
        with storing(f"cannot write artifact {name!r}"):
            self.file_path.parent.mkdir(parents=True, exist_ok=True)
            self.file_path.touch()
        ctx.job.add_pending_artifact(self, str(self.file_path))

    @property
    def file_path(self) -> Path:
        """The file: the hidden one until the artifact is finalised, unless the recipe wrote one at its place itself.

        Raises ValueError for an artifact without a file.
        """
        if self._place is None:
            raise ValueError(f"artifact {self.name!r} has no file")
        hidden = self._folder / PARTIAL / self._place.relative_to(self._folder)
        return self._place if self._place.exists() else hidden

    def finalize(self) -> None:
        """Publish the file and register the artifact now; a second call has no effect. Raises ResourceError."""
        if not self._finalized:
            self.ctx.job.finalize_artifact(self, "" if self._place is None else str(self.file_path))

    def publish(self) -> None:
        """For the job: flush the file to disk and move it to its place in one step. Raises ResourceError."""
        if self._place is not None and not self._finalized:
            with storing(f"cannot write artifact {self.name!r}"):
                self._place.parent.mkdir(parents=True, exist_ok=True)
                fsync_path(self.file_path)
                os.replace(self.file_path, self._place)
                fsync_path(self._place.parent)
        self._finalized = True

    def record(self) -> dict[str, Any]:
        """The artifact's entry in the run's record; the path is relative to the run's directory if it is below it."""
        place, root = self._place, Path(os.path.realpath(self.ctx.job.directory or ""))
        shown = place.relative_to(root) if place is not None and place.is_relative_to(root) else place
        entry = {"id": self.id, "name": self.name, "kind": self.kind, "path": None if shown is None else str(shown)}
        size = None if place is None else place.stat().st_size
        return entry | {"bytes": size, "metadata": plain(self.metadata), "tables": self._tables()}

    def _tables(self) -> dict[str, Any]:
        """Tables for the report by title."""
        return {}

    def _write(self, content: str | bytes, mode: str) -> None:
        data, path = content.encode() if isinstance(content, str) else content, self.file_path
        if self._finalized:
            raise UsageError(f"artifact {self.name!r} is finalised and takes nothing more", hint="make another one")
        with storing(f"cannot write artifact {self.name!r}"), path.open(mode) as file:
            file.write(data)


class CustomArtifact(BaseArtifact):
    """Any file, or with `file=None` only a name and metadata."""

    def __init__(self, name: str, ctx: RecipeContext, file: str | None = None, **metadata: Any) -> None:
        super().__init__(ctx, str(uuid4()), name, "custom", file, **metadata)

    def write(self, content: str | bytes) -> None:
        """Replace the file's content."""
        self._write(content, "wb")

    def append(self, content: str | bytes) -> None:
        """Append to the file."""
        self._write(content, "ab")

    def read(self) -> bytes:
        """The file's content."""
        return self.file_path.read_bytes()

    def copy_from(self, source_path: str | Path) -> None:
        """Replace the content by that of another file. Raises ResourceError."""
        self._write(b"", "ab")
        with storing(f"artifact {self.name!r} cannot be copied"):
            shutil.copyfile(expanded(source_path), self.file_path)


class ModelArtifact(BaseArtifact):
    """A model of the registry; registered at once."""

    def __init__(self, key: str, ctx: RecipeContext, **metadata: Any) -> None:
        mode = ArtifactProcessingMode.ON_REGISTRATION
        super().__init__(ctx, str(uuid4()), key, "model", processing_mode=mode, **{**metadata, "model_key": key})

    @property
    def model_key(self) -> str:
        """The reference of the model."""
        return self.name


async def save_with_artifact(
    model: TrainingModel,
    model_name: str,
    inference_only: bool = True,
    ctx: RecipeContext | None = None,
    original_save_method: Callable[[TrainingModel, str, bool], Awaitable[str]] | None = None,
) -> str:
    """Save the model and, with `ctx`, register a `ModelArtifact`. Returns the exact reference."""
    save = original_save_method or type(model).save
    ref = await save(model, model_name, inference_only)
    if ctx is not None:
        ModelArtifact(ref, ctx)
    return ref


class _Lines(BaseArtifact):
    """An artifact of JSON lines, one for each sample."""

    def __init__(self, name: str, ctx: RecipeContext, kind: str, stem: str, **metadata: Any) -> None:
        id = str(uuid4())
        super().__init__(ctx, id, name, kind, f"{stem}_{id}.jsonl", sample_count=0, **metadata)

    @property
    def sample_count(self) -> int:
        """The number of samples added."""
        return int(self.metadata["sample_count"])

    def _add(self, lines: Sequence[str]) -> Self:
        if not lines:
            raise ValueError(f"artifact {self.name!r}: the list of samples is empty")
        self._write("".join(f"{line}\n" for line in lines), "ab")
        self.metadata["sample_count"] += len(lines)
        return self


class EvaluationArtifact(_Lines):
    """Answers with their grades, `eval_samples_<id>.jsonl`; the report shows means, differences and some answers."""

    def __init__(self, name: str, ctx: RecipeContext) -> None:
        self._samples: list[EvalSample] = []
        super().__init__(name, ctx, EvaluationArtifactBase.kind, "eval_samples")

    def add_samples(self, samples: Sequence[EvalSample]) -> Self:
        """Append samples. Raises ValueError for an empty list."""
        self._add(EvaluationArtifactBase(self.name, "", self.id).samples_to_adaptive_json(samples))
        self._samples += samples
        return self

    def _tables(self) -> dict[str, Any]:
        return evaluation_tables(self._samples)


class DatasetArtifact(_Lines):
    """Rows in the platform's format, `dataset_samples_<id>.jsonl`; `Dataset.load` reads them.

    All methods raise TypeError for rows of another kind, and ValueError for an empty list.
    """

    def __init__(self, name: str, ctx: RecipeContext, kind: AdaptiveDatasetKind = AdaptiveDatasetKind.Mixed) -> None:
        self.dataset_kind = AdaptiveDatasetKind(kind)
        super().__init__(name, ctx, "dataset", "dataset_samples", dataset_kind=self.dataset_kind.name)

    @property
    def artifact_kind(self) -> str:
        """The artifact's kind, "dataset"."""
        return self.kind

    def add_samples(self, samples: Sequence[DatasetSampleType]) -> Self:
        """Append rows of the artifact's kind; of any kind if it is Mixed."""
        return self._rows(samples, *ROWS.values())

    def add_prompt_items(self, items: Sequence[DatasetPromptSample]) -> Self:
        """Append prompts."""
        return self._rows(items, DatasetPromptSample)

    def add_completion_items(self, items: Sequence[DatasetSample]) -> Self:
        """Append prompts with their answers."""
        return self._rows(items, DatasetSample)

    def add_metric_items(self, items: Sequence[DatasetMetricSample]) -> Self:
        """Append answers with feedback values."""
        return self._rows(items, DatasetMetricSample)

    def add_preference_items(self, items: Sequence[DatasetPreferenceSample]) -> Self:
        """Append pairs of answers."""
        return self._rows(items, DatasetPreferenceSample)

    def _rows(self, items: Sequence[DatasetPromptSample], *allowed: type[DatasetPromptSample]) -> Self:
        kind = self.dataset_kind
        for item in items:
            # A subclass has further fields, which the kind does not.
            if type(item) not in allowed or kind not in ("MIXED", item.KIND):
                raise TypeError(f"artifact {self.name!r} of kind {kind.name} does not take {type(item).__name__} here")
        return self._add([item.model_dump_json() for item in items])

    def add_samples_from_thread(self, threads: Sequence[StringThread]) -> Self:
        """Append threads: a last assistant turn is the completion, the metadata is `external_data`.

        Raises ValueError for the kinds Metric and Preference, and without a completion for the kind Completion.
        """
        if self.dataset_kind in (AdaptiveDatasetKind.Metric, AdaptiveDatasetKind.Preference):
            raise ValueError(f"a thread is no row of kind {self.dataset_kind.name}: use add_samples()")
        return self.add_samples([self._row(thread) for thread in threads])

    def _row(self, thread: StringThread) -> DatasetPromptSample:
        last = thread.turns[-1] if thread.completion() is not None else None
        turns = [TurnTuple(*turn) for turn in thread.get_fragments()]
        common: dict[str, Any] = {
            "prompt": turns[:-1] if last else turns,
            "metadata": SampleMetadata(external_data=plain(thread.metadata)),
            "chat_template_kwargs": dict(thread.template_kwargs) or None,
        }
        if last is None and self.dataset_kind is AdaptiveDatasetKind.Completion:
            raise ValueError(f"artifact {self.name!r}: a thread without an answer is no row of kind Completion")
        if last is None or self.dataset_kind is AdaptiveDatasetKind.Prompt:
            return DatasetPromptSample(**common)
        plain_text = len(last.fragments) == 1 and isinstance(last.fragments[0], Text)
        return DatasetSample(completion=TurnTuple("assistant", last.text) if plain_text else turns[-1], **common)


def log_eval_result(eval_samples: Sequence[EvalSample], job: JobNotifier | None = None) -> None:
    """Print the mean score of each model by each grader, and write the scores and samples among the job's artifacts.

    With several models, prints their differences to the first one with 95 % intervals. The folder
    `adaptive_eval_samples/<time>/` has `aggregate_scores.json` ({model: {grader: mean or null}}), `metadata.json` and
    `evaluation_samples.html`. Without `job`, the job is that of the recipe's task. Raises UsageError without samples,
    and outside of a run.
    """
    job = job or current().job
    if not eval_samples or job is None or job.artifacts_dir is None:
        what = "there are no samples" if not eval_samples else "there is no run to keep the results in"
        raise UsageError(f"log_eval_result: {what}", hint="ctx.log_eval_result(samples) in a recipe or a session")
    for found in [*evaluation_tables(eval_samples).values()][:-1]:
        lines = [found["headers"], *found["rows"]]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for row in lines:
            say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    scores = scores_of(eval_samples)
    prompts, graders = {sample.prompt for sample in eval_samples}, list(next(iter(scores.values())))
    about = {"total_samples": len(eval_samples), "unique_prompts": len(prompts), "models": list(scores)}
    means = {
        model: {grader: None if found.mean is None else round(found.mean, 3) for grader, found in row.items()}
        for model, row in scores.items()
    }
    page = ['<!doctype html><meta charset="utf-8">']
    for sample in eval_samples:
        page.append(f"<h3>{escape(sample.model)}</h3><p>{escape('; '.join(map(shown_grade, sample.grades)))}</p>")
        page.append(string_thread_to_html_string(sample.interaction.thread))
    files = {
        "aggregate_scores.json": json.dumps(means, indent=2, ensure_ascii=False),
        "metadata.json": json.dumps(about | {"graders": graders}, indent=2, ensure_ascii=False),
        "evaluation_samples.html": "\n".join(page),
    }
    ctx: Any = SimpleNamespace(job=job)  # artifacts use nothing else of it, and the job has no context
    folder = f"adaptive_eval_samples/{datetime.now(UTC).isoformat().replace(':', '-')}"
    for name, text in files.items():
        artifact = CustomArtifact(name, ctx, file=f"{folder}/{name}")
        artifact.write(text + "\n")
        artifact.finalize()
    say(f"evaluation results: {job.artifacts_dir / folder}")
