"""Token states in batches: which of them, their padding and mask, and that they are those of the caption beside them."""

import shutil
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spoken
import torch
from spoken import COLUMN, TEXT, Counting, describe

from longtake.datasets import compact, index, schema, storage
from longtake.datasets.captions import Caption
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.loader import Loader
from longtake.datasets.loader.batches import padded
from longtake.datasets.loader.streams import Lengths

WINDOW: dict[str, Any] = {"frames": 5, "size": (16, 16), "batch": 4, "epochs": 2}


@pytest.fixture
def root(small: str, tmp_path: Path) -> str:
    """A dataset in which a clip has none, one, two or three captions, some of a part of it, with their states."""
    root = str(shutil.copytree(small, tmp_path / "dataset"))
    kinds: list[Callable[[str], list[Caption]]] = [
        lambda key: [],
        lambda key: [Caption(f"{key} alone")],
        lambda key: [Caption(f"{key} starts", 0.0, 0.3), Caption(f"{key} goes on and on", 0.3, None)],
        lambda key: [Caption(""), Caption(f"{key}"), Caption(f"{key} has more words than are kept by far")],
    ]
    describe(root, {key: kinds[n % 4](key) for n, key in enumerate(spoken.keys(root))})
    spoken.encode(root, Counting())
    return root


def test_the_states_are_those_of_the_caption_beside_them_padded_with_zeros(root: str) -> None:
    encoder, seen = Counting(), Counter[str]()
    for batch in Loader(root, columns=(TEXT, COLUMN), **WINDOW):
        text, mask = batch["text"], batch["text_mask"]
        lengths = mask.sum(1)
        assert text.dtype == torch.bfloat16 and mask.dtype == torch.bool
        assert text.shape == (4, max(1, int(lengths.max())), 8) and mask.shape == text.shape[:2]
        for states, true, caption in zip(text, mask, batch["caption"], strict=True):
            expected = torch.zeros(0, 8) if caption is None else encoder.states(caption)
            assert torch.equal(states[true], expected.to(torch.bfloat16))
            # true ones first, zeros behind them
            assert torch.equal(true, torch.arange(len(true)) < len(expected))
            assert not states[~true].any()
            seen[caption if caption is None else " ".join(caption.split()[1:])] += 1
    assert {None, "alone", "starts", "goes on and on", ""} <= seen.keys()  # type: ignore[comparison-overlap]


def test_one_column_alone_draws_the_same_and_windows_are_those_without_text(root: str) -> None:
    both = list(Loader(root, columns=("video", COLUMN, TEXT), **WINDOW))
    texts, captions = (list(Loader(root, columns=(column,), **WINDOW)) for column in (TEXT, COLUMN))
    videos = list(Loader(root, columns=("video",), **WINDOW))
    for one, text, caption, video in zip(both, texts, captions, videos, strict=True):
        assert one["caption"] == caption["caption"] and one["key"] == text["key"]
        assert torch.equal(one["text"], text["text"]) and torch.equal(one["text_mask"], text["text_mask"])
        assert torch.equal(one["video"], video["video"])


def test_batches_are_the_same_whoever_makes_them_and_after_a_stop(root: str) -> None:
    options = {**WINDOW, "columns": (TEXT,), "epochs": 3}
    expected = list(Loader(root, **options))
    stopped = Loader(root, **options)
    first = list(islice(stopped, 4))
    resumed = Loader(root, **options, workers=2)
    resumed.load_state_dict(stopped.state_dict())
    for one, other in zip(expected, [*first, *resumed], strict=True):
        assert torch.equal(one["text"], other["text"]) and torch.equal(one["text_mask"], other["text_mask"])
    halves = [list(Loader(root, **options, rank=rank, world=2)) for rank in range(2)]
    for whole, *parts in zip(expected, *halves, strict=True):
        keys = [key for part in parts for key in part["key"]]
        assert sorted(keys) == sorted(whole["key"])
        states = {key: p["text"][n][p["text_mask"][n]] for p in parts for n, key in enumerate(p["key"])}
        for n, key in enumerate(whole["key"]):
            assert torch.equal(whole["text"][n][whole["text_mask"][n]], states[key])


def test_a_sample_has_the_same_chances_on_any_rank_and_others_in_the_next_epoch(root: str) -> None:
    def chances(**share: int) -> dict[tuple[int, str], list[float]]:
        batches = Loader(root, columns=(TEXT,), **WINDOW, **share)
        return {
            (batch["epoch"], key): own
            for batch in batches
            for key, own in zip(batch["key"], batch["chances"].tolist(), strict=True)
        }

    alone = chances()
    assert chances(rank=0, world=2) | chances(rank=1, world=2) == alone
    assert len({tuple(own) for own in alone.values()}) == len(alone), "every draw is of its own"
    assert "chances" not in next(iter(Loader(root, columns=("video",), **WINDOW)))


def test_states_come_with_histories_of_latents(root: str) -> None:
    encoder = Counting()
    options = WINDOW | {"columns": ("latent-test", COLUMN, TEXT), "histories": Lengths((0, 1), 1)}
    for batch in Loader(root, **options):
        for states, true, caption in zip(batch["text"], batch["text_mask"], batch["caption"], strict=True):
            expected = torch.zeros(0, 8, dtype=torch.bfloat16) if caption is None else encoder.states(caption)
            assert torch.equal(states[true], expected)


def test_several_columns_have_the_names_that_they_are_given(root: str) -> None:
    class Wide(Counting):
        width = 12

    spoken.encode(root, Wide(), column="text-ffff")
    batch = next(iter(Loader(root, columns={"text": TEXT, "pooled": "text-ffff"}, **WINDOW)))
    assert batch["text"].shape[2] == 8 and batch["pooled"].shape[2] == 12
    assert torch.equal(batch["text_mask"], batch["pooled_mask"])
    with pytest.raises(UserError, match="need names"):
        Loader(root, columns=(TEXT, "text-ffff"), **WINDOW)


def test_the_compact_index_gives_the_same(root: str) -> None:
    expected = list(Loader(root, columns=(TEXT,), **WINDOW))
    for column in (None, TEXT):
        compact.write(root, "train", column)
    for one, other in zip(expected, Loader(root, columns=(TEXT,), **WINDOW), strict=True):
        assert torch.equal(one["text"], other["text"])


def test_clips_without_captions_alone_have_no_true_token(root: str) -> None:
    describe(root, lambda key: None)
    spoken.encode(root, Counting())
    for batch in Loader(root, columns=(TEXT,), **WINDOW):
        assert batch["text"].shape == (4, 1, 8) and not batch["text_mask"].any()


def test_a_clip_that_the_view_of_the_texts_left_out_is_named(root: str, tmp_path: Path) -> None:
    keys = spoken.keys(root)
    rows = [
        {"key": key, "split": "train", "keep": n != 3, "reason": None if n != 3 else "x < 1", "weight": 1.0}
        for n, key in enumerate(keys)
    ]
    kept = str(tmp_path / "views" / "v.parquet")
    storage.write(kept, index.to_parquet(index.rows_table(rows, schema.VIEW)))
    encoder = Counting()
    spoken.encode(root, encoder, kept=kept, column="text-beef")
    assert encoder.seen and not any(keys[3] in text for text in encoder.seen)
    assert sum(len(batch["key"]) for batch in Loader(root, view=kept, columns=("text-beef",), **WINDOW)) == 2 * 16
    with pytest.raises(Failure, match=f"{keys[3]}: its view left this clip out"):
        list(Loader(root, columns=("text-beef",), **WINDOW))


def test_damaged_states_and_texts_of_other_captions_are_one_line(root: str) -> None:
    with pytest.raises(UserError, match=f"columns: {TEXT} is of {COLUMN}, not of caption-other; name that one"):
        describe(root, lambda key: None, "caption-other")
        Loader(root, columns=(TEXT, "caption-other"), **WINDOW)
    with pytest.raises(Failure, match="20 clips have no text-none"):
        Loader(root, columns=("text-none",), **WINDOW)
    for tar in Path(root, "train").glob(f"*.{TEXT}.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    with pytest.raises(Failure, match="are damaged; run `longtake dataset verify`"):
        list(Loader(root, columns=(TEXT,), **WINDOW))


@pytest.mark.parametrize("lengths", [[0, 0], [1], [3, 0, 5], [2, 2]])
def test_padding_keeps_every_state(lengths: list[int]) -> None:
    rng = np.random.default_rng(0)
    states = [rng.integers(0, 1 << 15, (length, 3), np.uint16) for length in lengths]
    text, mask = padded(states)
    assert text.shape == (len(lengths), max(1, *lengths), 3) and mask.sum(1).tolist() == lengths
    for one, found, true in zip(states, text, mask, strict=True):
        assert np.array_equal(found[true].view(torch.uint16).numpy(), one)
        assert not found[~true].any()
