"""What holds for every scorer of the pack: its values are those of the clip, whatever it has scored before."""

import numpy as np
import pytest
from scored import coded

from longtake.pipeline import scorers
from longtake.pipeline.scorers.scorer import Values
from longtake.pipeline.scoring import Clip, is_looker

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
    used = kind.load(config, "cpu", 1)
    order = (2, 1, 0)
    for number, again in zip(order, [values(used, each) for each in order], strict=True):
        fresh = values(kind.load(config, "cpu", 1), number)
        assert again == fresh, (number, again, fresh)
    assert {field.name for field in kind.fields(config)} == fresh.keys() - {"reason"}
