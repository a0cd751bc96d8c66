"""Vectors of clips as means by unit, and figures of the mean over the units, with those of its resamples."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from longtake.training.evaluation import bootstrap
from longtake.training.evaluation.record import Pooled, Unit
from longtake.training.evaluation.suite import Suite

Vectors = np.ndarray[Any, Any]
Figure = Callable[[Vectors], Vectors]  # of mean vectors (N, D) -> (N,)

_AT_ONCE = 1 << 22  # numbers of resamples, for a bounded memory


class Means:
    """Vectors (D,) of clips, all of one D. A unit counts once, however many clips it has."""

    def __init__(self) -> None:
        self._rows = defaultdict[Unit, list[Vectors]](list)

    def add(self, unit: Unit, vector: Any) -> None:
        """Add a clip's vector (D,)."""
        self._rows[unit].append(np.asarray(vector, np.float64))

    def by_unit(self) -> dict[Unit, Vectors]:
        """The mean of each unit's clips, in order of the units."""
        return {unit: np.mean(rows, axis=0) for unit, rows in sorted(self._rows.items())}

    def mean(self) -> Vectors:
        """The mean over the units, (1, D)."""
        return np.mean(list(self.by_unit().values()), axis=0, keepdims=True)

    def pooled(self, suite: Suite, figures: Mapping[str, Figure]) -> dict[str, Pooled]:
        """Figures of the mean over the units, and of each resample of them."""
        by_unit = self.by_unit()
        rows = np.stack(list(by_unit.values()))
        draws = bootstrap.draws(len(rows), suite.resamples, suite.seed)
        counts = np.stack([np.bincount(draw, minlength=len(rows)) for draw in draws]) / draws.shape[1]
        parts = np.array_split(counts, max(1, counts.shape[0] * rows.shape[1] // _AT_ONCE))
        means = (part @ rows for part in parts)
        replicates = [[figure(mean) for figure in figures.values()] for mean in means]
        return {
            name: Pooled(float(figure(self.mean())[0]), np.concatenate(values).tolist(), len(rows))
            for (name, figure), values in zip(figures.items(), zip(*replicates, strict=True), strict=True)
        }


class Curve:
    """Values of clips by position, as `record.Result.curves` has them."""

    def __init__(self) -> None:
        self._values = defaultdict[float, defaultdict[Unit, list[float]]](lambda: defaultdict(list))

    def add(self, unit: Unit, points: Mapping[float, float]) -> None:
        """Add a clip's values by position, such as in seconds."""
        for position, value in points.items():
            self._values[round(position, 6)][unit].append(value)

    def by_unit(self) -> dict[float, dict[Unit, float]]:
        """By position, in order, and unit: the means over clips."""
        return {
            position: {unit: float(np.mean(values)) for unit, values in sorted(units.items())}
            for position, units in sorted(self._values.items())
        }
