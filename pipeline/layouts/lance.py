"""Lance: one dataset `clips.lance`, a row a clip with its mp4 as a blob, its captions, label, sizes and scores.

A score is `scores.NAME.FIELD` in a filter, a vector a list of a fixed size that can be searched. Each shard becomes fragments,
whose description is a file beside the dataset until all are there; then one commit makes the dataset of them.
"""

import contextlib
import io
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from longtake.datasets import schema, storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.scores import Field
from longtake.pipeline.layouts.chosen import Chosen, clips_of, fields_of, place_of, state_of, texts_of
from longtake.pipeline.tables import ROW_BYTES

_DATASET = "clips.lance"
_FRAGMENTS = "fragments"  # beside the dataset, one JSON a shard
_FORMAT = "2.1"  # with blobs that every Lance since 0.20 opens
_BATCH_BYTES = 32 << 20  # of mp4 in memory
_ROWS = "rows.jsonl"  # what a dataset has, written when all its videos are unpacked, below a line with its state
_VIDEOS = ("video", "mp4", "video_bytes", "video_blob", "blob", "bytes")
_TEXTS = ("caption", "text", "prompt")
_EXTERNAL = 3  # the kind of a blob that is a file elsewhere


def _lance() -> Any:
    try:
        import lance
        import lance.fragment
    except ImportError as e:
        raise UserError("lance: the package pylance is missing; run: pip install 'longtake[curation]'") from e
    return lance


def check(chosen: Chosen) -> None:
    """Raise UserError where Lance is not installed."""
    _lance()


def _schema(chosen: Chosen) -> pa.Schema:
    fields = [
        pa.field("key", pa.string()),
        pa.field("split", pa.string()),
        pa.field("source", pa.string()),
        pa.field("label", pa.string()),
        pa.field("caption", pa.string()),
        schema.CAPTION_INDEX.field("captions"),
        *(pa.field(name, pa.float64()) for name in ("fps", "seconds")),
        *(pa.field(name, pa.int32()) for name in ("frame_count", "width", "height")),
        *(pa.field(name, pa.float32()) for name in schema.SCORES),
        pa.field("video", pa.large_binary(), metadata={"lance-encoding:blob": "true"}),
    ]
    scored = [
        pa.field(name, pa.struct([(each.name, _type(each)) for each in several]))
        for name, several in fields_of(chosen, vectors=True).items()
    ]
    return pa.schema([*fields, *([pa.field("scores", pa.struct(scored))] if scored else [])])


def _type(field: Field) -> pa.DataType:
    if field.kind == "vector":
        # indexes are built over lists of a fixed size
        return pa.list_(pa.float16(), field.width) if field.count is None else pa.list_(pa.list_(pa.float16()))
    return field.type


def _fragments(chosen: Chosen, split: str, number: int, folder: Path) -> Path:
    return folder / _FRAGMENTS / f"{split}-{chosen.bases[split].name(number)}.json"


def _is_whole(folder: Path) -> bool:
    return any((folder / _DATASET / "_versions").glob("*.manifest"))


def exported(chosen: Chosen, split: str, number: int, folder: Path) -> bool:
    """Whether a shard is there, or the whole."""
    return _is_whole(folder) or _fragments(chosen, split, number, folder).exists()


def export(chosen: Chosen, split: str, number: int, folder: Path) -> None:
    """Write the fragments of a shard, and their description last. Raises Failure: see `clips_of`."""
    kind, broken = _schema(chosen), list[Exception]()

    def batches() -> Iterator[pa.RecordBatch]:
        try:
            yield from filled()
        except (UserError, Failure) as e:
            broken.append(e)
            raise

    def filled() -> Iterator[pa.RecordBatch]:
        rows, size = [], 0
        for mp4, facts in clips_of(chosen, split, number, vectors=True):
            rows.append(facts | {"caption": next(iter(texts_of(facts)), None), "video": mp4})
            size += len(mp4)
            if size >= _BATCH_BYTES:
                yield pa.RecordBatch.from_pylist(rows, schema=kind)
                rows, size = [], 0
        if rows:
            yield pa.RecordBatch.from_pylist(rows, schema=kind)

    reader = pa.RecordBatchReader.from_batches(kind, batches())
    try:
        made = _lance().fragment.write_fragments(
            reader, str(folder / _DATASET), kind, mode="create", data_storage_version=_FORMAT
        )
    except OSError:
        if broken:
            # which Lance puts into a stack trace
            raise broken[0] from None
        raise
    plain = [fragment.to_json() for fragment in made]
    storage.write(str(_fragments(chosen, split, number, folder)), json.dumps(plain).encode())


def finish(chosen: Chosen, folder: Path) -> None:
    """Commit the fragments of all shards as one dataset, in the order of the shards; what a stopped command left goes."""
    if not _is_whole(folder):
        lance, to = _lance(), folder / _DATASET
        plain = [
            each
            for split, number, _ in chosen.shards()
            for each in json.loads(_fragments(chosen, split, number, folder).read_bytes())
        ]
        named = {file["path"] for each in plain for file in each["files"]}
        for path in (to / "data").iterdir():
            if path.name not in named:
                path.unlink()
        for name in ("_transactions", "_versions"):
            shutil.rmtree(to / name, ignore_errors=True)  # of a commit that was killed
        fragments = [lance.FragmentMetadata.from_json(json.dumps(each)) for each in plain]
        lance.LanceDataset.commit(str(to), lance.LanceOperation.Overwrite(_schema(chosen), fragments))
    shutil.rmtree(folder / _FRAGMENTS, ignore_errors=True)


def rows(folder: Path, beside: Path) -> Iterator[dict[str, Any]]:
    """A row for each video in the Lance datasets below a folder, or in the one that it is; they are unpacked to `beside`.

    Raises UserError: a dataset is none, refers to files outside it, or has no column of videos.
    """
    datasets = sorted(path.parent for path in folder.rglob("_versions") if path.is_dir())
    for path in datasets:
        to, state = place_of(beside, folder, path), state_of((path / "_versions").iterdir())
        if not (to / _ROWS).exists() or _first_line(to) != state:
            shutil.rmtree(to, ignore_errors=True)  # of a stopped command, or of another version
            to.mkdir(parents=True)
            with _readable(path), (to / "rows").open("w") as file:
                file.write(state + "\n")
                for row in _unpacked(path, to):
                    file.write(json.dumps(row) + "\n")
            (to / "rows").replace(to / _ROWS)
        with (to / _ROWS).open() as file:
            for line in itertools.islice(file, 1, None):
                row = json.loads(line)
                yield row | {"uri": str((to / row["uri"]).absolute())}


def _first_line(to: Path) -> str:
    with (to / _ROWS).open() as file:
        return file.readline().rstrip("\n")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn the errors of a damaged dataset into one line."""
    try:
        yield
    except UserError:
        raise
    except BaseException as e:
        # where a damaged file trips Lance up, what comes is no Exception
        if not isinstance(e, pa.ArrowException | ValueError | OSError | RuntimeError | KeyError) and (
            type(e).__name__ != "PanicException"
        ):
            raise
        message = storage.printable(" ".join(str(e).split()))[:300]
        raise UserError(f"{path}: not a readable Lance dataset ({message}); copy it again") from e


def _unpacked(path: Path, to: Path) -> Iterator[dict[str, Any]]:
    """Write each video of a dataset to a file; yields its row."""
    found = _opened(path)
    video = _video_column(path, found.schema)
    names = [name for name in ("captions", "label", *_TEXTS) if name in found.schema.names]
    blob = not _is_bytes(found.schema.field(video)) or _is_blob(found.schema.field(video))
    place = 0
    # a value of a plain column is in memory as a whole, so one at a time
    for batch in found.to_batches(columns=[video, *names], with_row_id=True, batch_size=256 if blob else 1):
        batch.validate(full=True)
        for number, data in _videos(path, found, video, batch) if blob else _plain(batch[video]):
            # a name of ours: theirs may lead anywhere
            name = f"{place + number:08d}.mp4"
            with (to / name).open("wb") as file:
                shutil.copyfileobj(data, file, 1 << 20)
            yield {"uri": name} | _said(path, place + number, {each: batch[each][number].as_py() for each in names})
        place += len(batch)


def _opened(path: Path) -> Any:
    """A dataset all of whose files are its own."""
    lance = _lance()
    if link := next((each for each in path.rglob("*") if each.is_symlink()), None):
        raise UserError(f"{link}: is a link; copy the dataset without links")
    found = lance.dataset(str(path.resolve()))
    files = [file for fragment in found.get_fragments() for file in fragment.data_files()]
    outside = [file for file in files if file.base_id is not None or "/" in file.path or "\\" in file.path]
    if outside or found.base_paths():
        raise UserError(f"{path}: refers to files outside it; write it again as one dataset")
    return found


def _video_column(path: Path, kind: pa.Schema) -> str:
    """The column with the videos: the only one with bytes, or one of a usual name."""
    there = [field.name for field in kind if _is_bytes(field) or _is_blob(field)]
    named = [name for name in _VIDEOS if name in there]
    if len(there) == 1 or named:
        return (named or there)[0]
    several = f"several columns of bytes ({', '.join(there)})" if there else "no column of bytes"
    raise UserError(f"{path}: has {storage.printable(several)[:200]}; call the one with videos `video`")


def _is_bytes(field: pa.Field) -> bool:
    return pa.types.is_large_binary(field.type) or pa.types.is_binary(field.type)


def _is_blob(field: pa.Field) -> bool:
    later = getattr(field.type, "extension_name", "") == "lance.blob.v2"
    return later or (field.metadata or {}).get(b"lance-encoding:blob") == b"true"


def _videos(path: Path, found: Any, video: str, batch: pa.RecordBatch) -> Iterator[tuple[int, Any]]:
    """Place and file of each blob of a batch that has bytes."""
    places = []
    for number, facts in enumerate(batch[video].to_pylist()):
        if facts and (facts.get("kind") == _EXTERNAL or facts.get("blob_uri")):
            raise UserError(f"{path}: {video} refers to a file outside it; write it again with the videos in it")
        if facts and facts["size"]:
            places.append(number)
    blobs = found.take_blobs(video, ids=[batch["_rowid"][number].as_py() for number in places]) if places else []
    for number, blob in zip(places, blobs, strict=True):
        with blob:
            yield number, blob


def _plain(values: pa.Array) -> Iterator[tuple[int, Any]]:
    for number, value in enumerate(values):
        if value.is_valid and len(value.as_buffer()):
            yield number, io.BytesIO(value.as_buffer())


def _said(path: Path, number: int, facts: dict[str, Any]) -> dict[str, Any]:
    """What a row says of its video, as columns of a manifest."""
    row: dict[str, Any] = {}
    if said := facts.get("captions"):
        row["captions"] = said
    elif text := next((facts[each] for each in _TEXTS if facts.get(each)), None):
        row["caption"] = text
    if facts.get("label") not in (None, ""):
        row["label"] = str(facts["label"])
    try:
        size = len(json.dumps(row))
    except (TypeError, ValueError) as e:
        raise UserError(f"{path}: row {number}: captions and label are no texts ({e}); correct them") from e
    if size > ROW_BYTES:
        raise UserError(f"{path}: row {number}: its captions have {size} bytes; {ROW_BYTES} are allowed")
    return row
