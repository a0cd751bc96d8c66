"""Deterministic WebDataset tars, and reading their members by byte offset."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isal import isal_zlib


@dataclass(frozen=True)
class Member:
    """One file of a tar: byte offset and size of its data, its sha256 (hex) and its CRC-32."""

    key: str
    extension: str
    offset: int
    size: int
    sha256: str
    crc32: int


def write_tar(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> list[Member]:
    """Write `(key, {extension: data})` samples in the order given; the same samples give the same bytes."""
    members = []
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, parts in samples:
            for extension, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                info.mode = 0o644
                tar.addfile(info, io.BytesIO(data))
                # `tar.offset` is now behind the padded data
                offset = tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                digests = hashlib.sha256(data).hexdigest(), isal_zlib.crc32(data)
                members.append(Member(key, extension, offset, len(data), *digests))
    return members


def described(data: bytes) -> dict[str, Any]:
    """The JSON of a sample from its .json, or a caption from the .txt of an image; empty where there is neither.

    Raises:
        ValueError: it is no JSON.
    """
    if data.lstrip()[:1] == b"{":
        return dict(json.loads(data))
    return {"caption": data.decode("utf-8", "replace").strip()} if data else {}


def sha256_of(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
