"""Measure the time to the first words of an answer, and the delay of 50 readers of a stream.

    python tests/bench/bench_stream.py [--claude PATH] [--asks 7] [--rounds 3] [--readers 50]
                                       [--json]

Both parts run the real CLI against a fake Messages API on loopback, which sends a word every 50 ms.
1. A cold `claude -p` that streams, up to its first text; and a POST with "stream": true up to its
   first `delta`, when the idle process is ready. Both take turns, so that a busy machine disturbs
   both.
2. All readers follow one request, from one loop. A program in front of the CLI records when the CLI
   printed each piece of text. The delay is from there to the time at which a reader received the
   text up to the end of the piece. The words start after the next idle process has started, as with
   a model that thinks for a second. bench_events.py measures more, without the real CLI.
Linux only (it reads /proc).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import bench_first_answer as first
from bench_events import Crowd, is_end
from common import Served, bridge, call, cpu_ticks
from messages_api import MessagesApi, NotingClaude, Reply

WORDS = " ".join("word-%d" % n for n in range(60))
WORD_SECONDS = 0.05
TARGET_RATIO = 0.35
TARGET_LAG_SECONDS = 0.020


# --- 1. the first words ---


def cold(claude: str, environ: Dict[str, str], home: Path) -> float:
    """Return the seconds until a `claude -p` prints its first text; then kill it."""
    start = time.perf_counter()
    child = subprocess.Popen(
        [
            claude, "-p", "--output-format", "stream-json", "--verbose",
            "--include-partial-messages", first.PROMPT,
        ],
        env={**environ, "HOME": str(home)},
        cwd=str(home),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    with child.stdout:
        end = next((time.perf_counter() for line in child.stdout if b'"text_delta"' in line), None)
        child.kill()
    child.wait(30)
    if end is None:
        raise SystemExit("claude -p ended without a text")
    return end - start


def bridged(at: Served) -> float:
    """Return the seconds until the first `delta` of a request, with the connection; cancel it."""
    start = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", at.port, timeout=60)
    body = json.dumps({"message": first.PROMPT, "stream": True})
    connection.request("POST", "/api/ask", body, {"Authorization": "Bearer " + at.token})
    response, request = connection.getresponse(), ""
    for line in response:
        if line.startswith(b"data: ") and not request:
            request = json.loads(line[6:])["requestId"]
        if line == b"event: delta\n":
            seconds = time.perf_counter() - start
            break
    else:
        raise SystemExit("the stream ended without a delta")
    assert call(at, "DELETE", "/api/ask/" + request)["errorCode"] == "cancelled"
    response.close()
    connection.close()
    return seconds


def first_words(
    claude: str, api: MessagesApi, asks: int, folder: Path
) -> Tuple[List[float], List[float]]:
    """Return (the seconds of the cold starts, the seconds of the bridge)."""
    environ = first.environment(api)
    colds: List[float] = []
    bridges: List[float] = []
    with bridge(folder / "bridge", environ, "--claude", claude) as at:
        for n in range(asks):
            first.wait_for_spares(at.pid)
            home = folder / ("home-%d" % n)
            home.mkdir()
            colds.append(cold(claude, environ, home))
            bridges.append(bridged(at))
    return colds, bridges


# --- 2. the delay of many readers ---


def settle(pid: int) -> None:
    """Wait until the bridge and its descendants have used no CPU for a while."""
    deadline, last, since = time.monotonic() + 20, -1, time.monotonic()
    while time.monotonic() < deadline and time.monotonic() - since < first.READY_SECONDS:
        processes = {}
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                processes[int(entry)] = cpu_ticks(int(entry))
            except OSError:
                continue
        family = {pid}
        for _ in range(4):
            family |= {child for child, (parent, *_) in processes.items() if parent in family}
        ticks = sum(processes[member][1] for member in family if member in processes)
        # A single tick may come from a timer.
        if abs(ticks - last) > 1:
            last, since = ticks, time.monotonic()
        time.sleep(0.02)


def one_round(at: Served, claude: NotingClaude, readers: int, gate: threading.Event) -> List[float]:
    """Run a request with many readers; return the delays in seconds, by piece and reader."""
    before = len(claude.lines())
    gate.clear()
    request = call(at, "POST", "/api/ask", {"message": first.PROMPT})["requestId"]
    with contextlib.closing(Crowd(at, ["/api/ask/%s/events" % request] * readers)) as crowd:
        # Wait until every reader has the head of its stream.
        crowd.read(bool)
        settle(at.pid)
        gate.set()
        crowd.read(is_end)
        # The times of the pieces are those of the wall clock.
        clock_offset = time.time() - time.monotonic()
        deltas = [
            [
                (int(event.split(b"\n", 1)[0][4:]), moment / 1e9 + clock_offset)
                for moment, event in reader.events()
                if b"event: delta\n" in event
            ]
            for reader in crowd.readers
        ]
    length, lags = 0, []
    for printed_at, line in claude.lines()[before:]:
        length += len(line["event"]["delta"]["text"])
        for of_reader in deltas:
            received_at = next(moment for end, moment in of_reader if end >= length)
            lags.append(received_at - printed_at)
    if length != len(WORDS):
        raise SystemExit("a part of the text is missing")
    return lags


def lag(claude: str, api: MessagesApi, rounds: int, readers: int, folder: Path) -> List[float]:
    """Return the delays in seconds of all rounds."""
    noting, gate = NotingClaude(folder / "noting", Path(claude), b'"text_delta"'), threading.Event()
    lags: List[float] = []
    api.reply = lambda body: Reply(WORDS, word_seconds=WORD_SECONDS, hold=gate)
    with bridge(folder / "crowded", first.environment(api), "--claude", str(noting.path)) as at:
        try:
            for _ in range(rounds):
                lags += one_round(at, noting, readers, gate)
        finally:
            gate.set()
    return lags


# --- both ---


def measure(claude: str, asks: int, rounds: int, readers: int, folder: Path) -> Dict[str, Any]:
    """Run both parts; return the figures."""
    loads = [os.getloadavg()[0]]
    with MessagesApi() as api:
        api.reply = lambda body: Reply(WORDS, word_seconds=WORD_SECONDS)
        colds, bridges = first_words(claude, api, asks, folder)
        loads.append(os.getloadavg()[0])
        lags = sorted(lag(claude, api, rounds, readers, folder))
        loads.append(os.getloadavg()[0])
    return {
        "cold_seconds": colds,
        "bridge_seconds": bridges,
        "cold_median": statistics.median(colds),
        "bridge_median": statistics.median(bridges),
        "ratio": statistics.median(bridges) / statistics.median(colds),
        "readers": readers,
        "lags": len(lags),
        "lag_median": statistics.median(lags),
        "lag_p95": lags[int(len(lags) * 0.95)],
        "lag_max": lags[-1],
        "load": loads,
    }


def table(version: str, figures: Dict[str, Any]) -> str:
    """Return the figures as text."""
    colds, bridges = figures["cold_seconds"], figures["bridge_seconds"]
    ratio, lag_median = figures["ratio"], figures["lag_median"]
    row = "%-26s %8.3f %8.3f %8.3f %7.3f"
    cold_row = ("claude -p, cold (median)", figures["cold_median"], min(colds), max(colds), 1.0)
    bridge_row = ("bridge (median)", figures["bridge_median"], min(bridges), max(bridges), ratio)
    lags = [figures[name] * 1000 for name in ("lag_median", "lag_p95", "lag_max")]
    ratio_verdict = "met" if ratio <= TARGET_RATIO else "MISSED"
    lag_verdict = "met" if lag_median < TARGET_LAG_SECONDS else "MISSED"
    target = "targets: ratio %.2f (%s), median %.0f ms (%s); load %s" % (
        TARGET_RATIO,
        ratio_verdict,
        TARGET_LAG_SECONDS * 1000,
        lag_verdict,
        " ".join("%.2f" % load for load in figures["load"]),
    )
    lines = [
        version,
        "%-26s %8s %8s %8s %7s" % ("to the first words", "seconds", "fastest", "slowest", "ratio"),
        row % cold_row,
        row % bridge_row,
        "",
        "%-26s %8s %8s %8s" % ("delay after claude", "median", "p95", "max"),
        "%-26s %8.1f %8.1f %8.1f" % ("%d readers (ms)" % figures["readers"], *lags),
        "",
        target,
    ]
    return "\n".join(lines)


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = first.options_parser(
        "Measure the time to the first words of an answer, and the delay of many readers."
    )
    parser.add_argument("--asks", type=int, default=7, help="answers of each kind (default: 7)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="requests with many readers (default: 3)"
    )
    parser.add_argument("--readers", type=int, default=50, help="readers of each (default: 50)")
    options = parser.parse_args(argv)
    claude = first.find_claude(options.claude)
    if not claude:
        return 2
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        version = first.version_of(claude, folder)
        counts = (max(1, options.asks), max(1, options.rounds), max(1, options.readers))
        figures = measure(claude, *counts, Path(folder))
    if options.json:
        print(json.dumps({"version": version, **figures}))
    else:
        print(table(version, figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
