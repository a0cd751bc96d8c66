"""How a network goes through a video in time: causally, looking ahead, in windows that are blended, or at once.

A way has two methods. `once` takes and gives all of a clip, with gradients. `stream` takes pieces and gives parts as soon as
they are known, without gradients; together they are the same values. Frames are cut into tiles as `tile` and `overlap` say,
in the units of `scales` (see `common.streaming.tiled`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from longtake.training.models.common.streaming import Box, Past, stream, tiled

Run = Callable[[Tensor, Past | None], Tensor]
Tiling = tuple[int | None, int, tuple[int, int]]  # tile, overlap, scales


class Way(Protocol):
    def once(self, x: Tensor, tiling: Tiling) -> Tensor: ...

    def stream(self, pieces: Iterable[Tensor], tiling: Tiling) -> Iterator[Tensor]: ...


class Causal(NamedTuple):
    """A network whose output up to a frame depends on frames up to it. It keeps what it has to know of the past in a `Past`.

    Memory of a stream is that of one piece.
    """

    run: Run

    def once(self, x: Tensor, tiling: Tiling) -> Tensor:
        return tiled(lambda part, _: self.run(part, None), x, *tiling)

    def stream(self, pieces: Iterable[Tensor], tiling: Tiling) -> Iterator[Tensor]:
        yield from stream(self.run, pieces, *tiling)


class AtOnce(NamedTuple):
    """A network that sees the future. Its stream waits for the whole clip: tiles alone bound its memory."""

    run: Run

    def once(self, x: Tensor, tiling: Tiling) -> Tensor:
        return tiled(lambda part, _: self.run(part, None), x, *tiling)

    def stream(self, pieces: Iterable[Tensor], tiling: Tiling) -> Iterator[Tensor]:
        if whole := list(pieces):
            with torch.no_grad():
                out = self.once(torch.cat(whole, dim=2), tiling)
            yield out


class Ahead(NamedTuple):
    """A network whose layers look a frame ahead each. Memory of a stream is that of one piece, and of what layers keep.

    whole   the network for a whole clip
    known   what it knows with a piece of a stream, which is the last of it or not; may be no frame
    """

    whole: Run
    known: Callable[[Tensor, Past, bool], Tensor]

    def once(self, x: Tensor, tiling: Tiling) -> Tensor:
        return tiled(lambda part, _: self.whole(part, None), x, *tiling)

    def stream(self, pieces: Iterable[Tensor], tiling: Tiling) -> Iterator[Tensor]:
        pasts: defaultdict[Box, Past] = defaultdict(Past)

        def part(piece: Tensor, last: bool) -> Tensor:
            with torch.no_grad():
                return tiled(lambda x, box: self.known(x, pasts[box], last), piece, *tiling)

        before: Tensor | None = None
        for piece in pieces:
            if before is not None:
                yield part(before, False)
            before = piece
        if before is not None:
            yield part(before, True)


class Windows(NamedTuple):
    """A network that is run on windows of a clip, each alone, as its library does by default.

    Windows of `size` begin every `step` inputs. All but the first lose their first output, which stands for a single frame;
    their next `blended` outputs are mixed with the last of the window before. `kept` of each are kept, and one more of the
    first. Memory of a stream is that of one window.
    """

    run: Run
    size: int
    step: int
    kept: int
    blended: int

    def once(self, x: Tensor, tiling: Tiling) -> Tensor:
        return torch.cat(list(self._parts([x], tiling)), dim=2)

    def stream(self, pieces: Iterable[Tensor], tiling: Tiling) -> Iterator[Tensor]:
        parts = self._parts(pieces, tiling)
        while True:
            with torch.no_grad():
                part = next(parts, None)
            if part is None:
                return
            yield part

    def _parts(self, pieces: Iterable[Tensor], tiling: Tiling) -> Iterator[Tensor]:
        held: Tensor | None = None
        before: Tensor | None = None

        def part() -> Tensor:
            """The outputs of the next window, which then gives way to the one after it."""
            nonlocal held, before
            assert held is not None
            out = tiled(lambda piece, _: self.run(piece, None), held[:, :, : self.size], *tiling)
            kept = self.kept if before is not None else self.kept + 1
            if before is not None:
                out = _blended(before, out[:, :, 1:], self.blended)
            held, before = held[:, :, self.step :], out
            return out[:, :, :kept]

        for piece in pieces:
            held = piece if held is None else torch.cat([held, piece], dim=2)
            while held.shape[2] >= self.size:
                yield part()
        # a window of a single frame has nothing but the first output
        while held is not None and held.shape[2] > (0 if before is None else 1):
            yield part()


def _blended(before: Tensor, after: Tensor, count: int) -> Tensor:
    """`after`, whose first `count` frames fade in over the last of `before`."""
    count = min(count, before.shape[2], after.shape[2])
    rise = (torch.arange(count, device=after.device) / count).to(after.dtype).view(-1, 1, 1)
    mixed = before[:, :, before.shape[2] - count :] * (1 - rise) + after[:, :, :count] * rise
    return torch.cat([mixed, after[:, :, count:]], dim=2)
