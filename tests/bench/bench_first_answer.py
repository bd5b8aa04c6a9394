"""Measure the time of a short answer: of a cold `claude -p`, and of the bridge.

    python tests/bench/bench_first_answer.py [--claude PATH] [--asks 4] [--burst 20] [--rounds 3]
                                             [--spares 0,1,2,3] [--json]

Both run the same real CLI, with the same environment, against a fake Messages API on loopback that
answers at once. Each round starts a bridge with each number of idle processes:
1. Paced: a message when the idle processes are ready, up to the first token and to the end of the
   answer, in turn with a cold start.
2. A burst: so many messages at once, until all are answered. The table compares it with so many
   times the mean of the cold starts before and after it, as if they ran one after the other.
3. The memory of the bridge's `claude` processes: when idle, and the maximum in the burst. It is the
   sum of their own memory and their share of common memory (PSS).

The ratios refer to the cold starts of the same minute, because other programs may use the machine.
There are two ratios for the first token: to the first token of a `claude -p` that streams, and
("to end") to the end of one, when a `claude -p` prints its words if it does not stream.
Linux only (it reads /proc).
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

# `common` makes tests/ importable.
import common
from common import PROMPT, cold
from messages_api import MessagesApi

# A process that has used no CPU for this time waits for its input.
READY_SECONDS = 0.3
# Interval between two measurements of the memory.
SAMPLE_SECONDS = 0.1


# --- the processes of a bridge ---


def children(pid: int) -> Dict[int, int]:
    """Return the child processes of `pid`, with their CPU time in ticks."""
    processes = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            parent, ticks, _ = common.cpu_ticks(int(entry))
            if parent == pid:
                processes[int(entry)] = ticks
    return processes


def wait_for_spares(bridge: int, count: int = 1) -> None:
    """Wait until the bridge has exactly `count` children, and all of them wait for input."""
    deadline, still_since = time.monotonic() + 60, time.monotonic()
    last: Dict[int, int] = {}
    while time.monotonic() < deadline:
        now = children(bridge)
        is_changed = len(now) != count or now.keys() != last.keys()
        # A single tick may come from a timer.
        if is_changed or any(now[pid] > last[pid] + 1 for pid in now):
            last, still_since = now, time.monotonic()
        elif all(ticks > 10 for ticks in now.values()):
            if time.monotonic() - still_since >= READY_SECONDS:
                return
        time.sleep(0.02)
    raise SystemExit("%d idle processes did not become ready within 60 s" % count)


def memory_mb(bridge: int) -> float:
    """Return the memory of its children in MB."""
    total = 0
    for pid in children(bridge):
        with contextlib.suppress(OSError):
            lines = Path("/proc/%d/smaps_rollup" % pid).read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1000


@contextlib.contextmanager
def watched_memory(bridge: int) -> Iterator[List[float]]:
    """Measure the memory at intervals during the block; yield the list of the samples."""
    samples, is_over = [memory_mb(bridge)], threading.Event()

    def measure_memory() -> None:
        while not is_over.wait(SAMPLE_SECONDS):
            samples.append(memory_mb(bridge))

    thread = threading.Thread(target=measure_memory, name="memory")
    thread.start()
    try:
        yield samples
    finally:
        is_over.set()
        thread.join()


# --- one message ---


def ask(port: int, token: str) -> Tuple[float, float]:
    """Send a message that streams; return the seconds to its first `delta` and to its end.

    The time of the connection is included.
    """
    start = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = json.dumps({"message": PROMPT, "stream": True})
    connection.request("POST", "/api/ask", body, {"Authorization": "Bearer " + token})
    response, first, end = connection.getresponse(), 0.0, 0.0
    for line in response:
        if line == b"event: delta\n" and not first:
            first = time.perf_counter()
        if line == b"event: completed\n":
            end = time.perf_counter()
            break
    response.close()
    connection.close()
    if not first or not end:
        raise SystemExit("the stream ended without an answer")
    return first - start, end - start


def ask_at_once(count: int, port: int, token: str) -> float:
    """Send `count` messages at once; return the seconds until all are answered."""
    answered: List[Tuple[float, float]] = []
    threads = [
        threading.Thread(target=lambda: answered.append(ask(port, token)), name="ask-%d" % n)
        for n in range(count)
    ]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if len(answered) < count:
        raise SystemExit("%d of %d messages were answered" % (len(answered), count))
    return seconds


def environment(api: MessagesApi) -> Dict[str, str]:
    """Return the environment of both sides, without HOME. It allows no other server."""
    return {
        **common.environment(),
        "ANTHROPIC_BASE_URL": api.url,
        "CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-dummy",
        "HTTPS_PROXY": api.url,
        "NO_PROXY": "127.0.0.1",
    }


# --- all measurements ---


def measure_one(
    claude: str, spares: int, options: argparse.Namespace, api: MessagesApi, folder: Path
) -> Dict[str, Any]:
    """Measure a bridge with so many idle processes, in turn with cold starts."""
    colds: List[Tuple[float, float]] = []
    asks: List[Tuple[float, float]] = []
    environ, sizes = environment(api), {}

    def start_cold() -> None:
        del api.calls[:]
        colds.append(cold(claude, environ, folder / ("cold-%d" % len(colds))))
        sizes["cold"] = max(len(call.raw) for call in api.messages())

    with common.bridge(folder, environ, "--claude", claude, "--spare", str(spares)) as at:
        for _ in range(options.asks):
            wait_for_spares(at.pid, spares)
            start_cold()
            del api.calls[:]
            asks.append(ask(at.port, at.token))
            sizes["bridge"] = max(len(call.raw) for call in api.messages())
        wait_for_spares(at.pid, spares)
        with watched_memory(at.pid) as samples:
            burst = ask_at_once(options.burst, at.port, at.token)
        for _ in range(options.asks):
            start_cold()
    first, total = map(statistics.median, zip(*asks))
    cold_first, cold_total = map(statistics.median, zip(*colds))
    cold_burst = statistics.mean(seconds for _, seconds in colds) * options.burst
    return {
        "first": first,
        "total": total,
        "burst": burst,
        "cold_first": cold_first,
        "cold_total": cold_total,
        "cold_burst": cold_burst,
        "first_ratio": first / cold_first,
        "end_ratio": first / cold_total,
        "total_ratio": total / cold_total,
        "burst_ratio": burst / cold_burst,
        "idle_mb": samples[0],
        "peak_mb": max(samples),
        "bytes": sizes["bridge"],
        "cold_bytes": sizes["cold"],
    }


def medians(rows: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    """Return the median of each figure."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def measure(claude: str, options: argparse.Namespace, folder: Path) -> List[Dict[str, Any]]:
    """Return the medians of all rounds, for each number of idle processes."""
    by_spares: Dict[int, List[Dict[str, Any]]] = {spares: [] for spares in options.spares}
    with MessagesApi() as api:
        for n in range(options.rounds):
            for spares in options.spares:
                home = folder / ("bridge-%d-%d" % (n, spares))
                by_spares[spares].append(measure_one(claude, spares, options, api, home))
                print("round %d, %d idle processes: done" % (n + 1, spares), file=sys.stderr)
    return [{"spares": spares, **medians(rounds)} for spares, rounds in by_spares.items()]


def table(version: str, rows: Sequence[Dict[str, Any]], burst: int) -> str:
    """Return the figures as text."""

    def line(name: str, prefix: str, row: Dict[str, Any]) -> str:
        cells = ["%-18s" % name]
        for key, form in (("first", "%9.3f"), ("total", "%9.3f"), ("burst", "%9.2f")):
            cells.append(form % row[prefix + key])
            cells.append("%6.3f" % (1.0 if prefix else row[key + "_ratio"]))
            if key == "first":
                cells.append("%7s" % "" if prefix else "%7.3f" % row["end_ratio"])
        for key in ("idle_mb", "peak_mb"):
            cells.append("%8s" % "" if prefix else "%8.0f" % row[key])
        cells.append("%7d" % row[prefix + "bytes"])
        return " ".join(cells)

    head = "%-18s %9s %6s %7s %9s %6s %9s %6s %8s %8s %7s" % (
        "", "first (s)", "ratio", "to end", "total (s)", "ratio", "%d (s)" % burst, "ratio",
        "idle MB", "peak MB", "bytes",
    )
    bridges = [line("bridge, --spare %d" % row["spares"], "", row) for row in rows]
    return "\n".join([version, head, line("claude -p, cold", "cold_", medians(rows)), *bridges])


def options_parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of all benchmarks over the real CLI."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--claude",
        default=os.environ.get("CAB_TEST_CLAUDE") or "claude",
        help="the real CLI (default: $CAB_TEST_CLAUDE, or `claude` in PATH)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


def find_claude(named: str) -> Optional[str]:
    """Return the path of the real CLI; or print an error and return None."""
    claude = shutil.which(named)
    if not claude or sys.platform != "linux":
        message = "error: this needs Linux and a real claude; name it with --claude PATH"
        print(message, file=sys.stderr)
        return None
    return str(Path(claude).absolute())


def version_of(claude: str, home: str) -> str:
    """Return what `claude --version` prints."""
    done = subprocess.run(
        [claude, "--version"],
        env={"PATH": os.environ["PATH"], "HOME": home},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    return done.stdout.decode().strip()


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = options_parser(
        "Measure a cold `claude -p` and the bridge, with a fake Messages API."
    )
    parser.add_argument(
        "--asks",
        type=int,
        default=4,
        help="paced messages, and cold starts before and after the burst (default: 4)",
    )
    parser.add_argument("--burst", type=int, default=20, help="requests at once (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, help="bridges of each kind (default: 3)")
    parser.add_argument(
        "--spares",
        type=lambda text: [int(word) for word in text.split(",")],
        default=[0, 1, 2, 3],
        help="numbers of idle processes (default: 0,1,2,3)",
    )
    options = parser.parse_args(argv)
    claude = find_claude(options.claude)
    if not claude:
        return 2
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        version = version_of(claude, folder)
        rows = measure(claude, options, Path(folder))
    if options.json:
        print(json.dumps({"version": version, "burst": options.burst, "rows": rows}))
    else:
        print(table(version, rows, options.burst))
    return 0


if __name__ == "__main__":
    sys.exit(main())
