"""What the page looks through, in memory: every clip's facts and scores as arrays, its labels as codes, the views.

A row is the number of a clip: those of train in the order of the shards, then those of val.
"""

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longtake.datasets import captions, compact, index, schema, score_columns, storage
from longtake.datasets import view as views
from longtake.datasets.errors import UserError
from longtake.datasets.masking import shown as masked
from longtake.infra import sqlite_store
from longtake.infra.browse import columns
from longtake.infra.browse.columns import Shown

NOT_THERE = "not in the view"  # clips that came after it

_PLACES = ("key", "shard", "mp4_offset", "mp4_size", "mp4_crc32", "first_frame", "start_seconds", "fps")
_FACTS = {
    "seconds": "length in seconds",
    "frame_count": "length in frames",
    "width": "pixels",
    "height": "pixels",
}
_SCORES = {
    "motion": "mean change of luma from frame to frame, 0 to 1",
    "still": "share of frames that hardly differ from the one before",
    "brightness": "mean luma, 0 black to 1 white",
    "contrast": "mean deviation of luma inside a frame, 0 to 1",
    "sharpness": "mean Laplacian of luma, 0 to 1",
    "saturation": "mean distance of chroma from grey, 0 to 1",
    "dark": "share of pixels that are nearly black",
    "letterbox": "share of the picture that is black bars",
}
_LABELS = {"split": "train or val", "label": "the source's class in the manifest"}
_TEXTS = {"source": "the address of the source", "caption": "one of the clip's captions"}


@dataclass(frozen=True)
class Number:
    """A number of each clip: (N,) float32 or float64, NaN where a clip has none."""

    meaning: str
    values: np.ndarray


@dataclass(frozen=True)
class Label:
    """One of some texts for each clip: (N,) int32 places in `names`, -1 where a clip has none."""

    meaning: str
    codes: np.ndarray
    names: tuple[str, ...]

    @cached_property
    def counts(self) -> np.ndarray:
        """(len(names),) clips of each."""
        return np.bincount(self.codes[self.codes >= 0], minlength=len(self.names))

    @cached_property
    def ranks(self) -> np.ndarray:
        """(len(names),) place of each in the order of the alphabet."""
        return np.argsort(np.argsort(np.array(self.names, object)))


@dataclass(frozen=True)
class Text:
    """Some texts for each clip: those of clip n are `texts[k]` for k where `rows[k]` is n; `rows` ascends."""

    meaning: str
    rows: np.ndarray
    texts: pa.Array


@dataclass(frozen=True)
class View:
    """Why clips are left out: (N,) int32 places in `reasons`, -1 where a clip is kept."""

    name: str
    uri: str
    codes: np.ndarray
    reasons: tuple[str, ...]

    @cached_property
    def keep(self) -> np.ndarray:
        """(N,) bool."""
        return self.codes < 0


@dataclass
class Library:
    """A dataset, as the page shows it.

    dataset  URL
    digests  of the splits' base shards when they were read (see `compact.Rows`)
    places   a row a clip: where its bytes are
    source   (N,) codes and addresses of the sources
    fields   numbers and labels by name
    texts    by name: "caption" where there are any
    views    by name; replaced as a whole where the page saves one, since other threads go through them
    shown    the columns of scores
    """

    dataset: str
    digests: Mapping[str, str]
    places: pa.Table
    source: Label
    fields: Mapping[str, Number | Label]
    texts: Mapping[str, Text]
    views: Mapping[str, View]
    shown: Shown

    @property
    def clips(self) -> int:
        return len(self.places)

    @cached_property
    def name(self) -> str:
        return self.dataset.rstrip("/").rsplit("/", 1)[-1]

    def row_of(self, key: str) -> int:
        """The row of a clip. Raises KeyError where there is no such clip."""
        # a scan of a million keys takes 2 ms, a dictionary of them 200 MB
        row = pc.index(self.places["key"], key).as_py()
        if row < 0:
            raise KeyError(key)
        return int(row)

    def place(self, row: int) -> dict[str, Any]:
        """Where the bytes of a clip are."""
        return {name: column[row].as_py() for name, column in zip(_PLACES, self.places.columns, strict=True)}


def load(dataset: str, names: Sequence[str] | None = None, records: Sequence[str] = (columns.ALL,)) -> Library:
    """Read a dataset's indexes, scores, captions and views; no video is read.

    Args:
        names: of the views, or their URLs; None: all that are beside the shards.
        records: of the scores (see `columns.shown`).

    Raises:
        UserError: there is no such dataset, view or record, or the dataset has no clip.
        Failure: an index or a column is damaged.
    """
    index.describe(dataset)
    dataset = storage.absolute(dataset)
    bases = {split: compact.open_split(dataset, split)[0] for split in schema.SPLITS}
    tables = {split: compact.rows_of(base) for split, base in bases.items()}
    clips = pa.concat_tables(tables.values()).combine_chunks()
    if not len(clips):
        raise UserError(f"{dataset}: has no clips; run its `shard` stage")
    splits = np.repeat(np.arange(len(tables), dtype=np.int32), [len(table) for table in tables.values()])
    fields: dict[str, Number | Label] = {"split": Label(_LABELS["split"], splits, tuple(tables))}
    fields["label"] = label_of(clips["label"], _LABELS["label"])
    seconds = np.asarray(clips["frame_count"]) / np.asarray(clips["fps"])
    fields |= {
        name: Number(meaning, seconds if name == "seconds" else number_of(clips[name]))
        for name, meaning in (_FACTS | _SCORES).items()
    }
    digests = {split: base.digest for split, base in bases.items()}
    shown = columns.shown(dataset, digests, records)
    return Library(
        dataset=dataset,
        digests=digests,
        places=clips.select(_PLACES),
        source=_sources(dataset, clips["source"]),
        fields=fields | _scores(bases, shown),
        texts=_captions(dataset, clips["key"]),
        views={view.name: view for view in _views(dataset, clips["key"], names)},
        shown=shown,
    )


def _scores(bases: Mapping[str, compact.Rows], shown: Shown) -> dict[str, Number | Label]:
    """The numbers and labels of the columns, by NAME.FIELD."""
    kinds = {
        f"{name}.{one.name}": one
        for name, column in shown.columns.items()
        for one in column.fields
        if one.kind != "vector"
    }
    names = {name: column.column for name, column in shown.columns.items()}
    parts = [score_columns.table(base.dataset, split, names, set(kinds), base) for split, base in bases.items()]
    table = pa.concat_tables(parts)
    return {
        name: Number(one.meaning, number_of(table[name]))
        if one.kind == "number"
        else label_of(table[name], one.meaning)
        for name, one in kinds.items()
    }


def number_of(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) float32 for what fits it, NaN for nulls."""
    wide = pa.float32() if column.type in (pa.float32(), pa.int32()) else pa.float64()
    return np.asarray(column.cast(wide, safe=False).to_numpy(zero_copy_only=False))


def label_of(column: pa.ChunkedArray, meaning: str) -> Label:
    encoded = pc.dictionary_encode(column.cast(pa.string())).combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.unify_dictionaries().combine_chunks()
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
    return Label(meaning, codes, tuple(encoded.dictionary.to_pylist()))


def _sources(dataset: str, column: pa.ChunkedArray) -> Label:
    """The address of each clip's source, without passwords."""
    label = label_of(column, _TEXTS["source"])
    table = index.read_sources(dataset)
    good = table.filter(pc.equal(table["status"], "good"))
    addresses = dict(zip(good["source"].to_pylist(), good["uri"].to_pylist(), strict=True))
    names = tuple(masked(storage.printable(addresses.get(name) or name)) for name in label.names)
    return Label(label.meaning, label.codes, names)


def _captions(dataset: str, keys: pa.ChunkedArray) -> dict[str, Text]:
    """The captions of all columns, each text of a clip once."""
    parts: list[pa.Table] = []
    for column in captions.columns_of(dataset):
        for split in schema.SPLITS:
            for shard in index.read_shards(dataset, split, column):
                rows = shard.table.select(["key", "captions"]).filter(pc.is_valid(shard.table["captions"]))
                lists = rows["captions"].combine_chunks()
                owners = rows["key"].take(pc.list_parent_indices(lists))
                parts.append(pa.table({"key": owners, "text": pc.struct_field(pc.list_flatten(lists), "text")}))
    if not parts:
        return {}
    table = pa.concat_tables(parts)
    owners = pc.index_in(table["key"], value_set=keys.combine_chunks())
    table = pa.table({"row": owners, "text": table["text"]}).drop_null()
    table = table.group_by(["row", "text"], use_threads=False).aggregate([]).sort_by("row").combine_chunks()
    texts = table["text"].combine_chunks() if len(table) else pa.array([], pa.string())
    return {"caption": Text(_TEXTS["caption"], table["row"].to_numpy(), texts)}


def _views(dataset: str, keys: pa.ChunkedArray, names: Sequence[str] | None) -> list[View]:
    folder = storage.join(dataset, "views")
    if names is None:
        uris = [storage.join(folder, name) for name in index.table_names(folder)]
    else:
        uris = [views.address(dataset, named) for named in names]
    names_of = {uri: uri.rsplit("/", 1)[-1].removesuffix(".parquet") for uri in uris}
    spoken = _spoken(dataset, set(names_of.values()))
    opened: dict[str, View] = {}
    for uri, name in names_of.items():
        opened[name] = view_of(uri, spoken.get(name, name), keys)
    return list(opened.values())


def _spoken(dataset: str, names: Set[str]) -> dict[str, str]:
    """Names for people of views that recipes made, by their digests, where the store in the workspace knows them."""
    workspace, digests = columns.workspace_of(dataset), {name for name in names if columns.is_digest(name)}
    if workspace is None or not digests or not storage.is_local(workspace):
        return {}
    # by the last part alone: the workspace may have been moved
    made = {
        uri.rpartition("/")[2].removesuffix(".parquet"): f"{stage} of {recipe}"
        for uri, (stage, recipe) in sqlite_store.products(Path(workspace) / "mlflow.db").items()
        if uri.endswith(".parquet")
    }
    known = {name: made[name] for name in digests & made.keys()}
    several = Counter([*known.values(), *names - known.keys()])
    return {name: called if several[called] == 1 else f"{called}, {name}" for name, called in known.items()}


def view_of(uri: str, name: str, keys: pa.ChunkedArray) -> View:
    """Open a view. Raises UserError, Failure: see `read_view`."""
    table = views.read_view(uri)
    rows = pc.index_in(keys, value_set=table["key"].combine_chunks())
    reasons = pc.if_else(pc.fill_null(table["keep"], False), None, pc.fill_null(table["reason"], "for no reason"))
    reasons = pc.if_else(pc.and_(pc.is_null(reasons), pc.less_equal(table["weight"], 0)), "weight 0", reasons)
    why = pc.if_else(pc.is_valid(rows), reasons.take(rows), NOT_THERE)
    label = label_of(pa.chunked_array([why]) if isinstance(why, pa.Array) else why, "")
    return View(name, storage.absolute(uri), label.codes, label.names)
