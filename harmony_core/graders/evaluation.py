"""Answers with their grades, means by model and grader, and paired bootstrap intervals between models.

A grade that is missing or not a finite number is unscored: it is counted, and in no mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple
from uuid import uuid4

from harmony_core.errors import GradeFailed, IgnoreGradeException, UsageError
from harmony_core.graders.base import BaseGrader, Grade, grade_or_refuse
from harmony_core.plain_files import plain
from harmony_core.text.threads import StringThread

SCHEME = "model_registry://"
MAX_ROWS, MAX_CELL = 50, 2000
"""Answers that the report shows of an evaluation, and characters of one of its cells."""


@dataclass
class EvalSampleInteraction:
    """A conversation that ends with an answer, and the key of the model that gave it."""

    thread: StringThread
    source: str | None = None


@dataclass
class EvalSample:
    """An answer, its grades, and the key of the dataset of its prompt."""

    interaction: EvalSampleInteraction
    grades: list[Grade]
    dataset_key: str
    id: str = field(default_factory=lambda: str(uuid4()), kw_only=True)

    def __post_init__(self) -> None:
        self.grades = list(self.grades)

    @property
    def model(self) -> str:
        """The key of the model; "" if it is not known."""
        return (self.interaction.source or "").removeprefix(SCHEME)

    @property
    def prompt(self) -> str:
        """The conversation without the answer, as JSON: equal for answers to the same prompt."""
        thread = self.interaction.thread
        turns = thread.get_fragments()[: None if thread.completion() is None else -1]
        return json.dumps([self.dataset_key, turns, dict(thread.template_kwargs)], sort_keys=True)

    def as_data(self) -> dict[str, Any]:
        """The line of an evaluation artifact; the value of an unscored grade is null."""
        thread, record = self.interaction.thread, self.interaction.thread.generation
        turns = [{"role": role, "content": found, "metadata": None} for role, found in thread.get_fragments()]
        new = {"turns": turns, "metadata": plain(thread.metadata), "prompt_tokens_count": None, "usage_id": None}
        new |= {"completion_tokens_count": len(record.logprobs) if record else None}
        grades = [
            {**vars(grade), "value": grade.value if math.isfinite(grade.value) else None} for grade in self.grades
        ]
        interaction = {"New": new | {"model_key": self.interaction.source or ""}}
        return {"interaction": interaction, "grades": grades, "dataset_key": self.dataset_key, "id": self.id}


class EvaluationArtifactBase:
    """Name, address and id of an evaluation, and the lines of its samples."""

    kind = "eval"

    def __init__(self, name: str, uri: str, id: str, **py_kwargs: Any) -> None:
        self.name, self.uri, self.id = name, uri, id

    def samples_to_adaptive_json(self, samples: Iterable[EvalSample]) -> list[str]:
        """One line of JSON for each sample."""
        return [json.dumps(sample.as_data(), ensure_ascii=False) for sample in samples]


async def grade_or_reason(grader: BaseGrader[Any], sample: StringThread) -> Grade:
    """The grader's grade; if it fails, takes too long or ignores the sample, an unscored one (NaN) with the reason."""
    try:
        return await grade_or_refuse(grader, sample)
    except (GradeFailed, IgnoreGradeException) as error:
        return Grade(math.nan, grader.grader_key, error.message)


class Scores(NamedTuple):
    """The grades of one model by one grader: the values by prompt, and the number of unscored samples."""

    values: dict[str, list[float]]
    unscored: int

    @property
    def mean(self) -> float | None:
        """The mean of all values; None if all are unscored."""
        found = [value for values in self.values.values() for value in values]
        return math.fsum(found) / len(found) if found else None


def scores_of(samples: Sequence[EvalSample]) -> dict[str, dict[str, Scores]]:
    """The scores by model and grader, both in the order in which they occur."""
    models = dict.fromkeys(sample.model for sample in samples)
    graders = dict.fromkeys(grade.grader_key for sample in samples for grade in sample.grades)
    found: dict[str, dict[str, Scores]] = {model: {grader: Scores({}, 0) for grader in graders} for model in models}
    for sample in samples:
        prompt, values = sample.prompt, {grade.grader_key: grade.value for grade in sample.grades}
        for grader, (scored, unscored) in found[sample.model].items():
            value = values.get(grader, math.nan)
            if math.isfinite(value):
                scored.setdefault(prompt, []).append(value)
            else:
                found[sample.model][grader] = Scores(scored, unscored + 1)
    return found


class Difference(NamedTuple):
    """How much higher a model's mean is than the baseline's over the prompts that both have scores for.

    `low` and `high` are the ends of the interval; NaN, as the mean, without common prompts.
    """

    model: str
    baseline: str
    grader: str
    mean: float
    low: float
    high: float
    prompts: int

    @property
    def cells(self) -> list[str]:
        """The difference as a row of a table."""
        interval = f"{self.low:+.3f} to {self.high:+.3f}" if self.prompts else "not known"
        mean = f"{self.mean:+.3f}" if self.prompts else "-"
        return [self.grader, f"{self.model} - {self.baseline}", mean, interval, str(self.prompts)]


def compare_models(samples: Sequence[EvalSample], **bootstrap: Any) -> list[Difference]:
    """Compare every model with the first one, by each grader; answers to one prompt count by their mean.

    `bootstrap` holds the options of `paired_bootstrap`.
    """
    (baseline, first), *others = list(scores_of(samples).items()) or [("", {})]
    found = []
    for model, scores in others:
        for grader, (values, _) in scores.items():
            common = [prompt for prompt in values if prompt in first[grader].values]
            sides = [[math.fsum(v[p]) / len(v[p]) for p in common] for v in (first[grader].values, values)]
            found.append(Difference(model, baseline, grader, *paired_bootstrap(*sides, **bootstrap), len(common)))
    return found


def paired_bootstrap(
    baseline: Sequence[float], other: Sequence[float], *, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high) of `other - baseline`, pair by pair; NaN without pairs.

    Pairs are drawn with replacement `draws` times, the same for a given seed. `low` and `high` are the quantiles of
    the means of the draws that enclose the share `confidence`. Raises UsageError.
    """
    import numpy as np

    if len(baseline) != len(other) or not 0 < confidence < 1 or draws < 1:
        raise UsageError(
            f"paired_bootstrap: {len(baseline)} and {len(other)} values, confidence {confidence}, {draws} draws",
            hint="as many values on both sides, a confidence between 0 and 1, at least one draw",
        )
    if not baseline:
        return math.nan, math.nan, math.nan
    differences, draw = np.asarray(other, float) - np.asarray(baseline, float), np.random.default_rng(seed)
    count = len(differences)
    means = [differences[draw.integers(0, count, count)].mean() for _ in range(draws)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(differences.mean()), float(low), float(high)


def shown_grade(grade: Grade) -> str:
    """The grade in one line, with its reason."""
    value = f"{grade.value:.5g}" if math.isfinite(grade.value) else "unscored"
    return f"{grade.grader_key}: {value}{f': {grade.reasoning}' if grade.reasoning else ''}"


def evaluation_tables(samples: Sequence[EvalSample]) -> dict[str, dict[str, list[Any]]]:
    """Tables by title: the mean scores, the differences of models if there are several, and some answers.

    A table has "headers" and "rows". The answers are at most MAX_ROWS, to the same prompts for each model.
    """
    scores = scores_of(samples)
    graders = list(next(iter(scores.values()), {}))
    best = {g: max((row[g].mean or 0.0 for row in scores.values() if row[g].values), default=0.0) for g in graders}
    rows = []
    for model, row in scores.items():
        cells = []
        for grader, (values, unscored) in row.items():
            mean, several = row[grader].mean, len(scores) > 1
            told = f"{mean:.3f}{'*' if mean == best[grader] and several else ''}" if mean is not None else "all failed"
            cells.append(f"{told} ({unscored} unscored)" if unscored and values else told)
        rows.append([model or "-", *cells])
    tables: dict[str, dict[str, list[Any]]] = {"mean scores": {"headers": ["model", *graders], "rows": rows}}
    if len(scores) > 1:
        headers = ["grader", "models", "difference", "95 % interval", "prompts"]
        tables["differences"] = {"headers": headers, "rows": [found.cells for found in compare_models(samples)]}
    by_model = [[sample for sample in samples if sample.model == model] for model in scores]
    chosen = [sample for place in zip_longest(*by_model) for sample in place if sample is not None][:MAX_ROWS]
    rows = [_answer(sample) for sample in chosen]
    tables[f"answers ({len(rows)} of {len(samples)})"] = {
        "headers": ["prompt", "model", "completion", "grades"],
        "rows": rows,
    }
    return tables


def _answer(sample: EvalSample) -> list[str]:
    thread = sample.interaction.thread
    prompt = "\n".join(f"[{role}] {text}" for role, text in thread.messages())
    grades = "\n".join(map(shown_grade, sample.grades))
    return [text[:MAX_CELL] for text in (prompt, sample.model, thread.completion() or "", grades)]
