"""`cluster`: group the clips of a dataset by an embedding, and find those that look alike.

The vectors are a field of a column of scores. A sample of them gives the centroids; actors of a Ray pool then give the
clips of some shards their clusters, as a column beside the shards, and find the pairs in some clusters. What is done is
kept, in a folder named by all that decides it, so that the same command continues with what is missing. Another similarity
makes the pairs alone again.
"""

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from longtake.datasets import alike, cluster_lists, clusters, compact, index, schema, scores, storage
from longtake.datasets.errors import Failure, UserError, near
from longtake.datasets.stage import DatasetInput, Input, StageConfig, ViewInput
from longtake.pipeline import clustering, pairs, rule_values
from longtake.pipeline import column as columns
from longtake.pipeline.cluster import TaskConfig
from longtake.pipeline.clustering import Part, Work
from longtake.pipeline.column import Job, WorkerConfig
from longtake.pipeline.score_shard import Report

VERSION = 1
PRODUCES = "clusters"

_PAIRS = "pairs"  # in place of a split, of a job that makes pairs
_POINTS = 64  # of the sample for each centroid


class RunConfig(TaskConfig):
    """What one worker asks of Ray, and the number of workers.

    workers   number of workers; null: as many as the cluster has room for
    """

    COSTLY: ClassVar[frozenset[str]] = TaskConfig.COSTLY | {"workers"}

    workers: int | None = Field(None, ge=1)


class Config(StageConfig):
    """Put each clip into a cluster of clips that look alike, and find the pairs whose vectors are at least so similar.

    dataset      the clips
    scores       of a `score` stage, with the embedding
    embedding    NAME.FIELD of the vectors, such as clip.vector; of several a clip, their mean counts
    view         only clips that it keeps get into clusters
    clusters     number of clusters; null: the square root of the number of clips
    sample       vectors that the centroids are made of; null: 64 for each
    iterations   of k-means
    border       a clip is compared in the second nearest cluster too, if its cosine there is less by this at most; 0: never
    similarity   least cosine of a pair; a `curate` stage may ask for more
    seed         of the sample and of k-means
    run          the workers
    """

    kind: Literal["cluster"]
    dataset: DatasetInput
    scores: Annotated[str, Input("scores")]
    embedding: str = Field(pattern=r"^[a-z][a-z0-9_]*\.[a-z][a-z0-9_]*$")
    view: ViewInput | None = None
    clusters: int | None = Field(None, ge=1, le=1 << 20)
    sample: int | None = Field(None, ge=1)
    iterations: int = Field(10, ge=1, le=1000)
    border: float = Field(0.02, ge=0, le=2)
    similarity: float = Field(0.9, gt=0, le=1)
    seed: int = Field(0, ge=0, lt=1 << 31)
    run: RunConfig = RunConfig()

    @field_validator("embedding", mode="before")
    @classmethod
    def _has_two_parts(cls, name: Any) -> Any:
        if isinstance(name, str) and name.count(".") != 1:
            raise ValueError(
                f"{name!r} is no NAME.FIELD; write a scorer's name in the recipe and its field, as clip.vector"
            )
        return name


def check(config: Config, inputs: Mapping[str, StageConfig]) -> None:
    """Raise ValueError where the `score` stage has no such vectors, as far as it can be known."""
    name, known = config.embedding.partition(".")[0], getattr(inputs.get("scores"), "scorers", None)
    if known and name not in known:
        raise ValueError(f"embedding: {config.embedding}: no scorer {name}; {near(name, known)}")
    fields = rule_values.fields_of_stage(inputs["scores"]) if known else None
    vectors = [each for each, field in (fields or {}).items() if field.kind == "vector"]
    if fields is not None and config.embedding not in vectors:
        what = "is no vector" if config.embedding in fields else "no such field"
        remedy = near(config.embedding, vectors) if vectors else "add an `embedding` to its `score` stage"
        raise ValueError(f"embedding: {config.embedding}: {what}; {remedy}")


def complete(uri: str) -> bool:
    """Whether all clips that the dataset has now are in clusters, and lists and pairs are whole."""
    try:
        record = clusters.read_clusters(uri)
        folder = storage.join(record.dataset, record.folder)
        cluster_lists.read_centroids(folder)
        whole = len(index.shard_names(folder, clusters.pairs_name(record.similarity))) == record.counts["groups"]
        whole = whole and len(cluster_lists.read_lists(folder)) == record.counts["lists"]
        return whole and columns.complete(record.dataset, record.column["column"], record.digests)
    except (UserError, Failure):
        return False


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """Make what is missing of the clusters, and write their record to `output`. Safe to run again.

    Raises:
        UserError: no dataset, no such embedding, or of another dataset; no clip has a vector; a package is missing.
        Failure: some could not be made.
    """
    if find_spec("faiss") is None:
        raise UserError("cluster: needs the package faiss; run `pip install 'longtake[curation]'`")

    # What to put into clusters, and by what.
    dataset = storage.absolute(inputs["dataset"])
    base = columns.open_base(dataset, inputs.get("view"))
    embedding, of = _embedding(config.embedding, inputs["scores"], dataset)
    digests = {split: rows.digest for split, rows in base.rows.items()}
    decides = config.model_dump(include={"clusters", "sample", "iterations", "border", "seed"})
    decides |= {"version": VERSION, "embedding": [embedding.column, of.name], "base": digests, "view": base.view}
    made = scores.Column(
        column=scores.column_name("cluster", decides),
        scorer="cluster",
        config=decides,
        digest="",
        fields=clusters.FIELDS,
    )
    folder = f"{clusters.FOLDER}/{made.column.rpartition('-')[2]}"
    work = Work(
        dataset,
        storage.join(dataset, folder),
        embedding.column,
        of.name,
        of.width,
        made,
        config.border,
        config.similarity,
    )

    # Centroids, lists, pairs: each needs all of the one before.
    centres = _centroids(config, work, base)
    places = list(alike.shards(dataset))
    pairs_name = clusters.pairs_name(config.similarity)
    with columns.sweeping(dataset, folder, f"{folder}/{cluster_lists.LISTS}", f"{folder}/{pairs_name}") as totals:
        parts = clustering.parts_of(places, of.width)
        jobs = _missing_lists(work, parts, base)
        if jobs:
            for split in schema.SPLITS:
                compact.forget(dataset, split, made.column)
        arguments = {"work": work, "parts": {(part.split, part.name): part for part in parts}}
        totals.update(columns.make("cluster lists", jobs, _task(config), _load_lists, [], arguments))
        groups = pairs.groups_of(cluster_lists.read_lists(work.folder))
        pair_jobs = _missing_pairs(work, groups)
        totals.update(
            columns.make("cluster pairs", pair_jobs, _task(config), _load_pairs, [], {"work": work, "groups": groups})
        )

    # The record.
    counts, capped = _counts(work, len(parts), len(groups), len(centres))
    _warn(counts, capped)
    record = clusters.Clusters(
        dataset=dataset,
        folder=folder,
        column=made.plain(),
        embedding={"column": embedding.column, "field": of.name, "width": of.width},
        view=inputs.get("view"),
        similarity=config.similarity,
        clips={split: int(rows.counts.sum()) for split, rows in base.rows.items()},
        digests=digests,
        counts=counts,
        capped=capped,
    )
    clusters.write_clusters(output, record)
    metrics = {name: float(count) for name, count in counts.items()} | {
        "bytes": float(_bytes(work.folder)),
        "made_lists": float(len(jobs)),  # in this run
        "made_groups": float(len(pair_jobs)),
        "debris_swept": float(totals["swept"]),
    }
    return {"uri": output, "metrics": metrics, "column": made.column}


def _embedding(name: str, uri: str, dataset: str) -> tuple[scores.Column, scores.Field]:
    """The column of the vectors, and their field. Raises UserError: there are none, or of another dataset."""
    record = scores.read_scores_of(uri, dataset)
    scorer, _, field = name.partition(".")
    if scorer not in record.columns:
        raise UserError(f"embedding: {name}: no scorer {scorer}; {near(scorer, record.columns)}")
    column = record.columns[scorer]
    kinds = {each.name: each for each in column.fields}
    if field not in kinds or kinds[field].kind != "vector":
        vectors = [f"{scorer}.{each.name}" for each in column.fields if each.kind == "vector"]
        raise UserError(f"embedding: {name}: is no vector; there are {', '.join(vectors) or 'none of this scorer'}")
    return column, kinds[field]


def _task(config: Config) -> WorkerConfig:
    return WorkerConfig(**config.run.model_dump(), gpus=0.0)


def _centroids(config: Config, work: Work, base: columns.Base) -> np.ndarray:
    """(K, D) float32, of a sample, unless they are there already. Raises UserError where no clip has a vector."""
    if storage.exists(storage.join(work.folder, cluster_lists.CENTROIDS)):
        return cluster_lists.read_centroids(work.folder)
    kept = sum(int(keep.sum()) for shards in base.keeps.values() for keep in shards.values())
    count = config.clusters or max(1, round(math.sqrt(kept)))
    points = clustering.sample(work, base.keeps, config.sample or _POINTS * count, config.seed)
    if not len(points):
        raise UserError(
            f"embedding: {config.embedding}: no clip has a vector; `longtake dataset show {work.dataset} KEY` says why"
        )
    centres = clustering.centroids(points, count, config.iterations, config.seed)
    cluster_lists.write_centroids(work.folder, centres)
    return centres


def _missing_lists(work: Work, parts: Sequence[Part], base: columns.Base) -> list[Job]:
    """The parts without a file of lists, or of whose shards one lacks its column."""
    there = {one.rpartition(".")[0] for one in storage.names(storage.join(work.folder, cluster_lists.LISTS))}
    tables = {split: set(index.shard_names(work.dataset, split, work.column.column)) for split in schema.SPLITS}
    jobs = []
    for part in parts:
        scored = all(f"{name}.{work.column.column}" in tables[part.split] for name in part.shards)
        if not scored or f"{part.split}-{part.name}" not in there:
            keep = np.concatenate([base.keeps[part.split][name] for name in part.shards])
            jobs.append(Job(part.split, part.name, part.clips, np.packbits(keep).tobytes()))
    return jobs


def _missing_pairs(work: Work, groups: Sequence[pairs.Group]) -> list[Job]:
    """The groups of clusters whose pairs are not there."""
    there = index.shard_names(work.folder, clusters.pairs_name(work.similarity))
    names = [f"{number:05d}" for number in range(len(groups))]
    return [Job(_PAIRS, name, group.clips, b"") for name, group in zip(names, groups, strict=True) if name not in there]


def _load_lists(device: str, *, work: Work, parts: Mapping[tuple[str, str], Part]) -> columns.Make:
    """The function that makes the lists of a part, loaded in an actor."""
    centres = cluster_lists.read_centroids(work.folder)

    def make(*, split: str, name: str, keep: np.ndarray, report: Report) -> dict[str, int]:
        try:
            return clustering.make_lists(work, centres, parts[split, name], keep, report)
        except UserError as e:
            # vectors of another size: one line, as of any other part that fails
            raise Failure(str(e)) from e

    return make


def _load_pairs(device: str, *, work: Work, groups: Sequence[pairs.Group]) -> columns.Make:
    """The function that finds the pairs of a group of clusters, loaded in an actor."""
    lists = cluster_lists.read_lists(work.folder)

    def make(*, split: str, name: str, keep: np.ndarray, report: Report) -> dict[str, int]:
        return pairs.make_pairs(work, lists, groups[int(name)], name, report)

    return make


def _counts(work: Work, lists: int, groups: int, clusters_made: int) -> tuple[dict[str, int], dict[str, float]]:
    """The counts of a record, and the clusters that had too many pairs."""
    name = clusters.pairs_name(work.similarity)
    counts = Counter[str](clips=0, visits=0, clusters=clusters_made, lists=lists, groups=groups)
    counts.update(pairs=0, crowd_clips=0, cut_clusters=0, capped_clusters=0)
    for one in cluster_lists.read_lists(work.folder):
        homes = int(one.bounds(0, one.count)[1].sum())
        counts.update(clips=homes, visits=one.clips - homes)
    capped: dict[str, float] = {}
    for each in index.shard_names(work.folder, name):
        shard = index.read_shard(work.folder, name, each)
        notes = index.read_notes(work.folder, shard)
        capped |= notes["capped"]
        counts.update(pairs=len(shard.table), crowd_clips=notes["crowd"], cut_clusters=len(notes["cut"]))
    counts["capped_clusters"] = len(capped)
    return dict(counts), capped


def _bytes(folder: str) -> int:
    fs, path = storage.filesystem(folder)
    return sum(int(entry["size"] or 0) for entry in fs.find(path, detail=True).values())


def _warn(counts: Mapping[str, int], capped: Mapping[str, float]) -> None:
    """Say on stderr what is not whole."""
    if capped:
        print(
            f"warning: {len(capped)} clusters had too many pairs and have the strongest alone, the worst from a cosine of"
            f" {max(capped.values()):.4f} on; give `cluster` a greater similarity, or more clusters",
            file=sys.stderr,
        )
    if counts["cut_clusters"]:
        print(
            f"warning: {counts['cut_clusters']} clusters had too many clips to compare each with each, and were cut;"
            " give `cluster` more clusters",
            file=sys.stderr,
        )
