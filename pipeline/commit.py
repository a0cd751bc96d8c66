"""One group to one shard, committed by its index, which is written last; until then the shard does not exist.

Order: data tar, tar and index of frame differences, tar and index of sound, source rows, index. Every write is atomic and
gives the same bytes whoever does it, so that two drivers at once, a retry or a kill at any moment do no harm. Where the bytes
differ, as of a source that only one of them could reach, the shard that is committed first stays.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from longtake.datasets import annotations, audio, index, schema, storage
from longtake.datasets.errors import Failure
from longtake.datasets.masking import shown
from longtake.datasets.shard import Member, sha256_of, write_tar
from longtake.pipeline.config import CutConfig
from longtake.pipeline.fetch import Unread, fetch
from longtake.pipeline.isolate import Worker
from longtake.pipeline.retry import resized_note, waiting

_worker: Worker | None = None


def group_name(number: int) -> str:
    return f"{number:05d}"


def make_group(
    group: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    dataset: str,
    cut: CutConfig,
    memory: Mapping[str, bytes] | None = None,
    board: Any = None,
) -> dict[str, Any]:
    """Cut the sources of one group and commit its shard.

    Args:
        group: `{"split", "group"}`, and perhaps `again`: what `seen.planned_again` gives for it.
        rows: its plan rows, in order of identity.
        memory: contents of sources that only the driver can see.
        board: the Ray actor that progress is reported to (see board.py).

    Returns:
        `{"units", "clips", "error"}`, the units being sources. A group with an error is not committed and can be run again.
    """
    split, name = group["split"], group_name(group["group"])
    result = {"units": len(rows), "clips": 0, "error": ""}

    def report(sources: int, uri: str) -> None:
        if board is not None:
            board.begin.remote(f"{split}/{name}", sources, uri)

    try:
        with storage.spool_folder(storage.join(dataset, split)) as spool:
            sources, clips = _cut_sources(rows, group.get("again", {}), spool, cut, memory or {}, report)
            report(len(rows), "its commit")
            _commit(dataset, split, name, spool, clips, sources, cut)
            result["clips"] = len(clips)
    except (Failure, OSError) as e:
        result["error"] = f"{split}/{name}: {e}"
    if board is not None:
        board.finish.remote(f"{split}/{name}", len(rows))
    return result


def _cut_sources(
    rows: Sequence[Mapping[str, Any]],
    again: Mapping[str, bool],
    spool: Path,
    cut: CutConfig,
    memory: Mapping[str, bytes],
    report: Callable[[int, str], None],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of schema.SOURCES of a group, and the rows of its clips, whose files are in the spool."""
    sources, clips = list[dict[str, Any]](), list[dict[str, Any]]()
    unread, silent = set[str](), set[str]()  # identities that could not be read, stores that did not answer
    for number, row in enumerate(rows):
        report(number, row["uri"])
        cut_clips = list[dict[str, Any]]()
        # a copy takes the place of what could not be read
        if row["duplicate_of"] is not None and row["source"] not in unread:
            account = _rejected("duplicate", f"same content as {row['duplicate_of']}")
        elif again.get(row["uri"]):
            account = _rejected("unreachable", "planned again, into a later group")
        elif row["source"] == waiting(row["uri"]):
            account = _ask_again(row, spool, cut.limits.max_bytes)
        else:
            store = "/".join(row["uri"].split("/", 3)[:3])
            attempts = 1 if store in silent else 5
            moved = partial(report, number, row["uri"])
            account, cut_clips = _cut(row, row["uri"] in again, spool, cut, memory, attempts, moved)
            (unread.add if account["reason"] in schema.UNREAD else unread.discard)(row["source"])
            (silent.add if account["reason"] == "unreachable" else silent.discard)(store)
        if (count := len(annotations.rows_of(row["extra"]))) > 1:
            account["detail"] = "; ".join(filter(None, (account["detail"], f"{count} rows name it")))
        sources.append(dict.fromkeys(schema.SOURCES.names) | dict(row) | account)
        clips += cut_clips
    return sources, clips


def _cut(
    row: Mapping[str, Any],
    replaced: bool,
    spool: Path,
    cut: CutConfig,
    memory: Mapping[str, bytes],
    attempts: int,
    moved: Callable[[], None],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The account of one source, and the rows of its clips, each with the facts of its sound as `audio`.

    One that was `replaced`, and that a later group has with its new size, is cut only if it has its size of before again.
    """
    global _worker
    most_bytes = cut.limits.max_bytes
    if (row["bytes"] or 0) > most_bytes:
        return _rejected("too_large", f"{row['bytes']} bytes; limits.max_bytes is {most_bytes}"), []
    copy = spool / "source"
    try:
        path = fetch(row["uri"], copy, most_bytes, attempts, memory)
        size = path.stat().st_size
        if replaced and size != row["bytes"]:
            return _rejected("missing", "another file by now, which a later group has"), []
        _worker = _worker or Worker()
        result = _worker.run(str(path), row["source"], str(spool), cut, annotations.of_sample(row["extra"]))
        if cut.audio and result["clips"]:
            moved()
            sound = _worker.keep_sound(str(path), result["clips"], str(spool), cut, clocks=result["clocks"])
            for clip, facts in zip(result["clips"], sound["clips"], strict=True):
                clip["audio"] = facts
            result["account"]["detail"] = (
                "; ".join(filter(None, (result["account"]["detail"], sound["detail"]))) or None
            )
    except Unread as e:
        return _rejected(e.reason, e.detail), []
    finally:
        copy.unlink(missing_ok=True)
    account, clips = result["account"] | {"clips": len(result["clips"])}, result["clips"]
    if row["bytes"] is None:
        account["bytes"] = size
    elif size != row["bytes"]:
        account["detail"] = "; ".join(filter(None, [account.get("detail"), resized_note(size, row["bytes"])]))
    if account.get("detail"):
        # a decoder may repeat a name that is no text
        account["detail"] = shown(storage.printable(account["detail"]))
    return account, clips


def _ask_again(row: Mapping[str, Any], spool: Path, most_bytes: int) -> dict[str, Any]:
    """The account of a source that was unreachable when it was planned, by what its store answers now."""
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
    dataset: str,
    split: str,
    name: str,
    spool: Path,
    clips: list[dict[str, Any]],
    sources: list[dict[str, Any]],
    cut: CutConfig,
) -> None:
    def files(extensions: tuple[str, ...]) -> Iterator[tuple[str, dict[str, bytes]]]:
        for row in clips:
            yield row["key"], {e: (spool / f"{row['key']}.{e}").read_bytes() for e in extensions}

    base = storage.join(dataset, split, name)
    fs, path = storage.filesystem(f"{base}.parquet")
    fs.invalidate_cache(path)
    if storage.retrying(path, lambda: fs.exists(path)):
        # by another driver or try: readers may use its tar, and what it could not read may be planned again by now
        return
    members, size, digest = store_tar(f"{base}.tar", files(("mp4", "json")))
    diffs, diff_size, diff_digest = store_tar(f"{base}.frame_diff.tar", files(("npy.zst",)))
    column = column_rows(diffs, clips)
    index.write_index(f"{base}.frame_diff.parquet", column, schema.COLUMN_INDEX, diff_size, diff_digest)
    if cut.audio:
        sounds, sound_size, sound_digest = store_tar(f"{base}.audio.tar", sound_files(spool, clips))
        rows = [found | row["audio"] for found, row in zip(column_rows(sounds, clips), clips, strict=True)]
        notes = cut.audio.model_dump(mode="json")
        index.write_index(f"{base}.audio.parquet", rows, schema.AUDIO_INDEX, sound_size, sound_digest, notes)
    account = index.to_parquet(index.rows_table(sources, schema.SOURCES))
    storage.write(storage.join(dataset, "sources", f"{split}-{name}.parquet"), account)

    places: dict[str, dict[str, Any]] = {row["key"]: {} for row in clips}
    for member in members:
        fields = ("offset", "size", "crc32")
        places[member.key] |= {f"{member.extension}_{field}": getattr(member, field) for field in fields}
    index.write_index(f"{base}.parquet", [row | places[row["key"]] for row in clips], schema.INDEX, size, digest)


def sound_files(spool: Path, clips: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Keys and members of clips with the facts of their sound as `audio`; the member of one without sound is empty."""
    for row in clips:
        path = spool / f"{row['key']}.{audio.ENDING}"
        yield row["key"], {audio.ENDING: path.read_bytes() if row["audio"]["has_audio"] else b""}


def store_tar(url: str, samples: Iterable[tuple[str, dict[str, bytes]]]) -> tuple[list[Member], int, str]:
    """Write a tar to a store; returns its members, its bytes and its sha256."""
    with storage.staged(url) as path:
        members = write_tar(path, samples)
        return members, path.stat().st_size, sha256_of(path)


def column_rows(members: Iterable[Member], base: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of schema.COLUMN_INDEX for a column's members, given the base shard's rows in the same order."""
    return [
        {field: getattr(member, field) for field in ("key", "offset", "size", "crc32", "sha256")}
        | {"base_sha256": row["sha256"]}
        for member, row in zip(members, base, strict=True)
    ]
