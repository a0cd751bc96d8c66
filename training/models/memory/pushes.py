"""A film as it grows: the frames of the next latent, and the latent of the next frames, one at a time."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from longtake.training.models.common.codec import Codec

Push = Callable[[Tensor], Tensor]
_Output = TypeVar("_Output")
_CONTEXT = 4  # latents that a codec whose streams wait is given again: with the new one, a window of HunyuanVideo's


def pushes_of(vae: Codec, tile: int | None) -> tuple[Push, Push]:
    """What decodes the next latent `(B, C, 1, h, w)`, and what encodes its frames, as the mean.

    Args:
        tile: pixels a side; decode larger frames in overlapping tiles.
    """
    # of codecs of other libraries some wait for what comes later
    if not getattr(vae, "immediate", True):
        return _anew(vae, tile)
    posterior = _kept_open(lambda video: vae.encode_stream(video, 1))
    return _kept_open(lambda latents: vae.decode_stream(latents, 1, tile)), lambda video: posterior(video).mode()


def _anew(vae: Codec, tile: int | None) -> tuple[Push, Push]:
    """By the last few latents, or their frames, again each time."""
    factor, latents, frames = vae.config.temporal_stride, list[Tensor](), list[Tensor]()

    def decode(latent: Tensor) -> Tensor:
        latents[:] = [*latents[-_CONTEXT:], latent]
        video = torch.cat(list(vae.decode_stream([torch.cat(latents, dim=2)], tile=tile)), dim=2)
        return video if len(latents) == 1 else video[:, :, -factor:]

    def encode(video: Tensor) -> Tensor:
        frames[:] = [*frames[-_CONTEXT:], video]
        # what an encoder is given begins with a single frame
        frames[0] = frames[0][:, :, -1:]
        return [*vae.encode_stream(frames, 1)][-1].mode()

    return decode, encode


def _kept_open(stream_of: Callable[[Iterator[Tensor]], Iterator[_Output]]) -> Callable[[Tensor], _Output]:
    """A stream as a function of its next chunk, of which the stream must make one output, at once."""
    waiting: deque[Tensor] = deque()

    def chunks() -> Iterator[Tensor]:
        while True:
            yield waiting.popleft()

    outputs = stream_of(chunks())

    def push(chunk: Tensor) -> _Output:
        waiting.append(chunk)
        return next(outputs)

    return push
