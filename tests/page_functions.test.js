// Tests of the dashboard's pure functions, run by test_page_functions.py:
// DASHBOARD_JS=script.js node --test page_functions.test.js
"use strict";

const assert = require("node:assert");
const fs = require("node:fs");
const { test } = require("node:test");

const script = fs.readFileSync(process.env.DASHBOARD_JS, "utf8");
const section = script.match(/^\/\/ === Pure functions ===\n(.*?)^\/\/ === /ms)[1];
const page = new Function(`"use strict";
${section}
return {
  CODE_EXAMPLES, formatCompact, formatCount, formatDollars, formatDuration, formatElapsed,
  exhaustedAt, formatExact, formatLatency, formatTime, groupErrors, joinNonEmpty, limitName,
  matchText, mergeRecent, newTokenBody, parseBlocks, parseEvent, parseInline, plural, queueDuration, requestQuery,
  rightsWarning, stateText, tokenBadges, totalTokens, truncate, usageCsv, usageParts, waitingText,
};`)();

const SECOND = 1000;
const MINUTE = 60 * SECOND;
const HOUR = 60 * MINUTE;

// Check a function of one argument against a table of [argument, expected result].
function checkTable(name, rows) {
  for (const [argument, expected] of rows) {
    assert.deepStrictEqual(page[name](argument), expected, `${name}(${JSON.stringify(argument)})`);
  }
}

test("formatDuration uses the two largest units", () => {
  checkTable("formatDuration", [
    [-5 * SECOND, "0 s"],
    [0, "0 s"],
    [499, "0 s"],
    [500, "1 s"],
    [59.4 * SECOND, "59 s"],
    [59.6 * SECOND, "1 min 0 s"],
    [90 * SECOND, "1 min 30 s"],
    [HOUR - SECOND, "59 min 59 s"],
    [HOUR, "1 h 0 min"],
    [49 * HOUR + 5 * MINUTE + 9 * SECOND, "49 h 5 min"],
  ]);
});

test("formatExact has a decimal below 10 seconds", () => {
  checkTable("formatExact", [
    [0, "0 s"], [77, "0.1 s"], [340, "0.3 s"], [9.94 * SECOND, "9.9 s"], [9.96 * SECOND, "10 s"],
    [90 * SECOND, "1 min 30 s"],
  ]);
});

test("formatLatency shows milliseconds below a second, and a dash for no value", () => {
  checkTable("formatLatency", [[null, "–"], [0, "0 ms"], [340, "340 ms"], [1840, "1.8 s"]]);
});

test("stateText says what the queue does or waits for", () => {
  const soon = new Date(Date.now() + 1000);
  checkTable("stateText", [
    [{ isProcessing: false }, "idle"],
    [{ isProcessing: true }, "working"],
    [{ isProcessing: false, waitingFor: "usage_limit", resumesAt: soon.toISOString() },
      "resting until " + page.formatTime(soon)],
    [{ isProcessing: true, waitingFor: "paused" }, "paused"],
    [{ waitingFor: "network", resumesAt: soon.toISOString() }, "network lost"],
    [{ waitingFor: "login" }, "login refused"],
    [{ waitingFor: "new_reason" }, "new reason"],
  ]);
});

test("exhaustedAt is the time at which a limit is used up, if that is before its reset", () => {
  const now = Date.parse("2026-01-31T12:00:00Z");
  const limit = (utilization, hoursLeft, type = "five_hour") =>
    ({ type, utilization, resetsAt: new Date(now + hoursLeft * HOUR).toISOString() });
  // After 2 of 5 hours half of it is used.
  assert.strictEqual(page.exhaustedAt(limit(0.5, 3), now).toISOString(), "2026-01-31T14:00:00.000Z");
  assert.strictEqual(
    page.exhaustedAt(limit(0.75, 84, "seven_day_opus"), now).toISOString(),
    "2026-02-01T16:00:00.000Z");
  for (const [utilization, hoursLeft, type] of [
    [0.2, 3], [0, 3], [1, 3], [null, 3], [0.5, 6], [0.5, 3, "unknown"]]) {
    assert.strictEqual(page.exhaustedAt(limit(utilization, hoursLeft, type), now), null);
  }
  assert.strictEqual(page.exhaustedAt({ type: "five_hour", utilization: 0.5 }, now), null);
});

test("queueDuration uses the median of the requests that were answered", () => {
  const job = (seconds, errorCode) => ({ errorCode, startedAt: "2026-01-31T12:00:00Z",
    completedAt: new Date(Date.parse("2026-01-31T12:00:00Z") + seconds * SECOND).toISOString() });
  assert.strictEqual(page.queueDuration(3, [job(1), job(900), job(4), job(700, "timeout")]), 12 * SECOND);
  assert.strictEqual(page.queueDuration(3, [job(1, "timeout"), {}]), null);
});

test("rightsWarning names what such a token can do", () => {
  assert.strictEqual(page.rightsWarning("read", false), "");
  assert.match(page.rightsWarning("all", false), /^This token can run any command/);
  assert.match(page.rightsWarning("all", true), /any command .* manage all tokens/);
});

test("formatElapsed is empty if a time is missing", () => {
  const from = "2026-01-31T12:00:00.000Z";
  assert.strictEqual(page.formatElapsed(from, "2026-01-31T12:01:05.000Z"), "1 min 5 s");
  assert.strictEqual(page.formatElapsed(from, "2026-01-31T12:00:00.340Z"), "0.3 s");
  assert.ok(!page.formatElapsed(null, from));
  assert.ok(!page.formatElapsed(from, undefined));
});

test("formatTime has a date unless it is today", () => {
  const now = new Date();
  assert.match(page.formatTime(now), /^\d\d:\d\d\s[AP]M$/);
  assert.match(page.formatTime(new Date(2020, 0, 31, 9, 5)), /^Jan 31, 09:05\s[AP]M$/);
});

test("formatCount separates thousands and shows a missing number as 0", () => {
  checkTable("formatCount", [[0, "0"], [null, "0"], [undefined, "0"], [1234567, "1,234,567"]]);
});

test("formatCompact shortens large numbers and keeps decimals of small ones", () => {
  checkTable("formatCompact", [
    [0, "0"],
    [16.394, "16.39"],
    [99, "99"],
    [999, "999"],
    [1234, "1.2K"],
    [13900000, "13.9M"],
  ]);
});

test("formatDollars shows small amounts with four decimals", () => {
  const rows = [[0, "$0.00"], [0.001, "$0.0010"], [0.1, "$0.10"], [1234.5, "$1234.50"]];
  checkTable("formatDollars", rows);
});

test("plural adds an s except for 1", () => {
  const texts = [0, 1, 2, 1000].map((number) => page.plural(number, "turn"));
  assert.deepStrictEqual(texts, ["0 turns", "1 turn", "2 turns", "1,000 turns"]);
});

test("joinNonEmpty flattens lists and skips empty parts", () => {
  const text = page.joinNonEmpty("a", "", null, undefined, false, ["b", 0, "c"]);
  assert.strictEqual(text, "a · b · c");
  assert.strictEqual(page.joinNonEmpty(), "");
});

test("truncate cuts a text only if it is longer than the limit", () => {
  assert.strictEqual(page.truncate("abc", 3), "abc");
  assert.strictEqual(page.truncate("abcd", 3), "abc…");
  assert.strictEqual(page.truncate("x".repeat(301)), "x".repeat(300) + "…");
});

const USAGE = {
  inputTokens: 1000,
  outputTokens: 20,
  cacheReadTokens: 3,
  cacheCreationTokens: 4,
  costUsd: 0.5,
};

test("usage is added up and written out", () => {
  assert.strictEqual(page.totalTokens(USAGE), 1027);
  const parts = ["1,000 in", "20 out", "3 cache read", "4 cache write", "est. $0.50"];
  assert.deepStrictEqual(page.usageParts(USAGE), parts);
  assert.strictEqual(page.usageParts(undefined), undefined);
});

test("limitName names each limit of a plan", () => {
  checkTable("limitName", [
    ["five_hour", "5-hour limit"],
    ["seven_day", "Weekly limit"],
    ["seven_day_opus", "Weekly limit (Opus)"],
    ["some_new_limit", "some new limit"],
  ]);
});

test("waitingText ends before the time", () => {
  checkTable("waitingText", [
    ["usage_limit", "Waiting for the plan limit to reset at "],
    ["overloaded", "The service is overloaded. Next try at "],
    ["paused", "The queue is paused."],
    ["some_new_reason", "Waiting (some new reason) until "],
  ]);
});

const requests = (...ids) => ids.map((requestId) => ({ requestId }));
const idsOf = ({ requests }) => requests.map((job) => job.requestId).join("");

test("mergeRecent puts the newest page before the older requests", () => {
  const loaded = { requests: requests("c", "b", "a"), next: "7" };
  const merged = page.mergeRecent(loaded, { requests: requests("e", "d", "c"), next: "9" });
  assert.deepStrictEqual([idsOf(merged), merged.next], ["edcba", "7"]);
});

test("mergeRecent takes the newest version of a request, and drops requests that are gone", () => {
  const loaded = { requests: [{ requestId: "c", old: true }, ...requests("b", "a")], next: null };
  const merged = page.mergeRecent(loaded, { requests: requests("c", "a"), next: "9" });
  assert.deepStrictEqual(merged, { requests: requests("c", "a"), next: null });
});

test("mergeRecent drops the older requests if there may be a gap", () => {
  const loaded = { requests: requests("b", "a"), next: null };
  const merged = page.mergeRecent(loaded, { requests: requests("z", "y"), next: "9" });
  assert.deepStrictEqual([idsOf(merged), merged.next], ["zy", "9"]);
  const first = page.mergeRecent({ requests: [], next: null }, { requests: [], next: null });
  assert.deepStrictEqual(first, { requests: [], next: null });
});

test("mergeRecent keeps what an earlier search brought, which a page of it does not reach", () => {
  const loaded = { requests: requests("b", "a"), next: "7", searchedTo: "T1" };
  const newest = { requests: [], next: "90", searchedTo: "T2" };
  assert.deepStrictEqual(page.mergeRecent(loaded, newest), loaded);
  // The first page of a search.
  assert.deepStrictEqual(page.mergeRecent({ requests: [] }, newest), newest);
  // All was searched, so nothing else is left.
  const all = { requests: [], next: null, searchedTo: null };
  assert.deepStrictEqual(page.mergeRecent(loaded, all), all);
});

test("requestQuery has the filters that are set, and the status or the error", () => {
  const now = Date.parse("2026-01-02T12:00:00Z");
  const rows = [
    [{}, "status=completed,error"],
    [{ conversation: "talk" }, "conversation=talk"],
    [{ q: "a&b", token: "t1" }, "q=a&b&token=t1&status=completed,error"],
    [{ status: "completed", model: "haiku", before: "7" },
      "model=haiku&before=7&status=completed"],
    [{ status: "error", hours: "24" }, "status=error&since=2026-01-01T12:00:00.000Z"],
    [{ status: "timeout", hours: "x" }, "status=completed,error&error=timeout"],
  ];
  for (const [filters, expected] of rows) {
    const query = page.requestQuery(filters, now);
    assert.strictEqual(decodeURIComponent(query), expected);
  }
  assert.strictEqual(new URLSearchParams(page.requestQuery({ q: "a&b" }, now)).get("q"), "a&b");
});

test("matchText says how much is known and how far the search went", () => {
  const searchedTo = new Date(2020, 0, 31, 9, 5).toISOString();
  const time = page.formatTime(new Date(searchedTo));
  checkTable("matchText", [
    [{ requests: [], next: null }, "No match"],
    [{ requests: requests("a"), next: null, searchedTo }, "1 request"],
    [{ requests: requests("a", "b"), next: "7" }, "2 requests so far"],
    [{ requests: [], next: "7", searchedTo }, "No match so far, searched back to " + time],
  ]);
});

test("groupErrors counts the failures of a day, and a cancelled request is none", () => {
  const now = Date.parse("2026-01-02T12:00:00Z");
  const failure = (errorCode, createdAt, advice) => ({ errorCode, createdAt, advice });
  const jobs = [
    failure("network", "2026-01-02T11:00:00Z"),
    failure("cancelled", "2026-01-02T10:59:00Z"),
    failure("timeout", "2026-01-02T10:00:00Z", "Ask for less."),
    failure("timeout", "2026-01-01T13:00:00Z", "Old advice."),
    failure("timeout", "2026-01-01T11:00:00Z"),
  ];
  assert.deepStrictEqual(page.groupErrors(jobs, now), [
    { code: "timeout", count: 2, lastAt: "2026-01-02T10:00:00Z", advice: "Ask for less." },
    { code: "network", count: 1, lastAt: "2026-01-02T11:00:00Z", advice: undefined },
  ]);
});

test("usageCsv has a line for each day, with exact numbers", () => {
  const day = { day: "2026-01-02", requests: 3, completed: 2, errors: 1, ...USAGE };
  assert.strictEqual(page.usageCsv([day]), "day,requests,completed,errors,inputTokens," +
    "outputTokens,cacheReadTokens,cacheCreationTokens,costUsd\r\n" +
    "2026-01-02,3,2,1,1000,20,3,4,0.5\r\n");
});

test("tokenBadges show dangerous rights and tokens that nobody uses", () => {
  const now = Date.parse("2026-03-01T00:00:00Z");
  const textsOf = (entry) =>
    page.tokenBadges({ createdAt: "2026-02-20T00:00:00Z", ...entry }, now).map(([text]) => text);
  assert.deepStrictEqual(textsOf({ tools: "none" }), []);
  assert.deepStrictEqual(textsOf({ tools: "all", isAdmin: true }), ["admin", "all tools"]);
  assert.deepStrictEqual(textsOf({ tools: ["Read", "Bash(git log:*)"] }), ["Bash"]);
  assert.deepStrictEqual(textsOf({ tools: ["Read", "WebSearch"] }), []);
  const old = "2026-01-01T00:00:00Z";
  assert.deepStrictEqual(textsOf({ createdAt: old }), ["unused for 30 days"]);
  assert.deepStrictEqual(textsOf({ createdAt: old, lastUsedAt: "2026-02-27T00:00:00Z" }), []);
  assert.deepStrictEqual(textsOf({ lastUsedAt: old }), ["unused for 30 days"]);
});

test("parseEvent reads an event and skips a heartbeat", () => {
  const event = page.parseEvent('event: delta\nid: 12\ndata: {"text": "a: b"}');
  assert.deepStrictEqual(event, { type: "delta", end: 12, data: { text: "a: b" } });
  assert.strictEqual(page.parseEvent(": keep-alive"), null);
});

test("newTokenBody turns form fields into the body of a request", () => {
  const fields = {
    name: "robot",
    expiresInDays: "",
    requestsPerMinute: "",
    requestsPerDay: "50",
    models: " haiku, sonnet ",
  };
  assert.deepStrictEqual(page.newTokenBody({ ...fields, admin: "on" }), {
    name: "robot",
    admin: true,
    expiresInDays: null,
    requestsPerMinute: null,
    requestsPerDay: 50,
    models: ["haiku", "sonnet"],
  });
  const { admin, models } = page.newTokenBody({ ...fields, models: "" });
  assert.deepStrictEqual([admin, models], [false, null]);
});

const URL = "http://localhost:3456/api/ask";
const BODY = { message: "it's \"so\" $HOME \\n `é`", wait: 60 };

test("every code example has the address and a placeholder for the token", () => {
  assert.deepStrictEqual(Object.keys(page.CODE_EXAMPLES), ["curl", "Python", "JavaScript"]);
  for (const example of Object.values(page.CODE_EXAMPLES)) {
    const code = example(URL, BODY);
    assert.ok(code.includes(URL) && code.includes("Bearer cab-..."), code);
  }
});

test("the curl example quotes the body for a shell", () => {
  const code = page.CODE_EXAMPLES.curl(URL, BODY);
  const quoted = code.slice(code.indexOf(" -d ") + 4);
  // Undo the quoting as a shell does: '...' is literal, and "'" is a single quote.
  const parts = [...quoted.matchAll(/'([^']*)'|"(')"/g)].map((match) => match[1] ?? match[2]);
  assert.deepStrictEqual(JSON.parse(parts.join("")), BODY);
});

test("the JavaScript example sends the body", async () => {
  const code = page.CODE_EXAMPLES.JavaScript(URL, BODY).replace("console.log(", "return (");
  const calls = [];
  const fakeFetch = async (url, options) => {
    calls.push([url, options.method, JSON.parse(options.body)]);
    return { json: async () => ({ response: "yes" }) };
  };
  const AsyncFunction = (async () => {}).constructor;
  assert.strictEqual(await new AsyncFunction("fetch", code)(fakeFetch), "yes");
  assert.deepStrictEqual(calls, [[URL, "POST", BODY]]);
});

// A short notation of parsed Markdown: tag(parts), neighbouring texts joined.
const showNode = (part) =>
  part.tag ? part.tag + "(" + part.parts.map(showNode).join("") + ")" : part;
const blocks = (text) => page.parseBlocks(text.split("\n")).map(showNode).join(" ");
const inline = (text) => page.parseInline(text).map(showNode).join("");
function check(parse, rows) {
  for (const [text, expected] of rows) assert.strictEqual(parse(text), expected, text);
}

test("parseInline reads emphasis, code and links, and leaves the rest as text", () => {
  check(inline, [
    ["snake_case_name and __init__.py a__b__c", "snake_case_name and strong(init).py a__b__c"],
    ["_a_ *b* **c** __d__ ~~e~~ ***f***", "em(a) em(b) strong(c) strong(d) s(e) strong(em(f))"],
    ["**a *b*** *c **d***", "strong(a em(b)) em(c strong(d))"],
    ["5 * 3 * 2, 2 ** 3, ~5, ** a **", "5 * 3 * 2, 2 ** 3, ~5, ** a **"],
    ["**open and *open", "**open and *open"],
    ["**a*b** and **** and *****a*****", "strong(a*b) and **** and *****a*****"],
    ["**中文。**中文", "strong(中文。)中文"],
    ["`**a**` `` a`b `` ` x ` `open", "code(**a**) code(a`b) code(x) `open"],
    ["`\\` \\*a\\* \\q \\\\", "code(\\) *a* \\q \\"],
    ["<b>&amp;</b>", "<b>&amp;</b>"],
    ["[a](https://b.c/d_(e))", "a(a) (https://b.c/d_(e))"],
    ["[https://b.c](https://b.c)", "a(https://b.c)"],
    ["[https://good.com](https://evil.com)", "a(a(https://good.com)) (https://evil.com)"],
    ["[**a** `b`](mailto:x@y.z) [c](https://d.e \"title\")",
      "a(strong(a) code(b)) (mailto:x@y.z) a(c) (https://d.e)"],
    ["[a](javascript:alert) [b](/c) [d](data:x) [e](https:f)",
      "[a](javascript:alert) [b](/c) [d](data:x) [e](https:f)"],
    ["[[1]](https://a.b) [1] [x] ![p](https://i.j)",
      "a([1]) (https://a.b) [1] [x] a(p) (https://i.j)"],
    ["see https://a.b/c_d_e?f=1&g=2, (https://h.i/j_(k)). **https://l.m** <https://n.o>",
      "see a(https://a.b/c_d_e?f=1&g=2), (a(https://h.i/j_(k))). strong(a(https://l.m)) " +
      "<a(https://n.o)>"],
    ["**[a](https://b.c)**", "strong(a(a) (https://b.c))"],
  ]);
  assert.deepStrictEqual(page.parseInline("https://a.b")[1].attributes,
    { href: "https://a.b", rel: "noopener noreferrer", target: "_blank" });
});

test("parseBlocks reads headings, lists, quotes, tables and code", () => {
  check(blocks, [
    ["", ""], ["\n\n", ""],
    ["# a\n### b\n###### c\n#d\n####### e", "h4(a) h6(b) h6(c) p(#d\n####### e)"],
    ["a\nb  \n\nc", "p(a\nb) p(c)"],
    ["a\n---\nb\n***\n_ _ _", "p(a) hr() p(b) hr() hr()"],
    ["- a\n  - b\n    - c\n- d", "ul(li(p(a)ul(li(p(b)ul(li(p(c))))))li(p(d)))"],
    ["1. a\n  - b\n2. c", "ol(li(p(a)ul(li(p(b))))li(p(c)))"],
    ["- a\n\t- b", "ul(li(p(a)ul(li(p(b)))))"],
    ["* a\n\n* b\n+ c", "ul(li(p(a))li(p(b))) ul(li(p(c)))"],
    ["- a\nb", "ul(li(p(a))) p(b)"],
    ["a\n1986. b\n1. c", "p(a\n1986. b) ol(li(p(c)))"],
    ["1. a\n   ```js\n   x\n     y\n\n   z\n   ```\n   b\n2. c",
      "ol(li(p(a)pre(x\n  y\n\nz)p(b))li(p(c)))"],
    ["* a\n\n* * *\nb", "ul(li(p(a))) hr() p(b)"],
    ["> a\n> > b\n>\n> - c\nd", "blockquote(p(a)blockquote(p(b))ul(li(p(c)))) p(d)"],
    ["```\na\n", "pre(a\n)"], ["```", "pre()"],
    ["```py\n**a**\n~~~\n```\nb", "pre(**a**\n~~~) p(b)"],
    ["~~~~\n~~~\n```\n~~~~~\nb", "pre(~~~\n```) p(b)"],
    ["```\n\ta\n```", "pre(\ta)"],
    ["a\n| b | c |\n|---|:-:|\n| `d\\|e` | *f* |\n| g |\nh",
      "p(a) table(tr(th(b)th(c))tr(td(code(d|e))td(em(f)))tr(td(g))) p(h)"],
    ["a | b\n--|--\n1 | 2", "table(tr(th(a)th(b))tr(td(1)td(2)))"],
    ["a | b\nc | d", "p(a | b\nc | d)"],
    ["- | a |\n  |---|\n  | b |", "ul(li(table(tr(th(a))tr(td(b)))))"],
    ["```a``` b", "p(code(a) b)"],
  ]);
  const [list, code] = page.parseBlocks(["3. a", "```js x", "```"]);
  assert.strictEqual(list.attributes.start, 3);
  assert.strictEqual(code.attributes["aria-label"], "js x");
});

test("Markdown that is made to take long, or to nest deeply, is parsed to its end", () => {
  const SIZE = 2e5;
  const fill = (text) => text.repeat(Math.ceil(SIZE / text.length));
  const hostile = ["*", "[", "`", "|", "> ", "- ", "- a ", "*a ", "*a **b ", "**a", "_a_ ", "a***", "~~a ",
    "![", "](", "[a](", "[[a]", "](https://a(b)", "[a](https://x.y \"", "https://a.", "https://a(",
    "\\", "`a``b```c", "|\n", "| a |\n", "|-", "#", "- a\n", "> a\n", "```\n", "[`", "1. ", "\n",
    "[a](https://b.c) ", "-", "a", " ", "\t", "a\n"].map(fill);
  hostile.push("~".repeat(SIZE) + "`", "`".repeat(SIZE) + "x`", " ".repeat(SIZE) + "x",
    "#" + " ".repeat(SIZE) + "x", "- ".repeat(SIZE / 2) + "x", "---" + " ".repeat(SIZE) + "x",
    "*a **b ".repeat(SIZE / 14) + "b** a* ".repeat(SIZE / 14), "https://" + fill("a"),
    "https://a" + fill("(a)"), "[a](https://x" + fill("(a)"), "[" + fill("[a]"), "[" + fill("a"),
    ["|a", "|-", "|x\n"].map((text) => text.repeat(SIZE / 6)).join("\n"),
    Array.from({ length: 1400 }, (_, depth) => " ".repeat(depth) + "- a").join("\n"),
    Array.from({ length: 1400 }, (_, size) => "`".repeat(size) + "a").join(""));
  for (const text of hostile) assert.ok(page.parseBlocks(text.split("\n")));
});
