"""Columns of scores as curation sees them: which values there are by name, and those of each clip."""

from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa

from longtake.datasets import compact, storage
from longtake.datasets.clusters import Clusters, read_clusters
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.score_columns import table
from longtake.datasets.scores import Column, Field, read_scores_of
from longtake.pipeline import scorers

Bases = Mapping[str, compact.Rows]  # the rows of a dataset's shards by split


def opened_scores(bases: Bases, uri: str) -> dict[str, Column]:
    """The columns of a `score` stage, by the names of their scorers.

    Raises:
        UserError: there are none at `uri`, or they are of another dataset.
        Failure: the dataset has other shards now.
    """
    record = read_scores_of(uri, bases["train"].dataset)
    _check_digests(f"scores: {uri}", bases, record.digests, "score")
    return dict(record.columns)


def opened_clusters(bases: Bases, uri: str) -> Clusters:
    """The record of a `cluster` stage. Raises as `opened_scores`."""
    record, dataset = read_clusters(uri), bases["train"].dataset
    if storage.absolute(record.dataset) != storage.absolute(dataset):
        raise UserError(f"clusters: {uri} are of the dataset {record.dataset}, not of {dataset}")
    _check_digests(f"clusters: {uri}", bases, record.digests, "cluster")
    return record


def _check_digests(what: str, bases: Bases, digests: Mapping[str, str], stage: str) -> None:
    for split, base in bases.items():
        if digests.get(split) != base.digest:
            raise Failure(f"{what}: not of the {split} shards that the dataset has now; run its `{stage}` stage again")


def fields_of(columns: Mapping[str, Column]) -> dict[str, Field]:
    """What rules may name, as NAME.FIELD."""
    return {f"{name}.{field.name}": field for name, column in columns.items() for field in column.fields}


def fields_of_stage(config: Any) -> dict[str, Field] | None:
    """The same of the config of a `score` stage; None where that depends on files that are not here."""
    fields: dict[str, Field] = {}
    try:
        for name, entry in config.scorers.items():
            scorer = scorers.load(entry["by"])
            settings = {key: value for key, value in entry.items() if key != "by"}
            known = scorer.fields(scorer.config.model_validate(settings))
            fields |= {f"{name}.{field.name}": field for field in known}
    except (UserError, Failure):
        return None
    return fields


def values(bases: Bases, columns: Mapping[str, str], names: Collection[str]) -> pa.Table:
    """A column for each of the names, of all clips in the order of the splits and their shards; null where one has no value.

    Args:
        columns: by the names of their scorers.
    """
    return pa.concat_tables([table(base.dataset, split, columns, names, base) for split, base in bases.items()])
