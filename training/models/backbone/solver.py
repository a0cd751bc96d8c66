"""How a backbone's flow is followed from noise to data: the schedulers of its library, as its pipelines call them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.training.foreign.backbone import BackboneConfig
from longtake.training.foreign.library import class_of

SOLVERS = {"euler": "FlowMatchEulerDiscreteScheduler", "unipc": "UniPCMultistepScheduler"}
# what makes UniPC follow a flow, for a pipeline that has another scheduler
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def solver_of(scheduler: Mapping[str, Any]) -> Literal["euler", "unipc"]:
    """The solver of a pipeline's scheduler; `euler` for {}. UserError for a scheduler that is neither of the two."""
    name = scheduler.get("class_name", SOLVERS["euler"])
    if scheduler.get("stochastic_sampling"):
        raise UserError(f"scheduler: {name} with stochastic_sampling adds noise at each step; name a pipeline without")
    if name == SOLVERS["euler"]:
        return "euler"
    if name == SOLVERS["unipc"]:
        if not scheduler.get("use_flow_sigmas"):
            raise UserError(f"scheduler: {name} without use_flow_sigmas follows no flow; name a pipeline with it")
        if (kind := scheduler.get("prediction_type")) != _FLOW["prediction_type"]:
            raise UserError(f"scheduler: prediction_type is {str(kind)[:40]!r}; name a pipeline with flow_prediction")
        return "unipc"
    raise UserError(
        f"scheduler: {str(name)[:80]} is not known here; name a pipeline with {' or '.join(SOLVERS.values())}"
    )


def scheduler_for(
    config: BackboneConfig, solver: str, steps: int, shape: tuple[int, int, int], shift: float, device: torch.device
) -> Any:
    """A scheduler of diffusers whose times are set, for windows of latents (T, H, W) on a device.

    Its own settings hold where the pipeline's scheduler is of this class. Times are moved towards noise by `shift`; where
    the pipeline computes its shift from the number of tokens, by that.

    Raises:
        ValueError: fewer than one step.
        UserError: the scheduler's config is none.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; sampling needs at least 1")
    own, name = config.scheduler, SOLVERS[solver]
    same, dynamic = own.get("class_name") == name, bool(own.get("use_dynamic_shifting"))
    if dynamic:
        shift = config.shift_of(shape)
    settings = {key: value for key, value in own.items() if key != "class_name"} if same else {}
    options: dict[str, Any] = {}
    if same and dynamic:
        options["mu"] = shift if own.get("time_shift_type") == "linear" else math.log(shift)
    else:
        settings |= {"shift": shift} if solver == "euler" else {"flow_shift": shift}
    if solver == "unipc" and not same:
        settings |= _FLOW
    if solver == "euler" and (config.row.EVEN_TIMES or not same):
        options["sigmas"] = np.linspace(1.0, 0.0, steps + 1)[:-1]
    make = class_of(name)
    try:
        scheduler = make.from_config(settings)
        # times stay on the host, which would wait for each of them
        scheduler.set_timesteps(steps, **options)
    # diffusers raises all of these for settings that it does not know or has not written
    except (TypeError, ValueError, NotImplementedError, ArithmeticError, AttributeError) as e:
        why = " ".join(str(e).split())[:120]
        raise UserError(f"scheduler: {name} cannot be set up ({why}); name a pipeline with another") from e
    scheduler.set_begin_index(0)
    # UniPC copies each level of noise to the latents' device otherwise. Of its steps those that solve a system of several
    # equations still wait once, to see whether it could be solved: little beside the passes of a step
    if solver == "unipc":
        scheduler.sigmas = scheduler.sigmas.to(device)
    return scheduler


@torch.no_grad()
def follow(
    velocity: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    scheduler: Any,
    each_step: Callable[[], object] | None = None,
) -> Tensor:
    """The latents that a scheduler makes of noise by a velocity, which is called with the time, 0 to 1: fp32."""
    x, scale = noise.float(), scheduler.config.num_train_timesteps
    for time in scheduler.timesteps:
        x = scheduler.step(velocity(x, float(time) / scale).float(), time, x, return_dict=False)[0]
        if each_step:
            each_step()
    return x
