"""`score`: give values to a dataset's clips once, as columns beside the shards, for every view.

Each actor of a Ray pool holds the scorers and takes shard after shard; a clip is decoded once for all columns that its shard
lacks. The name of a column depends on all that decides its values, the scorer's settings and weights first: another setting
makes another column, and nothing else in the dataset is touched. What it gives up: a view in the config is part of that
name; without a view all clips are scored, and every later view can use the columns.
"""

import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, ValidationError, field_validator

from longtake.datasets import compact, index, schema, score_columns, scores, storage
from longtake.datasets.errors import Failure, UserError, in_short, near
from longtake.datasets.scores import Column, Scores, read_scores
from longtake.datasets.stage import DatasetInput, StageConfig, ViewInput, content
from longtake.pipeline import column as columns
from longtake.pipeline import scorers as kinds
from longtake.pipeline.column import Job, WorkerConfig
from longtake.pipeline.scorers.scorer import Scorer

VERSION = 1
PRODUCES = "scores"

_NAME = "^[a-z][a-z0-9_]{0,39}$"
_TAKEN = "cluster"


class ScoreConfig(WorkerConfig):
    """How the workers score.

    gpus   GPUs of a worker, or a fraction of one; null: 1 if the cluster has any and a scorer is faster on it, else 0
    """


class Config(StageConfig):
    """Score the clips of a dataset. Each scorer makes a column, which rules of `curate` name as NAME.FIELD.

    `scorers` maps a name to a scorer's settings: `{motion: {}, beauty: {by: torchscript, file: aesthetic.pt}}`. Without it
    all are asked that need nothing from you. Pages: `pipeline/scorers/README.md` has every scorer, what it measures and how
    well. The same clips, settings, weights and kind of machine give the same bytes in every run.

    dataset   to score
    view      score its kept clips only
    scorers   by name; `by` is the scorer where the name is another, the rest are its settings
    run       the workers that score
    """

    kind: Literal["score"]
    dataset: DatasetInput
    view: ViewInput | None = None
    scorers: dict[Annotated[str, Field(pattern=_NAME)], dict[str, Any] | None] = Field({}, validate_default=True)
    run: ScoreConfig = ScoreConfig()

    @field_validator("scorers")
    @classmethod
    def _known(cls, scorers: dict[str, dict[str, Any] | None]) -> dict[str, dict[str, Any] | None]:
        """With every default written out, so that the settings say all that is done."""
        given = scorers or dict.fromkeys(kinds.PACK)
        return {name: _settings(name, dict(entry or {})) for name, entry in given.items()}


def _settings(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The settings of a scorer, checked. Raises ValueError."""
    if name == _TAKEN:
        raise ValueError(f"{name}: is what the column of a `cluster` stage is named; choose another name")
    by = entry.pop("by", name)
    if by not in kinds.SCORERS:
        hint = "" if by != name else " (for a name of your own add `by`)"
        raise ValueError(f"{name}: there is no scorer {by!r}; {near(str(by), kinds.SCORERS)}{hint}")
    config = kinds.load(by).config
    try:
        return {"by": by, **config.model_validate(entry).model_dump(mode="json")}
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        key = ".".join([name, *map(str, first["loc"])])
        if first["type"] == "extra_forbidden":
            remark = near(str(first["loc"][-1]), config.model_fields)
            raise ValueError(f"{key}: scorer {by} has no such setting; {remark}") from None
        raise ValueError(f"{key}: {first['msg'].removeprefix('Value error, ')}") from None


class _Asked(NamedTuple):
    """A scorer that a config asks for."""

    by: str
    scorer: Scorer
    config: Any

    def digest(self, name: str) -> str:
        """Of its files. Raises UserError, naming the key: a file, or a package, is missing."""
        try:
            return self.scorer.digest(self.config)
        except UserError as e:
            raise UserError(f"scorers.{name}: {e}") from e


def _asked(config: Config) -> dict[str, _Asked]:
    asked = {}
    for name, entry in config.scorers.items():
        settings = dict(entry or {})
        by = settings.pop("by")
        scorer = kinds.load(by)
        asked[name] = _Asked(by, scorer, scorer.config.model_validate(settings))
    return asked


def outside(config: Config) -> str:
    """The versions of the scorers, and digests of their files. Raises UserError: a file or a package is missing."""
    asked = _asked(config).items()
    return " ".join(f"{name} {one.scorer.version} {one.digest(name)}".rstrip() for name, one in asked)


def complete(uri: str) -> bool:
    """Whether all shards that the dataset has now are scored, and have not changed since."""
    try:
        record = read_scores(uri)
    except (UserError, Failure):
        return False
    return columns.complete(record.dataset, [*record.names.values()], record.digests)


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """Score what is missing of the columns, and write their record to `output`. Safe to run again, and twice at once.

    Raises:
        UserError: no dataset, or no clip to score; a file or package of a scorer is missing.
        Failure: some shards could not be scored.
    """
    # What to score, and by what.
    dataset = storage.absolute(inputs["dataset"])
    asked = _asked(config)
    base = columns.open_base(dataset, inputs.get("view"))
    made = {name: _column(name, one, base.view) for name, one in asked.items()}

    # What is missing.
    jobs = []
    for split, keeps in base.keeps.items():
        missing = list(_missing(dataset, split, [column.column for column in made.values()], keeps))
        # before a shard changes: compact files would go on giving the values of before
        for column in made.values() if missing else ():
            compact.forget(dataset, split, column.column)
        jobs += missing
    arguments = {
        "asked": [
            (made[name].plain(), kinds.SCORERS[one.by], one.config.model_dump(mode="json"))
            for name, one in asked.items()
        ],
        "dataset": dataset,
    }
    with columns.sweeping(dataset) as totals:
        totals.update(columns.make("score", jobs, task(config), _load, [], arguments))

    # The record.
    digests = {split: rows.digest for split, rows in base.rows.items()}
    scores.write_scores(output, Scores(dataset, made, inputs.get("view"), digests))
    metrics = {
        "clips": sum(keep.sum() for keeps in base.keeps.values() for keep in keeps.values()),
        "shards": sum(map(len, base.keeps.values())),
        "columns": len(made),
        "scored_shards": len(jobs),  # in this run
        "scored_columns": totals["columns"],  # of these shards
        "scored_clips": totals["clips"],
        "scored_frames": totals["frames"],
        "without_values": totals["without"],  # clips times columns
        "bytes": _bytes(dataset, [column.column for column in made.values()]),
        "debris_swept": totals["swept"],
    }
    names = {name: column.column for name, column in made.items()}
    return {"uri": output, "metrics": {name: float(value) for name, value in metrics.items()}, "columns": names}


def task(config: Config) -> ScoreConfig:
    """What a worker asks for: no GPU where none makes a scorer faster, unless it is asked for."""
    run = config.run
    faster = any(one.scorer.gpu for one in _asked(config).values())
    return run if faster or run.gpus is not None else run.model_copy(update={"gpus": 0.0})


def _column(name: str, asked: _Asked, view: str) -> Column:
    digest = asked.digest(name)
    config = content(asked.config)
    column = scores.column_name(name, [VERSION, asked.by, asked.scorer.version, config, digest, view])
    # where a model lies does not decide, but a search by text has to find it
    settings = asked.config.model_dump(mode="json")
    where = {key: value for key, value in settings.items() if key not in config or config[key] != value}
    return Column(column, asked.by, config, digest, asked.scorer.fields(asked.config), where)


def _missing(dataset: str, split: str, names: Sequence[str], keeps: Mapping[str, np.ndarray]) -> Iterator[Job]:
    """The base shards that one of the columns lacks, or has of other clips."""
    files = index.table_names(storage.join(dataset, split))
    committed = {file.removesuffix(".parquet") for file in files}

    def lacks(shard: str) -> bool:
        mine = [f"{shard}.{column}" for column in names]
        if not committed.issuperset(mine):
            return True
        base = index.read_shard(dataset, split, shard)
        return not all(score_columns.fits(dataset, base, column) for column in names)

    with ThreadPoolExecutor(16) as pool:
        for (shard, keep), absent in zip(keeps.items(), pool.map(lacks, keeps), strict=True):
            if absent:
                yield Job(split, shard, len(keep), np.packbits(keep).tobytes())


def _bytes(dataset: str, names: Sequence[str]) -> int:
    """Of all tables of these columns."""
    endings, total = tuple(f".{name}.parquet" for name in names), 0
    for split in schema.SPLITS:
        fs, path = storage.filesystem(storage.join(dataset, split))
        entries = fs.ls(path, detail=True) if fs.exists(path) else []
        total += sum(int(entry["size"] or 0) for entry in entries if entry["name"].endswith(endings))
    return total


def _load(device: str, *, asked: Sequence[tuple[dict[str, Any], str, dict[str, Any]]], dataset: str) -> columns.Make:
    """The function that scores a shard, loaded in an actor."""
    from longtake.pipeline.exact import be_exact
    from longtake.pipeline.score_shard import Work, make_scores

    be_exact()
    works = []
    for plain, module, settings in asked:
        scorer, column = kinds.of_module(module), scores.from_plain(plain)
        config = scorer.config.model_validate(settings)
        name = column.column.removeprefix(scores.PREFIX).rpartition("-")[0]
        # a file may have changed since the stage began, or be another one on this node
        if scorer.digest(config) != column.digest:
            raise UserError(
                f"scorers.{name}: the files of its scorer on {socket.gethostname()} are not those that the stage began"
                " with; copy them there, then run the same command again"
            )
        try:
            works.append(Work(column, scorer.load(config, device if scorer.gpu else "cpu")))
        except (UserError, Failure):
            raise
        except Exception as e:
            raise Failure(
                f"scorers.{name}: scorer {column.scorer} cannot be loaded on {socket.gethostname()} ({in_short(e)});"
                " install its packages and files there again, or leave it out"
            ) from e
    return partial(make_scores, works, dataset)
