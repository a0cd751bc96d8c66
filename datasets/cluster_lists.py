"""The clips of a dataset by cluster, as files to search in: the centroids of clusters, the lists of their clips, and their checks.

Where they lie is in clusters.py; they are made by the `cluster` stage, and searched in alike.py.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from longtake.datasets import clusters, index, storage
from longtake.datasets.errors import Failure

LISTS, CENTROIDS = "vectors", "centroids.safetensors"  # in the folder of clusters

_READS = 16
_MOST_HEADER = 1 << 20
_CHUNK = 16 << 20  # bytes that are hashed at once


@dataclass(frozen=True)
class Lists:
    """The clips of some shards, by cluster: of each those at home in it, then those of others near to it, its visitors.

    url     of a safetensors file with vectors (N, D) float16, rows (N,) int64, starts (K+1,) and homes (K,) int64
    size    D
    places  byte in the file where a tensor begins
    clips   N
    count   K
    sums    the sha256 of each tensor
    """

    url: str
    size: int
    places: dict[str, int]
    clips: int
    count: int
    sums: dict[str, str]

    def bounds(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Of some clusters: where each begins and the last one ends (L+1,), and how many are at home in each (L,).

        Read when they are asked for: those of all clusters in all files are too many for memory.

        Raises Failure where the file is damaged.
        """
        starts = _read(self.url, self.places["starts"] + 8 * first, (last - first + 1,), np.int64)
        homes = _read(self.url, self.places["homes"] + 8 * first, (last - first,), np.int64)
        sizes = np.diff(starts)
        if starts[0] < 0 or starts[-1] > self.clips or (sizes < homes).any() or (homes < 0).any():
            raise Failure(
                f"{self.url}: not readable lists of clusters (they do not add up); delete it and run the `cluster` stage"
                " again"
            )
        return starts, homes

    def part(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows (N,) and vectors (N, D) float16, of a norm of about 1, from one place to another."""
        rows = _read(self.url, self.places["rows"] + 8 * first, (last - first,), np.int64)
        start = self.places["vectors"] + 2 * self.size * first
        return rows, _read(self.url, start, (last - first, self.size), np.float16)

    def homes_of(self, cluster: int) -> tuple[np.ndarray, np.ndarray]:
        starts, homes = self.bounds(cluster, cluster + 1)
        return self.part(int(starts[0]), int(starts[0] + homes[0]))


def _read(url: str, start: int, shape: tuple[int, ...], kind: type) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64))
    if not count:
        return np.empty(shape, kind)
    values: np.ndarray
    try:
        if storage.is_local(url):
            values = np.fromfile(storage.filesystem(url)[1], kind, count, offset=start)
        else:
            values = np.frombuffer(storage.read_range(url, start, count * np.dtype(kind).itemsize), kind)
        return values.reshape(shape)
    except (FileNotFoundError, ValueError) as e:
        raise Failure(f"{url}: missing or damaged; delete it and run the `cluster` stage again") from e


def read_lists(folder: str) -> list[Lists]:
    """Those of all clips in clusters. Raises Failure where a file is damaged."""
    with ThreadPoolExecutor(_READS) as pool:
        return list(pool.map(_open_lists, _files_of(folder)))


def _files_of(folder: str) -> list[str]:
    where = storage.join(folder, LISTS)
    names = storage.names(where)
    return [storage.join(where, name) for name in names if name.endswith(".safetensors") and not name.startswith(".")]


def _open_lists(url: str) -> Lists:
    try:
        length = int.from_bytes(storage.read_range(url, 0, 8), "little")
        if length > _MOST_HEADER:
            raise ValueError("its header is too large")
        header = json.loads(storage.read_range(url, 8, length))
        places = {name: 8 + length + header[name]["data_offsets"][0] for name in ("vectors", "rows", "starts", "homes")}
        count, size = header["vectors"]["shape"]
        (clusters_there,) = header["homes"]["shape"]
        sums = json.loads(header["__metadata__"]["sha256"])
        if (
            header["starts"]["shape"] != [clusters_there + 1]
            or header["rows"]["shape"] != [count]
            or sums.keys() != places.keys()
        ):
            raise ValueError("its clusters do not add up")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as e:
        raise Failure(
            f"{url}: not readable lists of clusters ({e}); delete it and run the `cluster` stage again"
        ) from e
    return Lists(url, size, places, count, clusters_there, sums)


def sums_of(tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The sha256 of each tensor's bytes, as the metadata of a file of them."""
    sums = {name: hashlib.sha256(np.ascontiguousarray(values).data).hexdigest() for name, values in tensors.items()}
    # in one entry: the order of several is left to chance
    return {"sha256": json.dumps(sums, sort_keys=True)}


def _check_sums(one: Lists) -> None:
    """Read all of a file. Raises Failure where a byte is another one."""
    sizes = {
        "vectors": 2 * one.size * one.clips,
        "rows": 8 * one.clips,
        "starts": 8 * (one.count + 1),
        "homes": 8 * one.count,
    }
    for name, size in sizes.items():
        digest = hashlib.sha256()
        for start in range(0, size, _CHUNK):
            digest.update(_read(one.url, one.places[name] + start, (min(_CHUNK, size - start),), np.uint8).data)
        if digest.hexdigest() != one.sums.get(name):
            raise Failure(
                f"{one.url}: not readable lists of clusters (its {name} have another checksum); delete it and run the"
                " `cluster` stage again"
            )
    one.bounds(0, one.count)


def write_centroids(folder: str, centres: np.ndarray) -> None:
    from safetensors.numpy import save

    tensors = {"centroids": centres}
    storage.write(storage.join(folder, CENTROIDS), save(tensors, sums_of(tensors)))


def read_centroids(folder: str) -> np.ndarray:
    """(K, D) float32. Raises Failure where they are missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    url = storage.join(folder, CENTROIDS)
    try:
        data = storage.read(url)
        centres = np.asarray(load(data)["centroids"], np.float32)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        if header["__metadata__"] != sums_of({"centroids": centres}):
            raise ValueError("another checksum")
    except (FileNotFoundError, SafetensorError, KeyError, ValueError) as e:
        raise Failure(f"{url}: missing or damaged; delete its folder and run the `cluster` stage again") from e
    return centres


def problems(dataset: str) -> Iterator[str]:
    """A line for each damage in the clusters of a dataset."""
    for digest in storage.names(storage.join(dataset, clusters.FOLDER)):
        folder = storage.join(dataset, clusters.FOLDER, digest)
        try:
            read_centroids(folder)
        except Failure as e:
            yield str(e)
        for url in _files_of(folder):
            try:
                _check_sums(_open_lists(url))
            except Failure as e:
                yield str(e)
        for name in storage.names(folder):
            for each in index.shard_names(folder, name) if name.startswith("pairs-") else ():
                try:
                    index.read_shard(folder, name, each)
                except Failure as e:
                    yield str(e)
