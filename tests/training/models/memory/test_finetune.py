"""The stage that teaches a model to go on from its history: its loss, resumed, measured, registered; and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import latent_stages
import numpy as np
import pytest
import torch
from flat import nested
from latent_stages import prepared
from torch import Tensor, nn

from longtake.datasets import clip, stage
from longtake.datasets.errors import UserError
from longtake.training import registry
from longtake.training.loop import train
from longtake.training.models.common.condition import of_classes
from longtake.training.models.generator import Settings
from longtake.training.models.memory import continuation
from longtake.training.models.memory import finetune as finetune_memory_prior
from longtake.training.models.memory import pretrain as pretrain_memory
from longtake.training.models.memory.data import describe_history, heldout_of, loader_of
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.finetune import Config
from longtake.training.models.memory.history import Segment, history_lengths, stretch_of
from longtake.training.models.memory.stretch import Stretch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def inputs(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Read them, do not change them."""
    return dict(latent_stages.inputs(tmp_path_factory.mktemp("prior"), dataset))


def config(**changes: Any) -> Config:
    quick = {"kind": "finetune_memory_prior", "eval_videos": 2, "eval_segments": 2, "no_history": 0.0}
    return Config(**nested(latent_stages.QUICK | quick | changes))


def alone(inputs: dict[str, str]) -> dict[str, str]:
    return {name: uri for name, uri in inputs.items() if name != "low_latents"}


def dit(**changes: Any) -> dict[str, Any]:
    return {"model": latent_stages.TINY | changes}


NONE = dit(memory="none") | {"low_latents": None}


def draws(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Recording:
    """An engine at some step that keeps what it is called with; its velocity leads straight to what is truly there."""

    def __init__(self, true: Tensor | None = None) -> None:
        self.true, self.calls = true, list[Any]()

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        times: Tensor,
        memory: Any,
        ids: Any,
        rng: Any,
        first: Tensor,
        seen: Tensor | None,
        level: Tensor | None,
    ) -> Tensor:
        given = {"x": x, "t": t, "times": times, "memory": memory, "ids": ids.classes, "first": first, "level": level}
        shape = torch.ones(times.shape, dtype=torch.bool)
        self.calls.append(SimpleNamespace(**given, seen=shape if seen is None else seen))
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
    batch = next(iter(loader_of(chosen, setup, "train", batch=2, seed=seed)))
    engine = Recording(stretch_of(batch, setup.model, 6).high)
    loss, logged = finetune_memory_prior._loss(chosen, setup.model, latent_stages.turn(engine, batch, draws(seed)))
    assert loss.item() == logged["loss"].item()
    return setup, batch, loss.item(), engine.calls[0]


def test_the_loss_is_of_the_segment_given_what_generation_would_be_given_there(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    chosen, counts = config(posterior="mean", classes=True, no_history=0.25), set()
    for seed in range(8):
        setup, batch, loss, call = called(chosen, inputs, tmp_path, seed=seed)
        true = stretch_of(batch, setup.model, 6)
        assert loss < 1e-3, "the true velocity has no loss, and what is given does not count"
        window = call.x.shape[2] - 3
        assert (call.t[:, :window] == 0).all() and (call.t[:, window:] > 0).all() and call.seen[:, window:].all()
        assert (call.x[:, :, window:] != true.high[:, :, 6:]).all()
        assert torch.equal(call.ids, batch["label"].cpu())
        for n, begin in enumerate(batch["stream_step"].tolist()):
            # the same latents, one after the other, through what generation keeps its history in
            known = min(begin, 6)
            before = Stretch(true.high[n : n + 1, :, :6], true.low[n : n + 1, :, :6], 0, true.first[n : n + 1, :6])
            told = [call.first[n, window:].tolist(), [begin == 0, False, False]]
            assert told[0] == told[1], "only the beginning of a stream is a first latent"
            late = begin % 2
            count = (known - late) // 2 * 2
            memory = call.memory
            held = memory.high.shape[2] - (0 if memory.skip is None else int(memory.skip[n]))
            assert held == count, "all of the history in whole groups, counted from the stream's first latent"
            if held:
                assert torch.equal(memory.high[n, :, -held:], before.high[0, :, 6 - late - held : 6 - late])
                assert torch.equal(memory.low[n, :, -held:], before.low[0, :, 6 - late - held : 6 - late])
                assert memory.first[n, -held:].tolist() == [begin <= 6 and not n for n in range(held)]
            seen = int(call.seen[n, :window].sum())
            assert seen == min(known, 2 if held else max(2, late)), "beside it the window, of what there is"
            assert torch.equal(call.x[n, :, window - seen : window], before.high[0, :, 6 - seen :])
            counts.add(known)
    assert {0, 6} < counts <= {0, 2, 3, 4, 5, 6}, "lengths between none and all occur"


def test_nothing_of_the_segment_is_in_what_it_is_given(inputs: dict[str, str], tmp_path: Path) -> None:
    chosen = config(posterior="mean")
    setup, batch, _, call = called(chosen, inputs, tmp_path)
    changed = batch | {name: batch[name] + 3 for name in ("latent", "low")}
    engine = Recording()
    finetune_memory_prior._loss(chosen, setup.model, latent_stages.turn(engine, changed, draws()))
    other, window = engine.calls[0], call.x.shape[2] - 3
    assert torch.equal(other.memory.high, call.memory.high) and torch.equal(other.memory.low, call.memory.low)
    assert torch.equal(other.x[:, :, :window], call.x[:, :, :window])
    assert (other.x[:, :, window:] != call.x[:, :, window:]).any()


def test_some_samples_have_no_history_and_begin_a_stream(inputs: dict[str, str], tmp_path: Path) -> None:
    chosen = config(posterior="mean", no_history=1.0)
    _, batch, loss, call = called(chosen, inputs, tmp_path)
    assert batch["stream_step"].tolist() == batch["history_steps"].tolist() == [0, 0] and loss < 1e-3
    assert (call.memory.skip == call.memory.high.shape[2]).all() and call.x.shape[2] == 3
    assert call.first.tolist() == [[True, False, False]] * 2
    setup = prepared(config(no_history=0.5), inputs, tmp_path)
    loader = loader_of(config(no_history=0.5), setup, "train", batch=2, epochs=8)
    begins = torch.cat([batch["stream_step"] for batch in loader])
    assert 0.3 < (begins == 0).float().mean() < 0.7 and len(begins) > 40
    _, _, _, without = called(config(**NONE), alone(inputs), tmp_path / "none")
    assert without.memory is None and without.x.shape[2] <= 2 + 3


def test_the_losses_of_starts_and_of_what_comes_later_are_told_apart(inputs: dict[str, str], tmp_path: Path) -> None:
    for share, told in ((0.0, {"loss_later"}), (1.0, {"loss_start"})):
        chosen = config(no_history=share)
        setup = prepared(chosen, inputs, tmp_path)
        batch = next(iter(loader_of(chosen, setup, "train", batch=2)))
        turn = latent_stages.turn(Recording(), batch, draws())
        loss, logged = finetune_memory_prior._loss(chosen, setup.model, turn)
        assert {name for name in logged if name.startswith("loss_")} == told
        assert logged[told.pop()].item() == pytest.approx(loss.item())


def test_the_curriculum_lengthens_the_history_by_the_step(inputs: dict[str, str], tmp_path: Path) -> None:
    curriculum = [[0, 0.7], [10, 1.0], [20, 2.0]]
    chosen = config(history_curriculum=curriculum, posterior="mean", batch=4, accumulate=2, no_history=0.1)
    setup = prepared(chosen, inputs, tmp_path)
    every = history_lengths(setup.model.config).some
    loader = loader_of(chosen, setup, "train", batch=2)
    # two batches a step
    for batches, reach in ((range(20), 2), (range(20, 40), 3), (range(40, 90), 6)):
        assert {setup.data.reach(chosen, batch // 2) for batch in batches} == {reach}
        known = [n for batch in loader.at(batches) for n in batch["history_steps"].tolist()]
        assert set(known) == {0} | {length for length in every if length <= reach}
        assert abs(np.mean(known) - loader.history_mean(reach)) < 3 * np.std(known) / np.sqrt(len(known))
    plain = loader_of(config(no_history=0.1), setup, "train", batch=2)
    for one, other in zip(loader.at(range(40, 50)), plain.at(range(40, 50)), strict=True):
        assert torch.equal(one["latent"], other["latent"]) and torch.equal(one["history_steps"], other["history_steps"])


def test_noise_of_the_history_is_of_a_level_of_each_sample_which_the_model_is_told(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    plain = called(config(posterior="mean"), inputs, tmp_path)[3]
    assert plain.level is None
    levels = []
    for seed in range(12):
        setup, batch, _, call = called(config(posterior="mean", history_noise=0.5), inputs, tmp_path, seed=seed)
        assert setup.model.config.history_noise == 0.5
        window = call.x.shape[2] - 3
        assert torch.equal(call.t[:, :window], call.level[:, None].expand(-1, window))
        true = stretch_of(batch, setup.model, 6)
        for n, level in enumerate(call.level.tolist()):
            held = call.memory.high.shape[2] - (0 if call.memory.skip is None else int(call.memory.skip[n]))
            late = int(batch["stream_step"][n]) % 2
            if held:
                clean = true.high[n, :, 6 - late - held : 6 - late]
                noise = (call.memory.high[n, :, -held:] - (1 - level) * clean) / max(level, 1e-3)
                assert level < 0.02 or 0.7 < float(noise.std()) < 1.3
        levels += call.level.tolist()
    assert min(levels) < 0.15 and 0.35 < max(levels) <= 0.5 and len(set(levels)) == 24


def test_the_history_is_as_long_on_the_average_on_any_number_of_ranks(inputs: dict[str, str], tmp_path: Path) -> None:
    chosen = config(no_history=0.2, history_least=0.0)
    setup = prepared(chosen, inputs, tmp_path)

    def lengths(world: int, batch: int, epochs: int) -> list[float]:
        """Of each rank's samples, as the loss masks them."""
        out = []
        for rank in range(world):
            options: dict[str, Any] = {"rank": rank, "world": world, "batch": batch, "epochs": epochs, "last": "pad"}
            loader = loader_of(chosen, setup, "train", **options)
            for each in loader:
                given = finetune_memory_prior.segment_of(each, setup.model, 6)
                known = each["history_steps"]
                late = torch.minimum(each["stream_step"] % 2, known)
                skip = 0 if given.history.skip is None else given.history.skip
                assert torch.equal(
                    given.history.high.shape[2] - skip - torch.zeros_like(known), (known - late) // 2 * 2
                )
                out += known.tolist()
        return out

    loader = loader_of(chosen, setup, "train", batch=1)
    expected = loader.history_mean()
    one, many = lengths(1, 1, 40), lengths(64, 64, 8)
    # of single samples, and of batches so large that their least would be none
    spread = 3 * np.std(one) / np.sqrt(len(one))
    assert expected > 1.5 and abs(np.mean(one) - expected) < spread and abs(np.mean(many) - expected) < spread
    said = describe_history(chosen, setup.data, loader)
    assert said.startswith(f"history: {expected:.1f} latents on the average")
    rising = config(no_history=0.2, history_least=0.0, history_curriculum=[[0, 1.0], [9, 2.0]])
    shorter = f"from step 0 on {loader.history_mean(3):.1f} latents on the average, "  # 2 or 3 of them
    assert loader.history_mean(3) < expected
    said = describe_history(rising, setup.data, loader)
    assert said.startswith(f"history: {shorter}") and f"; from step 9 on {expected:.1f} latents" in said


@pytest.mark.usefixtures("group")
def test_a_stopped_training_ends_with_the_same_weights(inputs: dict[str, str], tmp_path: Path) -> None:
    chosen = config(classes=True, no_history=0.5, history_noise=0.3, history_curriculum=[[0, 1.0], [3, 2.0]])
    straight = latent_stages.fit(finetune_memory_prior, chosen, inputs, tmp_path / "straight")
    latent_stages.fit(finetune_memory_prior, chosen, inputs, tmp_path / "stopped", until=2)
    log = latent_stages.Log()
    resumed = latent_stages.fit(finetune_memory_prior, chosen, inputs, tmp_path / "stopped", log=log)
    torch.testing.assert_close(resumed, straight, atol=0, rtol=0)
    assert all(0 <= row["history_steps"] <= 6 for row in log.steps)


@pytest.mark.usefixtures("group")
def test_a_network_that_takes_no_such_videos_is_refused_before_the_first_step(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    network = torch.jit.script(nn.Sequential(nn.Conv2d(3, 2, 999), nn.AdaptiveAvgPool2d(1)))
    network.save(str(tmp_path / "features.pt"))
    chosen = config(features=str(tmp_path / "features.pt"))
    with pytest.raises(UserError, match="takes no videos of"):
        finetune_memory_prior.objective(chosen, prepared(chosen, inputs, tmp_path))


@pytest.mark.usefixtures("group")
def test_the_held_out_clips_are_the_same_each_time(inputs: dict[str, str], tmp_path: Path) -> None:
    curriculum = [[0, 0.7], [1, 1.0], [2, 2.0]]
    chosen = config(
        lr=1e-12, heldout_every=1, heldout_clips=1, steps=3, history_noise=0.3, history_curriculum=curriculum
    )
    setup = prepared(chosen, inputs, tmp_path)
    made = replace(finetune_memory_prior.objective(chosen, setup), heldout=heldout_of(chosen, setup))
    loader = loader_of(chosen, setup, "train", batch=2)
    log = latent_stages.Log()
    train(made, loader, chosen, tmp_path / "run", log)  # type: ignore[arg-type]
    losses = [row["heldout/loss"] for row in log.rows if "heldout/loss" in row]
    assert len(losses) == 3 and losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    assert [row["heldout/history_steps"] for row in log.rows if "heldout/history_steps" in row] == [6.0] * 3


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
    # window and segment, true above generated, as what comes after the rest of the history
    assert log.videos == {"continued": (4 * 5, 2 * 32, 48, 3)}
    moved = {name for name in weights if not torch.allclose(weights[name].float(), before[name].float(), atol=1e-5)}
    assert "token_out.weight" in moved
    assert any(name.startswith("memory.") for name in moved) == (way not in ("a frozen memory", "the window alone"))


def test_heldout_losses_compare_between_models_and_leave_out_what_is_given(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    setup = prepared(config(), inputs, tmp_path)

    def clips() -> Iterator[tuple[Segment, Tensor | None]]:
        for batch in heldout_of(config(), setup):
            yield finetune_memory_prior.segment_of(batch, setup.model, 6), None

    losses = continuation.heldout_losses(setup.model.eval(), clips(), 3)
    assert losses.shape == (len(list(clips())), 8) and np.isfinite(losses).all()
    np.testing.assert_array_equal(losses, continuation.heldout_losses(setup.model, clips(), 3))
    # a new model says zero: its loss is the mean square of noise - x0, whatever the window
    wider = [
        (g._replace(x0=g.x0[:, :, g.recent :], recent=0, times=g.times[:, g.recent :], first=g.first[:, g.recent :]), i)
        for g, i in clips()
    ]
    np.testing.assert_allclose(losses, continuation.heldout_losses(setup.model, wider, 3), rtol=1e-4)


def test_losses_by_history_are_of_the_same_segments_from_the_same_noise(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = prepared(config(), inputs, tmp_path)
    counts, calls = (0, 2, 3, 4, 6), list[tuple[Tensor, Segment]]()

    def velocity(x: Tensor, t: Tensor, times: Tensor, memory: Any, *more: Any) -> Tensor:
        calls.append((x[:, :, -3:], memory))
        return torch.zeros_like(x)

    # as the stage would call it, but with what it is called with kept
    model, seen = setup.model.eval(), list[Segment]()
    original = finetune_memory_prior.segment_after

    def noted(*arguments: Any) -> Segment:
        seen.append(original(*arguments))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", velocity)
        patch.setattr(finetune_memory_prior, "segment_after", noted)
        losses = finetune_memory_prior.losses_by_history(config(), setup, counts)
    clips = heldout_of(config(), setup, 6).samples
    assert set(losses) == set(counts) and clips > 1 and len(calls) == len(seen) == clips * len(counts)
    for clip_number in range(clips):
        for number, count in enumerate(counts):
            at = number * clips + clip_number
            assert torch.equal(calls[at][0], calls[clip_number][0]), "the same segment, and the same noise in it"
            given = seen[at]
            held = 0 if given.history is None else given.history.high.shape[2] - int(given.history.skip or 0)
            shown = given.recent if given.seen is None else int(given.seen[0, : given.recent].sum())
            assert held == count // 2 * 2 and shown == min(count, 2), "of the history, so many of its last latents"
            assert bool(given.first[:, : given.recent].any() if given.recent else False) is False
    # whoever says zero has the same loss with any history
    assert all(np.allclose(some, losses[0], rtol=1e-5) for some in losses.values())
    # what is not given does not matter
    batch = next(iter(heldout_of(config(), setup, 6)))
    changed = batch | {name: batch[name] + 3 for name in ("history_latent", "history_low")}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draws()))
    for count, alike in ((0, True), (4, False)):
        one, other = (
            continuation.heldout_losses(model, [(original(each, model, count), None)], 3) for each in (batch, changed)
        )
        assert np.array_equal(one, other) == alike


def test_what_comes_next_is_compared_with_the_last_frame_repeated(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = prepared(config(), inputs, tmp_path)
    pixels = torch.randint(0, 256, (1, 3, 24 + 9, 32, 48), dtype=torch.uint8, generator=draws())
    ids = [None, of_classes([1]), None, None]
    videos = [continuation.Video(n, pixels[:, :, begin:], ids[n]) for n, begin in enumerate((0, 0, 8, 24))]
    calls = []

    def generate(model: Any, vae: Any, steps: int, seeds: list[int], *, start: Any, story: Any, settings: Any) -> Any:
        classes = [(begin, condition.classes.tolist()) for begin, condition in story]
        calls.append((seeds, None if start is None else start.shape[2], classes, settings.guidance))
        true = pixels[:, :, -9:].permute(0, 2, 3, 4, 1).numpy().repeat(len(seeds), 0)
        # off by 51 of 255, and what comes later does not count
        yield np.concatenate([true if seeds[0] != 2 else np.where(true > 127, true - 51, true + 51), true[:, :3]], 1)
        yield true

    monkeypatch.setattr(continuation.segments, "generate", generate)
    how = continuation.Continuation(9, 2, 12.0, 0, Settings(2, guidance=2.0), "mean")
    losses = np.ones((3, 8))
    given: dict[str, Any] = {
        "losses": losses,
        "starts": losses,
        "by_history": {0: losses},
        "trivial": {"heldout_loss_mean": 2.0},
    }
    found = continuation.evaluate(setup.model, setup.codec, [videos[:3], videos[3:]], tmp_path, how, **given)
    # at once what is of as much history, with a class or without
    assert calls == [([0], 6, [], 1.0), ([1], 6, [(0, [1])], 2.0), ([2], 4, [], 1.0), ([3], None, [], 1.0)]
    assert found["psnr_next"] == pytest.approx((100 + 100 - 20 * np.log10(51 / 255)) / 3, abs=1e-3)
    error = (pixels[:, :, 23:24].double() - pixels[:, :, 24:]).div(255).square().mean()
    assert found["psnr_next_copy_last"] == pytest.approx(-10 * error.log10().item(), abs=1e-3)
    assert [(a["trivial"], a["beats"]) for a in found["against"]] == [
        ("predicting the mean velocity", True),
        ("repeating the last frame", True),
    ]
    assert found["videos"] == 4 and found["distance"] is None
    entries = json.loads((tmp_path / "continued.json").read_text())["videos"]
    assert [(e["file"], e["given_frames"]) for e in entries] == [
        (f"continued-{n}.mp4", frames) for n, frames in enumerate((12, 12, 12, 0))
    ]
    assert clip.decode((tmp_path / "continued-1.mp4").read_bytes()).shape == (12 + 12 + 9, 32, 48, 3)


def test_another_evaluation_trains_nothing() -> None:
    for changes in ({"features": "x.pt"}, {"eval_clips": 7}, {"eval_videos": 5}, {"eval_segments": 9}):
        assert stage.content(config(**changes)) == stage.content(config())
        assert stage.names(config(**changes)) != stage.names(config())
    assert stage.names(config(eval_batch=1)) == stage.names(config())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"history_curriculum": [[5, 1.0]]}, r"needs \[step, seconds\] from step 0 on"),
        ({"history_curriculum": [[0, 1.0], [0, 2.0]]}, r"needs \[step, seconds\] from step 0 on"),
        ({"history_curriculum": [[0, 1.0], [5, 3.0]]}, "history_curriculum: 3 s are more than history_seconds, 2;"),
        ({"history_curriculum": [[0, 0.0]]}, "seconds above 0"),
        ({"sample_noise": 0.1}, "sample_noise: 0.1 is more than history_noise, 0"),
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
    import mlflow

    first = pretrain_memory.Config(**nested(latent_stages.QUICK | {"kind": "pretrain_memory", "classes": True}))
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
    assert mlflow.MlflowClient().get_metric_history(store, "heldout/loss")[-1].step == chosen.steps
    assert result["uri"] == "models:/prior/1" and result["metrics"]["heldout_loss"] > 0
    assert 0 <= result["metrics"]["distance"] <= 2 and "distance_true" in result["metrics"]
    model, facts = registry.load_with_facts("models:/prior@champion")
    assert isinstance(model, MemoryDiT) and model.config.cross_attention
    assert not any("lora" in name for name in model.state_dict())
    assert facts["stage"] == "generation" and facts["sampling"]["guidance"] == 2.0
    assert facts["posterior"] == "sample"
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


@pytest.mark.soak
def test_two_processes_make_one_champion_and_measure_it_as_one_does(
    inputs: dict[str, str],
    store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import mlflow

    both = {"zero_stage": 3, "no_history": 0.5, "eval_batch": 1, "eval_clips": 3}
    result = finetune_memory_prior.run(
        config(**both, launcher={"by": "torchrun", "processes": 2}), inputs, str(tmp_path / "out")
    )
    assert result["uri"] == "models:/memory-dit/1" and "distance" not in result["metrics"]
    assert "no distance to the history, since `features` names no feature network" in capfd.readouterr().out
    (tmp_path / "two").mkdir()
    two = heldout_folder(store, tmp_path / "two")
    steps = mlflow.MlflowClient().get_metric_history(store, "loss")
    monkeypatch.setenv("MLFLOW_RUN_ID", store)
    torch.jit.script(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())).save(str(tmp_path / "features.pt"))
    # asked for a feature network later it measures again, here in one process, and trains nothing
    alone = finetune_memory_prior.run(
        config(**both, features=str(tmp_path / "features.pt")), inputs, str(tmp_path / "out")
    )
    assert alone["uri"] == result["uri"] and 0 <= alone["metrics"]["distance"] <= 2
    assert mlflow.MlflowClient().get_metric_history(store, "loss") == steps
    assert {"psnr_next", "psnr_next_copy_last", "heldout_loss_0_steps"} <= result["metrics"].keys()
    assert result["metrics"] == pytest.approx({name: alone["metrics"][name] for name in result["metrics"]})
    (tmp_path / "one").mkdir()
    one = heldout_folder(store, tmp_path / "one")
    videos = [path.name for path in sorted(one.glob("*.mp4"))]
    assert videos == [f"continued-{n}.mp4" for n in range(len(videos))] and videos
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in videos)


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
    run: {{workers: 0}}
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
    run: {{workers: 0}}
    sample_steps: 1
    eval_clips: 1
    eval_videos: 1
    eval_segments: 1
"""


@pytest.mark.soak
def test_a_recipe_goes_from_latents_to_a_model_that_remembers(inputs: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "memory.yaml").write_text(RECIPE.format(folder=tmp_path, **inputs))
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    command = [sys.executable, "-P", "-m", "longtake.infra.cli", "run", str(tmp_path / "memory.yaml")]
    done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("memory (2x2x2): 2 s of history, 6 latents of") == 2
    assert "models:/memory-prior/1" in done.stdout, done.stdout
