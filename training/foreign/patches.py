"""Videos as patches, as the autoencoders of Wan and LTX have them: within a patch the column comes before the row."""

from torch import Tensor

from longtake.training.models.common.causal import fold, unfold


def patches_of(video: Tensor, time: int, side: int) -> Tensor:
    """`(B, C, T * time, H * side, W * side)` -> `(B, C * time * side * side, T, H, W)`."""
    return _swapped(fold(video, time, side), side)


def video_of(patches: Tensor, time: int, side: int) -> Tensor:
    """The inverse of `patches_of`."""
    return unfold(_swapped(patches, side), time, side)


def _swapped(x: Tensor, side: int) -> Tensor:
    """Channels by (row, column) in a patch as channels by (column, row), or back."""
    return x.unflatten(1, (-1, side, side)).transpose(2, 3).flatten(1, 3)
