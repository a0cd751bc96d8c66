"""What is measured of filled gaps and of memories, on pixels whose figures are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from materials import FPS, Fixed, bytes_of, clip, noise, subject, suite
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.datasets.loader import to_model
from longtake.training.evaluation.material import Filled, Retrieved
from longtake.training.evaluation.measures import load
from longtake.training.evaluation.networks import Brought
from longtake.training.evaluation.suite import Networks
from longtake.training.metrics import transitions
from longtake.training.metrics.features import FeatureNetwork
from longtake.training.metrics.perceptual import Perceptual
from longtake.training.metrics.reconstruction import psnr, psnr_by_frame
from longtake.training.models.mavin.baselines import held
from longtake.training.pictures import load_image_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

MAVIN = {"model": "mavin"}
BEGIN, GAP = 4, 8
OWN = load_image_encoder("own")


def filled(kept: Any, *draws: Tensor, every: int = 1) -> list[Filled]:
    return [Filled(kept, BEGIN, bytes_of(made), range(0, kept.video.shape[2], every)) for made in draws]


def turning(seed: int, step: float = 0.01) -> Tensor:
    """Brighter by `step` of the range from frame to frame, over a fixed picture."""
    levels = -0.5 + 2 * step * torch.arange(2 * BEGIN + GAP)
    return 0.4 * noise(1, (16, 16), seed) + levels[None, None, :, None, None]


def run(name: str, fills: list[Filled], **networks: Any) -> Any:
    return load(name).run(subject(None, MAVIN), Fixed(suite(), fills=fills, networks=networks))


def test_the_frames_of_a_gap_are_compared_and_nothing_beside_it() -> None:
    kept = [clip(turning(n), unit, n) for n, unit in enumerate("aab")]
    fills = [
        fill
        for n, each in enumerate(kept)
        for fill in filled(
            each, turning(n)[:, :, BEGIN : BEGIN + GAP] + 0.2, turning(n)[:, :, BEGIN : BEGIN + GAP] - 0.2
        )
    ]
    found = run("gaps", fills)
    assert found.rows.keys() == {("a", "a-0"), ("a", "a-1"), ("b", "b-2")}
    row = found.rows["a", "a-1"]
    assert row["gap_psnr"] == pytest.approx(20, abs=0.1)
    assert row["gap_joint_error"] == pytest.approx(0.1, abs=0.002)
    assert 0.8 < row["gap_ssim"] < 1
    # half of the range between two draws that are 0.2 of it apart, as their deviation
    assert row["gap_diversity"] == pytest.approx(0.2 / 2**0.5, abs=0.002)
    curve = found.curves["gap_psnr"]
    assert list(curve) == [n / FPS for n in range(GAP)] and curve[0.0]["b"] == pytest.approx(20, abs=0.1)


def test_the_ratio_at_the_joints_is_that_of_a_jump_to_the_usual_step() -> None:
    """Frames move on by 0.01, and by 0.1 more or less where the gap of the first clip begins and ends."""
    true = [turning(n)[:, :, BEGIN : BEGIN + GAP] for n in range(2)]
    # a second draw is of no effect
    fills = filled(clip(turning(0)), true[0] + 0.2, true[0]) + filled(clip(turning(1), "b"), true[1])
    found = run("gaps", fills)
    seam, bend = (found.pooled[f"gap_{name}_ratio"] for name in ("seam", "bend"))
    assert seam.value == pytest.approx((0.11 + 0.09 + 0.01 + 0.01) / 4 / 0.01, rel=0.05)
    assert bend.value > 2 * seam.value  # elsewhere the movement goes straight on
    assert len(seam.replicates) == 100
    assert min(seam.replicates) == pytest.approx(1, rel=0.05) and max(seam.replicates) > 9
    assert "gap_diversity" not in found.rows["b", "b-0"]
    assert float(found.notes[0].rpartition(" ")[2]) == pytest.approx(1, abs=0.01)


def test_a_model_of_half_the_rate_has_no_joints_for_that() -> None:
    kept = clip(turning(0))
    made = turning(0)[:, :, BEGIN : BEGIN + GAP : 2].repeat_interleave(2, 2)
    seam = run("gaps", filled(kept, made, every=2)).pooled["gap_seam_ratio"]
    assert seam.value == pytest.approx(1, abs=0.05)


def test_a_still_video_has_no_ratio() -> None:
    still = noise(1, (16, 16)).expand(-1, -1, 16, -1, -1)
    found = run("gaps", filled(clip(still), still[:, :, BEGIN : BEGIN + GAP]))
    assert not found.pooled and found.rows["a", "a-0"]["gap_psnr"] == 100


def test_lpips_is_of_the_frames_that_are_made() -> None:
    network = FeatureNetwork("identity", "0" * 64, "signed", None, images=lambda x: [x])
    video = turning(0)
    wrong = video.clone()
    wrong[:, :, :BEGIN] = 0  # the model saw another clip: of no effect
    true = video[:, :, BEGIN : BEGIN + GAP]
    for made, expected in ((true, 0.0), (-true, None)):
        found = run("gap_lpips", filled(clip(video), made), perceptual=Perceptual(network))
        value = found.rows["a", "a-0"]["gap_lpips"]
        assert value == pytest.approx(expected) if expected is not None else value > 0.1


def test_clip_rs_sees_the_frame_on_each_side() -> None:
    video = turning(0, 0.02)
    sides = video[:, :, :BEGIN], video[:, :, BEGIN + GAP :]
    truth, cut = video[:, :, BEGIN : BEGIN + GAP], held(*sides, GAP)
    found = [
        run("clip_rs", filled(clip(video), made), embedder=OWN).rows["a", "a-0"]["clip_rs"] for made in (truth, cut)
    ]
    assert found[0] == pytest.approx(1)
    whole = to_model(bytes_of(torch.cat([sides[0], cut, sides[1]], dim=2)))
    around = slice(BEGIN - 1, BEGIN + GAP + 1)
    seen = [transitions.embedded(OWN.embeddings, each[0, :, around]) for each in (whole, to_model(bytes_of(video)))]
    assert found[1] == pytest.approx(transitions.clip_rs(*seen)) and found[1] < 0.9999


def test_a_memory_is_measured_by_age_beside_its_bound_and_the_last_frame() -> None:
    source = turning(0)
    source[:, :, -1] = 0.5  # unlike the others, as the first one is not
    frames = source.shape[2]
    ages = torch.arange(frames).flip(0)
    errors = 0.01 * (1 + ages)  # the older, the more
    made = source + errors[:, None, None]
    kept = clip(source)
    recalls = [Retrieved(kept, kept.video, bytes_of(made), kept.video)]
    found = load("retrieval").run(
        subject(None, {"model": "memory_dit", "stage": "retrieval"}), Fixed(suite(), recalls=recalls)
    )
    row, curve = found.rows["a", "a-0"], found.curves["psnr_retrieved"]
    assert row["psnr_bound"] == 100 and row["ssim_bound"] == pytest.approx(1)
    assert list(curve) == [n / FPS for n in range(frames)]
    values = [curve[n / FPS]["a"] for n in range(frames)]
    assert values == sorted(values, reverse=True) and values[0] - values[-1] > 15
    by_frame = psnr_by_frame(to_model(bytes_of(made)), to_model(kept.video))[0].tolist()
    assert values == pytest.approx(by_frame[::-1])
    true = to_model(kept.video)
    assert row["psnr_copy_last"] == pytest.approx(psnr(true[:, :, -1:].expand_as(true), true).item())
    assert row["psnr_retrieved"] == pytest.approx(psnr(to_model(bytes_of(made)), true).item())


def test_an_image_encoder_is_named_by_its_digest_and_refused_in_one_line(tmp_path: Path) -> None:
    own = Brought(Networks(embedder="own"), suite().clips)
    assert own.record(["embedder"]) == {"embedder": {"digest": OWN.digest, "embedding": "pixels", "resize": 32}}
    network = tmp_path / "videos.pt"
    torch.jit.script(OfVideos()).save(network)
    for name, said in (("videos.pt", "takes whole videos; name a network of pictures"), ("none.pt", "no such file")):
        with pytest.raises(UserError, match=said) as e:
            _ = Brought(Networks(embedder=str(tmp_path / name)), suite().clips).embedder
        assert "\n" not in str(e.value)


class OfVideos(nn.Module):
    """A feature network of whole videos."""

    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        return x.mean((2, 3, 4))
