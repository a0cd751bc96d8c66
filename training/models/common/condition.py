"""Conditions: what a model is asked to make, and how that is hidden in training for guidance."""

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
    """What the B samples of a batch are asked to be. None says nothing of any of them.

    classes   ids `(B,)` int64; -1 is no class
    text      embeddings of texts, `(B, N, D)`
    mask      `(B, N)` bool, which rows of `text` are of its words; a sample without any has no text
    """

    classes: Tensor | None = None
    text: Tensor | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.text is None) != (self.mask is None):
            raise ValueError("text and mask: give both or none")

    @property
    def asks(self) -> bool:
        """Whether it says anything of any sample: without, guidance has no effect."""
        classes = self.classes is not None and bool((self.classes != NO_CLASS).any())
        return classes or (self.mask is not None and bool(self.mask.any()))

    @property
    def null(self) -> Condition:
        """The same batch, of which nothing is said."""
        return self.hidden(torch.tensor(True))

    def hidden(self, which: Tensor) -> Condition:
        """The same without what is said of the samples where `which`, bool `(B,)` or `()`, is true."""
        classes, mask = self.classes, self.mask
        if classes is not None:
            classes = torch.where(which.to(classes.device), NO_CLASS, classes)
        if mask is not None:
            mask = mask & ~which.to(mask.device).reshape(-1, 1)
        return Condition(classes, self.text, mask)

    def expand(self, count: int) -> Condition:
        """The condition of one sample for `count` of them."""
        return Condition(*(None if part is None else part.expand(count, *part.shape[1:]) for part in self._parts()))

    def record(self) -> list[int] | dict[str, Any]:
        """What it says as plain data, which is equal where the condition is: the classes, with a digest of the texts."""
        classes = [] if self.classes is None else self.classes.tolist()
        if self.text is None or self.mask is None:
            return classes
        words = self.text.float() * self.mask[..., None]
        return {"classes": classes, "text": hashlib.sha256(words.cpu().contiguous().numpy().tobytes()).hexdigest()}

    def join(self, other: Condition) -> Condition:
        """The samples of this one and then of another, which says something of the same."""
        pairs = zip(self._parts(), other._parts(), strict=True)
        return Condition(*(None if one is None or two is None else torch.cat([one, two]) for one, two in pairs))

    def _parts(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.classes, self.text, self.mask


def of_batch(batch: Mapping[str, Any]) -> Condition:
    """What a loader's batch says of its windows: its labels, if it has them."""
    return Condition(classes=batch["label"].cpu() if "label" in batch else None)


def of_classes(ids: Iterable[int | None]) -> Condition:
    """The condition of samples by their class ids; None is no class."""
    return Condition(classes=torch.tensor([NO_CLASS if number is None else number for number in ids]))


def class_vectors(
    table: nn.Embedding | None,
    condition: Condition | None,
    x: Tensor,
    hidden: float = 0.0,
    rng: torch.Generator | None = None,
) -> Tensor | None:
    """Vectors `(B, D)` of a batch's classes, of which a random share is hidden; None of a model without classes.

    Args:
        table: a row a class and, last, one of no class.
        condition: of the batch `x`; None says nothing of it.
        rng: draws what is hidden, on the device of `x`.

    Raises:
        ValueError: a class that the model does not know; something else is asked for than a class.
    """
    condition = condition or Condition()
    classes = condition.classes
    if condition.text is not None:
        raise ValueError("text: this model takes none; leave it out")
    if table is None:
        if classes is not None:
            raise ValueError("classes: this model has none; leave them out")
        return None
    known = table.num_embeddings - 1
    if classes is None:
        classes = torch.full(x.shape[:1], NO_CLASS)
        hidden = 0.0
    if classes.shape != x.shape[:1]:
        raise ValueError(f"classes has shape {tuple(classes.shape)}; a batch of {x.shape[0]} needs one id each")
    check_classes(classes.tolist(), known)
    asked = Condition(classes.to(x.device))
    if hidden:
        asked = asked.hidden(torch.rand(classes.shape, generator=rng, device=x.device) < hidden)
    assert asked.classes is not None
    vectors: Tensor = table(torch.where(asked.classes == NO_CLASS, known, asked.classes))
    return vectors


def check_classes(classes: Sequence[int], known: int) -> None:
    """ValueError that names the first id that is neither -1 (no class) nor one of 0..known-1."""
    for c in classes:
        if not NO_CLASS <= c < known:
            has = f"classes 0 to {known - 1}, and {NO_CLASS} for none" if known else "no classes"
            raise ValueError(f"class {c} is out of range; this model has {has}")
