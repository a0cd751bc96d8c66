"""How often a step makes the host wait for the device, counted in real trainings, with DeepSpeed's own updates.

On a CPU nothing waits, so what would wait for a GPU is counted: to read a tensor's values, and to copy a number to it.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
READS = {_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.equal}
COPIES = ("tolist", "cpu", "numpy")


class Reads(TorchDispatchMode):
    """Counts operations whose result the host must know."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "_overloadpacket", None) in READS and not _counting_steps():
            self.counts["read"] += 1
        return func(*args, **(kwargs or {}))


def _counting_steps() -> bool:
    """Whether AdamW reads a number of steps, which is on the host where it is not fused."""
    frame: Any = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.endswith("torch/optim/adam.py"):
        frame = frame.f_back
    return frame is not None


class Copies(TorchFunctionMode):
    """Counts copies to the host, of which no operation is seen on a CPU, and numbers that are copied to a device."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if isinstance(args and args[0], Tensor):
            self.counts["copy"] += name in COPIES
        else:
            self.counts["number"] += func is torch.tensor and kwargs.get("device") is not None
        return func(*args, **kwargs)


class Counted(small.Rows):
    """Rows, with what has been counted in each step."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts, self.steps = counts, list[dict[str, int]]()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in super().__iter__():
            self.steps.append(dict(+self.counts))
            self.counts.clear()
            yield batch


def waits(folder: Path, **settings: Any) -> dict[str, int]:
    """What is counted in a step that logs nothing; all such steps must be alike."""
    # once the process group has chosen it
    from deepspeed.accelerator import get_accelerator

    counts = Counter[str]()
    rows = Counted(counts)
    # the first makes states, ZeRO-3 learns the order of weights in two, and the last logs
    with Copies(counts), Reads(counts), pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_accelerator(), "synchronize", lambda *_: counts.update(["synchronise"]))
        small.fit(folder, small.objective(), rows, steps=6, log_every=100, checkpoint_every=100, **settings)
    first, *others = rows.steps[3:]
    assert others and all(each == first for each in others), rows.steps
    return first


ONCE = {"copy": 1}  # what the loop asks all ranks


MODES = [(0, "fp32", 1.0), (0, "bf16", 1.0), (1, "fp32", 0.0), (1, "bf16", 1.0), (2, "bf16", 1.0)]


@pytest.mark.parametrize(("zero_stage", "precision", "clip"), MODES)
def test_a_step_with_a_fused_update_waits_once(
    tmp_path: Path, group: None, zero_stage: int, precision: str, clip: float
) -> None:
    settings = {"zero_stage": zero_stage, "precision": precision, "gradient_clip": clip, "ema_half_lives": [5]}
    assert waits(tmp_path, fused_optimizer=True, **settings) == ONCE


NOT_FUSED = {
    # whether the norm is finite
    (0, "fp32"): {"read": 1},
    # of each of four tensors whether it is finite, and its norm; whether any is not
    (0, "bf16"): {"read": 9},
    # of two groups of weights
    (1, "fp32"): {"read": 3, "number": 2},
    (1, "bf16"): {"read": 2, "number": 1},
    (2, "bf16"): {"read": 4, "number": 2},
}


@pytest.mark.parametrize(("zero_stage", "precision"), NOT_FUSED)
def test_an_update_that_is_not_fused_waits_as_often_as_it_did(
    tmp_path: Path, group: None, zero_stage: int, precision: str
) -> None:
    found = waits(tmp_path, fused_optimizer=False, zero_stage=zero_stage, precision=precision)
    assert found == ONCE | NOT_FUSED[zero_stage, precision]


@pytest.mark.parametrize("fused", [True, False])
def test_an_update_of_zero_3_waits_as_often_as_deepspeed_does(tmp_path: Path, group: None, fused: bool) -> None:
    # whether the norm is finite, and a number that is copied for each of two groups of weights
    found = waits(tmp_path, fused_optimizer=fused, zero_stage=3, precision="bf16")
    assert found == ONCE | {"read": 1, "number": 2}
