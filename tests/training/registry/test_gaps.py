"""A served infiller: rows that come as a table, as lists over HTTP or as records, and what is refused in one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from longtake.datasets.errors import UserError
from longtake.training.models.generator import Gap, InfillSettings
from longtake.training.registry.gaps import serve_gaps

SIZE = (4, 6)


class Grey:
    """An infiller whose frames are as bright as the last one before the gap, and the seed."""

    fps, size, settings, context, factor, longest = 8.0, SIZE, InfillSettings(steps=2), (2, 3), 2, 8

    def __init__(self, takes_prompts: bool = False) -> None:
        self.takes_prompts = takes_prompts
        self.calls: list[tuple[Gap, InfillSettings, str | None]] = []

    def check_prompts(self, prompts: Sequence[str]) -> None:
        if "" in prompts:
            raise UserError("prompt '': is empty")

    def fill(
        self, gaps: Sequence[Gap], seed: int, settings: InfillSettings, *, negative: str | None = None, **_: Any
    ) -> Iterator[np.ndarray]:
        (gap,) = gaps
        if gap.frames % 2:
            raise ValueError("frames is odd")
        self.calls.append((gap, settings, negative))
        return iter([np.full((gap.frames, *SIZE, 3), gap.before[-1, 0, 0, 0] + seed, np.uint8)])

    def forget(self, folder: str) -> None:
        raise AssertionError("nothing is kept")


def clip(frames: int, level: int = 0) -> np.ndarray:
    return np.stack([np.full((*SIZE, 3), level + n, np.uint8) for n in range(frames)])


def row(**changes: Any) -> dict[str, Any]:
    return {"before": clip(3), "after": clip(3, 50), "frames": 4, "seed": 7} | changes


def columns(*rows: dict[str, Any]) -> dict[str, Any]:
    return {name: [each[name] for each in rows] for name in rows[0]}


def test_a_table_lists_and_records_are_answered_alike() -> None:
    import pandas

    rows = [row(), row(before=clip(2, 100), seed=1)]
    bare = [{name: value.tolist() if name in ("before", "after") else value for name, value in r.items()} for r in rows]
    for table in (pandas.DataFrame(rows), columns(*rows), columns(*bare), rows, bare):
        made = serve_gaps(Grey(), table)
        assert made.shape == (2, 4, *SIZE, 3) and made.dtype == np.uint8
        assert (made[0] == 2 + 7).all() and (made[1] == 101 + 1).all()


def test_what_a_call_says_reaches_the_model() -> None:
    grey = Grey(takes_prompts=True)
    rows = [row(prompt="a dog", negative="a cat"), row(prompt=float("nan"), negative=None)]
    serve_gaps(grey, rows, {"guidance": 4.0, "mixer": "paper", "cutoff": 0.4, "noise": None})
    expected = replace(grey.settings, guidance=4.0, mixer="paper", cutoff=0.4)
    assert [(gap.prompt, negative) for gap, _, negative in grey.calls] == [("a dog", "a cat"), (None, None)]
    assert all(settings == expected for _, settings, _ in grey.calls)
    np.testing.assert_array_equal(grey.calls[0][0].after, clip(3, 50))


@pytest.mark.parametrize(
    ("table", "params", "said"),
    [
        ({"seed": [1]}, {}, "need columns before, after, frames, seed, and if wanted prompt, negative; got seed"),
        ([row() | {"colour": 1}], {}, "got before, after, frames, seed, colour"),
        ([], {}, "need columns before, after, frames, seed, and if wanted prompt, negative; got none"),
        (columns(row()) | {"seed": []}, {}, "columns of the same length"),
        (clip(3), {}, "need a table, or a list of rows, got ndarray"),
        ([[1]], {}, "need a table, or a list of rows, got list"),
        ([row(), {"seed": 1}], {}, "frames must be a whole number, got None"),
        ([row(), row(frames=2)], {}, r"frames must be the same in every row, got \[2, 4\]"),
        ([row(frames=3)], {}, "videos: frames is odd"),
        ([row(frames=1.5)], {}, "frames must be a whole number, got 1.5"),
        ([row(frames=float("inf"))], {}, "frames must be a whole number, got inf"),
        (row(), {}, "a column must be a list, with a value for each row"),
        ([row()], {"steps": 0}, "params: steps: 0 is no whole number above 0"),
        ([row()], {"steps": 2.5}, "params: steps: 2.5 is no whole number"),
        ([row()], {"shift": 0.0}, "params: shift: must be above 0"),
        ([row()], {"guidance": float("nan")}, "params: guidance: nan is no number"),
        ([row()], {"image_guidance": -5.0}, "params: image_guidance: -5.0 is no number from 0 on"),
        ([row()], {"cutoff": "x", "mixer": "paper"}, "params: cutoff: 'x' is no number"),
        ([row(seed=-1)], {}, "seed must not be negative"),
        ([row(before=None)], {}, r"before must be a uint8 video \(t, H, W, 3\), got NoneType"),
        ([row(after=clip(3)[0])], {}, r"after must be a uint8 video \(t, H, W, 3\), got uint8 \(4, 6, 3\)"),
        ([row(after=clip(3).astype(float))], {}, r"after must be .*, got float64 \(3, 4, 6, 3\)"),
        ([row(after=[[1], [1, 2]])], {}, "after must be .*, got list"),
        ([row(after=(clip(3).astype(int) + 254).tolist())], {}, r"after must be .*, got int64 \(3, 4, 6, 3\)"),
        ([row(prompt="x")], {}, "prompt: this model takes none"),
        ([row(negative=7)], {}, "negative must be a text, got 7"),
        ([row()], {"speed": 2}, "params: unknown speed; there are steps, shift, guidance"),
        ([row()], {"cutoff": 0.4}, "params: cutoff: is of a mixer, and there is none"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(table: Any, params: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as e:
        serve_gaps(Grey(), table, params)
    assert "\n" not in str(e.value)


def test_texts_are_checked_before_anything_is_made() -> None:
    grey = Grey(takes_prompts=True)
    with pytest.raises(UserError, match="negative: guidance leads away from it, and is 1; set guidance above 1"):
        serve_gaps(grey, [row(negative="a cat")])
    with pytest.raises(UserError, match="prompt '': is empty"):
        serve_gaps(grey, [row(), row(prompt="")])
    with pytest.raises(UserError, match="frames is odd"):
        serve_gaps(grey, [row(frames=3)])
    assert not grey.calls
