"""Columns of scores as curation sees them: which values there are by name, and those of each clip."""

from collections.abc import Collection, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longtake.datasets import compact, schema
from longtake.datasets.errors import Failure
from longtake.datasets.scores import Field, Scores, read_scores_of, table


def opened(dataset: str, uri: str) -> Scores:
    """The record of a `score` stage's columns.

    Raises:
        UserError: there is none at `uri`, or it is of another dataset.
        Failure: the dataset has other shards now.
    """
    record = read_scores_of(uri, dataset)
    for split in schema.SPLITS:
        if record.digests.get(split) != compact.open_split(dataset, split)[0].digest:
            raise Failure(f"scores: {uri} lacks {split} shards that {dataset} has now; run its `score` stage again")
    return record


def fields_of(record: Scores) -> dict[str, Field]:
    """What rules may name, as NAME.FIELD."""
    return {f"{name}.{field.name}": field for name, column in record.columns.items() for field in column.fields}


def columns_of(record: Scores, names: Collection[str]) -> dict[str, str]:
    """The columns in which these values are, by the names of their scorers."""
    used = {name.partition(".")[0] for name in names}
    return {name: column for name, column in sorted(record.names.items()) if name in used}


def with_values(clips: pa.Table, dataset: str, columns: Mapping[str, str], names: Collection[str]) -> pa.Table:
    """Clips with a column NAME.FIELD for each name; null where a clip has no value.

    Args:
        clips: rows of the dataset's index with `split` and `row`, the number of a clip in its split.
        columns: by the names of their scorers.
    """
    if not names:
        return clips
    values = {split: table(dataset, split, columns, names) for split in ("val", "train")}
    offset = np.where(np.asarray(pc.equal(clips["split"], "train")), len(values["val"]), 0)
    places = pa.array(offset + clips["row"].to_numpy())
    whole = pa.concat_tables(values.values()).combine_chunks()
    for name in names:
        clips = clips.append_column(name, whole[name].take(places))
    return clips
