"""How long a short question takes: `claude -p` started for it, against the bridge with its waiting processes.

    python tests/bench/bench_first_answer.py [--claude PATH] [--asks 4] [--burst 20] [--rounds 3] [--spares 0,1,2,3] [--json]

Both drive the same real CLI against a stand-in of the Messages API on loopback that answers at once, with the same
environment. In each round a bridge of each number of spares is started in turn:
1. Paced: a question when its spares are ready, up to the first token and to the end of the answer, in turn with a cold start.
2. A burst: so many questions at once, until all are answered; against so many times the mean of the cold starts before and
   after it, as if they ran one after the other.
3. Memory of the bridge's processes of `claude`, idle and at most in the burst: as a sum what is theirs alone and their part of what
   they share (PSS).
The ratios are those to the cold starts of the same minute, as others may use the machine too. For the first token there are two: to
that of a `claude -p` which streams, and ("to end") to the end of one, where it says its words when it is not asked to stream.
Linux (it looks into /proc).
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

import common                                           # beside this file; it also makes tests/ importable
from messages_api import MessagesApi

PROMPT = "What is the capital of France?"
READY_SECONDS = 0.3                                     # a process that used no CPU for so long is waiting for its input
RECHECK_SECONDS = 0.1                                      # between two looks at the memory


# --- the processes of a bridge ---


def children(pid: int) -> Dict[int, int]:
    """The living processes whose parent is `pid`, with their CPU time in ticks."""
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            parent, ticks, _ = common.cpu_ticks(int(entry))
            if parent == pid:
                found[int(entry)] = ticks
    return found


def wait_for_spares(bridge: int, count: int = 1) -> None:
    """Waits until the bridge has just so many children, and all have worked and stand still."""
    until, still_since = time.monotonic() + 60, time.monotonic()
    last: Dict[int, int] = {}
    while time.monotonic() < until:
        found = children(bridge)
        if len(found) != count or found.keys() != last.keys() or any(found[pid] > last[pid] + 1 for pid in found):
            last, still_since = found, time.monotonic()                     # one tick more may be a timer of its own
        elif all(ticks > 10 for ticks in found.values()) and time.monotonic() - still_since >= READY_SECONDS:
            return
        time.sleep(0.02)
    raise SystemExit("%d spares did not become ready within 60 s" % count)


def memory_mb(bridge: int) -> float:
    """What its children take, in MB."""
    total = 0
    for pid in children(bridge):
        with contextlib.suppress(OSError):
            lines = Path("/proc/%d/smaps_rollup" % pid).read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1000


@contextlib.contextmanager
def watched_memory(bridge: int) -> Iterator[List[float]]:
    """The memory from time to time, as long as the block goes on."""
    seen, over = [memory_mb(bridge)], threading.Event()

    def subscribe() -> None:
        while not over.wait(RECHECK_SECONDS):
            seen.append(memory_mb(bridge))

    thread = threading.Thread(target=watch, name="memory")
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


# --- one question ---


def cold(claude: str, environ: Dict[str, str], home: Path) -> Tuple[float, float]:
    """One `claude -p` that streams. -> seconds to its first text and to its end."""
    home.mkdir()
    began = time.perf_counter()
    child = subprocess.Popen([claude, "-p", "--output-format", "stream-json", "--verbose", "--include-partial-messages", PROMPT],
                             env={**environ, "HOME": str(home)}, cwd=str(home), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL)
    assert child.stdout is not None
    with child.stdout:
        first = next((time.perf_counter() for line in child.stdout if b'"text_delta"' in line), None)
        child.stdout.read()
    if child.wait(60) or first is None:
        raise SystemExit("claude -p ended without an answer (status %d)" % child.returncode)
    return first - began, time.perf_counter() - began


def ask(port: int, token: str) -> Tuple[float, float]:
    """One question to the bridge that streams, connection included. -> seconds to its first `delta` and to its end."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/api/ask", json.dumps({"message": PROMPT, "stream": True}), {"Authorization": "Bearer " + token})
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
    return first - began, end - began


def ask_at_once(count: int, port: int, token: str) -> float:
    """So many questions, each on a connection of its own. -> seconds until all are answered."""
    answered: List[Tuple[float, float]] = []
    threads = [threading.Thread(target=lambda: answered.append(ask(port, token)), name="ask-%d" % n) for n in range(count)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    if len(answered) < count:
        raise SystemExit("%d of %d questions were answered" % (len(answered), count))
    return took


def environment(api: MessagesApi) -> Dict[str, str]:
    """What both sides run with, but HOME: nothing of this machine's own, and no other way out than the stand-in."""
    return {**common.environment(), "ANTHROPIC_BASE_URL": api.url, "CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-dummy",
            "HTTPS_PROXY": api.url, "NO_PROXY": "127.0.0.1"}


# --- all of it ---


def measure_one(claude: str, spares: int, options: argparse.Namespace, api: MessagesApi, folder: Path) -> Dict[str, Any]:
    """One bridge with so many spares, and the cold starts in turn with it."""
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
        with watched_memory(at.pid) as seen:
            burst = ask_at_once(options.burst, at.port, at.token)
        for _ in range(options.asks):
            start_cold()
    (first, total), (cold_first, cold_total) = (map(statistics.median, zip(*each)) for each in (asks, colds))
    cold_burst = statistics.mean(each for _, each in colds) * options.burst
    return {"first": first, "total": total, "burst": burst, "cold_first": cold_first, "cold_total": cold_total, "cold_burst": cold_burst,
            "first_ratio": first / cold_first, "end_ratio": first / cold_total, "total_ratio": total / cold_total,
            "burst_ratio": burst / cold_burst,
            "idle_mb": seen[0], "peak_mb": max(seen), "bytes": sizes["bridge"], "cold_bytes": sizes["cold"]}


def measure(claude: str, options: argparse.Namespace, folder: Path) -> List[Dict[str, Any]]:
    """-> the medians of all rounds for each number of spares."""
    found: Dict[int, List[Dict[str, Any]]] = {spares: [] for spares in options.spares}
    with MessagesApi() as api:
        for n in range(options.rounds):
            for spares in options.spares:
                found[spares].append(measure_one(claude, spares, options, api, folder / ("bridge-%d-%d" % (n, spares))))
                print("round %d, %d spares: done" % (n + 1, spares), file=sys.stderr)
    return [{"spares": spares, **{name: statistics.median(each[name] for each in rounds) for name in rounds[0]}}
            for spares, rounds in found.items()]


def table(version: str, rows: Sequence[Dict[str, Any]], burst: int) -> str:
    def line(name: str, prefix: str, row: Dict[str, Any]) -> str:
        ratios = [1.0 if prefix else row[key + "_ratio"] for key in ("first", "total", "burst")]
        to_end = "%7s" % "" if prefix else "%7.3f" % row["end_ratio"]
        memory = ["%8s" % "" if prefix else "%8.0f" % row[key] for key in ("idle_mb", "peak_mb")]
        return "%-18s %9.3f %6.3f %s %9.3f %6.3f %9.2f %6.3f %s %s %7d" % (
            name, row[prefix + "first"], ratios[0], to_end, row[prefix + "total"], ratios[1], row[prefix + "burst"], ratios[2], *memory,
            row[prefix + "bytes"])

    middle = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return "\n".join([version, "%-18s %9s %6s %7s %9s %6s %9s %6s %8s %8s %7s" % (
        "", "first (s)", "ratio", "to end", "total (s)", "ratio", "%d (s)" % burst, "ratio", "idle MB", "peak MB", "bytes"),
        line("claude -p, cold", "cold_", middle), *(line("bridge, --spare %d" % row["spares"], "", row) for row in rows)])


def options_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--claude", default=os.environ.get("CAB_TEST_CLAUDE") or "claude",
                        help="the real CLI (default: $CAB_TEST_CLAUDE, or found in PATH)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


def found_claude(named: str) -> Optional[str]:
    """The path of the real CLI; None, and a word about it, where this cannot run."""
    claude = shutil.which(named)
    if not claude or sys.platform != "linux":
        print("error: this needs Linux and a real claude; name it with --claude PATH", file=sys.stderr)
        return None
    return str(Path(claude).absolute())


def version_of(claude: str, home: str) -> str:
    return subprocess.run([claude, "--version"], env={"PATH": os.environ["PATH"], "HOME": home}, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE).stdout.decode().strip()


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = options_parser("Times cold `claude -p` against the bridge, on a stand-in of the Messages API.")
    parser.add_argument("--asks", type=int, default=4,
                        help="paced requests of each bridge, with as many cold starts before and after the burst (default: 4)")
    parser.add_argument("--burst", type=int, default=20, help="requests at once (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, help="bridges of each kind (default: 3)")
    parser.add_argument("--spares", type=lambda text: [int(word) for word in text.split(",")], default=[0, 1, 2, 3],
                        help="numbers of waiting processes (default: 0,1,2,3)")
    options = parser.parse_args(argv)
    claude = found_claude(options.claude)
    if not claude:
        return 2
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        version = version_of(claude, folder)
        rows = measure(claude, options, Path(folder))
    print(json.dumps({"version": version, "burst": options.burst, "rows": rows}) if options.json else table(version, rows, options.burst))
    return 0


if __name__ == "__main__":
    sys.exit(main())
