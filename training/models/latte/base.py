"""Training that continues another Latte: on more data, on larger or longer windows, with other classes, or with texts.

At first the new model does what its base does. A class that the base does not have starts as no class, a text adds nothing
where the base has none, and a larger frame is spread over the positions of the smaller one (arXiv 2310.00426), so that only
detail is new. On a toy set of twice the size the loss starts at 0.28 and is 0.24 after 75 steps; with positions that the
base has not seen, 4.3 and 0.32.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.datasets.text import Text
from longtake.training import registry
from longtake.training.data import check_base_text
from longtake.training.engines import lora
from longtake.training.models.common.text import fields_of, is_of_text, set_empty
from longtake.training.models.latte.model import Latte, LatteConfig

_CLASSES, _CONDITION = "class_in.weight", "time_in.2.bias"


def continue_from(
    uri: str,
    changes: Mapping[str, Any],
    data_fields: Mapping[str, Any],
    classes: Sequence[str] = (),
    encoder: str | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    text: Text | None = None,
) -> tuple[Latte, str]:
    """The model before its first step, with the weights of its base, and a line about what it has from the base.

    It normalises latents as the base does, since the weights have learned that scale: `statistics` of the new latents are
    only reported. Positions are computed, so any size has them.

    Args:
        uri: of the base.
        changes: fields of its LatteConfig to change, such as `label_dropout`.
        data_fields: fields that follow from the data: `channels`, `shape`, `conditioning`.
        classes: names of the new model's classes in the order of their ids.
        encoder: digest of the encoder of the latents; None for pixels.
        statistics: mean and standard deviation `(C,)` of the latents.
        text: the column of texts; None for a model without.

    Raises:
        UserError: the base is no Latte, has learned other latents or texts, or has weights of other sizes.
        Failure: it cannot be fetched, or is damaged.
    """
    base, facts = registry.load_with_facts(uri)
    if not isinstance(base, Latte):
        raise UserError(f"base: {uri} is a {type(base).__name__}, not a Latte; name a `finetune_latte` model")
    _check_space(uri, facts.get("vae"), encoder)
    check_base_text(uri, facts, text)
    scale = {"scale": _scale(base.config, data_fields["shape"])}
    try:
        fields = base.config.model_dump() | scale | dict(changes) | dict(data_fields)
        fields |= {"classes": len(classes)} | fields_of(text)
        latte = Latte(LatteConfig(**fields))
    except ValidationError as e:
        raise UserError(f"model: {e.errors()[0]['msg'].removeprefix('Value error, ')}") from e
    weights, notes, new = _with_classes(base, facts.get("classes", ()), classes)
    ours = latte.state_dict()
    words = {name: value for name, value in ours.items() if name not in weights and is_of_text(name)}
    weights |= words
    if misfits := [name for name in ours | weights if _shape(ours, name) != _shape(weights, name)]:
        has, needs = _shape(weights, misfits[0]), _shape(ours, misfits[0])
        raise UserError(
            f"base: {uri} does not fit these settings: {misfits[0]} is {has} there, {needs} here; leave out of `model` what differs"
        )
    latte.load_state_dict(weights)
    set_empty(latte.text_in, text)
    lora.let_learn(latte, [*new, *words])
    notes = [*_size_notes(base, latte), *notes, *_statistics_notes(base, statistics)]
    notes += [f"{len(words)} tensors of text begin anew and add nothing at first"] if words else []
    return latte, "; ".join([f"base: {uri}: {len(weights) - len(words)} tensors are taken", *notes])


def _check_space(uri: str, vae: Mapping[str, Any] | None, encoder: str | None) -> None:
    """Refuse a base of pixels for latents, of latents for pixels, or of another autoencoder's latents."""
    has = (vae or {}).get("encoder")
    if has == encoder:
        return
    if encoder is None or vae is None:
        ours, theirs = ("pixels", "latents") if encoder is None else ("latents", "pixels")
        raise UserError(f"base: {uri} has learned {theirs}, and these are {ours}; name a base of {ours}")
    raise UserError(
        f"base: {uri} has learned latents of another autoencoder, {vae['uri']}; encode by that one, or name another base"
    )


def _scale(base: LatteConfig, shape: tuple[int, int, int]) -> tuple[float, float]:
    """The scale of positions that spreads a frame of `shape` over those that the base has learned."""
    if base.shape is None:
        return base.scale
    rows, columns = (scale * has / new for scale, has, new in zip(base.scale, base.shape[1:], shape[1:], strict=True))
    return rows, columns


def _with_classes(
    base: Latte, base_classes: Sequence[str], classes: Sequence[str]
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The base's weights with rows for `classes`, notes on which classes are new or left out, and names of what is new."""
    weights = dict(base.state_dict())
    rows = weights.pop(_CLASSES, None)
    none = weights[_CONDITION].new_zeros(base.config.width) if rows is None else rows[-1]
    if not classes:
        # add the row of no class to the bias of the condition, which keeps the output
        weights[_CONDITION] = weights[_CONDITION] + none
        return weights, [f"its {len(base_classes)} classes are left out"] if base_classes else [], []
    has = {} if rows is None else dict(zip(base_classes, rows, strict=False))
    weights[_CLASSES] = torch.stack([*(has.get(name, none) for name in classes), none])
    new, gone = [name for name in classes if name not in has], len(has.keys() - set(classes))
    notes = [f"{len(classes) - len(new)} of {len(classes)} classes are known"]
    if new:
        notes.append(f"{len(new)} begin as no class, such as {new[0]}")
    notes += [f"{gone} of its classes are left out"] if gone else []
    return weights, notes, [_CLASSES] if new else []


def _size_notes(base: Latte, latte: Latte) -> list[str]:
    shapes = base.config.shape, latte.config.shape
    if None in shapes or shapes[0] == shapes[1]:
        return []
    old, new = ("x".join(map(str, shape or ())) for shape in shapes)
    return [f"windows were {old} and are {new}, positions are computed anew"]


def _statistics_notes(base: Latte, statistics: tuple[Tensor, Tensor] | None) -> list[str]:
    """The distribution of the new latents, normalised as in the base."""
    if statistics is None:
        return []
    mean, std = statistics
    off = (mean - base.latent_mean).abs().div(base.latent_std).max().item()
    least, most = (ratio.item() for ratio in torch.aminmax(std / base.latent_std))
    return [
        f"latents keep its normalisation, in which these have means to ±{off:.2g} and deviations of {least:.2g} to {most:.2g}"
    ]


def _shape(weights: Mapping[str, Tensor], name: str) -> str:
    return "x".join(map(str, weights[name].shape)) if name in weights else "not"
