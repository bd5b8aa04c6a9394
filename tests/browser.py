"""Drive a headless Chromium over the DevTools protocol, with the standard library only.

`Browser` owns the process and its only connection. A `Page` is a tab with its own sessionStorage.
All tabs share one renderer process because a renderer takes long to start. There are no threads:
the connection collects events while it waits for the answer to a call.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, Dict, List, Optional

from conftest import missing, wait_until

# fmt: off
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-quic",
    "--disable-dev-shm-usage", "--no-proxy-server", "--remote-debugging-port=0",
    "--renderer-process-limit=1",
)
# fmt: on

VISIBLE_TEXT = (
    "[...document.querySelectorAll(%s)].filter((element) => element.checkVisibility())"
    ".map((element) => element.innerText).join(' ')"
)

FOCUS_BY_NAME = """(() => {
    const nameOf = (element) => (%s || '').trim().split(/\\s+/).join(' ');
    const match = [...document.querySelectorAll(%s)].find(
        (element) => element.checkVisibility() && nameOf(element).startsWith(%s));
    match?.focus();
    return Boolean(match) && document.activeElement === match;
})()"""

CHOOSE_OPTION = """(() => {
    const select = document.activeElement;
    const value = %s;
    select.value = [...select.options].find((option) => option.text === value)?.value ?? value;
    select.dispatchEvent(new Event('input', { bubbles: true }));
    return [select.value, select.selectedOptions[0]?.text].includes(value) && value;
})()"""


def find_chromium() -> str:
    """Return the path of a Chromium, or skip the test."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path:
            return path
    missing("Chromium is not installed")
    raise AssertionError("missing() always raises")


class ProtocolError(Exception):
    """The browser could not run a command, for example because the page is being replaced."""


class WebSocket:
    """A client of one WebSocket on this machine (RFC 6455), for text messages."""

    def __init__(self, port: int, path: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._file = self._socket.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode()
        request = (
            "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\nSec-WebSocket-Key: %s\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        self._socket.sendall((request % (path, port, key)).encode())
        status = self._file.readline()
        assert b" 101 " in status, status
        while self._file.readline().strip():
            pass

    def send(self, text: str) -> None:
        """Send a masked text frame."""
        data, mask = text.encode(), os.urandom(4)
        size = len(data)
        if size < 126:
            length = bytes([0x80 | size])
        elif size < 1 << 16:
            length = b"\xfe" + size.to_bytes(2, "big")
        else:
            length = b"\xff" + size.to_bytes(8, "big")
        long_mask = (mask * (size // 4 + 1))[:size]
        masked = int.from_bytes(data, "big") ^ int.from_bytes(long_mask, "big")
        self._socket.sendall(b"\x81" + length + mask + masked.to_bytes(size, "big"))

    def receive(self) -> str:
        """Return the next message. The browser sends no pings."""
        message, is_last = b"", False
        while not is_last:
            first, size = self._file.read(2)
            if size >= 126:
                size = int.from_bytes(self._file.read(2 if size == 126 else 8), "big")
            message += self._file.read(size)
            is_last = bool(first & 0x80)
        return message.decode()

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class Browser:
    """A running Chromium. close() kills all its processes."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [find_chromium(), *FLAGS, "--user-data-dir=%s" % folder, "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        port_file = folder / "DevToolsActivePort"
        address = re.compile(r"(\d+)\n(/devtools/browser/[\w-]{36})\n?")
        try:
            # The file exists before its content is complete.
            match = wait_until(
                lambda: port_file.exists() and address.fullmatch(port_file.read_text()), 60
            )
            self._socket = WebSocket(int(match[1]), match[2])
        except BaseException:
            self._kill()
            raise
        self._call_number = 0
        self.pages: Dict[str, Page] = {}

    def call(self, method: str, session: Optional[str] = None, **params: Any) -> Any:
        """Call a method of the protocol and return its result. Raises ProtocolError."""
        self._call_number += 1
        message = {"id": self._call_number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.receive())
            if answer.get("id") == message["id"]:
                if "error" in answer:
                    raise ProtocolError(method, answer["error"])
                return answer["result"]
            if answer.get("sessionId") in self.pages:
                self.pages[answer["sessionId"]].record(answer["method"], answer["params"])

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)

    def close(self) -> None:
        self._socket.close()
        self._kill()


class Page:
    """A tab. problems: errors, warnings, exceptions and policy violations that the page caused."""

    def __init__(self, browser: Browser, url: str, width: int = 1280, height: int = 900) -> None:
        self._browser = browser
        self.problems: List[str] = []
        self._target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.call("Target.attachToTarget", targetId=self._target, flatten=True)
        self._session = attached["sessionId"]
        browser.pages[self._session] = self
        for domain in ("Page", "Runtime", "Log", "Accessibility"):
            self.call(domain + ".enable")
        self.resize(width, height)
        self.navigate(url)

    def call(self, method: str, **params: Any) -> Any:
        return self._browser.call(method, self._session, **params)

    def record(self, method: str, params: Dict[str, Any]) -> None:
        """Record an event if it is a problem. A response with an error status is none."""
        if method == "Runtime.consoleAPICalled":
            if params["type"] in ("error", "warning", "assert"):
                self.problems.append(json.dumps(params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"]))
        elif method == "Log.entryAdded":
            entry = params["entry"]
            if entry["level"] in ("error", "warning") and entry["source"] != "network":
                self.problems.append(json.dumps(entry))
        elif method == "Page.javascriptDialogOpening":
            self.problems.append("a dialog: " + params["message"])

    def navigate(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def resize(self, width: int, height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def js(self, expression: str) -> Any:
        """Evaluate an expression in the page, await it, and return its value."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        details = answer.get("exceptionDetails")
        assert details is None, details["exception"]["description"]
        return answer["result"].get("value")

    def until(self, expression: str, seconds: float = 15) -> Any:
        """Wait until an expression is true, and return its value."""

        def value() -> Any:
            with contextlib.suppress(ProtocolError):
                return self.js(expression)

        try:
            return wait_until(value, seconds)
        except AssertionError:
            text = self.text()[:3000]
            message = "never %s; the page shows: %s %s" % (expression, text, self.problems)
            raise AssertionError(message) from None

    def text(self, selector: str = "body") -> str:
        """Return the visible text of the matching elements; "" if there is none."""
        return str(self.js(VISIBLE_TEXT % json.dumps(selector)))

    def wait_for_text(self, text: str, selector: str = "body") -> None:
        """Wait until a text is visible."""
        self.until("%s.includes(%s)" % (VISIBLE_TEXT % json.dumps(selector), json.dumps(text)))

    def wait_for_no_text(self, text: str, selector: str = "body") -> None:
        """Wait until a text is not visible."""
        self.until("!%s.includes(%s)" % (VISIBLE_TEXT % json.dumps(selector), json.dumps(text)))

    def press(self, name: str, within: str = "body") -> None:
        """Focus the visible button, link or summary whose name starts so, and press Enter."""
        name_of_element = "element.getAttribute('aria-label') || element.innerText"
        self._focus(within + " :is(button, a, summary)", name_of_element, name)
        self.key("Enter", 13, "\r")

    def _focus(self, selector: str, name_of_element: str, name: str) -> None:
        """Wait for a visible element whose name starts so, and focus it."""
        values = (name_of_element, json.dumps(selector), json.dumps(name))
        self.until(FOCUS_BY_NAME % values)

    def key(self, name: str, code: int, text: str = "") -> None:
        """Press and release a key. text: what the key inserts."""
        key = {"key": name, "code": name, "windowsVirtualKeyCode": code}
        inserted = {"text": text} if text else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **key, **inserted)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def write(self, label: str, text: str) -> None:
        """Replace the content of the visible field with this label."""
        name_of_element = "element.ariaLabel || element.labels[0]?.innerText"
        self._focus("input, textarea", name_of_element, label)
        self.js("document.activeElement.select()")
        self.call("Input.insertText", text=text)

    def choose(self, label: str, value: str) -> None:
        """Choose an option of the visible select element with this label."""
        self._focus("select", "element.ariaLabel || element.labels[0]?.innerText", label)
        assert self.js(CHOOSE_OPTION % json.dumps(value)) == value

    def screenshot(self, path: Path, is_whole: bool = True) -> None:
        """Write a PNG, for people to look at."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=is_whole)
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)
        self._browser.pages.pop(self._session, None)


__all__ = ["Browser", "Page", "find_chromium"]
