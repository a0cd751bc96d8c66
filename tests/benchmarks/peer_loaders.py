"""The loaders that bench_loader_peers.py compares ours with, in their own environment; its docstring says the rest.

ENV/bin/python peer_loaders.py export FOLDER
ENV/bin/python peer_loaders.py serve PEER FOLDER DECODER
ENV/bin/python peer_loaders.py resume PEER FOLDER WORKERS COUNT STATE
"""

import io
import json
import multiprocessing
import os
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

FRAMES, SIZE, BATCH, WORKERS = 17, 128, 8, 2


def window(count: int) -> list[int]:
    """The frames to take of a clip of `count`."""
    start = random.randrange(count - FRAMES + 1)
    return list(range(start, start + FRAMES))


class Pick:
    """A stored sample to what a training step sees of it."""

    def __init__(self, decoder: str) -> None:
        self.decoder = decoder

    def __call__(self, key: str, mp4: bytes, count: int) -> dict[str, Any]:
        if self.decoder == "none":
            return {"key": key}
        frames = window(count)
        if self.decoder == "decord":
            import decord

            video = decord.VideoReader(io.BytesIO(mp4), num_threads=1).get_batch(frames).asnumpy()
        else:
            from longtake.datasets import clip

            video = clip.decode(mp4, frames)
        top, left = (video.shape[1] - SIZE) // 2, (video.shape[2] - SIZE) // 2
        video = video[:, top : top + SIZE, left : left + SIZE]
        return {"key": key, "video": np.ascontiguousarray(video.transpose(3, 0, 1, 2))}


def stand_in() -> None:
    import transformers.feature_extraction_utils  # noqa: F401  looks for the true one

    def empty(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})

    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        module = ModuleType(name)
        module.__getattr__ = empty  # type: ignore[method-assign]
        module.__path__ = []
        sys.modules[name] = module


def tars(folder: Path) -> list[Path]:
    return sorted((folder / "ours" / "train").glob("?????.tar"))


def rows_of(folder: Path) -> list[tuple[str, str, int]]:
    """The key, the file and the number of frames of each clip."""
    return [tuple(row) for row in json.loads((folder / "clips.json").read_text())]


def of_webdataset(folder: Path, pick: Pick, workers: int) -> Any:
    import webdataset
    from torch.utils.data import default_collate

    def decode(sample: dict[str, Any]) -> dict[str, Any]:
        return pick(sample["__key__"], sample["mp4"], json.loads(sample["json"])["count"])

    shards = [str(tar) for tar in tars(folder)]
    samples = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(500).map(decode)
    batches = samples.batched(BATCH, collation_fn=default_collate)
    return webdataset.WebLoader(batches, batch_size=None, num_workers=workers, persistent_workers=True)


def of_litdata(folder: Path, pick: Pick, workers: int) -> Any:
    import litdata

    class Clips(litdata.StreamingDataset):
        def __getitem__(self, at: Any) -> dict[str, Any]:
            return pick(**super().__getitem__(at))

    clips = Clips(str(folder / "litdata"), shuffle=True)
    return litdata.StreamingDataLoader(clips, batch_size=BATCH, num_workers=workers, persistent_workers=True)


def of_streaming(folder: Path, pick: Pick, workers: int) -> Any:
    stand_in()
    import streaming

    class Clips(streaming.StreamingDataset):
        def __getitem__(self, at: Any) -> dict[str, Any]:
            return pick(**super().__getitem__(at))

    clips = Clips(local=str(folder / "streaming"), shuffle=True, batch_size=BATCH)
    return streaming.StreamingDataLoader(clips, batch_size=BATCH, num_workers=workers, persistent_workers=True)


def of_energon(folder: Path, pick: Pick, workers: int) -> Any:
    from megatron import energon
    from torch.utils.data import default_collate

    @energon.stateless
    def cook(sample: dict[str, Any]) -> dict[str, Any]:
        about = json.loads(sample["json"])
        return energon.basic_sample_keys(sample) | {"mp4": sample["mp4"], "count": about["count"]}

    class Task(energon.DefaultTaskEncoder):
        decoder = None  # neither its own of videos nor its own of JSON
        cookers = (energon.Cooker(cook),)

        # a sample and a batch without `__restore_key__` could not be restored by themselves
        @energon.stateless
        def encode_sample(self, sample: dict[str, Any]) -> dict[str, Any]:
            picked = pick(sample["__key__"], sample["mp4"], sample["count"])
            return {"__restore_key__": sample["__restore_key__"], "picked": picked}

        # not its own, which pads, and copies once more into shared memory
        @energon.stateless
        def batch(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
            return {"__restore_key__": ()} | default_collate([sample["picked"] for sample in samples])

    resumes = pick.decoder == "none"
    clips = energon.get_train_dataset(
        folder / "energon",
        batch_size=BATCH,
        shuffle_buffer_size=100,
        max_samples_per_sequence=100,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=workers),
        task_encoder=Task(),
        repeat=not resumes,
    )
    return energon.get_savable_loader(clips) if resumes else energon.get_loader(clips)


@dataclass
class Stages:
    """What SPDL does with a clip, named by its place in `rows`, and with a batch."""

    rows: list[tuple[str, str, int]]
    pick: Pick

    def sample(self, at: int) -> dict[str, Any]:
        key, file, count = self.rows[at]
        return self.pick(key, Path(file).read_bytes(), count)

    def batch(self, places: list[int]) -> dict[str, Any]:
        from torch.utils.data import default_collate

        return default_collate([self.sample(at) for at in places])

    def frames(self, at: int) -> tuple[str, list[Any]]:
        import spdl.io

        key, file, count = self.rows[at]
        packets = spdl.io.demux_video(Path(file).read_bytes())
        cropped = spdl.io.get_video_filter_desc(crop_width=SIZE, crop_height=SIZE, pix_fmt="rgb24")
        return key, spdl.io.sample_decode_video(packets, window(count), filter_desc=cropped)

    def merged(self, samples: list[tuple[str, list[Any]]]) -> dict[str, Any]:
        import spdl.io

        buffer = spdl.io.convert_frames([frame for _, frames in samples for frame in frames])
        video = spdl.io.to_torch(buffer).view(len(samples), FRAMES, SIZE, SIZE, 3)
        return {"key": [key for key, _ in samples], "video": video.permute(0, 4, 1, 2, 3).contiguous()}


def of_spdl(folder: Path, pick: Pick, workers: int, processes: bool = False) -> Any:
    from spdl.pipeline import PipelineBuilder
    from spdl.pipeline.defs import MAIN_PROCESS, ProcessPoolExecutorConfig
    from spdl.source import DistributedRandomSampler
    from spdl.source.utils import embed_shuffle
    from torch.utils.data import default_collate

    stages = Stages(rows_of(folder), pick)
    order = embed_shuffle(DistributedRandomSampler(len(stages.rows), rank=0, world_size=1))
    builder = PipelineBuilder().add_source(order, continuous=True)
    if processes:
        builder.aggregate(BATCH).to(ProcessPoolExecutorConfig(max_workers=workers))
        builder.pipe(stages.batch).to(MAIN_PROCESS)
    elif pick.decoder == "spdl.io":
        builder.pipe(stages.frames, concurrency=workers).aggregate(BATCH).pipe(stages.merged)
    else:
        builder.pipe(stages.sample, concurrency=workers).aggregate(BATCH).pipe(default_collate)
    pipeline = builder.add_sink(2 * workers).build(num_threads=workers)
    pipeline.start()
    return pipeline


PEERS: dict[str, Callable[[Path, Pick, int], Any]] = {
    "webdataset": of_webdataset,
    "litdata": of_litdata,
    "streaming": of_streaming,
    "energon": of_energon,
    "spdl": of_spdl,
    "spdl-mp": partial(of_spdl, processes=True),
}


def decoders(peer: str) -> tuple[str, ...]:
    return ("clip.decode", "decord", *(["spdl.io"] if peer == "spdl" else []))


def stored(row: tuple[str, str, int]) -> dict[str, Any]:
    return {"key": row[0], "mp4": Path(row[1]).read_bytes(), "count": row[2]}


def export(folder: Path) -> None:
    """Write the clips as litdata and streaming have them, and what Energon keeps beside tars."""
    rows = rows_of(folder)
    import litdata

    litdata.optimize(stored, rows, str(folder / "litdata"), chunk_bytes="64MB", num_workers=1, verbose=False)
    stand_in()
    import streaming

    columns = {"key": "str", "mp4": "bytes", "count": "int"}
    with streaming.MDSWriter(out=str(folder / "streaming"), columns=columns) as out:
        for row in rows:
            out.write(stored(row))
    from megatron.energon.flavors import BaseWebdatasetFactory

    where = folder / "energon"
    where.mkdir()
    for tar in tars(folder):
        (where / tar.name).hardlink_to(tar)
    names = [tar.name for tar in tars(folder)]
    BaseWebdatasetFactory.prepare_dataset(where, names, split_parts_ratio=[("train", 1)], shuffle_seed=None, workers=1)
    (where / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")


def serve(name: str, folder: Path, decoder: str) -> None:
    """Take as many batches as each line of stdin says."""
    loader = PEERS[name](folder, Pick(decoder), WORKERS)

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    stream = endless()
    for line in sys.stdin:
        taken = [len(batch["key"]) for batch in islice(stream, int(line))]
        print(f"taken {sum(taken)}", flush=True)


def resume(name: str, folder: Path, workers: int, count: int, state: Path) -> None:
    """Go on from the state, if there is one; after `count` batches save it anew. Prints the keys that came."""
    loader = PEERS[name](folder, Pick("none"), workers)
    energon = name == "energon"
    save = getattr(loader, "save_state_rank" if energon else "state_dict", None)
    if state.exists():
        restore = loader.restore_state_rank if energon else loader.load_state_dict
        restore(pickle.loads(state.read_bytes()))
    keys = []
    for number, batch in enumerate(loader, 1):
        keys += batch["key"]
        if number == count:
            if save:
                state.write_bytes(pickle.dumps(save()))
            break
    print(f"keys {json.dumps(keys)}", flush=True)
    # they are in the middle of their work, and not all would see that their parent has ended
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(0)


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    if what == "export":
        export(Path(given[0]))
    elif what == "serve":
        serve(given[0], Path(given[1]), given[2])
    else:
        resume(given[0], Path(given[1]), int(given[2]), int(given[3]), Path(given[4]))
