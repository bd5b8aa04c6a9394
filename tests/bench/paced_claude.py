"""The fake `claude` of the benchmarks: tests/fake_claude.py with answers that take their time.

    python tests/bench/paced_claude.py FOLDER [arguments of claude]

FOLDER: for its log and sessions. `common.paced_claude` makes an executable of it.
"""
from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import List

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import fake_claude  # noqa: E402


class Paced(fake_claude.Fake):
    def act_busy(self, rest: str) -> None:
        """Never answers, but shows signs of life until it is ended."""
        while True:
            self.say(type="system", subtype="api_retry", attempt=1)
            time.sleep(1)

    def act_stamps(self, rest: str) -> None:
        """stamps COUNT SECONDS FILE: a word; then, once the file exists, COUNT deltas that far apart, each with the moment at which
        it is written (of the clock that all processes share). With a count of 0 the result alone has one."""
        count, seconds, gate = rest.split()
        said: List[str] = []

        def say(text: str) -> None:
            said.append(text)
            self.delta(text)

        if int(count):
            say("begun ")
        fake_claude.wait_for_file(gate)
        began = time.monotonic()
        for n in range(int(count)):
            time.sleep(max(0.0, began + n * float(seconds) - time.monotonic()))
            say(stamp())
        if not said:
            time.sleep(float(seconds))
        self.result("".join(said) or stamp())


def stamp() -> str:
    """As long as a delta of the real one may be."""
    return "<%d> and some words. " % time.monotonic_ns()


if __name__ == "__main__":
    folder = sys.argv.pop(1)
    fake_claude.Fake = Paced  # type: ignore[misc]
    sys.exit(fake_claude.main(folder))
