"""What `torch.compile` leaves out, without the compiler: to import it takes as long as all the rest of torch."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch._C._dynamo import eval_frame

P = ParamSpec("P")
T = TypeVar("T")
_SKIPPED = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """`torch.compiler.disable`, which takes effect once the compiler is there: a graph ends at a call of the function."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        return torch.compiler.disable(function)(*args, **kwargs)

    # what the compiler's own `skip` does: it neither traces this function, which only calls another one, nor compiles it
    eval_frame.set_code_exec_strategy(call.__code__, _SKIPPED)  # type: ignore[attr-defined]
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call
