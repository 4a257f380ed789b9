"""A home that an earlier version wrote is read by this one: models, an alias, an adapter, runs, a stopped training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harmony_core.cli import main

from data_from_before.make import unpack
from test_end_to_end import adaptive, events, result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("before")


@pytest.fixture(scope="module")
def expected(folder: Path) -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ADAPTIVE_HOME", str(folder / "home"))
        yield unpack(folder)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """The object that a command prints."""
    capsys.readouterr()
    assert main([*words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_its_models_are_listed_verified_and_found_by_alias(
    expected: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    models = {model["key"]: model for model in said(capsys, "models", "list")["models"]}
    assert {key: model["versions"] for key, model in models.items()} == {"adapter": [1, 2], "trained": [1]}
    assert models["adapter"]["aliases"] == {"good": 1}
    assert main(["models", "verify"]) == 0
    shown = said(capsys, "models", "show", "adapter@good")
    assert shown["model"]["ref"] == "adapter@1" and shown["model"]["base"] == "builtin:tiny-lm"
    assert shown["model"]["defaults"]["tokens_to_generate"]["value"] == 32


def test_its_runs_are_listed_and_their_reports_written_anew(
    expected: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {run["id"]: run for run in said(capsys, "runs", "list")["runs"]}
    assert {run["status"] for run in runs.values()} == {"succeeded", "stopped"}
    report = folder / "home" / "runs" / expected["runs"]["finished"] / "report.html"
    assert not report.exists()
    assert main(["runs", "report", expected["runs"]["finished"]]) == 0
    page = report.read_text("utf-8")
    assert "adapter@1" in page and "checkpoint" in page


def test_its_stopped_run_goes_on_to_the_same_end_and_its_models_score_the_same(
    expected: dict[str, Any], folder: Path
) -> None:
    run = expected["runs"]["stopped"]
    before = len(events(folder / "home", run, "optim_step"))
    assert 0 < before < len(expected["losses"])
    done = adaptive(folder / "home", folder, "run", "--resume", run, "--json")
    assert "SFT goes on at" in done.stderr
    found = result(done)
    assert found["run"] == run and found["result"]["saved"] == "resumed@1"
    losses = [event["data"]["loss"] for event in events(folder / "home", run, "optim_step")]
    assert losses == pytest.approx(expected["losses"], abs=1e-5)
    for reference, logprobs in expected["logprobs"].items():
        for now, then in zip(found["result"]["logprobs"][reference], logprobs, strict=True):
            assert now == pytest.approx(then, abs=1e-4), reference
