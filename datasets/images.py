"""Plain WebDataset tars of images as a dataset: indexed where they lie, unchanged, and read by the Loader beside clips.

The dataset is a folder with train/NAME.tar and val/NAME.tar. In a tar the files whose names agree up to the first dot are a
sample, wherever they lie: KEY.jpg, .jpeg, .png or .webp, and beside it KEY.json (an object, whose "label" counts), KEY.txt
(a caption) and KEY.cls (the label). Names are never used as paths.

To the Loader an image is a clip of one frame; `mp4_offset` and its like place the file of the image. `json_offset` places its
.json, else its .txt; `json_size` is 0 where it has neither. A key is made of the names of the tar and of the file.
What it gives up: the turn that EXIF asks for is not made, and of alpha only the colours below it are seen.
"""

import hashlib
import json
import tarfile
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from longtake.datasets import index, media, schema, storage
from longtake.datasets.annotations import label_of
from longtake.datasets.errors import UserError

MAX_PIXELS = 8192 * 8192
MAX_BYTES = 1 << 28  # of a file of a sample; what is larger is not read
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
    """What a split holds after `adopt`: so many tars, of which some are new, and their images."""

    tars: int = 0
    new: int = 0
    images: int = 0
    odd: int = 0  # of the images: something beside them could not be used
    left_out: dict[str, int] = field(default_factory=dict)  # images by reason
    failed: dict[str, str] = field(default_factory=dict)  # tars without an index, by URL: what is wrong


def adopt(folder: str, tars: Sequence[str] = (), val_fraction: float = 0.0, threads: int = 8) -> dict[str, Counts]:
    """Index each FOLDER/train/*.tar and FOLDER/val/*.tar that has no index yet; safe to run again, and when tars come.

    Each tar is read once from its beginning to its end, and each image is decoded. A damaged tar gets no index.

    Args:
        folder: URL of the dataset; dataset.json is written where there is none.
        tars: paths of local tars that lie elsewhere, to be linked into the splits of a local folder first.
        val_fraction: of these tars, chosen by their names, to go to val.
        threads: tars read at once.

    Returns:
        The counts of each split.

    Raises:
        UserError: the folder holds another dataset or no tar, or a tar's name will not do.
        Failure: an index that is there already is damaged.
    """
    _check(folder)
    for part in (*schema.SPLITS, "sources"):
        storage.sweep(storage.join(folder, part))
    _link(folder, tars, val_fraction)
    sizes = {split: _tars(folder, split) for split in schema.SPLITS}
    if not any(sizes.values()):
        raise UserError(f"{folder}: no tar here; put some into {storage.join(folder, 'train')}/, or name them")
    storage.write_if_absent(storage.join(folder, "dataset.json"), storage.canonical_json(_DESCRIPTION))
    have = {split: set(index.shard_names(folder, split)) for split in schema.SPLITS}
    new = [(split, name) for split in schema.SPLITS for name in sizes[split] if name not in have[split]]
    failed = _index_all(folder, new, sum(sizes[split][name] for split, name in new), threads)
    return {split: _count(folder, split, sizes[split], have[split], failed) for split in schema.SPLITS}


def _check(folder: str) -> None:
    url = storage.join(folder, "dataset.json")
    if storage.exists(url) and index.describe(folder).get("kind") != "images":
        raise UserError(f"{url}: a dataset of clips; give the images a folder of their own")


def _link(folder: str, tars: Sequence[str], val_fraction: float) -> None:
    for tar in tars:
        if not (storage.is_local(tar) and storage.is_local(folder)):
            raise UserError(f"{tar}: only local tars can be linked, into a local folder; copy it into {folder}/train")
        source, root = Path(storage.absolute(tar)), Path(storage.absolute(folder))
        if not source.is_file():
            raise UserError(f"{tar}: no such tar")
        places = {split: root / split / f"{source.stem}.tar" for split in schema.SPLITS}
        taken = [place for place in places.values() if place.is_symlink() or place.exists()]
        if any(not (place.exists() and place.samefile(source)) for place in taken):
            raise UserError(f"{taken[0]}: another tar has the name of {tar}; rename one of them")
        if not taken:
            share = int.from_bytes(hashlib.sha256(source.stem.encode()).digest()[:4]) / 2**32
            place = places["val" if share < val_fraction else "train"]
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(source)


def _tars(folder: str, split: str) -> dict[str, int]:
    """Names and bytes of the tars of a split; those of cache columns are not among them."""
    fs, path = storage.filesystem(storage.join(folder, split))
    fs.invalidate_cache(path)
    try:
        entries = storage.retrying(path, lambda: fs.ls(path, detail=True))
    except FileNotFoundError:
        return {}
    files = {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in entries}
    found = {name[:-4]: size for name, size in sorted(files.items()) if name.endswith(".tar") and name[0] != "."}
    dotted = [name for name in found if "." in name and name.partition(".")[0] not in found]
    if dotted:
        url = storage.join(folder, split, f"{dotted[0]}.tar")
        raise UserError(
            f"{url}: a dot in the name marks a cache column; rename it to {dotted[0].replace('.', '_')}.tar"
        )
    return {name: size for name, size in found.items() if "." not in name}


def _index_all(folder: str, tars: Sequence[tuple[str, str]], total: int, threads: int) -> dict[str, str]:
    """Index tars, given as (split, name). Returns what is wrong with those that could not be, by URL."""
    from tqdm import tqdm

    lock = threading.Lock()
    failed: dict[str, str] = {}
    with tqdm(desc="index", total=total, unit="B", unit_scale=True, disable=not tars) as bar:

        def tell(read: int) -> None:
            with lock:
                bar.update(read)

        def one(tar: tuple[str, str]) -> None:
            url = storage.join(folder, tar[0], f"{tar[1]}.tar")
            try:
                _index(folder, *tar, tell)
            except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as e:
                failed[url] = " ".join(str(e).split()) or type(e).__name__

        pool = ThreadPoolExecutor(threads)
        try:
            list(pool.map(one, tars))
        finally:
            # else Ctrl-C would wait for all tars
            pool.shutdown(cancel_futures=True)
    return failed


def _count(folder: str, split: str, sizes: dict[str, int], before: set[str], failed: dict[str, str]) -> Counts:
    """The counts of a split, from what is committed: those of a second run are those of the first."""
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
    ours = storage.join(folder, split) + "/"
    counts.failed |= {url: why for url, why in sorted(failed.items()) if url.startswith(ours)}
    counts.left_out = dict(sorted(reasons.items()))
    return counts


def _index(folder: str, split: str, name: str, tell: Callable[[int], None]) -> None:
    """Read a tar and commit it: its table of sources, then its index."""
    url = storage.join(folder, split, f"{name}.tar")
    fs, path = storage.filesystem(url)
    with fs.open(path, "rb") as file:
        reader = _Reader(file, tell)
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
    """A file as it passes by: its bytes are counted and hashed."""

    def __init__(self, file: Any, tell: Callable[[int], None]) -> None:
        self.file, self.tell, self.bytes, self.digest = file, tell, 0, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        self.bytes += len(data)
        self.tell(len(data))
        return data


class _Header(tarfile.TarInfo):
    """A header that has to be right: tarfile takes a damaged or missing one for the end of the archive."""

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
    """The files of a tar that may belong to a sample and their bytes, None where they are too many.

    Raises:
        tarfile.TarError: the tar is damaged; what came before is of no use then.
    """
    wanted = (*_PICTURES, "json", "txt", "cls")
    options: dict[str, Any] = {"bufsize": _BLOCK, "tarinfo": _Header, "encoding": "utf-8", "errors": "surrogateescape"}
    with tarfile.open(fileobj=reader, mode="r|", **options) as tar:  # type: ignore[call-overload]
        while info := tar.next():
            tar.members = []
            # a sparse file does not lie there in one piece
            if info.isreg() and not info.issparse() and _name(info)[1] in wanted:
                yield info, tar.extractfile(info).read() if info.size <= MAX_BYTES else None
    while reader.read(_BLOCK):
        pass


def _name(info: tarfile.TarInfo) -> tuple[str, str]:
    """A file's key and ending as webdataset takes them: all up to the first dot of the last part, and all after it."""
    folder, slash, last = info.name.rpartition("/")
    stem, _, ending = last.partition(".")
    return f"{folder}{slash}{stem}", ending.lower() if stem else ""


@dataclass
class _Sample:
    """What was found of a sample so far."""

    picture: dict[str, Any] | None = None  # its row of the index, but for what the other files say
    source: dict[str, Any] = field(default_factory=dict)
    places: dict[str, dict[str, int]] = field(default_factory=dict)  # of its json and txt
    labels: dict[str, str] = field(default_factory=dict)  # by the file that says so
    odd: list[str] = field(default_factory=list)


class _Samples:
    """The samples of a tar, filled file by file."""

    def __init__(self, url: str, place: str, split: str) -> None:
        self.url, self.place, self.split = url, place, split
        self.sources: list[dict[str, Any]] = []
        self._found: dict[str, _Sample] = {}

    def add(self, info: tarfile.TarInfo, data: bytes | None) -> None:
        key, ending = _name(info)
        sample = self._found.setdefault(key, _Sample())
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
                raise _Rejected("second_picture")
            if data is None:
                raise _Rejected("too_large")
            codec, height, width = picture(data)
        except _Rejected as e:
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
        """Rows of the index, once all files are in; completes `sources`."""
        out = []
        for sample in self._found.values():
            if sample.picture:
                text = sample.places.get("json") or sample.places.get("txt") or _place("json", 0, b"")
                label = sample.labels.get("cls", sample.labels.get("json"))
                sample.source["detail"] = "; ".join(sample.odd) or None
                out.append(sample.picture | text | {"label": label})
        return out


def _add_text(sample: _Sample, ending: str, offset: int, data: bytes) -> None:
    if ending == "cls":
        if label := data.decode("utf-8", "replace").strip():
            sample.labels["cls"] = label
        return
    # by its first letter the reader tells an object from a caption
    is_object = data.lstrip()[:1] == b"{"
    if ending == "json":
        try:
            said = label_of(json.loads(data)) if is_object else None
        except (ValueError, RecursionError):
            is_object = False
        else:
            if said is not None:
                sample.labels["json"] = _printable(said)
    if is_object != (ending == "json"):
        sample.odd.append("its .txt begins as JSON does" if is_object else "its .json is not an object")
        return
    sample.places[ending] = _place("json", offset, data)


def _place(prefix: str, offset: int, data: bytes) -> dict[str, int]:
    return {f"{prefix}_offset": offset, f"{prefix}_size": len(data), f"{prefix}_crc32": zlib.crc32(data)}


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


class _Rejected(Exception):
    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail or REASONS[reason]


def picture(data: bytes) -> tuple[str, int, int]:
    """Decode an image as the Loader will: its codec, height and width. Raises _Rejected."""
    import av

    if not data:
        raise _Rejected("empty")
    # these alone, which the Loader reads; FFmpeg could open more
    formats = next((names for magic, names in _FORMATS.items() if data.startswith(magic)), ())
    if not formats or (formats[0] == "webp_pipe" and data[8:12] != b"WEBP"):
        raise _Rejected("not_a_picture")
    if formats[0] == "webp_pipe" and data[12:16] == b"VP8X" and data[20:21] and data[20] & 2:
        raise _Rejected("several_pictures")
    limit = {"max_pixels": str(MAX_PIXELS)}
    try:
        # opening decodes too, where the header does not say all
        with media.opened(data, **limit) as container:
            stream = container.streams.video[0]
            if container.format.name == "apng":
                raise _Rejected("several_pictures")
            if container.format.name not in formats:
                raise _Rejected("not_a_picture")
            stream.codec_context.thread_count = 1
            # without it the missing half of a JPEG is grey
            stream.codec_context.options = {**limit, "err_detect": "explode"}
            frames = [(frame.height, frame.width) for frame, _ in zip(container.decode(stream), range(2), strict=False)]
    except (av.error.FFmpegError, ArithmeticError, IndexError, TypeError, ValueError) as e:
        raise _Rejected("unreadable", f"{REASONS['unreadable']} ({e})") from e
    if len(frames) != 1:
        raise _Rejected("several_pictures" if frames else "unreadable")
    return stream.codec_context.name, *frames[0]
