"""Low-rank changes of layers that diffusers has in parts and the authors of a model in one, and back."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtake.datasets.errors import Failure, UserError
from longtake.training.foreign import names


class Change(NamedTuple):
    """A change of one layer: `scale` times `up` (out, rank, ...) after `down` (rank, in, ...)."""

    down: Tensor
    up: Tensor
    scale: float = 1.0


def fused(changes: Mapping[str, Change], class_name: str, settings: Mapping[str, Any]) -> dict[str, Change]:
    """The changes of the authors' layers, of `changes` by names of diffusers.

    Of a layer that holds several of diffusers', the change is block-diagonal, of the sum of their ranks: exact.

    Raises UserError where there is no name for a layer that ComfyUI reads.
    """
    rows: dict[str, names.Layer] = {}
    for part in changes:
        row = names.by_part(class_name, part)
        if row is None:
            raise UserError(f"{part}: has no name in ComfyUI's layout of {class_name}; take --format peft")
        if row.native.startswith(names.RENAMED):
            raise UserError(
                f"{part}: ComfyUI gives this layer a name of its own, and would skip its change; take --format peft"
            )
        rows[row.native] = row
    fused = {}
    for native, row in rows.items():
        parts = [changes.get(part) for part in row.parts]
        present = [change for change in parts if change]
        if len(row.parts) == 1:
            down, up = present[0].down, present[0].up
            fused[native] = Change(down, _swapped(up) if row.swapped else up)
            continue
        width = present[0].down.shape[1]
        sizes = [width, width, width, int(width * settings.get("mlp_ratio", 4.0))]
        blocks = [
            change.up if change else present[0].up.new_zeros(size, 0)
            for change, size in zip(parts, sizes, strict=False)
        ]
        fused[native] = Change(torch.cat([change.down for change in present]), torch.block_diag(*blocks))
    return fused


def _swapped(up: Tensor) -> Tensor:
    return torch.cat(up.chunk(2)[::-1])


def split(where: str, layer: str, change: Change, class_name: str) -> dict[str, Change]:
    """The change of a layer by names of diffusers: as it is, or that of each part of one of the authors' layers.

    Raises Failure, which begins with `where`, if the rows of such a layer are not those of its parts.
    """
    row = names.by_native(class_name, layer) if not names.by_part(class_name, layer) else None
    if row is None:
        return {layer: change}
    if len(row.parts) == 1:
        return {row.parts[0]: change._replace(up=_swapped(change.up)) if row.swapped else change}
    width, height = change.down.shape[1], change.up.shape[0]
    sizes = [width] * 3 + [height - 3 * width] * (len(row.parts) - 3)
    if sum(sizes) != height or min(sizes) < 1:
        raise Failure(f"{where}: {height} rows do not divide into {', '.join(row.parts)}; get it again")
    found = {}
    for part, up in zip(row.parts, change.up.split(sizes), strict=True):
        # of a block-diagonal change each part has its own share of the rank; one that has none does not change
        used = (up != 0).any(0)
        if used.any():
            found[part] = Change(change.down[used], up[:, used], change.scale)
    return found
