"""Latents that are encoded while training goes on: the same as cached ones, in the same order; resumed, planned, refused."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import latent_stages
import numpy as np
import pytest
import torch
from flat import nested

from longtake.datasets import index, schema, storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.latents import read_latents
from longtake.infra import graph, recipe
from longtake.training import data, fit, sizes
from longtake.training.live import encoder, record
from longtake.training.live.encoder import LiveLoader
from longtake.training.models.latte import finetune as finetune_latte
from longtake.training.models.memory import finetune as finetune_memory_prior

pytestmark = pytest.mark.usefixtures("one_thread", "group")

LATTE: dict[str, Any] = latent_stages.QUICK | {
    "kind": "finetune_latte",
    "model": {"preset": "latte_tiny", "depth": 2, "width": 32, "heads": 2},
    "eval_videos": 2,
    "overlap": 1,
}
for unknown in ("low_latents", "history_seconds"):
    LATTE.pop(unknown)
MEMORY: dict[str, Any] = latent_stages.QUICK | {"kind": "finetune_memory_prior", "eval_videos": 2, "eval_segments": 2}
LIVE = {"latents": "live", "encoder": "vae", "live": {"windows": 6}}
STREAMS = LIVE | {"low_latents": "live", "live": {"windows": 6, "join_seconds": 100.0, "shrink": [2, 2]}}


@pytest.fixture(scope="module")
def cached(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A dataset, its latents, and a vae: read them, do not change them."""
    return latent_stages.inputs(tmp_path_factory.mktemp("live"), dataset, 0.0)


@pytest.fixture(scope="module")
def joined(cached: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same with latents of streams of several clips."""
    root, model = tmp_path_factory.mktemp("joined"), latent_stages.vae()
    uri = str(Path(cached["latents"]).parent / "vae")
    columns = {
        name: latent_stages.encoded(root / name, cached["dataset"], model, uri, shrink)
        for name, shrink in (("latents", (1, 1)), ("low_latents", (2, 2)))
    }
    return cached | columns


def latte(**changes: Any) -> Any:
    return finetune_latte.Config(**nested(LATTE | changes))


def memory(**changes: Any) -> Any:
    return finetune_memory_prior.Config(**nested(MEMORY | {"no_history": 0.3} | changes))


def live_inputs(inputs: dict[str, str]) -> dict[str, str]:
    return {"dataset": inputs["dataset"], "encoder": str(Path(inputs["dataset"]).parent / "vae")}


def loader_of(module: Any, config: Any, inputs: dict[str, str], folder: Path, rank: int = 0, world: int = 1) -> Any:
    """This rank's training batches, and the record of their latents."""
    setup = latent_stages.prepared(config, inputs, folder, module)
    return module.loader(config, setup, rank, world)


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], *columns: str) -> None:
    """The same batch but for roundings of float16 in these columns."""
    assert ours.keys() == theirs.keys() and ours["key"] == theirs["key"]
    for name, value in theirs.items():
        if name in columns:
            assert ours[name].dtype == value.dtype == torch.float16 and value.abs().max() > 0
            assert torch.allclose(ours[name].float(), value.float(), atol=2e-3), name
        elif isinstance(value, torch.Tensor):
            assert torch.equal(ours[name], value), name


def test_live_windows_are_those_of_a_cached_column_in_the_same_order(cached: dict[str, str], tmp_path: Path) -> None:
    ours = loader_of(finetune_latte, latte(**LIVE), live_inputs(cached), tmp_path / "live")
    theirs = loader_of(finetune_latte, latte(), {"dataset": cached["dataset"], "latents": cached["latents"]}, tmp_path)
    assert ours.samples == theirs.samples and ours.batches_per_epoch == theirs.batches_per_epoch
    starts = set()
    for mine, true in zip(islice(ours, 6), islice(theirs, 6), strict=True):
        assert_same(mine, true, "latent")
        starts |= set(mine["start"].tolist())
    assert len(starts) > 1  # not only the beginnings of clips


def test_histories_of_live_streams_are_those_of_cached_ones(joined: dict[str, str], tmp_path: Path) -> None:
    """Across clips that were joined, of both columns, with windows far from a clip's beginning."""
    chosen = memory(**STREAMS)
    ours = loader_of(finetune_memory_prior, chosen, live_inputs(joined), tmp_path / "live")
    theirs = loader_of(finetune_memory_prior, memory(), joined, tmp_path / "cached")
    latest = 0
    for mine, true in zip(islice(ours, 4), islice(theirs, 4), strict=True):
        assert_same(mine, true, "latent", "history_latent", "low", "history_low")
        latest = max(latest, int(true["stream_step"].max()))
    shards = index.read_shards(joined["dataset"], "train")
    longest = max(row["frame_count"] for shard in shards for row in shard.table.to_pylist())
    assert latest > longest // 4  # beyond a first clip


def test_a_stopped_training_of_live_latents_ends_with_the_same_weights(cached: dict[str, str], tmp_path: Path) -> None:
    chosen, inputs = latte(**LIVE), live_inputs(cached)
    whole = latent_stages.fit(finetune_latte, chosen, inputs, tmp_path / "whole")
    latent_stages.fit(finetune_latte, chosen, inputs, tmp_path / "halves", until=2)
    halves = latent_stages.fit(finetune_latte, chosen, inputs, tmp_path / "halves")
    assert whole.keys() == halves.keys() and all(torch.equal(whole[k], halves[k]) for k in whole)
    # what the model normalises by is that of the windows
    known = read_latents(str(tmp_path / "whole" / "live" / "latents"))
    assert known.count % (6 * 3) == 0  # latents of all positions
    mean, std = data.statistics(known, chosen.posterior)
    model = latent_stages.prepared(chosen, inputs, tmp_path / "whole", finetune_latte).model
    latent = torch.randn(1, known.channels, 1, 2, 2)
    expected = (latent - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
    assert torch.allclose(model.normalise(latent), expected, atol=1e-5)
    cached_mean = np.array(read_latents(cached["latents"]).mean)
    assert np.abs(np.array(known.mean) - cached_mean).max() < 3 * np.array(known.std).max() / np.sqrt(6)


def test_what_is_encoded_ahead_is_not_lost_where_training_goes_on(cached: dict[str, str], tmp_path: Path) -> None:
    chosen, inputs = latte(**LIVE), live_inputs(cached)
    resolved = record.resolved(chosen, inputs, tmp_path)
    ((column, known),) = record.live_columns(resolved).items()
    live = {column: record.column_of(known)}
    options = {"columns": {"latent": column}, "frames": 9, "batch": 2, "live": live}

    def made(ahead: int) -> LiveLoader:
        return LiveLoader(inputs["encoder"], 8, inputs["dataset"], "train", ahead=ahead, **options)

    plain, early = made(0), made(2)
    batches = list(islice(plain, 5))
    for expected, found in zip(batches[:3], early, strict=False):
        assert_same(found, expected, "latent")
    assert early.state_dict() == {**plain.state_dict(), "taken": 3}
    going = made(1)
    going.load_state_dict(early.state_dict())
    for expected, found in zip(batches[3:], going, strict=False):
        assert_same(found, expected, "latent")
    assert [batch["key"] for batch in islice(early, 2)] == [batch["key"] for batch in batches[3:]]
    assert next(early.at([0]))["key"] == batches[0]["key"]


def test_settings_that_change_before_a_checkpoint_are_taken_and_later_ones_are_not(
    cached: dict[str, str], tmp_path: Path
) -> None:
    def windows(count: int) -> int:
        uris = record.resolved(latte(**LIVE | {"live": {"windows": count}}), live_inputs(cached), tmp_path)
        live = read_latents(uris["latents"]).live
        assert live is not None
        return int(live["windows"])

    assert [windows(6), windows(4), windows(4)] == [6, 4, 4]
    means = []
    for frames in (9, 5):
        uris = record.resolved(
            latte(**LIVE | {"frames": frames, "live": {"windows": 4}}), live_inputs(cached), tmp_path
        )
        means.append(read_latents(uris["latents"]).mean)
    assert means[0] != means[1], "measured on windows of another length"
    (tmp_path / "step-1").mkdir()
    (tmp_path / "latest").write_text("step-1")
    # the training says that its settings are others than its checkpoint's
    assert windows(6) == 4


def test_latents_that_are_not_finite_name_their_clips(
    cached: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = encoder.posteriors
    loader = loader_of(finetune_latte, latte(**LIVE), live_inputs(cached), tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(encoder, "posteriors", lambda *a: ((x, y * float("inf")) for x, y in real(*a)))
        with pytest.raises(
            Failure, match=r"latents: those of \S+, .* are not finite in float16; try live.dtype: bfloat16"
        ):
            next(iter(loader))


def test_a_live_training_says_of_its_model_how_its_latents_were_made(cached: dict[str, str], tmp_path: Path) -> None:
    chosen, inputs = latte(**LIVE), live_inputs(cached)
    setup = latent_stages.prepared(chosen, inputs, tmp_path, finetune_latte)
    lineage = json.loads((tmp_path / "lineage.json").read_bytes())
    facts = finetune_latte.facts(chosen, setup, lineage)
    known = read_latents(str(tmp_path / "live" / "latents"))
    assert facts["vae"]["encoder"] == known.encoder["digest"]
    assert facts["latents"]["live"]["windows"] == 6 and facts["latents"]["live"]["mean"] == known.mean
    assert facts["latents"]["encoder"]["sha256"] == lineage["inputs"]["encoder"]["sha256"]
    counts = finetune_latte.counts(chosen, setup)
    assert counts["train_clips"] > 0 and counts["train_clips_without_latents"] == 0


def test_the_plan_counts_the_encoder_beside(cached: dict[str, str]) -> None:
    chosen, uris = latte(**LIVE, **{"batch": 2}), live_inputs(cached)
    sources = {name: fit.Source(None, None, uri, {}) for name, uri in uris.items()}
    stored = {"dataset": sources["dataset"], "latents": fit.Source(None, None, cached["latents"], {})}
    ours = fit.trace_of(finetune_latte, chosen, sources, 1)
    theirs = fit.trace_of(finetune_latte, latte(batch=2), stored, 1)
    assert ours.beside == 2 * theirs.beside > 0 and ours.points == theirs.points
    window = sizes.window_of(chosen, sources)
    known = sizes.window_of(latte(), stored)
    assert (window.channels, window.shape) == (known.channels, known.shape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": None}, "encoder: latents: live needs the model that encodes"),
        ({"latents": "latents"}, "encoder: is for latents: live"),
        ({"latents": "latents", "encoder": None}, "live: is for latents: live"),
        ({"size": [32, 32]}, "size: latents have the size that they were made with; set live.size"),
        ({"stride": 2}, "stride: latents are of every frame"),
        ({"live": {"shrink": [2, 2]}}, "live.shrink: is of low_latents: live"),
        ({"live": {"tile": 64}}, "live.tile: 64 with live.overlap 64"),
    ],
)
def test_what_does_not_go_with_live_latents_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        latte(**LIVE | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low_latents": "low"}, "low_latents: are cached, and latents are live"),
        ({"latents": "latents", "live": None, "encoder": None}, "low_latents: are live, and latents are cached"),
        ({"live": {"join_seconds": 9}}, "low_latents: live needs live.shrink"),
    ],
)
def test_both_columns_of_a_memory_are_live_or_none(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory(**STREAMS | changes)


def test_a_size_that_the_encoder_does_not_divide_is_refused(cached: dict[str, str], tmp_path: Path) -> None:
    chosen = latte(**LIVE | {"live": {"size": [30, 30], "windows": 2}})
    with pytest.raises(UserError, match="size: 30x30 is not in multiples of"):
        record.resolved(chosen, live_inputs(cached), tmp_path)


def test_a_dataset_that_has_changed_since_is_refused(cached: dict[str, str], tmp_path: Path) -> None:
    chosen, inputs = latte(**LIVE), live_inputs(cached)
    inputs = record.resolved(chosen, inputs, tmp_path)
    path = Path(inputs["latents"]) / "latents.json"
    facts = json.loads(path.read_bytes())
    path.write_bytes(storage.canonical_json(facts | {"digests": dict.fromkeys(schema.SPLITS, "other")}))
    with pytest.raises(UserError, match="has changed since this training began"):
        data.column_of(inputs["dataset"], inputs["latents"], 9)


def test_a_recipe_links_the_encoder_and_no_column(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    (tmp_path / "a.mp4").write_bytes(b"")
    path.write_text(
        f"name: live\nworkspace: {tmp_path}\nstages:\n"
        f"  clips: {{kind: shard, sources: [{tmp_path}/*.mp4]}}\n"
        "  vae: {kind: pretrain_vae, dataset: clips, sizes: [[256, 256]]}\n"
        "  latte: {kind: finetune_latte, dataset: clips, latents: live, encoder: vae}\n"
    )
    nodes = {node.name: node for node in graph.build(recipe.load(str(path)))}
    assert nodes["latte"].inputs.keys() == {"dataset", "encoder"} and set(nodes["latte"].upstream) == {"clips", "vae"}
