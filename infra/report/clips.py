"""The clips of a dataset on the page: contact sheets with their sound, and histograms, kept beside dropped."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longtake.datasets import clip, index, schema, storage
from longtake.infra.report import pictures, sounds, words
from longtake.infra.report.embed import Pictures, data_uri

MOST_KEPT, MOST_DROPPED = 48, 24
_FRAMES, _HEIGHT = 4, 96
_LEAST_MOTION = 1e-5  # of a still clip, since a log axis has no zero
_T = TypeVar("_T")


def load(dataset: str, view: pa.Table | None) -> pa.Table:
    """The index of all clips with their split, and the view's `keep`, `reason` and values of scores (NAME.FIELD)."""
    tables = [index.read_all(dataset, split) for split in schema.SPLITS]
    splits = pa.array([s for s, t in zip(schema.SPLITS, tables, strict=True) for _ in range(len(t))], pa.string())
    clips = pa.concat_tables(tables).append_column("split", splits)
    if view is None:
        keep, reason = pa.repeat(True, len(clips)), pa.nulls(len(clips), pa.string())
    else:
        rows = pc.index_in(clips["key"], value_set=view["key"].combine_chunks())
        keep = pc.fill_null(view["keep"].take(rows), False)
        reason = pc.if_else(pc.is_valid(rows), view["reason"].take(rows), "not in the view")
        for name in view.column_names[len(schema.VIEW) :]:
            clips = clips.append_column(name, view[name].take(rows))
    return clips.append_column("keep", keep).append_column("reason", reason)


def spread(sources: Sequence[_T], most: int) -> list[int]:
    """Numbers of at most `most` clips from as many sources as possible; `sources` has one entry a clip."""
    counts = Counter[_T]()
    rounds: dict[int, list[int]] = {}
    for i, source in enumerate(sources):
        rounds.setdefault(counts[source], []).append(i)
        counts[source] += 1
    chosen: list[int] = []
    for _, members in sorted(rounds.items()):
        room = min(most - len(chosen), len(members))
        chosen += [members[i * len(members) // room] for i in range(room)]
    return sorted(chosen)


def contact(dataset: str, clips: pa.Table, uris: dict[str, str], keep: bool, folder: Pictures) -> dict[str, Any]:
    """A contact sheet of the kept or of the dropped clips: one tile a clip, and one picture of all beside the page."""
    part = clips.filter(pc.equal(clips["keep"], keep)).sort_by([("source", "ascending"), ("clip", "ascending")])
    chosen = spread(part["source"].to_pylist(), MOST_KEPT if keep else MOST_DROPPED)
    rows = part.take(pa.array(chosen, pa.int64())).to_pylist()
    with ThreadPoolExecutor(4) as pool:
        strips = list(pool.map(lambda row: _strip(dataset, row), rows))
    tiles = [
        _tile(row, uris.get(row["source"], ""), strip) | {"texts": words.texts(dataset, row), "sound": sound}
        for row, strip, sound in zip(rows, strips, sounds.of_clips(dataset, rows), strict=True)
    ]
    drawn = [(strip, _caption(tile)) for strip, tile in zip(strips, tiles, strict=True) if not isinstance(strip, str)]
    if drawn:
        folder.add(f"clips-{'kept' if keep else 'dropped'}.jpg", pictures.sheet(*zip(*drawn, strict=True)))
    return {
        "tiles": tiles,
        "all": len(part),
        "sources_shown": len({row["source"] for row in rows}),
        "sources": pc.count_distinct(part["source"]).as_py(),
    }


def _strip(dataset: str, row: dict[str, Any]) -> Any:
    """The first frame, the last and two between, which show a missed cut; the error if they cannot be read."""
    url = storage.join(dataset, row["split"], f"{row['shard']}.tar")
    frames = np.linspace(0, row["frame_count"] - 1, _FRAMES).round().astype(int).tolist()
    try:
        mp4 = storage.read_range(url, row["mp4_offset"], row["mp4_size"])
        return pictures.strip(clip.decode(mp4, frames, name=row["key"]), _HEIGHT)
    except (OSError, RuntimeError) as e:  # a Failure, or decord's error for a file that is no video
        return str(e)


def _tile(row: dict[str, Any], uri: str, strip: Any) -> dict[str, Any]:
    source, _, number = row["key"].rpartition("-")
    failed = isinstance(strip, str)
    return {
        "key": row["key"],
        "short": f"{source[:8]}-{number}",
        "uri": uri,
        "start": row["start_seconds"],
        "seconds": row["frame_count"] / row["fps"],
        "size": f"{row['width']}×{row['height']}",
        "motion": row["motion"],
        "reason": row["reason"],
        "error": strip if failed else None,
        "picture": None if failed else data_uri("jpg", pictures.jpeg(strip)),
        "shape": None if failed else strip.size,
    }


def _caption(tile: dict[str, Any]) -> str:
    reason = f"  {tile['reason']}" if tile["reason"] else ""
    size = tile["size"].replace("×", "x")  # the sheet's font has no such sign
    return f"{tile['short']}  {tile['seconds']:.1f} s  {size}  motion {tile['motion']:.4f}{reason}"


def histograms(clips: pa.Table, folder: Pictures) -> list[dict[str, Any]]:
    """Histograms of the clips' length, motion, size, brightness and sharpness, and of the scores that decided the view."""
    kept = np.asarray(clips["keep"], dtype=bool)
    values = {
        "length": (np.asarray(clips["frame_count"]) / np.asarray(clips["fps"]), "seconds"),
        "motion": (np.maximum(np.asarray(clips["motion"], dtype=float), _LEAST_MOTION), "log scale"),
        "brightness": (np.asarray(clips["brightness"], dtype=float), ""),
        "sharpness": (np.asarray(clips["sharpness"], dtype=float), ""),
    }
    floats = [f.name for f in clips.schema if f.name not in schema.INDEX.names and pa.types.is_floating(f.type)]
    scored = [name for name in floats if clips[name].null_count < len(clips)]
    values |= {name: (np.asarray(clips[name], dtype=float), "of the view") for name in scored}
    plots = []
    for name, (column, unit) in values.items():
        known = ~np.isnan(column)
        histogram = pictures.histogram(column[kept & known], column[~kept & known], log=name == "motion")
        picture = folder.add(f"clips-{name}.svg", histogram)
        plots.append({"name": name, "unit": unit, "median": float(np.median(column[known])), "picture": picture})
    sizes = np.array([f"{w}×{h}" for w, h in zip(clips["width"].to_pylist(), clips["height"].to_pylist(), strict=True)])
    names = sorted(set(sizes.tolist()))
    counts = [np.array([int((sizes[mask] == name).sum()) for name in names]) for mask in (kept, ~kept)]
    picture = folder.add("clips-size.svg", pictures.bars(names, *counts))
    plots.insert(2, {"name": "size", "unit": "width × height", "median": None, "picture": picture})
    return plots
