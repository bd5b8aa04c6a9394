"""The tunnel: how cloudflared is got, started, watched and ended, and who may come in through it. A fake one, and the real
one where $CAB_TEST_CLOUDFLARED names it."""
from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import json
import os
import re
import shlex
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
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import pytest
from conftest import IMPORTED, SHORT, Api, FakeClaude, FakeClock, Program, RunningBridge, imported, is_running, run_cli, wait_until
from fake_cloudflared import FAILURES, HANGING, HARMLESS, PRE_CHECKS, WELCOME, FakeCloudflared, box, failing, ingress, named, quick

import claude_api_bridge as cab

Step = Dict[str, Any]                                        # of the fake's plan
Rigs = Callable[..., "Rig"]                                  # what the fixtures give
Bridges = Callable[..., RunningBridge]
Programs = Callable[..., "TunnelProgram"]
Servers = Callable[..., "FileServer"]
Say = Callable[[str, bool], None]
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and PR_SET_PDEATHSIG")
STARTING, RUNNING, BACKOFF, FATAL = (cab.TunnelState.STARTING, cab.TunnelState.RUNNING, cab.TunnelState.BACKOFF, cab.TunnelState.FATAL)
URL, OTHER_URL = "https://foo-bar.trycloudflare.com", "https://new-one.trycloudflare.com"
TUNNEL_TOKEN = base64.b64encode(json.dumps({"a": "b" * 32, "t": str(uuid.UUID(int=7)), "s": "c2VjcmV0" * 6}).encode()).decode()


# --- its words ---

@pytest.mark.parametrize("line, told", [
    (box("foo-bar.trycloudflare.com").splitlines()[2], ("host", "foo-bar.trycloudflare.com")),
    ('{"level":"info","message":"|  https://foo-1.trycloudflare.com     |","time":"2026-11-22T06:04:06Z"}',
     ("host", "foo-1.trycloudflare.com")),
    ("2026-11-22T06:02:36Z INF Starting metrics server on 127.0.0.1:39911/metrics", ("metrics", "127.0.0.1:39911")),
    ("2026-11-22T06:02:36Z INF Starting metrics server on 192.0.2.1:39911/metrics", ("", "")),
    ("2026-11-22T06:02:36Z INF |  https://api.trycloudflare.com                |", ("", "")),
    ("2026-11-22T06:02:36Z INF |  https://foo-bar.trycloudflare.com.evil.example  |", ("", "")),
    ("2026-11-22T06:02:36Z INF |  https://evil.example/foo.trycloudflare.com  |", ("", "")),
    ("2026-11-22T06:02:36Z INF |  https://a.b.trycloudflare.com  |", ("", "")),
    ("2026-11-22T06:02:36Z INF https://foo-bar.trycloudflare.com", ("", "")),
    ('failed to request quick Tunnel: Post "https://api.trycloudflare.com/tunnel": dial tcp: no such host', ("", "")),
    *((line, ("", "")) for line in (WELCOME + HARMLESS + PRE_CHECKS).splitlines()), ("", ("", "")),
])
def test_a_line_of_the_log_tells_this(line: str, told: Tuple[str, str]) -> None:
    assert cab.parse_tunnel_line(line) == told


@pytest.mark.parametrize("system, machine, name", [
    ("Linux", "x86_64", "cloudflared-linux-amd64"), ("Linux", "aarch64", "cloudflared-linux-arm64"),
    ("Linux", "i686", "cloudflared-linux-386"), ("Linux", "armv7l", "cloudflared-linux-arm"), ("Linux", "armv6l", "cloudflared-linux-arm"),
    ("Darwin", "arm64", "cloudflared-darwin-arm64.tgz"), ("Darwin", "x86_64", "cloudflared-darwin-amd64.tgz"),
    ("Windows", "AMD64", "cloudflared-windows-amd64.exe"),
    ("Windows", "ARM64", "cloudflared-windows-amd64.exe"), ("Windows", "x86", "cloudflared-windows-386.exe"),
    ("Linux", "riscv64", None), ("Linux", "ppc64le", None), ("FreeBSD", "amd64", None), ("", "", None),
])
def test_each_system_has_its_file(system: str, machine: str, name: Optional[str]) -> None:
    asset = cab.cloudflared_asset(system, machine)
    assert (asset.name if asset else None) == name


def test_every_pinned_file_has_a_size_and_sums_and_an_archive_those_of_its_program() -> None:
    assert len({asset.sha256 for asset in cab.ASSETS.values()}) == len(cab.ASSETS) == 8
    for asset in cab.ASSETS.values():
        assert 15_000_000 < asset.size < 60_000_000 and re.fullmatch("[0-9a-f]{64}", asset.sha256)
        assert bool(re.fullmatch("[0-9a-f]{64}", asset.program_sha256)) is asset.name.endswith(".tgz")
        assert asset.program_sha256 != asset.sha256


START = ["/bin/cloudflared", "tunnel", "--config", "/c.yml", "--no-autoupdate", "--metrics", "127.0.0.1:0", "--grace-period", "5s"]


@pytest.mark.parametrize("protocol, is_named, words", [
    ("quic", False, ["--protocol", "quic", "--url", "http://127.0.0.1:3456"]),
    ("http2", False, ["--protocol", "http2", "--url", "http://127.0.0.1:3456"]),
    ("auto", True, ["run"]), ("http2", True, ["--protocol", "http2", "run"]),
])
def test_the_command_line_is_exactly_this(protocol: str, is_named: bool, words: List[str]) -> None:
    assert cab.tunnel_argv("/bin/cloudflared", "/c.yml", "http://127.0.0.1:3456", protocol, is_named) == START + words


@pytest.mark.parametrize("host, no_tunnel, origin", [
    ("", False, "http://127.0.0.1:3456"), ("", True, "http://127.0.0.1:3456"), ("0.0.0.0", False, "http://127.0.0.1:3456"),
    ("localhost", False, "http://127.0.0.1:3456"), ("192.0.2.1", False, "http://192.0.2.1:3456"), ("::", False, "http://[::1]:3456"),
    ("::1", False, "http://[::1]:3456"), ("2001:db8::1", False, "http://[2001:db8::1]:3456"),
])
def test_a_program_on_this_machine_finds_us_where_we_listen(host: str, no_tunnel: bool, origin: str) -> None:
    assert cab.Config(host=host, no_tunnel=no_tunnel).origin(3456) == origin


CACHE_ENTRIES = {"PATH": "/bin", "HOME": "/root", "LANG": "C.UTF-8", "LC_ALL": "C", "TMPDIR": "/tmp", "SSL_CERT_FILE": "/x.pem",
        **dict.fromkeys(("USER", "USERPROFILE", "TZ", "TEMP", "TMP", "SYSTEMROOT", "windir", "APPDATA", "LOCALAPPDATA",
                         "SSL_CERT_DIR"), "y")}
DROPPED = ("TUNNEL_NAME", "TUNNEL_LOGLEVEL", "TUNNEL_TOKEN", "tunnel_url", "NO_AUTOUPDATE", "NO_TLS_VERIFY", "NOTIFY_SOCKET", "CAB_PORT",
           "CAB_TUNNEL_TOKEN", "ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "CLIENT_SECRET",
           "DB_PASSWORD", "KEY", "token", "Secret_Sauce", "EDITOR", "PYTHONPATH",
           "LD_PRELOAD", "DATABASE_URL", "MY_PATH", "PATHEXT", "HOMEPAGE")


@pytest.mark.parametrize("token", ["", TUNNEL_TOKEN])
def test_the_environment_is_what_any_program_needs_and_its_token(token: str) -> None:
    environ = {**CACHE_ENTRIES, **dict.fromkeys(DROPPED, "x")}
    assert cab.tunnel_environment(environ, token) == {**CACHE_ENTRIES, **({"TUNNEL_TOKEN": token} if token else {})}


def encoded(value: Any) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()


@pytest.mark.parametrize("text", [TUNNEL_TOKEN, TUNNEL_TOKEN + "\n", "  \t" + TUNNEL_TOKEN + "\r\n"])
def test_a_good_tunnel_token_is_taken_without_its_blanks(text: str) -> None:
    assert cab.check_tunnel_token(text) == TUNNEL_TOKEN


BAD_TOKENS = ["hunter2", TUNNEL_TOKEN[:-20], "cloudflared service install " + TUNNEL_TOKEN, "é" * 40, encoded([1, 2]), encoded("ats"),
              encoded(None), encoded({"a": "x", "t": "y"}), encoded({"a": 1, "t": 2, "s": 3}),
              base64.b64encode(b"\xff\xfe hunter").decode(), "eyJ", "=" * 8]


@pytest.mark.parametrize("text", BAD_TOKENS)
def test_a_bad_tunnel_token_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(cab.WrongSetting) as caught:
        cab.check_tunnel_token(text)
    assert str(caught.value).count(". ") == 0 and text not in str(caught.value).replace("eyJ", "")


@pytest.mark.parametrize("config, hosts, rules", [
    (ingress(("b.example.com", "http://localhost:3456")), ["b.example.com"], 2),
    (ingress(("a.example.com", "http://localhost:80"), ("b.example.com", "http://127.0.0.1:3456/")), ["b.example.com"], 3),
    (ingress(("b.example.com", "http://[::1]:3456")), ["b.example.com"], 2),
    (ingress(("a.example.com", "http://localhost:3456"), ("b.example.com", "http://localhost:3456")),
     ["a.example.com", "b.example.com"], 3),
    ({**ingress(("b.example.com", "http://localhost:3456")), "version": -1}, [], 0),
    (ingress(("b.example.com", "http://localhost:34567")), [], 2),
    (ingress(("b.example.com", "http://192.0.2.1:3456")), [], 2),
    (ingress(("", "http://localhost:3456")), [], 2), (ingress(("*.example.com", "http://localhost:3456")), [], 2),
    (ingress(("*.example.com", "http://localhost:3456"), ("b.example.com", "http://localhost:3456")), ["b.example.com"], 3),
    (ingress(), [], 1), ({"version": -1, "config": {}}, [], 0), ({"config": {"ingress": [7, None]}}, [], 0),
    ({"config": {"ingress": "x"}}, [], 0), ({"config": None}, [], 0), (None, [], 0), ([], [], 0), ("x", [], 0),
])
def test_a_configuration_names_the_hosts_that_lead_to_our_port(config: Any, hosts: List[str], rules: int) -> None:
    found, listed = cab.hosts_in_ingress(config, 3456)
    assert (found, len(listed)) == (hosts, rules)


def test_the_rules_of_a_configuration_are_listed_with_a_star_for_no_name() -> None:
    config = ingress(("*.example.com", "http://localhost:3456"), ("b.example.com", "http://localhost:80"), ("", "http://localhost:81"))
    assert cab.hosts_in_ingress(config, 3456) == ([], ["*.example.com -> http://localhost:3456", "b.example.com -> http://localhost:80",
                                                       "* -> http://localhost:81", "* -> http_status:404"])


# --- when it is started, given up and tried again: histories, told to the policy ---

NOTHING, ADDRESS, READY = cab.TunnelStatus(), cab.TunnelStatus(has_host=True), cab.TunnelStatus(has_host=True, is_ready=True)
ENDED = cab.TunnelStatus(True, words="it ended")
LIMITED = cab.TunnelStatus(True, words='it ended: status_code="429 Too Many Requests"')
LIMITED_TOO = cab.TunnelStatus(True, words="it ended: error code: 1015")
HOPELESS = cab.TunnelStatus(True, True, words="it is no use")
Moment = Tuple[float, cab.TunnelStatus, str, str, str]              # seconds since the start, what is seen; then action, state, protocol

HISTORIES: List[Any] = [
    pytest.param(("quic", "http2"), False, [
        (0.1, NOTHING, "", STARTING, "quic"), (2, ADDRESS, "", STARTING, "quic"), (3, READY, "", RUNNING, "quic"),
        (90_000, READY, "", RUNNING, "quic")], id="all is well"),
    pytest.param(("quic", "http2"), False, [
        (29.9, NOTHING, "", STARTING, "quic"), (30, NOTHING, "stop", BACKOFF, "quic"), (34.9, NOTHING, "", BACKOFF, "quic"),
        (35, NOTHING, "start", STARTING, "quic")], id="no address"),
    pytest.param(("quic", "http2"), False, [
        (0, ADDRESS, "", STARTING, "quic"), (29.9, ADDRESS, "", STARTING, "quic"), (30, ADDRESS, "start", STARTING, "http2"),
        (30, ADDRESS, "", STARTING, "http2"), (119.9, ADDRESS, "", STARTING, "http2"), (120, ADDRESS, "stop", BACKOFF, "http2"),
        (125, NOTHING, "start", STARTING, "quic")], id="30 s by quic, 90 s by http2, a pause"),
    pytest.param(("quic", "http2"), False, [
        (20, ADDRESS, "", STARTING, "quic"), (49.9, ADDRESS, "", STARTING, "quic"), (50, ADDRESS, "start", STARTING, "http2"),
        (79.9, NOTHING, "", STARTING, "http2"), (79.9, ADDRESS, "", STARTING, "http2"), (169.8, ADDRESS, "", STARTING, "http2"),
        (169.9, ADDRESS, "stop", BACKOFF, "http2")], id="a late address leaves all the time for the connection"),
    pytest.param(("quic", "http2"), False, [
        (0, ADDRESS, "", STARTING, "quic"), (30, ADDRESS, "start", STARTING, "http2"), (110, READY, "", RUNNING, "http2"),
        (500, ENDED, "stop", BACKOFF, "http2"), (505, NOTHING, "start", STARTING, "http2"), (506, ADDRESS, "", STARTING, "http2"),
        (536, ADDRESS, "start", STARTING, "quic"), (537, READY, "", RUNNING, "quic"),
        (600, ENDED, "stop", BACKOFF, "quic"), (614.9, NOTHING, "", BACKOFF, "quic"), (615, NOTHING, "start", STARTING, "quic")],
        id="what worked is tried first"),
    pytest.param(("http2",), False, [
        (0, ADDRESS, "", STARTING, "http2"), (89.9, ADDRESS, "", STARTING, "http2"), (90, ADDRESS, "stop", BACKOFF, "http2"),
        (95, NOTHING, "start", STARTING, "http2")], id="a pinned protocol gets 90 s"),
    pytest.param(("auto",), True, [
        (0, ADDRESS, "", STARTING, "auto"), (179.9, ADDRESS, "", STARTING, "auto"), (180, ADDRESS, "stop", BACKOFF, "auto"),
        (185, NOTHING, "start", STARTING, "auto")], id="a named tunnel changes it by itself, and gets 180 s"),
    pytest.param(("quic",), False, [
        (1, READY, "", RUNNING, "quic"), (60, ADDRESS, "", RUNNING, "quic"), (179.9, ADDRESS, "", RUNNING, "quic"),
        (180, ADDRESS, "stop", BACKOFF, "quic"), (185, NOTHING, "start", STARTING, "quic")], id="lost for 120 s"),
    pytest.param(("quic",), False, [
        (1, READY, "", RUNNING, "quic"), (90_000, ADDRESS, "", RUNNING, "quic"), (90_119, READY, "", RUNNING, "quic")],
        id="a look after a long sleep is no loss"),
    pytest.param(("quic",), False, [
        (1, READY, "", RUNNING, "quic"), (100, ADDRESS, "", RUNNING, "quic"), (120, READY, "", RUNNING, "quic"),
        (239, ADDRESS, "", RUNNING, "quic"), (239.9, READY, "", RUNNING, "quic")], id="lost, and back in time"),
    pytest.param(("quic", "http2"), False, [
        (1, READY, "", RUNNING, "quic"), (3_600, ENDED, "stop", BACKOFF, "quic"), (3_605, NOTHING, "start", STARTING, "quic"),
        (3_606, READY, "", RUNNING, "quic")], id="death after an hour"),
    pytest.param(("quic", "http2"), False, [
        (0.3, HOPELESS, "stop", FATAL, "quic"), (60, READY, "", FATAL, "quic"), (900_000, NOTHING, "", FATAL, "quic")],
        id="fatal is final"),
    pytest.param(("quic", "http2"), False, [
        (0.3, LIMITED, "stop", BACKOFF, "quic"), (300.2, NOTHING, "", BACKOFF, "quic"), (300.3, NOTHING, "start", STARTING, "quic"),
        (301, LIMITED_TOO, "stop", BACKOFF, "quic"), (1_200.9, NOTHING, "", BACKOFF, "quic"), (1_201, NOTHING, "start", STARTING, "quic")],
        id="too often: a long pause at once"),
]


@pytest.mark.parametrize("protocols, is_named, moments", HISTORIES)
def test_a_history_of_the_tunnel(protocols: Sequence[str], is_named: bool, moments: Sequence[Moment]) -> None:
    begun = 1_000.0
    policy = cab.TunnelPolicy(protocols, is_named, lambda: 0.5)
    assert (policy.state, policy.start(begun), policy.state, policy.protocol) == (cab.TunnelState.STOPPED, "start", STARTING, protocols[0])
    seen = [(at, sight, policy.step(begun + at, sight), policy.state, policy.protocol) for at, sight, *_ in moments]
    assert seen == moments


@pytest.mark.parametrize("sight, seconds, action", [(NOTHING, 30, "stop"), (ADDRESS, 30, "start")])
def test_the_time_of_a_start_counts_from_when_the_program_runs(sight: cab.TunnelStatus, seconds: float, action: str) -> None:
    policy = cab.TunnelPolicy(["quic", "http2"])
    policy.start(1_000)
    policy.began(1_031)                                      # after a download
    assert [policy.step(1_031 + after, sight) for after in (0, seconds - 0.1, seconds)] == ["", "", action]


@pytest.mark.parametrize("jitter, factor", [(0.0, 0.8), (0.5, 1.0), (1.0, 1.2)])
def test_the_pauses_grow_to_a_quarter_of_an_hour_and_differ_between_bridges(jitter: float, factor: float) -> None:
    policy, now, pauses = cab.TunnelPolicy(["quic"], jitter=lambda: jitter), 0.0, []
    policy.start(now)
    for _ in range(7):
        assert policy.step(now, ENDED) == "stop"
        pauses.append(policy.retry_at - now)
        now = policy.retry_at
        assert policy.step(now, NOTHING) == "start"
    assert pauses == pytest.approx([seconds * factor for seconds in (5, 15, 60, 300, 900, 900, 900)])


def test_the_jitter_is_drawn_anew_for_each_pause() -> None:
    policy = cab.TunnelPolicy(["quic"])
    pauses = set()
    for _ in range(20):
        policy.start(0)
        policy._failures = 0
        policy.step(0, ENDED)
        pauses.add(policy.retry_at)
    assert len(pauses) > 10 and all(4 <= pause <= 6 for pause in pauses)


def test_after_a_time_that_was_good_the_pauses_are_short_again() -> None:
    policy = cab.TunnelPolicy(["quic"], jitter=lambda: 0.5)
    policy.start(0)
    for at in (0, 10, 100):
        policy.step(at, ENDED)
        policy.start(at)
    policy.step(200, READY)
    policy.step(3_800, READY)
    policy.step(3_801, ENDED)
    assert policy.retry_at - 3_801 == 5


def starts_within(hours: float, sight: Callable[[float], cab.TunnelStatus]) -> int:
    """How often cloudflared is started. sight: what is seen, by the seconds since the last start."""
    policy, begun, starts, now = cab.TunnelPolicy(["quic", "http2"], jitter=lambda: 0.0), 0.0, 1, 0.0
    policy.start(now)
    while now < hours * 3600:
        now += 0.5
        if policy.step(now, sight(now - begun)) == "start":
            begun, starts = now, starts + 1
    return starts


@pytest.mark.parametrize("sight, most", [
    pytest.param(lambda since: ENDED, 45, id="it ends at once"),
    pytest.param(lambda since: LIMITED, 45, id="too often"),
    pytest.param(lambda since: NOTHING, 45, id="no address"),
    pytest.param(lambda since: ADDRESS, 80, id="no connection"),
    pytest.param(lambda since: ADDRESS if since < 25 else ENDED, 45, id="it ends before it is connected"),
    pytest.param(lambda since: READY if since < 10 else ADDRESS, 300, id="it loses its connection again and again"),
    pytest.param(lambda since: READY if since < 2 else ENDED, 300, id="it is connected and ends, again and again"),
    pytest.param(lambda since: HOPELESS, 1, id="hopeless"),
])
def test_eight_hours_of_failure_are_few_starts(sight: Callable[[float], cab.TunnelStatus], most: int) -> None:
    assert 1 <= starts_within(8, sight) <= most


def test_the_reason_is_told_with_what_would_help() -> None:
    policy = cab.TunnelPolicy(["quic", "http2"])
    policy.start(0)
    policy.step(0, ADDRESS)
    policy.step(30, ADDRESS)
    assert "quic" in policy.why
    policy.step(30, ADDRESS)
    policy.step(120, ADDRESS)
    assert "http2" in policy.why and "7844" in policy.why


# --- the same with a process ---

class Impatient(threading.Event):
    """Waits shortly: the tunnel's rounds are quick here, and its time is that of the test's clock."""

    def wait(self, timeout: Optional[float] = None) -> bool:
        return super().wait(min(timeout or 0.0, 0.01))


class Rig:
    """A Tunnel alone, and what it told whom."""

    def __init__(self, folder: Path, install: Any, clock: FakeClock, protocols: Sequence[str], token: str, **settings: Any) -> None:
        self.clock, self.announced, self.said = clock, [], []    # type: Tuple[FakeClock, List[str], List[str]]
        self.get_state: Dict[str, str] = {}
        self.noted: Dict[int, Tuple[Any, ...]] = {}
        config = cab.Config(data_dir=folder, **settings)
        self.policy = cab.TunnelPolicy(protocols, bool(token), lambda: 0.5)
        self.tunnel = cab.Tunnel(config, install(config), self.policy, token, clock, "test%d" % os.getpid(), self._note,
                                 self.announced.append, self.said.append, self.get_state.__setitem__)
        self.tunnel._stopping = Impatient()
        self.stepped_at, step = float("-inf"), self.policy.step

        def noted(now: float, sight: cab.TunnelStatus) -> str:
            action, self.stepped_at = step(now, sight), now
            return action
        self.policy.step = noted                                     # type: ignore[method-assign]

    def _note(self, pid: int, started: Optional[str], program: Optional[str] = None) -> None:
        if started:
            self.noted[pid] = (started, program)
        else:
            self.noted.pop(pid, None)

    def start(self) -> "Rig":
        self.tunnel.start(3456)
        return self

    def until(self, state: str, seconds: float = 10) -> Dict[str, Any]:
        """-> the details, once the tunnel is in this state, and has told so."""
        def settled() -> bool:
            tunnel = self.tunnel
            return tunnel.state == state and tunnel.is_ready is (state == RUNNING) and (
                state not in (BACKOFF, FATAL) or bool(self.said) and tunnel._child is None and self.policy.why.rstrip(".") in self.said[-1])
        wait_until(settled, seconds)
        return self.tunnel.details()

    def looked(self) -> None:
        """Waits until it was seen connected at the present time."""
        wait_until(lambda: self.stepped_at == self.clock.at and self.policy.state == RUNNING)

    def addressed(self) -> None:
        """Waits until the present child's address was seen: from now on its time for the connection counts."""
        wait_until(lambda: self.tunnel._child and self.policy._has_host)

    def begun(self) -> None:
        """Waits until the child was looked at: from before that on its time for the address counts."""
        wait_until(lambda: self.tunnel._child and self.stepped_at == self.clock.at)


@pytest.fixture
def rig(tmp_path: Path, fake: FakeCloudflared, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rigs]:
    """rig(*steps, protocols=..., token=..., install=..., **settings) -> a Rig that is started, with the fake in --cloudflared."""
    made: List[Rig] = []
    monkeypatch.setattr(cab, "CLOSE_SECONDS", 0.5)

    def make(*steps: Step, protocols: Sequence[str] = ("quic", "http2"), token: str = "", install: Any = None, **settings: Any) -> Rig:
        if steps:
            fake.plan(*steps)
        (tmp_path / "data").mkdir(exist_ok=True)

        def found(config: cab.Config) -> cab.CloudflaredInstall:
            return cab.CloudflaredInstall(config, {"PATH": "/nowhere"}, clock, lambda text, passes: None)
        made.append(Rig(tmp_path / "data", install or found, clock, protocols, token, **{"cloudflared": str(fake.path), **settings}))
        return made[-1].start()

    yield make
    for each in made:
        each.tunnel.close()
        assert each.tunnel.state == cab.TunnelState.STOPPED and not each.noted


def alive(fake: FakeCloudflared) -> List[int]:
    return [start["pid"] for start in fake.starts() if is_running(start["pid"])]


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeCloudflared]:
    """A FakeCloudflared; what a test that failed left of it is ended."""
    made = FakeCloudflared(tmp_path / "cloudflared")
    yield made
    for pid in alive(made):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("changes", [{}, {"split": True, "quicktunnel": False}, {"box": False}, {"told": "api.trycloudflare.com"},
                                     {"told": "evil.example"}, {"told": 7}, {"told": "foo-bar.trycloudflare.com.evil.example"}],
                         ids=["plain", "in two pieces, in the log only", "at the metrics only", "api", "evil", "number", "evil end"])
def test_a_tunnel_that_fares_well_is_announced_once_with_its_address(rig: Rigs, fake: FakeCloudflared, changes: Mapping[str, Any]) -> None:
    one = rig(quick(**changes))
    details = one.until(RUNNING)
    assert details == {"state": "running", "url": URL, "since": cab.iso_time(one.clock.at), "protocol": "quic", "starts": 1, "error": None,
                       "retryInSeconds": None}
    assert (one.announced, one.said, one.tunnel.hosts) == ([URL], [], {"foo-bar.trycloudflare.com"})
    assert one.get_state == {"tunnel_protocol": "quic"}
    for _ in range(5):
        one.clock.advance(5)
        one.looked()
    assert (one.until(RUNNING)["starts"], one.announced, one.said) == (1, [URL], [])
    one.tunnel.close()
    assert (one.tunnel.details()["state"], one.tunnel.details()["url"], one.tunnel.hosts, alive(fake)) == ("stopped", None, frozenset(), [])


LAST_WORDS = {name: (step["stdout"] or "".join(step["said"])).strip().splitlines()[-1:] for name, step in FAILURES.items()}
LAST_WORDS["flag"] = ["Incorrect Usage. flag provided but not defined: -bogus"]
LAST_WORDS["token"] = ["Provided Tunnel token is not valid."]


@pytest.mark.parametrize("name", sorted(set(FAILURES) - {"flag", "token", "limited"}))
def test_a_start_that_fails_is_tried_again_after_a_pause_and_says_why(rig: Rigs, fake: FakeCloudflared, name: str) -> None:
    one = rig(FAILURES[name], quick("new-one"))
    details = one.until(BACKOFF)
    quoted = ": " + LAST_WORDS[name][0] if LAST_WORDS[name] else ""
    why = "cloudflared ended (exit code %d)%s" % (FAILURES[name]["exit"], quoted)
    assert details == {"state": "backoff", "url": None, "since": None, "protocol": "quic", "starts": 1, "error": why, "retryInSeconds": 5}
    assert one.said == ["The tunnel failed: %s. The bridge serves locally; next try in 5 s." % why.rstrip(".")]
    assert (one.announced, one.tunnel.hosts, alive(fake), one.noted) == ([], frozenset(), [], {})
    one.clock.advance(4.9)
    assert one.until(BACKOFF)["starts"] == 1
    one.clock.advance(0.2)
    assert (one.until(RUNNING)["url"], one.announced, one.tunnel.starts) == (OTHER_URL, [OTHER_URL], 2)


def test_it_leads_to_the_address_on_which_we_listen(rig: Rigs, fake: FakeCloudflared) -> None:
    rig(quick(), host="192.0.2.1").until(RUNNING)
    assert fake.starts()[0]["argv"][-2:] == ["--url", "http://192.0.2.1:3456"]


def test_too_many_starts_are_followed_by_a_long_pause(rig: Rigs) -> None:
    one = rig(FAILURES["limited"], quick())
    details = one.until(BACKOFF)
    assert details["retryInSeconds"] == 300 and re.search("429|1015", details["error"])
    assert len(one.said) == 1 and one.said[0].endswith("The bridge serves locally; next try in 300 s.")
    one.clock.advance(301)
    assert one.until(RUNNING)["url"] == URL


@pytest.mark.parametrize("name, token", [("flag", ""), ("token", TUNNEL_TOKEN)])
def test_what_no_second_try_would_mend_is_given_up(rig: Rigs, fake: FakeCloudflared, name: str, token: str) -> None:
    one = rig(FAILURES[name], quick(), token=token)
    details = one.until(FATAL)
    assert LAST_WORDS[name][0] in details["error"] and details["retryInSeconds"] is None and details["url"] is None
    assert len(one.said) == 1 and one.said[0].endswith("The bridge serves locally; the tunnel is given up.")
    one.clock.advance(900_000)
    one.clock.advance(900_000)
    assert (one.until(FATAL)["starts"], len(fake.starts()), one.announced) == (1, 1, [])


def test_one_that_gets_no_address_is_ended_after_30_seconds(rig: Rigs, fake: FakeCloudflared) -> None:
    one = rig(HANGING, quick())
    one.begun()
    wait_until(fake.starts)
    one.clock.advance(29)
    assert one.until(STARTING)["starts"] == 1 and len(alive(fake)) == 1
    one.clock.advance(1)
    details = one.until(BACKOFF)
    assert (details["error"], details["retryInSeconds"], alive(fake)) == ("no address within 30 s", 5, [])
    assert one.said == ["The tunnel failed: no address within 30 s. The bridge serves locally; next try in 5 s."]
    one.clock.advance(5)
    assert one.until(RUNNING)["starts"] == 2


def test_one_that_never_connects_is_tried_by_the_other_protocol_then_given_a_pause(rig: Rigs, fake: FakeCloudflared) -> None:
    one = rig(quick("one-1", connects=False), quick("two-2", connects=False), quick())
    one.addressed()
    assert (one.tunnel.state, one.announced, one.tunnel.hosts, one.tunnel.details()["url"]) == (STARTING, [], frozenset(), None)
    one.clock.advance(30)
    wait_until(lambda: len(fake.starts()) == 2)
    one.addressed()                                          # it was begun anew, so this is the second one's
    assert (one.tunnel.state, one.tunnel.details()["protocol"], one.announced, len(alive(fake))) == (STARTING, "http2", [], 1)
    one.clock.advance(90)
    details = one.until(BACKOFF)
    assert details["error"] == "no connection by http2 within 90 s; outbound TCP or UDP to port 7844 is needed" and one.announced == []
    assert [start["argv"][start["argv"].index("--protocol") + 1] for start in fake.starts()] == ["quic", "http2"]


def test_the_protocol_that_worked_is_remembered(rig: Rigs, fake: FakeCloudflared) -> None:
    one = rig(quick(connects="http2"))
    one.addressed()
    one.clock.advance(30)
    assert one.until(RUNNING)["protocol"] == "http2" and one.get_state == {"tunnel_protocol": "http2"}
    fake.turn("die", "1")
    one.until(BACKOFF)
    one.clock.advance(5)
    assert one.until(RUNNING)["starts"] == 3 and "http2" in fake.starts()[-1]["argv"]


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_one_that_dies_after_an_hour_is_started_again_and_its_new_address_announced(rig: Rigs, fake: FakeCloudflared, how: str) -> None:
    one = rig(quick(), quick("new-one"))
    one.until(RUNNING)
    one.clock.advance(3_600)
    one.looked()
    if how == "exit":
        fake.turn("die", "1")
    else:
        os.kill(fake.starts()[0]["pid"], signal.SIGKILL)
    details = one.until(BACKOFF)
    assert details["error"].startswith("cloudflared ended (exit code %d)" % (1 if how == "exit" else -9))
    assert ("the end was near" in details["error"]) is (how == "exit") and (details["url"], one.tunnel.hosts) == (None, frozenset())
    one.clock.advance(5)
    assert one.until(RUNNING)["url"] == OTHER_URL and one.announced == [URL, OTHER_URL]
    assert one.tunnel.hosts == {"new-one.trycloudflare.com"} and one.tunnel.details()["since"] == cab.iso_time(one.clock.at)


@pytest.mark.parametrize("how", ["503", "gone"])
def test_a_connection_that_is_lost_may_come_back_for_two_minutes(rig: Rigs, fake: FakeCloudflared, how: str) -> None:
    one = rig(quick(), quick("new-one"))
    one.until(RUNNING)
    fake.turn("ready", how)
    one.clock.advance(5)
    wait_until(lambda: one.said)
    assert one.said == ["The tunnel has lost its connection; cloudflared tries to get it back."]
    assert (one.tunnel.details()["url"], one.tunnel.starts) == (None, 1)
    one.clock.advance(60)
    fake.turn("ready", "200")
    one.clock.advance(40)
    one.looked()
    assert one.until(RUNNING)["starts"] == 1
    assert (one.said[1:], one.announced) == (["The tunnel is connected: " + URL], [URL])
    fake.turn("ready", how)
    one.clock.advance(5)
    wait_until(lambda: len(one.said) == 3)
    one.clock.advance(121)
    assert one.until(BACKOFF)["error"] == "the connection was lost for 120 s" and alive(fake) == []
    fake.turn("ready", "200")
    one.clock.advance(5)
    assert one.until(RUNNING)["url"] == OTHER_URL and one.announced == [URL, OTHER_URL]


def test_of_a_lost_connection_no_earlier_failure_is_told(rig: Rigs, fake: FakeCloudflared) -> None:
    one = rig(quick(connects="http2"))
    one.addressed()
    one.clock.advance(30)
    one.until(RUNNING)
    fake.turn("ready", "503")
    one.clock.advance(5)
    wait_until(lambda: one.said)
    assert one.tunnel.details()["error"] == "no connection"
    fake.turn("ready", "200")
    one.clock.advance(5)
    assert one.until(RUNNING)["error"] is None


def test_ten_megabytes_of_log_do_not_hold_it_up_and_are_not_kept(rig: Rigs, fake: FakeCloudflared) -> None:
    one = rig(quick(flood=10 << 20))
    one.until(RUNNING)
    wait_until((fake.folder / "flooded").exists)
    (fake.folder / "flooded").unlink()
    fake.turn("flood", str(10 << 20))
    wait_until((fake.folder / "flooded").exists)
    child = one.tunnel._child
    assert child and len(child._tail) <= cab.LOG_LINES and max(map(len, child._tail)) <= cab.STDERR_BYTES
    one.clock.advance(5)
    assert (one.until(RUNNING)["starts"], one.announced) == (1, [URL])


def test_the_end_of_a_log_without_its_line_s_end_is_quoted_too(rig: Rigs) -> None:
    step = failing("a line")
    step["said"].append("half a line")
    assert rig(step).until(BACKOFF)["error"] == "cloudflared ended (exit code 1): half a line"


def test_what_it_quotes_holds_no_secret(rig: Rigs) -> None:
    secret = cab.new_token()
    one = rig(failing("it was " + secret + " and " + "x" * 9_000))
    error = one.until(BACKOFF)["error"]
    assert secret not in error and secret not in one.said[0] and "it was cab-" in error and len(error) < 400


@pytest.mark.parametrize("spoil, state, words", [
    (lambda path: path.chmod(0o644), FATAL, "There is no program"), (lambda path: path.unlink(), FATAL, "There is no program"),
    (lambda path: path.write_text("#!/nowhere/python\n"), BACKOFF, "cloudflared cannot be run: "),
    (lambda path: path.write_bytes(b"\x7fELF not really"), BACKOFF, "cloudflared cannot be run: "),
    (lambda path: path.write_text("#!%s\n" % (path.parent / "plan.json")), FATAL, "cloudflared cannot be run: "),
], ids=["not executable", "not there", "no interpreter", "not for this machine", "not allowed"])
def test_a_program_that_cannot_be_run_is_said(rig: Rigs, fake: FakeCloudflared, spoil: Callable[[Path], Any], state: str,
                                              words: str) -> None:
    spoil(fake.path)
    one = rig()
    details = one.until(state)
    assert words in details["error"] and str(fake.path) in details["error"] and details["starts"] == 0


def test_a_program_that_is_gone_at_a_later_start_is_looked_for_again(rig: Rigs, fake: FakeCloudflared, tmp_path: Path) -> None:
    def in_path(config: cab.Config) -> cab.CloudflaredInstall:
        path = "%s:%s" % (tmp_path / "first", tmp_path / "second")
        return cab.CloudflaredInstall(config, {"PATH": path}, cab.Clock(), lambda text, passes: None)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cloudflared").symlink_to(fake.path)
    one = rig(quick(), quick("new-one"), install=in_path, cloudflared="")
    one.until(RUNNING)
    (tmp_path / "first" / "cloudflared").unlink()            # as an update of the system does
    fake.turn("die", "1")
    one.until(BACKOFF)
    one.clock.advance(5)
    assert one.until(RUNNING)["url"] == OTHER_URL


@pytest.mark.parametrize("leaves, is_ordered", [(0, True), (0.2, True), ("never", False)])
def test_it_gets_its_time_to_leave_and_is_gone_when_the_tunnel_is_closed(rig: Rigs, fake: FakeCloudflared, leaves: Any,
                                                                         is_ordered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_ordered:
        stop = cab.Cloudflared.stop
        monkeypatch.setattr(cab.Cloudflared, "stop", lambda child, grace: stop(child, min(grace, 0.2)))
    one = rig(quick(leaves=leaves))
    one.until(RUNNING)
    pid = fake.starts()[0]["pid"]
    assert one.noted == {pid: (cab.started_at(pid), cab.program_of(pid))}
    one.tunnel.retire()
    one.tunnel.close()
    one.tunnel.close()
    assert not is_running(pid) and fake.client_disconnected() == ([pid] if is_ordered else [])
    assert (one.noted, one.tunnel.state, one.tunnel.hosts, one.said) == ({}, "stopped", frozenset(), [])


def test_one_that_neither_answers_nor_goes_is_gone_when_the_tunnel_is_closed(rig: Rigs, fake: FakeCloudflared,
                                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    one = rig(quick(leaves="never"))
    one.until(RUNNING)
    fake.turn("ready", "drip")
    one.clock.advance(5)
    join = one.tunnel._thread.join
    monkeypatch.setattr(one.tunnel._thread, "join", lambda seconds: join(min(seconds, 0.2)))
    wait_until((fake.folder / "dripping").exists)            # the look at it is under way, and would go on for minutes
    one.tunnel.close()
    assert (alive(fake), one.tunnel._thread.is_alive(), one.tunnel.state, one.noted) == ([], False, "stopped", {})
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cloudflared-log")]


def test_a_tunnel_that_rests_or_never_began_is_closed_at_once(rig: Rigs, fake: FakeCloudflared) -> None:
    one = rig(FAILURES["html"])
    one.until(BACKOFF)
    one.tunnel.close()
    never = Rig(Path(fake.folder), lambda config: None, one.clock, ["quic"], "")
    never.tunnel.close()
    assert never.tunnel.state == one.tunnel.state == cab.TunnelState.STOPPED


def test_an_error_of_ours_does_not_end_the_watch(rig: Rigs, fake: FakeCloudflared) -> None:
    failed: List[int] = []

    def install(config: cab.Config) -> Any:
        class Install:
            def get(self, is_stopping: Any) -> Path:
                failed.append(1)
                if len(failed) == 1:
                    raise ZeroDivisionError("cab-" + "0" * 64)
                return fake.path
        return Install()
    one = rig(install=install)
    wait_until(lambda: one.said)
    assert "ZeroDivisionError" in one.said[0] and "0" * 64 not in one.said[0]
    details = one.until(RUNNING)
    assert (details["url"], details["starts"], len(one.said)) == (URL, 1, 1)


# --- named tunnels ---

OURS = ingress(("a.example.com", "http://localhost:80"), ("b.example.com", "http://localhost:3456"))


@pytest.mark.parametrize("public_url, config, url, complaint", [
    ("https://bridge.example.com/", OURS, "https://bridge.example.com", None),
    ("", OURS, "https://b.example.com", None),
    ("https://bridge.example.com", ingress(("bridge.example.com", "http://localhost:8080")), "https://bridge.example.com",
     "bridge.example.com -> http://localhost:8080"),
    ("", ingress(), None, "(it has: * -> http_status:404)"),
    ("", ingress(("*.example.com", "http://localhost:3456")), None, "*.example.com -> http://localhost:3456; * -> http_status:404"),
])
def test_a_named_tunnel_has_its_address_from_the_setting_or_the_configuration(
        rig: Rigs, fake: FakeCloudflared, public_url: str, config: Any, url: Optional[str], complaint: Optional[str]) -> None:
    one = rig(named(config), token=TUNNEL_TOKEN, protocols=["auto"], public_url=public_url)
    details = one.until(RUNNING)
    assert (details["url"], details["protocol"], details["starts"]) == (url, "auto", 1)
    assert one.announced == ([url] if url else [])
    assert one.tunnel.hosts >= ({cab.host_of(url)} if url else set())
    wrong = [line for line in one.said if "no public hostname in its configuration has the service http://localhost:3456 (it has" in line]
    assert [line for line in wrong if str(complaint) in line] == wrong and len(wrong) == (1 if complaint else 0)
    if not url:
        assert "--public-url" in one.said[-1]
    start = fake.starts()[0]
    assert start["env"]["TUNNEL_TOKEN"] == TUNNEL_TOKEN and start["argv"][-1] == "run" and TUNNEL_TOKEN not in " ".join(start["argv"])


def test_a_configuration_that_comes_after_the_connection_is_awaited(rig: Rigs, fake: FakeCloudflared) -> None:
    one = rig(named(), token=TUNNEL_TOKEN, protocols=["auto"])
    one.until(RUNNING)
    assert one.tunnel.details()["url"] is None
    fake.turn("config.json", json.dumps(OURS))               # the clock stands: without an address it is looked at in each round
    wait_until(lambda: one.announced == ["https://b.example.com"])
    assert not [line for line in one.said if "in its configuration" in line]


def test_a_named_tunnel_that_never_connects_gets_three_minutes_then_a_pause(rig: Rigs, fake: FakeCloudflared) -> None:
    one = rig(named(connects=False), token=TUNNEL_TOKEN, protocols=["auto"])
    one.addressed()
    one.clock.advance(179)
    assert one.until(STARTING)["starts"] == 1
    one.clock.advance(1)
    assert "no connection by auto within 180 s" in one.until(BACKOFF)["error"] and alive(fake) == []


# --- how it is got ---

class FileServer(ThreadingHTTPServer):
    """Serves downloads on the loopback. answer: what each request gets; asked: the paths, in order."""

    def __init__(self, answer: Callable[["FileHandler"], None]) -> None:
        super().__init__(("127.0.0.1", 0), FileHandler)
        self.daemon_threads = False                          # closing it waits for its threads
        self.answer, self.asked, self.sent, self.stopping = answer, [], 0, threading.Event()   # type: ignore[var-annotated]
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
        self.server.asked.append(self.path)
        with contextlib.suppress(ConnectionError):
            self.server.answer(self)
        self.close_connection = True

    def do_POST(self) -> None:
        self.do_GET()

    def begin(self, length: Optional[int] = None, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({} if length is None else {"Content-Length": str(length)}, headers)[length is None or bool(headers)].items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.server.sent += len(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def whole(data: bytes) -> Callable[[FileHandler], None]:
    def answer(handler: FileHandler) -> None:
        handler.begin(len(data))
        handler.write(data)
    return answer


def broken_off(data: bytes) -> Callable[[FileHandler], None]:
    def answer(handler: FileHandler) -> None:
        handler.begin(len(data))
        handler.write(data[:-3])
    return answer


def endless(handler: FileHandler) -> None:
    handler.begin()
    while not handler.server.stopping.is_set() and handler.server.sent < 30_000_000:     # longer than any reader should read
        handler.write(b"x" * 1_000)


def slow(data: bytes) -> Callable[[FileHandler], None]:
    """Half of it at once, the rest byte by byte."""
    def answer(handler: FileHandler) -> None:
        handler.begin(len(data))
        handler.write(data[:len(data) // 2])
        for byte in data[len(data) // 2:]:
            if handler.server.stopping.wait(0.02):
                return
            handler.write(bytes([byte]))
    return answer


def status(number: int) -> Callable[[FileHandler], None]:
    return lambda handler: handler.begin(0, number)


def redirected(data: bytes) -> Callable[[FileHandler], None]:
    """As GitHub does: the file is somewhere else."""
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
    """serve(answer) -> a FileServer."""
    made: List[FileServer] = []
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)

    def make(answer: Callable[[FileHandler], None]) -> FileServer:
        made.append(FileServer(answer))
        return made[-1]

    yield make
    for each in made:
        each.close()


def tgz(*members: Tuple[str, bytes, bytes]) -> bytes:
    """An archive of (name, type, content); a link's content is where it points."""
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


class Got(NamedTuple):
    """An install, its server, and what it said."""
    install: cab.CloudflaredInstall
    server: FileServer
    folder: Path
    said: List[Tuple[str, bool]]


PROGRAM = b"#!/bin/sh\necho good\n" + b"# filled\n" * 300
SWAPPED = PROGRAM.replace(b"good", b"evil")
ARCHIVE = tgz(("cloudflared", tarfile.REGTYPE, PROGRAM))
Downloads = Callable[..., Got]


@pytest.fixture
def download(tmp_path: Path, serve: Servers, monkeypatch: pytest.MonkeyPatch) -> Downloads:
    """download(answer, pinned, program=..., path=..., clock=..., **settings) -> a Got. pinned: the right file; program: what is in it."""
    def make(answer: Callable[[FileHandler], None], pinned: bytes = PROGRAM, program: bytes = b"", path: str = "/nowhere",
             clock: Optional[cab.Clock] = None, **settings: Any) -> Got:
        asset = cab.Asset("cloudflared-test" + (".tgz" if program else ""), len(pinned), sha256(pinned), sha256(program) if program else "")
        monkeypatch.setattr(cab, "cloudflared_asset", lambda system, machine: asset)
        server, said = serve(answer), []                     # type: Tuple[FileServer, List[Tuple[str, bool]]]
        config = cab.Config(**{"data_dir": tmp_path / "data", "cloudflared_url": server.url + "/", **settings})
        install = cab.CloudflaredInstall(config, {"PATH": path}, clock or cab.Clock(), lambda text, passes: said.append((text, passes)))
        return Got(install, server, tmp_path / "data" / "bin", said)
    return make


def never() -> bool:
    return False


def files(folder: Path) -> List[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("answer, pinned, program", [
    (whole(PROGRAM), PROGRAM, b""), (redirected(PROGRAM), PROGRAM, b""), (slow(PROGRAM[:10]), PROGRAM[:10], b""),
    (whole(ARCHIVE), ARCHIVE, PROGRAM),
], ids=["plain", "redirected", "slow", "archive"])
def test_the_right_file_is_put_in_place_and_nothing_else_stays(download: Downloads, answer: Any, pinned: bytes, program: bytes) -> None:
    got = download(answer, pinned, program)
    path = got.install.get(never)
    assert (path, path.read_bytes(), mode(path)) == (got.folder / "cloudflared", program or pinned, 0o755)
    assert files(got.folder) == ["cloudflared"] and mode(got.folder) == 0o700
    assert got.server.asked[0] == "/download/%s/cloudflared-test%s" % (cab.CLOUDFLARED_VERSION, ".tgz" if program else "")
    assert got.install.get(never) == path and len(got.server.asked) == (2 if "elsewhere" in got.server.asked[-1] else 1)


def ruined(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("answer, words", [
    pytest.param(whole(PROGRAM[:-1]), "broke off after %d of %d bytes" % (len(PROGRAM) - 1, len(PROGRAM)), id="short"),
    pytest.param(broken_off(PROGRAM), "broke off", id="broken off"),
    pytest.param(whole(b""), "broke off after 0", id="empty"),
    pytest.param(endless, "larger than the %d bytes" % len(PROGRAM), id="endless"),
    pytest.param(whole(PROGRAM + b"x"), "larger than", id="too long"),
    pytest.param(status(404), "404", id="not there"), pytest.param(status(500), "500", id="error"),
    pytest.param(lambda handler: handler.begin(None, 302, Location="/again"), "302", id="redirected for ever"),
    pytest.param(raw(b""), "", id="no answer"),
    pytest.param(raw(b"nonsense\r\n\r\n"), "", id="no HTTP"),
    pytest.param(raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n400\r\nabc"), "", id="half a chunk"),
])
def test_a_download_that_fails_leaves_nothing_and_may_be_tried_again(download: Downloads, answer: Any, words: str) -> None:
    got = download(answer)
    with pytest.raises((OSError, http.client.HTTPException)) as caught:
        got.install.get(never)
    if isinstance(caught.value, urllib.error.HTTPError):
        caught.value.close()
    assert words in str(caught.value) and files(got.folder) == []
    assert got.server.sent < 20_000_000                      # the buffers of the system are full before an endless one is left
    got.server.answer = whole(PROGRAM)
    assert got.install.get(never).read_bytes() == PROGRAM and files(got.folder) == ["cloudflared"]


def test_a_server_that_is_gone_is_an_error_that_may_pass(download: Downloads) -> None:
    got = download(whole(PROGRAM))
    got.server.close()
    with pytest.raises(OSError):
        got.install.get(never)
    assert files(got.folder) == []


def test_a_download_ends_with_the_bridge(download: Downloads) -> None:
    got = download(slow(PROGRAM))
    with pytest.raises(OSError, match="stopped"):
        got.install.get(lambda: got.server.sent > len(PROGRAM) // 2 + 3)
    assert files(got.folder) == [] and got.server.sent < len(PROGRAM) // 2 + 50


def test_a_download_that_takes_too_long_is_broken_off(download: Downloads, clock: FakeClock) -> None:
    def stop() -> bool:
        clock.advance(100)
        return False
    got = download(slow(PROGRAM), clock=clock)
    with pytest.raises(OSError, match="stopped"):
        got.install.get(stop)
    assert files(got.folder) == [] and cab.DOWNLOAD_SECONDS <= clock.at - FakeClock().at <= cab.DOWNLOAD_SECONDS + 200


@pytest.mark.parametrize("answer, pinned, program", [
    (whole(SWAPPED), PROGRAM, b""), (whole(ruined(PROGRAM)), PROGRAM, b""), (whole(ruined(ARCHIVE)), ARCHIVE, PROGRAM),
    (whole(tgz(("cloudflared", tarfile.REGTYPE, SWAPPED))), tgz(("cloudflared", tarfile.REGTYPE, SWAPPED)), PROGRAM),
], ids=["swapped", "one bit", "archive", "program in it"])
def test_a_file_with_the_wrong_sum_is_not_kept_and_the_owner_is_told_what_to_do(download: Downloads, answer: Any, pinned: bytes,
                                                                                 program: bytes) -> None:
    got = download(answer, pinned, program)
    with pytest.raises(cab.CannotTunnel) as caught:
        got.install.get(never)
    assert "it was not run" in str(caught.value) and "--cloudflared PATH" in caught.value.hint
    assert files(got.folder) == [] and got.install.ours() is None


FILE, LINK, HARD = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE
DEVICE, PIPE, FOLDER = tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE


@pytest.mark.parametrize("members, is_taken", [
    ([("cloudflared", FILE, PROGRAM)], True),
    ([("README", FILE, b"x"), ("cloudflared", FILE, PROGRAM), ("../evil", FILE, b"x"), ("/tmp/evil", FILE, b"x")], True),
    ([("cloudflared", LINK, b"/bin/sh"), ("cloudflared", FILE, PROGRAM)], True),
    ([], False), ([("README", FILE, b"x")], False), ([("cloudflared", LINK, b"/bin/sh")], False),
    ([("cloudflared", HARD, b"/bin/sh")], False), ([("../cloudflared", FILE, PROGRAM)], False), ([("/cloudflared", FILE, PROGRAM)], False),
    ([("bin/cloudflared", FILE, PROGRAM)], False),
    ([("cloudflared", DEVICE, b"")], False), ([("cloudflared", PIPE, b"")], False), ([("cloudflared", FOLDER, b"")], False),
    ([("cloudflared", FILE, b"0" * 20_000)], False),
])
def test_only_the_regular_member_of_that_name_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_taken: bool,
                                                          members: List[Tuple[str, bytes, bytes]]) -> None:
    monkeypatch.setattr(cab, "UNPACKED_BYTES", 10_000)
    (tmp_path / "in" / "deep").mkdir(parents=True)
    archive, target = tmp_path / "in" / "a.tgz", tmp_path / "in" / "deep" / "program"
    archive.write_bytes(tgz(*members))
    if is_taken:
        cab.unpack_program(archive, target)
        assert target.read_bytes() == PROGRAM and files(tmp_path) == ["in", "in/a.tgz", "in/deep", "in/deep/program"]
    else:
        with pytest.raises(cab.CannotTunnel):
            cab.unpack_program(archive, target)
        assert files(tmp_path) == ["in", "in/a.tgz", "in/deep"]


UNEVEN = b"".join(hashlib.sha256(b"%d" % number).digest() for number in range(4_000))      # does not get smaller when packed
PACKED = tgz(("cloudflared", FILE, UNEVEN))


@pytest.mark.parametrize("data", [
    b"", b"no archive", PACKED[:200], PACKED[:-2_000], b"\x1f\x8b" + b"\xff" * 50])
def test_an_archive_that_cannot_be_read_is_said(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tgz").write_bytes(data)
    with pytest.raises(cab.CannotTunnel):
        cab.unpack_program(tmp_path / "a.tgz", tmp_path / "program")


def test_a_file_that_is_no_longer_the_downloaded_one_is_downloaded_anew(download: Downloads) -> None:
    got = download(whole(PROGRAM))
    path = got.install.get(never)
    for number, spoil in enumerate([lambda: path.write_bytes(SWAPPED), lambda: path.write_bytes(PROGRAM[:-1]), path.unlink], 2):
        spoil()
        assert got.install.ours() is None
        assert got.install.get(never).read_bytes() == PROGRAM and len(got.server.asked) == number
    (got.folder / "tmpabc.part").mkdir()
    (got.folder / "tmpabc.part" / "download").write_bytes(PROGRAM[:99])
    path.unlink()
    got.install.get(never)
    assert files(got.folder) == ["cloudflared"]              # what a killed bridge left is gone, too


def test_the_owner_s_program_is_taken_as_it_is(download: Downloads, tmp_path: Path) -> None:
    owners = tmp_path / "own"
    owners.mkdir()
    (owners / "cloudflared").write_bytes(SWAPPED)
    (owners / "cloudflared").chmod(0o755)
    for got in (download(whole(PROGRAM), path=str(owners)), download(whole(PROGRAM), cloudflared=str(owners / "cloudflared"))):
        assert got.install.get(never) == owners / "cloudflared" and got.server.asked == [] and not got.folder.exists()


def test_an_owner_s_program_that_is_not_there_is_not_replaced_by_another(download: Downloads, tmp_path: Path) -> None:
    got = download(whole(PROGRAM), cloudflared=str(tmp_path / "missing"))
    with pytest.raises(cab.CannotTunnel) as caught:
        got.install.get(never)
    assert str(tmp_path / "missing") in str(caught.value) and "--cloudflared" in caught.value.hint and got.server.asked == []


def test_a_system_without_a_file_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab.platform, "machine", lambda: "riscv64")
    install = cab.CloudflaredInstall(cab.Config(data_dir=tmp_path), {"PATH": "/nowhere"}, cab.Clock(), lambda text, passes: None)
    with pytest.raises(cab.CannotTunnel) as caught:
        install.get(never)
    assert "riscv64" in str(caught.value) and "--cloudflared PATH" in caught.value.hint and "--no-tunnel" in caught.value.hint


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_said(download: Downloads, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o500)
    with pytest.raises(cab.CannotTunnel, match="cannot be used"):
        download(whole(PROGRAM)).install.get(never)


def test_the_progress_is_told_once_per_percent(download: Downloads) -> None:
    def answer(handler: FileHandler) -> None:
        """The second half byte by byte, each when the one before was told."""
        handler.begin(100)
        handler.write(PROGRAM[:50])
        for number in range(50, 100):
            while got.said[-1] != ("Downloading cloudflared: %d %%" % number, True):
                if handler.server.stopping.wait(0.001):
                    return
            handler.write(PROGRAM[number:number + 1])
    got = download(answer, PROGRAM[:100])
    got.install.get(never)
    passing = [text for text, passes in got.said if passes]
    assert passing == ["Downloading cloudflared: %d %%" % number for number in range(50, 101)]
    lasting = [text for text, passes in got.said if not passes]
    assert len(lasting) == 2 and cab.CLOUDFLARED_VERSION in lasting[0] and str(got.folder) in lasting[1]


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_progress_is_one_line_on_a_terminal_and_eleven_elsewhere(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    screen = (Terminal if is_terminal else io.TextIOWrapper)(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stderr", screen)
    console = cab.Console()
    console.progress("Downloading cloudflared 2026.8.2 (37 MB)...", False)
    for number in range(101):
        console.progress("Downloading cloudflared: %d %%" % number, True)
    console.progress("cloudflared is installed in /data/bin", False)
    screen.flush()
    shown = screen.buffer.getvalue().decode()                # type: ignore[attr-defined]
    lines = shown.split("\n")
    assert lines[-1] == "" and "Downloading cloudflared 2026.8.2" in lines[0] and "is installed in /data/bin" in lines[-2]
    if is_terminal:
        assert len(lines) == 4 and lines[1].count("\r") == 101 and "installed" not in lines[1]
        assert "\r  📥  Downloading cloudflared: 37 %\r" in lines[1]
    else:
        assert lines[1:-2] == ["Downloading cloudflared: %d %%" % number for number in range(0, 101, 10)] and "\r" not in shown


def test_what_follows_a_download_that_broke_off_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stderr", screen)
    console = cab.Console()
    console.progress("Downloading cloudflared: 37 %", True)
    console.log("The tunnel failed: it broke off.")
    screen.flush()
    assert not re.search("37 %[^\n\r]*The tunnel failed", screen.buffer.getvalue().decode())   # type: ignore[attr-defined]


def pinned_fake(fake: FakeCloudflared) -> bytes:
    """The fake as a file to be downloaded; it also runs from elsewhere."""
    return fake.path.read_bytes() + b"# 0\n"


def test_a_tunnel_with_a_wrong_download_is_given_up_and_never_runs_it(rig: Rigs, download: Downloads, fake: FakeCloudflared) -> None:
    data = pinned_fake(fake)
    got = download(whole(data[:-2] + b"1\n"), data)
    one = rig(install=lambda config: got.install, cloudflared="")
    details = one.until(FATAL)
    assert "SHA-256" in details["error"] and "--cloudflared PATH" in details["error"] and details["starts"] == 0
    assert one.said == ["The tunnel failed: %s. The bridge serves locally; the tunnel is given up." % details["error"]]
    one.clock.advance(100_000)
    assert (one.until(FATAL)["state"], len(got.server.asked), fake.runs(), files(got.folder)) == (FATAL, 1, [], [])


@pytest.mark.parametrize("answer, reason", [(status(503), "HTTP Error 503: Service Unavailable"), (raw(b"nonsense\r\n\r\n"), "nonsense")])
def test_a_download_that_fails_is_tried_again_after_a_pause(rig: Rigs, download: Downloads, fake: FakeCloudflared, answer: Any,
                                                            reason: str) -> None:
    got = download(answer, pinned_fake(fake))
    one = rig(install=lambda config: got.install, cloudflared="", cloudflared_url=got.server.url)
    details = one.until(BACKOFF)
    assert details["error"].startswith("cloudflared could not be downloaded from %s: " % got.server.url) and reason in details["error"]
    assert (details["retryInSeconds"], details["starts"]) == (5, 0)
    got.server.answer = whole(pinned_fake(fake))
    one.clock.advance(5)
    assert one.until(RUNNING)["url"] == URL and [start["argv"][0] for start in fake.starts()] == ["tunnel"]


@pytest.mark.parametrize("url", ["http://[", "http://127.0.0.1:port", "http://127.0.0.1:1"])
def test_a_download_from_a_wrong_address_is_said_and_tried_again(rig: Rigs, download: Downloads, url: str) -> None:
    got = download(whole(PROGRAM), cloudflared_url=url)
    one = rig(install=lambda config: got.install, cloudflared="", cloudflared_url=url)
    first = one.until(BACKOFF)
    assert first["error"].startswith("cloudflared could not be downloaded from %s: " % url) and files(got.folder) == []
    one.clock.advance(5)
    wait_until(lambda: len(one.said) == 2)
    second = one.until(BACKOFF)
    assert (second["error"], first["retryInSeconds"], second["retryInSeconds"]) == (first["error"], 5, 15)


def test_a_program_that_may_not_be_kept_is_no_reason_to_give_up(rig: Rigs, fake: FakeCloudflared) -> None:
    class Install:
        def get(self, is_stopping: Any) -> Path:
            raise PermissionError(13, "Permission denied")
    one = rig(install=lambda config: Install(), cloudflared_url="http://127.0.0.1:1")
    assert one.until(BACKOFF)["error"] == "cloudflared could not be downloaded from http://127.0.0.1:1: [Errno 13] Permission denied"


def test_a_long_download_does_not_count_as_a_start_that_failed(rig: Rigs, fake: FakeCloudflared, clock: FakeClock) -> None:
    class Install:
        def get(self, is_stopping: Any) -> Path:
            clock.advance(31)
            return fake.path
    one = rig(quick(connects="quic"), install=lambda config: Install())
    details = one.until(RUNNING)
    assert (details["starts"], details["protocol"], one.said, one.announced) == (1, "quic", [], [URL])


def test_closing_a_tunnel_ends_its_download(rig: Rigs, download: Downloads, fake: FakeCloudflared) -> None:
    got = download(slow(pinned_fake(fake)), pinned_fake(fake))
    one = rig(install=lambda config: got.install, cloudflared="")
    wait_until(lambda: files(got.folder) and got.server.sent > 50)
    one.tunnel.close()
    assert one.tunnel.state == cab.TunnelState.STOPPED and files(got.folder) == [] and fake.runs() == []


# --- a whole bridge ---

@pytest.fixture
def tunnelled(bridge: Bridges, fake: FakeCloudflared) -> Bridges:
    """tunnelled(*steps, **settings) -> a bridge whose tunnel is the fake."""
    def start(*steps: Step, **settings: Any) -> RunningBridge:
        if steps:
            fake.plan(*steps)
        running = bridge(**{"no_tunnel": False, "cloudflared": str(fake.path), "spare": 0, **settings})
        assert running.bridge.tunnel
        running.bridge.tunnel._stopping = Impatient()
        return running
    return start


def tunnel_of(api: Api) -> Dict[str, Any]:
    """What an admin is told of it."""
    return dict(api.get("/api/status").json["tunnel"])


def until(api: Api, **wanted: Any) -> Dict[str, Any]:
    """-> what an admin is told, once it says this."""
    return dict(wait_until(lambda: (lambda told: all(told[name] == value for name, value in wanted.items()) and told)(tunnel_of(api))))


@pytest.mark.parametrize("step, state", [(FAILURES["refused"], BACKOFF), (FAILURES["flag"], FATAL), (HANGING, STARTING)])
def test_the_bridge_serves_locally_though_the_tunnel_does_not(tunnelled: Bridges, fake: FakeCloudflared, step: Step, state: str) -> None:
    running = tunnelled(step)
    told = until(running.admin, state=state, starts=1)
    assert running.admin.answer("hello")["response"] == "Echo: hello"
    assert told["url"] is None and (told["retryInSeconds"] in (4, 5, 6, None)) and bool(told["error"]) is (state != STARTING)
    assert "tunnel" not in Api(running.port).get("/api/status").json
    lines = [line for line in running.log if "The bridge serves locally" in line]
    assert len(lines) == (0 if state == STARTING else 1)
    assert running.admin.get("/health").status == 200


@only_linux
def test_the_protocol_that_worked_is_tried_first_after_a_restart(tmp_path: Path, fake: FakeCloudflared, monkeypatch: pytest.MonkeyPatch,
                                                                 fake_claude: Callable[..., FakeClaude]) -> None:
    config = cab.Config(port=0, data_dir=tmp_path / "data", cloudflared=str(fake.path), claude=str(fake_claude().path), spare=0)
    claude = cab.find_claude(config, {"PATH": os.environ["PATH"], "HOME": str(tmp_path)})
    fake.plan(quick(connects="http2"))
    for number, protocols in ((0, ["quic", "http2"]), (1, ["quic", "http2", "http2"])):
        monkeypatch.setattr(cab, "CONNECT_SECONDS", 30 if number else 0.3)
        log: List[str] = []
        announced: List[Tuple[str, Optional[str]]] = []
        with cab.Bridge(config, claude, cab.Clock(), log.append, "", lambda *told: announced.append(told)) as bridge:
            bridge.serve()
            wait_until(lambda: announced == [(URL, None)])   # the same address again is no change
        assert [start["argv"][start["argv"].index("--protocol") + 1] for start in fake.starts()] == protocols and alive(fake) == []


@pytest.mark.parametrize("chosen", ["quic", "http2"])
def test_a_protocol_that_is_chosen_is_the_only_one(tunnelled: Bridges, fake: FakeCloudflared, monkeypatch: pytest.MonkeyPatch,
                                                   chosen: str) -> None:
    monkeypatch.setattr(cab, "LAST_CONNECT_SECONDS", 0.1)
    running = tunnelled(quick(connects=False), tunnel_protocol=chosen)
    assert until(running.admin, state=BACKOFF)["protocol"] == chosen
    assert [chosen in start["argv"] for start in fake.starts()] == [True]


# --- who may come in, and who it is ---

MACHINE = socket.gethostname()
HERE = ["localhost", "localhost:3456", "LocalHost:1", "localhost.", "127.0.0.1", "127.0.0.1:3456", "[::1]", "[::1]:3456", "192.168.1.5:80",
        "10.0.0.1", MACHINE, MACHINE.upper() + ":3456", MACHINE.partition(".")[0] + ".local", "own.example.com",
        "OWN.example.com.:8443", "second.example.com", "THIRD.example.com.:80", "fourth", ""]
STRANGE = ["evil.example", "evil.localhost.example", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.1.5.nip.io",
           "evil.example:3456", "foo-bar.trycloudflare.com.evil.example", "xfoo-bar.trycloudflare.com", "other.trycloudflare.com",
           "trycloudflare.com", "own.example.com@evil", "localhost@evil.example", "evil.example#localhost", "[evil.example]",
           "[::1].evil.example", "own.example.co", "a.own.example.com", "a.second.example.com", "localhost:evil"]


def served(api: Api, host: str) -> bool:
    """Whether the bridge answers by this name: to each method, and the page, too."""
    answers = [api.call(method, path, headers={"Host": host}) for method, path in (
        ("GET", "/health"), ("OPTIONS", "/api/ask"), ("GET", "/dashboard"), ("GET", "/"), ("POST", "/api/ask"), ("GET", "/nowhere"))]
    found = [answer.status for answer in answers]
    if 421 in found:
        assert found == [421] * 6 and {answer.json["code"] for answer in answers} == {"unknown_host"}
        name = re.sub(r":\d*$", "", host).rstrip(".").lower()
        assert all(answer.json["error"].endswith("start it with --names %s" % name) for answer in answers)
        assert "cab-" not in str([answer.data for answer in answers])
        return False
    assert found == [200, 204, 200, 200, 401, 404]
    return True


def test_the_bridge_answers_by_its_own_names_only(tunnelled: Bridges) -> None:
    running = tunnelled(public_url="https://own.example.com:8443/", names="second.example.com,Third.example.com, fourth,")
    until(running.admin, state=RUNNING)
    api = Api(running.port)
    assert [host for host in HERE + ["foo-bar.trycloudflare.com", "FOO-BAR.trycloudflare.com.:443"] if not served(api, host)] == []
    assert [host for host in STRANGE if served(api, host)] == []
    assert "x" * 100 in api.get("/health", headers={"Host": "x" * 5_000}).json["error"] and len(api.get("/health", headers={
        "Host": "x" * 5_000}).data) < 500


def test_without_a_tunnel_no_tunnel_s_name_is_ours(bridge: Bridges) -> None:
    api = bridge(spare=0).admin
    assert served(api.with_token(None), "localhost") and not served(api.with_token(None), "foo-bar.trycloudflare.com")


def test_the_tunnel_s_name_is_ours_only_while_it_runs(tunnelled: Bridges, fake: FakeCloudflared, clock: FakeClock) -> None:
    running = tunnelled(quick(), quick("new-one"), clock=clock)
    until(running.admin, state=RUNNING)
    api = Api(running.port)
    assert served(api, "foo-bar.trycloudflare.com") and not served(api, "new-one.trycloudflare.com")
    fake.turn("die", "1")
    until(running.admin, state=BACKOFF)
    assert not served(api, "foo-bar.trycloudflare.com")
    clock.advance(10)
    until(running.admin, state=RUNNING, url=OTHER_URL)
    assert served(api, "new-one.trycloudflare.com") and not served(api, "foo-bar.trycloudflare.com")


def one_of(api: Api, host: str, *told: str, peer: str = "127.0.0.1") -> int:
    """A request by this name from this peer. told: whom Cloudflare names. -> status."""
    with socket.create_connection(("127.0.0.1", api.port), 10, (peer, 0)) as connection:
        lines = ["GET /health HTTP/1.1", "Host: " + host, *("CF-Connecting-IP: " + each for each in told), "Connection: close", "", ""]
        connection.sendall("\r\n".join(lines).encode())
        return int(connection.makefile("rb").readline().split()[1])


THROUGH = "foo-bar.trycloudflare.com"


@only_linux
def test_each_client_of_the_tunnel_has_limits_of_its_own(tunnelled: Bridges, clock: FakeClock) -> None:
    running = tunnelled(clock=clock, rate_limit=2)
    wait_until(lambda: running.bridge.tunnel and running.bridge.tunnel.hosts)
    api = Api(running.port)
    for address in ("203.0.113.1", "203.0.113.2", "2001:db8::1"):
        assert [one_of(api, THROUGH, address) for _ in range(3)] == [200, 200, 429]
    # These all count as 127.0.0.1: no address, two of them, another name, no word of Cloudflare.
    assert [one_of(api, THROUGH, "unknown"), one_of(api, THROUGH, "203.0.113.7", "203.0.113.8")] == [200, 200]
    assert [one_of(api, THROUGH, "'; --"), one_of(api, "localhost", "203.0.113.9"), one_of(api, "127.0.0.1:80", "203.0.113.9"),
            one_of(api, THROUGH)] == [429] * 4
    # A peer from elsewhere cannot say who it is.
    assert [one_of(api, THROUGH, "203.0.113.%d" % number, peer="127.0.0.2") for number in (11, 12, 13)] == [200, 200, 429]


def test_without_our_tunnel_nobody_names_a_client(bridge: Bridges, clock: FakeClock) -> None:
    running = bridge(clock=clock, rate_limit=2, spare=0, public_url=URL)
    assert [one_of(Api(running.port), THROUGH, "203.0.113.%d" % number) for number in (1, 2, 3)] == [200, 200, 429]


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_a_local_peer_is_believed_by_each_of_its_addresses(peer: str) -> None:
    names = cab.HostPolicy(through_tunnel=lambda: frozenset([THROUGH]))
    request = cab.Request("GET", "/", {}, {"host": THROUGH.upper() + ".:443", "cf-connecting-ip": "203.0.113.1"}, peer, lambda: b"")
    assert names.address(request) == "203.0.113.1"


# --- as a program ---

PATCHED = SHORT + """
cab.TUNNEL_BACK_OFF_SECONDS, cab.READY_SECONDS, cab.CLOSE_SECONDS = (0.1,) * 5, 0.1, 0.8
class Impatient(cab.threading.Event):
    def wait(self, timeout=None):
        return super().wait(min(timeout or 0.0, 0.02))
init = cab.Tunnel.__init__
def impatient(tunnel, *told):
    init(tunnel, *told)
    tunnel._stopping = Impatient()
cab.Tunnel.__init__ = impatient
%s
"""


IMPOLITE = """
stop = cab.Cloudflared.stop
cab.Cloudflared.stop = lambda child, grace: stop(child, min(grace, 0.2))
"""


class TunnelProgram(Program):
    """The bridge as a person starts it; what it prints after its local address is read without waiting."""

    def __init__(self, command: List[str], environ: Mapping[str, str], folder: Path) -> None:
        super().__init__(command, environ, folder)
        assert self.process.stdout
        os.set_blocking(self.process.stdout.fileno(), False)
        self._printed = ""

    def public(self) -> List[str]:
        """The lines that it printed since."""
        pipe = self.process.stdout
        if pipe and not pipe.closed:
            self._printed += (pipe.read() or b"").decode()
        return self._printed.split("\n")[:-1]

    def fares(self, token: str, **wanted: Any) -> Dict[str, Any]:
        return until(Api(self.port, token), **wanted)


@pytest.fixture
def start(tmp_path: Path, fake: FakeCloudflared, fake_claude: Callable[..., FakeClaude]) -> Iterator[Programs]:
    """start(*flags, patch=..., environ=...) -> a TunnelProgram, with the fake in --cloudflared. patch: code that makes it quicker."""
    started: List[TunnelProgram] = []
    claude = fake_claude()

    def make(*flags: str, patch: Optional[str] = "", environ: Optional[Mapping[str, str]] = None) -> TunnelProgram:
        command = IMPORTED if patch is None else imported(PATCHED % patch)
        environment = {"PATH": "/nowhere", "HOME": str(tmp_path), "LANG": "C.UTF-8", **(environ or {})}
        started.append(TunnelProgram([*command, "start", "--port", "0", "--data-dir", str(tmp_path / "data"), "--claude", str(claude.path),
                                      "--spare", "0", "--cloudflared", str(fake.path), *flags], environment, tmp_path))
        return started[-1]

    yield make
    for each in started:
        if each.process.poll() is None:
            each.end(signal.SIGKILL)
        elif each.process.stdout:
            each.process.stdout.close()
    wait_until(lambda: not alive(fake))


def test_one_start_gives_a_public_address_with_the_exact_command_and_a_clean_environment(start: Programs, fake: FakeCloudflared,
                                                                                         tmp_path: Path) -> None:
    secrets = {"TUNNEL_NAME": "x", "TUNNEL_LOGLEVEL": "error", "NO_AUTOUPDATE": "1", "GITHUB_TOKEN": "x", "AWS_SECRET_ACCESS_KEY": "x",
               "ANTHROPIC_API_KEY": "x", "CAB_RATE_LIMIT": "7", "NOTIFY_SOCKET": "/x", "DB_PASSWORD": "x"}
    running = start(patch=None, environ={**secrets, "EDITOR": "vi"})
    wait_until(lambda: running.public() == [URL])
    told = running.fares(running.token, state=RUNNING)
    assert (told["url"], told["starts"], told["protocol"], told["error"]) == (URL, 1, "quic", None) and told["since"].endswith("Z")
    assert len(running.lines) == 2 and running.lines[-1] == "http://localhost:%d" % running.port
    assert running.stderr.count("Public URL: %s\n" % URL) == 1 and "Dashboard: %s/dashboard" % URL in running.stderr
    assert fake.starts()[0]["argv"] == ["tunnel", "--config", str(tmp_path / "data" / "cloudflared.yml"), "--no-autoupdate", "--metrics",
                                        "127.0.0.1:0", "--grace-period", "5s", "--protocol", "quic",
                                        "--url", "http://127.0.0.1:%d" % running.port]
    assert (tmp_path / "data" / "cloudflared.yml").read_text() == "{}\n" and mode(tmp_path / "data" / "cloudflared.yml") == 0o600
    seen = fake.starts()[0]["env"]
    assert {name for name in seen if not name.startswith("__")} == {"PATH", "HOME", "LANG", cab.OWNER_ENV_VAR}
    assert running.end(signal.SIGTERM) == 0 and "Traceback" not in running.stderr and alive(fake) == []


def test_a_changed_address_is_told_with_the_one_before_also_after_a_restart(start: Programs, fake: FakeCloudflared) -> None:
    fake.plan(quick(), quick("new-one"), quick("third"), quick("third"))
    first = start()
    wait_until(lambda: first.public() == [URL])
    fake.turn("die", "1")
    wait_until(lambda: first.public() == [URL, OTHER_URL])
    assert "Public URL: %s (it was %s before; tell your clients)\n" % (OTHER_URL, URL) in first.stderr
    assert first.fares(first.token, state=RUNNING)["url"] == OTHER_URL and "the end was near" in first.stderr
    assert first.end(signal.SIGTERM) == 0
    second = start()
    wait_until(lambda: second.public() == ["https://third.trycloudflare.com"])
    assert "Public URL: https://third.trycloudflare.com (it was %s before; tell your clients)\n" % OTHER_URL in second.stderr
    assert second.end(signal.SIGINT) == 0
    third = start()
    wait_until(lambda: third.public() == ["https://third.trycloudflare.com"])
    assert "before" not in third.stderr.partition("Public URL")[2]
    assert third.fares(first.token, state=RUNNING)["starts"] == 1


@pytest.mark.parametrize("leaves", [0, "never"], ids=["willing", "stubborn"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGKILL, marks=only_linux)])
def test_no_cloudflared_is_left_at_an_end(start: Programs, fake: FakeCloudflared, number: int, leaves: Any) -> None:
    fake.plan(quick(leaves=leaves))
    running = start(patch=IMPOLITE if leaves == "never" else "")
    wait_until(lambda: running.public() == [URL])
    assert len(alive(fake)) == 1
    status = running.end(number)
    if number == signal.SIGKILL:
        wait_until(lambda: not alive(fake))
    else:
        assert (status, alive(fake), len(fake.client_disconnected())) == (0, [], 0 if leaves == "never" else 1)
        assert "Traceback" not in running.stderr


@pytest.mark.parametrize("step", [HANGING, quick(connects=False)], ids=["no address", "no connection"])
def test_no_cloudflared_is_left_at_an_end_during_its_start(start: Programs, fake: FakeCloudflared, step: Step) -> None:
    fake.plan(step)
    running = start()
    wait_until(lambda: alive(fake))
    assert (running.end(signal.SIGTERM), alive(fake), running.public()) == (0, [], [])


@only_linux
def test_what_a_killed_bridge_left_is_ended_by_the_next_start(start: Programs, fake: FakeCloudflared) -> None:
    first = start(patch="cab.PR_SET_PDEATHSIG = 0")          # as on a system without it
    wait_until(lambda: first.public() == [URL])
    left = alive(fake)
    first.end(signal.SIGKILL)
    assert len(left) == 1 and is_running(left[0])
    second = start(patch="cab.tagged = lambda tag: []")      # and without environments to look into
    assert not is_running(left[0]) and "After an unclean end: 1 processes ended" in second.stderr
    wait_until(lambda: second.public() == [URL])
    assert second.fares(first.token, state=RUNNING)["starts"] == 1 and len(alive(fake)) == 1


@only_linux
def test_only_the_very_process_that_was_noted_is_ended(bridge: Bridges, tmp_path: Path) -> None:
    started = [subprocess.Popen([sys.executable, "-S", "-c", "import time\ntime.sleep(60)"]) for _ in range(3)]
    noted, other_program, other_start = started
    try:
        when = {each.pid: cab.started_at(each.pid) for each in started}
        program = cab.program_of(noted.pid)
        (tmp_path / "data").mkdir()
        with contextlib.closing(cab.Database(tmp_path / "data" / "bridge.db", cab.Clock())) as store:
            store.record_process(noted.pid, when[noted.pid], program)
            store.record_process(other_program.pid, when[other_program.pid], "/usr/bin/cloudflared")
            store.record_process(other_start.pid, "%s0" % when[other_start.pid], program)
        running = bridge(spare=0)
        assert noted.wait(20) == -signal.SIGKILL
        assert [each.poll() for each in started[1:]] == [None] * 2
        assert [line for line in running.log if "1 processes ended" in line]
        with contextlib.closing(sqlite3.connect(str(tmp_path / "data" / "bridge.db"))) as db:
            assert db.execute("SELECT count(*) FROM children WHERE pid IN (?, ?, ?)", [each.pid for each in started]).fetchone() == (0,)
    finally:
        for each in started:
            each.kill()
            each.wait()


def pin(data: bytes) -> str:
    """Code by which a program expects this file."""
    return "cab.ASSETS.update((each, cab.Asset('cloudflared-test', %d, %r)) for each in list(cab.ASSETS))" % (len(data), sha256(data))


def test_a_download_that_was_killed_is_begun_anew_and_leaves_nothing(start: Programs, serve: Servers, fake: FakeCloudflared,
                                                                     tmp_path: Path) -> None:
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
    assert files(folder) == ["cloudflared"] and mode(folder / "cloudflared") == 0o755 and mode(folder) == 0o700
    told = [line for line in second.stderr.splitlines() if "cloudflared" in line]
    assert told[0].startswith("Downloading cloudflared %s (0 MB)" % cab.CLOUDFLARED_VERSION)
    assert told[-1] == "cloudflared is installed in %s" % folder
    assert "Downloading cloudflared: 100 %" in told
    assert second.end(signal.SIGTERM) == 0
    third = start(*flags, patch=pin(data))
    wait_until(lambda: third.public() == [URL])
    assert len(server.asked) == 2 and "Downloading" not in third.stderr


def test_a_download_ends_with_the_program(start: Programs, serve: Servers, fake: FakeCloudflared, tmp_path: Path) -> None:
    data = pinned_fake(fake)
    server, folder = serve(slow(data)), tmp_path / "data" / "bin"
    running = start("--cloudflared", "", "--cloudflared-url", server.url, patch=pin(data))
    wait_until(lambda: folder.exists() and files(folder))
    assert running.end(signal.SIGTERM, 20) == 0 and files(folder) == [] and "Traceback" not in running.stderr


def test_a_cloudflared_in_path_is_taken(start: Programs, fake: FakeCloudflared, tmp_path: Path) -> None:
    running = start("--cloudflared", "", "--cloudflared-url", "http://127.0.0.1:1", environ={"PATH": str(fake.folder)})
    wait_until(lambda: running.public() == [URL])
    assert not (tmp_path / "data" / "bin").exists() and "Downloading" not in running.stderr


# --- a named tunnel, as a program ---

def holds(folder: Path, secret: str) -> List[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("is_file", [True, False], ids=["file", "variable"])
def test_a_named_tunnel_takes_its_token_from_a_file_or_the_environment_and_shows_it_nowhere(
        start: Programs, fake: FakeCloudflared, tmp_path: Path, is_file: bool) -> None:
    (tmp_path / "token").write_text(TUNNEL_TOKEN + "\n")
    fake.plan(named(ingress(("bridge.example.com", "http://localhost:8080"))))
    flags = ("--tunnel-token-file", "~/token") if is_file else ()
    running = start("--public-url", "https://bridge.example.com/", *flags, environ={} if is_file else {"CAB_TUNNEL_TOKEN": TUNNEL_TOKEN})
    wait_until(lambda: running.public() == ["https://bridge.example.com"])
    assert "has the service http://localhost:%d (it has: bridge.example.com -> http://localhost:8080; " % running.port in running.stderr
    told = running.fares(running.token, state=RUNNING)
    assert (told["url"], told["protocol"]) == ("https://bridge.example.com", "auto")
    only = fake.starts()[0]
    assert only["argv"] == ["tunnel", "--config", str(tmp_path / "data" / "cloudflared.yml"), "--no-autoupdate", "--metrics", "127.0.0.1:0",
                            "--grace-period", "5s", "run"]
    assert {name for name in only["env"] if not name.startswith("__")} == {"PATH", "HOME", "LANG", "TUNNEL_TOKEN", cab.OWNER_ENV_VAR}
    assert only["env"]["TUNNEL_TOKEN"] == TUNNEL_TOKEN
    assert TUNNEL_TOKEN not in running.stderr + str(running.api.get("/api/status").json)
    if sys.platform == "linux":
        assert not [pid for pid in (running.process.pid, only["pid"]) if TUNNEL_TOKEN in Path("/proc/%d/cmdline" % pid).read_text()]
    assert running.end(signal.SIGTERM) == 0 and holds(tmp_path / "data", TUNNEL_TOKEN) == []


@pytest.mark.parametrize("step, words", [(FAILURES["token"], "Provided Tunnel token is not valid."), (named(connects=False), "")])
def test_a_token_that_cloudflare_refuses_is_not_repeated_either(start: Programs, fake: FakeCloudflared, step: Step, words: str) -> None:
    fake.plan(step)
    running = start(environ={"CAB_TUNNEL_TOKEN": TUNNEL_TOKEN})
    told = running.fares(running.token, state=FATAL if words else STARTING)
    assert words in (told["error"] or "") and TUNNEL_TOKEN not in running.stderr + str(told) and running.public() == []
    assert running.end(signal.SIGTERM) == 0 and alive(fake) == []


BAD = ["hunter2hunter2", TUNNEL_TOKEN[:-9], encoded({"a": "hunter2", "t": "hunter2"})]


@pytest.mark.parametrize("text", BAD)
def test_a_bad_token_is_refused_wherever_it_comes_from(tmp_path: Path, text: str) -> None:
    (tmp_path / "token").write_text(text)
    for path, environ in ((str(tmp_path / "token"), {}), ("", {"CAB_TUNNEL_TOKEN": text})):
        with pytest.raises(cab.WrongSetting) as caught:
            cab.find_tunnel_token(cab.Config(tunnel_token_file=path), environ)
        assert text not in str(caught.value) and "hunter2" not in str(caught.value)


@pytest.mark.parametrize("text, from_file", [(BAD[0], True), (BAD[2], False)], ids=["file", "variable"])
def test_a_bad_token_is_one_sentence_and_status_2(tmp_path: Path, fake: FakeCloudflared, fake_claude: Callable[..., FakeClaude], text: str,
                                                  from_file: bool) -> None:
    (tmp_path / "token").write_text(text)
    flags = ["--tunnel-token-file", str(tmp_path / "token")] if from_file else []
    done = run_cli("start", "--port", "0", "--data-dir", str(tmp_path / "data"), "--claude", str(fake_claude().path),
                   "--cloudflared", str(fake.path), *flags, home=tmp_path, environ={} if from_file else {"CAB_TUNNEL_TOKEN": text})
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, done.stdout, len(errors), fake.runs()) == (2, "", 1, [])
    assert text not in done.stderr and "hunter2" not in done.stderr
    assert not (tmp_path / "data" / "bridge.db").exists()


@pytest.mark.parametrize("environ", [{}, {"CAB_TUNNEL_TOKEN": TUNNEL_TOKEN}])
@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_token_file_is_refused(tmp_path: Path, text: str, environ: Mapping[str, str]) -> None:
    (tmp_path / "token").write_text(text)
    with pytest.raises(cab.WrongSetting, match="The tunnel token is not one"):
        cab.find_tunnel_token(cab.Config(tunnel_token_file=str(tmp_path / "token")), environ)
    assert cab.find_tunnel_token(cab.Config(), {"CAB_TUNNEL_TOKEN": text}) == ""


def test_a_token_file_that_cannot_be_read_is_said(tmp_path: Path, fake_claude: Callable[..., FakeClaude]) -> None:
    done = run_cli("start", "--port", "0", "--data-dir", str(tmp_path / "data"), "--claude", str(fake_claude().path), "--tunnel-token-file",
                   str(tmp_path / "missing"), home=tmp_path)
    assert done.returncode == 1 and str(tmp_path / "missing") in done.stderr and "hint: check --tunnel-token-file" in done.stderr


@pytest.mark.parametrize("flags, named_flag", [
    (["--tunnel-protocol", "http3"], "--tunnel-protocol"), (["--public-url", "bridge.example.com"], "--public-url"),
    (["--public-url", "https://x.example/path"], "--public-url"), (["--cloudflared-url", "ftp://x"], "--cloudflared-url"),
])
def test_a_wrong_setting_of_the_tunnel_is_one_sentence(tmp_path: Path, flags: List[str], named_flag: str) -> None:
    done = run_cli("start", "--data-dir", str(tmp_path / "data"), *flags, home=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: %s cannot be " % named_flag)
    assert not (tmp_path / "data").exists()


# --- what is printed ---

@pytest.mark.parametrize("before", [None, URL])
def test_an_address_is_announced_on_both_outputs(capsys: pytest.CaptureFixture[str], before: Optional[str]) -> None:
    cab.Console().announce(OTHER_URL, before)
    out, err = capsys.readouterr()
    assert out == OTHER_URL + "\n" and ("it was %s before" % before in err) is bool(before) and "%s/dashboard" % OTHER_URL in err


# --- the real cloudflared ---

@pytest.mark.skipif(not os.environ.get("CAB_TEST_CLOUDFLARED"), reason="no real cloudflared: name one in CAB_TEST_CLOUDFLARED")
def test_the_real_cloudflared_gets_an_address_and_is_not_announced_without_a_connection(rig: Rigs, serve: Servers, tmp_path: Path) -> None:
    body = {"success": True, "errors": [], "result": {"id": str(uuid.uuid4()), "name": "foo-bar", "hostname": "foo-bar.trycloudflare.com",
                                                      "account_tag": "0" * 32, "secret": base64.b64encode(b"s" * 32).decode()}}
    service = serve(whole(json.dumps(body).encode()))
    with socket.create_server(("127.0.0.1", 0)) as edge:     # nobody answers there, and the other one refuses
        wrapper = tmp_path / "wrapper"
        wrapper.write_text('#!/bin/sh\nfirst=$1\nshift\nexec %s "$first" --quick-service http://127.0.0.1:%d --edge 127.0.0.1:%d'
                           ' --edge 127.0.0.2:9 "$@"\n' % (shlex.quote(os.environ["CAB_TEST_CLOUDFLARED"]), service.server_port,
                                                           edge.getsockname()[1]))
        wrapper.chmod(0o755)
        one = rig(cloudflared=str(wrapper))
        wait_until(lambda: one.tunnel._child and one.tunnel._child.host == "foo-bar.trycloudflare.com", 30)
        child = one.tunnel._child
        wait_until(lambda: child and child.ask("/ready")[0] == 503, 30)
        assert child and child.ask("/quicktunnel") == (200, {"hostname": "foo-bar.trycloudflare.com"})
        assert service.asked == ["/tunnel"] and (one.tunnel.state, one.announced, one.said) == (STARTING, [], [])
        one.tunnel.close()
        assert not is_running(child.pid)
