"""TensorBoard as a person sees it: a real server, a real headless Chromium driven by its own DevTools protocol.

python -m tests.system.browser runs docs/pictures/tensorboard.png     # the picture in docs/watching.md
"""

import asyncio
import base64
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp

from pretrain.ports import free_port

PATIENCE_S = 120.0
SHOWN = (
    "^(train/loss|train/images_per_second|eval/top1|norms/gradient/stage3|norms/weight/head|time/backward|pictures/.*)$"
)


class Page:
    """The one page of a started browser."""

    def __init__(self, socket_url: str) -> None:
        self._url = socket_url

    def open(self, url: str) -> None:
        """Go to a page."""
        self._call(("Page.navigate", {"url": url}))

    def value(self, javascript: str) -> Any:
        """What an expression comes to in the page."""
        (answer,) = self._call(("Runtime.evaluate", {"expression": javascript, "returnByValue": True}))
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, javascript: str, what: str) -> Any:
        """Evaluate until the value is true; the value."""
        deadline = time.monotonic() + PATIENCE_S
        while not (value := self.value(javascript)):
            assert time.monotonic() < deadline, f"{what}; the page says:\n{self.value('document.body.innerText')}"
            time.sleep(0.3)
        return value

    def picture(self, file: Path) -> None:
        """Save what is seen as a PNG."""
        (answer,) = self._call(("Page.captureScreenshot", {"format": "png"}))
        file.write_bytes(base64.b64decode(answer["data"]))

    def _call(self, *calls: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
        return asyncio.run(self._talk(calls))

    async def _talk(self, calls: tuple[tuple[str, dict[str, Any]], ...]) -> list[dict[str, Any]]:
        answers = []
        async with aiohttp.ClientSession() as session, session.ws_connect(self._url, max_msg_size=0) as socket:
            for number, (method, parameters) in enumerate(calls):
                await socket.send_str(json.dumps({"id": number, "method": method, "params": parameters}))
                while (message := await socket.receive_json(timeout=PATIENCE_S)).get("id") != number:
                    pass
                assert "result" in message, message
                answers.append(message["result"])
        return answers


@contextmanager
def chromium(profile: Path, width: int = 1500, height: int = 1500) -> Iterator[Page]:
    """A browser with a profile of its own; it ends with the block."""
    program = shutil.which("chromium")
    assert program, "Chromium is not installed; on Debian or Ubuntu: apt-get install chromium"
    command = [
        program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
        f"--window-size={width},{height}", "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank",
    ]  # fmt: skip
    with (profile.parent / "chromium.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield Page(_socket_of(profile, process))
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _socket_of(profile: Path, process: subprocess.Popen) -> str:
    deadline, file = time.monotonic() + PATIENCE_S, profile / "DevToolsActivePort"
    while True:
        assert process.poll() is None, (profile.parent / "chromium.log").read_text()
        assert time.monotonic() < deadline, "Chromium does not start"
        if file.exists() and len(lines := file.read_text().split()) == 2:
            break
        time.sleep(0.1)

    async def pages() -> list[dict[str, Any]]:
        async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{lines[0]}/json") as answer:
            found: list[dict[str, Any]] = await answer.json()
            return found

    while not (found := [page for page in asyncio.run(pages()) if page["type"] == "page"]):
        time.sleep(0.1)
    return str(found[0]["webSocketDebuggerUrl"])


@contextmanager
def tensorboard(folder: Path, log: Path) -> Iterator[str]:
    """A real server of what lies under a folder; its address."""
    port = free_port()
    program = Path(sys.executable).parent / "tensorboard"
    command = [str(program), "--logdir", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as handle:
        process = subprocess.Popen(command, stdout=handle, stderr=handle, start_new_session=True)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"TensorBoard does not answer: {log.read_text()}"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def show(page: Page, address: str, tags: str, *, cards: int, images: int) -> None:
    """Open TensorBoard's time series of the tags that a regular expression finds, and wait until all is drawn."""
    page.open(f"{address}/?tagFilter={quote(tags)}#timeseries")
    settings = "Array.from(document.querySelectorAll('button')).find(one => one.textContent.trim() == 'Settings')"
    page.wait_for(f"{settings} ? (({settings}).click(), true) : false", "the button that closes the settings")
    drawn = "document.querySelectorAll('scalar-card line-chart').length"
    page.wait_for(f"{drawn} >= {cards}", f"{cards} charts")
    loaded = "Array.from(document.querySelectorAll('image-card img')).filter(image => image.naturalWidth > 0).length"
    page.wait_for(f"{loaded} >= {images}", f"{images} pictures")


def main(arguments: list[str]) -> None:
    """Save a picture of TensorBoard with the runs under a folder: FOLDER FILE."""
    folder, file = map(Path, arguments)
    with (
        tempfile.TemporaryDirectory() as own,
        tensorboard(folder, Path(own) / "tensorboard.log") as address,
        chromium(Path(own) / "profile") as page,
    ):
        show(page, address, SHOWN, cards=6, images=2)
        time.sleep(2)  # lines are drawn with an animation
        page.picture(file)


if __name__ == "__main__":
    main(sys.argv[1:])
