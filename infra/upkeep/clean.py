"""Find and delete what a workspace no longer needs: old checkpoints, columns of unused encoders, captions, debris.

MLflow decides what is needed, so that everything stays that a run would resume or reuse. A checkpoint is judged by the run
that its meta.json names, an output by the runs that name it. Committed shards, sources, views and the targets of links are
never touched. Given up: a dead run that is still RUNNING in MLflow keeps all that it might use.
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
from typing import Any

from longtake.datasets import captions, clusters, schema, scores, storage, text, tokens
from longtake.datasets import latents as column
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.stage import RUN, inputs_of, names
from longtake.infra.graph import Node
from longtake.infra.recipe import Recipe
from longtake.infra.runs import Runs, params_of
from longtake.infra.upkeep import checkpoints, debris
from longtake.infra.upkeep.debris import SPOOL, Finds, Item, Kept, is_link, locked
from longtake.infra.upkeep.past import PastRun, past_runs, version_of

KINDS = ("checkpoints", "latents", "tokens", "text", "scores", "debris", "cache", "captions")
USUAL = KINDS[:6]
OLDER_SECONDS = 3600.0

_LATENTS = re.compile(r"[^.]+\.(latent-[0-9a-f]+)\..+")
_TOKENS = re.compile(r"[^.]+\.(tokens-[0-9a-f]+)\..+")
_TEXTS = re.compile(r"[^.]+\.(text-[0-9a-f]+)\..+")
_CAPTIONS = re.compile(r"[^.]+\.(caption-[0-9a-f]+)\..+")
_SCORES = re.compile(r"[^.]+\.(score-[a-z0-9_]+-[0-9a-f]+)\..+")


def find(
    recipe: Recipe, nodes: list[Node], store: Runs, kinds: Iterable[str] = USUAL, older: float = OLDER_SECONDS
) -> Finds:
    """Items of these KINDS that may be deleted, and those that look unused but stay. Deletes nothing.

    Args:
        nodes: the recipe's graph as it is now. What these stages have made, or would resume, stays.
        older: seconds since the last change of debris, at least.
    """
    past = past_runs(store, f"tags.`longtake.output` LIKE '{recipe.workspace.partition(chr(39))[0]}%'")
    past = [run for run in past if run.output.startswith(f"{recipe.workspace}/")]
    finders: dict[str, Callable[[], Finds]] = {
        "checkpoints": lambda: checkpoints.find(nodes, store, past),
        "latents": lambda: _latents(recipe, nodes, store, past),
        "tokens": lambda: _tokens(recipe, nodes, store, past),
        "text": lambda: _texts(recipe, nodes, store, past),
        "scores": lambda: _scores(recipe, nodes, store, past),
        "debris": lambda: debris.find(
            recipe, store, [(run.id, run.output) for run in past], older, checkpoints.parts_of(nodes)
        ),
        "cache": lambda: debris.cached_models(older),
        "captions": lambda: _captions(recipe, nodes, store, past),
    }
    for kind in kinds:
        yield from finders[kind]()


def remove(item: Item, store: Runs) -> Kept | None:
    """Delete an item; returns the reason if it must stay. A kill leaves debris that the next `clean` finds.

    Raises:
        Failure: it cannot be deleted.
        UserError: a training has started in its folder since it was found.
    """
    if item.model and (kept := debris.remove_model(item, store)):
        return kept
    for url in item.paths:
        with storage.failing_clearly(url):
            if not storage.is_local(url):
                fs, path = storage.filesystem(url)
                with contextlib.suppress(FileNotFoundError):
                    storage.retrying(url, partial(fs.rm, path, recursive=True))
            elif checkpoints.STEP.fullmatch(Path(url).name):
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
        # renamed first, so that nobody takes a half deleted folder for a whole one
        if SPOOL.fullmatch(path.name) is None:
            path = path.rename(
                path.with_name(f".{path.name}~{socket.gethostname()}@{os.getpid()}~{secrets.token_hex(4)}.tmp")
            )
        shutil.rmtree(path)


# Columns.


def _latents(recipe: Recipe, nodes: list[Node], store: Runs, past: list[PastRun]) -> Finds:
    live, encoders = _live(nodes, store, past, "cache_latents", "encoder")
    why = partial(_why_encoded, store, encoders, lambda record: record.encoder["uri"])
    makers = _makers(store, "cache_latents", column.read_latents)
    yield from _unused(recipe, nodes, store, past, "latents", _LATENTS, makers, live, why)


def _tokens(recipe: Recipe, nodes: list[Node], store: Runs, past: list[PastRun]) -> Finds:
    live, encoders = _live(nodes, store, past, "cache_tokens", "encoder")
    why = partial(_why_encoded, store, encoders, lambda record: record.model["uri"])
    makers = _makers(store, "cache_tokens", tokens.read_tokens)
    yield from _unused(recipe, nodes, store, past, "tokens", _TOKENS, makers, live, why)


def _why_encoded(store: Runs, encoders: set[str], uri_of: Callable[[Any], str], record: Any) -> Kept | str:
    """The reason to delete what an encoder has made, or the one to keep it."""
    uri = uri_of(record)
    use = _use_of_encoder(store, uri, encoders)
    return Kept("", use) if use else f"its encoder {uri} has no alias and no stage names it"


def _texts(recipe: Recipe, nodes: list[Node], store: Runs, past: list[PastRun]) -> Finds:
    live, _ = _live(nodes, store, past, "cache_text", "")

    def why(record: text.Text) -> Kept | str:
        return f"no stage of the recipe makes texts of {record.captions} by its encoder {record.encoder['encoder']}"

    makers = _makers(store, "cache_text", text.read_text)
    yield from _unused(recipe, nodes, store, past, "text", _TEXTS, makers, live, why)


def _captions(recipe: Recipe, nodes: list[Node], store: Runs, past: list[PastRun]) -> Finds:
    live, _ = _live(nodes, store, past, "caption", "")
    models = {
        name for node in nodes if node.kind == "caption" and (name := getattr(node.config, "model", None)) is not None
    }
    named = models | {Path(name).name for name in models}

    def why(record: captions.Captions) -> Kept | str:
        model = record.captioner.get("model")
        if model in named:
            return Kept("", f"a stage of the recipe names its captioner {model}")
        return f"no stage of the recipe uses it{f', its captioner is {model}' if model else ''}"

    makers = _makers(store, "caption", captions.read_captions)
    yield from _unused(recipe, nodes, store, past, "captions", _CAPTIONS, makers, live, why)


def _scores(recipe: Recipe, nodes: list[Node], store: Runs, past: list[PastRun]) -> Finds:
    """Columns of scores, and clusters, which have one."""
    live = _live(nodes, store, past, "score", "")[0] | _live(nodes, store, past, "cluster", "")[0]
    makers = _makers(store, "score", scores.read_scores, lambda record: record.names.values())
    makers |= _makers(store, "cluster", clusters.read_clusters, clusters.names)

    def why(record: scores.Scores | clusters.Clusters) -> Kept | str:
        if isinstance(record, clusters.Clusters):
            return f"no stage of the recipe makes clusters of {record.embedding['column']} with these settings"
        return f"no stage of the recipe scores {', '.join(record.names)} with these settings"

    yield from _unused(recipe, nodes, store, past, "scores", _SCORES, makers, live, why)


def _makers(
    store: Runs,
    kind: str,
    read: Callable[[str], Any],
    columns: Callable[[Any], Iterable[str]] = lambda record: [record.column],
) -> dict[tuple[str, str], list[tuple[PastRun, Any]]]:
    """The runs that made each column, by dataset and name, with their records.

    Args:
        columns: `columns(record)` are the names of those that a run has made.
    """
    makers: dict[tuple[str, str], list[tuple[PastRun, Any]]] = {}
    for run in past_runs(store, f"tags.`longtake.kind` = '{kind}'"):
        with contextlib.suppress(UserError, Failure):
            record = read(run.uri or run.output)
            for name in columns(record):
                makers.setdefault((record.dataset, name), []).append((run, record))
    return makers


def _unused(
    recipe: Recipe,
    nodes: list[Node],
    store: Runs,
    past: list[PastRun],
    kind: str,
    pattern: re.Pattern[str],
    makers: Mapping[tuple[str, str], list[tuple[PastRun, Any]]],
    live: set[str],
    why: Callable[[Any], Kept | str],
) -> Finds:
    """The columns of a kind that no run uses.

    Args:
        pattern: of the names of their files; its group is the column's name.
        live: runs whose columns the recipe uses now.
        why: `why(record)` is the reason to delete a column, or the one to keep it.
    """
    # a stage may name what the recipe does not make
    named = (value for node in nodes for value, _ in inputs_of(node.config).values() if value not in node.upstream)
    inputs = set(map(storage.absolute, named))
    # who may be reading
    readers = [
        run
        for run in past_runs(store, "attributes.status = 'RUNNING'")
        if run in past or any(value.startswith(recipe.workspace) for value in run.params.values())
    ]
    for dataset in sorted({run.output for run in past if run.kind == "shard"}):
        if storage.is_local(dataset) and is_link(Path(dataset)):
            continue
        for name, sizes in sorted(_columns(dataset, pattern).items()):
            runs = makers.get((dataset, name), [])
            where = f"{dataset}: {name}"
            others = [run for run, _ in runs if run.experiment != store.experiment]
            if any(run.id in live or storage.absolute(run.uri or run.output) in inputs for run, _ in runs):
                continue
            if not runs:
                yield Kept(where, "no stage has finished it, or one of another tracking store has")
            elif others:
                yield Kept(where, f"run {others[0].id} of another experiment made it too")
            elif isinstance(reason := why(runs[0][1]), Kept):
                yield reason._replace(where=where)
            elif readers:
                reason = f"run {readers[0].id} is RUNNING in MLflow and may read it; if it is dead, end it there"
                yield Kept(where, reason)
            else:
                yield Item(kind, where, sum(sizes.values()), reason, tuple(sizes))


def _live(nodes: list[Node], store: Runs, past: list[PastRun], kind: str, field: str) -> tuple[set[str], set[str]]:
    """Ids of the runs whose columns the recipe's stages of a kind use or would reuse, and the models that they name."""
    live, models = set(), set()
    runs = {node.name: store.find(node.fingerprint) for node in nodes}
    for node in nodes:
        if node.kind == kind:
            if value := node.inputs.get(field):
                maker = runs.get(value)
                models.add(maker.uri if maker else value)
            if run := runs[node.name]:
                live.add(run.id)
            # until it has finished, as after new sources, it may reuse what its settings have made; of another model it does not
            if value not in node.upstream and not (run and run.status == "FINISHED"):
                live |= {each.id for each in past if each.kind == kind and _asks_alike(node, each)}
    return live, models


def _asks_alike(node: Node, run: PastRun) -> bool:
    """Whether a stage and a run have the same settings, but for those that one of them lacks, such as a scorer."""
    settings = params_of(node.config.model_dump(mode="json", exclude={RUN, *names(node.config)}))
    return all(run.params.get(key, value) == value for key, value in settings.items())


def _use_of_encoder(store: Runs, uri: str, encoders: set[str]) -> str | None:
    """The use that an encoder still has; None if it has none."""
    if uri in encoders:
        return f"a stage of the recipe names its encoder {uri}"
    version = version_of(store, uri)
    aliases = list(version.aliases) if version else []
    return f"its encoder {uri} is {' and '.join(sorted(aliases))}" if aliases else None


def _columns(dataset: str, pattern: re.Pattern[str]) -> dict[str, dict[str, int]]:
    """The bytes of the files of each column. Indexes go before tars, so that no half of it looks whole."""
    columns: dict[str, dict[str, int]] = {}
    for part in ("compact", "answers", *schema.SPLITS):
        for url, count in sorted(debris.files(storage.join(dataset, part)), key=lambda f: f[0].endswith(".tar")):
            if match := pattern.fullmatch(url.rpartition("/")[2]):
                columns.setdefault(match[1], {})[url] = count
    if pattern is _SCORES:
        folder = storage.join(dataset, clusters.FOLDER)
        for url, count in sorted(debris.files(folder)):
            if name := clusters.name_of(url.rpartition(f"/{clusters.FOLDER}/")[2]):
                columns.setdefault(name, {})[url] = count
    return columns
