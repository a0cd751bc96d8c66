"""Progress of a job's groups, reported by the tasks that make them: for the bar, and to name a group that stands still."""

import time
from collections.abc import Callable, Iterator
from queue import Empty, Queue
from threading import Thread
from typing import Any

from longtake.datasets.errors import Failure

_POLL_SECONDS = 1.0


class Board:
    """A Ray actor: for each group at work the number of finished sources, the current source, and when it began."""

    def __init__(self) -> None:
        self._groups: dict[str, tuple[int, str, float]] = {}
        self._finished = self._moves = 0

    def begin(self, group: str, finished: int, uri: str) -> None:
        self._groups[group] = (finished, uri, time.monotonic())
        self._moves += 1

    def finish(self, group: str, sources: int) -> None:
        self._groups.pop(group, None)
        self._finished += sources
        self._moves += 1

    def state(self) -> tuple[int, int, list[tuple[str, int, str, float]]]:
        """A number that changes with each move, the finished sources, and the groups at work, longest unmoved first, as
        (name, finished sources, URI of the current source, seconds since it moved)."""
        now = time.monotonic()
        groups = [(group, finished, uri, now - since) for group, (finished, uri, since) in self._groups.items()]
        finished = self._finished + sum(count for _, count, _, _ in groups)
        return self._moves, finished, sorted(groups, key=lambda group: -group[3])


def watched(
    results: Iterator[Any], ray: Any, board: Any, stage: str, stall_seconds: float, show: Callable[[int, str], None]
) -> Iterator[Any]:
    """Pass on the results of a job while watching its board.

    Args:
        results: blocks while waiting for the cluster.
        stall_seconds: after which a group that has not moved is named.
        show: called about once a second with the finished sources and, where a group stands still, one line that names it.

    Raises:
        Failure: nothing at all has moved for `stall_seconds`; names the groups that stand still.
    """
    queue, end = Queue[Any](), object()

    def read() -> None:
        try:
            for result in results:
                queue.put(result)
            queue.put(end)
        except BaseException as e:
            queue.put(e)

    Thread(target=read, daemon=True).start()
    moved, last_moves, named = time.monotonic(), -1, set[tuple[str, int]]()
    while True:
        try:
            result = queue.get(timeout=_POLL_SECONDS)
        except Empty:
            result = None
        if result is end:
            return
        if isinstance(result, BaseException):
            raise result
        if result is not None:
            moved = time.monotonic()
            yield result
            continue

        try:
            moves, finished, groups = ray.get(board.state.remote(), timeout=5)
        except ray.exceptions.GetTimeoutError:
            continue  # a busy or moving node: results still show that work continues
        except ray.exceptions.RayActorError:
            moves, finished, groups = last_moves, 0, []  # lost with its node; tasks report to the next one
        if moves != last_moves:
            moved, last_moves = time.monotonic(), moves

        stalled = {
            (group, count): f"group {group} has stood still for {seconds:.0f} s at {uri}"
            for group, count, uri, seconds in groups
            if seconds > stall_seconds
        }
        if time.monotonic() - moved > stall_seconds:
            cause = "; ".join([*stalled.values()][:3]) or _free_cpus(ray)
            raise Failure(
                f"stage {stage}: nothing has moved for {stall_seconds:g} s: {cause}; run the same command again"
            )
        show(finished, "; ".join(line for key, line in stalled.items() if key not in named))
        named |= stalled.keys()


def _free_cpus(ray: Any) -> str:
    free = ray.available_resources().get("CPU", 0)
    return f"no group is being made, {free:g} CPU are free: does another job hold the cluster?"
