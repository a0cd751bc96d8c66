"""Checking a dataset against its indexes and its plan. Every problem is a line with a remedy."""

import contextlib
import hashlib
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from isal import isal_zlib

from longtake.datasets import (
    audio,
    captions,
    cluster_lists,
    compact,
    index,
    schema,
    score_columns,
    scores,
    storage,
    text,
    tokens,
)
from longtake.datasets import latents as columns
from longtake.datasets.errors import Failure

_BLOCK = 1 << 22
_SHARD_FILE = re.compile(r"([^.]+)(\.[\w-]+)?\.(tar|parquet)")
_STAGES = {
    "latent-": "cache_latents",
    tokens.PREFIX: "cache_tokens",
    "caption-": "caption",
    text.PREFIX: "cache_text",
}  # what makes a column, by how its name begins
_FILES = ("dataset.json", "listed.json", "unreachable.json")
_FOLDERS = {"plan", "sources", "views", "compact", "annotations", "answers", "clusters"}


def tars(dataset: str) -> list[tuple[str, str]]:
    """(split, name) of every committed tar, base and column alike; also of those that are tables alone."""
    return [
        (split, name.removesuffix(".parquet"))
        for split in schema.SPLITS
        for name in index.table_names(storage.join(dataset, split))
    ]


def tar_bytes(dataset: str) -> int:
    """Bytes of all tars: how much `verify` will read."""
    total = 0
    for split in schema.SPLITS:
        fs, path = storage.filesystem(storage.join(dataset, split))
        entries = fs.ls(path, detail=True) if fs.exists(path) else []
        total += sum(entry["size"] or 0 for entry in entries if entry["name"].endswith(".tar"))
    return total


def verify(dataset: str, threads: int = 8, progress: Callable[[int], Any] = lambda read: None) -> Iterator[str]:
    """All problems of a dataset, tar by tar, then those of the dataset as a whole.

    Args:
        threads: tars read at once, each in blocks of 4 MiB.
        progress: called after each block with its number of bytes, by one thread at a time.
    """
    lock = threading.Lock()

    def locked(read: int) -> None:
        with lock:
            progress(read)

    images = storage.exists(storage.join(dataset, "dataset.json")) and index.describe(dataset).get("kind") == "images"
    pool = ThreadPoolExecutor(threads)
    try:
        for lines in pool.map(lambda tar: list(problems(dataset, tar, locked, images)), tars(dataset)):
            yield from lines
    finally:
        # otherwise Ctrl-C would wait for all tars
        pool.shutdown(cancel_futures=True)
    yield from layout_problems(dataset)


def problems(
    dataset: str, tar: tuple[str, str], progress: Callable[[int], Any] = lambda read: None, images: bool = False
) -> Iterator[str]:
    """The differences of a tar from its index, and of its index from the base shard or the sources.

    A column that is a table has no tar.
    """
    split, name = tar
    url = storage.join(dataset, split, f"{name}.tar")
    number, _, column = name.partition(".")
    again = "`longtake dataset index`" if images else "the `shard` stage"
    remedy = f"delete {split}/{number}.parquet and run {again} again"
    stage = scores.stage_of(column) if column.startswith(scores.PREFIX) else None
    if stage := stage or next((made for begin, made in _STAGES.items() if column.startswith(begin)), None):
        remedy = f"delete {split}/{name}.parquet and run its `{stage}` stage again"
    elif column == audio.COLUMN:
        remedy = f"delete {split}/{name}.parquet and run a `cache_audio` stage"
    try:
        shard = index.read_shard(dataset, split, name)
    except Failure as e:
        yield str(e)
        return
    if index.is_table(column):
        table_problems = score_columns.problems if column.startswith(scores.PREFIX) else captions.problems
        found = list(table_problems(dataset, shard))
        yield from found
        if found:
            return
    else:
        members = list(_members(shard.table, column, images))
        yield from _tar_problems(url, shard, members, remedy, progress)
    if column.startswith("latent-"):
        yield from columns.problems(dataset, shard)
    elif column.startswith(tokens.PREFIX):
        yield from tokens.problems(dataset, shard)
    elif column.startswith(text.PREFIX):
        yield from text.problems(dataset, shard)
    elif column == audio.COLUMN:
        with contextlib.suppress(Failure):
            yield from audio.problems(dataset, shard)
    # a problem of the other table is reported when that one is checked
    with contextlib.suppress(Failure):
        yield from _base_problems(url, dataset, shard, remedy) if column else _source_problems(dataset, shard, remedy)


@dataclass
class _Member:
    """A file of a tar as its index describes it, and its content while the tar is read."""

    name: re.Pattern[str]
    label: str  # in messages
    offset: int
    size: int
    crc32: int | None
    sha256: str | None  # where the index has one
    header: bytearray = field(default_factory=bytearray)
    digest: Any = field(default_factory=hashlib.sha256)
    checksum: int = 0

    def feed(self, start: int, block: bytes) -> None:
        """Take this member's part of the tar's bytes from `start` on."""
        data = self.offset - start
        self.header += block[max(0, data - tarfile.BLOCKSIZE) : max(0, data)]
        part = memoryview(block)[max(0, data) : max(0, data + self.size)]
        self.checksum = isal_zlib.crc32(part, self.checksum)
        if self.sha256 is not None:
            self.digest.update(part)

    def wrong(self) -> bool:
        """Whether the file differs from the index, once all blocks are fed."""
        try:
            info = tarfile.TarInfo.frombuf(bytes(self.header), "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError):
            return True
        right = self.name.fullmatch(info.name) and info.size == self.size and self.checksum == self.crc32
        return not right or self.sha256 not in (None, self.digest.hexdigest())


def _members(table: pa.Table, column: str, images: bool) -> Iterator[_Member]:
    if column.startswith(text.PREFIX):
        yield from _text_members(table)
        return
    # the index of a column has no file endings, that of plain image tars no names
    fields = [("", r"\.[\w.]+", "sha256")] if column else [("mp4_", r"\.mp4", "sha256"), ("json_", r"\.json", None)]
    for row in table.to_pylist():
        for prefix, ending, sha256 in fields:
            offset, size = row.get(f"{prefix}offset"), row.get(f"{prefix}size")
            missing = offset is None or size is None or size < 0
            if images and size == 0:
                continue  # a picture without text
            name = re.compile(r".*", re.DOTALL) if images else re.compile(re.escape(str(row.get("key"))) + ending)
            yield _Member(
                name=name,
                label=f"{row.get('key')}{'.' + prefix[:-1] if prefix else ''}",
                offset=-1 if missing else offset,
                size=0 if missing else size,
                crc32=row.get(f"{prefix}crc32"),
                sha256=(row.get(sha256) or "") if sha256 else None,
            )


def _text_members(table: pa.Table) -> Iterator[_Member]:
    """A file for each distinct text of a column of token states."""
    rows = table.column("texts").to_pylist() if "texts" in table.column_names else []
    texts = {one["sha"]: one for row in rows for one in row or ()}
    for sha, one in texts.items():
        missing = one["offset"] is None or one["size"] is None or one["size"] < 0
        yield _Member(
            name=re.compile(re.escape(f"{sha}.npy")),
            label=f"{sha}.npy",
            offset=-1 if missing else one["offset"],
            size=0 if missing else one["size"],
            crc32=one["crc32"],
            sha256=None,
        )


def _tar_problems(
    url: str, shard: index.Shard, members: list[_Member], remedy: str, progress: Callable[[int], Any]
) -> Iterator[str]:
    fs, path = storage.filesystem(url)
    try:
        size = storage.retrying(url, lambda: fs.size(path))
    except FileNotFoundError:
        yield f"{url}: is missing; {remedy}"
        return
    if size != shard.tar_bytes:
        progress(size)
        yield f"{url}: {size} bytes, the index says {shard.tar_bytes}; {remedy}"
        return
    waiting = sorted(members, key=lambda m: m.offset, reverse=True)
    current: list[_Member] = []  # members with bytes in this block or later ones
    digest = hashlib.sha256()
    for start in range(0, size, _BLOCK):
        block = storage.read_range(url, start, min(_BLOCK, size - start))
        progress(len(block))
        digest.update(block)
        end = start + len(block)
        while waiting and waiting[-1].offset - tarfile.BLOCKSIZE < end:
            current.append(waiting.pop())
        for member in current:
            member.feed(start, block)
        current = [m for m in current if m.offset + m.size > end]
    wrong = [m.label for m in members if m.wrong()]
    if digest.hexdigest() != shard.tar_sha256:
        where = f" (in {', '.join(wrong)})" if wrong else ""
        yield f"{url}: its bytes are not those that were committed{where}; {remedy}"
    else:
        for label in wrong:
            yield f"{url}: {label} is not where the index says, or is another; {remedy}"


def _base_problems(url: str, dataset: str, shard: index.Shard, remedy: str) -> Iterator[str]:
    base = index.read_shard(dataset, shard.split, shard.name.partition(".")[0]).table
    if base["key"].to_pylist() != shard.table["key"].to_pylist() or (
        base["sha256"].to_pylist() != shard.table["base_sha256"].to_pylist()
    ):
        yield f"{url}: belongs to other clips than its base shard; {remedy}"


def _source_problems(dataset: str, shard: index.Shard, remedy: str) -> Iterator[str]:
    """The differences between a shard and its group's table of sources."""
    url = storage.join(dataset, "sources", f"{shard.split}-{shard.name}.parquet")
    if not storage.exists(url):
        yield f"{url}: is missing; {remedy}"
        return
    clips = {v["values"]: v["counts"] for v in pc.value_counts(shard.table["source"]).to_pylist()}
    sources = index.from_parquet(url)
    if sources.schema != schema.SOURCES:
        yield f"{url}: not a table of sources; {remedy}"
        return
    good = sources.filter(pc.equal(sources["status"], "good"))
    counts = dict(zip(good["source"].to_pylist(), good["clips"].to_pylist(), strict=True))
    for source in sorted(clips.keys() - counts.keys()):
        yield f"{url}: source {source} of {clips[source]} clips has no good row; {remedy}"
    for source, count in counts.items():
        if clips.get(source, 0) != count:
            yield f"{url}: source {source} has {count} clips, the index {clips.get(source, 0)}; {remedy}"


def layout_problems(dataset: str) -> Iterator[str]:
    """Files that do not belong to the dataset, groups that are planned but not committed, counts that do not add up."""
    committed = set(tars(dataset))
    yield from _stray_files(dataset, committed)
    damaged = False
    for folder in ("plan", "sources"):
        for name in index.table_names(storage.join(dataset, folder)):
            url = storage.join(dataset, folder, name)
            try:
                table = index.from_parquet(url)
                if folder == "plan":
                    for split, group in sorted(
                        set(zip(*(table[c].to_pylist() for c in ("split", "group")), strict=True))
                    ):
                        if (split, f"{group:05d}") not in committed:
                            yield f"{url}: group {split}/{group:05d} is planned but not committed; run the `shard` stage again"
            except (Failure, KeyError, TypeError, ValueError) as e:
                damaged = True
                yield str(e) if isinstance(e, Failure) else f"{url}: not a plan ({e}); {index.PLAN_REMEDY}"
    if not damaged:
        yield from _count_problems(dataset)
    for split in schema.SPLITS:
        yield from compact.problems(dataset, split)
    yield from cluster_lists.problems(dataset)


def _stray_files(dataset: str, committed: set[tuple[str, str]]) -> Iterator[str]:
    for name in storage.names(dataset):
        if name not in {*_FILES, *_FOLDERS, *schema.SPLITS} and not name.startswith("."):
            yield f"{storage.join(dataset, name)}: belongs to nothing in this dataset; delete it"
    for split in schema.SPLITS:
        for name in storage.names(storage.join(dataset, split)):
            url, match = storage.join(dataset, split, name), _SHARD_FILE.fullmatch(name)
            if name.startswith("."):
                continue  # a writer's at work, or debris that the next `shard` sweeps
            if not match:
                yield f"{url}: belongs to nothing in this dataset; delete it"
            elif (split, match[1]) not in committed:
                yield f"{url}: its shard was never committed; run the `shard` stage again, or delete it"
            elif name.endswith(".tar") and index.is_table((match[2] or "")[1:]):
                yield f"{url}: belongs to nothing in this dataset, its column is a table; delete it"
            elif (split, name.rpartition(".")[0]) not in committed:
                yield f"{url}: has no index, the debris of a stopped run; delete it, or run its stage again"
    for name in index.table_names(storage.join(dataset, "sources")):
        if tuple(name.removesuffix(".parquet").split("-", 1)) not in committed:
            url = storage.join(dataset, "sources", name)
            yield f"{url}: its shard was never committed; run the `shard` stage again, or delete it"


def _count_problems(dataset: str) -> Iterator[str]:
    try:
        totals = index.summary(dataset)
        planned = len(index.read_tables(storage.join(dataset, "plan"), schema.PLAN))
    except (Failure, KeyError, pa.ArrowException) as e:
        yield f"{dataset}: cannot be counted ({' '.join(str(e).split())}); run the `shard` stage again"
        return
    for one, other in (
        ("sources", "sources_good + sources_rejected"),
        ("clips", "clips_cut"),
        ("planned", "sources + sources_tried_again"),
    ):
        counts = [sum((totals | {"planned": planned})[n] for n in side.split(" + ")) for side in (one, other)]
        if counts[0] != counts[1] and not (one == "planned" and not planned):
            yield f"{dataset}: {one} = {counts[0]}, but {other} = {counts[1]}; run the `shard` stage again"
