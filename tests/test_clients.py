"""Clients that people use with /v1, run on the bridge over the real `claude`.

    python3 -m venv DIR
    DIR/bin/pip install -r tests/clients/requirements.txt
    DIR/bin/pip install --no-deps -r tests/clients/requirements-no-deps.txt
    mkdir NODE_DIR && cp tests/clients/package.json NODE_DIR && npm install --prefix NODE_DIR
    export CAB_TEST_CLIENTS=DIR/bin/python CAB_TEST_NODE_CLIENTS=NODE_DIR
    export CAB_TEST_CLAUDE=node_modules/.bin/claude
    python -m pytest tests/test_clients.py

`PYTHONPATH=. python tests/test_clients.py` saves the results, for the README's table.

Each test runs the scenarios of one client there (tests/clients/run_clients.py and .mjs). A stand-in
takes the place of the model, and of everything outside: a client that asks another server fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Set

import pytest

from conftest import TESTS, missing
from messages_api import Reply, last_text, tool_results
from test_real import Site, Version, version  # noqa: F401 (a fixture)

sys.path.insert(0, str(TESTS / "clients"))
from run_clients import PROGRAMS, SCENARIOS, lines_of  # noqa: E402

PYTHON_CLIENTS = list(dict.fromkeys(client for client, _, _ in SCENARIOS))
# Those of run_clients.mjs
NODE_CLIENTS = [
    "openai (Node)",
    "@anthropic-ai/sdk",
    "@openai/agents",
    "@langchain/openai",
    "@langchain/anthropic",
    "ai",
]
CLIENTS = PYTHON_CLIENTS + NODE_CLIENTS
RESULTS = TESTS / "clients" / "results.json"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]


def clients_python() -> str:
    """Return the Python with the libraries that $CAB_TEST_CLIENTS names, or skip the test.

    With CAB_REQUIRE_REAL=1 the test fails instead.
    """
    python = shutil.which(os.environ.get("CAB_TEST_CLIENTS") or "")
    if not python:
        missing(
            "no clients here: install tests/clients/requirements.txt in a venv, "
            "and set CAB_TEST_CLIENTS to its Python"
        )
    return os.path.abspath(str(python))


def node_programs() -> Path:
    """Return the folder with `node` and `codex` in $CAB_TEST_NODE_CLIENTS, or skip the test."""
    folder = Path(os.environ.get("CAB_TEST_NODE_CLIENTS") or "?", "node_modules", ".bin")
    if not (folder / "node").exists():
        missing(
            "no clients for Node here: copy tests/clients/package.json into a folder, run "
            "`npm install` there, and set CAB_TEST_NODE_CLIENTS to the folder"
        )
    return folder.absolute()


def called_tools(body: Dict[str, Any]) -> Set[str]:
    """Return the names of the tools that the model has called in this conversation."""
    contents = [message["content"] for message in body["messages"]]
    blocks = [block for content in contents if isinstance(content, list) for block in content]
    return {block["name"] for block in blocks if block.get("type") == "tool_use"}


def has_image(value: Any) -> bool:
    """Return whether an image with data is in these messages, be it in the result of a tool."""
    if isinstance(value, list):
        return any(map(has_image, value))
    if not isinstance(value, dict):
        return False
    if value.get("type") == "image":
        return len(value["source"]["data"]) > 100_000
    return has_image(value.get("content"))


def reply(body: Dict[str, Any]) -> Reply:
    """Call each tool in this order; then reply with the last result, or with the user's text.

    The tools of an agent come first, then those that give an answer its structure.
    """
    results = [result for _, result in tool_results(body)]
    text = "It is " + results[-1] if results else "Echo: " + last_text(body)
    inputs: Dict[str, List[Dict[str, Any]]] = {
        "transfer_to_weather": [{}],
        "get_weather": [{"city": "Rome"}],
        # of Codex and of Claude Code, on the files of their scenarios
        "exec_command": [{"cmd": "echo sunny in Rome | tee weather.txt"}],
        "Read": [{"file_path": "picture.png"}, {"file_path": "weather.txt"}],
        "Edit": [{"file_path": "weather.txt", "old_string": "rainy", "new_string": "sunny"}],
        "final_result": [{"answer": text}],
        "StructuredOutput": [{"answer": text}],
    }
    offered = {tool["name"].rpartition("__")[2]: tool["name"] for tool in body.get("tools", [])}
    called = called_tools(body)
    for name, calls in inputs.items():
        if name in offered and offered[name] not in called:
            return Reply(tools=tuple((offered[name], arguments) for arguments in calls))
    return Reply(text)


@pytest.fixture(scope="module")
def site(
    real_claude: Path, version: Version, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """The bridge over the real CLI, which all tests of this file share."""
    with contextlib.closing(Site(real_claude, version, tmp_path_factory.mktemp("clients"))) as site:
        site.messages.reply = reply
        site.start()
        yield site


def run_client(site: Site, client: str) -> List[Dict[str, Any]]:
    """Run the scenarios of a client with a token of its own. -> their lines."""
    script, folder, path = TESTS / "clients" / "run_clients.py", site.folder, [site.claude.parent]
    if client in NODE_CLIENTS:
        # The script on standard input imports packages from the current folder.
        script, folder = script.with_suffix(".mjs"), node_programs().parent.parent
        command = [str(node_programs() / "node"), "--input-type=module", "-"]
    else:
        python = sys.executable if client in PROGRAMS else clients_python()
        command = [python, "-"]
    if client == "codex":
        path.insert(0, node_programs())
    api, _ = site.client()
    environ = {
        "PATH": os.pathsep.join([*map(str, path), os.environ["PATH"]]),
        "LANG": "C.UTF-8", "HOME": str(site.home),
        "HTTP_PROXY": site.messages.url, "HTTPS_PROXY": site.messages.url,
        "NO_PROXY": "127.0.0.1,localhost", "NODE_USE_ENV_PROXY": "1",
    }
    with script.open() as source:
        done = subprocess.run(
            [*command, "http://127.0.0.1:%d" % api.port, str(api.token), client],
            env=environ, cwd=str(folder), stdin=source, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, encoding="utf-8", timeout=300,
        )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"client"')]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_works(site: Site, client: str) -> None:
    del site.messages.calls[:], site.messages.outside[:]
    lines = run_client(site, client)
    failed = ["%(scenario)s: %(error)s" % line for line in lines if not line["ok"]]
    assert lines and not failed, "%s: %s" % (client, "\n".join(failed))
    if client in PYTHON_CLIENTS:
        assert [line["scenario"] for line in lines] == [
            what for name, what, _ in SCENARIOS if name == client
        ]
    assert not site.messages.outside
    if client in ("openai", "claude"):
        assert any(has_image(call.body["messages"]) for call in site.calls())
    saved = [line for line in lines_of(RESULTS) if line["client"] == client]
    assert lines == saved, "save the results (see above), then: python3 tests/test_docs.py"


def save_results() -> None:
    """Run all clients, and write their lines, of which test_docs.py makes the README's table."""
    real_claude = os.environ["CAB_TEST_CLAUDE"]
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(
        Site(Path(real_claude).absolute(), (), Path(folder))
    ) as site:
        site.messages.reply = reply
        site.start()
        lines = [line for client in CLIENTS for line in run_client(site, client)]
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


if __name__ == "__main__":
    save_results()
