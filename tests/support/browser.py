"""A headless Chromium that tests open pages in: Debian's `chromium`, asked over a pipe.

Tests take the fixture `browser` of tests/conftest.py: they are skipped, and say why, where there is
no Chromium.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
MISSING = "no Chromium here (apt-get install chromium; .ci/run does so where it can)"
SECONDS = 60  # that an answer may take on a busy machine
_FLAGS = [
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
]


class Browser:
    """One Chromium process.

    Attributes:
        requests: the addresses that the open page has asked for.
        blocked: those of them that its Content-Security-Policy did not let out.
        said: lines of its console.
    """

    def __init__(self, profile: str) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        words = [CHROMIUM, *_FLAGS, *root, f"--user-data-dir={profile}", "about:blank"]
        # The browser reads from descriptor 3 and writes to 4. High copies first: 3 or 4 may be
        # among the pipe's own.
        high = [os.dup2(end, 60 + i) for i, end in enumerate((theirs_in, theirs_out))]
        shell = f'exec 3<&{high[0]} 4>&{high[1]}; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *words],
            pass_fds=high,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        self._in, self._out = ours_in, ours_out
        self._rest, self._number, self._session = b"", 0, None
        self.requests: list[str] = []
        self.blocked: list[str] = []
        self._asked: dict[str, str] = {}
        self.said: list[str] = []
        self._loaded = False
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._ask(f"{domain}.enable")

    def open(self, path: Path, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Load a file at a size, in light or dark, and wait until it is there."""
        self.resize(width, height)
        self.emulate(dark=dark)
        self.requests, self.blocked, self.said, self._loaded = [], [], [], False
        self._ask("Page.navigate", url=path.resolve().as_uri())
        self._until(lambda: self._loaded)

    def resize(self, width: int, height: int = 900) -> None:
        """Make the window this many CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._ask("Emulation.setDeviceMetricsOverride", **size)

    def emulate(self, *, dark: bool = False, media: str = "") -> None:
        """Prefer dark or light; `media` is "print" or nothing."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def js(self, code: str) -> Any:
        """Return the value of an expression in the page."""
        answer = self._ask("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str, code: int = 0) -> None:
        """Press and release a key: `Tab` (9), `Enter` (13), ..."""
        for kind in ("keyDown", "keyUp"):
            keys = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            keys |= {"text": "\r"} if key == "Enter" else {}
            self._ask("Input.dispatchKeyEvent", type=kind, **keys)

    def overflow(self) -> int:
        """Return how many pixels the page is wider than its window."""
        return self.js("document.documentElement.scrollWidth - window.innerWidth")

    def accessible(self) -> list[tuple[str, str]]:
        """Return role and name of every node that a screen reader meets."""
        nodes = self._ask("Accessibility.getFullAXTree")["nodes"]
        known = [node for node in nodes if not node.get("ignored")]
        return [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in known]

    def screenshot(self, path: Path) -> None:
        """Write the whole page as PNG."""
        size = self._ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self._ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, path: Path) -> None:
        """Print the page, on A4."""
        paper = {"paperWidth": 8.27, "paperHeight": 11.69}
        path.write_bytes(base64.b64decode(self._ask("Page.printToPDF", **paper)["data"]))

    def close(self) -> None:
        """End the process and those it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._in)
        os.close(self._out)

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        answers: list[dict] = []
        self._until(lambda: bool(answers), self._number, answers)
        if "error" in answers[0]:
            raise RuntimeError(f"{method}: {answers[0]['error']['message']}")
        return answers[0]["result"]

    def _until(self, done: Any, number: int = -1, answers: list | None = None) -> None:
        """Read what the browser says until `done`."""
        end = time.monotonic() + SECONDS
        while not done():
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            block = os.read(self._in, 2**20) if ready else b""
            if not block:
                raise RuntimeError("Chromium went away" if ready else "Chromium does not answer")
            *messages, self._rest = (self._rest + block).split(b"\0")
            for message in map(json.loads, messages):
                if message.get("id") == number and answers is not None:
                    answers.append(message)
                self._note(message.get("method"), message.get("params", {}))

    def _note(self, event: str | None, params: dict) -> None:
        if event == "Network.requestWillBeSent":
            self._asked[params["requestId"]] = params["request"]["url"]
            self.requests.append(params["request"]["url"])
        elif event == "Network.loadingFailed" and params.get("blockedReason") == "csp":
            self.blocked.append(self._asked[params["requestId"]])
        elif event == "Page.loadEventFired":
            self._loaded = True
        elif event == "Log.entryAdded":
            self.said.append(params["entry"]["text"])
        elif event == "Page.javascriptDialogOpening":
            self.said.append(f"dialog: {params['message']}")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a browser with a profile of its own for the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        try:
            yield browser
        finally:
            browser.close()
