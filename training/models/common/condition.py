"""Conditions of generation, and how training hides them for guidance."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NO_CLASS = -1  # the id of a sample without a class


@dataclass(frozen=True, eq=False)
class Condition:
    """The conditions of the B samples of a batch. A field of None is empty for all of them.

    classes   ids `(B,)` int64; -1 is no class
    text      embeddings of texts, `(B, N, D)`
    mask      `(B, N)` bool, True for rows of `text` that belong to words; a sample without any has no text
    """

    classes: Tensor | None = None
    text: Tensor | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.text is None) != (self.mask is None):
            raise ValueError("text and mask: give both or none")

    @property
    def asks(self) -> bool:
        """Whether any sample has a class or a text: if not, guidance has no effect."""
        classes = self.classes is not None and bool((self.classes != NO_CLASS).any())
        return classes or (self.mask is not None and bool(self.mask.any()))

    @property
    def null(self) -> Condition:
        """The same batch without any class or text."""
        return self.hidden(torch.tensor(True))

    def hidden(self, which: Tensor) -> Condition:
        """The same batch with the samples where `which`, bool `(B,)` or `()`, is true made unconditional."""
        classes, mask = self.classes, self.mask
        if classes is not None:
            classes = torch.where(which.to(classes.device), NO_CLASS, classes)
        if mask is not None:
            mask = mask & ~which.to(mask.device).reshape(-1, 1)
        return Condition(classes, self.text, mask)

    def expand(self, count: int) -> Condition:
        """The condition of one sample, repeated for `count` samples."""
        return Condition(*(None if part is None else part.expand(count, *part.shape[1:]) for part in self._parts()))

    def record(self) -> list[int] | dict[str, Any]:
        """The condition as plain data, for comparison: the classes, with a digest of the texts."""
        classes = [] if self.classes is None else self.classes.tolist()
        if self.text is None or self.mask is None:
            return classes
        words = self.text.float() * self.mask[..., None]
        return {"classes": classes, "text": hashlib.sha256(words.cpu().contiguous().numpy().tobytes()).hexdigest()}

    def join(self, other: Condition) -> Condition:
        """The samples of this condition followed by those of `other`, which has the same fields."""
        pairs = zip(self._parts(), other._parts(), strict=True)
        return Condition(*(None if one is None or two is None else torch.cat([one, two]) for one, two in pairs))

    def _parts(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.classes, self.text, self.mask


def of_batch(batch: Mapping[str, Any]) -> Condition:
    """The condition of a loader's batch: its labels, if it has them."""
    return Condition(classes=batch["label"].cpu() if "label" in batch else None)


def of_classes(ids: Iterable[int | None]) -> Condition:
    """The condition of samples with these class ids; None is no class."""
    return Condition(classes=torch.tensor([NO_CLASS if number is None else number for number in ids]))


def class_vectors(
    table: nn.Embedding | None,
    condition: Condition | None,
    x: Tensor,
    hidden: float = 0.0,
    rng: torch.Generator | None = None,
) -> Tensor | None:
    """Vectors `(B, D)` of a batch's classes, a random share of them hidden; None for a model without classes.

    Args:
        table: a row for each class and, last, one for no class.
        condition: of the batch `x`; None is an empty one.
        hidden: probability that a class is replaced by no class.
        rng: draws the hidden samples, on the device of `x`.

    Raises:
        ValueError: an unknown class; a condition other than a class.
    """
    condition = condition or Condition()
    classes = condition.classes
    if condition.text is not None:
        raise ValueError("text: this model takes none; leave it out")
    if table is None:
        if classes is not None:
            raise ValueError("classes: this model has none; leave them out")
        return None
    count = table.num_embeddings - 1
    if classes is None:
        classes = torch.full(x.shape[:1], NO_CLASS)
        hidden = 0.0
    if classes.shape != x.shape[:1]:
        raise ValueError(f"classes has shape {tuple(classes.shape)}; a batch of {x.shape[0]} needs one id each")
    check_classes(classes.tolist(), count)
    classes = classes.to(x.device)
    if hidden:
        classes = torch.where(torch.rand(classes.shape, generator=rng, device=x.device) < hidden, NO_CLASS, classes)
    vectors: Tensor = table(torch.where(classes == NO_CLASS, count, classes))
    return vectors


def check_classes(classes: Sequence[int], count: int) -> None:
    """Raise a ValueError that names the first id that is neither -1 (no class) nor one of 0..count-1."""
    for c in classes:
        if not NO_CLASS <= c < count:
            has = f"classes 0 to {count - 1}, and {NO_CLASS} for none" if count else "no classes"
            raise ValueError(f"class {c} is out of range; this model has {has}")
