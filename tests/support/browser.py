"""A real Chromium, driven by its own protocol over a pair of pipes: no port, no further package."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue
from types import TracebackType
from typing import Any, Self

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    # Chromium's own sandbox needs rights that containers do not have; it opens our page alone.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-sync",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--no-first-run",
    "--force-color-profile=srgb",
    "--hide-scrollbars",
)
_ANSWER_S = 30.0
# Keys that are not the character they write: name, key code, text.
_KEYS = {
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    "Tab": (9, ""),
    "ArrowRight": (39, ""),
    "ArrowLeft": (37, ""),
}


def executable() -> str | None:
    """Where a Chromium is, if there is one."""
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


class BrowserProblem(AssertionError):
    """The browser refused a command, ended, or the page threw."""


class Browser:
    """One process; `page()` opens a tab of its own, with storage of its own."""

    def __init__(self, folder: Path) -> None:
        found = executable()
        assert found is not None, "no Chromium is installed"
        to_read, to_write = os.pipe(), os.pipe()
        # Chromium reads commands from descriptor 3 and writes to 4.
        line = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'
        command = [found, *_FLAGS, f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", line, "browser", str(to_read[0]), str(to_write[1]), *command],
            pass_fds=(to_read[0], to_write[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # No proxy, no desktop, nothing of the user's.
            env={"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"},
        )
        os.close(to_read[0])
        os.close(to_write[1])
        self._in, self._out = os.fdopen(to_read[1], "wb"), os.fdopen(to_write[0], "rb")
        self._numbers = itertools.count(1)
        self._answers: dict[int, Queue[dict[str, Any]]] = {}
        self._tabs: dict[str, Page] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        try:
            self.send("Browser.close")
            self._process.wait(10)
        except (BrowserProblem, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._in.close()
        self._out.close()

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Do one command of the protocol and return what it answers."""
        number = next(self._numbers)
        answer: Queue[dict[str, Any]] = Queue()
        self._answers[number] = answer
        message = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        self._in.write(json.dumps(message).encode() + b"\0")
        self._in.flush()
        try:
            got = answer.get(timeout=_ANSWER_S)
        except Empty:
            raise BrowserProblem(f"{method}: no answer") from None
        if "error" in got:
            raise BrowserProblem(f"{method}: {got['error']['message']}")
        result: dict[str, Any] = got["result"]
        return result

    @contextmanager
    def page(self, width: int = 1280, height: int = 800) -> Iterator["Page"]:
        """A tab that shares nothing with others, until the block ends."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)
        attached = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        tab = self._tabs[attached["sessionId"]] = Page(self, attached["sessionId"])
        for domain in ("Page", "Runtime", "Network", "Log"):
            tab.send(f"{domain}.enable")
        tab.resize(width, height)
        try:
            yield tab
        finally:
            del self._tabs[tab.session]
            self.send("Target.disposeBrowserContext", browserContextId=context)

    def _read(self) -> None:
        rest = b""
        while chunk := self._out.read1(1 << 16):
            *whole, rest = (rest + chunk).split(b"\0")
            for each in whole:
                message = json.loads(each)
                if "id" in message:
                    self._answers.pop(message["id"]).put(message)
                elif (tab := self._tabs.get(message.get("sessionId", ""))) is not None:
                    tab.note(message["method"], message["params"])
        for waiting in self._answers.values():
            waiting.put({"error": {"message": "the browser ended"}})


class Page:
    """A tab.

    Attributes:
        requests: addresses of all that it asked for. complaints: what it wrote to the console as
            an error or a warning, and what was thrown in it.
    """

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self.session = browser, session
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command to this tab."""
        return self._browser.send(method, self.session, **params)

    def note(self, method: str, params: dict[str, Any]) -> None:
        """Take an event."""
        if method == "Network.requestWillBeSent":
            if params["request"]["url"].startswith(("http", "ws", "ftp")):
                self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            thrown = params["exceptionDetails"]
            self.complaints.append(
                thrown.get("exception", thrown).get("description", thrown["text"])
            )
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def resize(self, width: int, height: int, scale: float = 1.0) -> None:
        """Give the window this size, in CSS pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )

    def prefer(self, **features: str) -> None:
        """What the user prefers, such as `color_scheme="dark"`."""
        told = [
            {"name": f"prefers-{name.replace('_', '-')}", "value": value}
            for name, value in features.items()
        ]
        self.send("Emulation.setEmulatedMedia", features=told)

    def open(self, url: str) -> None:
        """Go there, and wait until its script has run."""
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.protocol === 'http:'")

    def leave(self) -> None:
        """Go to an empty page: nothing is asked any more."""
        self.send("Page.navigate", url="about:blank")

    def reload(self) -> None:
        """Load the same address again, and wait until its script has run."""
        self.run("window.isOld = true")
        self.send("Page.reload")
        self.wait_for(self._is_loaded_anew, "loaded again")

    def _is_loaded_anew(self) -> bool:
        try:
            return bool(self.run("!window.isOld && document.readyState === 'complete'"))
        except BrowserProblem:
            # Asked of the page that just went away.
            return False

    def run(self, script: str) -> Any:
        """The value of an expression in the page, a promise's when it is kept."""
        got = self.send(
            "Runtime.evaluate",
            expression=script,
            returnByValue=True,
            awaitPromise=True,
            userGesture=True,
        )
        if "exceptionDetails" in got:
            thrown = got["exceptionDetails"]
            raise BrowserProblem(thrown.get("exception", {}).get("description", thrown["text"]))
        return got["result"].get("value")

    def wait(self, condition: str, timeout_s: float = _ANSWER_S) -> None:
        """Wait until an expression is true."""
        self.wait_for(lambda: self.run(f"Boolean({condition})"), condition, timeout_s)

    def wait_for(
        self, condition: Callable[[], Any], what: str = "", timeout_s: float = _ANSWER_S
    ) -> None:
        """Wait until something is so."""
        until = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < until, f"never so: {what}; {self.complaints}"
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """What an element shows."""
        found: str = self.run(f"document.querySelector({json.dumps(selector)}).innerText")
        return found

    def is_shown(self, selector: str) -> bool:
        """Whether an element takes any room."""
        script = f"document.querySelector({json.dumps(selector)}).getClientRects().length > 0"
        return bool(self.run(script))

    def click(self, selector: str) -> None:
        """Click into the middle of an element, as a mouse does."""
        name = json.dumps(selector)
        self.run(f"document.querySelector({name}).scrollIntoView({{block: 'nearest'}})")
        box = self.run(f"document.querySelector({name}).getBoundingClientRect().toJSON()")
        where = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **where)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)

    def press(self, key: str, *, ctrl: bool = False) -> None:
        """Press a key that has a name, or a letter."""
        code, text = _KEYS.get(key, (ord(key.upper()[0]), key))
        pressed = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 2 * ctrl}
        if text and not ctrl:
            pressed["text"] = text
        self.send("Input.dispatchKeyEvent", type="keyDown", **pressed)
        self.send("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.send("Input.insertText", text=text)

    def picture(self, path: Path) -> None:
        """Save what is seen as PNG."""
        got = self.send("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(got["data"]))
