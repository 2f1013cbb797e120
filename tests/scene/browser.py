"""A headless Chromium, driven over its DevTools protocol: opens a page, moves sliders, takes pictures, hears errors."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image
from websockets.sync.client import connect

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--use-angle=swiftshader", "--mute-audio"),
    *("--enable-unsafe-swiftshader", "--remote-debugging-port=0", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--force-device-scale-factor=1"),
)


class Browser:
    """One page of WebGL on the CPU; `errors` holds console errors, uncaught exceptions and what was not found."""

    def __init__(self, profile: Path, width: int, height: int) -> None:
        assert CHROMIUM is not None
        arguments = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"]
        self.process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._count = 0
        port_file = profile / "DevToolsActivePort"
        self.wait(lambda: port_file.is_file() and len(port_file.read_text().splitlines()) > 1, "the browser's port")
        port = port_file.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
            page = next(target for target in json.load(answer) if target["type"] == "page")
        # no pings: a browser that draws without a GPU may answer late, and every answer is waited for below
        self.socket = connect(page["webSocketDebuggerUrl"], max_size=None, open_timeout=60, ping_interval=None)
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def send(self, method: str, **params: object) -> dict:
        """One command and its answer; events that come before it are kept."""
        self._count += 1
        self.socket.send(json.dumps({"id": self._count, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=120))
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]
            self._hear(message)

    def _hear(self, message: dict) -> None:
        params = message.get("params", {})
        if message["method"] == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"])[:500])
        elif message["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(json.dumps(params["args"])[:500])
        elif message["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(json.dumps(params["entry"])[:500])
        elif message["method"] == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def run(self, script: str) -> object:
        """The value of a JavaScript expression."""
        return self.send("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def slide(self, index: int, position: float) -> None:
        """Click on the page's slider of that index, at a share of its length."""
        left, top, width, height = self.run(
            f"(() => {{ const r = document.querySelectorAll('[role=slider]')[{index}].parentElement"
            ".getBoundingClientRect(); return [r.left, r.top, r.width, r.height] })()"
        )
        where = {"x": left + position * width, "y": top + height / 2, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, **where)

    def picture(self) -> np.ndarray:  # [H, W, 3] uint8
        """What the page looks like."""
        content = base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    def wait(self, condition, what: str, seconds: float = 200) -> None:  # condition: () -> bool
        """Until it holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds} s for {what}; errors: {self.errors}"
            time.sleep(0.2)

    def close(self) -> None:
        """End the browser."""
        self.process.terminate()
        self.process.wait(30)
