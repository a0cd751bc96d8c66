"""Suites: which clips, videos and measures an evaluation has. Data, in YAML; light to import."""

from importlib import resources
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, model_validator

from longtake.datasets.errors import UserError
from longtake.datasets.stage import StageConfig

_MOST_FRAMES, _MOST_SECONDS = 1_000_000, 86_400  # of a video; more is a slip of the keyboard


def _different(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if twice := sorted(seed for seed in set(seeds) if seeds.count(seed) > 1):
        raise ValueError(f"{twice[0]} is there twice, and its video would be the same; leave one out")
    return seeds


Seed = Annotated[int, Field(ge=0, lt=2**63)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), AfterValidator(_different)]
Seconds = Annotated[float, Field(gt=0, le=_MOST_SECONDS)]
Side = Annotated[int, Field(ge=1, le=16_384)]

DEFAULT = "default"  # name of a suite


class Clips(StageConfig):
    """The held-out clips that everything is measured on or compared with.

    frames    of a clip
    fps       frames a second, which videos of other rates are sampled at; null is the dataset's
    size      height and width, which videos of other sizes are scaled and cropped to
    most      clips, at most: the same random ones for every model
    """

    frames: int = Field(17, ge=1, le=_MOST_FRAMES)
    fps: float | None = Field(None, gt=0, le=1000)
    size: tuple[Side, Side] = (64, 64)
    most: int = Field(256, ge=1)


class Videos(StageConfig):
    """Videos that a generator makes: one for each prompt and seed; without prompts of the suite, one for each seed.

    A model that takes no prompts makes as many, of further seeds.

    frames    of each; null where seconds says it
    seconds   of each, in place of frames
    seeds     of their draws, all different
    """

    frames: int | None = Field(None, ge=1, le=_MOST_FRAMES)
    seconds: Seconds | None = None
    seeds: Seeds = tuple(range(16))

    @model_validator(mode="after")
    def _one(self) -> "Videos":
        if (self.frames is None) == (self.seconds is None):
            raise ValueError("videos: give frames or seconds, one of them")
        return self


class Gaps(StageConfig):
    """Gaps in the middle of held-out clips, for models that fill them.

    frames    of a gap
    context   frames that are shown on each side
    draws     times that each is filled, for their diversity
    """

    frames: int = Field(8, ge=1, le=_MOST_FRAMES)
    context: int = Field(4, ge=1, le=_MOST_FRAMES)
    draws: int = Field(2, ge=1, le=1000)


class Networks(StageConfig):
    """Networks that the user brings; a measure that needs one that is not named is left out, and the table says so.

    features     of videos or frames, for Fréchet and kernel distances
    debiased     a second one for the content-debiased distance, such as of VideoMAE (arXiv 2404.12391)
    classifier   for IS, CCS and ICS
    perceptual   for LPIPS
    linear       its learned weights
    dual         folder of an encoder of pictures and texts, such as CLIP, for the agreement with the prompt
    embedder     an image encoder for CLIP-RS: CLIP's folder, own, or a feature network's file
    """

    features: str | None = None
    debiased: str | None = None
    classifier: str | None = None
    perceptual: str | None = None
    linear: str | None = None
    dual: str | None = None
    embedder: str | None = None


class Suite(StageConfig):
    """What an evaluation does with each model.

    what        a line for people
    clips       the held-out clips
    videos      lengths and seeds of generated videos, each measured by itself; empty: none are made
    prompts     what they show, for models that take prompts; null: the captions of the held-out clips, where there are any,
                a seed each
    settings    of generators, over their own
    gaps        for models that fill gaps
    seconds     of a video that a model retrieves from its memory
    chunk       frames of a part of a long video, for what is measured part by part
    measures    names of measures; null: all that the models and the networks allow
    resamples   of the bootstrap
    seed        of the choice of clips, of noise and of the bootstrap
    """

    what: str = ""
    clips: Clips = Clips()
    videos: tuple[Videos, ...] = (Videos(frames=17),)
    prompts: tuple[str, ...] | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    gaps: Gaps = Gaps()
    seconds: Seconds = 5.0
    chunk: int = Field(16, ge=2)
    measures: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    resamples: int = Field(1000, ge=100, le=100_000)
    seed: int = Field(0, ge=0, lt=2**62)  # gaps count on from it

    def count(self, videos: Videos) -> int:
        """How many videos of a length every generator makes."""
        return len(self.prompts or ("",)) * len(videos.seeds)


Aspect = Literal["reconstructs", "generates", "retrieves", "fills", "runs"]


def builtin() -> list[str]:
    """The names of the suites of the package."""
    files = resources.files("longtake.training.evaluation.suites").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def text_of(name: str) -> str:
    """The YAML of a suite of the package. Raises UserError where there is none of this name."""
    if name not in builtin():
        raise UserError(f"suite: there is no {name!r}; there are {', '.join(builtin())}, or name a file")
    return (resources.files("longtake.training.evaluation.suites") / f"{name}.yaml").read_text()


def named(value: Any) -> Any:
    """The settings of a suite of the package by its name; anything else as it is."""
    return yaml.safe_load(text_of(value)) if isinstance(value, str) else value
