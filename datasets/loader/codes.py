"""Latents and tokens: the items of a clip's .npy, each with its own checksum, of which a window is one range of bytes.

What a window needs of an index is made ready once a shard, with the checks of its rows, so that a sample costs little more
than its bytes.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from isal import isal_zlib

from longtake.datasets.compact import Rows
from longtake.datasets.errors import Failure
from longtake.datasets.loader.reader import Reader


@dataclass(frozen=True)
class Items:
    """The items of the clips of one shard of a column. Lists, since they are read one value at a time."""

    of_base: Sequence[bool]  # whether a row is of the same clip as the base's
    begins: Sequence[int]  # the byte of the tar at which a clip's first item begins
    counts: Sequence[int]
    shapes: Sequence[tuple[int, ...]]  # of an item
    dtypes: Sequence[str]  # numpy's names
    sums: Sequence[bytes]  # CRC-32 of each item, as little-endian uint32
    units: Sequence[int]  # frames from an item to the next
    before: Sequence[int]  # items that a clip's stream has before its own


def latents_of(rows: Rows, shard: int, base: pa.Table) -> Items:
    """The latents of a shard: an item is (2, C, h, w) float16, or uint16 of bfloat16's bits."""
    table = rows.of(shard)
    dtype = table["dtype"].to_pylist() if "dtype" in table.column_names else [None] * len(table)
    dtypes = ["<u2" if name == "bfloat16" else "<f2" for name in dtype]
    sides = [table[name].to_pylist() for name in ("channels", "height", "width")]
    return _items(table, base, "step", [(2, *shape) for shape in zip(*sides, strict=True)], dtypes, "factor")


def tokens_of(rows: Rows, shard: int, base: pa.Table) -> Items:
    """The windows of tokens of a shard: an item is (t, h, w) ids."""
    table = rows.of(shard)
    sides = [table[name].to_pylist() for name in ("steps", "height", "width")]
    dtypes = [f"<{np.dtype(name).str[1:]}" for name in table["dtype"].to_pylist()]
    return _items(table, base, "window", list(zip(*sides, strict=True)), dtypes, "hop")


def _items(
    table: pa.Table, base: pa.Table, item: str, shapes: list[tuple[int, ...]], dtypes: list[str], unit: str
) -> Items:
    same = pc.and_(pc.equal(table["key"], base["key"]), pc.equal(table["base_sha256"], base["sha256"]))
    counts = np.array(table[f"{item}s"].to_pylist(), np.int64)
    sizes = np.array([np.dtype(d).itemsize * int(np.prod(s)) for s, d in zip(shapes, dtypes, strict=True)], np.int64)
    ends = np.array(table["offset"].to_pylist(), np.int64) + np.array(table["size"].to_pylist(), np.int64)
    return Items(
        pc.fill_null(same, False).to_pylist(),
        (ends - counts * sizes).tolist(),
        counts.tolist(),
        shapes,
        dtypes,
        table[f"{item}_crc32"].to_pylist(),
        table[unit].to_pylist(),
        [step or 0 for step in table["stream_step"].to_pylist()]
        if "stream_step" in table.column_names
        else [0] * len(table),
    )


def read(
    reader: Reader,
    rows: Rows,
    shard: int,
    items: Items,
    number: int,
    first: int,
    count: int,
    data: memoryview,
    what: str,
) -> None:
    """Fill `data`, bytes, with `count` items from `first` on of clip `number`; only these bytes are read.

    Raises:
        Failure: they are missing, or have other checksums.
    """
    total, size = len(data), len(data) // count
    data[:] = reader.range(rows, shard, items.begins[number] + first * size, total)
    # of the copy, so that the way into memory is checked too
    sums = [isal_zlib.crc32(data[start : start + size]) for start in range(0, total, size)]
    if struct.pack(f"<{count}I", *sums) != items.sums[number][4 * first : 4 * (first + count)]:
        url, key = rows.tar(shard)[0], rows.row(shard, number)["key"]
        raise Failure(f"{url}: {key}: {what}s {first} to {first + count} are damaged; run `longtake dataset verify`")
