"""Fine-tuned models as other tools read them: a whole pipeline folder of diffusers, or the adapter of a training.

A model is named by a URI of the registry or a model folder. Its part of the pipeline has the fine-tuned weights, by the
names of diffusers; all other parts are the base's. Weights go from file to file, one file's worth in memory at a time.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.training.foreign import adapters, candidate
from longtake.training.foreign.files import read_json
from longtake.training.foreign.folder import CONFIG, INDEX, TRANSFORMER, TRANSFORMER_2, VAE, part_of, parts_of
from longtake.training.foreign.load import check
from longtake.training.models import kind_of
from longtake.training.registry import cache, disk, fetch, pipelines
from longtake.training.registry.foreign import FOREIGN
from longtake.training.registry.uri import in_store

ADAPTER = "adapter"  # folder of a training's adapter among the artifacts of its run
_STEM = "diffusion_pytorch_model"  # of weights, by diffusers
_MOST_ADAPTER = 64 << 30  # bytes
# model in config.json -> weights of ours that diffusers' class has not
_OWN = {"backbone": {"empty", "empty_pooled"}, "foreign_vae": set[str]()}


class Model(NamedTuple):
    """A fine-tuned part of a pipeline on this machine: as it was named, its folder, and what its config.json says."""

    uri: str
    folder: Path
    facts: Mapping[str, Any]

    @property
    def part(self) -> str:
        """Its name in a pipeline."""
        if self.facts["model"] == "foreign_vae":
            return VAE
        return TRANSFORMER_2 if self.facts["config"].get("expert") == "low" else TRANSFORMER

    @property
    def files(self) -> list[Path]:
        """Its weights."""
        return disk.weight_files(self.folder, set(self.facts["sha256"]))


def found(uri: str) -> Model:
    """The model that a URI or a path names, its files compared with their digests.

    Raises:
        UserError: there is none, or it is no part of a pipeline of another library.
        Failure: as `cache.pull`; it is damaged.
    """
    folder = cache.pull(uri) if in_store(uri) else pipelines.local(uri)
    facts = disk.read_config(folder)
    if facts["model"] not in _OWN:
        row = FOREIGN.get(facts["model"])
        what = row.one if row else f"a {kind_of(facts).what}"
        raise UserError(
            f"{uri}: is {what}, whose folder is as it is; copy it by: longtake models pull {uri} --to FOLDER"
        )
    if not in_store(uri):
        disk.check_files(folder, facts)
    return Model(uri, folder, facts)


class Plan(NamedTuple):
    """A pipeline to write: its fine-tuned part, the base's folder, and the base's files of all other parts by name."""

    model: Model
    base: Path
    others: Mapping[str, Path]

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().st_size for path in [*self.others.values(), *self.model.files])


def planned(model: Model, base: str | None) -> Plan:
    """What is to be written.

    Args:
        base: path or URI of the pipeline with the other parts; None: what the model was trained from.

    Raises:
        UserError: no such base, or one without this part or with another class there.
        Failure: a file of a registered base is not what was registered.
    """
    named = base or _base_of(model)
    folder = pipelines.found(named).folder
    if not (folder / INDEX).is_file() and (folder.parent / INDEX).is_file() and base is None:
        folder = folder.parent  # a training may name a part of it
    if not (folder / INDEX).is_file():
        raise UserError(
            f"{named}: is one part alone, and the others are missing; name the whole pipeline by --base FOLDER"
        )
    if model.part not in parts_of(folder):
        raise UserError(
            f"{folder}: has no {model.part}, which {model.uri} is; name the pipeline it was trained from by --base"
        )
    like, class_name = part_of(folder, model.part), model.facts["config"]["class_name"]
    if like.class_name != class_name:
        raise UserError(
            f"{folder}: its {model.part} is a {like.class_name}, and {model.uri} a {class_name}; name its own base by --base"
        )
    _, files = candidate.checked(folder)
    # who passes a model on passes its licence on
    files |= {path.name: path for path in sorted(folder.glob("LICENSE*")) if path.is_file()}
    return Plan(model, folder, {name: path for name, path in files.items() if not name.startswith(f"{model.part}/")})


def write_pipeline(
    plan: Plan,
    to: Path,
    link: bool = False,
    progress: Callable[[int], Any] = lambda size: None,
    max_bytes: int = 5 << 30,
) -> None:
    """Write the whole pipeline, whole or not at all, such that `from_pretrained` of diffusers loads it.

    Args:
        link: the other parts' weights become hard links to the base's files, in place of copies.
        progress: called with numbers of bytes that were written.
        max_bytes: size of a weights file.

    Raises:
        UserError: there is something at `to`; a file cannot be linked.
        Failure: a file is damaged; the disk is full.
    """
    check_free(to)
    if to.absolute().is_relative_to(plan.base.absolute()):
        raise UserError(f"--to: {to}: is inside of the pipeline {plan.base}; name another folder")
    model, settings = plan.model, plan.model.facts["config"]["settings"]
    notes = read_json(part_of(plan.base, model.part).files[CONFIG])
    config = {key: value for key, value in notes.items() if key.startswith("_")} | settings
    with _staged(to) as folder:
        part = folder / model.part
        part.mkdir()
        (part / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        disk.write_weights(part, _weights(model, progress), max_bytes, _STEM)
        for name, path in plan.others.items():
            target = folder / name
            target.parent.mkdir(exist_ok=True)
            if link and path.suffix == ".safetensors":
                _link(path, target)
            else:
                shutil.copyfile(path, target)
            progress(path.stat().st_size)
        check(part_of(folder, model.part))


def write_adapter(model: Model, layout: adapters.Layout, to: Path) -> None:
    """Write the adapter that a training with `lora` has left beside its model, whole or not at all, in another layout.

    Raises:
        UserError: there is something at `to`; the model is no registered one, or was trained without `lora`.
        Failure: the store cannot be reached; the adapter is damaged.
    """
    check_free(to)
    if not in_store(model.uri):
        raise UserError(
            f"{model.uri}: its adapter is with the run that made it, and not in the folder; name it as models:/NAME@ALIAS"
        )
    config = model.facts["config"]
    with TemporaryDirectory() as scratch:
        for name in adapters.PEFT_FILES:
            try:
                fetch.beside(model.uri, f"{ADAPTER}/{name}", Path(scratch) / name, _MOST_ADAPTER)
            except UserError as e:
                raise UserError(
                    f"{model.uri}: its run has left no adapter, as one with `lora` and nothing in full does;"
                    " take --format diffusers"
                ) from e
        adapter = adapters.read(Path(scratch), config["class_name"])
    with _staged(to) as folder:
        adapters.write(folder, adapter.tensors, adapter.lora, config["class_name"], layout, config["settings"])


def check_free(to: Path) -> None:
    """Raise UserError if there is something at `to`."""
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise UserError(f"--to: {to}: is there already; name another folder")


def _base_of(model: Model) -> str:
    """The pipeline that a model was trained from, over any number of trainings."""
    facts, seen = model.facts, set[str]()
    while True:
        inputs = facts.get("lineage", {}).get("inputs", {})
        named = facts.get("base") or inputs.get("base") or inputs.get("parent")
        uri = named.get("uri") if isinstance(named, Mapping) else None
        if not isinstance(uri, str) or uri in seen:
            raise UserError(f"{model.uri}: does not say which pipeline it was trained from; name it by --base FOLDER")
        seen.add(uri)
        folder = cache.pull(uri, frozenset()) if in_store(uri) else pipelines.local(uri)
        content = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        if content.get("model") not in _OWN:
            return uri
        facts = content


def _weights(model: Model, progress: Callable[[int], Any]) -> Iterator[tuple[str, Tensor]]:
    """The weights by diffusers' names, one after the other."""
    for path in model.files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (it is no mapping)
                    if name in _OWN[model.facts["model"]]:
                        continue
                    if not name.startswith("net."):
                        raise UserError(
                            f"{model.uri}: has learned {name}, which diffusers' class has not: it cannot leave this project"
                        )
                    tensor = file.get_tensor(name)
                    yield name.removeprefix("net."), tensor
                    progress(tensor.nbytes)
        except SafetensorError as e:
            raise Failure(f"{path}: damaged ({' '.join(str(e).split())[:120]}); fetch the model again") from e


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path.resolve(), target)
    except OSError as e:
        raise UserError(f"--link: {path}: cannot be linked from there ({e.strerror}); leave --link out") from e


@contextlib.contextmanager
def _staged(to: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `to` when the block succeeds, and is deleted when it fails."""
    parent = to.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        storage.sweep(str(parent))
        with storage.spool_folder(str(parent)) as spool:
            folder = spool / "folder"
            folder.mkdir()
            yield folder
            for path in [*folder.rglob("*"), folder]:
                storage.sync(path)
            folder.rename(to)
            storage.sync(parent)
    except OSError as e:
        raise Failure(f"--to: {to}: {e.strerror or e}; free some space or name another folder") from e
