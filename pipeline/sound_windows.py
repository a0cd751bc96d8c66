"""The sound of windows of clips, for tokens of them: samples of the column of sound, mixed to one channel.

A window of every `stride`-th frame has the sound of all its time, up to the frame that would follow. Where its clip ends
before, silence follows.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from isal import isal_zlib

from longtake.datasets import audio, index, storage
from longtake.datasets.errors import Failure
from longtake.pipeline import column as columns
from longtake.pipeline.windows import Row, Settings


class Sound(NamedTuple):
    """The sound of a base shard: the URL of its tar, and the rows of its index by the keys of clips."""

    tar: str
    rows: Mapping[str, Row]

    @property
    def silent(self) -> frozenset[str]:
        """The keys of clips without sound."""
        return frozenset(key for key, row in self.rows.items() if not row["has_audio"])


def sound_of(dataset: str, base: index.Shard) -> Sound:
    """The sound of a base shard. Raises Failure where there is none, or it is that of other clips."""
    name = f"{base.name}.{audio.COLUMN}"
    url = storage.join(dataset, base.split, name)
    if name not in index.shard_names(dataset, base.split, audio.COLUMN):
        raise Failure(f"{url}.tar: is missing; run a `cache_audio` stage")
    shard = index.read_shard(dataset, base.split, name)
    if not columns.fits(base, shard):
        raise Failure(f"{url}.tar: made from other clips; {audio.REMEDY}")
    return Sound(f"{url}.tar", {row["key"]: row for row in shard.table.to_pylist()})


def samples_of(sound: Sound, settings: Settings, row: Row) -> int:
    """Samples of a window of a clip."""
    return audio.samples_of(settings.frames * settings.stride, row, sound.rows[row["key"]]["rate"])


def sound_windows(sound: Sound, row: Row, settings: Settings) -> Iterator[np.ndarray]:
    """The sound of a clip's windows, (samples,) float32 each, mixed to one channel. Raises Failure where it is damaged."""
    own: Any = sound.rows[row["key"]]
    data, count, name = _bytes(sound.tar, own), samples_of(sound, settings, row), f"{sound.tar}: {row['key']}"
    for number in range(settings.windows(row)):
        begin = audio.offset_of(number * settings.hop, row, own["rate"])
        end = min(begin + count, own["samples"])
        heard = audio.decode(data, begin, end, own["channels"], name).mean(0)
        yield np.pad(heard, (0, begin + count - end))


def _bytes(tar: str, row: Row) -> bytes:
    try:
        data = storage.read_range(tar, row["offset"], row["size"])
    except FileNotFoundError as e:
        raise Failure(f"{tar}: is missing; run `longtake dataset verify`") from e
    if len(data) != row["size"] or isal_zlib.crc32(data) != row["crc32"]:
        raise Failure(f"{tar}: {row['key']}.{audio.ENDING}: is damaged; run `longtake dataset verify`")
    return data
