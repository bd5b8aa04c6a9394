"""A few kills of tests/bench/kill.py, which says what is checked. Those at chosen moments are in test_bridge."""
from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "bench"))
import kill  # noqa: E402


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and PR_SET_PDEATHSIG")
def test_what_was_accepted_ends_once_and_in_order_however_often_the_bridge_is_killed(tmp_path: Path) -> None:
    found = kill.campaign(kills=3, seed=7, clients=3, folder=tmp_path)
    assert found["violations"] == []
    assert found["accepted"] > 0 and found["completed"] > 0
