"""The dashboard: what it may load, what its files contain, and how it looks to a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest

import claude_api_bridge as cab
import page as page_files
from browser import find_chromium
from conftest import MODULE, RunningBridge

Start = Callable[..., RunningBridge]


class ParsedPage(HTMLParser):
    """The tags of a page with their attributes, and the text of its scripts."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.tags: List[Tuple[str, Dict[str, Optional[str]]]] = []
        self.script = ""
        self.feed(data.decode())

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script":
            self.script += data


# --- What the page may load ---


def test_the_policy_allows_only_our_own_script_and_style() -> None:
    parts = cab.content_security_policy("abc").split(";")
    policy = dict(part.strip().split(" ", 1) for part in parts)
    # default-src does not cover the last three.
    expected = {
        "default-src": "'none'",
        "script-src": "'nonce-abc'",
        "style-src": "'nonce-abc'",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert {name: policy.pop(name) for name in expected} == expected
    assert policy.pop("img-src") == "data:"
    assert set(policy.values()) <= {"'none'", "'self'"}


def test_every_response_has_its_own_nonce_and_the_page_uses_it(bridge: Start) -> None:
    api, nonces = bridge(spare=0).admin.with_token(None), set()
    for path in ("/dashboard", "/dashboard", "/dashboard/"):
        answer = api.get(path)
        policy = answer.headers["content-security-policy"]
        nonce = re.findall("'nonce-([^']+)'", policy)[0]
        assert policy == cab.content_security_policy(nonce)
        tags = ParsedPage(answer.data).tags
        used = [attributes["nonce"] for tag, attributes in tags if tag in ("script", "style")]
        assert used == [nonce, nonce]
        # 128 bits
        assert re.fullmatch("[A-Za-z0-9_-]{22,}", nonce)
        nonces.add(nonce)
    assert len(nonces) == 3
    headers = answer.headers
    assert (answer.status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"


def test_the_page_is_the_same_for_everyone_and_contains_no_data(bridge: Start) -> None:
    admin = bridge(spare=0).admin
    for _ in range(3):
        admin.new_token("secret name")
    pages = [
        re.sub(rb'nonce="[^"]+"', b"", api.get("/dashboard").data)
        for api in (admin, admin.with_token(None))
    ]
    assert pages[0] == pages[1] and b"secret name" not in pages[0]
    assert not re.search(rb"cab-[0-9a-f]", pages[0])


def test_the_page_names_no_other_host() -> None:
    page = cab.dashboard_page("abc")
    names = ("src", "href", "action", "srcset", "data", "poster", "formaction")
    loads = [
        str(value)
        for _, attributes in ParsedPage(page).tags
        for name, value in attributes.items()
        if name in names and not str(value).startswith("data:image/png;base64,")
    ]
    assert not [value for value in loads if not re.match(r"[/#]", value) or value[:2] == "//"]
    assert not re.findall(rb"https?:|//[a-z0-9-]+\.|@import|url\(|<base|http-equiv", page)


def test_text_enters_the_page_as_text_and_code_only_with_the_nonce() -> None:
    page = ParsedPage(cab.dashboard_page("abc"))
    names = [name for _, attributes in page.tags for name in attributes]
    assert not [name for name in names if name.startswith("on") or name == "style"]
    assert page.script.count("textContent") >= 1
    # fmt: off
    forbidden = (
        "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(",
        'setAttribute("on', ".cssText", "createContextualFragment", "DOMParser", "srcdoc",
        "javascript:", "document.cookie",
    )
    # fmt: on
    for word in forbidden:
        assert word not in page.script, word
    # What stays in the browser is one preference and never a token.
    stored = re.findall(r"localStorage(?:\.\w+\(\"(\w+)\")?", page.script)
    assert stored == ["shortcuts", "shortcuts"]
    assert not re.search(r"set(Timeout|Interval)\(\s*[\"'`]", page.script)


def test_changes_are_announced_to_screen_readers() -> None:
    tags = ParsedPage(cab.dashboard_page("abc")).tags
    assert ("html", {"lang": "en"}) in tags
    assert [attributes for _, attributes in tags if attributes.get("role") == "status"]


# --- The three constants ---


def test_the_page_consists_of_the_three_constants() -> None:
    html = cab.DASHBOARD_HTML
    assert [html.count(marker) for marker in ("STYLE", "SCRIPT", "NONCE")] == [1, 1, 2]
    assert "</style" not in cab.DASHBOARD_CSS and "</script" not in cab.DASHBOARD_JS
    expected = html.replace("NONCE", "abc")
    expected = expected.replace("STYLE", cab.DASHBOARD_CSS).replace("SCRIPT", cab.DASHBOARD_JS)
    assert cab.dashboard_page("abc").decode() == expected


def test_the_files_of_the_page_survive_extraction_and_embedding(tmp_path: Path) -> None:
    module, folder = tmp_path / "module.py", tmp_path / "page"
    shutil.copyfile(MODULE, module)
    page_files.extract(module, folder)
    contents = {path.name: path.read_bytes().decode() for path in folder.iterdir()}
    assert contents == {
        "style.css": cab.DASHBOARD_CSS,
        "page.html": cab.DASHBOARD_HTML,
        "script.js": cab.DASHBOARD_JS,
    }
    page_files.embed(module, folder)
    assert module.read_bytes() == MODULE.read_bytes()
    # A change to one file changes the module, with backslashes as they are.
    (folder / "script.js").write_bytes(contents["script.js"].encode() + b'"\\n\\1\\g<0>"\n')
    page_files.embed(module, folder)
    assert module.read_bytes() != MODULE.read_bytes()
    (folder / "script.js").write_bytes(contents["script.js"].encode())
    page_files.embed(module, folder)
    assert module.read_bytes() == MODULE.read_bytes()


@pytest.mark.parametrize(
    "content, message",
    [
        (b'let text = """;\n', '"""'),
        (b"a = 1 \\", "backslash"),
        (b'a = "1"', "quote"),
        (b"a = 1\r\n", "carriage return"),
        (b"\xff\n", "cannot read"),
    ],
)
def test_a_file_that_a_constant_cannot_hold_leaves_the_module_unchanged(
    content: bytes, message: str, tmp_path: Path
) -> None:
    module = tmp_path / "module.py"
    shutil.copyfile(MODULE, module)
    page_files.extract(module, tmp_path)
    (tmp_path / "script.js").write_bytes(content)
    with pytest.raises(page_files.PageError, match=message):
        page_files.embed(module, tmp_path)
    assert module.read_bytes() == MODULE.read_bytes()


def test_the_command_reports_errors_in_one_line(tmp_path: Path) -> None:
    tool = str(Path(page_files.__file__))

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, tool, *arguments]
        return subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", timeout=60
        )

    assert run("extract", str(tmp_path / "page")).returncode == 0
    assert (tmp_path / "page" / "script.js").read_text("utf-8") == cab.DASHBOARD_JS
    ended = run("embed", str(tmp_path / "none"))
    assert ended.returncode == 1
    assert re.fullmatch(r"error: cannot read .*style\.css: .*\n", ended.stderr)
    assert run("extract").returncode == 2


# --- In a browser ---


def browse(url: str, folder: Path) -> Tuple[str, str]:
    """Return the page after its scripts ran, and what the browser and its console logged."""
    # fmt: off
    flags = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", "--no-proxy-server", "--enable-logging=stderr",
        "--user-data-dir=%s" % folder, "--virtual-time-budget=3000", "--dump-dom",
    )
    # fmt: on
    ended = subprocess.run(
        [find_chromium(), *flags, url],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        timeout=60,
    )
    return ended.stdout, ended.stderr


CONSOLE = re.compile(r".*(?:CONSOLE|Content Security Policy|Refused to).*")


def test_a_browser_shows_the_counters_and_logs_no_problem(bridge: Start, tmp_path: Path) -> None:
    running = bridge()
    running.admin.new_token()
    for message in ("hi", "hi", "hi", "die 3", "die 3"):
        running.admin.answer(message)
    url = "http://127.0.0.1:%d/dashboard" % running.port
    dom, errors = browse(url, tmp_path / "browser")
    texts = dict(re.findall(r'<(?:dd|p)\b[^>]*\bid="([a-z-]+)"[^>]*>([^<]*)</', dom))
    counters = {
        "counters-queued": "0",
        "counters-processing": "0",
        "counters-completed": "3",
        "counters-failed": "2",
        "counters-requests": "5",
        "counters-tokens": "2",
    }
    actual = {name: texts.get(name) for name in counters}
    assert actual == counters, dom[:3000] + errors[-3000:]
    assert (texts["version"], texts["state"]) == ("v" + cab.__version__, "idle")
    assert not CONSOLE.findall(errors)


def test_the_browser_reports_what_the_policy_blocks(
    bridge: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without this, the test above could not fail."""
    inline = '<main><p onclick="1" style="color:red">x</p><script>alert(1)</script>'
    page = cab.DASHBOARD_PAGE.replace('<main tabindex="-1">', inline)
    assert page != cab.DASHBOARD_PAGE
    monkeypatch.setattr(cab, "DASHBOARD_PAGE", page)
    running = bridge(spare=0)
    url = "http://127.0.0.1:%d/dashboard" % running.port
    _, errors = browse(url, tmp_path / "browser")
    assert CONSOLE.findall(errors)
