"""Headless Chromium over its own debugging pipe: no driver and no package whose version would have to fit the browser's."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next((found for name in NAMES if (found := shutil.which(name))), None)
ABSENT = "Chromium is missing, and the viewer is tested in it: apt-get install --no-install-recommends chromium"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe")


class Browser:
    """One page of 1280 x 800. `errors`: what the console and uncaught exceptions said, and requests for anything but the file."""

    def __init__(self, profile: Path) -> None:
        assert PROGRAM, ABSENT
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        command = [PROGRAM, *FLAGS, "--window-size=1280,800", f"--user-data-dir={profile}", "about:blank"]
        ends = f'exec 3<&{to_read} 4>&{to_write}; exec "$@"'  # the browser reads commands from 3 and answers on 4
        with (profile.parent / "chromium.log").open("wb") as log:
            self._process = subprocess.Popen(["bash", "-c", ends, "bash", *command], pass_fds=(to_read, to_write), stdout=log, stderr=log)
        os.close(to_read)
        os.close(to_write)
        self._numbers, self._buffer, self.errors = itertools.count(1), b"", list[str]()
        self._session = ""
        target = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=1280, height=800, deviceScaleFactor=1, mobile=False)

    def send(self, method: str, **parameters: Any) -> Any:
        """One command of the DevTools protocol and its answer."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, **({"sessionId": self._session} if self._session else {})}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def open(self, path: Path, fragment: str = "") -> None:
        """Load a file as a double click does, and wait until it is there."""
        self.errors.clear()
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=f"{path.resolve().as_uri()}{fragment}")
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is awaited."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until the condition holds in the page; AssertionError after ten seconds."""
        look = f"if ({condition}) done(true); else if (Date.now() > end) done(false); else setTimeout(look, 20);"
        waiting = f"new Promise((done) => {{ const end = Date.now() + 10000; (function look() {{ {look} }})(); }})"
        assert self.run(waiting), f"never so: {condition}"

    def click(self, element: str) -> None:
        """Click on what a selector names, near its upper left, where the head of a module is."""
        seen = f"const e = document.querySelector({json.dumps(element)}); e.scrollIntoView({{block: 'nearest', inline: 'nearest'}});"
        place = "const b = e.getBoundingClientRect(); return [b.left + Math.min(b.width / 2, 60), b.top + Math.min(b.height / 2, 12)];"
        x, y = self.run(f"(() => {{ {seen} {place} }})()")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, key: str) -> None:
        """Press and release a key."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def write(self, text: str) -> None:
        """Type text into what has the focus."""
        self.send("Input.insertText", text=text)

    def picture(self, path: Path) -> Path:
        """A screenshot."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))
        return path

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.send("Page.printToPDF", preferCSSPageSize=True)["data"])

    def scheme(self, name: str) -> None:
        """The system's colour scheme: light or dark."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(20)
        os.close(self._write)
        os.close(self._read)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 20)
            assert part, f"Chromium ended with {self._process.poll()}"
            self._buffer += part
        raw, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, given: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(given["exceptionDetails"].get("exception", given["exceptionDetails"])))
        elif method == "Log.entryAdded":
            self.errors.append(given["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning", "assert"):
            self.errors.append(str(given["args"]))
        elif method == "Network.requestWillBeSent" and not given["request"]["url"].startswith(("file:", "data:", "about:")):
            self.errors.append(f"asked for {given['request']['url']}")
