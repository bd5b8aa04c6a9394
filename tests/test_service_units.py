"""`service`: the files for service managers, and their installation with stand-ins of these.

The printed command lines are started here as the managers would start them.
"""

from __future__ import annotations

import contextlib
import json
import os
import plistlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Mapping, Tuple
from xml.etree import ElementTree

import pytest
from conftest import MODULE, Api, FakeClaude, Program, is_running, run_cli, wait_until

Fakes = Callable[..., FakeClaude]
Programs = Callable[..., Program]
KINDS = ("systemd", "launchd", "task", "docker")
TOKEN = re.compile(r"cab-[0-9a-f]{64}")
# What each format could take for its own syntax. Windows allows fewer characters in a name.
ODD_NAME = "a b%h%%i $HOME${PATH} \"q\" 'x' \\n é漢 <&amp;> ;#@{x}"
ODD_WINDOWS_NAME = "a b%h $x 'x' é漢 &amp; ;#@{x}"


def ran(*words: str, home: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    return run_cli("service", *words, home=home, environ=variables)


def printed(*words: str, home: Path, **variables: str) -> str:
    """Return what `service print` prints, and check that it succeeds and says nothing else."""
    run = ran("print", *words, home=home, **variables)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


def unit_values(unit: str, name: str) -> List[str]:
    """Return the words of a setting, unquoted as systemd does it."""
    words: List[str] = []
    for value in re.findall(r"(?m)^%s=(.*)$" % name, unit):
        words += [word.replace("%%", "%") for word in shlex.split(value)]
    if name == "ExecStart":
        # Nothing is replaced in the name of the program.
        words[1:] = [word.replace("$$", "$") for word in words[1:]]
    return words


def unit_environment(unit: str) -> Dict[str, str]:
    return dict(word.split("=", 1) for word in unit_values(unit, "Environment"))


def words_of(kind: str, text: str) -> List[str]:
    """Return the command line in a file."""
    if kind == "systemd":
        return unit_values(text, "ExecStart")
    if kind == "launchd":
        return list(plistlib.loads(text.encode())["ProgramArguments"])
    if kind == "docker":
        return list(json.loads(text.rpartition("CMD ")[2]))
    spaces = {"t": "http://schemas.microsoft.com/windows/2004/02/mit/task"}
    action = ElementTree.fromstring(text).find("t:Actions/t:Exec", spaces)
    assert action is not None
    line = "%s %s" % (action.findtext("t:Command", "", spaces),
                      action.findtext("t:Arguments", "", spaces))
    return [word.replace('"', "") for word in re.findall(r'(?:"[^"]*"|[^\s"])+', line)]


def odd_place(folder: Path, name: str) -> Tuple[Path, Path]:
    """Return a Python and the module in a folder whose name is hard to quote."""
    place = folder / name
    place.mkdir()
    shutil.copy(str(MODULE), str(place / "claude_api_bridge.py"))
    (place / "python").symlink_to(sys.executable)
    return place / "python", place / "claude_api_bridge.py"


def odd_file(kind: str, folder: Path, *flags: str) -> Tuple[str, List[str]]:
    """Return what is printed in an odd place with an odd data folder, and both programs there."""
    name = ODD_WINDOWS_NAME if kind == "task" else ODD_NAME
    python, script = odd_place(folder, name)
    run = subprocess.run(
        [str(python), str(script), "service", "print", kind, "--demo", *flags,
         "--data-dir", str(folder / name / "data")],
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "LANG": "C.UTF-8"},
        stdout=subprocess.PIPE, encoding="utf-8", timeout=60)  # fmt: skip
    assert run.returncode == 0
    return run.stdout, [str(python), str(script)]


# --- what is printed ---


@pytest.mark.parametrize("kind", KINDS)
def test_the_flags_of_start_are_in_the_command(tmp_path: Path, kind: str) -> None:
    text = printed(kind, "--port", "4000", "--no-tunnel", "--demo", home=tmp_path, CAB_SPARE="1")
    words = words_of(kind, text)
    assert words[2] == "start"
    assert {"--port=4000", "--no-tunnel", "--demo", "--spare=1"} <= set(words)
    if kind == "docker":
        assert words[:2] == ["python3", "/opt/claude_api_bridge.py"]
    else:
        assert words[:2] == [sys.executable, str(MODULE)]
        assert "--data-dir=%s" % (tmp_path / ".claude-api-bridge") in words


@pytest.mark.parametrize("kind", KINDS[:3])
def test_any_path_survives_the_quoting(tmp_path: Path, kind: str) -> None:
    text, programs = odd_file(kind, tmp_path)
    words = words_of(kind, text)
    if kind == "systemd":
        # The name of a program must not hold $ or quotes.
        assert words.pop(0) == "/usr/bin/env"
    data = "--data-dir=%s" % (Path(programs[0]).parent / "data")
    assert words == [*programs, "start", data, "--demo"]


def test_the_unit_names_the_writable_folders(tmp_path: Path) -> None:
    text, programs = odd_file("systemd", tmp_path)
    data = Path(programs[0]).parent / "data"
    assert unit_values(text, "ReadWritePaths")[:2] == ["-%s" % data, "-%s" % (tmp_path / ".claude")]
    # Where the data is in /tmp, a private one would hide it.
    assert ("\nPrivateTmp=yes\n" in text) == ("/tmp/" not in str(tmp_path) + "/")
    file = re.findall(r"(?m)^EnvironmentFile=-(.*)$", text)
    assert file == [str(data / "service.env").replace("%", "%%")]


def verified(unit: str, folder: Path) -> str:
    """Return what systemd has to say about a unit."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze here (Debian package: systemd)")
    (folder / "bridge.service").write_text(unit, "utf-8")
    run = subprocess.run(
        ["systemd-analyze", "--user", "verify", str(folder / "bridge.service")],
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "XDG_RUNTIME_DIR": str(folder)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", timeout=60)  # fmt: skip
    assert bool(run.returncode) == bool(run.stdout)
    return run.stdout


@pytest.mark.parametrize("name", [ODD_NAME, re.sub(r"[\"$'\\]", "", ODD_NAME), "plain"])
def test_systemd_accepts_the_unit_and_finds_its_program(tmp_path: Path, name: str) -> None:
    python, script = odd_place(tmp_path, name)
    unit = subprocess.run(
        [str(python), str(script), "service", "print", "systemd", "--demo"],
        env={"HOME": str(tmp_path), "LANG": "C.UTF-8"},
        stdout=subprocess.PIPE, encoding="utf-8", timeout=60).stdout  # fmt: skip
    assert verified(unit, tmp_path) == ""
    python.unlink()
    # With $ or quotes in its path, which systemd refuses, the program is an argument of env.
    assert ("is not executable" in verified(unit, tmp_path)) == ("$" not in name)


def test_a_task_survives_the_shells_of_windows(tmp_path: Path) -> None:
    text, _ = odd_file("task", tmp_path)
    assert text.isascii()
    assert "<UserId>DOMAIN\\J&#246;&amp;</UserId>" in printed(
        "task", "--demo", home=tmp_path, USERDOMAIN="DOMAIN", USERNAME="Jö&")


def test_a_dockerfile_copies_a_file_of_any_name(tmp_path: Path) -> None:
    script = tmp_path / "a $b\"'.py"
    shutil.copy(str(MODULE), str(script))
    run = subprocess.run([sys.executable, str(script), "service", "print", "docker", "--port=0"],
                         env={"HOME": str(tmp_path)}, stdout=subprocess.PIPE, encoding="utf-8")
    lines = dict(line.partition(" ")[::2] for line in run.stdout.splitlines())
    source, target = json.loads(lines["COPY"].partition(" ")[2])
    assert (source, target) == ("a \\$b\\\"\\'.py", "/opt/claude_api_bridge.py")
    assert json.loads(lines["CMD"]) == ["python3", target, "start", "--host=0.0.0.0"]
    assert (lines["USER"], json.loads(lines["VOLUME"])) == ("node", ["/data"])
    assert (lines["ENV"], lines["EXPOSE"]) == ("CAB_DATA_DIR=/data", "3456")
    assert "@anthropic-ai/claude-code@latest" in run.stdout


def test_claude_and_the_programs_beside_it_are_found(tmp_path: Path, fake_claude: Fakes) -> None:
    claude = fake_claude().path
    folders = [tmp_path / "node of nvm", tmp_path / "tunnel"]
    for folder, name in zip(folders, ("node", "cloudflared")):
        folder.mkdir()
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    path = os.pathsep.join(map(str, [*folders, claude.parent]))
    text = printed("systemd", "--tunnel-token-file", "token", home=tmp_path, PATH=path,
                   CLAUDE_CONFIG_DIR=str(tmp_path / "config"))
    environment = unit_environment(text)
    assert environment.pop("PATH").split(":")[:3] == [str(claude.parent), *map(str, folders)]
    assert environment == {"CLAUDE_CONFIG_DIR": str(tmp_path / "config")}
    words = unit_values(text, "ExecStart")
    assert "--claude=%s" % claude in words
    assert "--tunnel-token-file=%s" % Path("token").absolute() in words
    assert "-%s" % (tmp_path / "config") in unit_values(text, "ReadWritePaths")


def test_a_dockerfile_needs_no_claude_here(tmp_path: Path) -> None:
    for kind in KINDS:
        run = ran("print", kind, "--claude", "no-such-claude", home=tmp_path)
        if kind == "docker":
            assert run.returncode == 0 and "no-such-claude" not in run.stdout
        else:
            assert run.returncode == 1 and not run.stdout
            assert "Claude Code CLI not found: no-such-claude" in run.stderr


SECRETS = {
    name: "secret-%d" % number
    for number, name in enumerate((
        "CAB_TOKEN", "CAB_TUNNEL_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN", "ANTHROPIC_API_KEY",
        "ANTHROPIC_AUTH_TOKEN", "CAB_SOMETHING"))
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_no_secret_is_copied(tmp_path: Path, kind: str) -> None:
    variables = {**SECRETS, "HTTPS_PROXY": "http://me:secret-9@proxy:8080",
                 "http_proxy": "me:secret-9@proxy:8080", "NO_PROXY": "localhost"}
    run = ran("print", kind, "--demo", home=tmp_path, **variables)
    text = run.stdout
    assert run.returncode == 0 and "secret-" not in text + run.stderr
    assert "proxy:8080" not in text + run.stderr
    assert ("localhost" in text) == (kind in ("systemd", "launchd"))
    run = ran("print", kind, "--demo", "--cloudflared-url", "https://me:secret-9@mirror/x",
              home=tmp_path)
    assert run.returncode == 1 and "--cloudflared-url" in run.stderr
    assert "secret-" not in run.stdout + run.stderr


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_path_with_a_line_break_is_refused(tmp_path: Path, kind: str) -> None:
    run = ran("print", kind, "--demo", "--data-dir", str(tmp_path / "a\nUser=x"), home=tmp_path)
    assert run.returncode == 1 and not run.stdout and "'--data-dir'" in run.stderr


def test_a_pyz_is_named_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "__main__.py").write_text(
        "import sys\nsys.argv[0] = 'x'\nimport claude_api_bridge\nclaude_api_bridge.run()\n")
    archive = tmp_path / "bridge.pyz"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(tmp_path / "__main__.py", "__main__.py")
        file.write(MODULE, "claude_api_bridge.py")
    for kind, program in (("systemd", str(archive)), ("docker", "/opt/claude_api_bridge.pyz")):
        run = subprocess.run(
            [sys.executable, str(archive), "service", "print", kind, "--demo"],
            env={"HOME": str(tmp_path)}, stdout=subprocess.PIPE, encoding="utf-8", timeout=60)
        assert words_of(kind, run.stdout)[1:3] == [program, "start"]
    assert '["bridge.pyz", "/opt/claude_api_bridge.pyz"]' in run.stdout


# --- the printed command runs ---


@contextlib.contextmanager
def started(words: List[str], environ: Mapping[str, str], folder: Path) -> Iterator[Program]:
    running = Program(words, environ, folder)
    try:
        yield running
        assert running.end(signal.SIGTERM) == 0
    finally:
        if running.process.poll() is None:
            running.end(signal.SIGKILL)


def test_the_command_of_a_unit_serves_with_its_environment_only(tmp_path: Path) -> None:
    text, _ = odd_file("systemd", tmp_path, "--port=0", "--no-tunnel", "--host=127.0.0.1")
    environ = {"HOME": str(tmp_path), **unit_environment(text)}
    with started(unit_values(text, "ExecStart"), environ, tmp_path) as running:
        assert running.api.answer("Hello")["response"].endswith("You said: Hello")


def test_the_command_of_an_agent_serves_with_its_environment_only(tmp_path: Path) -> None:
    text, _ = odd_file("launchd", tmp_path, "--port=0", "--no-tunnel", "--host=127.0.0.1")
    agent = plistlib.loads(text.encode())
    with started(agent["ProgramArguments"], agent["EnvironmentVariables"], tmp_path) as running:
        assert running.api.answer("Hello")["response"].endswith("You said: Hello")
    assert agent["RunAtLoad"] and agent["KeepAlive"] == {"SuccessfulExit": False}
    assert Path(agent["StandardOutPath"]).parent.stat().st_mode & 0o77 == 0


def free_port() -> int:
    with socket.socket() as probing:
        probing.bind(("127.0.0.1", 0))
        return int(probing.getsockname()[1])


def test_the_command_of_an_image_serves(tmp_path: Path) -> None:
    """The container has its own paths; here, /opt and /data are folders of the test."""
    port = free_port()
    text = printed("docker", "--no-tunnel", "--demo", "--port", str(port), home=tmp_path)
    assert "\nEXPOSE %d\n" % port in text and "127.0.0.1:%d:%d" % (port, port) in text
    shutil.copy(str(MODULE), str(tmp_path / "claude_api_bridge.py"))
    python, script, *words = words_of("docker", text)
    assert python == "python3" and script == "/opt/claude_api_bridge.py"
    command = [sys.executable, str(tmp_path / Path(script).name), *words]
    # The home of the image is read-only.
    environ = {"CAB_DATA_DIR": str(tmp_path / "data"), "HOME": os.devnull}
    with started(command, environ, tmp_path) as running:
        assert running.port == port
        assert running.api.answer("Hello")["response"].endswith("You said: Hello")


# --- install, uninstall, status ---

# Managers that start what the file says. The log of the first gets both outputs of the service.
MANAGER = """#!%s
import os, pathlib, plistlib, shlex, signal, subprocess, sys
home = pathlib.Path(os.environ["HOME"])
with open(home / "calls", "a") as calls:
    print(*sys.argv[1:], file=calls)
pid_file = home / "pid"

def start(words, environ, log):
    with open(log, "ab") as output:
        child = subprocess.Popen(words, env={"HOME": str(home), **environ}, stdout=output,
                                 stderr=output, stdin=subprocess.DEVNULL, start_new_session=True)
    pid_file.write_text(str(child.pid))

def is_running():
    if not pid_file.exists():
        return False
    state = subprocess.run(["/bin/ps", "-o", "stat=", "-p", pid_file.read_text()],
                           stdout=subprocess.PIPE).stdout
    return bool(state.strip()) and not state.startswith(b"Z")

def stop():
    if is_running():
        os.kill(int(pid_file.read_text()), signal.SIGTERM)
    pid_file.unlink()
""" % sys.executable
SYSTEMCTL = MANAGER + """
action = sys.argv[2]
if action == "enable":
    unit = home / ".config/systemd/user/claude-api-bridge.service"
    values = dict(line.split("=", 1) for line in unit.read_text().splitlines() if "=" in line)
    environ = dict(word.split("=", 1) for word in shlex.split(values["Environment"]))
    start(shlex.split(values["ExecStart"]), environ, home / "journal")
elif action == "disable" and pid_file.exists():
    stop()
elif action == "status":
    print("Active: " + ("active (running)" if is_running() else "inactive (dead)"))
    sys.exit(0 if is_running() else 3)
"""
LAUNCHCTL = MANAGER + """
action = sys.argv[1]
if action == "bootstrap":
    agent = plistlib.loads(pathlib.Path(sys.argv[3]).read_bytes())
    assert agent["StandardOutPath"] == agent["StandardErrorPath"]
    start(agent["ProgramArguments"], agent["EnvironmentVariables"], agent["StandardOutPath"])
elif action == "bootout":
    if not pid_file.exists():
        sys.exit("Boot-out failed: 3: No such process")
    stop()
elif action == "print":
    print("state = " + ("running" if is_running() else "not running"))
"""
NO_BUS = """#!/bin/sh
echo "Failed to connect to bus: No medium found" >&2
exit 1
"""


def manager(folder: Path, name: str, text: str) -> Dict[str, str]:
    """Put a stand-in of a service manager into a PATH of its own. -> the variables."""
    folder = folder / "bin"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
    return {"PATH": str(folder)}


UNIT = ".config/systemd/user/claude-api-bridge.service"
AGENT = "Library/LaunchAgents/claude-api-bridge.plist"
LOCAL = ("--demo", "--no-tunnel", "--host", "127.0.0.1", "--port", "0")


def test_a_service_of_systemd_from_install_to_uninstall(tmp_path: Path) -> None:
    variables = manager(tmp_path, "systemctl", SYSTEMCTL)
    journal, unit = tmp_path / "journal", tmp_path / UNIT

    def address(number: int) -> str:
        """Wait for the nth start; return its address."""
        def urls() -> List[str]:
            return re.findall(r"(?m)^http://\S+$", journal.read_text() if journal.exists() else "")
        wait_until(lambda: len(urls()) == number, 20)
        return urls()[-1]

    try:
        run = ran("install", *LOCAL, home=tmp_path, **variables)
        assert run.returncode == 0
        assert "journalctl --user -u claude-api-bridge" in run.stderr
        assert "loginctl enable-linger" in run.stderr
        assert "token create NAME --admin" in run.stderr
        assert unit.stat().st_mode & 0o777 == 0o600
        port = int(address(1).rpartition(":")[2])
        tokens = TOKEN.findall(journal.read_text())
        assert len(tokens) == 1
        answer = Api(port, tokens[0]).answer("Hello")
        assert answer["response"].endswith("You said: Hello")
        status = ran("status", home=tmp_path, **variables)
        assert (status.returncode, status.stdout) == (0, "Active: active (running)\n")

        # Again, with other flags: the old one ends first, and no second token is printed.
        pid = (tmp_path / "pid").read_text()
        assert ran("install", *LOCAL, "--plan-only", home=tmp_path, **variables).returncode == 0
        address(2)
        assert (tmp_path / "pid").read_text() != pid
        assert "--plan-only" in unit_values(unit.read_text("utf-8"), "ExecStart")
        assert TOKEN.findall(journal.read_text()) == tokens
    finally:
        run = ran("uninstall", home=tmp_path, **variables)
    assert run.returncode == 0 and not unit.exists() and not (tmp_path / "pid").exists()
    wait_until(lambda: journal.read_text().count("Shutting down...") == 2)
    assert (tmp_path / ".claude-api-bridge" / "bridge.db").exists()
    status = ran("status", home=tmp_path, **variables)
    assert (status.returncode, status.stdout) == (1, "It is not installed.\n")
    assert (tmp_path / "calls").read_text().splitlines()[:5] == [
        "--user daemon-reload", "--user daemon-reload", "--user disable --now claude-api-bridge",
        "--user daemon-reload", "--user enable --now claude-api-bridge"]  # fmt: skip


def test_an_agent_of_launchd_from_install_to_uninstall(tmp_path: Path) -> None:
    variables = manager(tmp_path, "launchctl", LAUNCHCTL)
    log = tmp_path / ".claude-api-bridge/service.log"
    try:
        run = ran("install", *LOCAL, home=tmp_path, **variables)
        assert run.returncode == 0
        assert str(log) in run.stderr
        agent = plistlib.loads((tmp_path / AGENT).read_bytes())
        assert "--demo" in agent["ProgramArguments"]
        status = ran("status", home=tmp_path, **variables)
        assert (status.returncode, status.stdout) == (0, "state = running\n")
        port = int(re.findall(r"It listens on http://localhost:(\d+)", run.stderr)[0])
        answer = Api(port, TOKEN.findall(log.read_text())[0]).answer("Hello")
        assert answer["response"].endswith("You said: Hello")
    finally:
        run = ran("uninstall", home=tmp_path, **variables)
    assert run.returncode == 0
    wait_until(lambda: "Shutting down..." in log.read_text())
    assert not (tmp_path / AGENT).exists()
    domain = "gui/%d" % os.getuid()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "bootstrap %s %s" % (domain, tmp_path / AGENT) in calls
    assert calls.count("bootout %s/claude-api-bridge" % domain) == 2
    assert "print %s/claude-api-bridge" % domain in calls


@pytest.mark.parametrize("action", ["install", "uninstall"])
@pytest.mark.parametrize(
    "name, path", [("systemctl", UNIT), ("launchctl", AGENT)], ids=["systemd", "launchd"])
def test_the_file_of_somebody_else_stays(
    tmp_path: Path, action: str, name: str, path: str
) -> None:
    variables = manager(tmp_path, name, "#!/bin/sh\ntouch $HOME/called\n")
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text("[Service]\nExecStart=/bin/true\n")
    run = ran(action, *(LOCAL if action == "install" else ()), home=tmp_path, **variables)
    assert run.returncode == 1 and "is not from this program" in run.stderr
    assert (tmp_path / path).read_text() == "[Service]\nExecStart=/bin/true\n"
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("action", ["install", "uninstall", "status"])
def test_without_a_service_manager_one_sentence_says_so(tmp_path: Path, action: str) -> None:
    run = ran(action, home=tmp_path, PATH=str(tmp_path))
    assert run.returncode == 1 and not run.stdout
    assert run.stderr.splitlines() == [
        "error: Neither systemctl nor launchctl is here.",
        "hint: try: python3 %s service print --help" % MODULE]


def test_a_manager_that_cannot_be_reached_is_reported_and_nothing_written(tmp_path: Path) -> None:
    variables = manager(tmp_path, "systemctl", NO_BUS)
    run = ran("install", *LOCAL, home=tmp_path, **variables)
    assert run.returncode == 1 and not (tmp_path / UNIT).exists()
    assert "Failed to connect to bus: No medium found" in run.stderr
    assert "not by su or sudo" in run.stderr


def test_a_bridge_that_runs_already_is_not_disturbed(tmp_path: Path, program: Programs) -> None:
    running = program(demo=True)
    variables = manager(tmp_path, "systemctl", SYSTEMCTL)
    run = ran("install", *LOCAL, "--data-dir", str(tmp_path / "data"), home=tmp_path, **variables)
    assert run.returncode == 1 and not (tmp_path / UNIT).exists()
    assert "Another bridge is running" in run.stderr
    assert running.api.get("/health").status == 200


def test_a_bridge_beside_a_stopped_service_is_not_disturbed(
    tmp_path: Path, program: Programs
) -> None:
    variables = manager(tmp_path, "systemctl", SYSTEMCTL)
    folder = ("--data-dir", str(tmp_path / "data"))
    assert ran("install", *LOCAL, *folder, home=tmp_path, **variables).returncode == 0
    pid = int((tmp_path / "pid").read_text())
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not is_running(pid))
    before = (tmp_path / UNIT).read_bytes()
    running = program(demo=True)
    run = ran("install", *LOCAL, *folder, "--plan-only", home=tmp_path, **variables)
    assert run.returncode == 1 and "Another bridge is running" in run.stderr
    assert (tmp_path / UNIT).read_bytes() == before
    assert Api(running.port).get("/health").status == 200


def test_a_service_that_cannot_be_stopped_is_the_error(tmp_path: Path) -> None:
    variables = manager(tmp_path, "systemctl", SYSTEMCTL)
    assert ran("install", *LOCAL, home=tmp_path, **variables).returncode == 0
    try:
        stub = (tmp_path / "bin" / "systemctl").read_text()
        refusal = 'if action == "disable": sys.exit("Access denied")\n'
        manager(tmp_path, "systemctl", stub.replace('if action == "enable"', refusal
                                                    + 'if action == "enable"'))
        run = ran("install", *LOCAL, "--plan-only", home=tmp_path, **variables)
        assert run.returncode == 1 and "Access denied" in run.stderr
        assert "Another bridge" not in run.stderr
    finally:
        manager(tmp_path, "systemctl", SYSTEMCTL)
        assert ran("uninstall", home=tmp_path, **variables).returncode == 0


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    variables = manager(tmp_path, "systemctl", "#!/bin/sh\n")
    (tmp_path / ".config").write_text("a file")
    run = ran("install", *LOCAL, home=tmp_path, **variables)
    assert run.returncode == 1 and "cannot be read: Not a directory" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("name, text, path", [
    ("systemctl", SYSTEMCTL, UNIT), ("launchctl", LAUNCHCTL, AGENT)], ids=["systemd", "launchd"])
def test_a_bridge_that_does_not_stay_is_reported_and_removed(
    tmp_path: Path, name: str, text: str, path: str
) -> None:
    variables = manager(tmp_path, name, text)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        run = ran("install", *LOCAL[:-1], port, home=tmp_path, **variables)
    assert run.returncode == 1 and "the bridge does not run" in run.stderr
    assert "its output says why: " in run.stderr
    assert not (tmp_path / path).exists() and not (tmp_path / "pid").exists()


def test_a_reinstall_that_fails_brings_the_old_service_back(tmp_path: Path) -> None:
    variables = manager(tmp_path, "systemctl", SYSTEMCTL)
    unit = tmp_path / UNIT
    try:
        assert ran("install", *LOCAL, home=tmp_path, **variables).returncode == 0
        before = unit.read_bytes()
        # It is printed after the bridge listens.
        wait_until(lambda: bool(TOKEN.findall((tmp_path / "journal").read_text())), 20)
        token = TOKEN.findall((tmp_path / "journal").read_text())[0]
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            run = ran("install", *LOCAL[:-1], port, home=tmp_path, **variables)
        assert run.returncode == 1 and "the bridge does not run" in run.stderr
        assert unit.read_bytes() == before

        def addresses() -> List[str]:
            return re.findall(r"(?m)^http://\S+$", (tmp_path / "journal").read_text())

        wait_until(lambda: len(addresses()) == 2, 20)
        api = Api(int(addresses()[-1].rpartition(":")[2]), token)
        assert api.answer("Hello")["response"].endswith("You said: Hello")
    finally:
        assert ran("uninstall", home=tmp_path, **variables).returncode == 0


def test_what_cannot_be_undone_is_said(tmp_path: Path) -> None:
    """The manager starts nothing, and does not stop what it says that it runs."""
    variables = manager(tmp_path, "systemctl", """#!/bin/sh
case "$2" in
    enable) echo "Job failed" >&2; exit 1 ;;
    disable) echo "Access denied" >&2; exit 1 ;;
    status) echo "Active: active (running)" ;;
esac
""")
    run = ran("install", *LOCAL, home=tmp_path, **variables)
    assert run.returncode == 1
    assert "Job failed" in run.stderr and "could not be undone: " in run.stderr
    assert "Access denied" in run.stderr and (tmp_path / UNIT).exists()


def test_an_interrupted_installation_is_undone(tmp_path: Path) -> None:
    """The manager starts something that does not listen, and the user presses Ctrl-C."""
    variables = manager(tmp_path, "systemctl", """#!/bin/sh
echo "$@" >> "$HOME/calls"
if [ "$2" = status ]; then echo "Active: active (running)"; fi
""")
    process = subprocess.Popen(
        [sys.executable, str(MODULE), "service", "install", *LOCAL],
        env={"HOME": str(tmp_path), **variables}, stderr=subprocess.PIPE, encoding="utf-8")
    wait_until(lambda: (tmp_path / "calls").exists()
               and "enable --now" in (tmp_path / "calls").read_text())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1 and "Interrupted." in err and "Traceback" not in err
    assert not (tmp_path / UNIT).exists()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "--user disable --now claude-api-bridge" in calls[calls.index(
        "--user enable --now claude-api-bridge") :]


def test_a_bridge_that_starts_slowly_is_not_taken_away(tmp_path: Path) -> None:
    """The manager runs it, and it does not listen yet."""
    variables = manager(tmp_path, "systemctl", """#!/bin/sh
if [ "$2" = status ]; then echo "Active: active (running)"; fi
""")
    program = "import claude_api_bridge as cab; cab.SERVICE_START_SECONDS = 0.2; cab.run()"
    run = subprocess.run(
        [sys.executable, "-c", program, "service", "install", *LOCAL],
        env={"HOME": str(tmp_path), "PYTHONPATH": str(MODULE.parent), **variables},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", timeout=60)  # fmt: skip
    assert run.returncode == 0 and (tmp_path / UNIT).exists()
    assert "does not listen yet" in run.stderr


@pytest.mark.parametrize("action", ["install", "uninstall", "status"])
def test_a_folder_in_place_of_the_file_is_one_sentence(tmp_path: Path, action: str) -> None:
    variables = manager(tmp_path, "systemctl", SYSTEMCTL)
    (tmp_path / UNIT).mkdir(parents=True)
    run = ran(action, *(LOCAL if action == "install" else ()), home=tmp_path, **variables)
    assert (run.returncode, run.stdout) == (1, "")
    assert "claude-api-bridge.service cannot be read: Is a directory." in run.stderr


@pytest.mark.parametrize("kind, place", [
    ("systemd", "service.env"), ("docker", "docker run with -e NAME"),
    ("launchd", "runs without it")])  # fmt: skip
def test_what_is_secret_is_named(tmp_path: Path, kind: str, place: str) -> None:
    secret = "Z3c7-not-to-be-copied"
    variables = {"CAB_TUNNEL_TOKEN": secret, "CLAUDE_CODE_OAUTH_TOKEN": secret,
                 "ANTHROPIC_API_KEY": secret, "https_proxy": "http://me:a/%s@proxy:1" % secret}
    run = ran("print", kind, "--demo", home=tmp_path, **variables)
    assert run.returncode == 0 and secret not in run.stdout + run.stderr
    lines = run.stderr.splitlines()
    # An API key is not passed to claude without --allow-api-key.
    assert sorted(line.split()[0] for line in lines) == [
        "CAB_TUNNEL_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN", "https_proxy"]  # fmt: skip
    assert all(place in line for line in lines)
    if kind == "systemd":
        (tmp_path / ".claude-api-bridge").mkdir()
        names = "CAB_TUNNEL_TOKEN=x\nCLAUDE_CODE_OAUTH_TOKEN=y\n"
        (tmp_path / ".claude-api-bridge" / "service.env").write_text(names)
        run = ran("print", kind, "--demo", home=tmp_path, **variables)
        assert [line.split()[0] for line in run.stderr.splitlines()] == ["https_proxy"]
    run = ran("print", kind, "--demo", "--allow-api-key", home=tmp_path, **variables)
    assert "ANTHROPIC_API_KEY" in run.stderr and secret not in run.stdout + run.stderr


def test_what_is_passed_to_claude_is_in_the_environment(tmp_path: Path) -> None:
    variables = {
        "ANTHROPIC_BASE_URL": "https://gateway.example/x", "ALL_PROXY": "socks5://proxy:1",
        "CLAUDE_CODE_CLIENT_CERT": "/c.pem", "CLAUDE_CODE_CLIENT_KEY": "/k.pem"}
    unit = printed("systemd", "--demo", home=tmp_path, **variables)
    assert unit_environment(unit).items() >= variables.items()
    secret = "Z3c8-not-to-be-copied"
    run = ran("print", "systemd", "--demo", home=tmp_path,
              CLAUDE_CODE_CLIENT_KEY_PASSPHRASE=secret,
              ANTHROPIC_BASE_URL="https://me:%s@gateway.example" % secret)
    assert run.returncode == 0 and secret not in run.stdout + run.stderr
    assert sorted(line.split()[0] for line in run.stderr.splitlines()) == [
        "ANTHROPIC_BASE_URL", "CLAUDE_CODE_CLIENT_KEY_PASSPHRASE"]  # fmt: skip


def test_a_relative_path_cannot_add_a_line(tmp_path: Path) -> None:
    folder = tmp_path / "a\nExecStartPre=x"
    folder.mkdir()
    run = subprocess.run(
        [sys.executable, str(MODULE), "service", "print", "systemd", "--demo"], cwd=str(folder),
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "NODE_EXTRA_CA_CERTS": "ca.pem"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", timeout=30)  # fmt: skip
    assert run.returncode == 0 and "ExecStartPre" not in run.stdout
    assert run.stderr.startswith("NODE_EXTRA_CA_CERTS ")


def test_a_login_in_tmp_stays_visible(tmp_path: Path) -> None:
    unit = printed("systemd", "--demo", "--data-dir", "/data", home=tmp_path,
                   CLAUDE_CONFIG_DIR="/tmp/login")
    assert "PrivateTmp=no" in unit


def test_an_image_listens_where_docker_forwards_to(tmp_path: Path) -> None:
    text = printed("docker", "--demo", "--host", "127.0.0.1", home=tmp_path)
    assert "--host=0.0.0.0" in words_of("docker", text)
