"""`caption`: captions for a dataset's clips, as a table beside each shard: those of the manifest, others by a captioner.

What manifests say is always taken, with later annotations, and costs seconds. A captioner is asked about clips of which they
say nothing, in actors of a Ray pool, and never twice about one: an answer is kept before its shard is committed, and stays
when the annotations of another clip change. The name of the column depends on all that decides its texts.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import ConfigDict, Field, PositiveInt, field_validator, model_validator

from longtake.datasets import captions as records
from longtake.datasets import compact, index, later, schema, storage
from longtake.datasets.captions import Captions, read_captions
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.masking import shown
from longtake.datasets.stage import DatasetInput, Naming, StageConfig, ViewInput
from longtake.pipeline import captions
from longtake.pipeline import column as columns
from longtake.pipeline.captioner import answers, reply
from longtake.pipeline.column import Job, WorkerConfig

VERSION = 1
PRODUCES = "captions"

_DECIDES = {"prompt", "frames", "side", "max_characters", "answer_tokens", "settings"}  # what any captioner says
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OURS = {"model", "messages", "response_format"}  # fields of a request that are the stage's own


class CaptionConfig(WorkerConfig):
    """How clips are captioned.

    concurrency           requests at once to the endpoint, of each worker; there is one, unless `workers` says more
    requests_per_minute   most requests that begin in a minute, of all workers; null: no bound
    max_requests          budget of a run in requests, those that fail included; null: no bound
    max_tokens            budget of a run in tokens, of prompts and answers; null: no bound
    timeout_seconds       longest wait for one answer
    patience_seconds      longest wait for an endpoint that is busy or away, or fails at a clip; its request is tried again
    tries                 answers that a clip may have that are cut, empty, too long, or about another clip
    batch                 clips at once, of a local model
    """

    COSTLY = WorkerConfig.COSTLY | {"concurrency", "requests_per_minute", "batch"}

    concurrency: int = Field(16, ge=1)
    requests_per_minute: float | None = Field(None, gt=0)
    max_requests: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    timeout_seconds: float = Field(120, gt=0)
    patience_seconds: float = Field(600, ge=0)
    tries: int = Field(3, ge=1)
    batch: int = Field(4, ge=1)


class Config(StageConfig):
    """Caption the clips of a dataset: by its manifest, and where that says nothing by an endpoint or a local model.

    A manifest's `caption`, `captions` and `shots` are always taken. With `model` the other clips get one caption each. The
    name of the column depends on `model` and all settings below it, but not on `endpoint`, `key_env` and `run`.

    dataset          to caption
    view             make captions for its kept clips only; those of the manifest are taken for all
    model            a model's name at `endpoint`; without one the local folder of an image-text model of `transformers`
    endpoint         URL of an OpenAI-compatible server, such as http://localhost:8000/v1
    key_env          environment variable that has the endpoint's key; null: it needs none
    prompt           may have {frames}, {seconds} and {label} of the clip
    send             the clip as pictures, or as the video itself, which few servers take
    frames           pictures of a clip, spread evenly
    side             most pixels of a picture's longer side
    max_characters   a longer caption is of no use
    answer_tokens    most tokens of an answer
    settings         further fields of a request, such as {temperature: 0.2}; of a local model, of its `generate`
    run              the workers and requests
    """

    model_config = ConfigDict(hide_input_in_errors=True)  # a key may stand where it should not

    kind: Literal["caption"]
    dataset: DatasetInput
    view: ViewInput | None = None
    model: str | None = Field(None, min_length=1)
    endpoint: Annotated[str | None, Naming()] = None
    key_env: Annotated[str | None, Naming()] = None
    prompt: str = Field(reply.PROMPT, min_length=1)
    send: Literal["frames", "clip"] = "frames"
    frames: PositiveInt = 8
    side: int = Field(512, ge=32)
    max_characters: PositiveInt = 4000
    answer_tokens: PositiveInt = 1024
    settings: dict[str, Any] = Field({})
    run: CaptionConfig = CaptionConfig()

    @field_validator("prompt")
    @classmethod
    def _known(cls, prompt: str) -> str:
        if unknown := reply.unknown_fields(prompt):
            raise ValueError(f"unknown {{{unknown[0]}}}; there are {', '.join(f'{{{name}}}' for name in reply.FIELDS)}")
        return prompt

    @field_validator("key_env", mode="before")
    @classmethod
    def _is_a_name(cls, name: Any) -> Any:
        if name is not None and not (isinstance(name, str) and _VARIABLE.fullmatch(name)):
            raise ValueError("is no name of an environment variable; export the key in one, and write its name here")
        return name

    @field_validator("settings")
    @classmethod
    def _fit_a_request(cls, settings: dict[str, Any]) -> dict[str, Any]:
        for name, value in settings.items():
            if name in _OURS:
                raise ValueError(f"{name}: is the stage's own; leave it out")
            try:
                json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
            except (ValueError, TypeError, RecursionError) as e:
                raise ValueError(f"{name}: has a value that is no JSON; write a text or a finite number") from e
        return settings

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.endpoint is not None and self.model is None:
            raise ValueError("endpoint: needs the name of a model there; set `model`")
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            raise ValueError(f"endpoint: {shown(self.endpoint)} is no address; write http://HOST:PORT/v1")
        if self.endpoint is None and (self.key_env is not None or self.send == "clip"):
            raise ValueError("key_env and send: clip are for an endpoint; set `endpoint`, or leave them out")
        if self.run.stall_seconds <= self.run.patience_seconds + self.run.timeout_seconds:
            raise ValueError(
                f"run.stall_seconds {self.run.stall_seconds:g} must be more than run.patience_seconds and"
                " run.timeout_seconds together, which one request may take"
            )
        return self


class _Shard(NamedTuple):
    """What is to do for a shard: nothing, or a commit without a captioner, or a job for one."""

    committed: bool = False  # in this call
    replaced: bool = False  # it was committed before, of other annotations
    job: Job | None = None


def outside(config: Config) -> str:
    """A digest of the files of a local model; it has no inputs outside the recipe else."""
    if config.model is None or config.endpoint is not None or not Path(config.model).is_dir():
        return ""
    from longtake.pipeline.captioner.model import stamp_of

    return stamp_of(config.model)


def complete(uri: str) -> bool:
    """Whether all shards that the dataset has now are captioned, and neither clips nor annotations have changed since."""
    try:
        record = read_captions(uri)
        if not columns.complete(record.dataset, record.column, record.digests):
            return False
        # those that a shard was cut with never change
        names = [(split, name) for split in schema.SPLITS for name in sorted(later.shards(record.dataset, split))]

        def is_due(place: tuple[str, str]) -> bool:
            base = index.read_shard(record.dataset, *place)
            found = captions.said(record.dataset, base, images=False)
            return captions.is_due(captions.committed(record.dataset, base, record.column), found)

        with ThreadPoolExecutor(16) as pool:
            return not any(pool.map(is_due, names))
    except (UserError, Failure):
        return False


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """Caption what is missing of the column, and write its record to `output`. Safe to run again.

    Raises:
        UserError: no dataset; no such model, endpoint or key.
        Failure: some shards could not be captioned; the endpoint does not answer; the budget is used up.
    """
    # What to caption, and by what.
    dataset = storage.absolute(inputs["dataset"])
    base = columns.open_base(dataset, inputs.get("view"))
    captioner, maker = _captioner(config)
    column = captions.column_name(captioner, base.view)

    # What annotations and earlier runs give.
    images = captions.is_images(dataset)
    places = [(split, name, keep) for split, keeps in base.keeps.items() for name, keep in keeps.items()]
    # before a shard changes: compact files would go on giving the captions of before
    forget = cache(partial(compact.forget, dataset, column=column))
    with ThreadPoolExecutor(16) as pool:
        begun = list(pool.map(lambda place: _begin(dataset, column, maker, images, forget, *place), places))

    # What a captioner has to be asked about.
    jobs = [shard.job for shard in begun if shard.job]
    with columns.sweeping(dataset) as totals:
        if jobs:
            totals.update(_ask(config, dataset, column, maker, jobs))
    answers.sweep(dataset, column)

    # The record.
    counts = _counts(columns.shards_of(dataset, column, base))
    record = Captions(
        dataset=dataset,
        column=column,
        captioner=captioner,
        view=inputs.get("view"),
        digests={split: rows.digest for split, rows in base.rows.items()},
        counts=counts,
    )
    records.write_captions(output, record)
    metrics = {name: float(value) for name, value in counts.items() if "/" not in name} | {
        "shards": float(len(begun)),
        "captioned_shards": float(len(jobs) + sum(shard.committed for shard in begun)),  # in this run
        "replaced_shards": float(sum(shard.replaced for shard in begun)),  # of other annotations
        "asked_clips": float(totals["asked"]),
        "debris_swept": float(totals["swept"]),
    }
    return {"uri": output, "metrics": metrics, "column": column}


def _captioner(config: Config) -> tuple[dict[str, Any], str]:
    """All that decides what a captioner says, as plain data, and its name; empty without one.

    Raises:
        UserError: no such local model, or `transformers` is not installed.
    """
    if config.model is None:
        return {}, ""
    decides = config.model_dump(mode="json", include=_DECIDES)
    decides["version"] = reply.VERSION
    if config.endpoint is None:
        from longtake.pipeline.captioner.model import digest_of

        name = Path(config.model).name or "model"
        return decides | {"model": name, "digest": digest_of(config.model)}, name
    return decides | {"model": config.model, "send": config.send}, config.model


def _check_endpoint(config: Config, url: str) -> None:
    """Raises UserError: no such endpoint, a key that is not set, or `openai` is not installed."""
    if find_spec("openai") is None:
        raise UserError("endpoint: needs the package openai; run `pip install 'longtake[text]'`")
    if config.key_env is not None and not os.environ.get(config.key_env):
        raise UserError(
            f"key_env: the environment variable {config.key_env} is not set; export the endpoint's key in it"
        )
    from longtake.pipeline.captioner.server import unreachable

    if problem := unreachable(url):
        raise UserError(f"endpoint: {shown(url)}: does not answer ({shown(problem)}); start it, or correct the address")


def _begin(
    dataset: str,
    column: str,
    maker: str,
    images: bool,
    forget: Callable[[str], None],
    split: str,
    name: str,
    keep: np.ndarray,
) -> _Shard:
    """Commit a shard that needs no captioner, if it is due."""
    base = index.read_shard(dataset, split, name)
    if len(keep) != len(base.table):
        raise Failure(f"{dataset} ({split}): {name} has changed since it was listed; run the same command again")
    found = captions.said(dataset, base, images)
    earlier = captions.committed(dataset, base, column)
    if not captions.is_due(earlier, found):
        return _Shard()
    forget(split)
    rows = captions.begun(base, found, earlier, maker, keep)
    if None in rows:
        return _Shard(replaced=earlier is not None, job=Job(split, name, len(keep), np.packbits(keep).tobytes()))
    captions.commit(dataset, base, column, [row for row in rows if row])
    return _Shard(committed=True, replaced=earlier is not None)


def _ask(config: Config, dataset: str, column: str, maker: str, jobs: list[Job]) -> Counter[str]:
    """Have a captioner make the shards of the jobs.

    Raises:
        UserError: there is no such endpoint, or its key is not set.
        Failure: the budget is used up, or some could not be made.
    """
    arguments: dict[str, Any] = {"maker": maker, "dataset": dataset, "column": column}
    if config.endpoint is None:
        arguments["showing"] = _showing(config)
        return columns.make("caption", jobs, config.run, _load_model, [], arguments)
    _check_endpoint(config, config.endpoint)
    run = config.run
    workers = task(config).model_copy(update={"workers": run.workers or 1})
    budget = (run.requests_per_minute, run.max_requests, run.max_tokens)
    arguments |= {"asking": _asking(config), "key_env": config.key_env, "proven": _is_proven(dataset, column)}
    share = partial(_share_meter, budget)
    totals = columns.make("caption", jobs, workers, _load_endpoint, [], arguments, share)
    if totals["spent"]:
        bounds = [
            f"{value} {unit}" for value, unit in ((run.max_requests, "requests"), (run.max_tokens, "tokens")) if value
        ]
        raise Failure(
            f"caption: the budget of {' and '.join(bounds)} is used up: {totals['asked']} clips were answered in this run,"
            f" {totals['wanted'] - totals['answered']} are left; run the same command again: it goes on where it stopped"
        )
    return totals


def task(config: Config) -> CaptionConfig:
    """What a worker asks for: no GPU where an endpoint answers, or nobody is asked."""
    run = config.run
    return run.model_copy(update={"gpus": 0.0}) if config.endpoint or config.model is None else run


def _share_meter(budget: tuple[float | None, int | None, int | None], ray: Any) -> dict[str, Any]:
    from longtake.pipeline.captioner.meter import Meter

    return {"meter": ray.remote(num_cpus=0)(Meter).remote(*budget)}


def _is_proven(dataset: str, column: str) -> bool:
    """Whether the captioner has answered before: about a clip of a committed shard, or of one that is not committed yet."""
    if answers.are_kept(dataset, column):
        return True
    for split in schema.SPLITS:
        for name in index.shard_names(dataset, split, column):
            rows = index.read_shard(dataset, split, name).table.to_pylist()
            if any(row["captions"] and captions.is_asked(row) for row in rows):
                return True
    return False


def _showing(config: Config) -> Any:
    from longtake.pipeline.captioner.model import Showing

    folder = str(Path(config.model or "").absolute())
    return Showing(folder=folder, batch=config.run.batch, **config.model_dump(include=_DECIDES))


def _asking(config: Config) -> Any:
    from longtake.pipeline.captioner.endpoint import Asking

    names = _DECIDES | {"model", "send"}
    how = config.run.model_dump(include={"concurrency", "timeout_seconds", "patience_seconds", "tries"})
    return Asking(url=config.endpoint or "", key="", **config.model_dump(include=names), **how)


def _load_endpoint(
    device: str, *, asking: Any, key_env: str | None, proven: bool, meter: Any, **place: Any
) -> columns.Make:
    """The function that captions a shard by an endpoint, loaded in an actor."""
    from longtake.pipeline.captioner.endpoint import Endpoint
    from longtake.pipeline.captioner.meter import Shared
    from longtake.pipeline.captioner.shard import make_captions

    # the key is read where it is used, so that it is in no message between processes
    key = os.environ.get(key_env, "") if key_env else ""
    if key_env and not key:
        return partial(_fail, f"key_env: the environment variable {key_env} is not set where the worker runs")
    return partial(make_captions, Endpoint(replace(asking, key=key), Shared(meter), proven), **place)


def _load_model(device: str, *, showing: Any, **place: Any) -> columns.Make:
    """The function that captions a shard by a local model, loaded in an actor."""
    from longtake.pipeline.captioner.model import Model
    from longtake.pipeline.captioner.shard import make_captions

    try:
        model = Model(showing, device)
    except Failure as e:
        # an error of the jobs: Ray would restart an actor that fails here again and again
        return partial(_fail, str(e))
    return partial(make_captions, model, **place)


def _fail(problem: str, **_: Any) -> dict[str, int]:
    raise Failure(problem)


def _counts(shards: list[index.Shard]) -> dict[str, int]:
    """The counts of a record, of all shards of a column."""
    counts = Counter[str](clips=0, clips_without=0, captions=0)
    for shard in shards:
        counts["clips"] += len(shard.table)
        for made, reason in zip(shard.table["captions"].to_pylist(), shard.table["reason"].to_pylist(), strict=True):
            counts["captions"] += len(made or ())
            counts.update(f"source/{each['source']}" for each in made or ())
            if made is None:
                counts["clips_without"] += 1
                counts[f"reason/{reason.partition(':')[0]}"] += 1
    return dict(counts)
