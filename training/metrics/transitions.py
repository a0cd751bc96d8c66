"""How well a gap between two clips is filled: smoothness against the true frames, closeness, joints, diversity.

CLIP-RS (arXiv 2405.18003) compares how alike neighbouring frames are in what was made and in the truth, in an image
encoder's eyes; with which encoder and whether of its projected embeddings decides the numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.training.metrics.perceptual import Perceptual, lpips
from longtake.training.metrics.reconstruction import SSIM_REACH, psnr, ssim
from longtake.training.metrics.seams import apart, bends, changes, ratio

Embed = Callable[[Tensor], Tensor]  # frames (N, 3, H, W) in [-1, 1] -> projected embeddings (N, E)


def embedded(embed: Embed, video: Tensor) -> Tensor:
    """Embeddings of the frames of a video `(3, T, H, W)`: `(T, E)` of unit length, fp32."""
    return F.normalize(embed(video.transpose(0, 1)).float(), dim=1)


def clip_rs(made: Tensor, truth: Tensor) -> float:
    """The mean ratio, smaller to larger, of the similarities of neighbours in two gaps: 1 where they change alike.

    A similarity below 0 counts as 0, and two of 0 are alike [assumption]: the ratio of unlike signs says nothing.

    Args:
        made, truth: embeddings `(n + 2, E)` of a gap's frames and of those beside it, as `embedded` gives them.
    """
    _check(made, truth, 2)
    found, true = (F.cosine_similarity(each[:-1], each[1:], dim=1).clamp_min(0) for each in (made, truth))
    small, large = torch.minimum(found, true), torch.maximum(found, true)
    return float(torch.where(large > 0, small / large.clamp_min(1e-12), 1.0).mean())


def clip_rs_code(made: Tensor, truth: Tensor) -> float:
    """What the released code computes, for comparison only: similarities are over the tokens of a frame, one a channel.

    Not between -1 and 1: where two have unlike signs the ratio is negative, and where both are below 0 above 1.

    Args:
        made, truth: hidden states `(n + 2, K, E)` of the tokens of a gap's frames and of those beside it.
    """
    _check(made, truth, 3)
    found, true = (F.cosine_similarity(each[:-1], each[1:], dim=1) for each in (made, truth))
    return float((torch.minimum(found, true) / torch.maximum(found, true)).mean())


def middle(made: Tensor, truth: Tensor, perceptual: Perceptual | None = None) -> dict[str, float]:
    """PSNR, SSIM and LPIPS of a gap's frames alone, `(1, 3, n, H, W)` in [-1, 1], without those given.

    SSIM needs sides above 5 pixels, LPIPS a network; without, they are left out.
    """
    figures = {"psnr": float(psnr(made, truth))}
    if min(made.shape[-2:]) > SSIM_REACH:
        figures["ssim"] = float(ssim(made, truth))
    if perceptual:
        figures["lpips"] = float(lpips(perceptual, made, truth))
    return figures


def joints(video: Tensor, begin: int, length: int) -> dict[str, float | None]:
    """What is seen at both joints of a gap and elsewhere, `(1, 3, T, H, W)` with frames `begin` to `begin + length` made.

    Means of `seams.changes` and `seams.bends`, of which `with_ratios` makes figures: a gap in a still video has ratios
    beyond all measure, so that they are of means over videos.
    """
    found = dict[str, float | None]()
    for name, curve, reach in (("seam", changes(video), 1), ("bend", bends(video), 2)):
        found[f"{name}_at"], found[f"{name}_inside"] = apart(curve, [begin, begin + length], reach, reach)
    return found


def with_ratios(figures: Mapping[str, float], ways: Iterable[str]) -> dict[str, float]:
    """The figures with `seam_ratio` and `bend_ratio` in place of the means of `joints`, for each of these endings of names.

    A ratio of 1 is that of a joint like any other frame; where nothing moves elsewhere there is none.
    """
    found = dict(figures)
    for name in (f"{name}_{{}}{way}" for way in ways for name in ("seam", "bend")):
        at, inside = (found.pop(name.format(where), None) for where in ("at", "inside"))
        if at is not None and (value := ratio(at, inside)) is not None:
            found[name.format("ratio")] = value
    return found


def joint_error(made: Tensor, truth: Tensor) -> float:
    """The mean error of the change at both joints, in 0..1: that of the first and the last frame of a gap.

    `(1, 3, n, H, W)` in [-1, 1] each, without the frames beside the gap, which are the same in both.
    """
    return float((made[:, :, [0, -1]].float() - truth[:, :, [0, -1]].float()).abs().mean()) / 2


def closeness(made: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Mean |difference| of each frame of a gap to the frame beside the gap that is nearer, in 0..1.

    `(B, 3, n, H, W)` in [-1, 1], and the frames beside it `(B, 3, H, W)` -> `(B, n)`. The middle one of an odd gap has the
    smaller of both.
    """
    gaps = [(made - side[:, :, None]).abs().mean((1, 3, 4)) / 2 for side in (before, after)]
    count = made.shape[2]
    place = torch.arange(count, device=made.device)
    return torch.where(
        2 * place < count - 1, gaps[0], torch.where(2 * place > count - 1, gaps[1], torch.minimum(*gaps))
    )


def diversity(made: Tensor) -> Tensor:
    """How unlike gaps of several seeds are, frame by frame: `(S, 3, n, H, W)` in [-1, 1] -> `(n,)`, deviations in 0..1."""
    if len(made) < 2:
        raise ValueError(f"diversity needs gaps of two seeds at least, got {len(made)}")
    return made.float().std(0).mean((0, 2, 3)) / 2


def by_length(rows: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """The mean figures of gaps by their `length`; a figure that is None or missing in a row does not count there."""
    found = defaultdict[int, defaultdict[str, list[float]]](lambda: defaultdict(list))
    for row in rows:
        for name, value in row.items():
            if name != "length" and value is not None:
                found[int(row["length"])][name].append(float(value))
    return {
        length: {name: sum(values) / len(values) for name, values in figures.items()}
        for length, figures in sorted(found.items())
    }


def _check(made: Tensor, truth: Tensor, axes: int) -> None:
    if made.shape != truth.shape or made.ndim != axes or len(made) < 2:
        raise ValueError(
            f"CLIP-RS compares the same two frames or more with {axes} axes,"
            f" got {tuple(made.shape)} and {tuple(truth.shape)}"
        )
