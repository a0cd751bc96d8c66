"""Where the encoder of pictures is that a model has learned from, as its config.json names it.

A model's folder does not have the weights of its encoder. It names them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

OWN = "own"  # the name of the project's own features, which need no file
VARIABLE = "LONGTAKE_IMAGE_ENCODER"  # where a served model's encoder is, if not where it was
REMEDY = f"say where it is with --image-encoder PATH or models:/NAME@ALIAS, or in {VARIABLE} for a served model"


def with_image_encoder(facts: Mapping[str, Any], encoder: str | None) -> Mapping[str, Any]:
    """A config.json whose image encoder is at this path, or registered so; unchanged for None, or for a model that sees no pictures."""
    image = facts.get("image")
    return {**facts, "image": image | {"encoder": encoder}} if encoder and image else facts


def with_served_image_encoder(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config.json whose image encoder is where `VARIABLE` says; the project's own is where the model is served."""
    own = (facts.get("image") or {}).get("encoder") == OWN
    return facts if own else with_image_encoder(facts, os.environ.get(VARIABLE))
