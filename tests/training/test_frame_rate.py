"""The frame rate of a dataset, whatever shard its first clip is in."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from longtake.datasets import compact
from longtake.datasets.errors import UserError
from longtake.training import data


def test_a_first_shard_without_clips_is_passed_over(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, facts = compact.open_split(dataset, "train")

    # the same split behind a shard that has no clips
    behind = SimpleNamespace(counts=[0, *base.counts], row=lambda shard, number: base.row(shard - 1, number))
    monkeypatch.setattr(compact, "open_split", lambda *_: (behind, facts))
    assert data.frame_rate(dataset, 2) == base.row(0, 0)["fps"] > 0


def test_a_window_longer_than_all_clips_is_refused_with_the_remedy(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a window spans 1000 frames: cut longer clips"):
        data.frame_rate(dataset, 1000, "cut longer clips")
