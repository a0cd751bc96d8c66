"""The scorer `torchscript`: a number or a vector from a network that was saved as TorchScript.

A TorchScript file is code, and scoring runs it: name only files that you trust.
"""

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np
from pydantic import Field as Setting

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.networks import is_torchscript, load_torchscript
from longtake.datasets.pictures import Located, first_line
from longtake.datasets.scores import Field
from longtake.datasets.stage import StageConfig
from longtake.pipeline.exact import be_exact
from longtake.pipeline.scorers.one_by_one import OneByOne, Pool, pooled
from longtake.pipeline.scorers.scorer import Scorer, Values

_REMEDY = "write one with `torch.jit.script(model).save(...)`"


class Config(StageConfig):
    """A network of yours: frames (B, 3, size, size) float32 in 0..1 to (B, 1), a number, or to (B, D), a vector.

    The number is the field `value`, the vector the field `vector`, as the network gives it.

    file     TorchScript, which is code and is run: a file that you trust
    size     pixels a side; frames are scaled to cover it, and their centre is cropped
    frames   of a clip, spread evenly
    pool     how the values of a clip's frames become the clip's: mean, max or min
    """

    file: Located
    size: int = Setting(224, ge=1, le=4096)
    frames: int = Setting(4, ge=1, le=64)
    pool: Pool = "mean"

    def decisive(self, settings: dict[str, Any]) -> dict[str, Any]:
        # its digest decides, wherever it is
        return {name: value for name, value in settings.items() if name != "file"}


class Script:
    """A network from a TorchScript file, on its device."""

    def __init__(self, file: str, size: int, device: str, key: str = "file") -> None:
        """Raises UserError: no such file, no TorchScript, or it does not give (B, D) for (B, 3, size, size)."""
        self._file, self._device = file, device
        module = load_torchscript(script_bytes(file, key), f"{key}: {file}", device)
        self._module = module.eval()
        try:
            self.width = self(np.zeros((1, size, size, 3), np.uint8)).shape[1]
        except Failure as e:
            raise UserError(f"{key}: {e}; change `size`, or name another file") from e

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """(N, D) float32 of frames (N, H, W, 3) uint8. Raises Failure where the network does not give that."""
        import torch

        shown = torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2))).to(self._device).float() / 255
        try:
            # without it the first calls would give other last bits than those after them
            with torch.inference_mode(), torch.jit.optimized_execution(False):
                out = self._module(shown)
        except torch.OutOfMemoryError as e:
            raise Failure(f"{self._file}: a clip's frames do not fit into the GPU's memory; lower `frames`") from e
        except Exception as e:  # the code of a network raises what it likes
            why = storage.printable(str(e).strip().splitlines()[-1])[:200] if str(e).strip() else "an error"
            raise Failure(f"{self._file}: does not take {tuple(shown.shape)} float32 ({why})") from e
        if not isinstance(out, torch.Tensor) or out.ndim != 2 or len(out) != len(shown) or not out.shape[1]:
            what = f"{tuple(out.shape)}" if isinstance(out, torch.Tensor) else type(out).__name__
            raise Failure(f"{self._file}: gives {what} for {len(shown)} frames; ({len(shown)}, D) numbers are needed")
        return np.asarray(out.float().cpu().numpy())


def script_bytes(file: str, key: str = "file") -> bytes:
    """The bytes of a TorchScript file. Raises UserError where there is none; a pickle is not looked into."""
    try:
        data = storage.read(file)
    except (FileNotFoundError, IsADirectoryError) as e:
        raise UserError(f"{key}: {file}: no such file; {_REMEDY}") from e
    except OSError as e:
        raise UserError(f"{key}: {file}: cannot be read ({first_line(e)}); give read permission") from e
    if not is_torchscript(data):
        raise UserError(f"{key}: {file}: not a TorchScript file, and so not opened; {_REMEDY}")
    return data


@lru_cache(maxsize=8)
def _width(file: str, digest: str, size: int, key: str) -> int:
    return Script(file, size, "cpu", key).width


def width_of(file: str, size: int, key: str = "file") -> int:
    """D of what a file's network gives. Raises UserError as `Script`."""
    return _width(file, digest_of(file, key), size, key)


def digest_of(file: str, key: str = "file") -> str:
    """The sha256 of a TorchScript file. Raises UserError where it is none."""
    return hashlib.sha256(script_bytes(file, key)).hexdigest()


def _fields(config: Config) -> tuple[Field, ...]:
    width = width_of(config.file, config.size)
    if width == 1:
        return (Field("value", "number", f"the network's number, {config.pool} over frames"),)
    return (Field("vector", "vector", f"the network's vector, {config.pool} over frames", width=width),)


def _load(config: Config, device: str) -> OneByOne:
    be_exact()
    script = Script(config.file, config.size, device)

    def values(frames: np.ndarray) -> Values:
        value = pooled(script(frames), config.pool)
        return {"value": float(value[0])} if script.width == 1 else {"vector": value.astype(np.float32)}

    return OneByOne(config.frames, (config.size, config.size), values)


SCORER = Scorer(Config, 1, _fields, _load, lambda config: digest_of(config.file), gpu=True)
