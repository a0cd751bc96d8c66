"""Checking that a dataset's tars are what their indexes say."""

import hashlib
from collections.abc import Iterator

from longtake.datasets import index, schema, storage


def tars(dataset: str) -> list[tuple[str, str]]:
    """(split, name) of every committed tar, base and column alike."""
    found = []
    for split in schema.SPLITS:
        names = [
            n.removesuffix(".parquet") for n in storage.names(storage.join(dataset, split)) if n.endswith(".parquet")
        ]
        found += [(split, name) for name in names if not name.startswith(".")]
    return found


def problems(dataset: str, tar: tuple[str, str]) -> Iterator[str]:
    """A line for each way in which a tar differs from its index, with what to do about it."""
    split, name = tar
    shard = index.read_shard(dataset, split, name)
    url = storage.join(dataset, split, f"{name}.tar")
    remedy = f"delete {split}/{name.partition('.')[0]}.parquet and run the `shard` stage again"
    try:
        data = storage.retrying(url, lambda: storage.read(url))
    except FileNotFoundError:
        yield f"{url}: is missing; {remedy}"
        return
    if len(data) != shard.tar_bytes:
        yield f"{url}: {len(data)} bytes, the index says {shard.tar_bytes}; {remedy}"
    elif hashlib.sha256(data).hexdigest() != shard.tar_sha256:
        yield f"{url}: its bytes are not those that were committed; {remedy}"
    if "." in name:
        base = index.read_shard(dataset, split, name.partition(".")[0]).table
        if (
            base["key"].to_pylist() != shard.table["key"].to_pylist()
            or base["sha256"].to_pylist() != shard.table["base_sha256"].to_pylist()
        ):
            yield f"{url}: belongs to other clips than its base shard; {remedy}"
