"""A headless Chromium that tests talk to through two pipes, by Python's own library alone."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")

# the browser reads from 3 and writes to 4, which the pipes' own numbers may be
_PLACE = """
import os, sys
high = [os.dup2(int(fd), 100 + i) for i, fd in enumerate(sys.argv[1:3])]
for fd, place in zip(high, (3, 4)):
    os.dup2(fd, place)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One browser with one page. `errors` are what its console has said that is no plain message.

    **Raises:** `TimeoutError` from every call that gets no answer in `patience` seconds.
    """

    def __init__(self, folder: Path, patience: float = 60.0) -> None:
        assert PROGRAM is not None, "there is no chromium"
        self._patience, self._buffer, self._number = patience, b"", 0
        self.errors: list[str] = []
        self._events: list[dict[str, Any]] = []
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()

        words = [
            *(PROGRAM, "--headless=new", "--no-sandbox", "--remote-debugging-pipe"),
            *("--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"),
            *("--disable-background-networking", "--disable-extensions"),
            *(f"--user-data-dir={folder}", "about:blank"),
        ]
        ends = to_browser, from_browser
        self._process = subprocess.Popen(
            [sys.executable, "-SE", "-c", _PLACE, *map(str, ends), *words],
            pass_fds=ends, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._session: str | None = None
        target = self._pick()
        answer = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = answer["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _pick(self) -> str:
        for _ in range(100):
            for info in self.call("Target.getTargets")["targetInfos"]:
                if info["type"] == "page":
                    return info["targetId"]
            time.sleep(0.05)
        raise TimeoutError("the browser opened no page")

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(timeout=self._patience)
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Return what the browser answers to a command of the DevTools protocol."""
        self._number += 1
        said: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            said["sessionId"] = self._session
        os.write(self._write, json.dumps(said).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + self._patience
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._read, 1 << 20)
            if not part:
                raise RuntimeError("the browser has ended")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        self._events.append(event)
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"])[:600])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(json.dumps(params["args"])[:600])
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, page: Path, width: int = 1366, height: int = 900, dark: bool = False) -> None:
        """Open a page of such a width, in the light or the dark colour scheme, and draw it all."""
        self.errors.clear()
        self.requests: list[str] = []
        self._events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height,
            deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.as_uri())
        end = time.monotonic() + self._patience
        while not any(event.get("method") == "Page.loadEventFired" for event in self._events):
            if time.monotonic() > end:
                raise TimeoutError("the page does not load")
            self._note(self._next())
        self.run("window.onbeforeprint && window.onbeforeprint()")

    def run(self, code: str) -> Any:
        """Return the value of an expression of the page, as JSON can hold it."""
        answer = self.call(
            "Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:800])
        return answer["result"].get("value")

    def picture(self, path: Path, whole: bool = False) -> None:
        """Write a picture of what is on the screen, or of the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
