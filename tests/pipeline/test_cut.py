"""Shot boundaries, by where they are found in footage whose boundaries are known."""

from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from pathlib import Path

import labelled_cuts
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.infra.footage import Event, generate, load_truth
from longtake.pipeline.cut import Sampled, shots
from longtake.pipeline.decode import frames
from longtake.pipeline.source import resample

FPS = 24
SIZE = (64, 96)
VIDEOS = 66
LATEST = 64  # source frames that may be read before the first one comes out

Said = list[tuple[int, bool, str]]  # source frame, whether a shot starts, why it is dropped
Found = list[tuple[list[Event], Said]]


def scene(seed: int, length: int = 1, pace: float = 0.0) -> np.ndarray:
    """(length, H, W) luma, limited range: a random picture with coarse and fine structure, moving by `pace` pixels a frame."""
    rng = np.random.default_rng(seed)
    height, width = SIZE
    picture = sum(np.kron(rng.uniform(-45, 45, (height // n, 2 * width // n)), np.ones((n, n))) for n in (32, 16, 8, 2))
    canvas = np.clip(126 + np.asarray(picture), 16, 235)
    return np.stack([np.roll(canvas, -round(pace * t), 1)[:, :width] for t in range(length)])


def stream(lumas: np.ndarray, first: int = 0, after_gap: bool = False) -> Iterator[Sampled]:
    for n, luma in enumerate(lumas, first):
        grey = np.full((SIZE[0] // 2, SIZE[1]), 128)
        planes = np.concatenate([np.rint(luma).clip(16, 235), grey]).astype(np.uint8)
        yield Sampled(planes, n, n / FPS, after_gap and n == first)


def starts(lumas: np.ndarray) -> list[int]:
    return [frame.number for frame, start, _ in shots(stream(lumas)) if start]


def dropped(lumas: np.ndarray, why: str = "transition") -> list[int]:
    return [frame.number for frame, _, reason in shots(stream(lumas)) if reason == why]


def mix(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    share = (np.arange(1, len(after) + 1) / (len(after) + 1))[:, None, None]
    return (1 - share) * before + share * after


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The events of each generated video, and what `shots` says of each of its frames."""
    results = []
    # no seed that a threshold was tuned on
    for video in generate(tmp_path_factory.mktemp("cuts"), count=VIDEOS, seed=21, seconds=8.0, fps=FPS, size=(48, 64)):
        scaled = (64, 48)
        sampled = resample(((frame, (scaled, scaled)) for frame in frames(str(video))), FPS)
        events = load_truth(video.with_suffix(".truth.json")).events
        results.append((events, [(frame.number, start, why) for frame, start, why in shots(sampled)]))
    return results


def runs(said: Said) -> list[range]:
    """The stretches of dropped frames that are not black throughout."""
    edges = [n for n, (a, b) in enumerate(pairwise([False, *(bool(why) for _, _, why in said), False])) if a != b]
    found = [range(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return [run for run in found if any(said[n][2] == "transition" for n in run)]


def test_hard_cuts_are_found_and_little_else(found: Found) -> None:
    hits = wanted = made = 0
    for events, said in found:
        true = {e.first_frame for e in events if e.kind == "cut"}
        # a start after a dropped stretch belongs to that stretch
        cuts = {b[0] for a, b in pairwise(said) if b[1] and not a[2]}
        hits, wanted, made = hits + len(true & cuts), wanted + len(true), made + len(cuts)
    assert wanted >= 60
    assert hits / wanted >= 0.95
    assert hits / made >= 0.95


def test_gradual_transitions_are_found_and_little_else(
    found: Found,
) -> None:
    hits = wanted = true = made = 0
    for events, said in found:
        gradual = [range(e.first_frame, e.last_frame) for e in events if e.kind in ("fade", "dissolve")]
        detected = runs(said)
        hits += sum(any(overlap(g, run) for run in detected) for g in gradual)
        true += sum(any(overlap(g, run) for g in gradual) for run in detected)
        wanted, made = wanted + len(gradual), made + len(detected)
    assert wanted >= 60
    assert hits / wanted >= 0.8
    assert true / made >= 0.8


def test_dissolves_are_found_not_only_fades(found: Found) -> None:
    each = [
        any(overlap(range(e.first_frame, e.last_frame), run) for run in runs(said))
        for events, said in found
        for e in events
        if e.kind == "dissolve"
    ]
    assert len(each) >= 20
    assert np.mean(each) >= 0.8


def test_few_frames_of_a_transition_stay_and_few_others_go(
    found: Found,
) -> None:
    inside, outside = [], []
    for events, said in found:
        soft = {
            n for e in events if e.kind in ("fade", "dissolve", "black") for n in range(e.first_frame, e.last_frame)
        }
        for number, _, why in said:
            (inside if number in soft else outside).append(bool(why))
    assert np.mean(inside) >= 0.85
    assert np.mean(outside) <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("rate", [None, 12.0])
def test_hard_cuts_of_real_footage_are_those_that_one_sees(videos: Path, rate: float | None) -> None:
    hits, wanted, made = labelled_cuts.judged(videos / "real", rate)
    assert wanted == 15
    assert hits / wanted >= 0.95
    assert hits / made >= 0.95


def landscape(seed: int) -> np.ndarray:
    """A bright sky above dark ground, with things of many sizes in both."""
    light = np.linspace(80, -80, SIZE[0])[:, None]
    return np.clip(126 + light + (scene(seed)[0] - 126) / 2, 16, 235)


@pytest.mark.parametrize("seed", range(20, 30))
def test_a_cut_between_pictures_of_one_layout_is_found(seed: int) -> None:
    one, two = landscape(seed), landscape(seed + 10)
    assert starts(np.stack([one] * 12 + [two] * 12)) == [0, 12]


def overlap(a: range, b: range) -> bool:
    return a.start < b.stop and b.start < a.stop


@pytest.mark.parametrize("length", [6, 12, 24, 48])
@pytest.mark.parametrize("pace", [0.0, 0.25])
def test_a_dissolve_is_dropped_and_a_shot_starts_after_it(length: int, pace: float) -> None:
    one, two = scene(1, 60 + length, pace), scene(2, 60 + length, -pace)
    lumas = np.concatenate([one[:60], mix(one[60:], two[:length]), two[length:]])
    gone = dropped(lumas)
    middle = set(range(60 + length // 6, 60 + length - length // 6))
    assert middle <= set(gone) <= set(range(57, 60 + length + 3))
    assert starts(lumas) == [0, gone[-1] + 1]


@pytest.mark.parametrize(("level", "name"), [(16, "black"), (235, "white")])
@pytest.mark.parametrize("length", [8, 24, 40])
def test_fades_to_and_from_black_and_white_are_dropped(level: int, name: str, length: int) -> None:
    flat = np.full((length, *SIZE), float(level))
    one, two = (scene(seed, 50, 0.3) for seed in (3, 4))
    out, back = mix(scene(3, 50 + length, 0.3)[50:], flat), mix(flat, np.repeat(two[:1], length, 0))
    lumas = np.concatenate([one, out, flat[:10], back, two])
    gone, black = dropped(lumas), dropped(lumas, "black")
    edge = max(2, length // 6)
    for ramp in (range(50, 50 + length), range(60 + length, 60 + 2 * length)):
        assert set(ramp[edge:-edge]) <= {*gone, *black}
    assert set(gone) <= set(range(47, 63 + 2 * length))
    assert bool(black) == (name == "black")
    assert starts(lumas)[-1] in range(60 + 2 * length - edge, 60 + 2 * length + 3)


def lit(gains: np.ndarray) -> np.ndarray:
    return 16 + (scene(5, len(gains), 0.4) - 16) * gains[:, None, None]


def zoomed() -> np.ndarray:
    whole = scene(6)[0]
    y, x = np.indices(SIZE) - np.reshape(SIZE, (2, 1, 1)) / 2
    rows, columns = (
        np.reshape(SIZE, (2, 1, 1, 1)) / 2 + np.stack([y, x])[:, None] / np.linspace(1, 2.5, 60)[:, None, None]
    ).astype(int)
    return whole[rows, columns]


def crossing() -> np.ndarray:
    """A large bright square that moves through the picture within a second."""
    lumas = scene(7, 80)
    for t in range(24):
        lumas[28 + t, 10:54, max(0, 4 * t - 44) : 4 * t] = 220
    return lumas


def flashes() -> np.ndarray:
    gains = np.ones(80)
    gains[[20, 40, 41, 60]] = 1.9
    return lit(gains)


STEADY: dict[str, Callable[[], np.ndarray]] = {
    "slow pan": lambda: scene(5, 80, 0.3),
    "pan": lambda: scene(5, 80, 1.5),
    "fast pan": lambda: scene(5, 80, 6.0),
    "noise": lambda: scene(5, 80) + np.random.default_rng(0).normal(0, 20, (80, *SIZE)),
    "flash": flashes,
    "brightness drift": lambda: lit(np.linspace(1.2, 0.5, 80)),
    "lights go half out": lambda: lit(np.r_[np.ones(30), np.linspace(1, 0.5, 12), np.full(30, 0.5)]),
    "zoom": zoomed,
    "crossing object": crossing,
    "still": lambda: scene(5, 80),
}


@pytest.mark.parametrize("name", STEADY)
def test_what_happens_within_a_scene_neither_cuts_nor_drops(name: str) -> None:
    lumas = STEADY[name]()
    assert starts(lumas) == [0]
    assert dropped(lumas) == []


def test_a_cut_between_black_bars_is_found() -> None:
    lumas = np.concatenate([scene(1, 30, 0.5), scene(2, 30, 0.5)])
    lumas[:, :8] = lumas[:, -8:] = 16
    assert starts(lumas) == [0, 30]


def test_a_gap_in_time_ends_a_transition() -> None:
    one, two = scene(1, 80), scene(2, 80)
    lumas = np.concatenate([one[:50], mix(one[50:62], two[:12]), two[12:]])
    whole = [why for _, _, why in shots(stream(lumas))]
    parted = list(shots(chain(stream(lumas[:53]), stream(lumas[53:], 53, after_gap=True))))
    assert whole[53] == "transition"
    assert [frame.number for frame, start, _ in parted if start][:2] == [0, 53]
    assert [why for _, _, why in parted[:50]] == [""] * 50


def test_a_source_frame_shown_for_several_ticks_counts_once() -> None:
    one, two = scene(1, 30), scene(2, 30)
    lumas = np.concatenate([one[:20], mix(one[20:26], two[:6]), two[6:]])
    ticks = [Sampled(f.planes, f.number, f.seconds + n / 100, False) for f in stream(lumas) for n in range(3)]
    each = list(shots(iter(ticks)))
    assert [why for _, _, why in each[::3]] == [why for _, _, why in shots(stream(lumas))]
    assert [number for number, start, _ in ((f.number, s, w) for f, s, w in each) if start] == starts(lumas)


def test_a_slow_change_at_a_low_frame_rate_is_no_transition() -> None:
    one, two = scene(1, 30), scene(2, 30)
    lumas = np.concatenate([one, mix(one[:12], two[:12]), two])
    slow = (Sampled(f.planes, f.number, f.seconds * FPS, False) for f in stream(lumas))
    assert not any(why for _, _, why in shots(slow))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), st.sampled_from(["cut", "mix", "gap"])), max_size=4),
    st.integers(1, 3),
)
def test_every_frame_comes_out_once_and_in_order(parts: list[tuple[int, int, str]], ticks: int) -> None:
    pictures = [*(scene(seed)[0] for seed in range(3)), np.full(SIZE, 16.0)]
    fed: list[Sampled] = []
    before = pictures[0]
    for seed, length, how in parts:
        after = np.repeat(pictures[seed][None], length, 0)
        lumas = mix(np.repeat(before[None], length, 0), after) if how == "mix" else after
        number = fed[-1].number + 1 if fed else 0
        fed += [
            f for f in stream(lumas, number, after_gap=how == "gap") for _ in range(ticks if not f.after_gap else 1)
        ]
        before = pictures[seed]
    said = list(shots(iter(fed)))
    assert [id(frame) for frame, _, _ in said] == [id(frame) for frame in fed]
    assert not any(start and why for _, start, why in said)
    for (_, _, why), (frame, start, now) in pairwise(said):
        assert start or now or not (why or frame.after_gap)


def test_no_frame_waits_for_more_than_a_few_seconds_of_source() -> None:
    read = 0

    def counted() -> Iterator[Sampled]:
        nonlocal read
        for frame in stream(np.concatenate([scene(1, 200, 0.5), scene(2, 200, 0.5)])):
            read += 1
            yield frame

    assert max(read - n for n, _ in enumerate(shots(counted()))) <= LATEST


@pytest.mark.parametrize(("before", "after"), [(0.05, 0.9), (0.4, 0.4), (0.7, 0.2), (0.95, 0.5)])
@pytest.mark.parametrize("level", [16, 235])
@pytest.mark.parametrize("rate", [12, 8])
def test_a_fade_of_nine_frames_is_dropped_at_low_rates_too(before: float, after: float, level: int, rate: int) -> None:
    """Down in four frames, black or white in the fifth, up in four, of which a low rate sees some."""
    ramp = np.r_[np.arange(4, -1, -1), np.arange(1, 5)] / 5
    share = np.r_[np.ones(60 + round(4 * before)), ramp, np.ones(60 + round(4 * after))]
    middle = int(share.argmin())
    one, two = scene(1, len(share), 0.25), scene(2, len(share), -0.25)
    lumas = np.where((np.arange(len(share)) < middle)[:, None, None], one, two)
    lumas = (level + (lumas - level) * share[:, None, None])[:: FPS // rate]
    said = [(n, start, why) for n, (_, start, why) in enumerate(shots(stream(lumas)))]
    inside = np.flatnonzero(share[:: FPS // rate] < 1).tolist()
    assert [n for n, _, why in said if why] == inside
    assert [n for n, start, _ in said if start] == [0, inside[-1] + 1]


def test_a_light_that_flickers_or_a_dim_shot_is_no_fade() -> None:
    gains = np.ones(80)
    gains[[20, 40, 41, 60]] = 0.2
    assert dropped(lit(gains)) == []
    dim = 16 + (scene(9, 30, 0.3) - 16) * 0.3
    assert dropped(np.concatenate([scene(1, 30, 0.3), dim, scene(2, 30, 0.3)])) == []


def test_a_light_that_comes_and_goes_slowly_at_a_low_frame_rate_is_no_fade() -> None:
    share = np.r_[np.ones(8), [0.6, 0.2, 0.2, 0.6], np.ones(8)]
    lumas = np.where((np.arange(20) < 10)[:, None, None], scene(1, 20, 0.25), scene(2, 20, -0.25))
    faded = 16 + (lumas - 16) * share[:, None, None]
    slow = (Sampled(f.planes, f.number, f.seconds * FPS / 2, False) for f in stream(faded))
    assert not any(why for _, _, why in shots(slow))
    assert dropped(faded)
