"""How far readers are behind: of a stream with many readers, and of the end of a request.

    python tests/bench/bench_events.py [--readers 1,100] [--per-second 50] [--seconds 5] [--rounds 3] [--baseline PATH] [--json]

1. All readers follow one request, whose text comes as so many deltas a second. Each delta says when the CLI, a fake one, wrote
   it; the lag is from there to the moment at which a reader has it. The bridge's CPU is told as a share of one core. A reader
   whose text is not the whole text makes the exit status 1.
2. Clients wait for the end of a request, by ?wait= or by events; the lag is from the result, as the CLI wrote it, to the whole
   answer at a client. 1 and 60 wait for the same request, or 40 each for one of its own.

All clients are one loop in this process, whose own CPU is told, too. `--baseline` names another copy of the module; both take
turns. Figures are medians over the rounds, the largest is of all. Linux (it looks into /proc).
"""
from __future__ import annotations

import argparse
import bisect
import contextlib
import json
import os
import re
import selectors
import socket
import statistics
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from common import MODULE, Served, bridge, call, cpu_seconds, environment, judged, paced_claude, percentile

STAMP = re.compile(r"<(\d+)>")
OWN = 40                                                # requests that wait at once, of the 50 that may
MAINTENANCE_SECONDS = 60.0                                    # the longest that one round may take
SETTLE_SECONDS = 0.5                                    # until all that have asked do wait


def is_end(data: bytes) -> bool:
    """Whether a stream ends with this part."""
    return data.endswith(b"0\r\n\r\n")


class Reader:
    """One connection and what came on it, with the moments."""

    def __init__(self, at: Served, path: str, is_kept: bool) -> None:
        self.connection = socket.create_connection(("127.0.0.1", at.port), 30)
        self.connection.sendall(("GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: %s\r\nAuthorization: Bearer %s\r\n\r\n" % (
            path, "keep-alive" if is_kept else "close", at.token)).encode())
        self.connection.setblocking(False)
        self.parts: List[Tuple[int, bytes]] = []

    def text(self) -> str:
        """The text that the events tell."""
        return "".join(json.loads(event.partition(b"data: ")[2])["text"] for _, event in self.events() if b"event: delta\n" in event)

    def events(self) -> Iterator[Tuple[int, bytes]]:
        """Each event, which is a chunk of its own, and when its last byte was there."""
        raw, ends = b"".join(data for _, data in self.parts), list(accumulate(len(data) for _, data in self.parts))
        start = raw.index(b"\r\n\r\n") + 4
        while True:
            size, _, _ = raw[start:start + 18].partition(b"\r\n")
            first = start + len(size) + 2
            start = first + int(size, 16) + 2
            if not int(size, 16):
                return
            yield self.parts[bisect.bisect_left(ends, start)][0], raw[first:start - 2]

    def body(self) -> bytes:
        return b"".join(data for _, data in self.parts).partition(b"\r\n\r\n")[2]


class Crowd:
    """Readers that are served by one loop."""

    def __init__(self, at: Served, paths: Sequence[str], is_kept: bool = True) -> None:
        self.readers = [Reader(at, path, is_kept) for path in paths]

    def read(self, has_enough: Callable[[bytes], bool]) -> None:
        """Until each reader was cut off, or got a part that is enough."""
        until = time.monotonic() + MAINTENANCE_SECONDS
        with selectors.DefaultSelector() as selector:
            for reader in self.readers:
                selector.register(reader.connection, selectors.EVENT_READ, reader)
            while selector.get_map():
                if time.monotonic() > until:
                    raise SystemExit("a round took more than %g s" % MAINTENANCE_SECONDS)
                for key, _ in selector.select(1):
                    data = key.data.connection.recv(1 << 16)
                    key.data.parts.append((time.monotonic_ns(), data))
                    if not data or has_enough(data):
                        selector.unregister(key.data.connection)

    def close(self) -> None:
        for reader in self.readers:
            reader.connection.close()


class Flow(NamedTuple):
    """One round of a stream. lags: milliseconds, sorted; cpu, own_cpu: of the bridge and of this program, as shares of a core;
    told: deltas for one delta of the CLI, fewer where some came together; lost: readers without the whole text."""
    lags: Sequence[float]
    cpu: float
    own_cpu: float
    told: float
    lost: int


def fan_out(at: Served, folder: Path, readers: int, count: int, per_second: float) -> Flow:
    gate = folder / ("gate-%d" % time.monotonic_ns())
    job = call(at, "POST", "/api/ask", {"message": "stamps %d %f %s" % (count, 1 / per_second, gate)})["requestId"]
    with contextlib.closing(Crowd(at, ["/api/ask/%s/events" % job] * readers)) as crowd:
        crowd.read(lambda data: b"begun" in data)
        began, cpu, own_cpu = time.monotonic(), cpu_seconds(at.pid), time.process_time()
        gate.touch()
        crowd.read(is_end)
        spent, cpu, own_cpu = time.monotonic() - began, cpu_seconds(at.pid) - cpu, time.process_time() - own_cpu
        text = call(at, "GET", "/api/ask/" + job)["response"]
        deltas = [(moment, event) for reader in crowd.readers for moment, event in reader.events() if b"event: delta\n" in event]
        lost = sum(reader.text() != text or len(STAMP.findall(text)) != count for reader in crowd.readers)
    lags = sorted((moment - int(written)) / 1e6 for moment, event in deltas for written in STAMP.findall(event.decode()))
    return Flow(lags, cpu / spent, own_cpu / spent, (len(deltas) / readers - 1) / count, lost)


def endings(at: Served, folder: Path, clients: int, by_events: bool, is_own: bool) -> List[float]:
    """The lags in milliseconds of clients that wait for the end of a request."""
    gate = folder / ("gate-%d" % time.monotonic_ns())
    asker = at
    if is_own:                                             # one process answers all, since its conversation stays warm
        asker = at._replace(token=call(at, "POST", "/api/tokens", {"name": "own", "sessionMode": "stateful"})["token"])
    jobs = [call(asker, "POST", "/api/ask", {"message": "stamps 0 0.03 %s" % gate})["requestId"] for _ in range(clients if is_own else 1)]
    path = "/api/ask/%s/events" if by_events else "/api/ask/%s?wait=60"
    with contextlib.closing(Crowd(at, [path % job for job in (jobs if is_own else jobs * clients)], by_events)) as crowd:
        time.sleep(SETTLE_SECONDS)
        gate.touch()
        crowd.read(is_end)
        return [lag_of_end(reader, by_events) for reader in crowd.readers]


def lag_of_end(reader: Reader, by_events: bool) -> float:
    if by_events:
        moment, event = list(reader.events())[-1]
        body = json.loads(event.partition(b"data: ")[2])
    else:
        moment, body = reader.parts[-2][0], json.loads(reader.body())          # the last one is the end of the connection
    if body["status"] != "completed":
        raise SystemExit("a request failed: %r" % body)
    return (moment - int(STAMP.findall(body["response"])[0])) / 1e6


ENDINGS: Dict[str, Tuple[int, bool, bool, int]] = {     # clients, by events, each its own request, times in a round
    "wait, 1": (1, False, False, 8), "wait, 60 of one": (60, False, False, 2), "wait, %d of their own" % OWN: (OWN, False, True, 1),
    "events, 1": (1, True, False, 8), "events, 60 of one": (60, True, False, 2), "events, %d of their own" % OWN: (OWN, True, True, 1)}


def measure(modules: Dict[str, Path], options: argparse.Namespace, folder: Path) -> Tuple[Any, Any]:
    """-> (number of readers -> module -> rounds, kind of wait -> module -> rounds)."""
    flows: Dict[int, Dict[str, List[Flow]]] = {}
    ends: Dict[str, Dict[str, List[List[float]]]] = {}
    with contextlib.ExitStack() as stack:
        served = {}
        for name, module in modules.items():
            claude = paced_claude(folder / name / "claude")
            served[name] = stack.enter_context(bridge(folder / name, environment(), "--claude", claude, module=module))
        for _ in range(options.rounds):
            for readers in options.readers:
                for name, at in served.items():
                    flow = fan_out(at, folder, readers, max(1, round(options.seconds * options.per_second)), options.per_second)
                    flows.setdefault(readers, {}).setdefault(name, []).append(flow)
            for kind, (clients, by_events, is_own, times) in ENDINGS.items():
                for name, at in served.items():
                    lags = [lag for _ in range(times) for lag in endings(at, folder, clients, by_events, is_own)]
                    ends.setdefault(kind, {}).setdefault(name, []).append(sorted(lags))
    return flows, ends


def lag_figures(rounds: Sequence[Sequence[float]]) -> Dict[str, float]:
    figures = {name: statistics.median(percentile(lags, share) for lags in rounds) for name, share in (("p50", 0.5), ("p99", 0.99))}
    return {**figures, "max": max(lags[-1] for lags in rounds)}


def flow_figures(rounds: Sequence[Flow]) -> Dict[str, float]:
    medians = {name: statistics.median(getattr(flow, name) for flow in rounds) for name in ("cpu", "own_cpu", "told")}
    return {**lag_figures([flow.lags for flow in rounds]), **medians, "lost": sum(flow.lost for flow in rounds)}


def table(flows: Dict[str, Dict[str, Dict[str, float]]], ends: Dict[str, Dict[str, Dict[str, float]]]) -> str:
    lines = ["%-34s %8s %8s %8s %8s %8s %8s %6s" % ("behind the CLI", "p50 ms", "p99 ms", "max ms", "CPU", "own CPU", "deltas", "lost")]
    for kind, of in flows.items():
        for name, found in of.items():
            lines.append("%-34s %8.2f %8.2f %8.2f %7.1f%% %7.1f%% %8.2f %6d" % (
                "%s: %s readers" % (name, kind), found["p50"], found["p99"], found["max"], found["cpu"] * 100, found["own_cpu"] * 100,
                found["told"], found["lost"]))
    lines += ["", "%-34s %8s %8s %8s" % ("from the result to the client", "p50 ms", "p99 ms", "max ms")]
    for kind, of in ends.items():
        for name, found in of.items():
            lines.append("%-34s %8.2f %8.2f %8.2f" % ("%s: %s" % (name, kind), found["p50"], found["p99"], found["max"]))
    lines.append("")
    if "100" in flows:
        most = flows["100"]["bridge"]
        lines += [judged("100 readers, p99 ms", most["p99"], 15), judged("100 readers, share of a core", most["cpu"], 0.5)]
    return "\n".join(lines + [judged("wait, 1, p50 ms", ends["wait, 1"]["bridge"]["p50"], 5)])


def numbers(words: str) -> List[int]:
    return [int(word) for word in words.split(",")]


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--readers", type=numbers, default=[1, 100], help="(default: 1,100)")
    parser.add_argument("--per-second", type=float, default=50, help="deltas a second (default: 50)")
    parser.add_argument("--seconds", type=float, default=5, help="how long a stream lasts (default: 5)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--baseline", type=Path, help="another claude_api_bridge.py to compare with")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(argv)
    modules = {"bridge": MODULE, **({"baseline": options.baseline.absolute()} if options.baseline else {})}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        streams, waits = measure(modules, options, Path(folder))
    flows = {str(readers): {name: flow_figures(rounds) for name, rounds in of.items()} for readers, of in streams.items()}
    ends = {kind: {name: lag_figures(rounds) for name, rounds in of.items()} for kind, of in waits.items()}
    print(json.dumps({"streams": flows, "ends": ends}) if options.json else
          table(flows, ends) + "\nload average %.2f" % os.getloadavg()[0])
    return int(any(found["lost"] for of in flows.values() for found in of.values()))


if __name__ == "__main__":
    sys.exit(main())
