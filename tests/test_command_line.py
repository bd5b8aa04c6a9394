"""The command line: the commands, their output on stdout and stderr, and their exit status."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import socketserver
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import (
    Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple,
)

import pytest
from conftest import (
    IMPORTED, MODULE, Api, FakeClaude, Program, is_running, run_cli, wait_until,
)
from fake_claude import FLAGS

import claude_api_bridge as cab

# The types of the fixtures.
Fakes = Callable[..., FakeClaude]
Programs = Callable[..., Program]
Command = Callable[..., "Output"]
TOKEN = re.compile(r"cab-[0-9a-f]{64}")
cpython_memory = pytest.mark.skipif(
    sys.implementation.name != "cpython", reason="the bound was measured on CPython"
)


class Output(NamedTuple):
    """The exit status of a command, and its texts on stdout and stderr."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    """Return a function that runs a command in this process, with a home folder of its own.

    command(*words, **variables) -> Output
    """
    for name in [name for name in os.environ if name.startswith("CAB_") or name == "PORT"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CAB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(sys, "argv", ["claude_api_bridge.py"])

    def run(*words: str, **variables: str) -> Output:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            try:
                status = cab.main(words)
            except SystemExit as end:
                status = int(end.code or 0)
        return Output(status, *capsys.readouterr())

    return run


@pytest.fixture
def program(program: Programs, fake_claude: Fakes) -> Iterator[Programs]:
    """Return conftest's function, but kill the programs that still run at the end of the test."""
    started: List[Program] = []
    claude = fake_claude().path

    def start(*flags: str, **options: Any) -> Program:
        started.append(program(*flags, **{"claude": claude, **options}))
        return started[-1]

    yield start
    for running in started:
        if running.process.poll() is None:
            running.end(signal.SIGKILL)


def rest_of_stdout(program: Program) -> str:
    """End the program; return its output after the address."""
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(10) == 0
    assert program.process.stdout
    return program.process.stdout.read().decode()


def tokens(command: Command) -> Dict[str, Dict[str, Any]]:
    """Return all tokens by name."""
    return {token["name"]: token for token in json.loads(command("token", "list", "--json").out)}


# --- arguments ---


@pytest.mark.parametrize("words", [["--version"], ["-v"]])
def test_only_the_version_is_printed(command: Command, words: List[str]) -> None:
    assert command(*words) == (0, cab.__version__ + "\n", "")


def run_code(code: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run a program that can import the module."""
    prefix = "import sys; sys.path.insert(0, %r)\n" % str(MODULE.parent)
    return subprocess.run(
        [sys.executable, "-S", "-c", prefix + code, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        timeout=60,
    )


@pytest.mark.parametrize("word", ["--version", "-v"])
@pytest.mark.parametrize(
    "name",
    [
        "/bin/claude-api-bridge", r"C:\Scripts\claude-api-bridge.exe", "claude_api_bridge.py",
        "dist/claude_api_bridge.pyz",
    ],
)
def test_the_version_is_printed_without_importing_the_server(word: str, name: str) -> None:
    code = (
        "import atexit; sys.argv[0] = %r\n"
        "atexit.register(lambda: print({'http', 'sqlite3', 'subprocess'} & set(sys.modules)))\n"
        "import claude_api_bridge"
    )
    done = run_code(code % name, word)
    assert (done.returncode, done.stdout, done.stderr) == (0, cab.__version__ + "\nset()\n", "")


def test_a_program_that_only_imports_the_module_has_its_own_version() -> None:
    names = [
        "-c",
        "/claude_api_bridge/other.py",
        "other-claude_api_bridge/claude_api_bridge_test.py",
        "",
    ]
    code = """
for name in %r:
    for word in ("--version", "-v"):
        sys.argv = [name, word]
        sys.modules.pop("claude_api_bridge", None)
        import claude_api_bridge
        print("mine", name, word)
"""
    done = run_code(code % names)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "mine %s %s" % (name, word) for name in names for word in ("--version", "-v")
    ]


def test_the_modules_of_a_download_are_not_imported_at_a_start() -> None:
    code = "import claude_api_bridge; print({'urllib.request', 'tarfile'} & set(sys.modules))"
    assert run_code(code).stdout == "set()\n"


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_is_printed_on_request_and_without_a_command(
    command: Command, tmp_path: Path, words: List[str]
) -> None:
    status, out, err = command(*words)
    assert (status, err) == (0, "")
    assert "start" in out
    assert "token" in out
    assert not (tmp_path / "data").exists()


def test_help_of_start_shows_every_setting_and_starts_nothing(
    command: Command, tmp_path: Path
) -> None:
    status, out, _ = command("start", "--help")
    missing = [
        word
        for row in cab.SETTINGS
        for word in (row.flag, *row.variables, row.help.split(":")[0].split()[0])
        if word not in out
    ]
    assert (status, missing) == (0, [])
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["frobnicate"], ["help", "me"], ["start", "--prot", "1"], ["start", "extra"],
        ["start", "--port"],
        ["start", "--no-tunnel=maybe"], ["token"], ["token", "frob"], ["token", "create"],
        ["token", "revoke"], ["token", "create", "x", "--requests-per-minute"],
        ["token", "create", "x", "--models"], ["token", "create", "x", "--requests", "5"],
        ["token", "update"], ["token", "rotate"], ["completion", "tcsh"],
    ],
)
def test_invalid_arguments_are_refused(command: Command, tmp_path: Path, words: List[str]) -> None:
    status, out, err = command(*words)
    assert (status, out) == (2, "")
    assert err.splitlines()[-2].startswith("error: ")
    assert err.splitlines()[-1].startswith("hint: ")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "words, variables, named",
    [
        (["--port", "abc"], {}, "--port"),
        (["--port", "65536"], {}, "--port"),
        (["--port", "-1"], {}, "--port"),
        (["--port", "80.5"], {}, "--port"),
        # A digit for int(), but not for the bridge.
        (["--port", "٣"], {}, "--port"),
        (["--port="], {}, "--port"),
        ([], {"CAB_PORT": "abc"}, "CAB_PORT"),
        ([], {"PORT": "abc"}, "PORT"),
        (["--rate-limit", "many"], {}, "--rate-limit"),
        (["--spare", "4"], {}, "--spare"),
        (["--run-seconds", "0"], {}, "--run-seconds"),
        (["--silence-seconds", "1e3"], {}, "--silence-seconds"),
        (["--keep-days", "0"], {}, "--keep-days"),
        (["--data-dir", " "], {}, "--data-dir"),
        ([], {"CAB_DEMO": "maybe"}, "CAB_DEMO"),
        ([], {"CAB_ALLOW_API_KEY": "2"}, "CAB_ALLOW_API_KEY"),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_its_source(
    command: Command, tmp_path: Path, words: List[str], variables: Mapping[str, str], named: str
) -> None:
    status, out, err = command("start", *words, **variables)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"error: %s (must be|is not) [^\n]+\.\n" % named, err)
    assert not (tmp_path / "data").exists()


# --- tokens ---


def test_tokens_are_created_listed_and_revoked_without_a_bridge(tmp_path: Path) -> None:
    def token_command(*words: str) -> Any:
        return run_cli("token", *words, "--data-dir", str(tmp_path / "data"))

    created = token_command("create", "my app")
    secret = created.stdout.rstrip("\n")
    assert created.returncode == 0
    assert TOKEN.fullmatch(secret)
    assert secret not in created.stderr
    listed = token_command("list")
    token_id = listed.stdout.splitlines()[1].split()[0]
    assert "my app" in listed.stdout
    assert secret[:12] in listed.stdout
    assert not TOKEN.search(listed.stdout + listed.stderr)
    assert token_id in created.stderr
    revoked = token_command("revoke", token_id)
    assert (revoked.returncode, revoked.stdout, revoked.stderr) == (0, "", "Token revoked\n")
    second = token_command("revoke", token_id)
    assert (second.returncode, second.stdout, second.stderr) == (
        1, "", "error: Token not found: there is no ID, name or prefix %r\n" % token_id)
    assert json.loads(token_command("list", "--json").stdout) == []


def test_a_running_bridge_uses_tokens_of_the_command_line_at_once(
    program: Programs, tmp_path: Path
) -> None:
    running = program()
    folder = ("--data-dir", str(tmp_path / "data"))
    created = json.loads(run_cli("token", "create", "x", "--json", *folder).stdout)
    api = Api(running.port, created["token"])
    assert created["token"].startswith(created["prefix"])
    assert api.answer("hello")["response"] == "Echo: hello"
    run_cli("token", "revoke", created["tokenId"], *folder)
    assert api.get("/api/ask/x").status == 401


def test_the_options_of_a_token_are_stored(command: Command, tmp_path: Path) -> None:
    command("token", "create", "plain")
    command(
        "token", "create", "special", "--admin", "--stateful", "--expires", "7", "--tools", "read",
        "--workspace", str(tmp_path),
    )
    plain, special = (tokens(command)[name] for name in ("plain", "special"))
    names = ("isAdmin", "sessionMode", "expiresAt", "tools", "workspace")
    assert [plain[name] for name in names] == [False, "stateless", None, "none", None]
    assert [special[name] for name in names if name != "expiresAt"] == [
        True, "stateful", "read", str(tmp_path),
    ]
    in_a_week = str(cab.iso_time(time.time() + 7 * 86_400))
    assert special["expiresAt"][:10] == in_a_week[:10]


@pytest.mark.parametrize(
    "text, stored",
    [
        ("none", "none"),
        ("read", "read"),
        ("web", "web"),
        ("all", "all"),
        ("Read", ["Read"]),
        ("Read,Bash(git log:*)", ["Read", "Bash(git log:*)"]),
        (
            "Bash(git log --format=%h,%s:*),Edit,Bash(a,b,c)",
            ["Bash(git log --format=%h,%s:*)", "Edit", "Bash(a,b,c)"],
        ),
        ("Read, Edit", ["Read", "Edit"]),
        ("", None),
        ("everything!", None),
        ("Bash(rm", None),
        ("read,web()", None),
        ("Bash(a)b", None),
        ("--tools", None),
    ],
)
def test_tools_are_a_level_or_a_list_of_rules(command: Command, text: str, stored: Any) -> None:
    status, out, err = command("token", "create", "x", "--tools=" + text)
    if stored is None:
        assert (status, out) == (2, "")
        assert re.fullmatch(r"error: tools(: | must be )[^\n]+\n", err)
        assert tokens(command) == {}
    else:
        assert status == 0
        assert tokens(command)["x"]["tools"] == stored


def test_a_token_with_tools_gets_a_private_folder_of_its_own(
    command: Command, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        command("token", "create", name, "--tools", "read")
    folders = [Path(token["workspace"]) for token in tokens(command).values()]
    assert len(set(folders)) == 2
    assert all(folder.parent == tmp_path / "data" / "workspaces" for folder in folders)
    assert os.name == "nt" or all(folder.stat().st_mode & 0o777 == 0o700 for folder in folders)


def test_the_limits_of_a_token_are_stored(command: Command) -> None:
    command("token", "create", "free")
    command(
        "token", "create", "limited", "--requests-per-minute", "10", "--requests-per-day=1000000",
        "--models", "haiku,opus[1m],default",
    )
    names = ("requestsPerMinute", "requestsPerDay", "models")
    assert [tokens(command)["free"][name] for name in names] == [None] * 3
    assert [tokens(command)["limited"][name] for name in names] == [
        10, 1_000_000, ["haiku", "opus[1m]", "default"],
    ]


INVALID_NUMBERS = ("0", "-1", "1.5", "1e3", "0x1", "many", "", " 5", "5 ", "٣")


@pytest.mark.parametrize(
    "flag, values, sentence",
    [
        (
            "--requests-per-minute", [*INVALID_NUMBERS, "10001"],
            "--requests-per-minute must be a whole number from 1 to 10000",
        ),
        (
            "--requests-per-day", [*INVALID_NUMBERS, "1000001"],
            "--requests-per-day must be a whole number from 1 to 1000000",
        ),
        (
            "--models",
            [
                "", ",", "haiku,", ",haiku", "haiku,,opus", "a b", "-p", "m" * 129,
                ",".join(["haiku"] * 21),
            ],
            "(model|--models) must be [^\\n]+",
        ),
    ],
)
def test_an_invalid_limit_is_refused_and_no_token_is_created(
    command: Command, flag: str, values: List[str], sentence: str
) -> None:
    for value in values:
        status, out, err = command("token", "create", "x", "%s=%s" % (flag, value))
        assert (status, out) == (2, "") and re.fullmatch("error: %s\n" % sentence, err), (
            value,
            err,
        )
    assert tokens(command) == {}


@pytest.mark.parametrize(
    "words, text",
    [
        (["--tools", "read", "--workspace", "nowhere"], "nowhere is not a folder."),
        (["--workspace", "."], "A workspace needs tools."),
    ],
)
def test_a_workspace_must_exist_and_have_a_use(
    command: Command, words: List[str], text: str
) -> None:
    status, out, err = command("token", "create", "x", *words)
    assert (status, out) == (1, "")
    assert re.fullmatch(r"error: [^\n]*%s\nhint: [^\n]+\n" % re.escape(text), err)
    assert tokens(command) == {}


def test_an_unknown_token_id_is_an_error(command: Command) -> None:
    command("token", "create", "y")
    # The last one is how Python represents an argument that is not UTF-8.
    for token_id in ("x", "%", "\udcff"):
        status, out, err = command("token", "revoke", token_id)
        assert (status, out) == (1, "") and err.startswith("error: Token not found: ")


@pytest.mark.parametrize("name", ["", "  ", "x" * 101])
def test_an_invalid_name_is_refused(command: Command, name: str) -> None:
    status, out, err = command("token", "create", name)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"error: Token name [^\n]+\n", err)


def test_a_name_cannot_add_a_line_to_the_list_or_control_the_terminal(command: Command) -> None:
    command("token", "create", "one\nforged \x1b[31mred")
    out = command("token", "list").out
    assert len(out.splitlines()) == 2
    assert "\x1b" not in out


def test_the_last_admin_token_stays_and_a_lost_one_is_replaced(
    program: Programs, command: Command
) -> None:
    running = program()
    token_id = tokens(command)["admin"]["id"]
    refusal = (1, "", "error: Cannot delete the last admin token\n")
    assert command("token", "revoke", token_id) == refusal
    assert running.api.get("/api/tokens").status == 200
    secret = command("token", "create", "new", "--admin").out.strip()
    assert command("token", "revoke", token_id).status == 0
    assert running.api.get("/api/tokens").status == 401
    assert running.api.with_token(secret).get("/api/tokens").status == 200


# --- start: output ---


def test_the_admin_token_is_printed_once_and_only_on_the_first_start(program: Programs) -> None:
    first = program()
    assert TOKEN.fullmatch(first.lines[0])
    assert re.fullmatch(r"http://localhost:\d+", first.lines[1])
    output = "\n".join(first.lines) + rest_of_stdout(first) + first.stderr
    assert len(TOKEN.findall(output)) == 1
    second = program()
    assert Api(second.port, first.token).get("/api/tokens").status == 200
    assert len(second.lines) == 1
    assert not TOKEN.search(second.stderr)


def test_stdout_contains_only_the_token_and_the_address(program: Programs) -> None:
    running = program()
    running.api.answer("hello")
    running.api.answer("die 1")
    assert len(running.lines) == 2
    assert rest_of_stdout(running) == ""
    narration = (
        "Dashboard: http",
        "Data directory: ",
        "Claude Code CLI detected (2.1.330",
        "completed",
        "failed",
        "Shutting down",
    )
    assert [words for words in narration if words not in running.stderr] == []


@pytest.mark.parametrize("environ", [{"NO_COLOR": "1"}, {"PYTHONIOENCODING": "ascii"}])
def test_a_file_gets_plain_text(program: Programs, environ: Mapping[str, str]) -> None:
    running = program(environ=environ)
    assert running.stderr.isascii()
    assert "\x1b" not in running.stderr


@pytest.mark.skipif(os.name == "nt", reason="needs pseudo terminals")
def test_no_color_is_respected_at_a_terminal(tmp_path: Path) -> None:
    terminal, command_side = os.openpty()
    try:
        environ = {
            "NO_COLOR": "1",
            "TERM": "xterm-256color",
            "LANG": "C.UTF-8",
            "PATH": os.environ["PATH"],
        }
        run_cli("token", "create", "y", "--data-dir", str(tmp_path / "data"))
        subprocess.run(
            [*IMPORTED, "token", "revoke", "x", "--data-dir", str(tmp_path / "data")],
            stdin=subprocess.DEVNULL,
            stdout=command_side,
            stderr=command_side,
            env=environ,
            timeout=30,
        )
        output = os.read(terminal, 10_000).decode()
    finally:
        os.close(terminal)
        os.close(command_side)
    assert "Token not found" in output
    assert "\x1b" not in output


def test_a_name_that_the_encoding_lacks_is_listed_with_replacements(tmp_path: Path) -> None:
    folder = ("--data-dir", str(tmp_path / "data"))
    run_cli("token", "create", "naïve 名", *folder)
    listed = run_cli("token", "list", *folder, environ={"PYTHONIOENCODING": "ascii"})
    assert listed.returncode == 0
    assert "na?ve" in listed.stdout
    assert "Traceback" not in listed.stderr


@pytest.mark.skipif(os.name == "nt", reason="pipes end differently")
def test_a_closed_pipe_causes_no_traceback(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*IMPORTED, "token", "list", "--data-dir", str(tmp_path / "data")],
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=30,
        )
    finally:
        os.close(writer)
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize(
    "words", ["start --no-tunnel --host 127.0.0.1 --port 0", "token create x --admin"]
)
def test_no_token_is_created_if_it_cannot_be_printed(
    program: Programs, tmp_path: Path, words: str
) -> None:
    environ = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path),
        "CAB_CLAUDE": str(tmp_path / "fake" / "claude"),
    }
    with open("/dev/full", "w") as full:
        running = subprocess.Popen(
            [*IMPORTED, *words.split(), "--data-dir", str(tmp_path / "data")],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
    try:
        _, err = running.communicate(timeout=30)
    finally:
        running.kill()
        running.communicate()
    assert running.returncode == 1
    assert "Traceback" not in err
    assert "error: " in err
    assert TOKEN.fullmatch(program().lines[0])


# --- start: the CLI, and its billing ---


def failed_start(tmp_path: Path, *words: str, **options: Any) -> Tuple[str, str]:
    """Run a start that fails; return its error and its hint. It prints nothing else."""
    folder = ("--data-dir", str(tmp_path / "data"))
    done = run_cli("start", "--no-tunnel", "--port", "0", *words, *folder, home=tmp_path, **options)
    assert done.returncode == 1
    assert done.stdout == ""
    pattern = r"claude-api-bridge v[^\n]+\nerror: ([^\n]+\.)\nhint: ([^\n]+)\n"
    match = re.fullmatch(pattern, done.stderr)
    assert match, done.stderr
    return match.group(1), match.group(2)


def executable(path: Path, text: str) -> Path:
    """Write an executable file; return its path."""
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "text, words, hint",
    [
        (None, "CLI not found: ", "install it first: https://"),
        ("#!/nowhere/at-all\n", "cannot be run", "--claude PATH"),
        (
            "#!/bin/sh\necho hello\n",
            "does not answer like Claude Code (its --version prints 'hello')",
            "--claude PATH",
        ),
    ],
)
def test_a_file_that_is_not_claude_is_an_error_with_a_hint(
    tmp_path: Path, text: Optional[str], words: str, hint: str
) -> None:
    path = tmp_path / "claude" if text is None else executable(tmp_path / "claude", text)
    error, advice = failed_start(tmp_path, "--claude", str(path))
    assert words in error
    assert hint in advice
    assert not (tmp_path / "data" / "bridge.db").exists()


@pytest.mark.parametrize(
    "options, words, hint",
    [
        ({"auth": {"loggedIn": False}}, "not signed in", "--demo"),
        ({"version": "1.0.128 (Claude Code)"}, "1.0.128 (Claude Code) is too old", "claude update"),
    ],
)
def test_an_unusable_claude_is_an_error_with_a_hint(
    fake_claude: Fakes, tmp_path: Path, options: Mapping[str, Any], words: str, hint: str
) -> None:
    environ = {"CAB_CLAUDE": str(fake_claude(**options).path)}
    error, advice = failed_start(tmp_path, environ=environ)
    assert words in error
    assert hint in advice


KEY = "sk-ant-api03-" + "A1b2" * 10


@pytest.mark.parametrize(
    "auth, environ, flags, present, absent",
    [
        (
            {"loggedIn": True, "authMethod": "claude.ai", "subscriptionType": "max"}, {}, [],
            ["Billing: Claude Max subscription"], ["PER TOKEN", "ANTHROPIC"],
        ),
        (
            {"loggedIn": True, "authMethod": "oauth_token"}, {"CLAUDE_CODE_OAUTH_TOKEN": "x"}, [],
            ["Billing: the subscription behind CLAUDE_CODE_OAUTH_TOKEN"], ["PER TOKEN"],
        ),
        (
            {"loggedIn": True, "subscriptionType": "pro"},
            {"ANTHROPIC_API_KEY": KEY},
            [],
            [
                "Billing: Claude Pro subscription",
                "ANTHROPIC_API_KEY is set; it is not passed to claude.",
            ],
            ["PER TOKEN", KEY],
        ),
        (
            {"loggedIn": True, "subscriptionType": "pro"}, {"ANTHROPIC_API_KEY": KEY},
            ["--allow-api-key"], ["BILLED PER TOKEN"], ["subscription", KEY],
        ),
        (
            {"loggedIn": True, "apiKeySource": "ANTHROPIC_API_KEY"}, {"ANTHROPIC_API_KEY": KEY},
            ["--allow-api-key"], ["BILLED PER TOKEN"], [KEY],
        ),
        (
            {"loggedIn": True, "apiKeySource": "apiKeyHelper"}, {}, [], ["apiKeyHelper"],
            ["is passed"],
        ),
        (
            {"loggedIn": True, "subscriptionType": "max"},
            {"ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}, [],
            ["ANTHROPIC_BASE_URL is passed to claude: http://127.0.0.1:9"], [],
        ),
    ],
)
def test_the_billing_account_is_printed(
    program: Programs,
    tmp_path: Path,
    auth: Mapping[str, Any],
    environ: Mapping[str, str],
    flags: List[str],
    present: List[str],
    absent: List[str],
) -> None:
    script = (
        "#!/bin/sh\n"
        'case "$1" in\n'
        "--version) echo 2.1.330 ;;\n"
        "--help) echo '  auth %s' ;;\n"
        "--setting-sources=) echo '%s' ;;\n"
        "esac\n"
    )
    claude = executable(tmp_path / "claude", script % (FLAGS, json.dumps(auth)))
    output = program("--spare", "0", *flags, environ=environ, claude=claude).stderr
    assert [text for text in present if text not in output] == []
    assert [text for text in absent if text in output] == []


@pytest.mark.skipif(os.name == "nt", reason="signals differ")
def test_ctrl_c_during_the_probe_of_claude_causes_no_traceback(
    fake_claude: Fakes, tmp_path: Path
) -> None:
    fake = fake_claude()
    started = tmp_path / "started"
    fake.path.write_text("#!/bin/sh\ntouch %s\nexec sleep 20\n" % shlex.quote(str(started)))
    running = subprocess.Popen(
        [*IMPORTED, "start", "--claude", str(fake.path), "--data-dir", str(tmp_path / "data")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    wait_until(started.exists)
    os.killpg(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=30)
    assert running.returncode == 1
    assert out == b""
    assert err.endswith(b"error: Interrupted.\n")
    assert b"Traceback" not in err


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no Python runs in a child")
def test_ctrl_c_in_a_child_that_is_just_forked_reports_nothing() -> None:
    code = """
import os, signal, sys, threading
import claude_api_bridge as cab
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGINT))
def ask():
    try:
        cab.probe([sys.executable, "-c", ""], os.environ)
    except cab.CannotStart as error:
        print(error)
thread = threading.Thread(target=ask)
thread.start()
thread.join()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=str(MODULE.parent), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60,
    )
    assert (done.stderr, done.returncode) == (b"", 0)
    assert b"killed by SIGINT" in done.stdout


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="needs glibc and /proc"
)
@cpython_memory
def test_a_start_releases_the_memory_that_compiling_the_source_took() -> None:
    code = """
import re
import claude_api_bridge as cab

def rss():
    with open("/proc/self/status") as file:
        return int(re.findall(r"VmRSS:\\s+(\\d+)", file.read())[0])

code = compile(open(cab.__file__, "rb").read(), "x", "exec")
before = rss()
cab.trim_memory()
print(before - rss())
"""
    # In kB; about 17,000 are released.
    assert int(run_code(code).stdout) > 6_000


# --- the plain script ---

SCRIPT = (sys.executable, str(MODULE))


@pytest.mark.skipif(os.name == "nt", reason="signals differ")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_plain_script_with_status_0(
    program: Programs, tmp_path: Path, number: int
) -> None:
    # The main thread of the script ends before the bridge: another one waits for the signal.
    running = program("--spare", "1", command=SCRIPT)
    assert running.api.answer("hello")["response"] == "Echo: hello"
    assert running.end(number) == 0
    assert running.stderr.splitlines()[-1] == "Shutting down..."
    assert "Traceback" not in running.stderr
    children = FakeClaude(tmp_path / "fake").children()
    assert [start["pid"] for start in children if is_running(start["pid"])] == []
    # The lock is free.
    assert program(command=SCRIPT).end(number) == 0


def test_a_second_plain_script_names_the_holder_of_the_lock(
    program: Programs, tmp_path: Path
) -> None:
    running = program(command=SCRIPT)
    done = subprocess.run(
        [
            *SCRIPT, "start", "--no-tunnel", "--host", "127.0.0.1", "--port", "0",
            "--data-dir", str(tmp_path / "data"), "--claude", str(tmp_path / "fake" / "claude"),
        ],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("error: Another bridge is running with this data folder: ")
    assert re.search(r"\b%d\b" % running.process.pid, error)
    assert "http://localhost:%d" % running.port in error
    assert hint.startswith("hint: ")
    assert "Traceback" not in done.stderr
    assert running.api.get("/health").status == 200


def resident_kb(pid: int) -> int:
    """Return the resident memory of a process in kB."""
    status = Path("/proc/%d/status" % pid).read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0])


@pytest.mark.skipif(
    (sys.platform, platform.machine(), platform.libc_ver()[0]) != ("linux", "x86_64", "glibc"),
    reason="the bound was measured on Linux x86_64 with glibc",
)
@pytest.mark.skipif(sys.version_info >= (3, 12), reason="there the script keeps its syntax tree")
@cpython_memory
def test_an_idle_plain_script_needs_little_memory(program: Programs) -> None:
    # An imported module has no syntax tree to release, so only the script itself can show a leak.
    running = program(command=SCRIPT)
    # One second after the start the script releases what the start took.
    time.sleep(1)
    wait_until(lambda: resident_kb(running.process.pid) < 40_000, 5)


# --- ask, without a usable bridge ---


def failed_ask(tmp_path: Path, *words: str, **variables: str) -> Tuple[str, str]:
    """Run an `ask` that fails; return its error and its hint. It prints nothing else."""
    folder = ("--data-dir", str(tmp_path / "data"))
    done = run_cli("ask", "hello", *words, *folder, home=tmp_path, environ=variables)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    match = re.fullmatch(r"error: ([^\n]+\.)\nhint: ([^\n]+)\n", done.stderr)
    assert match, done.stderr
    return match.group(1), match.group(2)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:3456", "127.0.0.1", "//localhost:3456", "http:localhost", "http://",
        "http://:3456", "ftp://localhost:3456", "file:///etc/passwd", "http://localhost:port",
        "http://localhost:65536", "http://localhost:-1", "http://[::1",
    ],
)
def test_ask_refuses_an_invalid_address(tmp_path: Path, url: str) -> None:
    for words, variables in ((("--url", url), {}), ((), {"CAB_URL": url})):
        error, hint = failed_ask(tmp_path, *words, **variables)
        assert error == "%s is not the address of a bridge." % url
        assert "http://localhost:3456" in hint


def response(status: str, content_type: str, body: bytes) -> bytes:
    """Return an HTTP response after which the server closes."""
    head = "HTTP/1.1 %s\r\nContent-Type: %s\r\nConnection: close\r\n\r\n"
    return (head % (status, content_type)).encode() + body


def events(*lines: bytes) -> bytes:
    """Return a response of status 200 with these lines as its Server-Sent Events."""
    return response("200 OK", "text/event-stream", b"".join(line + b"\n" for line in lines))


@contextlib.contextmanager
def serving(data: bytes) -> Iterator[str]:
    """Run a server that reads one request per connection and sends these bytes; yield its URL."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            length = 0
            for line in self.rfile:
                name, _, value = line.partition(b":")
                if name.lower() == b"content-length":
                    length = int(value)
                if not line.strip():
                    break
            self.rfile.read(length)
            with contextlib.suppress(OSError):
                self.wfile.write(data)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="no bridge")
        thread.start()
        try:
            yield "http://127.0.0.1:%d" % server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


HTML = b"<!doctype html>\n<title>A page</title>\n"


@pytest.mark.parametrize(
    "data, words",
    [
        (response("200 OK", "text/html", HTML), "it sent no events"),
        (response("200 OK", "application/json", b"{}"), "it sent no events"),
        (response("302 Found\r\nLocation: /login", "text/html", b""), "it sent no events"),
        (response("404 Not Found", "text/html", HTML), "status 404"),
        (response("404 Not Found", "application/json", b'{"error": {"code": 5}}'), "status 404"),
        (response("500 Internal Server Error", "application/json", b"[1, 2]"), "status 500"),
        (response("502 Bad Gateway", "application/json", b"\xff" * 100), "status 502"),
        (response("503 Unavailable", "application/json", b"[" * 200_000), "status 503"),
        (events(), ""),
        (events(b"hello", b"", *HTML.split(b"\n")), ""),
        (events(b"event: completed", b"data: hello", b""), ""),
        (events(b"event: completed", b"data: [1]", b""), "unknown event"),
        (events(b"event: completed", b"data: " + b"[" * 200_000, b""), ""),
        (events(b"event: queued", b'data: {"position": "first"}', b""), ""),
        (events(b"event: queued", b'data: {"position": null}', b""), ""),
        (events(b"\xff\xfe\0: \x1b[2J"), ""),
        (b"", ""),
        (b"nonsense\r\nmore\r\n", ""),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1_000 + b"\r\n", ""),
        (b"HTTP/1.1 500 Error\r\nContent-Length: 90\r\n\r\n{}", ""),
    ],
    ids=[
        "200 html", "200 json", "302", "404 html", "404 json object", "500 json list",
        "502 not utf-8", "503 deep", "no event", "no fields", "no json", "json list", "deep json",
        "text as position", "null as position", "bytes", "nothing", "no http", "many headers",
        "cut off",
    ],
)
def test_ask_reports_a_server_that_is_no_bridge(tmp_path: Path, data: bytes, words: str) -> None:
    with serving(data) as url:
        error, hint = failed_ask(tmp_path, "--url", url, CAB_TOKEN="cab-test")
    assert url in error
    assert words in error
    assert "--url" in hint
    assert "\x1b" not in error


def test_ask_discards_a_token_that_it_cannot_store(
    program: Programs, command: Command, tmp_path: Path
) -> None:
    running = program("--spare", "0")
    path = tmp_path / "data" / "ask-tokens.json"
    path.mkdir()
    before = sorted((tmp_path / "data").iterdir())
    for words in ((), ("--conversation", "trip")):
        error, hint = failed_ask(tmp_path, *words)
        assert error.startswith("The file %s cannot be written: " % path)
        assert "CAB_TOKEN" in hint
    assert list(tokens(command)) == ["admin"]
    assert sorted((tmp_path / "data").iterdir()) == before
    # The advice of the hint.
    done = run_cli(
        "ask", "hello", "--data-dir", str(tmp_path / "data"), environ={"CAB_TOKEN": running.token}
    )
    assert (done.returncode, done.stdout) == (0, "Echo: hello\n")
    path.rmdir()
    done = run_cli("ask", "again", "--data-dir", str(tmp_path / "data"))
    assert (done.returncode, done.stdout) == (0, "Echo: again\n")


# --- the .pyz ---


@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of a .pyz that zipapp.sh has built."""
    return build_pyz(tmp_path_factory.mktemp("pyz"))


def build_pyz(folder: Path) -> Path:
    """Build the .pyz in this folder; return its path."""
    if not shutil.which("sh"):
        pytest.skip("needs a shell")
    for name in ("claude_api_bridge.py", "zipapp.sh"):
        shutil.copyfile(MODULE.parent / name, folder / name)
    subprocess.run(
        ["sh", str(folder / "zipapp.sh")],
        env={**os.environ, "PYTHON": sys.executable},
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=60,
    )
    return folder / "dist" / "claude_api_bridge.pyz"


def test_the_same_source_gives_the_same_pyz(pyz: Path, tmp_path: Path) -> None:
    assert build_pyz(tmp_path).read_bytes() == pyz.read_bytes()


@pytest.mark.skipif(
    sys.implementation.name != "cpython", reason="PyPy has no audit event for a compile"
)
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_everybody_may_run_the_pyz(pyz: Path) -> None:
    assert pyz.stat().st_mode & 0o777 == 0o755


def test_the_pyz_compiles_its_source_once_and_knows_its_lines(pyz: Path) -> None:
    code = """
import linecache, runpy
compiled = []
sys.addaudithook(lambda event, words: event == "compile" and compiled.append(words[1]))
sys.argv = [%r, "--help"]
try:
    runpy.run_path(%r, run_name="__main__")
finally:
    module = sys.modules["claude_api_bridge"]
    line = linecache.getline(module.__file__, 2, vars(module))
    print(compiled.count(module.__file__), line)
"""
    done = run_code(code % (str(pyz), str(pyz)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n1 # SPDX-License-Identifier: MIT\n\n"), done.stdout[-100:]


@pytest.mark.parametrize(
    "word, status, out", [("--version", 0, cab.__version__ + "\n"), ("nonsense", 2, "")]
)
def test_the_pyz_returns_the_status_of_the_command(
    pyz: Path, word: str, status: int, out: str
) -> None:
    done = subprocess.run(
        [sys.executable, str(pyz), word],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (status, out)


def test_the_pyz_is_a_complete_bridge_with_the_demo(program: Programs, pyz: Path) -> None:
    running = program("--demo", "--spare", "0", command=(sys.executable, str(pyz)), demo=True)
    assert running.api.answer("hello")["response"].endswith("You said: hello")
    assert running.end(signal.SIGTERM) == 0


# --- the demo ---


def test_the_demo_is_a_complete_bridge_that_answers_with_an_echo(program: Programs) -> None:
    first = program(demo=True, environ={"PATH": os.defpath})
    assert "Demo: " in first.stderr
    assert "Billing" not in first.stderr
    body = first.api.answer("good morning  all\n/x")
    assert (body["status"], body["model"]) == ("completed", "demo")
    assert "demo" in body["response"]
    assert body["response"].endswith("You said: good morning  all\n/x")
    body = first.api.answer("hello", jsonSchema={"type": "object"})
    assert body["structured"] == {"demo": "hello"} == json.loads(body["response"])
    client = first.api.new_token(sessionMode="stateful")
    answers = [client.answer(text)["response"] for text in ("one", "two")]
    assert first.end(signal.SIGTERM) == 0
    # The conversation continues after a restart.
    second = program("--spare", "0", demo=True)
    answers.append(Api(second.port, client.token).answer("three")["response"])
    echoes = [text.partition("You said")[2] for text in answers]
    assert echoes == [": one", " (turn 2): two", " (turn 3): three"]


# --- tokens: what may be changed ---


def test_the_rights_of_a_token_are_listed_and_warned_of(command: Command) -> None:
    assert "can run any command here, as you\n" in command(
        "token", "create", "shell", "--tools", "all").err  # fmt: skip
    assert "can manage all tokens" in command("token", "create", "boss", "--admin").err
    assert "can " not in command("token", "create", "reader", "--tools", "Read,Edit").err
    assert "can run any command here, as you\n" in command(
        "token", "create", "rules", "--tools", "Read,Bash(git log:*)",
        "--requests-per-minute", "5", "--requests-per-day", "9").err  # fmt: skip
    header, *lines = command("token", "list").out.splitlines()
    assert header.split("  ")[0] == "ID"
    assert "TOOLS" in header and "LIMITS" in header and "LAST USED" in header
    listed = {line.split()[-1]: line.split() for line in lines}
    assert listed["shell"][3:5] == ["no", "all"]
    assert listed["boss"][3:5] == ["yes", "none"]
    assert listed["rules"][3:9] == ["no", "2", "rules", "5/min", "9/day", "never"]


@pytest.mark.parametrize("tools, meant", [
    ("Reed", "Read"), ("wbe", "web"), ("raed", "read"), ("Bsah(ls:*)", "Bash"), ("foo", None),
    ("Read,webfetch", "WebFetch")])  # fmt: skip
def test_a_typo_in_tools_is_refused_with_the_levels(
    command: Command, tools: str, meant: Optional[str]
) -> None:
    status, out, err = command("token", "create", "x", "--tools", tools)
    assert (status, out) == (2, "") and "Levels: none, read, web, all" in err
    assert ("did you mean \"%s\"?" % meant in err) if meant else "did you mean" not in err
    assert tokens(command) == {}


@pytest.mark.parametrize("tools, named", [
    ("read,web", 'the level "read" stands alone'), ("Read,all", 'the level "all" stands alone'),
    ("Read,Bash(ls", '"Bash(ls" is no rule'), ("Read,,Grep", '"" is no rule')])  # fmt: skip
def test_a_faulty_rule_of_a_list_is_named(command: Command, tools: str, named: str) -> None:
    status, _, err = command("token", "create", "x", "--tools", tools)
    assert status == 2 and named in err and tokens(command) == {}


@pytest.mark.parametrize("tools", ["Read", "SomeNewerTool", "mcp__server__tool", "Edit(src/**)"])
def test_a_tool_that_may_exist_is_accepted(command: Command, tools: str) -> None:
    assert command("token", "create", "x", "--tools", tools).status == 0
    assert tokens(command)["x"]["tools"] == [tools]


def test_update_changes_what_is_named_and_nothing_else(command: Command) -> None:
    command("token", "create", "app", "--requests-per-minute", "5", "--models", "haiku")
    before = tokens(command)["app"]
    run = command("token", "update", "app", "--name", "bot", "--expires", "45")
    assert (run.status, run.out) == (0, "")
    after = tokens(command)["bot"]
    assert after["expiresAt"] and before["expiresAt"] is None
    for name in before.keys() - {"name", "expiresAt"}:
        assert after[name] == before[name]
    command(
        "token", "update", after["id"], "--expires=never", "--requests-per-minute", "none",
        "--requests-per-day", "7", "--models", "all")  # fmt: skip
    last = tokens(command)["bot"]
    names = ("expiresAt", "requestsPerMinute", "requestsPerDay", "models")
    assert [last[name] for name in names] == [None, None, 7, None]


@pytest.mark.parametrize("words", [
    [], ["--expires", "0"], ["--expires", "soon"], ["--name", " "], ["--models", "a b"],
    ["--requests-per-day", "-1"], ["--requests-per-minute", "all of them"]])  # fmt: skip
def test_an_invalid_change_is_refused_and_changes_nothing(
    command: Command, words: List[str]
) -> None:
    command("token", "create", "app")
    before = tokens(command)
    status, out, err = command("token", "update", "app", *words)
    assert (status, out) == (2, "") and err.startswith("error: ")
    assert tokens(command) == before


def test_rotate_replaces_the_secret_of_a_running_bridge(
    program: Programs, command: Command
) -> None:
    running = program()
    old = command("token", "create", "app").out.strip()
    request_id = running.api.with_token(old).ask("hi")
    new = command("token", "rotate", "app").out.strip()
    assert TOKEN.fullmatch(new) and new != old
    assert running.api.with_token(old).get("/api/requests").status == 401
    assert running.api.with_token(new).done(request_id)["status"] == "completed"
    assert tokens(command)["app"]["prefix"] == new[:12]


def test_a_token_is_named_by_id_name_or_prefix(command: Command) -> None:
    secrets = {name: command("token", "create", name).out.strip() for name in "abcd"}
    assert command("token", "revoke", tokens(command)["a"]["id"]).status == 0
    assert command("token", "revoke", "b").status == 0
    assert command("token", "revoke", secrets["c"][:12]).status == 0
    assert list(tokens(command)) == ["d"]
    # A whole token is no argument for a command line, but it is clear which one is meant.
    assert command("token", "revoke", secrets["d"]).status == 0
    command("token", "create", "twin")
    command("token", "create", "twin")
    status, _, err = command("token", "revoke", "twin")
    twins = [token["id"] for token in json.loads(command("token", "list", "--json").out)
             if token["name"] == "twin"]
    assert status == 2 and err == (
        "error: 2 tokens match 'twin'; use one of their IDs: %s, %s\n" % tuple(twins))
    # Too short to be meant.
    for text in ("cab-", "cab", tokens(command)["twin"]["id"][:3], ""):
        assert command("token", "revoke", text).status == 1


# --- help ---


@pytest.mark.parametrize("words, usage, hint", [
    (["strat"], "COMMAND ...", "did you mean start?"),
    (["start", "--prot", "5"], "start [FLAGS]", "did you mean --port?"),
    (["start", "--prot=5"], "start [FLAGS]", "did you mean --port?"),
    (["token", "creat", "x"], "token [-h] ACTION ...", "did you mean create?"),
    (["token", "create", "x", "--adm"], "token create [-h]", "did you mean --admin?"),
    (["token", "create"], "token create [-h]", "token create --help"),
    (["service", "print", "systemdd"], "service print KIND [FLAGS OF start]", "mean systemd?"),
    (["backup"], "backup [-h]", "backup --help"),
    (["start", "please"], "start [FLAGS]", "start --help")])  # fmt: skip
def test_a_wrong_word_gets_the_usage_of_its_command_and_a_hint(
    command: Command, words: List[str], usage: str, hint: str
) -> None:
    status, out, err = command(*words)
    lines = err.splitlines()
    assert (status, out) == (2, "")
    assert lines[0].startswith("usage: ") and usage in lines[0]
    assert lines[-2].startswith("error: ")
    assert lines[-1].startswith("hint: ") and hint in lines[-1]
    assert lines[-1].count("python3") <= 1


def test_help_helps_and_a_switch_takes_no_value(command: Command) -> None:
    for words in (["help"], ["help", "help"]):
        assert command(*words)[0] == 0 and "COMMAND" in command(*words).out
    status, _, err = command("start", "--demo=yes")
    assert status == 2 and "error: --demo takes no value" in err
    # What cannot be changed is no typo of --models.
    assert "did you mean" not in command("token", "update", "x", "--tools", "all").err


def test_help_explains_a_command(command: Command) -> None:
    for words in ((), ("start",), ("token", "create")):
        run = command("help", *words)
        assert run == command(*words, "--help") and run.status == 0
    assert command("-V") == command("--version")


def test_hints_can_be_pasted(tmp_path: Path) -> None:
    file = tmp_path / "a folder" / "claude_api_bridge.py"
    file.parent.mkdir()
    shutil.copy(MODULE, file)
    run = subprocess.run(
        [sys.executable, str(file), "start"], env={"PATH": str(tmp_path), "HOME": str(tmp_path)},
        stderr=subprocess.PIPE, encoding="utf-8", timeout=30)  # fmt: skip
    assert run.returncode == 1
    words = re.findall(r"or try: (.*) start --demo", run.stderr)
    assert len(words) == 1 and words[0].endswith('"%s"' % file)
    arguments = shlex.split(words[0] + " start --help")
    again = subprocess.run(
        [sys.executable, *arguments[1:]], stdout=subprocess.PIPE, encoding="utf-8", timeout=30)
    assert again.returncode == 0 and "start [FLAGS]" in again.stdout


def test_unknown_variables_are_named(program: Programs) -> None:
    running = program(environ={"CAB_POTR": "9", "CAB_RATE_LIMIT": "100", "CAB_TOKEN": "x"})
    assert "CAB_POTR is not a setting: did you mean CAB_PORT?" in running.stderr
    assert running.stderr.count("is not a setting") == 1


def test_every_command_names_unknown_variables(command: Command) -> None:
    status, _, err = command("token", "create", "x", CAB_DATADIR="/x")
    assert status == 0 and "CAB_DATADIR is not a setting: did you mean CAB_DATA_DIR?" in err


@pytest.mark.parametrize("words, named", [
    (["--expires", "0"], "--expires must"), (["--models", "ä"], "model must"),
    (["--requests-per-day", "x"], "--requests-per-day must"),
    (["--requests-per-minute", "0"], "--requests-per-minute must")], ids=str)  # fmt: skip
def test_an_error_names_the_flag(command: Command, words: List[str], named: str) -> None:
    status, _, err = command("token", "create", "x", *words)
    assert status == 2 and err.startswith("error: " + named)


@pytest.mark.parametrize("words", [
    ["token", "list"], ["token", "revoke", "x"], ["token", "update", "x", "--name", "y"],
    ["token", "rotate", "x"], ["pause"], ["resume"], ["backup", "copy.db"]], ids=str)  # fmt: skip
def test_a_wrong_folder_is_refused_and_not_made(
    command: Command, tmp_path: Path, words: List[str]
) -> None:
    status, out, err = command(*words, "--data-dir", str(tmp_path / "typo"))
    assert (status, out) == (1, "") and "There is no database" in err and "--data-dir" in err
    assert not (tmp_path / "typo").exists()


def test_a_file_in_place_of_the_folder_is_named(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in ("file", "file/data"):
        status, _, err = command("token", "create", "x", "--data-dir", str(tmp_path / folder))
        assert status == 1 and "hint: a file is in its place" in err


def test_the_list_shows_the_models_of_a_token_in_its_column(command: Command) -> None:
    models = "claude-opus-4-8-20260101,claude-haiku-4-5-20251001"
    command("token", "create", "x", "--models", models, "--requests-per-day", "5")
    command("token", "create", "y")
    head, first, second = command("token", "list").out.splitlines()
    assert "5/day " + models in second
    assert {row.index(name) for row, name in ((head, "NAME"), (first, " y"), (second, " x"))} <= {
        head.index("NAME"), head.index("NAME") - 1,
    }


def test_ask_appends_its_standard_input(program: Programs, tmp_path: Path) -> None:
    running = program()
    options: Any = {"environ": {"CAB_DATA_DIR": str(tmp_path / "data")}, "home": tmp_path}
    for words, text in ((["Sum", "up:", "-"], "long text"), (["-"], "alone"), (["-"], "")):
        run = run_cli("ask", *words, text=text, **options)
        assert run.returncode == (0 if text else 2), run.stderr
    assert run_cli("ask", " ", **options).returncode == 2
    rows = running.api.get("/api/requests").json["requests"]
    assert [row["message"] for row in rows] == ["alone", "Sum up:\n\nlong text"]


def test_ask_and_start_say_that_the_queue_is_paused(program: Programs, tmp_path: Path) -> None:
    running = program()
    environ = {"CAB_DATA_DIR": str(tmp_path / "data"), "PATH": os.environ["PATH"]}
    run = partial(run_cli, environ=environ, home=tmp_path)
    assert run("pause").returncode == 0
    with ThreadPoolExecutor() as executor:
        asked = executor.submit(run, "ask", "say hi")
        wait_until(lambda: running.api.get("/api/status").json["queue"]["length"] == 1)
        again = executor.submit(run, "ask", "say hi")
        wait_until(lambda: running.api.get("/api/status").json["queue"]["length"] == 2)
        assert run("resume").returncode == 0
        assert "waits at position 2: The owner has paused the queue." in again.result().stderr
        assert "The owner has paused the queue." in asked.result().stderr
    run("pause")
    assert running.end(signal.SIGTERM) == 0
    assert "The queue is paused" in program().stderr and "The queue is paused" not in running.stderr


def test_ask_needs_no_quotes_and_refuses_nothing(program: Programs, tmp_path: Path) -> None:
    running = program()
    environ = {"CAB_DATA_DIR": str(tmp_path / "data")}
    run = run_cli("ask", "how", "are", "you", environ=environ, home=tmp_path)
    assert run.returncode == 0 and "how are you" in run.stdout
    run = run_cli("ask", "", environ=environ, home=tmp_path)
    assert run.returncode == 2 and "The message is empty" in run.stderr
    assert running.api.get("/api/requests").json["requests"][0]["message"] == "how are you"


# --- completion ---

COMPLETED = [
    ("claude-api-bridge ", "doctor"), ("claude-api-bridge token ", "rotate"),
    ("claude-api-bridge token create --ad", "--admin"), ("claude-api-bridge st", "start"),
    ("claude-api-bridge service print la", "launchd"),
]


def completion_of(shell: str, command: Command, folder: Path) -> Tuple[str, Path]:
    """Return a shell and its script of completion, or skip the test."""
    program = shutil.which(shell)
    if not program:
        pytest.skip("there is no %s here" % shell)
    script = folder / "completion"
    script.write_text(command("completion", shell).out)
    return program, script


@pytest.mark.parametrize("line, expected", COMPLETED)
def test_bash_completes(command: Command, tmp_path: Path, line: str, expected: str) -> None:
    bash, script = completion_of("bash", command, tmp_path)
    words = line.split(" ")
    program = "source %s; COMP_WORDS=(%s); COMP_CWORD=%d; _claude_api_bridge; echo ${COMPREPLY[@]}"
    program %= (script, " ".join(word or "''" for word in words), len(words) - 1)
    run = subprocess.run([bash, "-c", program], stdout=subprocess.PIPE, timeout=30, check=True)
    assert expected in run.stdout.decode().split()


@pytest.mark.parametrize("line, expected", COMPLETED)
def test_fish_completes(command: Command, tmp_path: Path, line: str, expected: str) -> None:
    fish, script = completion_of("fish", command, tmp_path)
    run = subprocess.run(
        [fish, "--no-config", "-c", 'source %s; complete -C "%s"' % (script, line)],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)}, stdout=subprocess.PIPE,
        timeout=30, check=True)  # fmt: skip
    assert expected in run.stdout.decode().split()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_reads_the_completion(command: Command, tmp_path: Path, shell: str) -> None:
    program, script = completion_of(shell, command, tmp_path)
    assert subprocess.run([program, "-n", str(script)], timeout=30).returncode == 0


# --- start: for a person ---


@pytest.mark.skipif(os.name == "nt", reason="needs pseudo terminals")
def test_a_person_sees_what_to_do_next_and_the_token_last(tmp_path: Path) -> None:
    def seen() -> str:
        """Start at a terminal; return what it shows."""
        import pty
        terminal, command_side = pty.openpty()
        process = subprocess.Popen(
            [*IMPORTED, "start", "--demo", "--no-tunnel", "--port", "0", "--host", "0.0.0.0"],
            env={"HOME": str(tmp_path), "TERM": "xterm", "LANG": "C.UTF-8",
                 "PATH": os.environ["PATH"]},
            stdin=subprocess.DEVNULL, stdout=command_side, stderr=command_side)  # fmt: skip
        os.close(command_side)
        output = b""
        while not re.search(rb"\nhttp://localhost:\d+\r\n", output):
            output += os.read(terminal, 10_000)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        with contextlib.suppress(OSError):
            while True:
                output += os.read(terminal, 10_000)
        os.close(terminal)
        return output.decode().replace("\r\n", "\n")

    first = seen()
    secret = TOKEN.findall(first)[0]
    assert len(set(TOKEN.findall(first))) == 1
    port = re.findall(r"\nhttp://localhost:(\d+)\n", first)[0]
    assert "Dashboard: http://localhost:%s/dashboard#token=%s\n" % (port, secret) in first
    assert 'claude_api_bridge.py ask "Why is the sky blue?"\n' in first
    assert re.search(r"From any program: curl -sS http://localhost:%s/api/ask .*%s" % (
        port, secret), first)  # fmt: skip
    assert first.rindex(secret) > first.rindex("http://localhost:")
    assert re.search(r"─+\n%s\n─+\n" % secret, first)
    second = seen()
    assert not TOKEN.search(second)
    assert re.search(r"For another admin token: .* token create NAME --admin\n", second)
