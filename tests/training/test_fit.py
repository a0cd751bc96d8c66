"""The memory that a plan tells: what a real training takes, at full size in seconds, and by how little one fits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import measured
import pytest
import torch
import yaml
from trainings import BEFORE, COMMON, LATENTS, LATTE, LOW, MEMORY, SHARDS, TRAININGS, of_another_library, source

from longtake.datasets import text
from longtake.datasets.errors import UserError
from longtake.training import engines, fit, remedies
from longtake.training.models.latte.model import Latte, config_from_preset


def check(found: fit.Source) -> None:
    assert measured.planned(found) == pytest.approx(measured.allocated(found), rel=0.1)


@pytest.mark.parametrize("name", ["latte", "tats"])
def test_a_plan_is_within_a_tenth_of_what_a_training_takes(tmp_path: Path, group: None, name: str) -> None:
    check(source(tmp_path, TRAININGS[name]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.soak) if name == "mavin_unet" else name
        for name in sorted(TRAININGS.keys() - {"latte", "tats"})
    ],
)
def test_so_it_is_of_every_family(tmp_path: Path, group: None, name: str) -> None:
    check(source(tmp_path, TRAININGS[name]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 2},
        {"precision": "bf16"},
        {"precision": "bf16", "gradient_precision": "bf16"},
        {"model": {"preset": "latte_s"}, "precision": "bf16"},
        {"model": {"preset": "latte_tiny", "activation_checkpointing": True}, "batch": 16},
        {"freeze": ["layers"]},
        {"model": {"preset": "latte_s"}, "optimizer": "muon"},
        {"ema_half_lives": [5.0, 50.0]},
        {"model": {"preset": "latte_s"}, "zero_stage": 2, "precision": "bf16"},
        {"model": {"preset": "latte_s"}, "zero_stage": 1},
        {"model": {"preset": "latte_s"}, "zero_stage": 2},
        {"model": {"preset": "latte_s"}, "zero_stage": 3},
    ],
    ids=str,
)
def test_so_it_is_of_every_setting_that_decides_it(tmp_path: Path, group: None, changes: dict[str, Any]) -> None:
    check(source(tmp_path, LATTE, **changes))


@pytest.mark.slow
def test_so_it_is_of_a_loss_in_chunks(tmp_path: Path, group: None) -> None:
    check(source(tmp_path, TRAININGS["tats"], batch=8, loss_chunk=64))


def test_activations_on_the_host_are_not_on_the_device(tmp_path: Path) -> None:
    taken = []
    for moved in (False, True):
        found = source(tmp_path, TRAININGS["latte_of_pixels"], batch=16, model=SHALLOW, offload_activations=moved)
        taken.append(remedies.Planned(found.stage, found.config, found.inputs).fit())
    assert taken[1].activations < 0.5 * taken[0].activations
    assert taken[1].total - taken[1].activations <= taken[0].total - taken[0].activations + taken[1].gradients


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
def test_so_it_is_of_a_model_of_another_library(tmp_path: Path, group: None, lora: dict[str, Any] | None) -> None:
    check(of_another_library(tmp_path, lora))


@pytest.mark.soak
def test_a_process_grows_by_what_a_plan_tells(tmp_path: Path) -> None:
    found = source(tmp_path, TRAININGS["latte_of_pixels"], batch=8, model={"preset": "latte_s", "patch": 8})
    script = Path(measured.__file__)
    command = [sys.executable, str(script), str(tmp_path / "r.yaml"), "training"]
    grown = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    # the kernel counts libraries and what torch has freed and not given back, too
    assert 0.95 < grown / measured.planned(found) < 1.5


def full_size(folder: Path, training: dict[str, Any]) -> fit.Source:
    """A training of videos and latents of 256x256 or more."""
    shards = SHARDS | {"clip": {"short_side": 512, "fps": 24, "max_seconds": 60}}
    latents = {"size": [256, 256]}
    path = folder / "r.yaml"
    stages = BEFORE | {
        "shards": shards,
        "latents": LATENTS | latents,
        "low": LOW | latents,
        "training": COMMON | training,
    }
    path.write_text(yaml.safe_dump({"name": "r", "workspace": str(folder / "ws"), "stages": stages}))
    return measured.source_of(str(path), "training")


@pytest.mark.parametrize(
    "training",
    [
        {"kind": "pretrain_vae", "model": {"preset": "pv_vae"}, "sizes": [[512, 512]], "gan_start": 0, "batch": 8},
        LATTE | {"model": {"preset": "latte_xl"}, "batch": 16},
        {"kind": "pretrain_memory"} | MEMORY | {"model": {"preset": "memory_dit_xl"}, "batch": 8},
    ],
    ids=lambda training: str(training["model"]["preset"]),
)
def test_a_full_size_is_told_without_its_memory(tmp_path: Path, training: dict[str, Any]) -> None:
    found = full_size(tmp_path, training)
    before = measured.resident()
    told = remedies.Planned(found.stage, found.config, found.inputs).fit()
    assert measured.resident() - before < 300 << 20 < told.weights < told.total


def test_the_weights_of_a_plan_are_those_of_the_model(tmp_path: Path) -> None:
    found = source(tmp_path, TRAININGS["latte_of_pixels"], ema_half_lives=[5.0, 50.0])
    told = remedies.Planned(found.stage, found.config, found.inputs).fit()
    latte = Latte(config_from_preset("latte_tiny", channels=3, patch=16, shape=(9, 64, 64)))
    learning = sum(p.numel() for p in latte.parameters())
    assert told.weights == sum(t.nbytes for t in (*latte.parameters(), *latte.buffers()))
    assert told.optimizer == told.averages == 8 * learning


def test_ranks_share_the_batch_and_what_zero_divides(tmp_path: Path) -> None:
    def told(**changes: Any) -> fit.Fit:
        found = source(tmp_path, LATTE, batch=8, **changes)
        return remedies.Planned(found.stage, found.config, found.inputs).fit()

    run = {"launcher": {"by": "torchrun", "processes": 4}}
    found, alone = source(tmp_path, LATTE, batch=8), told()
    most = [max(fit.trace_of(found.stage, found.config, found.inputs, world).points.values()) for world in (1, 4)]
    assert most[0] == pytest.approx(4 * most[1], rel=0.1)
    one, three = told(run=run, zero_stage=1), told(run=run, zero_stage=3)
    assert 4 * one.optimizer == pytest.approx(12 * alone.optimizer / 8) and 4 * three.weights == pytest.approx(
        one.weights, abs=4
    )
    assert told(run=run, zero_stage=1, offload="optimizer").optimizer == 0


SHALLOW = {"preset": "latte_tiny", "depth": 2, "patch": 4}


def remedy(folder: Path, share: float, **changes: Any) -> tuple[str, ...] | None:
    """The changes that bring a training to this share of its memory."""
    found = source(folder, TRAININGS["latte_of_pixels"], **{"batch": 16, "model": SHALLOW} | changes)
    planned = remedies.Planned(found.stage, found.config, found.inputs)
    limit = share * planned.fit().total
    found_remedy = planned.remedy(limit)
    assert found_remedy is None or found_remedy.fit.total <= limit
    return found_remedy and found_remedy.changes


@pytest.mark.slow
def test_the_cheapest_change_that_is_enough_is_named(tmp_path: Path) -> None:
    again = SHALLOW | {"activation_checkpointing": True}
    run = {"launcher": {"by": "torchrun", "processes": 4}}
    # one of two blocks, where that is enough
    assert remedy(tmp_path, 0.9) == ("model.activation_checkpointing: 0.25",)
    # most of it are the optimizer's states
    deep = {"preset": "latte_s", "patch": 16, "activation_checkpointing": True}
    assert remedy(tmp_path, 0.9, model=deep, batch=4, run=run) == ("zero_stage: 1",)
    assert remedy(tmp_path, 0.8, model=again) == ("accumulate: 2",)
    assert remedy(tmp_path, 0.001) is None


@pytest.mark.slow
def test_a_pass_of_fewer_tokens_is_named_down_to_one_window(tmp_path: Path) -> None:
    # passes of 15 windows do not halve; one window has 3x4x4 tokens, so that 32 hold none
    found = of_another_library(tmp_path, {"rank": 4}, batch=15, max_tokens=130, activation_checkpointing=True)
    planned = remedies.Planned(found.stage, found.config, found.inputs)
    whole = planned.fit().total
    assert (told := planned.remedy(0.9 * whole)) and told.changes == ("max_tokens: 65",)
    assert planned.remedy(0.001 * whole) is None


# all that one device can do is done already
DONE: dict[str, Any] = {"zero_stage": 2, "offload": "optimizer", "offload_activations": True}


@pytest.mark.soak
def test_a_window_that_fits_on_no_device_is_shared(tmp_path: Path) -> None:
    model = {"preset": "latte_xl", "activation_checkpointing": True}
    found = full_size(tmp_path, LATTE | DONE | {"model": model, "frames": 513, "batch": 1, "precision": "bf16"})
    planned = remedies.Planned(found.stage, found.config, found.inputs)
    whole = planned.fit()
    told = planned.remedy(0.8 * whole.total)
    assert told and told.fit.total <= 0.8 * whole.total
    assert told.fit.activations < 0.6 * whole.activations
    assert told.changes == ("run.launcher.by: torchrun", "run.launcher.processes: 2", "run.launcher.sequence: 2")


@pytest.mark.slow
def test_processes_that_are_there_share_a_window_in_more_passes(tmp_path: Path) -> None:
    run = {"launcher": {"by": "torchrun", "processes": 8}}
    again = SHALLOW | {"activation_checkpointing": True}
    assert remedy(tmp_path, 0.8, **DONE, model=again, batch=8, run=run) == ("run.launcher.sequence: 2", "accumulate: 2")
    # one head is not shared
    assert remedy(tmp_path, 0.8, **DONE, model=again | {"heads": 1}, batch=8, run=run) is None


@pytest.mark.slow
def test_changes_are_put_together_where_one_is_not_enough(tmp_path: Path) -> None:
    changes = remedy(tmp_path, 0.07)
    assert changes and changes[0].startswith("model.activation_checkpointing: ") and len(changes) > 1


def test_a_stage_that_must_run_first_is_named(tmp_path: Path) -> None:
    for stage, changed, key in (("latents", {"size": None}, "latents"), ("training", {"classes": True}, "classes")):
        path = tmp_path / "r.yaml"
        stages: dict[str, Any] = BEFORE | {"training": COMMON | LATTE}
        stages |= {stage: stages[stage] | changed}
        path.write_text(yaml.safe_dump({"name": "r", "workspace": str(tmp_path / "ws"), "stages": stages}))
        found = measured.source_of(str(path), "training")
        with pytest.raises(UserError, match=f"^{key}: .*run it first$"):
            remedies.Planned(found.stage, found.config, found.inputs).fit()


LOADED = ("vae", "vqgan", "encgan3", "latte_of_pixels")


@pytest.mark.parametrize("name", LOADED)
def test_the_batch_of_a_plan_is_as_a_loader_gives_it(tmp_path: Path, dataset: str, group: None, name: str) -> None:
    changes: dict[str, Any] = {"run": {"workers": 0}}
    changes |= (
        {"sizes": [[32, 32]]} if name == "vae" else {"recall": False} if name == "encgan3" else {"size": [32, 32]}
    )
    found = source(tmp_path, TRAININGS[name], **changes)
    stage, config = found.stage, found.config
    setup = stage.prepare(config, {"dataset": dataset}, tmp_path)
    loaded = next(iter(stage.loader(config, setup, 0, 1)))
    planned = stage.largest(config, found.inputs, config.batch).batch
    shapes = {k: (v.shape, v.dtype) for k, v in planned.items() if isinstance(v, torch.Tensor)}
    assert {k: (loaded[k].shape, loaded[k].dtype) for k in shapes if k != "chances"} == {
        k: v for k, v in shapes.items() if k != "chances"
    }
    assert engines.device().type != "cpu" or os.environ.get("DS_ACCELERATOR") == "cpu"


def test_texts_that_are_there_already_are_read_within_the_trace(tmp_path: Path) -> None:
    encoder = text.TextConfig(length=12).model_dump() | {"width": 8}
    record = text.Text("/videos", "text-x", encoder, "caption", None, {}, {}, {})
    text.write_text(str(tmp_path / "text"), record, torch.zeros(3, 8, dtype=torch.bfloat16))
    plain, told = (source(tmp_path, LATTE | more) for more in ({}, {"text": str(tmp_path / "text")}))
    traced = [fit.trace_of(each.stage, each.config, each.inputs, 1) for each in (plain, told)]
    # attention to texts in each of 4 blocks, and what projects them
    assert traced[1].learning["model"] > traced[0].learning["model"] + 4 * 4 * 128 * 128
