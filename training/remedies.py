"""The smallest change of its settings by which a training fits into the memory of a GPU (see `fit`)."""

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from longtake.datasets.errors import UserError
from longtake.training import engines
from longtake.training.fit import Fit, Source, Traced, memory_of, trace_of


class Remedy(NamedTuple):
    """Changes by which a training fits, as they are written in its stage, and what it takes then."""

    changes: tuple[str, ...]
    fit: Fit


Change = Mapping[str, Any]  # fields of a stage's config, and their values
_AGAIN = "activation_checkpointing"
_SHARES = (0.25, 0.5, 0.75, True)  # of the blocks
_DEVICES = 8  # of a machine: a window is not shared between machines


def _checkpointing(config: Any) -> Iterator[Change]:
    """Activations of a share of the blocks are computed again: with all of them a third more time."""
    fields = type(config).model_fields
    parent = getattr(config, "parent", None)
    if name := _AGAIN if _AGAIN in fields else "recompute" if parent and "recompute" in fields else "":
        yield from ({name: share} for share in _SHARES if share > (getattr(config, name) or 0))
    elif "model" in fields and not parent:
        # a parent's model is as it is
        model = config.model or {}
        yield from ({"model": model | {_AGAIN: share}} for share in _SHARES if share > (model.get(_AGAIN) or 0))


def _chunking(config: Any) -> Iterator[Change]:
    """Logits of a part of the tokens at once: the head is computed again."""
    if "loss_chunk" in type(config).model_fields and config.loss_chunk is None:
        yield {"loss_chunk": 2048}


def _sharding(config: Any) -> Iterator[Change]:
    """More traffic between the ranks, if there are several."""
    for stage in range(config.zero_stage + 1, 4 if _world(config) > 1 else 0):
        yield {"zero_stage": stage}


def _offloading(config: Any) -> Iterator[Change]:
    """More traffic to the host's memory, and updates on its CPU."""
    for offload, least in (("optimizer", 1), ("parameters", 3)):
        if config.offload in ("none", "optimizer") and config.offload != offload:
            yield {"zero_stage": max(least, config.zero_stage), "offload": offload}


def _keeping_on_host(config: Any) -> Iterator[Change]:
    """What the backward pass needs goes to the host's memory and back."""
    if not config.offload_activations and config.zero_stage < 3:
        yield {"offload_activations": True}


def _accumulating(config: Any) -> Iterator[Change]:
    """Smaller batches in more passes: the same result, in more time."""
    passes = config.accumulate
    while config.batch % (2 * passes * engines.groups_of(config, _world(config))) == 0:
        passes *= 2
        yield {"accumulate": passes}


def _bounding(config: Any) -> Iterator[Change]:
    """Fewer windows in a pass: more passes of smaller batches. Where not one window fits, the stage refuses it."""
    tokens = getattr(config, "max_tokens", None)
    while tokens and tokens > 1:
        tokens //= 2
        yield {"max_tokens": tokens}


def _adapting(config: Any) -> Iterator[Change]:
    """Another result: a low-rank change learns."""
    if config.lora is None:
        yield {"lora": {"rank": 16}}


def _sharing(config: Any) -> Iterator[Change]:
    """Processes share a window, each with a part of its tokens: as many windows in a pass, on more devices or in more passes."""
    launcher = config.run.launcher
    if not config.SHARED:
        return
    # one process may become several
    counts = (launcher.processes,) if launcher.processes > 1 else (2, 4, 8)
    sizes = {size for count in counts for size in range(2, _DEVICES + 1) if count % size == 0}
    for size in sorted(size for size in sizes if size > launcher.sequence and size % launcher.sequence == 0):
        processes = max(launcher.processes, size)
        by = "torchrun" if launcher.by == "process" else launcher.by
        change: dict[str, Any] = {"run": config.run.model_dump(mode="json")}
        change["run"]["launcher"] |= {"by": by, "processes": processes, "sequence": size}
        change["accumulate"] = config.accumulate * engines.groups_of(config, _world(config)) * size // processes
        if config.zero_stage == 3:
            change |= {"zero_stage": 2, "offload": "none" if config.offload == "none" else "optimizer"}
        yield change


# from cheap to expensive
_KINDS_OF_CHANGE = (
    _chunking,
    _checkpointing,
    _sharding,
    _offloading,
    _accumulating,
    _bounding,
    _keeping_on_host,
    _adapting,
    _sharing,
)


def _written(config: Any, changes: Change) -> tuple[str, ...]:
    """Changes of a config as lines of a recipe."""
    lines: list[str] = []
    for name, value in changes.items():
        if name == "model":
            lines.append(f"model.{_AGAIN}: {str(value[_AGAIN]).lower()}")
        elif name == "lora":
            lines.append("lora: {rank: 16}")
        elif name == "run":
            before = config.run.launcher.model_dump(mode="json")
            lines += [f"run.launcher.{key}: {new}" for key, new in value["launcher"].items() if new != before[key]]
        elif value != getattr(config, name):
            lines.append(f"{name}: {str(value).lower()}")
    return tuple(lines)


class Planned:
    """What a stage takes as it is, and by how little it would fit; a trace is made once for all that it decides."""

    def __init__(self, stage: Any, config: Any, inputs: Mapping[str, Source], on_gpu: bool = True) -> None:
        """`on_gpu` as in `memory_of`."""
        self._stage, self._config, self._inputs, self._on_gpu = stage, config, inputs, on_gpu
        self._traced = functools.cache(self._trace)

    def fit(self, config: Any = None) -> Fit:
        """The memory with these settings, or its own. Raises as `trace_of`."""
        config = config or self._config
        # ZeRO is no part of a trace
        free = {"zero_stage": 0, "offload": "none"}
        return memory_of(
            self._traced(config.model_copy(update=free).model_dump_json()), config, _world(config), self._on_gpu
        )

    def remedy(self, limit: float) -> Remedy | None:
        """The smallest change by which it takes `limit` bytes at most; None where nothing does.

        One change after the other, from cheap to expensive; then all together, as far as each helps.
        """
        # on a CPU all is in the memory of one host already
        elsewhere = () if self._on_gpu else (_offloading, _keeping_on_host, _sharing)
        kinds = [kind for kind in _KINDS_OF_CHANGE if kind not in elsewhere]
        single = (change for kind in kinds for change in kind(self._config))
        for change in single:
            found = self._changed(self._config, change)
            if found is not None and found[1].total <= limit:
                return Remedy(_written(self._config, change), found[1])
        together, config, least = dict[str, Any](), self._config, self.fit().total
        for kind in kinds:
            better = together, config
            for change in kind(config):
                found = self._changed(config, change)
                if found is None or found[1].total >= least:
                    continue
                changed, fit = found
                least, better = fit.total, (together | dict(change), changed)
                if least <= limit:
                    return Remedy(_written(self._config, better[0]), fit)
            together, config = better
        return None

    def _trace(self, settings: str) -> Traced:
        config = type(self._config)(**json.loads(settings))
        return trace_of(self._stage, config, self._inputs, _world(config))

    def _changed(self, config: Any, change: Change) -> tuple[Any, Fit] | None:
        """The changed config and what it takes; None where the stage does not take it."""
        try:
            changed = type(config)(**config.model_dump(mode="json") | dict(change))
            if hasattr(self._stage, "check"):
                upstream = {name: source.config for name, source in self._inputs.items() if source.config}
                self._stage.check(changed, upstream)
        except (ValidationError, ValueError):
            return None
        try:
            return changed, self.fit(changed)
        except UserError:
            # such as too few tokens for a window
            return None


def _world(config: Any) -> int:
    # who starts the processes may be another launcher, and starts as many at least as share a window
    return int(max(config.run.launcher.processes, config.run.launcher.sequence))
