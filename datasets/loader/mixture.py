"""Several loaders as one stream of batches."""

from collections import deque
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import numpy as np

from longtake.datasets.errors import UserError
from longtake.datasets.loader import order
from longtake.datasets.loader.room import Empty
from longtake.datasets.loader.workers import Plan, Stream


class Mixture(Stream):
    """Whole batches of several endless loaders in turn, each with its share of the batches, exact in every 1000.

    A batch is its loader's, with the loader's name as `part`. Each loader keeps its own epochs. To mix images and videos,
    read the images with a loader of windows of one frame.

    Args:
        parts: `{name: (loader, weight)}`, the loaders made for the same rank and world.

    Raises:
        UserError: a weight is not above 0, or too small for a batch in 1000; the loaders have several ranks, or an end.
    """

    def __init__(self, parts: Mapping[str, tuple[Stream, float]], *, seed: int = 0, workers: int = 0) -> None:
        loaders = {name: loader for name, (loader, _) in parts.items()}
        weights = [weight for _, weight in parts.values()]
        if not parts or min(weights) <= 0:
            raise UserError("mixture: each part needs a weight above 0")
        if least := [n for n, share in zip(loaders, order.shares(weights), strict=True) if not share]:
            raise UserError(f"mixture: {least[0]} has less than one batch in {order.ROUND}; raise its weight")
        places = {(loader.rank, loader.world) for loader in loaders.values()}
        if len(places) > 1:
            raise UserError("mixture: its loaders were made for different ranks")
        if any(loader.end is not None for loader in loaders.values()):
            raise UserError("mixture: a loader has `epochs`; leave them out, a mixture is endless")
        self.loaders = loaders
        states = {name: loader.state_dict() for name, loader in loaders.items()}
        plan = _Mixed([loader.plan for loader in loaders.values()], list(loaders), weights, seed)
        data = [[name, state["data"], state["seed"]] for name, state in states.items()]
        batches = [state["batch"] for state in states.values()]
        super().__init__(plan, [data, weights], seed, batches, None, workers, *places.pop())


class _Mixed:
    """The plan of a `Mixture`."""

    def __init__(self, plans: list[Plan], names: list[str], weights: list[float], seed: int) -> None:
        self.plans, self.names, self.weights, self.seed = plans, names, weights, seed

    def make(self, numbers: Iterator[int], empty: Empty = np.empty) -> Generator[dict[str, Any]]:
        queues: list[deque[int]] = [deque() for _ in self.plans]
        turns = deque[int]()

        def queue_next() -> bool:
            """Queue the next batch with its part; False where there is none."""
            if (number := next(numbers, None)) is None:
                return False
            part, nth = order.mixed(self.weights, self.seed, number)
            turns.append(part)
            queues[part].append(nth)
            return True

        def numbers_of(part: int) -> Iterator[int]:
            # a plan may ask for its next number before the turn of the last one: look further ahead for it
            while queues[part] or queue_next():
                if queues[part]:
                    yield queues[part].popleft()

        streams = [plan.make(numbers_of(part), empty) for part, plan in enumerate(self.plans)]
        while turns or queue_next():
            part = turns.popleft()
            yield next(streams[part]) | {"part": self.names[part]}
