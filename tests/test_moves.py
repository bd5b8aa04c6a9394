"""Backups, moved and shared folders, forgotten sessions, and what keeps `claude` from starting."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import socket
import sqlite3
import stat
import sys
import threading
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, List, Mapping, Optional

import pytest

import claude_api_bridge as cab
from conftest import Api, FakeClaude, Program, RunningBridge, run_cli, wait_until

Start = Callable[..., RunningBridge]
Fakes = Callable[..., FakeClaude]
Programs = Callable[..., Program]
only_posix = pytest.mark.skipif(os.name != "posix", reason="shell scripts")


# --- backups ---


def test_a_backup_of_a_running_bridge_holds_all_that_was_accepted(
    bridge: Start, tmp_path: Path
) -> None:
    running, copy = bridge(), tmp_path / "copy.db"
    done = running.admin.done(running.admin.ask("say hi"))
    # An older copy.
    cab.Stores(copy, cab.Clock()).close()
    cab.backup_database(tmp_path / "data" / "bridge.db", copy)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.glob("copy*")) == ["copy.db"]
    (tmp_path / "restored").mkdir()
    shutil.copy(copy, tmp_path / "restored" / "bridge.db")
    stores = cab.Stores(tmp_path / "restored" / "bridge.db", cab.Clock())
    try:
        job = stores.jobs.get(done["requestId"])
        assert job and job.response == done["response"] and stores.tokens.has_admin()
    finally:
        stores.close()


def test_a_backup_through_a_link_is_where_the_link_leads(tmp_path: Path) -> None:
    source, target, link = (tmp_path / name for name in ("bridge.db", "copy.db", "link"))
    cab.Stores(source, cab.Clock()).close()
    link.symlink_to(target)
    for _ in range(2):
        cab.backup_database(source, link)
        assert link.is_symlink() and target.read_bytes()[:15] == b"SQLite format 3"
        target.touch()


def test_files_beside_the_place_of_a_backup_stay(tmp_path: Path) -> None:
    source, target = tmp_path / "bridge.db", tmp_path / "my"
    cab.Stores(source, cab.Clock()).close()
    journal = tmp_path / "my-journal"
    journal.write_text("dear diary")
    with pytest.raises(cab.CannotStart, match="beside it"):
        cab.backup_database(source, target)
    assert journal.read_text() == "dear diary" and not target.exists()


@pytest.mark.parametrize(
    "kind", ["a text", "a folder", "the database", "a foreign database", "another bridge"])
def test_a_backup_replaces_nothing_but_a_backup(tmp_path: Path, kind: str) -> None:
    source, target = tmp_path / "bridge.db", tmp_path / "target"
    cab.Stores(source, cab.Clock()).close()
    if kind == "a foreign database":
        with contextlib.closing(sqlite3.connect(str(target))) as db:
            db.execute("CREATE TABLE jobs (id)").close()
    elif kind == "another bridge":
        target = tmp_path / "other" / "bridge.db"
        target.parent.mkdir()
        cab.Stores(target, cab.Clock()).close()
        (target.parent / "bridge.lock").touch()
    if kind == "a text":
        target.write_text("dear diary")
    elif kind == "a folder":
        target.mkdir()
    else:
        target = source
    before = source.read_bytes()
    with pytest.raises(cab.CannotStart, match="cannot be written"):
        cab.backup_database(source, target)
    assert source.read_bytes() == before
    assert kind != "a text" or target.read_text() == "dear diary"
    assert list(tmp_path.glob("*.part")) == []


# --- moved folders ---


def test_the_workspaces_of_a_moved_data_folder_are_found(tmp_path: Path) -> None:
    data, moved = tmp_path / "data", tmp_path / "moved"
    data.mkdir()
    stores = cab.Stores(data / "bridge.db", cab.Clock())
    service = cab.Service(stores, cab.Notifier(), cab.Clock(), data, cab_nothing_runs())
    token, _ = service.create_token(cab.NewToken("tools", tools="read"))
    old, _ = service.create_token(cab.NewToken("old", tools="read"))
    foreign, _ = service.create_token(cab.NewToken("foreign", tools="read"), tmp_path)
    # As before version 5.
    stores.database.write(
        lambda db: db.execute("UPDATE tokens SET workspace = ? WHERE id = ?",
                              (old.workspace, old.id)))
    stores.close()
    data.rename(moved)
    stores = cab.Stores(moved / "bridge.db", cab.Clock())
    try:
        for made in (token, old):
            found = stores.tokens.get(made.id)
            assert found and found.workspace == str(
                moved / "workspaces" / Path(str(made.workspace)).name)
        kept = stores.tokens.get(foreign.id)
        assert kept and kept.workspace == str(tmp_path)
    finally:
        stores.close()


def cab_nothing_runs() -> Any:
    return cab.NothingRuns()


def test_a_workspace_that_was_deleted_is_made_again(bridge: Start, tmp_path: Path) -> None:
    running = bridge()
    created = running.admin.post("/api/tokens", {"name": "tools", "tools": "read"}).json
    client = running.admin.with_token(created["token"])
    shutil.rmtree(tmp_path / "data" / "workspaces")
    assert client.done(client.ask("say hi"))["status"] == "completed"
    assert len(list((tmp_path / "data" / "workspaces").iterdir())) == 1


# --- shared folders, locks ---


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can be another user")
@pytest.mark.parametrize("mode, error", [(0o770, ""), (0o777, "any user may change it")])
def test_a_folder_of_a_group_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, error: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "volume"
    folder.mkdir()
    folder.chmod(mode)
    # For this user the folder belongs to root, and its mode cannot be changed.
    monkeypatch.setattr(os, "geteuid", lambda: 4242)

    def refused(path: Path, mode: int, **options: Any) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "chmod", refused)
    if error:
        with pytest.raises(cab.CannotStart, match=error):
            cab.data_directory(folder)
        return
    assert cab.data_directory(folder) == folder
    assert "belongs to another user" in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="fcntl")
@pytest.mark.parametrize(
    "number, error",
    [(errno.ENOLCK, "cannot lock files"), (errno.EWOULDBLOCK, "Another bridge is running")],
)
def test_a_file_system_without_locks_is_not_another_bridge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: str
) -> None:
    import fcntl

    def fail(file: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(cab.CannotStart, match=error):
        cab.DirectoryLock(tmp_path / "bridge.lock")


def test_a_start_waits_for_a_command_that_only_looks(tmp_path: Path) -> None:
    looking = cab.DirectoryLock(tmp_path / "bridge.lock")
    timer = threading.Timer(0.05, looking.close)
    timer.start()
    cab.DirectoryLock(tmp_path / "bridge.lock", 10).close()
    timer.join()


def test_the_address_of_the_last_bridge_does_not_stay(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o700)
    lock = tmp_path / "data" / "bridge.lock"
    lock.write_text("process 1, http://localhost:1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        run = run_cli(
            "start", "--demo", "--no-tunnel", "--host", "127.0.0.1", "--port",
            str(taken.getsockname()[1]), "--data-dir", str(tmp_path / "data"), home=tmp_path)
    assert run.returncode == 1
    assert re.fullmatch(r"process \d{2,}", lock.read_text())


# --- sessions ---


def test_only_files_of_sessions_that_nobody_wants_are_deleted(tmp_path: Path) -> None:
    projects = tmp_path / "claude-home" / "projects" / "-data-work"
    (projects / "memory").mkdir(parents=True)
    wanted, lost = str(uuid.uuid4()), str(uuid.uuid4())
    for name in (wanted + ".jsonl", lost + ".jsonl", "notes.jsonl", "memory/x"):
        (projects / name).write_text("text")
    (projects / lost).mkdir()
    (projects / lost / "part").write_text("text")
    cab.remove_sessions(tmp_path, lambda session_id: session_id == wanted)
    assert sorted(path.name for path in projects.iterdir()) == sorted(
        [wanted + ".jsonl", "memory", "notes.jsonl"])


def test_a_start_deletes_the_sessions_that_the_database_does_not_know(
    bridge: Start, tmp_path: Path
) -> None:
    projects = tmp_path / "data" / "claude-home" / "projects" / "-work"
    projects.mkdir(parents=True)
    session = projects / (str(uuid.uuid4()) + ".jsonl")
    session.write_text("SECRET")
    bridge()
    wait_until(lambda: not session.exists())


def test_what_was_forgotten_is_deleted_at_once(bridge: Start, tmp_path: Path) -> None:
    running = bridge()
    fields = {"name": "memory", "sessionMode": "stateful", "tools": "read"}
    created = running.admin.post("/api/tokens", fields).json
    client = running.admin.with_token(created["token"])
    client.done(client.ask("say hi", conversation="trip"))
    database = sqlite3.connect(str(tmp_path / "data" / "bridge.db"))
    (session_id,) = database.execute("SELECT session_id FROM conversations").fetchone()
    database.close()
    projects = tmp_path / "data" / "claude-home" / "projects" / "-work"
    projects.mkdir(parents=True, exist_ok=True)
    session = projects / (session_id + ".jsonl")
    session.write_text("SECRET")
    assert client.delete("/api/conversations/trip").status == 200
    assert not session.exists()


# --- what cannot start ---


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.skipif(os.name != "posix", reason="shell scripts")
@pytest.mark.parametrize(
    "text, error, hint",
    [
        ("#!/bin/sh\necho GLIBC_2 not found >&2\nexit 1\n", "GLIBC_2 not found, exit status 1",
         "--claude"),
        ("#!/usr/bin/env node-of-nobody\n", "exit status 127", "PATH"),
        ("#!/bin/sh\nkill -ILL $$\n", "killed by SIGILL", "--claude"),
    ],
    ids=["library", "interpreter", "signal"],
)  # fmt: skip
def test_what_keeps_claude_from_running_is_said(
    tmp_path: Path, text: str, error: str, hint: str
) -> None:
    with pytest.raises(cab.CannotStart) as refused:
        cab.probe([str(executable(tmp_path / "claude", text))], {"PATH": os.environ["PATH"]})
    assert error in str(refused.value) and hint in refused.value.hint


def test_a_line_before_the_json_does_not_hide_the_login(tmp_path: Path) -> None:
    text = "#!/bin/sh\necho 'Now using node v20'\necho '{\"loggedIn\": true}'\n"
    path = executable(tmp_path / "claude", text)
    environ = {"PATH": os.environ["PATH"]}
    assert cab.read_login(cab.probe((str(path), *cab.LOGIN_COMMAND), environ)) == {"loggedIn": True}


@pytest.mark.parametrize(
    "folder",
    [".nvm/versions/node/v22.1.0/bin", ".npm-global/bin", ".bun/bin", ".volta/bin",
     ".local/share/pnpm", ".local/bin", ".claude/local"],
)  # fmt: skip
def test_claude_is_found_where_installers_put_it(tmp_path: Path, folder: str) -> None:
    executable(tmp_path / ".nvm/versions/node/v9.9.0/bin/node", "#!/bin/sh\n")
    path = executable(tmp_path / folder / "claude", "#!/bin/sh\n")
    environ = {"HOME": str(tmp_path), "PATH": "/nowhere"}
    assert cab.claude_command(cab.Config(data_dir=tmp_path), environ) == (str(path),)


def test_the_newest_node_of_nvm_comes_first_and_its_folder_joins_the_path(
    tmp_path: Path, fake_claude: Fakes
) -> None:
    fake = fake_claude()
    for version in ("v9.9.0", "v22.1.0", "v20.19.5"):
        folder = tmp_path / "home/.nvm/versions/node" / version / "bin"
        executable(folder / "claude", fake.path.read_text())
    newest = tmp_path / "home/.nvm/versions/node/v22.1.0/bin"
    environ = {"HOME": str(tmp_path / "home"), "PATH": os.defpath}
    install = cab.find_claude(cab.Config(data_dir=tmp_path / "data"), environ)
    assert install.command == (str(newest / "claude"),)
    assert install.environment["PATH"].split(os.pathsep)[-1] == str(newest)


def test_a_folder_for_temporary_files_must_exist(tmp_path: Path, fake_claude: Fakes) -> None:
    config = cab.Config(data_dir=tmp_path / "data", claude=str(fake_claude().path))
    environ = {"HOME": str(tmp_path), "PATH": os.defpath, "TMPDIR": str(tmp_path / "none")}
    with pytest.raises(cab.CannotStart, match="temporary files, .*none, cannot be used"):
        cab.find_claude(config, environ)
    assert cab.find_claude(config, {**environ, "TMPDIR": str(tmp_path)}).features.version


def test_a_user_without_a_home_is_no_traceback(
    tmp_path: Path, fake_claude: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    environ: Mapping[str, str] = {"PATH": os.defpath}
    config = cab.Config(data_dir=tmp_path / "data", claude=str(fake_claude().path))
    assert cab.find_claude(config, environ).features.version
    with pytest.raises(cab.CannotStart, match="not found"):
        cab.claude_command(cab.Config(data_dir=tmp_path), {"PATH": "/nowhere"})


# --- what is remembered of claude ---

QUESTIONS = """#!/bin/sh
echo $1 >> %(folder)s/asked
case $1 in
--version) while [ -e %(folder)s/gate ]; do sleep 0.05; done; cat %(folder)s/version ;;
--help) echo "%(flags)s" ;;
*) cat %(folder)s/login ;;
esac
"""


class Questions:
    """A `claude` that answers the questions of a start, and notes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = QUESTIONS % {"folder": folder, "flags": " ".join(cab.NEEDED_FLAGS)}
        self.path = executable(folder / "claude", text)
        (folder / "version").write_text("2.1.330 (Claude Code)")
        (folder / "login").write_text('{"loggedIn": true, "subscriptionType": "max"}')

    @property
    def gate(self) -> Path:
        return self.folder / "gate"

    def asked(self) -> List[str]:
        """Return the questions since the last call."""
        path = self.folder / "asked"
        questions = path.read_text().split() if path.exists() else []
        path.write_text("")
        return sorted(questions)


@pytest.fixture
def questions(tmp_path: Path) -> Questions:
    (tmp_path / "claude").mkdir()
    return Questions(tmp_path / "claude")


ALL_QUESTIONS = ["--help", "--setting-sources=", "--version"]


@only_posix
def test_what_was_asked_is_remembered_until_program_login_or_settings_change(
    tmp_path: Path, questions: Questions
) -> None:
    config = cab.Config(data_dir=cab.data_directory(tmp_path / "data"), claude=str(questions.path))
    environ = {"HOME": str(tmp_path), "PATH": os.defpath}
    assert cab.recall_claude(config, environ) is None
    install = cab.find_claude(config, environ)
    assert questions.asked() == ALL_QUESTIONS
    recalled = cab.recall_claude(config, environ)
    assert recalled == replace(install, is_recalled=True)
    assert recalled.billing_account == "Claude Max subscription" and questions.asked() == []
    for key in ("CLAUDE_CODE_OAUTH_TOKEN", "ANTHROPIC_BASE_URL", "PATH"):
        assert cab.recall_claude(config, {**environ, key: "/x"}) is None
    keys = {"ANTHROPIC_API_KEY": "k"}
    assert cab.recall_claude(config, {**environ, **keys}) == recalled
    assert cab.recall_claude(replace(config, allow_api_key=True), {**environ, **keys}) is None
    credentials = tmp_path / ".claude" / ".credentials.json"
    credentials.parent.mkdir()
    credentials.write_text("{}")
    assert cab.recall_claude(config, environ) is None
    cab.find_claude(config, environ)
    questions.path.write_text(questions.path.read_text() + "\n")
    assert cab.recall_claude(config, environ) is None
    text = (config.data_dir / "claude.json").read_text()
    for broken in ("", "[]", "{}", text.replace('"key"', '"kex"'), text.replace("[", "{", 1)):
        (config.data_dir / "claude.json").write_text(broken)
        assert cab.recall_claude(config, environ) is None


@only_posix
def test_a_token_is_not_in_what_is_remembered(tmp_path: Path, questions: Questions) -> None:
    config = cab.Config(data_dir=cab.data_directory(tmp_path / "data"), claude=str(questions.path))
    environ = {"HOME": str(tmp_path), "PATH": os.defpath, "CLAUDE_CODE_OAUTH_TOKEN": "hidden-word"}
    cab.find_claude(config, environ)
    assert cab.recall_claude(config, environ)
    assert "hidden-word" not in (config.data_dir / "claude.json").read_text()


@only_posix
def test_a_user_who_never_ran_claude_gets_no_files_of_it(
    tmp_path: Path, questions: Questions
) -> None:
    (questions.folder / "login").write_text('{"loggedIn": false}')
    config = cab.Config(data_dir=tmp_path / "data", claude=str(questions.path))
    environ = {"HOME": str(tmp_path / "home"), "PATH": os.defpath}
    with pytest.raises(cab.CannotStart, match="not signed in"):
        cab.find_claude(config, environ)
    # Not in the settings of the owner, who has none.
    assert questions.asked() == ALL_QUESTIONS
    (tmp_path / "home/.claude").mkdir(parents=True)
    with pytest.raises(cab.CannotStart, match="not signed in"):
        cab.find_claude(config, environ)
    assert questions.asked() == sorted([*ALL_QUESTIONS, "--setting-sources="])


@only_posix
def test_the_second_start_listens_before_it_asks_and_then_reports_what_changed(
    program: Programs, questions: Questions
) -> None:
    program("--spare", "0", claude=questions.path).end(signal.SIGTERM)
    questions.asked()
    questions.gate.touch()
    (questions.folder / "version").write_text("2.1.999 (Claude Code)")
    running = program("--spare", "0", claude=questions.path)
    assert "2.1.330" in running.stderr and "Claude Max" in running.stderr
    assert Api(running.port).get("/health").status == 200
    questions.gate.unlink()
    wait_until(lambda: "has changed: 2.1.999 (Claude Code). Billing: Claude Max" in running.stderr)
    running.end(signal.SIGTERM)
    (questions.folder / "login").write_text('{"loggedIn": false}')
    running = program("--spare", "0", claude=questions.path)
    wait_until(lambda: "not signed in. Hint: run claude" in running.stderr)
    assert Api(running.port).get("/health").status == 200


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
def test_a_bridge_that_ends_does_not_wait_for_a_claude_that_never_answers(
    program: Programs, questions: Questions
) -> None:
    program("--spare", "0", claude=questions.path).end(signal.SIGTERM)
    questions.asked()
    questions.gate.touch()
    running = program("--spare", "0", claude=questions.path)
    wait_until(lambda: "--version" in (questions.folder / "asked").read_text())
    assert running.end(signal.SIGTERM, 15) == 0


# --- sleep, orphans ---


class Sleeper:
    """A process whose first wait takes as long as the sleep of the machine."""

    limits = cab.RateLimitStatus()
    open_calls: List[Any] = []

    def __init__(self, clock: Any) -> None:
        self._clock = clock
        self.waits = 0

    def next_event(self, seconds: float) -> Optional[cab.CliEvent]:
        self.waits += 1
        self._clock.at += 1000.0 if self.waits == 1 else seconds
        if self.waits < 30:
            return None
        return cab.parse_cli_event(b'{"type": "system", "subtype": "status"}')


def test_a_sleep_of_the_machine_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Awake:
        at = 0.0

        def monotonic(self) -> float:
            return self.at

        def now(self) -> float:
            return self.at

    clock: Any = Awake()
    monkeypatch.setattr(cab.Clock, "monotonic", staticmethod(lambda: clock.at))
    sleeper: Any = Sleeper(clock)
    control = cab.RunControl(
        clock, cab.Config(silence_seconds=60, run_seconds=300), 300.0, 60.0, lambda: None,
        lambda limits: None)
    turn = cab.Turn(sleeper, cab.DEFAULT_SESSION, control)
    assert turn.next_event() and sleeper.waits == 30


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_zombie_that_nobody_reaps_is_reaped_the_second_time() -> None:
    pid = os.posix_spawn(sys.executable, [sys.executable, "-S", "-c", ""], {})
    wait_until(lambda: pid in cab.reap_zombies(set()))
    assert pid in cab.reap_zombies({pid})
    assert pid not in cab.reap_zombies(set())
