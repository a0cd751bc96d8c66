"""The generator's ground truth holds in its pixels, and its files are reproducible and resumable."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from scipy.stats import spearmanr

from longtake.infra.footage import MANIFEST, Truth, generate, load_truth, render, write_video

SECONDS, FPS, SIZE = 6.0, 12, (96, 128)
SEEDS = range(12)


@pytest.fixture(scope="module")
def clips() -> list[tuple[np.ndarray, Truth]]:
    """Twelve seeds, so every transition, a mostly static clip (5) and one with a long black stretch (11)."""
    rendered = [render(seed, SECONDS, FPS, SIZE) for seed in SEEDS]
    return [(np.stack(list(frames)), truth) for frames, truth in rendered]


def changes(frames: np.ndarray) -> np.ndarray:
    """(T,) mean |x_t - x_{t-1}|, 0 at frame 0."""
    return np.array([0.0, *(np.abs(b.astype(float) - a).mean() for a, b in itertools.pairwise(frames))])


def spans(truth: Truth, kind: str) -> list[slice]:
    return [slice(event.first_frame, event.last_frame) for event in truth.events if event.kind == kind]


def test_frames_and_truth_agree_in_shape(clips):
    for frames, truth in clips:
        assert frames.shape == (truth.frames, *SIZE, 3)
        assert frames.dtype == np.uint8
        assert len(truth.motion) == truth.frames == SECONDS * FPS
        assert truth.fps == FPS
        assert 2 <= len(truth.shots) <= 5
        assert truth.shots[0][0] == 0
        assert truth.shots[-1][1] == truth.frames
        assert all(first < last <= after for (first, last), (after, _) in itertools.pairwise(truth.shots))


def test_every_kind_of_event_appears_in_twelve_clips(clips):
    kinds = [{event.kind for event in truth.events} for _, truth in clips]
    assert set.union(*kinds) == {"cut", "fade", "dissolve", "static", "black"}
    static, black = (clips[seed][1] for seed in (5, 11))
    assert sum(span.stop - span.start for span in spans(static, "static")) > 0.5 * static.frames
    assert sum(span.stop - span.start for span in spans(black, "black")) >= 0.39 * black.frames


def test_hard_cuts_are_outliers_of_the_frame_difference(clips):
    cuts = 0
    for frames, truth in clips:
        change = changes(frames)
        starts = [first for first, _ in truth.shots]
        assert set(truth.cuts) <= set(starts)
        for cut in truth.cuts:
            near = [t for t in range(cut - 3, cut + 4) if 0 < t < truth.frames and t != cut]
            assert change[cut] > 2 * change[near].max()
            assert math.isnan(truth.motion[cut])
            cuts += 1
    assert cuts >= 6


def test_only_cuts_change_the_picture_at_once(clips):
    for frames, truth in clips:
        change = changes(frames)
        inside = [t for first, last in truth.shots for t in range(first + 1, last)]
        assert not truth.cuts or change[inside].max() < change[truth.cuts].min()


def test_black_is_black_and_static_repeats_the_frame_before(clips):
    for frames, truth in clips:
        for span in spans(truth, "black"):
            assert not frames[span].any()
            assert not any(truth.motion[span])
        for span in spans(truth, "static"):
            assert (frames[span] == frames[span.start - 1]).all()
            assert not any(truth.motion[span])


def test_fades_reach_black_and_dissolves_do_not(clips):
    for frames, truth in clips:
        light = frames.mean((1, 2, 3))
        for span in spans(truth, "fade"):
            assert light[max(span.start - 1, 0) : span.stop + 1].min() == 0
        for span in spans(truth, "dissolve"):
            edges = (light[span.start - 1], light[span.stop])
            assert light[span].min() > 0.8 * min(edges)


def test_motion_ranks_shots_as_their_pixels_do(clips):
    truths, pixels = [], []
    for frames, truth in clips:
        change = changes(frames)
        for first, last in truth.shots:
            truths.append(np.mean(truth.motion[first + 1 : last]))
            pixels.append(change[first + 1 : last].mean())
    assert len(truths) >= 30
    assert spearmanr(truths, pixels).statistic >= 0.8


def test_half_the_frame_rate_doubles_the_motion_per_frame():
    slow, fast = (render(1, 8.0, fps, SIZE)[1] for fps in (24, 12))
    first, second = (np.nanmean(truth.motion[1 : truth.shots[0][1]]) for truth in (slow, fast))
    assert second == pytest.approx(2 * first, rel=0.1)


def test_render_is_a_pure_function_and_seeds_differ():
    (one, truth), (two, again), (other, _) = (render(seed, 3.0, FPS, SIZE) for seed in (4, 4, 6))
    assert truth == again
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(next(render(4, 3.0, FPS, SIZE)[0]), next(other))


def test_files_are_reproducible_and_complete(tmp_path):
    first, second = (generate(tmp_path / name, 2, 3, 3.0, FPS, SIZE) for name in "ab")
    assert [path.name for path in first] == ["clip-000.mp4", "clip-001.mp4"]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
        truth = load_truth(a.with_suffix(".truth.json"))
        assert truth == load_truth(b.with_suffix(".truth.json"))
        with av.open(str(a)) as container:
            stream = container.streams.video[0]
            assert (stream.height, stream.width) == SIZE
            assert (stream.average_rate, stream.codec_context.pix_fmt) == (FPS, "yuv420p")
            packets = [packet for packet in container.demux(stream) if packet.pts is not None]
            keys = sorted(packet.pts // packet.duration for packet in packets if packet.is_keyframe)
            assert len(packets) == truth.frames
            assert np.diff([*keys, truth.frames]).max() <= FPS
        with av.open(str(a)) as container:
            assert sum(1 for _ in container.decode(video=0)) == truth.frames
    assert len(list((tmp_path / "a").iterdir())) == 5
    rows = [json.loads(line) for line in (tmp_path / "a" / MANIFEST).read_text().splitlines()]
    assert [row["uri"] for row in rows] == [path.name for path in first]
    for path, row in zip(first, rows, strict=True):
        truth = load_truth(path.with_suffix(".truth.json"))
        assert np.allclose([(shot["start"] * FPS, shot["end"] * FPS) for shot in row["shots"]], truth.shots)
        assert [shot["text"] for shot in row["shots"]] == truth.captions
    assert first[0].read_bytes() != first[1].read_bytes()


def test_resume_keeps_complete_pairs_and_renders_the_rest(tmp_path):
    videos = generate(tmp_path, 3, 0, 3.0, FPS, SIZE)
    records = [video.with_suffix(".truth.json") for video in videos]
    before = [path.stat().st_mtime_ns for path in videos + records]
    content = videos[1].read_bytes()
    records[1].unlink()
    videos[1].write_bytes(b"half a video")
    assert generate(tmp_path, 3, 0, 3.0, FPS, SIZE) == videos
    after = [path.stat().st_mtime_ns for path in videos + records]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True] * 2
    assert videos[1].read_bytes() == content


def test_other_arguments_render_the_pair_again(tmp_path):
    (video,) = generate(tmp_path, 1, 0, 3.0, FPS, SIZE)
    generate(tmp_path, 1, 0, 4.0, FPS, SIZE)
    assert load_truth(video.with_suffix(".truth.json")).frames == 4 * FPS


def test_a_failed_video_leaves_nothing_behind(tmp_path: Path):
    def broken():
        yield np.zeros((*SIZE, 3), np.uint8)
        raise OSError("the source is gone")

    with pytest.raises(OSError, match="gone"):
        write_video(tmp_path / "clip.mp4", broken(), FPS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("seed", {"seed": -1}),
        ("seed", {"seed": 0.5}),
        ("seconds", {"seed": 0, "seconds": 1.0}),
        ("seconds", {"seed": 0, "seconds": math.nan}),
        ("fps", {"seed": 0, "fps": 0}),
        ("fps", {"seed": 0, "fps": 23.976}),
        ("size", {"seed": 0, "size": (241, 320)}),
        ("size", {"seed": 0, "size": (16, 32)}),
        ("size", {"seed": 0, "size": (32, 128)}),
        ("size", {"seed": 0, "size": (64, 64, 3)}),
    ],
)
def test_render_refuses_bad_arguments(name, arguments):
    with pytest.raises(ValueError, match=f"^{name} must [^\n]+$"):
        render(**arguments)


@pytest.mark.parametrize(
    ("name", "frames", "options"),
    [
        ("frames", [], {}),
        ("frames", [np.zeros((33, 32, 3), np.uint8)], {}),
        ("frames", [np.zeros((32, 32), np.uint8)], {}),
        ("frames", [np.zeros((32, 32, 3), np.uint8), np.zeros((64, 32, 3), np.uint8)], {}),
        ("fps", [np.zeros((32, 32, 3), np.uint8)], {"fps": 0}),
        ("crf", [np.zeros((32, 32, 3), np.uint8)], {"crf": 52}),
    ],
)
def test_write_video_refuses_bad_arguments(tmp_path, name, frames, options):
    with pytest.raises(ValueError, match=f"^{name} must [^\n]+$"):
        write_video(tmp_path / "clip.mp4", frames, **{"fps": FPS} | options)
    assert not list(tmp_path.iterdir())


def test_write_video_refuses_floats_and_unknown_codecs(tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "clip.mp4", [np.zeros((32, 32, 3))], FPS)
    with pytest.raises(ValueError, match="theora9"):
        write_video(tmp_path / "clip.mp4", [np.zeros((32, 32, 3), np.uint8)], FPS, codec="theora9")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "arguments"), [("count", {"count": 0}), ("seed", {"seed": -1})])
def test_generate_refuses_bad_arguments(tmp_path, name, arguments):
    with pytest.raises(ValueError, match=f"^{name} must"):
        generate(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_the_same_seed_makes_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    script = "import sys\nfrom longtake.infra.footage import generate\ngenerate(sys.argv[1], 2, seconds=3.0)"
    made = []
    # what an encoder finds in memory that it has not written differs from process to process
    for fill in ("1", "77", "200"):
        folder = tmp_path / fill
        command = [sys.executable, "-P", "-c", script, str(folder)]
        subprocess.run(command, check=True, env=os.environ | {"MALLOC_PERTURB_": fill})
        made.append([path.read_bytes() for path in sorted(folder.glob("*.mp4"))])
    assert made[0] == made[1] == made[2]
