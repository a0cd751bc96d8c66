"""An accelerator that is not there: its tensors have a shape and no values, and mixing them with the host's fails.

It is PyTorch's device "privateuseone", renamed and given to Python, below `longtake.training.trace`: operations run on fake
tensors. So a full-size model trains and samples in seconds, in no memory. What differs from a GPU: nothing runs late, and
the host waits for nothing, so what would make it wait is counted (`Pretended.waits`).

A process has such a device for good, and libraries ask for it: use it in a process of its own (`Machine`).
"""

import multiprocessing
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import measured
import numpy as np
import torch
from flat import nested
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from longtake.training import engines, fit, loop, trace
from longtake.training.config import TrainConfig
from longtake.training.engines import updates

NAME = "pretended"
Step = Callable[[], object]
_aten = torch.ops.aten
# operations whose result has a size, or is an error, that the host must know
_SIZED = {
    _aten.nonzero,
    _aten.masked_select,
    _aten.multinomial,
    _aten.equal,
    _aten.bincount,
    _aten._unique2,
    _aten.unique_consecutive,
    _aten.unique_dim,
    _aten._linalg_check_errors,
}


class Failed(Exception):
    """What a function has raised in the process of a `Machine`, with its traceback, as text."""


class Machine:
    """A process that has the device; functions run there, and errors come back as `Failed`."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), install)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._pool.submit(_called, function, *args).result()

    def close(self) -> None:
        self._pool.shutdown()


def _called(function: Callable[..., Any], *args: Any) -> Any:
    # the errors of fake tensors cannot be sent themselves
    try:
        return function(*args)
    except Exception:
        raise Failed(traceback.format_exc()) from None


class Pretended(trace.Trace):
    """A trace whose device is the pretended one.

    answer      to a question whether something is so, such as finite, where it is not known
    waits       {place in our code: how often the host would wait there for the device}, since `watch`
    operations  floating point operations, since `watch`
    """

    def __init__(self, answer: bool = False) -> None:
        super().__init__()
        self.answer = answer
        self.waits: Counter[str] = Counter()
        self.operations = 0
        self._fake = _Fake(allow_non_fake_inputs=True)

    def watch(self, *modules: torch.nn.Module) -> int:
        # codes that no step has moved yet are seeded by the first, which waits for what it draws
        for name, buffer in (named for module in modules for named in module.named_buffers()):
            if name.endswith("updates"):
                buffer.fill_(1)
        self.waits, self.operations = Counter(), 0
        return super().watch(*modules)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return super().__torch_dispatch__(func, types, args, kwargs)
        kwargs = kwargs or {}
        if _waits(func, args, kwargs):
            self.waits[_place()] += 1
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if made is False and trace._known(args[0]) is None:
            return self.answer
        if (generator := kwargs.get("generator")) is not None:
            wanted = next(t.device.type for t in tree_leaves(made) if isinstance(t, Tensor))
            found = _devices.get(generator._cdata, "cpu")
            if found != wanted:
                # a GPU's kernel says so
                raise RuntimeError(f"Expected a {wanted!r} device type for generator but found {found!r}")
        formula = flop_registry.get(getattr(func, "_overloadpacket", None))
        if formula:
            self.operations += formula(*args, **kwargs, out_val=made)
        return made


class _Fake(FakeTensorMode):
    """Computes no constants on the device, which has no kernels."""

    avoid_device_init = True  # type: ignore[assignment]


def _on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def _waits(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether PyTorch lets the host wait for a GPU in this operation."""
    packet = getattr(func, "_overloadpacket", None)
    if packet is _aten._local_scalar_dense or packet in _SIZED:
        return any(_on_device(a) for a in args)
    if packet is _aten._to_copy:
        source, target = args[0], kwargs.get("device") or args[0].device
        return _moves(source.device, target, kwargs.get("non_blocking", False))
    if packet is _aten.copy_:
        return _moves(args[1].device, args[0].device, args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
    if packet in (_aten.index, _aten.index_put, _aten.index_put_) and _on_device(args[0]):
        indices = [i for i in args[1] if isinstance(i, Tensor)]
        # numbers of the host are copied; the rows of a mask are counted, but where one number fills them
        filled = packet is not _aten.index and args[2].numel() == 1
        return any(not _on_device(i) or (i.dtype in (torch.bool, torch.uint8) and not filled) for i in indices)
    return packet is _aten.repeat_interleave and _on_device(args[0]) and kwargs.get("output_size") is None


def _moves(source: torch.device, target: torch.device, late: bool) -> bool:
    """A copy to the device may be made later; one to the host may too, but then its values are not there."""
    return source.type != target.type and NAME in (source.type, target.type) and not (late and target.type == NAME)


def _place() -> str:
    """The innermost line of the product that runs now."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("longtake.") and name != trace.__name__:
            return f"{name.removeprefix('longtake.training.')}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


_devices: dict[int, str] = {}  # of generators, by the address of what they wrap


class _Generator(torch._C.Generator):
    """A generator that says that it is of the device, as one of a GPU does."""

    def __new__(cls, device: Any = "cpu") -> Any:
        made = super().__new__(cls, "cpu")
        _devices[made._cdata] = torch.device(device).type
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(_devices[self._cdata])


class _Module(backend_registration._DummyBackendModule):
    """`torch.pretended`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention as a GPU computes it, in one kernel."""
    assert not enable_gqa
    if attn_mask is None and query.shape[-1] == value.shape[-1]:
        return _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    efficient = _aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


_kernels = torch.library.Library("aten", "IMPL")


def install() -> None:
    """Give this process the device, for good, and Longtake what it asks for."""
    backend_registration._setup_privateuseone_for_python_backend(rename=NAME, backend_module=_Module())
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=)` copies from the host, as it does for a GPU
    torch.Generator = _Generator  # type: ignore[misc]
    for key in ("PrivateUse1", "AutogradPrivateUse1"):
        _kernels.impl("scaled_dot_product_attention", _attention, key)
    _read_fakes()
    for name, module in list(sys.modules.items()):
        if name.startswith("longtake.") and getattr(getattr(module, "device", None), "__module__", "") == (
            "longtake.training.engines.group"
        ):
            module.device = _device  # type: ignore[attr-defined]


def _device() -> torch.device:
    """In the place of `engines.device`. What is made outside of a trace has values: it is the host's."""
    traced = any(isinstance(mode, Pretended) for mode in _get_current_dispatch_mode_stack())
    return torch.device(NAME, 0) if traced else torch.device("cpu")


def _read_fakes() -> None:
    """Let fake tensors be read as a GPU's are: `tolist` copies once, and `numpy` reads tensors of the host alone."""
    tolist, numpy = FakeTensor.tolist, Tensor.numpy

    def as_list(self: FakeTensor) -> Any:
        return tolist(self.cpu() if _on_device(self) else self)

    def as_array(self: Tensor, *, force: bool = False) -> Any:
        if not isinstance(self, FakeTensor):
            return numpy(self, force=force)
        if _on_device(self):
            raise TypeError("can't convert a tensor of the device to numpy; use Tensor.cpu() first")
        return np.zeros(self.shape, str(self.dtype).removeprefix("torch."))

    FakeTensor.tolist, Tensor.numpy = as_list, as_array  # type: ignore[method-assign, assignment]


class Told(NamedTuple):
    """What a training takes on the device, a rank alone.

    parameters  of each engine's module
    operations  of a pass, forward and backward of all engines
    fit         bytes by part, when they are the most
    activations bytes of them when they are the most, the batch among them
    gradients   bytes of them when they are the most
    learning    elements of each engine's weights that learn
    waits       places where the host would wait in a pass
    """

    parameters: dict[str, int]
    operations: int
    fit: fit.Fit
    activations: int
    gradients: int
    learning: dict[str, int]
    waits: dict[str, int]


def trained(recipe: str, name: str) -> Told:
    """A pass of a stage of a recipe. None of the stages before it has run."""
    source, device, parameters = measured.source_of(recipe, name), Pretended(), dict[str, int]()

    def largest(*args: Any) -> fit.Largest:
        made: fit.Largest = source.stage.largest(*args)
        parameters.update({k: sum(p.numel() for p in m.parameters()) for k, m in made.objective.modules.items()})
        return made

    fit.Trace = lambda: device  # type: ignore[assignment, misc]
    traced = fit.trace_of(SimpleNamespace(largest=largest), source.config, source.inputs, 1)
    parts, most = fit.memory_of(traced, source.config, 1), (max(traced.points.values()), max(traced.points))
    return Told(parameters, device.operations, parts, *most, traced.learning, dict(device.waits))


class Made(NamedTuple):
    """What a family's own sampler has made.

    shapes  of the chunks of frames
    waits   places where the host would wait, in all
    steps   the same of each step but the first of a window: a solver's step, or a latent frame of tokens
    """

    shapes: list[tuple[int, ...]]
    waits: dict[str, int]
    steps: list[dict[str, int]]


def sampled(recipe: str, name: str, steps: int, solver: str = "") -> Made:
    """Videos by a family's own sampler, with so many steps for each window.

    `solver`: of a transformer of another library.
    """
    source, device, marks = measured.source_of(recipe, name), Pretended(answer=True), list[Counter[str]]()
    with fit._alone(), device:
        made = source.stage.largest(source.config, source.inputs, 1)
        modules = (*made.objective.modules.values(), *made.beside)
        _to_device(*modules)
        for module in modules:
            module.eval()
        device.watch(*modules)
        with torch.no_grad():
            sampler = partial(_solved, solver) if solver else SAMPLERS[source.config.kind]
            chunks = sampler(made, steps, lambda: marks.append(device.waits.copy()))
            shapes = [tuple(chunk.shape) for chunk in chunks]
    pairs = [(n, marks[n - 1], marks[n]) for n in range(1, len(marks)) if n % steps]
    return Made(shapes, dict(device.waits), [dict(after - before) for _, before, after in pairs])


def _to_device(*modules: torch.nn.Module) -> None:
    with fit.untraced():
        for module in modules:
            trace.to_meta(module)
    for module in modules:
        trace.to_fake(module, _device())


def _on(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(_device()) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _latte(made: fit.Largest, steps: int, each_step: Step) -> Iterable[Any]:
    from longtake.training.models.common.codec import frames_of
    from longtake.training.models.common.condition import of_batch
    from longtake.training.models.latte import sample

    # two windows, of which the second goes on from the first
    model, codec = cast(Any, made.objective.modules["model"]), cast(Any, made.beside[0])
    frames = frames_of(2 * model.config.shape[0] - 2, codec.config.temporal_stride)
    settings, said = sample.Settings(steps=steps, guidance=4.0), of_batch(_on(made.batch))
    return sample.generate_videos(model, codec, frames, [1], said, settings, each_step=each_step)


def _retrieved(made: fit.Largest, steps: int, each_step: Step) -> Iterable[Any]:
    from longtake.training.models.memory import history, retrieval

    model, batch = cast(Any, made.objective.modules["model"]), _on(made.batch)
    stretch = history.groups_of(batch, model)
    memory = history.memory_of(model, stretch)
    model.register_forward_hook(lambda *_: each_step())
    yield retrieval.retrieve(model, memory, [0, 3, 5], (16, 16), torch.Generator(), steps)


def _reconstructed(made: fit.Largest, steps: int, each_step: Step) -> Iterable[Any]:
    from longtake.datasets.loader import to_model
    from longtake.training.models.common.codec import to_array

    model, video = cast(Any, made.objective.modules["generator"]), to_model(_on(made.batch)["video"])
    for _ in range(steps):
        latent = model.encode(video)
        yield to_array(model.decode(latent if isinstance(latent, Tensor) else latent.mode()))
        each_step()


def _heard(made: fit.Largest, steps: int, each_step: Step) -> Iterable[Any]:
    model, sound = cast(Any, made.objective.modules["model"]), _on(made.batch)["audio"]
    for _ in range(steps):
        yield model.decode_tokens(model.sound_tokens(sound, 16)).cpu()
        each_step()


def _clips(made: fit.Largest, steps: int, each_step: Step) -> Iterable[Any]:
    from longtake.training.models.encgan3.rollout import Rollout

    model = cast(Any, made.objective.modules["generator"])
    return Rollout(model, [1], each_step=each_step).pixels(steps * model.config.frames)


def _remembered(made: fit.Largest, steps: int, each_step: Step) -> Iterable[Any]:
    from longtake.training.models.common.condition import of_batch
    from longtake.training.models.generator import Settings
    from longtake.training.models.memory import segments

    # the second segment has a history, which is noised
    model, codec = cast(Any, made.objective.modules["model"]), cast(Any, made.beside[0])
    latents, settings = model.config.shape[0] + 1, Settings(steps=steps, history_noise=model.config.history_noise)
    story = [(0, of_batch(_on(made.batch)))]
    return segments.generate(model, codec, latents, [1], story=story, settings=settings, each_step=each_step)


def _rolled_out(made: fit.Largest, steps: int, each_step: Step) -> Iterable[Any]:
    from longtake.training.models.generator import Settings
    from longtake.training.models.tats import sample

    # a step is a latent frame, of which each token is drawn after a pass of the model
    model = cast(Any, made.objective.modules["model"])
    plan = sample.Rollout(model, [1], Settings(temperature=0.9, top_k=100, top_p=0.8), each_step=each_step)
    return sample.videos_of(plan, made.beside[0], steps)


def _gap_filled(made: fit.Largest, steps: int, each_step: Step) -> Iterable[Any]:
    from longtake.training.models.generator import Gap, InfillSettings
    from longtake.training.models.mavin import sample

    model, codec = cast(Any, made.objective.modules["model"]), made.beside[0]
    height, width = (codec.config.spatial_stride * side for side in model.config.shape[1:])
    settings = InfillSettings(steps=steps, mixer="per_frame")
    shown = (8.0, (height, width), settings, (9, 25), 12, 62, "", _device())
    filler = sample.Filler(model, codec, sample.encode_apart, *shown)
    side = np.zeros((25, height, width, 3), np.uint8)
    return filler.fill([Gap(side, side, 12)], 1, settings, each_step=each_step)


def _solved(solver: str, made: fit.Largest, steps: int, each_step: Step) -> Iterable[Any]:
    from longtake.training.models.backbone.sample import Text, sample
    from longtake.training.models.common.codec import to_array
    from longtake.training.models.common.condition import of_batch
    from longtake.training.models.generator import Settings

    model, codec, said = (
        cast(Any, made.objective.modules["model"]),
        cast(Any, made.beside[0]),
        of_batch(_on(made.batch)),
    )
    shape = made.batch["latent"].shape[-3:]
    texts = [Text(said, said.pooled)] * 2
    settings: Any = Settings(steps=steps, guidance=5.0, solver=cast(Any, solver))
    latents = sample((model,), shape, [1], settings, *texts, fps=24.0, each_step=each_step)
    yield from (to_array(chunk) for chunk in codec.decode_stream([latents]))


SAMPLERS: dict[str, Callable[[fit.Largest, int, Step], Iterable[Any]]] = {
    "finetune_latte": _latte,
    "finetune_mavin": _gap_filled,
    "finetune_memory_prior": _remembered,
    "pretrain_memory": _retrieved,
    "pretrain_tats": _rolled_out,
    "pretrain_vae": _reconstructed,
    "pretrain_vqgan": _reconstructed,
    "pretrain_sound_vqgan": _heard,
    "pretrain_encgan3": _clips,
    "finetune_backbone": partial(_solved, "euler"),
}


class _Engine:
    """What the loop asks of a DeepSpeed engine without ZeRO, in fp32."""

    def __init__(self, module: torch.nn.Module, config: TrainConfig) -> None:
        self.module, self._passes, self._accumulate = module, 0, config.accumulate
        groups, fused = engines.parameter_groups(module, config.weight_decay), config.fused(on_gpu=True)
        self.optimizer = self.basic_optimizer = torch.optim.AdamW(groups, config.lr, fused=fused or None)
        updates.finish(self, config.gradient_clip)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        (loss / self._accumulate).backward()

    def step(self) -> None:
        self._passes += 1
        if self._passes % self._accumulate == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def zero_optimization_stage(self) -> int:
        return 0

    def bfloat16_enabled(self) -> bool:
        return False


class _Done(Exception):
    pass


def looped(folder: str, steps: int, changes: dict[str, Any]) -> list[dict[str, int]]:
    """Where the host would wait in each step of the training loop, with a generator and a discriminator."""
    import small

    config = TrainConfig(**nested(small.SETTINGS | {"steps": steps + 1, "checkpoint_every": 1000} | changes))
    batches = iter(small.Rows(config.batch))
    return _steps(folder, config, steps, lambda: (small.objective(starts=0), lambda: next(batches)))


def stepped(folder: str, name: str) -> dict[str, int]:
    """Where the host would wait in a step of a family's own training, with a tiny model."""
    import trainings

    if name == "backbone":
        # so large that no values are computed beside, for which a GPU's attention has no kernel
        source = trainings.of_another_library(Path(folder), {"rank": 4}, batch=32, ema_half_lives=[10.0])
    else:
        source = trainings.source(Path(folder), trainings.TRAININGS[name], ema_half_lives=[10.0])

    def made() -> Any:
        largest = source.stage.largest(source.config, source.inputs, source.config.batch)
        _to_device(*largest.beside)
        return largest.objective, lambda: largest.batch

    return _steps(folder, source.config, 1, made)[0]


def _steps(folder: str, config: Any, steps: int, made: Callable[[], Any]) -> list[dict[str, int]]:
    """Where the host would wait in each step of the loop.

    made   within a trace: an objective, and what gives its batches
    """
    device, waits = Pretended(), list[dict[str, int]]()

    class Stream:
        def __init__(self, batch: Callable[[], Any]) -> None:
            self._batch = batch

        def __iter__(self) -> Any:
            for number in range(steps * config.accumulate + 1):
                if number % config.accumulate == 0:
                    waits.append(dict(device.waits))
                    device.waits.clear()
                if number == steps * config.accumulate:
                    raise _Done
                yield self._batch()

    def engines_of(modules: Any, *_: Any) -> dict[str, Any]:
        return {name: _Engine(module, config) for name, module in modules.items()}

    engines.engines_of = engines_of  # type: ignore[assignment]
    with fit._alone(), device, suppress(_Done):
        objective, batch = made()
        modules = objective.modules.values()
        _to_device(*modules)
        device.watch(*modules)
        loop.train(objective, cast(Any, Stream(batch)), config, Path(folder))
    return waits[1:]


def left_on_the_host() -> None:
    with Pretended():
        torch.ones(3, device=_device()) + torch.ones(3)


def drawn_on_the_host() -> None:
    with Pretended():
        torch.randn(3, device=_device(), generator=torch.Generator().manual_seed(0))


def read_from_the_device() -> None:
    with Pretended():
        torch.ones(3, device=_device()).numpy()


def waiting() -> dict[str, int]:
    """How often the host would wait in ways to use a device."""
    device = Pretended()
    with device:
        x, host = torch.ones(3, device=_device()), torch.ones(3)
        ways: dict[str, Callable[[], Any]] = {
            "item": x[0].item,
            "bool": lambda: bool(x.any()),
            "tolist": x.tolist,
            "cpu": x.cpu,
            "mask": lambda: x[x > 0],
            "bincount": lambda: torch.bincount(x.long(), minlength=3),
            "tensor": lambda: torch.tensor([1.0, 2.0], device=_device()),
            "list as an index": lambda: x[[0, 2]],
            "late copy": lambda: host.to(_device(), non_blocking=True),
            "where": lambda: torch.where(x > 0, x, 0.0),
            "full": lambda: torch.full((), 2.0, device=_device()),
            "filled mask": lambda: x.masked_fill(x > 0, 0.0),
        }
        counts = {}
        for name, way in ways.items():
            before = device.waits.total()
            way()
            counts[name] = device.waits.total() - before
    return counts
