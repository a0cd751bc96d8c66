"""The clips of a view with what is known of them, shard by shard, and an export of them that goes on where it was stopped."""

import errno
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from longtake.datasets import captions, compact, index, schema, storage, view
from longtake.datasets.errors import Failure, UserError
from longtake.pipeline import column as columns
from longtake.pipeline import layouts

_RECORD = "longtake-export.json"


@dataclass(frozen=True)
class Chosen:
    """The clips of a dataset that are written out.

    bases      the rows of its shards by split
    keeps      (N,) bool of each split, the clips that are chosen
    captions   the column with their captions; None: they have none
    digest     of all that decides what is written
    """

    dataset: str
    bases: dict[str, compact.Rows]
    keeps: dict[str, np.ndarray]
    captions: str | None
    digest: str


def choose(dataset: str, view_url: str | None, column: str | None) -> Chosen:
    """The clips that a view keeps, or all, with the captions of a column, or of the only one.

    Raises:
        UserError: no dataset, view or column is there, no clip is kept, there are several columns of captions, or it has
            images and no clips.
        Failure: an index is damaged.
    """
    if kind := index.describe(dataset).get("kind"):
        raise UserError(f"{dataset}: has {kind}, whose tars are WebDataset as they are; name a dataset of clips")
    there = captions.columns_of(dataset)
    if column is None and len(there) > 1:
        raise UserError(f"{dataset}: has {', '.join(there)}; choose one by --captions")
    if column is not None and column not in there:
        raise UserError(f"--captions {column}: there are {', '.join(there) or 'none; run a `caption` stage'}")
    column = column or (there[0] if there else None)
    bases = {split: compact.open_split(dataset, split)[0] for split in schema.SPLITS}
    kept = {split: view.kept(base, view_url) for split, base in bases.items()}
    keeps = {split: keep for split, (keep, _, _) in kept.items()}
    if not any(keep.any() for keep in keeps.values()):
        raise UserError(f"{view_url or dataset}: keeps no clip; there is nothing to write")
    said = [compact.open_split(dataset, split, column)[0].digest for split in schema.SPLITS] if column else []
    parts = [column, said, *(base.digest for base in bases.values()), *(digest for _, _, digest in kept.values())]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return Chosen(dataset, bases, keeps, column, digest)


def clips_of(chosen: Chosen, split: str, number: int) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The mp4 of each chosen clip of a shard, and the facts about it: `key`, `captions`, `label`, `seconds` and others.

    Raises:
        Failure: a clip is missing or damaged, or the shard has no captions in the column.
    """
    base = chosen.bases[split]
    name, start = base.name(number), int(base.starts[number])
    tar, table = base.tar(number)[0], base.labelled(number)
    said = [None] * len(table)
    if chosen.captions:
        told = index.read_shard(chosen.dataset, split, f"{name}.{chosen.captions}").table
        if not told["key"].equals(table["key"]):
            raise Failure(f"{tar}: {chosen.captions} is of other clips; run its `caption` stage again")
        said = told["captions"].to_pylist()
    for place, row in enumerate(table.to_pylist()):
        if chosen.keeps[split][start + place]:
            facts = {name: row[name] for name in ("key", "source", "label", "fps", "frame_count", "width", "height")}
            facts |= {"split": split, "seconds": row["frame_count"] / row["fps"], "captions": said[place] or []}
            yield columns.clip_bytes(tar, row), facts


def texts_of(facts: dict[str, Any]) -> list[str]:
    """What is said of the whole clip, else of parts of it."""
    whole = [each["text"] for each in facts["captions"] if each["start"] is None and each["end"] is None]
    return whole or [each["text"] for each in facts["captions"]]


def write(chosen: Chosen, layout: str, folder: str) -> dict[str, int]:
    """Write the chosen clips in a layout to a folder; what a stopped command has written stays. Returns counts.

    Raises:
        UserError: the folder has other things in it, or cannot be one.
        Failure: a clip is damaged, or the folder cannot be written.
    """
    place, record = Path(folder), {"layout": layout, "digest": chosen.digest}
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--to {folder}: cannot be a folder ({e.strerror}); name another one") from e
    with storage.failing_clearly(folder):
        if any(place.iterdir()):
            _check_same(place / _RECORD, record)
        else:
            storage.write(str(place / _RECORD), storage.canonical_json(record))
    module, counts = layouts.load(layout), {"clips": 0, "shards": 0}
    with tqdm(desc="export", total=sum(int(keep.sum()) for keep in chosen.keeps.values()), unit="clip") as bar:
        for split, base in chosen.bases.items():
            for number, keep in enumerate(columns.by_shard(base, chosen.keeps[split]).values()):
                if keep.any():
                    if not module.exported(chosen, split, number, place):
                        with storage.failing_clearly(folder):
                            module.export(chosen, split, number, place)
                    counts["clips"] += int(keep.sum())
                    counts["shards"] += 1
                    bar.update(int(keep.sum()))
    return counts


def _check_same(path: Path, record: dict[str, Any]) -> None:
    try:
        same = json.loads(path.read_bytes()) == record
    except (FileNotFoundError, ValueError):
        same = False
    if not same:
        raise UserError(f"{path.parent}: has something else in it; name a new folder")


def write_manifest(folder: str, layout: str, manifest: str) -> int:
    """Write a manifest of the videos that a folder in a layout has, with their captions and labels; returns their number.

    Raises:
        UserError: it has no video in this layout, or what it says of one is of no use.
    """
    if not manifest.endswith(".jsonl") or not storage.is_local(manifest):
        raise UserError(f"--to {manifest}: name a file on this machine that ends in .jsonl")
    target, count = Path(manifest), 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
    except OSError as e:
        raise UserError(f"--to {manifest}: cannot be a file ({e.strerror}); name another one") from e
    with storage.staged(manifest) as path, path.open("w") as file, tqdm(desc="import", unit="video") as bar:
        for row in layouts.load(layout).rows(Path(folder), target.parent / f"{target.stem}-videos"):
            annotations = {name: value for name, value in row.items() if name != "uri"}
            try:
                captions.of_source(annotations)
            except ValueError as e:
                raise UserError(f"{row['uri']}: {e}") from e
            file.write(json.dumps(row) + "\n")
            count += 1
            bar.update()
        if not count:
            raise UserError(f"{folder}: has no videos in the layout {layout}; see `longtake dataset import --help`")
    return count
