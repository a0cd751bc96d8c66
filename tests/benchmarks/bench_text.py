"""Planning the token states of a million captions, and reading states through the loader.

    python tests/benchmarks/bench_text.py [--clips 1000000] [--shard 1000] [--tokens 512] [--width 4096] [--turns 5]

`plan`: a synthetic dataset of indexes and a column of captions, of which a tenth is shared by many clips. What is measured
    is what the driver of `cache_text` does before any text is encoded: find the shards to make, count the captions of all
    by their sha, and list those that several shards have. The target is a minute.
`again`: the same when every shard has its texts, which a run finds that has nothing to do.
`load`: batches of states through `Loader(columns=("text-...",))`, against reading the same bytes in the same order by
    `os.pread` alone, with the CRC-32 that the loader checks, and with the copy into one array besides. Taken in turns;
    what is printed is the median of each and of the ratios.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from typing import Any

import figures
import numpy as np
import pyarrow as pa
import torch

from longtake.datasets import captions, index, schema, storage, text
from longtake.datasets.loader import Loader
from longtake.pipeline import column as columns
from longtake.pipeline import shared_text
from longtake.pipeline.commit import store_tar
from longtake.pipeline.text import Work, missing

CAPTION, TEXT = "caption-5eed", "text-5eed"
BATCH = 8


def make_base(root: str, shards: int, clips: int) -> None:
    """The indexes of a dataset whose tars nobody reads."""
    storage.write(f"{root}/dataset.json", storage.canonical_json({"format": schema.FORMAT_VERSION}))
    for number in range(shards):
        keys = [f"{number:010x}{n:010x}-00000" for n in range(clips)]
        filled = {"key": keys, "sha256": [f"{key[:20]:0>64}" for key in keys], "source": [key[:20] for key in keys]}
        filled |= {"frame_count": [48] * clips, "fps": [24.0] * clips, "height": [64] * clips, "width": [64] * clips}
        table = pa.table(
            {
                f.name: pa.array(filled.get(f.name), f.type) if f.name in filled else pa.nulls(clips, f.type)
                for f in schema.INDEX
            }
        )
        index.write_index(f"{root}/train/{number:05d}.parquet", table.to_pylist(), schema.INDEX, 0, "")


def make_captions(root: str, shards: int, clips: int) -> None:
    """A caption a clip: nine of ten of its own, the tenth one of a thousand."""
    for number in range(shards):
        rows = []
        for n, row in enumerate(
            index.read_shard(root, "train", f"{number:05d}").table.select(["key", "sha256"]).to_pylist()
        ):
            own = (
                f"clip {row['key'][:20]} shows a person who walks a dog through a park on a sunny day, seen from behind"
            )
            said = captions.Caption(own if n % 10 else f"class {(number * clips + n) // 10 % 1000}")
            rows.append(captions.row_of(row, [said], None, ""))
        index.write_table(f"{root}/train/{number:05d}.{CAPTION}.parquet", rows, schema.CAPTION_INDEX)


def make_texts(root: str, tokens: int, width: int) -> None:
    """Random states for every caption of each shard; with `tokens` 0 none are written, and indexes say that they are there."""
    rng = np.random.default_rng(0)
    bits = torch.from_numpy(rng.integers(0, 1 << 14, (max(1, tokens), width), np.uint16)).view(torch.bfloat16)
    for name in index.shard_names(root, "train"):
        base, said = (index.read_shard(root, "train", n) for n in (name, f"{name}.{CAPTION}"))
        spans = [text.spans_of(row) for row in said.table["captions"].to_pylist()]
        shas = sorted({span.sha for row in spans for span in row or ()})
        url, size, digest = f"{root}/train/{name}.{TEXT}", 0, ""
        places = {sha: text.Stored(url, 0, 128 + 2 * width, 0, 1) for sha in shas}
        if tokens:
            members, size, digest = store_tar(f"{url}.tar", ((sha, {"npy": text.packed(bits)}) for sha in shas))
            places = {m.key: text.Stored(url, m.offset, m.size, m.crc32, tokens) for m in members}
        notes = {"captions": CAPTION, "captions_sha256": said.rows_sha256, "width": width}
        index.write_index(
            f"{url}.parquet", text.rows_of(base.table, spans, places), schema.TEXT_INDEX, size, digest, notes
        )


def planned(root: str, output: str) -> dict[str, float]:
    """Seconds of each step of planning."""
    start = time.perf_counter()
    base = columns.open_base(root, None)
    opened = time.perf_counter()
    jobs = [job for split, keeps in base.keeps.items() for job in missing(root, split, TEXT, CAPTION, keeps)]
    found = time.perf_counter()
    seconds = {"open": opened - start, "missing": found - opened}
    if jobs:
        count = shared_text.count(root, CAPTION, base.keeps)
        counted = time.perf_counter()
        parts = shared_text.plan(Work(root, TEXT, CAPTION, 64), count.shared, jobs, output)
        seconds |= {"count": counted - found, "list shared": time.perf_counter() - counted}
        print(f"  {count.captions} captions, {count.distinct} distinct, {len(count.shared)} shared, {len(parts)} parts")
    return seconds | {"all": time.perf_counter() - start}


def clocked(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def loading(root: str, tokens: int, width: int, turns: int) -> dict[str, float]:
    loader = Loader(root, columns=(TEXT,), frames=1, size=(64, 64), batch=BATCH, shuffle=False, epochs=1)
    places = []
    for shard in index.read_shards(root, "train", TEXT):
        handle = os.open(f"{root}/train/{shard.name}.tar", os.O_RDONLY)
        places += [(handle, row["texts"][0]) for row in shard.table.to_pylist()]
    batches = [places[n : n + BATCH] for n in range(0, len(places), BATCH)]

    def load() -> None:
        for batch in loader:
            assert batch["text"].shape == (BATCH, tokens, width)
        loader.load_state_dict(loader.state_dict() | {"taken": 0})

    def read(check: bool = False, copy: bool = False) -> None:
        for batch in batches:
            out = np.empty((len(batch), tokens, width), np.uint16) if copy else None
            for n, (handle, entry) in enumerate(batch):
                data = os.pread(handle, entry["size"], entry["offset"])
                assert not check or zlib.crc32(data) == entry["crc32"]
                if out is not None:
                    out[n] = np.frombuffer(data, np.uint16, offset=128).reshape(tokens, width)

    works = {
        "loader": load,
        "bytes": read,
        "bytes, crc": lambda: read(check=True),
        "bytes, crc, copy": lambda: read(check=True, copy=True),
    }
    for work in works.values():
        work()
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns):
        for name, work in works.items():
            taken[name].append(clocked(work))
    size = len(places) * tokens * width * 2
    for name, seconds in taken.items():
        ratio = statistics.median(t / o for t, o in zip(seconds, taken["loader"], strict=True))
        print(f"  {name:17s} {size / statistics.median(seconds) / 1e9:6.2f} GB/s, {ratio:5.2f} of the loader's time")
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--shard", type=int, default=1000, help="clips in a shard")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--only", choices=("plan", "load"))
    figures.add_option(parser, turns=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.only != "load":
            root = f"{folder}/plan"
            make_base(root, arguments.clips // arguments.shard, arguments.shard)
            make_captions(root, arguments.clips // arguments.shard, arguments.shard)
            print("plan:")
            plans = [planned(root, f"{folder}/out-{turn}") for turn in range(arguments.turns)]
            result["plan"] = {part: statistics.median(plan[part] for plan in plans) for part in plans[0]}
            print(f"  {result['plan']}")
            figures.write(arguments.figures, {"plan": [plan["all"] for plan in plans]})
            make_texts(root, 0, 8)
            print("again:")
            result["again"] = planned(root, f"{folder}/out")
            print(f"  {result['again']}")
        if arguments.only != "plan":
            root = f"{folder}/load"
            make_base(root, 2, 40)
            make_captions(root, 2, 40)
            make_texts(root, arguments.tokens, arguments.width)
            print(f"load: {arguments.tokens} tokens of {arguments.width} values, batches of {BATCH}")
            result["load"] = loading(root, arguments.tokens, arguments.width, arguments.turns)
        print(json.dumps(result))
