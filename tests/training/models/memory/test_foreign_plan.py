"""What a plan tells of a memory for a model of another library, before any of its stages has run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import measured
import pytest
import tiny_foreign
import yaml

from longtake.infra import graph, recipe
from longtake.infra.upkeep.memory import memory

pytestmark = pytest.mark.usefixtures("one_thread")

MEMORY = {"dataset": "shards", "latents": "latents", "low_latents": "low", "text": "text", "frames": 9, "batch": 2}
MEMORY |= {"history_seconds": 4, "ema_half_lives": []}
MODEL = {"rates": ["2x2x2"], "memory_widths": [8, 16], "memory_heads": 2, "cross_attention": True}


def written(folder: Path, pipeline: str = "wan", **changes: Any) -> str:
    """A recipe from a tiny pipeline to a prior."""
    base = str(tiny_foreign.pipeline_folder(folder / pipeline, pipeline))
    latents = {"kind": "cache_latents", "dataset": "shards", "encoder": base, "size": [64, 64], "join_seconds": 60}
    stages = {
        "shards": {"kind": "shard", "sources": ["/videos"], "clip": {"short_side": 64, "fps": 8, "max_seconds": 60}},
        "captions": {"kind": "caption", "dataset": "shards"},
        "text": {"kind": "cache_text", "dataset": "shards", "captions": "captions", "encoder": base, "clean": "wan"},
        "latents": latents,
        "low": latents | {"shrink": [2, 2]},
        "retrieval": MEMORY | {"kind": "pretrain_memory", "base": base, "model": MODEL} | changes,
        "prior": MEMORY
        | {"kind": "finetune_memory_prior", "base": "retrieval", "lora": {"rank": 4, "full": ["memory"]}},
    }
    if pipeline == "hunyuan":
        second = {"encoder": f"{base}/text_encoder_2", "clean": "none"}
        stages["pooled"] = stages["text"] | second
        for name in ("retrieval", "prior"):
            stages[name] = stages[name] | {"pooled": "pooled"}
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump({"name": "r", "workspace": str(folder / "ws"), "stages": stages}))
    return str(path)


def test_what_both_stages_take_is_told_with_the_low_rank_change_that_they_get(tmp_path: Path) -> None:
    def weights(**changes: Any) -> dict[str, int]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        rows = {row["name"]: row for row in memory(graph.build(recipe.load(written(folder, **changes))), None)}
        assert not rows["retrieval"]["why"] and not rows["prior"]["why"], rows
        return {name: row["takes"]["weights"] for name, row in rows.items()}

    usual, said, all_ = weights(), weights(lora={"rank": 128, "full": ["memory", "cross"]}), weights(lora="none")
    assert usual == said and usual["prior"] == all_["prior"] and usual["retrieval"] != all_["retrieval"]


def test_a_memory_for_hunyuan_is_planned_too(tmp_path: Path) -> None:
    rows = {row["name"]: row for row in memory(graph.build(recipe.load(written(tmp_path, "hunyuan"))), None)}
    assert not rows["retrieval"]["why"] and not rows["prior"]["why"], rows


@pytest.mark.slow
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", ["retrieval", "prior"])
def test_a_plan_is_within_a_tenth_of_what_a_training_takes(tmp_path: Path, name: str) -> None:
    found = measured.source_of(written(tmp_path, lora={"rank": 4, "full": ["memory", "cross"]}), name)
    assert measured.planned(found) == pytest.approx(measured.allocated(found), rel=0.1)
