"""A page in a real browser, driven over its debugging pipe: no package, no port, real time."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --remote-debugging-pipe"


class Browser:
    """One tab.

    Args:
        profile: Empty folder for the browser's own files.
        size: Width and height of the window in pixels.
        dark: Whether pages are told that the user prefers dark colours.
    """

    def __init__(self, profile: Path, *, size: tuple[int, int] = (1240, 900), dark: bool = False) -> None:
        self.messages: list[str] = []
        self._last, self._session = 0, ""
        command_read, command_write = _high(os.pipe())
        answer_read, answer_write = _high(os.pipe())
        flags = [*FLAGS.split(), f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}"]
        line = f'exec "$@" 3<&{command_read} 4>&{answer_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", line, "bash", str(BROWSER), *flags, "about:blank"],
            pass_fds=(command_read, answer_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_read)
        os.close(answer_write)
        self._commands, self._answers = os.fdopen(command_write, "wb"), os.fdopen(answer_read, "rb")
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        width, height = size
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._commands.close()
        self._answers.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask the browser for something; what a page writes to its console meanwhile is kept in ``messages``."""
        self._last += 1
        request = {"id": self._last, "method": method, "params": parameters}
        request |= {"sessionId": self._session} if self._session else {}
        self._commands.write(json.dumps(request).encode() + b"\0")
        self._commands.flush()
        while True:
            message = self._read()
            if message.get("id") == self._last:
                assert "error" not in message, message
                return dict(message["result"])

    def open(self, page: Path) -> None:
        """Load a file and wait until its ``load`` event."""
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.run("new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))")

    def run(self, script: str) -> Any:
        """Evaluate an expression in the page, as a user's gesture; a promise is awaited."""
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        answer = self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def _read(self) -> dict[str, Any]:
        data = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            assert byte, "the browser ended"
            data += byte
        message = dict(json.loads(data))
        if message.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.messages.append(json.dumps(message["params"]))
        return message


def _high(ends: tuple[int, int]) -> list[int]:
    """Duplicate both ends of a pipe out of the way of the numbers 3 and 4, and close the first ones."""
    copies = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in ends]
    for end in ends:
        os.close(end)
    return copies
