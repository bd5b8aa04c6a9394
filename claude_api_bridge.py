#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""claude_api_bridge: a REST API for the `claude` command line tool you already pay for.

    python3 claude_api_bridge.py start                  serve at a public HTTPS address
    python3 claude_api_bridge.py start --no-tunnel      serve this machine and its network
    python3 claude_api_bridge.py start --demo           the same without Claude: answers are echoes
    python3 claude_api_bridge.py token create NAME      create a token (also: list, revoke ID)
    python3 claude_api_bridge.py ask "MESSAGE"          ask the running bridge from a shell
    python3 claude_api_bridge.py doctor                 check everything that a start needs
    python3 claude_api_bridge.py pause                  hold the queue (also: resume, backup FILE)
    python3 claude_api_bridge.py service install        run it in the background

How one request travels. Data flows one way; the database is the only source of truth:

    client -> ConnectionHandler -> Dispatcher -> handle_* -> Service -> JobStore.enqueue
              Worker -> JobStore.claim -> ClaudePool -> Turn -> ClaudeProcess -> claude
              claude -> parse_cli_event -> LiveText, JobStore.complete -> Notifier
    client <- ConnectionHandler <- Service.follow

The rooms of this file, in order:

     1 Settings and limits     flags, environment variables, Config
     2 Errors                  BridgeError (an HTTP answer), RunFailed (a stored outcome)
     3 Common                  JSON, time, text, TokenBucket, Metrics
     4 Records and bodies      Token, Job, Ask, NewToken, and the validators of their fields
     5 Storage                 Database and its stores; the only user of sqlite3
     6 Claude protocol         pure: command line, control messages, events, failures
     7 Claude processes        ClaudeProcess, Turn, ClaudePool, ClaudeRunner
     8 Queue                   Notifier, QueueHolds, Worker
     9 Service                 the rules of what a caller may do
    10 Native API              Request, Response, Route, handle_*
    11 OpenAI and Anthropic APIs   the /v1 wire formats
    12 Routes and OpenAPI      ROUTES, examples, /openapi.json
    13 HTTP server             parser, connections, rate limits, Dispatcher
    14 Tunnel                  cloudflared: download, process, policy
    15 Dashboard               one page: CSS, HTML, JavaScript
    16 App                     Bridge, BridgeStatus, DirectoryLock
    17 Command line            start, token, ask, doctor, service, demo

Names point upward only: a room uses the rooms above it; what is below is passed in as an argument.
A test checks this. Inside a room the pure part comes first. To change an answer, start in 10 or 11;
to change how Claude Code is driven, in 6 and 7.
"""
# Threads and locks
#
# thread                    owner              waits on                       ends by
# main or shutdown          command_start      ExitSignals                    SIGINT, SIGTERM
# second-signal             wait_for_signal    ExitSignals                    the end of the process
# http                      BridgeServer       accept, 0.2 s                  stop_accepting
# http-ADDRESS (many)       BridgeServer       its socket, a Notifier event   the end of its socket
# worker                    Worker             a Notifier event, 1 s          stop event
# callbacks                 CallbackSender     stop event, 1 s                stop event
# callback                  CallbackSender     a socket, 15 s                 end of its work
# writer                    Database           its queue                      None in the queue
# check                     IntegrityCheck     the disk                       an interrupt
# claude-check, probe       ClaudeSearch       a short command, 20 s          end of the process
# stdin-, stdout-, stderr-  ClaudeProcess      a pipe                         the end of the process
# tunnel                    Tunnel             stop event, 0.1 to 0.5 s       stop event
# cloudflared-log           Cloudflared        a pipe                         the end of the process
#
# Each lock is a leaf: no thread calls another part while it holds one. The exceptions are named.
#
# lock                          guards
# TokenBucket._lock             level and time of one bucket
# Metrics._lock                 all counters
# _LARGE_VALUE_LOCK             one large JSON value or stored answer is decoded at a time
#                               (exception: Database._read_lock is taken under it)
# Database._queue_lock          the write queue together with its end
# Database._read_lock           the reading connection; no thread writes while it holds it
# LiveText._lock                text, parts and generation; only the worker writes
# ModelCatalog._lock            the list of models and the running look-up
# Notifier._lock                events by topic
# StreamSlots._lock             open streams by token
# RateLimiters._lock            buckets by key
# BridgeServer._lock            connections and reserved memory
# BridgeServer.large_bodies     places for large bodies on the disk (a semaphore)
#
# Without a lock, by a single writer: Worker (its thread), Tunnel (its thread), ConnectionState (the
# connection's thread), Database's caches (replaced as a whole by the writer; a reader keeps the
# dictionary that it took before its query). A `claude` process is started from the worker's thread
# only: on Linux the kernel ends a child together with the thread that forked it.
from __future__ import annotations

import sys

if sys.version_info < (3, 9):
    sys.exit(
        "claude_api_bridge needs Python 3.9 or newer; this is Python %d.%d." % sys.version_info[:2])

__version__ = "0.2.0"

# Handle --version before the imports, which dominate the start-up time. A program that only imports
# this module has another name.
if sys.argv[1:] in (["--version"], ["-v"]) and sys.argv[0].endswith((
        "claude-api-bridge", "claude-api-bridge.exe", "claude_api_bridge.py",
        "claude_api_bridge.pyz")):
    print(__version__)
    sys.exit()

import argparse
import base64
import contextlib
import ctypes
import errno
import hashlib
import hmac
import http.client
import ipaddress
import json
import logging
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
import uuid
from collections import OrderedDict, deque
from concurrent.futures import Future, TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from email.utils import formatdate
from functools import cached_property, lru_cache, partial, reduce, wraps
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate, chain, count, islice
from pathlib import Path
from subprocess import list2cmdline
from typing import (
    IO, Any, Callable, Deque, Dict, FrozenSet, Generator, Iterable, Iterator, List, Mapping,
    NamedTuple, NoReturn, Optional, Protocol, Sequence, Set, Tuple, Type, TypeVar, Union)
from urllib.parse import parse_qsl, quote, unquote, urlsplit

logger = logging.getLogger("claude_api_bridge")
logger.addHandler(logging.NullHandler())
# === 1 Settings and limits =======================================================================
# Every setting is one row of Config: the parser, `start --help`, the README and the environment
# variables come from it. A limit that one room uses stands in that room; these serve several.

OUTPUT_BYTES = 10 << 20
BODY_BYTES = 1 << 20
# A body or an answer from this size on counts as large: it is handled one at a time, or reserved.
LARGE_BYTES = 1 << 18
# Below the 100 s after which tunnels and proxies cut a silent answer.
WAIT_SECONDS = 90.0
# A silent stream sends a heartbeat before a proxy cuts it.
HEARTBEAT_SECONDS = 15.0
# How often a waiting thread reads the database again although nothing notified it.
RECHECK_SECONDS = 1.0
CLOSE_SECONDS = 5.0


class Setting(NamedTuple):
    """One choice of the owner. kind: "number" (from minimum to maximum), "text" (matches the
    pattern), "path", "program" (a name or a path; ~ is expanded) or "switch" (has no value).
    env_aliases: environment variables besides CAB_NAME."""
    name: str
    default: Any
    kind: str
    help: str
    minimum: int
    maximum: int
    pattern: str
    env_aliases: Tuple[str, ...]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variables(self) -> Tuple[str, ...]:
        return ("CAB_" + self.name.upper(), *self.env_aliases)


def setting(default: Any, text: str, minimum: int = 0, maximum: int = 0, pattern: str = "",
            env_aliases: Tuple[str, ...] = (), kind: str = "") -> Any:
    """Return a field of Config that carries the rest of its Setting."""
    kinds = {bool: "switch", int: "number", str: "text"}
    row = (kind or kinds[type(default)], text, minimum, maximum, pattern, env_aliases)
    return field(default=default, metadata={"row": row})


@dataclass(frozen=True)
class Config:
    """The chosen values, checked. `load_config` and tests build it."""
    port: int = setting(3456, "port to listen on; 0 takes a free one", maximum=65535,
                        env_aliases=("PORT",))
    host: str = setting(
        "", "address to listen on (default: 127.0.0.1, with --no-tunnel all interfaces)")
    no_tunnel: bool = setting(False, "serve this machine and its network only")
    public_url: str = setting(
        "", "address of a named tunnel or of your own proxy, such as https://bridge.example.com",
        pattern=r"|https?://[A-Za-z0-9.-]+(:\d+)?/?")
    tunnel_token_file: str = setting(
        "", "file with the token of a named tunnel (or put the token itself into CAB_TUNNEL_TOKEN)")
    tunnel_protocol: str = setting(
        "auto", "quic, http2 or auto (the one that worked last, then the other)",
        pattern="auto|quic|http2")
    cloudflared: str = setting(
        "", "the cloudflared program (default: found in PATH, else downloaded once and checked)",
        kind="program")
    cloudflared_url: str = setting("https://github.com/cloudflare/cloudflared/releases/download",
                                   "where cloudflared is downloaded from", pattern=r"https?://\S+")
    names: str = setting("", "more host names by which clients call this bridge, separated by"
                             " commas", pattern=r"[A-Za-z0-9._, -]*")
    data_dir: Path = setting(
        Path("~/.claude-api-bridge"), "folder of the database and the workspaces", kind="path")
    claude: str = setting(
        "", "the claude program (default: found in PATH and the usual places)", kind="program")
    demo: bool = setting(False, "answer with an echo: needs no Claude, no subscription")
    rate_limit: int = setting(120, "requests a minute; 0 switches the limit off", maximum=1_000_000)
    spare: int = setting(
        2, "idle claude processes for new conversations, 90 to 160 MB each; from 2 on, one is"
        " prepared for the settings that two requests in a row had; 0: each starts its own process",
        maximum=3)
    preconnect: bool = setting(
        False, "let the prepared process (--spare 2) connect to the API before the first message,"
        " by a request to the free token-counting service")
    run_seconds: float = setting(300, "longest run of one request", minimum=1, maximum=86_400)
    silence_seconds: float = setting(
        90, "longest silence of claude; two fifths of it before an answer begins", minimum=1,
        maximum=86_400)
    warm_seconds: float = setting(
        600, "how long the process of a conversation waits for the next message; 0 ends it at once"
        " (but 60 s after a call of a client's tool)", maximum=86_400)
    hold_hours: int = setting(
        24, "how long requests wait for a lost network, a refused login or an overloaded service",
        minimum=1, maximum=8_760)
    body_mb: int = setting(32, "largest body on /v1, in MiB; elsewhere 1", minimum=1, maximum=256)
    keep_days: int = setting(
        7, "days after which finished requests are deleted (of a conversation those that are no"
        " longer replayed)", minimum=1, maximum=3_650)
    plan_only: bool = setting(
        False, "never use paid extra usage: pause until the plan's limit resets")
    allow_api_key: bool = setting(
        False, "pass ANTHROPIC_API_KEY to claude: requests are then billed per token")

    @property
    def listen_host(self) -> str:
        return self.host or ("0.0.0.0" if self.no_tunnel else "127.0.0.1")

    def origin(self, port: int) -> str:
        """Return the URL at which a program on this machine reaches the bridge."""
        local = {"0.0.0.0": "127.0.0.1", "::": "::1", "localhost": "127.0.0.1"}
        return http_url(local.get(self.listen_host, self.listen_host), port)


def http_url(host: str, port: int) -> str:
    return "http://%s:%d" % ("[%s]" % host if ":" in host else host, port)


SETTINGS = tuple(Setting(row.name, row.default, *row.metadata["row"]) for row in fields(Config))


class WrongSetting(Exception):
    """A value that cannot be used; the text names the setting and says what to use instead."""


def closest(word: str, choices: Iterable[str], nearness: float = 0.6) -> str:
    """Return what was perhaps meant; "" if nothing is near. nearness: 0 to 1."""
    import difflib
    return next(iter(difflib.get_close_matches(word, list(choices), 1, nearness)), "")


def unknown_variables(environ: Mapping[str, str]) -> List[Tuple[str, str]]:
    """Return the CAB_ variables that nothing reads, each with what was perhaps meant."""
    read = {"CAB_TOKEN", "CAB_URL", "CAB_TUNNEL_TOKEN"}.union(*(row.variables for row in SETTINGS))
    return [(name, closest(name, read)) for name in sorted(environ)
            if name.startswith("CAB_") and name not in read]


def load_config(flags: Mapping[str, Any], environ: Mapping[str, str]) -> Config:
    """Return the settings: a flag before a variable before the default. Raises WrongSetting."""
    values = {}
    for row in SETTINGS:
        value, source = flags.get(row.name), row.flag
        for variable in row.variables:
            if value is None and environ.get(variable):
                value, source = environ[variable], variable
        values[row.name] = read_setting(row, row.default if value is None else value, source)
    return Config(**values)


SWITCH_VALUES = {**dict.fromkeys(("true", "1", "yes", "on"), True),
                 **dict.fromkeys(("false", "0", "no", "off"), False)}


def read_setting(row: Setting, value: Any, source: str) -> Any:
    """Return one value in its type. source: the flag or variable in errors. Raises WrongSetting."""
    text = str(value)
    if row.kind == "switch":
        if text.lower() not in SWITCH_VALUES:
            raise WrongSetting("%s must be 1 or 0, not %r." % (source, value))
        return SWITCH_VALUES[text.lower()]
    if row.kind == "number":
        if not re.fullmatch(r"[0-9]{1,9}", text) or not row.minimum <= int(text) <= row.maximum:
            raise WrongSetting("%s must be a whole number from %d to %d, not %r."
                               % (source, row.minimum, row.maximum, text))
        return int(text)
    if row.pattern and not re.fullmatch(row.pattern, text):
        raise WrongSetting("%s cannot be %r. Expected: %s." % (source, text, row.help))
    # expanduser raises it for the home of an unknown user.
    with contextlib.suppress(RuntimeError):
        if row.kind == "path" and text.strip() and "\0" not in text:
            return Path(text).expanduser().absolute()
        if row.kind != "path" and "\0" not in text:
            is_home = row.kind == "program" and text.startswith("~")
            return str(Path(text).expanduser()) if is_home else text
    raise WrongSetting("%s is not a usable %s: %r." % (source, row.kind, text))


class Clock:
    """The clocks: `now` (UTC epoch seconds) and `monotonic` (for spans). Tests pass their own."""
    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)


# === 2 Errors ====================================================================================
# Two families, never mixed. A BridgeError answers an HTTP caller. A RunFailed is stored with the
# job and reaches the caller as HTTP 200 with "status": "error". CannotStart is for the terminal.


class BridgeError(Exception):
    """An error answer. Subclasses fix status, code and usual text; their docstring documents them.

    400  InvalidRequest  InvalidJson  MalformedRequest  TokenLimit  LastAdmin
    401  MissingToken  InvalidToken                403  AdminRequired  ModelNotAllowed
    404  NotFound  PreviousResponseNotFound        405  MethodNotAllowed
    408  RequestTimeout                            409  AlreadyFinished  IdempotencyConflict
    413  BodyTooLarge                              415  UnsupportedEncoding
    417  ExpectationFailed                         421  UnknownHost
    429  RateLimited  DailyLimit  QueueFull        431  HeadTooLarge
    501  UnknownCoding                             503  Unavailable
    505  UnknownVersion                            any  RunError
    headers: more headers of the answer. extra: more fields of its body."""
    status = 500
    code = "internal"
    text = "Internal server error"

    def __init__(
            self, text: str = "", headers: Sequence[Tuple[str, str]] = (), **extra: Any) -> None:
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
    """The maximum number of tokens exists; revoke one first."""
    status, code, text = 400, "token_limit", "Maximum 100 tokens allowed"

class LastAdmin(BridgeError):
    """The only admin token cannot be revoked; create another admin token first."""
    status, code, text = 400, "last_admin", "Cannot delete the last admin token"

class MalformedRequest(BridgeError):
    """The bytes are not a valid HTTP request; the bridge closes the connection."""
    status, code, text = 400, "malformed_request", "Malformed HTTP request"

class MissingToken(BridgeError):
    """The request carries no token."""
    status, code, text = 401, "missing_token", "Missing Authorization header. Use: Bearer <token>"

class InvalidToken(BridgeError):
    """The token is unknown, revoked or expired."""
    status, code, text = 401, "invalid_token", "Invalid or expired token"

class AdminRequired(BridgeError):
    """The route needs an admin token."""
    status, code, text = 403, "admin_required", "Admin token required"

class ModelNotAllowed(BridgeError):
    """The token may not use this model; the text lists the models that it may use."""
    status, code, text = 403, "model_not_allowed", "This token may not use that model"

class NotFound(BridgeError):
    """No such path, request, conversation or token; another token's request counts as unknown."""
    status, code, text = 404, "not_found", "Not found"

class PreviousResponseNotFound(BridgeError):
    """`previous_response_id` names no stored response of this token; send the conversation."""
    status, code, text = 404, "previous_response_not_found", "Previous response not found"

class MethodNotAllowed(BridgeError):
    """The path exists, but not with this method; the Allow header lists the methods."""
    status, code, text = 405, "method_not_allowed", "Method not allowed"

class RequestTimeout(BridgeError):
    """The request did not arrive in time; the bridge closes the connection."""
    status, code, text = 408, "request_timeout", "The request did not arrive in time"

class AlreadyFinished(BridgeError):
    """The request already has its answer or its error, so nothing is left to cancel."""
    status, code, text = 409, "already_finished", "The request is already finished"

class IdempotencyConflict(BridgeError):
    """The Idempotency-Key was used with another body; use a new key for a new request."""
    status, code = 409, "idempotency_conflict"
    text = "This Idempotency-Key was used for another body. Use a new key for a new request"

class BodyTooLarge(BridgeError):
    """The body is larger than 1 MiB, on /v1 than --body-mb."""
    status, code, text = 413, "body_too_large", "Body exceeds %d byte limit" % BODY_BYTES

class UnknownHost(BridgeError):
    """The Host header is not a name of this bridge (DNS-rebinding protection); --names adds one."""
    status, code, text = 421, "unknown_host", "This bridge does not answer by that name"

class UnsupportedEncoding(BridgeError):
    """The body is compressed; send it uncompressed."""
    status, code = 415, "unsupported_encoding"
    text = "Content-Encoding is not supported. Send the body uncompressed"

class ExpectationFailed(BridgeError):
    """The Expect header asks for something other than 100-continue."""
    status, code, text = 417, "expectation_failed", "Only Expect: 100-continue is supported"

class RateLimited(BridgeError):
    """Too many requests; Retry-After gives the seconds to wait."""
    status, code, text = 429, "rate_limited", "Too many requests, please slow down."

class DailyLimit(BridgeError):
    """The token used up its requests of this day (UTC); `resetsAt` and Retry-After give the end."""
    status, code, text = 429, "daily_limit", "This token has used up its requests of today"

class QueueFull(BridgeError):
    """Too many requests wait; try again after Retry-After seconds."""
    status, code, text = 429, "queue_full", "Queue is full. Please try again later."

class HeadTooLarge(BridgeError):
    """The request line and headers are larger than 16 KiB."""
    status, code, text = 431, "head_too_large", "Request head exceeds 16384 byte limit"

class UnknownCoding(BridgeError):
    """No route supports this method or transfer coding."""
    status, code, text = 501, "not_implemented", "Method or transfer coding not supported"

class Unavailable(BridgeError):
    """The bridge cannot serve now: all connections are busy, or the worker or database is down."""
    status, code = 503, "unavailable"
    text = "The bridge cannot serve requests now. Please try again later."

class UnknownVersion(BridgeError):
    """The HTTP version is not 1.x."""
    status, code, text = 505, "http_version", "Only HTTP/1.0 and HTTP/1.1 are supported"


ERRORS: Tuple[Type[BridgeError], ...] = (
    *sorted(BridgeError.__subclasses__(), key=lambda kind: (kind.status, kind.code)), BridgeError)

RUN_ERRORS = {
    "cancelled": "the request was cancelled, or its token was revoked",
    "timeout": "the run took too long, or claude itself sent nothing for too long",
    "usage_limit": "the plan's limit is used up; native requests wait for the reset, a /v1 request"
    " fails if the reset is more than 5 minutes away",
    "network": "the API could not be reached, was silent or failed, for --hold-hours (on /v1 for"
    " 30 s)",
    "auth_required": "claude is not signed in, or its login was refused, for --hold-hours (on /v1"
    " for 30 s)",
    "overloaded": "the service, or this machine, was overloaded for --hold-hours (on /v1 for 20 s)",
    "paused": "the owner has paused the queue, and a /v1 request waited for 30 s",
    "refused": "the model refused to answer; /v1 answers 200 with the reason",
    "invalid_request": "the API refused the request",
    "request_too_large": "the request is larger than the API accepts",
    "billing_guard": "the run would have been billed to an API key and was stopped",
    "cli_error": "claude failed; the text holds its own message",
    "output_too_large": "the answer is larger than 10 MB",
    "interrupted": "the run was interrupted twice: the bridge stopped or crashed",
    "context_too_long": "the prompt or the conversation is longer than the model accepts",
    "model_not_found": "the model does not exist, or the account may not use it"}
# What the owner, or the caller, can do about it.
RUN_ADVICE = {
    "auth_required": "sign claude in again: run claude, then /login",
    "network": "check the network of this machine, its DNS and its proxy",
    "usage_limit": "wait for the reset of the plan",
    "overloaded": "the service is overloaded; try again later",
    "timeout": "ask for less at once, or start the bridge with a longer --run-seconds",
    "billing_guard": "sign claude in to the subscription, or allow the bill with --allow-api-key",
    "cli_error": "check whether it answers you: claude -p hello; then claude update",
    "output_too_large": "ask for a shorter answer",
    "interrupted": "check why the bridge stopped, then send the request again",
    "context_too_long": "send less text, or begin another conversation",
    "model_not_found": "choose one of GET /v1/models",
    "refused": "ask in another way, or another model"}
# After these the queue waits, and the request with it: it did not cause them. -> `waitingFor`.
HOLD_REASONS = {"usage_limit": "usage_limit", "overloaded": "overloaded", "network": "network",
                "auth_required": "login"}
# HTTP status of a failed run on /v1; 500 for the others.
RUN_STATUS = {
    "timeout": 504, "usage_limit": 429, "auth_required": 503, "overloaded": 529, "network": 503,
    "paused": 503, "billing_guard": 403, "interrupted": 503, "context_too_long": 400,
    "invalid_request": 400, "request_too_large": 413, "model_not_found": 404}
# A client library waits for so long and sends the request again.
RETRY_SECONDS = 60


class RunError(BridgeError):
    """A failed run as an HTTP error, for callers of /v1. code: a key of RUN_ERRORS. retry_after:
    seconds until it may succeed; if that is long, libraries must not retry, as the bridge did."""

    def __init__(self, code: str, text: str, retry_after: Optional[float] = None) -> None:
        headers = []
        if retry_after is not None:
            headers.append(("Retry-After", str(max(1, math.ceil(retry_after)))))
        if retry_after is None or retry_after > RETRY_SECONDS:
            headers.append(("x-should-retry", "false"))
        super().__init__(text, headers)
        self.status = RUN_STATUS.get(code, 500)
        self.code = code


class RunFailed(Exception):
    """The outcome of a run that did not succeed.
    code: a key of RUN_ERRORS. The text is for the caller. is_cut: it broke off an answer.
    resets_at: when a used-up limit resets (epoch seconds), if reported.
    is_of_model: the limit, or the overload, is of one model; other models may run.
    is_answered: the API did answer, or was silent: perhaps because of the request."""

    def __init__(self, code: str, text: str, resets_at: Optional[float] = None,
                 is_of_model: bool = False, is_answered: bool = False,
                 is_cut: bool = False) -> None:
        super().__init__(text)
        self.code = code
        self.resets_at = resets_at
        self.is_of_model = is_of_model
        self.is_answered = is_answered
        self.is_cut = is_cut


class CannotStart(Exception):
    """The bridge or a command cannot start: what happened, and a hint what to do."""

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint


class DatabaseCorrupt(CannotStart):
    """The file is not a database, or is corrupt."""


class CannotTunnel(CannotStart):
    """No retry can bring a public address."""


def retry_later(kind: Type[BridgeError], text: str, seconds: float, **extra: Any) -> BridgeError:
    """Return an error with Retry-After."""
    wait = max(1, math.ceil(seconds))
    return kind(text, (("Retry-After", str(wait)),), retryAfter=wait, **extra)


def error_body(error: BridgeError) -> Dict[str, Any]:
    """Return the body of an error: {"error": "sentence", "code": "snake_case", ...extra}."""
    return {"error": str(error), "code": error.code, **error.extra}


# === 3 Common ====================================================================================
# Helpers without a subject of their own: JSON, time, text, secrets, rate limits and metrics.

JSON_LEVELS = 100
# Values in a body over 1 MiB: while the reader makes them, all threads wait; 100 bytes each.
JSON_VALUES = 200_000
# Also one that has no end.
JSON_STRING = re.compile('"[^"]*"?')
# One large value is decoded at a time. 1 MiB of JSON can be half a million objects, each of which
# takes far more memory than its text; a stored answer can have 10 MB.
_LARGE_VALUE_LOCK = threading.Lock()


@lru_cache(maxsize=256)
def camel_case(name: str) -> str:
    """Return systemPrompt for system_prompt."""
    head, *rest = name.split("_")
    return head + "".join(word.capitalize() for word in rest)


def as_json(value: Any) -> str:
    """Return compact JSON, readable in any script."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def large_json(value: Any, dump: Callable[[Any], str]) -> str:
    """Return the JSON of a value. The data of files, such as 20 MB in base64, needs no escapes and
    is put in as it is: while `dump` looks at each character, all other threads wait."""
    texts: List[str] = []
    # Nobody can guess what stands for a text.
    mark = uuid.uuid4().hex

    def replace_plain(part: Any) -> Any:
        if isinstance(part, str):
            is_plain = (len(part) > LARGE_BYTES and part.isascii() and part.isprintable()
                        and '"' not in part and "\\" not in part)
            if not is_plain:
                return part
            texts.append(part)
            return "%s-%d-" % (mark, len(texts) - 1)
        if isinstance(part, dict):
            return {name: replace_plain(item) for name, item in part.items()}
        return list(map(replace_plain, part)) if isinstance(part, (list, tuple)) else part

    text = dump(replace_plain(value))
    return re.sub(mark + r"-(\d+)-", lambda match: texts[int(match[1])], text) if texts else text


def without_none(body: Mapping[str, Any]) -> Dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def without_escapes(text: str) -> str:
    """Return JSON in which each quotation mark begins or ends a text."""
    return text.replace("\\\\", "").replace('\\"', "")


def nests_too_deeply(text: str) -> bool:
    """Return whether lists and objects of JSON nest in more than JSON_LEVELS levels. The reader
    needs a part of its thread's stack for each, so this looks at the text."""
    if text.count("[") + text.count("{") <= JSON_LEVELS:
        return False
    brackets = re.sub(r"[^][{}]+", "", JSON_STRING.sub("", without_escapes(text)))
    levels = accumulate(1 if bracket in "[{" else -1 for bracket in brackets)
    return max(levels, default=0) > JSON_LEVELS


def has_too_many_values(text: str) -> bool:
    """Return whether a large JSON text has more than JSON_VALUES values."""
    if len(text) <= BODY_BYTES or sum(map(text.count, ",[{")) <= JSON_VALUES:
        return False
    text = without_escapes(text)
    # A value has a name and a text at most; with fewer texts, removing them is cheap.
    return text.count('"') > 4 * JSON_VALUES or (
        sum(map(JSON_STRING.sub("", text).count, ",[{")) > JSON_VALUES)


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError("%s is not JSON" % word[:40])


def _finite_float(word: str) -> float:
    number = float(word)
    if math.isinf(number):
        _refuse_constant(word)
    return number


class SpooledBody:
    """A large body on the disk, until it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self) -> bytes:
        """Return it, and delete the file; call this once."""
        with self._file:
            self._file.seek(0)
            return self._file.read()


def parse_json(body: Union[bytes, SpooledBody]) -> Any:
    """Return the value in a body. Raises InvalidJson with the position of the error."""
    is_large = isinstance(body, SpooledBody) or len(body) > 1 << 16
    try:
        with _LARGE_VALUE_LOCK if is_large else contextlib.nullcontext():
            # The bytes are dropped before the text is read.
            data = [body.read() if isinstance(body, SpooledBody) else body]
            text = data.pop().decode("utf-8-sig")
            if nests_too_deeply(text):
                raise RecursionError
            if has_too_many_values(text):
                raise InvalidJson("Body has more than %d values" % JSON_VALUES)
            return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
    except UnicodeDecodeError as error:
        raise InvalidJson(
            "Body is not valid UTF-8 (byte %d). Send JSON encoded as UTF-8" % error.start) from None
    except RecursionError:
        raise InvalidJson("Body is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise InvalidJson("Body is not valid JSON: %s" % error) from None


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which UTF-8 and SQLite cannot hold, by U+FFFD, as the CLI does."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def redact(text: str) -> str:
    """Cut tokens and keys to their first letters, for logs and errors."""
    secret = r"(cab-[0-9a-f]{4}|sk-ant-[A-Za-z0-9]{2,8})[A-Za-z0-9_-]{8,}"
    return re.sub(secret, r"\1...", text)


def escape_controls(text: str, keep: str = "\n") -> str:
    """Replace control characters, which could move a cursor or forge lines, by `?`."""
    def escape(match: "re.Match[str]") -> str:
        return match.group() if match.group() in keep else "?"

    return re.sub(r"[\x00-\x1f\x7f-\x9f]", escape, text)


def iso_time(moment: Optional[float]) -> Optional[str]:
    """Return 2026-01-31T12:00:00.000Z for epoch seconds."""
    if moment is None:
        return None
    text = datetime.fromtimestamp(moment, timezone.utc).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def day_of(moment: float) -> str:
    """Return 2026-01-31 (UTC) for epoch seconds."""
    return str(iso_time(moment))[:10]


def local_day_of(seconds: float) -> str:
    """Return the local date, which the CLI sends to the API."""
    return datetime.fromtimestamp(seconds).date().isoformat()


def number_or_none(value: Any) -> Optional[float]:
    """Return a number that can be a moment or a share; None for anything else, such as NaN."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value < 1e11 else None


def new_token() -> str:
    return "cab-" + secrets.token_hex(32)


# Source: Standard Webhooks 1.0.0.
SECRET_PREFIX = "whsec_"


def new_callback_secret() -> str:
    """Return a secret that signs callbacks, in the form of Standard Webhooks."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(24)).decode()


def digest(secret: str) -> str:
    """Return SHA-256 in hex: how a token is stored and looked up, as the Node original did."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


class LogFormatter(logging.Formatter):
    """Formats a record as `12:00:00 level: text`, without the level for plain information. Secrets
    are cut and control characters are replaced, in tracebacks, too."""

    def __init__(self) -> None:
        super().__init__("%(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else record.levelname.lower() + ": "
        text = escape_controls(redact(super().format(record)))
        return "%s %s%s" % (self.formatTime(record, self.datefmt), level, text)


class TokenBucket:
    """A rate limit: `capacity` at once, refilled at `capacity` a minute; 0: none. Any thread."""

    def __init__(self, clock: Clock, capacity: int) -> None:
        self.capacity = capacity
        self._clock = clock
        self._level = float(capacity)
        self._refilled_at = clock.monotonic()
        self._lock = threading.Lock()

    def try_consume(self) -> float:
        """Take one request. -> 0, or the seconds until the next one is available."""
        if not self.capacity:
            return 0.0
        with self._lock:
            self._refill()
            if self._level >= 1:
                self._level -= 1
                return 0.0
            return (1 - self._level) * 60 / self.capacity

    def headers(self) -> Tuple[Tuple[str, str], ...]:
        """Return the RateLimit fields of draft-ietf-httpapi-ratelimit-headers-06."""
        if not self.capacity:
            return ()
        with self._lock:
            self._refill()
            level = self._level
        return (("RateLimit-Policy", "%d;w=60" % self.capacity),
                ("RateLimit-Limit", str(self.capacity)), ("RateLimit-Remaining", str(int(level))),
                ("RateLimit-Reset", str(math.ceil((self.capacity - level) * 60 / self.capacity))))

    def _refill(self) -> None:
        now = self._clock.monotonic()
        refill = max(0.0, now - self._refilled_at) * self.capacity / 60
        self._level = min(self.capacity, self._level + refill)
        self._refilled_at = now


class Metric(NamedTuple):
    """A row of /metrics. kind: counter, gauge or histogram (of seconds)."""
    name: str
    kind: str
    labels: str
    doc: str


METRICS = (
    Metric("cab_info", "gauge", "version, claude", "always 1; the versions of bridge and claude"),
    Metric("cab_start_time_seconds", "gauge", "", "start of the bridge and its counters, epoch"),
    Metric("cab_http_responses_total", "counter", "status", "HTTP answers by status"),
    Metric("cab_requests_accepted_total", "counter", "", "requests that were queued"),
    Metric("cab_requests_finished_total", "counter", "status, code", "finished, by status, code"),
    Metric("cab_queue_length", "gauge", "status", "requests that are queued or processing"),
    Metric("cab_wait_seconds", "histogram", "", "from a request's arrival to its first run"),
    Metric("cab_run_seconds", "histogram", "", "length of the runs that ended a request"),
    Metric("cab_tokens_total", "counter", "kind", "input, output, cache_read, cache_creation"),
    Metric("cab_cost_usd_total", "counter", "", "API prices, as claude estimates; not a bill"),
    Metric("cab_cli_starts_total", "counter", "", "processes of claude that were started"),
    Metric("cab_spare_total", "counter", "result",
           "new conversations on an idle process (hit) or not (miss)"),
    Metric("cab_callbacks_total", "counter", "result",
           "attempts to send a result: delivered, failed (it is repeated), given_up"),
    Metric("cab_spares", "gauge", "", "idle processes that are ready now"),
    Metric("cab_waiting", "gauge", "", "processes that wait for the next turn of a conversation"),
    Metric("cab_resting", "gauge", "", "1 while the queue waits, whatever for"),
    Metric("cab_held", "gauge", "reason", "1 for what requests wait for, at least of one model"),
    Metric("cab_plan_utilization", "gauge", "window", "used share of a limit of the plan, 0 to 1"),
    Metric("cab_plan_resets_at_seconds", "gauge", "window", "when that limit resets, epoch"),
    Metric("cab_access_tokens", "gauge", "", "access tokens that exist"),
    Metric("cab_tunnel_up", "gauge", "", "1 while the public address works"),
    Metric("cab_tunnel_state", "gauge", "state", "1 for the state of the tunnel"),
    Metric("cab_tunnel_starts_total", "counter", "", "starts of cloudflared"))
HISTOGRAM_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
Labels = Tuple[Tuple[str, str], ...]
# Runs whose latencies are remembered.
LATENCIES = 1_000


class Latency(NamedTuple):
    """How long a request waited for its run, and then for the first text; in seconds.
    began_at: when the run began, in epoch seconds. owner: the id of its token."""
    began_at: float
    owner: str
    waiting: float
    first_text: Optional[float]


def percentile(values: Iterable[float], share: float) -> Optional[float]:
    """Return the smallest value that so many of all do not exceed; None without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


class Metrics:
    """The counters and histograms of /metrics. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: Dict[Tuple[str, Labels], float] = {}
        self._latencies: Deque[Latency] = deque(maxlen=LATENCIES)

    def inc(self, name: str, amount: float = 1, **labels: str) -> None:
        key = name, tuple(labels.items())
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def observe(self, name: str, seconds: float) -> None:
        """Add one value to a histogram."""
        for bound in HISTOGRAM_SECONDS:
            self.inc(name + "_bucket", seconds <= bound, le="%g" % bound)
        self.inc(name + "_bucket", le="+Inf")
        self.inc(name + "_sum", seconds)
        self.inc(name + "_count")

    def record_latency(self, latency: Latency) -> None:
        with self._lock:
            self._latencies.append(latency)

    def latencies(self, since: float, owner: Optional[str] = None) -> List[Latency]:
        """Return those of the last runs that began after a time. owner: only this token's."""
        with self._lock:
            latencies = [*self._latencies]
        return [latency for latency in latencies
                if latency.began_at > since and owner in (None, latency.owner)]

    def values(self) -> Dict[Tuple[str, Labels], float]:
        with self._lock:
            return dict(self._values)


def metrics_text(values: Mapping[Tuple[str, Labels], float]) -> str:
    """Return the text format of Prometheus, in the order of METRICS."""
    escapes = {"\n": "\\n", '"': '\\"', "\\": "\\\\"}

    def line(name: str, labels: Labels, value: float) -> str:
        pairs = ['%s="%s"' % (label, re.sub(r'[\\"\n]', lambda match: escapes[match.group()], text))
                 for label, text in labels]
        shown = "%d" % value if value % 1 == 0 else repr(value)
        return "%s%s %s\n" % (name, "{%s}" % ",".join(pairs) if pairs else "", shown)

    text = ""
    for metric in METRICS:
        text += "# HELP %s %s\n# TYPE %s %s\n" % (
            metric.name, metric.doc, metric.name, metric.kind)
        for suffix in ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",):
            text += "".join(line(name, labels, value) for (name, labels), value in values.items()
                            if name == metric.name + suffix)
    return text


# === 4 Records and bodies ========================================================================
# The words and records that the rooms exchange, and the bodies that callers send. Pure. A validator
# returns the value as the program uses it, or raises InvalidRequest.

MESSAGE_BYTES = 32_768
SYSTEM_PROMPT_BYTES = 32_768
NAME_CHARACTERS = 100
TOOL_RULES = 50
TOKEN_MODELS = 20
EFFORTS = ("low", "medium", "high", "xhigh", "max")
EXPIRY_DAYS = 3_650
# Stands for every model; no model has this name.
ALL_MODELS = "*"


class JobStatus:
    """The four states of a job; the same words on the wire."""
    QUEUED = "queued"
    PROCESSING = "processing"
    COMPLETED = "completed"
    ERROR = "error"
    FINISHED = (COMPLETED, ERROR)
    UNFINISHED = (QUEUED, PROCESSING)
    ALL = (QUEUED, PROCESSING, COMPLETED, ERROR)


class SessionMode:
    """Whether the requests of a token share a memory."""
    STATELESS = "stateless"
    STATEFUL = "stateful"


class Tools:
    """The named levels of tool use; a list of Claude Code rules is the fifth choice."""
    NONE = "none"
    READ = "read"
    WEB = "web"
    ALL = "all"
    LEVELS = (NONE, READ, WEB, ALL)


# --- validators ---

Validator = Callable[[Any], Any]


def max_bytes(name: str, limit: int) -> Validator:
    """Return a validator for an optional text of at most `limit` bytes."""
    def validate(value: Any) -> Optional[str]:
        if value is None:
            return None
        if not isinstance(value, str):
            raise InvalidRequest("%s must be a string" % name)
        text = replace_surrogates(value)
        if len(text.encode()) > limit:
            raise InvalidRequest("%s exceeds %d byte limit" % (name, limit))
        return text or None

    return validate


def matching(pattern: str, advice: str) -> Validator:
    """Return a validator for an optional text that matches the whole pattern."""
    def validate(value: Any) -> Optional[str]:
        if value is None:
            return None
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise InvalidRequest(advice)
        return value

    return validate


def one_of(choices: Sequence[Any], advice: str) -> Validator:
    """Return a validator for an optional value out of `choices`; 7.0 is 7, but True is not 1."""
    def validate(value: Any) -> Any:
        for choice in (None, *choices):
            if value == choice and isinstance(value, bool) == isinstance(choice, bool):
                return choice
        raise InvalidRequest(advice)

    return validate


def integer(name: str, minimum: int, maximum: int) -> Validator:
    """Return a validator for an optional whole number, from JSON or from the text of a query."""
    def validate(value: Any) -> Optional[int]:
        if value is None:
            return None
        text = str(value)
        if isinstance(value, float) and value.is_integer():
            text = "%d" % value
        if not re.fullmatch("[0-9]{1,9}", text) or not minimum <= int(text) <= maximum:
            raise InvalidRequest(
                "%s must be a whole number from %d to %d" % (name, minimum, maximum), field=name)
        return int(text)

    return validate


def boolean(name: str) -> Validator:
    """Return a validator for an optional true or false."""
    validate = one_of((True, False), "%s must be true or false" % name)
    return lambda value: bool(validate(value))


validate_offset = integer("after", 0, 999_999_999)
validate_model_name = matching(r"[A-Za-z0-9][A-Za-z0-9._:/@\[\]-]{0,127}",
                               "model must be an alias or a full model name, such as haiku")
validate_message_bytes = max_bytes("Message", MESSAGE_BYTES)
validate_attachment_name = max_bytes("the name of an attachment", 200)


def validate_message(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequest("message field is required (string)")
    if not value.strip():
        raise InvalidRequest("message must not be blank")
    return str(validate_message_bytes(value))


def validate_model(value: Any) -> Optional[str]:
    """Return a model's name; None for `default`, which the CLI does not resolve for an agent."""
    name = validate_model_name(value)
    return None if name == "default" else name


def validate_schema(value: Any) -> Optional[str]:
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("type", "object") != "object":
        raise InvalidRequest("jsonSchema must be a JSON Schema of an object")
    return replace_surrogates(as_json({"type": "object", **value}))


def validate_wait(value: Any) -> float:
    """Return seconds, from a JSON number or from the text of a query."""
    if value is None:
        return 0.0
    seconds = -1.0
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
        seconds = float(value)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = value
    if not 0 <= seconds <= WAIT_SECONDS:
        raise InvalidRequest(
            "wait must be a number of seconds from 0 to %d" % WAIT_SECONDS, field="wait")
    return float(seconds)


def validate_models(value: Any) -> Optional[Tuple[str, ...]]:
    """Return the models that a token may use; None for no limit."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not 0 < len(value) <= TOKEN_MODELS:
        raise InvalidRequest("models must be a list of 1 to %d model names, or null" % TOKEN_MODELS)
    return tuple(str(validate_model_name("" if name is None else name)) for name in value)


def validate_idempotency_key(value: Optional[str]) -> Optional[str]:
    if value is not None and not 1 <= len(value) <= 200:
        raise InvalidRequest(
            "Idempotency-Key must have 1 to 200 characters", field="Idempotency-Key")
    return value


def validate_statuses(value: Optional[str]) -> Tuple[str, ...]:
    """Return the statuses of a query, which are separated by commas; () for all."""
    statuses = tuple(dict.fromkeys(value.split(","))) if value else ()
    if not set(statuses) <= set(JobStatus.ALL):
        raise InvalidRequest(
            "status must be one or more of: " + ", ".join(JobStatus.ALL), field="status")
    return statuses


def validate_since(value: Optional[str]) -> float:
    """Return epoch seconds for 2026-01-31, 2026-01-31T12:00:00Z or another ISO time; 0 for none."""
    if not value:
        return 0.0
    try:
        # Before 3.11, Z and other than 3 or 6 digits were refused.
        moment = datetime.fromisoformat(re.sub(r"\.\d+|Z$", "", value))
        return max(0.0, moment.replace(tzinfo=moment.tzinfo or timezone.utc).timestamp())
    except (ValueError, OverflowError):
        raise InvalidRequest("since must be a time such as 2026-01-31T12:00:00Z",
                             field="since") from None


def validate_token_name(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidRequest("Token name is required")
    if len(value) > NAME_CHARACTERS:
        raise InvalidRequest("Token name must be %d characters or less" % NAME_CHARACTERS)
    return replace_surrogates(value.strip())


def validate_session_mode(value: Any) -> str:
    modes = (SessionMode.STATEFUL, SessionMode.STATELESS)
    validate = one_of(modes, 'sessionMode must be "stateful" or "stateless"')
    return validate(value or None) or SessionMode.STATELESS


TOOL_RULE_RE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}(\([^()\x00-\x1f\"\ud800-\udfff]{1,200}\))?")


# Of Claude Code 2.1.197 to 2.1.332. A name that is like none of them may be a newer one's.
CLAUDE_TOOLS = (
    "Agent AskUserQuestion Bash BashOutput Edit EnterPlanMode EnterWorktree ExitPlanMode"
    " ExitWorktree Glob Grep KillShell LS Monitor MultiEdit NotebookEdit NotebookRead Read Skill"
    " SlashCommand Task TaskCreate TaskGet TaskList TaskOutput TaskStop TaskUpdate TodoRead"
    " TodoWrite ToolSearch WebFetch WebSearch Write").split()


def check_tool_name(name: str) -> None:
    """Raise InvalidRequest for a typo, whose rule would allow nothing."""
    meant = closest(name, [*CLAUDE_TOOLS, *Tools.LEVELS])
    if name not in CLAUDE_TOOLS and "__" not in name and (meant or name[0].islower()):
        raise InvalidRequest(
            'tools: Claude Code has no tool "%s"%s. Levels: none, read, web, all; rules: such as'
            ' Read or Bash(git log:*)' % (name, ' (did you mean "%s"?)' % meant if meant else ""))


def check_tool_rule(rule: Any) -> None:
    """Raise InvalidRequest for what is no rule of a list."""
    if rule in Tools.LEVELS:
        raise InvalidRequest(
            'tools: the level "%s" stands alone; in a list, name the tools: Read, Glob, Grep (what'
            ' read has), WebFetch, WebSearch (web)' % rule)
    if not isinstance(rule, str) or not TOOL_RULE_RE.fullmatch(rule):
        shown = replace_surrogates(str(rule))[:100]
        raise InvalidRequest('tools: "%s" is no rule such as Read or Bash(git log:*)' % shown)
    check_tool_name(rule.partition("(")[0])


def validate_tools(value: Any) -> Union[str, Tuple[str, ...]]:
    """Return a level, or a tuple of Claude Code rules such as "Read" or "Bash(git log:*)"."""
    if value is None:
        return Tools.NONE
    if isinstance(value, str) and value in Tools.LEVELS:
        return value
    if isinstance(value, (list, tuple)) and 0 < len(value) <= TOOL_RULES:
        for rule in value:
            check_tool_rule(rule)
        return tuple(value)
    raise InvalidRequest(
        'tools must be "none", "read", "web", "all" or a list of 1 to %d rules such as "Read" or'
        ' "Bash(git log:*)"' % TOOL_RULES)


# --- callbacks: where a client wants its result sent ---
# The last label of a name begins with a letter, because the resolver would take 2130706433 or
# 127.1 for an address. No user name, fragment, zone or backslash; other alphabets come as xn--.
CALLBACK_URL_RE = re.compile(
    r"(?ai)(https?)://"
    r"(?:\[([0-9a-f:.]{2,45})\]|([0-9.]{7,15})|((?:[a-z0-9_-]{1,63}\.)*[a-z][a-z0-9_-]{0,62}))"
    r"(?::(\d{1,5}))?(/[a-z0-9._~:/@!$&'()*+,;=%-]*)?(\?[a-z0-9._~:/?@!$&'()*+,;=%-]*)?")
CALLBACK_URL_CHARACTERS = 2_000
IPAddress = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]


def ip_networks(text: str) -> List[Union[ipaddress.IPv4Network, ipaddress.IPv6Network]]:
    return [ipaddress.ip_network(word) for word in text.split()]


# `is_global` is not enough: before 3.13 it is true for 192.0.0.8 and 2002::/16, in 3.13 for
# multicast and 64:ff9b::/96. Source: IANA's registries of special-purpose addresses.
PRIVATE_NETWORKS = ip_networks(
    "127.0.0.0/8 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 100.64.0.0/10 ::1/128 fc00::/7")
# Never a receiver. 169.254.0.0/16, 100.100.100.200 and fd00:ec2::254 are services of clouds that
# hand out credentials. 2001::/23 and 2002::/16 may hold an IPv4 address.
REFUSED_NETWORKS = ip_networks(
    "0.0.0.0/8 169.254.0.0/16 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 198.18.0.0/15"
    " 100.100.100.200/32 fd00:ec2::254/128 198.51.100.0/24 203.0.113.0/24 224.0.0.0/3"
    " 2001::/23 2001:db8::/32 2002::/16 3fff::/20")
GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")


def is_allowed_address(address: IPAddress, allow_private: bool) -> bool:
    """Return whether a callback may connect to the address."""
    if any(address in network for network in REFUSED_NETWORKS):
        return False
    if any(address in network for network in PRIVATE_NETWORKS):
        return allow_private
    return address.version == 4 or address in GLOBAL_IPV6


class CallbackUrl(NamedTuple):
    """A checked address. host: lower case, without brackets. target: path and query."""
    is_https: bool
    host: str
    port: int
    target: str

    @property
    def host_and_port(self) -> str:
        return "%s:%d" % ("[%s]" % self.host if ":" in self.host else self.host, self.port)

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        is_usual = self.port == (443 if self.is_https else 80)
        return self.host_and_port.rpartition(":")[0] if is_usual else self.host_and_port

    def is_allowed_literal(self, allow_private: bool) -> bool:
        """Return whether the host is a name, or an address to which a callback may go."""
        try:
            return is_allowed_address(ipaddress.ip_address(self.host), allow_private)
        except ValueError:
            return True

    @classmethod
    def parse(cls, text: str) -> "CallbackUrl":
        """Read a URL; the name is not looked up. Raises InvalidRequest."""
        match = CALLBACK_URL_RE.fullmatch(text[: CALLBACK_URL_CHARACTERS + 1])
        if not match or len(text) > CALLBACK_URL_CHARACTERS:
            raise InvalidRequest(
                "callback must be a URL of at most %d ASCII characters, such as"
                " https://example.com/hook, without user name and fragment"
                % CALLBACK_URL_CHARACTERS)
        scheme, ipv6, ipv4, name, port, path, query = match.groups()
        try:
            host = name.lower() if name else str(ipaddress.ip_address(ipv6 or ipv4))
        except ValueError:
            raise InvalidRequest("callback contains an invalid IP address") from None
        is_https = scheme.lower() == "https"
        number = int(port) if port else 443 if is_https else 80
        if not 1 <= number <= 65_535 or len(host) > 253:
            raise InvalidRequest("callback contains an invalid port or host name")
        return cls(is_https, host, number, (path or "/") + (query or ""))


def validate_callback(value: Any) -> Optional[str]:
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidRequest("callback must be a URL")
    CallbackUrl.parse(value)
    return value


def validate_callbacks(value: Any) -> Union[bool, Tuple[str, ...]]:
    """Return whether a token may name callbacks, or to which hosts."""
    if value is None or isinstance(value, bool):
        return bool(value)
    hosts = []
    for host in value if isinstance(value, (list, tuple)) else ():
        with contextlib.suppress(InvalidRequest):
            url = CallbackUrl.parse("https://%s/" % host if isinstance(host, str) else "")
            if url.target == "/" and url.is_allowed_literal(allow_private=True):
                has_port = re.search(r"(?a)[^:]:\d+$|\]:\d+$", host)
                hosts.append(url.host_and_port if has_port else url.host)
                continue
        hosts = []
        break
    if 0 < len(hosts) <= TOKEN_MODELS:
        return tuple(hosts)
    raise InvalidRequest(
        "callbacks must be true, false or a list of 1 to %d hosts, such as bots.example.com or"
        " 192.168.1.5:8080" % TOKEN_MODELS)


# --- bodies of the native API ---
def body_field(validate: Validator, kind: str, doc: str, example: Any, default: Any = None) -> Any:
    """Return a field of a Command: its validator and its documentation."""
    metadata = {"validate": validate, "kind": kind, "doc": doc, "example": example}
    return field(default=default, metadata=metadata)


class Command:
    """A request body. Subclasses are dataclasses whose fields `body_field` makes."""

    @classmethod
    def parse(cls, body: Any) -> Tuple[Any, List[str]]:
        """Read a JSON body. -> (the command, warnings). Raises InvalidRequest with `field`."""
        remaining = dict(body) if isinstance(body, dict) else {}
        values = {}
        for row in fields(cls):  # type: ignore[arg-type]
            name = camel_case(row.name)
            try:
                values[row.name] = row.metadata["validate"](remaining.pop(name, None))
            except InvalidRequest as error:
                error.extra.setdefault("field", name)
                raise
        warnings = ["unknown field '%s' ignored" % replace_surrogates(name)[:64]
                    for name in list(remaining)[:10]]
        return cls(**values), warnings


# What a block of the Messages API calls them.
ATTACHMENT_KINDS = {
    "image/png": "image", "image/jpeg": "image", "image/gif": "image", "image/webp": "image",
    "application/pdf": "document", "text/plain": "document"}
MAX_ATTACHMENTS = 20
ATTACHMENTS_ADVICE = (
    'attachments must be a list of at most %d objects such as {"name": "photo.png", "mediaType":'
    ' "image/png", "data": "iVBORw0..."}' % MAX_ATTACHMENTS)


class Attachment(NamedTuple):
    """A file of a message. data: base64, of a text the text itself."""
    name: str
    media_type: str
    data: str

    @property
    def block(self) -> Dict[str, Any]:
        """Return it as a block of the Messages API."""
        kind = "text" if self.media_type == "text/plain" else "base64"
        source = {"type": kind, "media_type": self.media_type, "data": self.data}
        block = {"type": ATTACHMENT_KINDS[self.media_type], "source": source}
        return {**block, "title": self.name} if block["type"] == "document" else block

    @property
    def summary(self) -> Dict[str, Any]:
        """Return what lists show of it."""
        size = len(self.data.encode())
        if self.media_type != "text/plain":
            size = len(base64.b64decode(self.data))
        return {"name": self.name, "mediaType": self.media_type, "bytes": size}


def read_attachment(value: Any) -> Attachment:
    """Read an element of `attachments`. Raises InvalidRequest."""
    entry = value if isinstance(value, dict) else {}
    media_type, data = entry.get("mediaType"), entry.get("data")
    name = validate_attachment_name(entry.get("name")) or "file"
    if not isinstance(media_type, str) or not isinstance(data, str) or not data:
        raise InvalidRequest(ATTACHMENTS_ADVICE)
    if media_type not in ATTACHMENT_KINDS:
        raise InvalidRequest(
            "mediaType of an attachment must be one of: " + ", ".join(ATTACHMENT_KINDS))
    try:
        content = base64.b64decode(data, validate=True)
        # A text is no base64 for the API.
        data = content.decode() if media_type == "text/plain" else data
    except ValueError:
        text = "data of the attachment %s must be base64" % name
        if media_type == "text/plain":
            text += " of a text in UTF-8"
        raise InvalidRequest(text) from None
    if not content.strip():
        raise InvalidRequest("the attachment %s is empty" % name)
    return Attachment(name, media_type, data)


def validate_attachments(value: Any) -> Tuple[Attachment, ...]:
    """Return the files of a message, whose data is in base64."""
    if not isinstance(value, (list, type(None))) or len(value or ()) > MAX_ATTACHMENTS:
        raise InvalidRequest(ATTACHMENTS_ADVICE)
    return tuple(map(read_attachment, value or ()))


@dataclass(frozen=True)
class Ask(Command):
    """A message for Claude."""
    message: str = body_field(
        validate_message, "string", "the question; 1 to 32,768 bytes of UTF-8",
        "Why is the sky blue?", default="")
    model: Optional[str] = body_field(
        validate_model, "string",
        "alias or full name of a model; default: the model that claude would use", "haiku")
    system_prompt: Optional[str] = body_field(
        max_bytes("systemPrompt", SYSTEM_PROMPT_BYTES), "string",
        "instructions for the model, up to 32,768 bytes", "Answer in one sentence.")
    json_schema: Optional[str] = body_field(
        validate_schema, "object",
        "JSON Schema that the answer must satisfy; it comes back as `structured`",
        {"type": "object", "properties": {"answer": {"type": "string"}}})
    conversation: Optional[str] = body_field(
        matching(r"[A-Za-z0-9._-]{1,64}",
                 "conversation must be 1 to 64 letters, digits, dots, dashes or underscores"),
        "string", "stateful tokens: the conversation to continue; default: `default`",
        "trip-to-rome")
    effort: Optional[str] = body_field(
        one_of(EFFORTS, "effort must be one of: " + ", ".join(EFFORTS)), "string",
        "how hard to think: " + ", ".join(EFFORTS), "low")
    wait: float = body_field(
        validate_wait, "number", "seconds to wait for the result, 0 to 90", 30, default=0.0)
    stream: bool = body_field(
        boolean("stream"), "boolean", "answer at once with Server-Sent Events; see Streaming", True,
        default=False)
    attachments: Tuple[Attachment, ...] = body_field(
        validate_attachments, "array",
        "images (PNG, JPEG, GIF, WebP), PDFs and texts, each as base64; the whole body may have"
        " 1 MiB",
        [{"name": "photo.png", "mediaType": "image/png", "data": "iVBORw0KGgo..."}], default=())
    callback: Optional[str] = body_field(
        validate_callback, "string",
        "tokens with `callbacks`: where to send the result when it is there; see Callbacks",
        "https://example.com/hook")

    def columns(self) -> Dict[str, str]:
        """Return the columns of its job that other requests do not have."""
        if not self.attachments:
            return {}
        return {"attachments": as_json([file.summary for file in self.attachments]),
                "attachment_data": as_json([file.block for file in self.attachments])}

    @property
    def fingerprint(self) -> str:
        """Equal for requests that ask the same, however they want the answer delivered."""
        names = [row.name for row in fields(self) if row.name not in ("wait", "stream")]
        for name in ("callback", "attachments"):
            if not getattr(self, name):
                # As before there were any.
                names.remove(name)
        return digest(as_json([getattr(self, name) for name in names]))


@dataclass(frozen=True)
class TokenUpdate(Command):
    """What may be changed of a token."""
    name: str = body_field(validate_token_name, "string",
                           "what the token is for; 1 to 100 characters", "my-app", default="")
    expires_in_days: Optional[int] = body_field(
        integer("expiresInDays", 1, EXPIRY_DAYS), "number", "days from now on, or null (never)", 30)
    requests_per_minute: Optional[int] = body_field(
        integer("requestsPerMinute", 1, 10_000), "number",
        "maximum of requests within 60 seconds, or null", 10)
    requests_per_day: Optional[int] = body_field(
        integer("requestsPerDay", 1, 1_000_000), "number",
        "maximum of requests within a day (UTC), or null", 200)
    models: Optional[Tuple[str, ...]] = body_field(
        validate_models, "array",
        "the models it may use, or null for all; the first is its default", ["haiku", "sonnet"])

    def changes(self, body: Mapping[str, Any], now: float) -> Dict[str, Any]:
        """Return the fields of a Token that a body names, with their values. Raises
        InvalidRequest."""
        days = self.expires_in_days
        columns = {
            "name": ("name", self.name),
            "expiresInDays": ("expires_at", None if days is None else now + days * 86_400),
            "requestsPerMinute": ("requests_per_minute", self.requests_per_minute),
            "requestsPerDay": ("requests_per_day", self.requests_per_day),
            "models": ("models", as_json(self.models))}
        changes = dict(columns[name] for name in columns if name in body)
        if not changes:
            raise InvalidRequest("There is nothing to change; name one of: " + ", ".join(columns))
        return changes


@dataclass(frozen=True)
class NewToken(TokenUpdate):
    """A token to create."""
    session_mode: str = body_field(validate_session_mode, "string",
                                   "`stateless` (default) or `stateful`: requests share a memory",
                                   "stateless", default=SessionMode.STATELESS)
    admin: bool = body_field(boolean("admin"), "boolean",
                             "may manage tokens and read every request", False, default=False)
    tools: Union[str, Tuple[str, ...]] = body_field(
        validate_tools, "string or array",
        "`none` (default), `read`, `web`, `all` or a list of rules", "read", default=Tools.NONE)
    callbacks: Union[bool, Tuple[str, ...]] = body_field(
        validate_callbacks, "boolean or array",
        "may name callbacks: `true` for any public address, or a list of hosts, which may be"
        " private", ["bots.example.com"], default=False)


# --- a conversation of /v1 ---

# What a client wants of the model's thinking.
SHOWN, OFF = "shown", "off"
# A content block of the Messages API, such as {"type": "text", "text": "..."}.
Block = Mapping[str, Any]
Content = Union[str, Sequence[Block]]


# Of the earlier input and output that `previous_response_id` puts in front.
CONVERSATION_CHARACTERS = 4 << 20


class ResponseRequest(NamedTuple):
    """What a request of /v1/responses has beyond its Chat.
    settings: what the answer repeats of it, such as `tools` and `metadata`.
    messages: its own input: (role, content); the role is user, assistant, system, or tools, whose
    content is a list of them.
    previous: the id of the job that it continues, or "". is_stored: whether it can be continued."""
    settings: Mapping[str, Any]
    messages: Sequence[Tuple[str, Content]]
    previous: str = ""
    is_stored: bool = True

    def columns(self) -> Dict[str, str]:
        """Return the columns of the job that ResponseStore reads."""
        if not self.is_stored:
            return {}
        settings = replace_surrogates(as_json(self.settings))
        if len(settings) > CONVERSATION_CHARACTERS:
            return {}
        columns = {"response_settings": settings}
        text = as_json({"previous": self.previous, "messages": self.messages})
        if len(text) + len(settings) <= CONVERSATION_CHARACTERS:
            columns["response_input"] = replace_surrogates(text)
        return columns


@dataclass(frozen=True)
class Chat:
    """A conversation received through /v1, in any of its formats.
    turns: [{"role": "user", "content": [Block, ...]}, ...]; user and assistant alternate, the last
    turn is the user's.
    client_tools: [{"name", "description", "inputSchema"}]; "title": the client's own name, if the
    API would not take it.
    forced_tool: the client's tool whose input is to be the answer.
    max_tokens: of the answer. thinking: SHOWN, OFF, or None if Claude decides and keeps it for
    itself. prefill: blocks of the answer's beginning, which it continues. hosted_tools: of the
    server, that the client asked for.
    custom_tools: the names of those whose input and output is a text. uses_functions: the client
    knows functions, which preceded tools.
    include_usage: whether a stream ends with the figures.
    api: "anthropic", "openai" or "responses". response_request: of the last one."""
    turns: Tuple[Mapping[str, Any], ...]
    system_prompt: Optional[str] = None
    model: Optional[str] = None
    json_schema: Optional[str] = None
    effort: Optional[str] = None
    client_tools: Tuple[Mapping[str, Any], ...] = ()
    forced_tool: Optional[str] = None
    stop_sequences: Tuple[str, ...] = ()
    max_tokens: Optional[int] = None
    thinking: Optional[str] = None
    prefill: Tuple[Block, ...] = ()
    hosted_tools: Tuple[str, ...] = ()
    custom_tools: Tuple[str, ...] = ()
    uses_functions: bool = False
    stream: bool = False
    include_usage: bool = True
    api: str = "anthropic"
    response_request: Optional[ResponseRequest] = None
    # Always None: the client keeps the memory.
    conversation: Optional[str] = None

    @property
    def message(self) -> str:
        """The last text, for lists of requests, where a long one would be too much."""
        content = self.turns[-1]["content"]
        texts = [block["text"] for block in content if block["type"] == "text"]
        return texts[-1][:MESSAGE_BYTES] if texts else "(%s)" % content[-1]["type"]

    def to_json(self) -> str:
        """Return what a Job has no columns for; stored beside it."""
        body = {
            "turns": self.turns, "functions": self.client_tools, "forced": self.forced_tool,
            "stops": self.stop_sequences, "maxTokens": self.max_tokens, "thinking": self.thinking,
            "prefill": self.prefill}
        return replace_surrogates(large_json(body, as_json))

    def without_messages(self) -> "Chat":
        """Return what is needed to write the answer; the messages are stored, and may be large."""
        request = self.response_request
        request = request and request._replace(messages=())
        return replace(self, turns=(), prefill=(), response_request=request)

    def columns(self) -> Dict[str, str]:
        """Return the columns of its job that other requests do not have."""
        stored = self.response_request.columns() if self.response_request else {}
        return {"chat": self.to_json(), "api": self.api, **stored}

    @classmethod
    def from_json(cls, text: str) -> "Chat":
        body = json.loads(text)
        return cls(tuple(body["turns"]), client_tools=tuple(body["functions"]),
                   forced_tool=body["forced"], stop_sequences=tuple(body["stops"]),
                   max_tokens=body.get("maxTokens"), thinking=body.get("thinking"),
                   prefill=tuple(body.get("prefill") or ()))


# --- records; times are epoch seconds ---
@dataclass(frozen=True)
class Token:
    """An access token and its rights."""
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
    callbacks: Union[bool, Tuple[str, ...]] = False

    def is_expired(self, now: float) -> bool:
        return self.expires_at is not None and self.expires_at <= now


class Usage(NamedTuple):
    """The tokens of one answer; `cost_usd` is the CLI's own estimate."""
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_creation_tokens: int = 0
    cost_usd: float = 0.0

    def plus(self, other: "Usage") -> "Usage":
        return Usage._make(map(sum, zip(self, other)))


class ToolCall(NamedTuple):
    """A call of a client's tool. arguments: a JSON object."""
    id: str
    name: str
    arguments: Mapping[str, Any]

    @property
    def block(self) -> Dict[str, Any]:
        """Return it as a block of the Messages API."""
        return {"type": "tool_use", "id": self.id, "name": self.name, "input": self.arguments}


class StopInfo(NamedTuple):
    """Why an answer ended, in the words of the Messages API.
    reason: end_turn, tool_use, stop_sequence, max_tokens, ...
    sequence: the stop sequence that ended it. calls: the client's tools that it calls.
    thinking: the blocks of what the model thought, if the client wants to know."""
    reason: str = "end_turn"
    sequence: Optional[str] = None
    calls: Tuple[ToolCall, ...] = ()
    thinking: Tuple[Block, ...] = ()


@dataclass(frozen=True)
class Job:
    """A request and its result.
    `structured`, `json_schema` and `attachments` (what lists show of them) are JSON texts.
    generation: counts how often the text restarted; a reader's offset is valid within one only.
    api: the wire format of a request of /v1, else None."""
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
    attachments: Optional[str] = None

    @property
    def is_finished(self) -> bool:
        return self.status in JobStatus.FINISHED


class JobFilter(NamedTuple):
    """Which jobs a list has. What is empty does not matter.
    text: occurs in the request or its answer, in any case. model: a part of its name.
    since: epoch seconds."""
    token_id: Optional[str] = None
    statuses: Tuple[str, ...] = ()
    conversation: Optional[str] = None
    text: str = ""
    model: str = ""
    error_code: str = ""
    since: float = 0.0

    @property
    def needs_search(self) -> bool:
        """Whether an index alone cannot find them."""
        return bool(self.text or self.model or self.error_code or self.since or (
            self.conversation and self.statuses))

    def matches(self, job: Job) -> bool:
        texts = (job.message, job.system_prompt, job.response, job.structured, job.error,
                 job.error_code, job.model, job.conversation)
        return ((not self.statuses or job.status in self.statuses)
                and self.error_code in ("", job.error_code)
                and self.model.casefold() in (job.model or "").casefold()
                and (not self.text or self.text.casefold() in "\n".join(
                    filter(None, texts)).casefold()))


class Callback(NamedTuple):
    """A result to send. attempts: that failed. secret: signs it. callbacks: the token's right."""
    job_id: str
    token_id: str
    url: str
    attempts: int
    secret: str
    callbacks: Union[bool, Tuple[str, ...]]


class EnqueueResult(NamedTuple):
    """A queued job.
    position: jobs that wait or run before it + 1, 0 when it is finished.
    is_new: False if an Idempotency-Key led to an earlier request."""
    job: Job
    position: int
    is_new: bool = True


class HistoryTurn(NamedTuple):
    """One completed turn of a conversation: texts, or lists of blocks."""
    message: Content
    response: Content


class Conversation(NamedTuple):
    """A conversation of a stateful token. turns: the completed ones."""
    name: str
    turns: int
    created_at: float
    last_used_at: float


class Session(NamedTuple):
    """Where a conversation continues.
    key: names its process; changes when the conversation is deleted.
    session_id: the CLI's, to resume, or None. spent_usd: its cost so far, as the CLI counts it."""
    key: str
    session_id: Optional[str] = None
    spent_usd: float = 0.0


class DayUsage(NamedTuple):
    """The usage of one token on one day (UTC), counted on the day of the request."""
    day: str
    token_id: str
    requests: int
    completed: int
    errors: int
    usage: Usage


class RateLimitWindow(NamedTuple):
    """One limit of the plan, as the CLI last reported it.
    kind: five_hour, seven_day, ... or overage (paid extra usage; its status is `in_use` while
    requests draw on it). utilization: 0 to 1, if reported."""
    kind: str
    status: Optional[str]
    utilization: Optional[float]
    resets_at: Optional[float]
    seen_at: float = 0.0


class RateLimitStatus(NamedTuple):
    """The content of a `rate_limit_event`.
    is_used_up: a limit of the plan refuses requests. is_using_overage: it would, but requests
    continue as paid extra usage. is_model_limit: it is the limit of one model only."""
    is_used_up: bool = False
    is_using_overage: bool = False
    resets_at: Optional[float] = None
    windows: Tuple[RateLimitWindow, ...] = ()
    is_model_limit: bool = False


class Pause(NamedTuple):
    """Why nothing runs now: usage_limit, overloaded, network, login or paused.
    until: the next try; infinite if the owner must resume, 0 if it is tried now. since: 0 if that
    does not matter. text: the error behind it."""
    reason: str
    until: float
    since: float = 0.0
    text: str = ""

    @property
    def known_until(self) -> Optional[float]:
        return self.until if 0 < self.until < math.inf else None


@dataclass(frozen=True)
class Answer:
    """A successful run. session_id: under which the CLI keeps the conversation, or None. spent_usd:
    the cost of that session so far, as the CLI counts it."""
    text: str
    structured: Optional[str] = None
    usage: Usage = Usage()
    model: Optional[str] = None
    session_id: Optional[str] = None
    spent_usd: float = 0.0
    stop_info: StopInfo = StopInfo()

    @property
    def is_plain(self) -> bool:
        """Whether it is a text that the model ended."""
        return self.structured is None and self.stop_info.reason == "end_turn"


class Refused(RunFailed):
    """The model refused to answer. answer: what it said before."""

    def __init__(self, text: str, answer: Answer) -> None:
        super().__init__("refused", text, is_answered=True)
        self.answer = answer


# === 5 Storage ===================================================================================
# The data folder and the database; the only user of sqlite3. Records go in and out, never rows. A
# change is on disk when the method returns (synchronous=FULL). Any thread. Read Database first.

HISTORY_BYTES = 4 << 20
QUEUE_JOBS = 50
JOB_ATTEMPTS = 2
# During an outage, after which runs that end the bridge count as attempts.
OUTAGE_CRASHES = 10
TOKENS = 100
USAGE_DAYS = 400
# A page of a list ends at this many jobs, or when its texts exceed this many characters.
PAGE_JOBS = 100
PAGE_CHARACTERS = 1 << 20
# Writes that share one commit.
WRITES = 64
# How long a write waits for earlier ones and for the lock of another program.
WRITE_SECONDS = 10.0
CACHE_ENTRIES = 1_000
# How stale the cache may be when another process writes.
CACHE_REVALIDATE_SECONDS = 0.05
# How often /health really writes, and how long it waits for that.
CHECK_SECONDS = 5.0
HEALTH_SECONDS = 1.0
# Rows that one transaction deletes, so that no other write waits for long: with a million requests
# the longest took 35 ms, with 100 rows and SQLite's usual checkpoints 208 ms.
SLICE_ROWS = 25
# A slice ends with the job that exceeds this.
SLICE_BYTES = 1 << 20
# Pages that one transaction gives back to the file system.
VACUUM_PAGES = 50
# A larger database is not checked while it is opened.
CHECKED_BYTES = 4 << 20
CONVERSATIONS = 1_000

# The names that the bridge uses in its data folder.
DATA_NAMES = (
    "bridge.db", "bridge.db-wal", "bridge.db-shm", "bridge.db-journal", "bridge-original.db",
    "bridge.lock", "ask-tokens.json", "cloudflared.yml", "claude-home", "claude.json", "bin",
    "work", "workspaces", "transcripts")

# Version 0 is the database of the Node original, or an empty file: its tables are created if they
# are missing, then both are brought to version 1. This list only grows; a step that has shipped
# never changes.
MIGRATIONS: Tuple[Tuple[str, ...], ...] = (
    (
        "CREATE TABLE IF NOT EXISTS tokens (id TEXT PRIMARY KEY, name TEXT NOT NULL, token_hash"
        " TEXT UNIQUE NOT NULL, token_prefix TEXT NOT NULL, session_mode TEXT NOT NULL, expires_at"
        " INTEGER, created_at INTEGER NOT NULL, last_used_at INTEGER, is_admin INTEGER NOT NULL"
        " DEFAULT 0)",
        "CREATE TABLE IF NOT EXISTS requests (id TEXT PRIMARY KEY, token_id TEXT, message TEXT,"
        " response TEXT, status TEXT, session_id TEXT, created_at INTEGER, completed_at INTEGER,"
        " error TEXT)",
        "CREATE TABLE IF NOT EXISTS sessions (id TEXT PRIMARY KEY, token_id TEXT,"
        " claude_session_id TEXT, working_dir TEXT, created_at INTEGER, last_used_at INTEGER)",
        "ALTER TABLE tokens ADD COLUMN tools TEXT NOT NULL DEFAULT '\"none\"'",
        "ALTER TABLE tokens ADD COLUMN workspace TEXT",
        "CREATE TABLE jobs (seq INTEGER PRIMARY KEY, id TEXT UNIQUE NOT NULL, token_id TEXT NOT"
        " NULL REFERENCES tokens(id) ON DELETE CASCADE, status TEXT NOT NULL, message TEXT NOT"
        " NULL, created_at REAL NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, model TEXT,"
        " system_prompt TEXT, json_schema TEXT, conversation TEXT, effort TEXT, started_at REAL,"
        " completed_at REAL, response TEXT, structured TEXT, usage TEXT, error TEXT, error_code"
        " TEXT)",
        "CREATE TABLE conversations (token_id TEXT NOT NULL REFERENCES tokens(id) ON DELETE"
        " CASCADE, name TEXT NOT NULL, session_id TEXT, spent_usd REAL NOT NULL DEFAULT 0,"
        " created_at REAL NOT NULL, last_used_at REAL NOT NULL, PRIMARY KEY (token_id, name))",
        # The requests of a stateful token of the original are one conversation. Its session belongs
        # to another folder of the CLI, so the stored turns are replayed.
        "INSERT INTO jobs (id, token_id, status, message, created_at, conversation, completed_at,"
        " response, error, error_code) SELECT r.id, r.token_id, CASE r.status WHEN 'processing'"
        " THEN 'queued' ELSE r.status END, r.message, r.created_at, CASE t.session_mode WHEN"
        " 'stateful' THEN 'default' END, r.completed_at, r.response, r.error, CASE r.status WHEN"
        " 'error' THEN 'cli_error' END FROM requests r JOIN tokens t ON t.id = r.token_id WHERE"
        " r.message IS NOT NULL AND r.status IN ('queued', 'processing', 'completed', 'error')"
        " ORDER BY r.created_at, r.rowid",
        "INSERT INTO conversations (token_id, name, created_at, last_used_at) SELECT s.token_id,"
        " 'default', min(s.created_at), max(coalesce(s.last_used_at, s.created_at)) FROM sessions"
        " s JOIN tokens t ON t.id = s.token_id AND t.session_mode = 'stateful' GROUP BY s.token_id",
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
        # No reference to tokens: the figures of a revoked token stay in the sums.
        "CREATE TABLE usage (day TEXT NOT NULL, token_id TEXT NOT NULL, requests INTEGER NOT NULL"
        " DEFAULT 0, completed INTEGER NOT NULL DEFAULT 0, errors INTEGER NOT NULL DEFAULT 0,"
        " input_tokens INTEGER NOT NULL DEFAULT 0, output_tokens INTEGER NOT NULL DEFAULT 0,"
        " cache_read_tokens INTEGER NOT NULL DEFAULT 0, cache_creation_tokens INTEGER NOT NULL"
        " DEFAULT 0, cost_usd REAL NOT NULL DEFAULT 0, PRIMARY KEY (day, token_id))",
        "INSERT INTO usage (day, token_id, requests, completed, errors) SELECT date(created_at,"
        " 'unixepoch'), token_id, count(*), sum(status = 'completed'), sum(status = 'error') FROM"
        " jobs GROUP BY 1, 2",
        "CREATE TABLE plan (kind TEXT PRIMARY KEY, status TEXT, utilization REAL, resets_at REAL,"
        " seen_at REAL NOT NULL)",
    ),
    (
        "ALTER TABLE children ADD COLUMN program TEXT",
        "CREATE TABLE remembered (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    ),
    (
        # chat: the request of /v1, until it is finished; ending: a StopInfo.
        "ALTER TABLE jobs ADD COLUMN chat TEXT",
        "ALTER TABLE jobs ADD COLUMN ending TEXT",
        "ALTER TABLE jobs ADD COLUMN api TEXT",
    ),
    (
        # No request and no maintenance counts or sorts what is stored: counters and indexes.
        "CREATE TABLE job_counts (status TEXT PRIMARY KEY, amount INTEGER NOT NULL)",
        "INSERT INTO job_counts VALUES ('queued', 0), ('processing', 0), ('completed', 0),"
        " ('error', 0)",
        "UPDATE job_counts SET amount = (SELECT count(*) FROM jobs WHERE jobs.status ="
        " job_counts.status)",
        "CREATE TRIGGER job_added AFTER INSERT ON jobs BEGIN UPDATE job_counts SET amount ="
        " amount + 1 WHERE status = new.status; END",
        "CREATE TRIGGER job_deleted AFTER DELETE ON jobs BEGIN UPDATE job_counts SET amount ="
        " amount - 1 WHERE status = old.status; END",
        "CREATE TRIGGER job_changed AFTER UPDATE OF status ON jobs BEGIN UPDATE job_counts SET"
        " amount = amount + (status = new.status) - (status = old.status) WHERE status IN"
        " (old.status, new.status); END",
        "CREATE INDEX jobs_of_token_by_status ON jobs (token_id, status, seq)",
        "CREATE INDEX jobs_to_purge ON jobs (completed_at) WHERE completed_at IS NOT NULL AND"
        " (conversation IS NULL OR status = 'error')",
        # turns: the completed ones; bytes: of those that are stored.
        "ALTER TABLE conversations ADD COLUMN turns INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE conversations ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0",
        "INSERT OR IGNORE INTO conversations (token_id, name, key, created_at, last_used_at)"
        " SELECT token_id, conversation, lower(hex(randomblob(16))), min(created_at),"
        " max(created_at) FROM jobs WHERE conversation IS NOT NULL GROUP BY 1, 2",
        "UPDATE conversations SET (turns, bytes, created_at, last_used_at) = (SELECT"
        " coalesce(sum(status = 'completed'), 0), coalesce(sum(CASE status WHEN 'completed' THEN"
        " length(CAST(message AS BLOB)) + length(CAST(response AS BLOB)) END), 0),"
        " coalesce(min(j.created_at), conversations.created_at),"
        " coalesce(max(coalesce(completed_at, j.created_at)), conversations.last_used_at) FROM"
        " jobs j WHERE j.token_id = conversations.token_id AND j.conversation ="
        " conversations.name)",
        "CREATE INDEX conversations_by_use ON conversations (token_id, last_used_at)",
        "CREATE INDEX conversations_by_size ON conversations (bytes)",
        "CREATE INDEX conversations_by_key ON conversations (key)",
        "ALTER TABLE tokens ADD COLUMN callbacks TEXT",
        "ALTER TABLE tokens ADD COLUMN callback_secret TEXT",
        # next_at: when to deliver; NULL until the request is finished.
        "CREATE TABLE callbacks (job_id TEXT PRIMARY KEY REFERENCES jobs(id) ON DELETE CASCADE,"
        " url TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, next_at REAL)",
        "CREATE INDEX callbacks_by_time ON callbacks (next_at)",
    ),
    (
        "ALTER TABLE callbacks ADD COLUMN token_id TEXT",
        "UPDATE callbacks SET token_id = (SELECT token_id FROM jobs WHERE id = job_id)",
        "CREATE INDEX callbacks_of_token ON callbacks (token_id, next_at)",
        # A trigger, because a bridge of an older version may run meanwhile.
        "CREATE TRIGGER callback_added AFTER INSERT ON callbacks BEGIN UPDATE callbacks SET"
        " token_id = (SELECT token_id FROM jobs WHERE id = new.job_id) WHERE job_id = new.job_id;"
        " END",
    ),
    (
        # A table of its own, because a bridge of an older version may write to usage meanwhile.
        "CREATE TABLE model_usage (day TEXT NOT NULL, token_id TEXT NOT NULL, model TEXT NOT NULL,"
        " completed INTEGER NOT NULL DEFAULT 0, input_tokens INTEGER NOT NULL DEFAULT 0,"
        " output_tokens INTEGER NOT NULL DEFAULT 0, cache_read_tokens INTEGER NOT NULL DEFAULT 0,"
        " cache_creation_tokens INTEGER NOT NULL DEFAULT 0, cost_usd REAL NOT NULL DEFAULT 0,"
        " PRIMARY KEY (day, token_id, model))",
        # attachment_data: the blocks, until the request is finished.
        "ALTER TABLE jobs ADD COLUMN attachments TEXT",
        "ALTER TABLE jobs ADD COLUMN attachment_data TEXT",
    ),
    (
        # Of a stored request of /v1/responses; see ResponseRequest.
        "ALTER TABLE jobs ADD COLUMN response_input TEXT",
        "ALTER TABLE jobs ADD COLUMN response_settings TEXT",
    ),
)

SQLITE_VERSION = sqlite3.sqlite_version
OLDEST_SQLITE = (3, 15)
JOB_FIELDS = tuple(row.name for row in fields(Job))
# The columns that have another name than their field.
COLUMN_OF = {"prefix": "token_prefix", "generation": "restarts", "stop_info": "ending"}
TOKEN_COLUMNS = ", ".join(COLUMN_OF.get(row.name, row.name) for row in fields(Token))
JOB_COLUMNS = ", ".join(COLUMN_OF.get(name, name) for name in JOB_FIELDS)
# A summary leaves out the columns that may be large.
BLANKED_COLUMNS = {
    "message": "''", "response": "NULL", "structured": "NULL", "stop_info": "NULL",
    "system_prompt": "NULL", "json_schema": "NULL"}
SUMMARY_COLUMNS = ", ".join(
    BLANKED_COLUMNS.get(name, COLUMN_OF.get(name, name)) for name in JOB_FIELDS)
USAGE_COLUMNS = ", ".join(Usage._fields)
USAGE_SUMS = ", ".join("sum(%s)" % name for name in Usage._fields)
USAGE_ADDITIONS = ", ".join("%s = %s + ?" % (name, name) for name in Usage._fields)


def placeholders(values: Sequence[Any]) -> str:
    """Return the placeholders of a list in a statement."""
    return ", ".join("?" * len(values))


def resolve_workspace(stored: str, data_dir: Path) -> str:
    """Return the path of a workspace. Those that the bridge made are relative to the data folder,
    which may be moved; before version 5 of the schema they were absolute."""
    path = data_dir / stored
    own = data_dir / "workspaces" / path.name
    if path.parent.name == "workspaces" and own.is_dir() and not path.exists():
        return str(own)
    return str(path)


def token_from_row(row: Tuple[Any, ...], data_dir: Path) -> Token:
    token = Token(*row)
    tools = json.loads(str(token.tools))
    models = json.loads(str(token.models or "null"))
    callbacks = json.loads(str(token.callbacks or "false"))
    workspace = resolve_workspace(token.workspace, data_dir) if token.workspace else None
    return replace(token, is_admin=bool(token.is_admin), workspace=workspace,
                   tools=tuple(tools) if isinstance(tools, list) else tools,
                   models=tuple(models) if models else None,
                   callbacks=tuple(callbacks) if isinstance(callbacks, list) else callbacks)


def stop_info_from_json(text: str) -> StopInfo:
    reason, sequence, calls, *more = json.loads(text)
    thinking = tuple(more[0]) if more else ()
    return StopInfo(reason, sequence, tuple(ToolCall(*call) for call in calls), thinking)


def job_from_row(row: Tuple[Any, ...]) -> Job:
    values = dict(zip(JOB_FIELDS, row))
    if values["usage"]:
        values["usage"] = Usage._make(json.loads(values["usage"]))
    if values["stop_info"]:
        values["stop_info"] = stop_info_from_json(values["stop_info"])
    return Job(**values)


# --- the data folder ---
def private_directory(path: Path) -> Path:
    """Create the folder, readable by the owner only. Raises CannotStart."""
    try:
        # mkdir(parents=True) would give the parents the rights of the umask.
        for folder in (*reversed(path.parents), path):
            folder.mkdir(mode=0o700, exist_ok=True)
        check_shared_folder(path)
        if os.name == "posix":
            # The volume of a container belongs to a group, and some file systems have no rights.
            with contextlib.suppress(PermissionError):
                path.chmod(0o700)
    except OSError as error:
        hint = "make it writable, or choose another one with --data-dir"
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            hint = "a file is in its place: choose another folder with --data-dir"
        raise CannotStart("The folder %s cannot be used: %s." % (path, error.strerror or error),
                          hint) from None
    return path


def check_shared_folder(path: Path) -> bool:
    """Return whether others may enter a folder, and that cannot be changed. Raises OSError if it
    cannot be used."""
    if os.name != "posix":
        return False
    status = path.stat()
    if status.st_mode & stat.S_ISVTX:
        # Such as /tmp: to close it would break the programs of other users.
        raise PermissionError(errno.EPERM, "all users share it")
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "it cannot be read and written")
    is_foreign = status.st_uid != os.geteuid() != 0
    if is_foreign and status.st_mode & stat.S_IWOTH:
        raise PermissionError(errno.EPERM, "any user may change it")
    return bool(is_foreign and status.st_mode & 0o077)


def find_foreign_files(folder: Path) -> Optional[str]:
    """Find a symlink or another user's file where one of the bridge's files belongs."""
    for name in DATA_NAMES:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = os.lstat(folder / name)
            if stat.S_ISLNK(status.st_mode):
                return "%s is a link" % (folder / name)
            if os.name == "posix" and status.st_uid != os.geteuid() != 0:
                return "%s belongs to another user" % (folder / name)
    return None


def data_directory(path: Path) -> Path:
    """Create or close the data folder, then check its files. The folder itself may be a link.
    Raises CannotStart."""
    foreign = find_foreign_files(private_directory(path))
    if foreign:
        raise CannotStart("The folder %s cannot be used: %s." % (path, foreign), FOREIGN_ADVICE)
    if check_shared_folder(path):
        logger.warning("%s", shared_folder_text(path))
    return path


FOREIGN_ADVICE = "move that away, make it yours (chown), or choose another folder with --data-dir"


def shared_folder_text(path: Path) -> str:
    return ("The folder %s belongs to another user; others who may enter it see the names of the"
            " bridge's files, which only you can read" % path)


def write_file_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all, readable by the owner only. Raises OSError."""
    handle, part = tempfile.mkstemp(prefix=path.name + ".", suffix=".part", dir=str(path.parent))
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def read_json_object(path: Path) -> Dict[str, Any]:
    """Return the JSON object in a file; empty if there is none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# --- the file of the database ---
def is_corrupt(error: BaseException) -> bool:
    """Return whether SQLite found a broken file. It raises subclasses of DatabaseError for a full
    disk, a lock or missing rights."""
    return type(error) is sqlite3.DatabaseError


def as_unavailable(error: BaseException) -> BaseException:
    """Return the answer to a full disk, a lock or a broken file: a new exception for each caller.
    Any other exception is returned as it is."""
    if isinstance(error, Unavailable):
        return Unavailable(str(error), error.headers)
    if is_corrupt(error):
        return Unavailable(
            "The database is damaged (%s). Restart the bridge: it moves the file away." % error)
    if isinstance(error, sqlite3.OperationalError):
        return Unavailable(
            "The database cannot be used now (%s). Try again in a few seconds." % error,
            (("Retry-After", "5"),))
    return error


def quarantine_database(path: Path, now: float) -> Path:
    """Rename a corrupt database and its side files. -> its new path. Raises CannotStart."""
    stem = "%s-damaged-%s" % (path.stem, day_of(now))
    target = path.with_name(stem + path.suffix)
    number = 1
    while target.exists():
        number += 1
        target = path.with_name("%s-%d%s" % (stem, number, path.suffix))
    try:
        # The database goes last: while it is there, the next start finishes an interrupted rename.
        for suffix in ("-wal", "-shm", ""):
            source = path.with_name(path.name + suffix)
            if source.exists():
                os.replace(source, target.with_name(target.name + suffix))
    except OSError as error:
        raise CannotStart("The damaged database %s cannot be renamed: %s." % (path, error.strerror),
                          "move it away yourself") from None
    return target


def read_number(text: Optional[str]) -> float:
    """Return a number that was remembered; 0 if it is none."""
    try:
        return float(text or "")
    except ValueError:
        return 0.0


def read_hold(text: Optional[str]) -> Optional[Pause]:
    """Return why the queue waited, as it was remembered; None for what cannot be read."""
    try:
        reason, since, message = json.loads(text or "")
        return Pause(str(reason), since + 0.0, since + 0.0, str(message)) if (
            reason in HOLD_REASONS.values()) else None
    except (ValueError, TypeError):
        return None


# pid, start time, program; see started_at and program_of.
ProcessRow = Tuple[int, str, Optional[str]]


def require_sqlite() -> None:
    """Raise CannotStart if the SQLite of this Python is too old: it has no UPDATE of row values."""
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise CannotStart(
            "This Python uses SQLite %s, which is too old: %d.%d or newer is needed."
            % (SQLITE_VERSION, *OLDEST_SQLITE), "use another Python, such as one of python.org")


class DatabaseInfo(NamedTuple):
    """What a look at a database reveals.
    fault: what is wrong with it, or None. latest: when its newest request was made.
    processes: those that the last bridge recorded. hold: why its queue waits: a reason, and when
    that began."""
    fault: Optional[str] = None
    latest: float = 0.0
    processes: Sequence[ProcessRow] = ()
    hold: Tuple[str, float] = ("", 0.0)


def inspect_database(path: Path) -> DatabaseInfo:
    """Look at a database without changing it."""
    if not path.exists():
        return DatabaseInfo()
    try:
        with contextlib.closing(connect_read_only(path)) as db:
            fault = str(db.execute("PRAGMA quick_check(1)").fetchone()[0])
            version = schema_version(db)
            if version > len(MIGRATIONS):
                fault = "it was written by a newer version of this program"
            elif fault == "ok" and version < 3:
                return DatabaseInfo()
            elif fault == "ok":
                newest = "SELECT created_at FROM jobs ORDER BY seq DESC LIMIT 1"
                (latest,) = db.execute(newest).fetchone() or (0.0,)
                rows = db.execute("SELECT pid, started, program FROM children").fetchall()
                state = dict(db.execute("SELECT name, value FROM remembered").fetchall())
                hold = ("", 0.0)
                if state.get("paused"):
                    hold = "paused", read_number(state["paused"])
                stored = read_hold(state.get("hold"))
                if stored:
                    hold = stored.reason, stored.since
                return DatabaseInfo(None, latest, rows, hold)
    except sqlite3.Error as error:
        fault = str(error)
    return DatabaseInfo("The database %s cannot be used: %s" % (path, fault))


# --- the connection ---

Result = TypeVar("Result")


def schema_version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def check_integrity(db: sqlite3.Connection) -> None:
    """Read the whole file. Raises sqlite3.DatabaseError."""
    fault = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if fault != "ok":
        raise sqlite3.DatabaseError(fault)


def use_wal(db: sqlite3.Connection) -> None:
    """Switch to WAL. For this statement alone SQLite does not wait for another writer."""
    for _ in range(200):
        try:
            db.execute("PRAGMA journal_mode=WAL").close()
            return
        except sqlite3.OperationalError:
            time.sleep(0.05)
    db.execute("PRAGMA journal_mode=WAL")


def copy_database(db: sqlite3.Connection, path: Path) -> None:
    """Copy the original's database, so that the migration cannot lose anything."""
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    with contextlib.closing(sqlite3.connect(str(path))) as copy:
        db.backup(copy)


def connect_read_only(path: Path, options: str = "") -> sqlite3.Connection:
    """Open a database that is not to be changed. options: such as &immutable=1, without locks and
    without its -wal file. Raises sqlite3.Error."""
    # Else two slashes at the beginning would name a host.
    root = "//" if os.name == "posix" else ""
    name = quote(os.fsencode(os.path.abspath(path)))
    return sqlite3.connect("file:%s%s?mode=ro%s" % (root, name, options), uri=True)


def is_backup(path: Path) -> bool:
    """Return whether a file is a database of a bridge, and no bridge uses its folder."""
    is_used = (path.parent / "bridge.lock").exists() and path.name in DATA_NAMES
    if is_used or not path.is_file():
        return False
    with contextlib.suppress(sqlite3.Error), contextlib.closing(
            connect_read_only(path, "&immutable=1")) as db:
        names = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        # Those of the original are named requests.
        return "tokens" in names and bool(names & {"jobs", "requests"})
    return False


def backup_database(source: Path, target: Path) -> None:
    """Copy a database that may be in use. A copy of the file alone would miss what is in -wal.
    Raises CannotStart."""
    try:
        target = target.resolve()
        companions = [Path(str(target) + suffix) for suffix in ("-wal", "-shm", "-journal")]
        if target.parent == source.parent.resolve() and target.name in DATA_NAMES:
            raise OSError(errno.EINVAL, "the bridge uses this file")
        if target.exists():
            if target.samefile(source):
                raise OSError(errno.EINVAL, "it is the database itself")
            if not is_backup(target):
                raise OSError(errno.EEXIST, "it exists, and is no backup of a bridge")
        elif any(path.exists() for path in companions):
            raise OSError(errno.EEXIST, "files of another database with this name are beside it")
        handle, name = tempfile.mkstemp(".part", target.name + ".", str(target.parent))
        os.close(handle)
        part = Path(name)
        try:
            with contextlib.closing(sqlite3.connect(str(source))) as db:
                copy_database(db, part)
            with contextlib.closing(sqlite3.connect(str(part))) as copy:
                # One file, without -wal.
                copy.execute("PRAGMA journal_mode=DELETE").close()
                check_integrity(copy)
            for path in companions:
                # Of an older copy: they would be applied to the new one.
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
            os.replace(part, target)
        finally:
            for suffix in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(str(part) + suffix)
    except (OSError, RuntimeError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise CannotStart("The backup %s cannot be written: %s." % (target, reason),
                          "choose another file") from None


class WriteTask(NamedTuple):
    """What the thread "writer" is to do.
    is_transaction: False for what SQLite does outside a transaction only."""
    fn: Callable[[sqlite3.Connection], Any]
    future: "Future[Any]"
    is_transaction: bool = True


def connect_database(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(
        str(path), timeout=WRITE_SECONDS, isolation_level=None, check_same_thread=False)


def gives_space_back(db: sqlite3.Connection) -> bool:
    return bool(db.execute("PRAGMA auto_vacuum").fetchone()[0] == 2)


def vacuum_slice(db: sqlite3.Connection) -> bool:
    """Free some pages. -> whether there are more."""
    count = "PRAGMA freelist_count"
    before = db.execute(count).fetchone()[0]
    # Python 3.11 makes one step of the statement only, which is one page.
    for _ in range(VACUUM_PAGES):
        db.execute("PRAGMA incremental_vacuum(1)").fetchall()
    # An older version's file frees none.
    return bool(0 < db.execute(count).fetchone()[0] < before)


class IntegrityCheck:
    """Reads a whole database in the thread "check". damage: what it found."""

    def __init__(self, path: Path, on_damage: Callable[[sqlite3.DatabaseError], None]) -> None:
        self.damage: Optional[sqlite3.DatabaseError] = None
        self._is_finished = False
        self._on_damage = on_damage
        self._db = connect_database(path)
        self._thread = threading.Thread(target=self._run, name="check", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            check_integrity(self._db)
        except sqlite3.OperationalError:
            # Interrupted, or locked.
            return
        except sqlite3.DatabaseError as error:
            self.damage = error
            logger.error("%s", as_unavailable(error))
            self._on_damage(error)
        self._is_finished = True

    def close(self) -> bool:
        """Interrupt it. -> whether it was finished. Idempotent."""
        if self._thread.is_alive():
            self._db.interrupt()
            self._thread.join()
        self._db.close()
        return self._is_finished


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Commit the block; roll it back if it fails."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def prepare_database(db: sqlite3.Connection, path: Path) -> None:
    """Check, migrate and configure the database."""
    for suffix in ("", "-wal", "-shm"):
        file = path.with_name(path.name + suffix)
        if os.name == "posix" and file.exists():
            with contextlib.suppress(PermissionError):
                file.chmod(0o600)
    version = schema_version(db)
    if version > len(MIGRATIONS):
        raise CannotStart(
            "The database %s was written by a newer version of this program." % path,
            "use that version")
    damaged = "SELECT count(*) FROM remembered WHERE name = 'damaged'"
    is_suspect = version > 2 and db.execute(damaged).fetchone()[0]
    if is_suspect or path.stat().st_size <= CHECKED_BYTES:
        check_integrity(db)
    original = "SELECT count(*) FROM sqlite_master WHERE name = 'requests'"
    if version == 0 and db.execute(original).fetchone()[0]:
        copy_database(db, path.with_name("bridge-original.db"))
    # Of use before the first table only.
    db.execute("PRAGMA auto_vacuum=INCREMENTAL")
    use_wal(db)
    db.execute("PRAGMA synchronous=FULL")
    # On macOS a sync alone leaves data in the cache of the drive. Source: sqlite.org/pragma.html.
    db.execute("PRAGMA fullfsync=ON").close()
    db.execute("PRAGMA checkpoint_fullfsync=ON").close()
    # What was deleted is overwritten in the file.
    db.execute("PRAGMA secure_delete=ON").close()
    with transaction(db):
        for step in MIGRATIONS[schema_version(db) :]:
            for statement in step:
                db.execute(statement)
        db.execute("PRAGMA user_version = %d" % len(MIGRATIONS))
    if not gives_space_back(db):
        # An older version made the file: it is written again, once.
        with contextlib.suppress(sqlite3.OperationalError):
            db.execute("VACUUM")
    db.execute("PRAGMA foreign_keys=ON")


class Database:
    """Owns bridge.db: one connection that reads and one, in the thread "writer", that writes.
    A reader waits neither for the disk nor for another program's lock. The writer commits what many
    callers queued meanwhile at once: with a disk that takes 2 ms for a sync this is 5 to 8 times as
    fast. The read cache makes a poll 5 times as fast. Any thread; close it last.

    Raises CannotStart; DatabaseCorrupt."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.clock = clock
        self.folder = path.parent
        self._path = path
        # The number of the file; 0 while unknown.
        self._inode = 0
        self._checked_at = float("-inf")
        self._write_queue: "queue.SimpleQueue[Optional[WriteTask]]" = queue.SimpleQueue()
        # Guards _is_closed together with the queue, so that nothing is queued behind the end.
        self._queue_lock = threading.Lock()
        self._is_closed = False
        self._writer_thread = threading.Thread(
            target=self._execute_writes, name="writer", daemon=True)
        self._read_lock = threading.Lock()
        self._cache: Dict[Any, Any] = {}
        # Tokens stay cached when something else changes.
        self._token_cache: Dict[Any, Optional[Token]] = {}
        self._tokens_dirty = False
        self._cached_data_version = 0
        self._revalidate_at = float("-inf")
        self._is_in_use = False
        self._check: Optional[IntegrityCheck] = None
        require_sqlite()
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._db = connect_database(path)
            self._reader = connect_database(path)
        except (OSError, sqlite3.Error) as error:
            raise CannotStart(
                "The database %s cannot be opened: %s." % (path, error),
                "make it writable, or choose another folder with --data-dir") from None
        try:
            prepare_database(self._db, path)
            self._reader.execute("PRAGMA query_only=ON")
            self._writer_thread.start()
        except (sqlite3.Error, Unavailable) as error:
            self.close()
            text = "The database %s cannot be used: %s." % (path, error)
            if is_corrupt(error.__cause__ or error):
                raise DatabaseCorrupt(
                    text,
                    "start the bridge: it moves the damaged file away and creates a new database",
                ) from None
            raise CannotStart(
                text, "make room on the disk, or stop the program that uses the file") from None
        except BaseException:
            self.close()
            raise

    def mark_in_use(self) -> None:
        """Record that a bridge runs, until `close`. If the last one did not end in order, check a
        large file; SQLite itself repairs what a crash leaves."""
        was_in_use = self.get_state("in_use")
        self.set_state("in_use", str(os.getpid()))
        self._is_in_use = True
        if was_in_use and self._path.stat().st_size > CHECKED_BYTES:
            # The next start checks the file before it uses it.
            self._check = IntegrityCheck(
                self._path, lambda error: self.set_state("damaged", str(error)))

    def close(self) -> None:
        """Execute the queued writes, then close. Idempotent."""
        # An interrupted check is repeated by the next start.
        is_checked = self._check.close() if self._check else True
        if self._is_in_use and is_checked:
            self._is_in_use = False
            self.set_state("in_use", None)
        with self._queue_lock:
            if not self._is_closed:
                self._is_closed = True
                self._write_queue.put(None)
        if self._writer_thread.ident:
            self._writer_thread.join()
        with self._read_lock:
            self._reader.close()
            self._db.close()

    # --- writing ---
    def write(self, fn: Callable[[sqlite3.Connection], Result],
              wait_seconds: Optional[float] = None) -> Result:
        """Run fn in a transaction in the writer's thread. -> its result, once it is on disk.
        wait_seconds: for earlier writes and for another program's lock.
        Raises Unavailable, and what fn raises; then nothing is stored."""
        future: "Future[Result]" = Future()
        self._queue_write(WriteTask(fn, future))
        try:
            return future.result(WRITE_SECONDS if wait_seconds is None else wait_seconds)
        except FutureTimeoutError:
            if future.cancel():
                busy = sqlite3.OperationalError("it is busy, or locked by another program")
                raise as_unavailable(busy) from None
        # The writer has started it, so the end is near.
        return future.result()

    def checkpoint(self) -> None:
        """Move what was written into the file of the database, and empty the -wal file. Does
        nothing while another program reads."""
        def truncate(db: sqlite3.Connection) -> None:
            db.execute("PRAGMA busy_timeout=20").close()
            with contextlib.suppress(sqlite3.OperationalError):
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            db.execute("PRAGMA wal_autocheckpoint=1000").close()
            db.execute("PRAGMA busy_timeout=%d" % (WRITE_SECONDS * 1000)).close()

        with contextlib.suppress(Unavailable):
            self._queue_write(WriteTask(truncate, Future(), is_transaction=False))

    def free_pages(self) -> bool:
        """Give a slice of the unused pages back to the file system. -> whether there are more."""
        return self.read("PRAGMA freelist_count")[0][0] > 0 and self.write(vacuum_slice)

    def write_later(self, fn: Callable[[sqlite3.Connection], Any]) -> None:
        """Queue a write that nobody waits for."""
        with contextlib.suppress(Unavailable):
            self._queue_write(WriteTask(fn, Future()))

    def _queue_write(self, task: WriteTask) -> None:
        with self._queue_lock:
            if self._is_closed:
                raise as_unavailable(sqlite3.OperationalError("it is closed"))
            self._write_queue.put(task)

    def _execute_writes(self) -> None:
        """The thread "writer": everything that waits becomes one transaction."""
        is_open = True
        while is_open:
            batch = [self._write_queue.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < WRITES:
                    batch.append(self._write_queue.get_nowait())
            is_open = None not in batch
            tasks = [task for task in batch if task]
            results: List[Any] = []
            errors: Dict[int, BaseException] = {}
            try:
                self._run_batch(tasks, results, errors)
            except Exception as error:
                # The whole batch failed: the disk is full, or the file is locked or gone.
                for number in range(len(tasks)):
                    errors.setdefault(number, as_unavailable(error))
            # After the commit, before a caller can continue.
            self._cache = {}
            if self._tokens_dirty:
                self._tokens_dirty = False
                self._token_cache = {}
            for number, task in enumerate(tasks):
                future = task.future
                # A task that never ran is still pending: until here its caller may give up.
                if not future.running() and not future.cancelled():
                    future.set_running_or_notify_cancel()
                if number in errors and not future.cancelled():
                    future.set_exception(errors[number])
                elif not future.cancelled():
                    future.set_result(results[number])

    def _run_batch(self, tasks: Sequence[WriteTask], results: List[Any],
                   errors: Dict[int, BaseException]) -> None:
        """Run and commit a batch. A task that fails is undone; the others are stored."""
        self._check_file_not_replaced()
        results += [None] * len(tasks)
        with transaction(self._db):
            for number, task in enumerate(tasks):
                # Not before BEGIN, which may wait for long: until then the caller may give up.
                if not task.is_transaction or not task.future.set_running_or_notify_cancel():
                    continue
                self._db.execute("SAVEPOINT one")
                try:
                    results[number] = task.fn(self._db)
                except BaseException as error:
                    errors[number] = as_unavailable(error)
                    if not self._db.in_transaction:
                        # SQLite rolled back the whole transaction.
                        raise sqlite3.OperationalError(str(error)) from error
                    self._db.execute("ROLLBACK TO one")
                self._db.execute("RELEASE one")
        for number, task in enumerate(tasks):
            if not task.is_transaction and task.future.set_running_or_notify_cancel():
                try:
                    results[number] = task.fn(self._db)
                except sqlite3.Error as error:
                    errors[number] = as_unavailable(error)

    def _check_file_not_replaced(self) -> None:
        """SQLite would continue to write to a file that was deleted. Raises Unavailable."""
        try:
            inode = os.stat(self._path).st_ino
        except OSError:
            inode = -1
        if inode != (self._inode or inode) or inode == -1:
            text = "The database %s was deleted or replaced. Restart the bridge."
            raise Unavailable(text % self._path)
        self._inode = inode

    def mark_tokens_changed(self) -> None:
        """Drop the cached tokens after this commit. Called in the writer's thread."""
        self._tokens_dirty = True

    # --- reading ---
    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Lend the reading connection to one thread at a time. Raises Unavailable."""
        with self._read_lock:
            try:
                yield self._reader
            except sqlite3.DatabaseError as error:
                raise as_unavailable(error) from error

    def read(self, sql: str, *values: Any) -> List[Tuple[Any, ...]]:
        with self.reading() as db:
            return db.execute(sql, values).fetchall()

    def read_cache(self) -> Dict[Any, Any]:
        """Return what was read since the last change, by keys of the callers.

        Take the dictionary before you query: a write replaces it, so that a stale result lands in
        the old one and is dropped. Changes of other programs count after CACHE_REVALIDATE_SECONDS.
        """
        now = self.clock.monotonic()
        is_full = len(self._cache) + len(self._token_cache) >= CACHE_ENTRIES
        if now >= self._revalidate_at or is_full:
            self._revalidate_at = now + CACHE_REVALIDATE_SECONDS
            version = self.read("PRAGMA data_version")[0][0]
            if version != self._cached_data_version or is_full:
                self._cached_data_version = version
                self._cache = {}
                self._token_cache = {}
        return self._cache

    def cached(self, key: Any, load: Callable[[], Result]) -> Result:
        cache: Dict[Any, Result] = self.read_cache()
        if key not in cache:
            cache[key] = load()
        return cache[key]

    def cached_token(self, key: Any, load: Callable[[], Optional[Token]]) -> Optional[Token]:
        # Other programs create and revoke tokens, too.
        self.read_cache()
        cache = self._token_cache
        if key not in cache:
            cache[key] = load()
        return cache[key]

    def check_writable(self) -> None:
        """Raise Unavailable if a write would fail.
        Anybody may ask for /health, and a write costs a sync: it writes every CHECK_SECONDS. It
        writes a page, because only that notices a full disk."""
        if self._check and self._check.damage:
            raise as_unavailable(self._check.damage)
        now = self.clock.monotonic()
        is_due = now - self._checked_at >= CHECK_SECONDS
        sql = "INSERT OR REPLACE INTO remembered (name, value) SELECT 'checked', ? WHERE ?"
        self.write(lambda db: db.execute(sql, (str(now), is_due)), HEALTH_SECONDS)
        if is_due:
            self._checked_at = now

    # --- what the next start needs ---
    def set_state(self, name: str, value: Optional[str]) -> None:
        """Remember a text across restarts; None forgets it."""
        sql = "INSERT OR REPLACE INTO remembered SELECT ?, ? WHERE ? IS NOT NULL"
        delete_sql = "DELETE FROM remembered WHERE name = ?"
        with contextlib.suppress(Unavailable):
            self.write(lambda db: (db.execute(delete_sql, (name,)),
                                   db.execute(sql, (name, value, value))))

    def get_state(self, name: str) -> Optional[str]:
        def load() -> Optional[str]:
            rows = self.read("SELECT value FROM remembered WHERE name = ?", name)
            return str(rows[0][0]) if rows else None

        return self.cached(("state", name), load)

    def record_process(self, pid: int, started: Optional[str], program: Optional[str]) -> None:
        """Record a child process, so that the next start can kill it if the bridge crashes. On
        Linux its environment identifies it as well, so that a full disk does no harm here."""
        def record(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM children WHERE pid = ?", (pid,))
            if started:
                db.execute("INSERT INTO children (pid, started, program) VALUES (?, ?, ?)",
                           (pid, started, program))

        with contextlib.suppress(Unavailable):
            self.write(record)

    def forget_process(self, pid: int) -> None:
        self.record_process(pid, None, None)

    def recorded_processes(self) -> List[ProcessRow]:
        rows = self.read("SELECT pid, started, program FROM children")
        return [(int(pid), str(started), program) for pid, started, program in rows]


def pause_queue(database: Database, is_paused: bool) -> None:
    """Store whether the owner holds the queue, and since when. Raises Unavailable. It does not read
    first: what is cached may be older than a change by another program."""
    insert_sql = "INSERT OR IGNORE INTO remembered VALUES ('paused', ?)"
    delete_sql = "DELETE FROM remembered WHERE name = 'paused'"
    now = str(database.clock.now())
    database.write(
        lambda db: db.execute(insert_sql, (now,)) if is_paused else db.execute(delete_sql))


def runs_in_writer(method: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method of a store a transaction; it receives the connection as its first argument. It
    runs in the writer's thread, and its changes are on disk when it returns."""
    @wraps(method)
    def write(self: Any, *args: Any, **keywords: Any) -> Any:
        return self._database.write(lambda db: method(self, db, *args, **keywords))

    return write


# --- the stores ---
class TokenStore:
    """The access tokens."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # Token id -> when its use was last written.
        self._last_used_written_at: Dict[str, float] = {}

    @runs_in_writer
    def add(self, db: sqlite3.Connection, new: NewToken, secret: str,
            workspace: Optional[str] = None) -> Token:
        """Create a token. Raises TokenLimit. Expired tokens do not count, and an admin token can
        always be created while there is none."""
        now = self._database.clock.now()
        expires_at = None
        if new.expires_in_days is not None:
            expires_at = now + new.expires_in_days * 86_400
        token = Token(
            id=str(uuid.uuid4()), name=new.name, prefix=secret[:12], session_mode=new.session_mode,
            expires_at=expires_at, created_at=now, last_used_at=None, is_admin=new.admin,
            tools=new.tools, workspace=workspace, requests_per_minute=new.requests_per_minute,
            requests_per_day=new.requests_per_day, models=new.models, callbacks=new.callbacks)
        tokens, admins = db.execute(
            "SELECT count(*), coalesce(sum(is_admin), 0) FROM tokens"
            " WHERE expires_at IS NULL OR expires_at > ?",
            (now,)).fetchone()
        if tokens >= TOKENS and (admins or not new.admin):
            raise TokenLimit()
        texts = {name: as_json(getattr(token, name)) for name in ("tools", "models", "callbacks")}
        values = (*{**vars(token), **texts}.values(), digest(secret), new_callback_secret())
        db.execute("INSERT INTO tokens (%s, token_hash, callback_secret) VALUES (%s)"
                   % (TOKEN_COLUMNS, placeholders(values)), values)
        self._database.mark_tokens_changed()
        return token

    @runs_in_writer
    def update(self, db: sqlite3.Connection, token_id: str, changes: Mapping[str, Any]) -> None:
        """Change fields of a token, or its token_hash. Raises NotFound."""
        sql = "UPDATE tokens SET %s WHERE id = ? AND coalesce(expires_at, 1) != 0" % ", ".join(
            "%s = ?" % COLUMN_OF.get(name, name) for name in changes)
        if not db.execute(sql, (*changes.values(), token_id)).rowcount:
            raise NotFound("Token not found")
        self._database.mark_tokens_changed()

    def by_digest(self, token_hash: str) -> Optional[Token]:
        return self._load("token_hash", token_hash)

    def get(self, token_id: str) -> Optional[Token]:
        return self._load("id", token_id)

    def require(self, token_id: str) -> Token:
        """Return a token. Raises NotFound."""
        token = self.get(replace_surrogates(token_id))
        if not token:
            raise NotFound("Token not found")
        return token

    def _load(self, column: str, value: str) -> Optional[Token]:
        def load() -> Optional[Token]:
            sql = "SELECT %s FROM tokens WHERE %s = ?" % (TOKEN_COLUMNS, column)
            rows = self._database.read(sql, value)
            return token_from_row(rows[0], self._database.folder) if rows else None

        return self._database.cached_token((column, value), load)

    def callback_secret(self, token_id: str) -> str:
        """Return what signs the callbacks of a token."""
        sql = "SELECT callback_secret FROM tokens WHERE id = ?"
        return str(self._database.read(sql, token_id)[0][0])

    def list(self) -> List[Token]:
        """Return all tokens, newest first."""
        sql = "SELECT %s FROM tokens ORDER BY created_at DESC, rowid DESC" % TOKEN_COLUMNS
        return [token_from_row(row, self._database.folder) for row in self._database.read(sql)]

    def count(self) -> int:
        def load() -> int:
            return int(self._database.read("SELECT count(*) FROM tokens")[0][0])

        return self._database.cached("tokens", load)

    def touch(self, token: Token) -> None:
        """Record that the token was used: at most once a minute, and nobody waits for the disk."""
        now = self._database.clock.now()
        written_at = self._last_used_written_at.get(token.id, token.last_used_at or 0.0)
        if 0 <= now - written_at < 60:
            return
        self._last_used_written_at[token.id] = now

        def update(db: sqlite3.Connection) -> None:
            db.execute("UPDATE tokens SET last_used_at = ? WHERE id = ?", (now, token.id))
            self._database.mark_tokens_changed()

        self._database.write_later(update)

    def has_admin(self) -> bool:
        sql = "SELECT 1 FROM tokens WHERE is_admin AND (expires_at IS NULL OR expires_at > ?)"
        return bool(self._database.read(sql, self._database.clock.now()))

    def delete(self, token_id: str, protect: bool = True) -> List[str]:
        """Delete a token with its jobs and conversations, and erase them in the file. -> its
        unfinished jobs. Raises NotFound; LastAdmin if `protect`."""
        unfinished: List[str] = self._disable(token_id, protect)
        while self.delete_slice(token_id):
            pass
        self._database.checkpoint()
        return unfinished

    def disabled(self) -> Optional[str]:
        """Return a token whose deletion was interrupted, or goes on in another thread."""
        rows = self._database.read("SELECT id FROM tokens WHERE expires_at = 0 LIMIT 1")
        return rows[0][0] if rows else None

    @runs_in_writer
    def delete_slice(self, db: sqlite3.Connection, token_id: str) -> bool:
        """Delete a part of what belongs to a disabled token, at last itself. -> whether there may
        be more."""
        if delete_jobs(db, "WHERE token_id = ?", token_id):
            return True
        sql = ("DELETE FROM conversations WHERE rowid IN"
               " (SELECT rowid FROM conversations WHERE token_id = ? LIMIT ?)")
        if db.execute(sql, (token_id, SLICE_ROWS)).rowcount:
            return True
        db.execute("DELETE FROM tokens WHERE id = ? AND expires_at = 0", (token_id,))
        self._database.mark_tokens_changed()
        return False

    @runs_in_writer
    def _disable(self, db: sqlite3.Connection, token_id: str, protect: bool) -> List[str]:
        """Refuse a token, and delete its unfinished jobs. -> their ids."""
        row = db.execute("SELECT is_admin FROM tokens WHERE id = ?", (token_id,)).fetchone()
        if not row:
            raise NotFound("Token not found")
        other_admins = db.execute(
            "SELECT count(*) FROM tokens"
            " WHERE is_admin AND id != ? AND (expires_at IS NULL OR expires_at > ?)",
            (token_id, self._database.clock.now())).fetchone()[0]
        if protect and row[0] and not other_admins:
            raise LastAdmin()
        unfinished = db.execute(
            "SELECT id FROM jobs WHERE token_id = ? AND status IN ('queued', 'processing')",
            (token_id,)).fetchall()
        # If the bridge is killed before the rest is deleted, the token is there, but expired.
        db.execute("UPDATE tokens SET token_hash = ?, expires_at = 0 WHERE id = ?",
                   ("revoked " + token_id, token_id))
        db.executemany("DELETE FROM jobs WHERE id = ?", unfinished)
        self._database.mark_tokens_changed()
        return [job_id for (job_id,) in unfinished]


class UsageStore:
    """The figures per day and token, and the limits of the plan."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @staticmethod
    def add(db: sqlite3.Connection, day: str, token_id: str, counter: str,
            usage: Usage = Usage()) -> None:
        """Add to the figures of a token. counter: requests, completed or errors."""
        db.execute("INSERT OR IGNORE INTO usage (day, token_id) VALUES (?, ?)", (day, token_id))
        counters = [int(counter == name) for name in ("requests", "completed", "errors")]
        db.execute(
            "UPDATE usage SET requests = requests + ?, completed = completed + ?,"
            " errors = errors + ?, %s WHERE day = ? AND token_id = ?" % USAGE_ADDITIONS,
            (*counters, *usage, day, token_id))

    @staticmethod
    def add_model(db: sqlite3.Connection, day: str, token_id: str, model: str,
                  usage: Usage) -> None:
        """Add an answer to the figures of its model."""
        key = (day, token_id, model)
        db.execute("INSERT OR IGNORE INTO model_usage (day, token_id, model) VALUES (?, ?, ?)", key)
        db.execute("UPDATE model_usage SET completed = completed + 1, %s WHERE day = ? AND"
                   " token_id = ? AND model = ?" % USAGE_ADDITIONS, (*usage, *key))

    def by_model(self, since_day: str,
                 token_id: Optional[str] = None) -> List[Tuple[str, int, Usage]]:
        """Return the completed requests and the usage of each model."""
        rows = self._database.read(
            "SELECT model, sum(completed), %s FROM model_usage"
            " WHERE day >= ? AND (token_id = ? OR ? IS NULL) GROUP BY model"
            % USAGE_SUMS, since_day, token_id, token_id)
        return [(model, completed, Usage._make(sums)) for model, completed, *sums in rows]

    def by_day(self, since_day: str, token_id: Optional[str] = None) -> List[DayUsage]:
        """Return the figures per day and token, oldest first. token_id: only this token's."""
        rows = self._database.read(
            "SELECT day, token_id, requests, completed, errors, %s FROM usage"
            " WHERE day >= ? AND (token_id = ? OR ? IS NULL) ORDER BY day, token_id"
            % USAGE_COLUMNS,
            since_day, token_id, token_id)
        return [DayUsage._make((*row[:5], Usage._make(row[5:]))) for row in rows]

    @runs_in_writer
    def purge(self, db: sqlite3.Connection) -> None:
        """Delete the figures older than USAGE_DAYS."""
        oldest = day_of(self._database.clock.now() - USAGE_DAYS * 86_400)
        db.execute("DELETE FROM usage WHERE day < ?", (oldest,))
        db.execute("DELETE FROM model_usage WHERE day < ?", (oldest,))

    @runs_in_writer
    def save_plan_limits(self, db: sqlite3.Connection, windows: Sequence[RateLimitWindow]) -> None:
        db.executemany(
            "INSERT OR REPLACE INTO plan (kind, status, utilization, resets_at, seen_at)"
            " VALUES (?, ?, ?, ?, ?)",
            windows)

    def plan_limits(self) -> List[RateLimitWindow]:
        """Return the limits of the plan, as last reported."""
        rows = self._database.read(
            "SELECT kind, status, utilization, resets_at, seen_at FROM plan ORDER BY kind")
        return [RateLimitWindow(*row) for row in rows]


def check_token_limits(db: sqlite3.Connection, token_id: str, now: float) -> None:
    """Check the token's requests within the last 60 seconds and on this day (UTC)."""
    # One that is being deleted has expired in 1970.
    token = db.execute("SELECT requests_per_minute, requests_per_day FROM tokens WHERE id = ?"
                       " AND coalesce(expires_at, 1) != 0", (token_id,)).fetchone()
    if not token:
        raise InvalidToken()
    per_minute, per_day = token
    if per_minute:
        row = db.execute(
            "SELECT created_at FROM jobs WHERE token_id = ? ORDER BY seq DESC LIMIT 1 OFFSET ?",
            (token_id, per_minute - 1)).fetchone()
        if row and now - 60 < row[0] <= now:
            raise retry_later(RateLimited, "This token may send %d requests a minute." % per_minute,
                              row[0] + 60 - now)
    if per_day:
        row = db.execute("SELECT requests FROM usage WHERE day = ? AND token_id = ?",
                         (day_of(now), token_id)).fetchone()
        if row and row[0] >= per_day:
            midnight = (now // 86_400 + 1) * 86_400
            raise retry_later(
                DailyLimit,
                "This token may send %d requests a day. It works again at %s."
                % (per_day, iso_time(midnight)),
                midnight - now, resetsAt=iso_time(midnight))


# Of a turn of a conversation, and of what /v1/responses stores beside it.
TURN_BYTES = (
    "length(CAST(message AS BLOB)) + coalesce(length(CAST(response AS BLOB)), 0)"
    " + coalesce(length(CAST(response_input AS BLOB)), 0)")


def delete_jobs(db: sqlite3.Connection, where: str, *values: Any) -> List[Tuple[int, int]]:
    """Delete a slice of some jobs. where: what follows `FROM jobs`. -> (seq, bytes) of each."""
    sql = "SELECT seq, %s FROM jobs %s LIMIT ?" % (TURN_BYTES, where)
    deleted: List[Tuple[int, int]] = []
    with contextlib.closing(db.execute(sql, (*values, SLICE_ROWS))) as rows:
        for row in rows:
            deleted.append(row)
            if sum(length for _, length in deleted) > SLICE_BYTES:
                break
    db.executemany("DELETE FROM jobs WHERE seq = ?", [(seq,) for seq, _ in deleted])
    return deleted


def touch_conversation(db: sqlite3.Connection, token_id: str, name: str, now: float) -> None:
    """Record the use of a conversation, which begins with its first request."""
    db.execute(
        "INSERT OR IGNORE INTO conversations (token_id, name, key, created_at, last_used_at)"
        " SELECT id, ?, ?, ?, ? FROM tokens WHERE id = ?",
        (name, uuid.uuid4().hex, now, now, token_id))
    db.execute("UPDATE conversations SET last_used_at = ? WHERE token_id = ? AND name = ?",
               (now, token_id, name))


# A job that is so old, or has no callback, may be deleted: the last attempt is 31.6 hours after its
# end.
HAS_NO_CALLBACK = (
    "(completed_at < ? OR NOT EXISTS (SELECT 1 FROM callbacks WHERE job_id = jobs.id))")


def delete_single(db: sqlite3.Connection, before: float, callbacks_before: float) -> int:
    """Delete a slice of the finished jobs that no conversation and no callback needs."""
    # Until `checkpoint`: many small ones.
    db.execute("PRAGMA wal_autocheckpoint=200").close()
    return len(delete_jobs(
        db, "INDEXED BY jobs_to_purge WHERE completed_at IS NOT NULL AND (conversation IS NULL OR"
        " status = 'error') AND completed_at < ? AND %s ORDER BY completed_at" % HAS_NO_CALLBACK,
        before, callbacks_before))


def purge_turns(database: Database, before: float, callbacks_before: float) -> int:
    """Delete old turns of a conversation that is longer than what is replayed."""
    # The first turn is the oldest, so that of the others none need be read.
    sql = (
        "SELECT token_id, name FROM conversations WHERE bytes > ? AND (SELECT completed_at FROM"
        " jobs INDEXED BY jobs_by_token WHERE jobs.token_id = conversations.token_id AND"
        " conversation = name ORDER BY seq LIMIT 1) < ? ORDER BY bytes DESC")
    for token_id, name in database.read(sql, HISTORY_BYTES, before):
        with database.reading() as db:
            rows = db.execute(
                "SELECT seq, %s FROM jobs INDEXED BY jobs_by_token"
                " WHERE token_id = ? AND conversation = ? AND status = 'completed'"
                " ORDER BY seq DESC" % TURN_BYTES, (token_id, name))
            # The newest turn is replayed even if it is too large; `next` takes it away.
            newest = next(rows, (0, 0))
            sizes = accumulate(rows, lambda before, row: (row[0], before[1] + row[1]),
                               initial=newest)
            last_seq = next((seq for seq, size in sizes
                             if size > HISTORY_BYTES and seq != newest[0]), 0)
            rows.close()
        times = before, callbacks_before
        deleted = database.write(partial(
            delete_turns, token_id=token_id, name=name, last_seq=last_seq, times=times))
        if deleted:
            return deleted
    return 0


def delete_turns(db: sqlite3.Connection, token_id: str, name: str, last_seq: int,
                 times: Tuple[float, float]) -> int:
    deleted = delete_jobs(
        db, "WHERE seq IN (SELECT seq FROM jobs INDEXED BY jobs_by_token WHERE token_id = ? AND"
        " conversation = ? AND seq <= ? ORDER BY seq LIMIT %d) AND completed_at < ? AND %s"
        " ORDER BY seq" % (SLICE_ROWS, HAS_NO_CALLBACK), token_id, name, last_seq, *times)
    db.execute("UPDATE conversations SET bytes = bytes - ? WHERE token_id = ? AND name = ?",
               (sum(length for _, length in deleted), token_id, name))
    return len(deleted)


def oldest_queued(excluded_models: Sequence[str], excluded_ids: Sequence[str] = ()) -> str:
    """Return the SQL that finds the next job. A turn of a conversation waits for those before it,
    whatever holds them."""
    return ("SELECT seq FROM jobs WHERE status = 'queued' AND coalesce(model, '') NOT IN (%s)"
            " AND id NOT IN (%s) AND NOT EXISTS (SELECT 1 FROM jobs AS earlier"
            " INDEXED BY jobs_by_status WHERE earlier.status IN ('queued', 'processing')"
            " AND earlier.seq < jobs.seq AND earlier.token_id = jobs.token_id"
            " AND earlier.conversation = jobs.conversation) ORDER BY seq LIMIT 1"
            % (placeholders(excluded_models), placeholders(excluded_ids)))


def next_model(database: Database, job: Job) -> Optional[str]:
    """Return the model of the next turn of a queued job's conversation."""
    def load() -> Optional[str]:
        rows = database.read(
            "SELECT model FROM jobs INDEXED BY jobs_by_status WHERE status IN ('queued',"
            " 'processing') AND token_id = ? AND conversation = ? ORDER BY seq LIMIT 1",
            job.token_id, job.conversation)
        return rows[0][0] if rows else job.model

    return database.cached(("model", job.token_id, job.conversation), load)


def is_large_chat(chat: Optional[str]) -> bool:
    return chat is not None and len(chat) > BODY_BYTES


def insert_job(db: sqlite3.Connection, values: Mapping[str, Any]) -> Any:
    """Insert a row. -> its seq. A statement keeps a copy of its last values: a large chat has one
    of its own, which is executed again."""
    chat = values.get("chat")
    is_large = is_large_chat(chat)
    values = {**values, "chat": None if is_large else chat}
    columns = ", ".join(values)
    seq = db.execute("INSERT INTO jobs (%s) VALUES (%s)" % (columns, placeholders([*values])),
                     tuple(values.values())).lastrowid
    if is_large:
        sql = "UPDATE jobs SET chat = ? WHERE seq = ?"
        db.execute(sql, (chat, seq)).close()
        db.execute(sql, (None, -1)).close()
    return seq


def prompt_of(database: Database, job: Job) -> Content:
    """Return the message of an unfinished job, with its attachments."""
    if not job.attachments:
        return job.message
    rows = database.read("SELECT attachment_data FROM jobs WHERE id = ?", job.id)
    blocks = json.loads(rows[0][0] or "[]") if rows else []
    return [*blocks, {"type": "text", "text": job.message}]


def positions_of(db: sqlite3.Connection, job: Job) -> Tuple[int, int]:
    """Return what JobStore.queue_positions does."""
    if job.is_finished:
        return 0, 0
    queued, unfinished = db.execute(
        "SELECT coalesce(sum(status = 'queued'), 0), count(*) FROM jobs"
        " WHERE status IN ('queued', 'processing') AND seq < ?",
        (job.seq,)).fetchone()
    is_queued = job.status == JobStatus.QUEUED
    return (int(queued) + 1 if is_queued else 0), int(unfinished) + 1


class JobStore:
    """The queue and the finished requests. Metrics count after the commit."""

    def __init__(self, database: Database, usage: UsageStore, metrics: Metrics) -> None:
        self._database = database
        self._usage = usage
        self._metrics = metrics
        metrics.inc("cab_cost_usd_total", 0)

    # --- the queue ---
    def enqueue(self, token_id: str, request: Union[Ask, Chat], key: Optional[str] = None,
                limit: int = QUEUE_JOBS) -> EnqueueResult:
        """Add a job at the end of the queue, or find the job that this key made; durable on return.
        key: the caller's Idempotency-Key. limit: most jobs that may wait or run.
        Raises IdempotencyConflict, QueueFull; RateLimited and DailyLimit for the limits of the
        token; InvalidToken when the token was revoked meanwhile."""
        # The JSON of a chat may be large: not in the writer's thread, where all would wait for it.
        more = request.columns()
        fingerprint = request.fingerprint if isinstance(request, Ask) and key else None
        values = {
            "id": str(uuid.uuid4()), "token_id": token_id, "status": JobStatus.QUEUED,
            "message": request.message, "model": request.model,
            "system_prompt": request.system_prompt, "json_schema": request.json_schema,
            "conversation": request.conversation, "effort": request.effort, "idempotency_key": key,
            "fingerprint": fingerprint, **more}
        callback = request.callback if isinstance(request, Ask) else None
        result: EnqueueResult = self._insert(values, limit, callback)
        if result.is_new:
            self._metrics.inc("cab_requests_accepted_total")
        if is_large_chat(more.get("chat")):
            # The cache has its pages.
            self._database.write_later(lambda db: db.execute("PRAGMA shrink_memory").fetchall())
        return result

    @runs_in_writer
    def _insert(self, db: sqlite3.Connection, values: Mapping[str, Any], limit: int,
                callback: Optional[str]) -> EnqueueResult:
        # The order of the times must be the order of the jobs, for the limit per minute.
        token_id, now = values["token_id"], self._database.clock.now()
        row = None
        if values["idempotency_key"] is not None:
            row = db.execute(
                "SELECT id, fingerprint FROM jobs WHERE token_id = ? AND idempotency_key = ?",
                (token_id, values["idempotency_key"])).fetchone()
        if row:
            if row[1] != values["fingerprint"]:
                raise IdempotencyConflict()
            job = self._select(db, "id", row[0])
            return EnqueueResult(job, positions_of(db, job)[1], is_new=False)
        check_token_limits(db, token_id, now)
        ahead = db.execute(
            "SELECT count(*) FROM jobs WHERE status IN ('queued', 'processing')").fetchone()[0]
        if ahead >= limit:
            raise retry_later(QueueFull, "", 10)
        seq = insert_job(db, {**values, "created_at": now})
        if values["conversation"]:
            touch_conversation(db, token_id, values["conversation"], now)
        if callback:
            db.execute("INSERT INTO callbacks (job_id, url) VALUES (?, ?)",
                       (values["id"], callback))
        self._usage.add(db, day_of(now), token_id, "requests")
        return EnqueueResult(self._select(db, "seq", seq), ahead + 1)

    @staticmethod
    def _select(db: sqlite3.Connection, column: str, value: Any) -> Job:
        sql = "SELECT %s FROM jobs WHERE %s = ?" % (JOB_COLUMNS, column)
        return job_from_row(db.execute(sql, (value,)).fetchone())

    def has_queued(self, excluded_models: Sequence[str] = ()) -> bool:
        """Return whether `claim` would find a job."""
        sql = oldest_queued(excluded_models)
        return bool(self._database.read(sql, *excluded_models))

    @runs_in_writer
    def claim(self, db: sqlite3.Connection, excluded_models: Sequence[str] = (),
              excluded_ids: Sequence[str] = ()) -> Optional[Job]:
        """Take the oldest queued job: it is `processing` on return, and counts as attempted.
        excluded_models: models whose jobs wait; "" is the default model."""
        sql = oldest_queued(excluded_models, excluded_ids)
        row = db.execute(sql, (*excluded_models, *excluded_ids)).fetchone()
        if not row:
            return None
        db.execute(
            "UPDATE jobs SET status = 'processing', attempts = attempts + 1, started_at = ?"
            " WHERE seq = ? AND status = 'queued'",
            (self._database.clock.now(), row[0]))
        return self._select(db, "seq", row[0])

    def complete(self, job: Job, answer: Answer, generation: int = 0) -> bool:
        """Store the answer, and what continues the conversation. -> False when the job was
        cancelled or deleted meanwhile."""
        is_stored = bool(self._complete(job, answer, generation))
        if is_stored:
            kinds = ("input", "output", "cache_read", "cache_creation")
            for kind, amount in zip(kinds, answer.usage):
                self._metrics.inc("cab_tokens_total", amount, kind=kind)
            self._metrics.inc("cab_cost_usd_total", answer.usage.cost_usd)
            self._count_finished(JobStatus.COMPLETED, "", 1)
        return is_stored

    @runs_in_writer
    def _complete(self, db: sqlite3.Connection, job: Job, answer: Answer, generation: int) -> int:
        now = self._database.clock.now()
        rows = db.execute(
            "UPDATE jobs SET status = 'completed', completed_at = ?, response = ?, structured = ?,"
            " usage = ?, ending = ?, model = coalesce(?, model), restarts = ?, chat = NULL,"
            " attachment_data = NULL"
            " WHERE id = ? AND status = 'processing'",
            (now, replace_surrogates(answer.text),
             answer.structured and replace_surrogates(answer.structured), as_json(answer.usage),
             replace_surrogates(as_json(answer.stop_info)), answer.model, generation, job.id),
        ).rowcount
        if rows:
            # The conversation of the row: NULL when it was deleted meanwhile.
            size = len(job.message.encode()) + len(replace_surrogates(answer.text).encode())
            db.execute(
                "UPDATE conversations SET session_id = ?, spent_usd = ?, last_used_at = ?,"
                " turns = turns + 1, bytes = bytes + ?"
                " WHERE token_id = ? AND name = (SELECT conversation FROM jobs WHERE id = ?)",
                (answer.session_id, answer.spent_usd, now, size, job.token_id, job.id))
            db.execute("UPDATE callbacks SET next_at = ? WHERE job_id = ?", (now, job.id))
            day, model = day_of(job.created_at), answer.model or job.model
            self._usage.add(db, day, job.token_id, "completed", answer.usage)
            self._usage.add_model(db, day, job.token_id, model or "", answer.usage)
        return rows

    def _count_finished(self, status: str, code: str, amount: int) -> None:
        self._metrics.inc("cab_requests_finished_total", amount, status=status, code=code)

    def fail(self, job: Job, code: str, text: str,
             allowed_statuses: Sequence[str] = (JobStatus.PROCESSING,)) -> bool:
        """Store why the job failed. -> False when it was in another status than the allowed."""
        where = "id = ? AND status IN (%s)" % placeholders(allowed_statuses)
        return bool(self._fail_where(code, text, where, job.id, *allowed_statuses))

    def fail_chats(self, code: str, text: str) -> List[str]:
        """Fail the unfinished requests of /v1. -> their ids."""
        where = "chat IS NOT NULL AND status IN ('queued', 'processing')"
        return self._fail_where(code, text, where)

    def fail_waiting(self, code: str, text: str, model: str, is_chat: bool,
                     created_before: float) -> List[str]:
        """Fail queued requests of this age. -> their ids. model: only the requests for it; "" is
        the default model. is_chat: those of /v1, else the others."""
        where = ("status = 'queued' AND ? IN (?, coalesce(model, ''))"
                 " AND (chat IS NOT NULL) = ? AND (created_at <= ? OR ? AND created_at > ?)")
        # After now: the clock was set back.
        return self._fail_where(code, text, where, model, ALL_MODELS, is_chat, created_before,
                                is_chat, self._database.clock.now())

    def _fail_where(self, code: str, text: str, where: str, *values: Any) -> List[str]:
        """Fail the jobs that a condition of this class selects. -> their ids."""
        job_ids: List[str] = self._mark_failed(code, text, where, values)
        if job_ids:
            self._count_finished(JobStatus.ERROR, code, len(job_ids))
        return job_ids

    @runs_in_writer
    def _mark_failed(self, db: sqlite3.Connection, code: str, text: str, where: str,
                     values: Sequence[Any]) -> List[str]:
        now = self._database.clock.now()
        sql = "SELECT id, token_id, created_at, conversation FROM jobs WHERE " + where
        rows = db.execute(sql, values).fetchall()
        for job_id, token_id, created_at, conversation in rows:
            db.execute(
                "UPDATE jobs SET status = 'error', completed_at = ?, error = ?, error_code = ?,"
                " chat = NULL, attachment_data = NULL WHERE id = ?",
                (now, replace_surrogates(text), code, job_id))
            self._usage.add(db, day_of(created_at), token_id, "errors")
            db.execute("UPDATE callbacks SET next_at = ? WHERE job_id = ?", (now, job_id))
            if conversation:
                touch_conversation(db, token_id, conversation, now)
        return [job_id for job_id, *_ in rows]

    @runs_in_writer
    def requeue(self, db: sqlite3.Connection, job: Job, generation: int = 0) -> bool:
        """Put the job back at the head of the queue without counting the attempt."""
        rows = db.execute(
            "UPDATE jobs SET status = 'queued', attempts = attempts - 1, started_at = NULL,"
            " restarts = ? WHERE id = ? AND status = 'processing'",
            (generation, job.id)).rowcount
        return bool(rows)

    def recover(self) -> Tuple[int, int]:
        """After a crash, put the running jobs back at the head of the queue, at most twice.
        Call it only when no run of the dead bridge continues.
        -> (jobs that are queued again, jobs given up)."""
        # A try during an outage is no attempt, unless it was the try that ended the bridge.
        has_hold = self._database.get_state("hold") is not None
        crashes = read_number(self._database.get_state("crashes"))
        is_outage = has_hold and crashes < OUTAGE_CRASHES
        lost = self._fail_where(
            "interrupted",
            "The run was interrupted %d times: the bridge stopped or crashed." % JOB_ATTEMPTS,
            "status = 'processing' AND attempts >= ?", JOB_ATTEMPTS + is_outage)
        requeued = self._requeue_all(is_outage)
        if has_hold or crashes:
            self._database.set_state("crashes", str(crashes + (requeued > 0)) if has_hold else None)
        return requeued, len(lost)

    @runs_in_writer
    def _requeue_all(self, db: sqlite3.Connection, is_outage: bool) -> int:
        return db.execute(
            "UPDATE jobs SET status = 'queued', started_at = NULL, restarts = restarts + 1,"
            " attempts = attempts - ? WHERE status = 'processing'", (is_outage,)).rowcount

    def purge(self, days: int) -> int:
        """Delete a slice of the finished jobs older than `days`. -> how many; 0 at the end. The
        completed turns of a conversation stay as far as they are replayed."""
        now = self._database.clock.now()
        before, callbacks_before = now - days * 86_400, now - max(days, 2) * 86_400
        deleted = self._database.write(
            partial(delete_single, before=before, callbacks_before=callbacks_before))
        return deleted or purge_turns(self._database, before, callbacks_before)

    # --- look-ups ---
    def get(self, job_id: str) -> Optional[Job]:
        with _LARGE_VALUE_LOCK:
            return self._load(JOB_COLUMNS, job_id)

    def summary(self, job_id: str) -> Optional[Job]:
        """Return the job without the prompt and the answer, which may be large."""
        return self._database.cached(("job", job_id), lambda: self._load(SUMMARY_COLUMNS, job_id))

    def _load(self, columns: str, job_id: str) -> Optional[Job]:
        rows = self._database.read("SELECT %s FROM jobs WHERE id = ?" % columns, job_id)
        return job_from_row(rows[0]) if rows else None

    def response(self, job_id: str, start: int, length: int) -> str:
        """Return a part of an answer, in code points; empty past its end."""
        with _LARGE_VALUE_LOCK:
            rows = self._database.read("SELECT response FROM jobs WHERE id = ?", job_id)
            return str(rows[0][0] or "")[start : start + length] if rows else ""

    def chat(self, job_id: str) -> Optional[Chat]:
        """Return what was asked over /v1, apart from the job's own columns. None for a native or a
        finished job."""
        rows = self._database.read(
            "SELECT chat FROM jobs WHERE id = ? AND chat IS NOT NULL", job_id)
        return Chat.from_json(rows[0][0]) if rows else None

    def status(self, job_id: str) -> Optional[str]:
        rows = self._database.read("SELECT status FROM jobs WHERE id = ?", job_id)
        return rows[0][0] if rows else None

    def queue_positions(self, job: Job) -> Tuple[int, int]:
        """Return the job's places in the queue.
        -> (jobs queued before it + 1, or 0 if it is not queued;
            jobs queued and running before it + 1, or 0 if it is finished)."""
        def load() -> Tuple[int, int]:
            with self._database.reading() as db:
                return positions_of(db, job)

        return self._database.cached(("positions", job.id, job.status), load)

    def page(self, where: JobFilter, before: Optional[int],
             limit: int) -> Tuple[List[Job], Optional[int]]:
        """Return a page of jobs, newest first, by token and status, or by token and conversation.
        before: where the last page ended.
        -> (at most `limit` jobs, fewer if they are large; where the next page begins, or None)."""
        token_id, column, choices = where.token_id, "status", where.statuses
        owner = "token_id = ?" if token_id else "? IS NULL"
        if where.conversation:
            # An index serves one of them.
            column, choices = "conversation", (where.conversation,)
        part = "SELECT seq FROM jobs WHERE %s%%s AND seq < ? ORDER BY seq DESC LIMIT ?" % owner
        end = (before or 1 << 62, limit + 1)
        # One part for each status, because an index serves one status only.
        parts = ["SELECT * FROM (%s)" % part % " AND %s = ?" % column] * len(choices)
        values: List[Any] = [value for choice in choices for value in (token_id, choice, *end)]
        if not choices:
            parts, values = [part % ""], [token_id, *end]
        sql = "SELECT %s FROM jobs WHERE seq IN (%s) ORDER BY seq DESC LIMIT ?" % (
            JOB_COLUMNS, " UNION ALL ".join(parts))
        jobs: List[Job] = []
        size = 0
        with _LARGE_VALUE_LOCK, self._database.reading() as db:
            rows = db.execute(sql, (*values, limit + 1))
            for row in rows:
                if len(jobs) == limit or size > PAGE_CHARACTERS:
                    rows.close()
                    return jobs, jobs[-1].seq
                jobs.append(job_from_row(row))
                size += sum(len(value) for value in row if isinstance(value, str))
        return jobs, None

    def counts(self) -> Dict[str, int]:
        """Return the number of jobs per status."""
        def load() -> Dict[str, int]:
            return dict(self._database.read("SELECT status, amount FROM job_counts WHERE amount"))

        return self._database.cached("counts", load)


class ConversationStore:
    """The conversations of stateful tokens; their turns are jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @runs_in_writer
    def open(self, db: sqlite3.Connection, token_id: str, name: str) -> Session:
        """Begin a turn. -> where the conversation continues. Clears the stored session until the
        turn succeeds, because a transcript that holds half a turn must never be resumed."""
        touch_conversation(db, token_id, name, self._database.clock.now())
        row = db.execute(
            "SELECT key, session_id, spent_usd FROM conversations WHERE token_id = ? AND name = ?",
            (token_id, name)).fetchone()
        db.execute("UPDATE conversations SET session_id = NULL WHERE token_id = ? AND name = ?",
                   (token_id, name))
        return Session(*row) if row else Session(uuid.uuid4().hex)

    def exists(self, key: str) -> bool:
        return bool(self._database.read("SELECT 1 FROM conversations WHERE key = ?", key))

    def list(self, token_id: str) -> List[Conversation]:
        """Return a token's last CONVERSATIONS conversations, the last used one first. A
        conversation counts from its first request, even if that is still queued."""
        rows = self._database.read(
            "SELECT name, turns, created_at, last_used_at FROM conversations WHERE token_id = ?"
            " ORDER BY last_used_at DESC, rowid DESC LIMIT ?", token_id, CONVERSATIONS)
        return [Conversation(*row) for row in rows]

    def session_ids(self, token_id: Optional[str] = None, name: Optional[str] = None) -> List[str]:
        """Return the sessions that may be resumed: all, of a token, or of one conversation."""
        where, values = "session_id IS NOT NULL", []
        for column, value in (("token_id", token_id), ("name", name)):
            if value is not None:
                where += " AND %s = ?" % column
                values.append(value)
        rows = self._database.read("SELECT session_id FROM conversations WHERE " + where, *values)
        return [str(session_id) for (session_id,) in rows]

    def delete(self, token_id: str, name: str) -> bool:
        """Delete a conversation. -> whether it existed. Finished and running jobs stay without it;
        queued ones start it again."""
        def detach(db: sqlite3.Connection) -> int:
            return db.execute(
                "UPDATE jobs SET conversation = NULL WHERE seq IN (SELECT seq FROM jobs WHERE"
                " token_id = ? AND conversation = ? AND status != 'queued' ORDER BY seq LIMIT ?)",
                (token_id, name, SLICE_ROWS)).rowcount

        while self._database.write(detach) == SLICE_ROWS:
            pass
        return bool(self._delete(token_id, name, detach))

    @runs_in_writer
    def _delete(self, db: sqlite3.Connection, token_id: str, name: str,
                detach: Callable[[sqlite3.Connection], int]) -> int:
        rows = db.execute(
            "DELETE FROM conversations WHERE token_id = ? AND name = ?", (token_id, name)).rowcount
        detach(db)
        first = db.execute(
            "SELECT min(created_at) FROM jobs WHERE token_id = ? AND conversation = ?",
            (token_id, name)).fetchone()[0]
        if first:
            touch_conversation(db, token_id, name, first)
        return rows

    def history(self, job: Job) -> List[HistoryTurn]:
        """Return the completed turns before this job, oldest first: the latest within
        HISTORY_BYTES; the last turn is cut to fit."""
        turns: List[HistoryTurn] = []
        budget = HISTORY_BYTES
        with _LARGE_VALUE_LOCK, self._database.reading() as db:
            rows = db.execute(
                "SELECT message, response FROM jobs INDEXED BY jobs_by_token"
                " WHERE token_id = ? AND conversation = ?"
                " AND seq < ? AND status = 'completed' AND response IS NOT NULL ORDER BY seq DESC",
                (job.token_id, job.conversation, job.seq))
            for message, response in rows:
                budget -= len(message.encode())
                encoded = response.encode()
                if turns and len(encoded) > budget:
                    break
                turns.append(HistoryTurn(message, encoded[:budget].decode("utf-8", "ignore")))
                budget -= len(encoded)
            rows.close()
        return turns[::-1]


# Longer than any delay between two attempts.
LATEST_CALLBACK_SECONDS = 56_000.0


class CallbackStore:
    """The results that are to be sent."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def next_at(self) -> Optional[float]:
        """Return when the next one is due; None if there is none."""
        def load() -> Optional[float]:
            sql = "SELECT min(next_at) FROM callbacks WHERE next_at IS NOT NULL"
            value: Optional[float] = self._database.read(sql)[0][0]
            return value

        return self._database.cached("callbacks", load)

    def due(self) -> List[Callback]:
        """Return of each token the one that is due for the longest time."""
        rows = self._database.read(
            "SELECT c.job_id, t.id, c.url, c.attempts, t.callback_secret, t.callbacks FROM tokens t"
            " JOIN callbacks c ON c.job_id = (SELECT job_id FROM callbacks WHERE token_id = t.id"
            " AND next_at <= ? ORDER BY next_at LIMIT 1) WHERE coalesce(t.expires_at, 1) != 0"
            " ORDER BY c.next_at",
            self._database.clock.now())
        callbacks = []
        for *values, right in rows:
            hosts = json.loads(right or "false")
            hosts = tuple(hosts) if isinstance(hosts, list) else hosts
            callbacks.append(Callback._make((*values, hosts)))
        return callbacks

    @runs_in_writer
    def limit_delays(self, db: sqlite3.Connection) -> int:
        """Send at once what is later than any delay, because the clock was wrong; a slice of it.
        -> how many."""
        now = self._database.clock.now()
        return db.execute(
            "UPDATE callbacks SET next_at = ? WHERE job_id IN (SELECT job_id FROM callbacks WHERE"
            " next_at > ? LIMIT 1000)", (now, now + LATEST_CALLBACK_SECONDS)).rowcount

    @runs_in_writer
    def retry(self, db: sqlite3.Connection, callback: Callback, seconds: Optional[float]) -> bool:
        """Try it again after that time; None: it was sent, or is given up. -> False if it was
        deleted, or its token revoked, meanwhile."""
        if seconds is None:
            sql = "DELETE FROM callbacks WHERE job_id = ?"
            return bool(db.execute(sql, (callback.job_id,)).rowcount)
        return bool(db.execute(
            "UPDATE callbacks SET attempts = ?, next_at = ? WHERE job_id = ? AND EXISTS (SELECT 1"
            " FROM tokens t WHERE t.id = token_id AND coalesce(t.expires_at, 1) != 0)",
            (callback.attempts + 1, self._database.clock.now() + seconds,
             callback.job_id)).rowcount)


class StoredResponse(NamedTuple):
    """A response with its input. messages, previous: as in ResponseRequest. size: its characters;
    more than CONVERSATION_CHARACTERS if the input was too large to be stored."""
    token_id: str
    status: str
    messages: Sequence[Tuple[str, Content]]
    previous: str
    text: str
    stop_info: StopInfo
    size: int


class ResponseStore:
    """What /v1/responses needs of a request later; it is a part of the job, and is deleted with it.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def settings(self, job_id: str) -> Optional[Dict[str, Any]]:
        """Return ResponseRequest.settings; None if the response is not stored."""
        rows = self._database.read("SELECT response_settings FROM jobs WHERE id = ?", job_id)
        settings: Optional[Dict[str, Any]] = json.loads(rows[0][0] or "null") if rows else None
        return settings

    def get(self, job_id: str) -> Optional[StoredResponse]:
        with _LARGE_VALUE_LOCK:
            rows = self._database.read(
                "SELECT token_id, status, response_input, coalesce(response, ''), ending FROM jobs"
                " WHERE id = ? AND response_settings IS NOT NULL", job_id)
            if not rows:
                return None
            token_id, status, text, answer, ending = rows[0]
            body = json.loads(text or '{"previous": "", "messages": []}')
        return StoredResponse(
            token_id, status, [(role, content) for role, content in body["messages"]],
            body["previous"], answer, stop_info_from_json(ending) if ending else StopInfo(),
            len(text) + len(answer) if text else CONVERSATION_CHARACTERS + 1)

    @runs_in_writer
    def delete(self, db: sqlite3.Connection, job_id: str) -> bool:
        """Delete what continues a response. The request and its answer stay in the lists."""
        return bool(db.execute(
            "UPDATE jobs SET response_input = NULL, response_settings = NULL"
            " WHERE id = ? AND response_settings IS NOT NULL", (job_id,)).rowcount)


class Stores:
    """The database and the stores on it."""

    def __init__(self, path: Path, clock: Clock, metrics: Optional[Metrics] = None) -> None:
        self.database = Database(path, clock)
        self.tokens = TokenStore(self.database)
        self.usage = UsageStore(self.database)
        self.jobs = JobStore(self.database, self.usage, metrics or Metrics())
        self.conversations = ConversationStore(self.database)
        self.callbacks = CallbackStore(self.database)
        self.responses = ResponseStore(self.database)

    def close(self) -> None:
        self.database.close()


# === 6 Claude protocol ===========================================================================
# What the bridge and `claude` exchange: command line, environment, control messages, events and
# failures. Pure. Source, unless named: measured on 2.1.197 and 2.1.330.

SYSTEM_PROMPT = "You are Claude, a helpful assistant. Answer the user's message."
# Older versions lose client tools, schemas or replayed history.
MINIMUM_CLI, TESTED_CLI = (2, 1, 197), (2, 1, 330)
# Earlier versions may lose an effort that is sent to a process that is just starting.
EFFORT_CLI = (2, 1, 330)
# Earlier versions let Glob list names outside the workspace.
CONFINED_CLI = (2, 1, 330)
# Earlier versions take back only the last message, keep a trace of one without an answer, and
# ignore PIPED_TEXT.
REWIND_CLI = (2, 1, 330)
# A field of the CLI itself, which may change: an assistant line with it becomes a message of the
# user at once, without a turn of its own.
PIPED_TEXT = "local_command_source"
BATCH_FILES = (".cmd", ".bat")
NEEDED_FLAGS = frozenset((
    "--agent", "--disable-slash-commands", "--include-partial-messages", "--input-format",
    "--no-session-persistence", "--permission-mode", "--resume", "--session-id",
    "--setting-sources", "--strict-mcp-config", "--tools"))
ALL_TOOLS = (
    "Bash", "Read", "Glob", "Grep", "Edit", "Write", "NotebookEdit", "WebFetch", "WebSearch",
    "Agent", "Task", "TaskOutput", "TaskStop", "TodoWrite")

# Variables that never reach the CLI: they choose who pays, which server, model or prompt is used,
# or load code. PASSED_ENV is the exception.
STRIPPED_ENV = re.compile(
    r"ANTHROPIC_.*|CLAUDE.*|CAB_.*|MAX_THINKING_TOKENS|OTEL_.*|NODE_OPTIONS|BUN_OPTIONS|"
    r"ENABLE_CLAUDEAI_MCP_SERVERS|MCP_TOOL_TIMEOUT|"
    r"DISABLE_(?:TELEMETRY|AUTOUPDATER|ERROR_REPORTING|AUTO_COMPACT|COMPACT)",
    re.IGNORECASE)
PASSED_ENV = frozenset((
    "ANTHROPIC_BASE_URL", "CLAUDE_CODE_OAUTH_TOKEN", "CLAUDE_CODE_GIT_BASH_PATH",
    "CLAUDE_CODE_CERT_STORE", "CLAUDE_CODE_CLIENT_CERT", "CLAUDE_CODE_CLIENT_KEY",
    "CLAUDE_CODE_CLIENT_KEY_PASSPHRASE", "CLAUDE_SECURESTORAGE_CONFIG_DIR"))
API_KEYS = frozenset(("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"))
# The name of the MCP server that offers the client's tools, and so the prefix of their names.
MCP_SERVER = "api"
TOOL_PREFIX = "mcp__%s__" % MCP_SERVER
# The CLI cuts a longer description (2.1.197 at 2,048 characters, 2.1.330 at 4,096).
DESCRIPTION_CHARACTERS = 2_000
# The CLI replaces larger tool results by the name of a file.
RESULT_CHARACTERS = 40_000
OUTPUT_LIMIT = "CLAUDE_CODE_MAX_OUTPUT_TOKENS"
EXTRA_BODY = "CLAUDE_CODE_EXTRA_BODY"
# In the input of a call whose JSON is not complete.
CUT_INPUT = "__unparsedToolInput"
# The blocks of what the model thinks.
THOUGHTS = ("thinking", "redacted_thinking")
# Up to this limit of an answer the model does not think, unless it is asked to.
THINKING_TOKENS = 4_096
# Stands for a blank answer, which the API would refuse later.
NO_ANSWER = "(no answer)"
DEFAULT_PAUSE_SECONDS = 900.0
LONGEST_PAUSE_SECONDS = 8 * 86_400.0


class Features(NamedTuple):
    """What one `claude` binary can do, from its --version and --help."""
    version: Tuple[int, ...]
    version_text: str
    flags: FrozenSet[str]

    @classmethod
    def read(cls, version_text: str, help_text: str) -> "Features":
        match = re.search(r"(\d+)\.(\d+)\.(\d+)", version_text)
        version = tuple(int(part) for part in match.groups()) if match else ()
        flags = frozenset(re.findall(r"--[a-z][a-z-]+", help_text))
        return cls(version, version_text.strip()[:80], flags)


@dataclass(frozen=True)
class SessionConfig:
    """Configuration sent before the first prompt. Turns share a process only if it is equal."""
    system_prompt: str
    model: Optional[str] = None
    json_schema: Optional[str] = None
    effort: Optional[str] = None
    tools: Union[str, Tuple[str, ...]] = Tools.NONE
    workspace: Optional[str] = None
    client_tools: Tuple[Mapping[str, Any], ...] = ()


# The configuration of a request without settings of its own.
DEFAULT_SESSION = SessionConfig(SYSTEM_PROMPT)


# --- starting a process ---
def child_environment(environ: Mapping[str, str], allow_api_key: bool,
                      config_dir: Optional[str]) -> Dict[str, str]:
    """Return the environment of `claude`.
    It is ours without the variables that change who pays or what is asked, plus the switches that
    keep the owner's files out. CLAUDE_CODE_DISABLE_ATTACHMENTS is what makes @/path inert.
    config_dir: a configuration folder of the bridge, or None to use the owner's."""
    result = {}
    for name, value in environ.items():
        is_allowed_key = allow_api_key and name in API_KEYS
        if not STRIPPED_ENV.fullmatch(name) or name in PASSED_ENV or is_allowed_key:
            result[name] = value
    result.update(CLAUDE_CODE_DISABLE_ATTACHMENTS="1", CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
                  CLAUDE_CODE_DISABLE_TERMINAL_TITLE="1", CLAUDE_CODE_DISABLE_CLAUDE_MDS="1",
                  CLAUDE_CODE_DISABLE_AUTO_MEMORY="1", CLAUDE_CODE_DISABLE_BACKGROUND_TASKS="1",
                  ENABLE_CLAUDEAI_MCP_SERVERS="false", CLAUDE_CODE_MAX_RETRIES="4",
                  DISABLE_AUTO_COMPACT="1",
                  # After a refusal the CLI would ask again, and use another model from then on.
                  CLAUDE_CODE_DISABLE_REFUSAL_RETRY="1", CLAUDE_CODE_DISABLE_REFUSAL_FALLBACK="1")
    owner_dir = environ.get("CLAUDE_CONFIG_DIR", "")
    if config_dir:
        result["CLAUDE_CONFIG_DIR"] = config_dir
        result["CLAUDE_SECURESTORAGE_CONFIG_DIR"] = environ.get(
            "CLAUDE_SECURESTORAGE_CONFIG_DIR", owner_dir)
        # The CLI logs each call of a client's tool there.
        result["XDG_CACHE_HOME"] = config_dir + "/cache"
    elif owner_dir:
        result["CLAUDE_CONFIG_DIR"] = owner_dir
    return result


def claude_argv(command: Sequence[str], features: Features, tools: Union[str, Tuple[str, ...]],
                session: Sequence[str] = ()) -> List[str]:
    """Return the command line of a process; nothing in it comes from a client. session:
    --session-id, --resume or nothing."""
    argv = [*command, "-p",
            *("--input-format", "stream-json", "--output-format", "stream-json", "--verbose"),
            *("--setting-sources", "", "--strict-mcp-config"),
            *("--include-partial-messages", "--disable-slash-commands"),
            *tool_argv(features, tools), *("--agent", "bridge")]
    if "--system-prompt-snapshot" in features.flags:
        # Otherwise 2.1.330 answers a resumed session under the system prompt of its first turn.
        argv += ["--system-prompt-snapshot", "off"]
    return argv + list(session or ["--no-session-persistence"])


def check_rules_for_cmd(program: str, tools: Union[str, Tuple[str, ...]]) -> None:
    """Raise RunFailed if a batch file is to receive a tool rule that cmd.exe would change."""
    for rule in () if isinstance(tools, str) else tools:
        if program.lower().endswith(BATCH_FILES) and re.search(r'[%&|<>^!"]', rule):
            raise RunFailed(
                "cli_error", "The tool rule %s cannot be passed to %s: cmd.exe changes the signs"
                " %% & | < > ^ ! \". Change the token's tools, or name claude.exe with --claude."
                % (rule, program))


def tool_argv(features: Features, tools: Union[str, Tuple[str, ...]]) -> List[str]:
    """Return the flags of a tools level or of a list of rules.

    --tools lists the tools that exist, --allowedTools those that run without a question, which
    nobody could answer. Reading inside the workspace needs no rule. A bare rule `Read` or `Write`
    would open the whole disk, so a bare name means the workspace; `Edit(...)` rules cover Write.

    Source: each level tried inside and outside the workspace, by `..`, `~` and symlinks."""
    available: Sequence[str]
    allowed: Sequence[str] = ()
    mode = "dontAsk"
    if tools == Tools.READ:
        available = ("Read", "Glob", "Grep")
    elif tools == Tools.WEB:
        available = allowed = ("WebSearch", "WebFetch")
    elif tools == Tools.ALL:
        available = ALL_TOOLS
        allowed = ("Bash", "WebFetch", "WebSearch")
        mode = "acceptEdits"
    else:
        rules = () if tools == Tools.NONE else tuple(tools)
        available = sorted({rule.partition("(")[0] for rule in rules})
        edits = ("Edit", "Write", "NotebookEdit")
        allowed = sorted({"Edit(./**)" if rule in edits else rule
                          for rule in rules if rule not in ("Read", "Glob", "Grep")})
    if features.version < CONFINED_CLI:
        available = [name for name in available if name != "Glob"]
    argv = ["--tools", ",".join(available), "--permission-mode", mode]
    if tools in (Tools.READ, Tools.ALL) and "--restricted" in features.flags:
        argv.append("--restricted")
    # The client's tools: none exist until a request declares them.
    return [*argv, "--allowedTools", *allowed, TOOL_PREFIX.rstrip("_")]


# --- control messages and prompts ---
def control_request(request_id: str, subtype: str, **fields: Any) -> Dict[str, Any]:
    request = {"subtype": subtype, **fields}
    return {"type": "control_request", "request_id": request_id, "request": request}


# What the validator of the CLI knows (Ajv, draft 07). For any other word, or a dialect that it does
# not know, the CLI drops the whole schema without a word. Source: 2.1.197 and 2.1.332.
SCHEMA_VALUES = frozenset(
    "type required enum const $ref description title default examples minLength maxLength pattern"
    " minimum maximum exclusiveMinimum exclusiveMaximum multipleOf minItems maxItems uniqueItems"
    " minProperties maxProperties readOnly writeOnly nullable $comment".split())
SCHEMA_PARTS = frozenset(
    "items additionalItems additionalProperties contains propertyNames not if then else allOf anyOf"
    " oneOf".split())
SCHEMA_MAPS = frozenset("properties patternProperties $defs definitions dependencies".split())
# Named so since draft 2019-09.
SCHEMA_ALIASES = {"dependentRequired": "dependencies", "dependentSchemas": "dependencies"}


# Words that demand nothing.
SCHEMA_REMARKS = frozenset(
    "$schema $id $anchor $vocabulary discriminator deprecated example xml externalDocs"
    " prefixItems".split())


def cli_schema(schema: Any) -> Any:
    """Return a JSON Schema without what the CLI does not know. What satisfies the schema satisfies
    the result."""
    return clean_schema(schema)[0]


def clean_schema(schema: Any) -> Tuple[Any, bool]:
    """Do what cli_schema does. -> (the result, whether it demands less)."""
    if isinstance(schema, list):
        cleaned = list(map(clean_schema, schema))
        return [part for part, _ in cleaned], any(is_weaker for _, is_weaker in cleaned)
    if not isinstance(schema, dict):
        return schema, False
    result: Dict[str, Any] = {}
    is_weaker = False
    for given, value in schema.items():
        word = str(SCHEMA_ALIASES.get(given, given))
        if word in SCHEMA_VALUES:
            result[word] = value
        elif word in SCHEMA_PARTS:
            result[word], is_part_weaker = clean_schema(value)
            is_weaker |= is_part_weaker
            # Of a weaker part these would demand more.
            if is_part_weaker and word in ("not", "if", "oneOf"):
                part = result.pop(word)
                if word == "oneOf":
                    result["allOf"] = [*result.get("allOf", []), {"anyOf": part}]
        elif word in SCHEMA_MAPS and isinstance(value, dict):
            parts = {name: clean_schema(part) for name, part in value.items()}
            is_weaker |= any(is_part_weaker for _, is_part_weaker in parts.values())
            parts = {name: part for name, (part, _) in parts.items()}
            result[word] = {**result.get(word, {}), **parts}
        else:
            is_weaker |= word not in SCHEMA_REMARKS and not word.startswith("x-")
    return finish_schema(schema, result), is_weaker


def finish_schema(schema: Mapping[str, Any], result: Dict[str, Any]) -> Dict[str, Any]:
    """Add what draft 07 says in another way. A format becomes a description."""
    if "if" not in result:
        for word in ("then", "else"):
            result.pop(word, None)
    if schema.get("minContains") == 0:
        result.pop("contains", None)
    if "type" not in result:
        result.pop("nullable", None)
    if isinstance(schema.get("prefixItems"), list):
        result["items"] = cli_schema(schema["prefixItems"])
        if "items" in schema:
            result["additionalItems"] = cli_schema(schema["items"])
    if isinstance(schema.get("format"), str):
        text = str(result.get("description") or "")
        result["description"] = ("%s Format: %s" % (text, schema["format"])).lstrip()
    return result


def initialize_requests(session: SessionConfig, features: Features) -> List[Dict[str, Any]]:
    """Return the control requests that configure a fresh process; the first has the id "1"."""
    agent: Dict[str, Any] = {"description": "answers API requests", "prompt": session.system_prompt}
    if session.tools == Tools.NONE:
        agent["tools"] = [TOOL_PREFIX + tool["name"] for tool in session.client_tools]
    if session.model:
        agent["model"] = session.model
    initialize: Dict[str, Any] = {
        "subtype": "initialize", "hooks": None, "title": "api",
        "systemPrompt": session.system_prompt, "agents": {"bridge": agent}}
    if session.json_schema:
        initialize["jsonSchema"] = cli_schema(json.loads(session.json_schema))
    if session.client_tools:
        initialize["sdkMcpServers"] = [MCP_SERVER]
    requests = [initialize]
    if session.effort and features.version >= EFFORT_CLI:
        settings = {"effortLevel": session.effort}
        requests.append({"subtype": "apply_flag_settings", "settings": settings})
    return [control_request(str(number), **request) for number, request in enumerate(requests, 1)]


def cli_line(message: Mapping[str, Any]) -> bytes:
    # The end of the line costs no copy so.
    return large_json(message, lambda value: json.dumps(value) + "\n").encode()


def cli_message(role: str, content: Content) -> Dict[str, Any]:
    blocks = list(content) if not isinstance(content, str) else [{"type": "text", "text": content}]
    return {"type": role, "message": {"role": role, "content": blocks}}


def user_message(content: Content, wants_reply: bool = True) -> Dict[str, Any]:
    """Build a user message; with wants_reply=False it only replays history. The CLI takes a leading
    "/" of the last block for a command: a space in front makes it text."""
    message = cli_message("user", content)
    blocks = message["message"]["content"]
    if blocks[-1]["type"] == "text" and blocks[-1]["text"].startswith("/"):
        blocks[-1] = {**blocks[-1], "text": " " + blocks[-1]["text"]}
    return message if wants_reply else {**message, "shouldQuery": False}


def single_text(content: Content) -> Optional[str]:
    """Return the text of a content that is one text; None for any other."""
    if isinstance(content, str):
        return content
    is_text = len(content) == 1 and content[0]["type"] == "text"
    return str(content[0]["text"]) if is_text else None


def is_pipeable(number: int, turn: HistoryTurn) -> bool:
    return number > 0 and bool(single_text(turn.message))


def piped_message(text: str) -> Dict[str, Any]:
    """Build an earlier message of the user that needs no turn of its own."""
    return {**cli_message("assistant", ()), PIPED_TEXT: text}


def has_rewound(response: Mapping[str, Any], message_id: str) -> bool:
    """Return whether the process took back this message and all after it. The response is a success
    also if it did not."""
    details = response.get("response") or {}
    return details.get("rewound") is True and details.get("targetMessageUuid") == message_id


def assistant_message(content: Content, message_id: str = "", model: str = "") -> Dict[str, Any]:
    """Build an earlier answer to replay; the API would refuse blank text later. message_id: without
    one, 2.1.197 merges all answers that have tool calls. model: the CLI drops what another model
    than the present one thought."""
    if isinstance(content, str) and not content.strip():
        content = NO_ANSWER
    message = cli_message("assistant", content)
    message["message"].update(without_none({"id": message_id or None, "model": model or None}))
    return message


def answer_settings(chat: Chat) -> Dict[str, str]:
    """Return the variables by which the CLI limits and begins an answer. An empty one resets it.

    Source: the requests of 2.1.197 and 2.1.332."""
    settings: Dict[str, str] = {}
    is_short = chat.max_tokens is not None and chat.max_tokens <= THINKING_TOKENS
    if chat.max_tokens and not chat.json_schema:
        settings[OUTPUT_LIMIT] = str(chat.max_tokens)
    # Thoughts count as output: they would use a small limit up.
    is_silent = is_short and not chat.effort and not chat.json_schema and chat.thinking != SHOWN
    if chat.thinking == OFF or is_silent or chat.prefill:
        settings["CLAUDE_CODE_DISABLE_THINKING"] = "1"
    if chat.prefill:
        # The CLI's own history cannot end with an answer.
        messages = [{"role": turn["role"], "content": prefix_tool_names(turn)}
                    for turn in (*chat.turns, {"role": "assistant", "content": chat.prefill})]
        settings[EXTRA_BODY] = large_json({"messages": messages}, json.dumps)
    return settings


def transcript(history: Sequence[HistoryTurn], session_id: str, now: float, date: str = "",
               snapshot: Mapping[str, Any] = {}) -> str:
    """Return a file for --resume that holds a history without its last answer.
    The last row is invisible to the API; without it the CLI would add an answer of its own. All
    fields are needed: 2.1.197 may send nothing without one.
    session_id: a UUID. date: 2026-12-31, for a history that follows on stdin. Otherwise the CLI
    puts the date behind the last message of each new process, where the prompt cache of the API
    ends; with it, the requests of all processes begin like those of one that lives on.
    snapshot: how the CLI sees the place where it runs. If it is true, the CLI does not describe its
    folder and system to the model, behind the client's words; what it would say stands here as a
    blank.

    Source: the requests of 2.1.197 and 2.1.332 are those of the same turns sent one by one."""
    rows: List[Dict[str, Any]] = []

    def add(kind: str, **fields: Any) -> None:
        rows.append({
            "parentUuid": rows[-1]["uuid"] if rows else None, "isSidechain": False,
            "uuid": "%08x%s" % (len(rows), session_id[8:]), "timestamp": iso_time(now),
            "sessionId": session_id, "type": kind, **fields})

    def add_user(content: Content) -> None:
        add("user", message=cli_message("user", content)["message"])

    def add_answer(content: Content, **fields: Any) -> None:
        message = assistant_message(content, "msg_told_%d" % len(rows))["message"]
        usage = {"input_tokens": 0, "output_tokens": 0}
        message.update(type="message", model="<synthetic>", stop_reason="end_turn",
                       stop_sequence=None, usage=usage)
        add("assistant", message=message, **fields)

    if date:
        add("attachment", attachment={"type": "date", "date": date})
    if snapshot:
        add("attachment", attachment={"type": "environment", "snapshot": snapshot},
            rendered=[{"content": " "}])
    for turn in history[:-1]:
        add_user(turn.message)
        add_answer(turn.response)
    if history:
        add_user(history[-1].message)
    add_answer((), isVirtual=True)
    return "".join(as_json(row) + "\n" for row in rows)


# --- the client's tools, offered as a server of the Model Context Protocol ---
def truncate_descriptions(
        client_tools: Sequence[Mapping[str, Any]]) -> Tuple[Tuple[Mapping[str, Any], ...], str]:
    """Shorten descriptions that the CLI would cut. -> (the tools, instructions with the
    descriptions that are longer)."""
    result = []
    instructions = ""
    for tool in client_tools:
        text = tool["description"]
        if len(text) > DESCRIPTION_CHARACTERS:
            name = TOOL_PREFIX + tool["name"]
            instructions += "\n\nThe description of the tool %s:\n%s" % (name, text)
            note = "... (see the instructions for the whole description)"
            text = text[: DESCRIPTION_CHARACTERS - len(note) - 8] + note
        result.append({**tool, "description": text})
    return tuple(result), instructions


def prefix_tool_names(turn: Mapping[str, Any]) -> List[Block]:
    """Return the content of a turn with the tool names that the model knows."""
    return [{**block, "name": TOOL_PREFIX + block["name"]} if block["type"] == "tool_use" else block
            for block in turn["content"]]


def mcp_result(
        message: Mapping[str, Any], client_tools: Sequence[Mapping[str, Any]]) -> Dict[str, Any]:
    """Answer an MCP request of the CLI that is not a call of a tool."""
    method = message.get("method")
    if method == "initialize":
        return {
            "protocolVersion": (message.get("params") or {}).get("protocolVersion"),
            "capabilities": {"tools": {}},
            "serverInfo": {"name": MCP_SERVER, "version": __version__}}
    return {"tools": client_tools} if method == "tools/list" else {}


def mcp_content(block: Block) -> Optional[Dict[str, Any]]:
    """Return a tool_result as the answer to a call; None if the CLI would not pass it on."""
    content = block.get("content") or "(no result)"
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts: List[Dict[str, Any]] = []
    for part in content:
        source = part.get("source") or {}
        if part["type"] == "text":
            parts.append({"type": "text", "text": part["text"]})
        elif part["type"] == "image" and source.get("type") == "base64":
            image = {"type": "image", "data": source["data"], "mimeType": source["media_type"]}
            parts.append(image)
        else:
            return None
    if sum(len(part.get("text", "")) for part in parts) > RESULT_CHARACTERS:
        return None
    return {"content": parts, "isError": bool(block.get("is_error"))}


def mcp_results(content: Content) -> Optional[Dict[str, Dict[str, Any]]]:
    """Return the answers in a turn of tool results by call id; None if it holds anything else."""
    results: Dict[str, Dict[str, Any]] = {}
    for block in () if isinstance(content, str) else content:
        result = mcp_content(block) if block["type"] == "tool_result" else None
        if result is None:
            return None
        results[block["tool_use_id"]] = result
    return results or None


# --- what a process holds ---
class HeldTurn(NamedTuple):
    """One turn that a process holds.
    prompt: the digest of its message. digest: of all turns up to this one.
    message_id: of the line that sent it, to rewind to; None if it was sent in another way."""
    prompt: bytes
    digest: bytes
    message_id: Optional[str] = None


def content_digest(content: Content) -> bytes:
    """Return a digest that is equal for equal contents, as a text or as blocks."""
    text = single_text(content)
    if text is not None:
        return hashlib.sha256(b"text:" + text.encode("utf-8", "surrogatepass")).digest()
    text = large_json(content, partial(json.dumps, sort_keys=True))
    return hashlib.sha256(b"blocks:" + text.encode()).digest()


def answer_digest(content: Content) -> bytes:
    """Return the digest of an answer. Blanks around it, the division into blocks, the text beside
    calls of tools and their inputs do not count, because clients change them; ids are unique."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    text = "".join(block["text"] for block in content if block["type"] == "text").strip()
    calls = [{"type": "tool_use", "id": block["id"]} for block in content
             if block["type"] == "tool_use"]
    return content_digest(calls or text or NO_ANSWER)


def hold_turn(before: Sequence[HeldTurn], turn: HistoryTurn,
              message_id: Optional[str] = None) -> HeldTurn:
    """Return the turn that follows those before it."""
    prompt = content_digest(turn.message)
    previous = before[-1].digest if before else b""
    digest = hashlib.sha256(previous + prompt + answer_digest(turn.response)).digest()
    return HeldTurn(prompt, digest, message_id)


def answer_content(answer: Answer) -> List[Block]:
    """Return an answer as a client sends it back."""
    blocks: List[Block] = [{"type": "text", "text": replace_surrogates(answer.text)}]
    return blocks + [
        {"type": "tool_use", "id": call.id, "name": TOOL_PREFIX + call.name,
         "input": call.arguments} for call in answer.stop_info.calls]


# --- the CLI's output ---
class LineFramer:
    """Split a stream of bytes into lines. Raises OverflowError for one over `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: List[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> List[bytes]:
        """Return the lines that `data` completes, without their ends and without empty lines."""
        *lines, remainder = data.split(b"\n")
        if lines:
            lines[0] = b"".join(self._parts) + lines[0]
            self._parts = []
            self._size = 0
        self._parts.append(remainder)
        self._size += len(remainder)
        if self._size > self._limit or any(len(line) > self._limit for line in lines):
            raise OverflowError("a line is longer than %d bytes" % self._limit)
        return [line.rstrip(b"\r") for line in lines if line.strip()]


class CliEvent(NamedTuple):
    """One line of the CLI.
    kind: init, delta, block (another step of a block), message_start, message_delta, assistant,
    tool_result, rate_limits, retry, result, control_response, control_request or noise.
    tool_ids: the tool calls that this line starts (assistant) or finishes (tool_result)."""
    kind: str
    body: Mapping[str, Any] = {}
    text: str = ""
    tool_ids: Tuple[str, ...] = ()


EVENT_KINDS = {
    "result": "result", "control_response": "control_response",
    "control_request": "control_request", "rate_limit_event": "rate_limits"}


def parse_cli_event(line: bytes) -> CliEvent:
    """Parse a line of `claude`; unknown types are noise. Raises ValueError for broken JSON."""
    if not line.lstrip().startswith(b"{"):
        return CliEvent("noise")
    body = json.loads(line.decode("utf-8", "replace"))
    kind = str(body.get("type"))
    if kind == "stream_event" and not body.get("parent_tool_use_id"):
        event = body.get("event") or {}
        event_type = str(event.get("type"))
        delta = event.get("delta") or {}
        if event_type == "content_block_delta" and delta.get("type") == "text_delta":
            return CliEvent("delta", body, str(delta.get("text") or ""))
        if event_type.startswith("content_block_"):
            return CliEvent("block", body)
        is_of_message = event_type in ("message_start", "message_delta")
        return CliEvent(event_type if is_of_message else "noise", body)
    if kind == "system":
        kinds = {"init": "init", "api_retry": "retry"}
        return CliEvent(kinds.get(str(body.get("subtype")), "noise"), body)
    if kind == "assistant":
        return CliEvent("assistant", body, tool_ids=_tool_ids(body, "tool_use", "id"))
    if kind == "user":
        return CliEvent("tool_result", body, tool_ids=_tool_ids(body, "tool_result", "tool_use_id"))
    return CliEvent(EVENT_KINDS.get(kind, "noise"), body)


def _tool_ids(body: Mapping[str, Any], block_type: str, key: str) -> Tuple[str, ...]:
    content = (body.get("message") or {}).get("content")
    if not isinstance(content, list):
        return ()
    return tuple(str(block.get(key)) for block in content if block.get("type") == block_type)


def parse_rate_limits(body: Mapping[str, Any], now: float) -> RateLimitStatus:
    """Read a `rate_limit_event`. An event without a type and a reset is no limit of the plan (any
    other 429 causes one). Only 2.1.330 reports all windows each time."""
    info = body.get("rate_limit_info")
    if not isinstance(info, dict):
        info = {}
    kind = info.get("rateLimitType")
    status = info.get("status")
    resets_at = number_or_none(info.get("resetsAt"))
    is_using_overage = info.get("isUsingOverage") is True
    parts: Dict[str, Mapping[str, Any]] = {str(kind): info} if kind else {}
    all_windows = info.get("unifiedWindows")
    if isinstance(all_windows, dict):
        parts.update((str(k), part) for k, part in all_windows.items() if isinstance(part, dict))
    parts.pop("overage", None)
    windows = []
    for name, part in list(parts.items())[:10]:
        part_status = part.get("status") or (status if name == kind else None)
        window = RateLimitWindow(
            replace_surrogates(name[:40]), _short_text(part_status),
            number_or_none(part.get("utilization")), number_or_none(part.get("resetsAt")), now)
        windows.append(window)
    resets = [window.resets_at or 0 for window in windows if (window.utilization or 0) >= 1]
    if kind != "overage" or not resets:
        resets.append(resets_at or 0)
    latest_reset = max(resets) or None
    if windows or kind:
        # Extra usage is used until the plan allows requests again.
        overage_status = info.get("overageStatus")
        overage_reset = number_or_none(info.get("overageResetsAt"))
        if is_using_overage:
            overage_status, overage_reset = "in_use", latest_reset
        windows.append(RateLimitWindow(
            "overage", _short_text(overage_status), None, overage_reset or None, now))
    return RateLimitStatus(
        is_used_up=status == "rejected" and bool(kind or resets_at) and not is_using_overage,
        is_using_overage=is_using_overage, resets_at=latest_reset, windows=tuple(windows),
        is_model_limit=str(kind).startswith("seven_day_"))


def _short_text(value: Any) -> Optional[str]:
    return replace_surrogates(str(value)[:40]) if value else None


def pause_seconds(resets_at: Optional[float], now: float) -> float:
    """Return how long to pause for a limit that resets then. If the reset time is missing or long
    past (a wrong clock), return the default pause."""
    if resets_at is None or resets_at < now - 60:
        return DEFAULT_PAUSE_SECONDS
    return min(max(resets_at - now, 5.0), LONGEST_PAUSE_SECONDS)


def retry_code(status: Any) -> Optional[str]:
    """Return what lets the CLI retry, as a key of RUN_ERRORS. status: of the API's answer; None if
    there was none."""
    number = number_or_none(status)
    if number in (429, 529):
        return "overloaded"
    if number == 401:
        return "auth_required"
    if status is None or number in (407, 408) or (number or 0) >= 500:
        return "network"
    return None


LOGIN_WORDS = (
    "authentication_failed", "oauth_org_not_allowed", "account_on_hold", "verification_required")
NO_MODEL = "There's an issue with the selected model"
TOO_LONG = "Prompt is too long"
# The CLI continues the answer by itself; the client sees one message.
CUT_REASONS = ("max_tokens", "model_context_window_exceeded")


def classify_failure(result: Mapping[str, Any], error_word: str,
                     limits: RateLimitStatus = RateLimitStatus()) -> RunFailed:
    """Return the outcome behind a `result` line that is an error.
    error_word: the `error` of the last assistant line. limits: the last that the process reported.

    Source: the CLI's answers to each error of the API."""
    errors = "; ".join(map(str, result.get("errors") or ()))
    text = str(result.get("result") or errors or "claude failed: %s" % result.get("subtype"))
    match = re.match(r"API Error: (\d{3})\b", text)
    status = number_or_none(result.get("api_error_status"))
    if not status and match:
        status = float(match.group(1))
    no_login = re.match(r"Not logged in|Invalid API key|Failed to authenticate", text)
    code = "cli_error"
    if result.get("stop_reason") == "refusal":
        code = "refused"
    elif error_word in LOGIN_WORDS or status in (401, 403) or no_login:
        code = "auth_required"
    elif error_word == "rate_limit" or status == 429:
        if limits.is_used_up or not text.startswith("API Error"):
            return RunFailed("usage_limit", text, limits.resets_at, limits.is_model_limit)
        code = "overloaded"
    elif error_word == "model_not_found" or status == 404 or text.startswith(NO_MODEL):
        code = "model_not_found"
    elif status == 413 or text.startswith("Request too large"):
        code = "request_too_large"
    elif result.get("terminal_reason") == "prompt_too_long" or text.startswith(TOO_LONG):
        code = "context_too_long"
    elif (status in (407, 408) or (status or 0) >= 500 or error_word == "server_error"
            or "(HTTP 200)" in text):
        # No answer, or that of a proxy, of a broken server or of the login page of a network.
        code = retry_code(status) or "network"
    elif (status or 0) >= 400 and status != 402 and error_word != "billing_error":
        code = "invalid_request"
    is_answered = status is not None or code in ("refused", "model_not_found", "context_too_long")
    return RunFailed(code, text, is_of_model=code == "overloaded", is_answered=is_answered)


USAGE_NAMES = (
    "input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


def turn_usage(result: Mapping[str, Any], spent_usd: float,
               counted: Usage = Usage()) -> Tuple[Usage, float]:
    """Return the figures of one turn and the cost so far.
    The CLI reports tokens per turn. counted: the part that was reported at tool calls. It reports
    the cost as the sum of the process, after --resume of the session (2.1.330) or not (2.1.197): a
    sum below `spent_usd` started again at 0."""
    counts = token_counts(result.get("usage"))
    amounts = [max(0, counts.get(name, 0) - int(part)) for name, part in zip(USAGE_NAMES, counted)]
    total = number_or_none(result.get("total_cost_usd")) or 0.0
    cost = total - spent_usd if total >= spent_usd else total
    return Usage(amounts[0], amounts[1], amounts[2], amounts[3], round(cost, 8)), total


def token_counts(usage: Any) -> Dict[str, int]:
    """Return the counts that a `usage` of the Messages API has."""
    if not isinstance(usage, dict):
        return {}
    counts = {name: number_or_none(usage.get(name)) for name in USAGE_NAMES}
    return {name: int(value) for name, value in counts.items() if value is not None}


class Model(NamedTuple):
    """An alias or the full name of a model, and its display name."""
    id: str
    name: str


def read_models(line: bytes) -> Tuple[Model, ...]:
    """Return the models in the CLI's answer to `initialize`; none in any other line. Aliases come
    first, then the full names behind them."""
    event = parse_cli_event(line)
    if event.kind != "control_response":
        return ()
    response = (event.body.get("response") or {}).get("response") or {}
    names: Dict[str, str] = {}
    for key in ("value", "resolvedModel"):
        for row in response.get("models") or ():
            model_id = str(row.get(key) or row["value"])
            name = str(row.get("displayName") or row["value"])
            names.setdefault(replace_surrogates(model_id), replace_surrogates(name))
    return tuple(Model(*item) for item in names.items())


class Login(NamedTuple):
    """The account of `claude`. billing_account: in words. is_billed_per_token: an API key pays."""
    is_signed_in: bool
    billing_account: str
    is_billed_per_token: bool = False


def parse_login(status: Mapping[str, Any]) -> Login:
    """Read `claude auth status`; an apiKeySource means an API key, whatever else it reports."""
    if not status.get("loggedIn"):
        return Login(False, "nobody: claude is not signed in")
    source = status.get("apiKeySource")
    if source and source != "none":
        return Login(True, "an API key (%s)" % redact(str(source)), True)
    if status.get("subscriptionType"):
        plan = str(status["subscriptionType"]).replace("_", " ").title()
        return Login(True, "Claude %s subscription" % plan)
    if status.get("authMethod") == "oauth_token":
        return Login(True, "the subscription behind CLAUDE_CODE_OAUTH_TOKEN")
    return Login(True, "the login of claude (%s)" % (status.get("authMethod") or "unknown method"))


# --- stop sequences ---
def cut_at_stop(text: str, stop_sequences: Sequence[str]) -> Tuple[str, Optional[str]]:
    """Cut a text before the stop sequence that ends first. -> (the text, that sequence or None)."""
    matches = [(text.index(sequence) + len(sequence), -len(sequence), sequence)
               for sequence in stop_sequences if sequence in text]
    if not matches:
        return text, None
    end, negative_length, sequence = min(matches)
    return text[: end + negative_length], sequence


def partial_stop_length(text: str, stop_sequences: Sequence[str]) -> int:
    """Return how many characters at the end of a text may begin a stop sequence."""
    lengths = [length
               for sequence in stop_sequences for length in range(1, len(sequence))
               if text.endswith(sequence[:length])]
    return max(lengths, default=0)


# === 7 Claude processes ==========================================================================
# Starts `claude` and reads its answers. Pure part: the text of a running answer. Then the operating
# system, the installed program, ClaudeProcess (one process and its pipes), Preparation (ahead of a
# request), Turn (one prompt), ClaudePool (all processes) and ClaudeRunner (retries). From
# ClaudeProcess on all is used from one thread, the worker. Read ClaudeRunner.run first, then
# ClaudePool.candidates.

# A line of the CLI can hold a whole answer, and JSON escapes make it longer.
LINE_BYTES = 4 * OUTPUT_BYTES
STDERR_BYTES = 4_096
# A longer text is sent in several deltas, so that a reader who disconnects has received a part.
DELTA_CHARACTERS = 16_384
# What is read of a text at once, and how many events are made of it, before they are sent.
TEXT_CHARACTERS = 1 << 18
EVENT_BATCH = 16
# Most processes that wait for the next turn of their conversation; and most that terminate.
MAX_KEPT_PROCESSES = 4
# At least so long a process waits for the results of the client's tools.
TOOL_RESULT_WAIT_SECONDS = 60.0
# How long a process with tools stays ready for the token that asked last.
TOOL_SPARE_SECONDS = 600.0
# After the last request, before a process is prepared, or is started although one of its kind is
# left: until then that would compete with the next requests.
QUIET_SECONDS = 1.0
# For the preparation of an idle process that a request needs now.
PREPARE_SECONDS = 5.0
EVENTS_AT_ONCE = 100
# Piped by the preparation: the first ones are slow. With 200 of them, a history of 200 pairs needs
# 57 instead of 68 ms.
WARM_UP_PAIRS = 200
# From so many turns on that each need a round trip, a transcript is faster: in a process that is
# started for it, and in one that waits for it.
TRANSCRIPT_TURNS = 40
TRANSCRIPT_TURNS_READY = 4
PIPE_POLL_SECONDS = 0.002
# The folder of transcripts, in the data folder.
TRANSCRIPTS = "transcripts"
# How often a silent run checks whether it was cancelled.
CANCEL_POLL_SECONDS = 0.1
# A wait of CANCEL_POLL_SECONDS that took so long was a sleep of the machine.
FROZEN_SECONDS = 3.0
# After the exit of a process, for its last output to be read.
DRAIN_AFTER_EXIT_SECONDS = 2.0
# For a busy process to exit before it is killed, and for an idle one, which does last work.
SHUTDOWN_GRACE_SECONDS = 1.2
IDLE_SHUTDOWN_GRACE_SECONDS = 5.0
# Pause after a failed start of an idle process.
SPARE_RETRY_SECONDS = 30.0
MODELS_SECONDS = 3_600.0
PROBE_SECONDS = 30.0


# --- the text of a running answer ---
class JobEvent(NamedTuple):
    """One step of a job, for its readers.
    kind: queued, started, delta, completed, error or heartbeat; part_start, part_delta and part_end
    of a LivePart.
    offset: where the text ends after it, in code points; 0 (queued, started): the text restarts.
    block: of a part; a thought is complete at its end."""
    kind: str
    offset: int = 0
    text: str = ""
    model: Optional[str] = None
    block: Block = {}


class TextCursor:
    """A reader's position in an answer's text. If the text was restarted, the old offset is
    meaningless: the reader receives `started` and the whole text.
    has_parts: whether it also reads the parts beside the text. part, pieces: its position there."""

    def __init__(self, after: int, has_parts: bool = False) -> None:
        self.generation = 0 if after else -1
        self.offset = after
        self.has_parts = has_parts
        self.part = 0
        self.pieces = -1

    def reset(self, generation: int = -1) -> None:
        self.generation = generation
        self.offset = self.part = 0
        self.pieces = -1

    def begin(self, generation: int, model: Optional[str]) -> Iterator[JobEvent]:
        """Yield `started` if the text was restarted."""
        if generation != self.generation:
            self.reset(generation)
            yield JobEvent("started", 0, model=model)

    def read_part(self, part: "LivePart") -> Iterator[JobEvent]:
        """Yield what is new of a part."""
        if self.pieces < 0:
            self.pieces = 0
            yield JobEvent("part_start", self.offset, block=part.block)
        text = "".join(part.pieces[self.pieces :])
        self.pieces = len(part.pieces)
        if text:
            yield JobEvent("part_delta", self.offset, text)
        if part.is_complete:
            self.part += 1
            self.pieces = -1
            yield JobEvent("part_end", self.offset, block=part.block)

    def read(self, read_from: Callable[[int], str]) -> Iterator[JobEvent]:
        """Yield what is new. read_from: returns the text, or a part of it, from an offset on."""
        text = read_from(self.offset)
        while text:
            for start in range(0, len(text), DELTA_CHARACTERS):
                piece = text[start : start + DELTA_CHARACTERS]
                self.offset += len(piece)
                yield JobEvent("delta", self.offset, piece)
            text = read_from(self.offset)


@dataclass
class LivePart:
    """What a running answer has beside its text: a thought, or a call of a client's tool.
    block: of the Messages API. offset: where it stands in the text. pieces: of the thought, or of
    the arguments as JSON."""
    block: Block
    offset: int
    pieces: List[str] = field(default_factory=list)
    is_complete: bool = False
    # Half a surrogate pair.
    pending: str = ""

    def add(self, text: str) -> None:
        text = self.pending + text
        end = len(text) - ("\ud800" <= text[-1:] <= "\udbff")
        self.pending = text[end:]
        if end:
            self.pieces.append(replace_surrogates(text[:end]))


class LiveText:
    """The text of a running answer, in code points. The worker writes; any thread reads.
    generation: counts the restarts of the text, in this run and before.
    parts: beside it, in their order. shows_thinking: whether thoughts are among them. tool_names:
    of the tools whose calls are.
    on_change: called after each change.
    stop_sequences: the text ends at the first one; `stopped_by` is that one."""

    def __init__(self, generation: int = 0, on_change: Callable[[], None] = lambda: None,
                 stop_sequences: Sequence[str] = (),
                 monotonic: Callable[[], float] = lambda: 0.0) -> None:
        self._lock = threading.RLock()
        self._monotonic = monotonic
        self._first_text_at: Optional[float] = None
        self._on_change = on_change
        # UTF-32, so that an offset is a slice: 4 bytes a character.
        self._data = bytearray()
        # Half a surrogate pair or a part of a stop sequence, which the next delta may complete.
        self._pending = ""
        self._is_started = False
        self.stop_sequences = stop_sequences
        self.stopped_by: Optional[str] = None
        self.shows_thinking = False
        self.tool_names: Set[str] = set()
        self.parts: List[LivePart] = []
        # Bytes of UTF-8 that arrived, in all attempts; of parts, characters.
        self.size = 0
        self.generation = generation
        self.model: Optional[str] = None
        # Why nothing arrives for a while.
        self.current_pause: Optional[Pause] = None
        # Whether the API answers, and the usage of its message until now.
        self.is_answering = False
        self.usage: Optional[Usage] = None

    def begin(self, model: Optional[str]) -> None:
        """Record that Claude accepted the prompt."""
        with self._lock:
            self.model = model
            self.current_pause = None
            self._is_started = True
        self._on_change()

    def add(self, text: str) -> None:
        text = self._pending + text
        if self.stop_sequences and not text.isascii():
            # Join two surrogates into one character, which a stop sequence may contain.
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        text, self.stopped_by = cut_at_stop(text, self.stop_sequences)
        pending = 0
        if not self.stopped_by:
            pending = int("\ud800" <= text[-1:] <= "\udbff")
            whole = text[: len(text) - pending]
            pending += partial_stop_length(whole, self.stop_sequences)
        self._pending = text[len(text) - pending :]
        self._append(text[: len(text) - pending])
        self._on_change()

    def follow_block(self, event: Mapping[str, Any]) -> None:
        """Follow a step of a block that is a part, and no text."""
        part = self.parts[-1] if self.parts and not self.parts[-1].is_complete else None
        delta = event.get("delta") or {}
        with self._lock:
            if event.get("type") == "content_block_start":
                block = event.get("content_block") or {}
                if block.get("type") != "text":
                    # What could have become a stop sequence.
                    self._append(self._pending)
                    self._pending = ""
                part = LivePart(block, len(self._data) // 4)
                name = str(block.get("name"))[len(TOOL_PREFIX) :]
                if block.get("type") == "tool_use" and name in self.tool_names:
                    part.block = {**block, "name": name, "input": {}}
                    self.parts.append(part)
                elif block.get("type") in THOUGHTS and self.shows_thinking:
                    self.parts.append(part)
            elif part and event.get("type") == "content_block_stop":
                if part.block["type"] == "thinking":
                    part.block = {**part.block, "thinking": "".join(part.pieces)}
                part.is_complete = True
            elif part and delta.get("type") == "signature_delta":
                part.block = {**part.block, "signature": str(delta.get("signature"))}
            elif part:
                text = str(delta.get("thinking") or delta.get("partial_json") or "")
                self.size += len(text)
                part.add(text)
        if part:
            self._on_change()

    def _append(self, text: str) -> None:
        text = replace_surrogates(text)
        if text and self._first_text_at is None:
            self._first_text_at = self._monotonic()
        with self._lock:
            self._is_started = True
            self._data += text.encode("utf-32-le")
            self.size += len(text.encode())

    def seconds_to_text(self, since: float) -> Optional[float]:
        """Return how long it took until the first text came; None if none did."""
        return None if self._first_text_at is None else self._first_text_at - since

    def restart(self) -> None:
        """Discard the text: it belonged to a tool call or to an aborted attempt."""
        with self._lock:
            if self._data or self.parts:
                self.generation += 1
            self._data = bytearray()
            self.parts = []
            self._pending = ""

    def reconcile(self, final_text: str) -> None:
        """Append the missing suffix, or replace the text if it differs."""
        self._pending = ""
        streamed = self.read()
        if not final_text.startswith(streamed):
            self.restart()
            streamed = ""
        self._append(final_text[len(streamed) :])
        self._on_change()

    def read(self, offset: int = 0, length: int = OUTPUT_BYTES) -> str:
        """Return at most `length` characters from an offset on."""
        with self._lock:
            return self._data[4 * offset : 4 * (offset + length)].decode("utf-32-le")

    def events_since(self, cursor: TextCursor) -> List[JobEvent]:
        """Return what a reader has not received yet, at most EVENT_BATCH events."""
        with self._lock:
            if not self._is_started:
                return []
            return list(islice(self._news(cursor), EVENT_BATCH))

    def _news(self, cursor: TextCursor) -> Iterator[JobEvent]:
        """Yield the same. Each part comes after the text in front of it."""
        def read_to(end: int) -> Callable[[int], str]:
            return lambda offset: self.read(offset, min(TEXT_CHARACTERS, max(0, end - offset)))

        yield from cursor.begin(self.generation, self.model)
        for part in self.parts[cursor.part :] if cursor.has_parts else ():
            yield from cursor.read(read_to(part.offset))
            yield from cursor.read_part(part)
            if not part.is_complete:
                return
        yield from cursor.read(read_to(len(self._data) // 4))


# --- processes of the operating system ---

# Set in the environment of every child process, and so of everything that it starts.
OWNER_ENV_VAR = "CAB_CHILD"
# <linux/prctl.h>
PR_SET_PDEATHSIG = 1
# <winnt.h>
PROCESS_QUERY_LIMITED_INFORMATION = 0x1000
PROCESS_TERMINATE_AND_SET_QUOTA = 0x0101
JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE = 0x2000
EXTENDED_LIMIT_INFORMATION = 9
# Keeps a console program from opening a window; 0 where there is none.
NO_WINDOW = getattr(subprocess, "CREATE_NO_WINDOW", 0)
# Windows has none.
SIGKILL: int = getattr(signal, "SIGKILL", 9)


def group_options(death_signal: int = signal.SIGINT) -> Dict[str, Any]:
    """Return Popen options for a session or group of its own; Ctrl-C is for the bridge alone.
    On Linux the kernel ends the child together with the thread that started it, by default with
    SIGINT, on which the CLI also ends the command that a tool is running. From now on Ctrl-C passes
    by a thread that is not the main one: until its child has a group of its own, that would report
    it as an error."""
    if os.name == "nt":
        flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
        return {"creationflags": flags | NO_WINDOW}
    if sys.platform != "linux":
        return {"start_new_session": True}
    parent = os.getpid()
    prctl = ctypes.CDLL(None).prctl
    if threading.current_thread() is not threading.main_thread():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])

    def die_with_bridge() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        prctl(PR_SET_PDEATHSIG, death_signal)
        if os.getppid() != parent:
            os._exit(1)

    return {"start_new_session": True, "preexec_fn": die_with_bridge}


def run_ps(*arguments: str) -> str:
    """Run `ps`, with times that depend neither on the locale nor on the time zone."""
    environment = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}
    result = subprocess.run(["ps", *arguments], env=environment, stdout=subprocess.PIPE, timeout=5)
    return result.stdout.decode("utf-8", "replace")


def ps_field(pid: int, column: str) -> Optional[str]:
    """Return a column of `ps`, on systems without /proc."""
    return run_ps("-o", column + "=", "-p", str(pid)).strip() or None


@contextlib.contextmanager
def windows_process(
        pid: int, access: int = PROCESS_QUERY_LIMITED_INFORMATION) -> Iterator[Tuple[Any, Any]]:
    """Open a process on Windows. -> (kernel32, handle)."""
    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined,unused-ignore]
    kernel.OpenProcess.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(kernel.OpenProcess(access, False, pid))
    try:
        yield kernel, handle
    finally:
        kernel.CloseHandle(handle)


def started_at(pid: int) -> Optional[str]:
    """Return when a process started, in the system's own notation; None if it is gone. Together
    with the pid this identifies one process for ever."""
    try:
        if sys.platform == "linux":
            boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
            stat_line = Path("/proc/%d/stat" % pid).read_text(errors="replace")
            state, *columns = stat_line.rpartition(")")[2].split()
            return None if state == "Z" else "%s/%s" % (boot, columns[18])
        if os.name == "nt":
            with windows_process(pid) as (kernel, handle):
                times = (ctypes.c_ulonglong * 4)()
                pointers = [ctypes.byref(times, 8 * number) for number in range(4)]
                return str(times[0]) if kernel.GetProcessTimes(handle, *pointers) else None
        return ps_field(pid, "lstart")
    except (OSError, IndexError, ValueError, subprocess.SubprocessError):
        return None


def program_of(pid: int) -> Optional[str]:
    """Return the file that a process runs; None if the system does not reveal it."""
    try:
        if sys.platform == "linux":
            return os.readlink("/proc/%d/exe" % pid)
        if os.name == "nt":
            with windows_process(pid) as (kernel, handle):
                name = ctypes.create_unicode_buffer(32_768)
                size = ctypes.byref(ctypes.c_ulong(32_768))
                is_known = kernel.QueryFullProcessImageNameW(handle, 0, name, size)
                return name.value if is_known else None
        return ps_field(pid, "comm")
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def processes_tagged(tag: str) -> List[int]:
    """Linux: return other processes whose environment has OWNER_ENV_VAR=tag... This includes the
    descendants of dead children."""
    pids = []
    entry_bytes = ("\0%s=%s" % (OWNER_ENV_VAR, tag)).encode()
    for name in os.listdir("/proc") if sys.platform == "linux" else ():
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                if entry_bytes in b"\0" + Path("/proc", name, "environ").read_bytes():
                    pids.append(int(name))
    return pids


def linux_processes() -> Iterator[Tuple[int, str, int]]:
    """Yield (pid, state, parent) of every process."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, IndexError):
            stat_line = Path("/proc", name, "stat").read_text(errors="replace")
            state, parent = stat_line.rpartition(")")[2].split()[:2]
            yield int(name), state, int(parent)


def process_table() -> List[Tuple[int, int]]:
    """Return (pid, parent) of every process; empty on Windows, where taskkill needs no table."""
    if sys.platform == "linux":
        return [(pid, parent) for pid, _, parent in linux_processes()]
    if os.name == "nt":
        return []
    try:
        columns = run_ps("-axo", "pid=,ppid=").split()
    except (OSError, subprocess.SubprocessError):
        return []
    return list(zip(map(int, columns[::2]), map(int, columns[1::2])))


def descendants(pid: int) -> List[int]:
    """Return the processes below one, but not those whose parent died (Linux: see the tag)."""
    table = process_table()
    family = {pid}
    size = 0
    while size < len(family):
        size = len(family)
        family |= {child for child, parent in table if parent in family}
    return sorted(family - {pid})


def kill_process(pid: int, group: bool = False) -> None:
    """Kill a process, on Windows with everything that it started. It may be gone already."""
    if os.name == "nt":
        try:
            subprocess.run(["taskkill", "/T", "/F", "/PID", str(pid)], creationflags=NO_WINDOW,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=10)
        except (OSError, subprocess.SubprocessError):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGTERM)
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        (os.killpg if group else os.kill)(pid, SIGKILL)


class JobLimits(ctypes.Structure):
    """Source: Microsoft, "JOBOBJECT_EXTENDED_LIMIT_INFORMATION structure"."""
    _fields_ = [
        ("times", ctypes.c_int64 * 2), ("flags", ctypes.c_uint32), ("sets", ctypes.c_size_t * 2),
        ("active", ctypes.c_uint32), ("affinity", ctypes.c_size_t), ("class", ctypes.c_uint32 * 2),
        ("io", ctypes.c_uint64 * 6), ("memory", ctypes.c_size_t * 4)]


def job_of(pid: int) -> Any:
    """Put a process into a new job object of Windows. All that it starts is in it, too, and ends
    when the only handle is closed, also by the end of the bridge. -> the handle; None if that is
    not allowed. Source: Microsoft, "Job Objects", "AssignProcessToJobObject function"."""
    limits = JobLimits(flags=JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE)
    with windows_process(pid, PROCESS_TERMINATE_AND_SET_QUOTA) as (kernel, process):
        kernel.CreateJobObjectW.restype = ctypes.c_void_p
        job = ctypes.c_void_p(kernel.CreateJobObjectW(None, None))
        is_set = kernel.SetInformationJobObject(
            job, EXTENDED_LIMIT_INFORMATION, ctypes.byref(limits), ctypes.sizeof(limits))
        if is_set and kernel.AssignProcessToJobObject(job, process):
            return job
        kernel.CloseHandle(job)
        return None


class ChildProcess(subprocess.Popen):  # type: ignore[type-arg]
    """A process that ends together with all that it started: POSIX by its group, Windows by a job
    object or, if there is none, by taskkill. Raises OSError."""

    def __init__(
            self, argv: Sequence[str], death_signal: int = signal.SIGINT, **options: Any) -> None:
        super().__init__(list(argv), bufsize=0, **options, **group_options(death_signal))
        self._job = job_of(self.pid) if os.name == "nt" else None
        # cmd.exe may have started the program before it was in the job.
        self._needs_kill = not self._job or argv[0].lower().endswith(BATCH_FILES)

    def kill_all(self) -> None:
        """Kill it and all that it started, also if it has exited itself."""
        if os.name != "nt" or (self._needs_kill and self.poll() is None):
            kill_process(self.pid, group=True)
        if self._job:
            kernel = ctypes.windll.kernel32  # type: ignore[attr-defined,unused-ignore]
            kernel.CloseHandle(self._job)
            self._job = None

    if os.name == "nt":
        # Windows has no SIGTERM; what it has would end the first process alone.
        terminate = kill_all


def is_same_process(pid: int, started: Optional[str]) -> bool:
    return started is not None and started_at(pid) == started


def find_orphans(tag: str, recorded: Iterable[ProcessRow]) -> Dict[int, Optional[str]]:
    """Find the processes that a dead bridge with this tag left behind. -> {pid: start time}. By tag
    on Linux, elsewhere by pid, start time and, if it was recorded, program."""
    pids = {pid
            for pid, started, program in recorded
            if started_at(pid) == started and program in (None, program_of(pid))}
    pids = pids.union(*map(descendants, pids), processes_tagged(tag)) - {os.getpid()}
    return {pid: started_at(pid) for pid in pids}


def kill_orphans(tag: str, recorded: Iterable[ProcessRow]) -> List[int]:
    """Kill what a dead bridge left behind. -> the killed pids."""
    orphans = find_orphans(tag, recorded)
    for pid in orphans:
        kill_process(pid)
    for _ in range(200):
        if not any(is_same_process(pid, started) for pid, started in orphans.items()):
            break
        time.sleep(0.01)
    return sorted(orphans)


def feed_pipe(path: Path, text: str, is_alive: Callable[[], bool]) -> bool:
    """Let the program that waits at a named pipe read this text, twice. -> whether it did.
    `claude` opens the file of --resume two times. The second time it finds a file, so that it
    cannot take the second copy for a part of the first."""
    try:
        write_file_atomically(path.with_suffix(".part"), text)
    except OSError:
        return False
    for _ in range(int(PREPARE_SECONDS / PIPE_POLL_SECONDS)):
        try:
            handle = os.open(str(path), os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:
            # Nobody has opened it for reading yet.
            if not is_alive():
                return False
            time.sleep(PIPE_POLL_SECONDS)
    else:
        return False
    try:
        os.replace(path.with_suffix(".part"), path)
        view = memoryview(text.encode())
        while view:
            if not select.select([], [handle], [], PREPARE_SECONDS)[1]:
                return False
            view = view[os.write(handle, view) :]
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def file_fingerprint(path: str) -> Optional[Tuple[float, ...]]:
    """Return what changes when a program is replaced; None if it does not exist."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_mode


def home_folder(environ: Mapping[str, str]) -> Path:
    """Return the user's home; a folder that cannot exist for a user without one."""
    try:
        return Path(environ.get("HOME") or Path.home())
    except RuntimeError:
        return Path(os.devnull)


SESSION_RE = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?:\.\w+)*")


def remove_sessions(data_dir: Path, is_wanted: Callable[[str], bool]) -> None:
    """Delete what the CLI wrote of the sessions that nobody can resume."""
    for path in (data_dir / "claude-home" / "projects").glob("*/*"):
        match = SESSION_RE.fullmatch(path.name)
        if match and not is_wanted(match.group(1)):
            with contextlib.suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def reap_zombies(before: Set[int]) -> Set[int]:
    """Reap the orphans that PID 1 of a container inherits from tools. -> the present zombies.
    before: those of a second ago; a child of ours would have been reaped by its owner since."""
    zombies = {pid for pid, state, parent in linux_processes()
               if state == "Z" and parent == os.getpid()}
    for pid in zombies & before:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
    return zombies


# --- the installed program ---
def login_fingerprint(environ: Mapping[str, str]) -> Any:
    """Return what changes when the owner signs in again. The files are not read.
    Source: 2.1.197 and 2.1.332 on Linux; macOS keeps the login in a keychain."""
    # An empty value means the usual folder.
    folder = environ.get("CLAUDE_SECURESTORAGE_CONFIG_DIR", environ.get("CLAUDE_CONFIG_DIR"))
    home = home_folder(environ)
    files = (Path(folder or home / ".claude") / ".credentials.json",
             home / "Library/Keychains/login.keychain-db")
    return [file_fingerprint(str(file)) for file in files]


@dataclass(frozen=True)
class ClaudeInstall:
    """Which program runs, what it can do, and who pays. environment: of every process.
    is_recalled: that is from the last search; the program was not asked yet."""
    command: Tuple[str, ...]
    features: Features
    environment: Dict[str, str]
    billing_account: str
    is_billed_per_token: bool = False
    notes: Tuple[str, ...] = ()
    is_recalled: bool = False


SHARED_NOTE = (
    "This Claude Code keeps its login in its own settings folder, which the bridge therefore"
    " shares.")


def find_claude(config: Config, environ: Mapping[str, str]) -> ClaudeInstall:
    """Find the `claude` of this machine and its login. Raises CannotStart if there is none, or if
    it is too old or not signed in."""
    search = ClaudeSearch(config, environ)
    if config.demo:
        version = "%d.%d.%d (demo)" % MINIMUM_CLI
        features = Features(MINIMUM_CLI, version, NEEDED_FLAGS)
        account = parse_login({"loggedIn": True, "authMethod": "demo"}).billing_account
        return ClaudeInstall(search.command, features, search.own_environment, account)
    return search.ask()


def recall_claude(config: Config, environ: Mapping[str, str]) -> Optional[ClaudeInstall]:
    """Return what the last search brought, if program, login and settings are still the same."""
    return None if config.demo else ClaudeSearch(config, environ).recall()


class ClaudeSearch:
    """Where `claude` is, and what it is asked. Asking takes half a second, so that the result is
    stored in the data folder, under what changes it. Raises CannotStart."""

    def __init__(self, config: Config, environ: Mapping[str, str]) -> None:
        self.command = claude_command(config, environ)
        check_temporary_folder(environ)
        # What it starts, such as node, often lies beside it.
        folders = [environ.get("PATH", os.defpath), str(Path(self.command[0]).parent)]
        environ = {**environ, "PATH": os.pathsep.join(folders)}
        self._owner_environment = child_environment(environ, config.allow_api_key, None)
        home = private_directory(config.data_dir / "claude-home")
        write_account(home, environ)
        self.own_environment = child_environment(environ, config.allow_api_key, str(home))
        self._path = config.data_dir / "claude.json"

    def _key(self) -> str:
        """Return what is equal while the same program runs with the same login and settings."""
        files = [file_fingerprint(word) for word in self.command]
        names = {"HOME", "PATH", *PASSED_ENV, *API_KEYS, "CLAUDE_CONFIG_DIR"}
        values = {name: self._owner_environment.get(name) for name in sorted(names)}
        logins = [login_fingerprint(environment)
                  for environment in (self.own_environment, self._owner_environment)]
        # A digest, because a token may be among them.
        return digest(as_json([__version__, self.command, files, values, logins]))

    def recall(self) -> Optional[ClaudeInstall]:
        """Return what the last `ask` stored; None if something has changed since."""
        stored = read_json_object(self._path)
        with contextlib.suppress(KeyError, TypeError, ValueError):
            if stored["key"] == self._key():
                features = Features.read(stored["version"], " ".join(stored["flags"]))
                install = self._install(features, stored["isShared"], Login(*stored["login"]))
                return replace(install, is_recalled=True)
        return None

    def ask(self) -> ClaudeInstall:
        """Ask the program for its version, its flags and its login, and store that."""
        key = self._key()
        # What it contradicts must not be recalled again.
        with contextlib.suppress(OSError):
            self._path.unlink()
        # At the same time. Its own folder, because --version alone writes to the owner's.
        commands = (("--version",), ("--help",), LOGIN_COMMAND)
        probes = [start_probe(self.command + words, self.own_environment, words is LOGIN_COMMAND)
                  for words in commands]
        version_text, help_text = probes[0].result(), probes[1].result()
        features = Features.read(version_text, help_text)
        check_features(features, self.command[-1], version_text)
        login, is_shared = parse_login(read_login(probes[2].result())), False
        if not login.is_signed_in and owner_settings(self._owner_environment):
            output = probe(self.command + LOGIN_COMMAND, self._owner_environment, may_fail=True)
            login, is_shared = parse_login(read_login(output)), True
        if not login.is_signed_in:
            raise CannotStart(
                "Claude Code is installed but not signed in.",
                "run claude and sign in, or set CLAUDE_CODE_OAUTH_TOKEN (claude setup-token creates"
                " one), or try: claude_api_bridge.py start --demo")
        stored = {"key": key, "version": features.version_text, "flags": sorted(features.flags),
                  "isShared": is_shared, "login": login}
        with contextlib.suppress(OSError):
            write_file_atomically(self._path, as_json(stored))
        return self._install(features, is_shared, login)

    def _install(self, features: Features, is_shared: bool, login: Login) -> ClaudeInstall:
        environment = self._owner_environment if is_shared else self.own_environment
        return ClaudeInstall(
            self.command, features, environment, login.billing_account, login.is_billed_per_token,
            (SHARED_NOTE,) if is_shared else ())


def check_temporary_folder(environ: Mapping[str, str]) -> None:
    """Raise CannotStart if Node has no folder for temporary files: each request would fail.
    Source: os.tmpdir() of Node."""
    temporary = next(filter(None, map(environ.get, ("TMPDIR", "TMP", "TEMP"))), None)
    if temporary and not os.access(temporary, os.W_OK | os.X_OK):
        raise CannotStart("The folder for temporary files, %s, cannot be used." % temporary,
                          "create it, or set TMPDIR to another one")


def check_features(features: Features, program: str, version_text: str) -> None:
    """Raise CannotStart if the bridge cannot drive this version."""
    if not features.version:
        raise CannotStart(
            "%s does not answer like Claude Code (its --version prints %r)."
            % (program, version_text.strip()[:80]),
            "name the right program with --claude PATH")
    missing = sorted(NEEDED_FLAGS - features.flags)
    if features.version < MINIMUM_CLI or missing:
        minimum = "%d.%d.%d" % MINIMUM_CLI
        problem = "is too old; the bridge needs %s or newer" % minimum
        if features.version >= MINIMUM_CLI:
            problem = "cannot be driven safely: it lacks %s" % ", ".join(missing)
        raise CannotStart(
            "%s %s." % (features.version_text, problem),
            "update it to %s or newer: claude update, or npm install -g"
            " @anthropic-ai/claude-code@latest" % minimum)


def owner_settings(environ: Mapping[str, str]) -> bool:
    """Return whether the owner has used Claude Code here. If not, even a question for the login
    would create its files."""
    folder = Path(environ.get("CLAUDE_CONFIG_DIR") or home_folder(environ))
    return any((folder / name).exists() for name in (".claude.json", ".claude", "settings.json"))


def claude_command(config: Config, environ: Mapping[str, str]) -> Tuple[str, ...]:
    """Return the program as the first words of a command line. Raises CannotStart."""
    if config.demo:
        return (*own_command(), "demo-claude")
    return program_behind(claude_program(config, environ), search_path(environ))


def claude_program(config: Config, environ: Mapping[str, str]) -> Path:
    """Return the program, or the batch file that runs it. Raises CannotStart."""
    names = [config.claude or "claude"]
    if os.name == "nt" and not config.claude:
        names = ["claude.exe", "claude.cmd", "claude"]
    for name in names:
        program = shutil.which(name, path=search_path(environ))
        if program:
            return Path(program).absolute()
    raise CannotStart(
        "Claude Code CLI not found%s." % (": " + config.claude if config.claude else ""),
        "install it first: https://docs.anthropic.com/en/docs/claude-code; if it is installed, name"
        " it with --claude PATH; or try: claude_api_bridge.py start --demo")


# What runs a script by node, or a program, in the claude.cmd of npm's cmd-shim 7 and of pnpm.
SHIM_RE = re.compile(
    r'(?:(?:"%_prog%"|\bnode|node\.exe")\s+(?P<options>(?:--[\w=-]+\s+)*))?'
    r'"%(?:~dp0|dp0%)\\?(?P<target>[^"%]+\.(?:exe|[cm]?js))"\s+%\*')


def program_behind(program: Path, path: str) -> Tuple[str, ...]:
    """Return the first words of a command line for a program. A package manager's batch file is
    replaced by what it runs, because cmd.exe would read the other words, too."""
    is_batch = program.suffix.lower() in BATCH_FILES
    with contextlib.suppress(OSError):
        for shim in SHIM_RE.finditer(program.read_text("utf-8", "replace") if is_batch else ""):
            file = os.path.abspath(program.parent / shim["target"].replace("\\", os.sep))
            node = shutil.which("node", path=os.pathsep.join([str(program.parent), path]))
            if os.path.isfile(file) and file.endswith(".exe"):
                return (file,)
            if os.path.isfile(file) and node and shim["options"] is not None:
                return (os.path.abspath(node), *shim["options"].split(), file)
    return (str(program),)


def own_command() -> Tuple[str, str]:
    """Return this Python and this file, or the .pyz that holds it."""
    here = Path(__file__).absolute()
    return sys.executable, str(here.parent if here.parent.is_file() else here)


def search_path(environ: Mapping[str, str]) -> str:
    """Return PATH with the folders of installers, for a service whose PATH is short."""
    home = home_folder(environ)
    # The newest Node of nvm and its like.
    versions = [*home.glob(".nvm/versions/node/*/bin"),
                *home.glob(".local/share/fnm/node-versions/*/installation/bin")]
    versions.sort(key=lambda path: [int(part) for part in re.findall(r"\d+", str(path))])
    names = (".claude/local", ".local/bin", ".npm-global/bin", ".bun/bin", ".volta/bin",
             ".local/share/pnpm", "Library/pnpm", ".asdf/shims", ".local/share/mise/shims")
    folders = [environ.get("PATH", os.defpath), "/usr/local/bin", *(home / name for name in names),
               *reversed(versions), "/opt/homebrew/bin", "/home/linuxbrew/.linuxbrew/bin",
               "/opt/local/bin"]
    return os.pathsep.join(map(str, folders))


def probe(argv: Sequence[str], environment: Mapping[str, str], may_fail: bool = False,
          advice: str = "name the right program with --claude PATH") -> str:
    """Return what a short command prints. Raises CannotStart if it cannot be run; with its last
    line on stderr if it fails without output, unless it `may_fail`."""
    options: Dict[str, Any] = {"creationflags": NO_WINDOW}
    if threading.current_thread() is not threading.main_thread():
        # It ends with the thread. In the main thread Ctrl-C ends both.
        options = group_options(SIGKILL)
    try:
        result = subprocess.run(
            list(argv), env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, timeout=PROBE_SECONDS, **options)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or "no answer within %d s" % PROBE_SECONDS
        raise CannotStart("%s cannot be run: %s." % (argv[0], reason), advice) from None
    output = str(result.stdout, "utf-8", "replace")
    if result.returncode and not output.strip() and not may_fail:
        lines = result.stderr.decode("utf-8", "replace").strip().splitlines() or [""]
        reason = "exit status %d" % result.returncode
        if result.returncode < 0:
            reason = "killed by signal %d" % -result.returncode
            with contextlib.suppress(ValueError):
                reason = "killed by " + signal.Signals(-result.returncode).name
        if result.returncode == 127:
            advice = "it starts another program, such as node, that is not found: add the folder" \
                " of that to PATH"
        text = "%s cannot be run: %s." % (argv[0], ", ".join(filter(None, (lines[-1], reason))))
        raise CannotStart(redact(escape_controls(text)), advice)
    return output


def start_probe(argv: Sequence[str], environment: Mapping[str, str],
                may_fail: bool) -> "Future[str]":
    """Run `probe` in a thread of its own."""
    future: "Future[str]" = Future()

    def ask() -> None:
        try:
            future.set_result(probe(argv, environment, may_fail=may_fail))
        except Exception as error:
            future.set_exception(error)

    # A daemon, unlike those of an executor: the bridge may end before the program answers.
    threading.Thread(target=ask, name="probe", daemon=True).start()
    return future


# Without the owner's settings, as in our runs: they may name a helper that supplies keys.
LOGIN_COMMAND = ("--setting-sources=", "auth", "status")


def read_login(output: str) -> Mapping[str, Any]:
    """Return what `claude auth status` prints; empty if it is no JSON."""
    try:
        # A wrapper may print a line of its own first.
        status = json.JSONDecoder().raw_decode(output, output.index("{"))[0]
        return status if isinstance(status, dict) else {}
    except ValueError:
        return {}


def write_account(home: Path, environ: Mapping[str, str]) -> None:
    """Copy the account's ids, without name and e-mail address, to where the CLI reads them.
    The CLI then neither requests the profile nor sends the owner's address to the model. It accepts
    null for an unknown id."""
    target = home / ".claude.json"
    owner_home = Path(environ.get("CLAUDE_CONFIG_DIR") or home_folder(environ))
    account = read_json_object(owner_home / ".claude.json").get("oauthAccount")
    if not isinstance(account, dict):
        account = {}
    names = ("accountUuid", "organizationUuid", "billingType", "accountCreatedAt",
             "subscriptionCreatedAt", "ccOnboardingFlags")
    ids: Dict[str, Any] = {name: account.get(name) for name in names}
    ids["profileFetchedAt"] = 4_102_444_800_000
    current = read_json_object(target)
    if current.get("oauthAccount") != ids:
        # Without the file the CLI requests the profile itself.
        with contextlib.suppress(OSError):
            write_file_atomically(target, as_json({**current, "oauthAccount": ids}))


class ClaudeProgram:
    """The present `claude`; it may be replaced by an update while the bridge runs. detect: finds it
    again. Only the worker calls `redetect`; any thread reads `install`.
    can_rewind, can_pipe: what a process showed that it can do, None before one was asked.
    full_models: the full names of the models that have answered, by what was asked for."""

    def __init__(self, install: ClaudeInstall,
                 detect: Optional[Callable[[], ClaudeInstall]] = None) -> None:
        self.install = install
        self.can_rewind: Optional[bool] = None
        self.can_pipe: Optional[bool] = None
        self.full_models: Dict[Optional[str], str] = {}
        self._failed_preparations = 0
        self._detect = detect
        self._fingerprint = file_fingerprint(install.command[-1])
        # What `check` found, if it is news.
        self._checked: Optional[ClaudeInstall] = None

    def check(self) -> None:
        """Ask the program whether what was recalled is still so; in any thread."""
        assert self._detect is not None
        try:
            checked = self._detect()
        except CannotStart as error:
            logger.error("%s Hint: %s.", error, error.hint)
            return
        if checked != replace(self.install, is_recalled=False):
            logger.warning("Claude Code has changed: %s. Billing: %s",
                           checked.features.version_text, checked.billing_account)
            self._checked = checked

    def is_replaced(self) -> bool:
        """Return whether there is another program, or news of it; False while there is none."""
        if self._checked:
            return True
        current = file_fingerprint(self.install.command[-1])
        return self._detect is not None and current not in (self._fingerprint, None)

    def redetect(self) -> None:
        """Find out what the new program can do. Raises CannotStart."""
        assert self._detect is not None
        self.install, self._checked = self._checked or self._detect(), None
        self.can_rewind = self.can_pipe = None
        self._failed_preparations = 0
        self._fingerprint = file_fingerprint(self.install.command[-1])

    @property
    def may_rewind(self) -> bool:
        """Whether the CLI takes messages back without a trace, as far as is known."""
        return self.install.features.version >= REWIND_CLI and self.can_rewind is not False

    @property
    def may_pipe(self) -> bool:
        """Whether the CLI takes piped messages, as far as is known."""
        return self.may_rewind and self.can_pipe is not False

    def record_failed_preparation(self) -> None:
        """Conclude from the second one that this CLI cannot rewind; the first may have another
        reason, such as a busy machine."""
        self._failed_preparations += 1
        if self.can_rewind is None and self._failed_preparations > 1:
            self.can_rewind = False


def ask_models(install: ClaudeInstall, data_dir: Path) -> Tuple[Model, ...]:
    """Ask the CLI for its models, which needs no request to the API. -> () if it returns none."""
    folder = private_directory(data_dir / "work")
    argv = claude_argv(install.command, install.features, Tools.NONE)
    request = initialize_requests(DEFAULT_SESSION, install.features)[0]
    try:
        output = subprocess.run(
            argv, cwd=str(folder), env=install.environment,
            input=json.dumps(request).encode() + b"\n", stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, timeout=PROBE_SECONDS, **group_options()).stdout
        return next(filter(None, map(read_models, output.splitlines())), ())
    except (OSError, ValueError, LookupError, AttributeError, TypeError,
            subprocess.SubprocessError):
        return ()


class ModelCatalog:
    """The models that `claude` offers, for MODELS_SECONDS or until it is updated. Any thread.
    One caller runs the command. The others get the old list meanwhile; if there is none yet, they
    share the result of that one command."""

    def __init__(self, program: ClaudeProgram, data_dir: Path, clock: Clock) -> None:
        self._program = program
        self._data_dir = data_dir
        self._clock = clock
        self._lock = threading.Lock()
        self._models: Tuple[Model, ...] = ()
        self._install: Optional[ClaudeInstall] = None
        self._expires_at = 0.0
        self._lookup: "Optional[Future[Tuple[Model, ...]]]" = None

    def list(self) -> Tuple[Model, ...]:
        """Return aliases and full names. Raises Unavailable."""
        install = self._program.install
        with self._lock:
            is_fresh = self._clock.monotonic() < self._expires_at and self._install is install
            if self._models and (is_fresh or self._lookup):
                return self._models
            lookup = self._lookup
            if not lookup:
                self._lookup = Future()
        models: Tuple[Model, ...] = ()
        with contextlib.suppress(FutureTimeoutError):
            models = lookup.result(PROBE_SECONDS + 5) if lookup else self._refresh(install)
        if not models:
            raise Unavailable("claude returned no model list. Name a model yourself, such as"
                              " sonnet, opus or haiku.")
        return models

    def _refresh(self, install: ClaudeInstall) -> Tuple[Model, ...]:
        """Run the command, and share its result."""
        models: Tuple[Model, ...] = ()
        try:
            models = ask_models(install, self._data_dir)
        finally:
            with self._lock:
                lookup, self._lookup = self._lookup, None
                # After a failure the old list serves a little longer.
                seconds = MODELS_SECONDS if models else PROBE_SECONDS
                self._expires_at = self._clock.monotonic() + seconds
                self._install = install
                self._models = models = models or self._models
            assert lookup is not None
            lookup.set_result(models)
        return models


# --- one process ---
class ProcessExited(Exception):
    """The process exited (or closed its output) before the turn was finished."""


class ClaudeProcess:
    """One process of `claude`, its pipes and the threads that move their bytes. Used from one
    thread; the owner calls `stop`. Raises OSError."""

    def __init__(
            self, argv: Sequence[str], cwd: Path, environment: Mapping[str, str], tag: str) -> None:
        thread = threading.current_thread()
        # On Linux the process ends together with the thread that starts it.
        assert thread.name == "worker" or thread is threading.main_thread(), thread.name
        self.tag = tag
        self.session_id: Optional[str] = None
        self.session: Optional[SessionConfig] = None
        # The turns that it holds, for the one that continues them.
        self.turns: List[HeldTurn] = []
        self.spent_usd = 0.0
        # Unanswered calls of the client's tools: call id -> (request id, message id).
        self.open_calls: Dict[str, Tuple[str, Any]] = {}
        # Of the present turn, reported at calls of tools.
        self.counted_usage = Usage()
        # The CLI reports the limits of the plan only when they change.
        self.limits = RateLimitStatus()
        self.settings: Mapping[str, str] = {}
        self.shows_thinking = False
        self.terminate_at = float("inf")
        self.kill_at = float("inf")
        self._stdin_queue: "queue.SimpleQueue[Optional[bytes]]" = queue.SimpleQueue()
        self._lines: "queue.Queue[Union[bytes, Exception, None]]" = queue.Queue(2_000)
        self._stderr_tail: Deque[bytes] = deque(maxlen=8)
        # Set after the kill, so that the stdout thread can leave a full queue.
        self._is_closing = False
        self._seconds_after_exit = 0.0
        self._descendants: Optional[Dict[int, Optional[str]]] = None
        self.process = ChildProcess(
            argv, cwd=str(cwd), env={**environment, OWNER_ENV_VAR: tag},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.pid = self.process.pid
        targets = {
            "stdin": self._write_stdin, "stdout": self._read_stdout, "stderr": self._read_stderr}
        self._pumps = [threading.Thread(target=target, name="%s-%d" % (name, self.pid), daemon=True)
                       for name, target in targets.items()]
        try:
            for pump in self._pumps:
                pump.start()
        except RuntimeError as error:
            # The system has no thread left; without its owner's threads nobody would end it.
            self.stop()
            raise OSError(errno.EAGAIN, str(error)) from None

    # The threads only move bytes, so that neither side waits for the other.

    def _write_stdin(self) -> None:
        pipe = self.process.stdin
        assert pipe is not None
        with contextlib.suppress(OSError, ValueError), pipe:
            for data in iter(self._stdin_queue.get, None):
                view = memoryview(data)
                while view:
                    view = view[pipe.write(view) :]
                # Otherwise the last message, of 20 MB perhaps, would stay in memory.
                del data, view

    def _read_stdout(self) -> None:
        pipe = self.process.stdout
        assert pipe is not None
        framer = LineFramer(LINE_BYTES)
        with pipe:
            for data in iter(lambda: os.read(pipe.fileno(), 1 << 16), b""):
                try:
                    lines = framer.feed(data)
                except OverflowError:
                    text = "claude wrote a line longer than %d bytes." % LINE_BYTES
                    self._push(RunFailed("output_too_large", text))
                    break
                for line in lines:
                    self._push(line)
        self._push(None)

    def _push(self, item: Union[bytes, Exception, None]) -> None:
        while not self._is_closing:
            with contextlib.suppress(queue.Full):
                self._lines.put(item, timeout=0.2)
                return

    def _read_stderr(self) -> None:
        pipe = self.process.stderr
        assert pipe is not None
        with pipe:
            for data in iter(lambda: os.read(pipe.fileno(), STDERR_BYTES // 8), b""):
                self._stderr_tail.append(data)

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def send(self, *messages: Union[bytes, Mapping[str, Any]]) -> None:
        """Write messages, or lines that hold them, in one piece. Returns at once."""
        lines = [message if isinstance(message, bytes) else cli_line(message)
                 for message in messages]
        self._stdin_queue.put(b"".join(lines))

    def next_event(self, timeout: float) -> Optional[CliEvent]:
        """Return the next event, or None after `timeout` seconds.
        Raises ProcessExited, RunFailed."""
        try:
            item = self._lines.get(timeout=max(0.0, timeout))
        except queue.Empty:
            if not self.is_alive:
                self._seconds_after_exit += timeout
            if self._seconds_after_exit < DRAIN_AFTER_EXIT_SECONDS:
                return None
            # A process that it started holds the pipes open.
            item = None
        if item is None:
            raise ProcessExited(self._exit_message())
        if isinstance(item, Exception):
            raise item
        try:
            return parse_cli_event(item)
        except (ValueError, RecursionError, AttributeError):
            line = item[:200].decode("utf-8", "replace")
            raise RunFailed(
                "cli_error", "claude wrote a line that is not valid JSON: %s" % line) from None

    def _exit_message(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        self._pumps[2].join(1)
        text = b"".join(self._stderr_tail).decode("utf-8", "replace")
        if len(self._stderr_tail) == self._stderr_tail.maxlen:
            # The beginning is lost. The first word may be half a secret.
            text = re.sub(r"^\S*", "...", text)
        text = redact(text.strip())
        return "claude exited (exit code %s) without an answer%s" % (
            self.process.returncode, ": " + text if text else ".")

    def initialize(self, session: SessionConfig, features: Features) -> Sequence[Mapping[str, Any]]:
        """Send the configuration; the CLI accepts it once. -> what was sent."""
        if self.session:
            return ()
        self.session = session
        requests = initialize_requests(session, features)
        self.send(*requests)
        return requests

    def begin_shutdown(self, now: float, grace: float, interrupt: bool = False,
                       has_tools: bool = False) -> None:
        """Begin to shut down: interrupt; `poll_shutdown` closes stdin, `stop` kills. grace: seconds
        until the kill. has_tools: it may have started other processes."""
        self.terminate_at = now + grace * 0.6
        self.kill_at = now + grace
        if has_tools:
            pids = descendants(self.pid) if self.is_alive else ()
            self._descendants = {pid: started_at(pid) for pid in pids}
        if interrupt:
            self.send(control_request("stop", "interrupt"))

    def poll_shutdown(self, now: float) -> bool:
        """Continue the end. -> whether it is time to `stop` it. Closes stdin, on which an idle CLI
        exits within 0.1 s, only now: its last work would compete with storing the answer."""
        self._stdin_queue.put(None)
        if now >= self.terminate_at and self.is_alive:
            self.process.terminate()
        return now >= self.kill_at or not self.is_alive

    def stop(self) -> None:
        """Kill the process and everything that it started; they have exited on return."""
        self._stdin_queue.put(None)
        self.process.kill_all()
        self.process.wait()
        if self._descendants is not None:
            for pid, started in self._descendants.items():
                if is_same_process(pid, started):
                    kill_process(pid)
            for pid in processes_tagged(self.tag):
                kill_process(pid)
        self._is_closing = True
        pipes = (self.process.stdin, self.process.stdout, self.process.stderr)
        for pump, pipe in zip(self._pumps, pipes):
            if pump.ident:
                pump.join(1)
            elif pipe:
                pipe.close()

    def close_stdin_and_wait(self, seconds: float) -> None:
        """Close stdin, on which the process may exit in time."""
        self._stdin_queue.put(None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)


# --- one turn ---
class SessionLost(Exception):
    """The CLI does not know the session, or does not go back to the turn, that was to continue; or
    a process that has waited does not react."""


@dataclass(frozen=True)
class RunRequest:
    """What a run needs.
    conversation: the key of the conversation, None for a stateless request.
    session_id: the CLI's, to resume. spent_usd: its cost so far.
    history: returns the earlier turns; called only when they must be replayed.
    owner: the token; only its own processes may continue its conversations.
    is_chat: the message ends a conversation that the client keeps, and may continue.
    settings: see answer_settings. shows_thinking: the CLI is to tell what the model thinks.
    is_prefilled: the settings hold the messages, which the process does not know.
    answer_seconds: for how long the API may be silent before it begins to answer."""
    message: Content
    session: SessionConfig
    conversation: Optional[str] = None
    session_id: Optional[str] = None
    spent_usd: float = 0.0
    history: Callable[[], Sequence[HistoryTurn]] = tuple
    owner: str = ""
    is_chat: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    shows_thinking: bool = False
    is_prefilled: bool = False
    answer_seconds: float = math.inf

    @cached_property
    def earlier_turns(self) -> List[HeldTurn]:
        """What a process must hold before this turn."""
        turns: List[HeldTurn] = []
        for turn in self.history():
            turns.append(hold_turn(turns, turn))
        return turns


class RunControl(NamedTuple):
    """What ends a run, and where its reports go.
    deadline: monotonic seconds. answer_seconds: see RunRequest. stop_reason: returns a key of
    RUN_ERRORS to end the run; called ten times a second. on_rate_limits: receives what the CLI
    reports of the plan."""
    clock: Clock
    config: Config
    deadline: float
    answer_seconds: float
    stop_reason: Callable[[], Optional[str]]
    on_rate_limits: Callable[[RateLimitStatus], None]


def raise_if_stopped(reason: Optional[str]) -> None:
    """Raise RunFailed if there is a reason to end a run."""
    if reason:
        raise RunFailed(reason, RUN_ERRORS[reason].capitalize() + ".")


def check_control(response: Mapping[str, Any]) -> None:
    if response.get("subtype") == "error":
        text = "claude refused its settings: %s" % redact(str(response.get("error")))
        raise RunFailed("cli_error", text)


def check_client_tools(client_tools: Iterable[Mapping[str, Any]], tools: Any) -> None:
    """An answer without the client's tools is not what the client asked for."""
    names = [tool["name"] for tool in client_tools]
    missing = [name for name in names if TOOL_PREFIX + name not in (tools or ())]
    if missing:
        text = "claude did not accept the tools %s." % ", ".join(missing)
        raise RunFailed("cli_error", text)


def check_schema_taken(tools: Any) -> None:
    """Without the tool by which it takes a structured answer, the CLI has dropped the schema."""
    if "StructuredOutput" not in (tools or ()):
        text = "claude does not accept this JSON Schema: check its types, patterns and references."
        raise RunFailed("invalid_request", text, is_answered=True)


def check_output_size(size: int) -> None:
    if size > OUTPUT_BYTES:
        raise RunFailed("output_too_large", "The answer is larger than %d bytes." % OUTPUT_BYTES)


class ToolServer:
    """The MCP server of the client's tools, for one process. Calls of tools wait for the client."""

    def __init__(self, process: ClaudeProcess, client_tools: Sequence[Mapping[str, Any]]) -> None:
        self._process = process
        self._client_tools = client_tools
        # The answers of the client, by call id.
        self.results: Mapping[str, Dict[str, Any]] = {}

    def handle(self, event: CliEvent, call_ids: Sequence[str]) -> None:
        """Answer a request of the CLI. call_ids: of the calls in the present message."""
        request_id = str(event.body.get("request_id"))
        request = event.body.get("request") or {}
        message = request.get("message")
        is_mcp = request.get("subtype") == "mcp_message" and isinstance(message, dict)
        if not self._client_tools or not is_mcp:
            response = {
                "subtype": "error", "request_id": request_id,
                "error": "not supported by this client"}
            self._process.send({"type": "control_response", "response": response})
            return
        assert isinstance(message, dict)
        message_id = message.get("id")
        if message.get("method") == "notifications/cancelled":
            cancelled_id = (message.get("params") or {}).get("requestId")
            for call_id, (_, call_message_id) in list(self._process.open_calls.items()):
                if call_message_id == cancelled_id:
                    del self._process.open_calls[call_id]
        if message.get("method") != "tools/call":
            self.reply(request_id, message_id, mcp_result(message, self._client_tools))
            return
        meta = (message.get("params") or {}).get("_meta") or {}
        call_id = str(meta.get("claudecode/toolUseId"))
        if call_id in self.results:
            self.reply(request_id, message_id, self.results[call_id])
        elif call_id in call_ids:
            self._process.open_calls[call_id] = request_id, message_id
        else:
            # For example of a subagent: the client never sees this call.
            content = [{"type": "text", "text": "This tool cannot be called from here."}]
            self.reply(request_id, message_id, {"content": content, "isError": True})

    def reply(self, request_id: str, message_id: Any, result: Mapping[str, Any]) -> None:
        answer = {"jsonrpc": "2.0", "id": 0 if message_id is None else message_id, "result": result}
        response = {
            "subtype": "success", "request_id": request_id, "response": {"mcp_response": answer}}
        self._process.send({"type": "control_response", "response": response})


class Preparation:
    """The preparation of a process: its configuration; a message without an answer, which warms the
    CLI up; and its way back, which leaves nothing of it. On the way it finds out whether this CLI
    takes PIPED_TEXT.

    Source: 2.1.330 and 2.1.332 send the same request afterwards as without it, 2.1.197 does not.
    """

    def __init__(self, process: ClaudeProcess, session: SessionConfig, program: ClaudeProgram,
                 connect: bool = False) -> None:
        self.process = process
        self._program = program
        self._tools = ToolServer(process, session.client_tools)
        self._message_id = str(uuid.uuid4())
        # What is waited for: the id of a request, "result", or "" at the end.
        self._awaited = ""
        for request in process.initialize(session, program.install.features):
            self._awaited = request["request_id"]
        if connect:
            self._send("connect", "get_context_usage")
        elif program.may_rewind:
            self._warm_up()

    def _send(self, request_id: str, subtype: str, **fields: Any) -> None:
        self._awaited = request_id
        self.process.send(control_request(request_id, subtype, **fields))

    def _warm_up(self) -> None:
        self._awaited = "result"
        message = user_message("Hello.", wants_reply=False)
        self.process.send({**message, "uuid": self._message_id})

    def advance(self, seconds: float) -> bool:
        """Wait up to `seconds` for an event, and handle those that arrived. -> whether the process
        is ready. Raises SessionLost or ProcessExited when it is not usable, RunFailed."""
        for number in range(EVENTS_AT_ONCE):
            event = self.process.next_event(0 if number else seconds) if self._awaited else None
            if event is None:
                break
            if event.kind == "control_request":
                self._tools.handle(event, ())
            response = event.body.get("response") or {}
            if self._awaited not in ("connect", "export", "rewind"):
                check_control(response)
            if self._awaited in (event.kind, response.get("request_id")):
                self._continue(response)
        return not self._awaited

    def _continue(self, response: Mapping[str, Any]) -> None:
        """Take the next step after the one that was waited for."""
        step, self._awaited = self._awaited, ""
        details = response.get("response") or {}
        if step == "connect":
            if self._program.may_rewind:
                self._warm_up()
        elif step == "result" and self._program.can_pipe is not False:
            pair = (assistant_message("Hello."), piped_message(self._message_id))
            self.process.send(*(pair * WARM_UP_PAIRS))
            self._send("export", "export_conversation")
        elif step in ("result", "export"):
            if step == "export":
                self._program.can_pipe = self._message_id in str(details.get("text"))
            self._send("rewind", "rewind_conversation", target_message_uuid=self._message_id,
                       last_seen_user_message_uuid=self._message_id)
        elif step == "rewind":
            self._program.can_rewind = has_rewound(response, self._message_id)
            if not self._program.can_rewind:
                raise SessionLost()


class TurnMessages:
    """The messages of the API that one turn consists of: their blocks, texts and figures.
    is_complete: whether the present one is. is_cut: it ended at a limit, and the next one goes on
    with its text. earlier_text: of the messages that the present one goes on with. reason: why the
    present one ended. thinking: what the model thought."""

    def __init__(self) -> None:
        self.blocks: List[Block] = []
        self.thinking: List[Block] = []
        self.reason = ""
        self.is_complete = False
        self.is_cut = False
        self.earlier_text = ""
        self._id = ""
        self._counts: Dict[str, Dict[str, int]] = {}

    @property
    def count(self) -> int:
        return len(self._counts)

    @property
    def text(self) -> str:
        return self.earlier_text + self._own_text()

    @property
    def usage(self) -> Usage:
        """What all messages used; the cost arrives with the result."""
        counts = self._counts.values()
        return Usage(*(sum(count.get(name, 0) for count in counts) for name in USAGE_NAMES))

    def _own_text(self) -> str:
        return "".join(block["text"] for block in self.blocks if block.get("type") == "text")

    def begin(self, message: Mapping[str, Any]) -> None:
        if self.is_cut or not self.is_complete:
            # Cut by a limit, or by a lost connection after a whole block; 2.1.332 goes on with it.
            self.earlier_text += self._own_text()
        else:
            self.earlier_text = ""
            self.thinking = []
        self._id = str(message.get("id"))
        self.blocks = []
        self.is_complete = self.is_cut = False
        self._counts[self._id] = token_counts(message.get("usage"))

    def end(self, event: Mapping[str, Any]) -> None:
        """Read a `message_delta`."""
        self._counts.setdefault(self._id, {}).update(token_counts(event.get("usage")))
        reason = (event.get("delta") or {}).get("stop_reason")
        self.is_complete = bool(reason)
        self.reason = str(reason)
        has_call = any(block.get("type") == "tool_use" for block in self.blocks)
        self.is_cut = reason in CUT_REASONS and not has_call

    def add_blocks(self, body: Mapping[str, Any]) -> None:
        """Add a part of a message. Each part of a message that is not streamed carries the reason
        of its end and its usage."""
        message = body.get("message") or {}
        if body.get("parent_tool_use_id") or not isinstance(message.get("content"), list):
            return
        if str(message.get("id")) != self._id:
            self.begin(message)
        self.blocks += message["content"]
        self.thinking += [block for block in message["content"] if block.get("type") in THOUGHTS]
        if message.get("stop_reason"):
            self.is_complete = True
            self._counts[self._id] = token_counts(message.get("usage"))


def guard_billing(process: ClaudeProcess, config: Config, source: Any) -> None:
    """Stop a run that an API key would pay. source: of the key. Raises RunFailed."""
    if source and source != "none" and not config.allow_api_key:
        process.stop()
        raise RunFailed(
            "billing_guard",
            "claude would have billed this run to an API key (%s), so it was stopped. Sign claude"
            " in to the subscription, or allow it with --allow-api-key." % redact(str(source)))


class TurnActivity:
    """What the CLI does in a turn. running_tools: a command may be silent for long. is_asking: it
    waits for the API to begin a message, or, for `retry_seconds`, to ask again."""

    def __init__(self) -> None:
        self.running_tools: Set[str] = set()
        self.is_asking = False
        self.retry_seconds = 0.0

    def note(self, event: CliEvent) -> None:
        self.retry_seconds = (number_or_none(event.body.get("retry_delay_ms")) or 0.0) / 1000
        if event.kind in ("init", "tool_result", "retry"):
            self.is_asking = True
        elif event.kind == "message_start":
            self.is_asking = False
            self.running_tools.clear()
        if event.kind == "assistant":
            self.running_tools.update(event.tool_ids)
        elif event.kind == "tool_result":
            self.running_tools.difference_update(event.tool_ids)

    def longest_silence(self, control: RunControl) -> float:
        """Return after how many seconds a silence is too long, if no tool runs."""
        if self.is_asking:
            return control.answer_seconds + self.retry_seconds
        return control.config.silence_seconds


class Turn:
    """One turn with one process: its deadlines, and what is read until the result."""

    def __init__(self, process: ClaudeProcess, session: SessionConfig, control: RunControl,
                 has_waited: bool = False) -> None:
        self.process = process
        # From then on a process that has waited, and reports nothing, is replaced.
        self._lost_at = control.clock.monotonic() + PREPARE_SECONDS if has_waited else float("inf")
        self.session = session
        self.control = control
        self._tools = ToolServer(process, session.client_tools)
        self._check_stopped_at = float("-inf")
        self._frozen_seconds = 0.0
        self._activity = TurnActivity()
        # From then on the loss of the process is a failed run.
        self.prompt_accepted = False
        # The result arrived: the process is idle.
        self.finished = False
        # While the CLI itself waits and retries: what the API suffers from, as a key of RUN_ERRORS.
        self._retry_code: Optional[str] = None
        # Of the line with the prompt.
        self.message_id: Optional[str] = None
        self.messages = TurnMessages()
        self._error_word = ""

    def next_event(self) -> CliEvent:
        """Return the next event. Raises RunFailed at a deadline or when the job is cancelled;
        ProcessExited."""
        clock, config = self.control.clock, self.control.config
        longest = self._activity.longest_silence(self.control)
        silent_at = clock.monotonic() + longest
        while True:
            now = clock.monotonic()
            if now >= self._check_stopped_at:
                # Not for every delta of a fast answer: it queries the database.
                self._check_stopped_at = now + CANCEL_POLL_SECONDS
                raise_if_stopped(self.control.stop_reason())
            deadline = self.control.deadline + self._frozen_seconds
            if now >= deadline:
                self._fail_late("The run took longer than %g seconds" % config.run_seconds)
            if now >= self._lost_at:
                raise SessionLost()
            if now >= silent_at and not self._activity.running_tools:
                who = "The API" if self.prompt_accepted else "claude"
                self._fail_late(
                    "%s sent nothing for %.3g seconds" % (who, longest), self.prompt_accepted)
            asked_at = Clock.monotonic()
            event = self.process.next_event(min(CANCEL_POLL_SECONDS, deadline - now))
            seconds = Clock.monotonic() - asked_at
            if seconds >= FROZEN_SECONDS:
                # The machine slept, or was stopped, and claude with it.
                self._frozen_seconds += seconds
                silent_at = clock.monotonic() + longest
                self._lost_at += seconds
            if event is not None:
                self._lost_at = float("inf")
                self._activity.note(event)
                if event.kind == "control_request":
                    ids = [str(block.get("id")) for block in self.messages.blocks]
                    self._tools.handle(event, ids)
                return event

    def _fail_late(self, text: str, is_outage: bool = False) -> NoReturn:
        """Fail at a deadline. is_outage: the connection is lost, as far as is known: it may break
        without a word, such as during a sleep of the machine."""
        if self._retry_code:
            text += ", in which claude tried to reach the API"
        code = self._retry_code or ("network" if is_outage else "timeout")
        raise RunFailed(code, text + ".", is_of_model=code == "overloaded",
                        is_answered=is_outage, is_cut=self.messages.count > 0)

    def await_control_response(self, request_id: str) -> Mapping[str, Any]:
        """Wait, because a prompt that follows too closely may run without the setting."""
        while True:
            event = self.next_event()
            if event.kind == "result":
                # It exits, because it cannot resume the session.
                raise SessionLost()
            response: Mapping[str, Any] = event.body.get("response") or {}
            if response.get("request_id") == request_id:
                return response
            check_control(response)

    def send_prompt(self, message: Content) -> None:
        self.message_id = str(uuid.uuid4())
        self.process.send({**user_message(message), "uuid": self.message_id})

    def send_tool_results(self, results: Mapping[str, Dict[str, Any]], live: LiveText,
                          model: Optional[str]) -> None:
        """Continue a turn that waits for these results. The CLI requests some of them later when it
        calls one tool after the other."""
        self._tools.results = results
        self._activity.is_asking = True
        live.begin(model)
        for call_id in list(self.process.open_calls):
            self._tools.reply(*self.process.open_calls.pop(call_id), results[call_id])

    def read_answer(self, live: LiveText) -> Answer:
        """Read to the end of the turn, to a stop sequence, to a limit or to a call of the client's
        tools. A structured answer is not streamed. Raises RunFailed, SessionLost, ProcessExited."""
        while True:
            event = self.next_event()
            if event.kind == "result":
                return self._finish(event.body, live)
            if event.kind == "delta":
                if not self.session.json_schema:
                    live.add(event.text)
                    check_output_size(live.size)
                if live.stopped_by:
                    return self._stop_early(live, live.read())
            else:
                self._handle_event(event, live)
            if self.messages.reason == "max_tokens" and {OUTPUT_LIMIT, EXTRA_BODY} & set(
                    self.process.settings):
                # At once: the CLI would ask the model to go on.
                self.process.stop()
                return self._stop_early(live, self.messages.text)
            if self.process.open_calls and self.messages.is_complete:
                return self._return_calls(live.model)

    def _handle_event(self, event: CliEvent, live: LiveText) -> None:
        body = event.body
        if event.kind == "init":
            self.prompt_accepted = True
            guard_billing(self.process, self.control.config, body.get("apiKeySource"))
            check_client_tools(self.session.client_tools, body.get("tools"))
            if self.session.json_schema:
                check_schema_taken(body.get("tools"))
            live.begin(body.get("model"))
        elif event.kind == "message_start":
            self.prompt_accepted = True
            if self.messages.is_complete and EXTRA_BODY in self.process.settings:
                # It would be sent again and again.
                raise RunFailed("invalid_request", "The model did not end the answer that it was"
                                " to continue. End with a message of the user", is_answered=True)
            is_continuation = self.messages.is_cut
            self.messages.begin(body["event"].get("message") or {})
            if not is_continuation:
                live.restart()
                if self.messages.earlier_text:
                    live.add(self.messages.earlier_text)
            live.current_pause = None
            live.is_answering, live.usage = True, self.messages.usage
            self._retry_code = None
        elif event.kind == "message_delta":
            self.messages.end(body["event"])
        elif event.kind == "block":
            live.follow_block(body["event"])
            check_output_size(live.size)
        elif event.kind == "assistant":
            self._error_word = str(body.get("error") or self._error_word)
            self.messages.add_blocks(body)
        elif event.kind == "retry":
            self._retry_code = retry_code(body.get("error_status"))
            live.current_pause = None
            if self._retry_code:
                delay = number_or_none(body.get("retry_delay_ms")) or 0
                until = self.control.clock.now() + delay / 1000
                live.current_pause = Pause(HOLD_REASONS[self._retry_code], until)
        elif event.kind == "rate_limits":
            self.process.limits = parse_rate_limits(body, self.control.clock.now())
            self.control.on_rate_limits(self.process.limits)
        elif event.kind == "control_response":
            check_control(body.get("response") or {})

    def _stop_early(self, live: LiveText, text: str) -> Answer:
        """End the answer at a stop sequence, with an estimate of the output tokens, or its limit.
        """
        usage = self.messages.usage
        usage = usage._replace(output_tokens=max(usage.output_tokens, len(text) // 4))
        reason = "stop_sequence" if live.stopped_by else "max_tokens"
        stop_info = StopInfo(reason, live.stopped_by, tuple(self._complete_calls()))
        return Answer(text, usage=usage, model=live.model, stop_info=stop_info)

    def _complete_calls(self) -> Iterator[ToolCall]:
        """Yield the calls of the client's tools in the present message."""
        for block in self.messages.blocks:
            name, arguments = str(block.get("name")), block.get("input") or {}
            is_own = block.get("type") == "tool_use" and name.startswith(TOOL_PREFIX)
            if is_own and block.get("id") in self._activity.running_tools and (
                    CUT_INPUT not in arguments):
                yield ToolCall(block["id"], name[len(TOOL_PREFIX) :], arguments)

    def _return_calls(self, model: Optional[str]) -> Answer:
        """Return the calls of the client's tools; the process waits for their results."""
        usage = self.messages.usage
        self.process.counted_usage = self.process.counted_usage.plus(usage)
        stop_info = StopInfo("tool_use", None, tuple(self._complete_calls()))
        return Answer(self.messages.text, usage=usage, model=model, stop_info=stop_info)

    def _finish(self, body: Mapping[str, Any], live: LiveText) -> Answer:
        """Return the answer of a `result` line. Raises RunFailed, SessionLost."""
        self.finished = True
        # The CLI continues a cut answer three times, then gives up.
        is_cut = self._error_word == "max_output_tokens" and not self.session.json_schema
        if not is_cut and (body.get("is_error") or body.get("subtype") != "success"):
            failure = classify_failure(body, self._error_word, self.process.limits)
            if not self.prompt_accepted and "No conversation found" in str(failure):
                raise SessionLost()
            failure.is_cut = self.messages.count > 0
            if failure.code == "refused":
                raise Refused(str(failure), Answer(
                    live.read(), usage=self.messages.usage, model=live.model,
                    stop_info=StopInfo("refusal")))
            raise failure
        is_lost = self.messages.count and not self.messages.is_complete
        if is_lost and not self.session.json_schema and body.get("stop_reason", "") is None:
            # 2.1.197 takes what it has for the answer.
            raise RunFailed("network", "The connection was lost in the middle of the answer.",
                            is_answered=True, is_cut=True)
        text = "" if is_cut else str(body.get("result") or "")
        structured = None
        if not self.session.json_schema:
            # It holds the last block of text only.
            is_part = text and self.messages.text.endswith(text)
            text = self.messages.text if is_part else self.messages.earlier_text + text
        else:
            if "structured_output" not in body:
                raise RunFailed(
                    "cli_error", "The model did not return an answer that satisfies jsonSchema.")
            structured = as_json(body["structured_output"])
        check_output_size(len(text.encode("utf-8", "replace")))
        spent_usd = self.process.spent_usd
        usage, self.process.spent_usd = turn_usage(body, spent_usd, self.process.counted_usage)
        self.process.counted_usage = Usage()
        text, stop_sequence = cut_at_stop(text, live.stop_sequences)
        reason = "stop_sequence" if stop_sequence else str(body.get("stop_reason") or "end_turn")
        if reason == "tool_use":
            # Of the tool by which the CLI takes a structured answer.
            reason = "end_turn"
        elif is_cut and not stop_sequence:
            reason = "max_tokens"
        return Answer(text, structured, usage, live.model, spent_usd=self.process.spent_usd,
                      stop_info=StopInfo(reason, stop_sequence))


class TurnStart:
    """Brings a process to where a turn begins: its configuration and history, or the way back.
    Raises SessionLost, ProcessExited, RunFailed."""

    def __init__(self, turn: Turn, program: ClaudeProgram) -> None:
        self._turn = turn
        self._process = turn.process
        self._program = program

    def start(self, candidate: "Candidate", earlier_turns: Iterable[HeldTurn]) -> None:
        """Configure a process and put the history into it."""
        history = candidate.history
        model = self._program.full_models.get(self._turn.session.model, "")
        can_pipe = len(history) > 1 and not candidate.transcript and self._can_pipe()
        requests = self._process.initialize(self._turn.session, self._program.install.features)
        if len(requests) > 1 or candidate.transcript:
            check_control(self._turn.await_control_response(requests[-1]["request_id"]))
        if candidate.transcript:
            # It was read before the CLI answered.
            remove_transcript(candidate.transcript)
            # The CLI would merge it with an answer of the transcript that has the same id.
            self._process.send(assistant_message(history[-1].response, "msg_told_last", model))
        else:
            ids = self._replay(history, can_pipe, model)
            earlier_turns = [turn._replace(message_id=message_id)
                             for turn, message_id in zip(earlier_turns, ids)]
        self._process.turns = list(earlier_turns)

    def configure(self, request: RunRequest) -> None:
        """Set what this turn has of its own."""
        process, requests = self._process, []
        if request.settings != process.settings:
            names = {**dict.fromkeys(process.settings, ""), **request.settings}
            process.settings = request.settings
            requests.append(control_request("turn", "apply_flag_settings", settings={"env": names}))
        if request.shows_thinking and not process.shows_thinking:
            process.shows_thinking = True
            requests.append(control_request(
                "show", "set_max_thinking_tokens", thinking_display="summarized"))
        if requests:
            process.send(*requests)
            if self._program.install.features.version < EFFORT_CLI:
                check_control(self._turn.await_control_response(requests[-1]["request_id"]))

    def _replay(self, history: Sequence[HistoryTurn], can_pipe: bool,
                model: str) -> List[Optional[str]]:
        """Send the history turn by turn. -> the ids of the messages.
        The CLI must acknowledge an earlier message before its answer is sent, otherwise it puts all
        messages after all answers. A piped message needs no acknowledgement. The first one is not
        piped: a part of the CLI's version in each request depends on it."""
        lines: List[bytes] = []
        ids: List[Optional[str]] = []
        is_acknowledged = True

        def send_lines() -> None:
            # Not before they are complete: meanwhile the CLI works on the message before them.
            while not is_acknowledged and self._turn.next_event().kind != "result":
                pass
            self._process.send(*lines)
            lines.clear()

        for number, turn in enumerate(history):
            message_id = None
            if can_pipe and is_pipeable(number, turn):
                lines.append(cli_line(piped_message(single_text(turn.message) or "")))
            else:
                message_id = str(uuid.uuid4())
                message = user_message(turn.message, wants_reply=False)
                lines.append(cli_line({**message, "uuid": message_id}))
                send_lines()
                is_acknowledged = False
            lines.append(cli_line(assistant_message(turn.response, "msg_told_%d" % number, model)))
            ids.append(message_id)
        send_lines()
        return ids

    def _can_pipe(self) -> bool:
        """Return whether this CLI takes piped messages; if that is not known, try it."""
        if self._program.install.features.version < REWIND_CLI:
            return False
        is_unknown = self._program.can_pipe is None and self._program.can_rewind is None
        if is_unknown and not self._process.session:
            preparation = Preparation(self._process, self._turn.session, self._program)
            control = self._turn.control
            give_up_at = min(control.deadline, control.clock.monotonic() + PREPARE_SECONDS)
            while not preparation.advance(CANCEL_POLL_SECONDS):
                raise_if_stopped(control.stop_reason())
                if control.clock.monotonic() >= give_up_at:
                    self._program.record_failed_preparation()
                    raise SessionLost()
        return bool(self._program.can_pipe)

    def rewind(self, index: int) -> None:
        """Take back the turns from `index` on. Raises SessionLost if the process does not."""
        # The results of tools were sent without a line of their own.
        ids = [turn.message_id for turn in self._process.turns[index:] if turn.message_id]
        is_old = self._program.install.features.version < REWIND_CLI
        for message_id in reversed(ids) if is_old else ids[:1]:
            last_id = message_id if is_old else ids[-1]
            self._process.send(control_request(
                "rewind", "rewind_conversation", target_message_uuid=message_id,
                last_seen_user_message_uuid=last_id))
            if not has_rewound(self._turn.await_control_response("rewind"), message_id):
                raise SessionLost()
        del self._process.turns[index:]


# --- the pool ---
def resume_argv(path: Path) -> List[str]:
    """Return the flags that continue the history in a file, and write nothing."""
    return ["--resume=" + str(path), "--no-session-persistence"]


def remove_transcript(path: Path) -> None:
    """Remove a transcript and what was to become it, if they exist."""
    for file in (path, path.with_suffix(".part")):
        with contextlib.suppress(OSError):
            file.unlink()


class Candidate(NamedTuple):
    """A process that could take the turn.
    is_configured: it knows its configuration and history. history: to replay first.
    transcript: the file with the history from which the process was started.
    rewind_to: the number of turns that it must hold, when it holds more.
    is_fresh: it was started for this turn.
    tool_results: with which a pending turn continues, and model: the one that answers there."""
    process: ClaudeProcess
    is_configured: bool = False
    history: Sequence[HistoryTurn] = ()
    transcript: Optional[Path] = None
    rewind_to: Optional[int] = None
    is_fresh: bool = False
    tool_results: Mapping[str, Dict[str, Any]] = {}
    model: Optional[str] = None


class WaitingProcess(NamedTuple):
    """A process that waits for the next turn of its conversation.
    conversation: of a stateful token; None: the request's messages tell whether it continues.
    calls: of the client's tools, for whose results it waits in the middle of a turn."""
    process: ClaudeProcess
    owner: str
    session: SessionConfig
    conversation: Optional[str]
    calls: Sequence[ToolCall]
    model: Optional[str]
    expires_at: float

    def candidate(self, request: RunRequest) -> Optional[Candidate]:
        """Return how this process takes the turn; None if it cannot. It must have the same owner,
        configuration and conversation."""
        is_same = (self.owner, self.session, self.conversation) == (
            request.owner, request.session, request.conversation)
        may_continue = request.is_chat or request.conversation
        if not is_same or not may_continue or not self.process.is_alive:
            return None
        if self.conversation:
            return Candidate(self.process, is_configured=True)
        turns = self.process.turns
        earlier = request.earlier_turns
        number = len(earlier)
        if number > len(turns) or (number and turns[number - 1].digest != earlier[-1].digest):
            return None
        results = mcp_results(request.message)
        if self.calls:
            if number < len(turns) or not results or set(results) != {c.id for c in self.calls}:
                return None
            if self.process.settings.get(OUTPUT_LIMIT) != request.settings.get(OUTPUT_LIMIT):
                # 2.1.332 reads it at the beginning of a turn.
                return None
            return Candidate(
                self.process, is_configured=True, tool_results=results, model=self.model)
        if number == len(turns):
            return Candidate(self.process, is_configured=True)
        is_retry = turns[number].prompt == content_digest(request.message)
        if not turns[number].message_id or not (number or is_retry):
            return None
        return Candidate(self.process, is_configured=True, rewind_to=number)


class ProcessKind(NamedTuple):
    """What a process is started with. has_session: the CLI keeps its conversation for --resume.
    needs_history: it is given one as a file."""
    tools: Union[str, Tuple[str, ...]] = Tools.NONE
    workspace: Optional[str] = None
    has_session: bool = False
    needs_history: bool = False


def environment_snapshot(folder: str, environ: Mapping[str, str]) -> Dict[str, Any]:
    """Return how the CLI describes the place where it runs; empty on Windows.
    Source: the transcripts of 2.1.330 and 2.1.332 on Linux."""
    if os.name == "nt":
        return {}
    shell = "zsh" if environ.get("SHELL", "").endswith("zsh") else "bash"
    return {
        "workingDirectory": folder, "isWorktree": False, "isGitRepo": False,
        "additionalWorkingDirectories": [], "platform": sys.platform, "shell": shell,
        "osVersion": "%s %s" % (platform.system(), platform.release())}


class ClaudeLauncher:
    """Starts the processes of `claude` and ends them; nothing else does.
    processes: records them for the next start of the bridge; None to record nothing."""

    def __init__(self, program: ClaudeProgram, config: Config, clock: Clock, tag: str,
                 processes: Optional[Database], metrics: Metrics) -> None:
        self.program = program
        self.config = config
        self.clock = clock
        self.metrics = metrics
        self._tag = tag
        self._processes = processes
        self._terminating: List[ClaudeProcess] = []
        self._start_count = 0
        # Left by a bridge that was killed.
        for pattern in ("*.jsonl", "*.part"):
            for path in (config.data_dir / TRANSCRIPTS).glob(pattern):
                remove_transcript(path)

    @property
    def has_terminating(self) -> bool:
        return bool(self._terminating)

    def spawn(self, kind: ProcessKind, arguments: Sequence[str] = ()) -> ClaudeProcess:
        """Start a process. Raises RunFailed."""
        install = self.program.install
        session_id = str(uuid.uuid4()) if kind.has_session else None
        if session_id:
            arguments = ["--session-id=" + session_id, *arguments]
        elif not any(argument.startswith("--resume=") for argument in arguments):
            # Beside another flag, claude_argv would leave it out.
            date_argv = self._date_argv(kind.tools)
            arguments = [*(date_argv or ["--no-session-persistence"]), *arguments]
        check_rules_for_cmd(install.command[0], kind.tools)
        argv = claude_argv(install.command, install.features, kind.tools, arguments)
        self._start_count += 1
        tag = "%s.%d." % (self._tag, self._start_count)
        try:
            if kind.workspace:
                folder = Path(kind.workspace)
                if folder.parent == self.config.data_dir / "workspaces":
                    # Somebody may have deleted it.
                    private_directory(folder)
            else:
                folder = private_directory(self.config.data_dir / "work")
            process = ClaudeProcess(argv, folder, install.environment, tag)
        except (OSError, CannotStart) as error:
            scarce = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)
            code = "overloaded" if getattr(error, "errno", None) in scarce else "cli_error"
            raise RunFailed(code, "claude could not be started: %s" % error) from None
        process.session_id = session_id
        self.metrics.inc("cab_cli_starts_total")
        if self._processes:
            self._processes.record_process(process.pid, started_at(process.pid), None)
        return process

    def snapshot(self, tools: Union[str, Tuple[str, ...]]) -> Dict[str, Any]:
        """Return what the CLI need not tell the model; with tools the model must know its folder.
        """
        if tools != Tools.NONE or self.program.install.features.version < REWIND_CLI:
            return {}
        folder = os.path.realpath(self.config.data_dir / "work")
        return environment_snapshot(folder, self.program.install.environment)

    def _date_argv(self, tools: Union[str, Tuple[str, ...]]) -> List[str]:
        """Return the flags of a process without a history that know the date, see `transcript`; and
        write the file that they name."""
        features = self.program.install.features
        date = local_day_of(self.clock.now())
        if features.version < REWIND_CLI or "--fork-session" not in features.flags:
            return []
        try:
            snapshot = self.snapshot(tools)
            name = date + ("" if snapshot else "-tools") + ".jsonl"
            path = private_directory(self.config.data_dir / TRANSCRIPTS) / name
            if not path.exists():
                write_file_atomically(
                    path, transcript((), str(uuid.uuid4()), self.clock.now(), date, snapshot))
        except (OSError, CannotStart):
            return []
        return ["--fork-session", *resume_argv(path)]

    def effort_argv(self, session: SessionConfig) -> List[str]:
        """Return the flag by which an old CLI takes the effort, which is never text of a client."""
        features = self.program.install.features
        is_old = features.version < EFFORT_CLI and "--effort" in features.flags
        return ["--effort", session.effort] if session.effort and is_old else []

    def resume(self, request: RunRequest, session_id: str) -> ClaudeProcess:
        """Start a process that knows the session.
        The last process of that session exits first: two must not write one session. --model
        default: otherwise a turn without a model would keep the one of the last turn."""
        for process in [p for p in self._terminating if p.session_id == session_id]:
            process.close_stdin_and_wait(SHUTDOWN_GRACE_SECONDS)
            self.reap(process)
        session = request.session
        arguments = ["--resume=" + session_id, *self.effort_argv(session)]
        if not session.model:
            arguments += ["--model", "default"]
        process = self.spawn(ProcessKind(session.tools, session.workspace), arguments)
        process.session_id = session_id
        process.spent_usd = request.spent_usd
        return process

    def transcript_path(self) -> Path:
        """Return the name of a new file for a history. Raises CannotStart."""
        folder = private_directory(self.config.data_dir / TRANSCRIPTS)
        return folder / (str(uuid.uuid4()) + ".jsonl")

    def terminate(
            self, process: ClaudeProcess, session: SessionConfig, is_idle: bool = True) -> None:
        """Begin to shut a process down; nobody waits for it."""
        has_tools = session.tools != Tools.NONE
        # A client that asks and cancels in turn must not pile them up.
        while len(self._terminating) >= MAX_KEPT_PROCESSES:
            self.reap(self._terminating[0])
        grace = SHUTDOWN_GRACE_SECONDS
        if is_idle and not has_tools:
            grace = IDLE_SHUTDOWN_GRACE_SECONDS
        now = self.clock.monotonic()
        process.begin_shutdown(now, grace, interrupt=not is_idle, has_tools=has_tools)
        self._terminating.append(process)

    def reap_terminating(self) -> None:
        """Continue the end of the terminating processes; kill late ones."""
        now = self.clock.monotonic()
        for process in [p for p in self._terminating if p.poll_shutdown(now)]:
            self.reap(process)

    def reap(self, process: ClaudeProcess) -> None:
        """Kill a process, if it is still alive."""
        process.stop()
        self._terminating = [p for p in self._terminating if p is not process]
        if self._processes:
            self._processes.forget_process(process.pid)

    def close(self) -> None:
        """End the terminating processes within SHUTDOWN_GRACE_SECONDS, and all that they left."""
        deadline = self.clock.monotonic() + SHUTDOWN_GRACE_SECONDS
        for process in list(self._terminating):
            process.close_stdin_and_wait(max(0.0, deadline - self.clock.monotonic()))
            self.reap(process)
        for pid in processes_tagged(self._tag + "."):
            kill_process(pid)


@dataclass
class IdleProcess:
    """A process that has no configuration yet, or was prepared for one.
    kind, date: what it was started with. transcript: the named pipe at which it waits for its
    history. prepared_for: the configuration; preparation: until it is ready, at the latest at
    ready_by."""
    process: ClaudeProcess
    kind: ProcessKind
    date: str
    transcript: Optional[Path] = None
    prepared_for: Optional[SessionConfig] = None
    preparation: Optional[Preparation] = None
    ready_by: float = float("inf")


class IdlePool:
    """The processes that were started ahead.
    `spare` general ones, one of them prepared for the usual configuration; or, on a CLI that takes
    no piped messages, waiting for a history; and one of the kind of the last token with tools."""

    def __init__(self, launcher: ClaudeLauncher) -> None:
        self._launcher = launcher
        self._program = launcher.program
        self._config = launcher.config
        self._clock = launcher.clock
        # The oldest first.
        self._idle: List[IdleProcess] = []
        # The last configuration of each kind, and that of two requests in a row, to prepare for.
        self._last_sessions = {ProcessKind(): DEFAULT_SESSION}
        self._usual_sessions = {ProcessKind(): DEFAULT_SESSION}
        # The last kind with tools: its owner, and how long a process of it stays ready.
        self._tools_kind: Optional[Tuple[ProcessKind, str, float]] = None
        self._next_start_at = 0.0
        self.last_request_at = float("-inf")
        # Whether a process that waits for a history has exited instead.
        self._has_refused_history = False
        # A start waits for QUIET_SECONDS.
        self._is_deferred = False

    def __len__(self) -> int:
        return len(self._idle)

    @property
    def is_busy(self) -> bool:
        return self._is_deferred or any(idle.preparation for idle in self._idle)

    @property
    def _is_quiet(self) -> bool:
        return self._clock.monotonic() >= self.last_request_at + QUIET_SECONDS

    def take(self, request: RunRequest, kind: ProcessKind) -> Optional[ClaudeProcess]:
        """Return a process for the request, rather one that was prepared for its configuration."""
        session = request.session
        if not self._config.spare:
            return None
        if kind.tools != Tools.NONE:
            self._expect_tools(kind, request)
        if session == self._last_sessions.get(kind):
            self._usual_sessions[kind] = session
        self._last_sessions[kind] = session
        usable = [idle for idle in self._idle
                  if idle.kind == kind and idle.prepared_for in (None, session)]
        process = None
        if not self._launcher.effort_argv(session):
            # A prepared one, then one without a configuration, then one that is not ready yet.
            for idle in sorted(usable, key=lambda idle: (
                    idle.preparation is not None, idle.prepared_for is None)):
                self._idle.remove(idle)
                if self._is_ready(idle, PREPARE_SECONDS):
                    process = idle.process
                    break
        self._launcher.metrics.inc("cab_spare_total", result="hit" if process else "miss")
        return process

    def _expect_tools(self, kind: ProcessKind, request: RunRequest) -> None:
        """Have a process ready for the next request of this token."""
        ends_at = self._clock.monotonic() + TOOL_SPARE_SECONDS
        self._tools_kind = kind, request.owner, ends_at
        general = ProcessKind()
        for sessions in (self._last_sessions, self._usual_sessions):
            for other in set(sessions) - {general, kind}:
                del sessions[other]
        if self._usual_sessions.get(kind) != request.session:
            # There is only this process, so that it must not be lost to another configuration.
            self._usual_sessions.pop(kind, None)

    def take_for_history(self, kind: ProcessKind) -> Optional[IdleProcess]:
        """Return a process that waits for a history."""
        for idle in self._idle:
            if idle.kind == kind._replace(needs_history=True) and idle.process.is_alive:
                self._idle.remove(idle)
                return idle
        return None

    def has_for_history(self, kind: ProcessKind) -> bool:
        return any(idle.kind == kind._replace(needs_history=True) for idle in self._idle)

    def _is_ready(self, idle: IdleProcess, seconds: float) -> bool:
        """Continue a preparation for so many seconds; 0 for what has arrived. -> whether it is
        finished. A process that fails, or takes longer than that, is terminated."""
        end = self._clock.monotonic() + seconds if seconds else idle.ready_by
        try:
            while idle.preparation and not idle.preparation.advance(min(seconds, 0.05)):
                if self._clock.monotonic() >= end:
                    raise SessionLost()
                if not seconds:
                    return False
            idle.preparation = None
            return True
        except RunFailed:
            # The CLI refuses these settings.
            self._usual_sessions.pop(idle.kind, None)
        except ProcessExited:
            self._next_start_at = self._clock.monotonic() + SPARE_RETRY_SECONDS
            self._program.record_failed_preparation()
        except SessionLost:
            self._program.record_failed_preparation()
        self.terminate([idle])
        return False

    def advance(self) -> None:
        """Continue the preparations, and starts that were deferred."""
        for idle in list(self._idle):
            self._is_ready(idle, 0)
        if self._is_deferred and self._is_quiet:
            self.maintain()

    def maintain(self) -> None:
        """Remove exited processes, start what is missing, prepare one."""
        now = self._clock.monotonic()
        for idle in [idle for idle in self._idle if not idle.process.is_alive]:
            self.terminate([idle])
            # A process that exits by itself would do it again.
            if idle.kind.needs_history:
                self._has_refused_history = True
            else:
                self._next_start_at = now + SPARE_RETRY_SECONDS
        self._is_deferred = False
        for kind in self._missing_kinds(now) if now >= self._next_start_at else ():
            has_same = any(idle.kind == kind for idle in self._idle)
            if has_same and not self._is_quiet:
                self._is_deferred = True
            else:
                self._start(kind, now)
        for kind, session in self._usual_sessions.items():
            same = [idle for idle in self._idle if idle.kind == kind]
            # It accepts one configuration, so that another process must be left for any other.
            needed = 2 if kind == ProcessKind() else 1
            is_prepared = any(idle.prepared_for for idle in same)
            # The CLI would write what warms it up to the file of the session.
            if len(same) < needed or is_prepared or kind.has_session:
                continue
            if not self._is_quiet:
                self._is_deferred = True
            else:
                same[0].prepared_for = session
                # A process that was just started needs time for that.
                same[0].ready_by = now + 4 * PREPARE_SECONDS
                same[0].preparation = Preparation(
                    same[0].process, session, self._program, self._config.preconnect)

    def _missing_kinds(self, now: float) -> List[ProcessKind]:
        """Return which kinds to start; terminate the processes that are not needed any more."""
        kinds = [ProcessKind()] * self._config.spare
        can_wait = hasattr(os, "mkfifo") and not self._has_refused_history
        if len(kinds) > 1 + self._program.may_pipe and can_wait:
            kinds[-1] = ProcessKind(needs_history=True)
        if self._tools_kind and now < self._tools_kind[2]:
            kinds.append(self._tools_kind[0])
        today = local_day_of(self._clock.now())
        for idle in list(self._idle):
            is_usual = idle.prepared_for in (None, self._usual_sessions.get(idle.kind))
            if idle.kind in kinds and is_usual and idle.date == today:
                kinds.remove(idle.kind)
            else:
                self.terminate([idle])
        return kinds

    def _start(self, kind: ProcessKind, now: float) -> None:
        try:
            path = self._launcher.transcript_path() if kind.needs_history else None
            if path:
                os.mkfifo(str(path), 0o600)
            process = self._launcher.spawn(kind, resume_argv(path) if path else ())
            today = local_day_of(self._clock.now())
            self._idle.append(IdleProcess(process, kind, today, path))
        except (RunFailed, OSError, CannotStart):
            if kind.tools != Tools.NONE:
                # Perhaps its workspace is gone.
                self._tools_kind = None
            else:
                self._next_start_at = now + SPARE_RETRY_SECONDS

    def restart(self) -> None:
        """Replace all processes, by those of another program."""
        self.terminate(self._idle)
        self._next_start_at = 0.0
        self._has_refused_history = False

    def forget_owner(self, token_exists: Callable[[str], bool]) -> None:
        """Start no more processes for a token that was deleted."""
        if self._tools_kind and not token_exists(self._tools_kind[1]):
            self._tools_kind = None

    def terminate(self, processes: Sequence[IdleProcess]) -> None:
        for idle in list(processes):
            if idle in self._idle:
                self._idle.remove(idle)
            if idle.transcript:
                remove_transcript(idle.transcript)
            self._launcher.terminate(idle.process, DEFAULT_SESSION)

    def processes(self) -> List[ClaudeProcess]:
        return [idle.process for idle in self._idle]

    def close(self) -> None:
        self.terminate(self._idle)


class ClaudePool:
    """All processes of `claude`.
    They are idle, wait for the next turn of a conversation, or terminate. The owner calls
    `maintain` often and `close` at the end. processes: see ClaudeLauncher."""

    def __init__(self, program: ClaudeProgram, config: Config, clock: Clock, tag: str,
                 processes: Optional[Database] = None, metrics: Optional[Metrics] = None) -> None:
        self.program = program
        self.config = config
        self.clock = clock
        self._launcher = ClaudeLauncher(
            program, config, clock, tag, processes, metrics or Metrics())
        self._idle = IdlePool(self._launcher)
        self.terminate = self._launcher.terminate
        # The last used last.
        self._waiting: List[WaitingProcess] = []
        # See reap_zombies.
        self._zombies: Set[int] = set()

    @property
    def idle_count(self) -> int:
        return len(self._idle)

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    @property
    def is_busy(self) -> bool:
        """Whether `advance` has something to continue soon."""
        return self._launcher.has_terminating or self._idle.is_busy

    # --- for one turn ---
    def redetect_if_replaced(self) -> None:
        """After an update of claude, use the new program. Raises RunFailed."""
        if not self.program.is_replaced():
            return
        self._idle.restart()
        try:
            self.program.redetect()
        except CannotStart as error:
            raise RunFailed("cli_error", "%s Hint: %s." % (error, error.hint)) from None

    def candidates(self, request: RunRequest) -> Iterator[Candidate]:
        """Yield candidate processes, best first. The caller tries the next one only if one exits
        before it accepted the prompt."""
        self._idle.last_request_at = self.clock.monotonic()
        waiting = self._take_waiting(request)
        if waiting:
            yield waiting
        if request.session_id:
            yield Candidate(self._launcher.resume(request, request.session_id))
        history = request.history()
        session = request.session
        # What its tools did is in the session of the CLI only.
        has_session = bool(request.conversation) and session.tools != Tools.NONE and not history
        kind = ProcessKind(session.tools, session.workspace, has_session)
        limit = TRANSCRIPT_TURNS
        if self._idle.has_for_history(kind):
            limit = TRANSCRIPT_TURNS_READY
        if self._count_round_trips(history) > limit:
            try:
                yield from self._resume_transcript(session, kind, history)
            except (OSError, CannotStart) as error:
                logger.warning("A history is sent turn by turn: %s", error)
        idle = self._idle.take(request, kind)
        if idle:
            yield Candidate(idle, history=history)
        # The second one, if the first one showed that this CLI does not rewind.
        for _ in range(2):
            process = self._launcher.spawn(kind, self._launcher.effort_argv(session))
            yield Candidate(process, history=history, is_fresh=True)

    def _take_waiting(self, request: RunRequest) -> Optional[Candidate]:
        """Return a process that holds the conversation; rather one that holds no more than that."""
        best: Optional[Tuple[WaitingProcess, Candidate]] = None
        for waiting in self._waiting:
            candidate = waiting.candidate(request)
            if candidate and (best is None or candidate.rewind_to is None):
                best = waiting, candidate
        if request.conversation and not best:
            # Its configuration changed.
            self.forget(request.conversation)
        if not best:
            return None
        self._waiting.remove(best[0])
        return best[1]

    def _count_round_trips(self, history: Sequence[HistoryTurn]) -> int:
        """Return how many turns of the history cannot be piped."""
        if not self.program.may_pipe:
            return len(history)
        return sum(not is_pipeable(number, turn) for number, turn in enumerate(history))

    def _resume_transcript(self, session: SessionConfig, kind: ProcessKind,
                           history: Sequence[HistoryTurn]) -> Iterator[Candidate]:
        """Yield processes that begin with the history. Raises OSError, CannotStart."""
        snapshot = self._launcher.snapshot(session.tools)
        text = transcript(history, str(uuid.uuid4()), self.clock.now(), snapshot=snapshot)
        arguments = self._launcher.effort_argv(session)
        idle = self._idle.take_for_history(kind) if not arguments else None
        if idle and idle.transcript:
            process = idle.process
            try:
                if feed_pipe(idle.transcript, text, lambda: process.is_alive):
                    yield Candidate(process, history=history, transcript=idle.transcript)
                else:
                    self._idle.terminate([idle])
            finally:
                remove_transcript(idle.transcript)
        path = self._launcher.transcript_path()
        try:
            write_file_atomically(path, text)
            process = self._launcher.spawn(kind, [*resume_argv(path), *arguments])
            yield Candidate(process, history=history, transcript=path)
        finally:
            remove_transcript(path)

    def return_to_pool(self, request: RunRequest, turn: Turn, answer: Answer) -> None:
        """Keep a process for the next turn if it holds what the client knows; else terminate it."""
        process, calls = turn.process, answer.stop_info.calls
        seconds = self.config.warm_seconds
        if calls:
            seconds = max(seconds, TOOL_RESULT_WAIT_SECONDS)
        elif not turn.finished or not (request.conversation or request.is_chat):
            seconds = 0
        elif request.is_chat and (turn.messages.count != 1 or not answer.is_plain):
            seconds = 0
        if not seconds or request.is_prefilled or calls and answer.stop_info.reason != "tool_use":
            self.terminate(process, request.session, turn.finished)
            return
        latest = HistoryTurn(request.message, answer_content(answer))
        process.turns.append(hold_turn(process.turns, latest, turn.message_id))
        self._waiting.append(WaitingProcess(
            process, request.owner, request.session, request.conversation, calls, answer.model,
            self.clock.monotonic() + seconds))
        self._terminate_waiting(self._waiting[:-MAX_KEPT_PROCESSES])

    # --- maintenance ---
    def advance(self) -> None:
        """Continue the ends and the preparations of processes. Call it often."""
        self._launcher.reap_terminating()
        self._idle.advance()

    def maintain(self) -> None:
        """Expire waiting processes, start and prepare idle ones. Call it every second."""
        now = self.clock.monotonic()
        self._terminate_waiting([waiting for waiting in self._waiting
                                 if now >= waiting.expires_at or not waiting.process.is_alive])
        self.advance()
        self._idle.maintain()
        if os.getpid() == 1 and sys.platform == "linux":
            self._zombies = reap_zombies(self._zombies)

    def evict_unless(self, conversation_exists: Callable[[str], bool],
                     token_exists: Callable[[str], bool]) -> bool:
        """Terminate the processes of deleted conversations and tokens. -> whether any were."""
        evicted = [
            waiting for waiting in self._waiting if not token_exists(waiting.owner)
            or (waiting.conversation and not conversation_exists(waiting.conversation))]
        self._terminate_waiting(evicted)
        self._idle.forget_owner(token_exists)
        return bool(evicted)

    def session_ids(self) -> List[str]:
        """Return the CLI's sessions that processes hold."""
        processes = [*(waiting.process for waiting in self._waiting), *self._idle.processes()]
        return [process.session_id for process in processes if process.session_id]

    def forget(self, conversation: str) -> None:
        """Terminate the process of a conversation, if there is one."""
        self._terminate_waiting([waiting for waiting in self._waiting
                                 if waiting.conversation == conversation])

    def _terminate_waiting(self, processes: Sequence[WaitingProcess]) -> None:
        for waiting in processes:
            self._waiting.remove(waiting)
            self.terminate(waiting.process, waiting.session, is_idle=not waiting.calls)

    def close(self) -> None:
        """End every process within 2 seconds."""
        self._terminate_waiting(list(self._waiting))
        self._idle.close()
        self._launcher.close()


# --- the run loop ---
class ClaudeRunner:
    """Runs requests on the processes of a pool."""

    def __init__(self, pool: ClaudePool) -> None:
        self.pool = pool
        self._config = pool.config
        self._clock = pool.clock

    def run(self, request: RunRequest, live: LiveText, stop_reason: Callable[[], Optional[str]],
            on_rate_limits: Callable[[RateLimitStatus], None] = lambda limits: None) -> Answer:
        """Run one turn. stop_reason, on_rate_limits: see RunControl. Raises RunFailed."""
        self.pool.redetect_if_replaced()
        self._check_billing()
        live.shows_thinking = request.shows_thinking
        live.tool_names = {tool["name"] for tool in request.session.client_tools}
        deadline = self._clock.monotonic() + self._config.run_seconds
        answer_seconds = min(request.answer_seconds, self._config.silence_seconds)
        control = RunControl(
            self._clock, self._config, deadline, answer_seconds, stop_reason, on_rate_limits)
        for candidate in self.pool.candidates(request):
            answer = self._try(candidate, request, live, control)
            if answer:
                return answer
        raise RunFailed("cli_error", "claude could not be started.")

    def _check_billing(self) -> None:
        """Raise RunFailed before the first request goes out, if an API key would pay."""
        install = self.pool.program.install
        if install.is_billed_per_token and not self._config.allow_api_key:
            raise RunFailed(
                "billing_guard",
                "claude is signed in with %s, which would be billed per token. Sign it in to the"
                " subscription and restart the bridge, or allow it with --allow-api-key."
                % install.billing_account)

    def _try(self, candidate: Candidate, request: RunRequest, live: LiveText,
             control: RunControl) -> Optional[Answer]:
        """Run the turn with one process. -> None if another one must be tried. Raises RunFailed."""
        turn = Turn(candidate.process, request.session, control, candidate.is_configured)
        beginning = TurnStart(turn, self.pool.program)
        try:
            if candidate.rewind_to is not None:
                beginning.rewind(candidate.rewind_to)
            elif not candidate.is_configured:
                earlier_turns = request.earlier_turns if candidate.history else ()
                beginning.start(candidate, earlier_turns)
            beginning.configure(request)
            if candidate.tool_results:
                turn.send_tool_results(candidate.tool_results, live, candidate.model)
            else:
                turn.send_prompt(request.message)
            answer = turn.read_answer(live)
            thinking = tuple(turn.messages.thinking) if live.shows_thinking else ()
            answer = replace(answer, session_id=candidate.process.session_id,
                             stop_info=answer.stop_info._replace(thinking=thinking))
            if live.model:
                self.pool.program.full_models[request.session.model] = live.model
        except (SessionLost, ProcessExited) as lost:
            self.pool.terminate(candidate.process, request.session, is_idle=False)
            is_final = turn.prompt_accepted or candidate.is_fresh
            if isinstance(lost, ProcessExited) and is_final:
                raise RunFailed("cli_error", str(lost)) from None
            return None
        except BaseException:
            self.pool.terminate(candidate.process, request.session, is_idle=turn.finished)
            raise
        self.pool.return_to_pool(request, turn, answer)
        return answer


# === 8 Queue =====================================================================================
# The worker takes jobs from the database, one after the other; the notifier wakes those who wait.

MAINTENANCE_SECONDS = 1.0
PURGE_SECONDS = 3_600.0
# A purge deletes slices for so long, and then leaves the worker to others for so long.
PURGE_STEP_SECONDS, PURGE_PAUSE_SECONDS = 0.02, 0.08
# Delay before refilling the pool, so that the new process does not compete with the start of a run.
REFILL_SECONDS = 0.2
# For a running job to finish when the bridge stops.
FINISH_SECONDS = 1.5
# Longest pause that a /v1 request waits out instead of failing.
MAX_INLINE_WAIT_SECONDS = 300.0
# Between tries while the API does not answer; the last value repeats.
BACK_OFF_SECONDS = (2, 4, 8, 16, 32, 60)
LOGIN_RETRY_SECONDS = 300.0
# How long a request of /v1 waits for the end of a hold, because its client holds a connection open.
CHAT_HOLD_SECONDS = {"overloaded": 20.0, "network": 30.0, "login": 30.0, "paused": 30.0}
# After so many server errors, other requests are tried before this one.
SERVER_ERRORS = 5
# So often the answer to a request may break off.
CUT_ANSWERS = 20
# Most requests of which they are counted.
COUNTED_REQUESTS = 100
# Of --silence-seconds: for so long the API may be silent before it begins to answer. After 36 s a
# client of /v1 still gets a status; and the pings of the CLI, every 30 s while it waits for an
# answer that is not streamed, are in time.
ANSWER_SHARE = 0.4


class Notifier:
    """Wakes the threads that wait for a topic. Any thread. It carries no data: a woken thread reads
    the database again. The topic of a job's status is its id; see text_topic for its text."""
    JOB_QUEUED = ""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: Dict[str, List[threading.Event]] = {}
        self.is_closed = False

    @staticmethod
    def text_topic(job_id: str) -> str:
        return "text of " + job_id

    @contextlib.contextmanager
    def subscribe(self, *topics: str) -> Iterator[threading.Event]:
        """Yield an event that each `notify` of a topic sets. Read the database after this, and
        clear the event before you read."""
        event = threading.Event()
        with self._lock:
            for topic in topics:
                self._waiters.setdefault(topic, []).append(event)
            if self.is_closed:
                event.set()
        try:
            yield event
        finally:
            with self._lock:
                for topic in topics:
                    self._waiters[topic].remove(event)
                    if not self._waiters[topic]:
                        del self._waiters[topic]

    def notify(self, topic: str) -> None:
        with self._lock:
            for event in self._waiters.get(topic, ()):
                event.set()

    def waiter_count(self, topic: str) -> int:
        with self._lock:
            return len(self._waiters.get(topic, ()))

    def close(self) -> None:
        """Wake everybody, for good."""
        with self._lock:
            self.is_closed = True
            for events in self._waiters.values():
                for event in events:
                    event.set()


PAUSE_TEXTS = {
    "overloaded": "The service is overloaded.",
    "network": "The API cannot be reached.",
    "login": "The login of claude was refused. On the machine of the bridge run claude, then"
    " /login.",
    "paused": "The owner has paused the queue."}


def pause_message(pause: Pause) -> str:
    until = iso_time(pause.known_until)
    if pause.reason == "usage_limit":
        return "The plan's limit is used up until %s." % until
    next_try = "The next try is at %s." % until if until else ""
    return " ".join(filter(None, (PAUSE_TEXTS[pause.reason], next_try, pause.text)))


def seconds_left(pause: Pause, now: float) -> float:
    """Return when to ask again; nobody knows it for a queue that the owner has paused."""
    return RETRY_SECONDS if math.isinf(pause.until) else pause.until - now


def is_long_limit(pause: Pause, now: float) -> bool:
    """Return whether a request of /v1 would wait too long for the plan's limit."""
    return pause.reason == "usage_limit" and pause.until - now > MAX_INLINE_WAIT_SECONDS


def held_error(code: str, pause: Pause, now: float) -> RunError:
    return RunError(code, pause_message(pause), seconds_left(pause, now))


def job_error(job: Job, pause: Optional[Pause], now: float) -> RunError:
    """Return the failure of a job for a client that waits. pause: of the job's model now."""
    code = job.error_code or ""
    if pause and pause.reason == HOLD_REASONS.get(code, code):
        return held_error(code, pause, now)
    is_held = code in HOLD_REASONS or code in CHAT_HOLD_SECONDS
    return RunError(code, job.error or "", BACK_OFF_SECONDS[0] if is_held else None)


class Hold(NamedTuple):
    """A Pause of the queue. ends_at: its end on the monotonic clock. tries: those that failed.
    login: of the last try, see login_fingerprint."""
    pause: Pause
    ends_at: float
    tries: int = 0
    login: Any = None


class QueueHolds:
    """Why the queue waits: by model ("" for the default one), or for all models.
    A used-up limit of the plan holds the queue until its reset; the owner, until somebody resumes
    it. After any other failure one request is tried now and then, until the API answers. The worker
    alone calls the methods that change something."""

    def __init__(self, database: Database, clock: Clock, fingerprint: Callable[[], Any]) -> None:
        self._database = database
        self._clock = clock
        self._login_fingerprint = fingerprint
        self._login: Any = None
        self._holds: Dict[str, Hold] = {}
        # The model of the last try, and whether the API answers it now.
        self._model = ""
        self.is_answering = False
        # Model -> (since, the same on the monotonic clock) of the pauses that are active.
        self._began: Dict[str, Tuple[float, float]] = {}
        # Job id -> server errors of the API in a row; infinite if the next one is the last.
        self._server_errors: Dict[str, float] = {}
        stored = read_hold(database.get_state("hold"))
        if stored:
            pause = stored._replace(until=clock.now())
            self._holds[ALL_MODELS] = Hold(pause, float("-inf"))

    def _is_due(self, hold: Hold) -> bool:
        """Whether a request may be tried: either clock has reached the end."""
        now, monotonic = self._clock.now(), self._clock.monotonic()
        return now >= hold.pause.until or monotonic >= hold.ends_at

    def active(self) -> Dict[str, Pause]:
        """Return why requests wait, by model. A lost network counts until the API answers; while it
        is tried, nobody knows until when."""
        pauses = {}
        for model, hold in self._holds.copy().items():
            if not self._is_due(hold):
                pauses[model] = hold.pause
            elif self.is_answering and model in (ALL_MODELS, self._model):
                continue
            elif hold.pause.reason != "usage_limit":
                pauses[model] = hold.pause._replace(until=0.0)
        paused = self._database.get_state("paused")
        if paused:
            pauses[ALL_MODELS] = Pause("paused", math.inf, read_number(paused))
        return pauses

    def current(self, model: Optional[str] = ALL_MODELS) -> Optional[Pause]:
        """Return why no job of this model starts now; by default, why no job at all does. model:
        None for the default model. Any thread."""
        active = self.active()
        pauses = [active[key] for key in (ALL_MODELS, model or "") if key in active]
        return max(pauses, key=lambda pause: pause.until, default=None)

    def held_models(self) -> List[str]:
        """Return the models of which no job may start."""
        models = [model for model, hold in self._holds.items() if not self._is_due(hold)]
        return models + [ALL_MODELS] * bool(self._database.get_state("paused"))

    def note_try(self, model: str = "") -> None:
        """Record the model and the login that the next run uses."""
        self._model = model
        self.is_answering = False
        self._login = self._login_fingerprint()

    def begin(self, failure: RunFailed, model: str, since: float) -> Pause:
        """Hold the queue after a failed run. since: when that began, if the API answered before."""
        self.is_answering = False
        reason = HOLD_REASONS[failure.code]
        key = model if failure.is_of_model else ALL_MODELS
        if key != ALL_MODELS:
            self.end(ALL_MODELS)
        last, tries = self._holds.get(key), 0
        if last and last.pause.reason != "usage_limit":
            since, tries = last.pause.since, last.tries + 1
        seconds: float = BACK_OFF_SECONDS[min(tries, len(BACK_OFF_SECONDS) - 1)]
        if reason == "usage_limit":
            seconds = pause_seconds(failure.resets_at, self._clock.now())
        elif reason == "login":
            seconds = LOGIN_RETRY_SECONDS
        text = redact(str(failure))
        pause = Pause(reason, self._clock.now() + seconds, since, text)
        if reason == "usage_limit":
            pause = Pause(reason, pause.until)
        self._holds[key] = Hold(pause, self._clock.monotonic() + seconds, tries, self._login)
        if key == ALL_MODELS and not (last and last.pause.reason == reason):
            is_outage = reason in ("network", "login")
            self._database.set_state("hold", as_json([reason, since, text]) if is_outage else None)
        return pause

    def note_server_error(self, job_id: str, is_cut: bool = False) -> bool:
        """Count a server error of the API. -> whether it is the fault of the request: it failed
        often, then the API answered another one, and now it fails again. is_cut: an answer broke
        off, which costs a part of the plan each time."""
        errors = self._server_errors.get(job_id, 0.0)
        if math.isinf(errors) or is_cut and errors + 1 >= CUT_ANSWERS:
            # The other suspects wait for another answer: perhaps it is the API once more.
            self._server_errors = dict.fromkeys(self._server_errors, SERVER_ERRORS)
            self._server_errors.pop(job_id, None)
            return True
        self._server_errors[job_id] = errors + 1
        if len(self._server_errors) > COUNTED_REQUESTS:
            del self._server_errors[next(iter(self._server_errors))]
        return False

    def suspects(self) -> List[str]:
        """Return the jobs that failed so often that others are tried first."""
        return [job_id for job_id, errors in self._server_errors.items()
                if SERVER_ERRORS <= errors < math.inf]

    def end(self, model: str, job_id: str = "") -> None:
        """Release what waits, because the API has answered a request for this model. job_id: that
        request; each suspect has one more try."""
        if job_id:
            self._server_errors = {
                other: math.inf for other, errors in self._server_errors.items()
                if other != job_id and errors >= SERVER_ERRORS}
        for key in (ALL_MODELS, model):
            if key in self._holds and self._holds[key].pause.reason != "usage_limit":
                pause = self._holds.pop(key).pause
                logger.info("The API answers again (%s); the queue goes on.", pause.reason)
                if key == ALL_MODELS:
                    self._forget()

    def overdue(self, hold_seconds: float) -> Iterator[Tuple[str, Pause, str, bool, float]]:
        """Yield which requests have waited for as long as they may.
        -> (their error code, the pause, the model, whether those of /v1, made before this time)."""
        now, monotonic = self._clock.now(), self._clock.monotonic()
        codes = {reason: code for code, reason in HOLD_REASONS.items()}
        last_began, self._began = self._began, {}
        for model, pause in self.active().items():
            since, began_at = last_began.get(model, (-1.0, 0.0))
            if since != pause.since:
                began_at = monotonic - max(0.0, now - pause.since)
            self._began[model] = pause.since, began_at
            # The time of day may have been set back.
            held_seconds = max(now - pause.since, monotonic - began_at)
            limits = {True: CHAT_HOLD_SECONDS.get(pause.reason)}
            if pause.reason not in ("usage_limit", "paused"):
                limits[False] = hold_seconds
            hold = self._holds.get(model)
            # After a sleep, or a restart, one request is tried first.
            is_tried = not hold or not self._is_due(hold)
            for is_chat, seconds in limits.items():
                is_long = seconds is not None and held_seconds >= seconds
                if seconds is not None and is_long and (is_chat or is_tried):
                    code = codes.get(pause.reason, pause.reason)
                    yield code, pause, model, is_chat, now - seconds

    def seconds_to_try(self) -> float:
        """Return when the next request may start, infinite if nothing is known."""
        seconds = [pause.until - self._clock.now() for pause in self.active().values()]
        return min((left for left in seconds if left > 0), default=math.inf)

    def refresh(self, is_needed: bool) -> None:
        """Try at once with a new login; forget what no request waits for."""
        for model, hold in list(self._holds.items()):
            if hold.pause.reason == "login" and hold.login != self._login_fingerprint():
                hold = hold._replace(pause=hold.pause._replace(until=self._clock.now()))
                self._holds[model] = hold
            elif hold.pause.reason == "login":
                continue
            if self._is_due(hold) and not is_needed:
                del self._holds[model]
                if model == ALL_MODELS:
                    self._forget()

    def _forget(self) -> None:
        for name in ("hold", "crashes"):
            self._database.set_state(name, None)


def chat_run_request(job: Job, token: Token, chat: Chat) -> RunRequest:
    """Return what a run of a conversation received through /v1 needs."""
    client_tools, instructions = truncate_descriptions(chat.client_tools)
    session = SessionConfig((job.system_prompt or SYSTEM_PROMPT) + instructions, job.model,
                            job.json_schema, job.effort, token.tools, token.workspace, client_tools)
    *earlier, last = map(prefix_tool_names, chat.turns)
    history = [HistoryTurn(*pair) for pair in zip(earlier[::2], earlier[1::2])]
    settings = answer_settings(replace(chat, effort=job.effort, json_schema=job.json_schema))
    if chat.prefill:
        last, history = [{"type": "text", "text": "Continue."}], []
        session = replace(session, tools=Tools.NONE, workspace=None)
    return RunRequest(last, session, history=lambda: history, owner=job.token_id, is_chat=True,
                      settings=settings, shows_thinking=chat.thinking == SHOWN,
                      is_prefilled=bool(chat.prefill))


def chat_answer(answer: Answer, chat: Chat, job_id: str) -> Answer:
    """Return an answer with the client's names of its tools; a structured one as a text, or as the
    call of the tool whose input it is."""
    if not answer.structured:
        names = {tool["name"]: tool.get("title") for tool in chat.client_tools}
        calls = tuple(call._replace(name=names.get(call.name) or call.name)
                      for call in answer.stop_info.calls)
        return replace(answer, stop_info=answer.stop_info._replace(calls=calls))
    if not chat.forced_tool:
        return replace(answer, text=answer.structured or "")
    call_id = "toolu_" + job_id.replace("-", "")
    call = ToolCall(call_id, chat.forced_tool, json.loads(answer.structured or "{}"))
    stop_info = answer.stop_info._replace(reason="tool_use", sequence=None, calls=(call,))
    return replace(answer, text="", structured=None, stop_info=stop_info)


def is_news(last: Optional[RateLimitWindow], window: RateLimitWindow) -> bool:
    """Return whether a limit changed, or was not reported for a minute."""
    if not last or last._replace(seen_at=0) != window._replace(seen_at=0):
        return True
    return window.seen_at - last.seen_at > 60


class Purge:
    """Deletes what is too old, every hour and in slices.
    is_running: there is more to delete. has_lost_sessions: the CLI may have left files of sessions
    that nobody can resume."""

    def __init__(self, stores: Stores, config: Config, clock: Clock) -> None:
        self._stores = stores
        self._config = config
        self._clock = clock
        self._starts_at = self._continues_at = float("-inf")
        # UTC minus monotonic clock, at the last start.
        self._clock_offset: Optional[float] = None
        self.is_running = False
        self.has_lost_sessions = False

    def step(self) -> None:
        """Start when it is time; delete some slices, or give space back."""
        now = self._clock.monotonic()
        if now >= self._starts_at:
            self._starts_at = now + PURGE_SECONDS
            last_offset = self._clock_offset
            self._clock_offset = self._clock.now() - now
            # If the clock was set, perhaps to a wrong time and not for long, do not purge.
            self.is_running = last_offset is None or abs(self._clock_offset - last_offset) < 3600
            self.has_lost_sessions = True
        if now < self._continues_at:
            return
        while self.is_running and self._clock.monotonic() < now + PURGE_STEP_SECONDS:
            self._delete_slice()
        self._continues_at = self._clock.monotonic() + PURGE_PAUSE_SECONDS

    def _delete_slice(self) -> None:
        jobs, database = self._stores.jobs, self._stores.database
        # A revocation that was interrupted.
        token_id = self._stores.tokens.disabled()
        if token_id:
            if not self._stores.tokens.delete_slice(token_id):
                self.has_lost_sessions = True
        # SQLite looks through all free pages for each that it gives back, so they stay few.
        elif not (database.free_pages() or jobs.purge(self._config.keep_days)
                  or self._stores.callbacks.limit_delays()):
            self._stores.usage.purge()
            database.checkpoint()
            self.is_running = False

    def remove_sessions(self, running: Iterable[str]) -> None:
        """Delete the files of lost sessions. running: the sessions of processes."""
        self.has_lost_sessions = False
        ids = {*self._stores.conversations.session_ids(), *running}
        remove_sessions(self._config.data_dir, ids.__contains__)


class Worker:
    """Runs the jobs in order, one at a time.
    Owns the thread "worker" and, in it, the processes of `claude`. Any other thread may call
    `live`, `current_pause` and read `running`."""

    def __init__(self, stores: Stores, runner: ClaudeRunner, notifier: Notifier, config: Config,
                 clock: Clock, metrics: Optional[Metrics] = None) -> None:
        self._stores = stores
        self._runner = runner
        self._pool = runner.pool
        self._notifier = notifier
        self._config = config
        self._clock = clock
        self._metrics = metrics or Metrics()
        self._live: Dict[str, LiveText] = {}
        self.holds = QueueHolds(
            stores.database, clock,
            lambda: login_fingerprint(self._pool.program.install.environment))
        self._windows: Dict[str, RateLimitWindow] = {}
        # Job id -> generation of its text, after a run whose end could not be stored.
        self._restart_counts: Dict[str, int] = {}
        self._stopping = threading.Event()
        self._abort_at = float("inf")
        self._maintain_at = float("-inf")
        self._purge = Purge(stores, config, clock)
        self._thread = threading.Thread(target=self._loop, name="worker", daemon=True)
        # (job id, since) while a job runs.
        self.running: Optional[Tuple[str, float]] = None

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def idle_processes(self) -> int:
        return self._pool.idle_count

    @property
    def waiting_processes(self) -> int:
        return self._pool.waiting_count

    def live(self, job_id: str) -> Optional[LiveText]:
        """Return the text of a running answer; None for a job that does not run."""
        return self._live.get(job_id)

    def current_pause(self, model: Optional[str] = ALL_MODELS) -> Optional[Pause]:
        """Return why no job of a model starts now; see QueueHolds.current."""
        return self.holds.current(model)

    def close(self) -> None:
        """Let a running job finish for a moment, or put it back; end all processes. Idempotent."""
        self._abort_at = min(self._abort_at, self._clock.monotonic() + FINISH_SECONDS)
        self._stopping.set()
        self._notifier.notify(Notifier.JOB_QUEUED)
        if self._thread.ident:
            self._thread.join(CLOSE_SECONDS)

    def _loop(self) -> None:
        has_failed = False
        try:
            while not self._stopping.is_set():
                with self._notifier.subscribe(Notifier.JOB_QUEUED) as event:
                    try:
                        if has_failed:
                            self._stores.jobs.recover()
                            has_failed = False
                        self._run_maintenance()
                        if not self.step():
                            event.wait(self._idle_seconds())
                    except Exception:
                        if not has_failed:
                            logger.exception("The worker failed and retries every second.")
                        has_failed = True
                        self._stopping.wait(MAINTENANCE_SECONDS)
        finally:
            self._pool.close()

    def _idle_seconds(self) -> float:
        if self._pool.is_busy or self._purge.is_running:
            return CANCEL_POLL_SECONDS
        return min(MAINTENANCE_SECONDS, max(0.01, self.holds.seconds_to_try()))

    # --- one job ---
    def step(self) -> bool:
        """Run the oldest job. -> False if there is none, or if the queue is paused."""
        job = self._claim()
        token = self._stores.tokens.get(job.token_id) if job else None
        if not job or not token:
            return False
        chat = self._stores.jobs.chat(job.id) if job.api else None
        if job.api and not chat:
            # Cancelled since it was claimed.
            return True
        logger.info("Processing request %s...", job.id[:8])
        live = LiveText(max(job.generation, self._restart_counts.pop(job.id, 0)),
                        lambda: self._notifier.notify(Notifier.text_topic(job.id)),
                        chat.stop_sequences if chat else (), self._clock.monotonic)
        started, now = self._clock.monotonic(), self._clock.now()
        waited = max(0.0, now - job.created_at)
        if job.attempts == 1:
            self._metrics.observe("cab_wait_seconds", waited)
        self._live[job.id] = live
        self.running = (job.id, now)
        self._maintain_at = started + REFILL_SECONDS
        self._notifier.notify(job.id)
        try:
            self._run(job, token, chat, live)
        finally:
            self.running = None
            latency = Latency(now, job.token_id, waited, live.seconds_to_text(started))
            self._metrics.record_latency(latency)
            # Refill the pool at once, because the run may have been too short for it.
            self._maintain_at = float("-inf")
            del self._live[job.id]
            self._notifier.notify(job.id)
        return True

    def _claim(self) -> Optional[Job]:
        held_models = self.holds.held_models()
        jobs = self._stores.jobs
        if ALL_MODELS in held_models or not jobs.has_queued(held_models):
            return None
        last = self.holds.suspects()
        job: Optional[Job] = jobs.claim(held_models, last) if last else None
        job = job or jobs.claim(held_models)
        if job:
            self.holds.note_try(job.model or "")
        return job

    def _run(self, job: Job, token: Token, chat: Optional[Chat], live: LiveText) -> None:
        """Run a job and store the result."""
        started = self._clock.monotonic()
        request: Optional[RunRequest] = None
        is_completed = is_stored = False
        try:
            if chat:
                request = chat_run_request(job, token, chat)
            else:
                request = self._run_request(job, token)
            request = replace(request, answer_seconds=self._answer_seconds(chat))
            try:
                answer = self._runner.run(
                    request, live, lambda: self._stop_reason(job, live), self._record_rate_limits)
            except Refused as refused:
                if not chat:
                    raise
                # Both APIs report that as an answer.
                answer = refused.answer
            self.holds.end(job.model or "", job.id)
            if chat:
                answer = chat_answer(answer, chat, job.id)
            live.reconcile(replace_surrogates(answer.text))
            is_completed = self._retry_until_stored(
                lambda: self._stores.jobs.complete(job, answer, live.generation))
            is_stored = True
            self._metrics.observe("cab_run_seconds", self._clock.monotonic() - started)
            outcome = "completed" if is_completed else "was cancelled meanwhile"
            logger.info("Request %s %s", job.id[:8], outcome)
        except RunFailed as failure:
            seconds = self._clock.monotonic() - started
            if failure.code not in (*HOLD_REASONS, "interrupted"):
                self._metrics.observe("cab_run_seconds", seconds)
            self._handle_failure(job, failure, live, self._clock.now() - seconds)
            is_stored = True
        finally:
            if not is_stored:
                # Higher than the stored generation, so that readers see a restart.
                self._restart_counts[job.id] = live.generation + 1
            if request and request.conversation and not is_completed:
                self._purge.has_lost_sessions = True
                # Its process may have received a turn that is not part of the conversation.
                self._pool.forget(request.conversation)

    def _run_request(self, job: Job, token: Token) -> RunRequest:
        """Return what a run of a native request needs."""
        session = SessionConfig(job.system_prompt or SYSTEM_PROMPT, job.model, job.json_schema,
                                job.effort, token.tools, token.workspace)
        single = RunRequest(prompt_of(self._stores.database, job), session, owner=job.token_id)
        if not job.conversation:
            return single
        stored = self._stores.conversations.open(job.token_id, job.conversation)
        current = self._stores.jobs.summary(job.id)
        if not current or not current.conversation:
            # Deleted since the job was claimed: the turn belongs to no conversation.
            return single
        history = lru_cache(maxsize=None)(lambda: self._stores.conversations.history(job))
        return replace(single, conversation=stored.key, session_id=stored.session_id,
                       spent_usd=stored.spent_usd, history=history)

    def _answer_seconds(self, chat: Optional[Chat]) -> float:
        """Return for how long the API may be silent before it begins to answer. A request that can
        wait has more time at its next try."""
        pause = self.current_pause()
        is_retry = not chat and pause and pause.reason == "network"
        return self._config.silence_seconds * (1.0 if is_retry else ANSWER_SHARE)

    def _stop_reason(self, job: Job, live: LiveText) -> Optional[str]:
        self.holds.is_answering = live.is_answering
        if self._clock.monotonic() >= self._abort_at:
            return "interrupted"
        # A database that is locked for a while does not end a run.
        with contextlib.suppress(Unavailable):
            self._run_maintenance()
            if self._stores.jobs.status(job.id) != JobStatus.PROCESSING:
                return "cancelled"
        return None

    def _retry_until_stored(self, write: Callable[[], bool]) -> bool:
        """Retry storing the result: it is too expensive to lose to a full disk."""
        for attempt in count():
            try:
                return write()
            except Unavailable as error:
                if attempt == 0:
                    logger.error("A result cannot be stored; retrying every second: %s", error)
                if self._stopping.wait(MAINTENANCE_SECONDS):
                    raise
                self._pool.advance()
        raise AssertionError("unreachable")

    def _handle_failure(self, job: Job, failure: RunFailed, live: LiveText, since: float) -> None:
        """Put the job back, or store its error. since: when the run began."""
        text = redact(str(failure))
        is_held = failure.code in HOLD_REASONS
        is_of_request = failure.code == "network" and (failure.is_answered or failure.is_cut) and (
            self.holds.note_server_error(job.id, failure.is_cut))
        if is_of_request or not is_held and failure.code != "interrupted":
            if failure.is_answered and not is_held:
                self.holds.end(job.model or "", job.id)
            self._retry_until_stored(lambda: self._stores.jobs.fail(job, failure.code, text))
            logger.warning("Request %s failed: %s: %s", job.id[:8], failure.code, text[:300])
            if is_of_request:
                self._hold(failure, job.model or "", since)
            return
        live.restart()
        self._retry_until_stored(lambda: self._stores.jobs.requeue(job, live.generation))
        if failure.code == "interrupted":
            logger.info("Request %s waits for the next start", job.id[:8])
            return
        self._hold(failure, job.model or "", since)
        logger.info("Request %s waits (%s): %s", job.id[:8], failure.code, text[:200])

    # --- what holds the queue ---
    def _hold(self, failure: RunFailed, model: str, since: float) -> None:
        pause = self.holds.begin(failure, model, since)
        model = model if failure.is_of_model else ALL_MODELS
        logger.warning("%s: the queue (%s) waits until %s", pause.reason, model or "default model",
                       iso_time(pause.until))
        self._fail_held()
        if is_long_limit(pause, self._clock.now()):
            # The clients of /v1 hold a connection open and would wait for nothing.
            self._fail_waiting("usage_limit", pause, model, True, math.inf)

    def _fail_held(self) -> None:
        """Fail the requests that have waited for as long as they may."""
        for overdue in self.holds.overdue(self._config.hold_hours * 3600.0):
            self._fail_waiting(*overdue)

    def _fail_waiting(self, code: str, pause: Pause, model: str, is_chat: bool,
                      created_before: float) -> None:
        with contextlib.suppress(Unavailable):
            for job_id in self._stores.jobs.fail_waiting(
                    code, pause_message(pause), model, is_chat, created_before):
                self._notifier.notify(job_id)

    def _record_rate_limits(self, limits: RateLimitStatus) -> None:
        """Store what the CLI reports of the plan, if it changed. With --plan-only the use of paid
        extra usage begins a pause."""
        if limits.is_using_overage and self._config.plan_only:
            used_up = RunFailed("usage_limit", "", limits.resets_at)
            self._hold(used_up, ALL_MODELS, self._clock.now())
        news = [window for window in limits.windows
                if is_news(self._windows.get(window.kind), window)]
        if news:
            with contextlib.suppress(Unavailable):
                self._stores.usage.save_plan_limits(limits.windows)
                self._windows.update((window.kind, window) for window in limits.windows)

    # --- maintenance ---
    def _run_maintenance(self) -> None:
        """Maintain the pool every second, also during a run; purge every hour, in slices."""
        self._pool.advance()
        now = self._clock.monotonic()
        if now >= self._maintain_at:
            self._maintain_at = now + MAINTENANCE_SECONDS
            self._pool.maintain()
            if self._pool.evict_unless(
                    self._stores.conversations.exists,
                    lambda token_id: self._stores.tokens.get(token_id) is not None):
                self._purge.has_lost_sessions = True
            self._fail_held()
            self.holds.refresh(bool(self.running) or self._stores.jobs.has_queued())
        self._purge.step()
        # During a run the session of its conversation is not in the database.
        if self._purge.has_lost_sessions and not self.running and not self._pool.is_busy:
            self._purge.remove_sessions(self._pool.session_ids())


# === 9 Service ===================================================================================
# The rules of what a caller may do, without HTTP. Any thread. Routes and command line call it.
# What needs no rule (lists, counts) the handlers read from the stores.

# Open streams and waits: of one token, and of all tokens but the admins', so that other calls find
# a connection.
MAX_STREAMS_PER_TOKEN = 128
MAX_STREAMS = 192
# Of 100 requests, or a million characters.
SEARCH_PAGES = 20
# An authenticated caller.
Caller = Token


class JobView(NamedTuple):
    """A job as its owner sees it.
    queue_position: jobs queued before it + 1, 0 if it is not queued.
    overall_position: jobs queued and running before it + 1.
    pause: what it waits for besides its turn. partial: the text so far, in a poll while it runs."""
    job: Job
    queue_position: int
    overall_position: int
    pause: Optional[Pause] = None
    partial: Optional[str] = None


# What a reader of a job receives; the view comes when it is queued or finished.
JobEvents = Generator[Tuple[JobEvent, Optional[JobView]], None, None]


class RunningJobs(Protocol):
    """What the service needs to know of the worker."""
    def live(self, job_id: str) -> Optional[LiveText]:
        """Return the text of a running answer."""
        return None
    def current_pause(self, model: Optional[str] = ALL_MODELS) -> Optional[Pause]:
        """Return why no job of a model starts now."""
        return None


def check_callback(url: str, callbacks: Union[bool, Tuple[str, ...]]) -> Tuple[CallbackUrl, bool]:
    """Check whether a token may send results there. -> the URL; whether its address may be private.
    Raises InvalidRequest. A host that the admin named may be private, and may use http."""
    parts = CallbackUrl.parse(url)
    if callbacks is False:
        raise InvalidRequest("callback needs a token that was created with callbacks",
                             field="callback")
    if callbacks is not True:
        if not {parts.host, parts.host_and_port} & set(callbacks):
            text = "callback must lead to a host of the token: " + ", ".join(callbacks)
            raise InvalidRequest(text, field="callback")
        return parts, True
    if not parts.is_https:
        raise InvalidRequest("callback must begin with https://", field="callback")
    if not parts.is_allowed_literal(allow_private=False):
        text = "callback must not lead to a private or special address"
        raise InvalidRequest(text, field="callback")
    return parts, False


def outage(pause: Optional[Pause]) -> Tuple[Optional[Pause], Optional[str]]:
    """Return a pause because of which the API does not answer, and what anybody may know of it."""
    if pause and pause.reason in ("network", "login"):
        return pause, PAUSE_TEXTS[pause.reason]
    return None, None


def find_token(tokens: Sequence[Token], text: str) -> Token:
    """Return the token with this id, else with this name, else the one whose id or secret begins
    so. Raises NotFound; InvalidRequest for several."""
    # All secrets begin with "cab-".
    is_long = len(text) >= 6
    candidates = (
        [token for token in tokens if token.id == text]
        or [token for token in tokens if token.name == text]
        or [token for token in tokens if is_long and (
            token.id.startswith(text) or token.prefix.startswith(text[:12]))])
    if not candidates:
        raise NotFound("Token not found: there is no ID, name or prefix %r" % text[:100])
    if len(candidates) > 1:
        ids = ", ".join(token.id for token in candidates[:5])
        raise InvalidRequest("%d tokens match %r; use one of their IDs: %s"
                             % (len(candidates), text[:100], ids))
    return candidates[0]


def is_allowed_model(model: str, models: Sequence[str]) -> bool:
    """Return whether a token may use a model: one of its models, or of their families. The family
    haiku has claude-haiku-4-5, for example."""
    return model in models or model.startswith("claude-") and any(
        word in models for word in model.split("-")[1:] if word.isalpha())


class JobPage(NamedTuple):
    """A part of a list of jobs.
    next: where the next part begins; None at the end. searched_to: until when, in epoch seconds,
    the jobs were read, if there are more."""
    jobs: List[Job]
    next: Optional[int] = None
    searched_to: Optional[float] = None
    views: Sequence[JobView] = ()


def search_jobs(store: JobStore, where: JobFilter, before: Optional[int], limit: int) -> JobPage:
    """Return a page of the jobs that match, newest first. A search reads SEARCH_PAGES of the store
    at most, so that it takes no longer when there are more jobs; other calls run in between."""
    if not where.needs_search:
        jobs, before = store.page(where, before, limit)
        return JobPage(jobs, before, jobs[-1].created_at if before else None)
    matches: List[Job] = []
    size = 0
    searched_to = None
    for _ in range(SEARCH_PAGES):
        jobs, before = store.page(where, before, PAGE_JOBS)
        for job in jobs:
            searched_to = job.created_at
            if searched_to < where.since:
                return JobPage(matches)
            if where.matches(job):
                matches.append(job)
                size += sum(len(text or "") for text in (
                    job.message, job.response, job.structured, job.system_prompt, job.json_schema))
                if len(matches) == limit or size > PAGE_CHARACTERS:
                    return JobPage(matches, job.seq, searched_to)
        if before is None:
            return JobPage(matches)
    return JobPage(matches, before, searched_to)


class StreamSlots:
    """Counts the open streams and waits of each token. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_token: Dict[str, int] = {}

    def check(self, caller: Caller) -> None:
        """Raise RateLimited if the caller has too many."""
        if not caller.is_admin and sum(self._by_token.copy().values()) >= MAX_STREAMS:
            text = "There are already %d open streams and waits (the maximum)." % MAX_STREAMS
            raise retry_later(RateLimited, text, 5)
        if self._by_token.get(caller.id, 0) >= MAX_STREAMS_PER_TOKEN:
            text = "This token already has %d open streams and waits (the maximum)."
            raise retry_later(RateLimited, text % MAX_STREAMS_PER_TOKEN, 5)

    @contextlib.contextmanager
    def take(self, caller: Caller) -> Iterator[None]:
        """Count one more during the block. Raises RateLimited."""
        key = caller.id
        with self._lock:
            self.check(caller)
            self._by_token[key] = self._by_token.get(key, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._by_token[key] -= 1
                if not self._by_token[key]:
                    del self._by_token[key]


class Service:
    """The bridge without HTTP. Raises BridgeErrors."""

    def __init__(self, stores: Stores, notifier: Notifier, clock: Clock, data_dir: Path,
                 running: RunningJobs, models: Optional[ModelCatalog] = None) -> None:
        self.stores = stores
        self.clock = clock
        self.notifier = notifier
        self._data_dir = data_dir
        self._running = running
        self._models = models
        self.slots = StreamSlots()

    def authenticate(self, secret: str) -> Caller:
        """Return the caller of a token. Raises InvalidToken. The look-up is by digest, so its time
        reveals nothing of a token."""
        token = self.stores.tokens.by_digest(digest(secret))
        if token is None or token.is_expired(self.clock.now()):
            raise InvalidToken()
        self.stores.tokens.touch(token)
        return token

    def check_token(self, caller: Caller) -> None:
        """Raise InvalidToken if the token was revoked or has expired meanwhile."""
        token = self.stores.tokens.get(caller.id)
        if token is None or token.is_expired(self.clock.now()):
            raise InvalidToken()

    # --- requests ---
    def ask(self, caller: Caller, request: Union[Ask, Chat],
            key: Optional[str] = None) -> EnqueueResult:
        """Queue a request, or find that of this Idempotency-Key. Raises InvalidRequest,
        ModelNotAllowed, IdempotencyConflict, RateLimited, DailyLimit, QueueFull; RunError for a
        Chat that would have to wait for long."""
        is_stateful = caller.session_mode == SessionMode.STATEFUL
        models = caller.models
        if isinstance(request, Ask) and request.callback:
            check_callback(request.callback, caller.callbacks)
        if request.conversation and not is_stateful:
            raise InvalidRequest(
                "conversation needs a token with sessionMode stateful", field="conversation")
        if models and request.model and not is_allowed_model(request.model, models):
            raise ModelNotAllowed(
                "This token may not use the model %s. Use: %s" % (request.model, ", ".join(models)),
                field="model")
        if isinstance(request, Chat) or request.stream or request.wait:
            # Before it is queued: a refused caller may ask again.
            self.slots.check(caller)
        model = validate_model(request.model or (models[0] if models else None))
        pause = self._running.current_pause(model)
        if isinstance(request, Chat):
            request = replace(request, model=model)
            if pause and is_long_limit(pause, self.clock.now()):
                raise held_error("usage_limit", pause, self.clock.now())
        else:
            conversation = (request.conversation or "default") if is_stateful else None
            request = replace(request, model=model, conversation=conversation)
        try:
            result = self.stores.jobs.enqueue(caller.id, request, key)
        except QueueFull:
            if not pause:
                raise
            text = "Queue is full. " + pause_message(pause)
            raise retry_later(QueueFull, text, seconds_left(pause, self.clock.now())) from None
        self.notifier.notify(Notifier.JOB_QUEUED)
        return result

    def failure(self, job: Job) -> Optional[RunError]:
        """Return why a finished job has no answer, for a waiting caller; None if it has one."""
        if job.status != JobStatus.ERROR:
            return None
        return job_error(job, self._running.current_pause(job.model), self.clock.now())

    def poll(self, caller: Caller, job_id: str, wait: float = 0.0,
             client_disconnected: Callable[[], bool] = lambda: False) -> JobView:
        """Return a job, after at most `wait` seconds or when it is finished. Raises NotFound, also
        for another token's job; InvalidToken if the token is revoked meanwhile."""
        job = self.summary(caller, job_id)
        if wait and not job.is_finished:
            job = self._wait_until_finished(caller, job_id, wait, client_disconnected)
        live = self.live_of(job)
        view = self.view(self.full_job(caller, job_id) if job.is_finished else job)
        return view._replace(partial=live.read() if live else None)

    def _wait_until_finished(self, caller: Caller, job_id: str, wait: float,
                             client_disconnected: Callable[[], bool]) -> Job:
        deadline = self.clock.monotonic() + wait
        with self.slots.take(caller), self.notifier.subscribe(job_id) as event:
            while True:
                event.clear()
                job = self.summary(caller, job_id)
                seconds = deadline - self.clock.monotonic()
                if job.is_finished or seconds <= 0 or self.notifier.is_closed:
                    return job
                if client_disconnected():
                    return job
                # Nothing notifies of a revocation on the command line or of a lost client.
                event.wait(min(seconds, RECHECK_SECONDS))
                self.check_token(caller)

    def live_of(self, job: Job) -> Optional[LiveText]:
        """Return the text of a running job. A run that has just put its job back or ended it still
        has its text for a moment."""
        return self._running.live(job.id) if job.status == JobStatus.PROCESSING else None

    def is_live(self, job_id: str, live: LiveText) -> bool:
        """Return whether this is the text of the running job still."""
        return self._running.live(job_id) is live

    def view(self, job: Job) -> JobView:
        if job.status == JobStatus.QUEUED:
            # A turn waits for what the turn before it waits for.
            model = next_model(self.stores.database, job) if job.conversation else job.model
            pause = self._running.current_pause(model)
        else:
            live = self.live_of(job)
            pause = live.current_pause if live else None
        queue_position, overall_position = self.stores.jobs.queue_positions(job)
        return JobView(job, queue_position, overall_position, pause)

    def follow(self, caller: Caller, job_id: str, after: int = 0, position: int = 0,
               client_disconnected: Callable[[], bool] = lambda: False,
               has_parts: bool = False) -> JobEvents:
        """Yield the job's events live. after: how much of the text the caller has, in code points.
        position: the overall position that the caller knows. has_parts: with those of LiveParts.
        Ends after `completed` or `error`, when the client disconnects, or with the bridge. Raises
        NotFound and RateLimited at once; InvalidToken or NotFound later, if the token is revoked.
        """
        self.summary(caller, job_id)
        # The generator takes its slot at its first step.
        self.slots.check(caller)
        follower = JobFollower(self, caller, job_id, TextCursor(after, has_parts))
        return follower.events(position, client_disconnected)

    def cancel(self, caller: Caller, job_id: str) -> JobView:
        """Cancel a job; a running one ends within moments. Raises NotFound, AlreadyFinished."""
        job = self.summary(caller, job_id)
        text = "The request was cancelled."
        if not self.stores.jobs.fail(job, "cancelled", text, JobStatus.UNFINISHED):
            raise AlreadyFinished()
        self.notifier.notify(job_id)
        return self.view(self.full_job(caller, job_id))

    def jobs(self, caller: Caller, where: JobFilter = JobFilter(), before: Optional[int] = None,
             limit: int = 20) -> JobPage:
        """Return a page of the caller's jobs, for an admin of all, newest first."""
        if not caller.is_admin or where.conversation and not where.token_id:
            where = where._replace(token_id=caller.id)
        page = search_jobs(self.stores.jobs, where, before, limit)
        return page._replace(views=[self.view(job) for job in page.jobs])

    def job(self, caller: Caller, job_id: str) -> JobView:
        """Return a job with its prompt. Raises NotFound, also for another token's job."""
        return self.view(self.full_job(caller, job_id))

    def summary(self, caller: Caller, job_id: str) -> Job:
        return self._check_owner(caller, self.stores.jobs.summary(job_id))

    def full_job(self, caller: Caller, job_id: str) -> Job:
        return self._check_owner(caller, self.stores.jobs.get(job_id))

    def _check_owner(self, caller: Caller, job: Optional[Job]) -> Job:
        if job is None or not (caller.is_admin or job.token_id == caller.id):
            # A revoked token has no requests.
            self.check_token(caller)
            raise NotFound("Request not found")
        return job

    def is_own_unfinished(self, caller: Caller, job_id: str) -> bool:
        job = self.stores.jobs.summary(job_id)
        return job is not None and job.token_id == caller.id and not job.is_finished

    # --- conversations, models, tokens ---
    def delete_conversation(self, caller: Caller, name: str) -> None:
        """Make the next request start the conversation again. Raises NotFound."""
        name = replace_surrogates(name)
        sessions = self.stores.conversations.session_ids(caller.id, name)
        if not self.stores.conversations.delete(caller.id, name):
            raise NotFound("Conversation not found")
        if sessions:
            remove_sessions(self._data_dir, lambda session_id: session_id not in sessions)

    def models(self, caller: Caller) -> List[Model]:
        """Return the models that the caller may use. Raises Unavailable."""
        models = self._models.list() if self._models else ()
        if caller.models is None:
            return list(models)
        by_id = {model.id: model for model in models}
        return [by_id.get(model_id, Model(model_id, model_id)) for model_id in caller.models]

    def current_pause(self, model: Optional[str] = ALL_MODELS) -> Optional[Pause]:
        return self._running.current_pause(model)

    def set_paused(self, is_paused: bool) -> None:
        """Hold the queue, or let it go on. A running request continues. Raises Unavailable."""
        pause_queue(self.stores.database, is_paused)
        self.notifier.notify(Notifier.JOB_QUEUED)

    def create_token(self, new: NewToken, workspace: Optional[Path] = None) -> Tuple[Token, str]:
        """Create a token. -> (token, its secret, which is stored nowhere). A token with tools gets
        a workspace of its own, unless one is named. Raises TokenLimit."""
        secret = new_token()
        is_own = new.tools != Tools.NONE and workspace is None
        path = Path("workspaces", str(uuid.uuid4())) if is_own else workspace
        token = self.stores.tokens.add(new, secret, str(path) if path else None)
        if is_own and path:
            folder = private_directory(self._data_dir / path)
            token = replace(token, workspace=str(folder))
        return token, secret

    def update_token(self, token_id: str, body: Any) -> Tuple[Token, List[str]]:
        """Change what a body names of a TokenUpdate. -> (the token, warnings). Raises NotFound,
        InvalidRequest."""
        tokens = self.stores.tokens
        body = body if isinstance(body, dict) else {}
        update, warnings = TokenUpdate.parse({"name": tokens.require(token_id).name, **body})
        tokens.update(token_id, update.changes(body, self.clock.now()))
        return tokens.require(token_id), warnings

    def rotate_token(self, token_id: str) -> Tuple[Token, str]:
        """Give a token another secret. -> (the token, its secret). The old one is refused from now
        on. Raises NotFound."""
        secret = new_token()
        changes = {"prefix": secret[:12], "token_hash": digest(secret)}
        self.stores.tokens.update(token_id, changes)
        return self.stores.tokens.require(token_id), secret

    def revoke_token(self, token_id: str) -> None:
        """Delete a token with its requests; stop its running one. Raises NotFound, LastAdmin."""
        token_id = replace_surrogates(token_id)
        sessions = self.stores.conversations.session_ids(token_id)
        for job_id in self.stores.tokens.delete(token_id):
            self.notifier.notify(job_id)
        if sessions:
            remove_sessions(self._data_dir, lambda session_id: session_id not in sessions)


class JobFollower:
    """Follows a job for one reader, see Service.follow."""

    def __init__(self, service: Service, caller: Caller, job_id: str, cursor: TextCursor) -> None:
        self._service = service
        self._caller = caller
        self._job_id = job_id
        self._cursor = cursor
        self._monotonic = service.clock.monotonic
        # What the reader saw of the job's text while it ran.
        self._live: Optional[LiveText] = None

    def events(self, position: int, client_disconnected: Callable[[], bool]) -> JobEvents:
        service, job_id, cursor = self._service, self._job_id, self._cursor
        reported: Tuple[int, Optional[Pause]] = (position, None)
        last_sent_at = self._monotonic()
        topics = (job_id, Notifier.text_topic(job_id))
        with service.slots.take(self._caller), service.notifier.subscribe(*topics) as event:
            while True:
                # 1. Read the database: the notification carries no data.
                event.clear()
                recheck_at = self._monotonic() + RECHECK_SECONDS
                try:
                    view = service.view(service.summary(self._caller, job_id))
                finally:
                    # After the job, which is deleted together with its token.
                    service.check_token(self._caller)
                if view.job.is_finished:
                    yield from self._end(view.job)
                    return
                live = service.live_of(view.job)
                self._live = live or self._live
                events: List[JobEvent] = []
                state = (view.overall_position, view.pause)
                if view.job.status == JobStatus.QUEUED and state != reported:
                    reported = state
                    cursor.reset()
                    events = [JobEvent("queued")]
                elif live:
                    events = live.events_since(cursor)
                if not events and self._monotonic() - last_sent_at >= HEARTBEAT_SECONDS:
                    events = [JobEvent("heartbeat", cursor.offset)]
                # 2. The text, as long as it arrives. A slow reader may always find more of it, so
                # the database is read again in time.
                while True:
                    for job_event in events:
                        yield job_event, view if job_event.kind == "queued" else None
                        last_sent_at = self._monotonic()
                    if service.notifier.is_closed:
                        return
                    seconds = max(0.0, recheck_at - self._monotonic())
                    is_notified = len(events) == EVENT_BATCH or event.wait(seconds)
                    if self._monotonic() >= recheck_at:
                        break
                    event.clear()
                    events = []
                    if is_notified and live and service.is_live(job_id, live):
                        events = live.events_since(cursor)
                    if not events:
                        break
                if client_disconnected():
                    return

    def _end(self, job: Job) -> JobEvents:
        """Yield the rest of a finished job, and check the token of a slow reader in time."""
        service, recheck_at = self._service, self._monotonic() + RECHECK_SECONDS
        for event in self._final_events(job):
            view = None
            if event.kind in JobStatus.FINISHED:
                view = service.view(service.full_job(self._caller, job.id))
            yield event, view
            if self._monotonic() >= recheck_at:
                service.check_token(self._caller)
                recheck_at = self._monotonic() + RECHECK_SECONDS

    def _final_events(self, job: Job) -> Iterator[JobEvent]:
        """Yield the rest of the text, of which only a part is in memory at a time, and the end."""
        def read_from(offset: int) -> str:
            return self._service.stores.jobs.response(job.id, offset, TEXT_CHARACTERS)

        live, cursor = self._live, self._cursor
        if cursor.has_parts and live and live.generation == job.generation:
            # Only there are the parts of which the reader has not seen all.
            yield from chain.from_iterable(iter(lambda: live.events_since(cursor), []))
        if job.status == JobStatus.COMPLETED:
            yield from cursor.begin(job.generation, job.model)
            yield from cursor.read(read_from)
        yield JobEvent(job.status, cursor.offset)


# === 10 Native API ===============================================================================
# /api and the public pages: what a Route is, and one `handle_*` for each, which turns a request
# into a call of the service and a record into the body that old clients know. ROUTES: room 12.

# The largest answer that is cached until the database changes.
CACHED_RESPONSE_BYTES = 16_384


class AuthLevel:
    """Who may use a route."""
    NOTHING, TOKEN, ADMIN = "nothing", "token", "admin"


class Request(NamedTuple):
    """An HTTP request. headers: by lower-case names. address: of the peer. body: reads the body."""
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    address: str
    body: Callable[[], Union[bytes, SpooledBody]]
    client_disconnected: Callable[[], bool] = lambda: False
    # Gives back the place of a large body, once what was in it is stored.
    release_body: Callable[[], None] = lambda: None


BodyIterator = Generator[bytes, None, None]


class Response(NamedTuple):
    """An HTTP response. stream: in place of the body; each piece is sent as it comes."""
    status: int
    body: bytes = b""
    content_type: str = "application/json; charset=utf-8"
    headers: Tuple[Tuple[str, str], ...] = ()
    stream: Optional[BodyIterator] = None


class StatusSource(Protocol):
    """What the public pages and the admin's figures need beyond the service."""
    def page(self) -> Response:
        """Return the dashboard."""
    def details(self) -> Mapping[str, Any]:
        """Return what an admin sees in /api/status."""
    def check_worker(self) -> None:
        """Raise Unavailable if the worker has ended."""
    def metrics(self) -> str:
        """Return the text of /metrics."""
    def latency(self, owner: Optional[str]) -> Mapping[str, Any]:
        """Return percentiles of the last hour. owner: only this token's requests."""


class Context(NamedTuple):
    """A request with everything that a handler needs. path_params: such as {"requestId": ...}."""
    service: Service
    status: StatusSource
    caller: Optional[Caller]
    request: Request
    path_params: Mapping[str, str]

    @property
    def stores(self) -> Stores:
        return self.service.stores

    def body(self) -> Union[bytes, SpooledBody]:
        """Return the whole body. Raises InvalidToken if the token was revoked while it arrived."""
        data = self.request.body()
        if self.caller:
            self.service.check_token(self.caller)
        return data

    def json(self) -> Any:
        """Return the value in the body; {} without a body."""
        return parse_json(self.body() or b"{}")

    def require_caller(self) -> Caller:
        """Return the caller of a route that needs a token."""
        assert self.caller is not None
        return self.caller


@dataclass(frozen=True)
class Route:
    """One endpoint.
    responses: status -> (schema, example for people). The schema is a name of RESPONSE_EXAMPLES,
    "" for a text or a stream, None for an error.
    query: name -> (type, description). error_statuses: of its own errors.
    uses_poll_limiter: polls of a token's own unfinished requests have their own bucket."""
    method: str
    path: str
    auth: str
    handle: Callable[[Context], Response]
    doc: str
    body_type: Optional[Type[Command]] = None
    responses: Mapping[int, Tuple[Optional[str], str]] = field(default_factory=dict)
    query: Mapping[str, Tuple[str, str]] = field(default_factory=dict)
    error_statuses: Tuple[int, ...] = ()
    uses_poll_limiter: bool = False


def json_response(
        status: int, body: Mapping[str, Any], headers: Sequence[Tuple[str, str]] = ()) -> Response:
    return Response(status, as_json(body).encode("utf-8", "replace"), headers=tuple(headers))


# --- Server-Sent Events ---
def sse_event(kind: str, offset: Optional[int], data: Mapping[str, Any]) -> bytes:
    """Return one Server-Sent Event. kind: its name, "" for none. offset: becomes its id, None for
    none. Some readers split lines at characters that the standard does not; these are escaped."""
    line = as_json(data)
    for character in ("\x85", "\u2028", "\u2029"):
        line = line.replace(character, "\\u%04x" % ord(character))
    head = ("" if offset is None else "id: %d\n" % offset) + ("event: %s\n" % kind if kind else "")
    return ("%sdata: %s\n\n" % (head, line)).encode("utf-8", "replace")


HEARTBEAT = b": still here\n\n"


# All readers of an answer receive the same delta at about the same time.
@lru_cache(maxsize=16)
def delta_event(offset: int, text: str) -> bytes:
    return sse_event("delta", offset, {"text": text})


def stream_response(pieces: BodyIterator, headers: Sequence[Tuple[str, str]] = ()) -> Response:
    """Return Server-Sent Events that no proxy must buffer or compress."""
    no_buffering = (("Cache-Control", "no-store, no-transform"), ("X-Accel-Buffering", "no"))
    return Response(200, content_type="text/event-stream; charset=utf-8",
                    headers=(*no_buffering, *headers), stream=pieces)


def event_stream(job_id: str, events: JobEvents, first: bytes = b"") -> BodyIterator:
    """Yield a job's Server-Sent Events; an `error` without `status` if the token is revoked."""
    offset = 0
    try:
        if first:
            yield first
        for event, view in events:
            offset = event.offset
            if event.kind == "heartbeat":
                yield HEARTBEAT
            elif event.kind == "delta":
                yield delta_event(event.offset, event.text)
            elif event.kind == "started":
                body = without_none({"requestId": job_id, "model": event.model})
                yield sse_event("started", 0, body)
            elif view and event.kind == "queued":
                position = {"requestId": job_id, "position": view.overall_position}
                yield sse_event("queued", 0, {**position, **pause_body(view.pause)})
            elif view:
                yield sse_event(event.kind, event.offset, job_body(view))
    except Unavailable:
        # As if the connection broke: the reader comes back.
        return
    except BridgeError as error:
        yield sse_event("error", offset, {"requestId": job_id, **error_body(error)})


# --- bodies ---
def pause_body(pause: Optional[Pause]) -> Dict[str, Any]:
    return without_none({"waitingFor": pause.reason, "resumesAt": iso_time(pause.known_until)}
                        if pause else {})


def record_body(record: Union[Usage, Conversation, RateLimitWindow]) -> Dict[str, Any]:
    """Return a record under the names of the wire; times (`..._at`) as texts."""
    return {camel_case(name): iso_time(value) if name.endswith("_at") else value
            for name, value in record._asdict().items()}


def job_body(view: JobView) -> Dict[str, Any]:
    """Return the poll body: the original's keys first; those without a value are left out."""
    job = view.job
    body: Dict[str, Any] = {"status": job.status, "requestId": job.id}
    if not job.is_finished:
        body["queuePosition"] = view.queue_position
    if job.status == JobStatus.COMPLETED:
        body["response"] = job.response or ""
    if job.status == JobStatus.ERROR:
        body["error"] = job.error or ""
        body["errorCode"] = job.error_code
        body["advice"] = RUN_ADVICE.get(job.error_code or "")
    if job.is_finished:
        body["completedAt"] = iso_time(job.completed_at)
    body.update(model=job.model, conversation=job.conversation, createdAt=iso_time(job.created_at),
                startedAt=iso_time(job.started_at), attempts=job.attempts)
    if job.started_at and job.completed_at:
        body["durationMs"] = max(0, round((job.completed_at - job.started_at) * 1000))
    if job.structured is not None:
        body["structured"] = json.loads(job.structured)
    if job.usage:
        body["usage"] = record_body(job.usage)
    if job.stop_info and job.stop_info.reason == "max_tokens":
        body["stopReason"] = job.stop_info.reason
    body["partial"] = view.partial
    body.update(pause_body(view.pause))
    return without_none(body)


def listed_body(view: JobView) -> Dict[str, Any]:
    """Return the poll body with what was asked."""
    job = view.job
    return without_none({
        **job_body(view),
        "message": job.message, "tokenId": job.token_id,
        # That of a request of /v1 may be large.
        "systemPrompt": job.system_prompt and job.system_prompt[:SYSTEM_PROMPT_BYTES],
        "effort": job.effort, "api": job.api, "jsonSchema": json.loads(job.json_schema or "null"),
        "attachments": json.loads(job.attachments or "null")})


def token_body(token: Token, now: float) -> Dict[str, Any]:
    return {"id": token.id, "name": token.name, "prefix": token.prefix,
            "sessionMode": token.session_mode, "expiresAt": iso_time(token.expires_at),
            "createdAt": iso_time(token.created_at), "lastUsedAt": iso_time(token.last_used_at),
            "isAdmin": token.is_admin, "isExpired": token.is_expired(now), "tools": token.tools,
            "workspace": token.workspace, "requestsPerMinute": token.requests_per_minute,
            "requestsPerDay": token.requests_per_day, "models": token.models,
            "callbacks": token.callbacks}


def token_bodies(service: Service) -> List[Dict[str, Any]]:
    now = service.clock.now()
    return [token_body(token, now) for token in service.stores.tokens.list()]


def plan_body(
        windows: Iterable[RateLimitWindow], pause: Optional[Pause], now: float) -> Dict[str, Any]:
    """Return the limits of the plan. From its reset on, the state of a limit is unknown."""
    bodies = []
    is_using_overage = False
    for window in windows:
        if window.resets_at is not None and window.resets_at <= now:
            window = window._replace(status=None, utilization=None)
        if window.kind == "overage":
            is_using_overage = window.status == "in_use"
        else:
            body = record_body(window)
            bodies.append({"type": body.pop("kind"), **body})
    return {"windows": bodies, "isUsingOverage": is_using_overage, "waitingFor": None,
            "resumesAt": None, **pause_body(pause)}


def sums_body(rows: Sequence[DayUsage]) -> Dict[str, Any]:
    """Return the sums of several DayUsage."""
    usage = reduce(Usage.plus, (row.usage for row in rows), Usage())
    counts = {name: sum(getattr(row, name) for row in rows)
              for name in ("requests", "completed", "errors")}
    return {**counts, **usage_body(usage)}


def usage_body(usage: Usage) -> Dict[str, Any]:
    return record_body(usage._replace(cost_usd=round(usage.cost_usd, 8)))


def warnings_body(warnings: Sequence[str]) -> Dict[str, Any]:
    return {"warnings": warnings} if warnings else {}


# --- requests ---
def handle_ask(context: Context) -> Response:
    caller, request = context.require_caller(), context.request
    ask, warnings = Ask.parse(context.json())
    key = validate_idempotency_key(request.headers.get("idempotency-key"))
    job, position, is_new = context.service.ask(caller, ask, key)
    headers = () if is_new else (("Idempotent-Replayed", "true"),)
    more = warnings_body(warnings)
    if ask.stream:
        first = sse_event("queued", 0, {"requestId": job.id, "position": position, **more})
        events = context.service.follow(caller, job.id, 0, position, request.client_disconnected)
        return stream_response(event_stream(job.id, events, first), headers)
    if ask.wait:
        view = context.service.poll(caller, job.id, ask.wait, request.client_disconnected)
        if view.job.is_finished:
            return json_response(200, {**job_body(view), **more}, headers)
    return json_response(202, {"ok": True, "requestId": job.id, "position": position,
                               "poll": "GET /api/ask/" + job.id, **more}, headers)


def handle_poll(context: Context) -> Response:
    wait = validate_wait(context.request.query.get("wait"))
    caller, job_id = context.require_caller(), context.path_params["requestId"]
    cache = context.stores.database.read_cache()
    key = ("answer", caller.id, job_id)
    if key in cache:
        cached: Response = cache[key]
        return cached
    view = context.service.poll(caller, job_id, wait, context.request.client_disconnected)
    response = json_response(200 if view.job.is_finished else 202, job_body(view))
    if view.job.is_finished and len(response.body) <= CACHED_RESPONSE_BYTES:
        cache[key] = response
    return response


def handle_events(context: Context) -> Response:
    # The body is ignored, but an unread body would hide that the client disconnected.
    context.body()
    request, job_id = context.request, context.path_params["requestId"]
    after = request.headers.get("last-event-id") or request.query.get("after")
    events = context.service.follow(context.require_caller(), job_id, validate_offset(after) or 0,
                                    client_disconnected=request.client_disconnected)
    return stream_response(event_stream(job_id, events))


def handle_cancel(context: Context) -> Response:
    view = context.service.cancel(context.require_caller(), context.path_params["requestId"])
    return json_response(200, {"ok": True, **job_body(view)})


def handle_list_requests(context: Context) -> Response:
    caller, query = context.require_caller(), context.request.query
    limit = integer("limit", 1, PAGE_JOBS)(query.get("limit")) or 20
    before = integer("before", 1, 999_999_999)(query.get("before"))
    token_id = None
    if query.get("token"):
        tokens = context.stores.tokens.list() if caller.is_admin else [caller]
        token_id = find_token(tokens, query["token"]).id
    where = JobFilter(
        token_id, validate_statuses(query.get("status")), query.get("conversation") or None,
        query.get("q", ""), query.get("model", ""), query.get("error", ""),
        validate_since(query.get("since")))
    page = context.service.jobs(caller, where, before, limit)
    return json_response(200, {"requests": list(map(listed_body, page.views)),
                               "next": None if page.next is None else str(page.next),
                               "searchedTo": iso_time(page.searched_to)})


def handle_get_request(context: Context) -> Response:
    view = context.service.job(context.require_caller(), context.path_params["requestId"])
    return json_response(200, listed_body(view))


def handle_list_conversations(context: Context) -> Response:
    conversations = context.stores.conversations.list(context.require_caller().id)
    return json_response(200, {"conversations": list(map(record_body, conversations))})


def handle_delete_conversation(context: Context) -> Response:
    context.service.delete_conversation(context.require_caller(), context.path_params["name"])
    return json_response(200, {"ok": True, "message": "Conversation deleted"})


def handle_usage(context: Context) -> Response:
    """Return the caller's figures, for an admin those of all tokens."""
    caller, stores, now = context.require_caller(), context.stores, context.service.clock.now()
    days = integer("days", 1, USAGE_DAYS)(context.request.query.get("days")) or 30
    since = day_of(now - (days - 1) * 86_400)
    owner = None if caller.is_admin else caller.id
    rows = stores.usage.by_day(since, owner)
    by_day: Dict[str, List[DayUsage]] = {}
    by_token: Dict[str, List[DayUsage]] = {}
    for row in rows:
        by_day.setdefault(row.day, []).append(row)
        by_token.setdefault(row.token_id, []).append(row)
    names = {token.id: token.name for token in stores.tokens.list()}
    plan = plan_body(stores.usage.plan_limits(), context.service.current_pause(), now)
    body = {"since": since, "total": sums_body(rows),
            "days": [{"day": day, **sums_body(part)} for day, part in sorted(by_day.items())],
            "tokens": sorted(({"tokenId": token_id, "name": names.get(token_id), **sums_body(part)}
                              for token_id, part in by_token.items()), key=usage_rank),
            "models": sorted(({"model": model or None, "completed": completed, **usage_body(usage)}
                              for model, completed, usage in stores.usage.by_model(since, owner)),
                             key=usage_rank),
            "latency": context.status.latency(owner), "plan": plan}
    return json_response(200, body)


def usage_rank(body: Mapping[str, Any]) -> Tuple[float, int]:
    """Sort the largest usage first."""
    return -body["costUsd"], -body["inputTokens"] - body["outputTokens"]


# --- tokens ---
def new_token_body(token: Token, secret: str) -> Dict[str, Any]:
    return {"ok": True, "tokenId": token.id, "token": secret, "prefix": token.prefix,
            "warning": "Save this token now. It cannot be retrieved again."}


def handle_update_token(context: Context) -> Response:
    token, warnings = context.service.update_token(context.path_params["id"], context.json())
    body = {"ok": True, **token_body(token, context.service.clock.now()), **warnings_body(warnings)}
    return json_response(200, body)


def handle_rotate_token(context: Context) -> Response:
    # It is ignored.
    context.body()
    token_id = context.stores.tokens.require(context.path_params["id"]).id
    return json_response(200, new_token_body(*context.service.rotate_token(token_id)))


def handle_create_token(context: Context) -> Response:
    new, warnings = NewToken.parse(context.json())
    token, secret = context.service.create_token(new)
    body = {**new_token_body(token, secret), **warnings_body(warnings)}
    if token.callbacks:
        body["callbackSecret"] = context.stores.tokens.callback_secret(token.id)
    return json_response(201, body)


def handle_list_tokens(context: Context) -> Response:
    return json_response(200, {"tokens": token_bodies(context.service)})


def handle_revoke_token(context: Context) -> Response:
    context.service.revoke_token(context.path_params["id"])
    return json_response(200, {"ok": True, "message": "Token revoked"})


# --- status and pages ---
def set_paused(context: Context, is_paused: bool) -> Response:
    # It is ignored.
    context.body()
    context.service.set_paused(is_paused)
    return json_response(200, {"ok": True, **pause_body(context.service.current_pause())})


def handle_status(context: Context) -> Response:
    counts = context.stores.jobs.counts()
    queued = counts.get(JobStatus.QUEUED, 0)
    processing = counts.get(JobStatus.PROCESSING, 0)
    stats = {
        "totalTokens": context.stores.tokens.count(), "totalRequests": sum(counts.values()),
        "completedRequests": counts.get(JobStatus.COMPLETED, 0),
        "errorRequests": counts.get(JobStatus.ERROR, 0), "queuedRequests": queued}
    is_admin = context.caller and context.caller.is_admin
    return json_response(200, {
        "status": "running", "version": __version__,
        "queue": {"isProcessing": bool(processing), "length": queued + processing,
                  **pause_body(context.service.current_pause())},
        "stats": stats, **(context.status.details() if is_admin else {})})


def handle_health(context: Context) -> Response:
    context.status.check_worker()
    context.stores.database.check_writable()
    pause, advice = outage(context.service.current_pause())
    # Not 503: the bridge accepts requests, and a restart would not help.
    status = {"status": "degraded" if pause else "ok", **pause_body(pause)}
    return json_response(200, without_none({**status, "advice": advice}))


def handle_metrics(context: Context) -> Response:
    content_type = "text/plain; version=0.0.4; charset=utf-8"
    return Response(200, context.status.metrics().encode(), content_type)


# --- callbacks ---
# Source: github.com/standard-webhooks/standard-webhooks, spec/standard-webhooks.md, version 1.0.0.
# Seconds before the second attempt, the third, ...; the last one begins after 31.6 hours.
CALLBACK_DELAYS = (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400)
CALLBACK_SECONDS = 15.0
# Of the head of the receiver's answer; its body is not read.
CALLBACK_ANSWER_BYTES = 16_384
CALLBACK_POLL_SECONDS = 1.0
# Most attempts at the same time; an answer may have 10 MB.
CALLBACK_THREADS = 4
# For attempts to end when the bridge stops.
CLOSE_CALLBACKS_SECONDS = 1.0
INTERIM_ANSWER_RE = re.compile(rb"\A(?:HTTP/1\.1 1\d\d[^\n]*\n(?:[^\r\n][^\n]*\n)*\r?\n)+")
ANSWER_STATUS_RE = re.compile(rb"HTTP/1\.[01] ([2-9]\d\d)[ \r\n]")
RETRY_AFTER_RE = re.compile(rb"\nretry-after:[ \t]*(\d{1,9})[ \t]*\r?\n", re.IGNORECASE)
HEAD_END_RE = re.compile(rb"\n\r?\n")


def sign_callback(secret: str, message_id: str, timestamp: int, body: bytes) -> str:
    """Return the value of Webhook-Signature. timestamp: of this attempt, epoch seconds."""
    key = base64.b64decode(secret[len(SECRET_PREFIX) :])
    content = b"%s.%d.%s" % (message_id.encode(), timestamp, body)
    return "v1," + base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()


def callback_delay(attempts: int, retry_after: int = 0) -> Optional[float]:
    """Return the seconds to wait after so many failed attempts; None after the last one.
    retry_after: the receiver's wish; it only makes the delay longer."""
    if attempts > len(CALLBACK_DELAYS):
        return None
    seconds = max(CALLBACK_DELAYS[attempts - 1], min(retry_after, CALLBACK_DELAYS[-1]))
    return seconds * random.uniform(1.0, 1.1)


def send_callback(url: CallbackUrl, headers: Mapping[str, str], body: bytes, allow_private: bool,
                  timeout: float) -> Tuple[int, int]:
    """Send one attempt, without redirects and proxies. -> (status, seconds of Retry-After or 0).
    The connection goes to the very address that was checked. Not http.client, which has no deadline
    for a whole answer. timeout: seconds for all but the look-up of the name. Raises OSError."""
    results = socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
    addresses = [(family, address) for family, _, _, _, address in results
                 if is_allowed_address(ipaddress.ip_address(address[0]), allow_private)]
    if not addresses:
        raise PermissionError("its host has no address that is allowed")
    deadline = Clock.monotonic() + timeout
    all_headers = {"Host": url.authority, "User-Agent": "claude-api-bridge", **headers,
                   "Content-Type": "application/json", "Content-Length": str(len(body)),
                   "Connection": "close"}
    head = "".join("%s: %s\r\n" % item for item in all_headers.items())
    with contextlib.closing(connect_callback(addresses, url, deadline)) as connection:
        # A receiver may answer and close before it has read everything.
        with contextlib.suppress(ConnectionError):
            connection.settimeout(seconds_until(deadline))
            request = "POST %s HTTP/1.1\r\n%s\r\n" % (url.target, head)
            # A small body in the same packet, a large one without another copy.
            connection.sendall(request.encode("ascii") + body[:LARGE_BYTES])
            connection.sendall(memoryview(body)[LARGE_BYTES:])
        return read_callback_answer(connection, deadline)


def seconds_until(deadline: float) -> float:
    seconds = deadline - Clock.monotonic()
    if seconds <= 0:
        raise socket.timeout("the receiver did not answer in time")
    return seconds


def connect_callback(addresses: Sequence[Tuple[Any, Any]], url: CallbackUrl,
                     deadline: float) -> socket.socket:
    """Connect to the first address that accepts. Each gets an equal share of the time."""
    import ssl
    for number, (family, address) in enumerate(addresses):
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(seconds_until(deadline) / (len(addresses) - number))
            connection.connect(address)
            connection.settimeout(seconds_until(deadline))
            if not url.is_https:
                return connection
            context = ssl.create_default_context()
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            return context.wrap_socket(connection, server_hostname=url.host)
        except OSError:
            connection.close()
            if number + 1 == len(addresses):
                raise
    raise AssertionError("unreachable")


def read_callback_answer(connection: socket.socket, deadline: float) -> Tuple[int, int]:
    """Return (status, seconds of Retry-After or 0). Raises OSError."""
    head = b""
    while len(head) < CALLBACK_ANSWER_BYTES:
        connection.settimeout(seconds_until(deadline))
        data = connection.recv(4_096)
        head = INTERIM_ANSWER_RE.sub(b"", head + data)
        if not data or HEAD_END_RE.search(head):
            break
    status = ANSWER_STATUS_RE.match(head)
    if not status:
        raise ConnectionError("the receiver did not answer with HTTP")
    retry_after = RETRY_AFTER_RE.search(HEAD_END_RE.split(head)[0] + b"\n")
    return int(status.group(1)), int(retry_after.group(1)) if retry_after else 0


class CallbackSender:
    """Sends results to the addresses that clients named: those of one token one after the other, so
    that a silent receiver delays no other token. Owns the thread "callbacks", which starts more."""

    def __init__(self, stores: Stores, metrics: Metrics) -> None:
        self._stores = stores
        self._metrics = metrics
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="callbacks", daemon=True)
        # Set by the end of an attempt.
        self._wake = threading.Event()
        # By token: the thread of an attempt, and the start of the last one.
        self._senders: Dict[str, threading.Thread] = {}
        self._sent_at: Dict[str, float] = {}

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop; an attempt that is cut counts as a failed one. Idempotent."""
        self._stopping.set()
        self._wake.set()
        stop_at = Clock.monotonic() + CLOSE_CALLBACKS_SECONDS
        for thread in (self._thread, *self._senders.copy().values()):
            if thread.ident:
                thread.join(max(0.0, stop_at - Clock.monotonic()))

    def _loop(self) -> None:
        while not self._stopping.is_set():
            self._wake.wait(CALLBACK_POLL_SECONDS)
            self._wake.clear()
            try:
                ids = [callback.token_id for callback in self._due()]
                self._sent_at = {token_id: self._sent_at.get(token_id, 0.0) for token_id in ids}
                for token_id in ids:
                    self._start_sender(token_id)
            except (Unavailable, RuntimeError):
                # Without the database, or without a thread, it is sent a second later.
                continue
            except Exception:
                logger.exception("The callbacks failed.")

    def _start_sender(self, token_id: str) -> None:
        if self._stopping.is_set() or token_id in self._senders or (
                len(self._senders) >= CALLBACK_THREADS):
            return
        sender = threading.Thread(
            target=self._send_one, args=(token_id,), name="callback", daemon=True)
        self._sent_at[token_id] = Clock.monotonic()
        self._senders[token_id] = sender
        try:
            sender.start()
        except RuntimeError:
            del self._senders[token_id]
            raise

    def _send_one(self, token_id: str) -> None:
        is_sent = False
        try:
            # With a locked database or a full disk it is sent later, perhaps again.
            with contextlib.suppress(Unavailable):
                is_sent = self.step(token_id)
        except Exception:
            logger.exception("A callback failed.")
        finally:
            del self._senders[token_id]
        if is_sent:
            self._wake.set()

    def _due(self) -> List[Callback]:
        """Return one callback of each token, first that of the token which waits longest."""
        next_at = self._stores.callbacks.next_at()
        if next_at is None or next_at > self._stores.database.clock.now():
            return []
        due = self._stores.callbacks.due()
        return sorted(due, key=lambda callback: self._sent_at.get(callback.token_id, 0.0))

    def step(self, token_id: Optional[str] = None) -> bool:
        """Send what is due longest, of one token or of all. -> whether there was something."""
        callback = next((callback for callback in self._due()
                         if token_id in (None, callback.token_id)), None)
        body = self._body(callback) if callback else None
        if not callback or not body:
            return False
        # Stored before it is sent: with a full disk it would be sent again and again.
        provisional = callback_delay(callback.attempts + 1) or CALLBACK_DELAYS[-1]
        if not self._stores.callbacks.retry(callback, provisional):
            return True
        delay, result = self._send(callback, body)
        self._stores.callbacks.retry(callback, delay)
        self._metrics.inc("cab_callbacks_total", result=result)
        return True

    def _body(self, callback: Callback) -> Optional[bytes]:
        job = self._stores.jobs.get(callback.job_id)
        return as_json(job_body(JobView(job, 0, 0))).encode() if job else None

    def _send(self, callback: Callback, body: bytes) -> Tuple[Optional[float], str]:
        """Make one attempt. -> (seconds until the next one, None for no more; its result)."""
        retry_after = 0
        attempts = callback.attempts + 1
        timestamp = int(self._stores.database.clock.now())
        headers = {
            "Webhook-Id": callback.job_id, "Webhook-Timestamp": str(timestamp),
            "Webhook-Signature": sign_callback(callback.secret, callback.job_id, timestamp, body)}
        try:
            url, allow_private = check_callback(callback.url, callback.callbacks)
            status, retry_after = send_callback(url, headers, body, allow_private, CALLBACK_SECONDS)
            if 200 <= status < 300:
                return None, "delivered"
            reason = "status %d" % status
            if status == 410:
                # The receiver wants no more.
                attempts = len(CALLBACK_DELAYS) + 1
        except (OSError, UnicodeError, InvalidRequest) as error:
            reason = str(getattr(error, "strerror", None) or error)
        delay = callback_delay(attempts, retry_after)
        logger.warning("The callback of request %s failed (attempt %d): %s", callback.job_id[:8],
                       attempts, escape_controls(reason[:200]))
        return delay, "given_up" if delay is None else "failed"


# === 11 OpenAI and Anthropic APIs ================================================================
# The wire formats of /v1. All are read into a Chat, whose turns hold blocks of the Messages API,
# and written from a Job and its steps. `path` is the place of a value in the body, such as
# messages.0.content; an error names it.

MAX_CLIENT_TOOLS = 256
STOP_SEQUENCES = 16
BLOCKS = {"user": ("text", "image", "document", "tool_result"),
          "assistant": ("text", "tool_use", *THOUGHTS)}
# Changes of the tools, which are all offered from the beginning.
IGNORED_BLOCKS = ("tool_addition", "tool_removal")
SERVER_RESULTS = tuple(name + "_tool_result" for name in (
    "web_search", "web_fetch", "code_execution", "bash_code_execution",
    "text_editor_code_execution", "tool_search", "mcp", "advisor"))
SOURCES = {"base64": ("media_type", "data"), "url": ("url",), "text": ("media_type", "data")}
# Together with TOOL_PREFIX at most the 128 characters of the API.
TOOL_NAME_CHARACTERS = 118
CALL_ID_CHARACTERS = 128
FOREIGN_MODEL_RE = re.compile(r"(gpt|chatgpt|codex|o[1-9])([-.\d].*)?", re.IGNORECASE)
TYPE_NAMES: Mapping[Any, str] = {
    str: "a string", list: "a list", dict: "an object", bool: "true or false"}


# --- reading: values ---
def invalid_value(path: str, text: str) -> InvalidRequest:
    return InvalidRequest("%s: %s" % (path, text), field=path)


def require_type(value: Any, kind: Type[Any], path: str) -> Any:
    """Return a value that must be a str, list, dict or bool. Raises InvalidRequest."""
    if not isinstance(value, kind):
        raise invalid_value(path, "must be %s" % TYPE_NAMES[kind])
    return replace_surrogates(value) if kind is str else value


def optional(value: Any, kind: Type[Any], path: str) -> Any:
    """Return a value of this type; an empty one for a missing or empty value."""
    return require_type(value or kind(), kind, path)


def shorten(text: Any) -> str:
    """Return a value of the client for an error."""
    return replace_surrogates(str(text))[:100]


def with_path(validate: Validator, value: Any, path: str) -> Any:
    """Return a value by a validator; its error names the path."""
    try:
        return validate(value)
    except InvalidRequest as error:
        raise invalid_value(path, str(error)) from None


# --- reading: turns ---
def read_source(source: Any, path: str) -> Dict[str, Any]:
    """Return the source of an image or a document."""
    source = require_type(source, dict, path)
    kind = require_type(source.get("type"), str, path + ".type")
    if kind not in SOURCES:
        raise invalid_value(
            path + ".type",
            "must be one of: %s; files that were uploaded elsewhere cannot be read here"
            % ", ".join(SOURCES))
    values = {key: require_type(source.get(key), str, path + "." + key) for key in SOURCES[kind]}
    return {"type": kind, **values}


def read_block(block: Any, kinds: Sequence[str], path: str) -> Dict[str, Any]:
    """Return one block with its known keys only. The CLI sets its own `cache_control`, of which
    there can be only four."""
    kind = require_type(block, dict, path).get("type")
    if kind not in kinds:
        raise invalid_value(path + ".type", "must be one of: %s" % ", ".join(kinds))
    if kind == "text":
        return {"type": kind, "text": require_type(block.get("text"), str, path + ".text")}
    if kind in ("image", "document"):
        result = {"type": kind, "source": read_source(block.get("source"), path + ".source")}
        for key in ("title", "context"):
            if block.get(key):
                result[key] = require_type(block[key], str, path + "." + key)
        return result
    if kind == "tool_use":
        return {
            "type": kind, "id": read_word(block.get("id"), CALL_ID_CHARACTERS, path + ".id"),
            "name": read_word(block.get("name"), TOOL_NAME_CHARACTERS, path + ".name"),
            "input": require_type(block.get("input"), dict, path + ".input")}
    if kind in THOUGHTS:
        names = ("thinking", "signature") if kind == "thinking" else ("data",)
        return {"type": kind, **{name: require_type(block.get(name), str, "%s.%s" % (path, name))
                                 for name in names}}
    kinds = ("text", "image", "document")
    content = read_content(block.get("content") or "", kinds, path + ".content")
    call_id = read_word(block.get("tool_use_id"), CALL_ID_CHARACTERS, path + ".tool_use_id")
    result = {"type": kind, "tool_use_id": call_id, "content": content or "(no result)"}
    if block.get("is_error"):
        result["is_error"] = True
    return result


def read_content(content: Any, kinds: Sequence[str], path: str) -> List[Dict[str, Any]]:
    """Return a text or a list of blocks as blocks; without blank texts, which the API refuses."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    result = []
    for number, block in enumerate(require_type(content, list, path)):
        if isinstance(block, dict) and block.get("type") in IGNORED_BLOCKS:
            continue
        for part in plain_blocks(block):
            part = read_block(part, kinds, "%s.%d" % (path, number))
            if part["type"] != "text" or part["text"].strip():
                result.append(part)
    return result


def plain_blocks(block: Any) -> List[Any]:
    """Return a block that the CLI does not take as blocks that it does take."""
    kind = block.get("type") if isinstance(block, dict) else None
    if kind in THOUGHTS and not (block.get("signature") or isinstance(block.get("data"), str)):
        # Of another server.
        return []
    source = block.get("source") if kind in ("document", "search_result") else None
    head: List[Any] = [text_block(str(block[key])) for key in ("title", "context")
                       if source and block.get(key)]
    if kind == "search_result":
        content = optional(block.get("content"), list, "search_result.content")
        return [*head, text_block("(%s)" % source), *content]
    if isinstance(source, dict) and source.get("type") == "content":
        content = source.get("content")
        if isinstance(content, str):
            content = [text_block(content)]
        return [*head, *optional(content, list, "document.source.content")]
    if kind == "tool_reference":
        return [text_block("The tool %s can be used." % block.get("tool_name"))]
    if kind == "server_tool_use" or kind in SERVER_RESULTS:
        # What another server's tools did. What is encrypted means nothing here.
        rest = {name: value for name, value in block.items()
                if name not in ("type", "id", "tool_use_id", "cache_control")}
        text = re.sub(r'"encrypted_\w+": ?"[^"]*",? ?', "", as_json(rest))
        return [text_block("(%s: %s)" % (kind, text))]
    return [block]


def read_word(value: Any, longest: int, path: str) -> str:
    """Return the name of a tool or the id of a call, as the API takes it: with other characters, or
    longer, it is replaced by a word that is the same each time."""
    word = require_type(value, str, path)
    if re.fullmatch("[A-Za-z0-9_-]{1,%d}" % longest, word):
        return str(word)
    if not word.strip() or not word.isprintable() or len(word) > 1_000:
        raise invalid_value(path, "must be 1 to 1000 printable characters")
    return "%s_%s" % (re.sub("[^A-Za-z0-9_-]", "_", word)[: longest - 17], digest(word)[:16])


def text_block(text: str) -> Dict[str, Any]:
    return {"type": "text", "text": text}


def read_turns(messages: Iterable[Tuple[str, str, Any]],
               blank: str = "") -> Tuple[Tuple[Mapping[str, Any], ...], Tuple[Block, ...]]:
    """Return Chat.turns and Chat.prefill. messages: (path, role, content) of each message. blank:
    stands for a user's empty message, which is refused without it."""
    turns: List[Dict[str, Any]] = []
    for path, role, content in messages:
        blocks = read_content(content, BLOCKS[role], path + ".content")
        if not blocks and role == "user":
            if not blank:
                raise invalid_value(path + ".content", "must not be blank")
            blocks = [text_block(blank)]
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
            continue
        if not turns and role == "assistant":
            opening = [text_block("(The conversation begins.)")]
            turns.append({"role": "user", "content": opening})
        turns.append({"role": role, "content": blocks})
    silent = [turn for turn in turns if all(b["type"] in THOUGHTS for b in turn["content"])]
    if len(turns) > 1 and turns[-1] in silent:
        # The beginning of an answer that is empty.
        turns.pop()
    for turn in silent:
        turn["content"].append(text_block(NO_ANSWER))
    prefill: List[Block] = []
    if turns and turns[-1]["role"] == "assistant":
        prefill = turns.pop()["content"]
        if any(block["type"] == "tool_use" for block in prefill):
            raise invalid_value("messages", "must end with the results of the tool calls")
    if not turns:
        raise invalid_value("messages", "at least one message is required")
    previous: Mapping[str, Any] = {"content": []}
    used_ids: Set[str] = set()
    for turn in turns:
        order_tool_results(previous, turn)
        rename_repeated_calls(previous, turn, used_ids)
        previous = turn
    return tuple(turns), tuple(prefill)


def rename_repeated_calls(previous: Mapping[str, Any], turn: Dict[str, Any],
                          used_ids: Set[str]) -> None:
    """Make ids of calls unique: some clients count them again in each answer, and the CLI drops the
    results of a repeated one. turn: with results; previous: with their calls."""
    names = {}
    calls = [block for block in previous["content"] if block["type"] == "tool_use"]
    for block in calls:
        if block["id"] in names:
            raise invalid_value("messages", "the tool call %s is repeated" % block["id"])
        number = len(used_ids)
        names[block["id"]] = block["id"]
        while names[block["id"]] in used_ids:
            number += 1
            names[block["id"]] = "%s_%d" % (block["id"][:100], number)
        used_ids.add(names[block["id"]])
        block["id"] = names[block["id"]]
    for block in turn["content"]:
        if block["type"] == "tool_result":
            block["tool_use_id"] = names[block["tool_use_id"]]


def order_tool_results(previous: Mapping[str, Any], turn: Dict[str, Any]) -> None:
    """Check that the turn has one result for each call of the previous turn; put results first."""
    calls = {block["id"] for block in previous["content"] if block["type"] == "tool_use"}
    results = [block for block in turn["content"] if block["type"] == "tool_result"]
    answered = {block["tool_use_id"] for block in results}
    if calls - answered:
        missing = ", ".join(sorted(calls - answered))
        text = "the tool calls %s have no results in the next message" % missing
        raise invalid_value("messages", text)
    if answered - calls or len(results) > len(answered):
        extra = ", ".join(sorted(answered - calls or answered))
        text = "the tool results %s do not belong to one tool call each of the message before"
        raise invalid_value("messages", text % extra)
    others = [block for block in turn["content"] if block["type"] != "tool_result"]
    turn["content"] = results + others


# --- reading: tools and options ---
def read_client_tools(tools: Iterable[Tuple[str, Any, Any, Any]]) -> Tuple[Mapping[str, Any], ...]:
    """Return Chat.client_tools. tools: (path, name, description, schema) of each."""
    result: Dict[str, Dict[str, Any]] = {}
    for path, name, description, schema in tools:
        own_name = name
        name = read_word(name, TOOL_NAME_CHARACTERS, path + ".name")
        if name in result:
            raise invalid_value(path + ".name", "is duplicated")
        schema = object_schema({} if schema is None or schema is True else schema)
        if not schema:
            raise invalid_value(path, "the schema of its input must be that of an object")
        result[name] = {
            "name": name, "description": optional(description, str, path + ".description"),
            "inputSchema": schema, **({"title": own_name} if name != own_name else {})}
    if len(result) > MAX_CLIENT_TOOLS:
        raise invalid_value("tools", "at most %d are possible" % MAX_CLIENT_TOOLS)
    return tuple(result.values())


def object_schema(schema: Any) -> Dict[str, Any]:
    """Return a schema of an object in the form that MCP takes; empty if it is none. There, the
    type is a word, and each property has an object."""
    kinds = schema.get("type") or "object" if isinstance(schema, dict) else None
    if "object" not in (kinds if isinstance(kinds, list) else [kinds]):
        return {}
    result = {"type": "object", **schema}
    if isinstance(kinds, list) or not schema.get("type"):
        result["type"] = "object"
    # null stands for a part that is not given.
    parts = {name: result.pop(name, None) for name in ("properties", "required")}
    properties, required = ({} if parts["properties"] is None else parts["properties"],
                            [] if parts["required"] is None else parts["required"])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return {}
    booleans: Dict[bool, Any] = {True: {}, False: {"not": {}}}
    properties = {name: booleans[value] if isinstance(value, bool) else value
                  for name, value in properties.items()}
    if not all(isinstance(value, dict) for value in properties.values()):
        return {}
    required = [name for name in required if isinstance(name, str)]
    return {**result, **({"properties": properties} if properties else {}),
            **({"required": required} if required else {})}


def read_stop_sequences(value: Any, path: str) -> Tuple[str, ...]:
    texts = [value] if isinstance(value, str) else optional(value, list, path)
    is_valid = all(isinstance(text, str) and 0 < len(text) <= 1000 for text in texts)
    if len(texts) > STOP_SEQUENCES or not is_valid:
        text = "must be at most %d texts of 1 to 1000 characters" % STOP_SEQUENCES
        raise invalid_value(path, text)
    return tuple(map(replace_surrogates, texts))


def read_schema(value: Any, path: str) -> Optional[str]:
    """Return the schema in {"type": "json_schema", "schema": {...}}."""
    if value is None:
        return None
    if require_type(value, dict, path).get("type") != "json_schema":
        raise invalid_value(path + ".type", "must be json_schema")
    schema = require_type(value.get("schema"), dict, path + ".schema")
    return read_object_schema(schema, path + ".schema")


def read_object_schema(value: Any, path: str) -> str:
    """Return a JSON Schema of an object as JSON."""
    return str(with_path(validate_schema, value, path))


def read_max_tokens(value: Any, path: str) -> Optional[int]:
    """Return how long an answer may be; None for no limit."""
    if value is None or value == 0:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise invalid_value(path, "must be a whole number")
    return value


def read_thinking(value: Any, path: str) -> Optional[str]:
    """Return Chat.thinking of a `thinking` of the Messages API."""
    kinds = {"enabled": SHOWN, "adaptive": SHOWN, "disabled": OFF}
    kind = optional(value, dict, path).get("type")
    if value and (not isinstance(kind, str) or kind not in kinds):
        raise invalid_value(path + ".type", "must be enabled, adaptive or disabled")
    return kinds[kind] if value else None


def read_effort(value: Any, efforts: Sequence[str], path: str) -> Optional[str]:
    validate = one_of(efforts, "must be one of: " + ", ".join(efforts))
    effort: Optional[str] = with_path(validate, value, path)
    return effort


class ToolChoice(NamedTuple):
    """Which tools are called. kind: auto, any, none, or tool (the named one). allowed: the names
    of those that are offered; None for all."""
    kind: str
    name: Optional[str] = None
    is_single: bool = False
    allowed: Optional[Sequence[str]] = None


def own_name_of(tool: Mapping[str, Any]) -> str:
    """Return the client's name of its tool."""
    return str(tool.get("title", tool["name"]))


def with_choice(chat: Chat, choice: ToolChoice) -> Chat:
    """Apply a choice of tools, as far as the CLI can be made to follow it.
    If one tool must be called, its input is the answer, which the CLI enforces. Any other choice
    becomes an instruction to the model."""
    if choice.allowed is not None:
        missing = set(choice.allowed) - set(map(own_name_of, chat.client_tools))
        if missing:
            raise invalid_value("tool_choice", "there is no tool %s" % min(missing))
        tools_left = [tool for tool in chat.client_tools if own_name_of(tool) in choice.allowed]
        chat = replace(chat, client_tools=tuple(tools_left))
    if choice.kind == "none" or not chat.client_tools:
        if choice.kind in ("any", "tool"):
            raise invalid_value("tool_choice", "needs tools")
        return replace(chat, client_tools=())
    tools = {own_name_of(tool): tool for tool in chat.client_tools}
    forced: Optional[Mapping[str, Any]] = None
    if choice.kind == "tool":
        if not isinstance(choice.name, str) or choice.name not in tools:
            name = replace_surrogates(str(choice.name))[:100]
            raise invalid_value("tool_choice", "there is no tool %s" % name)
        forced = tools[choice.name]
    elif choice.kind == "any" and len(tools) == 1:
        forced = chat.client_tools[0]
    prompt = chat.system_prompt or SYSTEM_PROMPT
    if forced:
        instruction = "Answer with the input for the tool %s. %s"
        return replace(
            chat, client_tools=(), forced_tool=own_name_of(forced),
            json_schema=replace_surrogates(as_json(forced["inputSchema"])),
            system_prompt="%s\n\n%s"
            % (prompt, instruction % (forced["name"], forced["description"])))
    instructions = []
    if choice.kind == "any":
        instructions.append("Answer with a call of at least one of the tools.")
    if choice.is_single:
        instructions.append("Call at most one tool at a time.")
    if not instructions:
        return chat
    return replace(chat, system_prompt="\n\n".join([prompt, *instructions]))


# --- reading: the Anthropic Messages API ---
def added_tools(content: Any) -> List[Any]:
    """Return the tools that blocks of a system message define."""
    blocks = content if isinstance(content, list) else []
    changes = [block.get("tool") for block in blocks
               if isinstance(block, dict) and block.get("type") == "tool_addition"]
    return [change["definition"] for change in changes
            if isinstance(change, dict) and isinstance(change.get("definition"), dict)]


def commands_schema(commands: str, words: str, numbers: str = "") -> Dict[str, Any]:
    """Return the schema of a tool with several commands, whose parameters are texts or numbers."""
    properties: Dict[str, Any] = {"command": {"type": "string", "enum": commands.split()}}
    properties.update({name: {"type": "string"} for name in words.split()})
    properties.update({name: {"type": "integer"} for name in numbers.split()})
    lines = {"type": "array", "items": {"type": "integer"}, "description": "first and last line"}
    return {"type": "object", "properties": {**properties, "view_range": lines},
            "required": ["command"]}


# Tools that the client runs, of which it sends only the type. Source: the Messages API.
TYPED_TOOLS = {
    "bash": (
        "Runs a command in a shell that stays open, or starts the shell again.",
        {"type": "object", "properties": {
            "command": {"type": "string"}, "restart": {"type": "boolean"}}}),
    "text_editor": (
        "Shows and changes text files. view: path, view_range; create: path, file_text;"
        " str_replace: path, old_str (occurs once), new_str; insert: path, insert_line (after it),"
        " insert_text.",
        commands_schema("view create str_replace insert",
                        "path file_text old_str new_str insert_text", "insert_line")),
    "memory": (
        "Keeps notes for later conversations in files below /memories. view: path, view_range;"
        " create: path, file_text; str_replace: path, old_str, new_str; insert: path, insert_line,"
        " insert_text; delete: path; rename: old_path, new_path. View /memories first.",
        commands_schema("view create str_replace insert delete rename",
                        "path file_text old_str new_str insert_text old_path new_path",
                        "insert_line"))}


def read_message_tools(
        tools: Sequence[Any]) -> Tuple[Tuple[Mapping[str, Any], ...], Tuple[str, ...]]:
    """Return Chat.client_tools and Chat.hosted_tools."""
    own, hosted = [], []
    for number, tool in enumerate(tools):
        path = "tools.%d" % number
        kind = require_type(tool, dict, path).get("type")
        kind = "custom" if kind is None else require_type(kind, str, path + ".type")
        name, _, version = kind.rpartition("_")
        if kind == "custom":
            own.append((path, tool.get("name"), tool.get("description"), tool.get("input_schema")))
        elif name in TYPED_TOOLS and version.isdigit():
            own.append((path, tool.get("name"), *TYPED_TOOLS[name]))
        elif name in ("web_search", "web_fetch"):
            hosted.append(name)
        # No tool is deferred, so that there is nothing to search.
        elif not name.startswith("tool_search_tool"):
            raise invalid_value(path + ".type", "the tool %s would have to run on the server: only"
                                " tools that the client runs are possible here" % kind[:64])
    return read_client_tools(own), tuple(hosted)


def read_messages_request(body: Any) -> Chat:
    """Return the Chat of a request of the Messages API. Raises InvalidRequest."""
    body = require_type(body, dict, "body")
    if body.get("thread") is not None:
        # With this code the SDK sends the whole conversation instead.
        # Source: anthropic 2.14.0, @anthropic-ai/sdk 1.14.0.
        details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        raise InvalidRequest("thread: no conversation is stored here; send all of its messages",
                             field="thread", details=details)
    system = read_content(body.get("system") or "", ("text",), "system")
    messages = []
    tools: List[Any] = list(optional(body.get("tools"), list, "tools"))
    for number, message in enumerate(require_type(body.get("messages"), list, "messages")):
        path = "messages.%d" % number
        role = require_type(message, dict, path).get("role")
        if role == "system":
            system += read_content(message.get("content"), ("text",), path + ".content")
            names = [tool.get("name") for tool in tools if isinstance(tool, dict)]
            tools += [tool for tool in added_tools(message.get("content"))
                      if tool.get("name") not in names]
        elif role in ("user", "assistant"):
            messages.append((path, role, message.get("content")))
        else:
            raise invalid_value(path + ".role", "must be user or assistant")
    client_tools, hosted_tools = read_message_tools(tools)
    if body.get("mcp_servers"):
        raise invalid_value("mcp_servers", "is not supported; pass their tools in `tools`")
    turns, prefill = read_turns(messages)
    choice = require_type(body.get("tool_choice") or {"type": "auto"}, dict, "tool_choice")
    if choice.get("type") not in ("auto", "any", "tool", "none"):
        raise invalid_value("tool_choice.type", "must be auto, any, tool or none")
    output = optional(body.get("output_config"), dict, "output_config")
    schema = output.get("format") or body.get("output_format")
    chat = Chat(turns=turns, prefill=prefill,
                thinking=read_thinking(body.get("thinking"), "thinking"),
                system_prompt="\n\n".join(block["text"] for block in system) or None,
                model=with_path(validate_model, body.get("model"), "model"),
                json_schema=read_schema(schema, "output_config.format"),
                effort=read_effort(output.get("effort"), EFFORTS, "output_config.effort"),
                client_tools=client_tools, hosted_tools=hosted_tools,
                max_tokens=read_max_tokens(body.get("max_tokens"), "max_tokens"),
                stop_sequences=read_stop_sequences(body.get("stop_sequences"), "stop_sequences"),
                stream=optional(body.get("stream"), bool, "stream"))
    is_single = choice.get("disable_parallel_tool_use") is True
    return with_choice(chat, ToolChoice(choice["type"], choice.get("name"), is_single))


# --- reading: the OpenAI Chat Completions API ---

# Stands for an empty message of a user, which OpenAI's API takes and Anthropic's does not.
EMPTY_MESSAGE = "(empty message)"
# The API requires an object, and a custom tool's input is a text.
CUSTOM_SCHEMA: Mapping[str, Any] = {
    "type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
REASONING_EFFORTS = {"none": "low", "minimal": "low", **{effort: effort for effort in EFFORTS}}
# Any other effort means SHOWN.
THINKING_OF_EFFORT = {None: None, "none": OFF, "minimal": None}


def read_completion_request(body: Any) -> Chat:
    """Return the Chat of a request of the Chat Completions API. Raises InvalidRequest."""
    body = require_type(body, dict, "body")
    if body.get("audio"):
        raise invalid_value("audio", "is not supported; there is no sound here")
    if body.get("n") not in (None, 1):
        raise invalid_value("n", "only one choice is possible; send more requests instead")
    system: List[str] = []
    messages = []
    for number, message in enumerate(require_type(body.get("messages"), list, "messages")):
        path = "messages.%d" % number
        role = require_type(message, dict, path).get("role")
        role = require_type(role, str, path + ".role")
        if role in ("system", "developer"):
            parts = read_content(message.get("content"), ("text",), path + ".content")
            system += [part["text"] for part in parts]
        elif role in COMPLETION_ROLES:
            messages.append((path, *COMPLETION_ROLES[role](message, path)))
        else:
            text = "must be system, developer, user, assistant, tool or function"
            raise invalid_value(path + ".role", text)
    if system and not messages:
        messages, system = [("messages", "user", "\n\n".join(system))], []
    tools, custom_tools = read_completion_tools(body)
    model = body.get("model")
    if isinstance(model, str) and FOREIGN_MODEL_RE.fullmatch(model):
        model = None
    efforts = tuple(REASONING_EFFORTS)
    effort = read_effort(body.get("reasoning_effort"), efforts, "reasoning_effort")
    options = optional(body.get("stream_options"), dict, "stream_options")
    thinking = read_thinking(body.get("thinking"), "thinking")
    turns, prefill = read_turns(messages, EMPTY_MESSAGE)
    max_tokens = body.get("max_completion_tokens") or body.get("max_tokens")
    chat = Chat(
        turns=turns, prefill=prefill, thinking=thinking or THINKING_OF_EFFORT.get(effort, SHOWN),
        system_prompt="\n\n".join(system) or None,
        model=with_path(validate_model, model, "model"),
        json_schema=read_response_format(body.get("response_format")),
        effort=REASONING_EFFORTS[effort] if effort else None, client_tools=tools,
        custom_tools=custom_tools, uses_functions=bool(body.get("functions")),
        hosted_tools=() if body.get("web_search_options") is None else ("web_search",),
        max_tokens=read_max_tokens(max_tokens, "max_tokens"),
        stop_sequences=read_stop_sequences(body.get("stop"), "stop"),
        stream=optional(body.get("stream"), bool, "stream"),
        include_usage=options.get("include_usage") is True, api="openai")
    is_single = body.get("parallel_tool_calls") is False or chat.uses_functions
    choice = body.get("tool_choice")
    if chat.uses_functions:
        choice = body.get("function_call")
        if isinstance(choice, dict):
            choice = {"type": "function", "function": choice}
    form = '{"type": "function", "function": {"name": ...}}'
    return with_choice(chat, read_choice(
        choice, is_single, form, lambda item, path: item.get(str(item.get("type")))))


def read_completion_tools(
        body: Mapping[str, Any]) -> Tuple[Tuple[Mapping[str, Any], ...], Tuple[str, ...]]:
    """Return Chat.client_tools and Chat.custom_tools."""
    entries: List[Any] = [{"type": "function", "function": function}
                          for function in optional(body.get("functions"), list, "functions")]
    tools, custom = [], []
    for number, tool in enumerate(entries or optional(body.get("tools"), list, "tools")):
        path = "tools.%d" % number
        kind = require_type(tool, dict, path).get("type")
        if not isinstance(kind, str) or kind not in ("function", "custom"):
            raise invalid_value(path + ".type", "must be function or custom")
        path += "." + kind
        entry = require_type(tool.get(kind), dict, path)
        description, schema = entry.get("description"), entry.get("parameters")
        if kind == "custom":
            custom.append(str(entry.get("name")))
            description, schema = custom_description(entry, path), CUSTOM_SCHEMA
        tools.append((path, entry.get("name"), description, schema))
    return read_client_tools(tools), tuple(custom)


def custom_description(tool: Mapping[str, Any], path: str) -> str:
    """Return the description of a custom tool, with the grammar of its input, if any."""
    description = str(optional(tool.get("description"), str, path + ".description"))
    form = optional(tool.get("format"), dict, path + ".format")
    # Of chat completions it has a level of its own.
    form = form.get("grammar") if isinstance(form.get("grammar"), dict) else form
    if form.get("definition"):
        description += "\n\nThe input must match this %s grammar:\n%s" % (
            form.get("syntax"), form["definition"])
    return description


def call_input(text: str) -> Dict[str, Any]:
    """Return the arguments of an earlier call. What is no JSON of an object, such as those of a cut
    stream, stays a text."""
    with contextlib.suppress(InvalidJson):
        value = parse_json(text.encode("utf-8", "replace"))
        if isinstance(value, dict):
            return value
    return {"arguments": text}


def read_prompt_request(body: Any) -> Chat:
    """Return the Chat of a request of the older Completions API, whose prompt is a text."""
    body = require_type(body, dict, "body")
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise invalid_value("prompt", "must be one text")
    for name in ("suffix", "echo", "logprobs"):
        if body.get(name):
            raise invalid_value(name, "is not supported")
    fields = {name: value for name, value in body.items()
              if name in ("model", "max_tokens", "n", "stop", "stream", "stream_options")}
    return read_completion_request({**fields, "messages": [{"role": "user", "content": prompt}]})


def read_response_format(value: Any) -> Optional[str]:
    """Return the schema that an answer must satisfy, if any."""
    path = "response_format"
    kind = require_type(value or {"type": "text"}, dict, path).get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise invalid_value(path + ".type", "must be text, json_object or json_schema")
    if not value or kind == "text":
        return None
    schema: Dict[str, Any] = {"additionalProperties": True}
    if kind == "json_schema":
        path += ".json_schema"
        wrapper = require_type(value.get("json_schema"), dict, path)
        schema = optional(wrapper.get("schema"), dict, path + ".schema")
    return read_object_schema(schema, path)


def read_choice(choice: Any, is_single: bool, form: str,
                entry_of: Callable[[Mapping[str, Any], str], Any]) -> ToolChoice:
    """Return the ToolChoice of a `tool_choice` of OpenAI. form: how a function is chosen.
    entry_of: returns the part of a choice, at this path, that has the name or the tools."""
    kinds = {"auto": "auto", "none": "none", "required": "any"}
    choice = "auto" if choice is None else choice
    if isinstance(choice, str) and choice in kinds:
        return ToolChoice(kinds[choice], None, is_single)
    kind = choice.get("type") if isinstance(choice, dict) else None
    is_named = isinstance(kind, str) and kind in ("function", "custom", "allowed_tools")
    chosen = entry_of(choice, "tool_choice") if is_named else None
    if not isinstance(chosen, dict):
        raise invalid_value("tool_choice", "must be auto, none, required, %s or the same with"
                            " custom or allowed_tools" % form)
    if kind != "allowed_tools":
        return ToolChoice("tool", chosen.get("name"), is_single)
    mode = "auto" if chosen.get("mode") is None else chosen["mode"]
    if not isinstance(mode, str) or mode not in ("auto", "required"):
        raise invalid_value("tool_choice.allowed_tools.mode", "must be auto or required")
    names = []
    for number, tool in enumerate(require_type(chosen.get("tools"), list, "tool_choice.tools")):
        path = "tool_choice.tools.%d" % number
        entry = entry_of(require_type(tool, dict, path), path)
        if tool.get("type") in ("function", "custom"):
            names.append(str((entry if isinstance(entry, dict) else tool).get("name")))
    return ToolChoice(kinds[mode], None, is_single, names)


def read_user_message(message: Mapping[str, Any], path: str) -> Tuple[str, Any]:
    """Return (role, content) of the Messages API for a user's message."""
    content = message.get("content")
    if not isinstance(content, list):
        return "user", content
    blocks: List[Any] = []
    for number, part in enumerate(content):
        part_path = "%s.content.%d" % (path, number)
        kind = require_type(part, dict, part_path).get("type")
        if kind == "image_url":
            image = part.get("image_url")
            url = image.get("url") if isinstance(image, dict) else image
            url = require_type(url, str, part_path + ".image_url.url")
            blocks.append({"type": "image", "source": source_of_url(url)})
        elif kind == "file":
            file = require_type(part.get("file"), dict, part_path + ".file")
            data = require_type(file.get("file_data"), str, part_path + ".file.file_data")
            document = {"type": "document", "source": source_of_url(data)}
            blocks.append({**document, "title": file.get("filename")})
        elif kind == "text":
            blocks.append(part)
        else:
            raise invalid_value(part_path + ".type", "must be text, image_url or file")
    return "user", blocks


def source_of_url(url: str) -> Dict[str, Any]:
    """Return the source of a block for data:image/png;base64,... or an address."""
    match = re.match(r"data:([\w.+/-]+)(?:;[\w=.-]+)*;base64,", url[:300])
    if match:
        return {"type": "base64", "media_type": match.group(1), "data": url[match.end() :]}
    return {"type": "url", "url": url}


def read_assistant_message(message: Mapping[str, Any], path: str) -> Tuple[str, Any]:
    """Return (role, content) of the Messages API for an earlier answer."""
    content = message.get("content") or []
    if isinstance(content, str):
        content = [text_block(content)]
    parts: List[Any] = []
    for part in require_type(content, list, path + ".content"):
        if isinstance(part, dict) and part.get("type") == "refusal":
            part = {"type": "text", "text": part.get("refusal")}
        parts.append(part)
    calls = [*optional(message.get("tool_calls"), list, path + ".tool_calls")]
    if message.get("function_call"):
        function = require_type(message["function_call"], dict, path + ".function_call")
        call_id = "function_" + path.rpartition(".")[2]
        calls.append({"id": call_id, "type": "function", "function": function})
    for number, call in enumerate(calls):
        call_path = "%s.tool_calls.%d" % (path, number)
        kind = require_type(call, dict, call_path).get("type") or "function"
        kind = "custom" if kind == "custom" else "function"
        entry = require_type(call.get(kind), dict, "%s.%s" % (call_path, kind))
        if kind == "custom":
            arguments = {"input": str(entry.get("input") or "")}
        else:
            arguments_path = call_path + ".function.arguments"
            arguments = call_input(require_type(entry.get("arguments") or "{}", str,
                                                arguments_path))
        tool_use = {"type": "tool_use", "id": call.get("id"), "name": entry.get("name")}
        parts.append({**tool_use, "input": arguments})
    return "assistant", parts


def read_tool_message(message: Mapping[str, Any], path: str) -> Tuple[str, Any]:
    """Return (role, content) of the Messages API for the result of a tool."""
    block = {"type": "tool_result", "tool_use_id": message.get("tool_call_id")}
    return "user", [{**block, "content": message.get("content")}]


def read_function_message(message: Mapping[str, Any], path: str) -> Tuple[str, Any]:
    """Return the same for a function, which was called by the message before."""
    call_id = "function_%d" % (int(path.rpartition(".")[2]) - 1)
    return read_tool_message({**message, "tool_call_id": call_id}, path)


COMPLETION_ROLES = {
    "user": read_user_message, "assistant": read_assistant_message, "tool": read_tool_message,
    "function": read_function_message}


# --- reading: the OpenAI Responses API ---

RESPONSES_UNSUPPORTED = {
    "prompt": "send its text in `instructions` and `input`",
    "conversation": "use `previous_response_id`",
    "background": "use `stream`, or POST /api/ask, whose requests need no open connection"}
# Items of an earlier answer by another server, which mean nothing here.
IGNORED_ITEMS = ("web_search_call", "file_search_call", "code_interpreter_call")
CALL_FIELDS = {"function_call": "arguments", "custom_tool_call": "input"}
CALL_OUTPUTS = tuple(kind + "_output" for kind in CALL_FIELDS)
CONVERSATION_TOO_LONG = (
    "the stored conversation is longer than %d MiB. Begin another one, with a summary of it"
    % (CONVERSATION_CHARACTERS >> 20))
# An `include`.
ENCRYPTED_REASONING = "reasoning.encrypted_content"
# In front of a block of the Messages API, which a client sends back without reading it.
THOUGHT_PREFIX = "claude:"
HOSTED_TOOL = "the tool %s runs on OpenAI's servers, not here. %s"
SEARCH_ADVICE = (
    'Leave it out (in Codex: web_search = "disabled"), or use a token with the tools `web`: with'
    " that, Claude searches by itself")


def read_responses_request(
        body: Any, conversation: Callable[[str], List[Tuple[str, Any]]],
        can_search: bool = False) -> Chat:
    """Return the Chat of a request of the Responses API. Raises InvalidRequest.
    conversation: returns (role, content) of the messages up to an earlier response.
    can_search: whether Claude has a web search of its own, so that OpenAI's can be left out."""
    body = require_type(body, dict, "body")
    for name, advice in RESPONSES_UNSUPPORTED.items():
        if body.get(name):
            raise invalid_value(name, "is not supported; " + advice)
    settings = read_response_settings(body)
    messages = [(path, *message) for path, message in read_response_input(body.get("input"))]
    own = tuple((role, content) for _, role, content in messages)
    previous = settings["previous_response_id"]
    if previous:
        earlier = conversation(previous)
        messages = [("previous_response_id", *message) for message in earlier] + messages
    system = [settings["instructions"] or ""]
    tools = settings["tools"]
    for path, role, content in messages:
        if role == "system":
            system += [part["text"] for part in read_content(content, ("text",), path)]
        elif role == "tools":
            tools = tools + content
    # A client may offer them again with each request.
    settings["tools"] = list({as_json(tool): tool for tool in tools}.values())
    try:
        turns, prefill = read_turns(message for message in messages if message[1] in BLOCKS)
    except InvalidRequest as error:
        if error.extra.get("field") != "messages":
            raise
        raise invalid_value("input", str(error).partition(": ")[2]) from None
    model = body.get("model")
    if isinstance(model, str) and FOREIGN_MODEL_RE.fullmatch(model):
        model = None
    effort = read_effort(
        settings["reasoning"]["effort"], tuple(REASONING_EFFORTS), "reasoning.effort")
    thinking = OFF if effort == "none" else None
    if settings["reasoning"]["summary"] or ENCRYPTED_REASONING in optional(
            body.get("include"), list, "include"):
        thinking = thinking or SHOWN
    chat = Chat(
        turns=turns, prefill=prefill, thinking=thinking,
        system_prompt="\n\n".join(filter(None, system)) or None,
        model=with_path(validate_model, model, "model"),
        json_schema=read_text_format(settings["text"]["format"]),
        effort=REASONING_EFFORTS[effort] if effort else None,
        client_tools=read_client_tools(read_response_tools(settings["tools"], can_search)),
        custom_tools=custom_tools(settings),
        max_tokens=settings["max_output_tokens"],
        stream=optional(body.get("stream"), bool, "stream"), api="responses",
        response_request=ResponseRequest(
            settings, own, job_id_of(previous or ""), settings["store"]))
    return with_choice(chat, read_choice(
        settings["tool_choice"], not settings["parallel_tool_calls"],
        '{"type": "function", "name": ...}', flat_entry))


def read_response_settings(body: Mapping[str, Any]) -> Dict[str, Any]:
    """Return what an answer repeats of its request, with the usual values for what is missing."""
    settings: Dict[str, Any] = {
        "max_output_tokens": integer("max_output_tokens", 1, 999_999_999)(
            body.get("max_output_tokens")),
        "metadata": optional(body.get("metadata"), dict, "metadata"),
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "reasoning": {
            "effort": None, "summary": None,
            **optional(body.get("reasoning"), dict, "reasoning")},
        "store": body.get("store") is not False,
        "text": {
            "format": {"type": "text"},
            **without_none(optional(body.get("text"), dict, "text"))},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": optional(body.get("tools"), list, "tools"),
        "truncation": "auto" if body.get("truncation") == "auto" else "disabled"}
    for name in ("instructions", "previous_response_id", "prompt_cache_key", "safety_identifier",
                 "user"):
        settings[name] = optional(body.get(name), str, name) or None
    return settings


def read_text_format(value: Any) -> Optional[str]:
    """Return the schema that an answer must satisfy, if any."""
    kind = require_type(value, dict, "text.format").get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise invalid_value("text.format.type", "must be text, json_object or json_schema")
    if kind == "json_schema":
        schema = require_type(value.get("schema"), dict, "text.format.schema")
        value = {"type": kind, "json_schema": {"schema": schema}}
    return read_response_format(value)


def read_response_input(value: Any) -> Iterator[Tuple[str, Tuple[str, Any]]]:
    """Yield (path, (role, content)) of each message, call and result in an `input`."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    for number, item in enumerate(require_type(value, list, "input")):
        path = "input.%d" % number
        message = read_response_item(require_type(item, dict, path), path)
        if message:
            yield path, message


def read_response_item(item: Mapping[str, Any], path: str) -> Optional[Tuple[str, Any]]:
    """Return (role, content) in blocks of the Messages API; None for an item to leave out."""
    role = item.get("role")
    usual = "message" if role else "item_reference"
    kind = require_type(item.get("type") or usual, str, path + ".type")
    if kind == "message":
        if role not in ("user", "assistant", "system", "developer"):
            raise invalid_value(path + ".role", "must be user, assistant, system or developer")
        content = read_parts(item.get("content"), path + ".content")
        return "system" if role == "developer" else role, content
    if kind in CALL_FIELDS:
        name = flat_name(item.get("namespace"), item.get("name"), path)
        field_path = "%s.%s" % (path, CALL_FIELDS[kind])
        text = require_type(item.get(CALL_FIELDS[kind]) or "", str, field_path)
        arguments = {"input": text}
        if kind == "function_call":
            arguments = call_input(text or "{}")
        tool_use = {"type": "tool_use", "id": item.get("call_id"), "name": name}
        return "assistant", [{**tool_use, "input": arguments}]
    if kind in CALL_OUTPUTS:
        content = read_parts(item.get("output"), path + ".output")
        result = {"type": "tool_result", "tool_use_id": item.get("call_id"), "content": content}
        return "user", [result]
    if kind == "additional_tools":
        return "tools", require_type(item.get("tools"), list, path + ".tools")
    if kind == "reasoning":
        block = read_thought(item.get("encrypted_content"))
        return ("assistant", [block]) if block else None
    if kind in IGNORED_ITEMS:
        return None
    text = "must be message, %s" % ", ".join((*CALL_FIELDS, *CALL_OUTPUTS))
    if kind == "item_reference":
        text = ("%s is not an item of a stored response of this token; send the item itself"
                % shorten(item.get("id")))
    raise invalid_value(path + ".type", text)


def read_thought(text: Any) -> Optional[Block]:
    """Return the block in a reasoning item of this bridge; None for that of another server."""
    if not isinstance(text, str) or not text.startswith(THOUGHT_PREFIX):
        return None
    with contextlib.suppress(ValueError, InvalidJson):
        block = parse_json(base64.b64decode(text[len(THOUGHT_PREFIX) :], validate=True))
        return block if isinstance(block, dict) and block.get("type") in THOUGHTS else None
    return None


def flat_name(namespace: Any, name: Any, path: str) -> str:
    """Return the name under which Claude gets a tool; there are no namespaces."""
    name = require_type(name, str, path + ".name")
    if not namespace:
        return str(name)
    return "%s__%s" % (require_type(namespace, str, path + ".namespace"), name)


def read_parts(content: Any, path: str) -> Any:
    """Return the parts of a message or a result as blocks; a text stays one."""
    if content is None or isinstance(content, str):
        return replace_surrogates(content or "")
    blocks: List[Dict[str, Any]] = []
    for number, part in enumerate(require_type(content, list, path)):
        part_path = "%s.%d" % (path, number)
        kind = require_type(part, dict, part_path).get("type")
        if kind in ("input_text", "output_text", "text", "refusal"):
            field_name = "refusal" if kind == "refusal" else "text"
            text = require_type(part.get(field_name), str, "%s.%s" % (part_path, field_name))
            blocks.append(text_block(text))
        elif kind not in ("input_image", "input_file"):
            raise invalid_value(
                part_path + ".type", "must be input_text, output_text, refusal, input_image or"
                " input_file")
        elif part.get("file_id"):
            raise invalid_value(
                part_path + ".file_id", "files that were uploaded elsewhere cannot be read here;"
                " send the data itself")
        elif kind == "input_image":
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            url = require_type(url, str, part_path + ".image_url")
            blocks.append({"type": "image", "source": source_of_url(url)})
        else:
            url = part.get("file_url") or part.get("file_data")
            source = source_of_url(require_type(url, str, part_path + ".file_data"))
            if source["type"] == "url" and not part.get("file_url"):
                source = {"type": "base64", "media_type": "application/pdf", "data": url}
            blocks.append({"type": "document", "source": source, "title": part.get("filename")})
    return blocks


def read_response_tools(tools: Sequence[Any], can_search: bool, place: str = "tools",
                        namespace: str = "") -> Iterator[Tuple[str, Any, Any, Any]]:
    """Yield (path, name, description, schema) of each tool that the client runs. A namespace's
    tools have its name in front."""
    for number, tool in enumerate(tools):
        path = "%s.%d" % (place, number)
        kind = require_type(tool, dict, path).get("type")
        if kind == "namespace" and not namespace:
            inner = optional(tool.get("tools"), list, path + ".tools")
            name = require_type(tool.get("name"), str, path + ".name")
            yield from read_response_tools(inner, can_search, path + ".tools", name)
        elif kind in ("function", "custom"):
            name = flat_name(namespace, tool.get("name"), path)
            description, schema = tool.get("description"), tool.get("parameters")
            if kind == "custom":
                description, schema = custom_description(tool, path), CUSTOM_SCHEMA
            yield path, name, description, schema
        elif str(kind).startswith("web_search"):
            if not can_search:
                raise invalid_value(path + ".type", HOSTED_TOOL % (shorten(kind), SEARCH_ADVICE))
        else:
            text = HOSTED_TOOL % (
                shorten(kind), "Offer one of the type function or custom, which your program runs")
            if kind == "tool_search":
                text = 'tool_search is not supported; offer all tools (in Codex: model = "sonnet")'
            raise invalid_value(path + ".type", text)


def response_tools(settings: Mapping[str, Any]) -> Dict[str, Tuple[Mapping[str, Any], str]]:
    """Return (tool, namespace) of each tool that the client runs, by the name that Claude knows."""
    result = {}
    for tool in settings["tools"]:
        is_namespace = tool["type"] == "namespace"
        namespace = tool["name"] if is_namespace else ""
        for inner in tool.get("tools") or () if is_namespace else (tool,):
            if "name" in inner:
                result[flat_name(namespace, inner["name"], "tools")] = inner, namespace
    return result


def custom_tools(settings: Mapping[str, Any]) -> Tuple[str, ...]:
    """Return Chat.custom_tools."""
    tools = response_tools(settings).items()
    return tuple(name for name, (tool, _) in tools if tool["type"] == "custom")


def flat_entry(item: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """Return a choice with the name of its tool as Claude knows it."""
    if item.get("type") not in ("function", "custom"):
        return item
    return {**item, "name": flat_name(item.get("namespace"), item.get("name"), path)}


def job_id_of(response_id: str) -> str:
    """Return the id of a response's job; "" if it is not an id of this bridge."""
    match = re.fullmatch("resp_([0-9a-f]{32})", response_id)
    return str(uuid.UUID(match.group(1))) if match else ""


def earlier_messages(context: Context, response_id: str) -> List[Tuple[str, Any]]:
    """Return (role, content) of the messages up to a stored response, which may continue others.
    Raises PreviousResponseNotFound; InvalidRequest if it has no output, or they are too long."""
    path = "previous_response_id"
    parts: List[List[Tuple[str, Any]]] = []
    size = 0
    job_id: Optional[str] = job_id_of(response_id)
    while job_id is not None:
        stored = context.stores.responses.get(job_id)
        if not stored or stored.token_id != context.require_caller().id:
            text = "Previous response with id '%s' not found." % shorten(response_id)
            if parts:
                text = "A part of the conversation of '%s' is no longer stored." % response_id
            raise PreviousResponseNotFound(
                text + " Send the conversation itself in `input`", field=path)
        if stored.status != JobStatus.COMPLETED:
            raise invalid_value(path, "that response has no output (%s)" % stored.status)
        size += stored.size
        if size > CONVERSATION_CHARACTERS:
            raise invalid_value(path, CONVERSATION_TOO_LONG)
        info = stored.stop_info
        content = [*info.thinking, text_block(stored.text), *(call.block for call in info.calls)]
        parts.append([*stored.messages, ("assistant", content)])
        job_id = stored.previous or None
    return list(chain.from_iterable(reversed(parts)))


# About; there is no tokenizer here.
CHARACTERS_PER_TOKEN = 3.5
BLOCK_TOKENS = {"image": 1500, "document": 2000}


def estimate_tokens(chat: Chat) -> int:
    """Estimate the input tokens of a conversation."""
    texts = [chat.system_prompt or "", chat.json_schema or ""]
    if chat.client_tools:
        texts.append(as_json(chat.client_tools))
    tokens = 0
    blocks = [block for turn in chat.turns for block in turn["content"]] + list(chat.prefill)
    while blocks:
        block = blocks.pop()
        if block["type"] == "tool_result" and isinstance(block["content"], list):
            blocks += block["content"]
        elif block["type"] in BLOCK_TOKENS and block["source"]["type"] != "text":
            tokens += BLOCK_TOKENS[block["type"]]
        elif block["type"] == "tool_use":
            texts.append(block["name"] + as_json(block["input"]))
        else:
            texts.append(block.get("text") or as_json(block))
    return tokens + math.ceil(sum(map(len, texts)) / CHARACTERS_PER_TOKEN)


# --- the answer as it arrives ---
@dataclass
class Part:
    """A part of an answer, as a stream writes it.
    index: its number. block: of the Messages API; a thought is complete when the part is closed.
    pieces: of its text. is_aborted: the answer started over. is_cut: it ended at its limit."""
    index: int
    block: Block
    pieces: List[str] = field(default_factory=list)
    is_aborted: bool = False
    is_cut: bool = False

    @property
    def kind(self) -> str:
        return str(self.block["type"])

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class ChatStep(NamedTuple):
    """One step of an answer.
    kind: open or close (a part), delta (a piece of it: text), heartbeat, or end (job: the finished
    one).
    model: the one that answers, once it is known. usage: what the API has reported until now."""
    kind: str
    text: str = ""
    part: Optional[Part] = None
    model: Optional[str] = None
    job: Optional[Job] = None
    usage: Optional[Usage] = None


ChatSteps = Generator[ChatStep, None, None]


def chat_steps(context: Context, chat: Chat, job: Job) -> ChatSteps:
    """Yield the steps of an answer for the one client that waits for it.
    When that client disconnects, the run is cancelled, because nobody could come back for it. If
    the text restarts, the common prefix is not sent twice. Raises RunError, Unavailable."""
    service, caller = context.service, context.require_caller()
    clock = service.clock
    parts = AnswerParts(chat)
    model = job.model
    is_finished = False
    last_sent_at = clock.monotonic()
    try:
        is_gone = context.request.client_disconnected
        events = service.follow(caller, job.id, client_disconnected=is_gone, has_parts=chat.stream)
        with contextlib.closing(events):
            for event, view in events:
                steps: Iterator[ChatStep] = iter(())
                usage: Optional[Usage] = None
                if event.kind == "started":
                    steps = parts.restart()
                    model = event.model or model
                elif view and view.job.is_finished:
                    is_finished = True
                    failure = service.failure(view.job)
                    if failure:
                        raise failure
                    model = view.job.model or model
                    for step in parts.finish(view.job):
                        yield step._replace(model=model, usage=view.job.usage)
                    yield ChatStep("end", model=model, job=view.job, usage=view.job.usage)
                    return
                elif event.kind not in ("heartbeat", "queued"):
                    live = service.live_of(replace(job, status=JobStatus.PROCESSING))
                    # Between the event and here the run may have ended.
                    source = live or service.stores.jobs.summary(job.id)
                    usage = source.usage if source else None
                    steps = parts.add(event)
                    if not live and event.kind == "delta" and parts.lacks_thought:
                        parts.lacks_thought = False
                        ended = service.stores.jobs.get(job.id) or job
                        steps = chain(parts.add_thinking(stop_info_of(ended).thinking), steps)
                for step in steps:
                    last_sent_at = clock.monotonic()
                    yield step._replace(model=model, usage=usage)
                # A new position in the queue, or a piece that is held, is not sent.
                is_late = clock.monotonic() - last_sent_at >= HEARTBEAT_SECONDS
                if event.kind == "heartbeat" or is_late:
                    last_sent_at = clock.monotonic()
                    yield ChatStep("heartbeat", model=model)
        raise Unavailable("The request was cancelled: its client left, or the bridge is stopping.")
    finally:
        if not is_finished:
            with contextlib.suppress(BridgeError):
                service.cancel(caller, job.id)


class AnswerParts:
    """Turns the events of an answer into the parts that its client receives."""

    def __init__(self, chat: Chat) -> None:
        self._names = {tool["name"]: own_name_of(tool) for tool in chat.client_tools}
        self._custom_tools = chat.custom_tools
        self._needs_text = chat.api == "responses"
        self._text = RestartableText()
        self._open: Optional[Part] = None
        self._count = 0
        # A call of a custom tool: the client gets a text of its arguments, once they are complete.
        self._held: Optional[Part] = None
        self._call_ids: List[str] = []
        # Since the last start. lacks_thought: there may be thoughts that only the store has.
        self._has_thought = self._has_text = False
        self.lacks_thought = chat.thinking == SHOWN

    def add(self, event: JobEvent) -> Iterator[ChatStep]:
        """Yield the steps for a delta, or for a step of a LivePart."""
        if event.kind == "delta":
            for kind, text in self._text.add(event.text):
                yield from self._add_text(kind, text)
        elif event.kind == "part_start":
            block = event.block
            if block["type"] == "tool_use":
                block = {**block, "name": self._names.get(block["name"], block["name"])}
            if block.get("name") in self._custom_tools:
                self._held = Part(0, block)
            else:
                yield from self._begin(block)
        elif self._held and event.kind == "part_delta":
            self._held.pieces.append(event.text)
        elif self._held:
            held, self._held = self._held, None
            arguments = call_input(held.text)
            # Unless it was cut.
            if arguments != {"arguments": held.text}:
                yield from self._send({**held.block, "input": arguments})
        elif event.kind == "part_delta":
            yield from self._extend(event.text)
        else:
            yield from self.end(event.block)

    def _add_text(self, kind: str, text: str) -> Iterator[ChatStep]:
        if kind == "restart":
            yield from self._abort()
        else:
            if not self._open or self._open.kind != "text":
                yield from self._begin(text_block(""))
            yield from self._extend(text)

    def _begin(self, block: Block) -> Iterator[ChatStep]:
        if block["type"] != "text" and self._text.is_restarting:
            # The new text stands behind it, and so is sent from its beginning.
            self._text = RestartableText()
            yield from self._abort()
        yield from self.end()
        self._open = Part(self._count, block)
        self._count += 1
        self._has_text |= block["type"] == "text"
        if block["type"] == "tool_use":
            self._call_ids.append(block["id"])
        yield ChatStep("open", part=self._open)

    def _extend(self, text: str) -> Iterator[ChatStep]:
        if self._open and text:
            self._open.pieces.append(text)
            yield ChatStep("delta", text, self._open)

    def end(self, block: Optional[Block] = None, is_aborted: bool = False,
            is_cut: bool = False) -> Iterator[ChatStep]:
        """Close the open part, if there is one. block: what became of it."""
        part = self._open
        if not part:
            return
        if part.kind == "tool_use" and not part.pieces:
            yield from self._extend("{}")
        self._open = None
        part.is_aborted, part.is_cut = is_aborted, is_cut
        if part.kind in THOUGHTS:
            part.block = {**part.block, **(block or {})}
            self._has_thought |= not is_aborted
            self.lacks_thought &= is_aborted
        yield ChatStep("close", part=part)

    def _abort(self) -> Iterator[ChatStep]:
        """Close the open part, of an answer that started over."""
        yield from self.end(is_aborted=True)
        self._has_text = False

    def _send(self, block: Block, is_cut: bool = False) -> Iterator[ChatStep]:
        yield from self._begin(block)
        yield from self._extend(block_text(block, self._custom_tools))
        yield from self.end(block, is_cut=is_cut)

    def add_thinking(self, blocks: Iterable[Block]) -> Iterator[ChatStep]:
        """Yield the steps of complete thoughts."""
        return chain.from_iterable(map(self._send, blocks))

    def restart(self) -> Iterator[ChatStep]:
        """Begin again. Raises RunError if the client may already act on a part."""
        self._check_calls(())
        if self._open and self._open.kind in THOUGHTS:
            yield from self.end(is_aborted=True)
        self._text.restart()
        self._held = None
        self.lacks_thought |= self._has_thought
        self._has_thought = False

    def _check_calls(self, calls: Sequence[ToolCall]) -> None:
        if set(self._call_ids) - {call.id for call in calls}:
            raise RunError("network", "The answer started over in the middle of a tool call, of"
                           " which a part was sent. Ask again.")

    def finish(self, job: Job) -> Iterator[ChatStep]:
        """Yield the steps of what a completed job has, and the client not."""
        stop_info = stop_info_of(job)
        is_cut = stop_info.reason == "max_tokens"
        if not is_cut:
            self._check_calls(stop_info.calls)
        for kind, text in self._text.finish(job.response or ""):
            yield from self._add_text(kind, text)
        is_incomplete = self._open is not None and self._open.kind in THOUGHTS
        is_aborted = is_incomplete or (not job.response and self._has_text)
        yield from self.end(is_aborted=is_aborted, is_cut=is_cut)
        self._has_text &= bool(job.response)
        has_thought = self._has_thought
        for block in final_blocks(job):
            is_sent = block.get("id") in self._call_ids
            if block["type"] == "text":
                # Only a response needs an empty one after a text that was aborted.
                is_needed = self._needs_text and not self._call_ids
                is_sent = self._has_text or not (job.response or is_needed or not self._count)
            elif block["type"] in THOUGHTS:
                is_sent = has_thought
            if not is_sent:
                yield from self._send(block, is_cut)


def final_blocks(job: Job) -> List[Block]:
    """Return a completed answer as blocks of the Messages API."""
    stop_info = stop_info_of(job)
    blocks = [*stop_info.thinking]
    if job.response or not (stop_info.calls or stop_info.reason == "refusal"):
        blocks.append(text_block(job.response or ""))
    return blocks + [call.block for call in stop_info.calls]


def block_text(block: Block, custom_tools: Sequence[str] = ()) -> str:
    """Return the text of a complete block: of a call, its arguments as JSON, or the text that a
    custom tool takes."""
    if block["type"] != "tool_use":
        return str(block.get(block["type"]) or "")
    text = block["input"].get("input")
    is_text = block["name"] in custom_tools and isinstance(text, str)
    return str(text) if is_text else as_json(block["input"])


class RestartableText:
    """The text that a client has received, for an answer that may restart."""

    def __init__(self) -> None:
        self._sent: List[str] = []
        # What was sent before the text restarted, and how far the new text equals it.
        self._previous = ""
        self._matched = 0

    @property
    def is_restarting(self) -> bool:
        """Whether not all that was sent has come again."""
        return self._matched < len(self._previous)

    def restart(self) -> None:
        self._previous = "".join(self._sent)
        self._matched = 0

    def add(self, text: str) -> Iterator[Tuple[str, str]]:
        """Yield (kind, text) of the steps for a delta: a text, or a restart."""
        if not self._previous:
            self._sent.append(text)
            yield "text", text
            return
        expected = self._previous[self._matched : self._matched + len(text)]
        if not text.startswith(expected):
            common = self._previous[: self._matched]
            self._sent = [common, text]
            self._previous = ""
            yield "restart", ""
            yield "text", common + text
            return
        self._matched += len(text)
        if len(text) > len(expected):
            self._previous = ""
            self._sent.append(text[len(expected) :])
            yield "text", text[len(expected) :]

    def finish(self, text: str) -> Iterator[Tuple[str, str]]:
        """Yield the steps for a final text that is shorter than what was sent before."""
        if self._previous[self._matched :].strip() and text:
            yield "restart", ""
            yield "text", text


def write_steps(first: ChatStep, steps: ChatSteps, write: Callable[[ChatStep], bytes],
                write_error: Callable[[BridgeError], bytes]) -> BodyIterator:
    """Yield what a format writes for each step, or for the error that ends them."""
    with contextlib.closing(steps):
        try:
            yield from filter(None, map(write, chain((first,), steps)))
        except BridgeError as error:
            yield write_error(error)


class Format(NamedTuple):
    """One wire format: how to read a request and write an answer, a stream and an error."""
    read: Callable[[Any], Chat]
    body: Callable[[Chat, Job], Dict[str, Any]]
    stream: Callable[[Chat, Job, ChatStep, ChatSteps], BodyIterator]
    error: Callable[[BridgeError], Dict[str, Any]]


def handle_chat(context: Context, format: Format) -> Response:
    """Answer a conversation, whole or as a stream.
    A failure before the first word has a status of its own. An answer that takes so long that a
    proxy would cut the silence starts with blanks, which JSON allows."""
    return answer_chat(context, format, format.read(context.json()))


def answer_chat(context: Context, format: Format, chat: Chat) -> Response:
    """Queue a conversation and answer it as handle_chat does."""
    check_hosted_tools(chat, context.require_caller())
    job = context.service.ask(context.require_caller(), chat).job
    chat = chat.without_messages()
    context.request.release_body()
    ids = (("request-id", job.id), ("x-request-id", job.id))
    steps = chat_steps(context, chat, job)
    started = context.service.clock.monotonic()
    if chat.stream:
        first = next(steps)
        # An error at the end of a hold must have its status.
        give_up_at = started + max(CHAT_HOLD_SECONDS.values()) + HEARTBEAT_SECONDS
        while first.kind == "heartbeat" and context.service.clock.monotonic() < give_up_at:
            first = next(steps)
        return stream_response(format.stream(chat, job, first, steps), ids)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.closing(steps))
        for step in steps:
            if step.job:
                return json_response(200, format.body(chat, step.job), ids)
            if context.service.clock.monotonic() - started >= WAIT_SECONDS - HEARTBEAT_SECONDS:
                stack.pop_all()
                body = heartbeat_then_body(context, format, chat, steps)
                return Response(200, stream=body, headers=ids)
    raise AssertionError("unreachable")


def may_search(tools: Union[str, Tuple[str, ...]]) -> bool:
    """Return whether Claude has a web search of its own."""
    return tools in (Tools.WEB, Tools.ALL) or "WebSearch" in tools


def check_hosted_tools(chat: Chat, caller: Caller) -> None:
    """Raise InvalidRequest for tools of the server that this token has not. With the right one
    Claude uses its own."""
    if chat.hosted_tools and not may_search(caller.tools):
        raise InvalidRequest("%s needs a token with the tools web, which lets Claude search the web"
                             " by itself" % chat.hosted_tools[0], field="tools")


def heartbeat_then_body(
        context: Context, format: Format, chat: Chat, steps: ChatSteps) -> BodyIterator:
    """Yield blanks, then the body: of the answer, or of an error under the status 200."""
    clock = context.service.clock
    last_sent_at = clock.monotonic()
    with contextlib.closing(steps):
        yield b" "
        try:
            for step in steps:
                if step.job:
                    yield as_json(format.body(chat, step.job)).encode("utf-8", "replace")
                elif step.kind == "heartbeat" or (
                        clock.monotonic() - last_sent_at >= HEARTBEAT_SECONDS):
                    last_sent_at = clock.monotonic()
                    yield b" "
        except BridgeError as error:
            yield as_json(format.error(error)).encode("utf-8", "replace")


def stop_info_of(job: Job) -> StopInfo:
    return job.stop_info or StopInfo()


# --- writing: the Anthropic Messages API ---
def message_usage(job: Job) -> Dict[str, int]:
    usage = job.usage or Usage()
    return {
        "input_tokens": usage.input_tokens,
        "cache_creation_input_tokens": usage.cache_creation_tokens,
        "cache_read_input_tokens": usage.cache_read_tokens, "output_tokens": usage.output_tokens}


def message_body(chat: Chat, job: Job) -> Dict[str, Any]:
    """Return the answer of the Messages API."""
    stop_info = stop_info_of(job)
    return {
        "id": "msg_" + job.id.replace("-", ""), "type": "message", "role": "assistant",
        "model": job.model or "default", "content": final_blocks(job),
        "stop_reason": stop_info.reason, "stop_sequence": stop_info.sequence,
        "usage": message_usage(job)}


def message_event(kind: str, **data: Any) -> bytes:
    return sse_event(kind, None, {"type": kind, **data})


# Of a block of each kind: what it is without its text, and the names of a piece of it.
OPEN_BLOCKS: Mapping[str, Mapping[str, Any]] = {
    "text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}, "tool_use": {"input": {}}}
BLOCK_DELTAS = {
    "text": ("text_delta", "text"), "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json")}


def message_stream(chat: Chat, job: Job, first: ChatStep, steps: ChatSteps) -> BodyIterator:
    """Yield the answer as Server-Sent Events."""
    def delta(part: Part, kind: str, name: str, text: str) -> bytes:
        return message_event(
            "content_block_delta", index=part.index, delta={"type": kind, name: text})

    def write(step: ChatStep) -> bytes:
        part = step.part
        if step.job:
            stop_info = stop_info_of(step.job)
            end = {"stop_reason": stop_info.reason, "stop_sequence": stop_info.sequence}
            return message_event("message_delta", delta=end, usage=message_usage(
                step.job)) + message_event("message_stop")
        if not part:
            return message_event("ping")
        if step.kind == "open":
            block = {**part.block, **OPEN_BLOCKS.get(part.kind, {})}
            return message_event("content_block_start", index=part.index, content_block=block)
        if step.kind == "delta":
            return delta(part, *BLOCK_DELTAS[part.kind], step.text)
        signature = part.block.get("signature") or ""
        data = delta(part, "signature_delta", "signature", signature) if signature else b""
        return data + message_event("content_block_stop", index=part.index)

    empty = message_body(chat, replace(job, model=first.model, usage=first.usage))
    empty.update(content=[], stop_reason=None)
    yield message_event("message_start", message=empty) + message_event("ping")
    yield from write_steps(first, steps, write, lambda error: message_event(
        "error", error=message_error(error)["error"]))


MESSAGE_ERROR_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 504: "timeout_error",
    529: "overloaded_error"}


def message_error(error: BridgeError) -> Dict[str, Any]:
    usual = "invalid_request_error" if error.status < 500 else "api_error"
    kind = MESSAGE_ERROR_TYPES.get(error.status, usual)
    body = {"type": kind, "message": str(error), "details": error.extra.get("details")}
    return {"type": "error", "error": without_none(body)}


# --- writing: the OpenAI Chat Completions API ---

# Any other reason becomes "stop".
FINISH_REASONS = {"tool_use": "tool_calls", "max_tokens": "length", "refusal": "content_filter"}
COMPLETION_ERROR_CODES = {
    "missing_token": "invalid_api_key", "invalid_token": "invalid_api_key",
    "rate_limited": "rate_limit_exceeded", "usage_limit": "rate_limit_exceeded",
    "context_too_long": "context_length_exceeded"}


def completion_usage(job: Job) -> Dict[str, Any]:
    usage = job.usage or Usage()
    prompt = usage.input_tokens + usage.cache_read_tokens + usage.cache_creation_tokens
    return {
        "prompt_tokens": prompt, "completion_tokens": usage.output_tokens,
        "total_tokens": prompt + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cache_read_tokens}}


def completion_call(chat: Chat, block: Block, text: str) -> Dict[str, Any]:
    """Return a call of a tool. text: its input."""
    kind, field_name = "function", "arguments"
    if block["name"] in chat.custom_tools:
        kind, field_name = "custom", "input"
    entry = {"name": block["name"], field_name: text}
    return {"id": block["id"], "type": kind, kind: entry}


def finish_reason(chat: Chat, job: Job) -> str:
    reason = FINISH_REASONS.get(stop_info_of(job).reason, "stop")
    return "function_call" if chat.uses_functions and reason == "tool_calls" else reason


def completion_body(chat: Chat, job: Job) -> Dict[str, Any]:
    """Return the answer of the Chat Completions API."""
    stop_info = stop_info_of(job)
    calls = [completion_call(chat, call.block, block_text(call.block, chat.custom_tools))
             for call in stop_info.calls]
    message: Dict[str, Any] = {
        "role": "assistant", "content": job.response or (None if calls else ""), "refusal": None}
    thought = "\n\n".join(filter(None, map(block_text, stop_info.thinking)))
    if thought:
        message["reasoning_content"] = thought
    if calls and chat.uses_functions:
        message["function_call"] = calls[0]["function"]
    elif calls:
        message["tool_calls"] = calls
    choice = {"index": 0, "message": message, "logprobs": None}
    return {
        "id": "chatcmpl-" + job.id.replace("-", ""), "object": "chat.completion",
        "created": int(job.created_at), "model": job.model or "default",
        "choices": [{**choice, "finish_reason": finish_reason(chat, job)}],
        "usage": completion_usage(job)}


def completion_stream(chat: Chat, job: Job, first: ChatStep, steps: ChatSteps) -> BodyIterator:
    """Yield the answer as Server-Sent Events."""
    def chunk(model: Optional[str], choices: Sequence[Mapping[str, Any]], **more: Any) -> bytes:
        body = {
            "id": "chatcmpl-" + job.id.replace("-", ""), "object": "chat.completion.chunk",
            "created": int(job.created_at), "model": model or "default", "choices": choices}
        if chat.include_usage:
            body["usage"] = None
        return sse_event("", None, {**body, **more})

    def delta_chunk(step: ChatStep, delta: Mapping[str, Any], reason: Any = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return chunk(step.model, [choice])

    # Part -> number of the call.
    calls: Dict[int, int] = {}
    last_parts: Dict[str, Part] = {}

    def write_call(step: ChatStep, part: Part) -> bytes:
        number = calls.setdefault(part.index, len(calls))
        call = completion_call(chat, part.block, step.text)
        if step.kind == "delta":
            del call["id"], call[call.pop("type")]["name"]
        if not chat.uses_functions:
            return delta_chunk(step, {"tool_calls": [{"index": number, **call}]})
        return b"" if number else delta_chunk(step, {"function_call": call["function"]})

    def write(step: ChatStep) -> bytes:
        part = step.part
        if step.job:
            end = delta_chunk(step, {}, finish_reason(chat, step.job))
            if chat.include_usage:
                end += chunk(step.model, [], usage=completion_usage(step.job))
            return end + b"data: [DONE]\n\n"
        if not part:
            return HEARTBEAT
        if part.kind == "tool_use":
            return b"" if step.kind == "close" else write_call(step, part)
        name = "content" if part.kind == "text" else "reasoning_content"
        if step.kind == "delta":
            return delta_chunk(step, {name: step.text})
        if step.kind == "close" or part.kind == "redacted_thinking":
            return b""
        last, last_parts[name] = last_parts.get(name), part
        is_apart = last and (last.is_aborted or part.kind == "thinking")
        return delta_chunk(step, {name: "\n\n"}) if is_apart else b""

    yield delta_chunk(first, {"role": "assistant", "content": "", "refusal": None})
    yield from write_steps(first, steps, write, lambda error: sse_event(
        "", None, completion_error(error)))


def prompt_body(chat: Chat, job: Job) -> Dict[str, Any]:
    """Return the answer of the older Completions API."""
    body = completion_body(chat, job)
    choice = {"index": 0, "text": job.response or "", "logprobs": None}
    return {**body, "id": "cmpl-" + job.id.replace("-", ""), "object": "text_completion",
            "choices": [{**choice, "finish_reason": finish_reason(chat, job)}]}


def prompt_stream(chat: Chat, job: Job, first: ChatStep, steps: ChatSteps) -> BodyIterator:
    """Yield the same as Server-Sent Events."""
    def chunk(step: ChatStep, text: str, reason: Optional[str] = None, **more: Any) -> bytes:
        body = prompt_body(chat, replace(job, model=step.model, response=text))
        del body["usage"]
        body["choices"][0]["finish_reason"] = reason
        return sse_event("", None, {**body, **more})

    def write(step: ChatStep) -> bytes:
        part = step.part
        if step.job:
            end = chunk(step, "", finish_reason(chat, step.job))
            if chat.include_usage:
                end += chunk(step, "", choices=[], usage=completion_usage(step.job))
            return end + b"data: [DONE]\n\n"
        if not part:
            return HEARTBEAT
        if step.kind == "close":
            return chunk(step, "\n\n") if part.is_aborted else b""
        return chunk(step, step.text) if step.text else b""

    yield from write_steps(first, steps, write, lambda error: sse_event(
        "", None, completion_error(error)))


def completion_error(error: BridgeError) -> Dict[str, Any]:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    if error.status == 429:
        kind = "rate_limit_error"
    body = {
        "message": str(error), "type": kind, "param": error.extra.get("field"),
        "code": COMPLETION_ERROR_CODES.get(error.code, error.code)}
    return {"error": body}


# --- writing: the OpenAI Responses API ---

REFUSAL: Block = {"type": "refusal"}
REFUSAL_TEXT = "The model refused to answer. Ask in another way, or another model."
RESPONSE_ERROR_CODES = {429: "rate_limit_exceeded", 400: "invalid_prompt"}
# An EventWriter returns the next event of a stream, with its number.
EventWriter = Callable[..., bytes]


def response_usage(job: Job) -> Optional[Dict[str, Any]]:
    """Return the `usage` of a response; None until the run has ended."""
    if not job.usage:
        return None
    usage = completion_usage(job)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": job.usage.cache_read_tokens,
            "cache_write_tokens": job.usage.cache_creation_tokens},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": usage["total_tokens"]}


def response_error(error: BridgeError) -> Dict[str, Any]:
    """Return the `error` of a response; the format has few codes."""
    code = RESPONSE_ERROR_CODES.get(error.status, "server_error")
    return {"code": code, "message": str(error)}


def output_text(text: str) -> Dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def item_id(prefix: str, job: Job, index: int) -> str:
    return "%s_%s_%d" % (prefix, job.id.replace("-", ""), index)


def message_item(job: Job, index: int, status: str, *parts: Mapping[str, Any]) -> Dict[str, Any]:
    return {
        "id": item_id("msg", job, index), "type": "message", "status": status,
        "role": "assistant", "content": list(parts)}


def call_item(job: Job, part: Part, settings: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the item of a call, in the kind of its tool."""
    block = part.block
    tool, namespace = response_tools(settings).get(block["name"], ({}, ""))
    kind, prefix = "function_call", "fc"
    if tool.get("type") == "custom":
        kind, prefix = "custom_tool_call", "ctc"
    item = {
        "id": item_id(prefix, job, part.index), "type": kind, "call_id": block["id"],
        "name": tool.get("name", block["name"]),
        "status": "incomplete" if part.is_cut else "completed",
        CALL_FIELDS[kind]: part.text}
    return {**item, "namespace": namespace} if namespace else item


def item_of(job: Job, part: Part, settings: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the output item of a complete part."""
    if part.kind == "tool_use":
        return call_item(job, part, settings)
    if part.kind == "text":
        status = "incomplete" if part.is_aborted or part.is_cut else "completed"
        return message_item(job, part.index, status, output_text(part.text))
    if part.kind == "refusal":
        return message_item(job, part.index, "completed", {**part.block, "refusal": part.text})
    summary = [{"type": "summary_text", "text": part.text}] if part.kind == "thinking" else []
    secret = base64.b64encode(as_json(part.block).encode("utf-8", "replace")).decode()
    return {
        "id": item_id("rs", job, part.index), "type": "reasoning", "summary": summary,
        "encrypted_content": THOUGHT_PREFIX + secret,
        "status": "incomplete" if part.is_aborted else "completed"}


def response_output(job: Job, settings: Mapping[str, Any]) -> List[Dict[str, Any]]:
    """Return the output items of a completed job."""
    stop_info = stop_info_of(job)
    is_cut = stop_info.reason == "max_tokens"
    names = custom_tools(settings)
    parts = [Part(number, block, [block_text(block, names)], is_cut=is_cut)
             for number, block in enumerate(final_blocks(job))]
    items = [item_of(job, part, settings) for part in parts]
    if stop_info.reason == "refusal":
        items.append(item_of(job, Part(len(items), REFUSAL, [REFUSAL_TEXT]), settings))
    return items


def response_body(settings: Mapping[str, Any], job: Job) -> Dict[str, Any]:
    """Return the object of the Responses API."""
    is_completed = job.status == JobStatus.COMPLETED
    is_cut = is_completed and stop_info_of(job).reason == "max_tokens"
    status = "in_progress"
    if is_completed:
        status = "incomplete" if is_cut else "completed"
    elif job.status == JobStatus.ERROR:
        status = "cancelled" if job.error_code == "cancelled" else "failed"
    is_done = status == "completed" and job.completed_at is not None
    return {
        "id": "resp_" + job.id.replace("-", ""), "object": "response",
        "created_at": int(job.created_at), "status": status, "background": False,
        "completed_at": int(job.completed_at or 0) if is_done else None, "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "max_tool_calls": None, "model": job.model or "default",
        "output": response_output(job, settings) if is_completed else [],
        "service_tier": "default", "temperature": None, "top_logprobs": 0, "top_p": None,
        "usage": response_usage(job), **settings}


def response_stream(chat: Chat, job: Job, first: ChatStep, steps: ChatSteps) -> BodyIterator:
    """Yield the answer as Server-Sent Events. The text of a run that starts over is an item of its
    own, which the final response does not hold."""
    assert chat.response_request
    settings = chat.response_request.settings
    numbers = count()
    output: List[Dict[str, Any]] = []
    items: Dict[int, Dict[str, Any]] = {}
    indexes = count()

    def event(kind: str, **data: Any) -> bytes:
        kind = "response." + kind
        numbered = {"type": kind, "sequence_number": next(numbers), **data}
        return sse_event(kind, None, numbered)

    def write(step: ChatStep) -> bytes:
        part = step.part
        if step.job:
            final = response_body(settings, step.job)
            end = b""
            if stop_info_of(step.job).reason == "refusal":
                part = Part(next(indexes), REFUSAL, [REFUSAL_TEXT])
                output.append(item_of(job, part, settings))
                for kind in ("open", "delta", "close"):
                    end += b"".join(
                        item_events(event, ChatStep(kind, part.text), part, output[-1]))
            return end + event(final["status"], response={**final, "output": output})
        if not part:
            return HEARTBEAT
        if step.kind == "open":
            next(indexes)
        if step.kind != "delta":
            items[part.index] = item_of(job, part, settings)
        if step.kind == "close" and not part.is_aborted:
            output.append(items[part.index])
        return b"".join(item_events(event, step, part, items[part.index]))

    body = response_body(settings, replace(job, status=JobStatus.PROCESSING, model=first.model))
    yield event("created", response=body) + event("in_progress", response=body)
    yield from write_steps(first, steps, write, lambda error: event("failed", response={
        **body, "status": "failed", "error": response_error(error)}))


# The names of the events of an item's text, and of the event that opens its place, if any.
TEXT_EVENTS = {
    "message": ("content_part", "output_text", "text"),
    "refusal": ("content_part", "refusal", "refusal"),
    "reasoning": ("reasoning_summary_part", "reasoning_summary_text", "text"),
    "function_call": ("", "function_call_arguments", "arguments"),
    "custom_tool_call": ("", "custom_tool_call_input", "input")}


def item_events(event: EventWriter, step: ChatStep, part: Part,
                item: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield the events of a step. item: as it is after the step."""
    place: Dict[str, Any] = {"output_index": part.index, "item_id": item["id"]}
    key = "refusal" if part.kind == "refusal" else item["type"]
    place_event, text_event, name = TEXT_EVENTS[key]
    more: Dict[str, Any] = {}
    field_name = {"message": "content", "reasoning": "summary"}.get(item["type"], "")
    text_part = item[field_name][0] if field_name and item[field_name] else {}
    if key == "message":
        more["logprobs"] = []
    if item["type"] == "message":
        place["content_index"] = 0
    elif text_part:
        place["summary_index"] = 0
    has_text = bool(text_part) or not field_name
    if step.kind == "open":
        opened = {**item, "status": "in_progress", field_name or name: [] if field_name else ""}
        opened.pop("encrypted_content", None)
        yield event("output_item.added", output_index=part.index, item=opened)
        if text_part:
            yield event(place_event + ".added", **place, part={**text_part, name: ""})
    elif step.kind == "delta":
        yield event(text_event + ".delta", **place, delta=step.text, **more)
    else:
        if has_text:
            if not field_name:
                more["name"] = item["name"]
            yield event(text_event + ".done", **place, **{name: part.text}, **more)
        if text_part:
            yield event(place_event + ".done", **place, part=text_part)
        yield event("output_item.done", output_index=part.index, item=item)


# --- the routes of /v1 ---

MESSAGES = Format(read_messages_request, message_body, message_stream, message_error)
COMPLETIONS = Format(read_completion_request, completion_body, completion_stream, completion_error)
PROMPTS = Format(read_prompt_request, prompt_body, prompt_stream, completion_error)


# With /v1 twice, or not at all: a client that adds it, or does not, to the base URL.
WIRE_PATH_RE = re.compile(
    r"/(?:v1/)*(?=(?:messages|chat/completions|completions|responses|models)(?:/|$))",
    re.IGNORECASE)


def wire_path(path: str) -> str:
    """Return the path below /v1 that is meant."""
    match = WIRE_PATH_RE.match(path)
    return "/v1/" + path[match.end() :] if match else path


def format_of(path: str, headers: Mapping[str, str]) -> Optional[Format]:
    """Return the wire format of the answers at a path; None for the native one."""
    path = wire_path(unquote(path))
    if not re.match(r"/v1(/|$)", path, re.IGNORECASE):
        return None
    if re.match("/v1/messages", path, re.IGNORECASE) or "anthropic-version" in headers:
        return MESSAGES
    return COMPLETIONS


def read_response_chat(context: Context) -> Chat:
    """Return the Chat of a request of /v1/responses."""
    tools = context.require_caller().tools
    can_search = may_search(tools)
    body = context.json()
    if isinstance(body, dict) and isinstance(body.get("input"), list):
        body = {**body, "input": resolve_references(context, body["input"])}
    return read_responses_request(body, partial(earlier_messages, context), can_search)


def match_reference(item: Any) -> Optional["re.Match[str]"]:
    """Return the response and the number in a reference to an item of this bridge."""
    is_reference = isinstance(item, dict) and not item.get("role") and (
        item.get("type") in (None, "item_reference"))
    if not is_reference:
        return None
    return re.fullmatch(r"[a-z]+_([0-9a-f]{32})_(\d{1,9})", str(item.get("id")))


def resolve_references(context: Context, items: List[Any]) -> List[Any]:
    """Return an `input` with the token's own stored items in place of references to them. A stream
    whose text started over has items before those that are stored; they are left out."""
    matches = list(map(match_reference, items))
    # By response: the number of its last item that is referred to.
    last_numbers: Dict[str, int] = {}
    for response_id, number in (match.groups() for match in matches if match):
        last_numbers[response_id] = max(last_numbers.get(response_id, 0), int(number))
    stored: Dict[str, List[Any]] = {}
    result = []
    size = 0
    for item, match in zip(items, matches):
        if match and match[1] not in stored:
            job_id = str(uuid.UUID(match[1]))
            job = context.stores.jobs.get(job_id)
            settings = context.stores.responses.settings(job_id)
            is_own = job and job.token_id == context.require_caller().id
            stored[match[1]] = []
            if job and settings and is_own:
                stored[match[1]] = response_body(settings, job)["output"]
                size += len(job.response or "")
            if size > CONVERSATION_CHARACTERS:
                raise invalid_value("input", CONVERSATION_TOO_LONG)
        output = stored[match[1]] if match else []
        if match and output:
            index = int(match[2]) - max(0, last_numbers[match[1]] + 1 - len(output))
            result += output[index : index + 1] if index >= 0 else []
        else:
            result.append(item)
    return result


def handle_create_response(context: Context) -> Response:
    chat = read_response_chat(context)
    assert chat.response_request
    settings = chat.response_request.settings
    format = COMPLETIONS._replace(
        body=lambda chat, job: response_body(settings, job), stream=response_stream)
    return answer_chat(context, format, chat)


def handle_count_tokens(context: Context) -> Response:
    body = require_type(context.json(), dict, "body")
    messages = require_type(body.get("messages"), list, "messages")
    try:
        tokens = estimate_tokens(read_messages_request(body))
    except InvalidRequest:
        # Clients also count parts of a conversation, which could not be answered alone.
        text = as_json([body.get(name) for name in ("system", "tools")] + messages)
        tokens = math.ceil(len(text) / CHARACTERS_PER_TOKEN)
    return json_response(200, {"input_tokens": tokens})


def handle_count_input_tokens(context: Context) -> Response:
    tokens = estimate_tokens(read_response_chat(context))
    return json_response(200, {"object": "response.input_tokens", "input_tokens": tokens})


def stored_response(context: Context) -> Tuple[Job, Dict[str, Any]]:
    """Return the job of a stored response, and its settings. Raises NotFound."""
    response_id = context.path_params["id"]
    with contextlib.suppress(NotFound):
        job = context.service.job(context.require_caller(), job_id_of(response_id)).job
        settings = context.stores.responses.settings(job.id)
        if settings:
            return job, settings
    raise NotFound("Response with id '%s' not found." % shorten(response_id))


def handle_get_response(context: Context) -> Response:
    if context.request.query.get("stream") == "true":
        raise invalid_value("stream", "a stored response cannot be streamed; leave `stream` out")
    job, settings = stored_response(context)
    body = response_body(settings, job)
    failure = context.service.failure(job)
    if failure:
        body["error"] = response_error(failure)
    return json_response(200, body)


def handle_delete_response(context: Context) -> Response:
    job, _ = stored_response(context)
    context.stores.responses.delete(job.id)
    response_id = "resp_" + job.id.replace("-", "")
    return json_response(200, {"id": response_id, "object": "response", "deleted": True})


# All formats find their own keys here; the dates are unknown.
MODEL_EXAMPLE = {
    "id": "sonnet", "object": "model", "created": 0, "owned_by": "anthropic", "type": "model",
    "display_name": "Sonnet", "created_at": "1970-01-01T00:00:00Z", "lifecycle": "active"}


def model_body(model: Model) -> Dict[str, Any]:
    return {**MODEL_EXAMPLE, "id": model.id, "display_name": model.name}


def handle_list_models(context: Context) -> Response:
    bodies = [model_body(model) for model in context.service.models(context.require_caller())]
    return json_response(200, {
        "object": "list", "data": bodies, "has_more": False, "first_id": bodies[0]["id"],
        "last_id": bodies[-1]["id"]})


def handle_get_model(context: Context) -> Response:
    model_id, caller = context.path_params["id"], context.require_caller()
    for model in context.service.models(caller):
        if model.id == model_id:
            return json_response(200, model_body(model))
    # The list has not all versions; another name would be unknown to the CLI as well.
    is_version = re.fullmatch(r"claude-[a-z0-9.-]{1,100}", model_id) and (
        not caller.models or is_allowed_model(model_id, caller.models))
    if is_version or FOREIGN_MODEL_RE.fullmatch(model_id):
        return json_response(200, model_body(Model(model_id, model_id)))
    shown = replace_surrogates(model_id)[:128]
    raise NotFound("There is no model %s here. GET /v1/models lists them" % shown)


# === 12 Routes and OpenAPI =======================================================================
# The endpoints as data. ROUTES gives dispatch, 404, 405, /openapi.json and the README's tables.

EXAMPLE_ID = "550e8400-e29b-41d4-a716-446655440000"
EXAMPLE_TIME = "2026-01-31T12:00:00.000Z"
WARNINGS = ["unknown field 'x' ignored"]
USAGE_EXAMPLE = {"inputTokens": 12, "outputTokens": 40, "cacheReadTokens": 0,
                 "cacheCreationTokens": 0, "costUsd": 0.0006}
SUMS_EXAMPLE = {"requests": 5, "completed": 4, "errors": 1, **USAGE_EXAMPLE}
WINDOW_EXAMPLE = {"type": "five_hour", "status~": "allowed", "utilization~": 0.42,
                  "resetsAt~": EXAMPLE_TIME, "seenAt": EXAMPLE_TIME}
PLAN_EXAMPLE = {
    "windows": [WINDOW_EXAMPLE], "isUsingOverage": False, "waitingFor~": None, "resumesAt~": None}
JOB_EXAMPLE = {"status": "completed", "requestId": EXAMPLE_ID, "queuePosition?": 0,
               "response?": "Because air scatters blue light more.",
               "error?": "The request was cancelled.", "errorCode?": "cancelled",
               "advice?": "ask for a shorter answer", "completedAt?": EXAMPLE_TIME,
               "model?": "haiku", "conversation?": "trip-to-rome", "createdAt": EXAMPLE_TIME,
               "startedAt?": EXAMPLE_TIME, "attempts": 1, "durationMs?": 1840, "structured?": {},
               "usage?": USAGE_EXAMPLE, "stopReason?": "max_tokens", "partial?": "Because",
               "waitingFor?": "usage_limit", "resumesAt?": EXAMPLE_TIME, "warnings?": WARNINGS}
LISTED_JOB_EXAMPLE = {
    **JOB_EXAMPLE, "message": "Why is the sky blue?", "tokenId": EXAMPLE_ID,
    "systemPrompt?": "Answer in one sentence.", "effort?": "low", "api?": "openai",
    "jsonSchema?": {},
    "attachments?": [{"name": "photo.png", "mediaType": "image/png", "bytes": 20480}]}
TOKEN_EXAMPLE = {
    "id": EXAMPLE_ID, "name": "my-app", "prefix": "cab-01234567", "sessionMode": "stateless",
    "expiresAt~": EXAMPLE_TIME, "createdAt": EXAMPLE_TIME, "lastUsedAt~": EXAMPLE_TIME,
    "isAdmin": False, "isExpired": False, "tools": "none", "workspace~": None,
    "requestsPerMinute~": 10, "requestsPerDay~": 200, "models~": ["haiku"], "callbacks": None}
TOOL_CALL_EXAMPLE = {
    "id": "toolu_1", "type": "function", "function": {"name": "add", "arguments": "{}"}}

COMPLETION_USAGE_EXAMPLE = {"prompt_tokens": 12, "completion_tokens": 40, "total_tokens": 52,
                            "prompt_tokens_details": {"cached_tokens": 0}}

# Examples of answers, from which the schemas are made. name?: may be missing. name~: may be null.
RESPONSE_EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "Queued": {"ok": True, "requestId": EXAMPLE_ID, "position": 1,
               "poll": "GET /api/ask/" + EXAMPLE_ID, "warnings?": WARNINGS},
    "Job": JOB_EXAMPLE, "Cancelled": {"ok": True, **JOB_EXAMPLE},
    "Requests": {"requests": [LISTED_JOB_EXAMPLE], "next~": "41", "searchedTo~": EXAMPLE_TIME},
    "ListedJob": LISTED_JOB_EXAMPLE,
    "Conversations": {"conversations": [
        {"name": "default", "turns": 3, "createdAt": EXAMPLE_TIME, "lastUsedAt": EXAMPLE_TIME}]},
    "Done": {"ok": True, "message": "Token revoked"},
    "Usage": {"since": "2026-01-01", "total": SUMS_EXAMPLE,
              "days": [{"day": "2026-01-31", **SUMS_EXAMPLE}],
              "tokens": [{"tokenId": EXAMPLE_ID, "name~": "my-app", **SUMS_EXAMPLE}],
              "models": [{"model~": "claude-haiku-4-5", "completed": 4, **USAGE_EXAMPLE}],
              "latency": {"requests": 5, "waitingMs": {"p50~": 3, "p95~": 1840},
                          "firstTokenMs": {"p50~": 640, "p95~": 900}},
              "plan": PLAN_EXAMPLE},
    "NewToken": {
        "ok": True, "tokenId": EXAMPLE_ID, "token": "cab-...", "prefix": "cab-01234567",
        "callbackSecret?": "whsec_...", "warning": "Save this token now.", "warnings?": WARNINGS},
    "Tokens": {"tokens": [TOKEN_EXAMPLE]},
    "Token": {"ok": True, **TOKEN_EXAMPLE, "warnings?": WARNINGS},
    "Status": {"status": "running", "version": __version__,
               "queue": {"isProcessing": False, "length": 0, "waitingFor?": "network",
                         "resumesAt?": EXAMPLE_TIME},
               "stats": {"totalTokens": 2, "totalRequests": 5, "completedRequests": 4,
                         "errorRequests": 1, "queuedRequests": 0},
               "worker?": {}, "plan?": PLAN_EXAMPLE, "tunnel?": {}, "claude?": {}},
    "Health": {"status": "ok", "waitingFor?": "login", "resumesAt?": EXAMPLE_TIME,
               "advice?": "The login of claude was refused."},
    "Queue": {"ok": True, "waitingFor?": "paused", "resumesAt?": EXAMPLE_TIME},
    "Root": {"name": "claude-api-bridge", "version": __version__, "description": "A REST API",
             "endpoints": {}, "docs": "GET /dashboard"},
    "OpenApi": {"openapi": "3.1.0", "info": {}, "paths": {}, "components": {}},
    "Models": {"object": "list", "data": [MODEL_EXAMPLE], "has_more": False, "first_id": "sonnet",
               "last_id": "sonnet"},
    "Model": MODEL_EXAMPLE,
    "Message": {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "claude-sonnet-5",
        "stop_reason": "end_turn",
        "content": [
            {"type": "text", "text?": "Rhine", "id?": "toolu_1", "name?": "add", "input?": {}}],
        "stop_sequence~": None,
        "usage": {"input_tokens": 12, "cache_creation_input_tokens": 0,
                  "cache_read_input_tokens": 0, "output_tokens": 40}},
    "Completion": {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1769860800,
        "model": "claude-sonnet-5",
        "choices": [{"index": 0,
                     "message": {"role": "assistant", "content~": "Rhine", "refusal~": None,
                                 "tool_calls?": [TOOL_CALL_EXAMPLE]},
                     "logprobs~": None, "finish_reason": "stop"}],
        "usage": COMPLETION_USAGE_EXAMPLE},
    "TextCompletion": {
        "id": "cmpl-1", "object": "text_completion", "created": 1769860800,
        "model": "claude-sonnet-5",
        "choices": [{"index": 0, "text": "Rhine", "logprobs~": None, "finish_reason": "stop"}],
        "usage": COMPLETION_USAGE_EXAMPLE},
    "Response": {
        "id": "resp_1", "object": "response", "created_at": 1769860800, "status": "completed",
        "background": False, "completed_at~": 1769860801, "error~": None,
        "incomplete_details~": None, "instructions~": "Answer in one sentence.",
        "max_output_tokens~": None, "max_tool_calls~": None, "metadata": {},
        "model": "claude-sonnet-5",
        "output": [{
            "id": "msg_1_0", "type": "message", "status": "completed", "role?": "assistant",
            "content?": [{
                "type": "output_text", "text?": "Rhine", "annotations?": [{}], "logprobs?": [{}],
                "refusal?": "The model refused to answer."}],
            "call_id?": "toolu_1", "name?": "add", "namespace?": "math", "arguments?": "{}",
            "input?": "text"}],
        "parallel_tool_calls": True, "previous_response_id~": None, "prompt_cache_key~": None,
        "reasoning": {"effort~": None, "summary~": None}, "safety_identifier~": None,
        "service_tier": "default", "store": True, "temperature~": None,
        "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [{}],
        "top_logprobs": 0, "top_p~": None, "truncation": "disabled",
        "usage~": {"input_tokens": 12,
                   "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                   "output_tokens": 40, "output_tokens_details": {"reasoning_tokens": 0},
                   "total_tokens": 52},
        "user~": None},
    "InputTokens": {"object": "response.input_tokens", "input_tokens": 11},
    "CountedTokens": {"input_tokens": 11},
    "DeletedResponse": {"id": "resp_1", "object": "response", "deleted": True},
    "Error": {"error": "Request not found", "code": "not_found", "field?": "wait", "retryAfter?": 7,
              "resetsAt?": EXAMPLE_TIME},
    "MessageError": {"type": "error", "error": {"type": "not_found_error", "message": "Not found"}},
    "CompletionError": {"error": {"message": "Not found", "type": "invalid_request_error",
                                  "param~": None, "code": "not_found"}}}

WAIT_QUERY = {"wait": ("number", "seconds to wait for the result, 0 to 90")}
AFTER_QUERY = {
    "after": ("integer", "how much of the text you have, in code points; as Last-Event-ID")}
PAGE_QUERY = {
    "status": (
        "string", "one or more of queued, processing, completed, error, separated by commas"),
    "q": ("string", "a text that occurs in the request or its answer, in any case"),
    "token": ("string", "admins: the ID, name or prefix of a token"),
    "model": ("string", "a part of the model's name"), "error": ("string", "an `errorCode`"),
    "conversation": ("string", "a conversation, of `token` or your own"),
    "since": ("string", "a time such as 2026-01-31T12:00:00Z"),
    "limit": ("integer", "1 to 100, default 20"), "before": ("string", "the last page's `next`")}


def handle_root(context: Context) -> Response:
    if "text/html" in context.request.headers.get("accept", ""):
        return context.status.page()
    endpoints = {"%s %s" % (route.method, route.path): route.doc for route in ROUTES}
    return json_response(200, {"name": "claude-api-bridge", "version": __version__,
                               "description": "A REST API for the Claude Code command line tool",
                               "endpoints": endpoints, "docs": "GET /dashboard"})


def handle_openapi(context: Context) -> Response:
    return json_response(200, openapi())


NEW_TOKEN = "NewToken", '{"ok":true,"tokenId":ID,"token":"cab-...","prefix":"cab-..."}'
OPENAI_ERROR = None, '{"error":{"message":"...","type":"...",...}}'
ROUTES = (
    Route("POST", "/api/ask", AuthLevel.TOKEN, handle_ask, "Send a message to Claude Code",
          body_type=Ask,
          responses={202: ("Queued",
                           '{"ok":true,"requestId":ID,"position":1,"poll":"GET /api/ask/ID"}'),
                     200: ("Job", "with `wait`: the poll body, finished; with `stream`: events")},
          error_statuses=(403, 409)),
    Route("GET", "/api/ask/:requestId", AuthLevel.TOKEN, handle_poll,
          "Poll for the answer; `?wait=30` waits for it",
          responses={202: ("Job", '{"status":"queued","requestId":ID,"queuePosition":1}'),
                     200: ("Job", '{"status":"completed","requestId":ID,"response":"..."}')},
          query=WAIT_QUERY, uses_poll_limiter=True),
    Route("DELETE", "/api/ask/:requestId", AuthLevel.TOKEN, handle_cancel,
          "Cancel a queued or running request",
          responses={200: ("Cancelled", '{"ok":true,"status":"error",...}')},
          error_statuses=(409,)),
    Route("GET", "/api/ask/:requestId/events", AuthLevel.TOKEN, handle_events,
          "Follow a request live; `?after=120` resumes there",
          responses={200: ("", "Server-Sent Events")}, query=AFTER_QUERY),
    Route("POST", "/api/ask/:requestId/events", AuthLevel.TOKEN, handle_events,
          "The same, for proxies that buffer events over GET",
          responses={200: ("", "Server-Sent Events")}, query=AFTER_QUERY),
    Route("GET", "/api/requests", AuthLevel.TOKEN, handle_list_requests,
          "Your requests, newest first (admins see everyone's)",
          responses={200: ("Requests", '{"requests":[...],"next":"41"}')}, query=PAGE_QUERY),
    Route("GET", "/api/requests/:requestId", AuthLevel.TOKEN, handle_get_request,
          "One of them, with what was asked",
          responses={200: ("ListedJob", '{"status":"completed","message":"...",...}')}),
    Route("GET", "/api/conversations", AuthLevel.TOKEN, handle_list_conversations,
          "The conversations of a stateful token",
          responses={200: ("Conversations", '{"conversations":[{"name":"default",...}]}')}),
    Route("DELETE", "/api/conversations/:name", AuthLevel.TOKEN, handle_delete_conversation,
          "Delete a conversation; the next request starts it again",
          responses={200: ("Done", '{"ok":true,"message":"Conversation deleted"}')}),
    Route("GET", "/api/usage", AuthLevel.TOKEN, handle_usage,
          "Requests, tokens and estimated cost per day, token and model; the plan's limits",
          responses={200: ("Usage", '{"total":{...},"days":[...],"tokens":[...],"plan":{...}}')},
          query={"days": ("integer", "1 to 400, default 30")}),
    Route("POST", "/v1/messages", AuthLevel.TOKEN, partial(handle_chat, format=MESSAGES),
          "The Anthropic wire format; see Other wire formats",
          responses={200: ("Message", '{"type":"message","content":[...],...}'),
                     400: (None, '{"type":"error","error":{"type":"...","message":"..."}}')},
          error_statuses=(403, 504, 529)),
    Route("POST", "/v1/messages/count_tokens", AuthLevel.TOKEN, handle_count_tokens,
          "An estimate of the input tokens of such a request, by its length",
          responses={200: ("CountedTokens", '{"input_tokens":11}')}),
    Route("POST", "/v1/chat/completions", AuthLevel.TOKEN, partial(handle_chat, format=COMPLETIONS),
          "The OpenAI wire format; see Other wire formats",
          responses={200: ("Completion", '{"object":"chat.completion","choices":[...],...}'),
                     400: OPENAI_ERROR}, error_statuses=(403, 504, 529)),
    Route("POST", "/v1/completions", AuthLevel.TOKEN, partial(handle_chat, format=PROMPTS),
          "The older OpenAI format: a text in, a text out",
          responses={200: ("TextCompletion", '{"object":"text_completion","choices":[...],...}'),
                     400: OPENAI_ERROR}, error_statuses=(403, 504, 529)),
    Route("POST", "/v1/responses", AuthLevel.TOKEN, handle_create_response,
          "The newer OpenAI wire format; see Other wire formats",
          responses={200: ("Response", '{"object":"response","output":[...],...}'),
                     400: OPENAI_ERROR}, error_statuses=(403, 504, 529)),
    Route("POST", "/v1/responses/input_tokens", AuthLevel.TOKEN, handle_count_input_tokens,
          "An estimate of the input tokens of such a request",
          responses={200: ("InputTokens", '{"object":"response.input_tokens","input_tokens":11}')}),
    Route("GET", "/v1/responses/:id", AuthLevel.TOKEN, handle_get_response, "A stored response",
          responses={200: ("Response", '{"id":"resp_...","object":"response",...}')}),
    Route("DELETE", "/v1/responses/:id", AuthLevel.TOKEN, handle_delete_response,
          "Forget a stored response; the request stays in the lists",
          responses={200: ("DeletedResponse",
                           '{"id":"resp_...","object":"response","deleted":true}')}),
    Route("GET", "/v1/models", AuthLevel.TOKEN, handle_list_models,
          "The models of `claude`, for all formats",
          responses={200: ("Models", '{"object":"list","data":[{"id":"sonnet",...}],...}')}),
    Route("GET", "/v1/models/:id", AuthLevel.TOKEN, handle_get_model, "One of them",
          responses={200: ("Model", '{"id":"sonnet","object":"model",...}')}),
    Route("POST", "/api/tokens", AuthLevel.ADMIN, handle_create_token, "Create a token",
          body_type=NewToken, responses={201: NEW_TOKEN}),
    Route("GET", "/api/tokens", AuthLevel.ADMIN, handle_list_tokens, "List all tokens",
          responses={200: ("Tokens", '{"tokens":[...]}')}),
    Route("PATCH", "/api/tokens/:id", AuthLevel.ADMIN, handle_update_token,
          "Change a token: what the body names", body_type=TokenUpdate,
          responses={200: ("Token", '{"ok":true,"id":ID,"name":"my-app",...}')}),
    Route("POST", "/api/tokens/:id/rotate", AuthLevel.ADMIN, handle_rotate_token,
          "Give a token another secret; the old one is refused from now on",
          responses={200: NEW_TOKEN}),
    Route("DELETE", "/api/tokens/:id", AuthLevel.ADMIN, handle_revoke_token,
          "Revoke a token; its running request is stopped",
          responses={200: ("Done", '{"ok":true,"message":"Token revoked"}')}),
    Route("POST", "/api/queue/pause", AuthLevel.ADMIN, partial(set_paused, is_paused=True),
          "Start no more requests; the running one continues, new ones wait",
          responses={200: ("Queue", '{"ok":true,"waitingFor":"paused"}')}),
    Route("POST", "/api/queue/resume", AuthLevel.ADMIN, partial(set_paused, is_paused=False),
          "Let the queue go on", responses={200: ("Queue", '{"ok":true}')}),
    Route("GET", "/api/status", AuthLevel.NOTHING, handle_status,
          "Queue and counters; more for an admin token",
          responses={
              200: ("Status", '{"status":"running","version":"...","queue":{...},"stats":{...}}')}),
    Route("GET", "/health", AuthLevel.NOTHING, handle_health,
          "200 while the worker and the database work; `degraded` while the API does not",
          responses={200: ("Health", '{"status":"ok"}')}),
    Route("GET", "/metrics", AuthLevel.ADMIN, handle_metrics, "Counters and gauges for Prometheus",
          responses={200: ("", "text")}),
    Route("GET", "/openapi.json", AuthLevel.NOTHING, handle_openapi,
          "This API for programs: OpenAPI 3.1",
          responses={200: ("OpenApi", '{"openapi":"3.1.0","paths":{...},...}')}),
    Route("GET", "/dashboard", AuthLevel.NOTHING, lambda context: context.status.page(),
          "The dashboard", responses={200: ("", "HTML")}),
    Route("GET", "/", AuthLevel.NOTHING, handle_root,
          "The list of endpoints, or the dashboard for a browser",
          responses={200: ("Root", '{"name":...,"endpoints":{...}}')}),
)  # fmt: skip


@lru_cache(maxsize=256)
def unknown_path_text(path: str) -> str:
    """Return what a client reads of a path that does not exist; below /v1, what does."""
    if not path.lower().startswith("/v1/"):
        return ""
    offered = ", ".join("%s %s" % (route.method, route.path) for route in ROUTES
                        if route.path.startswith("/v1/"))
    return ("There is no %s here: what Claude Code has not, such as embeddings, files, batches,"
            " images and audio, is not offered. The base URL is the address of the bridge, for"
            " OpenAI's clients with /v1. Offered: %s"
            % (escape_controls(replace_surrogates(path[:100]), keep=""), offered))


def resolve_route(method: str, path: str) -> Tuple[Route, Mapping[str, str]]:
    """Return the route of a request and the named parts of its path.
    Letters match in any case; one slash may follow. Raises NotFound; MethodNotAllowed with Allow;
    InvalidRequest for a bad percent escape."""
    if re.search(r"%(?![0-9A-Fa-f]{2})", path):
        raise InvalidRequest("The path holds a bad percent escape")
    if re.search("[^/]/$", path):
        path = path[:-1]
    path = wire_path(path)
    parts = [unquote(part) for part in path.split("/")]
    methods = set()
    is_literal = False
    for route in ROUTES:
        params = match_path(route.path, parts)
        # A path without named parts hides those that have some.
        if params is None or (params and is_literal):
            continue
        is_literal = not params
        methods.add(route.method)
        if route.method == ("GET" if method == "HEAD" else method):
            return route, params
    if not methods:
        raise NotFound(unknown_path_text(path))
    if "GET" in methods:
        methods.add("HEAD")
    allow = ", ".join(sorted(methods | {"OPTIONS"}))
    text = "%s is not allowed here. Use: %s" % (method[:20], allow)
    raise MethodNotAllowed(text, (("Allow", allow),))


def match_path(pattern: str, parts: Sequence[str]) -> Optional[Dict[str, str]]:
    """Return the named parts of a path, such as {"requestId": ...}; None if it does not match."""
    names = pattern.split("/")
    if len(names) != len(parts):
        return None
    params = {}
    for name, part in zip(names, parts):
        if name.startswith(":") and part:
            params[name[1:]] = part
        elif name != part.lower():
            return None
    return params


# --- /openapi.json ---
def schema_of(example: Any) -> Dict[str, Any]:
    """Return the JSON Schema of an example of RESPONSE_EXAMPLES."""
    if isinstance(example, dict):
        properties = {}
        for marked_name, value in example.items():
            schema = schema_of(value)
            if marked_name.endswith("~"):
                schema = {**schema, "type": [schema["type"], "null"]} if "type" in schema else {}
            properties[marked_name.rstrip("?~")] = schema
        required = [name.rstrip("~") for name in example if not name.endswith("?")]
        result: Dict[str, Any] = {"type": "object", "properties": properties}
        return {**result, "required": required} if required else result
    if isinstance(example, list):
        return {"type": "array", "items": schema_of(example[0])}
    if example is None or example == "none":
        return {}
    kinds = {str: "string", bool: "boolean", int: "number", float: "number"}
    return {"type": kinds[type(example)]}


def strip_markers(example: Any) -> Any:
    """Return an example of RESPONSE_EXAMPLES as it is on the wire."""
    if isinstance(example, dict):
        return {name.rstrip("?~"): strip_markers(value) for name, value in example.items()}
    return [strip_markers(item) for item in example] if isinstance(example, list) else example


@lru_cache(maxsize=1)
def openapi() -> Dict[str, Any]:
    """Return the routes as an OpenAPI 3.1 document."""
    paths: Dict[str, Dict[str, Any]] = {}
    for route in ROUTES:
        path = re.sub(r":(\w+)", r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = operation(route)
    schemas = {name: {**schema_of(example), "examples": [strip_markers(example)]}
               for name, example in RESPONSE_EXAMPLES.items()}
    for command in (Ask, NewToken, TokenUpdate):
        schemas[command.__name__ + "Body"] = command_schema(command)
    return {
        "openapi": "3.1.0", "paths": paths,
        "info": {"title": "claude-api-bridge", "version": __version__,
                 "summary": "A REST API for the Claude Code command line tool",
                 "license": {"name": "MIT", "identifier": "MIT"}},
        "components": {"schemas": schemas, "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"}}}}


def command_schema(command: Type[Command]) -> Dict[str, Any]:
    """Return the JSON Schema of a request body."""
    properties = {}
    for row in fields(command):  # type: ignore[arg-type]
        kinds = row.metadata["kind"].split(" or ")
        if row.default is None:
            kinds.append("null")
        properties[camel_case(row.name)] = {"type": kinds, "description": row.metadata["doc"],
                                            "examples": [row.metadata["example"]]}
    required = [name for name in ("message", "name")
                if name in properties and command is not TokenUpdate]
    return {"type": "object", "required": required, "properties": properties}


def schema_reference(name: str) -> Dict[str, Any]:
    return {"$ref": "#/components/schemas/" + name}


def operation(route: Route) -> Dict[str, Any]:
    """Return a route as an OpenAPI operation: parameters, body, answers and every error."""
    operation_id = "_".join(re.findall(r"\w+", route.method.lower() + route.path))
    needs_token = route.auth != AuthLevel.NOTHING
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                  for name in re.findall(r":(\w+)", route.path)]
    parameters += [{"name": name, "in": "query", "schema": {"type": kind}, "description": doc}
                   for name, (kind, doc) in route.query.items()]
    result: Dict[str, Any] = {
        "operationId": operation_id, "summary": route.doc,
        "security": [{"bearer": []}, {"key": []}] if needs_token else [], "parameters": parameters}
    ignores_body = route.path.endswith(("/events", "/rotate", "/pause", "/resume"))
    has_body = route.method in ("POST", "PATCH") and not ignores_body
    if has_body:
        schema = (schema_reference(route.body_type.__name__ + "Body") if route.body_type
                  else {"type": "object"})
        content = {"application/json": {"schema": schema}}
        result["requestBody"] = {"required": True, "content": content}
    responses = {str(status): success_response(route, status, name)
                 for status, (name, _) in route.responses.items() if name is not None}
    statuses = {400, 404, 405, 408, 417, 421, 429, 431, 500, 501, 503, 505, *route.error_statuses}
    if needs_token:
        statuses.add(401)
    if route.auth == AuthLevel.ADMIN:
        statuses.add(403)
    if has_body or ignores_body:
        statuses.update((413, 415))
    for status in sorted(statuses):
        responses.setdefault(str(status), error_response_schema(route, status))
    return {**result, "responses": responses}


def success_response(route: Route, status: int, name: str) -> Dict[str, Any]:
    """Return the OpenAPI response of a success. name: its schema, "" for a text or a stream."""
    content: Dict[str, Any] = {}
    if name:
        content["application/json"] = {"schema": schema_reference(name)}
    if not name or route.path == "/" or (status == 200 and route.method == "POST"):
        kinds = {"/": "text/html", "/dashboard": "text/html", "/metrics": "text/plain"}
        content[kinds.get(route.path, "text/event-stream")] = {"schema": {"type": "string"}}
    description = route.responses[status][1].replace("`", "")
    return {"description": description or HTTPStatus(status).phrase, "content": content}


def error_response_schema(route: Route, status: int) -> Dict[str, Any]:
    """Return the OpenAPI response of an error, with an example for each of its codes."""
    format = format_of(route.path, {})
    name = "Error"
    if format:
        name = "MessageError" if format is MESSAGES else "CompletionError"
    render = format.error if format else error_body
    kinds = [kind for kind in ERRORS if kind.status == status]
    content: Dict[str, Any] = {"schema": schema_reference(name)}
    if kinds:
        content["examples"] = {kind.code: {"value": render(kind())} for kind in kinds}
    description = " / ".join(kind.code for kind in kinds) or "the run failed"
    return {"description": description, "content": {"application/json": content}}


# === 13 HTTP server ==============================================================================
# Bytes in, bytes out. Pure part: parser and renderer of a head. Then who may pass (HostPolicy,
# RateLimiters, Dispatcher), a connection (ConnectionHandler), and all of them (BridgeServer).

HEAD_BYTES = 16_384
# After a refused body, how much of it and for how long is still read.
DRAIN_BYTES = 8 << 20
DRAIN_SECONDS = 2.0
# Large bodies and answers in memory, of all connections.
LARGE_PAYLOAD_BUDGET_BYTES = 32 << 20
# Bodies over 1 MiB that arrive, or whose requests are not stored yet, at the same time.
LARGE_BODIES = 4
# Bytes a second, beyond the time that any body has.
LARGE_BODY_RATE = 256 << 10
SEND_PIECE_BYTES = 1 << 18
CONNECTIONS = 256
HEAD_SECONDS = 10.0
BODY_SECONDS = 30.0
IDLE_SECONDS = 15.0
SEND_SECONDS = 30.0
# For an answer to a late request, before the connection is closed.
LATE_SECONDS = 2.0
# A send that is stalled for this long may be evicted.
EVICTABLE_SEND_SECONDS = 0.2
DEADLINE_POLL_SECONDS = 0.1
# <asm-generic/poll.h>; PyPy does not name it. 0 where there is none.
POLLRDHUP = getattr(select, "POLLRDHUP", 0x2000 if sys.platform == "linux" else 0)
# Client addresses that the rate limiters remember.
ADDRESSES = 10_000
LOGINS_PER_MINUTE = 10
# The bucket for polls is this many times the size of the others.
POLLS_PER_REQUEST = 5

STANDARD_HEADERS = (
    ("Content-Security-Policy", "default-src 'none';frame-ancestors 'none'"),
    ("Cross-Origin-Opener-Policy", "same-origin"), ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Origin-Agent-Cluster", "?1"), ("Referrer-Policy", "no-referrer"),
    ("X-Content-Type-Options", "nosniff"), ("X-DNS-Prefetch-Control", "off"),
    ("X-Download-Options", "noopen"), ("X-Frame-Options", "SAMEORIGIN"),
    ("X-Permitted-Cross-Domain-Policies", "none"), ("X-XSS-Protection", "0"),
    ("Cache-Control", "no-store"), ("Access-Control-Allow-Origin", "*"),
    ("Access-Control-Expose-Headers",
     "Allow, Idempotent-Replayed, RateLimit-Limit, RateLimit-Policy, RateLimit-Remaining,"
     " RateLimit-Reset, Request-Id, Retry-After, X-Request-Id"))
PREFLIGHT_HEADERS = (
    ("Access-Control-Allow-Methods", "GET,POST,PATCH,DELETE"),
    ("Access-Control-Allow-Headers",
     "Content-Type,Authorization,X-Api-Key,Idempotency-Key,Last-Event-ID,*"),
    ("Access-Control-Max-Age", "600"))


# --- heads ---
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
REQUEST_LINE_RE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([\x21-\x7e]+) HTTP/(\d)\.(\d)")
# There is one way to match, so that it is never slow.
HEADER_LINE_RE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([ \t\x21-\x7e\x80-\xff]*)")
ABSOLUTE_TARGET_RE = re.compile(
    r"https?://([A-Za-z0-9._\[][A-Za-z0-9._:\[\]-]*)(/[^?]*)?(\?.*)?", re.IGNORECASE)
SINGLE_HEADERS = ("host", "content-length", "transfer-encoding", "authorization")


class RequestHead(NamedTuple):
    """What stands before a body. headers: by lower-case names. length: of the body in bytes, None
    if it is chunked. expects_continue: the client waits for a 100 before it sends the body.
    close_connection: the connection ends with the answer. version: "1.0" or "1.1"."""
    method: str
    path: str
    query: Mapping[str, str]
    version: str
    headers: Mapping[str, str]
    length: Optional[int]
    expects_continue: bool
    close_connection: bool


def parse_request_head(block: bytes) -> RequestHead:
    """Parse a head strictly. CRLF ends lines, nothing is folded, there are no control characters,
    one Host and one length. The lenient parser of http.server accepts two differing lengths or a
    bare CR. After an error the connection must be closed, because nobody knows where the next
    request begins. Raises MalformedRequest, UnknownVersion, UnknownCoding, ExpectationFailed."""
    if not block.endswith(b"\r\n\r\n"):
        # A blank line behind a line that ends in a bare LF.
        raise MalformedRequest("Malformed header line")
    first, *lines = block[:-4].split(b"\r\n")
    match = REQUEST_LINE_RE.fullmatch(first)
    if not match:
        raise MalformedRequest("Malformed request line")
    method, target, major, minor = (part.decode("latin-1") for part in match.groups())
    if major != "1":
        raise UnknownVersion()
    version = "1.0" if minor == "0" else "1.1"
    headers = parse_headers(lines)
    if version == "1.1" and "host" not in headers:
        raise MalformedRequest("Host header is missing")
    path, query = parse_target(method, target, headers)
    length = parse_body_length(headers, version)
    expect = headers.get("expect", "").lower()
    if expect not in ("", "100-continue"):
        raise ExpectationFailed()
    options = [option.strip().lower() for option in headers.get("connection", "").split(",")]
    wants_close = "close" in options or (version == "1.0" and "keep-alive" not in options)
    return RequestHead(
        method, path, dict(parse_qsl(query, keep_blank_values=True)) if query else {}, version,
        headers, length, bool(expect) and version == "1.1", wants_close)


def parse_target(method: str, target: str, headers: Dict[str, str]) -> Tuple[str, str]:
    """Return (path, query). The host of an absolute target replaces the Host header."""
    if not target.startswith("/"):
        absolute = ABSOLUTE_TARGET_RE.fullmatch(target)
        if absolute:
            headers["host"] = absolute.group(1)
            target = (absolute.group(2) or "/") + (absolute.group(3) or "")
        elif (method, target) == ("OPTIONS", "*"):
            target = "/"
        elif method in METHODS:
            raise MalformedRequest("Malformed request line")
    path, _, query = target.partition("?")
    return path, query


def parse_headers(lines: Iterable[bytes]) -> Dict[str, str]:
    """Return headers by lower-case names. Repeated ones are joined, if they may be repeated."""
    headers: Dict[str, str] = {}
    for line in lines:
        match = HEADER_LINE_RE.fullmatch(line)
        if not match:
            raise MalformedRequest("Malformed header line")
        name = match.group(1).decode("latin-1").lower()
        value = match.group(2).strip(b" \t").decode("latin-1")
        if name in headers:
            if name in SINGLE_HEADERS:
                raise MalformedRequest("Repeated %s header" % name)
            value = headers[name] + ", " + value
        headers[name] = value
    return headers


def parse_body_length(headers: Mapping[str, str], version: str) -> Optional[int]:
    """Return the length of the body; None: chunked. Two lengths could smuggle a second request."""
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if length is not None or version == "1.0":
            raise MalformedRequest("Transfer-Encoding with Content-Length or HTTP/1.0")
        if coding.lower() != "chunked":
            text = "Transfer-Encoding %s is not supported. Use Content-Length or chunked"
            raise UnknownCoding(text % coding[:40])
        return None
    if length is None:
        return 0
    if not re.fullmatch(r"[0-9]{1,15}", length):
        raise MalformedRequest("Malformed Content-Length")
    return int(length)


def render_head(response: Response, close_connection: bool) -> bytes:
    """Return status line and headers, the Date last."""
    length = None if response.stream is not None else len(response.body)
    head = _render_head_cached(
        response.status, response.content_type, response.headers, length, close_connection)
    return head + _date_line(int(time.time()))


# Without the cache a poll takes 1.5 times as long.
@lru_cache(maxsize=256)
def _render_head_cached(status: int, content_type: str, extra_headers: Tuple[Tuple[str, str], ...],
                        length: Optional[int], close_connection: bool) -> bytes:
    """Return a head without its Date. extra_headers replace standard ones. length: None: stream."""
    names = {name for name, _ in extra_headers}
    headers = [header for header in STANDARD_HEADERS if header[0] not in names]
    headers += extra_headers
    if status != 204:
        headers.append(("Content-Type", content_type))
        if length is not None:
            headers.append(("Content-Length", str(length)))
        elif not close_connection:
            headers.append(("Transfer-Encoding", "chunked"))
    headers.append(("Connection", "close" if close_connection else "keep-alive"))
    phrase = "Overloaded" if status == 529 else HTTPStatus(status).phrase
    lines = ["HTTP/1.1 %d %s\r\n" % (status, phrase)]
    lines += ["%s: %s\r\n" % header for header in headers]
    return "".join(lines).encode("latin-1", "replace")


@lru_cache(maxsize=1)
def _date_line(now: int) -> bytes:
    """Return the last header and the end of the head."""
    return ("Date: %s\r\n\r\n" % formatdate(now, usegmt=True)).encode()


# --- who may pass ---
def bearer(headers: Mapping[str, str]) -> Optional[str]:
    """Return the T of `Authorization: Bearer T` (scheme in any case) or `x-api-key: T`; or None."""
    scheme, _, value = headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return headers.get("x-api-key", "").strip() or None


@lru_cache(maxsize=256)
def host_name(header: str) -> str:
    """Return the name in a Host header, without the port."""
    return re.sub(r":\d*$", "", header).rstrip(".").lower()


@lru_cache(maxsize=256)
def is_address(text: str) -> bool:
    """Return whether it is an IP address; version 6 may stand in brackets."""
    if text[:1] == "[" and text[-1:] == "]":
        text = text[1:-1]
    try:
        ipaddress.ip_address(text)
        return True
    except ValueError:
        return False


class HostPolicy:
    """The names of this bridge. local_hosts: names besides those of this machine. tunnel_hosts:
    returns the names by which requests arrive through the tunnel, while it runs."""

    def __init__(self, local_hosts: Iterable[str] = (),
                 tunnel_hosts: Callable[[], FrozenSet[str]] = frozenset) -> None:
        machine = socket.gethostname().lower()
        short = machine.partition(".")[0]
        names = (*local_hosts, "localhost", machine, short, short + ".local")
        self._local_hosts = frozenset(name.lower() for name in names if name)
        self._tunnel_hosts = tunnel_hosts

    def check(self, request: Request) -> None:
        """Raise UnknownHost for a name that is not ours, as DNS rebinding needs one: another site
        could lead a browser here and read the answers. An IP address cannot be such a name."""
        host = host_name(request.headers.get("host", ""))
        if not host or host in self._local_hosts or is_address(host):
            return
        if host not in self._tunnel_hosts():
            shown = host[:100]
            raise UnknownHost(
                "This bridge does not serve the host name %s. If the name is yours, start the"
                " bridge with --names %s" % (shown, shown))

    def client_address(self, request: Request) -> str:
        """Return the client's address, for version 6 its network. For requests through our tunnel
        it is the one that Cloudflare reports."""
        address = request.address
        is_local = address in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
        reported = request.headers.get("cf-connecting-ip", "")
        if (is_local or address in self._local_hosts) and is_address(reported):
            if host_name(request.headers.get("host", "")) in self._tunnel_hosts():
                address = reported
        if ":" in address and is_address(address):
            # One household has 2^64 addresses.
            address = address.strip("[]").partition("%")[0]
            return str(ipaddress.ip_network((address, 64), strict=False))
        return address


class RateLimiters:
    """The rate limits. Any thread.
    One bucket for all token holders, one per address without a token, one per token for polls of
    its own unfinished requests, and one per address for failed log-ins, which is always on."""

    def __init__(self, clock: Clock, capacity: int) -> None:
        self._clock = clock
        self._capacities = {"anonymous": capacity, "login": LOGINS_PER_MINUTE,
                            "polls": capacity * POLLS_PER_REQUEST}
        self._lock = threading.Lock()
        self._by_key: "OrderedDict[Tuple[str, str], TokenBucket]" = OrderedDict()
        self.authenticated = TokenBucket(clock, capacity)

    def bucket(self, kind: str, name: str) -> TokenBucket:
        """Return the bucket of an address (anonymous, login) or token (polls); evict the oldest."""
        with self._lock:
            bucket = self._by_key.pop((kind, name), None)
            bucket = bucket or TokenBucket(self._clock, self._capacities[kind])
            self._by_key[kind, name] = bucket
            while len(self._by_key) > ADDRESSES:
                self._by_key.popitem(last=False)
        return bucket


def consume_or_raise(bucket: TokenBucket) -> None:
    """Take one request from the bucket. Raises RateLimited."""
    seconds = bucket.try_consume()
    if seconds:
        error = retry_later(RateLimited, "", seconds)
        error.headers += bucket.headers()
        raise error


def error_response(error: BridgeError, format: Optional[Format] = None) -> Response:
    """Return an error in the words of a wire format; None: in the native ones."""
    headers = error.headers
    if error.status == 401:
        headers += (("WWW-Authenticate", "Bearer"),)
    if format:
        request_id = "req_" + secrets.token_hex(12)
        headers += (("request-id", request_id), ("x-request-id", request_id))
        if error.extra.get("retryAfter", 0) > 60:
            # Some libraries would wait for that, however long it is.
            headers += (("x-should-retry", "false"),)
    render = format.error if format else error_body
    return json_response(error.status, render(error), headers)


@dataclass(eq=False)
class Dispatcher:
    """Turns a Request into a Response: host, route, caller, limits, handler. Any thread."""
    _service: Service
    _status: StatusSource
    _limiters: RateLimiters
    _hosts: HostPolicy
    _metrics: Metrics

    def dispatch(self, request: Request) -> Response:
        response = self._respond(request)
        self._metrics.inc("cab_http_responses_total", status=str(response.status))
        return response

    def _respond(self, request: Request) -> Response:
        try:
            self._hosts.check(request)
            if request.method == "OPTIONS":
                return Response(204, headers=PREFLIGHT_HEADERS)
            return self._answer(request)
        except BridgeError as error:
            return error_response(error, format_of(request.path, request.headers))
        except (ConnectionError, socket.timeout):
            raise
        except Exception:
            logger.exception("Unexpected error in %s %s", request.method, request.path)
            return error_response(BridgeError(), format_of(request.path, request.headers))

    def _answer(self, request: Request) -> Response:
        caller, error = self._authenticate(request)
        route: Optional[Route] = None
        params: Mapping[str, str] = {}
        try:
            route, params = resolve_route(request.method, request.path)
        except BridgeError as routing_error:
            error = routing_error
        bucket = self._bucket(route, caller, request, params)
        consume_or_raise(bucket)
        try:
            if route is None or (caller is None and route.auth != AuthLevel.NOTHING):
                raise error or MissingToken()
            if route.auth == AuthLevel.ADMIN and not (caller and caller.is_admin):
                raise AdminRequired()
            context = Context(self._service, self._status, caller, request, params)
            response = route.handle(context)
        except (RateLimited, DailyLimit):
            # Of the token's own limits, which carry their own figures.
            raise
        except BridgeError as handler_error:
            handler_error.headers += bucket.headers()
            raise
        limits = bucket.headers()
        return response._replace(headers=response.headers + limits) if limits else response

    def _authenticate(self, request: Request) -> Tuple[Optional[Caller], Optional[BridgeError]]:
        """Return the caller, or why its token is refused; (None, None) without a token. Raises
        RateLimited after too many wrong tokens from one address; a valid one passes."""
        secret = bearer(request.headers)
        if secret is None:
            return None, None
        try:
            return self._service.authenticate(secret), None
        except InvalidToken as error:
            consume_or_raise(self._limiters.bucket("login", self._hosts.client_address(request)))
            return None, error

    def _bucket(self, route: Optional[Route], caller: Optional[Caller], request: Request,
                params: Mapping[str, str]) -> TokenBucket:
        """Return the bucket of a request; a poll with `wait` counts like any other request."""
        if caller is None:
            return self._limiters.bucket("anonymous", self._hosts.client_address(request))
        if route and route.uses_poll_limiter and "wait" not in request.query:
            if self._service.is_own_unfinished(caller, params["requestId"]):
                return self._limiters.bucket("polls", caller.id)
        return self._limiters.authenticated


# --- one connection ---
class Phase:
    """What a connection is doing; all but a BUSY one may be closed to make room."""
    IDLE, HEAD, BODY, BUSY, SEND = "idle", "head", "body", "busy", "send"
    SECONDS = {IDLE: IDLE_SECONDS, HEAD: HEAD_SECONDS, BODY: BODY_SECONDS, BUSY: float("inf"),
               SEND: SEND_SECONDS}


class ConnectionState:
    """The phase of a connection and its deadline. Only its thread changes the phase; others read it
    and may shut the socket down, and set is_late and late_deadline: the request missed its deadline
    and gets a 408. since: when its last request was complete."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.is_late = False
        self.late_deadline = 0.0
        self.set_phase(Phase.IDLE)

    def set_phase(self, phase: str) -> None:
        now = self._clock.monotonic()
        if phase not in (Phase.HEAD, Phase.BODY):
            self.since = now
        self.deadline = now + Phase.SECONDS[phase]
        self.phase = phase


class ConnectionHandler(BaseHTTPRequestHandler):
    """One connection. It decides what is HTTP, strictly, so that no request can hide another."""
    # The server ends late connections. Windows alone does not wake a blocked call.
    timeout = SEND_SECONDS if os.name == "nt" else None
    disable_nagle_algorithm = True
    server: "BridgeServer"

    def setup(self) -> None:
        super().setup()
        self._state = self.server.state_of(self.connection)
        self._large_body = contextlib.ExitStack()

    def handle_one_request(self) -> None:
        """Read one request and answer it. The base's method answers bad heads in HTML."""
        self.close_connection = True
        self.command = ""
        # Bytes of the body to come; None: chunked, or unknown.
        self._body_remaining: Optional[int] = None
        self._expects_continue = False
        try:
            self._state.set_phase(Phase.IDLE)
            # An idle connection counts as such until the first byte.
            if not self.rfile.peek(1):  # type: ignore[attr-defined]
                return
            self._state.set_phase(Phase.HEAD)
            try:
                self._head = self._read_head()
            except BridgeError as error:
                self._write(error_response(error))
                return
            self._handle_request()
        except (ConnectionError, socket.timeout, ValueError):
            self.close_connection = True

    def _read_head(self) -> RequestHead:
        """Read up to and including the blank line. Raises a BridgeError, such as HeadTooLarge."""
        lines = [self._read_line()]
        if lines[0] == b"\r\n":
            # One blank line may precede a request.
            lines = [self._read_line()]
        # The answer to HEAD has no body, whatever else is wrong.
        if lines[0].startswith(b"HEAD "):
            self.command = "HEAD"
        size = len(lines[0])
        while lines[-1] != b"\r\n":
            lines.append(self._read_line())
            size += len(lines[-1])
            if size > HEAD_BYTES:
                raise HeadTooLarge()
        head = parse_request_head(b"".join(lines))
        if head.method not in METHODS:
            raise UnknownCoding()
        self.command = head.method
        self.close_connection = head.close_connection
        self._body_remaining = head.length
        self._expects_continue = head.expects_continue
        return head

    def _read_line(self) -> bytes:
        line = self.rfile.readline(HEAD_BYTES + 1)
        if line.endswith(b"\r\n"):
            return line
        if len(line) > HEAD_BYTES:
            raise HeadTooLarge()
        if line.endswith(b"\n"):
            raise MalformedRequest("Malformed header line: lines must end with CRLF")
        raise self._incomplete("The request head is incomplete")

    def _incomplete(self, text: str) -> BridgeError:
        return RequestTimeout() if self._state.is_late else MalformedRequest(text)

    def _handle_request(self) -> None:
        self._state.set_phase(Phase.BUSY)
        head = self._head
        request = Request(head.method, head.path, head.query, head.headers, self.client_address[0],
                          self._body, self._client_disconnected, self._large_body.close)
        with self._large_body:
            response = self.server.dispatcher.dispatch(request)
        # A small body that nobody read is skipped; otherwise the connection ends.
        size = self._body_remaining
        if size is None or size > 1 << 16 or (size and self._expects_continue):
            self.close_connection = True
        if response.stream is None:
            self._write(response)
        else:
            self._write_stream(response, response.stream)
        if self._body_remaining and not self.close_connection:
            self._state.set_phase(Phase.BODY)
            body = self.rfile.read(self._body_remaining)
            self.close_connection = len(body) < self._body_remaining

    # --- the body ---
    def _body(self) -> Union[bytes, SpooledBody]:
        """Return the whole body. Raises a BridgeError, such as BodyTooLarge."""
        if self._head.headers.get("content-encoding", "identity").lower() != "identity":
            raise UnsupportedEncoding()
        size = self._body_remaining
        limit = self.server.wire_body_bytes if format_of(self._head.path, {}) else BODY_BYTES
        if size is not None and size > limit:
            raise BodyTooLarge("Body exceeds %d byte limit" % limit)
        if self._expects_continue and size != 0:
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._expects_continue = False
        self._state.set_phase(Phase.BODY)
        try:
            with contextlib.ExitStack() as reservation:
                body: Union[bytes, SpooledBody]
                if size is None:
                    body = self._read_chunks(reservation, limit)
                else:
                    memory = self.server.reserve_memory(self.connection, min(size, BODY_BYTES))
                    reservation.enter_context(memory)
                    read = self._read_exactly if size <= BODY_BYTES else self._read_large
                    body = read(size)
        except (MalformedRequest, RequestTimeout, BodyTooLarge, Unavailable):
            self._body_remaining = None
            raise
        self._state.set_phase(Phase.BUSY)
        self._body_remaining = 0
        return body

    def _read_large(self, size: int) -> SpooledBody:
        """Read a body into a file."""
        file = self._open_spool()
        self._state.set_phase(Phase.BODY)
        self._state.deadline += size / LARGE_BODY_RATE
        while size:
            piece = self._read_exactly(min(size, BODY_BYTES))
            self._write_spool(file, piece)
            size -= len(piece)
        return SpooledBody(file)

    def _open_spool(self) -> IO[bytes]:
        """Return a file for a large body. Raises Unavailable if too many are there."""
        if not self.server.large_bodies.acquire(timeout=BODY_SECONDS / 2):
            raise retry_later(Unavailable, "Too many large requests arrive at once.", 5)
        self._large_body.callback(self.server.large_bodies.release)
        try:
            return self._large_body.enter_context(tempfile.TemporaryFile())
        except OSError as error:
            raise Unavailable("A large body cannot be stored: %s." % error.strerror) from None

    @staticmethod
    def _write_spool(file: IO[bytes], data: Union[bytes, bytearray]) -> None:
        try:
            file.write(data)
        except OSError as error:
            raise Unavailable("A large body cannot be stored: %s." % error.strerror) from None

    def _read_exactly(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise self._incomplete("The body is incomplete")
        return data

    def _read_chunks(self, reservation: contextlib.ExitStack,
                     limit: int) -> Union[bytes, SpooledBody]:
        """Read a chunked body strictly: sizes in plain hex, short extensions, trailers dropped."""
        # Not a list of chunks, which may have one byte each.
        data = bytearray()
        total = 0
        file: Optional[IO[bytes]] = None
        while True:
            line = self.rfile.readline(1026)
            match = re.fullmatch(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n", line)
            if not match:
                raise self._incomplete("Malformed chunk")
            size = int(match.group(1), 16)
            total += size
            if total > limit:
                raise BodyTooLarge("Body exceeds %d byte limit" % limit)
            if not size:
                break
            if total - size < LARGE_BYTES <= total:
                reserved = self.server.reserve_memory(self.connection, BODY_BYTES)
                reservation.enter_context(reserved)
            for start in range(0, size, BODY_BYTES):
                data += self._read_exactly(min(size - start, BODY_BYTES))
                if len(data) > BODY_BYTES:
                    self._state.deadline += len(data) / LARGE_BODY_RATE
                    file = file or self._open_spool()
                    self._write_spool(file, data)
                    data.clear()
            if self._read_exactly(2) != b"\r\n":
                raise MalformedRequest("Malformed chunk")
        for _ in range(64):
            line = self.rfile.readline(HEAD_BYTES)
            if line == b"\r\n":
                if not file:
                    return bytes(data)
                self._write_spool(file, data)
                return SpooledBody(file)
            if not line.endswith(b"\r\n") or not HEADER_LINE_RE.fullmatch(line[:-2]):
                break
        if self._state.is_late and not line.endswith(b"\n"):
            raise RequestTimeout()
        raise MalformedRequest("Malformed trailer")

    def _client_disconnected(self) -> bool:
        """Return whether the client closed its side; what it sent before stays readable."""
        if POLLRDHUP:
            # Sees the end also behind the bytes of a next request.
            poller = select.poll()
            poller.register(self.connection, POLLRDHUP)
            return bool(poller.poll(0))
        bsd: Any = select
        if hasattr(bsd, "kqueue"):
            # The same on macOS and BSD. Source: kqueue(2), EVFILT_READ, EV_EOF.
            with contextlib.closing(bsd.kqueue()) as kernel_queue:
                reading = bsd.kevent(self.connection, bsd.KQ_FILTER_READ)
                events = kernel_queue.control([reading], 1, 0)
                return any(event.flags & bsd.KQ_EV_EOF for event in events)
        try:
            self.connection.settimeout(0)
            return not self.connection.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            return True
        finally:
            self.connection.settimeout(self.timeout)

    # --- the answer ---
    def _write(self, response: Response) -> None:
        """Send an answer, in one piece unless it is large."""
        data = render_head(response, self.close_connection)
        body = b"" if self.command == "HEAD" else response.body
        if len(body) < LARGE_BYTES:
            self._send(data + body)
        else:
            self._send(data)
            self._send(body)
        if self.close_connection and self._body_remaining != 0:
            self._drain()

    def _send(self, data: bytes) -> None:
        """Send bytes; a slow reader may take SEND_SECONDS for each piece."""
        if len(data) <= SEND_PIECE_BYTES:
            self._state.set_phase(Phase.SEND)
            self.connection.sendall(data)
        else:
            view = memoryview(data)
            with self.server.reserve_memory(self.connection, len(data)):
                for start in range(0, len(data), SEND_PIECE_BYTES):
                    self._state.set_phase(Phase.SEND)
                    self.connection.sendall(view[start : start + SEND_PIECE_BYTES])
        self._state.set_phase(Phase.BUSY)

    def _write_stream(self, response: Response, pieces: BodyIterator) -> None:
        """Send pieces as they come: chunked, or until the connection closes."""
        if self._head.version == "1.0":
            self.close_connection = True
        is_chunked = not self.close_connection
        with contextlib.closing(pieces):
            self._send(render_head(response, self.close_connection))
            if self.command == "HEAD":
                return
            for piece in pieces:
                self._send(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
            if is_chunked:
                self._send(b"0\r\n\r\n")

    def _drain(self) -> None:
        """After a refused body, read on for a moment; a reset would lose the answer."""
        self._state.set_phase(Phase.BODY)
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + DRAIN_SECONDS
            budget = DRAIN_BYTES
            while budget > 0 and time.monotonic() < deadline:
                self.connection.settimeout(max(0.001, deadline - time.monotonic()))
                data = self.rfile.read1(1 << 16)
                if not data:
                    break
                budget -= len(data)


# --- all connections ---
class BridgeServer(ThreadingHTTPServer):
    """Owns the listening socket, the thread "http" and one thread per connection.
    dispatcher: set before `start`. The port is bound first, because everything else may change the
    data. wire_body_bytes: the largest body below /v1. Raises OSError."""
    request_queue_size = 128
    daemon_threads = True
    dispatcher: Dispatcher

    def __init__(self, host: str, port: int, clock: Clock) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._clock = clock
        self._lock = threading.Lock()
        self._connections: Dict[socket.socket, ConnectionState] = {}
        # Bytes of large payloads in memory, the oldest first.
        self._reserved: Dict[socket.socket, int] = {}
        self.wire_body_bytes = BODY_BYTES
        self.large_bodies = threading.BoundedSemaphore(LARGE_BODIES)
        self._checked_at = 0.0
        self._thread = threading.Thread(
            target=self.serve_forever, args=(0.2,), name="http", daemon=True)
        super().__init__((host, port), ConnectionHandler)

    def server_bind(self) -> None:
        """Bind without the base's look-up of the host's name, which can take seconds."""
        # Windows: otherwise another program may take the port, too, by SO_REUSEADDR.
        option = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
        self.socket.setsockopt(socket.SOL_SOCKET, option, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name = str(self.server_address[0])
        self.server_port = int(self.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def stop_accepting(self) -> None:
        if self._thread.ident:
            self.shutdown()
        self.socket.close()

    def close(self) -> None:
        """Let answers that are being made go out, then end every connection. Idempotent."""
        self.stop_accepting()
        deadline = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < deadline and self._is_answering():
            time.sleep(0.01)
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            shutdown_socket(connection)
        while time.monotonic() < deadline + 1 and self.connection_count:
            time.sleep(0.01)
        self.server_close()

    def _is_answering(self) -> bool:
        with self._lock:
            return any(state.phase in (Phase.BUSY, Phase.SEND)
                       for state in self._connections.values())

    @property
    def connection_count(self) -> int:
        return len(self._connections)

    def state_of(self, connection: socket.socket) -> ConnectionState:
        """Return the state of a connection; an unused one if it was evicted meanwhile."""
        with self._lock:
            return self._connections.get(connection) or ConnectionState(self._clock)

    def get_request(self) -> Tuple[socket.socket, Any]:
        """Accept a connection; evict one when the system has no file or memory left."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                with self._lock:
                    self._evict_idle(self._clock.monotonic())
                # Its thread closes the socket; without the pause this loop would spin.
                time.sleep(0.02)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for the connection. At the cap evict one; answer 503 if all are busy."""
        if not self._admit(request):
            self._reject(request)
            return
        threading.Thread(target=self.process_request_thread, args=(request, client_address),
                         name="http-%s:%s" % tuple(client_address[:2]), daemon=True).start()

    def _admit(self, connection: socket.socket) -> bool:
        with self._lock:
            is_full = len(self._connections) >= CONNECTIONS
            if is_full and not self._evict_idle(self._clock.monotonic()):
                return False
            self._connections[connection] = ConnectionState(self._clock)
        return True

    def _evict_idle(self, now: float) -> bool:
        """Under the lock, end the connection longest without a request. -> False: all are busy."""
        def is_evictable(connection: socket.socket) -> bool:
            state = self._connections[connection]
            if state.phase == Phase.SEND:
                return now - state.since >= EVICTABLE_SEND_SECONDS
            return state.phase != Phase.BUSY

        evictable = list(filter(is_evictable, self._connections))
        if not evictable:
            return False
        oldest = min(evictable, key=lambda connection: self._connections[connection].since)
        del self._connections[oldest]
        shutdown_socket(oldest)
        return True

    def _reject(self, request: Any) -> None:
        """Answer 503 from the accepting thread, which must never wait."""
        text = "Too many connections. Please try again later."
        response = error_response(Unavailable(text, (("Retry-After", "1"),)))
        with contextlib.suppress(OSError):
            request.setblocking(False)
            request.send(render_head(response, True) + response.body)
            request.shutdown(socket.SHUT_WR)
            # Unread data would turn the close into a reset, and lose the answer.
            for _ in range(16):
                if not request.recv(1 << 16):
                    break
        super().shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.pop(request, None)
        super().shutdown_request(request)

    @contextlib.contextmanager
    def reserve_memory(self, connection: socket.socket, size: int) -> Iterator[None]:
        """Reserve memory for a large payload; over budget, close the oldest such connections."""
        if size < LARGE_BYTES:
            yield
            return
        with self._lock:
            self._reserved[connection] = size
            for other in list(self._reserved):
                total = sum(self._reserved.values())
                if total <= LARGE_PAYLOAD_BUDGET_BYTES or other is connection:
                    break
                del self._reserved[other]
                shutdown_socket(other)
        try:
            yield
        finally:
            with self._lock:
                self._reserved.pop(connection, None)

    def service_actions(self) -> None:
        """Close the connections past their deadline; the base calls this five times a second."""
        now = self._clock.monotonic()
        if now - self._checked_at < DEADLINE_POLL_SECONDS:
            return
        self._checked_at = now
        with self._lock:
            late = [item for item in self._connections.items() if now >= item[1].deadline]
        for connection, state in late:
            is_reading = state.phase in (Phase.HEAD, Phase.BODY)
            if is_reading and not state.is_late:
                # Its thread reads the end of the request and answers 408.
                state.is_late = True
                state.late_deadline = now + LATE_SECONDS
                shutdown_socket(connection, socket.SHUT_RD)
            elif not is_reading or now >= state.late_deadline:
                shutdown_socket(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an error, unless the client merely disconnected."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, socket.timeout)):
            logger.exception("Unexpected error on a connection")


def shutdown_socket(connection: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    """End a connection from outside its thread: the thread's read returns, and it cleans up."""
    with contextlib.suppress(OSError):
        connection.shutdown(how)


# === 14 Tunnel ===================================================================================
# The public address, by cloudflared. Pure part: its release files, command line, log and the policy
# of starts and retries. Then the download, one process, and the Tunnel that owns it.
# Source, unless named: every flag and log line seen on 2026.8.2.

CLOUDFLARED_VERSION = "2026.8.2"
# The last lines of cloudflared's log, which explain a failure, and the length of one.
LOG_LINES = 200
LOG_LINE_BYTES = 4_096
UNPACKED_BYTES = 200 << 20
DOWNLOAD_SECONDS = 900.0
# For cloudflared to get an address.
ADDRESS_SECONDS = 30.0
# To connect by one protocol; the last one gets longer. A named tunnel changes it after 125 s.
CONNECT_SECONDS = 30.0
LAST_CONNECT_SECONDS = 90.0
NAMED_CONNECT_SECONDS = 180.0
# Without a connection for this long, a tunnel is restarted.
DOWN_SECONDS = 120.0
# With a connection for this long, its failures are forgotten.
STEADY_SECONDS = 300.0
TUNNEL_BACK_OFF_SECONDS = (5.0, 15.0, 60.0, 300.0, 900.0)
# How often a running tunnel is probed.
READY_SECONDS = 5.0


class TunnelState:
    """The state of the public address. STARTING and BACKOFF pass by themselves, FATAL does not."""
    STARTING, RUNNING, BACKOFF, FATAL = "starting", "running", "backoff", "fatal"
    STOPPING, STOPPED = "stopping", "stopped"


# --- the release ---
class Asset(NamedTuple):
    """A file of cloudflared's release. program_sha256: of the program, if it is an archive."""
    name: str
    size: int
    sha256: str
    program_sha256: str = ""


# Source: three independent lists of hashes by other projects; linux-386 and linux-arm: one.
RELEASE = """\
linux-amd64       39799316 fcfb02b575a52ca1af2e3267af4e1517bcdeb30ac48c834c69abaed3c0576ad2
linux-arm64       37404344 7747d94570fb390cf47dcb4f9555c193c6355cda9793f0d878d9049e5d6a7790
linux-386         37102345 39845d980a4b74b9c84530a28d8fea1fe6c476de26460275602162b349f1cbef
linux-arm         36288720 19809425f60a6261241dfa66a42b4115bab07c295396a3c4d5d7c247fc4e1412
darwin-amd64.tgz  21116242 f1727723c586500e2092368ae21871b3df7ddfd2cb097f22d81bee4a9c458bb4 \
                           b0f770e1e0b281399a57219b840fd8eef1cc25387a404124248157ea2073727a
darwin-arm64.tgz  19214189 9042c2c5d8b2de78e60f313d5fb31b6c5c1cebde787a3caf1f2c9588084ac442 \
                           b61054d3d6326ea558cb49826eebf5676e0d0a36d51b546975096ca3e0e3c89d
windows-amd64.exe 54893480 c29eee2b121f5436a642eed69fd9767da7e7b8c510fa50aaa130337f931357b5
windows-386.exe   37369480 6acb072357618fa16c53c43e05438ed728aacd47119f1c6c3aa1a668c3299b43"""
ASSETS = {name.partition(".")[0]: Asset("cloudflared-" + name, int(size), *hashes)
          for name, size, *hashes in map(str.split, RELEASE.splitlines())}
PROCESSORS = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64",
              "i386": "386", "i486": "386", "i586": "386", "i686": "386", "x86": "386",
              "armv6l": "arm", "armv7l": "arm", "armv8l": "arm"}


def cloudflared_asset(system: str, machine: str) -> Optional[Asset]:
    """Return the file for a system and a processor, as `platform` names them; None if none exists.
    Windows on ARM emulates amd64."""
    processor = PROCESSORS.get(machine.lower(), "")
    if system.lower() == "windows" and processor == "arm64":
        processor = "amd64"
    return ASSETS.get("%s-%s" % (system.lower(), processor))


# --- command line, environment, log ---
def tunnel_argv(
        program: str, config_file: str, origin: str, protocol: str, is_named: bool) -> List[str]:
    """Return the command line of cloudflared.
    config_file: an empty one, otherwise the owner's would answer in our place. origin: our own
    address. protocol: quic, http2, or auto for a named tunnel."""
    argv = [program, "tunnel", "--config", config_file, "--no-autoupdate",
            "--metrics", "127.0.0.1:0", "--grace-period", "5s"]
    if protocol != "auto":
        argv += ["--protocol", protocol]
    return argv + (["run"] if is_named else ["--url", origin])


TUNNEL_ENV = re.compile(
    r"PATH|HOME|USER|USERPROFILE|LANG|LC_\w+|TZ|TMPDIR|TEMP|TMP|SYSTEMROOT|WINDIR|"
    r"(LOCAL)?APPDATA|SSL_CERT_\w+", re.IGNORECASE)


def tunnel_environment(environ: Mapping[str, str], token: str) -> Dict[str, str]:
    """Return only the variables that every program needs, so that no secrets leak."""
    result = {name: value for name, value in environ.items() if TUNNEL_ENV.fullmatch(name)}
    if token:
        result["TUNNEL_TOKEN"] = token
    return result


def check_tunnel_token(text: str) -> str:
    """Return the token of a named tunnel. Raises WrongSetting, which does not repeat it."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        parts = json.loads(base64.b64decode(text.strip(), validate=True))
        if all(isinstance(parts[name], str) for name in "ats"):
            return text.strip()
    raise WrongSetting(
        "The tunnel token is not valid: copy the whole text that starts with eyJ from the tunnel's"
        " page.")


QUICK_HOST_RE = re.compile(r"(?!api\.)[a-z0-9-]+\.trycloudflare\.com")
HOST_LINE_RE = re.compile(r"\|\s+https://(%s)\s+\|" % QUICK_HOST_RE.pattern)
METRICS_LINE_RE = re.compile(r"Starting metrics server on (127\.0\.0\.1:\d+)/metrics")


def parse_tunnel_line(line: str) -> Tuple[str, str]:
    """Return what a line of cloudflared's log reports.
    -> ("host", name), ("metrics", "127.0.0.1:39911") or ("", ""). Other addresses stand in it, too:
    api.trycloudflare.com in error lines; healthy starts have ERR lines."""
    for kind, pattern in (("host", HOST_LINE_RE), ("metrics", METRICS_LINE_RE)):
        match = pattern.search(line)
        if match:
            return kind, match.group(1)
    return "", ""


def host_of(url: str) -> str:
    """Return the host name of an address in lower case, without the port."""
    return (urlsplit(url).hostname or "").lower()


def hosts_in_ingress(config: Any, port: int, origin: str = "") -> Tuple[List[str], List[str]]:
    """Return what a named tunnel's configuration sends to our port, or to our address.
    -> (host names, all rules as "host -> service"); empty until it has one (version -1)."""
    try:
        ingress = config["config"]["ingress"] if config["version"] >= 0 else ()
        rules = [(str(rule.get("hostname") or "*"), str(rule.get("service"))) for rule in ingress]
    except (KeyError, TypeError, AttributeError):
        return [], []
    services = ["http://%s:%d" % (host, port) for host in ("localhost", "127.0.0.1", "[::1]")]
    services.append(origin)
    hosts = [host for host, service in rules if "*" not in host and service.rstrip("/") in services]
    return hosts, ["%s -> %s" % rule for rule in rules]


# --- the policy ---
class TunnelStatus(NamedTuple):
    """The result of a probe of cloudflared. has_exited: it exited, with this message. is_hopeless:
    a retry will not help. has_host: the address is known. is_ready: it is connected."""
    has_exited: bool = False
    is_hopeless: bool = False
    has_host: bool = False
    is_ready: bool = False
    message: str = ""


class TunnelPolicy:
    """Decides when cloudflared is started, stopped and retried. Pure: it receives time and status.
    protocols: to try in turn, the best first. jitter: 0 to 1, as many bridges may come back."""

    def __init__(self, protocols: Sequence[str], is_named: bool = False,
                 jitter: Callable[[], float] = random.random) -> None:
        self._protocols = list(protocols)
        self._is_named = is_named
        self._jitter = jitter
        self._step_began_at = 0.0
        self._has_host = False
        # Since when a running tunnel has no connection.
        self._down_since: Optional[float] = None
        self._tries = 0
        self._failures = 0
        self.state = TunnelState.STOPPED
        self.retry_at = 0.0
        self.last_error = ""
        self.protocol = self._protocols[0]

    def start(self, now: float) -> str:
        self._tries = 0
        return self._start_next(now)

    def _start_next(self, now: float) -> str:
        self.protocol = self._protocols[self._tries % len(self._protocols)]
        self._tries += 1
        self.state = TunnelState.STARTING
        self._has_host = False
        self._down_since = None
        self.mark_started(now)
        return "start"

    def mark_started(self, now: float) -> None:
        """Record that cloudflared runs; the time before, such as a download, does not count."""
        self._step_began_at = now

    def step(self, now: float, status: TunnelStatus) -> str:
        """Return what to do: "start", "stop" (perhaps to restart it later) or ""."""
        if self.state == TunnelState.BACKOFF and now >= self.retry_at:
            return self.start(now)
        if self.state not in (TunnelState.STARTING, TunnelState.RUNNING):
            return ""
        if status.is_hopeless:
            self.state = TunnelState.FATAL
            self.last_error = status.message
            return "stop"
        if status.has_exited:
            return self._back_off(now, status.message)
        if status.is_ready and status.has_host:
            self._mark_running(now)
            return ""
        if self.state == TunnelState.STARTING:
            return self._check_startup(now, status)
        if self._down_since is None:
            self._down_since = now
        if now - self._down_since < DOWN_SECONDS:
            return ""
        return self._back_off(now, "the connection was lost for %d s" % DOWN_SECONDS)

    def _mark_running(self, now: float) -> None:
        self._down_since = None
        if self.state == TunnelState.STARTING:
            # The protocol that works comes first from now on.
            self._protocols.sort(key=lambda protocol: protocol != self.protocol)
            self.state = TunnelState.RUNNING
            self._step_began_at = now
            self.last_error = ""

    def _check_startup(self, now: float, status: TunnelStatus) -> str:
        """Give up a start that takes too long."""
        if status.has_host and not self._has_host:
            # From now on it is the connection that takes time.
            self._has_host = True
            self._step_began_at = now
        elapsed = now - self._step_began_at
        if not status.has_host:
            if elapsed < ADDRESS_SECONDS:
                return ""
            return self._back_off(now, "no address within %d s" % ADDRESS_SECONDS)
        is_last = self._is_named or self._tries >= len(self._protocols)
        limit = LAST_CONNECT_SECONDS if is_last else CONNECT_SECONDS
        if self._is_named:
            limit = NAMED_CONNECT_SECONDS
        if elapsed < limit:
            return ""
        self.last_error = (
            "no connection by %s within %d s; outbound TCP or UDP to port 7844 is needed"
            % (self.protocol, limit))
        return self._back_off(now, self.last_error) if is_last else self._start_next(now)

    def _back_off(self, now: float, reason: str) -> str:
        """Wait longer after each failure, and long at once after a refusal for too many starts."""
        if self.state == TunnelState.RUNNING and now - self._step_began_at >= STEADY_SECONDS:
            self._failures = 0
        if re.search(r"\b429\b|\b1015\b", reason):
            self._failures = max(self._failures, 3)
        seconds = TUNNEL_BACK_OFF_SECONDS[min(self._failures, len(TUNNEL_BACK_OFF_SECONDS) - 1)]
        self._failures += 1
        self.state = TunnelState.BACKOFF
        self.last_error = reason
        self.retry_at = now + seconds * (0.8 + 0.4 * self._jitter())
        return "stop"


class TunnelObserver:
    """Receives what the tunnel has to report to a person; this one ignores it."""
    def on_url(self, url: str, previous: Optional[str]) -> None:
        """Handle a new public address; previous: the one before, if it was another."""
    def on_progress(self, text: str, is_transient: bool) -> None:
        """Handle a line about the download; the line after a transient one replaces it."""


# --- the download ---
class CloudflaredInstall:
    """Finds cloudflared, or downloads it."""

    def __init__(self, config: Config, environ: Mapping[str, str], clock: Clock,
                 observer: TunnelObserver) -> None:
        self.config = config
        self._environ = environ
        self._clock = clock
        self._observer = observer
        self._asset = cloudflared_asset(platform.system(), platform.machine())
        self._folder = config.data_dir / "bin"
        self._path = self._folder / ("cloudflared.exe" if os.name == "nt" else "cloudflared")

    def installed_by_user(self) -> Optional[Path]:
        """Return the one that the owner named or installed, unchecked. Raises CannotTunnel."""
        name = self.config.cloudflared or "cloudflared"
        program = shutil.which(name, path=search_path(self._environ))
        if self.config.cloudflared and not program:
            raise CannotTunnel(
                "There is no program %s." % name, "name the right one with --cloudflared PATH")
        return Path(program).absolute() if program else None

    def downloaded(self) -> Optional[Path]:
        """Return the downloaded one, if its checksum is still right."""
        if not self._asset or not self._path.is_file():
            return None
        expected = self._asset.program_sha256 or self._asset.sha256
        return self._path if sha256_of(self._path) == expected else None

    def get(self, is_stopping: Callable[[], bool]) -> Path:
        """Return the program; download it if needed. Raises CannotTunnel; OSError, ValueError,
        HTTPException, after which a retry may help."""
        return self.installed_by_user() or self.downloaded() or self.download(is_stopping)

    def download(self, is_stopping: Callable[[], bool]) -> Path:
        """Download the program; it is put in place only if its checksum is right. As `get`."""
        asset = self._asset
        advice = "install cloudflared yourself and name it with --cloudflared PATH"
        if not asset:
            raise CannotTunnel("There is no cloudflared for this system (%s, %s)."
                               % (platform.system(), platform.machine()),
                               advice + ", or start with --no-tunnel")
        url = "/".join((self.config.cloudflared_url.rstrip("/"), CLOUDFLARED_VERSION, asset.name))
        text = "Downloading cloudflared %s (%d MB)..."
        self._observer.on_progress(text % (CLOUDFLARED_VERSION, asset.size >> 20), False)
        try:
            private_directory(self._folder)
        except CannotStart as error:
            raise CannotTunnel(str(error), error.hint) from None
        # Of a bridge that was killed during its download.
        for leftover in self._folder.glob("*.part"):
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=str(self._folder), suffix=".part") as part:
            packed, program = Path(part, "download"), Path(part, "cloudflared")
            self._fetch(url, asset, packed, is_stopping)
            if sha256_of(packed) != asset.sha256:
                raise CannotTunnel(
                    "The file from %s is not the expected cloudflared (its SHA-256 differs); it was"
                    " not run." % url,
                    "somebody may have changed it on the way: try another network, or " + advice)
            if asset.program_sha256:
                unpack_program(packed, program)
                if sha256_of(program) != asset.program_sha256:
                    raise CannotTunnel(
                        "The program in %s is not the expected cloudflared; it was not run."
                        % asset.name, advice)
            else:
                os.replace(packed, program)
            program.chmod(0o755)
            os.replace(program, self._path)
        self._observer.on_progress("cloudflared is installed in %s" % self._folder, False)
        return self._path

    def _fetch(self, url: str, asset: Asset, target: Path, is_stopping: Callable[[], bool]) -> None:
        """Raise OSError or HTTPException for a bad network, a wrong size or the bridge's end."""
        # Imported here, because a start rarely needs them.
        import urllib.error
        import urllib.request
        deadline = self._clock.monotonic() + DOWNLOAD_SECONDS
        received = 0
        shown_percent = -1
        try:
            source = urllib.request.urlopen(url, timeout=5)
        except urllib.error.HTTPError as error:
            with error:
                raise OSError(str(error)) from None
        except urllib.error.URLError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error.reason):
                raise OSError("%s: this machine knows no certificate authority for it. Install the"
                              " package ca-certificates, run Install Certificates.command of"
                              " python.org's Python for macOS, or install cloudflared yourself"
                              % error.reason) from None
            raise
        with source, open(target, "xb") as file:
            for data in iter(lambda: source.read1(1 << 16), b""):
                received += len(data)
                if received > asset.size:
                    raise OSError("the file is larger than the %d bytes expected" % asset.size)
                if is_stopping() or self._clock.monotonic() > deadline:
                    raise OSError("the download was stopped after %d bytes" % received)
                file.write(data)
                percent = received * 100 // asset.size
                if percent > shown_percent:
                    shown_percent = percent
                    self._observer.on_progress("Downloading cloudflared: %d %%" % percent, True)
        if received < asset.size:
            raise OSError("the download ended early, after %d of %d bytes" % (received, asset.size))


def sha256_of(path: Path) -> str:
    checksum = hashlib.sha256()
    with open(path, "rb") as file:
        for data in iter(lambda: file.read(1 << 20), b""):
            checksum.update(data)
    return checksum.hexdigest()


def unpack_program(archive: Path, target: Path) -> None:
    """Take the one regular file `cloudflared` out of a .tgz. Raises CannotTunnel."""
    # Imported here, because only macOS needs them.
    import tarfile
    import zlib
    broken = (tarfile.TarError, OSError, EOFError, zlib.error)
    with contextlib.suppress(*broken), tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            is_program = member.name == "cloudflared" and member.isreg()
            source = tar.extractfile(member) if is_program else None
            if source and member.size <= UNPACKED_BYTES:
                with source, open(target, "xb") as file:
                    shutil.copyfileobj(source, file)
                return
    raise CannotTunnel("The archive of cloudflared does not hold the program.",
                       "install cloudflared yourself, and name it with --cloudflared PATH")


# --- one process ---
class Cloudflared:
    """One process of cloudflared, its log and its metrics address.
    Owns the thread "cloudflared-log", which reads the log as long as the process lives: it would
    exit at a closed pipe, and stop serving at a full one. That thread alone writes `metrics`; both
    it and the owner write `host`. Raises OSError."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], tag: str) -> None:
        self.metrics = ""
        self.host = ""
        self._log_tail: Deque[str] = deque(maxlen=LOG_LINES)
        self.process = ChildProcess(
            argv, SIGKILL, env={**environment, OWNER_ENV_VAR: tag},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.pid = self.process.pid
        self._log_thread = threading.Thread(
            target=self._read_log, name="cloudflared-log-%d" % self.pid, daemon=True)
        self._log_thread.start()

    def _read_log(self) -> None:
        pipe = self.process.stdout
        assert pipe is not None
        remainder = b""
        with pipe:
            for data in iter(lambda: os.read(pipe.fileno(), 1 << 16), b""):
                *lines, remainder = (remainder + data).split(b"\n")
                remainder = remainder[:LOG_LINE_BYTES]
                for line in lines:
                    self._handle_line(line[:LOG_LINE_BYTES])
        self._handle_line(remainder)

    def _handle_line(self, data: bytes) -> None:
        line = data.decode("utf-8", "replace").rstrip()
        kind, value = parse_tunnel_line(line)
        if kind == "host":
            self.host = value
        elif kind == "metrics":
            self.metrics = value
        if line:
            self._log_tail.append(line)

    def get(self, path: str) -> Tuple[int, Any]:
        """Send a GET to the metrics address. -> (status, the JSON), or (0, None) without answer."""
        if not self.metrics:
            return 0, None
        try:
            connection = http.client.HTTPConnection(self.metrics, timeout=1)
            with contextlib.closing(connection):
                connection.request("GET", path)
                response = connection.getresponse()
                body = json.loads(response.read(1 << 20)) if response.status == 200 else None
                return response.status, body
        except (OSError, ValueError, http.client.HTTPException):
            return 0, None

    def probe(self, is_named: bool) -> TunnelStatus:
        """Return the status; not by the public address, as resolvers remember failed look-ups."""
        code = self.process.poll()
        if code is not None:
            self._log_thread.join(1)
            line = self.error_line()
            usage = "Incorrect Usage|Provided Tunnel token is not valid"
            text = "cloudflared exited (exit code %d)%s" % (code, ": " + line if line else "")
            return TunnelStatus(True, bool(re.match(usage, line)), message=text)
        if not is_named:
            body = self.get("/quicktunnel")[1]
            host = body.get("hostname") if isinstance(body, dict) else None
            if isinstance(host, str) and QUICK_HOST_RE.fullmatch(host):
                self.host = host
        is_ready = self.get("/ready")[0] == 200
        return TunnelStatus(has_host=is_named or bool(self.host), is_ready=is_ready)

    def error_line(self) -> str:
        """Return the line that explains the exit: of a flag, a token or a refusal, or the last."""
        lines = list(self._log_tail)
        reasons = "Incorrect Usage|token is not valid|429 Too Many Requests|error code: 1015"
        explaining = [line for line in lines if re.search(reasons, line)]
        return redact((explaining or lines[-1:] or [""])[0])[:300]

    def stop(self, grace: float) -> None:
        """Send SIGTERM, and SIGKILL after `grace` seconds; it has exited on return."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        self.process.kill_all()
        self.process.wait()
        self._log_thread.join(1)


# --- the tunnel ---
def data_tag(data_dir: Path) -> str:
    """Return what marks the processes of a data folder's bridge."""
    return digest(str(data_dir.resolve()))[:16]


class Tunnel:
    """The public address: starts cloudflared, watches it and restarts it.
    Owns the thread "tunnel" and its process; that thread alone writes the attributes. token: of a
    named tunnel, "" for a quick one."""

    def __init__(self, install: CloudflaredInstall, policy: TunnelPolicy, token: str,
                 database: Database, observer: TunnelObserver) -> None:
        self._config = install.config
        self._install = install
        self._policy = policy
        self._token = token
        self._database = database
        self._observer = observer
        self._clock = database.clock
        self._tag = data_tag(self._config.data_dir)
        self._process: Optional[Cloudflared] = None
        # Why there is no process.
        self._failure = TunnelStatus()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="tunnel", daemon=True)
        self._port = 0
        self._has_warned = False
        self.url: Optional[str] = None
        # The names by which requests arrive through cloudflared now.
        self.hosts: FrozenSet[str] = frozenset()
        self.since: Optional[float] = None
        self.starts = 0
        self.is_ready = False

    def start(self, port: int) -> None:
        self._port = port
        self._thread.start()

    def request_stop(self) -> None:
        """Begin to shut down: no new requests arrive, open ones get 5 seconds. Returns at once."""
        self._stopping.set()

    def close(self) -> None:
        """Stop cloudflared; it has exited on return. Idempotent."""
        self._stopping.set()
        if self._thread.ident:
            self._thread.join(CLOSE_SECONDS + 2)
            process = self._process
            if self._thread.is_alive() and process:
                # A probe hangs on a process that does not answer.
                process.process.kill()
                self._thread.join(CLOSE_SECONDS)

    @property
    def state(self) -> str:
        if not self._thread.is_alive():
            return TunnelState.STOPPED
        return TunnelState.STOPPING if self._stopping.is_set() else self._policy.state

    def details(self) -> Dict[str, Any]:
        """Return {"state": "running", "url": "https://...", "since": "...", ...}."""
        policy = self._policy
        error: Optional[str] = None
        if not self.is_ready:
            default = "no connection" if policy.state == TunnelState.RUNNING else None
            error = policy.last_error or default
        retry_in = None
        if policy.state == TunnelState.BACKOFF:
            retry_in = max(0, math.ceil(policy.retry_at - self._clock.monotonic()))
        return {
            "state": self.state, "url": self.url if self.is_ready else None,
            "since": iso_time(self.since) if self.is_ready else None, "protocol": policy.protocol,
            "starts": self.starts, "error": error, "retryInSeconds": retry_in}

    def _loop(self) -> None:
        action = self._policy.start(self._clock.monotonic())
        probe_at = 0.0
        try:
            while not self._stopping.is_set():
                try:
                    self._act(action)
                    action = ""
                    is_starting = self._policy.state == TunnelState.STARTING
                    self._stopping.wait(0.1 if is_starting else 0.5)
                    now = self._clock.monotonic()
                    if self._is_probe_due(now, probe_at) and not self._stopping.is_set():
                        action = self._policy.step(now, self._probe())
                        probe_at = now + READY_SECONDS
                except Exception:
                    logger.exception("The tunnel failed unexpectedly")
                    self._stopping.wait(READY_SECONDS)
        finally:
            # cloudflared's own grace period is 5 seconds.
            self._stop_process(CLOSE_SECONDS + 1)

    def _is_probe_due(self, now: float, probe_at: float) -> bool:
        has_exited = not self._process or self._process.process.poll() is not None
        is_unsettled = self._policy.state != TunnelState.RUNNING or not self.url
        return now >= probe_at or has_exited or is_unsettled

    def _probe(self) -> TunnelStatus:
        if not self._process:
            return self._failure
        status = self._process.probe(bool(self._token))
        if status.is_ready and status.has_host:
            self._on_connected(self._process)
        elif self.is_ready and not status.has_exited:
            self.is_ready = False
            logger.warning("The tunnel lost its connection; cloudflared is reconnecting.")
        return status

    def _on_connected(self, process: Cloudflared) -> None:
        """Announce the address; Cloudflare sends a named tunnel its own a little later."""
        if self._token:
            config = process.get("/config")[1]
            hosts, rules = hosts_in_ingress(config, self._port, self._config.origin(self._port))
            url = self._config.public_url.rstrip("/")
        else:
            hosts, rules, url = [process.host], [], ""
        if not url and hosts:
            url = "https://" + hosts[0]
        self.hosts = frozenset(host.lower() for host in (*hosts, host_of(url)) if host)
        if rules and not hosts and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "The tunnel is connected, but no public hostname in its configuration has the"
                " service http://localhost:%d (it has: %s). Add one, or name it with"
                " --public-url.", self._port, "; ".join(rules)[:300])
        if self.is_ready and (url or None) == self.url:
            return
        if url and url != self.url:
            previous = self._database.get_state("tunnel_url")
            self._database.set_state("tunnel_url", url)
            self._observer.on_url(url, previous if previous != url else None)
        elif url:
            logger.info("The tunnel is connected: %s", url)
        else:
            logger.info(
                "The tunnel is connected and waits for its configuration. --public-url gives its"
                " address at once.")
        self.is_ready = True
        self.since = self._clock.now()
        self.url = url or None
        self._database.set_state("tunnel_protocol", self._policy.protocol)

    def _act(self, action: str) -> None:
        if not action:
            return
        self._stop_process(1.0)
        if action == "start":
            self._failure = self._spawn()
            self._policy.mark_started(self._clock.monotonic())
            return
        outlook = "there are no more retries."
        if self._policy.state != TunnelState.FATAL:
            seconds = math.ceil(self._policy.retry_at - self._clock.monotonic())
            outlook = "next try in %d s." % seconds
        error = self._policy.last_error.rstrip(".")
        logger.warning("The tunnel failed: %s. The bridge serves locally; %s", error, outlook)

    def _spawn(self) -> TunnelStatus:
        """Start cloudflared. -> why that is impossible, or an empty status."""
        try:
            program = self._install.get(self._stopping.is_set)
        except CannotTunnel as error:
            return TunnelStatus(True, True, message="%s (%s)" % (error, error.hint))
        except (OSError, ValueError, http.client.HTTPException) as error:
            # On one line: a server can send line ends.
            reason = " ".join(str(getattr(error, "reason", None) or error).split())
            text = "cloudflared could not be downloaded from %s: %s"
            return TunnelStatus(True, message=text % (self._config.cloudflared_url, reason))
        empty_config = self._config.data_dir / "cloudflared.yml"
        argv = tunnel_argv(str(program), str(empty_config), self._config.origin(self._port),
                           self._policy.protocol, bool(self._token))
        try:
            write_file_atomically(empty_config, "{}\n")
            environment = tunnel_environment(os.environ, self._token)
            self._process = Cloudflared(argv, environment, self._tag + ".tunnel")
        except OSError as error:
            is_hopeless = isinstance(error, PermissionError)
            return TunnelStatus(True, is_hopeless, message="cloudflared cannot be run: %s" % error)
        self.starts += 1
        pid = self._process.pid
        self._database.record_process(pid, started_at(pid), program_of(pid))
        return TunnelStatus()

    def _stop_process(self, grace: float) -> None:
        self.is_ready = False
        self.hosts = frozenset()
        self._has_warned = False
        if self._process:
            self._process.stop(grace)
            self._database.forget_process(self._process.pid)
            self._process = None


# === 15 Dashboard ================================================================================
# The dashboard: one page, in three raw constants. It holds no data. Its script fetches JSON with
# the token of the tab and inserts it by textContent only, never as markup. To edit the constants
# as files: `python tests/page.py extract DIR`, then `python tests/page.py embed DIR`.

DASHBOARD_CSS = r"""/* Colours. The dark theme overrides all of them but nothing else. */
:root { color-scheme: light dark; --paper: #faf9f7; --card: #fff; --tint: #f3eee6; --ink: #1f1e1c;
  --faint: #6b6862; --line: #e3e0da; --edge: #8c8880; --good: #2e7d4f; --bad: #b3402f;
  --accent: #a34c25 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #1b1a18; --card: #252422; --tint: #2a2724; --ink: #efece6; --faint: #a09b92;
    --line: #3a3834; --edge: #87827a; --good: #7cc79a; --bad: #ef8d7c; --accent: #e8a27a } }
/* Text. */
* { box-sizing: border-box; margin: 0 } [hidden] { display: none !important }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1.25rem 5rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; overflow-wrap: anywhere }
h1, h2, .figure { font-family: ui-serif, Georgia, serif; font-weight: 500; line-height: 1.3 }
h1 { font-size: 1.45rem } h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem }
h2:focus { outline: none }
h3 { font-size: .8rem; color: var(--faint); margin: 1.25rem 0 .35rem }
p, pre { margin: .5rem 0 }
code, pre { font: .86em/1.6 ui-monospace, Menlo, Consolas, monospace }
label, dt, th, summary, .faint, .meta { color: var(--faint); font-size: .875rem }
.figure { font-size: 2rem; font-variant-numeric: tabular-nums lining-nums; white-space: nowrap }
.good { color: var(--good) } .bad, .badge:not(.faint) { color: var(--bad) }
.warm { color: var(--accent) }
.badge { border: 1px solid; border-radius: .3rem; padding: 0 .35rem; font-size: .8rem }
.ellipsis { white-space: nowrap; overflow: hidden; text-overflow: ellipsis }
.text { white-space: pre-wrap; max-height: 26rem; overflow: auto }
.visually-hidden { position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%) }
/* Layout. */
.row { display: flex; flex-wrap: wrap; gap: .5rem .75rem; align-items: center }
.row > .ellipsis, .row > .grow { flex: 1 1 12rem; min-width: 0 }
.space-between { display: flex; justify-content: space-between }
.grid { display: grid; gap: .75rem 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, var(--column, 13rem)), 1fr)) }
dl.grid { --column: 6rem; min-height: 4rem }
dl.grid div { display: flex; flex-direction: column-reverse } form .grid { margin: .75rem 0 }
#counters { margin-top: 2.5rem; align-items: end }
#counters dt, #counters button { line-height: 1.5rem }
#filters > * { flex: 1 1 7rem; min-width: 0 } #filters > #search { flex: 4 1 16rem }
#filters + .row { margin: .5rem 0 } #usage-days, #legend { margin: .75rem 0 1rem }
#latency { --column: 8rem } .end { margin-left: auto }
.facts { display: grid; grid-template-columns: auto 1fr; gap: .35rem 1.25rem;
  align-items: baseline }
.facts div { display: contents }
/* Header and navigation. */
header p { margin: 0; font-size: .875rem }
#version { margin-right: auto } #state::before { content: "● " }
#skip:not(:focus) { position: absolute; clip-path: inset(50%) }
nav { display: flex; flex-wrap: wrap; gap: 0 clamp(.8rem, 3vw, 1.5rem); margin: 1rem 0 1.5rem;
  border-bottom: 1px solid var(--line) }
nav a { padding: .5rem 0; margin-bottom: -1px; color: var(--faint); text-decoration: none;
  overflow-wrap: normal }
nav a[aria-current] { color: var(--ink); border-bottom: 2px solid var(--accent) }
/* Buttons and form fields. */
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: .3rem }
button, input, select, textarea { font: inherit; font-size: .9375rem; color: var(--ink);
  min-height: 2.25rem; max-width: 100%; border: 1px solid var(--edge); border-radius: .5rem;
  background: var(--card); padding: .35rem .7rem }
::placeholder { color: var(--faint); opacity: 1 }
button { cursor: pointer; background: none }
button:hover, [aria-pressed=true] { background: var(--tint) }
button.primary { background: var(--accent); border-color: var(--accent); color: var(--paper);
  font-weight: 600 }
#sign-out, dt button { border: 0; padding: 0; min-height: 1.5rem; text-decoration: underline }
dt button { color: inherit; font-size: inherit }
label > * { display: block; width: 100%; margin-top: .2rem }
label > [type=checkbox] { display: inline; width: 1.1rem; min-height: 1.1rem;
  accent-color: var(--accent); vertical-align: -.25rem }
/* Lists and boxes. */
.list { list-style: none; padding: 0 }
.list > li { border-top: 1px solid var(--line); padding: .7rem 0 }
.list:not(:empty) + .if-empty { display: none }
.list > .running, .notice { border: solid var(--accent); border-width: 0 0 0 3px;
  background: var(--tint); padding: .9rem 1.1rem }
.notice code { display: block; margin-bottom: .75rem }
details > .text, .box { background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; padding: .7rem .9rem }
summary { cursor: pointer; padding: .35rem 0 }
summary.row { gap: 0 .75rem; font-size: 1rem; color: var(--ink) }
summary.row::before { content: "▸"; color: var(--faint) }
[open] > summary.row::before { content: "▾" }
summary:hover { background: var(--tint) }
#conversations > li { align-items: start } #conversations details[open] { flex-basis: 100% }
.prompt { margin: .35rem 0; padding: .5rem .9rem; border-radius: .5rem; background: var(--tint) }
footer { margin-top: 2.5rem }
dialog { margin: auto; padding: 0 1.5rem 1rem; border: 1px solid var(--edge);
  border-radius: .5rem; background: var(--card); color: var(--ink) }
dialog h2 { margin-top: 1rem }
#waiting:not(.all) > :nth-child(n+6) { display: none }
#recent > li { padding: .35rem 0 } #plan-limits li { border: 0 }
#first-run ol { padding-left: 1.5rem } #first-run h2, #first-run li { margin: 0 0 .75rem }
#toast { position: fixed; bottom: 1rem; left: 50%; transform: translateX(-50%); width: max-content;
  max-width: calc(100% - 2rem); background: var(--ink); color: var(--paper); padding: .5rem 1rem;
  border-radius: .5rem }
#toast:empty, #last-update:empty { display: none }
/* Answers. */
.text :is(ul, ol) { padding-left: 1.5rem } .text li > p { margin: .2rem 0 }
.text :is(h4, h5, h6) { margin: 1rem 0 .35rem }
.text hr { margin: 1rem 0; border: 0; border-top: 1px solid var(--line) }
.text blockquote { margin: .5rem 0; padding-left: .9rem; border-left: 3px solid var(--edge) }
.text :is(th, td) { text-align: left; white-space: pre-wrap; vertical-align: top }
.text td:first-child { padding-left: 0 }
main a { color: var(--accent) }
.text :not(pre) > code { background: var(--tint); border-radius: .3rem; padding: 0 .25rem }
.code { background: var(--tint); border-radius: .3rem; margin: .75rem 0; padding: .5rem .75rem }
.code pre { overflow-x: auto; white-space: pre }
/* Bars, the chart and tables. */
progress { display: block; appearance: none; width: 100%; height: .45rem; margin: .35rem 0;
  border: 0; background: var(--line) }
progress::-webkit-progress-bar { background: var(--line) }
progress::-webkit-progress-value { background: var(--accent) }
progress::-moz-progress-bar { background: var(--accent) }
svg { display: block; width: 100%; height: 11rem; margin: 1.5rem 0 .25rem;
  border-bottom: 1px solid var(--line) }
.in { fill: var(--accent); color: var(--accent) } .out { fill: var(--ink); color: var(--ink) }
.cache { fill: var(--edge); color: var(--edge) }
#legend span, progress { forced-color-adjust: none }
@media (forced-colors: active) { [aria-pressed=true] { border-width: 3px }
  .in { fill: Highlight; color: Highlight }
  .out { fill: CanvasText; color: CanvasText } .cache { fill: GrayText; color: GrayText } }
svg .day { fill: transparent } svg g:hover .day { fill: var(--tint) }
table { border-collapse: collapse; width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .35rem 0 .35rem .75rem; border-bottom: 1px solid var(--line) }
th { font-weight: 500 } th:first-child { text-align: left; padding-left: 0 }
td, thead th { white-space: nowrap } #endpoints td { text-align: left; white-space: normal }
@media (max-width: 30rem) { #endpoints :is(th, td) { display: block; padding-left: 0 }
  #endpoints th { border: 0; padding-bottom: 0 } }
@media print { nav, button:not(#legend *), form, footer, #toast { display: none } }
"""

DASHBOARD_HTML = r"""<!doctype html>
<html lang="en"> <meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>claude-api-bridge</title>
<link rel="icon" href="data:image/png;base64,
iVBORw0KGgoAAAANSUhEUgAAABAAAAAQAQMAAAAlPW0iAAAABlBMVEUAAACjTCVpkY64AAAAAnRSTlMA/1uRIrUAAAAhSURB
VHjaY2BgYOD/wCD/g8H+D0P9P+wIKAVUAFTGwAAAuLwSi/M+EIoAAAAASUVORK5CYII=">
<style nonce="NONCE">
STYLE</style>
<header> <a id="skip" href="#/requests">Skip to the content</a>
<div class="row"><h1>claude-api-bridge</h1> <p id="version" class="faint"></p>
  <p id="state" role="status">Loading&hellip;</p> <p id="last-update" class="faint"></p>
  <p data-roles="user admin"><span id="signed-in-as" class="faint"></span>
    <button id="sign-out">Sign out</button></p></div>
<nav aria-label="Views"><a href="#/requests">Requests</a>
  <a href="#/playground" data-roles="user admin">Playground</a>
  <a href="#/usage" data-roles="user admin">Usage</a>
  <a href="#/tokens" data-roles="admin">Tokens</a> <a href="#/api">API</a></nav>
</header>
<noscript>This page needs JavaScript.</noscript> <main tabindex="-1">
<section data-view="#/requests"><h2 class="visually-hidden" tabindex="-1">Requests</h2>
<form id="sign-in" data-roles="anonymous">
  <h2>Sign in</h2> <label for="token-field">Token</label>
  <div class="row"><input id="token-field" class="grow" type="password" autocomplete="off" required
    aria-describedby="sign-in-error sign-in-hint"> <button class="primary">Sign in</button></div>
  <p id="sign-in-error" class="bad" role="alert"></p>
  <p id="sign-in-hint" class="faint"><code>start</code> printed the admin token once. To create
    another token: <code>claude_api_bridge.py token create NAME</code>, with <code>--admin</code>
    to manage the bridge. This tab forgets the token when you close it.</p></form>
<section id="linked" hidden><p><a href="#/requests">All requests</a></p> <h2>Request</h2>
  <p id="linked-error" class="bad" role="alert"></p>
  <ul class="list" id="linked-list"></ul></section>
<div id="overview" data-roles="user admin">
  <p id="plan-notice" class="notice" role="status" hidden></p>
  <section id="first-run" class="notice" hidden><h2>First steps</h2>
    <ol><li>Make a token for your program.
      <button type="button" id="create-first">Create the token my-app</button></li>
      <li>Run this in a terminal. <button type="button" id="copy-first">Copy</button>
        <code id="first-code"></code></li>
      <li>Watch your request arrive on this page.</li></ol></section>
  <section id="plan" hidden><h2>Plan</h2> <ul class="list grid" id="plan-limits"></ul></section>
  <section><h2>Running now</h2>
    <ul class="list" id="running"></ul> <p class="if-empty faint" id="nothing-runs"></p></section>
  <section><h2>Waiting</h2> <p id="queue-estimate" class="faint"></p>
    <ol class="list" id="waiting"></ol> <p class="if-empty faint">The queue is empty.</p>
    <p class="row"><button type="button" id="show-waiting" hidden></button> <button type="button"
      id="pause-queue" data-roles="admin">Pause the queue</button></p></section>
  <section id="errors-section" hidden><h2>Errors of the last 24 hours</h2>
    <ul class="list" id="errors"></ul></section>
  <section><h2>Recent</h2>
    <form id="filters" class="row" role="search" aria-label="Recent requests">
      <input name="q" id="search" class="grow" type="search" placeholder="Search"
        aria-label="Search">
      <select name="status" aria-label="Status"><option value="">Any status
        <option value="completed">Completed<option value="error">Failed
        <option value="cancelled">Cancelled</select>
      <select name="token" aria-label="Token" data-roles="admin">
        <option value="">All tokens</select>
      <input name="model" list="models" placeholder="Any model" aria-label="Model">
      <select name="hours" aria-label="Time"><option value="">Any time<option value="1">Last hour
        <option value="24">Last 24 hours<option value="168">Last 7 days</select></form>
    <div class="row"><p id="match-count" class="faint" role="status"></p>
      <button type="button" id="clear-filters" hidden>Clear filters</button></div>
    <ul class="list" id="recent"></ul> <p class="if-empty faint" id="no-recent">No requests yet.</p>
    <p><button id="load-more" hidden>Load more</button></p></section>
  <section id="conversations-section" hidden><h2>Conversations</h2>
    <ul class="list" id="conversations"></ul></section>
  <section data-roles="admin"><h2>Bridge</h2> <dl class="facts" id="bridge-facts"></dl></section>
</div>
<div id="figures"><dl class="grid" id="counters"></dl>
  <p class="faint" id="counters-note"></p></div></section>

<section data-view="#/playground" hidden><h2 tabindex="-1">Playground</h2>
<form id="ask-form"> <label>Message<textarea name="message" rows="5" required></textarea></label>
  <div class="grid">
    <label>Model<input name="model" list="models" placeholder="default"></label>
    <datalist id="models"><option>haiku<option>sonnet<option>opus</datalist>
    <label>Effort<select name="effort"><option value="">default<option>low<option>medium
      <option>high<option>xhigh<option>max</select></label>
    <label>Conversation<input name="conversation" placeholder="of a stateful token"></label></div>
  <label>System prompt<textarea name="systemPrompt" rows="2"></textarea></label>
  <label>JSON Schema of the answer<textarea name="jsonSchema" rows="2"></textarea></label>
  <p class="row"><button type="button" id="add-images">Add images</button>
    <span class="faint">or drop or paste them here</span></p>
  <input type="file" id="image-files" accept="image/*" multiple hidden>
  <ul class="list" id="images"></ul>
  <p class="row"><button class="primary" id="ask">Ask</button> <button type="button" id="stop"
    hidden>Stop</button> <span id="ask-status" class="faint" role="status"></span></p></form>
<div id="answer-section" hidden>
  <div id="answer" class="text box" tabindex="0" role="region" aria-label="Answer"></div>
  <p class="row"><button id="copy-answer">Copy answer</button>
    <span id="answer-usage" class="faint"></span></p></div>
<h2>As code</h2>
<div class="row"><div class="row" id="languages" role="group" aria-label="Language"></div>
  <button id="copy-code">Copy code</button></div>
<pre id="code" class="text box" tabindex="0" role="region" aria-label="Code"></pre>
<p id="code-note" class="faint" hidden>Put the file's content, in base64, where BASE64 stands.</p>
</section>

<section data-view="#/usage" hidden><h2 tabindex="-1">Last hour</h2>
<p id="no-latency" class="faint">No request in the last hour.</p>
<dl class="grid" id="latency" hidden></dl> <h2 id="usage-title">Last 30 days</h2>
<div class="row" id="usage-days" role="group" aria-label="Time"></div>
<dl class="grid" id="totals"></dl> <p id="no-usage" class="faint">No usage yet.</p>
<div id="usage-parts" hidden> <svg id="chart" role="img" preserveAspectRatio="none"
  aria-label="Tokens per day; the numbers are under Day by day"></svg>
<p class="faint space-between"><span id="chart-start"></span> <span>today</span></p>
<p class="faint" id="chart-maximum"></p>
<div class="row" id="legend" role="group" aria-label="Parts of the chart"></div>
<p class="faint">Days are in UTC. Costs are estimates by Claude Code at API prices, not what your
  plan charges.</p>
<details><summary>Day by day</summary><table><thead>
  <tr><th>Day<th>Requests<th>Tokens<th>Est. cost<tbody id="usage-by-day"></table></details>
<p><a id="download-csv">Download CSV</a></p> <h2>By model</h2>
<table><thead><tr><th>Model<th>Completed<th>Tokens<th>Est. cost<tbody id="usage-by-model"></table>
<section data-roles="admin"><h2>By token</h2>
  <table><thead><tr><th>Token<th>Requests<th>Tokens<th>Est. cost<tbody id="usage-by-token"></table>
</section></div></section>

<section data-view="#/tokens" hidden><h2 tabindex="-1" id="token-form-title">New token</h2>
<form id="token-form"> <div class="grid">
    <label>Name<input name="name" required></label>
    <label>Session mode<select name="sessionMode"><option>stateless<option>stateful</select></label>
    <label>Tools<select name="tools"><option>none<option>read<option>web<option>all</select></label>
    <label>Expires in days<input name="expiresInDays" type="number" min="1" max="3650"
      placeholder="never"></label>
    <label>Requests per minute<input name="requestsPerMinute" type="number" min="1"
      placeholder="no limit"></label>
    <label>Requests per day<input name="requestsPerDay" type="number" min="1"
      placeholder="no limit"></label>
    <label>Models<input name="models" placeholder="all, or haiku, sonnet"></label></div>
  <p class="row"><button class="primary" id="save-token">Create token</button>
    <button type="button" id="cancel-edit" hidden>Cancel</button>
    <label><input type="checkbox" name="admin"> Admin: full access</label></p>
  <p id="rights-warning" class="bad" role="status"></p></form>
<div id="created-token" class="notice" role="status" hidden></div>
<h2>Tokens</h2> <ul class="list" id="tokens"></ul></section>

<section data-view="#/api" hidden><h2 tabindex="-1">API</h2>
<p>Send the token as <code>Authorization: Bearer cab-...</code> or <code>x-api-key: cab-...</code>;
  bodies are JSON.</p>
<table><tbody id="endpoints"></table></section> </main>
<footer><button type="button" id="show-shortcuts">Keyboard shortcuts</button></footer>
<dialog id="shortcuts" aria-labelledby="shortcuts-title">
<h2 id="shortcuts-title">Keyboard shortcuts</h2>
<dl class="facts"><div><dt><kbd>/</kbd><dd>Search</div>
  <div><dt><kbd>j</kbd> <kbd>k</kbd><dd>Next and previous request</div>
  <div><dt><kbd>Enter</kbd><dd>Open or close it</div>
  <div><dt><kbd>1</kbd> to <kbd>5</kbd><dd>The views, from left to right</div>
  <div><dt><kbd>?</kbd><dd>This list</div> <div><dt><kbd>Esc</kbd><dd>Close this list</div></dl>
<p><label><input type="checkbox" id="use-shortcuts" checked> Use these keys</label></p>
<p><button type="button" id="close-shortcuts" autofocus>Close</button></p></dialog>
<p id="toast" role="status"></p>
<script nonce="NONCE">
SCRIPT</script>
</html>
"""

DASHBOARD_JS = r"""// Text from the bridge enters the page by textContent only, never as markup.
// The tests run the section of pure functions in Node, so it must not use the DOM.
"use strict";

// === Pure functions ===
const FINISHED = ["completed", "error"];
const DAY_MS = 86400000;
const LIMIT_NAMES = { five_hour: "5-hour limit", seven_day: "Weekly limit" };
const requestKey = (job) => job.requestId;
const nonEmpty = (fields) =>
  Object.fromEntries(Object.entries(fields).filter(([, value]) => value));
const joinNonEmpty = (...parts) => parts.flat().filter(Boolean).join(" · ");
const sentence = (text) => text && text.charAt(0).toUpperCase() + text.slice(1) + ".";
const truncate = (text, size = 300) => text.length > size ? text.slice(0, size) + "…" : text;
const codeToText = (code) => code.replaceAll("_", " ");
const formatCount = (number) => Number(number || 0).toLocaleString();
const formatDollars = (amount) => "$" + amount.toFixed(amount && amount < 0.1 ? 4 : 2);
const formatBytes = (bytes) => Math.ceil(bytes / 1000) + " kB";
const plural = (number, noun) => formatCount(number) + " " + noun + (number === 1 ? "" : "s");
const formatCompact = (number) => number.toLocaleString(
  [], { notation: "compact", maximumFractionDigits: number < 100 ? 2 : 1 });
const formatCost = (amount) => amount < 1000 ? formatDollars(amount) : "$" + formatCompact(amount);
function formatDuration(milliseconds) {
  const seconds = Math.max(0, Math.round(milliseconds / 1000));
  const minutes = Math.floor(seconds / 60);
  if (minutes >= 60) return Math.floor(minutes / 60) + " h " + minutes % 60 + " min";
  return minutes ? minutes + " min " + seconds % 60 + " s" : seconds + " s";
}
// The same with a decimal below 10 s.
const formatExact = (milliseconds) => milliseconds >= 50 && milliseconds < 9950
  ? (milliseconds / 1000).toFixed(1) + " s" : formatDuration(milliseconds);
const formatLatency = (milliseconds) => milliseconds === null ? "–"
  : milliseconds < 1000 ? milliseconds + " ms" : formatExact(milliseconds);
// The duration between two ISO times; empty if one of them is missing.
const formatElapsed = (from, to) => from && to && formatExact(Date.parse(to) - Date.parse(from));
const formatAge = (iso) => formatDuration(Date.now() - Date.parse(iso));
// The time of day; on any day but today with the date.
const formatTime = (date) => date.toLocaleString([], { hour: "2-digit", minute: "2-digit",
  ...date.toDateString() !== new Date().toDateString() && { day: "numeric", month: "short" } });
const totalTokens = (usage) =>
  usage.inputTokens + usage.outputTokens + usage.cacheReadTokens + usage.cacheCreationTokens;
const usageParts = (usage) => usage && [formatCount(usage.inputTokens) + " in",
  formatCount(usage.outputTokens) + " out", formatCount(usage.cacheReadTokens) + " cache read",
  formatCount(usage.cacheCreationTokens) + " cache write", "est. " + formatDollars(usage.costUsd)];
// seven_day_opus -> Weekly limit (Opus)
function limitName(type) {
  if (!type.startsWith("seven_day_")) return LIMIT_NAMES[type] || codeToText(type);
  const model = codeToText(type.slice("seven_day_".length));
  return "Weekly limit (" + model.charAt(0).toUpperCase() + model.slice(1) + ")";
}
const HOLD_TEXTS = {
  usage_limit: "Waiting for the plan limit to reset at ", paused: "The queue is paused.",
  network: "The API cannot be reached. Next try at ",
  login: "The login was refused. On the bridge's machine run claude, then /login. Next try at ",
  overloaded: "The service is overloaded. Next try at " };
const STATES = { usage_limit: "resting until ", paused: "paused", network: "network lost",
  login: "login refused", overloaded: "service overloaded" };
// The state of the queue in a word; formatTime shows until when it rests.
function stateText({ waitingFor, resumesAt, isProcessing }) {
  if (!waitingFor) return isProcessing ? "working" : "idle";
  const until = waitingFor === "usage_limit" && resumesAt ? formatTime(new Date(resumesAt)) : "";
  return (STATES[waitingFor] || codeToText(waitingFor)) + until;
}
// When a limit of the plan will be used up at the present pace, if that is before its reset.
const LIMIT_HOURS = { five_hour: 5, seven_day: 168 };
function exhaustedAt({ type, utilization, resetsAt }, now) {
  const hours = LIMIT_HOURS[type] || type.startsWith("seven_day") && 168;
  if (!hours || !(utilization > 0.02 && utilization < 1) || !resetsAt) return null;
  const elapsed = now - (Date.parse(resetsAt) - hours * 3600000);
  const at = now + elapsed * (1 - utilization) / utilization;
  return elapsed > 0 && at < Date.parse(resetsAt) ? new Date(at) : null;
}
// How long the waiting requests will take, by the median of those that ran; null if none did.
function queueDuration(waitingCount, jobs) {
  const durations = jobs.filter((job) => job.startedAt && job.completedAt && !job.errorCode)
    .map((job) => Date.parse(job.completedAt) - Date.parse(job.startedAt)).sort((a, b) => a - b);
  return durations.length ? waitingCount * durations[durations.length >> 1] : null;
}
const RIGHTS = { all: "This token can run any command on the bridge's machine, as its owner.",
  admin: "This token can manage all tokens and read every request." };
const rightsWarning = (tools, isAdmin) =>
  [tools === "all" && RIGHTS.all, isAdmin && RIGHTS.admin].filter(Boolean).join(" ");
const waitingText = (reason) => HOLD_TEXTS[reason] || "Waiting (" + codeToText(reason) + ") until ";
// Put the newest page before the older requests; drop these if there may be a gap between them.
// A search that brought nothing has no gap: what is older was searched before.
function mergeRecent(loaded, newest) {
  const newestKeys = new Set(newest.requests.map(requestKey));
  const last = loaded.requests.findLastIndex((job) => newestKeys.has(requestKey(job)));
  const isEmptySearch = newest.next && !newest.requests.length && loaded.next !== undefined;
  if (last < 0 && !isEmptySearch) return newest;
  return { ...loaded, requests: newest.requests.concat(loaded.requests.slice(last + 1)) };
}
// The query of GET /api/requests. status: completed, error, or the code of an error.
function requestQuery({ status, hours, ...filters }, now) {
  const isStatus = !status || FINISHED.includes(status);
  return new URLSearchParams(nonEmpty({ ...filters,
    // The turns of a conversation have an index of their own, which knows no status.
    status: isStatus && status || !filters.conversation && FINISHED.join(),
    error: !isStatus && status,
    since: hours > 0 && new Date(now - hours * 3600000).toISOString() })).toString();
}
const matchText = ({ requests, next, searchedTo }) =>
  (requests.length ? plural(requests.length, "request") : "No match") + (next ? " so far" : "") +
  (next && searchedTo ? ", searched back to " + formatTime(new Date(searchedTo)) : "");
// The failures of the last day by their code, the most frequent first. jobs: newest first.
function groupErrors(jobs, now) {
  const groups = {};
  for (const { errorCode, createdAt, completedAt, advice } of jobs) {
    if (errorCode === "cancelled" || Date.parse(createdAt) < now - DAY_MS) continue;
    groups[errorCode] ||= { code: errorCode, count: 0, lastAt: completedAt || createdAt, advice };
    groups[errorCode].count++;
  }
  return Object.values(groups).sort((first, second) => second.count - first.count);
}
const USAGE_COLUMNS = ["requests", "completed", "errors", "inputTokens", "outputTokens",
  "cacheReadTokens", "cacheCreationTokens", "costUsd"];
const usageCsv = (days) => [["day", ...USAGE_COLUMNS], ...days.map((usage) =>
  [usage.day, ...USAGE_COLUMNS.map((name) => usage[name])])].join("\r\n") + "\r\n";
// What to know of a token at a glance: [text, whether it is dangerous].
function tokenBadges({ isAdmin, tools, lastUsedAt, createdAt }, now) {
  const hasBash = Array.isArray(tools) && tools.some((rule) => rule.startsWith("Bash"));
  const isUnused = Date.parse(lastUsedAt || createdAt) < now - 30 * DAY_MS;
  return [[isAdmin && "admin", true], [tools === "all" && "all tools", true],
    [hasBash && "Bash", true], [isUnused && "unused for 30 days", false]].filter(([text]) => text);
}
// Parse one Server-Sent Event. A heartbeat is a comment and gives null.
function parseEvent(block) {
  const lines = block.split("\n").map((line) => line.split(/: (.*)/s, 2));
  const { event, id, data } = Object.fromEntries(lines);
  return event ? { type: event, end: Number(id), data: JSON.parse(data) } : null;
}
function newTokenBody(fields) {
  const numberOrNull = (name) => Number(fields[name]) || null;
  const models = fields.models.split(/[, ]+/).filter(Boolean);
  return { ...fields, admin: "admin" in fields, expiresInDays: numberOrNull("expiresInDays"),
    requestsPerMinute: numberOrNull("requestsPerMinute"),
    requestsPerDay: numberOrNull("requestsPerDay"), models: models.length ? models : null };
}

// Markdown, as far as answers use it. A node is a string or { tag, parts, attributes }.
// What is nested deeper stays text: this keeps the time linear and the stack small.
const MAX_NESTING = 20;
const FENCE = /^\s*(`{3,}(?!`)|~{3,}(?!~))([^`]*)$/;
const QUOTE = /^\s*> ?/;
const RULE = /^\s*([-*_])(?:\s*\1){2,}\s*$/;
const HEADING = /^\s*(#{1,6})(?!\S)(.*)/s;
const ITEM = /^\s*([-*+]|\d{1,9}[.)])(?:\s+|$)/;
// What ends a paragraph. A line with a number, which may be a year, does not, except 1.
const INTERRUPTIONS = [FENCE, QUOTE, RULE, HEADING, /^\s*([-*+]|1[.)])\s+\S/];
const CODE = /\\[!-/:-@[-`{-~\n]|(?<run>`{1,3})(?!`)(?<code>.*?[^`])\k<run>(?!`)|`+/;
const MARK = /\*{4,}|_{4,}|~{3,}|(?<mark>\*{1,3}|_{1,3}|~~)/;
const LABEL = /!?\[(?<label>[^[\]]*(?:\[[^[\]]*\][^[\]]*)*)\]/;
const TARGET = /\((?<href>(https?:\/\/|mailto:)([^\s()\\]|\([^\s()\\]*\)){1,2000})(\s"[^"]*")?\)/;
// The rest of a bare address. It does not end with punctuation.
const URL_END = /([.,:;!?'"_~]*([^\s<>()[\]\\`*|.,:;!?'"_~]|\([^\s<>()\\`*]*\))){1,2000}/;
const INLINE = new RegExp(`${CODE.source}|${MARK.source}|${LABEL.source}${TARGET.source}|` +
  `(?<url>https?://${URL_END.source})`, "gs");
const TAGS = { "*": "em", _: "em", "**": "strong", __: "strong", "~~": "s" };
const node = (tag, parts, attributes) => ({ tag, parts, attributes });
const link = (href, parts) =>
  node("a", parts, { href, rel: "noopener noreferrer", target: "_blank" });
const isBlank = (line) => !line.trim();
const indentOf = (line) => line.match(/^\s*/)[0].replaceAll("\t", "    ").length;
const cutIndent = (line, size) => line.replace(/^(\t| +)/, (indent) => indent.slice(size));
const markerOf = (line = "") => ITEM.test(line) && !RULE.test(line) && ITEM.exec(line)[1];
const isTable = ({ lines, at }) => lines[at].includes("|") &&
  /^(?=[^-]*-)(?=[^|]*\|)[\s|:-]+$/.test(lines[at + 1]);
const splitCells = (line) => line.replaceAll("\\|", "\0").trim().replace(/^\||\|$/g, "")
  .split("|").map((cell) => cell.trim().replaceAll("\0", "|"));
function takeLines(reader, test) {
  const start = reader.at;
  while (reader.at < reader.lines.length && test(reader.lines[reader.at])) reader.at++;
  return reader.lines.slice(start, reader.at);
}
function parseBlocks(lines, depth = 0) {
  if (depth > MAX_NESTING) return [lines.join("\n")];
  const [reader, blocks] = [{ lines, depth, at: 0 }, []];
  while (takeLines(reader, isBlank) && reader.at < lines.length) blocks.push(parseBlock(reader));
  return blocks;
}
function parseBlock(reader, line = reader.lines[reader.at]) {
  if (markerOf(line)) return parseList(reader, markerOf(line));
  if (QUOTE.test(line)) return node("blockquote", parseBlocks(takeLines(reader,
    (next) => QUOTE.test(next)).map((next) => next.replace(QUOTE, "")), reader.depth + 1));
  if (isTable(reader)) return parseTable(reader);
  reader.at++;
  if (FENCE.test(line)) return parseCode(reader, FENCE.exec(line));
  if (RULE.test(line)) return node("hr", []);
  const [, marks, title] = HEADING.exec(line) || [];
  // The page itself has the headings up to h3.
  if (marks) return node("h" + Math.min(marks.length + 3, 6), parseInline(title.trim()));
  const more = takeLines(reader, (next) => !isBlank(next) && !isTable(reader) &&
    !INTERRUPTIONS.some((pattern) => pattern.test(next)));
  return node("p", parseInline([line, ...more].map((next) => next.trim()).join("\n")));
}
// Code without an end, as in a text that still grows, goes to the end of the text.
function parseCode(reader, [line, fence, info]) {
  const isEnd = (next) => next.trim().startsWith(fence) && !next.replaceAll(fence[0], "").trim();
  const code = takeLines(reader, (next) => !isEnd(next));
  reader.at++;
  const text = code.map((next) => cutIndent(next, indentOf(line))).join("\n");
  return node("pre", [text], { "aria-label": info.trim() || "Code", role: "group", tabindex: 0 });
}
// An item has the lines that are indented more than its marker.
function parseList(reader, marker) {
  const [items, start] = [[], parseInt(marker)];
  while ((markerOf(reader.lines[reader.at]) || "").at(-1) === marker.at(-1)) {
    const line = reader.lines[reader.at++];
    const { length } = ITEM.exec(line)[0];
    const more = takeLines(reader, (next) => isBlank(next) || indentOf(next) > indentOf(line));
    const lines = [line.slice(length), ...more.map((next) => cutIndent(next, length))];
    items.push(node("li", parseBlocks(lines, reader.depth + 1)));
  }
  return node(start >= 0 ? "ol" : "ul", items, start >= 0 && { start });
}
const parseTable = (reader) => node("table", takeLines(reader, (line) => line.includes("|"))
  .filter((line, index) => index !== 1).map((line, index) => node("tr", splitCells(line)
    .map((cell) => node(index ? "td" : "th", parseInline(cell))))));
function parseInline(text) {
  const [parts, openers] = [[], []];
  let end = 0;
  for (const { 0: all, index, groups: { code, mark, label, href, url } } of text.matchAll(INLINE)) {
    parts.push(text.slice(end, index));
    end = index + all.length;
    if (mark) addMark(parts, openers, mark, text[index - 1], text[end]);
    else if (code) parts.push(node("code", [code.replace(/^ (.+) $/s, "$1")]));
    else if (url || href && href === label) parts.push(link(url || href, [url || href]));
    // The reader must see where a link leads.
    else if (href) parts.push(link(href, parseInline(label)), " (" + href + ")");
    else parts.push(all.replace(/^\\/, ""));
  }
  return [...parts, text.slice(end)];
}
// Marks that open have no space behind them, those that close none before; a _ is not in a word.
function addMark(parts, openers, mark, before = " ", after = " ") {
  const isInWord = (outside) => mark[0] === "_" && /[\p{L}\p{N}]/u.test(outside);
  const canOpen = after.trim() && !isInWord(before);
  const canClose = before.trim() && !isInWord(after);
  const isPair = (opener) => opener.mark === mark || mark[2] && opener.mark[0] === mark[0];
  while (canClose && openers.some(isPair)) {
    const opener = openers.findLast(isPair);
    openers.length = openers.indexOf(opener);
    parts.push(node(TAGS[opener.mark], parts.splice(opener.at).slice(1)));
    mark = mark.slice(opener.mark.length);
  }
  for (const part of mark.match(/\*\*|__|~~|./g) || []) {
    if (canOpen && openers.push({ mark: part, at: parts.length }) > MAX_NESTING) openers.shift();
    parts.push(part);
  }
}

const CODE_EXAMPLES = {
  curl: (url, body) => `curl -s -X POST ${url} -H "Authorization: Bearer cab-..." -d '${
    JSON.stringify(body).replaceAll("'", `'"'"'`)}'`,
  Python: (url, body) => `import json, urllib.request

body = ${JSON.stringify(body, null, 4)}
request = urllib.request.Request(
    "${url}", json.dumps(body).encode(), {"Authorization": "Bearer cab-..."})
with urllib.request.urlopen(request) as response:
    print(json.load(response)["response"])`,
  JavaScript: (url, body) => `const body = ${JSON.stringify(body, null, 2)};
const response = await fetch("${url}", {
  method: "POST", headers: { Authorization: "Bearer cab-..." }, body: JSON.stringify(body) });
console.log((await response.json()).response);` };

// === Elements and lists ===
const $ = (id) => document.getElementById(id);
const $$ = (selector) => [...document.querySelectorAll(selector)];
const setVisible = (id, isVisible) => { $(id).hidden = !isVisible };
const setText = (id, text) => { if ($(id).textContent !== String(text)) $(id).textContent = text };
// el("p.faint", { title: "..." }, "text", element): create an element; empty parts are skipped.
function el(tagAndClass, ...parts) {
  const [tag, className] = tagAndClass.split(".");
  return append(document.createElement(tag), className && { class: className }, ...parts);
}
function append(element, ...parts) {
  for (const part of parts.flat().filter((part) => part || part === 0)) {
    if (part.constructor !== Object) element.append(part);
    else for (const [name, value] of Object.entries(part)) element.setAttribute(name, value);
  }
  return element;
}
const row = (...parts) => el("div.row", ...parts);
const meta = (...parts) => el("span.meta", ...parts);
const textRegion = (label, text, tag = "p") =>
  el(tag + ".text", { tabindex: 0, role: "group", "aria-label": label }, text);
const answerRegion = () => textRegion("Answer", "", "div");
function renderNode(part) {
  if (!part.tag) return part;
  const result = el(part.tag, part.attributes, part.parts.map(renderNode));
  if (part.tag !== "pre") return result;
  const copy = button("Copy", () => copyText(result.textContent), "Copy the code");
  return el("div.code", el("div.space-between", meta(part.attributes["aria-label"]), copy), result);
}
// Change a region. If its reader is at the end, scroll along.
function changeAndScroll(region, change) {
  const isAtEnd = region.scrollHeight - region.scrollTop - region.clientHeight < 40;
  change();
  if (isAtEnd) region.scrollTop = region.scrollHeight;
}
// Show the text, which may have grown. A block that is still the same keeps its element.
const renderAnswer = (region, text) => changeAndScroll(region, () => {
  const isShort = text.length < 200000;
  const blocks = isShort ? parseBlocks(text.split("\n")) : [node("p", [text])];
  while (region.childNodes.length > blocks.length) region.lastChild.remove();
  blocks.forEach((block, index) => {
    const key = JSON.stringify(block);
    const child = region.childNodes[index] || region.appendChild(el("p"));
    if (child.key !== key) child.replaceWith(Object.assign(renderNode(block), { key }));
  });
});
// A button that shows the text as it is, or rendered again. show(): the text has changed.
function rawButton(region, getText) {
  let isRaw = false;
  const show = () => isRaw ? region.replaceChildren(getText()) : renderAnswer(region, getText());
  const element = button("Raw", () => {
    isRaw = !isRaw;
    element.setAttribute("aria-pressed", isRaw);
    show();
  });
  element.setAttribute("aria-pressed", isRaw);
  return Object.assign(element, { show });
}
const ageElement = (iso) => el("span", { "data-since": iso }, formatAge(iso));
const timeElement = (iso) =>
  el("time", { datetime: iso, title: new Date(iso).toLocaleString() }, formatTime(new Date(iso)));

// Make the children match the items. Unchanged children stay, with their focus and open details.
function reconcileList(id, items, build, keyOf = JSON.stringify) {
  const parent = $(id);
  const keys = items.map(keyOf);
  const children = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  for (const [key, child] of children) if (!keys.includes(key)) child.remove();
  items.forEach((item, index) => {
    const child = children.get(keys[index]) || build(item);
    child.dataset.key = keys[index];
    if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index]);
    child.update?.(item);
  });
}

// === Toasts and buttons ===
let toastTimer, filterTimer, linkedStatus;
function toast(text) {
  setText("toast", text);
  clearTimeout(toastTimer);
  toastTimer = setTimeout(setText, 6000, "toast", "");
}
const toastError = (error) => toast(error.message);
const withErrorToast = (action) => (event) => {
  event.preventDefault();
  new Promise((resolve) => resolve(action(event))).catch(toastError);
};
const button = (label, action, name = label) => Object.assign(
  el("button", { type: "button", "aria-label": name }, label), { onclick: withErrorToast(action) });
// A button that asks for confirmation in place. The focus moves to the harmless answer.
function confirmButton(label, question, action, accessibleName) {
  const container = row();
  const reset = () => container.replaceChildren(button(label, ask, accessibleName));
  const keep = () => { reset(); container.firstChild.focus() };
  const act = (event) => action(event).catch((error) => { keep(); throw error });
  const ask = () => {
    container.replaceChildren(
      question, button("Yes, " + label.toLowerCase(), act), button("Keep", keep));
    container.lastChild.focus();
  };
  reset();
  return container;
}
// A row of buttons of which one is pressed. labels: { value: label }.
function toggleGroup(id, labels, onChoose, initial) {
  const press = (value) => {
    for (const element of $(id).children)
      element.setAttribute("aria-pressed", element.textContent === labels[value]);
  };
  $(id).append(...Object.entries(labels).map(([value, label]) =>
    button(label, () => { press(value); return onChoose(value) })));
  press(initial);
}
async function copyText(text) {
  const problem = "The browser allows copying only on HTTPS pages. Select the text instead.";
  if (!navigator.clipboard) throw new Error(problem);
  await navigator.clipboard.writeText(text);
  toast("Copied.");
}

// === Calls to the bridge ===
let token = "", isSignedIn = false, isAdmin = false;
async function fetchOk(method, path, body, { headers, signal, isPublic } = {}) {
  const authorization = token && !isPublic && { Authorization: "Bearer " + token };
  const response = await fetch(path, { method, signal, cache: "no-store",
    headers: { ...headers, ...authorization }, body: body && JSON.stringify(body) });
  if (response.ok) return response;
  const { error, retryAfter } = await response.json().catch(() => ({}));
  if (response.status === 401 && isSignedIn) signOut("You were signed out. " + error);
  const message = error || "The bridge returned status " + response.status;
  throw Object.assign(new Error(message), { status: response.status, retryAfter });
}
const fetchJson = async (...args) => (await fetchOk(...args)).json();
const getJson = (path) => fetchJson("GET", path);
// Announce it, and give the focus to the next thing of the list.
async function deleteAndRefresh(path, word) {
  const item = document.activeElement.closest("li");
  const list = item?.parentElement;
  const index = list && [...list.children].indexOf(item);
  await fetchJson("DELETE", path);
  toast(word);
  await refreshNow();
  await listUpdate;
  if (!list || item.isConnected || document.activeElement !== document.body) return;
  const next = list.children[Math.min(index, list.children.length - 1)];
  (next?.querySelector("button, summary") || visibleHeading()).focus();
}
const visibleHeading = () => document.querySelector("[data-view]:not([hidden]) h2");

// Yield the events of a stream. Close it if it is silent: heartbeats come every 15 seconds.
async function* readEvents(path, body, headers, signal) {
  const aborter = new AbortController();
  const abort = () => aborter.abort();
  signal.addEventListener("abort", abort);
  let timer = setTimeout(abort, 8000);
  let buffer = "";
  try {
    const response = await fetchOk("POST", path, body, { headers, signal: aborter.signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
      clearTimeout(timer);
      timer = setTimeout(abort, 25000);
      const blocks = (buffer + chunk.value).split("\n\n");
      buffer = blocks.pop();
      yield* blocks.map(parseEvent).filter(Boolean);
    }
  } finally {
    clearTimeout(timer);
    abort();
  }
}

// Follow a request to its end and return its final body. id null: send the body as a new request.
// handlers.startText(status, data): the text starts, or restarts; handlers.addText(text): it grows.
// A stream that breaks is resumed at its offset. If no stream gets through, the request is polled.
async function followRequest(id, body, handlers, signal) {
  const headers = body && { "Idempotency-Key": "page-" + Date.now() + Math.random() };
  let offset = 0;
  let canStream = true;
  while (true) {
    let hasEvents = false;
    try {
      const path = id ? "/api/ask/" + id + "/events?after=" + offset : "/api/ask";
      const streamBody = id ? null : { ...body, stream: true };
      const events = canStream ? readEvents(path, streamBody, headers, signal) : [];
      for await (const { type, end, data } of events) {
        hasEvents = true;
        offset = end;
        if (FINISHED.includes(type)) return data;
        if (type === "delta") handlers.addText(data.text);
        else handlers.startText(type, data);
        id = id || data.requestId;
      }
    } catch (error) {
      if (signal.aborted || error.status) throw error;
    }
    canStream = canStream && hasEvents;
    try {
      id = id || (await fetchJson("POST", "/api/ask", body, { headers, signal })).requestId;
      const job = await fetchJson("GET", "/api/ask/" + id, null, { signal });
      if (FINISHED.includes(job.status)) return job;
      handlers.startText(job.status, { ...job, position: job.queuePosition });
      handlers.addText(job.partial || "");
      // The bridge counts code points, as the iterator of a string does.
      offset = [...job.partial || ""].length;
    } catch (error) {
      if (signal.aborted || error.status && !error.retryAfter) throw error;
    }
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

// === Sign-in and views ===
async function signIn(newToken) {
  setText("sign-in-error", "");
  token = newToken;
  try {
    await getJson("/api/requests?limit=1");
    isAdmin = "worker" in await getJson("/api/status");
    isSignedIn = true;
    // These are the figures of all tokens.
    if (!isAdmin) $("counters").replaceChildren();
    sessionStorage.setItem("token", token);
    $("sign-in").reset();
    setText("signed-in-as", token.slice(0, 12) + "…" + (isAdmin ? " (admin)" : ""));
    showView();
    refreshNow();
  } catch (error) {
    token = "";
    setText("sign-in-error", error.message);
  }
}
// Reload the page, so that nothing that was shown remains.
function signOut(reason) {
  sessionStorage.removeItem("token");
  sessionStorage.setItem("signOutReason", reason);
  location.reload();
}
function showView() {
  const userRole = isAdmin ? "admin" : "user";
  const role = isSignedIn ? userRole : "anonymous";
  for (const element of $$("[data-roles]")) element.hidden = !element.dataset.roles.includes(role);
  setVisible("linked", isSignedIn && linkedId());
  if (linkedId()) setVisible("overview", false);
  setVisible("figures", !isSignedIn || !linkedId());
  const links = $$("nav a:not([hidden])");
  const [hash] = location.hash.match(/^#\/[a-z]*/) || [];
  const current = links.find((link) => link.hash === hash) || links[0];
  for (const link of links) link.removeAttribute("aria-current");
  current.setAttribute("aria-current", "page");
  for (const view of $$("[data-view]")) view.hidden = view.dataset.view !== current.hash;
  if (current.hash === "#/api") showEndpoints().catch(toastError);
}

// === Polling ===
// Each poll reads the public counters; the rate-limited lists only on changes or after 30 seconds.
const lastFetch = { at: 0, allAt: 0, counters: "", tokenCount: 0 };
let pollNumber = 0, queueReason, pollTimer, lastUpdateAt = 0, listUpdate = Promise.resolve();
async function pollOnce() {
  clearTimeout(pollTimer);
  if (document.hidden) return;
  const number = ++pollNumber;
  let seconds = 5;
  try {
    if (await refresh()) seconds = 2;
    lastUpdateAt = Date.now();
  } catch (error) {
    const last = lastUpdateAt ? new Date(lastUpdateAt).toLocaleTimeString() : "never";
    seconds = error.retryAfter || 5;
    showState(error.retryAfter ? "rate limit: next update in " + seconds + " s"
      : "not reachable, last update: " + last, "bad");
  }
  if (number === pollNumber) pollTimer = setTimeout(pollOnce, 1000 * seconds);
}
function refreshNow() { lastFetch.at = lastFetch.allAt = 0; return pollOnce() }
function showState(text, className) {
  setText("state", text);
  $("state").className = className;
  document.title = text + " · claude-api-bridge";
}
async function refresh() {
  const { queue, stats, version } = await fetchJson("GET", "/api/status", null, { isPublic: true });
  const counters = [["Queued", stats.queuedRequests],
    ["Processing", queue.length - stats.queuedRequests], ["Completed", stats.completedRequests],
    ["Failed", stats.errorRequests], ["Requests", stats.totalRequests],
    ["Tokens", stats.totalTokens]];
  if (isAdmin || !isSignedIn) showFigures("counters", counters, formatCount);
  setText("version", "v" + version);
  queueReason = queue.waitingFor;
  showState(stateText(queue), queueReason ? "warm" : "good");
  setText("nothing-runs", queue.isProcessing ? "A request of another token is running."
    : "No request is running.");
  if (!isSignedIn) return queue.length > 0;
  const json = JSON.stringify(counters);
  const elapsed = Date.now() - lastFetch.at;
  if (elapsed > 30000 || elapsed > 3000 && json !== lastFetch.counters) {
    await refreshLists(stats);
    lastFetch.counters = json;
  }
  return queue.length > 0 || json !== lastFetch.counters;
}
// Updates run one after the other, so that an older response never overwrites a newer one.
async function refreshLists({ totalTokens: tokenCount, errorRequests }) {
  const at = Date.now();
  const isAll = at - lastFetch.allAt > 15000 || lastFetch.tokenCount !== tokenCount;
  Object.assign(lastFetch, { at, tokenCount }, isAll && { allAt: at });
  const update = () => Promise.all([refreshRequests(isAll && isAdmin),
    isAll && refreshOverview(), isAll && refreshErrors(errorRequests)]);
  listUpdate = listUpdate.then(update, update);
  await listUpdate;
  if (!isAdmin) showOwnCounters();
}
async function refreshRequests(includeTokens) {
  const [tokenList, active] = await Promise.all([includeTokens && getJson("/api/tokens"),
    getJson("/api/requests?limit=100&status=queued,processing")]);
  // The tokens come first because the rows below show their names.
  if (tokenList) showTokens(tokenList.tokens);
  showActive(active.requests);
  await Promise.all([loadRecent(), FINISHED.includes(linkedStatus) || showLinked()]);
  const hasRequests = recent.key || recent.requests.length + active.requests.length > 0;
  setVisible("first-run", isAdmin && !hasRequests && (firstSecret || tokenNames.size === 1));
}
// The failures that were fetched, when, and how many the bridge had counted then.
const failures = { count: -1, at: 0, requests: [], next: null };
async function refreshErrors(count) {
  if (count !== failures.count && Date.now() - failures.at > 30000) {
    const query = requestQuery({ status: "error", hours: 24 }, Date.now());
    const page = await getJson("/api/requests?limit=100&" + query);
    Object.assign(failures, page, { count, at: Date.now() });
  }
  const groups = groupErrors(failures.requests, Date.now());
  for (const { code } of groups) optionOf($("filters").elements.status, code);
  setVisible("errors-section", groups.length);
  reconcileList("errors", groups, errorRow);
}
function errorRow({ code, count, lastAt, advice }) {
  const label = code + " × " + count + (failures.next ? "+" : "");
  return el("li", row(button(label, () => setFilters({ status: code, hours: 24 }),
    label + ": show these requests"), meta("last at ", timeElement(lastAt)),
  advice && el("span.grow faint", sentence(advice))));
}
let firstSecret = "";
const showFirstCode = () => {
  const code = exampleCode("curl", {});
  setText("first-code", firstSecret ? code.replace("cab-...", firstSecret) : code);
};
async function createFirst() {
  firstSecret = (await fetchJson("POST", "/api/tokens", { name: "my-app" })).token;
  showFirstCode();
  setVisible("create-first", false);
  toast("Created. The command below has the token in it; it is shown only here.");
  $("copy-first").focus();
}
async function refreshOverview() {
  const [{ plan }, { conversations }, status] = await Promise.all([loadUsage(),
    getJson("/api/conversations"), isAdmin && getJson("/api/status")]);
  if (status) showBridge(status);
  showPlan(plan);
  setVisible("conversations-section", conversations.length);
  reconcileList("conversations", conversations, conversationRow, ({ name }) => name);
}
// figures: [label, number, format]; the tooltip has the exact number.
function showFigures(listId, figures, defaultFormat) {
  reconcileList(listId, figures, ([label, number, format = defaultFormat]) => {
    const id = listId + "-" + label.toLowerCase().replaceAll(/[^a-z0-9]+/g, "-");
    const filter = listId === "counters" && isSignedIn && COUNTER_FILTERS[label];
    return el("div", el("dt", filter ? button(label, () => setFilters(filter),
      label + ": show these requests") : label),
    el("dd.figure", { id, title: number }, format(number)));
  }, (figure) => isSignedIn + JSON.stringify(figure));
}
const COUNTER_FILTERS = {
  Completed: { status: "completed" }, Failed: { status: "error" }, Requests: {} };
// A token that is no admin sees the figures of its own requests.
function showOwnCounters() {
  const { requests, completed, errors } = shownUsage.total;
  showFigures("counters", [["Queued", $("waiting").children.length],
    ["Processing", $("running").children.length], ["Completed", completed], ["Failed", errors],
    ["Requests", requests]], formatCount);
  setText("counters-note", "Your own requests of the last " + usageDays + " days.");
}

// === Requests ===
// The names of all tokens by their id; empty unless an admin is signed in.
const tokenNames = new Map();
// The loaded requests that match the filters. key: the filters as they stand in the address.
const recent = { filters: {}, key: "", requests: [], show: () => showRecent() };
const tokenNameOf = (job) => truncate(tokenNames.get(job.tokenId) || "", 32);
const messagePreview = (job) => el("span.ellipsis", truncate(job.message));
const cancelButton = (job) => button("Cancel", () => deleteAndRefresh(
  "/api/ask/" + job.requestId, "Cancelled."), "Cancel: " + truncate(job.message, 60));
function showActive(jobs) {
  const running = jobs.filter((job) => job.status === "processing");
  const waiting = jobs.filter((job) => job.status === "queued");
  waiting.sort((first, second) => first.queuePosition - second.queuePosition);
  reconcileList("running", running, runningRow, requestKey);
  reconcileList("waiting", waiting, waitingRow, requestKey);
  setText("show-waiting", $("waiting").classList.contains("all") ? "Show fewer"
    : "Show " + (waiting.length - 5) + " more");
  setVisible("show-waiting", waiting.length > 5);
  const duration = queueDuration(waiting.length, recent.requests);
  setText("queue-estimate", waiting.length > 1 && duration >= 1000
    ? plural(waiting.length, "request") + ", about " + formatDuration(duration) : "");
  followRunning(running[0]);
}
// The row also handles the events of followRequest.
function runningRow(job) {
  const source = el("span");
  const text = textRegion("Answer so far", document.createTextNode(""));
  const startText = (status, { model }) => {
    const names = joinNonEmpty(model || job.model, tokenNameOf(job));
    source.textContent = names && " · " + names;
    text.firstChild.data = "";
  };
  startText("processing", job);
  const element = el("li.running", row(messagePreview(job), cancelButton(job)),
    meta(ageElement(job.startedAt), source), text);
  const addText = (addition) => changeAndScroll(text, () => text.firstChild.appendData(addition));
  return Object.assign(element, { startText, addText });
}
// The request whose text is followed: { id, aborter }.
let followed = null;
async function followRunning(job) {
  if (followed?.id === job?.requestId) return;
  followed?.aborter.abort();
  const current = job && { id: job.requestId, aborter: new AbortController() };
  followed = current;
  if (!job) return;
  const handlers = $("running").firstChild;
  await followRequest(job.requestId, null, handlers, current.aborter.signal).catch(() => null);
  if (followed !== current) return;
  // Short requests must not make the page fetch its lists more often than every 3 seconds.
  if (Date.now() - Date.parse(job.startedAt) > 3000) lastFetch.at = 0;
  pollOnce();
}
function waitingRow(job) {
  const [position, reason] = [meta(), meta()];
  const name = tokenNameOf(job);
  const details = meta(name && name + " · ", "waiting ", ageElement(job.createdAt));
  const element = el("li", row(position, messagePreview(job), details, cancelButton(job)), reason);
  const update = ({ queuePosition, waitingFor, resumesAt }) => {
    position.textContent = queuePosition;
    // The notice above the list says what all wait for.
    const isOwn = waitingFor !== queueReason;
    reason.replaceChildren(...isOwn ? waitingParts(waitingFor, resumesAt) : []);
  };
  return Object.assign(element, { update });
}
function showRecent() {
  reconcileList("recent", recent.requests, recentRow, requestKey);
  setText("match-count", recent.key && matchText(recent));
  setText("no-recent", recent.key ? "" : "No requests yet.");
  setText("load-more", recent.key && recent.searchedTo ? "Search further" : "Load more");
  showButton($("load-more"), recent.next, $("recent").lastChild?.querySelector("summary"));
}
// A button that disappears leaves its focus to another element.
function showButton(element, isVisible, nextFocus) {
  if (!isVisible && element === document.activeElement) nextFocus?.focus();
  element.hidden = !isVisible;
}
// Fetch a page into a list: the newest, or the one before `before`. Drop an answer that is late.
async function loadPage(list, before = null) {
  const { key, filters } = list;
  const query = requestQuery({ ...filters, before }, Date.now());
  const page = await getJson("/api/requests?limit=20&" + query);
  // A full page says enough by itself.
  if (page.requests.length === 20) page.searchedTo = null;
  if (key !== list.key || before && before !== list.next) return;
  const older = { ...page, requests: list.requests.concat(page.requests) };
  Object.assign(list, before ? older : mergeRecent(list, page));
  list.show();
}
// The filters of an address may be wrong; this is no reason to stop the updates of the page.
async function loadRecent() {
  try {
    await loadPage(recent);
  } catch (error) {
    if (![400, 404].includes(error.status)) throw error;
    recent.show();
    setText("match-count", error.message);
  }
}
const optionOf = (select, value) => [...select.options].find((option) => option.value === value) ||
  select.appendChild(el("option", { value }, value));
const formFields = (id) => nonEmpty(Object.fromEntries(new FormData($(id))));
const writeFilters = () => /^(#\/requests)?(\?.*)?$/.test(location.hash) &&
  history.replaceState(null, "", "#/requests" + (recent.key && "?" + recent.key));
async function applyFilters() {
  clearTimeout(filterTimer);
  const filters = formFields("filters");
  const key = new URLSearchParams(filters).toString();
  setVisible("clear-filters", key);
  if (key === recent.key) return;
  Object.assign(recent, { filters, key, requests: [], next: undefined, searchedTo: null });
  writeFilters();
  setText("match-count", "Searching…");
  if (isSignedIn) await loadRecent();
}
function setFilters(filters) {
  $("filters").reset();
  for (const [name, value] of Object.entries(filters)) {
    const field = $("filters").elements.namedItem(name);
    if (["status", "token"].includes(name)) optionOf(field, value);
    if (field) field.value = value;
  }
  $("filters").scrollIntoView();
  return applyFilters();
}
// The address may hold filters, #/requests?q=text, or a request, #/requests/ID.
function readFilters() {
  const query = location.hash.match(/^#\/requests\?(.*)/)?.[1];
  return query && setFilters(Object.fromEntries(new URLSearchParams(query)));
}
const linkedId = () => location.hash.match(/^#\/requests\/([\w-]+)$/)?.[1];
async function showLinked() {
  const id = linkedId();
  if (!id || !isSignedIn) return;
  let [jobs, problem] = [[], ""];
  try {
    jobs = [await getJson("/api/requests/" + id)];
  } catch (error) {
    const text = "There is no request with this ID that this token may see.";
    problem = error.status === 404 ? text : error.message;
  }
  if (id !== linkedId()) return;
  linkedStatus = jobs[0]?.status;
  setText("linked-error", problem);
  reconcileList("linked-list", jobs, (job) => {
    const item = recentRow(job);
    item.firstChild.open = true;
    return item;
  });
}
const OUTCOMES = { completed: ["good", "✓", "completed"], error: ["bad", "✕", "failed"],
  cancelled: ["faint", "–", "cancelled"], queued: ["faint", "…", "waiting"],
  processing: ["warm", "…", "running"] };
function recentRow(job) {
  const [color, mark, word] = OUTCOMES[job.errorCode] || OUTCOMES[job.status];
  const facts = joinNonEmpty(job.errorCode, tokenNameOf(job), job.api && "/v1", job.model,
    formatElapsed(job.startedAt, job.completedAt));
  const details = el("details", el("summary.row",
    el("span." + color, mark, el("span.visually-hidden", " " + word)), messagePreview(job),
    meta(facts && facts + " · ", timeElement(job.createdAt))));
  details.addEventListener("toggle", () => details.append(...requestDetails(job)), { once: true });
  return el("li", details);
}
function requestDetails(job) {
  const { createdAt, startedAt, completedAt, structured } = job;
  const answer = structured === undefined ? job.response : JSON.stringify(structured, null, 2);
  const texts = Object.entries({ "Prompt": job.message, "System prompt": job.systemPrompt,
    "Schema": job.jsonSchema && JSON.stringify(job.jsonSchema), "Answer": answer,
    ["Error: " + job.errorCode]: job.error, "What to do": sentence(job.advice) });
  const facts = joinNonEmpty(startedAt && "waited " + formatElapsed(createdAt, startedAt),
    startedAt && completedAt && "ran " + formatElapsed(startedAt, completedAt),
    job.attempts > 1 && job.attempts + " attempts", usageParts(job.usage),
    job.attachments?.map(({ name, mediaType, bytes }) =>
      (name || mediaType) + " (" + formatBytes(bytes) + ")"),
    job.effort && "effort " + job.effort, job.conversation && "conversation " + job.conversation);
  const address = "#/requests/" + job.requestId;
  const region = answerRegion();
  const raw = structured === undefined && answer && rawButton(region, () => answer);
  if (raw) raw.show();
  return [...texts.flatMap(([label, text]) => text ? [el("h3", label),
    raw && label === "Answer" ? region : textRegion(label, text)] : []),
    el("p", meta(facts && facts + " · ", el("a", { href: address }, job.requestId))),
    row(answer && button("Copy answer", () => copyText(answer)), raw,
      button("Copy link", () => copyText(location.origin + location.pathname + address)),
      !FINISHED.includes(job.status) ? cancelButton(job)
        : !job.api && !job.attachments && button("Ask again", () => askAgain(job)))];
}
async function askAgain({ message, model, systemPrompt, effort, jsonSchema, conversation }) {
  await fetchJson("POST", "/api/ask",
    { message, model, systemPrompt, effort, jsonSchema, conversation });
  toast("Asked again.");
  refreshNow();
}
function conversationRow({ name }) {
  const [facts, turns] = [meta(), el("ol.list", { id: "turns-" + name })];
  const earlier = button("Earlier turns", () => loadPage(thread, thread.next));
  const summary = el("summary.row", el("span.ellipsis", name), facts);
  const details = el("details.grow", summary, earlier, turns);
  const show = () => {
    showButton(earlier, thread.next, summary);
    const finished = thread.requests.filter((job) => FINISHED.includes(job.status));
    reconcileList(turns.id, finished.reverse(), turnRow, requestKey);
  };
  const thread = { filters: { conversation: name }, requests: [], show };
  const load = () => details.open && loadPage(thread).catch(toastError);
  earlier.hidden = true;
  details.addEventListener("toggle", load);
  const drop = () => deleteAndRefresh("/api/conversations/" + encodeURIComponent(name), "Deleted.");
  const element = el("li.row", details,
    button("Continue", () => continueConversation(name), "Continue " + name),
    confirmButton("Delete", "Delete this conversation?", drop, "Delete " + name));
  const update = (entry) => {
    facts.replaceChildren(plural(entry.turns, "turn") + " · ", timeElement(entry.lastUsedAt));
    if (thread.turns !== entry.turns) load();
    thread.turns = entry.turns;
  };
  return Object.assign(element, { update });
}
function turnRow(job) {
  const answer = answerRegion();
  renderAnswer(answer, job.response ?? job.error);
  const prompt = append(textRegion("Prompt", job.message), { class: "text prompt" });
  return el("li", prompt, answer, meta(el("a", { href: "#/requests/" + job.requestId },
    timeElement(job.createdAt))));
}

// === Bridge, plan and usage ===
function showBridge({ tunnel, claude, worker }) {
  const { state, url, error, retryInSeconds } = tunnel;
  const isOff = state === "stopped";
  const retry = retryInSeconds && "retries in " + retryInSeconds + " s";
  const facts = Object.entries({ "Public address": url || !isOff && "not available yet",
    "Tunnel": joinNonEmpty(isOff ? "off" : state, error, retry),
    "Claude": joinNonEmpty(claude.version, claude.payer),
    "Worker": !worker.alive && "stopped: restart the bridge" });
  const copyButton = () => button("Copy", () => copyText(url), "Copy the public address");
  reconcileList("bridge-facts", facts.filter(([, text]) => text), ([label, text]) =>
    el("div", el("dt", label), el("dd.row", text, text === url && copyButton())));
}
const waitingParts = (reason, until) =>
  reason ? [waitingText(reason), until ? timeElement(until) : ""] : [];
function showPlan({ windows, waitingFor, resumesAt, isUsingOverage }) {
  $("plan-notice").replaceChildren(...waitingFor
    ? waitingParts(waitingFor, resumesAt) : ["Requests use paid extra usage now."]);
  setVisible("plan-notice", waitingFor || isUsingOverage);
  setText("pause-queue", waitingFor === "paused" ? "Resume the queue" : "Pause the queue");
  setVisible("plan", windows.length);
  reconcileList("plan-limits", windows, planLimitRow);
}
function planLimitRow({ type, status, utilization, resetsAt }) {
  const name = limitName(type);
  const forecast = exhaustedAt({ type, utilization, resetsAt }, Date.now());
  const used = utilization === null ? codeToText(status || "unknown")
    : Math.round(100 * utilization) + " % used";
  return el("li", el("div.space-between", name, el("span.faint", used)),
    el("progress", { value: utilization || 0, "aria-label": name }),
    meta(resetsAt && ["resets ", timeElement(resetsAt)]),
    forecast && el("p.warm", "At this pace used up at ", timeElement(forecast.toISOString())));
}
let usageDays = 30, shownUsage = { total: {}, days: [] };
// Return the usage of the chosen days. Show it, unless other days were chosen meanwhile.
async function loadUsage() {
  const days = usageDays;
  const usage = await getJson("/api/usage?days=" + days);
  if (days === usageDays) showUsage(usage);
  return usage;
}
function showUsage(usage) {
  const { total, days, models, tokens, latency } = shownUsage = usage;
  setVisible("no-latency", !latency.requests);
  setVisible("latency", latency.requests);
  showFigures("latency", [["Waiting", latency.waitingMs], ["First token", latency.firstTokenMs]]
    .flatMap(([name, { p50, p95 }]) => [[name + ", p50", p50], [name + ", p95", p95]]),
  formatLatency);
  setVisible("no-usage", !days.length);
  setVisible("usage-parts", days.length);
  setText("usage-title", "Last " + usageDays + " days");
  showFigures("totals", [["Requests", total.requests], ["Failed", total.errors],
    ["Tokens in", total.inputTokens], ["Tokens out", total.outputTokens],
    ["Cache read", total.cacheReadTokens], ["Cache write", total.cacheCreationTokens],
    ["Est. cost", total.costUsd, formatCost]], formatCompact);
  reconcileList("usage-by-day", days.slice().reverse(), (usage) => usageRow(usage.day, usage));
  reconcileList("usage-by-model", models, (usage) =>
    usageRow(usage.model ?? "unknown", { ...usage, requests: usage.completed }));
  reconcileList("usage-by-token", tokens, (usage) =>
    usageRow(usage.name ?? "revoked: " + usage.tokenId.slice(0, 8), usage));
  append($("download-csv"), { download: "usage-" + usageDays + "-days.csv",
    href: "data:text/csv;charset=utf-8," + encodeURIComponent(usageCsv(days)) });
  reconcileList("legend", Object.keys(SERIES), legendButton);
  drawChart();
}
const usageRow = (name, usage) => el("tr", el("th", { scope: "row" }, name),
  el("td", formatCount(usage.requests)), el("td", { title: formatCount(totalTokens(usage)) },
    formatCompact(totalTokens(usage))), el("td", formatDollars(usage.costUsd)));
const SERIES = { in: (usage) => usage.inputTokens, out: (usage) => usage.outputTokens,
  cache: (usage) => usage.cacheReadTokens + usage.cacheCreationTokens };
const hiddenSeries = new Set();
function legendButton(name) {
  const element = button(name, () => {
    if (!hiddenSeries.delete(name)) hiddenSeries.add(name);
    drawChart();
  });
  element.removeAttribute("aria-label");
  return Object.assign(element, { update: () => element.replaceChildren(el("span." + name, "■ "),
    formatCompact(SERIES[name](shownUsage.total)) + " " + name) });
}
// One bar for each day. The transparent rectangle behind a bar takes the mouse pointer.
function drawChart() {
  const svg = $("chart");
  const node = (tag, ...parts) => append(document.createElementNS(svg.namespaceURI, tag), ...parts);
  const series = Object.keys(SERIES).filter((name) => !hiddenSeries.has(name));
  const sumOf = (usage) => series.reduce((sum, name) => sum + SERIES[name](usage), 0);
  const [highest] = shownUsage.days.slice().sort((first, second) => sumOf(second) - sumOf(first));
  const days = new Map(shownUsage.days.map((usage) => [usage.day, usage]));
  const bars = Array.from({ length: usageDays }, (_, x) => {
    const day = new Date(Date.parse(shownUsage.since) + x * DAY_MS).toISOString().slice(0, 10);
    const usage = days.get(day);
    const title = joinNonEmpty(day, usage && [plural(totalTokens(usage), "token"),
      plural(usage.requests, "request"), "est. " + formatDollars(usage.costUsd)]);
    let y = 100;
    const parts = usage ? series.map((name) => {
      const height = 96 * SERIES[name](usage) / Math.max(1, sumOf(highest));
      y -= height;
      return node("rect", { class: name, x, y, height, width: usageDays > 90 ? 1 : 0.75 });
    }) : [];
    return node("g", node("title", title),
      node("rect", { class: "day", x, width: 1, height: 100 }), parts);
  });
  svg.setAttribute("viewBox", "0 0 " + usageDays + " 100");
  svg.replaceChildren(...bars);
  for (const element of $("legend").children)
    element.setAttribute("aria-pressed", !hiddenSeries.has(element.dataset.key));
  setText("chart-start", shownUsage.since);
  setText("chart-maximum", highest ? "highest: " + highest.day + ", " +
    plural(sumOf(highest), "token") : "");
}

// === Tokens ===
function showTokens(tokens) {
  for (const { id, name } of tokens) {
    tokenNames.set(id, name);
    optionOf($("filters").elements.token, id).textContent = truncate(name, 32);
  }
  // The rest is updated within the row.
  reconcileList("tokens", tokens, tokenRow, ({ lastUsedAt, expiresAt, isExpired, ...entry }) =>
    JSON.stringify(entry));
}
function tokenRow(entry) {
  const { id, name, tools, requestsPerMinute, requestsPerDay } = entry;
  const facts = joinNonEmpty(entry.prefix + "…", entry.sessionMode,
    tools !== "none" && tools !== "all" && "tools: " + [tools].flat().join(", "),
    requestsPerMinute && requestsPerMinute + " per minute",
    requestsPerDay && requestsPerDay + " per day", entry.models?.join(", "));
  const revokeButton = confirmButton("Revoke", "This also deletes its requests. Revoke?",
    async () => {
      if (createdId === id) showCreated();
      await deleteAndRefresh("/api/tokens/" + id, "Revoked.");
    }, "Revoke " + name);
  const rotateButton = confirmButton("Rotate", "The present secret stops working. Rotate?",
    async () => showCreated(await fetchJson("POST", "/api/tokens/" + id + "/rotate"), name),
    "Rotate " + name);
  const [times, badges] = [meta(), el("span.row")];
  const element = el("li", row(el("b", name), badges,
    el("div.row end", editButton(entry), rotateButton, revokeButton)), meta(facts + " · "), times);
  const update = (current) => {
    const { lastUsedAt, expiresAt, isExpired } = current;
    badges.replaceChildren(...tokenBadges(current, Date.now()).map(([text, isDangerous]) =>
      el(isDangerous ? "span.badge" : "span.badge faint", text)));
    times.replaceChildren(...lastUsedAt ? ["last used ", timeElement(lastUsedAt)] : ["never used"]);
    const verb = isExpired ? " · expired " : " · expires ";
    if (expiresAt) times.append(verb, timeElement(expiresAt));
  };
  return Object.assign(element, { update });
}
async function createToken() {
  const fields = Object.fromEntries(new FormData($("token-form")));
  const path = editedId ? "/api/tokens/" + editedId : "/api/tokens";
  const body = newTokenBody({ tools: "none", ...fields });
  // Only what was changed, so that nothing else is written again.
  const changes = Object.entries(body).filter(([name]) => fields[name] !== editedFields[name]);
  const answer = !editedId ? await fetchJson("POST", path, body)
    : changes.length && await fetchJson("PATCH", path, Object.fromEntries(changes));
  if (editedId) toast("Changed.");
  else showCreated(answer, fields.name);
  editToken(null);
  refreshNow();
}
// The token whose secret is shown, and the one that the form changes.
let createdId = null, editedId = null, editedFields = {};
function showCreated(created, name) {
  createdId = created?.tokenId;
  setVisible("created-token", created);
  if (!created) return $("created-token").replaceChildren();
  const done = button("Done", () => { showCreated(); visibleHeading().focus() });
  $("created-token").replaceChildren(
    el("p", "Copy the token ", el("b", name), " now: it is shown only once."),
    el("code", created.token), row(button("Copy token", () => copyText(created.token)), done));
  $("created-token").querySelector("button").focus();
}
const editButton = (entry) => button("Edit", () => editToken(entry), "Edit " + entry.name);
// Put a token into the form; null makes it the form of a new one.
function editToken(entry) {
  const form = $("token-form");
  editedId = entry?.id ?? null;
  form.reset();
  for (const name of ["sessionMode", "tools", "admin"]) {
    form.elements[name].disabled = Boolean(entry);
    // They cannot be changed; the list shows them.
    form.elements[name].closest("label").hidden = Boolean(entry);
  }
  setText("token-form-title", entry ? "Edit " + entry.name : "New token");
  setText("save-token", entry ? "Save" : "Create token");
  setVisible("cancel-edit", entry);
  setText("rights-warning", "");
  if (!entry) return;
  const days = entry.expiresAt && Math.ceil((Date.parse(entry.expiresAt) - Date.now()) / DAY_MS);
  const values = { ...entry, models: entry.models?.join(", "), expiresInDays: days > 0 && days };
  for (const name of ["name", "expiresInDays", "requestsPerMinute", "requestsPerDay", "models"])
    form.elements[name].value = values[name] || "";
  editedFields = Object.fromEntries(new FormData(form));
  form.elements.name.focus();
}

// === Playground and API ===
// The request that the playground sent: { id, aborter }, and the text of its answer.
let playgroundRun = null, answerText = "", answerFrame;
const rawAnswer = rawButton($("answer"), () => answerText);
$("copy-answer").after(rawAnswer);
// At most once for each frame, because a long text takes some milliseconds.
function showAnswer(text) {
  answerText = text;
  cancelAnimationFrame(answerFrame);
  answerFrame = requestAnimationFrame(rawAnswer.show);
}
let language = "curl";
function askFields() {
  const { jsonSchema, ...fields } = formFields("ask-form");
  const attachments = images.map(({ key, ...image }) => image);
  return nonEmpty({ ...fields, jsonSchema: jsonSchema && JSON.parse(jsonSchema),
    attachments: attachments.length && attachments });
}
function checkedFields() {
  try {
    return askFields();
  } catch (error) {
    throw new Error("The JSON Schema is not JSON: " + error.message);
  }
}
const exampleCode = (name, fields) => CODE_EXAMPLES[name](location.origin + "/api/ask",
  { message: "Why is the sky blue?", ...fields, wait: 60 });
function showCode() {
  setVisible("code-note", images.length);
  try {
    const fields = askFields();
    for (const image of fields.attachments || []) image.data = "BASE64";
    setText("code", exampleCode(language, fields));
  } catch {
    // While the schema is being written.
  }
}
// The images to send. A body may have 1 MiB; this is for the base64 of all of them.
let images = [], imageCount = 0;
const IMAGE_CHARACTERS = 900000;
const IMAGE_TYPES = ["image/png", "image/jpeg", "image/gif", "image/webp"];
async function addImages(files) {
  for (const file of [...files]) {
    const room = images.reduce((rest, { data }) => rest - data.length, IMAGE_CHARACTERS);
    const url = await imageUrl(file, room);
    if (url.length > room) throw new Error(file.name + " is too large: all images together may " +
      "have " + formatBytes(IMAGE_CHARACTERS * 0.75) + ". Remove one, or take a smaller one.");
    const [head, data] = url.split(",");
    images.push({ key: ++imageCount, name: file.name, mediaType: head.slice(5, -7), data });
    showImages();
  }
}
// The image as a data: URL. It becomes a smaller JPEG if it is large.
async function imageUrl(file, room) {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Error(file.name + " is not an image that this browser can read.");
  });
  const longest = Math.max(bitmap.width, bitmap.height);
  if (longest <= 1568 && file.size < 200000 && IMAGE_TYPES.includes(file.type)) {
    const bytes = new Uint8Array(await file.arrayBuffer());
    const text = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
    return "data:" + file.type + ";base64," + btoa(text);
  }
  let url = "";
  for (const edge of [1568, 1024, 640]) {
    url = drawJpeg(bitmap, Math.min(1, edge / longest));
    if (url.length <= room) break;
  }
  return url;
}
function drawJpeg(bitmap, scale) {
  const [width, height] = [bitmap.width, bitmap.height].map((size) => Math.ceil(size * scale));
  const canvas = el("canvas", { width, height });
  const context = canvas.getContext("2d");
  // A JPEG has no transparent parts; these would become black.
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  return canvas.toDataURL("image/jpeg", 0.8);
}
function showImages() {
  reconcileList("images", images, (image) => el("li.row", el("span.ellipsis", image.name),
    meta(formatBytes(image.data.length * 0.75)), button("Remove", () => {
      images = images.filter((other) => other !== image);
      showImages();
      $("add-images").focus();
    }, "Remove " + image.name)), ({ key }) => String(key));
  showCode();
}
// Take the files of a paste or a drop. Without files, it goes on as usual.
function takeFiles(event, { files }) {
  if (!files.length) return;
  event.preventDefault();
  addImages(files).catch(toastError);
}
function continueConversation(name) {
  location.hash = "#/playground";
  $("ask-form").elements.conversation.value = name;
  showCode();
}
async function ask() {
  if ($("ask").hidden) return;
  const run = { id: null, aborter: new AbortController() };
  const body = checkedFields();
  const startedAt = Date.now();
  const startText = (status, { requestId, position, waitingFor }) => {
    run.id = requestId;
    showAnswer("");
    setText("ask-status", status !== "queued" ? "answering"
      : joinNonEmpty("waiting, position " + position, waitingFor && codeToText(waitingFor)));
  };
  const handlers = { startText, addText: (text) => showAnswer(answerText + text) };
  const swapButtons = () => ["ask", "stop"].forEach((id) => { $(id).hidden = !$(id).hidden });
  playgroundRun = run;
  const isByButton = document.activeElement === $("ask");
  swapButtons();
  if (isByButton) $("stop").focus();
  setVisible("answer-section", true);
  setText("answer-usage", "");
  setText("ask-status", "sent");
  try {
    const job = await followRequest(null, body, handlers, run.aborter.signal);
    const failure = [job.error, sentence(job.advice)].filter(Boolean).join("\n\n");
    showAnswer(failure || job.response);
    setText("ask-status", job.error ? "failed: " + (job.errorCode || job.code)
      : "done in " + formatExact(Date.now() - startedAt));
    setText("answer-usage", joinNonEmpty(job.model, usageParts(job.usage)));
  } catch (error) {
    setText("ask-status", run.aborter.signal.aborted ? "stopped" : error.message);
  }
  const hadFocus = document.activeElement === $("stop");
  swapButtons();
  if (hadFocus) $("ask").focus();
  refreshNow();
}
async function showEndpoints() {
  const { endpoints } = await fetchJson("GET", "/", null, { isPublic: true });
  reconcileList("endpoints", Object.entries(endpoints), ([name, summary]) => el("tr",
    el("th", { scope: "row" }, el("code", name)), el("td", summary.replaceAll("`", ""))));
}

// === Keyboard shortcuts ===
// Not with a modifier, nor while something is written. The list of the keys can turn them off.
const SHORTCUTS = { "?": () => $("shortcuts").showModal(), "/": focusSearch,
  j: () => focusRecent(1), k: () => focusRecent(-1) };
function focusSearch() {
  if ($("search").offsetParent || !isSignedIn) return $("search").focus();
  addEventListener("hashchange", () => $("search").focus(), { once: true });
  location.hash = "#/requests";
}
function focusRecent(step) {
  const rows = [...$("recent").children];
  const index = rows.indexOf(document.activeElement.closest("#recent > li")) + step;
  rows[Math.min(Math.max(index, 0), rows.length - 1)]?.querySelector("summary").focus();
}
document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest("input, select, textarea, dialog");
  const hasModifier = event.ctrlKey || event.metaKey || event.altKey;
  if (isTyping || hasModifier || !$("use-shortcuts").checked) return;
  const link = $$("nav a:not([hidden])")[event.key - 1];
  const action = link ? () => link.click() : SHORTCUTS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});
try {
  $("use-shortcuts").checked = localStorage.getItem("shortcuts") !== "off";
} catch {
  // The browser stores nothing: the keys are on.
}

// === Event listeners and start ===
const listen = (id, event, action) => $(id).addEventListener(event, action);
const onClick = (id, action) => listen(id, "click", withErrorToast(action));
listen("sign-in", "submit", withErrorToast(() => signIn($("token-field").value.trim())));
listen("sign-out", "click", () => signOut("Signed out."));
listen("filters", "input", () => {
  clearTimeout(filterTimer);
  filterTimer = setTimeout(() => applyFilters().catch(toastError), 300);
});
listen("filters", "submit", withErrorToast(applyFilters));
onClick("clear-filters", () => { $("search").focus(); return setFilters({}) });
onClick("pause-queue", async () => {
  const isPaused = $("pause-queue").textContent.startsWith("Resume");
  await fetchJson("POST", "/api/queue/" + (isPaused ? "resume" : "pause"));
  await refreshOverview();
});
onClick("load-more", () => loadPage(recent, recent.next));
listen("token-form", "submit", withErrorToast(createToken));
listen("token-form", "input", () => setText("rights-warning", rightsWarning(
  $("token-form").elements.tools.value, $("token-form").elements.admin.checked)));
listen("cancel-edit", "click", () => { editToken(null); visibleHeading().focus() });
listen("show-waiting", "click", () => { $("waiting").classList.toggle("all"); refreshNow() });
onClick("skip", () => document.querySelector("main").focus());
listen("ask-form", "submit", withErrorToast(ask));
listen("ask-form", "input", showCode);
listen("ask-form", "keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask-form").requestSubmit();
});
onClick("stop", () => playgroundRun.id ? fetchJson("DELETE", "/api/ask/" + playgroundRun.id)
  : playgroundRun.aborter.abort());
listen("add-images", "click", () => $("image-files").click());
listen("image-files", "change", () => {
  addImages($("image-files").files).catch(toastError);
  $("image-files").value = "";
});
listen("ask-form", "paste", (event) => takeFiles(event, event.clipboardData));
listen("ask-form", "drop", (event) => takeFiles(event, event.dataTransfer));
listen("ask-form", "dragover", (event) => {
  if (event.dataTransfer.types.includes("Files")) event.preventDefault();
});
listen("show-shortcuts", "click", SHORTCUTS["?"]);
listen("close-shortcuts", "click", () => $("shortcuts").close());
listen("use-shortcuts", "change", withErrorToast(() =>
  localStorage.setItem("shortcuts", $("use-shortcuts").checked ? "on" : "off")));
onClick("create-first", createFirst);
onClick("copy-first", () => copyText($("first-code").textContent));
onClick("copy-answer", () => copyText(answerText));
onClick("copy-code", () => copyText($("code").textContent));

const DAYS = { 7: "7 days", 30: "30 days", 90: "90 days", 365: "365 days" };
const LANGUAGES = { curl: "curl", Python: "Python", JavaScript: "JavaScript" };
toggleGroup("usage-days", DAYS, (days) => { usageDays = Number(days); return loadUsage() }, "30");
toggleGroup("languages", LANGUAGES, (name) => { language = name; showCode() }, "curl");

addEventListener("hashchange", withErrorToast(() => {
  showView();
  visibleHeading().focus();
  if (location.hash === "#/requests") writeFilters();
  return Promise.all([readFilters(), showLinked()]);
}));
document.addEventListener("visibilitychange", () =>
  document.hidden ? followRunning(null) : refreshNow());
setInterval(() => {
  for (const element of $$("[data-since]")) element.textContent = formatAge(element.dataset.since);
  const age = formatDuration(Date.now() - lastUpdateAt);
  setText("last-update", lastUpdateAt ? "updated " + age + " ago" : "");
}, 1000);

showView();
showCode();
showFirstCode();
setText("sign-in-error", sessionStorage.getItem("signOutReason") || "");
sessionStorage.removeItem("signOutReason");
pollOnce();
// The link that `start` prints; the token does not stay in the address.
const linkedToken = new URLSearchParams(location.hash.slice(1)).get("token");
if (linkedToken) history.replaceState(null, "", location.pathname);
readFilters();
const firstToken = linkedToken || sessionStorage.getItem("token");
if (firstToken) signIn(firstToken);
"""

DASHBOARD_PAGE = DASHBOARD_HTML.replace("STYLE", DASHBOARD_CSS).replace("SCRIPT", DASHBOARD_JS)


def dashboard_page(nonce: str) -> bytes:
    """Return the page. Its style and its script carry the nonce of the response's policy."""
    return DASHBOARD_PAGE.replace("NONCE", nonce).encode()


def content_security_policy(nonce: str) -> str:
    """Return the policy that allows only the page's own style and script, and its own server."""
    return ("default-src 'none';script-src 'nonce-%s';style-src 'nonce-%s';connect-src 'self';"
            "img-src data:;base-uri 'none';form-action 'none';frame-ancestors 'none'"
            % (nonce, nonce))


# === 16 App ======================================================================================
# Constructs, starts and closes all parts. It knows the order, nothing else.

LOCK_WAIT_SECONDS = 0.2
# For the check of a recalled `claude`, when the bridge ends.
CHECK_JOIN_SECONDS = 2.0


class DirectoryLock:
    """One bridge per data folder: an exclusive lock on bridge.lock. The system frees it when the
    process ends. wait_seconds: for a command that looks whether a bridge runs, and so holds it for
    a moment. Raises CannotStart, naming the holder."""

    def __init__(self, path: Path, wait_seconds: float = 0.0) -> None:
        try:
            self._file = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise CannotStart("The folder %s cannot be used: %s." % (path.parent, error.strerror),
                              "make it writable, or choose another one with --data-dir") from None
        try:
            gives_up_at = Clock.monotonic() + wait_seconds
            while not self._lock(must=Clock.monotonic() >= gives_up_at):
                time.sleep(0.02)
        except OSError as error:
            # Wine 8 reports 0.
            if error.errno not in (0, errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                os.close(self._file)
                raise CannotStart(
                    "The file system of %s cannot lock files: %s." % (path.parent, error.strerror),
                    "choose a folder on a local disk with --data-dir") from None
            os.lseek(self._file, 0, os.SEEK_SET)
            holder = os.read(self._file, 200).decode("utf-8", "replace").strip()
            os.close(self._file)
            raise CannotStart("Another bridge is running with this data folder%s."
                              % (": " + holder if holder else ""),
                              "stop it first, or choose another folder with --data-dir") from None

    def _lock(self, must: bool) -> bool:
        """-> whether it is ours. Raises OSError if it is not and must be."""
        try:
            if sys.platform == "win32":
                import msvcrt
                # Beyond the text, which others must be able to read.
                os.lseek(self._file, 4_096, os.SEEK_SET)
                msvcrt.locking(self._file, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if must:
                raise
            return False
        return True

    def write(self, text: str) -> None:
        """Write the holder's pid and address, which a refused start prints."""
        os.lseek(self._file, 0, os.SEEK_SET)
        os.ftruncate(self._file, 0)
        os.write(self._file, text.encode())

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


@dataclass(eq=False)
class BridgeStatus:
    """What the public pages and the admin see of the parts: a StatusSource. Any thread."""
    _stores: Stores
    _worker: Worker
    _program: ClaudeProgram
    _tunnel: Optional[Tunnel]
    _config: Config
    _metrics: Metrics
    _clock: Clock
    _started_at: float

    def page(self) -> Response:
        nonce = secrets.token_urlsafe(16)
        headers = (("Content-Security-Policy", content_security_policy(nonce)),
                   ("X-Frame-Options", "DENY"))
        return Response(200, dashboard_page(nonce), "text/html; charset=utf-8", headers)

    def check_worker(self) -> None:
        if not self._worker.is_alive:
            raise Unavailable("The worker has ended. Restart the bridge.")

    def details(self) -> Dict[str, Any]:
        job_id, since = self._worker.running or (None, None)
        install = self._program.install
        return {"worker": {"alive": self._worker.is_alive, "requestId": job_id,
                           "since": iso_time(since), "spareReady": self._worker.idle_processes > 0},
                "plan": plan_body(self._stores.usage.plan_limits(), self._worker.current_pause(),
                                  self._clock.now()),
                "tunnel": self._tunnel_details(),
                "claude": {"version": install.features.version_text, "command": install.command[-1],
                           "payer": install.billing_account}}

    def _tunnel_details(self) -> Dict[str, Any]:
        if self._tunnel:
            return self._tunnel.details()
        return {"state": TunnelState.STOPPED, "url": self._config.public_url or None}

    def metrics(self) -> str:
        return metrics_text({**self._metrics.values(), **self._gauges()})

    def latency(self, owner: Optional[str]) -> Dict[str, Any]:
        latencies = self._metrics.latencies(self._clock.now() - 3_600, owner)

        def percentiles(values: Sequence[Optional[float]]) -> Dict[str, Any]:
            times = [round(value * 1000) for value in values if value is not None]
            return {"p50": percentile(times, 0.5), "p95": percentile(times, 0.95)}

        return {"requests": len(latencies),
                "waitingMs": percentiles([latency.waiting for latency in latencies]),
                "firstTokenMs": percentiles([latency.first_text for latency in latencies])}

    def _gauges(self) -> Dict[Tuple[str, Labels], float]:
        tunnel = self._tunnel_details()
        version = self._program.install.features.version_text
        gauges: Dict[Tuple[str, Labels], float] = {
            ("cab_info", (("version", __version__), ("claude", version))): 1,
            ("cab_start_time_seconds", ()): self._started_at,
            ("cab_spares", ()): self._worker.idle_processes,
            ("cab_waiting", ()): self._worker.waiting_processes,
            ("cab_resting", ()): self._worker.current_pause() is not None,
            ("cab_access_tokens", ()): self._stores.tokens.count(),
            ("cab_tunnel_up", ()): bool(self._tunnel and tunnel["url"]),
            ("cab_tunnel_state", (("state", tunnel["state"]),)): 1,
            ("cab_tunnel_starts_total", ()): tunnel.get("starts", 0)}
        for pause in self._worker.holds.active().values():
            gauges["cab_held", (("reason", pause.reason),)] = 1
        counts = self._stores.jobs.counts()
        for status in JobStatus.UNFINISHED:
            gauges["cab_queue_length", (("status", status),)] = counts.get(status, 0)
        for window in self._stores.usage.plan_limits():
            labels = (("window", window.kind),)
            if window.resets_at is not None and window.resets_at <= self._clock.now():
                continue
            if window.utilization is not None:
                gauges["cab_plan_utilization", labels] = window.utilization
            if window.resets_at is not None:
                gauges["cab_plan_resets_at_seconds", labels] = window.resets_at
        return gauges


class Bridge:
    """The complete bridge, a context manager that starts and stops it. Raises CannotStart."""

    def __init__(self, config: Config, install: ClaudeInstall, clock: Clock, tunnel_token: str = "",
                 observer: Optional[TunnelObserver] = None) -> None:
        self.config = config
        self.tunnel: Optional[Tunnel] = None
        # Created if there was none; to be shown once, or discarded.
        self.new_admin_token: Optional[str] = None
        self.discard_admin_token: Callable[[], Any] = lambda: None
        self._install = install
        self._clock = clock
        self._tunnel_token = tunnel_token
        self._observer = observer or TunnelObserver()
        self._exit_stack = contextlib.ExitStack()

    def __enter__(self) -> "Bridge":
        with self._exit_stack:
            self._start()
            self._exit_stack = self._exit_stack.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._exit_stack.close()

    def _start(self) -> None:
        """Lock, port, stores, orphans, recovery, worker. They close in this order: accept no more,
        worker, waiters, server, tunnel (whose end begins at once), stores."""
        data_dir = data_directory(self.config.data_dir)
        on_exit = self._exit_stack.callback
        lock = DirectoryLock(data_dir / "bridge.lock", LOCK_WAIT_SECONDS)
        on_exit(lock.close)
        # Not the address of the last bridge.
        lock.write("process %d" % os.getpid())
        self._server = self._listen()
        on_exit(self._server.server_close)
        metrics = Metrics()
        stores = self._open_stores(data_dir / "bridge.db", metrics)
        on_exit(stores.close)
        stores.database.mark_in_use()
        tunnel = self.tunnel = None if self.config.no_tunnel else self._make_tunnel(stores.database)
        if tunnel:
            on_exit(tunnel.close)
        on_exit(self._server.close)
        notifier = Notifier()
        program = ClaudeProgram(self._install, lambda: find_claude(self.config, os.environ))
        pool = ClaudePool(program, self.config, self._clock, data_tag(data_dir) + ".claude",
                          stores.database, metrics)
        worker = Worker(stores, ClaudeRunner(pool), notifier, self.config, self._clock, metrics)
        models = ModelCatalog(program, data_dir, self._clock)
        service = Service(stores, notifier, self._clock, data_dir, worker, models)
        status = BridgeStatus(stores, worker, program, tunnel, self.config, metrics, self._clock,
                              self._clock.now())
        limiters = RateLimiters(self._clock, self.config.rate_limit)
        self._server.dispatcher = Dispatcher(
            service, status, limiters, self._host_policy(), metrics)
        self._recover(stores)
        lock.write("process %d, %s" % (os.getpid(), self.local_url))
        if not stores.tokens.has_admin():
            new = NewToken(name="admin", admin=True)
            token, self.new_admin_token = service.create_token(new)
            self.discard_admin_token = lambda: service.stores.tokens.delete(token.id, protect=False)
        callbacks = CallbackSender(stores, metrics)
        on_exit(callbacks.close)
        on_exit(notifier.close)
        on_exit(worker.close)
        on_exit(self._server.stop_accepting)
        if tunnel:
            on_exit(tunnel.request_stop)
        worker.start()
        callbacks.start()
        if self._install.is_recalled:
            check = threading.Thread(target=program.check, name="claude-check", daemon=True)
            on_exit(check.join, CHECK_JOIN_SECONDS)
            check.start()

    def _open_stores(self, path: Path, metrics: Metrics) -> Stores:
        """Open the database; move a corrupt one away and create a new one."""
        try:
            return Stores(path, self._clock, metrics)
        except DatabaseCorrupt as error:
            moved_to = quarantine_database(path, self._clock.now())
            logger.error(
                "%s It was moved to %s, and a new one was created: tokens must be created again.",
                error, moved_to)
            return Stores(path, self._clock, metrics)

    def _recover(self, stores: Stores) -> None:
        """Clean up after an unclean end of the last bridge."""
        tag = data_tag(self.config.data_dir) + "."
        recorded = stores.database.recorded_processes()
        killed = kill_orphans(tag, recorded)
        for pid, *_ in recorded:
            stores.database.forget_process(pid)
        stores.jobs.fail_chats(
            "interrupted", "The bridge stopped, and the connection that waited was lost.")
        requeued, lost = stores.jobs.recover()
        if stores.database.get_state("paused"):
            logger.warning("The queue is paused; the command resume lets it go on")
        if killed or requeued or lost:
            logger.warning(
                "After an unclean end: %d processes killed, %d requests queued again, %d given up",
                len(killed), requeued, lost)

    def _host_policy(self) -> HostPolicy:
        names = re.split("[, ]+", self.config.names)
        local_hosts = (host_of(self.config.public_url), self.config.host, *names)
        tunnel = self.tunnel
        return HostPolicy(local_hosts, (lambda: tunnel.hosts) if tunnel else frozenset)

    def _make_tunnel(self, database: Database) -> Tunnel:
        protocols: Sequence[str] = (self.config.tunnel_protocol,)
        if self.config.tunnel_protocol == "auto" and not self._tunnel_token:
            last = database.get_state("tunnel_protocol")
            protocols = sorted(("quic", "http2"), key=lambda protocol: protocol != last)
        policy = TunnelPolicy(protocols, bool(self._tunnel_token))
        install = CloudflaredInstall(self.config, os.environ, self._clock, self._observer)
        return Tunnel(install, policy, self._tunnel_token, database, self._observer)

    def _listen(self) -> BridgeServer:
        host, port = self.config.listen_host, self.config.port
        try:
            server = BridgeServer(host, port, self._clock)
            server.wire_body_bytes = self.config.body_mb << 20
            return server
        except (OSError, OverflowError, TypeError, ValueError) as error:
            is_used = getattr(error, "errno", None) == errno.EADDRINUSE
            reason = getattr(error, "strerror", None) or error
            raise CannotStart(
                "Port %d on %s cannot be used: %s." % (port, host, reason),
                "another program is using it; choose another one with --port" if is_used
                else "check --host and --port") from None

    def serve(self) -> None:
        """Begin to answer. Until now the port is bound, but nothing is read."""
        self._server.start()
        if self.tunnel:
            self.tunnel.start(self.port)

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def local_url(self) -> str:
        is_here = self.config.host in ("", "0.0.0.0", "::", "127.0.0.1")
        return http_url("localhost" if is_here else self.config.host, self.port)


# === 17 Command line =============================================================================
# What a person types and reads. stdout carries data (tokens, addresses, answers), stderr narration.

OPEN_FILES = 2_048
# Of each thread.
STACK_BYTES = 4 << 20
BANNER = """
  ┌─────────────────────────────┐
  │%s│
  │  Claude Code as a REST API  │
  └─────────────────────────────┘
"""


# In a hint, own_words() stands for it.
OWN_NAME = "claude_api_bridge.py"


def own_words() -> str:
    """Return what starts this program in a shell: "python3 claude_api_bridge.py", for example."""
    program = sys.argv[0]
    if program.endswith((".py", ".pyz")):
        return "%s %s" % ("py" if os.name == "nt" else "python3", list2cmdline([program]))
    return Path(program).name


class Console(TunnelObserver):
    """All printing. Symbols and frames are left out if the terminal cannot show them."""

    def __init__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                # Windows would write a file or a pipe in the code page.
                is_utf8 = os.name == "nt" and not stream.isatty()
                stream.reconfigure(encoding="utf-8" if is_utf8 else None, errors="replace")
        is_terminal = bool(getattr(sys.stderr, "isatty", lambda: False)())
        # A person reads both streams.
        self.is_terminal = is_terminal and bool(getattr(sys.stdout, "isatty", lambda: False)())
        self._is_rich = is_terminal and "utf" in (sys.stderr.encoding or "").lower()
        # The cursor stands behind a transient line, which the next one may replace.
        self._has_transient = False

    def data(self, text: str) -> bool:
        """Print a line to stdout at once. -> False if nobody can read it or the disk is full."""
        # A program can be started without stdout.
        if sys.stdout is None:
            return False
        try:
            print(text, flush=True)
            return True
        except OSError:
            # Otherwise Python prints a second error at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return False

    def framed(self, text: str) -> bool:
        """Print a line to stdout; on a terminal between two lines. -> as `data`."""
        if not self._is_rich:
            return self.data(text)
        self._print_stderr("─" * len(text))
        is_printed = self.data(text)
        self._print_stderr("─" * len(text))
        return is_printed

    def write(self, text: str) -> None:
        """Print a part of a line to stdout."""
        with contextlib.suppress(OSError):
            print(text, end="", flush=True)

    def _print_stderr(self, text: str) -> None:
        # The terminal may be gone; the bridge continues.
        with contextlib.suppress(OSError, ValueError):
            if self._has_transient:
                self._has_transient = False
                text = "\n" + text
            print(escape_controls(text), file=sys.stderr, flush=True)

    def info(self, symbol: str, text: str) -> None:
        self._print_stderr("  %s  %s" % (symbol, text) if self._is_rich else text)

    def blank(self) -> None:
        if self._is_rich:
            self._print_stderr("")

    def banner(self) -> None:
        title = "claude-api-bridge v%s" % __version__
        self._print_stderr(BANNER % ("  " + title.ljust(27)) if self._is_rich else title)

    def fail(self, text: str, hint: str = "") -> None:
        self._print_stderr(("  ❌  " if self._is_rich else "error: ") + text)
        if hint:
            hint = hint.replace(OWN_NAME, own_words())
            self._print_stderr(("      " if self._is_rich else "") + "hint: " + hint)

    def on_progress(self, text: str, is_transient: bool) -> None:
        """Show a download; without a terminal only every tenth percent."""
        if not is_transient:
            self.info("📥", text)
        elif self._is_rich:
            with contextlib.suppress(OSError, ValueError):
                print("\r  📥  " + text, end="", file=sys.stderr, flush=True)
                self._has_transient = True
        elif re.search(r"\b\d*0 %", text):
            self._print_stderr(text)

    def on_url(self, url: str, previous: Optional[str]) -> None:
        """Print a public address, on stdout, too, for programs that read our lines."""
        change = " (before: %s; inform your clients)" % previous if previous else ""
        self.blank()
        self.info("🌐", "Public URL: %s%s" % (url, change))
        self.info("📖", "Dashboard: %s/dashboard (a new address may take some seconds to work"
                        " everywhere)" % url)
        self.blank()
        self.data(url)


class ConsoleLogHandler(logging.Handler):
    """Prints log records on a console."""
    SYMBOLS = {logging.WARNING: "⚠️", logging.ERROR: "❌"}

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console
        self.setFormatter(LogFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        self._console.info(self.SYMBOLS.get(record.levelno, "·"), self.format(record))


# --- start ---
def lan_address() -> Optional[str]:
    """Return this machine's address in its network, without sending anything."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probing:
        # TEST-NET-1: the connect of a datagram socket sends no packet.
        probing.connect(("192.0.2.1", 9))
        address = str(probing.getsockname()[0])
        return None if address.startswith("127.") else address
    return None


class ExitSignals:
    """Receives the signals that end the program, from its creation on (in the main thread).
    Python writes each to a socket, in whichever thread it arrives. A handler would run in the main
    thread alone, which does not wake up from every wait."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._numbers = []
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, None)
            # Under nohup SIGHUP is ignored; keep it so.
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self._numbers.append(int(number))
                signal.signal(number, lambda number, frame: None)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)

    def wait(self, seconds: Optional[float] = None) -> Optional[int]:
        """Return the number of the next signal; None after so many seconds."""
        self._reader.settimeout(seconds)
        with contextlib.suppress(socket.timeout):
            for byte in iter(lambda: self._reader.recv(1), b""):
                if byte[0] in self._numbers:
                    return byte[0]
        return None


def tune_process() -> None:
    """Disable core dumps, raise the limit of open files and give memory back.
    Core dumps would hold tokens and prompts. macOS allows 256 open files only. glibc gives each
    thread a heap, and each heap keeps the most that it ever held: mallopt limits that, and
    malloc_trim returns what compiling this source took (30 MB instead of 45 when idle). With musl a
    thread has a stack of 128 KiB, which nested JSON could overflow. Call this before there are
    threads. Source: mallopt(3), malloc_trim(3), wiki.musl-libc.org (Functional differences)."""
    threading.stack_size(STACK_BYTES)
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        files = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
        if soft != resource.RLIM_INFINITY and soft < files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        # M_ARENA_MAX; then M_MMAP_THRESHOLD, which otherwise rises to what was freed last.
        libc.mallopt(-8, 2)
        libc.mallopt(-3, LARGE_BYTES)
    trim_memory()


def trim_memory() -> None:
    """Give freed memory back to the system, with glibc."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def command_start(config: Config, console: Console) -> int:
    """Run the bridge until a signal. -> 0."""
    os.umask(0o077)
    tune_process()
    if os.name == "nt":
        # Its children are in this job before they run, so none outlives a kill during its start.
        job_of(os.getpid())
    logger.setLevel(logging.INFO)
    logger.addHandler(ConsoleLogHandler(console))
    logger.propagate = False
    console.banner()
    print_variables(config, console)
    data_directory(config.data_dir)
    install = recall_claude(config, os.environ) or find_claude(config, os.environ)
    print_billing(config, install, console)
    console.info("✅", "Data directory: %s" % config.data_dir)
    token = find_tunnel_token(config, os.environ)
    signals = ExitSignals()
    with contextlib.ExitStack() as stack:
        bridge = stack.enter_context(Bridge(config, install, Clock(), token, console))
        bridge.serve()
        print_addresses(bridge, console)
        print_next_steps(bridge, console)
        if __name__ == "__main__" and sys.version_info < (3, 12):
            # CPython keeps the main script's syntax tree, 19 MB, until its last line has run. So
            # it ends here and a thread waits. From 3.12 on, no thread can start after that line.
            threading.Thread(target=wait_in_thread, args=(signals, stack.pop_all(), console),
                             name="shutdown").start()
            return 0
        wait_for_signal(signals, stack.pop_all(), console)
    return 0


def wait_for_signal(signals: ExitSignals, stack: contextlib.ExitStack, console: Console) -> None:
    """Wait for a signal, then close everything; a second signal ends the program at once."""
    with stack:
        if not signals.wait(1):
            trim_memory()
            signals.wait()
        # A key pressed twice, or a signal from terminal and shell, is one request.
        while signals.wait(0.2):
            pass
        threading.Thread(target=lambda: os._exit(128 + (signals.wait() or 0)),
                         name="second-signal", daemon=True).start()
        console.info("👋", "Shutting down...")


def wait_in_thread(signals: ExitSignals, stack: contextlib.ExitStack, console: Console) -> None:
    try:
        wait_for_signal(signals, stack, console)
    except Exception:
        logger.exception("The bridge did not close properly")
        os._exit(1)


def print_variables(config: Config, console: Console) -> None:
    """Name the CAB_ variables that nothing reads."""
    for check in check_variables(config, os.environ):
        console.info("⚠️", ": ".join(filter(None, (check.text, check.advice))))


def find_tunnel_token(config: Config, environ: Mapping[str, str]) -> str:
    """Return a named tunnel's token; "" for a quick one. Raises WrongSetting, CannotStart."""
    if config.no_tunnel:
        return ""
    text = environ.get("CAB_TUNNEL_TOKEN", "")
    if config.tunnel_token_file:
        try:
            text = Path(config.tunnel_token_file).expanduser().read_text("utf-8")
        except (OSError, ValueError, RuntimeError) as error:
            raise CannotStart("The tunnel token cannot be read: %s." % error,
                              "check --tunnel-token-file") from None
    return check_tunnel_token(text) if text.strip() or config.tunnel_token_file else ""


def print_billing(config: Config, install: ClaudeInstall, console: Console) -> None:
    """Print which claude runs and who pays; a bill per token is a warning."""
    if config.demo:
        console.info("🎭", "Demo: every answer is an echo; Claude is not used.")
        return
    console.info("✅", "Claude Code CLI detected (%s)" % install.features.version_text)
    account = install.billing_account
    keys = sorted(API_KEYS & set(os.environ))
    if config.allow_api_key and keys:
        console.info("⚠️", "Billing: %s is passed to claude (--allow-api-key): requests are"
                           " BILLED PER TOKEN." % " and ".join(keys))
    elif install.is_billed_per_token and config.allow_api_key:
        console.info("⚠️", "Billing: %s. Requests are BILLED PER TOKEN." % account)
    elif install.is_billed_per_token:
        console.info("⚠️", "Billing: %s. Requests stop without --allow-api-key." % account)
    else:
        console.info("✅", "Billing: %s" % account)
    if not config.allow_api_key:
        for name in keys:
            console.info("ℹ️", "%s is set; it is not passed to claude." % name)
    base_url = install.environment.get("ANTHROPIC_BASE_URL")
    if base_url:
        console.info("ℹ️", "ANTHROPIC_BASE_URL is passed to claude: %s" % base_url)
    for note in install.notes:
        console.info("ℹ️", note)


def print_addresses(bridge: Bridge, console: Console) -> None:
    """Print the addresses beyond this machine; the tunnel announces its own later."""
    config = bridge.config
    if not config.no_tunnel:
        console.info("🌐", "Connecting the tunnel...")
    elif config.public_url:
        console.info("🌐", "Public URL: %s" % config.public_url)
    lan = lan_address() if config.listen_host in ("0.0.0.0", "::") else None
    if lan:
        console.info("🏠", "In your network, for everybody there, unencrypted: %s (only on this"
                           " machine: --host 127.0.0.1)" % http_url(lan, bridge.port))


def print_next_steps(bridge: Bridge, console: Console) -> None:
    """Print what to do next, the address, and the token of a first start. For a person the token is
    last; a program that reads our lines waits for the address. Raises CannotStart."""
    url, token, folder = bridge.local_url, bridge.new_admin_token, ""
    if bridge.config.data_dir != load_config({}, {}).data_dir:
        folder = " " + list2cmdline(["--data-dir=%s" % bridge.config.data_dir])
    ask = '%s ask "Why is the sky blue?"%s' % (own_words(), folder)
    # The fragment of an address reaches neither a server nor its log.
    console.info("📖", "Dashboard: %s/dashboard%s" % (
        url, "#token=" + token if token and console.is_terminal else ""))
    console.info("💬", "Ask, in another terminal: " + ask)
    if token and console.is_terminal and os.name != "nt":
        console.info("💬", "From any program: curl -sS %s/api/ask -H 'Authorization: Bearer %s'"
                     """ -d '{"message": "Why is the sky blue?", "wait": 60}'""" % (url, token))
    if not token:
        console.info("🔑", "For another admin token: %s token create NAME --admin%s"
                     % (own_words(), folder))
    elif not console.is_terminal:
        print_admin_token(bridge, token, console)
    console.info("🚀", "API server running on")
    console.data(url)
    if token and console.is_terminal:
        print_admin_token(bridge, token, console)


def print_admin_token(bridge: Bridge, token: str, console: Console) -> None:
    """Print the token once; discard it if that fails. Raises CannotStart."""
    console.info("🔑", "Admin token (save this, it is shown only once):")
    if not console.framed(token):
        bridge.discard_admin_token()
        raise CannotStart("The admin token could not be printed, so it was discarded.",
                          "let start write to its standard output")


# --- token ---
class NothingRuns(RunningJobs):
    """The RunningJobs of a process without a worker: its methods return None."""


def require_database(config: Config) -> Path:
    """Return the database of the data folder, which must exist. Raises CannotStart."""
    path = config.data_dir / "bridge.db"
    if not path.is_file():
        raise CannotStart("There is no database %s." % path, "name its folder with --data-dir")
    return path


@contextlib.contextmanager
def open_service(config: Config) -> Iterator[Service]:
    """Open the database of the data folder, whether the bridge runs or not. Raises CannotStart."""
    data_dir = data_directory(config.data_dir)
    clock = Clock()
    with contextlib.closing(Stores(data_dir / "bridge.db", clock)) as stores:
        yield Service(stores, Notifier(), clock, data_dir, NothingRuns())


def command_token(arguments: argparse.Namespace, config: Config, console: Console) -> int:
    """token create | list | update | rotate | revoke. -> 0."""
    if arguments.action != "create":
        require_database(config)
    is_new = not (config.data_dir / "bridge.db").exists()
    with open_service(config) as service:
        if arguments.action == "create":
            create_token(arguments, service, console)
            if is_new:
                console.info("ℹ️", "The data folder %s is new: start a bridge with it"
                             % config.data_dir)
            return 0
        if arguments.action == "list":
            list_tokens(arguments, service, console)
            return 0
        token = find_token(service.stores.tokens.list(), arguments.id)
        if arguments.action == "update":
            service.update_token(token.id, token_changes(arguments))
            console.info("✅", "Token changed")
        elif arguments.action == "rotate":
            _, secret = service.rotate_token(token.id)
            console.info("🔑", "Token %s has another secret (save it, it is shown only once):"
                         % token.id)
            if not console.data(secret):
                raise CannotStart("The token could not be printed.",
                                  "let the command write to its standard output, and rotate again")
        else:
            service.revoke_token(token.id)
            console.info("✅", "Token revoked")
    # A bridge that runs may know the token for so long; afterwards it is refused.
    time.sleep(2 * CACHE_REVALIDATE_SECONDS)
    return 0


def split_names(text: str) -> List[str]:
    return [name.strip() for name in text.split(",")]


def token_changes(arguments: argparse.Namespace) -> Dict[str, Any]:
    """Return the body of a TokenUpdate; never, none and all stand for null."""
    values = {"name": arguments.name, "expiresInDays": arguments.expires,
              "requestsPerMinute": arguments.requests_per_minute,
              "requestsPerDay": arguments.requests_per_day, "models": arguments.models}
    body: Dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    for name in body.keys() & {"expiresInDays", "requestsPerMinute", "requestsPerDay", "models"}:
        if body[name] == {"expiresInDays": "never", "models": "all"}.get(name, "none"):
            body[name] = None
        elif name == "models":
            body[name] = split_names(body[name])
    return body


def create_token(arguments: argparse.Namespace, service: Service, console: Console) -> None:
    """Create a token with the checks of the API. Raises InvalidRequest, CannotStart."""
    tools: Any = arguments.tools
    if tools and tools not in Tools.LEVELS:
        tools = [rule.strip() for rule in re.split(r",(?![^(]*\))", tools)]
    models = None if arguments.models is None else split_names(arguments.models)
    hosts = {"": False, "all": True}.get(arguments.callbacks, arguments.callbacks.split(","))
    new, _ = NewToken.parse({
        "name": arguments.name, "admin": arguments.admin, "expiresInDays": arguments.expires,
        "tools": tools, "requestsPerMinute": arguments.requests_per_minute,
        "requestsPerDay": arguments.requests_per_day, "models": models, "callbacks": hosts,
        "sessionMode": SessionMode.STATEFUL if arguments.stateful else SessionMode.STATELESS})
    workspace = None
    if arguments.workspace:
        workspace = Path(arguments.workspace).expanduser().absolute()
        if not workspace.is_dir():
            raise CannotStart("The workspace %s is not a folder." % workspace, "create it first")
        if new.tools == Tools.NONE:
            raise CannotStart("A workspace needs tools.", "add --tools read, for example")
    twins = [token for token in service.stores.tokens.list() if token.name == new.name]
    token, secret = service.create_token(new, workspace)
    if twins:
        console.info("ℹ️", "Another token has this name, too; tell them apart by their IDs")
    if token.workspace:
        console.info("ℹ️", "Its tools work in %s" % token.workspace)
    # No Bash rule is a sandbox.
    has_shell = token.tools == Tools.ALL or any(rule.startswith("Bash") for rule in token.tools)
    if has_shell or token.is_admin:
        rights = ["run any command here, as you"] * has_shell
        rights += ["manage all tokens and read every request"] * token.is_admin
        console.info("⚠️", "Whoever has this token can " + " and ".join(rights))
    console.info("🔑", "Token %s (save this, it is shown only once):" % token.id)
    body = {"tokenId": token.id, "token": secret, "prefix": token.prefix}
    if token.callbacks:
        body["callbackSecret"] = service.stores.tokens.callback_secret(token.id)
        if not arguments.json:
            console.info("🔑", "Its callbacks are signed with " + body["callbackSecret"])
    if not console.data(as_json(body) if arguments.json else secret):
        service.stores.tokens.delete(token.id, protect=False)
        raise CannotStart("The token could not be printed, so it was discarded.",
                          "let the command write to its standard output")


def list_tokens(arguments: argparse.Namespace, service: Service, console: Console) -> None:
    """Print a table for people, or JSON."""
    bodies = token_bodies(service)
    if arguments.json:
        console.data(json.dumps(bodies, ensure_ascii=False, indent=2))
        return
    rows = [("ID", "PREFIX", "MODE", "ADMIN", "TOOLS", "LIMITS", "LAST USED", "EXPIRES", "NAME")]
    for body in bodies:
        expires = "expired" if body["isExpired"] else (body["expiresAt"] or "never")[:10]
        is_admin = "yes" if body["isAdmin"] else "no"
        tools = body["tools"] if isinstance(body["tools"], str) else "%d rules" % len(body["tools"])
        limits = ["%d/%s" % (body[name], unit) for name, unit in (
            ("requestsPerMinute", "min"), ("requestsPerDay", "day")) if body[name]]
        limits += [",".join(body["models"])] if body["models"] else []
        rows.append((body["id"], body["prefix"], body["sessionMode"], is_admin, tools,
                     " ".join(limits) or "-", (body["lastUsedAt"] or "never")[:10], expires,
                     escape_controls(body["name"], keep="")))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        console.data("  ".join(map(str.ljust, row, widths)).rstrip())


def command_backup(arguments: argparse.Namespace, config: Config, console: Console) -> int:
    """backup FILE. -> 0. Raises CannotStart."""
    backup_database(require_database(config), Path(arguments.file).expanduser().absolute())
    console.info("✅", "The database was copied to %s" % arguments.file)
    return 0


def command_queue(arguments: argparse.Namespace, config: Config, console: Console) -> int:
    """pause | resume: hold the queue, whether the bridge runs or not. -> 0."""
    is_paused = arguments.command == "pause"
    require_database(config)
    with open_service(config) as service:
        service.set_paused(is_paused)
    console.info("✅", "The queue is paused" if is_paused else "The queue goes on")
    return 0


# --- ask ---
class AskClient:
    """A client of the running bridge, for the shell. Raises CannotStart for an unusable address."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.token = ""
        try:
            parts = urlsplit(url)
            self._port = parts.port
        except ValueError:
            parts, self._port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise CannotStart("%s is not the address of a bridge." % escape_controls(url, keep=""),
                              "use a form such as http://localhost:3456")
        self._is_https = parts.scheme == "https"
        self._host = str(parts.hostname)
        self._path = parts.path.rstrip("/")

    def request(self, method: str, path: str,
                body: Optional[Mapping[str, Any]] = None) -> http.client.HTTPResponse:
        """Send one request. -> the answer, unread. Raises OSError, HTTPException, CannotStart."""
        if not (self.token.isascii() and self.token.isprintable()):
            raise CannotStart("CAB_TOKEN is not a token.", "copy the token again")
        headers = {"Authorization": "Bearer " + self.token, "Content-Type": "application/json"}
        kind = http.client.HTTPSConnection if self._is_https else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=WAIT_SECONDS)
        data = None if body is None else as_json(body).encode("utf-8", "replace")
        connection.request(method, self._path + path, data, headers)
        response = connection.getresponse()
        if response.status >= 400:
            raise self._refusal(response)
        return response

    def _refusal(self, response: http.client.HTTPResponse) -> CannotStart:
        error = None
        with contextlib.suppress(ValueError, RecursionError):
            answer = json.loads(response.read(1 << 20))
            error = answer.get("error") if isinstance(answer, dict) else None
        if not isinstance(error, str):
            return self.not_a_bridge("it answered with status %d" % response.status)
        hint = "check CAB_TOKEN" if response.status == 401 else ""
        return CannotStart("The bridge refused the request: %s" % error, hint)

    def not_a_bridge(self, reason: str) -> CannotStart:
        return CannotStart("The server at %s does not answer like a bridge: %s."
                           % (self.url, reason), "name the bridge with --url")

    def ask(self, body: Mapping[str, Any]) -> Iterator[Tuple[str, Dict[str, Any]]]:
        """Send a message. -> the Server-Sent Events of the answer: (name, data)."""
        response = self.request("POST", "/api/ask", body)
        if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
            raise self.not_a_bridge("it sent no events")
        name = ""
        for line in response:
            key, _, value = line.decode("utf-8", "replace").rstrip("\n").partition(": ")
            if key == "event":
                name = value
            elif key == "data":
                data = None
                with contextlib.suppress(ValueError, RecursionError):
                    data = json.loads(value)
                if not isinstance(data, dict):
                    raise self.not_a_bridge("it sent an unknown event")
                yield name, data


def command_ask(arguments: argparse.Namespace, config: Config, console: Console) -> int:
    """Ask the running bridge. Only the answer goes to stdout. -> 0, or 1 for a failed request."""
    words = arguments.message
    message = " ".join(words)
    if words[-1] == "-":
        texts = [" ".join(words[:-1]), sys.stdin.buffer.read().decode("utf-8", "replace")]
        message = "\n\n".join(filter(None, texts))
    if not message.strip():
        raise WrongSetting("The message is empty; write it behind ask, or to its standard input.")
    url = arguments.url or os.environ.get("CAB_URL") or running_url(config)
    client = AskClient(url)
    client.token = (os.environ.get("CAB_TOKEN", "").strip()
                    or shell_token(config, bool(arguments.conversation)))
    body = {"message": message, "stream": True, "model": arguments.model,
            "systemPrompt": arguments.system_prompt, "conversation": arguments.conversation}
    request_id = ""
    try:
        for name, data in client.ask(body):
            request_id = str(data.get("requestId") or request_id)
            if name in ("completed", "error"):
                return finish_ask(arguments, console, data)
            show_event(arguments, console, name, data)
        raise OSError("the stream ended before the answer")
    except KeyboardInterrupt:
        with contextlib.suppress(OSError, http.client.HTTPException, CannotStart):
            if request_id:
                client.request("DELETE", "/api/ask/" + request_id)
        console.fail("Cancelled.")
        return 130
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CannotStart("The bridge at %s cannot be reached: %s." % (url, reason),
                          "is it running? start it, or name it with --url") from None


def show_event(
        arguments: argparse.Namespace, console: Console, name: str, data: Dict[str, Any]) -> None:
    """Show the progress of an answer; `arguments.shown` is the text on the terminal so far."""
    position = data.get("position")
    is_behind = isinstance(position, int) and position > 1
    if name == "queued" and (is_behind or "waitingFor" in data):
        reason, until = data.get("waitingFor"), data.get("resumesAt")
        text = "waits at position %s" % position
        if reason == "usage_limit":
            text += ", for the plan until %s" % until
        elif reason in PAUSE_TEXTS:
            text += ": " + PAUSE_TEXTS[reason]
            text += " The command resume lets it go on." if reason == "paused" else ""
        console.info("·", text)
    elif name == "started" and arguments.shown:
        console.write("\n")
        arguments.shown = ""
    elif name == "delta" and sys.stdout.isatty() and not arguments.json:
        text = str(data.get("text", ""))
        arguments.shown += text
        console.write(escape_controls(text, keep="\n\t"))


def finish_ask(arguments: argparse.Namespace, console: Console, body: Mapping[str, Any]) -> int:
    """Print what is not shown yet. -> the exit status."""
    is_completed = body.get("status") == JobStatus.COMPLETED
    if arguments.json:
        console.data(json.dumps(body, ensure_ascii=False, indent=2))
    elif is_completed:
        text = str(body.get("response") or "")
        if sys.stdout.isatty():
            text = escape_controls(text[len(arguments.shown) :], keep="\n\t")
        console.data(text)
    else:
        console.fail("%s: %s" % (body.get("errorCode") or body.get("code"), body.get("error")))
    return 0 if is_completed else 1


def lock_holder(config: Config) -> str:
    """Return who holds the lock of the data folder, "" for nobody."""
    try:
        if (config.data_dir / "bridge.lock").exists():
            DirectoryLock(config.data_dir / "bridge.lock").close()
        return ""
    except CannotStart as error:
        return str(error)


def running_url(config: Config) -> str:
    """Return where the bridge of this data folder listens. Raises CannotStart."""
    match = re.search(r"https?://\S+", lock_holder(config))
    if not match:
        raise CannotStart("No bridge is running with the data folder %s." % config.data_dir,
                          "start it, or name another one with --url or --data-dir")
    return match.group().rstrip(".")


def shell_token(config: Config, is_stateful: bool) -> str:
    """Return the token of `ask`, which the owner of the data folder may create. It is created again
    if it was revoked or lost. Raises CannotStart."""
    path = config.data_dir / "ask-tokens.json"
    mode = SessionMode.STATEFUL if is_stateful else SessionMode.STATELESS
    with open_service(config) as service:
        secrets_by_mode = read_json_object(path)
        secret = secrets_by_mode.get(mode)
        if isinstance(secret, str) and service.stores.tokens.by_digest(digest(secret)):
            return secret
        token, secret = service.create_token(NewToken("ask (%s)" % mode, session_mode=mode))
        try:
            write_file_atomically(path, as_json({**secrets_by_mode, mode: secret}))
        except OSError as error:
            service.stores.tokens.delete(token.id, protect=False)
            raise CannotStart(
                "The file %s cannot be written: %s." % (path, error.strerror or error),
                "make it writable, or set CAB_TOKEN") from None
    return secret


# --- doctor ---
class Check(NamedTuple):
    """One line of the doctor. is_good: None for a remark; advice: what to do."""
    name: str
    is_good: Optional[bool]
    text: str
    advice: str = ""


def command_doctor(arguments: argparse.Namespace, config: Config, console: Console) -> int:
    """Check everything that a start needs. -> 0, or 1 if something is broken."""
    checks = [Check("python", True, "%d.%d.%d" % sys.version_info[:3])]
    try:
        require_sqlite()
        checks.append(Check("sqlite", True, SQLITE_VERSION))
    except CannotStart as error:
        checks.append(Check("sqlite", False, str(error), error.hint))
    live = (check_live,) if arguments.live else ()
    for function in (check_variables, check_data, check_clock, check_queue, check_orphans,
                     check_port, check_claude, *live, check_tunnel):
        try:
            checks += function(config, os.environ)
        except OSError as error:
            advice = "make that readable, or choose another folder with --data-dir"
            checks.append(Check(function.__name__[6:], False, str(error), advice))
    is_ok = all(check.is_good is not False for check in checks)
    if arguments.json:
        rows = [{"name": check.name, "ok": check.is_good, "text": check.text,
                 "advice": check.advice or None} for check in checks]
        console.data(json.dumps({"ok": is_ok, "checks": rows}, indent=2))
        return 0 if is_ok else 1
    symbols = {True: "ok", None: "--", False: "!!"}
    for check in checks:
        text = escape_controls(check.text)
        console.data("%s  %-12s %s" % (symbols[check.is_good], check.name, text))
        if check.advice:
            console.data("                 -> " + check.advice.replace(OWN_NAME, own_words()))
    return 0 if is_ok else 1


def check_data(config: Config, environ: Mapping[str, str]) -> List[Check]:
    """Check the data folder, or where it will be: its rights, its disk and its database."""
    folder = config.data_dir
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()
    except OSError as error:
        text = "no file can be created in %s: %s" % (existing, error.strerror)
        advice = "make it writable, or choose another one with --data-dir"
        return [Check("data", False, text, advice)]
    foreign = find_foreign_files(folder)
    if foreign:
        return [Check("data", False, foreign, FOREIGN_ADVICE)]
    text = str(folder)
    if existing != folder:
        text += " (start creates it)"
    elif check_shared_folder(folder):
        text = shared_folder_text(folder)
    elif os.name == "posix" and folder.stat().st_mode & 0o077:
        text += ", which other users can read: start closes it"
    fault = inspect_database(folder / "bridge.db").fault
    advice = "start the bridge: it moves a damaged file away" if fault else ""
    free = shutil.disk_usage(existing).free >> 20
    advice_of_disk = "make room: requests are stored on disk" if free <= 100 else ""
    return [Check("data", not fault, fault or text, advice),
            Check("disk", free > 100, "%d MB free" % free, advice_of_disk)]


def check_variables(config: Config, environ: Mapping[str, str]) -> List[Check]:
    """Find CAB_ variables that nothing reads."""
    return [Check("settings", None, name + " is not a setting",
                  "did you mean %s?" % meant if meant else "unset it")
            for name, meant in unknown_variables(environ)]


def check_clock(config: Config, environ: Mapping[str, str]) -> List[Check]:
    """Check the clock, by which tokens expire and limits reset."""
    now = Clock.now()
    text = "%s UTC" % time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(now))
    if now >= inspect_database(config.data_dir / "bridge.db").latest - 60:
        return [Check("clock", True, text)]
    text += ", before the newest request was made"
    return [Check("clock", False, text, "set the clock of this machine")]


def check_queue(config: Config, environ: Mapping[str, str]) -> List[Check]:
    """Check whether the queue of the bridge waits for something."""
    reason, since = inspect_database(config.data_dir / "bridge.db").hold
    if not reason:
        return []
    text = "waits since %s: %s" % (iso_time(since), PAUSE_TEXTS[reason])
    if reason == "paused":
        return [Check("queue", None, text, "let it go on: claude_api_bridge.py resume")]
    code = next(code for code, word in HOLD_REASONS.items() if word == reason)
    return [Check("queue", False, text, RUN_ADVICE[code])]


def check_orphans(config: Config, environ: Mapping[str, str]) -> List[Check]:
    """Find processes of a bridge that was killed."""
    if lock_holder(config):
        return []
    recorded = inspect_database(config.data_dir / "bridge.db").processes
    orphans = find_orphans(data_tag(config.data_dir) + ".", recorded)
    if not orphans:
        return [Check("processes", True, "no orphans")]
    text = "orphans of a bridge that was killed: %s; start kills them"
    return [Check("processes", None, text % ", ".join(map(str, sorted(orphans))))]


def check_port(config: Config, environ: Mapping[str, str]) -> List[Check]:
    """Check whether the port is free, or held by a bridge of this data folder."""
    holder = lock_holder(config)
    if holder:
        return [Check("port", None, holder)]
    address = "%d on %s" % (config.port, config.listen_host)
    try:
        BridgeServer(config.listen_host, config.port, Clock()).server_close()
    except (OSError, OverflowError, TypeError, ValueError) as error:
        return [Check("port", False, "%s cannot be used: %s" % (address, error),
                      "choose another one with --port")]
    return [Check("port", True, address + " is free")]


def check_claude(config: Config, environ: Mapping[str, str]) -> List[Check]:
    """Check the program, its login and who pays."""
    try:
        # The folder takes what a start would write.
        with tempfile.TemporaryDirectory() as folder:
            install = find_claude(replace(config, data_dir=Path(folder)), environ)
    except CannotStart as error:
        return [Check("claude", False, str(error), error.hint)]
    checks = [Check("claude", True,
                    "%s (%s)" % (install.features.version_text, install.command[-1]))]
    if install.features.version < TESTED_CLI and not config.demo:
        text = "older than %d.%d.%d, with which this bridge was tested" % TESTED_CLI
        # By its tag: on Node below 22, npm takes an old one otherwise.
        checks.append(Check("claude", None, text, "update it: claude update, or npm install -g"
                            " @anthropic-ai/claude-code@latest"))
    checks += [Check("claude", None, note) for note in install.notes]
    account = install.billing_account
    if not install.is_billed_per_token:
        return [*checks, Check("payer", True, account)]
    advice = "" if config.allow_api_key else RUN_ADVICE["billing_guard"]
    return [*checks, Check("payer", config.allow_api_key, account + ", billed per token", advice)]


def check_live(config: Config, environ: Mapping[str, str]) -> List[Check]:
    """Send the model a question, as a request would."""
    clock = Clock()
    tag = "%s.live" % data_tag(config.data_dir)
    try:
        with tempfile.TemporaryDirectory() as folder:
            own_config = replace(config, data_dir=Path(folder), spare=0)
            program = ClaudeProgram(find_claude(own_config, environ))
            pool = ClaudePool(program, own_config, clock, tag)
            started = clock.monotonic()
            with contextlib.closing(pool):
                request = RunRequest("Answer with the word: ready", DEFAULT_SESSION)
                answer = ClaudeRunner(pool).run(request, LiveText(), lambda: None)
    except CannotStart:
        # check_claude reports it.
        return []
    except RunFailed as failure:
        return [Check("live", False, "%s: %s" % (failure.code, redact(str(failure))),
                      RUN_ADVICE.get(failure.code, RUN_ADVICE["cli_error"]))]
    seconds = clock.monotonic() - started
    text = "%s answered %r in %.1f s" % (answer.model, answer.text[:40], seconds)
    return [Check("live", True, text)]


def check_tunnel(config: Config, environ: Mapping[str, str]) -> List[Check]:
    """Check cloudflared, its checksum, and the token of a named tunnel."""
    if config.no_tunnel:
        return [Check("tunnel", None, "off (--no-tunnel)")]
    try:
        token = find_tunnel_token(config, environ)
    except (CannotStart, WrongSetting) as error:
        return [Check("tunnel", False, str(error), getattr(error, "hint", ""))]
    program = check_cloudflared(config, environ)
    if not token:
        return [program, Check("tunnel", True, "quick: a new address at each start")]
    text = config.public_url or "--public-url is not set: its configuration will give the address"
    return [program, Check("tunnel", bool(config.public_url) or None, "named, " + text)]


def check_cloudflared(config: Config, environ: Mapping[str, str]) -> Check:
    """Check the program: the owner's, the downloaded one, or none yet."""
    install = CloudflaredInstall(config, environ, Clock(), TunnelObserver())
    reinstall = "install it again, or name another one with --cloudflared PATH"
    try:
        own = install.installed_by_user()
        if own:
            output = probe([str(own), "version", "--short"], tunnel_environment(environ, ""))
            version = (output.strip().splitlines() or [""])[0][:40]
            shown = version or "it prints no version"
            text = "%s (%s), your own, so its checksum is not checked" % (own, shown)
            return Check("cloudflared", bool(version), text, "" if version else reinstall)
    except (CannotTunnel, CannotStart) as error:
        return Check("cloudflared", False, str(error), reinstall)
    downloaded = install.downloaded()
    if downloaded:
        return Check("cloudflared", True,
                     "%s (%s, SHA-256 as expected)" % (downloaded, CLOUDFLARED_VERSION))
    if cloudflared_asset(platform.system(), platform.machine()):
        text = "not here yet: start downloads %s from %s and checks its SHA-256"
        return Check("cloudflared", None, text % (CLOUDFLARED_VERSION, config.cloudflared_url))
    return Check("cloudflared", False, "there is none for this system",
                 "install it yourself and name it with --cloudflared PATH")


# --- service ---
SERVICE_START_SECONDS, SERVICE_STOP_SECONDS = 30.0, 25.0
# Files for service managers. A file without the mark is somebody else's.
SERVICE_MARK = "Written by claude_api_bridge.py service"
# What a service needs of the shell's variables, unless it holds a password (user:password@host).
SERVICE_VARIABLES = re.compile(
    r"CLAUDE_(?:SECURESTORAGE_)?CONFIG_DIR|CLAUDE_CODE_(?:CERT_STORE|CLIENT_CERT|CLIENT_KEY)|"
    r"ANTHROPIC_BASE_URL|NODE_EXTRA_CA_CERTS|SSL_CERT_FILE|(?:https?|no|all)_proxy", re.IGNORECASE)
LEFT_OUT_VARIABLES = (
    "CAB_TUNNEL_TOKEN", "CLAUDE_CODE_OAUTH_TOKEN", "CLAUDE_CODE_CLIENT_KEY_PASSPHRASE")
UNFIT_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]|^[^/\\]*@|//.*@")
# Without MemoryDenyWriteExecute (claude compiles at run time) and what drops capabilities. The home
# may be read-only, but not the folder where claude locks and renews its login (2.1.197, 2.1.332).
SYSTEMD_UNIT = """\
# {mark}. Changes: systemctl --user edit claude-api-bridge
[Unit]
Description=REST API for Claude Code (claude_api_bridge)

[Service]
ExecStart={command}
Environment={environment}
# For secrets: CLAUDE_CODE_OAUTH_TOKEN=..., CAB_TUNNEL_TOKEN=...; chmod 600.
EnvironmentFile=-{secrets}
Restart=on-failure
RestartSec=10
RestartPreventExitStatus=2
KillMode=mixed
TimeoutStopSec=25
UMask=0077
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
# Add workspaces that are elsewhere. Before systemd 253, a user's manager ignores these three.
ProtectSystem=strict
ReadWritePaths={writable}
PrivateTmp={private_tmp}

[Install]
WantedBy=default.target"""
# From the boot on, without a window. By default, a task ends after 72 hours.
SCHEDULED_TASK = """\
<Task version="1.2" xmlns="http://schemas.microsoft.com/windows/2004/02/mit/task">
<RegistrationInfo><Description>{mark}. As administrator: schtasks /Create /TN claude-api-bridge \
/XML FILE. Its output is not shown: use token create NAME --admin.</Description></RegistrationInfo>
<Triggers><BootTrigger /></Triggers><Principals><Principal id="Author"><UserId>{user}</UserId>
<LogonType>S4U</LogonType></Principal></Principals><Settings><Priority>5</Priority>
<ExecutionTimeLimit>PT0S</ExecutionTimeLimit><StopIfGoingOnBatteries>false</StopIfGoingOnBatteries>
<DisallowStartIfOnBatteries>false</DisallowStartIfOnBatteries><RestartOnFailure>
<Interval>PT1M</Interval><Count>255</Count></RestartOnFailure></Settings><Actions Context="Author">
<Exec><Command>{program}</Command><Arguments>{command}</Arguments></Exec></Actions></Task>"""
DOCKERFILE = """\
# {mark}. In the folder of the file: docker build -t claude-api-bridge -f Dockerfile .
# Where there is a browser: claude setup-token; here: export CLAUDE_CODE_OAUTH_TOKEN=..., then
# docker run -d --name claude-api-bridge --restart unless-stopped --stop-timeout 25 --read-only \\
#   --tmpfs /tmp:exec --cap-drop ALL --security-opt no-new-privileges -e CLAUDE_CODE_OAUTH_TOKEN \\
#   -v claude-api-bridge:/data -p 127.0.0.1:{port}:{port} claude-api-bridge
# First admin token: docker logs claude-api-bridge; more: docker exec, token create NAME --admin
FROM node:22-slim
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates git python3 \\
 && rm -rf /var/lib/apt/lists/* && npm install -g @anthropic-ai/claude-code@latest \\
 && mkdir -m 700 /data && chown node:node /data
COPY --chown=node:node {copy}
ENV CAB_DATA_DIR=/data
USER node
VOLUME ["/data"]
EXPOSE {port}
CMD {command}"""
# By program: kind, place and log of the service; how to prepare, start, stop and show it (no log).
MANAGERS = {
    "launchctl": ("launchd", "Library/LaunchAgents/claude-api-bridge.plist", "{data}/service.log",
                  "enable gui/{user}/claude-api-bridge", "bootstrap gui/{user} {path}",
                  "bootout gui/{user}/claude-api-bridge", "print gui/{user}/claude-api-bridge"),
    "systemctl": ("systemd", ".config/systemd/user/claude-api-bridge.service",
                  "journalctl --user -u claude-api-bridge (start at boot: loginctl enable-linger)",
                  "--user daemon-reload", "--user enable --now claude-api-bridge",
                  "--user disable --now claude-api-bridge",
                  "--user status --no-pager --lines=0 claude-api-bridge")}


def lasting_path(program: Union[str, Path]) -> str:
    """Return a path in which links to folders are followed: some last as long as a shell. A link to
    the program itself is followed by each start, and so survives an update."""
    folder, name = os.path.split(os.path.abspath(program))
    return os.path.join(os.path.realpath(folder), name)


def service_command(config: Config, skipped: Sequence[str] = ()) -> List[str]:
    """Return the command line of a service, in absolute paths. Raises CannotStart."""
    words = [*own_command(), "start"]
    for row in SETTINGS:
        value = getattr(config, row.name)
        if value and row.name in ("cloudflared", "tunnel_token_file"):
            program = shutil.which(value) if row.name == "cloudflared" else None
            value = os.path.abspath(os.path.expanduser(program or value))
        if value is not False and value != row.default and row.name not in skipped:
            words.append(row.flag if value is True else "%s=%s" % (row.flag, value))
    for word in filter(UNFIT_TEXT.search, words):
        text = "A password, a control character or a byte that is not UTF-8 is in %r."
        raise CannotStart(text % word.partition("=")[0])
    return words


def service_variables(claude: str, environ: Mapping[str, str]) -> Dict[str, str]:
    """Return the environment of a service. A claude of npm may be a script for node."""
    folders = [os.path.dirname(claude), environ.get("PATH", os.defpath)]
    search = search_path({**environ, "PATH": os.pathsep.join(folders[not claude:])})
    programs = (shutil.which(name, path=search) for name in (claude, "node", "cloudflared"))
    path = [os.path.dirname(lasting_path(program)) for program in programs if program]
    path = [folder for folder in path if not UNFIT_TEXT.search(folder)]
    variables = {name: value for name, value in environ.items()
                 if value and SERVICE_VARIABLES.fullmatch(name)}
    for name in variables:
        if name.endswith(("_DIR", "_CERTS", "_FILE", "_CERT", "_KEY")):
            variables[name] = os.path.abspath(variables[name])
    variables = {name: value for name, value in variables.items() if not UNFIT_TEXT.search(value)}
    return {"PATH": ":".join(dict.fromkeys([*path, "/usr/local/bin", "/usr/bin", "/bin"])),
            **variables}


def systemd_unit(argv: List[str], variables: Mapping[str, str], config: Config) -> str:
    """Return a unit. Source: systemd.syntax(7), systemd.service(5), systemd.exec(5)."""
    def quoted(text: str) -> str:
        return '"%s"' % re.sub(r'(["\\])', r"\\\1", text).replace("%", "%%")

    # The name of the program must not hold these, so env gets it.
    words = ["/usr/bin/env", *argv] if re.search(r"[\"$'\\]", argv[0]) else argv
    login = variables.get("CLAUDE_SECURESTORAGE_CONFIG_DIR") or variables.get("CLAUDE_CONFIG_DIR")
    folders = [str(config.data_dir), login or str(home_folder(os.environ) / ".claude")]
    if any(map(UNFIT_TEXT.search, folders)):
        raise CannotStart("A control character is in the path of the login of claude.")
    uses_tmp = "/tmp/" in " ".join([*argv, *folders, *variables.values()])
    return SYSTEMD_UNIT.format(
        mark=SERVICE_MARK, command=" ".join(quoted(word.replace("$", "$$")) for word in words),
        environment=" ".join(quoted("%s=%s" % pair) for pair in variables.items()),
        secrets=str(config.data_dir / "service.env").replace("%", "%%"),
        writable=" ".join(quoted("-%s" % folder) for folder in folders),
        private_tmp="no\nReadWritePaths=/tmp" if uses_tmp else "yes")


def service_file(kind: str, config: Config, environ: Mapping[str, str]) -> str:
    """Return a file for a service manager; a task in ASCII, for Windows. Raises CannotStart."""
    if kind == "docker":
        # Docker forwards the port to an address of the container.
        config = replace(config, port=config.port or 3456, host="0.0.0.0")
        target = "/opt/claude_api_bridge" + Path(own_command()[1]).suffix
        # COPY expands variables even in its JSON form.
        source = re.sub(r"([\\$\"'])", r"\\\1", Path(own_command()[1]).name)
        argv = service_command(config, ("data_dir", "claude", "cloudflared", "tunnel_token_file"))
        return DOCKERFILE.format(
            mark=SERVICE_MARK, port=config.port, copy=json.dumps([source, target]),
            command=json.dumps(["python3", target, *argv[2:]]))
    claude = "" if config.demo else lasting_path(claude_program(config, environ))
    argv = service_command(replace(config, claude=claude))
    variables = service_variables(claude, environ)
    if kind == "systemd":
        return systemd_unit(argv, variables, config)
    if kind == "launchd":
        import plistlib
        log = str(config.data_dir / "service.log")
        agent = {
            "Label": "claude-api-bridge", "ProgramArguments": argv, "RunAtLoad": True, "Umask": 63,
            "EnvironmentVariables": variables, "KeepAlive": {"SuccessfulExit": False},
            "ProcessType": "Interactive", "StandardOutPath": log, "StandardErrorPath": log}
        text = plistlib.dumps(agent).decode().rstrip()
        return text.replace("<plist ", "<!-- %s -->\n<plist " % SERVICE_MARK, 1)
    from xml.sax.saxutils import escape
    user = "\\".join(filter(None, map(environ.get, ("USERDOMAIN", "USERNAME"))))
    program, command, user = map(escape, (list2cmdline(argv[:1]), list2cmdline(argv[1:]), user))
    text = SCHEDULED_TASK.format(mark=SERVICE_MARK, user=user, program=program, command=command)
    return text.encode("ascii", "xmlcharrefreplace").decode()


class ServiceManager:
    """systemd or launchd of this user. The calls raise CannotStart."""

    def __init__(self, config: Config) -> None:
        self._program = next(filter(shutil.which, MANAGERS), "")
        if not self._program:
            raise CannotStart("Neither systemctl nor launchctl is here.",
                              "try: claude_api_bridge.py service print --help")
        self.kind, name, log, *commands = MANAGERS[self._program]
        self.path = home_folder(os.environ) / name
        values = {"path": self.path, "user": os.getuid(), "data": config.data_dir}
        self.log = log.format(**values)
        self.prepare, self.start, self.stop, self.show = (
            partial(self._call, [word.format(**values) for word in command.split()])
            for command in commands)

    def _call(self, words: List[str]) -> str:
        try:
            return probe([self._program, *words], os.environ)
        except CannotStart as error:
            # It ran, and refused.
            text = str(error).replace(" cannot be run: ", ": ")
            is_foreign = re.search(r"\bbus\b|domain", text, re.IGNORECASE)
            hint = "log in as this user, not by su or sudo" if is_foreign else ""
            raise CannotStart(text, hint) from None

    def installed_text(self) -> str:
        """Return our file; "" if there is none. Raises CannotStart if it is somebody else's."""
        try:
            text = self.path.read_text("utf-8")
        except FileNotFoundError:
            return ""
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", error)
            raise CannotStart("%s cannot be read: %s." % (self.path, reason)) from None
        if SERVICE_MARK not in text:
            raise CannotStart("%s is not from this program." % self.path, "move it away first")
        return text

    @property
    def is_running(self) -> bool:
        return bool(re.search(r"active \(running\)|state = running", self.show()))

    def write(self, text: str) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file_atomically(self.path, text)
        except OSError as error:
            raise CannotStart(
                "%s cannot be written: %s." % (self.path, error.strerror or error)) from None

    def restart(self, config: Config) -> None:
        """Start what the file says; a bridge that runs may finish its request before."""
        self.prepare()
        stop_error = None
        try:
            self.stop()
        except CannotStart as error:
            # Perhaps it did not run.
            stop_error = error
        stops_by = Clock.monotonic() + SERVICE_STOP_SECONDS
        while lock_holder(config) and not stop_error and Clock.monotonic() < stops_by:
            time.sleep(0.2)
        if stop_error and lock_holder(config):
            raise stop_error
        DirectoryLock(config.data_dir / "bridge.lock").close()
        self.prepare()
        self.start()

    def remove(self, config: Config) -> None:
        """Stop the bridge and delete the file."""
        try:
            self.stop()
        except CannotStart:
            # Perhaps it did not run.
            if lock_holder(config) or self.is_running:
                raise
        try:
            self.path.unlink()
        except OSError as error:
            raise CannotStart("%s cannot be deleted: %s." % (self.path, error.strerror)) from None
        self.prepare()


def command_service(arguments: argparse.Namespace, config: Config, console: Console) -> int:
    """service print | install | uninstall | status. -> 0; status: 1 if it does not run."""
    if arguments.action == "print":
        is_printed = console.data(service_file(arguments.kind, config, os.environ))
        print_left_out(arguments.kind, config, console)
        return int(not is_printed)
    manager = ServiceManager(config)
    installed_text = manager.installed_text()
    if arguments.action == "install":
        install_service(manager, installed_text, config, console)
    elif not installed_text:
        console.data("It is not installed.")
        return int(arguments.action == "status")
    elif arguments.action == "status":
        console.data(manager.show().rstrip())
        return int(not manager.is_running)
    else:
        # Shows whether the manager can be reached.
        manager.prepare()
        manager.remove(config)
        console.info("✅", "Stopped and removed: %s (your data stays)" % manager.path)
    return 0


def install_service(
        manager: ServiceManager, old_text: str, config: Config, console: Console) -> None:
    """Write the file, start the bridge and wait until it listens. If that fails, the old file (""
    for none) is put back and its bridge runs again. Raises CannotStart."""
    # Shows whether the manager can be reached.
    manager.prepare()
    text = service_file(manager.kind, config, os.environ) + "\n"
    lock_path = data_directory(config.data_dir) / "bridge.lock"
    if not old_text or not manager.is_running:
        # Raises CannotStart if a bridge runs that is no service.
        DirectoryLock(lock_path).close()
    print_left_out(manager.kind, config, console)
    try:
        manager.write(text)
        manager.restart(config)
        url = wait_for_bridge(manager, config)
    except (CannotStart, KeyboardInterrupt) as error:
        try:
            if old_text:
                manager.write(old_text)
                manager.restart(config)
            elif manager.path.exists():
                manager.remove(config)
        except CannotStart as second_error:
            raise CannotStart(
                "%s Then it could not be undone: %s" % (str(error) or "Interrupted.", second_error),
                getattr(error, "hint", "")) from None
        raise
    console.info("✅", "Installed and started: %s" % manager.path)
    console.info("🔗", "It listens on %s" % url if url else "It does not listen yet; see its log")
    console.info("🔑", "Its log, with the first admin token: %s" % manager.log)
    console.info("🔑", "For another admin token: %s token create NAME --admin" % own_words())


def wait_for_bridge(manager: ServiceManager, config: Config) -> str:
    """Return the address of the bridge; "" if it still starts. Raises CannotStart if it ended."""
    started_at = Clock.monotonic()
    while Clock.monotonic() < started_at + SERVICE_START_SECONDS:
        with contextlib.suppress(CannotStart):
            return running_url(config)
        is_running = True
        with contextlib.suppress(CannotStart):
            is_running = manager.is_running
        # The manager may start it a little later.
        if Clock.monotonic() > started_at + 1 and not is_running:
            raise CannotStart("The service was started, but the bridge does not run.",
                              "its output says why: %s" % manager.log)
        time.sleep(0.1)
    return ""


def print_left_out(kind: str, config: Config, console: Console) -> None:
    """Name the variables that are set here and not in the file: mostly secrets."""
    text = ""
    written = service_variables("", os.environ) if kind in ("systemd", "launchd") else {}
    if kind == "systemd":
        with contextlib.suppress(OSError, ValueError):
            text = (config.data_dir / "service.env").read_text("utf-8")
    names = [name for name, value in os.environ.items() if value and (
        name in LEFT_OUT_VARIABLES or name in API_KEYS and config.allow_api_key
        or SERVICE_VARIABLES.fullmatch(name) and name not in written)]
    places = {"systemd": "if the service needs it, write NAME=VALUE into %s"
                         % (config.data_dir / "service.env"),
              "docker": "if the bridge needs it there, give it to docker run with -e NAME"}
    for name in names:
        if not re.search(r"(?m)^\s*%s=" % name, text):
            place = places.get(kind, "the service runs without it")
            console.info("⚠️", "%s is not in the file; %s" % (name, place))


# --- the parser ---
class CommandParser(argparse.ArgumentParser):
    """A parser of one command. Its errors show the usage of this command, and what was meant."""

    def __init__(self, **options: Any) -> None:
        if sys.version_info >= (3, 14):
            # From 3.15 on argparse has a suggestion of its own, but not for flags.
            options["suggest_on_error"] = False
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Otherwise the parser of all commands reports what one of them does not know.
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            text = "not known: " + " ".join(unknown)
            self._fail(text, unknown[0], self._option_string_actions)
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"argument (\S+): ignored explicit .*", r"\1 takes no value", message)
        choice = re.search(r"invalid choice: '(.*?)'.* \(choose from (.*)\)", message)
        choices = re.findall(r"[\w-]+", choice[2]) if choice else ()
        self._fail(message, choice[1] if choice else "", choices)

    def _fail(self, message: str, word: str, choices: Iterable[str]) -> NoReturn:
        self.print_usage(sys.stderr)
        # The dashes of flags would make them alike.
        plain = {choice.lstrip("-"): choice for choice in choices}
        meant = plain.get(closest(word.partition("=")[0].lstrip("-"), plain, 0.75))
        prog = self.prog.replace(own_words(), OWN_NAME)
        Console().fail(message, "did you mean %s?" % meant if meant else "see %s --help" % prog)
        sys.exit(2)


def add_settings(parser: argparse.ArgumentParser, names: Sequence[str] = ()) -> None:
    """Add the flags of the settings, without defaults, so that a variable can supply the value."""
    for row in SETTINGS:
        text = "%s [%s]" % (row.help, ", ".join(row.variables))
        options: Dict[str, Any] = {"action": "store_const", "const": True}
        if row.kind != "switch":
            options = {"metavar": row.kind.upper()}
            text += "" if row.default == "" else " (default: %s)" % row.default
        if not names or row.name in names:
            parser.add_argument(row.flag, dest=row.name, help=text, **options)


def build_parser() -> argparse.ArgumentParser:
    """Return the commands and their flags."""
    text = "A REST API for the claude command line tool you already pay for."
    parser = CommandParser(prog=own_words(), description=text)
    parser.add_argument("--version", "-v", "-V", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    add_settings(commands.add_parser(
        "start", usage=parser.prog + " start [FLAGS]", help="run the bridge"))
    doctor = commands.add_parser(
        "doctor", usage=parser.prog + " doctor [--json] [--live] [FLAGS OF start]",
        help="check everything that a start needs, and suggest fixes")
    add_settings(doctor)
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("--live", action="store_true",
                        help="also send the model a short question, which uses the plan")
    add_ask(commands.add_parser("ask", help="ask the running bridge, and print the answer"))
    add_token_actions(commands.add_parser(
        "token", help="create, list, change and revoke tokens, whether the bridge runs or not"))
    pause = commands.add_parser("pause", help="start no more requests; new ones wait")
    resume = commands.add_parser("resume", help="let the queue go on")
    backup = commands.add_parser(
        "backup", help="copy the database to a file, also while the bridge runs")
    backup.add_argument("file", help="the copy; an older copy is replaced")
    for command in (pause, resume, backup):
        add_settings(command, ("data_dir",))
    service = commands.add_parser("service", help="run it in the background")
    actions = service.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in (("print", "print its file"), ("install", "start it, now and at log-in"),
                       ("uninstall", "stop and remove it"), ("status", "show whether it runs")):
        kind = "KIND " if name == "print" else ""
        action = actions.add_parser(
            name, usage="%s %s %s[FLAGS OF start]" % (service.prog, name, kind), help=text)
        if kind:
            kinds = ("systemd", "launchd", "task", "docker")
            action.add_argument("kind", metavar="KIND", choices=kinds,
                                help="systemd, launchd, task or docker")
        add_settings(action)
    completion = commands.add_parser("completion", help="print what lets a shell complete words")
    completion.add_argument(
        "shell", metavar="SHELL", choices=sorted(SHELL_SCRIPTS), help="bash, zsh or fish")
    return parser


def add_ask(ask: argparse.ArgumentParser) -> None:
    """Add the arguments of `ask`."""
    ask.set_defaults(shown="")
    ask.add_argument(
        "message", nargs="+",
        help="the question; a last word - stands for standard input: ask 'Sum this up:' - < FILE")
    ask.add_argument("--model", metavar="NAME", help="alias or full name of a model")
    ask.add_argument("--system-prompt", metavar="TEXT", help="instructions for the model")
    ask.add_argument(
        "--conversation", metavar="NAME", help="continue the conversation of this name")
    ask.add_argument(
        "--url",
        help="address of the bridge [CAB_URL] (default: the one that uses this data folder)")
    ask.add_argument("--json", action="store_true", help="print the whole answer as JSON")
    add_settings(ask, ("data_dir",))


def add_token_actions(token: argparse.ArgumentParser) -> None:
    """Add the actions of `token`."""
    actions = token.add_subparsers(dest="action", metavar="ACTION", required=True)
    create = actions.add_parser("create", help="create a token and print it")
    create.add_argument("name", help="what the token is for")
    create.add_argument(
        "--admin", action="store_true", help="may manage tokens and read every request")
    create.add_argument("--stateful", action="store_true", help="its requests share a memory")
    create.add_argument("--expires", metavar="DAYS", help="from now on (default: never)")
    create.add_argument(
        "--tools", help="none (default), read, web, all, or rules: 'Read,Bash(git log:*)'")
    create.add_argument("--requests-per-minute", metavar="N",
                        help="maximum of requests within 60 seconds (default: no limit)")
    create.add_argument("--requests-per-day", metavar="N",
                        help="maximum of requests within a day, UTC (default: no limit)")
    create.add_argument("--models", metavar="NAMES",
                        help="the models it may use, separated by commas; the first is its default")
    create.add_argument(
        "--callbacks", metavar="HOSTS", default="",
        help="it may have results sent to these hosts, separated by commas, or to all public ones")
    create.add_argument("--workspace", metavar="DIR",
                        help="an existing folder for its tools (default: a folder of its own)")
    listing = actions.add_parser("list", help="show all tokens")
    update = actions.add_parser("update", help="change a token's name, expiry, limits or models")
    rotate = actions.add_parser("rotate", help="give a token another secret; the old is refused")
    revoke = actions.add_parser("revoke", help="delete a token; its running request is stopped")
    for action in (update, rotate, revoke):
        action.add_argument("id", help="its ID, name or prefix, as token list shows them")
    update.add_argument("--name", help="what the token is for")
    update.add_argument("--expires", metavar="DAYS", help="from now on, or: never")
    update.add_argument("--requests-per-minute", metavar="N", help="a number, or: none")
    update.add_argument("--requests-per-day", metavar="N", help="a number, or: none")
    update.add_argument("--models", metavar="NAMES", help="separated by commas, or: all")
    for action in (create, listing, update, rotate, revoke):
        add_settings(action, ("data_dir",))
    for action in (create, listing):
        action.add_argument("--json", action="store_true", help="print JSON")


# By shell: the script, and what it does for the words after a command. Only the words are data.
SHELL_SCRIPTS = {
    "bash": ("""\
_claude_api_bridge() {{
  local word words path=
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case "$path/$word" in {paths}) path="$path/$word" ;; esac
  done
  case "$path" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _claude_api_bridge {names}""", "    {path!r}) words='{words}' ;;"),
    "zsh": ("""\
_claude_api_bridge() {{
  local word place=
  for word in "${{(@)words[2,CURRENT-1]}}"; do
    case "$place/$word" in ({paths}) place="$place/$word" ;; esac
  done
  case "$place" in
{cases}
  esac
  _files
}}
compdef _claude_api_bridge {names}""", "    ({path!r}) compadd -- {words} ;;"),
    "fish": ("""\
function __claude_api_bridge_path
  set -l path ''
  for word in (commandline -opc)[2..]
    switch $path/$word
      case {paths}
        set path $path/$word
    end
  end
  echo $path
end
{cases}""", "complete -c claude-api-bridge -c claude_api_bridge.py -c claude_api_bridge.pyz"
            " -f -n 'test (__claude_api_bridge_path) = \"{path}\"' -a '{words}'")}


def command_paths(parser: argparse.ArgumentParser, path: str = "") -> Iterator[Tuple[str, str]]:
    """Yield each command as a path, such as "/token/create", with what may follow it."""
    words: List[str] = []
    for action in parser._actions:
        words += [flag for flag in action.option_strings if flag.startswith("--")]
        words += list(action.choices or ())
        if isinstance(action.choices, dict):
            for name, command in action.choices.items():
                yield from command_paths(command, "%s/%s" % (path, name))
    yield path, " ".join(words)


def command_completion(arguments: argparse.Namespace, config: Config, console: Console) -> int:
    """completion SHELL: print a script for the shell's start file. -> 0."""
    script, case = SHELL_SCRIPTS[arguments.shell]
    rows = list(command_paths(build_parser()))
    separator = " " if arguments.shell == "fish" else "|"
    console.data(script.format(
        paths=separator.join(path for path, _ in rows if path),
        cases="\n".join(case.format(path=path, words=words) for path, words in rows),
        names="claude-api-bridge claude_api_bridge.py claude_api_bridge.pyz"))
    return 0


FLAGS = {
    "expiresInDays": "--expires", "requestsPerMinute": "--requests-per-minute",
    "requestsPerDay": "--requests-per-day", "callbacks": "--callbacks", "models": "--models"}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run one command. -> the exit status: 0 done, 1 failed, 2 wrong arguments."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["demo-claude"]:
        return DemoClaude(words[1:]).run()
    if words[:1] == ["help"]:
        words = [*(word for word in words if word != "help"), "--help"]
    parser = build_parser()
    arguments = parser.parse_args(words)
    if not arguments.command:
        parser.print_help()
        return 0
    console = Console()
    commands = {"ask": command_ask, "token": command_token, "pause": command_queue,
                "resume": command_queue, "doctor": command_doctor, "backup": command_backup,
                "service": command_service, "completion": command_completion}
    try:
        config = load_config(vars(arguments), os.environ)
        if arguments.command == "start":
            return command_start(config, console)
        if arguments.command != "doctor":
            print_variables(config, console)
        return commands[arguments.command](arguments, config, console)
    except (WrongSetting, InvalidRequest) as error:
        # The API's names of what a flag says.
        pattern = r"\b(%s)\b" % "|".join(FLAGS)
        console.fail(re.sub(pattern, lambda match: FLAGS[match.group()], str(error)))
        return 2
    except BridgeError as error:
        console.fail(str(error))
    except CannotStart as error:
        console.fail(str(error), error.hint)
    except KeyboardInterrupt:
        console.fail("Interrupted.")
    return 1


# --- the demo ---
class DemoClaude:
    """`demo-claude`, which --demo runs in place of `claude`: the same protocol, with an echo."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        self._turns = 0
        self._has_schema = False
        self._tools: List[str] = []
        self._session_id = str(uuid.uuid4())
        self._input: "queue.SimpleQueue[Optional[Dict[str, Any]]]" = queue.SimpleQueue()

    def run(self) -> int:
        if "--version" in self._words:
            print("%d.%d.%d (demo)" % MINIMUM_CLI)
        elif "--help" in self._words:
            print("\n".join(sorted(NEEDED_FLAGS)))
        elif "auth" in self._words:
            print(as_json({"loggedIn": True, "authMethod": "demo"}))
        elif any(word.startswith("--resume=") for word in self._words):
            self._send_failure("No conversation found")
            return 1
        else:
            threading.Thread(target=self._read, name="stdin", daemon=True).start()
            for line in iter(self._input.get, None):
                self._handle(line)
        return 0

    def _read(self) -> None:
        for line in sys.stdin.buffer:
            self._input.put(json.loads(line))
        self._input.put(None)

    def _send(self, **message: Any) -> None:
        sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")
        sys.stdout.buffer.flush()

    def _send_failure(self, error: str) -> None:
        self._send(type="result", subtype="error_during_execution", is_error=True, errors=[error])

    def _handle(self, line: Mapping[str, Any]) -> None:
        if line["type"] == "control_request":
            request = line["request"]
            self._has_schema |= "jsonSchema" in request
            agent = request.get("agents", {}).get("bridge", {})
            self._tools = agent.get("tools") or self._tools
            model = {"value": "default", "resolvedModel": "demo", "displayName": "Demo"}
            self._send(type="control_response", response={
                "subtype": "success", "request_id": line["request_id"],
                "response": {"models": [model]}})
        elif line["type"] == "user":
            self._turns += 1
            if line.get("shouldQuery") is False:
                self._send(type="result", subtype="success", is_error=False, num_turns=0, result="")
            else:
                blocks = line["message"]["content"]
                self._answer("".join(block.get("text", "") for block in blocks))

    def _answer(self, message: str) -> None:
        turn = " (turn %d)" % self._turns if self._turns > 1 else ""
        text = "This is a demo, Claude was not asked. You said%s: %s" % (turn, message)
        tools = [*self._tools, *["StructuredOutput"] * self._has_schema]
        self._send(type="system", subtype="init", apiKeySource="none", model="demo",
                   session_id=self._session_id, tools=tools)
        self._send(type="stream_event", event={"type": "message_start"})
        pieces = re.findall(r"\s*\S+\s*$|\s*\S+", text) or [text]
        for piece in pieces:
            delta = {"type": "text_delta", "text": piece}
            self._send(type="stream_event", event={"type": "content_block_delta", "delta": delta})
            if self._is_interrupted(min(0.02, 1 / len(pieces))):
                self._send_failure("interrupted")
                return
        result: Dict[str, Any] = {"result": text}
        if self._has_schema:
            structured = {"demo": message}
            result = {"result": as_json(structured), "structured_output": structured}
        usage = {"input_tokens": len(message.split()), "output_tokens": len(text.split())}
        self._send(type="result", subtype="success", is_error=False, num_turns=1, total_cost_usd=0,
                   usage=usage, **result)

    def _is_interrupted(self, seconds: float) -> bool:
        """Wait. -> whether an interrupt or the end of the input came meanwhile."""
        try:
            line = self._input.get(timeout=seconds)
        except queue.Empty:
            return False
        if line is None:
            self._input.put(None)
            return True
        return bool(line.get("request", {}).get("subtype") == "interrupt")


def run() -> None:
    """The entry point of the installed command and of the .pyz."""
    sys.exit(main())


if __name__ == "__main__":
    run()
