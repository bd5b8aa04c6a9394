"""Edit the dashboard as files: extract its three constants from the module and embed them again.

python tests/page.py extract DIR    write style.css, page.html and script.js into DIR
python tests/page.py embed DIR      write these files back into claude_api_bridge.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import List, Match

MODULE = Path(__file__).resolve().parent.parent / "claude_api_bridge.py"
CONSTANTS = {
    "style.css": "DASHBOARD_CSS",
    "page.html": "DASHBOARD_HTML",
    "script.js": "DASHBOARD_JS",
}


class PageError(Exception):
    """A constant or a file cannot be used; the message says why."""


def read_text(path: Path) -> str:
    """Return the text of a file. Line ends stay as they are."""
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise PageError("cannot read %s: %s" % (path, error)) from None


def find_constant(source: str, name: str) -> Match[str]:
    """Return the match whose group 1 is the value of a raw constant."""
    matches = list(re.finditer(r'^%s = r"""(.*?)"""$' % name, source, re.DOTALL | re.MULTILINE))
    if len(matches) != 1:
        raise PageError("the module has %d constants %s, not 1" % (len(matches), name))
    return matches[0]


def check_content(file_name: str, content: str) -> None:
    """Raise PageError if a raw string cannot hold this text exactly."""
    if '"""' in content:
        raise PageError('%s contains """, which would end the constant' % file_name)
    if content.endswith(("\\", '"')):
        raise PageError("%s ends in a backslash or a quote: add a newline" % file_name)
    if "\r" in content:
        raise PageError("%s contains a carriage return: use LF line ends" % file_name)


def extract(module: Path, folder: Path) -> None:
    """Write the constants of the module to files."""
    source = read_text(module)
    contents = {name: find_constant(source, CONSTANTS[name])[1] for name in CONSTANTS}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content.encode())


def embed(module: Path, folder: Path) -> None:
    """Write the files back into the module. If one of them is invalid, change nothing."""
    source = read_text(module)
    for name, constant in CONSTANTS.items():
        content = read_text(folder / name)
        check_content(name, content)
        match = find_constant(source, constant)
        source = source[: match.start(1)] + content + source[match.end(1) :]
    module.write_bytes(source.encode())


def main(arguments: List[str]) -> int:
    """Run one command. Return the exit status."""
    commands = {"extract": extract, "embed": embed}
    if len(arguments) != 2 or arguments[0] not in commands:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        commands[arguments[0]](MODULE, Path(arguments[1]))
    except (PageError, OSError) as error:
        print("error: %s" % error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
