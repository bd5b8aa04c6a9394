"""Check that the README says what the program does.

The tables of the README are generated from the module, and one from the saved results of
test_clients.py. The quick start and the examples run here as they are written.

`python3 tests/test_docs.py` writes the tables again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Sequence, Tuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "clients")]

import claude_api_bridge as cab  # noqa: E402
import run_clients  # noqa: E402

if TYPE_CHECKING:
    from conftest import Program

StartProgram = Callable[..., "Program"]
Row = Tuple[Any, ...]

README = ROOT / "README.md"
README_LINES = 640
FRONT_PAGE_LINES = 150
SNIPPET_LINES = 6
PROSE_COLUMNS = 160


# --- the generated tables ---


def field_rows(command: type) -> List[Row]:
    """Return the table rows for the fields of a request body."""
    return [
        (
            "`%s`" % cab.camel_case(field.name),
            field.metadata["kind"],
            field.metadata["doc"],
            "`%s`" % cab.as_json(field.metadata["example"]),
        )
        for field in dataclasses.fields(command)
    ]


def answers(route: cab.Route) -> str:
    """Return the cell with the example responses of a route."""
    return "<br>".join(
        ("%d `%s`" if text.startswith("{") else "%d %s") % (status, text)
        for status, (_, text) in route.responses.items()
    )


def default(setting: Any) -> str:
    """Return the cell with the default value of a setting."""
    if setting.kind == "switch":
        return "off"
    return "`%s`" % setting.default if setting.default != "" else ""


NEEDS = {
    cab.AuthLevel.NOTHING: "nothing",
    cab.AuthLevel.TOKEN: "token",
    cab.AuthLevel.ADMIN: "admin token",
}
UNEXPECTED = "Something unexpected; the bridge's log has the details."


def error_rows() -> List[Row]:
    """Return a row for each status, with the codes that have it."""
    texts: Dict[int, List[str]] = {}
    for error in cab.ERRORS:
        when = UNEXPECTED if error is cab.BridgeError else str(error.__doc__)
        texts.setdefault(error.status, []).append("`%s`: %s" % (error.code, when))
    return [(status, "<br>".join(lines)) for status, lines in texts.items()]


TABLES: Dict[str, List[Row]] = {
    "routes": [
        ("Method", "Path", "Needs", "What", "Answers"),
        *(
            (route.method, "`%s`" % route.path, NEEDS[route.auth], route.doc, answers(route))
            for route in cab.ROUTES
        ),
    ],
    "ask": [("Field", "Type", "What", "Example"), *field_rows(cab.Ask)],
    "token": [("Field", "Type", "What", "Example"), *field_rows(cab.NewToken)],
    "errors": [("Status", "Code, and when"), *error_rows()],
    "run errors": [
        ("errorCode", "When", "On /v1"),
        *(
            # A refusal is an answer there.
            ("`%s`" % code, text, 200 if code == "refused" else cab.RUN_STATUS.get(code, 500))
            for code, text in cab.RUN_ERRORS.items()
        ),
    ],
    "settings": [
        ("Flag", "Variable", "Default", "What"),
        *(
            (
                "`%s`" % setting.flag,
                ", ".join("`%s`" % name for name in setting.variables),
                default(setting),
                setting.help,
            )
            for setting in cab.SETTINGS
        ),
    ],
    "metrics": [
        ("Name", "Kind", "Labels", "What"),
        *(("`%s`" % row.name, row.kind, row.labels, row.doc) for row in cab.METRICS),
    ],
    "clients": run_clients.rows(
        run_clients.lines_of(ROOT / "tests" / "clients" / "results.json")
    ),
}


def markdown(table: Sequence[Row]) -> str:
    """Return the table in Markdown. table: the header row, then the other rows."""
    head, *rows = table
    return "".join(
        "| %s |\n" % " | ".join(str(cell).replace("|", "\\|") for cell in row)
        for row in (head, ["---"] * len(head), *rows)
    )


def with_tables(text: str) -> str:
    """Return the README's text with the generated tables between the markers."""
    for name, table in TABLES.items():
        start, end = "<!-- %s -->\n" % name, "<!-- /%s -->" % name
        assert text.count(start) == text.count(end) == 1, name
        before, _, rest = text.partition(start)
        text = before + start + markdown(table) + end + rest.partition(end)[2]
    return text


def test_the_tables_are_those_of_the_program() -> None:
    text = README.read_text("utf-8")
    assert text == with_tables(text), "run: python3 tests/test_docs.py"


def test_every_error_and_setting_is_explained() -> None:
    assert all(error.__doc__ for error in cab.ERRORS)
    assert all(row.help and row.flag and row.variables for row in cab.SETTINGS)
    assert all(route.doc and route.responses for route in cab.ROUTES)


# --- the shape of the page ---


def sections() -> List[Tuple[str, str]]:
    """Return every heading of the README as (its anchor, its text); code blocks do not count."""
    text = re.sub(r"```.*?```", "", README.read_text("utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#{1,6} (.*)$", text, re.MULTILINE)
    return [(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-"), title) for title in titles]


def front_page() -> str:
    """Return what stands before the contents list."""
    return README.read_text("utf-8").partition("\n## Contents\n")[0]


def contents_list() -> str:
    return README.read_text("utf-8").partition("\n## Contents\n")[2].partition("\n## ")[0]


def test_the_front_page_and_the_readme_are_short() -> None:
    lines = README.read_text("utf-8").splitlines()
    assert "## Contents" in lines and len(front_page().splitlines()) <= FRONT_PAGE_LINES
    assert len(lines) <= README_LINES


def test_a_first_example_is_at_most_six_lines_long() -> None:
    """The quick start and the same request from each language fit on a phone's screen."""
    snippets = re.findall(r"^```(sh|python|js|py)\n(.*?)^```$", front_page(), re.DOTALL | re.M)
    assert {language for language, _ in snippets} == {"sh", "python", "js", "py"}
    assert [code for _, code in snippets if code.count("\n") > SNIPPET_LINES] == []


def test_every_link_inside_the_page_has_its_heading() -> None:
    anchors = [anchor for anchor, _ in sections()]
    assert len(set(anchors)) == len(anchors)
    in_contents = re.findall(r"\]\(#([^)]*)\)", contents_list())
    assert len(in_contents) > 15 and len(set(in_contents)) == len(in_contents)
    links = re.findall(r"\]\(#([^)]*)\)", README.read_text("utf-8"))
    assert [link for link in links if link not in anchors] == []


def test_the_contents_list_names_every_chapter() -> None:
    """Each heading of the second level behind the contents list has its link there."""
    text = README.read_text("utf-8").partition("\n## Contents\n")[2]
    chapters = re.findall(r"^## (.*)$", text, re.MULTILINE)
    linked = re.findall(r"\]\(#([^)]*)\)", contents_list())
    anchors = {title: anchor for anchor, title in sections()}
    assert len(chapters) > 10 and [one for one in chapters if anchors[one] not in linked] == []


def test_lines_of_prose_are_not_too_long() -> None:
    """Rows of tables may be longer; all else stays readable in an editor."""
    lines = README.read_text("utf-8").splitlines()
    assert [line for line in lines if len(line) > PROSE_COLUMNS and not line.startswith("|")] == []


def test_the_licence_is_complete() -> None:
    """No other file of the repository holds it."""
    text = " ".join(README.read_text("utf-8").partition("## MIT License\n")[2].split())
    assert text.startswith("Copyright (c) 2026 the claude_api_bridge authors Permission is hereby")
    assert "The above copyright notice and this permission notice shall be included" in text
    assert text.endswith("OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.")


# --- the examples ---


def missing(what: str) -> None:
    """Skip the test, or fail it where everything is required.

    conftest is imported here because writing the tables needs no pytest.
    """
    import conftest

    conftest.missing(what)


def block(name: str) -> str:
    """Return the shell lines between two markers."""
    match = re.search(
        r"<!-- %s -->\n```sh\n(.*?)```\n<!-- /%s -->" % (name, name),
        README.read_text("utf-8"),
        re.DOTALL,
    )
    assert match, name
    return match.group(1)


def with_address(code: str, running: Program) -> str:
    """Return the code with the address and the admin token of a running bridge."""
    address = "http://127.0.0.1:%d" % running.port
    return code.replace("http://localhost:3456", address).replace("cab-...", running.token)


def test_the_quick_start_works_as_written(program: StartProgram, tmp_path: Path) -> None:
    if not shutil.which("curl"):
        missing("no curl here")
    script_path = ROOT / "claude_api_bridge.py"
    # As a person starts it.
    running = program(demo=True, command=(sys.executable, str(script_path)))
    # `python3` is this Python, and `ask` and `token create` use the data folder of this bridge.
    prefix = 'python3() { "%s" "$@"; }\nexport CAB_DATA_DIR="%s"\n' % (
        sys.executable,
        tmp_path / "data",
    )
    run = subprocess.run(
        ["sh", "-euc", prefix + with_address(block("quick start"), running)],
        cwd=str(ROOT),
        stdout=subprocess.PIPE,
        timeout=60,
    )
    assert run.returncode == 0
    output = run.stdout.decode()
    asked, _, rest = output.partition("\n")
    waited, _, streamed = rest.partition("id: 0\n")
    assert asked.endswith("You said: Why is the sky blue?")
    assert '"status":"completed"' in waited and "You said: Name three rivers." in waited
    assert "event: delta\n" in streamed and streamed.count("event: completed\n") == 1
    assert [token["name"] for token in running.api.get("/api/tokens").json["tokens"]].count(
        "my-app"
    ) == 1


def examples(language: str, running: Program) -> str:
    """Return all examples of a language, in one program, for a running bridge."""
    pattern = r"```%s\n(.*?)```" % language
    code = "\n".join(re.findall(pattern, README.read_text("utf-8"), re.DOTALL))
    return with_address(code, running)


def test_the_python_examples_work_as_written(program: StartProgram) -> None:
    run = subprocess.run(
        [sys.executable, "-c", examples("python", program(demo=True))],
        stdout=subprocess.PIPE,
        timeout=60,
    )
    output = run.stdout.decode()
    assert run.returncode == 0
    assert "You said: Name three rivers.\n" in output
    assert "You said: Explain quantum computing" in output
    assert "You said: Tell me a story." in output


def receive_one(result: List[Any]) -> HTTPServer:
    """Return a server that appends the headers and the body of the first POST to the list."""

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            result.extend([self.headers, self.rfile.read(length)])
            self.send_response(204)
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    server.timeout = 20
    return server


def test_the_check_of_a_callback_works_as_written(program: StartProgram) -> None:
    received: List[Any] = []
    with receive_one(received) as receiver:
        address = "127.0.0.1:%d" % receiver.server_port
        api = program(demo=True).api
        new = api.post("/api/tokens", {"name": "callbacks", "callbacks": [address]}).json
        body = {"message": "Hello", "callback": "http://%s/hook" % address}
        asked = api.with_token(new["token"]).post("/api/ask", body).json
        receiver.handle_request()
    headers, body_bytes = received
    code = re.search(r"```python\n(import base64.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert code
    example: Dict[str, Any] = {}
    exec(code.group(1), example)
    is_genuine, secret = example["is_genuine"], new["callbackSecret"]
    assert is_genuine(secret, headers, body_bytes)
    assert headers["Webhook-Id"] == asked["requestId"] == json.loads(body_bytes)["requestId"]
    assert not is_genuine(secret, headers, body_bytes + b" ")
    assert not is_genuine("whsec_" + "A" * 32, headers, body_bytes)
    old = {**headers, "Webhook-Timestamp": "1"}
    assert not is_genuine(secret, old, body_bytes)


def test_the_javascript_examples_work_as_written(program: StartProgram, tmp_path: Path) -> None:
    if not shutil.which("node"):
        missing("no node here")
    script = tmp_path / "example.mjs"
    script.write_text(examples("js", program(demo=True)))
    run = subprocess.run(["node", str(script)], stdout=subprocess.PIPE, timeout=60)
    output = run.stdout.decode()
    assert run.returncode == 0
    assert "You said: Name three rivers.\n" in output
    assert "You said: What is the meaning of life?\n" in output
    assert " story.\n" in output


def test_the_example_for_the_openai_sdk_works_as_written(program: StartProgram) -> None:
    python = shutil.which(os.environ.get("CAB_TEST_SDKS") or "")
    if not python:
        missing("no SDKs here: CAB_TEST_SDKS names a Python that has them")
    run = subprocess.run(
        [str(python), "-c", examples("py", program(demo=True))],
        stdout=subprocess.PIPE,
        timeout=60,
    )
    assert run.returncode == 0 and b"You said: Name three rivers.\n" in run.stdout


def test_the_examples_for_the_shell_work_as_written(program: StartProgram) -> None:
    if not shutil.which("curl"):
        missing("no curl here")
    running = program(demo=True)
    stateful = running.api.new_token("stateful", sessionMode="stateful")
    first = stateful.ask("Before", conversation="trip-to-rome")
    assert stateful.done(first)["status"] == "completed"
    variables = "URL=http://127.0.0.1:%d ADMIN=%s TOKEN=%s\n" % (
        running.port,
        running.token,
        stateful.token,
    )
    match = re.search(r"<!-- example -->\n```sh\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert match
    # A line of dashes before each command tells their outputs apart.
    script = variables + re.sub(r"^(?=curl )", "echo; echo ---\n", match.group(1), flags=re.M)
    run = subprocess.run(["sh", "-euc", script], stdout=subprocess.PIPE, timeout=60)
    assert run.returncode == 0
    outputs = run.stdout.decode().split("---\n")[1:]
    polled, story, resumed, cancelled, once, again, requests = outputs[:7]
    conversations, forgotten, usage, guest, openai, anthropic, response = outputs[7:14]
    models, metrics, status = outputs[14:]
    assert '"status":"completed"' in polled and "You said: Why is the sky blue?" in polled
    assert "event: delta\n" in story and story.count("event: completed\n") == 1
    assert resumed.startswith("id: ") and "event: completed\n" in resumed
    assert '"text":"a demo, Cl' not in resumed
    assert '"code":"already_finished"' in cancelled
    request_id = re.findall('"requestId":"([^"]*)"', once)
    assert request_id and request_id == re.findall('"requestId":"([^"]*)"', again)
    assert '"message":"Before"' in requests and '"message":"Tell me a story."' in requests
    assert '"name":"trip-to-rome"' in conversations and "Conversation deleted" in forgotten
    assert '"requests":4' in usage and '"plan":{"windows":[]' in usage
    assert '"token":"cab-' in guest
    assert '"object":"chat.completion"' in openai
    assert "event: message_stop\n" in anthropic
    assert '"object":"response"' in response
    assert '"object":"list"' in models
    assert 'cab_requests_finished_total{status="completed",code=""} ' in metrics
    assert '"spareReady":' in status


# --- what the page claims ---


def test_no_path_or_host_of_a_machine_is_named() -> None:
    home = re.compile("/(?:root|work)/[a-z]")
    for path in [
        README,
        ROOT / "claude_api_bridge.py",
        ROOT / "pyproject.toml",
        ROOT / "zipapp.sh",
        *ROOT.glob("tests/**/*.py"),
    ]:
        if path.name != "test_docs.py":
            assert not home.search(path.read_text("utf-8")), path.name


def test_what_the_promises_are_shown_by_exists() -> None:
    """Every test and every file that the chapter on security names is there."""
    text = README.read_text("utf-8")
    chapter = text[text.index("\n## Security\n") : text.index("To report a weakness")]
    sources = {path.name: path.read_text("utf-8") for path in Path(__file__).parent.rglob("*.py")}
    tests = re.findall(r"`(test_\w+)`", chapter)
    assert len(tests) > 8
    assert [
        name for name in tests if not any("def %s(" % name in text for text in sources.values())
    ] == []
    files = re.findall(r"`(?:bench/)?(\w+\.py)`", chapter)
    assert (
        len(files) > 8
        and [name for name in files if name not in sources and name != "claude_api_bridge.py"] == []
    )


def test_the_programs_behind_the_figures_exist() -> None:
    text = README.read_text("utf-8")
    chapter = text[text.index("\n## How fast it is\n") : text.index("\n## Compared\n")]
    files = set(re.findall(r"`(?:bench/)?(\w+\.py)\b", chapter))
    assert len(files) > 8
    assert [name for name in files if not (ROOT / "tests" / "bench" / name).exists()] == []


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text("utf-8")), "utf-8")
