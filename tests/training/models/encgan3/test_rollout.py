"""Videos of any length: clips that share a frame, forward and backward, the same by seed, resumed where they were stopped."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from longtake.datasets.errors import Failure, UserError
from longtake.training.models.encgan3.config import EncGAN3Config
from longtake.training.models.encgan3.model import EncGAN3
from longtake.training.models.encgan3.rollout import Rollout, Start, interpolated, movements

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"size": 16, "width": 2, "content": 5, "movement": 3, "attention": None, "groups": 1}
HOP = 12  # frames that a clip adds


def awake(**changes: Any) -> EncGAN3:
    """Random weights, also where a layer starts near zero, so that a clip moves."""
    model, rng = EncGAN3(EncGAN3Config(**SMALL | changes)), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=rng)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> EncGAN3:
    return awake()


def video(frames: int, seed: int = 0) -> Tensor:
    """`(frames, 3, 16, 16)`."""
    return torch.rand(frames, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def started(frames: int) -> Start:
    clip = video(frames)
    return Start(clip[:16], clip[-16:])


def made(model: EncGAN3, frames: int, seeds: tuple[int, ...] = (1, 2), **more: Any) -> Tensor:
    """`(B, frames, 3, 16, 16)`, in order of time."""
    plan = Rollout(model, seeds, **more)
    plan.check()
    pieces = list(plan.pieces(frames))
    return torch.cat(pieces[::-1] if plan.backward else pieces, dim=1)


def seen(plan: Rollout, frames: int, folder: Path | None = None) -> np.ndarray:
    return np.concatenate(list(plan.pixels(frames, folder and str(folder))), axis=1)


def chain(model: EncGAN3, frame: Tensor, place: int, z_x: Tensor, z_v: list[Tensor]) -> Tensor:
    """A forward rollout of one video written down plainly: whole clips, each laid over the one before from the joint on."""
    config = model.config
    with torch.no_grad():
        line = model.generate(z_x, z_v[0][None], frame[None], place)
        for each in z_v[1:]:
            shared = line[:, -config.overlap + config.index].clamp(-1, 1)  # as it is shown
            content = model.encode_content(shared).mean
            clip = model.generate(content, each[None], shared, config.index)
            line = torch.cat([line[:, : line.shape[1] - config.overlap + config.index], clip[:, config.index :]], dim=1)
    return line


def test_clips_are_laid_over_each_other_at_the_frame_they_share(model: EncGAN3) -> None:
    moves = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    image = video(1)
    with torch.no_grad():
        z_x = model.encode_content(image).mean
    expected = chain(model, image[0], model.config.index, z_x, list(moves))[:, model.config.index + 1 :]
    found = made(model, 40, (7,), start=Start(image, image), movement=[moves])
    assert torch.allclose(found.clamp(-1, 1), expected[:, :40].clamp(-1, 1), atol=1e-6)
    assert not torch.equal(found, found.clamp(-1, 1)), "some pixels are out of range, so the shared frame is told apart"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("start", [0, 1, 20])
@pytest.mark.parametrize("frames", [1, 12, 16, 43])
def test_any_length_comes_out_whole(model: EncGAN3, frames: int, start: int, backward: bool) -> None:
    more = {"start": started(start)} if start else {}
    found = made(model, frames, backward=backward, **more)
    assert found.shape == (2, frames, 3, 16, 16) and bool(found.isfinite().all())


def test_a_video_goes_on_from_the_last_frame_of_its_start_and_a_backward_one_ends_at_the_first(model: EncGAN3) -> None:
    start = started(20)
    with torch.no_grad():
        z_v = model.encode_movement(model.differences_of(start.last[None])).mean
        forward = model.generate(model.encode_content(start.last[-1:]).mean, z_v, start.last[-1:], model.config.index)
        z_v = model.encode_movement(model.differences_of(start.first[None])).mean
        backward = model.generate(model.encode_content(start.first[:1]).mean, z_v, start.first[:1], model.config.joint)
    assert torch.allclose(made(model, 8, (1,), start=start), forward[:, 2:10], atol=1e-6)
    assert torch.allclose(made(model, 8, (1,), start=start, backward=True), backward[:, 5:13], atol=1e-6)


@pytest.mark.parametrize("start", [0, 20])
def test_a_longer_video_begins_with_the_shorter_one_and_a_backward_one_ends_with_it(model: EncGAN3, start: int) -> None:
    more = {"start": started(start)} if start else {}
    assert torch.equal(made(model, 40, **more)[:, :15], made(model, 15, **more))
    assert torch.equal(made(model, 40, backward=True, **more)[:, -15:], made(model, 15, backward=True, **more))


def test_a_video_depends_on_its_seed_and_on_no_other(model: EncGAN3) -> None:
    both = made(model, 30, (1, 2))
    assert torch.allclose(both[1:], made(model, 30, (2,)), atol=1e-5)
    assert not torch.allclose(both[0], both[1], atol=1e-2)


def test_each_clip_moves_in_its_own_way(model: EncGAN3, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, generate = list[Tensor](), model.generate
    monkeypatch.setattr(model, "generate", lambda z_x, z_v, *rest: (drawn.append(z_v), generate(z_x, z_v, *rest))[1])
    made(model, 40)
    assert len(torch.cat(drawn).unique(dim=0)) == len(drawn) * 2 == 8


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("start", [0, 1])
def test_joints_are_where_the_next_clip_has_its_first_own_frame(model: EncGAN3, start: int, backward: bool) -> None:
    # frames up to a joint do not change with the movement of what comes after it
    frames, more = 45, {"start": started(start)} if start else {}
    joints = Rollout(model, [1], backward=backward, **more).joints(frames)
    assert np.diff(joints).tolist() == [HOP] * (len(joints) - 1)
    moves = torch.randn(6, 3, generator=torch.Generator().manual_seed(3))
    base = made(model, frames, (1,), movement=[moves], backward=backward, **more)
    for number in (1, 2):
        which = -1 - number if backward else number
        changed = moves.clone()
        changed[which] += 1
        other = made(model, frames, (1,), movement=[changed], backward=backward, **more)
        same = (base == other).flatten(2).all(2)[0]
        joint = joints[-number] if backward else joints[number - 1]
        # of a backward one the shared frame, before the joint, is the first that stays
        begin = joint - 1 if backward else joint
        assert same[begin:].all() if backward else same[:begin].all()
        assert not same[begin - 1 if backward else begin]


def test_content_is_kept_or_read_anew(model: EncGAN3) -> None:
    read: list[int] = []
    with torch.no_grad():
        hook = model.content.register_forward_hook(lambda *_: read.append(1))
        kept, anew = made(model, 40, content="keep"), made(model, 40)
        hook.remove()
    assert len(read) == 3
    assert torch.equal(kept[:, :12], anew[:, :12]) and not torch.equal(kept[:, 16:], anew[:, 16:])


def test_clips_fade_into_each_other_where_the_model_does(model: EncGAN3) -> None:
    fading = awake(merge="fade")
    fading.load_state_dict(model.state_dict())
    cut, faded = made(model, 22), made(fading, 22)
    different = (cut.clamp(-1, 1) != faded.clamp(-1, 1)).flatten(2).any(2).any(0)
    assert different.nonzero().flatten().tolist() == [12, 14, 15]  # the overlap but for the frame that both share


@pytest.mark.parametrize("overlap", [2, 4, 10])
def test_the_overlap_may_be_any(overlap: int) -> None:
    model = awake(overlap=overlap)
    for more in ({}, {"start": started(20)}):
        for backward in (False, True):
            assert made(model, 33, (1,), backward=backward, **more).shape[1] == 33


# movement of another video


def test_movement_comes_from_clips_of_another_video_and_comes_again(model: EncGAN3) -> None:
    other = video(30, 5)
    with torch.no_grad():
        expected = [model.encode_movement(other[n : n + 16].diff(dim=0).abs()[None]).mean[0] for n in (0, 12)]
    found = movements(model, iter(other))
    assert torch.allclose(found, torch.stack(expected), atol=1e-6)
    again = torch.cat([found, found])
    assert torch.equal(made(model, 40, (1,), movement=[found]), made(model, 40, (1,), movement=[again]))


@pytest.mark.parametrize(("frames", "words"), [(0, "0 frames"), (1, "1 frame;"), (15, "15 frames")])
def test_too_few_frames_have_no_movement(model: EncGAN3, frames: int, words: str) -> None:
    with pytest.raises(ValueError, match=f"has {words}.*clips of 16"):
        movements(model, iter(video(frames)))


def test_movement_goes_from_that_of_one_video_to_that_of_another() -> None:
    first, second = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 3.0], [1.0, 5.0]])
    assert interpolated(first, second, 3).tolist() == [[0, 0], [0.5, 2.5], [1, 3]]
    assert interpolated(first, second, 1).tolist() == [[0, 0]]


def test_what_does_not_fit_is_refused(model: EncGAN3) -> None:
    for words, seeds, more in (
        ("seeds: there are none", (), {}),
        (
            "start: frames are 8x16, the model makes 16x16",
            (1,),
            {"start": Start(video(1)[:, :, :8], video(1)[:, :, :8])},
        ),
        ("movement has shape", (1,), {"movement": [torch.zeros(2, 4)]}),
        ("movement: 1 for 2 videos", (1, 2), {"movement": [torch.zeros(2, 3)]}),
    ):
        with pytest.raises(ValueError, match=words):
            Rollout(model, seeds, **more).check()


# parts


@pytest.mark.parametrize("backward", [False, True])
def test_a_stopped_video_goes_on_to_the_same_pixels(model: EncGAN3, tmp_path: Path, backward: bool) -> None:
    plan = Rollout(model, (1, 2), backward=backward)
    whole = seen(plan, 40)

    stops = iter([False, False, True])

    def stop() -> None:
        if next(stops):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seen(Rollout(model, (1, 2), backward=backward, each_step=stop), 40, tmp_path)
    steps: list[int] = []
    resumed = Rollout(model, (1, 2), backward=backward, each_step=lambda: steps.append(1))
    assert np.array_equal(seen(resumed, 40, tmp_path), whole)
    assert len(steps) == plan.clips(40) == 4
    assert np.array_equal(seen(resumed, 43, tmp_path), seen(plan, 43))


def test_clips_of_other_settings_are_refused_and_damaged_ones_named(model: EncGAN3, tmp_path: Path) -> None:
    seen(Rollout(model, (1,)), 20, tmp_path)
    with pytest.raises(UserError, match="with other content"):
        seen(Rollout(model, (1,), content="keep"), 20, tmp_path)
    (tmp_path / "00000.safetensors").write_bytes(b"x")
    with pytest.raises(Failure, match=r"00000\.safetensors: damaged"):
        seen(Rollout(model, (1,)), 20, tmp_path)


def test_memory_does_not_grow_with_the_length(model: EncGAN3) -> None:
    def alive() -> int:
        gc.collect()
        return sum(each.numel() for each in gc.get_objects() if type(each) is Tensor)

    counts = [alive() for number, _ in enumerate(Rollout(model, (1,)).pieces(40 * HOP)) if number in (4, 38)]
    assert counts[1] <= counts[0]


@pytest.mark.parametrize("backward", [False, True])
def test_values_that_are_no_numbers_are_no_video(model: EncGAN3, backward: bool) -> None:
    broken = awake()
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.generator.to_differences.bias[0] = float("nan")
    with pytest.raises(Failure, match="clip 0 has values that are no numbers"):
        next(Rollout(broken, [0], backward=backward).pixels(20))


def test_a_clip_that_another_command_takes_away_is_named(model: EncGAN3, tmp_path: Path) -> None:
    chunks = Rollout(model, [0], backward=True).pixels(40, str(tmp_path))
    next(chunks)
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(Failure, match="another command has taken away clip"):
        list(chunks)
