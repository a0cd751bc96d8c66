"""Whether sources of one identity are equal in every byte. Samples of long files can agree where the files do not: raw
footage with the same title, say. Equal ones are read once more for this, and only they.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from longtake.pipeline.fetch import Unread, part

_BLOCK_BYTES = 1 << 23


def told_apart(new: pa.Table, known: pa.Table, least_bytes: int, threads: ThreadPoolExecutor) -> pa.Table:
    """The new sources, where those that differ from the first of their identity get one of their own.

    It begins as theirs does, so that it stays among its neighbours. Where the first can no longer be read, as after a
    folder was renamed, their samples decide.

    Args:
        new: columns source, uri, bytes, sampled (whether the identity is of samples), extra.
        known: columns source, uri, of earlier plans.
        least_bytes: size from which samples leave something out.
    """
    rows = zip(*(new[name].to_pylist() for name in ("source", "uri", "bytes", "sampled")), range(len(new)), strict=True)
    alike: dict[str, list[tuple[str, int, int]]] = {}
    for source, uri, size, sampled, at in rows:
        if sampled and size is not None and size >= least_bytes:
            alike.setdefault(source, []).append((uri, size, at))
    firsts = dict(zip(reversed(known["source"].to_pylist()), reversed(known["uri"].to_pylist()), strict=True))
    sources = new["source"].to_pylist()
    for source, some in alike.items():
        some.sort()
        size = some[0][1]
        first = firsts.get(source, some[0][0])
        others = sorted({uri for uri, _, _ in some} - {first})
        if others and (whole := _content(first, size)):
            contents = dict(zip(others, _contents(others, size, threads), strict=True))
            for uri, _, at in some:
                if contents.get(uri, whole) != whole:
                    sources[at] = source[:2] + str(contents[uri] or hashlib.sha256(uri.encode()).hexdigest())[:18]
    return new.set_column(new.schema.get_field_index("source"), "source", pa.chunked_array([sources], pa.string()))


def _contents(uris: Sequence[str], size: int, threads: ThreadPoolExecutor) -> list[str]:
    return list(threads.map(lambda uri: _content(uri, size), uris))


def _content(uri: str, size: int) -> str:
    """The sha256 of a source's bytes; empty where they cannot be read."""
    digest = hashlib.sha256()
    try:
        for start in range(0, size, _BLOCK_BYTES):
            digest.update(part(uri, size, start, min(start + _BLOCK_BYTES, size)))
    except Unread:
        return ""
    return digest.hexdigest()
