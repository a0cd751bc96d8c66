"""The frozen encoder of live latents, and the batches that it completes."""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtake.datasets.encoding import posteriors
from longtake.datasets.errors import Failure
from longtake.datasets.latents import encoder_digest
from longtake.datasets.loader import Loader, to_model
from longtake.datasets.loader.live import Live
from longtake.training.engines import device
from longtake.training.models.common.codec import load_codec
from longtake.training.objective import ON_HOST, Batch


@lru_cache(maxsize=2)
def frozen(uri: str, precision: str) -> tuple[Any, str]:
    """The model that encodes, frozen, on this rank's device, and its digest; one for all loaders of a process.

    Raises as `load_codec`.
    """
    codec = load_codec(uri).eval().requires_grad_(False)
    digest = encoder_digest(codec)  # of the weights as they are stored
    return codec.to(device(), torch.bfloat16 if precision == "bf16" else torch.float32), digest


class _Pending(NamedTuple):
    """A batch whose latents are being encoded; `finite` says of each sample whether all its latents are finite."""

    batch: Batch
    finite: Tensor
    done: Any  # a CUDA event, None elsewhere


class LiveLoader(Loader):
    """A loader of live latents: its batches are those of a cached column, on this rank's device.

    On a GPU the next batch is encoded on a stream of its own while a step runs; elsewhere each when it is taken.

    Args:
        uri: of the encoder.
        batch_of: windows that are encoded together, at most.
        ahead: batches that are encoded before they are taken; None: 1 on a GPU, else 0.
        options: of `Loader`.
    """

    def __init__(
        self, uri: str, batch_of: int, *args: Any, live: Mapping[str, Live], ahead: int | None = None, **options: Any
    ) -> None:
        super().__init__(*args, live=live, **options)
        self._uri, self._batch_of = uri, batch_of
        plan: Any = self.plan
        self._live = {name: live[column] for name, column in plan.split.names.items() if column in live}
        on_gpu = device().type == "cuda"
        self._side = torch.cuda.Stream() if on_gpu else None
        self._ahead = int(on_gpu) if ahead is None else ahead
        self._waiting: deque[_Pending] = deque()

    def __iter__(self) -> Iterator[Batch]:
        self._state, self._waiting = self.state_dict(), deque()
        for batch in super().__iter__():
            self._waiting.append(self._begin(batch))
            if len(self._waiting) > self._ahead:
                yield self._end(self._waiting.popleft())
        while self._waiting:
            yield self._end(self._waiting.popleft())

    def at(self, numbers: Iterable[int]) -> Iterator[Batch]:
        for batch in super().at(numbers):
            yield self._end(self._begin(batch))

    def state_dict(self) -> dict[str, Any]:
        # batches that wait were taken of the loader, and by nobody of this
        state = super().state_dict()
        return state | {"taken": state["taken"] - len(self._waiting)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._waiting = deque()
        super().load_state_dict(state)

    def _begin(self, batch: Batch) -> _Pending:
        """Start to encode the latents of a batch."""
        videos = batch.pop("pixels")
        for name in [key for key in batch if key.removeprefix("history_") in self._live]:
            batch[name] = batch[name].contiguous()
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream())
        with _explained(), torch.no_grad(), torch.cuda.stream(self._side) if self._side else nullcontext(), _exactly():
            batch |= {
                name: value.to(device(), non_blocking=True)
                for name, value in batch.items()
                if isinstance(value, Tensor) and name not in ON_HOST
            }
            finite = torch.ones(len(videos), dtype=torch.bool, device=device())
            for name, live in self._live.items():
                self._fill(batch, name, live, videos, finite)
            if self._side is None:
                return _Pending(batch, finite, None)
            said = torch.empty(len(videos), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._side)
        return _Pending(batch, said, done)

    def _end(self, pending: _Pending) -> Batch:
        """The batch, for the current stream. Raises Failure where latents are not finite."""
        batch, finite, done = pending
        if done is not None:
            # it was begun a step ago
            done.synchronize()
            for value in batch.values():
                if isinstance(value, Tensor) and value.is_cuda:
                    value.record_stream(torch.cuda.current_stream())
        if not finite.all():
            keys = ", ".join(key for key, good in zip(batch["key"], finite.tolist(), strict=True) if not good)
            live = next(iter(self._live.values())).settings
            remedy = "; try live.dtype: bfloat16" if live.dtype == "float16" else ""
            raise Failure(f"latents: those of {keys} are not finite in {live.dtype}{remedy}")
        return batch

    def _fill(self, batch: Batch, name: str, live: Live, videos: list[Tensor], finite: Tensor) -> None:
        """Put the latents of a column, and of its history, in their places."""
        alike = defaultdict(list)
        for number, video in enumerate(videos):
            alike[video.shape].append(number)
        length = batch[name].shape[3]
        for numbers in alike.values():
            for first in range(0, len(numbers), self._batch_of):
                group = numbers[first : first + self._batch_of]
                stream = self._encoded(live, [videos[number] for number in group])  # (b, 2, C, t, h, w)
                begin, past = stream.shape[3] - length, batch.get(f"history_{name}")
                count = 0 if past is None else min(begin, past.shape[3])
                # one by one: to index by a list of numbers makes the host wait for all that the GPU has to do
                for number, latents in zip(group, stream, strict=True):
                    finite[number] &= latents.isfinite().all()
                    batch[name][number] = latents[:, :, begin:]
                    if past is not None and count:
                        past[number, :, :, past.shape[3] - count :] = latents[:, :, begin - count : begin]

    def _encoded(self, live: Live, videos: list[Tensor]) -> Tensor:
        """Posteriors (b, 2, C, t, h, w) of streams of one shape, in the column's dtype."""
        encoder, settings = frozen(self._uri, live.settings.precision)[0], live.settings

        def chunks() -> Iterator[Tensor]:
            start, count = 0, 1
            while start < len(videos[0]):
                parts = [video[start : start + count].to(device(), non_blocking=True) for video in videos]
                yield to_model(torch.stack(parts).permute(0, 4, 1, 2, 3))
                start, count = start + count, settings.chunk * live.strides.factor

        parts = [rounded for _, rounded in posteriors(encoder, live.strides, chunks(), settings)]
        return torch.cat(parts, 1).permute(0, 2, 3, 1, 4, 5)


@contextmanager
def _explained() -> Iterator[None]:
    """Say what to lower where the encoder finds no memory."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        message = "out of memory while latents were encoded; lower live.batch or live.chunk, or set live.tile"
        raise Failure(f"latents: {message} ({' '.join(str(e).split())[:200]})") from e


@contextmanager
def _exactly() -> Iterator[None]:
    """Compute as `cache_latents` does: without TF32, always by the same algorithms.

    These are settings of the whole process, which a backward pass on other threads would see: so the thread that trains
    launches the encoder itself.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark = before
