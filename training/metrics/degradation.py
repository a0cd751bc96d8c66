"""How long videos get worse: the distance of each of their chunks to real videos of a chunk's length.

TATS (arXiv 2204.03638) draws the rise above the first chunk's distance. Here the distances themselves are the
curve, so that models compare, and the rise is a figure.
"""

from collections.abc import Sequence
from typing import Any

from longtake.datasets.errors import UserError
from longtake.training.metrics.distance import Sample, distance


def degradation(real: Sample, chunks: Sequence[Sample], *, split: str, seed: int) -> dict[str, Any]:
    """Distances of the chunks of generated videos, in order of time, to real ones, with what makes them comparable.

    With StyleGAN-V's I3D they are FVD and KVD by chunk.

    Returns:
        For JSON: `frechet` and `kernel`, a number for each chunk; `frechet_rise` and `kernel_rise`, that of the last above
        that of the first; `distance`, the first chunk's as `distance.distance` gives it, with network and counts.

    Raises:
        ValueError: no chunks; fewer than two videos; chunks and real videos of unequal shape.
    """
    if not chunks:
        raise ValueError("there is no chunk")
    found = [distance(real, chunk, split=split, seed=seed) for chunk in chunks]
    result: dict[str, Any] = {"distance": found[0]}
    for name in ("frechet", "kernel"):
        curve = [each[name] for each in found]
        result |= {name: curve, f"{name}_rise": None if curve[0] is None else curve[-1] - curve[0]}
    return result


def heldout_degradation(real: Sample, chunks: Sequence[Sample], seed: int) -> dict[str, Any]:
    """`degradation` beside held-out videos; UserError where that raises ValueError."""
    try:
        return degradation(real, chunks, split="val", seed=seed)
    except ValueError as e:
        raise UserError(f"features: {e}") from e
