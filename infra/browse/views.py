"""Views made on the page: its rules as the config of a `curate` stage, which makes the view, and as lines of a recipe."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationError

from longtake.datasets import clusters, compact, index, schema, scores, storage
from longtake.datasets.errors import Failure, UserError, near
from longtake.datasets.stage import StageConfig, Utf8
from longtake.infra import yaml_text
from longtake.infra.browse.columns import Shown
from longtake.infra.browse.library import Library, Number, View, view_of
from longtake.pipeline.rules import Bounds, Missing

Score = Annotated[Utf8, Field(max_length=200)]


class LabelRule(StageConfig):
    """Which labels clips may have (see `rules.Labels`); without `missing` clips without a label are out where `only` is said."""

    only: Annotated[tuple[Utf8, ...], Field(max_length=1000)] | None = None
    never: Annotated[tuple[Utf8, ...], Field(max_length=1000)] | None = None
    missing: Missing | None = None


class Wanted(StageConfig):
    """A view that is asked for.

    name              of the view, and of its stage in the recipe
    rules             bounds of scores
    labels            which labels clips may have
    exact_duplicates  drop clips whose pixels are equal
    """

    name: str = Field(pattern="^[a-z][a-z0-9_-]{0,63}$")
    rules: Annotated[dict[Score, Bounds], Field(max_length=64)] = Field({})
    labels: Annotated[dict[Score, LabelRule], Field(max_length=64)] = Field({})
    exact_duplicates: bool = True


_lock = Lock()  # of two requests that save under one name the second finds the view


def recipe(library: Library, shown: Shown, wanted: Wanted) -> str:
    """The lines of a recipe that make the view. Raises UserError: a rule that `curate` does not have."""
    settings = _settings(library, wanted)
    _config(library, settings)
    inputs, remarks = {"kind": "curate", "dataset": library.dataset}, []
    if columns := _columns(settings):
        record = shown.record_of(columns)
        inputs["scores"] = record or "scores"
        if record is None:
            remarks = ["# scores: name the `score` stage that makes these columns"]
            remarks += [f"#   {name}: {shown.columns[name].column}" for name in columns]
    if _of_clusters(settings):
        inputs["clusters"] = shown.clusters or "clusters"
    return "\n".join([*remarks, yaml_text.dump({wanted.name: inputs | settings})])


def save(library: Library, shown: Shown, wanted: Wanted) -> dict[str, Any]:
    """Make the view as its stage would, and show it from now on. Raises UserError, Failure: as the stage, or the name is taken."""
    from longtake.pipeline.stages import curate

    settings = _settings(library, wanted)
    config = _config(library, settings)
    uri = storage.join(library.dataset, "views", f"{wanted.name}.parquet")
    with _lock, TemporaryDirectory(prefix="longtake-") as spool:
        if storage.exists(uri):
            raise UserError(f"name: there is a view {wanted.name} already; choose another name")
        inputs = {"dataset": library.dataset}
        if columns := _columns(settings):
            # of the columns of several stages, or of none that is here, a record in a workspace that is ours alone
            record = shown.record_of(columns)
            inputs["scores"] = record or str(Path(spool) / "scores" / "record")
            if record is None:
                _write_record(inputs["scores"], library.dataset, shown, columns)
        if _of_clusters(settings):
            if shown.clusters is None:
                raise UserError("rules.cluster.distance: needs the record of its `cluster` stage; name it by --scores")
            inputs["clusters"] = shown.clusters
        made = curate.run(config, inputs, wanted.name)
        view = view_of(made["uri"], wanted.name, library.places["key"])
        library.views = {**library.views, wanted.name: view}
    return {
        "uri": view.uri,
        "kept": int(view.keep.sum()),
        "dropped": _dropped(view),
        "recipe": recipe(library, shown, wanted),
    }


def _dropped(view: View) -> list[dict[str, Any]]:
    counts = np.bincount(view.codes[~view.keep], minlength=len(view.reasons)).tolist()
    return [{"value": reason, "count": count} for reason, count in zip(view.reasons, counts, strict=True) if count]


def _settings(library: Library, wanted: Wanted) -> dict[str, Any]:
    """What the stage is told, but for its inputs."""
    rules = {name: bounds.model_dump(exclude_none=True, exclude_defaults=True) for name, bounds in wanted.rules.items()}
    if (seconds := rules.pop("seconds", None)) is not None:
        rules["frame_count"] = _both(_frames(library, seconds), rules.get("frame_count", {}))
    labels = {}
    for name, rule in wanted.labels.items():
        known = {key: list(value) for key in ("only", "never") if (value := getattr(rule, key))}
        missing = rule.missing or ("drop" if rule.only else "keep")
        labels[name] = known | ({"missing": missing} if missing == "drop" else {})
    settings: dict[str, Any] = {"rules": rules}
    settings |= {"labels": labels} if labels else {}
    return settings | ({} if wanted.exact_duplicates else {"exact_duplicates": False})


def _frames(library: Library, seconds: dict[str, Any]) -> dict[str, Any]:
    """Bounds of seconds as those of frames."""
    rates = np.unique(np.asarray(library.places["fps"]))
    if len(rates) > 1:
        raise UserError("seconds: clips of several frame rates; give bounds of frame_count")
    rate, slack = float(rates[0]), 1e-6
    if unknown := seconds.keys() - {"min", "max", "missing"}:
        raise UserError(f"seconds: {min(unknown)} is of frame_count alone")
    frames = dict(seconds)
    if "min" in seconds:
        frames["min"] = math.ceil(seconds["min"] * rate - slack)
    if "max" in seconds:
        frames["max"] = math.floor(seconds["max"] * rate + slack)
    return frames


def _both(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The bounds that hold where two do. Raises UserError where none can."""
    both = one | other
    both |= {key: of(one[key], other[key]) for key, of in (("min", max), ("max", min)) if key in one and key in other}
    if both.get("min", -math.inf) > both.get("max", math.inf):
        raise UserError("rules.seconds, rules.frame_count: no clip is of such a length; loosen one of them")
    return both


def _config(library: Library, settings: dict[str, Any]) -> Any:
    """The stage's config. Raises UserError naming the rule that it does not have."""
    from longtake.pipeline.stages import curate

    for key, kind in (("rules", "number"), ("labels", "label")):
        for name in settings.get(key, {}):
            subject = library.fields.get(name)
            if subject is None:
                raise UserError(f"{key}.{name}: no such field; {near(name, library.fields)}")
            if isinstance(subject, Number) != (kind == "number"):
                raise UserError(f"{key}.{name}: is no {kind}")
    inputs = {"dataset": library.dataset}
    inputs |= {"scores": "scores"} if _columns(settings) else {}
    inputs |= {"clusters": "clusters"} if _of_clusters(settings) else {}
    try:
        return curate.Config.model_validate({"kind": "curate", **inputs, **settings})
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{key or 'view'}: {first['msg'].removeprefix('Value error, ')}") from e


def _columns(settings: dict[str, Any]) -> list[str]:
    """The names of the scorers whose columns the rules need."""
    names = {name.partition(".")[0] for key in ("rules", "labels") for name in settings.get(key, {}) if "." in name}
    return sorted(names - {clusters.NAME})


def _of_clusters(settings: dict[str, Any]) -> bool:
    return any(name.startswith(f"{clusters.NAME}.") for key in ("rules", "labels") for name in settings.get(key, {}))


def _write_record(uri: str, dataset: str, shown: Shown, names: list[str]) -> None:
    """Record columns as one stage that has just made them would. Raises Failure where one lacks a shard."""
    bases = {split: compact.open_split(dataset, split)[0] for split in schema.SPLITS}
    columns = {name: shown.columns[name] for name in names}
    for column in columns.values():
        for split, base in bases.items():
            scored = {name.partition(".")[0] for name in index.shard_names(dataset, split, column.column)}
            if lacks := set(base.shards["name"].to_pylist()) - scored:
                raise Failure(f"{dataset} ({split}): {column.column} lacks {min(lacks)}; run its `score` stage again")
    scores.write_scores(uri, scores.Scores(dataset, columns, None, {s: base.digest for s, base in bases.items()}))
