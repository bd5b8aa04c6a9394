"""The page in a real browser: what a person, or a screen reader, finds on it, and what nobody may put into it."""
from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import pytest

import claude_api_bridge as cab
from browser import Browser, Page
from conftest import RunningBridge, wait_until

pytestmark = pytest.mark.browser

Start = Callable[..., RunningBridge]
VIEWS = ("Requests", "Playground", "Usage", "Tokens", "API")
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests here, from before the first one on."""
    started = Browser(tmp_path_factory.mktemp("browser"))
    yield started
    started.close()


class Visit(Page):
    """The page of a bridge, opened by somebody."""

    def sign_in(self, token: Any) -> None:
        self.write("Token", str(token))
        self.press("Sign in")

    def hasten(self) -> None:
        """From now on what the page does after some seconds it does after a tenth of them, and its clock goes as fast."""
        self.js("""((wait, now, since) => {
            setTimeout = (what, after, ...more) => wait(what, after / 10, ...more);
            Date.now = () => since + (now() - since) * 10 })(setTimeout, Date.now, Date.now()); hurry(); 1""")

    def look(self) -> None:
        """Lets the page look now, not some seconds later."""
        self.js("hurry(); 1")

    def view(self, name: str) -> None:
        """Goes to a view, and waits until the page has moved the focus there: it would take it from what is done next."""
        current = "document.querySelector('nav [aria-current]')"
        is_there = self.js("%s.innerText === %s && %s.hash === location.hash" % (current, json.dumps(name), current))
        self.press(name, "nav")
        self.until("%s.innerText === %s" % (current, json.dumps(name)))
        if not is_there:
            self.until("document.activeElement.matches('[data-view] h2')")


@pytest.fixture
def visit(browser: Browser, bridge: Start) -> Iterator[Callable[..., Visit]]:
    """visit(running, token=...) -> its page, signed in where a token is given. At the end nobody has complained."""
    opened: List[Visit] = []

    def visit(running: RunningBridge, token: Any = None, **options: Any) -> Visit:
        opened.append(Visit(browser, "http://127.0.0.1:%d/" % running.port, **options))
        if token:
            opened[-1].sign_in(token)
            opened[-1].sees("Running now")
            opened[-1].until("seen.figures")                                     # the first lists are there, and come no more
        return opened[-1]

    yield visit
    complaints = [complaint for page in opened for complaint in page.complaints]
    for page in opened:
        page.close()
    assert not complaints


def script(*steps: Dict[str, Any]) -> str:
    """A prompt that makes the fake claude do this."""
    return "script " + json.dumps(steps)


def test_the_browser_notes_what_the_policy_stops_and_what_a_page_logs(visit: Callable[..., Visit], bridge: Start) -> None:
    page = visit(bridge())
    page.js("document.body.setAttribute('style', 'color: red'); console.error('oh'); setTimeout(() => { throw new Error('thrown') }); 1")
    wait_until(lambda: page.js("1") and len(page.complaints) >= 3)              # or nothing here could fail
    for word in ("Content Security Policy", "oh", "thrown"):
        assert any(word in complaint for complaint in page.complaints)
    page.complaints.clear()


# --- Who comes ---


def test_without_a_token_there_are_counters_the_api_and_a_way_in(visit: Callable[..., Visit], bridge: Start) -> None:
    running = bridge()
    running.admin.answer("secret words")
    page = visit(running)
    page.sees("ready", "[role=status]")
    shown = page.js("Object.fromEntries(['queued', 'processing', 'completed', 'failed', 'requests', 'tokens'].map("
                    "(id) => [id, document.getElementById(id).innerText]))")
    assert shown == {"queued": "0", "processing": "0", "completed": "1", "failed": "0", "requests": "1", "tokens": "1"}
    text = page.text()
    assert "token create" in text and "start printed the admin token" in text
    assert "secret words" not in text and "Sign out" not in text and page.text("nav").split() == ["Requests", "API"]
    page.view("API")
    for route in cab.ROUTES:
        page.sees("%s %s" % (route.method, route.path), "#endpoints")


def test_a_wrong_token_is_told_so_and_a_right_one_lasts_as_long_as_the_tab(visit: Callable[..., Visit], bridge: Start) -> None:
    running = bridge()
    page = visit(running)
    page.sign_in("cab-" + "0" * 64)
    page.sees("Invalid or expired token", "[role=alert]")
    assert page.js("sessionStorage.length") == 0
    page.sign_in(running.admin.token)
    page.sees("Running now")
    assert page.text("nav").split() == list(VIEWS) and page.text("#enter") == ""
    assert page.js("[sessionStorage.token, localStorage.length, document.cookie, location.href.includes('cab-')]") == [
        running.admin.token, 0, "", False]
    page.js("isOld = true; location.reload(); 1")
    page.until("!('isOld' in window)")
    page.sees("Sign out")
    page.press("Sign out")
    page.sees("Signed out.", "[role=alert]")
    assert page.js("sessionStorage.length") == 0 and "Running now" not in page.text()
    assert str(running.admin.token) not in page.js("document.documentElement.outerHTML")


def test_a_token_that_is_revoked_ends_the_visit(visit: Callable[..., Visit], bridge: Start) -> None:
    running = bridge()
    admin = running.admin
    made = admin.post("/api/tokens", {"name": "short"}).json
    page = visit(running, made["token"])
    admin.delete("/api/tokens/" + made["tokenId"])
    page.look()
    page.sees("You were signed out.", "[role=alert]")


def test_an_ordinary_token_sees_its_own_part(visit: Callable[..., Visit], bridge: Start) -> None:
    running = bridge()
    mine, other = running.admin.new_token("mine"), running.admin.new_token("other")
    other.answer("say not for you")
    mine.answer("say all mine")
    page = visit(running, mine.token)
    page.sees("say all mine", "#recent")
    assert page.text("nav").split() == ["Requests", "Playground", "Usage", "API"]
    page.view("Usage")
    page.sees("1", "#totals")
    html = page.js("document.documentElement.outerHTML")
    assert "not for you" not in html and "other" not in page.text() and "2.1.330" not in html and "Bridge" not in page.text()


# --- Requests ---


def test_an_answer_is_read_while_it_is_written(visit: Callable[..., Visit], bridge: Start, tmp_path: Path) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.hasten()
    gates = [tmp_path / "one", tmp_path / "two"]
    running.admin.ask(script({"delta": "Once upon"}, {"wait": str(gates[0])}, {"delta": " a time"}, {"wait": str(gates[1])}))
    page.look()
    page.sees("Once upon", "#running")
    page.sees("resolved-default-model · admin", "#running")
    page.js("document.querySelector('#running li').marked = true")
    gates[0].touch()
    page.sees("Once upon a time", "#running .text")
    assert page.js("document.querySelector('#running li').marked")               # the same element: focus and selection stay
    gates[1].touch()
    page.sees("Nothing runs.")
    page.press("✓ completed", "#recent")
    page.sees("Once upon a time", "#recent")
    for word in ("waited ", "ran ", "10 in", "7 out", "5 from cache", "3 to cache", "about $0.0010"):
        page.sees(word, "#recent")
    assert page.js("[...document.querySelectorAll('#recent time')].every((each) => !isNaN(Date.parse(each.dateTime)))")


def test_where_streams_do_not_come_through_the_page_polls(visit: Callable[..., Visit], bridge: Start, gate: Path) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.hasten()
    page.js("events = async function* () {}; 1")
    running.admin.ask(script({"delta": "slowly but"}, {"wait": str(gate)}, {"delta": " surely"}))
    page.look()
    page.sees("slowly but", "#running")
    page.view("Playground")
    page.write("Message", "say asked without a stream")
    page.press("Ask", "#ask")
    page.sees("waits, position 1")
    gate.touch()
    page.sees("asked without a stream", "#answer")
    page.sees("done after")


def test_a_stream_that_was_cut_off_goes_on_where_it_stopped(visit: Callable[..., Visit], bridge: Start, tmp_path: Path) -> None:
    running, gates = bridge(), [tmp_path / "one", tmp_path / "two"]
    page = visit(running, running.admin.token)
    page.hasten()
    page.js("""whole = events; paths = []; events = async function* (path, ...more) { paths.push(path);
        for await (const event of whole(path, ...more)) { yield event; if (event.kind === "delta") return } }; 1""")
    page.view("Playground")
    page.write("Message", script({"delta": "a😀"}, {"wait": str(gates[0])}, {"delta": "b"}, {"wait": str(gates[1])}, {"delta": "c"}))
    page.press("Ask", "#ask")
    page.sees("a😀", "#answer")
    page.until("paths.some((path) => path.endsWith('events?after=2'))")           # code points
    gates[0].touch()
    page.until("document.querySelector('#answer').textContent === 'a😀b'")
    page.until("paths.some((path) => path.endsWith('events?after=3'))")
    assert page.js("document.querySelector('#answer').textContent") == "a😀b"
    gates[1].touch()
    page.sees("done after")
    assert page.text("#answer") == "a😀bc"
    assert len(running.admin.get("/api/requests").json["requests"]) == 1


def test_running_and_waiting_requests_are_cancelled(visit: Callable[..., Visit], bridge: Start, gate: Path) -> None:
    running = bridge()
    first = running.admin.ask("hold %s" % gate)
    waiting = [running.admin.ask("number %d" % n) for n in (1, 2)]
    page = visit(running, running.admin.token)
    page.sees("he", "#running .text")
    page.until("[...document.querySelectorAll('#waiting .begin')].map((each) => each.innerText).join() === 'number 1,number 2'")
    page.press("Cancel: number 1", "#waiting")
    page.lacks("number 1", "#waiting")
    assert running.admin.done(waiting[0])["errorCode"] == "cancelled"
    page.press("Cancel", "#running")
    assert running.admin.done(first)["errorCode"] == "cancelled"
    assert running.admin.done(waiting[1])["status"] == "completed"
    page.sees("cancelled", "#recent")


def test_recent_requests_are_filtered_searched_and_loaded_on(visit: Callable[..., Visit], bridge: Start) -> None:
    running = bridge()
    for n in range(23):
        running.admin.answer("die 3 broke %02d" % n if n == 20 else "say number %02d" % n)
    page = visit(running, running.admin.token)
    rows = "[...document.querySelectorAll('#recent li')].length"
    page.until(rows + " === 20")
    page.press("More")
    page.until(rows + " === 23")
    running.admin.answer("say one more")
    page.look()
    page.until(rows + " === 24")                                                 # what was loaded stays
    page.write("Search", "NUMBER 0")
    page.until(rows + " === 10")
    page.sees("10 of 24 loaded", "[role=status]")
    page.write("Search", "")
    page.press("Failed")
    page.until(rows + " === 1")
    page.press("✕ failed", "#recent")
    page.sees("Error: cli_error", "#recent")
    page.press("All")
    page.until(rows + " === 20")


def test_a_request_is_asked_again_with_all_that_was_asked(visit: Callable[..., Visit], bridge: Start) -> None:
    running = bridge()
    mine = running.admin.new_token("mine", sessionMode="stateful")
    asked = {"systemPrompt": "Be brief.", "effort": "low", "conversation": "trip", "jsonSchema": {"type": "object"}}
    mine.answer("hello", **asked)
    page = visit(running, mine.token)
    page.press("✓ completed", "#recent")
    page.press("Ask again")
    again = wait_until(lambda: mine.get("/api/requests?status=completed").json["requests"][:-1])[0]
    assert {name: again[name] for name in asked} == asked and again["message"] == "hello"
    page.look()
    page.sees("2 turns", "#conversations")                                       # from now on nothing changes there
    page.press("Delete trip", "#conversations")
    page.press("Keep", "#conversations")
    page.press("Delete trip", "#conversations")
    page.press("Yes, delete", "#conversations")
    page.lacks("trip", "#conversations")
    assert mine.get("/api/conversations").json["conversations"] == []


def test_what_came_over_the_other_formats_cannot_be_asked_again(visit: Callable[..., Visit], bridge: Start) -> None:
    running = bridge()
    body = {"model": "haiku", "max_tokens": 9, "messages": [{"role": "user", "content": "say hello"}]}
    assert running.admin.post("/v1/messages", body).status == 200
    page = visit(running, running.admin.token)
    page.sees("/v1", "#recent")
    page.press("✓ completed", "#recent")
    page.sees("Copy answer", "#recent")
    assert "Ask again" not in page.text("#recent")


# --- The bridge, the plan, usage ---


def test_an_admin_sees_the_bridge_its_plan_and_what_was_used(visit: Callable[..., Visit], bridge: Start) -> None:
    running = bridge(public_url="https://bridge.example.com")
    soon = cab.Clock().now() + 7200
    limits = {"status": "allowed_warning", "rateLimitType": "five_hour", "utilization": 0.62, "resetsAt": soon}
    running.admin.answer(script({"limits": limits}, {"result": "hi"}))
    page = visit(running, running.admin.token)
    for words in ("https://bridge.example.com", "2.1.330", "Claude Max subscription"):
        page.sees(words, "#facts")
    page.sees("62 % used", "#windows")
    assert page.js("document.querySelector('#windows progress').value") == 0.62
    page.sees("resets ", "#windows")
    page.view("Usage")
    page.until("document.querySelectorAll('#chart g').length === 30")
    today = page.js("document.querySelector('#chart g:last-child').textContent")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d · 25 tokens · 1 requests · about \$0.0010", today)
    page.press("Day by day")
    page.sees("$0.0010", "#days")
    page.sees("admin", "#shares")


def test_a_rest_is_told_with_its_end(visit: Callable[..., Visit], bridge: Start) -> None:
    running = bridge()
    limits = {"status": "rejected", "rateLimitType": "five_hour", "resetsAt": cab.Clock().now() + 7200}
    running.admin.ask(script({"limits": limits}, {"fail": {"said": "rate_limit", "result": "limit reached", "api_error_status": 429}}))
    wait_until(lambda: running.admin.get("/api/usage").json["plan"]["waitingFor"])        # the page would ask again after 15 s only
    page = visit(running, running.admin.token)
    page.sees("Resting until", "#rest")
    page.sees("Waits for the plan's limit until", "#waiting")
    assert page.js("Date.parse(document.querySelector('#waiting time').dateTime) > Date.now()")


# --- Tokens ---


def test_a_token_is_made_shown_once_and_revoked(visit: Callable[..., Visit], bridge: Start) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.view("Tokens")
    page.write("Name", "robot")
    for label, value in (("Memory", "stateful"), ("Tools", "web"), ("Expires", "7")):
        page.choose(label, value)
    page.write("Requests a minute", "5")
    page.write("Requests a day", "50")
    page.write("Models", "haiku, sonnet")
    page.press("Create token")
    secret = page.until("document.querySelector('#made code')?.innerText")
    made = next(each for each in running.admin.get("/api/tokens").json["tokens"] if each["name"] == "robot")
    wanted = {"sessionMode": "stateful", "tools": "web", "requestsPerMinute": 5, "requestsPerDay": 50, "models": ["haiku", "sonnet"],
              "isAdmin": False}
    assert {name: made[name] for name in wanted} == wanted and made["expiresAt"]
    assert running.admin.with_token(secret).get("/api/requests").status == 200
    page.js("copied = []; navigator.clipboard.writeText = async (text) => { copied.push(text) }; 1")
    page.press("Copy token")
    page.sees("Copied.", "#said")
    assert page.js("copied") == [secret]
    page.press("I have it")
    assert secret not in page.js("document.documentElement.outerHTML")
    for words in ("stateful", "tools: web", "5 a minute", "50 a day", "haiku, sonnet", "expires"):
        page.sees(words, "#holders")
    page.press("Revoke robot", "#holders")
    page.press("Yes, revoke", "#holders")
    page.lacks("robot", "#holders")
    assert running.admin.with_token(secret).get("/api/requests").status == 401
    page.press("Revoke admin", "#holders")
    page.press("Yes, revoke", "#holders")
    page.sees("last admin token", "#said")


# --- Playground ---


def test_the_playground_streams_and_stops(visit: Callable[..., Visit], bridge: Start, gate: Path) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.view("Playground")
    page.write("Message", script({"delta": "first try"}, {"message": True}, {"delta": "Dear "}, {"wait": str(gate)}, {"delta": "reader"}))
    page.write("Model", "haiku")
    page.write("System prompt", "Be kind.")
    page.choose("Effort", "low")
    page.press("Ask", "#ask")
    page.until("document.querySelector('#answer').innerText.trim() === 'Dear'")
    gate.touch()
    page.sees("Dear reader", "#answer")
    page.sees("done after", "[role=status]")
    page.sees("resolved-haiku · 10 in · 7 out", "#cost")
    job = running.admin.get("/api/requests").json["requests"][0]
    assert (job["systemPrompt"], job["effort"], job["response"]) == ("Be kind.", "low", "Dear reader")
    page.write("Message", "hang")
    page.press("Ask", "#ask")
    page.sees("thinking", "#answer")
    page.press("Stop")
    page.sees("failed: cancelled", "[role=status]")
    page.write("Model", "no such model!")
    page.press("Ask", "#ask")
    page.sees("model", "#asked")


def test_the_call_as_code_does_the_same(visit: Callable[..., Visit], bridge: Start) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.view("Playground")
    message = "say it's \"so\" $HOME \\n `é`"
    page.write("Message", message)
    page.write("Model", "haiku")
    words = shlex.split(page.text("#code"))
    assert json.loads(words[words.index("-d") + 1]) == {"message": message, "model": "haiku", "wait": 60} and words[0] == "curl"
    page.press("Python", "#languages")
    page.sees("import json", "#code")
    python = page.text("#code")
    page.press("JavaScript", "#languages")
    page.sees("await fetch", "#code")
    javascript = page.text("#code")
    for code in (" ".join(words), python, javascript):
        assert "cab-..." in code and str(running.admin.token) not in code
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(python.replace("cab-...", str(running.admin.token)), {})
    assert said.getvalue() == message[4:] + "\n"
    run = javascript.replace("cab-...", str(running.admin.token)).replace("console.log(", "return (")
    assert page.js("(async () => { %s })()" % run) == message[4:]


# --- In all of it ---


def test_what_others_wrote_is_text_wherever_it_is_shown(visit: Callable[..., Visit], bridge: Start, gate: Path) -> None:
    running = bridge()
    other = running.admin.new_token(EVIL, sessionMode="stateful")
    other.answer("say " + EVIL, systemPrompt=EVIL)
    other.answer("error " + json.dumps({"result": EVIL}))
    other.ask(script({"delta": EVIL}, {"wait": str(gate)}))
    other.ask(EVIL)
    page = visit(running, running.admin.token)
    for place in ("#running .text", "#running .begin", "#waiting .begin", "#waiting .meta", "#recent .begin", "#recent .meta"):
        page.sees(EVIL[:20], place)
    page.press("✓ completed", "#recent")
    page.press("✕ failed", "#recent")
    page.until("[...document.querySelectorAll('#recent .text')].filter((each) => each.innerText.includes('<img')).length >= 5")
    gate.touch()
    page.view("Usage")
    page.sees(EVIL, "#shares")
    page.view("Tokens")
    page.sees(EVIL, "#holders")
    page.write("Name", EVIL)
    page.press("Create token")
    page.sees(EVIL, "#made")
    page.view("Playground")
    page.write("Message", "say " + EVIL)
    page.press("Ask", "#ask")
    page.sees(EVIL, "#answer")
    page.sees("img", "#code")
    assert page.js("document.querySelectorAll('img').length") == 0


def busy(running: RunningBridge, gate: Path) -> None:
    """A bridge with something in every part of the page, and with words that have no end."""
    long = running.admin.new_token("W" * 100, sessionMode="stateful")
    long.answer("say " + "x" * 400)
    long.answer("die 3 " + "y" * 400)
    running.admin.answer(script({"limits": {"status": "allowed_warning", "rateLimitType": "seven_day", "utilization": 0.9,
                                            "resetsAt": cab.Clock().now() + 999999}}, {"result": "z" * 400}))
    running.admin.ask(script({"delta": "v" * 600}, {"wait": str(gate)}))
    long.ask("u" * 400)


def test_a_narrow_screen_needs_no_scrolling_to_the_side(visit: Callable[..., Visit], bridge: Start, gate: Path) -> None:
    running = bridge(public_url="https://%s.example.com" % ("a-long-name-" * 8))
    busy(running, gate)
    page = visit(running, width=390)
    page.sees("working", "[role=status]")
    fits = "document.documentElement.scrollWidth <= innerWidth && innerWidth <= 390"
    assert page.js(fits)
    page.sign_in(running.admin.token)
    page.sees("v" * 600, "#running")
    page.press("✓ completed", "#recent")
    page.press("✕ failed", "#recent")
    for view in VIEWS:
        page.view(view)
        page.until("[...document.querySelectorAll('[data-view]:not([hidden]) h2')].length > 0")
        assert page.js(fits), view
    page.view("Tokens")
    page.press("Revoke W", "#holders")
    page.write("Name", "n" * 60)
    page.press("Create token")
    page.sees("cab-", "#made")
    assert page.js(fits)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    for view in VIEWS:
        page.view(view)
        assert page.js(fits), view


USED = {"button", "link", "textbox", "searchbox", "combobox", "checkbox", "spinbutton", "progressbar", "region"}


def test_a_screen_reader_finds_a_name_for_all_that_can_be_used(visit: Callable[..., Visit], bridge: Start, gate: Path) -> None:
    running = bridge(public_url="https://bridge.example.com")
    busy(running, gate)
    page = visit(running)
    found = set()

    def look() -> None:
        for node in page.call("Accessibility.getFullAXTree")["nodes"]:
            role = node.get("role", {}).get("value")
            if role in USED | {"DisclosureTriangle", "img"} and not node.get("ignored"):
                assert node.get("name", {}).get("value", "").strip(), node
                found.add(role)
        doubled = page.js("[...document.querySelectorAll('[id]')].map((each) => each.id).filter((id, n, all) => all.indexOf(id) !== n)")
        assert doubled == []
        assert page.js("[...document.querySelectorAll('[data-view]:not([hidden]) h2')].length") >= 1

    look()
    page.sign_in(running.admin.token)
    page.sees("v" * 600, "#running")
    page.sees("90 % used", "#windows")
    page.press("✓ completed", "#recent")
    for view in VIEWS:
        page.view(view)
        look()
        if view != "Requests":
            assert page.js("document.activeElement.tagName") in ("H2", "A")
    assert found >= USED


def test_the_page_says_when_the_bridge_is_gone_and_when_it_heard_from_it(visit: Callable[..., Visit], bridge: Start) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.sees("heard ", "#heard")
    running.bridge.__exit__(None, None, None)
    page.js("round(); 1")
    page.sees("not reachable, last heard: ", "[role=status]")


def test_the_page_asks_seldom_while_nothing_happens(visit: Callable[..., Visit], bridge: Start) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.sees("2.1.330", "#facts")
    page.js("sent = []; realFetch = fetch; fetch = (path, more) => { sent.push(path); return realFetch(path, more) }; 1")
    for _ in range(3):
        page.js("round()")
    assert page.js("sent.filter((path) => path !== '/api/status')") == []         # the rest is asked for when the counters change
    page.js("Object.defineProperty(document, 'hidden', { value: true, configurable: true }); sent = []; 1")
    page.js("round()")
    assert page.js("sent.length") == 0                                            # nothing at all while nobody looks
    running.admin.answer("say news")
    page.js("delete document.hidden; document.dispatchEvent(new Event('visibilitychange')); 1")
    page.sees("say news", "#recent")


def test_the_page_is_small_and_names_no_other_host() -> None:
    page = cab.dashboard_page("abc").decode()
    assert len(page.encode()) < 40_000 and "\\" not in page
    assert not re.findall(r"https?:|//[a-z0-9-]+\.|@import|url\(", page)

def test_an_older_answer_never_overwrites_a_newer_one(visit: Callable[..., Visit], bridge: Start) -> None:
    running = bridge()
    page = visit(running, running.admin.token)
    page.view("Tokens")
    page.js("""go = null; real = fetch; fetch = async (path, more) => { const answer = await real(path, more);
        if (!go && path.includes("limit=100")) await new Promise((done) => { go = done }); return answer };
        seen.at = seen.allAt = 0; first = round(); 1""")
    page.until("Boolean(go)")                                                    # its tokens are known, but not shown
    running.admin.new_token("late")
    page.js("seen.at = seen.allAt = 0; second = round(); Promise.race([second, new Promise((done) => setTimeout(done, 200))]).then(() => 1)")
    page.js("go(); Promise.all([first, second]).then(() => 1)")
    assert "late" in page.text("#holders")


def test_what_was_asked_for_before_a_filter_was_chosen_is_not_shown_after_it(visit: Callable[..., Visit], bridge: Start) -> None:
    running = bridge()
    for prompt in ("say fine", "die 3 broke", "say good"):
        running.admin.answer(prompt)
    page = visit(running, running.admin.token)
    page.js("""go = null; real = fetch; fetch = async (path, more) => { const answer = await real(path, more);
        if (!go && path.includes("limit=20&")) await new Promise((done) => { go = done }); return answer };
        seen.at = 0; first = round(); 1""")
    page.until("Boolean(go)")
    page.press("Failed")
    page.js("new Promise((done) => setTimeout(done, 200)).then(() => { go(); return first }).then(() => 1)")
    page.until("[...document.querySelectorAll('#recent li')].length === 1")
