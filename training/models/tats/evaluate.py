"""How well a TATS has learned the tokens of videos: its loss on held-out windows, and the videos that it generates."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.training.metrics.share import place, united
from longtake.training.metrics.trivial import Against, comparisons
from longtake.training.models.common.condition import Condition
from longtake.training.models.tats.generated import VideoPlan, generated
from longtake.training.models.tats.gpt import TATS

SUMMARY = "drawn.json"

_AGAINST = (
    Against("held-out loss", "heldout_loss", "how often each code occurs", "heldout_loss_codes", "nats", False),
    Against("share of tokens foretold", "accuracy", "the token before it in time", "accuracy_copy", ""),
    Against("share of later chunks with the class of their first", "ccs", "that between videos", "ccs_chance", ""),
)


@torch.no_grad()
def heldout_loss(model: TATS, batch: Mapping[str, Any], condition: Condition | None) -> tuple[Tensor, Tensor]:
    """The loss in nats of each predicted token of held-out windows, and whether it is the likeliest: `(B, frames, h w)`."""
    config = model.config
    sequence = config.sequence(batch["tokens"].to(model.places.device))
    logits = model(sequence[:, :-1], condition, last=config.predicted).float()
    targets = sequence[:, -config.predicted :]
    losses = F.cross_entropy(logits.movedim(-1, 1), targets, reduction="none")
    right = logits.argmax(-1) == targets
    return losses.unflatten(1, (-1, config.cells)), right.unflatten(1, (-1, config.cells))


def by_frequency(model: TATS, tokens: Tensor, counts: np.ndarray) -> Tensor:
    """The loss of each predicted token of who knows only how often each code occurs, and adds one to that: as `heldout_loss`."""
    config, seen = model.config, torch.from_numpy(counts).double() + 1
    targets = config.sequence(tokens)[:, -config.predicted :]
    return (seen / seen.sum()).log().neg()[targets].unflatten(1, (-1, config.cells))


def copied(model: TATS, tokens: Tensor) -> Tensor:
    """Whether each predicted token is that of its cell in the latest frame before it that is given or made: as `heldout_loss`."""
    order, given = model.config.order, model.config.given
    right = []
    for place_, frame in enumerate(order[given:], given):
        before = max((other for other in order[:place_] if other < frame), default=None)
        same = torch.zeros_like(tokens[:, 0]) if before is None else tokens[:, before] == tokens[:, frame]
        right.append(same.flatten(1).bool())
    return torch.stack(right, 1)


@torch.no_grad()
def evaluate(
    model: TATS,
    windows: Iterable[tuple[int, Mapping[str, Any], Condition | None]],
    folder: Path,
    *,
    counts: np.ndarray,
    seed: int,
    plan: VideoPlan | None,
) -> dict[str, Any]:
    """Measure held-out windows and generate videos: NAME.mp4 in `folder`, all figures in `drawn.json`.

    `heldout_loss` is in nats a token, `heldout_perplexity` its exponential; beside them the loss of knowing only how often
    each code occurs in training. `accuracy` is the share of tokens that are the likeliest, in
    frames that have one before them, and `accuracy_copy` that of repeating it. Every rank of the process group calls it, with
    its share of the windows. What is measured of the videos, see `generated.generated`.

    Args:
        windows: number, batch of one, condition.
        counts: how often each code occurs in the train split.
        plan: of the videos; None for a model that makes no whole ones.

    Raises:
        UserError: too few videos for a distance.
    """
    config, rows = model.config, dict[int, dict[str, list[float]]]()
    for number, batch, condition in windows:
        losses, right = heldout_loss(model, batch, condition)
        tokens = batch["tokens"].cpu()
        rows[number] = {
            "loss": losses[0].mean(1).tolist(),
            "codes": by_frequency(model, tokens, counts)[0].mean(1).tolist(),
            "right": right[0].float().mean(1).tolist(),
            "copied": copied(model, tokens)[0].float().mean(1).tolist(),
        }
    table = {
        name: np.array([row[name] for row in united(rows).values()]) for name in ("loss", "codes", "right", "copied")
    }
    later = 0 if config.given else 1  # the first frame has none before it
    loss, frames = float(table["loss"].mean()), config.order[config.given :]
    summary: dict[str, Any] = {
        "heldout_loss": loss,
        "heldout_perplexity": math.exp(min(loss, 50.0)),
        "heldout_loss_codes": float(table["codes"].mean()),
        "accuracy": _mean(table["right"][:, later:]),
        "accuracy_copy": _mean(table["copied"][:, later:]),
        "clips": len(table["loss"]),
        "split": "val",
        "seed": seed,
        "series": {"heldout_loss_by_step": list(zip(frames, table["loss"].mean(0).tolist(), strict=True))},
    }
    entries = list[dict[str, Any]]()
    if plan:
        entries, figures = generated(plan, folder)
        summary |= figures | {"series": summary["series"] | figures["series"]}
    summary["against"] = comparisons(_AGAINST, summary)
    if place()[0] == 0:
        (folder / SUMMARY).write_text(json.dumps({"summary": summary, "videos": entries}, indent=2))
    return summary


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None
