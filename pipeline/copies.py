"""Compare sources of one identity byte for byte. Samples of long files can agree where the files do not, as in raw footage
with the same title. Only sources of equal identity are read once more for this.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longtake.pipeline.fetch import Unread, part

_BLOCK_BYTES = 1 << 23


def separated(new: pa.Table, known: pa.Table, least_bytes: int, threads: ThreadPoolExecutor) -> pa.Table:
    """The new sources, where each that differs from the first of its identity gets another identity.

    It begins as the old one does, so that the source stays in its bucket. Where the first can no longer be read, for
    example after its folder was renamed, the samples decide.

    Args:
        new: columns source, uri, bytes, sampled (whether the identity is a hash of samples), extra.
        known: columns source, uri, of earlier plans.
        least_bytes: size from which samples leave something out.
    """
    is_sampled = pc.and_(new["sampled"], pc.fill_null(pc.greater_equal(new["bytes"], least_bytes), False))
    if not pc.any(is_sampled).as_py():
        return new
    rows = np.flatnonzero(np.asarray(is_sampled)).tolist()
    columns = (new[name].filter(is_sampled).to_pylist() for name in ("source", "uri", "bytes"))
    alike: dict[str, list[tuple[str, int, int]]] = {}
    for row, source, uri, size in zip(rows, *columns, strict=True):
        alike.setdefault(source, []).append((uri, size, row))

    firsts = dict(zip(reversed(known["source"].to_pylist()), reversed(known["uri"].to_pylist()), strict=True))
    sources = new["source"].to_pylist()
    for source, group in alike.items():
        group.sort()
        first_uri, size, _ = group[0]
        first = firsts.get(source, first_uri)
        others = sorted({uri for uri, _, _ in group} - {first})
        if others and (digest := _digest(first, size)):
            digests = dict(zip(others, threads.map(partial(_digest, size=size), others), strict=True))
            for uri, _, row in group:
                if digests.get(uri, digest) != digest:
                    sources[row] = source[:2] + str(digests[uri] or hashlib.sha256(uri.encode()).hexdigest())[:18]
    return new.set_column(new.schema.get_field_index("source"), "source", pa.chunked_array([sources], pa.string()))


def _digest(uri: str, size: int) -> str:
    """The sha256 of a source's bytes; empty where they cannot be read."""
    digest = hashlib.sha256()
    try:
        for start in range(0, size, _BLOCK_BYTES):
            digest.update(part(uri, size, start, min(start + _BLOCK_BYTES, size)))
    except Unread:
        return ""
    return digest.hexdigest()
