"""The papers' claims, a file a paper; `claims.py` runs them and keeps what comes out."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple


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
    arms      what is compared, in the order of the table
    figures   by key of what `run` returns
    holds     (better arm, other arm, figure): the claim holds where mean ± sd of these do not overlap
    run       `run(arm, seed, folder, short)`: trains and measures one arm, resumable in `folder`, which is shared by the
              arms of a claim; `short` is the form of ten minutes for all claims of a paper
    """

    paper: str
    name: str
    says: str
    arms: Sequence[str]
    figures: Mapping[str, Shown]
    holds: Sequence[tuple[str, str, str]]
    run: Callable[[str, int, Path, bool], Mapping[str, float]]
