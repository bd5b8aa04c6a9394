"""Measure the delay of events: of a stream with many readers, and of the end of a request.

    python tests/bench/bench_events.py [--readers 1,100] [--per-second 50] [--seconds 5]
                                       [--rounds 3] [--baseline PATH] [--json]

1. All readers follow one request, whose text arrives as so many deltas a second. Each delta
   contains the time at which the fake CLI printed it; the delay is from there to the time at which
   a reader received it. The bridge's CPU time is a share of one core. The exit status is 1 if a
   reader did not receive the whole text.
2. Clients wait for the end of a request, with ?wait= or by events. The delay is from the time at
   which the CLI printed the result to the complete response at a client. 1 or 60 clients wait for
   the same request, or 40 clients for a request of their own.

All clients are one loop in this process, whose CPU time is in the table, too. `--baseline` names
another copy of the module; both take turns. The figures are medians of the rounds; the maximum is
of all rounds. Linux only (it reads /proc).
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

from common import (
    MODULE, Served, bridge, call, cpu_seconds, environment, judged, paced_claude, percentile,
)

STAMP = re.compile(r"<(\d+)>")
# Requests that wait at once; the limit is 50.
OWN = 40
# Longest time of a round.
ROUND_SECONDS = 60.0
# Time until all requests have arrived and wait.
SETTLE_SECONDS = 0.5


def is_end(data: bytes) -> bool:
    """Return whether a stream ends with this part."""
    return data.endswith(b"0\r\n\r\n")


class Reader:
    """A connection, and the data that it received. parts: (time in ns, data)."""

    def __init__(self, at: Served, path: str, keep_alive: bool) -> None:
        head = "GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: %s\r\n" % (
            path,
            "keep-alive" if keep_alive else "close",
        )
        token = "Authorization: Bearer %s\r\n\r\n" % at.token
        self.connection = socket.create_connection(("127.0.0.1", at.port), 30)
        self.connection.sendall((head + token).encode())
        self.connection.setblocking(False)
        self.parts: List[Tuple[int, bytes]] = []

    def text(self) -> str:
        """Return the text of the deltas."""
        return "".join(
            json.loads(event.partition(b"data: ")[2])["text"]
            for _, event in self.events()
            if b"event: delta\n" in event
        )

    def events(self) -> Iterator[Tuple[int, bytes]]:
        """Yield (time of its last byte, data) of each event. An event is a chunk of its own."""
        raw = b"".join(data for _, data in self.parts)
        ends = list(accumulate(len(data) for _, data in self.parts))
        start = raw.index(b"\r\n\r\n") + 4
        while True:
            size, _, _ = raw[start : start + 18].partition(b"\r\n")
            first = start + len(size) + 2
            start = first + int(size, 16) + 2
            if not int(size, 16):
                return
            yield self.parts[bisect.bisect_left(ends, start)][0], raw[first : start - 2]

    def body(self) -> bytes:
        """Return the body of the response."""
        return b"".join(data for _, data in self.parts).partition(b"\r\n\r\n")[2]


class Crowd:
    """Readers in one loop."""

    def __init__(self, at: Served, paths: Sequence[str], keep_alive: bool = True) -> None:
        self.readers = [Reader(at, path, keep_alive) for path in paths]

    def read(self, is_last: Callable[[bytes], bool]) -> None:
        """Read until every reader has received a last part, or the end of its connection."""
        deadline = time.monotonic() + ROUND_SECONDS
        with selectors.DefaultSelector() as selector:
            for reader in self.readers:
                selector.register(reader.connection, selectors.EVENT_READ, reader)
            while selector.get_map():
                if time.monotonic() > deadline:
                    raise SystemExit("a round took more than %g s" % ROUND_SECONDS)
                for key, _ in selector.select(1):
                    data = key.data.connection.recv(1 << 16)
                    key.data.parts.append((time.monotonic_ns(), data))
                    if not data or is_last(data):
                        selector.unregister(key.data.connection)

    def close(self) -> None:
        for reader in self.readers:
            reader.connection.close()


class Flow(NamedTuple):
    """The result of one round of a stream.

    lags: milliseconds, sorted.  cpu, own_cpu: of the bridge and of this program, as shares of a
    core.  deltas: sent for each delta of the CLI, less than 1 if the bridge joined some.
    lost: readers without the whole text.
    """

    lags: Sequence[float]
    cpu: float
    own_cpu: float
    deltas: float
    lost: int


def fan_out(at: Served, folder: Path, readers: int, count: int, per_second: float) -> Flow:
    """Run a round of a stream: `count` deltas for so many readers."""
    gate = folder / ("gate-%d" % time.monotonic_ns())
    message = "stamps %d %f %s" % (count, 1 / per_second, gate)
    job = call(at, "POST", "/api/ask", {"message": message})["requestId"]
    with contextlib.closing(Crowd(at, ["/api/ask/%s/events" % job] * readers)) as crowd:
        crowd.read(lambda data: b"ready" in data)
        start, cpu, own_cpu = time.monotonic(), cpu_seconds(at.pid), time.process_time()
        gate.touch()
        crowd.read(is_end)
        seconds = time.monotonic() - start
        cpu = cpu_seconds(at.pid) - cpu
        own_cpu = time.process_time() - own_cpu
        text = call(at, "GET", "/api/ask/" + job)["response"]
        deltas = [
            (moment, event)
            for reader in crowd.readers
            for moment, event in reader.events()
            if b"event: delta\n" in event
        ]
        is_complete = len(STAMP.findall(text)) == count
        lost = sum(not is_complete or reader.text() != text for reader in crowd.readers)
    lags = sorted(
        (moment - int(printed)) / 1e6
        for moment, event in deltas
        for printed in STAMP.findall(event.decode())
    )
    share = (len(deltas) / readers - 1) / count
    return Flow(lags, cpu / seconds, own_cpu / seconds, share, lost)


def endings(at: Served, folder: Path, clients: int, by_events: bool, is_own: bool) -> List[float]:
    """Return the delays in milliseconds of clients that wait for the end of a request."""
    gate = folder / ("gate-%d" % time.monotonic_ns())
    sender = at
    if is_own:
        # In a conversation one process answers all requests.
        fields = {"name": "own", "sessionMode": "stateful"}
        sender = at._replace(token=call(at, "POST", "/api/tokens", fields)["token"])
    message = {"message": "stamps 0 0.03 %s" % gate}
    count = clients if is_own else 1
    jobs = [call(sender, "POST", "/api/ask", message)["requestId"] for _ in range(count)]
    path = "/api/ask/%s/events" if by_events else "/api/ask/%s?wait=60"
    paths = [path % job for job in (jobs if is_own else jobs * clients)]
    with contextlib.closing(Crowd(at, paths, by_events)) as crowd:
        time.sleep(SETTLE_SECONDS)
        gate.touch()
        crowd.read(is_end)
        return [lag_of_end(reader, by_events) for reader in crowd.readers]


def lag_of_end(reader: Reader, by_events: bool) -> float:
    """Return the delay in milliseconds of the end of a request."""
    if by_events:
        moment, event = list(reader.events())[-1]
        body = json.loads(event.partition(b"data: ")[2])
    else:
        # The last part is the empty one at the end of the connection.
        moment, body = reader.parts[-2][0], json.loads(reader.body())
    if body["status"] != "completed":
        raise SystemExit("a request failed: %r" % body)
    return (moment - int(STAMP.findall(body["response"])[0])) / 1e6


# Name -> (clients, by events, a request for each client, repetitions in a round).
ENDINGS: Dict[str, Tuple[int, bool, bool, int]] = {
    "wait, 1": (1, False, False, 8),
    "wait, 60 of one": (60, False, False, 2),
    "wait, %d of their own" % OWN: (OWN, False, True, 1),
    "events, 1": (1, True, False, 8),
    "events, 60 of one": (60, True, False, 2),
    "events, %d of their own" % OWN: (OWN, True, True, 1),
}


def measure(modules: Dict[str, Path], options: argparse.Namespace, folder: Path) -> Tuple[Any, Any]:
    """Return (number of readers -> module -> rounds, kind of wait -> module -> rounds)."""
    flows: Dict[int, Dict[str, List[Flow]]] = {}
    ends: Dict[str, Dict[str, List[List[float]]]] = {}
    with contextlib.ExitStack() as stack:
        served = {}
        for name, module in modules.items():
            claude = paced_claude(folder / name / "claude")
            served[name] = stack.enter_context(
                bridge(folder / name, environment(), "--claude", claude, module=module)
            )
        count = max(1, round(options.seconds * options.per_second))
        for _ in range(options.rounds):
            for readers in options.readers:
                for name, at in served.items():
                    flow = fan_out(at, folder, readers, count, options.per_second)
                    flows.setdefault(readers, {}).setdefault(name, []).append(flow)
            for kind, (clients, by_events, is_own, times) in ENDINGS.items():
                for name, at in served.items():
                    lags = [
                        lag
                        for _ in range(times)
                        for lag in endings(at, folder, clients, by_events, is_own)
                    ]
                    ends.setdefault(kind, {}).setdefault(name, []).append(sorted(lags))
    return flows, ends


def lag_figures(rounds: Sequence[Sequence[float]]) -> Dict[str, float]:
    """Return the median, the 99th percentile and the maximum of the delays."""
    return {
        "p50": statistics.median(percentile(lags, 0.5) for lags in rounds),
        "p99": statistics.median(percentile(lags, 0.99) for lags in rounds),
        "max": max(lags[-1] for lags in rounds),
    }


def flow_figures(rounds: Sequence[Flow]) -> Dict[str, float]:
    """Return the figures of a stream."""
    return {
        **lag_figures([flow.lags for flow in rounds]),
        "cpu": statistics.median(flow.cpu for flow in rounds),
        "own_cpu": statistics.median(flow.own_cpu for flow in rounds),
        "deltas": statistics.median(flow.deltas for flow in rounds),
        "lost": sum(flow.lost for flow in rounds),
    }


Figures = Dict[str, Dict[str, Dict[str, float]]]


def table(flows: Figures, ends: Figures) -> str:
    """Return the figures as text. flows, ends: kind -> module -> figures."""
    lags = "%(p50)8.2f %(p99)8.2f %(max)8.2f"
    head = "%8s %8s %8s" % ("p50 ms", "p99 ms", "max ms")
    more_head = "%8s %8s %8s %6s" % ("CPU", "own CPU", "deltas", "lost")
    lines = ["%-34s %s %s" % ("delay after the CLI", head, more_head)]
    for readers, modules in flows.items():
        for name, row in modules.items():
            shares = "%7.1f%% %7.1f%%" % (row["cpu"] * 100, row["own_cpu"] * 100)
            counts = "%(deltas)8.2f %(lost)6d" % row
            title = "%s: %s readers" % (name, readers)
            lines.append("%-34s %s %s %s" % (title, lags % row, shares, counts))
    lines += ["", "%-34s %s" % ("from the result to the client", head)]
    for kind, modules in ends.items():
        for name, row in modules.items():
            lines.append("%-34s %s" % ("%s: %s" % (name, kind), lags % row))
    lines.append("")
    if "100" in flows:
        most = flows["100"]["bridge"]
        lines += [
            judged("100 readers, p99 ms", most["p99"], 15),
            judged("100 readers, share of a core", most["cpu"], 0.5),
        ]
    return "\n".join(lines + [judged("wait, 1, p50 ms", ends["wait, 1"]["bridge"]["p50"], 5)])


def numbers(words: str) -> List[int]:
    """Parse numbers with commas between them."""
    return [int(word) for word in words.split(",")]


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--readers", type=numbers, default=[1, 100], help="readers at once (default: 1,100)"
    )
    parser.add_argument(
        "--per-second", type=float, default=50, help="deltas a second (default: 50)"
    )
    parser.add_argument(
        "--seconds", type=float, default=5, help="seconds that a stream takes (default: 5)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: 3)")
    parser.add_argument(
        "--baseline", type=Path, help="another claude_api_bridge.py to compare with"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(argv)
    modules = {"bridge": MODULE}
    if options.baseline:
        modules["baseline"] = options.baseline.absolute()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        streams, waits = measure(modules, options, Path(folder))
    flows = {
        str(readers): {name: flow_figures(rounds) for name, rounds in by_module.items()}
        for readers, by_module in streams.items()
    }
    ends = {
        kind: {name: lag_figures(rounds) for name, rounds in by_module.items()}
        for kind, by_module in waits.items()
    }
    if options.json:
        print(json.dumps({"streams": flows, "ends": ends}))
    else:
        print(table(flows, ends) + "\nload average %.2f" % os.getloadavg()[0])
    lost = [row["lost"] for by_module in flows.values() for row in by_module.values()]
    return 1 if any(lost) else 0


if __name__ == "__main__":
    sys.exit(main())
