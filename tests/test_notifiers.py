from __future__ import annotations

import asyncio
from typing import Any

import pytest

from harmony_core.notifiers import PlainProgress, SimpleProgressNotifier, StdoutJobNotifier


class Recorder:
    def __init__(self) -> None:
        self.progress: list[tuple[str, int, int]] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.job = StdoutJobNotifier(
            "job-1",
            sink=lambda *report: self.progress.append(report),
            events=lambda type, data: self.events.append((type, data)),
        )


def test_progress_reaches_the_sink_and_the_events() -> None:
    seen = Recorder()
    stage = seen.job.stage_notifier("SFT")
    assert (stage.job_notifier, stage.stage_name) == (seen.job, "SFT")
    stage.report_progress(10, 4)
    assert seen.progress == [("SFT", 4, 10)]
    assert seen.events == [("progress", {"stage": "SFT", "done": 4, "total": 10})]


def test_more_done_than_there_is_counts_as_all_done(caplog: pytest.LogCaptureFixture) -> None:
    seen = Recorder()
    seen.job.stage_notifier("SFT").report_progress(tot_num_samples=10, processed_num_samples=12)
    assert seen.progress == [("SFT", 10, 10)]
    assert "12 samples of 10" in caplog.text


def test_the_nearest_link_is_announced_once(capsys: pytest.CaptureFixture[str]) -> None:
    seen = Recorder()
    seen.job.set_monitoring_link("job-link")
    stage = seen.job.stage_notifier("S")
    for _ in range(2):
        stage.report_progress(2, 1)
    seen.job.report_progress("S", 2, 1, monitoring_link="")
    stage.set_monitoring_link("stage-link")
    stage.report_progress(2, 1)
    stage.report_progress(2, 2, monitoring_link="call-link")
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [f"S: watch at {link}-link" for link in ("job", "stage", "call")]
    assert captured.out == ""


def test_stages_checkpoints_and_the_end_are_events() -> None:
    seen = Recorder()
    seen.job.mark_running()
    seen.job.register_stages(["a", "b"])
    seen.job.report_checkpoint("c1", 3, 50.0, {"policy": "p@1"}, stage_name="a")
    seen.job.report_error("broken")
    seen.job.complete()
    kinds = [kind for kind, _ in seen.events]
    assert kinds == ["job.running", "job.stages", "checkpoint", "job.error", "job.complete"]
    assert seen.job.stages == ["a", "b"]
    assert seen.events[2][1] == {"id": "c1", "step": 3, "percent": 50.0, "models": {"policy": "p@1"}, "stage": "a"}


def test_plain_progress_writes_the_beginning_the_end_and_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0, 10, 29, 31, 32, 33, 33])
    monkeypatch.setattr("harmony_core.notifiers.time.monotonic", lambda: next(clock))
    job = StdoutJobNotifier(sink=PlainProgress())
    stage = job.stage_notifier("S")
    for done in (0, 1, 2, 3, 4, 9):
        stage.report_progress(9, done)
    job.stage_notifier("T").report_progress(9, 0)
    assert capsys.readouterr().err.splitlines() == ["S: 0/9", "S: 3/9", "S: 9/9", "T: 0/9"]


def test_two_jobs_share_nothing() -> None:
    first, second = StdoutJobNotifier(), StdoutJobNotifier()
    first.register_stages(["a"])
    first.set_monitoring_link("link")
    assert (second.stages, second.monitoring_link, second.job_id) == ([], None, "local")


def test_a_stage_without_samples() -> None:
    seen = Recorder()
    with SimpleProgressNotifier(seen.job.stage_notifier("load")):
        assert seen.progress == [("load", 0, 1)]

    async def run() -> None:
        async with SimpleProgressNotifier(seen.job.stage_notifier("eval")):
            pass

    asyncio.run(run())
    assert seen.progress == [("load", 0, 1), ("load", 1, 1), ("eval", 0, 1), ("eval", 1, 1)]
    with pytest.raises(KeyError), SimpleProgressNotifier(seen.job.stage_notifier("bad")):
        raise KeyError
    assert seen.progress[-1] == ("bad", 0, 1)
