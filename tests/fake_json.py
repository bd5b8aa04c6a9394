"""What the fakes need of `json`, from its inside: `import json` compiles regular expressions that it needs for the unusual only,
which takes as long as all else in the start of a fake."""
from __future__ import annotations

from _json import encode_basestring_ascii, make_encoder, make_scanner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Reading:
    strict, parse_float, parse_int, parse_constant = True, float, int, float
    object_hook = object_pairs_hook = None


def refuse(value: Any) -> Any:
    raise TypeError("no JSON: %r" % (value,))


_read = make_scanner(Reading)
_write = make_encoder({}, refuse, encode_basestring_ascii, None, ": ", ", ", False, False, True)


def loads(text: Any) -> Any:
    """The value of a text, or of bytes in UTF-8."""
    text = text.decode() if isinstance(text, bytes) else text
    value, end = _read(text.lstrip(), 0)
    if text.lstrip()[end:].strip():
        raise ValueError("more than one value: %r" % text[:200])
    return value


def dumps(value: Any) -> str:
    return "".join(_write(value, 0))
