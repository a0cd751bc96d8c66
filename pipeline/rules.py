"""Rules of a view: bounds of scores, labels that are wanted, words of captions; and the names that rules may use."""

from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, FiniteFloat, field_validator, model_validator

from longtake.datasets import schema, view
from longtake.datasets.errors import near
from longtake.datasets.scores import Field as ScoreField
from longtake.datasets.stage import StageConfig, Utf8

NUMBERS = (*schema.SCORES, "frame_count", "width", "height")  # that every clip has
LABEL = "label"  # of the index
_REMEDIES = {
    "number": "write its bounds in rules",
    "label": "write `only` or `never` in labels",
    "vector": "name it in a `cluster` stage",
}

Percentile = Annotated[float, Field(ge=0, le=100)]
Missing = Literal["keep", "drop"]
Drops = Iterator[tuple[str, np.ndarray]]  # (reason, row numbers)


class Bounds(StageConfig):
    """Inclusive bounds of a score; null is no bound.

    min, max                         of the score
    min_percentile, max_percentile   of the scores of all clips of the dataset
    missing                          keep or drop clips without the score
    """

    min: FiniteFloat | None = None
    max: FiniteFloat | None = None
    min_percentile: Percentile | None = None
    max_percentile: Percentile | None = None
    missing: Missing = "keep"

    @model_validator(mode="after")
    def _ordered(self) -> "Bounds":
        for unit in ("", "_percentile"):
            low, high = getattr(self, f"min{unit}"), getattr(self, f"max{unit}")
            if low is not None and high is not None and low > high:
                raise ValueError(f"min{unit} {low:g} is above max{unit} {high:g}, which keeps nothing; swap them")
        return self


class Labels(StageConfig):
    """Which labels of a score a clip may have.

    only      these and no others; none: all but those of `never`
    never     not these
    missing   keep or drop clips without a label
    """

    only: tuple[Utf8, ...] = ()
    never: tuple[Utf8, ...] = ()
    missing: Missing = "keep"

    @model_validator(mode="after")
    def _does_something(self) -> "Labels":
        if not self.only and not self.never and self.missing == "keep":
            raise ValueError("asks for nothing; give `only: [LABEL]`, `never: [LABEL]` or `missing: drop`")
        if both := set(self.only) & set(self.never):
            raise ValueError(f"{min(both)} is in only and in never; take it out of one")
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


class Balance(StageConfig):
    """Even out the classes of the training clips.

    by        what the classes are: label, that of the manifest, or a score that is a label, such as motion.move
    most      most clips of a class
    weights   weigh clips against the counts of their classes
    """

    by: Utf8 = LABEL
    most: int | None = Field(None, ge=1)
    weights: bool = False

    @model_validator(mode="after")
    def _does_something(self) -> "Balance":
        if self.most is None and not self.weights:
            raise ValueError("asks for nothing; give `most: N`, `weights: true` or both")
        return self


# Names.


def refuse_unknown(name: str, there: Collection[str]) -> None:
    """Raise ValueError where there is no score of a name."""
    if name not in there:
        raise ValueError(f"unknown score {name}; {near(name, there)}")


def refuse_unusable(key: str, name: str, fields: Mapping[str, ScoreField], kind: Literal["number", "label"]) -> None:
    """Raise ValueError where there is no score of a name, or it is not of the kind that the key takes."""
    if name not in fields:
        raise ValueError(f"{key}: unknown score {name}; {near(name, fields)}")
    if (field := fields[name]).kind != kind:
        raise ValueError(f"{key}: takes a {kind}, and {name} is a {field.kind}; {_REMEDIES[field.kind]}")


def refuse_unknown_labels(key: str, rule: Labels, field: ScoreField) -> None:
    """Raise ValueError where a rule names a label that the score never gives."""
    for label in (*rule.only, *rule.never):
        if field.labels and label not in field.labels:
            raise ValueError(f"{key}: no label {label}; {near(label, field.labels)}")


# What breaks them.


def out_of_bounds(clips: pa.Table, rules: Mapping[str, Bounds]) -> Drops:
    """For each bound its reason and the rows that break it."""
    for name, bounds in rules.items():
        limits = bounds.model_dump(exclude_none=True, exclude={"missing"})
        for reason, broken in view.broken(clips, {name: limits}):
            yield reason, np.flatnonzero(broken)
        if bounds.missing == "drop":
            yield f"no {name}", np.flatnonzero(np.asarray(clips[name].is_null()))


def mislabelled(clips: pa.Table, rules: Mapping[str, Labels]) -> Drops:
    """For each rule on labels its reason and the rows that break it."""
    for name, rule in rules.items():
        labels = clips[name]
        if rule.only:
            others = pc.and_(labels.is_valid(), pc.invert(pc.is_in(labels, pa.array(rule.only))))
            yield f"{name}: not {' or '.join(rule.only)}", np.flatnonzero(np.asarray(others))
        for label in rule.never:
            same = pc.fill_null(pc.equal(labels, label), False)
            yield f"{name}: {label}", np.flatnonzero(np.asarray(same))
        if rule.missing == "drop":
            yield f"no {name}", np.flatnonzero(np.asarray(labels.is_null()))
