"""A real browser: Chromium without a window, driven by Chrome's DevTools protocol."""

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 240
"""Seconds that a page may take on a busy machine."""
LOOK = 0.1


def find_browser() -> str | None:
    """Return the browser of this machine; None: there is none on PATH."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One page of the browser."""

    def __init__(self, address: str) -> None:
        import websocket

        self._line = websocket.create_connection(address, timeout=PATIENCE, suppress_origin=True)
        self._numbers = itertools.count(1)
        self.errors: list[str] = []
        """What the page threw or could not load."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return the answer to one command of the protocol."""
        number = next(self._numbers)
        self._line.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            told = json.loads(self._line.recv())
            if told.get("method") == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(told["params"]["exceptionDetails"])[:600])
            elif told.get("method") == "Log.entryAdded" and told["params"]["entry"]["level"] == "error":
                self.errors.append(f"{told['params']['entry']['text']} {told['params']['entry'].get('url', '')}")
            elif told.get("id") == number:
                assert "error" not in told, f"{method}: {told['error']}"
                return told["result"]

    def close(self) -> None:
        """Leave the browser."""
        self._line.close()

    def show(self, width: int, height: int = 900, scheme: str = "light") -> None:
        """Be a screen of so many pixels, by day or by night."""
        phone = width < 600
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone
        )
        self.command("Emulation.setTouchEmulationEnabled", enabled=phone)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", features=features)

    def open(self, url: str) -> None:
        """Open a page and wait until its script says that it is ready."""
        self.command("Page.navigate", url=url)
        self.wait("document.body?.dataset.ready === 'yes'")

    def ask(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        told = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + PATIENCE
        while not self.ask(f"Boolean({expression})"):  # an element has no value that comes here
            assert time.monotonic() < end, f"never true: {expression}; the page says: {self.errors}"
            time.sleep(LOOK)

    def click(self, selector: str) -> None:
        """Click on the middle of an element with the mouse."""
        x, y = self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, selector: str) -> None:
        """Move the mouse to the middle of an element."""
        x, y = self._middle(selector)
        self.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def tap(self, selector: str) -> None:
        """Touch the middle of an element."""
        x, y = self._middle(selector)
        self.command("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.command("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def key(self, name: str) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.command("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def _middle(self, selector: str) -> tuple[float, float]:
        """Return the place of an element's first line, scrolled into view."""
        found = self.ask(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); if (!e) return null;"
            "e.scrollIntoView({block: 'center'}); const b = e.getClientRects()[0];"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        assert found, f"no element {selector}"
        return found[0], found[1]

    def give_file(self, selector: str, path: Path) -> None:
        """Choose a file in a form."""
        root = self.command("DOM.getDocument")["root"]["nodeId"]
        node = self.command("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.command("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def picture(self, path: Path, whole: bool = False) -> None:
        """Write what is seen as PNG; the whole page, if asked for."""
        told = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        path.write_bytes(base64.b64decode(told["data"]))

    def _clip(self, whole: bool) -> dict[str, Any]:
        size = self.command("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {**size, "x": 0, "y": 0, "scale": 1}} if whole else {}

    def sideways(self) -> float:
        """Return by how many pixels the page is wider than the screen."""
        return self.ask("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@contextmanager
def browser_tab(folder: Path) -> Iterator[Tab]:
    """Start a browser whose profile lies in a folder, and yield an empty tab of it."""
    name = find_browser()
    assert name is not None
    profile = folder / "profile"
    options = (
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-extensions", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
        "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank",
    )  # fmt: skip
    process = subprocess.Popen([name, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    tab = None
    try:
        tab = Tab(_address(process, profile / "DevToolsActivePort"))
        yield tab
    finally:
        if tab is not None:
            tab.close()
        process.terminate()
        process.wait()


def _address(process: subprocess.Popen, file: Path) -> str:
    """Return where the browser's first tab listens."""
    import urllib.request

    end = time.monotonic() + PATIENCE
    while True:
        assert process.poll() is None and time.monotonic() < end, "the browser did not start"
        time.sleep(LOOK)
        if not file.exists() or len(lines := file.read_text().split()) < 2:
            continue
        with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json/list") as answer:
            tabs = [tab for tab in json.load(answer) if tab["type"] == "page"]
        if tabs:
            return tabs[0]["webSocketDebuggerUrl"]
