"""Drive the program on Windows and print what was driven; tests/wine.sh runs it under wine.

    python.exe tests\\windows_drive.py [MODULE]

It needs no other package and runs on a real Windows, too. It asserts on what is seen outside:
answers, exit statuses, bytes of files, and whether processes run. The exit status is 1 if a part
failed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS))
from fake_cloudflared import FakeCloudflared  # noqa: E402

MODULE = Path(sys.argv[1] if len(sys.argv) > 1 else TESTS.parent / "claude_api_bridge.py").resolve()
TEXT = "Why \u2603 \U0001f600?"
# Sends Ctrl-C to the console of another process: sys.argv[1].
CTRL_C = """
import ctypes, sys, time
kernel = ctypes.windll.kernel32
kernel.FreeConsole()
assert kernel.AttachConsole(int(sys.argv[1])), ctypes.GetLastError()
kernel.SetConsoleCtrlHandler(None, True)
assert kernel.GenerateConsoleCtrlEvent(0, 0)
time.sleep(0.5)
"""
FAKE = """import sys
sys.path.insert(0, %r)
import fake_claude
sys.exit(fake_claude.main(%r))
"""
# A bridge that is killed within CreateProcess, when the new process exists but does not run yet.
# sys.argv[1:]: the folder of the module; that of the data and of the file `pid`.
KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
import claude_api_bridge as cab
options, job_of = cab.group_options, cab.job_of
def suspended(*words):
    return {"creationflags": options(*words)["creationflags"] | 4}
def killed(pid):
    if pid == os.getpid():
        return job_of(pid)
    with open(sys.argv[2] + "/pid", "w") as file:
        file.write(str(pid))
    os.kill(os.getpid(), 9)
cab.group_options, cab.job_of = suspended, killed
cab.main(["start", "--demo", "--no-tunnel", "--host", "127.0.0.1", "--port", "0",
          "--data-dir", sys.argv[2] + "/data"])
"""
# As npm writes it for a script; the program beside it is named node.exe.
NPM_SHIM = """@ECHO off
GOTO start
:find_dp0
SET dp0=%~dp0
EXIT /b
:start
SETLOCAL
CALL :find_dp0

IF EXIST "%dp0%\\node.exe" (
  SET "_prog=%dp0%\\node.exe"
) ELSE (
  SET "_prog=node"
  SET PATHEXT=%PATHEXT:;.JS;=;%
)

endLocal & goto #_undefined_# 2>NUL || title %COMSPEC% & "%_prog%"  "%dp0%\\cli files\\cli.js" %*
"""


def is_running(pid: int) -> bool:
    """Return whether a process runs; its object may outlive it while somebody holds a handle."""
    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined,unused-ignore]
    kernel.OpenProcess.restype = ctypes.c_void_p
    # SYNCHRONIZE; WAIT_TIMEOUT.
    handle = ctypes.c_void_p(kernel.OpenProcess(0x100000, False, pid))
    try:
        return bool(handle.value and kernel.WaitForSingleObject(handle, 0) == 0x102)
    finally:
        kernel.CloseHandle(handle)


def wait_until(fact: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        value = fact()
        if value:
            return value
        assert time.monotonic() < deadline, "not within %g s: %s" % (seconds, what)
        time.sleep(0.05)


class Fake:
    """tests/fake_claude.py behind a `claude.cmd`, as npm's shims stand before the program."""

    def __init__(self, folder: Path, is_npm: bool = False) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.path = folder / "claude.cmd"
        script = folder / "cli files" / "cli.js"
        script.parent.mkdir()
        script.write_text(FAKE % (str(TESTS), str(folder)), "utf-8")
        if is_npm:
            self.path.write_text(NPM_SHIM)
            for file in Path(sys.executable).parent.iterdir():
                if file.suffix in (".dll", ".pyd", ".zip", "._pth"):
                    shutil.copy(file, folder)
            shutil.copy(sys.executable, folder / "node.exe")
        else:
            self.path.write_text('@"%s" -S "%s" %%*\n' % (sys.executable, script))

    def starts(self) -> List[Dict[str, Any]]:
        """Return the starts of processes that answer prompts."""
        path = self.folder / "starts.jsonl"
        text = path.read_text() if path.exists() else ""
        rows = [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]
        return [row for row in rows if "-p" in row["argv"]]

    def running(self) -> List[int]:
        return [row["pid"] for row in self.starts() if is_running(row["pid"])]


class Bridge:
    """A `start` in a process, with a console of its own that shows no window."""

    def __init__(self, folder: Path, *flags: str, claude: Optional[Fake] = None) -> None:
        cli = ["--claude", str(claude.path)] if claude else ["--demo"]
        if "--cloudflared" not in flags:
            cli += ["--no-tunnel", "--host", "127.0.0.1"]
        self.folder = folder
        self.errors = open(folder.parent / (folder.name + ".stderr"), "ab")
        self.process = subprocess.Popen(
            [sys.executable, str(MODULE), "start", "--port", "0", "--data-dir", str(folder),
             *cli, *flags],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.errors,
            creationflags=0x08000000)
        assert self.process.stdout is not None
        self.token = ""
        self.url = ""
        for raw in self.process.stdout:
            line = raw.decode().strip()
            if line.startswith("http"):
                self.url = line
                break
            self.token = line
        assert self.url, self.stderr()
        self.port = int(self.url.rpartition(":")[2])

    def stderr(self) -> str:
        return Path(self.errors.name).read_text("utf-8", "replace")

    def call(self, method: str, path: str, body: Any = None, token: str = "") -> Any:
        """Send a request. -> the JSON of the answer."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": "Bearer " + (token or self.token)}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=100) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    def ctrl_c(self) -> int:
        """Press Ctrl-C in the bridge's console. -> its exit status."""
        subprocess.run([sys.executable, "-c", CTRL_C, str(self.process.pid)], check=True,
                       creationflags=0x08000000)
        return self.process.wait(20)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.errors.close()


@contextlib.contextmanager
def bridge(folder: Path, *flags: str, claude: Optional[Fake] = None) -> Iterator[Bridge]:
    with contextlib.closing(Bridge(folder, *flags, claude=claude)) as running:
        yield running


def run(*words: str) -> Tuple[int, bytes, str]:
    """Run a command of the program. -> (exit status, the bytes of stdout, stderr)."""
    result = subprocess.run(
        [sys.executable, str(MODULE), *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, timeout=60)
    return result.returncode, result.stdout, result.stderr.decode("utf-8", "replace")


# --- what is driven; each function gets an empty folder whose name has blanks ---


def demo_quick_start(folder: Path) -> None:
    """start --demo, ask, token, stream, second instance, port in use, Ctrl-C, restart"""
    data = folder / "data folder"
    with bridge(data) as running:
        assert running.token.startswith("cab-"), running.token
        at = ("--data-dir", str(data))
        status, output, errors = run("ask", "Why is the sky blue?", *at)
        assert status == 0 and b"Why is the sky blue?" in output, errors
        status, output, errors = run("token", "create", "my app", *at)
        assert status == 0, errors
        token = output.decode().strip()
        answer = running.call("POST", "/api/ask", {"message": TEXT, "wait": 30}, token)
        assert answer["status"] == "completed" and TEXT in answer["response"], answer
        request = urllib.request.Request(
            running.url + "/api/ask", json.dumps({"message": "story", "stream": True}).encode(),
            {"Authorization": "Bearer " + token})
        with urllib.request.urlopen(request, timeout=30) as stream:
            assert b"event: completed" in stream.read()
        status, output, errors = run(
            "start", "--demo", "--no-tunnel", "--port", "0", "--data-dir", str(data))
        assert status == 1 and "Another bridge is running" in errors, errors
        status, output, errors = run(
            "start", "--demo", "--no-tunnel", "--host", "127.0.0.1", "--port", str(running.port),
            "--data-dir", str(folder / "other"))
        assert status == 1 and "hint:" in errors, errors
        assert running.ctrl_c() == 0, running.stderr()
        assert "Shutting down" in running.stderr()
    with bridge(data) as running:
        answer = running.call("GET", "/api/requests", None, token)
        assert len(answer["requests"]) == 2, answer


def piped_output_is_utf8(folder: Path) -> None:
    """ask and ask --json into a file: UTF-8 (W2)"""
    with bridge(folder / "data"):
        at = ("--data-dir", str(folder / "data"))
        for flags in ((), ("--json",)):
            status, output, errors = run("ask", TEXT, *flags, *at)
            assert status == 0, errors
            text = output.decode("utf-8")
            assert TEXT in (json.loads(text)["response"] if flags else text), output


def doctor(folder: Path) -> None:
    """doctor --demo --no-tunnel --json: no check is bad, in a new folder and beside a bridge"""
    def names() -> List[str]:
        status, output, errors = run(
            "doctor", "--demo", "--no-tunnel", "--json", "--host", "127.0.0.1", "--port", "0",
            "--data-dir", str(folder / "data"))
        report = json.loads(output)
        bad = [check for check in report["checks"] if check["ok"] is False]
        assert status == 0 and report["ok"] and not bad, (bad, errors)
        return [check["name"] for check in report["checks"]]

    expected = {"python", "sqlite", "data", "disk", "clock", "processes", "port", "claude"}
    found = names()
    assert expected <= set(found), found
    assert not (folder / "data").exists()
    with bridge(folder / "data"):
        found = names()
        assert expected - {"processes"} <= set(found), found


def port_is_not_shared(folder: Path) -> None:
    """the port cannot be taken with SO_REUSEADDR"""
    with bridge(folder / "data") as running, socket.socket() as second:
        second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            second.bind(("127.0.0.1", running.port))
        except OSError:
            return
        raise AssertionError("another socket got the port")


def hanging(running: Bridge, fake: Fake, token: str = "") -> Tuple[str, List[int]]:
    """Ask for a run that never ends and starts a process. -> (request id, the pids)."""
    note = fake.folder / ("grandchild-%d" % time.monotonic_ns())
    body = {"message": "grandchild %s" % note}
    request = str(running.call("POST", "/api/ask", body, token)["requestId"])
    wait_until(lambda: note.exists() and note.read_text().strip(), "the run starts a process")
    pids = [int(note.read_text())] + fake.running()
    assert len(pids) > 1 and all(map(is_running, pids)), pids
    return request, pids


def all_end(pids: List[int], what: str) -> None:
    wait_until(lambda: not any(map(is_running, pids)),
               "%s ends %s" % (what, pids), 15)


def runs_end_behind_cmd(folder: Path) -> None:
    """a cancelled, revoked or stopped run ends with all it started, behind claude.cmd (W1)"""
    fake = Fake(folder / "fake")
    with bridge(folder / "data", "--spare", "0", claude=fake) as running:
        answer = running.call("POST", "/api/ask", {"message": "hello", "wait": 30})
        assert answer.get("response") == "Echo: hello", answer
        request, pids = hanging(running, fake)
        answer = running.call("DELETE", "/api/ask/" + request)
        assert answer["ok"], answer
        all_end(pids, "cancel")
        made = running.call("POST", "/api/tokens", {"name": "short"})
        pids = hanging(running, fake, made["token"])[1]
        assert running.call("DELETE", "/api/tokens/" + str(made["tokenId"]))["ok"]
        all_end(pids, "revoke")
        pids = hanging(running, fake)[1]
        assert running.ctrl_c() == 0, running.stderr()
        all_end(pids, "Ctrl-C")


def timeout_ends_run(folder: Path) -> None:
    """a run that takes too long ends with all it started, behind claude.cmd (W1)"""
    fake = Fake(folder / "fake")
    with bridge(folder / "data", "--spare", "0", "--run-seconds", "10", claude=fake) as running:
        request, pids = hanging(running, fake)
        answer = running.call("GET", "/api/ask/%s?wait=30" % request)
        assert answer.get("errorCode") == "timeout", answer
        all_end(pids, "timeout")


def hard_kill_ends_run(folder: Path) -> None:
    """a hard kill of the bridge ends the run, too; the next start continues (W1)"""
    fake = Fake(folder / "fake")
    with bridge(folder / "data", "--spare", "0", claude=fake) as running:
        token = running.token
        request, pids = hanging(running, fake)
        running.process.kill()
        running.process.wait()
        all_end(pids, "kill")
    with bridge(folder / "data", "--spare", "0", claude=fake) as running:
        answer = running.call("GET", "/api/ask/" + request, None, token)
        assert answer["status"] in ("queued", "processing"), answer
        assert running.call("DELETE", "/api/ask/" + request, None, token)["ok"]
        answer = running.call("POST", "/api/ask", {"message": "again", "wait": 30}, token)
        assert answer.get("response") == "Echo: again", answer


def kill_during_start(folder: Path) -> None:
    """a hard kill of the bridge while it starts a process leaves none"""
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(MODULE.parent), str(folder)], timeout=60,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert result.returncode == 9, result
    all_end([int((folder / "pid").read_text())], "kill")


def tunnel_ends(folder: Path) -> None:
    """cloudflared ends with the bridge, by Ctrl-C and by a hard kill, behind a .cmd"""
    fake = FakeCloudflared(folder / "cloudflared folder")

    def starting(running: Bridge) -> List[int]:
        def pids() -> List[int]:
            return [run["pid"] for run in fake.starts() if is_running(run["pid"])]

        wait_until(lambda: running.call("GET", "/api/status")["tunnel"]["url"], "a public address")
        return list(wait_until(pids, "cloudflared runs"))

    with bridge(folder / "data", "--cloudflared", str(fake.path)) as running:
        pids = starting(running)
        assert running.ctrl_c() == 0, running.stderr()
        all_end(pids, "Ctrl-C")
        token = running.token
    with bridge(folder / "data", "--cloudflared", str(fake.path)) as running:
        running.token = token
        pids = starting(running)
        running.process.kill()
        all_end(pids, "kill")


def rules_and_cmd(folder: Path) -> None:
    """a tool rule with & or % behind a .cmd of unknown content is refused (W3)"""
    fake = Fake(folder / "fake")
    with bridge(folder / "data", "--spare", "0", claude=fake) as running:
        for rule in ("Bash(echo %CAB_CHILD%:*)", "Bash(true & echo:*)"):
            token = running.call("POST", "/api/tokens", {"name": rule[:9], "tools": [rule]})
            body = {"message": "hello", "wait": 30}
            answer = running.call("POST", "/api/ask", body, token["token"])
            assert answer["status"] == "error" and "cmd.exe" in str(answer), (
                answer, fake.starts()[-1]["argv"])


def npm_shim_runs_directly(folder: Path) -> None:
    """the program behind npm's claude.cmd is run without cmd.exe; any rule reaches it (W3)"""
    fake = Fake(folder / "npm folder", is_npm=True)
    rules = ["Bash(echo %CAB_CHILD%:*)", 'Bash(true & echo ^a!b | cat <x >y:*)']
    with bridge(folder / "data", "--spare", "0", claude=fake) as running:
        token = running.call("POST", "/api/tokens", {"name": "rules", "tools": rules})["token"]
        answer = running.call("POST", "/api/ask", {"message": "hello", "wait": 30}, token)
        assert answer.get("response") == "Echo: hello", answer
        argv = fake.starts()[-1]["argv"]
        assert all(any(rule in word for word in argv) for rule in rules), argv
        request, pids = hanging(running, fake)
        assert running.call("DELETE", "/api/ask/" + request)["ok"]
        all_end(pids, "cancel")


def without_taskkill(folder: Path) -> None:
    """without a job object, and without taskkill, nothing is raised"""
    code = (
        "import sys; sys.path.insert(0, %r); sys.argv[0] = 'x'; import claude_api_bridge as cab\n"
        "import subprocess\n"
        "def none(*words, **options): raise FileNotFoundError(2, 'no taskkill')\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "cab.subprocess.run = none\n"
        "cab.kill_process(child.pid)\n"
        "child.wait(10)\n" % str(MODULE.parent))
    result = subprocess.run(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=60, encoding="utf-8")
    assert result.returncode == 0, result.stderr


PARTS: List[Callable[[Path], None]] = [
    demo_quick_start, piped_output_is_utf8, doctor, port_is_not_shared, runs_end_behind_cmd,
    timeout_ends_run, hard_kill_ends_run, kill_during_start, tunnel_ends, rules_and_cmd,
    npm_shim_runs_directly, without_taskkill]


def main() -> int:
    failures = 0
    only = sys.argv[2:]
    for part in PARTS:
        if only and part.__name__ not in only:
            continue
        started = time.monotonic()
        folder = Path(tempfile.mkdtemp(prefix="with blanks "))
        result = "ok     "
        try:
            part(folder)
        except Exception:
            result = "FAILED "
            failures += 1
            traceback.print_exc()
        took = time.monotonic() - started
        print("%s %-24s %5.1f s  %s" % (result, part.__name__, took, part.__doc__), flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
