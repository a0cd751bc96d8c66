"""The column of captions in batches: one of those about the window, the same for any number of ranks and workers."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.datasets import captions, compact, index, schema
from longtake.datasets.captions import Caption
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.loader import Loader
from longtake.datasets.loader.captions import Place, drawn, place
from longtake.datasets.loader.streams import Lengths

COLUMN, LATENT = "caption-test", "latent-test"
WINDOW: dict[str, Any] = {"frames": 5, "size": (16, 16), "batch": 2}


def captioned(root: str, of: Callable[[dict[str, Any]], Sequence[Caption]], column: str = COLUMN) -> str:
    for base in index.read_shards(root, "train"):
        rows = [captions.row_of(row, of(row), "not_annotated", "") for row in base.table.to_pylist()]
        index.write_table(f"{root}/train/{base.name}.{column}.parquet", rows, schema.CAPTION_INDEX)
    return root


def several(row: dict[str, Any]) -> list[Caption]:
    """For clips of a second: none; or one of the whole, and one of each half."""
    if int(row["source"][-3:]) % 4 == 3:
        return []
    return [Caption(f"{row['key']} {name}", *span) for name, span in
            (("whole", (None, None)), ("first", (None, 0.5)), ("second", (0.5, 1.0)))]  # fmt: skip


@pytest.fixture
def root(handmade: Callable[..., str], tmp_path: Path) -> str:
    return captioned(handmade(tmp_path / "d", [[{}] * 4] * 3, columns=(LATENT,)), several)


def test_a_caption_is_one_of_those_about_the_window_and_all_come(root: str) -> None:
    seen, without = Counter[str](), 0
    for batch in Loader(root, columns=("video", COLUMN), epochs=40, **WINDOW):
        assert len(batch["caption"]) == len(batch["video"])
        for key, text, start in zip(batch["key"], batch["caption"], batch["start"].tolist(), strict=True):
            if text is None:
                without += int(key[5:8]) % 4 == 3
                assert int(key[5:8]) % 4 == 3
                continue
            of, which = text.split()
            assert of == key
            # five of twelve frames a second
            assert which != "first" or start / 12 < 0.5
            assert which != "second" or (start + 5) / 12 > 0.5
            seen[which] += 1
    assert without == 3 * 40 and min(seen.values()) > 40 and seen["whole"] == max(seen.values())


def test_captions_are_the_same_for_any_workers_and_ranks_and_change_no_window(root: str) -> None:
    def batches(columns: Any = (LATENT, COLUMN), **changed: Any) -> list[dict[str, Any]]:
        return list(Loader(root, columns=columns, epochs=2, **WINDOW | {"batch": 4} | changed))

    alone = batches()
    for plain, with_captions in zip(batches((LATENT,)), alone, strict=True):
        assert plain["key"] == with_captions["key"] and plain["start"].equal(with_captions["start"])
    texts = [batch["caption"] for batch in alone]
    assert [batch["caption"] for batch in batches(workers=2)] == texts
    halves = [batches(rank=rank, world=2) for rank in range(2)]
    assert [sorted(map(str, a["caption"] + b["caption"])) for a, b in zip(*halves, strict=True)] == [
        sorted(map(str, text)) for text in texts
    ]
    compact.write(root, "train", COLUMN)
    assert [batch["caption"] for batch in batches()] == texts


def test_without_shuffle_it_is_the_first_about_the_window(root: str) -> None:
    for batch in Loader(root, columns=(COLUMN,), shuffle=False, epochs=1, **WINDOW):
        for key, text in zip(batch["key"], batch["caption"], strict=True):
            assert text == (None if int(key[5:8]) % 4 == 3 else f"{key} whole")


def test_two_columns_of_captions_have_names_and_give_the_same_of_one_list(root: str) -> None:
    captioned(root, lambda row: [c._replace(text=c.text.upper()) for c in several(row)], "caption-other")
    names = {"caption": COLUMN, "loud": "caption-other"}
    for batch in Loader(root, columns=names, epochs=3, **WINDOW):
        assert [text and text.upper() for text in batch["caption"]] == batch["loud"]
    with pytest.raises(UserError, match="caption-test and caption-other need names"):
        Loader(root, columns=(COLUMN, "caption-other"), **WINDOW)


def test_a_stream_gives_captions_of_the_clip_that_has_most_of_the_window() -> None:
    clips = [(0, {"frame_count": 12, "fps": 12.0}), (1, {"frame_count": 12, "fps": 12.0})]
    assert place(clips, 0, 12, None) == Place(0, 0.0, 1.0, None)
    assert place(clips, 9, 18, 0.5) == Place(1, 0.0, 0.5, 0.5)
    assert place(clips, 3, 18, 0.5) == Place(0, 0.25, 1.0, 0.5)


def test_captions_come_with_histories_of_latents(root: str) -> None:
    lengths = Lengths((0, 1), 1)
    loader = Loader(root, columns=(LATENT, COLUMN), histories=lengths, epochs=2, **WINDOW)
    for batch in loader:
        for key, text in zip(batch["key"], batch["caption"], strict=True):
            assert text is None or text.startswith(key)


@given(
    st.lists(st.tuples(st.none() | st.floats(0, 5), st.none() | st.floats(5, 9)), max_size=4),
    st.floats(0, 8), st.floats(0.1, 4), st.none() | st.floats(0, 1, exclude_max=True),
)  # fmt: skip
def test_a_draw_is_about_the_window(
    spans: list[tuple[float | None, float | None]], start: float, length: float, chance: float | None
) -> None:
    rows = [{"start": a, "end": b} for a, b in spans]
    where = Place(0, start, start + length, chance)
    about = [n for n, (a, b) in enumerate(spans) if (a or 0) < start + length and (b is None or b > start)]
    found = drawn(rows, where)
    assert (found is None) == (not about) and (found is None or found in about)
    assert chance is not None or found is None or found == about[0]


def test_what_does_not_fit_is_said(root: str) -> None:
    with pytest.raises(Failure, match="12 clips have no caption-none"):
        Loader(root, columns=("caption-none",), **WINDOW)
    base = index.read_shard(root, "train", "00001").table.to_pylist()
    rows = [captions.row_of(row | {"sha256": "other"}, [], "not_annotated", "") for row in base]
    index.write_table(f"{root}/train/00001.{COLUMN}.parquet", rows, schema.CAPTION_INDEX)
    with pytest.raises(Failure, match="made from other clips"):
        list(Loader(root, columns=(COLUMN,), epochs=1, **WINDOW))
