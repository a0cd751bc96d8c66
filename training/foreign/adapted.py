"""Adapters of other tools in the registry: each as its base's transformer with the adapter in the weights."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from longtake.datasets import storage
from longtake.datasets.errors import UserError
from longtake.datasets.latents import encoder_digest
from longtake.training import registry
from longtake.training.foreign import adapters
from longtake.training.foreign.backbone import Backbone
from longtake.training.foreign.columns import pipeline_uri
from longtake.training.foreign.export import ADAPTER
from longtake.training.foreign.folder import VAE, parts_of
from longtake.training.models import kind_of
from longtake.training.registry import disk, lineage, log, promotion
from longtake.training.registry.uri import in_store

_OF_BASE = ("format", "model", "config", "sha256", "longtake", "lineage", "foreign", "adapter")  # in its config.json


def register(path: Path, base: str, expert: Literal["high", "low"] | None, name: str, place: str | None) -> str:
    """Merge an adapter into its base and register that as the champion; returns "models:/NAME/VERSION".

    The adapter itself is an artifact of the run, as that of a training.

    Args:
        path: as of `adapters.read`.
        base: path or URI of a pipeline, or of a backbone that was fine-tuned here.
        expert: of two transformers the one that the adapter is of.
        place: URL where the store keeps artifacts, if it has no place of its own.

    Raises:
        UserError: no such base, or no adapter of it; the name is that of other models.
        Failure: the adapter is damaged; the store cannot be reached.
    """
    base = base if in_store(base) else storage.absolute(base)
    module, facts = registry.load_with_facts(base, "transformer", expert)
    if not isinstance(module, Backbone):
        raise UserError(
            f"--base: {base} is no video transformer of another library; name a pipeline, or one fine-tuned from it"
        )
    adapter = adapters.read(path, module.config.class_name)
    if adapter.low and module.config.expert != "low":
        raise UserError(f"{path}: is of the transformer for low noise; name a base that has two, with --expert low")
    if not any(tensor.any() for name, tensor in adapter.tensors.items() if "lora_up" in name):
        raise UserError(
            f"{path}: changes nothing, since its upper matrices are zero; take a later step of its training"
        )
    adapters.load_into(module, adapter)

    record = lineage.record({"base": base})
    origin = {"file": path.name, "rank": adapter.rank, "alpha": adapter.alpha}
    said = _completed(record["inputs"]["base"]["uri"], facts)
    described = {key: value for key, value in said.items() if key not in _OF_BASE}
    described |= {"base": record["inputs"]["base"], "adapter": origin, "lineage": record}
    with TemporaryDirectory() as scratch:
        folder, beside = Path(scratch) / "model", Path(scratch) / ADAPTER
        disk.save(folder, "backbone", said["config"], module.state_dict(), described)
        sha256 = disk.digest(disk.read_config(folder))
        uri = log.same_version(name, None, sha256)
        if uri is None:
            adapters.write(beside, adapter.tensors, adapter.lora, module.config.class_name, "peft")
            with log.import_run(name, place, beside) as run_id:
                uri = registry.register(folder, name, run_id)
    promotion.promote(uri)
    return uri


def _completed(base: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the base's config.json says of its videos; of a pipeline its autoencoder too, which nothing else would name."""
    row = kind_of(facts)
    said = dict(row.complete(base, facts)) if row.complete else dict(facts)
    if "foreign" in facts and VAE in parts_of(Path(facts["foreign"]["folder"])):
        whole = pipeline_uri(base, facts)
        said["vae"] = {"uri": whole, "encoder": encoder_digest(registry.load(whole, "vae"))}
    return said
