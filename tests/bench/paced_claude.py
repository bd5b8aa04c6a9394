"""The fake `claude` of the benchmarks: tests/fake_claude.py with answers that take their time.

    python tests/bench/paced_claude.py FOLDER [arguments of claude]

FOLDER: for its log and sessions. `common.paced_claude` makes an executable of it.
"""
from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import fake_claude  # noqa: E402


class Paced(fake_claude.Fake):
    def act_busy(self, rest: str) -> None:
        """Never answers, but shows signs of life until it is ended."""
        while True:
            self.say(type="system", subtype="api_retry", attempt=1)
            time.sleep(1)


if __name__ == "__main__":
    folder = sys.argv.pop(1)
    fake_claude.Fake = Paced  # type: ignore[misc]
    sys.exit(fake_claude.main(folder))
