"""What every stage shares: a strict config, and the marker of an input that another stage makes.

A stage is a module with `Config` (a `StageConfig` with its `kind`), `VERSION` (raise it when the same config
would give another output), `PRODUCES` (what its output is) and `run(config, inputs, output) -> dict`.
It may also have

- `outside(config) -> str`: a digest of what it reads from beyond the recipe, such as the listing of the sources, so
  that a change out there reruns it;
- `retried(uri) -> str`: beside `outside`, a digest of what it could not read when it made `uri` and has read since, or
  can read now; empty where there is nothing of the kind;
- `complete(uri) -> bool`: whether what it made is still all there, else it runs again and makes what is missing;
- `warnings(config) -> list[str]`: "KEY: why", of settings that are allowed and rarely meant;
- `check(config, inputs)`: raises ValueError("KEY: why") where its config does not fit the configs of the stages that
  make its inputs.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

Product = Literal["dataset", "view", "latents", "model"]


RUN = "run"  # the field of a stage's config that says how the work is done, not what comes out


class StageConfig(BaseModel):
    """Strict base of all configs in a recipe: an unknown key is an error, values never change.

    The docstring of a config is the documentation of its fields, a line each: `name   what it is`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    MOVED: ClassVar[Mapping[str, str]] = {}  # keys that were here once, and a remark where they are now


class Input:
    """Marks a config field that names another stage of the recipe, or a URI of what such a stage makes."""

    def __init__(self, product: Product) -> None:
        self.product = product


class Naming:
    """Marks a config field that says how the result is called: another name makes a stage run, but not begin anew."""


class Measuring(Naming):
    """Marks a config field that says how the result is measured: another value makes a stage run, but not begin anew."""


def names(config: StageConfig) -> dict[str, Any]:
    """The fields marked `Naming` or `Measuring`, as plain data."""
    return config.model_dump(mode="json", include=_named(config))


def content(config: StageConfig) -> dict[str, Any]:
    """What decides what a stage makes: its config as plain data, without `run` and the fields marked `Naming`."""
    return config.model_dump(mode="json", exclude={RUN} | _named(config))


def cost(config: StageConfig) -> dict[str, Any]:
    """What decides the time of a step or clip: `content` without inputs and costless fields, and the costly part of `run`."""
    costless: frozenset[str] = getattr(config, "COSTLESS", frozenset())
    run = getattr(config, RUN, None)
    settings = {
        name: value for name, value in content(config).items() if name not in costless | inputs_of(config).keys()
    }
    return settings | ({} if run is None else {RUN: run.model_dump(mode="json", include=run.COSTLY)})


def _named(config: StageConfig) -> set[str]:
    fields = type(config).model_fields.items()
    return {name for name, field in fields if any(isinstance(m, Naming) for m in field.metadata)}


DatasetInput = Annotated[str, Input("dataset")]
ViewInput = Annotated[str, Input("view")]
ModelInput = Annotated[str, Input("model")]


def inputs_of(config: StageConfig) -> dict[str, tuple[str, Product]]:
    """The inputs that a config names: `{field: (stage name or URI, product)}`, unset ones left out."""
    found: dict[str, tuple[str, Product]] = {}
    for name, field in type(config).model_fields.items():
        value: Any = getattr(config, name)
        # an optional input, `ViewInput | None`, hides its marker in the union's members
        markers = [
            *field.metadata,
            *(m for a in getattr(field.annotation, "__args__", ()) for m in getattr(a, "__metadata__", ())),
        ]
        for marker in markers:
            if isinstance(marker, Input) and value is not None:
                found[name] = (value, marker.product)
    return found
