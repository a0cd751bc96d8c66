"""A split and its columns: their names in batches, their rows in the order of the base's, and the windows that they allow."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longtake.datasets import audio, compact, index, schema, scores
from longtake.datasets.cache import Cache
from longtake.datasets.compact import Rows
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.loader import streams
from longtake.datasets.loader.codes import Items, latents_of, tokens_of
from longtake.datasets.loader.live import Live, live_columns
from longtake.datasets.loader.reader import Reader
from longtake.datasets.tokens import PREFIX

COLUMNS = (
    "video",
    "frame_diff",
    "audio",
    "latent-DIGEST",
    "tokens-DIGEST",
    "caption-DIGEST",
    "text-DIGEST",
    "json",
    "label",
)
_SHARDS = 64  # whose items are kept in memory
# how columns begin, and what they are called without a name
_CALLED = {"latent-": "latent", PREFIX: "tokens", "caption-": "caption", "text-": "text"}


class Split:
    """A split with its cache columns, as worker processes need it."""

    def __init__(self, base: Rows, names: Mapping[str, str], columns: Mapping[str, Rows], reader: Reader) -> None:
        """`names` are columns by the names that samples have them under, `columns` the rows of those that are caches."""
        self.base, self.names, self.columns, self.reader = base, names, columns, reader
        self.latents = self.of_kind("latent")
        self.tokens = self.of_kind("tokens")
        self.captions = self.of_kind("caption")
        self.texts = self.of_kind("text")
        self.live = live_columns(columns)  # of latents that are yet to be encoded
        self.widths: dict[str, int] = {}  # of the states in each column of texts
        self.labels: dict[str, int] = {}  # the number of each label
        self._items: dict[tuple[str, int], Items] = {}

    def of_kind(self, kind: str) -> tuple[str, ...]:
        """The names of the cache columns that are called `kind` where they have no other name."""
        return tuple(name for name in self.columns if kind_of(self.names[name]) == kind)

    def tars(self) -> list[Rows]:
        """The rows of the base and of the cache columns that have tars."""
        beside = [n for n in self.columns if not index.is_table(self.names[n]) and n not in self.live]
        return [self.base, *(self.columns[name] for name in beside)]

    @cached_property
    def sound(self) -> tuple[int, int]:
        """The rate and the channels of the column of sound."""
        rows = self.columns[audio.COLUMN]
        first = rows.row(int(np.flatnonzero(rows.counts)[0]), 0)
        return first["rate"], first["channels"]

    def check_windows(self, lengths: Sequence[int], stride: int, histories: streams.Lengths | None) -> None:
        """Check that the columns have windows of these numbers of frames.

        Raises:
            UserError: a window would not be of whole latents, or not one that has tokens; columns of latents have other
                factors; a stream of several clips is read without `histories`, or anything but latents, captions, texts
                and labels with them.
        """
        self._check_tokens(lengths, stride)
        factors = {self.names[name]: factor_of(self.columns[name]) for name in self.latents}
        for column, factor in factors.items():
            first, first_factor = next(iter(factors.items()))
            if factor != first_factor:
                raise UserError(
                    f"columns: {column} has a step for {factor} frames, {first} for {first_factor}; name latents of one encoder"
                )
            if stride != 1 or any((t - 1) % factor for t in lengths):
                raise UserError(
                    f"frames: {column} has a step for {factor} frames: windows of 1 + {factor}n frames, stride 1"
                )
        if histories:
            others = [
                column for column in self.names.values() if column != "label" and kind_of(column) in (None, "tokens")
            ]
            if others or not factors or len(lengths) > 1:
                raise UserError("histories: are of latents and windows of one length; leave out what else is asked for")
        elif joined := [self.names[name] for name in self.latents if streams.joined(self.columns[name])]:
            raise UserError(
                f"columns: {joined[0]} was encoded in streams of several clips, a window inside of one has no first latent;"
                " name latents without `join_seconds`"
            )

    def _check_tokens(self, lengths: Sequence[int], stride: int) -> None:
        """Raise UserError where a column of tokens has no windows like these, or another has other windows."""
        filled = [name for name in self.tokens if self.columns[name].counts.any()]
        kinds = {self.names[name]: windows_of(self.columns[name]) for name in filled}
        for column, (frames, own, hop) in kinds.items():
            if [frames] != list(lengths) or own != stride:
                raise UserError(f"frames: {column} has windows of {frames} frames, stride {own}; ask for these")
            first, (*_, first_hop) = next(iter(kinds.items()))
            if hop != first_hop:
                raise UserError(
                    f"columns: {column} has a window every {hop} frames, {first} every {first_hop}; encode both with one `hop`"
                )

    def codes(self, column: str, shard: int, number: int) -> Items:
        """The items of a shard in a column of latents or tokens. Raises Failure where row `number` is of another clip."""
        if (items := self._items.get((column, shard))) is None:
            if len(self._items) >= _SHARDS * len(self.columns):
                self._items = {}
            read = latents_of if column in self.latents else tokens_of
            items = self._items[column, shard] = read(self.columns[column], shard, self.base.of(shard))
        if not items.of_base[number]:
            raise self._of_other_clips(column, shard)
        return items

    def cache_row(self, column: str, shard: int, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
        """Row `number` of a shard in a cache column's index. Raises Failure where its clip is not that of the base's `row`."""
        cached = self.columns[column].row(shard, number)
        if cached["key"] != row["key"] or cached["base_sha256"] != row["sha256"]:
            raise self._of_other_clips(column, shard)
        return cached

    def _of_other_clips(self, column: str, shard: int) -> Failure:
        url = self.columns[column].tar(shard)[0]
        return Failure(f"{url}: made from other clips; delete the column's indexes and run its stage again")

    def latent_codes(self, shard: int, number: int) -> list[Items]:
        """The `codes` of each column of latents. Raises Failure where a clip has other latents in one than in another."""
        columns = [self.codes(column, shard, number) for column in self.latents]
        if len(columns) > 1:
            self.check_alike(shard, number, columns)
        return columns

    def check_alike(self, shard: int, number: int, columns: Sequence[Items]) -> None:
        """Raise Failure where a clip has other latents in one column, by the `codes` of each, than in another."""
        for column, items in zip(self.latents[1:], columns[1:], strict=True):
            where = f"{self.columns[column].tar(shard)[0]}: {self.base.lists(shard)['key'][number]}"
            first_column, first = self.names[self.latents[0]], columns[0]
            if items.counts[number] != first.counts[number]:
                raise Failure(
                    f"{where}: has {items.counts[number]} steps, and {first.counts[number]} in {first_column}; "
                    "delete the column's indexes and run its stage again"
                )
            if items.before[number] != first.before[number]:
                raise Failure(
                    f"{where}: begins at step {items.before[number]} of its stream, and at"
                    f" {first.before[number]} in {first_column}; encode both with the same join_seconds"
                )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_items": {}}


def by_name(columns: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Columns by the names that batches have them under. Raises UserError for an unknown column, or a name that it cannot have."""
    pairs = list(columns.items()) if isinstance(columns, Mapping) else [(kind_of(c) or c, c) for c in columns]
    listed = [column for _, column in pairs]
    if scored := [c for c in listed if c.startswith(scores.PREFIX)]:
        raise UserError(
            f"columns: {scored[0]} has scores, which choose clips and do not go into batches; name them in a `curate` stage,"
            " and the loader its view"
        )
    if unknown := {c for c in listed if c not in COLUMNS and kind_of(c) is None}:
        raise UserError(f"columns: unknown {', '.join(sorted(unknown))}; there are {', '.join(COLUMNS)}")
    if twice := {c for c in listed if listed.count(c) > 1}:
        raise UserError(f"columns: {', '.join(sorted(twice))} twice; name each once")
    names = dict(pairs)
    if len(names) < len(pairs):
        kind = next(name for n, (name, _) in enumerate(pairs) if name in dict(pairs[:n]))
        nameless = [column for name, column in pairs if name == kind]
        raise UserError(f"columns: {' and '.join(nameless)} need names, such as columns={{{kind!r}: ..., 'low': ...}}")
    for name, column in pairs:
        if name != column and (name in COLUMNS or kind_of(column) is None):
            raise UserError(f"columns: {column} cannot be called {name!r}; choose another name, or leave it out")
    return names


def kind_of(column: str) -> str | None:
    """What a cache column is called that has no name; None for a column that has no digest in its name."""
    return next((kind for begin, kind in _CALLED.items() if column.startswith(begin)), None)


def open_columns(
    base: Rows, names: Mapping[str, str], cache: Cache | None, live: Mapping[str, Live] | None = None
) -> tuple[Split, list[pa.Table]]:
    """A split with the cache columns among `names`, and the `FACTS` of its columns of latents and tokens.

    Columns of `live` are not there: they have the rows that they would have.

    Raises:
        UserError: clips of the base have no sound to load; a column of texts is of other captions than those that are asked
            for with it.
        Failure: another column lacks clips of the base.
    """
    caches = {name: c for name, c in names.items() if c in ("frame_diff", audio.COLUMN) or kind_of(c)}
    live = live or {}
    facts = compact.open_split(base.dataset, base.split, cache=cache)[1] if live else None
    opened = {
        name: live[column].open(base, facts) if column in live else _open(base, column, cache)
        for name, column in caches.items()
    }
    split = Split(base, names, {name: rows for name, (rows, _) in opened.items()}, Reader(cache))
    for name in split.texts:
        notes = _notes(split.columns[name])
        split.widths[name] = int(notes["width"])
        spoken = [names[caption] for caption in split.captions]
        if spoken and notes["captions"] not in (*spoken, ""):
            raise UserError(f"columns: {names[name]} is of {notes['captions']}, not of {spoken[0]}; name that one")
    return split, [opened[name][1] for name in (*split.latents, *split.tokens)]


def factor_of(latents: Rows) -> int:
    """Frames in a latent after the first; 1 for a column without rows."""
    filled = np.flatnonzero(latents.counts)
    return latents.of(int(filled[0]))["factor"][0].as_py() if len(filled) else 1


def windows_of(tokens: Rows) -> tuple[int, int, int]:
    """Frames, stride and hop of the windows of a column of tokens that has rows."""
    row = tokens.row(int(np.flatnonzero(tokens.counts)[0]), 0)
    return row["frames"], row["stride"], row["hop"]


def _notes(texts: Rows) -> dict[str, Any]:
    """What the first shard of a column of texts says of all: the `width` of its states, and which `captions` they are of."""
    if not len(texts.shards):
        return {"width": 0, "captions": ""}
    return index.read_notes(texts.dataset, index.read_shard(texts.dataset, texts.split, texts.name(0)))


def classes(base: Rows, facts: pa.Table, cache: Cache | None) -> list[str]:
    """The labels of all splits of a dataset, sorted: the numbers of column `label` count them. Raises UserError: there are none."""
    splits = [split for split in schema.SPLITS if split != base.split]
    others = [compact.open_split(base.dataset, split, cache=cache)[1] for split in splits]
    labels = {label for table in (facts, *others) for label in pc.unique(table["label"]).drop_null().to_pylist()}
    if not labels:
        raise UserError(f"{base.dataset}: no clip has a label; give the manifest a `label` column")
    return sorted(labels)


def _open(base: Rows, column: str, cache: Cache | None) -> tuple[Rows, pa.Table]:
    """The rows of a cache column and their `FACTS`, in the base's order.

    Raises:
        UserError: there is no sound of some shard.
        Failure: a shard has another number of rows than in the base. That they belong to its clips is checked on reading.
    """
    rows, facts = compact.open_split(base.dataset, base.split, column, cache)
    names = rows.shards["name"].to_pylist()
    counts = dict(zip(names, rows.counts.tolist(), strict=True))
    base_names = base.shards["name"].to_pylist()
    expected = {f"{n}.{column}": count for n, count in zip(base_names, base.counts.tolist(), strict=True)}
    wrong = {name: count for name, count in expected.items() if counts.get(name) != count}
    if wrong:
        missing = sum(max(0, count - counts.get(name, 0)) for name, count in wrong.items())
        problem = (
            f"{missing} clips have no {column}" if missing else f"{next(iter(wrong))} has clips that are not there"
        )
        where = f"{base.dataset} ({base.split})"
        if missing and column == audio.COLUMN:
            raise UserError(f"{where}: {missing} clips were cut without their sound; add it with a `cache_audio` stage")
        raise Failure(f"{where}: {problem}; delete the column's indexes and run its stage again")
    # a column's shard is committed before its base shard: drop those that are ahead
    in_base = np.array([name in expected for name in names], bool)
    return rows.only(list(expected)), facts if in_base.all() else facts.filter(np.repeat(in_base, rows.counts))
