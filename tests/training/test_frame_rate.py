"""The frame rate of a dataset, whatever shard its first clip is in."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longtake.datasets import compact
from longtake.datasets.errors import UserError
from longtake.training import data


def test_a_first_shard_without_clips_is_passed_over(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, facts = compact.open_split(dataset, "train")

    class Behind(SimpleNamespace):
        """The same split behind a shard that has no clips."""

        counts = [0, *base.counts]

        def row(self, shard: int, number: int) -> Any:
            return base.row(shard - 1, number)

    monkeypatch.setattr(compact, "open_split", lambda *_: (Behind(), facts))
    assert data.frame_rate(dataset, 2) == base.row(0, 0)["fps"] > 0


def test_a_window_longer_than_all_clips_is_refused_with_the_remedy(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a window spans 1000 frames: cut longer clips"):
        data.frame_rate(dataset, 1000, "cut longer clips")
