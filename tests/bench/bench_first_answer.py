"""How long a short question takes: `claude -p` started for it, against the bridge with its waiting processes.

    python tests/bench/bench_first_answer.py [--claude PATH] [--asks 4] [--burst 20] [--rounds 3] [--spares 0,1,2,3] [--json]

Both drive the same real CLI against a stand-in of the Messages API on loopback that answers at once, with the same
environment. In each round a bridge of each number of spares is started in turn:
1. Paced: a question when its spares are ready, up to the first token and to the end of the answer, in turn with a cold start.
2. A burst: so many questions at once, until all are answered; against as many cold starts, one after the other.
3. Memory of the bridge's processes of `claude`, idle and at most in the burst: as a sum what is theirs alone and their part of what
   they share (PSS).
Linux (it looks into /proc).
"""
from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS)]

from messages_api import MessagesApi  # noqa: E402

BRIDGE = TESTS.parent / "claude_api_bridge.py"
PROMPT = "What is the capital of France?"
READY_SECONDS = 0.3                                     # a process that used no CPU for so long is waiting for its input
LOOK_SECONDS = 0.1                                      # between two looks at the memory


# --- the processes of a bridge ---


def cpu_ticks(pid: int) -> Tuple[int, int, bool]:
    """-> (parent, CPU time in ticks, whether it sleeps) of a process. Raises OSError."""
    words = Path("/proc/%d/stat" % pid).read_text(errors="replace").rpartition(")")[2].split()
    return int(words[1]), int(words[11]) + int(words[12]), words[0] == "S"


def children(pid: int) -> Dict[int, int]:
    """The living processes whose parent is `pid`, with their CPU time in ticks."""
    found = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            parent, ticks, _ = cpu_ticks(int(entry))
            if parent == pid:
                found[int(entry)] = ticks
    return found


def wait_for_spares(bridge: int, count: int = 1) -> None:
    """Waits until the bridge has just so many children, and all have worked and stand still."""
    until, last, still_since = time.monotonic() + 60, {}, time.monotonic()
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
            total += sum(int(line.split()[1]) for line in Path("/proc/%d/smaps_rollup" % pid).read_text().splitlines() if line.startswith("Pss:"))
    return total / 1000


@contextlib.contextmanager
def watched_memory(bridge: int) -> Iterator[List[float]]:
    """The memory from time to time, as long as the block goes on."""
    seen, over = [memory_mb(bridge)], threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_SECONDS):
            seen.append(memory_mb(bridge))

    thread = threading.Thread(target=watch, name="memory")
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


# --- one question ---


class Times:
    """What was measured of one kind: seconds to the first token and to the end, and the bytes of the largest request to the API."""

    def __init__(self) -> None:
        self.first: List[float] = []
        self.total: List[float] = []
        self.request_bytes = 0


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


# --- a bridge ---


def start_bridge(claude: str, environ: Dict[str, str], folder: Path, *flags: str) -> Tuple["subprocess.Popen[bytes]", str, int]:
    """-> (the program, the admin token, the port), once it serves."""
    program = subprocess.Popen([sys.executable, str(BRIDGE), "start", "--no-tunnel", "--host", "127.0.0.1", "--port", "0",
                                "--rate-limit", "0", "--data-dir", str(folder / "data"), "--claude", claude, *flags],
                               env={**environ, "HOME": str(folder)}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL)
    token = ""
    assert program.stdout is not None
    for line in (raw.decode().strip() for raw in program.stdout):
        if line.startswith("cab-"):
            token = line
        if line.startswith("http"):
            return program, token, int(line.rpartition(":")[2])
    raise SystemExit("the bridge did not start (status %s)" % program.wait())


def end_bridge(program: "subprocess.Popen[bytes]") -> None:
    program.send_signal(signal.SIGTERM)
    program.wait(30)
    assert program.stdout is not None
    program.stdout.close()


def environment(api: MessagesApi) -> Dict[str, str]:
    """What both sides run with, but HOME: nothing of this machine's own, and no other way out than the stand-in."""
    return {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "ANTHROPIC_BASE_URL": api.url, "CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-dummy",
            "HTTPS_PROXY": api.url, "NO_PROXY": "127.0.0.1"}


# --- all of it ---


class Figures:
    """All that was measured. paced, burst, idle and peak: by the number of spares."""

    def __init__(self, spares: Sequence[int]) -> None:
        self.cold = Times()
        self.cold_burst: List[float] = []
        self.paced = {count: Times() for count in spares}
        self.burst: Dict[int, List[float]] = {count: [] for count in spares}
        self.idle: Dict[int, List[float]] = {count: [] for count in spares}
        self.peak: Dict[int, List[float]] = {count: [] for count in spares}

    def rows(self) -> List[Dict[str, Any]]:
        """A row for the cold start, and one for each number of spares, with medians and ratios."""
        found = []
        for count, times, bursts in [(None, self.cold, self.cold_burst)] + [(n, self.paced[n], self.burst[n]) for n in self.paced]:
            first, total, burst = map(statistics.median, (times.first, times.total, bursts))
            found.append({"spares": count, "first": first, "first_ratio": first / statistics.median(self.cold.first),
                          "total": total, "total_ratio": total / statistics.median(self.cold.total),
                          "burst": burst, "burst_ratio": burst / statistics.median(self.cold_burst),
                          "idle_mb": None if count is None else statistics.median(self.idle[count]),
                          "peak_mb": None if count is None else max(self.peak[count]), "request_bytes": times.request_bytes})
        return found


def measure(claude: str, options: argparse.Namespace, folder: Path) -> Figures:
    figures = Figures(options.spares)
    with MessagesApi() as api:
        environ = environment(api)

        def noted(times: Times, seconds: Tuple[float, float]) -> None:
            times.first.append(seconds[0])
            times.total.append(seconds[1])
            times.request_bytes = max([times.request_bytes] + [len(call.raw) for call in api.messages()])
            del api.calls[:]

        for n in range(options.rounds):
            for count in options.spares:
                place = folder / ("bridge-%d-%d" % (n, count))
                place.mkdir()
                program, token, port = start_bridge(claude, environ, place, "--spare", str(count))
                try:
                    for m in range(options.asks):
                        wait_for_spares(program.pid, count)
                        noted(figures.cold, cold(claude, environ, place / ("cold-%d" % m)))
                        noted(figures.paced[count], ask(port, token))
                    wait_for_spares(program.pid, count)
                    with watched_memory(program.pid) as seen:
                        figures.burst[count].append(ask_at_once(options.burst, port, token))
                    figures.idle[count].append(seen[0])
                    figures.peak[count].append(max(seen))
                finally:
                    end_bridge(program)
            began = time.perf_counter()
            for m in range(options.burst):
                cold(claude, environ, folder / ("cold-%d-%d" % (n, m)))
            figures.cold_burst.append(time.perf_counter() - began)
    return figures


def table(version: str, rows: Sequence[Dict[str, Any]], burst: int) -> str:
    lines = [version, "%-20s %9s %6s %9s %6s %9s %6s %8s %8s %9s" % (
        "", "first (s)", "ratio", "total (s)", "ratio", "%d (s)" % burst, "ratio", "idle MB", "peak MB", "bytes")]
    for row in rows:
        name = "claude -p, cold" if row["spares"] is None else "bridge, %d spare%s" % (row["spares"], "s" * (row["spares"] != 1))
        memory = ["%8s" % "" if row[key] is None else "%8.0f" % row[key] for key in ("idle_mb", "peak_mb")]
        lines.append("%-20s %9.3f %6.3f %9.3f %6.3f %9.2f %6.3f %s %s %9d" % (
            name, row["first"], row["first_ratio"], row["total"], row["total_ratio"], row["burst"], row["burst_ratio"], *memory,
            row["request_bytes"]))
    return "\n".join(lines)


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
    parser.add_argument("--asks", type=int, default=4, help="paced requests of each bridge (default: 4)")
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
        rows = measure(claude, options, Path(folder)).rows()
    print(json.dumps({"version": version, "burst": options.burst, "rows": rows}) if options.json else table(version, rows, options.burst))
    return 0


if __name__ == "__main__":
    sys.exit(main())
