"""What share of a training's time is computation, and what the rest goes into.

All times are this rank's. What ranks exchange inside of the backward pass and of the update counts as computation: it
overlaps with it, and could be told apart only by making the device wait.
"""

from collections.abc import Mapping, Sequence

COMPUTED = ("forward", "backward", "update")
PREFIX = "share/"  # of the metrics, each 0 to 1; those of COMPUTED are one, `share/compute`
ELAPSED = "seconds_elapsed"  # of which they are shares


def shares(seconds: Mapping[str, float], asides: Mapping[str, float], elapsed: float) -> dict[str, float]:
    """The shares of the time since the last log.

    Args:
        seconds: of each part of a step, in all.
        asides: of what is no part of a step, such as "sample".
        elapsed: of steps and asides together; what no part accounts for is `share/other`.
    """
    parts = {"compute": sum(seconds.get(name, 0.0) for name in COMPUTED)}
    parts |= {name: value for name, value in seconds.items() if name not in COMPUTED} | dict(asides)
    # events of a device and the clock of the host may differ by a little
    parts["other"] = max(0.0, elapsed - sum(parts.values()))
    return {f"{PREFIX}{name}": value / elapsed for name, value in parts.items()} | {ELAPSED: elapsed}


def overall(history: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, float]:
    """The shares of a whole training, largest first, from what was logged of them; empty where nothing was.

    Args:
        history: (step, value) of each metric.
    """
    elapsed = dict(history.get(ELAPSED, ()))
    whole = sum(elapsed.values())
    if not whole:
        return {}
    spent = {
        name.removeprefix(PREFIX): sum(share * elapsed.get(step, 0.0) for step, share in points) / whole
        for name, points in history.items()
        if name.startswith(PREFIX)
    }
    return dict(sorted(spent.items(), key=lambda item: (-item[1], item[0])))
