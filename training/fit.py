"""The device memory of a training, before it runs: its own loss, forward and backward, on fake tensors.

A stage that takes part has, beside what `longtake.training.stage` asks for,

- `model_of(config, inputs) -> BaseModel`: the config of the model that it makes;
- `largest(config, inputs, count) -> Largest`: what it trains, and its largest batch of `count` samples, with no data read
  but the sizes of columns that are there already.

It may also have `resolved(config, inputs)`, which gives settings that are left out what the inputs ask for.

`inputs` are the `Source`s of its fields. Both raise UserError where a stage must run first.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from longtake.datasets.errors import UserError
from longtake.training import engines
from longtake.training.engines import lora, muon
from longtake.training.engines.activations import on_host
from longtake.training.objective import Batch, Objective, Turn
from longtake.training.trace import Trace, to_fake, to_meta

USABLE = 0.9  # of a GPU's memory [assumption]: the rest is CUDA's own, the kernels', or lost between blocks
_FP32 = 4  # bytes
_ADAM = 2 * _FP32  # bytes of AdamW's states of a weight
_MUON = _FP32  # of which it needs none for a matrix
_BUCKET = 500_000_000  # elements of gradients that ranks exchange at once [DeepSpeed's default]
_LIVE = 1_000_000_000  # elements of weights that ZeRO-3 gathers at most [DeepSpeed's default]


class Source(NamedTuple):
    """An input of a stage.

    stage   the module of the stage that makes it; None where it is named by a URI
    config  of that stage
    uri     where it is, or will be
    inputs  of that stage
    """

    stage: Any
    config: Any
    uri: str
    inputs: Mapping[str, "Source"]


class Largest(NamedTuple):
    """What a stage trains, its largest batch, and other models that are on the device meanwhile."""

    objective: Objective
    batch: Batch
    beside: Sequence[nn.Module] = ()


class Traced(NamedTuple):
    """What one pass of a rank has taken; all in bytes but for `learning`.

    points    {gradients: the most of activations beside them}
    left      of activations, after the last engine's turn
    weights   of all engines, in the precision of passes
    beside    of other models
    learning  elements of each engine's weights that learn
    matrices  of them, those that Muon would move
    lead      the engine that is averaged
    """

    points: dict[int, int]
    left: int
    weights: int
    beside: int
    learning: dict[str, int]
    matrices: int
    lead: str


class Fit(NamedTuple):
    """The bytes of a rank's device when they are the most, in forward and backward or in the update.

    weights      in the precision of passes; under ZeRO-3 this rank's share
    beside       models that do not learn, such as the autoencoder that decodes samples
    optimizer    AdamW's states, and fp32 weights where those of passes are others
    averages     of the weights
    gradients    that are there at that moment
    buckets      of DeepSpeed, weights that ZeRO-3 gathers, and what an update needs meanwhile
    activations  of forward and backward at that moment, the batch among them
    """

    weights: int
    beside: int
    optimizer: int
    averages: int
    gradients: int
    buckets: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


@contextmanager
def untraced() -> Iterator[None]:
    """Within `largest`: what is done here is real, such as to read a file of weights."""
    with _disable_current_modes():
        yield


def video_batch(count: int, frames: int, height: int, width: int) -> Batch:
    """Random windows of videos as a loader gives them."""
    return {"video": torch.zeros(count, 3, frames, height, width, dtype=torch.uint8), "key": [""] * count}


def networks(perceptual: Any) -> list[nn.Module]:
    """The network of a perceptual loss, as far as it is a module; not one of TorchScript, whose weights do not count."""
    images = perceptual and perceptual.network.images
    return [images] if isinstance(images, nn.Module) else []


Part = Literal["vae", "transformer"]  # of a pipeline of another library


def made_by(source: Source, part: Part = "vae", expert: Literal["high", "low"] | None = None) -> Any:
    """The config of the model that a source is, or of the part that is used of a pipeline.

    Raises:
        UserError: it is not known before a stage has run; there is no such model.
    """
    return _made_by(source, part, expert)[1]


def module_of(source: Source, part: Part = "vae") -> nn.Module:
    """The model that a source is, with random weights. Within a trace it takes no memory. Raises as `made_by`."""
    from longtake.training.models import kind_of

    name, config = _made_by(source, part)
    return kind_of({"model": name, "config": config.model_dump(mode="json")}).module(config)


def _made_by(source: Source, part: Part, expert: Literal["high", "low"] | None = None) -> tuple[str, Any]:
    if source.stage is None:
        return _registered(source.uri, part, expert)
    if not hasattr(source.stage, "model_of"):
        raise UserError(f"what model a {source.config.kind} stage makes is known when it has run; run it first")
    return source.stage.MODEL, source.stage.model_of(source.config, source.inputs)


def _registered(uri: str, part: Part, expert: Literal["high", "low"] | None) -> tuple[str, Any]:
    """The kind and the config of a registered model, a model folder, or a part of a pipeline, without its weights."""
    from longtake.training.foreign import load
    from longtake.training.foreign.folder import is_foreign
    from longtake.training.models import kind_of
    from longtake.training.registry import cache, disk, fetch, pipelines
    from longtake.training.registry.foreign import PIPELINE
    from longtake.training.registry.uri import in_store

    facts = fetch.describe(uri) if in_store(uri) else None
    folder = None if facts else pipelines.local(uri)
    if folder is not None and not is_foreign(folder):
        facts, folder = disk.read_config(folder), None
    if facts and facts["model"] == PIPELINE:
        folder = cache.pull(uri, frozenset({part}))
    if folder is not None:
        return load.config_of(pipelines.opened(uri, folder, frozenset({part}))[0], part, expert)
    assert facts
    return facts["model"], kind_of(facts).config(**facts["config"])


class _Engine:
    """A module in the place of DeepSpeed's engine."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def trace_of(stage: Any, config: Any, inputs: Mapping[str, Source], world: int) -> Traced:
    """Trace what a rank of `world` does between two updates. Needs no data, no weights and no GPU, and takes no memory.

    Raises:
        UserError: the batch does not divide; `lora` or `freeze` finds nothing; a stage must run first.
    """
    engines.deepspeed_config(config, world)  # refuses a batch that does not divide
    count = config.batch // (config.accumulate * engines.groups_of(config, world))
    trace = Trace()
    with _alone(), trace:
        objective, batch, beside = stage.largest(config, inputs, count)
        if config.offload_activations:
            objective = replace(objective, loss=on_host(objective.loss, objective.modules, host="meta"))
        modules = objective.modules
        with untraced():
            for module in (*modules.values(), *beside):
                to_meta(module)
            engines.freeze(modules[objective.lead], config.freeze)
            if config.lora:
                lora.attach(modules[objective.lead], config.lora)
            engines.pretend_to_share(modules.values(), config)
            for module in modules.values() if config.precision == "bf16" else ():
                module.bfloat16()
        for module in (*modules.values(), *beside):
            to_fake(module, engines.device())
        moves = {k for k, v in batch.items() if isinstance(v, torch.Tensor)} - set(objective.on_host)
        batch = {k: v.to(engines.device()) if k in moves else v for k, v in batch.items()}
        beside_bytes = sum(t.nbytes for module in beside for t in (*module.parameters(), *module.buffers()))
        weights = trace.watch(*modules.values(), *beside) - beside_bytes
        # gradients of the passes before are there in all but the first
        for _ in range(min(2, config.accumulate)):
            _pass(objective, batch, config)
    learning = {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in modules.items()}
    matrices = sum(weight.numel() for module in modules.values() for weight in muon.matrices_of(module))
    return Traced(trace.points, trace.others, weights, beside_bytes, learning, matrices, objective.lead)


def _pass(objective: Objective, batch: Batch, config: Any) -> None:
    """The turns of all engines in the last step of the training, when all that is switched on later is on."""
    step, carry = config.steps - 1, dict[str, Any]()
    rng = torch.Generator(engines.device()).manual_seed(config.seed)
    made = {name: _Engine(module) for name, module in objective.modules.items()}
    for name, engine in made.items():
        if step < objective.starts.get(name, 0):
            continue
        others = [p for other, e in made.items() if other != name for p in e.module.parameters() if p.requires_grad]
        for parameter in others:
            parameter.requires_grad_(False)
        loss, _ = objective.loss(Turn(name, made, batch, step, rng, config.seed, carry))
        loss.backward()
        del loss
        for parameter in others:
            parameter.requires_grad_(True)
        if config.accumulate == 1:
            # its update takes the gradients before the next engine's turn
            engine.module.zero_grad()


@contextmanager
def _alone() -> Iterator[None]:
    """A process group of one process, which losses ask for their place."""
    if torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def memory_of(traced: Traced, config: Any, world: int, on_gpu: bool = True) -> Fit:
    """The memory of a rank with the config's ZeRO stage, precision and averages.

    `on_gpu`: the update handles all weights at once, and what is offloaded takes none of this memory; on a CPU weights are
    updated one after the other, and what is offloaded stays where it is.
    """
    zero, learning = config.zero_stage, sum(traced.learning.values())
    low = 2 if config.precision == "bf16" else _FP32
    summed = 2 if config.gradient_precision == "bf16" else _FP32  # bytes of a gradient that is added up
    share = world if zero else 1
    on_host = on_gpu and config.offload != "none"
    elements = traced.weights // low

    # what is always there
    master = _FP32 if zero or low < _FP32 else 0
    optimizer = 0 if on_host else (_ADAM + master) * learning // share
    if config.optimizer == "muon":
        optimizer -= _MUON * traced.matrices
    averages = 0 if on_host else len(config.ema_half_lives) * _FP32 * traced.learning[traced.lead] // world
    weights = traced.weights // (world if zero == 3 else 1)
    largest = max(traced.learning.values())
    buckets = min(_BUCKET, largest) * low if zero else 0
    gathered = min(elements, _LIVE) * low if zero == 3 else 0
    if on_gpu and config.offload == "parameters":
        weights = 0

    def gradients(size: int) -> int:
        """Bytes on this rank, where a pass has made so many: ZeRO-1 shares them out in the update alone."""
        whole = size // low * summed
        return learning * summed // share if zero == 3 else whole // share if zero == 2 else whole

    # an update in fp32 of one engine, or of as much of it as ZeRO takes at once: gradients, and what AdamW computes
    at_once = min(largest // share, _LIVE)
    copy = 0 if on_host else _FP32 * at_once
    computed = 0 if on_host or config.fused(on_gpu) or not (on_gpu or zero) else copy if on_gpu else 2 * copy

    # the moments: each of forward and backward; the first update, of zeros; the exchange of gradients; an update
    made = (learning if config.accumulate > 1 else largest) * low
    kept, left = gradients(made) // (share if zero == 1 else 1), traced.left
    moments = [(gradients(size), gathered, beside) for size, beside in traced.points.items()]
    if master:
        moments.append((0 if zero else largest * low, copy + computed, 0))
    if zero == 3:
        moments.append((kept, copy + computed, left))
    elif zero:
        moments += [(kept, copy, left), (0, copy + computed, left)]
    else:
        moments.append((kept, (copy if summed < low == _FP32 else 0) + computed, left))
    if world > 1 and zero < 2:
        moments.append((gradients(made), kept if zero else min(_BUCKET, largest) * summed, left))
    held, extra, activations = max(moments, key=sum)
    return Fit(weights, traced.beside, optimizer, averages, held, buckets + extra, activations)
