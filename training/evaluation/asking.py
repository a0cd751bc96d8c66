"""What models are asked for in an evaluation: videos, gaps, settings; and what they refuse, in one line."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import count, islice
from typing import Any, NamedTuple

from longtake.datasets.errors import UserError
from longtake.training.evaluation.suite import Gaps
from longtake.training.models.generator import Generator, Infiller, InfillSettings, Request, Scene, Settings


class Wanted(NamedTuple):
    """A video that a generator is asked for: the number of its prompt among the suite's, its request, and its class by name."""

    prompt: int | None
    request: Request
    class_name: str | None

    @property
    def words(self) -> str | None:
        """What is to be seen."""
        return self.request.story[0][1].prompt


def wanted(
    generator: Generator, seeds: Sequence[int], prompts: Sequence[str] | None, captions: Iterable[str | None]
) -> list[Wanted]:
    """A request for each of the suite's prompts and each seed.

    Where a model takes no prompts there are as many, of further seeds: figures of all depend on how many videos there are.
    Without prompts of the suite each seed gets the next caption, or the next class.
    """
    prompted = "prompt" in generator.accepts
    if prompted and prompts:
        return [
            Wanted(number, Request(seed, [(0.0, Scene(prompt=prompt))]), None)
            for number, prompt in enumerate(prompts)
            for seed in seeds
        ]
    texts = [text for text in captions if text is not None] if prompted else []
    found = []
    more = islice(count(max(seeds) + 1), (len(prompts or ("",)) - 1) * len(seeds))
    for number, seed in enumerate((*seeds, *more)):
        scene, name = Scene(), None
        if texts:
            scene = Scene(prompt=texts[number % len(texts)])
        elif generator.classes:
            scene = Scene(class_id=number % len(generator.classes))
            name = generator.classes[scene.class_id]
        found.append(Wanted(None, Request(seed, [(0.0, scene)]), name))
    return found


def settings_of(generator: Generator, changes: Mapping[str, Any]) -> Settings:
    """A generator's own settings, with those of the suite over them that have an effect on it."""
    return replace(generator.settings, **{name: each for name, each in changes.items() if name in generator.accepts})


def known(changes: Mapping[str, Any], settings: Settings | InfillSettings) -> dict[str, Any]:
    """Those of the suite's settings that are of this kind."""
    names = {field.name for field in fields(settings)}
    return {name: value for name, value in changes.items() if name in names}


def check(changes: Mapping[str, Any]) -> None:
    """Refuse settings that no model has, and values that none takes. Raises UserError."""
    names = {field.name for kind in (Settings, InfillSettings) for field in fields(kind)}
    if unknown := sorted(changes.keys() - names):
        raise UserError(f"suite: settings: there is no {unknown[0]!r}; there are {', '.join(sorted(names))}")
    usual = {field.name: field.default for kind in (InfillSettings, Settings) for field in fields(kind)}
    for name, value in changes.items():
        if name != "guidance" and (wanted := _other(usual[name], value)):  # that has a check of its own
            raise UserError(f"suite: settings: {name}: {value!r} is no {wanted}")
    try:
        Settings(**known(changes, Settings()))
    except (ValueError, TypeError) as e:
        raise UserError(f"suite: settings: {e}") from e


def _other(usual: Any, value: Any) -> str:
    """What a value should be, if it is not of the kind of the usual one; empty where it is."""
    if isinstance(usual, bool | str):
        return "" if type(value) is type(usual) else "true or false" if isinstance(usual, bool) else "text"
    if (usual is None and value is None) or (type(value) is int and value >= 0):
        return ""
    whole = isinstance(usual, int)
    number = isinstance(value, float) and math.isfinite(value) and value >= 0
    return "" if number and not whole else f"{'whole ' * whole}number from 0 on"


def gap_at(gaps: Gaps, fps: float, infiller: Infiller) -> tuple[int, int]:
    """How many frames at its rate an infiller sees on each side of a gap, and makes in it. UserError where it takes none."""
    least, most = infiller.context
    beside = min(most, math.floor(gaps.context / fps * infiller.fps + 1e-6))
    if beside < least:
        needed = math.ceil(least / infiller.fps * fps - 1e-6)
        raise UserError(
            f"gaps: context: the model sees {least} frames at least; set the suite's gaps.context to {needed}"
        )
    return beside, max(1, round(gaps.frames / fps * infiller.fps))


def plain(settings: Settings | InfillSettings) -> dict[str, Any]:
    """Settings for JSON."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    return {name: each if isinstance(each, int | float | str | None) else str(each) for name, each in values.items()}


@contextmanager
def refusing(uri: str) -> Iterator[None]:
    """What a model refuses, as a line that begins with its name."""
    try:
        yield
    except UserError:
        raise
    except ValueError as e:
        raise UserError(f"{uri}: {e}") from e
