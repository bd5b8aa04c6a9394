"""How long a start takes and how much memory an idle bridge holds, as .py, as .pyz and as the installed command.

    python tests/bench/bench_start.py [--python PATH] [--runs 15] [--clients 1000] [--json]

1. `--version`, and the time from spawn to the line that tells the address, at which the port is open: each beside
   `python -c pass`. All run by the Python of one fresh venv, in turn, so that a busy machine disturbs all alike; each ran once
   before. Wall time and the program's own CPU time, which hardly depends on what else runs.
2. The resident memory after 30 requests, a connection each; and with 1,000 clients that made one request each and then keep
   their connections. The bridge lets at most 256 be open and closes the idlest beyond; the highest value until then is told.
The command is what pip writes: the module with its cached bytecode in the venv, and a script that imports it. A shell script
stands in for `claude` and answers what a start asks it; no spare (--spare 0) takes part. Linux (it looks into /proc).
"""
from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS)]

from fake_claude import FLAGS  # noqa: E402

ROOT = TESTS.parent
CLAUDE = """#!/bin/sh
case "$1" in
--version) echo "2.1.330 (Claude Code)" ;;
--help) echo "  auth %s" ;;
--setting-sources=) echo '{"loggedIn": true, "subscriptionType": "max"}' ;;
esac
""" % FLAGS
COMMAND = """#!%s
import sys
from claude_api_bridge import run
if __name__ == '__main__':
    sys.argv[0] = sys.argv[0].removesuffix('.exe')
    sys.exit(run())
"""
REQUESTS = 30
FORMS = (".py", ".pyz", "command")
Times = Dict[Tuple[str, str], List[Tuple[float, float]]]     # (what, form) -> [(wall, CPU seconds)]


def build(python: str, folder: Path) -> Tuple[str, Dict[str, List[str]]]:
    """A venv, and the bridge in its forms. -> (its Python, a command line for each form)."""
    subprocess.run([python, "-m", "venv", "--without-pip", str(folder / "venv")], check=True, timeout=120)
    inside = str(folder / "venv/bin/python")
    for name in ("claude_api_bridge.py", "zipapp.sh"):
        shutil.copy(ROOT / name, folder / name)
    subprocess.run(["sh", str(folder / "zipapp.sh")], env={**os.environ, "PYTHON": inside}, check=True, timeout=120, stdout=subprocess.DEVNULL)
    packages = next((folder / "venv/lib").glob("python*/site-packages"))
    shutil.copy(ROOT / "claude_api_bridge.py", packages)
    subprocess.run([inside, "-m", "compileall", "-q", str(packages)], check=True, timeout=120)
    for path, text in ((folder / "venv/bin/claude-api-bridge", COMMAND % inside), (folder / "claude", CLAUDE)):
        path.write_text(text)
        path.chmod(0o755)
    return inside, {".py": [inside, str(folder / "claude_api_bridge.py")], ".pyz": [inside, str(folder / "dist/claude_api_bridge.pyz")],
                    "command": [str(folder / "venv/bin/claude-api-bridge")]}


def environment(folder: Path) -> Dict[str, str]:
    return {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(folder)}


def run_once(argv: Sequence[str], folder: Path) -> Tuple[float, float]:
    """-> (wall, CPU) seconds of a command, to its end."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(list(argv), env=environment(folder), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True, timeout=60)
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def cpu_seconds(pid: int) -> float:
    """The CPU time of a process so far, without its children."""
    return sum(int(path.read_text().split()[0]) for path in Path("/proc/%d/task" % pid).glob("*/schedstat")) / 1e9


@contextlib.contextmanager
def started(argv: Sequence[str], folder: Path, data: str) -> Iterator[Tuple[int, int, Tuple[float, float]]]:
    """A bridge that serves. -> (its pid, its port, the (wall, CPU) seconds until it told its address)."""
    began = time.perf_counter()
    program = subprocess.Popen([*argv, "start", "--no-tunnel", "--host", "127.0.0.1", "--port", "0", "--rate-limit", "0", "--spare", "0",
                                "--data-dir", str(folder / data), "--claude", str(folder / "claude")], env=environment(folder),
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert program.stdout is not None
    try:
        with program.stdout:
            address = next((line for line in program.stdout if line.startswith(b"http")), b"")
            took = time.perf_counter() - began, cpu_seconds(program.pid)
            if not address:
                raise SystemExit("the bridge did not start (status %s)" % program.wait(30))
            port = int(address.rpartition(b":")[2])
            socket.create_connection(("127.0.0.1", port), 5).close()
            yield program.pid, port, took
    finally:
        program.send_signal(signal.SIGTERM)
        program.wait(30)


def times(python: str, forms: Dict[str, List[str]], runs: int, folder: Path) -> Times:
    """All forms in turn, `runs` times."""
    found: Times = {}
    for n in range(runs + 1):
        round_: Dict[Tuple[str, str], Tuple[float, float]] = {("python -c pass", ""): run_once([python, "-c", "pass"], folder)}
        for form, argv in forms.items():
            round_["--version", form] = run_once([*argv, "--version"], folder)
            with started(argv, folder, "data" + form) as (_, _, took):
                round_["start", form] = took
        for key, took in round_.items():
            found.setdefault(key, []).extend([took] if n else [])      # the first round only warms up
    return found


def resident(pid: int, what: str = "VmRSS") -> float:
    """Memory in MB; VmHWM is the most that there was."""
    found = re.search(r"^%s:\s+(\d+) kB" % what, Path("/proc/%d/status" % pid).read_text(), re.M)
    assert found
    return int(found.group(1)) / 1024


def idle_memory(argv: List[str], folder: Path, data: str) -> float:
    with started(argv, folder, data) as (pid, port, _):
        for n in range(REQUESTS):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", ("/api/status", "/health", "/openapi.json")[n % 3])
            connection.getresponse().read()
            connection.close()
        return resident(pid)


def crowd(argv: List[str], clients: int, folder: Path) -> Dict[str, float]:
    """Clients that each make one request and then keep their connection. -> what the bridge makes of them."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(clients + 200, limit[1]), limit[1]))
    with started(argv, folder, "data-crowd") as (pid, port, _), contextlib.ExitStack() as kept:
        before, began, answered, sockets = resident(pid), time.perf_counter(), 0, []
        for _ in range(clients):
            sockets.append(kept.enter_context(socket.create_connection(("127.0.0.1", port), 10)))
            sockets[-1].sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            answered += sockets[-1].recv(4_096).startswith(b"HTTP/1.1 200 ")
        poller, took = select.poll(), time.perf_counter() - began
        for each in sockets:
            poller.register(each, select.POLLIN)
        return {"clients": clients, "answered": answered, "kept": clients - len(poller.poll(0)), "opening_seconds": took,
                "before_mb": before, "now_mb": resident(pid), "most_mb": resident(pid, "VmHWM"),
                "threads": len(os.listdir("/proc/%d/task" % pid))}


def measure(python: str, runs: int, clients: int, folder: Path) -> Dict[str, Any]:
    inside, forms = build(python, folder)
    rows = []
    found = times(inside, forms, runs, folder)
    bare = [statistics.median(each) for each in zip(*found["python -c pass", ""])]
    for (what, form), pairs in sorted(found.items(), key=lambda each: ("python -c pass", "--version", "start").index(each[0][0])):
        wall, cpu = (statistics.median(each) for each in zip(*pairs))
        rows.append({"what": what, "form": form, "wall_seconds": wall, "wall_ratio": wall / bare[0], "cpu_seconds": cpu,
                     "cpu_ratio": cpu / bare[1]})
    of = {(row["what"], row["form"]): row for row in rows}
    return {"python": subprocess.run([inside, "-V"], stdout=subprocess.PIPE, encoding="utf-8").stdout.strip(), "times": rows,
            "pyz_to_py": {what: {kind: of[what, ".pyz"][kind] / of[what, ".py"][kind] for kind in ("wall_seconds", "cpu_seconds")}
                          for what in ("--version", "start")},
            "idle_mb": {form: idle_memory(argv, folder, "data" + form) for form, argv in forms.items()},
            "crowd": crowd(forms["command"], clients, folder)}


def table(found: Dict[str, Any]) -> str:
    lines = [found["python"], "%-34s %9s %7s %9s %7s" % ("", "wall ms", "ratio", "CPU ms", "ratio")]
    for row in found["times"]:
        name = {"start": "spawn to listening", "--version": "--version"}.get(row["what"], row["what"])
        lines.append("%-34s %9.1f %7.2f %9.1f %7.2f" % (", ".join(filter(None, (name, row["form"]))), 1_000 * row["wall_seconds"],
                                                        row["wall_ratio"], 1_000 * row["cpu_seconds"], row["cpu_ratio"]))
    for what, ratios in found["pyz_to_py"].items():
        lines.append("%-34s %9s %7.2f %9s %7.2f" % (what + ": .pyz to .py", "", ratios["wall_seconds"], "", ratios["cpu_seconds"]))
    lines += ["%-34s %9.1f MB" % ("idle memory, " + form, size) for form, size in found["idle_mb"].items()]
    crowd_of = found["crowd"]
    return "\n".join(lines + [
        "%-34s %9.1f MB (%.1f before, %.1f at most; all %d answered, %d kept open, %d threads)" % (
            "%d idle clients, command" % crowd_of["clients"], crowd_of["now_mb"], crowd_of["before_mb"], crowd_of["most_mb"],
            crowd_of["answered"], crowd_of["kept"], crowd_of["threads"])])


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description="Times starts, and weighs an idle bridge.")
    parser.add_argument("--python", default=sys.executable, help="the Python to measure (default: the one that runs this)")
    parser.add_argument("--runs", type=int, default=15, help="rounds (default: 15)")
    parser.add_argument("--clients", type=int, default=1_000, help="idle connections (default: 1000)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(argv)
    if sys.platform != "linux":
        print("error: this needs Linux", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        found = measure(options.python, max(1, options.runs), max(1, options.clients), Path(folder))
    print(json.dumps(found) if options.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
