"""`pretrain_vae`: PV-VAE by predictive reconstruction (arXiv 2605.02134).

The encoder sees the first frames of a clip, the decoder reconstructs them and predicts the rest. Beside the frames
it must match the differences of neighbours, so that copying the last frame does not pay.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from tqdm import tqdm

from longtake.datasets import clip, storage
from longtake.datasets.cache import Cache
from longtake.datasets.errors import UserError
from longtake.datasets.loader import Loader, to_model, to_pixels
from longtake.datasets.stage import DatasetInput, StageConfig, ViewInput
from longtake.training import registry, tracker
from longtake.training.checkpoint import locked
from longtake.training.config import TrainConfig
from longtake.training.engines import device, process_group
from longtake.training.loop import Batch, Engines, Objective, train
from longtake.training.metrics.reconstruction import psnr
from longtake.training.models.pv_vae import PVVAE, PVVAEConfig, config_from_preset, frames_of, latent_groups

VERSION = 1
PRODUCES = "model"

_PANELS = ("source", "seen by the encoder", "predicted", "reconstructed, all seen")
_SHOWN = 12


class Config(TrainConfig):
    """Train PV-VAE on a dataset and register it. `model` is a preset with fields of PVVAEConfig to change."""

    kind: Literal["pretrain_vae"]
    dataset: DatasetInput
    view: ViewInput | None = None
    name: str = "pv-vae"  # in the registry
    model: dict[str, Any] = Field(default_factory=lambda: {"preset": "pv_vae"})
    frames: int = Field(17, ge=1)  # 1 + 4n
    stride: int = Field(1, ge=1)
    size: tuple[int, int] = (256, 256)  # height, width
    max_drop: float = Field(1.0, ge=0, le=1)  # r: at most this share of the latent groups after the first is dropped
    lambda_reconstruction: float = Field(1.0, ge=0)  # not published; 1 is our assumption
    lambda_motion: float = Field(1.0, ge=0)  # of the differences, inside the reconstruction term
    lambda_kl: float = Field(1e-6, ge=0)  # not published; of nearest public code
    eval_clips: int = Field(512, ge=1)  # held-out clips that the trained model is measured on, at most

    @field_validator("model")
    @classmethod
    def _known(cls, model: dict[str, Any]) -> dict[str, Any]:
        config_from_preset(**({"preset": "pv_vae"} | model))
        return model

    @model_validator(mode="after")
    def _divides(self) -> "Config":
        vae = self.vae()
        if (self.frames - 1) % vae.temporal_stride:
            near = frames_of(latent_groups(self.frames))
            raise ValueError(
                f"frames {self.frames}: the model needs 1 + {vae.temporal_stride}n frames, such as {near} or {near + vae.temporal_stride}"
            )
        if any(side % vae.spatial_stride for side in self.size):
            raise ValueError(f"size {self.size[0]}x{self.size[1]}: the model needs multiples of {vae.spatial_stride}")
        return self

    def vae(self) -> PVVAEConfig:
        return config_from_preset(**({"preset": "pv_vae"} | self.model))


def check(config: Config, inputs: Mapping[str, StageConfig]) -> None:
    """Refuse a window that the clips of a `shard` stage cannot fill."""
    geometry = getattr(inputs.get("dataset"), "clip", None)
    if geometry is None:
        return
    if geometry.short_side < min(config.size):
        raise ValueError(
            f"size: {min(config.size)} is larger than clip.short_side {geometry.short_side} of the dataset"
        )
    span = (config.frames - 1) * config.stride + 1
    if geometry.max_frames < span:
        raise ValueError(
            f"frames: a window spans {span} frames, the dataset's clips have at most {geometry.max_frames}; raise clip.max_seconds"
        )


def objective(config: Config, model: PVVAE) -> Objective:
    return Objective(modules={"generator": model}, loss=partial(_loss, config))


def _loss(
    config: Config, name: str, engines: Engines, batch: Batch, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    video = to_model(batch["video"])
    groups = latent_groups(video.shape[2])
    # k ~ U{0..floor((G-1) r)} groups are dropped; the first frame always stays
    most = int((groups - 1) * config.max_drop)
    dropped = int(torch.randint(most + 1, (), generator=generator, device=generator.device))
    made, posterior = engines[name](video, visible=groups - dropped, generator=generator)
    made = made.float()
    reconstruction = (made - video).square().mean()
    motion = (made.diff(dim=2) - video.diff(dim=2)).square().mean() if video.shape[2] > 1 else made.new_zeros(())
    kl = posterior.kl().mean()
    loss = config.lambda_reconstruction * (reconstruction + config.lambda_motion * motion) + config.lambda_kl * kl
    return loss, {
        "loss": loss.detach(),
        "reconstruction": reconstruction.detach(),
        "motion": motion.detach(),
        "kl": kl.detach(),
    }


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """Train from the latest checkpoint, log and register the model, look at held-out clips, make it champion.

    Raises:
        UserError: no usable sample; a workspace where checkpoints cannot lie.
        Failure, Interrupted: of the loop.
    """
    if config.checkpoints is None and not storage.is_local(output):
        raise UserError(f"checkpoints: {output} is remote; name a local folder that outlives the job")
    folder = Path(config.checkpoints or storage.join(output, "checkpoints"))
    threads = os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(int(threads) if threads else os.cpu_count() or 1)
    with process_group() as (rank, world), locked(folder) if rank == 0 else nullcontext():
        torch.manual_seed(config.seed)
        model = PVVAE(config.vae()).to(device())
        loader = _loader(
            config,
            inputs,
            "train",
            crop="random",
            batch=config.batch // config.accumulate,
            rank=rank,
            world=world,
            workers=config.workers,
            seed=config.seed,
        )
        log = tracker.connect() if rank == 0 else None
        weights = train(objective(config, model), loader, config, folder, log, rank, world)
        if log is None:
            return {}
        model = PVVAE(config.vae())
        model.load_state_dict(weights)
        result = _publish(config, inputs, model.to(device()).eval(), log)
        result["metrics"] |= {
            "train_clips": float(loader.samples),
            "train_clips_too_short": float(loader.samples_short),
            "train_clips_too_small": float(loader.samples_small),
        }
        return result


def _publish(config: Config, inputs: Mapping[str, str], model: PVVAE, log: tracker.Tracker) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        facts = {
            "lineage": {"inputs": dict(inputs), "run": log.run_id},
            "window": {"frames": config.frames, "stride": config.stride, "size": list(config.size)},
        }
        registry.save(folder, "pv_vae", config.vae().model_dump(mode="json"), model.state_dict(), facts)
        uri = registry.register(folder, config.name, log.run_id)
        shown = Path(scratch) / "heldout"
        shown.mkdir()
        heldout = _loader(config, inputs, "val", batch=1, last="pad", shuffle=False, epochs=1)
        summary = evaluate(model, heldout, shown, config.seed, config.eval_clips)
        log.artifacts(shown, "heldout")
    log.close()
    registry.promote(uri)
    return {"uri": uri, "metrics": {k: v for k, v in summary.items() if isinstance(v, float)}}


@torch.inference_mode()
def evaluate(model: PVVAE, loader: Loader, folder: Path, seed: int, most: int) -> dict[str, Any]:
    """PSNR on the first `most` clips of a loader, and pictures of some of them as `heldout.json` and KEY.mp4 in `folder`.

    The encoder sees the first half of the latent groups. Predicted frames are compared with the last visible frame,
    repeated; `psnr_all` is of a reconstruction with every frame visible.
    """
    at = next(model.parameters()).device
    rows: list[dict[str, Any]] = []
    frames = seen = 0
    count = min(most, loader.samples)
    for batch in tqdm(islice(loader, count), "evaluate", count, unit="clip"):
        video = to_model(batch["video"].to(at))
        frames = video.shape[2]
        visible = (latent_groups(frames) + 1) // 2
        seen = frames_of(visible)
        full, half = model.reconstruct(video), model.reconstruct(video, seen)
        copied = video[:, :, seen - 1 : seen].expand_as(video)
        row: dict[str, Any] = {
            "key": batch["key"][0],
            "frames_visible": seen,
            "psnr_all": psnr(full, video).item(),
            "psnr_visible": psnr(half[:, :, :seen], video[:, :, :seen]).item(),
        }
        if seen < frames:
            row["psnr_predicted"] = psnr(half[:, :, seen:], video[:, :, seen:]).item()
            row["psnr_copy_last"] = psnr(copied[:, :, seen:], video[:, :, seen:]).item()
        if len(rows) < _SHOWN:
            masked = torch.where(
                torch.arange(frames, device=at).view(1, 1, -1, 1, 1) < seen, video, torch.zeros_like(video)
            )
            row["file"] = f"{row['key']}.mp4"
            _write_panels(folder / row["file"], [video, masked, half, full])
        rows.append(row)
    measured = [name for name in ("psnr_all", "psnr_visible", "psnr_predicted", "psnr_copy_last") if name in rows[0]]
    summary: dict[str, Any] = {name: float(np.mean([row[name] for row in rows])) for name in measured}
    summary |= {"clips": len(rows), "frames": frames, "frames_visible": seen, "split": "val", "seed": seed}
    shown = [row for row in rows if "file" in row]
    (folder / "heldout.json").write_text(json.dumps({"panels": _PANELS, "summary": summary, "clips": shown}, indent=2))
    return summary


def _write_panels(path: Path, panels: list[Tensor], scale: int = 3) -> None:
    """One video of panels side by side, each (1, 3, T, H, W) in [-1, 1], enlarged without smoothing."""
    wide = torch.cat(panels, dim=4)[0].permute(1, 2, 3, 0)
    pixels = to_pixels(wide).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    clip.write(path, pixels.cpu().numpy(), fps=6)


def _loader(config: Config, inputs: Mapping[str, str], split: str, **options: Any) -> Loader:
    return Loader(
        inputs["dataset"],
        split,
        view=inputs.get("view"),
        columns=("video",),
        frames=config.frames,
        stride=config.stride,
        size=config.size,
        cache=Cache(config.cache.folder, config.cache.max_bytes) if config.cache else None,
        **options,
    )
