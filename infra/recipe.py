"""Recipes: YAML to typed stage configs, with every mistake as one line that names the file, the key and the remedy."""

import difflib
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, get_args

from pydantic import ValidationError

from longtake.datasets import storage
from longtake.datasets.errors import UserError
from longtake.datasets.masking import shown
from longtake.datasets.stage import RUN, StageConfig
from longtake.infra import stages, yaml_text
from longtake.infra.deploy import Deploy
from longtake.infra.settings import nested_of

_KEYS = ("name", "workspace", "stages", "deploy", "outside")
_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe: all bases merged, overrides applied, variables read, configs valid."""

    path: str
    name: str
    workspace: str
    stages: dict[str, StageConfig]
    # pinned digests of what stages read from beyond the recipe, by stage, or by STAGE.FIELD of an input
    outside: dict[str, str] = field(default_factory=dict)
    deploy: Deploy = field(default_factory=Deploy)

    def to_yaml(self) -> str:
        """A recipe file with every default written out, which loads to the same recipe anywhere."""
        content = {
            "name": self.name,
            "workspace": self.workspace,
            "stages": {name: config.model_dump(mode="json") for name, config in self.stages.items()},
            "deploy": self.deploy.model_dump(mode="json"),
            "outside": self.outside,
        }
        return yaml_text.dump(content)

    def digest(self) -> str:
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()


def load(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or one of the package's own by its bare name.

    Args:
        path: a file or fsspec URL, or a name such as "quickstart".
        overrides: `KEY.PATH=VALUE` strings, the value as YAML.

    Raises:
        UserError: anything wrong with the file, naming the key and what is allowed there.
    """
    content = _merge_bases(_find(path), ())
    for override in overrides:
        set_in(content, override)
    content = _read_variables(content, path, "")
    return _validate(content, path)


def builtin() -> list[str]:
    files = resources.files("longtake.infra.recipes").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def _find(name: str, *before: str) -> str:
    """The file of a recipe: at the first of these places, else at the name itself, else the package's own."""
    packaged = name in builtin()
    for place in (*before, name):
        # a folder that is called as a recipe of the package, such as `scores`, does not hide it
        if storage.exists(place) and not (packaged and _is_folder(place)):
            return place
    if packaged:
        return str(resources.files("longtake.infra.recipes") / f"{name}.yaml")
    raise UserError(f"{name}: no such recipe file, and no recipe of the package ({', '.join(builtin())})")


def _is_folder(url: str) -> bool:
    fs, path = storage.filesystem(url)
    return bool(storage.retrying(url, lambda: fs.isdir(path)))


def _merge_bases(path: str, seen: tuple[str, ...]) -> dict[str, Any]:
    if path in seen:
        raise UserError(f"{path}: base: goes round in a circle ({' -> '.join([*seen, path])})")
    try:
        content = yaml_text.parse(storage.read(path).decode("utf-8-sig"), path)
    except (FileNotFoundError, IsADirectoryError) as e:
        raise UserError(f"{path}: no such recipe file") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not a text file") from e
    if not isinstance(content, dict):
        raise UserError(f"{path}: a recipe is a mapping with the keys name, workspace and stages")
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise UserError(f"{path}: base: must be the name of another recipe file")
    folder = path.rpartition("/")[0] or "."
    beside = os.path.normpath(f"{folder}/{base}") if "://" not in path else storage.join(folder, base)
    return _merge(_merge_bases(_find(base, beside), (*seen, path)), content)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        mappings = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if mappings else value
    return merged


def set_in(content: dict[str, Any], override: str) -> None:
    """Set the value that an override KEY.PATH=VALUE names. Raises UserError for another one."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: write KEY.PATH=VALUE, such as stages.vae.steps=200")
    *parents, last = key.split(".")
    mapping: Any = content
    for parent in parents:
        mapping = mapping.setdefault(parent, {})
        if not isinstance(mapping, dict):
            raise UserError(f"--set {override}: {parent} is a value, it has no keys below it")
    mapping[last] = yaml_text.parse(value, f"--set {override}")


def _read_variables(value: Any, path: str, key: str) -> Any:
    if isinstance(value, dict):
        return {k: _read_variables(v, path, f"{key}.{k}".lstrip(".")) for k, v in value.items()}
    if isinstance(value, list):
        return [_read_variables(v, path, f"{key}.{n}") for n, v in enumerate(value)]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise UserError(
                f"{path}: {key}: the environment variable {match[1]} is not set; set it, or write a value there"
            )
        # an empty FOLDER would turn FOLDER/clips into /clips
        neighbours = (value[: match.start()][-1:], value[match.end() :][:1])
        if not os.environ[match[1]] and "/" in neighbours:
            raise UserError(
                f"{path}: {key}: the environment variable {match[1]} is empty, which leaves a part of a path out"
            )
        return os.environ[match[1]]

    return _VARIABLE.sub(variable, value)


def refuse_login(what: str, url: str) -> None:
    """Raise UserError if an address that is recorded or shown to others has a password or key in it."""
    if not storage.is_local(url) and shown(url) != url:
        raise UserError(
            f"{what} {shown(url)}: has a login or key in it, and this address is recorded; take it out, and give it to the"
            " store by environment variables or its own configuration file"
        )


def _validate(content: dict[str, Any], path: str) -> Recipe:
    # keys
    for key, value in content.items():
        if key not in _KEYS:
            allowed = f"allowed: base, {', '.join(_KEYS[:-1])}"
            if isinstance(value, dict) and "kind" in value:
                raise UserError(f"{path}: {key}: a stage belongs below `stages`, indented; here {allowed}")
            raise UserError(f"{path}: {key}: unknown key{_suggest(str(key), _KEYS)}; {allowed}")
    for key in ("name", "workspace"):
        if not isinstance(content.get(key), str) or not content[key].strip():
            raise UserError(f"{path}: {key}: must be a text")
    configs = _stages(content.get("stages"), path)

    # MLflow records URLs inside the workspace
    workspace = storage.absolute(content["workspace"])
    refuse_login(f"{path}: workspace", workspace)
    for name, config in configs.items():
        for source in getattr(config, "sources", ()):
            if source.partition("/**")[0] == workspace:
                raise UserError(
                    f"{path}: stages.{name}.sources: {source} is the workspace, whose videos are no sources;"
                    " put one of them into a folder of its own"
                )

    # digests and deployment
    outside = content.get("outside") or {}
    if not isinstance(outside, dict) or not all(isinstance(v, str) for item in outside.items() for v in item):
        raise UserError(
            f"{path}: outside: must be a mapping of stage names to digests, as `longtake resolve` writes it"
        )
    deploy = _deploy(content.get("deploy") or {}, path, configs)
    return Recipe(path, content["name"], workspace, configs, outside, deploy)


def _stages(content: Any, path: str) -> dict[str, StageConfig]:
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: stages: must be a mapping of stage names to their configs")
    configs = {}
    for name, config in content.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(f"{path}: stages.{name}: a stage's name has lower-case letters, digits, - and _ only")
        kind = config.get("kind") if isinstance(config, dict) else None
        if not isinstance(kind, str) or kind not in stages.STAGES:
            error = f"unknown kind {kind!r}{_suggest(str(kind), stages.STAGES)}" if kind else "has no kind"
            raise UserError(f"{path}: stages.{name}.kind: {error}; allowed: {', '.join(stages.STAGES)}")
        model = stages.load(kind).Config
        try:
            configs[name] = model(**config)
        except ValidationError as e:
            raise UserError(f"{path}: {first_line(e, f'stages.{name}', model)}") from e
    return configs


def _deploy(content: Any, path: str, configs: Mapping[str, StageConfig]) -> Deploy:
    if not isinstance(content, dict):
        raise UserError(f"{path}: deploy: must be a mapping with the keys {', '.join(Deploy.model_fields)}")
    try:
        deploy = Deploy(**content)
    except (ValidationError, TypeError) as e:
        line = first_line(e, "deploy", Deploy) if isinstance(e, ValidationError) else f"deploy: {e}"
        raise UserError(f"{path}: {line}") from None
    for name in deploy.resources:
        if name not in configs:
            raise UserError(f"{path}: deploy.resources.{name}: there is no such stage{_suggest(name, configs)}")
    return deploy


def first_line(error: ValidationError, prefix: str, model: type[StageConfig]) -> str:
    """The first error of pydantic, as `KEY: what is wrong; what is allowed`."""
    first = error.errors(include_url=False)[0]
    key = ".".join([prefix, *(str(part) for part in first["loc"])])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        owner, name = _model_at(model, first["loc"][:-1]), str(first["loc"][-1])
        if owner and (remark := _moved(owner, name)):
            return f"{key}: {remark}{more}"
        allowed = [field for field in owner.model_fields if field != "kind"] if owner else []
        remedy = f"allowed: {', '.join(allowed)}"
        # a mapping that a stage reads itself has no model here
        if "kind" in (page := owner or model).model_fields:
            remedy = f"see `longtake stage --help {kind_of(page)}`"
        return f"{key}: unknown key{_suggest(name, allowed)}; {remedy}{more}"
    if first["type"] == "missing":
        return f"{key}: is missing{more}"
    message = first["msg"].removeprefix("Value error, ")
    actual = "" if first["type"] == "value_error" else f", not {first['input']!r}"
    return f"{key}: {message[0].lower()}{message[1:]}{actual}{more}"


def kind_of(config: type[StageConfig]) -> str:
    """The kind of stage of a config."""
    return str(get_args(config.model_fields["kind"].annotation)[0])


def _moved(model: type[StageConfig], name: str) -> str | None:
    """The new place of a key that a model had once; None for a key that it never had."""
    if name in model.MOVED:
        return model.MOVED[name]
    run: Any = nested_of(model.model_fields[RUN].annotation) if RUN in model.model_fields else None
    return f"is now {RUN}.{name}; write `{RUN}: {{{name}: ...}}`" if run and name in run.model_fields else None


def _model_at(model: Any, location: Sequence[Any]) -> type[StageConfig] | None:
    for part in location:
        if part not in model.model_fields:
            # a key of a mapping, of whose values this is the model
            continue
        model = nested_of(model.model_fields[part].annotation)
        if model is None:
            return None
    return model


def _suggest(word: str, allowed: Any) -> str:
    close = difflib.get_close_matches(word, list(allowed), 1)
    return f" (did you mean {close[0]}?)" if close else ""
