"""What a workspace no longer needs: old checkpoints, latents of dead encoders, what killed processes left behind.

MLflow says what is still needed, so that nothing goes that a run would take up again: a checkpoint is judged by the run
that its meta.json names, an output by the runs that name it. Committed shards, sources and views are never touched, nor
what links lead to. What it gives up: a run that MLflow holds for running keeps what it may use, though it be long dead.
"""

import contextlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from longtake.datasets import latents as column
from longtake.datasets import schema, storage
from longtake.datasets.errors import Failure, UserError
from longtake.infra.graph import Node
from longtake.infra.recipe import Recipe
from longtake.infra.runs import Runs
from longtake.infra.upkeep import debris
from longtake.infra.upkeep.debris import (
    SPOOL,
    Found,
    Item,
    Kept,
    cached_models,
    files,
    is_link,
    locked,
    pages,
    remove_model,
    run_of,
    size,
)
from longtake.training.config import TrainConfig
from longtake.training.registry.uri import parse

KINDS = ("checkpoints", "latents", "debris", "cache")
OLDER_SECONDS = 3600.0

_COLUMN = re.compile(r"[^.]+\.(latent-[0-9a-f]+)\..+")
_STEP = re.compile(r"step-(\d+)")
_PAGE = 1000


class Past(NamedTuple):
    """A stage's run, as MLflow tells it."""

    id: str
    experiment: str
    status: str
    fingerprint: str
    kind: str
    output: str
    uri: str
    params: Mapping[str, str]


def find(
    recipe: Recipe, nodes: list[Node], store: Runs, kinds: Iterable[str] = KINDS[:3], older: float = OLDER_SECONDS
) -> Found:
    """What may go of these KINDS, and what stays though it looks old. Deletes nothing.

    Args:
        nodes: of the recipe as it is now: what these stages have made, or would take up again, stays.
        older: seconds for which debris must have lain still.
    """
    past = _past(store, f"tags.`longtake.output` LIKE '{recipe.workspace.partition(chr(39))[0]}/%'")
    past = [run for run in past if run.output.startswith(f"{recipe.workspace}/")]
    finders: dict[str, Callable[[], Found]] = {
        "checkpoints": lambda: _checkpoints(nodes, store, past),
        "latents": lambda: _latents(recipe, nodes, store, past),
        "debris": lambda: debris.find(recipe, store, [(run.id, run.output) for run in past], older),
        "cache": lambda: cached_models(older),
    }
    for kind in kinds:
        yield from finders[kind]()


def remove(item: Item, store: Runs) -> Kept | None:
    """Delete it; a kill in the middle leaves debris that the next `clean` finds. What is returned says why it stays.

    Raises:
        Failure: it cannot be deleted; UserError: a training has begun in its folder meanwhile.
    """
    if item.model and (kept := remove_model(item, store)):
        return kept
    for url in item.paths:
        with storage.failing_clearly(url):
            if not storage.is_local(url):
                fs, path = storage.filesystem(url)
                with contextlib.suppress(FileNotFoundError):
                    storage.retrying(url, partial(fs.rm, path, recursive=True))
            elif _STEP.fullmatch(Path(url).name):
                with locked(Path(url).parent) as free:
                    if not free:
                        raise UserError(f"{url}: a training has begun there; run `longtake clean` again")
                    _remove_local(Path(url))
            else:
                _remove_local(Path(url))
    return None


def _remove_local(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
            return
        # a folder goes by its name first, so that nobody takes half of it for the whole
        doomed = path.with_name(f".{path.name}~{socket.gethostname()}@{os.getpid()}~{secrets.token_hex(4)}.tmp")
        if SPOOL.fullmatch(path.name) is None:
            path.rename(doomed)
            path = doomed
        shutil.rmtree(path)


# What MLflow knows.


def _past(store: Runs, condition: str) -> list[Past]:
    """Stages' runs of all experiments of the store."""
    client = store.client
    experiments = [e.experiment_id for e in pages(lambda t: client.search_experiments(page_token=t))]
    found = pages(lambda t: client.search_runs(experiments, condition, max_results=_PAGE, page_token=t))
    return [_as_past(run) for run in found if "longtake.output" in run.data.tags]


def _as_past(run: Any) -> Past:
    tags = run.data.tags
    names = ("longtake.fingerprint", "longtake.kind", "longtake.output", "longtake.uri")
    fingerprint, kind, output, uri = (tags.get(name, "") for name in names)
    return Past(
        run.info.run_id, run.info.experiment_id, run.info.status, fingerprint, kind, output, uri, run.data.params
    )


def _is_running(run: Past) -> bool:
    return run.status in ("RUNNING", "SCHEDULED")


# Checkpoints.


def _checkpoints(nodes: list[Node], store: Runs, past: list[Past]) -> Found:
    ours = [run for run in past if run.experiment == store.experiment]
    by_id = {run.id: run for run in ours}
    current = {node.fingerprint for node in nodes}
    # a folder that the recipe names may serve several runs, one after the other
    trained = [node.config.run for node in nodes if isinstance(node.config, TrainConfig)]
    named = {Path(run.checkpoints) for run in trained if run.checkpoints}
    default = {Path(run.output) / "checkpoints" for run in ours if storage.is_local(run.output)}
    for folder in sorted(named | default):
        if not folder.is_dir() or is_link(folder):
            continue
        steps = sorted(p for p in folder.iterdir() if _STEP.fullmatch(p.name) and p.is_dir() and not p.is_symlink())
        with locked(folder) as free:
            if not free:
                yield Kept(str(folder), "a training is at work there")
                continue
            last = _last(folder, steps)
            reasons = {}
            for path in steps:
                run = by_id.get(run_of(path))
                if run is None:
                    yield Kept(str(path), "no run of this recipe's experiment wrote it")
                elif _is_running(run):
                    yield Kept(
                        str(path), f"run {run.id} is {run.status} in MLflow; if it is dead, run it again or end it"
                    )
                else:
                    reasons[path] = _why_checkpoint(path, last, run, ours, current, folder in named, store)
            going = [path for path, reason in reasons.items() if reason]
            for path in going:
                # who has no checkpoint must not be told of one
                first = (str(folder / "latest"),) if path.name == last else ()
                yield Item("checkpoint", str(path), size(str(path)), str(reasons[path]), (*first, str(path)))


def _why_checkpoint(
    path: Path, last: str, run: Past, ours: list[Past], current: set[str], named: bool, store: Runs
) -> str | None:
    """Why a checkpoint may go; None where it stays."""
    every = run.params.get("run.keep_every", run.params.get("keep_every", "None"))
    if run.status == "FINISHED" and path.name != last:
        number = int(path.name.removeprefix("step-"))
        # the recipe asks to keep these for good
        return None if every.isdigit() and number % int(every) == 0 else f"its stage has finished, {last} is the last"
    if named:
        return None
    if run.status == "FINISHED":
        if run.fingerprint in current or any(_is_running(r) for r in ours if r.fingerprint == run.fingerprint):
            return None
        gone = "the recipe has no stage with these settings any more"
        return f"{gone}, {run.uri} is registered" if _version(store, run.uri) else None
    done = [r for r in ours if r.fingerprint == run.fingerprint and r.status == "FINISHED" and r.output != run.output]
    # a finished run is what `run` takes, never again this one
    return f"its run ended as {run.status}, and run {done[0].id} has finished the same" if done else None


def _last(folder: Path, steps: list[Path]) -> str:
    """The name of the checkpoint that a training would go on from."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        named = (folder / "latest").read_text().strip()
        if folder / named in steps:
            return named
    return steps[-1].name if steps else ""


def _version(store: Runs, uri: str) -> Any:
    """The registered version that a `models:/NAME/VERSION` URI names; None where there is none."""
    from mlflow.exceptions import MlflowException

    name, number, _ = parse(uri)
    if not number:
        return None
    try:
        return store.client.get_model_version(name, number)
    except MlflowException as e:
        if e.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise Failure(f"{uri}: {str(e).splitlines()[0]}") from e
        return None


# Latents.


def _latents(recipe: Recipe, nodes: list[Node], store: Runs, past: list[Past]) -> Found:
    described: dict[tuple[str, str], list[tuple[Past, column.Latents]]] = {}
    for run in _past(store, "tags.`longtake.kind` = 'cache_latents'"):
        with contextlib.suppress(UserError, Failure):
            made = column.read_latents(run.uri or run.output)
            described.setdefault((made.dataset, made.column), []).append((run, made))
    live, encoders = _live_latents(nodes, store)
    reading = [
        run
        for run in _past(store, "attributes.status = 'RUNNING'")
        if run in past or any(value.startswith(recipe.workspace) for value in run.params.values())
    ]
    for dataset in sorted({run.output for run in past if run.kind == "shard"}):
        if storage.is_local(dataset) and is_link(Path(dataset)):
            continue
        for name, sizes in sorted(_columns(dataset).items()):
            told = described.get((dataset, name), [])
            where = f"{dataset}: {name}"
            others = [run for run, _ in told if run.experiment != store.experiment]
            if any(run.id in live for run, _ in told):
                continue
            if not told:
                yield Kept(where, "no stage has finished it, or one of another tracking store has")
            elif others:
                yield Kept(where, f"run {others[0].id} of another experiment made it too")
            elif why := _encoder_lives(store, told[0][1].encoder["uri"], encoders):
                yield Kept(where, why)
            elif reading:
                yield Kept(
                    where, f"run {reading[0].id} is RUNNING in MLflow and may read it; if it is dead, end it there"
                )
            else:
                reason = f"its encoder {told[0][1].encoder['uri']} has no alias and no stage names it"
                yield Item("latents", where, sum(sizes.values()), reason, tuple(sizes))


def _live_latents(nodes: list[Node], store: Runs) -> tuple[set[str], set[str]]:
    """Runs whose latents the recipe uses now, and the encoders that its stages name."""
    live, encoders = set(), set()
    made = {node.name: store.find(node.fingerprint) for node in nodes}
    for node in nodes:
        if node.kind == "cache_latents":
            value = node.inputs["encoder"]
            source = made.get(value)
            encoders.add(source.uri if source else value)
            if run := made[node.name]:
                live.add(run.id)
    return live, encoders


def _encoder_lives(store: Runs, uri: str, encoders: set[str]) -> str | None:
    if uri in encoders:
        return f"a stage of the recipe names its encoder {uri}"
    version = _version(store, uri)
    aliases = list(version.aliases) if version else []
    return f"its encoder {uri} is {' and '.join(sorted(aliases))}" if aliases else None


def _columns(dataset: str) -> dict[str, dict[str, int]]:
    """Of each column of latents its files and their bytes: indexes before tars, so that no half of it looks whole."""
    found: dict[str, dict[str, int]] = {}
    for part in ("compact", *schema.SPLITS):
        for url, count in sorted(files(storage.join(dataset, part)), key=lambda f: f[0].endswith(".tar")):
            if match := _COLUMN.fullmatch(url.rpartition("/")[2]):
                found.setdefault(match[1], {})[url] = count
    return found
