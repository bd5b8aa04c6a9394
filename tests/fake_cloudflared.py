"""A fake `cloudflared`: it writes what the real one (2026.8.2) writes, and fails in the same ways.

A plan defines how each start behaves: a list of steps, of which the last one repeats. `quick`,
`named` and `failing` make a step. Files in the fake's folder are switches that a test can set while
the fake runs: `ready` (200, 503, `gone` or `drip`: an answer that never ends), `config.json`,
`die` (an exit code) and `flood` (bytes to write to the log). Reading `die` or `flood` resets it.
"""

from __future__ import annotations

import os
import sys
import time

# Set here, because importing it from typing would import typing, which a start does not need.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from pathlib import Path
    from typing import Any, Dict, List, Mapping, Optional, Tuple

    Step = Dict[str, Any]

try:
    from fake_json import dumps, loads
except ImportError:
    # fake_json needs internals of CPython that another Python may not have.
    from json import dumps, loads

VERSION = "2026.8.2"
AT = "2026-11-22T06:02:36Z "


def log(*lines: str) -> str:
    """Return the lines as cloudflared logs them: with a time stamp."""
    return "".join(AT + line + "\n" for line in lines)


WELCOME = log(
    "INF Thank you for trying Cloudflare Tunnel. Doing so, without a Cloudflare account, is a quick"
    " way to experiment and try it out. However, be aware that these account-less Tunnels have no"
    " uptime guarantee, are subject to the Cloudflare Online Services Terms of Use"
    " (https://www.cloudflare.com/website-terms/), and Cloudflare reserves the right to investigate"
    " your use of Tunnels for violations of such terms. If you intend to use Tunnels in production"
    " you should use a pre-created named tunnel by following:"
    " https://developers.cloudflare.com/cloudflare-one/connections/connect-apps",
    "INF Requesting new quick Tunnel on trycloudflare.com...",
)
FRAME = log("INF +" + "-" * 92 + "+")
PRE_CHECKS = (
    FRAME
    + log(
        "INF |  CONNECTIVITY PRE-CHECKS" + " " * 66 + "|",
        "INF |  DNS resolution   region1.v2.argotunnel.com       PASS" + " " * 38 + "|",
        "INF |  Cloudflare API   https://api.cloudflare.com      FAIL" + " " * 38 + "|",
    )
    + FRAME
)
HARMLESS = log(
    "ERR Cannot determine default origin certificate path. No file cert.pem in"
    " [~/.cloudflared /etc/cloudflared]. You need to specify the origin certificate path by"
    " specifying the origincert option in the configuration file",
    "WRN The user running cloudflared process has a GID (group ID) that is not within"
    " ping_group_range.",
    'WRN ICMP proxy feature is disabled error="cannot create ICMPv4 proxy: Group ID 0 is not'
    ' between ping group 1 to 0"',
    'ERR Failed to fetch features, default to disable error="lookup cfd-features.argotunnel.com on'
    ' 127.0.0.1:53: no such host"',
)
UNDER_WAY = log(
    "INF Version 2026.8.2 (Checksum 48f5b2b3)",
    "INF Settings: map[ha-connections:1 metrics:127.0.0.1:0 no-autoupdate:true protocol:quic"
    " url:http://127.0.0.1:3456]",
    "INF Generated Connector ID: a2eeedac-6000-45a0-be0f-1813325d8916",
    "INF Initial protocol quic",
)
POST = 'failed to request quick Tunnel: Post "https://api.trycloudflare.com/tunnel": '


def box(host: str) -> str:
    """Return the frame in which the log shows the address."""
    lines = log(
        "INF |  Your quick Tunnel has been created! Visit it at (it may take some time to be"
        " reachable):  |",
        "INF |  %s|" % ("https://" + host).ljust(90),
    )
    return FRAME + lines + FRAME


def quick(name: str = "foo-bar", **changes: Any) -> Step:
    """Return the step of a quick tunnel that works.

    changes: `connects` (whether /ready answers 200; or the only protocol with which it does), `box`
    and `quicktunnel` (where the address is shown), `split` (the address is written in two pieces),
    `reported_host` (another name at /quicktunnel), `flood` (bytes of log before it is ready),
    `leaves` (seconds from SIGTERM to its end, or "never").
    """
    host = name + ".trycloudflare.com"
    output = [WELCOME + HARMLESS, box(host), PRE_CHECKS + UNDER_WAY]
    return {"host": host, "output": output, **changes}


def named(config: Optional[Mapping[str, Any]] = None, **changes: Any) -> Step:
    """Return the step of a named tunnel. config: its remote configuration, as /config answers."""
    return {
        "host": "", "output": [HARMLESS + UNDER_WAY],
        "config": config or {"version": -1, "config": {}}, **changes,
    }


def failing(*lines: str, status: int = 1, stdout: str = "") -> Step:
    """Return the step of a start that writes these lines and exits."""
    return {"output": [line + "\n" for line in lines], "exit": status, "stdout": stdout}


def ingress(*rules: Tuple[str, str], version: int = 3) -> Dict[str, Any]:
    """Return a configuration as Cloudflare sends it, with a last rule for all other names.

    rules: pairs of host name and service.
    """
    entries = [{"hostname": host, "service": service} for host, service in rules] + [
        {"service": "http_status:404"}
    ]
    return {"version": version, "config": {"ingress": entries, "warp-routing": {"enabled": False}}}


HANGING: Step = {"output": [WELCOME]}
FAILURES: Dict[str, Step] = {
    "limited": failing(
        WELCOME.rstrip("\n"),
        AT
        + 'ERR Error unmarshaling QuickTunnel response: error code: 1015 error="invalid character'
        ' \'e\' looking for beginning of value" status_code="429 Too Many Requests"',
        "failed to unmarshal quick Tunnel: invalid character 'e' looking for beginning of value",
    ),
    "html": failing(
        WELCOME.rstrip("\n"),
        AT + "ERR Error unmarshaling QuickTunnel response: <html> error=\"invalid character '<'"
        ' looking for beginning of value" status_code="530 "',
        "failed to unmarshal quick Tunnel: invalid character '<' looking for beginning of value",
    ),
    "empty": failing(
        WELCOME.rstrip("\n"), "failed to unmarshal quick Tunnel: unexpected end of JSON input"
    ),
    "no result": failing(
        WELCOME.rstrip("\n"), "failed to parse quick Tunnel ID: invalid UUID length: 0"
    ),
    "no name": failing(
        WELCOME.rstrip("\n"),
        POST + "dial tcp: lookup api.trycloudflare.com on 127.0.0.1:53: no such host",
    ),
    "refused": failing(
        WELCOME.rstrip("\n"), AT + "ERR https://api.trycloudflare.com did not answer",
        POST + "dial tcp 192.0.2.1:443: connect: connection refused",
    ),
    "silent": failing(
        WELCOME.rstrip("\n"),
        POST + "net/http: timeout awaiting response headers (Client.Timeout exceeded while awaiting"
        " headers)",
    ),
    "port": failing(
        WELCOME + box("lost-one.trycloudflare.com"),
        "Error opening metrics server listener: failed to bind to address"
        " (127.0.0.1:0): listen tcp 127.0.0.1:0: bind: address already in use",
    ),
    "refusal": failing(
        WELCOME + box("lost-two.trycloudflare.com") + AT + "ERR initial tunnel connection failed",
        "Tunnel not found",
    ),
    "wordless": failing(status=0),
    "update": failing(AT + "INF cloudflared has been updated", status=11),
    "flag": failing(
        status=0,
        stdout="Incorrect Usage. flag provided but not defined: -bogus\n\nNAME:\n"
        "   cloudflared tunnel - Use Cloudflare Tunnel to expose private services to the Internet"
        " or to Cloudflare connected private users.\n",
    ),
    "token": failing(
        "Provided Tunnel token is not valid.", "See 'cloudflared tunnel run --help'.", status=255
    ),
}


class FakeCloudflared:
    """The fake executable in its own folder, the record of its runs, and its switches."""

    def __init__(self, folder: Path, *steps: Step) -> None:
        self.folder, self.path = folder, folder / "cloudflared"
        folder.mkdir(parents=True, exist_ok=True)
        self.path.write_text(
            "#!%s -S\nimport sys\nsys.path.insert(0, %r)\nimport fake_cloudflared\n"
            "sys.exit(fake_cloudflared.main(%r))\n"
            % (sys.executable, os.path.dirname(os.path.abspath(__file__)), str(folder))
        )
        self.path.chmod(0o755)
        if os.name == "nt":
            script, self.path = self.path, folder / "cloudflared.cmd"
            self.path.write_text('@"%s" -S "%s" %%*\n' % (sys.executable, script))
        self.plan(*steps or (quick(),))

    def plan(self, *steps: Step) -> None:
        """Define how the next starts behave."""
        self.set("plan.json", dumps({"after": len(self.starts()), "steps": steps}))

    def set(self, switch: str, value: str) -> None:
        """Set a switch of the running fake."""
        part = self.folder / (switch + ".part")
        part.write_text(value)
        part.replace(self.folder / switch)

    def runs(self) -> List[Dict[str, Any]]:
        """Return every run: {"pid", "argv", "env"}."""
        path = self.folder / "runs.jsonl"
        # The last line may be incomplete.
        written = path.read_text().rpartition("\n")[0] if path.exists() else ""
        return [loads(line) for line in written.splitlines()]

    def starts(self) -> List[Dict[str, Any]]:
        """Return the runs that start a tunnel."""
        return [run for run in self.runs() if run["argv"][:1] == ["tunnel"]]

    def graceful_exits(self) -> List[int]:
        """Return the pids of the runs that ended in order after SIGTERM."""
        path = self.folder / "graceful"
        return [int(line) for line in path.read_text().split()] if path.exists() else []


def main(folder: str) -> int:
    """Record this run and behave as the plan in the folder defines."""
    path = os.path.join(folder, "runs.jsonl")
    run = {"pid": os.getpid(), "argv": sys.argv[1:], "env": dict(os.environ)}
    record = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    # One write, so that lines of several processes do not mix.
    os.write(record, (dumps(run) + "\n").encode())
    os.close(record)
    if sys.argv[1:] == ["version", "--short"]:
        print(VERSION)
        return 0
    with open(path) as file:
        number = sum(loads(line)["argv"][:1] == ["tunnel"] for line in file)
    with open(os.path.join(folder, "plan.json")) as file:
        plan = loads(file.read())
    index = min(number - 1 - plan["after"], len(plan["steps"]) - 1)
    return Fake(folder, plan["steps"][index]).run()


class Fake:
    """One start of the fake as a tunnel."""

    def __init__(self, folder: str, step: Step) -> None:
        self.folder, self.step = folder, step
        self.is_stopping = False
        # signal would build its enums at each start; _signal has plain numbers.
        import _signal as signal

        if os.name == "posix":
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        if step.get("leaves") == "never":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif "leaves" in step:
            signal.signal(signal.SIGTERM, self.stop)

    def stop(self, number: int, frame: Any) -> None:
        self.is_stopping = True

    def run(self) -> int:
        sys.stdout.write(self.step.get("stdout", ""))
        sys.stdout.flush()
        for text in self.step["output"]:
            self.write(text)
        if "exit" in self.step:
            return int(self.step["exit"])
        if "host" in self.step:
            self.serve()
        while not self.is_stopping:
            status = self.take("die")
            if status:
                self.write(
                    log('ERR Connection terminated error="connection with edge closed" connIndex=0')
                    + "the end was near\n"
                )
                return int(status)
            self.flood(int(self.take("flood") or 0))
            time.sleep(0.005)
        self.write(log("INF Initiating graceful shutdown due to signal terminated ..."))
        time.sleep(float(self.step["leaves"]))
        with open(os.path.join(self.folder, "graceful"), "a") as file:
            file.write("%d\n" % os.getpid())
        return 0

    def write(self, text: str) -> None:
        """Write to the log, unless the step hides the address there."""
        if "https://" + self.step.get("host", "-") in text and not self.step.get("box", True):
            return
        middle = text.find(".trycloudflare.com  ") if self.step.get("split") else 0
        for piece in (text[:middle], text[middle:]) if middle > 0 else (text,):
            data = piece.encode()
            while data:
                data = data[os.write(2, data) :]
            if middle > 0:
                # The pause makes a reader receive two pieces.
                time.sleep(0.05)

    def flood(self, size: int) -> None:
        """Write this many bytes: half of them as short lines, the other half as one long line."""
        if size:
            line = log("INF " + "x" * 200)
            self.write(line * (size // 2 // len(line)))
            self.write("y" * (size // 2) + "\n")
            with open(os.path.join(self.folder, "flooded"), "w"):
                pass

    def take(self, switch: str) -> str:
        """Return the value of a switch and reset it."""
        try:
            os.rename(
                os.path.join(self.folder, switch), os.path.join(self.folder, switch + ".used")
            )
        except OSError:
            return ""
        with open(os.path.join(self.folder, switch + ".used")) as file:
            return file.read()

    def read(self, switch: str) -> str:
        """Return the value of a switch, or ""."""
        try:
            with open(os.path.join(self.folder, switch)) as file:
                return file.read()
        except OSError:
            return ""

    # --- the metrics server ---

    def serve(self) -> None:
        """Start the metrics server in a thread."""
        import socket
        import threading

        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(
            target=self.answer_all, args=(listener,), name="metrics", daemon=True
        ).start()
        port = listener.getsockname()[1]
        self.write(log("INF Starting metrics server on 127.0.0.1:%d/metrics" % port))
        self.flood(int(self.step.get("flood", 0)))

    def answer_all(self, listener: socket.socket) -> None:
        """Answer one request after the other."""
        while True:
            connection = listener.accept()[0]
            with connection:
                path = connection.recv(4096).split(b" ")[1].decode()
                if self.read("ready") == "drip":
                    self.drip(connection)
                status, body = self.answer(path)
                if status:
                    connection.sendall(
                        b"HTTP/1.1 %d X\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n"
                        b"Connection: close\r\n\r\n%s" % (status, len(body), body.encode())
                    )

    def drip(self, connection: socket.socket) -> None:
        """Send a header line that never ends, slowly enough that no read times out."""
        connection.sendall(b"HTTP/1.1 200 X\r\nX-Long: ")
        with open(os.path.join(self.folder, "dripping"), "w"):
            pass
        while True:
            connection.sendall(b"x")
            time.sleep(0.1)

    def answer(self, path: str) -> Tuple[int, str]:
        """Return status and body; status 0 means no answer at all."""
        if self.read("ready") == "gone":
            return 0, ""
        if path == "/quicktunnel":
            host = self.step.get("reported_host", self.step["host"])
            return 200, dumps({"hostname": host if self.step.get("quicktunnel", True) else ""})
        if path == "/config":
            return 200, self.read("config.json") or dumps(self.step.get("config", {}))
        if path == "/ready":
            status = int(self.read("ready") or (200 if self.connects() else 503))
            connections = int(status == 200)
            return status, dumps(
                {"status": status, "readyConnections": connections, "connectorId": "a2eeedac"}
            )
        return 404, "404 page not found\n"

    def connects(self) -> bool:
        """Return whether this start connects, which may depend on its --protocol."""
        how = self.step.get("connects", True)
        return how is True or how in sys.argv
