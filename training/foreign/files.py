"""The files of one part of a pipeline: JSON of sane size, and weights as safetensors, whole and no pickles; their digests."""

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from longtake.datasets.errors import UserError
from longtake.datasets.masking import shown

_MOST_JSON, _MOST_INDEX = 4 << 20, 64 << 20  # bytes of a config; of an index of weights
_MOST_HEADER = 100 << 20  # of a safetensors header, as the format has it
_BASES = ("diffusion_pytorch_model", "model")  # names of weights by diffusers and by transformers
_PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl", "*.msgpack", "*.h5")
_FILE = re.compile(r"\w[\w.-]*\.safetensors")
_SHARD = re.compile(r".*-\d{5}-of-\d{5}(\.\w+)?\.safetensors")


class Tensor(NamedTuple):
    """What the header of a safetensors file says of a tensor: `dtype` such as "BF16", and its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int


def weights_of(folder: Path, class_name: str) -> list[Path]:
    """The files of a part's weights, and their index where there is one; all of them are there and whole.

    Those without a variant such as fp16 in their name are taken, else those of the only variant.

    Raises:
        UserError: there are none, or pickles alone; two sets of which either may be meant; half a download.
    """
    broken = [path for path in sorted(folder.glob("*.safetensors*")) if path.is_symlink() and not path.exists()]
    if broken:
        raise UserError(f"{broken[0]}: is a link to a file that is not there: half a download; download it again")
    choices = list(_choices(folder))
    plain = [choice for choice in choices if not choice[1]]
    chosen = plain or choices
    if not chosen:
        raise UserError(_why_no_weights(folder, class_name))
    if len(chosen) > 1:
        one, other = (choice[0].name for choice in chosen[:2])
        raise UserError(f"{folder}: has both {one} and {other}, and only one can be meant; delete the other")
    first = chosen[0][0]
    files = [first] if first.suffix == ".safetensors" else [first, *_indexed(first)]
    for path in files:
        if path.suffix == ".safetensors":
            tensors_in(path)
    return files


def _choices(folder: Path) -> Iterator[tuple[Path, str]]:
    """The single files of weights and the indexes of several, each with its variant, such as "fp16"; empty for none."""
    for path in sorted(folder.glob("*.safetensors*")):
        for base in _BASES:
            single = re.fullmatch(rf"{base}(?:\.(\w+))?\.safetensors", path.name)
            index = re.fullmatch(rf"{base}\.safetensors\.index(?:\.(\w+))?\.json", path.name)
            if found := single or index:
                yield path, found[1] or ""


def _indexed(index: Path) -> list[Path]:
    """The files that an index names. Raises UserError: it is damaged, or they are not all there."""
    content = read_json(index, _MOST_INDEX).get("weight_map")
    where = content if isinstance(content, dict) else {}
    names = {str(name) for name in where.values()}
    if not names or not all(_FILE.fullmatch(name) for name in names):
        raise UserError(f"{index}: names no files of weights; copy or download it again")
    paths = [index.parent / name for name in sorted(names)]
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(
            f"{index.parent}: half a download: {index.name} names {len(paths)} files, and {len(missing)} are missing,"
            f" such as {missing[0].name}{_begun(index.parent)}; copy or download the whole folder"
        )
    stored = {name for path in paths for name in tensors_in(path)}
    if lost := sorted(where.keys() - stored):
        raise UserError(f"{index}: names {shown(lost[0])[:80]}, which no file has; copy or download the whole folder")
    return paths


def _why_no_weights(folder: Path, class_name: str) -> str:
    """Why a part has no weights, and the remedy."""
    shards = [path.name for path in sorted(folder.glob("*.safetensors")) if _SHARD.fullmatch(path.name)]
    if shards:
        return (
            f"{folder}: half a download: has {shards[0]}, but no index of its files; copy or download the whole folder"
        )
    if pickles := sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
        return (
            f"{folder}: has its weights in {pickles[0]}, a pickle, which may run code when it is read; convert it where you"
            f" trust it: `{class_name}.from_pretrained(FOLDER).save_pretrained(FOLDER)`"
        )
    if begun := _begun(folder):
        return f"{folder}: half a download{begun}; copy or download the whole folder"
    return f"{folder}: has no weights ({' or '.join(f'{base}.safetensors' for base in _BASES)}); copy or download the whole folder"


def _begun(folder: Path) -> str:
    """What an unfinished download has left, for a message."""
    # beside the file, or where the hub's client keeps them for a part of a pipeline, or a part alone
    hidden = Path(".cache", "huggingface", "download")
    places = (folder, folder.parent / hidden / folder.name, folder / hidden)
    begun = [
        path.name for place in places for pattern in ("*.incomplete", "*.part") for path in sorted(place.glob(pattern))
    ]
    return f" ({begun[0][:80]} is unfinished)" if begun else ""


def tensors_in(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, by its header. Raises UserError: it is damaged or not whole."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            start = f.read(8)
            length = int.from_bytes(start, "little")
            header = f.read(length) if length <= min(size, _MOST_HEADER) else b""
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}; give read permission, or copy it again") from e
    if start == b"version ":
        raise UserError(f"{path}: is a pointer of git-lfs and not the file; run `git lfs pull` there")
    try:
        content = json.loads(header)
        facts = {name: each for name, each in content.items() if name != "__metadata__"}
        spans = {name: (int(each["data_offsets"][0]), int(each["data_offsets"][1])) for name, each in facts.items()}
        tensors = {
            name: Tensor(str(each["dtype"]), tuple(map(int, each["shape"])), spans[name][1] - spans[name][0])
            for name, each in facts.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as e:
        raise UserError(f"{path}: is damaged or half a download; copy or download it again") from e
    if size != (whole := 8 + length + max((end for _, end in spans.values()), default=0)):
        raise UserError(f"{path}: has {size} bytes of {whole}: half a download; copy or download it again")
    return tensors


def read_json(path: Path, most: int = _MOST_JSON) -> dict[str, Any]:
    """A JSON object of a file of at most `most` bytes. Raises UserError."""
    try:
        if path.stat().st_size > most:
            raise ValueError(f"larger than {most} bytes")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: damaged ({shown(' '.join(str(e).split()))[:120]}); copy or download it again") from e
    return content


def file_digests(files: Mapping[str, Path]) -> dict[str, str]:
    """The sha256 of files, several at a time. One that has not changed since is not read again by this process."""
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(files, pool.map(_digest_of_file, files.values()), strict=True))


def _digest_of_file(path: Path) -> str:
    try:
        facts = path.stat()
        return _sha256(path, facts.st_ino, facts.st_size, facts.st_mtime_ns)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}; give read permission, or copy it again") from e


@functools.lru_cache(4096)
def _sha256(path: Path, inode: int, size: int, changed: int) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
