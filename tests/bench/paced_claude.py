"""The fake `claude` of the benchmarks: tests/fake_claude.py with answers at a given pace.

    python tests/bench/paced_claude.py FOLDER [arguments of claude]

FOLDER contains its log and its sessions. `common.paced_claude` writes an executable that runs it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import List

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import fake_claude  # noqa: E402


class Paced(fake_claude.Fake):
    """The fake with two more actions."""

    def act_busy(self, rest: str) -> None:
        """Never answer, but print a line every second."""
        while True:
            self.say(type="system", subtype="api_retry", attempt=1)
            time.sleep(1)

    def act_stamps(self, rest: str) -> None:
        """stamps COUNT SECONDS FILE: print "ready ", wait for FILE, print COUNT deltas.

        The deltas are SECONDS apart. Each contains the time at which it is printed, by the clock
        that all processes share. If COUNT is 0, only the result contains the time.
        """
        words = rest.split()
        count, seconds, gate = int(words[0]), float(words[1]), words[2]
        pieces: List[str] = []

        def write(text: str) -> None:
            pieces.append(text)
            self.delta(text)

        if count:
            write("ready ")
        fake_claude.wait_for_file(gate)
        start = time.monotonic()
        for n in range(count):
            time.sleep(max(0.0, start + n * seconds - time.monotonic()))
            write(stamp())
        if not pieces:
            time.sleep(seconds)
        self.result("".join(pieces) or stamp())


def stamp() -> str:
    """Return the time, in a text of the usual length of a delta."""
    return "<%d> and some words. " % time.monotonic_ns()


if __name__ == "__main__":
    folder = sys.argv.pop(1)
    fake_claude.Fake = Paced  # type: ignore[misc]
    sys.exit(fake_claude.main(folder))
