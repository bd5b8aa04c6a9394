"""The command `doctor`: its checks, its output and exit status, and that it changes nothing."""

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

# What the fixtures `fake_claude` and `doctor` return.
Fakes = Callable[..., FakeClaude]
Doctor = Callable[..., "Report"]
NAMES = [
    "python", "sqlite", "data", "disk", "clock", "processes", "port", "claude", "payer",
    "cloudflared", "tunnel",
]


class Report(NamedTuple):
    """The result of one `doctor`. checks: by name, in order."""

    status: int
    out: str
    err: str
    checks: Dict[str, Dict[str, Any]]

    def of(self, name: str) -> Tuple[Optional[bool], str, Optional[str]]:
        """Return (ok, text, advice) of a check."""
        check = self.checks[name]
        return check["ok"], check["text"], check["advice"]

    @property
    def bad(self) -> List[str]:
        """The names of the failed checks."""
        return [name for name, check in self.checks.items() if check["ok"] is False]


@pytest.fixture
def doctor(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    fake_claude: Fakes,
) -> Doctor:
    """Return run(*words, text=False, **variables) -> Report, with its own home and PATH.

    text: print text instead of JSON; the report then has no checks.
    """
    for name in [
        name for name in os.environ if re.match("CAB_|PORT$|ANTHROPIC_|CLAUDE_|TUNNEL_", name)
    ]:
        monkeypatch.delenv(name)
    claude = fake_claude()
    for name, value in (
        ("HOME", str(tmp_path)),
        ("PATH", "/nowhere"),
        ("CAB_DATA_DIR", str(tmp_path / "data")),
        ("CAB_PORT", "0"),
        ("CAB_CLAUDE", str(claude.path)),
    ):
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
        assert all(
            check["ok"] is not False or check["advice"]
            for check in checks.values()
            if check["name"] != "tunnel"
        )
        return Report(status, out, err, checks)

    return run


@pytest.fixture
def cloudflared(tmp_path: Path) -> FakeCloudflared:
    return FakeCloudflared(tmp_path / "own")


# --- a good machine ---


def test_on_a_good_machine_every_check_is_ok(doctor: Doctor, cloudflared: FakeCloudflared) -> None:
    report = doctor("--cloudflared", str(cloudflared.path))
    assert (report.status, report.err, list(report.checks), report.bad) == (0, "", NAMES, [])
    assert [name for name in NAMES if report.checks[name]["ok"] is not True] == []
    assert report.of("python")[1] == "%d.%d.%d" % sys.version_info[:3]
    assert report.of("sqlite")[1] == sqlite3.sqlite_version
    assert "127.0.0.1" in report.of("port")[1]
    assert "2.1.330 (Claude Code)" in report.of("claude")[1]
    assert report.of("payer")[1] == "Claude Max subscription"
    assert report.of("tunnel")[1].startswith("quick")
    assert [start["argv"] for start in cloudflared.runs()] == [["version", "--short"]]


def test_an_old_sqlite_is_refused_by_the_doctor_and_by_a_start(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cab.sqlite3, "sqlite_version_info", (3, 14, 2))
    monkeypatch.setattr(cab, "SQLITE_VERSION", "3.14.2")
    report = doctor("--no-tunnel")
    text = "This Python uses SQLite 3.14.2, which is too old: 3.15 or newer is needed."
    assert report.of("sqlite") == (False, text, "use another Python, such as one of python.org")
    assert report.status == 1
    with pytest.raises(cab.CannotStart, match="too old"):
        cab.Stores(tmp_path / "bridge.db", cab.Clock())


def test_the_text_has_a_line_for_each_check_and_an_arrow_for_advice(
    doctor: Doctor, cloudflared: FakeCloudflared
) -> None:
    report = doctor(
        "--cloudflared", str(cloudflared.path), "--claude", "/nowhere/claude", text=True
    )
    lines = report.out.splitlines()
    assert (report.status, report.err) == (1, "")
    marks = {line.split()[1]: line.split()[0] for line in lines if not line.startswith(" ")}
    assert marks == {name: "!!" if name == "claude" else "ok" for name in NAMES if name != "payer"}
    after = lines[[line.split()[1] for line in lines].index("claude") + 1]
    assert after.strip().startswith("-> ") and "install" in after


def test_without_a_tunnel_cloudflared_is_not_checked(doctor: Doctor) -> None:
    report = doctor("--no-tunnel")
    assert report.status == 0
    assert report.of("tunnel")[:2] == (None, "off (--no-tunnel)")
    assert "cloudflared" not in report.checks
    assert "0.0.0.0" in report.of("port")[1]
    assert re.search(r"^--  tunnel +off", doctor("--no-tunnel", text=True).out, re.MULTILINE)


def test_the_program_prints_only_json(tmp_path: Path, fake_claude: Fakes) -> None:
    words = ("doctor", "--no-tunnel", "--port", "0", "--data-dir", str(tmp_path / "data"))
    good = run_cli(*words, "--json", "--claude", str(fake_claude().path), home=tmp_path)
    assert (good.returncode, good.stderr, json.loads(good.stdout)["ok"]) == (0, "", True)
    bad = run_cli(*words, "--json", "--claude", "/nowhere/claude", home=tmp_path)
    assert (bad.returncode, bad.stderr, json.loads(bad.stdout)["ok"]) == (1, "", False)
    wrong = run_cli(*words, "--tunnel-protocol", "http3", home=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: --tunnel-protocol")


# --- claude ---


def with_claude(
    doctor: Doctor, fake: FakeClaude, *words: str, text: bool = False, **variables: str
) -> Report:
    """Run `doctor` without a tunnel and with this CLI."""
    return doctor("--no-tunnel", "--claude", str(fake.path), *words, text=text, **variables)


def test_a_missing_claude_is_reported(doctor: Doctor) -> None:
    report = doctor("--no-tunnel", "--claude", "/nowhere/claude")
    ok, text, advice = report.of("claude")
    assert (report.status, report.bad, ok) == (1, ["claude"], False)
    assert "/nowhere/claude" in text
    assert "install" in str(advice)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"auth": {"loggedIn": False}}, "not signed in"),
        ({"version": "2.0.75 (Claude Code)"}, "too old"),
        ({"version": "hello"}, "does not answer"),
        ({"flags": "--tools"}, "lacks"),
    ],
)
def test_an_unusable_claude_is_reported(
    doctor: Doctor, fake_claude: Fakes, options: Mapping[str, Any], words: str
) -> None:
    report = with_claude(doctor, fake_claude(**options))
    assert (report.status, report.bad) == (1, ["claude"])
    assert words in report.of("claude")[1]
    assert "payer" not in report.checks


def test_a_billed_api_key_is_a_failure_unless_it_is_allowed(
    doctor: Doctor, fake_claude: Fakes
) -> None:
    fake = fake_claude(
        auth={"loggedIn": True, "apiKeySource": "ANTHROPIC_API_KEY", "subscriptionType": "max"}
    )
    report = with_claude(doctor, fake)
    assert (report.status, report.bad) == (1, ["payer"])
    assert "ANTHROPIC_API_KEY" in report.of("payer")[1]
    assert "billed per token" in report.of("payer")[1]
    assert "--allow-api-key" in str(report.of("payer")[2])
    allowed = with_claude(doctor, fake, "--allow-api-key")
    assert (allowed.status, allowed.of("payer")[0]) == (0, True)
    assert "billed per token" in allowed.of("payer")[1]


@pytest.mark.parametrize("missing", sorted(cab.NEEDED_FLAGS))
def test_a_claude_without_a_needed_flag_is_a_failure_that_names_the_flag(
    doctor: Doctor, fake_claude: Fakes, missing: str
) -> None:
    flags = " ".join(flag for flag in FLAGS.split() if flag != missing)
    report = with_claude(doctor, fake_claude(flags=flags))
    assert (report.status, report.bad) == (1, ["claude"])
    assert re.search(r"lacks %s\W*$" % re.escape(missing), report.of("claude")[1])
    assert "update" in str(report.of("claude")[2])


def test_a_shared_settings_folder_of_claude_is_a_note(
    doctor: Doctor, fake_claude: Fakes, tmp_path: Path
) -> None:
    (tmp_path / ".claude.json").touch()
    fake = fake_claude(version="2.1.330 (Claude Code)")
    # This CLI is not signed in with a settings folder of the bridge's own.
    condition = "import os, sys\nif 'auth' in sys.argv and 'CLAUDE_CONFIG_DIR' in os.environ:\n"
    fake.script.write_text(condition + "    sys.exit(1)\n" + fake.script.read_text())
    report = with_claude(doctor, fake, text=True)
    assert report.status == 0
    assert re.search("^ok  claude ", report.out, re.MULTILINE)
    assert re.search("^--  claude .*settings folder", report.out, re.MULTILINE)


def test_the_demo_needs_no_claude(doctor: Doctor) -> None:
    report = doctor("--no-tunnel", "--demo", CAB_CLAUDE="/nowhere/claude")
    assert (report.status, report.bad) == (0, [])


# --- data and port ---


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_reported(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    report = doctor("--no-tunnel", "--data-dir", str(tmp_path / "closed" / "data"))
    assert report.status == 1
    assert report.of("data")[0] is False
    assert "--data-dir" in str(report.of("data")[2])


def test_a_file_in_place_of_the_folder_is_reported(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    report = doctor("--no-tunnel")
    assert report.status == 1
    assert report.of("data")[0] is False
    assert str(tmp_path / "data") in report.of("data")[1]


def overwrite(path: Path, spoil: Callable[[bytes], bytes]) -> None:
    """Replace a file's content by what `spoil` makes of it."""
    path.write_bytes(spoil(path.read_bytes()))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"no database at all, " * 100,
        lambda data: data[:4096] + b"\xff" * (len(data) - 4096), lambda data: data[:6000],
    ],
    ids=["text", "overwritten", "cut"],
)
def test_a_corrupt_database_is_reported_and_unchanged(
    doctor: Doctor, tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "bridge.db"
    cab.Stores(path, cab.Clock()).close()
    assert doctor("--no-tunnel").of("data")[0] is True
    overwrite(path, spoil)
    before = path.read_bytes()
    report = doctor("--no-tunnel")
    _, text, advice = report.of("data")
    assert (report.status, report.bad) == (1, ["data"])
    assert str(path) in text
    assert advice
    assert path.read_bytes() == before


def test_a_database_of_a_newer_version_is_reported(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with contextlib.closing(sqlite3.connect(str(tmp_path / "data" / "bridge.db"))) as db:
        db.execute("PRAGMA user_version = 99")
    assert doctor("--no-tunnel").bad == ["data"]


def test_a_port_in_use_is_reported(doctor: Doctor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        report = doctor("--port", str(port), "--no-tunnel", "--host", "127.0.0.1")
    assert (report.status, report.bad) == (1, ["port"])
    _, text, advice = report.of("port")
    assert text.startswith("%d on 127.0.0.1 " % port)
    assert "--port" in str(advice)


def test_a_host_of_another_machine_is_reported(doctor: Doctor) -> None:
    report = doctor("--no-tunnel", "--host", "192.0.2.1")
    assert (report.status, report.bad) == (1, ["port"]) and "192.0.2.1" in report.of("port")[1]


def test_a_running_bridge_is_reported_and_not_disturbed(
    doctor: Doctor, bridge: Callable[..., RunningBridge]
) -> None:
    running = bridge(spare=0)
    report = doctor("--no-tunnel", "--host", "127.0.0.1", "--port", str(running.port))
    assert (report.status, report.bad, report.of("port")[0]) == (0, [], None)
    assert "process %d" % os.getpid() in report.of("port")[1]
    assert str(running.port) in report.of("port")[1]
    assert running.admin.answer("hello")["response"] == "Echo: hello"
    assert len(running.admin.get("/api/tokens").json["tokens"]) == 1


# --- the tunnel ---


def test_the_owner_s_cloudflared_is_reported_with_its_version_and_its_sum_is_not_checked(
    doctor: Doctor, cloudflared: FakeCloudflared
) -> None:
    for report in (
        doctor("--cloudflared", str(cloudflared.path)),
        doctor(PATH=str(cloudflared.folder), TUNNEL_NAME="x", GITHUB_TOKEN="x"),
    ):
        assert report.status == 0
        ok, text, _ = report.of("cloudflared")
        assert ok is True
        assert text.startswith("%s (%s)" % (cloudflared.path, VERSION))
        assert "not checked" in text
    assert not {"TUNNEL_NAME", "GITHUB_TOKEN"} & set(cloudflared.runs()[-1]["env"])


def test_a_cloudflared_without_a_version_is_a_failure(
    doctor: Doctor, cloudflared: FakeCloudflared
) -> None:
    cloudflared.path.write_text("#!/bin/sh\n")
    report = doctor("--cloudflared", str(cloudflared.path))
    assert (report.status, report.bad) == (1, ["cloudflared"])
    assert "--cloudflared PATH" in str(report.of("cloudflared")[2])


@pytest.mark.parametrize("text", [None, "#!/nowhere/sh\n"], ids=["missing", "cannot run"])
def test_a_cloudflared_that_cannot_be_run_is_a_failure(
    doctor: Doctor, cloudflared: FakeCloudflared, text: Optional[str]
) -> None:
    if text is None:
        cloudflared.path.unlink()
    else:
        cloudflared.path.write_text(text)
    report = doctor("--cloudflared", str(cloudflared.path))
    assert (report.status, report.bad) == (1, ["cloudflared"])
    assert str(cloudflared.path) in report.of("cloudflared")[1]


def test_the_advice_for_a_cloudflared_that_cannot_be_run_names_its_flag(
    doctor: Doctor, cloudflared: FakeCloudflared
) -> None:
    cloudflared.path.write_text("#!/nowhere/sh\n")
    assert "--cloudflared" in str(
        doctor("--cloudflared", str(cloudflared.path)).of("cloudflared")[2]
    )


def test_doctor_does_not_download_a_missing_cloudflared(doctor: Doctor, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mirror:
        mirror.setblocking(False)
        report = doctor("--cloudflared-url", "http://127.0.0.1:%d" % mirror.getsockname()[1])
        with pytest.raises(BlockingIOError):
            mirror.accept()
    ok, text, _ = report.of("cloudflared")
    assert (report.status, ok) == (0, None)
    assert "not here yet" in text
    assert cab.CLOUDFLARED_VERSION in text
    assert not (tmp_path / "data" / "bin").exists()


def test_a_downloaded_cloudflared_is_checked_and_a_damaged_one_counts_as_missing(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asset = cab.Asset("cloudflared-test", 4, hashlib.sha256(b"good").hexdigest())
    monkeypatch.setattr(cab, "cloudflared_asset", lambda system, machine: asset)
    (tmp_path / "data" / "bin").mkdir(parents=True)
    path = tmp_path / "data" / "bin" / "cloudflared"
    for data, ok, words in (
        (b"good", True, "SHA-256"),
        (b"evil", None, "not here yet"),
    ):
        path.write_bytes(data)
        report = doctor()
        assert (report.status, report.of("cloudflared")[0]) == (0, ok)
        assert words in report.of("cloudflared")[1]
        assert path.read_bytes() == data


def test_an_unreadable_file_fails_its_check_and_the_others_run(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cab, "sha256_of", fail)
    (tmp_path / "data" / "bin").mkdir(parents=True)
    path = tmp_path / "data" / "bin" / "cloudflared"
    path.write_bytes(b"unreadable")
    report = doctor()
    assert (report.status, report.err, report.bad, report.of("claude")[0]) == (
        1, "", ["tunnel"], True,
    )
    assert str(path) in report.of("tunnel")[1] and "--data-dir" in str(report.of("tunnel")[2])


def test_an_oserror_in_one_check_does_not_prevent_the_later_ones(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_data(config: cab.Config, environ: Mapping[str, str]) -> List[cab.Check]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(cab, "check_data", check_data)
    report = doctor("--no-tunnel")
    assert (report.status, report.bad, report.of("data")[1]) == (
        1, ["data"], "[Errno 5] Input/output error",
    )
    assert list(report.checks) == [
        "python", "sqlite", "data", "clock", "processes", "port", "claude", "payer", "tunnel",
    ]


def test_on_a_system_without_cloudflared_the_advice_names_its_flag(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cab.platform, "machine", lambda: "riscv64")
    report = doctor()
    assert (report.status, report.bad) == (1, ["cloudflared"])
    assert "--cloudflared PATH" in str(report.of("cloudflared")[2])


@pytest.mark.parametrize("text", BAD_TOKENS)
def test_a_bad_tunnel_token_is_reported_and_not_repeated(
    doctor: Doctor, cloudflared: FakeCloudflared, tmp_path: Path, text: str
) -> None:
    (tmp_path / "token").write_text(text, "utf-8")
    for report in (
        doctor("--cloudflared", str(cloudflared.path), CAB_TUNNEL_TOKEN=text),
        doctor(
            "--cloudflared", str(cloudflared.path), "--tunnel-token-file", str(tmp_path / "token")
        ),
    ):
        assert (report.status, report.bad) == (1, ["tunnel"])
        assert text not in (report.out + report.err).replace("eyJ", "").replace("==", "")


def test_an_empty_token_file_is_a_failure(
    doctor: Doctor, cloudflared: FakeCloudflared, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("\n")
    report = doctor(
        "--cloudflared", str(cloudflared.path), "--tunnel-token-file", str(tmp_path / "token")
    )
    assert (report.status, report.bad) == (1, ["tunnel"])
    assert "token" in report.of("tunnel")[1]


def test_a_missing_token_file_is_reported(doctor: Doctor, cloudflared: FakeCloudflared) -> None:
    report = doctor("--cloudflared", str(cloudflared.path), "--tunnel-token-file", "/nowhere/token")
    assert report.status == 1
    assert "/nowhere/token" in report.out
    assert "--tunnel-token-file" in report.out


def test_a_named_tunnel_needs_a_public_url(doctor: Doctor, cloudflared: FakeCloudflared) -> None:
    words = ("--cloudflared", str(cloudflared.path))
    report = doctor(*words, CAB_TUNNEL_TOKEN=TUNNEL_TOKEN)
    assert (report.status, report.of("tunnel")[0]) == (0, None)
    assert "--public-url" in report.of("tunnel")[1]
    report = doctor(
        *words, "--public-url", "https://bridge.example.com", CAB_TUNNEL_TOKEN=TUNNEL_TOKEN
    )
    assert (report.status, report.of("tunnel")[:2]) == (
        0, (True, "named, https://bridge.example.com"),
    )
    assert TUNNEL_TOKEN not in report.out and "TUNNEL_TOKEN" not in cloudflared.runs()[-1]["env"]


# --- clock, orphan processes, a question to the model ---


def test_a_clock_that_is_behind_is_reported(
    doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    with contextlib.closing(cab.Stores(tmp_path / "data" / "bridge.db", cab.Clock())) as store:
        store.jobs.enqueue(
            store.tokens.add(cab.NewToken(name="app"), cab.new_token()).id, cab.Ask("hello")
        )
    assert doctor("--no-tunnel").bad == []
    monkeypatch.setattr(cab.Clock, "now", staticmethod(lambda: time.time() - 3_600))
    report = doctor("--no-tunnel")
    assert (report.status, report.bad) == (1, ["clock"])
    assert "newest request" in report.of("clock")[1]
    assert "clock" in str(report.of("clock")[2])


@pytest.mark.skipif(sys.platform != "linux", reason="needs the environment of processes")
def test_orphan_processes_are_reported_and_not_ended(doctor: Doctor, tmp_path: Path) -> None:
    tag = cab.data_tag(tmp_path / "data") + ".claude.1."
    orphan = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], env={cab.OWNER_ENV_VAR: tag}
    )
    try:
        wait_until(lambda: cab.processes_tagged(tag))
        report = doctor("--no-tunnel")
        assert report.status == 0
        assert report.of("processes")[0] is None
        assert str(orphan.pid) in report.of("processes")[1]
        assert orphan.poll() is None
    finally:
        orphan.kill()
        orphan.wait()
    ok, _, advice = doctor("--no-tunnel").of("processes")
    assert (ok, advice) == (True, None)


def test_a_live_check_asks_the_model_once_and_leaves_no_files(
    doctor: Doctor, tmp_path: Path
) -> None:
    assert "live" not in doctor("--no-tunnel").checks
    report = doctor("--no-tunnel", "--live")
    assert report.status == 0
    text = report.of("live")[1]
    assert text.startswith("resolved-default-model ")
    assert "'Echo: Answer with the word: ready'" in text
    assert FakeClaude(tmp_path / "fake").prompts() == ["Answer with the word: ready"]
    assert not (tmp_path / "data").exists()


def test_a_failed_live_check_gives_advice_for_its_error_code(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = {
        "auth_required": "sign ", "usage_limit": "reset", "overloaded": "later",
        "cli_error": "claude -p hello",
    }
    for code, advice in failures.items():

        def fail(*words: Any) -> None:
            raise cab.RunFailed(code, "No: sk-ant-oat01-secret-of-the-owner")

        with monkeypatch.context() as patch:
            patch.setattr(cab.ClaudeRunner, "run", fail)
            report = doctor("--no-tunnel", "--live")
        assert (report.status, report.bad) == (1, ["live"])
        assert report.of("live")[1].startswith(code + ": No: sk-ant-oat01...")
        assert advice in str(report.of("live")[2])


# --- doctor changes nothing ---


def contents(folder: Path) -> Dict[str, bytes]:
    """Return every file and its bytes, except those of the CLI's home and the lock file."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "claude-home" and path.name != "bridge.lock"
    }


def test_an_old_database_is_not_migrated(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with contextlib.closing(sqlite3.connect(str(tmp_path / "data" / "bridge.db"))) as db:
        db.executescript(ORIGINAL_SCHEMA)
    before = contents(tmp_path / "data")
    assert doctor("--no-tunnel").bad == [] and contents(tmp_path / "data") == before
    with contextlib.closing(sqlite3.connect(str(tmp_path / "data" / "bridge.db"))) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (0,)


def test_a_database_of_an_earlier_start_is_unchanged(doctor: Doctor, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with contextlib.closing(cab.Stores(tmp_path / "data" / "bridge.db", cab.Clock())) as store:
        store.tokens.add(cab.NewToken(name="app"), cab.new_token())
    before = contents(tmp_path / "data")
    doctor("--no-tunnel")
    after = contents(tmp_path / "data")
    assert after["bridge.db"] == before["bridge.db"] and not after.get("bridge.db-wal")


def test_no_database_and_no_token_are_created(
    doctor: Doctor, tmp_path: Path, cloudflared: FakeCloudflared
) -> None:
    report = doctor("--cloudflared", str(cloudflared.path))
    assert report.status == 0 and contents(tmp_path / "data") == {} and "cab-" not in report.out


def test_a_missing_folder_is_not_created(doctor: Doctor, tmp_path: Path) -> None:
    doctor("--no-tunnel")
    assert not (tmp_path / "data").exists()
