"""How far a sample is led towards its class, text and sound, as recipes, registered models and commands say it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer


@dataclass(frozen=True)
class Guidance:
    """Guidance towards the class, the text and the sound, each of its own; 1 is none."""

    classes: float = 1.0
    text: float = 1.0
    audio: float = 1.0

    def __str__(self) -> str:
        return ",".join(f"{name}={value:g}" for name, value in self.plain().items())

    def plain(self) -> dict[str, float]:
        """The parts as plain data. Sound came later: what has none is written as before."""
        return {name: value for name, value in asdict(self).items() if name != "audio" or value != 1.0}


PARTS = tuple(field.name for field in fields(Guidance))


def parts_of(guidance: float | Guidance) -> Guidance:
    """The guidance of each; one number is that of all."""
    return guidance if isinstance(guidance, Guidance) else Guidance(guidance, guidance, guidance)


def guidance_of(value: Any) -> float | Guidance:
    """Guidance from plain data or text: a number for all, or `{classes: 2, text: 6}`, as text `classes=2,text=6`.

    A part that is left out is 1. If all are equal they become one number, so that what is the same is written the same.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, Guidance):
        value = asdict(value)
    elif isinstance(value, str) and "=" in value:
        value = dict(_pair(part) for part in value.split(","))
    if not isinstance(value, Mapping) or not value:
        return _strength(value)
    if unknown := [str(name) for name in value if name not in PARTS]:
        raise ValueError(f"has no {unknown[0][:40]}; there are {', '.join(PARTS[:-1])} and {PARTS[-1]}")
    parts = Guidance(**{name: _strength(strength) for name, strength in value.items()})
    return parts.classes if parts.classes == parts.text == parts.audio else parts


def plain(guidance: float | Guidance) -> float | dict[str, float]:
    """What `guidance_of` reads back."""
    return guidance.plain() if isinstance(guidance, Guidance) else guidance


# a config's field; as plain data it is a number or a mapping
GuidanceSetting = Annotated[float | Guidance, BeforeValidator(guidance_of), PlainSerializer(plain)]


def _pair(part: str) -> tuple[str, str]:
    name, _, strength = part.partition("=")
    return name.strip(), strength


def _strength(value: Any) -> float:
    """A number from 0 on. Text too, since variables of a recipe and options of a command are text."""
    try:
        strength = float(value) if isinstance(value, Real | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        strength = math.nan
    if not 0 <= strength < math.inf:
        raise ValueError(
            f"needs a number from 0 on, such as 4, or one for each, such as classes=2,text=6; got {str(value)[:40]!r}"
        )
    return strength
