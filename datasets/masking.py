"""Addresses without their secrets, as they may be printed, logged and kept."""

import re
from collections.abc import Mapping
from typing import Any

# a character of an address in a text; an address in quotes ends at them
_CHARACTER = r"""(?:[^\s"'<>]|'(?![,.:;)\]}]*(?:\s|\Z)))"""
# A login ends at the last @ before the path. A password may have slashes though; a login with one ends at the last @ of all.
# HOST:PORT/PATH@ is a login only if HOST is no domain and something like a host follows.
_PORT = r"\d{1,5}[/?#]"
_LOGIN = re.compile(
    rf"""(?x) ://
    (?: ( [^\s"'<>:/?\#\[]* : (?!{_PORT}) {_CHARACTER}* ) @
      | ( (?!localhost:) [^\s"'<>:/?\#@.\[]+ : (?={_PORT}) {_CHARACTER}* ) @ (?= [\w.-]+ (?: / | :\d ) )
      | ( (?: (?![:/?\#]) {_CHARACTER} )+ ) @ )"""
)
_SECRET = re.compile(
    rf"""(?xi) (?<=[?&;\#])
    (?: [\w.-]* (?: password | passwd | pwd | secret | token | signature | credential
                  | (?: api | access | account | private ) [_-]? key | sharedaccesskey ) [\w.-]*
      | sig | auth | authorization | key )
    = ( (?: (?!&) {_CHARACTER} )+ )"""
)


def shown(text: str) -> str:
    """A URL, or a text with URLs, without passwords, keys and signatures."""
    spans = sorted(m.span(m.lastindex or 0) for pattern in (_LOGIN, _SECRET) for m in pattern.finditer(text))
    out, end = "", 0
    for start, stop in spans:
        # a login and a parameter may overlap: mask both
        if start >= end:
            out += text[end:start] + "***"
        end = max(end, stop)
    return out + text[end:]


def shown_within(content: Any) -> Any:
    """JSON values with every text in them `shown`."""
    if isinstance(content, str):
        return shown(content)
    if isinstance(content, Mapping):
        return {shown_within(name): shown_within(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [shown_within(value) for value in content]
    return content
