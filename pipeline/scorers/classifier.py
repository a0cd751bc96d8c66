"""The scorer `classifier`: shares of labels, or what a regression gives, from a model of pictures of `transformers`."""

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field as Setting

from longtake.datasets import storage
from longtake.datasets.pictures import Folder, Located, loaded, opened, shown, sketched
from longtake.datasets.scores import Field
from longtake.datasets.stage import StageConfig
from longtake.pipeline.exact import be_exact
from longtake.pipeline.scorers.one_by_one import OneByOne, Pool, numbers, pooled
from longtake.pipeline.scorers.scorer import Scorer, Values

_FEW = 32  # labels that all get a number unless some are named

Kind = Literal["shares", "chances", "regression"]


class Config(StageConfig):
    """A model of `transformers` that classifies pictures, such as one for NSFW, or gives them a number.

    Each label has a field, named as it is in lower case with _ for what is no letter or digit: its share (all add up to 1),
    its chance (where labels do not exclude each other), or the number of a regression; that of a single output is `value`.
    Where labels exclude each other, `label` is the most likely one.

    model    its folder, with its preprocessor config and safetensors
    frames   of a clip, spread evenly
    pool     how the values of a clip's frames become the clip's: mean, max or min
    labels   which get a number, by their names of fields; null: all where there are at most 32, else none
    """

    model: Located
    frames: int = Setting(4, ge=1, le=64)
    pool: Pool = "mean"
    labels: tuple[str, ...] | None = None

    def decisive(self, settings: dict[str, Any]) -> dict[str, Any]:
        # its digest decides, wherever it is
        return {name: value for name, value in settings.items() if name != "model"}


def _labels(folder: Folder, described: Any) -> tuple[list[str], list[str]]:
    """The labels of a model's outputs, and their names as fields. Raises UserError where two have one name."""
    labels = [storage.printable(str(described.id2label[n]))[:100] for n in range(described.num_labels)]
    if len(labels) == 1:
        return labels, ["value"]
    names = [_name(label) for label in labels]
    if len(set(names)) < len(names) or len(set(labels)) < len(labels):
        twice = next(label for n, label in enumerate(labels) if names[n] in names[:n] or label in labels[:n])
        raise folder.refusal(f"two labels are {twice!r}; rename them in id2label of config.json")
    return labels, names


def _name(label: str) -> str:
    name = re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")
    return name if name[:1].isalpha() and name not in ("label", "reason", "key") else f"label_{name}".rstrip("_")


def _kind(described: Any) -> Kind:
    if described.problem_type == "regression":
        return "regression"
    single = described.problem_type != "multi_label_classification" and described.num_labels > 1
    return "shares" if single else "chances"


def _chosen(config: Config, folder: Folder, names: Sequence[str]) -> list[str]:
    """The names of fields that get a number. Raises UserError where one is none of them."""
    if config.labels is None:
        return list(names) if len(names) <= _FEW else []
    if unknown := next((name for name in config.labels if name not in names), None):
        known = ", ".join(names[:_FEW]) + (", …" if len(names) > _FEW else "")
        raise folder.refusal(f"has no label {unknown!r}; its labels are {known}")
    return [name for name in names if name in config.labels]


def _fields(config: Config) -> tuple[Field, ...]:
    folder = opened(config.model)
    described = sketched(folder, "labels").model.config
    labels, names = _labels(folder, described)
    kind = _kind(described)
    meaning = {
        "shares": "share of the label {!r}, 0 to 1, {} over frames",
        "chances": "chance of the label {!r}, 0 to 1, {} over frames",
        "regression": "number of {!r}, {} over frames",
    }[kind]
    chosen = _chosen(config, folder, names)
    fields = [
        Field(name, "number", meaning.format(label, config.pool))
        for label, name in zip(labels, names, strict=True)
        if name in chosen
    ]
    if kind == "shares":
        fields.append(Field("label", "label", "the most likely label", labels=tuple(labels)))
    return tuple(fields)


def _load(config: Config, device: str) -> OneByOne:
    be_exact()
    folder = opened(config.model)
    network = loaded(folder, "labels", device)
    labels, names = _labels(folder, network.model.config)
    kind = _kind(network.model.config)
    chosen = _chosen(config, folder, names)
    places = [names.index(name) for name in chosen]

    def values(frames: np.ndarray) -> Values:
        logits = shown(folder, lambda: network.logits(frames).cpu().numpy()).astype(np.float64)
        clip = pooled(_of_logits(logits, kind), config.pool)
        label: Values = {}
        if kind == "shares":
            label = {"label": labels[int(clip.argmax())] if np.isfinite(clip).all() else None}
        return numbers(chosen, clip[places]) | label

    return OneByOne(config.frames, None, values)


def _of_logits(logits: np.ndarray, kind: Kind) -> np.ndarray:
    """(N, labels) numbers of a model's outputs."""
    if kind == "regression":
        return logits
    if kind == "chances":
        return np.asarray(1 / (1 + np.exp(-np.clip(logits, -500, 500))))
    return shares(logits)


def shares(logits: np.ndarray) -> np.ndarray:
    """(N, labels) shares that add up to 1."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


SCORER = Scorer(Config, 1, _fields, _load, lambda config: opened(config.model).digest(), gpu=True)
