"""How unlike videos are that were made of one prompt with other seeds, as a figure with replicates."""

from collections import defaultdict

import torch
from torch import Tensor

from longtake.training.evaluation.material import Material
from longtake.training.evaluation.record import Pooled, Unit
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.windows import drawn, listed, numbered, openings
from longtake.training.metrics.agreement import places
from longtake.training.metrics.diversity import Distance, mean_pairs, pairs

MOST, FRAMES = 16, 4  # videos of a prompt, and frames of each, at most


def unlike(subject: Subject, material: Material, distance: Distance) -> tuple[Pooled | None, list[str]]:
    """The mean distance of two videos of one prompt, over the prompts, and notes; None where no prompt has two videos.

    Prompts are drawn for the replicates. Videos without prompts are all of one, and they are drawn themselves.
    """
    suite, groups = material.suite, defaultdict[str | None, list[tuple[Unit, Tensor]]](list)
    for made, video in openings(material, subject):
        if len(groups[made.prompt]) < MOST:
            groups[made.prompt].append((made.unit, video[:, :, places(video.shape[2], FRAMES)]))
    several = {prompt: group for prompt, group in groups.items() if len(group) > 1}
    if not several:
        return None, ["no prompt has two videos; give the suite prompts and two seeds, or more"]
    units = [unit for group in several.values() for unit, _ in group]
    count, numbers = len(set(units)), numbered(units)
    times = drawn(count, suite.resamples, suite.seed)[:, numbers]
    ones, first = torch.ones(1, len(units), dtype=torch.float64), 0
    sums, weights = torch.zeros(1 + len(times), dtype=torch.float64), torch.zeros(1 + len(times), dtype=torch.float64)
    for group in several.values():
        of = torch.cat([ones, times])[:, first : first + len(group)]
        found = mean_pairs(pairs(torch.cat([video for _, video in group]), distance), of)
        # a resample without a prompt, or with one of its videos alone, says nothing about it
        weight = torch.where(found.isfinite(), of[:, 0] if len(several) > 1 else 1.0, 0.0)
        sums, weights, first = sums + found.nan_to_num() * weight, weights + weight, first + len(group)
    values = sums / weights
    notes = [] if None not in several else ["diversity is that of videos without a prompt, whatever their class"]
    return Pooled(float(values[0]), listed(values[1:]) if count > 1 else [], count), notes
