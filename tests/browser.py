# SPDX-License-Identifier: BSD-3-Clause
"""A headless Chromium, driven over WebDriver (W3C) by Debian's chromedriver."""

from __future__ import annotations

import base64
import json
import signal
import urllib.request
from pathlib import Path
from typing import Any, Self

from certificates import reserved_port
from process import Process
from waiting import DEADLINE_S, wait_until

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key of an element's reference, by the specification."""


class Browser(Process):
    """One window of `width` by `height` pixels."""

    def __init__(self, folder: Path, width: int = 1280, height: int = 1100, dark: bool = False) -> None:
        super().__init__(folder, f"browser-{width}{'-dark' if dark else ''}")
        self._listener, self._port = reserved_port()
        self._options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--window-size={width},{height}",
            f"--user-data-dir={folder / self.name}",
        ]
        self._size = (width, height)
        self._dark = dark
        self._session = ""

    def command(self) -> list[str]:
        return ["chromedriver", f"--port={self._port}", "--log-level=SEVERE"]

    def start(self) -> Self:
        self._listener.close()
        super().start()
        settings = {"args": self._options}
        wanted = {"goog:chromeOptions": settings, "goog:loggingPrefs": {"browser": "ALL"}}
        self._session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        # The window of a headless Chromium cannot be narrower than 500 pixels by itself.
        metrics = {"width": self._size[0], "height": self._size[1], "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self._dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])
        return self

    def wait_ready(self) -> None:
        def ready() -> bool:
            try:
                return bool(self._call("GET", "/status")["ready"])
            except OSError:
                return False

        wait_until(ready, "chromedriver is ready")

    def excused(self, code: int) -> bool:
        """chromedriver dies of the signal."""
        return code == -signal.SIGTERM

    def close(self) -> None:
        if self._session:
            self._call("DELETE", f"/session/{self._session}")
            self._session = ""
        super().close()

    def open(self, url: str) -> None:
        self._on("POST", "/url", {"url": url})

    def run(self, script: str) -> Any:
        """What the body of a function returns in the page."""
        return self._on("POST", "/execute/sync", {"script": script, "args": []})

    def text(self) -> str:
        """What a person reads."""
        return str(self.run("return document.body.innerText"))

    def press(self, *keys: str) -> None:
        actions = [
            step for key in keys for step in ({"type": "keyDown", "value": key}, {"type": "keyUp", "value": key})
        ]
        self._on("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def console(self) -> list[str]:
        """What the page, or the browser about it, has complained of."""
        return [str(entry["message"]) for entry in self._on("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._on("GET", "/screenshot")))

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self._on("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _on(self, method: str, path: str, body: Any = None) -> Any:
        return self._call(method, f"/session/{self._session}{path}", body)

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
        )
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            return json.load(answer)["value"]
