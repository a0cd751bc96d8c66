"""`longtake models`: list, show, fetch and import registered models."""

import math
import os
from pathlib import Path
from typing import Any, Literal

import click

from longtake.datasets.errors import Failure, UserError
from longtake.datasets.masking import shown, shown_within
from longtake.training.registry.foreign import FOREIGN, PIPELINE, REFERENCE
from longtake.training.registry.uri import in_store, parse

_LOCK = "longtake.lock"  # tag of registered models that are only locks
_OF_PIPELINE = ("parts", "folder", "bytes")  # what config.json says of a pipeline, and is shown elsewhere
_SHOWN = ("champion", "candidate", "previous")


@click.group()
def models() -> None:
    """Look at registered models, fetch and import them, in the store that MLFLOW_TRACKING_URI names."""


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def list_(as_json: bool) -> None:
    """List the models, with their aliases and the time of the newest version."""
    from longtake.training.registry import store as model_store

    _check_store()
    with model_store.asking("models") as client:
        registered = [m for m in model_store.everything(client.search_registered_models) if _LOCK not in m.tags]
        registered.sort(key=lambda m: m.name)
        rows = [_summary(model, model_store.versions(client, model.name)) for model in registered]
    if as_json:
        return _print_json(rows)
    if not rows:
        return click.echo(f"no models are registered in {shown(model_store.store())}")
    table = [["NAME", "VERSIONS", *(alias.upper() for alias in _SHOWN), "NEWEST"]]
    for row in rows:
        cells = [row["aliases"].get(alias, "-") for alias in _SHOWN]
        table.append([row["name"], str(row["versions"]), *cells, row["newest"] or "-"])
    _print_table(table)


@models.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def show(model: str, as_json: bool) -> None:
    """Show the versions of MODEL (NAME, NAME@ALIAS or NAME/VERSION), and the facts about one of them.

    Without an alias or version, that is the champion or else the newest version.
    """
    from longtake.training.registry import fetch
    from longtake.training.registry import store as model_store

    _check_store()
    uri = _uri(model)
    name = parse(uri).name

    # which version, and what MLflow has of it
    with model_store.asking(uri) as client:
        if uri == f"models:/{name}":
            uri = _default(client, name)
        number = model_store.locate(uri).version
        if not number:
            raise UserError(f"{uri}: name a registered model as NAME, NAME@ALIAS or NAME/VERSION")
        versions = model_store.versions(client, name)
        aliases = dict(client.get_registered_model(name).aliases)
        version = next(v for v in versions if str(v.version) == number)
        metrics = _metrics(client, version.run_id)

    # the model's own files
    content: dict[str, Any] = {}
    problem = None
    try:
        content = fetch.describe(f"models:/{name}/{number}")
    except (UserError, Failure) as e:
        problem = str(e)
    lineage = content.get("lineage")
    config = content.get("config", {})
    # of a pipeline, what it is made of
    parts = config.get("parts", {}) if content.get("model") == PIPELINE else {}
    facts = {
        "name": name,
        "versions": [
            {
                "version": str(v.version),
                "aliases": _aliases_of(aliases, v),
                "created": _when(v.creation_timestamp),
                "gate": v.tags.get("gate.verdict"),
            }
            for v in versions
        ],
        "uri": f"models:/{name}/{number}",
        "aliases": _aliases_of(aliases, version),
        "model": content.get("model"),
        "bytes": content.get("bytes"),
        "location": content.get("location"),
        "sha256": version.tags.get("sha256"),
        "parts": parts,
        "parameters": {name: value for name, value in config.items() if name not in _OF_PIPELINE},
        "inputs": lineage.get("inputs", {}) if isinstance(lineage, dict) else {},
        "run": version.run_id,
        "metrics": metrics,
        "gate": {k: v for k, v in sorted(version.tags.items()) if k.startswith("gate.")},
        "problem": problem,
    }
    facts = shown_within(facts)
    if as_json:
        return _print_json(facts)
    _print_facts(facts)


@models.command()
@click.argument("uri")
@click.option("--to", metavar="FOLDER", help="Copy the model there. [default: only into the cache]")
def pull(uri: str, to: str | None) -> None:
    """Fetch the model URI (NAME@ALIAS or NAME/VERSION) into the cache, check it and print its folder.

    Files in the cache are not fetched again, and a stopped pull is resumed. Pulled models load without the store; with
    LONGTAKE_OFFLINE=1 it is not asked at all. The cache is LONGTAKE_CACHE, else ~/.cache/longtake. A pipeline that is
    registered by reference stays where it lies: its files are compared with their digests, and its folder is printed.

    \b
    Example:
      longtake models pull latte@champion --to latte
    """
    from pathlib import Path

    from longtake.training.registry import cache, pipelines

    _check_store()
    folder = cache.pull(uri := _uri(uri))
    if (folder / REFERENCE).is_file():
        folder = pipelines.opened(uri, folder, None).folder
        if to is not None:
            raise UserError(f"--to: {uri} is registered by reference, and lies in {folder}; copy it from there")
    if to is not None:
        cache.copy(folder, Path(to))
    click.echo(to if to is not None else folder)


@models.command("import")
@click.argument("folder")
@click.option("--name", required=True, metavar="NAME", help="Name in the registry.")
@click.option(
    "--as",
    "kind",
    type=click.Choice(list(FOREIGN)),
    help="What to register of a folder that has several, as a whole CLIP does. [default: what its files say]",
)
@click.option("--by-reference", is_flag=True, help="Of a pipeline: register where FOLDER lies, and copy nothing.")
@click.option(
    "--base", metavar="MODEL", help="FOLDER is an adapter (LoRA) of this pipeline, or of one fine-tuned from it."
)
@click.option("--expert", type=click.Choice(["high", "low"]), help="Of two transformers in the base, the adapter's.")
def import_(
    folder: str,
    name: str,
    kind: str | None,
    by_reference: bool,
    base: str | None,
    expert: Literal["high", "low"] | None,
) -> None:
    """Register a pipeline of diffusers, or a text or image encoder, in FOLDER as a new version of NAME, and as its champion.

    FOLDER is what `save_pretrained` writes, as safetensors. With model_index.json it is a pipeline, and so is one part of it
    alone. Of transformers a clip_vision_model is an image encoder, a clip needs --as, all else is a text encoder with its
    tokenizer.json. It is checked, then its files are copied as they are. The same files are not registered twice. The old
    champion becomes `previous`; `longtake rollback NAME` brings it back.

    With --by-reference a large pipeline stays where it is, which all that use it must see; its files are compared with the
    digests of now whenever it is loaded.

    With --base, FOLDER is an adapter, a safetensors file or a folder with one, as PEFT, diffusers, ComfyUI or musubi write
    it. The base's transformer with the adapter in its weights is registered, and is generated with and fine-tuned as any.

    \b
    Examples:
      longtake models import /models/Wan2.1-T2V-1.3B-Diffusers --name wan-1.3b      # vae: models:/wan-1.3b@champion
      longtake models import /models/Wan2.2-T2V-A14B-Diffusers --name wan-14b --by-reference
      longtake models import style.safetensors --base models:/wan-1.3b@champion --name wan-style
      longtake models import /models/umt5-xxl --name umt5      # then, in a recipe: encoder: models:/umt5@champion
      longtake models import /models/clip-l --as image_encoder --name clip      # image: models:/clip@champion
    """
    from pathlib import Path

    from longtake.infra import runs, sqlite_store
    from longtake.training import registry
    from longtake.training.config import model_name

    try:
        model_name(name)
    except ValueError as e:
        raise UserError(f"--name: {e}") from e
    if expert and not base:
        raise UserError("--expert: is for an adapter; name its --base, or leave it out")
    if base and (kind or by_reference):
        raise UserError(f"{'--as' if kind else '--by-reference'}: with --base, FOLDER is an adapter; leave it out")
    uri, place = _store(), None
    if path := sqlite_store.path_of(uri):
        # such a store may be new, and keeps its artifacts beside it, as that of a recipe does
        place = f"{path.parent.absolute()}/artifacts"
        path.parent.mkdir(parents=True, exist_ok=True)
        with sqlite_store.opened_alone(uri):
            runs.client_of(uri).search_registered_models(max_results=1)
    if base is None:
        click.echo(registry.register_foreign(Path(folder), name, kind, place, by_reference))
    else:
        from longtake.training.foreign import adapted

        click.echo(adapted.register(Path(folder), base, expert, name, place))


@models.command()
@click.argument("folder", type=click.Path(path_type=Path))
def tiny(folder: Path) -> None:
    """Write a tiny Wan with random weights to FOLDER, in the layout of diffusers, for a first run of wan_lora_tiny."""
    from longtake.training.foreign import tiny as tiny_wan

    tiny_wan.write(folder)
    click.echo(
        f"wrote a tiny Wan with random weights to {folder}; go on with: longtake footage runs/footage &&"
        f" VIDEOS=runs/footage/captions.jsonl WAN={folder} longtake run wan_lora_tiny"
    )


def _store() -> str:
    """The URI of the store. Raises UserError if none is named."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise UserError("MLFLOW_TRACKING_URI is not set; name the store, such as http://HOST:5000")
    return uri


def _check_store() -> None:
    """Raise UserError if no store is named, or a database that does not exist, which MLflow would create."""
    from longtake.infra.sqlite_store import path_of

    if (path := path_of(uri := _store())) and not path.is_file():
        raise UserError(f"MLFLOW_TRACKING_URI={uri}: no such database")


def _uri(model: str) -> str:
    return model if in_store(model) else f"models:/{model}"


def _default(client: Any, name: str) -> str:
    """The champion of a model, else its newest version."""
    from longtake.training.registry import store as model_store

    numbers = [str(v.version) for v in model_store.versions(client, name)]
    if not numbers:
        # resolving it raises an error that lists the models
        return f"models:/{name}/latest"
    aliases = client.get_registered_model(name).aliases
    return f"models:/{name}/{aliases.get('champion', numbers[0])}"


def _metrics(client: Any, run_id: str | None) -> dict[str, float]:
    """The last values of a run's metrics; {} if the run is gone."""
    from mlflow.exceptions import MlflowException

    if not run_id:
        return {}
    try:
        metrics = client.get_run(run_id).data.metrics
    except MlflowException as e:
        if e.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}
    # a mean of nothing is no figure, such as the loss at times of the flow that no sample had
    return {
        name: value
        for name, value in sorted(metrics.items())
        if not name.startswith("system/") and math.isfinite(value)
    }


def _summary(model: Any, versions: list[Any]) -> dict[str, Any]:
    return {
        "name": model.name,
        "versions": len(versions),
        "aliases": {alias: str(number) for alias, number in sorted(model.aliases.items())},
        "newest": _when(versions[0].creation_timestamp) if versions else None,
    }


def _aliases_of(aliases: dict[str, Any], version: Any) -> list[str]:
    return sorted(alias for alias, number in aliases.items() if str(number) == str(version.version))


def _when(milliseconds: int) -> str:
    import time

    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(milliseconds / 1000))


def _print_json(content: Any) -> None:
    import json

    click.echo(json.dumps(content, indent=2))


def _print_table(rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_facts(facts: dict[str, Any]) -> None:
    rows = [["VERSION", "ALIASES", "GATE", "CREATED"]]
    for v in facts["versions"]:
        rows.append([v["version"], ", ".join(v["aliases"]) or "-", v["gate"] or "-", v["created"]])
    _print_table(rows)
    click.echo(f"\n{facts['uri']}{' (' + ', '.join(facts['aliases']) + ')' if facts['aliases'] else ''}")
    for name in ("model", "bytes", "location", "sha256", "run", "problem"):
        if facts[name] is not None:
            click.echo(f"  {name}: {facts[name]}")
    if facts["parts"]:
        click.echo("  parts:")
        table = [
            ["   ", name, part["class_name"], f"{part['parameters']:,} parameters", f"{part['bytes']:,} bytes"]
            for name, part in facts["parts"].items()
        ]
        _print_table(table)
    inputs = {field: each.get("uri") for field, each in facts["inputs"].items() if isinstance(each, dict)}
    metrics = {name: f"{value:.6g}" for name, value in facts["metrics"].items()}
    parts = {"gate": facts["gate"], "metrics": metrics, "inputs": inputs, "parameters": facts["parameters"]}
    for title, values in parts.items():
        if values:
            click.echo(f"  {title}:")
            for name, value in values.items():
                click.echo(f"    {name}: {value}")
