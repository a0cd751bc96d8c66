"""How well a prior has learned what videos there are: its loss on held-out clips, and generated videos to look at."""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from longtake.datasets.errors import UserError
from longtake.datasets.loader import to_model
from longtake.training import flow, sampling
from longtake.training.metrics.distance import video_distance
from longtake.training.metrics.features import FeatureNetwork
from longtake.training.models.latte import Latte
from longtake.training.models.pv_vae import PVVAE

_TIMES = 8  # of the flow, at which the loss is measured
_SHOWN = 12
_LONGER = 3  # windows in a longer video, without what they share


@torch.no_grad()
def heldout_losses(
    latte: Callable[..., Tensor], clips: Iterable[tuple[Tensor, Tensor | None]], seed: int, scale: Tensor | float = 1.0
) -> np.ndarray[Any, Any]:
    """The flow's loss `(clips, times)` of clips `(1, C, T, H, W)`, normalised, from their first frame on, with class ids.

    Times are spread evenly over 0..1, no frame is clean, and clip n always gets the same noise: so values compare
    between trainings on the same latents. `scale` `(1, C, 1, 1, 1)` is the unit of errors where models normalise by
    different statistics.
    """
    rows = []
    for number, (clip, ids) in enumerate(clips):
        times = (torch.arange(_TIMES, device=clip.device) + 0.5) / _TIMES
        x0 = clip.expand(_TIMES, -1, -1, -1, -1)
        draws = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
        noise = torch.randn(x0.shape, generator=draws).to(x0.device)
        velocity = latte(flow.interpolate(x0, noise, times), times, None if ids is None else ids.expand(_TIMES))
        rows.append(flow.loss(velocity * scale, x0 * scale, noise * scale).cpu().numpy())
    return np.stack(rows) if rows else np.empty((0, _TIMES))


def evaluate(
    latte: Latte,
    vae: PVVAE | None,
    clips: Iterable[tuple[Tensor, Tensor | None]],
    later: Iterable[tuple[Tensor, Tensor | None]],
    folder: Path,
    *,
    frames: int,
    fps: float,
    count: int,
    seed: int,
    settings: sampling.Settings,
    classes: Sequence[str] = (),
    network: FeatureNetwork | None = None,
    real: Iterable[Tensor] = (),
) -> dict[str, Any]:
    """`heldout_losses` of windows, and generated videos: some as NAME.mp4 in `folder`, listed in `generated.json`.

    `clips` start their clips, as generated videos do: they give `heldout_loss`, windows that start `later` in theirs
    `heldout_loss_later`, None where there are none.

    Where the model can go on beyond a window, one more video is longer. With a network the Fréchet and kernel distance
    of `count` videos to `real` `(1, 3, T, H, W)` is measured too; without one `distance` is None, and no more videos
    are made than are shown.

    Raises:
        UserError: the network does not take such videos, or there are too few.
    """
    losses = heldout_losses(latte, clips, seed)
    later_losses = heldout_losses(partial(latte, start=1), later, seed)
    generate = partial(sampling.generate_videos, latte, vae, settings=settings)
    plan = [(seed + n, n % len(classes) if classes else None) for n in range(count)]
    shown: list[dict[str, Any]] = []

    def show(name: str, chunks: Iterable[np.ndarray], made_of: int, class_id: int | None, length: int) -> None:
        entry = {"file": f"{name}.mp4", "seed": made_of, "frames": length}
        shown.append(entry | {"class": None if class_id is None else classes[class_id]})
        with sampling.video_file(folder / f"{name}.mp4", fps) as write:
            for chunk in chunks:
                write(chunk[0])

    def fake() -> Iterator[Tensor]:
        for number, class_id in tqdm(plan, "generate", unit="video"):
            video = sampling.whole(generate(frames, [number], None if class_id is None else [class_id]))
            if len(shown) < _SHOWN:
                show(f"seed-{number}", [video], number, class_id, frames)
            yield to_model(torch.from_numpy(video).to(latte.latent_mean.device).permute(0, 4, 1, 2, 3))

    distance = None
    if network is None:
        plan = plan[:_SHOWN]
        deque(fake(), maxlen=0)
    else:
        try:
            distance = video_distance(real, fake(), network, split="val", seed=seed)
        except ValueError as e:
            raise UserError(f"features: {e}") from e
    if latte.config.conditioning and latte.config.shape and settings.overlap < latte.config.shape[0]:
        number, class_id = plan[0]
        length = 1 + _LONGER * (frames - 1)
        show("longer", generate(length, [number], None if class_id is None else [class_id]), number, class_id, length)
    summary = {
        "heldout_loss": float(losses.mean()),
        "heldout_loss_by_time": losses.mean(0).tolist(),
        "heldout_loss_later": float(later_losses.mean()) if len(later_losses) else None,
        "clips": len(losses),
        "videos": len(plan),
        "frames": frames,
        "split": "val",
        "seed": seed,
        "distance": distance,
    }
    (folder / "generated.json").write_text(json.dumps({"summary": summary, "videos": shown}, indent=2))
    return summary
