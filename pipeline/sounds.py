"""One shard of clips to one shard of their sound, beside it, from the sources: fetch, decode, commit. Plain functions.

The bytes are those that `shard` makes in its own pass. What it gives up: a source is known again by its size and what its
header says, not by all of its bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from isal import isal_zlib

from longtake.datasets import index, schema, storage
from longtake.datasets.audio import COLUMN, ENDING, UNREACHABLE, without_sound
from longtake.pipeline import column as columns
from longtake.pipeline.commit import sound_files
from longtake.pipeline.config import CutConfig
from longtake.pipeline.fetch import Unread, fetch
from longtake.pipeline.isolate import Worker

_FACTS = [name for name in schema.AUDIO_INDEX.names if name not in schema.COLUMN_INDEX.names]

Report = Callable[[int, str], None]
Row = Mapping[str, Any]


def is_whole(base: index.Shard, made: index.Shard) -> bool:
    """Whether a shard has the sound of its base's clips, but for those that never come; others are asked for again."""
    return columns.fits(base, made) and UNREACHABLE not in made.table["reason"].to_pylist()


def make_sounds(
    worker: Worker,
    cut: CutConfig,
    dataset: str,
    split: str,
    name: str,
    keep: np.ndarray,
    report: Report = lambda clips, position: None,
) -> dict[str, int]:
    """Keep the sound of the clips of one base shard, and commit it as a shard of the column.

    Of a shard that is there only the sources are read whose store did not answer then.

    Args:
        keep: (N,) bool, which clips of the shard; all of them.
        report: called with the number of clips that are done and the source that is at work.

    Returns:
        Counts: `clips`, `with_sound`.

    Raises:
        Failure: the account of the sources is not readable, or this machine is at fault.
    """
    assert keep.all()
    base = index.read_shard(dataset, split, name)
    accounts = index.from_parquet(storage.join(dataset, "sources", f"{split}-{name}.parquet"))
    sources = {row["source"]: row for row in accounts.to_pylist() if row["status"] == "good"}
    rows: list[dict[str, Any]] = []
    folder = storage.join(dataset, split)
    earlier = _earlier(dataset, base)
    with storage.spool_folder(folder) as spool:
        for source, clips in groupby(base.table.to_pylist(), key=lambda row: row["source"]):
            report(len(rows), sources[source]["uri"] if source in sources else source)
            own = list(clips)
            sounds = _kept(earlier, own, spool) or _sounds(worker, cut, sources.get(source), own, spool)
            rows += [row | {COLUMN: facts} for row, facts in zip(own, sounds, strict=True)]
        report(len(rows), "its commit")
        facts_of = {row["key"]: row[COLUMN] for row in rows}
        assert cut.audio
        notes = cut.audio.model_dump(mode="json")
        members = sound_files(spool, rows)
        kind = schema.AUDIO_INDEX
        columns.commit(dataset, base, COLUMN, members, lambda row: facts_of[row["key"]], kind, notes, is_whole)
    return {"clips": len(rows), "with_sound": sum(row[COLUMN]["has_audio"] for row in rows)}


class _Earlier(NamedTuple):
    """A shard of the column that was made before: its tar, and its rows by the keys of clips."""

    tar: str
    rows: Mapping[str, Row]


def _earlier(dataset: str, base: index.Shard) -> _Earlier:
    """The shard that is there of the same clips, perhaps with some whose sources were unreachable; without rows if none is."""
    name = f"{base.name}.{COLUMN}"
    tar = storage.join(dataset, base.split, f"{name}.tar")
    if name not in index.shard_names(dataset, base.split, COLUMN):
        return _Earlier(tar, {})
    shard = index.read_shard(dataset, base.split, name)
    return _Earlier(tar, {row["key"]: row for row in shard.table.to_pylist()} if columns.fits(base, shard) else {})


def _kept(earlier: _Earlier, clips: Sequence[Row], spool: Path) -> list[Any] | None:
    """The facts of the sound of a source's clips as an earlier shard has them, whose files are put into the spool.

    None where it has not all of them: the source was unreachable, or a file is damaged.
    """
    rows = [earlier.rows.get(clip["key"]) for clip in clips]
    for row in rows:
        if row is None or row["reason"] == UNREACHABLE:
            return None
        if row["has_audio"]:
            data = storage.read_range(earlier.tar, row["offset"], row["size"])
            if len(data) != row["size"] or isal_zlib.crc32(data) != row["crc32"]:
                return None
            (spool / f"{row['key']}.{ENDING}").write_bytes(data)
    return [{name: row[name] for name in _FACTS} for row in rows if row]


def _sounds(worker: Worker, cut: CutConfig, source: Row | None, clips: Sequence[Row], spool: Path) -> list[Any]:
    """The facts of the sound of a source's clips, whose files are in the spool."""
    assert cut.audio
    reason, copy = "missing", spool / "source"
    try:
        if source is not None:
            path = fetch(source["uri"], copy, cut.limits.max_bytes)
            if path.stat().st_size == source["bytes"]:
                header = {name: source[name] for name in ("codec", "width", "height", "fps", "frames_expected")}
                return list(worker.keep_sound(str(path), clips, str(spool), cut, source=header)["clips"])
            reason = "changed"
    except Unread as e:
        reason = e.reason
    finally:
        copy.unlink(missing_ok=True)
    return [without_sound(cut.audio.model_dump(), reason) for _ in clips]
