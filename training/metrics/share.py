"""Evaluation shared among ranks: a rank's share of the clips, and the results of all ranks together."""

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
    """This rank's numbers of 0..count-1, every world-th one, with a bar on the first rank. Every rank must take all its numbers.

    Raises:
        Interrupted: on all ranks, where some rank is asked to stop.
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
    """The results of all ranks by number, plain data, in order of number. Every rank must call it."""
    parts: list[Any] = [part]
    if _grouped():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, dict(part))
    return dict(sorted((number, value) for results in parts for number, value in results.items()))


def gathered(rows: Tensor) -> Tensor:
    """The rows (N, D) of all ranks, in order of rank; N may differ, and be 0 for any D. Every rank must call it."""
    if not _grouped():
        return rows
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    shape = torch.tensor(rows.shape if len(rows) else (0, 0), device=device)
    shapes = [torch.zeros_like(shape) for _ in range(dist.get_world_size())]
    dist.all_gather(shapes, shape)
    counts, widths = zip(*(size.tolist() for size in shapes), strict=True)
    padded = rows.new_zeros((max(counts), max(widths)), device=device)
    if len(rows):
        padded[: len(rows)] = rows.to(device)
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]).to(rows.device)


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
