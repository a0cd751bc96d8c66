"""`curate`: which clips of a dataset to use, as a view. Shards stay as they are; nothing is decoded."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, field_validator

from longtake.datasets import index, schema, storage, view
from longtake.datasets.errors import UserError
from longtake.datasets.stage import DatasetInput, StageConfig

VERSION = 1
PRODUCES = "view"

_COLUMNS = (*schema.SCORES, "frame_count", "width", "height")


class Bounds(StageConfig):
    """Keep clips whose score lies between these, bounds included."""

    min: float | None = None
    max: float | None = None


class Config(StageConfig):
    """Thresholds on scores to a view that says for each clip whether it is used and why not.

    `rules` maps a score to its bounds, such as `{motion: {min: 0.004}, brightness: {min: 0.05, max: 0.98}}`.
    """

    kind: Literal["curate"]
    dataset: DatasetInput
    rules: dict[str, Bounds] = Field(default_factory=lambda: {"motion": Bounds(min=0.002), "still": Bounds(max=0.9)})

    @field_validator("rules")
    @classmethod
    def _known(cls, rules: dict[str, Bounds]) -> dict[str, Bounds]:
        if unknown := set(rules) - set(_COLUMNS):
            raise ValueError(f"unknown score {', '.join(sorted(unknown))}; there are {', '.join(_COLUMNS)}")
        return rules


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """Write the view beside the shards: DATASET/views/NAME.parquet.

    Raises:
        UserError: the rules keep no clip at all.
    """
    dataset = inputs["dataset"]
    rules = {name: bounds.model_dump(exclude_none=True) for name, bounds in config.rules.items()}
    tables, reasons = [], Counter[str]()
    for split in schema.SPLITS:
        clips = index.read_all(dataset, split)
        dropped = view.threshold(clips, rules)
        reasons.update(reason for reason in dropped if reason)
        tables.append(view.rows(split, clips["key"].to_pylist(), dropped))
    table = pa.concat_tables(tables)
    kept = len(table) - reasons.total()
    if not kept:
        raise UserError(f"rules: none of {len(table)} clips is kept ({dict(reasons)}); loosen the rules of this stage")
    uri = storage.join(dataset, "views", f"{output.rstrip('/').rsplit('/', 1)[-1]}.parquet")
    storage.write(uri, index.to_parquet(table))
    return {
        "uri": uri,
        "metrics": {"clips_kept": float(kept), "clips_dropped": float(reasons.total())},
        "dropped_by_reason": dict(reasons),
    }
