"""Rows of sources on the local disk, in a file for each range of identities, so that each file is sorted in memory."""

import contextlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from longtake.datasets import schema

KNOWN = ("source", "uri", "split")  # columns of rows of earlier plans
_ROWS_AT_ONCE = 1 << 17


def ids_of(column: pa.ChunkedArray) -> np.ndarray:
    """A column of identities as (N,) bytes."""
    texts = column.combine_chunks().cast(pa.binary()).cast(pa.binary(20))
    return np.frombuffer(texts.buffers()[1], "S20", len(texts), texts.offset * 20)


def is_first(ordered: np.ndarray) -> np.ndarray:
    """(N,) bool: a value is the first, or another than the one before."""
    return np.append(True, ordered[1:] != ordered[:-1])


def shares(ids: np.ndarray) -> np.ndarray:
    """(N,) in [0, 1) from the last digits of each identity, which do not depend on its place in the order."""
    digits = np.ascontiguousarray(ids).view("u1").reshape(len(ids), 20)[:, -8:].tobytes()
    return np.frombuffer(bytes.fromhex(digits.decode()), ">u4") / 2.0**32


class Buckets:
    """Rows on the local disk in a file for each two first digits of identities, so that each file is sorted in memory."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder, self._files, self._tables = folder, contextlib.ExitStack(), list[pa.Table]()
        self._writers: dict[str, pa.ipc.RecordBatchStreamWriter] = {}
        self.names: set[str] = set()
        self.count = 0
        self.first, self._last, self._shares = "g", "", (1.0, 0.0)

    def add(self, table: pa.Table) -> None:
        if not len(table):
            # of sources that are known, none may have been read
            return
        self._tables.append(table)
        self.count += len(table)
        if sum(map(len, self._tables)) >= _ROWS_AT_ONCE:
            self._spill()

    def _spill(self) -> None:
        table = pa.concat_tables(self._tables)
        ids = ids_of(table["source"])
        self._tables.clear()
        order = np.argsort(ids, kind="stable")
        table, ids = table.take(pa.array(order)).combine_chunks(), ids[order]
        own = shares(ids)
        self.first, self._last = min(self.first, ids[0].decode()), max(self._last, ids[-1].decode())
        self._shares = min(self._shares[0], float(own.min())), max(self._shares[1], float(own.max()))
        prefixes = ids.astype("S2")
        starts = np.flatnonzero(is_first(prefixes))
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(ids)], strict=True):
            name = prefixes[start].decode()
            if name not in self.names:
                self.names.add(name)
                file = self._files.enter_context((self._folder / name).open("wb"))
                self._writers[name] = self._files.enter_context(pa.ipc.new_stream(file, table.schema))
            self._writers[name].write_table(table.slice(start, end - start))

    def close(self) -> None:
        if self._tables:
            self._spill()
        self._files.close()

    def read(self, name: str) -> pa.Table:
        if name not in self.names:
            return schema.PLAN.empty_table().select(KNOWN)
        with (self._folder / name).open("rb") as f:
            return pa.ipc.open_stream(f).read_all()

    def one_sided(self, val_fraction: float) -> bool:
        """Whether all of several sources would fall into one split."""
        low, high = self._shares
        return 0 < val_fraction < 1 and self.first != self._last and (low < val_fraction) == (high < val_fraction)
