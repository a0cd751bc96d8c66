"""The stage that teaches a model to go on from its history: its loss, resumed, measured, registered; and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import latent_stages
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from longtake.datasets import clip
from longtake.training import registry
from longtake.training.history import Given, given_of, steps_of, true_steps
from longtake.training.memory_stage import heldout_of, loader_of, prepared
from longtake.training.metrics import continuation
from longtake.training.models.memory_dit import MemoryDiT
from longtake.training.stages import finetune_memory_prior, pretrain_memory
from longtake.training.stages.finetune_memory_prior import Config, reach

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def inputs(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Read them, do not change them."""
    return dict(latent_stages.inputs(tmp_path_factory.mktemp("prior"), dataset))


def config(**changes: Any) -> Config:
    quick = {"kind": "finetune_memory_prior", "eval_videos": 2, "eval_segments": 2, "no_history": 0.0}
    return Config(**latent_stages.QUICK | quick | changes)


def alone(inputs: dict[str, str]) -> dict[str, str]:
    return {name: uri for name, uri in inputs.items() if name != "low_latents"}


def dit(**changes: Any) -> dict[str, Any]:
    return {"model": latent_stages.TINY | changes}


NONE = dit(memory="none") | {"low_latents": None}


def draws(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Recording:
    """An engine at some step that keeps what it is called with; its velocity leads straight to what is truly there."""

    def __init__(self, true: Tensor | None = None, step: int = 0) -> None:
        self.true, self.global_steps, self.calls = true, step, list[Any]()

    def __call__(self, x: Tensor, t: Tensor, times: Tensor, memory: Any, ids: Any, generator: Any) -> Tensor:
        self.calls.append(SimpleNamespace(x=x, t=t, times=times, memory=memory, ids=ids))
        if self.true is None:
            return torch.zeros_like(x)
        # wrong for what is given clean, which must not count
        level = t[:, None, :, None, None]
        velocity = (x - self.true[:, :, -x.shape[2] :]) / level.clamp_min(1e-9)
        return torch.where(level > 0, velocity, 1e6)


def called(
    chosen: Config, inputs: dict[str, str], folder: Path, step: int = 0, seed: int = 5
) -> tuple[Any, Any, float, Any]:
    """The stage's objects, a batch, the loss of the true velocity, and the call."""
    folder.mkdir(exist_ok=True)
    setup = prepared(chosen, inputs, folder)
    batch = next(iter(loader_of(chosen, inputs, setup.data, "train", batch=2)))
    engine = Recording(steps_of(batch, setup.model, true_steps(batch)).high, step)
    loss, logged = finetune_memory_prior._loss(
        chosen, setup.data, setup.model, "generator", {"generator": engine}, batch, draws(seed)
    )
    assert loss.item() == logged["loss"].item()
    return setup, batch, loss.item(), engine.calls[0]


def test_the_loss_is_of_the_segment_given_the_window_and_the_memory_of_a_clean_history(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    chosen = config(posterior="mean", classes=True)
    for seed in range(6):
        setup, batch, loss, call = called(chosen, inputs, tmp_path, seed=seed)
        true = steps_of(batch, setup.model, 6)
        assert loss < 1e-3, "the true velocity has no loss, and what is given does not count"
        assert call.x.shape == (2, 8, 2 + 3, 2, 3) and call.times.tolist() == [4, 5, 6, 7, 8]
        assert torch.equal(call.x[:, :, :2], true.high[:, :, 4:6]) and (call.t[:, :2] == 0).all()
        assert (call.t[:, 2:] > 0).all() and (call.t[:, 2:] == call.t[:, 2:3]).all()
        assert (call.x[:, :, 2:] != true.high[:, :, 6:]).all()
        memory = call.memory
        first, count = memory.start, memory.high.shape[2]
        assert count % 2 == 0 and first + count in (5, 6), "all history, or all but one step that fills no group yet"
        assert torch.equal(memory.high, true.high[:, :, first : first + count])
        assert true.low is not None and torch.equal(memory.low, true.low[:, :, first : first + count])
        assert torch.equal(call.ids, batch["label"].cpu())


def test_nothing_of_the_segment_is_in_what_it_is_given(inputs: dict[str, str], tmp_path: Path) -> None:
    chosen = config(posterior="mean")
    setup, batch, _, call = called(chosen, inputs, tmp_path)
    changed = batch | {name: batch[name] + 3 for name in ("latent", "latent_2")}
    engine = Recording()
    finetune_memory_prior._loss(chosen, setup.data, setup.model, "generator", {"generator": engine}, changed, draws())
    other = engine.calls[0]
    assert torch.equal(other.memory.high, call.memory.high) and torch.equal(other.memory.low, call.memory.low)
    assert torch.equal(other.x[:, :, :2], call.x[:, :, :2]) and (other.x[:, :, 2:] != call.x[:, :, 2:]).any()


def test_some_passes_have_no_history_and_without_a_memory_there_is_the_window_alone(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    _, _, loss, call = called(config(posterior="mean", no_history=1.0), inputs, tmp_path)
    assert call.memory is None and call.x.shape[2] == 3 and call.t.min() > 0 and loss < 1e-3
    half = [called(config(no_history=0.5), inputs, tmp_path, seed=n)[3].memory is None for n in range(12)]
    assert set(half) == {True, False}
    _, _, _, alone_call = called(config(**NONE), alone(inputs), tmp_path / "none")
    assert alone_call.memory is None and alone_call.x.shape[2] == 2 + 3 and alone_call.times.tolist() == [4, 5, 6, 7, 8]


def test_the_curriculum_lengthens_the_history_by_the_step(inputs: dict[str, str], tmp_path: Path) -> None:
    chosen = config(history_curriculum=[[0, 0.0], [10, 1.0], [20, 2.0]], posterior="mean")
    for step, known in ((0, 0), (9, 0), (10, 3), (19, 3), (20, 6), (99, 6)):
        setup, _, loss, call = called(chosen, inputs, tmp_path, step)
        assert reach(chosen, setup.data, step) == known and loss < 1e-3
        assert call.x.shape[2] == min(known, 2) + 3
        if known:
            assert call.times[-1] == 8, "the segment stays at its true time"
            assert call.memory.start >= 6 - known and call.memory.start + call.memory.high.shape[2] in (5, 6)
        else:
            assert call.memory is None


@pytest.mark.usefixtures("group")
def test_a_stopped_training_ends_with_the_same_weights(inputs: dict[str, str], tmp_path: Path) -> None:
    chosen = config(classes=True, no_history=0.5, history_curriculum=[[0, 1.0], [3, 2.0]])
    straight = latent_stages.fit(finetune_memory_prior, chosen, inputs, tmp_path / "straight")
    latent_stages.fit(finetune_memory_prior, chosen, inputs, tmp_path / "stopped", until=2)
    log = latent_stages.Log()
    resumed = latent_stages.fit(finetune_memory_prior, chosen, inputs, tmp_path / "stopped", log=log)
    torch.testing.assert_close(resumed, straight, atol=0, rtol=0)
    assert {row["history_steps"] for row in log.rows} <= {0.0, 3.0, 6.0}


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sharded": {"zero_stage": 3, "no_history": 0.5},
    "bf16": {"precision": "bf16", "zero_stage": 2, "no_history": 0.5} | dit(rates=["1x1x2"], branches="high"),
    "two rates and cross-attention": dit(rates=["2x2x2", "1x1x2"], cross_attention=True, branches="high"),
    "the window alone": dit(memory="none"),
    "a frozen memory": {"freeze": ["memory"]},
}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("way", WAYS)
def test_the_model_learns_and_is_shown_in_every_way_of_training(
    inputs: dict[str, str], tmp_path: Path, way: str
) -> None:
    chosen = config(**{"steps": 3, "sample_every": 3, "checkpoint_every": 3} | WAYS[way])
    needs = chosen.dit().shrink
    chosen, given = (chosen, inputs) if needs else (chosen.model_copy(update={"low_latents": None}), alone(inputs))
    torch.manual_seed(chosen.seed)
    (tmp_path / "before").mkdir()
    before = prepared(chosen, given, tmp_path / "before").model.state_dict()
    log = latent_stages.Log()
    weights = latent_stages.fit(finetune_memory_prior, chosen, given, tmp_path / "run", log=log)
    # window and segment, true above generated
    assert log.videos == {"continued": (1 + 4 * 4, 2 * 32, 48, 3)}
    moved = {name for name in weights if not torch.allclose(weights[name].float(), before[name].float(), atol=1e-5)}
    assert "token_out.weight" in moved
    assert any(name.startswith("memory.") for name in moved) == (way not in ("a frozen memory", "the window alone"))


def test_heldout_losses_compare_between_models_and_leave_out_what_is_given(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    setup = prepared(config(), inputs, tmp_path)

    def clips() -> Iterator[tuple[Given, Tensor | None]]:
        for batch in heldout_of(config(), inputs, setup.data):
            known = true_steps(batch)
            yield given_of(steps_of(batch, setup.model, known), known, setup.model.config), None

    losses = continuation.heldout_losses(setup.model.eval(), clips(), 3)
    assert losses.shape == (len(list(clips())), 8) and np.isfinite(losses).all()
    np.testing.assert_array_equal(losses, continuation.heldout_losses(setup.model, clips(), 3))
    # a new model says zero: its loss is the mean square of noise - x0, whatever the window
    wider = [(g._replace(x0=g.x0[:, :, g.window :], window=0, times=g.times[g.window :]), i) for g, i in clips()]
    np.testing.assert_allclose(losses, continuation.heldout_losses(setup.model, wider, 3), rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"history_curriculum": [[5, 1.0]]}, r"needs \[step, seconds\] from step 0 on"),
        ({"history_curriculum": [[0, 1.0], [0, 2.0]]}, r"needs \[step, seconds\] from step 0 on"),
        ({"history_curriculum": [[0, 1.0], [5, 3.0]]}, "history_curriculum: 3 s are more than history_seconds, 2;"),
        ({"no_history": 1.5}, "less than or equal to 1"),
        ({"lora": {"rank": 2}}, "lora: without a base all else would stay random"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(**changes)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    yield from latent_stages.mlflow_run(tmp_path, monkeypatch)


def heldout_folder(store: str, tmp_path: Path) -> Path:
    import mlflow

    return Path(mlflow.MlflowClient().download_artifacts(store, "heldout", str(tmp_path)))


@pytest.mark.slow
def test_from_a_pretrained_memory_to_a_champion_that_goes_on(
    inputs: dict[str, str], store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pretrain_memory.Config(**latent_stages.QUICK | {"kind": "pretrain_memory", "classes": True})
    base = pretrain_memory.run(first, inputs, str(tmp_path / "memory"))["uri"]
    monkeypatch.setenv("MLFLOW_RUN_ID", store)
    network = torch.jit.script(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()))
    network.save(str(tmp_path / "features.pt"))
    lora = {"rank": 2, "targets": [r"layers\..*"], "full": [r"memory\.", r"layers\.\d+\.cross"]}
    chosen = config(
        base=base,
        model={"cross_attention": True},
        lora=lora,
        classes=True,
        name="prior",
        guidance=2.0,
        features=str(tmp_path / "features.pt"),
        sample_every=2,
    )
    result = finetune_memory_prior.run(
        chosen, inputs | {"base": "models:/memory-dit@champion"}, str(tmp_path / "prior")
    )
    assert result["uri"] == "models:/prior/1" and result["metrics"]["heldout_loss"] > 0
    assert 0 <= result["metrics"]["distance"] <= 2 and "distance_true" in result["metrics"]
    model, facts = registry.load_with_facts("models:/prior@champion")
    assert isinstance(model, MemoryDiT) and model.config.cross_attention
    assert not any("lora" in name for name in model.state_dict())
    assert facts["stage"] == "generation" and facts["sampling"]["guidance"] == 2.0
    assert facts["lineage"]["inputs"]["base"]["uri"] == base
    seen = heldout_folder(store, tmp_path)
    record = json.loads((seen / "continued.json").read_text())
    assert len(record["summary"]["distance_by_segment"]) == 2
    # as much of the history as a segment has, then what is generated
    assert clip.decode((seen / "continued-0.mp4").read_bytes()).shape == (12 + 2 * 12, 32, 48, 3)
    assert finetune_memory_prior.outside(chosen) and not finetune_memory_prior.outside(config())
    monkeypatch.setenv("MLFLOW_RUN_ID", store)
    again = finetune_memory_prior.run(chosen, inputs | {"base": base}, str(tmp_path / "prior"))
    assert again["uri"] == "models:/prior/1"


@pytest.mark.slow
def test_two_processes_make_one_champion(
    inputs: dict[str, str], store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = config(zero_stage=3, no_history=0.5, launcher={"by": "torchrun", "processes": 2})
    result = finetune_memory_prior.run(chosen, inputs, str(tmp_path / "out"))
    assert result["uri"] == "models:/memory-dit/1" and "distance" not in result["metrics"]
    assert "no distance to the history, since `features` names no feature network" in capsys.readouterr().out


RECIPE = """
name: memory
workspace: {folder}/work
stages:
  memory:
    kind: pretrain_memory
    dataset: {dataset}
    latents: {latents}
    low_latents: {low_latents}
    model: {{preset: memory_dit_tiny, depth: 2, width: 32, heads: 2, memory_widths: [8, 16], memory_heads: 2, rates: [2x2x2], window: 2}}
    frames: 9
    history_seconds: 2
    steps: 2
    batch: 2
    workers: 0
    sample_steps: 1
    eval_clips: 1
  prior:
    kind: finetune_memory_prior
    dataset: {dataset}
    latents: {latents}
    low_latents: {low_latents}
    base: memory
    lora: {{rank: 4, full: ["memory"]}}
    name: memory-prior
    frames: 9
    history_seconds: 2
    steps: 2
    batch: 2
    workers: 0
    sample_steps: 1
    eval_clips: 1
    eval_videos: 1
    eval_segments: 1
"""


@pytest.mark.slow
def test_a_recipe_goes_from_latents_to_a_model_that_remembers(inputs: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "memory.yaml").write_text(RECIPE.format(folder=tmp_path, **inputs))
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    command = [sys.executable, "-P", "-m", "longtake.infra.cli", "run", str(tmp_path / "memory.yaml")]
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("memory (2x2x2): 2 s of history, 6 steps of") == 2
    assert "models:/memory-prior/1" in done.stdout, done.stdout
