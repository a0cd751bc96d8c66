"""Videos segment by segment: what each is given of those before, and that a stopped run goes on to the same bytes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from priors import awake
from torch import Tensor, nn

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.latents import shrunk
from longtake.datasets.loader import to_pixels
from longtake.training.models.common import parts
from longtake.training.models.common.condition import of_classes
from longtake.training.models.generator import Settings
from longtake.training.models.memory import segments
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.dit_config import MemoryDiTConfig
from longtake.training.models.memory.segments import History, generate
from longtake.training.models.memory.tokens import Memory
from longtake.training.models.pv_vae.model import PVVAE, config_from_preset

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = Settings(steps=2)
SMALL: dict[str, Any] = {
    "depth": 2,
    "width": 24,
    "heads": 2,
    "channels": 8,
    "classes": 3,
    "rates": ("2x2x2",),
    "memory_widths": (4, 8),
    "memory_heads": 2,
    "history": 8,
    "shape": (3, 2, 4),
    "window": 2,
}


def dit(**changes: Any) -> MemoryDiT:
    made: MemoryDiT = awake(MemoryDiT(MemoryDiTConfig(**SMALL | changes)))
    draws = torch.Generator().manual_seed(1)
    mean, std = torch.randn(4, 8, generator=draws).mul(0.1).split(2)
    made.set_statistics(mean[0], 1 + std[0], mean[1], 1 + std[1])
    return made


@pytest.fixture(scope="module")
def model() -> MemoryDiT:
    return dit()


@pytest.fixture(scope="module")
def vae() -> PVVAE:
    made: PVVAE = awake(PVVAE(config_from_preset("pv_vae_tiny", latent_channels=8, encoder_width=8, decoder_width=8)))
    return made


def latents(count: int, batch: int = 1, seed: int = 5) -> Tensor:
    return torch.randn(batch, 8, count, 2, 4, generator=torch.Generator().manual_seed(seed))


def made(model: MemoryDiT, vae: PVVAE, count: int, seeds: Sequence[int] = (3,), **options: Any) -> np.ndarray:
    return np.concatenate(list(generate(model, vae, count, seeds, **{"settings": QUICK} | options)), axis=1)


def kept(folder: Path) -> Tensor:
    """The latents of all segments in a folder."""
    from safetensors.torch import load_file

    return torch.cat([load_file(path)["latent"] for path in sorted(folder.glob("*.safetensors"))], dim=2)


class Seen(nn.Module):
    """A model that notes what it is called with."""

    def __init__(self, model: MemoryDiT, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor, Memory | None, Tensor | None]] = []
        self.options: list[dict[str, Any]] = []
        forward = model.forward

        def noted(
            x: Tensor,
            t: Tensor,
            times: Tensor,
            memory: Memory | None = None,
            classes: Tensor | None = None,
            **options: Any,
        ) -> Tensor:
            self.calls.append((x.clone(), t, times, memory, classes))
            self.options.append(options)
            return forward(x, t, times, memory, classes, **options)

        monkeypatch.setattr(model, "forward", noted)


def test_the_first_latent_is_one_frame_and_every_chunk_a_segment(model: MemoryDiT, vae: PVVAE) -> None:
    chunks = list(generate(model, vae, 7, [3, 4], settings=QUICK))
    assert [chunk.shape for chunk in chunks] == [(2, n, 32, 64, 3) for n in (9, 12, 4)]
    assert all(chunk.dtype == np.uint8 for chunk in chunks)
    assert segments.count_segments(model, 7) == 3


def test_the_same_seed_is_the_same_video_and_a_longer_one_begins_with_the_shorter(model: MemoryDiT, vae: PVVAE) -> None:
    short = made(model, vae, 4)
    np.testing.assert_array_equal(made(model, vae, 8)[:, : short.shape[1]], short)
    assert (made(model, vae, 4, [4]) != short).any()


def test_a_video_does_not_depend_on_those_beside_it(model: MemoryDiT, vae: PVVAE) -> None:
    alone, beside = made(model, vae, 6), made(model, vae, 6, [9, 3])
    assert np.abs(alone[0].astype(int) - beside[1]).max() <= 2
    assert (beside[0] != beside[1]).any()


def test_the_frames_are_what_decoding_all_latents_at_once_gives(model: MemoryDiT, vae: PVVAE, tmp_path: Path) -> None:
    video = made(model, vae, 9, folder=str(tmp_path))
    with torch.no_grad():
        whole = to_pixels(vae.decode(kept(tmp_path))).permute(0, 2, 3, 4, 1).numpy()
    assert np.abs(video.astype(int) - whole).max() <= 1


def test_a_segment_sees_the_memory_of_all_before_as_if_it_were_encoded_at_once(
    model: MemoryDiT, vae: PVVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(model, monkeypatch)
    made(model, vae, 12, folder=str(tmp_path))
    before = kept(tmp_path)[:, :, :9]
    with torch.no_grad():
        video = vae.decode(before).clamp(-1, 1)
        low = vae.encode(shrunk(video, (2, 2), vae.config.spatial_stride)).mode()
        first = torch.arange(8)[None] == 0
        whole = model.remember(model.normalise(before)[:, :, :8], model.normalise_low(low)[:, :, :8], first=first)
    x, t, times, memory, _ = seen.calls[-1]
    assert memory is not None
    since = whole.positions[:, 0] >= 9 - 8
    torch.testing.assert_close(memory.tokens, whole.tokens[:, since], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(memory.positions, whole.positions[since])
    assert times.tolist() == [7, 8, 9, 10, 11]
    torch.testing.assert_close(x[:, :, :2], model.normalise(before[:, :, 7:]))
    assert (t[:, :2] == 0).all() and (t[:, 2:] > 0).all()
    assert seen.calls[0][3] is None and seen.calls[0][0].shape[2] == 3
    noises = [call[0][:, :, -3:] for call in seen.calls[:: QUICK.steps]]
    assert len(noises) == 4 and all((a != b).all() for a, b in itertools.combinations(noises, 2))


@pytest.mark.parametrize("group", ["2x2x1", "2x2x2", "2x2x4", "2x2x8"])
@pytest.mark.parametrize("pieces", [[3, 3, 3, 3, 3], [1] * 15, [15], [2, 7, 5, 1]])
def test_no_latent_is_unseen_whatever_the_chunks_are(group: str, pieces: list[int]) -> None:
    model = dit(rates=(group,), history=64)
    group_of, history, whole = model.config.group, History(model), latents(15)
    low = torch.randn(1, 8, 15, 1, 2, generator=torch.Generator().manual_seed(2))
    for high, small in zip(whole.split(pieces, 2), low.split(pieces, 2), strict=True):
        history.append(high, small)
        held = history.latents // group_of * group_of
        known = 0 if history.recent is None else history.recent.shape[2]
        assert known >= min(history.latents, max(2, history.latents - held))
        assert (history.memory is not None) == (held > 0)
        if history.memory is not None:
            assert history.memory.positions[:, 0].max() < held <= history.latents
    assert history.latents == 15 and history.recent is not None and history.memory is not None
    torch.testing.assert_close(history.recent, model.normalise(whole)[:, :, -history.recent.shape[2] :])
    with torch.no_grad():
        high, small = model.normalise(whole)[:, :, :held], model.normalise_low(low)[:, :, :held]
        first = torch.arange(held)[None] == 0
        tokens = model.remember(high, small, first=first).tokens
        torch.testing.assert_close(history.memory.tokens, tokens, atol=1e-5, rtol=1e-4)


def test_a_history_stays_as_large_as_it_may_reach_back(model: MemoryDiT) -> None:
    sizes = []
    history = History(model)
    for number in range(12):
        history.append(latents(3, seed=number), torch.zeros(1, 8, 3, 1, 2))
        assert history.memory is not None and history.recent is not None
        since = history.latents - model.config.history
        assert history.memory.positions[:, 0].min() >= since
        held = [history.memory.tokens, history.memory.hidden, history.recent]
        held += [each for past in history._pasts for each in past.inputs.values()]
        sizes.append(sum(each.untyped_storage().nbytes() for each in held))
    assert max(sizes[4:]) <= max(sizes[:6])


@pytest.mark.parametrize(
    "changes",
    [
        {"memory": "none"},
        {"memory": "framepack", "shape": (3, 8, 8)},
        {"memory": "patchify"},
        {"branches": "high"},
        {"branches": "low"},
        {"rates": ("2x2x2", "1x2x4")},
        {"cross_attention": True},
        {"window": 0},
        {"classes": 0},
    ],
)
def test_every_kind_of_memory_generates(vae: PVVAE, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = dit(**changes)
    seen = Seen(model, monkeypatch)
    video = made(model, vae, 8, settings=Settings(steps=1))
    assert model.config.shape and video.shape == (1, 29, 16 * model.config.shape[1], 16 * model.config.shape[2], 3)
    memory = seen.calls[-1][3]
    tokens = 0 if memory is None else memory.tokens.shape[1]
    assert (tokens > 0) == (model.config.memory != "none")


def test_half_precision_makes_nearly_the_same_video(vae: PVVAE) -> None:
    model, half = dit(), dit().to(torch.bfloat16)
    decoder = PVVAE(vae.config)
    decoder.load_state_dict(vae.state_dict())
    difference = made(half, decoder.to(torch.bfloat16), 6).astype(int) - made(model, vae, 6)
    assert 0 < np.abs(difference).mean() < 15


def test_what_came_before_matters_through_the_memory_alone(vae: PVVAE) -> None:
    model = dit(window=0, rates=("2x2x1",))
    changed = latents(4)
    changed[:, :, 0] += 1
    one, two = (made(model, vae, 3, start=start, settings=Settings(steps=1)) for start in (latents(4), changed))
    assert (one != two).any()


def test_a_video_goes_on_from_a_start_whose_frames_are_not_part_of_it(
    model: MemoryDiT, vae: PVVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(model, monkeypatch)
    start = latents(5)
    video = made(model, vae, 4, start=start, folder=str(tmp_path))
    assert video.shape[1] == 16
    with torch.no_grad():
        whole = vae.decode(torch.cat([start, kept(tmp_path)[:, :, :4]], dim=2))[:, :, 17:]
    assert np.abs(video.astype(int) - to_pixels(whole).permute(0, 2, 3, 4, 1).numpy()).max() <= 1
    assert seen.calls[0][2].tolist() == [3, 4, 5, 6, 7]


def test_a_story_changes_the_class_with_the_next_segment(
    model: MemoryDiT, vae: PVVAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(model, monkeypatch)
    made(
        model,
        vae,
        12,
        [3, 4],
        story=[(0, of_classes([0, 1])), (4, of_classes([2, 2])), (9, of_classes([-1, 0]))],
        settings=Settings(steps=1),
    )
    assert [None if c[4] is None else c[4].classes.tolist() for c in seen.calls] == [[0, 1], [0, 1], [2, 2], [-1, 0]]
    seen.calls.clear()
    made(model, vae, 6, [3, 4], story=[(3, of_classes([2, -1]))], settings=Settings(steps=1, guidance=2.0))
    (first, *_, none), (x, _, _, memory, ids) = seen.calls
    assert len(first) == 2 and none is None and memory is not None and ids is not None
    assert len(x) == len(memory.tokens) == 4 and ids.classes.tolist() == [2, -1, -1, -1]
    torch.testing.assert_close(memory.tokens[:2], memory.tokens[2:])


@pytest.mark.parametrize("after", [0, 3, 4, 5, 7])
def test_a_stopped_run_goes_on_to_the_same_bytes(model: MemoryDiT, vae: PVVAE, tmp_path: Path, after: int) -> None:
    arguments: dict[str, Any] = {"model": model, "vae": vae, "latents": 11, "seeds": [3, 5], "settings": QUICK}
    arguments |= {"start": latents(2), "story": [(0, of_classes([0, 1])), (6, of_classes([1, 2]))]}
    uninterrupted = list(generate(**arguments))
    arguments["folder"] = str(tmp_path)
    done: list[int] = []

    def step() -> None:
        done.append(1)
        if len(done) > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(generate(**arguments, each_step=step))
    assert len(list(tmp_path.glob("*.safetensors"))) == after // QUICK.steps
    done.clear()
    after = 1000
    again = list(generate(**arguments, each_step=step))
    assert len(done) == 4 * QUICK.steps
    for one, two in zip(uninterrupted, again, strict=True):
        np.testing.assert_array_equal(one, two)


def test_finished_segments_are_not_sampled_again(
    model: MemoryDiT, vae: PVVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = made(model, vae, 6, folder=str(tmp_path))
    seen = Seen(model, monkeypatch)
    np.testing.assert_array_equal(made(model, vae, 6, folder=str(tmp_path)), first)
    assert not seen.calls
    longer = made(model, vae, 9, folder=str(tmp_path))
    assert len(seen.calls) == QUICK.steps
    np.testing.assert_array_equal(longer[:, : first.shape[1]], first)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seeds": [4]}, "seeds"),
        ({"settings": Settings(steps=3)}, "settings"),
        ({"story": [(0, of_classes([1]))]}, "story"),
        ({"start": latents(2)}, "start"),
        ({"models": "other"}, "models"),
        ({"tile": 128}, "tile"),
    ],
)
def test_segments_of_other_settings_are_refused(
    model: MemoryDiT, vae: PVVAE, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    made(model, vae, 3, folder=str(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=f"of a run that was stopped, with other {named}; delete it"):
        made(model, vae, 3, **{"seeds": [3], "folder": str(tmp_path)} | changes)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_settings_that_knew_of_fewer_options_are_the_same_if_these_are_not_used(
    model: MemoryDiT, vae: PVVAE, tmp_path: Path
) -> None:
    whole = made(model, vae, 6)
    made(model, vae, 3, folder=str(tmp_path))
    record = json.loads((tmp_path / "settings.json").read_text())
    assert record.pop("negative") is None
    (tmp_path / "settings.json").write_text(json.dumps(record))
    np.testing.assert_array_equal(made(model, vae, 6, folder=str(tmp_path)), whole)
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(UserError, match="with other damaged settings; delete it"):
        made(model, vae, 6, folder=str(tmp_path))


def test_damaged_segments_are_named(model: MemoryDiT, vae: PVVAE, tmp_path: Path) -> None:
    made(model, vae, 3, folder=str(tmp_path))
    (tmp_path / "00000.safetensors").write_bytes(b"broken")
    with pytest.raises(Failure, match=r"00000\.safetensors: damaged"):
        made(model, vae, 3, folder=str(tmp_path))


def test_what_was_kept_is_forgotten_and_nothing_else(model: MemoryDiT, vae: PVVAE, tmp_path: Path) -> None:
    for number in range(2):
        made(model, vae, 3, folder=str(tmp_path / "x.part" / str(number)))
    (tmp_path / "x.part" / "1" / "mine.txt").write_text("x")
    parts.forget(str(tmp_path / "x.part"))
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()] == ["x.part/1/mine.txt"]
    (tmp_path / "x.part" / "1" / "mine.txt").unlink()
    parts.forget(str(tmp_path / "x.part"))
    assert not list(tmp_path.iterdir())


def test_two_commands_may_forget_the_same_parts(
    model: MemoryDiT, vae: PVVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(model, vae, 3, folder=str(tmp_path / "x.part" / "0"))
    names = storage.names

    def seen_by_both(url: str) -> list[str]:
        found = names(url)
        if "settings.json" in found:
            Path(url, "settings.json").unlink()
        return found

    monkeypatch.setattr(storage, "names", seen_by_both)
    parts.forget(str(tmp_path / "x.part"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latents": 0}, "nothing to generate"),
        ({"seeds": []}, "nothing to generate"),
        ({"settings": Settings(steps=0)}, "needs at least 1"),
        ({"start": torch.zeros(1, 8, 2, 4, 4)}, r"start has shape .* needs \(1 or 1, 8, T, 2, 4\)"),
        ({"start": torch.zeros(2, 8, 2, 2, 4)}, "start has shape"),
        ({"start": torch.zeros(1, 8, 0, 2, 4)}, "start has shape"),
        ({"story": [(0, of_classes([3]))]}, "class 3 is out of range"),
        ({"story": [(0, of_classes([1, 1]))]}, "2 classes for 1 seeds"),
        ({"story": [(3, of_classes([1])), (3, of_classes([2]))]}, "must rise"),
        ({"settings": Settings(steps=1, guidance=2.0)}, "needs a class or a text to guide to"),
    ],
)
def test_what_does_not_fit_together_is_refused_at_the_call(
    model: MemoryDiT, vae: PVVAE, changes: dict[str, Any], said: str
) -> None:
    arguments: dict[str, Any] = {"latents": 3, "seeds": [1], "settings": QUICK} | changes
    with pytest.raises(ValueError, match=said):
        generate(model, vae, **arguments)
    with pytest.raises(ValueError, match="names no segment"):
        generate(dit(shape=None), vae, 3, [1])
    with pytest.raises(ValueError, match="has 16 channels, the autoencoder 8"):
        generate(MemoryDiT(MemoryDiTConfig(**SMALL | {"channels": 16})), vae, 3, [1])
