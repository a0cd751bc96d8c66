"""The adversarial piece of any objective: a discriminator beside a generator, and how much the generator hears of it.

A fixed weight suits one scale of the losses only: beside a mean of squared errors 0.5 is hundreds of times too much. So
`lambda_gan` is multiplied by |gradient of the reconstruction| / |gradient of the GAN loss|, as VQGAN has it (arXiv
2012.09841, equation 7). Both are taken at the generator's output and not at its last weights: so no weight need be whole, at no
ZeRO stage, and the way back through the generator is walked once.

The discriminator of a `parent` goes on; a new one learns alone at first. Where it ends it is saved with the run of its
training, and never registered.
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
FILE = f"{NAME}/{NAME}.safetensors"  # in the artifacts of a run, or in a model folder
_KEEP = 0.95  # of the averages of the squared gradients, a pass
_KEEP_LOGITS = 0.99  # of the averages of the logits [LeCam]
_MOST = 10.0  # the ratio at most: a discriminator that says next to nothing is not magnified without bound
_BESIDE = 1 << 20  # bytes that a file may have beside its tensors


class GANConfig(TrainConfig):
    """How to train against a discriminator. Assumptions where nothing is noted.

    lambda_gan            weight of the adversarial loss; 0 trains no discriminator
    gan_weight            adaptive: lambda_gan |gradient of the reconstruction| / |gradient of the GAN loss| at the output;
                          fixed: lambda_gan as it is
    discriminator         a preset with fields of PatchGANConfig to change
    discriminator_lr      null is `lr`; its warm-up and schedule begin at gan_start
    discriminator_betas   of Adam [VQGAN]
    gan_start             step at which the discriminator begins to learn [paper]
    gan_warmup            steps that it, or its parent, has learned before the generator is trained against it
    lambda_lecam          weight of a term that keeps its logits bounded where data are few: see `lecam`
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
    def _known_discriminator(cls, model: dict[str, Any]) -> dict[str, Any]:
        model_config_of(model)
        return model


def model_config_of(model: Mapping[str, Any]) -> PatchGANConfig:
    """Of the setting `discriminator`. ValueError for an unknown preset or field."""
    return patchgan.config_from_preset(**({"preset": "patchgan"} | dict(model)))


def settings(config: GANConfig) -> TrainConfig:
    """The discriminator's own rate, betas and schedule."""
    changes = {"lr": config.discriminator_lr or config.lr, "betas": config.discriminator_betas}
    return config.model_copy(update=changes | {"steps": max(1, config.steps - config.gan_start)})


def begin(config: GANConfig, parent: str | None = None) -> tuple[PatchGAN, dict[str, Tensor]]:
    """The discriminator before its first step, that of `parent` if it fits, and the state of the piece.

    Every rank of a process group must call it; all get the same. Where there is a parent, a line says which it is.
    """
    model = PatchGAN(model_config_of(config.discriminator)).to(engines.device())
    state = {
        "gan_learned": torch.zeros(1, dtype=torch.int64),  # steps before this training
        "gan_squares": torch.zeros(2, device=engines.device()),  # of the two gradients, averages
        "gan_logits": torch.zeros(2, device=engines.device()),  # of real and of made videos, averages
    }
    if parent is None:
        return model, state
    learned = state["gan_learned"].to(engines.device())
    if torch.distributed.get_rank() == 0:
        try:
            with tempfile.TemporaryDirectory() as scratch:
                learned.fill_(load(_of(parent, model, Path(scratch)), model))
            said = f"goes on with that of {parent}, which has learned {int(learned)} steps"
        except (UserError, Failure, ValueError) as e:
            said = f"begins anew ({str(e).splitlines()[0]})"
        print(f"discriminator: {said}", file=sys.stderr)
    # so no rank depends on what another could fetch
    for tensor in (learned, *model.state_dict().values()):
        torch.distributed.broadcast(tensor, src=0)
    state["gan_learned"].copy_(learned)
    return model, state


def save(path: Path, config: GANConfig, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write the discriminator of a finished training, with its settings and how many steps it has learned."""
    learned = int(state["gan_learned"][0]) + max(0, config.steps - config.gan_start)
    content = {"config": _text(model_config_of(config.discriminator)), "learned": str(learned)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, path, content)


def load(path: Path, model: PatchGAN) -> int:
    """Put a saved discriminator's weights into `model`; returns how many steps it has learned.

    Raises:
        ValueError: it is another one, or damaged; then the model has not changed.
    """
    state = model.state_dict()
    try:
        with safe_open(path, "pt") as file:
            content = file.metadata() or {}
            if content.get("config") != _text(model.config):
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


def _text(config: PatchGANConfig) -> str:
    return json.dumps(config.model_dump(mode="json"), sort_keys=True)


def _of(parent: str, model: PatchGAN, scratch: Path) -> Path:
    """The file of a parent's discriminator. Raises UserError or Failure where it has none that can be had."""
    if not in_store(parent):
        path = Path(parent) / FILE
        if not path.is_file():
            raise UserError(f"{parent} has none")
        return path
    most = sum(value.nbytes for value in model.state_dict().values()) + _BESIDE
    path = scratch / NAME
    fetch.beside(parent, FILE, path, most)
    return path


def heard(config: GANConfig, state: Mapping[str, Tensor], step: int) -> bool:
    """Whether the generator hears the discriminator at a step: not before that has learned for `gan_warmup` steps."""
    learned = step - config.gan_start
    return learned > 0 and int(state["gan_learned"]) + learned >= config.gan_warmup


def generator_loss(
    config: GANConfig,
    state: Mapping[str, Tensor],
    made: Tensor,
    reconstruction: Callable[[Tensor], tuple[Tensor, Terms]],
    judge: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Terms]:
    """All losses of a generator's output, and their terms with `gan_ratio` of the gradients and the `gan_weight` used.

    Every rank must call it. The gradients reach the output through a linear stand-in, whose value is the loss.

    Args:
        made: the output, fp32, `(B, ...)`; as many samples on each rank.
        reconstruction: all losses of the output but the GAN's, a mean over samples, and terms to log; called once.
        judge: the frozen discriminator.
    """
    shown = made.detach().requires_grad_()
    loss, terms = reconstruction(shown)
    judged = patchgan.generator_loss(judge(shown))
    towards_real, towards_approval = (torch.autograd.grad(value, shown)[0] for value in (loss, judged))
    ratio, smoothed = balance(state["gan_squares"], towards_real, towards_approval)
    weight = config.lambda_gan * (smoothed if config.gan_weight == "adaptive" else torch.ones_like(smoothed))
    gradient = towards_real + weight * towards_approval
    value = (loss + weight * judged).detach() + (gradient * (made - made.detach())).sum()
    return value, terms | {"gan": judged.detach(), "gan_ratio": ratio, "gan_weight": weight}


@torch.no_grad()
def balance(squares: Tensor, reconstruction: Tensor, adversarial: Tensor) -> tuple[Tensor, Tensor]:
    """|reconstruction| / |adversarial| of two gradients of mean losses: of all ranks' samples, and smoothed, at most 10.

    Of the averages of squares one divides the other, so that they need no correction while they are young, and one that
    leaps counts at once. What is not finite does not move them.

    Args:
        squares: the averages, `(2,)`, moved in place.
    """
    now = torch.stack([reconstruction.square().sum(), adversarial.square().sum()])
    if (world := torch.distributed.get_world_size()) > 1:
        torch.distributed.all_reduce(now)
        # a rank's mean has `world` times the gradients of the mean over all
        now /= world**2
    _move(squares, now, _KEEP)
    ratio, smoothed = ((a / b.clamp_min(torch.finfo(b.dtype).tiny)).sqrt().clamp(max=_MOST) for a, b in (now, squares))
    return ratio, smoothed


def discriminator_loss(
    config: GANConfig, state: Mapping[str, Tensor], judge: Callable[[Tensor], Tensor], real: Tensor, made: Tensor
) -> tuple[Tensor, Terms]:
    """The discriminator's loss, and terms to log. Every rank must call it; `judge` is its engine, called once."""
    # both in one call: two would be wrong under ZeRO
    good, bad = judge(torch.cat([real, made])).float().chunk(2)
    loss = patchgan.discriminator_loss(good, bad)
    logits = torch.stack([good.detach().mean(), bad.detach().mean()])
    terms = {"discriminator": loss.detach(), "judged_real": logits[0], "judged_made": logits[1]}
    if config.lambda_lecam:
        terms["lecam"] = lecam(good, bad, *state["gan_logits"].clone())
        loss = loss + config.lambda_lecam * terms["lecam"]
        terms["lecam"] = terms["lecam"].detach()
        now = logits.clone()
        if (world := torch.distributed.get_world_size()) > 1:
            torch.distributed.all_reduce(now)
            now /= world
        _move(state["gan_logits"], now, _KEEP_LOGITS)
    return loss, terms


def lecam(real: Tensor, made: Tensor, average_real: Tensor, average_made: Tensor) -> Tensor:
    """How far the logits of real videos lie above the average of made ones, and those of made ones below that of real
    ones, squared (arXiv 2104.03310, with the hinge of its code): it draws both towards each other."""
    return F.relu(real - average_made).square().mean() + F.relu(average_real - made).square().mean()


def _move(averages: Tensor, now: Tensor, keep: float) -> None:
    """Move averages towards what is now, if all of it is finite."""
    averages.copy_(torch.where(torch.isfinite(now).all(), averages.lerp(now, 1 - keep), averages))
