"""The captions of a shard's clips: from the annotations of their sources, and what an earlier run has committed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from longtake.datasets import captions, index, later, schema, storage
from longtake.datasets.captions import Caption
from longtake.datasets.shard import described
from longtake.pipeline import column as columns

RULES_VERSION = 1  # raise it when the same annotations would give a clip other captions

# Why a clip has no captions; a detail may follow after a colon.
REASONS = {
    "not_annotated": "its source has no captions about it, and no captioner was given",
    "unusable": "its source's annotations have a caption that is none, and no captioner was given",
    "not_in_view": "its source has none, and the view leaves the clip out",
    "refused": "the captioner does not want to describe it",
    "rejected": "the endpoint does not take the request",
    "bad_answer": "no answer was of use, in as many tries as it had",
    "unanswered": "the endpoint always fails at it, while it answers others",
}

_ASKED = "asked:"  # begins the annotations of rows that a captioner has made

Row = Mapping[str, Any]  # of a clip in the index of its shard


class Said(NamedTuple):
    """What the annotations of its source say about a clip."""

    captions: list[Caption]
    digest: str  # of all captions of the source
    problem: str = ""  # why they are not usable


def column_name(captioner: Mapping[str, Any], view: str) -> str:
    """`caption-DIGEST`, by what makes the captions that annotations lack and the digest of the view that it looks at."""
    record = json.dumps([RULES_VERSION, captioner, view if captioner else ""], sort_keys=True)
    return f"caption-{hashlib.sha256(record.encode()).hexdigest()[:16]}"


def said(dataset: str, base: index.Shard, images: bool) -> list[Said]:
    """What annotations say about each clip of a shard, in its order; those of images lie beside each in its tar."""
    rows = base.table.to_pylist()
    if images:
        return [_of_image(dataset, base, row) for row in rows]
    url = storage.join(dataset, "sources", f"{base.split}-{base.name}.parquet")
    sources = index.from_parquet(url, ["source", "status", "extra"]).to_pylist()
    # a source may have a row for each of its names; its clips are of the good one
    extras = {row["source"]: row["extra"] for row in sources if row["status"] == "good"}
    extras |= {row["source"]: row["extra"] for row in later.read(dataset, base.split, base.name)}
    by_source = {source: _parsed(extra) for source, extra in extras.items()}
    nothing = Said([], "")
    return [_of_clip(row, by_source.get(row["source"], nothing)) for row in rows]


def _parsed(annotations: str | None) -> Said:
    try:
        found = captions.of_annotations(annotations)
    except ValueError as e:
        return Said([], captions.digest_of([Caption(str(annotations))]), storage.printable(str(e)))
    return Said(found, captions.digest_of(found))


def _of_clip(row: Row, source: Said) -> Said:
    return source._replace(
        captions=captions.of_clip(
            source.captions, row["start_seconds"] or 0.0, row["frame_count"] / row["fps"], 1 / row["fps"]
        )
    )


def _of_image(dataset: str, base: index.Shard, row: Row) -> Said:
    if not row["json_size"]:
        return Said([], "")
    tar = storage.join(dataset, base.split, f"{base.name}.tar")
    data = storage.read_range(tar, row["json_offset"], row["json_size"])
    try:
        text = json.dumps(described(data))
    except ValueError as e:
        return Said([], "", storage.printable(str(e)))
    return _of_clip(row, _parsed(text))


def committed(dataset: str, base: index.Shard, column: str) -> list[Row] | None:
    """The rows that a column has for a shard's clips; None where it has none, or those of other clips."""
    name = f"{base.name}.{column}"
    if not storage.exists(storage.join(dataset, base.split, f"{name}.parquet")):
        return None
    shard = index.read_shard(dataset, base.split, name)
    return shard.table.to_pylist() if columns.fits(base, shard) else None


def is_due(rows: Sequence[Row] | None, found: Sequence[Said]) -> bool:
    """Whether the committed rows of a shard are missing, or of other annotations."""
    return rows is None or [row["annotations"].removeprefix(_ASKED) for row in rows] != [each.digest for each in found]


def asked(annotations: str) -> str:
    """The `annotations` of a row that a captioner has made; a manifest may name it as the source of a caption too."""
    return f"{_ASKED}{annotations}"


def is_asked(row: Row) -> bool:
    """Whether a captioner has looked at the clip of a committed row."""
    return bool(row["annotations"].startswith(_ASKED))


def begun(
    base: index.Shard, found: Sequence[Said], earlier: Sequence[Row] | None, maker: str, keep: np.ndarray
) -> list[dict[str, Any] | None]:
    """The rows of a shard that need no captioner, None for the others.

    Args:
        earlier: the rows that were committed before for these clips, of which those by the captioner are kept.
        maker: the captioner's name, "" without one.
        keep: (N,) bool, the clips that the captioner looks at.
    """
    by_key = {row["key"]: row for row in earlier or ()}
    rows: list[dict[str, Any] | None] = []
    for row, about, kept in zip(base.table.to_pylist(), found, keep.tolist(), strict=True):
        before = by_key.get(row["key"])
        if about.captions or not maker:
            reason = f"unusable: {about.problem}" if about.problem else "not_annotated"
            rows.append(captions.row_of(row, about.captions, reason, about.digest))
        elif not kept:
            rows.append(captions.row_of(row, [], "not_in_view", about.digest))
        elif before is not None and is_asked(before):
            rows.append({**before, "annotations": asked(about.digest)})
        else:
            rows.append(None)
    return rows


def commit(dataset: str, base: index.Shard, column: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Commit a column's table for all clips of a base shard."""
    index.write_table(storage.join(dataset, base.split, f"{base.name}.{column}.parquet"), rows, schema.CAPTION_INDEX)


def is_images(dataset: str) -> bool:
    return index.describe(dataset).get("kind") == "images"
