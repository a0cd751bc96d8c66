"""`curate`: choose the clips of a dataset to use, as a view. Shards do not change; only encoders decode frames."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, FiniteFloat, ValidationInfo, field_validator, model_validator

from longtake.datasets import compact, schema, storage, view
from longtake.datasets.errors import UserError
from longtake.datasets.stage import DatasetInput, Input, StageConfig, Utf8
from longtake.pipeline import dedup, described, embed

VERSION = 2
PRODUCES = "view"

_COLUMNS = (*schema.SCORES, "frame_count", "width", "height")

Percentile = Annotated[float, Field(ge=0, le=100)]
Drops = Iterator[tuple[str, np.ndarray]]  # (reason, row numbers)


class Bounds(StageConfig):
    """Inclusive bounds of a score; null is no bound.

    min, max                         of the score
    min_percentile, max_percentile   of the scores of all clips of the dataset
    """

    min: FiniteFloat | None = None
    max: FiniteFloat | None = None
    min_percentile: Percentile | None = None
    max_percentile: Percentile | None = None

    @model_validator(mode="after")
    def _ordered(self) -> "Bounds":
        for unit in ("", "_percentile"):
            low, high = getattr(self, f"min{unit}"), getattr(self, f"max{unit}")
            if low is not None and high is not None and low > high:
                raise ValueError(f"min{unit} {low:g} is above max{unit} {high:g}, which keeps nothing; swap them")
        return self


class NearDuplicates(StageConfig):
    """Clips that look alike to a perceptual hash.

    radius   most bits of 64 in which their hashes differ
    """

    radius: int = Field(4, ge=0, le=16)


class Scorer(StageConfig):
    """A score of a clip: by an encoder of its middle frame, or by its likeness to a picture or a prompt.

    encoder   TorchScript file: frames (B, 3, size, size) in 0..1 -> (B, 1), for example beauty; with a picture (B, D)
    size      pixels a side
    image     a picture; the score is the cosine of its vector and the frame's
    prompt    a text; the score is the cosine of it and the most similar caption, by the stage's `text`; no encoder
    """

    encoder: str | None = None
    size: int = Field(224, ge=8)
    image: str | None = None
    prompt: Utf8 | None = None

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, prompt: str | None) -> str | None:
        if prompt is not None and not prompt.strip():
            raise ValueError("says nothing; write what is to be seen, or leave it out")
        return prompt

    @model_validator(mode="after")
    def _has_one_way(self) -> "Scorer":
        if (self.encoder is None) == (self.prompt is None):
            raise ValueError("needs an encoder or a prompt, and one of them")
        if self.image and not self.encoder:
            raise ValueError("image: is compared by an encoder; name one in place of the prompt")
        return self


class CaptionRules(StageConfig):
    """Rules on what the stage's `captions` say of a clip.

    missing      keep clips without captions
    min_words    fewest words of one caption at least
    languages    one caption at least names one of these as its language, such as [en]
    match        a regular expression (RE2) that one caption at least must have somewhere, such as "(?i)\\bdogs?\\b"
    avoid        a regular expression that no caption may have
    duplicates   drop a clip of which nothing else is said than of an earlier one
    """

    missing: bool = False
    min_words: int = Field(0, ge=0, le=1 << 20)  # bytes of a manifest's row
    languages: tuple[Utf8, ...] = ()
    match: Utf8 | None = None
    avoid: Utf8 | None = None
    duplicates: bool = False

    @field_validator("match", "avoid")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            pc.match_substring_regex(pa.array([""]), pattern or "")
        except pa.ArrowInvalid as e:
            raise ValueError(f"{pattern!r} is no regular expression ({e}); see RE2's syntax") from e
        return pattern


class Embedding(StageConfig):
    """Clips whose middle frames look alike to an image encoder (see `pipeline.embed`).

    encoder      TorchScript file: frames (B, 3, size, size) in 0..1 -> (B, D)
    size         pixels a side
    similarity   least cosine of two clips that repeat each other
    clusters     number of clusters within which clips are compared; null: one for every 1000 clips
    """

    encoder: str
    size: int = Field(224, ge=8)
    similarity: float = Field(0.95, gt=0, le=1)
    clusters: int | None = Field(None, ge=1)


class Balance(StageConfig):
    """Even out the classes of the training clips. A class is a label.

    most      most clips of a class
    weights   weigh clips against the counts of their classes
    """

    MOVED: ClassVar = {"by": "is always the label; leave it out"}

    most: int | None = Field(None, ge=1)
    weights: bool = False

    @model_validator(mode="after")
    def _does_something(self) -> "Balance":
        if self.most is None and not self.weights:
            raise ValueError("asks for nothing; give `most: N`, `weights: true` or both")
        return self


class Config(StageConfig):
    """The tests that a clip must pass to be used, in this order; the first that it fails is the reason in the view.

    `rules` maps a score to its bounds, such as `{motion: {min: 0.004}, sharpness: {min_percentile: 5}}`. `scores` names
    more scores: `{aesthetic: {encoder: aesthetic.pt}, dogs: {prompt: a dog runs}}`; the view has their values.

    Of clips that repeat each other one stays: a held-out clip rather than a training clip, so that nothing held out is
    trained on, then the first by key. Balancing does not touch held-out clips; clips without a label are a class.

    dataset            the clips
    captions           of a `caption` stage, for caption_rules
    text               of a `cache_text` stage, for scores by prompts
    scores             more scores, from encoders, pictures and prompts
    rules              bounds of scores: min, max, min_percentile, max_percentile
    caption_rules      drop clips by what their captions say
    exact_duplicates   drop clips whose pixels are equal
    near_duplicates    drop clips whose perceptual hashes are near
    embedding          drop clips whose embeddings are near
    balance            even out the classes
    """

    kind: Literal["curate"]
    dataset: DatasetInput
    captions: Annotated[str, Input("captions")] | None = None
    text: Annotated[str, Input("text")] | None = None
    scores: dict[Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")], Scorer] = Field({})
    rules: dict[str, Bounds] = Field(default_factory=lambda: {"motion": Bounds(min=0.002), "still": Bounds(max=0.9)})
    caption_rules: CaptionRules | None = None
    exact_duplicates: bool = True
    near_duplicates: NearDuplicates | None = None
    embedding: Embedding | None = None
    balance: Balance | None = None

    @field_validator("scores")
    @classmethod
    def _without_clashes(cls, scores: dict[str, Scorer]) -> dict[str, Scorer]:
        if clashes := set(scores) & {*schema.INDEX.names, *schema.VIEW.names}:
            raise ValueError(f"{', '.join(sorted(clashes))} is the name of a column of the dataset; choose another")
        return scores

    @field_validator("rules")
    @classmethod
    def _of_scores(cls, rules: dict[str, Bounds], info: ValidationInfo) -> dict[str, Bounds]:
        scores = (*_COLUMNS, *info.data.get("scores", {}))
        if unknown := set(rules) - set(scores):
            raise ValueError(f"unknown score {', '.join(sorted(unknown))}; there are {', '.join(scores)}")
        return rules

    @model_validator(mode="after")
    def _has_words(self) -> "Config":
        if self.caption_rules and not self.captions:
            raise ValueError("caption_rules: need captions; name a `caption` stage in captions")
        if prompts := [name for name, scorer in self.scores.items() if scorer.prompt and not self.text]:
            raise ValueError(f"scores.{prompts[0]}.prompt: needs texts; name a `cache_text` stage in text")
        return self


def outside(config: Config) -> str:
    """The digests of the encoders' files, and of pictures."""
    encoders = {f"scores.{name}": scorer.encoder for name, scorer in config.scores.items() if scorer.encoder}
    encoders |= {"embedding": config.embedding.encoder} if config.embedding else {}
    contents = [embed.read_encoder(path, key) for key, path in encoders.items()]
    contents += [embed.read_image(s.image, f"scores.{name}") for name, s in config.scores.items() if s.image]
    return " ".join(hashlib.sha256(content).hexdigest() for content in contents)


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """Write the view beside the shards: DATASET/views/NAME.parquet.

    Raises:
        UserError: no clip is kept, no clip has a label to balance by, or an encoder does not work.
        Failure: a clip is not readable.
    """
    dataset = inputs["dataset"]
    clips = _scored(config, inputs, _by_preference(dataset))
    if config.balance and clips["label"].null_count == len(clips):
        raise UserError("balance: no clip has a label; give the manifest a `label` column or leave `balance` out")
    if config.captions:
        clips = clips.append_column("captions", described.captions_of(dataset, inputs["captions"], clips))
    reasons, keep = np.full(len(clips), None, object), np.ones(len(clips), bool)
    for test in (_rules, _captions, _exact, _near, _embedding, _balance):
        for reason, rows in test(config, dataset, clips, np.flatnonzero(keep)):
            reasons[rows[keep[rows]]] = reason
            keep[rows] = False
    dropped = Counter[str](reasons[~keep].tolist())
    if not keep.any():
        raise UserError(f"rules: none of {len(clips)} clips is kept ({dict(dropped)}); loosen the rules of this stage")
    uri = storage.join(dataset, "views", f"{output.rstrip('/').rsplit('/', 1)[-1]}.parquet")
    table = view.rows(clips["split"], clips["key"], reasons, _weights(config, clips, np.flatnonzero(keep)))
    for name in config.scores:
        table = table.append_column(name, clips[name])
    # in the order of the shards, so that readers need not match rows by key
    table = table.take(pc.sort_indices(clips, [("split", "ascending"), ("row", "ascending")]))
    view.write(uri, table, {split: compact.open_split(dataset, split)[0].digest for split in schema.SPLITS})
    return {
        "uri": uri,
        "metrics": {"clips_kept": float(keep.sum()), "clips_dropped": float(dropped.total())},
        "dropped_by_reason": dict(dropped),
    }


def _by_preference(dataset: str) -> pa.Table:
    """All clips with their `split`, in order of preference among clips that repeat each other."""
    tables = []
    for split in ("val", "train"):
        clips = compact.table(dataset, split)
        clips = clips.append_column("row", pa.array(np.arange(len(clips))))
        clips = clips.take(pc.sort_indices(clips["key"]))
        tables.append(clips.append_column("split", pa.repeat(split, len(clips))))
    return pa.concat_tables(tables)


def _scored(config: Config, inputs: Mapping[str, str], clips: pa.Table) -> pa.Table:
    for name, scorer in config.scores.items():
        clips = clips.append_column(name, pa.array(_score(scorer, f"scores.{name}", inputs, clips), from_pandas=True))
    return clips


def _score(scorer: Scorer, key: str, inputs: Mapping[str, str], clips: pa.Table) -> np.ndarray:
    """(N,) float32, NaN where a clip has no score."""
    dataset = inputs["dataset"]
    if scorer.prompt:
        return described.likeness(dataset, inputs["text"], clips, scorer.prompt, f"{key}.prompt")
    assert scorer.encoder
    values = embed.vectors(dataset, clips, scorer.encoder, scorer.size, key)
    if scorer.image:
        return embed.cosines(values, embed.image_vector(scorer.image, scorer.encoder, scorer.size, key))
    if values.shape[1] != 1:
        raise UserError(f"{key}.encoder: {scorer.encoder}: gives {values.shape[1]} numbers a frame; a score is (B, 1)")
    return values[:, 0]


def _rules(config: Config, dataset: str, clips: pa.Table, rows: np.ndarray) -> Drops:
    rules = {name: bounds.model_dump(exclude_none=True) for name, bounds in config.rules.items()}
    for reason, broken in view.broken(clips, rules):
        yield reason, np.flatnonzero(broken)


def _captions(config: Config, dataset: str, clips: pa.Table, rows: np.ndarray) -> Drops:
    if rules := config.caption_rules:
        captions = clips["captions"].take(rows).combine_chunks()
        if not rules.missing:
            yield "no caption", rows[np.asarray(captions.is_null())]
        wanted = (rules.min_words, rules.languages, rules.match, rules.avoid)
        for reason, which in described.broken(captions, *wanted):
            yield reason, rows[which]
        if rules.duplicates:
            yield "duplicate caption", rows[dedup.exact(described.sayings(captions))]


def _exact(config: Config, dataset: str, clips: pa.Table, rows: np.ndarray) -> Drops:
    if config.exact_duplicates:
        yield "exact duplicate", rows[dedup.exact(clips["sha256"].take(rows))]


def _near(config: Config, dataset: str, clips: pa.Table, rows: np.ndarray) -> Drops:
    if config.near_duplicates:
        hashes = clips["phash"].take(rows)
        hashed = rows[np.asarray(hashes.is_valid())]  # a clip without a hash is like no other
        yield "near duplicate", hashed[dedup.near(hashes.drop_null().to_numpy(), config.near_duplicates.radius)]


def _embedding(config: Config, dataset: str, clips: pa.Table, rows: np.ndarray) -> Drops:
    if settings := config.embedding:
        vectors = embed.vectors(dataset, clips.take(rows), settings.encoder, settings.size, "embedding")
        yield "similar embedding", rows[dedup.embedded(vectors, settings.similarity, settings.clusters)]


def _balance(config: Config, dataset: str, clips: pa.Table, rows: np.ndarray) -> Drops:
    if config.balance and config.balance.most:
        most = config.balance.most
        for label, members in _classes(clips, rows):
            if len(members) > most:
                # by a hash of the key: the first by key would all be from few sources
                digests = [hashlib.sha256(key.encode()).digest() for key in clips["key"].take(members).to_pylist()]
                chosen = sorted(range(len(members)), key=digests.__getitem__)
                class_ = f"of label {label}" if label is not None else "without a label"
                yield f"over {most} {class_}", members[chosen[most:]]


def _weights(config: Config, clips: pa.Table, rows: np.ndarray) -> np.ndarray:
    """(N,) weights; with `balance.weights` the weights of training clips add up to the same for every class."""
    weights = np.ones(len(clips))
    if config.balance and config.balance.weights:
        classes = list(_classes(clips, rows))
        total = sum(len(members) for _, members in classes)
        for _, members in classes:
            weights[members] = total / len(classes) / len(members)
    return weights


def _classes(clips: pa.Table, rows: np.ndarray) -> Iterator[tuple[str | None, np.ndarray]]:
    """Each label among the training clips of these rows, None included, with the rows that have it."""
    train = rows[np.asarray(pc.equal(clips["split"], "train").take(rows))]
    labels = clips["label"].take(train).combine_chunks().dictionary_encode(null_encoding="encode")
    codes = labels.indices.to_numpy()
    members = np.split(train[np.argsort(codes, kind="stable")], np.cumsum(np.bincount(codes))[:-1])
    yield from zip(labels.dictionary.to_pylist(), members, strict=False)
