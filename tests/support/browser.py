"""A real browser for tests of the web page, without a driver: DevTools messages over two pipes.

The protocol is JSON texts, each ended by a zero byte (chromium --remote-debugging-pipe).
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.network import ThreeHosts

_PATIENCE = 30.0
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # in a container it may be small
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


def program() -> str:
    """Return the browser's path, or skip the test; where there is one, CI must have it."""
    found = shutil.which("chromium")
    if found and Path(found).resolve().name != "snap":
        return found
    release = Path("/etc/os-release").read_text().splitlines()
    if os.environ.get("CI") == "true" and "ID=debian" in release:
        pytest.fail("CI must run every test, but there is no chromium: run `make test`")
    pytest.skip("needs the browser of Debian's package chromium: `make test` installs it there")


class Browser:
    """A browser in a namespace that shows one page; a context manager."""

    def __init__(self, lab: ThreeHosts, place: str, url: str, directory: Path) -> None:
        self.errors: list[str] = []
        """What went wrong in the page: exceptions, and what the browser itself complained of."""
        self._number, self._session, self._unread = 0, "", b""
        read_end, self._write = os.pipe()
        self._read, write_end = os.pipe()
        command = [program(), *_OPTIONS, f"--user-data-dir={directory / 'browser'}"]
        # The browser reads commands from descriptor 3 and answers on 4.
        pipes = f'exec "$@" 3<&{read_end} 4>&{write_end} {read_end}<&- {write_end}>&-'
        self._log = (directory / "browser.log").open("wb")
        self._process = subprocess.Popen(
            ["bash", "-c", pipes, "bash", *lab.command(place, *command)],
            pass_fds=(read_end, write_end),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        os.close(read_end)
        os.close(write_end)
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Runtime", "Log", "Page"):
                self.call(f"{domain}.enable")
            self.call("Page.navigate", url=url)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the browser."""
        os.close(self._write)
        os.close(self._read)
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def call(self, method: str, **parameters: Any) -> Any:
        """Carry out a command of the DevTools protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + _PATIENCE
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._read], [], [], max(0, end - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            assert data, f"the browser is silent: {Path(self._log.name).read_text()}"
            self._unread += data
        text, _, self._unread = self._unread.partition(b"\0")
        answer: dict[str, Any] = json.loads(text)
        return answer

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(event["params"]["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded":
            entry = event["params"]["entry"]
            if entry["level"] == "error":
                self.errors.append(f"{entry['text']} {entry.get('url', '')}")

    def value(self, expression: str) -> Any:
        """Return what a JavaScript expression yields in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def text(self, element: str) -> str:
        """Return the text that an element of this id shows, "" before it is there."""
        return str(self.value(f"document.getElementById({element!r})?.innerText ?? ''"))

    def rows(self, element: str) -> list[list[str]]:
        """Return the texts of the cells of the table in an element, its head first."""
        rows = f"[...document.querySelectorAll('#{element} tr')]"
        found: list[list[str]] = self.value(
            f"{rows}.map((row) => [...row.cells].map((cell) => cell.textContent))"
        )
        return found

    def look(self, width: int, height: int, scheme: str) -> None:
        """Make the window so big, and the user prefer light or dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        preferred = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=preferred)

    def screenshot(self, file: Path) -> None:
        """Write a picture of what the window shows."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
