"""How well the frames of a video agree with texts, by vectors of one space as a dual encoder gives them."""

import torch
from torch import Tensor


def agreement(frames: Tensor, texts: Tensor, own: int) -> tuple[float, float]:
    """The mean cosine of frames and their own text, and 1 where no other text has a higher mean; where some are as high, a share.

    Args:
        frames, texts: vectors (T, D) and (P, D) of length 1.
        own: number of their own text.
    """
    means = (texts.double() @ frames.double().T).mean(1)
    highest = means >= means.max() - 1e-12
    return float(means[own]), float(highest[own]) / int(highest.sum())


def places(count: int, frames: int) -> list[int]:
    """Numbers of up to `frames` frames of a video of `count`, spread evenly from the first to the last."""
    return torch.linspace(0, count - 1, min(frames, count)).round().long().tolist()
