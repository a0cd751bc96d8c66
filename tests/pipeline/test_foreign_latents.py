"""Latents of a video autoencoder of diffusers beside the shards, with Ray."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_foreign
import torch
from foreign_codecs import adopted

from longtake.datasets import index
from longtake.datasets.latents import encoder_digest, read_latents
from longtake.datasets.loader import Loader, to_model
from longtake.datasets.verify import verify
from longtake.pipeline.stages import cache_latents

Hashes = Callable[[object], dict[str, str]]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session", "one_thread")
def test_latents_are_cached_by_byte_and_only_what_is_missing(dataset: str, hashes: Hashes, tmp_path: Path) -> None:
    folder = str(tmp_path / "vae")
    tiny_foreign.tiny_wan_vae().save_pretrained(folder, safe_serialization=True)
    root, twin = (str(shutil.copytree(dataset, tmp_path / name)) for name in ("root", "twin"))
    config = cache_latents.Config(kind="cache_latents", dataset="x", encoder=folder, size=(32, 32))
    inputs, output = {"dataset": root, "encoder": folder}, str(tmp_path / "out")
    result = cache_latents.run(config, inputs, output)
    cache_latents.run(config, inputs | {"dataset": twin}, str(tmp_path / "other"))
    made, record = hashes(root), read_latents(result["uri"])
    assert hashes(twin) == made and not list(verify(root))
    assert cache_latents.run(config, inputs, output)["metrics"]["encoded_shards"] == 0
    (Path(root) / "train" / f"00000.{record.column}.parquet").unlink()
    assert cache_latents.run(config, inputs, output)["metrics"]["encoded_shards"] == 1
    assert hashes(root) == made

    # tails are cut, and values are those of the library in the space of its transformer
    codec = adopted(tiny_foreign.tiny_wan_vae())
    assert (record.channels, record.factor, record.stride) == (4, 4, 8)
    assert record.encoder["digest"] == encoder_digest(codec)
    frames = {row["key"]: row["frame_count"] for row in index.read_all(root, "train").to_pylist()}
    steps = {
        row["key"]: row["steps"] for s in index.read_shards(root, "train", record.column) for row in s.table.to_pylist()
    }
    assert steps == {key: 1 + (count - 1) // 4 for key, count in frames.items()}
    batch = next(
        iter(Loader(root, columns={"video": "video", "latent": record.column}, frames=9, size=(32, 32), batch=2))
    )
    first = batch["start"] == 0
    latents = codec.encode(to_model(batch["video"]))
    torch.testing.assert_close(batch["latent"][first].float()[:, 0], latents.mean[first], rtol=2e-3, atol=2e-3)
