"""The stage that trains a prior: from latents alone or from pixels, resumed, evaluated, registered; and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import latent_stages
import numpy as np
import pytest
import torch
from flat import nested
from torch import nn

from longtake.datasets import clip, index, schema, storage
from longtake.datasets import latents as column
from longtake.datasets.errors import Failure, UserError
from longtake.infra import graph, recipe
from longtake.pipeline.stages import cache_latents
from longtake.training import registry
from longtake.training.config import RunConfig
from longtake.training.data import decoder_of
from longtake.training.loop import train
from longtake.training.models.common.codec import Pixels, Posterior
from longtake.training.models.common.condition import Condition, of_classes
from longtake.training.models.common.video import concatenated
from longtake.training.models.latte import finetune as finetune_latte
from longtake.training.models.latte.finetune import Config, check, heldout_of, loader_of, target_of
from longtake.training.models.latte.sample import generate_videos, load_prior
from longtake.training.models.pv_vae.model import PVVAE
from longtake.training.registry import disk

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = {"preset": "latte_tiny", "depth": 2, "width": 32, "heads": 2}
QUICK: dict[str, Any] = {
    "kind": "finetune_latte",
    "dataset": "dataset",
    "latents": "latents",
    "model": TINY,
    "frames": 9,
    "steps": 4,
    "batch": 4,
    "lr": 1e-3,
    "workers": 0,
    "log_every": 1,
    "checkpoint_every": 2,
    "sample_every": 0,
    "sample_steps": 2,
    "ema_half_lives": [],
    "eval_videos": 2,
    "overlap": 1,
}


@pytest.fixture(scope="module")
def vae() -> PVVAE:
    return latent_stages.vae()


@pytest.fixture(scope="module")
def inputs(dataset: str, vae: PVVAE, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A dataset with labels, its latents and their encoder: read them, do not change them."""
    root = tmp_path_factory.mktemp("latte")
    copy = latent_stages.labelled(dataset, root / "dataset")
    uri = latent_stages.saved(vae, root / "vae")
    return {"dataset": copy, "latents": latent_stages.encoded(root / "latents", copy, vae, uri, join=0.0)}


def config(**changes: Any) -> Config:
    return Config(**nested(QUICK | changes))


def pixels(**changes: Any) -> Config:
    return config(**{"latents": None, "size": (32, 32), "frames": 3, "stride": 4} | changes)


def fit(chosen: Config, inputs: dict[str, str], folder: Path, until: int | None = None) -> dict[str, torch.Tensor]:
    """Train as a rank does, without a tracker; `until` a step, as if it had been stopped there."""
    return latent_stages.fit(finetune_latte, chosen, inputs, folder, until)


def started(chosen: Config, inputs: dict[str, str], folder: Path) -> Any:
    """What the stage works with before its first step."""
    return latent_stages.prepared(chosen, inputs, folder, finetune_latte)


@pytest.mark.usefixtures("group")
def test_training_on_latents_reads_no_byte_of_a_video(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = str(shutil.copytree(inputs["dataset"], tmp_path / "dataset"))
    for tar in Path(without).glob("*/?????.tar"):
        tar.write_bytes(b"no video is left")
    monkeypatch.setattr(clip, "decoded", None)
    record = replace(column.read_latents(inputs["latents"]), dataset=without)
    column.write_latents(str(tmp_path / "latents"), record)
    there = {"dataset": without, "latents": str(tmp_path / "latents")}
    shutil.copytree(Path(inputs["latents"]).parent / "vae", tmp_path / "vae")
    chosen = config(classes=True)
    assert all(v.isfinite().all() for v in fit(chosen, there, tmp_path / "run").values())


@pytest.mark.usefixtures("group")
def test_a_stopped_training_ends_with_the_same_weights(inputs: dict[str, str], tmp_path: Path) -> None:
    chosen = config(classes=True)
    straight = fit(chosen, inputs, tmp_path / "straight")
    fit(chosen, inputs, tmp_path / "stopped", until=2)
    resumed = fit(chosen, inputs, tmp_path / "stopped")
    torch.testing.assert_close(resumed, straight, atol=0, rtol=0)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("changes", [{}, {"zero_stage": 3}, {"precision": "bf16"}, {"classes": True}])
def test_samples_are_shown_in_every_way_of_training(
    inputs: dict[str, str], tmp_path: Path, changes: dict[str, Any]
) -> None:
    chosen = config(**{"steps": 1} | changes)
    setup = started(chosen, inputs, tmp_path)
    shown: list[Any] = []

    class Log:
        def log(self, step: int, values: dict[str, float]) -> None:
            assert np.isfinite(values.get("loss", values.get("heldout/loss", np.nan)))

        def video(self, step: int, name: str, video: np.ndarray, fps: int) -> None:
            shown.append((name, video.shape, fps))

    purpose, loader = finetune_latte.objective(chosen, setup), finetune_latte.loader(chosen, setup, 0, 1)
    train(purpose, loader, chosen.model_copy(update={"run": RunConfig(sample_every=1)}), tmp_path, Log())  # type: ignore[arg-type]
    assert shown == [("generated", (9, 2 * 32 + 2, 2 * 48 + 2, 3), 12)]


@pytest.mark.usefixtures("group")
def test_a_prior_of_pixels_learns_too(inputs: dict[str, str], tmp_path: Path) -> None:
    chosen = pixels()
    target = target_of(chosen, inputs)
    assert (target.channels, target.shape, target.fps) == (3, (3, 32, 32), 3.0)
    weights = fit(chosen, inputs, tmp_path)
    assert weights["token_in.weight"].shape[1] == 3 * 16 * 16
    latent_tokens = finetune_latte._tokens(
        config().latte(8, (3, 2, 2)), {"latent": torch.zeros(4, 2, 8, 3, 2, 2), "key": [""] * 4}
    )
    pixel_tokens = finetune_latte._tokens(
        chosen.latte(3, (3, 32, 32)), {"video": torch.zeros(4, 3, 3, 32, 32), "key": [""] * 4}
    )
    assert latent_tokens == pixel_tokens == 4 * 3 * 2 * 2


def test_the_loss_is_of_normalised_draws_at_their_place_in_the_clip(inputs: dict[str, str], tmp_path: Path) -> None:
    chosen = config(classes=True, conditioning=1.0)
    setup = started(chosen, inputs, tmp_path)
    batch = next(iter(loader_of(chosen, inputs, setup.target, "train", batch=8)))
    latte = setup.model
    assert set(batch) >= {"latent", "label", "start", "key"} and "video" not in batch
    seen: list[Any] = []

    def engine(x: torch.Tensor, t: torch.Tensor, condition: Condition, start: torch.Tensor, rng: Any) -> torch.Tensor:
        seen.append((x, t, condition.classes, start))
        return torch.zeros_like(x)

    loss, logged = finetune_latte._loss(chosen, setup.target, latte, latent_stages.turn(engine, batch, _draws()))
    (x, t, ids, start) = seen[0]
    mean, logvar = batch["latent"].float().unbind(1)
    x0 = latte.normalise(Posterior(mean, logvar).sample(_draws()))
    # the clean frames of the window are the draw itself
    clean = (t == 0)[:, None, :, None, None].expand_as(x) if t.ndim == 2 else torch.zeros_like(x, dtype=torch.bool)
    assert clean.any() and torch.equal(x[clean], x0[clean])
    assert torch.equal(ids, batch["label"].cpu()) and set(ids.tolist()) == {0, 1}
    assert torch.equal(start, batch["start"]) and (start % 4 == 0).all() and (start > 0).any()
    assert loss.item() == logged["loss"].item() > 0


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_windows_start_their_clip_of_latents_and_of_pixels(
    inputs: dict[str, str], tmp_path: Path, share: float
) -> None:
    told: list[torch.Tensor] = []

    def engine(x: torch.Tensor, t: Any, ids: Any, start: torch.Tensor, rng: Any) -> torch.Tensor:
        told.append(start)
        return torch.zeros_like(x)

    for name, chosen in (("latents", config(frames=5, clip_starts=share)), ("pixels", pixels(clip_starts=share))):
        told.clear()
        setup = started(chosen, inputs, tmp_path / name)
        for batch in loader_of(chosen, inputs, setup.target, "train", batch=4, epochs=12):
            turn = latent_stages.turn(engine, batch, _draws_of(len(told)))
            finetune_latte._loss(chosen, setup.target, setup.model, turn)
        firsts = (torch.cat(told) == 0).float().mean().item()
        assert abs(firsts - share) <= (0.15 if 0 < share < 1 else 0)


def test_the_heldout_loss_is_told_for_windows_that_start_a_clip_and_for_later_ones(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    chosen = config(eval_videos=1, conditioning=0.0)
    setup = started(chosen, inputs, tmp_path)
    told = []
    setup.model.register_forward_pre_hook(
        lambda _, given, named: told.append((given[0].shape, named.get("start", 0))), with_kwargs=True
    )
    (tmp_path / "heldout").mkdir()
    summary = finetune_latte.evaluate(chosen, setup, tmp_path / "heldout")
    assert summary["heldout_loss"] > 0 and summary["heldout_loss_later"] > 0
    windows = [batch["start"].item() for batch in heldout_of(chosen, setup, later=True)]
    assert windows == [batch["start"].item() for batch in heldout_of(chosen, setup, later=True)]
    starts = [start for shape, start in told if shape[0] == 8]
    # one clip is as long as its window
    assert (starts.count(0), starts.count(1)) == (summary["clips"], sum(start > 0 for start in windows)) == (9, 8)


def _draws_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _draws() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_what_is_learned_has_mean_zero_and_variance_one(inputs: dict[str, str], tmp_path: Path) -> None:
    for posterior in ("mean", "sample"):
        chosen = config(posterior=posterior)
        setup = started(chosen, inputs, tmp_path / posterior)
        loader = loader_of(chosen, inputs, setup.target, "train", batch=4, epochs=6)
        x0 = torch.cat([setup.target.given(setup.model, batch, _draws()) for batch in loader])
        # windows, not all positions: about
        assert abs(x0.mean()) < 0.15 and 0.8 < x0.std() < 1.2


@pytest.mark.usefixtures("group")
def test_the_model_learns_what_it_is_shown(inputs: dict[str, str], tmp_path: Path) -> None:
    chosen = config(steps=60, checkpoint_every=60, lr=3e-3, posterior="mean")
    setup = started(chosen, inputs, tmp_path)

    def heldout(latte: Any) -> float:
        from longtake.training.models.latte.evaluate import heldout_losses

        clips = ((setup.target.given(latte, batch), None) for batch in heldout_of(chosen, setup))
        return float(heldout_losses(latte, clips, 0).mean())

    latte = setup.model
    before = heldout(latte)
    assert before == heldout(latte)
    latte.load_state_dict(fit(chosen, inputs, tmp_path))
    assert heldout(latte.eval()) < 0.9 * before


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "frames": ({"frames": 10}, "such as 9 or 13"),
    "too long": ({"frames": 4001}, "clips of at most"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_windows_that_there_are_not_are_refused_in_one_line(inputs: dict[str, str], case: str) -> None:
    changes, said = REFUSED[case]
    with pytest.raises(UserError, match=said) as e:
        target_of(config(**changes), inputs)
    assert "\n" not in str(e.value)


def changed(inputs: dict[str, str], folder: Path, **facts: Any) -> dict[str, str]:
    column.write_latents(str(folder), replace(column.read_latents(inputs["latents"]), **facts))
    return inputs | {"latents": str(folder)}


def test_latents_that_do_not_fit_are_refused_in_one_line(inputs: dict[str, str], tmp_path: Path) -> None:
    cases = {
        "are of the dataset /elsewhere": {"dataset": "/elsewhere"},
        "the dataset has changed since": {"digests": {"train": "other", "val": "other"}},
        "has no column latent-other": {"column": "latent-other"},
    }
    for number, (said, facts) in enumerate(cases.items()):
        with pytest.raises(UserError, match=said) as e:
            target_of(config(), changed(inputs, tmp_path / str(number), **facts))
        assert "cache_latents" in str(e.value) or "not of" in str(e.value)
    with pytest.raises(UserError, match="no latents here"):
        target_of(config(), inputs | {"latents": str(tmp_path)})
    with pytest.raises(Failure, match="every channel needs a finite mean and a positive"):
        flat = changed(inputs, tmp_path / "flat", std=(0.0,) * 8)
        started(config(posterior="mean"), flat, tmp_path / "run")


def test_another_encoder_than_that_of_the_latents_is_refused(
    inputs: dict[str, str], vae: PVVAE, tmp_path: Path
) -> None:
    record = column.read_latents(inputs["latents"])
    state = {name: value + 0.1 if name.startswith("encoder") else value for name, value in vae.state_dict().items()}
    disk.save(tmp_path / "other", "pv_vae", vae.config.model_dump(mode="json"), state, {"lineage": {}})
    with pytest.raises(UserError, match="has another encoder than has made the latents"):
        decoder_of(record, str(tmp_path / "other"))
    tuned = {name: value + 0.1 if name.startswith("decoder") else value for name, value in vae.state_dict().items()}
    disk.save(tmp_path / "tuned", "pv_vae", vae.config.model_dump(mode="json"), tuned, {"lineage": {}})
    assert isinstance(decoder_of(record, str(tmp_path / "tuned")), PVVAE)


def test_a_dataset_of_images_has_no_windows(tmp_path: Path) -> None:
    from longtake.datasets import images

    (tmp_path / "pictures").mkdir()
    from PIL import Image

    for number in range(4):
        Image.fromarray(np.full((32, 32, 3), 50 * number, np.uint8)).save(tmp_path / "pictures" / f"{number}.png")
    root = _image_dataset(images, tmp_path)
    with pytest.raises(UserError, match="has images, and a video prior needs clips"):
        target_of(pixels(), {"dataset": root})


def _image_dataset(images: Any, folder: Path) -> str:
    """An index whose samples have one frame."""
    root = folder / "dataset"
    (root / "train").mkdir(parents=True)
    storage.write(f"{root}/dataset.json", json.dumps({"format": schema.FORMAT_VERSION}).encode())
    row = {"key": "a-00000", "source": "a", "clip": 0, "frame_count": 1, "fps": 1.0, "height": 32, "width": 32}
    (root / "train" / "00000.tar").write_bytes(b"")
    index.write_index(f"{root}/train/00000.parquet", [row], schema.INDEX, 0, "0")
    return str(root)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": [32, 32]}, "size: latents have the size that they were made with"),
        ({"stride": 2}, "stride: latents are of every frame"),
        ({"latents": None}, r"size: training on pixels needs \(height, width\)"),
        ({"latents": None, "size": [32, 32], "vae": "vae"}, "vae: a prior of pixels has none"),
        ({"latents": None, "size": [32, 40]}, "no multiple of patch 16"),
        ({"model": {"preset": "latte_tiny", "channels": 8}}, "channels follows from the stage's other settings"),
        ({"model": {"preset": "latte_huge"}}, "unknown preset 'latte_huge'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(**changes)


def test_a_recipe_whose_latents_are_of_another_dataset_is_refused() -> None:
    made_of = cache_latents.Config(kind="cache_latents", dataset="others", encoder="vae")
    with pytest.raises(ValueError, match="latents: are of the dataset others, not of dataset"):
        check(config(), {"latents": made_of})
    check(config(), {"latents": made_of.model_copy(update={"dataset": "dataset"})})


def test_the_stage_stands_in_a_graph_with_its_inputs(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        f"name: r\nworkspace: {tmp_path}/work\nstages:\n"
        "  shards: {kind: shard, sources: [/videos], clip: {short_side: 32, max_seconds: 3}}\n"
        "  vae: {kind: pretrain_vae, dataset: shards, model: {preset: pv_vae_tiny}, frames: 9, sizes: [[32, 32]]}\n"
        "  latents: {kind: cache_latents, dataset: shards, encoder: vae}\n"
        "  latte: {kind: finetune_latte, dataset: shards, latents: latents, vae: vae, frames: 9}\n"
    )
    nodes = graph.build(recipe.load(str(tmp_path / "r.yaml")))
    assert [n.name for n in nodes][-1] == "latte"
    assert nodes[-1].inputs == {"dataset": "shards", "latents": "latents", "vae": "vae"}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An MLflow store with an open run, as a stage finds it."""
    yield from latent_stages.mlflow_run(tmp_path, monkeypatch)


@pytest.mark.slow
def test_from_latents_to_a_served_champion(
    inputs: dict[str, str], store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import pandas

    chosen = config(classes=True, sample_every=2, ema_half_lives=[10.0], guidance=2.0)
    result = finetune_latte.run(chosen, inputs, str(tmp_path / "out"))
    assert result["uri"] == "models:/latte/1" and result["metrics"]["heldout_loss"] > 0
    assert result["metrics"]["heldout_loss_later"] > 0
    prior = load_prior("models:/latte@champion")
    assert list(prior.classes) == ["a", "b"] and prior.frames == 9 and prior.settings.guidance == 2.0
    client = mlflow.MlflowClient()
    assert [m.step for m in client.get_metric_history(store, "heldout/loss")] == [chosen.steps]
    heldout = Path(client.download_artifacts(store, "heldout", str(tmp_path)))
    record = json.loads((heldout / "generated.json").read_text())
    assert record["summary"]["distance"] is None
    assert [v["file"] for v in record["videos"]] == ["seed-0.mp4", "seed-1.mp4", "longer.mp4"]
    assert clip.decode((heldout / "longer.mp4").read_bytes()).shape == (25, 32, 48, 3)
    assert [a.path for a in client.list_artifacts(store, "samples")] == [
        "samples/step-00000002",
        "samples/step-00000004",
    ]
    facts = registry.load_with_facts("models:/latte/1")[1]
    assert facts["vae"]["uri"] == str(Path(inputs["latents"]).parent / "vae")
    assert facts["lineage"]["inputs"].keys() == {"dataset", "latents", "vae"}

    served = mlflow.pyfunc.load_model("models:/latte@champion")
    videos = served.predict(pandas.DataFrame({"seed": [3, 4], "class": ["b", None]}))
    assert videos.shape == (2, 9, 32, 48, 3)
    settings = prior.settings
    ours = concatenated(generate_videos(prior.latte, prior.codec, 9, [3], of_classes([1]), settings))
    np.testing.assert_array_equal(videos[:1], ours)
    columns = {c.name: c.required for c in served.metadata.get_input_schema().inputs}
    assert columns == {"seed": True, "class": False, "storyboard": False, "frames": False}
    assert served.predict({"seed": [3]}, params={"steps": 1}).shape == (1, 9, 32, 48, 3)
    # told to do it again, it goes on where it was: nothing is trained or registered twice
    monkeypatch.setenv("MLFLOW_RUN_ID", store)
    assert finetune_latte.run(chosen, inputs, str(tmp_path / "out"))["uri"] == "models:/latte/1"
    # and another goes on from it
    further = config(classes=True, base="models:/latte@champion", model=None, steps=2)
    there = inputs | {"base": further.base or ""}
    assert finetune_latte.run(further, there, str(tmp_path / "further"))["uri"] == "models:/latte/2"
    lineage = registry.load_with_facts("models:/latte/2")[1]["lineage"]["inputs"]
    assert lineage["base"]["uri"] == "models:/latte/1"


@pytest.mark.slow
def test_a_feature_network_measures_the_distance_to_heldout_videos(
    inputs: dict[str, str], store: str, tmp_path: Path
) -> None:
    network = torch.jit.script(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()))
    network.save(str(tmp_path / "features.pt"))
    chosen = config(steps=2, features=str(tmp_path / "features.pt"), conditioning=0.0)
    result = finetune_latte.run(chosen, inputs, str(tmp_path / "out"))
    assert result["metrics"]["frechet"] > 0 and "kernel" in result["metrics"]
    assert finetune_latte.outside(chosen) and not finetune_latte.outside(config())


@pytest.mark.slow
def test_pixels_make_a_champion_as_well(inputs: dict[str, str], store: str, tmp_path: Path) -> None:
    chosen = pixels(steps=2, name="latte-pixels")
    assert finetune_latte.run(chosen, {"dataset": inputs["dataset"]}, str(tmp_path / "out"))["uri"]
    prior = load_prior("models:/latte-pixels@champion")
    assert isinstance(prior.codec, Pixels) and prior.fps == 3.0


@pytest.mark.slow
def test_two_processes_make_one_champion(inputs: dict[str, str], store: str, tmp_path: Path) -> None:
    chosen = config(steps=2, classes=True, sample_every=2, zero_stage=1, launcher={"by": "torchrun", "processes": 2})
    result = finetune_latte.run(chosen, inputs, str(tmp_path / "out"))
    assert result["uri"] == "models:/latte/1" and result["metrics"]["heldout_loss"] > 0
