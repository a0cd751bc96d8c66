"""Checkpoints that no training goes on from any more, in outputs, in folders that the recipe names, and their copies."""

import contextlib
import json
import re
from pathlib import Path

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.infra.graph import Node
from longtake.infra.runs import Runs
from longtake.infra.upkeep.debris import Finds, Item, Kept, is_link, locked, run_of, size
from longtake.infra.upkeep.past import PastRun, version_of
from longtake.training.checkpoint import copies_of, place_of
from longtake.training.checkpoint.upload import maker
from longtake.training.config import TrainConfig

STEP = re.compile(r"step-(\d+)")
_PART = re.compile(r"[0-9a-f]{12}(-[0-9a-f]{8})?")  # the name of an output, and of its part of a named place
_FORMER = re.compile(r"[0-9a-f]{8}")  # of a run from nothing, by earlier versions


def find(nodes: list[Node], store: Runs, past: list[PastRun]) -> Finds:
    """Checkpoints of runs of the recipe's experiment that may be deleted, and those that look unused but stay.

    Args:
        past: all runs of the workspace.
    """
    ours = [run for run in past if run.experiment == store.experiment]
    current = {node.fingerprint for node in nodes}
    trainings = [node for node in nodes if isinstance(node.config, TrainConfig)]
    outputs = {node.name: store.output_of(node) for node in trainings}
    wanted = {folder for node in trainings if (folder := _folder(node, outputs[node.name]))}
    copies = {copies_of(node.config.run, outputs[node.name]) for node in trainings}  # type: ignore[attr-defined]
    named, parts = _named(nodes), set(parts_of(nodes))
    # several runs may have used one, one after the other
    former = named | {path for path in parts if _FORMER.fullmatch(path.name)}
    default = {Path(run.output) / "checkpoints" for run in ours if storage.is_local(run.output)}
    kept = former | wanted
    for folder in sorted(former | default | parts):
        if folder.is_dir() and not is_link(folder):
            yield from _in_folder(folder, ours, current, folder in kept, store)
    for url in sorted({node.config.run.upload for node in trainings if node.config.run.upload}):  # type: ignore[attr-defined]
        yield from _copies(url, ours, current, copies, store)


def parts_of(nodes: list[Node]) -> list[Path]:
    """The folders of trainings in those that the recipe names."""
    paths = [path for folder in sorted(_named(nodes)) if folder.is_dir() for path in sorted(folder.iterdir())]
    return [path for path in paths if _PART.fullmatch(path.name) or _FORMER.fullmatch(path.name)]


def _named(nodes: list[Node]) -> set[Path]:
    runs = [node.config.run for node in nodes if isinstance(node.config, TrainConfig)]
    return {Path(run.checkpoints) for run in runs if run.checkpoints}


def _folder(node: Node, output: str) -> Path | None:
    """Where a training would go on; None where it cannot run."""
    with contextlib.suppress(UserError):
        return place_of(node.config.run, output).folder  # type: ignore[attr-defined]
    return None


def _in_folder(folder: Path, ours: list[PastRun], current: set[str], kept: bool, store: Runs) -> Finds:
    """Those of a folder, of which the last is `kept` for whoever goes on from it."""
    by_id = {run.id: run for run in ours}
    steps = sorted(p for p in folder.iterdir() if STEP.fullmatch(p.name) and p.is_dir() and not p.is_symlink())
    with locked(folder) as free:
        if not free:
            yield Kept(str(folder), "a training is at work there")
            return
        last = _last(folder, steps)
        reasons = {}
        for path in steps:
            run = by_id.get(run_of(path))
            if run is None:
                yield Kept(str(path), "no run of this recipe's experiment wrote it")
            elif run.running:
                yield Kept(str(path), _running(run))
            else:
                reasons[path] = _why_unneeded(path.name, last, run, ours, current, kept, store)
        for path, unneeded in reasons.items():
            if unneeded:
                # `latest` must never name a checkpoint that is gone
                first = (str(folder / "latest"),) if path.name == last else ()
                yield Item("checkpoint", str(path), size(str(path)), unneeded, (*first, str(path)))


def _copies(url: str, ours: list[PastRun], current: set[str], wanted: set[str | None], store: Runs) -> Finds:
    """The copies of trainings that nobody goes on from."""
    by_id = {run.id: run for run in ours}
    try:
        parts = [storage.join(url, name) for name in storage.names(url) if _PART.fullmatch(name)]
    except (Failure, OSError) as e:
        yield Kept(url, f"could not be read ({' '.join(str(e).split())})")
        return
    for part in parts:
        if part in wanted:
            continue
        try:
            run = by_id.get(_maker(part) or "")
        except (Failure, OSError, ValueError) as e:
            yield Kept(part, f"could not be read ({' '.join(str(e).split())})")
            continue
        if run is None:
            yield Kept(part, "no run of this recipe's experiment wrote the copies there")
        elif run.running:
            yield Kept(part, _running(run))
        elif unneeded := _why_unneeded("", "", run, ours, current, False, store):
            yield Item("copies", part, size(part), unneeded, (storage.join(part, "latest"), part))


def _maker(part: str) -> str | None:
    """The run of MLflow that made copies, also where `latest` is gone already; None where nothing says so."""
    if run := maker(part):
        return run
    steps = [name for name in storage.names(part) if STEP.fullmatch(name)]
    metas = [storage.join(part, name, "meta.json") for name in reversed(steps)]
    found = next((url for url in metas if storage.exists(url)), None)
    return str(json.loads(storage.read(found)).get("run")) if found else None


def _running(run: PastRun) -> str:
    return f"run {run.id} is {run.status} in MLflow; if it is dead, run it again or end it"


def _why_unneeded(
    name: str, last: str, run: PastRun, ours: list[PastRun], current: set[str], kept: bool, store: Runs
) -> str | None:
    """The reason why a checkpoint may be deleted; None if it stays."""
    every = run.params.get("run.keep_every", run.params.get("keep_every", "None"))
    if run.status == "FINISHED" and name != last:
        number = int(name.removeprefix("step-"))
        # the recipe keeps every n-th for good
        return None if every.isdigit() and number % int(every) == 0 else f"its stage has finished, {last} is the last"
    if kept:
        return None
    if run.status == "FINISHED":
        same = [r for r in ours if r.fingerprint == run.fingerprint or r.output == run.output]
        # with other steps another run goes on from it
        if run.fingerprint in current or any(
            r.running or (r.output == run.output and r.status != "FINISHED") for r in same
        ):
            return None
        gone = "the recipe has no stage with these settings any more"
        return f"{gone}, {run.uri} is registered" if version_of(store, run.uri) else None
    alike = [r for r in ours if r.fingerprint == run.fingerprint and r.status == "FINISHED" and r.output != run.output]
    # `longtake run` reuses the finished run and never resumes this one
    return f"its run ended as {run.status}, and run {alike[0].id} has finished the same" if alike else None


def _last(folder: Path, steps: list[Path]) -> str:
    """The name of the checkpoint that a training would resume from; empty if there is none."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        name = (folder / "latest").read_text().strip()
        if folder / name in steps:
            return name
    return steps[-1].name if steps else ""
