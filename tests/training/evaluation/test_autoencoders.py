"""What is measured of autoencoders: LTD, equivariance and prediction, in closed form and as the families' own pages have them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tats_stages
import torch
from materials import FPS, Fixed, clip, noise, subject, suite
from priors import awake
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.datasets.loader import to_model
from longtake.training.evaluation.measures import load
from longtake.training.metrics import equivariance
from longtake.training.metrics.latents import latent_temporal_distance
from longtake.training.metrics.reconstruction import psnr
from longtake.training.models import kind_of
from longtake.training.models.common.reconstruction import compared
from longtake.training.models.pv_vae.model import PVVAE, config_from_preset
from longtake.training.models.tats.vqgan import VQGAN

pytestmark = pytest.mark.usefixtures("one_thread")

PV_VAE = {"model": "pv_vae", "config": {}}
UNITS = ("a", "a", "b", "c")


class Colours:
    """Latents are the first frame's colour and that of every fourth one after it."""

    config = SimpleNamespace(temporal_stride=4, first_frames=1, spatial_stride=8)

    def encode(self, video: Tensor) -> Tensor:
        return video[:, :, ::4].mean((3, 4), keepdim=True)

    def shown_frames(self, frames: int) -> int:
        return 1 + (frames - 1) // 8 * 4

    def reconstruct(self, video: Tensor, visible: int, rng: torch.Generator) -> Tensor:
        """Right to a tenth of the range where it is seen, and to a hundredth of it elsewhere."""
        error = torch.where(torch.arange(video.shape[2]) < visible, 0.2, 0.02)
        return video + error[:, None, None]


def brightening(step: float, frames: int = 17) -> Tensor:
    """Grey frames, each by `step` brighter than the one before."""
    levels = -0.9 + step * torch.arange(frames)
    return levels[None, None, :, None, None].expand(1, 3, -1, 16, 16)


def test_latents_of_steady_motion_are_as_far_apart_as_they_are_in_time() -> None:
    steps = (2 / 255, 4 / 255, 6 / 255)
    held = [clip(brightening(step), unit) for step, unit in zip(steps, "abc", strict=True)]
    found = load("latents").run(subject(Colours(), PV_VAE), Fixed(suite(), held=held))
    values = {name: pooled.value for name, pooled in found.pooled.items()}
    assert values["ltd_rising"] == 1 and values["ltd_spearman"] == pytest.approx(1)
    assert values["ltd_path_roughness"] < 0.02 and values["ltd_curve_roughness"] < 0.02
    assert all(len(pooled.replicates) == 100 for pooled in found.pooled.values())
    curve = found.curves["ltd"]
    assert list(curve) == [n * 4 / FPS for n in (1, 2, 3, 4)]
    first = curve[4 / FPS]
    for position, row in curve.items():
        assert row == pytest.approx({unit: value * position * FPS / 4 for unit, value in first.items()}, rel=0.02)
    assert first["c"] / first["a"] == pytest.approx(3, rel=0.02)


def test_of_a_clip_for_each_source_ltd_is_that_of_the_metric() -> None:
    model = awake(PVVAE(config_from_preset("pv_vae_tiny", latent_channels=8, encoder_width=8, decoder_width=8)))
    held = [clip(noise(19, seed=n), unit) for n, unit in enumerate("abc")]
    found = load("latents").run(subject(model, PV_VAE), Fixed(suite(), held=held))
    with torch.no_grad():
        latents = [model.encode(to_model(each.video[:, :, :17])).mode() for each in held]
    expected = latent_temporal_distance(latents)
    for name in ("rising", "spearman", "curve_roughness", "path_roughness"):
        assert found.pooled[f"ltd_{name}"].value == pytest.approx(expected[name])
    curve = [np.mean(list(row.values())) for row in found.curves["ltd"].values()]
    np.testing.assert_allclose(curve, expected["normalised"], rtol=1e-6)
    assert found.notes == ["without the last 2 of 19 frames, which fill no latent"]


def test_a_prediction_is_measured_where_nothing_was_seen_and_by_how_far_ahead_it_is() -> None:
    held = [clip(brightening(0.02), unit, n) for n, unit in enumerate(UNITS)]
    found = load("prediction").run(subject(Colours(), PV_VAE), Fixed(suite(), held=held))
    assert found.rows.keys() == {(unit, f"{unit}-{n}") for n, unit in enumerate(UNITS)}
    row = found.rows["a", "a-0"]
    assert row["psnr_predicted"] == pytest.approx(40, abs=1e-3)
    video = to_model(held[0].video)
    assert row["psnr_copy_last"] == pytest.approx(
        psnr(video[:, :, 8:9].expand(-1, -1, 8, -1, -1), video[:, :, 9:]).item()
    )
    curve = found.curves["psnr_predicted"]
    assert list(curve) == [n / FPS for n in range(1, 9)]
    assert curve[1 / FPS] == pytest.approx({"a": 40, "b": 40, "c": 40}, abs=1e-3)
    assert found.notes == ["9 of 17 frames are seen"]


def test_the_prediction_of_a_pv_vae_is_the_one_that_its_gate_has() -> None:
    model = awake(PVVAE(config_from_preset("pv_vae_tiny", latent_channels=8, encoder_width=8, decoder_width=8)))
    held = [clip(noise(17))]
    with torch.no_grad():
        expected, _, _ = compared(model, to_model(held[0].video))
    found = load("prediction").run(subject(model, PV_VAE), Fixed(suite(), held=held))
    assert found.rows["a", "a-0"]["psnr_predicted"] == pytest.approx(expected["psnr_predicted"])


@pytest.fixture(scope="module")
def vqgan() -> VQGAN:
    return tats_stages.vqgan()


def test_tokens_of_a_still_clip_are_the_same_later_and_those_of_noise_by_chance(vqgan: VQGAN) -> None:
    still = [clip(noise(1, seed=n).expand(-1, -1, 12, -1, -1), unit) for n, unit in enumerate("ab")]
    found = load("equivariance").run(subject(vqgan, {"model": "vqgan"}), Fixed(suite(), held=still))
    assert found.pooled["kappa"].value == pytest.approx(1)
    assert set(found.curves["equal_tokens"]) == {4 / FPS} and found.rows["a", "a-0"] == {"equal_tokens": 1.0}
    moving = [clip(noise(16, seed=n), unit, n) for n, unit in enumerate(UNITS)]
    found = load("equivariance").run(subject(vqgan, {"model": "vqgan"}), Fixed(suite(), held=moving))
    assert list(found.curves["equal_tokens"]) == [4 / FPS, 8 / FPS]
    assert len(found.pooled["kappa"].replicates) == 100


def test_kappa_of_a_clip_for_each_source_is_that_of_the_metric(vqgan: VQGAN) -> None:
    smooth = [torch.nn.functional.avg_pool3d(noise(20, (40, 40), n), (5, 9, 9), 1) * 6 for n in range(3)]
    held = [clip(video.clamp(-1, 1), unit) for video, unit in zip(smooth, "abc", strict=True)]
    found = load("equivariance").run(subject(vqgan, {"model": "vqgan"}), Fixed(suite(), held=held))
    shares, counts = [], torch.zeros(32, dtype=torch.int64)
    for each in held:
        video = to_model(each.video)
        with torch.no_grad():
            first, second = vqgan.tokens(video[:, :, :12]), vqgan.tokens(video[:, :, 4:])
        shares.append(equivariance.matched(first, second))
        counts += equivariance.histogram(32, first, second)
    expected = equivariance.scores(torch.stack(shares).mean(0), counts)
    assert 0.05 < expected["kappa"] < 0.95 and expected["perplexity"] > 1.5
    assert found.pooled["kappa"].value == pytest.approx(expected["kappa"])
    assert found.pooled["perplexity"].value == pytest.approx(expected["perplexity"])


@pytest.mark.parametrize(
    ("measure", "frames", "size", "said"),
    [
        ("latents", 5, (16, 16), "frames: 5 are 2 latents of models:/x@best; LTD needs 3"),
        ("latents", 17, (12, 16), "size: 12x16; models:/x@best takes sides in multiples of 8"),
        ("prediction", 1, (16, 16), "frames: 1 are too few to predict any"),
        ("equivariance", 5, (16, 16), "frames: 5 are fewer than three latents of models:/x@best"),
    ],
)
def test_clips_that_do_not_suffice_are_refused_in_one_line(
    measure: str, frames: int, size: tuple[int, int], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        load(measure).run(subject(Colours(), PV_VAE), Fixed(suite(), held=[clip(noise(frames, size))]))


def test_what_only_some_models_do_is_measured_of_them_alone() -> None:
    foreign = {"model": "foreign_vae", "config": {"padding": None}}
    own = [kind_of(facts).measures for facts in (PV_VAE, {"model": "vqgan"}, foreign)]
    assert own == [{"prediction"}, {"equivariance"}, set()]
    assert kind_of({"model": "foreign_vae", "config": {"padding": "token"}}).measures == {"prediction"}
    assert load("prediction").own and load("equivariance").own and not load("latents").own
