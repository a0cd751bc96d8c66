"""Conditions of a model: class ids, the id of no class, and what is hidden of them in training, for guidance."""

from collections.abc import Sequence

import torch
from torch import Tensor

NO_CLASS = -1  # the id of a sample that is of no class


def class_rows(
    classes: Tensor | None, x: Tensor, known: int, hidden: float = 0.0, rng: torch.Generator | None = None
) -> Tensor:
    """Rows `(B,)` of an embedding of `known` classes whose last row is no class, a share `hidden` of them hidden.

    ValueError for another shape than `(B,)`, or a class that is not known.
    """
    if classes is None:
        return torch.full((x.shape[0],), known, device=x.device)
    if classes.shape != x.shape[:1]:
        raise ValueError(f"classes has shape {tuple(classes.shape)}; a batch of {x.shape[0]} needs one id each")
    check_classes(classes.tolist(), known)
    rows = torch.where(classes == NO_CLASS, known, classes).to(x.device)
    if hidden:
        hide = torch.rand(rows.shape, generator=rng, device=x.device) < hidden
        rows = torch.where(hide, known, rows)
    return rows


def check_classes(classes: Sequence[int], known: int) -> None:
    """ValueError that names the first id that is neither -1 (no class) nor one of 0..known-1."""
    for c in classes:
        if not NO_CLASS <= c < known:
            has = f"classes 0 to {known - 1}, and {NO_CLASS} for none" if known else "no classes"
            raise ValueError(f"class {c} is out of range; this model has {has}")
