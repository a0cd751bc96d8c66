"""Muon (https://kellerjordan.github.io/posts/muon/) for the matrices of a model's blocks, AdamW for all else.

Muon moves a matrix by the nearest orthogonal one to its momentum, scaled so that rates and weight decay of AdamW suit it too
(arXiv 2502.16982). It keeps one state of a weight where AdamW keeps two.

Given up: ZeRO. It cuts weights into flat pieces, which are no matrices; DeepSpeed's own Muon orthogonalises before it clips,
which is another optimizer than without ZeRO.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from longtake.datasets.errors import UserError


def matrices_of(module: nn.Module) -> list[nn.Parameter]:
    """The weights of linear layers inside of the module's `blocks()` that take gradients; none of a module without blocks."""
    blocks: Any = getattr(module, "blocks", None)
    layers = [layer for block in (blocks() if callable(blocks) else ()) for layer in block.modules()]
    weights: dict[int, Any] = {id(layer.weight): layer.weight for layer in layers if isinstance(layer, nn.Linear)}
    return [weight for weight in weights.values() if weight.requires_grad]


def check_matrices(module: nn.Module) -> None:
    """UserError where Muon has nothing to do."""
    if not matrices_of(module):
        raise UserError(
            "optimizer: muon is for the linear layers of a model's blocks, of which none learn here; use adamw"
        )


class Muon(torch.optim.Optimizer):
    """Muon for parameter groups that say `matrices: True`, AdamW for the others; state and groups as one optimizer's."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], fused: bool | None
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "matrices": False})
        self._parts: dict[bool, torch.optim.Optimizer] = {
            True: torch.optim.Muon([torch.empty(1, 1)], lr=lr, adjust_lr_fn="match_rms_adamw"),
            False: torch.optim.AdamW([torch.empty(1)], lr=lr, betas=betas, fused=fused),
        }
        for group in self.param_groups:
            defaults = self._parts[group["matrices"]].defaults
            group.update({name: value for name, value in defaults.items() if name not in group})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the weights that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for matrices, part in self._parts.items():
            # a state that was loaded comes in new objects
            part.param_groups = [group for group in self.param_groups if group["matrices"] == matrices]
            part.state = self.state
            part.step()
        return loss
