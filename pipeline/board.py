"""How far the groups of a job are, told by the tasks that make them: for the progress bar, and to name what stands still."""

import time
from collections.abc import Callable, Iterator
from queue import Empty, Queue
from threading import Thread
from typing import Any

from longtake.datasets.errors import Failure

_POLL_SECONDS = 1.0


class Board:
    """A Ray actor: the groups that are being made, each with the sources done, the source at hand, and since when."""

    def __init__(self) -> None:
        self._at: dict[str, tuple[int, str, float]] = {}
        self._finished = self._moves = 0

    def begin(self, group: str, done: int, uri: str) -> None:
        self._at[group] = (done, uri, time.monotonic())
        self._moves += 1

    def finish(self, group: str, sources: int) -> None:
        self._at.pop(group, None)
        self._finished += sources
        self._moves += 1

    def state(self) -> tuple[int, int, list[tuple[str, int, str, float]]]:
        """A number that changes when anything moves, the sources done, and the groups at hand, longest unmoved first."""
        now = time.monotonic()
        at = [(group, done, uri, now - since) for group, (done, uri, since) in self._at.items()]
        return self._moves, self._finished + sum(done for _, done, _, _ in at), sorted(at, key=lambda a: -a[3])


def watched(
    results: Iterator[Any], ray: Any, board: Any, stage: str, stall_seconds: float, tell: Callable[[int, str], None]
) -> Iterator[Any]:
    """Pass on the results of a job while looking at its board.

    Args:
        results: blocks while waiting for the cluster.
        stall_seconds: after which a group that has not moved is named.
        tell: called about once a second with the sources done and, where a group stands still, one line that names it.

    Raises:
        Failure: nothing at all has moved for `stall_seconds`; names the groups that stand still.
    """
    queue: Queue[tuple[str, Any]] = Queue()

    def read() -> None:
        try:
            for result in results:
                queue.put(("result", result))
            queue.put(("end", None))
        except BaseException as e:
            queue.put(("error", e))

    Thread(target=read, daemon=True).start()
    moved, before, named = time.monotonic(), -1, set[tuple[str, int]]()
    while True:
        try:
            what, value = queue.get(timeout=_POLL_SECONDS)
        except Empty:
            what, value = "", None
        if what == "error":
            raise value
        if what == "end":
            return
        if what == "result":
            moved = time.monotonic()
            yield value
            continue
        try:
            moves, done, at = ray.get(board.state.remote(), timeout=5)
        except ray.exceptions.GetTimeoutError:
            continue  # a busy or moving node: the results still say that work goes on
        except ray.exceptions.RayActorError:
            moves, done, at = before, 0, []  # lost with its node; the tasks that begin from now on tell the next one
        if moves != before:
            moved, before = time.monotonic(), moves
        standing = [
            (g, n, f"group {g} has stood still for {s:.0f} s at {uri}") for g, n, uri, s in at if s > stall_seconds
        ]
        if time.monotonic() - moved > stall_seconds:
            free = ray.available_resources().get("CPU", 0)
            waits = f"no group is being made, {free:g} CPU are free: does another job hold the cluster?"
            which = "; ".join(line for _, _, line in standing[:3]) or waits
            raise Failure(
                f"stage {stage}: nothing has moved for {stall_seconds:g} s: {which}; run the same command again"
            )
        fresh = [line for group, n, line in standing if (group, n) not in named]
        named |= {(group, n) for group, n, _ in standing}
        tell(done, "; ".join(fresh))
