"""Where the clips of a generated film meet, as its file says it: a comment such as {"longtake": {"joints": [16, 28]}}.

A joint is the number of the first frame of a new clip. What a file says is untrusted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

_MOST = 1 << 24  # characters of a comment that are read: joints of a million clips and more
_LARGEST = 1 << 31


def comment_of(joints: Sequence[int]) -> str:
    """The comment of a film with these joints."""
    return json.dumps({"longtake": {"joints": list(joints)}}, separators=(",", ":"))


def joints_in(comment: str) -> list[int]:
    """The joints of a comment; empty for one that says none. ValueError where they are no rising numbers, above 0, of frames."""
    if len(comment) > _MOST:
        raise ValueError(f"its comment has {len(comment):,} characters, and {_MOST:,} are read")
    try:
        ours = json.loads(comment)["longtake"]["joints"]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return []
    if not isinstance(ours, list) or any(type(joint) is not int or not 0 < joint < _LARGEST for joint in ours):
        raise ValueError("the joints written in it are no numbers of frames")
    if any(later <= joint for joint, later in pairwise(ours)):
        raise ValueError("the joints written in it do not rise")
    return ours
