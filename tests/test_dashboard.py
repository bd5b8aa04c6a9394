"""The page: what it may load, what is in it, and that a real browser shows the counters with it."""
from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest

import claude_api_bridge as cab
from conftest import RunningBridge, missing

Start = Callable[..., RunningBridge]


class Page(HTMLParser):
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


def test_the_policy_allows_our_own_script_and_style_and_nothing_else() -> None:
    policy = dict(part.strip().split(" ", 1) for part in cab.content_security_policy("abc").split(";"))
    wanted = {"default-src": "'none'", "script-src": "'nonce-abc'", "style-src": "'nonce-abc'", "connect-src": "'self'",
              "base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'"}       # default-src does not cover the last three
    assert {name: policy.pop(name) for name in wanted} == wanted
    assert set(policy.values()) <= {"'none'", "'self'"}


def test_every_answer_has_a_nonce_of_its_own_and_the_page_bears_it(bridge: Start) -> None:
    api, seen = bridge(spare=0).admin.with_token(None), set()
    for path in ("/dashboard", "/dashboard", "/dashboard/"):
        answer = api.get(path)
        nonce = re.findall("'nonce-([^']+)'", answer.headers["content-security-policy"])[0]
        assert answer.headers["content-security-policy"] == cab.content_security_policy(nonce)
        assert {attributes["nonce"] for tag, attributes in Page(answer.data).tags if tag in ("script", "style")} == {nonce}
        assert re.fullmatch("[A-Za-z0-9_-]{22,}", nonce)                         # 128 bits
        seen.add(nonce)
    assert len(seen) == 3
    assert (answer.status, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert answer.headers["cache-control"] == "no-store" and answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_is_the_same_for_all_and_holds_no_data(bridge: Start) -> None:
    admin = bridge(spare=0).admin
    for _ in range(3):
        admin.new_token("must not be there")
    pages = [re.sub(rb'nonce="[^"]+"', b"", api.get("/dashboard").data) for api in (admin, admin.with_token(None))]
    assert pages[0] == pages[1] and b"must not" not in pages[0] and not re.search(rb"cab-[0-9a-f]", pages[0])


def test_the_page_is_small_and_names_no_other_host() -> None:
    page = cab.dashboard_page("abc")
    assert len(page) < 40_000
    loads = [value for _, attributes in Page(page).tags for name, value in attributes.items()
             if name in ("src", "href", "action", "srcset", "data", "poster", "formaction")]
    assert not [value for value in loads if not re.match(r"[/#]", str(value)) or str(value).startswith("//")]
    assert not re.findall(rb"https?:|//[a-z0-9-]+\.|@import|url\(|<base|http-equiv", page)


def test_text_gets_into_the_page_as_text_and_code_only_with_the_nonce() -> None:
    page = Page(cab.dashboard_page("abc"))
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "style"]
    assert page.script.count("textContent") >= 1
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "setAttribute(\"on", ".cssText",
                 "createContextualFragment", "DOMParser", "srcdoc", "javascript:", "localStorage", "document.cookie"):
        assert word not in page.script, word
    assert not re.search(r"set(Timeout|Interval)\(\s*[\"'`]", page.script)


def test_what_changes_is_told_to_screen_readers() -> None:
    tags = Page(cab.dashboard_page("abc")).tags
    assert ("html", {"lang": "en"}) in tags
    assert [1 for _, attributes in tags if attributes.get("role") == "status" or attributes.get("aria-live") == "polite"]


def browse(url: str, folder: Path) -> Tuple[str, str]:
    """-> (the page after its scripts ran, what the browser wrote to stderr, console included)."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        missing("no chromium here")
    ended = subprocess.run(
        [str(found), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--no-proxy-server", "--enable-logging=stderr",
         "--user-data-dir=%s" % folder, "--virtual-time-budget=3000", "--dump-dom", url],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace", timeout=60)
    return ended.stdout, ended.stderr


CONSOLE = re.compile(r".*(?:CONSOLE|Content Security Policy|Refused to).*")


def test_a_browser_shows_the_counters_and_has_nothing_to_complain_of(bridge: Start, tmp_path: Path) -> None:
    running = bridge()
    running.admin.new_token()
    for message in ("hi", "hi", "hi", "die 3", "die 3"):
        running.admin.answer(message)
    dom, errors = browse("http://127.0.0.1:%d/dashboard" % running.port, tmp_path / "browser")
    shown = dict(re.findall(r'<(?:dd|p)\b[^>]*\bid="([a-z]+)"[^>]*>([^<]*)</', dom))
    counters = {"queued": "0", "processing": "0", "completed": "3", "failed": "2", "requests": "5", "tokens": "2"}
    assert {name: shown.get(name) for name in counters} == counters, dom[:3000] + errors[-3000:]
    assert (shown["version"], shown["state"]) == ("v" + cab.__version__, "ready")
    assert not CONSOLE.findall(errors)


def test_the_browser_reports_what_the_policy_stops(bridge: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cab, "DASHBOARD", cab.DASHBOARD.replace("<main>", '<main><p id="inline" onclick="1" style="color:red">x</p><script>alert(1)</script>'))
    running = bridge(spare=0)
    _, errors = browse("http://127.0.0.1:%d/dashboard" % running.port, tmp_path / "browser")
    assert CONSOLE.findall(errors)                                               # or the test above could not fail
