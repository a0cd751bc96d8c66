"""The papers' claims, a file a paper; `claims.py` runs them and keeps what comes out."""

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple


class Shown(NamedTuple):
    """One figure of a claim.

    name     in the table
    better   which way
    paper    the paper's figure, as it is printed there with its table; empty where it has none
    """

    name: str
    better: Literal["higher", "lower"]
    paper: str = ""


class Claim(NamedTuple):
    """What a paper says, and how it can be seen with small models.

    paper     name of the family's folder
    name      of the claim
    says      the claim in a sentence, with its section
    arms      what is compared, in the order of the table, and what sets each apart from the others, as plain data
    figures   by key of what `run` returns
    holds     (better arm, other arm, figure): the claim holds where mean ± sd of these do not overlap
    run       `run(arm, seed, folder, short)`: trains and measures one arm, resumable in `folder`, which is shared by the
              arms of a claim; `short` is the form of ten minutes for all claims of a paper
    settings  `settings(short)`: all else that a result depends on, as plain data: the world, data, models, steps. Results of
              other settings are not the claim's
    """

    paper: str
    name: str
    says: str
    arms: Mapping[str, Any]
    figures: Mapping[str, Shown]
    holds: Sequence[tuple[str, str, str]]
    run: Callable[[str, int, Path, bool], Mapping[str, float]]
    settings: Callable[[bool], Mapping[str, Any]]


def digest(settings: Any) -> str:
    """Eight hex digits of plain data, which name a folder that other settings do not share."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """While another process that asks for the same file waits."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        yield
