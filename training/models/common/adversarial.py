"""The adversarial part of any objective: a discriminator, and the weight of its loss for the generator.

A fixed weight suits only one scale of the other losses: beside a mean of squared errors 0.5 is hundreds of times too much.
So `lambda_gan` is multiplied by |gradient of the reconstruction| / |gradient of the GAN loss| (VQGAN, arXiv 2012.09841,
equation 7). Both gradients are taken at the generator's output, not at its last weights. So no ZeRO stage has to gather
weights, and the generator needs one backward pass.

A training continues the discriminator of its `parent`; a new discriminator first learns alone. At the end it is saved with
the run of its training, and never registered.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longtake.datasets.errors import Failure, UserError
from longtake.training import engines
from longtake.training.config import TrainConfig
from longtake.training.models.common import patchgan
from longtake.training.models.common.patchgan import PatchGAN, PatchGANConfig
from longtake.training.objective import Terms
from longtake.training.registry import fetch
from longtake.training.registry.uri import in_store

NAME = "discriminator"
FILE = f"{NAME}/{NAME}.safetensors"  # path in the artifacts of a run, or in a model folder
_GRADIENT_DECAY = 0.95  # of the averages of squared gradients, each pass
_LOGIT_DECAY = 0.99  # of the averages of logits, each pass [LeCam]
_MAX_RATIO = 10.0  # bounds the weight of a discriminator with tiny gradients
_HEADER_BYTES = 1 << 20  # bytes that a file may have beside its tensors


class GANConfig(TrainConfig):
    """How to train against a discriminator. Assumptions where nothing is noted.

    lambda_gan            weight of the adversarial loss; 0 trains no discriminator
    gan_weight            adaptive: lambda_gan |gradient of the reconstruction| / |gradient of the GAN loss| at the output;
                          fixed: lambda_gan as it is
    discriminator         a preset with fields of PatchGANConfig to change
    discriminator_lr      null is `lr`; its warm-up and schedule begin at gan_start
    discriminator_betas   of Adam [VQGAN]
    gan_start             step at which the discriminator begins to learn [paper]
    gan_warmup            steps for which it learns alone, those of its parent included
    lambda_lecam          weight of a term that bounds its logits when data are few, see `lecam`
    """

    lambda_gan: float = Field(0.5, ge=0)
    gan_weight: Literal["adaptive", "fixed"] = "adaptive"
    discriminator: dict[str, Any] = Field(default_factory=lambda: {"preset": "patchgan"})
    discriminator_lr: float | None = Field(None, gt=0)
    discriminator_betas: tuple[float, float] = (0.5, 0.9)
    gan_start: int = Field(5000, ge=0)
    gan_warmup: int = Field(1000, ge=0)
    lambda_lecam: float = Field(0.0, ge=0)

    @field_validator("discriminator")
    @classmethod
    def _valid_discriminator(cls, model: dict[str, Any]) -> dict[str, Any]:
        model_config_of(model)
        return model


def model_config_of(model: Mapping[str, Any]) -> PatchGANConfig:
    """The config for the setting `discriminator`. ValueError for an unknown preset or field."""
    return patchgan.config_from_preset(**({"preset": "patchgan"} | dict(model)))


def settings(config: GANConfig) -> TrainConfig:
    """The discriminator's own rate, betas and schedule."""
    changes = {"lr": config.discriminator_lr or config.lr, "betas": config.discriminator_betas}
    return config.model_copy(update=changes | {"steps": max(1, config.steps - config.gan_start)})


def begin(config: GANConfig, parent: str | None = None) -> tuple[PatchGAN, dict[str, Tensor]]:
    """A discriminator before its first step, the parent's if it fits, and the state for `Objective.state`.

    Every rank of a process group must call it; all get the same. With a `parent`, a line on stderr says whether its
    discriminator is used.
    """
    model = PatchGAN(model_config_of(config.discriminator)).to(engines.device())
    state = state_of(0)
    if parent is None:
        return model, state
    learned = state["gan_learned"].to(engines.device())
    if torch.distributed.get_rank() == 0:
        try:
            with tempfile.TemporaryDirectory() as scratch:
                learned.fill_(load(_file_of(parent, model, Path(scratch)), model))
            message = f"goes on with that of {parent}, which has learned {int(learned)} steps"
        except (UserError, Failure, ValueError) as e:
            message = f"begins anew ({str(e).splitlines()[0]})"
        print(f"discriminator: {message}", file=sys.stderr)
    # only rank 0 has fetched it
    for tensor in (learned, *model.state_dict().values()):
        torch.distributed.broadcast(tensor, src=0)
    state["gan_learned"].copy_(learned)
    return model, state


def state_of(learned: int) -> dict[str, Tensor]:
    """The state for `Objective.state` of a discriminator that has learned so many steps before."""
    return {
        "gan_learned": torch.full((1,), learned),
        "gan_squares": torch.zeros(2, device=engines.device()),  # averages of both squared gradients
        "gan_logits": torch.zeros(2, device=engines.device()),  # averages for real and generated videos
    }


def save(path: Path, config: GANConfig, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write the discriminator of a finished training, with its settings and how many steps it has learned."""
    learned = int(state["gan_learned"][0]) + max(0, config.steps - config.gan_start)
    content = {"config": _json_of(model_config_of(config.discriminator)), "learned": str(learned)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, path, content)


def load(path: Path, model: PatchGAN) -> int:
    """Put a saved discriminator's weights into `model`; returns how many steps it has learned.

    Raises:
        ValueError: it has other settings, or is damaged; then the model is unchanged.
    """
    state = model.state_dict()
    try:
        with safe_open(path, "pt") as file:
            content = file.metadata() or {}
            if content.get("config") != _json_of(model.config):
                raise ValueError(f"the parent's has other settings: {str(content.get('config'))[:200]}")
            if {name: file.get_slice(name).get_shape() for name in file.keys()} != {  # noqa: SIM118
                name: list(value.shape) for name, value in state.items()
            }:
                raise ValueError("the parent's is damaged: its tensors are not those of its settings")
            steps, weights = int(content["learned"]), {name: file.get_tensor(name) for name in state}
    except (SafetensorError, OSError, KeyError) as e:
        raise ValueError(f"the parent's is damaged: {str(e).splitlines()[0]}") from e
    model.load_state_dict(weights)
    return max(0, steps)


def _json_of(config: PatchGANConfig) -> str:
    return json.dumps(config.model_dump(mode="json"), sort_keys=True)


def _file_of(parent: str, model: PatchGAN, scratch: Path) -> Path:
    """The file of a parent's discriminator. Raises UserError or Failure if there is none or it cannot be fetched."""
    if not in_store(parent):
        path = Path(parent) / FILE
        if not path.is_file():
            raise UserError(f"{parent} has none")
        return path
    path = scratch / NAME
    max_bytes = sum(value.nbytes for value in model.state_dict().values()) + _HEADER_BYTES
    fetch.beside(parent, FILE, path, max_bytes)
    return path


def trains_generator(config: GANConfig, state: Mapping[str, Tensor], step: int) -> bool:
    """Whether the generator has a GAN loss at a step: not before the discriminator has learned for `gan_warmup` steps."""
    learned = step - config.gan_start
    return learned > 0 and int(state["gan_learned"]) + learned >= config.gan_warmup


def generator_loss(
    config: GANConfig,
    state: Mapping[str, Tensor],
    output: Tensor,
    reconstruction: Callable[[Tensor], tuple[Tensor, Terms]],
    discriminator: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Terms]:
    """All losses of a generator's output, and their terms with `gan_ratio` of the gradients and the `gan_weight` used.

    Every rank must call it. The returned loss has the right value and gradient, but is linear in the output.

    Args:
        output: of the generator, fp32, `(B, ...)`; the same B on each rank.
        reconstruction: all other losses of the output, as a mean over samples, and terms to log; called once.
        discriminator: frozen.
    """
    leaf = output.detach().requires_grad_()
    loss, terms = reconstruction(leaf)
    gan = patchgan.generator_loss(discriminator(leaf))
    loss_gradient, gan_gradient = (torch.autograd.grad(value, leaf)[0] for value in (loss, gan))

    ratio, smoothed = balance(state["gan_squares"], loss_gradient, gan_gradient)
    weight = config.lambda_gan * (smoothed if config.gan_weight == "adaptive" else torch.ones_like(smoothed))
    gradient = loss_gradient + weight * gan_gradient
    value = (loss + weight * gan).detach() + (gradient * (output - output.detach())).sum()
    return value, terms | {"gan": gan.detach(), "gan_ratio": ratio, "gan_weight": weight}


@torch.no_grad()
def balance(squares: Tensor, reconstruction: Tensor, adversarial: Tensor) -> tuple[Tensor, Tensor]:
    """|reconstruction| / |adversarial| of two gradients over all ranks' samples, and the smoothed ratio; both at most 10.

    The smoothed ratio is that of averaged squares. So the averages need no bias correction, and a gradient that jumps
    counts at once. Values that are not finite are not averaged.

    Args:
        squares: the averages, `(2,)`, updated in place.
    """
    now = torch.stack([reconstruction.square().sum(), adversarial.square().sum()])
    if (world := torch.distributed.get_world_size()) > 1:
        torch.distributed.all_reduce(now)
        # a rank's mean has `world` times the gradients of the mean over all
        now /= world**2
    _update(squares, now, _GRADIENT_DECAY)
    ratio, smoothed = (
        (a / b.clamp_min(torch.finfo(b.dtype).tiny)).sqrt().clamp(max=_MAX_RATIO) for a, b in (now, squares)
    )
    return ratio, smoothed


def discriminator_loss(
    config: GANConfig, state: Mapping[str, Tensor], engine: Callable[[Tensor], Tensor], real: Tensor, generated: Tensor
) -> tuple[Tensor, Terms]:
    """The discriminator's loss, and terms to log. Every rank must call it; `engine` is the discriminator's, called once."""
    # one call for both, since ZeRO allows one forward for each backward
    real_logits, generated_logits = engine(torch.cat([real, generated])).float().chunk(2)
    loss = patchgan.discriminator_loss(real_logits, generated_logits)
    logits = torch.stack([real_logits.detach().mean(), generated_logits.detach().mean()])
    terms = {"discriminator": loss.detach(), "judged_real": logits[0], "judged_made": logits[1]}
    if config.lambda_lecam:
        terms["lecam"] = lecam(real_logits, generated_logits, *state["gan_logits"].clone())
        loss = loss + config.lambda_lecam * terms["lecam"]
        terms["lecam"] = terms["lecam"].detach()
        now = logits.clone()
        if (world := torch.distributed.get_world_size()) > 1:
            torch.distributed.all_reduce(now)
            now /= world
        _update(state["gan_logits"], now, _LOGIT_DECAY)
    return loss, terms


def lecam(real: Tensor, generated: Tensor, mean_real: Tensor, mean_generated: Tensor) -> Tensor:
    """LeCam regularisation of logits (arXiv 2104.03310, with the hinge of its code), which draws both kinds together.

    Squares of how far real logits are above the average of generated ones, and generated ones below that of real ones.
    """
    return F.relu(real - mean_generated).square().mean() + F.relu(mean_real - generated).square().mean()


def _update(averages: Tensor, now: Tensor, decay: float) -> None:
    """Update running averages in place, if all of `now` is finite."""
    averages.copy_(torch.where(torch.isfinite(now).all(), averages.lerp(now, 1 - decay), averages))
