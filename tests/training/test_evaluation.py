"""Evaluations: the same on any number of ranks, whole clips in a stream, and networks refused before training."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flat import nested
from torch import nn

from longtake.datasets import index, stage
from longtake.datasets.errors import UserError
from longtake.datasets.loader import Loader
from longtake.datasets.loader.whole import longest
from longtake.training.config import EvaluatedConfig
from longtake.training.metrics.features import checked_network
from longtake.training.models.latte import finetune as latte
from longtake.training.models.pv_vae import pretrain as pv_vae
from longtake.training.models.pv_vae.evaluate import by_position
from longtake.training.models.pv_vae.model import PVVAE, config_from_preset
from longtake.training.models.tats import pretrain as tats

MEASURE = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from longtake.training.metrics import trivial
from longtake.training.metrics.features import FeatureNetwork
from longtake.training.models.generator import Settings
from longtake.training.models.latte import evaluate as generated, model as latte
from longtake.training.models.latte.evaluate import HeldoutWindow, VideoPlan
from longtake.training.models.memory import continuation, dit as memory_dit, dit_config, retrieval
from longtake.training.models.memory.history import Segment
from longtake.training.models.pv_vae import evaluate as heldout
from longtake.training.models.pv_vae.model import PVVAE, config_from_preset

def random(*shape, seed):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1

class Clips:
    samples = 3

    def at(self, numbers):
        for n in numbers:
            yield {"key": [f"clip-{n}"], "video": ((random(1, 3, 9, 32, 32, seed=n) + 1) * 127.5).round().to(torch.uint8)}

def shown(n):
    return lambda: iter(((random(21, 32, 32, 3, seed=n) + 1) * 127.5).to(torch.uint8).numpy())

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, batch, rank, world = Path(sys.argv[1]), *map(int, sys.argv[2:])
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(0)
    small = {"latent_channels": 8, "encoder_width": 8, "decoder_width": 8, "padding": "noise"}
    vae = PVVAE(config_from_preset("pv_vae_tiny", **small)).eval()
    prior = latte.Latte(latte.config_from_preset("latte_tiny", depth=2, width=32, heads=2, channels=8, shape=(3, 2, 2))).eval()
    film = memory_dit.MemoryDiT(dit_config.config_from_preset(
        "memory_dit_tiny", depth=2, width=32, heads=2, memory_widths=(8, 16), memory_heads=2, rates=("1x1x2",), branches="high",
        window=2, channels=8, shape=(3, 2, 2), history=6,
    )).eval()
    for p in (*vae.parameters(), *prior.parameters(), *film.parameters()):
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    colours = FeatureNetwork("colours", "d", "bytes", None, videos=lambda v: v.mean((2, 3, 4)))
    mine = range(rank, 3, world)
    made = generated.evaluate(
        prior, vae,
        (HeldoutWindow(n, random(1, 8, 3, 2, 2, seed=n), None, start) for start in (0, 4) for n in mine),
        folder, VideoPlan(9, 8.0, 5, 0, Settings(2), batch=batch), trivial.unit(8, torch.zeros(())),
        latents=True, network=colours,
        real=(random(1, 3, 9, 32, 32, seed=10 + n) for n in mine),
        train=(random(1, 3, 9, 32, 32, seed=20 + n) for n in mine),
        probed=tuple([(vae.encode(v).mode().detach(), v) for v in (random(1, 3, 9, 32, 32, seed=s + n) for n in mine)] for s in (30, 40)),
    )
    seen = heldout.evaluate(
        vae, Clips(), folder, 0, 3, network=colours, latents=True, long_clips=[shown(n) for n in range(3)], probed=Clips(), probe_clips=2
    )
    def video(n):  # after 8, 16, 8, 16 and 8 frames
        frames = random(1, 3, 17 + n % 2 * 8, 32, 32, seed=50 + n)
        return retrieval.Video(n, ((frames + 1) * 127.5).round().to(torch.uint8), None)

    def clips():
        for n in mine:
            first = torch.zeros(1, 5, dtype=torch.bool)
            yield n, Segment(None, random(1, 8, 5, 2, 2, seed=60 + n), 2, torch.arange(5)[None], first, None), None

    batches = [[video(n) for n in range(b, min(5, b + batch))] for b in range(0, 5, batch)][rank::world]
    losses = continuation.losses_of_all_ranks(film, clips(), 0)
    how = continuation.Continuation(9, 2, 8.0, 0, Settings(2), "sample")
    gone_on = continuation.evaluate(
        film, vae, batches, folder, how, losses=losses, starts=losses, by_history={0: losses, 4: losses},
        trivial=continuation.trivial_losses(film, clips(), 0), network=colours,
    )
    held = retrieval.evaluate(film, vae, [video(n) for n in range(rank, 5, world)], folder, fps=8.0, seed=0, solver_steps=2)
    print(json.dumps({"made": made, "seen": seen, "gone_on": gone_on, "held": held}), flush=True)
"""


def measured(folder: Path, batch: int, world: int) -> list[dict[str, Any]]:
    """What each rank is told."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    command = [sys.executable, "-P", "-c", MEASURE, str(folder), str(batch)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(world)], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert not any(rank.returncode for rank in ranks)
    return [json.loads(next(line for line in text.splitlines() if line.startswith("{"))) for text in said]


def alike(one: Any, other: Any) -> None:
    """The same but for the last digits of numbers."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            alike(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            alike(*pair)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-3)
    else:
        assert one == other


@pytest.mark.slow
def test_ranks_and_batches_change_neither_videos_nor_figures(tmp_path: Path) -> None:
    alone, *_ = measured(tmp_path / "alone", 2, 1)
    first, second = measured(tmp_path / "pair", 2, 2)
    other, *_ = measured(tmp_path / "other", 5, 1)
    assert first == second
    alike(first, alone)
    alike(other, alone)
    files = {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir() if path.suffix == ".mp4"}
    assert len(files) == 3 + 5 + 1 + 5 + 1
    assert files == {name: (tmp_path / "pair" / name).read_bytes() for name in files}
    made, seen = alone["made"], alone["seen"]
    assert made["videos"] == 5 and made["clips"] == 3 and made["distance"]["videos_fake"] == 5
    assert (
        made["frechet"] > 0 and {"frechet_train", "frechet_mean_video", "probe_flow_epe", "ltd_rising"} <= made.keys()
    )
    assert {"reconstruction_frechet", "psnr_long", "probe_tracking_error", "ltd_spearman"} <= seen.keys()
    assert seen["long_frames"] == 21 and len(seen["series"]["psnr_by_step"]) == 6
    gone_on, held = alone["gone_on"], alone["held"]
    assert (
        gone_on["clips"] == 3 and gone_on["videos"] == held["clips"] == 5 and len(gone_on["distance_by_segment"]) == 2
    )
    assert gone_on["psnr_next"] > 0 and gone_on["psnr_next_copy_last"] > 0 and gone_on["heldout_loss_mean"] > 0
    names = {path.name for path in (tmp_path / "pair").iterdir()}
    assert not any(name.endswith(".npy") for name in names)
    assert {"heldout.json", "generated.json", "continued.json", "retrieved.json", "latents.png", "paths.png"} <= names


def test_whole_clips_are_the_longest_and_as_the_loader_shows_them(dataset: str) -> None:
    lengths = sorted(index.read_all(dataset, "val")["frame_count"].to_pylist(), reverse=True)
    clips = longest(dataset, "val", None, (32, 32), 3, 2)
    assert [clip.row["frame_count"] for clip in clips] == lengths[:3]
    assert not longest(dataset, "val", None, (32, 32), 3, lengths[0] + 1)
    assert not longest(dataset, "val", None, (512, 32), 3, 2)
    windows = Loader(
        dataset,
        "val",
        columns=("video",),
        frames=5,
        stride=2,
        size=(32, 32),
        batch=1,
        last="pad",
        epochs=1,
        shuffle=False,
    )
    seen = {batch["key"][0]: batch["video"][0].permute(1, 2, 3, 0).numpy() for batch in windows}
    for clip in clips:
        frames = np.stack(list(clip.frames((32, 32), 2)))
        assert len(frames) == -(-clip.row["frame_count"] // 2)
        np.testing.assert_array_equal(frames[:5], seen[clip.row["key"]])


def test_the_batches_of_given_numbers_are_those_of_the_stream(dataset: str) -> None:
    loader = Loader(dataset, "val", columns=("video",), frames=5, size=(32, 32), batch=1, last="pad", epochs=1)
    straight = [batch["key"] for batch in loader]
    assert [batch["key"] for batch in loader.at([2, 0])] == [straight[2], straight[0]]


def test_a_clip_that_fits_a_window_is_the_same_whole_and_in_pieces() -> None:
    torch.manual_seed(0)
    model = PVVAE(config_from_preset("pv_vae_tiny", latent_channels=8, encoder_width=8, decoder_width=8)).eval()
    video = np.random.default_rng(0).integers(0, 256, (13, 32, 32, 3), np.uint8)
    assert by_position(model, [lambda: iter(video[:9])], 9) == ({}, {})
    found, series = by_position(model, [lambda: iter(video), lambda: iter(video[:11])], 9)
    assert found["long_clips"] == 2 and found["long_frames"] == 13
    assert series["clips_by_step"] == [(0, 2.0), (1, 2.0), (2, 2.0), (3, 2.0)]
    whole, pieces = (np.array(series[name])[:, 1] for name in ("psnr_by_step", "psnr_by_step_pieces"))
    np.testing.assert_allclose(whole[:3], pieces[:3], atol=0.01)
    assert whole[3] != pieces[3]
    made = model.reconstruct(torch.from_numpy(video).permute(3, 0, 1, 2)[None] / 127.5 - 1)[0].permute(1, 2, 3, 0)
    error = ((made.numpy() + 1) * 127.5 - video)[9:] / 255
    assert by_position(model, [lambda: iter(video)], 9)[0]["psnr_long"] == pytest.approx(
        -10 * np.log10(np.square(error).mean()), abs=0.01
    )


def config(**changes: Any) -> EvaluatedConfig:
    return EvaluatedConfig(**nested(changes))


def test_a_network_that_takes_no_such_videos_is_refused_in_one_line(tmp_path: Path) -> None:
    network = torch.jit.script(nn.Sequential(nn.Conv2d(3, 2, 40), nn.AdaptiveAvgPool2d(1)))
    network.save(str(tmp_path / "features.pt"))
    chosen = str(tmp_path / "features.pt")
    assert checked_network(chosen, 5, (64, 64)) and checked_network(None, 5, (64, 64)) is None
    with pytest.raises(UserError, match="takes no videos of 5 frames of 32x32") as e:
        checked_network(chosen, 5, (32, 32))
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="no such file"):
        checked_network(str(tmp_path / "none.pt"), 5, (64, 64))


def test_another_evaluation_runs_a_stage_again_and_trains_nothing() -> None:
    for changes in ({"features": "x.pt"}, {"eval_clips": 7}, {"eval_latents": False}, {"eval_probes": 4}):
        assert stage.content(config(**changes)) == stage.content(config())
        assert stage.names(config(**changes)) != stage.names(config())
    assert stage.names(config(eval_batch=1)) == stage.names(config())


@pytest.mark.parametrize(
    ("stage_of", "fields", "single"),
    [
        (pv_vae, {"kind": "pretrain_vae", "model": {"preset": "pv_vae_tiny"}, "sizes": [[32, 32]]}, 1),
        (latte, {"kind": "finetune_latte", "latents": "latents"}, 1),
        (tats, {"kind": "pretrain_vqgan", "model": {"preset": "vqgan_tiny"}, "size": (32, 32)}, 4),
    ],
)
def test_probes_of_motion_are_refused_where_a_window_is_a_single_latent(
    stage_of: Any, fields: dict[str, Any], single: int
) -> None:
    def chosen(frames: int, clips: int) -> Any:
        return stage_of.Config(**fields, dataset="dataset", frames=frames, eval_probes=clips)

    assert chosen(single + 4, 4).eval_probes == 4 and chosen(single, 0).frames == single
    with pytest.raises(ValueError, match="eval_probes: look from each latent to the next, and a window has a single"):
        chosen(single, 4)
