"""The stage that trains a VQGAN: its losses, resumed exactly, measured, registered, judged and served; and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import latent_stages
import numpy as np
import pytest
import torch
from flat import nested
from latent_stages import fit
from pydantic import ValidationError
from tats_stages import VQGAN_TINY
from torch import Tensor, nn

from longtake.datasets import clip
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.loader import to_model
from longtake.training import registry
from longtake.training.models import judge_of
from longtake.training.models.common.patchgan import config_from_preset
from longtake.training.models.kind import Judged
from longtake.training.models.tats import pretrain
from longtake.training.models.tats.pretrain import Config, check, warnings
from longtake.training.models.tats.vqgan import VQGAN
from longtake.training.models.tats.vqgan_losses import Discriminators, frame_numbers, frames_at, judging, pleasing
from longtake.training.objective import Turn
from longtake.training.registry.gate import Window

pytestmark = pytest.mark.usefixtures("one_thread", "group")

QUICK: dict[str, Any] = VQGAN_TINY | {
    "checkpoint_every": 2,
    "sample_every": 4,
    "heldout_every": 4,
    "heldout_clips": 1,
    "eval_clips": 3,
}


def config(**changes: Any) -> Config:
    return Config(**nested(QUICK | changes))


def video(batch: int = 2, frames: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, frames, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def discriminators() -> Discriminators:
    torch.manual_seed(0)
    return Discriminators(config_from_preset("patchgan_tiny", width=4, groups=2))


def test_one_random_frame_of_each_clip() -> None:
    rng = torch.Generator().manual_seed(0)
    numbers = torch.stack([frame_numbers(video(), rng) for _ in range(60)])
    assert set(numbers[:, 0].tolist()) == set(numbers[:, 1].tolist()) == set(range(8))
    assert (numbers[:, 0] != numbers[:, 1]).any()
    frames = frames_at(video(), torch.tensor([3, 0]))
    assert torch.equal(frames, torch.stack([video()[0, :, 3:4], video()[1, :, :1]]))


def test_losses_of_the_discriminators_are_those_of_the_formulas() -> None:
    judges, made, real, numbers = discriminators(), video(seed=1).requires_grad_(), video(), torch.tensor([3, 0])
    pairs = [(judges.image, frames_at(made, numbers), frames_at(real, numbers)), (judges.video, made, real)]
    hinge, matching = pleasing(judges, made, real, numbers)
    torch.testing.assert_close(hinge, -sum(judge(fake).mean() for judge, fake, _ in pairs))
    layers = [zip(judge.features(fake)[:-1], judge.features(true)[:-1], strict=True) for judge, fake, true in pairs]
    torch.testing.assert_close(matching, sum((a - b).abs().mean() for each in layers for a, b in each))
    assert pleasing(judges, real, real, numbers)[1] == 0
    loss, terms = judging(judges, made.detach(), real, numbers)
    expected = sum(
        0.5 * (torch.relu(1 - judge(true)).mean() + torch.relu(1 + judge(fake)).mean()) for judge, fake, true in pairs
    )
    torch.testing.assert_close(loss, expected)
    assert terms["judged_real_video"].item() == pytest.approx(judges.video(real).mean().item(), abs=1e-6)
    assert terms["judged_made_image"].item() == pytest.approx(judges.image(pairs[0][1]).mean().item(), abs=1e-6)


class Halved(nn.Module):
    """A generator whose reconstruction is half of the video, and whose commitment loss is 3."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[bool] = []

    def forward(self, x: Tensor, quantise: bool = True) -> tuple[Any, ...]:
        self.asked.append(quantise)
        zero = torch.zeros(())
        return x / 2, None, torch.tensor(3.0), SimpleNamespace(share=zero, perplexity=zero)


def turn(step: int, judges: nn.Module | None = None) -> Turn:
    engines: dict[str, Any] = {"generator": Halved()}
    if judges is not None:
        engines["discriminator"] = SimpleNamespace(module=judges)
    batch = {"video": ((video() + 1) * 127.5).round().to(torch.uint8)}
    return Turn("generator", engines, batch, step, torch.Generator().manual_seed(0), 0, {})


def test_the_loss_is_the_weighted_sum_and_hears_the_discriminators_from_their_start() -> None:
    chosen, judges = config(warm_steps=2, gan_start=3, steps=9, lambda_gan=0.5, lambda_features=7), discriminators()
    for step in (1, 2, 3):
        at = turn(step, judges)
        loss, terms = pretrain._loss(chosen, None, at)
        real = to_model(at.batch["video"])
        expected = 4 * real.abs().mean() / 4 + 0.25 * 3
        assert terms["l1"].item() == pytest.approx(real.abs().mean().item() / 4)
        assert at.engines["generator"].asked == [step >= 2]
        if step == 3:
            hinge, matching = pleasing(judges, real / 2, real, at.carry["numbers"])
            expected = expected + 0.5 * (hinge + 7 * matching)
        torch.testing.assert_close(loss, expected)
        assert ("gan" in terms) == (step == 3)
    assert "gan" not in pretrain._loss(chosen, None, turn(3))[1], "held-out clips have no discriminator"


@pytest.mark.parametrize(
    ("zero_stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16"), (0, "bf16")]
)
def test_a_training_stopped_after_each_step_goes_on_exactly(
    dataset: str, tmp_path: Path, zero_stage: int, precision: str
) -> None:
    chosen = config(zero_stage=zero_stage, precision=precision, model=QUICK["model"] | {"restart": 0.5, "decay": 0.5})
    given, log = {"dataset": dataset}, latent_stages.Log()
    straight = fit(pretrain, chosen, given, tmp_path / "straight", log=log)
    for step in (1, 2, 3):
        fit(pretrain, chosen, given, tmp_path / "stopped", until=step)
    again = fit(pretrain, chosen, given, tmp_path / "stopped")
    assert straight.keys() == again.keys()
    for name, value in straight.items():
        assert torch.equal(value, again[name]), name
    book = {name.removeprefix("codebook."): value for name, value in straight.items() if name.startswith("codebook.")}
    assert book["codes"].dtype == torch.float32 and not torch.equal(book["codes"], book["codes"].bfloat16().float())
    assert book["updates"] == 3, "no update while warming up"
    assert {"l1", "commitment", "usage", "perplexity"} <= log.steps[0].keys()
    assert {"gan", "features", "discriminator"} <= log.steps[2].keys() - log.steps[1].keys()
    assert log.videos == {"reconstructed": (8, 16, 32, 3)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        yield from latent_stages.mlflow_run(tmp_path_factory.mktemp("store"), patch)


def test_it_is_measured_registered_judged_and_served(dataset: str, store: str, tmp_path: Path) -> None:
    import mlflow

    given, out = {"dataset": dataset}, tmp_path / "out"
    result = pretrain.run(config(eval_probes=2), given, str(out))
    assert result["uri"] == "models:/vqgan/1"
    heldout = out / "checkpoints" / "heldout"
    record = json.loads((heldout / "reconstructed.json").read_text())
    summary = record["summary"]
    assert {
        "l1",
        "psnr",
        "ssim",
        "latent_error",
        "usage",
        "perplexity",
        "score",
        "kappa",
        "ltd_rising",
    } <= summary.keys()
    assert summary["score_paper"] == pytest.approx(summary["score"] / 2), "two latent frames, one of them compared"
    assert [step for step, _ in summary["series"]["equal_tokens_by_step"]] == [1]
    assert 1 <= summary["perplexity"] <= 32 and 1 / 32 <= summary["usage"] <= 1
    assert {row["trivial"] for row in summary["against"]} >= {"the clip's mean colour", "chance"}
    assert all(result["metrics"][name] == summary[name] for name in ("psnr", "kappa", "usage"))
    shown = [clip.decode((heldout / row["file"]).read_bytes()) for row in record["clips"]]
    assert len(shown) == 3 and shown[0].shape == (8, 48, 96, 3)

    model, facts = registry.load_with_facts("models:/vqgan@champion")
    assert isinstance(model, VQGAN) and facts["window"] == {"frames": 8, "stride": 1, "size": [16, 16]}
    judge = judge_of(facts)
    batch = {"video": ((video(1) + 1) * 127.5).round().to(torch.uint8)}
    figures = judge.figures(Judged("", model, facts), batch, None, 0, 1.0)
    assert figures.keys() == judge.better.keys() and figures["psnr"] > 0
    assert judge.options(Judged("", model, facts), given, Window(frames=8, stride=2)) == {
        "columns": {"video": "video"}, "stride": 2, "size": (64, 64)
    }  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (1, 8, 16, 16, 3), np.uint8)
    served = mlflow.pyfunc.load_model("models:/vqgan/1").predict(pixels)
    assert served.shape == pixels.shape and served.dtype == np.uint8
    with pytest.raises(UserError, match=r"videos: video has 7 frames; VQGAN needs 4n"):
        mlflow.pyfunc.load_model("models:/vqgan/1").predict(pixels[:, :7])


def test_clips_no_longer_than_a_window_are_measured_without_equivariance(dataset: str, tmp_path: Path) -> None:
    chosen = config(frames=36)
    setup = latent_stages.prepared(chosen, {"dataset": dataset}, tmp_path, pretrain)
    assert pretrain._shifted(chosen, setup) is None
    assert pretrain._shifted(config(), setup) is not None


def test_defaults_are_the_papers_and_the_tiny_preset_warms_up() -> None:
    paper = Config(kind="pretrain_vqgan", dataset="shards")
    assert (paper.vae().codes, paper.batch, paper.lr, paper.betas, paper.gan_start) == (
        16384,
        96,
        9e-5,
        (0.5, 0.9),
        10_000,
    )
    assert (paper.warm_steps, paper.vae().restart, paper.ema_half_lives) == (0, 0.0, ())
    tiny = Config(kind="pretrain_vqgan", dataset="shards", model={"preset": "vqgan_tiny"})
    assert (tiny.warm_steps, tiny.vae().restart) == (200, 0.1)
    assert config(warm_steps=3).warm_steps == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 9}, "frames 9: the model needs 4n frames, such as 8 or 12"),
        ({"size": (18, 16)}, "size 18x16: the model needs multiples of 4"),
        ({"warm_steps": 4}, "warm_steps 4: leave none of 4 steps to the codebook; lower them"),
        ({"lora": {"rank": 2}}, "lora: all else would stay random; leave it out"),
        ({"model": {"preset": "huge"}}, "unknown preset 'huge'"),
        ({"discriminator": {"width": 3}}, "groups is 32"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as e:
        config(**changes)
    (error,) = e.value.errors()
    assert message in error["msg"] and "\n" not in error["msg"]


def test_a_window_that_no_clip_fills_is_refused(dataset: str) -> None:
    shards: Any = SimpleNamespace(clip=SimpleNamespace(short_side=32, max_frames=30))
    for changes, message in (
        ({"frames": 32}, "frames: a window spans 32 frames, the dataset's clips have at most 30"),
        ({"size": (64, 64)}, "size: 64 is larger than clip.short_side 32 of the dataset"),
    ):
        with pytest.raises(ValueError, match=message):
            check(config(**changes), {"dataset": shards})
    check(config(), {"dataset": shards})
    setup = pretrain.Setup({"dataset": dataset}, VQGAN(config().vae()))
    with pytest.raises((UserError, Failure), match="no usable sample"):
        pretrain.loader(config(frames=400), setup, 0, 1)


def test_what_is_rarely_meant_is_said() -> None:
    assert "lambda_gan: training ends at step 4" in warnings(config(gan_start=9))[0]
    assert "lambda_gan: without a perceptual loss" in warnings(config())[0]
    assert not warnings(config(lambda_gan=0))
