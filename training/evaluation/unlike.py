"""How unlike videos are that were made of one prompt with other seeds, as a figure with replicates."""

from collections import defaultdict

import torch
from torch import Tensor

from longtake.training.evaluation.material import Material
from longtake.training.evaluation.record import Pooled, Result, Unit
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.windows import drawn, listed, numbered, openings
from longtake.training.metrics.agreement import places
from longtake.training.metrics.diversity import Distance, mean_pairs, pairs

MOST, FRAMES = 16, 4  # videos of a prompt, and frames of each, at most
WITHOUT = "_without_prompts"  # the end of the figure's name where a model takes none


def unlike(subject: Subject, material: Material, figure: str, distance: Distance) -> Result:
    """The mean distance of two videos of one prompt, over the prompts; none where no prompt has two videos.

    Prompts are drawn for the replicates. Of videos without prompts it is that of any two, which is another figure, and they
    are drawn themselves.
    """
    suite, groups = material.suite, defaultdict[str | None, list[tuple[Unit, Tensor]]](list)
    for made, video in openings(material, subject):
        if len(groups[made.prompt]) < MOST:
            groups[made.prompt].append((made.unit, video[:, :, places(video.shape[2], FRAMES)]))
    several = {prompt: group for prompt, group in groups.items() if len(group) > 1}
    if not several:
        return Result(notes=["no prompt has two videos; give the suite prompts and two seeds, or more"])
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
    name = f"{figure}{WITHOUT}" if None in several else figure
    return Result(pooled={name: Pooled(float(values[0]), listed(values[1:]) if count > 1 else [], count)})
