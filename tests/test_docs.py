"""The README says what the program does: its tables are made from the program, its quick start runs.

`python3 tests/test_docs.py` writes the tables anew.
"""
from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import claude_api_bridge as cab  # noqa: E402

README = ROOT / "README.md"
TABLES = {
    "routes": cab.routes_markdown,
    "ask": lambda: cab.command_markdown(cab.Ask),
    "token": lambda: cab.command_markdown(cab.NewToken),
    "errors": cab.errors_markdown,
    "run errors": cab.run_errors_markdown,
    "settings": cab.settings_markdown,
}


def with_tables(text: str) -> str:
    """The page with its tables as the program has them."""
    for name, table in TABLES.items():
        text, count = re.subn(r"(<!-- %s -->\n).*?(<!-- /%s -->)" % (name, name),
                              lambda found: found.group(1) + table() + "\n" + found.group(2), text, flags=re.DOTALL)
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
    running = program(demo=True)
    script = block("quick start").replace("http://localhost:3456", "http://127.0.0.1:%d" % running.port).replace("cab-...", running.token)
    done = subprocess.run(["sh", "-euc", script], stdout=subprocess.PIPE, timeout=60)
    assert done.returncode == 0
    assert b'"status":"completed"' in done.stdout and b"Why is the sky blue?" in done.stdout


def test_the_python_example_works_as_written(program):
    running = program(demo=True)
    code = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)[0]
    code = code.replace("http://localhost:3456", "http://127.0.0.1:%d" % running.port).replace("cab-...", running.token)
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=60)
    assert b"You said: Explain quantum computing" in done.stdout


def test_the_javascript_example_works_as_written(program, tmp_path):
    if not shutil.which("node"):
        from conftest import missing
        missing("no node here")
    running = program(demo=True)
    code = re.findall(r"```js\n(.*?)```", README.read_text("utf-8"), re.DOTALL)[0]
    code = code.replace("http://localhost:3456", "http://127.0.0.1:%d" % running.port).replace("cab-...", running.token)
    script = tmp_path / "example.mjs"
    script.write_text(code)
    done = subprocess.run(["node", str(script)], stdout=subprocess.PIPE, timeout=60)
    assert b"You said: What is the meaning of life?" in done.stdout


def test_every_error_and_setting_is_explained():
    assert all(kind.__doc__ for kind in cab.ERRORS)
    assert all(row.help and row.flag and row.variables for row in cab.SETTINGS)
    assert all(route.doc and route.gives for route in cab.ROUTES)


def test_no_path_or_host_of_a_machine_is_named():
    home = re.compile("/(?:root|work)/[a-z]")
    for path in [README, ROOT / "claude_api_bridge.py", ROOT / "pyproject.toml", ROOT / "zipapp.sh", *ROOT.glob("tests/**/*.py")]:
        if path.name != "test_docs.py":
            assert not home.search(path.read_text("utf-8")), path.name


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text("utf-8")), "utf-8")
