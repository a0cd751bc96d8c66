"""The sound of clips on the page: as the dataset has it, as long as the page does not become too large."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from isal import isal_zlib

from longtake.datasets import audio, index, storage
from longtake.infra.report.embed import data_uri

_SOUND_BYTES = 2_000_000  # of one sheet


def of_clips(dataset: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str] | None]:
    """For each clip the `uri` of its sound, or a few words on why it cannot be heard; None if the dataset has no such column.

    Args:
        rows: of schema.INDEX, with the `split`.
    """

    @cache
    def column(split: str, shard: str) -> dict[str, Any]:
        name = f"{shard}.{audio.COLUMN}"
        if name not in index.shard_names(dataset, split, audio.COLUMN):
            return {}
        return {row["key"]: row for row in index.read_shard(dataset, split, name).table.to_pylist()}

    players: list[dict[str, str] | None] = []
    room = _SOUND_BYTES
    for row in rows:
        sound = column(row["split"], row["shard"]).get(row["key"])
        player = _player(dataset, row, sound, room) if sound else None
        room -= sound["size"] if sound and player and "uri" in player else 0
        players.append(player)
    return players


def _player(dataset: str, clip: Mapping[str, Any], sound: Mapping[str, Any], room: int) -> dict[str, str]:
    if not sound["has_audio"]:
        return {"text": "no sound", "why": audio.REASONS.get(sound["reason"], sound["reason"])}
    if sound["size"] > room:
        return {"text": "sound left out", "why": f"longtake dataset show {dataset} {clip['key']} --save FOLDER"}
    tar = storage.join(dataset, clip["split"], f"{clip['shard']}.{audio.COLUMN}.tar")
    try:
        data = storage.read_range(tar, sound["offset"], sound["size"])
    except OSError as e:
        return {"text": "sound is missing", "why": str(e)}
    if isal_zlib.crc32(data) != sound["crc32"]:
        return {"text": "sound is damaged", "why": "run `longtake dataset verify`"}
    return {"uri": data_uri(audio.ENDING, data)}
