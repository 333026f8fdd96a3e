"""A headless Chromium, driven over its own debugging protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.client.conftest import run

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Page:
    """One tab.

    Attributes:
        console: what the page wrote to its console, and what the browser refused it.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, session: aiohttp.ClientSession) -> None:
        self._socket, self._http = socket, session
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._target = ""
        self.console: list[str] = []
        self._reader = asyncio.ensure_future(self._read())

    @classmethod
    async def connect(cls, url: str) -> Page:
        session = aiohttp.ClientSession()
        page = cls(await session.ws_connect(url, max_msg_size=0), session)
        target = await page.send("Target.createTarget", url="about:blank")
        attached = await page.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page._target = attached["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Log"):
            await page.send(f"{domain}.enable")
        return page

    async def _read(self) -> None:
        async for message in self._socket:
            event = message.json()
            if "id" in event:
                self._answers.pop(event["id"]).set_result(event)
            elif event["method"] == "Log.entryAdded":
                self.console.append(event["params"]["entry"]["text"])
            elif event["method"] == "Runtime.exceptionThrown":
                self.console.append(str(event["params"]["exceptionDetails"].get("exception", {}).get("description")))

    async def send(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": params}
        await self._socket.send_json({**message, "sessionId": self._target} if self._target else message)
        answer = await asyncio.wait_for(self._answers[number], 30)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    async def close(self) -> None:
        await self._socket.close()
        self._reader.cancel()
        await self._http.close()

    def do(self, method: str, **params: Any) -> Any:
        """One command of the protocol; its result."""
        return run(self.send(method, **params))

    def value(self, expression: str) -> Any:
        """What an expression in the page's own language is; a promise is waited for."""
        told = self.do("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def until(self, expression: str, seconds: float = 20.0) -> Any:
        """Waits until an expression is true; its value."""
        deadline = time.monotonic() + seconds
        while True:
            value = self.value(expression)
            if value:
                return value
            assert time.monotonic() < deadline, (expression, self.value("document.body.innerText"), self.console)
            time.sleep(0.03)

    def open(self, url: str) -> None:
        self.do("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def choose(self, path: Path) -> None:
        """Hands a file to the page's file input, as the browser's dialogue does."""
        node = self.do("DOM.querySelector", nodeId=self.do("DOM.getDocument")["root"]["nodeId"], selector="#file")
        self.do("DOM.setFileInputFiles", nodeId=node["nodeId"], files=[str(path)])

    def drop(self, path: Path, x: int = 300, y: int = 300) -> None:
        data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.do("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def press(self, key: str, code: int = 0, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            self.do("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **extra)

    def look(self, width: int, height: int, scheme: str = "light", ratio: float = 1) -> None:
        """Sets the window's size, the preferred colours and the pixels of the screen in one of the page."""
        self.do(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=ratio,
            mobile=width < 600,
        )
        self.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path, **options: Any) -> None:
        path.write_bytes(base64.b64decode(self.do("Page.captureScreenshot", **options)["data"]))


@contextlib.contextmanager
def chromium(folder: Path, *arguments: str) -> Iterator[Page]:
    """A new browser with a profile in `folder`; skips where none is installed."""
    program = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"needs a browser: one of {', '.join(PROGRAMS)} on PATH")
    always = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    profile = folder / "profile"
    command = [program, *always, f"--user-data-dir={profile}", "--remote-debugging-port=0", *arguments, "about:blank"]
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        listening = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not listening.exists() or listening.read_text().count("\n") < 1:
            assert process.poll() is None, (folder / "chromium.log").read_text(errors="replace")
            assert time.monotonic() < deadline, (folder / "chromium.log").read_text(errors="replace")
            time.sleep(0.05)
        port, path = listening.read_text().split("\n")[:2]
        page = run(Page.connect(f"ws://127.0.0.1:{port}{path}"))
        try:
            yield page
        finally:
            run(page.close())
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
