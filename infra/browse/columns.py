"""The columns of scores that the page shows, by the names that rules use; and which records of stages name them."""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from longtake.datasets import clusters, score_columns, scores, storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.scores import Column, Field

ALL = "all"

_RECORDS = {"scores.json": "scores", "clusters.json": "clusters"}
_THREADS = 16
_DIGEST = re.compile(r"[0-9a-f]{8,64}(-[0-9a-f]{8})?")  # the name of an output


@dataclass(frozen=True)
class Shown:
    """Columns, and where they are recorded.

    columns   by the name that rules use
    scores    records of `score` stages, by URI
    clusters  the record of the `cluster` stage that made the column `cluster`, if there is one
    notes     a line for each column that is not shown
    encoders  files of encoders that whoever searches has named, by the names of their vectors
    """

    columns: dict[str, Column]
    scores: dict[str, dict[str, Column]]
    clusters: str | None
    notes: tuple[str, ...]
    encoders: dict[str, str] = field(default_factory=dict)

    @property
    def vectors(self) -> dict[str, tuple[Column, Field]]:
        """What likeness can be measured by, as NAME.FIELD."""
        return {
            f"{name}.{one.name}": (column, one)
            for name, column in self.columns.items()
            for one in column.fields
            if one.kind == "vector"
        }

    @property
    def readers(self) -> dict[str, Column]:
        """Those of `vectors` whose encoder reads texts too."""
        # a folder with a tokenizer: what it really is shows when it is asked
        return {
            name: column
            for name, (column, one) in self.vectors.items()
            if column.scorer == "embedding"
            and one.name == "vector"
            and (Path(self.encoders.get(name) or str(column.settings.get("model", ""))) / "tokenizer.json").is_file()
        }

    def record_of(self, names: Sequence[str]) -> str | None:
        """The record of a `score` stage that has all of these columns under these names."""
        for uri, recorded in self.scores.items():
            if all(name in recorded and recorded[name].column == self.columns[name].column for name in names):
                return uri
        return None


def shown(dataset: str, digests: Mapping[str, str], asked: Sequence[str] = (ALL,)) -> Shown:
    """The columns that are asked for.

    Args:
        digests: of the splits' base shards (see `compact.Rows`).
        asked: outputs of `score` and `cluster` stages; "all": every column of the dataset, by the names of the records
            that are in the dataset's workspace. Of two columns of one name the first is shown that a record names: those
            of records that are named here, then of those that were written for the shards that there are now.

    Raises:
        UserError: no record there, or of another dataset.
        Failure: a record or a column is damaged, or a record that is named here has a column that is gone.
    """
    there = set(score_columns.columns_of(dataset))
    records: dict[str, dict[str, Column]] = {}
    of_clusters: dict[str, Column] = {}
    for uri, record in _records(dataset, digests, asked):
        made = (
            dict(record.columns)
            if isinstance(record, scores.Scores)
            else {clusters.NAME: scores.from_plain(record.column)}
        )
        gone = [column.column for column in made.values() if column.column not in there]
        if gone and uri in asked:
            raise Failure(f"{dataset}: {gone[0]} of {uri} is gone; run its stage again")
        # what `clean` swept, the record of an older output still names
        made = {name: column for name, column in made.items() if column.column in there}
        if isinstance(record, scores.Scores):
            records[uri] = made
        elif made:
            of_clusters[uri] = made[clusters.NAME]

    columns: dict[str, Column] = {}
    notes = []
    named = [(name, column) for recorded in records.values() for name, column in recorded.items()]
    named += [(clusters.NAME, column) for column in of_clusters.values()]
    if ALL in asked:
        known = {column.column for _, column in named}
        loose = sorted(there - known)
        named += [
            (each.removeprefix(scores.PREFIX).rpartition("-")[0], score_columns.described(dataset, each))
            for each in loose
        ]
    for name, column in named:
        other = columns.setdefault(name, column)
        if other.column != column.column:
            notes.append(f"{name}: shows {other.column}, not {column.column}; --scores RECORD chooses")
    of = next((uri for uri, column in of_clusters.items() if column.column == columns[clusters.NAME].column), None)
    return Shown(columns, records, of, tuple(dict.fromkeys(notes)))


def _records(
    dataset: str, digests: Mapping[str, str], asked: Sequence[str]
) -> list[tuple[str, scores.Scores | clusters.Clusters]]:
    """The records that are named, then those beside the dataset that are of it, those of its shards of now first."""
    named = [(uri, _read(uri, dataset)) for uri in dict.fromkeys(asked) if uri != ALL]
    found = []
    for uri in _beside(dataset) if ALL in asked else []:
        if uri not in asked:
            with suppress(UserError, Failure):  # of another dataset, or damaged
                found.append((uri, _read(uri, dataset)))
    return named + sorted(found, key=lambda pair: pair[1].digests != digests)


def _read(uri: str, dataset: str) -> scores.Scores | clusters.Clusters:
    if _kind(uri) == "scores":
        return scores.read_scores_of(uri, dataset)
    record = clusters.read_clusters(uri)
    if storage.absolute(record.dataset) != storage.absolute(dataset):
        raise UserError(f"{uri}: are clusters of {record.dataset}, not of {dataset}")
    return record


def recorded(dataset: str, column: str) -> Column:
    """A column as a record in the dataset's workspace describes it, with where its files lie; else as its shards do."""
    for uri in _beside(dataset):
        if _kind(uri) == "scores":
            with suppress(UserError, Failure):  # of another dataset, or damaged
                for each in scores.read_scores_of(uri, dataset).columns.values():
                    if each.column == column:
                        return each
    return score_columns.described(dataset, column)


def with_encoder(shown: Shown, encoder: str) -> Shown:
    """The same with the files of an encoder, for the columns that it made. Raises UserError where it made none."""
    from longtake.pipeline import queries

    encoders, why = {}, f"--encoder: {encoder}: no column of vectors here; score by `embedding`"
    for name, (column, _) in shown.vectors.items():
        try:
            queries.encoder_of(column, encoder)
            encoders[name] = storage.absolute(encoder) if storage.is_local(encoder) else encoder
        except UserError as e:
            why = f"--encoder: {e}"
    if not encoders:
        raise UserError(why)
    return replace(shown, encoders=encoders)


def workspace_of(dataset: str) -> str | None:
    """The workspace that a dataset is in, as WORKSPACE/STAGE/DIGEST; one elsewhere has no records beside it."""
    parts = storage.absolute(dataset).rsplit("/", 2)
    return parts[0] if len(parts) == 3 and is_digest(parts[2]) else None


def is_digest(name: str) -> bool:
    """Whether a name is one that a recipe gives to what a stage makes."""
    return bool(_DIGEST.fullmatch(name))


def _beside(dataset: str) -> list[str]:
    """The outputs of stages in the dataset's workspace that record columns."""
    workspace = workspace_of(dataset)
    if workspace is None:
        return []
    stages = [storage.join(workspace, name) for name in storage.names(workspace) if not name.startswith(".")]
    with ThreadPoolExecutor(_THREADS) as pool:
        outputs = pool.map(lambda stage: [storage.join(stage, n) for n in storage.names(stage) if is_digest(n)], stages)
        uris = [uri for several in outputs for uri in several]
        kinds = list(pool.map(_found, uris))
    return [uri for uri, kind in zip(uris, kinds, strict=True) if kind]


def _found(uri: str) -> str | None:
    return next((kind for name, kind in _RECORDS.items() if storage.exists(storage.join(uri, name))), None)


def _kind(uri: str) -> str:
    kind = _found(uri)
    if kind is None:
        raise UserError(f"{uri}: no record of scores here; name what a `score` or `cluster` stage has made, or all")
    return kind
