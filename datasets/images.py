"""Plain WebDataset tars of images as a dataset: indexed in place, unchanged, and read by the Loader beside clips.

The dataset is a folder with train/NAME.tar and val/NAME.tar. Files of a tar whose names agree up to the first dot are a
sample: KEY.jpg, .jpeg, .png or .webp, and beside it KEY.json (an object, whose "label" counts), KEY.txt (a caption) and
KEY.cls (the label). They may be anywhere in the tar, and their names are never used as paths.

To the Loader an image is a clip of one frame; `mp4_offset`, `mp4_size` and `mp4_crc32` are those of the image file,
`json_offset` that of its .json, else of its .txt; `json_size` is 0 where it has neither. A key is made of the names of the
tar and of the file. What it gives up: EXIF rotation is ignored, and of an image with alpha only its colours are read.
"""

import hashlib
import json
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from isal import isal_zlib

from longtake.datasets import index, media, schema, storage
from longtake.datasets.annotations import label_of
from longtake.datasets.errors import UserError

MAX_PIXELS = 8192 * 8192
MAX_BYTES = 1 << 28  # of a sample's file; larger files are not read
REASONS = {
    "empty": "the file has no bytes",
    "not_a_picture": "it is no JPEG, PNG or WebP, whatever its name says",
    "unreadable": "it is damaged, or unfolds to more than 8192 x 8192 pixels",
    "too_large": "the file has more than 256 MB",
    "several_pictures": "it is animated, or several pictures in one file",
    "second_picture": "its sample has a picture already",
}

_BLOCK = 1 << 20
_PICTURES = ("jpg", "jpeg", "png", "webp")
_FORMATS = {b"\xff\xd8\xff": ("jpeg_pipe", "mjpeg"), b"\x89PNG": ("png_pipe",), b"RIFF": ("webp_pipe",)}
_DESCRIPTION = {"format": schema.FORMAT_VERSION, "kind": "images", "clip": {"short_side": 0, "fps": 1.0}}


@dataclass
class Counts:
    """The content of a split after `adopt`."""

    tars: int = 0
    new: int = 0  # tars indexed by this call
    images: int = 0
    odd: int = 0  # images with a file beside them that could not be used
    left_out: dict[str, int] = field(default_factory=dict)  # images by reason
    failed: dict[str, str] = field(default_factory=dict)  # the problem of each tar without an index, by URL


def adopt(folder: str, tars: Sequence[str] = (), val_fraction: float = 0.0, threads: int = 8) -> dict[str, Counts]:
    """Index each FOLDER/train/*.tar and FOLDER/val/*.tar that has no index yet; safe to run again, also with new tars.

    Each tar is read once from start to end, and each image is decoded. A damaged tar gets no index.

    Args:
        folder: URL of the dataset; dataset.json is written where there is none.
        tars: paths of local tars elsewhere, to be linked into the splits of a local folder first.
        val_fraction: share of `tars` that goes to val, chosen by their names.
        threads: tars read at once.

    Returns:
        The counts of each split.

    Raises:
        UserError: the folder has another dataset or no tar, or a tar has a name that cannot be used.
        Failure: an existing index is damaged.
    """
    url = storage.join(folder, "dataset.json")
    if storage.exists(url) and index.describe(folder).get("kind") != "images":
        raise UserError(f"{url}: a dataset of clips; give the images a folder of their own")
    for part in (*schema.SPLITS, "sources"):
        storage.sweep(storage.join(folder, part))
    _link(folder, tars, val_fraction)
    sizes = {split: _tars(folder, split) for split in schema.SPLITS}
    if not any(sizes.values()):
        raise UserError(f"{folder}: no tar here; put some into {storage.join(folder, 'train')}/, or name them")
    storage.write_if_absent(url, storage.canonical_json(_DESCRIPTION))
    indexed = {split: set(index.shard_names(folder, split)) for split in schema.SPLITS}
    new = [(split, name) for split in schema.SPLITS for name in sizes[split] if name not in indexed[split]]
    problems = _index_all(folder, new, sum(sizes[split][name] for split, name in new), threads)
    return {split: _count(folder, split, sizes[split], indexed[split], problems) for split in schema.SPLITS}


def _link(folder: str, tars: Sequence[str], val_fraction: float) -> None:
    """Link each tar into train or val, unless it is there already."""
    for tar in tars:
        if not (storage.is_local(tar) and storage.is_local(folder)):
            raise UserError(f"{tar}: only local tars can be linked, into a local folder; copy it into {folder}/train")
        source, root = Path(storage.absolute(tar)), Path(storage.absolute(folder))
        if not source.is_file():
            raise UserError(f"{tar}: no such tar")
        links = {split: root / split / f"{source.stem}.tar" for split in schema.SPLITS}
        existing = [link for link in links.values() if link.is_symlink() or link.exists()]
        if any(not (link.exists() and link.samefile(source)) for link in existing):
            raise UserError(f"{existing[0]}: another tar has the name of {tar}; rename one of them")
        if not existing:
            share = int.from_bytes(hashlib.sha256(source.stem.encode()).digest()[:4]) / 2**32
            link = links["val" if share < val_fraction else "train"]
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source)


def _tars(folder: str, split: str) -> dict[str, int]:
    """Bytes of the tars of a split by name, without those of cache columns."""
    fs, path = storage.filesystem(storage.join(folder, split))
    fs.invalidate_cache(path)
    try:
        entries = storage.retrying(path, lambda: fs.ls(path, detail=True))
    except FileNotFoundError:
        return {}
    files = {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in entries}
    sizes = {name[:-4]: size for name, size in sorted(files.items()) if name.endswith(".tar") and name[0] != "."}
    dotted = [name for name in sizes if "." in name and name.partition(".")[0] not in sizes]
    if dotted:
        url = storage.join(folder, split, f"{dotted[0]}.tar")
        raise UserError(
            f"{url}: a dot in the name marks a cache column; rename it to {dotted[0].replace('.', '_')}.tar"
        )
    return {name: size for name, size in sizes.items() if "." not in name}


def _index_all(folder: str, tars: Sequence[tuple[str, str]], total: int, threads: int) -> dict[str, str]:
    """Index tars, given as (split, name). Returns the problems of those that could not be indexed, by URL."""
    from tqdm import tqdm

    lock = threading.Lock()
    problems: dict[str, str] = {}
    with tqdm(desc="index", total=total, unit="B", unit_scale=True, disable=not tars) as bar:

        def progress(read: int) -> None:
            with lock:
                bar.update(read)

        def index_one(tar: tuple[str, str]) -> None:
            url = storage.join(folder, tar[0], f"{tar[1]}.tar")
            try:
                _index(folder, *tar, progress)
            except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as e:
                problems[url] = " ".join(str(e).split()) or type(e).__name__

        pool = ThreadPoolExecutor(threads)
        try:
            list(pool.map(index_one, tars))
        finally:
            # otherwise Ctrl-C would wait for all tars
            pool.shutdown(cancel_futures=True)
    return problems


def _count(folder: str, split: str, sizes: dict[str, int], before: set[str], problems: dict[str, str]) -> Counts:
    """The counts of a split from its committed tables, so that a second run has those of the first.

    `before` are the tars that had an index before this run, `problems` those of `_index_all`.
    """
    counts, reasons = Counts(), Counter[str]()
    for shard in index.read_shards(folder, split):
        url = storage.join(folder, split, f"{shard.name}.tar")
        if sizes.get(shard.name) != shard.tar_bytes:
            remedy = f"bring it back, or delete {split}/{shard.name}.parquet and index again"
            counts.failed[url] = f"is not what was indexed ({shard.tar_bytes} bytes then); {remedy}"
            continue
        sources = index.from_parquet(_sources_url(folder, split, shard.name), ["reason", "detail"])
        counts.tars, counts.new = counts.tars + 1, counts.new + (shard.name not in before)
        counts.images += len(shard.table)
        counts.odd += pc.sum(pc.and_(pc.is_null(sources["reason"]), pc.is_valid(sources["detail"]))).as_py() or 0
        reasons.update(sources["reason"].drop_null().to_pylist())
    prefix = storage.join(folder, split) + "/"
    counts.failed |= {url: problem for url, problem in sorted(problems.items()) if url.startswith(prefix)}
    counts.left_out = dict(sorted(reasons.items()))
    return counts


def _index(folder: str, split: str, name: str, progress: Callable[[int], None]) -> None:
    """Read a tar and commit it: its table of sources, then its index."""
    url = storage.join(folder, split, f"{name}.tar")
    fs, path = storage.filesystem(url)
    with fs.open(path, "rb") as file:
        reader = _Reader(file, progress)
        samples = _Samples(url, f"{split}/{name}.tar", split)
        for info, data in _members(reader):
            samples.add(info, data)
    rows = samples.rows()
    sources = index.to_parquet(index.rows_table(samples.sources, schema.SOURCES))
    storage.write(_sources_url(folder, split, name), sources)
    target = storage.join(folder, split, f"{name}.parquet")
    index.write_index(target, rows, schema.INDEX, reader.bytes, reader.digest.hexdigest())


def _sources_url(folder: str, split: str, name: str) -> str:
    return storage.join(folder, "sources", f"{split}-{name}.parquet")


class _Reader:
    """A file whose bytes are counted and hashed as they are read."""

    def __init__(self, file: Any, progress: Callable[[int], None]) -> None:
        self.file, self.progress, self.bytes, self.digest = file, progress, 0, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        self.bytes += len(data)
        self.progress(len(data))
        return data


class _Header(tarfile.TarInfo):
    """A header that must be valid: tarfile takes a damaged or missing one for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        if len(buf) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("cut short: it ends without an end mark")
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as e:
            if any(buf):
                raise tarfile.ReadError(f"not a tar, or damaged: {e}") from e
            raise


def _members(reader: _Reader) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """The files of a tar that may belong to a sample, and their bytes, None for more than MAX_BYTES.

    Raises:
        tarfile.TarError: the tar is damaged; do not use the files before it either.
    """
    endings = (*_PICTURES, "json", "txt", "cls")
    options: dict[str, Any] = {"bufsize": _BLOCK, "tarinfo": _Header, "encoding": "utf-8", "errors": "surrogateescape"}
    with tarfile.open(fileobj=reader, mode="r|", **options) as tar:  # type: ignore[call-overload]
        while info := tar.next():
            tar.members = []
            # a sparse file is not in one piece
            if info.isreg() and not info.issparse() and _key_and_ending(info)[1] in endings:
                yield info, tar.extractfile(info).read() if info.size <= MAX_BYTES else None
    while reader.read(_BLOCK):
        pass


def _key_and_ending(info: tarfile.TarInfo) -> tuple[str, str]:
    """A file's key and ending, as in webdataset: the name up to the first dot of its last part, and the rest."""
    folder, slash, last = info.name.rpartition("/")
    stem, _, ending = last.partition(".")
    return f"{folder}{slash}{stem}", ending.lower() if stem else ""


@dataclass
class _Sample:
    """The files of a sample so far."""

    picture: dict[str, Any] | None = None  # its row of the index, without the columns that the other files give
    source: dict[str, Any] = field(default_factory=dict)  # its row of the sources
    places: dict[str, dict[str, int]] = field(default_factory=dict)  # offset, size and CRC-32 of its json and txt
    labels: dict[str, str] = field(default_factory=dict)  # by the ending of the file that has it
    odd: list[str] = field(default_factory=list)  # problems with its other files


class _Samples:
    """The samples of a tar, filled file by file."""

    def __init__(self, url: str, place: str, split: str) -> None:
        self.url, self.place, self.split = url, place, split
        self.sources: list[dict[str, Any]] = []
        self._by_key: dict[str, _Sample] = {}

    def add(self, info: tarfile.TarInfo, data: bytes | None) -> None:
        key, ending = _key_and_ending(info)
        sample = self._by_key.setdefault(key, _Sample())
        if ending in _PICTURES:
            self._add_picture(sample, info, data)
        elif ending in sample.places | sample.labels:
            sample.odd.append(f"a second .{ending}")
        elif data is None:
            sample.odd.append(f"its .{ending} is too large")
        else:
            _add_text(sample, ending, info.offset_data, data)

    def _add_picture(self, sample: _Sample, info: tarfile.TarInfo, data: bytes | None) -> None:
        source = hashlib.sha256(f"{self.place}/{info.name}".encode(errors="surrogateescape")).hexdigest()[:20]
        account = dict.fromkeys(schema.SOURCES.names) | {
            "source": source,
            "uri": _printable(f"{self.url}/{info.name}"),
            "bytes": info.size,
            "split": self.split,
            "clips": 0,
        }
        self.sources.append(account)
        try:
            if sample.picture:
                raise Rejected("second_picture")
            if data is None:
                raise Rejected("too_large")
            codec, height, width = picture(data)
        except Rejected as e:
            account |= {"status": "rejected", "reason": e.reason, "detail": e.detail}
            return
        account |= {"status": "good", "codec": codec, "width": width, "height": height, "frames_decoded": 1, "clips": 1}
        sample.source = account
        sample.picture = dict.fromkeys(schema.INDEX.names) | {
            "key": f"{source}-00000",
            "source": source,
            "clip": 0,
            **_place("mp4", info.offset_data, data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "first_frame": 0,
            "start_seconds": 0.0,
            "frame_count": 1,
            "fps": 1.0,
            "width": width,
            "height": height,
        }

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the index, once all files are added; completes `sources`."""
        out = []
        for sample in self._by_key.values():
            if sample.picture:
                text = sample.places.get("json") or sample.places.get("txt") or _place("json", 0, b"")
                label = sample.labels.get("cls", sample.labels.get("json"))
                sample.source["detail"] = "; ".join(sample.odd) or None
                out.append(sample.picture | text | {"label": label})
        return out


def _add_text(sample: _Sample, ending: str, offset: int, data: bytes) -> None:
    if ending == "cls":
        if text := data.decode("utf-8", "replace").strip():
            sample.labels["cls"] = text
        return
    # readers tell an object from a caption by its first character
    is_object = data.lstrip()[:1] == b"{"
    if ending == "json":
        try:
            label = label_of(json.loads(data)) if is_object else None
        except (ValueError, RecursionError):
            is_object = False
        else:
            if label is not None:
                sample.labels["json"] = _printable(label)
    if is_object != (ending == "json"):
        sample.odd.append("its .txt begins as JSON does" if is_object else "its .json is not an object")
        return
    sample.places[ending] = _place("json", offset, data)


def _place(prefix: str, offset: int, data: bytes) -> dict[str, int]:
    return {f"{prefix}_offset": offset, f"{prefix}_size": len(data), f"{prefix}_crc32": isal_zlib.crc32(data)}


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


class Rejected(Exception):
    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail or REASONS[reason]


def picture(data: bytes) -> tuple[str, int, int]:
    """Codec, height and width of an image, decoded as the Loader does it. Raises Rejected."""
    import av

    if not data:
        raise Rejected("empty")
    # only the formats that the Loader reads: FFmpeg could open more
    formats = next((names for magic, names in _FORMATS.items() if data.startswith(magic)), ())
    if not formats or (formats[0] == "webp_pipe" and data[8:12] != b"WEBP"):
        raise Rejected("not_a_picture")
    if formats[0] == "webp_pipe" and data[12:16] == b"VP8X" and data[20:21] and data[20] & 2:
        raise Rejected("several_pictures")
    limit = {"max_pixels": str(MAX_PIXELS)}
    try:
        # opening decodes too, where the header is not enough
        with media.opened(data, **limit) as container:
            stream = container.streams.video[0]
            if container.format.name == "apng":
                raise Rejected("several_pictures")
            if container.format.name not in formats:
                raise Rejected("not_a_picture")
            stream.codec_context.thread_count = 1
            # without it the missing half of a JPEG would be grey
            stream.codec_context.options = {**limit, "err_detect": "explode"}
            frames = [(frame.height, frame.width) for frame, _ in zip(container.decode(stream), range(2), strict=False)]
    except (av.error.FFmpegError, ArithmeticError, IndexError, TypeError, ValueError) as e:
        raise Rejected("unreadable", f"{REASONS['unreadable']} ({e})") from e
    if len(frames) != 1:
        raise Rejected("several_pictures" if frames else "unreadable")
    return stream.codec_context.name, *frames[0]
