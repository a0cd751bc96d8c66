"""A rank's share of an evaluation, and what all ranks have measured, together again. Without a process group, all of it."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from longtake.datasets.errors import Interrupted
from longtake.datasets.loader import Loader
from longtake.training.launch.processes import RUN_AGAIN, stop_requested

T = TypeVar("T")


def place() -> tuple[int, int]:
    """(rank, world)."""
    return (dist.get_rank(), dist.get_world_size()) if _grouped() else (0, 1)


def mine(count: int, what: str, unit: str) -> Iterator[int]:
    """This rank's numbers of 0..count-1, every world-th one, with a bar on the first rank. Every rank must take all of its own.

    Raises:
        Interrupted: on all ranks, where one is asked to stop.
    """
    rank, world = place()
    for number in tqdm(range(rank, count, world), what, unit=unit, disable=rank != 0):
        if stop_requested():
            break
        yield number
    if gathered(torch.tensor([[float(stop_requested())]])).any():
        raise Interrupted(f"{what}: stopped; {RUN_AGAIN}")


def batches(loader: Loader, count: int, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """This rank's batches of the first `count`, each with its number; see `mine`."""
    rank, world = place()
    yield from zip(itertools.count(rank, world), loader.at(mine(count, what, "clip")), strict=False)


def united(part: Mapping[int, T]) -> dict[int, T]:
    """What all ranks have of their numbers, plain data, in order. Every rank must call it."""
    parts: list[Any] = [part]
    if _grouped():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, dict(part))
    return dict(sorted((number, value) for some in parts for number, value in some.items()))


def gathered(rows: Tensor) -> Tensor:
    """The rows (N, D) of all ranks, in order of rank; N may differ, and be 0 for any D. Every rank must call it."""
    if not _grouped():
        return rows
    at = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    mine = torch.tensor(rows.shape if len(rows) else (0, 0), device=at)
    shapes = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(shapes, mine)
    counts, widths = zip(*(shape.tolist() for shape in shapes), strict=True)
    padded = rows.new_zeros((max(counts), max(widths)), device=at)
    if len(rows):
        padded[: len(rows)] = rows.to(at)
    held = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(held, padded)
    return torch.cat([part[:n] for part, n in zip(held, counts, strict=True)]).to(rows.device)


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
