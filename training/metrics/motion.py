"""Where pixels go: flow and tracks computed from the frames alone, as targets of the probes.

The ground truth of generated footage says how far the picture moves, not where to, so both come from a plain method:
exhaustive block matching, refined below a pixel. It is our own: OpenCV would be one more dependency for this function
alone, and a flow network would need weights. Known limits: motion beyond `radius` and within flat areas is not
seen (the latter gives 0), occlusions are not marked, the refinement is off by some hundredths of a pixel also where
nothing moves, and errors add up along a track.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

_TIE = 1e-4  # of cost for a pixel of displacement: flat areas stay where they are


@dataclass(frozen=True)
class Matching:
    """The settings of block matching, in pixels; the values are ours."""

    radius: int = 4  # largest displacement from frame to frame, in x and in y
    window: int = 9  # side of the square compared, odd


def dense_flow(first: Tensor, second: Tensor, matching: Matching = Matching()) -> Tensor:
    """Displacement (x, y) in pixels of each pixel of `first` on its way to `second`: (N, 3, H, W) twice -> (N, 2, H, W).

    The displacement with the smallest mean squared difference over a window, and the vertex of the parabola through
    it and its two neighbours in x, then in y. The border is repeated outside the picture.
    """
    radius, window = matching.radius, matching.window
    if radius < 1 or window < 1 or not window % 2:
        raise ValueError(f"matching: radius {radius} must be at least 1 and window {window} odd")
    height, width = first.shape[-2:]
    padded = F.pad(second.float(), (radius + 1,) * 4, mode="replicate")
    moves = range(-radius - 1, radius + 2)  # one more on each side, for the parabola
    shifted = [[padded[..., y : y + height, x : x + width] for x in range(len(moves))] for y in range(len(moves))]
    costs = torch.stack([torch.stack([_blurred(first, s, window) for s in row], 1) for row in shifted], 1)  # N y x H W
    lengths = torch.tensor([[(x * x + y * y) ** 0.5 for x in moves] for y in moves], device=costs.device)
    inner = (costs + _TIE * lengths[..., None, None])[:, 1:-1, 1:-1].flatten(1, 2)
    best = inner.argmin(1, keepdim=True)
    side = 2 * radius + 1
    row, column = best // side + 1, best % side + 1
    flat, line = costs.flatten(1, 2), len(moves)
    index = row * line + column
    middle = flat.gather(1, index)
    y = row - radius - 1 + _vertex(flat.gather(1, index - line), middle, flat.gather(1, index + line))
    x = column - radius - 1 + _vertex(flat.gather(1, index - 1), middle, flat.gather(1, index + 1))
    return torch.cat([x, y], 1)


def flow_targets(video: Tensor, latents: int, grid: tuple[int, int], matching: Matching = Matching()) -> Tensor:
    """Mean flow of each cell from the last frame that a latent covers to the next frame, in pixels.

    Args:
        video: (N, 3, T, H, W) in [-1, 1]; latent i covers frames up to i (T-1)/(latents-1), as of a causal autoencoder.
        grid: (h, w) of the features; both divide H and W.

    Returns:
        (N, 2, latents', h, w), (x, y); the last latent is left out: there is no next frame.
    """
    ends = frames_of_latents(video.shape[2], latents)[:-1]
    pairs = [(video[:, :, end], video[:, :, end + 1]) for end in ends]
    return torch.stack([pooled(dense_flow(a, b, matching), grid) for a, b in pairs], 2)


def next_frame_targets(video: Tensor, latents: int, grid: tuple[int, int]) -> Tensor:
    """The frame after the last one that a latent covers, averaged over each cell: (N, 3, latents', h, w) in [-1, 1].

    Arguments as of `flow_targets`; the last latent is left out.
    """
    ends = frames_of_latents(video.shape[2], latents)[:-1]
    return torch.stack([pooled(video[:, :, end + 1].float(), grid) for end in ends], 2)


def track_targets(video: Tensor, latents: int, grid: tuple[int, int], matching: Matching = Matching()) -> Tensor:
    """How far the point at the centre of each cell moves until the next latent: (N, 2, latents', h, w), in pixels.

    Dense flow is chained over the frames between, read bilinearly. Arguments as of `flow_targets`.
    """
    ends = frames_of_latents(video.shape[2], latents)
    start = cell_centres(grid, video.shape[-2:], video.device).expand(len(video), -1, -1, -1)
    moves = []
    for first, last in pairwise(ends):
        points = start
        for frame in range(first, last):
            points = points + sampled(dense_flow(video[:, :, frame], video[:, :, frame + 1], matching), points)
        moves.append(points - start)
    return torch.stack(moves, 2)


def follow(moves: Tensor, size: tuple[int, int]) -> Tensor:
    """Points that start at the cell centres and are carried by a field of `track_targets`' kind.

    Args:
        moves: (N, 2, S, h, w) in pixels; size: (H, W) of the video.

    Returns:
        (N, 2, S + 1, h, w): where the points are at each latent, in pixels, (x, y) with pixel centres at n + 0.5.
    """
    grid = (moves.shape[-2], moves.shape[-1])
    points = [cell_centres(grid, size, moves.device).expand(len(moves), -1, -1, -1).to(moves.dtype)]
    scale = moves.new_tensor([grid[1] / size[1], grid[0] / size[0]])[:, None, None]
    for move in moves.unbind(2):
        points.append(points[-1] + sampled(move, points[-1] * scale))
    return torch.stack(points, 2)


def frames_of_latents(frames: int, latents: int) -> list[int]:
    """The last frame that each latent covers: [0, r, 2r, ...]; ValueError where frames is not 1 + r(latents - 1)."""
    if latents < 2 or frames <= 1 or (frames - 1) % (latents - 1):
        raise ValueError(
            f"{latents} latents do not fit {frames} frames: frames must be 1 + r(latents - 1), 2 latents or more"
        )
    return list(range(0, frames, (frames - 1) // (latents - 1)))


def cell_centres(grid: tuple[int, int], size: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """(1, 2, h, w): (x, y) in pixels of the centre of each cell."""
    y = (torch.arange(grid[0], device=device) + 0.5) * (size[0] / grid[0])
    x = (torch.arange(grid[1], device=device) + 0.5) * (size[1] / grid[1])
    return torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1])[None]


def sampled(field: Tensor, points: Tensor) -> Tensor:
    """A field (N, C, H, W) read bilinearly at points (N, 2, h, w) in its own pixels; the border is repeated outside."""
    scale = points.new_tensor([2 / field.shape[-1], 2 / field.shape[-2]])
    where = points.movedim(1, -1) * scale - 1
    return F.grid_sample(field, where.to(field.dtype), padding_mode="border", align_corners=False)


def pooled(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean over each cell: (N, C, H, W) -> (N, C, h, w); ValueError where the grid does not divide H and W."""
    height, width = x.shape[-2:]
    if height % grid[0] or width % grid[1]:
        raise ValueError(f"a grid of {grid[0]}x{grid[1]} does not divide frames of {height}x{width}")
    return F.avg_pool2d(x, (height // grid[0], width // grid[1]))


def _blurred(first: Tensor, second: Tensor, window: int) -> Tensor:
    error = (first.float() - second).square().mean(1, keepdim=True)
    for shape in ((window, 1), (1, window)):
        error = F.avg_pool2d(error, shape, 1, (shape[0] // 2, shape[1] // 2), count_include_pad=False)
    return error[:, 0]


def _vertex(before: Tensor, middle: Tensor, after: Tensor) -> Tensor:
    """Where the parabola through three equidistant costs is lowest, within half a step of the middle one."""
    bend = before - 2 * middle + after
    return torch.where(bend > 1e-12, (before - after) / (2 * bend.clamp_min(1e-12)), 0).clamp(-0.5, 0.5)
