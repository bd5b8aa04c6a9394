"""The dashboard in a real browser: what a user or a screen reader finds, and what stays out."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest

import claude_api_bridge as cab
from browser import Browser, Page
from conftest import RunningBridge, missing, wait_until
from test_stream import script

pytestmark = pytest.mark.browser

Start = Callable[..., RunningBridge]
VIEWS = ("Requests", "Playground", "Usage", "Tokens", "API")
EVIL = "<img src=x onerror=alert(1)>"
CURRENT_LINK = "document.querySelector('nav [aria-current=page]')"

# Timers fire after a tenth of their time, and the clock of the page runs ten times as fast.
SPEED_UP = """((realTimeout, realNow, start) => {
    setTimeout = (callback, delay, ...args) => realTimeout(callback, delay / 10, ...args);
    Date.now = () => start + (realNow() - start) * 10;
})(setTimeout, Date.now, Date.now()); refreshNow(); 1"""

# Each stream breaks after its first delta. `paths` collects the paths of all streams.
BREAK_STREAMS = """whole = readEvents; paths = [];
readEvents = async function* (path, ...args) {
    paths.push(path);
    for await (const event of whole(path, ...args)) {
        yield event;
        if (event.type === "delta") return;
    }
}; 1"""

# The first response whose path contains a text is held back until release() is called.
# `first` is the promise of the poll that waits for it.
HOLD_FIRST = """release = null; realFetch = fetch;
fetch = async (path, options) => {
    const response = await realFetch(path, options);
    if (!release && path.includes("%s")) {
        await new Promise((resolve) => { release = resolve });
    }
    return response;
};
lastFetch.at = lastFetch.allAt = 0; first = pollOnce(); 1"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests here. It starts before the first test."""
    started = Browser(tmp_path_factory.mktemp("browser"))
    yield started
    started.close()


class Visit(Page):
    """The dashboard of a bridge, open in a tab."""

    def sign_in(self, token: Any) -> None:
        self.write("Token", str(token))
        self.press("Sign in")

    def speed_up(self) -> None:
        """Make the page do after 0.1 s what it does after 1 s."""
        self.js(SPEED_UP)

    def refresh(self) -> None:
        """Make the page poll now instead of some seconds later."""
        self.js("refreshNow(); 1")

    def open_view(self, name: str) -> None:
        """Open a view, and wait until the page has moved the focus to its heading.

        Without the wait the page could take the focus from the element that a test uses next.
        """
        is_current = "%s.innerText === %s" % (CURRENT_LINK, json.dumps(name))
        was_open = self.js("%s && %s.hash === location.hash" % (is_current, CURRENT_LINK))
        self.press(name, "nav")
        self.until(is_current)
        if not was_open:
            self.until("document.activeElement.matches('[data-view] h2')")


Visitor = Callable[..., Visit]


@pytest.fixture
def visit(browser: Browser, bridge: Start) -> Iterator[Visitor]:
    """visit(running, token=...) -> its page, signed in if there is a token.

    At the end no page may have caused a problem.
    """
    opened: List[Visit] = []

    def visit(running: RunningBridge, token: Any = None, **options: Any) -> Visit:
        page = Visit(browser, "http://127.0.0.1:%d/" % running.port, **options)
        opened.append(page)
        if token:
            page.sign_in(token)
            page.wait_for_text("Running now")
            # The first lists have arrived, so that they cannot arrive during the test.
            page.until("lastFetch.counters")
        return page

    yield visit
    problems = [problem for page in opened for problem in page.problems]
    for page in opened:
        page.close()
    assert not problems


def test_the_browser_records_policy_violations_and_what_a_page_logs(
    visit: Visitor, bridge: Start
) -> None:
    """Without this, the check at the end of each test could not fail."""
    page = visit(bridge())
    page.js("document.body.setAttribute('style', 'color: red'); 1")
    page.js("console.error('oh'); setTimeout(() => { throw new Error('thrown') }); 1")
    wait_until(lambda: page.js("1") and len(page.problems) >= 3)
    for word in ("Content Security Policy", "oh", "thrown"):
        assert any(word in problem for problem in page.problems)
    page.problems.clear()


# --- Roles ---


def test_without_a_token_there_are_counters_the_api_and_the_sign_in_form(
    visit: Visitor, bridge: Start
) -> None:
    running = bridge()
    running.admin.answer("secret words")
    page = visit(running)
    page.wait_for_text("idle", "[role=status]")
    counters = page.js(
        "Object.fromEntries([...document.querySelectorAll('#counters dd')]"
        ".map((element) => [element.id.replace('counters-', ''), element.innerText]))"
    )
    assert counters == {
        "queued": "0",
        "processing": "0",
        "completed": "1",
        "failed": "0",
        "requests": "1",
        "tokens": "1",
    }
    text = page.text()
    assert "token create" in text and "start printed the admin token" in text
    assert "secret words" not in text and "Sign out" not in text
    assert page.text("nav").split() == ["Requests", "API"]
    page.open_view("API")
    for route in cab.ROUTES:
        page.wait_for_text("%s %s" % (route.method, route.path), "#endpoints")


def test_a_wrong_token_is_refused_and_a_valid_one_lasts_as_long_as_the_tab(
    visit: Visitor, bridge: Start
) -> None:
    running = bridge()
    page = visit(running)
    page.sign_in("cab-" + "0" * 64)
    page.wait_for_text("Invalid or expired token", "[role=alert]")
    assert page.js("sessionStorage.length") == 0
    page.sign_in(running.admin.token)
    page.wait_for_text("Running now")
    assert page.text("nav").split() == list(VIEWS) and page.text("#sign-in") == ""
    assert page.js("sessionStorage.token") == running.admin.token
    assert page.js("[localStorage.length, document.cookie]") == [0, ""]
    assert not page.js("location.href.includes('cab-')")
    page.js("isOld = true; location.reload(); 1")
    page.until("!('isOld' in window)")
    page.wait_for_text("Sign out")
    page.press("Sign out")
    page.wait_for_text("Signed out.", "[role=alert]")
    assert page.js("sessionStorage.length") == 0 and "Running now" not in page.text()
    assert str(running.admin.token) not in page.js("document.documentElement.outerHTML")


def test_a_revoked_token_is_signed_out(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    admin = running.admin
    created = admin.post("/api/tokens", {"name": "short"}).json
    page = visit(running, created["token"])
    admin.delete("/api/tokens/" + created["tokenId"])
    page.refresh()
    page.wait_for_text("You were signed out.", "[role=alert]")


def test_a_user_sees_only_the_requests_of_its_own_token(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    user, other = running.admin.new_token("user"), running.admin.new_token("other")
    other.answer("say not for you")
    user.answer("say all mine")
    page = visit(running, user.token)
    page.wait_for_text("say all mine", "#recent")
    assert page.text("nav").split() == ["Requests", "Playground", "Usage", "API"]
    page.open_view("Usage")
    page.wait_for_text("1", "#totals")
    html = page.js("document.documentElement.outerHTML")
    assert "not for you" not in html and "2.1.330" not in html
    assert "other" not in page.text() and "Bridge" not in page.text()


def test_a_user_sees_its_own_figures(visit: Visitor, bridge: Start, gate: Path) -> None:
    running = bridge()
    user, other = running.admin.new_token("user"), running.admin.new_token("other")
    for message in ("say one", "say two", "die 3 no"):
        other.answer(message)
    user.answer("say mine")
    other.ask("hold %s" % gate)
    user.ask("hi")
    page = visit(running, user.token)
    page.wait_for_text("A request of another token is running.")
    page.until("document.querySelectorAll('#counters dd').length === 5")
    figures = page.js(
        "[...document.querySelectorAll('#counters div')].map((element) =>"
        " [element.querySelector('dt').innerText, element.querySelector('dd').innerText])"
    )
    assert dict(figures) == {
        "Queued": "1", "Processing": "0", "Completed": "1", "Failed": "0", "Requests": "2"}
    page.wait_for_text("Your own requests", "#counters-note")
    page.js("pollOnce().then(() => 1)")
    assert page.js("document.querySelectorAll('#counters dd').length") == 5
    page = visit(running, running.admin.token)
    assert page.text("#counters-failed") == "1" and page.text("#counters-note") == ""


# --- Requests ---


def test_the_text_of_a_running_request_appears_live(
    visit: Visitor, bridge: Start, tmp_path: Path
) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.speed_up()
    gates = [tmp_path / "one", tmp_path / "two"]
    running.admin.ask(
        script(
            {"delta": "Once upon"},
            {"wait": str(gates[0])},
            {"delta": " a time"},
            {"wait": str(gates[1])},
        )
    )
    page.refresh()
    page.wait_for_text("Once upon", "#running")
    page.wait_for_text("resolved-default-model · admin", "#running")
    page.js("document.querySelector('#running li').marked = true")
    gates[0].touch()
    page.wait_for_text("Once upon a time", "#running .text")
    # It is still the same element, so that focus and selection stay.
    assert page.js("document.querySelector('#running li').marked")
    gates[1].touch()
    page.wait_for_text("No request is running.")
    page.press("✓ completed", "#recent")
    page.wait_for_text("Once upon a time", "#recent")
    details = ("waited ", "ran ", "10 in", "7 out", "5 cache read", "3 cache write", "est. $0.0010")
    for text in details:
        page.wait_for_text(text, "#recent")
    times = page.js("[...document.querySelectorAll('#recent time')].map((time) => time.dateTime)")
    assert times and all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", time) for time in times)


def test_the_page_polls_if_streams_do_not_get_through(
    visit: Visitor, bridge: Start, gate: Path
) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.speed_up()
    page.js("readEvents = async function* () {}; 1")
    running.admin.ask(script({"delta": "slowly but"}, {"wait": str(gate)}, {"delta": " surely"}))
    page.refresh()
    page.wait_for_text("slowly but", "#running")
    page.open_view("Playground")
    page.write("Message", "say asked without a stream")
    page.press("Ask", "#ask-form")
    page.wait_for_text("waiting, position 1")
    gate.touch()
    page.wait_for_text("asked without a stream", "#answer")
    page.wait_for_text("done in")


def test_a_stream_that_breaks_is_resumed_at_its_offset(
    visit: Visitor, bridge: Start, tmp_path: Path
) -> None:
    running, gates = bridge(), [tmp_path / "one", tmp_path / "two"]
    page = visit(running, running.admin.token)
    page.speed_up()
    page.js(BREAK_STREAMS)
    page.open_view("Playground")
    message = script(
        {"delta": "a😀"},
        {"wait": str(gates[0])},
        {"delta": "b"},
        {"wait": str(gates[1])},
        {"delta": "c"},
    )
    page.write("Message", message)
    page.press("Ask", "#ask-form")
    page.wait_for_text("a😀", "#answer")
    # Offsets count code points, not UTF-16 units.
    page.until("paths.some((path) => path.endsWith('events?after=2'))")
    gates[0].touch()
    page.until("document.querySelector('#answer').textContent === 'a😀b'")
    page.until("paths.some((path) => path.endsWith('events?after=3'))")
    assert page.js("document.querySelector('#answer').textContent") == "a😀b"
    gates[1].touch()
    page.wait_for_text("done in")
    assert page.text("#answer") == "a😀bc"
    assert len(running.admin.get("/api/requests").json["requests"]) == 1


def test_running_and_waiting_requests_are_cancelled(
    visit: Visitor, bridge: Start, gate: Path
) -> None:
    running = bridge()
    first = running.admin.ask("hold %s" % gate)
    waiting = [running.admin.ask("number %d" % n) for n in (1, 2)]
    page = visit(running, running.admin.token)
    page.wait_for_text("he", "#running .text")
    page.until(
        "[...document.querySelectorAll('#waiting .ellipsis')]"
        ".map((element) => element.innerText).join() === 'number 1,number 2'"
    )
    page.press("Cancel: number 1", "#waiting")
    page.wait_for_no_text("number 1", "#waiting")
    assert running.admin.done(waiting[0])["errorCode"] == "cancelled"
    page.press("Cancel", "#running")
    assert running.admin.done(first)["errorCode"] == "cancelled"
    assert running.admin.done(waiting[1])["status"] == "completed"
    page.wait_for_text("cancelled", "#recent")


def test_recent_requests_are_filtered_searched_and_more_are_loaded(
    visit: Visitor, bridge: Start
) -> None:
    running = bridge()
    for n in range(23):
        running.admin.answer("die 3 broke %02d" % n if n == 20 else "say number %02d" % n)
    page = visit(running, running.admin.token)
    row_count = "document.querySelectorAll('#recent li').length"
    page.until(row_count + " === 20")
    page.press("Load more")
    page.until(row_count + " === 23")
    running.admin.answer("say one more")
    page.refresh()
    # The older requests stay loaded.
    page.until(row_count + " === 24")
    page.write("Search", "NUMBER 0")
    page.until(row_count + " === 10")
    page.wait_for_text("10 requests", "#match-count")
    # A reload keeps the filters, which stand in the address.
    assert page.js("location.hash") == "#/requests?q=NUMBER+0"
    page.js("isOld = true; location.reload(); 1")
    page.until("!('isOld' in window) && document.querySelector('#search')?.value === 'NUMBER 0'")
    page.until(row_count + " === 10")
    page.press("Clear filters")
    page.until(row_count + " === 20")
    page.choose("Status", "Failed")
    page.until(row_count + " === 1")
    page.press("✕ failed", "#recent")
    page.wait_for_text("Error: cli_error", "#recent")
    page.choose("Status", "Any status")
    page.until(row_count + " === 20")
    page.write("Search", "no such text")
    page.wait_for_text("No match", "#match-count")
    assert page.js(row_count) == 0 and "No requests yet." not in page.text()


def test_requests_are_filtered_by_token_model_and_time(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    first, second = running.admin.new_token("first"), running.admin.new_token("second")
    first.answer("say of the first", model="haiku")
    second.answer("say of the second", model="opus")
    page = visit(running, running.admin.token)
    page.wait_for_text("of the second", "#recent")
    page.choose("Token", "first")
    page.wait_for_no_text("of the second", "#recent")
    page.wait_for_text("of the first", "#recent")
    page.choose("Token", "All tokens")
    page.write("Model", "opus")
    page.wait_for_no_text("of the first", "#recent")
    page.wait_for_text("of the second", "#recent")
    page.write("Model", "")
    page.js("sent = []; realFetch = fetch; 1")
    page.js("fetch = (path, options) => { sent.push(path); return realFetch(path, options) }; 1")
    page.choose("Time", "Last hour")
    page.wait_for_text("of the first", "#recent")
    query = page.until("sent.find((path) => path.includes('since='))")
    since = page.js("Date.parse(new URLSearchParams(%s).get('since'))" % json.dumps(query))
    assert abs(page.js("Date.now()") - since - 3600_000) < 60_000


def test_wrong_filters_of_an_address_are_named_and_the_page_goes_on(
    visit: Visitor, bridge: Start
) -> None:
    running = bridge()
    running.admin.answer("say one")
    page = visit(running, running.admin.token)
    page.wait_for_text("say one", "#recent")
    page.js("location.hash = '#/requests?token=nobody&hours=1e300&length=7&toString=1'; 1")
    page.wait_for_text("Token not found", "#match-count")
    assert page.text("#recent") == ""
    page.js("refreshNow().then(() => 1)")
    assert page.text("#state") == "idle"
    page.press("Clear filters")
    page.wait_for_text("say one", "#recent")


def test_the_filters_of_another_token_than_an_admin_name_no_token(
    visit: Visitor, bridge: Start
) -> None:
    running = bridge()
    page = visit(running, running.admin.new_token("user").token)
    assert page.js("document.querySelector('[name=status]').checkVisibility()")
    assert not page.js("document.querySelector('[name=token]').checkVisibility()")


def test_a_search_says_how_far_it_looked_and_goes_on(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    running.admin.answer("say old treasure")
    for number in range(3):
        running.admin.answer("say number %d" % number)
    page = visit(running, running.admin.token)
    # The bridge reads many thousand requests before it answers with less than a page.
    page.js("""realFetch = fetch; fetch = (path, options) => path.includes('before=7777')
        ? realFetch(path.replace('before=7777', ''), options)
        : !path.includes('q=treasure') ? realFetch(path, options)
        : Promise.resolve(Response.json({
            requests: [], next: '7777', searchedTo: '2020-01-31T09:05:00Z' })); 1""")
    page.write("Search", "treasure")
    page.wait_for_text("No match so far, searched back to Jan 31", "#match-count")
    page.press("Search further")
    page.wait_for_text("old treasure", "#recent")
    page.wait_for_text("1 request", "#match-count")
    page.wait_for_no_text("Search further")
    # A poll, whose page holds nothing, does not drop it.
    page.js("refreshNow().then(() => 1)")
    assert "old treasure" in page.text("#recent")


def test_a_request_has_an_address_of_its_own(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    user = running.admin.new_token("user")
    request_id = user.ask("say very old")
    user.done(request_id)
    for number in range(21):
        running.admin.answer("say number %d" % number)
    page = visit(running)
    address = "http://127.0.0.1:%d/dashboard#/requests/" % running.port
    page.navigate("http://127.0.0.1:%d/health" % running.port)
    page.navigate(address + request_id)
    page.sign_in(running.admin.token)
    page.wait_for_text("Prompt", "#linked-list")
    page.wait_for_text("very old", "#linked-list .text")
    page.wait_for_text("user", "#linked-list summary")
    assert "Running now" not in page.text()
    page.js("copied = []; navigator.clipboard.writeText = async (text) => { copied.push(text) }; 1")
    page.press("Copy link")
    page.until("copied.length")
    assert page.js("copied") == [address + request_id]
    page.press("All requests")
    page.wait_for_text("Running now")
    assert page.js("location.hash") == "#/requests" and page.text("#linked") == ""
    page.js("location.hash = '#/requests/00000000-0000-4000-8000-000000000000'; 1")
    page.wait_for_text("There is no request with this ID", "[role=alert]")
    page = visit(running)
    page.navigate("http://127.0.0.1:%d/health" % running.port)
    page.navigate(address + request_id)
    page.sign_in(running.admin.new_token("other").token)
    page.wait_for_text("There is no request with this ID", "[role=alert]")
    assert "very old" not in page.js("document.documentElement.outerHTML")


def test_a_linked_request_that_runs_shows_its_end(
    visit: Visitor, bridge: Start, gate: Path
) -> None:
    running = bridge()
    request_id = running.admin.ask(script({"wait": str(gate)}, {"delta": "the end"}))
    page = visit(running, running.admin.token)
    page.speed_up()
    page.js("location.hash = '#/requests/%s'; 1" % request_id)
    page.wait_for_text("running", "#linked-list")
    page.wait_for_text("Cancel", "#linked-list")
    gate.touch()
    page.wait_for_text("the end", "#linked-list [aria-label=Answer]")


def test_errors_of_a_day_are_grouped_and_a_click_filters(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    running.admin.post("/api/queue/pause")
    running.admin.delete("/api/ask/" + running.admin.ask("cancel me"))
    running.admin.post("/api/queue/resume")
    page = visit(running, running.admin.token)
    page.wait_for_text("cancelled", "#recent")
    assert page.text("#errors-section") == ""
    for number in range(2):
        running.admin.answer("die 3 broke %d" % number)
    running.admin.answer("say fine")
    page = visit(running, running.admin.token)
    page.wait_for_text("cli_error × 2", "#errors")
    page.wait_for_text("last at ", "#errors")
    page.press("cli_error × 2", "#errors")
    page.until("document.querySelectorAll('#recent li').length === 2")
    assert page.js("document.querySelector('[name=status]').value") == "cli_error"
    page.press("✕ failed", "#recent")
    advice = running.admin.get("/api/requests?status=error&limit=1").json["requests"][0]["advice"]
    for part in ("#errors", "#recent"):
        page.wait_for_text(advice[0].upper() + advice[1:] + ".", part)


def test_ask_again_sends_all_fields_and_a_conversation_is_deleted(
    visit: Visitor, bridge: Start
) -> None:
    running = bridge()
    user = running.admin.new_token("user", sessionMode="stateful")
    fields = {
        "systemPrompt": "Be brief.",
        "effort": "low",
        "conversation": "trip",
        "jsonSchema": {"type": "object"},
    }
    user.answer("hello", **fields)
    page = visit(running, user.token)
    page.press("✓ completed", "#recent")
    page.press("Ask again")
    completed = "/api/requests?status=completed"
    newer = wait_until(lambda: user.get(completed).json["requests"][:-1])
    assert {name: newer[0][name] for name in fields} == fields
    assert newer[0]["message"] == "hello"
    page.refresh()
    # After this the list of conversations does not change by itself.
    page.wait_for_text("2 turns", "#conversations")
    page.press("Delete trip", "#conversations")
    page.press("Keep", "#conversations")
    page.press("Delete trip", "#conversations")
    page.press("Yes, delete", "#conversations")
    page.wait_for_no_text("trip", "#conversations")
    assert user.get("/api/conversations").json["conversations"] == []


def test_requests_of_the_v1_formats_cannot_be_asked_again(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    messages = [{"role": "user", "content": "say hello"}]
    body = {"model": "haiku", "max_tokens": 9, "messages": messages}
    assert running.admin.post("/v1/messages", body).status == 200
    page = visit(running, running.admin.token)
    page.wait_for_text("/v1", "#recent")
    page.press("✓ completed", "#recent")
    page.wait_for_text("Copy answer", "#recent")
    assert "Ask again" not in page.text("#recent")


# --- Bridge, plan and usage ---


def test_an_admin_sees_the_bridge_its_plan_and_the_usage(visit: Visitor, bridge: Start) -> None:
    running = bridge(public_url="https://bridge.example.com")
    limits = {
        "status": "allowed_warning",
        "rateLimitType": "five_hour",
        "utilization": 0.62,
        "resetsAt": cab.Clock().now() + 7200,
    }
    running.admin.answer(script({"limits": limits}, {"result": "hi"}))
    page = visit(running, running.admin.token)
    for text in ("https://bridge.example.com", "2.1.330", "Claude Max subscription"):
        page.wait_for_text(text, "#bridge-facts")
    for text in ("5-hour limit", "62 % used", "resets "):
        page.wait_for_text(text, "#plan-limits")
    assert page.js("document.querySelector('#plan-limits progress').value") == 0.62
    page.open_view("Usage")
    page.until("document.querySelectorAll('#chart g').length === 30")
    today = page.js("document.querySelector('#chart g:last-child').textContent")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d · 25 tokens · 1 request · est\. \$0\.0010", today)
    page.press("Day by day")
    page.wait_for_text("$0.0010", "#usage-by-day")
    page.wait_for_text("admin", "#usage-by-token")
    page.wait_for_text("resolved-default-model", "#usage-by-model")
    for label in ("Waiting, p50", "Waiting, p95", "First token, p50", "First token, p95"):
        page.wait_for_text(label, "#latency")


def test_the_chart_is_stacked_and_shows_the_chosen_days(
    visit: Visitor, bridge: Start, tmp_path: Path
) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.open_view("Usage")
    page.wait_for_text("No request in the last hour.")
    assert page.text("#no-usage") == "No usage yet." and page.text("#usage-parts") == ""
    running.admin.answer("hi")
    page.refresh()
    page.wait_for_no_text("No request in the last hour.")
    page.until("document.querySelectorAll('#chart g').length === 30")
    heights = (
        "[...document.querySelectorAll('#chart g:last-child rect:not(.day)')]"
        ".map((part) => [part.getAttribute('class'), +part.getAttribute('height')])"
    )
    tops = heights.replace("part.getAttribute('class'), ", "").replace("'height'", "'y'")
    parts = dict(page.js(heights))
    # 10 in, 7 out, 5 and 3 of the cache: all together are 96 % of the height.
    assert {name: round(height * 25 / 96) for name, height in parts.items()} == {
        "in": 10, "out": 7, "cache": 8}
    assert [round((100 - top) * 25 / 96) for top, in page.js(tops)] == [10, 17, 25]
    assert page.text("#legend").split() == ["■", "10", "in", "■", "7", "out", "■", "8", "cache"]
    today = page.js("document.querySelector('#chart g:last-child').textContent")[:10]
    page.wait_for_text("highest: %s, 25 tokens" % today)
    page.press("■ 8 cache", "#legend")
    page.wait_for_text("highest: %s, 17 tokens" % today)
    assert set(dict(page.js(heights))) == {"in", "out"}
    page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    for days in (7, 90, 365):
        page.press("%d days" % days, "#usage-days")
        page.wait_for_text("Last %d days" % days, "h2")
        page.until("document.querySelectorAll('#chart g').length === %d" % days)
        assert page.js("[...document.querySelectorAll('#usage-days [aria-pressed=true]')]"
                       ".map((element) => element.innerText)") == ["%d days" % days]
    page.press("Download CSV")
    file = tmp_path / "usage-365-days.csv"
    wait_until(lambda: file.exists() and file.stat().st_size)
    head, line = file.read_text().splitlines()
    assert head.startswith("day,requests,") and line.startswith(today + ",1,1,0,10,7,5,3,")


def test_the_usage_of_days_that_are_no_longer_chosen_is_not_shown(
    visit: Visitor, bridge: Start
) -> None:
    running = bridge()
    running.admin.answer("hi")
    page = visit(running, running.admin.token)
    page.open_view("Usage")
    page.until("document.querySelectorAll('#chart g').length === 30")
    page.js(HOLD_FIRST % "days=30")
    page.until("Boolean(release)")
    page.press("7 days", "#usage-days")
    page.until("document.querySelectorAll('#chart g').length === 7")
    first_day = page.text("#chart-start")
    page.js("release(); first.then(() => 1)")
    assert (page.text("#chart-start"), page.text("#usage-title")) == (first_day, "Last 7 days")


def test_a_reached_plan_limit_is_shown_with_its_reset(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    limits = {
        "status": "rejected",
        "rateLimitType": "five_hour",
        "resetsAt": cab.Clock().now() + 7200,
    }
    failure = {"said": "rate_limit", "result": "limit reached", "api_error_status": 429}
    running.admin.ask(script({"limits": limits}, {"fail": failure}))
    # Otherwise the page would fetch the plan again only after 15 s.
    wait_until(lambda: running.admin.get("/api/usage").json["plan"]["waitingFor"])
    page = visit(running, running.admin.token)
    page.wait_for_text("Waiting for the plan limit to reset at", "#plan-notice")
    assert page.js("Date.parse(document.querySelector('#plan-notice time').dateTime) > Date.now()")


# --- Tokens ---


def token_named(running: RunningBridge, name: str) -> Dict[str, Any]:
    tokens = running.admin.get("/api/tokens").json["tokens"]
    return dict(next(token for token in tokens if token["name"] == name))


def test_a_token_is_created_shown_once_and_revoked(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.open_view("Tokens")
    page.write("Name", "robot")
    for label, value in (("Session mode", "stateful"), ("Tools", "web")):
        page.choose(label, value)
    page.write("Expires", "45")
    page.write("Requests per minute", "5")
    page.write("Requests per day", "50")
    page.write("Models", "haiku, sonnet")
    page.press("Create token")
    secret = page.until("document.querySelector('#created-token code')?.innerText")
    robot = token_named(running, "robot")
    expected = {
        "sessionMode": "stateful",
        "tools": "web",
        "requestsPerMinute": 5,
        "requestsPerDay": 50,
        "models": ["haiku", "sonnet"],
        "isAdmin": False,
    }
    assert {name: robot[name] for name in expected} == expected and robot["expiresAt"]
    assert running.admin.with_token(secret).get("/api/requests").status == 200
    page.js("copied = []; navigator.clipboard.writeText = async (text) => { copied.push(text) }; 1")
    page.press("Copy token")
    page.wait_for_text("Copied.", "#toast")
    assert page.js("copied") == [secret]
    page.press("Done")
    assert secret not in page.js("document.documentElement.outerHTML")
    row = ("stateful", "tools: web", "5 per minute", "50 per day", "haiku, sonnet", "expires")
    for text in row:
        page.wait_for_text(text, "#tokens")
    page.press("Revoke robot", "#tokens")
    page.press("Yes, revoke", "#tokens")
    page.wait_for_no_text("robot", "#tokens")
    assert running.admin.with_token(secret).get("/api/requests").status == 401
    page.press("Revoke admin", "#tokens")
    page.press("Yes, revoke", "#tokens")
    page.wait_for_text("last admin token", "#toast")
    # The question is over, and the focus is where it was asked.
    assert "Yes, revoke" not in page.js("document.getElementById('tokens').textContent")
    assert page.js("document.activeElement.getAttribute('aria-label')") == "Revoke admin"


def test_a_token_is_edited_and_rotated(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    old = running.admin.new_token("robot", requestsPerDay=50, expiresInDays=10)
    before = token_named(running, "robot")
    page = visit(running, running.admin.token)
    page.open_view("Tokens")
    page.press("Edit robot", "#tokens")
    page.wait_for_text("Edit robot", "h2")
    page.write("Name", "droid")
    page.write("Requests per minute", "7")
    page.press("Save")
    page.wait_for_text("droid", "#tokens")
    page.wait_for_text("7 per minute", "#tokens")
    after = token_named(running, "droid")
    # The expiry was not touched, so it is not moved.
    assert after == {
        **before, "name": "droid", "requestsPerMinute": 7, "lastUsedAt": after["lastUsedAt"]}
    page.wait_for_text("New token", "h2")
    page.press("Rotate droid", "#tokens")
    page.press("Yes, rotate", "#tokens")
    secret = page.until("document.querySelector('#created-token code')?.innerText")
    assert running.admin.with_token(secret).get("/api/requests").status == 200
    assert old.get("/api/requests").status == 401
    # The secret of a revoked token does not stay.
    page.press("Revoke droid", "#tokens")
    page.press("Yes, revoke", "#tokens")
    page.wait_for_no_text("droid", "#tokens")
    assert secret not in page.js("document.documentElement.outerHTML")


def test_dangerous_rights_are_shown_and_warned_of(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    running.admin.new_token("shell", tools="all")
    running.admin.new_token("plain")
    running.admin.new_token("git", tools=["Read", "Bash(git log:*)"])
    page = visit(running, running.admin.token)
    page.open_view("Tokens")
    page.wait_for_text("plain", "#tokens")
    badges = "[...document.querySelectorAll('#tokens li')].map((li) =>"\
        " [li.querySelector('b').innerText, li.querySelector('.badge')?.innerText || null])"
    assert dict(page.js(badges)) == {
        "shell": "all tools", "plain": None, "admin": "admin", "git": "Bash"}
    assert page.text("#rights-warning") == ""
    page.choose("Tools", "all")
    page.wait_for_text("can run any command", "#rights-warning")
    page.choose("Tools", "read")
    page.wait_for_no_text("can run any command", "#rights-warning")


# --- State ---


def test_the_link_of_start_signs_in_and_leaves_no_token_in_the_address(
    visit: Visitor, bridge: Start
) -> None:
    running = bridge()
    page = visit(running)
    page.navigate("http://127.0.0.1:%d/health" % running.port)
    page.navigate("http://127.0.0.1:%d/dashboard#token=%s" % (running.port, running.admin.token))
    page.wait_for_text("Running now")
    assert page.js("location.href").endswith("/dashboard")
    assert page.js("sessionStorage.getItem('token')") == running.admin.token


def test_the_state_is_in_the_header_and_in_the_title(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.until("document.title === 'idle · claude-api-bridge'")
    page.press("Pause the queue")
    page.refresh()
    page.until("document.title === 'paused · claude-api-bridge'")
    assert page.text("#state") == "paused"
    running.admin.ask("hi")
    page.refresh()
    page.wait_for_text("hi", "#waiting")
    assert page.text("#plan-notice") == "The queue is paused."
    assert "The queue is paused." not in page.text("#waiting")
    page.press("Resume the queue")
    page.until("document.title === 'idle · claude-api-bridge'")


def test_a_long_queue_is_folded(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    running.admin.post("/api/queue/pause")
    for number in range(8):
        running.admin.ask("question %d" % number)
    page = visit(running, running.admin.token)
    shown = "[...document.querySelectorAll('#waiting li')]"\
        ".filter((element) => element.checkVisibility()).length"
    page.until(shown + " === 5")
    page.press("Show 3 more")
    page.until(shown + " === 8")
    page.press("Show fewer")
    page.until(shown + " === 5")


def test_the_focus_stays_in_the_list_after_a_cancel(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    running.admin.post("/api/queue/pause")
    for name in ("first", "second", "third"):
        running.admin.ask(name)
    page = visit(running, running.admin.token)
    page.wait_for_text("third", "#waiting")
    page.press("Cancel: second", "#waiting")
    page.wait_for_text("Cancelled.", "#toast")
    page.until("document.activeElement.getAttribute('aria-label') === 'Cancel: third'")
    # It is no failure.
    page.wait_for_text("cancelled", "#recent")
    assert page.js("document.querySelector('#recent .bad')") is None


# --- Playground ---


def test_the_playground_streams_and_stops(visit: Visitor, bridge: Start, gate: Path) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.open_view("Playground")
    message = script(
        {"delta": "first try"},
        {"message": True},
        {"delta": "Dear "},
        {"wait": str(gate)},
        {"delta": "reader"},
    )
    page.write("Message", message)
    page.write("Model", "haiku")
    page.write("System prompt", "Be kind.")
    page.choose("Effort", "low")
    page.press("Ask", "#ask-form")
    page.until("document.querySelector('#answer').innerText.trim() === 'Dear'")
    gate.touch()
    page.wait_for_text("Dear reader", "#answer")
    page.wait_for_text("done in", "[role=status]")
    page.wait_for_text("resolved-haiku · 10 in · 7 out", "#answer-usage")
    job = running.admin.get("/api/requests").json["requests"][0]
    fields = ("systemPrompt", "effort", "response")
    assert [job[name] for name in fields] == ["Be kind.", "low", "Dear reader"]
    page.write("Message", "hang")
    page.press("Ask", "#ask-form")
    page.wait_for_text("thinking", "#answer")
    page.press("Stop")
    page.wait_for_text("failed: cancelled", "[role=status]")
    page.write("Model", "no such model!")
    page.press("Ask", "#ask-form")
    page.wait_for_text("model", "#ask-status")


def test_the_code_examples_send_the_same_request(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.open_view("Playground")
    message = 'say it\'s "so" $HOME \\n `é`'
    page.write("Message", message)
    page.write("Model", "haiku")
    words = shlex.split(page.text("#code"))
    body = json.loads(words[words.index("-d") + 1])
    assert body == {"message": message, "model": "haiku", "wait": 60} and words[0] == "curl"
    page.press("Python", "#languages")
    page.wait_for_text("import json", "#code")
    python = page.text("#code")
    page.press("JavaScript", "#languages")
    page.wait_for_text("await fetch", "#code")
    javascript = page.text("#code")
    token = str(running.admin.token)
    for code in (" ".join(words), python, javascript):
        assert "cab-..." in code and token not in code
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(python.replace("cab-...", token), {})
    assert output.getvalue() == message[4:] + "\n"
    runnable = javascript.replace("cab-...", token).replace("console.log(", "return (")
    assert page.js("(async () => { %s })()" % runnable) == message[4:]


# --- All views ---


def test_text_of_other_people_is_shown_as_text_everywhere(
    visit: Visitor, bridge: Start, gate: Path
) -> None:
    running = bridge()
    other = running.admin.new_token(EVIL, sessionMode="stateful")
    other.answer("say " + EVIL, systemPrompt=EVIL)
    other.answer("error " + json.dumps({"result": EVIL}))
    other.ask(script({"delta": EVIL}, {"wait": str(gate)}))
    other.ask(EVIL)
    page = visit(running, running.admin.token)
    page.wait_for_text(EVIL[:20], "#running .text")
    for part in ("#running", "#waiting", "#recent"):
        page.wait_for_text(EVIL[:20], part + " .ellipsis")
    for part in ("#waiting", "#recent"):
        page.wait_for_text(EVIL[:20], part + " .meta")
    page.press("✓ completed", "#recent")
    page.press("✕ failed", "#recent")
    page.until(
        "[...document.querySelectorAll('#recent .text')]"
        ".filter((element) => element.innerText.includes('<img')).length >= 5"
    )
    gate.touch()
    page.open_view("Usage")
    page.wait_for_text(EVIL, "#usage-by-token")
    page.open_view("Tokens")
    page.wait_for_text(EVIL, "#tokens")
    page.write("Name", EVIL)
    page.press("Create token")
    page.wait_for_text(EVIL, "#created-token")
    page.open_view("Playground")
    page.write("Message", "say " + EVIL)
    page.press("Ask", "#ask-form")
    page.wait_for_text(EVIL, "#answer")
    page.wait_for_text("img", "#code")
    assert page.js("document.querySelectorAll('img').length") == 0


def fill_all_views(running: RunningBridge, gate: Path) -> None:
    """Put something into every part of the page, with very long words."""
    user = running.admin.new_token("W" * 100, sessionMode="stateful")
    user.answer("say " + "x" * 400)
    user.answer("die 3 " + "y" * 400)
    limits = {
        "status": "allowed_warning",
        "rateLimitType": "seven_day",
        "utilization": 0.9,
        "resetsAt": cab.Clock().now() + 999999,
    }
    running.admin.answer(script({"limits": limits}, {"result": "z" * 400}))
    running.admin.ask(script({"delta": "v" * 600}, {"wait": str(gate)}))
    user.ask("u" * 400)


def test_a_narrow_screen_needs_no_horizontal_scrolling(
    visit: Visitor, bridge: Start, gate: Path
) -> None:
    running = bridge(public_url="https://%s.example.com" % ("a-long-name-" * 8))
    fill_all_views(running, gate)
    page = visit(running, width=390)
    page.wait_for_text("working", "[role=status]")
    fits = "document.documentElement.scrollWidth <= innerWidth && innerWidth <= 390"
    assert page.js(fits)
    page.sign_in(running.admin.token)
    page.wait_for_text("v" * 600, "#running")
    page.press("✓ completed", "#recent")
    page.press("✕ failed", "#recent")
    for view in VIEWS:
        page.open_view(view)
        assert page.js("document.querySelectorAll('[data-view]:not([hidden]) h2').length") > 0
        assert page.js(fits), view
    page.open_view("Tokens")
    page.press("Revoke W", "#tokens")
    page.write("Name", "n" * 60)
    page.press("Create token")
    page.wait_for_text("cab-", "#created-token")
    assert page.js(fits)
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    page.call("Emulation.setEmulatedMedia", features=[dark])
    for view in VIEWS:
        page.open_view(view)
        assert page.js(fits), view


@pytest.mark.parametrize("width", [320, 390])
def test_numbers_in_tables_never_break_on_a_narrow_screen(
    visit: Visitor, bridge: Start, width: int
) -> None:
    """Beside a long token name a column of numbers would get the width of one digit."""
    running = bridge()
    user = running.admin.new_token("W" * 100)
    user.answer("hi")
    page = visit(running, running.admin.token, width=width)
    page.open_view("Usage")
    page.wait_for_text("WWW", "#usage-by-token")
    assert page.js("document.documentElement.scrollWidth <= innerWidth && innerWidth") == width
    line_counts = page.js(
        "[...document.querySelectorAll('[data-view=\"#/usage\"] :is(td, thead th)')]"
        ".filter((cell) => cell.checkVisibility()).map((cell) => {"
        " const range = document.createRange(); range.selectNodeContents(cell);"
        " return range.getClientRects().length })"
    )
    assert len(line_counts) >= 7 and set(line_counts) == {1}


USED_ROLES = {
    "button",
    "link",
    "textbox",
    "searchbox",
    "combobox",
    "checkbox",
    "spinbutton",
    "progressbar",
    "region",
}


def test_every_control_has_a_name_for_screen_readers(
    visit: Visitor, bridge: Start, gate: Path
) -> None:
    running = bridge(public_url="https://bridge.example.com")
    fill_all_views(running, gate)
    page = visit(running)
    seen_roles = set()

    def check_names_and_ids() -> None:
        for node in page.call("Accessibility.getFullAXTree")["nodes"]:
            role = node.get("role", {}).get("value")
            is_named = role in USED_ROLES | {"DisclosureTriangle", "img"}
            if is_named and not node.get("ignored"):
                assert node.get("name", {}).get("value", "").strip(), node
                seen_roles.add(role)
        ids = page.js("[...document.querySelectorAll('[id]')].map((element) => element.id)")
        assert len(ids) == len(set(ids))
        assert page.js("document.querySelectorAll('[data-view]:not([hidden]) h2').length") >= 1

    check_names_and_ids()
    page.sign_in(running.admin.token)
    page.wait_for_text("v" * 600, "#running")
    page.wait_for_text("90 % used", "#plan-limits")
    page.press("✓ completed", "#recent")
    for view in VIEWS:
        page.open_view(view)
        check_names_and_ids()
        assert page.js("document.querySelectorAll('[aria-current]').length") == 1
        assert page.js(CURRENT_LINK + ".innerText") == view
        if view != "Requests":
            assert page.js("document.activeElement.tagName") in ("H2", "A")
    assert seen_roles >= USED_ROLES


def test_the_page_shows_its_last_update_and_that_the_bridge_is_gone(
    visit: Visitor, bridge: Start
) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.wait_for_text("updated ", "#last-update")
    running.bridge.__exit__(None, None, None)
    page.js("pollOnce(); 1")
    page.wait_for_text("not reachable, last update: ", "[role=status]")


def test_the_page_fetches_little_while_nothing_happens(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.wait_for_text("2.1.330", "#bridge-facts")
    page.js("sent = []; realFetch = fetch; 1")
    page.js("fetch = (path, options) => { sent.push(path); return realFetch(path, options) }; 1")
    for _ in range(3):
        page.js("pollOnce()")
    # The lists are fetched only when the counters change.
    assert page.js("sent.filter((path) => path !== '/api/status')") == []
    page.js("Object.defineProperty(document, 'hidden', { value: true, configurable: true }); 1")
    page.js("sent = []; 1")
    page.js("pollOnce()")
    # A hidden page fetches nothing.
    assert page.js("sent.length") == 0
    running.admin.answer("say news")
    page.js("delete document.hidden; 1")
    page.js("document.dispatchEvent(new Event('visibilitychange')); 1")
    page.wait_for_text("say news", "#recent")


def test_an_older_response_never_overwrites_a_newer_one(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.open_view("Tokens")
    page.js(HOLD_FIRST % "limit=100")
    # The first update has its list of tokens now, but has not shown it.
    page.until("Boolean(release)")
    running.admin.new_token("late")
    page.js("lastFetch.at = lastFetch.allAt = 0; second = pollOnce(); 1")
    page.js("new Promise((resolve) => setTimeout(resolve, 200)).then(() => 1)")
    page.js("release(); Promise.all([first, second]).then(() => 1)")
    assert "late" in page.text("#tokens")


def test_a_response_for_the_previous_filter_is_not_shown(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    for prompt in ("say fine", "die 3 broke", "say good"):
        running.admin.answer(prompt)
    page = visit(running, running.admin.token)
    page.js(HOLD_FIRST % "limit=20&")
    page.until("Boolean(release)")
    page.choose("Status", "Failed")
    page.until("document.querySelectorAll('#recent li').length === 1")
    page.js("release(); first.then(() => 1)")
    assert page.js("document.querySelectorAll('#recent li').length") == 1


def test_a_first_run_shows_how_to_begin_until_a_request_arrives(
    visit: Visitor, bridge: Start
) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.wait_for_text("First steps", "#first-run")
    assert "cab-..." in page.text("#first-code")
    page.press("Create the token my-app")
    page.until("document.activeElement.id === 'copy-first'")
    code = page.text("#first-code")
    secret = re.findall(r"cab-[0-9a-f]{64}", code)[0]
    page.refresh()
    done = subprocess.run(
        shlex.split(code), stdout=subprocess.PIPE, timeout=30, env={"PATH": os.environ["PATH"]})
    assert json.loads(done.stdout)["response"] == "Echo: Why is the sky blue?"
    page.wait_for_text("Why is the sky blue?", "#recent")
    page.wait_for_no_text("First steps", "#first-run")
    assert running.admin.with_token(secret).get("/api/requests").status == 200


def test_who_has_tokens_or_requests_sees_no_first_steps(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    user = running.admin.new_token("app")
    for token in (running.admin.token, user.token):
        page = visit(running, token)
        page.wait_for_text("No requests yet.")
        assert not page.js("document.querySelector('#first-run').checkVisibility()")


MARKDOWN = """# Rivers

The **Nile** and `x < 1`, [a link](https://a.example/b) and <b>no markup</b>.

1. one
2. two

| a | b |
|---|---|
| 1 | 2 |

```python
print("hi")
```
"""


def test_an_answer_is_rendered_and_can_be_seen_raw(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    running.admin.answer(script({"delta": MARKDOWN}))
    page = visit(running, running.admin.token)
    page.js("document.querySelector('#recent summary').click(); 1")
    answer = "document.querySelector('#recent [aria-label=Answer]')"
    page.until("Boolean(%s)" % answer)
    tags = "[...%s.querySelectorAll('*')].map((element) => element.tagName.toLowerCase())" % answer
    found = page.js(tags)
    for tag in ("h4", "strong", "code", "a", "ol", "li", "table", "th", "td", "pre"):
        assert tag in found, tag
    assert "b" not in found and "<b>no markup</b>" in page.js(answer + ".textContent")
    link = answer + ".querySelector('a')"
    assert page.js(link + ".href") == "https://a.example/b"
    assert page.js(link + ".rel") == "noopener noreferrer"
    # The reader sees where it leads.
    assert "a link (https://a.example/b)" in page.js(answer + ".textContent")
    page.js("copied = []; navigator.clipboard.writeText = async (text) => { copied.push(text) }; 1")
    page.press("Copy the code")
    page.until("copied.length")
    assert page.js("copied") == ['print("hi")']
    page.press("Raw", "#recent")
    page.until("%s.textContent === %s" % (answer, json.dumps(MARKDOWN)))
    page.press("Raw", "#recent")
    page.until("Boolean(%s.querySelector('h4'))" % answer)


def test_the_playground_renders_while_the_answer_grows(
    visit: Visitor, bridge: Start, gate: Path
) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.open_view("Playground")
    first = {"delta": "# One\n\nfirst **bold**\n\n"}
    page.write("Message", script(first, {"wait": str(gate)}, {"delta": "second"}))
    page.press("Ask")
    page.until("Boolean(document.querySelector('#answer strong'))")
    page.js("paragraph = document.querySelector('#answer p'); 1")
    gate.touch()
    page.wait_for_text("second", "#answer")
    # What is complete stays the same element.
    assert page.js("paragraph.isConnected")
    page.press("Raw", "#answer-section")
    page.wait_for_text("first **bold**", "#answer")


def test_a_conversation_goes_on_in_the_playground(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    user = running.admin.new_token("user", sessionMode="stateful")
    user.done(user.ask("hello", conversation="talk"))
    page = visit(running, user.token)
    page.press("Continue talk", "#conversations")
    page.wait_for_text('"conversation":"talk"', "#code")
    page.write("Message", "and on")
    page.press("Ask")
    page.wait_for_text("Echo: and on", "#answer")
    newest = user.get("/api/requests").json["requests"][0]
    assert (newest["message"], newest["conversation"]) == ("and on", "talk")


def test_the_playground_sends_a_schema_and_refuses_what_is_not_json(
    visit: Visitor, bridge: Start
) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.open_view("Playground")
    page.write("Message", "a river")
    page.write("JSON Schema", '{"type": "object", "properties"')
    page.press("Ask")
    page.wait_for_text("The JSON Schema is not JSON", "#toast")
    schema = {"type": "object", "properties": {"answer": {"type": "string"}}}
    page.write("JSON Schema", json.dumps(schema))
    page.wait_for_text('"jsonSchema":{"type":"object"', "#code")
    page.press("Ask")
    page.wait_for_text("done in", "#ask-status")
    newest = running.admin.get("/api/requests").json["requests"][0]
    assert newest["jsonSchema"] == schema and newest["structured"]


def test_a_conversation_opens_into_its_turns(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    user = running.admin.new_token("user", sessionMode="stateful")
    for number in range(23):
        user.answer("say number %02d" % number, conversation="talk")
    user.answer("say of another", conversation="other")
    page = visit(running, user.token)
    page.press("talk", "#conversations")
    prompts = (
        "[...document.querySelectorAll('#turns-talk [aria-label=Prompt]')]"
        ".map((element) => element.innerText.slice(-2))"
    )
    numbers = ["%02d" % number for number in range(24)]
    page.until("%s.length === 20" % prompts)
    assert page.js(prompts) == numbers[3:23]
    page.press("Earlier turns", "#conversations")
    page.until("%s.length === 23" % prompts)
    assert page.js(prompts) == numbers[:23]
    # The button is gone, and the focus is at the conversation.
    assert "Earlier turns" not in page.text("#conversations")
    assert page.js("document.activeElement.innerText").startswith("talk")
    # A new turn appears at the end, and what was open stays open.
    user.answer("say **number** 23", conversation="talk")
    page.refresh()
    page.until("%s.length === 24" % prompts)
    assert page.js(prompts) == numbers
    last = "document.querySelector('#turns-talk > :last-child [aria-label=Answer]')"
    assert page.js(last + ".querySelector('strong').textContent") == "number"
    assert "of another" not in page.text("#turns-talk")


# Make files as a browser gives them to a page: PNG images of one colour, and one that is noise.
MAKE_FILES = """makeFile = async (name, width, height, isNoise, color = 'teal') => {
    const canvas = new OffscreenCanvas(width, height);
    const context = canvas.getContext('2d');
    context.fillStyle = color;
    context.fillRect(0, 0, width, height);
    if (isNoise) {
        const image = context.createImageData(width, height);
        for (let at = 0; at < image.data.length; at++) image.data[at] = Math.random() * 256;
        context.putImageData(image, 0, 0);
    }
    return new File([await canvas.convertToBlob()], name, { type: 'image/png' });
};
send = (event, name, files) => {
    const data = new DataTransfer();
    for (const file of files) data.items.add(file);
    document.querySelector('[name=message]').dispatchEvent(new event(
        name, { [name === 'paste' ? 'clipboardData' : 'dataTransfer']: data, bubbles: true }));
}; 1"""


def decoded_images(body: Dict[str, Any]) -> List[Any]:
    """Return (name, mediaType, first bytes) of each attachment."""
    return [
        (image["name"], image["mediaType"], base64.b64decode(image["data"])[:4])
        for image in body["attachments"]
    ]


def test_images_are_dropped_pasted_and_removed(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.open_view("Playground")
    page.js(MAKE_FILES)
    page.js("makeFile('small.png', 60, 40).then((file) => send(DragEvent, 'drop', [file]))")
    page.wait_for_text("small.png", "#images")
    page.wait_for_text("1 kB", "#images")
    page.js("Promise.all([makeFile('huge.png', 3000, 900, false, '#fff0'),"
            " makeFile('gone.png', 9, 9)]).then((files) => send(ClipboardEvent, 'paste', files))")
    page.wait_for_text("gone.png", "#images")
    page.press("Remove gone.png", "#images")
    page.wait_for_no_text("gone.png", "#images")
    assert page.js("document.activeElement.id") == "add-images"
    # The code shows where the data goes.
    page.write("Message", "what is this?")
    page.wait_for_text("in base64, where BASE64 stands")
    words = shlex.split(page.text("#code"))
    shown = json.loads(words[words.index("-d") + 1])["attachments"]
    assert [image["data"] for image in shown] == ["BASE64", "BASE64"]
    page.js("bodies = []; realFetch = fetch; fetch = (path, options) => {"
            " if (options.body) bodies.push(options.body); return realFetch(path, options) }; 1")
    page.press("Ask", "#ask-form")
    page.wait_for_text("done in", "#ask-status")
    body = json.loads(page.js("bodies[0]"))
    assert decoded_images(body) == [
        ("small.png", "image/png", b"\x89PNG"), ("huge.png", "image/jpeg", b"\xff\xd8\xff\xe0")]
    page.js("""show = async (data) => {
        const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt());
        const bitmap = await createImageBitmap(new Blob([bytes]));
        const context = new OffscreenCanvas(1, 1).getContext('2d');
        context.drawImage(bitmap, 0, 0);
        return [bitmap.width, bitmap.height, ...context.getImageData(0, 0, 1, 1).data];
    }; 1""")
    # What was transparent is white and not black.
    shown = page.js("show(%s)" % json.dumps(body["attachments"][1]["data"]))
    assert shown == [1568, 471, 255, 255, 255, 255]


def test_images_that_do_not_fit_are_made_smaller_or_refused(
    visit: Visitor, bridge: Start, tmp_path: Path
) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.open_view("Playground")
    page.js(MAKE_FILES)
    page.js("makeFile('noise.png', 1500, 1500, true).then((file) =>"
            " send(DragEvent, 'drop', [file, file, file, file, file, file, file]))")
    page.wait_for_text("is too large: all images together may have 675 kB", "#toast")
    size = page.js("images.reduce((sum, { data }) => sum + data.length, 0)")
    assert 0 < size <= 900_000 and "noise.png" in page.text("#images")
    (tmp_path / "text.png").write_text("no image")
    document = page.call("DOM.getDocument")["root"]["nodeId"]
    field = page.call("DOM.querySelector", nodeId=document, selector="#image-files")["nodeId"]
    page.call("DOM.setFileInputFiles", nodeId=field, files=[str(tmp_path / "text.png")])
    page.wait_for_text("text.png is not an image that this browser can read", "#toast")
    assert "text.png" not in page.text("#images")


def test_keys_move_the_focus_and_switch_the_views(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    for number in range(3):
        running.admin.answer("say number %d" % number)
    page = visit(running, running.admin.token)
    focused = "document.activeElement.innerText"
    for key, number in (("j", 2), ("j", 1), ("j", 0), ("j", 0), ("k", 1)):
        page.key(key, 0, key)
        assert "number %d" % number in page.js(focused)
    page.key("3", 0, "3")
    page.wait_for_text("Last 30 days", "h2")
    page.key("/", 0, "/")
    page.until("document.activeElement.id === 'search'")
    # While something is written, and with a modifier, a key is only a letter.
    for letter in "j3?":
        page.key(letter, 0, letter)
    page.until("document.querySelector('#search').value === 'j3?'")
    assert page.js("location.hash").startswith("#/requests")
    page.js("document.activeElement.blur(); 1")
    page.js("document.body.dispatchEvent(new KeyboardEvent("
            "'keydown', { key: '3', ctrlKey: true, bubbles: true })); 1")
    assert page.js("location.hash").startswith("#/requests")
    page.key("?", 0, "?")
    page.wait_for_text("Next and previous request", "dialog")
    page.key("3", 0, "3")
    page.key("Escape", 27)
    page.wait_for_no_text("Next and previous request", "dialog")
    assert page.js("location.hash").startswith("#/requests")


def test_the_shortcuts_can_be_turned_off(visit: Visitor, bridge: Start) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.press("Keyboard shortcuts")
    page.js("document.querySelector('#use-shortcuts').click(); 1")
    page.press("Close", "dialog")
    page.js("isOld = true; location.reload(); 1")
    page.until("!('isOld' in window)")
    page.wait_for_text("Running now")
    try:
        assert page.js("document.querySelector('#use-shortcuts').checked") is False
        page.key("3", 0, "3")
        page.key("?", 0, "?")
        assert page.js("location.hash") in ("", "#/requests")
        assert not page.js("document.querySelector('dialog').open")
    finally:
        page.js("localStorage.clear(); 1")


# --- Accessibility ---

AXE_RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice")


@pytest.fixture(scope="session")
def axe() -> str:
    """Return the text of axe-core, whose axe.min.js $CAB_TEST_AXE names."""
    path = Path(os.environ.get("CAB_TEST_AXE") or "nowhere")
    if not path.is_file():
        missing("no axe-core here: CAB_TEST_AXE names its axe.min.js")
    return path.read_text("utf-8")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_axe_finds_nothing_in_any_state(
    visit: Visitor, bridge: Start, gate: Path, axe: str, theme: str, width: int
) -> None:
    running = bridge()
    violations = {}

    def check(page: Visit, state: str) -> None:
        found = page.js(
            "axe.run(document, {runOnly: %s}).then((result) => result.violations.map((rule) =>"
            " rule.id + ': ' + rule.nodes.map((node) => node.html.slice(0, 120)).join(' | ')))"
            % json.dumps(AXE_RULES))  # fmt: skip
        if found:
            violations[state] = found

    def opened(token: Any = None) -> Visit:
        page = visit(running, token, width=width)
        scheme = {"name": "prefers-color-scheme", "value": theme}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.js(axe + "; 1")
        return page

    check(opened(), "anonymous")
    page = opened(running.admin.token)
    page.wait_for_text("First steps")
    check(page, "first run")
    running.admin.new_token("shell", tools="all", expiresInDays=3)
    running.admin.new_token("spare")
    user = running.admin.new_token("user", sessionMode="stateful")
    running.admin.answer(script({"delta": MARKDOWN}))
    running.admin.answer("die 1")
    running.admin.done(user.ask("hello", conversation="talk"))
    running.admin.ask("hold %s" % gate)
    for number in range(7):
        running.admin.ask("question %d" % number)
    running.admin.delete("/api/ask/" + running.admin.ask("cancel me"))
    page.refresh()
    page.wait_for_text("question 4", "#waiting")
    page.wait_for_text("cancel me", "#recent")
    page.js("for (const summary of document.querySelectorAll('#recent summary')) summary.click()")
    page.until("Boolean(document.querySelector('#recent h4'))")
    check(page, "busy")
    for view in ("Playground", "Usage", "Tokens", "API"):
        page.open_view(view)
        if view == "API":
            page.wait_for_text("/api/ask", "#endpoints")
        if view == "Playground":
            page.js(MAKE_FILES)
            page.js("makeFile('a.png', 9, 9).then((file) => send(DragEvent, 'drop', [file]))")
            page.wait_for_text("a.png", "#images")
        if view == "Tokens":
            page.wait_for_text("shell", "#tokens")
            page.choose("Tools", "all")
            page.press("Revoke shell", "#tokens")
            page.press("Rotate spare", "#tokens")
            page.press("Yes, rotate", "#tokens")
            page.until("Boolean(document.querySelector('#created-token code'))")
        check(page, view)
    page.open_view("Requests")
    page.choose("Status", "Failed")
    page.wait_for_text("2 requests", "#match-count")
    page.press("Keyboard shortcuts")
    check(page, "filters and shortcuts")
    page.press("Close", "dialog")
    completed = running.admin.get("/api/requests?status=completed").json["requests"]
    request_id = completed[0]["requestId"]
    page.js("location.hash = '#/requests/%s'; 1" % request_id)
    page.wait_for_text("Copy link", "#linked")
    check(page, "one request")
    page.js("location.hash = '#/requests/none'; 1")
    page.wait_for_text("There is no request", "#linked")
    check(page, "no request")
    page.press("All requests")
    running.admin.post("/api/queue/pause")
    page.refresh()
    page.wait_for_text("paused", "#state")
    check(page, "paused")
    page = opened(user.token)
    page.press("talk", "#conversations")
    page.wait_for_text("Echo: hello", "#turns-talk")
    check(page, "user")
    page.js("fetch = () => Promise.reject(new Error('gone')); refreshNow(); 1")
    page.wait_for_text("not reachable", "#state")
    check(page, "unreachable")
    assert violations == {}
