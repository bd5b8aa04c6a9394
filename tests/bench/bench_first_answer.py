"""How long a short question takes: `claude -p` started for it, against the bridge with its waiting process.

    python tests/bench/bench_first_answer.py [--claude PATH] [--asks 10] [--json]

Both drive the same real CLI against a stand-in of the Messages API on loopback that answers at once, with the same
environment; cold starts and asks take turns, so that a busy machine disturbs both alike. Linux (it looks into /proc).
"""
from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS)]

from messages_api import MessagesApi  # noqa: E402

BRIDGE = TESTS.parent / "claude_api_bridge.py"
PROMPT = "What is the capital of France?"
STARTS = 3                                              # bridges, each with a first question; the last one gets the paced ones
READY_SECONDS = 0.3                                     # a process that used no CPU for so long is waiting for its input


def cpu_ticks(pid: int) -> Tuple[int, int, bool]:
    """-> (parent, CPU time in ticks, whether it sleeps) of a process. Raises OSError."""
    words = Path("/proc/%d/stat" % pid).read_text(errors="replace").rpartition(")")[2].split()
    return int(words[1]), int(words[11]) + int(words[12]), words[0] == "S"


def only_child(pid: int) -> Optional[int]:
    """The one process whose parent is `pid`, if there is exactly one: the spare, once the last one has left."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if cpu_ticks(int(entry))[0] == pid:
                    found.append(int(entry))
            except OSError:
                continue
    return found[0] if len(found) == 1 else None


def wait_for_spare(bridge: int, known: Optional[int]) -> int:
    """Waits until a child other than `known` has worked and then stands still. -> its pid."""
    until, last, still_since = time.monotonic() + 60, (0, 0), time.monotonic()
    while time.monotonic() < until:
        child = only_child(bridge)
        try:
            _, ticks, sleeps = cpu_ticks(child) if child and child != known else (0, 0, False)
        except OSError:
            ticks, sleeps = 0, False
        if not sleeps or child != last[0] or ticks > last[1] + 1:            # one tick may be a timer of its own
            last, still_since = (child or 0, ticks), time.monotonic()
        elif ticks > 10 and time.monotonic() - still_since >= READY_SECONDS:
            return last[0]
        time.sleep(0.02)
    raise SystemExit("no spare became ready within 60 s")


def cold(claude: str, environ: Dict[str, str], home: Path) -> float:
    """The wall time of one `claude -p`, in seconds."""
    began = time.perf_counter()
    done = subprocess.run([claude, "-p", PROMPT], env={**environ, "HOME": str(home)}, cwd=str(home), stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, timeout=120)
    took = time.perf_counter() - began
    assert done.returncode == 0 and PROMPT.encode() in done.stdout, done
    return took


def ask(port: int, token: str) -> float:
    """The wall time of one question to the bridge, connection included, in seconds."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/api/ask", json.dumps({"message": PROMPT, "wait": 60}), {"Authorization": "Bearer " + token})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    took = time.perf_counter() - began
    assert answer.get("status") == "completed" and PROMPT in answer["response"], answer
    return took


def start_bridge(claude: str, environ: Dict[str, str], folder: Path) -> Tuple["subprocess.Popen[bytes]", str, int]:
    """-> (the program, the admin token, the port), once it serves."""
    program = subprocess.Popen([sys.executable, str(BRIDGE), "start", "--no-tunnel", "--host", "127.0.0.1", "--port", "0",
                                "--rate-limit", "0", "--data-dir", str(folder / "data"), "--claude", claude],
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


def measure(claude: str, asks: int, folder: Path) -> Dict[str, Any]:
    """-> the times in seconds, the sizes in bytes and the ratios."""
    times: Dict[str, List[float]] = {"cold": [], "bridge": []}
    sizes: Dict[str, List[int]] = {"cold": [], "bridge": []}
    with MessagesApi() as api:
        environ = environment(api)

        def noted(what: str, seconds: float) -> None:
            times[what].append(seconds)
            sizes[what].append(max(len(call.raw) for call in api.messages()))
            del api.calls[:]

        def compared(n: int, known: Optional[int]) -> int:
            """A cold start and a question, once a spare other than `known` is ready. -> its pid."""
            spare = wait_for_spare(program.pid, known)
            home = folder / ("home-%d" % n)
            home.mkdir()
            noted("cold", cold(claude, environ, home))
            noted("bridge", ask(port, token))
            return spare

        for start in range(STARTS):
            (folder / ("bridge-%d" % start)).mkdir()
            program, token, port = start_bridge(claude, environ, folder / ("bridge-%d" % start))
            try:
                spare = compared(start, None)           # the first question of a new bridge
                for n in range(asks if start == STARTS - 1 else 0):
                    spare = compared(STARTS + n, spare)
            finally:
                end_bridge(program)
    firsts, paced = times["bridge"][:STARTS], times["bridge"][STARTS:]
    middle = statistics.median(times["cold"])
    return {"cold_seconds": times["cold"], "first_seconds": firsts, "paced_seconds": paced,
            "cold_median": middle, "first_median": statistics.median(firsts), "paced_median": statistics.median(paced),
            "first_ratio": statistics.median(firsts) / middle, "paced_ratio": statistics.median(paced) / middle,
            "cold_bytes": max(sizes["cold"]), "bridge_bytes": max(sizes["bridge"]),
            "bytes_ratio": max(sizes["bridge"]) / max(sizes["cold"])}


def table(version: str, found: Dict[str, Any]) -> str:
    firsts, paced, times = found["first_seconds"], found["paced_seconds"], found["cold_seconds"]
    rows = [("", "seconds", "fastest", "slowest", "ratio", "bytes to the API"),
            ("claude -p, cold (median)", found["cold_median"], min(times), max(times), 1.0, found["cold_bytes"]),
            ("bridge, first (median)", found["first_median"], min(firsts), max(firsts), found["first_ratio"], found["bridge_bytes"]),
            ("bridge, paced (median)", found["paced_median"], min(paced), max(paced), found["paced_ratio"], found["bridge_bytes"])]
    lines = ["%-26s %8s %8s %8s %7s %17s" % tuple(cell if isinstance(cell, (str, int)) else "%.3f" % cell for cell in row)
             for row in rows]
    return "\n".join([version, *lines])


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
    parser = options_parser("Times a cold `claude -p` against the bridge, on a stand-in of the Messages API.")
    parser.add_argument("--asks", type=int, default=10, help="paced requests (default: 10)")
    options = parser.parse_args(argv)
    claude = found_claude(options.claude)
    if not claude:
        return 2
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        version = version_of(claude, folder)
        found = measure(claude, max(1, options.asks), Path(folder))
    print(json.dumps({"version": version, **found}) if options.json else table(version, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
