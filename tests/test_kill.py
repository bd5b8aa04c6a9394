"""A few kills at random moments; tests/bench/kill.py documents the checks.

test_bridge kills the bridge at chosen moments.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "bench"))
import kill  # noqa: E402


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and PR_SET_PDEATHSIG")
def test_accepted_requests_end_once_and_in_order_although_the_bridge_is_killed(
    tmp_path: Path,
) -> None:
    summary = kill.campaign(kills=3, seed=7, clients=3, folder=tmp_path)
    assert summary["violations"] == []
    assert summary["accepted"] > 0
    assert summary["completed"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and PR_SET_PDEATHSIG")
def test_so_they_do_while_the_network_and_the_login_fail_at_random(tmp_path: Path) -> None:
    summary = kill.campaign(kills=3, seed=11, clients=3, folder=tmp_path, has_outages=True)
    assert summary["violations"] == []
    assert summary["completed"] > 0
    assert summary["outages"] > 0 and summary["runs_away"] + summary["runs_lost"] > 0
