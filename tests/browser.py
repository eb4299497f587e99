"""Chromium, driven over its DevTools protocol through two pipes: nothing to install but the browser."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
)


class Page:
    """One tab. `console` and `requests` keep what it complained of and asked for."""

    def __init__(self, to_browser: BinaryIO, from_browser: int):
        self._to, self._from = to_browser, from_browser
        self._buffer, self._number, self.session = b"", 0, None
        self.console: list[str] = []
        self.requests: list[str] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and return its result."""
        self._number += 1
        session = {"sessionId": self.session} if self.session else {}
        message = {"id": self._number, "method": method, "params": params, **session}
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._from, 2**20)
            if not piece:
                raise RuntimeError("the browser has ended")
            self._buffer += piece
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def event(self, name: str) -> dict[str, Any]:
        """Return what an event brought, as soon as it happens."""
        while not (found := [params for event, params in self.events if event == name]):
            self._receive()
        return found[0]

    def _note(self, event: str | None, params: dict[str, Any]) -> None:
        if event and event.startswith("Page."):
            self.events.append((event, params))
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.console.append(json.dumps(params["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.console.append(json.dumps(params["args"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.console.append(params["entry"]["text"])

    def run(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, a promise's when it is fulfilled."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"]))
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> Any:
        """Return the value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while (value := self.run(expression)) in (None, False, 0, ""):
            if time.monotonic() > end:
                raise TimeoutError(f"{expression} stays {value!r}; page: {self.run('document.body.innerText')}")
            time.sleep(0.05)
        return value

    def open(self, url: str) -> None:
        """Go to an address and wait until it is loaded."""
        self.send("Page.navigate", url=url)
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")

    def show(self, width: int, height: int, *, dark: bool = False, still: bool = True) -> None:
        """Be a screen of that size, a phone below 500 pixels, with those preferences."""
        phone = width < 500
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1 + phone, mobile=phone
        )
        wishes = {"color-scheme": "dark" if dark else "light", "reduced-motion": "reduce" if still else ""}
        features = [{"name": f"prefers-{name}", "value": value} for name, value in wishes.items()]
        self.send("Emulation.setEmulatedMedia", features=features)

    def choose(self, selector: str, files: list[str]) -> None:
        """Choose files in a file input, as a person does."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=files)

    def press(self, key: str, code: int, modifiers: int = 0) -> None:
        """Press one key."""
        for kind in ("keyDown", "keyUp"):
            text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            event = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers, **text}
            self.send("Input.dispatchKeyEvent", type=kind, **event)

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """Write what the screen shows, or the whole page, to a PNG file."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """Start a browser with a new profile and give its page."""
    assert CHROMIUM is not None
    read_commands, write_commands = os.pipe()
    read_events, write_events = os.pipe()
    command = f'exec "$0" "$@" 3<&{read_commands} 4>&{write_events}'
    process = subprocess.Popen(
        ["/bin/bash", "-c", command, CHROMIUM, *FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(read_commands, write_events),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(read_commands)
    os.close(write_events)
    try:
        with os.fdopen(write_commands, "wb") as commands:  # the browser ends when this pipe does
            yield Page(commands, read_events)
        process.wait(10)
    finally:
        process.kill()
        process.wait()
        os.close(read_events)
