"""A fake `cloudflared`: writes what the real one was seen to write (2026.8.2), and fails in every way it was seen to fail.

A plan says how each start behaves: a list of steps, of which the last one repeats. A step is made by `quick`, `named` or
`failing`. Files in its folder are switches that a test can turn while it runs: `ready` (200, 503, `gone` or `drip`: an answer
that never ends), `config.json`, `die` (an exit code; used up by the one that dies) and `flood` (bytes to write to the log; used
up, too).
"""
from __future__ import annotations

import os
import sys
import time

TYPE_CHECKING = False                   # typing's own would import it
if TYPE_CHECKING:                       # what a start of the fake does not need is not imported by it
    import socket
    from pathlib import Path
    from typing import Any, Dict, List, Mapping, Optional, Tuple

    Step = Dict[str, Any]

try:
    from fake_json import dumps, loads
except ImportError:                     # another Python than the usual one
    from json import dumps, loads

VERSION = "2026.8.2"
AT = "2026-11-22T06:02:36Z "
WELCOME = (
    AT + "INF Thank you for trying Cloudflare Tunnel. Doing so, without a Cloudflare account, is a quick way to experiment and try it out."
    " However, be aware that these account-less Tunnels have no uptime guarantee, are subject to the Cloudflare Online Services Terms of"
    " Use (https://www.cloudflare.com/website-terms/), and Cloudflare reserves the right to investigate your use of Tunnels for violations"
    " of such terms. If you intend to use Tunnels in production you should use a pre-created named tunnel by following:"
    " https://developers.cloudflare.com/cloudflare-one/connections/connect-apps\n"
    + AT + "INF Requesting new quick Tunnel on trycloudflare.com...\n")
FRAME = AT + "INF +" + "-" * 92 + "+\n"
PRE_CHECKS = (
    FRAME + AT + "INF |  CONNECTIVITY PRE-CHECKS" + " " * 66 + "|\n"
    + AT + "INF |  DNS resolution   region1.v2.argotunnel.com       PASS                                      |\n"
    + AT + "INF |  Cloudflare API   https://api.cloudflare.com      FAIL                                      |\n" + FRAME)
HARMLESS = (
    AT + "ERR Cannot determine default origin certificate path. No file cert.pem in [~/.cloudflared /etc/cloudflared]. You need to specify"
    " the origin certificate path by specifying the origincert option in the configuration file\n"
    + AT + "WRN The user running cloudflared process has a GID (group ID) that is not within ping_group_range.\n"
    + AT + "WRN ICMP proxy feature is disabled error=\"cannot create ICMPv4 proxy: Group ID 0 is not between ping group 1 to 0\"\n"
    + AT + "ERR Failed to fetch features, default to enable error=\"lookup cfd-features.argotunnel.com on 127.0.0.1:53: no such host\"\n")
UNDER_WAY = (
    AT + "INF Version 2026.8.2 (Checksum 48f5b2b3)\n"
    + AT + "INF Settings: map[ha-connections:1 metrics:127.0.0.1:0 no-autoupdate:true protocol:quic url:http://127.0.0.1:3456]\n"
    + AT + "INF Generated Connector ID: a2eeedac-6000-45a0-be0f-1813325d8916\n" + AT + "INF Initial protocol quic\n")
POST = 'failed to request quick Tunnel: Post "https://api.trycloudflare.com/tunnel": '


def box(host: str) -> str:
    """The frame in which the log shows the address."""
    return (FRAME + AT + "INF |  Your quick Tunnel has been created! Visit it at (it may take some time to be reachable):  |\n"
            + AT + "INF |  %s|\n" % ("https://" + host).ljust(90) + FRAME)


def quick(name: str = "foo-bar", **changes: Any) -> Step:
    """A quick tunnel that fares well. Changes: `connects` (whether /ready says 200; or the protocol by which it does), `box` and
    `quicktunnel` (where the address is told), `split` (the address is written in two pieces), `told` (another name at
    /quicktunnel), `flood` (bytes of log before it is ready), `leaves` (seconds that it takes to go at SIGTERM, or "never")."""
    host = name + ".trycloudflare.com"
    return {"host": host, "said": [WELCOME + HARMLESS, box(host), PRE_CHECKS + UNDER_WAY], **changes}


def named(config: Optional[Mapping[str, Any]] = None, **changes: Any) -> Step:
    """A named tunnel. config: its remote configuration, as /config gives it."""
    return {"host": "", "said": [HARMLESS + UNDER_WAY], "config": config or {"version": -1, "config": {}}, **changes}


def failing(*said: str, status: int = 1, stdout: str = "") -> Step:
    """One that ends at once, with these lines."""
    return {"said": [line + "\n" for line in said], "exit": status, "stdout": stdout}


def ingress(*rules: Tuple[str, str], version: int = 3) -> Dict[str, Any]:
    """A configuration as Cloudflare sends it: (host name, service) and the rule for the rest."""
    listed = [{"hostname": host, "service": service} for host, service in rules] + [{"service": "http_status:404"}]
    return {"version": version, "config": {"ingress": listed, "warp-routing": {"enabled": False}}}


HANGING: Step = {"said": [WELCOME]}
FAILURES: Dict[str, Step] = {
    "limited": failing(WELCOME.rstrip("\n"), AT + "ERR Error unmarshaling QuickTunnel response: error code: 1015 error=\"invalid character"
                       " 'e' looking for beginning of value\" status_code=\"429 Too Many Requests\"",
                       "failed to unmarshal quick Tunnel: invalid character 'e' looking for beginning of value"),
    "html": failing(WELCOME.rstrip("\n"), AT + "ERR Error unmarshaling QuickTunnel response: <html> error=\"invalid character '<' looking"
                    " for beginning of value\" status_code=\"530 \"",
                    "failed to unmarshal quick Tunnel: invalid character '<' looking for beginning of value"),
    "empty": failing(WELCOME.rstrip("\n"), "failed to unmarshal quick Tunnel: unexpected end of JSON input"),
    "no result": failing(WELCOME.rstrip("\n"), "failed to parse quick Tunnel ID: invalid UUID length: 0"),
    "no name": failing(WELCOME.rstrip("\n"), POST + "dial tcp: lookup api.trycloudflare.com on 127.0.0.1:53: no such host"),
    "refused": failing(WELCOME.rstrip("\n"), AT + "ERR https://api.trycloudflare.com did not answer", POST + "dial tcp 192.0.2.1:443:"
                       " connect: connection refused"),
    "silent": failing(WELCOME.rstrip("\n"), POST + "net/http: timeout awaiting response headers (Client.Timeout exceeded while awaiting"
                      " headers)"),
    "port": failing(WELCOME + box("lost-one.trycloudflare.com"), "Error opening metrics server listener: failed to bind to address"
                    " (127.0.0.1:0): listen tcp 127.0.0.1:0: bind: address already in use"),
    "refusal": failing(WELCOME + box("lost-two.trycloudflare.com") + AT + "ERR initial tunnel connection failed", "Tunnel not found"),
    "wordless": failing(status=0),
    "update": failing(AT + "INF cloudflared has been updated", status=11),
    "flag": failing(status=0, stdout="Incorrect Usage. flag provided but not defined: -bogus\n\nNAME:\n   cloudflared tunnel - Use"
                    " Cloudflare Tunnel to expose private services to the Internet or to Cloudflare connected private users.\n"),
    "token": failing("Provided Tunnel token is not valid.", "See 'cloudflared tunnel run --help'.", status=255),
}


class FakeCloudflared:
    """The executable in a folder of its own, what it noted, and its switches."""

    def __init__(self, folder: Path, *steps: Step) -> None:
        self.folder, self.path = folder, folder / "cloudflared"
        folder.mkdir(parents=True, exist_ok=True)
        self.path.write_text("#!%s -S\nimport sys\nsys.path.insert(0, %r)\nimport fake_cloudflared\nsys.exit(fake_cloudflared.main(%r))\n"
                             % (sys.executable, os.path.dirname(os.path.abspath(__file__)), str(folder)))
        self.path.chmod(0o755)
        self.plan(*steps or (quick(),))

    def plan(self, *steps: Step) -> None:
        """How the next starts behave."""
        self.turn("plan.json", dumps({"after": len(self.starts()), "steps": steps}))

    def turn(self, switch: str, to: str) -> None:
        part = self.folder / (switch + ".part")
        part.write_text(to)
        part.replace(self.folder / switch)

    def runs(self) -> List[Dict[str, Any]]:
        """Every time it was run: {"pid", "argv", "env"}."""
        path = self.folder / "runs.jsonl"
        written = path.read_text().rpartition("\n")[0] if path.exists() else ""          # the last line may be half there
        return [loads(line) for line in written.splitlines()]

    def starts(self) -> List[Dict[str, Any]]:
        """The runs as a tunnel."""
        return [run for run in self.runs() if run["argv"][:1] == ["tunnel"]]

    def client_disconnected(self) -> List[int]:
        """Those that went in order."""
        path = self.folder / "left"
        return [int(line) for line in path.read_text().split()] if path.exists() else []


def main(folder: str) -> int:
    path = os.path.join(folder, "runs.jsonl")
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(log, (dumps({"pid": os.getpid(), "argv": sys.argv[1:], "env": dict(os.environ)}) + "\n").encode())   # in one piece
    os.close(log)
    if sys.argv[1:] == ["version", "--short"]:
        print(VERSION)
        return 0
    with open(path) as file:
        number = sum(loads(line)["argv"][:1] == ["tunnel"] for line in file)
    with open(os.path.join(folder, "plan.json")) as file:
        plan = loads(file.read())
    return Fake(folder, plan["steps"][min(number - 1 - plan["after"], len(plan["steps"]) - 1)]).run()


class Fake:
    """One start."""

    def __init__(self, folder: str, step: Step) -> None:
        self.folder, self.step = folder, step
        self.is_asked_to_go = False
        import _signal as signal         # without names for its numbers
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        if step.get("leaves") == "never":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif "leaves" in step:
            signal.signal(signal.SIGTERM, self.go)

    def go(self, number: int, frame: Any) -> None:
        self.is_asked_to_go = True

    def run(self) -> int:
        sys.stdout.write(self.step.get("stdout", ""))
        sys.stdout.flush()
        for text in self.step["said"]:
            self.say(text)
        if "exit" in self.step:
            return int(self.step["exit"])
        if "host" in self.step:
            self.serve()
        while not self.is_asked_to_go:
            status = self.take("die")
            if status:
                self.say(AT + "ERR Connection terminated error=\"connection with edge closed\" connIndex=0\nthe end was near\n")
                return int(status)
            self.flood(int(self.take("flood") or 0))
            time.sleep(0.005)
        self.say(AT + "INF Initiating graceful shutdown due to signal terminated ...\n")
        time.sleep(float(self.step["leaves"]))
        with open(os.path.join(self.folder, "left"), "a") as file:
            file.write("%d\n" % os.getpid())
        return 0

    def say(self, text: str) -> None:
        if "https://" + self.step.get("host", "-") in text and not self.step.get("box", True):
            return
        middle = text.find(".trycloudflare.com  ") if self.step.get("split") else 0
        for piece in (text[:middle], text[middle:]) if middle > 0 else (text,):
            data = piece.encode()
            while data:
                data = data[os.write(2, data):]
            if middle > 0:
                time.sleep(0.05)                         # so that a reader gets it in two pieces

    def flood(self, size: int) -> None:
        """Half of it in lines, half of it in one that does not end before the last byte."""
        if size:
            line = AT + "INF " + "x" * 200 + "\n"
            self.say(line * (size // 2 // len(line)))
            self.say("y" * (size // 2) + "\n")
            with open(os.path.join(self.folder, "flooded"), "w"):
                pass

    def take(self, switch: str) -> str:
        """What a switch says, once."""
        try:
            os.rename(os.path.join(self.folder, switch), os.path.join(self.folder, switch + ".used"))
        except OSError:
            return ""
        with open(os.path.join(self.folder, switch + ".used")) as file:
            return file.read()

    def read(self, switch: str) -> str:
        try:
            with open(os.path.join(self.folder, switch)) as file:
                return file.read()
        except OSError:
            return ""

    # --- the metrics server ---

    def serve(self) -> None:
        import socket
        import threading
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.answer_all, args=(listener,), name="metrics", daemon=True).start()
        self.say(AT + "INF Starting metrics server on 127.0.0.1:%d/metrics\n" % listener.getsockname()[1])
        self.flood(int(self.step.get("flood", 0)))

    def answer_all(self, listener: socket.socket) -> None:
        while True:
            connection = listener.accept()[0]
            with connection:
                path = connection.recv(4096).split(b" ")[1].decode()
                if self.read("ready") == "drip":
                    self.drip(connection)
                status, body = self.answer(path)
                if status:
                    connection.sendall(b"HTTP/1.1 %d X\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s"
                                       % (status, len(body), body.encode()))

    def drip(self, connection: socket.socket) -> None:
        """A line that goes on, so that no reader runs out of patience."""
        connection.sendall(b"HTTP/1.1 200 X\r\nX-Long: ")
        with open(os.path.join(self.folder, "dripping"), "w"):
            pass
        while True:
            connection.sendall(b"x")
            time.sleep(0.1)

    def answer(self, path: str) -> Tuple[int, str]:
        if self.read("ready") == "gone":
            return 0, ""
        if path == "/quicktunnel":
            told = self.step.get("told", self.step["host"])
            return 200, dumps({"hostname": told if self.step.get("quicktunnel", True) else ""})
        if path == "/config":
            return 200, self.read("config.json") or dumps(self.step.get("config", {}))
        if path == "/ready":
            status = int(self.read("ready") or (200 if self.connects() else 503))
            return status, dumps({"status": status, "readyConnections": int(status == 200), "connectorId": "a2eeedac"})
        return 404, "404 page not found\n"

    def connects(self) -> bool:
        how = self.step.get("connects", True)
        return how is True or how in sys.argv
