"""One group to one shard. Committed by its index, which is written last; until then nothing of it counts.

Order: data tar, frame-diff tar, frame-diff index, source rows, index. Every step is atomic and gives the same bytes
whoever does it, so that two drivers at once, a retry or a kill at any moment do no harm.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from longtake.datasets import annotations, index, schema, storage
from longtake.datasets.errors import Failure
from longtake.datasets.masking import shown
from longtake.datasets.shard import Member, sha256_of, write_tar
from longtake.pipeline.fetch import Unread, fetch
from longtake.pipeline.isolate import Worker
from longtake.pipeline.retry import waiting

_worker: Worker | None = None


def group_name(number: int) -> str:
    return f"{number:05d}"


def make_group(
    group: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    dataset: str,
    geometry: Mapping[str, Any],
    memory: Mapping[str, bytes] | None = None,
    board: Any = None,
) -> dict[str, Any]:
    """Cut the sources of one group and commit its shard.

    Args:
        group: `{"split", "group"}`, and perhaps `again`: URIs that have been planned anew, in another group.
        rows: its plan rows, in order of identity.
        geometry: the `clip`, `limits`, `diff` and `decoder` of `source.process`, as plain data.
        memory: contents of sources that only the driver can see.
        board: the Ray actor that is told how far this is (see watch.py).

    Returns:
        `{"units", "clips", "error"}`, the units being sources; with an error the group is not committed and can be run again.
    """
    split, name, limits = group["split"], group_name(group["group"]), geometry["limits"]
    result = {"units": len(rows), "clips": 0, "error": ""}
    folder = storage.join(dataset, split)
    try:
        with storage.spool_folder(folder) as spool:
            sources, clips = list[Any](), list[Any]()
            unread, silent = set[str](), set[str]()
            for done, row in enumerate(rows):
                if board is not None:
                    board.begin.remote(f"{split}/{name}", done, row["uri"])
                if row["uri"] in group.get("again", ()):
                    account, cut = _rejected("unreachable", "planned again, into a later group"), list[Any]()
                elif row["source"] == waiting(row["uri"]):
                    account, cut = _asked_again(row, spool, limits["max_bytes"]), []
                # a copy takes the place of what could not be read
                elif row["duplicate_of"] is not None and row["source"] not in unread:
                    account, cut = _rejected("duplicate", f"same content as {row['duplicate_of']}"), []
                else:
                    store = "/".join(row["uri"].split("/", 3)[:3])
                    account, cut = _cut(row, spool, geometry, memory or {}, attempts=1 if store in silent else 5)
                    (unread.add if account["reason"] in schema.UNREAD else unread.discard)(row["source"])
                    (silent.add if account["reason"] == "unreachable" else silent.discard)(store)
                if (named := len(annotations.rows_of(row["extra"]))) > 1:
                    account["detail"] = "; ".join(filter(None, (account["detail"], f"{named} rows name it")))
                sources.append(dict.fromkeys(schema.SOURCES.names) | dict(row) | account)
                clips += cut
            if board is not None:
                board.begin.remote(f"{split}/{name}", len(rows), "its commit")
            _commit(dataset, split, name, spool, clips, sources)
            result["clips"] = len(clips)
    except (Failure, OSError) as e:
        result["error"] = f"{split}/{name}: {e}"
    if board is not None:
        board.finish.remote(f"{split}/{name}", len(rows))
    return result


def _cut(
    row: Mapping[str, Any], spool: Path, geometry: Mapping[str, Any], memory: Mapping[str, bytes], attempts: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    global _worker
    limits = geometry["limits"]
    if (row["bytes"] or 0) > limits["max_bytes"]:
        return _rejected("too_large", f"{row['bytes']} bytes; limits.max_bytes is {limits['max_bytes']}"), []
    fetched = spool / "source"
    try:
        path = fetch(row["uri"], fetched, limits["max_bytes"], attempts, memory)
        size = path.stat().st_size
        _worker = _worker or Worker()
        extra = annotations.of_sample(row["extra"])
        job = {"path": str(path), "source": row["source"], "folder": str(spool), "extra": extra, **geometry}
        result = _worker.run(job, limits["timeout_seconds"], limits["memory_bytes"])
    except Unread as e:
        return _rejected(e.reason, e.detail), []
    finally:
        fetched.unlink(missing_ok=True)
    account, clips = result["account"] | {"clips": len(result["clips"])}, result["clips"]
    if row["bytes"] is None:
        account["bytes"] = size
    elif size != row["bytes"]:
        account["detail"] = "; ".join(
            filter(None, [account.get("detail"), f"{size} bytes, listed with {row['bytes']}"])
        )
    if account.get("detail"):
        # a decoder may repeat a name that is no text
        account["detail"] = shown(storage.printable(account["detail"]))
    return account, clips


def _asked_again(row: Mapping[str, Any], spool: Path, most_bytes: int) -> dict[str, Any]:
    """The account of a source that was unreachable when it was planned: what its store says now."""
    target = spool / "source"
    try:
        fetch(row["uri"], target, most_bytes, attempts=1)
    except Unread as e:
        return _rejected(e.reason, e.detail)
    finally:
        target.unlink(missing_ok=True)
    return _rejected("unreachable", "was not to be had when it was planned; it is now, for the next run")


def _rejected(reason: str, detail: str) -> dict[str, Any]:
    return {"status": "rejected", "reason": reason, "detail": detail, "clips": 0}


def _commit(
    dataset: str, split: str, name: str, spool: Path, clips: list[dict[str, Any]], sources: list[dict[str, Any]]
) -> None:
    def parts(extensions: tuple[str, ...]) -> Iterator[tuple[str, dict[str, bytes]]]:
        for row in clips:
            yield row["key"], {e: (spool / f"{row['key']}.{e}").read_bytes() for e in extensions}

    base = storage.join(dataset, split, name)
    members, size, digest = _write_tar(f"{base}.tar", parts(("mp4", "json")))
    diffs, diff_size, diff_digest = _write_tar(f"{base}.frame_diff.tar", parts(("npy.zst",)))
    column = [
        {f: getattr(m, f) for f in ("key", "offset", "size", "crc32", "sha256")} | {"base_sha256": row["sha256"]}
        for m, row in zip(diffs, clips, strict=True)
    ]
    index.write_index(f"{base}.frame_diff.parquet", column, schema.COLUMN_INDEX, diff_size, diff_digest)
    storage.write(
        storage.join(dataset, "sources", f"{split}-{name}.parquet"),
        index.to_parquet(index.rows_table(sources, schema.SOURCES)),
    )
    placed = {(m.key, m.extension): m for m in members}
    rows = [
        row
        | {
            f"{e}_{what}": getattr(placed[row["key"], e], what)
            for e in ("mp4", "json")
            for what in ("offset", "size", "crc32")
        }
        for row in clips
    ]
    index.write_index(f"{base}.parquet", rows, schema.INDEX, size, digest)


def _write_tar(url: str, samples: Iterator[tuple[str, dict[str, bytes]]]) -> tuple[list[Member], int, str]:
    with storage.staged(url) as path:
        members = write_tar(path, samples)
        return members, path.stat().st_size, sha256_of(path)
