"""The clips of a view with what is known of them, shard by shard, and an export of them that goes on where it was stopped."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from longtake.datasets import captions, compact, index, schema, scores, storage, view
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.scores import Column
from longtake.pipeline import column as columns
from longtake.pipeline import layouts

_RECORD = "longtake-layout.json"
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,199}")  # of every `shard` stage, and of some that others wrote


@dataclass(frozen=True, eq=False)
class Chosen:
    """The clips of a dataset that are written out.

    bases      the rows of its shards by split
    keeps      (N,) bool of each split, the clips that are chosen
    captions   the column with their captions; None: they have none
    digest     of all that decides what is written
    scores     columns of scores by their names in rules
    """

    dataset: str
    bases: dict[str, compact.Rows]
    keeps: dict[str, np.ndarray]
    captions: str | None
    digest: str
    scores: Mapping[str, Column] = field(default_factory=dict)

    def shards(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """Split, number and kept rows, of which it has some, of each shard that is written, in order."""
        for split, base in self.bases.items():
            for number, keep in enumerate(columns.by_shard(base, self.keeps[split]).values()):
                if keep.any():
                    yield split, number, np.flatnonzero(keep)


def choose(
    dataset: str, view_url: str | None, column: str | None, scored: Mapping[str, Column] | None = None
) -> Chosen:
    """The clips that a view keeps, or all, with the captions of a column, or of the only one, and columns of scores.

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
    parts: list[Any] = [
        column,
        said,
        *(base.digest for base in bases.values()),
        *(digest for _, _, digest in kept.values()),
    ]
    for name, one in (scored or {}).items():
        parts += [name, *(compact.open_split(dataset, split, one.column)[0].digest for split in schema.SPLITS)]
    if labels := [changed for base in bases.values() for changed in _later_labels(base)]:
        parts.append(labels)
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return Chosen(dataset, bases, keeps, column, digest, scored or {})


def _later_labels(base: compact.Rows) -> Iterator[tuple[str, str | None]]:
    """Key and label of each clip whose label has changed since it was cut: the digests of the tars do not tell."""
    for number, name in enumerate(base.shards["name"].to_pylist()):
        if name in base.later:
            keys, then, now = base.of(number)["key"], base.of(number)["label"], base.labelled(number)["label"]
            for key, old, new in zip(keys.to_pylist(), then.to_pylist(), now.to_pylist(), strict=True):
                if new != old:
                    yield key, new


def clips_of(chosen: Chosen, split: str, number: int, vectors: bool = False) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The mp4 of each chosen clip of a shard, and the facts about it: see `facts_of`.

    Raises:
        Failure: a clip is missing or damaged, or a column is of other clips.
    """
    base = chosen.bases[split]
    tar = base.tar(number)[0]
    for row, facts in facts_of(chosen, split, number, vectors):
        yield columns.clip_bytes(tar, row), facts


def facts_of(
    chosen: Chosen, split: str, number: int, vectors: bool = False
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The index row of each chosen clip of a shard, and the facts about it: `key`, `captions`, `label`, `seconds` and others.

    Where scores are written, `scores` has them by name and field; vectors are among them only where they are asked for.

    Raises:
        UserError: a key is no name of a file; in some layouts it becomes one, or a member of a tar.
        Failure: the shard's captions or scores are of other clips.
    """
    base = chosen.bases[split]
    start, table = int(base.starts[number]), base.labelled(number)
    said: list[Any] = [None] * len(table)
    if chosen.captions:
        said = _table(chosen, split, number, chosen.captions, "caption")["captions"].to_pylist()
    values = _scores(chosen, split, number, vectors)
    for place, row in enumerate(table.to_pylist()):
        if chosen.keeps[split][start + place]:
            if not _KEY.fullmatch(row["key"] or ""):
                key = storage.printable(str(row["key"]))[:200]
                raise UserError(
                    f"{base.tar(number)[0]}: {key!r} is no key of a clip; export a dataset that `shard` made"
                )
            names = ("key", "source", "label", "fps", "frame_count", "width", "height", *schema.SCORES)
            facts = {name: row[name] for name in names}
            facts |= {"split": split, "seconds": row["frame_count"] / row["fps"], "captions": said[place] or []}
            if values:
                of_clip = {name: {field: value[place] for field, value in of.items()} for name, of in values.items()}
                facts["scores"] = of_clip
            yield row, facts


def fields_of(chosen: Chosen, vectors: bool) -> dict[str, list[scores.Field]]:
    """The fields of scores that are written, by the names of their columns."""
    kept = {
        name: [each for each in column.fields if vectors or each.kind != "vector"]
        for name, column in chosen.scores.items()
    }
    return {name: fields for name, fields in kept.items() if fields}


def _scores(chosen: Chosen, split: str, number: int, vectors: bool) -> dict[str, dict[str, list[Any]]]:
    """Name, field and values of the scores of a shard, null where it is not scored."""
    found = {}
    for name, fields in fields_of(chosen, vectors).items():
        column = chosen.scores[name].column
        rows = int(chosen.bases[split].counts[number])
        if storage.exists(storage.join(chosen.dataset, split, f"{chosen.bases[split].name(number)}.{column}.parquet")):
            table = _table(chosen, split, number, column, "score")
            found[name] = {each.name: table[each.name].to_pylist() for each in fields}
        else:
            found[name] = {each.name: [None] * rows for each in fields}
    return found


def _table(chosen: Chosen, split: str, number: int, column: str, stage: str) -> Any:
    """A shard of a column, the rows in the order of the base."""
    base = chosen.bases[split]
    table = index.read_shard(chosen.dataset, split, f"{base.name(number)}.{column}").table
    if not table["key"].equals(base.of(number)["key"]):
        raise Failure(f"{base.tar(number)[0]}: {column} is of other clips; run its `{stage}` stage again")
    return table


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
    module, counts = layouts.load(layout), {"clips": 0, "shards": 0}
    if hasattr(module, "check"):
        module.check(chosen)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--to {folder}: cannot be a folder ({e.strerror}); name another one") from e
    _begin(place, record)
    with tqdm(desc="export", total=sum(int(keep.sum()) for keep in chosen.keeps.values()), unit="clip") as bar:
        for split, number, kept in chosen.shards():
            if not module.exported(chosen, split, number, place):
                with storage.failing_clearly(folder):
                    module.export(chosen, split, number, place)
            counts["clips"] += len(kept)
            counts["shards"] += 1
            bar.update(len(kept))
        if hasattr(module, "finish"):
            with storage.failing_clearly(folder):
                module.finish(chosen, place)
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
    beside = target.parent / f"{target.stem}-videos"
    storage.sweep(str(target.parent))
    _begin(beside, {"layout": layout, "folder": str(Path(folder).absolute())})
    with storage.staged(manifest) as path, path.open("w") as file, tqdm(desc="import", unit="video") as bar:
        for row in layouts.load(layout).rows(Path(folder), beside):
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
    if [path.name for path in beside.iterdir()] == [_RECORD]:
        shutil.rmtree(beside)
    return count


def _begin(folder: Path, record: dict[str, Any]) -> None:
    """Make a folder of ours, without what a killed command left half. Raises UserError where it has something else."""
    with storage.failing_clearly(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        storage.sweep(str(folder))
        if any(folder.iterdir()):
            _check_same(folder / _RECORD, record)
        else:
            storage.write(str(folder / _RECORD), storage.canonical_json(record))
        for inner, _, _ in os.walk(folder):
            storage.sweep(inner)


def place_of(beside: Path, folder: Path, source: Path) -> Path:
    """Where to unpack a file or folder of a folder: of a name like its own that no other has."""
    name = source.relative_to(folder).with_suffix("").as_posix()
    alike = re.sub("[^A-Za-z0-9_.-]+", "-", name).strip(".-")[:80] or "videos"
    return beside / f"{alike}-{hashlib.sha256(source.relative_to(folder).as_posix().encode()).hexdigest()[:8]}"


def state_of(files: Iterable[Path]) -> str:
    """A line that is another one where one of these files has changed since."""
    states = [(path.name, path.stat()) for path in sorted(files)]
    return json.dumps([[name, state.st_size, state.st_mtime_ns] for name, state in states])
