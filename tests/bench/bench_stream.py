"""How live an answer is: the time to its first words, and how far 50 readers are behind what `claude` writes.

    python tests/bench/bench_stream.py [--claude PATH] [--asks 7] [--rounds 3] [--readers 50] [--json]

Both drive the same real CLI against a stand-in of the Messages API on loopback that sends a word every 50 ms.
1. A cold `claude -p` that streams, up to its first text, against a POST with "stream": true up to its first `delta`, the
   spare being ready. Both take turns, so that a busy machine disturbs both alike.
2. All readers follow one request, from one loop. A program in front of the CLI notes when each piece of text came out of it;
   the lag is from there to the moment at which a reader has the text up to its end. The words begin once the next spare has
   started, as with a model that thinks for a second. (bench_events.py looks closer, without the real CLI.)
Linux (it looks into /proc).
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

import bench_first_answer as first                      # beside this file
from bench_events import Crowd, is_end
from common import Served, bridge, call, cpu_ticks
from messages_api import MessagesApi, NotingClaude, Reply

WORDS = " ".join("word-%d" % n for n in range(60))
WORD_SECONDS = 0.05
TARGET_RATIO = 0.35
TARGET_LAG_SECONDS = 0.020


# --- 1. the first words ---


def cold(claude: str, environ: Dict[str, str], home: Path) -> float:
    """The time until a `claude -p` writes its first text, in seconds; it is ended then."""
    began = time.perf_counter()
    child = subprocess.Popen([claude, "-p", "--output-format", "stream-json", "--verbose", "--include-partial-messages", first.PROMPT],
                             env={**environ, "HOME": str(home)}, cwd=str(home), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL)
    assert child.stdout is not None
    with child.stdout:
        came = next((time.perf_counter() for line in child.stdout if b'"text_delta"' in line), None)
        child.kill()
    child.wait(30)
    if came is None:
        raise SystemExit("claude -p ended without a text")
    return came - began


def bridged(at: Served) -> float:
    """The time until the first `delta` of a request, connection included, in seconds; it is cancelled then."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", at.port, timeout=60)
    connection.request("POST", "/api/ask", json.dumps({"message": first.PROMPT, "stream": True}), {"Authorization": "Bearer " + at.token})
    response, request = connection.getresponse(), ""
    for line in response:
        if line.startswith(b"data: ") and not request:
            request = json.loads(line[6:])["requestId"]
        if line == b"event: delta\n":
            took = time.perf_counter() - began
            break
    else:
        raise SystemExit("the stream ended without a delta")
    assert call(at, "DELETE", "/api/ask/" + request)["errorCode"] == "cancelled"
    response.close()
    connection.close()
    return took


def first_words(claude: str, api: MessagesApi, asks: int, folder: Path) -> Tuple[List[float], List[float]]:
    """-> (the times of the cold starts, those of the bridge)."""
    environ = first.environment(api)
    times: Tuple[List[float], List[float]] = ([], [])
    with bridge(folder / "bridge", environ, "--claude", claude) as at:
        for n in range(asks):
            first.wait_for_spares(at.pid)
            home = folder / ("home-%d" % n)
            home.mkdir()
            times[0].append(cold(claude, environ, home))
            times[1].append(bridged(at))
    return times


# --- 2. the lag of many readers ---


def settle(pid: int) -> None:
    """Waits until the bridge and all below it used no CPU for a while."""
    until, last, since = time.monotonic() + 20, -1, time.monotonic()
    while time.monotonic() < until and time.monotonic() - since < first.READY_SECONDS:
        found = {}
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                found[int(entry)] = cpu_ticks(int(entry))
            except OSError:
                continue
        family = {pid}
        for _ in range(4):
            family |= {each for each, (parent, *_) in found.items() if parent in family}
        ticks = sum(found[each][1] for each in family if each in found)
        if abs(ticks - last) > 1:                                          # one tick may be a timer of its own
            last, since = ticks, time.monotonic()
        time.sleep(0.02)


def one_round(at: Served, claude: NotingClaude, readers: int, gate: threading.Event) -> List[float]:
    """One request with many readers. -> the lags in seconds, of each piece at each reader."""
    before = len(claude.lines())
    gate.clear()
    request = call(at, "POST", "/api/ask", {"message": first.PROMPT})["requestId"]
    with contextlib.closing(Crowd(at, ["/api/ask/%s/events" % request] * readers)) as crowd:
        crowd.read(bool)                                   # each has the head of its stream
        settle(at.pid)
        gate.set()
        crowd.read(is_end)
        ahead = time.time() - time.monotonic()             # of the clock that noted when the pieces came out of claude
        told = [[(int(event.split(b"\n", 1)[0][4:]), moment / 1e9 + ahead) for moment, event in reader.events()
                 if b"event: delta\n" in event] for reader in crowd.readers]
    length, lags = 0, []
    for came_at, line in claude.lines()[before:]:
        length += len(line["event"]["delta"]["text"])
        lags += [next(moment for has, moment in each if has >= length) - came_at for each in told]
    if length != len(WORDS):
        raise SystemExit("a part of the text is missing")
    return lags


def lag(claude: str, api: MessagesApi, rounds: int, readers: int, folder: Path) -> List[float]:
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
    """-> the times in seconds and the ratio."""
    loads = [os.getloadavg()[0]]
    with MessagesApi() as api:
        api.reply = lambda body: Reply(WORDS, word_seconds=WORD_SECONDS)
        colds, bridges = first_words(claude, api, asks, folder)
        loads.append(os.getloadavg()[0])
        lags = sorted(lag(claude, api, rounds, readers, folder))
        loads.append(os.getloadavg()[0])
    return {"cold_seconds": colds, "bridge_seconds": bridges, "cold_median": statistics.median(colds),
            "bridge_median": statistics.median(bridges), "ratio": statistics.median(bridges) / statistics.median(colds),
            "readers": readers, "lags": len(lags), "lag_median": statistics.median(lags), "lag_p95": lags[int(len(lags) * 0.95)],
            "lag_max": lags[-1], "load": loads}


def table(version: str, found: Dict[str, Any]) -> str:
    colds, bridges = found["cold_seconds"], found["bridge_seconds"]
    rows = [("to the first words", "seconds", "fastest", "slowest", "ratio"),
            ("claude -p, cold (median)", found["cold_median"], min(colds), max(colds), 1.0),
            ("bridge (median)", found["bridge_median"], min(bridges), max(bridges), found["ratio"])]
    lines = ["%-26s %8s %8s %8s %7s" % tuple(cell if isinstance(cell, str) else "%.3f" % cell for cell in row) for row in rows]
    lines += ["", "%-26s %8s %8s %8s" % ("behind claude", "median", "p95", "max"),
              "%-26s %s" % ("%d readers (ms)" % found["readers"],
                            " ".join("%8.1f" % (found[name] * 1000) for name in ("lag_median", "lag_p95", "lag_max"))),
              "", "targets: ratio %.2f (%s), median %.0f ms (%s); load %s" % (
                  TARGET_RATIO, "met" if found["ratio"] <= TARGET_RATIO else "MISSED", TARGET_LAG_SECONDS * 1000,
                  "met" if found["lag_median"] < TARGET_LAG_SECONDS else "MISSED", " ".join("%.2f" % load for load in found["load"]))]
    return "\n".join([version, *lines])


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = first.options_parser("Times the first words of an answer, and how far many readers are behind the CLI.")
    parser.add_argument("--asks", type=int, default=7, help="first words of each kind (default: 7)")
    parser.add_argument("--rounds", type=int, default=3, help="requests with many readers (default: 3)")
    parser.add_argument("--readers", type=int, default=50, help="readers of each (default: 50)")
    options = parser.parse_args(argv)
    claude = first.found_claude(options.claude)
    if not claude:
        return 2
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        version = first.version_of(claude, folder)
        found = measure(claude, max(1, options.asks), max(1, options.rounds), max(1, options.readers), Path(folder))
    print(json.dumps({"version": version, **found}) if options.json else table(version, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
