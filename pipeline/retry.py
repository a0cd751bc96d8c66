"""Track sources that could not be read when their group was made. Unreachable ones are planned again, into a new group,
once their store answers; nothing else is made again.
"""

import hashlib
import json
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from longtake.datasets import index, schema, storage
from longtake.datasets.errors import Failure
from longtake.pipeline.fetch import answers

RECORD = "unreachable.json"
_NO_TRIES: dict[str, Any] = {"awaited": [], "repeated": [], "rounds": 0}
_FIELDS = ("source", "uri", "bytes", "split", "group", "duplicate_of", "extra", "reason", "detail")
_RESIZED = r"(?:^|; )(?P<bytes>\d{1,18}) bytes, listed with \d+(?:$|; )"


@dataclass(frozen=True)
class Tries:
    """What planning needs to know about sources that were tried before.

    Attributes:
        unread: the last row of each source of which nothing was read, with columns of schema.SOURCES.
        lost: identities of which nothing was ever read.
        awaited: rows that are worth another try, each with the number of its `tries`: unreachable sources, and copies of `lost`.
        repeated: URIs of such sources that were planned again.
        resized: `uri` and `bytes` of sources that were not as long as listed when they were read.
    """

    unread: pa.Table
    lost: pa.Array
    awaited: list[dict[str, Any]]
    repeated: frozenset[str]
    resized: pa.Table


def by_name(uri: str) -> str:
    """The identity of a source whose content cannot be known before it is read: 20 hex digits."""
    return hashlib.sha256(f"name {uri}".encode()).hexdigest()[:20]


def waiting(uri: str) -> str:
    """The identity of a source that was unreachable when it was planned: it is not read under it, but planned again."""
    return hashlib.sha256(f"waiting {uri}".encode()).hexdigest()[:20]


def read_tries(dataset: str, threads: int = 16) -> Tries:
    """The tries of the sources of all committed groups; other groups will be made, and accounted for, again."""
    folder = storage.join(dataset, "sources")
    names = [f"{split}-{name}.parquet" for split, name in index.committed(dataset)]
    urls = [storage.join(folder, name) for name in names]
    # such as of a shard that is to be made again: its sources have been read with their sizes all the same
    others = [storage.join(folder, name) for name in sorted({*index.table_names(folder)} - {*names})]
    with ThreadPoolExecutor(threads) as pool:
        odd = [*pool.map(_odd, urls)]
        failed = _concatenated(rows for rows, _ in odd)
        resized = pa.concat_tables(
            [_resized(_empty()), *(rows for _, rows in odd), *(rows for _, rows in pool.map(_odd, others))]
        )
        # most datasets have none; then no other rows have to be in memory
        rows = _concatenated(pool.map(lambda url: _related(_read(url), failed), urls)) if len(failed) else failed

    last = index.last_tries(rows)
    unread, read = last.filter(_is_unread(last)), last.filter(pc.invert(_is_unread(last)))
    read = read.filter(pc.invert(pc.fill_null(pc.equal(read["reason"], "duplicate"), False)))
    lost = unread["source"].filter(pc.invert(pc.is_in(unread["source"], read["source"]))).combine_chunks()

    hopeful = last.filter(_may_be_read(last, lost))
    answered = set(read["uri"].filter(pc.is_in(read["uri"], hopeful["uri"])).to_pylist())
    tried = rows.filter(_may_be_read(rows, lost))
    counts = Counter(zip(tried["uri"].to_pylist(), tried["bytes"].to_pylist(), strict=True))
    awaited = [
        row | {"tries": counts[row["uri"], row["bytes"]]} for row in hopeful.to_pylist() if row["uri"] not in answered
    ]

    superseded = rows.filter(pc.invert(pc.is_in(_places(rows), _places(last))))
    repeated = superseded.filter(pc.is_in(superseded["reason"], pa.array(["unreachable", "duplicate"])))
    sizes = pc.struct_field(pc.extract_regex(resized["detail"], _RESIZED), "bytes").cast(pa.int64())
    resized = pa.table({"uri": resized["uri"], "bytes": sizes})
    return Tries(unread, lost, awaited, frozenset(repeated["uri"].to_pylist()), resized)


def _empty() -> pa.Table:
    # no constant of the module: the first table that is made imports pandas
    return schema.SOURCES.empty_table().select(_FIELDS)


def _concatenated(tables: Iterable[pa.Table]) -> pa.Table:
    return pa.concat_tables([_empty(), *(table.replace_schema_metadata(None) for table in tables)])


def _is_unread(rows: pa.Table) -> pa.ChunkedArray:
    return pc.fill_null(pc.is_in(rows["reason"], pa.array(schema.UNREAD)), False)


def resized_note(size: int, listed: int) -> str:
    """The note about a source that was not as long as listed; `Tries.resized` has it."""
    return f"{size} bytes, listed with {listed}"


def _is_resized(rows: pa.Table) -> pa.ChunkedArray:
    return pc.fill_null(pc.match_substring_regex(rows["detail"], _RESIZED), False)


def _odd(url: str) -> tuple[pa.Table, pa.Table]:
    """The rows of an account of which nothing was read, and those of sources that were not as long as listed."""
    rows = _read(url).replace_schema_metadata(None)
    return rows.filter(_is_unread(rows)), _resized(rows)


def _resized(rows: pa.Table) -> pa.Table:
    return rows.filter(_is_resized(rows)).select(("uri", "detail"))


def _may_be_read(rows: pa.Table, lost: pa.Array) -> pa.ChunkedArray:
    """Whether a store may yet give what was not read: it was unreachable, or left to an original that could not be read."""
    unreachable, copies = (pc.is_in(rows["reason"], pa.array([reason])) for reason in ("unreachable", "duplicate"))
    return pc.or_(unreachable, pc.and_(copies, pc.is_in(rows["source"], lost)))


def _related(rows: pa.Table, failed: pa.Table) -> pa.Table:
    """The rows with the same URI or identity as one that failed."""
    return rows.filter(pc.or_(pc.is_in(rows["uri"], failed["uri"]), pc.is_in(rows["source"], failed["source"])))


def _read(url: str) -> pa.Table:
    try:
        return index.from_parquet(url, list(_FIELDS))
    except Failure:
        # the account reports it; here it must not keep its group from being made again
        return _empty()


def _places(rows: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(rows["split"], rows["group"].cast(pa.string()), rows["uri"], " ")


def answering(awaited: Sequence[dict[str, Any]], threads: int = 64) -> list[dict[str, Any]]:
    """The rows whose store gives their first byte now, or refuses it for good."""
    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(answers, [row["uri"] for row in awaited])
        bar = tqdm(results, "ask again", len(awaited), disable=not awaited, unit="source")
        return [row for row, answer in zip(awaited, bar, strict=True) if answer]


def record(dataset: str) -> None:
    """Write `unreachable.json`, so that `retried` need not read every account.

    `awaited` are the URIs that were not planned again yet, `repeated` the others, `rounds` how often some were.
    """
    tries = read_tries(dataset)
    written = read_record(dataset)
    before = written or _NO_TRIES
    grown = not tries.repeated <= {*before["repeated"]}
    contents = {
        "awaited": sorted({row["uri"] for row in tries.awaited} - tries.repeated),
        "repeated": sorted(tries.repeated),
        "rounds": before["rounds"] + grown,
    }
    if contents != written:
        storage.write(storage.join(dataset, RECORD), storage.canonical_json(contents))


def read_record(dataset: str) -> dict[str, Any] | None:
    """The contents of `unreachable.json`. None where it is missing or damaged: then the stage has to run to write it anew."""
    try:
        contents = json.loads(storage.read(storage.join(dataset, RECORD)))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None
    if not isinstance(contents, dict) or contents.keys() != _NO_TRIES.keys():
        return None
    lists = [contents["awaited"], contents["repeated"]]
    texts = all(isinstance(uris, list) and all(isinstance(uri, str) for uri in uris) for uris in lists)
    return dict(contents) if texts and isinstance(contents["rounds"], int) else None


def retried(dataset: str, seconds: float = 10.0) -> str:
    """A text that counts the rounds in which unreachable sources were planned again, with the one that is due if any answers
    within `seconds`.

    It is empty without a round. A source that fails its second try is awaited no more: a store that never gives a source
    whole does not make the stage run for ever.
    """
    contents = read_record(dataset) or _NO_TRIES
    rounds = contents["rounds"] + _any_answers(contents["awaited"], seconds)
    return f" {rounds}" if rounds else ""


def _any_answers(uris: Sequence[str], seconds: float, threads: int = 16) -> bool:
    """Whether one of them answers within `seconds`; a store may never answer."""
    # not in order of names: a silent store would block all others
    pending = iter(sorted(uris, key=lambda uri: hashlib.sha256(uri.encode()).digest()))
    results: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def ask() -> None:
        for uri in pending:
            results.put(answers(uri))

    # daemons: a command must not wait for them when it ends
    for _ in range(min(threads, len(uris))):
        threading.Thread(target=ask, daemon=True).start()
    end = time.monotonic() + seconds
    try:
        return any(results.get(timeout=max(0.0, end - time.monotonic())) for _ in uris)
    except queue.Empty:
        print(f"of {len(uris)} sources that did not answer before, none has within {seconds:g} s", file=sys.stderr)
        return False
