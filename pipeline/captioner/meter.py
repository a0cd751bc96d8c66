"""Requests to an endpoint, counted over all workers: their rate, and the budget of a run."""

import threading
import time
from typing import Any, Protocol


class Counter(Protocol):
    def take(self) -> float | None: ...

    def spend(self, tokens: int) -> None: ...

    def pause(self, seconds: float) -> None: ...


class Meter:
    """Says when the next request may begin. Used by threads, or as a Ray actor by many workers (see `Shared`).

    Args:
        per_minute: most requests that begin in a minute; None: no bound.
        requests, tokens: the budget; None: no bound. Requests that have begun when the tokens are used up still end.
    """

    def __init__(self, per_minute: float | None, requests: int | None, tokens: int | None) -> None:
        self._gap = 60 / per_minute if per_minute else 0.0
        self._requests, self._tokens = requests, tokens
        self._next = 0.0
        self._lock = threading.Lock()

    def take(self) -> float | None:
        """Seconds to wait before a request, which is counted by this call; None where the budget is used up."""
        with self._lock:
            if self._requests == 0 or (self._tokens is not None and self._tokens <= 0):
                return None
            if self._requests is not None:
                self._requests -= 1
            now = time.monotonic()
            begin = max(now, self._next)
            self._next = begin + self._gap
            return begin - now

    def spend(self, tokens: int) -> None:
        """Count the tokens of an answer."""
        with self._lock:
            if self._tokens is not None:
                self._tokens -= tokens

    def pause(self, seconds: float) -> None:
        """Let no request begin for some seconds."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class Shared:
    """A `Meter` that is a Ray actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def take(self) -> float | None:
        import ray

        wait: float | None = ray.get(self._actor.take.remote())
        return wait

    def spend(self, tokens: int) -> None:
        self._actor.spend.remote(tokens)

    def pause(self, seconds: float) -> None:
        self._actor.pause.remote(seconds)
