"""The weights in a checkpoint: `weights-RANK.safetensors`, with the fragments of the lead module that a rank
holds, and `NAME/weights-RANK.safetensors` with those of each other module.

A key is `KIND/START/NAME`: `KIND` is "raw" or an average's half-life, `START` the first of the tensor's flattened elements
that the piece holds. Put together they are the same for any number of ranks and any ZeRO stage.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longtake.datasets.errors import Failure, UserError
from longtake.training.engines import fragments
from longtake.training.engines.ema import Averages

RAW = "raw"


def name_of(rank: int) -> str:
    return f"weights-{rank:05d}.safetensors"


def write(folder: Path, rank: int, engine: Any, averages: Averages) -> None:
    """Write this rank's fragments of the weights, in fp32, and of their averages."""
    tensors, shapes = {}, {}
    for fragment in fragments(engine):
        tensors[f"{RAW}/{fragment.start}/{fragment.name}"] = fragment.value.contiguous()
        shapes[fragment.name] = list(fragment.shape)
    for life, values in averages.items():
        tensors |= {f"{life}/{start}/{name}": value for (name, start), value in values.items()}
    save_file(tensors, folder / name_of(rank), {"shapes": json.dumps(shapes)})


def damaged(path: Path, why: Exception) -> Failure:
    """The error that the checkpoint `path` cannot be read."""
    names = path.parent / "latest"
    cause = (str(why) or type(why).__name__).splitlines()[0]
    return Failure(
        f"{path}: damaged checkpoint ({cause}); write an older step's name into {names}, or delete it to start anew"
    )


class Weights(Mapping[str, Tensor]):
    """A module's state in a checkpoint, each tensor put together from its fragments when it is asked for.

    Args:
        path: the checkpoint's folder.
        kind: "raw", or an average by its half-life, such as "1000".
        module: name of the engine; nothing is the lead.

    Raises:
        UserError: the checkpoint holds no such weights.
        Failure: it is damaged.
    """

    def __init__(self, path: Path, kind: str = RAW, module: str = "") -> None:
        self._path = path
        self._pieces: dict[str, dict[str, list[tuple[int, Any, str]]]] = {}
        self._shapes: dict[str, list[int]] = {}
        try:
            for file in sorted((path / module).glob("weights-*.safetensors")):
                handle = safe_open(file, "pt")
                self._shapes |= json.loads(handle.metadata()["shapes"])
                for key in handle.keys():  # noqa: SIM118
                    what, start, name = key.split("/", 2)
                    self._pieces.setdefault(what, {}).setdefault(name, []).append((int(start), handle, key))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as e:
            raise damaged(path, e) from e
        if not self._shapes:
            raise damaged(path, FileNotFoundError("no weights"))
        if kind not in self._pieces:
            raise UserError(f"{path}: holds no weights {kind!r}; it has {', '.join(sorted(self._pieces))}")
        # what does not learn is its own average
        self._chosen = self._pieces[RAW] | self._pieces[kind]

    def read(self, name: str, start: int, count: int) -> Tensor:
        """`count` elements of a flattened tensor, from `start` on."""
        parts = []
        for begin, handle, key in sorted(self._chosen.get(name, ()), key=lambda piece: piece[0]):
            piece = handle.get_slice(key)
            size = piece.get_shape()[0]
            low, high = max(start, begin), min(start + count, begin + size)
            if low < high:
                parts.append(piece[low - begin : high - begin])
        flat = torch.cat(parts) if parts else torch.empty(0)
        if flat.numel() != count:
            raise damaged(self._path, ValueError(f"{name} is not whole"))
        return flat

    def __getitem__(self, name: str) -> Tensor:
        shape = torch.Size(self._shapes[name])
        return self.read(name, 0, shape.numel()).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
