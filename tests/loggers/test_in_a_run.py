"""A run that logs to a service, chosen as a user does: what arrives there, and nothing of the service on stdout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from installed import needs
from test_end_to_end import adaptive

pytestmark = pytest.mark.slow


def losses(folder: Path, **variables: str) -> list[float]:
    """Train a few steps with `variables` set, in `folder`; the losses that the run logged."""
    words = ("run", "sft", "--epochs", "0.05", "--save-as", "null")
    done = adaptive(folder / "home", folder, *words, ADAPTIVE_PROJECT="mine", **variables)
    assert "failed, and the run goes on" not in done.stderr
    (events,) = (folder / "home" / "runs").glob("*/events.jsonl")
    told = map(json.loads, events.read_text().splitlines())
    found = [event["data"]["metrics"]["loss"] for event in told if event["type"] == "metrics"]
    assert json.loads(done.stdout)["loss"] == found[-1] and len(found) == 3
    return found


@needs("wandb")
def test_wandb(tmp_path: Path) -> None:
    losses(tmp_path, WANDB_API_KEY="0" * 40, WANDB_MODE="offline")
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"completion_percentage" in file.read_bytes()


@needs("mlflow")
def test_mlflow(tmp_path: Path) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    found = losses(tmp_path, MLFLOW_TRACKING_URI=uri)
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["algorithm"] == "SFT"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == list(enumerate(found, 1))


@needs("tensorboard")
def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = losses(tmp_path, TENSORBOARD_LOGGING_DIR=str(tmp_path / "tb"))
    (folder,) = (tmp_path / "tb").iterdir()
    read = EventAccumulator(str(folder))
    read.Reload()
    values = [(event.step, event.value) for event in read.Scalars("loss")]
    assert values == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in enumerate(found, 1)]
