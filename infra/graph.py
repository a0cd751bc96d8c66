"""The graph of a recipe's stages: edges, order and fingerprints. What the CLI runs, a cluster gets and a DAG renders."""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from typing import Any

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.masking import shown, shown_within
from longtake.datasets.stage import StageConfig, content, inputs_of, names
from longtake.infra import stages
from longtake.infra.recipe import Recipe


@dataclass(frozen=True)
class Node:
    """A stage in its graph.

    `fingerprint` says what the stage would make: its config, its version, the fingerprints of its inputs, and what it
    reads from outside. `result` is the same without names, its own and those of its inputs. `output` is named by the
    result without what lies outside, so that a grown folder of sources adds to the same dataset, and a training goes on
    from its checkpoint under a corrected name.
    """

    name: str
    kind: str
    config: StageConfig
    inputs: dict[str, str]  # config field -> stage name or URI
    upstream: tuple[str, ...]
    fingerprint: str
    result: str
    output: str


def pin(recipe: Recipe) -> Recipe:
    """The recipe with a digest of all that its stages read from outside, so that every process sees the same world."""
    outside = dict(recipe.outside)
    for node in build(recipe):
        module = stages.load(node.kind)
        if hasattr(module, "outside") and node.name not in outside:
            outside[node.name] = module.outside(node.config)
            if hasattr(module, "retried"):
                outside[node.name] += _retried(module, node)
    return replace(recipe, outside=outside)


def _retried(module: Any, node: Node) -> str:
    try:
        return str(module.retried(node.output))
    except (Failure, PermissionError) as e:
        # a machine that only submits or renders a recipe may have no right to its workspace
        print(f"{node.name}: not looked whether what was unreachable answers now ({shown(str(e))})", file=sys.stderr)
        return ""


def build(recipe: Recipe) -> list[Node]:
    """The stages in an order in which they can run.

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
        _check(recipe, name, inputs)
        known = {field: nodes[value].result if value in nodes else value for field, value in inputs.items()}
        made = _hash([kind, stages.load(kind).VERSION, content(config) | known])
        result = _hash([made, recipe.outside.get(name)])
        nodes[name] = Node(
            name,
            kind,
            config,
            inputs,
            tuple(upstream),
            fingerprint=_hash([result, names(config), *(nodes[up].fingerprint for up in upstream)]),
            result=result,
            output=storage.join(recipe.workspace, name, made[:12]),
        )
    return list(nodes.values())


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


def _check(recipe: Recipe, name: str, inputs: dict[str, str]) -> None:
    """Inputs make what is needed; and a stage may compare its config with those of the stages that it reads from."""
    config = recipe.stages[name]
    for field, (value, product) in inputs_of(config).items():
        if value in recipe.stages:
            made = stages.load(recipe.stages[value].kind).PRODUCES  # type: ignore[attr-defined]
            if made != product:
                raise UserError(
                    f"{recipe.path}: stages.{name}.{field}: needs a {product}, but stage {value} makes a {made}"
                )
    module = stages.load(config.kind)  # type: ignore[attr-defined]
    if hasattr(module, "check"):
        try:
            module.check(
                config, {field: recipe.stages[value] for field, value in inputs.items() if value in recipe.stages}
            )
        except ValueError as e:
            raise UserError(f"{recipe.path}: stages.{name}.{e}") from e


def warnings(node: Node) -> list[str]:
    """What its settings should make a user think of, before it runs."""
    module = stages.load(node.kind)
    return (
        [f"stages.{node.name}.{text}" for text in module.warnings(node.config)] if hasattr(module, "warnings") else []
    )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def whole_fingerprint(nodes: list[Node]) -> str:
    """Of all stages together."""
    return _hash([[n.name, n.fingerprint] for n in nodes])


def downstream(nodes: list[Node], start: str) -> set[str]:
    """A stage and all that hang on it."""
    found = {start}
    for node in nodes:
        if found & set(node.upstream):
            found.add(node.name)
    return found


def describe(recipe: Recipe, nodes: list[Node]) -> dict[str, Any]:
    """The graph as plain data: the one description that every scheduler renders.

    A scheduler first appends the URL of a file to `resolve` and runs that; the file then stands for `path` in all other
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


def select(nodes: list[Node], wanted: str, recipe: Recipe) -> Node:
    """Raises UserError where the recipe has no such stage."""
    by_name: Mapping[str, Node] = {n.name: n for n in nodes}
    if wanted not in by_name:
        raise UserError(f"{recipe.path}: there is no stage {wanted!r}; stages: {', '.join(by_name)}")
    return by_name[wanted]
