"""Whatever happens to the bytes on disk: what is read is what was written, or the error is ours."""

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from longtake.datasets import clip, index, schema, verify
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.loader import Loader

OURS = (Failure, UserError)
FILES = [f"{n}{c}.{e}" for n in ("00000", "00001") for c in ("", ".frame_diff") for e in ("tar", "parquet")]
TARS = [f"{n}{c}" for n in ("00000", "00001") for c in ("", ".frame_diff")]

_place = st.floats(0, 1, exclude_max=True)
_some_bytes = st.binary(min_size=1, max_size=600)
mutations = st.one_of(
    st.tuples(st.just("flip"), _place, st.integers(0, 7)),
    st.tuples(st.just("truncate"), _place, st.none()),
    st.tuples(st.just("append"), st.just(0.0), _some_bytes),
    st.tuples(st.just("insert"), _place, _some_bytes),
    st.tuples(st.just("overwrite"), _place, _some_bytes),
    st.tuples(st.just("zero"), _place, st.integers(1, 5000)),
    st.tuples(st.just("splice"), _place, _place),
    st.tuples(st.just("replace"), st.just(0.0), st.binary(max_size=600)),
    st.tuples(st.just("swap"), st.just(0.0), st.sampled_from(FILES)),
    st.tuples(st.just("remove"), st.just(0.0), st.none()),
)
fuzz = functools.partial(settings, deadline=None, suppress_health_check=list(HealthCheck))


def mutate(root: Path, file: str, mutation: tuple[str, float, Any]) -> bool:
    """Change one file of a dataset; whether its bytes are others now."""
    kind, place, what = mutation
    path = root / file
    swapped = next(root.glob(f"*/{what}")).read_bytes() if kind == "swap" else b""
    data = path.read_bytes()
    at = int(place * len(data))
    changed = {
        "flip": lambda: data[:at] + bytes([data[at] ^ 1 << what]) + data[at + 1 :],
        "truncate": lambda: data[:at],
        "append": lambda: data + what,
        "insert": lambda: data[:at] + what + data[at:],
        "overwrite": lambda: (data[:at] + what + data[at + len(what) :])[: len(data)],
        "zero": lambda: (data[:at] + bytes(what) + data[at + what :])[: len(data)],
        "splice": lambda: data[:at] + data[int(what * len(data)) :],
        "replace": lambda: what,
        "swap": lambda: swapped,
        "remove": lambda: None,
    }[kind]()
    path.unlink()
    if changed is not None:
        path.write_bytes(changed)
    return changed != data


def batches(dataset: str, split: str) -> list[dict[str, Any]]:
    columns = ("video", "frame_diff", "json")
    return list(Loader(dataset, split, columns=columns, frames=2, size=(32, 32), batch=1, epochs=1, shuffle=False))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[c] == other[c] for c in ("key", "json")) and all(
        (one[c] == other[c]).all() for c in ("video", "frame_diff")
    )


class Truth:
    """What the whole dataset reads as; a class, for hypothesis prints arguments in full."""

    def __init__(self, dataset: str) -> None:
        self.split = max(schema.SPLITS, key=lambda split: len(index.shard_names(dataset, split)))
        self.tables = {c: [s.table for s in index.read_shards(dataset, self.split, c)] for c in (None, "frame_diff")}
        self.batches = batches(dataset, self.split)


@pytest.fixture(scope="module")
def truth(dataset: str) -> Truth:
    return Truth(dataset)


@fuzz(max_examples=150)
@given(st.sampled_from(FILES), mutations)
@example("00000.parquet", ("swap", 0.0, "00001.parquet"))
@example("00000.parquet", ("swap", 0.0, "00000.frame_diff.parquet"))
def test_indexes_and_verify(dataset: str, truth: Truth, file: str, mutation: tuple[str, float, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "dataset"
        shutil.copytree(dataset, root)
        file = f"{truth.split}/{file}"
        changed = mutate(root, file, mutation)
        whole = True
        for column, tables in truth.tables.items():
            try:
                read = [s.table for s in index.read_shards(str(root), truth.split, column)]
                # a removed index is a shard that was never committed: the next `shard` makes it again
                assert read == tables or (mutation[0] == "remove" and len(read) == len(tables) - 1)
            except OURS as e:
                whole = False
                assert file in str(e)
        found = [line for tar in TARS for line in verify.problems(str(root), (truth.split, tar))]
        found += verify.layout_problems(str(root))
        assert all("; " in line and "\n" not in line for line in found), found
        assert whole or found
        if changed and file.endswith(".tar"):
            assert any(file in line for line in found), "a changed tar goes unnoticed"
        if not changed:
            assert not found


@fuzz(max_examples=60)
@given(st.sampled_from(FILES), mutations)
@example("00000.tar", ("swap", 0.0, "00001.tar"))
@example("00000.frame_diff.tar", ("truncate", 0.0, None))
def test_loader(dataset: str, truth: Truth, file: str, mutation: tuple[str, float, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "dataset"
        shutil.copytree(dataset, root)
        mutate(root, f"{truth.split}/{file}", mutation)
        try:
            read = batches(str(root), truth.split)
        except OURS:
            return
        kept = truth.batches
        if mutation[0] == "remove" and file in ("00000.parquet", "00001.parquet"):
            keys = set(index.read_all(str(root), truth.split)["key"].to_pylist())
            kept = [b for b in kept if b["key"][0] in keys]
        assert len(read) == len(kept) and all(map(same, read, kept))


@pytest.mark.parametrize("column", ["", ".frame_diff"])
def test_a_flipped_bit_never_gives_other_pixels(dataset: str, truth: Truth, tmp_path: Path, column: str) -> None:
    root = Path(shutil.copytree(dataset, tmp_path / "dataset"))
    row = truth.tables["frame_diff" if column else None][0].to_pylist()[0]
    offset, size = (row["offset"], row["size"]) if column else (row["mp4_offset"], row["mp4_size"])
    tar = root / truth.split / f"00000{column}.tar"
    whole = tar.read_bytes()
    for at in range(offset, offset + size, size // 40):
        tar.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(Failure, match="are damaged"):
            batches(str(root), truth.split)


@fuzz(max_examples=100)
@given(st.sampled_from(["", ".frame_diff"]), st.lists(st.tuples(_place, st.integers(0, 255)), min_size=1), _place)
@example(".frame_diff", [(0.0, 0x28)], 0.0)
def test_decoding_what_no_digest_has_checked(
    dataset: str, truth: Truth, column: str, bytes_at: list[tuple[float, int]], cut: float
) -> None:
    row = truth.tables["frame_diff" if column else None][0].to_pylist()[0]
    offset, size = (row["offset"], row["size"]) if column else (row["mp4_offset"], row["mp4_size"])
    data = bytearray(Path(dataset, truth.split, f"00000{column}.tar").read_bytes()[offset : offset + size])
    for place, value in bytes_at:
        data[int(place * size)] = value
    data = data[: size - int(cut * size) // 8]
    try:
        array = clip.unpack_array(bytes(data), max_bytes=1 << 24) if column else clip.decode(bytes(data))
    except OURS:
        return
    assert isinstance(array, np.ndarray)


@fuzz(max_examples=40)
@given(st.dictionaries(st.sampled_from(["sources/train-00000.parquet", "plan/00000.parquet"]), mutations, min_size=1))
def test_verify_of_damaged_accounts(dataset: str, damage: dict[str, tuple[str, float, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "dataset"
        shutil.copytree(dataset, root)
        for file, mutation in damage.items():
            mutate(root, file, mutation)
        assert all("; " in line for line in verify.verify(str(root), threads=2))
