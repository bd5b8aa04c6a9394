#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""claude_api_bridge: a REST API for the `claude` command line tool you already pay for.

    python3 claude_api_bridge.py start                  serve at a public HTTPS address
    python3 claude_api_bridge.py start --no-tunnel      serve on this machine and its network
    python3 claude_api_bridge.py start --demo           the same without Claude: every answer is an echo
    python3 claude_api_bridge.py token create NAME      make a token (also: token list, token revoke ID)
    python3 claude_api_bridge.py ask "MESSAGE"          ask the running bridge from a shell; - reads the message
    python3 claude_api_bridge.py doctor                 check all that a start needs

One request's way, and the rooms it passes:

    caller -> Handler -> Dispatcher -> answer_* -> Service -> Store (the queue)
    Worker -> ClaudeCli -> Child -> claude -> Live (text so far), Store (result) -> Hub (wakes who waits)

     1 Vocabulary   words and limits               8 Service       what the bridge can do, without HTTP
     2 Settings     flags, variables, Config       9 Routes        the table of endpoints, and their answers
     3 Errors       what goes wrong, and its words 10 HTTP          bytes in, bytes out
     4 Core         pure records and functions    11 Dashboard     one page
     5 Store        SQLite, the only truth        12 Bridge        puts the parts together
     6 Processes    `claude` and its ends         13 Command line  what a person types and reads
     7 Queue        the worker and who waits

Names point upward only: a room uses the rooms above it, and gets what lies below as an argument.
To change what an endpoint says, start in 9; to change how Claude is driven, in 4 (pure) and 6.
"""
from __future__ import annotations

import sys

if sys.version_info < (3, 9):
    sys.exit("claude_api_bridge needs Python 3.9 or newer; this is Python %d.%d." % sys.version_info[:2])

__version__ = "0.2.0"

# Told before the imports, which take most of a start. Who merely imports this module has a program of another name.
if sys.argv[1:] in (["--version"], ["-v"]) and sys.argv[0].endswith((
        "claude-api-bridge", "claude-api-bridge.exe", "claude_api_bridge.py", "claude_api_bridge.pyz")):
    print(__version__)
    sys.exit()

import argparse
import base64
import contextlib
import ctypes
import errno
import hashlib
import http.client
import ipaddress
import json
import math
import os
import platform
import queue
import random
import re
import secrets
import select
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import tempfile
import threading
import time
import traceback
import uuid
from bisect import bisect_right
from collections import OrderedDict, deque
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from email.utils import formatdate
from functools import lru_cache, wraps
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, count, islice, repeat
from pathlib import Path
from typing import (Any, Callable, Deque, Dict, FrozenSet, Generator, Iterable, Iterator, List, Mapping, NamedTuple,
                    Optional, Sequence, Set, Tuple, Type, TypeVar, Union)
from urllib.parse import parse_qsl, quote, unquote, urlsplit

# === 1 Vocabulary =============================================================================================
# The words and numbers that all rooms share. A limit carries its unit in its name.


class JobStatus:
    """Where a job stands; the same four words on the wire."""
    QUEUED = "queued"
    PROCESSING = "processing"
    COMPLETED = "completed"
    ERROR = "error"
    FINISHED = (COMPLETED, ERROR)
    ALL = (QUEUED, PROCESSING, COMPLETED, ERROR)


class SessionMode:
    """Whether the asks of a token share a memory."""
    STATELESS = "stateless"
    STATEFUL = "stateful"


class AuthLevel:
    """Who may use a route."""
    NOTHING = "nothing"
    TOKEN = "token"
    ADMIN = "admin"


class Tools:
    """The named levels of tool use; a list of Claude Code rules is the fifth way."""
    NONE = "none"
    READ = "read"
    WEB = "web"
    ALL = "all"
    LEVELS = (NONE, READ, WEB, ALL)


class TunnelState:
    """How the public address fares. STARTING and BACKOFF pass by themselves, FATAL does not."""
    STARTING = "starting"
    RUNNING = "running"
    BACKOFF = "backoff"
    FATAL = "fatal"
    STOPPING = "stopping"
    STOPPED = "stopped"


ALL_MODELS = "*"                     # no model has this name
EFFORTS = ("low", "medium", "high", "xhigh", "max")
EXPIRY_DAYS = (1, 7, 30, 90)

MESSAGE_BYTES = 32_768
SYSTEM_PROMPT_BYTES = 32_768
BODY_BYTES = 1 << 20
HEAD_BYTES = 16_384
OUTPUT_BYTES = 10 << 20
LINE_BYTES = 4 * OUTPUT_BYTES        # one line of the CLI holds a whole answer, and JSON escapes make it longer
HISTORY_BYTES = 256 << 10            # what is told again of a conversation whose session is gone
HISTORY_TURNS = 200
STDERR_BYTES = 4_096
LOG_LINES = 200                      # of cloudflared's log, kept to say why it failed
UNPACKED_BYTES = 200 << 20
DRAIN_BYTES = 8 << 20
LARGE_BYTES = 1 << 18
LARGE_PAYLOAD_BUDGET_BYTES = 32 << 20                # large bodies and answers on their way, of all connections

JSON_LEVELS = 100

QUEUE_JOBS = 50
JOB_ATTEMPTS = 2
TOKENS = 100
NAME_CHARACTERS = 100
TOOL_RULES = 50
TOKEN_MODELS = 20
MAX_CLIENT_TOOLS = 256                      # tools of a client in one request
STOP_SEQUENCES = 16
DESCRIPTION_CHARACTERS = 2_000       # of a client's tool; the CLI cuts a longer one (2.1.197 at 2,048, 2.1.330 at 4,096)
RESULT_CHARACTERS = 40_000           # of tool results told to a waiting process; the CLI replaces larger ones by a file's name
MAX_KEPT_PROCESSES = 4
PAGE_JOBS = 100                      # most requests in one page of a list, and how large it may grow before it ends
PAGE_CHARACTERS = 1 << 20
USAGE_DAYS = 400                     # how long the daily figures are kept
EVENT_BATCH = 16                            # most events of a running answer that are made before they are sent
TEXT_CHARACTERS = 1 << 18            # of an answer that are read for a stream at once
DELTA_CHARACTERS = 16_384            # a longer text is told in pieces, so that a reader who leaves has got some of it
CONNECTIONS = 256
KNOWN_HEAD_BYTES = 2_048             # of a request head that is kept, since it may come again
MAX_STREAMS_PER_TOKEN = 128                        # open streams and waits of one token, so that one cannot take all connections
MAX_STREAMS = 192                    # and of all tokens but admins', so that there is a place for other calls
OPEN_FILES = 2_048
ADDRESSES = 10_000                   # client addresses remembered by the limiter

WRITES = 64                          # by how many callers one commit may be shared
CACHE_ENTRIES = 1_000                         # things read that are kept until the database changes
CACHED_RESPONSE_BYTES = 16_384                  # and the largest answer among them

WRITE_SECONDS = 10.0                 # how long a write waits for others, and for the lock of another program
CACHE_REVALIDATE_SECONDS = 0.05            # after which a change that another program made to the database counts
CHECK_SECONDS = 5.0                  # how often /health really writes
HEALTH_SECONDS = 1.0                 # and how long it waits for that
WAIT_SECONDS = 90.0                  # below the 100 s after which tunnels and proxies cut a silent answer
HEAD_SECONDS = 10.0
BODY_SECONDS = 30.0
IDLE_SECONDS = 15.0
IDLE_THREAD_SECONDS = 5.0            # how long a thread waits for a next connection
SEND_SECONDS = 30.0
EVICTABLE_SEND_SECONDS = 0.2                  # an answer that was not taken for so long may have to make room
DRAIN_SECONDS = 2.0
CLOSE_SECONDS = 5.0
FINISH_SECONDS = 1.5                 # what a running job gets to finish by itself at an ordered end
DRAIN_AFTER_EXIT_SECONDS = 2.0              # after a child's end, for what it wrote to be read
SHUTDOWN_GRACE_SECONDS = 1.2                  # what a child in the middle of something gets to leave, before it is killed
POLL_SECONDS = 0.1                   # how often a silent run looks whether it is still wanted
DEFAULT_STREAK_TO_PREINIT = 50                    # requests after which the next one is taken to have no settings of its own either
REFILL_SECONDS = 0.2                 # what a run gets for itself before the next spare starts beside it: then its request is on its way
HEARTBEAT_SECONDS = 15.0            # a silent stream says so, before a proxy cuts it
MAINTENANCE_SECONDS = 1.0                  # how often the worker keeps house, or looks though nothing rang; its rest after an error
RECHECK_SECONDS = 1.0                   # how often a stream looks at the store though nothing rang
TOOL_RESULT_WAIT_SECONDS = 60.0                 # how long a process waits for the results of the client's tools
MAX_INLINE_WAIT_SECONDS = 300.0                 # the longest rest for the plan that a request of /v1 is held for
DEFAULT_PAUSE_SECONDS = 900.0                 # for a used-up limit whose reset is not told
LONGEST_PAUSE_SECONDS = 8 * 86_400.0
BACK_OFF_SECONDS = (2, 4, 8, 16, 30)  # between tries while the service is overloaded; the last one repeats
ADDRESS_SECONDS = 30.0               # for cloudflared to get an address
CONNECT_SECONDS = 30.0               # and to connect it by one protocol; the last one gets longer
LAST_CONNECT_SECONDS = 90.0
NAMED_CONNECT_SECONDS = 180.0        # a named tunnel changes the protocol by itself, after 125 s
DOWN_SECONDS = 120.0                 # after so long without a connection a tunnel is given up
STEADY_SECONDS = 300.0               # after so long with a connection its failures are forgotten
TUNNEL_BACK_OFF_SECONDS = (5.0, 15.0, 60.0, 300.0, 900.0)
READY_SECONDS = 5.0                  # how often a running tunnel is looked at
DOWNLOAD_SECONDS = 900.0
LOGINS_PER_MINUTE = 10
POLLS_PER_REQUEST = 5                # the bucket for polls is this many times the size of the others

# === 2 Settings ===============================================================================================
# Every setting is one row of Config: the parser, `start --help`, the README and the environment variables come from it.


class Setting(NamedTuple):
    """One thing the owner can choose. kind: "number" (least to most), "text" (that matches the pattern), "path", or "switch",
    which has no value; also: variables of the environment besides CAB_NAME."""
    name: str
    default: Any
    kind: str
    help: str
    least: int
    most: int
    pattern: str
    also: Tuple[str, ...]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variables(self) -> Tuple[str, ...]:
        return ("CAB_" + self.name.upper(), *self.also)


def setting(default: Any, kind: str, text: str, least: int = 0, most: int = 0, pattern: str = "", also: Tuple[str, ...] = ()) -> Any:
    """A field of Config, and what its Setting says of it."""
    return field(default=default, metadata={"row": (kind, text, least, most, pattern, also)})


@dataclass(frozen=True)
class Config:
    """The chosen values, checked. Built by `load_config` and by tests."""
    port: int = setting(3456, "number", "port to listen on; 0 takes a free one", 0, 65535, also=("PORT",))
    host: str = setting("", "text", "address to listen on (default: 127.0.0.1, with --no-tunnel all interfaces)")
    no_tunnel: bool = setting(False, "switch", "serve this machine and its network only")
    public_url: str = setting("", "text", "the address of a named tunnel or of your own proxy, such as https://bridge.example.com",
                              pattern=r"|https?://[A-Za-z0-9.-]+(:\d+)?/?")
    tunnel_token_file: str = setting("", "text",
                                     "file with the token of a named tunnel (or put the token itself into CAB_TUNNEL_TOKEN)")
    tunnel_protocol: str = setting("auto", "text", "quic, http2, or auto: the one that worked last, then the other",
                                   pattern="auto|quic|http2")
    cloudflared: str = setting("", "text", "the cloudflared program (default: found in PATH, else downloaded once and checked)")
    cloudflared_url: str = setting("https://github.com/cloudflare/cloudflared/releases/download", "text",
                                   "where cloudflared is downloaded from", pattern=r"https?://\S+")
    names: str = setting("", "text", "more host names by which clients call this bridge, joined by commas", pattern=r"[A-Za-z0-9._, -]*")
    data_dir: Path = setting(Path("~/.claude-api-bridge"), "path", "folder of the database and the workspaces")
    claude: str = setting("", "text", "the claude program (default: found in PATH and the usual places)")
    demo: bool = setting(False, "switch", "answer with an echo: no Claude and no subscription needed")
    rate_limit: int = setting(120, "number", "requests a minute; 0 switches the limit off", 0, 1_000_000)
    spare: int = setting(1, "number", "claude processes kept ready, of 90 to 160 MB each; 0 starts one per request", 0, 3)
    run_seconds: float = setting(300, "number", "longest run of one request", 1, 86_400)
    silence_seconds: float = setting(90, "number", "longest time without a sign of life from claude", 1, 86_400)
    warm_seconds: float = setting(600, "number", "how long the process of a conversation stays ready", 0, 86_400)
    keep_days: int = setting(7, "number", "days after which finished requests are deleted (those of a conversation stay with it)", 1, 3_650)
    plan_only: bool = setting(False, "switch", "never go on with paid extra usage: rest until the plan's limit resets")
    allow_api_key: bool = setting(False, "switch", "hand ANTHROPIC_API_KEY on to claude: requests are then billed per token")

    @property
    def listen_host(self) -> str:
        return self.host or ("0.0.0.0" if self.no_tunnel else "127.0.0.1")

    def origin(self, port: int) -> str:
        """Where a program on this machine finds the bridge."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "localhost": "127.0.0.1"}.get(self.listen_host, self.listen_host)
        return "http://%s:%d" % ("[%s]" % host if ":" in host else host, port)


SETTINGS = tuple(Setting(row.name, row.default, *row.metadata["row"]) for row in fields(Config))


class WrongSetting(Exception):
    """A value that cannot be used; the sentence says which one, and what would do."""


def load_config(flags: Mapping[str, Any], environ: Mapping[str, str]) -> Config:
    """The settings in force: a flag before a variable before the default. Raises WrongSetting."""
    values = {}
    for row in SETTINGS:
        value, source = flags.get(row.name), row.flag
        for variable in row.variables:
            if value is None and environ.get(variable):
                value, source = environ[variable], variable
        values[row.name] = read_setting(row, row.default if value is None else value, source)
    return Config(**values)


def read_setting(row: Setting, value: Any, source: str) -> Any:
    """The value of one setting in its type. Raises WrongSetting, naming the flag or variable it came from."""
    if row.kind == "switch":
        if str(value).lower() not in ("true", "1", "yes", "on", "false", "0", "no", "off"):
            raise WrongSetting("%s must be 1 or 0, not %r." % (source, value))
        return str(value).lower() in ("true", "1", "yes", "on")
    if row.kind == "number":
        if not re.fullmatch(r"[0-9]{1,9}", str(value)) or not row.least <= int(value) <= row.most:
            raise WrongSetting("%s must be a whole number from %d to %d, not %r." % (source, row.least, row.most, str(value)))
        return int(value)
    if row.pattern and not re.fullmatch(row.pattern, str(value)):
        raise WrongSetting("%s cannot be %r. It is: %s." % (source, str(value), row.help))
    try:
        if "\0" in str(value) or not str(value).strip() and row.kind == "path":
            raise RuntimeError
        return Path(value).expanduser().absolute() if row.kind == "path" else str(value)
    except RuntimeError:                                      # expanduser's, for ~somebody who does not exist
        raise WrongSetting("%s is not a usable %s: %r." % (source, row.kind, str(value))) from None


class Clock:
    """The two clocks: moments (`now`, UTC epoch seconds) and spans (`monotonic`). Tests pass their own."""
    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)


# === 3 Errors =================================================================================================
# Two families, never mixed. A BridgeError answers the caller; a RunFailed is stored with the job and reaches
# the caller as HTTP 200 with "status": "error". CannotStart is for the person at the terminal.


class BridgeError(Exception):
    """An answer that says no. Subclasses fix status, code and the usual words; their first line documents them."""
    status = 500
    code = "internal"
    text = "Internal server error"

    def __init__(self, text: str = "", headers: Sequence[Tuple[str, str]] = (), **extra: Any) -> None:
        super().__init__(text or self.text)
        self.headers = tuple(headers)
        self.extra = extra


class InvalidRequest(BridgeError):
    """A field is missing or has a value that cannot be used; `field` names it."""
    status, code, text = 400, "invalid_request", "Bad request"


class InvalidJson(BridgeError):
    """The body is not JSON in UTF-8."""
    status, code, text = 400, "invalid_json", "Body is not valid JSON"


class TokenLimit(BridgeError):
    """There are as many tokens as allowed; revoke one first."""
    status, code, text = 400, "token_limit", "Maximum %d tokens allowed" % TOKENS


class LastAdmin(BridgeError):
    """The only admin token cannot be revoked; create another admin token first."""
    status, code, text = 400, "last_admin", "Cannot delete the last admin token"


class MalformedRequest(BridgeError):
    """The bytes are not a valid HTTP request; the connection is closed."""
    status, code, text = 400, "malformed_request", "Malformed HTTP request"


class MissingToken(BridgeError):
    """No token was sent."""
    status, code, text = 401, "missing_token", "Missing Authorization header. Use: Bearer <token>"


class InvalidToken(BridgeError):
    """The token is unknown, revoked or expired."""
    status, code, text = 401, "invalid_token", "Invalid or expired token"


class AdminRequired(BridgeError):
    """The route needs an admin token."""
    status, code, text = 403, "admin_required", "Admin token required"


class ModelNotAllowed(BridgeError):
    """The token may not use this model; the text names those that it may."""
    status, code, text = 403, "model_not_allowed", "This token may not use that model"


class NotFound(BridgeError):
    """No such path, request, conversation or token; another token's request counts as none."""
    status, code, text = 404, "not_found", "Not found"


class MethodNotAllowed(BridgeError):
    """The path exists, but not with this method; the Allow header lists those that do."""
    status, code, text = 405, "method_not_allowed", "Method not allowed"


class AlreadyFinished(BridgeError):
    """The request has its answer or its error, so that nothing is left to cancel."""
    status, code, text = 409, "already_finished", "The request is already finished"


class IdempotencyConflict(BridgeError):
    """The Idempotency-Key was used before, for another body; take a new key for a new request."""
    status, code, text = 409, "idempotency_conflict", "This Idempotency-Key was used for another body. Use a new key for a new request"


class BodyTooLarge(BridgeError):
    """The body is larger than 1 MiB."""
    status, code, text = 413, "body_too_large", "Body exceeds %d byte limit" % BODY_BYTES


class UnknownHost(BridgeError):
    """The Host header names none of this bridge's names (a page of a stranger may have sent the browser here); --names adds one."""
    status, code, text = 421, "unknown_host", "This bridge does not answer by that name"


class UnsupportedEncoding(BridgeError):
    """The body is compressed; send it as it is."""
    status, code, text = 415, "unsupported_encoding", "Content-Encoding is not supported. Send the body uncompressed"


class ExpectationFailed(BridgeError):
    """The Expect header asks for something other than 100-continue."""
    status, code, text = 417, "expectation_failed", "Only Expect: 100-continue is supported"


class RateLimited(BridgeError):
    """Too many requests; Retry-After says when the next one is welcome."""
    status, code, text = 429, "rate_limited", "Too many requests, please slow down."


class DailyLimit(BridgeError):
    """The token has sent as many requests today (UTC) as it may; `resetsAt` and Retry-After say when it works again."""
    status, code, text = 429, "daily_limit", "This token has used up its requests of today"


class QueueFull(BridgeError):
    """Too many jobs wait; try again after Retry-After seconds."""
    status, code, text = 429, "queue_full", "Queue is full. Please try again later."


class HeadTooLarge(BridgeError):
    """The request line and headers are larger than 16 KiB."""
    status, code, text = 431, "head_too_large", "Request head exceeds %d byte limit" % HEAD_BYTES


class UnknownCoding(BridgeError):
    """A method or transfer coding that no route here knows."""
    status, code, text = 501, "not_implemented", "Method or transfer coding not supported"


class Unavailable(BridgeError):
    """The bridge cannot serve now: too many busy connections, its worker or its database is down."""
    status, code, text = 503, "unavailable", "The bridge cannot serve requests now. Please try again later."


class UnknownVersion(BridgeError):
    """Not HTTP/1.0 or HTTP/1.1."""
    status, code, text = 505, "http_version", "Only HTTP/1.0 and HTTP/1.1 are supported"


ERRORS: Tuple[Type[BridgeError], ...] = (*sorted(BridgeError.__subclasses__(), key=lambda kind: (kind.status, kind.code)), BridgeError)

RUN_ERRORS = {
    "cancelled": "the request was cancelled, or its token was revoked",
    "timeout": "the run took too long, or claude gave no sign of life",
    "usage_limit": "the plan's usage limit is reached: what a request may be `waitingFor`, and the end only of one of /v1 that would"
                   " have to wait for more than 5 minutes",
    "auth_required": "claude is not signed in, or its login was refused",
    "overloaded": "the service, or this machine, was overloaded for the whole time of the run",
    "billing_guard": "the run would have been billed to an API key and was stopped",
    "cli_error": "claude failed; the text holds its own words",
    "output_too_large": "the answer is larger than 10 MB",
    "interrupted": "the run was cut short twice: the bridge ended, or failed",
    "context_too_long": "the prompt or the conversation is longer than the model takes",
    "model_not_found": "the model does not exist, or the account may not use it",
}


REQUEUED = ("interrupted", "usage_limit")     # what a request cannot help, and so waits for
RUN_STATUS = {"timeout": 504, "usage_limit": 429, "auth_required": 503, "overloaded": 529, "billing_guard": 403, "interrupted": 503,
              "context_too_long": 400, "model_not_found": 404}


class RunError(BridgeError):
    """A failed run, for the callers of /v1, who get it as an HTTP error; code: a key of RUN_ERRORS. The bridge itself has tried again
    where that helps, so that the client's library shall not."""

    def __init__(self, code: str, text: str, headers: Sequence[Tuple[str, str]] = ()) -> None:
        super().__init__(text, (("x-should-retry", "false"), *headers))
        self.status, self.code = RUN_STATUS.get(code, 500), code


class RunFailed(Exception):
    """The outcome of a run that did not succeed. code: a key of RUN_ERRORS; the text is for the caller; resets_at: when
    a used-up limit works again (epoch seconds), where it was told; is_of_model: other models may go on."""

    def __init__(self, code: str, text: str, resets_at: Optional[float] = None, is_model_limit: bool = False) -> None:
        super().__init__(text)
        self.code, self.resets_at, self.is_model_limit = code, resets_at, is_model_limit


class CannotStart(Exception):
    """Why the bridge does not start, in one sentence, and what to do about it."""

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


class DatabaseCorrupt(CannotStart):
    """The database is none, or broken: it is of no use as it is."""


class CannotTunnel(Exception):
    """Why there will be no public address however often it is tried, in one sentence, and what to do about it."""

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


def retry_later(kind: Type[BridgeError], text: str, seconds: float, **extra: Any) -> BridgeError:
    """A 429 that says when the next request is welcome."""
    wait = max(1, math.ceil(seconds))
    return kind(text, (("Retry-After", str(wait)),), retryAfter=wait, **extra)


def error_body(error: BridgeError) -> Dict[str, Any]:
    """What an error says on the wire: {"error": "sentence", "code": "snake_case", ...extra fields}."""
    return {"error": str(error), "code": error.code, **error.extra}

# === 4 Core ===================================================================================================
# Pure: no file, socket, child or real clock (`new_token` alone draws randomness). First the commands that
# callers send, then the records that the rooms pass around, then the words of HTTP and of the CLI.


@lru_cache(maxsize=256)
def camel_case(name: str) -> str:
    """system_prompt -> systemPrompt."""
    head, *rest = name.split("_")
    return head + "".join(word.capitalize() for word in rest)


def as_json(value: Any) -> str:
    """Compact JSON, readable in any script."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def replace_surrogates(text: str) -> str:
    """Lone surrogates (which UTF-8 and SQLite cannot hold) become U+FFFD, as the CLI itself does it."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def day_of(moment: float) -> str:
    """Epoch seconds -> 2026-01-31, in UTC."""
    return str(iso_time(moment))[:10]


def iso_time(moment: Optional[float]) -> Optional[str]:
    """Epoch seconds -> 2026-01-31T12:00:00.000Z."""
    if moment is None:
        return None
    return datetime.fromtimestamp(moment, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def nests_deeper_than(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested in more than `levels` levels."""
    layer = [value]
    for _ in range(levels + 1):
        layer = [item for part in layer if isinstance(part, (dict, list)) for item in (part.values() if isinstance(part, dict) else part)]
        if not layer:
            return False
    return True


_LARGE_JSON_LOCK = threading.Lock()            # one large body at a time: 1 MiB can be half a million values, each far larger in memory


def parse_json(data: bytes) -> Any:
    """The value in a body. Raises InvalidJson with the place of the fault."""
    def refuse(word: str) -> None:
        raise ValueError("%s is not JSON" % word[:40])

    def finite(word: str) -> float:
        return refuse(word) if abs(float(word)) == float("inf") else float(word)  # type: ignore[return-value,func-returns-value]

    try:
        with _LARGE_JSON_LOCK if len(data) > 1 << 16 else contextlib.nullcontext():
            value = json.loads(data.decode("utf-8-sig"), parse_constant=refuse, parse_float=finite)
            if nests_deeper_than(value, JSON_LEVELS):
                raise RecursionError
        return value
    except UnicodeDecodeError as error:
        raise InvalidJson("Body is not valid UTF-8 (byte %d). Send JSON encoded as UTF-8" % error.start) from None
    except RecursionError:
        raise InvalidJson("Body is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise InvalidJson("Body is not valid JSON: %s" % error) from None


def max_bytes(what: str, limit: int) -> Callable[[Any], Optional[str]]:
    """A check for an optional text of at most `limit` bytes."""
    def check(value: Any) -> Optional[str]:
        if value is None:
            return None
        if not isinstance(value, str):
            raise InvalidRequest("%s must be a string" % what)
        if len(replace_surrogates(value).encode()) > limit:
            raise InvalidRequest("%s exceeds %d byte limit" % (what, limit))
        return replace_surrogates(value) or None
    return check


def validate_message(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequest("message field is required (string)")
    if not value.strip():
        raise InvalidRequest("message must not be blank")
    return max_bytes("Message", MESSAGE_BYTES)(value) or ""


def matching(pattern: str, advice: str) -> Callable[[Any], Optional[str]]:
    """A check for an optional text that matches `pattern` whole."""
    def check(value: Any) -> Optional[str]:
        if value is None:
            return None
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise InvalidRequest(advice)
        return value
    return check


validate_model_name = matching(r"[A-Za-z0-9][A-Za-z0-9._:/@\[\]-]{0,127}", "model must be an alias or a full model name, such as haiku")


def validate_model(value: Any) -> Optional[str]:
    """A model's name; `default` is the same as none (an agent's model is sent as it is, so the CLI would not resolve it)."""
    name = validate_model_name(value)
    return None if name == "default" else name


def one_of(choices: Sequence[Any], advice: str) -> Callable[[Any], Any]:
    """A check for an optional value out of `choices`; 7.0 is 7, but True is not 1."""
    def check(value: Any) -> Any:
        for choice in (None, *choices):
            if value == choice and isinstance(value, bool) == isinstance(choice, bool):
                return choice
        raise InvalidRequest(advice)
    return check


def validate_schema(value: Any) -> Optional[str]:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise InvalidRequest("jsonSchema must be a JSON object (a JSON Schema)")
    return replace_surrogates(as_json(value))


def validate_wait(value: Any) -> float:
    """Seconds, from a JSON number or from the text of a query."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
        value, is_number = float(value), True
    seconds = value if is_number else 0 if value is None else -1
    if not 0 <= seconds <= WAIT_SECONDS:
        raise InvalidRequest("wait must be a number of seconds from 0 to %d" % WAIT_SECONDS, field="wait")
    return float(seconds)


def integer(what: str, least: int, most: int) -> Callable[[Any], Optional[int]]:
    """A check for an optional whole number, from JSON or from the text of a query."""
    def check(value: Any) -> Optional[int]:
        if value is None:
            return None
        text = "%d" % value if isinstance(value, float) and value.is_integer() else str(value)
        if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
            raise InvalidRequest("%s must be a whole number from %d to %d" % (what, least, most), field=what)
        return int(text)
    return check


validate_offset = integer("after", 0, 999_999_999)


def boolean(what: str) -> Callable[[Any], bool]:
    """A check for an optional true or false."""
    return lambda value: bool(one_of((True, False), "%s must be true or false" % what)(value))


def validate_models(value: Any) -> Optional[Tuple[str, ...]]:
    """The models that a token may use; none is no limit."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not 0 < len(value) <= TOKEN_MODELS:
        raise InvalidRequest("models must be a list of 1 to %d model names, or null" % TOKEN_MODELS)
    return tuple(str(validate_model_name("" if each is None else each)) for each in value)


def validate_idempotency_key(value: Optional[str]) -> Optional[str]:
    """The Idempotency-Key of a request."""
    if value is not None and not 1 <= len(value) <= 200:
        raise InvalidRequest("Idempotency-Key must have 1 to 200 characters", field="Idempotency-Key")
    return value


def validate_statuses(value: Optional[str]) -> Tuple[str, ...]:
    """The statuses of a query, joined by commas; none is all."""
    wanted = tuple(dict.fromkeys(value.split(","))) if value else ()
    if not set(wanted) <= set(JobStatus.ALL):
        raise InvalidRequest("status must be one or more of: " + ", ".join(JobStatus.ALL), field="status")
    return wanted


def validate_token_name(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidRequest("Token name is required")
    if len(value) > NAME_CHARACTERS:
        raise InvalidRequest("Token name must be %d characters or less" % NAME_CHARACTERS)
    return replace_surrogates(value.strip())


def validate_session_mode(value: Any) -> str:
    return one_of((SessionMode.STATEFUL, SessionMode.STATELESS),
                        'sessionMode must be "stateful" or "stateless"')(value or None) or SessionMode.STATELESS


def validate_tools(value: Any) -> Union[str, Tuple[str, ...]]:
    """A level, or a tuple of Claude Code rules such as "Read" or "Bash(git log:*)"."""
    if value is None:
        return Tools.NONE
    if isinstance(value, str) and value in Tools.LEVELS:
        return value
    rules = value if isinstance(value, (list, tuple)) and 0 < len(value) <= TOOL_RULES else ()
    rule = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}(\([^()\x00-\x1f\"\ud800-\udfff]{1,200}\))?")
    if rules and all(isinstance(each, str) and rule.fullmatch(each) for each in rules):
        return tuple(rules)
    raise InvalidRequest('tools must be "none", "read", "web", "all" or a list of 1 to %d rules such as "Read" or "Bash(git log:*)"'
                         % TOOL_RULES)


def body_field(check: Callable[[Any], Any], kind: str, doc: str, example: Any, default: Any = None) -> Any:
    """A field of a command: its check, and what the documentation says of it."""
    return field(default=default, metadata={"check": check, "kind": kind, "doc": doc, "example": example})


class Command:
    """What a body asks for; subclasses are dataclasses whose fields are made by `wire`."""

    @classmethod
    def parse(cls, body: Any) -> Tuple[Any, List[str]]:
        """-> (the command, warnings about fields it does not know). Raises InvalidRequest with `field`."""
        given = dict(body) if isinstance(body, dict) else {}
        values = {}
        for row in fields(cls):  # type: ignore[arg-type]
            try:
                values[row.name] = row.metadata["check"](given.pop(camel_case(row.name), None))
            except InvalidRequest as error:
                error.extra.setdefault("field", camel_case(row.name))
                raise
        return cls(**values), ["unknown field '%s' ignored" % replace_surrogates(name)[:64] for name in list(given)[:10]]


@dataclass(frozen=True)
class Ask(Command):
    """A message for Claude."""
    message: str = body_field(validate_message, "string", "what to ask; 1 to 32,768 bytes of UTF-8", "Why is the sky blue?", "")
    model: Optional[str] = body_field(validate_model, "string", "alias or full name of a model; default: the one claude would take", "haiku")
    system_prompt: Optional[str] = body_field(max_bytes("systemPrompt", SYSTEM_PROMPT_BYTES), "string",
                                        "instructions for the model, up to 32,768 bytes", "Answer in one sentence.")
    json_schema: Optional[str] = body_field(validate_schema, "object", "JSON Schema that the answer must satisfy; it comes back as `structured`",
                                      {"type": "object", "properties": {"answer": {"type": "string"}}})
    conversation: Optional[str] = body_field(
        matching(r"[A-Za-z0-9._-]{1,64}", "conversation must be 1 to 64 letters, digits, dots, dashes or underscores"),
        "string", "stateful tokens: which conversation this belongs to; default: `default`", "trip-to-rome")
    effort: Optional[str] = body_field(one_of(EFFORTS, "effort must be one of: " + ", ".join(EFFORTS)), "string",
                                 "how hard to think: " + ", ".join(EFFORTS), "low")
    wait: float = body_field(validate_wait, "number", "hold the answer up to so many seconds, 0 to 90", 30, 0.0)
    stream: bool = body_field(boolean("stream"), "boolean", "answer at once with Server-Sent Events; see Streaming", True, False)

    @property
    def fingerprint(self) -> str:
        """Equal for requests that ask the same, however they want the answer."""
        return digest(as_json([getattr(self, row.name) for row in fields(self) if row.name not in ("wait", "stream")]))


Block = Mapping[str, Any]
Content = Union[str, Sequence[Block]]


@dataclass(frozen=True)
class Chat:
    """A whole conversation, as /v1 tells it in either format. turns: [{"role": "user", "content": [blocks of the Messages API]}, ...],
    user and assistant in turn, the last one the user's; functions: the client's tools, [{"name", "description", "inputSchema"}];
    forced: the one whose input is to be the answer; stops: where the answer ends."""
    turns: Tuple[Mapping[str, Any], ...]
    system_prompt: Optional[str] = None
    model: Optional[str] = None
    json_schema: Optional[str] = None
    effort: Optional[str] = None
    client_tools: Tuple[Mapping[str, Any], ...] = ()
    forced_tool: Optional[str] = None
    stop_sequences: Tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = True             # whether a stream ends with the figures
    api: str = "anthropic"               # whose format it came in, or openai
    conversation: Optional[str] = None   # the memory is the client's

    @property
    def message(self) -> str:
        """The last text, for lists of requests."""
        texts = [block["text"] for block in self.turns[-1]["content"] if block["type"] == "text"]
        return texts[-1] if texts else "(%s)" % self.turns[-1]["content"][-1]["type"]

    def to_json(self) -> str:
        """All that a job does not tell by itself, to be kept with it."""
        return replace_surrogates(as_json({"turns": self.turns, "functions": self.client_tools, "forced": self.forced_tool, "stops": self.stop_sequences}))


@dataclass(frozen=True)
class NewToken(Command):
    """A token to be made."""
    name: str = body_field(validate_token_name, "string", "what it is for; 1 to 100 characters", "my-app", "")
    session_mode: str = body_field(validate_session_mode, "string", "`stateless` (default) or `stateful`: asks share a memory", "stateless",
                             SessionMode.STATELESS)
    expires_in_days: Optional[int] = body_field(one_of(EXPIRY_DAYS, "expiresInDays must be 1, 7, 30, 90, or null (never)"), "number",
                                          "1, 7, 30, 90 or null (never)", 30)
    admin: bool = body_field(boolean("admin"), "boolean", "may manage tokens and read every request", False, False)
    tools: Union[str, Tuple[str, ...]] = body_field(validate_tools, "string or array",
                                              "`none` (default), `read`, `web`, `all` or a list of rules", "read", Tools.NONE)
    requests_per_minute: Optional[int] = body_field(integer("requestsPerMinute", 1, 10_000), "number",
                                              "most asks within 60 seconds, or null", 10)
    requests_per_day: Optional[int] = body_field(integer("requestsPerDay", 1, 1_000_000), "number",
                                           "most asks within a day (UTC), or null", 200)
    models: Optional[Tuple[str, ...]] = body_field(validate_models, "array", "the models it may use, or null for all; the first is its default",
                                             ["haiku", "sonnet"])


@dataclass(frozen=True)
class Token:
    """Who may call, and what they may. Times are epoch seconds."""
    id: str
    name: str
    prefix: str
    session_mode: str
    expires_at: Optional[float]
    created_at: float
    last_used_at: Optional[float]
    is_admin: bool
    tools: Union[str, Tuple[str, ...]] = Tools.NONE
    workspace: Optional[str] = None
    requests_per_minute: Optional[int] = None
    requests_per_day: Optional[int] = None
    models: Optional[Tuple[str, ...]] = None

    def is_expired(self, now: float) -> bool:
        return self.expires_at is not None and self.expires_at <= now


class Usage(NamedTuple):
    """What one answer used; `cost_usd` is the CLI's own estimate."""
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_creation_tokens: int = 0
    cost_usd: float = 0.0


class ToolCall(NamedTuple):
    """A call of a client's tool. arguments: a JSON object."""
    id: str
    name: str
    arguments: Mapping[str, Any]


class StopInfo(NamedTuple):
    """Why an answer ended: end_turn, tool_use, stop_sequence, ... in the words of the Messages API, and what is called."""
    reason: str = "end_turn"
    stop: Optional[str] = None
    calls: Tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Job:
    """A queued ask and all that became of it. `structured` and `json_schema` are JSON texts. restarts: how often its text
    began anew after some of it could be read, so that an offset in it means nothing any more; api: whose wire format it came in,
    where not in ours."""
    id: str
    seq: int
    token_id: str
    status: str
    message: str
    created_at: float
    attempts: int = 0
    model: Optional[str] = None
    system_prompt: Optional[str] = None
    json_schema: Optional[str] = None
    conversation: Optional[str] = None
    effort: Optional[str] = None
    started_at: Optional[float] = None
    completed_at: Optional[float] = None
    response: Optional[str] = None
    structured: Optional[str] = None
    usage: Optional[Usage] = None
    error: Optional[str] = None
    error_code: Optional[str] = None
    generation: int = 0
    stop_info: Optional[StopInfo] = None
    api: Optional[str] = None

    @property
    def is_finished(self) -> bool:
        return self.status in JobStatus.FINISHED


class EnqueueResult(NamedTuple):
    """What became of an ask. position: those waiting and running before it + 1, 0 when finished; is_new: False where an
    Idempotency-Key led to an earlier request."""
    job: Job
    position: int
    is_new: bool = True


class HistoryTurn(NamedTuple):
    """One completed turn of a conversation: texts, or lists of blocks of the Messages API."""
    message: Content
    response: Content


class Conversation(NamedTuple):
    """What a stateful token remembers under one name. turns: the completed ones. Times are epoch seconds."""
    name: str
    turns: int
    created_at: float
    last_used_at: float


class Session(NamedTuple):
    """Where a conversation goes on. key: names its process, and is another one after the conversation was deleted;
    session_id: the CLI's, to resume, or None; spent_usd: its cost so far, as the CLI counts it."""
    key: str
    session_id: Optional[str] = None
    spent_usd: float = 0.0


class DayUsage(NamedTuple):
    """What one token used on one day (UTC), counted on the day of the request."""
    day: str
    token_id: str
    requests: int
    completed: int
    errors: int
    usage: Usage


class RateLimitWindow(NamedTuple):
    """One limit of the plan, as the CLI last told it. kind: five_hour, seven_day, ... or overage (paid extra usage, status
    `in_use` while requests draw on it); utilization: 0 to 1, where told. Times are epoch seconds."""
    kind: str
    status: Optional[str]
    utilization: Optional[float]
    resets_at: Optional[float]
    seen_at: float = 0.0


class RateLimitStatus(NamedTuple):
    """What a `rate_limit_event` says. is_used_up: a limit of the plan refuses requests; is_using_overage: it would, but
    they go on as paid extra usage; resets_at: when the plan gives again; is_of_model: it is the limit of one model only."""
    is_used_up: bool = False
    is_using_overage: bool = False
    resets_at: Optional[float] = None
    windows: Tuple[RateLimitWindow, ...] = ()
    is_model_limit: bool = False


class Pause(NamedTuple):
    """Why nothing runs now: usage_limit or overloaded, and until when (epoch seconds)."""
    reason: str
    until: float


@dataclass(frozen=True)
class Answer:
    """A successful run. session_id: under which the CLI keeps the conversation, None where it does not; spent_usd: the
    cost of that session so far, as the CLI counts it."""
    text: str
    structured: Optional[str] = None
    usage: Usage = Usage()
    model: Optional[str] = None
    session_id: Optional[str] = None
    spent_usd: float = 0.0
    stop_info: StopInfo = StopInfo()


def new_token() -> str:
    return "cab-" + secrets.token_hex(32)


def digest(secret: str) -> str:
    """How a token is stored and looked up: SHA-256 in hex, as the original did."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def bearer(headers: Mapping[str, str]) -> Optional[str]:
    """The token of a request: `Authorization: Bearer T` (scheme in any case) or `x-api-key: T`; None without one."""
    scheme, _, value = headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return headers.get("x-api-key", "").strip() or None


def redact(text: str) -> str:
    """Text for logs and errors: tokens and keys are cut to their first letters."""
    return re.sub(r"(cab-[0-9a-f]{4}|sk-ant-[A-Za-z0-9]{2,8})[A-Za-z0-9_-]{8,}", r"\1...", text)


class TokenBucket:
    """A rate limit: `capacity` requests at once, refilled at `capacity` a minute. Any thread; `capacity` 0 is no limit."""

    def __init__(self, clock: Clock, capacity: int) -> None:
        self.capacity = capacity
        self._clock = clock
        self._level = float(capacity)
        self._at = clock.monotonic()
        self._lock = threading.Lock()

    def take(self) -> float:
        """-> 0 when a request was granted, else the seconds until the next one will be."""
        if not self.capacity:
            return 0.0
        with self._lock:
            self._refill()
            if self._level >= 1:
                self._level -= 1
                return 0.0
            return (1 - self._level) * 60 / self.capacity

    def headers(self) -> Tuple[Tuple[str, str], ...]:
        """The RateLimit fields of draft-ietf-httpapi-ratelimit-headers-06."""
        if not self.capacity:
            return ()
        with self._lock:
            self._refill()
            left, full_in = int(self._level), (self.capacity - self._level) * 60 / self.capacity
        return (("RateLimit-Policy", "%d;w=60" % self.capacity), ("RateLimit-Limit", str(self.capacity)),
                ("RateLimit-Remaining", str(left)), ("RateLimit-Reset", str(math.ceil(full_in))))

    def _refill(self) -> None:
        now = self._clock.monotonic()
        self._level = min(self.capacity, self._level + max(0.0, now - self._at) * self.capacity / 60)
        self._at = now


class Metric(NamedTuple):
    """A row of /metrics. kind: counter, gauge or histogram (of seconds)."""
    name: str
    kind: str
    labels: str
    doc: str


METRICS = (
    Metric("cab_info", "gauge", "version, claude", "always 1; the versions of the bridge and of claude"),
    Metric("cab_start_time_seconds", "gauge", "", "when the bridge began, in epoch seconds; all counters begin there"),
    Metric("cab_http_responses_total", "counter", "status", "answers by HTTP status"),
    Metric("cab_requests_accepted_total", "counter", "", "requests that were queued"),
    Metric("cab_requests_finished_total", "counter", "status, code", "requests that are finished, by status and errorCode"),
    Metric("cab_queue_length", "gauge", "status", "requests that are queued or processing"),
    Metric("cab_wait_seconds", "histogram", "", "from a request's arrival to the beginning of its first run"),
    Metric("cab_run_seconds", "histogram", "", "length of the runs that ended a request"),
    Metric("cab_tokens_total", "counter", "kind", "input, output, cache_read and cache_creation tokens"),
    Metric("cab_cost_usd_total", "counter", "", "the cost at API prices, as claude estimates it; no bill"),
    Metric("cab_cli_starts_total", "counter", "", "processes of claude that were started"),
    Metric("cab_spare_total", "counter", "result", "runs that found a process ready (hit) or had to start one (miss)"),
    Metric("cab_spares", "gauge", "", "processes that are ready now"),
    Metric("cab_resting", "gauge", "", "1 while the queue waits for the plan's reset"),
    Metric("cab_plan_utilization", "gauge", "window", "share of a limit of the plan that is used, 0 to 1, where it was told"),
    Metric("cab_plan_resets_at_seconds", "gauge", "window", "when that limit resets, in epoch seconds"),
    Metric("cab_access_tokens", "gauge", "", "access tokens that exist"),
    Metric("cab_tunnel_up", "gauge", "", "1 while the public address works"),
    Metric("cab_tunnel_state", "gauge", "state", "1 for the state of the tunnel"),
    Metric("cab_tunnel_starts_total", "counter", "", "starts of cloudflared"),
)
HISTOGRAM_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
Labels = Tuple[Tuple[str, str], ...]


class Metrics:
    """Counts what happens, for /metrics. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: Dict[Tuple[str, Labels], float] = {}

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        key = name, tuple(labels.items())
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def observe(self, name: str, seconds: float) -> None:
        """One value more of a histogram."""
        for bound in HISTOGRAM_SECONDS:
            self.add(name + "_bucket", seconds <= bound, le="%g" % bound)
        self.add(name + "_bucket", le="+Inf")
        self.add(name + "_sum", seconds)
        self.add(name + "_count")

    def values(self) -> Dict[Tuple[str, Labels], float]:
        with self._lock:
            return dict(self._values)


def metrics_text(values: Mapping[Tuple[str, Labels], float]) -> str:
    """The text format of Prometheus, in the order of METRICS."""
    def line(name: str, labels: Labels, value: float) -> str:
        inside = ",".join('%s="%s"' % (key, re.sub(r'[\\"\n]', lambda found: {"\n": "\\n"}.get(found.group(), "\\" + found.group()), told))
                          for key, told in labels)
        return "%s%s %s\n" % (name, "{%s}" % inside if inside else "", repr(float(value)).replace(".0", "") if value % 1 == 0 else value)

    text = ""
    for metric in METRICS:
        names = [metric.name + end for end in ("_bucket", "_sum", "_count")] if metric.kind == "histogram" else [metric.name]
        text += "# HELP %s %s\n# TYPE %s %s\n" % (metric.name, metric.doc, metric.name, metric.kind)
        text += "".join(line(name, labels, value) for each in names for (name, labels), value in values.items() if name == each)
    return text


def escape_controls(text: str) -> str:
    """Text for a terminal: control characters, which could move the cursor or forge lines, become `?`; lines stay lines."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", "?", text)


# --- the CLI's words ---

SYSTEM_PROMPT = "You are Claude, a helpful assistant. Answer the user's message."
MINIMUM_CLI = (2, 0, 76)        # the first with --tools; older ones cannot be kept away from the owner's files
AGENT_MODEL_CLI = (2, 1, 197)   # from here on `initialize` can set the model; 2.1.50 takes full names for its default
JSON_SCHEMA_CLI = (2, 1, 197)   # before, an answer without the structure is asked for again without end
CLIENT_TOOLS_CLI = (2, 1, 197)     # what the client's tools were tried with
HISTORY_REPLAY_CLI = (2, 1, 197)          # before, an earlier message is asked again (2.1.50) or ends the process (2.0.76)
NEEDED_FLAGS = frozenset(("--tools", "--setting-sources", "--strict-mcp-config", "--input-format", "--permission-mode", "--resume",
                          "--session-id"))
OPTIONAL_FLAGS = frozenset(("--include-partial-messages", "--disable-slash-commands", "--no-session-persistence", "--agent"))
EFFORT_CLI = (2, 1, 330)        # before, an effort told to a process that is just starting may be lost
CONFINED_CLI = (2, 1, 330)      # from here on Glob stays in the workspace whatever its pattern; before, it can list names elsewhere
ALL_TOOLS = ("Bash", "Read", "Glob", "Grep", "Edit", "Write", "NotebookEdit", "WebFetch", "WebSearch", "Agent", "Task", "TaskOutput",
             "TaskStop", "TodoWrite")

# Variables of ours that never reach the CLI: they choose who pays, which server, model or prompt is used, or
# load code. Everything ANTHROPIC_* and CLAUDE* goes unless it is in the second list.
STRIPPED_ENV = re.compile(r"ANTHROPIC_.*|CLAUDE.*|CAB_.*|MAX_THINKING_TOKENS|OTEL_.*|NODE_OPTIONS|BUN_OPTIONS|ENABLE_CLAUDEAI_MCP_SERVERS|"
                      r"DISABLE_(?:TELEMETRY|AUTOUPDATER|ERROR_REPORTING)", re.IGNORECASE)
PASSED_ENV = frozenset(("ANTHROPIC_BASE_URL", "CLAUDE_CODE_OAUTH_TOKEN", "CLAUDE_CODE_GIT_BASH_PATH", "CLAUDE_CODE_CERT_STORE",
                       "CLAUDE_CODE_CLIENT_CERT", "CLAUDE_CODE_CLIENT_KEY", "CLAUDE_CODE_CLIENT_KEY_PASSPHRASE",
                       "CLAUDE_SECURESTORAGE_CONFIG_DIR"))
API_KEYS = frozenset(("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"))
MCP_SERVER = "api"              # as which the client's tools are offered
TOOL_PREFIX = "mcp__%s__" % MCP_SERVER


class Features(NamedTuple):
    """What one `claude` binary can do, from its --version and --help."""
    version: Tuple[int, ...]
    version_text: str
    flags: FrozenSet[str]
    has_auth: bool

    @classmethod
    def read(cls, version_text: str, help_text: str) -> "Features":
        found = re.search(r"(\d+)\.(\d+)\.(\d+)", version_text)
        return cls(tuple(int(part) for part in found.groups()) if found else (), version_text.strip()[:80],
                   frozenset(re.findall(r"--[a-z][a-z-]+", help_text)), bool(re.search(r"(?m)^\s+auth\b", help_text)))


@dataclass(frozen=True)
class SessionConfig:
    """What a child is told before the first prompt. Two turns can share a child only when their setups are equal."""
    system_prompt: str
    model: Optional[str] = None
    json_schema: Optional[str] = None
    effort: Optional[str] = None
    tools: Union[str, Tuple[str, ...]] = Tools.NONE
    workspace: Optional[str] = None
    client_tools: Tuple[Mapping[str, Any], ...] = ()      # the client's tools, as Chat has them


DEFAULT_SESSION = SessionConfig(SYSTEM_PROMPT)                           # of a request without settings of its own


def child_environment(environ: Mapping[str, str], allow_api_key: bool, isolated: Optional[str]) -> Dict[str, str]:
    """The environment of `claude`: ours without what could change who pays or what is asked, plus the switches
    that keep the owner's files out. isolated: its own config directory, or None to use the owner's.

    Source: measured on 2.0.76 to 2.1.330; CLAUDE_CODE_DISABLE_ATTACHMENTS is what makes @/path inert.
    """
    kept = {name: value for name, value in environ.items()
            if not STRIPPED_ENV.fullmatch(name) or name in PASSED_ENV or allow_api_key and name in API_KEYS}
    kept.update(CLAUDE_CODE_DISABLE_ATTACHMENTS="1", CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
                CLAUDE_CODE_DISABLE_TERMINAL_TITLE="1", CLAUDE_CODE_DISABLE_CLAUDE_MDS="1",
                CLAUDE_CODE_DISABLE_AUTO_MEMORY="1", CLAUDE_CODE_DISABLE_BACKGROUND_TASKS="1",
                ENABLE_CLAUDEAI_MCP_SERVERS="false", CLAUDE_CODE_MAX_RETRIES="4")
    owners = environ.get("CLAUDE_CONFIG_DIR", "")
    if isolated:
        kept.update(CLAUDE_CONFIG_DIR=isolated, CLAUDE_SECURESTORAGE_CONFIG_DIR=environ.get("CLAUDE_SECURESTORAGE_CONFIG_DIR", owners))
        kept["XDG_CACHE_HOME"] = isolated + "/cache"          # where it logs each call of a client's tool
    elif owners:
        kept["CLAUDE_CONFIG_DIR"] = owners
    return kept


def claude_argv(command: Sequence[str], features: Features, tools: Union[str, Tuple[str, ...]], session: Sequence[str] = ()) -> List[str]:
    """The command line of a child; nothing in it comes from a client. session: --session-id, --resume or nothing.

    --system-prompt-snapshot off: else 2.1.330 answers a resumed session under the system prompt of its first turn.
    """
    def known(*words: str) -> Sequence[str]:
        return words if words[0] in features.flags else ()

    return [*command, "-p", "--input-format", "stream-json", "--output-format", "stream-json", "--verbose",
            "--setting-sources", "", "--strict-mcp-config", *known("--include-partial-messages"), *known("--disable-slash-commands"),
            *tool_argv(features, tools), *known("--agent", "bridge"), *known("--system-prompt-snapshot", "off"),
            *(session or known("--no-session-persistence"))]


def tool_argv(features: Features, tools: Union[str, Tuple[str, ...]]) -> List[str]:
    """The flags of a tools level or of a list of rules: --tools says what exists, --allowedTools what needs no asking (and
    nobody is there to ask). Reading inside the workspace needs no rule.

    Source: each level tried on 2.1.50, 2.1.197 and 2.1.330 with calls inside, outside, by `..`, `~` and symlinks. A bare
    rule `Read` or `Write` would open the whole disk, so a bare name means the workspace; `Edit(...)` rules cover Write too.
    """
    allowed: Sequence[str] = ()
    mode = "dontAsk"
    if tools == Tools.READ:
        exist: Sequence[str] = ("Read", "Glob", "Grep")
    elif tools == Tools.WEB:
        exist = allowed = ("WebSearch", "WebFetch")
    elif tools == Tools.ALL:
        exist, allowed, mode = ALL_TOOLS, ("Bash", "WebFetch", "WebSearch"), "acceptEdits"
    else:
        rules = () if tools == Tools.NONE else tuple(tools)
        exist = sorted({rule.partition("(")[0] for rule in rules})
        allowed = sorted({"Edit(./**)" if rule in ("Edit", "Write", "NotebookEdit") else rule
                          for rule in rules if rule not in ("Read", "Glob", "Grep")})
    if features.version < CONFINED_CLI:
        exist = [name for name in exist if name != "Glob"]
    if features.version >= CLIENT_TOOLS_CLI:                     # nothing, until a request declares the client's tools
        allowed = (*allowed, TOOL_PREFIX.rstrip("_"))
    confined = ["--restricted"] if tools in (Tools.READ, Tools.ALL) and "--restricted" in features.flags else []
    return ["--tools", ",".join(exist), "--permission-mode", mode, *confined, *(("--allowedTools", *allowed) if allowed else ())]


def initialize_request(setup: SessionConfig, features: Features) -> List[Dict[str, Any]]:
    """The control requests that turn a fresh child into one for `setup`; the answer to the first has id "1"."""
    agent: Dict[str, Any] = {"description": "answers API requests", "prompt": setup.system_prompt}
    if setup.tools == Tools.NONE:
        agent["tools"] = [TOOL_PREFIX + each["name"] for each in setup.client_tools]
    by_agent = features.version >= AGENT_MODEL_CLI and "--agent" in features.flags
    if setup.model and by_agent:
        agent["model"] = setup.model
    request: Dict[str, Any] = {"subtype": "initialize", "hooks": None, "title": "api", "systemPrompt": setup.system_prompt,
                               "agents": {"bridge": agent}}
    if setup.json_schema:
        request["jsonSchema"] = json.loads(setup.json_schema)
    if setup.client_tools:
        request["sdkMcpServers"] = [MCP_SERVER]
    requests = [request]
    if setup.model and not by_agent:
        requests.append({"subtype": "set_model", "model": setup.model})
    if setup.effort and features.version >= EFFORT_CLI:
        requests.append({"subtype": "apply_flag_settings", "settings": {"effortLevel": setup.effort}})
    return [{"type": "control_request", "request_id": str(n), "request": body} for n, body in enumerate(requests, 1)]


def cli_message(role: str, content: Content) -> Dict[str, Any]:
    return {"type": role, "message": {"role": role, "content": [{"type": "text", "text": content}] if isinstance(content, str)
                                      else list(content)}}


def user_message(content: Content, asks: bool = True) -> Dict[str, Any]:
    """A prompt, or with asks=False an earlier one told again. A leading "/" of the last block would be taken as a command: a
    space in front makes it text (2.0.76 to 2.1.330; only the very first character counts)."""
    message = cli_message("user", content)
    last = message["message"]["content"][-1]
    if last["type"] == "text" and last["text"].startswith("/"):
        message["message"]["content"][-1] = {**last, "text": " " + last["text"]}
    return message if asks else {**message, "shouldQuery": False}


def assistant_message(content: Content, message_id: str = "") -> Dict[str, Any]:
    """An earlier answer told again; blank text would be refused by the API later. message_id: its own, else 2.1.197 makes one
    message of all that have tool calls."""
    message = cli_message("assistant", content if not isinstance(content, str) or content.strip() else "(no answer)")
    if message_id:
        message["message"]["id"] = message_id
    return message


def plain_text(content: Content) -> str:
    """Content for a reader of text alone: what is no text is named."""
    if isinstance(content, str):
        return content
    return "\n".join(block["text"] if block["type"] == "text" else "[%s: %s]" % (block["type"], as_json(
        block.get("input") or block.get("content"))) if block["type"].startswith("tool") else "[%s]" % block["type"] for block in content)


def prompt_with_history(system_prompt: str, history: Sequence[HistoryTurn]) -> str:
    """Instructions that tell what was said so far, for a CLI that cannot be told in turns."""
    turns = "".join("\n\nUser: %s\n\nYou: %s" % tuple(map(plain_text, exchange)) for exchange in history)
    return "%s\n\nThe conversation so far, which the next message continues:%s" % (system_prompt, turns)


# --- the client's tools, as a server of the Model Context Protocol ---

def truncate_descriptions(client_tools: Sequence[Mapping[str, Any]]) -> Tuple[Tuple[Mapping[str, Any], ...], str]:
    """The client's tools -> (the same, with descriptions that the CLI does not cut; instructions with those that are longer)."""
    told, more = [], ""
    for each in client_tools:
        text = each["description"]
        if len(text) > DESCRIPTION_CHARACTERS:
            more += "\n\nThe description of the tool %s%s:\n%s" % (TOOL_PREFIX, each["name"], text)
            text = text[:DESCRIPTION_CHARACTERS - 60] + "... (see the instructions for the whole description)"
        told.append({**each, "description": text})
    return tuple(told), more


def prefix_tool_names(turn: Mapping[str, Any]) -> List[Block]:
    """The content of a turn, in which calls have the names that the model knows."""
    return [{**block, "name": TOOL_PREFIX + block["name"]} if block["type"] == "tool_use" else block for block in turn["content"]]


def mcp_result(message: Mapping[str, Any], client_tools: Sequence[Mapping[str, Any]]) -> Dict[str, Any]:
    """What the server of the client's tools answers to a request of the CLI, but for calls."""
    method = message.get("method")
    if method == "initialize":
        return {"protocolVersion": (message.get("params") or {}).get("protocolVersion"), "capabilities": {"tools": {}},
                "serverInfo": {"name": MCP_SERVER, "version": __version__}}
    return {"tools": client_tools} if method == "tools/list" else {}


def mcp_content(block: Block) -> Optional[Dict[str, Any]]:
    """A tool_result as the answer to a call; None for one that the CLI would not hand on as it is."""
    content = block.get("content") or "(no result)"
    parts: List[Dict[str, Any]] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        source = part.get("source") or {}
        if part["type"] == "text":
            parts.append({"type": "text", "text": part["text"]})
        elif part["type"] == "image" and source.get("type") == "base64":
            parts.append({"type": "image", "data": source["data"], "mimeType": source["media_type"]})
        else:
            return None
    if sum(len(part.get("text", "")) for part in parts) > RESULT_CHARACTERS:
        return None
    return {"content": parts, "isError": bool(block.get("is_error"))}


def mcp_results(content: Content) -> Optional[Dict[str, Dict[str, Any]]]:
    """The answers in a turn that holds nothing but results of tools, by the id of the call; None for any other turn."""
    found: Dict[str, Dict[str, Any]] = {}
    for block in () if isinstance(content, str) else content:
        answer = mcp_content(block) if block["type"] == "tool_result" else None
        if answer is None:
            return None
        found[block["tool_use_id"]] = answer
    return found or None


# --- what the CLI says ---

class LineFramer:
    """Bytes in, whole lines out. Raises OverflowError for a line longer than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: List[bytes] = []
        self._held = 0

    def feed(self, data: bytes) -> List[bytes]:
        """The lines that `data` completes, without their ends; empty ones are left out."""
        *lines, rest = data.split(b"\n")
        if lines:
            lines[0] = b"".join(self._parts) + lines[0]
            self._parts, self._held = [], 0
        self._parts.append(rest)
        self._held += len(rest)
        if self._held > self._limit or any(len(line) > self._limit for line in lines):
            raise OverflowError("a line is longer than %d bytes" % self._limit)
        return [line.rstrip(b"\r") for line in lines if line.strip()]


class CliEvent(NamedTuple):
    """One line of the CLI. kind: init, delta, message, usage, stop, assistant, told, limits, retry, result, control, asks or noise.
    tools: the ids of the tool calls that begin (assistant) or end (told) with it."""
    kind: str
    body: Mapping[str, Any] = {}
    text: str = ""
    tools: Tuple[str, ...] = ()


def parse_cli_event(line: bytes) -> CliEvent:
    """What a line of `claude` says; debug output and unknown types are noise. Raises ValueError for broken JSON."""
    if not line.lstrip().startswith(b"{"):
        return CliEvent("noise")
    body = json.loads(line.decode("utf-8", "replace"))
    kind = body.get("type")
    if kind == "stream_event" and not body.get("parent_tool_use_id"):
        event = body.get("event") or {}
        delta = event.get("delta") or {}
        if event.get("type") == "content_block_delta" and delta.get("type") == "text_delta":
            return CliEvent("delta", body, str(delta.get("text") or ""))
        kinds = {"message_start": "message", "message_delta": "usage", "message_stop": "stop"}
        return CliEvent(kinds.get(str(event.get("type")), "noise"), body)
    if kind == "system":
        return CliEvent({"init": "init", "api_retry": "retry"}.get(str(body.get("subtype")), "noise"), body)
    if kind in ("assistant", "user"):
        content = (body.get("message") or {}).get("content")
        name, block_type, key = ("assistant", "tool_use", "id") if kind == "assistant" else ("told", "tool_result", "tool_use_id")
        blocks = [block for block in content if block.get("type") == block_type] if isinstance(content, list) else []
        return CliEvent(name, body, tools=tuple(str(block.get(key)) for block in blocks))
    names = {"result": "result", "control_response": "control", "control_request": "asks", "rate_limit_event": "limits"}
    return CliEvent(names.get(str(kind), "noise"), body)


def parse_rate_limits(body: Mapping[str, Any], now: float) -> RateLimitStatus:
    """The limits in a `rate_limit_event`. One without a type and a reset is no limit of the plan (any other 429 gives it).

    Source: seen on 2.1.50, 2.1.197 and 2.1.330, which alone tells all windows each time.
    """
    found = body.get("rate_limit_info")
    told: Mapping[str, Any] = found if isinstance(found, dict) else {}
    kind, status, resets_at = told.get("rateLimitType"), told.get("status"), number_or_none(told.get("resetsAt"))
    each = told.get("unifiedWindows")
    parts: Dict[str, Mapping[str, Any]] = {str(kind): told} if kind else {}
    parts.update((str(name), part) for name, part in (each.items() if isinstance(each, dict) else ()) if isinstance(part, dict))
    windows = []
    parts.pop("overage", None)
    for name, part in list(parts.items())[:10]:
        of_event = part.get("status") or (status if name == kind else None)
        windows.append(RateLimitWindow(replace_surrogates(name[:40]), replace_surrogates(str(of_event)[:40]) if of_event else None,
                                  number_or_none(part.get("utilization")), number_or_none(part.get("resetsAt")), now))
    is_using = told.get("isUsingOverage") is True
    resets = [window.resets_at or 0 for window in windows if (window.utilization or 0) >= 1]
    if kind != "overage" or not resets:
        resets.append(resets_at or 0)
    if windows or kind:      # extra usage is drawn on for as long as the plan gives nothing
        overage, until = ("in_use", max(resets)) if is_using else (told.get("overageStatus"), number_or_none(told.get("overageResetsAt")))
        windows.append(RateLimitWindow("overage", replace_surrogates(str(overage)[:40]) if overage else None, None, until or None, now))
    return RateLimitStatus(status == "rejected" and bool(kind or resets_at) and not is_using, is_using, max(resets) or None, tuple(windows),
                  str(kind).startswith("seven_day_"))


def number_or_none(value: Any) -> Optional[float]:
    """A number that can be a moment or a share; anything else, as NaN or a text, is none."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e11
    return float(value) if is_number else None


def limit_message(rest: Pause) -> str:
    return "The plan's limit is used up until %s." % iso_time(rest.until)


def pause_seconds(resets_at: Optional[float], now: float) -> float:
    """How long to rest for a limit that resets then. A reset that is not told, or long past (a wrong clock), is a guess."""
    if resets_at is None or resets_at < now - 60:
        return DEFAULT_PAUSE_SECONDS
    return min(max(resets_at - now, 5.0), LONGEST_PAUSE_SECONDS)


OVERLOADED = (500, 502, 503, 504, 529)


def classify_failure(result: Mapping[str, Any], said: str, limits: RateLimitStatus = RateLimitStatus()) -> RunFailed:
    """The outcome behind a `result` line that is an error. said: the `error` word of the last assistant line; limits: the
    last ones the process told.

    Source: the CLI's answers to each API error, seen on 2.1.197; statuses are missing up to 2.1.50.
    """
    text = str(result.get("result") or "; ".join(map(str, result.get("errors") or ())) or "claude failed: %s" % result.get("subtype"))
    told = re.match(r"API Error: (\d{3})\b", text)
    status = result.get("api_error_status") or (int(told.group(1)) if told else None)
    if said == "authentication_failed" or status in (401, 403) or re.match(r"Not logged in|Invalid API key|Failed to authenticate", text):
        return RunFailed("auth_required", text)
    if said == "rate_limit" or status == 429:
        is_plan = limits.is_used_up or not text.startswith("API Error")
        return RunFailed("usage_limit", text, limits.resets_at, limits.is_model_limit) if is_plan else RunFailed("overloaded", text)
    if said == "model_not_found" or status == 404 or text.startswith("There's an issue with the selected model"):
        return RunFailed("model_not_found", text)
    if status == 413 or result.get("terminal_reason") == "prompt_too_long" or text.startswith(("Prompt is too long", "Request too large")):
        return RunFailed("context_too_long", text)
    if status in OVERLOADED:
        return RunFailed("overloaded", text)
    return RunFailed("cli_error", text)


USAGE_NAMES = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


def turn_usage(result: Mapping[str, Any], spent_usd: float, told: Usage = Usage()) -> Tuple[Usage, float]:
    """-> (the figures of one turn, the cost so far). Tokens come per turn, of which a part may have been told at a call of a tool;
    the cost is the sum of the process, and with --resume of the session (2.1.330) or not (2.1.197): a sum below what was spent
    has begun anew."""
    used, total = token_counts(result.get("usage")), number_or_none(result.get("total_cost_usd")) or 0.0
    counts = [max(0, used.get(name, 0) - before) for name, before in zip(USAGE_NAMES, told)]
    return Usage(counts[0], counts[1], counts[2], counts[3], round(total - spent_usd if total >= spent_usd else total, 8)), total


def token_counts(used: Any) -> Dict[str, int]:
    """The counts in a `usage` of the Messages API, those that it has."""
    told = used if isinstance(used, dict) else {}
    found = {name: number_or_none(told.get(name)) for name in USAGE_NAMES}
    return {name: int(count) for name, count in found.items() if count is not None}


class Model(NamedTuple):
    """A model that may be asked for: an alias or a full name, and what people call it."""
    id: str
    name: str


def read_models(line: bytes) -> Tuple[Model, ...]:
    """The models in the CLI's answer to `initialize`: its aliases, then the full names behind them; none in any other line."""
    event = parse_cli_event(line)
    told = ((event.body.get("response") or {}).get("response") or {}).get("models") if event.kind == "control" else None
    found: Dict[str, str] = {}
    for key in ("value", "resolvedModel"):
        for each in told or ():
            found.setdefault(replace_surrogates(str(each.get(key) or each["value"])), replace_surrogates(str(each.get("displayName") or each["value"])))
    return tuple(Model(*pair) for pair in found.items())


class Login(NamedTuple):
    """Whose account `claude` uses. payer: in words; is_billed: by an API key, per token."""
    is_signed_in: bool
    billing_account: str
    is_billed_per_token: bool = False


def billing_account(status: Mapping[str, Any]) -> Login:
    """What `claude auth status` says about the bill: an apiKeySource means an API key, whatever else it says."""
    if not status.get("loggedIn"):
        return Login(False, "nobody: claude is not signed in")
    source = status.get("apiKeySource")
    if source and source != "none":
        return Login(True, "an API key (%s)" % redact(str(source)), True)
    if status.get("subscriptionType"):
        return Login(True, "Claude %s subscription" % str(status["subscriptionType"]).replace("_", " ").title())
    if status.get("authMethod") == "oauth_token":
        return Login(True, "the subscription behind CLAUDE_CODE_OAUTH_TOKEN")
    return Login(True, "the login of claude (%s)" % (status.get("authMethod") or "unknown method"))


# --- cloudflared's words ---

CLOUDFLARED_VERSION = "2026.8.2"


class Asset(NamedTuple):
    """A file of cloudflared's release. sha256: of the file; program_sha256: of the program in it, where it is an archive."""
    name: str
    size: int
    sha256: str
    program_sha256: str = ""


# Source: three independent lists of hashes made by other projects' automation; linux-386 and linux-arm by one.
ASSETS = {
    "linux-amd64": Asset("cloudflared-linux-amd64", 39_799_316, "fcfb02b575a52ca1af2e3267af4e1517bcdeb30ac48c834c69abaed3c0576ad2"),
    "linux-arm64": Asset("cloudflared-linux-arm64", 37_404_344, "7747d94570fb390cf47dcb4f9555c193c6355cda9793f0d878d9049e5d6a7790"),
    "linux-386": Asset("cloudflared-linux-386", 37_102_345, "39845d980a4b74b9c84530a28d8fea1fe6c476de26460275602162b349f1cbef"),
    "linux-arm": Asset("cloudflared-linux-arm", 36_288_720, "19809425f60a6261241dfa66a42b4115bab07c295396a3c4d5d7c247fc4e1412"),
    "darwin-amd64": Asset("cloudflared-darwin-amd64.tgz", 21_116_242, "f1727723c586500e2092368ae21871b3df7ddfd2cb097f22d81bee4a9c458bb4",
                          "b0f770e1e0b281399a57219b840fd8eef1cc25387a404124248157ea2073727a"),
    "darwin-arm64": Asset("cloudflared-darwin-arm64.tgz", 19_214_189, "9042c2c5d8b2de78e60f313d5fb31b6c5c1cebde787a3caf1f2c9588084ac442",
                          "b61054d3d6326ea558cb49826eebf5676e0d0a36d51b546975096ca3e0e3c89d"),
    "windows-amd64": Asset("cloudflared-windows-amd64.exe", 54_893_480, "c29eee2b121f5436a642eed69fd9767da7e7b8c510fa50aaa130337f931357b5"),
    "windows-386": Asset("cloudflared-windows-386.exe", 37_369_480, "6acb072357618fa16c53c43e05438ed728aacd47119f1c6c3aa1a668c3299b43"),
}
PROCESSORS = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64", "i386": "386", "i486": "386", "i586": "386",
              "i686": "386", "x86": "386", "armv6l": "arm", "armv7l": "arm", "armv8l": "arm"}


def cloudflared_asset(system: str, machine: str) -> Optional[Asset]:
    """The file for this system and processor, as `platform` names them; None where there is none. Windows on ARM emulates."""
    processor = PROCESSORS.get(machine.lower(), "")
    if system.lower() == "windows" and processor == "arm64":
        processor = "amd64"
    return ASSETS.get("%s-%s" % (system.lower(), processor))


def tunnel_argv(program: str, config_file: str, origin: str, protocol: str, is_named: bool) -> List[str]:
    """The command line of cloudflared. config_file: an empty one, else the owner's would answer in our place; origin: our own
    address; protocol: quic, http2, or auto for a named tunnel, which changes it by itself.

    Source: every flag run on 2026.8.2; a flag that an older one does not know would end it with status 0.
    """
    argv = [program, "tunnel", "--config", config_file, "--no-autoupdate", "--metrics", "127.0.0.1:0", "--grace-period", "5s"]
    if protocol != "auto":
        argv += ["--protocol", protocol]
    return argv + (["run"] if is_named else ["--url", origin])


def tunnel_environment(environ: Mapping[str, str], token: str) -> Dict[str, str]:
    """The environment of cloudflared: what any program needs of ours, so that nobody's secrets and no settings come along."""
    needed = re.compile(r"PATH|HOME|USER|USERPROFILE|LANG|LC_\w+|TZ|TMPDIR|TEMP|TMP|SYSTEMROOT|WINDIR|(LOCAL)?APPDATA|SSL_CERT_\w+",
                        re.IGNORECASE)
    kept = {name: value for name, value in environ.items() if needed.fullmatch(name)}
    return {**kept, "TUNNEL_TOKEN": token} if token else kept


def check_tunnel_token(text: str) -> str:
    """The token of a named tunnel. Raises WrongSetting, without repeating it."""
    try:
        parts = json.loads(base64.b64decode(text.strip(), validate=True))
        if all(isinstance(parts[name], str) for name in "ats"):
            return text.strip()
    except (ValueError, KeyError, TypeError):
        pass
    raise WrongSetting("The tunnel token is not one: copy the long text that starts with eyJ from the tunnel's page, all of it.")


QUICK_HOST = re.compile(r"(?!api\.)[a-z0-9-]+\.trycloudflare\.com")


def parse_tunnel_line(line: str) -> Tuple[str, str]:
    """What a line of cloudflared's log tells: ("host", name), ("metrics", "127.0.0.1:39911") or ("", "").

    Source: the log of 2026.8.2. Other addresses stand in it, api.trycloudflare.com in its error lines, and healthy starts have ERR lines.
    """
    found = re.search(r"\|\s+https://(%s)\s+\|" % QUICK_HOST.pattern, line)
    if found:
        return "host", found.group(1)
    found = re.search(r"Starting metrics server on (127\.0\.0\.1:\d+)/metrics", line)
    return ("metrics", found.group(1)) if found else ("", "")


def hosts_in_ingress(config: Any, port: int, origin: str = "") -> Tuple[List[str], List[str]]:
    """What a named tunnel's configuration sends to our port, or to our address. -> (host names, all rules as "host -> service");
    nothing while it waits for the one from Cloudflare (version -1)."""
    try:
        ingress = config["config"]["ingress"] if config["version"] >= 0 else ()
        rules = [(str(rule.get("hostname") or "*"), str(rule.get("service"))) for rule in ingress]
    except (KeyError, TypeError, AttributeError):
        return [], []
    ours = ["http://%s:%d" % (host, port) for host in ("localhost", "127.0.0.1", "[::1]")] + [origin]
    return [host for host, service in rules if "*" not in host and service.rstrip("/") in ours], ["%s -> %s" % rule for rule in rules]


class TunnelStatus(NamedTuple):
    """What was seen of cloudflared. is_ended: it exited, with these words; is_hopeless: trying again will not help;
    has_host: the address is known; is_ready: it is connected."""
    is_ended: bool = False
    is_hopeless: bool = False
    has_host: bool = False
    is_ready: bool = False
    words: str = ""


class TunnelPolicy:
    """When cloudflared is started, given up and tried again. Pure: it is told the time, and what was seen.

    protocols: to try in turn, the best first. jitter: 0 to 1, so that many bridges do not come back at once.
    """

    def __init__(self, protocols: Sequence[str], is_named: bool = False, jitter: Callable[[], float] = random.random) -> None:
        self._protocols, self._is_named, self._jitter = list(protocols), is_named, jitter
        self._at = 0.0                           # since when the present step goes on
        self._has_host = False
        self._down_at: Optional[float] = None    # since when a running tunnel has no connection
        self._tries = 0                          # protocols tried in this round
        self._failures = 0
        self.state = TunnelState.STOPPED
        self.retry_at = 0.0
        self.why = ""                            # the last failure
        self.protocol = self._protocols[0]

    def start(self, now: float) -> str:
        self._tries = 0
        return self._begin(now)

    def _begin(self, now: float) -> str:
        self.protocol = self._protocols[self._tries % len(self._protocols)]
        self._tries += 1
        self.state, self._has_host, self._down_at = TunnelState.STARTING, False, None
        self.began(now)
        return "start"

    def began(self, now: float) -> None:
        """cloudflared was started; what went before, as a download, does not count."""
        self._at = now

    def step(self, now: float, sight: TunnelStatus) -> str:
        """-> what to do: "start", "stop" (cloudflared, perhaps to start it anew later) or nothing."""
        if self.state == TunnelState.BACKOFF and now >= self.retry_at:
            return self.start(now)
        if self.state not in (TunnelState.STARTING, TunnelState.RUNNING):
            return ""
        if sight.is_hopeless:
            self.state, self.why = TunnelState.FATAL, sight.words
            return "stop"
        if sight.is_ended:
            return self._rest(now, sight.words)
        if sight.is_ready and sight.has_host:
            if self.state == TunnelState.STARTING:
                self._protocols.sort(key=lambda each: each != self.protocol)
                self.state, self._at, self.why = TunnelState.RUNNING, now, ""
            self._down_at = None
            return ""
        if self.state == TunnelState.STARTING:
            return self._wait(now, sight)
        self._down_at = now if self._down_at is None else self._down_at
        return "" if now - self._down_at < DOWN_SECONDS else self._rest(now, "the connection was lost for %d s" % DOWN_SECONDS)

    def _wait(self, now: float, sight: TunnelStatus) -> str:
        """Not connected yet: how long is it given?"""
        is_last = self._tries >= len(self._protocols)
        limit = NAMED_CONNECT_SECONDS if self._is_named else LAST_CONNECT_SECONDS if is_last else CONNECT_SECONDS
        if sight.has_host and not self._has_host:
            self._has_host, self._at = True, now             # from now on it is the connection that is waited for
        if not sight.has_host:
            return "" if now - self._at < ADDRESS_SECONDS else self._rest(now, "no address within %d s" % ADDRESS_SECONDS)
        if now - self._at < limit:
            return ""
        self.why = "no connection by %s within %d s; outbound TCP or UDP to port 7844 is needed" % (self.protocol, limit)
        return self._begin(now) if not is_last and not self._is_named else self._rest(now, self.why)

    def _rest(self, now: float, why: str) -> str:
        """Back off: longer after each failure, and long at once where Cloudflare said that it was too often."""
        if self.state == TunnelState.RUNNING and now - self._at >= STEADY_SECONDS:
            self._failures = 0
        if re.search(r"\b429\b|\b1015\b", why):
            self._failures = max(self._failures, 3)
        seconds = TUNNEL_BACK_OFF_SECONDS[min(self._failures, len(TUNNEL_BACK_OFF_SECONDS) - 1)]
        self._failures += 1
        self.state, self.why, self.retry_at = TunnelState.BACKOFF, why, now + seconds * (0.8 + 0.4 * self._jitter())
        return "stop"


# --- the words of a stream ---

class JobEvent(NamedTuple):
    """One step of a job, as a reader is told it. kind: queued, started, delta, completed, error or quiet (nothing new for a
    while); offset: where the text ends after it, in code points. A 0 (queued, started) says that the text begins (anew)."""
    kind: str
    offset: int = 0
    text: str = ""
    model: Optional[str] = None


def cut_at_stop(text: str, stop_sequences: Sequence[str]) -> Tuple[str, Optional[str]]:
    """-> (the text before the stop sequence that is complete first, and that one; or all of it and None)."""
    found = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stop_sequences if stop in text]
    return (text[:min(found)[0] + min(found)[1]], min(found)[2]) if found else (text, None)


def possible_stop(text: str, stop_sequences: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop sequence."""
    return max((size for stop in stop_sequences for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)


class TextCursor:
    """A reader's place in an answer's text; after: what the reader has. An offset in a text that began anew since means
    nothing, so that such a reader is told all of it, after a `started`."""

    def __init__(self, after: int) -> None:
        self.generation, self.offset = 0 if after else -1, after

    def reset(self) -> None:
        self.generation, self.offset = -1, 0

    def read(self, generation: int, rest: Callable[[int], str], model: Optional[str]) -> Iterator[JobEvent]:
        """What is new in a text. restarts: how often that text began anew; rest: reads it from an offset on, or
        a part of that."""
        if generation != self.generation:
            self.generation, self.offset = generation, 0
            yield JobEvent("started", 0, model=model)
        text = rest(self.offset)
        while text:
            for start in range(0, len(text), DELTA_CHARACTERS):
                piece = text[start:start + DELTA_CHARACTERS]
                self.offset += len(piece)
                yield JobEvent("delta", self.offset, piece)
            text = rest(self.offset)


class LiveText:
    """The text of a running answer so far, in code points. Written by the worker, read from any thread.

    restarts: how often the text began anew, in this run and before; changed: called after each change; stops: ends of the text,
    of which `stopped_by` is the one that was met.
    """

    def __init__(self, generation: int = 0, changed: Callable[[], None] = lambda: None, stop_sequences: Sequence[str] = ()) -> None:
        self._lock = threading.RLock()
        self._changed = changed
        self._parts: List[str] = []
        self._ends: List[int] = []           # where each part ends
        self._joined = 0                     # so many parts are large
        self._held = ""                      # half a character or stop sequence, which may go on with the next delta
        self.stop_sequences = stop_sequences
        self.stopped_by: Optional[str] = None
        self._is_begun = False
        self.size = 0                        # bytes that came, of all tries
        self.generation = generation
        self.model: Optional[str] = None
        self.rest: Optional[Pause] = None     # why nothing comes for a while

    def begin(self, model: Optional[str]) -> None:
        """Claude has taken the prompt."""
        self.model, self.rest, self._is_begun = model, None, True
        self._changed()

    def add(self, text: str) -> None:
        text = self._held + text
        if self.stop_sequences and not text.isascii():                # two halves become one character
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        text, self.stopped_by = cut_at_stop(text, self.stop_sequences)
        half = int("\ud800" <= text[-1:] <= "\udbff")
        held = 0 if self.stopped_by else half + possible_stop(text[:len(text) - half], self.stop_sequences)
        text, self._held = text[:len(text) - held], text[len(text) - held:]
        self._append(text)
        self._changed()

    def _append(self, text: str) -> None:
        text = replace_surrogates(text)
        with self._lock:
            self._is_begun = True
            if text:
                self._parts.append(text)
                self._ends.append(len(text) + (self._ends[-1] if self._ends else 0))
                self.size += len(text.encode())
                if len(self._parts) - self._joined >= 1024:      # a part costs far more memory than its few letters
                    self._parts[self._joined:] = ["".join(self._parts[self._joined:])]
                    self._ends[self._joined:] = self._ends[-1:]
                    self._joined += 1

    def restart(self) -> None:
        """A new message begins: what was said before belonged to a tool call or to a broken-off try."""
        with self._lock:
            self.generation += bool(self._parts)
            self._parts, self._ends, self._joined, self._held = [], [], 0, ""

    def pause(self, rest: Pause) -> None:
        """Nothing comes until then; what came is void."""
        self.restart()
        self.rest = rest
        self._changed()

    def finish(self, text: str) -> None:
        """The whole text is known: adds what was not heard, or all of it where something else was heard."""
        self._held = ""
        heard = self.read()
        if not text.startswith(heard):
            self.restart()
            heard = ""
        self._append(text[len(heard):])
        self._changed()

    def read(self, offset: int = 0, count: int = OUTPUT_BYTES) -> str:
        """The text from an offset on, as far as it has come; a little more than `count` of it at most."""
        with self._lock:
            first, last = bisect_right(self._ends, offset), bisect_right(self._ends, offset + count)
            before = self._ends[first - 1] if first else 0
            return "".join(self._parts[first:last + 1])[offset - before:]

    def events_since(self, cursor: TextCursor) -> List[JobEvent]:
        """What a reader has not been told yet, at most NEWS events of it."""
        with self._lock:
            told = cursor.read(self.generation, lambda offset: self.read(offset, TEXT_CHARACTERS), self.model)
            return list(islice(told, EVENT_BATCH)) if self._is_begun else []


def sse_event(kind: str, offset: Optional[int], data: Mapping[str, Any]) -> bytes:
    """One Server-Sent Event; kind and offset, which becomes its id, may be missing ("", None). The line ends that some readers see
    where the standard has none are escaped."""
    line = as_json(data).replace("\x85", "\\u0085").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    head = "" if offset is None else "id: %d\n" % offset
    return (head + ("event: %s\n" % kind if kind else "") + "data: %s\n\n" % line).encode("utf-8", "replace")


# === 5 Store ==================================================================================================
# The only SQLite. One connection behind one lock, used from any thread; records go in and out, never rows.
# Commits are on disk when a method returns (synchronous=FULL). Read MIGRATIONS first.

# Version 0 is the database of the Node original, or an empty file: its tables are made where they are missing,
# then both are brought to version 1. Statements only add to this list; a step that has shipped never changes.
MIGRATIONS: Tuple[Tuple[str, ...], ...] = (
    (
        "CREATE TABLE IF NOT EXISTS tokens (id TEXT PRIMARY KEY, name TEXT NOT NULL, token_hash TEXT UNIQUE NOT NULL,"
        " token_prefix TEXT NOT NULL, session_mode TEXT NOT NULL, expires_at INTEGER, created_at INTEGER NOT NULL,"
        " last_used_at INTEGER, is_admin INTEGER NOT NULL DEFAULT 0)",
        "CREATE TABLE IF NOT EXISTS requests (id TEXT PRIMARY KEY, token_id TEXT, message TEXT, response TEXT, status TEXT,"
        " session_id TEXT, created_at INTEGER, completed_at INTEGER, error TEXT)",
        "CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, token_id TEXT, claude_session_id TEXT, working_dir TEXT,"
        " created_at INTEGER, last_used_at INTEGER)",
        "ALTER TABLE tokens ADD COLUMN tools TEXT NOT NULL DEFAULT '\"none\"'",
        "ALTER TABLE tokens ADD COLUMN workspace TEXT",
        "CREATE TABLE jobs (seq INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL,"
        " token_id TEXT NOT NULL REFERENCES tokens(id) ON DELETE CASCADE, status TEXT NOT NULL, message TEXT NOT NULL,"
        " created_at REAL NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, model TEXT, system_prompt TEXT, json_schema TEXT,"
        " conversation TEXT, effort TEXT, started_at REAL, completed_at REAL, response TEXT, structured TEXT, usage TEXT,"
        " error TEXT, error_code TEXT)",
        "CREATE TABLE conversations (token_id TEXT NOT NULL REFERENCES tokens(id) ON DELETE CASCADE, name TEXT NOT NULL,"
        " session_id TEXT, spent_usd REAL NOT NULL DEFAULT 0, created_at REAL NOT NULL, last_used_at REAL NOT NULL,"
        " PRIMARY KEY (token_id, name))",
        # The asks of a stateful token of the original are one conversation. Its session belongs to another folder
        # of the CLI, so it is continued from what was stored.
        "INSERT INTO jobs (id, token_id, status, message, created_at, conversation, completed_at, response, error, error_code)"
        " SELECT r.id, r.token_id, CASE r.status WHEN 'processing' THEN 'queued' ELSE r.status END, r.message, r.created_at,"
        " CASE t.session_mode WHEN 'stateful' THEN 'default' END, r.completed_at, r.response, r.error,"
        " CASE r.status WHEN 'error' THEN 'cli_error' END"
        " FROM requests r JOIN tokens t ON t.id = r.token_id"
        " WHERE r.message IS NOT NULL AND r.status IN ('queued', 'processing', 'completed', 'error') ORDER BY r.created_at, r.rowid",
        "INSERT INTO conversations (token_id, name, created_at, last_used_at)"
        " SELECT s.token_id, 'default', min(s.created_at), max(coalesce(s.last_used_at, s.created_at))"
        " FROM sessions s JOIN tokens t ON t.id = s.token_id AND t.session_mode = 'stateful' GROUP BY s.token_id",
        "DROP TABLE requests",
        "DROP TABLE sessions",
        "CREATE INDEX jobs_by_status ON jobs (status, seq)",
        "CREATE INDEX jobs_by_token ON jobs (token_id, conversation, seq)",
        "CREATE TABLE children (pid INTEGER PRIMARY KEY, started TEXT NOT NULL)",
    ),
    (
        "ALTER TABLE tokens ADD COLUMN requests_per_minute INTEGER",
        "ALTER TABLE tokens ADD COLUMN requests_per_day INTEGER",
        "ALTER TABLE tokens ADD COLUMN models TEXT",
        "ALTER TABLE jobs ADD COLUMN restarts INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE jobs ADD COLUMN idempotency_key TEXT",
        "ALTER TABLE jobs ADD COLUMN fingerprint TEXT",
        "CREATE UNIQUE INDEX jobs_by_key ON jobs (token_id, idempotency_key)",
        "CREATE INDEX jobs_of_token ON jobs (token_id, seq)",
        "ALTER TABLE conversations ADD COLUMN key TEXT",
        "UPDATE conversations SET key = lower(hex(randomblob(16)))",
        # No reference to tokens: what a revoked one used stays in the sums.
        "CREATE TABLE usage (day TEXT NOT NULL, token_id TEXT NOT NULL, requests INTEGER NOT NULL DEFAULT 0,"
        " completed INTEGER NOT NULL DEFAULT 0, errors INTEGER NOT NULL DEFAULT 0, input_tokens INTEGER NOT NULL DEFAULT 0,"
        " output_tokens INTEGER NOT NULL DEFAULT 0, cache_read_tokens INTEGER NOT NULL DEFAULT 0,"
        " cache_creation_tokens INTEGER NOT NULL DEFAULT 0, cost_usd REAL NOT NULL DEFAULT 0, PRIMARY KEY (day, token_id))",
        "INSERT INTO usage (day, token_id, requests, completed, errors) SELECT date(created_at, 'unixepoch'), token_id, count(*),"
        " sum(status = 'completed'), sum(status = 'error') FROM jobs GROUP BY 1, 2",
        "CREATE TABLE plan (kind TEXT PRIMARY KEY, status TEXT, utilization REAL, resets_at REAL, seen_at REAL NOT NULL)",
    ),
    (
        "ALTER TABLE children ADD COLUMN program TEXT",
        "CREATE TABLE remembered (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    ),
    (
        # chat: what was asked over /v1, while it is wanted; ending: how its answer ended.
        "ALTER TABLE jobs ADD COLUMN chat TEXT",
        "ALTER TABLE jobs ADD COLUMN ending TEXT",
        "ALTER TABLE jobs ADD COLUMN api TEXT",
    ),
)

DATA_NAMES = ("bridge.db", "bridge.db-wal", "bridge.db-shm", "bridge.db-journal", "bridge-original.db", "bridge.lock", "ask-tokens.json",
              "cloudflared.yml", "claude-home", "bin", "work", "workspaces")
SQLITE_VERSION = sqlite3.sqlite_version
JOB_FIELDS = tuple(row.name for row in fields(Job))
JOB_COLUMN_OF = {"generation": "restarts", "stop_info": "ending"}
JOB_COLUMNS = ", ".join(JOB_COLUMN_OF.get(name, name) for name in JOB_FIELDS)
BLANKED_COLUMNS = {"message": "''", **dict.fromkeys(("response", "structured", "stop_info", "system_prompt", "json_schema"), "NULL")}
SUMMARY_COLUMNS = ", ".join(BLANKED_COLUMNS.get(name, JOB_COLUMN_OF.get(name, name)) for name in JOB_FIELDS)
TOKEN_COLUMNS = ("id, name, token_prefix, session_mode, expires_at, created_at, last_used_at, is_admin, tools, workspace,"
                 " requests_per_minute, requests_per_day, models")


def private_directory(path: Path) -> Path:
    """Makes the directory, readable by the owner only. Raises CannotStart."""
    try:
        for each in (*reversed(path.parents), path):      # parents=True would make them by the umask alone
            each.mkdir(mode=0o700, exist_ok=True)
        if os.name == "posix":
            if path.stat().st_mode & stat.S_ISVTX:
                raise PermissionError(errno.EPERM, "all users share it")     # as /tmp: to close it would break their programs
            path.chmod(0o700)
    except OSError as error:
        raise CannotStart("The folder %s cannot be used: %s." % (path, error.strerror or error),
                          "make it writable, or choose another one with --data-dir") from None
    return path


def find_foreign_files(folder: Path) -> Optional[str]:
    """What lies in the place of a file of ours but is none: a link, which would take what we write elsewhere, or another user's."""
    for name in DATA_NAMES:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = os.lstat(folder / name)
            if stat.S_ISLNK(found.st_mode):
                return "%s is a link" % (folder / name)
            if os.name == "posix" and found.st_uid != os.geteuid() != 0:
                return "%s belongs to another user" % (folder / name)
    return None


def data_directory(path: Path) -> Path:
    """The data directory, closed to others before it is looked at. It may be a link itself, by its owner's choice. Raises CannotStart."""
    planted = find_foreign_files(private_directory(path))
    if planted:
        raise CannotStart("The folder %s cannot be used: %s." % (path, planted), "move that away, or choose another folder with --data-dir")
    return path


def write_file_atomically(path: Path, text: str) -> None:
    """Puts a file in place, whole or not at all, readable by the owner only. Raises OSError."""
    handle, part = tempfile.mkstemp(prefix=path.name + ".", suffix=".part", dir=str(path.parent))
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def is_corrupt(error: BaseException) -> bool:
    """Whether SQLite says that a file is broken or no database; for a full disk, a lock or missing rights it raises a class below."""
    return type(error) is sqlite3.DatabaseError


def quarantine_database(path: Path, now: float) -> Path:
    """Renames a damaged database with what belongs to it, so that a new one can begin. -> its new name. Raises CannotStart."""
    stem, n = "%s-damaged-%s" % (path.stem, day_of(now)), 1
    kept = path.with_name(stem + path.suffix)
    while kept.exists():
        n += 1
        kept = path.with_name("%s-%d%s" % (stem, n, path.suffix))
    try:
        for end in ("-wal", "-shm", ""):                 # the database last: as long as it is there, the next start does the rest
            if path.with_name(path.name + end).exists():
                os.replace(path.with_name(path.name + end), kept.with_name(kept.name + end))
    except OSError as error:
        raise CannotStart("The damaged database %s cannot be renamed: %s." % (path, error.strerror), "move it away yourself") from None
    return kept


def placeholders(values: Sequence[Any]) -> str:
    """The place holders of a list in a statement."""
    return ", ".join("?" * len(values))


class DatabaseInfo(NamedTuple):
    """What a database tells to one who only looks. fault: what is wrong with it, None for a good one, or none; latest: when its newest
    request was made; children: those of the last bridge, as `Store.children` tells them."""
    fault: Optional[str] = None
    latest: float = 0.0
    children: Sequence[Tuple[int, str, Optional[str]]] = ()


def inspect_database(path: Path) -> DatabaseInfo:
    """Looks at a database without changing it."""
    if not path.exists():
        return DatabaseInfo()
    try:
        with contextlib.closing(sqlite3.connect("file:%s?mode=ro" % quote(str(path)), uri=True)) as db:
            found = str(db.execute("PRAGMA quick_check(1)").fetchone()[0])
            version = int(db.execute("PRAGMA user_version").fetchone()[0])
            if version > len(MIGRATIONS):
                found = "it was written by a newer version of this program"
            if found == "ok":
                is_ours = version >= 3
                latest = db.execute("SELECT max(created_at) FROM jobs").fetchone()[0] if is_ours else 0
                return DatabaseInfo(None, latest or 0.0, db.execute("SELECT pid, started, program FROM children").fetchall() if is_ours else ())
    except sqlite3.Error as error:
        found = str(error)
    return DatabaseInfo("The database %s cannot be used: %s" % (path, found))


Read = TypeVar("Read")


class WriteTask:
    """A transaction on its way to the thread "writer". act: what to do; claim: taken by the writer who begins it, or by the caller who
    gives it up, whoever is first; done: set once it is on disk, or has failed with `error`."""

    def __init__(self, act: Callable[[sqlite3.Connection], Any]) -> None:
        self.act, self.claim, self.done = act, threading.Lock(), threading.Event()
        self.result: Any = None
        self.error: Optional[BaseException] = None


def transaction(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the Store that writes. It is given the connection, runs in the writer's thread, and what it did is on disk on return."""
    @wraps(method)
    def write(self: "Store", *args: Any, **more: Any) -> Any:
        return self._write(WriteTask(lambda db: method(self, db, *args, **more)))
    return write


class Database:
    """Owns bridge.db: a connection that only reads, so that no reader waits for a disk or for another program's lock, and one that
    writes, in the thread "writer": what many callers wrote meanwhile is brought to disk by one commit (Source: measured, with a disk
    that takes 2 ms for each this is 5 to 8 times as fast). Any thread; `close` it last. tally: is told of what was accepted and finished.
    """

    def __init__(self, path: Path, clock: Clock, metrics: Optional[Metrics] = None) -> None:
        self._clock, self._metrics, self._path = clock, metrics or Metrics(), path
        self._place, self._checked_at = 0, float("-inf")     # the file's number, 0 while that is not known; of `check_writable`
        self._write_queue: "queue.SimpleQueue[Optional[Write]]" = queue.SimpleQueue()
        self._writer_thread = threading.Thread(target=self._execute_writes, name="writer", daemon=True)
        self._last_used_written_at: Dict[str, float] = {}                 # token -> when its use was noted last
        self._cache: Dict[Any, Any] = {}
        self._token_cache: Dict[Tuple[str, str], Optional[Token]] = {}      # also over our own changes of anything else
        self._tokens_dirty = False                     # by what is being written
        self._cached_data_version, self._look_at = 0, float("-inf")
        self._is_closed = False
        self._read_lock = threading.Lock()
        self._large = threading.Lock()                       # one large answer is read at a time, so that small ones come between
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._db, self._reader = (sqlite3.connect(str(path), timeout=WRITE_SECONDS, isolation_level=None, check_same_thread=False)
                                      for _ in range(2))
        except (OSError, sqlite3.Error) as error:
            raise CannotStart("The database %s cannot be opened: %s." % (path, error),
                              "make it writable, or choose another folder with --data-dir") from None
        try:
            self._open(path)
            self._writer_thread.start()
        except (sqlite3.Error, Unavailable) as error:
            self.close()
            text, broken = "The database %s cannot be used: %s." % (path, error), is_corrupt(error.__cause__ or error)
            raise (DatabaseCorrupt(text, "start the bridge: it keeps the file aside and begins a new one") if broken else CannotStart(
                text, "make room on the disk, or end the program that uses the file")) from None
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        for file in (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")):
            if os.name == "posix" and file.exists():
                file.chmod(0o600)
        version = self._version()
        if version > len(MIGRATIONS):
            raise CannotStart("The database %s was written by a newer version of this program." % path, "use that version")
        found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(found)
        if version == 0 and self._db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'requests'").fetchone()[0]:
            self._keep_copy(path.with_name("bridge-original.db"))
        self._use_wal()
        self._db.execute("PRAGMA synchronous=FULL")
        with self._transaction():
            for statement in (line for step in MIGRATIONS[self._version():] for line in step):
                self._db.execute(statement)
            self._db.execute("PRAGMA user_version = %d" % len(MIGRATIONS))
        self._db.execute("PRAGMA foreign_keys=ON")
        self._reader.execute("PRAGMA query_only=ON")

    def _use_wal(self) -> None:
        """Waits for whoever else is writing (two commands on a new folder): for this statement alone SQLite does not."""
        for _ in range(200):
            try:
                return self._db.execute("PRAGMA journal_mode=WAL").close()
            except sqlite3.OperationalError:
                time.sleep(0.05)
        self._db.execute("PRAGMA journal_mode=WAL")

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    def _keep_copy(self, path: Path) -> None:
        """The original's database as it was, beside ours: the change of form cannot lose anything."""
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        with contextlib.closing(sqlite3.connect(str(path))) as copy:
            self._db.backup(copy)

    def close(self) -> None:
        """What was given to the writer before is written. Idempotent."""
        self._is_closed = True
        if self._writer_thread.ident:
            self._write_queue.put(None)
            self._writer_thread.join()
        with self._read_lock:
            self._reader.close()
            self._db.close()

    @staticmethod
    def _told(error: BaseException) -> BaseException:
        """A full disk, a locked or broken file becomes an answer that says so; a new one for each caller."""
        if isinstance(error, Unavailable):
            return Unavailable(str(error))
        if is_corrupt(error):
            return Unavailable("The database is damaged (%s). Restart the bridge: it keeps the file aside." % error)
        if isinstance(error, sqlite3.OperationalError):
            return Unavailable("The database cannot be used now (%s). Try again in a few seconds." % error, (("Retry-After", "5"),))
        return error

    # --- writing ---

    def _write(self, write: WriteTask, wait_seconds: Optional[float] = None) -> Any:
        """Has it written. wait_seconds: for those who write before, and for the lock of another program."""
        if self._is_closed:
            raise self._told(sqlite3.OperationalError("it is closed"))
        self._write_queue.put(write)
        if not write.done.wait(WRITE_SECONDS if wait_seconds is None else wait_seconds):
            if write.claim.acquire(blocking=False):
                raise self._told(sqlite3.OperationalError("it is busy, or locked by another program"))
            write.done.wait()                              # it was begun: the end is near
        if write.error:
            raise write.error
        return write.result

    def _execute_writes(self) -> None:
        """The thread "writer": all that waits is one transaction."""
        is_open = True
        while is_open:
            batch = [self._write_queue.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < WRITES:
                    batch.append(self._write_queue.get_nowait())
            is_open = None not in batch
            writes = [write for write in batch if write]
            try:
                self._run_batch(writes)
            except Exception as error:                       # of all: the disk is full, or the file locked or gone
                for write in writes:
                    write.error = write.error or self._told(error)
            self._cache = {}
            if self._tokens_dirty:
                self._tokens_dirty, self._token_cache = False, {}
            for write in writes:
                write.done.set()

    def _run_batch(self, writes: Sequence[WriteTask]) -> None:
        """What one of them did before it failed is undone; the others are stored."""
        self._check_file_not_replaced()
        with self._transaction():
            for write in writes:
                if not write.claim.acquire(blocking=False):
                    continue
                self._db.execute("SAVEPOINT one")
                try:
                    write.result = write.act(self._db)
                except BaseException as error:                # its caller's matter
                    write.error = self._told(error)
                    if not self._db.in_transaction:          # SQLite gave up all of it
                        raise sqlite3.OperationalError(str(error)) from error
                    self._db.execute("ROLLBACK TO one")
                self._db.execute("RELEASE one")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """A transaction; what fails is undone."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def _check_file_not_replaced(self) -> None:
        """SQLite would go on writing to a file that was deleted, for nobody to find."""
        try:
            found = os.stat(self._path)
        except OSError:
            found = None
        if not found or (self._place or found.st_ino) != found.st_ino:
            raise Unavailable("The database %s was deleted or replaced. Restart the bridge." % self._path)
        self._place = found.st_ino

    # --- reading ---

    @contextlib.contextmanager
    def _read_connection(self) -> Iterator[sqlite3.Connection]:
        """What is committed; one thread at a time."""
        with self._read_lock:
            try:
                yield self._reader
            except sqlite3.DatabaseError as error:
                raise self._told(error) from error

    def _read(self, sql: str, *values: Any) -> List[Tuple[Any, ...]]:
        with self._read_connection() as db:
            return db.execute(sql, values).fetchall()

    def kept(self) -> Dict[Any, Any]:
        """What was read since the database changed last, by anything that names it; empty after a change. Whoever adds to it asks for it
        *before* reading: what changes meanwhile puts a new one in its place. Changes of other programs count after LOOK_AGAIN_SECONDS."""
        now, is_full = self._clock.monotonic(), len(self._cache) + len(self._token_cache) >= CACHE_ENTRIES
        if now >= self._look_at or is_full:
            self._look_at = now + CACHE_REVALIDATE_SECONDS
            version = self._read("PRAGMA data_version")[0][0]
            if version != self._cached_data_version or is_full:
                self._cached_data_version, self._cache, self._token_cache = version, {}, {}
        return self._cache

    def check_writable(self) -> None:
        """Raises Unavailable where a write would fail."""
        now = self._clock.monotonic()
        is_due = now - self._checked_at >= CHECK_SECONDS         # anybody may ask, and each is a write to disk
        self._write(WriteTask(lambda db: db.execute(                 # of a page, since a full disk is noticed only then
            "INSERT OR REPLACE INTO remembered (name, value) SELECT 'checked', ? WHERE ?", (str(now), is_due))), HEALTH_SECONDS)
        self._checked_at = now if is_due else self._checked_at

    @staticmethod
    def _once(kept: Dict[Any, Any], key: Any, read: Callable[[], Read]) -> Read:
        if key not in kept:
            kept[key] = read()
        found: Read = kept[key]
        return found

    # --- tokens ---

    @transaction
    def add_token(self, db: sqlite3.Connection, new: NewToken, secret: str, workspace: Optional[str] = None) -> Token:
        """Raises TokenLimit; expired tokens do not count, and an admin token can always be made where there is none."""
        now = self._clock.now()
        expires_at = None if new.expires_in_days is None else now + new.expires_in_days * 86_400
        token = Token(str(uuid.uuid4()), new.name, secret[:12], new.session_mode, expires_at, now, None, new.admin, new.tools, workspace,
                      new.requests_per_minute, new.requests_per_day, new.models)
        count = db.execute("SELECT count(*) FROM tokens WHERE expires_at IS NULL OR expires_at > ?", (now,)).fetchone()[0]
        if count >= TOKENS and (self.has_admin() or not new.admin):
            raise TokenLimit()
        db.execute("INSERT INTO tokens (%s, token_hash) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)" % TOKEN_COLUMNS,
                   (token.id, token.name, token.prefix, token.session_mode, token.expires_at, token.created_at, None,
                    int(token.is_admin), as_json(token.tools), token.workspace, token.requests_per_minute, token.requests_per_day,
                    as_json(token.models), digest(secret)))
        self._tokens_dirty = True
        return token

    def token_by_digest(self, token_hash: str) -> Optional[Token]:
        return self._load_token("token_hash", token_hash)

    def token(self, token_id: str) -> Optional[Token]:
        return self._load_token("id", token_id)

    def _load_token(self, column: str, value: str) -> Optional[Token]:
        sql = "SELECT %s FROM tokens WHERE %s = ?" % (TOKEN_COLUMNS, column)
        self.kept()                                          # other programs make and revoke tokens, too
        return self._once(self._token_cache, (column, value), lambda: next(map(self._token, self._read(sql, value)), None))

    def tokens(self) -> List[Token]:
        """Newest first."""
        return [self._token(row) for row in self._read("SELECT %s FROM tokens ORDER BY created_at DESC, rowid DESC" % TOKEN_COLUMNS)]

    def touch_token(self, token: Token) -> None:
        """Notes that the token was used; at most once a minute, since each note is a write to disk, for which nobody waits."""
        now = self._clock.now()
        if not 0 <= now - self._last_used_written_at.get(token.id, token.last_used_at or 0.0) < 60:
            self._last_used_written_at[token.id] = now
            self._write_queue.put(WriteTask(lambda db: self._touch(db, token.id, now)))

    def _touch(self, db: sqlite3.Connection, token_id: str, now: float) -> None:
        db.execute("UPDATE tokens SET last_used_at = ? WHERE id = ?", (now, token_id))
        self._tokens_dirty = True

    def has_admin(self) -> bool:
        return bool(self._read("SELECT 1 FROM tokens WHERE is_admin AND (expires_at IS NULL OR expires_at > ?)", self._clock.now()))

    @transaction
    def delete_token(self, db: sqlite3.Connection, token_id: str, protect: bool = True) -> List[str]:
        """Deletes the token with its jobs and conversations. -> its unfinished jobs. Raises NotFound, LastAdmin (if `protect`)."""
        now = self._clock.now()
        found = db.execute("SELECT is_admin FROM tokens WHERE id = ?", (token_id,)).fetchone()
        others = db.execute("SELECT count(*) FROM tokens WHERE is_admin AND id != ? AND (expires_at IS NULL OR expires_at > ?)",
                            (token_id, now)).fetchone()[0]
        if not found:
            raise NotFound("Token not found")
        if protect and found[0] and not others:
            raise LastAdmin()
        open_jobs = db.execute("SELECT id FROM jobs WHERE token_id = ? AND status IN ('queued', 'processing')", (token_id,)).fetchall()
        db.execute("DELETE FROM tokens WHERE id = ?", (token_id,))
        self._tokens_dirty = True
        return [job_id for job_id, in open_jobs]

    @staticmethod
    def _token(row: Tuple[Any, ...]) -> Token:
        token = Token(*row)
        level, allowed = json.loads(str(token.tools)), json.loads(str(token.models or "null"))
        return replace(token, is_admin=bool(token.is_admin), tools=tuple(level) if isinstance(level, list) else level,
                       models=tuple(allowed) if allowed else None)

    # --- jobs ---

    def enqueue(self, token_id: str, ask: Union[Ask, Chat], key: Optional[str] = None, limit: int = QUEUE_JOBS) -> EnqueueResult:
        """Adds a job at the end of the queue, or finds the one that this key made; durable on return.

        key: the caller's Idempotency-Key; limit: most jobs that may wait or run.  Raises IdempotencyConflict, QueueFull;
        RateLimited and DailyLimit for the limits of the token; InvalidToken when the token was revoked meanwhile.
        """
        chat, api = (ask.to_json(), ask.api) if isinstance(ask, Chat) else (None, None)      # may be large: not in the writer's thread
        fingerprint = ask.fingerprint if isinstance(ask, Ask) and key else None
        return self._enqueue(token_id, ask, key, limit, chat, api, fingerprint)

    @transaction
    def _enqueue(self, db: sqlite3.Connection, token_id: str, ask: Union[Ask, Chat], key: Optional[str], limit: int,
                 chat: Optional[str], api: Optional[str], fingerprint: Optional[str]) -> EnqueueResult:
        now, job_id = self._clock.now(), str(uuid.uuid4())
        known = key and db.execute("SELECT id, fingerprint FROM jobs WHERE token_id = ? AND idempotency_key = ?",
                                   (token_id, key)).fetchone()
        if known and known[1] != fingerprint:
            raise IdempotencyConflict()
        if known:
            job = self._job(db.execute("SELECT %s FROM jobs WHERE id = ?" % JOB_COLUMNS, known[:1]).fetchone())
            return EnqueueResult(job, self._places(db, job)[1], is_new=False)
        self._check_limits(db, token_id, now)
        ahead = db.execute("SELECT count(*) FROM jobs WHERE status IN ('queued', 'processing')").fetchone()[0]
        if ahead >= limit:
            raise retry_later(QueueFull, "", 10)
        seq = db.execute("INSERT INTO jobs (id, token_id, status, message, created_at, model, system_prompt, json_schema,"
                         " conversation, effort, idempotency_key, fingerprint, chat, api) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
                         (job_id, token_id, JobStatus.QUEUED, ask.message, now, ask.model, ask.system_prompt, ask.json_schema,
                          ask.conversation, ask.effort, key, fingerprint, chat, api)).lastrowid
        self._count(db, token_id, now, requests=1)
        job = self._job(db.execute("SELECT %s FROM jobs WHERE seq = ?" % JOB_COLUMNS, (seq,)).fetchone())
        return EnqueueResult(job, ahead + 1)

    @staticmethod
    def _check_limits(db: sqlite3.Connection, token_id: str, now: float) -> None:
        """The token's own limits: so many asks within the last 60 seconds, and on this day (UTC)."""
        token = db.execute("SELECT requests_per_minute, requests_per_day FROM tokens WHERE id = ?", (token_id,)).fetchone()
        if not token:
            raise InvalidToken()
        per_minute, per_day = token
        if per_minute:
            last = db.execute("SELECT created_at FROM jobs WHERE token_id = ? ORDER BY seq DESC LIMIT 1 OFFSET ?",
                              (token_id, per_minute - 1)).fetchone()
            if last and now - 60 < last[0] <= now:
                raise retry_later(RateLimited, "This token may send %d requests a minute." % per_minute, last[0] + 60 - now)
        used = per_day and db.execute("SELECT requests FROM usage WHERE day = ? AND token_id = ?", (day_of(now), token_id)).fetchone()
        if used and used[0] >= per_day:
            midnight = (now // 86_400 + 1) * 86_400
            raise retry_later(DailyLimit, "This token may send %d requests a day. It works again at %s." % (per_day, iso_time(midnight)),
                           midnight - now, resetsAt=iso_time(midnight))

    def _count(self, db: sqlite3.Connection, token_id: str, at: float, requests: int = 0, completed: int = 0, errors: int = 0,
               usage: Usage = Usage(), code: str = "") -> None:
        """Adds to the figures of a token for the day of the request."""
        if requests:
            self._metrics.add("cab_requests_accepted_total")
        else:
            self._metrics.add("cab_requests_finished_total", status=JobStatus.COMPLETED if completed else JobStatus.ERROR, code=code)
        for kind, count in zip(("input", "output", "cache_read", "cache_creation"), usage if completed else ()):
            self._metrics.add("cab_tokens_total", count, kind=kind)
        self._metrics.add("cab_cost_usd_total", usage.cost_usd)
        db.execute("INSERT OR IGNORE INTO usage (day, token_id) VALUES (?, ?)", (day_of(at), token_id))
        db.execute("UPDATE usage SET requests = requests + ?, completed = completed + ?, errors = errors + ?,"
                   " input_tokens = input_tokens + ?, output_tokens = output_tokens + ?, cache_read_tokens = cache_read_tokens + ?,"
                   " cache_creation_tokens = cache_creation_tokens + ?, cost_usd = cost_usd + ? WHERE day = ? AND token_id = ?",
                   (requests, completed, errors, *usage, day_of(at), token_id))

    def job(self, job_id: str, without_bodies: bool = False) -> Optional[Job]:
        """is_light: without what was asked and answered, which may be large."""
        if without_bodies:
            return self._once(self.kept(), ("job", job_id), lambda: self._load_job(SUMMARY_COLUMNS, job_id))
        with self._large:
            return self._load_job(JOB_COLUMNS, job_id)

    def _load_job(self, columns: str, job_id: str) -> Optional[Job]:
        return next(map(self._job, self._read("SELECT %s FROM jobs WHERE id = ?" % columns, job_id)), None)

    def response(self, job_id: str, start: int, count: int) -> str:
        """A part of an answer, in code points; empty past its end."""
        with self._large:
            rows = self._read("SELECT response FROM jobs WHERE id = ?", job_id)
            return str(rows[0][0] or "")[start:start + count] if rows else ""

    def chat(self, job_id: str) -> Optional[Chat]:
        """What was asked over /v1, as far as its job does not tell it; None for another job, or a finished one."""
        rows = self._read("SELECT chat FROM jobs WHERE id = ? AND chat IS NOT NULL", job_id)
        told = json.loads(rows[0][0]) if rows else None
        return told and Chat(tuple(told["turns"]), client_tools=tuple(told["functions"]), forced_tool=told["forced"], stop_sequences=tuple(told["stops"]))

    def job_status(self, job_id: str) -> Optional[str]:
        rows = self._read("SELECT status FROM jobs WHERE id = ?", job_id)
        return rows[0][0] if rows else None

    def places(self, job: Job) -> Tuple[int, int]:
        """-> (those waiting before it + 1, or 0 for one that does not wait; those waiting and running before it + 1, or 0
        for one that is finished)."""
        def read() -> Tuple[int, int]:
            with self._read_connection() as db:
                return self._places(db, job)
        return self._once(self.kept(), ("places", job.id, job.status), read)

    @staticmethod
    def _places(db: sqlite3.Connection, job: Job) -> Tuple[int, int]:
        if job.is_finished:
            return 0, 0
        waiting, all_open = db.execute("SELECT coalesce(sum(status = 'queued'), 0), count(*) FROM jobs"
                                       " WHERE status IN ('queued', 'processing') AND seq < ?", (job.seq,)).fetchone()
        return (int(waiting) + 1 if job.status == JobStatus.QUEUED else 0), int(all_open) + 1

    def jobs(self, token_id: Optional[str], statuses: Sequence[str], before: Optional[int], limit: int) -> Tuple[List[Job], Optional[int]]:
        """A page of jobs, newest first. token_id: None for those of all tokens; statuses: none for all; before: where the last
        page ended.  -> (at most `limit` jobs, fewer where they are large; where the next page begins, or None)."""
        wanted = statuses or JobStatus.ALL
        sql = ("SELECT %s FROM jobs WHERE %s AND status IN (%s) AND seq < ? ORDER BY seq DESC LIMIT ?" % (
            JOB_COLUMNS, "token_id = ?" if token_id else "? IS NULL", placeholders(wanted)))
        found: List[Job] = []
        size = 0
        with self._large, self._read_connection() as db:
            rows = db.execute(sql, (token_id, *wanted, before or 1 << 62, limit + 1))
            for row in rows:
                if len(found) == limit or size > PAGE_CHARACTERS:
                    rows.close()
                    return found, found[-1].seq
                found.append(self._job(row))
                size += sum(len(value) for value in row if isinstance(value, str))
        return found, None

    @transaction
    def claim(self, db: sqlite3.Connection, but: Sequence[str] = ()) -> Optional[Job]:
        """Takes the oldest waiting job: it is `processing` on return, and counts as attempted. but: models whose jobs rest, ""
        for the default one."""
        sql = "SELECT seq FROM jobs WHERE status = 'queued' AND coalesce(model, '') NOT IN (%s) ORDER BY seq LIMIT 1" % placeholders(but)
        found = db.execute(sql, tuple(but)).fetchone()
        if not found:
            return None
        db.execute("UPDATE jobs SET status = 'processing', attempts = attempts + 1, started_at = ? WHERE seq = ? AND status = 'queued'",
                   (self._clock.now(), *found))
        return self._job(db.execute("SELECT %s FROM jobs WHERE seq = ?" % JOB_COLUMNS, found).fetchone())

    def has_queued(self, but: Sequence[str] = ()) -> bool:
        """Whether `claim` would find one."""
        sql = "SELECT 1 FROM jobs WHERE status = 'queued' AND coalesce(model, '') NOT IN (%s) LIMIT 1" % placeholders(but)
        return bool(self._read(sql, *but))

    @transaction
    def complete(self, db: sqlite3.Connection, job: Job, answer: Answer, generation: int = 0) -> bool:
        """Stores the answer, and what continues the conversation. -> False when the job was no longer wanted."""
        now = self._clock.now()
        done = db.execute("UPDATE jobs SET status = 'completed', completed_at = ?, response = ?, structured = ?, usage = ?, ending = ?,"
                          " model = coalesce(?, model), restarts = ?, chat = NULL WHERE id = ? AND status = 'processing'",
                          (now, replace_surrogates(answer.text), answer.structured and replace_surrogates(answer.structured), as_json(answer.usage),
                           replace_surrogates(as_json(answer.stop_info)), answer.model, generation, job.id)).rowcount
        if done:
            # by the row's conversation: none when it was deleted meanwhile
            db.execute("UPDATE conversations SET session_id = ?, spent_usd = ?, last_used_at = ?"
                       " WHERE token_id = ? AND name = (SELECT conversation FROM jobs WHERE id = ?)",
                       (answer.session_id, answer.spent_usd, now, job.token_id, job.id))
            self._count(db, job.token_id, job.created_at, completed=1, usage=answer.usage)
        return bool(done)

    def fail(self, job: Job, code: str, text: str, only: Sequence[str] = (JobStatus.PROCESSING,)) -> bool:
        """Stores why the job failed. only: the statuses that it may be in. -> False when it was in another."""
        return bool(self._fail_where(code, text, "id = ? AND status IN (%s)" % placeholders(only), job.id, *only))

    def fail_chats(self, code: str, text: str, statuses: Sequence[str], model: str = ALL_MODELS) -> List[str]:
        """Ends the requests of /v1 in these statuses. model: only those for it, "" for the default one. -> their ids."""
        return self._fail_where(code, text, "chat IS NOT NULL AND status IN (%s) AND ? IN (?, coalesce(model, ''))" % placeholders(statuses),
                                *statuses, model, ALL_MODELS)

    @transaction
    def _fail_where(self, db: sqlite3.Connection, code: str, text: str, where: str, *values: Any) -> List[str]:
        """Ends the jobs that a condition of ours names. -> their ids."""
        found = "SELECT id, token_id, created_at FROM jobs WHERE " + where
        rows = db.execute(found, values).fetchall()
        for job_id, token_id, created_at in rows:
            db.execute("UPDATE jobs SET status = 'error', completed_at = ?, error = ?, error_code = ?, chat = NULL WHERE id = ?",
                       (self._clock.now(), replace_surrogates(text), code, job_id))
            self._count(db, token_id, created_at, errors=1, code=code)
        return [job_id for job_id, *_ in rows]

    @transaction
    def requeue(self, db: sqlite3.Connection, job: Job, generation: int = 0) -> bool:
        """Back to the head of the queue, as if it had not been claimed (what the job cannot help is no attempt)."""
        return bool(db.execute("UPDATE jobs SET status = 'queued', attempts = attempts - 1, started_at = NULL, restarts = ?"
                               " WHERE id = ? AND status = 'processing'", (generation, job.id)).rowcount)

    def recover(self) -> Tuple[int, int]:
        """After a crash: what was processing waits again at its old place, unless it was attempted JOB_ATTEMPTS times.

        Call it only when no run of the dead bridge goes on.  -> (jobs that wait again, jobs given up).
        """
        lost = self._fail_where("interrupted", "The run was cut short %d times: the bridge ended, or failed." % JOB_ATTEMPTS,
                                "status = 'processing' AND attempts >= ?", JOB_ATTEMPTS)
        return self._recover(), len(lost)

    @transaction
    def _recover(self, db: sqlite3.Connection) -> int:
        return db.execute("UPDATE jobs SET status = 'queued', started_at = NULL, restarts = restarts + 1"
                          " WHERE status = 'processing'").rowcount

    @transaction
    def purge(self, db: sqlite3.Connection, days: int) -> int:
        """Deletes finished jobs older than `days`; those of a conversation are its memory and stay. -> how many went."""
        db.execute("DELETE FROM usage WHERE day < ?", (day_of(self._clock.now() - USAGE_DAYS * 86_400),))
        return db.execute("DELETE FROM jobs WHERE status IN ('completed', 'error') AND completed_at < ? AND conversation IS NULL",
                          (self._clock.now() - days * 86_400,)).rowcount

    def counts(self) -> Dict[str, int]:
        """Jobs per status, and `tokens`."""
        return self._once(self.kept(), "counts", lambda: {"tokens": self._read("SELECT count(*) FROM tokens")[0][0],
                                                          **dict(self._read("SELECT status, count(*) FROM jobs GROUP BY status"))})

    @staticmethod
    def _job(row: Tuple[Any, ...]) -> Job:
        values = dict(zip(JOB_FIELDS, row))
        if values["usage"]:
            values["usage"] = Usage._make(json.loads(values["usage"]))
        if values["stop_info"]:
            reason, stop, calls = json.loads(values["stop_info"])
            values["stop_info"] = StopInfo(reason, stop, tuple(ToolCall(*call) for call in calls))
        return Job(**values)

    # --- conversations ---

    @transaction
    def open_conversation(self, db: sqlite3.Connection, token_id: str, name: str) -> Session:
        """Begins a turn: where the conversation goes on.

        The stored session is cleared until the turn succeeds: a transcript that holds half a turn is never resumed.
        """
        now, key = self._clock.now(), uuid.uuid4().hex
        db.execute("INSERT OR IGNORE INTO conversations (token_id, name, key, created_at, last_used_at)"
                   " SELECT id, ?, ?, ?, ? FROM tokens WHERE id = ?", (name, key, now, now, token_id))
        found = db.execute("SELECT key, session_id, spent_usd FROM conversations WHERE token_id = ? AND name = ?",
                           (token_id, name)).fetchone()
        db.execute("UPDATE conversations SET session_id = NULL WHERE token_id = ? AND name = ?", (token_id, name))
        return Session(*found) if found else Session(key)

    def has_conversation(self, key: str) -> bool:
        return bool(self._read("SELECT 1 FROM conversations WHERE key = ?", key))

    def conversations(self, token_id: str) -> List[Conversation]:
        """Those of a token, the one used last first; also one whose first turn still waits."""
        return [Conversation(*row) for row in self._read(
            "SELECT conversation, sum(status = 'completed'), min(created_at), max(coalesce(completed_at, created_at)) AS used FROM jobs"
            " WHERE token_id = ? AND conversation IS NOT NULL GROUP BY conversation ORDER BY used DESC, max(seq) DESC", token_id)]

    @transaction
    def delete_conversation(self, db: sqlite3.Connection, token_id: str, name: str) -> bool:
        """Forgets what was said. Finished and running jobs stay without it, waiting ones begin it afresh. -> whether there was one."""
        rows = db.execute("DELETE FROM conversations WHERE token_id = ? AND name = ?", (token_id, name)).rowcount
        rows += db.execute("SELECT count(*) FROM jobs WHERE token_id = ? AND conversation = ?", (token_id, name)).fetchone()[0]
        db.execute("UPDATE jobs SET conversation = NULL WHERE token_id = ? AND conversation = ? AND status != 'queued'",
                   (token_id, name))
        return bool(rows)

    def history(self, job: Job) -> List[HistoryTurn]:
        """The completed turns before this one, oldest first; the latest HISTORY_TURNS within HISTORY_BYTES, the last one cut to fit."""
        rows = self._read("SELECT message, response FROM jobs WHERE token_id = ? AND conversation = ? AND seq < ?"
                          " AND status = 'completed' AND response IS NOT NULL ORDER BY seq DESC LIMIT ?",
                          job.token_id, job.conversation, job.seq, HISTORY_TURNS)
        kept: List[HistoryTurn] = []
        left = HISTORY_BYTES
        for message, response in rows:
            left -= len(message.encode())
            if kept and len(response.encode()) > left:
                break
            kept.insert(0, HistoryTurn(message, response.encode()[:left].decode("utf-8", "ignore")))
            left -= len(response.encode())
        return kept

    # --- usage ---

    def usage(self, since_day: str, token_id: Optional[str] = None) -> List[DayUsage]:
        """The figures per day and token from a day on, oldest first. token_id: only this one's."""
        rows = self._read("SELECT day, token_id, requests, completed, errors, input_tokens, output_tokens, cache_read_tokens,"
                          " cache_creation_tokens, cost_usd FROM usage WHERE day >= ? AND (token_id = ? OR ? IS NULL)"
                          " ORDER BY day, token_id", since_day, token_id, token_id)
        return [DayUsage._make((*row[:5], Usage._make(row[5:]))) for row in rows]

    @transaction
    def save_plan_limits(self, db: sqlite3.Connection, windows: Sequence[RateLimitWindow]) -> None:
        db.executemany("INSERT OR REPLACE INTO plan (kind, status, utilization, resets_at, seen_at) VALUES (?,?,?,?,?)", windows)

    def windows(self) -> List[RateLimitWindow]:
        """The limits of the plan, as they were told last."""
        return [RateLimitWindow(*row) for row in self._read("SELECT kind, status, utilization, resets_at, seen_at FROM plan ORDER BY kind")]

    # --- children ---

    def record_process(self, pid: int, started: Optional[str], program: Optional[str] = None) -> None:
        """Remembers a process of ours (or, with started None, forgets it), for the next start to end it; on Linux its tag
        finds it, too, so that a full disk does no harm. program: its file, where a process cannot change what is told of it."""
        def note(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM children WHERE pid = ?", (pid,))
            if started:
                db.execute("INSERT INTO children (pid, started, program) VALUES (?, ?, ?)", (pid, started, program))

        with contextlib.suppress(Unavailable):
            self._write(WriteTask(note))

    def children(self) -> List[Tuple[int, str, Optional[str]]]:
        return [(int(pid), str(started), program) for pid, started, program in self._read("SELECT pid, started, program FROM children")]

    # --- what the next start should know ---

    def remember(self, name: str, value: str) -> None:
        with contextlib.suppress(Unavailable):
            self._write(WriteTask(lambda db: db.execute("INSERT OR REPLACE INTO remembered (name, value) VALUES (?, ?)", (name, value))))

    def get_state(self, name: str) -> Optional[str]:
        rows = self._read("SELECT value FROM remembered WHERE name = ?", name)
        return str(rows[0][0]) if rows else None

# === 6 Processes ==============================================================================================
# The only `subprocess`. A Child is one `claude` and its pipes; ClaudeCli owns all children and answers jobs by
# them; find_claude says which program that is and who pays for it. All of it is used from the worker's thread:
# on Linux the kernel ends a child together with the *thread* that forked it. Read ClaudeCli.run first.

OWNER_ENV_VAR = "CAB_CHILD"                     # in the environment of every child, and so of all that it starts
PR_SET_PDEATHSIG = 1                  # <linux/prctl.h>


def group_options(last_signal: int = signal.SIGINT) -> Dict[str, Any]:
    """Popen options: own session or group (Ctrl-C is for the bridge alone), and on Linux an end with the bridge: by default
    SIGINT, at which the CLI also ends the command that a tool is running."""
    if os.name == "nt":
        return {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0) | getattr(subprocess, "CREATE_NO_WINDOW", 0)}
    if sys.platform != "linux":
        return {"start_new_session": True}
    parent, prctl = os.getpid(), ctypes.CDLL(None).prctl

    def die_with_bridge() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        prctl(PR_SET_PDEATHSIG, last_signal)
        if os.getppid() != parent:
            os._exit(1)

    return {"start_new_session": True, "preexec_fn": die_with_bridge}


def ps_field(pid: int, column: str) -> Optional[str]:
    """What `ps` says of a process, where there is no /proc."""
    found = subprocess.run(["ps", "-o", column + "=", "-p", str(pid)], stdout=subprocess.PIPE, timeout=5)
    return found.stdout.decode().strip() or None


def started_at(pid: int) -> Optional[str]:
    """When a process began, in the system's own words: with the pid it names one process for ever. None: it is gone."""
    try:
        if sys.platform == "linux":
            boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
            state, *rest = Path("/proc/%d/stat" % pid).read_text(errors="replace").rpartition(")")[2].split()
            return None if state == "Z" else "%s/%s" % (boot, rest[18])
        if os.name == "nt":
            kernel, times = ctypes.windll.kernel32, (ctypes.c_ulonglong * 4)()
            kernel.OpenProcess.restype = ctypes.c_void_p
            handle = ctypes.c_void_p(kernel.OpenProcess(0x1000, False, pid))    # PROCESS_QUERY_LIMITED_INFORMATION
            found = kernel.GetProcessTimes(handle, *(ctypes.byref(times, 8 * n) for n in range(4)))
            kernel.CloseHandle(handle)
            return str(times[0]) if found else None
        return ps_field(pid, "lstart")
    except (OSError, IndexError, ValueError, subprocess.SubprocessError):
        return None


def program_of(pid: int) -> Optional[str]:
    """The file that a process runs; None where the system does not tell."""
    try:
        if sys.platform == "linux":
            return os.readlink("/proc/%d/exe" % pid)
        if os.name == "nt":
            kernel, name, size = ctypes.windll.kernel32, ctypes.create_unicode_buffer(32_768), ctypes.c_ulong(32_768)
            kernel.OpenProcess.restype = ctypes.c_void_p
            handle = ctypes.c_void_p(kernel.OpenProcess(0x1000, False, pid))    # PROCESS_QUERY_LIMITED_INFORMATION
            found = kernel.QueryFullProcessImageNameW(handle, 0, name, ctypes.byref(size))
            kernel.CloseHandle(handle)
            return name.value if found else None
        return ps_field(pid, "comm")
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def processes_tagged(tag: str) -> List[int]:
    """Linux: our processes whose environment holds TAG=tag..., descendants of dead children included; not this one."""
    found, mark = [], ("\0%s=%s" % (OWNER_ENV_VAR, tag)).encode()
    for entry in os.listdir("/proc") if sys.platform == "linux" else ():
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                if mark in b"\0" + Path("/proc", entry, "environ").read_bytes():
                    found.append(int(entry))
            except OSError:
                continue
    return found


def process_table() -> List[Tuple[int, int]]:
    """(pid, parent) of every process; none on Windows, where taskkill knows."""
    if sys.platform == "linux":
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError, IndexError):
                found.append((int(entry), int(Path("/proc", entry, "stat").read_text(errors="replace").rpartition(")")[2].split()[1])))
        return found
    if os.name == "nt":
        return []
    try:
        listing = subprocess.run(["ps", "-axo", "pid=,ppid="], stdout=subprocess.PIPE, timeout=5).stdout.decode().split()
    except (OSError, subprocess.SubprocessError):
        return []
    return list(zip(map(int, listing[::2]), map(int, listing[1::2])))


def descendants(pid: int) -> List[int]:
    """The processes below one, by parent; those whose parent died are not found (Linux finds them by tag)."""
    pairs, below, grew = process_table(), {pid}, True
    while grew:
        more = {child for child, parent in pairs if parent in below} - below
        below, grew = below | more, bool(more)
    return sorted(below - {pid})


def kill_process(pid: int, group: bool = False) -> None:
    """Ends a process at once; one that is gone is fine. Windows: with all that it started."""
    if os.name == "nt":
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(pid)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=10)
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        (os.killpg if group else os.kill)(pid, signal.SIGKILL)


def find_orphans(tag: str, recorded: Iterable[Tuple[int, str, Optional[str]]]) -> Dict[int, Optional[str]]:
    """What a dead bridge with this tag left behind: by tag on Linux, elsewhere by pid, start time and, where it was noted, program.
    -> pid: start time."""
    mine = {pid for pid, started, program in recorded if started_at(pid) == started and program in (None, program_of(pid))}
    return {pid: started_at(pid) for pid in mine.union(*map(descendants, mine), processes_tagged(tag)) - {os.getpid()}}


def kill_orphans(tag: str, recorded: Iterable[Tuple[int, str, Optional[str]]]) -> List[int]:
    """Ends what a dead bridge left behind. -> pids, gone."""
    found = find_orphans(tag, recorded)
    for pid in found:
        kill_process(pid)
    for _ in range(200):
        if not any(started and started_at(pid) == started for pid, started in found.items()):
            break
        time.sleep(0.01)
    return sorted(found)


class ChildGone(Exception):
    """The child ended (or broke off its output) before the turn was over."""


class ClaudeProcess:
    """One process of `claude`: its pipes, its pumps and its end. Used from one thread; the owner calls `stop`."""

    def __init__(self, argv: Sequence[str], cwd: Path, environment: Mapping[str, str], tag: str) -> None:
        self.tag = tag
        self.session_id: Optional[str] = None
        self.initialized = False
        self.spent_usd = 0.0
        self._stdin_queue: "queue.SimpleQueue[Optional[bytes]]" = queue.SimpleQueue()
        self._lines: "queue.Queue[Union[bytes, Exception, None]]" = queue.Queue(2_000)
        self._stderr_tail: Deque[bytes] = deque(maxlen=8)
        self._closing, self._dead_seconds = False, 0.0
        self.calls: Dict[str, Tuple[str, Any]] = {}     # of the client's tools, not answered yet: by the call's id those of its request
        self.told_usage = Usage()           # of the turn that goes on, at its calls
        self.limits = RateLimitStatus()              # of the plan, as it told them last: it tells them again only when they change
        self._descendants: Optional[Dict[int, Optional[str]]] = None
        self.term_at = self.kill_at = float("inf")
        self.process = subprocess.Popen(list(argv), cwd=str(cwd), env={**environment, OWNER_ENV_VAR: tag}, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, **group_options())
        self.pid = self.process.pid
        self._pumps = [threading.Thread(target=pump, name="%s-%d" % (name, self.pid), daemon=True)
                       for name, pump in (("stdin", self._pump_in), ("stdout", self._pump_out), ("stderr", self._pump_err))]
        try:
            for pump in self._pumps:
                pump.start()
        except RuntimeError as error:                        # no thread to be had: else nobody would end the process
            self._stdin_queue.put(None)
            kill_process(self.pid, group=True)
            self.process.wait()
            for pump, pipe in zip(self._pumps, (self.process.stdin, self.process.stdout, self.process.stderr)):
                assert pipe is not None
                pump.join(1) if pump.ident else pipe.close()
            raise OSError(errno.EAGAIN, str(error)) from None

    # The pumps only move bytes, so that neither side ever waits for the other; they end with the pipes.

    def _pump_in(self) -> None:
        pipe = self.process.stdin
        assert pipe is not None
        with contextlib.suppress(OSError, ValueError), pipe:
            for order in iter(self._stdin_queue.get, None):
                view = memoryview(order)
                while view:
                    view = view[pipe.write(view):]

    def _pump_out(self) -> None:
        pipe, framer = self.process.stdout, LineFramer(LINE_BYTES)
        assert pipe is not None
        with pipe:
            for data in iter(lambda: os.read(pipe.fileno(), 1 << 16), b""):
                try:
                    lines = framer.feed(data)
                except OverflowError:
                    self._push(RunFailed("output_too_large", "claude wrote a line longer than %d bytes." % LINE_BYTES))
                    break
                for line in lines:
                    self._push(line)
        self._push(None)

    def _push(self, item: Union[bytes, Exception, None]) -> None:
        while not self._closing:
            with contextlib.suppress(queue.Full):
                return self._lines.put(item, timeout=0.2)

    def _pump_err(self) -> None:
        pipe = self.process.stderr
        assert pipe is not None
        with pipe:
            for data in iter(lambda: os.read(pipe.fileno(), STDERR_BYTES // 8), b""):
                self._stderr_tail.append(data)

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def send(self, *messages: Mapping[str, Any]) -> None:
        """Writes JSON lines in one piece; returns at once."""
        self._stdin_queue.put(b"".join(json.dumps(message).encode() + b"\n" for message in messages))

    def next_event(self, timeout: float) -> Optional[CliEvent]:
        """The next line's meaning, or None when `timeout` seconds brought none. Raises ChildGone, RunFailed."""
        try:
            item = self._lines.get(timeout=max(0.0, timeout))
        except queue.Empty:
            self._dead_seconds += 0.0 if self.is_alive else timeout
            if self._dead_seconds < DRAIN_AFTER_EXIT_SECONDS:
                return None
            item = None                     # its pipes are held open by what it started
        if item is None:
            raise ChildGone(self._exit_message())
        if isinstance(item, Exception):
            raise item
        try:
            return parse_cli_event(item)
        except (ValueError, RecursionError, AttributeError):
            raise RunFailed("cli_error", "claude wrote a line that is not valid JSON: %s" % item[:200].decode("utf-8", "replace")) from None

    def _exit_message(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        self._pumps[2].join(1)
        words = b"".join(self._stderr_tail).decode("utf-8", "replace")
        if len(self._stderr_tail) == self._stderr_tail.maxlen:       # the beginning is lost: so is the first word, which may be half a secret
            words = re.sub(r"^\S*", "...", words)
        words = redact(words.strip())
        return "claude ended (exit code %s) without an answer%s" % (self.process.returncode, ": " + words if words else ".")

    def tell(self, setup: SessionConfig, features: Features) -> Sequence[Mapping[str, Any]]:
        """Says what it is to be; once, since the CLI hears the first time only. -> what was sent."""
        requests = [] if self.initialized else initialize_request(setup, features)
        if requests:
            self.initialized = True
            self.send(*requests)
        return requests

    def leave(self, now: float, grace: float, interrupt: bool = False, family: bool = False) -> None:
        """The child is to go: by an interrupt, and by the end of its input, at which an idle one leaves within 0.1 s; `tend` and
        `stop` see to it.

        grace: seconds until it is killed. family: it may have started others (a child without tools has not).
        """
        self.term_at, self.kill_at = now + grace * 0.6, now + grace
        if family:
            self._descendants = {pid: started_at(pid) for pid in (descendants(self.pid) if self.is_alive else ())}
        if interrupt:
            self.send({"type": "control_request", "request_id": "stop", "request": {"subtype": "interrupt"}})

    def tend(self, now: float) -> bool:
        """Goes on with the end of a child that leaves: only now its input ends, as its last work would slow down the storing of
        its answer. -> whether it is time to `stop` it."""
        self._stdin_queue.put(None)
        if now >= self.term_at and self.is_alive:
            self.process.terminate()
        return now >= self.kill_at or not self.is_alive

    def stop(self) -> None:
        """Ends the child for good, and all that it started; it is gone on return."""
        self._stdin_queue.put(None)
        if os.name != "nt" or self.is_alive:
            kill_process(self.pid, group=True)
        self.process.wait()
        if self._descendants is not None:
            for pid in [pid for pid, started in self._descendants.items() if started and started_at(pid) == started] + processes_tagged(self.tag):
                kill_process(pid)
        self._closing = True
        for pump in self._pumps:
            pump.join(1)

    def close_stdin_and_wait(self, seconds: float) -> bool:
        self._stdin_queue.put(None)
        try:
            self.process.wait(seconds)
            return True
        except subprocess.TimeoutExpired:
            return False


@dataclass(frozen=True)
class ClaudeInstall:
    """Which program is driven, what it can do, and who pays. environment: of every child."""
    command: Tuple[str, ...]
    features: Features
    environment: Dict[str, str]
    billing_account: str
    is_billed_per_token: bool = False
    notes: Tuple[str, ...] = ()


def find_claude(config: Config, environ: Mapping[str, str]) -> ClaudeInstall:
    """Looks at the `claude` of this machine. Raises CannotStart when there is none, or it is too old or not signed in."""
    command = claude_command(config, environ)
    plain = child_environment(environ, config.allow_api_key, None)
    version, help_text = probe(command + ("--version",), plain), probe(command + ("--help",), plain)
    features = Features.read(version, help_text)
    if not features.version:
        raise CannotStart("%s does not answer like Claude Code (its --version says %r)." % (command[-1], version.strip()[:80]),
                          "name the right program with --claude PATH")
    missing = sorted(NEEDED_FLAGS - features.flags)
    if features.version < MINIMUM_CLI or missing:
        raise CannotStart("Claude Code %s is too old or too new to be driven safely%s." % (
            features.version_text, " (it lacks %s)" % ", ".join(missing) if missing else ""),
            "update it: claude update (2.0.76 or newer is needed)")
    notes = tuple("This Claude Code lacks %s: the bridge does without." % flag for flag in sorted(OPTIONAL_FLAGS - features.flags))
    if not features.has_auth:
        return ClaudeInstall(command, features, plain, "unknown: this Claude Code cannot say (2.1.50 or newer can)", notes=notes)
    home = private_directory(config.data_dir / "claude-home")
    write_account(home, environ)
    isolated = child_environment(environ, config.allow_api_key, str(home))
    shared = "This Claude Code keeps its login in its own settings folder, which the bridge therefore shares."
    for environment, note in ((isolated, ()), (plain, (shared,))):
        login = billing_account(login_status(command, environment))
        if login.is_signed_in:
            return ClaudeInstall(command, features, environment, login.billing_account, login.is_billed_per_token, notes + note)
    raise CannotStart("Claude Code is installed but not signed in.",
                      "run claude and sign in, or set CLAUDE_CODE_OAUTH_TOKEN (claude setup-token makes one), or try: start --demo")


def claude_command(config: Config, environ: Mapping[str, str]) -> Tuple[str, ...]:
    """The program, as the first words of a command line. Raises CannotStart."""
    if config.demo:
        here = Path(__file__).absolute()
        return (sys.executable, str(here.parent if here.parent.is_file() else here), "demo-claude")
    home = Path(environ.get("HOME") or Path.home())
    usual = (Path("/usr/local/bin"), home / ".claude/local", home / ".local/bin")
    path = os.pathsep.join([environ.get("PATH", os.defpath), *map(str, usual)])
    found = shutil.which(config.claude or "claude", path=path)
    if os.name == "nt" and not config.claude:
        found = shutil.which("claude.exe", path=path) or shutil.which("claude.cmd", path=path) or found
    if not found:
        raise CannotStart("Claude Code CLI not found%s." % (": " + config.claude if config.claude else ""),
                          "install it first: https://docs.anthropic.com/en/docs/claude-code, or try: start --demo")
    return (str(Path(found).absolute()),)


def probe(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """What a short command prints. Raises CannotStart when it cannot be run."""
    try:
        return subprocess.run(list(argv), env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, timeout=30).stdout.decode("utf-8", "replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotStart("%s cannot be run: %s." % (argv[0], getattr(error, "strerror", None) or "no answer within 30 s"),
                          "name the right program with --claude PATH") from None


def login_status(command: Tuple[str, ...], environment: Mapping[str, str]) -> Mapping[str, Any]:
    """`claude auth status`, without the owner's settings as in our runs (they may name a helper that gives keys). Only for
    a CLI that has the command: an older one would send the words as a prompt."""
    try:
        status = json.loads(probe(command + ("--setting-sources=", "auth", "status"), environment))
        return status if isinstance(status, dict) else {}
    except ValueError:
        return {}


def write_account(home: Path, environ: Mapping[str, str]) -> None:
    """Puts the account's ids, without name and e-mail address, where the CLI looks for them: it then neither asks for
    the profile nor tells the model the owner's address. What is not known is null, which the CLI takes for an answer.
    Source: seen on 2.1.197 and 2.1.330."""
    target = home / ".claude.json"
    owners = Path(environ.get("CLAUDE_CONFIG_DIR") or environ.get("HOME") or Path.home()) / ".claude.json"
    account, known = read_object(owners).get("oauthAccount"), read_object(target)
    names = ("accountUuid", "organizationUuid", "billingType", "accountCreatedAt", "subscriptionCreatedAt", "ccOnboardingFlags")
    wanted = {name: account.get(name) if isinstance(account, dict) else None for name in names}
    wanted["profileFetchedAt"] = 4_102_444_800_000
    if known.get("oauthAccount") != wanted:
        with contextlib.suppress(OSError):      # then the CLI asks for the profile itself
            write_file_atomically(target, as_json({**known, "oauthAccount": wanted}))


def read_object(path: Path) -> Dict[str, Any]:
    """The JSON object in a file; empty where there is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def ask_models(claude: ClaudeInstall, data_dir: Path) -> Tuple[Model, ...]:
    """The models that `claude` offers, by its own word; nothing is asked of the API. Any thread. Raises Unavailable."""
    folder = private_directory(data_dir / "work")
    argv = claude_argv(claude.command, claude.features, Tools.NONE)
    line = json.dumps(initialize_request(DEFAULT_SESSION, claude.features)[0]).encode() + b"\n"
    try:
        said = subprocess.run(argv, cwd=str(folder), env=claude.environment, input=line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              timeout=30, **group_options()).stdout
        found = next(filter(None, map(read_models, said.splitlines())), ())
    except (OSError, ValueError, KeyError, AttributeError, TypeError, subprocess.SubprocessError):
        found = ()
    if not found:
        raise Unavailable("claude did not tell its models. Name one yourself, such as sonnet, opus or haiku.")
    return found


@dataclass(frozen=True)
class RunRequest:
    """What a run needs to know. conversation: its key, or None for a stateless ask; session_id: the CLI's, to resume,
    and spent_usd its cost so far. history: reads the turns so far; asked only when they have to be told again. owner: the token,
    whose own processes alone may go on with its calls."""
    message: Content
    setup: SessionConfig
    conversation: Optional[str] = None
    session_id: Optional[str] = None
    spent_usd: float = 0.0
    history: Callable[[], Sequence[HistoryTurn]] = tuple
    owner: str = ""


class ConversationProcess(NamedTuple):
    """The process of a conversation, kept for its next turn."""
    child: ClaudeProcess
    setup: SessionConfig
    session_id: Optional[str]
    until: float


class PendingToolCall(NamedTuple):
    """A process in the middle of a turn that waits for the results of the client's tools. before: what was said until this turn, and
    prompt: what began it."""
    child: ClaudeProcess
    setup: SessionConfig
    model: Optional[str]
    owner: str
    before: Sequence[HistoryTurn]
    prompt: Content
    calls: Sequence[ToolCall]
    until: float

    def fits(self, work: RunRequest, results: Mapping[str, Any], history: Sequence[HistoryTurn]) -> bool:
        """Whether it is this process whose calls the work answers: the same caller, conversation and calls."""
        *before, (prompt, answer) = history
        calls = [ToolCall(block["id"], block["name"][len(TOOL_PREFIX):], block["input"])
                 for block in answer if isinstance(block, dict) and block["type"] == "tool_use"]
        return (self.owner == work.owner and self.setup == work.setup and self.child.is_alive
                and [*self.before, self.prompt] == [*before, prompt] and {call.id for call in calls} == set(results)
                and {call.id: call for call in calls} == {call.id: call for call in self.calls})


class Candidate(NamedTuple):
    """One way to take a turn. history: told again first; fresh: the child was started for this turn; results: what its calls are
    answered with, where it is in the middle of a turn, and model: which one answers there."""
    child: ClaudeProcess
    session_id: Optional[str]
    is_open: bool = False
    history: Sequence[HistoryTurn] = ()
    fresh: bool = False
    results: Mapping[str, Dict[str, Any]] = {}
    model: Optional[str] = None


class SessionLost(Exception):
    """The CLI does not know the session that was to be resumed."""


def raise_if_stopped(reason: Optional[str]) -> None:
    """Raises RunFailed where there is a reason, a key of RUN_ERRORS, to end a run."""
    if reason:
        raise RunFailed(reason, RUN_ERRORS[reason].capitalize() + ".")


class Turn:
    """One turn with one child: its deadlines, and what is read until the result."""

    def __init__(self, child: ClaudeProcess, setup: SessionConfig, clock: Clock, config: Config, deadline: float,
                 stop_reason: Callable[[], Optional[str]], on_rate_limits: Callable[[RateLimitStatus], None]) -> None:
        self._child, self._setup, self._clock, self._config, self._record_rate_limits = child, setup, clock, config, on_rate_limits
        self._deadline, self._stop_reason, self._look_at = deadline, stop_reason, float("-inf")
        self._tools: Set[str] = set()    # those that run: a command may be silent for long
        self.heard = False               # the prompt was taken: from now on a lost child is a failed run
        self.over = False                # the result came: the child is idle
        self._is_overloaded = False      # claude itself waits and tries again
        self._results: Mapping[str, Dict[str, Any]] = {}      # of the client's tools, by call
        self._message = ""               # the id of the present message, its blocks, and whether they are all
        self._blocks: List[Block] = []
        self._message_complete = False
        self._used: Dict[str, Dict[str, int]] = {}            # token counts by message

    def event(self) -> CliEvent:
        """The next event. Raises RunFailed at a deadline or when the job is no longer wanted; ChildGone."""
        silent_at = self._clock.monotonic() + self._config.silence_seconds
        while True:
            now = self._clock.monotonic()
            if now >= self._look_at:             # not for every word of a fast answer: it asks the database
                self._look_at = now + POLL_SECONDS
                raise_if_stopped(self._stop_reason())
            if now >= self._deadline:
                raise RunFailed("overloaded" if self._is_overloaded else "timeout", "The run took longer than %g seconds%s." % (
                    self._config.run_seconds, ", in which the service was overloaded" if self._is_overloaded else ""))
            if now >= silent_at and not self._tools:
                raise RunFailed("timeout", "claude gave no sign of life for %g seconds." % self._config.silence_seconds)
            event = self._child.next_event(min(POLL_SECONDS, self._deadline - now))
            if event is not None:
                if event.kind == "message":
                    self._tools.clear()
                self._tools = self._tools.union(event.tools) if event.kind == "assistant" else self._tools.difference(event.tools)
                if event.kind == "asks":
                    self._handle_control_request(str(event.body.get("request_id")), event.body.get("request") or {})
                return event

    def _handle_control_request(self, request_id: str, request: Mapping[str, Any]) -> None:
        """The CLI asks us. As the server of the client's tools we tell what there is; calls are for the client to answer."""
        message = request.get("message")
        if not self._setup.client_tools or request.get("subtype") != "mcp_message" or not isinstance(message, dict):
            return self._child.send({"type": "control_response", "response": {
                "subtype": "error", "request_id": request_id, "error": "not supported by this client"}})
        if message.get("method") != "tools/call":
            return self._reply(request_id, message.get("id"), mcp_result(message, self._setup.client_tools))
        call_id = str(((message.get("params") or {}).get("_meta") or {}).get("claudecode/toolUseId"))
        if call_id in self._results:
            return self._reply(request_id, message.get("id"), self._results[call_id])
        if call_id not in [block.get("id") for block in self._blocks]:       # of a subagent, say: nobody could be told
            return self._reply(request_id, message.get("id"), {
                "content": [{"type": "text", "text": "This tool cannot be called from here."}], "isError": True})
        self._child.calls[call_id] = request_id, message.get("id")

    def _reply(self, request_id: str, message_id: Any, result: Mapping[str, Any]) -> None:
        answer = {"jsonrpc": "2.0", "id": 0 if message_id is None else message_id, "result": result}
        self._child.send({"type": "control_response", "response": {
            "subtype": "success", "request_id": request_id, "response": {"mcp_response": answer}}})

    def open(self, features: Features, history: Sequence[HistoryTurn]) -> None:
        """Tells a fresh child who it is, and what was said before. Each earlier message must be acknowledged before
        its answer is told, else the CLI puts all messages after all answers."""
        setup = self._setup
        if history and features.version < HISTORY_REPLAY_CLI:
            setup, history = replace(setup, system_prompt=prompt_with_history(setup.system_prompt, history)), ()
        requests = self._child.tell(setup, features)
        if len(requests) > 1:
            self._acknowledged(requests[-1]["request_id"])
        for n, exchange in enumerate(history):
            self._child.send(user_message(exchange.message, asks=False))
            while self.event().kind != "result":
                pass
            self._child.send(assistant_message(exchange.response, "msg_told_%d" % n))

    def _acknowledged(self, request_id: str) -> None:
        """Waits for the answer to a control request: a prompt that follows too closely may be asked without it."""
        while True:
            response = self.event().body.get("response") or {}
            self._check_control(response)
            if response.get("request_id") == request_id:
                return

    def ask(self, message: Content) -> None:
        self._child.send(user_message(message))

    def resume(self, results: Mapping[str, Dict[str, Any]], live: LiveText, model: Optional[str]) -> None:
        """Goes on with a turn that waits for these results; the CLI asks for some of them later, when it calls one tool after the other."""
        self._results = results
        live.begin(model)
        for call_id in list(self._child.calls):
            self._reply(*self._child.calls.pop(call_id), results[call_id])

    def answer(self, live: LiveText, model: Optional[str] = None) -> Answer:
        """Reads to the end of the turn, to a stop sequence, or to a call of the client's tools, at which the turn waits; what is
        structured is told when it is whole. Raises RunFailed, SessionLost, ChildGone."""
        said = ""
        while True:
            event = self.event()
            if event.kind == "delta" and not self._setup.json_schema:
                live.add(event.text)
                if live.size > OUTPUT_BYTES:
                    raise RunFailed("output_too_large", "The answer is larger than %d bytes." % OUTPUT_BYTES)
                if live.stopped_by:
                    text = live.read()
                    usage = self._usage()
                    return Answer(text, None, usage._replace(output_tokens=max(usage.output_tokens, len(text) // 4)), model,
                                  stop_info=StopInfo("stop_sequence", live.stopped_by))
            elif event.kind == "message":
                self.heard = True
                self._begin_message(event.body["event"].get("message") or {})
                live.restart()
                live.rest, self._is_overloaded = None, False
            elif event.kind == "usage":
                self._used.setdefault(self._message, {}).update(token_counts(event.body["event"].get("usage")))
            elif event.kind == "stop":
                self._message_complete = True
            elif event.kind == "retry":
                self._is_overloaded = event.body.get("error_status") in (429, *OVERLOADED)
                seconds = number_or_none(event.body.get("retry_delay_ms")) or 0
                live.rest = Pause("overloaded", self._clock.now() + seconds / 1000) if self._is_overloaded else None
            elif event.kind == "init":
                self.heard, model = True, event.body.get("model")
                self._guard_billing(event.body.get("apiKeySource"))
                self._check_client_tools(event.body.get("tools"))
                live.begin(model)
            elif event.kind == "limits":
                self._child.limits = parse_rate_limits(event.body, self._clock.now())
                self._record_rate_limits(self._child.limits)
            elif event.kind == "assistant":
                said = str(event.body.get("error") or said)
                self._add_blocks(event.body)
            elif event.kind == "control":
                self._check_control(event.body.get("response") or {})
            elif event.kind == "result":
                return self._result(event.body, said, model, live)
            if self._child.calls and self._message_complete:
                return self._call(model)

    def _begin_message(self, message: Mapping[str, Any]) -> None:
        self._message, self._blocks, self._message_complete = str(message.get("id")), [], False
        self._used[self._message] = token_counts(message.get("usage"))

    def _add_blocks(self, body: Mapping[str, Any]) -> None:
        """A part of a message; of one that is not streamed each part tells why it stopped, and what all of it used."""
        message = body.get("message") or {}
        if body.get("parent_tool_use_id") or not isinstance(message.get("content"), list):
            return
        if str(message.get("id")) != self._message:
            self._begin_message(message)
        self._blocks += message["content"]
        if message.get("stop_reason"):
            self._message_complete = True
            self._used[self._message] = token_counts(message.get("usage"))

    def _usage(self) -> Usage:
        """What the messages of this turn used, as far as they are told; the cost comes with the result."""
        return Usage(*(sum(counts.get(name, 0) for counts in self._used.values()) for name in USAGE_NAMES))

    def _call(self, model: Optional[str]) -> Answer:
        """The model wants something done by the client."""
        usage = self._usage()
        self._child.told_usage = Usage(*map(sum, zip(self._child.told_usage, usage)))
        calls = tuple(ToolCall(block["id"], block["name"][len(TOOL_PREFIX):], block.get("input") or {}) for block in self._blocks
                      if block.get("id") in self._tools and str(block.get("name")).startswith(TOOL_PREFIX))
        text = "".join(block["text"] for block in self._blocks if block.get("type") == "text")
        return Answer(text, None, usage, model, stop_info=StopInfo("tool_use", None, calls))

    def _guard_billing(self, source: Any) -> None:
        if source and source != "none" and not self._config.allow_api_key:
            self._child.stop()
            raise RunFailed("billing_guard", "claude would have billed this run to an API key (%s), so it was stopped. Sign claude in"
                            " to the subscription, or allow it with --allow-api-key." % redact(str(source)))

    def _check_client_tools(self, tools: Any) -> None:
        """An answer without the client's tools would be another one than was asked for."""
        wanted = [each["name"] for each in self._setup.client_tools]
        missing = [name for name in wanted if TOOL_PREFIX + name not in (tools or ())]
        if missing:
            raise RunFailed("cli_error", "claude did not take the tools %s." % ", ".join(missing))

    @staticmethod
    def _check_control(response: Mapping[str, Any]) -> None:
        if response.get("subtype") == "error":
            raise RunFailed("cli_error", "claude refused its settings: %s" % redact(str(response.get("error"))))

    def _result(self, body: Mapping[str, Any], said: str, model: Optional[str], live: LiveText) -> Answer:
        self.over = True
        if body.get("is_error") or body.get("subtype") != "success":
            failure = classify_failure(body, said, self._child.limits)
            if not self.heard and "No conversation found" in str(failure):
                raise SessionLost()
            raise failure
        text, structured = str(body.get("result") or ""), None
        if self._setup.json_schema:
            if "structured_output" not in body:
                raise RunFailed("cli_error", "The model did not give an answer that satisfies jsonSchema.")
            structured = as_json(body["structured_output"])
        if len(text.encode("utf-8", "replace")) > OUTPUT_BYTES:
            raise RunFailed("output_too_large", "The answer is larger than %d bytes." % OUTPUT_BYTES)
        usage, self._child.spent_usd = turn_usage(body, self._child.spent_usd, self._child.told_usage)
        text, stop = cut_at_stop(text, live.stop_sequences)
        reason = "stop_sequence" if stop else str(body.get("stop_reason") or "end_turn")
        return Answer(text, structured, usage, model, spent_usd=self._child.spent_usd,
                      stop_info=StopInfo("end_turn" if reason == "tool_use" else reason, stop))      # of the tool that takes what is structured


def file_fingerprint(program: str) -> Optional[Tuple[float, ...]]:
    """What differs once a program was replaced; None where there is none."""
    try:
        found = os.stat(program)
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode
    except OSError:
        return None


class ClaudePool:
    """Answers jobs by `claude`. Owns its children: a spare, those of conversations, those that wait for the client's tools, and those
    that are leaving."""

    def __init__(self, claude: ClaudeInstall, config: Config, clock: Clock, tag: str, record_process: Callable[[int, Optional[str]], None],
                 metrics: Optional[Metrics] = None, look: Optional[Callable[[], ClaudeInstall]] = None) -> None:
        """look: finds claude again, when its program was replaced."""
        self.claude, self._metrics, self._look, self._mark = claude, metrics or Metrics(), look, file_fingerprint(claude.command[0])
        self._config, self._clock, self._tag, self._note_child = config, clock, tag, record_process
        self._idle_processes: List[ClaudeProcess] = []                  # the oldest first
        self._default_streak = DEFAULT_STREAK_TO_PREINIT               # requests without settings of their own, since the last that had some
        self._spare_after = 0.0
        self._conversations: "OrderedDict[str, Warm]" = OrderedDict()
        self._awaiting_tools: List[PendingToolCall] = []
        self._terminating: List[ClaudeProcess] = []
        self._count = 0

    @property
    def spares(self) -> int:
        return len(self._idle_processes)

    @property
    def has_terminating(self) -> bool:
        return bool(self._terminating)

    def run(self, work: RunRequest, live: LiveText, stop_reason: Callable[[], Optional[str]],
            on_rate_limits: Callable[[RateLimitStatus], None] = lambda limits: None) -> Answer:
        """One turn, from the prompt to the answer; tried again, within its time, while the service is overloaded. Raises RunFailed.

        stop_reason: asked ten times a second; a key of RUN_ERRORS ends the run. note_limits: is told what the CLI says of the plan.
        """
        self._redetect_if_replaced()
        if work.setup.json_schema and self.claude.features.version < JSON_SCHEMA_CLI:
            raise RunFailed("cli_error", "jsonSchema needs Claude Code 2.1.197 or newer; this is %s." % self.claude.features.version_text)
        if work.setup.client_tools and self.claude.features.version < CLIENT_TOOLS_CLI:
            raise RunFailed("cli_error", "Tools of the client need Claude Code 2.1.197 or newer; this is %s."
                            % self.claude.features.version_text)
        if self.claude.is_billed_per_token and not self._config.allow_api_key:      # known before: not even the first request goes out
            raise RunFailed("billing_guard", "claude is signed in with %s, which would be billed per token. Sign it in to the"
                            " subscription and restart the bridge, or allow it with --allow-api-key." % self.claude.billing_account)
        deadline = self._clock.monotonic() + self._config.run_seconds
        overload: Optional[RunFailed] = None
        for seconds in chain(BACK_OFF_SECONDS, repeat(BACK_OFF_SECONDS[-1])):
            try:
                return self._try(work, live, deadline, stop_reason, on_rate_limits)
            except RunFailed as failure:
                if failure.code == "timeout" and overload:
                    raise overload from None
                if failure.code != "overloaded" or self._clock.monotonic() + seconds >= deadline:
                    raise
                overload = failure
            work = replace(work, session_id=None)            # its transcript may hold the failed turn
            live.pause(Pause("overloaded", self._clock.now() + seconds))
            until = self._clock.monotonic() + seconds
            while self._clock.monotonic() < until:
                raise_if_stopped(stop_reason())
                time.sleep(POLL_SECONDS)
        raise AssertionError("unreachable")

    def _redetect_if_replaced(self) -> None:
        """After an update of claude: asks what the new one can do, and lets go of the spare of the old one, which serves on while there
        is none. Raises RunFailed."""
        if not self._look or file_fingerprint(self.claude.command[0]) in (self._mark, None):
            return
        self._end_spares(self._idle_processes)
        self._spare_after = 0.0
        try:
            self.claude = self._look()
        except CannotStart as error:
            raise RunFailed("cli_error", "%s Hint: %s." % (error, error.hint)) from None
        self._mark = file_fingerprint(self.claude.command[0])

    def _try(self, work: RunRequest, live: LiveText, deadline: float, stop_reason: Callable[[], Optional[str]],
             on_rate_limits: Callable[[RateLimitStatus], None]) -> Answer:
        refill_at = self._clock.monotonic() + REFILL_SECONDS

        def look() -> Optional[str]:
            if self._clock.monotonic() >= refill_at:
                self.prepare()
            return stop_reason()

        for way in self._candidates(work):
            turn = Turn(way.child, work.setup, self._clock, self._config, deadline, look, on_rate_limits)
            try:
                if way.results:
                    turn.resume(way.results, live, way.model)
                else:
                    if not way.is_open:
                        turn.open(self.claude.features, way.history)
                    turn.ask(work.message)
                answer = replace(turn.answer(live, way.model), session_id=way.session_id)
            except (SessionLost, ChildGone) as lost:
                self._terminate(way.child, work.setup, idle=False)
                if isinstance(lost, ChildGone) and (turn.heard or way.fresh):
                    raise RunFailed("cli_error", str(lost)) from None
            except BaseException:
                self._terminate(way.child, work.setup, idle=turn.over)
                raise
            else:
                self._keep(work, way, answer, turn.over)
                return answer
        raise RunFailed("cli_error", "claude could not be started.")

    def _candidates(self, work: RunRequest) -> Iterator[Candidate]:
        """The children that could take the turn, best first; the next is asked for only when one was lost unheard."""
        history: Sequence[HistoryTurn] = ()
        if not work.conversation:
            history, results = work.history(), mcp_results(work.message)
            aside = next((each for each in self._awaiting_tools if results and history and each.fits(work, results, history)), None)
            if aside and results:
                self._awaiting_tools.remove(aside)
                yield Candidate(aside.child, None, is_open=True, results=results, model=aside.model)
        else:
            warm = self._conversations.pop(work.conversation, None)
            if warm and warm.child.is_alive and warm.setup == work.setup:
                yield Candidate(warm.child, warm.session_id, is_open=True)
            elif warm:
                self._terminate(warm.child, warm.setup)
            if work.session_id:
                yield Candidate(self._resume(work, work.session_id), work.session_id)
            history = work.history()
            if not history:
                session_id = str(uuid.uuid4())
                yield Candidate(self._spawn(work.setup, "--session-id=" + session_id), session_id)
        if work.setup.tools == Tools.NONE and self._config.spare:
            self._default_streak = self._default_streak + 1 if work.setup == DEFAULT_SESSION else 0
            spare = next((each for each in self._idle_processes if work.setup == DEFAULT_SESSION or not each.initialized), None)
            has_spare = spare is not None and not self._needs_effort_flag(work.setup)
            self._metrics.add("cab_spare_total", result="hit" if has_spare else "miss")
            if spare and has_spare:
                self._idle_processes.remove(spare)
                yield Candidate(spare, None, history=history)
        yield Candidate(self._spawn(work.setup), None, history=history, fresh=True)

    def _resume(self, work: RunRequest, session_id: str) -> ClaudeProcess:
        """A child that knows the session, once the last one that had it is gone: two must not write one session.

        --model default: else a turn without a model would keep the one of the last turn.
        """
        for leaving in [child for child in self._terminating if child.session_id == session_id]:
            leaving.close_stdin_and_wait(SHUTDOWN_GRACE_SECONDS)
            self._reap(leaving)
        child = self._spawn(work.setup, "--resume=" + session_id, *(() if work.setup.model else ("--model", "default")))
        child.spent_usd = work.spent_usd
        return child

    def _keep(self, work: RunRequest, way: Candidate, answer: Answer, is_idle: bool) -> None:
        """After a success: the child of a conversation stays, one that waits for the client's tools waits aside, any other leaves."""
        if answer.stop_info.calls:
            self._awaiting_tools.append(PendingToolCall(way.child, work.setup, answer.model, work.owner, work.history(), work.message,
                                      answer.stop_info.calls, self._clock.monotonic() + TOOL_RESULT_WAIT_SECONDS))
            return self._end_asides(self._awaiting_tools[:-MAX_KEPT_PROCESSES])
        if not work.conversation or not self._config.warm_seconds:
            return self._terminate(way.child, work.setup, is_idle)
        self._conversations[work.conversation] = ConversationProcess(way.child, work.setup, way.session_id, self._clock.monotonic() + self._config.warm_seconds)
        while len(self._conversations) > MAX_KEPT_PROCESSES:
            oldest = self._conversations.popitem(last=False)[1]
            self._terminate(oldest.child, oldest.setup)

    def _end_asides(self, asides: Sequence[PendingToolCall]) -> None:
        for aside in asides:
            self._awaiting_tools.remove(aside)
            self._terminate(aside.child, aside.setup, idle=False)

    def _end_spares(self, spares: Sequence[ClaudeProcess]) -> None:
        for spare in list(spares):
            self._idle_processes.remove(spare)
            self._terminate(spare, DEFAULT_SESSION)

    def prepare(self) -> None:
        """Keeps house: a spare is there, cooled conversations leave, as do those whose client stays away, and those that were leaving
        are gone."""
        now = self._clock.monotonic()
        self._end_asides([aside for aside in self._awaiting_tools if now >= aside.until or not aside.child.is_alive])
        for key in [key for key, warm in self._conversations.items() if now >= warm.until or not warm.child.is_alive]:
            self.forget(key)
        self.tend()
        for spare in [spare for spare in self._idle_processes if not spare.is_alive]:
            self._idle_processes.remove(spare)
            self._reap(spare)
            self._spare_after = now + 30                       # one that ends by itself would do it again
        is_usual = self._default_streak >= DEFAULT_STREAK_TO_PREINIT and self.claude.features.version >= HISTORY_REPLAY_CLI
        self._end_spares([spare for spare in self._idle_processes if spare.initialized and not is_usual])
        while len(self._idle_processes) < self._config.spare and now >= self._spare_after:
            try:
                self._idle_processes.append(self._spawn(DEFAULT_SESSION))
            except RunFailed:
                self._spare_after = now + 30
        for spare in self._idle_processes[:1] if is_usual else ():     # it can be told only once: another request needs another process
            spare.tell(DEFAULT_SESSION, self.claude.features)

    def tend(self) -> None:
        """Sees to those that are leaving; often, since it ends what does not go."""
        now = self._clock.monotonic()
        for child in [child for child in self._terminating if child.tend(now)]:
            self._reap(child)

    def evict_unless(self, is_known: Callable[[str], bool], is_owner: Callable[[str], bool]) -> None:
        """Ends the processes of the conversations, and of the tokens, that are gone."""
        self._end_asides([aside for aside in self._awaiting_tools if not is_owner(aside.owner)])
        for key in [key for key in self._conversations if not is_known(key)]:
            self.forget(key)

    def forget(self, key: str) -> None:
        """Ends the process of a conversation, if there is one."""
        warm = self._conversations.pop(key, None)
        if warm:
            self._terminate(warm.child, warm.setup)

    def _spawn(self, setup: SessionConfig, *session: str) -> ClaudeProcess:
        """A new child. Raises RunFailed."""
        folder = Path(setup.workspace) if setup.workspace else self._config.data_dir / "work"
        argv = claude_argv(self.claude.command, self.claude.features, setup.tools, session)
        if self._needs_effort_flag(setup):
            argv += ["--effort", str(setup.effort)]         # one of EFFORTS, no client's text
        self._count += 1
        try:
            if not setup.workspace:
                private_directory(folder)
            child = ClaudeProcess(argv, folder, self.claude.environment, "%s.%d." % (self._tag, self._count))
        except (OSError, CannotStart) as error:
            is_scarce = getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)
            raise RunFailed("overloaded" if is_scarce else "cli_error", "claude could not be started: %s" % error) from None
        child.session_id = session[0].partition("=")[2] if session else None
        self._metrics.add("cab_cli_starts_total")
        self._note_child(child.pid, started_at(child.pid))
        return child

    def _needs_effort_flag(self, setup: SessionConfig) -> bool:
        features = self.claude.features
        return bool(setup.effort) and features.version < EFFORT_CLI and "--effort" in features.flags

    def _terminate(self, child: ClaudeProcess, setup: SessionConfig, idle: bool = True) -> None:
        """Asks a child to go; nobody waits for it."""
        has_tools = setup.tools != Tools.NONE
        while len(self._terminating) >= MAX_KEPT_PROCESSES:            # who asks and cancels in turn shall not gather them
            self._reap(self._terminating[0])
        child.leave(self._clock.monotonic(), 5.0 if idle and not has_tools else SHUTDOWN_GRACE_SECONDS, interrupt=not idle, family=has_tools)
        self._terminating.append(child)

    def _reap(self, child: ClaudeProcess) -> None:
        child.stop()
        self._terminating = [other for other in self._terminating if other is not child]
        self._note_child(child.pid, None)

    def close(self) -> None:
        """Ends every child; within 2 seconds."""
        self._end_asides(list(self._awaiting_tools))
        for warm in self._conversations.values():
            self._terminate(warm.child, warm.setup)
        self._end_spares(self._idle_processes)
        until = self._clock.monotonic() + SHUTDOWN_GRACE_SECONDS
        for child in list(self._terminating):
            child.close_stdin_and_wait(max(0.0, until - self._clock.monotonic()))
            self._reap(child)
        for pid in processes_tagged(self._tag + "."):
            kill_process(pid)
        self._conversations.clear()


class CloudflaredInstall:
    """Finds cloudflared, or downloads it. say: a line for the terminal, where True means that the next one may replace it."""

    def __init__(self, config: Config, environ: Mapping[str, str], clock: Clock, say: Callable[[str, bool], None]) -> None:
        self._config, self._environ, self._clock, self._say = config, environ, clock, say
        self._asset = cloudflared_asset(platform.system(), platform.machine())
        self._folder = config.data_dir / "bin"

    def owners(self) -> Optional[Path]:
        """The one that the owner named or installed; it is the owner's choice, and not checked. Raises CannotTunnel."""
        found = shutil.which(self._config.cloudflared or "cloudflared", path=self._environ.get("PATH", os.defpath))
        if self._config.cloudflared and not found:
            raise CannotTunnel("There is no program %s." % self._config.cloudflared, "name the right one with --cloudflared PATH")
        return Path(found).absolute() if found else None

    def ours(self) -> Optional[Path]:
        """The one that was downloaded, if it still is what it was."""
        asset, path = self._asset, self._path()
        return path if asset and path.is_file() and sha256_of(path) == (asset.program_sha256 or asset.sha256) else None

    def _path(self) -> Path:
        return self._folder / ("cloudflared.exe" if os.name == "nt" else "cloudflared")

    def get(self, is_stopping: Callable[[], bool]) -> Path:
        """The program, downloaded if need be. Raises CannotTunnel; OSError, ValueError, HTTPException, which may pass."""
        return self.owners() or self.ours() or self.download(is_stopping)

    def download(self, is_stopping: Callable[[], bool]) -> Path:
        """Into place only when size and sum are right; whatever goes wrong, nothing stays. Raises as `get` does."""
        asset = self._asset
        if not asset:
            raise CannotTunnel("There is no cloudflared for this system (%s, %s)." % (platform.system(), platform.machine()),
                               "install it yourself and name it with --cloudflared PATH, or start with --no-tunnel")
        url = "%s/%s/%s" % (self._config.cloudflared_url.rstrip("/"), CLOUDFLARED_VERSION, asset.name)
        self._say("Downloading cloudflared %s (%d MB)..." % (CLOUDFLARED_VERSION, asset.size >> 20), False)
        try:
            private_directory(self._folder)
        except CannotStart as error:
            raise CannotTunnel(str(error), error.hint) from None
        for old in self._folder.glob("*.part"):            # of a bridge that was killed meanwhile
            shutil.rmtree(old, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=str(self._folder), suffix=".part") as part:
            packed, program = Path(part, "download"), Path(part, "cloudflared")
            self._fetch(url, asset, packed, is_stopping)
            if sha256_of(packed) != asset.sha256:
                raise CannotTunnel("The file from %s is not the cloudflared that is expected (its SHA-256 differs); it was not run." % url,
                                   "somebody may have changed it on the way: try another network, or install cloudflared yourself and"
                                   " name it with --cloudflared PATH")
            if asset.program_sha256:
                unpack_program(packed, program)
                if sha256_of(program) != asset.program_sha256:
                    raise CannotTunnel("The program in %s is not the cloudflared that is expected; it was not run." % asset.name,
                                       "install cloudflared yourself and name it with --cloudflared PATH")
            else:
                os.replace(packed, program)
            program.chmod(0o755)
            os.replace(program, self._path())
        self._say("cloudflared is installed in %s" % self._folder, False)
        return self._path()

    def _fetch(self, url: str, asset: Asset, target: Path, is_stopping: Callable[[], bool]) -> None:
        """Raises OSError, HTTPException for what may pass: no network, a broken-off or endless file, too slow, or the bridge ends."""
        import urllib.error                                 # here alone: a start does without
        import urllib.request
        until, got, told = self._clock.monotonic() + DOWNLOAD_SECONDS, 0, -1
        try:
            source = urllib.request.urlopen(url, timeout=5)
        except urllib.error.HTTPError as error:
            with error:
                raise OSError(str(error)) from None
        with source, open(target, "xb") as file:
            for data in iter(lambda: source.read1(1 << 16), b""):
                got += len(data)
                if got > asset.size:
                    raise OSError("the file is larger than the %d bytes expected" % asset.size)
                if is_stopping() or self._clock.monotonic() > until:
                    raise OSError("the download was stopped after %d bytes" % got)
                file.write(data)
                if got * 100 // asset.size > told:
                    told = got * 100 // asset.size
                    self._say("Downloading cloudflared: %d %%" % told, True)
        if got < asset.size:
            raise OSError("the file broke off after %d of %d bytes" % (got, asset.size))


def sha256_of(path: Path) -> str:
    summed = hashlib.sha256()
    with open(path, "rb") as file:
        for data in iter(lambda: file.read(1 << 20), b""):
            summed.update(data)
    return summed.hexdigest()


def unpack_program(archive: Path, target: Path) -> None:
    """Takes the one regular file `cloudflared` out of a .tgz, whatever else it holds. Raises CannotTunnel."""
    import tarfile                                          # on macOS alone
    import zlib
    with contextlib.suppress(tarfile.TarError, OSError, EOFError, zlib.error), tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            source = tar.extractfile(member) if member.name == "cloudflared" and member.isreg() and member.size <= UNPACKED_BYTES else None
            if source:
                with source, open(target, "xb") as file:
                    return shutil.copyfileobj(source, file)
    raise CannotTunnel("The archive of cloudflared does not hold the program.",
                       "install cloudflared yourself, and name it with --cloudflared PATH")


class Cloudflared:
    """One process of cloudflared, and what it tells in its log and at its metrics address. Owns the thread "cloudflared-log",
    which reads the log for as long as the process lives: it would die of a closed pipe, and stop serving at a full one."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], tag: str) -> None:
        """Raises OSError."""
        self.metrics = self.host = ""
        self._tail: Deque[str] = deque(maxlen=LOG_LINES)
        self.process = subprocess.Popen(list(argv), env={**environment, OWNER_ENV_VAR: tag}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, bufsize=0, **group_options(getattr(signal, "SIGKILL", 9)))
        self.pid = self.process.pid
        self._pump = threading.Thread(target=self._read_log, name="cloudflared-log-%d" % self.pid, daemon=True)
        self._pump.start()

    def _read_log(self) -> None:
        pipe, rest = self.process.stdout, b""
        assert pipe is not None
        with pipe:
            for data in iter(lambda: os.read(pipe.fileno(), 1 << 16), b""):
                *lines, rest = (rest + data).split(b"\n")
                rest = rest[:STDERR_BYTES]                  # what a line has beyond that is cut
                for line in lines:
                    self._note(line[:STDERR_BYTES])
        self._note(rest)

    def _note(self, data: bytes) -> None:
        line = data.decode("utf-8", "replace").rstrip()
        kind, value = parse_tunnel_line(line)
        if kind == "host":
            self.host = value
        elif kind == "metrics":
            self.metrics = value
        if line:
            self._tail.append(line)

    def ask(self, path: str) -> Tuple[int, Any]:
        """A GET at the metrics address. -> (status, the JSON), or (0, None) while nobody answers."""
        if not self.metrics:
            return 0, None
        try:
            with contextlib.closing(http.client.HTTPConnection(self.metrics, timeout=1)) as connection:
                connection.request("GET", path)
                answer = connection.getresponse()
                return answer.status, json.loads(answer.read(1 << 20)) if answer.status == 200 else None
        except (OSError, ValueError, http.client.HTTPException):
            return 0, None

    def look(self, is_named: bool) -> TunnelStatus:
        """What can be seen now. The public address itself is never asked: a look-up that comes too soon is remembered
        as a failure, here and by everybody behind the same resolver."""
        code = self.process.poll()
        if code is not None:
            self._pump.join(1)
            words = self.last_words()
            is_usage = bool(re.match("Incorrect Usage|Provided Tunnel token is not valid", words))
            return TunnelStatus(True, is_usage, words="cloudflared ended (exit code %d)%s" % (code, ": " + words if words else ""))
        if not is_named:
            body = self.ask("/quicktunnel")[1]
            told = body.get("hostname") if isinstance(body, dict) else None
            self.host = told if isinstance(told, str) and QUICK_HOST.fullmatch(told) else self.host
        return TunnelStatus(has_host=is_named or bool(self.host), is_ready=self.ask("/ready")[0] == 200)

    def last_words(self) -> str:
        """The line that says why it ended: the last, but for a wrong flag or token, or a refusal, which have one of their own."""
        lines = list(self._tail)
        wrong = [line for line in lines if re.search("Incorrect Usage|token is not valid|429 Too Many Requests|error code: 1015", line)]
        return redact((wrong or lines[-1:] or [""])[0])[:300]

    def stop(self, grace: float) -> None:
        """SIGTERM, and what is left after `grace` seconds is killed; gone on return."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(grace)
            except subprocess.TimeoutExpired:
                pass
        if os.name != "nt" or self.process.poll() is None:
            kill_process(self.pid, group=True)
        self.process.wait()
        self._pump.join(1)


class Tunnel:
    """The public address: starts cloudflared, watches it and starts it again. Owns the thread "tunnel" and its child.

    announce: is told each new address; remember: keeps (name, value) for the next start.
    """

    def __init__(self, config: Config, install: CloudflaredInstall, policy: TunnelPolicy, token: str, clock: Clock, tag: str,
                 record_process: Callable[..., None], announce: Callable[[str], None], report: Callable[[str], None],
                 remember: Callable[[str, str], None]) -> None:
        self._config, self._install, self._policy, self._token, self._clock, self._tag = config, install, policy, token, clock, tag
        self._note_child, self._announce, self._report, self._remember = record_process, announce, report, remember
        self._child: Optional[Cloudflared] = None
        self._failure = TunnelStatus()                          # why there is no child
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="tunnel", daemon=True)
        self._port = 0
        self.url: Optional[str] = None                   # the last one that worked
        self.hosts: FrozenSet[str] = frozenset()         # the names by which the world reaches us through cloudflared now
        self.since: Optional[float] = None
        self.starts = 0
        self.is_ready = False
        self._has_warned = False

    def start(self, port: int) -> None:
        self._port = port
        self._thread.start()

    def retire(self) -> None:
        """Begins the end: no new requests come, those in flight get 5 seconds. Returns at once."""
        self._stopping.set()

    def close(self) -> None:
        """cloudflared is gone on return. Idempotent."""
        self._stopping.set()
        if self._thread.ident:
            self._thread.join(CLOSE_SECONDS + 2)
            child = self._child
            if self._thread.is_alive() and child:          # held up by a look at a process that does not answer
                child.process.kill()
                self._thread.join(CLOSE_SECONDS)

    @property
    def state(self) -> str:
        if not self._thread.is_alive():
            return TunnelState.STOPPED
        return TunnelState.STOPPING if self._stopping.is_set() else self._policy.state

    def details(self) -> Dict[str, Any]:
        """For /api/status: {"state": "running", "url": "https://...", "since": "...", "protocol": "quic", "starts": 1, ...}."""
        policy = self._policy
        return {"state": self.state, "url": self.url if self.is_ready else None, "since": iso_time(self.since) if self.is_ready else None,
                "protocol": policy.protocol, "starts": self.starts,
                "error": None if self.is_ready else policy.why or ("no connection" if policy.state == TunnelState.RUNNING else None),
                "retryInSeconds": max(0, math.ceil(policy.retry_at - self._clock.monotonic()))
                if policy.state == TunnelState.BACKOFF else None}

    def _loop(self) -> None:
        action, look_at = self._policy.start(self._clock.monotonic()), 0.0
        try:
            while not self._stopping.is_set():
                try:
                    self._act(action)
                    self._stopping.wait(0.1 if self._policy.state == TunnelState.STARTING else 0.5)
                    now, action = self._clock.monotonic(), ""
                    has_ended = not self._child or self._child.process.poll() is not None
                    is_due = now >= look_at or has_ended or self._policy.state != TunnelState.RUNNING or not self.url
                    if is_due and not self._stopping.is_set():
                        action, look_at = self._policy.step(now, self._look()), now + READY_SECONDS
                except Exception:
                    self._report("The tunnel met an error:\n" + redact(traceback.format_exc()))
                    self._stopping.wait(READY_SECONDS)
        finally:
            self._end(CLOSE_SECONDS + 1)                 # cloudflared's own grace is 5 seconds

    def _look(self) -> TunnelStatus:
        if not self._child:
            return self._failure
        sight = self._child.look(bool(self._token))
        if sight.is_ready and sight.has_host:
            self._on_connected(self._child)
        elif self.is_ready and not sight.is_ended:
            self.is_ready = False
            self._report("The tunnel has lost its connection; cloudflared tries to get it back.")
        return sight

    def _on_connected(self, child: Cloudflared) -> None:
        """It is connected: tells by which address, once that is known (a named tunnel is told its own by Cloudflare, a little later)."""
        config = child.ask("/config")[1] if self._token else None
        found, rules = hosts_in_ingress(config, self._port, self._config.origin(self._port))
        found = found if self._token else [child.host]
        url = self._config.public_url.rstrip("/") if self._token else ""
        url = url or ("https://" + found[0] if found else "")
        self.hosts = frozenset(each.lower() for each in (*found, host_of(url)) if each)
        if rules and not found and not self._has_warned:
            self._has_warned = True
            self._report("The tunnel is connected, but no public hostname in its configuration has the service http://localhost:%d (it has:"
                         " %s). Add one, or tell the name with --public-url." % (self._port, "; ".join(rules)[:300]))
        if self.is_ready and (url or None) == self.url:
            return
        if url and url != self.url:
            self._announce(url)
        else:
            self._report("The tunnel is connected" + (": " + url if url else ", and waits for its configuration. --public-url tells its"
                                                                         " address at once."))
        self.is_ready, self.since, self.url = True, self._clock.now(), url or None
        self._remember("tunnel_protocol", self._policy.protocol)

    def _act(self, action: str) -> None:
        if not action:
            return
        self._end(1.0)
        if action == "start":
            self._failure = self._spawn()
            self._policy.began(self._clock.monotonic())
            return
        policy = self._policy
        self._report("The tunnel failed: %s. The bridge serves locally; %s" % (policy.why.rstrip("."), (
            "the tunnel is given up." if policy.state == TunnelState.FATAL else "next try in %d s." % math.ceil(
                policy.retry_at - self._clock.monotonic()))))

    def _spawn(self) -> TunnelStatus:
        """-> what stands in the way of a start, or nothing."""
        try:
            program = self._install.get(self._stopping.is_set)
        except CannotTunnel as error:
            return TunnelStatus(True, True, words="%s (%s)" % (error, error.hint))
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = getattr(error, "reason", None) or error
            return TunnelStatus(True, words="cloudflared could not be downloaded from %s: %s" % (self._config.cloudflared_url, why))
        empty = self._config.data_dir / "cloudflared.yml"
        argv = tunnel_argv(str(program), str(empty), self._config.origin(self._port), self._policy.protocol, bool(self._token))
        try:
            write_file_atomically(empty, "{}\n")
            self._child = Cloudflared(argv, tunnel_environment(os.environ, self._token), self._tag + ".tunnel")
        except OSError as error:
            return TunnelStatus(True, isinstance(error, PermissionError), words="cloudflared cannot be run: %s" % error)
        self.starts += 1
        self._note_child(self._child.pid, started_at(self._child.pid), program_of(self._child.pid))
        return TunnelStatus()

    def _end(self, grace: float) -> None:
        self.is_ready, self.hosts, self._has_warned = False, frozenset(), False
        if self._child:
            self._child.stop(grace)
            self._note_child(self._child.pid, None)
            self._child = None


def host_of(url: str) -> str:
    """The host name of an address, in small letters, without the port."""
    return (urlsplit(url).hostname or "").lower()


# === 7 Queue ==================================================================================================
# The worker takes jobs from the store, one after the other; the hub wakes those who wait for one.


class Notifier:
    """Wakes those who wait for a job. It carries no data: who wakes looks at the store again. Any thread."""
    QUEUE = ""                           # the key under which the worker waits for new jobs
    TEXT = "text of "                    # and, with a job's id, that of its text; the id alone is the key of its status

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: Dict[str, List[threading.Event]] = {}
        self.is_closed = False

    @contextlib.contextmanager
    def subscribe(self, *keys: str) -> Iterator[threading.Event]:
        """A bell that rings at every `wake` of a key from now on; look at the store after this, and clear it before looking."""
        bell = threading.Event()
        with self._lock:
            for key in keys:
                self._waiters.setdefault(key, []).append(bell)
            if self.is_closed:
                bell.set()
        try:
            yield bell
        finally:
            with self._lock:
                for key in keys:
                    self._waiters[key].remove(bell)
                    if not self._waiters[key]:
                        del self._waiters[key]

    def notify(self, key: str) -> None:
        with self._lock:
            for bell in self._waiters.get(key, ()):
                bell.set()

    def close(self) -> None:
        """Nobody waits any more."""
        with self._lock:
            self.is_closed = True
            for bells in self._waiters.values():
                for bell in bells:
                    bell.set()


def chat_work(job: Job, token: Token, chat: Chat) -> RunRequest:
    """What a run of a conversation told over /v1 needs."""
    client_tools, more = truncate_descriptions(chat.client_tools)
    setup = SessionConfig((job.system_prompt or SYSTEM_PROMPT) + more, job.model, job.json_schema, job.effort, token.tools, token.workspace,
                  client_tools)
    *earlier, last = map(prefix_tool_names, chat.turns)
    history = [HistoryTurn(*pair) for pair in zip(earlier[::2], earlier[1::2])]
    return RunRequest(last, setup, history=lambda: history, owner=job.token_id)


def answer_as_tool_call(answer: Answer, name: str, call_id: str) -> Answer:
    """An answer that is the input of a tool, as a call of it."""
    return replace(answer, text="", structured=None, stop_info=StopInfo("tool_use", None, (
        ToolCall(call_id, name, json.loads(answer.structured or "{}")),)))


class Worker:
    """Runs the jobs in order, one at a time. Owns the thread "worker", and in it the children of `claude`."""

    def __init__(self, store: Database, claude: ClaudePool, hub: Notifier, clock: Clock, report: Callable[[str], None], config: Config,
                 metrics: Optional[Metrics] = None) -> None:
        self._store, self._claude, self._hub, self._clock, self._report = store, claude, hub, clock, report
        self._metrics = metrics or Metrics()
        self._config = config
        self._live: Dict[str, LiveText] = {}
        self._pauses: Dict[str, Tuple[Pause, float]] = {}       # by model, "" for the default one; the float is the end on the other clock
        self._windows: Dict[str, RateLimitWindow] = {}
        self._restart_counts: Dict[str, int] = {}                 # job -> restarts, of a run whose end could not be stored
        self._stopping = threading.Event()
        self._abort_at = float("inf")
        self._last_maintenance = self._last_purge = float("-inf")
        self._clock_offset: Optional[float] = None            # at the last purge
        self._thread = threading.Thread(target=self._loop, name="worker", daemon=True)
        self.running: Optional[Tuple[str, float]] = None      # (job id, since), for whoever asks what the worker does

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def spares(self) -> int:
        return self._claude.spares

    def live(self, job_id: str) -> Optional[LiveText]:
        """The text of a running answer; None for a job that does not run."""
        return self._live.get(job_id)

    def rest(self, model: Optional[str] = ALL_MODELS) -> Optional[Pause]:
        """Why no job of this model (None: of the default one) is begun now; without one, why none is. The clock that is first ends it."""
        known = [self._pauses[key] for key in (ALL_MODELS, model or "") if key in self._pauses]
        rests = [rest for rest, until in known if self._clock.now() < rest.until and self._clock.monotonic() < until]
        return max(rests, key=lambda rest: rest.until, default=None)

    def close(self) -> None:
        """Lets a running job finish for a moment, then puts it back; the children are gone on return. Idempotent."""
        self._abort_at = min(self._abort_at, self._clock.monotonic() + FINISH_SECONDS)
        self._stopping.set()
        self._hub.notify(Notifier.QUEUE)
        if self._thread.ident:
            self._thread.join(CLOSE_SECONDS)

    def _loop(self) -> None:
        failed = False
        try:
            while not self._stopping.is_set():
                with self._hub.subscribe(Notifier.QUEUE) as bell:
                    try:
                        if failed:
                            self._store.recover()
                            failed = False
                        self._run_maintenance()
                        if not self.step():
                            rest = self.rest()
                            bell.wait(POLL_SECONDS if self._claude.has_terminating
                                      else min(MAINTENANCE_SECONDS, max(0.01, rest.until - self._clock.now())) if rest else MAINTENANCE_SECONDS)
                    except Exception:
                        if not failed:
                            self._report("The worker met an error and tries again every second:\n" + redact(traceback.format_exc()))
                        failed = True
                        self._stopping.wait(MAINTENANCE_SECONDS)
        finally:
            self._claude.close()

    def step(self) -> bool:
        """Claims the oldest job, runs it and stores what came of it. -> False when none waited, or this is no time to run."""
        but = [model for model in list(self._pauses) if self.rest(model)]
        job = self._store.claim(but) if not self.rest() and self._store.has_queued(but) else None
        token = self._store.token(job.token_id) if job else None
        if not job or not token:
            return False
        chat = self._store.chat(job.id) if job.api else None
        if job.api and not chat:                             # cancelled since it was claimed
            return True
        self._report("Processing request %s..." % job.id[:8])
        live = LiveText(max(job.generation, self._restart_counts.pop(job.id, 0)), lambda: self._hub.notify(Notifier.TEXT + job.id),
                        chat.stop_sequences if chat else ())
        self.running, self._live[job.id] = (job.id, self._clock.now()), live
        self._hub.notify(job.id)
        began = self._clock.monotonic()
        if job.attempts == 1:
            self._metrics.observe("cab_wait_seconds", max(0.0, self._clock.now() - job.created_at))
        work, is_kept, is_settled = None, False, False
        try:
            work = chat_work(job, token, chat) if chat else self._work(job, token)
            answer = self._claude.run(work, live, lambda: self._stop_reason(job), self._record_rate_limits)
            if chat and chat.forced_tool:
                answer = answer_as_tool_call(answer, chat.forced_tool, "toolu_" + job.id.replace("-", ""))
            elif chat and answer.structured:
                answer = replace(answer, text=answer.structured)
            live.finish(replace_surrogates(answer.text))
            is_kept = self._retry_until_stored(lambda: self._store.complete(job, answer, live.generation))
            is_settled = True
            self._metrics.observe("cab_run_seconds", self._clock.monotonic() - began)
            self._report("Request %s %s" % (job.id[:8], "completed" if is_kept else "is no longer wanted"))
        except RunFailed as failure:
            if failure.code not in REQUEUED:
                self._metrics.observe("cab_run_seconds", self._clock.monotonic() - began)
            self._handle_failure(job, failure, live)
            is_settled = True
        finally:
            if not is_settled:
                self._restart_counts[job.id] = live.generation + 1         # more than the store knows of
            if work and work.conversation and not is_kept:
                self._claude.forget(work.conversation)       # its process may have heard a turn that is not part of it
            self.running, self._last_maintenance = None, float("-inf")      # at once a new spare, where the run was too short for one
            del self._live[job.id]
            self._hub.notify(job.id)
        return True

    def _work(self, job: Job, token: Token) -> RunRequest:
        """Of an ask that came over /api."""
        setup = SessionConfig(job.system_prompt or SYSTEM_PROMPT, job.model, job.json_schema, job.effort, token.tools, token.workspace)
        if not job.conversation:
            return RunRequest(job.message, setup)
        session, now = self._store.open_conversation(job.token_id, job.conversation), self._store.job(job.id)
        if not now or not now.conversation:                  # deleted since the job was claimed: it is nobody's memory
            return RunRequest(job.message, setup)
        return RunRequest(job.message, setup, session.key, session.session_id, session.spent_usd, lambda: self._store.history(job))

    def _stop_reason(self, job: Job) -> Optional[str]:
        if self._clock.monotonic() >= self._abort_at:
            return "interrupted"
        with contextlib.suppress(Unavailable):       # a database that is locked for a while does not end a run
            self._run_maintenance()
            return None if self._store.job_status(job.id) == JobStatus.PROCESSING else "cancelled"
        return None

    def _retry_until_stored(self, write: Callable[[], bool]) -> bool:
        """Stores the end of a run, which cost too much to be lost to a full disk or a lock: tried again until the bridge ends."""
        for n in count():
            try:
                return write()
            except Unavailable as error:
                if n == 0:
                    self._report("What came of a request cannot be stored, and is tried again every second: %s" % error)
                if self._stopping.wait(MAINTENANCE_SECONDS):
                    raise
                self._claude.tend()
        raise AssertionError("unreachable")

    def _handle_failure(self, job: Job, failure: RunFailed, live: LiveText) -> None:
        """What becomes of a job whose run failed."""
        if failure.code in REQUEUED:
            live.restart()
            self._retry_until_stored(lambda: self._store.requeue(job, live.generation))
            if failure.code == "usage_limit":
                self._begin_pause(failure.resets_at, job.model or "" if failure.is_model_limit else ALL_MODELS)
            return self._report("Request %s waits for the %s" % (
                job.id[:8], "next start" if failure.code == "interrupted" else "plan's limit: " + str(failure)[:200]))
        self._retry_until_stored(lambda: self._store.fail(job, failure.code, redact(str(failure))))
        self._report("Request %s failed: %s: %s" % (job.id[:8], failure.code, redact(str(failure))[:300]))

    def _begin_pause(self, resets_at: Optional[float], model: str) -> None:
        seconds = pause_seconds(resets_at, self._clock.now())
        self._pauses[model] = Pause("usage_limit", self._clock.now() + seconds), self._clock.monotonic() + seconds
        if seconds > MAX_INLINE_WAIT_SECONDS:                            # whose client holds a line open would wait in vain
            with contextlib.suppress(Unavailable):
                for job_id in self._store.fail_chats("usage_limit", limit_message(self._pauses[model][0]), (JobStatus.QUEUED,), model):
                    self._hub.notify(job_id)
        self._report("The plan's limit is used up: %s until %s" % (
            "the queue rests" if model == ALL_MODELS else "requests for the model %s rest" % (model or "that is the default"),
            iso_time(self._clock.now() + seconds)))

    def _record_rate_limits(self, limits: RateLimitStatus) -> None:
        """Keeps what the CLI says of the plan, where it differs; with --plan-only paid usage begins a rest."""
        if limits.is_using_overage and self._config.plan_only:
            self._begin_pause(limits.resets_at, ALL_MODELS)
        known = {kind: window._replace(seen_at=0) for kind, window in self._windows.items()}
        if any(known.get(window.kind) != window._replace(seen_at=0) or window.seen_at - self._windows[window.kind].seen_at > 60
               for window in limits.windows):
            with contextlib.suppress(Unavailable):
                self._store.save_plan_limits(limits.windows)
                self._windows.update((window.kind, window) for window in limits.windows)

    def _run_maintenance(self) -> None:
        """Once a second, also during a run: the processes of conversations that are gone end; once an hour old jobs are deleted."""
        self._claude.tend()
        now = self._clock.monotonic()
        if now - self._last_maintenance >= MAINTENANCE_SECONDS:
            self._last_maintenance = now
            self._claude.prepare()
            self._claude.evict_unless(self._store.has_conversation, lambda token_id: self._store.token(token_id) is not None)
        if now - self._last_purge >= 3600:
            self._last_purge, before, self._clock_offset = now, self._clock_offset, self._clock.now() - now
            if before is None or abs(self._clock_offset - before) < 3600:        # else the clock was set: perhaps wrongly, and not for long
                self._store.purge(self._config.keep_days)


# === 8 Service ================================================================================================
# What the bridge can do: one method each, commands in, records out, no HTTP word. Called from any thread, by the
# routes and by the command line.


@dataclass(frozen=True)
class Caller:
    """Who asks, after the token was looked at."""
    token: Token

    @property
    def is_admin(self) -> bool:
        return self.token.is_admin


class JobView(NamedTuple):
    """A job as its owner sees it. position: those waiting before it + 1, 0 for one that does not wait; place: those waiting
    and running before it + 1; rest: what it waits for besides its turn; partial: the text so far, in a poll while it runs."""
    job: Job
    position: int
    place: int
    rest: Optional[Pause] = None
    partial: Optional[str] = None


class UsageReport(NamedTuple):
    """What was used since a day (UTC), and the plan. names: of the tokens that still exist, by id."""
    since: str
    rows: Sequence[DayUsage]
    names: Mapping[str, str]
    windows: Sequence[RateLimitWindow]
    rest: Optional[Pause]


class Service:
    """The bridge without HTTP. live: the text of a running answer; rest: why the worker begins no job of a model now; models: asks
    the CLI which there are."""

    def __init__(self, store: Database, hub: Notifier, clock: Clock, data_dir: Path,
                 live: Callable[[str], Optional[LiveText]] = lambda job_id: None,
                 rest: Callable[[Optional[str]], Optional[Pause]] = lambda model: None,
                 models: Callable[[], Tuple[Model, ...]] = tuple) -> None:
        self._store, self._hub, self._clock, self._data_dir, self._live, self._rest = store, hub, clock, data_dir, live, rest
        self._ask_models, self._models_lock = models, threading.Lock()
        self._models: Tuple[Model, ...] = ()
        self._lock = threading.Lock()
        self._open_streams: Dict[str, int] = {}           # open streams and waits, by token

    def authenticate(self, secret: str) -> Caller:
        """Raises InvalidToken. The look-up is by digest, so its time tells nothing about a token."""
        token = self._store.token_by_digest(digest(secret))
        if token is None or token.is_expired(self._clock.now()):
            raise InvalidToken()
        self._store.touch_token(token)
        return Caller(token)

    def ask(self, caller: Caller, ask: Union[Ask, Chat], key: Optional[str] = None) -> EnqueueResult:
        """Queues a message or a conversation, or finds the request that this Idempotency-Key made; durable on return.

        Raises InvalidRequest, ModelNotAllowed, IdempotencyConflict, RateLimited, DailyLimit, QueueFull; RunError for a Chat that would
        have to wait for long.
        """
        stateful, models = caller.token.session_mode == SessionMode.STATEFUL, caller.token.models
        if ask.conversation and not stateful:
            raise InvalidRequest("conversation needs a token with sessionMode stateful", field="conversation")
        if models and ask.model and ask.model not in models:
            raise ModelNotAllowed("This token may not use the model %s. Use: %s" % (ask.model, ", ".join(models)), field="model")
        is_chat = isinstance(ask, Chat)
        if is_chat or ask.stream or ask.wait:
            self._check_stream_limit(caller)              # before it is queued: who is refused may ask again
        ask = replace(ask, model=validate_model(ask.model or (models[0] if models else None)),
                      conversation=ask.conversation or "default" if stateful and not is_chat else None)
        rest = self._rest(ask.model) if is_chat else None
        if rest and rest.until - self._clock.now() > MAX_INLINE_WAIT_SECONDS:
            raise self._used_up(rest)
        try:
            queued = self._store.enqueue(caller.token.id, ask, key)
        except QueueFull:
            rest = self._rest(ask.model)
            if rest:
                raise retry_later(QueueFull, "Queue is full: t" + limit_message(rest)[1:], rest.until - self._clock.now()) from None
            raise
        self._hub.notify(Notifier.QUEUE)
        return queued

    def _used_up(self, rest: Pause) -> RunError:
        return RunError("usage_limit", limit_message(rest), (("Retry-After", str(math.ceil(rest.until - self._clock.now()))),))

    def failure(self, job: Job) -> Optional[RunError]:
        """Why a finished job has no answer, for a caller who waits for one; None where there is one."""
        rest = self._rest(job.model) if job.error_code == "usage_limit" else None
        if rest:
            return self._used_up(rest)
        return RunError(job.error_code or "", job.error or "") if job.status == JobStatus.ERROR else None

    def poll(self, caller: Caller, job_id: str, wait: float = 0.0, client_disconnected: Callable[[], bool] = lambda: False) -> JobView:
        """How a job stands, at the latest `wait` seconds from now, or when the caller has left.

        Raises NotFound, also for another token's job; InvalidToken when the token goes meanwhile.
        """
        job = self._job(caller, job_id, without_bodies=True)
        if wait and not job.is_finished:
            job = self._wait_until_finished(caller, job_id, wait, client_disconnected)
        live = self._live_of(job)
        return self._view(self._job(caller, job_id) if job.is_finished else job)._replace(partial=live.read() if live else None)

    def _wait_until_finished(self, caller: Caller, job_id: str, wait: float, client_disconnected: Callable[[], bool]) -> Job:
        until = self._clock.monotonic() + wait
        with self._stream_slot(caller), self._hub.subscribe(job_id) as bell:
            while True:
                bell.clear()
                job = self._job(caller, job_id, without_bodies=True)
                left = until - self._clock.monotonic()
                if job.is_finished or left <= 0 or self._hub.is_closed or client_disconnected():
                    return job
                bell.wait(min(left, RECHECK_SECONDS))      # the bell tells all but a revocation on the command line and a caller who left
                self.check_token(caller)

    def _check_stream_limit(self, caller: Caller) -> None:
        if not caller.is_admin and sum(self._open_streams.copy().values()) >= MAX_STREAMS:
            raise retry_later(RateLimited, "There are %d open streams and waits, which is the most." % MAX_STREAMS, 5)
        if self._open_streams.get(caller.token.id, 0) >= MAX_STREAMS_PER_TOKEN:
            raise retry_later(RateLimited, "This token has %d open streams and waits, which is the most." % MAX_STREAMS_PER_TOKEN, 5)

    @contextlib.contextmanager
    def _stream_slot(self, caller: Caller) -> Iterator[None]:
        """One stream or wait more of a token; RateLimited for one too many."""
        key = caller.token.id
        with self._lock:
            self._check_stream_limit(caller)
            self._open_streams[key] = self._open_streams.get(key, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._open_streams[key] -= 1
                if not self._open_streams[key]:
                    del self._open_streams[key]

    def _live_of(self, job: Job) -> Optional[LiveText]:
        """A run that gives its job back, or ends it, still has its text for a moment."""
        return self._live(job.id) if job.status == JobStatus.PROCESSING else None

    def _view(self, job: Job) -> JobView:
        live = self._live_of(job)
        rest = self._rest(job.model) if job.status == JobStatus.QUEUED else live.rest if live else None
        return JobView(job, *self._store.places(job), rest=rest)

    def follow(self, caller: Caller, job_id: str, after: int = 0, place: int = 0,
               client_disconnected: Callable[[], bool] = lambda: False) -> Iterator[Tuple[JobEvent, Optional[JobView]]]:
        """What happens to a job, as it happens, with the view of it where it is queued or finished.

        after: how much of the text the caller has, in code points; place: the one in the queue that the caller knows.
        Ends after `completed` or `error`, when the caller has left, or with the bridge.  Raises NotFound, RateLimited at once,
        and InvalidToken or NotFound later, when the token is revoked.
        """
        self._job(caller, job_id, without_bodies=True)
        self._check_stream_limit(caller)                  # the stream counts itself from its first step on
        return self._follow(caller, job_id, TextCursor(after), (place, None), client_disconnected)

    def _follow(self, caller: Caller, job_id: str, cursor: TextCursor, known: Tuple[int, Optional[Pause]],
                client_disconnected: Callable[[], bool]) -> Iterator[Tuple[JobEvent, Optional[JobView]]]:
        told_at = self._clock.monotonic()
        with self._stream_slot(caller), self._hub.subscribe(job_id, Notifier.TEXT + job_id) as bell:
            while True:
                bell.clear()                                           # 1. the store: what is true, whatever rang
                look_at = self._clock.monotonic() + RECHECK_SECONDS
                events_since: List[JobEvent] = []
                try:
                    view = self._view(self._job(caller, job_id, without_bodies=True))
                finally:
                    self.check_token(caller)                           # after the job, which goes with its token
                if view.job.is_finished:
                    for event in self._final_events(view.job, cursor):
                        yield event, self._view(self._job(caller, job_id)) if event.kind in JobStatus.FINISHED else None
                        if self._clock.monotonic() >= look_at:         # a slow reader
                            self.check_token(caller)
                            look_at = self._clock.monotonic() + RECHECK_SECONDS
                    return
                live = self._live_of(view.job)
                if view.job.status == JobStatus.QUEUED and (view.place, view.rest) != known:
                    cursor.reset()
                    known, events_since = (view.place, view.rest), [JobEvent("queued")]
                elif live:
                    events_since = live.events_since(cursor)
                if not events_since and self._clock.monotonic() - told_at >= HEARTBEAT_SECONDS:
                    events_since = [JobEvent("quiet", cursor.offset)]
                while True:                                            # 2. the text, for as long as it comes
                    for event in events_since:
                        yield event, view if event.kind == "queued" else None
                        told_at = self._clock.monotonic()
                    if self._hub.is_closed:
                        return
                    has_rung = len(events_since) == EVENT_BATCH or bell.wait(max(0.0, look_at - self._clock.monotonic()))
                    if self._clock.monotonic() >= look_at:             # also where there is always more text for a slow reader
                        break
                    bell.clear()
                    events_since = live.events_since(cursor) if has_rung and live and self._live(job_id) is live else []
                    if not events_since:
                        break
                if client_disconnected():
                    return

    def _final_events(self, job: Job, cursor: TextCursor) -> Iterator[JobEvent]:
        """What is left of a finished job: its text, of which a slow reader keeps no more than a part in memory, and its end."""
        if job.status == JobStatus.COMPLETED:
            yield from cursor.read(job.generation, lambda offset: self._store.response(job.id, offset, TEXT_CHARACTERS), job.model)
        yield JobEvent(job.status, cursor.offset)

    def check_token(self, caller: Caller) -> None:
        """Raises InvalidToken for one that was revoked, or has expired, since it was looked at."""
        token = self._store.token(caller.token.id)
        if token is None or token.is_expired(self._clock.now()):
            raise InvalidToken()

    def cancel(self, caller: Caller, job_id: str) -> JobView:
        """Ends a job that waits or runs; a running one leaves within moments. Raises NotFound, AlreadyFinished."""
        job = self._job(caller, job_id, without_bodies=True)
        if not self._store.fail(job, "cancelled", "The request was cancelled.", (JobStatus.QUEUED, JobStatus.PROCESSING)):
            raise AlreadyFinished()
        self._hub.notify(job_id)
        return self._view(self._job(caller, job_id))

    def jobs(self, caller: Caller, statuses: Sequence[str] = (), before: Optional[int] = None,
             limit: int = 20) -> Tuple[List[JobView], Optional[int]]:
        """A page of the caller's jobs, for an admin of all, newest first. -> (views, where the next page begins)."""
        jobs, following = self._store.jobs(None if caller.is_admin else caller.token.id, statuses, before, limit)
        return [self._view(job) for job in jobs], following

    def conversations(self, caller: Caller) -> List[Conversation]:
        return self._store.conversations(caller.token.id)

    def delete_conversation(self, caller: Caller, name: str) -> None:
        """Makes the next ask begin the conversation afresh. Raises NotFound."""
        if not self._store.delete_conversation(caller.token.id, replace_surrogates(name)):
            raise NotFound("Conversation not found")

    def models(self, caller: Caller) -> List[Model]:
        """Those that the caller may use. The CLI is asked once. Raises Unavailable."""
        with self._models_lock:
            self._models = self._models or self._ask_models()
        allowed = caller.token.models
        if allowed is None:
            return list(self._models)
        known = {model.id: model for model in self._models}
        return [known.get(each, Model(each, each)) for each in allowed]

    def usage(self, caller: Caller, days: int) -> UsageReport:
        """What the caller used today and on the days before, for an admin what all did."""
        since = day_of(self._clock.now() - (days - 1) * 86_400)
        return UsageReport(since, self._store.usage(since, None if caller.is_admin else caller.token.id),
                           {token.id: token.name for token in self._store.tokens()}, self._store.windows(), self._rest(ALL_MODELS))

    def _job(self, caller: Caller, job_id: str, without_bodies: bool = False) -> Job:
        job = self._store.job(job_id, without_bodies)
        if job is None or not (caller.is_admin or job.token_id == caller.token.id):
            self.check_token(caller)                         # if it was revoked meanwhile, its requests went with it
            raise NotFound("Request not found")
        return job

    def is_own_unfinished(self, caller: Caller, job_id: str) -> bool:
        job = self._store.job(job_id, without_bodies=True)
        return job is not None and job.token_id == caller.token.id and not job.is_finished

    def create_token(self, new: NewToken, workspace: Optional[Path] = None) -> Tuple[Token, str]:
        """-> (token, its secret, which is nowhere else). A token with tools gets a workspace of its own. Raises TokenLimit."""
        secret = new_token()
        own = self._data_dir / "workspaces" / str(uuid.uuid4()) if new.tools != Tools.NONE and workspace is None else None
        token = self._store.add_token(new, secret, str(workspace or own or "") or None)
        if own:
            private_directory(own.parent)
            private_directory(own)
        return token, secret

    def tokens(self) -> List[Token]:
        return self._store.tokens()

    def revoke_token(self, token_id: str) -> None:
        """Deletes a token with its requests; its running one is stopped. Raises NotFound, LastAdmin."""
        for job_id in self._store.delete_token(replace_surrogates(token_id)):
            self._hub.notify(job_id)

    def discard_token(self, token: Token) -> None:
        """Undoes a creation whose secret reached nobody."""
        self._store.delete_token(token.id, protect=False)

    def has_admin(self) -> bool:
        return self._store.has_admin()

    def counts(self) -> Dict[str, int]:
        return self._store.counts()

    def check_store(self) -> None:
        """Raises Unavailable when the database cannot be written."""
        self._store.check_writable()

    def kept(self) -> Dict[Any, Any]:
        """What holds until the database changes: see Store."""
        return self._store.kept()

    def now(self) -> float:
        return self._clock.now()

# === 9 Routes =================================================================================================
# The endpoints as data: ROUTES gives dispatch, 404 and 405, /openapi.json and the tables of the README. An `answer_*` turns a
# request into a call of the service, and a record into the shape that old clients know.


class Request(NamedTuple):
    """What arrived. headers: lower-case names; address: of who is connected; body: reads the bytes when they are wanted;
    has_left: whether the caller hung up."""
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    address: str
    body: Callable[[], bytes]
    client_disconnected: Callable[[], bool] = lambda: False


BodyIterator = Generator[bytes, None, None]


class Response(NamedTuple):
    """What leaves."""
    status: int
    body: bytes = b""
    content_type: str = "application/json; charset=utf-8"
    headers: Tuple[Tuple[str, str], ...] = ()
    stream: Optional[BodyIterator] = None                # in place of the body: pieces, each sent as it comes


@dataclass(frozen=True)
class BridgeStatus:
    """What the answers of public pages need beyond the service; made by the bridge. details and metrics: for admins."""
    page: Callable[[], Response]
    details: Callable[[], Mapping[str, Any]]
    check_worker: Callable[[], None]
    metrics: Callable[[], str] = str


class Context(NamedTuple):
    """A request on its way to an answer: what came, from whom, and what can be done about it. parts: those of the path."""
    service: Service
    status_source: BridgeStatus
    caller: Optional[Caller]
    request: Request
    parts: Mapping[str, str]

    def body(self) -> bytes:
        """The body, whole. Raises InvalidToken where the token went while it came: it may take its time."""
        data = self.request.body()
        if self.caller:
            self.service.check_token(self.caller)
        return data

    @property
    def holder(self) -> Caller:
        """The caller of a route that needs a token."""
        assert self.caller is not None
        return self.caller


@dataclass(frozen=True)
class Route:
    """One endpoint. gives: for people, what comes by status; shapes: the same for programs, names of SHAPES (or "" for a text, or
    events); query: parameters, by name a type and what they do; refuses: statuses of its own errors; polls: asking about one's own
    unfinished job has a bucket of its own."""
    method: str
    path: str
    needs: str
    answer: Callable[[Context], Response]
    doc: str
    takes: Optional[Type[Command]] = None
    gives: Mapping[int, str] = field(default_factory=dict)
    shapes: Mapping[int, str] = field(default_factory=dict)
    query: Mapping[str, Tuple[str, str]] = field(default_factory=dict)
    refuses: Tuple[int, ...] = ()
    polls: bool = False


def json_response(status: int, body: Mapping[str, Any], headers: Sequence[Tuple[str, str]] = ()) -> Response:
    return Response(status, as_json(body).encode("utf-8", "replace"), headers=tuple(headers))


def pause_body(rest: Optional[Pause]) -> Dict[str, Any]:
    """What a job waits for besides its turn."""
    return {"waitingFor": rest.reason, "resumesAt": iso_time(rest.until)} if rest else {}


def usage_body(usage: Usage) -> Dict[str, Any]:
    return {camel_case(name): value for name, value in usage._asdict().items()}


def job_body(view: JobView) -> Dict[str, Any]:
    """The poll body: the original's keys first, then ours; those without a value are left out."""
    job = view.job
    body: Dict[str, Any] = {"status": job.status, "requestId": job.id}
    if not job.is_finished:
        body["queuePosition"] = view.position
    if job.status == JobStatus.COMPLETED:
        body.update(response=job.response or "", completedAt=iso_time(job.completed_at))
    if job.status == JobStatus.ERROR:
        body.update(error=job.error or "", errorCode=job.error_code, completedAt=iso_time(job.completed_at))
    body.update(model=job.model, conversation=job.conversation, createdAt=iso_time(job.created_at), startedAt=iso_time(job.started_at),
                attempts=job.attempts)
    if job.started_at and job.completed_at:
        body["durationMs"] = max(0, round((job.completed_at - job.started_at) * 1000))
    if job.structured is not None:
        body["structured"] = json.loads(job.structured)
    if job.usage:
        body["usage"] = usage_body(job.usage)
    if view.partial is not None:
        body["partial"] = view.partial
    body.update(pause_body(view.rest))
    return {name: value for name, value in body.items() if value is not None}


def handle_ask(call: Context) -> Response:
    ask, warnings = Ask.parse(parse_json(call.body() or b"{}"))
    job, position, is_new = call.service.ask(call.holder, ask, validate_idempotency_key(call.request.headers.get("idempotency-key")))
    headers = () if is_new else (("Idempotent-Replayed", "true"),)
    more = {"warnings": warnings} if warnings else {}
    if ask.stream:
        first = sse_event("queued", 0, {"requestId": job.id, "position": position, **more})
        events = call.service.follow(call.holder, job.id, 0, position, call.request.client_disconnected)
        return stream_response(event_bytes(job.id, events, first), headers)
    if ask.wait:
        view = call.service.poll(call.holder, job.id, ask.wait, call.request.client_disconnected)
        if view.job.is_finished:
            return json_response(200, {**job_body(view), **more}, headers)
    body = {"ok": True, "requestId": job.id, "position": position, "poll": "GET /api/ask/" + job.id}
    return json_response(202, {**body, **more}, headers)


def handle_events(call: Context) -> Response:
    call.body()                                              # nothing is taken from it, but what is not read hides a hang-up
    after = validate_offset(call.request.headers.get("last-event-id") or call.request.query.get("after")) or 0
    job_id = call.parts["requestId"]
    return stream_response(event_bytes(job_id, call.service.follow(call.holder, job_id, after, client_disconnected=call.request.client_disconnected)))


def stream_response(pieces: BodyIterator, headers: Sequence[Tuple[str, str]] = ()) -> Response:
    """Server-Sent Events that no proxy shall hold back or compress."""
    return Response(200, content_type="text/event-stream; charset=utf-8", stream=pieces,
                    headers=(("Cache-Control", "no-store, no-transform"), ("X-Accel-Buffering", "no"), *headers))


@lru_cache(maxsize=16)                                       # all readers of an answer are told the same at about the same time
def delta_bytes(offset: int, text: str) -> bytes:
    return sse_event("delta", offset, {"text": text})


def event_bytes(job_id: str, events: Iterable[Tuple[JobEvent, Optional[JobView]]], first: bytes = b"") -> BodyIterator:
    """The steps of a job as Server-Sent Events. A reader whose token was revoked gets an `error` without `status`."""
    offset = 0
    try:
        if first:
            yield first
        for event, view in events:
            offset = event.offset
            if event.kind == "quiet":
                yield b": still here\n\n"
            elif event.kind == "delta":
                yield delta_bytes(event.offset, event.text)
            elif event.kind == "started":
                yield sse_event("started", 0, {"requestId": job_id, **({"model": event.model} if event.model else {})})
            elif view and event.kind == "queued":
                yield sse_event("queued", 0, {"requestId": job_id, "position": view.place, **pause_body(view.rest)})
            elif view:
                yield sse_event(event.kind, event.offset, job_body(view))
    except Unavailable:
        return                                               # as when the line broke: the reader comes back
    except BridgeError as error:
        yield sse_event("error", offset, {"requestId": job_id, **error_body(error)})


def handle_cancel(call: Context) -> Response:
    return json_response(200, {"ok": True, **job_body(call.service.cancel(call.holder, call.parts["requestId"]))})


def asked_body(job: Job) -> Dict[str, Any]:
    """What was asked, for lists; what was not said is left out."""
    told = {"message": job.message, "tokenId": job.token_id, "systemPrompt": job.system_prompt, "effort": job.effort, "api": job.api,
            "jsonSchema": json.loads(job.json_schema or "null")}
    return {name: value for name, value in told.items() if value is not None}


def handle_list_requests(call: Context) -> Response:
    query = call.request.query
    limit, before = integer("limit", 1, PAGE_JOBS)(query.get("limit")), integer("before", 1, 999_999_999)(query.get("before"))
    views, following = call.service.jobs(call.holder, validate_statuses(query.get("status")), before, limit or 20)
    bodies = [{**job_body(view), **asked_body(view.job)} for view in views]
    return json_response(200, {"requests": bodies, "next": None if following is None else str(following)})


def handle_list_conversations(call: Context) -> Response:
    return json_response(200, {"conversations": [
        {"name": each.name, "turns": each.turns, "createdAt": iso_time(each.created_at), "lastUsedAt": iso_time(each.last_used_at)}
        for each in call.service.conversations(call.holder)]})


def handle_delete_conversation(call: Context) -> Response:
    call.service.delete_conversation(call.holder, call.parts["name"])
    return json_response(200, {"ok": True, "message": "Conversation deleted"})


def handle_usage(call: Context) -> Response:
    report = call.service.usage(call.holder, integer("days", 1, USAGE_DAYS)(call.request.query.get("days")) or 30)

    def sums(rows: Iterable[DayUsage]) -> Dict[str, Any]:
        rows = list(rows)
        total = Usage._make(map(sum, zip(Usage(), *(row.usage for row in rows))))
        return {"requests": sum(row.requests for row in rows), "completed": sum(row.completed for row in rows),
                "errors": sum(row.errors for row in rows), **usage_body(total._replace(cost_usd=round(total.cost_usd, 8)))}

    days, ids = sorted({row.day for row in report.rows}), sorted({row.token_id for row in report.rows})
    return json_response(200, {
        "since": report.since, "total": sums(report.rows),
        "days": [{"day": day, **sums(row for row in report.rows if row.day == day)} for day in days],
        "tokens": [{"tokenId": each, "name": report.names.get(each), **sums(row for row in report.rows if row.token_id == each)}
                   for each in ids],
        "plan": plan_body(report.windows, report.rest, call.service.now())})


def plan_body(windows: Iterable[RateLimitWindow], rest: Optional[Pause], now: float) -> Dict[str, Any]:
    """The limits of the plan; of one that was reset since it was told, nothing more is known."""
    def body(window: RateLimitWindow) -> Dict[str, Any]:
        is_old = window.resets_at is not None and window.resets_at <= now
        return {"type": window.kind, "status": None if is_old else window.status, "utilization": None if is_old else window.utilization,
                "resetsAt": iso_time(window.resets_at), "seenAt": iso_time(window.seen_at)}

    bodies = [body(window) for window in windows]
    return {"windows": [each for each in bodies if each["type"] != "overage"],
            "isUsingOverage": any(each["type"] == "overage" and each["status"] == "in_use" for each in bodies),
            **{"waitingFor": None, "resumesAt": None, **pause_body(rest)}}


def handle_poll(call: Context) -> Response:
    wait, job_id = validate_wait(call.request.query.get("wait")), call.parts["requestId"]
    kept, key = call.service.kept(), ("answer", call.holder.token.id, job_id)
    if key in kept:
        return kept[key]                                     # type: ignore[no-any-return]
    view = call.service.poll(call.holder, job_id, wait, call.request.client_disconnected)
    response = json_response(200 if view.job.is_finished else 202, job_body(view))
    if view.job.is_finished and len(response.body) <= CACHED_RESPONSE_BYTES:
        kept[key] = response
    return response


def handle_create_token(call: Context) -> Response:
    new, warnings = NewToken.parse(parse_json(call.body() or b"{}"))
    token, secret = call.service.create_token(new)
    body = {"ok": True, "tokenId": token.id, "token": secret, "prefix": token.prefix,
            "warning": "Save this token now. It cannot be retrieved again."}
    return json_response(201, {**body, **({"warnings": warnings} if warnings else {})})


def token_body(token: Token, now: float) -> Dict[str, Any]:
    return {"id": token.id, "name": token.name, "prefix": token.prefix, "sessionMode": token.session_mode,
            "expiresAt": iso_time(token.expires_at), "createdAt": iso_time(token.created_at), "lastUsedAt": iso_time(token.last_used_at),
            "isAdmin": token.is_admin, "isExpired": token.is_expired(now), "tools": token.tools, "workspace": token.workspace,
            "requestsPerMinute": token.requests_per_minute, "requestsPerDay": token.requests_per_day, "models": token.models}


def handle_list_tokens(call: Context) -> Response:
    return json_response(200, {"tokens": [token_body(token, call.service.now()) for token in call.service.tokens()]})


def handle_revoke_token(call: Context) -> Response:
    call.service.revoke_token(call.parts["id"])
    return json_response(200, {"ok": True, "message": "Token revoked"})


def handle_status(call: Context) -> Response:
    counts = call.service.counts()
    queued, processing = counts.get(JobStatus.QUEUED, 0), counts.get(JobStatus.PROCESSING, 0)
    completed, failed = counts.get(JobStatus.COMPLETED, 0), counts.get(JobStatus.ERROR, 0)
    body: Dict[str, Any] = {
        "status": "running", "version": __version__, "queue": {"isProcessing": bool(processing), "length": queued + processing},
        "stats": {"totalTokens": counts["tokens"], "totalRequests": queued + processing + completed + failed,
                  "completedRequests": completed, "errorRequests": failed, "queuedRequests": queued}}
    if call.caller and call.caller.is_admin:
        body.update(call.status_source.details())
    return json_response(200, body)


def handle_health(call: Context) -> Response:
    call.status_source.check_worker()
    call.service.check_store()
    return json_response(200, {"status": "ok"})


def handle_metrics(call: Context) -> Response:
    return Response(200, call.status_source.metrics().encode(), "text/plain; version=0.0.4; charset=utf-8")


def handle_dashboard(call: Context) -> Response:
    return call.status_source.page()


def handle_root(call: Context) -> Response:
    if "text/html" in call.request.headers.get("accept", ""):
        return call.status_source.page()
    return json_response(200, {
        "name": "claude-api-bridge", "version": __version__, "description": "A REST API for the Claude Code command line tool",
        "endpoints": {"%s %s" % (route.method, route.path): route.doc for route in ROUTES},
        "docs": "GET /dashboard"})


# --- /v1: the wire formats of two other APIs ---
# Both are read into a Chat, in whose turns blocks have the shape of the Messages API, and written from a Job and its steps.

BLOCKS = {"user": ("text", "image", "document", "tool_result"), "assistant": ("text", "tool_use")}
IGNORED_BLOCKS = ("thinking", "redacted_thinking")                   # of an earlier answer by another server; nothing follows from it here
SOURCES = {"base64": ("media_type", "data"), "url": ("url",), "text": ("media_type", "data")}
TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,118}")              # with FUNCTION_PREFIX the API's 128
FOREIGN_MODEL_RE = re.compile(r"(gpt|chatgpt|codex|o[1-9])([-.\d].*)?", re.IGNORECASE)


def invalid_value(name: str, text: str) -> InvalidRequest:
    return InvalidRequest("%s: %s" % (name, text), field=name)


def require_type(value: Any, kind: Type[Any], name: str) -> Any:
    """A value that must be of a kind: str, list, dict or bool."""
    if not isinstance(value, kind):
        raise invalid_value(name, "must be %s" % {str: "a string", list: "a list", dict: "an object", bool: "true or false"}[kind])
    return replace_surrogates(value) if kind is str else value


def with_path(check: Callable[[Any], Any], value: Any, name: str) -> Any:
    """A value as a check of the core has it."""
    try:
        return check(value)
    except InvalidRequest as error:
        raise invalid_value(name, str(error)) from None


def read_source(source: Any, name: str) -> Dict[str, Any]:
    """Where an image or a document comes from."""
    kind = require_type(require_type(source, dict, name).get("type"), str, name + ".type")
    if kind not in SOURCES:
        raise invalid_value(name + ".type", "must be one of: %s; files that were uploaded elsewhere cannot be read here" % ", ".join(SOURCES))
    return {"type": kind, **{each: require_type(source.get(each), str, "%s.%s" % (name, each)) for each in SOURCES[kind]}}


def read_block(block: Any, kinds: Sequence[str], name: str) -> Dict[str, Any]:
    """One block, with nothing but what is known of it; the CLI sets its own `cache_control`, of which there can be only four."""
    kind = require_type(block, dict, name).get("type")
    if kind not in kinds:
        raise invalid_value(name + ".type", "must be one of: %s" % ", ".join(kinds))
    if kind == "text":
        return {"type": kind, "text": require_type(block.get("text"), str, name + ".text")}
    if kind in ("image", "document"):
        return {"type": kind, "source": read_source(block.get("source"), name + ".source"),
                **{each: require_type(block[each], str, "%s.%s" % (name, each)) for each in ("title", "context") if block.get(each)}}
    key = "id" if kind == "tool_use" else "tool_use_id"
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", require_type(block.get(key), str, "%s.%s" % (name, key))):
        raise invalid_value("%s.%s" % (name, key), "must be 1 to 128 letters, digits, underscores or dashes")
    if kind == "tool_use":
        return {"type": kind, "id": block["id"], "name": read_tool_name(block.get("name"), name + ".name"),
                "input": require_type(block.get("input"), dict, name + ".input")}
    content = read_content(block.get("content") or "", ("text", "image", "document"), name + ".content")
    return {"type": kind, "tool_use_id": block["tool_use_id"], "content": content or "(no result)",
            **({"is_error": True} if block.get("is_error") else {})}


def read_content(content: Any, kinds: Sequence[str], name: str) -> List[Dict[str, Any]]:
    """A text or a list of blocks; blank texts, which the API refuses, are left out."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    blocks = [read_block(block, kinds, "%s.%d" % (name, n)) for n, block in enumerate(require_type(content, list, name))
              if not (isinstance(block, dict) and block.get("type") in IGNORED_BLOCKS)]
    return [block for block in blocks if block["type"] != "text" or block["text"].strip()]


def read_tool_name(value: Any, name: str) -> str:
    if not TOOL_NAME.fullmatch(require_type(value, str, name)):
        raise invalid_value(name, "must be 1 to 118 letters, digits, underscores or dashes")
    return str(value)


def read_turns(messages: Iterable[Tuple[str, str, Any]]) -> Tuple[Mapping[str, Any], ...]:
    """(name, role, content) of each message -> turns of user and assistant, one after the other, the last one the user's."""
    turns: List[Dict[str, Any]] = []
    for name, role, content in messages:
        blocks = read_content(content, BLOCKS[role], name + ".content")
        if not blocks and role == "user":
            raise invalid_value(name + ".content", "must not be blank")
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns += [{"role": "user", "content": [{"type": "text", "text": "(The conversation begins.)"}]}] * (
                not turns and role == "assistant")
            turns.append({"role": role, "content": blocks or [{"type": "text", "text": "(no answer)"}]})
    if not turns or turns[-1]["role"] != "user":
        raise invalid_value("messages", "must end with a message of the user: an answer that was begun cannot be continued" if turns
                    else "at least one message is required")
    for before, turn in zip([{"content": []}, *turns], turns):
        check_results(before, turn)
    return tuple(turns)


def check_results(before: Mapping[str, Any], turn: Dict[str, Any]) -> None:
    """Each call of a tool is answered in the next turn, and nothing else is; answers stand first."""
    called = {block["id"] for block in before["content"] if block["type"] == "tool_use"}
    answers = [block for block in turn["content"] if block["type"] == "tool_result"]
    answered = {block["tool_use_id"] for block in answers}
    if called - answered:
        raise invalid_value("messages", "the tool calls %s have no results in the next message" % ", ".join(sorted(called - answered)))
    if answered - called or len(answers) > len(answered):
        raise invalid_value("messages", "the tool results %s do not belong to one tool call each of the message before" % ", ".join(
            sorted(answered - called or answered)))
    turn["content"] = answers + [block for block in turn["content"] if block["type"] != "tool_result"]


def read_functions(tools: Iterable[Tuple[str, Any, Any, Any]]) -> Tuple[Mapping[str, Any], ...]:
    """(field, name, description, schema) of each tool of the client -> Chat.functions."""
    found: Dict[str, Dict[str, Any]] = {}
    for field_name, name, description, schema in tools:
        name = read_tool_name(name, field_name + ".name")
        if name in found:
            raise invalid_value(field_name + ".name", "stands twice")
        schema = {"type": "object", **require_type(schema or {}, dict, field_name + " schema")}
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if schema["type"] != "object" or not isinstance(properties, dict) or not isinstance(required, list) or not all(
                isinstance(each, dict) for each in properties.values()) or not all(isinstance(each, str) for each in required):
            raise invalid_value(field_name, "the schema of its input must be that of an object, with an object for each property")
        found[name] = {"name": name, "description": require_type(description or "", str, field_name + ".description"), "inputSchema": schema}
    if len(found) > MAX_CLIENT_TOOLS:
        raise invalid_value("tools", "at most %d are possible" % MAX_CLIENT_TOOLS)
    return tuple(found.values())


def read_stops(value: Any, name: str) -> Tuple[str, ...]:
    stop_sequences = [value] if isinstance(value, str) else value or []
    if len(require_type(stop_sequences, list, name)) > STOP_SEQUENCES or not all(isinstance(each, str) and each and len(each) <= 1000 for each in stop_sequences):
        raise invalid_value(name, "must be at most %d texts of 1 to 1000 characters" % STOP_SEQUENCES)
    return tuple(map(replace_surrogates, stop_sequences))


class Choice(NamedTuple):
    """Which tools are called: kind auto, any, tool (the one named) or none; is_single: one at a time."""
    kind: str
    name: Optional[str] = None
    is_single: bool = False


def with_choice(chat: Chat, choice: Choice) -> Chat:
    """A choice of tools, as far as the CLI can be made to keep it: of one tool that must be called, the input is the answer
    (which is enforced), any other wish is told to the model."""
    if choice.kind == "none" or not chat.client_tools:
        if choice.kind in ("any", "tool"):
            raise invalid_value("tool_choice", "needs tools")
        return replace(chat, client_tools=())
    names = {each["name"]: each for each in chat.client_tools}
    if choice.kind == "tool" and (not isinstance(choice.name, str) or choice.name not in names):
        raise invalid_value("tool_choice", "there is no tool %s" % replace_surrogates(str(choice.name))[:100])
    forced_tool = names[choice.name] if choice.kind == "tool" else chat.client_tools[0] if choice.kind == "any" and len(names) == 1 else None
    if forced_tool:
        wish = "Answer with the input for the tool %s. %s" % (forced_tool["name"], forced_tool["description"])
        return replace(chat, client_tools=(), forced_tool=forced_tool["name"], json_schema=replace_surrogates(as_json(forced_tool["inputSchema"])),
                       system_prompt="%s\n\n%s" % (chat.system_prompt or SYSTEM_PROMPT, wish))
    wishes = [*["Answer with a call of at least one of the tools."] * (choice.kind == "any"),
              *["Call at most one tool at a time."] * choice.is_single]
    return replace(chat, system_prompt="\n\n".join([chat.system_prompt or SYSTEM_PROMPT, *wishes])) if wishes else chat


def read_messages(body: Any) -> Chat:
    """A request of the Anthropic Messages API. Raises InvalidRequest."""
    body = require_type(body, dict, "body")
    system, messages = read_content(body.get("system") or "", ("text",), "system"), []
    for n, message in enumerate(require_type(body.get("messages"), list, "messages")):
        name = "messages.%d" % n
        role = require_type(message, dict, name).get("role")
        if role == "system":
            system += read_content(message.get("content"), ("text",), name + ".content")
        elif role in ("user", "assistant"):
            messages.append((name, role, message.get("content")))
        else:
            raise invalid_value(name + ".role", "must be user or assistant")
    tools = []
    for n, tool in enumerate(require_type(body.get("tools") or [], list, "tools")):
        name = "tools.%d" % n
        if require_type(tool, dict, name).get("type") not in (None, "custom"):
            raise invalid_value(name + ".type", "only tools of the client with an input_schema are possible here")
        tools.append((name, tool.get("name"), tool.get("description"), tool.get("input_schema")))
    if body.get("mcp_servers"):
        raise invalid_value("mcp_servers", "the bridge calls no servers; offer their tools as `tools`")
    choice = require_type(body.get("tool_choice") or {"type": "auto"}, dict, "tool_choice")
    if choice.get("type") not in ("auto", "any", "tool", "none"):
        raise invalid_value("tool_choice.type", "must be auto, any, tool or none")
    wanted = require_type(body.get("output_config") or {}, dict, "output_config")
    return with_choice(Chat(
        read_turns(messages), "\n\n".join(block["text"] for block in system) or None, with_path(validate_model, body.get("model"), "model"),
        read_schema(wanted.get("format") or body.get("output_format"), "output_config.format"),
        with_path(one_of(EFFORTS, "must be one of: " + ", ".join(EFFORTS)), wanted.get("effort"), "output_config.effort"),
        read_functions(tools), stop_sequences=read_stops(body.get("stop_sequences"), "stop_sequences"),
        stream=require_type(body.get("stream") or False, bool, "stream")),
        Choice(choice["type"], choice.get("name"), choice.get("disable_parallel_tool_use") is True))


def read_schema(wanted: Any, name: str) -> Optional[str]:
    """The schema in {"type": "json_schema", "schema": {...}}."""
    if wanted is None:
        return None
    if require_type(wanted, dict, name).get("type") != "json_schema":
        raise invalid_value(name + ".type", "must be json_schema")
    return replace_surrogates(as_json(require_type(wanted.get("schema"), dict, name + ".schema")))


REFUSED_BY_COMPLETIONS = {"functions": "use `tools`", "function_call": "use `tool_choice`", "audio": "there is no sound here",
                          "web_search_options": "use a token with the tools `web`"}
REASONING = {"none": "low", "minimal": "low", **{each: each for each in EFFORTS}}


def read_completions(body: Any) -> Chat:
    """A request of the OpenAI Chat Completions API. Raises InvalidRequest."""
    body = require_type(body, dict, "body")
    for name, advice in REFUSED_BY_COMPLETIONS.items():
        if body.get(name):
            raise invalid_value(name, "is not supported; " + advice)
    if body.get("n") not in (None, 1):
        raise invalid_value("n", "only one choice is possible; send more requests instead")
    system: List[str] = []
    messages = []
    for n, message in enumerate(require_type(body.get("messages"), list, "messages")):
        name = "messages.%d" % n
        role = require_type(require_type(message, dict, name).get("role"), str, name + ".role")
        if role in ("system", "developer"):
            system += [part["text"] for part in read_content(message.get("content"), ("text",), name + ".content")]
        elif role in COMPLETION_ROLES:
            messages.append((name, *COMPLETION_ROLES[role](message, name)))
        else:
            raise invalid_value(name + ".role", "must be system, developer, user, assistant or tool")
    tools = []
    for n, tool in enumerate(require_type(body.get("tools") or [], list, "tools")):
        name = "tools.%d.function" % n
        if require_type(tool, dict, name).get("type") != "function":
            raise invalid_value("tools.%d.type" % n, "must be function")
        told = require_type(tool.get("function"), dict, name)
        tools.append((name, told.get("name"), told.get("description"), told.get("parameters")))
    model, options = body.get("model"), require_type(body.get("stream_options") or {}, dict, "stream_options")
    effort = with_path(one_of(tuple(REASONING), "must be one of: " + ", ".join(REASONING)), body.get("reasoning_effort"),
                     "reasoning_effort")
    return with_choice(Chat(
        read_turns(messages), "\n\n".join(system) or None,
        None if isinstance(model, str) and FOREIGN_MODEL_RE.fullmatch(model) else with_path(validate_model, model, "model"),
        read_response_format(body.get("response_format")), effort and REASONING[effort], read_functions(tools),
        stop_sequences=read_stops(body.get("stop"), "stop"), stream=require_type(body.get("stream") or False, bool, "stream"),
        include_usage=options.get("include_usage") is True, api="openai"),
        read_completion_choice(body.get("tool_choice"), body.get("parallel_tool_calls") is False))


def read_response_format(wanted: Any) -> Optional[str]:
    """The schema that an answer must satisfy, where it must."""
    name = "response_format"
    kind = require_type(wanted or {"type": "text"}, dict, name).get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise invalid_value(name + ".type", "must be text, json_object or json_schema")
    if not wanted or kind == "text":
        return None
    schema = {"additionalProperties": True} if kind == "json_object" else require_type(
        require_type(wanted.get("json_schema"), dict, name + ".json_schema").get("schema") or {}, dict, name + ".json_schema.schema")
    return replace_surrogates(as_json({"type": "object", **schema}))


def read_completion_choice(choice: Any, is_single: bool) -> Choice:
    kinds = {None: "auto", "auto": "auto", "none": "none", "required": "any"}
    if choice is None or isinstance(choice, str) and choice in kinds:
        return Choice(kinds[choice], None, is_single)
    told = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(told, dict):
        raise invalid_value("tool_choice", 'must be auto, none, required or {"type": "function", "function": {"name": ...}}')
    return Choice("tool", told.get("name"), is_single)


def read_user_parts(message: Mapping[str, Any], name: str) -> Tuple[str, Any]:
    """A user's message -> (role, content) of the Messages API."""
    content = message.get("content")
    if not isinstance(content, list):
        return "user", content
    blocks: List[Any] = []
    for n, part in enumerate(content):
        kind, place = require_type(part, dict, name).get("type"), "%s.content.%d" % (name, n)
        if kind == "image_url":
            url = part["image_url"].get("url") if isinstance(part.get("image_url"), dict) else part.get("image_url")
            blocks.append({"type": "image", "source": source_of(require_type(url, str, place + ".image_url.url"))})
        elif kind == "file":
            file = require_type(part.get("file"), dict, place + ".file")
            data = require_type(file.get("file_data"), str, place + ".file.file_data")
            blocks.append({"type": "document", "source": source_of(data), "title": file.get("filename")})
        elif kind == "text":
            blocks.append(part)
        else:
            raise invalid_value(place + ".type", "must be text, image_url or file")
    return "user", blocks


def source_of(url: str) -> Dict[str, Any]:
    """data:image/png;base64,... or an address -> the source of a block."""
    found = re.match(r"data:([\w.+/-]+)(?:;[\w=.-]+)*;base64,", url[:300])
    if found:
        return {"type": "base64", "media_type": found.group(1), "data": url[found.end():]}
    return {"type": "url", "url": url}


def read_assistant_parts(message: Mapping[str, Any], name: str) -> Tuple[str, Any]:
    """An earlier answer -> (role, content) of the Messages API."""
    content = message.get("content") or []
    parts: List[Any] = [{"type": "text", "text": content}] if isinstance(content, str) else [
        {"type": "text", "text": part.get("refusal")} if isinstance(part, dict) and part.get("type") == "refusal" else part
        for part in require_type(content, list, name + ".content")]
    for n, call in enumerate(require_type(message.get("tool_calls") or [], list, name + ".tool_calls")):
        place = "%s.tool_calls.%d" % (name, n)
        told = require_type(require_type(call, dict, place).get("function"), dict, place + ".function")
        try:
            arguments = parse_json(require_type(told.get("arguments") or "{}", str, place + ".function.arguments").encode())
        except InvalidJson:
            raise invalid_value(place + ".function.arguments", "must be JSON") from None
        parts.append({"type": "tool_use", "id": call.get("id"), "name": told.get("name"), "input": arguments})
    return "assistant", parts


def read_tool_parts(message: Mapping[str, Any], name: str) -> Tuple[str, Any]:
    """The result of a tool -> (role, content) of the Messages API."""
    return "user", [{"type": "tool_result", "tool_use_id": message.get("tool_call_id"), "content": message.get("content")}]


COMPLETION_ROLES = {"user": read_user_parts, "assistant": read_assistant_parts, "tool": read_tool_parts}


class ChatStep(NamedTuple):
    """What happens to an answer: text (a piece of it), again (the text before was broken off: what follows stands for itself), quiet
    or end (job: the finished one). model: which one answers, once that is known."""
    kind: str
    text: str = ""
    model: Optional[str] = None
    job: Optional[Job] = None


ChatSteps = Generator[ChatStep, None, None]


def chat_steps(call: Context, job: Job) -> ChatSteps:
    """An answer as it comes, for the one caller who waits for it: when that one leaves, the run ends, since nobody could come back
    for it. Of a text that begins anew what is the same is not told twice. Raises RunError, Unavailable."""
    told: List[str] = []                                     # to the reader, of the present block
    again, at = "", 0                                        # what was told before the text began anew, and how far it is the same
    model, is_over, told_at = job.model, False, call.service.now()
    try:
        for event, view in call.service.follow(call.holder, job.id, client_disconnected=call.request.client_disconnected):
            if event.kind == "quiet" or event.kind == "queued" and call.service.now() - told_at >= HEARTBEAT_SECONDS:
                told_at = call.service.now()                  # a new place in the queue is nothing that is told
                yield ChatStep("quiet", model=model)
            elif event.kind == "started":
                again, at, model = "".join(told), 0, event.model or model
            elif event.kind == "delta" and again:
                ahead = again[at:at + len(event.text)]
                if not event.text.startswith(ahead):
                    yield ChatStep("again", model=model)
                    told, again, ahead = [again[:at]], "", ""
                    yield ChatStep("text", told[0] + event.text, model)
                elif len(event.text) > len(ahead):
                    again = ""
                    yield ChatStep("text", event.text[len(ahead):], model)
                told.append(event.text[len(ahead):])
                at += len(event.text)
            elif event.kind == "delta":
                told.append(event.text)
                yield ChatStep("text", event.text, model)
            elif view and view.job.is_finished:
                is_over = True
                failure = call.service.failure(view.job)
                if failure:
                    raise failure
                if again[at:].strip() and view.job.response:  # it ends where more was told before
                    yield ChatStep("again", model=model)
                    yield ChatStep("text", view.job.response, model)
                yield ChatStep("end", model=view.job.model or model, job=view.job)
                return
        raise Unavailable("The request was given up: its caller has left, or the bridge ends.")
    finally:
        if not is_over:
            with contextlib.suppress(BridgeError):
                call.service.cancel(call.holder, job.id)


def handle_chat(call: Context, format: "Format") -> Response:
    """A conversation, answered whole or as it comes. What fails before the first word has a status of its own. An answer that takes so
    long that a proxy would cut the silence begins with blanks, which JSON allows."""
    chat = format.read(parse_json(call.body() or b"{}"))
    job = call.service.ask(call.holder, chat).job
    names = (("request-id", job.id), ("x-request-id", job.id))
    steps, until = chat_steps(call, job), call.service.now() + WAIT_SECONDS - HEARTBEAT_SECONDS
    if chat.stream:
        first = next(steps)
        return stream_response(format.pieces(chat, job, first, steps), names)
    for step in steps:
        if step.job:
            return json_response(200, format.body(step.job), names)
        if call.service.now() >= until:
            return Response(200, stream=heartbeat_then_body(call, format, steps), headers=names)
    raise AssertionError("unreachable")


def heartbeat_then_body(call: Context, format: "Format", steps: ChatSteps) -> BodyIterator:
    """The rest of an answer whose status had to be told before it was there; a failure comes as the body of an error."""
    told_at = call.service.now()
    with contextlib.closing(steps):
        yield b" "
        try:
            for step in steps:
                if step.job:
                    yield as_json(format.body(step.job)).encode("utf-8", "replace")
                elif step.kind == "quiet" or call.service.now() - told_at >= HEARTBEAT_SECONDS:
                    told_at = call.service.now()
                    yield b" "
        except BridgeError as error:
            yield as_json(format.error(error)).encode("utf-8", "replace")


def short_id(job: Job) -> str:
    return job.id.replace("-", "")


def message_usage(job: Job) -> Dict[str, int]:
    used = job.usage or Usage()
    return {"input_tokens": used.input_tokens, "cache_creation_input_tokens": used.cache_creation_tokens,
            "cache_read_input_tokens": used.cache_read_tokens, "output_tokens": used.output_tokens}


def message_body(job: Job) -> Dict[str, Any]:
    """The answer of the Messages API."""
    stop_info = job.stop_info or StopInfo()
    content: List[Dict[str, Any]] = [{"type": "text", "text": job.response}] if job.response or not stop_info.calls else []
    content += [{"type": "tool_use", "id": each.id, "name": each.name, "input": each.arguments} for each in stop_info.calls]
    return {"id": "msg_" + short_id(job), "type": "message", "role": "assistant", "model": job.model or "default", "content": content,
            "stop_reason": stop_info.reason, "stop_sequence": stop_info.stop, "usage": message_usage(job)}


def message_stream(chat: Chat, job: Job, first: ChatStep, steps: ChatSteps) -> BodyIterator:
    """The same as Server-Sent Events."""
    def event(kind: str, **data: Any) -> bytes:
        return sse_event(kind, None, {"type": kind, **data})

    index, is_open = 0, False
    empty = replace(job, model=first.model, usage=None)
    yield event("message_start", message={**message_body(empty), "content": [], "stop_reason": None}) + event("ping")
    with contextlib.closing(steps):
        try:
            for step in chain((first,), steps):
                if step.kind == "quiet":
                    yield event("ping")
                if is_open and (step.kind == "again" or step.job):
                    yield event("content_block_stop", index=index)
                    index, is_open = index + 1, False
                if not is_open and (step.kind == "text" or step.job and not index and not (step.job.stop_info or StopInfo()).calls):
                    yield event("content_block_start", index=index, content_block={"type": "text", "text": ""})
                    is_open = True
                if step.kind == "text":
                    yield event("content_block_delta", index=index, delta={"type": "text_delta", "text": step.text})
                if step.job:
                    yield b"".join(message_end(step.job, index, is_open, event))
        except BridgeError as error:
            yield event("error", **{"error": message_error(error)["error"]})


def message_end(job: Job, index: int, is_open: bool, event: Callable[..., bytes]) -> Iterator[bytes]:
    """The calls and the end of a streamed answer."""
    if is_open:
        yield event("content_block_stop", index=index)
    stop_info = job.stop_info or StopInfo()
    for n, each in enumerate(stop_info.calls, index):
        yield event("content_block_start", index=n, content_block={"type": "tool_use", "id": each.id, "name": each.name, "input": {}})
        yield event("content_block_delta", index=n, delta={"type": "input_json_delta", "partial_json": as_json(each.arguments)})
        yield event("content_block_stop", index=n)
    yield event("message_delta", delta={"stop_reason": stop_info.reason, "stop_sequence": stop_info.stop}, usage=message_usage(job))
    yield event("message_stop")


def message_error(error: BridgeError) -> Dict[str, Any]:
    """The error of the Messages API."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
             429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error", 529: "overloaded_error"}
    usual = "invalid_request_error" if error.status < 500 else "api_error"
    return {"type": "error", "error": {"type": kinds.get(error.status, usual), "message": str(error)}}


FINISH_REASONS = {"tool_use": "tool_calls", "max_tokens": "length", "refusal": "content_filter"}      # any other: stop


def completion_usage(job: Job) -> Dict[str, Any]:
    used = job.usage or Usage()
    asked = used.input_tokens + used.cache_read_tokens + used.cache_creation_tokens
    return {"prompt_tokens": asked, "completion_tokens": used.output_tokens, "total_tokens": asked + used.output_tokens,
            "prompt_tokens_details": {"cached_tokens": used.cache_read_tokens}}


def completion_calls(job: Job) -> List[Dict[str, Any]]:
    return [{"id": each.id, "type": "function", "function": {"name": each.name, "arguments": as_json(each.arguments)}}
            for each in (job.stop_info or StopInfo()).calls]


def completion_body(job: Job) -> Dict[str, Any]:
    """The answer of the Chat Completions API."""
    calls = completion_calls(job)
    message = {"role": "assistant", "content": job.response or (None if calls else ""), "refusal": None,
               **({"tool_calls": calls} if calls else {})}
    return {"id": "chatcmpl-" + short_id(job), "object": "chat.completion", "created": int(job.created_at), "model": job.model or "default",
            "choices": [{"index": 0, "message": message, "logprobs": None,
                         "finish_reason": FINISH_REASONS.get((job.stop_info or StopInfo()).reason, "stop")}],
            "usage": completion_usage(job)}


def completion_stream(chat: Chat, job: Job, first: ChatStep, steps: ChatSteps) -> BodyIterator:
    """The same as Server-Sent Events."""
    def chunk(model: Optional[str], choices: List[Dict[str, Any]], **more: Any) -> bytes:
        return sse_event("", None, {"id": "chatcmpl-" + short_id(job), "object": "chat.completion.chunk", "created": int(job.created_at),
                          "model": model or "default", "choices": choices, **({"usage": None} if chat.include_usage else {}), **more})

    def choice(delta: Dict[str, Any], reason: Optional[str] = None) -> List[Dict[str, Any]]:
        return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]

    yield chunk(first.model, choice({"role": "assistant", "content": "", "refusal": None}))
    with contextlib.closing(steps):
        try:
            for step in chain((first,), steps):
                if step.kind == "quiet":
                    yield b": still here\n\n"
                elif not step.job:
                    yield chunk(step.model, choice({"content": step.text if step.kind == "text" else "\n\n"}))
                else:
                    calls = [{"index": n, **each} for n, each in enumerate(completion_calls(step.job))]
                    last = chunk(step.model, choice({}, FINISH_REASONS.get((step.job.stop_info or StopInfo()).reason, "stop")))
                    figures = chunk(step.model, [], usage=completion_usage(step.job)) if chat.include_usage else b""
                    yield (chunk(step.model, choice({"tool_calls": calls})) if calls else b"") + last + figures + b"data: [DONE]\n\n"
        except BridgeError as error:
            yield sse_event("", None, completion_error(error))


def completion_error(error: BridgeError) -> Dict[str, Any]:
    codes = {"missing_token": "invalid_api_key", "invalid_token": "invalid_api_key", "rate_limited": "rate_limit_exceeded",
             "usage_limit": "rate_limit_exceeded", "context_too_long": "context_length_exceeded"}
    kind = "rate_limit_error" if error.status == 429 else "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": error.extra.get("field"), "code": codes.get(error.code, error.code)}}


class Format(NamedTuple):
    """The words of one wire format: how a request is read, an answer written, whole or in pieces, and an error."""
    read: Callable[[Any], Chat]
    body: Callable[[Job], Dict[str, Any]]
    pieces: Callable[[Chat, Job, ChatStep, ChatSteps], BodyIterator]
    error: Callable[[BridgeError], Dict[str, Any]]


MESSAGES = Format(read_messages, message_body, message_stream, message_error)
COMPLETIONS = Format(read_completions, completion_body, completion_stream, completion_error)


def format_of(path: str, headers: Mapping[str, str]) -> Optional[Format]:
    """In whose words a path is answered; None: in our own."""
    path = unquote(path)
    if not re.match(r"/v1(/|$)", path, re.IGNORECASE):
        return None
    return MESSAGES if re.match("/v1/messages", path, re.IGNORECASE) or "anthropic-version" in headers else COMPLETIONS


def handle_messages(call: Context) -> Response:
    return handle_chat(call, MESSAGES)


def handle_completions(call: Context) -> Response:
    return handle_chat(call, COMPLETIONS)


MODEL = {"id": "sonnet", "object": "model", "created": 0, "owned_by": "anthropic", "type": "model", "display_name": "Sonnet",
         "created_at": "1970-01-01T00:00:00Z", "lifecycle": "active"}


def model_body(model: Model) -> Dict[str, Any]:
    """A model for both formats: each finds its own keys; the dates are told as unknown."""
    return {**MODEL, "id": model.id, "display_name": model.name}


def handle_list_models(call: Context) -> Response:
    bodies = [model_body(model) for model in call.service.models(call.holder)]
    return json_response(200, {"object": "list", "data": bodies, "has_more": False, "first_id": bodies[0]["id"],
                               "last_id": bodies[-1]["id"]})


def handle_get_model(call: Context) -> Response:
    wanted = call.parts["id"]
    found = [model for model in call.service.models(call.holder) if model.id == wanted]
    if not found:
        raise NotFound("There is no model %s here. GET /v1/models lists them" % replace_surrogates(wanted)[:128])
    return json_response(200, model_body(found[0]))


ID = "550e8400-e29b-41d4-a716-446655440000"
MOMENT = "2026-01-31T12:00:00.000Z"
FIGURES = {"inputTokens": 12, "outputTokens": 40, "cacheReadTokens": 0, "cacheCreationTokens": 0, "costUsd": 0.0006}
SUMS = {"requests": 5, "completed": 4, "errors": 1, **FIGURES}
PLAN = {"windows": [{"type": "five_hour", "status~": "allowed", "utilization~": 0.42, "resetsAt~": MOMENT, "seenAt": MOMENT}],
        "isUsingOverage": False, "waitingFor~": None, "resumesAt~": None}
JOB = {"status": "completed", "requestId": ID, "queuePosition?": 0, "response?": "Because air scatters blue light more.",
       "error?": "The request was cancelled.", "errorCode?": "cancelled", "completedAt?": MOMENT, "model?": "haiku",
       "conversation?": "trip-to-rome", "createdAt": MOMENT, "startedAt?": MOMENT, "attempts": 1, "durationMs?": 1840, "structured?": {},
       "usage?": FIGURES, "partial?": "Because", "waitingFor?": "usage_limit", "resumesAt?": MOMENT,
       "warnings?": ["unknown field 'x' ignored"]}
CHAT_USAGE = {"input_tokens": 12, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 40}


# What answers look like: an example, from which the schema is made. name?: may be missing; name~: may be null.
RESPONSE_EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "Queued": {"ok": True, "requestId": ID, "position": 1, "poll": "GET /api/ask/" + ID, "warnings?": ["unknown field 'x' ignored"]},
    "Job": JOB,
    "Cancelled": {"ok": True, **JOB},
    "Requests": {"requests": [{**JOB, "message": "Why is the sky blue?", "tokenId": ID, "systemPrompt?": "Answer in one sentence.",
                               "effort?": "low", "api?": "openai", "jsonSchema?": {}}], "next~": "41"},
    "Conversations": {"conversations": [{"name": "default", "turns": 3, "createdAt": MOMENT, "lastUsedAt": MOMENT}]},
    "Done": {"ok": True, "message": "Token revoked"},
    "Usage": {"since": "2026-01-01", "total": SUMS, "days": [{"day": "2026-01-31", **SUMS}],
              "tokens": [{"tokenId": ID, "name~": "my-app", **SUMS}], "plan": PLAN},
    "NewToken": {"ok": True, "tokenId": ID, "token": "cab-...", "prefix": "cab-01234567", "warning": "Save this token now.",
                 "warnings?": ["unknown field 'x' ignored"]},
    "Tokens": {"tokens": [{"id": ID, "name": "my-app", "prefix": "cab-01234567", "sessionMode": "stateless", "expiresAt~": MOMENT,
                           "createdAt": MOMENT, "lastUsedAt~": MOMENT, "isAdmin": False, "isExpired": False, "tools": "none",
                           "workspace~": None, "requestsPerMinute~": 10, "requestsPerDay~": 200, "models~": ["haiku"]}]},
    "Status": {"status": "running", "version": __version__, "queue": {"isProcessing": False, "length": 0},
               "stats": {"totalTokens": 2, "totalRequests": 5, "completedRequests": 4, "errorRequests": 1, "queuedRequests": 0},
               "worker?": {}, "plan?": PLAN, "tunnel?": {}, "claude?": {}},
    "Health": {"status": "ok"},
    "Root": {"name": "claude-api-bridge", "version": __version__, "description": "A REST API", "endpoints": {}, "docs": "GET /dashboard"},
    "OpenApi": {"openapi": "3.1.0", "info": {}, "paths": {}, "components": {}},
    "Models": {"object": "list", "data": [MODEL], "has_more": False, "first_id": "sonnet", "last_id": "sonnet"},
    "Model": MODEL,
    "Message": {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-sonnet-5", "stop_reason": "end_turn",
                "content": [{"type": "text", "text?": "Rhine", "id?": "toolu_1", "name?": "add", "input?": {}}],
                "stop_sequence~": None, "usage": CHAT_USAGE},
    "Completion": {"id": "chatcmpl-1", "object": "chat.completion", "created": 1769860800, "model": "claude-sonnet-5", "choices": [{
        "index": 0, "message": {"role": "assistant", "content~": "Rhine", "refusal~": None, "tool_calls?": [
            {"id": "toolu_1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]},
        "logprobs~": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 12, "completion_tokens": 40, "total_tokens": 52, "prompt_tokens_details": {"cached_tokens": 0}}},
    "Error": {"error": "Request not found", "code": "not_found", "field?": "wait", "retryAfter?": 7, "resetsAt?": MOMENT},
    "MessageError": {"type": "error", "error": {"type": "not_found_error", "message": "Not found"}},
    "CompletionError": {"error": {"message": "Not found", "type": "invalid_request_error", "param~": None, "code": "not_found"}},
}
WAIT = {"wait": ("number", "seconds to hold the answer, 0 to 90")}
AFTER = {"after": ("integer", "how much of the text is known, in code points; as Last-Event-ID")}
PAGE_QUERY = {"status": ("string", "one or more of queued, processing, completed, error, joined by commas"),
              "limit": ("integer", "1 to 100, default 20"), "before": ("string", "the last page's `next`")}

ROUTES = (
    Route("POST", "/api/ask", AuthLevel.TOKEN, handle_ask, "Send a message to Claude Code", Ask,
          {202: '{"ok":true,"requestId":ID,"position":1,"poll":"GET /api/ask/ID"}',
           200: "with `wait`: the poll body, finished; with `stream`: events"}, {202: "Queued", 200: "Job"}, {}, (403, 409)),
    Route("GET", "/api/ask/:requestId", AuthLevel.TOKEN, handle_poll, "Poll for the answer; `?wait=30` holds it until then", None,
          {202: '{"status":"queued","requestId":ID,"queuePosition":1}',
           200: '{"status":"completed","requestId":ID,"response":"..."}'}, {202: "Job", 200: "Job"}, WAIT, polls=True),
    Route("DELETE", "/api/ask/:requestId", AuthLevel.TOKEN, handle_cancel, "Cancel a request that waits or runs", None,
          {200: '{"ok":true,"status":"error","errorCode":"cancelled",...}'}, {200: "Cancelled"}, {}, (409,)),
    Route("GET", "/api/ask/:requestId/events", AuthLevel.TOKEN, handle_events, "Follow a request live; `?after=120` resumes there", None,
          {200: "Server-Sent Events"}, {200: ""}, AFTER),
    Route("POST", "/api/ask/:requestId/events", AuthLevel.TOKEN, handle_events, "The same, for proxies that hold back events over GET", None,
          {200: "Server-Sent Events"}, {200: ""}, AFTER),
    Route("GET", "/api/requests", AuthLevel.TOKEN, handle_list_requests, "One's requests, newest first; an admin sees all", None,
          {200: '{"requests":[...],"next":"41"}'}, {200: "Requests"}, PAGE_QUERY),
    Route("GET", "/api/conversations", AuthLevel.TOKEN, handle_list_conversations, "The conversations of a stateful token", None,
          {200: '{"conversations":[{"name":"default","turns":3,...}]}'}, {200: "Conversations"}),
    Route("DELETE", "/api/conversations/:name", AuthLevel.TOKEN, handle_delete_conversation, "Forget a conversation; the next ask begins it afresh", None,
          {200: '{"ok":true,"message":"Conversation deleted"}'}, {200: "Done"}),
    Route("GET", "/api/usage", AuthLevel.TOKEN, handle_usage, "Requests, tokens and estimated cost per day and token; the plan's limits", None,
          {200: '{"total":{...},"days":[...],"tokens":[...],"plan":{...}}'}, {200: "Usage"}, {"days": ("integer", "1 to 400, default 30")}),
    Route("POST", "/v1/messages", AuthLevel.TOKEN, handle_messages, "The Anthropic wire format; see Other wire formats", None,
          {200: '{"type":"message","content":[...],...}', 400: '{"type":"error","error":{"type":"...","message":"..."}}'},
          {200: "Message"}, {}, (403, 504, 529)),
    Route("POST", "/v1/chat/completions", AuthLevel.TOKEN, handle_completions, "The OpenAI wire format; see Other wire formats", None,
          {200: '{"object":"chat.completion","choices":[...],...}', 400: '{"error":{"message":"...","type":"...",...}}'},
          {200: "Completion"}, {}, (403, 504, 529)),
    Route("GET", "/v1/models", AuthLevel.TOKEN, handle_list_models, "The models of `claude`, for both formats", None,
          {200: '{"object":"list","data":[{"id":"sonnet",...}],...}'}, {200: "Models"}),
    Route("GET", "/v1/models/:id", AuthLevel.TOKEN, handle_get_model, "One of them", None, {200: '{"id":"sonnet","object":"model",...}'},
          {200: "Model"}),
    Route("POST", "/api/tokens", AuthLevel.ADMIN, handle_create_token, "Create a token", NewToken,
          {201: '{"ok":true,"tokenId":ID,"token":"cab-...","prefix":"cab-01234567"}'}, {201: "NewToken"}),
    Route("GET", "/api/tokens", AuthLevel.ADMIN, handle_list_tokens, "List all tokens", None, {200: '{"tokens":[...]}'}, {200: "Tokens"}),
    Route("DELETE", "/api/tokens/:id", AuthLevel.ADMIN, handle_revoke_token, "Revoke a token; its running request is stopped", None,
          {200: '{"ok":true,"message":"Token revoked"}'}, {200: "Done"}),
    Route("GET", "/api/status", AuthLevel.NOTHING, handle_status, "Queue and counters; more for an admin token", None,
          {200: '{"status":"running","version":"...","queue":{...},"stats":{...}}'}, {200: "Status"}),
    Route("GET", "/health", AuthLevel.NOTHING, handle_health, "200 while the worker and the database work", None, {200: '{"status":"ok"}'},
          {200: "Health"}),
    Route("GET", "/metrics", AuthLevel.ADMIN, handle_metrics, "Counters and gauges for Prometheus", None, {200: "text"}, {200: ""}),
    Route("GET", "/openapi.json", AuthLevel.NOTHING, lambda call: json_response(200, openapi()), "This API for programs: OpenAPI 3.1", None,
          {200: '{"openapi":"3.1.0","paths":{...},...}'}, {200: "OpenApi"}),
    Route("GET", "/dashboard", AuthLevel.NOTHING, handle_dashboard, "The dashboard", None, {200: "HTML"}, {200: ""}),
    Route("GET", "/", AuthLevel.NOTHING, handle_root, "The list of endpoints, or the dashboard for a browser", None,
          {200: '{"name":...,"endpoints":{...}}'}, {200: "Root"}),
)


def schema_of(example: Any) -> Dict[str, Any]:
    """The JSON Schema of what looks like an example of SHAPES."""
    if isinstance(example, dict):
        names = {name: name.rstrip("?~") for name in example}
        properties = {names[name]: schema_of(value) for name, value in example.items()}
        for name in (name for name in example if name.endswith("~")):
            told = properties[names[name]]
            properties[names[name]] = {**told, "type": [told["type"], "null"]} if "type" in told else {}
        required = [names[name] for name in example if not name.endswith("?")]
        return {"type": "object", "properties": properties, **({"required": required} if required else {})}
    if isinstance(example, list):
        return {"type": "array", "items": schema_of(example[0])}
    kinds = {str: "string", bool: "boolean", int: "number", float: "number"}
    return {} if example is None or example == "none" else {"type": kinds[type(example)]}


def strip_markers(example: Any) -> Any:
    """An example of SHAPES as it goes over the wire."""
    if isinstance(example, dict):
        return {name.rstrip("?~"): strip_markers(value) for name, value in example.items()}
    return [strip_markers(each) for each in example] if isinstance(example, list) else example


@lru_cache(maxsize=1)
def openapi() -> Dict[str, Any]:
    """The routes as an OpenAPI 3.1 document."""
    paths: Dict[str, Dict[str, Any]] = {}
    for route in ROUTES:
        path = re.sub(r":(\w+)", r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = operation(route)
    schemas = {name: {**schema_of(example), "examples": [strip_markers(example)]} for name, example in RESPONSE_EXAMPLES.items()}
    return {"openapi": "3.1.0", "paths": paths,
            "info": {"title": "claude-api-bridge", "version": __version__, "summary": "A REST API for the Claude Code command line tool",
                     "license": {"name": "MIT", "identifier": "MIT"}},
            "components": {"schemas": {**schemas, **{command.__name__ + "Body": command_schema(command) for command in (Ask, NewToken)}},
                           "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"},
                                               "key": {"type": "apiKey", "in": "header", "name": "x-api-key"}}}}


def command_schema(command: Type[Command]) -> Dict[str, Any]:
    """The JSON Schema of a body."""
    rows = {camel_case(row.name): row for row in fields(command)}  # type: ignore[arg-type]
    return {"type": "object", "required": [name for name in ("message", "name") if name in rows], "properties": {
        name: {"type": row.metadata["kind"].split(" or ") + ["null"] * (row.default is None), "description": row.metadata["doc"],
               "examples": [row.metadata["example"]]} for name, row in rows.items()}}


def operation(route: Route) -> Dict[str, Any]:
    """One route in an OpenAPI document: parameters, body, answers and every error."""
    format = format_of(route.path, {})
    told: Dict[str, Any] = {
        "operationId": "_".join(re.findall(r"\w+", route.method.lower() + route.path)) or route.method.lower(), "summary": route.doc,
        "security": [{"bearer": []}, {"key": []}] if route.needs != AuthLevel.NOTHING else [],
        "parameters": [*({"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                         for name in re.findall(r":(\w+)", route.path)),
                       *({"name": name, "in": "query", "schema": {"type": kind}, "description": doc}
                         for name, (kind, doc) in route.query.items())]}
    if route.method == "POST" and not route.path.endswith("/events"):
        schema = {"$ref": "#/components/schemas/%sBody" % route.takes.__name__} if route.takes else {"type": "object"}
        told["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    told["responses"] = {str(status): answer_schema(route, status, name) for status, name in route.shapes.items()}
    statuses = {400, 404, 405, 417, 421, 429, 431, 500, 501, 503, 505, *route.refuses}
    statuses |= {401} if route.needs != AuthLevel.NOTHING else set()
    statuses |= {403} if route.needs == AuthLevel.ADMIN else set()
    statuses |= {413, 415} if "requestBody" in told or route.path.endswith("/events") else set()
    name = "Error" if format is None else "MessageError" if format is MESSAGES else "CompletionError"
    for status in sorted(statuses):
        kinds = [kind for kind in ERRORS if kind.status == status]
        examples = {kind.code: {"value": (format.error if format else error_body)(kind())} for kind in kinds}
        told["responses"].setdefault(str(status), {
            "description": " / ".join(kind.code for kind in kinds) or "the run failed",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/" + name},
                                             **({"examples": examples} if examples else {})}}})
    return told


def answer_schema(route: Route, status: int, name: str) -> Dict[str, Any]:
    """What a route answers when all is well."""
    told = {"description": route.gives.get(status, "").replace("`", "") or HTTPStatus(status).phrase, "content": {}}
    if name:
        told["content"] = {"application/json": {"schema": {"$ref": "#/components/schemas/" + name}}}
    kind = "text/html" if route.path in ("/", "/dashboard") else "text/plain" if route.path == "/metrics" else "text/event-stream"
    if not name or route.path == "/" or status == 200 and route.method == "POST":
        told["content"] = {**told["content"], kind: {"schema": {"type": "string"}}}
    return told


@lru_cache(maxsize=256)
def match(method: str, path: str) -> Tuple[Route, Mapping[str, str]]:
    """The route of a request, and the named parts of its path; letters in any case, one slash may follow.

    Raises NotFound; MethodNotAllowed with Allow; InvalidRequest for a bad percent escape.
    """
    if re.search(r"%(?![0-9A-Fa-f]{2})", path):
        raise InvalidRequest("The path holds a bad percent escape")
    given = [unquote(part) for part in (path[:-1] if re.search("[^/]/$", path) else path).split("/")]
    allowed = []
    for route in ROUTES:
        wanted = route.path.split("/")
        if len(wanted) == len(given) and all(w.startswith(":") and g or w == g.lower() for w, g in zip(wanted, given)):
            allowed.append(route.method)
            if route.method == ("GET" if method == "HEAD" else method):
                return route, {w[1:]: g for w, g in zip(wanted, given) if w.startswith(":")}
    if not allowed:
        raise NotFound()
    allow = ", ".join(sorted(set(allowed) | {"OPTIONS"} | ({"HEAD"} if "GET" in allowed else set())))
    raise MethodNotAllowed("%s is not allowed here. Use: %s" % (method[:20], allow), (("Allow", allow),))


# === 10 HTTP ==================================================================================================
# Bytes in, bytes out. The Dispatcher turns a Request into a Response and decides who may pass; the Handler reads
# and writes one connection strictly; the BridgeServer owns the connections and their deadlines.

STANDARD_HEADERS = (
    ("Content-Security-Policy", "default-src 'none';frame-ancestors 'none'"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Origin-Agent-Cluster", "?1"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"),
    ("X-DNS-Prefetch-Control", "off"),
    ("X-Download-Options", "noopen"),
    ("X-Frame-Options", "SAMEORIGIN"),
    ("X-Permitted-Cross-Domain-Policies", "none"),
    ("X-XSS-Protection", "0"),
    ("Cache-Control", "no-store"),
    ("Access-Control-Allow-Origin", "*"),
    ("Access-Control-Expose-Headers", "Allow, Idempotent-Replayed, RateLimit-Limit, RateLimit-Policy, RateLimit-Remaining,"
                                      " RateLimit-Reset, Retry-After"),
)
PREFLIGHT_HEADERS = (
    ("Access-Control-Allow-Methods", "GET,POST,DELETE"),
    ("Access-Control-Allow-Headers", "Content-Type,Authorization,X-Api-Key,Idempotency-Key,Last-Event-ID,*"),
    ("Access-Control-Max-Age", "600"),
)


class RateLimiters:
    """The rate limits: one for all token holders, one per address without a token, one per token for polls of its own
    unfinished jobs, and one per address for failed log-ins, which nothing switches off. Any thread."""

    def __init__(self, clock: Clock, capacity: int) -> None:
        self._clock, self._capacity = clock, capacity
        self._lock = threading.Lock()
        self._by_key: "OrderedDict[Tuple[str, str], TokenBucket]" = OrderedDict()
        self.holders = TokenBucket(clock, capacity)

    def stranger(self, address: str) -> TokenBucket:
        return self._bucket("stranger", address, self._capacity)

    def login(self, address: str) -> TokenBucket:
        return self._bucket("login", address, LOGINS_PER_MINUTE)

    def polls(self, token_id: str) -> TokenBucket:
        return self._bucket("polls", token_id, self._capacity * POLLS_PER_REQUEST)

    def _bucket(self, kind: str, name: str, capacity: int) -> TokenBucket:
        """The bucket of a name; the one longest unused is forgotten for a new one."""
        with self._lock:
            bucket = self._by_key.pop((kind, name), None) or TokenBucket(self._clock, capacity)
            self._by_key[kind, name] = bucket
            while len(self._by_key) > ADDRESSES:
                self._by_key.popitem(last=False)
        return bucket


def consume_or_raise(bucket: TokenBucket) -> None:
    """One request from the bucket. Raises RateLimited."""
    seconds = bucket.take()
    if seconds:
        refusal = retry_later(RateLimited, "", seconds)
        refusal.headers += bucket.headers()
        raise refusal


class HostPolicy:
    """By which names this bridge is called. own: host names besides those of this machine; through_tunnel: those by which
    the world comes in through our tunnel, while it runs."""

    def __init__(self, own: Iterable[str] = (), through_tunnel: Callable[[], FrozenSet[str]] = frozenset) -> None:
        machine = socket.gethostname().lower()
        first = machine.partition(".")[0]
        self._own = frozenset(name.lower() for name in (*own, "localhost", machine, first, first + ".local") if name)
        self._through_tunnel = through_tunnel

    def check(self, request: Request) -> None:
        """Raises UnknownHost for a name that is not ours: a stranger's page can lead a browser here under a name of its own,
        and would read the answers. An address in figures cannot be such a name."""
        host = self._host(request)
        if host and host not in self._own and not is_address(host) and host not in self._through_tunnel():
            raise UnknownHost("This bridge does not answer by the name %s. If it is its name, start it with --names %s"
                              % (host[:100], host[:100]))

    def address(self, request: Request) -> str:
        """Who is on the other side: for what came through our tunnel, whom Cloudflare names; of version 6 the network."""
        told, peer = request.headers.get("cf-connecting-ip", ""), request.address
        is_local = peer in ("127.0.0.1", "::1", "::ffff:127.0.0.1") or peer in self._own
        address = told if is_local and is_address(told) and self._host(request) in self._through_tunnel() else peer
        if ":" in address and is_address(address):           # one household has 2^64 of them
            return str(ipaddress.ip_network((address.strip("[]").partition("%")[0], 64), strict=False))
        return address

    @staticmethod
    def _host(request: Request) -> str:
        return host_name(request.headers.get("host", ""))


@lru_cache(maxsize=256)
def host_name(header: str) -> str:
    """Of a Host header, without the port."""
    return re.sub(r":\d*$", "", header).rstrip(".").lower()


@lru_cache(maxsize=256)
def is_address(text: str) -> bool:
    """Whether it is an IP address; a version 6 one may stand in brackets."""
    try:
        ipaddress.ip_address(text[1:-1] if text[:1] == "[" and text[-1:] == "]" else text)
        return True
    except ValueError:
        return False


class Dispatcher:
    """Request -> Response: name, route, caller, limits, answer; the only `except Exception` on this path. Any thread."""

    def __init__(self, service: Service, status_source: BridgeStatus, buckets: RateLimiters, report: Callable[[str], None],
                 names: Optional[HostPolicy] = None, metrics: Optional[Metrics] = None) -> None:
        self._service, self._backstage, self._buckets, self._report = service, status_source, buckets, report
        self._names, self._metrics = names or HostPolicy(), metrics or Metrics()

    def dispatch(self, request: Request) -> Response:
        response = self._respond(request)
        self._metrics.add("cab_http_responses_total", status=str(response.status))
        return response

    def _respond(self, request: Request) -> Response:
        try:
            self._names.check(request)
            if request.method == "OPTIONS":
                return Response(204, headers=PREFLIGHT_HEADERS)
            return self._answer(request)
        except BridgeError as error:
            return self.refusal(error, format_of(request.path, request.headers))
        except (ConnectionError, socket.timeout):
            raise
        except Exception:
            self._report(redact("Unexpected error in %s %s:\n%s" % (request.method, request.path, traceback.format_exc())))
            return self.refusal(BridgeError(), format_of(request.path, request.headers))

    @staticmethod
    def refusal(error: BridgeError, format: Optional[Format] = None) -> Response:
        """format: in whose words; None: in our own."""
        more = (("WWW-Authenticate", "Bearer"),) if error.status == 401 else ()
        if format:
            name = "req_" + secrets.token_hex(12)
            more += (("request-id", name), ("x-request-id", name))
            if error.extra.get("retryAfter", 0) > 60:         # for which some libraries would wait, however long it is
                more += (("x-should-retry", "false"),)
        return json_response(error.status, (format.error if format else error_body)(error), error.headers + more)

    def _answer(self, request: Request) -> Response:
        caller, refusal = self._caller(request)
        route: Optional[Route] = None
        parts: Mapping[str, str] = {}
        try:
            route, parts = match(request.method, request.path)
        except BridgeError as error:
            refusal = error
        bucket = self._bucket(route, caller, request, parts)
        consume_or_raise(bucket)
        try:
            if route is None or caller is None and route.needs != AuthLevel.NOTHING:
                raise refusal or MissingToken()
            if route.needs == AuthLevel.ADMIN and not (caller and caller.is_admin):
                raise AdminRequired()
            response = route.answer(Context(self._service, self._backstage, caller, request, parts))
        except (RateLimited, DailyLimit):                   # of the token's own limits, which tell when themselves
            raise
        except BridgeError as error:
            error.headers += bucket.headers()
            raise
        limits = bucket.headers()
        return response._replace(headers=response.headers + limits) if limits else response

    def _caller(self, request: Request) -> Tuple[Optional[Caller], Optional[BridgeError]]:
        """Who calls, or why a token is refused. Raises RateLimited after too many wrong ones from one address; a right one passes."""
        secret = bearer(request.headers)
        if secret is None:
            return None, None
        try:
            return self._service.authenticate(secret), None
        except InvalidToken as error:
            consume_or_raise(self._buckets.login(self._names.address(request)))
            return None, error

    def _bucket(self, route: Optional[Route], caller: Optional[Caller], request: Request, parts: Mapping[str, str]) -> TokenBucket:
        """A wait costs like any request; polls without one of one's own unfinished job have a bucket of their own."""
        if caller is None:
            return self._buckets.stranger(self._names.address(request))
        if route and route.polls and "wait" not in request.query and self._service.is_own_unfinished(caller, parts["requestId"]):
            return self._buckets.polls(caller.token.id)
        return self._buckets.holders


class Phase:
    """What a connection is doing: nothing, sending a head or body, being answered, or taking the answer. All but a BUSY one
    may be closed to make room."""
    IDLE = "idle"
    HEAD = "head"
    BODY = "body"
    BUSY = "busy"
    SEND = "send"
    SECONDS = {IDLE: IDLE_SECONDS, HEAD: HEAD_SECONDS, BODY: BODY_SECONDS, BUSY: float("inf"), SEND: SEND_SECONDS}


class Place:
    """A connection's, of CONNECTIONS: its phase, until when, and since when no request of it was complete. Its own thread alone enters
    a phase; others only look, each at one of them, and then close the connection at most."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.enter(Phase.IDLE)

    def enter(self, phase: str) -> None:
        """Past its deadline the connection is closed."""
        now = self._clock.monotonic()
        if phase != Phase.HEAD and phase != Phase.BODY:
            self.since = now
        self.deadline, self.phase = now + Phase.SECONDS[phase], phase


def render_head(response: Response, closes: bool) -> bytes:
    """Status line and headers; those of the response before the standard ones of the same name."""
    length = None if response.stream is not None else len(response.body)
    return _render_head_cached(response.status, response.content_type, response.headers, length, closes) + date_line(int(time.time()))


@lru_cache(maxsize=256)
def _render_head_cached(status: int, content_type: str, own: Tuple[Tuple[str, str], ...], length: Optional[int], closes: bool) -> bytes:
    """All of a head but its last line. own: before the standard ones of the same name; length: None for a stream."""
    names = {name for name, _ in own}
    headers = [*((name, value) for name, value in STANDARD_HEADERS if name not in names), *own]
    if status != 204:
        headers.append(("Content-Type", content_type))
    if length is not None:
        headers.append(("Content-Length", str(length)))
    elif not closes:
        headers.append(("Transfer-Encoding", "chunked"))
    headers.append(("Connection", "close" if closes else "keep-alive"))
    phrase = "Overloaded" if status == 529 else HTTPStatus(status).phrase
    return ("HTTP/1.1 %d %s\r\n" % (status, phrase) + "".join("%s: %s\r\n" % header for header in headers)).encode("latin-1", "replace")


@lru_cache(maxsize=1)
def date_line(now: int) -> bytes:
    """The last header, and the end of the head."""
    return ("Date: %s\r\n\r\n" % formatdate(now, usegmt=True)).encode()


REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([\x21-\x7e]+) HTTP/(\d\.\d)")
DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)              # not on Windows, where a send waits for its timeout at most
HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([ \t\x21-\x7e\x80-\xff]*)")      # one way to match: never slow
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class RequestHead(NamedTuple):
    """What stands before a body. headers: lower-case names; length: bytes of body to come, None: chunked; is_expected: whether the client
    waits for a word before it sends the body; closes: whether the connection ends with the answer."""
    method: str
    path: str
    query: Mapping[str, str]
    version: str
    headers: Mapping[str, str]
    length: Optional[int]
    expects_continue: bool
    closes: bool


def parse_request_head(block: bytes) -> RequestHead:
    """Reads a head strictly: CRLF ends lines, nothing is folded, no control characters, one Host, one length.

    Replaces the lenient parser of http.server, which lets two differing lengths or a bare CR pass. Raises MalformedRequest and others;
    the connection is then closed, since nobody knows where the next request begins.
    """
    if not block.endswith(b"\r\n\r\n"):                     # a blank line behind one that a bare LF ends
        raise MalformedRequest("Malformed header line")
    first, *lines = block[:-4].split(b"\r\n")
    found = REQUEST_LINE.fullmatch(first)
    if not found:
        raise MalformedRequest("Malformed request line")
    method, target, version = (part.decode("latin-1") for part in found.groups())
    if version not in ("1.0", "1.1"):
        raise UnknownVersion()
    is_target = target.startswith(("/", "http://", "https://")) or (method, target) == ("OPTIONS", "*")
    if method in METHODS and not is_target:
        raise MalformedRequest("Malformed request line")
    headers = parse_headers(lines)
    if version == "1.1" and "host" not in headers:
        raise MalformedRequest("Host header is missing")
    wish = headers.get("connection", "").lower()
    closes = "close" in wish or version == "1.0" and "keep-alive" not in wish
    expect = headers.get("expect", "").lower()
    length = parse_body_length(headers, version)
    if expect and expect != "100-continue":
        raise ExpectationFailed()
    path, _, query = (target if target.startswith("/") else "/" + target.partition("://")[2].partition("/")[2]).partition("?")
    return RequestHead(method, path, dict(parse_qsl(query, keep_blank_values=True)), version, headers, length,
                bool(expect) and version == "1.1", closes)


known_head = lru_cache(maxsize=256)(parse_request_head)              # who keeps a connection says the same again and again


def parse_headers(lines: Iterable[bytes]) -> Dict[str, str]:
    """By lower-case names; what comes twice is joined, unless it must not."""
    headers: Dict[str, str] = {}
    for line in lines:
        found = HEADER_LINE.fullmatch(line)
        if not found:
            raise MalformedRequest("Malformed header line")
        name, value = found.group(1).decode("latin-1").lower(), found.group(2).strip(b" \t").decode("latin-1")
        if name in headers and name in ("host", "content-length", "transfer-encoding", "authorization"):
            raise MalformedRequest("Repeated %s header" % name)
        headers[name] = headers[name] + ", " + value if name in headers else value
    return headers


def parse_body_length(headers: Mapping[str, str], version: str) -> Optional[int]:
    """How long the body is; None: chunked. Both lengths at once, or a chunked HTTP/1.0 body, are how requests are smuggled."""
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if length is not None or version == "1.0":
            raise MalformedRequest("Transfer-Encoding with Content-Length or HTTP/1.0")
        if coding.lower() != "chunked":
            raise UnknownCoding("Transfer-Encoding %s is not supported. Use Content-Length or chunked" % coding[:40])
        return None
    if length is not None and not re.fullmatch(r"[0-9]{1,15}", length):
        raise MalformedRequest("Malformed Content-Length")
    return int(length or 0)


class ConnectionHandler(BaseHTTPRequestHandler):
    """One connection. Decides nothing but what is HTTP at all; strict where leniency lets one request hide another."""
    protocol_version = "HTTP/1.1"
    server_version = "claude-api-bridge"
    sys_version = ""
    timeout = SEND_SECONDS if os.name == "nt" else None     # the server ends what is late; only there a blocked call does not notice
    disable_nagle_algorithm = True
    server: "BridgeServer"
    raw_requestline: bytes

    def setup(self) -> None:
        super().setup()
        self._place = self.server.place(self.connection)

    def handle_one_request(self) -> None:
        """Waits for a request's first byte, so that an idle connection is known as such, then has it read and answered."""
        try:
            self._place.enter(Phase.IDLE)
            come = self.rfile.peek(1)                       # type: ignore[attr-defined]
            if not come:
                self.close_connection = True
                return
            self._head_bytes = come.find(b"\r\n\r\n") + 4   # 3 where not all of it is there
            if self._head_bytes < 4:
                self._place.enter(Phase.HEAD)
            super().handle_one_request()
        except (ConnectionError, socket.timeout, ValueError):
            self.close_connection = True

    def parse_request(self) -> bool:
        """-> False when it answered with an error (the connection is then closed)."""
        self.close_connection = True
        self.command = "HEAD" if self.raw_requestline.startswith(b"HEAD ") else ""       # whose answer has no body, whatever else is wrong
        self._body_remaining: Optional[int] = 0                     # bytes of body to come; None: chunked
        self._continue = False
        try:
            block = self._head_block()
            self._head = head = known_head(block) if len(block) <= KNOWN_HEAD_BYTES else parse_request_head(block)
        except BridgeError as error:
            self._send_error_response(error)
            return False
        self.command, self.close_connection = head.method, head.closes
        self._body_remaining, self._continue = head.length, head.expects_continue
        return True

    def _head_block(self) -> bytes:
        """Up to and with the blank line. Raises HeadTooLarge, MalformedRequest."""
        first, left = self.raw_requestline, self._head_bytes - len(self.raw_requestline)
        if not first.strip():                               # one blank line may lead
            first = self.rfile.readline(HEAD_BYTES + 1)
            left -= len(first)
        if left > 0 and self._head_bytes <= HEAD_BYTES:     # as nearly always: all of it is there
            return first + self.rfile.read(left)
        lines, size = [first], len(first)
        while lines[-1] != b"\r\n":
            if size > HEAD_BYTES:
                raise HeadTooLarge()
            line = self.rfile.readline(HEAD_BYTES + 1)
            if not line.endswith(b"\n"):
                raise HeadTooLarge() if line and len(line) > HEAD_BYTES else MalformedRequest("The request head broke off")
            lines.append(line)
            size += len(line)
        return b"".join(lines)

    def _serve(self) -> None:
        self._place.enter(Phase.BUSY)
        head = self._head
        request = Request(head.method, head.path, head.query, head.headers, self.client_address[0], self._body, self._client_disconnected)
        response = self.server.dispatcher.dispatch(request)
        is_small = self._body_remaining is not None and self._body_remaining <= 1 << 16 and not self._continue
        self.close_connection = self.close_connection or self._body_remaining != 0 and not is_small
        if response.stream is None:
            self._write(response)
        else:
            self._write_stream(response, response.stream)
        if self._body_remaining and not self.close_connection:     # a small body that nobody read is skipped, the connection goes on
            self._place.enter(Phase.BODY)
            self.close_connection = len(self.rfile.read(self._body_remaining)) < self._body_remaining

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _serve

    def _body(self) -> bytes:
        """The body, whole. Raises BodyTooLarge, UnsupportedEncoding, MalformedRequest."""
        if self._head.headers.get("content-encoding", "identity").lower() != "identity":
            raise UnsupportedEncoding()
        if self._body_remaining is not None and self._body_remaining > BODY_BYTES:
            raise BodyTooLarge()
        if self._continue and self._body_remaining != 0:
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._continue = False
        self._place.enter(Phase.BODY)
        try:
            with contextlib.ExitStack() as held:
                data = self._read_chunks(held) if self._body_remaining is None else self._read_sized(held, self._body_remaining)
        except (MalformedRequest, BodyTooLarge):
            self._body_remaining, self.close_connection = None, True
            raise
        self._place.enter(Phase.BUSY)
        self._body_remaining = 0
        return data

    def _read_exactly(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise MalformedRequest("The body broke off")
        return data

    def _read_sized(self, held: contextlib.ExitStack, size: int) -> bytes:
        held.enter_context(self.server.reserve_memory(self.connection, size))
        return self._read_exactly(size)

    def _read_chunks(self, held: contextlib.ExitStack) -> bytes:
        """A chunked body, strictly: sizes in plain hex, no extensions longer than a line, trailers dropped."""
        data, total = bytearray(), 0                        # not a list: its parts may be a byte each
        while True:
            line = self.rfile.readline(1026)
            found = re.fullmatch(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n", line)
            if not found:
                raise MalformedRequest("Malformed chunk")
            size = int(found.group(1), 16)
            total += size
            if total > BODY_BYTES:
                raise BodyTooLarge()
            if not size:
                break
            if total - size < LARGE_BYTES <= total:
                held.enter_context(self.server.reserve_memory(self.connection, BODY_BYTES))
            data += self._read_exactly(size)
            if self._read_exactly(2) != b"\r\n":
                raise MalformedRequest("Malformed chunk")
        for _ in range(64):
            line = self.rfile.readline(HEAD_BYTES)
            if line == b"\r\n":
                return bytes(data)
            if not line.endswith(b"\r\n") or not HEADER_LINE.fullmatch(line[:-2]):
                break
        raise MalformedRequest("Malformed trailer")

    def _client_disconnected(self) -> bool:
        """Whether the other side has ended its sending; what it sent before stays to be read."""
        if hasattr(select, "POLLRDHUP"):                    # sees the end also behind bytes of a next request
            poller = select.poll()
            poller.register(self.connection, select.POLLRDHUP)
            return bool(poller.poll(0))
        try:
            self.connection.settimeout(0)
            return not self.connection.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            return True
        finally:
            self.connection.settimeout(self.timeout)

    def _write(self, response: Response) -> None:
        """The whole answer in one piece, so that no small packet waits for another."""
        head, body = render_head(response, self.close_connection), b"" if self.command == "HEAD" else response.body
        if len(body) < LARGE_BYTES:
            self._send(head + body)
        else:                                               # no second copy
            self._send(head)
            self._send(body)
        if self.close_connection and self._body_remaining != 0:
            self._drain()

    def _send(self, data: bytes) -> None:
        """Nearly all goes at once; for what is left the connection enters SEND."""
        try:
            sent = self.connection.send(data, DONT_WAIT)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self._send_rest(data, sent)

    def _send_rest(self, data: bytes, sent: int) -> None:
        """In parts, since a slow reader may take SEND_SECONDS for each."""
        view = memoryview(data)
        with self.server.reserve_memory(self.connection, len(data)):
            for start in range(sent, len(data), 1 << 18):
                self._place.enter(Phase.SEND)
                self.connection.sendall(view[start:start + (1 << 18)])
        self._place.enter(Phase.BUSY)

    def _write_stream(self, response: Response, pieces: BodyIterator) -> None:
        """Pieces as they come: chunked, or until the connection closes."""
        self.close_connection = self.close_connection or self._head.version == "1.0"
        is_chunked = not self.close_connection
        with contextlib.closing(pieces):
            self._send(render_head(response, self.close_connection))
            for piece in pieces if self.command != "HEAD" else ():
                self._send(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
            if is_chunked and self.command != "HEAD":
                self._send(b"0\r\n\r\n")

    def _drain(self) -> None:
        """After a refused body: what still comes is read for a moment, else the client may lose the answer to a reset."""
        self._place.enter(Phase.BODY)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            until, left = time.monotonic() + DRAIN_SECONDS, DRAIN_BYTES
            while left > 0 and time.monotonic() < until:
                self.connection.settimeout(max(0.001, until - time.monotonic()))
                data = self.rfile.read1(1 << 16)
                if not data:
                    break
                left -= len(data)

    def _send_error_response(self, error: BridgeError) -> None:
        self.close_connection, self._body_remaining = True, None
        self._write(Dispatcher.refusal(error))

    def send_error(self, code: int, message: Optional[str] = None, explain: Optional[str] = None) -> None:
        """What http.server answers by itself (an endless request line, an unknown method), in our one shape."""
        kinds = {414: HeadTooLarge, 501: UnknownCoding}
        if not hasattr(self, "_unread"):
            self._body_remaining = 0
        self._send_error_response(kinds.get(code, MalformedRequest)())

    def log_message(self, format: str, *args: Any) -> None:
        pass


class BridgeServer(ThreadingHTTPServer):
    """Owns the listening socket, the thread "http" and one thread per connection, with a deadline for each phase."""
    request_queue_size = 128
    daemon_threads = True
    allow_reuse_address = os.name == "posix"

    dispatcher: Dispatcher               # set before `start`; the port is bound first, since all else may change the data

    def __init__(self, host: str, port: int, clock: Clock, report: Callable[[str], None]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._clock, self._report = clock, report
        self._lock = threading.Lock()
        self._places: Dict[socket.socket, Place] = {}
        self._idle: List[threading.Event] = []                          # one for each thread without a connection
        self._given: Dict[threading.Event, Tuple[Any, Any]] = {}        # its next one
        self._closing, self._looked_at = False, 0.0
        self._held: Dict[socket.socket, int] = {}            # large answers on their way, oldest first: their bytes
        self._thread = threading.Thread(target=self.serve_forever, args=(0.2,), name="http", daemon=True)
        super().__init__((host, port), ConnectionHandler)

    def server_bind(self) -> None:
        """As the base class, without its look-up of the host's name (seconds, where reverse DNS is broken)."""
        if self.allow_reuse_address:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def start(self) -> None:
        self._thread.start()

    # --- connections and their deadlines ---

    def place(self, connection: socket.socket) -> Place:
        """A connection's; of one that was closed to make room, one that nobody looks at."""
        with self._lock:
            return self._places.get(connection) or Place(self._clock)

    def get_request(self) -> Tuple[socket.socket, Any]:
        """Where no file may be opened any more, the connection longest without a complete request makes room."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                with self._lock:
                    self._evict_idle(self._clock.monotonic())
                time.sleep(0.02)                           # its thread closes it; else this loop would spin
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection. At the cap the one longest without a complete request makes room; 503 when all are busy."""
        if not self._admit(request):
            return self._reject(request)
        bell: Optional[threading.Event] = None
        with self._lock:
            if self._idle:                                 # to begin a thread costs more than a short request
                bell = self._idle.pop()
                self._given[bell] = (request, client_address)
        if bell:
            bell.set()
        else:
            threading.Thread(target=self._serve_connections, args=(request, client_address), name="http", daemon=True).start()

    def _serve_connections(self, request: Any, client_address: Any) -> None:
        """A thread: one connection after the other, as long as the next one comes soon."""
        taken: Optional[Tuple[Any, Any]] = (request, client_address)
        while taken:
            threading.current_thread().name = "http-%s:%s" % tuple(taken[1][:2])
            self.process_request_thread(*taken)
            taken = self._next_connection()

    def _next_connection(self) -> Optional[Tuple[Any, Any]]:
        """None when none came soon, and at the end."""
        threading.current_thread().name = "http idle"
        bell = threading.Event()
        with self._lock:
            if self._closing:
                return None
            self._idle.append(bell)
        bell.wait(IDLE_THREAD_SECONDS)
        with self._lock:
            if bell in self._idle:
                self._idle.remove(bell)
            return self._given.pop(bell, None)

    @contextlib.contextmanager
    def reserve_memory(self, connection: socket.socket, size: int) -> Iterator[None]:
        """A large body or answer lies in memory until it is whole, or taken. Of more than HELD_BYTES the oldest are broken off."""
        if size < LARGE_BYTES:
            yield
            return
        with self._lock:
            self._held[connection] = size
            for other in list(self._held):
                if sum(self._held.values()) <= LARGE_PAYLOAD_BUDGET_BYTES or other is connection:
                    break
                del self._held[other]
                shutdown_socket(other)
        try:
            yield
        finally:
            with self._lock:
                self._held.pop(connection, None)

    def _admit(self, connection: socket.socket) -> bool:
        with self._lock:
            if len(self._places) >= CONNECTIONS and not self._evict_idle(self._clock.monotonic()):
                return False
            self._places[connection] = Place(self._clock)
        return True

    def _evict_idle(self, now: float) -> bool:
        """Closes the connection longest without a complete request; False when all are busy. Under the lock."""
        waiting = [connection for connection, place in self._places.items()
                   if place.phase != Phase.BUSY and (place.phase != Phase.SEND or now - place.since >= EVICTABLE_SEND_SECONDS)]
        if waiting:
            oldest = min(waiting, key=lambda connection: self._places[connection].since)
            del self._places[oldest]
            shutdown_socket(oldest)
        return bool(waiting)

    def _reject(self, request: Any) -> None:
        response = Dispatcher.refusal(Unavailable("Too many connections. Please try again later.", (("Retry-After", "1"),)))
        with contextlib.suppress(OSError):
            request.setblocking(False)                     # this is the accepting thread: what does not go at once does not go
            request.send(render_head(response, True) + response.body)
            request.shutdown(socket.SHUT_WR)
            for _ in range(16):                             # unread data would turn the close into a reset, and lose the answer
                if not request.recv(1 << 16):
                    break
        super().shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._places.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Five times a second, and not at each new connection: closes those that are past their deadline."""
        now = self._clock.monotonic()
        if now - self._looked_at < POLL_SECONDS:
            return
        self._looked_at = now
        with self._lock:
            late = [connection for connection, place in self._places.items() if now >= place.deadline]
        for connection in late:
            shutdown_socket(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silent when a client merely left."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, socket.timeout)):
            self._report("Unexpected error on a connection:\n" + redact(traceback.format_exc()))

    def stop_accepting(self) -> None:
        if self._thread.ident:
            self.shutdown()
        self.socket.close()

    def close(self) -> None:
        """Lets answers that are being made go out, then ends every connection. Idempotent."""
        self.stop_accepting()
        until = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < until and any(place.phase in (Phase.BUSY, Phase.SEND) for place in self._snapshot()):
            time.sleep(0.01)
        with self._lock:
            connections = list(self._places)
        for connection in connections:
            shutdown_socket(connection)
        while time.monotonic() < until + 1 and self._snapshot():
            time.sleep(0.01)
        with self._lock:
            idle, self._idle, self._closing = self._idle, [], True
        for bell in idle:
            bell.set()
        self.server_close()

    def _snapshot(self) -> List[Place]:
        with self._lock:
            return list(self._places.values())


def shutdown_socket(connection: socket.socket) -> None:
    """Ends a connection from outside its thread: the thread's read returns, and the thread cleans up."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


# === 11 Dashboard =============================================================================================
# One constant. The page holds no data: it fetches JSON. Text goes in by textContent only.

DASHBOARD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>claude-api-bridge</title>
<style nonce="NONCE">
:root { color-scheme: light dark; --paper: #faf9f7; --card: #fff; --tint: #f3eee6; --ink: #1f1e1c; --faint: #6b6862; --line: #e3e0da;
  --good: #2e7d4f; --bad: #b3402f; --warm: #a34c25 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #1b1a18; --card: #252422; --tint: #2a2724; --ink: #efece6; --faint: #a09b92; --line: #3a3834;
    --good: #7cc79a; --bad: #ef8d7c; --warm: #e8a27a }
}
* { box-sizing: border-box; margin: 0 }
[hidden] { display: none !important }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1.25rem 5rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: anywhere }
h1, h2, .big { font-family: ui-serif, Georgia, serif; font-weight: 500; line-height: 1.3 }
h1 { font-size: 1.45rem }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem }
h2:focus { outline: none }
h3 { font-size: .8rem; color: var(--faint); margin: 1.25rem 0 .35rem }
p, pre { margin: .5rem 0 }
code, pre { font: .86em/1.6 ui-monospace, Menlo, Consolas, monospace }
label, dt, th, summary, .faint, .meta { color: var(--faint); font-size: .875rem }
.notice code { display: block; margin-bottom: .75rem }
.good { color: var(--good) }
.bad { color: var(--bad) }
.row { display: flex; flex-wrap: wrap; gap: .5rem .75rem; align-items: center }
.row > .begin, .row > .grow { flex: 1 1 12rem; min-width: 0 }
.begin { white-space: nowrap; overflow: hidden; text-overflow: ellipsis }
.spread { display: flex; justify-content: space-between }
header p { margin: 0; font-size: .875rem }
#version { margin-right: auto }
#state::before { content: "● " }
nav { display: flex; gap: clamp(.8rem, 3vw, 1.5rem); margin: 1rem 0 1.5rem; border-bottom: 1px solid var(--line) }
nav a { padding: .5rem 0; margin-bottom: -1px; color: var(--faint); text-decoration: none; border-bottom: 2px solid transparent }
nav a[aria-current] { color: var(--ink); border-color: var(--warm) }
:focus-visible { outline: 2px solid var(--warm); outline-offset: 2px; border-radius: .3rem }
button, input, select, textarea { font: inherit; font-size: .9375rem; color: var(--ink); min-height: 2.25rem; max-width: 100%;
  border: 1px solid var(--line); border-radius: .5rem; background: var(--card); padding: .35rem .7rem }
button { cursor: pointer; background: none }
button:hover, [aria-pressed=true] { background: var(--tint) }
button.first { background: var(--warm); border-color: var(--warm); color: var(--paper); font-weight: 600 }
#leave { border: 0; padding: 0; min-height: 0; text-decoration: underline }
label > * { display: block; width: 100%; margin-top: .2rem }
label > [type=checkbox] { display: inline; width: 1.1rem; min-height: 1.1rem; accent-color: var(--warm); vertical-align: -.25rem }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, var(--least, 13rem)), 1fr)); gap: .75rem 1.25rem }
dl.grid { --least: 6rem; min-height: 4rem }
dl.grid div { display: flex; flex-direction: column-reverse }
form .grid { margin: .75rem 0 }
.big { font-size: 2rem; font-variant-numeric: tabular-nums lining-nums }
#facts { display: grid; grid-template-columns: auto 1fr; gap: .35rem 1.25rem; align-items: baseline }
#facts div { display: contents }
.list { list-style: none; padding: 0 }
.list > li { border-top: 1px solid var(--line); padding: .7rem 0 }
.list:not(:empty) + .none { display: none }
.list > .running, .notice { border: solid var(--warm); border-width: 0 0 0 3px; background: var(--tint); padding: .9rem 1.1rem }
.text { white-space: pre-wrap; max-height: 26rem; overflow: auto }
details > .text, .box { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .7rem .9rem }
summary { cursor: pointer; padding: .35rem 0 }
summary.row { gap: 0 .75rem; font-size: 1rem; color: var(--ink) }
#recent li { padding: .35rem 0 }
#windows li { border: 0 }
progress { display: block; appearance: none; width: 100%; height: .45rem; margin: .35rem 0; border: 0; background: var(--line) }
progress::-webkit-progress-bar { background: var(--line) }
progress::-webkit-progress-value { background: var(--warm) }
progress::-moz-progress-bar { background: var(--warm) }
svg { display: block; width: 100%; height: 11rem; margin: 1.5rem 0 .25rem; border-bottom: 1px solid var(--line); fill: var(--warm) }
svg .day { fill: transparent }
svg g:hover .day { fill: var(--tint) }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .35rem 0 .35rem .75rem; border-bottom: 1px solid var(--line) }
th { font-weight: 500 }
th:first-child, #endpoints td { text-align: left }
th:first-child { padding-left: 0 }
#said { position: fixed; bottom: 1rem; left: 50%; transform: translateX(-50%); width: max-content; max-width: calc(100% - 2rem);
  background: var(--ink); color: var(--paper); padding: .5rem 1rem; border-radius: .5rem }
#said:empty { display: none }
.hush { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
</style>
<header>
<div class="row"><h1>claude-api-bridge</h1><p id="version" class="faint"></p>
<p id="state" role="status">Loading&hellip;</p><p id="heard" class="faint"></p>
<p data-for="token admin"><span id="me" class="faint"></span> <button id="leave">Sign out</button></p></div>
<nav aria-label="Parts"><a href="#/requests">Requests</a><a href="#/playground" data-for="token admin">Playground</a>
<a href="#/usage" data-for="token admin">Usage</a><a href="#/tokens" data-for="admin">Tokens</a><a href="#/api">API</a></nav>
</header>
<noscript>This page needs JavaScript.</noscript>
<main>
<section data-view="#/requests"><h2 class="hush" tabindex="-1">Requests</h2><dl class="grid" id="counters"></dl>
<form id="enter" data-for="nobody"><h2>Sign in</h2><label for="secret">Token</label>
<div class="row"><input id="secret" class="grow" type="password" autocomplete="off" required
 aria-describedby="refused hint"><button class="first">Sign in</button></div><p id="refused" class="bad" role="alert"></p>
<p id="hint" class="faint"><code>start</code> printed the admin token, once. Another one: <code>claude_api_bridge.py token create
NAME</code>, with <code>--admin</code> to manage the bridge. This tab forgets it when you close it.</p></form>
<div data-for="token admin"><p id="rest" class="notice" role="status" hidden></p>
<section><h2>Running now</h2><ul class="list" id="running"></ul><p class="none faint">Nothing runs.</p></section>
<section><h2>Waiting</h2><ol class="list" id="waiting"></ol><p class="none faint">The queue is empty.</p></section>
<section id="plan" hidden><h2>Plan</h2><ul class="list grid" id="windows"></ul></section>
<section data-for="admin"><h2>Bridge</h2><dl id="facts"></dl></section>
<section><h2>Recent</h2><div class="row"><div class="row" id="filters" role="group" aria-label="Show"></div>
<input id="search" class="grow" type="search" placeholder="Search what is loaded" aria-label="Search what is loaded"></div>
<p id="found" class="faint" role="status"></p><ul class="list" id="recent"></ul><p class="none faint">Nothing here yet.</p>
<p><button id="more" hidden>More</button></p></section>
<section id="memory" hidden><h2>Conversations</h2><ul class="list" id="conversations"></ul></section></div></section>
<section data-view="#/playground" hidden><h2 tabindex="-1">Playground</h2>
<form id="ask"><label>Message<textarea name="message" rows="5" required></textarea></label>
<div class="grid"><label>Model<input name="model" list="models" placeholder="the default"></label>
<datalist id="models"><option>haiku<option>sonnet<option>opus</datalist><label>Effort<select name="effort"><option value="">the default
<option>low<option>medium<option>high<option>xhigh<option>max</select></label></div>
<label>System prompt<textarea name="systemPrompt" rows="2"></textarea></label>
<p class="row"><button class="first" id="send">Ask</button><button type="button" id="stop" hidden>Stop</button>
<span id="asked" class="faint" role="status"></span></p></form>
<div id="reply" hidden><p id="answer" class="text box" tabindex="0" role="region" aria-label="Answer"></p>
<p class="row"><button id="copy-answer">Copy answer</button><span id="cost" class="faint"></span></p></div>
<h2>The same as code</h2><div class="row"><div class="row" id="languages" role="group" aria-label="Language"></div>
<button id="copy-code">Copy code</button></div><pre id="code" class="text box" tabindex="0" role="region" aria-label="Code"></pre></section>
<section data-view="#/usage" hidden><h2 tabindex="-1">Usage of 30 days</h2><dl class="grid" id="totals"></dl>
<svg id="chart" role="img" viewBox="0 0 30 100" preserveAspectRatio="none" aria-label="Tokens a day; for figures see Day by day"></svg>
<p class="faint spread"><span id="since"></span><span id="most"></span><span>today</span></p>
<p class="faint">Days are in UTC. Costs are estimates by Claude Code at API prices, not what your plan charges.</p>
<details><summary>Day by day</summary><table><thead><tr><th>Day<th>Requests<th>Tokens<th>Cost<tbody id="days"></table></details>
<section data-for="admin"><h2>By token</h2><table><thead><tr><th>Token<th>Requests<th>Tokens<th>Cost<tbody id="shares"></table></section>
</section>
<section data-view="#/tokens" hidden><h2 tabindex="-1">New token</h2>
<form id="create"><div class="grid"><label>Name<input name="name" required></label>
<label>Memory<select name="sessionMode"><option>stateless<option>stateful</select></label>
<label>Tools<select name="tools"><option>none<option>read<option>web<option>all</select></label>
<label>Expires in days<select name="expiresInDays"><option>never<option>1<option>7<option>30<option>90</select></label>
<label>Requests a minute<input name="requestsPerMinute" type="number" min="1" placeholder="no limit"></label>
<label>Requests a day<input name="requestsPerDay" type="number" min="1" placeholder="no limit"></label>
<label>Models<input name="models" placeholder="all, or haiku, sonnet"></label></div>
<p class="row"><button class="first">Create token</button><label><input type="checkbox" name="admin"> Admin: may do all</label></p></form>
<div id="made" class="notice" role="status" hidden></div>
<h2>Tokens</h2><ul class="list" id="holders"></ul></section>
<section data-view="#/api" hidden><h2 tabindex="-1">API</h2>
<p>Send the token as <code>Authorization: Bearer cab-...</code> or <code>x-api-key: cab-...</code>; bodies are JSON.</p>
<table><tbody id="endpoints"></table></section>
</main>
<p id="said" role="status"></p>
<script nonce="NONCE">
"use strict";
const NEWLINE = String.fromCharCode(10), FINISHED = ["completed", "error"];
const $ = (id) => document.getElementById(id);
const pause = () => new Promise((done) => setTimeout(done, 2000));

// --- Elements: what comes from outside gets in as text, never as markup ---

// make("p.faint", { title: "..." }, "text", element): what is empty is left out.
function make(what, ...parts) {
  const [tag, kind] = what.split(".");
  return fill(document.createElement(tag), kind && { class: kind }, ...parts);
}
function fill(element, ...parts) {
  for (const part of parts.flat()) {
    if (part?.constructor === Object) for (const [name, value] of Object.entries(part)) element.setAttribute(name, value);
    else if (part || part === 0) element.append(part);
  }
  return element;
}
function button(label, action, name = label) {
  const element = make("button", { type: "button", "aria-label": name }, label);
  element.addEventListener("click", tried(action));
  return element;
}
const box = (name, text) => make("p.text", { tabindex: 0, role: "region", "aria-label": name }, text);
const meta = (...parts) => make("span.meta", ...parts);
const row = (...parts) => make("div.row", ...parts);
const show = (id, text) => { if ($(id).textContent !== String(text)) $(id).textContent = text };
const reveal = (id, isShown) => { $(id).hidden = !isShown };

// One child for each item; those that are there stay, with their focus and what was opened in them.
function list(id, items, build, key = JSON.stringify) {
  const parent = $(id), keys = items.map(key), old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  for (const [name, child] of old) if (!keys.includes(name)) child.remove();
  items.forEach((item, n) => {
    const child = old.get(keys[n]) || build(item);
    child.dataset.key = keys[n];
    if (parent.children[n] !== child) parent.insertBefore(child, parent.children[n] || null);
    child.refresh?.(item);
  });
}
const byId = (job) => job.requestId;

let silence;
function say(text) {
  show("said", text);
  clearTimeout(silence);
  silence = setTimeout(show, 6000, "said", "");
}
const tried = (action) => async (event) => {
  event.preventDefault();
  try { await action(event) } catch (error) { say(error.message) }
};

async function copy(text) {
  if (!navigator.clipboard) throw new Error("Browsers copy on HTTPS pages only: select the text instead.");
  await navigator.clipboard.writeText(text);
  say("Copied.");
}

// A button that asks before it acts.
function guarded(label, question, action, name) {
  const place = row(), rest = () => place.replaceChildren(button(label, ask, name));
  const keep = () => { rest(); place.firstChild.focus() };
  const ask = () => {
    place.replaceChildren(question, button("Yes, " + label.toLowerCase(), action), button("Keep", keep));
    place.lastChild.focus();
  };
  rest();
  return place;
}

// --- Figures and times ---

const count = (number) => Number(number || 0).toLocaleString();
const brief = (number) => number.toLocaleString([], { notation: "compact", maximumFractionDigits: number < 100 ? 2 : 1 });
const dollars = (number) => "$" + number.toFixed(number && number < 0.1 ? 4 : 2);
const total = (use) => use.inputTokens + use.outputTokens + use.cacheReadTokens + use.cacheCreationTokens;
const joined = (...parts) => parts.flat().filter(Boolean).join(" · ");
const start = (text, most = 300) => text.length > most ? text.slice(0, most) + "…" : text;

function span(milliseconds) {
  const seconds = Math.max(0, Math.round(milliseconds / 1000)), minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60);
  return hours ? hours + " h " + minutes % 60 + " min" : minutes ? minutes + " min " + seconds % 60 + " s" : seconds + " s";
}
const between = (from, to) => from && to && span(Date.parse(to) - Date.parse(from));
const age = (iso) => span(Date.now() - Date.parse(iso));
const since = (iso) => make("span", { "data-since": iso }, age(iso));

function moment(iso) {
  const at = new Date(iso), day = at.toDateString() === new Date().toDateString() ? {} : { day: "numeric", month: "short" };
  return make("time", { datetime: iso, title: at.toLocaleString() }, at.toLocaleString([], { ...day, hour: "2-digit", minute: "2-digit" }));
}

// --- The bridge ---

let token = "", isIn = false, isAdmin = false;

async function send(method, path, body, { headers, signal, isPublic } = {}) {
  const answer = await fetch(path, { method, signal, cache: "no-store", body: body && JSON.stringify(body), headers: {
    ...headers, ...token && !isPublic && { Authorization: "Bearer " + token } } });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({}));
  if (answer.status === 401 && isIn) signOut("You were signed out. " + told.error);
  throw Object.assign(new Error(told.error || "The bridge answered with status " + answer.status),
    { status: answer.status, retryAfter: told.retryAfter });
}
const call = async (...words) => (await send(...words)).json();
const get = (path) => call("GET", path);

// The events of a stream. The first comes at once, a sign of life every 15 seconds; else it is left.
async function* events(path, body, headers, signal) {
  const mine = new AbortController(), leave = () => mine.abort();
  signal.addEventListener("abort", leave);
  let timer = setTimeout(leave, 8000), buffer = "";
  try {
    const answer = await send("POST", path, body, { headers, signal: mine.signal });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let read = await reader.read(); !read.done; read = await reader.read()) {
      clearTimeout(timer);
      timer = setTimeout(leave, 25000);
      const parts = (buffer + read.value).split(NEWLINE + NEWLINE);
      buffer = parts.pop();
      for (const part of parts) {
        const { event, id, data } = Object.fromEntries(part.split(NEWLINE).map((line) => line.split(/: (.*)/s, 2)));
        if (event) yield { kind: event, end: Number(id), data: JSON.parse(data) };
      }
    }
  } finally {
    clearTimeout(timer);
    leave();
  }
}

// Follows a request, or asks one (id null), to its end -> its last body. on.begin: the text begins, or begins anew; on.add: it goes on.
// Cut off, it goes on where it stopped; where no stream comes through, it polls.
async function follow(id, body, on, signal) {
  const headers = body && { "Idempotency-Key": "page-" + Date.now() + Math.random() };
  for (let end = 0, hasStreams = true; ; await pause()) {
    let hasCome = false;
    try {
      const path = id ? "/api/ask/" + id + "/events?after=" + end : "/api/ask";
      for await (const event of hasStreams ? events(path, id ? null : { ...body, stream: true }, headers, signal) : []) {
        hasCome = true;
        end = event.end;
        if (FINISHED.includes(event.kind)) return event.data;
        if (event.kind === "delta") on.add(event.data.text);
        else on.begin(event.kind, event.data, id = event.data.requestId);
      }
    } catch (error) {
      if (signal.aborted || error.status) throw error;
    }
    hasStreams = hasStreams && hasCome;
    try {
      id = id || (await call("POST", "/api/ask", body, { headers, signal })).requestId;
      const job = await call("GET", "/api/ask/" + id, null, { signal }), text = job.partial || "";
      if (FINISHED.includes(job.status)) return job;
      on.begin(job.status, { ...job, position: job.queuePosition });
      on.add(text);
      end = [...text].length;
    } catch (error) {
      if (signal.aborted || error.status && !error.retryAfter) throw error;
    }
  }
}

// --- Who sees what ---

async function signIn(given) {
  show("refused", "");
  token = given;
  try {
    await get("/api/requests?limit=1");
    isAdmin = "worker" in await get("/api/status");
    isIn = true;
    sessionStorage.setItem("token", token);
    $("enter").reset();
    show("me", token.slice(0, 12) + "…" + (isAdmin ? " (admin)" : ""));
    route();
    hurry();
  } catch (error) {
    token = "";
    show("refused", error.message);
  }
}

function signOut(why) {
  sessionStorage.removeItem("token");
  sessionStorage.setItem("why", why);
  location.reload();                                       // nothing of what was shown is left
}

function route() {
  const who = !isIn ? "nobody" : isAdmin ? "admin" : "token";
  for (const element of document.querySelectorAll("[data-for]")) element.hidden = !element.dataset.for.includes(who);
  const links = [...document.querySelectorAll("nav a:not([hidden])")];
  const chosen = links.find((link) => link.hash === location.hash) || links[0];
  for (const link of links) link.toggleAttribute("aria-current", link === chosen);
  for (const view of document.querySelectorAll("[data-view]")) view.hidden = view.dataset.view !== chosen.hash;
  if (chosen.hash === "#/api") showEndpoints().catch((error) => say(error.message));
}

// --- The round: the public counters, and the lists when these have changed, since requests with a token are limited ---

const seen = { at: 0, allAt: 0, figures: "", tokens: 0 };
let rounds = 0, heardAt = 0, nextRound, lists = Promise.resolve();

async function round() {
  clearTimeout(nextRound);
  if (document.hidden) return;
  const mine = ++rounds;
  let seconds = 5;
  try {
    if (await refresh()) seconds = 2;
    heardAt = Date.now();
  } catch (error) {
    seconds = error.retryAfter || 5;
    const last = heardAt ? new Date(heardAt).toLocaleTimeString() : "never";
    show("state", error.retryAfter ? "paused for " + seconds + " s: rate limit" : "not reachable, last heard: " + last);
    $("state").className = "bad";
  }
  if (mine === rounds) nextRound = setTimeout(round, 1000 * seconds);
}
function hurry() {
  seen.at = seen.allAt = 0;
  round();
}

async function refresh() {
  const { queue, stats, version } = await call("GET", "/api/status", null, { isPublic: true });
  const figures = { Queued: stats.queuedRequests, Processing: queue.length - stats.queuedRequests, Completed: stats.completedRequests,
    Failed: stats.errorRequests, Requests: stats.totalRequests, Tokens: stats.totalTokens };
  showFigures("counters", figures, count);
  show("version", "v" + version);
  show("state", queue.isProcessing ? "working" : "ready");
  $("state").className = "good";
  const told = JSON.stringify(figures), passed = Date.now() - seen.at;
  if (isIn && (passed > 30000 || passed > 3000 && told !== seen.figures)) {
    const isAll = Date.now() - seen.allAt > 15000 || seen.tokens !== figures.Tokens;
    Object.assign(seen, { at: Date.now(), tokens: figures.Tokens }, isAll && { allAt: Date.now() });
    const look = () => Promise.all([showRequests(isAll && isAdmin), isAll && showRest()]);
    await (lists = lists.then(look, look));                // one after the other: an older answer never overwrites a newer one
    seen.figures = told;
  }
  return queue.length || isIn && told !== seen.figures;
}

function showFigures(id, figures, words) {
  list(id, Object.entries(figures), ([name, figure]) => make("div", make("dt", name),
    make("dd.big", { title: figure }, id === "counters" && { id: name.toLowerCase() }, words(figure))));
}

async function showRequests(hasTokens) {
  const { filter } = recent, [held, active, newest] = await Promise.all([hasTokens && get("/api/tokens"),
    get("/api/requests?limit=100&status=queued,processing"), get("/api/requests?limit=20&status=" + filter)]);
  if (held) showTokens(held.tokens);                       // first, for their names
  showActive(active.requests);
  if (filter === recent.filter) mergeRecent(newest);       // else the next look brings those that are wanted now
}

async function showRest() {
  const [usage, { conversations }, status] = await Promise.all([get("/api/usage"), get("/api/conversations"),
    isAdmin && get("/api/status")]);
  if (status) showBridge(status);
  showUsage(usage);
  showPlan(usage.plan);
  reveal("memory", conversations.length);
  list("conversations", conversations, conversationRow);
}

// --- Requests ---

const names = new Map();                                   // of the tokens, for an admin
const recent = { filter: "completed,error", rows: [], next: null };
const nameOf = (job) => start(names.get(job.tokenId) || "", 32);
const beginning = (job) => make("span.begin", start(job.message));
const cancelButton = (job) => button("Cancel", async () => {
  await call("DELETE", "/api/ask/" + job.requestId);
  hurry();
}, "Cancel: " + start(job.message, 60));

function showActive(jobs) {
  const running = jobs.filter((job) => job.status === "processing");
  const waiting = jobs.filter((job) => job.status === "queued").sort((one, other) => one.queuePosition - other.queuePosition);
  list("running", running, runningRow, byId);
  list("waiting", waiting, waitingRow, byId);
  watch(running[0]);
}

function runningRow(job) {
  const model = make("span"), text = box("Answer so far", document.createTextNode(""));
  const told = (name) => { model.textContent = joined(" ", name, nameOf(job)) };
  const element = make("li.running", row(beginning(job), cancelButton(job)), meta(since(job.startedAt), model), text);
  told(job.model);
  return Object.assign(element, { add: (piece) => addText(text, piece), begin(kind, data) {
    text.firstChild.data = "";
    told(data.model || job.model);
  } });
}

function addText(text, piece) {
  const isAtEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 40;
  text.firstChild.appendData(piece);
  if (isAtEnd) text.scrollTop = text.scrollHeight;
}

let watched = null;                                        // { id, aborter }: the request whose text is followed
async function watch(job) {
  if (watched?.id === job?.requestId) return;
  watched?.aborter.abort();
  const mine = watched = job && { id: job.requestId, aborter: new AbortController() };
  if (!job) return;
  await follow(job.requestId, null, $("running").firstChild, mine.aborter.signal).catch(() => null);
  if (watched !== mine) return;
  if (Date.now() - Date.parse(job.startedAt) > 3000) seen.at = 0;
  round();
}

function waitingRow(job) {
  const place = meta(), why = meta();
  const line = row(place, beginning(job), meta(joined(nameOf(job), "waits "), since(job.createdAt)), cancelButton(job));
  return Object.assign(make("li", line, why), { refresh({ queuePosition, waitingFor, resumesAt }) {
    place.textContent = queuePosition;
    why.replaceChildren(...waitingFor ? ["Waits for " + words(waitingFor) + " until ", moment(resumesAt)] : []);
  } });
}

// The newest page goes before what was loaded of older ones; where there is a gap between them, these go.
function mergeRecent({ requests, next }) {
  const fresh = new Set(requests.map(byId)), last = recent.rows.findLastIndex((job) => fresh.has(job.requestId));
  if (last < 0) Object.assign(recent, { rows: requests, next });
  else recent.rows = requests.concat(recent.rows.slice(last + 1));
  showRecent();
}

function showRecent() {
  const wanted = $("search").value.toLowerCase();
  const rows = recent.rows.filter((job) => [job.message, job.response, job.error, job.errorCode, job.model, nameOf(job)].join(NEWLINE)
    .toLowerCase().includes(wanted));
  list("recent", rows, recentRow, byId);
  show("found", wanted && rows.length + " of " + recent.rows.length + " loaded");
  reveal("more", recent.next);
}

function recentRow(job) {
  const [kind, mark, word] = job.errorCode ? ["bad", "✕", " failed"] : ["good", "✓", " completed"];
  const told = joined(job.errorCode, nameOf(job), job.api && "/v1", job.model, between(job.startedAt, job.completedAt), " ");
  const details = make("details", make("summary.row", make("span." + kind, mark, make("span.hush", word)), beginning(job),
    meta(told, moment(job.createdAt))));
  details.addEventListener("toggle", () => details.append(...jobParts(job)), { once: true });
  return make("li", details);
}

const useWords = (use) => use && [count(use.inputTokens) + " in", count(use.outputTokens) + " out",
  count(use.cacheReadTokens) + " from cache", count(use.cacheCreationTokens) + " to cache", "about " + dollars(use.costUsd)];

function jobParts(job) {
  const answer = job.structured === undefined ? job.response : JSON.stringify(job.structured, null, 2);
  const parts = { Prompt: job.message, "System prompt": job.systemPrompt, Schema: job.jsonSchema && JSON.stringify(job.jsonSchema),
    Answer: answer, ["Error: " + job.errorCode]: job.error };
  const { createdAt, startedAt, completedAt } = job;
  const figures = joined(startedAt && ["waited " + between(createdAt, startedAt), "ran " + between(startedAt, completedAt)],
    job.attempts > 1 && job.attempts + " attempts", useWords(job.usage), job.effort && "effort " + job.effort,
    job.conversation && "conversation " + job.conversation);
  return [...Object.entries(parts).flatMap(([name, text]) => text ? [make("h3", name), box(name, text)] : []), make("p", meta(figures)),
    row(answer && button("Copy answer", () => copy(answer)), !job.api && button("Ask again", () => askAgain(job)))];
}

async function askAgain({ message, model, systemPrompt, effort, jsonSchema, conversation }) {
  await call("POST", "/api/ask", { message, model, systemPrompt, effort, jsonSchema, conversation });
  say("Asked again.");
  hurry();
}

async function showMore() {
  const { filter } = recent, { requests, next } = await get("/api/requests?limit=20&status=" + filter + "&before=" + recent.next);
  if (filter === recent.filter) Object.assign(recent, { rows: recent.rows.concat(requests), next });
  showRecent();
}

function conversationRow({ name, turns, lastUsedAt }) {
  const forget = guarded("Delete", "Forget it?", async () => {
    await call("DELETE", "/api/conversations/" + encodeURIComponent(name));
    hurry();
  }, "Delete " + name);
  return make("li.row", make("span.begin", name), meta(turns + " turns · ", moment(lastUsedAt)), forget);
}

// --- The bridge, the plan, usage ---

const words = (code) => ({ five_hour: "5 hours", seven_day: "7 days", usage_limit: "the plan's limit" })[code]
  || code.replace("seven_day", "7 days,").replaceAll("_", " ");

function showBridge({ tunnel, claude, worker }) {
  const { state, url, error, retryInSeconds } = tunnel;
  const facts = { "Public address": url || state !== "stopped" && "none yet",
    Tunnel: joined(state, error, retryInSeconds && "tries again in " + retryInSeconds + " s"),
    Claude: joined(claude.version, claude.payer), Worker: worker.alive ? "" : "has ended: restart the bridge" };
  list("facts", Object.entries(facts).filter(([, text]) => text), ([name, text]) => make("div", make("dt", name),
    make("dd.row", text, text === url && button("Copy", () => copy(url), "Copy the public address"))));
}

function showPlan({ windows, waitingFor, resumesAt, isUsingOverage }) {
  $("rest").replaceChildren(...waitingFor ? ["Resting until ", moment(resumesAt), ", waiting for " + words(waitingFor) + "."]
    : ["Requests draw on paid extra usage now."]);
  reveal("rest", waitingFor || isUsingOverage);
  reveal("plan", windows.length);
  list("windows", windows, windowRow);
}

function windowRow({ type, status, utilization, resetsAt }) {
  const told = utilization === null ? words(status || "not known") : Math.round(100 * utilization) + " % used";
  return make("li", make("div.spread", words(type), make("span.faint", told)),
    make("progress", { value: utilization || 0, "aria-label": words(type) }), meta(resetsAt && ["resets ", moment(resetsAt)]));
}

function showUsage({ since: first, total: sum, days, tokens }) {
  showFigures("totals", { Requests: sum.requests, Failed: sum.errors, "Tokens in": sum.inputTokens, "Tokens out": sum.outputTokens,
    "From cache": sum.cacheReadTokens, "To cache": sum.cacheCreationTokens, "Dollars, about": sum.costUsd }, brief);
  const line = (name, use) => make("tr", make("th", { scope: "row" }, name),
    [count(use.requests), count(total(use)), dollars(use.costUsd)].map((text) => make("td", text)));
  list("days", days.slice().reverse(), (use) => line(use.day, use));
  list("shares", tokens, (use) => line(use.name ?? "revoked: " + use.tokenId.slice(0, 8), use));
  drawDays(Date.parse(first), days);
}

function drawDays(first, days) {
  const chart = $("chart"), most = Math.max(1, ...days.map(total));
  const shape = (tag, ...parts) => fill(document.createElementNS(chart.namespaceURI, tag), ...parts);
  chart.replaceChildren(...Array.from({ length: 30 }, (_, n) => {
    const day = new Date(first + n * 86400000).toISOString().slice(0, 10), use = days.find((each) => each.day === day);
    const height = use ? 1 + 95 * total(use) / most : 0;
    const told = joined(day, use && [count(total(use)) + " tokens", use.requests + " requests", "about " + dollars(use.costUsd)]);
    return shape("g", shape("title", told), shape("rect", { class: "day", x: n, width: 1, height: 100 }),
      shape("rect", { x: n + 0.15, y: 100 - height, width: 0.7, height }));
  }));
  show("since", new Date(first).toISOString().slice(0, 10));
  show("most", days.length ? "highest: " + count(most) + " tokens" : "nothing was used yet");
}

// --- Tokens ---

function showTokens(tokens) {
  for (const each of tokens) names.set(each.id, each.name);
  list("holders", tokens, tokenRow, (each) => each.id);
}

function tokenRow({ id, name, prefix, sessionMode, isAdmin: mayAll, tools, requestsPerMinute, requestsPerDay, models }) {
  const facts = joined(prefix + "…", mayAll && "admin", sessionMode, tools !== "none" && "tools: " + [tools].flat().join(", "),
    requestsPerMinute && requestsPerMinute + " a minute", requestsPerDay && requestsPerDay + " a day", models?.join(", "), " ");
  const used = meta();
  const revoke = guarded("Revoke", "Its requests go, too.", async () => {
    await call("DELETE", "/api/tokens/" + id);
    hurry();
  }, "Revoke " + name);
  return Object.assign(make("li", row(make("b.grow", name), revoke), meta(facts), used), { refresh({ lastUsedAt, expiresAt, isExpired }) {
    used.replaceChildren(...lastUsedAt ? ["used ", moment(lastUsedAt)] : ["never used"],
      ...expiresAt ? [isExpired ? " · expired " : " · expires ", moment(expiresAt)] : []);
  } });
}

async function createToken() {
  const given = Object.fromEntries(new FormData($("create"))), number = (name) => Number(given[name]) || null;
  const models = given.models.split(/[, ]+/).filter(Boolean);
  const made = await call("POST", "/api/tokens", { ...given, admin: "admin" in given, expiresInDays: number("expiresInDays"),
    requestsPerMinute: number("requestsPerMinute"), requestsPerDay: number("requestsPerDay"), models: models.length ? models : null });
  $("create").reset();
  $("made").replaceChildren(make("p", "The token ", make("b", given.name), ", shown only now: save it."), make("code", made.token),
    row(button("Copy token", () => copy(made.token)), button("I have it", () => { $("made").replaceChildren(); reveal("made", false) })));
  reveal("made", true);
  hurry();
}

// --- Playground ---

let playing = null;                                        // { id, aborter }
const asked = () => Object.fromEntries([...new FormData($("ask"))].filter(([, value]) => value));

async function ask() {
  if ($("send").hidden) return;
  const mine = playing = { id: null, aborter: new AbortController() }, answer = $("answer"), began = Date.now();
  const isBusy = (busy) => { reveal("stop", busy); reveal("send", !busy) };
  const begin = (kind, data) => {
    mine.id = data.requestId;
    answer.replaceChildren(document.createTextNode(""));
    show("asked", kind === "queued" ? joined("waits, position " + data.position, data.waitingFor && words(data.waitingFor)) : "answers");
  };
  isBusy(true);
  reveal("reply", true);
  show("cost", "");
  show("asked", "sent");
  try {
    const job = await follow(null, asked(), { begin, add: (piece) => addText(answer, piece) }, mine.aborter.signal);
    show("answer", job.error || job.response);
    show("asked", job.error ? "failed: " + (job.errorCode || job.code) : "done after " + span(Date.now() - began));
    show("cost", joined(job.model, useWords(job.usage)));
  } catch (error) {
    show("asked", mine.aborter.signal.aborted ? "stopped" : error.message);
  }
  isBusy(false);
  hurry();
}

async function stop() {
  if (playing.id) await call("DELETE", "/api/ask/" + playing.id);
  else playing.aborter.abort();
}

const LANGUAGES = {
  curl: (url, body) => `curl -s -X POST ${url} -H "Authorization: Bearer cab-..." -d '${
    JSON.stringify(body).replaceAll("'", `'"'"'`)}'`,
  Python: (url, body) => `import json, urllib.request

body = ${JSON.stringify(body, null, 4)}
request = urllib.request.Request("${url}", json.dumps(body).encode(), {"Authorization": "Bearer cab-..."})
with urllib.request.urlopen(request) as answer:
    print(json.load(answer)["response"])`,
  JavaScript: (url, body) => `const body = ${JSON.stringify(body, null, 2)};
const answer = await fetch("${url}", {
  method: "POST", headers: { Authorization: "Bearer cab-..." }, body: JSON.stringify(body) });
console.log((await answer.json()).response);`,
};
let language = "curl";
function showCode() {
  show("code", LANGUAGES[language](location.origin + "/api/ask", { message: "Why is the sky blue?", ...asked(), wait: 60 }));
}

async function showEndpoints() {
  const { endpoints } = await call("GET", "/", null, { isPublic: true });
  list("endpoints", Object.entries(endpoints), ([name, doc]) => make("tr", make("th", { scope: "row" }, make("code", name)),
    make("td", doc.replaceAll("`", ""))));
}

// --- What the reader does ---

function choices(id, values, choose) {
  const press = (value) => { for (const each of $(id).children) each.setAttribute("aria-pressed", each.dataset.value === value) };
  for (const [value, label] of Object.entries(values)) {
    const each = button(label, () => { press(value); choose(value) });
    each.dataset.value = value;
    $(id).append(each);
  }
  press($(id).firstChild.dataset.value);
}
choices("filters", { "completed,error": "All", completed: "Completed", error: "Failed" }, (filter) => {
  Object.assign(recent, { filter, rows: [], next: null });
  hurry();
});
choices("languages", { curl: "curl", Python: "Python", JavaScript: "JavaScript" }, (value) => {
  language = value;
  showCode();
});

const on = (id, event, action) => $(id).addEventListener(event, action);
on("enter", "submit", tried(() => signIn($("secret").value.trim())));
on("leave", "click", () => signOut("Signed out."));
on("search", "input", showRecent);
on("more", "click", tried(showMore));
on("create", "submit", tried(createToken));
on("ask", "submit", tried(ask));
on("ask", "input", showCode);
on("ask", "keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
on("stop", "click", tried(stop));
for (const id of ["answer", "code"]) on("copy-" + id, "click", tried(() => copy($(id).textContent)));
addEventListener("hashchange", () => {
  route();
  document.querySelector("[data-view]:not([hidden]) h2").focus();
});
document.addEventListener("visibilitychange", () => { if (document.hidden) watch(null); else hurry() });
setInterval(() => {
  for (const each of document.querySelectorAll("[data-since]")) each.textContent = age(each.dataset.since);
  show("heard", heardAt ? "heard " + span(Date.now() - heardAt) + " ago" : "");
}, 1000);

route();
showCode();
show("refused", sessionStorage.getItem("why") || "");
sessionStorage.removeItem("why");
round();
if (sessionStorage.getItem("token")) signIn(sessionStorage.getItem("token"));
</script>
</html>
"""


def dashboard_page(nonce: str) -> bytes:
    return DASHBOARD.replace("NONCE", nonce).encode()


def content_security_policy(nonce: str) -> str:
    return ("default-src 'none';script-src 'nonce-%s';style-src 'nonce-%s';connect-src 'self';base-uri 'none';form-action 'none';"
            "frame-ancestors 'none'" % (nonce, nonce))


# === 12 Bridge ================================================================================================
# Constructs, starts and closes all parts. It knows the order, nothing else.


def data_tag(data_dir: Path) -> str:
    """By which the processes of a data directory's bridge are known."""
    return digest(str(data_dir.resolve()))[:16]


class DirectoryLock:
    """One bridge per data directory. Holds an exclusive lock on bridge.lock; the system frees it when we die."""

    def __init__(self, path: Path) -> None:
        """Raises CannotStart, naming the holder, when another bridge has it."""
        try:
            self._file = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise CannotStart("The folder %s cannot be used: %s." % (path.parent, error.strerror),
                              "make it writable, or choose another one with --data-dir") from None
        try:
            if os.name == "nt":
                import msvcrt
                os.lseek(self._file, 4_096, os.SEEK_SET)      # beyond the text, which others must be able to read
                msvcrt.locking(self._file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            else:
                import fcntl
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.lseek(self._file, 0, os.SEEK_SET)
            holder = os.read(self._file, 200).decode("utf-8", "replace").strip()
            os.close(self._file)
            raise CannotStart("Another bridge is running with this data directory%s." % (": " + holder if holder else ""),
                              "stop it first, or choose another folder with --data-dir") from None

    def write(self, text: str) -> None:
        """Who holds the lock, for whoever is turned away."""
        os.lseek(self._file, 0, os.SEEK_SET)
        os.ftruncate(self._file, 0)
        os.write(self._file, text.encode())

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class Bridge:
    """The whole, as a context manager: everything is started on entry, and gone on exit. Raises CannotStart."""

    def __init__(self, config: Config, claude: ClaudeInstall, clock: Clock, report: Callable[[str], None], tunnel_token: str = "",
                 announce: Callable[[str, Optional[str]], None] = lambda url, before: None,
                 progress: Callable[[str, bool], None] = lambda text, passes: None) -> None:
        """announce: is told the public address, and the one before; progress: see CloudflaredInstall."""
        self.config, self._claude, self._clock, self._report = config, claude, clock, report
        self._tunnel_token, self._announce, self._progress = tunnel_token, announce, progress
        self.tunnel: Optional[Tunnel] = None
        self.new_admin_token: Optional[str] = None       # made when there was none; to be shown once, or withdrawn
        self.discard_admin_token: Callable[[], None] = lambda: None
        self._parts = contextlib.ExitStack()

    def __enter__(self) -> "Bridge":
        with self._parts:
            self._open()
            self._parts = self._parts.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._parts.close()

    def _open(self) -> None:
        """Lock, port, store, leftovers, recovery, worker; closed in this order: accept no more, worker, waiters, server,
        tunnel (which begins to leave at once), store."""
        data_dir = data_directory(self.config.data_dir)
        lock = DirectoryLock(data_dir / "bridge.lock")
        self._parts.callback(lock.close)
        self._server = self._listen()
        self._parts.callback(self._server.server_close)
        metrics = Metrics()
        path = data_dir / "bridge.db"
        try:
            store = Database(path, self._clock, metrics)
        except DatabaseCorrupt as damage:
            kept = quarantine_database(path, self._clock.now())
            self._report("%s It is kept as %s, and a new one begins: tokens must be made again." % (damage, kept))
            store = Database(path, self._clock, metrics)
        self._parts.callback(store.close)
        tag = data_tag(data_dir)
        tunnel = self.tunnel = None if self.config.no_tunnel else self._make_tunnel(store, tag)
        if tunnel:
            self._parts.callback(tunnel.close)
        self._parts.callback(self._server.close)
        hub = Notifier()
        claude = ClaudePool(self._claude, self.config, self._clock, tag + ".claude", store.record_process, metrics,
                           lambda: find_claude(self.config, os.environ))
        worker = Worker(store, claude, hub, self._clock, self._report, self.config, metrics)
        service = Service(store, hub, self._clock, data_dir, worker.live, worker.rest, lambda: ask_models(claude.claude, data_dir))
        began = self._clock.now()
        status_source = BridgeStatus(self._page, lambda: self._details(worker, store), lambda: self._check(worker),
                              lambda: metrics_text({**metrics.values(), **self._gauges(worker, store, began)}))
        own = (host_of(self.config.public_url), self.config.host, *re.split("[, ]+", self.config.names))
        names = HostPolicy(own, (lambda: tunnel.hosts) if tunnel else frozenset)
        self._server.dispatcher = Dispatcher(service, status_source, RateLimiters(self._clock, self.config.rate_limit), self._report, names, metrics)
        left = kill_orphans(tag + ".", store.children())
        for pid, *_ in store.children():
            store.record_process(pid, None)
        store.fail_chats("interrupted", "The bridge ended, and with it the line on which the answer was waited for.",
                         (JobStatus.QUEUED, JobStatus.PROCESSING))
        again, lost = store.recover()
        if left or again or lost:
            self._report("After an unclean end: %d processes ended, %d requests wait again, %d given up" % (len(left), again, lost))
        lock.write("process %d, %s" % (os.getpid(), self.local_url))
        if not service.has_admin():
            token, self.new_admin_token = service.create_token(NewToken(name="admin", admin=True))
            self.discard_admin_token = lambda: service.discard_token(token)
        self._parts.callback(hub.close)
        self._parts.callback(worker.close)
        self._parts.callback(self._server.stop_accepting)
        if tunnel:
            self._parts.callback(tunnel.retire)
        worker.start()

    def serve(self) -> None:
        """Begins to answer; before this the port is bound, but nothing is read."""
        self._server.start()
        if self.tunnel:
            self.tunnel.start(self.port)

    def _make_tunnel(self, store: Database, tag: str) -> Tunnel:
        chosen = self.config.tunnel_protocol
        worked = store.get_state("tunnel_protocol")
        in_turn = ("auto",) if self._tunnel_token else sorted(("quic", "http2"), key=lambda each: each != worked)
        policy = TunnelPolicy(in_turn if chosen == "auto" else (chosen,), bool(self._tunnel_token))

        def announce(url: str) -> None:
            before = store.get_state("tunnel_url")
            store.remember("tunnel_url", url)
            self._announce(url, before if before != url else None)

        install = CloudflaredInstall(self.config, os.environ, self._clock, self._progress)
        return Tunnel(self.config, install, policy, self._tunnel_token, self._clock, tag, store.record_process, announce, self._report,
                      store.remember)

    def _listen(self) -> BridgeServer:
        host, port = self.config.listen_host, self.config.port
        try:
            return BridgeServer(host, port, self._clock, self._report)
        except (OSError, OverflowError, TypeError, ValueError) as error:
            in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            hint = "another program is using it; choose another one with --port" if in_use else "check --host and --port"
            why = getattr(error, "strerror", None) or error
            raise CannotStart("Port %d on %s cannot be used: %s." % (port, host, why), hint) from None

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def local_url(self) -> str:
        host = self.config.host if self.config.host not in ("", "0.0.0.0", "::", "127.0.0.1") else "localhost"
        return "http://%s:%d" % ("[%s]" % host if ":" in host else host, self.port)

    def _page(self) -> Response:
        nonce = secrets.token_urlsafe(16)
        return Response(200, dashboard_page(nonce), "text/html; charset=utf-8",
                        (("Content-Security-Policy", content_security_policy(nonce)), ("X-Frame-Options", "DENY")))

    def _details(self, worker: Worker, store: Database) -> Dict[str, Any]:
        running = worker.running
        return {"worker": {"alive": worker.is_alive, "requestId": running[0] if running else None,
                           "since": iso_time(running[1]) if running else None, "spareReady": worker.spares > 0},
                "plan": plan_body(store.windows(), worker.rest(), self._clock.now()),
                "tunnel": self.tunnel.details() if self.tunnel else {"state": TunnelState.STOPPED, "url": self.config.public_url or None},
                "claude": {"version": self._claude.features.version_text, "command": self._claude.command[-1], "payer": self._claude.billing_account}}

    def _gauges(self, worker: Worker, store: Database, began: float) -> Dict[Tuple[str, Labels], float]:
        """What /metrics tells of the present."""
        counts, tunnel = store.counts(), self.tunnel.details() if self.tunnel else {"state": TunnelState.STOPPED, "url": None, "starts": 0}
        found: Dict[Tuple[str, Labels], float] = {
            ("cab_info", (("version", __version__), ("claude", self._claude.features.version_text))): 1,
            ("cab_start_time_seconds", ()): began, ("cab_spares", ()): worker.spares, ("cab_resting", ()): worker.rest() is not None,
            ("cab_access_tokens", ()): counts["tokens"], ("cab_tunnel_up", ()): tunnel["url"] is not None,
            ("cab_tunnel_state", (("state", tunnel["state"]),)): 1, ("cab_tunnel_starts_total", ()): tunnel["starts"]}
        found.update({("cab_queue_length", (("status", status),)): counts.get(status, 0)
                      for status in JobStatus.ALL if status not in JobStatus.FINISHED})
        for window in store.windows():
            told = {"cab_plan_utilization": window.utilization, "cab_plan_resets_at_seconds": window.resets_at}
            is_known = window.resets_at is None or window.resets_at > self._clock.now()      # else it was reset since
            found.update({(name, (("window", window.kind),)): value for name, value in told.items() if value is not None and is_known})
        return found

    @staticmethod
    def _check(worker: Worker) -> None:
        if not worker.is_alive:
            raise Unavailable("The worker has ended. Restart the bridge.")


# === 13 Command line ==========================================================================================
# What a person types and reads. stdout carries data (tokens, addresses, answers, JSON), stderr the narration.

BUILD_TIME = 1_795_000_000              # no clock that is right shows less

BANNER = """
  ┌─────────────────────────────────────┐
  │%s│
  │   Claude Code as a REST API         │
  └─────────────────────────────────────┘
"""


class Console:
    """All printing. Marks and frames are left out where the terminal cannot show them."""

    def __init__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        self._is_rich = bool(getattr(sys.stderr, "isatty", lambda: False)()) and "utf" in (sys.stderr.encoding or "").lower()
        self._is_in_line = False                              # a line stands there that the next one may replace

    def data(self, text: str) -> bool:
        """A line on stdout, at once. -> False when it could not be written: the reader has left, or the disk is full."""
        if sys.stdout is None:                                # started without one
            return False
        try:
            print(text, flush=True)
            return True
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())    # else Python complains again at its end
            return False

    def write(self, text: str) -> None:
        """A piece of a line on stdout."""
        with contextlib.suppress(OSError):
            print(text, end="", flush=True)

    def _tell(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):        # the terminal may be gone; the bridge goes on
            print("\n" * self._is_in_line + text, file=sys.stderr, flush=True)
            self._is_in_line = False

    def say(self, mark: str, text: str) -> None:
        self._tell("  %s  %s" % (mark, text) if self._is_rich else text)

    def blank(self) -> None:
        if self._is_rich:
            self._tell("")

    def banner(self) -> None:
        title = "claude-api-bridge v%s" % __version__
        self._tell(BANNER % ("   " + title.ljust(34)) if self._is_rich else title)

    def log(self, text: str) -> None:
        """What happens while the bridge runs, with the time of day."""
        self.say("·", "%s %s" % (time.strftime("%H:%M:%S"), escape_controls(text)))

    def progress(self, text: str, passes: bool) -> None:
        """How a download goes. passes: the next line takes its place; where that cannot be shown, every tenth does."""
        if not passes:
            self.say("📥", text)
        elif self._is_rich:
            with contextlib.suppress(OSError, ValueError):
                print("\r  📥  " + text, end="", file=sys.stderr, flush=True)
                self._is_in_line = True
        elif re.search(r"\b\d*0 %", text):
            self._tell(text)

    def announce(self, url: str, before: Optional[str]) -> None:
        """A public address, on stdout, too, for whoever reads our lines."""
        self.blank()
        self.say("🌐", "Public URL: %s%s" % (url, " (it was %s before; tell your clients)" % before if before else ""))
        self.say("📖", "Dashboard: %s/dashboard (a new address may take some seconds to be known everywhere)" % url)
        self.blank()
        self.data(url)

    def fail(self, text: str, hint: str = "") -> None:
        self._tell(("  ❌  " if self._is_rich else "error: ") + text)
        if hint:
            self._tell("%shint: %s" % ("      " if self._is_rich else "", hint))


def lan_address() -> Optional[str]:
    """This machine's address in its network; found without sending anything."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe_socket:
        probe_socket.connect(("192.0.2.1", 9))              # TEST-NET-1: no packet leaves for a datagram socket's connect
        address = str(probe_socket.getsockname()[0])
        return None if address.startswith("127.") else address
    return None


def signals_queue() -> "queue.SimpleQueue[int]":
    """SIGINT, SIGTERM and SIGHUP, as they come; a second one ends the program as if we had not asked for them."""
    arrived: "queue.SimpleQueue[int]" = queue.SimpleQueue()
    wanted = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
              if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN]   # nohup stays nohup

    def note(number: int, frame: Any) -> None:
        for each in wanted:
            signal.signal(each, signal.SIG_DFL)
        arrived.put(number)

    for each in wanted:
        signal.signal(each, note)
    return arrived


def command_start(config: Config, console: Console) -> int:
    """Runs the bridge until a signal; -> 0."""
    os.umask(0o077)
    forbid_cores()
    allow_files(OPEN_FILES)
    give_back_memory()
    console.banner()
    data_directory(config.data_dir)
    claude = find_claude(config, os.environ)
    print_billing(config, claude, console)
    console.say("✅", "Data directory: %s" % config.data_dir)
    token = find_tunnel_token(config, os.environ)
    arrived = signals_queue()
    with Bridge(config, claude, Clock(), console.log, token, console.announce, console.progress) as bridge:
        if bridge.new_admin_token:
            console.blank()
            console.say("🔑", "Admin token (save this, it is shown only once):")
            console.blank()
            if not console.data(bridge.new_admin_token):
                bridge.discard_admin_token()
                raise CannotStart("The admin token could not be printed, so it was not kept.", "let start write to its standard output")
            console.blank()
        bridge.serve()
        print_urls(bridge, console)
        while True:
            with contextlib.suppress(queue.Empty):
                arrived.get(timeout=1)       # with a timeout, since Windows runs no handler during an endless wait
                break
        console.say("👋", "Shutting down...")
    return 0


def forbid_cores() -> None:
    """No core file of ours or of our children, where the system has such: memory holds tokens and prompts."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def allow_files(wanted: int) -> None:
    """Raises the number of files that may be open at once, where the system keeps it low (macOS: 256) and lets us."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def give_back_memory() -> None:
    """Keeps memory flat under load. glibc gives each of many threads a heap of its own, up to eight for each processor, and each keeps
    the most that it ever held; so does the first one with what compiling this source took. Call it before there are threads.
    Source: mallopt(3), malloc_trim(3)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):      # another C library
            library = ctypes.CDLL(None)
            library.mallopt(-8, 2)                          # M_ARENA_MAX
            library.mallopt(-3, LARGE_BYTES)                # M_MMAP_THRESHOLD, which else rises to what was freed last
            library.malloc_trim(0)


def find_tunnel_token(config: Config, environ: Mapping[str, str]) -> str:
    """The token of a named tunnel, from its file or CAB_TUNNEL_TOKEN; empty for a quick tunnel. Raises WrongSetting, CannotStart."""
    if config.no_tunnel:
        return ""
    text = environ.get("CAB_TUNNEL_TOKEN", "")
    if config.tunnel_token_file:
        try:
            text = Path(config.tunnel_token_file).expanduser().read_text("utf-8")
        except (OSError, ValueError) as error:
            raise CannotStart("The tunnel token cannot be read: %s." % error, "check --tunnel-token-file") from None
    return check_tunnel_token(text) if text.strip() or config.tunnel_token_file else ""


def print_billing(config: Config, claude: ClaudeInstall, console: Console) -> None:
    """Says which claude was found and who pays for it; a bill per token is said loudly."""
    if config.demo:
        return console.say("🎭", "Demo: every answer is an echo, Claude is not asked.")
    console.say("✅", "Claude Code CLI detected (%s)" % claude.features.version_text)
    keys = sorted(API_KEYS & set(os.environ))
    if config.allow_api_key and keys:
        console.say("⚠️", "Who pays: %s is handed on to claude (--allow-api-key): requests are BILLED PER TOKEN." % " and ".join(keys))
    elif claude.is_billed_per_token:
        console.say("⚠️", "Who pays: %s. Requests are %s." % (
            claude.billing_account, "BILLED PER TOKEN" if config.allow_api_key else "stopped, since --allow-api-key is not given"))
    else:
        console.say("✅", "Who pays: %s" % claude.billing_account)
    for name in keys if not config.allow_api_key else ():
        console.say("ℹ️", "%s is set; it is not handed on to claude." % name)
    if claude.environment.get("ANTHROPIC_BASE_URL"):
        console.say("ℹ️", "ANTHROPIC_BASE_URL is handed on to claude: %s" % claude.environment["ANTHROPIC_BASE_URL"])
    for note in claude.notes:
        console.say("ℹ️", note)


def print_urls(bridge: Bridge, console: Console) -> None:
    """Where the bridge is reached on this machine and in its network; the tunnel announces itself."""
    lan = lan_address() if bridge.config.listen_host in ("0.0.0.0", "::") else None
    if not bridge.config.no_tunnel:
        console.say("🌐", "Connecting the tunnel...")
    elif bridge.config.public_url:
        console.say("🌐", "Public URL: %s" % bridge.config.public_url)
    console.say("📖", "Dashboard: %s/dashboard" % bridge.local_url)
    if lan:
        console.say("🏠", "In your network: http://%s:%d" % (lan, bridge.port))
    console.say("🚀", "API server running on %s" % bridge.local_url)
    console.data(bridge.local_url)


def command_token(arguments: argparse.Namespace, config: Config, console: Console) -> int:
    """token create | list | revoke; works on the database, whether the bridge runs or not."""
    data_directory(config.data_dir)
    with contextlib.closing(Database(config.data_dir / "bridge.db", Clock())) as store:
        service = Service(store, Notifier(), Clock(), config.data_dir)
        if arguments.action == "create":
            return create_token(arguments, service, console)
        if arguments.action == "list":
            return list_tokens(arguments, service, console)
        service.revoke_token(arguments.id)
        console.say("✅", "Token revoked")
    return 0


def create_token(arguments: argparse.Namespace, service: Service, console: Console) -> int:
    """token create: the same checks as over HTTP, and a folder of the owner's choice. -> 0. Raises InvalidRequest, CannotStart."""
    tools: Any = arguments.tools
    if tools and tools not in Tools.LEVELS:
        tools = [rule.strip() for rule in re.split(r",(?![^(]*\))", tools)]
    new, _ = NewToken.parse({"name": arguments.name, "admin": arguments.admin, "expiresInDays": arguments.expires, "tools": tools,
                             "requestsPerMinute": arguments.requests_per_minute, "requestsPerDay": arguments.requests_per_day,
                             "models": None if arguments.models is None else [name.strip() for name in arguments.models.split(",")],
                             "sessionMode": SessionMode.STATEFUL if arguments.stateful else SessionMode.STATELESS})
    workspace = Path(arguments.workspace).expanduser().absolute() if arguments.workspace else None
    if workspace and not workspace.is_dir():
        raise CannotStart("The workspace %s is not a folder." % workspace, "make it first")
    if workspace and new.tools == Tools.NONE:
        raise CannotStart("A workspace needs tools.", "add --tools read, for example")
    token, secret = service.create_token(new, workspace)
    console.say("🔑", "Token %s (save this, it is shown only once):" % token.id)
    if not console.data(as_json({"tokenId": token.id, "token": secret, "prefix": token.prefix}) if arguments.json else secret):
        service.discard_token(token)
        raise CannotStart("The token could not be printed, so it was not kept.", "let the command write to its standard output")
    return 0


def list_tokens(arguments: argparse.Namespace, service: Service, console: Console) -> int:
    """token list: a table for people, or JSON. -> 0."""
    bodies = [token_body(token, service.now()) for token in service.tokens()]
    if arguments.json:
        console.data(json.dumps(bodies, ensure_ascii=False, indent=2))
        return 0
    row = "%-36s  %-12s  %-9s  %-5s  %-10s  %s"
    console.data(row % ("ID", "PREFIX", "MODE", "ADMIN", "EXPIRES", "NAME"))
    for body in bodies:
        expires = "expired" if body["isExpired"] else (body["expiresAt"] or "never")[:10]
        name = escape_controls(body["name"]).replace("\n", "?")
        console.data(row % (body["id"], body["prefix"], body["sessionMode"], "yes" if body["isAdmin"] else "no", expires, name))
    return 0


class AskClient:
    """A client of the running bridge, for the shell."""

    def __init__(self, url: str, token: str) -> None:
        self._url, self._headers = urlsplit(url), {"Authorization": "Bearer " + token, "Content-Type": "application/json"}

    def call(self, method: str, path: str, body: Optional[Mapping[str, Any]] = None) -> http.client.HTTPResponse:
        """One request; its answer is read by the caller. Raises OSError, HTTPException; CannotStart for a refusal."""
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(self._url.hostname), self._url.port, timeout=WAIT_SECONDS)
        connection.request(method, self._url.path.rstrip("/") + path, None if body is None else as_json(body).encode("utf-8", "replace"),
                           self._headers)
        response = connection.getresponse()
        if response.status >= 400:
            told = json.loads(response.read() or b"{}")
            raise CannotStart("The bridge refused the request: %s" % told.get("error"), "check CAB_TOKEN" if response.status == 401 else "")
        return response

    def events(self, response: http.client.HTTPResponse) -> Iterator[Tuple[str, Dict[str, Any]]]:
        """The Server-Sent Events of an answer: (name, data)."""
        name = ""
        for raw in response:
            word, _, value = raw.decode().rstrip("\n").partition(": ")
            if word == "event":
                name = value
            elif word == "data":
                yield name, json.loads(value)


def command_ask(arguments: argparse.Namespace, config: Config, console: Console) -> int:
    """Asks the running bridge; the answer alone goes to stdout, word by word where a person reads. -> 0, or 1 for a failed request."""
    message = sys.stdin.buffer.read().decode("utf-8", "replace") if arguments.message == "-" else arguments.message
    url = arguments.url or os.environ.get("CAB_URL") or running_url(config)
    client = AskClient(url, os.environ.get("CAB_TOKEN") or shell_token(config, bool(arguments.conversation)))
    asked = {"message": message, "stream": True, "model": arguments.model, "systemPrompt": arguments.system_prompt,
             "conversation": arguments.conversation}
    job_id, shown, is_live = "", "", sys.stdout.isatty() and not arguments.json
    try:
        for name, data in client.events(client.call("POST", "/api/ask", asked)):
            job_id = data.get("requestId") or job_id
            if name == "queued" and (data["position"] > 1 or "waitingFor" in data):
                console.say("·", "waits at place %d%s" % (data["position"], ", for the plan until %s" % data["resumesAt"]
                                                          if data.get("waitingFor") == "usage_limit" else ""))
            elif name == "started" and shown:
                console.write("\n")
                shown = ""
            elif name == "delta" and is_live:
                shown += data["text"]
                console.write(printable_text(data["text"]))
            elif name in ("completed", "error"):
                return finish_ask(arguments, console, data, shown)
        raise OSError("the stream ended before the answer")
    except KeyboardInterrupt:
        with contextlib.suppress(OSError, http.client.HTTPException, CannotStart):
            if job_id:
                client.call("DELETE", "/api/ask/" + job_id)
        console.fail("Cancelled.")
        return 130
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise CannotStart("The bridge at %s cannot be reached: %s." % (url, error or type(error).__name__),
                          "is it running? start it, or name it with --url") from None


def finish_ask(arguments: argparse.Namespace, console: Console, body: Mapping[str, Any], shown: str) -> int:
    """Prints what is not shown yet. -> the exit status."""
    if arguments.json:
        console.data(json.dumps(body, ensure_ascii=False, indent=2))
    elif body.get("status") == JobStatus.COMPLETED:
        text = str(body["response"])
        console.data(printable_text(text[len(shown):]) if sys.stdout.isatty() else text)
    else:
        console.fail("%s: %s" % (body.get("errorCode") or body.get("code"), escape_controls(str(body.get("error")))))
    return 0 if body.get("status") == JobStatus.COMPLETED else 1


def printable_text(text: str) -> str:
    """An answer for a terminal: tabs stay, other control characters cannot do anything there."""
    return "\t".join(map(escape_controls, text.split("\t")))


def running_url(config: Config) -> str:
    """Where the bridge of this data folder listens, as its lock tells. Raises CannotStart."""
    found = re.search(r"https?://\S+", lock_holder(config))
    if not found:
        raise CannotStart("No bridge is running with the data folder %s." % config.data_dir, "start it, or name another one with --url or"
                          " --data-dir")
    return found.group().rstrip(".")


def shell_token(config: Config, is_stateful: bool) -> str:
    """The token of the shell, which whoever owns the data folder may make; made anew when it was revoked or lost."""
    path = data_directory(config.data_dir) / "ask-tokens.json"
    mode = SessionMode.STATEFUL if is_stateful else SessionMode.STATELESS
    known = read_object(path)
    with contextlib.closing(Database(config.data_dir / "bridge.db", Clock())) as store:
        if isinstance(known.get(mode), str) and store.token_by_digest(digest(known[mode])):
            return str(known[mode])
        _, secret = Service(store, Notifier(), Clock(), config.data_dir).create_token(NewToken("ask (%s)" % mode, mode))
    write_file_atomically(path, as_json({**known, mode: secret}))
    return secret


class Check(NamedTuple):
    """One line of the doctor. is_good: None where something is worth knowing, but nothing is broken; advice: what to do."""
    name: str
    is_good: Optional[bool]
    text: str
    advice: str = ""


def command_doctor(arguments: argparse.Namespace, config: Config, console: Console) -> int:
    """Looks at all that a start needs. -> 0, or 1 when something is broken."""
    checks = [Check("python", True, "%d.%d.%d" % sys.version_info[:3]), Check("sqlite", True, SQLITE_VERSION)]
    for each in (check_data, check_clock, check_orphans, check_port, check_claude,
                 *([check_live] if arguments.live else []), check_tunnel):
        try:
            checks += each(config, os.environ)
        except OSError as error:
            checks.append(Check(each.__name__[6:], False, str(error), "make that readable, or choose another folder with --data-dir"))
    marks = {True: "ok", None: "--", False: "!!"}
    if arguments.json:
        console.data(json.dumps({"ok": all(check.is_good is not False for check in checks), "checks": [
            {"name": check.name, "ok": check.is_good, "text": check.text, "advice": check.advice or None} for check in checks]}, indent=2))
    else:
        for check in checks:
            console.data("%s  %-12s %s%s" % (marks[check.is_good], check.name, escape_controls(check.text),
                                             "\n                 -> " + check.advice if check.advice else ""))
    return 1 if any(check.is_good is False for check in checks) else 0


def check_data(config: Config, environ: Mapping[str, str]) -> List[Check]:
    """The data folder, or the place where it will be made: its rights, its disk and its database."""
    folder = config.data_dir
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return [Check("data", False, "%s is no folder that can be written" % there,
                      "make it writable, or choose another one with --data-dir")]
    planted = find_foreign_files(folder)
    if planted:
        return [Check("data", False, planted, "move that away, or choose another folder with --data-dir")]
    fault, free = inspect_database(folder / "bridge.db").fault, shutil.disk_usage(there).free >> 20
    shown = str(folder) if there == folder else "%s (start makes it)" % folder
    if there == folder and os.name == "posix" and folder.stat().st_mode & 0o077:
        shown += ", which others may look into: start takes that right away"
    return [Check("data", not fault, fault or shown, "start the bridge: it keeps a damaged file aside" if fault else ""),
            Check("disk", free > 100, "%d MB free" % free, "" if free > 100 else "make room: requests are kept on disk")]


def check_clock(config: Config, environ: Mapping[str, str]) -> List[Check]:
    """The clock: tokens expire by it, limits reset by it."""
    now, latest = Clock.now(), inspect_database(config.data_dir / "bridge.db").latest
    told = "%s UTC" % time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(now))
    is_back = now < latest - 60
    why = ", before this program was made" if now < BUILD_TIME else ", before the newest request was made" if is_back else ""
    return [Check("clock", not why, told + why, "set the clock of this machine" if why else "")]


def check_orphans(config: Config, environ: Mapping[str, str]) -> List[Check]:
    """Processes of a bridge that was killed; those of one that runs are none."""
    if lock_holder(config):
        return []
    found = find_orphans(data_tag(config.data_dir) + ".", inspect_database(config.data_dir / "bridge.db").children)
    return [Check("processes", None, "left behind by a bridge that was killed: %s; start ends them" % ", ".join(map(str, sorted(found))))
            if found else Check("processes", True, "none are left behind")]


def lock_holder(config: Config) -> str:
    """Who holds the lock of the data folder, "" for nobody."""
    try:
        if (config.data_dir / "bridge.lock").exists():
            DirectoryLock(config.data_dir / "bridge.lock").close()
        return ""
    except CannotStart as error:
        return str(error)


def check_port(config: Config, environ: Mapping[str, str]) -> List[Check]:
    """The port: free, or held by a bridge of this data folder."""
    holder = lock_holder(config)
    if holder:
        return [Check("port", None, holder)]
    try:
        BridgeServer(config.listen_host, config.port, Clock(), lambda text: None).server_close()
    except (OSError, OverflowError, TypeError, ValueError) as error:
        return [Check("port", False, "%d on %s cannot be used: %s" % (config.port, config.listen_host, error),
                      "choose another one with --port")]
    return [Check("port", True, "%d on %s is free" % (config.port, config.listen_host))]


def check_claude(config: Config, environ: Mapping[str, str]) -> List[Check]:
    """The program, its login and who pays."""
    try:
        with tempfile.TemporaryDirectory() as folder:         # what a start would write
            claude = find_claude(replace(config, data_dir=Path(folder)), environ)
    except CannotStart as error:
        return [Check("claude", False, str(error), error.hint)]
    checks = [Check("claude", True, "%s (%s)" % (claude.features.version_text, claude.command[-1])),
              *(Check("claude", None, note) for note in claude.notes)]
    if not claude.is_billed_per_token:
        return checks + [Check("payer", True, claude.billing_account)]
    advice = "" if config.allow_api_key else "sign claude in to the subscription, or allow the bill with --allow-api-key"
    return checks + [Check("payer", config.allow_api_key, claude.billing_account + ", billed per token", advice)]


def check_live(config: Config, environ: Mapping[str, str]) -> List[Check]:
    """A question to the model, as a request would ask it."""
    clock, tag = Clock(), "%s.live" % data_tag(config.data_dir)
    try:
        with tempfile.TemporaryDirectory() as folder:
            alone = replace(config, data_dir=Path(folder), spare=0)
            cli = ClaudePool(find_claude(alone, environ), alone, clock, tag, lambda pid, started: None)
            began = clock.monotonic()
            with contextlib.closing(cli):
                answer = cli.run(RunRequest("Answer with the word: ready", DEFAULT_SESSION), LiveText(), lambda: None)
    except CannotStart:
        return []                                             # told by check_claude
    except RunFailed as failure:
        advice = {"auth_required": "sign claude in again: run claude, then /login", "usage_limit": "wait for the reset of the plan",
                  "overloaded": "the service is overloaded; try again later"}
        return [Check("live", False, "%s: %s" % (failure.code, redact(str(failure))),
                      advice.get(failure.code, "see whether it answers you: claude -p hello"))]
    return [Check("live", True, "%s answered %r in %.1f s" % (answer.model, answer.text[:40], clock.monotonic() - began))]


def check_tunnel(config: Config, environ: Mapping[str, str]) -> List[Check]:
    """cloudflared, its sum, and the token of a named tunnel."""
    if config.no_tunnel:
        return [Check("tunnel", None, "off (--no-tunnel)")]
    try:
        token = find_tunnel_token(config, environ)
    except (CannotStart, WrongSetting) as error:
        return [Check("tunnel", False, str(error), getattr(error, "hint", ""))]
    kind = "named, %s" % (config.public_url or "--public-url is not set: its configuration will tell the address") if token else \
        "quick: a new address at each start"
    return [check_cloudflared(config, environ), Check("tunnel", None if token and not config.public_url else True, kind)]


def check_cloudflared(config: Config, environ: Mapping[str, str]) -> Check:
    """The program: the owner's, the downloaded one, or none yet."""
    install = CloudflaredInstall(config, environ, Clock(), lambda text, passes: None)
    try:
        owners = install.owners()
        if owners:
            version = probe([str(owners), "version", "--short"], tunnel_environment(environ, "")).strip().splitlines()
            return Check("cloudflared", bool(version), "%s (%s), your own, so its sum is not checked" % (
                owners, version[0][:40] if version else "it does not tell its version"),
                "" if version else "install it again, or name another one with --cloudflared PATH")
    except (CannotTunnel, CannotStart) as error:
        return Check("cloudflared", False, str(error), "install it again, or name another one with --cloudflared PATH")
    ours = install.ours()
    if ours:
        return Check("cloudflared", True, "%s (%s, SHA-256 as expected)" % (ours, CLOUDFLARED_VERSION))
    if cloudflared_asset(platform.system(), platform.machine()):
        return Check("cloudflared", None, "not here yet: start downloads %s from %s and checks its SHA-256" % (
            CLOUDFLARED_VERSION, config.cloudflared_url))
    return Check("cloudflared", False, "there is none for this system", "install it yourself and name it with --cloudflared PATH")


def add_settings(parser: argparse.ArgumentParser, names: Sequence[str] = ()) -> None:
    """The flags of the settings; without a default, so that a variable can stand in."""
    for row in SETTINGS:
        if names and row.name not in names:
            continue
        text = "%s [%s]" % (row.help, ", ".join(row.variables))
        if row.kind == "switch":
            parser.add_argument(row.flag, dest=row.name, action="store_const", const=True, help=text)
        else:
            parser.add_argument(row.flag, dest=row.name, metavar=row.kind.upper(),
                                help=text + ("" if row.default == "" else " (default: %s)" % row.default))


def build_parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    parser = argparse.ArgumentParser(description="A REST API for the claude command line tool you already pay for.", allow_abbrev=False)
    parser.add_argument("--version", "-v", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    add_settings(commands.add_parser("start", help="run the bridge", allow_abbrev=False))
    doctor = commands.add_parser("doctor", help="check all that a start needs, and say what to do", allow_abbrev=False)
    add_settings(doctor)
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("--live", action="store_true", help="also ask the model a short question, which the plan pays for")
    ask = commands.add_parser("ask", help="ask the running bridge, and print the answer", allow_abbrev=False)
    ask.add_argument("message", help="what to ask; - reads it from standard input")
    ask.add_argument("--model", metavar="NAME", help="alias or full name of a model")
    ask.add_argument("--system-prompt", metavar="TEXT", help="instructions for the model")
    ask.add_argument("--conversation", metavar="NAME", help="go on with the conversation of this name")
    ask.add_argument("--url", help="where the bridge is [CAB_URL] (default: the one that runs with this data folder)")
    ask.add_argument("--json", action="store_true", help="print the whole answer as JSON")
    add_settings(ask, ("data_dir",))
    token = commands.add_parser("token", help="create, list and revoke tokens, while the bridge runs or not", allow_abbrev=False)
    actions = token.add_subparsers(dest="action", metavar="ACTION", required=True)
    create = actions.add_parser("create", help="make a token and print it", allow_abbrev=False)
    create.add_argument("name", help="what it is for")
    create.add_argument("--admin", action="store_true", help="may manage tokens and read every request")
    create.add_argument("--stateful", action="store_true", help="its asks share a memory")
    create.add_argument("--expires", type=int, choices=EXPIRY_DAYS, metavar="DAYS", help="1, 7, 30 or 90 (default: never)")
    create.add_argument("--tools", help="none (default), read, web, all, or rules: 'Read,Bash(git log:*)'")
    create.add_argument("--requests-per-minute", metavar="N", help="most asks within 60 seconds (default: no limit)")
    create.add_argument("--requests-per-day", metavar="N", help="most asks within a day, UTC (default: no limit)")
    create.add_argument("--models", metavar="NAMES", help="the models it may use, joined by commas; the first is its default")
    create.add_argument("--workspace", metavar="DIR", help="an existing folder for its tools (default: one of its own)")
    revoke = actions.add_parser("revoke", help="delete a token; its running request is stopped", allow_abbrev=False)
    revoke.add_argument("id", help="as token list shows it")
    for action in (create, actions.add_parser("list", help="show all tokens", allow_abbrev=False), revoke):
        add_settings(action, ("data_dir",))
        if action is not revoke:
            action.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs one command. -> the exit status: 0 done, 1 could not, 2 wrong words."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["demo-claude"]:
        return DemoClaude(words[1:]).run()
    parser = build_parser()
    arguments = parser.parse_args(words)
    if not arguments.command:
        parser.print_help()
        return 0
    console = Console()
    try:
        config = load_config(vars(arguments), os.environ)
        if arguments.command == "start":
            return command_start(config, console)
        return {"doctor": command_doctor, "ask": command_ask, "token": command_token}[arguments.command](arguments, config, console)
    except (WrongSetting, InvalidRequest) as error:
        console.fail(str(error))
        return 2
    except BridgeError as error:
        console.fail(str(error))
    except CannotStart as error:
        console.fail(str(error), error.hint)
    except KeyboardInterrupt:
        console.fail("Interrupted.")
    return 1


class DemoClaude:
    """`demo-claude`, what --demo runs in place of `claude`: the same protocol on stdin and stdout, an echo for an answer."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        self._turns = 0
        self._has_schema = False
        self._tools: List[str] = []
        self._session = str(uuid.uuid4())
        self._input: "queue.SimpleQueue[Optional[Dict[str, Any]]]" = queue.SimpleQueue()

    def run(self) -> int:
        if "--version" in self._words:
            print("%d.%d.%d (demo)" % JSON_SCHEMA_CLI)
        elif "--help" in self._words:
            print("  auth\n  " + "\n  ".join(sorted(NEEDED_FLAGS | OPTIONAL_FLAGS)))
        elif "auth" in self._words:
            print(as_json({"loggedIn": True, "authMethod": "demo"}))
        elif any(word.startswith("--resume=") for word in self._words):
            self._say(type="result", subtype="error_during_execution", is_error=True, errors=["No conversation found"])
            return 1
        else:
            threading.Thread(target=self._read, name="stdin", daemon=True).start()
            for line in iter(self._input.get, None):
                self._take(line)
        return 0

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            self._input.put(json.loads(line))
        self._input.put(None)

    def _say(self, **message: Any) -> None:
        sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")
        sys.stdout.buffer.flush()

    def _take(self, line: Mapping[str, Any]) -> None:
        if line["type"] == "control_request":
            self._has_schema |= "jsonSchema" in line["request"]
            self._tools = line["request"].get("agents", {}).get("bridge", {}).get("tools") or self._tools
            models = {"models": [{"value": "default", "resolvedModel": "demo", "displayName": "Demo"}]}
            self._say(type="control_response", response={"subtype": "success", "request_id": line["request_id"], "response": models})
        elif line["type"] == "user" and line.get("shouldQuery") is False:
            self._turns += 1
            self._say(type="result", subtype="success", is_error=False, num_turns=0, result="")
        elif line["type"] == "user":
            self._turns += 1
            self._answer("".join(block.get("text", "") for block in line["message"]["content"]))

    def _answer(self, message: str) -> None:
        text = "This is a demo, Claude was not asked. You said%s: %s" % (" (turn %d)" % self._turns if self._turns > 1 else "", message)
        self._say(type="system", subtype="init", apiKeySource="none", model="demo", session_id=self._session, tools=self._tools)
        self._say(type="stream_event", event={"type": "message_start"})
        pieces = re.findall(r"\s*\S+\s*$|\s*\S+", text) or [text]
        for piece in pieces:
            self._say(type="stream_event", event={"type": "content_block_delta", "delta": {"type": "text_delta", "text": piece}})
            try:
                line = self._input.get(timeout=min(0.02, 1 / len(pieces)))
            except queue.Empty:
                continue
            if line is None or line.get("request", {}).get("subtype") == "interrupt":
                self._input.put(line if line is None else {"type": "noise"})
                return self._say(type="result", subtype="error_during_execution", is_error=True, errors=["interrupted"])
        usage = {"input_tokens": len(message.split()), "output_tokens": len(text.split())}
        result: Dict[str, Any] = {"type": "result", "subtype": "success", "is_error": False, "num_turns": 1, "result": text,
                                  "total_cost_usd": 0, "usage": usage}
        if self._has_schema:
            result.update(result=as_json({"demo": message}), structured_output={"demo": message})
        self._say(**result)


def run() -> None:
    """The entry point of the installed command and of the .pyz."""
    sys.exit(main())


if __name__ == "__main__":
    run()
