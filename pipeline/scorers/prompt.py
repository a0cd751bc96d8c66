"""The scorer `prompt`: how well texts fit a clip, by a dual encoder such as CLIP or SigLIP."""

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field as Setting
from pydantic import field_validator

from longtake.datasets import dual, schema
from longtake.datasets.pictures import Located, opened, shown, units
from longtake.datasets.scores import Field
from longtake.datasets.stage import StageConfig, Utf8
from longtake.pipeline.exact import be_exact
from longtake.pipeline.scorers.classifier import shares
from longtake.pipeline.scorers.one_by_one import OneByOne, numbers
from longtake.pipeline.scorers.scorer import Scorer, Values

Name = Annotated[str, Setting(pattern="^[a-z][a-z0-9_]*$")]
Text = Annotated[Utf8, Setting(min_length=1, max_length=2000)]


class Config(StageConfig):
    """How well texts fit a clip, by a folder of a dual encoder: `{dogs: "a photo of a dog", cats: "a photo of a cat"}`.

    Each prompt has a field of its name. With two or more, the field `label` has the name of the one that fits best.

    model    folder of a dual encoder (CLIP, SigLIP) of `transformers`, with its preprocessor config, its tokenizer and
             safetensors
    prompts  texts by the names of their fields; of several texts of one name the mean of their vectors is taken
    gives    cosine: of a frame's vector to the text's; share: as the model was trained, of CLIP the share of the prompt among
             all of them, of SigLIP the chance that it fits
    frames   of a clip, spread evenly; its numbers are the means over them
    """

    model: Located
    prompts: dict[Name, Text | Annotated[tuple[Text, ...], Setting(min_length=1, max_length=200)]] = Setting(
        min_length=1, max_length=1000
    )
    gives: Literal["cosine", "share"] = "cosine"
    frames: int = Setting(4, ge=1, le=64)

    @field_validator("prompts")
    @classmethod
    def _named_apart(cls, prompts: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted({"label", *schema.SCORE_INDEX.names} & set(prompts)):
            raise ValueError(f"{taken[0]} is the name of another field; choose another")
        return prompts

    def decisive(self, settings: dict[str, Any]) -> dict[str, Any]:
        # its digest decides, wherever it is
        return {name: value for name, value in settings.items() if name != "model"}


def _fields(config: Config) -> tuple[Field, ...]:
    what = "cosine of its vector to a frame's, -1 to 1" if config.gives == "cosine" else "share or chance of it, 0 to 1"
    names = tuple(config.prompts)
    fields = [Field(name, "number", f"{what}, mean over frames") for name in names]
    return (*fields, *([Field("label", "label", "the prompt that fits best", labels=names)] if len(names) > 1 else []))


def _load(config: Config, device: str) -> OneByOne:
    be_exact()
    folder = opened(config.model)
    model = dual.load(folder, device)
    texts = np.stack([_text(model, each) for each in config.prompts.values()])
    names = list(config.prompts)
    if config.gives == "share":
        model.logits(np.zeros((1, len(names))))  # refuses a model without a scale at once

    def values(frames: np.ndarray) -> Values:
        vectors = units(shown(folder, lambda: model.network.vectors(frames).cpu().numpy()))
        fits = vectors.astype(np.float64) @ texts.T
        if config.gives == "share":
            logits = model.logits(fits)
            fits = 1 / (1 + np.exp(-logits)) if model.is_sigmoid else shares(logits)
        clip = fits.mean(0)
        best = names[int(clip.argmax())] if np.isfinite(clip).all() else None
        return numbers(names, clip) | ({"label": best} if len(names) > 1 else {})

    return OneByOne(config.frames, None, values)


def _text(model: dual.Dual, text: str | tuple[str, ...]) -> np.ndarray:
    """(D,) float64 of length 1 of a prompt."""
    vectors = model.texts([text] if isinstance(text, str) else list(text))
    return units(vectors.mean(0, dtype=np.float64)).astype(np.float64)


SCORER = Scorer(Config, 1, _fields, _load, lambda config: dual.check(opened(config.model)).digest(), gpu=True)
