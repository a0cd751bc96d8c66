"""Broken and unusual files: what becomes of each class of them."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from longtake.datasets import clip
from longtake.pipeline.config import ClipConfig, CutConfig, LimitsConfig
from longtake.pipeline.isolate import Worker

CUT = CutConfig(clip=ClipConfig(short_side=64, fps=12), limits=LimitsConfig(timeout_seconds=120))

# The first class whose pattern is found in "file | note" says the outcome: good, or rejected with that reason; a
# part of the detail, which must be empty where nothing is said; size and frames of all clips at 12 fps, where it matters.
CLASSES: list[tuple[str, str, str, str, tuple[int, int] | None, int | None]] = [
    ("audio alone", r"\| audio only", "no_video", "no video stream", None, None),
    ("subtitles or other tracks alone", r"\| no video stream", "no_video", "no video stream", None, None),
    ("a container's head alone", r"header only", "no_video", "no video stream", None, None),
    ("no video at all", r"\| (unreadable|text file)", "unreadable", "Invalid data", None, None),
    ("cut short, index lost", r"truncated half no moov", "unreadable", "Invalid data", None, None),
    ("cut short, index kept", r"truncated half faststart", "good", "120 frames, 59 could be", (80, 64), 24),
    ("the last bytes lost", r"truncated last 1000 bytes", "good", "120 frames, 117 could be", (80, 64), 48),
    ("a hole in the data", r"zeroed span", "good", "120 frames, 38 could be", (80, 64), 15),
    ("a damaged stream", r"corrupted bitstream", "good", "50 frames, 28 could be", (112, 64), 34),
    ("a container that counts wrong", r"partially fragmented", "good", "4 frames, 30 could be", (112, 64), 12),
    ("a slow-motion edit list", r"Samsung SEF", "good", "64 frames, 63 could be", (80, 64), None),
    ("encrypted or undecodable", r"\| zero decodable frames", "no_frames", "no decodable frame", None, None),
    ("encrypted by its label only", r"clearkey", "good", "", (112, 64), 12),
    ("black", r"all black|1f\.mp4.*1 frame|testsrc2_mpeg4", "black", "frames are black", None, None),
    ("a still picture", r"png named|gradient\.gif", "too_short", "1 frames", None, None),
    (
        "smaller than the clips",
        r"(transparent|animated)\.gif|rotation_90|nclx_rgb",
        "too_small",
        "short_side",
        None,
        None,
    ),
    ("too long or too flat a shape", r"extreme aspect", "aspect", "96% would be cropped", None, None),
    ("few frames that last long", r"fixtures-test_video|test_13_frames|mmpose__demo", "good", "", (112, 64), None),
    (
        "a few frames",
        r"\| (only|two frames)|8k gray|odd_.*mpeg2|non-zero start",
        "too_short",
        "min_seconds",
        None,
        None,
    ),
    ("turned by 90 degrees", r"rotation -90", "good", "", (64, 112), None),
    ("turned by 180 degrees", r"rotated 180", "good", "", (80, 64), 48),
    ("a rate that varies", r"vfr random drop", "good", "", (80, 64), 45),
    ("a rate with holes", r"vfr with gaps", "good", "", (80, 64), 40),
    ("23.976 a second", r"23\.976fps", "good", "", (80, 64), 24),
    ("240 a second", r"240fps", "good", "", (80, 64), 24),
    ("times that start late", r"start time 3600s", "good", "", (80, 64), 48),
    ("interlaced", r"interlaced", "good", "", (80, 64), 36),
    ("high dynamic range", r"HDR|testsrc2_hdr", "good", "", (112, 64), None),
    ("10 bits, 4:4:4, grey, odd sizes", r"10.?bit|hi10|444|h264 gray|yuv420p 32", "good", "", None, None),
    ("AV1, VP8, VP9, HEVC, WMV, H.263", r"\| (av1|vp8|h265|wmv2|h263|test pattern vp9)", "good", "", None, None),
    ("a transparent picture", r"alpha webm", "good", "", (64, 64), 60),
    ("a bare stream", r"raw h264", "good", "", (80, 64), 15),
    ("a wrong suffix or container", r"named avi|bad container", "good", "", None, None),
    ("an awkward name", r"awkward|name with spaces", "good", "", (80, 64), None),
    ("tracks beside the video", r"\| (mkv|video-only|fragmented|mov container)", "good", "", (112, 64), None),
    ("an ordinary file", r"counter 462", "good", "", (112, 64), None),
]


@pytest.fixture(scope="module")
def outcomes(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """For each class its files and what came of them."""
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {name: [] for name, *_ in CLASSES}
    worker = Worker()
    for row in csv.DictReader((videos / "index.csv").open()):
        if row["kind"] == "odd":
            folder = tmp_path_factory.mktemp("out")
            result = worker.run(str(videos / row["file"]), "ab" * 10, str(folder), CUT, {})
            said = f"{row['file']} | {row['note']}"
            name = next((name for name, pattern, *_ in CLASSES if re.search(pattern, said)), None)
            assert name, f"{said}: of no class"
            found[name].append((row["file"], result | {"folder": folder}))
    worker.close()
    return found


@pytest.mark.parametrize(("name", "reason", "detail", "size", "frames"), [(n, *rest) for n, _, *rest in CLASSES])
def test_every_odd_file_has_its_outcome(
    outcomes: Any, name: str, reason: str, detail: str, size: tuple[int, int] | None, frames: int | None
) -> None:
    assert outcomes[name], "no file of this class"
    for file, result in outcomes[name]:
        account, clips = result["account"], result["clips"]
        assert (account["reason"] or account["status"]) == reason, file
        assert detail in (account["detail"] or "") and bool(detail) == bool(account["detail"]), file
        assert bool(clips) == (reason == "good")
        assert size is None or {(c["width"], c["height"]) for c in clips} == {size}, file
        assert frames is None or sum(c["frame_count"] for c in clips) == frames, file
        for made in clips:
            shown = clip.decode((result["folder"] / f"{made['key']}.mp4").read_bytes())
            assert shown.shape == (made["frame_count"], made["height"], made["width"], 3) and shown.std() > 2, file
