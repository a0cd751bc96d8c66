"""The settings of a kind of stage as a table: names, defaults, and their documentation in the docstring of the config."""

import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic_core import PydanticUndefined

from longtake.datasets.stage import RUN, StageConfig

_ENTRY = re.compile(r"([a-z_0-9]+(?:, [a-z_0-9]+)*) {2,}(\S.*)|([a-z_0-9]{14,}) (\S.*)")


class Setting(NamedTuple):
    """A key of a recipe, such as `run.workers`, its default as YAML, and its documentation."""

    key: str
    default: str
    text: str


def settings_of(config: type[StageConfig], prefix: str = "") -> Iterator[Setting]:
    """The settings of a config, each nested config below its key. The text is empty without documentation."""
    texts = _texts(config)
    for name in _order(config):
        field = config.model_fields[name]
        nested = nested_of(field.annotation)
        default = "" if nested and isinstance(field.get_default(call_default_factory=True), nested) else _default(field)
        yield Setting(f"{prefix}{name}", default, texts.get(name, ""))
        if nested:
            yield from settings_of(nested, f"{prefix}{name}.")


def _order(config: type[StageConfig]) -> list[str]:
    """The names of a config's own fields, then those of its bases, and `run` last."""
    names = dict.fromkeys(name for base in config.__mro__ for name in inspect.get_annotations(base))
    fields = [name for name in names if name in config.model_fields and name not in ("kind", RUN)]
    return fields + [name for name in config.model_fields if name == RUN]


def nested_of(annotation: Any) -> type[StageConfig] | None:
    """The config in a field's annotation; None if there is none."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, StageConfig):
            return candidate
    return None


def summary_of(config: type[StageConfig]) -> str:
    """The docstring of a config without its table."""
    lines = inspect.cleandoc(config.__doc__ or "").splitlines()
    table = next((n for n, line in enumerate(lines) if _entry(line, config)), len(lines))
    return "\n".join(lines[:table]).strip()


def _texts(config: type[StageConfig]) -> dict[str, str]:
    """The documentation of fields in the docstrings of a config and its bases; a subclass overrides its bases."""
    texts: dict[str, str] = {}
    for base in reversed(config.__mro__):
        names: list[str] = []
        for line in inspect.cleandoc(base.__dict__.get("__doc__") or "").splitlines():
            if entry := _entry(line, config):
                names, text = entry
                texts |= dict.fromkeys(names, text)
            elif names and line.startswith("  "):
                texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
            else:
                names = []
    return texts


def _entry(line: str, config: type[StageConfig]) -> tuple[list[str], str] | None:
    """The fields and the text of a line of a docstring's table; None for other lines."""
    match = _ENTRY.fullmatch(line)
    if not match:
        return None
    names = (match[1] or match[3]).split(", ")
    return (names, match[2] or match[4]) if set(names) <= set(config.model_fields) else None


def _default(field: Any) -> str:
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return "needed"
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return _inline_yaml(default)


def _inline_yaml(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(_inline_yaml(part) for part in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_inline_yaml(part)}" for name, part in value.items()) + "}"
    if isinstance(value, StageConfig):
        return _inline_yaml(value.model_dump(exclude_defaults=True))
    return str(value)
