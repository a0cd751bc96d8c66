"""The stage that trains a model of gaps: its loss, resumed exactly, the same on two ranks, measured, and its refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import foreign_codecs
import latent_stages
import public_unet
import pytest
import torch
from flat import nested
from latent_stages import fit, prepared
from pydantic import ValidationError
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.datasets.loader import to_model
from longtake.training import registry
from longtake.training.models import judge_of
from longtake.training.models.kind import Judged
from longtake.training.models.mavin import finetune
from longtake.training.models.mavin.finetune import Config, check, draw
from longtake.training.models.mavin.model import Mavin
from longtake.training.models.mavin.windows import cut
from longtake.training.models.tats.vqgan import VQGAN, config_from_preset
from longtake.training.registry import disk
from longtake.training.registry.gate import Window

pytestmark = pytest.mark.usefixtures("one_thread", "group")

MODEL: dict[str, Any] = {"preset": "mavin_tiny", "depth": 2, "width": 16, "heads": 2, "patch": 4}
UNET: dict[str, Any] = {"preset": "mavin_unet_tiny", "widths": (16, 32)}
QUICK: dict[str, Any] = {
    "kind": "finetune_mavin",
    "dataset": "dataset",
    "model": MODEL,
    "frames": 7,
    "size": (16, 16),
    "steps": 3,
    "batch": 2,
    "lr": 1e-3,
    "workers": 0,
    "log_every": 1,
    "checkpoint_every": 1,
    "sample_every": 3,
    "heldout_every": 3,
    "heldout_clips": 1,
    "sample_steps": 2,
    "ema_half_lives": [],
    "eval_clips": 2,
    "eval_videos": 1,
}


def config(**changes: Any) -> Config:
    return Config(**nested(QUICK | changes))


def saved(chosen: Config, inputs: dict[str, str], folder: Path) -> str:
    """The folder of a model that has learned nothing."""
    torch.manual_seed(0)
    setup = prepared(chosen, inputs, folder / "untrained", finetune)
    origins = {"vae": {"uri": inputs["vae"]}} if chosen.vae else {}
    facts = finetune.facts(chosen, setup, {"inputs": origins}) | {"lineage": {}}
    sizes, weights = setup.model.config.model_dump(mode="json"), setup.model.state_dict()
    disk.save(folder / "model", "mavin", sizes, weights, facts)
    return str(folder / "model")


@pytest.fixture(scope="module")
def inputs(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        "dataset": dataset,
        "vae": latent_stages.saved(latent_stages.vae(), tmp_path_factory.mktemp("mavin") / "vae"),
    }


def latents(**changes: Any) -> Config:
    """Of latents: 14 frames are 5 latents of one pixel of 16."""
    return config(**{"vae": "vae", "frames": 14, "size": (32, 32), "model": MODEL | {"patch": 1}} | changes)


def batch_of(chosen: Config, setup: Any, count: int = 2) -> dict[str, Any]:
    loaded = finetune.loader_of(chosen, setup, "train", batch=count)
    return dict(next(iter(loaded)))


@pytest.mark.parametrize("clean_time", ["zero", "same"])
def test_the_loss_is_of_the_span_of_each_window_alone(inputs: dict[str, str], tmp_path: Path, clean_time: str) -> None:
    chosen = latents(model=MODEL | {"patch": 1, "clean_time": clean_time}, flip=0.0, least_similarity=-1.0)
    setup = prepared(chosen, inputs, tmp_path, finetune)
    batch, seen = batch_of(chosen, setup, 4), list[Any]()

    def engine(*given: Any) -> Tensor:
        seen.append(given)
        return torch.zeros_like(given[0])

    loss, terms = finetune._loss(chosen, setup, latent_stages.turn(engine, batch, torch.Generator()))
    ((x, times, length, text, text_mask, image, image_mask),) = seen
    draws = draw(chosen, setup, 0, range(4))
    assert len({tuple(row) for row in draws.mask.tolist()}) > 1, "spans differ in a batch"
    assert set(draws.early) <= {0, 1, 2, 3} and len(set(draws.early)) > 1, "clips begin early by any frames"
    assert length.tolist() == [4 * int(n) - early for n, early in zip(draws.mask.sum(1), draws.early, strict=True)]
    assert text is None and text_mask is None
    assert image.shape == (4, 2, 64, 64) and image_mask.shape == (4, 2)
    expected = draws.t[:, None] * draws.mask if clean_time == "zero" else draws.t[:, None].expand(4, 5)
    assert torch.equal(times, expected)
    video = to_model(batch["video"])
    x0 = setup.model.normalise(finetune.latents_of(setup, video, draws.spans, draws.early))
    inside = draws.mask[:, None, :, None, None].expand_as(x)
    assert torch.equal(x[~inside], x0[~inside])
    errors = (draws.noise - x0).square().mean((1, 3, 4))
    own = torch.stack([row[mask].mean() for row, mask in zip(errors, draws.mask, strict=True)])
    torch.testing.assert_close(loss, own.mean())
    assert terms["cuts"] == 0


def test_what_a_model_sees_of_a_window_does_not_know_its_middle(inputs: dict[str, str], tmp_path: Path) -> None:
    """The whole way from pixels to the arguments of the model; the noise hides the middle at t = 1."""
    chosen = latents(flip=0.0, least_similarity=-1.0, time_mean=100.0)
    setup = prepared(chosen, inputs, tmp_path, finetune)
    batch, seen = batch_of(chosen, setup, 1), list[Any]()
    other = dict(batch, video=batch["video"].clone())
    draws = draw(chosen, setup, 0, [0])
    numbers = torch.arange(14.0).expand(1, 3, 16, 16, 14).movedim(4, 2)
    begin, stop = finetune.boundary_frames(setup.codec, numbers, draws.spans, draws.early)[0, :, 0, 0, 0].tolist()
    other["video"][:, :, int(begin) + 1 : int(stop)] ^= 255

    def engine(*given: Any) -> Tensor:
        seen.append(given)
        return torch.zeros_like(given[0])

    losses = [
        finetune._loss(chosen, setup, latent_stages.turn(engine, each, torch.Generator()))[0] for each in (batch, other)
    ]
    assert losses[0] != losses[1]
    for one, two in zip(*seen, strict=True):
        assert (one is None and two is None) or torch.equal(one, two)


def test_draws_depend_on_places_not_on_ranks(dataset: str, tmp_path: Path) -> None:
    chosen = config(flip=0.5)
    setup = prepared(chosen, {"dataset": dataset}, tmp_path, finetune)
    whole, second = draw(chosen, setup, 7, range(4)), draw(chosen, setup, 7, range(2, 4))
    for one, two in zip(whole, second, strict=True):
        assert one[2:] == two if isinstance(one, list) else torch.equal(one[2:], two)
    many = draw(chosen, setup, 7, range(400))
    shares = [each.float().mean().item() for each in (many.flipped, many.textless, many.blind)]
    assert shares == pytest.approx([0.5, 0.1, 0.1], abs=0.06)
    both = (many.textless & many.blind).float().mean().item()
    assert both < 0.05, "text and frames are lost each for itself"
    measured = draw(chosen, setup, 7, range(400), learning=False)
    assert not (measured.flipped | measured.textless | measured.blind).any()


def test_windows_with_a_cut_do_not_count(dataset: str, tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    still = torch.rand(1, 3, 1, 32, 32, generator=rng).expand(-1, -1, 6, -1, -1) * 2 - 1
    jumps = still.clone()
    jumps[:, :, 3:] = torch.rand(1, 3, 1, 32, 32, generator=rng) * 2 - 1
    assert cut(torch.cat([still, jumps]), 0.1).tolist() == [False, True]
    assert not cut(jumps, -1.0).any()

    chosen = config(flip=0.0, least_similarity=0.5)
    setup = prepared(chosen, {"dataset": dataset}, tmp_path, finetune)
    video = torch.rand(2, 3, 1, 16, 16, generator=rng).expand(-1, -1, 7, -1, -1).mul(255).byte().clone()
    batch = {"video": video, "key": ["a", "b"]}
    whole, _ = finetune._loss(chosen, setup, latent_stages.turn(lambda x, *_: x, batch, torch.Generator()))
    batch["video"] = video.clone()
    batch["video"][1, :, 3:] = 255 - batch["video"][1, :, 3:]
    loss, terms = finetune._loss(chosen, setup, latent_stages.turn(lambda x, *_: x, batch, torch.Generator()))
    assert terms["cuts"] == 0.5 and 0 < loss < whole


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"zero_stage": 3, "precision": "bf16", "accumulate": 2},
        {"base": "base", "model": None, "train": ("temporal", "attention", "embedding")},
    ],
    ids=["pixels", "zero", "unet"],
)
def test_a_training_stopped_after_a_step_goes_on_exactly(dataset: str, tmp_path: Path, changes: Any) -> None:
    given, log = {"dataset": dataset}, latent_stages.Log()
    if "base" in changes:
        given["base"] = saved(config(model=UNET), given, tmp_path)
    chosen = config(**changes)
    straight = fit(finetune, chosen, given, tmp_path / "straight", log=log)
    fit(finetune, chosen, given, tmp_path / "stopped", until=2)
    again = fit(finetune, chosen, given, tmp_path / "stopped")
    torch.testing.assert_close(again, straight, atol=0, rtol=0)
    assert {"loss", "cuts"} <= log.steps[0].keys() and log.videos == {"filled": (7, 20, 40, 3)}
    assert all(value.isfinite().all() for value in straight.values())


def test_only_the_parts_that_are_named_learn(dataset: str, tmp_path: Path) -> None:
    inputs = {"dataset": dataset}
    inputs["base"] = saved(config(model=UNET), inputs, tmp_path)
    chosen = config(base="base", model=None, train=("temporal",), sample_every=0)
    before = prepared(chosen, inputs, tmp_path / "before", finetune).model.state_dict()
    after = fit(finetune, chosen, inputs, tmp_path / "run")
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved and all("temp_convs" in name for name in moved)
    inputs["base"] = saved(config(model=UNET, image=None), {"dataset": dataset}, tmp_path / "blind")
    with pytest.raises(UserError, match="train: guidance: this model has no such part"):
        prepared(config(base="base", model=None, image=None, train=("guidance",)), inputs, tmp_path / "no", finetune)


def test_what_a_public_unet_lacks_learns_beside_the_parts_that_are_named(dataset: str, tmp_path: Path) -> None:
    chosen = config(unet=public_unet.folder(tmp_path / "unet"), model=UNET, train=("temporal",))
    model = prepared(chosen, {"dataset": dataset}, tmp_path / "run", finetune).model
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    new = {"guide.image_in.project.weight", "guide.image_in.project.bias", "guide.image_in.sides"}
    new |= {"body.time_embedding.cond_proj.weight"}
    assert new < learns and all("temp_convs" in name for name in learns - new)


def test_a_public_unet_is_given_latents_as_its_own_autoencoder_scales_them(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    foreign_codecs.CODECS["kl"][0]().save_pretrained(tmp_path / "kl")
    four = {"unet": public_unet.folder(tmp_path / "four", channels=4), "model": UNET, "vae": "vae", "frames": 8}
    own = prepared(config(**four), inputs | {"vae": str(tmp_path / "kl")}, tmp_path / "own", finetune).model
    assert not own.latent_mean.any() and (own.latent_std == 1).all()
    eight = four | {"unet": public_unet.folder(tmp_path / "eight", channels=8), "frames": 14, "size": (32, 32)}
    other = prepared(config(**eight), inputs, tmp_path / "other", finetune).model
    assert other.latent_mean.any() and (other.latent_std != 1).all()


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(
    inputs: dict[str, str], tmp_path: Path, module_ranks: Callable[[int, str], Any]
) -> None:
    pair = module_ranks(2, latent_stages.rank_of(finetune))
    for zero in (0, 3):
        chosen = latents(zero_stage=zero, sample_every=0, gradient_clip=0.0)
        alone = fit(finetune, chosen, inputs, tmp_path / f"one-{zero}")
        settings = chosen.model_dump(mode="json")
        pair.send({"settings": settings, "inputs": inputs, "folder": str(tmp_path / f"two-{zero}")})
        both = pair.answers()
        assert both[0] == both[1]
        for name, value in alone.items():
            torch.testing.assert_close(torch.tensor(both[0][name]), value, atol=2e-5, rtol=1e-3, msg=name)


def test_a_model_goes_on_from_a_base(inputs: dict[str, str], tmp_path: Path) -> None:
    given = inputs | {"base": saved(latents(), inputs, tmp_path)}
    weights, facts = disk.load(Path(given["base"])).state_dict(), disk.read_config(Path(given["base"]))
    longer = prepared(latents(base="base", model=None, frames=18), given, tmp_path / "second", finetune)
    torch.testing.assert_close(longer.model.state_dict(), weights, atol=0, rtol=0)
    assert longer.model.config.shape == (6, 2, 2) and facts["gap"] == [1, 12] and facts["context"] == [1, 5]
    with pytest.raises(UserError, match="by another encoder"):
        prepared(latents(base="base", model=None, image=None), given, tmp_path / "third", finetune)
    with pytest.raises(UserError, match="another autoencoder"):
        prepared(
            config(base="base", model=None), {k: v for k, v in given.items() if k != "vae"}, tmp_path / "4", finetune
        )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        yield from latent_stages.mlflow_run(tmp_path_factory.mktemp("store"), patch)


@pytest.mark.slow
def test_it_is_measured_registered_and_judged(inputs: dict[str, str], store: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = finetune.run(latents(), inputs, str(out))
    assert result["uri"] == "models:/mavin/1" and result["metrics"]["train_clips"] > 0
    summary = json.loads((out / "checkpoints" / "heldout" / finetune.SUMMARY).read_text())["summary"]
    assert summary["heldout_loss"] > 0 and summary["middle_psnr_faded"] > 0
    assert [gap for gap, _ in summary["series"]["heldout_loss_by_gap"]] == [4, 8, 12]

    model, facts = registry.load_with_facts("models:/mavin@champion")
    assert isinstance(model, Mavin) and facts["image"]["encoder"] == "own"
    judge, judged = judge_of(facts), Judged("", model.eval(), facts)
    options = judge.options(judged, inputs, Window(frames=14))
    assert options == {"columns": {"video": "video"}, "stride": None, "size": (32, 32)}
    video = torch.randint(0, 256, (1, 3, 14, 32, 32), dtype=torch.uint8)
    assert judge.figures(judged, {"video": video}, None, 0, 1.0)["loss"] > 0
    assert facts["sampling"]["mixer"] == "none" and facts["sampling"]["steps"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ("heads",), "unet": "folder", "model": UNET}, "train: unknown 'heads'; there are all, or temporal"),
        ({"train": ("temporal",)}, "train: without a base or unet all else would stay random"),
        ({"fps": 8.0, "stride": 2}, "fps: stride is given too"),
        ({"spans": {"kind": "random"}}, "random latents have no two frames beside them; set image: null"),
        ({"spans": {"kind": "random"}, "vae": "vae", "image": None}, "spans: random latents have no clip"),
        ({"train": "temporal"}, "write all, or a list of parts, such as [temporal]"),
        ({"train": None}, "write all, or a list of parts"),
        ({"spans": {"length": 3}}, "spans.length: variable spans have none; set spans.kind: fixed"),
        ({"size": (18, 16)}, "size: 18x16 must be multiples of 4, by model.patch 4"),
        ({"image": ""}, "at least 1 character"),
        ({"size": (0, 16)}, "greater than 0"),
        ({"time_mean": float("nan")}, "finite number"),
        ({"shift": float("inf")}, "finite number"),
        ({"image_guidance": float("inf")}, "finite number"),
        ({"model": {"preset": ["mavin_tiny"]}}, "unknown preset ['mavin_tiny']"),
        ({"model": {"preset": "mavin_unet_tiny", "widths": ()}}, "at least 1 item"),
        ({"model": MODEL | {"groups": 8}}, "model.groups: has no effect with body dit; leave it out"),
        ({"model": MODEL | {"image_dropout": 0.5}, "image": None}, "model.image_dropout: has no effect without image"),
        ({"spans": {"starts": (1, 6)}}, "do not fit a window of 7 latents"),
        ({"base": "base"}, "base: has its own numbers"),
        ({"unet": "folder"}, "unet: is of body unet"),
        ({"lora": {"rank": 2}}, "lora: without a base"),
        (
            {"model": MODEL | {"image_dropout": 0}, "image_guidance": 2},
            "image_guidance: is 2, and the model learns with image_dropout: 0",
        ),
        ({"model": MODEL | {"gap": (1, 2)}}, "gap follows from the stage's other settings"),
        ({"model": MODEL | {"text_dropout": 0.2}}, "text_dropout: has no effect without texts"),
        ({"model": {"preset": "huge"}}, "unknown preset 'huge'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as e:
        config(**changes)
    (error,) = e.value.errors()
    assert message in error["msg"] and "\n" not in error["msg"]


def test_windows_that_no_clip_or_autoencoder_has_are_refused(inputs: dict[str, str], tmp_path: Path) -> None:
    shards = SimpleNamespace(clip=SimpleNamespace(max_frames=12, fps=16))
    check(config(), {"dataset": shards})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="a window spans 13 frames"):
        check(config(fps=8.0), {"dataset": shards})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="fps: 60: the clips have 16 frames a second; set that or less"):
        check(config(fps=60.0), {"dataset": shards})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="makes no MAVIN"):
        check(config(base="b", model=None), {"base": SimpleNamespace(kind="pretrain_vae")})  # type: ignore[dict-item]
    for changes, message in (
        ({"frames": 15}, r"needs 2 \+ 4n, such as 14 or 18"),
        ({"size": (24, 32)}, "size: 24x32 must be multiples of 16, by the autoencoder's 16$"),
        (
            {"size": (48, 48), "model": MODEL | {"patch": 2}},
            "multiples of 32, by the autoencoder's 16 and model.patch 2$",
        ),
        ({"frames": 6}, "a window of 3 latents|spans"),
        ({"least_similarity": 1.0}, "least_similarity: 1: all windows that were looked at have a cut"),
        ({"frames": 402}, "a window spans 402 frames"),
        ({"image": str(tmp_path)}, "is no image encoder"),
    ):
        if changes == {"frames": 6}:
            assert prepared(latents(**changes), inputs, tmp_path, finetune).spans.gap == (1, 1)
            continue
        with pytest.raises(UserError, match=message):
            prepared(latents(**changes), inputs, tmp_path, finetune)


def test_an_autoencoder_that_decodes_no_stream_is_refused_before_training(dataset: str, tmp_path: Path) -> None:
    for norm in ("rms", "group"):
        vqgan = VQGAN(config_from_preset("vqgan_tiny", norm=norm))
        described = vqgan.config.model_dump(mode="json")
        disk.save(tmp_path / norm, "vqgan", described, vqgan.state_dict(), {"lineage": {}})
    chosen = config(vae="vae", frames=24, model=MODEL | {"patch": 1})
    given = {"dataset": dataset, "vae": str(tmp_path / "rms")}
    assert prepared(chosen, given, tmp_path / "one", finetune).spans.latents == 6
    with pytest.raises(
        UserError, match=r"vae: \S+group: decodes no stream, and so no gap .norm group: a token depends on the whole"
    ):
        prepared(chosen, given | {"vae": str(tmp_path / "group")}, tmp_path / "other", finetune)


def test_frames_are_taken_by_rate(dataset: str, tmp_path: Path) -> None:
    setup = prepared(config(fps=4.0, frames=5), {"dataset": dataset}, tmp_path, finetune)
    assert (setup.stride, setup.fps) == (3, 4.0)
    assert batch_of(config(fps=4.0, frames=5), setup)["video"].shape == (2, 3, 5, 16, 16)
