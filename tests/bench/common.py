"""Common parts of the benchmarks: a bridge, a request to it, figures."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, NamedTuple, Optional, Sequence, Tuple

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS)]
MODULE = TESTS.parent / "claude_api_bridge.py"
PROMPT = "What is the capital of France?"


class Served(NamedTuple):
    """A server that listens. token: an admin token."""

    pid: int
    port: int
    token: str


@contextlib.contextmanager
def bridge(
    folder: Path,
    environ: Mapping[str, str],
    *options: str,
    module: Path = MODULE,
    command: Sequence[str] = (),
) -> Iterator[Served]:
    """Run a bridge as a program of its own, without a limit on requests.

    folder: its home, with its data.  command: the program that runs instead of the module.
    """
    folder.mkdir(parents=True, exist_ok=True)
    argv = [
        *(command or (sys.executable, str(module))), "start", "--no-tunnel", "--host", "127.0.0.1",
        "--port", "0", "--rate-limit", "0", "--data-dir", str(folder / "data"), *options,
    ]
    with subprocess.Popen(
        argv,
        env={**environ, "HOME": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as program:
        try:
            assert program.stdout
            token = ""
            for line in map(str.strip, program.stdout):
                token = line if line.startswith("cab-") else token
                if line.startswith("http"):
                    break
            else:
                raise SystemExit("the bridge did not start (status %s)" % program.wait())
            yield Served(program.pid, int(line.rpartition(":")[2]), token)
        finally:
            program.send_signal(signal.SIGTERM)
            program.wait(30)


def environment() -> Dict[str, str]:
    """Return an environment without the variables of this machine."""
    return {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}


@contextlib.contextmanager
def open_request(
    at: Served, method: str, path: str, body: Optional[Mapping[str, Any]] = None
) -> Iterator[Tuple[float, http.client.HTTPResponse]]:
    """Send a request over a connection of its own; yield the time before it, and the response."""
    data = None if body is None else json.dumps(body)
    connection = http.client.HTTPConnection("127.0.0.1", at.port, timeout=120)
    start = time.perf_counter()
    with contextlib.closing(connection):
        connection.request(method, path, data, {"Authorization": "Bearer " + at.token})
        with connection.getresponse() as response:
            yield start, response


def call(at: Served, method: str, path: str, body: Optional[Mapping[str, Any]] = None) -> Any:
    """Send a request over a connection of its own; return the JSON of the response."""
    with open_request(at, method, path, body) as (_, response):
        return json.loads(response.read())


def cold(claude: str, environ: Dict[str, str], home: Path) -> Tuple[float, float]:
    """Run a `claude -p` that streams; return the seconds to its first text and to its end.

    home: its home, which is created if it is missing.
    """
    home.mkdir(exist_ok=True)
    start = time.perf_counter()
    child = subprocess.Popen(
        [
            claude, "-p", "--output-format", "stream-json", "--verbose",
            "--include-partial-messages", PROMPT,
        ],
        env={**environ, "HOME": str(home)},
        cwd=str(home),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    with child.stdout:
        first = next(
            (time.perf_counter() for line in child.stdout if b'"text_delta"' in line), None
        )
        child.stdout.read()
    if child.wait(60) or first is None:
        raise SystemExit("claude -p ended without an answer (status %d)" % child.returncode)
    return first - start, time.perf_counter() - start


def cpu_ticks(pid: int) -> Tuple[int, int, bool]:
    """Return (parent, CPU time in ticks, whether it sleeps) of a process (Linux).

    Raises OSError.
    """
    words = Path("/proc/%d/stat" % pid).read_text(errors="replace").rpartition(")")[2].split()
    return int(words[1]), int(words[11]) + int(words[12]), words[0] == "S"


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process, without its children."""
    return cpu_ticks(pid)[1] / os.sysconf("SC_CLK_TCK")


def children_of(pid: int) -> int:
    """Return the number of child processes."""
    count = 0
    for path in Path("/proc/%d/task" % pid).glob("*/children"):
        # The thread may end before its file is read.
        with contextlib.suppress(OSError):
            count += len(path.read_text().split())
    return count


def paced_claude(folder: Path) -> str:
    """Write an executable that runs paced_claude.py with its log in `folder`; return its path."""
    folder.mkdir(parents=True)
    path = folder / "claude"
    script = Path(__file__).with_name("paced_claude.py")
    words = [sys.executable, "-S", str(script), str(folder)]
    path.write_text('#!/bin/sh\nexec %s "$@"\n' % " ".join(map(shlex.quote, words)))
    path.chmod(0o755)
    return str(path)


def percentile(values: Sequence[float], share: float) -> float:
    """Return a percentile of sorted values. share: from 0 to 1."""
    return values[min(len(values) - 1, int(len(values) * share))]


def judged(name: str, value: float, target: float, is_least: bool = False) -> str:
    """Return a line that compares a value with its target."""
    relation = "at least" if is_least else "at most"
    is_met = value >= target if is_least else value <= target
    verdict = "met" if is_met else "MISSED"
    return "target: %s %s %g: %s (%.3g)" % (name, relation, target, verdict, value)
