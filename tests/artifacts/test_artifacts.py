"""Artifacts: where their files are before and after they are finalised, what the run's record says of them."""

from __future__ import annotations

import asyncio
import contextvars
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harmony_core.artifacts import (
    ArtifactProcessingMode,
    BaseArtifact,
    CustomArtifact,
    DatasetArtifact,
    EvaluationArtifact,
    ModelArtifact,
    save_with_artifact,
)
from harmony_core.client import EngineOptions, HarmonyClient
from harmony_core.config.parameters import Dataset, dataset_kinds
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
from harmony_core.errors import ResourceError, UsageError
from harmony_core.graders import Grade
from harmony_core.graders.evaluation import EvalSample, EvalSampleInteraction
from harmony_core.home import Home
from harmony_core.notifiers import JobNotifier, PendingArtifact, StdoutJobNotifier
from harmony_core.recipe.context import RecipeConfig, RecipeContext
from harmony_core.registry import Registry
from harmony_core.runs.records import find_run
from harmony_core.runs.run import Run
from harmony_core.text.threads import StringThread


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("ADAPTIVE_HOME", str(tmp_path / "home"))
    return Home.open()


@pytest.fixture
def ctx(home: Home) -> Iterator[RecipeContext]:
    """The context of a run, over a planning client: no rank is started."""
    registry, run = Registry(home), Run.create(home)

    async def start() -> HarmonyClient:
        options = EngineOptions(log_dir=run.directory / "logs", run_id=run.id, num_processes=1, dry_run=True)
        return HarmonyClient.start(options, registry, run.events.write)

    job = JobNotifier(run.id, sink=lambda *report: None, events=run.events.write)
    yield RecipeContext.create(asyncio.run(start()), run, registry, run.directory, job)
    run.finish("succeeded", 0, {})


def listed(ctx: RecipeContext) -> list[dict[str, Any]]:
    return find_run(Home.open(), ctx.run.id).artifacts()


def sample(value: float = 1.0, model: str = "model_registry://tiny@1", prompt: str = "2+2?") -> EvalSample:
    thread = StringThread([("user", prompt), ("assistant", "4")], {"row": 1})
    return EvalSample(EvalSampleInteraction(thread, model), [Grade(value, "exact", "equal")], "sums")


QUESTION = [TurnTuple("user", "2+2?")]
FOUR, FIVE = TurnTuple("assistant", "4"), TurnTuple("assistant", "5")


def test_an_evaluation_is_hidden_until_it_is_finalised(ctx: RecipeContext) -> None:
    artifact = EvaluationArtifact("sums", ctx).add_samples([sample(), sample(float("nan"))])
    assert artifact.sample_count == artifact.metadata["sample_count"] == 2
    assert artifact.kind == "eval" and artifact.processing_mode is ArtifactProcessingMode.ON_COMPLETION
    assert listed(ctx) == [] and [path.name for path in ctx.artifacts_dir.iterdir()] == [".partial"]
    assert len(artifact.file_path.read_text().splitlines()) == 2

    artifact.finalize()
    artifact.finalize()
    assert artifact.file_path == ctx.artifacts_dir / f"eval_samples_{artifact.id}.jsonl"
    (entry,) = listed(ctx)
    size = artifact.file_path.stat().st_size
    assert entry == {"id": artifact.id, "name": "sums", "kind": "eval", "bytes": size} | {
        "path": str(artifact.file_path.relative_to(ctx.run.directory)),
        "metadata": {"sample_count": 2},
    }
    with pytest.raises(UsageError, match="finalised"):
        artifact.add_samples([sample()])
    with pytest.raises(ValueError, match="empty"):
        EvaluationArtifact("none", ctx).add_samples([])


def test_the_line_of_a_sample(ctx: RecipeContext) -> None:
    artifact = EvaluationArtifact("sums", ctx).add_samples([one := sample(float("nan"))])
    line = json.loads(artifact.file_path.read_text())
    turns = [("user", "2+2?"), ("assistant", "4")]
    assert line == {
        "interaction": {
            "New": {
                "turns": [{"role": r, "content": [{"type": "text", "text": t}], "metadata": None} for r, t in turns],
                "metadata": {"row": 1},
                "completion_tokens_count": None,
                "prompt_tokens_count": None,
                "model_key": "model_registry://tiny@1",
                "usage_id": None,
            }
        },
        "grades": [{"value": None, "grader_key": "exact", "reasoning": "equal"}],
        "dataset_key": "sums",
        "id": one.id,
    }


@pytest.mark.parametrize("end", ["complete", "report_error", "close"])
def test_pending_artifacts_are_finalised_when_the_job_ends(ctx: RecipeContext, end: str) -> None:
    CustomArtifact("notes", ctx, file="notes.txt", topic="sums").write("hello")
    forgotten = CustomArtifact("forgotten", ctx, file="forgotten.txt")
    ctx.job.remove_pending_artifact(forgotten.id)
    getattr(ctx.job, end)(*["boom"] * (end == "report_error"))
    (entry,) = listed(ctx)
    assert entry["name"] == "notes" and entry["bytes"] == 5 and entry["metadata"] == {"topic": "sums"}
    assert (ctx.artifacts_dir / "notes.txt").read_text() == "hello"
    assert not (ctx.artifacts_dir / "forgotten.txt").exists()


def test_a_job_takes_artifacts_one_by_one(ctx: RecipeContext) -> None:
    job, events = ctx.job, []
    first, second = (CustomArtifact(name, ctx, file=name) for name in ("first", "second"))
    other = StdoutJobNotifier("other", events=lambda kind, data: events.append((kind, data)))
    for artifact in (first, second):
        job.remove_pending_artifact(artifact.id)
        other.add_pending_artifact(artifact, str(artifact.file_path))
    other.finalize_artifact(first, str(first.file_path))
    other.finalize_pending_artifacts()
    other.register_artifact(ModelArtifact("mine@1", ctx), session_id="taken, and without effect")
    assert [data["name"] for kind, data in events if kind == "artifact"] == ["first", "second", "mine@1"]
    assert [entry["name"] for entry in listed(ctx)] == ["mine@1"], "this job had none of its own"
    pending = PendingArtifact(first, "path")
    assert (pending.artifact, pending.file_path) == (first, "path")


def test_registering_a_pending_artifact_finalises_it(ctx: RecipeContext) -> None:
    notes = CustomArtifact("notes", ctx, file="notes.txt")
    notes.write("hello")
    ctx.job.register_artifact(notes, session_id="mine")
    assert (ctx.artifacts_dir / "notes.txt").read_text() == "hello"
    notes.finalize()
    ctx.job.complete()
    (entry,) = listed(ctx)
    assert entry["bytes"] == 5


def test_one_that_cannot_be_finalised_does_not_keep_the_others(ctx: RecipeContext, caplog: Any) -> None:
    lost = CustomArtifact("lost", ctx, file="lost.txt")
    CustomArtifact("kept", ctx, file="kept.txt")
    lost.file_path.unlink()
    with pytest.raises(ResourceError):
        lost.finalize()
    ctx.job.complete()
    assert [entry["name"] for entry in listed(ctx)] == ["kept"]
    assert f"artifact {lost.id} is lost" in caplog.text


def test_a_custom_artifact(ctx: RecipeContext, tmp_path: Path) -> None:
    artifact = CustomArtifact("notes", ctx, file="deep/notes.txt")
    assert artifact.file_path.suffix == ".txt" and artifact.read() == b""
    artifact.write("one")
    artifact.append(b", two")
    assert artifact.read() == b"one, two"
    (tmp_path / "other").write_text("three")
    artifact.copy_from(tmp_path / "other")
    artifact.finalize()
    assert (ctx.artifacts_dir / "deep" / "notes.txt").read_text() == "three"
    with pytest.raises(ResourceError, match="no-such"):
        CustomArtifact("copy", ctx, file="copy").copy_from(tmp_path / "no-such")

    bare = CustomArtifact("bare", ctx, answer=42)
    assert listed(ctx)[-1] | {"id": ""} == {
        "id": "",
        "name": "bare",
        "kind": "custom",
        "path": None,
        "bytes": None,
        "metadata": {"answer": 42},
    }
    with pytest.raises(ValueError, match="has no file"):
        _ = bare.file_path


def test_a_file_that_the_recipe_wrote_at_its_place_is_taken(ctx: RecipeContext) -> None:
    artifact = CustomArtifact("plot", ctx, file=str(ctx.artifacts_dir / "plot.svg"))
    (ctx.artifacts_dir / "plot.svg").write_text("<svg/>")
    ctx.job.complete()
    assert artifact.read() == b"<svg/>" and listed(ctx)[0]["bytes"] == 6


@pytest.mark.parametrize("file", ["../out.txt", "/etc/passwd", "", ".", "a/../../b", ".partial/x", "link/x"])
def test_no_file_leaves_the_folder(ctx: RecipeContext, tmp_path: Path, file: str) -> None:
    (ctx.artifacts_dir / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="is not a file below"):
        CustomArtifact("bad", ctx, file=file)
    assert listed(ctx) == []


def test_a_model_is_registered_at_once(ctx: RecipeContext) -> None:
    artifact = ModelArtifact("mine@1", ctx, step=3)
    assert artifact.model_key == artifact.name == "mine@1"
    assert artifact.processing_mode is ArtifactProcessingMode.ON_REGISTRATION
    assert listed(ctx)[0]["metadata"] == {"model_key": "mine@1", "step": 3}

    async def saving(model: Any, name: str, inference_only: bool) -> str:
        return f"{name}@{2 if inference_only else 3}"

    model: Any = object()
    assert asyncio.run(save_with_artifact(model, "mine", False, ctx, saving)) == "mine@3"
    assert [entry["name"] for entry in listed(ctx)] == ["mine@1", "mine@3"]
    assert BaseArtifact(ctx, "id-1", "name", "custom").id == "id-1"


ROWS: dict[AdaptiveDatasetKind, DatasetSampleType] = {
    AdaptiveDatasetKind.Prompt: DatasetPromptSample(prompt=QUESTION),
    AdaptiveDatasetKind.Completion: DatasetSample(prompt=QUESTION, completion=FOUR),
    AdaptiveDatasetKind.Metric: DatasetMetricSample(prompt=QUESTION, completion=FOUR, metrics={"good": 0.5}),
    AdaptiveDatasetKind.Preference: DatasetPreferenceSample(prompt=QUESTION, good_completion=FOUR, bad_completion=FIVE),
}
KINDS: dict[AdaptiveDatasetKind, Any] = {
    AdaptiveDatasetKind.Prompt: dataset_kinds.Prompt,
    AdaptiveDatasetKind.Completion: dataset_kinds.Completion,
    AdaptiveDatasetKind.Metric: dataset_kinds.Metric,
    AdaptiveDatasetKind.Preference: dataset_kinds.Preference,
}


def reload(artifact: DatasetArtifact, kind: Any = None, **fields: Any) -> list[StringThread]:
    parameter = Dataset if kind is None else Dataset[kind]
    return list(asyncio.run(parameter(dataset_key="rows", local_file_path=str(artifact.file_path), **fields).load()))


@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_read_again(ctx: RecipeContext, kind: AdaptiveDatasetKind) -> None:
    row = ROWS[kind]
    row.metadata = SampleMetadata(external_data={"topic": "sums"})
    artifact = DatasetArtifact("rows", ctx, kind)
    adders = [artifact.add_prompt_items, artifact.add_completion_items, artifact.add_metric_items]
    own = [*adders, artifact.add_preference_items][list(ROWS).index(kind)]
    own([row]).add_samples([row, row])  # type: ignore[operator]
    artifact.finalize()
    assert artifact.sample_count == 3 and artifact.artifact_kind == "dataset" and artifact.dataset_kind is kind
    assert listed(ctx)[0]["metadata"] == {"dataset_kind": kind.name, "sample_count": 3}
    for parameter in (KINDS[kind], None):
        rows = reload(artifact, parameter, feedback_key="good" if kind is AdaptiveDatasetKind.Metric else None)
        assert len(rows) == 3 and rows[0].metadata["topic"] == "sums"
        assert rows[0].messages() == [("user", "2+2?")]
        assert rows[0].metadata.get("preferred_completion", rows[0].completion() or "4") == "4"
        assert rows[0].metadata.get("res", 0.5) == 0.5
    for other in ROWS.values():
        if type(other) is not type(row):
            with pytest.raises(TypeError, match=type(other).__name__):
                artifact.add_samples([other])
    line = json.loads(artifact.file_path.read_text().splitlines()[0])
    assert type(KINDS[kind].parse(line)) is type(row) is type(dataset_kinds.DatasetKind.parse(line))
    with pytest.raises(ValueError, match="not a row"):
        KINDS[kind].parse({"prompt": 3})


def test_threads_become_rows(ctx: RecipeContext) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    call = {"type": "function_call", "call_id": "1", "name": "add", "arguments": "{}"}
    thread = StringThread([("user", "q"), ("assistant", "a")], {"n": 1}).with_template_kwargs(tools=tools)
    calling = asyncio.run(
        StringThread.from_fragments([("user", [{"type": "text", "text": "q"}]), ("assistant", [call])])
    )
    artifact = DatasetArtifact("rows", ctx).add_samples_from_thread([thread, calling])
    first = json.loads(artifact.file_path.read_text().splitlines()[0])
    assert first["prompt"] == [["user", [{"type": "text", "text": "q"}]]] and first["completion"] == ["assistant", "a"]
    again, called = reload(artifact)
    assert again.get_fragments() == thread.get_fragments() and again.metadata["n"] == 1
    assert again.template_kwargs["tools"] == tools
    assert called.last_turn_fragments() == [call]

    open_ended = StringThread([("user", "q")])
    prompts = DatasetArtifact("prompts", ctx, AdaptiveDatasetKind.Prompt).add_samples_from_thread([thread, open_ended])
    assert [row.messages() for row in reload(prompts)] == [[("user", "q")]] * 2
    assert DatasetArtifact("mixed", ctx).add_samples_from_thread([open_ended]).sample_count == 1
    for kind in (AdaptiveDatasetKind.Metric, AdaptiveDatasetKind.Preference, AdaptiveDatasetKind.Completion):
        with pytest.raises(ValueError, match=kind.name):
            DatasetArtifact("rows", ctx, kind).add_samples_from_thread([open_ended])


def test_log_eval_result(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    async def session() -> Path:
        async with RecipeContext.from_config(RecipeConfig(name="notebook", num_gpus=1)) as ctx:
            rows = [sample(float(n % 2), "a@1", f"{n}?") for n in range(4)]
            rows += [sample(1.0 if n else float("nan"), "b@1", f"{n}?") for n in range(4)]
            # Each cell of a notebook has the context variables from before the session was made.
            contextvars.Context().run(ctx.log_eval_result, rows)
            RecipeContext.log_eval_result(rows)
            CustomArtifact("kept", ctx, file="kept.txt")
            return ctx.run.directory

    directory = asyncio.run(session())
    said = capsys.readouterr()
    assert said.out == "" and "b@1    1.000* (1 unscored)" in said.err
    assert "exact b@1 - a@1 +0.333 +0.000 to +1.000 3" in " ".join(said.err.split())
    *found, kept = find_run(home, directory.name).artifacts()
    folder = (directory / found[0]["path"]).parent
    names = ["aggregate_scores.json", "metadata.json", "evaluation_samples.html"]
    assert [entry["name"] for entry in found] == names * 2 and folder.parent.name == "adaptive_eval_samples"
    assert json.loads((folder / "aggregate_scores.json").read_text()) == {"a@1": {"exact": 0.5}, "b@1": {"exact": 1.0}}
    about = {"total_samples": 8, "unique_prompts": 4, "models": ["a@1", "b@1"], "graders": ["exact"]}
    assert json.loads((folder / "metadata.json").read_text()) == about
    assert "2?" in (folder / "evaluation_samples.html").read_text() and kept["name"] == "kept"


def test_log_eval_result_needs_samples_and_a_run() -> None:
    with pytest.raises(UsageError, match="no samples"):
        RecipeContext.log_eval_result([])
    with pytest.raises(UsageError, match="no run"):
        RecipeContext.log_eval_result([sample()])
