"""Measure the time of a start and the memory of an idle bridge: as .py, .pyz and command.

    python tests/bench/bench_start.py [--python PATH] [--runs 15] [--clients 1000] [--json]

1. The time of `--version`, and the time from spawn to the line with the address, when the port is
   open. The table compares them with `python -c pass`, and with the imports that every server of
   this kind needs. The Python of one fresh venv runs all of them in turn, so that a busy machine
   disturbs all of them. Each ran once before. The figures are wall time and CPU time; the CPU time
   hardly depends on other programs.
2. The resident memory after 30 requests, each on a connection of its own; and with 1,000 clients
   that send one request each and then keep their connections open. The bridge allows 256
   connections and closes the longest idle ones beyond. The table contains the highest value, too.

The command is what pip writes: the module with its cached bytecode in the venv, and a script that
imports it. A shell script answers the questions of a start in place of `claude`; the bridge keeps
no idle process (--spare 0). Linux only (it reads /proc).
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

# `common` makes tests/ importable.
import common
from fake_claude import FLAGS

CLAUDE = (
    """#!/bin/sh
case "$1" in
--version) echo "2.1.330 (Claude Code)" ;;
--help) echo "  auth %s" ;;
--setting-sources=) echo '{"loggedIn": true, "subscriptionType": "max"}' ;;
esac
"""
    % FLAGS
)
COMMAND = """#!%s
import sys
from claude_api_bridge import run
if __name__ == '__main__':
    sys.argv[0] = sys.argv[0].removesuffix('.exe')
    sys.exit(run())
"""
REQUESTS = 30
BARE, FLOOR = "pass", "import http.server, sqlite3, subprocess"
# (what, form) -> [(wall seconds, CPU seconds)]
Times = Dict[Tuple[str, str], List[Tuple[float, float]]]


def build(python: str, folder: Path) -> Tuple[str, Dict[str, List[str]]]:
    """Create a venv and the forms of the bridge; return (its Python, form -> command line)."""
    subprocess.run(
        [python, "-m", "venv", "--without-pip", str(folder / "venv")], check=True, timeout=120
    )
    inside = str(folder / "venv/bin/python")
    for path in (common.MODULE, common.MODULE.with_name("zipapp.sh")):
        shutil.copy(path, folder)
    subprocess.run(
        ["sh", str(folder / "zipapp.sh")],
        env={**os.environ, "PYTHON": inside},
        check=True,
        timeout=120,
        stdout=subprocess.DEVNULL,
    )
    packages = next((folder / "venv/lib").glob("python*/site-packages"))
    shutil.copy(common.MODULE, packages)
    subprocess.run([inside, "-m", "compileall", "-q", str(packages)], check=True, timeout=120)
    for path, text in (
        (folder / "venv/bin/claude-api-bridge", COMMAND % inside),
        (folder / "claude", CLAUDE),
    ):
        path.write_text(text)
        path.chmod(0o755)
    return inside, {
        ".py": [inside, str(folder / "claude_api_bridge.py")],
        ".pyz": [inside, str(folder / "dist/claude_api_bridge.pyz")],
        "command": [str(folder / "venv/bin/claude-api-bridge")],
    }


def run_once(argv: Sequence[str]) -> Tuple[float, float]:
    """Run a command to its end; return its (wall, CPU) seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    # Wait for the end of its output: without a pipe, a wait with a timeout polls every 50 ms.
    subprocess.run(
        list(argv),
        env=common.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def running_bridge(argv: Sequence[str], folder: Path, home: str) -> ContextManager[common.Served]:
    """Run a bridge in one of its forms."""
    options = ("--spare", "0", "--claude", str(folder / "claude"))
    return common.bridge(folder / home, common.environment(), *options, command=argv)


def start_once(argv: Sequence[str], folder: Path, home: str) -> Tuple[float, float]:
    """Return the (wall, CPU) seconds from spawn to listening, without the child processes."""
    start = time.perf_counter()
    with running_bridge(argv, folder, home) as served:
        wall = time.perf_counter() - start
        tasks = Path("/proc/%d/task" % served.pid).glob("*/schedstat")
        used = sum(int(path.read_text().split()[0]) for path in tasks) / 1e9
        socket.create_connection(("127.0.0.1", served.port), 5).close()
    return wall, used


def times(python: str, forms: Dict[str, List[str]], runs: int, folder: Path) -> Times:
    """Run all forms in turn, `runs` times after a first round that does not count."""
    samples: Times = {}
    for n in range(runs + 1):
        this_round = {("python -c", code): run_once([python, "-c", code]) for code in (BARE, FLOOR)}
        for form, argv in forms.items():
            this_round["--version", form] = run_once([*argv, "--version"])
            this_round["start", form] = start_once(argv, folder, "home" + form)
        if n:
            for key, seconds in this_round.items():
                samples.setdefault(key, []).append(seconds)
    return samples


def resident(pid: int, field: str = "VmRSS") -> float:
    """Return the resident memory in MB; with the field VmHWM the highest value so far."""
    status = Path("/proc/%d/status" % pid).read_text()
    match = re.search(r"^%s:\s+(\d+) kB" % field, status, re.M)
    assert match
    return int(match.group(1)) / 1024


def idle_memory(argv: Sequence[str], folder: Path, home: str) -> float:
    """Return the memory in MB of a bridge after some requests."""
    paths = ("/api/status", "/health", "/openapi.json")
    with running_bridge(argv, folder, home) as served:
        for n in range(REQUESTS):
            connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
            with contextlib.closing(connection):
                connection.request("GET", paths[n % 3])
                connection.getresponse().read()
        # One second after its start the bridge gives memory back.
        time.sleep(1.5)
        return resident(served.pid)


def crowd(argv: Sequence[str], clients: int, folder: Path) -> Dict[str, float]:
    """Open connections, with one request each, and leave them open; return the figures."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(clients + 200, limit), limit))
    with running_bridge(argv, folder, "home-crowd") as served, contextlib.ExitStack() as stack:
        before, answered, poller = resident(served.pid), 0, select.poll()
        for _ in range(clients):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", served.port), 10))
            client.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            answered += client.recv(4_096).startswith(b"HTTP/1.1 200 ")
            poller.register(client, select.POLLIN)
        return {
            "clients": clients,
            "answered": answered,
            "open": clients - len(poller.poll(0)),
            "before_mb": before,
            "now_mb": resident(served.pid),
            "most_mb": resident(served.pid, "VmHWM"),
            "threads": len(os.listdir("/proc/%d/task" % served.pid)),
        }


def measure(python: str, runs: int, clients: int, folder: Path) -> Dict[str, Any]:
    """Run all measurements; return the figures."""
    inside, forms = build(python, folder)
    samples = times(inside, forms, runs, folder)
    bare_wall, bare_cpu = (statistics.median(column) for column in zip(*samples["python -c", BARE]))
    order = ("python -c", "--version", "start")
    rows = []
    for what, form in sorted(samples, key=lambda key: order.index(key[0])):
        wall, cpu = (statistics.median(column) for column in zip(*samples[what, form]))
        rows.append(
            {
                "what": what,
                "form": form,
                "wall_seconds": wall,
                "wall_ratio": wall / bare_wall,
                "cpu_seconds": cpu,
                "cpu_ratio": cpu / bare_cpu,
            }
        )
    version = subprocess.run([inside, "-V"], stdout=subprocess.PIPE, encoding="utf-8")
    return {
        "python": version.stdout.strip(),
        "times": rows,
        "idle_mb": {form: idle_memory(argv, folder, "home" + form) for form, argv in forms.items()},
        "crowd": crowd(forms["command"], clients, folder),
    }


def table(figures: Dict[str, Any]) -> str:
    """Return the figures as text."""
    head = "%-50s %9s %7s %9s %7s" % ("", "wall ms", "ratio", "CPU ms", "ratio")
    lines = [figures["python"], head]
    for row in figures["times"]:
        wall = "%9.1f %7.2f" % (1_000 * row["wall_seconds"], row["wall_ratio"])
        cpu = "%9.1f %7.2f" % (1_000 * row["cpu_seconds"], row["cpu_ratio"])
        lines.append("%-50s %s %s" % (row["what"] + " " + row["form"], wall, cpu))
    idle, many = figures["idle_mb"], figures["crowd"]
    lines += ["%-50s %9.1f MB" % ("idle " + form, size) for form, size in idle.items()]
    name = "%d idle clients" % many["clients"]
    memory = "%(now_mb)9.1f MB (%(before_mb).1f before, %(most_mb).1f at most" % many
    counts = "%(answered)d answered, %(open)d open, %(threads)d threads)" % many
    lines.append("%-50s %s; %s" % (name, memory, counts))
    cpu_ratios = {(row["what"], row["form"]): row["cpu_ratio"] for row in figures["times"]}
    for what in ("--version", "start"):
        ratio = cpu_ratios[what, ".pyz"] / cpu_ratios[what, ".py"]
        lines.append(common.judged("CPU of the .pyz to that of the .py, %s" % what, ratio, 1.3))
    version, start = cpu_ratios["--version", "command"], cpu_ratios["start", "command"]
    largest = max(idle[".pyz"], idle["command"])
    lines += [
        common.judged("CPU of the command's --version to bare", version, 1.5),
        common.judged("CPU of the command from spawn to listening to bare", start, 4),
        common.judged("MB of the .pyz and the command, idle", largest, 30),
        common.judged("MB with %s" % name, many["most_mb"], 70),
    ]
    return "\n".join(lines)


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description="Measure starts, and the memory when idle.")
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="the Python to measure (default: the Python of this program)",
    )
    parser.add_argument("--runs", type=int, default=15, help="rounds (default: 15)")
    parser.add_argument(
        "--clients", type=int, default=1_000, help="idle connections (default: 1000)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(argv)
    if sys.platform != "linux":
        print("error: this needs Linux", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        runs, clients = max(1, options.runs), max(1, options.clients)
        figures = measure(options.python, runs, clients, Path(folder))
    print(json.dumps(figures) if options.json else table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
