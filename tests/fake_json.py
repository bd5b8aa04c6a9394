"""A small JSON reader and writer for the fake programs, on the C parts of `json`.

`import json` compiles regular expressions that only unusual values need. That takes as long as
all the rest of the start of a fake program.
"""

from __future__ import annotations

from _json import encode_basestring_ascii, make_encoder, make_scanner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class ReaderOptions:
    """The options that `make_scanner` reads as attributes."""

    strict, parse_float, parse_int, parse_constant = True, float, int, float
    # array_hook: from Python 3.15 on.
    object_hook = object_pairs_hook = array_hook = None


def refuse(value: Any) -> Any:
    """Raise TypeError for a value that JSON cannot express."""
    raise TypeError("no JSON: %r" % (value,))


_read = make_scanner(ReaderOptions)
_write = make_encoder({}, refuse, encode_basestring_ascii, None, ": ", ", ", False, False, True)


def loads(text: Any) -> Any:
    """Return the one JSON value in a text, or in UTF-8 bytes."""
    text = text.decode() if isinstance(text, bytes) else text
    value, end = _read(text.lstrip(), 0)
    if text.lstrip()[end:].strip():
        raise ValueError("more than one value: %r" % text[:200])
    return value


def dumps(value: Any) -> str:
    """Return the value as JSON, with non-ASCII characters escaped."""
    return "".join(_write(value, 0))
