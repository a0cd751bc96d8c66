"""What holds for every scorer of the pack: its values are those of the clip, whatever it has scored before."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from scored import coded

from longtake.pipeline import scorers
from longtake.pipeline.score_shard import Clip, is_looker
from longtake.pipeline.scorers.scorer import Frames, Values
from longtake.pipeline.stages import score

FPS = 12.0


def clips() -> list[tuple[bytes, dict[str, object]]]:
    """A texture that drifts, in three shapes, with its row each."""
    rng, made = np.random.default_rng(0), []
    for n, (height, width) in enumerate([(96, 160), (144, 80), (32, 32)]):
        texture = rng.integers(40, 200, (height // 8 + 8, width // 8 + 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        frames = np.stack([texture[2 * t : 2 * t + height, t : t + width] for t in range(18)])
        row = {"key": f"clip-{n:05d}", "frame_count": 18, "fps": FPS, "height": height, "width": width}
        made.append((coded(frames, FPS), row))
    return made


CLIPS = clips()


def values(scorer: object, number: int) -> Values:
    mp4, row = CLIPS[number]
    clip = Clip(mp4, row, [scorer] if is_looker(scorer) else [], "clip")  # type: ignore[arg-type, list-item]
    if is_looker(scorer):  # type: ignore[arg-type]
        return scorer.look(clip.pictures()[0][None])[0]  # type: ignore[attr-defined, no-any-return]
    watch = scorer.begin(row)  # type: ignore[attr-defined]
    for piece in clip.pieces():
        watch.add(piece)
    return dict(watch.values())


@pytest.mark.parametrize("name", scorers.PACK)
def test_what_was_scored_before_changes_nothing(name: str) -> None:
    kind = scorers.load(name)
    config = kind.config()
    used = kind.load(config, "cpu")
    order = (2, 1, 0)
    for number, again in zip(order, [values(used, each) for each in order], strict=True):
        fresh = values(kind.load(config, "cpu"), number)
        assert again == fresh, (number, again, fresh)
    assert {field.name for field in kind.fields(config)} == fresh.keys() - {"reason"}


@pytest.mark.parametrize("name", ["motion", "cadence", "light", "focus", "coding", "bars", "overlay"])
def test_where_arrays_lie_in_memory_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # their last bits do change: those at the ends of an array that isn't aligned are worked out otherwise
    for function in ("magnitude", "phase", "cartToPolar", "polarToCart", "sqrt", "pow", "exp", "log"):
        monkeypatch.delattr(cv2, function)
    rng, kind = np.random.default_rng(0), scorers.load(name)
    planes = np.concatenate([rng.integers(16, 236, (12, 98, 160)), np.full((12, 49, 160), 128)], 1).astype(np.uint8)
    scorer, kept, known = kind.load(kind.config(), "cpu"), [], []
    for offset in (0, 1, 4, 16, 32, 48):
        room = np.empty(planes.nbytes + 128, np.uint8)
        start = -room.ctypes.data % 64 + offset
        shifted = room[start : start + planes.nbytes].reshape(planes.shape)
        shifted[:] = planes
        # holes of many sizes, for what the scorer makes itself
        kept.append([np.empty(int(size)) for size in rng.integers(1, 9000, 200)][::2])
        watch = scorer.begin(CLIPS[0][1])  # type: ignore[union-attr]
        watch.add(Frames(0, FPS, shifted))
        known.append(watch.values())
    assert known == known[:1] * len(known)


def test_a_worker_with_many_cpus_scores_on_one_thread(tmp_path: Path) -> None:
    config = score.Config(kind="score", dataset=str(tmp_path), scorers=dict.fromkeys(("motion", "overlay", "people")))
    asked = [
        (score._column(name, one, "").plain(), scorers.SCORERS[one.by], one.config.model_dump(mode="json"))
        for name, one in score._asked(config).items()
    ]
    cv2.setNumThreads(4)
    torch.set_num_threads(4)
    score._load("cpu", asked=asked, dataset=str(tmp_path))
    assert cv2.getNumThreads() == torch.get_num_threads() == 1
