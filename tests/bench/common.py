"""What the benchmarks share: a bridge of their own, a question to it, figures."""
from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, Mapping, NamedTuple, Optional, Sequence, Tuple

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS)]
MODULE = TESTS.parent / "claude_api_bridge.py"


class Served(NamedTuple):
    """A server that listens. token: an admin's."""
    pid: int
    port: int
    token: str


@contextlib.contextmanager
def bridge(folder: Path, environ: Mapping[str, str], *options: str, module: Path = MODULE,
           command: Sequence[str] = ()) -> Iterator[Served]:
    """A bridge as a program of its own, without a limit on requests. folder: its home, with its data; command: what to run in place
    of the module."""
    folder.mkdir(parents=True, exist_ok=True)
    argv = [*(command or (sys.executable, str(module))), "start", "--no-tunnel", "--host", "127.0.0.1", "--port", "0", "--rate-limit", "0",
            "--data-dir", str(folder / "data"), *options]
    with subprocess.Popen(argv, env={**environ, "HOME": str(folder)}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True) as program:
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
    """Nothing of this machine's own."""
    return {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}


def call(at: Served, method: str, path: str, body: Optional[Mapping[str, Any]] = None) -> Any:
    """The JSON that the bridge answers, over a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", at.port, timeout=120)
    with contextlib.closing(connection):
        connection.request(method, path, None if body is None else json.dumps(body), {"Authorization": "Bearer " + at.token})
        return json.loads(connection.getresponse().read())


def cpu_ticks(pid: int) -> Tuple[int, int, bool]:
    """-> (parent, CPU time in ticks, whether it sleeps) of a process (Linux). Raises OSError."""
    words = Path("/proc/%d/stat" % pid).read_text(errors="replace").rpartition(")")[2].split()
    return int(words[1]), int(words[11]) + int(words[12]), words[0] == "S"


def cpu_seconds(pid: int) -> float:
    """What a process, without its children, has used."""
    return cpu_ticks(pid)[1] / os.sysconf("SC_CLK_TCK")


def paced_claude(folder: Path) -> str:
    """-> the path of an executable that is paced_claude.py, with `folder` for its log."""
    folder.mkdir(parents=True)
    path = folder / "claude"
    path.write_text("#!/bin/sh\nexec %s\n" % (" ".join(map(shlex.quote, (
        sys.executable, "-S", str(Path(__file__).with_name("paced_claude.py")), str(folder)))) + ' "$@"'))
    path.chmod(0o755)
    return str(path)


def percentile(values: Sequence[float], share: float) -> float:
    """Of sorted values."""
    return values[min(len(values) - 1, int(len(values) * share))]


def judged(name: str, value: float, target: float, is_least: bool = False) -> str:
    """A line on one target."""
    is_met = value >= target if is_least else value <= target
    return "target: %s %s %g: %s (%.3g)" % (name, "at least" if is_least else "at most", target, "met" if is_met else "MISSED", value)
