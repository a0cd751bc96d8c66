"""`cache_text`: the token states of every caption from a text encoder, as a column beside the shards.

Each actor of a Ray pool loads the encoder and takes shard after shard. The column is named by all that
decides its states: the encoder's weights and tokenizer, what is made of a text, and the column of captions. A caption that
changes later is encoded alone, since a shard that is made again takes from the old one what it has.
"""

import hashlib
import importlib
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow.compute as pc
from pydantic import Field

from longtake.datasets import compact, index, schema, storage
from longtake.datasets import text as records
from longtake.datasets.captions import Captions, read_captions
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.stage import DatasetInput, Input, ViewInput
from longtake.datasets.text import WORDS, Text, TextConfig, read_text
from longtake.pipeline import column as columns
from longtake.pipeline import shared_text, text
from longtake.pipeline.column import WorkerConfig
from longtake.pipeline.exact import be_exact

VERSION = 1
PRODUCES = "text"

_PROBED = 8  # values by which an encoder is known again
_STORE = "MLFLOW_TRACKING_URI"  # where registered encoders are


class EncodeConfig(WorkerConfig):
    """How the workers encode.

    batch   captions that are encoded together
    """

    COSTLY = WorkerConfig.COSTLY | {"batch"}

    batch: int = Field(64, ge=1)


class Config(TextConfig):
    """Encode all captions of a dataset once: the states of their tokens, as many as each caption has.

    Without an encoder these are packaged embeddings of words, which need no GPU. A folder, of an encoder or of a pipeline in
    the layout of diffusers, is read by every worker, so it has to be where all of them see it. A registered model is the
    version that it names when the stage begins. Nothing is ever downloaded. The same weights, settings and kind of machine
    give the same bytes for any number of workers.

    dataset    whose clips these are
    captions   a `caption` stage
    view       encode the captions of its kept clips only; loaders must then leave the others out
    run        the workers that encode
    """

    kind: Literal["cache_text"]
    dataset: DatasetInput
    captions: Annotated[str, Input("captions")]
    view: ViewInput | None = None
    run: EncodeConfig = EncodeConfig()

    def encoder_config(self) -> TextConfig:
        return TextConfig(**self.model_dump(include=set(TextConfig.model_fields)))


def outside(config: Config) -> str:
    """A digest of the names, sizes and times of the encoder's files; empty where they lie in no folder."""
    folder = Path(config.encoder).expanduser()
    if config.encoder == WORDS or not folder.is_dir():
        return ""
    # of a pipeline its encoder and tokenizer alone
    inside = (
        [folder / name for name in ("text_encoder", "tokenizer")]
        if (folder / "model_index.json").is_file()
        else [folder]
    )
    found = (path for place in inside for path in place.rglob("*"))
    files = sorted(path for path in found if path.is_file() and not path.name.startswith("."))
    # weights that were trained further have the size of before
    listed = [f"{path.relative_to(folder)} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()


def complete(uri: str) -> bool:
    """Whether all captions that the dataset has now have states."""
    try:
        record = read_text(uri)
        return columns.complete(record.dataset, record.column, record.digests) and (
            _digests(record.dataset, record.captions) == record.captions_digests
        )
    except (UserError, Failure):
        return False


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """Encode what is missing of the column, and write its record and the states of "" to `output`. Safe to run again.

    Raises:
        UserError: no dataset, no captions, or of another dataset; an encoder that cannot be used.
        Failure: some shards could not be encoded.
    """
    # What to encode, and by what.
    dataset = storage.absolute(inputs["dataset"])
    base = columns.open_base(dataset, inputs.get("view"))
    captions = _captions(inputs["captions"], dataset)
    spoken_digests = _digests(dataset, captions.column)
    encoder = _encoder(config.encoder_config().model_dump())
    empty = encoder.encode([""])[0]
    probe = empty.flatten()[:_PROBED].tolist()
    described = encoder.describe() | {"digest": encoder.digest, "width": encoder.width, "probe": probe}
    column = text.column_name(encoder.digest, captions.column, base.view)
    del encoder  # the workers load their own

    # What is missing.
    jobs = [
        job
        for split, keeps in base.keeps.items()
        for job in text.missing(dataset, split, column, captions.column, keeps)
    ]
    with columns.sweeping(dataset) as totals:
        if jobs:
            siblings = text.others(dataset, column, described["digest"])
            work = text.Work(dataset, column, captions.column, config.run.batch, siblings)
            shared = _shared_jobs(config, work, base, jobs, output)
            for split in schema.SPLITS:
                compact.forget(dataset, split, column)
            threads = max(1, int(config.run.cpus))
            arguments = {"encoder": described, "work": work, "output": output, "threads": threads}
            arguments["store"] = os.environ.get(_STORE)
            for part in (shared, jobs):
                totals.update(columns.make("cache_text", part, task(config), _load, [], arguments))

    # The record.
    shards = columns.shards_of(dataset, column, base)
    counts = _counts(dataset, shards)
    found = Text(
        dataset=dataset,
        column=column,
        encoder=described,
        captions=captions.column,
        view=inputs.get("view"),
        digests={split: rows.digest for split, rows in base.rows.items()},
        captions_digests=spoken_digests,
        counts=counts,
    )
    records.write_text(output, found, empty)
    shared_text.forget(output)
    return {"uri": output, "metrics": _metrics(counts, shards, jobs, totals), "column": column}


def _captions(uri: str, dataset: str) -> Captions:
    """The record of the captions. Raises UserError where they are of another dataset."""
    captions = read_captions(uri)
    if storage.absolute(captions.dataset) != dataset:
        raise UserError(f"captions: {uri}: are of {captions.dataset}, not of {dataset}; name a stage of this dataset")
    return captions


def _digests(dataset: str, captions: str) -> dict[str, str]:
    """Digests of the shards of captions, by split."""
    return {split: compact.open_split(dataset, split, captions)[0].digest for split in schema.SPLITS}


def _encoder(settings: Mapping[str, Any]) -> Any:
    # through the public door, as any user: the pipeline does not import training
    longtake: Any = importlib.import_module("longtake")
    return longtake.text_encoder(**settings)


def task(config: Config) -> EncodeConfig:
    """What a worker needs: no GPU for looking up words, unless it is asked for."""
    run = config.run
    return run.model_copy(update={"gpus": 0.0}) if config.encoder == WORDS and run.gpus is None else run


def _shared_jobs(
    config: Config, work: text.Work, base: columns.Base, jobs: list[columns.Job], output: str
) -> list[columns.Job]:
    """The parts of what several shards have, where it is worth encoding by itself; looking up words is less than a copy.

    Raises:
        UserError: there are no captions.
    """
    found = shared_text.count(work.dataset, work.captions, base.keeps)
    if not found.captions:
        raise UserError(f"captions: {work.captions}: no clip has a caption; give the manifest some, or a captioner")
    if config.encoder == WORDS or not found.is_worth:
        return []
    return shared_text.plan(work, found.shared, jobs, output)


def _load(
    device: str, *, encoder: Mapping[str, Any], work: text.Work, output: str, threads: int, store: str | None = None
) -> columns.Make:
    """The function that encodes a shard, loaded in an actor. Raises UserError where the worker finds another encoder."""
    if store:
        # Ray may have been started without it
        os.environ.setdefault(_STORE, store)
    be_exact(threads)
    found = _encoder({name: encoder[name] for name in TextConfig.model_fields})
    if found.digest != encoder["digest"]:
        raise UserError(f"encoder: {encoder['encoder']}: a worker finds another there than the driver; copy it to all")
    elsewhere = shared_text.places(output, work.column)
    return partial(_make, found, replace(work, device=device), elsewhere, output)


def _make(
    encoder: Any,
    work: text.Work,
    elsewhere: Mapping[str, records.Stored],
    output: str,
    *,
    split: str,
    name: str,
    keep: np.ndarray,
    report: text.Report,
) -> dict[str, int]:
    if split == shared_text.SPLIT:
        return shared_text.make_shared(encoder, work, output, name, report)
    return text.make_text(encoder, work, split, name, keep, elsewhere, report)


def _counts(dataset: str, shards: list[index.Shard]) -> dict[str, int]:
    """Counts over all shards of the column."""
    names = ("clips", "clips_without", "clips_left_out", "captions", "texts", "texts_cut", "tokens")
    counts = Counter(dict.fromkeys(names, 0))
    for shard in shards:
        notes, texts = index.read_notes(dataset, shard), shard.table["texts"]
        lengths = pc.list_value_length(texts)
        counts.update({name: int(notes[name]) for name in ("texts", "texts_cut", "tokens")})
        counts.update(clips=len(texts), clips_without=texts.null_count, captions=pc.sum(lengths).as_py() or 0)
        counts.update(clips_left_out=pc.sum(pc.equal(lengths, 0)).as_py() or 0)  # by the view
    return dict(counts)


def _metrics(
    counts: Mapping[str, int], shards: list[index.Shard], jobs: list[columns.Job], totals: Counter[str]
) -> dict[str, float]:
    return {name: float(count) for name, count in counts.items()} | {
        "bytes": float(sum(shard.tar_bytes for shard in shards)),
        "shards": float(len(shards)),
        "encoded_shards": float(len(jobs)),  # in this run
        "encoded_texts": float(totals["encoded"]),
        "copied_texts": float(totals["copied"]),  # from the shard before it, or from what several shards have
        "debris_swept": float(totals["swept"]),
    }
