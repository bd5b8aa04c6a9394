"""A headless Chromium driven over the DevTools protocol, with the standard library only; for test_page.py.

`Browser` owns the process and the one connection, `Page` is a tab with a sessionStorage of its own; all share a
renderer, since one takes long to start. No thread: events are gathered while an answer is waited for.
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

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-quic", "--disable-dev-shm-usage", "--no-proxy-server", "--remote-debugging-port=0",
         "--renderer-process-limit=1")

READ = "[...document.querySelectorAll(%s)].filter((each) => each.checkVisibility()).map((each) => each.innerText).join(' ')"


class Refused(Exception):
    """The browser could not do what it was told, such as in a page that is just being left."""


class WebSocket:
    """A client of one WebSocket on this machine (RFC 6455), for text."""

    def __init__(self, port: int, path: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        self._file = self._socket.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(("GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                              "Sec-WebSocket-Key: %s\r\nSec-WebSocket-Version: 13\r\n\r\n" % (path, port, key)).encode())
        status = self._file.readline()
        assert b" 101 " in status, status
        while self._file.readline().strip():
            pass

    def send(self, text: str) -> None:
        data, mask = text.encode(), os.urandom(4)
        size = len(data)
        length = (bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big") if size < 1 << 16
                  else b"\xff" + size.to_bytes(8, "big"))
        masked = (int.from_bytes(data, "big") ^ int.from_bytes((mask * (size // 4 + 1))[:size], "big")).to_bytes(size, "big")
        self._socket.sendall(b"\x81" + length + mask + masked)

    def receive(self) -> str:
        """The next message; the browser sends no pings."""
        message, is_last = b"", False
        while not is_last:
            first, size = self._file.read(2)
            if size >= 126:
                size = int.from_bytes(self._file.read(2 if size == 126 else 8), "big")
            message, is_last = message + self._file.read(size), bool(first & 0x80)
        return message.decode()

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class Browser:
    """A running Chromium; close() ends it with all its processes."""

    def __init__(self, folder: Path) -> None:
        found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if not found:
            missing("no chromium here")
        self._process = subprocess.Popen([str(found), *FLAGS, "--user-data-dir=%s" % folder, "about:blank"], stdin=subprocess.DEVNULL,
                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            told = folder / "DevToolsActivePort"                  # exists before it is written
            found_port = wait_until(lambda: told.exists() and re.fullmatch(r"(\d+)\n(/devtools/browser/[\w-]{36})\n?", told.read_text()), 60)
            self._socket = WebSocket(int(found_port[1]), found_port[2])
        except BaseException:
            self._end()
            raise
        self._number = 0
        self.pages: Dict[str, "Page"] = {}

    def call(self, method: str, session: Optional[str] = None, **params: Any) -> Any:
        """Calls a method of the protocol. -> its result. Raises Refused."""
        self._number += 1
        number = self._number
        self._socket.send(json.dumps({"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}))
        while True:
            message = json.loads(self._socket.receive())
            if message.get("id") == number:
                if "error" in message:
                    raise Refused(method, message["error"])
                return message["result"]
            if message.get("sessionId") in self.pages:
                self.pages[message["sessionId"]].note(message["method"], message["params"])

    def _end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)

    def close(self) -> None:
        self._socket.close()
        self._end()


class Page:
    """A tab. complaints: what the page logged as an error or warning, threw, or was refused by its policy."""

    def __init__(self, browser: Browser, url: str, width: int = 1280, height: int = 900) -> None:
        self._browser, self.complaints = browser, []    # type: Browser, List[str]
        self._target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        browser.pages[self._session] = self
        for domain in ("Page", "Runtime", "Log", "Accessibility"):
            self.call(domain + ".enable")
        self.resize(width, height)
        self.go(url)

    def call(self, method: str, **params: Any) -> Any:
        return self._browser.call(method, self._session, **params)

    def note(self, method: str, params: Dict[str, Any]) -> None:
        """Takes an event. That an answer had the status 401 is no complaint of the browser's."""
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning") and params["entry"]["source"] != "network":
            self.complaints.append(json.dumps(params["entry"]))
        elif method == "Page.javascriptDialogOpening":
            self.complaints.append("a dialog: " + params["message"])

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def resize(self, width: int, height: int = 900) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)

    def js(self, expression: str) -> Any:
        """The value of an expression in the page, awaited."""
        said = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]["exception"]["description"]
        return said["result"].get("value")

    def until(self, expression: str, seconds: float = 15) -> Any:
        """The value of an expression as soon as it is true."""
        def value() -> Any:
            with contextlib.suppress(Refused):
                return self.js(expression)

        try:
            return wait_until(value, seconds)
        except AssertionError:
            raise AssertionError("never %s; the page says: %s %s" % (expression, self.text()[:3000], self.complaints)) from None

    def text(self, selector: str = "body") -> str:
        """What can be read of the elements; "" where there are none or they are hidden."""
        return str(self.js(READ % json.dumps(selector)))

    def sees(self, text: str, selector: str = "body") -> None:
        """Waits for a text to be there to be read."""
        self.until("%s.includes(%s)" % (READ % json.dumps(selector), json.dumps(text)))

    def lacks(self, text: str, selector: str = "body") -> None:
        """Waits for a text to be gone."""
        self.until("!%s.includes(%s)" % (READ % json.dumps(selector), json.dumps(text)))

    def press(self, name: str, within: str = "body") -> None:
        """Goes to the visible button, link or summary whose name is or begins with this, and hits the Enter key."""
        self._go_to("document.querySelectorAll(%s)" % json.dumps(within + " :is(button, a, summary)"),
                    "each.getAttribute('aria-label') || each.innerText", name)
        self.key("Enter", 13, "\r")

    def _go_to(self, elements: str, name_of_each: str, name: str) -> None:
        """Waits for a visible element with this name, or the beginning of one, and gives it the focus."""
        self.until("""(() => {
            const nameOf = (each) => (%s || '').trim().split(/\\s+/).join(' ');
            const found = [...%s].find((each) => each.checkVisibility() && nameOf(each).startsWith(%s));
            if (found) found.focus();
            return Boolean(found) && document.activeElement === found })()""" % (name_of_each, elements, json.dumps(name)))

    def key(self, name: str, code: int, text: str = "") -> None:
        key = {"key": name, "code": name, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **key, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def write(self, label: str, text: str) -> None:
        """Puts a text into the visible field with this label, in place of what it holds."""
        self._go_to("document.querySelectorAll('input, textarea')", "each.ariaLabel || each.labels[0]?.innerText", label)
        self.js("document.activeElement.select()")
        self.call("Input.insertText", text=text)

    def choose(self, label: str, value: str) -> None:
        """Chooses an option of the visible list with this label."""
        self._go_to("document.querySelectorAll('select')", "each.labels[0]?.innerText", label)
        chosen = self.js("""(() => { const list = document.activeElement; list.value = %s;
            list.dispatchEvent(new Event('input', { bubbles: true })); return list.value })()""" % json.dumps(value))
        assert chosen == value

    def picture(self, path: Path, is_whole: bool = True) -> None:
        """Writes a PNG, for people."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=is_whole)["data"]))

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)
        self._browser.pages.pop(self._session, None)


__all__ = ["Browser", "Page"]
