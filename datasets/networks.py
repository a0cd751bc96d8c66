"""Networks that others made: which of their files are read, and what these must not be. Nothing is downloaded or unpickled."""

import importlib
import io
import json
import re
import warnings
import zipfile
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import TYPE_CHECKING, Any

from longtake.datasets.errors import UserError, not_installed

if TYPE_CHECKING:
    import torch

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
_REACHES_OUT = re.compile(r"\b(?:save|from_file|rpc_\w+)\s*\(|(?<![\w.])ops\.(?!prim\.|aten\.|quantized\.)\w+")
_CODE_BYTES = 64 << 20  # of the text of a TorchScript archive's code, at most
_UNFOLDED = 4  # bytes of an archive's members a byte of the archive, at most: `torch.jit.save` does not compress


def imported(name: str, key: str = "encoder", extra: str = "text") -> ModuleType:
    """A module of an extra. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise not_installed(name, extra, key) from e


def files_of(folder: Path, key: str = "encoder") -> list[Path]:
    """The files of a model: its weights, their index where there is one, and its config. Raises as `weights_of`."""
    beside = (folder / name for name in (WEIGHTS_INDEX, "config.json"))
    return weights_of(folder, key) + [path for path in beside if path.is_file()]


def weights_of(folder: Path, key: str = "encoder") -> list[Path]:
    """The files of a model's weights, sorted. UserError, with the setting `key`: they are missing, ambiguous, or could run code."""
    if (folder / WEIGHTS_INDEX).is_file() and (folder / WEIGHTS).is_file():
        raise UserError(
            f"{key}: {folder}: has both {WEIGHTS} and {WEIGHTS_INDEX}, and only one can be meant; delete the other"
        )
    names = _named(folder / WEIGHTS_INDEX, key) if (folder / WEIGHTS_INDEX).is_file() else {WEIGHTS}
    paths = sorted(folder / name for name in names)
    missing = [path for path in paths if not path.is_file()]
    if not missing:
        return paths
    if pickles := sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
        raise UserError(
            f"{key}: {folder}: has its weights in {pickles[0]}, which may run code when it is read;"
            " convert them to safetensors (`model.save_pretrained(folder)`)"
        )
    raise UserError(f"{key}: {folder}: {missing[0].name} is missing; copy the whole model there, as safetensors")


def _named(index: Path, key: str) -> set[str]:
    """The names of files in an index of weights. Raises UserError: it is damaged, or names others than safetensors beside it."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        paths = {PurePosixPath(name) for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{key}: {index}: damaged ({e}); copy it again") from e
    if not names or any(path.name != str(path) or path.suffix != ".safetensors" for path in paths):
        raise UserError(f"{key}: {index}: names other files than safetensors beside it; copy the whole model again")
    return names


def is_torchscript(data: bytes) -> bool:
    """Whether a file's bytes are a TorchScript archive. Nothing of it is loaded."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return any(PurePosixPath(name).name == "constants.pkl" for name in archive.namelist())
    # the third where an archive asks for a later version of zip
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def load_torchscript(data: bytes, source: str, device: "torch.device | str") -> Any:
    """The module of a TorchScript archive. UserError for anything else, and for code that reaches out of its process.

    An archive is code, and what it gives is made by running it: it must come from a place that is trusted.
    """
    import torch

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            code = [member for member in members if member.filename.endswith(".py")]
            unfolded = sum(member.file_size for member in members)
            if unfolded > _UNFOLDED * len(data) + _CODE_BYTES or sum(member.file_size for member in code) > _CODE_BYTES:
                raise UserError(f"{source}: unfolds to {unfolded} bytes; write it again with `torch.jit.save`")
            for member in code:
                if call := _REACHES_OUT.search(archive.read(member).decode(errors="replace")):
                    reach = call.group().rstrip("( ")
                    raise UserError(f"{source}: its code calls {reach}, which a network has no use for")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the published I3D comes in no other format
            return torch.jit.load(io.BytesIO(data), map_location=device)
    # the third where a member is packed in a way that zipfile does not know
    except (RuntimeError, zipfile.BadZipFile, NotImplementedError, OSError) as e:
        why = str(e).strip().splitlines()[0][:120] if str(e).strip() else type(e).__name__
        raise UserError(f"{source}: not a TorchScript archive ({why})") from None
