"""The worlds of actions, endless textures and sound: drawn alike from a seed, and read right."""

import itertools
import json
from collections.abc import Mapping
from typing import Any

import av
import numpy as np
import pytest

from longtake.datasets.errors import UserError
from longtake.infra import worlds
from longtake.infra.worlds import Video, actions, endless
from longtake.pipeline.cut import Sampled, shots

NAMES = ("actions", "endless", "sound")
COUNT = 16
# figures whose best value is 1, and the highest mean that they may have on videos whose frames are shuffled or another's
SHUFFLED = {
    "actions": {"action": 0.6, "all": 0.5},
    "endless": {"way": 0.5, "steady": 0.5},
    "sound": {"colour": 0.6, "bounce": 0.6, "height": 0.3},
}
ANOTHER = {
    "actions": {"shape": 0.6, "colour": 0.6, "ground": 0.7, "action": 0.5, "identity": 0.4, "all": 0.1},
    "endless": {"palette": 0.5, "way": 0.4, "steady": 0.4},
    "sound": {"colour": 0.6, "bounce": 0.6, "height": 0.4},
}

Drawn = list[tuple[np.ndarray, Video]]


@pytest.fixture(scope="module")
def drawn() -> dict[str, Drawn]:
    """Videos of each world, every other one of held-out combinations."""
    found: dict[str, Drawn] = {}
    for name in NAMES:
        videos = [worlds.load(name).render(seed, bool(seed % 2)) for seed in range(COUNT)]
        found[name] = [(np.stack(list(video.frames)), video) for video in videos]
    return found


def mean(name: str, rows: list[tuple[np.ndarray, Video]]) -> Mapping[str, float]:
    """Means of what the world's reader says of frames beside the truth of videos."""
    found = [worlds.load(name).read(frames, video.truth, video.fps) for frames, video in rows]
    return {figure: float(np.mean([row[figure] for row in found])) for figure in found[0]}


def halved(frames: np.ndarray) -> np.ndarray:
    length, side = frames.shape[:2]
    return frames.reshape(length, side // 2, 2, side // 2, 2, 3).mean((2, 4)).round().astype(np.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_videos_follow_from_their_seed_and_their_truth_is_plain(name: str, drawn: dict[str, Drawn]) -> None:
    frames, video = drawn[name][3]
    again = worlds.load(name).render(3, True)
    assert np.array_equal(frames, np.stack(list(again.frames)))
    assert frames.shape == (video.length, 32, 32, 3) and frames.dtype == np.uint8
    assert json.loads(json.dumps(dict(video.truth))) == dict(again.truth)
    assert not np.array_equal(frames, drawn[name][5][0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("small", [False, True])
def test_the_reader_is_right_on_real_videos(name: str, small: bool, drawn: dict[str, Drawn]) -> None:
    found = mean(name, [(halved(frames) if small else frames, video) for frames, video in drawn[name]])
    for figure in ANOTHER[name]:
        assert found[figure] > 0.97, figure
    if name == "actions":
        assert found["off"] < 0.03
    if name == "endless":
        assert found["stained"] < 0.01 and 0.9 < found["pace"] < 1.15 and 0.9 < found["contrast"] < 1.1


@pytest.mark.parametrize("name", NAMES)
def test_the_reader_is_wrong_on_shuffled_frames_and_on_other_videos(name: str, drawn: dict[str, Drawn]) -> None:
    rng = np.random.default_rng(0)
    shuffled = mean(name, [(frames[rng.permutation(len(frames))], video) for frames, video in drawn[name]])
    others = [frames for frames, _ in drawn[name][5:] + drawn[name][:5]]
    another = mean(name, [(frames, video) for frames, (_, video) in zip(others, drawn[name], strict=True)])
    for found, most in ((shuffled, SHUFFLED[name]), (another, ANOTHER[name])):
        for figure, value in most.items():
            assert found[figure] < value, figure


@pytest.mark.parametrize("name", NAMES)
def test_the_reader_takes_videos_of_another_rate_and_shorter_ones(name: str, drawn: dict[str, Drawn]) -> None:
    read = worlds.load(name).read
    for frames, video in drawn[name][:4]:
        slower = read(frames[::2], video.truth, video.fps / 2)
        first = read(frames[: video.length * 2 // 3], video.truth, video.fps)
        for figure in ANOTHER[name].keys() - {"bounce", "all"}:
            assert slower[figure] > 0.9 and first[figure] > 0.9, figure


@pytest.mark.parametrize("module", [actions, endless])
def test_what_is_held_out_shows_in_no_other_video_but_each_pair_of_it_does(module: Any) -> None:
    looks = module.LOOKS
    for apart in (True, False):
        made = {module.render(seed, apart).truth[looks[0]._fields[0]] for seed in range(30)}
        assert made == {look[0] for look in looks}
    seen, unseen = ([look for look in looks if module.heldout(look) is apart] for apart in (False, True))
    assert 0.15 < len(unseen) / len(looks) < 0.25
    for first, second in itertools.combinations(range(len(looks[0])), 2):
        assert {(look[first], look[second]) for look in seen} == {(look[first], look[second]) for look in looks}


def test_a_body_is_read_as_lost_where_two_ghosts_of_it_stand(drawn: dict[str, Drawn]) -> None:
    ghosts = []
    for frames, video in drawn["actions"]:
        faded = frames.copy()
        ends = frames[4].astype(float), frames[15].astype(float)
        for frame in range(5, 15):
            faded[frame] = (ends[0] + (ends[1] - ends[0]) * (frame - 4) / 11).round()
        gap = actions.part(video.truth, 5, 15)
        ghosts.append(actions.read(faded[5:15], gap, video.fps)["identity"])
        assert actions.read(frames[5:15], gap, video.fps)["identity"] == 1
    assert np.mean(ghosts) < 0.8  # a body that goes back the way it came has hardly any


@pytest.mark.parametrize("name", NAMES)
def test_hardly_any_change_is_taken_for_a_cut(name: str, drawn: dict[str, Drawn]) -> None:
    whole = 0
    for frames, video in drawn[name]:
        sampled = []
        for number, frame in enumerate(frames):
            planes = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p").to_ndarray()
            sampled.append(Sampled(planes, number, number / video.fps, False))
        found = list(shots(sampled))
        whole += sum(first for _, first, _ in found) == 1 and not any(dropped for _, _, dropped in found)
    assert whole >= len(drawn[name]) - 1


def test_an_endless_texture_does_not_come_again() -> None:
    frames = np.stack(list(endless.render(1, False, size=16, frames=400).frames)).astype(float)
    apart = np.abs(frames[100:] - frames[0]).mean((1, 2, 3))
    assert apart.min() > np.abs(frames[1] - frames[0]).mean() / 2


def test_the_tone_is_heard_while_its_colour_is_seen() -> None:
    from longtake.infra.worlds import sound

    video = sound.render(2, False)
    assert video.sound
    samples, rate = video.sound
    assert len(samples) == video.length * rate // video.fps and np.abs(samples).max() <= 1
    length = rate // video.fps
    for frame, tone in enumerate(video.truth["tones"]):
        if all(abs(frame - bounce) > 1 for bounce in video.truth["bounces"]):
            power = np.abs(np.fft.rfft(samples[frame * length : (frame + 1) * length]))
            heard = np.fft.rfftfreq(length, 1 / rate)[power.argmax()]
            assert abs(heard - sound.TONES[tone]) < 30


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("actions", {"actions": 3}, "actions must be 1 or 2"),
        ("actions", {"frames": 3}, "5 frames of 16 pixels"),
        ("endless", {"pace": 0.5}, "pace must be above 0"),
        ("sound", {"size": 8}, "14 frames of 16 pixels"),
    ],
)
def test_options_that_make_no_video_are_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        worlds.load(name).render(0, False, **options)
