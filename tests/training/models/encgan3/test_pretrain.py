"""The stage that trains EncGAN3: its losses, its phases, resumed exactly, the same under ZeRO and on two ranks, its refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import latent_stages
import pytest
import torch
from flat import nested
from latent_stages import fit, prepared
from pydantic import ValidationError
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.datasets.loader import to_model
from longtake.pipeline.config import FrameDiffConfig
from longtake.training import registry
from longtake.training.models import judge_of
from longtake.training.models.encgan3 import losses, pretrain
from longtake.training.models.encgan3.discriminators import Discriminators
from longtake.training.models.encgan3.model import EncGAN3
from longtake.training.models.encgan3.pretrain import Config, check, warnings
from longtake.training.models.kind import Judged
from longtake.training.objective import Turn
from longtake.training.registry import disk
from longtake.training.registry.gate import Window

pytestmark = pytest.mark.usefixtures("one_thread", "group")

MODEL: dict[str, Any] = {
    "preset": "encgan3_tiny", "size": 16, "width": 4, "content": 8, "movement": 4, "attention": 8, "differences": "signed"
}  # fmt: skip
QUICK: dict[str, Any] = {
    "kind": "pretrain_encgan3",
    "dataset": "dataset",
    "model": MODEL,
    "recall": True,
    "steps": 3,
    "batch": 2,
    "lr": 1e-3,
    "workers": 0,
    "log_every": 1,
    "checkpoint_every": 1,
    "sample_every": 3,
    "heldout_every": 3,
    "heldout_clips": 1,
    "eval_clips": 2,
    "eval_swaps": 1,
    "eval_videos": 1,
    "eval_bin": 14,
}


def config(**changes: Any) -> Config:
    return Config(**nested(QUICK | changes))


def pixels(frames: int = 28, batch: int = 2) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, frames, 16, 16), generator=rng, dtype=torch.uint8)


def turn(chosen: Config, step: int = 0, judged: bool = True) -> Turn:
    torch.manual_seed(0)
    engines: dict[str, Any] = {"generator": EncGAN3(chosen.encgan3())}
    if judged:
        engines["discriminator"] = SimpleNamespace(module=Discriminators(16, 4, "group", 2))
    frames = 28 if chosen.recall else 16
    return Turn("generator", engines, {"video": pixels(frames)}, step, torch.Generator().manual_seed(0), 5, {})


def loss_of(chosen: Config, at: Turn) -> tuple[Tensor, dict[str, Tensor]]:
    return pretrain._loss(chosen, at.engines["generator"], at)


@pytest.mark.parametrize("recall", [False, True])
def test_the_loss_is_the_weighted_sum(recall: bool) -> None:
    weights = {"l1": 3.0, "l2": 4.0, "kl": 0.5, "frame": 2.0, "gan": 0.7, "range": 5.0, "drift": 11.0}
    changes = {f"lambda_{name}": value for name, value in weights.items()}
    chosen = config(recall=recall, steps=10, kl_warmup=0.5, gan_start=2, **changes)
    for step in (0, 2, 9):
        at = turn(chosen, step)
        loss, terms = loss_of(chosen, at)
        rise = min(1, (step + 1) / 5)
        expected = 3 * terms["l1"] + 4 * terms["l2"] + 0.5 * rise * terms["kl"]
        expected = expected + 2 * terms["frame"] + 5 * terms["range"]
        assert ("gan_clip" in terms) == (step >= 2) == ("seen" in at.carry)
        if step >= 2:
            expected = expected + 0.7 * (terms["gan_clip"] + terms["gan_frame"]) + 11 * terms["drift"]
            shown = at.carry["seen"]
            assert shown.real.shape == (2, 16, 3, 16, 16) and shown.made.shape == (4, 16, 3, 16, 16)
            judge = at.engines["discriminator"].module
            total, _ = losses.judging(judge, shown, "hinge")
            own, _ = loss_of(chosen, at._replace(name="discriminator", engines=at.engines | {"discriminator": judge}))
            torch.testing.assert_close(own, 0.7 * total)
        torch.testing.assert_close(loss.detach(), expected)
    heldout = loss_of(chosen, turn(chosen, 9, judged=False))[1]
    assert {"l1", "l2", "kl", "frame", "range", "loss"} == heldout.keys(), "held-out clips have no discriminator"


def test_real_windows_are_of_the_time_of_those_that_are_made_and_have_the_joint() -> None:
    chosen, starts = config(anywhere=0.0), set()
    real = to_model(pixels()).transpose(1, 2)
    for seed in range(40):
        at = turn(chosen)._replace(seed=seed)
        loss_of(chosen, at)
        shown = at.carry["seen"]
        (start,) = [n for n in range(13) if torch.equal(shown.real, real[:, n : n + 16])]
        starts.add(start)
        if not start:
            # the first clip begins with its reference, the real frame
            assert torch.equal(shown.made[:2, 0], real[:, 0])
    assert len(starts) > 8 and max(starts) == 12


def test_the_column_of_differences_is_what_the_model_would_compute(dataset: str, tmp_path: Path) -> None:
    model = MODEL | {"size": 32, "differences": "absolute"}
    chosen = config(model=model, differences="column")
    setup = prepared(chosen, {"dataset": dataset}, tmp_path, pretrain)
    batch = next(iter(pretrain.loader(chosen, setup, 0, 1)))
    video = to_model(batch["video"]).transpose(1, 2)
    read = pretrain.differences(chosen, setup.model, batch, video)
    computed = pretrain.differences(config(model=model), setup.model, batch, video)
    assert read.abs().max() > 0.1
    torch.testing.assert_close(read, computed, rtol=0, atol=1e-6)
    pretrain.objective(chosen, setup)
    small = config(model=MODEL | {"differences": "absolute"}, differences="column")
    with pytest.raises(
        UserError, match=r"differences: column: the dataset's frame_diff is .*, frames are 16x16; choose"
    ):
        pretrain.objective(small, prepared(small, {"dataset": dataset}, tmp_path, pretrain))


@pytest.mark.parametrize(
    "changes",
    [
        {"spectral": True, "adversarial": "log", "zero_stage": 1, "precision": "bf16"},
        {"zero_stage": 3, "precision": "bf16", "accumulate": 2},
    ],
    ids=str,
)
def test_a_training_stopped_after_each_step_goes_on_exactly(dataset: str, tmp_path: Path, changes: Any) -> None:
    chosen, given, log = config(**changes), {"dataset": dataset}, latent_stages.Log()
    straight = fit(pretrain, chosen, given, tmp_path / "straight", log=log)
    for step in (1, 2):
        fit(pretrain, chosen, given, tmp_path / "stopped", until=step)
    again = fit(pretrain, chosen, given, tmp_path / "stopped")
    torch.testing.assert_close(again, straight, atol=0, rtol=0)
    assert {"l1", "kl", "gan_clip", "gan_frame", "drift", "discriminator", "judged_made_clip"} <= log.steps[0].keys()
    assert log.videos == {"reconstructed": (28, 16, 48, 3)}


def test_latents_of_a_random_model_are_scaled_once_and_those_of_a_parent_never(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, calls = {"dataset": dataset}, list[Tensor]()
    scale = EncGAN3.scale_latents
    monkeypatch.setattr(EncGAN3, "scale_latents", lambda self, video: (calls.append(video), scale(self, video))[1])
    torch.manual_seed(0)
    first = pretrain.prepare(config(), given, tmp_path / "new").model
    torch.manual_seed(0)
    again = pretrain.prepare(config(), given, tmp_path / "new").model
    torch.testing.assert_close(first.state_dict(), again.state_dict(), atol=0, rtol=0)
    assert len(calls) == 2 and calls[0].shape == (pretrain.SCALED_BY, 16, 3, 16, 16)
    fit(pretrain, config(sample_every=0), given, tmp_path / "trained", until=1)
    count = len(calls)
    pretrain.prepare(config(), given, tmp_path / "trained")
    assert len(calls) == count, "a checkpoint has all weights"


def test_every_stage_of_zero_learns_the_same(dataset: str, tmp_path: Path) -> None:
    given = {"dataset": dataset}
    plain = fit(pretrain, config(sample_every=0), given, tmp_path / "0")
    for zero in (1, 2, 3):
        weights = fit(pretrain, config(sample_every=0, zero_stage=zero), given, tmp_path / str(zero))
        torch.testing.assert_close(weights, plain, atol=2e-5, rtol=1e-3, msg=lambda text, zero=zero: f"{zero}: {text}")


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(dataset: str, tmp_path: Path, module_ranks: Callable[[int, str], Any]) -> None:
    pair, given = module_ranks(2, latent_stages.rank_of(pretrain)), {"dataset": dataset}
    for zero in (0, 3):
        settings = nested(QUICK | {"zero_stage": zero, "sample_every": 0, "gradient_clip": 0.0})
        alone = fit(pretrain, Config(**settings), given, tmp_path / f"one-{zero}")
        pair.send({"settings": settings, "inputs": given, "folder": str(tmp_path / f"two-{zero}")})
        both = pair.answers()
        assert both[0] == both[1]
        for name, value in alone.items():
            torch.testing.assert_close(torch.tensor(both[0][name]), value, atol=2e-5, rtol=1e-3, msg=name)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        yield from latent_stages.mlflow_run(tmp_path_factory.mktemp("store"), patch)


@pytest.mark.slow
def test_it_is_measured_registered_and_judged(dataset: str, store: str, tmp_path: Path) -> None:
    given, out = {"dataset": dataset}, tmp_path / "out"
    result = pretrain.run(config(), given, str(out))
    assert result["uri"] == "models:/encgan3/1" and result["metrics"]["train_clips"] > 0
    summary = json.loads((out / "checkpoints" / "heldout" / pretrain.SUMMARY).read_text())["summary"]
    assert summary["l1"] > 0

    model, facts = registry.load_with_facts("models:/encgan3@champion")
    assert isinstance(model, EncGAN3) and facts["recall"]
    assert facts["window"] == {"frames": 28, "stride": 1, "size": [16, 16], "fps": 12.0}
    judge, judged = judge_of(facts), Judged("", model.eval(), facts)
    with torch.no_grad():
        figures = judge.figures(judged, {"video": pixels(28, 1)}, None, 0, 1.0)
        assert figures.keys() == judge.better.keys()
        assert judge.figures(judged, {"video": pixels(20, 1)}, None, 0, 1.0).keys() == {"l1", "psnr", "ssim"}
        with pytest.raises(ValueError, match="it has 9 frames, a clip of the model 16"):
            judge.figures(judged, {"video": pixels(9, 1)}, None, 0, 1.0)
    assert judge.options(judged, given, Window(frames=28)) == {
        "columns": {"video": "video"}, "stride": None, "size": (16, 16)
    }  # fmt: skip


def test_the_seam_of_a_judge_is_the_error_of_the_change_at_the_joint() -> None:
    from longtake.training.models.encgan3.judge import compared

    torch.manual_seed(0)
    model, video = EncGAN3(config().encgan3()).eval(), to_model(pixels(28, 1))
    nn.init.zeros_(model.generator.to_differences.weight)
    still = compared(model, video)
    # nothing moves: each frame is the first, and the error at the joint is the change of the clip itself
    assert still["l1"] == pytest.approx((video[:, :, :16] - video[:, :, :1]).abs().mean().item() / 2)
    assert still["seam"] == pytest.approx((video[:, :, 14] - video[:, :, 13]).abs().mean().item() / 2)


def test_phase_gan_continues_a_parent_whose_encoders_stay(dataset: str, tmp_path: Path) -> None:
    given = {"dataset": dataset}
    first = config(phase="vae", recall=False, sample_every=0)
    assert first.lambda_gan == 0
    weights = fit(pretrain, first, given, tmp_path / "vae")
    disk.save(tmp_path / "model", "encgan3", first.encgan3().model_dump(mode="json"), weights, {"lineage": {}})
    inputs = given | {"parent": str(tmp_path / "model")}
    second = config(phase="gan", parent="vae", model=None, recall=False, sample_every=0)
    after = fit(pretrain, second, inputs, tmp_path / "gan")
    for name, value in weights.items():
        frozen = name.startswith(("content.", "movement."))
        assert torch.equal(after[name], value) or not frozen, name
    assert not torch.equal(after["generator.to_frame.weight"], weights["generator.to_frame.weight"])
    with pytest.raises(UserError, match="model: is not that of the parent"):
        prepared(config(parent="vae", model=MODEL | {"width": 8}), inputs, tmp_path / "other", pretrain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phase": "gan"}, "parent: phase gan needs a model with encoders"),
        (
            {"phase": "gan", "parent": "vae", "lambda_gan": 0},
            "lambda_gan: is 0, and phase gan trains with discriminators",
        ),
        ({"phase": "vae", "lambda_gan": 1}, "lambda_gan: is 1, and phase vae has no discriminators"),
        ({"spectral": True, "zero_stage": 3}, "spectral: ZeRO stage 3 splits the weights"),
        ({"lora": {"rank": 2}}, "lora: without a parent all else would stay random"),
        ({"differences": "column"}, "differences: column: has absolute ones, the model takes signed"),
        ({"differences": "column", "stride": 2, "model": MODEL | {"differences": "absolute"}}, "stride is not 1"),
        ({"model": {"preset": "huge"}}, "unknown preset 'huge'"),
        ({"model": {"preset": ["huge"]}}, "unknown preset ['huge']"),
        ({"phase": ["vae"]}, "Input should be 'joint', 'vae' or 'gan'"),
        ({"lambda_gan": float("inf")}, "Input should be a finite number"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as e:
        config(**changes)
    (error,) = e.value.errors()
    assert message in error["msg"] and "\n" not in error["msg"]


def test_clips_too_short_for_two_that_overlap_are_refused(dataset: str, tmp_path: Path) -> None:
    def shards(frames: int, side: int = 16, diff: int = 16) -> Any:
        clip = SimpleNamespace(short_side=side, max_frames=frames)
        return SimpleNamespace(clip=clip, frame_diff=FrameDiffConfig(short_side=diff))

    wide = MODEL | {"differences": "absolute"}
    for changes, made, message in (
        ({}, shards(27), "recall: two clips of 16 frames that overlap by 4 span 28 frames, the dataset's clips have at most 27"),
        ({"recall": False}, shards(15), "model: its frames span 16 frames, the dataset's clips have at most 15"),
        ({"stride": 2}, shards(54), "span 55 frames"),
        ({}, shards(28, 8), "model: size 16 is larger than clip.short_side 8"),
        ({"model": wide, "differences": "column"}, shards(28, 32), "is of clips with short side 32, frames are 16"),
        ({"model": wide, "differences": "column"}, shards(28, 16, 8), "set frame_diff.short_side of the dataset to 16"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            check(config(**changes), {"dataset": made})
    check(config(), {"dataset": shards(28)})
    for frames in (28, 64):
        chosen = config(model=MODEL | {"frames": frames, "overlap": 4})
        with pytest.raises(
            UserError, match=r"two clips of .* frames overlap by 4; leave out recall, or cut longer"
        ) as e:
            prepared(chosen, {"dataset": dataset}, tmp_path, pretrain)
        assert "\n" not in str(e.value)


def test_a_parent_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="parent: a pretrain_vae stage makes no EncGAN3"):
        check(config(parent="vae", model=None), {"parent": SimpleNamespace(kind="pretrain_vae")})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="model: is not that of the parent"):
        check(config(parent="vae", model=MODEL | {"width": 8}), {"parent": config()})


def test_a_parent_may_have_the_model_of_its_own_parent() -> None:
    shards: Any = SimpleNamespace(clip=SimpleNamespace(short_side=16, max_frames=99), frame_diff=None)
    check(config(parent="gan", model=None), {"parent": config(parent="vae", model=None), "dataset": shards})


def test_what_is_rarely_meant_is_said() -> None:
    assert "lambda_gan: training ends at step 3" in warnings(config(gan_start=9))[0]
    assert "recall: without discriminators" in warnings(config(lambda_gan=0))[0]
    (line,) = warnings(config(recall=False, anywhere=0))
    assert line.startswith(
        "anywhere: 0, so no clip begins from its frame 1, as those of long videos do; set model.reference to 12"
    )
    assert not warnings(config(recall=False, anywhere=0, model=MODEL | {"reference": 12}))
    assert not warnings(config())
