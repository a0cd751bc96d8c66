"""What a model's features tell of motion: linear probes on them (PV-VAE, arXiv 2605.02134: flow, next frame, tracking).

A probe is one 1x1 linear head, fitted by ridge regression in closed form: no steps, no seed, the same result each
time. Each score stands beside `baseline`, that of always predicting the mean of the training targets. Which layer
the features are of, and the heads' exact form, are the caller's and our assumption [A]; the targets are motion.py's.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.training.metrics.distance import Moments, gathered_moments, merge, moments
from longtake.training.metrics.motion import flow_targets, follow, next_frame_targets, track_targets
from longtake.training.metrics.share import gathered, place, united
from longtake.training.metrics.trivial import Against

Pairs = Iterable[tuple[Tensor, Tensor]]
_TARGETS = (2, 3, 2)  # channels of flow, next frame and tracks
AGAINST = (
    Against("probe of flow", "probe_flow_epe", "the mean flow", "probe_flow_epe_baseline", "px", higher=False),
    Against("probe of the next frame", "probe_next_frame_psnr", "the mean colour", "probe_next_frame_psnr_baseline"),
    Against("probe of tracks", "probe_tracking_error", "the mean motion", "probe_tracking_error_baseline", "px", False),
)


@dataclass(frozen=True)
class Probe:
    """prediction = (features - features_mean) @ weights + targets_mean, float64: (C,), (C, K), (K,)."""

    features_mean: Tensor
    weights: Tensor
    targets_mean: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(N, C, t, h, w) -> (N, K, t, h, w)."""
        rows = features.double().movedim(1, -1) - self.features_mean
        return (rows @ self.weights + self.targets_mean).movedim(-1, 1)

    def mean(self, targets: Tensor) -> Tensor:
        """The mean of the training targets in the shape of these."""
        return self.targets_mean[:, None, None, None].expand_as(targets)


def fit_probe(train: Pairs, ridge: float = 1e-4) -> Probe:
    """Ridge regression of targets on features, at every latent and position alike.

    Args:
        train: features (N, C, t, h, w) and targets (N, K, t', h, w), t' <= t: latents without a target are left out.
        ridge: penalty of the squared weights, a share of the mean variance of the features; > 0.

    Raises:
        ValueError: no pairs; shapes that do not fit; features that never change.
    """
    total: Moments | None = None
    width = 0
    for features, targets in train:
        width = features.shape[1]
        part = moments_of(features, targets)
        total = part if total is None else merge([total, part])
    if total is None:
        raise ValueError("a probe needs training pairs")
    return solved(total, width, ridge)


def moments_of(features: Tensor, targets: Tensor) -> Moments:
    """Moments of features and targets side by side (C + K,), over all latents that have a target and all positions."""
    matched = _matched(features, targets)
    pairs = torch.cat([matched.double(), targets.to(matched.device).double()], 1)
    return moments(pairs.movedim(1, -1).flatten(0, -2))


def solved(total: Moments, width: int, ridge: float = 1e-4) -> Probe:
    """The probe on features of `width` channels that `moments_of` its training pairs give; as `fit_probe`."""
    if ridge <= 0:
        raise ValueError(f"ridge must be above 0, got {ridge}")
    inside, across = total.scatter[:width, :width], total.scatter[:width, width:]
    strength = ridge * inside.diagonal().mean()
    if not strength > 0:
        raise ValueError("the features never change: there is nothing to fit a probe to")
    weights = torch.linalg.solve(inside + strength * torch.eye(width).to(inside), across)
    return Probe(total.mean[:width], weights, total.mean[width:])


def scores(train: Pairs, heldout: Pairs) -> dict[str, float]:
    """All three probes on features (1, C, t, h, w), fitted to those of training videos (1, 3, T, H, W), scored on held-out ones.

    Each rank gives its share of both, which may be empty, and gets the scores over all of them. The held-out features are kept.

    Returns:
        `flow_epe`, `next_frame_psnr`, `tracking_error` and `tracking_within`, each also with `_baseline`.

    Raises:
        ValueError: what `fit_probe` and the targets refuse.
    """
    total, size = None, (0, 0)
    for features, video in train:
        part = moments_of(features, torch.cat(_targets(features, video), 1))
        total = part if total is None else merge([total, part])
    joint = gathered_moments(total)
    rows = list[tuple[Tensor, ...]]()
    for features, video in heldout:
        rows.append((features.cpu(), *(target.cpu() for target in _targets(features, video))))
        size = (video.shape[3], video.shape[4])
    rows = list(united(dict(enumerate(rows, place()[0] << 32))).values())
    height, width = (int(side) for side in gathered(torch.tensor([size])).amax(0))
    probe = solved(joint, len(joint.mean) - sum(_TARGETS))
    parts = [
        Probe(probe.features_mean, weights, mean)
        for weights, mean in zip(probe.weights.split(_TARGETS, 1), probe.targets_mean.split(_TARGETS), strict=True)
    ]
    flow, following, tracks = ([(row[0], row[1 + n]) for row in rows] for n in range(3))
    flow_errors, next_errors = flow_score(parts[0], flow), next_frame_score(parts[1], following)
    track_errors = tracking_score(parts[2], tracks, (height, width))
    return {
        "flow_epe": flow_errors["epe"],
        "flow_epe_baseline": flow_errors["baseline"],
        "next_frame_psnr": next_errors["psnr"],
        "next_frame_psnr_baseline": next_errors["baseline"],
        "tracking_error": track_errors["error"],
        "tracking_error_baseline": track_errors["error_baseline"],
        "tracking_within": track_errors["within"],
        "tracking_within_baseline": track_errors["within_baseline"],
    }


def _targets(features: Tensor, video: Tensor) -> list[Tensor]:
    latents, grid = features.shape[2], (features.shape[3], features.shape[4])
    return [target(video, latents, grid) for target in (flow_targets, next_frame_targets, track_targets)]


def flow_score(probe: Probe, heldout: Pairs) -> dict[str, float]:
    """End-point error in pixels, the mean over positions (Baker et al., IJCV 2011, §4.1), of targets by `flow_targets`.

    Returns:
        `epe` and `baseline`; lower is better.
    """
    errors = _means(probe, heldout, lambda prediction, target: (prediction - target).norm(dim=1))
    return {"epe": errors[0], "baseline": errors[1]}


def next_frame_score(probe: Probe, heldout: Pairs) -> dict[str, float]:
    """PSNR in dB (range 2) over all of the held-out cells together, of targets by `next_frame_targets`; at most 100.

    Returns:
        `psnr` and `baseline`; higher is better.
    """
    errors = _means(probe, heldout, lambda prediction, target: (prediction.clamp(-1, 1) - target).square())
    score, baseline = (-10 * math.log10(max(error / 4, 1e-10)) for error in errors)
    return {"psnr": score, "baseline": baseline}


def tracking_score(probe: Probe, heldout: Pairs, size: tuple[int, int], threshold: float = 4.0) -> dict[str, float]:
    """Points followed through the whole clip by the predicted field, against the same by the true one.

    The heads' targets are those of `track_targets`; points start at the cell centres. Counted are the latents after
    the first, as long as the true point has not left the picture. Errors in the manner of TAP-Vid (arXiv 2211.03726, §3.2).

    Args:
        size: (H, W) of the video, in pixels, as the targets are.
        threshold: in pixels.

    Returns:
        `error` in pixels (lower is better) and `within`, the share of points nearer than `threshold`, each with its
        baseline.
    """
    limit = torch.tensor([size[1], size[0]])
    sums = torch.zeros(2, 2, dtype=torch.float64)  # (error, within) by (probe, baseline)
    count = 0
    for features, targets in heldout:
        true = follow(targets.double(), size)
        inside = ((true >= 0) & (true <= limit.to(true)[:, None, None, None])).all(1)[:, 1:].cummin(1).values
        count += int(inside.sum())
        prediction = probe(_matched(features, targets))
        for index, field in enumerate((prediction, probe.mean(prediction))):
            error = (follow(field.to(true), size) - true).norm(dim=1)[:, 1:][inside]
            sums[0, index] += error.sum().cpu()
            sums[1, index] += (error < threshold).sum().cpu()
    if not count:
        raise ValueError("no point stays in the picture: there is nothing to score")
    (error, error_baseline), (within, within_baseline) = (sums / count).tolist()
    return {
        "error": error,
        "error_baseline": error_baseline,
        "within": within,
        "within_baseline": within_baseline,
        "threshold": threshold,
    }


def _means(probe: Probe, pairs: Pairs, error: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float]:
    """The mean error of the probe and of the training mean over all positions of all pairs."""
    sums, count = [0.0, 0.0], 0
    for features, targets in pairs:
        prediction = probe(_matched(features, targets))
        target = targets.to(prediction)
        errors = [error(prediction, target), error(probe.mean(prediction), target)]
        sums = [total + float(one.sum()) for total, one in zip(sums, errors, strict=True)]
        count += errors[0].numel()
    if not count:
        raise ValueError("a probe needs held-out pairs")
    return sums[0] / count, sums[1] / count


def _matched(features: Tensor, targets: Tensor) -> Tensor:
    """The features at the latents that have a target."""
    latents = targets.shape[2] if targets.ndim == 5 else 0
    matched = features[:, :, :latents] if features.ndim == 5 else features
    if not latents or matched.shape[:1] + matched.shape[2:] != targets.shape[:1] + targets.shape[2:]:
        raise ValueError(f"features {tuple(features.shape)} and targets {tuple(targets.shape)} do not fit each other")
    return matched
