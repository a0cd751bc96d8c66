"""A registered MAVIN fills gaps: from its folder, with its autoencoder and image encoder, by `longtake infill`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import latent_stages
import numpy as np
import pandas
import pytest
import torch
from click import Abort
from priors import awake, frames_of, longtake, save_vae

from longtake.datasets import clip
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.latents import encoder_digest
from longtake.training import registry
from longtake.training.models.generator import Gap
from longtake.training.models.mavin.config import MavinConfig
from longtake.training.models.mavin.infill import Filler
from longtake.training.models.mavin.model import Mavin
from longtake.training.models.mavin.sample import infiller_of
from longtake.training.registry import disk

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"depth": 2, "width": 16, "heads": 2, "image_width": 64}
IMAGE = {"encoder": "own", "digest": "own-2"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `vae`, `latents`, a MAVIN of its latents, and `pixels`."""
    folder = tmp_path_factory.mktemp("models")
    vae = save_vae(folder / "vae")
    needed = {"uri": str(folder / "vae"), "sha256": "0", "encoder": encoder_digest(vae)}
    frames = {"latents": (18, [1, 13], [4, 12]), "pixels": (12, [1, 8], [2, 8])}
    for name, origin, channels in (("latents", needed, 8), ("pixels", None, 3)):
        model = awake(Mavin(MavinConfig(**SMALL, channels=channels)))
        window, context, gap = frames[name]
        facts = {
            "lineage": {},
            "classes": [],
            "vae": origin,
            "text": None,
            "image": IMAGE,
            "window": {"frames": window, "stride": 1, "size": [32, 32], "fps": 8.0},
            "context": context,
            "gap": gap,
            "sampling": {"steps": 2, "shift": 1.0},
        }
        disk.save(folder / name, "mavin", model.config.model_dump(mode="json"), model.state_dict(), facts)
    return folder


def infiller(folder: Path, **changes: Any) -> Filler:
    model, facts = registry.load_with_facts(str(folder))
    return infiller_of(str(folder), model, {**facts, **changes}, None, torch.float32)


def noise(frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "frames"), [("latents", 8), ("latents", 5), ("latents", 16), ("pixels", 1), ("pixels", 5)]
)
def test_gaps_of_any_length_are_filled_one_by_one_or_together(models: Path, name: str, frames: int) -> None:
    filler = infiller(models / name)
    gaps = [Gap(noise(14, 1), noise(13, 2), frames), Gap(noise(14, 3), noise(14, 4), frames)]
    together = list(filler.fill(gaps, 5, filler.settings, batch=2))
    one_by_one = list(filler.fill(gaps, 5, filler.settings))
    for found, expected in zip(together, one_by_one, strict=True):
        assert found.shape == (frames, 32, 32, 3)
        assert np.abs(found.astype(int) - expected).max() <= 1
    assert (one_by_one[0] != one_by_one[1]).any()


def test_what_is_made_depends_on_both_sides(models: Path) -> None:
    filler = infiller(models / "latents")

    def made(before: int, after: int) -> np.ndarray:
        return next(filler.fill([Gap(noise(9, before), noise(9, after), 4)], 5, filler.settings))

    assert (made(1, 2) != made(3, 2)).any() and (made(1, 2) != made(1, 3)).any()
    np.testing.assert_array_equal(made(1, 2), made(1, 2))


def test_a_command_joins_clips_the_same_each_time(models: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        clip.write(tmp_path / f"{name}.mp4", np.repeat(noise(1, seed), 6, 0), 8)
    for out in ("x", "y"):
        paths = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
        longtake("infill", models / "latents", *paths, "--frames", 4, "--out", tmp_path / f"{out}.mp4")
    assert frames_of(tmp_path / "x.mp4").shape == (16, 32, 32, 3)
    assert (tmp_path / "x.mp4").read_bytes() == (tmp_path / "y.mp4").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4", "x.mp4", "y.mp4"]
    longtake("infill", models / "latents", *paths, "--frames", 5, "--out", tmp_path / "x.mp4")
    assert frames_of(tmp_path / "x.mp4").shape == (17, 32, 32, 3)


def test_a_stopped_command_goes_on_to_the_same_film(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip.write(tmp_path / "film.mp4", np.repeat(noise(3, 1), 6, 0), 8)
    command = ["infill", models / "pixels", tmp_path / "film.mp4", "--smooth", 1, "--joints", "6,12", "--out"]
    longtake(*command, tmp_path / "whole.mp4")
    batch, calls = Filler._batch, 0

    def once(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return batch(*arguments)

    monkeypatch.setattr(Filler, "_batch", once)
    with pytest.raises((KeyboardInterrupt, Abort)):
        longtake(*command, tmp_path / "x.mp4")
    assert (tmp_path / "x.mp4.part" / "0" / "00000.safetensors").exists() and not (tmp_path / "x.mp4").exists()
    longtake(*command, tmp_path / "x.mp4")
    assert calls == 3 and not (tmp_path / "x.mp4.part").exists()
    assert (tmp_path / "x.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_a_damaged_model_makes_no_film(models: Path, tmp_path: Path) -> None:
    model, facts = registry.load_with_facts(str(models / "pixels"))
    broken = {name: torch.full_like(values, torch.nan) for name, values in model.state_dict().items()}
    names = ("lineage", "classes", "vae", "text", "image", "window", "context", "gap", "sampling")
    facts = {name: facts[name] for name in names}
    disk.save(tmp_path / "broken", "mavin", model.config.model_dump(mode="json"), broken, facts)
    clip.write(tmp_path / "a.mp4", noise(6, 1), 8)
    paths = [tmp_path / "a.mp4"] * 2
    with pytest.raises(Failure, match="values that are no numbers: it is damaged"):
        longtake("infill", tmp_path / "broken", *paths, "--frames", 2, "--out", tmp_path / "x.mp4")
    assert not (tmp_path / "x.mp4").exists()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from latent_stages.mlflow_run(tmp_path, monkeypatch)


def test_what_is_registered_is_served(models: Path, store: str) -> None:
    import mlflow
    from mlflow.pyfunc import scoring_server

    served = mlflow.pyfunc.load_model(registry.register(models / "latents", "mavin", store))
    rows = [{"before": noise(9, n), "after": noise(9, n + 2), "frames": 4, "seed": n} for n in (1, 2)]
    made = served.predict(pandas.DataFrame(rows), params={"steps": 3})
    filler = infiller(models / "latents")
    for row, video in zip(rows, made, strict=True):
        gap = Gap(row["before"], row["after"], 4)
        (expected,) = filler.fill([gap], row["seed"], replace(filler.settings, steps=3))
        np.testing.assert_array_equal(video, expected)
    with pytest.raises(UserError, match="frames is 0; a gap has at least 1"):
        served.predict([rows[0] | {"frames": 0}])

    # the same as the server reads and writes it
    columns = {name: [np.asarray(row[name]).tolist() for row in rows] for name in rows[0]}
    body = json.dumps({"inputs": columns, "params": {"steps": 3}}).encode()
    answer = scoring_server.invocations(body, "application/json", served, served.metadata.get_input_schema())
    np.testing.assert_array_equal(np.array(json.loads(answer.response)["predictions"]), made)
    signature = served.metadata.signature
    needed = {column.name for column in signature.inputs.inputs if column.required}
    assert needed == {"before", "after", "frames", "seed"}
    assert {"steps", "mixer", "cutoff"} <= {param.name for param in signature.params}


def test_a_served_model_finds_its_image_encoder_where_the_environment_says(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longtake.training.registry.pyfunc import Videos

    def save(name: str, encoder: str) -> None:
        model, facts = registry.load_with_facts(str(models / "pixels"))
        kept = {key: value for key, value in facts.items() if key not in ("format", "model", "config", "sha256")}
        image = {"image": IMAGE | {"encoder": encoder}}
        disk.save(tmp_path / name, "mavin", model.config.model_dump(mode="json"), model.state_dict(), kept | image)

    def served(name: str) -> np.ndarray:
        videos = Videos()
        videos.load_context(SimpleNamespace(artifacts={"model": str(tmp_path / name)}))
        return videos.predict(None, [{"before": noise(3, 1), "after": noise(3, 2), "frames": 2, "seed": 1}])

    save("own", "own")
    save("moved", "/nowhere/clip")
    with pytest.raises(UserError, match=r"/nowhere/clip.* LONGTAKE_IMAGE_ENCODER for a served model"):
        served("moved")
    monkeypatch.setenv("LONGTAKE_IMAGE_ENCODER", "own")
    np.testing.assert_array_equal(served("moved"), served("own"))
    monkeypatch.setenv("LONGTAKE_IMAGE_ENCODER", "/elsewhere")
    assert served("own").shape == (1, 2, 32, 32, 3)
    with pytest.raises(UserError, match="/elsewhere"):
        served("moved")


def test_in_half_precision_what_is_made_is_about_the_same(models: Path) -> None:
    model, facts = registry.load_with_facts(str(models / "latents"))
    gaps = [Gap(noise(9, 1), noise(9, 2), 4)]
    filler = infiller(models / "latents")
    exact = next(filler.fill(gaps, 0, filler.settings))
    half = infiller_of("m", model, facts, None, torch.bfloat16)
    assert np.abs(next(half.fill(gaps, 0, half.settings)).astype(int) - exact).mean() < 4


def test_the_image_encoder_of_training_is_needed(models: Path) -> None:
    with pytest.raises(UserError, match="names no image encoder"):
        infiller(models / "pixels", image=None)
    with pytest.raises(UserError, match=r"another image encoder than own \(digest x, not own-2\)"):
        infiller(models / "pixels", image=IMAGE | {"digest": "x"})
    with pytest.raises(UserError, match="say where it is with --image-encoder"):
        infiller(models / "pixels", image=IMAGE | {"encoder": "/nowhere"})


def test_another_model_is_refused(models: Path) -> None:
    with pytest.raises(UserError, match="is a PVVAE; name a `finetune_mavin` model"):
        infiller_of("m", registry.load_with_facts(str(models / "vae"))[0], {}, None, torch.float32)
