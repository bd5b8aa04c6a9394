"""Libraries that people use with /v1, as clients of the bridge over the real `claude`.

    python3 -m venv DIR
    DIR/bin/pip install -r tests/clients/requirements.txt
    DIR/bin/pip install --no-deps -r tests/clients/requirements-no-deps.txt
    export CAB_TEST_CLIENTS=DIR/bin/python CAB_TEST_CLAUDE=node_modules/.bin/claude
    python -m pytest tests/test_clients.py

`PYTHONPATH=. python tests/test_clients.py` saves the results, for the README's table.

Each test runs the scenarios of one library in that venv (tests/clients/run_clients.py). A stand-in
takes the place of the model, and of everything outside: a library that asks another server fails.
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
from run_clients import SCENARIOS, lines_of  # noqa: E402

CLIENTS = list(dict.fromkeys(client for client, _, _ in SCENARIOS))
RESULTS = TESTS / "clients" / "results.json"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]


@pytest.fixture(scope="session")
def clients_python() -> Path:
    """Return the Python with the libraries that $CAB_TEST_CLIENTS names, or skip the test.

    With CAB_REQUIRE_REAL=1 the test fails instead.
    """
    python = shutil.which(os.environ.get("CAB_TEST_CLIENTS") or "")
    if not python:
        missing(
            "no clients here: install tests/clients/requirements.txt in a venv, "
            "and set CAB_TEST_CLIENTS to its Python"
        )
    return Path(str(python)).absolute()


def called_tools(body: Dict[str, Any]) -> Set[str]:
    """Return the names of the tools that the model has called in this conversation."""
    contents = [message["content"] for message in body["messages"]]
    blocks = [block for content in contents if isinstance(content, list) for block in content]
    return {block["name"] for block in blocks if block.get("type") == "tool_use"}


def reply(body: Dict[str, Any]) -> Reply:
    """Call each tool once, in this order; then reply with the last result, or with the user's text.

    The tools of an agent come first, then those that give an answer its structure.
    """
    results = [result for _, result in tool_results(body)]
    text = "It is " + results[-1] if results else "Echo: " + last_text(body)
    inputs = {
        "transfer_to_weather": {},
        "get_weather": {"city": "Rome"},
        "final_result": {"answer": text},
        "StructuredOutput": {"answer": text},
    }
    offered = {tool["name"].rpartition("__")[2]: tool["name"] for tool in body.get("tools", [])}
    called = called_tools(body)
    for name, arguments in inputs.items():
        if name in offered and offered[name] not in called:
            return Reply(tools=((offered[name], arguments),))
    return Reply(text)


@pytest.fixture(scope="module")
def site(
    clients_python: Path,
    real_claude: Path,
    version: Version,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    """The bridge over the real CLI, which all tests of this file share."""
    with contextlib.closing(Site(real_claude, version, tmp_path_factory.mktemp("clients"))) as site:
        site.messages.reply = reply
        site.start()
        yield site


def run_client(site: Site, python: Path, client: str) -> List[Dict[str, Any]]:
    """Run the scenarios of a client with a token of its own. -> their lines."""
    api, _ = site.client()
    environ = {
        "PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(site.home),
        "HTTP_PROXY": site.messages.url, "HTTPS_PROXY": site.messages.url,
        "NO_PROXY": "127.0.0.1,localhost",
    }
    script = str(TESTS / "clients" / "run_clients.py")
    address = "http://127.0.0.1:%d" % api.port
    done = subprocess.run(
        [str(python), script, address, str(api.token), client], env=environ,
        cwd=str(site.folder), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, encoding="utf-8", timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"client"')]


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_works(site: Site, clients_python: Path, client: str) -> None:
    del site.messages.calls[:], site.messages.outside[:]
    lines = run_client(site, clients_python, client)
    failed = ["%(scenario)s: %(error)s" % line for line in lines if not line["ok"]]
    assert not failed, "%s: %s" % (client, "\n".join(failed))
    assert [line["scenario"] for line in lines] == [
        what for name, what, _ in SCENARIOS if name == client
    ]
    assert not site.messages.outside
    if client == "openai":
        content = [block for call in site.calls() for block in call.body["messages"][0]["content"]]
        assert "image" in [block["type"] for block in content]
    saved = [line for line in lines_of(RESULTS) if line["client"] == client]
    assert lines == saved, "save the results (see above), then: python3 tests/test_docs.py"


def save_results() -> None:
    """Run all clients, and write their lines, of which test_docs.py makes the README's table."""
    real_claude, python = os.environ["CAB_TEST_CLAUDE"], Path(os.environ["CAB_TEST_CLIENTS"])
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(
        Site(Path(real_claude).absolute(), (), Path(folder))
    ) as site:
        site.messages.reply = reply
        site.start()
        lines = [line for client in CLIENTS for line in run_client(site, python, client)]
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


if __name__ == "__main__":
    save_results()
