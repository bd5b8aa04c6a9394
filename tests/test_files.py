"""The files of the bridge: closed to others from their first moment, and none is what somebody else put in its place.

A program looks at its own data directory whenever Python is about to open, make, rename, remove or change the rights of a file
(an audit hook): a file that is open to others until the next such step is seen, however soon it is closed.
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

pytestmark = pytest.mark.skipif(os.name != "posix", reason="rights of files are POSIX; on Windows they are those of the profile folder")

LOOKING = """
import os, sys, threading
sys.path.insert(0, {folder!r})
sys.argv[0] = {module!r}
notes, seen, looking = os.open({notes!r}, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), set(), set()

def look(event, words):
    me = threading.get_ident()
    if me in looking or event.partition(".")[0] not in ("open", "os", "sqlite3", "subprocess", "tempfile", "shutil", "fcntl", "socket"):
        return
    looking.add(me)
    try:
        for parent, folders, names in os.walk({root!r}):
            for path in (os.path.join(parent, name) for name in folders + names):
                try:
                    found = os.lstat(path).st_mode, os.path.relpath(path, {root!r})
                except OSError:
                    continue
                if found not in seen:
                    seen.add(found)
                    os.write(notes, b"%o %s\\n" % (found[0], os.fsencode(found[1])))
    finally:
        looking.discard(me)

os.umask(0)
sys.addaudithook(look)
import claude_api_bridge as cab
{short}
{patch}
cab.run()
"""


class Watched:
    """The program, looking at `root` and noting every file and its rights. It is started under a umask that closes nothing."""

    def __init__(self, folder: Path, patch: str = "") -> None:
        self.root, self._notes = folder / "root", folder / "notes"
        self.root.mkdir()
        code = LOOKING.format(folder=str(MODULE.parent), module=str(MODULE), notes=str(self._notes), root=str(self.root), short=SHORT,
                              patch=patch)
        self.command = (sys.executable, "-S", "-c", code)
        self.data = self.root / "made" / "on the way" / "data"
        self.environ = {"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"}

    def run(self, *words: str) -> str:
        """One command, to its end. -> what it printed."""
        done = subprocess.run([*self.command, *words, "--data-dir", str(self.data)], env=self.environ, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def seen(self) -> Set[Tuple[int, str]]:
        """(mode, path) of all that was there at some moment, and of what is there now."""
        noted = [line.split(" ", 1) for line in self._notes.read_text("utf-8").splitlines()]
        there = [("%o" % path.lstat().st_mode, str(path.relative_to(self.root))) for path in self.root.rglob("*")]
        return {(int(mode, 8), name) for mode, name in [*map(tuple, noted), *there]}


def wrong(seen: Set[Tuple[int, str]]) -> List[str]:
    """What others could look into, or is neither file nor folder."""
    return sorted("%o %s" % (mode, name) for mode, name in seen
                  if mode not in (stat.S_IFREG | 0o600, stat.S_IFDIR | 0o700) and not (
                      mode == stat.S_IFREG | 0o755 and "/bin/" in name and name.endswith("/cloudflared")))


def umask_of(pid: int) -> str:
    return next(line.split()[1] for line in Path("/proc/%d/status" % pid).read_text().splitlines() if line.startswith("Umask:"))


def test_every_file_is_closed_to_others_from_its_first_moment(tmp_path: Path, fake_claude: Callable[..., FakeClaude], fake: FakeCloudflared,
                                                              serve: Callable[..., FileServer]) -> None:
    data, claude = pinned_fake(fake), fake_claude()
    watched = Watched(tmp_path, pin(data))
    watched.run("token", "create", "first", "--tools", "read")           # also where there is no folder yet
    (tmp_path / ".claude.json").write_text('{"oauthAccount": {"accountUuid": "1"}}')
    running = Program([*watched.command, "start", "--host", "127.0.0.1", "--port", "0", "--data-dir", str(watched.data), "--claude",
                       str(claude.path), "--cloudflared", "", "--cloudflared-url", serve(whole(data)).url], watched.environ, tmp_path)
    try:
        api = running.api
        assert api.answer("hello")["response"] == "Echo: hello"
        for fields in ({"tools": "all"}, {"sessionMode": "stateful"}):
            assert api.new_token(**fields).answer("hello")["status"] == "completed"
        assert [watched.run("ask", *words).strip() for words in (["one"], ["two"], ["--conversation", "x", "three"])] == [
            "Echo: one", "Echo: two", "Echo: three"]
        watched.run("token", "list")
        if sys.platform == "linux":
            assert {umask_of(start["pid"]) for start in claude.children() if Path("/proc/%d" % start["pid"]).exists()} == {"0077"}
        wait_until(fake.starts)
    finally:
        assert running.end(signal.SIGTERM, 30) == 0
    seen = watched.seen()
    assert wrong(seen) == []
    parts = {path.split("/", 3)[-1] for _, path in seen}
    assert {"bridge.db", "bridge.db-wal", "bridge.db-shm", "bridge.lock", "ask-tokens.json", "cloudflared.yml", "claude-home",
            "claude-home/.claude.json", "work", "workspaces", "bin/cloudflared"} <= parts, parts
    assert [part for part in parts if part.endswith("/download")], "the download was seen while it lasted"
    assert sorted(path.name for path in watched.data.rglob("*.part")) == []


def test_a_copy_of_the_original_s_database_is_closed_to_others_from_its_first_moment(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.data.mkdir(parents=True)
    for each in (watched.data, *watched.data.relative_to(watched.root).parents):
        (watched.root / each).chmod(0o700)
    old = sqlite3.connect(str(watched.data / "bridge.db"))
    old.executescript(ORIGINAL)
    old.close()
    (watched.data / "bridge.db").chmod(0o600)
    watched.run("token", "list")
    assert wrong(watched.seen()) == [] and (watched.data / "bridge-original.db").exists()


def test_what_was_open_to_others_is_closed_at_the_next_start(tmp_path: Path) -> None:
    data = tmp_path / "data"
    run_cli("token", "create", "x", "--data-dir", str(data))
    data.chmod(0o777)
    (data / "bridge.db").chmod(0o666)
    assert run_cli("token", "list", "--data-dir", str(data)).returncode == 0
    assert [stat.S_IMODE(path.stat().st_mode) for path in (data, data / "bridge.db")] == [0o700, 0o600]


# --- what somebody else put there ---

FILES = ("bridge.db", "bridge.db-wal", "bridge.db-shm", "bridge-original.db", "bridge.lock", "ask-tokens.json", "cloudflared.yml")
FOLDERS = ("claude-home", "work", "workspaces", "bin")


def state(path: Path) -> Tuple[Any, ...]:
    """What must not change of a file or folder elsewhere."""
    found = path.stat()
    return stat.S_IMODE(found.st_mode), found.st_mtime_ns, sorted(os.listdir(path)) if path.is_dir() else path.read_bytes()


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Callable[[bool], Path]]:
    """victim(is a folder) -> something of the owner's, elsewhere; in the end it must be as it was."""
    made: Dict[Path, Tuple[Any, ...]] = {}

    def make(is_folder: bool) -> Path:
        path = tmp_path / "precious"
        path.mkdir() if is_folder else path.write_text("")
        path.chmod(0o755 if is_folder else 0o644)
        made[path] = state(path)
        return path

    yield make
    for path, before in made.items():
        assert state(path) == before


def refused(done: "subprocess.CompletedProcess[str]", *words: str) -> None:
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr, done
    told = done.stderr[done.stderr.index("error: "):]
    assert all(word in told for word in words) and "\nhint: " in told and told.count("\n") == 2, told


@pytest.mark.parametrize("name", FILES + FOLDERS)
def test_a_link_in_the_place_of_a_file_is_refused(tmp_path: Path, victim: Callable[[bool], Path], name: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / name).symlink_to(victim(name in FOLDERS))
    claude = cab.ClaudeInstall(("never-run",), cab.Features((2, 1, 330), "", frozenset(), True), {}, "nobody")
    bridge = cab.Bridge(cab.Config(data_dir=data, no_tunnel=True, port=0, host="127.0.0.1"), claude, cab.Clock(), print)
    with pytest.raises(cab.CannotStart, match="%s is a link" % name) as told, bridge:
        pass
    assert told.value.hint
    assert (data / name).is_symlink() and [path.name for path in data.iterdir()] == [name]


@pytest.mark.parametrize("words, name", (
    ("start --demo --no-tunnel --host 127.0.0.1 --port 0", "claude-home"), ("token create x --tools all", "workspaces"),
    ("token list", "bridge.db"), ("doctor --no-tunnel --json", "bridge.db")))
def test_no_command_follows_a_link(tmp_path: Path, victim: Callable[[bool], Path], words: str, name: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / name).symlink_to(victim(name in FOLDERS))
    done = run_cli(*words.split(), "--data-dir", str(data), environ={"PATH": "/usr/bin:/bin"}, home=tmp_path)
    if words.startswith("doctor"):
        assert done.returncode == 1 and "%s is a link" % name in done.stdout
    else:
        refused(done, "%s is a link" % (data / name), "The folder %s cannot be used: " % data)


def test_a_dangling_link_makes_no_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bridge.db").symlink_to(tmp_path / "made")
    refused(run_cli("token", "create", "x", "--data-dir", str(tmp_path / "data")), "bridge.db is a link")
    assert not (tmp_path / "made").exists()


def test_the_data_directory_itself_may_be_a_link(tmp_path: Path) -> None:
    """By its owner's choice; what it leads to is closed to others."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    assert run_cli("token", "create", "x", "--data-dir", str(tmp_path / "data")).returncode == 0
    assert stat.S_IMODE((tmp_path / "disk").stat().st_mode) == 0o700 and (tmp_path / "disk" / "bridge.db").is_file()


def test_a_folder_that_all_users_share_is_not_closed_to_them(tmp_path: Path) -> None:
    """As /tmp, whose rights a root process could change."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    refused(run_cli("token", "create", "x", "--data-dir", str(tmp_path / "shared")), "all users share it")
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o1777 and list((tmp_path / "shared").iterdir()) == []


def test_links_of_other_names_and_in_workspaces_are_the_owner_s(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "workspaces").mkdir(parents=True)
    for link in (data / "notes", data / "workspaces" / "mine"):
        link.symlink_to(tmp_path)
    assert cab.data_directory(data) == data


OURS = "import os, sys; sys.path.insert(0, %r); import claude_api_bridge as cab; " % str(MODULE.parent)
AS_NOBODY = OURS + "os.setgid(65534); os.setuid(65534); cab.run()"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs two users")
@pytest.mark.parametrize("name", ("", "bridge.db", "bridge.lock", "claude-home"))
def test_what_another_user_made_is_refused(name: str) -> None:
    """In a folder that all may write, as /tmp, somebody was there first. name: of what is the other's; "" for the folder itself."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        data = Path(folder, "data")
        data.mkdir()
        data.chmod(0o777)
        if name:
            os.chown(data, 65534, 65534)
            (data / name).mkdir() if name in FOLDERS else (data / name).touch()
            (data / name).chmod(0o777)
        done = subprocess.run([sys.executable, "-S", "-c", AS_NOBODY, "token", "create", "x", "--data-dir", str(data)], cwd="/",
                              env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, encoding="utf-8", timeout=60)
        refused(done, "belongs to another user" if name else "cannot be used: Operation not permitted")


# --- files that are replaced ---


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    cab.write_file_atomically(path, "old")

    def breaks(part: Any, target: Any) -> None:
        assert path.read_text() == "old" and Path(part).read_text() == "new" and Path(part).parent == tmp_path
        raise OSError("no")

    monkeypatch.setattr(cab.os, "replace", breaks)
    with pytest.raises(OSError, match="no"):
        cab.write_file_atomically(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_link_is_replaced_not_followed(tmp_path: Path, victim: Callable[[bool], Path]) -> None:
    path = tmp_path / "file"
    path.symlink_to(victim(False))
    cab.write_file_atomically(path, "new")
    assert not path.is_symlink() and path.read_text() == "new"


def test_many_asks_at_once_leave_a_whole_file(program: Callable[..., Program], tmp_path: Path) -> None:
    """Each may make the token of the shell; none trips over the other's file."""
    program()
    asking = [subprocess.Popen([sys.executable, "-S", "-c", OURS + "cab.run()", "ask", "--data-dir", str(tmp_path / "data"),
                                "hello %d" % n],
                               env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LANG": "C.UTF-8"}, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") for n in range(4)]
    said = [each.communicate(timeout=60) for each in asking]
    assert sorted(out.strip() for out, _ in said) == ["Echo: hello %d" % n for n in range(4)], said
    path = tmp_path / "data" / "ask-tokens.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and list(cab.read_object(path)) == ["stateless"]
