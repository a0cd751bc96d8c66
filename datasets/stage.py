"""The common part of all stages: a strict config, and markers for its fields.

A stage is a module with `Config` (a `StageConfig` with its `kind`), `VERSION` (raise it when the same config
would give another output), `PRODUCES` (the kind of its output) and `run(config, inputs, output) -> dict`.
It may also have

- `outside(config) -> str`: a digest of its inputs outside the recipe, for example the listing of the sources; when it
  changes, the stage runs again;
- `retried(uri) -> str`: beside `outside`, a digest of the inputs that it could not read when it made `uri` and has read
  since, or can read now; empty where there are none;
- `complete(uri) -> bool`: whether its output is still complete; if not it runs again and makes the missing parts;
- `warnings(config) -> list[str]`: "KEY: why" for settings that are allowed and rarely meant;
- `task(config) -> TaskConfig`: what one of its Ray tasks asks for, where its `run` leaves that open;
- `check(config, inputs)`: raises ValueError("KEY: why") where its config does not fit the configs of the stages that
  make its inputs.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

Product = Literal[
    "dataset", "view", "captions", "text", "scores", "clusters", "latents", "tokens", "model", "evaluation"
]


RUN = "run"  # the field of a stage's config that says how the work is done and does not change the output


class StageConfig(BaseModel):
    """Strict base of all configs in a recipe: an unknown key is an error, values never change.

    The docstring of a config documents its fields, a line each: `name   meaning`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    MOVED: ClassVar[Mapping[str, str]] = {}  # former keys, and where they are now
    # keys that came later, with the value by which a stage does what it did before; its output is then the one from before
    LATER: ClassVar[Mapping[str, Any]] = {}

    def decisive(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings that decide a stage's output, written as ever where a default has changed since."""
        return settings


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{ascii(text)[:80]} is no UTF-8; write it again") from e
    return text


Utf8 = Annotated[str, AfterValidator(_encodable)]  # YAML may have halves of characters


class Input:
    """Marks a config field that names another stage of the recipe, or the URI of such a stage's output; or a tuple of such.

    Of a tuple each is an input by itself, called FIELD.0, FIELD.1 ... A value that is one of `words` names no input.
    """

    def __init__(self, product: Product, words: tuple[str, ...] = ()) -> None:
        self.product, self.words = product, words


class Naming:
    """Marks a config field that names the result: with another name a stage runs again, but does not start over."""


class Measuring(Naming):
    """Marks a config field that says how to measure the result: with another value a stage runs again, but does not start over."""


def names(config: StageConfig) -> dict[str, Any]:
    """The fields marked `Naming` or `Measuring`, as plain data."""
    return config.model_dump(mode="json", include=_named(config))


def content(config: StageConfig) -> dict[str, Any]:
    """The settings that decide a stage's output: its config as plain data, without `run` and the fields marked `Naming`."""
    return config.decisive(_settings(config))


def cost(config: StageConfig) -> dict[str, Any]:
    """The settings that decide the time of a step or clip, as a run records them.

    They are without inputs and costless fields, and with the costly ones of `run`.
    """
    costless: frozenset[str] = getattr(config, "COSTLESS", frozenset())
    run = getattr(config, RUN, None)
    settings = {
        name: value for name, value in _settings(config).items() if name not in costless | _fields_of(inputs_of(config))
    }
    return settings | ({} if run is None else {RUN: run.model_dump(mode="json", include=run.COSTLY)})


def _settings(config: StageConfig) -> dict[str, Any]:
    """A config as plain data, without `run`, the fields marked `Naming`, and later keys by which nothing changes."""
    settings = config.model_dump(mode="json", exclude={RUN} | _named(config))
    later = {name: value for base in type(config).__mro__ for name, value in getattr(base, "LATER", {}).items()}
    return {name: value for name, value in settings.items() if name not in later or value != later[name]}


def _named(config: StageConfig) -> set[str]:
    fields = type(config).model_fields.items()
    return {name for name, field in fields if any(isinstance(m, Naming) for m in field.metadata)}


DatasetInput = Annotated[str, Input("dataset")]
ViewInput = Annotated[str, Input("view")]
ModelInput = Annotated[str, Input("model")]


def inputs_of(config: StageConfig) -> dict[str, tuple[str, Product]]:
    """The inputs that a config names: `{field: (stage name or URI, product)}`, unset ones left out (see `Input` for tuples)."""
    inputs: dict[str, tuple[str, Product]] = {}
    for name, field in type(config).model_fields.items():
        value: Any = getattr(config, name)
        # an optional input, `ViewInput | None`, has its marker in the union's members
        markers = [
            *field.metadata,
            *(m for a in getattr(field.annotation, "__args__", ()) for m in getattr(a, "__metadata__", ())),
        ]
        for marker in markers:
            if isinstance(marker, Input) and value is not None and value not in marker.words:
                several = isinstance(value, tuple)
                inputs |= (
                    {f"{name}.{number}": (each, marker.product) for number, each in enumerate(value)}
                    if several
                    else {name: (value, marker.product)}
                )
    return inputs


def with_inputs(settings: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with other values for their inputs, which have the names that `inputs_of` gives them."""
    changed = dict(settings)
    for name, value in inputs.items():
        field, dot, number = name.partition(".")
        if dot:
            values = list(changed[field])
            values[int(number)] = value
            changed[field] = values
        else:
            changed[field] = value
    return changed


def _fields_of(inputs: Mapping[str, Any]) -> set[str]:
    return {name.partition(".")[0] for name in inputs}
