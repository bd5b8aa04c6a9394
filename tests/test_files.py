"""The files of the bridge are private from their first moment, and never another user's file.

The program under test checks its own data directory whenever Python is about to open, create,
rename, remove or change the mode of a file (an audit hook). So the test also sees a file that
other users can read for a short time only.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Set, Tuple

import pytest

import claude_api_bridge as cab
from conftest import MODULE, SHORT, FakeClaude, Program, run_cli, wait_until
from test_store import ORIGINAL
from test_tunnel import FakeCloudflared, FileServer, fake, pin, pinned_fake, serve, whole

__all__ = ["fake", "serve"]

pytestmark = pytest.mark.skipif(
    os.name != "posix",
    reason="file modes are POSIX; on Windows the profile folder protects the files",
)

AUDITED = """
import os, sys, threading
sys.path.insert(0, {folder!r})
sys.argv[0] = {module!r}
notes = os.open({notes!r}, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
seen, checking = set(), set()
events = ("open", "os", "sqlite3", "subprocess", "tempfile", "shutil", "fcntl", "socket")

def check(event, args):
    thread = threading.get_ident()
    if thread in checking or event.partition(".")[0] not in events:
        return
    checking.add(thread)
    try:
        for parent, folders, names in os.walk({root!r}):
            for path in (os.path.join(parent, name) for name in folders + names):
                try:
                    entry = os.lstat(path).st_mode, os.path.relpath(path, {root!r})
                except OSError:
                    continue
                if entry not in seen:
                    seen.add(entry)
                    os.write(notes, b"%o %s\\n" % (entry[0], os.fsencode(entry[1])))
    finally:
        checking.discard(thread)

os.umask(0)
sys.addaudithook(check)
import claude_api_bridge as cab
{short}
{patch}
cab.run()
"""


class Watched:
    """The program with an audit hook that records every file under `root` and its mode.

    Its umask restricts nothing.
    """

    def __init__(self, folder: Path, patch: str = "") -> None:
        self.root, self._notes = folder / "root", folder / "notes"
        self.root.mkdir()
        code = AUDITED.format(
            folder=str(MODULE.parent), module=str(MODULE), notes=str(self._notes),
            root=str(self.root), short=SHORT, patch=patch,
        )
        self.command = (sys.executable, "-S", "-c", code)
        self.data = self.root / "made" / "on the way" / "data"
        self.environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"}

    def run(self, *words: str) -> str:
        """Run one command to its end and return its output."""
        done = subprocess.run(
            [*self.command, *words, "--data-dir", str(self.data)], env=self.environ,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            encoding="utf-8", timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def seen(self) -> Set[Tuple[int, str]]:
        """Return (mode, path) of every file that existed at some moment or exists now."""
        recorded = [line.split(" ", 1) for line in self._notes.read_text("utf-8").splitlines()]
        present = [
            ("%o" % path.lstat().st_mode, str(path.relative_to(self.root)))
            for path in self.root.rglob("*")
        ]
        return {(int(mode, 8), name) for mode, name in [*map(tuple, recorded), *present]}


def not_private(seen: Set[Tuple[int, str]]) -> List[str]:
    """Return all entries that other users could read, or that are neither file nor folder."""
    return sorted(
        "%o %s" % (mode, name)
        for mode, name in seen
        if mode not in (stat.S_IFREG | 0o600, stat.S_IFDIR | 0o700)
        and not (mode == stat.S_IFREG | 0o755 and "/bin/" in name and name.endswith("/cloudflared"))
    )


def umask_of(pid: int) -> str:
    """Return the umask of a process (Linux)."""
    return next(
        line.split()[1]
        for line in Path("/proc/%d/status" % pid).read_text().splitlines()
        if line.startswith("Umask:")
    )


def test_every_file_is_private_from_its_first_moment(
    tmp_path: Path,
    fake_claude: Callable[..., FakeClaude],
    fake: FakeCloudflared,
    serve: Callable[..., FileServer],
) -> None:
    data, claude = pinned_fake(fake), fake_claude()
    watched = Watched(tmp_path, pin(data))
    # This command creates the folder.
    watched.run("token", "create", "first", "--tools", "read")
    (tmp_path / ".claude.json").write_text('{"oauthAccount": {"accountUuid": "1"}}')
    running = Program(
        [
            *watched.command, "start", "--host", "127.0.0.1", "--port", "0", "--data-dir",
            str(watched.data), "--claude", str(claude.path), "--cloudflared", "",
            "--cloudflared-url", serve(whole(data)).url,
        ],
        watched.environ,
        tmp_path,
    )
    try:
        api = running.api
        assert api.answer("hello")["response"] == "Echo: hello"
        for fields in ({"tools": "all"}, {"sessionMode": "stateful"}):
            assert api.new_token(**fields).answer("hello")["status"] == "completed"
        assert [
            watched.run("ask", *words).strip()
            for words in (["one"], ["two"], ["--conversation", "x", "three"])
        ] == ["Echo: one", "Echo: two", "Echo: three"]
        watched.run("token", "list")
        if sys.platform == "linux":
            assert {
                umask_of(start["pid"])
                for start in claude.children()
                if Path("/proc/%d" % start["pid"]).exists()
            } == {"0077"}
        wait_until(fake.starts)
    finally:
        assert running.end(signal.SIGTERM, 30) == 0
    seen = watched.seen()
    assert not_private(seen) == []
    parts = {path.split("/", 3)[-1] for _, path in seen}
    assert {
        "bridge.db", "bridge.db-wal", "bridge.db-shm", "bridge.lock", "ask-tokens.json",
        "cloudflared.yml", "claude-home", "claude-home/.claude.json", "work", "workspaces",
        "bin/cloudflared",
    } <= parts, parts
    assert [part for part in parts if part.endswith("/download")], (
        "the audit hook must have seen the download in progress"
    )
    assert sorted(path.name for path in watched.data.rglob("*.part")) == []


def test_the_copy_of_the_original_s_database_is_private_from_its_first_moment(
    tmp_path: Path,
) -> None:
    watched = Watched(tmp_path)
    watched.data.mkdir(parents=True)
    for folder in (watched.data, *watched.data.relative_to(watched.root).parents):
        (watched.root / folder).chmod(0o700)
    old = sqlite3.connect(str(watched.data / "bridge.db"))
    old.executescript(ORIGINAL)
    old.close()
    (watched.data / "bridge.db").chmod(0o600)
    watched.run("token", "list")
    assert not_private(watched.seen()) == [] and (watched.data / "bridge-original.db").exists()


def test_files_that_other_users_can_read_become_private_at_the_next_start(tmp_path: Path) -> None:
    data = tmp_path / "data"
    run_cli("token", "create", "x", "--data-dir", str(data))
    data.chmod(0o777)
    (data / "bridge.db").chmod(0o666)
    assert run_cli("token", "list", "--data-dir", str(data)).returncode == 0
    assert [stat.S_IMODE(path.stat().st_mode) for path in (data, data / "bridge.db")] == [
        0o700, 0o600,
    ]


# --- links and files of other users ---

FILES = (
    "bridge.db", "bridge.db-wal", "bridge.db-shm", "bridge-original.db", "bridge.lock",
    "ask-tokens.json", "cloudflared.yml",
)
FOLDERS = ("claude-home", "work", "workspaces", "bin")


def state(path: Path) -> Tuple[Any, ...]:
    """Return what must not change of a file or folder outside the data directory."""
    info = path.stat()
    return (
        stat.S_IMODE(info.st_mode), info.st_mtime_ns,
        sorted(os.listdir(path)) if path.is_dir() else path.read_bytes(),
    )


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Callable[[bool], Path]]:
    """Return make(is_folder) -> a file or folder elsewhere, which the test must not change."""
    states: Dict[Path, Tuple[Any, ...]] = {}

    def make(is_folder: bool) -> Path:
        path = tmp_path / "precious"
        if is_folder:
            path.mkdir(mode=0o755)
        else:
            path.write_text("")
        path.chmod(0o755 if is_folder else 0o644)
        states[path] = state(path)
        return path

    yield make
    for path, before in states.items():
        assert state(path) == before


def assert_refused(done: "subprocess.CompletedProcess[str]", *words: str) -> None:
    """Check that a command failed with one error line, which contains the words, and one hint."""
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr, done
    message = done.stderr[done.stderr.index("error: ") :]
    assert all(word in message for word in words), message
    assert "\nhint: " in message and message.count("\n") == 2, message


@pytest.mark.parametrize("name", FILES + FOLDERS)
def test_a_link_in_place_of_a_file_is_refused(
    tmp_path: Path, victim: Callable[[bool], Path], name: str
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / name).symlink_to(victim(name in FOLDERS))
    claude = cab.ClaudeInstall(
        ("never-run",), cab.Features((2, 1, 330), "", frozenset()), {}, "nobody"
    )
    bridge = cab.Bridge(
        cab.Config(data_dir=data, no_tunnel=True, port=0, host="127.0.0.1"), claude, cab.Clock()
    )
    with pytest.raises(cab.CannotStart, match="%s is a link" % name) as refusal, bridge:
        pass
    assert refusal.value.hint
    assert (data / name).is_symlink() and [path.name for path in data.iterdir()] == [name]


@pytest.mark.parametrize(
    "words, name",
    (
        ("start --demo --no-tunnel --host 127.0.0.1 --port 0", "claude-home"),
        ("token create x --tools all", "workspaces"),
        ("token list", "bridge.db"),
        ("doctor --no-tunnel --json", "bridge.db"),
    ),
)
def test_no_command_follows_a_link(
    tmp_path: Path, victim: Callable[[bool], Path], words: str, name: str
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / name).symlink_to(victim(name in FOLDERS))
    done = run_cli(
        *words.split(), "--data-dir", str(data), environ={"PATH": "/usr/bin:/bin"}, home=tmp_path
    )
    if words.startswith("doctor"):
        assert done.returncode == 1 and "%s is a link" % name in done.stdout
    else:
        assert_refused(
            done, "%s is a link" % (data / name), "The folder %s cannot be used: " % data
        )


def test_a_dangling_link_creates_no_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bridge.db").symlink_to(tmp_path / "target")
    assert_refused(
        run_cli("token", "create", "x", "--data-dir", str(tmp_path / "data")), "bridge.db is a link"
    )
    assert not (tmp_path / "target").exists()


def test_the_data_directory_itself_may_be_a_link(tmp_path: Path) -> None:
    """The owner may link it to another disk; the target becomes private."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    assert run_cli("token", "create", "x", "--data-dir", str(tmp_path / "data")).returncode == 0
    assert stat.S_IMODE((tmp_path / "disk").stat().st_mode) == 0o700
    assert (tmp_path / "disk" / "bridge.db").is_file()


def test_a_shared_folder_does_not_become_private(tmp_path: Path) -> None:
    """A root process could otherwise change the mode of /tmp."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    assert_refused(
        run_cli("token", "create", "x", "--data-dir", str(tmp_path / "shared")),
        "all users share it",
    )
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o1777
    assert list((tmp_path / "shared").iterdir()) == []


def test_links_of_other_names_and_links_in_workspaces_are_allowed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "workspaces").mkdir(parents=True)
    for link in (data / "notes", data / "workspaces" / "mine"):
        link.symlink_to(tmp_path)
    assert cab.data_directory(data) == data


IMPORT = "import os, sys; sys.path.insert(0, %r); import claude_api_bridge as cab; "
IMPORT %= str(MODULE.parent)
AS_NOBODY = IMPORT + "os.setgid(65534); os.setuid(65534); cab.run()"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs two users")
@pytest.mark.parametrize("name", ("", "bridge.db", "bridge.lock", "claude-home"))
def test_another_user_s_file_is_refused(name: str) -> None:
    """Another user created the file first, in a folder that all users can write.

    name: the file of the other user; "" for the folder itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        data = Path(folder, "data")
        data.mkdir()
        data.chmod(0o777)
        if name:
            os.chown(data, 65534, 65534)
            if name in FOLDERS:
                (data / name).mkdir()
            else:
                (data / name).touch()
            (data / name).chmod(0o777)
        done = subprocess.run(
            [
                sys.executable, "-S", "-c", AS_NOBODY, "token", "create", "x", "--data-dir",
                str(data),
            ],
            cwd="/",
            env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            timeout=60,
        )
        reason = "belongs to another user" if name else "any user may change it"
        assert_refused(done, reason)


# --- files that are replaced ---


def test_a_file_is_replaced_completely_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    cab.write_file_atomically(path, "old")

    def fail(part: Any, target: Any) -> None:
        assert path.read_text() == "old"
        assert Path(part).read_text() == "new"
        assert Path(part).parent == tmp_path
        raise OSError("no")

    monkeypatch.setattr(cab.os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        cab.write_file_atomically(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_link_is_replaced_not_followed(tmp_path: Path, victim: Callable[[bool], Path]) -> None:
    path = tmp_path / "file"
    path.symlink_to(victim(False))
    cab.write_file_atomically(path, "new")
    assert not path.is_symlink() and path.read_text() == "new"


def test_concurrent_asks_leave_a_complete_token_file(
    program: Callable[..., Program], tmp_path: Path
) -> None:
    """Every `ask` may create the token of the shell; they must not disturb each other."""
    program()
    processes = [
        subprocess.Popen(
            [
                sys.executable, "-S", "-c", IMPORT + "cab.run()", "ask", "--data-dir",
                str(tmp_path / "data"), "hello %d" % number,
            ],
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for number in range(4)
    ]
    results = [process.communicate(timeout=60) for process in processes]
    answers = sorted(out.strip() for out, _ in results)
    assert answers == ["Echo: hello %d" % number for number in range(4)], results
    path = tmp_path / "data" / "ask-tokens.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(cab.read_json_object(path)) == ["stateless"]
