"""The graph of a recipe's stages: edges, order and fingerprints. The CLI, clusters and DAGs all run this graph."""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.masking import shown, shown_within
from longtake.datasets.stage import StageConfig, content, inputs_of, names, with_inputs
from longtake.infra import stages
from longtake.infra.recipe import Recipe
from longtake.training.foreign import folder as folders

_DIGEST = 12  # characters in the name of an output


@dataclass(frozen=True)
class Node:
    """A stage in its graph.

    `fingerprint` identifies the stage's product: a digest of its config, its version, the fingerprints of its inputs, and
    of what it reads from outside. `result` is the same without the names of the stage and its inputs. `output` is named by
    the result without what is outside. So a grown folder of sources adds to the same dataset, and a training resumes from
    its checkpoint under a corrected name. With other `MAY_CHANGE` settings too: see `Runs.output_of`.
    """

    name: str
    kind: str
    config: StageConfig
    inputs: dict[str, str]  # config field -> stage name or URI
    hashed: dict[str, Any]  # the inputs as fingerprints have them
    upstream: tuple[str, ...]
    fingerprint: str
    result: str
    output: str

    @property
    def digest(self) -> str:
        """The name of the output."""
        return self.output.rpartition("/")[2]


def pin(recipe: Recipe) -> Recipe:
    """The recipe with a digest of all that its stages read from outside, so that every process sees the same sources."""
    outside = dict(recipe.outside)
    for node in build(recipe):
        for field, value in node.inputs.items():
            if f"{node.name}.{field}" not in outside and (listing := _listing(field, value)):
                outside[f"{node.name}.{field}"] = listing
        module = stages.load(node.kind)
        if hasattr(module, "outside") and node.name not in outside:
            outside[node.name] = module.outside(node.config)
            if hasattr(module, "retried"):
                outside[node.name] += _retried(module, node)
    return replace(recipe, outside=outside)


def _listing(field: str, value: str) -> str:
    """A digest of the names, sizes and times of the files that an input names of a folder of another library; else empty."""
    if not storage.is_local(value) or not folders.is_foreign(folder := Path(storage.filesystem(value)[1])):
        return ""
    return folders.listing_of(folders.parts_for(folder, field))


def _retried(module: Any, node: Node) -> str:
    try:
        return str(module.retried(node.output))
    except (Failure, PermissionError) as e:
        # a machine that only submits or renders a recipe may have no access to its workspace
        print(f"{node.name}: not looked whether what was unreachable answers now ({shown(str(e))})", file=sys.stderr)
        return ""


def build(recipe: Recipe) -> list[Node]:
    """The stages in the order of their dependencies.

    Raises:
        UserError: an input that is no stage and no URI, or of the wrong kind; a cycle.
    """
    links = {name: _links(recipe, name, config) for name, config in recipe.stages.items()}
    try:
        order = list(TopologicalSorter({name: upstream for name, (_, upstream) in links.items()}).static_order())
    except CycleError as e:
        raise UserError(
            f"{recipe.path}: stages: a cycle: {' -> '.join(reversed(e.args[1]))}; remove one of these inputs"
        ) from e
    nodes: dict[str, Node] = {}
    for name in order:
        config = recipe.stages[name]
        inputs, upstream = links[name]
        kind = config.kind  # type: ignore[attr-defined]
        _check_inputs(recipe, name, inputs)
        resolved: dict[str, Any] = {
            field: nodes[value].result if value in nodes else value for field, value in inputs.items()
        }
        # other weights in the folder of another library are another input
        listed = {field: recipe.outside.get(f"{name}.{field}") for field in inputs}
        resolved |= {field: [resolved[field], listing] for field, listing in listed.items() if listing}
        own = _own(kind, config, resolved)
        result = _hash([own, recipe.outside.get(name)])
        nodes[name] = Node(
            name,
            kind,
            config,
            inputs,
            resolved,
            tuple(upstream),
            fingerprint=_hash([result, names(config), *(nodes[up].fingerprint for up in upstream)]),
            result=result,
            output=storage.join(recipe.workspace, name, own[:_DIGEST]),
        )
    return list(nodes.values())


def digest_with(node: Node, params: Mapping[str, str]) -> str:
    """The DIGEST of a stage's output, were its settings that may change in the middle those of a run, as MLflow has them."""
    others = {
        name: int(params[name]) for name in getattr(node.config, "MAY_CHANGE", ()) if params.get(name, "").isdigit()
    }
    return _own(node.kind, node.config.model_copy(update=others), node.hashed)[:_DIGEST]


def _links(recipe: Recipe, name: str, config: StageConfig) -> tuple[dict[str, str], list[str]]:
    inputs, upstream = {}, []
    for field, (value, _) in inputs_of(config).items():
        inputs[field] = value
        if value in recipe.stages:
            upstream.append(value)
        elif ":/" not in value and "/" not in value:
            raise UserError(
                f"{recipe.path}: stages.{name}.{field}: there is no stage {value!r};"
                f" stages: {', '.join(n for n in recipe.stages if n != name) or 'none'}; or give a URL"
            )
    return inputs, upstream


def _check_inputs(recipe: Recipe, name: str, inputs: dict[str, str]) -> None:
    """Check the products of a stage's inputs, and its config against theirs where the stage has a `check`."""
    config = recipe.stages[name]
    for field, (value, product) in inputs_of(config).items():
        if value in recipe.stages:
            actual = stages.load(recipe.stages[value].kind).PRODUCES  # type: ignore[attr-defined]
            if actual != product:
                raise UserError(
                    f"{recipe.path}: stages.{name}.{field}: needs a {product}, but stage {value} makes a {actual}"
                )
    module = stages.load(config.kind)  # type: ignore[attr-defined]
    if hasattr(module, "check"):
        upstream = {field: recipe.stages[value] for field, value in inputs.items() if value in recipe.stages}
        try:
            module.check(config, upstream)
        except ValueError as e:
            raise UserError(f"{recipe.path}: stages.{name}.{e}") from e


def warnings(node: Node) -> list[str]:
    """Warnings about a stage's settings, before it runs."""
    module = stages.load(node.kind)
    texts = module.warnings(node.config) if hasattr(module, "warnings") else []
    return [f"stages.{node.name}.{text}" for text in texts]


def _own(kind: str, config: StageConfig, hashed: Mapping[str, Any]) -> str:
    """The fingerprint of what a stage does: its config, its version and its inputs, without names and what is outside."""
    return _hash([kind, stages.load(kind).VERSION, with_inputs(content(config), hashed)])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def whole_fingerprint(nodes: list[Node]) -> str:
    """The fingerprint of all stages together."""
    return _hash([[n.name, n.fingerprint] for n in nodes])


def downstream(nodes: list[Node], start: str) -> set[str]:
    """A stage and all that depend on it."""
    names = {start}
    for node in nodes:
        if names & set(node.upstream):
            names.add(node.name)
    return names


def describe(recipe: Recipe, nodes: list[Node]) -> dict[str, Any]:
    """The graph as plain data, for every scheduler.

    A scheduler first appends the URL of a file to `resolve` and runs that. The file then replaces `path` in all other
    commands, so that all stages of one run see the same sources.
    """
    deploy = recipe.deploy
    return {
        "recipe": recipe.name,
        "path": recipe.path,
        "workspace": recipe.workspace,
        "fingerprint": whole_fingerprint(nodes),
        "resolve": ["longtake", "resolve", recipe.path, "--to"],
        "stages": [
            {
                "name": n.name,
                "kind": n.kind,
                "inputs": shown_within(n.inputs),
                "upstream": list(n.upstream),
                "fingerprint": n.fingerprint,
                "output": n.output,
                "command": ["longtake", "stage", recipe.path, n.name],
                "resources": deploy.of(n.name).model_dump(mode="json", exclude={"timeout_seconds"}),
                "timeout_seconds": deploy.of(n.name).timeout_seconds,
            }
            for n in nodes
        ],
        "edges": [[up, n.name] for n in nodes for up in n.upstream],
        "report": ["longtake", "report", recipe.path],
        "deploy": deploy.model_dump(mode="json", include={"env", "image", "schedule", "retries", "stop_seconds"}),
    }


def select(nodes: list[Node], name: str, recipe: Recipe) -> Node:
    """The stage of a name. Raises UserError if the recipe has none."""
    by_name = {n.name: n for n in nodes}
    if name not in by_name:
        raise UserError(f"{recipe.path}: there is no stage {name!r}; stages: {', '.join(by_name)}")
    return by_name[name]
