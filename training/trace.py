"""The memory of a computation, without the memory: it runs on fake tensors, which have a shape and no values.

Every operation goes through a mode that knows when storages begin and end. What branches on data needs values, so those of
small tensors are computed beside. They come from the largest draws: `torch.randint` gives its highest number. Where
nothing is known, a mask chooses all, and a number is 0: a question whether something is so is answered by no.

Given up: what a kernel needs inside itself is not seen, but for a convolution's second gradient of its weight; nor is the
allocator's rounding.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_SMALL = 4096  # elements of a tensor whose values are computed too
_VALUE = "known_value"  # attribute of a fake tensor
_HOST: dict[str, Any] = {"device": torch.device("cpu"), "generator": None, "pin_memory": False}
_EXCHANGES = ("c10d", "_c10d_functional")  # namespaces of what ranks do together
_aten = torch.ops.aten


class Trace(TorchDispatchMode):
    """Counts the bytes of all fake tensors that live. All that is made within has no memory.

    points  {bytes of gradients: the most bytes of all else that lived beside so many}, since `watch`
    """

    def __init__(self) -> None:
        super().__init__()
        self.points: dict[int, int] = {}
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._sizes: dict[int, int] = {}  # of live storages
        self._others = self._gradients = self._kept = 0
        self._graded: set[int] = set()

    @property
    def others(self) -> int:
        """Bytes of what lives now, but for gradients and for what `watch` left out."""
        return self._others - self._kept

    def watch(self, *modules: nn.Module) -> int:
        """Begin to note `points`, without these modules' parameters and buffers; returns their bytes."""
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        self._kept = sum({_key(t): t.untyped_storage().nbytes() for t in tensors}.values())
        for parameter in (p for module in modules for p in module.parameters() if p.requires_grad):
            parameter.register_post_accumulate_grad_hook(self._grade)
        self.points = {}
        self._note()
        return self._kept

    def _grade(self, parameter: Tensor) -> None:
        """Count a gradient as one from now on."""
        assert parameter.grad is not None
        key = _key(parameter.grad)
        if key in self._sizes and key not in self._graded:
            self._graded.add(key)
            self._others -= self._sizes[key]
            self._gradients += self._sizes[key]
            self._note()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            # asked of every tensor all the time
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default:
            return _scalar(args[0])
        if func is _aten.index.Tensor:
            # a mask chooses as many rows as it has
            args = (args[0], [_numbers(index) for index in args[1]])
        with self._fake:
            if func is _aten.bincount.default:
                # as many as there are numbers, at least
                made = args[0].new_zeros(args[2] if len(args) > 2 else kwargs["minlength"])
            else:
                made = func(*args, **kwargs)
        _add_values(func, args, kwargs, made)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._track(tensor)
        if func is _aten.convolution_backward.default:
            # a kernel makes the weight's gradient in a layout of its own, and then copies it
            self._note(args[2].nbytes)
        return made

    def _track(self, tensor: Tensor) -> None:
        if tensor.is_meta:
            # in the place of the host
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._others += self._sizes[key]
            weakref.finalize(storage, self._forget, key)
            self._note()

    def _forget(self, key: int) -> None:
        size = self._sizes.pop(key)
        if key in self._graded:
            self._graded.remove(key)
            self._gradients -= size
        else:
            self._others -= size

    def _note(self, within: int = 0) -> None:
        """Note what lives, and what an operation needs `within` itself."""
        self.points[self._gradients] = max(self.others + within, self.points.get(self._gradients, 0))


def to_meta(module: nn.Module) -> None:
    """Give a module of fake tensors those of the device "meta", which can be cast and copied; outside of a `Trace`."""
    _replace(module, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"))


def to_fake(module: nn.Module, device: torch.device) -> None:
    """Within a `Trace`: give a module fake parameters and buffers, of zeros. What it shares stays shared."""
    _replace(module, lambda t: torch.zeros(t.shape, dtype=t.dtype, device=device))


def _replace(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    new: dict[int, Tensor] = {}
    for child in module.modules():
        for name, old in child._parameters.items():
            if old is not None:
                new.setdefault(id(old), nn.Parameter(function(old), old.requires_grad))
                child._parameters[name] = new[id(old)]  # type: ignore[assignment]
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = function(buffer)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _known(value: Any) -> Any:
    """The value of a tensor, None where it is not known; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(value, FakeTensor):
        return getattr(value, _VALUE, None)
    return value if value.numel() <= _SMALL else None


def _scalar(tensor: Tensor) -> Any:
    value = _known(tensor)
    return torch.zeros((), dtype=tensor.dtype).item() if value is None else value.item()


def _numbers(index: Tensor | None) -> Tensor | None:
    """A mask as the numbers that it chooses: all, of a large one."""
    if index is None or index.dtype != torch.bool:
        return index
    assert index.ndim == 1, "a trace takes masks of rows"
    value = _known(index)
    return torch.arange(len(index)) if value is None else value.nonzero().flatten()


def _add_values(func: Any, args: Any, kwargs: Any, made: Any) -> None:
    """Compute the values of what an operation has made, if that is small and they are known of all that it has read."""
    if func.namespace in _EXCHANGES:
        # ranks trace without each other, as if all had the same: what is reduced or sent stays as it is
        if func._schema.name == "c10d::allgather_":
            for copies, own in zip(args[0], args[1], strict=True):
                for copy in copies:
                    setattr(copy, _VALUE, _known(own))
        return
    results = [t for t in tree_leaves(made) if isinstance(t, FakeTensor)]
    read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if not results:
        return
    if any(t.numel() > _SMALL for t in (*results, *read)) or any(_known(t) is None for t in read):
        for tensor in results if func._schema.is_mutable else ():
            tensor.__dict__.pop(_VALUE, None)
        return
    if func._schema.name.startswith("aten::randint"):
        high = args[1] if func._overloadname.startswith("low") else args[0]
        values: Any = torch.full(results[0].shape, high - 1, dtype=results[0].dtype)
    else:
        # on the host, in any case: to look at a device would make it wait
        settings = tree_map(_known, kwargs)
        values = func(*tree_map(_known, args), **settings | {k: v for k, v in _HOST.items() if k in kwargs})
    for tensor, value in zip(results, (v for v in tree_leaves(values) if isinstance(v, Tensor)), strict=True):
        setattr(tensor, _VALUE, value)
