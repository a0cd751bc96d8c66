"""Clips in the order of their likeness to a clip or a text, by the vectors of a column."""

from collections.abc import Mapping
from threading import Lock

import numpy as np

from longtake.datasets import alike, clusters
from longtake.datasets.errors import UserError
from longtake.datasets.scores import Column, Field
from longtake.infra.browse.columns import Shown

_MOST_BYTES = 4 << 30  # of vectors in memory; larger columns are searched on disk
_FOUND = 1000  # clips that a search on disk finds
_BLOCK = 1 << 14


class Likeness:
    """Searches the vectors of columns, which it keeps in memory from their first search on.

    dataset  URL
    clips    N
    """

    def __init__(self, dataset: str, clips: int, shown: Shown) -> None:
        self.dataset, self.clips, self._shown = dataset, clips, shown
        self._memory: dict[str, np.ndarray] = {}
        self._lock = Lock()

    def to_clip(self, name: str, row: int, key: str) -> np.ndarray:
        """(N,) float32 cosines to a clip, NaN for clips without a vector. Raises UserError, Failure."""
        column, field = self._column(name)
        vectors = self._vectors(name, column, field)
        if vectors is None:
            asked = alike.vector_of(self.dataset, column.column, field.name, key)[1]
        else:
            asked = vectors[row].astype(np.float32)
        if not asked.any():
            raise UserError(f"{key}: has no vector in {name}; ask for another clip")
        return self._cosines(name, asked)

    def to_text(self, name: str | None, words: str) -> np.ndarray:
        """The same to a text, by the first column whose encoder reads texts unless one is named."""
        from longtake.pipeline import queries

        readers: Mapping[str, Column] = self._shown.readers
        if not readers:
            raise UserError("text: no column of an encoder that reads texts; score by `embedding` with a CLIP")
        name = next(iter(readers)) if name is None else name
        if name not in readers:
            raise UserError(f"{name}: its encoder reads no texts; there are {', '.join(readers)}")
        return self._cosines(name, queries.of_text(readers[name], words, self._shown.encoders.get(name)))

    def _column(self, name: str) -> tuple[Column, Field]:
        vectors = self._shown.vectors
        if name not in vectors:
            raise UserError(f"{name}: no such vectors; there are {', '.join(vectors) or 'none'}")
        return vectors[name]

    def _cosines(self, name: str, asked: np.ndarray) -> np.ndarray:
        column, field = self._column(name)
        asked = alike.direction(asked, field.width)
        cosines = np.full(self.clips, np.nan, np.float32)
        vectors = self._vectors(name, column, field)
        if vectors is None:
            found = self._on_disk(column, field, asked)
            cosines[found.rows] = found.cosines
            return cosines
        for start in range(0, self.clips, _BLOCK):
            block = vectors[start : start + _BLOCK].astype(np.float32)
            cosines[start : start + _BLOCK] = np.where(block.any(1), block @ asked, np.nan)
        return cosines

    def _on_disk(self, column: Column, field: Field, asked: np.ndarray) -> alike.Alike:
        """The nearest clips alone: in clusters of these vectors where there are some, else in all shards."""
        if self._shown.clusters:
            made = clusters.read_clusters(self._shown.clusters)
            if (made.embedding["column"], made.embedding["field"]) == (column.column, field.name):
                return alike.approximate(made, asked, _FOUND)
        return alike.exact(self.dataset, column.column, field.name, asked, _FOUND)

    def _vectors(self, name: str, column: Column, field: Field) -> np.ndarray | None:
        """(N, D) float16 of norm 1, zero where a clip has none; None where they are too many for memory."""
        if 2 * self.clips * field.width > _MOST_BYTES:
            return None
        with self._lock:
            if (vectors := self._memory.get(name)) is None:
                vectors = np.zeros((self.clips, field.width), np.float16)
                for part in alike.vectors(self.dataset, column.column, field.name):
                    vectors[part.row + np.flatnonzero(part.has)] = part.unit
                # one column at a time: another one is asked for rarely
                self._memory = {name: vectors}
            return vectors
