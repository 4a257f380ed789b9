"""What the page says of a run, as a parser reads it: everything is there, nothing runs, nothing is fetched."""

from __future__ import annotations

import json
import os
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import report_runs
from harmony_core.home import Home
from harmony_core.loggers import EventLogger
from harmony_core.redaction import MASK, Redactor
from harmony_core.runs.records import list_runs
from harmony_core.runs.report.page import build_report, write_report
from harmony_core.runs.report.reading import read_run, thinned
from harmony_core.runs.run import Run

VOID = {"meta", "img", "br", "link", "input"}


class Reader(HTMLParser):
    """The page as elements: it fails on one that is not closed where it was opened."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, dict(attrs).get("id")))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, id in self._open:
            if id:
                self.texts.setdefault(id, []).append(data)

    def text(self, id: str) -> str:
        return " ".join("".join(self.texts.get(id, [])).split())

    def named(self, tag: str, class_: str | None = None) -> list[dict[str, str | None]]:
        return [
            found
            for name, found in self.elements
            if name == tag and (class_ is None or class_ in (found.get("class") or "").split())
        ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return report_runs.write_rl_run(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def page(run: Run) -> str:
    return (run.directory / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def read(page: str) -> Reader:
    return Reader(page)


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    data = json.loads(found[1])
    assert isinstance(data, dict)
    return data


def test_a_finished_run_has_its_report(run: Run, read: Reader) -> None:
    assert "sft_then_grpo succeeded" in read.text("top") and run.id in read.text("top")
    assert "optimizer steps160" in read.text("top") and "saved grpo@1" in read.text("top")
    assert "holds" in read.text("gates") and "0.93 >= 0.9" in read.text("gates")


def test_every_metric_has_a_curve(page: str) -> None:
    charts = dict(data_of(page)["charts"])
    assert list(charts)[:2] == ["loss", "rewards/mean"]
    assert "The last values:loss 0.2" in Reader(page).text("curves")
    assert set(charts) == {"loss", "rewards/mean", "grad_norm", "lr", "policy/kl", "completion_percentage"}
    sft, grpo = charts["loss"]
    assert (sft["stage"], grpo["stage"]) == ("SFT", "GRPO")
    assert (len(sft["p"]), len(grpo["p"]), grpo["p"][-1][0]) == (40, 120, 120)
    assert charts["policy/kl"][0]["bad"] == 1
    assert charts["grad_norm"][0]["high"] > 9


def test_samples_with_rewards_and_trained_tokens(read: Reader) -> None:
    cards = read.named("article", "sample")
    assert 40 < len(cards) <= 60 and cards[-1]["data-step"] == "GRPO step 120" and cards[-1]["data-reward"]
    text = read.text("samples")
    assert "55 of 100 recorded" in text and "I would sort these letters as a, b, c, d and e." in text
    assert report_runs.HOSTILE in text
    tokens = read.named("i", "t")
    assert {"up", "down"} < {word for token in tokens for word in (token["class"] or "").split()}
    assert any("probability" in (token.get("title") or "") for token in tokens)
    assert read.named("span", "r0") and read.named("span", "r4")


def test_time_drops_models_and_configuration(read: Reader) -> None:
    times = read.text("time")
    sft, _, grpo = times.partition("GRPO")
    assert "SFT 24.8 s, 40 steps" in sft and "rollout" not in sft
    assert re.search(r"rollout108\.0 s54\.\d%0\.90 s", grpo) and "waiting" in grpo
    assert "sample_too_long40" in read.text("dropped") and "the sample has 9000 tokens" in read.text("dropped")
    # Completions without a score are counted beside the samples that were dropped, not with them.
    assert "Dropped samples40 of" in read.text("dropped") and "unscored_grade_timed_out60–" in read.text("dropped")
    models = read.text("models")
    assert "policy tiny@3 for train" in models and "324,000 parameters" in models and "held by 2 ranks" in models
    assert "kv144.0 MiB144.0 MiB" in models
    assert "lr0.001--lr" in read.text("config") and "config.yaml:4:7" in read.text("config")
    environment = read.text("environment")
    assert "adaptive run sft_then_grpo --lr 1e-3" in environment and "torch" in environment
    assert "warning: something <odd>" in environment


def test_nothing_in_it_runs_or_fetches(page: str, read: Reader) -> None:
    assert [found.get("type") for found in read.named("script")] == ["application/json", None]
    assert not read.named("img") and not read.named("link") and not read.named("iframe")
    for _, attributes in read.elements:
        assert not {"src", "style", "srcset"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("href") or "#").startswith("#")
    outside = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert "http://" not in outside.replace("http-equiv", "") and "https://" not in outside and "url(" not in page
    script = page.rpartition("<script>")[2]
    assert not re.search(r"fetch\(|XMLHttpRequest|WebSocket|import\(|eval\(|innerHTML", script)


def test_a_failed_run_says_why_and_shows_the_log(tmp_path: Path) -> None:
    read = Reader((report_runs.write_failed_run(tmp_path).directory / "report.html").read_text("utf-8"))
    assert "failed" in read.text("top") and "exit code5" in read.text("top")
    assert "rank 1: gradients are not finite hint: lower lr" in read.text("failure")
    assert "Traceback (most recent call last): boom" in read.text("failure")


def test_a_killed_run_has_a_report_too(tmp_path: Path) -> None:
    run = report_runs.write_rl_run(tmp_path, steps=6, finish=False)
    assert run._lock is not None
    run._lock.close()  # as the kernel does when the process ends
    (record,) = list_runs(Home.open(tmp_path))
    with (run.directory / "events.jsonl").open("a") as file:
        file.write('{"v": 1, "seq": 999, "ts": "2026-')
    page = build_report(record.directory, status=record.status)
    read = Reader(page)
    assert "crashed" in read.text("top") and "it was killed" in read.text("failure")
    assert len(dict(data_of(page)["charts"])["loss"][1]["p"]) == 6
    assert "1 lines of events.jsonl could not be read" in page
    run.events.close()


def test_an_empty_run_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{damaged")
    read = Reader(build_report(tmp_path))
    assert "run unknown" in read.text("top")


def test_secrets_reach_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = ["canary-in-environment", "canary&in<config>"]
    monkeypatch.setenv("WANDB_API_KEY", canaries[0])
    mask = Redactor.from_environment(os.environ).knowing({"secret": canaries[1]})
    run = Run.create(Home.open(tmp_path), "x", ["run", "--api-key", canaries[1]], mask)
    run.events.write("config.resolved", {"config": {"note": canaries[1], "api_key": canaries[1]}})
    run.events.write("samples.dropped", {"reasons": {"x": 1}, "last": f"{canaries[0]} {canaries[1]}"})
    run.finish("failed", 1, {"errors": [{"lines": [f"no access with {canaries[1]}"]}]})
    monkeypatch.delenv("WANDB_API_KEY")
    page = build_report(run.directory)
    for secret in (*canaries, "canary&amp;in"):
        assert secret not in page
    assert page.count(MASK) >= 5
    assert page == (run.directory / "report.html").read_text("utf-8")


@pytest.mark.timeout(120, method="signal")  # quadratic work would take minutes
def test_a_long_run_keeps_the_page_small_and_says_so(tmp_path: Path) -> None:
    run = Run.create(Home.open(tmp_path), "long")
    logger = EventLogger(run.events.write)
    spikes = {f"metric/{number}": 17 * number + 5 for number in range(30)}
    lines = run.directory / "events.jsonl"
    logger(dict.fromkeys(spikes, 0.5))
    template = json.loads(lines.read_text().splitlines()[-1])
    with lines.open("a") as file:
        for step in range(2, 6001):
            metrics = {name: 99.0 if spike == step else 0.123456789 for name, spike in spikes.items()}
            file.write(json.dumps({**template, "data": {"step": step, "metrics": metrics}}) + "\n")
    run.finish("succeeded", 0, {})
    page = (run.directory / "report.html").read_text("utf-8")
    assert len(page) < 2**20
    charts = dict(data_of(page)["charts"])
    assert all(series["high"] == (99.0 if spikes[name] > 1 else 0.5) for name, (series,) in charts.items())
    assert max(max(p[4] if len(p) > 3 else p[2] for p in series["p"]) for (series,) in charts.values()) == 99.0
    assert "A curve has at most 400 points: neighbouring steps are one point" in page


def test_samples_are_thinned_by_whole_steps() -> None:
    samples = [{"step": step, "n": n} for step in range(1, 101) for n in range(4)]
    kept = thinned(samples, 60)
    steps = sorted({sample["step"] for sample in kept})
    assert len(kept) <= 60 and steps[0] == 1 and steps[-1] == 100
    assert all(sum(sample["step"] == step for sample in kept) == 4 for step in steps)
    assert len(thinned([{"step": 1}] * 500, 60)) == 60


def test_a_resumed_run_goes_on_in_one_curve(tmp_path: Path) -> None:
    run = Run.create(Home.open(tmp_path), "resumed")
    for start in (0, 3):
        logger = EventLogger(run.events.write)
        logger.set_state({"step": start})
        logger.log_config({"algorithm": "SFT", "lr": 1})
        for _ in range(3):
            logger({"loss": 1.0})
    EventLogger(run.events.write)({"loss": 2.0})
    stages = read_run(run.directory).stages
    assert [(stage.name, len(stage.curves["loss"].points)) for stage in stages] == [("SFT", 6), ("SFT", 1)]
    run.finish("stopped", 130, {})


def test_stages_that_log_in_turns_are_told_apart(tmp_path: Path) -> None:
    run = Run.create(Home.open(tmp_path), "turns")
    first, second = EventLogger(run.events.write), EventLogger(run.events.write)
    for _ in range(10):
        first({"loss": 1.0})
    for _ in range(30):
        second({"loss": 2.0})
        first({"loss": 1.0})
    stages = read_run(run.directory).stages
    assert [[point.mean for point in stage.curves["loss"].points] for stage in stages] == [[1.0] * 40, [2.0] * 30]
    run.finish("stopped", 130, {})


def test_events_of_any_shape_make_a_page(run: Run, tmp_path: Path) -> None:
    """What stands in a file may be anything: one value of each event, at any depth, becomes something else."""
    values: list[Any] = [None, -1, 1e308, "nan", "", "<b>", [], [[]], {}, {"x": 1}, True]
    events = [json.loads(line) for line in (run.directory / "events.jsonl").read_text().splitlines()]
    draw = random.Random(0)
    for _ in range(40):
        lines = [json.dumps(spoilt(event, draw, values)) for event in events]
        (tmp_path / "events.jsonl").write_text("\n".join(lines))
        for name in ("run", "result", "sources"):
            (tmp_path / f"{name}.json").write_text(
                json.dumps(draw.choice([{"errors": values}, {"lr": values}, 1, values]))
            )
        Reader(build_report(tmp_path))


def spoilt(value: Any, draw: random.Random, values: list[Any]) -> Any:
    """The value with one place in it replaced, each level with the same chance."""
    if draw.random() < 0.15 or not value or not isinstance(value, dict | list):
        return draw.choice(values)
    place = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place] = spoilt(value[place], draw, values)
    return copy


def test_without_logged_metrics_the_optimizers_are_shown(tmp_path: Path) -> None:
    run = Run.create(Home.open(tmp_path), "own loop")
    for step in (1, 2):
        run.events.write("optim_step", {"model": "policy", "loss": 1.0 / step, "lr": 0.1, "step": step})
    run.finish("succeeded", 0, {})
    page = (run.directory / "report.html").read_text("utf-8")
    assert [name for name, _ in data_of(page)["charts"]] == ["policy/loss"]
    assert "Never changed: " in page and "policy/lr <b>0.1</b>" in page, "what never changes is no curve"


def test_a_report_that_cannot_be_made_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> str:
        raise KeyError("a bug")

    monkeypatch.setattr("harmony_core.runs.report.page.read_run", broken)
    run = Run.create(Home.open(tmp_path), "x")
    run.finish("succeeded", 0, {})
    assert list_runs(Home.open(tmp_path))[0].status == "succeeded"
    assert "no report of run" in caplog.text
    monkeypatch.undo()
    assert write_report(run.directory).is_file()
