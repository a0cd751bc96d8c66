"""Numbers, times and sentences as people read them."""

import math
import string
from collections.abc import Mapping
from typing import Any


def number(value: float) -> str:
    """Whole numbers with thousands separators, others to four digits."""
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == round(value, 0):
        return f"{int(value):,}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


class _Formatter(string.Formatter):
    """`str.format` that writes floats as `number`, and lists with commas between. Raises LookupError for None and ""."""

    def format_field(self, value: Any, spec: str) -> str:
        if value is None or value == "":
            raise LookupError("no value")
        return format(value, spec) if spec else _plain(value, ", ")


def _plain(value: Any, separator: str) -> str:
    if isinstance(value, list):
        return separator.join(_plain(item, ": ") for item in value)
    return number(value) if isinstance(value, float) else str(value)


def fill(template: str, record: Mapping[str, Any]) -> str:
    """A template such as "{clips} clips of {size[height]} rows" with the record's values; "" where one is missing."""
    try:
        return _Formatter().vformat(template, (), record)
    except (LookupError, TypeError):
        return ""


def value_at(path: str, record: Mapping[str, Any]) -> Any:
    """The value at a path such as "distance[kernel]"; None if there is none."""
    try:
        return string.Formatter().get_field(path, (), record)[0]
    except (LookupError, TypeError):
        return None
