"""`longtake plan`: what trainings take of a GPU, whether that fits, and what would make it fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from longtake.infra import graph, recipe
from longtake.infra.cli.housekeeping import plan
from longtake.infra.upkeep.memory import memory

VAE = {
    "kind": "pretrain_vae",
    "dataset": "shards",
    "model": {"preset": "pv_vae_tiny"},
    "sizes": [[32, 32]],
    "frames": 9,
}
STAGES: dict[str, Any] = {
    "shards": {"kind": "shard", "sources": ["VIDEOS"], "clip": {"short_side": 32, "fps": 12}},
    "vae": VAE | {"lambda_gan": 0, "batch": 4},
    "latents": {"kind": "cache_latents", "dataset": "shards", "encoder": "vae"},
    "prior": {"kind": "finetune_latte", "dataset": "shards", "latents": "latents", "model": {"preset": "latte_tiny"}},
}


def write(folder: Path, sources: str = "/videos") -> str:
    stages = STAGES | {"shards": STAGES["shards"] | {"sources": [sources]}}
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump({"name": "r", "workspace": str(folder / "ws"), "stages": stages}))
    return str(path)


def rows(folder: Path, gpu: float | None) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in memory(graph.build(recipe.load(write(folder))), gpu)}


def test_a_training_fits_needs_a_change_or_does_not_fit_at_all(tmp_path: Path) -> None:
    large = rows(tmp_path, 80e9)["vae"]
    total = large["takes"]["total"]
    assert large["fits"] and not large["changes"] and total == sum(large["takes"].values()) - total
    less = rows(tmp_path, total)["vae"]
    assert not less["fits"] and less["changes"] and less["then"]["total"] <= 0.9 * total
    assert not rows(tmp_path, 1e6)["vae"]["changes"]
    assert rows(tmp_path, None)["vae"]["fits"] is None


def test_what_is_not_known_before_a_stage_has_run_is_said(tmp_path: Path) -> None:
    prior = rows(tmp_path, 80e9)["prior"]
    assert prior["takes"] is None and prior["why"].endswith("run it first")


def test_the_command_tells_it_in_a_line_and_as_data(
    tmp_path: Path, footage: Path, own_store: None, with_store: Callable[[Path], None]
) -> None:
    with_store(tmp_path / "ws")
    arguments = [write(tmp_path, str(footage)), "--sample", "1", "--gpu-memory"]
    said = CliRunner().invoke(plan, [*arguments, "20MB"], catch_exceptions=False).output
    line = next(line for line in said.splitlines() if line.startswith("memory") and "vae" in line)
    assert "does NOT fit 20.0 MB" in line
    plain = json.loads(CliRunner().invoke(plan, [*arguments, "24GiB", "--json"], catch_exceptions=False).output)
    assert [row["fits"] for row in plain["memory"]] == [True, None]


@pytest.mark.parametrize("size", ["80", "GB", "0GB", "80 apples"])
def test_a_size_that_is_none_is_refused(tmp_path: Path, size: str) -> None:
    result = CliRunner().invoke(plan, [write(tmp_path), "--gpu-memory", size])
    assert result.exit_code == 2 and "write such as 80GB or 24GiB" in result.output
