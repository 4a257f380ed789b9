"""Headless Chromium for tests, driven over a pair of pipes with its DevTools protocol; no package is needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DEADLINE = 60.0


def find_browser() -> str | None:
    """The first browser there is; `ADAPTIVE_TEST_BROWSER` names another."""
    chosen = os.environ.get("ADAPTIVE_TEST_BROWSER")
    return chosen or next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One open page. `requests`: what it asked of the network; `said`: what it wrote to the console or threw."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._number = 0
        self._rest = b""
        self._session: str | None = None
        self._events: list[str] = []
        self.requests: list[str] = []
        self.said: list[str] = []

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(deadline - time.monotonic(), 0))
            assert ready, "the browser does not answer"
            part = os.read(self._from, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return cast(dict[str, Any], json.loads(message))

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + DEADLINE
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return cast(dict[str, Any], answer["result"])
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        method, data = event.get("method", ""), event.get("params", {})
        self._events.append(method)
        if method == "Network.requestWillBeSent":
            self.requests.append(data["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = data["exceptionDetails"]
            self.said.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Log.entryAdded":
            self.said.append(data["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.said.append(" ".join(str(argument.get("value")) for argument in data["args"]))

    def attach(self) -> None:
        """Make a page and listen to it."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def open(self, file: Path) -> None:
        """Load a file and wait until it has loaded."""
        self._events.clear()
        self.send("Page.navigate", url=file.as_uri())
        deadline = time.monotonic() + DEADLINE
        while "Page.loadEventFired" not in self._events:
            self._note(self._receive(deadline))

    def look(self, width: int, height: int = 900, dark: bool = False, scale: float = 1) -> None:
        """A window of this size in CSS pixels, and the colour scheme that its user prefers."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 500}
        self.send("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is awaited."""
        done = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def point(self, selector: str, across: float = 0.5, down: float = 0.5) -> None:
        """Move the mouse over an element, to a share of its width and height."""
        script = """((selector) => {
            const found = document.querySelector(selector);
            found.scrollIntoView({block: "center", behavior: "instant"});
            const box = found.getBoundingClientRect();
            return [box.x, box.y, box.width, box.height];
        })"""
        box = self.run(f"{script}({json.dumps(selector)})")
        x, y = box[0] + box[2] * across, box[1] + box[3] * down
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, file: Path, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browsing(executable: str, profile: Path) -> Iterator[Page]:
    """A page in a browser of its own, which is gone afterwards."""
    read_commands, write_commands = os.pipe()
    read_answers, write_answers = os.pipe()
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    # The browser reads commands from its descriptor 3 and answers on 4.
    shell = f'exec 3<&{read_commands} 4>&{write_answers}; exec "$0" "$@"'
    command = [
        "/bin/bash",
        "-c",
        shell,
        executable,
        *arguments,
        f"--user-data-dir={profile}",
        "--remote-debugging-pipe",
    ]
    process = subprocess.Popen(
        command,
        pass_fds=(read_commands, write_answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(read_commands)
    os.close(write_answers)
    page = Page(write_commands, read_answers)
    try:
        page.attach()
        yield page
    finally:
        os.close(write_commands)
        os.close(read_answers)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
