"""Tokens of long videos: windows that slide, anchors and gaps, the same by seed, resumed where they were stopped."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tats_stages
import torch
from torch import Tensor, nn

from longtake.datasets.errors import Failure, UserError
from longtake.training.models.common import parts
from longtake.training.models.common.condition import Condition, of_classes
from longtake.training.models.common.draws import rng_of
from longtake.training.models.common.guidance import Guidance
from longtake.training.models.generator import Settings
from longtake.training.models.tats import decode, rollout
from longtake.training.models.tats.gpt import TATS
from longtake.training.models.tats.gpt_config import TATSConfig
from longtake.training.models.tats.rollout import Rollout, continued, filled
from longtake.training.models.tats.sample import videos_of
from longtake.training.models.tats.sound.hearing import HeardTokens

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"depth": 2, "width": 16, "heads": 2, "codes": 30, "classes": 3, "every": 3}
QUICK = Settings(top_k=8, top_p=0.9)


def awake(model: nn.Module) -> Any:
    """Random weights, also where a layer starts at zero."""
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=rng)
    return model.eval()


def model(mode: str = "base", **changes: Any) -> TATS:
    shape = {"base": (3, 2, 2), "anchors": (7, 2, 2), "interpolate": (4, 2, 2)}[mode]
    return awake(TATS(TATSConfig(**SMALL | {"mode": mode, "shape": shape} | changes)))


@pytest.fixture(scope="module")
def base() -> TATS:
    return model()


@pytest.fixture(scope="module")
def pair() -> tuple[TATS, TATS]:
    return model("interpolate"), model("anchors")


def plan(models: Any, seeds: tuple[int, ...] = (1, 2), **more: Any) -> Rollout:
    first, anchors = models if isinstance(models, tuple) else (models, None)
    return Rollout(first, seeds, more.pop("settings", QUICK), anchors, **more)


def made(
    models: Any, frames: int = 9, seeds: tuple[int, ...] = (1, 2), folder: Path | None = None, **more: Any
) -> Tensor:
    planned = plan(models, seeds, **more)
    planned.check()
    return torch.cat(list(planned.tokens(frames, folder and str(folder))), dim=1)


def slow(model: TATS, given: Tensor, uniforms: Tensor, settings: Settings, condition: Condition | None) -> Tensor:
    """`continued` without a cache, sample by sample."""
    rows = []
    for row in range(len(given)):
        one = None if condition is None else Condition(condition.classes[row : row + 1])
        ids = given[row : row + 1]
        for uniform in uniforms[row]:
            with torch.no_grad():
                logits = model(ids, one, last=1)[:, -1]
                if settings.guidance != 1.0:
                    free = model(ids, last=1)[:, -1]
                    logits = free + settings.guidance * (logits - free)
            drawn = decode.candidates(logits, settings.temperature, settings.top_k, settings.top_p)
            ids = torch.cat([ids, decode.draw(*drawn, uniform[None])[:, None]], dim=1)
        rows.append(ids[:, given.shape[1] :])
    return torch.cat(rows)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_draws_with_a_cache_and_in_a_batch_are_those_without(base: TATS, guidance: float) -> None:
    settings = Settings(temperature=1.3, top_k=10, top_p=0.9, guidance=guidance)
    given = torch.randint(30, (3, 4), generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(3, 8, generator=torch.Generator().manual_seed(1))
    found = continued(base, given, uniforms, settings, of_classes([0, 1, 2]))
    assert torch.equal(found, slow(base, given, uniforms, settings, of_classes([0, 1, 2])))
    assert len(found.unique()) > 5


def test_windows_slide_over_the_frames_before(base: TATS) -> None:
    """Frame by frame, as the paper says: given those before, in front of the window."""
    for keep in (0, 1):
        frames: list[Tensor] = []
        for number in range(6):
            kept = frames[-(keep or 2) :]
            given = torch.cat(kept, dim=1) if kept else torch.zeros(1, 0, dtype=torch.int64)
            uniforms = torch.rand(4, generator=rng_of(7, number))[None]
            frames.append(slow(base, given, uniforms, QUICK, None))
        settings = Settings(top_k=8, top_p=0.9, keep=keep)
        assert torch.equal(made(base, 6, (7,), settings=settings).flatten(2)[0], torch.cat(frames))


def test_anchors_are_drawn_by_settings_of_their_own(pair: tuple[TATS, TATS]) -> None:
    sure = replace(QUICK, top_k=1)
    one, two = made(pair, 10, leading=sure)
    anchors = slice(0, None, pair[0].config.every)
    assert torch.equal(one[anchors], two[anchors]) and not torch.equal(one, two)
    assert not torch.equal(*made(pair, 10)[:, anchors])
    one, two = made(pair, 10, settings=sure, leading=sure)
    assert torch.equal(one, two)


def test_gaps_in_a_batch_are_those_one_by_one(pair: tuple[TATS, TATS], monkeypatch: pytest.MonkeyPatch) -> None:
    together = made(pair, 22)
    assert torch.equal(together[:1], made(pair, 22, (1,))) and torch.equal(together[1:], made(pair, 22, (2,)))
    for rows in (1, 4):
        monkeypatch.setattr(rollout, "_ROWS", rows)
        assert torch.equal(together, made(pair, 22))
    # what is between two anchors depends on these alone
    anchors, flat = together[:, ::3].flatten(2), together.flatten(2)
    for number in range(7):
        first = 3 * number + 1
        uniforms = torch.stack([torch.rand(4, generator=rng_of(1, frame)) for frame in (first, first + 1)])
        alone = filled(pair[0], anchors[:1, number : number + 2], uniforms[None], QUICK)
        assert torch.equal(alone[0], flat[0, first : first + 2])
    # and the anchors are those of their own model
    assert torch.equal(anchors[0], _line(pair[1], anchors.shape[1]))


def _line(leader: TATS, count: int) -> Tensor:
    frames: list[Tensor] = []
    for number in range(count):
        kept = frames[-2:]
        given = torch.cat(kept, dim=1) if kept else torch.zeros(1, 0, dtype=torch.int64)
        uniforms = torch.rand(4, generator=rng_of(1, 3 * number))[None]
        frames.append(slow(leader, given, uniforms, QUICK, None))
    return torch.cat(frames)


@pytest.mark.parametrize("kind", ["base", "pair"])
def test_a_seed_makes_the_same_whatever_the_batch_and_the_length(kind: str, request: pytest.FixtureRequest) -> None:
    models = request.getfixturevalue(kind)
    both = made(models, 12)
    assert both.shape == (2, 12, 2, 2) and both.min() >= 0 and both.max() < 30
    assert torch.equal(both, made(models, 12)) and (both[0] != both[1]).any()
    assert torch.equal(both[:1], made(models, 12, (1,)))
    for frames in (1, 2, 3, 7):
        assert torch.equal(made(models, frames), both[:, :frames])


@pytest.mark.parametrize("kind", ["base", "pair"])
@pytest.mark.parametrize("before", [1, 5])
def test_a_start_is_continued(kind: str, before: int, request: pytest.FixtureRequest) -> None:
    models = request.getfixturevalue(kind)
    start = made(models, 7, (5,))[:, -before:]
    whole = made(models, 8, start=start)
    assert whole.shape[1] == 8 and (whole != made(models, 8)).any()
    assert torch.equal(whole[1:], made(models, 8, (2,), start=start))
    flat, draws = start.flatten(2), [torch.rand(4, generator=rng_of(1, frame))[None] for frame in range(3)]
    if kind == "base":
        assert torch.equal(whole[:1, 0].flatten(1), slow(models, flat[:, -2:].flatten(1), draws[0], QUICK, None))
        return
    # its last frame is an anchor, and so is every third before that
    gaps, leader = models
    anchor = slow(leader, flat[:, [-4, -1] if before > 3 else [-1]].flatten(1), draws[2], QUICK, None)
    between = slow(gaps, torch.cat([flat[:, -1], anchor], dim=1), torch.cat(draws[:2], dim=1), QUICK, None)
    assert torch.equal(whole[:1, :3].flatten(1), torch.cat([between, anchor], dim=1))


def held() -> int:
    """Bytes of all tensors that are alive."""
    gc.collect()
    storages = (x.untyped_storage() for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize(("hierarchical", "last"), [(False, 250), pytest.param(True, 20, marks=pytest.mark.soak)])
def test_what_is_held_does_not_grow_over_1024_frames(
    hierarchical: bool, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "_ROWS", 4)
    shapes = {"interpolate": (4, 1, 1), "anchors": (7, 1, 1)} if hierarchical else {"base": (3, 1, 1)}
    models = tuple(model(mode, shape=shape) for mode, shape in shapes.items())
    planned = plan(models if hierarchical else models[0], (1,))
    early, late = [held() for n, _ in enumerate(planned.tokens(256)) if n in (6, last)]
    assert late == early
    frames = videos_of(planned, tats_stages.vqgan().eval(), 256)
    early, late = [held() for n, _ in enumerate(frames) if n in (2, 14)]
    assert late <= 1.1 * early


@pytest.mark.parametrize("kind", ["base", "pair"])
def test_a_stopped_run_goes_on_to_the_same_tokens(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = request.getfixturevalue(kind)
    monkeypatch.setattr(rollout, "_ROWS", 4)
    whole = made(models, 16)
    for parts_done in (1, 2, 3):
        folder, steps = tmp_path / f"{parts_done}" / "0", []
        stream = plan(models).tokens(16, str(folder))
        for _ in range(parts_done):
            next(stream)
        kept = sorted(folder.glob("*.safetensors"))
        assert len(kept) == parts_done
        before = [path.read_bytes() for path in kept]
        planned = plan(models, each_step=lambda steps=steps: steps.append(1))
        assert torch.equal(torch.cat(list(planned.tokens(16, str(folder))), dim=1), whole)
        assert [path.read_bytes() for path in kept] == before
        assert len(steps) == max(end for _, end in rollout.spans(16, planned.every))
        # a shorter and a longer one go on from the same parts
        for frames in (5, 19):
            assert torch.equal(made(models, frames, folder=folder)[:, :16], whole[:, :frames])
        with pytest.raises(UserError, match="with other seeds; delete it"):
            made(models, 16, (3, 4), folder=folder)
        parts.forget(str(folder.parent))
        assert not folder.parent.exists()


def test_a_kept_part_with_another_byte_is_named_and_none_is_taken_without_its_settings(
    base: Any, tmp_path: Path
) -> None:
    whole, folder = made(base, 4, folder=tmp_path / "0"), tmp_path / "0"
    kept = sorted(folder.glob("*.safetensors"))[1]
    content = kept.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    for place in (begin, len(content) - 1):
        kept.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(Failure, match=rf"{kept.name}: damaged .*; delete it and give the same command again"):
            made(base, 4, folder=folder)
    kept.unlink()
    assert torch.equal(made(base, 4, folder=folder), whole)
    # as where the settings went with those of a command that ended before
    (folder / "settings.json").unlink()
    assert torch.equal(made(base, 4, (3, 4), folder=folder), made(base, 4, (3, 4)))


@pytest.mark.parametrize("kind", ["base", "pair"])
def test_a_scene_holds_for_the_frames_that_are_drawn_in_it(kind: str, request: pytest.FixtureRequest) -> None:
    models = request.getfixturevalue(kind)
    first, second = of_classes([0, 0]), of_classes([1, 1])
    one = made(models, 13, story=[(0, first)])
    assert (one != made(models, 13)).any()
    told = made(models, 13, story=[(0, first), (7, second)])
    assert torch.equal(told[:, :7], one[:, :7]) and (told[:, 7:] != one[:, 7:]).any()
    late = made(models, 13, story=[(7, second)])
    assert torch.equal(late[:, :7], made(models, 13, story=[(0, of_classes([-1, -1]))])[:, :7])
    mixed = made(models, 13, story=[(0, of_classes([0, 1])), (7, of_classes([1, 2]))])
    alone = made(models, 13, (2,), story=[(0, of_classes([1])), (7, of_classes([2]))])
    assert torch.equal(mixed[1:], alone)


def test_prompts_of_scenes_are_a_batch_too() -> None:
    changes = {"words": 20, "word_length": 4}
    models = model("interpolate", **changes), model("anchors", **changes)

    def said(*words: int) -> Condition:
        mask = torch.ones(1, len(words), dtype=torch.bool)
        return Condition(of_classes([1]).classes, torch.tensor(words)[None, :, None], mask)

    story = [(0, said(1, 2)), (4, of_classes([1])), (7, said(3, 4, 5))]
    guided = Settings(top_k=8, guidance=2.0)
    told = made(models, 10, (1,), story=story, settings=guided)
    assert (told != made(models, 10, (1,), story=story[:2], settings=guided)).any()
    negative = said(9)
    away = made(models, 10, (1,), story=story, settings=guided, negative=negative)
    assert (away != told).any()
    with pytest.raises(ValueError, match="text_dropout: 0"):
        hasty = model(words=20, text_dropout=0.0)
        made(hasty, 2, (1,), story=[(0, said(1))], settings=guided)


@pytest.mark.parametrize("hierarchical", [False, True])
def test_sound_slides_with_the_frames(hierarchical: bool) -> None:
    changes = {"audio_codes": 9, "audio_tokens": 2}
    models: Any = model(**changes)
    if hierarchical:
        models = model("interpolate", **changes), model("anchors", **changes)
    audio = torch.randint(9, (1, 14, 2), generator=torch.Generator().manual_seed(3))
    heard = made(models, 14, audio=HeardTokens(audio))
    assert (heard != made(models, 14)).any()
    later = audio.clone()
    later[:, 12:] = (later[:, 12:] + 1) % 9
    # a window of anchors hears up to 6 frames beyond the one that it makes
    same = 6 if hierarchical else 10
    changed = made(models, 14, audio=HeardTokens(later))
    assert torch.equal(changed[:, :same], heard[:, :same]) and (changed != heard).any()
    start = heard[:1, :4]
    assert made(models, 6, audio=HeardTokens(audio), start=start).shape[1] == 6


@pytest.mark.parametrize("hierarchical", [False, True])
def test_guidance_leads_to_a_sound(hierarchical: bool) -> None:
    changes = {"audio_codes": 9, "audio_tokens": 2}
    models: Any = model(**changes)
    if hierarchical:
        models = model("interpolate", **changes), model("anchors", **changes)
    audio = torch.randint(9, (1, 10, 2), generator=torch.Generator().manual_seed(3))
    quick = Settings(top_k=8, temperature=1.3)

    def led(guidance: float | Guidance, heard: Tensor | None = audio) -> Tensor:
        sound = None if heard is None else HeardTokens(heard)
        return made(models, 10, audio=sound, settings=replace(quick, guidance=guidance))

    far = led(Guidance(audio=4.0))
    assert torch.equal(far, led(4.0)) and (far != led(1.0)).any()
    assert torch.equal(led(4.0, None), led(1.0, None)), "nothing is asked for"
    # no guidance towards the sound is none of it
    assert torch.equal(led(0.0), led(1.0, torch.full_like(audio, -1)))
    with pytest.raises(ValueError, match="guidance is 4: this model was trained with audio_dropout: 0"):
        made(model(**changes, audio_dropout=0.0), 4, audio=HeardTokens(audio), settings=replace(quick, guidance=4.0))


def test_what_does_not_fit_is_refused(base: TATS, pair: tuple[TATS, TATS]) -> None:
    for models, more, why in (
        (base, {"settings": Settings(keep=3)}, "keep is 3; a window has room for 1 to 2"),
        (base, {"settings": Settings(top_p=0)}, "top_p is 0; it must be above 0"),
        (base, {"seeds": ()}, "seeds: there are none"),
        (base, {"start": torch.zeros(1, 2, 3, 2)}, r"start has shape \(1, 2, 3, 2\); it needs \(B, frames, 2, 2\)"),
        (base, {"story": [(0, of_classes([0]))]}, "are 1 classes for 2 seeds"),
        (base, {"story": [(0, of_classes([0, 5]))]}, "class 5 is out of range"),
        (pair[0], {}, "mode interpolate makes no whole videos by itself"),
    ):
        with pytest.raises(ValueError, match=why):
            made(models, 4, **more)
