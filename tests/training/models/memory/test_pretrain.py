"""The stage that trains a memory by retrieval: its loss, resumed, measured on held-out videos, registered; and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import latent_stages
import pytest
import torch
from flat import nested
from latent_stages import prepared
from torch import Tensor, nn

from longtake.datasets import clip
from longtake.datasets import latents as column
from longtake.datasets.errors import Failure, UserError
from longtake.infra import graph, recipe
from longtake.pipeline.stages import cache_latents, shard
from longtake.training import registry
from longtake.training.models.common import flow
from longtake.training.models.kind import Judged
from longtake.training.models.memory import pretrain as pretrain_memory
from longtake.training.models.memory import retrieval
from longtake.training.models.memory.base import initial_model
from longtake.training.models.memory.config import MemoryConfig
from longtake.training.models.memory.data import Data, Setup, data_of, describe_memory, heldout_of, loader_of, videos_of
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.dit_config import config_from_preset
from longtake.training.models.memory.history import full_tokens, groups_of, memory_of, stretch_of
from longtake.training.models.memory.judge import judge
from longtake.training.models.memory.pretrain import Config, check
from longtake.training.models.memory.stretch import Stretch, gather_latents
from longtake.training.models.pv_vae.model import PVVAE
from longtake.training.registry import disk, lineage

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def inputs(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Read them, do not change them."""
    return dict(latent_stages.inputs(tmp_path_factory.mktemp("memory"), dataset))


def config(**changes: Any) -> Config:
    return Config(**nested(latent_stages.QUICK | {"kind": "pretrain_memory"} | changes))


def alone(inputs: dict[str, str]) -> dict[str, str]:
    return {name: uri for name, uri in inputs.items() if name != "low_latents"}


def dit(**changes: Any) -> dict[str, Any]:
    return {"model": latent_stages.TINY | changes}


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(5)


class Recording:
    """An engine that keeps what it is called with; its velocity leads straight to `x0(times)`, or is zero."""

    def __init__(self, video: Stretch | None = None) -> None:
        self.video, self.calls = video, list[Any]()

    def __call__(self, x: Tensor, t: Tensor, times: Tensor, memory: Any, ids: Any, rng: Any, first: Tensor) -> Tensor:
        self.calls.append(SimpleNamespace(x=x, t=t, times=times, memory=memory, ids=ids.classes, first=first))
        if self.video is None:
            return torch.zeros_like(x)
        return (x - gather_latents(self.video.high, times - self.video.start)) / t.view(-1, 1, 1, 1, 1)


def started(chosen: Config, inputs: dict[str, str], folder: Path) -> tuple[Any, dict[str, Any], Stretch]:
    """The stage's objects, a batch, and its history as the loss sees it."""
    folder.mkdir(exist_ok=True)
    setup = prepared(chosen, inputs, folder)
    batch = next(iter(loader_of(chosen, setup, "train", batch=2)))
    return setup, batch, groups_of(batch, setup.model, chosen.posterior, draws())


@pytest.mark.parametrize("history", ["masked", "clean"])
def test_the_loss_is_of_random_clean_latents_at_their_true_times(
    inputs: dict[str, str], tmp_path: Path, history: str
) -> None:
    chosen = config(history=history, posterior="mean", classes=True)
    setup, batch, stretch = started(chosen, inputs, tmp_path)
    assert stretch.low is not None and stretch.high.shape[2] % 2 == 0, "a latent that fills no group is left out"
    had = torch.ones(2, stretch.high.shape[2], dtype=torch.bool)
    if stretch.skip is not None:
        had = torch.arange(stretch.high.shape[2]) >= stretch.skip[:, None]
    for seed in range(8):
        engine = Recording(stretch)
        loss, logged = pretrain_memory._loss(
            chosen, setup.model, latent_stages.turn(engine, batch, torch.Generator().manual_seed(seed))
        )
        call = engine.calls[0]
        assert loss.item() == logged["loss"].item() < 1e-4, "the true velocity has no loss"
        assert call.memory.start == stretch.start and call.memory.high.shape == stretch.high.shape
        at = call.times - stretch.start
        assert torch.equal(call.first, stretch.first.gather(1, at)) and had.gather(1, at).all()
        clean = torch.zeros_like(had).scatter(1, at, True)
        for z, seen in ((stretch.high, call.memory.high), (stretch.low, call.memory.low)):
            assert torch.equal(z.transpose(1, 2)[clean], seen.transpose(1, 2)[clean])
            if history == "clean":
                assert torch.equal(z, seen)
            else:
                assert (z.transpose(1, 2)[~clean] != seen.transpose(1, 2)[~clean]).flatten(1).any(1).all()
        assert torch.equal(call.ids, batch["label"].cpu())
    zero, _ = pretrain_memory._loss(chosen, setup.model, latent_stages.turn(Recording(), batch, draws()))
    assert zero > 0.5


def test_masks_have_one_level_a_latent_for_both_branches(inputs: dict[str, str], tmp_path: Path) -> None:
    chosen = config(mask_mean=0.2)
    zeros = Stretch(
        torch.zeros(200, 1, 8, 8, 8), torch.zeros(200, 1, 8, 8, 8), 0, torch.zeros(200, 8, dtype=torch.bool)
    )
    made = pretrain_memory.masked(chosen, zeros, torch.zeros(200, 1, dtype=torch.long), draws())
    assert made.low is not None
    high, low = (part[:, 0, 1:].flatten(2).std(2).flatten() for part in (made.high, made.low))
    assert torch.corrcoef(torch.stack([high, low]))[0, 1] > 0.9 and not torch.equal(made.high, made.low)
    # of a logit-normal L(0.2, 1): the median is sigmoid(0.2), the quarters at sigmoid(0.2 +- 0.674)
    expected = torch.sigmoid(torch.tensor([0.2 - 0.674, 0.2, 0.2 + 0.674]))
    torch.testing.assert_close(high.quantile(torch.tensor([0.25, 0.5, 0.75])), expected, atol=0.04, rtol=0)


@pytest.mark.usefixtures("group")
def test_a_stopped_training_ends_with_the_same_weights(inputs: dict[str, str], tmp_path: Path) -> None:
    chosen = config(classes=True)
    straight = latent_stages.fit(pretrain_memory, chosen, inputs, tmp_path / "straight")
    latent_stages.fit(pretrain_memory, chosen, inputs, tmp_path / "stopped", until=2)
    resumed = latent_stages.fit(pretrain_memory, chosen, inputs, tmp_path / "stopped")
    torch.testing.assert_close(resumed, straight, atol=0, rtol=0)


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sharded": {"zero_stage": 3},
    "bf16": {"precision": "bf16", "zero_stage": 2} | dit(rates=["1x1x2"], branches="high"),
    "two rates": dit(rates=["2x2x2", "1x2x4"], branches="high", cross_attention=True),
    "low": dit(branches="low"),
    "patchify": dit(memory="patchify"),
    "packed": dit(memory="framepack"),
    "recomputed": dit(activation_checkpointing=True),
}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("way", WAYS)
def test_the_memory_learns_and_is_shown_in_every_way_of_training(
    inputs: dict[str, str], tmp_path: Path, way: str
) -> None:
    chosen = config(**{"sample_every": 4} | WAYS[way])
    needs = config_from_preset(**{**latent_stages.TINY, **(chosen.model or {}), "preset": "memory_dit_tiny"}).shrink
    given = inputs if needs else alone(inputs)
    torch.manual_seed(chosen.seed)
    before = prepared(chosen, given, _folder(tmp_path / "before")).model.state_dict()
    log = latent_stages.Log()
    weights = latent_stages.fit(pretrain_memory, chosen, given, tmp_path / "run", log=log)
    # true above retrieved, of a segment of three latents that come after others
    assert log.videos == {"retrieved": (12, 2 * 32, 48, 3)} and len(log.steps) == 4
    moved = [n for n in weights if not torch.allclose(weights[n].float(), before[n].float(), atol=1e-5)]
    assert any(name.startswith("memory.") for name in moved) or way == "low"
    assert all(value.isfinite().all() for value in weights.values())


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def random_videos(count: int, rng: torch.Generator) -> dict[str, Any]:
    """A batch whose every latent is a colour of its own, which nothing but the latent itself can tell."""
    colours = torch.randn(count, 2, 8, 1, 1, generator=rng).expand(-1, -1, -1, 2, 2)
    moments = torch.stack([colours, torch.full_like(colours, -30.0)], 1)
    parts = {"latent": moments[:, :, :, 6:], "history_latent": moments[:, :, :, :6]}
    facts = {name: torch.full((count,), 6) for name in ("history_steps", "stream_step")}
    return parts | facts | {"key": [""] * count}


@pytest.mark.parametrize("history", ["masked", "clean"])
def test_what_is_retrieved_of_unseen_videos_comes_from_their_memory(history: str) -> None:
    chosen = config(history=history, posterior="mean", low_latents=None, **dit(branches="high"))
    torch.manual_seed(0)
    settings = latent_stages.TINY | {"rates": ("2x2x1",), "memory_widths": (16, 32), "branches": "high"}
    model = MemoryDiT(config_from_preset(**settings, channels=2, shape=(2, 2, 2), history=6))
    optimizer, rng = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.Generator().manual_seed(1)
    for _ in range(250):
        batch = random_videos(16, rng)
        loss, _ = pretrain_memory._loss(chosen, model, latent_stages.turn(model, batch, rng))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    stretch = stretch_of(random_videos(64, draws()), model, 6)
    x0, times, t = stretch.high[:, :, 3:6], stretch.start + torch.arange(3, 6), torch.full((64,), 0.9)
    noise = torch.randn(x0.shape, generator=draws())
    others = stretch._replace(high=stretch.high.roll(1, 0))
    with torch.no_grad():
        own, foreign, none = (
            flow.loss(model(flow.interpolate(x0, noise, t), t, times, memory), x0, noise).mean().item()
            for memory in (stretch, others, None)
        )
    # what noise hides of a latent has a variance of about 1
    assert own < 0.4 and foreign > 1.5 and none > 0.6, (own, foreign, none)


def test_a_perfect_memory_reaches_the_bound_of_the_autoencoder(inputs: dict[str, str], tmp_path: Path) -> None:
    """And a video is encoded in one stream, cut at the front to whole groups."""
    setup, _, _ = started(config(), inputs, tmp_path)
    videos = videos_of(config(), setup)
    batch = next(iter(videos))
    video = retrieval.Video.of_batch(0, batch).pixels
    assert video.shape == (1, 3, 24 + 9, 32, 48) and torch.equal(video[:, :, 24:], batch["video"])
    whole = retrieval.trim_to_groups(video, 4, 4)
    assert whole.shape[2] == 29 and torch.equal(whole, video[:, :, 4:])
    stretch = retrieval.encode_video(setup.model, setup.codec, whole)
    assert stretch.low is not None and stretch.high.shape == (1, 8, 8, 2, 3) and stretch.low.shape == (1, 8, 8, 1, 1)
    at_once = setup.codec.encode(whole.float() / 127.5 - 1).mode()
    torch.testing.assert_close(setup.model.denormalise(stretch.high), at_once, atol=1e-4, rtol=1e-4)

    class Perfect(MemoryDiT):
        def forward(self, x: Tensor, t: Tensor, times: Tensor, *, first: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
            assert len(times) <= 3 and torch.equal(first[0], times == 0)
            return (x - stretch.high[:, :, times]) / t.view(-1, 1, 1, 1, 1)

    perfect = Perfect(setup.model.config)
    perfect.load_state_dict(setup.model.state_dict())
    options: dict[str, Any] = {"fps": 12.0, "seed": 0, "solver_steps": 2, "at_once": 3}
    found = retrieval.evaluate(perfect, setup.codec, [retrieval.Video(0, whole, None)], tmp_path, **options)
    assert found["psnr"] == pytest.approx(found["psnr_bound"], abs=1e-3)
    assert found["ssim"] == pytest.approx(found["ssim_bound"], abs=1e-4)
    assert len(found["psnr_by_step"]) == 8 and found["tokens"] == 4 * 1 * 1
    # a latent has 2x3 tokens: there is room for one frame, the middle one
    for name, kept in (("psnr_copy_last", 28), ("psnr_copy_nearest", 14)):
        error = (whole[:, :, kept : kept + 1].double() - whole).div(255).square().mean()
        assert found[name] == pytest.approx(-10 * error.log10().item(), abs=1e-3)
    assert [(a["figure"], a["baseline"]) for a in found["against"]] == [
        (found["psnr"], found[name]) for name in ("psnr_copy_last", "psnr_copy_nearest")
    ]
    shown = clip.decode((tmp_path / "retrieved.mp4").read_bytes())
    assert shown.shape == (29, 64, 48, 3)
    assert abs(shown[:, :32].astype(float) - whole[0].permute(1, 2, 3, 0).numpy()).mean() < 12
    worse = retrieval.evaluate(setup.model.eval(), setup.codec, [retrieval.Video(0, whole, None)], tmp_path, **options)
    assert worse["psnr"] < found["psnr"]
    again = retrieval.evaluate(setup.model, setup.codec, [retrieval.Video(0, whole, None)], tmp_path, **options)
    assert again == worse


def data(shape: tuple[int, int, int], fps: float, history: int) -> Data:
    return Data(SimpleNamespace(factor=4), None, shape, fps, history)  # type: ignore[arg-type]


def test_the_tokens_of_twenty_seconds_are_told_before_training() -> None:
    wan = config_from_preset("memory_dit_tiny", channels=16, patch=2, rates=("4x4x2",))
    assert describe_memory(wan, data((6, 60, 104), 24.0, 120)) == (
        "memory (4x4x2): 20 s of history, 120 latents of 60x104, are 5460 tokens, 273 a second"
    )
    assert "none): " in describe_memory(
        config_from_preset("memory_dit_tiny", memory="none"), data((6, 4, 4), 24.0, 120)
    )


def test_tokens_of_a_batch_are_those_of_full_context() -> None:
    batch = {"latent": torch.zeros(3, 2, 8, 5, 4, 6), "history_steps": torch.tensor([7, 6, 9]), "key": [""] * 3}
    assert full_tokens(2, batch) == (3 * 5 + 7 + 6 + 9) * 2 * 3


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "time": (
        dit(rates=["1x1x16"], branches="high"),
        "1x1x16: a token stands for 16 steps, the history has 6; raise history_seconds",
    ),
    "grid": (
        dit(rates=["4x4x2"], branches="high"),
        "4x4x2: the latents make a grid of 2x3 tokens; choose a lower rate",
    ),
    "window": (dit(window=7, branches="high"), "history_seconds: are 6 steps, fewer than the 7 of the window"),
    "patch": (dit(patch=2, branches="high", rates=["1x1x2"]), "shape: 2x3 is no multiple of patch 2"),
    "bf16": (dit(rates=["1x2x2"], branches="high") | {"precision": "bf16"}, "precision: bf16: .* on a CPU; train this"),
    "low": (dit(branches="both"), r"low_latents: rates 2x2x2 need a `cache_latents` stage with shrink: \[2, 2\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_memory_that_the_latents_do_not_have_is_refused_in_one_line(inputs: dict[str, str], case: str) -> None:
    if case == "bf16" and torch.cuda.is_available():
        pytest.skip("bf16 on a GPU is fine")
    changes, said = REFUSED[case]
    chosen = config(low_latents=None, **changes)
    with pytest.raises(UserError, match=said) as e:
        initial_model(chosen, alone(inputs), data_of(chosen, alone(inputs)), 0)
    assert "\n" not in str(e.value)


def test_low_latents_that_do_not_fit_are_refused_in_one_line(inputs: dict[str, str], tmp_path: Path) -> None:
    def refused(chosen: Config, **facts: Any) -> str:
        column.write_latents(str(tmp_path / "low"), replace(column.read_latents(inputs["low_latents"]), **facts))
        given = inputs | {"low_latents": str(tmp_path / "low")}
        with pytest.raises(UserError) as e:
            initial_model(chosen, given, data_of(chosen, given), 0)
        assert "\n" not in str(e.value)
        return str(e.value)

    assert "low_latents: are shrunk by 4x2, rates 2x2x2 need" in refused(config(), shrink=(4, 2))
    assert "no low-res branch that reads them; leave them out" in refused(config(**dit(branches="high")))
    assert "are of another encoder than latents" in refused(config(), encoder={"uri": "else", "digest": "0"})
    assert "were made with size" in refused(config(), size=(32, 32))
    assert "are of the dataset /elsewhere" in refused(config(), dataset="/elsewhere")
    assert "low_latents: " in refused(config(), digests={"train": "other", "val": "other"})


def test_streams_that_are_too_short_are_refused_in_one_line(inputs: dict[str, str]) -> None:
    def loader(chosen: Config) -> Any:
        data = data_of(chosen, inputs)
        model: Any = SimpleNamespace(config=chosen.dit(shape=data.shape, history=data.history, channels=8))
        setup = Setup(inputs, data, (), model, codec=None)  # type: ignore[arg-type]
        return loader_of(chosen, setup, "train", batch=2)

    with pytest.raises(UserError, match="no stream of latents has 90 steps of history and 3 of a window, the longest"):
        loader(config(history_seconds=30.0))
    less = loader(config(history_seconds=30.0, history_least=0.0))
    assert all((batch["history_steps"] < 30 * 3).all() for batch in islice(less, 5))
    assert 0 < less.history_mean() < 18


def test_a_history_that_fills_no_group_is_not_drawn(inputs: dict[str, str], tmp_path: Path) -> None:
    chosen = config(history_least=0.0, low_latents=None, **dit(rates=["2x2x4"], branches="high"))
    setup = prepared(chosen, alone(inputs), tmp_path)
    loader = loader_of(chosen, setup, "train", batch=2)
    for batch in islice(loader, 20):
        stretch = groups_of(batch, setup.model)
        assert stretch.skip is None or (stretch.skip < stretch.high.shape[2]).all()


def test_a_held_out_clip_whose_history_fills_no_group_is_not_measured(inputs: dict[str, str], tmp_path: Path) -> None:
    four = dit(rates=["2x2x4"], branches="high")
    chosen = config(history_least=0.0, low_latents=None, eval_clips=9, sample_steps=1, **four)
    setup = prepared(chosen, alone(inputs), tmp_path)
    setup.model.eval()
    pretrain_memory.evaluate(chosen, setup, tmp_path)
    summary, clips = json.loads((tmp_path / "retrieved.json").read_text())["summary"], videos_of(chosen, setup)
    assert summary["clips"] == min(9, clips.samples) and clips.samples_without_history
    # before training, where none has
    long = config(history_seconds=30.0, history_least=0.0, low_latents=None, **dit(rates=["2x2x64"], branches="high"))
    with pytest.raises(
        UserError, match=r"rates: a token stands for 64 steps, a segment has 3, so that 20\.3 s must"
    ) as e:
        videos_of(long, prepared(long, alone(inputs), tmp_path))
    assert "\n" not in str(e.value)


def test_a_gate_retrieves_as_many_latents_together_as_training_did(inputs: dict[str, str], tmp_path: Path) -> None:
    chosen, counts = config(retrieved=1), list[int]()
    setup = prepared(chosen, inputs, tmp_path)
    facts = pretrain_memory.facts(chosen, setup, lineage.read(tmp_path))
    setup.model.eval().register_forward_pre_hook(lambda _, given: counts.append(given[0].shape[2]))
    batch = next(iter(heldout_of(chosen, setup)))
    for learned, expected in ((facts, [1] * 4), ({"stage": "retrieval"}, [4])):
        counts.clear()
        figures = judge(learned).figures(Judged("", setup.model, learned), batch, None, 0, 1.0)
        assert counts == expected and figures["loss"] > 0


def test_where_nothing_is_scaled_down_both_branches_read_the_same_column(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    chosen = config(low_latents="latents", posterior="mean", **dit(rates=["1x1x2"]))
    setup, batch, stretch = started(chosen, inputs | {"low_latents": inputs["latents"]}, tmp_path)
    assert "low" not in batch and stretch.low is not None
    torch.testing.assert_close(stretch.low, stretch.high, atol=0, rtol=0)
    assert memory_of(setup.model, stretch).tokens.shape == (2, stretch.high.shape[2] // 2 * 2 * 3, 32)


def test_latents_that_do_not_vary_fail(inputs: dict[str, str], tmp_path: Path) -> None:
    chosen = config(posterior="mean")
    column.write_latents(str(tmp_path / "flat"), replace(column.read_latents(inputs["latents"]), std=(0.0,) * 8))
    given = inputs | {"latents": str(tmp_path / "flat")}
    with pytest.raises(Failure, match="every channel needs a finite mean and a positive"):
        initial_model(chosen, given, data_of(chosen, given), 0)


def saved(folder: Path, inputs: dict[str, str], facts: dict[str, Any] | None = None, **changes: Any) -> str:
    """A model folder, as if it had been trained on these latents."""
    chosen = MemoryConfig(**nested(latent_stages.QUICK | dit(**changes)))
    model = initial_model(chosen, inputs, data_of(chosen, inputs), 0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    encoder = {"vae": {"encoder": column.read_latents(inputs["latents"]).encoder["digest"]}}
    disk.save(folder, "memory_dit", model.config.model_dump(mode="json"), model.state_dict(), facts or encoder)
    return str(folder)


def based(inputs: dict[str, str], base: str, **changes: Any) -> MemoryDiT:
    chosen = config(**{"base": base, "model": None} | changes)
    given = inputs | {"base": base}
    return initial_model(chosen, given, data_of(chosen, given), 0)


def test_a_base_gives_its_weights_and_statistics_and_what_it_lacks_begins_anew(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    uri = saved(tmp_path / "base", inputs)
    base = registry.load(uri)
    same = based(inputs, uri, history_seconds=1.0)
    assert same.config == base.config.model_copy(update={"history": 3})  # type: ignore[union-attr, operator]
    torch.testing.assert_close(same.state_dict(), base.state_dict(), atol=0, rtol=0)
    crossed = based(inputs, uri, model={"cross_attention": True})
    assert crossed.config.cross_attention and crossed.state_dict().keys() > base.state_dict().keys()
    none = saved(tmp_path / "none", alone(inputs), memory="none")
    other = based(inputs, none, model={"memory": "encoder"})
    assert any(name.startswith("memory.") for name in other.state_dict())
    torch.testing.assert_close(other.low_mean, torch.tensor(column.read_latents(inputs["low_latents"]).mean))


@pytest.mark.parametrize("memory", ["patchify", "framepack"])
def test_a_patchifier_that_is_new_beside_a_base_begins_as_the_patch_embedding_of_the_base(
    inputs: dict[str, str], tmp_path: Path, memory: str
) -> None:
    none = saved(tmp_path / "none", alone(inputs), memory="none")
    model = based(alone(inputs), none, low_latents=None, model={"memory": memory, "rates": ["1x1x2"]})
    own = registry.load(none)
    high = torch.randn(1, 8, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    tokens = own.token_in(high.movedim(1, -1)).flatten(2, 3)  # type: ignore[union-attr, operator]
    expected = tokens.mean(1) if memory == "patchify" else tokens[:, 1]
    torch.testing.assert_close(model.remember(high).tokens[:, -6:], expected, rtol=0, atol=1e-5)


def test_a_base_that_does_not_fit_is_refused_in_one_line(inputs: dict[str, str], tmp_path: Path) -> None:
    uri = saved(tmp_path / "base", inputs)
    foreign = saved(tmp_path / "foreign", inputs, {"vae": {"encoder": "another"}})
    with pytest.raises(UserError, match="has learned latents of another autoencoder than"):
        based(inputs, foreign)
    with pytest.raises(UserError, match="does not fit these settings, such as in"):
        based(inputs, uri, model={"width": 64})
    with pytest.raises(UserError, match="is a PVVAE, not a MemoryDiT"):
        based(inputs, str(Path(inputs["latents"]).parent / "vae"))
    with pytest.raises(UserError, match=r"model: memory_widths end with 16, no multiple of 5 heads") as e:
        based(inputs, uri, model={"memory_heads": 5})
    assert "\n" not in str(e.value)


@pytest.mark.usefixtures("group")
def test_with_a_base_the_low_rank_change_and_the_memory_learn_and_nothing_else(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    base = saved(tmp_path / "base", inputs)
    given, lora = inputs | {"base": base}, {"rank": 2, "targets": [r"layers\..*"], "full": ["memory"]}
    chosen = config(base=base, model=None, lora=lora)
    weights = latent_stages.fit(pretrain_memory, chosen, given, tmp_path / "run")
    for name, value in registry.load(base).state_dict().items():
        assert torch.equal(weights[name], value) != name.startswith("memory."), name
    assert any(".lora_up." in name and weights[name].abs().max() > 0 for name in weights)


@pytest.mark.usefixtures("group")
def test_what_a_base_has_not_learned_of_first_latents_is_learned_beside_a_low_rank_change(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    model, facts = registry.load_with_facts(saved(tmp_path / "told", inputs))
    assert isinstance(model, MemoryDiT)
    nn.init.zeros_(model.first.shift)
    vae = {"vae": facts["vae"]}
    disk.save(tmp_path / "base", "memory_dit", model.config.model_dump(mode="json"), model.state_dict(), vae)
    base = str(tmp_path / "base")
    chosen = config(base=base, model=None, lora={"rank": 2, "targets": [r"layers\..*"], "full": ["memory"]})
    weights = latent_stages.fit(pretrain_memory, chosen, inputs | {"base": base}, tmp_path / "run")
    assert weights["first.shift"].any()


@pytest.mark.usefixtures("group")
def test_new_cross_attention_beside_a_low_rank_change_learns_in_full(
    inputs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved(tmp_path / "base", inputs)
    given, changes = inputs | {"base": base}, {"base": base, "model": {"cross_attention": True}}
    chosen = config(**changes, lora={"rank": 2, "full": ["memory"]})
    before = based(inputs, base, model={"cross_attention": True}).state_dict()
    weights = latent_stages.fit(pretrain_memory, chosen, given, tmp_path / "run")
    cross = [name for name in before if ".cross." in name]
    # what finds by position begins silent: its way out moves at once, and the rest after it
    assert cross and all(not torch.equal(weights[name], before[name]) for name in cross)
    assert not any(".cross." in name and "lora_" in name for name in weights)
    own = [name for name in before if name.startswith("layers.") and name not in cross]
    assert all(torch.equal(weights[name], before[name]) for name in own)
    told = capsys.readouterr().out
    assert "which counts 1 (alpha / rank)" in told and "begin anew, such as layers.0.cross." in told


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": latent_stages.TINY | {"channels": 8}}, "channels follows from the stage's other settings"),
        ({"model": latent_stages.TINY | {"history": 8}}, "history follows from the stage's other settings"),
        ({"model": {"preset": "memory_dit_huge"}}, "unknown preset 'memory_dit_huge'"),
        (
            {"model": latent_stages.TINY | {"rates": ["3x3x2"]}},
            "rate '3x3x2': needs height x width x time in powers of two",
        ),
        ({"model": latent_stages.TINY | {"memory": "none"}}, "memory none has nothing to retrieve from"),
        ({"lora": {"rank": 2}}, "lora: without a base all else would stay random"),
        ({"base": "models:/m/1"}, "model: preset: the base has its own"),
        ({"base": "models:/m/1", "model": {"wide": 3}}, "model: unknown wide"),
        ({"history_least": 3.0}, "history_least: 3 s are more than history_seconds"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(**changes)


def test_a_recipe_whose_columns_do_not_fit_is_refused() -> None:
    full = cache_latents.Config(kind="cache_latents", dataset="dataset", encoder="vae")
    low = full.model_copy(update={"shrink": (2, 2)})
    check(config(), {"latents": full, "low_latents": low})
    for wrong, said in (
        ({"low_latents": low.model_copy(update={"dataset": "others"})}, "low_latents: are of the dataset others"),
        ({"low_latents": low.model_copy(update={"encoder": "else"})}, "low_latents: are of another encoder, else"),
        ({"low_latents": low.model_copy(update={"join_seconds": 9.0})}, "low_latents: have join_seconds 9, latents 0"),
        ({"low_latents": full}, r"low_latents: are shrunk by 1x1, rates 2x2x2 need .*shrink: \[2, 2\]"),
    ):
        with pytest.raises(ValueError, match=said):
            check(config(), {"latents": full, "low_latents": low} | wrong)
    with pytest.raises(ValueError, match=r"low_latents: rates 2x2x2 need"):
        check(config(low_latents=None), {"latents": full})
    shards = shard.Config(kind="shard", sources=["x"], clip={"short_side": 32, "fps": 12, "max_seconds": 2})
    given = {"latents": full, "low_latents": low, "dataset": shards}
    with pytest.raises(
        ValueError, match="latents: streams of at most 2 s have no room for 2 s of history and a segment; set"
    ):
        check(config(), given)
    check(config(history_least=1.0), given)


def test_the_stage_stands_in_a_graph_with_its_inputs(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        f"name: r\nworkspace: {tmp_path}/work\nstages:\n"
        "  shards: {kind: shard, sources: [/videos], clip: {short_side: 32, max_seconds: 3}}\n"
        "  vae: {kind: pretrain_vae, dataset: shards, model: {preset: pv_vae_tiny}, frames: 9, sizes: [[32, 32]]}\n"
        "  latents: {kind: cache_latents, dataset: shards, encoder: vae, join_seconds: 60}\n"
        "  low: {kind: cache_latents, dataset: shards, encoder: vae, shrink: [4, 4], join_seconds: 60}\n"
        "  memory: {kind: pretrain_memory, dataset: shards, latents: latents, low_latents: low, vae: vae, frames: 9}\n"
        "  prior: {kind: finetune_memory_prior, dataset: shards, latents: latents, low_latents: low, base: memory, frames: 9}\n"
    )
    nodes = {node.name: node for node in graph.build(recipe.load(str(tmp_path / "r.yaml")))}
    assert nodes["memory"].inputs == {"dataset": "shards", "latents": "latents", "low_latents": "low", "vae": "vae"}
    assert set(nodes["prior"].upstream) == {"shards", "latents", "low", "memory"}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An MLflow store with an open run, as a stage finds it."""
    yield from latent_stages.mlflow_run(tmp_path, monkeypatch)


@pytest.mark.slow
def test_from_latents_to_a_registered_memory(
    inputs: dict[str, str],
    store: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import mlflow

    chosen = config(classes=True, sample_every=2, ema_half_lives=[10.0])
    result = pretrain_memory.run(chosen, inputs, str(tmp_path / "out"))
    assert "memory (2x2x2): 2 s of history, 6 latents of 2x3, are 3 tokens, 1.5 a second" in capsys.readouterr().out
    assert result["uri"] == "models:/memory-dit/1"
    assert [m.step for m in mlflow.MlflowClient().get_metric_history(store, "heldout/loss")] == [chosen.steps]
    assert result["metrics"]["psnr"] > 0 and result["metrics"]["history_steps_expected"] > 0
    model, facts = registry.load_with_facts("models:/memory-dit@champion")
    assert isinstance(model, MemoryDiT) and not model.training
    assert model.config.history == 6 and model.config.shape == (3, 2, 3) and model.config.classes == 2
    assert facts["stage"] == "retrieval" and facts["rates"] == ["2x2x2"] and facts["classes"] == ["a", "b"]
    assert facts["window"] == {"frames": 9, "steps": 3, "factor": 4, "fps": 12.0, "size": [32, 48]}
    assert facts["history"] == {"seconds": 2.0, "steps": 6}
    assert facts["low_latents"]["shrink"] == [2, 2] and facts["low_latents"]["uri"] == inputs["low_latents"]
    assert facts["sampling"] == {"steps": 2, "guidance": 1.0, "shift": 1.0}
    assert isinstance(registry.load(facts["vae"]["uri"]), PVVAE)
    assert facts["vae"]["encoder"] == column.read_latents(inputs["latents"]).encoder["digest"]
    seen = Path(mlflow.MlflowClient().download_artifacts(store, "heldout", str(tmp_path)))
    summary = json.loads((seen / "retrieved.json").read_text())["summary"]
    assert summary["psnr"] == result["metrics"]["psnr"] and clip.decode((seen / "retrieved.mp4").read_bytes()).shape[
        1:
    ] == (64, 48, 3)
    monkeypatch.setenv("MLFLOW_RUN_ID", store)
    # told to do it again, it goes on where it was: nothing is trained or registered twice
    assert pretrain_memory.run(chosen, inputs, str(tmp_path / "out"))["uri"] == "models:/memory-dit/1"


@pytest.mark.slow
def test_two_processes_make_one_champion_and_measure_it_as_one_does(
    inputs: dict[str, str], store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    both: dict[str, Any] = {"steps": 2, "zero_stage": 3, "sample_every": 2, "eval_clips": 3}
    two = pretrain_memory.run(
        config(**both, launcher={"by": "torchrun", "processes": 2}), inputs, str(tmp_path / "out")
    )
    assert two["uri"] == "models:/memory-dit/1"
    steps = mlflow.MlflowClient().get_metric_history(store, "loss")
    (tmp_path / "two").mkdir()
    client = mlflow.MlflowClient()
    shown = Path(client.download_artifacts(store, "heldout/retrieved.mp4", str(tmp_path / "two"))).read_bytes()
    monkeypatch.setenv("MLFLOW_RUN_ID", store)
    one = pretrain_memory.run(config(**both), inputs, str(tmp_path / "out"))
    assert one["uri"] == two["uri"] and client.get_metric_history(store, "loss") == steps
    assert one["metrics"] == pytest.approx(two["metrics"]) and one["metrics"]["psnr"] > 0
    assert {file.path for file in client.list_artifacts(store, "heldout")} == {
        f"heldout/retrieved.{kind}" for kind in ("json", "mp4")
    }
    assert Path(client.download_artifacts(store, "heldout/retrieved.mp4", str(tmp_path))).read_bytes() == shown
