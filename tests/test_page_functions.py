"""The dashboard's pure functions, tested in Node without a browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import page
from conftest import MODULE, TESTS, missing

MINIMUM_NODE = 18


def find_node() -> str:
    """Return the path of Node, or skip the test."""
    node = shutil.which("node")
    if not node:
        missing("node is not installed")
    command = [str(node), "--version"]
    version = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", timeout=60).stdout
    match = re.match(r"v(\d+)\.", version)
    if not match or int(match[1]) < MINIMUM_NODE:
        missing("node %s is older than %d" % (version.strip(), MINIMUM_NODE))
    return str(node)


def test_the_pure_functions_pass_their_tests_in_node(tmp_path: Path) -> None:
    node = find_node()
    page.extract(MODULE, tmp_path)
    # The expected texts have English number formats.
    environment = {
        "PATH": os.environ["PATH"],
        "LC_ALL": "en_US.UTF-8",
        "DASHBOARD_JS": str(tmp_path / "script.js"),
    }
    result = subprocess.run(
        [node, "--test", str(TESTS / "page_functions.test.js")],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=120,
    )
    assert result.returncode == 0, result.stdout
    # Otherwise a file without tests would pass. The report has one of two forms.
    assert len(re.findall(r"(?m)^\s*(?:ok \d+ -|✔) ", result.stdout)) >= 15, result.stdout
