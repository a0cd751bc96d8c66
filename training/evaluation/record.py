"""What a measure finds out about a model, before any mean is taken: by source, so that errors can be told. Plain data."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

Unit = (
    str  # what the bootstrap draws: a source of held-out clips, or a prompt of generated videos, or a video by itself
)


class Pooled(NamedTuple):
    """A figure of all clips together, such as a Fréchet distance.

    value        of all
    replicates   the same of each resample of the units, in the order of `bootstrap.draws`, so that models pair
    """

    value: float
    replicates: Sequence[float]


class Result(NamedTuple):
    """Figures of one model by one measure; any part may be empty.

    rows       by (unit, clip or video): figures that are means over them
    pooled     figures of all together
    curves     by figure: position (seconds, frames or a chunk's number) -> unit -> mean over its clips
    notes      facts for people, such as that frames were resampled, or why a figure was refused
    """

    rows: Mapping[tuple[Unit, str], Mapping[str, float]] = {}
    pooled: Mapping[str, Pooled] = {}
    curves: Mapping[str, Mapping[float, Mapping[Unit, float]]] = {}
    notes: Sequence[str] = ()
