"""The README says what the program does: its tables are made from the program, its quick start runs.

`python3 tests/test_docs.py` writes the tables anew.
"""
from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import claude_api_bridge as cab  # noqa: E402

README = ROOT / "README.md"


def command_rows(command):
    return [("`%s`" % cab.camel_case(row.name), row.metadata["kind"], row.metadata["doc"], "`%s`" % cab.as_json(row.metadata["example"]))
            for row in dataclasses.fields(command)]


def answers(route) -> str:
    return "<br>".join(("%d `%s`" if text.startswith("{") else "%d %s") % (status, text) for status, text in route.gives.items())


def default(row) -> str:
    return "off" if row.kind == "switch" else "`%s`" % row.default if row.default != "" else ""


WHO = {cab.AuthLevel.NOTHING: "-", cab.AuthLevel.TOKEN: "token", cab.AuthLevel.ADMIN: "admin token"}
UNEXPECTED = "Something unexpected; the bridge's log has the details."
TABLES = {
    "routes": [("Method", "Path", "AuthLevel", "What", "Answers"),
               *((route.method, "`%s`" % route.path, WHO[route.needs], route.doc, answers(route)) for route in cab.ROUTES)],
    "ask": [("Field", "Type", "What", "Example"), *command_rows(cab.Ask)],
    "token": [("Field", "Type", "What", "Example"), *command_rows(cab.NewToken)],
    "errors": [("Status", "Code", "When"),
               *((kind.status, "`%s`" % kind.code, UNEXPECTED if kind is cab.BridgeError else kind.__doc__) for kind in cab.ERRORS)],
    "run errors": [("errorCode", "When", "On /v1"),
                   *(("`%s`" % code, text, cab.RUN_STATUS.get(code, 500)) for code, text in cab.RUN_ERRORS.items())],
    "settings": [("Flag", "Variable", "Default", "What"),
                 *(("`%s`" % row.flag, ", ".join("`%s`" % name for name in row.variables), default(row), row.help) for row in cab.SETTINGS)],
    "metrics": [("Name", "Kind", "Labels", "What"), *(("`%s`" % row.name, row.kind, row.labels, row.doc) for row in cab.METRICS)],
}


def markdown(table) -> str:
    head, *rows = table
    return "".join("| %s |\n" % " | ".join(str(cell).replace("|", "\\|") for cell in row) for row in (head, ["---"] * len(head), *rows))


def with_tables(text: str) -> str:
    """The page with its tables as the program has them."""
    for name, table in TABLES.items():
        text, count = re.subn(r"(<!-- %s -->\n).*?(<!-- /%s -->)" % (name, name),
                              lambda found: found.group(1) + markdown(table) + found.group(2), text, flags=re.DOTALL)
        assert count == 1, name
    return text


def block(name: str) -> str:
    """The shell lines between two markers."""
    found = re.search(r"<!-- %s -->\n```sh\n(.*?)```\n<!-- /%s -->" % (name, name), README.read_text("utf-8"), re.DOTALL)
    assert found, name
    return found.group(1)


def test_the_tables_are_those_of_the_program():
    text = README.read_text("utf-8")
    assert text == with_tables(text), "run: python3 tests/test_docs.py"


def test_the_quick_start_works_as_written(program):
    if not shutil.which("curl"):
        from conftest import missing
        missing("no curl here")
    running = program(demo=True, command=(sys.executable, str(ROOT / "claude_api_bridge.py")))      # as a person starts it
    script = block("quick start").replace("http://localhost:3456", "http://127.0.0.1:%d" % running.port).replace("cab-...", running.token)
    done = subprocess.run(["sh", "-euc", script], stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == 0
    assert b'"status":"completed"' in done.stdout and b"Why is the sky blue?" in done.stdout


def examples(language: str, running) -> str:
    """All examples of a language, which go on from one to the next, for a bridge that runs."""
    code = "\n".join(re.findall(r"```%s\n(.*?)```" % language, README.read_text("utf-8"), re.DOTALL))
    return code.replace("http://localhost:3456", "http://127.0.0.1:%d" % running.port).replace("cab-...", running.token)


def test_the_python_examples_work_as_written(program):
    done = subprocess.run([sys.executable, "-c", examples("python", program(demo=True))], stdout=subprocess.PIPE, timeout=60)
    said = done.stdout.decode()
    assert done.returncode == 0 and "You said: Explain quantum computing" in said and "You said: Tell me a story." in said
    assert re.search(r"cancelled\n([0-9a-f-]{36})\n\1\n(20.*Z \w+ .*\n){4}\[\]\n4 requests, about .*\nat work\n", said)


def test_the_javascript_examples_work_as_written(program, tmp_path):
    if not shutil.which("node"):
        from conftest import missing
        missing("no node here")
    script = tmp_path / "example.mjs"
    script.write_text(examples("js", program(demo=True)))
    done = subprocess.run(["node", str(script)], stdout=subprocess.PIPE, timeout=60)
    said = done.stdout.decode()
    assert done.returncode == 0 and "You said: What is the meaning of life?" in said and " story.\n" in said
    assert re.search(r"^cancelled\n([0-9a-f-]{36})\n\1\n", said, re.MULTILINE) and said.endswith("at work\n")


def test_the_examples_for_the_shell_work_as_written(program):
    if not shutil.which("curl"):
        from conftest import missing
        missing("no curl here")
    running = program(demo=True)
    stateful = running.api.new_token("stateful", sessionMode="stateful")
    first = stateful.ask("Before", conversation="trip-to-rome")
    assert stateful.done(first)["status"] == "completed"
    lines = ["URL=http://127.0.0.1:%d ADMIN=%s TOKEN=%s ID=%s" % (running.port, running.token, stateful.token, first)]
    lines += re.findall(r"<!-- example -->\n```sh\n(.*?)```\n<!-- /example -->", README.read_text("utf-8"), re.DOTALL)
    done = subprocess.run(["sh", "-euc", "\necho; echo ---\n".join(lines)], stdout=subprocess.PIPE, timeout=60)
    story, resumed, cancelled, twice, lists, usage, guest, plan, formats, metrics = done.stdout.decode().split("---\n")[1:]
    assert done.returncode == 0 and "event: delta\n" in story and story.count("event: completed\n") == 1
    assert resumed.startswith("id: ") and '"text":"a demo, Cl' not in resumed and "event: completed\n" in resumed
    assert '"code":"already_finished"' in cancelled
    assert len(set(re.findall('"requestId":"([^"]*)"', twice))) == 1
    assert '"message":"Before"' in lists and '"name":"trip-to-rome"' in lists and "Conversation deleted" in lists
    assert '"object":"chat.completion"' in formats and "event: message_stop\n" in formats and '"object":"list"' in formats
    assert 'cab_requests_finished_total{status="completed",code=""} ' in metrics and '"spareReady":' in metrics
    assert '"requests":3' in usage and '"token":"cab-' in guest and plan.startswith('{"windows":[]')


def test_every_error_and_setting_is_explained():
    assert all(kind.__doc__ for kind in cab.ERRORS)
    assert all(row.help and row.flag and row.variables for row in cab.SETTINGS)
    assert all(route.doc and route.gives for route in cab.ROUTES)


def test_no_path_or_host_of_a_machine_is_named():
    home = re.compile("/(?:root|work)/[a-z]")
    for path in [README, ROOT / "claude_api_bridge.py", ROOT / "pyproject.toml", ROOT / "zipapp.sh", *ROOT.glob("tests/**/*.py")]:
        if path.name != "test_docs.py":
            assert not home.search(path.read_text("utf-8")), path.name


def test_what_the_threats_are_shown_by_exists() -> None:
    text = README.read_text("utf-8")
    table = text[text.index("| Threat |"):text.index("To report a weakness")]
    tests = {path.name: path.read_text("utf-8") for path in Path(__file__).parent.rglob("*.py")}
    named = re.findall(r"`(test_\w+)`", table)
    assert len(named) > 8 and [name for name in named if not any("def %s(" % name in each for each in tests.values())] == []
    files = re.findall(r"`(?:bench/)?(\w+\.py)`", table)
    assert len(files) > 8 and [name for name in files if name not in tests] == []


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text("utf-8")), "utf-8")
