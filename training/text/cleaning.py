"""Rules by which a text is cleaned before it is cut into tokens. A rule is a function and a line in `RULES`."""

import html
from collections.abc import Callable


def kept(text: str) -> str:
    """The text as it is."""
    return text


def collapsed(text: str) -> str:
    """Without white space at its ends, and a blank for each run of it inside."""
    return " ".join(text.split())


def of_wan(text: str) -> str:
    """As Wan's models had it: entities such as `&amp;amp;` resolved twice, then white space collapsed, and not lowercased.

    Wan runs `ftfy` before, which repairs broken encodings and also makes curly quotes straight, splits ligatures and narrows
    wide letters. Longtake does not: for the very tokens of Wan let the manifest have texts that ftfy has gone over.
    """
    return collapsed(html.unescape(html.unescape(text)))


RULES: dict[str, Callable[[str], str]] = {"none": kept, "whitespace": collapsed, "wan": of_wan}
