"""What the videos that a training generates are to show, so that samples of all its steps can be compared."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from longtake.datasets.loader import Loader
from longtake.training.models.common.condition import Condition, of_batch, of_classes


@dataclass(frozen=True)
class Wanted:
    """The condition of each generated video by its number: classes in turn, or what held-out clips say of themselves.

    classes   names of the model's classes
    clips     held-out clips one by one, the same each time, with `text`, `caption` and perhaps `label`, for a model of texts
    of        the condition of such a clip
    """

    classes: Sequence[str] = ()
    clips: Loader | None = None
    of: Callable[[Mapping[str, Any]], Condition] = of_batch

    def condition(self, numbers: Iterable[int]) -> Condition | None:
        """The conditions of videos; None for a model without any."""
        if self.clips is not None:
            return reduce(Condition.join, (self.of(self._clip(number)) for number in numbers))
        return of_classes(number % len(self.classes) for number in numbers) if self.classes else None

    def words(self, number: int) -> dict[str, str | None]:
        """The condition of a video for people to read: the name of its `class`, and its `prompt` for a model of texts."""
        if self.clips is None:
            return {"class": self.classes[number % len(self.classes)] if self.classes else None}
        clip = self._clip(number)
        label = int(clip["label"]) if "label" in clip else -1
        return {"class": self.classes[label] if label >= 0 else None, "prompt": clip["caption"][0]}

    def prompts(self, count: int) -> list[str]:
        """The prompts of the first videos, a line each; none for a model without text."""
        if self.clips is None:
            return []
        return [" ".join((self.words(number)["prompt"] or "no caption").split()) for number in range(count)]

    def _clip(self, number: int) -> dict[str, Any]:
        """The clip of a video; with more videos than clips they come again."""
        assert self.clips is not None
        return next(iter(self.clips.at([number % self.clips.samples])))
