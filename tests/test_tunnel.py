"""The tunnel: download, start, supervision and end of cloudflared, and access through it.

The tests use a fake cloudflared. One test uses a real one, if $CAB_TEST_CLOUDFLARED is its path.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tarfile
import threading
import urllib.error
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import pytest
from conftest import (
    IMPORTED,
    SHORT,
    Api,
    FakeClaude,
    FakeClock,
    Program,
    RunningBridge,
    imported,
    is_running,
    run_cli,
    wait_until,
)
from fake_cloudflared import (
    FAILURES,
    HANGING,
    HARMLESS,
    PRE_CHECKS,
    WELCOME,
    FakeCloudflared,
    box,
    failing,
    ingress,
    named,
    quick,
)

import claude_api_bridge as cab

# A step of the fake's plan, and what the fixtures return.
Step = Dict[str, Any]
RunTunnel = Callable[..., "TunnelRun"]
Bridges = Callable[..., RunningBridge]
Programs = Callable[..., "TunnelProgram"]
Servers = Callable[..., "FileServer"]
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and PR_SET_PDEATHSIG")
STARTING, RUNNING, BACKOFF, FATAL = (
    cab.TunnelState.STARTING, cab.TunnelState.RUNNING, cab.TunnelState.BACKOFF,
    cab.TunnelState.FATAL,
)
URL, OTHER_URL = "https://foo-bar.trycloudflare.com", "https://new-one.trycloudflare.com"
TUNNEL_TOKEN = base64.b64encode(
    json.dumps({"a": "b" * 32, "t": str(uuid.UUID(int=7)), "s": "c2VjcmV0" * 6}).encode()
).decode()


# --- log lines, assets, command line, settings ---


@pytest.mark.parametrize(
    "line, result",
    [
        (box("foo-bar.trycloudflare.com").splitlines()[2], ("host", "foo-bar.trycloudflare.com")),
        (
            '{"level":"info","message":"|  https://foo-1.trycloudflare.com     |",'
            '"time":"2026-11-22T06:04:06Z"}',
            ("host", "foo-1.trycloudflare.com"),
        ),
        (
            "2026-11-22T06:02:36Z INF Starting metrics server on 127.0.0.1:39911/metrics",
            ("metrics", "127.0.0.1:39911"),
        ),
        ("2026-11-22T06:02:36Z INF Starting metrics server on 192.0.2.1:39911/metrics", ("", "")),
        ("2026-11-22T06:02:36Z INF |  https://api.trycloudflare.com                |", ("", "")),
        ("2026-11-22T06:02:36Z INF |  https://foo-bar.trycloudflare.com.evil.example  |", ("", "")),
        ("2026-11-22T06:02:36Z INF |  https://evil.example/foo.trycloudflare.com  |", ("", "")),
        ("2026-11-22T06:02:36Z INF |  https://a.b.trycloudflare.com  |", ("", "")),
        ("2026-11-22T06:02:36Z INF https://foo-bar.trycloudflare.com", ("", "")),
        (
            'failed to request quick Tunnel: Post "https://api.trycloudflare.com/tunnel":'
            " dial tcp: no such host",
            ("", ""),
        ),
        *((line, ("", "")) for line in (WELCOME + HARMLESS + PRE_CHECKS).splitlines()),
        ("", ("", "")),
    ],
)
def test_a_log_line_is_parsed(line: str, result: Tuple[str, str]) -> None:
    assert cab.parse_tunnel_line(line) == result


@pytest.mark.parametrize(
    "system, machine, name",
    [
        ("Linux", "x86_64", "cloudflared-linux-amd64"),
        ("Linux", "aarch64", "cloudflared-linux-arm64"),
        ("Linux", "i686", "cloudflared-linux-386"),
        ("Linux", "armv7l", "cloudflared-linux-arm"),
        ("Linux", "armv6l", "cloudflared-linux-arm"),
        ("Darwin", "arm64", "cloudflared-darwin-arm64.tgz"),
        ("Darwin", "x86_64", "cloudflared-darwin-amd64.tgz"),
        ("Windows", "AMD64", "cloudflared-windows-amd64.exe"),
        ("Windows", "ARM64", "cloudflared-windows-amd64.exe"),
        ("Windows", "x86", "cloudflared-windows-386.exe"),
        ("Linux", "riscv64", None),
        ("Linux", "ppc64le", None),
        ("FreeBSD", "amd64", None),
        ("", "", None),
    ],
)
def test_the_asset_of_each_system(system: str, machine: str, name: Optional[str]) -> None:
    asset = cab.cloudflared_asset(system, machine)
    assert (asset.name if asset else None) == name


def test_every_asset_has_a_size_and_a_sum_and_an_archive_its_program_s_sum() -> None:
    assert len({asset.sha256 for asset in cab.ASSETS.values()}) == len(cab.ASSETS) == 8
    for asset in cab.ASSETS.values():
        assert 15_000_000 < asset.size < 60_000_000 and re.fullmatch("[0-9a-f]{64}", asset.sha256)
        assert bool(re.fullmatch("[0-9a-f]{64}", asset.program_sha256)) is asset.name.endswith(
            ".tgz"
        )
        assert asset.program_sha256 != asset.sha256


START = [
    "/bin/cloudflared", "tunnel", "--config", "/c.yml", "--no-autoupdate", "--metrics",
    "127.0.0.1:0", "--grace-period", "5s",
]


@pytest.mark.parametrize(
    "protocol, is_named, words",
    [
        ("quic", False, ["--protocol", "quic", "--url", "http://127.0.0.1:3456"]),
        ("http2", False, ["--protocol", "http2", "--url", "http://127.0.0.1:3456"]),
        ("auto", True, ["run"]),
        ("http2", True, ["--protocol", "http2", "run"]),
    ],
)
def test_the_command_line_of_cloudflared(protocol: str, is_named: bool, words: List[str]) -> None:
    assert (
        cab.tunnel_argv("/bin/cloudflared", "/c.yml", "http://127.0.0.1:3456", protocol, is_named)
        == START + words
    )


@pytest.mark.parametrize(
    "host, no_tunnel, origin",
    [
        ("", False, "http://127.0.0.1:3456"),
        ("", True, "http://127.0.0.1:3456"),
        ("0.0.0.0", False, "http://127.0.0.1:3456"),
        ("localhost", False, "http://127.0.0.1:3456"),
        ("192.0.2.1", False, "http://192.0.2.1:3456"),
        ("::", False, "http://[::1]:3456"),
        ("::1", False, "http://[::1]:3456"),
        ("2001:db8::1", False, "http://[2001:db8::1]:3456"),
    ],
)
def test_the_origin_is_the_address_on_which_the_bridge_listens(
    host: str, no_tunnel: bool, origin: str
) -> None:
    assert cab.Config(host=host, no_tunnel=no_tunnel).origin(3456) == origin


PASSED = {
    "PATH": "/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "LC_ALL": "C",
    "TMPDIR": "/tmp",
    "SSL_CERT_FILE": "/x.pem",
    **dict.fromkeys(
        (
            "USER", "USERPROFILE", "TZ", "TEMP", "TMP", "SYSTEMROOT", "windir", "APPDATA",
            "LOCALAPPDATA", "SSL_CERT_DIR",
        ),
        "y",
    ),
}
DROPPED = (
    "TUNNEL_NAME", "TUNNEL_LOGLEVEL", "TUNNEL_TOKEN", "tunnel_url", "NO_AUTOUPDATE",
    "NO_TLS_VERIFY", "NOTIFY_SOCKET", "CAB_PORT", "CAB_TUNNEL_TOKEN", "ANTHROPIC_API_KEY",
    "CLAUDE_CODE_OAUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "CLIENT_SECRET",
    "DB_PASSWORD", "KEY", "token", "Secret_Sauce", "EDITOR", "PYTHONPATH", "LD_PRELOAD",
    "DATABASE_URL", "MY_PATH", "PATHEXT", "HOMEPAGE",
)


@pytest.mark.parametrize("token", ["", TUNNEL_TOKEN])
def test_the_environment_contains_only_common_variables_and_the_token(token: str) -> None:
    environ = {**PASSED, **dict.fromkeys(DROPPED, "x")}
    assert cab.tunnel_environment(environ, token) == {
        **PASSED, **({"TUNNEL_TOKEN": token} if token else {}),
    }


def encoded(value: Any) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()


@pytest.mark.parametrize(
    "text", [TUNNEL_TOKEN, TUNNEL_TOKEN + "\n", "  \t" + TUNNEL_TOKEN + "\r\n"]
)
def test_a_good_tunnel_token_is_accepted_and_stripped(text: str) -> None:
    assert cab.check_tunnel_token(text) == TUNNEL_TOKEN


BAD_TOKENS = [
    "hunter2", TUNNEL_TOKEN[:-20], "cloudflared service install " + TUNNEL_TOKEN, "é" * 40,
    encoded([1, 2]), encoded("ats"), encoded(None), encoded({"a": "x", "t": "y"}),
    encoded({"a": 1, "t": 2, "s": 3}), base64.b64encode(b"\xff\xfe hunter").decode(), "eyJ",
    "=" * 8,
]


@pytest.mark.parametrize("text", BAD_TOKENS)
def test_a_bad_tunnel_token_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(cab.WrongSetting) as caught:
        cab.check_tunnel_token(text)
    assert str(caught.value).count(". ") == 0 and text not in str(caught.value).replace("eyJ", "")


@pytest.mark.parametrize(
    "config, hosts, rules",
    [
        (ingress(("b.example.com", "http://localhost:3456")), ["b.example.com"], 2),
        (
            ingress(
                ("a.example.com", "http://localhost:80"),
                ("b.example.com", "http://127.0.0.1:3456/"),
            ),
            ["b.example.com"],
            3,
        ),
        (ingress(("b.example.com", "http://[::1]:3456")), ["b.example.com"], 2),
        (
            ingress(
                ("a.example.com", "http://localhost:3456"),
                ("b.example.com", "http://localhost:3456"),
            ),
            ["a.example.com", "b.example.com"],
            3,
        ),
        ({**ingress(("b.example.com", "http://localhost:3456")), "version": -1}, [], 0),
        (ingress(("b.example.com", "http://localhost:34567")), [], 2),
        (ingress(("b.example.com", "http://192.0.2.1:3456")), [], 2),
        (ingress(("", "http://localhost:3456")), [], 2),
        (ingress(("*.example.com", "http://localhost:3456")), [], 2),
        (
            ingress(
                ("*.example.com", "http://localhost:3456"),
                ("b.example.com", "http://localhost:3456"),
            ),
            ["b.example.com"],
            3,
        ),
        (ingress(), [], 1),
        ({"version": -1, "config": {}}, [], 0),
        ({"config": {"ingress": [7, None]}}, [], 0),
        ({"config": {"ingress": "x"}}, [], 0),
        ({"config": None}, [], 0),
        (None, [], 0),
        ([], [], 0),
        ("x", [], 0),
    ],
)
def test_the_hosts_of_a_configuration_that_lead_to_the_bridge_s_port(
    config: Any, hosts: List[str], rules: int
) -> None:
    actual, listed = cab.hosts_in_ingress(config, 3456)
    assert (actual, len(listed)) == (hosts, rules)


def test_the_rules_of_a_configuration_are_listed_with_a_star_for_no_name() -> None:
    config = ingress(
        ("*.example.com", "http://localhost:3456"),
        ("b.example.com", "http://localhost:80"),
        ("", "http://localhost:81"),
    )
    assert cab.hosts_in_ingress(config, 3456) == (
        [],
        [
            "*.example.com -> http://localhost:3456", "b.example.com -> http://localhost:80",
            "* -> http://localhost:81", "* -> http_status:404",
        ],
    )


# --- the policy: when cloudflared is started, stopped and retried ---

NOTHING, ADDRESS, READY = (
    cab.TunnelStatus(), cab.TunnelStatus(has_host=True),
    cab.TunnelStatus(has_host=True, is_ready=True),
)
ENDED = cab.TunnelStatus(True, message="it ended")
LIMITED = cab.TunnelStatus(True, message='it ended: status_code="429 Too Many Requests"')
LIMITED_TOO = cab.TunnelStatus(True, message="it ended: error code: 1015")
HOPELESS = cab.TunnelStatus(True, True, message="it is no use")
# Seconds since the start and the observed status; then the expected action, state and protocol.
Moment = Tuple[float, cab.TunnelStatus, str, str, str]

HISTORIES: List[Any] = [
    pytest.param(("quic", "http2"), False, [
        (0.1, NOTHING, "", STARTING, "quic"),
        (2, ADDRESS, "", STARTING, "quic"),
        (3, READY, "", RUNNING, "quic"),
        (90_000, READY, "", RUNNING, "quic"),
    ], id="all is well"),
    pytest.param(("quic", "http2"), False, [
        (29.9, NOTHING, "", STARTING, "quic"),
        (30, NOTHING, "stop", BACKOFF, "quic"),
        (34.9, NOTHING, "", BACKOFF, "quic"),
        (35, NOTHING, "start", STARTING, "quic"),
    ], id="no address"),
    pytest.param(("quic", "http2"), False, [
        (0, ADDRESS, "", STARTING, "quic"),
        (29.9, ADDRESS, "", STARTING, "quic"),
        (30, ADDRESS, "start", STARTING, "http2"),
        (30, ADDRESS, "", STARTING, "http2"),
        (119.9, ADDRESS, "", STARTING, "http2"),
        (120, ADDRESS, "stop", BACKOFF, "http2"),
        (125, NOTHING, "start", STARTING, "quic"),
    ], id="30 s by quic, 90 s by http2, a pause"),
    pytest.param(("quic", "http2"), False, [
        (20, ADDRESS, "", STARTING, "quic"),
        (49.9, ADDRESS, "", STARTING, "quic"),
        (50, ADDRESS, "start", STARTING, "http2"),
        (79.9, NOTHING, "", STARTING, "http2"),
        (79.9, ADDRESS, "", STARTING, "http2"),
        (169.8, ADDRESS, "", STARTING, "http2"),
        (169.9, ADDRESS, "stop", BACKOFF, "http2"),
    ], id="a late address leaves all the time for the connection"),
    pytest.param(("quic", "http2"), False, [
        (0, ADDRESS, "", STARTING, "quic"),
        (30, ADDRESS, "start", STARTING, "http2"),
        (110, READY, "", RUNNING, "http2"),
        (500, ENDED, "stop", BACKOFF, "http2"),
        (505, NOTHING, "start", STARTING, "http2"),
        (506, ADDRESS, "", STARTING, "http2"),
        (536, ADDRESS, "start", STARTING, "quic"),
        (537, READY, "", RUNNING, "quic"),
        (600, ENDED, "stop", BACKOFF, "quic"),
        (614.9, NOTHING, "", BACKOFF, "quic"),
        (615, NOTHING, "start", STARTING, "quic"),
    ], id="what worked is tried first"),
    pytest.param(("http2",), False, [
        (0, ADDRESS, "", STARTING, "http2"),
        (89.9, ADDRESS, "", STARTING, "http2"),
        (90, ADDRESS, "stop", BACKOFF, "http2"),
        (95, NOTHING, "start", STARTING, "http2"),
    ], id="a pinned protocol gets 90 s"),
    pytest.param(("auto",), True, [
        (0, ADDRESS, "", STARTING, "auto"),
        (179.9, ADDRESS, "", STARTING, "auto"),
        (180, ADDRESS, "stop", BACKOFF, "auto"),
        (185, NOTHING, "start", STARTING, "auto"),
    ], id="a named tunnel changes it by itself, and gets 180 s"),
    pytest.param(("quic",), False, [
        (1, READY, "", RUNNING, "quic"),
        (60, ADDRESS, "", RUNNING, "quic"),
        (179.9, ADDRESS, "", RUNNING, "quic"),
        (180, ADDRESS, "stop", BACKOFF, "quic"),
        (185, NOTHING, "start", STARTING, "quic"),
    ], id="lost for 120 s"),
    pytest.param(("quic",), False, [
        (1, READY, "", RUNNING, "quic"),
        (90_000, ADDRESS, "", RUNNING, "quic"),
        (90_119, READY, "", RUNNING, "quic"),
    ], id="a check after a long sleep is no loss"),
    pytest.param(("quic",), False, [
        (1, READY, "", RUNNING, "quic"),
        (100, ADDRESS, "", RUNNING, "quic"),
        (120, READY, "", RUNNING, "quic"),
        (239, ADDRESS, "", RUNNING, "quic"),
        (239.9, READY, "", RUNNING, "quic"),
    ], id="lost, and back in time"),
    pytest.param(("quic", "http2"), False, [
        (1, READY, "", RUNNING, "quic"),
        (3_600, ENDED, "stop", BACKOFF, "quic"),
        (3_605, NOTHING, "start", STARTING, "quic"),
        (3_606, READY, "", RUNNING, "quic"),
    ], id="death after an hour"),
    pytest.param(("quic", "http2"), False, [
        (0.3, HOPELESS, "stop", FATAL, "quic"),
        (60, READY, "", FATAL, "quic"),
        (900_000, NOTHING, "", FATAL, "quic"),
    ], id="fatal is final"),
    pytest.param(("quic", "http2"), False, [
        (0.3, LIMITED, "stop", BACKOFF, "quic"),
        (300.2, NOTHING, "", BACKOFF, "quic"),
        (300.3, NOTHING, "start", STARTING, "quic"),
        (301, LIMITED_TOO, "stop", BACKOFF, "quic"),
        (1_200.9, NOTHING, "", BACKOFF, "quic"),
        (1_201, NOTHING, "start", STARTING, "quic"),
    ], id="too often: a long pause at once"),
]


@pytest.mark.parametrize("protocols, is_named, moments", HISTORIES)
def test_the_policy_s_actions_and_states(
    protocols: Sequence[str], is_named: bool, moments: Sequence[Moment]
) -> None:
    start = 1_000.0
    policy = cab.TunnelPolicy(protocols, is_named, lambda: 0.5)
    assert (policy.state, policy.start(start), policy.state, policy.protocol) == (
        cab.TunnelState.STOPPED, "start", STARTING, protocols[0],
    )
    actual = [
        (at, observed, policy.step(start + at, observed), policy.state, policy.protocol)
        for at, observed, *_ in moments
    ]
    assert actual == moments


@pytest.mark.parametrize(
    "observed, seconds, action", [(NOTHING, 30, "stop"), (ADDRESS, 30, "start")]
)
def test_the_time_limits_of_a_start_begin_when_the_program_runs(
    observed: cab.TunnelStatus, seconds: float, action: str
) -> None:
    policy = cab.TunnelPolicy(["quic", "http2"])
    policy.start(1_000)
    # The download took 31 seconds.
    policy.mark_started(1_031)
    assert [policy.step(1_031 + after, observed) for after in (0, seconds - 0.1, seconds)] == [
        "", "", action,
    ]


@pytest.mark.parametrize("jitter, factor", [(0.0, 0.8), (0.5, 1.0), (1.0, 1.2)])
def test_the_backoff_grows_to_15_minutes_and_has_jitter(jitter: float, factor: float) -> None:
    policy, now, pauses = cab.TunnelPolicy(["quic"], jitter=lambda: jitter), 0.0, []
    policy.start(now)
    for _ in range(7):
        assert policy.step(now, ENDED) == "stop"
        pauses.append(policy.retry_at - now)
        now = policy.retry_at
        assert policy.step(now, NOTHING) == "start"
    assert pauses == pytest.approx(
        [seconds * factor for seconds in (5, 15, 60, 300, 900, 900, 900)]
    )


def test_every_pause_has_its_own_jitter() -> None:
    policy = cab.TunnelPolicy(["quic"])
    pauses = set()
    for _ in range(20):
        policy.start(0)
        policy._failures = 0
        policy.step(0, ENDED)
        pauses.add(policy.retry_at)
    assert len(pauses) > 10 and all(4 <= pause <= 6 for pause in pauses)


def test_the_backoff_is_reset_after_a_good_hour() -> None:
    policy = cab.TunnelPolicy(["quic"], jitter=lambda: 0.5)
    policy.start(0)
    for at in (0, 10, 100):
        policy.step(at, ENDED)
        policy.start(at)
    policy.step(200, READY)
    policy.step(3_800, READY)
    policy.step(3_801, ENDED)
    assert policy.retry_at - 3_801 == 5


def count_starts(hours: float, observe: Callable[[float], cab.TunnelStatus]) -> int:
    """Return how often cloudflared is started.

    observe: returns the status for a number of seconds since the last start.
    """
    policy = cab.TunnelPolicy(["quic", "http2"], jitter=lambda: 0.0)
    started_at, starts, now = 0.0, 1, 0.0
    policy.start(now)
    while now < hours * 3600:
        now += 0.5
        if policy.step(now, observe(now - started_at)) == "start":
            started_at, starts = now, starts + 1
    return starts


@pytest.mark.parametrize(
    "observe, most",
    [
        pytest.param(lambda since: ENDED, 45, id="it ends at once"),
        pytest.param(lambda since: LIMITED, 45, id="too often"),
        pytest.param(lambda since: NOTHING, 45, id="no address"),
        pytest.param(lambda since: ADDRESS, 80, id="no connection"),
        pytest.param(
            lambda since: ADDRESS if since < 25 else ENDED, 45, id="it ends before it is connected"
        ),
        pytest.param(
            lambda since: READY if since < 10 else ADDRESS, 300,
            id="it loses its connection again and again",
        ),
        pytest.param(
            lambda since: READY if since < 2 else ENDED, 300,
            id="it is connected and ends, again and again",
        ),
        pytest.param(lambda since: HOPELESS, 1, id="hopeless"),
    ],
)
def test_eight_hours_of_failures_cause_few_starts(
    observe: Callable[[float], cab.TunnelStatus], most: int
) -> None:
    assert 1 <= count_starts(8, observe) <= most


def test_the_reason_names_the_protocol_and_the_port() -> None:
    policy = cab.TunnelPolicy(["quic", "http2"])
    policy.start(0)
    policy.step(0, ADDRESS)
    policy.step(30, ADDRESS)
    assert "quic" in policy.last_error
    policy.step(30, ADDRESS)
    policy.step(120, ADDRESS)
    assert "http2" in policy.last_error and "7844" in policy.last_error


# --- a tunnel with a process ---


class ShortWait(threading.Event):
    """An event whose waits are short, because the tunnel's time is that of the test's clock."""

    def wait(self, timeout: Optional[float] = None) -> bool:
        return super().wait(min(timeout or 0.0, 0.01))


class Observer(cab.TunnelObserver):
    """Collects what a tunnel reports. urls: (url, previous); progress: (text, is_transient)."""

    def __init__(self) -> None:
        self.urls: List[Tuple[str, Optional[str]]] = []
        self.progress: List[Tuple[str, bool]] = []

    def on_url(self, url: str, previous: Optional[str]) -> None:
        self.urls.append((url, previous))

    def on_progress(self, text: str, is_transient: bool) -> None:
        self.progress.append((text, is_transient))


class FakeDatabase:
    """What a tunnel uses of a Database, in memory.

    saved: key-value pairs; processes: by pid, while they are recorded.
    """

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.saved: Dict[str, str] = {}
        self.processes: Dict[int, Tuple[Any, ...]] = {}

    def get_state(self, key: str) -> Optional[str]:
        return self.saved.get(key)

    def set_state(self, key: str, value: str) -> None:
        self.saved[key] = value

    def record_process(self, pid: int, started: Optional[str], program: Optional[str]) -> None:
        self.processes[pid] = (started, program)

    def forget_process(self, pid: int) -> None:
        self.processes.pop(pid, None)


class TunnelRun:
    """A Tunnel without a bridge, and what it reports.

    log: lines of the module's log; saved, processes: see FakeDatabase.
    """

    def __init__(
        self,
        folder: Path,
        make_install: Callable[[cab.Config], Any],
        clock: FakeClock,
        protocols: Sequence[str],
        token: str,
        log: List[str],
        **settings: Any,
    ) -> None:
        self.clock, self.log = clock, log
        self.observer = Observer()
        database: Any = FakeDatabase(clock)
        self.saved: Dict[str, str] = database.saved
        self.processes: Dict[int, Tuple[Any, ...]] = database.processes
        install = make_install(cab.Config(data_dir=folder, **settings))
        self.policy = cab.TunnelPolicy(protocols, bool(token), lambda: 0.5)
        self.tunnel = cab.Tunnel(install, self.policy, token, database, self.observer)
        self.tunnel._stopping = ShortWait()
        self.stepped_at, step = float("-inf"), self.policy.step

        def observed_step(now: float, observed: cab.TunnelStatus) -> str:
            action, self.stepped_at = step(now, observed), now
            return action

        self.policy.step = observed_step  # type: ignore[assignment, method-assign]

    @property
    def announced(self) -> List[str]:
        """The URLs that the tunnel announced."""
        return [url for url, _ in self.observer.urls]

    def start(self) -> "TunnelRun":
        self.tunnel.start(3456)
        return self

    def wait_for(self, state: str, seconds: float = 10) -> Dict[str, Any]:
        """Wait until the tunnel is in this state and has logged it; return the details."""

        def settled() -> bool:
            tunnel = self.tunnel
            if tunnel.state != state or tunnel.is_ready is not (state == RUNNING):
                return False
            if state not in (BACKOFF, FATAL):
                return True
            reason = self.policy.last_error.rstrip(".")
            return bool(self.log) and tunnel._process is None and reason in self.log[-1]

        wait_until(settled, seconds)
        return self.tunnel.details()

    def wait_for_check(self) -> None:
        """Wait until the tunnel has checked the connection at the clock's present time."""
        wait_until(lambda: self.stepped_at == self.clock.at and self.policy.state == RUNNING)

    def wait_for_address(self) -> None:
        """Wait until the tunnel has the address; its time limit to connect begins then."""
        wait_until(lambda: self.tunnel._process and self.policy._has_host)

    def wait_for_start(self) -> None:
        """Wait for a probe of the process; its time limit for the address starts before it."""
        wait_until(lambda: self.tunnel._process and self.stepped_at == self.clock.at)


class StubInstall:
    """In place of a CloudflaredInstall: `get` returns the program or raises an exception."""

    def __init__(self, config: cab.Config, get: Callable[[], Path]) -> None:
        self.config, self._get = config, get

    def get(self, is_stopping: Callable[[], bool]) -> Path:
        return self._get()


@pytest.fixture
def run_tunnel(
    tmp_path: Path,
    fake: FakeCloudflared,
    clock: FakeClock,
    log: List[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[RunTunnel]:
    """Return make(*steps, protocols=, token=, install=, **settings) -> a started TunnelRun.

    By default its --cloudflared is the fake.
    """
    runs: List[TunnelRun] = []
    monkeypatch.setattr(cab, "CLOSE_SECONDS", 0.5)

    def make(
        *steps: Step,
        protocols: Sequence[str] = ("quic", "http2"),
        token: str = "",
        install: Any = None,
        **settings: Any,
    ) -> TunnelRun:
        if steps:
            fake.plan(*steps)
        (tmp_path / "data").mkdir(exist_ok=True)

        def find_install(config: cab.Config) -> cab.CloudflaredInstall:
            return cab.CloudflaredInstall(
                config, {"PATH": "/nowhere"}, clock, cab.TunnelObserver()
            )

        runs.append(
            TunnelRun(
                tmp_path / "data", install or find_install, clock, protocols, token, log,
                **{"cloudflared": str(fake.path), **settings},
            )
        )
        return runs[-1].start()

    yield make
    for run in runs:
        run.tunnel.close()
        assert run.tunnel.state == cab.TunnelState.STOPPED and not run.processes


def alive(fake: FakeCloudflared) -> List[int]:
    """Return the pids of the started fakes that still run."""
    return [start["pid"] for start in fake.starts() if is_running(start["pid"])]


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeCloudflared]:
    """Return a FakeCloudflared; kill what a failed test has left running."""
    cloudflared = FakeCloudflared(tmp_path / "cloudflared")
    yield cloudflared
    for pid in alive(cloudflared):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"split": True, "quicktunnel": False},
        {"box": False},
        {"reported_host": "api.trycloudflare.com"},
        {"reported_host": "evil.example"},
        {"reported_host": 7},
        {"reported_host": "foo-bar.trycloudflare.com.evil.example"},
    ],
    ids=[
        "plain", "in two pieces, in the log only", "at the metrics server only", "api", "evil",
        "number", "evil end",
    ],
)
def test_a_good_tunnel_announces_its_address_once(
    run_tunnel: RunTunnel, fake: FakeCloudflared, changes: Mapping[str, Any]
) -> None:
    run = run_tunnel(quick(**changes))
    details = run.wait_for(RUNNING)
    assert details == {
        "state": "running", "url": URL, "since": cab.iso_time(run.clock.at), "protocol": "quic",
        "starts": 1, "error": None, "retryInSeconds": None,
    }
    assert (run.announced, run.log, run.tunnel.hosts) == ([URL], [], {"foo-bar.trycloudflare.com"})
    assert run.saved == {"tunnel_protocol": "quic", "tunnel_url": URL}
    for _ in range(5):
        run.clock.advance(5)
        run.wait_for_check()
    assert (run.wait_for(RUNNING)["starts"], run.announced, run.log) == (1, [URL], [])
    run.tunnel.close()
    assert (
        run.tunnel.details()["state"], run.tunnel.details()["url"], run.tunnel.hosts, alive(fake),
    ) == ("stopped", None, frozenset(), [])


LAST_LINES = {
    name: (step["stdout"] or "".join(step["output"])).strip().splitlines()[-1:]
    for name, step in FAILURES.items()
}
LAST_LINES["flag"] = ["Incorrect Usage. flag provided but not defined: -bogus"]
LAST_LINES["token"] = ["Provided Tunnel token is not valid."]


@pytest.mark.parametrize("name", sorted(set(FAILURES) - {"flag", "token", "limited"}))
def test_a_failed_start_is_retried_after_a_pause_and_the_reason_is_reported(
    run_tunnel: RunTunnel, fake: FakeCloudflared, name: str
) -> None:
    run = run_tunnel(FAILURES[name], quick("new-one"))
    details = run.wait_for(BACKOFF)
    error = details.pop("error")
    assert details == {
        "state": "backoff", "url": None, "since": None, "protocol": "quic", "starts": 1,
        "retryInSeconds": 5,
    }
    assert "exit code %d" % FAILURES[name]["exit"] in error
    assert all(error.endswith(line) for line in LAST_LINES[name])
    assert len(run.log) == 1
    assert error.rstrip(".") in run.log[0]
    assert "5 s" in run.log[0]
    assert (run.announced, run.tunnel.hosts, alive(fake), run.processes) == (
        [], frozenset(), [], {},
    )
    run.clock.advance(4.9)
    assert run.wait_for(BACKOFF)["starts"] == 1
    run.clock.advance(0.2)
    assert (run.wait_for(RUNNING)["url"], run.announced, run.tunnel.starts) == (
        OTHER_URL, [OTHER_URL], 2,
    )


def test_the_tunnel_s_origin_is_the_address_on_which_the_bridge_listens(
    run_tunnel: RunTunnel, fake: FakeCloudflared
) -> None:
    run_tunnel(quick(), host="192.0.2.1").wait_for(RUNNING)
    assert fake.starts()[0]["argv"][-2:] == ["--url", "http://192.0.2.1:3456"]


def test_a_rate_limited_start_is_followed_by_a_long_pause(run_tunnel: RunTunnel) -> None:
    run = run_tunnel(FAILURES["limited"], quick())
    details = run.wait_for(BACKOFF)
    assert details["retryInSeconds"] == 300 and re.search("429|1015", details["error"])
    assert len(run.log) == 1
    assert "300 s" in run.log[0]
    run.clock.advance(301)
    assert run.wait_for(RUNNING)["url"] == URL


@pytest.mark.parametrize("name, token", [("flag", ""), ("token", TUNNEL_TOKEN)])
def test_a_failure_that_a_retry_cannot_fix_is_final(
    run_tunnel: RunTunnel, fake: FakeCloudflared, name: str, token: str
) -> None:
    run = run_tunnel(FAILURES[name], quick(), token=token)
    details = run.wait_for(FATAL)
    assert LAST_LINES[name][0] in details["error"]
    assert details["retryInSeconds"] is None
    assert details["url"] is None
    assert len(run.log) == 1
    assert details["error"].rstrip(".") in run.log[0]
    run.clock.advance(900_000)
    run.clock.advance(900_000)
    assert (run.wait_for(FATAL)["starts"], len(fake.starts()), run.announced) == (1, 1, [])


def test_a_start_without_an_address_is_stopped_after_30_seconds(
    run_tunnel: RunTunnel, fake: FakeCloudflared
) -> None:
    run = run_tunnel(HANGING, quick())
    run.wait_for_start()
    wait_until(fake.starts)
    run.clock.advance(29)
    assert run.wait_for(STARTING)["starts"] == 1 and len(alive(fake)) == 1
    run.clock.advance(1)
    details = run.wait_for(BACKOFF)
    assert "30 s" in details["error"]
    assert (details["retryInSeconds"], alive(fake)) == (5, [])
    assert len(run.log) == 1
    assert details["error"] in run.log[0]
    assert "5 s" in run.log[0]
    run.clock.advance(5)
    assert run.wait_for(RUNNING)["starts"] == 2


def test_without_a_connection_the_other_protocol_is_tried_then_a_pause_follows(
    run_tunnel: RunTunnel, fake: FakeCloudflared
) -> None:
    run = run_tunnel(quick("one-1", connects=False), quick("two-2", connects=False), quick())
    run.wait_for_address()
    assert (run.tunnel.state, run.announced, run.tunnel.hosts, run.tunnel.details()["url"]) == (
        STARTING, [], frozenset(), None,
    )
    run.clock.advance(30)
    wait_until(lambda: len(fake.starts()) == 2)
    # The policy has restarted the time limits, so this is the second process's address.
    run.wait_for_address()
    assert (
        run.tunnel.state, run.tunnel.details()["protocol"], run.announced, len(alive(fake)),
    ) == (STARTING, "http2", [], 1)
    run.clock.advance(90)
    details = run.wait_for(BACKOFF)
    for word in ("http2", "90 s", "7844"):
        assert word in details["error"]
    assert run.announced == []
    assert [start["argv"][start["argv"].index("--protocol") + 1] for start in fake.starts()] == [
        "quic", "http2",
    ]


def test_the_protocol_that_worked_is_saved(run_tunnel: RunTunnel, fake: FakeCloudflared) -> None:
    run = run_tunnel(quick(connects="http2"))
    run.wait_for_address()
    run.clock.advance(30)
    assert run.wait_for(RUNNING)["protocol"] == "http2"
    assert run.saved["tunnel_protocol"] == "http2"
    fake.set("die", "1")
    run.wait_for(BACKOFF)
    run.clock.advance(5)
    assert run.wait_for(RUNNING)["starts"] == 3 and "http2" in fake.starts()[-1]["argv"]


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_after_a_death_cloudflared_is_restarted_and_its_new_address_announced(
    run_tunnel: RunTunnel, fake: FakeCloudflared, how: str
) -> None:
    run = run_tunnel(quick(), quick("new-one"))
    run.wait_for(RUNNING)
    run.clock.advance(3_600)
    run.wait_for_check()
    if how == "exit":
        fake.set("die", "1")
    else:
        os.kill(fake.starts()[0]["pid"], signal.SIGKILL)
    details = run.wait_for(BACKOFF)
    assert details["error"].startswith(
        "cloudflared exited (exit code %d)" % (1 if how == "exit" else -9)
    )
    assert ("the end was near" in details["error"]) is (how == "exit")
    assert (details["url"], run.tunnel.hosts) == (None, frozenset())
    run.clock.advance(5)
    assert run.wait_for(RUNNING)["url"] == OTHER_URL and run.announced == [URL, OTHER_URL]
    assert run.tunnel.hosts == {"new-one.trycloudflare.com"}
    assert run.tunnel.details()["since"] == cab.iso_time(run.clock.at)


@pytest.mark.parametrize("how", ["503", "gone"])
def test_a_lost_connection_may_return_within_two_minutes(
    run_tunnel: RunTunnel, fake: FakeCloudflared, how: str
) -> None:
    run = run_tunnel(quick(), quick("new-one"))
    run.wait_for(RUNNING)
    fake.set("ready", how)
    run.clock.advance(5)
    wait_until(lambda: run.log)
    assert len(run.log) == 1 and "lost" in run.log[0]
    assert (run.tunnel.details()["url"], run.tunnel.starts) == (None, 1)
    run.clock.advance(60)
    fake.set("ready", "200")
    run.clock.advance(40)
    run.wait_for_check()
    assert run.wait_for(RUNNING)["starts"] == 1
    assert (len(run.log), run.announced) == (2, [URL])
    assert "connected" in run.log[1] and URL in run.log[1]
    fake.set("ready", how)
    run.clock.advance(5)
    wait_until(lambda: len(run.log) == 3)
    run.clock.advance(121)
    assert "120 s" in run.wait_for(BACKOFF)["error"]
    assert alive(fake) == []
    fake.set("ready", "200")
    run.clock.advance(5)
    assert run.wait_for(RUNNING)["url"] == OTHER_URL and run.announced == [URL, OTHER_URL]


def test_a_lost_connection_is_not_reported_with_an_earlier_failure(
    run_tunnel: RunTunnel, fake: FakeCloudflared
) -> None:
    run = run_tunnel(quick(connects="http2"))
    run.wait_for_address()
    run.clock.advance(30)
    run.wait_for(RUNNING)
    fake.set("ready", "503")
    run.clock.advance(5)
    wait_until(lambda: run.log)
    error = run.tunnel.details()["error"]
    assert error and "quic" not in error
    fake.set("ready", "200")
    run.clock.advance(5)
    assert run.wait_for(RUNNING)["error"] is None


def test_ten_megabytes_of_log_do_not_block_and_are_not_stored(
    run_tunnel: RunTunnel, fake: FakeCloudflared
) -> None:
    run = run_tunnel(quick(flood=10 << 20))
    run.wait_for(RUNNING)
    wait_until((fake.folder / "flooded").exists)
    (fake.folder / "flooded").unlink()
    fake.set("flood", str(10 << 20))
    wait_until((fake.folder / "flooded").exists)
    process = run.tunnel._process
    assert process
    assert len(process._log_tail) <= cab.LOG_LINES
    assert max(map(len, process._log_tail)) <= cab.LOG_LINE_BYTES
    run.clock.advance(5)
    assert (run.wait_for(RUNNING)["starts"], run.announced) == (1, [URL])


def test_an_incomplete_last_line_of_the_log_is_quoted(run_tunnel: RunTunnel) -> None:
    step = failing("a line")
    step["output"].append("half a line")
    error = run_tunnel(step).wait_for(BACKOFF)["error"]
    assert "exit code 1" in error and error.endswith(": half a line")


def test_a_quoted_log_line_contains_no_secret(run_tunnel: RunTunnel) -> None:
    secret = cab.new_token()
    run = run_tunnel(failing("it was " + secret + " and " + "x" * 9_000))
    error = run.wait_for(BACKOFF)["error"]
    assert secret not in error
    assert secret not in run.log[0]
    assert "it was cab-" in error
    assert len(error) < 400


@pytest.mark.parametrize(
    "spoil, state, words",
    [
        (lambda path: path.chmod(0o644), FATAL, "There is no program"),
        (lambda path: path.unlink(), FATAL, "There is no program"),
        (
            lambda path: path.write_text("#!/nowhere/python\n"),
            BACKOFF,
            "cloudflared cannot be run: ",
        ),
        (
            lambda path: path.write_bytes(b"\x7fELF not really"), BACKOFF,
            "cloudflared cannot be run: ",
        ),
        (
            lambda path: path.write_text("#!%s\n" % (path.parent / "plan.json")),
            FATAL,
            "cloudflared cannot be run: ",
        ),
    ],
    ids=["not executable", "not there", "no interpreter", "not for this machine", "not allowed"],
)
def test_a_program_that_cannot_be_run_is_reported(
    run_tunnel: RunTunnel,
    fake: FakeCloudflared,
    spoil: Callable[[Path], Any],
    state: str,
    words: str,
) -> None:
    spoil(fake.path)
    run = run_tunnel()
    details = run.wait_for(state)
    assert words in details["error"]
    assert str(fake.path) in details["error"]
    assert details["starts"] == 0


def test_a_program_deleted_before_a_later_start_is_searched_again(
    run_tunnel: RunTunnel, fake: FakeCloudflared, tmp_path: Path
) -> None:
    def in_path(config: cab.Config) -> cab.CloudflaredInstall:
        path = "%s:%s" % (tmp_path / "first", tmp_path / "second")
        return cab.CloudflaredInstall(config, {"PATH": path}, cab.Clock(), cab.TunnelObserver())

    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cloudflared").symlink_to(fake.path)
    run = run_tunnel(quick(), quick("new-one"), install=in_path, cloudflared="")
    run.wait_for(RUNNING)
    # An update of the system may do this.
    (tmp_path / "first" / "cloudflared").unlink()
    fake.set("die", "1")
    run.wait_for(BACKOFF)
    run.clock.advance(5)
    assert run.wait_for(RUNNING)["url"] == OTHER_URL


@pytest.mark.parametrize("leaves, is_ordered", [(0, True), (0.2, True), ("never", False)])
def test_close_gives_cloudflared_time_to_exit_then_kills_it(
    run_tunnel: RunTunnel,
    fake: FakeCloudflared,
    leaves: Any,
    is_ordered: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not is_ordered:
        stop = cab.Cloudflared.stop
        monkeypatch.setattr(
            cab.Cloudflared, "stop", lambda process, grace: stop(process, min(grace, 0.2))
        )
    run = run_tunnel(quick(leaves=leaves))
    run.wait_for(RUNNING)
    pid = fake.starts()[0]["pid"]
    assert run.processes == {pid: (cab.started_at(pid), cab.program_of(pid))}
    run.tunnel.request_stop()
    run.tunnel.close()
    run.tunnel.close()
    assert not is_running(pid) and fake.graceful_exits() == ([pid] if is_ordered else [])
    assert (run.processes, run.tunnel.state, run.tunnel.hosts, run.log) == (
        {}, "stopped", frozenset(), [],
    )


def test_close_kills_a_cloudflared_that_neither_answers_nor_exits(
    run_tunnel: RunTunnel, fake: FakeCloudflared, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_tunnel(quick(leaves="never"))
    run.wait_for(RUNNING)
    fake.set("ready", "drip")
    run.clock.advance(5)
    join = run.tunnel._thread.join
    monkeypatch.setattr(run.tunnel._thread, "join", lambda seconds: join(min(seconds, 0.2)))
    # The health check has started and would last minutes.
    wait_until((fake.folder / "dripping").exists)
    run.tunnel.close()
    assert (alive(fake), run.tunnel._thread.is_alive(), run.tunnel.state, run.processes) == (
        [], False, "stopped", {},
    )
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith("cloudflared-log")
    ]


def test_a_tunnel_in_backoff_or_never_started_closes_at_once(
    run_tunnel: RunTunnel, fake: FakeCloudflared
) -> None:
    run = run_tunnel(FAILURES["html"])
    run.wait_for(BACKOFF)
    run.tunnel.close()
    never = TunnelRun(
        fake.folder,
        lambda config: cab.CloudflaredInstall(config, {}, run.clock, cab.TunnelObserver()),
        run.clock, ["quic"], "", [],
    )
    never.tunnel.close()
    assert never.tunnel.state == run.tunnel.state == cab.TunnelState.STOPPED


def test_an_unexpected_exception_does_not_end_the_supervision(
    run_tunnel: RunTunnel, fake: FakeCloudflared
) -> None:
    calls: List[int] = []

    def install(config: cab.Config) -> Any:
        def get() -> Path:
            calls.append(1)
            if len(calls) == 1:
                raise ZeroDivisionError("cab-" + "0" * 64)
            return fake.path

        return StubInstall(config, get)

    run = run_tunnel(install=install)
    wait_until(lambda: run.log)
    assert "ZeroDivisionError" in run.log[0] and "0" * 64 not in run.log[0]
    details = run.wait_for(RUNNING)
    assert (details["url"], details["starts"], len(run.log)) == (URL, 1, 1)


# --- named tunnels ---

CONFIG = ingress(
    ("a.example.com", "http://localhost:80"), ("b.example.com", "http://localhost:3456")
)


@pytest.mark.parametrize(
    "public_url, config, url, complaint",
    [
        ("https://bridge.example.com/", CONFIG, "https://bridge.example.com", None),
        ("", CONFIG, "https://b.example.com", None),
        (
            "https://bridge.example.com", ingress(("bridge.example.com", "http://localhost:8080")),
            "https://bridge.example.com", "bridge.example.com -> http://localhost:8080",
        ),
        ("", ingress(), None, "(it has: * -> http_status:404)"),
        (
            "", ingress(("*.example.com", "http://localhost:3456")), None,
            "*.example.com -> http://localhost:3456; * -> http_status:404",
        ),
    ],
)
def test_a_named_tunnel_gets_its_address_from_the_setting_or_the_configuration(
    run_tunnel: RunTunnel,
    fake: FakeCloudflared,
    public_url: str,
    config: Any,
    url: Optional[str],
    complaint: Optional[str],
) -> None:
    run = run_tunnel(named(config), token=TUNNEL_TOKEN, protocols=["auto"], public_url=public_url)
    details = run.wait_for(RUNNING)
    assert (details["url"], details["protocol"], details["starts"]) == (url, "auto", 1)
    assert run.announced == ([url] if url else [])
    assert run.tunnel.hosts >= ({cab.host_of(url)} if url else set())
    wrong = [
        line
        for line in run.log
        if "no public hostname in its configuration has the service http://localhost:3456 (it has"
        in line
    ]
    assert [line for line in wrong if str(complaint) in line] == wrong
    assert len(wrong) == (1 if complaint else 0)
    if not url:
        assert "--public-url" in run.log[-1]
    start = fake.starts()[0]
    assert start["env"]["TUNNEL_TOKEN"] == TUNNEL_TOKEN
    assert start["argv"][-1] == "run"
    assert TUNNEL_TOKEN not in " ".join(start["argv"])


def test_the_tunnel_waits_for_a_configuration_after_the_connection(
    run_tunnel: RunTunnel, fake: FakeCloudflared
) -> None:
    run = run_tunnel(named(), token=TUNNEL_TOKEN, protocols=["auto"])
    run.wait_for(RUNNING)
    assert run.tunnel.details()["url"] is None
    # The clock stands still: without an address the tunnel reads the configuration in each round.
    fake.set("config.json", json.dumps(CONFIG))
    wait_until(lambda: run.announced == ["https://b.example.com"])
    assert not [line for line in run.log if "in its configuration" in line]


def test_a_named_tunnel_has_three_minutes_to_connect_then_a_pause_follows(
    run_tunnel: RunTunnel, fake: FakeCloudflared
) -> None:
    run = run_tunnel(named(connects=False), token=TUNNEL_TOKEN, protocols=["auto"])
    run.wait_for_address()
    run.clock.advance(179)
    assert run.wait_for(STARTING)["starts"] == 1
    run.clock.advance(1)
    error = run.wait_for(BACKOFF)["error"]
    assert "auto" in error and "180 s" in error
    assert alive(fake) == []


# --- the download of cloudflared ---


class FileServer(ThreadingHTTPServer):
    """A server of downloads on the loopback address.

    answer: answers each request; paths: of all requests, in order; sent: bytes of bodies.
    """

    def __init__(self, answer: Callable[["FileHandler"], None]) -> None:
        super().__init__(("127.0.0.1", 0), FileHandler)
        # server_close() waits for the threads.
        self.daemon_threads = False
        self.answer = answer
        self.paths: List[str] = []
        self.sent = 0
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), name="file server")
        self.thread.start()

    @property
    def url(self) -> str:
        return "http://127.0.0.1:%d/download" % self.server_port

    def close(self) -> None:
        self.stopping.set()
        if self.thread.is_alive():
            self.shutdown()
            self.thread.join()
            self.server_close()


class FileHandler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        with contextlib.suppress(ConnectionError):
            self.server.answer(self)
        self.close_connection = True

    def do_POST(self) -> None:
        self.do_GET()

    def begin(self, length: Optional[int] = None, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        if length is not None and not headers:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.server.sent += len(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def whole(data: bytes) -> Callable[[FileHandler], None]:
    """Answer with the complete file."""

    def answer(handler: FileHandler) -> None:
        handler.begin(len(data))
        handler.write(data)

    return answer


def truncated(data: bytes) -> Callable[[FileHandler], None]:
    """Close the connection before the last three bytes."""

    def answer(handler: FileHandler) -> None:
        handler.begin(len(data))
        handler.write(data[:-3])

    return answer


def endless(handler: FileHandler) -> None:
    handler.begin()
    # No reader should read that much.
    while not handler.server.stopping.is_set() and handler.server.sent < 30_000_000:
        handler.write(b"x" * 1_000)


def slow(data: bytes) -> Callable[[FileHandler], None]:
    """Send half of the file at once and the rest byte by byte."""

    def answer(handler: FileHandler) -> None:
        handler.begin(len(data))
        handler.write(data[: len(data) // 2])
        for byte in data[len(data) // 2 :]:
            if handler.server.stopping.wait(0.02):
                return
            handler.write(bytes([byte]))

    return answer


def status(number: int) -> Callable[[FileHandler], None]:
    return lambda handler: handler.begin(0, number)


def redirected(data: bytes) -> Callable[[FileHandler], None]:
    """Redirect to another path, as GitHub does."""

    def answer(handler: FileHandler) -> None:
        if handler.path.startswith("/elsewhere"):
            whole(data)(handler)
        else:
            handler.begin(None, 302, Location="/elsewhere?file=1", Content_Length="0")

    return answer


def raw(data: bytes) -> Callable[[FileHandler], None]:
    return lambda handler: handler.write(data)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Servers]:
    """Return make(answer) -> a FileServer."""
    servers: List[FileServer] = []
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)

    def make(answer: Callable[[FileHandler], None]) -> FileServer:
        servers.append(FileServer(answer))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def tgz(*members: Tuple[str, bytes, bytes]) -> bytes:
    """Return an archive of members (name, type, content); a link's content is its target."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(content) if kind == tarfile.REGTYPE else 0
            member.linkname = content.decode() if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class InstallCase(NamedTuple):
    """An install, its server, its folder, and the progress that it reported."""

    install: cab.CloudflaredInstall
    server: FileServer
    folder: Path
    progress: List[Tuple[str, bool]]


PROGRAM = b"#!/bin/sh\necho good\n" + b"# filled\n" * 300
SWAPPED = PROGRAM.replace(b"good", b"evil")
ARCHIVE = tgz(("cloudflared", tarfile.REGTYPE, PROGRAM))
Downloads = Callable[..., InstallCase]


@pytest.fixture
def download(tmp_path: Path, serve: Servers, monkeypatch: pytest.MonkeyPatch) -> Downloads:
    """Return make(answer, pinned, program=, path=, clock=, **settings) -> an InstallCase.

    pinned: the expected file; program: the program in it, if it is an archive.
    """

    def make(
        answer: Callable[[FileHandler], None],
        pinned: bytes = PROGRAM,
        program: bytes = b"",
        path: str = "/nowhere",
        clock: Optional[cab.Clock] = None,
        **settings: Any,
    ) -> InstallCase:
        asset = cab.Asset(
            "cloudflared-test" + (".tgz" if program else ""), len(pinned), sha256(pinned),
            sha256(program) if program else "",
        )
        monkeypatch.setattr(cab, "cloudflared_asset", lambda system, machine: asset)
        server = serve(answer)
        observer = Observer()
        config = cab.Config(
            **{"data_dir": tmp_path / "data", "cloudflared_url": server.url + "/", **settings}
        )
        install = cab.CloudflaredInstall(config, {"PATH": path}, clock or cab.Clock(), observer)
        return InstallCase(install, server, tmp_path / "data" / "bin", observer.progress)

    return make


def never() -> bool:
    return False


def files(folder: Path) -> List[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    "answer, pinned, program",
    [
        (whole(PROGRAM), PROGRAM, b""),
        (redirected(PROGRAM), PROGRAM, b""),
        (slow(PROGRAM[:10]), PROGRAM[:10], b""),
        (whole(ARCHIVE), ARCHIVE, PROGRAM),
    ],
    ids=["plain", "redirected", "slow", "archive"],
)
def test_the_right_file_is_installed_and_no_other_file_remains(
    download: Downloads, answer: Any, pinned: bytes, program: bytes
) -> None:
    case = download(answer, pinned, program)
    path = case.install.get(never)
    assert (path, path.read_bytes(), mode(path)) == (
        case.folder / "cloudflared", program or pinned, 0o755,
    )
    assert files(case.folder) == ["cloudflared"] and mode(case.folder) == 0o700
    assert case.server.paths[0] == "/download/%s/cloudflared-test%s" % (
        cab.CLOUDFLARED_VERSION, ".tgz" if program else "",
    )
    assert case.install.get(never) == path
    assert len(case.server.paths) == (2 if "elsewhere" in case.server.paths[-1] else 1)


def corrupt(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "answer, words",
    [
        pytest.param(
            whole(PROGRAM[:-1]),
            "ended early, after %d of %d bytes" % (len(PROGRAM) - 1, len(PROGRAM)), id="short",
        ),
        pytest.param(truncated(PROGRAM), "ended early", id="broken off"),
        pytest.param(whole(b""), "ended early, after 0", id="empty"),
        pytest.param(endless, "larger than the %d bytes" % len(PROGRAM), id="endless"),
        pytest.param(whole(PROGRAM + b"x"), "larger than", id="too long"),
        pytest.param(status(404), "404", id="not there"),
        pytest.param(status(500), "500", id="error"),
        pytest.param(
            lambda handler: handler.begin(None, 302, Location="/again"), "302",
            id="redirected for ever",
        ),
        pytest.param(raw(b""), "", id="no answer"),
        pytest.param(raw(b"nonsense\r\n\r\n"), "", id="no HTTP"),
        pytest.param(
            raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n400\r\nabc"), "",
            id="half a chunk",
        ),
    ],
)
def test_a_failed_download_leaves_no_files_and_can_be_retried(
    download: Downloads, answer: Any, words: str
) -> None:
    case = download(answer)
    with pytest.raises((OSError, http.client.HTTPException)) as caught:
        case.install.get(never)
    if isinstance(caught.value, urllib.error.HTTPError):
        caught.value.close()
    assert words in str(caught.value) and files(case.folder) == []
    # An endless download fills the buffers of the system before the bridge ends it.
    assert case.server.sent < 20_000_000
    case.server.answer = whole(PROGRAM)
    assert case.install.get(never).read_bytes() == PROGRAM and files(case.folder) == ["cloudflared"]


def test_an_unreachable_server_is_a_temporary_error(download: Downloads) -> None:
    case = download(whole(PROGRAM))
    case.server.close()
    with pytest.raises(OSError):
        case.install.get(never)
    assert files(case.folder) == []


def test_a_machine_without_certificates_is_told_what_to_install(
    download: Downloads, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = urllib.error.URLError("[SSL: CERTIFICATE_VERIFY_FAILED] unable to get local issuer")
    case = download(whole(PROGRAM))

    def refuse(*args: Any, **options: Any) -> Any:
        raise refused

    with monkeypatch.context() as patch:
        patch.setattr("urllib.request.urlopen", refuse)
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED.*ca-certificates.*macOS"):
            case.install.get(never)
        refused = urllib.error.URLError("Name or service not known")
        with pytest.raises(OSError, match="Name or service"):
            case.install.get(never)
    assert files(case.folder) == []


def test_a_download_ends_with_the_bridge(download: Downloads) -> None:
    case = download(slow(PROGRAM))
    with pytest.raises(OSError, match="stopped"):
        case.install.get(lambda: case.server.sent > len(PROGRAM) // 2 + 3)
    assert files(case.folder) == [] and case.server.sent < len(PROGRAM) // 2 + 50


def test_a_download_that_takes_too_long_is_stopped(download: Downloads, clock: FakeClock) -> None:
    def stop() -> bool:
        clock.advance(100)
        return False

    case = download(slow(PROGRAM), clock=clock)
    with pytest.raises(OSError, match="stopped"):
        case.install.get(stop)
    assert files(case.folder) == []
    assert cab.DOWNLOAD_SECONDS <= clock.at - FakeClock().at <= cab.DOWNLOAD_SECONDS + 200


@pytest.mark.parametrize(
    "answer, pinned, program",
    [
        (whole(SWAPPED), PROGRAM, b""),
        (whole(corrupt(PROGRAM)), PROGRAM, b""),
        (whole(corrupt(ARCHIVE)), ARCHIVE, PROGRAM),
        (
            whole(tgz(("cloudflared", tarfile.REGTYPE, SWAPPED))),
            tgz(("cloudflared", tarfile.REGTYPE, SWAPPED)), PROGRAM,
        ),
    ],
    ids=["swapped", "one bit", "archive", "program in it"],
)
def test_a_file_with_a_wrong_sum_is_deleted_and_the_hint_names_the_flag(
    download: Downloads, answer: Any, pinned: bytes, program: bytes
) -> None:
    case = download(answer, pinned, program)
    with pytest.raises(cab.CannotTunnel) as caught:
        case.install.get(never)
    assert "--cloudflared PATH" in caught.value.hint
    assert files(case.folder) == [] and case.install.downloaded() is None


FILE, LINK, HARD = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
DEVICE, PIPE, FOLDER = tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE


@pytest.mark.parametrize(
    "members, is_taken",
    [
        ([("cloudflared", FILE, PROGRAM)], True),
        (
            [
                ("README", FILE, b"x"),
                ("cloudflared", FILE, PROGRAM),
                ("../evil", FILE, b"x"),
                ("/tmp/evil", FILE, b"x"),
            ],
            True,
        ),
        ([("cloudflared", LINK, b"/bin/sh"), ("cloudflared", FILE, PROGRAM)], True),
        ([], False),
        ([("README", FILE, b"x")], False),
        ([("cloudflared", LINK, b"/bin/sh")], False),
        ([("cloudflared", HARD, b"/bin/sh")], False),
        ([("../cloudflared", FILE, PROGRAM)], False),
        ([("/cloudflared", FILE, PROGRAM)], False),
        ([("bin/cloudflared", FILE, PROGRAM)], False),
        ([("cloudflared", DEVICE, b"")], False),
        ([("cloudflared", PIPE, b"")], False),
        ([("cloudflared", FOLDER, b"")], False),
        ([("cloudflared", FILE, b"0" * 20_000)], False),
    ],
)
def test_only_the_regular_member_of_that_name_is_unpacked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_taken: bool,
    members: List[Tuple[str, bytes, bytes]],
) -> None:
    monkeypatch.setattr(cab, "UNPACKED_BYTES", 10_000)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    archive, target = tmp_path / "in" / "a.tgz", tmp_path / "in" / "deep" / "program"
    archive.write_bytes(tgz(*members))
    if is_taken:
        cab.unpack_program(archive, target)
        assert target.read_bytes() == PROGRAM
        assert files(tmp_path) == ["in", "in/a.tgz", "in/deep", "in/deep/program"]
    else:
        with pytest.raises(cab.CannotTunnel):
            cab.unpack_program(archive, target)
        assert files(tmp_path) == ["in", "in/a.tgz", "in/deep"]


# Compression does not make it smaller.
INCOMPRESSIBLE = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(4_000))
PACKED = tgz(("cloudflared", FILE, INCOMPRESSIBLE))


@pytest.mark.parametrize(
    "data", [b"", b"no archive", PACKED[:200], PACKED[:-2_000], b"\x1f\x8b" + b"\xff" * 50]
)
def test_an_archive_that_cannot_be_read_is_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tgz").write_bytes(data)
    with pytest.raises(cab.CannotTunnel):
        cab.unpack_program(tmp_path / "a.tgz", tmp_path / "program")


def test_a_changed_or_deleted_file_is_downloaded_again(
    download: Downloads,
) -> None:
    case = download(whole(PROGRAM))
    path = case.install.get(never)
    faults: List[Callable[[], Any]] = [
        lambda: path.write_bytes(SWAPPED), lambda: path.write_bytes(PROGRAM[:-1]), path.unlink,
    ]
    for number, spoil in enumerate(faults, 2):
        spoil()
        assert case.install.downloaded() is None
        assert case.install.get(never).read_bytes() == PROGRAM and len(case.server.paths) == number
    (case.folder / "tmpabc.part").mkdir()
    (case.folder / "tmpabc.part" / "download").write_bytes(PROGRAM[:99])
    path.unlink()
    case.install.get(never)
    # The files of a killed bridge are deleted, too.
    assert files(case.folder) == ["cloudflared"]


def test_the_owner_s_program_is_used_unchanged(download: Downloads, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "cloudflared").write_bytes(SWAPPED)
    (folder / "cloudflared").chmod(0o755)
    # Where Homebrew and its like install, although the PATH of a service lacks that folder.
    usual = tmp_path / ".local" / "bin"
    usual.mkdir(parents=True)
    shutil.copy(folder / "cloudflared", usual)
    case = download(whole(PROGRAM))
    case.install._environ = {"PATH": "/nowhere", "HOME": str(tmp_path)}
    assert case.install.get(never) == usual / "cloudflared" and case.server.paths == []
    for case in (
        download(whole(PROGRAM), path=str(folder)),
        download(whole(PROGRAM), cloudflared=str(folder / "cloudflared")),
    ):
        assert case.install.get(never) == folder / "cloudflared"
        assert case.server.paths == []
        assert not case.folder.exists()


def test_a_missing_program_of_the_owner_is_not_replaced(
    download: Downloads, tmp_path: Path
) -> None:
    case = download(whole(PROGRAM), cloudflared=str(tmp_path / "missing"))
    with pytest.raises(cab.CannotTunnel) as caught:
        case.install.get(never)
    assert str(tmp_path / "missing") in str(caught.value)
    assert "--cloudflared" in caught.value.hint
    assert case.server.paths == []


def test_on_a_system_without_an_asset_the_hint_names_the_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab.platform, "machine", lambda: "riscv64")
    install = cab.CloudflaredInstall(
        cab.Config(data_dir=tmp_path), {"PATH": "/nowhere"}, cab.Clock(), cab.TunnelObserver()
    )
    with pytest.raises(cab.CannotTunnel) as caught:
        install.get(never)
    assert "riscv64" in str(caught.value)
    assert "--cloudflared PATH" in caught.value.hint
    assert "--no-tunnel" in caught.value.hint


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_an_error(download: Downloads, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o500)
    with pytest.raises(cab.CannotTunnel, match="cannot be used"):
        download(whole(PROGRAM)).install.get(never)


def test_progress_is_reported_once_per_percent(download: Downloads) -> None:
    def answer(handler: FileHandler) -> None:
        """Send the second half byte by byte, each after the progress of the previous one."""
        handler.begin(100)
        handler.write(PROGRAM[:50])
        for number in range(50, 100):
            while case.progress[-1] != ("Downloading cloudflared: %d %%" % number, True):
                if handler.server.stopping.wait(0.001):
                    return
            handler.write(PROGRAM[number : number + 1])

    case = download(answer, PROGRAM[:100])
    case.install.get(never)
    transient = [text for text, is_transient in case.progress if is_transient]
    assert transient == ["Downloading cloudflared: %d %%" % number for number in range(50, 101)]
    permanent = [text for text, is_transient in case.progress if not is_transient]
    assert len(permanent) == 2
    assert cab.CLOUDFLARED_VERSION in permanent[0]
    assert str(case.folder) in permanent[1]


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_one_line_on_a_terminal_and_eleven_elsewhere(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    screen = (Terminal if is_terminal else io.TextIOWrapper)(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stderr", screen)
    console = cab.Console()
    console.on_progress("Downloading cloudflared 2026.8.2 (37 MB)...", False)
    for number in range(101):
        console.on_progress("Downloading cloudflared: %d %%" % number, True)
    console.on_progress("cloudflared is installed in /data/bin", False)
    screen.flush()
    shown = screen.buffer.getvalue().decode()  # type: ignore[attr-defined]
    lines = shown.split("\n")
    assert lines[-1] == ""
    assert "Downloading cloudflared 2026.8.2" in lines[0]
    assert "is installed in /data/bin" in lines[-2]
    if is_terminal:
        assert len(lines) == 4 and lines[1].count("\r") == 101 and "installed" not in lines[1]
        assert "\r  📥  Downloading cloudflared: 37 %\r" in lines[1]
    else:
        assert lines[1:-2] == [
            "Downloading cloudflared: %d %%" % number for number in range(0, 101, 10)
        ]
        assert "\r" not in shown


def test_a_log_line_after_unfinished_progress_starts_a_new_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = Terminal(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stderr", screen)
    console = cab.Console()
    console.on_progress("Downloading cloudflared: 37 %", True)
    record = logging.LogRecord(
        "test", logging.WARNING, "", 0, "The tunnel failed: no more data.", (), None
    )
    cab.ConsoleLogHandler(console).emit(record)
    screen.flush()
    shown = screen.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert not re.search("37 %[^\n\r]*The tunnel failed", shown)


def pinned_fake(fake: FakeCloudflared) -> bytes:
    """Return the fake as a file to download; it runs from any folder."""
    return fake.path.read_bytes() + b"# 0\n"


def test_a_wrong_download_is_final_and_never_run(
    run_tunnel: RunTunnel, download: Downloads, fake: FakeCloudflared
) -> None:
    data = pinned_fake(fake)
    case = download(whole(data[:-2] + b"1\n"), data)
    run = run_tunnel(install=lambda config: case.install)
    details = run.wait_for(FATAL)
    assert "SHA-256" in details["error"]
    assert "--cloudflared PATH" in details["error"]
    assert details["starts"] == 0
    assert len(run.log) == 1
    assert details["error"].rstrip(".") in run.log[0]
    run.clock.advance(100_000)
    assert (
        run.wait_for(FATAL)["state"], len(case.server.paths), fake.runs(), files(case.folder),
    ) == (FATAL, 1, [], [])


@pytest.mark.parametrize(
    "answer, reason",
    [(status(503), "HTTP Error 503: Service Unavailable"), (raw(b"nonsense\r\n\r\n"), "nonsense")],
)
def test_a_failed_download_is_retried_after_a_pause(
    run_tunnel: RunTunnel, download: Downloads, fake: FakeCloudflared, answer: Any, reason: str
) -> None:
    case = download(answer, pinned_fake(fake))
    run = run_tunnel(install=lambda config: case.install)
    details = run.wait_for(BACKOFF)
    assert case.server.url in details["error"]
    assert reason in details["error"]
    assert (details["retryInSeconds"], details["starts"]) == (5, 0)
    case.server.answer = whole(pinned_fake(fake))
    run.clock.advance(5)
    assert run.wait_for(RUNNING)["url"] == URL
    assert [start["argv"][0] for start in fake.starts()] == ["tunnel"]


@pytest.mark.parametrize("url", ["http://[", "http://127.0.0.1:port", "http://127.0.0.1:1"])
def test_a_download_from_a_wrong_address_is_reported_and_retried(
    run_tunnel: RunTunnel, download: Downloads, url: str
) -> None:
    case = download(whole(PROGRAM), cloudflared_url=url)
    run = run_tunnel(install=lambda config: case.install)
    first = run.wait_for(BACKOFF)
    assert url in first["error"]
    assert files(case.folder) == []
    run.clock.advance(5)
    wait_until(lambda: len(run.log) == 2)
    second = run.wait_for(BACKOFF)
    assert (second["error"], first["retryInSeconds"], second["retryInSeconds"]) == (
        first["error"], 5, 15,
    )


def test_a_program_that_cannot_be_stored_is_a_temporary_error(
    run_tunnel: RunTunnel,
) -> None:
    def get() -> Path:
        raise PermissionError(13, "Permission denied")

    run = run_tunnel(
        install=lambda config: StubInstall(config, get), cloudflared_url="http://127.0.0.1:1"
    )
    error = run.wait_for(BACKOFF)["error"]
    assert "http://127.0.0.1:1" in error
    assert error.endswith(": [Errno 13] Permission denied")


def test_a_long_download_does_not_count_as_a_failed_start(
    run_tunnel: RunTunnel, fake: FakeCloudflared, clock: FakeClock
) -> None:
    def get() -> Path:
        clock.advance(31)
        return fake.path

    run = run_tunnel(quick(connects="quic"), install=lambda config: StubInstall(config, get))
    details = run.wait_for(RUNNING)
    assert (details["starts"], details["protocol"], run.log, run.announced) == (
        1, "quic", [], [URL],
    )


def test_closing_a_tunnel_ends_its_download(
    run_tunnel: RunTunnel, download: Downloads, fake: FakeCloudflared
) -> None:
    case = download(slow(pinned_fake(fake)), pinned_fake(fake))
    run = run_tunnel(install=lambda config: case.install)
    wait_until(lambda: files(case.folder) and case.server.sent > 50)
    run.tunnel.close()
    assert run.tunnel.state == cab.TunnelState.STOPPED
    assert files(case.folder) == []
    assert fake.runs() == []


# --- a whole bridge ---


@pytest.fixture
def bridge_with_tunnel(bridge: Bridges, fake: FakeCloudflared) -> Bridges:
    """Return start(*steps, **settings) -> a bridge whose cloudflared is the fake."""

    def start(*steps: Step, **settings: Any) -> RunningBridge:
        if steps:
            fake.plan(*steps)
        running = bridge(
            **{"no_tunnel": False, "cloudflared": str(fake.path), "spare": 0, **settings}
        )
        assert running.bridge.tunnel
        running.bridge.tunnel._stopping = ShortWait()
        return running

    return start


def tunnel_of(api: Api) -> Dict[str, Any]:
    """Return the tunnel's status as an admin reads it."""
    return dict(api.get("/api/status").json["tunnel"])


def wait_for_status(api: Api, **expected: Any) -> Dict[str, Any]:
    """Wait until the tunnel's status has these values; return the whole status."""

    def status_if_expected() -> Optional[Dict[str, Any]]:
        tunnel = tunnel_of(api)
        if all(tunnel[name] == value for name, value in expected.items()):
            return tunnel
        return None

    return dict(wait_until(status_if_expected))


@pytest.mark.parametrize(
    "step, state", [(FAILURES["refused"], BACKOFF), (FAILURES["flag"], FATAL), (HANGING, STARTING)]
)
def test_the_bridge_serves_locally_without_a_working_tunnel(
    bridge_with_tunnel: Bridges, step: Step, state: str
) -> None:
    running = bridge_with_tunnel(step)
    tunnel = wait_for_status(running.admin, state=state, starts=1)
    assert running.admin.answer("hello")["response"] == "Echo: hello"
    assert tunnel["url"] is None
    assert tunnel["retryInSeconds"] in (4, 5, 6, None)
    assert bool(tunnel["error"]) is (state != STARTING)
    assert "tunnel" not in Api(running.port).get("/api/status").json
    if tunnel["error"]:
        reason = tunnel["error"].rstrip(".")
        assert len([line for line in running.log if reason in line]) == 1
    else:
        assert not [line for line in running.log if "failed" in line]
    assert running.admin.get("/health").status == 200


@only_linux
def test_the_protocol_that_worked_is_tried_first_after_a_restart(
    tmp_path: Path,
    fake: FakeCloudflared,
    monkeypatch: pytest.MonkeyPatch,
    fake_claude: Callable[..., FakeClaude],
) -> None:
    config = cab.Config(
        port=0, data_dir=tmp_path / "data", cloudflared=str(fake.path),
        claude=str(fake_claude().path), spare=0,
    )
    claude = cab.find_claude(config, {"PATH": os.environ["PATH"], "HOME": str(tmp_path)})
    fake.plan(quick(connects="http2"))
    for number, protocols in ((0, ["quic", "http2"]), (1, ["quic", "http2", "http2"])):
        monkeypatch.setattr(cab, "CONNECT_SECONDS", 30 if number else 0.3)
        observer = Observer()
        with cab.Bridge(config, claude, cab.Clock(), "", observer) as bridge:
            bridge.serve()
            # The second start announces the same address as unchanged.
            wait_until(lambda: observer.urls == [(URL, None)])
        assert [
            start["argv"][start["argv"].index("--protocol") + 1] for start in fake.starts()
        ] == protocols
        assert alive(fake) == []


@pytest.mark.parametrize("chosen", ["quic", "http2"])
def test_a_configured_protocol_is_the_only_one_tried(
    bridge_with_tunnel: Bridges, fake: FakeCloudflared, monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    monkeypatch.setattr(cab, "LAST_CONNECT_SECONDS", 0.1)
    running = bridge_with_tunnel(quick(connects=False), tunnel_protocol=chosen)
    assert wait_for_status(running.admin, state=BACKOFF)["protocol"] == chosen
    assert [chosen in start["argv"] for start in fake.starts()] == [True]


# --- host names and client addresses ---

MACHINE = socket.gethostname()
ALLOWED = [
    "localhost", "localhost:3456", "LocalHost:1", "localhost.", "127.0.0.1", "127.0.0.1:3456",
    "[::1]", "[::1]:3456", "192.168.1.5:80", "10.0.0.1", MACHINE, MACHINE.upper() + ":3456",
    MACHINE.partition(".")[0] + ".local", "own.example.com", "OWN.example.com.:8443",
    "second.example.com", "THIRD.example.com.:80", "fourth", "",
]
REFUSED = [
    "evil.example",
    "evil.localhost.example",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "192.168.1.5.nip.io",
    "evil.example:3456",
    "foo-bar.trycloudflare.com.evil.example",
    "xfoo-bar.trycloudflare.com",
    "other.trycloudflare.com",
    "trycloudflare.com",
    "own.example.com@evil",
    "localhost@evil.example",
    "evil.example#localhost",
    "[evil.example]",
    "[::1].evil.example",
    "own.example.co",
    "a.own.example.com",
    "a.second.example.com",
    "localhost:evil",
]


def is_served(api: Api, host: str) -> bool:
    """Return whether the bridge answers under this host name; all paths must agree."""
    answers = [
        api.call(method, path, headers={"Host": host})
        for method, path in (
            ("GET", "/health"),
            ("OPTIONS", "/api/ask"),
            ("GET", "/dashboard"),
            ("GET", "/"),
            ("POST", "/api/ask"),
            ("GET", "/nowhere"),
        )
    ]
    statuses = [answer.status for answer in answers]
    if 421 in statuses:
        assert statuses == [421] * 6
        assert {answer.json["code"] for answer in answers} == {"unknown_host"}
        name = re.sub(r":\d*$", "", host).rstrip(".").lower()
        assert all("--names %s" % name in answer.json["error"] for answer in answers)
        assert "cab-" not in str([answer.data for answer in answers])
        return False
    assert statuses == [200, 204, 200, 200, 401, 404]
    return True


def test_the_bridge_answers_only_under_its_own_names(bridge_with_tunnel: Bridges) -> None:
    running = bridge_with_tunnel(
        public_url="https://own.example.com:8443/",
        names="second.example.com,Third.example.com, fourth,",
    )
    wait_for_status(running.admin, state=RUNNING)
    api = Api(running.port)
    assert [
        host
        for host in ALLOWED + ["foo-bar.trycloudflare.com", "FOO-BAR.trycloudflare.com.:443"]
        if not is_served(api, host)
    ] == []
    assert [host for host in REFUSED if is_served(api, host)] == []
    assert "x" * 100 in api.get("/health", headers={"Host": "x" * 5_000}).json["error"]
    assert len(api.get("/health", headers={"Host": "x" * 5_000}).data) < 500


def test_without_a_tunnel_a_tunnel_s_name_is_refused(bridge: Bridges) -> None:
    api = bridge(spare=0).admin
    assert is_served(api.with_token(None), "localhost")
    assert not is_served(api.with_token(None), "foo-bar.trycloudflare.com")


def test_the_tunnel_s_name_is_allowed_only_while_it_runs(
    bridge_with_tunnel: Bridges, fake: FakeCloudflared, clock: FakeClock
) -> None:
    running = bridge_with_tunnel(quick(), quick("new-one"), clock=clock)
    wait_for_status(running.admin, state=RUNNING)
    api = Api(running.port)
    assert is_served(api, "foo-bar.trycloudflare.com")
    assert not is_served(api, "new-one.trycloudflare.com")
    fake.set("die", "1")
    wait_for_status(running.admin, state=BACKOFF)
    assert not is_served(api, "foo-bar.trycloudflare.com")
    clock.advance(10)
    wait_for_status(running.admin, state=RUNNING, url=OTHER_URL)
    assert is_served(api, "new-one.trycloudflare.com")
    assert not is_served(api, "foo-bar.trycloudflare.com")


def request_status(api: Api, host: str, *clients: str, peer: str = "127.0.0.1") -> int:
    """Send a request and return its status. clients: values of CF-Connecting-IP."""
    with socket.create_connection(("127.0.0.1", api.port), 10, (peer, 0)) as connection:
        lines = [
            "GET /health HTTP/1.1", "Host: " + host,
            *("CF-Connecting-IP: " + client for client in clients), "Connection: close", "", "",
        ]
        connection.sendall("\r\n".join(lines).encode())
        return int(connection.makefile("rb").readline().split()[1])


TUNNEL_HOST = "foo-bar.trycloudflare.com"


@only_linux
def test_every_client_of_the_tunnel_has_its_own_rate_limit(
    bridge_with_tunnel: Bridges, clock: FakeClock
) -> None:
    running = bridge_with_tunnel(clock=clock, rate_limit=2)
    wait_until(lambda: running.bridge.tunnel and running.bridge.tunnel.hosts)
    api = Api(running.port)
    for address in ("203.0.113.1", "203.0.113.2", "2001:db8::1"):
        assert [request_status(api, TUNNEL_HOST, address) for _ in range(3)] == [200, 200, 429]
    # All of these count as 127.0.0.1: no address, two addresses, another host, no such header.
    assert [
        request_status(api, TUNNEL_HOST, "unknown"),
        request_status(api, TUNNEL_HOST, "203.0.113.7", "203.0.113.8"),
    ] == [200, 200]
    assert [
        request_status(api, TUNNEL_HOST, "'; --"), request_status(api, "localhost", "203.0.113.9"),
        request_status(api, "127.0.0.1:80", "203.0.113.9"), request_status(api, TUNNEL_HOST),
    ] == [429] * 4
    # The header of a peer with another address is ignored.
    assert [
        request_status(api, TUNNEL_HOST, "203.0.113.%d" % number, peer="127.0.0.2")
        for number in (11, 12, 13)
    ] == [200, 200, 429]


def test_without_a_tunnel_the_client_header_is_ignored(bridge: Bridges, clock: FakeClock) -> None:
    running = bridge(clock=clock, rate_limit=2, spare=0, public_url=URL)
    assert [
        request_status(Api(running.port), TUNNEL_HOST, "203.0.113.%d" % number)
        for number in (1, 2, 3)
    ] == [200, 200, 429]


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_the_client_header_of_every_loopback_address_is_used(peer: str) -> None:
    policy = cab.HostPolicy(tunnel_hosts=lambda: frozenset([TUNNEL_HOST]))
    request = cab.Request(
        "GET", "/", {}, {"host": TUNNEL_HOST.upper() + ".:443", "cf-connecting-ip": "203.0.113.1"},
        peer, lambda: b"",
    )
    assert policy.client_address(request) == "203.0.113.1"


# --- as a program ---

PATCHED = (
    SHORT
    + """
cab.TUNNEL_BACK_OFF_SECONDS, cab.READY_SECONDS, cab.CLOSE_SECONDS = (0.1,) * 5, 0.1, 0.8
class ShortWait(cab.threading.Event):
    def wait(self, timeout=None):
        return super().wait(min(timeout or 0.0, 0.02))
original_init = cab.Tunnel.__init__
def init(tunnel, *args):
    original_init(tunnel, *args)
    tunnel._stopping = ShortWait()
cab.Tunnel.__init__ = init
%s
"""
)


SHORT_GRACE = """
stop = cab.Cloudflared.stop
cab.Cloudflared.stop = lambda process, grace: stop(process, min(grace, 0.2))
"""


class TunnelProgram(Program):
    """The bridge as a person starts it; later output is read without blocking."""

    def __init__(self, command: List[str], environ: Mapping[str, str], folder: Path) -> None:
        super().__init__(command, environ, folder)
        assert self.process.stdout
        os.set_blocking(self.process.stdout.fileno(), False)
        self._printed = ""

    def public(self) -> List[str]:
        """Return all complete lines after the local address."""
        pipe = self.process.stdout
        if pipe and not pipe.closed:
            self._printed += (pipe.read() or b"").decode()
        return self._printed.split("\n")[:-1]

    def wait_for_status(self, token: str, **expected: Any) -> Dict[str, Any]:
        return wait_for_status(Api(self.port, token), **expected)


@pytest.fixture
def start(
    tmp_path: Path, fake: FakeCloudflared, fake_claude: Callable[..., FakeClaude]
) -> Iterator[Programs]:
    """Return make(*flags, patch=, environ=) -> a TunnelProgram; its --cloudflared is the fake.

    patch: code that runs before the program; None: run the program without any patches.
    """
    started: List[TunnelProgram] = []
    claude = fake_claude()

    def make(
        *flags: str, patch: Optional[str] = "", environ: Optional[Mapping[str, str]] = None
    ) -> TunnelProgram:
        command = IMPORTED if patch is None else imported(PATCHED % patch)
        environment = {
            "PATH": "/nowhere", "HOME": str(tmp_path), "LANG": "C.UTF-8", **(environ or {}),
        }
        started.append(
            TunnelProgram(
                [
                    *command, "start", "--port", "0", "--data-dir", str(tmp_path / "data"),
                    "--claude", str(claude.path), "--spare", "0", "--cloudflared", str(fake.path),
                    *flags,
                ],
                environment,
                tmp_path,
            )
        )
        return started[-1]

    yield make
    for running in started:
        if running.process.poll() is None:
            running.end(signal.SIGKILL)
        elif running.process.stdout:
            running.process.stdout.close()
    wait_until(lambda: not alive(fake))


def test_one_start_gives_a_public_address_with_an_exact_command_and_a_clean_environment(
    start: Programs, fake: FakeCloudflared, tmp_path: Path
) -> None:
    secrets = {
        "TUNNEL_NAME": "x", "TUNNEL_LOGLEVEL": "error", "NO_AUTOUPDATE": "1", "GITHUB_TOKEN": "x",
        "AWS_SECRET_ACCESS_KEY": "x", "ANTHROPIC_API_KEY": "x", "CAB_RATE_LIMIT": "7",
        "NOTIFY_SOCKET": "/x", "DB_PASSWORD": "x",
    }
    running = start(patch=None, environ={**secrets, "EDITOR": "vi"})
    wait_until(lambda: running.public() == [URL])
    tunnel = running.wait_for_status(running.token, state=RUNNING)
    assert (tunnel["url"], tunnel["starts"], tunnel["protocol"], tunnel["error"]) == (
        URL, 1, "quic", None,
    )
    assert tunnel["since"].endswith("Z")
    assert len(running.lines) == 2 and running.lines[-1] == "http://localhost:%d" % running.port
    assert running.stderr.count("Public URL: %s\n" % URL) == 1
    assert "Dashboard: %s/dashboard" % URL in running.stderr
    assert fake.starts()[0]["argv"] == [
        "tunnel", "--config", str(tmp_path / "data" / "cloudflared.yml"), "--no-autoupdate",
        "--metrics", "127.0.0.1:0", "--grace-period", "5s", "--protocol", "quic", "--url",
        "http://127.0.0.1:%d" % running.port,
    ]
    assert (tmp_path / "data" / "cloudflared.yml").read_text() == "{}\n"
    assert mode(tmp_path / "data" / "cloudflared.yml") == 0o600
    environment = fake.starts()[0]["env"]
    assert {name for name in environment if not name.startswith("__")} == {
        "PATH", "HOME", "LANG", cab.OWNER_ENV_VAR,
    }
    assert running.end(signal.SIGTERM) == 0
    assert "Traceback" not in running.stderr
    assert alive(fake) == []


def public_url_lines(program: TunnelProgram) -> List[str]:
    """Return the lines of stderr that announce a public URL."""
    return re.findall("Public URL: .*", program.stderr)


def test_a_changed_address_is_announced_with_the_previous_one_even_after_a_restart(
    start: Programs, fake: FakeCloudflared
) -> None:
    fake.plan(quick(), quick("new-one"), quick("third"), quick("third"))
    first = start()
    wait_until(lambda: first.public() == [URL])
    fake.set("die", "1")
    wait_until(lambda: first.public() == [URL, OTHER_URL])
    assert public_url_lines(first)[-1].count(URL) == 1
    assert OTHER_URL in public_url_lines(first)[-1]
    assert first.wait_for_status(first.token, state=RUNNING)["url"] == OTHER_URL
    assert "the end was near" in first.stderr
    assert first.end(signal.SIGTERM) == 0
    second = start()
    wait_until(lambda: second.public() == ["https://third.trycloudflare.com"])
    assert "https://third.trycloudflare.com" in public_url_lines(second)[-1]
    assert OTHER_URL in public_url_lines(second)[-1]
    assert second.end(signal.SIGINT) == 0
    third = start()
    wait_until(lambda: third.public() == ["https://third.trycloudflare.com"])
    assert public_url_lines(third) == ["Public URL: https://third.trycloudflare.com"]
    assert third.wait_for_status(first.token, state=RUNNING)["starts"] == 1


@pytest.mark.parametrize("leaves", [0, "never"], ids=["willing", "stubborn"])
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGKILL, marks=only_linux)]
)
def test_no_cloudflared_survives_the_bridge(
    start: Programs, fake: FakeCloudflared, number: int, leaves: Any
) -> None:
    fake.plan(quick(leaves=leaves))
    running = start(patch=SHORT_GRACE if leaves == "never" else "")
    wait_until(lambda: running.public() == [URL])
    assert len(alive(fake)) == 1
    status = running.end(number)
    if number == signal.SIGKILL:
        wait_until(lambda: not alive(fake))
    else:
        assert (status, alive(fake), len(fake.graceful_exits())) == (
            0, [], 0 if leaves == "never" else 1,
        )
        assert "Traceback" not in running.stderr


@pytest.mark.parametrize(
    "step", [HANGING, quick(connects=False)], ids=["no address", "no connection"]
)
def test_no_cloudflared_survives_a_bridge_that_ends_during_its_start(
    start: Programs, fake: FakeCloudflared, step: Step
) -> None:
    fake.plan(step)
    running = start()
    wait_until(lambda: alive(fake))
    assert (running.end(signal.SIGTERM), alive(fake), running.public()) == (0, [], [])


@only_linux
def test_the_next_start_ends_a_killed_bridge_s_cloudflared(
    start: Programs, fake: FakeCloudflared
) -> None:
    # Some systems have no PR_SET_PDEATHSIG.
    first = start(patch="cab.PR_SET_PDEATHSIG = 0")
    wait_until(lambda: first.public() == [URL])
    orphans = alive(fake)
    first.end(signal.SIGKILL)
    assert len(orphans) == 1 and is_running(orphans[0])
    # Some systems do not show the environment of processes.
    second = start(patch="cab.processes_tagged = lambda tag: []")
    assert not is_running(orphans[0])
    assert re.search(r"\b1 process", second.stderr)
    wait_until(lambda: second.public() == [URL])
    assert second.wait_for_status(first.token, state=RUNNING)["starts"] == 1
    assert len(alive(fake)) == 1


@only_linux
def test_only_the_recorded_process_is_ended(bridge: Bridges, tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-S", "-c", "import time\ntime.sleep(60)"])
        for _ in range(3)
    ]
    recorded, other_program, other_start = processes
    try:
        started = {process.pid: cab.started_at(process.pid) for process in processes}
        program = cab.program_of(recorded.pid)
        (tmp_path / "data").mkdir()
        with contextlib.closing(
            cab.Stores(tmp_path / "data" / "bridge.db", cab.Clock())
        ) as store:
            store.database.record_process(recorded.pid, started[recorded.pid], program)
            store.database.record_process(
                other_program.pid, started[other_program.pid], "/usr/bin/cloudflared"
            )
            later = "%s0" % started[other_start.pid]
            store.database.record_process(other_start.pid, later, program)
        running = bridge(spare=0)
        assert recorded.wait(20) == -signal.SIGKILL
        assert [process.poll() for process in processes[1:]] == [None] * 2
        assert [line for line in running.log if re.search(r"\b1 process", line)]
        with contextlib.closing(sqlite3.connect(str(tmp_path / "data" / "bridge.db"))) as db:
            assert db.execute(
                "SELECT count(*) FROM children WHERE pid IN (?, ?, ?)",
                [process.pid for process in processes],
            ).fetchone() == (0,)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def pin(data: bytes) -> str:
    """Return code that makes a program expect this file for every system."""
    return (
        "asset = cab.Asset('cloudflared-test', %d, %r)\n"
        "cab.ASSETS.update((name, asset) for name in list(cab.ASSETS))" % (len(data), sha256(data))
    )


def test_a_killed_download_is_restarted_and_leaves_no_files(
    start: Programs, serve: Servers, fake: FakeCloudflared, tmp_path: Path
) -> None:
    data = pinned_fake(fake)
    server, folder = serve(slow(data)), tmp_path / "data" / "bin"
    flags = ("--cloudflared", "", "--cloudflared-url", server.url)
    first = start(*flags, patch=pin(data))
    wait_until(lambda: list(folder.glob("*.part/download")))
    assert first.api.answer("hello")["response"] == "Echo: hello"
    first.end(signal.SIGKILL)
    assert files(folder) and not (folder / "cloudflared").exists()
    server.answer = whole(data)
    second = start(*flags, patch=pin(data))
    wait_until(lambda: second.public() == [URL])
    assert files(folder) == ["cloudflared"]
    assert mode(folder / "cloudflared") == 0o755
    assert mode(folder) == 0o700
    lines = [line for line in second.stderr.splitlines() if "cloudflared" in line]
    assert cab.CLOUDFLARED_VERSION in lines[0] and "0 MB" in lines[0]
    assert str(folder) in lines[-1]
    assert "Downloading cloudflared: 100 %" in lines
    assert second.end(signal.SIGTERM) == 0
    third = start(*flags, patch=pin(data))
    wait_until(lambda: third.public() == [URL])
    assert len(server.paths) == 2 and "Downloading" not in third.stderr


def test_a_download_ends_with_the_program(
    start: Programs, serve: Servers, fake: FakeCloudflared, tmp_path: Path
) -> None:
    data = pinned_fake(fake)
    server, folder = serve(slow(data)), tmp_path / "data" / "bin"
    running = start("--cloudflared", "", "--cloudflared-url", server.url, patch=pin(data))
    wait_until(lambda: folder.exists() and files(folder))
    assert running.end(signal.SIGTERM, 20) == 0
    assert files(folder) == []
    assert "Traceback" not in running.stderr


def test_a_cloudflared_in_path_is_used(
    start: Programs, fake: FakeCloudflared, tmp_path: Path
) -> None:
    running = start(
        "--cloudflared", "", "--cloudflared-url", "http://127.0.0.1:1",
        environ={"PATH": str(fake.folder)},
    )
    wait_until(lambda: running.public() == [URL])
    assert not (tmp_path / "data" / "bin").exists() and "Downloading" not in running.stderr


# --- a named tunnel, as a program ---


def files_with(folder: Path, secret: str) -> List[Path]:
    """Return the files that contain the secret."""
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and secret.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize("is_file", [True, False], ids=["file", "variable"])
def test_a_named_tunnel_reads_its_token_from_a_file_or_the_environment_and_shows_it_nowhere(
    start: Programs, fake: FakeCloudflared, tmp_path: Path, is_file: bool
) -> None:
    (tmp_path / "token").write_text(TUNNEL_TOKEN + "\n")
    fake.plan(named(ingress(("bridge.example.com", "http://localhost:8080"))))
    flags = ("--tunnel-token-file", "~/token") if is_file else ()
    running = start(
        "--public-url", "https://bridge.example.com/", *flags,
        environ={} if is_file else {"CAB_TUNNEL_TOKEN": TUNNEL_TOKEN},
    )
    wait_until(lambda: running.public() == ["https://bridge.example.com"])
    assert (
        "has the service http://localhost:%d (it has: bridge.example.com -> http://localhost:8080; "
        % running.port
        in running.stderr
    )
    tunnel = running.wait_for_status(running.token, state=RUNNING)
    assert (tunnel["url"], tunnel["protocol"]) == ("https://bridge.example.com", "auto")
    cloudflared = fake.starts()[0]
    assert cloudflared["argv"] == [
        "tunnel", "--config", str(tmp_path / "data" / "cloudflared.yml"), "--no-autoupdate",
        "--metrics", "127.0.0.1:0", "--grace-period", "5s", "run",
    ]
    assert {name for name in cloudflared["env"] if not name.startswith("__")} == {
        "PATH", "HOME", "LANG", "TUNNEL_TOKEN", cab.OWNER_ENV_VAR,
    }
    assert cloudflared["env"]["TUNNEL_TOKEN"] == TUNNEL_TOKEN
    assert TUNNEL_TOKEN not in running.stderr + str(running.api.get("/api/status").json)
    if sys.platform == "linux":
        assert not [
            pid
            for pid in (running.process.pid, cloudflared["pid"])
            if TUNNEL_TOKEN in Path("/proc/%d/cmdline" % pid).read_text()
        ]
    assert running.end(signal.SIGTERM) == 0 and files_with(tmp_path / "data", TUNNEL_TOKEN) == []


@pytest.mark.parametrize(
    "step, words",
    [(FAILURES["token"], "Provided Tunnel token is not valid."), (named(connects=False), "")],
)
def test_a_token_that_cloudflare_refuses_is_not_repeated(
    start: Programs, fake: FakeCloudflared, step: Step, words: str
) -> None:
    fake.plan(step)
    running = start(environ={"CAB_TUNNEL_TOKEN": TUNNEL_TOKEN})
    tunnel = running.wait_for_status(running.token, state=FATAL if words else STARTING)
    assert words in (tunnel["error"] or "")
    assert TUNNEL_TOKEN not in running.stderr + str(tunnel)
    assert running.public() == []
    assert running.end(signal.SIGTERM) == 0 and alive(fake) == []


BAD = ["hunter2hunter2", TUNNEL_TOKEN[:-9], encoded({"a": "hunter2", "t": "hunter2"})]


@pytest.mark.parametrize("text", BAD)
def test_a_bad_token_is_refused_from_every_source(tmp_path: Path, text: str) -> None:
    (tmp_path / "token").write_text(text)
    for path, environ in ((str(tmp_path / "token"), {}), ("", {"CAB_TUNNEL_TOKEN": text})):
        with pytest.raises(cab.WrongSetting) as caught:
            cab.find_tunnel_token(cab.Config(tunnel_token_file=path), environ)
        assert text not in str(caught.value) and "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "text, from_file", [(BAD[0], True), (BAD[2], False)], ids=["file", "variable"]
)
def test_a_bad_token_is_one_error_line_and_status_2(
    tmp_path: Path,
    fake: FakeCloudflared,
    fake_claude: Callable[..., FakeClaude],
    text: str,
    from_file: bool,
) -> None:
    (tmp_path / "token").write_text(text)
    flags = ["--tunnel-token-file", str(tmp_path / "token")] if from_file else []
    done = run_cli(
        "start", "--port", "0", "--data-dir", str(tmp_path / "data"), "--claude",
        str(fake_claude().path), "--cloudflared", str(fake.path), *flags, home=tmp_path,
        environ={} if from_file else {"CAB_TUNNEL_TOKEN": text},
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, done.stdout, len(errors), fake.runs()) == (2, "", 1, [])
    assert text not in done.stderr and "hunter2" not in done.stderr
    assert not (tmp_path / "data" / "bridge.db").exists()


@pytest.mark.parametrize("environ", [{}, {"CAB_TUNNEL_TOKEN": TUNNEL_TOKEN}])
@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_token_file_is_refused(
    tmp_path: Path, text: str, environ: Mapping[str, str]
) -> None:
    (tmp_path / "token").write_text(text)
    with pytest.raises(cab.WrongSetting, match="(?i)tunnel token"):
        cab.find_tunnel_token(cab.Config(tunnel_token_file=str(tmp_path / "token")), environ)
    assert cab.find_tunnel_token(cab.Config(), {"CAB_TUNNEL_TOKEN": text}) == ""


def test_a_token_file_that_cannot_be_read_is_reported(
    tmp_path: Path, fake_claude: Callable[..., FakeClaude]
) -> None:
    done = run_cli(
        "start", "--port", "0", "--data-dir", str(tmp_path / "data"), "--claude",
        str(fake_claude().path), "--tunnel-token-file", str(tmp_path / "missing"), home=tmp_path,
    )
    assert done.returncode == 1
    assert str(tmp_path / "missing") in done.stderr
    assert re.search("^hint: .*--tunnel-token-file", done.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    "flags, named_flag",
    [
        (["--tunnel-protocol", "http3"], "--tunnel-protocol"),
        (["--public-url", "bridge.example.com"], "--public-url"),
        (["--public-url", "https://x.example/path"], "--public-url"),
        (["--cloudflared-url", "ftp://x"], "--cloudflared-url"),
    ],
)
def test_a_wrong_setting_of_the_tunnel_is_one_error_line(
    tmp_path: Path, flags: List[str], named_flag: str
) -> None:
    done = run_cli("start", "--data-dir", str(tmp_path / "data"), *flags, home=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: %s " % named_flag)
    assert not (tmp_path / "data").exists()


# --- output ---


@pytest.mark.parametrize("before", [None, URL])
def test_an_address_is_announced_on_both_outputs(
    capsys: pytest.CaptureFixture[str], before: Optional[str]
) -> None:
    cab.Console().on_url(OTHER_URL, before)
    out, err = capsys.readouterr()
    assert out == OTHER_URL + "\n"
    assert (URL in err) is bool(before)
    assert "%s/dashboard" % OTHER_URL in err


# --- the real cloudflared ---


@pytest.mark.skipif(
    not os.environ.get("CAB_TEST_CLOUDFLARED"),
    reason="no real cloudflared: name one in CAB_TEST_CLOUDFLARED",
)
def test_a_real_cloudflared_gets_an_address_that_is_not_announced_without_a_connection(
    run_tunnel: RunTunnel, serve: Servers, tmp_path: Path
) -> None:
    body = {
        "success": True,
        "errors": [],
        "result": {
            "id": str(uuid.uuid4()), "name": "foo-bar", "hostname": "foo-bar.trycloudflare.com",
            "account_tag": "0" * 32, "secret": base64.b64encode(b"s" * 32).decode(),
        },
    }
    service = serve(whole(json.dumps(body).encode()))
    # Nothing answers at the first edge, and the second one refuses connections.
    with socket.create_server(("127.0.0.1", 0)) as edge:
        wrapper = tmp_path / "wrapper"
        wrapper.write_text(
            '#!/bin/sh\nfirst=$1\nshift\nexec %s "$first" --quick-service http://127.0.0.1:%d'
            ' --edge 127.0.0.1:%d --edge 127.0.0.2:9 "$@"\n'
            % (
                shlex.quote(os.environ["CAB_TEST_CLOUDFLARED"]), service.server_port,
                edge.getsockname()[1],
            )
        )
        wrapper.chmod(0o755)
        run = run_tunnel(cloudflared=str(wrapper))
        wait_until(
            lambda: run.tunnel._process and run.tunnel._process.host == TUNNEL_HOST, 30
        )
        process = run.tunnel._process
        wait_until(lambda: process and process.get("/ready")[0] == 503, 30)
        assert process
        assert process.get("/quicktunnel") == (200, {"hostname": "foo-bar.trycloudflare.com"})
        assert service.paths == ["/tunnel"]
        assert (run.tunnel.state, run.announced, run.log) == (STARTING, [], [])
        run.tunnel.close()
        assert not is_running(process.pid)
