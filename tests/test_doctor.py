"""Room 13, `doctor`: what it finds of all that a start needs, what it says and with which exit status, and that it changes nothing."""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

import pytest
from conftest import FakeClaude, RunningBridge, run_cli, wait_until
from fake_claude import FLAGS
from fake_cloudflared import VERSION, FakeCloudflared
from test_bridge import ORIGINAL_SCHEMA
from test_tunnel import BAD_TOKENS, TUNNEL_TOKEN

import claude_api_bridge as cab

Fakes = Callable[..., FakeClaude]                            # what the fixtures give
Typed = Callable[..., "Report"]
NAMES = ["python", "sqlite", "data", "disk", "clock", "processes", "port", "claude", "payer", "cloudflared", "tunnel"]


class Report(NamedTuple):
    """What one `doctor` says. checks: by name, in order."""
    status: int
    out: str
    err: str
    checks: Dict[str, Dict[str, Any]]

    def of(self, name: str) -> Tuple[Optional[bool], str, Optional[str]]:
        """-> (ok, text, advice) of a check."""
        check = self.checks[name]
        return check["ok"], check["text"], check["advice"]

    @property
    def bad(self) -> List[str]:
        return [name for name, check in self.checks.items() if check["ok"] is False]


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake_claude: Fakes) -> Typed:
    """doctor(*words, claude=..., **variables) -> its Report, as JSON unless `text` is true; a home and PATH of its own."""
    for name in [name for name in os.environ if re.match("CAB_|PORT$|ANTHROPIC_|CLAUDE_|TUNNEL_", name)]:
        monkeypatch.delenv(name)
    claude = fake_claude()
    for name, value in (("HOME", str(tmp_path)), ("PATH", "/nowhere"), ("CAB_DATA_DIR", str(tmp_path / "data")), ("CAB_PORT", "0"),
                        ("CAB_CLAUDE", str(claude.path))):
        monkeypatch.setenv(name, value)

    def run(*words: str, text: bool = False, **variables: str) -> Report:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            status = cab.main(["doctor", *words, *([] if text else ["--json"])])
        out, err = capsys.readouterr()
        body = {} if text else json.loads(out)
        assert text or body["ok"] is (status == 0)
        checks = {check["name"]: check for check in body.get("checks", ())}
        assert all(check["ok"] is not False or check["advice"] for check in checks.values() if check["name"] != "tunnel")
        return Report(status, out, err, checks)
    return run


@pytest.fixture
def cloudflared(tmp_path: Path) -> FakeCloudflared:
    return FakeCloudflared(tmp_path / "own")


# --- a machine on which all is well ---

def test_where_all_is_well_every_check_says_so(doctor: Typed, cloudflared: FakeCloudflared) -> None:
    report = doctor("--cloudflared", str(cloudflared.path))
    assert (report.status, report.err, list(report.checks), report.bad) == (0, "", NAMES, [])
    assert [name for name in NAMES if report.checks[name]["ok"] is not True] == []
    assert report.of("python")[1] == "%d.%d.%d" % sys.version_info[:3] and report.of("sqlite")[1] == sqlite3.sqlite_version
    assert report.of("port")[1] == "0 on 127.0.0.1 is free" and "2.1.330 (Claude Code)" in report.of("claude")[1]
    assert report.of("payer")[1] == "Claude Max subscription" and report.of("tunnel")[1].startswith("quick")
    assert [start["argv"] for start in cloudflared.runs()] == [["version", "--short"]]


def test_the_text_has_a_line_for_each_check_and_an_arrow_for_advice(doctor: Typed, cloudflared: FakeCloudflared) -> None:
    report = doctor("--cloudflared", str(cloudflared.path), "--claude", "/nowhere/claude", text=True)
    lines = report.out.splitlines()
    assert (report.status, report.err) == (1, "")
    marks = {line.split()[1]: line.split()[0] for line in lines if not line.startswith(" ")}
    assert marks == {name: "!!" if name == "claude" else "ok" for name in NAMES if name != "payer"}
    after = lines[[line.split()[1] for line in lines].index("claude") + 1]
    assert after.strip().startswith("-> ") and "install" in after


def test_without_a_tunnel_it_is_not_looked_for(doctor: Typed) -> None:
    report = doctor("--no-tunnel")
    assert (report.status, report.of("tunnel")[:2], "cloudflared" in report.checks) == (0, (None, "off (--no-tunnel)"), False)
    assert report.of("port")[1] == "0 on 0.0.0.0 is free"
    assert re.search(r"^--  tunnel +off", doctor("--no-tunnel", text=True).out, re.MULTILINE)


def test_as_a_program_only_json_is_printed(tmp_path: Path, fake_claude: Fakes) -> None:
    words = ("doctor", "--no-tunnel", "--port", "0", "--data-dir", str(tmp_path / "data"))
    good = run_cli(*words, "--json", "--claude", str(fake_claude().path), home=tmp_path)
    assert (good.returncode, good.stderr, json.loads(good.stdout)["ok"]) == (0, "", True)
    bad = run_cli(*words, "--json", "--claude", "/nowhere/claude", home=tmp_path)
    assert (bad.returncode, bad.stderr, json.loads(bad.stdout)["ok"]) == (1, "", False)
    wrong = run_cli(*words, "--tunnel-protocol", "http3", home=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "") and wrong.stderr.startswith("error: --tunnel-protocol")


# --- claude ---

def with_claude(doctor: Typed, fake: FakeClaude, *words: str, **variables: str) -> Report:
    return doctor("--no-tunnel", "--claude", str(fake.path), *words, **variables)


def test_no_claude_is_said(doctor: Typed) -> None:
    report = doctor("--no-tunnel", "--claude", "/nowhere/claude")
    ok, text, advice = report.of("claude")
    assert (report.status, report.bad, ok) == (1, ["claude"], False) and "/nowhere/claude" in text and "install it" in str(advice)


@pytest.mark.parametrize("options, words", [
    ({"auth": {"loggedIn": False}}, "not signed in"), ({"version": "2.0.75 (Claude Code)"}, "too old"),
    ({"version": "hello"}, "does not answer"), ({"flags": "--tools"}, "lacks"),
])
def test_a_claude_that_cannot_be_used_is_said(doctor: Typed, fake_claude: Fakes, options: Mapping[str, Any], words: str) -> None:
    report = with_claude(doctor, fake_claude(**options))
    assert (report.status, report.bad) == (1, ["claude"]) and words in report.of("claude")[1] and "payer" not in report.checks


def test_a_billed_key_is_bad_unless_it_is_allowed(doctor: Typed, fake_claude: Fakes) -> None:
    fake = fake_claude(auth={"loggedIn": True, "apiKeySource": "ANTHROPIC_API_KEY", "subscriptionType": "max"})
    report = with_claude(doctor, fake)
    assert (report.status, report.bad) == (1, ["payer"])
    assert report.of("payer")[1] == "an API key (ANTHROPIC_API_KEY), billed per token" and "--allow-api-key" in str(report.of("payer")[2])
    allowed = with_claude(doctor, fake, "--allow-api-key")
    assert (allowed.status, allowed.of("payer")[0]) == (0, True) and "billed per token" in allowed.of("payer")[1]


def test_a_flag_that_this_claude_lacks_is_worth_knowing(doctor: Typed, fake_claude: Fakes) -> None:
    lacking = sorted(cab.OPTIONAL_FLAGS)[0]
    report = with_claude(doctor, fake_claude(flags=" ".join(flag for flag in FLAGS.split() if flag != lacking)), text=True)
    assert report.status == 0 and re.search(r"^--  claude +This Claude Code lacks %s" % lacking, report.out, re.MULTILINE)


def test_the_demo_needs_no_claude(doctor: Typed) -> None:
    report = doctor("--no-tunnel", "--demo", CAB_CLAUDE="/nowhere/claude")
    assert (report.status, report.bad) == (0, [])


# --- data and port ---

@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_said(doctor: Typed, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    report = doctor("--no-tunnel", "--data-dir", str(tmp_path / "closed" / "data"))
    assert report.status == 1 and report.of("data")[0] is False and "--data-dir" in str(report.of("data")[2])


def test_a_file_in_place_of_the_folder_is_said(doctor: Typed, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    report = doctor("--no-tunnel")
    assert report.status == 1 and report.of("data")[0] is False and str(tmp_path / "data") in report.of("data")[1]


def pages(path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path.write_bytes(spoil(path.read_bytes()))


@pytest.mark.parametrize("spoil", [lambda data: b"no database at all, " * 100, lambda data: data[:4096] + b"\xff" * (len(data) - 4096),
                                   lambda data: data[:6000]], ids=["text", "overwritten", "cut"])
def test_a_damaged_database_is_said(doctor: Typed, tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "bridge.db"
    cab.Database(path, cab.Clock()).close()
    assert doctor("--no-tunnel").of("data")[0] is True
    pages(path, spoil)
    before = path.read_bytes()
    report = doctor("--no-tunnel")
    _, text, advice = report.of("data")
    assert (report.status, report.bad) == (1, ["data"]) and str(path) in text and "keeps a damaged file aside" in str(advice)
    assert path.read_bytes() == before


def test_a_database_of_a_newer_version_is_said(doctor: Typed, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with contextlib.closing(sqlite3.connect(str(tmp_path / "data" / "bridge.db"))) as db:
        db.execute("PRAGMA user_version = 99")
    assert doctor("--no-tunnel").bad == ["data"]


def test_a_port_that_is_taken_is_said(doctor: Typed) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        report = doctor("--port", str(port), "--no-tunnel", "--host", "127.0.0.1")
    assert (report.status, report.bad) == (1, ["port"])
    _, text, advice = report.of("port")
    assert text.startswith("%d on 127.0.0.1 cannot be used: " % port) and advice == "choose another one with --port"


def test_a_host_that_is_not_ours_is_said(doctor: Typed) -> None:
    report = doctor("--no-tunnel", "--host", "192.0.2.1")
    assert (report.status, report.bad) == (1, ["port"]) and "192.0.2.1" in report.of("port")[1]


def test_a_bridge_that_runs_is_named_and_not_disturbed(doctor: Typed, bridge: Callable[..., RunningBridge]) -> None:
    running = bridge(spare=0)
    report = doctor("--no-tunnel", "--host", "127.0.0.1", "--port", str(running.port))
    assert (report.status, report.bad, report.of("port")[0]) == (0, [], None)
    assert "process %d" % os.getpid() in report.of("port")[1] and str(running.port) in report.of("port")[1]
    assert running.admin.answer("hello")["response"] == "Echo: hello"
    assert len(running.admin.get("/api/tokens").json["tokens"]) == 1


# --- the tunnel ---

def test_an_own_cloudflared_is_told_with_its_version_and_not_checked(doctor: Typed, cloudflared: FakeCloudflared) -> None:
    for report in (doctor("--cloudflared", str(cloudflared.path)), doctor(PATH=str(cloudflared.folder), TUNNEL_NAME="x", GITHUB_TOKEN="x")):
        assert report.status == 0 and report.of("cloudflared")[:2] == (
            True, "%s (%s), your own, so its sum is not checked" % (cloudflared.path, VERSION))
    assert not {"TUNNEL_NAME", "GITHUB_TOKEN"} & set(cloudflared.runs()[-1]["env"])


def test_an_own_cloudflared_that_says_nothing_is_bad(doctor: Typed, cloudflared: FakeCloudflared) -> None:
    cloudflared.path.write_text("#!/bin/sh\n")
    report = doctor("--cloudflared", str(cloudflared.path))
    assert (report.status, report.bad) == (1, ["cloudflared"]) and "--cloudflared PATH" in str(report.of("cloudflared")[2])


@pytest.mark.parametrize("text", [None, "#!/nowhere/sh\n"], ids=["missing", "cannot run"])
def test_an_own_cloudflared_that_cannot_be_run_is_bad(doctor: Typed, cloudflared: FakeCloudflared, text: Optional[str]) -> None:
    if text is None:
        cloudflared.path.unlink()
    else:
        cloudflared.path.write_text(text)
    report = doctor("--cloudflared", str(cloudflared.path))
    assert (report.status, report.bad) == (1, ["cloudflared"]) and str(cloudflared.path) in report.of("cloudflared")[1]


def test_the_advice_about_a_cloudflared_that_cannot_be_run_is_about_cloudflared(doctor: Typed, cloudflared: FakeCloudflared) -> None:
    cloudflared.path.write_text("#!/nowhere/sh\n")
    assert "--cloudflared" in str(doctor("--cloudflared", str(cloudflared.path)).of("cloudflared")[2])


def test_no_cloudflared_will_be_downloaded_by_start_and_is_not_by_the_doctor(doctor: Typed, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mirror:
        mirror.setblocking(False)
        report = doctor("--cloudflared-url", "http://127.0.0.1:%d" % mirror.getsockname()[1])
        with pytest.raises(BlockingIOError):
            mirror.accept()
    ok, text, _ = report.of("cloudflared")
    assert (report.status, ok) == (0, None) and "not here yet" in text and cab.CLOUDFLARED_VERSION in text
    assert not (tmp_path / "data" / "bin").exists()


def test_a_downloaded_cloudflared_is_checked_and_a_damaged_one_is_as_none(doctor: Typed, tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    asset = cab.Asset("cloudflared-test", 4, hashlib.sha256(b"good").hexdigest())
    monkeypatch.setattr(cab, "cloudflared_asset", lambda system, machine: asset)
    (tmp_path / "data" / "bin").mkdir(parents=True)
    path = tmp_path / "data" / "bin" / "cloudflared"
    for data, ok, words in ((b"good", True, "SHA-256 as expected"), (b"evil", None, "not here yet")):
        path.write_bytes(data)
        report = doctor()
        assert (report.status, report.of("cloudflared")[0]) == (0, ok) and words in report.of("cloudflared")[1]
        assert path.read_bytes() == data


def test_what_cannot_be_read_is_a_broken_check_and_the_others_are_made(doctor: Typed, tmp_path: Path,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(cab, "sha256_of", fail)
    (tmp_path / "data" / "bin").mkdir(parents=True)
    path = tmp_path / "data" / "bin" / "cloudflared"
    path.write_bytes(b"unreadable")
    report = doctor()
    assert (report.status, report.err, report.bad, report.of("claude")[0]) == (1, "", ["tunnel"], True)
    assert str(path) in report.of("tunnel")[1] and "--data-dir" in str(report.of("tunnel")[2])


def test_an_oserror_of_an_earlier_check_does_not_hide_the_later_ones(doctor: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_data(config: cab.Config, environ: Mapping[str, str]) -> List[cab.Check]:
        raise OSError(5, "Input/output error")
    monkeypatch.setattr(cab, "check_data", check_data)
    report = doctor("--no-tunnel")
    assert (report.status, report.bad, report.of("data")[1]) == (1, ["data"], "[Errno 5] Input/output error")
    assert list(report.checks) == ["python", "sqlite", "data", "clock", "processes", "port", "claude", "payer", "tunnel"]


def test_a_system_without_cloudflared_is_told_what_to_do(doctor: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab.platform, "machine", lambda: "riscv64")
    report = doctor()
    assert (report.status, report.bad) == (1, ["cloudflared"]) and "--cloudflared PATH" in str(report.of("cloudflared")[2])


@pytest.mark.parametrize("text", BAD_TOKENS)
def test_a_bad_tunnel_token_is_said_without_repeating_it(doctor: Typed, cloudflared: FakeCloudflared, tmp_path: Path, text: str) -> None:
    (tmp_path / "token").write_text(text, "utf-8")
    for report in (doctor("--cloudflared", str(cloudflared.path), CAB_TUNNEL_TOKEN=text),
                   doctor("--cloudflared", str(cloudflared.path), "--tunnel-token-file", str(tmp_path / "token"))):
        assert (report.status, report.bad) == (1, ["tunnel"]) and text not in (report.out + report.err).replace("eyJ", "").replace("==", "")


def test_an_empty_token_file_is_bad(doctor: Typed, cloudflared: FakeCloudflared, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("\n")
    report = doctor("--cloudflared", str(cloudflared.path), "--tunnel-token-file", str(tmp_path / "token"))
    assert (report.status, report.bad) == (1, ["tunnel"]) and "token is not one" in report.of("tunnel")[1]


def test_a_token_file_that_is_missing_is_said(doctor: Typed, cloudflared: FakeCloudflared) -> None:
    report = doctor("--cloudflared", str(cloudflared.path), "--tunnel-token-file", "/nowhere/token")
    assert report.status == 1 and "/nowhere/token" in report.out and "check --tunnel-token-file" in report.out


def test_a_named_tunnel_wants_to_know_its_address(doctor: Typed, cloudflared: FakeCloudflared) -> None:
    words = ("--cloudflared", str(cloudflared.path))
    report = doctor(*words, CAB_TUNNEL_TOKEN=TUNNEL_TOKEN)
    assert (report.status, report.of("tunnel")[0]) == (0, None) and "--public-url" in report.of("tunnel")[1]
    report = doctor(*words, "--public-url", "https://bridge.example.com", CAB_TUNNEL_TOKEN=TUNNEL_TOKEN)
    assert (report.status, report.of("tunnel")[:2]) == (0, (True, "named, https://bridge.example.com"))
    assert TUNNEL_TOKEN not in report.out and "TUNNEL_TOKEN" not in cloudflared.runs()[-1]["env"]


# --- clock, left-over processes, a question to the model ---

def test_a_clock_that_went_back_is_told(doctor: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    with contextlib.closing(cab.Database(tmp_path / "data" / "bridge.db", cab.Clock())) as store:
        store.enqueue(store.add_token(cab.NewToken(name="kept"), cab.new_token()).id, cab.Ask("hello"))
    assert doctor("--no-tunnel").bad == []
    for seconds, words in ((3_600, "before the newest request was made"), (20 * 365 * 86_400, "before this program was made")):
        with monkeypatch.context() as patch:
            patch.setattr(cab.Clock, "now", staticmethod(lambda: time.time() - seconds))
            report = doctor("--no-tunnel")
        assert (report.status, report.bad) == (1, ["clock"]) and words in report.of("clock")[1]
        assert "set the clock" in str(report.of("clock")[2])


@pytest.mark.skipif(sys.platform != "linux", reason="finds them by their environment")
def test_what_a_killed_bridge_left_is_told_and_left_alone(doctor: Typed, tmp_path: Path) -> None:
    tag = cab.data_tag(tmp_path / "data") + ".claude.1."
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={cab.OWNER_ENV_VAR: tag})
    try:
        wait_until(lambda: cab.processes_tagged(tag))
        report = doctor("--no-tunnel")
        assert report.status == 0 and report.of("processes")[0] is None and str(left.pid) in report.of("processes")[1]
        assert left.poll() is None
    finally:
        left.kill()
        left.wait()
    assert doctor("--no-tunnel").of("processes") == (True, "none are left behind", None)


def test_a_live_round_trip_asks_the_model_once_and_leaves_nothing(doctor: Typed, tmp_path: Path) -> None:
    assert "live" not in doctor("--no-tunnel").checks
    report = doctor("--no-tunnel", "--live")
    assert report.status == 0 and re.match(r"resolved-default-model answered 'Echo: Answer with the word: ready' in \d", report.of("live")[1])
    assert FakeClaude(tmp_path / "fake").prompts() == ["Answer with the word: ready"] and not (tmp_path / "data").exists()


def test_a_live_round_trip_that_fails_says_what_to_do(doctor: Typed, fake_claude: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = {"auth_required": "sign claude in again", "usage_limit": "wait for the reset", "overloaded": "try again later",
                "cli_error": "claude -p hello"}
    for code, advice in failures.items():
        def fail(*words: Any) -> None:
            raise cab.RunFailed(code, "No: sk-ant-oat01-secret-of-the-owner")

        with monkeypatch.context() as patch:
            patch.setattr(cab.ClaudePool, "run", fail)
            report = doctor("--no-tunnel", "--live")
        assert (report.status, report.bad) == (1, ["live"]) and report.of("live")[1].startswith(code + ": No: sk-ant-oat01...")
        assert advice in str(report.of("live")[2])


# --- nothing is changed ---

def contents(folder: Path) -> Dict[str, bytes]:
    """Every file with its bytes, but for the account that claude is given, and the lock."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.parent.name != "claude-home" and path.name != "bridge.lock"}


def test_an_old_database_stays_as_it_is(doctor: Typed, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with contextlib.closing(sqlite3.connect(str(tmp_path / "data" / "bridge.db"))) as db:
        db.executescript(ORIGINAL_SCHEMA)
    before = contents(tmp_path / "data")
    assert doctor("--no-tunnel").bad == [] and contents(tmp_path / "data") == before
    with contextlib.closing(sqlite3.connect(str(tmp_path / "data" / "bridge.db"))) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (0,)


def test_a_database_in_use_before_stays_as_it_is(doctor: Typed, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with contextlib.closing(cab.Database(tmp_path / "data" / "bridge.db", cab.Clock())) as store:
        store.add_token(cab.NewToken(name="kept"), cab.new_token())
    before = contents(tmp_path / "data")
    doctor("--no-tunnel")
    after = contents(tmp_path / "data")
    assert after["bridge.db"] == before["bridge.db"] and not after.get("bridge.db-wal")


def test_no_database_and_no_token_are_made(doctor: Typed, tmp_path: Path, cloudflared: FakeCloudflared) -> None:
    report = doctor("--cloudflared", str(cloudflared.path))
    assert report.status == 0 and contents(tmp_path / "data") == {} and "cab-" not in report.out


def test_a_folder_that_is_not_there_is_not_made(doctor: Typed, tmp_path: Path) -> None:
    doctor("--no-tunnel")
    assert not (tmp_path / "data").exists()
