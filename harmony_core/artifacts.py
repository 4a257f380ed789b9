"""Artifacts: files and models that a job leaves, listed by `adaptive runs show` and in the run's report.

An artifact's file is written below `.partial/` in the job's folder of artifacts. When it is finalised, at the latest
when the job ends, the file is flushed to disk and moved to its place in one step, and the run's record gets an
`artifact` event. After a crash, what was not finalised is not listed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self
from uuid import uuid4

from harmony_core.data.samples import (
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
from harmony_core.graders.evaluation import EvalSample, EvaluationArtifactBase, Scores, compare_models, scores_of
from harmony_core.journal import current
from harmony_core.notifiers import say
from harmony_core.plain_files import expanded, fsync_path, plain, size_of, write_json, write_text
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
        self._place = None if file_path is None else self._checked(file_path)
        self._finalized = False
        if self._place is None:
            self.finalize()
            return
        with storing(f"cannot write artifact {name!r}"):
            self.file_path.parent.mkdir(parents=True, exist_ok=True)
            self.file_path.touch()
        ctx.job.add_pending_artifact(self, str(self.file_path))

    def _checked(self, file: str) -> Path:
        folder = Path(os.path.realpath(self.ctx.artifacts_dir))
        place = Path(os.path.realpath(folder / file))
        if not file or not place.is_relative_to(folder) or place == folder or PARTIAL in place.parts:
            raise UsageError(
                f"artifact {self.name!r}: {file!r} is not a file below {folder}",
                hint="give its name there, such as 'table.csv'; copy_from() takes a file from elsewhere",
            )
        return place

    @property
    def file_path(self) -> Path:
        """The file: the hidden one until the artifact is finalised, unless the recipe wrote one at its place itself.

        Raises ValueError for an artifact without a file.
        """
        if self._place is None:
            raise ValueError(f"artifact {self.name!r} has no file")
        if self._place.exists():
            return self._place
        folder = Path(os.path.realpath(self.ctx.artifacts_dir))
        return folder / PARTIAL / self._place.relative_to(folder)

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
        """The artifact's entry in the run's record."""
        size = self._place.stat().st_size if self._place is not None else None
        return _entry(self.ctx.job.directory, self.id, self.name, self.kind, self._place, size, self.metadata)

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
    """Answers with their grades, `eval_samples_<id>.jsonl`; the report shows means and samples."""

    def __init__(self, name: str, ctx: RecipeContext) -> None:
        super().__init__(name, ctx, EvaluationArtifactBase.kind, "eval_samples")

    def add_samples(self, samples: Sequence[EvalSample]) -> Self:
        """Append samples. Raises ValueError for an empty list."""
        base = EvaluationArtifactBase(self.name, str(self.file_path), self.id)
        return self._add(base.samples_to_adaptive_json(samples))


class DatasetArtifact(_Lines):
    """Rows in the platform's format, `dataset_samples_<id>.jsonl`; `Dataset.load` reads them.

    All methods raise TypeError for rows of another kind, and ValueError for an empty list.
    """

    _ROWS: ClassVar[dict[AdaptiveDatasetKind, type[DatasetPromptSample]]] = {
        AdaptiveDatasetKind.Prompt: DatasetPromptSample,
        AdaptiveDatasetKind.Completion: DatasetSample,
        AdaptiveDatasetKind.Metric: DatasetMetricSample,
        AdaptiveDatasetKind.Preference: DatasetPreferenceSample,
    }

    def __init__(self, name: str, ctx: RecipeContext, kind: AdaptiveDatasetKind = AdaptiveDatasetKind.Mixed) -> None:
        self.dataset_kind = AdaptiveDatasetKind(kind)
        super().__init__(name, ctx, "dataset", "dataset_samples", dataset_kind=self.dataset_kind.name)

    @property
    def artifact_kind(self) -> str:
        """The artifact's kind, "dataset"."""
        return self.kind

    def add_samples(self, samples: Sequence[DatasetSampleType]) -> Self:
        """Append rows of the artifact's kind; of any kind if it is Mixed."""
        return self._rows(samples, *self._ROWS.values())

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
        own = self._ROWS.get(self.dataset_kind)
        for item in items:
            # A subclass has further fields, which the kind does not.
            if type(item) not in allowed or own not in (None, type(item)):
                kind = self.dataset_kind.name
                raise TypeError(f"artifact {self.name!r} of kind {kind} does not take {type(item).__name__} here")
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


def _entry(
    directory: Path | None, id: str, name: str, kind: str, path: Path | None, size: int | None, metadata: dict[str, Any]
) -> dict[str, Any]:
    """An artifact in the run's record; its path is relative to the run's directory if it is below it."""
    root = Path(os.path.realpath(directory)) if directory is not None else None
    below = path is not None and root is not None and path.is_relative_to(root)
    shown = None if path is None else str(path.relative_to(root) if below and root else path)
    return {"id": id, "name": name, "kind": kind, "path": shown, "bytes": size, "metadata": plain(metadata)}


def log_eval_result(eval_samples: Sequence[EvalSample]) -> None:
    """See `RecipeContext.log_eval_result`."""
    job = current().job
    if not eval_samples or job is None or job.artifacts_dir is None:
        what = "there are no samples" if not eval_samples else "there is no run to keep the results in"
        raise UsageError(
            f"log_eval_result: {what}", hint="call it in a recipe's task, with the answers of an evaluation"
        )
    scores = scores_of(eval_samples)
    for line in _score_lines(scores):
        say(line)
    for difference in compare_models(eval_samples):
        say(f"{difference}, 95 % interval")
    means = {
        model: {grader: None if found.mean is None else round(found.mean, 3) for grader, found in row.items()}
        for model, row in scores.items()
    }
    about = {
        "total_samples": len(eval_samples),
        "unique_prompts": len({sample.prompt for sample in eval_samples}),
        "models": list(scores),
        "graders": list(next(iter(scores.values()))),
    }
    folder = Path(os.path.realpath(job.artifacts_dir))
    place = folder / "adaptive_eval_samples" / datetime.now(UTC).isoformat().replace(":", "-")
    partial = folder / PARTIAL / place.name
    with storing(f"cannot write {place}"):
        for directory in (partial, place.parent):
            directory.mkdir(parents=True, exist_ok=True)
        write_json(partial / "aggregate_scores.json", means)
        write_json(partial / "metadata.json", about)
        write_text(partial / "evaluation_samples.html", _samples_page(eval_samples), durable=True)
        os.replace(partial, place)
    entry = _entry(job.directory, str(uuid4()), "evaluation results", "custom", place, size_of(place), about)
    current().tell("artifact", entry)
    say(f"evaluation results: {place}")


def _score_lines(scores: dict[str, dict[str, Scores]]) -> list[str]:
    """The table of means; the best one of each grader has an asterisk."""
    graders = list(next(iter(scores.values())))
    best = {g: max((row[g].mean or 0.0 for row in scores.values() if row[g].values), default=0.0) for g in graders}
    rows = [["model", *graders]]
    for model, row in scores.items():
        cells = [model or "-"]
        for grader, (values, unscored) in row.items():
            mean, marked = row[grader].mean, "*" if row[grader].mean == best[grader] and len(scores) > 1 else ""
            told = f" ({unscored} unscored)" if unscored and values else ""
            cells.append("all failed" if mean is None else f"{mean:.3f}{marked}{told}")
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _samples_page(samples: Sequence[EvalSample]) -> str:
    """All samples as one page of HTML that loads nothing."""
    parts = ['<!doctype html><meta charset="utf-8"><title>Evaluation samples</title>']
    for sample in samples:
        grades = "; ".join(
            f"{g.grader_key}: {g.value:g}{f' ({g.reasoning})' if g.reasoning else ''}" for g in sample.grades
        )
        parts.append(f"<h3>{escape(sample.model)}</h3><p>{escape(grades)}</p>")
        parts.append(string_thread_to_html_string(sample.interaction.thread))
    return "\n".join(parts) + "\n"
