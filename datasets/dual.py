"""Dual encoders such as CLIP and SigLIP: pictures and texts as vectors of one space, and the texts of a search."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from longtake.datasets.errors import UserError
from longtake.datasets.pictures import (
    Folder,
    Network,
    features_of,
    guarded,
    loaded,
    opened,
    shown,
    sketched,
    transformers_of,
    units,
)

_SIGLIP = "siglip"  # is trained with texts padded to their limit, and a chance for each pair by itself


class Dual(NamedTuple):
    """A model that `check` has let pass, with its tokenizer."""

    network: Network
    tokenizer: Any

    @property
    def is_sigmoid(self) -> bool:
        """Whether it was trained to say of each text by itself how likely it fits."""
        return _SIGLIP in self.network.model.config.model_type

    def pictures(self, frames: np.ndarray) -> np.ndarray:
        """(N, D) float32 of length 1 of frames (N, H, W, 3) uint8. Raises Failure: it does not take them."""
        return units(shown(self.network.folder, lambda: self.network.vectors(frames).cpu().numpy()))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D) float32 of length 1. Raises UserError: a text has more tokens than the model takes."""
        import torch

        folder, limit = self.network.folder, self._limit()
        counts = [len(ids) for ids in self.tokenizer(list(texts))["input_ids"]]
        if longest := max((n for n in counts if n > limit), default=0):
            raise UserError(
                f"text: {texts[counts.index(longest)][:40]!r}… has {longest} tokens, {folder.path} takes {limit}"
            )
        padding = {"padding": "max_length", "max_length": limit} if self.is_sigmoid else {"padding": True}
        tokens = self.tokenizer(list(texts), return_tensors="pt", **padding)
        inputs = {name: values.to(self.network.device) for name, values in tokens.items()}
        with torch.inference_mode():
            out = guarded(folder, lambda: self.network.model.get_text_features(**inputs))
        return units(features_of(out).float().cpu().numpy())

    def logits(self, cosines: np.ndarray) -> np.ndarray:
        """Cosines as the model was trained to compare them, float64. Raises UserError where it has no scale."""
        model = self.network.model
        if not hasattr(model, "logit_scale"):
            raise self.network.folder.refusal("has no scale for shares; set gives: cosine")
        bias = float(model.logit_bias) if hasattr(model, "logit_bias") else 0.0
        return np.asarray(cosines.astype(np.float64) * float(model.logit_scale.exp()) + bias)

    def _limit(self) -> int:
        text = self.network.model.config.get_text_config()
        limits = (getattr(text, "max_position_embeddings", None), self.tokenizer.model_max_length)
        return min(limit for limit in limits if limit)


def check(folder: Folder) -> Folder:
    """The folder, of a dual encoder with a tokenizer. Raises UserError where it is of another model."""
    if not hasattr(sketched(folder, "vectors").model, "get_text_features"):
        raise folder.refusal("encodes no texts; name a dual encoder, such as CLIP or SigLIP")
    if not (folder.path / "tokenizer.json").is_file():
        raise folder.refusal(
            "has no tokenizer.json; save its fast tokenizer there (`tokenizer.save_pretrained(folder)`)"
        )
    return folder


def load(folder: Folder, device: str) -> Dual:
    """The dual encoder in a folder. Raises UserError as `check` and `pictures.loaded`."""
    auto = transformers_of(folder.key).AutoTokenizer
    network = loaded(check(folder), "vectors", device)
    tokenizer = guarded(
        folder, lambda: auto.from_pretrained(folder.path, local_files_only=True, trust_remote_code=False)
    )
    return Dual(network, tokenizer)


def encode_text(folder: str, text: str) -> np.ndarray:
    """The vector (D,) float32 of length 1 of a text, to compare with those of pictures by the same folder.

    Raises:
        UserError: no dual encoder is in the folder (see `pictures.opened`), or the text is longer than it takes.
    """
    there = opened(folder)
    return np.asarray(_reader(folder, there.digest()).texts([text])[0])


@lru_cache(maxsize=1)
def _reader(folder: str, digest: str) -> Dual:
    return load(opened(folder), "cpu")
