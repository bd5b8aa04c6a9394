"""How long a start takes and how much memory an idle bridge holds, as .py, as .pyz and as the installed command.

    python tests/bench/bench_start.py [--python PATH] [--runs 15] [--clients 1000] [--json]

1. `--version`, and the time from spawn to the line that tells the address, at which the port is open: each beside
   `python -c pass`, and beside the imports that no server of this kind can do without. All run by the Python of one fresh venv, in turn, so that a busy machine disturbs all alike; each ran once
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
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ContextManager, Dict, List, Optional, Sequence, Tuple

import common                                           # beside this file; it also makes tests/ importable
from fake_claude import FLAGS

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
BARE, FLOOR = "pass", "import http.server, sqlite3, subprocess"
Times = Dict[Tuple[str, str], List[Tuple[float, float]]]     # (what, form) -> [(wall, CPU seconds)]


def build(python: str, folder: Path) -> Tuple[str, Dict[str, List[str]]]:
    """A venv, and the bridge in its forms. -> (its Python, a command line for each form)."""
    subprocess.run([python, "-m", "venv", "--without-pip", str(folder / "venv")], check=True, timeout=120)
    inside = str(folder / "venv/bin/python")
    for path in (common.MODULE, common.MODULE.with_name("zipapp.sh")):
        shutil.copy(path, folder)
    subprocess.run(["sh", str(folder / "zipapp.sh")], env={**os.environ, "PYTHON": inside}, check=True, timeout=120, stdout=subprocess.DEVNULL)
    packages = next((folder / "venv/lib").glob("python*/site-packages"))
    shutil.copy(common.MODULE, packages)
    subprocess.run([inside, "-m", "compileall", "-q", str(packages)], check=True, timeout=120)
    for path, text in ((folder / "venv/bin/claude-api-bridge", COMMAND % inside), (folder / "claude", CLAUDE)):
        path.write_text(text)
        path.chmod(0o755)
    return inside, {".py": [inside, str(folder / "claude_api_bridge.py")], ".pyz": [inside, str(folder / "dist/claude_api_bridge.pyz")],
                    "command": [str(folder / "venv/bin/claude-api-bridge")]}


def run_once(argv: Sequence[str]) -> Tuple[float, float]:
    """-> (wall, CPU) seconds of a command, to its end."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    # By the end of its output: without a pipe, a wait with a bound looks only every 50 ms.
    subprocess.run(list(argv), env=common.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, timeout=60)
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def started(argv: Sequence[str], folder: Path, home: str) -> ContextManager[common.Served]:
    return common.bridge(folder / home, common.environment(), "--spare", "0", "--claude", str(folder / "claude"), command=argv)


def start_once(argv: Sequence[str], folder: Path, home: str) -> Tuple[float, float]:
    """-> (wall, CPU) seconds from spawn to listening; without the children."""
    began = time.perf_counter()
    with started(argv, folder, home) as served:
        took = time.perf_counter() - began
        tasks = Path("/proc/%d/task" % served.pid).glob("*/schedstat")
        used = sum(int(path.read_text().split()[0]) for path in tasks) / 1e9
        socket.create_connection(("127.0.0.1", served.port), 5).close()
    return took, used


def times(python: str, forms: Dict[str, List[str]], runs: int, folder: Path) -> Times:
    """All forms in turn, `runs` times."""
    found: Times = {}
    for n in range(runs + 1):
        round_ = {("python -c", code): run_once([python, "-c", code]) for code in (BARE, FLOOR)}
        for form, argv in forms.items():
            round_["--version", form] = run_once([*argv, "--version"])
            round_["start", form] = start_once(argv, folder, "home" + form)
        for key, took in round_.items():
            found.setdefault(key, []).extend([took] if n else [])      # the first round only warms up
    return found


def resident(pid: int, what: str = "VmRSS") -> float:
    """Memory in MB; VmHWM is the most that there was."""
    found = re.search(r"^%s:\s+(\d+) kB" % what, Path("/proc/%d/status" % pid).read_text(), re.M)
    assert found
    return int(found.group(1)) / 1024


def idle_memory(argv: Sequence[str], folder: Path, home: str) -> float:
    with started(argv, folder, home) as served:
        for n in range(REQUESTS):
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)) as connection:
                connection.request("GET", ("/api/status", "/health", "/openapi.json")[n % 3])
                connection.getresponse().read()
        return resident(served.pid)


def crowd(argv: Sequence[str], clients: int, folder: Path) -> Dict[str, float]:
    """Clients that each make one request and then keep their connection. -> what the bridge makes of them."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(clients + 200, limit), limit))
    with started(argv, folder, "home-crowd") as served, contextlib.ExitStack() as kept:
        before, answered, poller = resident(served.pid), 0, select.poll()
        for _ in range(clients):
            client = kept.enter_context(socket.create_connection(("127.0.0.1", served.port), 10))
            client.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            answered += client.recv(4_096).startswith(b"HTTP/1.1 200 ")
            poller.register(client, select.POLLIN)
        return {"clients": clients, "answered": answered, "kept": clients - len(poller.poll(0)), "before_mb": before,
                "now_mb": resident(served.pid), "most_mb": resident(served.pid, "VmHWM"),
                "threads": len(os.listdir("/proc/%d/task" % served.pid))}


def measure(python: str, runs: int, clients: int, folder: Path) -> Dict[str, Any]:
    inside, forms = build(python, folder)
    rows = []
    found = times(inside, forms, runs, folder)
    bare = [statistics.median(each) for each in zip(*found["python -c", BARE])]
    for (what, form), pairs in sorted(found.items(), key=lambda each: ("python -c", "--version", "start").index(each[0][0])):
        wall, cpu = (statistics.median(each) for each in zip(*pairs))
        rows.append({"what": what, "form": form, "wall_seconds": wall, "wall_ratio": wall / bare[0], "cpu_seconds": cpu,
                     "cpu_ratio": cpu / bare[1]})
    return {"python": subprocess.run([inside, "-V"], stdout=subprocess.PIPE, encoding="utf-8").stdout.strip(), "times": rows,
            "idle_mb": {form: idle_memory(argv, folder, "home" + form) for form, argv in forms.items()},
            "crowd": crowd(forms["command"], clients, folder)}


def table(found: Dict[str, Any]) -> str:
    lines = [found["python"], "%-50s %9s %7s %9s %7s" % ("", "wall ms", "ratio", "CPU ms", "ratio")]
    lines += ["%-50s %9.1f %7.2f %9.1f %7.2f" % ("%s %s" % (row["what"], row["form"]), 1_000 * row["wall_seconds"], row["wall_ratio"],
                                                 1_000 * row["cpu_seconds"], row["cpu_ratio"]) for row in found["times"]]
    lines += ["%-50s %9.1f MB" % ("idle " + form, size) for form, size in found["idle_mb"].items()]
    many, idle = found["crowd"], found["idle_mb"]
    lines.append("%-50s %9.1f MB (%.1f before, %.1f at most; %d answered, %d kept open, %d threads)" % (
        "%d idle clients" % many["clients"], many["now_mb"], many["before_mb"], many["most_mb"], many["answered"], many["kept"],
        many["threads"]))
    of = {(row["what"], row["form"]): row["cpu_ratio"] for row in found["times"]}
    lines += [common.judged("CPU of the .pyz to that of the .py, %s" % what, of[what, ".pyz"] / of[what, ".py"], 1.3)
              for what in ("--version", "start")]
    lines += [common.judged("CPU of the command's --version to bare", of["--version", "command"], 1.5),
              common.judged("CPU of the command from spawn to listening to bare", of["start", "command"], 4),
              common.judged("MB of the .pyz and the command, idle", max(idle[".pyz"], idle["command"]), 30),
              common.judged("MB with %d idle clients" % many["clients"], many["most_mb"], 70)]
    return "\n".join(lines)


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
