"""`curate`: choose the clips of a dataset to use, as a view. Shards do not change; no frame is decoded."""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, ValidationInfo, field_validator, model_validator

from longtake.datasets import clusters, compact, schema, storage, view
from longtake.datasets.errors import UserError
from longtake.datasets.scores import Column, from_plain
from longtake.datasets.scores import Field as ScoreField
from longtake.datasets.stage import DatasetInput, Input, StageConfig, Utf8
from longtake.pipeline import dedup, described, rule_values, rules
from longtake.pipeline.rules import Balance, Bounds, CaptionRules, Drops, Labels

VERSION = 2
PRODUCES = "view"

# columns of the index
_NEEDED = ["key", "label", "sha256", "phash", *rules.NUMBERS]


class NearDuplicates(StageConfig):
    """Clips that look alike to a perceptual hash.

    radius   most bits of 64 in which their hashes differ
    """

    radius: int = Field(4, ge=0, le=16)


class SemanticDuplicates(StageConfig):
    """Clips whose embeddings are near, of those pairs that the stage's `clusters` have.

    similarity   least cosine of two clips that repeat each other; not below that of the `cluster` stage
    """

    similarity: float = Field(0.95, gt=0, le=1)


class Config(StageConfig):
    """The tests that a clip must pass to be used, in this order; the first that it fails is the reason in the view.

    `rules` maps a score to its bounds, such as `{motion: {min: 0.004}, light.flicker: {max_percentile: 95}}`. Every clip has
    the scores of its index; those of a `score` stage are named NAME.FIELD, as the recipe names the scorer. The view has the
    values of all scores that it stands on, but for those of the index. A percentile is of the clips that have the score.

    Of clips that repeat each other one stays: a held-out clip rather than a training clip, so that nothing held out is
    trained on, then the first by key. Balancing does not touch held-out clips; clips without a label are a class.

    dataset               the clips
    captions              of a `caption` stage, for caption_rules
    text                  of a `cache_text` stage, for prompts
    scores                of a `score` stage, for rules, labels and balance
    clusters              of a `cluster` stage, for semantic_duplicates
    prompts               scores by name and text, {dogs: a dog runs}: the cosine of it and a clip's most similar caption
    rules                 bounds of scores: min, max, min_percentile, max_percentile
    labels                which labels clips may have, {motion.move: {never: [shake]}}; `label` is that of the manifest
    caption_rules         drop clips by what their captions say
    exact_duplicates      drop clips whose pixels are equal
    near_duplicates       drop clips whose perceptual hashes are near
    semantic_duplicates   drop clips whose embeddings are near
    balance               even out the classes
    """

    MOVED: ClassVar = {
        "embedding": "is a scorer of a `score` stage now, and its pairs are of a `cluster` stage; name that in `clusters`"
        " and write `semantic_duplicates: {}`"
    }
    LATER: ClassVar = {"scores": None, "clusters": None, "prompts": {}, "labels": {}, "semantic_duplicates": None}

    kind: Literal["curate"]
    dataset: DatasetInput
    captions: Annotated[str, Input("captions")] | None = None
    text: Annotated[str, Input("text")] | None = None
    scores: Annotated[str, Input("scores")] | None = None
    clusters: Annotated[str, Input("clusters")] | None = None
    prompts: dict[Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")], Utf8] = Field({})
    rules: dict[str, Bounds] = Field(default_factory=lambda: {"motion": Bounds(min=0.002), "still": Bounds(max=0.9)})
    labels: dict[str, Labels] = Field({})
    caption_rules: CaptionRules | None = None
    exact_duplicates: bool = True
    near_duplicates: NearDuplicates | None = None
    semantic_duplicates: SemanticDuplicates | None = None
    balance: Balance | None = None

    @field_validator("scores", mode="before")
    @classmethod
    def _names_a_stage(cls, scores: Any) -> Any:
        if isinstance(scores, Mapping):
            raise ValueError(
                "is the name of a `score` stage; an encoder or an image is a scorer of that now (`by: torchscript`,"
                " `by: embedding`), and a prompt is a line of `prompts: {NAME: TEXT}` here"
            )
        return scores

    @field_validator("prompts")
    @classmethod
    def _say_something(cls, prompts: dict[str, str]) -> dict[str, str]:
        if clashes := set(prompts) & {*schema.INDEX.names, *schema.VIEW.names}:
            raise ValueError(f"{', '.join(sorted(clashes))} is the name of a column of the dataset; choose another")
        if silent := [name for name, prompt in prompts.items() if not prompt.strip()]:
            raise ValueError(f"{silent[0]} says nothing; write what is to be seen, or leave it out")
        return prompts

    @field_validator("rules")
    @classmethod
    def _of_scores(cls, bounds: dict[str, Bounds], info: ValidationInfo) -> dict[str, Bounds]:
        for name in bounds:
            if "." not in name:
                rules.refuse_unknown(name, (*rules.NUMBERS, *info.data.get("prompts", {})))
        return bounds

    @field_validator("labels")
    @classmethod
    def _of_labels(cls, labels: dict[str, Labels]) -> dict[str, Labels]:
        for name in labels:
            if "." not in name:
                rules.refuse_unknown(name, (rules.LABEL,))
        return labels

    @field_validator("balance")
    @classmethod
    def _of_a_label(cls, balance: Balance | None) -> Balance | None:
        if balance and "." not in balance.by:
            rules.refuse_unknown(balance.by, (rules.LABEL,))
        return balance

    @model_validator(mode="after")
    def _has_inputs(self) -> "Config":
        if self.caption_rules and not self.captions:
            raise ValueError("caption_rules: need captions; name a `caption` stage in captions")
        if self.prompts and not self.text:
            raise ValueError(f"prompts.{min(self.prompts)}: needs texts; name a `cache_text` stage in text")
        if self.semantic_duplicates and not self.clusters:
            raise ValueError("semantic_duplicates: need clusters; name a `cluster` stage in clusters")
        for key, name in self.named().items():
            field = "clusters" if name.startswith(f"{clusters.NAME}.") else "scores"
            if not (self.scores or getattr(self, field)):
                raise ValueError(f"{key}: needs {field}; name a `{field.rstrip('s')}` stage in {field}")
        return self

    def named(self) -> dict[str, str]:
        """The scores of columns that it names, by the key that does."""
        keys = {f"rules.{name}": name for name in self.rules} | {f"labels.{name}": name for name in self.labels}
        keys |= {"balance.by": self.balance.by} if self.balance else {}
        return {key: name for key, name in keys.items() if "." in name}

    def decisive(self, settings: dict[str, Any]) -> dict[str, Any]:
        """As before there were columns of scores, so that a view of then stays the view of its recipe."""
        later = (("missing", "keep"), ("by", rules.LABEL))

        def former(setting: Any) -> Any:
            return setting and {name: value for name, value in setting.items() if (name, value) not in later}

        bounds = {name: former(each) for name, each in settings["rules"].items()}
        return {"scores": {}, "embedding": None} | settings | {"rules": bounds, "balance": former(settings["balance"])}


def check(config: Config, inputs: Mapping[str, StageConfig]) -> None:
    """Refuse rules on scores that the recipe's `score` stage does not give. Raises ValueError."""
    known = rule_values.fields_of_stage(inputs["scores"]) if "scores" in inputs else None
    if known is not None or not config.scores:
        of_clusters = {f"{clusters.NAME}.{field.name}": field for field in clusters.FIELDS} if config.clusters else {}
        _check_names(config, (known or {}) | of_clusters)
    if config.semantic_duplicates and "clusters" in inputs:
        least = inputs["clusters"].similarity  # type: ignore[attr-defined]
        if config.semantic_duplicates.similarity < least:
            raise ValueError(
                f"semantic_duplicates.similarity: {config.semantic_duplicates.similarity:g} is less than the {least:g}"
                " from which on the clusters have pairs; lower `similarity` of their `cluster` stage"
            )


def _check_names(config: Config, fields: Mapping[str, ScoreField]) -> None:
    """Raise ValueError where a rule cannot be on these scores."""
    for name in config.rules:
        if "." in name:
            rules.refuse_unusable(f"rules.{name}", name, fields, "number")
    for name, rule in config.labels.items():
        if "." in name:
            rules.refuse_unusable(f"labels.{name}", name, fields, "label")
            rules.refuse_unknown_labels(f"labels.{name}", rule, fields[name])
    if config.balance and config.balance.by != rules.LABEL:
        rules.refuse_unusable("balance.by", config.balance.by, fields, "label")


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """Write the view beside the shards: DATASET/views/NAME.parquet.

    Raises:
        UserError: no clip is kept, no clip has a label to balance by, or a rule names a score that is not there.
        Failure: an index or a column is damaged, or lacks clips.
    """
    dataset = inputs["dataset"]

    # what the tests need of each clip
    bases = {split: compact.open_split(dataset, split)[0] for split in schema.SPLITS}
    columns, names = _columns(config, inputs, bases), sorted(set(config.named().values()))
    clips = _clips(bases)
    for name, prompt in config.prompts.items():
        likeness = described.likeness(dataset, inputs["text"], clips, prompt, f"prompts.{name}")
        clips = clips.append_column(name, pa.array(likeness, from_pandas=True))
    values = rule_values.values(bases, columns, names) if names else pa.table({})
    for name in names:
        clips = clips.append_column(name, values[name])
    if config.balance and clips[config.balance.by].null_count == len(clips):
        remedy = "give the manifest a `label` column or " if config.balance.by == rules.LABEL else ""
        raise UserError(f"balance: no clip has a {config.balance.by}; {remedy}leave `balance` out")
    if config.captions:
        clips = clips.append_column("captions", described.captions_of(dataset, inputs["captions"], clips))

    # the first test that a clip fails is its reason
    reasons, keep, order = np.full(len(clips), None, object), np.ones(len(clips), bool), _preference(clips)
    for test in (_rules, _labels, _captions, _exact, _near, _semantic, _balance):
        for reason, rows in test(config, inputs, clips, order[keep[order]]):
            reasons[rows[keep[rows]]] = reason
            keep[rows] = False
    dropped = Counter[str](reasons[~keep].tolist())
    if not keep.any():
        raise UserError(f"rules: none of {len(clips)} clips is kept ({dict(dropped)}); loosen the rules of this stage")

    # in the order of the shards, so that readers need not match rows by key
    uri = storage.join(dataset, "views", f"{output.rstrip('/').rsplit('/', 1)[-1]}.parquet")
    table = view.rows(clips["split"], clips["key"], reasons, _weights(config, clips, np.flatnonzero(keep)))
    for name in [*config.prompts, *names]:
        table = table.append_column(name, clips[name])
    view.write(uri, table.combine_chunks(), {split: base.digest for split, base in bases.items()}, columns)
    return {
        "uri": uri,
        "metrics": {"clips_kept": float(keep.sum()), "clips_dropped": float(dropped.total())} | _lost(config, inputs),
        "dropped_by_reason": dict(dropped),
    }


def _lost(config: Config, inputs: Mapping[str, str]) -> dict[str, float]:
    """Metrics of clusters that have not all pairs that the view asks for; said on stderr where there are some."""
    if not config.semantic_duplicates:
        return {}
    asked = config.semantic_duplicates.similarity
    floors = [least for least in clusters.read_clusters(inputs["clusters"]).capped.values() if least > asked]
    if not floors:
        return {}
    print(
        f"warning: {len(floors)} clusters had too many pairs: these are whole from a cosine of {max(floors):.4f} on, not from"
        f" {asked:g}, so that some semantic duplicates stay; give the `cluster` stage more clusters",
        file=sys.stderr,
    )
    return {"capped_clusters": float(len(floors)), "pairs_whole_from": max(floors)}


def _columns(config: Config, inputs: Mapping[str, str], bases: rule_values.Bases) -> dict[str, str]:
    """The columns of scores that decide the view, by the names of their scorers."""
    there: dict[str, Column] = {}
    if "scores" in inputs:
        there |= rule_values.opened_scores(bases, inputs["scores"])
    if "clusters" in inputs:
        if clusters.NAME in there:
            raise UserError(
                f"scores: a scorer is named {clusters.NAME}, as rules name the values of clusters; rename it"
            )
        there |= {clusters.NAME: from_plain(rule_values.opened_clusters(bases, inputs["clusters"]).column)}
    try:
        _check_names(config, rule_values.fields_of(there))
    except ValueError as e:
        raise UserError(str(e)) from e
    used = {name.partition(".")[0] for name in config.named().values()}
    used |= {clusters.NAME} if config.semantic_duplicates else set()
    return {name: there[name].column for name in sorted(used)}


def _clips(bases: rule_values.Bases) -> pa.Table:
    """All clips with their `split` and `row` in it, in the order of the splits and their shards."""
    tables = []
    for split, base in bases.items():
        clips = compact.rows_of(base).select(_NEEDED)
        clips = clips.append_column("row", pa.array(np.arange(len(clips))))
        tables.append(clips.append_column("split", pa.repeat(split, len(clips))))
    return pa.concat_tables(tables)


def _preference(clips: pa.Table) -> np.ndarray:
    """(N,) the numbers of all clips, in order of preference among clips that repeat each other."""
    order = pc.sort_indices(clips, [("split", "descending"), ("key", "ascending")])  # val first
    return np.asarray(order, np.int64)


def _rules(config: Config, inputs: Mapping[str, str], clips: pa.Table, rows: np.ndarray) -> Drops:
    yield from rules.out_of_bounds(clips, config.rules)


def _labels(config: Config, inputs: Mapping[str, str], clips: pa.Table, rows: np.ndarray) -> Drops:
    yield from rules.mislabelled(clips, config.labels)


def _captions(config: Config, inputs: Mapping[str, str], clips: pa.Table, rows: np.ndarray) -> Drops:
    if rules := config.caption_rules:
        captions = clips["captions"].take(rows).combine_chunks()
        if not rules.missing:
            yield "no caption", rows[np.asarray(captions.is_null())]
        wanted = (rules.min_words, rules.languages, rules.match, rules.avoid)
        for reason, which in described.broken(captions, *wanted):
            yield reason, rows[which]
        if rules.duplicates:
            yield "duplicate caption", rows[dedup.exact(described.sayings(captions))]


def _exact(config: Config, inputs: Mapping[str, str], clips: pa.Table, rows: np.ndarray) -> Drops:
    if config.exact_duplicates:
        yield "exact duplicate", rows[dedup.exact(clips["sha256"].take(rows))]


def _near(config: Config, inputs: Mapping[str, str], clips: pa.Table, rows: np.ndarray) -> Drops:
    if config.near_duplicates:
        hashes = clips["phash"].take(rows)
        hashed = rows[np.asarray(hashes.is_valid())]  # a clip without a hash is like no other
        yield "near duplicate", hashed[dedup.near(hashes.drop_null().to_numpy(), config.near_duplicates.radius)]


def _semantic(config: Config, inputs: Mapping[str, str], clips: pa.Table, rows: np.ndarray) -> Drops:
    if settings := config.semantic_duplicates:
        record = clusters.read_clusters(inputs["clusters"])
        pairs = clusters.pair_tables(record, settings.similarity)
        numbers = clusters.numbers(record, clips["split"].take(rows), clips["row"].take(rows).to_numpy())
        yield "semantic duplicate", rows[dedup.semantic(pairs, numbers, settings.similarity)]


def _balance(config: Config, inputs: Mapping[str, str], clips: pa.Table, rows: np.ndarray) -> Drops:
    if config.balance and config.balance.most:
        most = config.balance.most
        for label, members in _classes(config.balance, clips, rows):
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
        classes = list(_classes(config.balance, clips, rows))
        total = sum(len(members) for _, members in classes)
        for _, members in classes:
            weights[members] = total / len(classes) / len(members)
    return weights


def _classes(balance: Balance, clips: pa.Table, rows: np.ndarray) -> Iterator[tuple[str | None, np.ndarray]]:
    """Each label among the training clips of these rows, None included, with the rows that have it."""
    train = rows[np.asarray(pc.equal(clips["split"], "train").take(rows))]
    labels = clips[balance.by].take(train).combine_chunks().dictionary_encode(null_encoding="encode")
    codes = labels.indices.to_numpy()
    members = np.split(train[np.argsort(codes, kind="stable")], np.cumsum(np.bincount(codes))[:-1])
    yield from zip(labels.dictionary.to_pylist(), members, strict=False)
