"""Room 13: what a person types, what is printed where, and with which exit status."""
from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
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
    Tuple,
)

import pytest
from conftest import IMPORTED as US, MODULE, Api, FakeClaude, Program, run_cli, wait_until
from fake_claude import FLAGS

import claude_api_bridge as cab

Fakes = Callable[..., FakeClaude]                            # what the fixtures give
Programs = Callable[..., Program]
Typed = Callable[..., "Said"]
TOKEN = re.compile(r"cab-[0-9a-f]{64}")


class Said(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Typed:
    """typed(*words, **variables) -> what one command says, run in this process with a home of its own."""
    for name in [name for name in os.environ if name.startswith("CAB_") or name == "PORT"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CAB_DATA_DIR", str(tmp_path / "data"))

    def run(*words: str, **variables: str) -> Said:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            try:
                status = cab.main(words)
            except SystemExit as end:
                status = int(end.code or 0)
        return Said(status, *capsys.readouterr())
    return run


@pytest.fixture
def program(program: Programs, fake_claude: Fakes) -> Iterator[Programs]:
    """As conftest's, but quicker: a fake that answers probes at once, and what still runs in the end is killed."""
    started: List[Program] = []
    claude = fake_claude().path

    def start(*flags: str, **options: Any) -> Program:
        started.append(program(*flags, **{"claude": claude, **options}))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.end(signal.SIGKILL)


def rest_of_stdout(program: Program) -> str:
    """Ends the program. -> what it printed after its address."""
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(10) == 0 and program.process.stdout
    return program.process.stdout.read().decode()


def tokens(typed: Typed) -> Dict[str, Dict[str, Any]]:
    """All tokens by name."""
    return {token["name"]: token for token in json.loads(typed("token", "list", "--json").out)}


# --- words ---

@pytest.mark.parametrize("words", [["--version"], ["-v"]])
def test_the_version_is_all_that_is_printed(typed: Typed, words: List[str]) -> None:
    assert typed(*words) == (0, cab.__version__ + "\n", "")


def run_code(code: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """A program that can import the module."""
    return subprocess.run([sys.executable, "-S", "-c", "import sys; sys.path.insert(0, %r)\n%s" % (str(MODULE.parent), code), *words],
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", timeout=60)


@pytest.mark.parametrize("word", ["--version", "-v"])
@pytest.mark.parametrize("name", ["/bin/claude-api-bridge", r"C:\Scripts\claude-api-bridge.exe", "claude_api_bridge.py",
                                  "dist/claude_api_bridge.pyz"])
def test_the_version_is_told_without_importing_the_server(word: str, name: str) -> None:
    code = "sys.argv[0] = %r; import atexit; atexit.register(lambda: print({'http', 'sqlite3', 'subprocess'} & set(sys.modules)))"
    done = run_code(code % name + "; import claude_api_bridge", word)
    assert (done.returncode, done.stdout, done.stderr) == (0, cab.__version__ + "\nset()\n", "")


def test_a_program_that_only_imports_the_module_has_its_own_version() -> None:
    names = ["-c", "/claude_api_bridge/other.py", "other-claude_api_bridge/claude_api_bridge_test.py", ""]
    done = run_code("""
for name in %r:
    for word in ("--version", "-v"):
        sys.argv = [name, word]
        sys.modules.pop("claude_api_bridge", None)
        import claude_api_bridge
        print("mine", name, word)
""" % names)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["mine %s %s" % (name, word) for name in names for word in ("--version", "-v")]


def test_a_start_does_not_load_what_only_a_download_needs() -> None:
    assert run_code("import claude_api_bridge; print({'urllib.request', 'tarfile'} & set(sys.modules))").stdout == "set()\n"


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_is_shown_when_asked_for_or_without_a_command(typed: Typed, tmp_path: Path, words: List[str]) -> None:
    status, out, err = typed(*words)
    assert (status, err) == (0, "") and all(command in out for command in ("start", "token"))
    assert not (tmp_path / "data").exists()


def test_help_of_start_shows_every_setting_and_starts_nothing(typed: Typed, tmp_path: Path) -> None:
    status, out, _ = typed("start", "--help")
    missing = [word for row in cab.SETTINGS for word in (row.flag, *row.variables, row.help.split(":")[0].split()[0]) if word not in out]
    assert (status, missing) == (0, []) and not (tmp_path / "data").exists()


@pytest.mark.parametrize("words", [
    ["frobnicate"], ["help"], ["start", "--prot", "1"], ["start", "extra"], ["start", "--port"], ["start", "--no-tunnel=maybe"],
    ["token"], ["token", "frob"], ["token", "create"], ["token", "revoke"],
    ["token", "create", "x", "--requests-per-minute"], ["token", "create", "x", "--models"], ["token", "create", "x", "--requests", "5"],
    ["token", "create", "x", "--expires", "5"], ["token", "create", "x", "--expires", "soon"],
])
def test_unknown_words_are_refused(typed: Typed, tmp_path: Path, words: List[str]) -> None:
    status, out, err = typed(*words)
    assert (status, out) == (2, "") and "error: " in err.splitlines()[-1]
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("words, variables, named", [
    (["--port", "abc"], {}, "--port"),
    (["--port", "65536"], {}, "--port"),
    (["--port", "-1"], {}, "--port"),
    (["--port", "80.5"], {}, "--port"),
    (["--port", "٣"], {}, "--port"),                         # a digit for int(), but not for us
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
])
def test_a_wrong_value_is_one_sentence_that_names_its_source(typed: Typed, tmp_path: Path, words: List[str],
                                                             variables: Mapping[str, str], named: str) -> None:
    status, out, err = typed("start", *words, **variables)
    assert (status, out) == (2, "") and re.fullmatch(r"error: %s (must be|is not) [^\n]+\.\n" % named, err)
    assert not (tmp_path / "data").exists()


# --- tokens ---

def test_a_token_is_made_listed_and_revoked_without_a_bridge(tmp_path: Path) -> None:
    def command(*words: str) -> Any:
        return run_cli("token", *words, "--data-dir", str(tmp_path / "data"))

    made = command("create", "my app")
    secret = made.stdout.rstrip("\n")
    assert made.returncode == 0 and TOKEN.fullmatch(secret) and secret not in made.stderr
    listed = command("list")
    token_id = listed.stdout.splitlines()[1].split()[0]
    assert "my app" in listed.stdout and secret[:12] in listed.stdout and not TOKEN.search(listed.stdout + listed.stderr)
    assert token_id in made.stderr
    revoked = command("revoke", token_id)
    assert (revoked.returncode, revoked.stdout, revoked.stderr) == (0, "", "Token revoked\n")
    again = command("revoke", token_id)
    assert (again.returncode, again.stdout, again.stderr) == (1, "", "error: Token not found\n")
    assert json.loads(command("list", "--json").stdout) == []


def test_tokens_of_the_command_line_count_at_once_for_a_running_bridge(program: Programs, tmp_path: Path) -> None:
    running = program()
    made = json.loads(run_cli("token", "create", "x", "--json", "--data-dir", str(tmp_path / "data")).stdout)
    api = Api(running.port, made["token"])
    assert made["token"].startswith(made["prefix"]) and api.answer("hello")["response"] == "Echo: hello"
    run_cli("token", "revoke", made["tokenId"], "--data-dir", str(tmp_path / "data"))
    assert api.get("/api/ask/x").status == 401


def test_the_options_of_a_token_are_kept(typed: Typed, tmp_path: Path) -> None:
    typed("token", "create", "plain")
    typed("token", "create", "special", "--admin", "--stateful", "--expires", "7", "--tools", "read", "--workspace", str(tmp_path))
    plain, special = (tokens(typed)[name] for name in ("plain", "special"))
    names = ("isAdmin", "sessionMode", "expiresAt", "tools", "workspace")
    assert [plain[name] for name in names] == [False, "stateless", None, "none", None]
    assert [special[name] for name in names if name != "expiresAt"] == [True, "stateful", "read", str(tmp_path)]
    assert special["expiresAt"][:10] == cab.iso_time(time.time() + 7 * 86_400)[:10]      # type: ignore[index]


@pytest.mark.parametrize("text, kept", [
    ("none", "none"), ("read", "read"), ("web", "web"), ("all", "all"),
    ("Read", ["Read"]),
    ("Read,Bash(git log:*)", ["Read", "Bash(git log:*)"]),
    ("Bash(git log --format=%h,%s:*),Edit,Bash(a,b,c)", ["Bash(git log --format=%h,%s:*)", "Edit", "Bash(a,b,c)"]),
    ("Read, Edit", ["Read", "Edit"]),
    ("", None), ("everything!", None), ("Bash(rm", None), ("read,web()", None), ("Bash(a)b", None), ("--tools", None),
])
def test_tools_are_a_level_or_a_list_of_rules(typed: Typed, text: str, kept: Any) -> None:
    status, out, err = typed("token", "create", "x", "--tools=" + text)
    if kept is None:
        assert (status, out) == (2, "") and re.fullmatch(r"error: tools must be [^\n]+\n", err)
        assert tokens(typed) == {}
    else:
        assert status == 0 and tokens(typed)["x"]["tools"] == kept


def test_a_token_with_tools_gets_a_private_folder_of_its_own(typed: Typed, tmp_path: Path) -> None:
    for name in ("a", "b"):
        typed("token", "create", name, "--tools", "read")
    folders = [Path(token["workspace"]) for token in tokens(typed).values()]
    assert len(set(folders)) == 2 and all(folder.parent == tmp_path / "data" / "workspaces" for folder in folders)
    assert os.name == "nt" or all(folder.stat().st_mode & 0o777 == 0o700 for folder in folders)


def test_the_limits_of_a_token_are_kept(typed: Typed) -> None:
    typed("token", "create", "free")
    typed("token", "create", "limited", "--requests-per-minute", "10", "--requests-per-day=1000000", "--models", "haiku,opus[1m],default")
    names = ("requestsPerMinute", "requestsPerDay", "models")
    assert [tokens(typed)["free"][name] for name in names] == [None] * 3
    assert [tokens(typed)["limited"][name] for name in names] == [10, 1_000_000, ["haiku", "opus[1m]", "default"]]


NO_NUMBERS = ("0", "-1", "1.5", "1e3", "0x1", "many", "", " 5", "5 ", "٣")


@pytest.mark.parametrize("flag, values, sentence", [
    ("--requests-per-minute", [*NO_NUMBERS, "10001"], "requestsPerMinute must be a whole number from 1 to 10000"),
    ("--requests-per-day", [*NO_NUMBERS, "1000001"], "requestsPerDay must be a whole number from 1 to 1000000"),
    ("--models", ["", ",", "haiku,", ",haiku", "haiku,,opus", "a b", "-p", "m" * 129, ",".join(["haiku"] * 21)], "models? must be [^\\n]+"),
])
def test_a_limit_that_is_none_is_one_sentence_and_makes_no_token(typed: Typed, flag: str, values: List[str], sentence: str) -> None:
    for value in values:
        status, out, err = typed("token", "create", "x", "%s=%s" % (flag, value))
        assert (status, out) == (2, "") and re.fullmatch("error: %s\n" % sentence, err), (value, err)
    assert tokens(typed) == {}


@pytest.mark.parametrize("words, text", [
    (["--tools", "read", "--workspace", "nowhere"], "nowhere is not a folder."),
    (["--workspace", "."], "A workspace needs tools."),
])
def test_a_workspace_must_exist_and_have_a_use(typed: Typed, words: List[str], text: str) -> None:
    status, out, err = typed("token", "create", "x", *words)
    assert (status, out) == (1, "") and re.fullmatch(r"error: [^\n]*%s\nhint: [^\n]+\n" % re.escape(text), err)
    assert tokens(typed) == {}


def test_an_id_that_no_token_has_is_one_sentence(typed: Typed) -> None:
    for token_id in ("x", "%", "\udcff"):                    # the last as the system hands over a byte that is not UTF-8
        assert typed("token", "revoke", token_id) == (1, "", "error: Token not found\n")


@pytest.mark.parametrize("name", ["", "  ", "x" * 101])
def test_a_name_that_cannot_be_used_is_refused(typed: Typed, name: str) -> None:
    status, out, err = typed("token", "create", name)
    assert (status, out) == (2, "") and re.fullmatch(r"error: Token name [^\n]+\n", err)


def test_a_name_cannot_forge_a_line_of_the_list_or_steer_the_terminal(typed: Typed) -> None:
    typed("token", "create", "one\nforged \x1b[31mred")
    out = typed("token", "list").out
    assert len(out.splitlines()) == 2 and "\x1b" not in out


def test_the_last_admin_token_stays_and_a_lost_one_is_replaced(program: Programs, typed: Typed) -> None:
    running = program()
    token_id = tokens(typed)["admin"]["id"]
    assert typed("token", "revoke", token_id) == (1, "", "error: Cannot delete the last admin token\n")
    assert running.api.get("/api/tokens").status == 200
    secret = typed("token", "create", "new", "--admin").out.strip()
    assert typed("token", "revoke", token_id).status == 0
    assert [running.api.with_token(token).get("/api/tokens").status for token in (running.token, secret)] == [401, 200]


# --- start: what is printed where ---

def test_the_admin_token_is_printed_once_and_only_on_the_first_start(program: Programs) -> None:
    first = program()
    assert TOKEN.fullmatch(first.lines[0]) and re.fullmatch(r"http://localhost:\d+", first.lines[1])
    everything = "\n".join(first.lines) + rest_of_stdout(first) + first.stderr
    assert len(TOKEN.findall(everything)) == 1
    second = program()
    assert Api(second.port, first.token).get("/api/tokens").status == 200
    assert len(second.lines) == 1 and not TOKEN.search(second.stderr)


def test_stdout_holds_nothing_but_token_and_address(program: Programs) -> None:
    running = program()
    running.api.answer("hello"), running.api.answer("die 1")
    assert len(running.lines) == 2 and rest_of_stdout(running) == ""
    told = ("Dashboard: http", "Data directory: ", "Claude Code CLI detected (2.1.330", "completed", "failed", "Shutting down")
    assert [words for words in told if words not in running.stderr] == []


@pytest.mark.parametrize("environ", [{"NO_COLOR": "1"}, {"PYTHONIOENCODING": "ascii"}])
def test_what_is_no_terminal_gets_plain_text(program: Programs, environ: Mapping[str, str]) -> None:
    running = program(environ=environ)
    assert running.stderr.isascii() and "\x1b" not in running.stderr


@pytest.mark.skipif(os.name == "nt", reason="needs pseudo terminals")
def test_a_terminal_without_colour_gets_none(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    try:
        environ = {"NO_COLOR": "1", "TERM": "xterm-256color", "LANG": "C.UTF-8", "PATH": os.environ["PATH"]}
        subprocess.run([*US, "token", "revoke", "x", "--data-dir", str(tmp_path / "data")], stdin=subprocess.DEVNULL, stdout=theirs,
                       stderr=theirs, env=environ, timeout=30)
        said = os.read(ours, 10_000).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert "Token not found" in said and "\x1b" not in said


def test_a_name_that_the_terminal_cannot_show_is_listed_all_the_same(tmp_path: Path) -> None:
    run_cli("token", "create", "naïve 名", "--data-dir", str(tmp_path / "data"))
    listed = run_cli("token", "list", "--data-dir", str(tmp_path / "data"), environ={"PYTHONIOENCODING": "ascii"})
    assert listed.returncode == 0 and "na?ve" in listed.stdout and "Traceback" not in listed.stderr


@pytest.mark.skipif(os.name == "nt", reason="pipes end differently")
def test_a_reader_that_left_is_no_traceback(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([*US, "token", "list", "--data-dir", str(tmp_path / "data")], stdin=subprocess.DEVNULL, stdout=writer,
                              stderr=subprocess.PIPE, timeout=30)
    finally:
        os.close(writer)
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("words", ["start --no-tunnel --host 127.0.0.1 --port 0", "token create x --admin"])
def test_a_token_that_could_not_be_printed_is_not_made(program: Programs, tmp_path: Path, words: str) -> None:
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "CAB_CLAUDE": str(tmp_path / "fake" / "claude")}
    with open("/dev/full", "w") as full:
        running = subprocess.Popen([*US, *words.split(), "--data-dir", str(tmp_path / "data")], env=environ, stdin=subprocess.DEVNULL,
                                   stdout=full, stderr=subprocess.PIPE, encoding="utf-8", start_new_session=True)
    try:
        _, err = running.communicate(timeout=30)
    finally:
        running.kill()
        running.communicate()
    assert running.returncode == 1 and "Traceback" not in err and "error: " in err
    assert TOKEN.fullmatch(program().lines[0])


# --- start: which claude, and who pays ---

def sentence(done: Any) -> Tuple[str, str]:
    """The error and the hint of a start that was refused, and nothing else but the banner."""
    assert done.returncode == 1 and done.stdout == ""
    found = re.fullmatch(r"claude-api-bridge v[^\n]+\nerror: ([^\n]+\.)\nhint: ([^\n]+)\n", done.stderr)
    assert found, done.stderr
    return found.group(1), found.group(2)


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("text, words, hint", [
    (None, "CLI not found: ", "install it first: https://"),
    ("#!/nowhere/at-all\n", "cannot be run", "--claude PATH"),
    ("#!/bin/sh\necho hello\n", "does not answer like Claude Code (its --version says 'hello')", "--claude PATH"),
])
def test_a_claude_that_is_none_is_one_sentence(tmp_path: Path, text: Optional[str], words: str, hint: str) -> None:
    path = tmp_path / "claude" if text is None else executable(tmp_path / "claude", text)
    said = sentence(run_cli("start", "--no-tunnel", "--port", "0", "--claude", str(path), "--data-dir", str(tmp_path / "data"),
                            home=tmp_path))
    assert words in said[0] and hint in said[1]
    assert not (tmp_path / "data" / "bridge.db").exists()


@pytest.mark.parametrize("options, words, hint", [
    ({"auth": {"loggedIn": False}}, "not signed in", "--demo"),
    ({"version": "1.0.128 (Claude Code)"}, "1.0.128 (Claude Code) is too old", "claude update"),
])
def test_a_claude_that_cannot_be_used_is_one_sentence(fake_claude: Fakes, tmp_path: Path, options: Mapping[str, Any], words: str,
                                                      hint: str) -> None:
    said = sentence(run_cli("start", "--no-tunnel", "--port", "0", "--data-dir", str(tmp_path / "data"), home=tmp_path,
                            environ={"CAB_CLAUDE": str(fake_claude(**options).path)}))
    assert words in said[0] and hint in said[1]


KEY = "sk-ant-api03-" + "A1b2" * 10


@pytest.mark.parametrize("auth, environ, flags, wanted, unwanted", [
    ({"loggedIn": True, "authMethod": "claude.ai", "subscriptionType": "max"}, {}, [],
     ["Who pays: Claude Max subscription"], ["PER TOKEN", "ANTHROPIC"]),
    ({"loggedIn": True, "authMethod": "oauth_token"}, {"CLAUDE_CODE_OAUTH_TOKEN": "x"}, [],
     ["Who pays: the subscription behind CLAUDE_CODE_OAUTH_TOKEN"], ["PER TOKEN"]),
    ({"loggedIn": True, "subscriptionType": "pro"}, {"ANTHROPIC_API_KEY": KEY}, [],
     ["Who pays: Claude Pro subscription", "ANTHROPIC_API_KEY is set; it is not handed on to claude."], ["PER TOKEN", KEY]),
    ({"loggedIn": True, "subscriptionType": "pro"}, {"ANTHROPIC_API_KEY": KEY}, ["--allow-api-key"],
     ["BILLED PER TOKEN"], ["subscription", KEY]),
    ({"loggedIn": True, "apiKeySource": "ANTHROPIC_API_KEY"}, {"ANTHROPIC_API_KEY": KEY}, ["--allow-api-key"], ["BILLED PER TOKEN"], [KEY]),
    ({"loggedIn": True, "apiKeySource": "apiKeyHelper"}, {}, [], ["apiKeyHelper"], ["is handed on"]),
    ({"loggedIn": True, "subscriptionType": "max"}, {"ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}, [],
     ["ANTHROPIC_BASE_URL is handed on to claude: http://127.0.0.1:9"], []),
])
def test_who_pays_is_told(program: Programs, tmp_path: Path, auth: Mapping[str, Any], environ: Mapping[str, str], flags: List[str],
                          wanted: List[str], unwanted: List[str]) -> None:
    claude = executable(tmp_path / "claude", "#!/bin/sh\ncase \"$1\" in\n--version) echo 2.1.330 ;;\n--help) echo '  auth %s' ;;\n"
                        "--setting-sources=) echo '%s' ;;\nesac\n" % (FLAGS, json.dumps(auth)))
    said = program("--spare", "0", *flags, environ=environ, claude=claude).stderr
    assert [text for text in wanted if text not in said] == [] and [text for text in unwanted if text in said] == []


@pytest.mark.skipif(os.name == "nt", reason="signals differ")
def test_ctrl_c_while_claude_is_looked_at_is_no_traceback(fake_claude: Fakes, tmp_path: Path) -> None:
    fake = fake_claude()
    fake.path.write_text("#!/bin/sh\ntouch %s\nexec sleep 20\n" % shlex.quote(str(tmp_path / "asked")))
    running = subprocess.Popen([*US, "start", "--claude", str(fake.path), "--data-dir", str(tmp_path / "data")],
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    wait_until((tmp_path / "asked").exists)
    os.killpg(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=30)
    assert running.returncode == 1 and out == b"" and err.endswith(b"error: Interrupted.\n") and b"Traceback" not in err


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="needs glibc and /proc")
def test_a_start_gives_back_what_compiling_the_source_took() -> None:
    code = ("import claude_api_bridge as cab, re; rss = lambda: int(re.findall(r'VmRSS:\\s+(\\d+)', open('/proc/self/status').read())[0]);"
            " held = compile(open(cab.__file__, 'rb').read(), 'x', 'exec'); before = rss(); cab.give_back_memory(); print(before - rss())")
    assert int(run_code(code).stdout) > 6_000                # kB; some 17,000 are given back


# --- the .pyz ---

@pytest.fixture(scope="module")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bridge as zipapp.sh builds it."""
    return build_pyz(tmp_path_factory.mktemp("pyz"))


def build_pyz(folder: Path) -> Path:
    if not shutil.which("sh"):
        pytest.skip("needs a shell")
    for name in ("claude_api_bridge.py", "zipapp.sh"):
        shutil.copyfile(MODULE.parent / name, folder / name)
    subprocess.run(["sh", str(folder / "zipapp.sh")], env={**os.environ, "PYTHON": sys.executable}, check=True, stdout=subprocess.DEVNULL,
                   timeout=60)
    return folder / "dist" / "claude_api_bridge.pyz"


def test_the_same_source_gives_the_same_pyz(pyz: Path, tmp_path: Path) -> None:
    assert build_pyz(tmp_path).read_bytes() == pyz.read_bytes()


def test_the_pyz_compiles_its_source_once_and_keeps_its_lines(pyz: Path) -> None:
    code = ("import linecache, runpy; seen = []; sys.addaudithook(lambda event, words: event == 'compile' and seen.append(words[1]));"
            " sys.argv = [%r, '--help']\ntry: runpy.run_path(%r, run_name='__main__')\n"
            "finally: module = sys.modules['claude_api_bridge']; print(seen.count(module.__file__),"
            " linecache.getline(module.__file__, 2, vars(module)))")
    done = run_code(code % (str(pyz), str(pyz)))
    assert done.returncode == 0 and done.stdout.endswith("\n1 # SPDX-License-Identifier: MIT\n\n"), (done.stdout[-100:], done.stderr)


def test_the_pyz_tells_its_version_and_passes_on_the_status(pyz: Path) -> None:
    said = [subprocess.run([sys.executable, str(pyz), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", timeout=60)
            for words in (["--version"], ["nonsense"])]
    assert [(done.returncode, done.stdout) for done in said] == [(0, cab.__version__ + "\n"), (2, "")]


def test_the_pyz_is_a_whole_bridge_that_is_its_own_demo(program: Programs, pyz: Path) -> None:
    running = program("--demo", "--spare", "0", command=(sys.executable, str(pyz)), demo=True)
    assert running.api.answer("hello")["response"].endswith("You said: hello")
    assert running.end(signal.SIGTERM) == 0


# --- the demo ---

def test_the_demo_is_a_whole_bridge_with_an_echo_for_an_answer(program: Programs) -> None:
    first = program(demo=True, environ={"PATH": os.defpath})
    assert "Demo: " in first.stderr and "Who pays" not in first.stderr
    body = first.api.answer("good morning  all\n/x")
    assert (body["status"], body["model"]) == ("completed", "demo")
    assert "demo" in body["response"] and body["response"].endswith("You said: good morning  all\n/x")
    body = first.api.answer("hello", jsonSchema={"type": "object"})
    assert body["structured"] == {"demo": "hello"} == json.loads(body["response"])
    talk = first.api.new_token(sessionMode="stateful")
    said = [talk.answer(text)["response"] for text in ("one", "two")]
    assert first.end(signal.SIGTERM) == 0
    said.append(Api(program("--spare", "0", demo=True).port, talk.token).answer("three")["response"])
    assert [text.partition("You said")[2] for text in said] == [": one", " (turn 2): two", " (turn 3): three"]
