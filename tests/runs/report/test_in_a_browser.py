"""The report in headless Chromium: drawn, usable, in both colour schemes and on a phone, and alone with itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import report_runs
from browser import Page, browsing, find_browser

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    run = report_runs.write_rl_run(tmp_path_factory.mktemp("home"))
    assert BROWSER is not None
    with browsing(BROWSER, tmp_path_factory.mktemp("profile")) as opened:
        opened.look(1280)
        opened.open(run.directory / "report.html")
        yield opened


@pytest.fixture(autouse=True)
def nothing_is_fetched_or_complained_about(page: Page) -> Iterator[None]:
    yield
    assert page.said == []
    assert len(page.requests) == 1 and page.requests[0].endswith("/report.html")
    assert "owned" not in page.run("document.title")


def size_of_picture(page: Page, file: Path) -> int:
    """Bytes of a picture of the window: one colour alone compresses to next to nothing."""
    page.picture(file)
    return file.stat().st_size


def test_curves_are_drawn(page: Page, tmp_path: Path) -> None:
    assert page.run("document.querySelectorAll('.chart').length") == 6
    drawn = page.run(
        "[...document.querySelectorAll('.chart')].map((c) => [...c.querySelectorAll('path.line')].map((l) => ({"
        "box: l.getBBox().width, stroke: getComputedStyle(l).stroke, fill: getComputedStyle(l).fill})))"
    )
    assert [len(lines) for lines in drawn] == [2, 1, 2, 2, 1, 2]
    assert all(line["box"] > 50 and line["stroke"] != "none" and line["fill"] == "none" for c in drawn for line in c)
    assert len({line["stroke"] for line in drawn[0]}) == 2
    labels = page.run("[...document.querySelectorAll('.chart:first-child text')].map((t) => t.textContent)")
    assert {"0", "4", "100"} <= set(labels)
    inside = page.run(
        "[...document.querySelectorAll('.chart')].every((c) => [...c.querySelectorAll('text')].every((t) => {"
        " const a = t.getBoundingClientRect(), b = c.getBoundingClientRect();"
        " return a.left >= b.left && a.right <= b.right && a.top >= b.top && a.bottom <= b.bottom; }))"
    )
    assert inside, "a label leaves its card"
    assert size_of_picture(page, tmp_path / "light.png") > 20_000


def test_values_under_the_pointer(page: Page) -> None:
    rest = page.run("document.querySelector('.chart .reading').textContent")
    page.point(".chart svg", across=0.2)
    near = page.run("document.querySelector('.chart .reading').textContent")
    assert near != rest and near.count("at step") == 2 and "SFT" in near and "GRPO" in near
    page.point(".chart svg", across=0.99)
    assert "at step 120" in page.run("document.querySelector('.chart .reading').textContent")
    assert page.run("document.querySelector('.chart .cross').getAttribute('visibility')") == "visible"
    page.point("h1")
    assert page.run("document.querySelector('.chart .reading').textContent") == rest


def test_arrow_keys_read_values_too(page: Page) -> None:
    page.run("document.querySelector('.chart:nth-child(2) svg').focus()")
    for _ in range(2):
        for kind in ("keyDown", "keyUp"):
            page.send("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight")
    assert "at step 2," in page.run("document.querySelector('.chart:nth-child(2) .reading').textContent")
    page.run("document.activeElement.blur()")


def changed(page: Page, id: str, event: str, change: str) -> str:
    script = f"(() => {{ const e = document.getElementById('{id}'); {change}; e.dispatchEvent(new Event('{event}'));"
    page.run(f"{script} return 1; }})()")
    return str(page.run("document.querySelector('.chart path.line').getAttribute('d')"))


def test_log_scale_smoothing_time_and_filter(page: Page) -> None:
    plain = page.run("document.querySelector('.chart path.line').getAttribute('d')")
    logarithmic = changed(page, "log", "change", "e.checked = true")
    labels = page.run("[...document.querySelectorAll('.chart:first-child text')].map((t) => t.textContent)")
    assert logarithmic != plain and "1" in labels and "0" not in labels[:-3]
    assert changed(page, "log", "change", "e.checked = false") == plain
    assert changed(page, "smooth", "input", "e.value = 0.9") != plain
    assert page.run("document.querySelectorAll('.chart:first-child path.raw').length") == 2
    assert changed(page, "smooth", "input", "e.value = 0") == plain
    assert changed(page, "time-axis", "change", "e.checked = true") != plain
    assert any(
        "s" in t
        for t in page.run("[...document.querySelectorAll('.chart:first-child text')].map((t) => t.textContent)")
    )
    changed(page, "time-axis", "change", "e.checked = false")
    changed(page, "filter", "input", "e.value = 'KL'")
    assert page.run("[...document.querySelectorAll('.chart')].filter((c) => !c.hidden).length") == 1
    changed(page, "filter", "input", "e.value = ''")


def test_trained_tokens_are_coloured(page: Page) -> None:
    styles = page.run(
        "['.t.up.w4', '.t.down.w4', '.t.w4:not(.up):not(.down)', '.text'].map((s) =>"
        " getComputedStyle(document.querySelector('article ' + s)).backgroundColor)"
    )
    assert len(set(styles)) == 4 and styles[3] == "rgba(0, 0, 0, 0)"
    text = page.run("[...document.querySelectorAll('article .text')].map((t) => t.textContent)")
    assert report_runs.HOSTILE in text and "é 😀 \n\tend" in text


def choose(page: Page, id: str, value: str) -> None:
    chosen = f"e.value = '{value}'; e.dispatchEvent(new Event('change'))"
    page.run(f"(() => {{ const e = document.getElementById('{id}'); {chosen}; }})()")


def test_samples_by_step_and_reward(page: Page) -> None:
    visible = "[...document.querySelectorAll('.sample')].filter((c) => c.getClientRects().length)"
    assert set(page.run(f"{visible}.map((c) => c.dataset.step)")) == {"GRPO step 120"}, "the newest step comes first"
    choose(page, "sample-step", "")
    assert page.run(f"{visible}.length") == 55
    choose(page, "sample-order", "high")
    rewards = page.run(f"{visible}.map((c) => parseFloat(c.dataset.reward)).filter((r) => r > 0)")
    assert rewards == sorted(rewards, reverse=True) and len(rewards) > 20


@pytest.mark.parametrize("width", [360, 390, 768, 1280, 1920])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_any_width_and_colour_scheme(page: Page, width: int, dark: bool, tmp_path: Path) -> None:
    page.look(width, dark=dark)
    assert page.run("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    widths = page.run(
        "[...document.querySelectorAll('.chart svg')].map((s) => [s.clientWidth, s.viewBox.baseVal.width])"
    )
    assert all(shown == drawn > 150 for shown, drawn in widths), "a curve was not drawn anew for the width"
    colours = page.run(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('h1')).color]"
    )
    levels = [sum(int(part) for part in re.findall(r"\d+", colour)[:3]) / 3 for colour in colours]
    background, text = levels
    assert (background < 60 and text > 200) if dark else (background > 200 and text < 60)
    assert size_of_picture(page, tmp_path / "shot.png") > 8_000
    page.look(1280)
