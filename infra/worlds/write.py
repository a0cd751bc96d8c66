"""A world's videos as files: mp4s with sound where there is any, their truth, and a manifest with captions and labels.

`shard` holds sources out by a hash of their bytes, and what a world holds out is to be there. So each mp4 ends with a box
of a number that players skip, chosen so that held-out videos are in `val` and the others in `train` for any `val_fraction`
from 0.02 to 0.5.
"""

import json
from collections.abc import Mapping
from itertools import count as numbers
from pathlib import Path
from typing import Any

from tqdm import tqdm

from longtake.datasets import clip
from longtake.datasets.errors import UserError
from longtake.infra import worlds
from longtake.infra.footage import MANIFEST, write_video
from longtake.pipeline.plan import share_of

LEAST, MOST = 0.02, 0.5  # val_fraction that splits as the world does
USUAL = (0.0, 3600.0)  # of an option without limits of its own, such as seconds
LIMITS = {"size": (16, 1024), "fps": (1, 240), "frames": (1, 100_000)}  # by option, in every world that has it
_BOX = b"\x00\x00\x00\x10free"  # 16 bytes with the number
_CRF = 12


def generate(
    folder: Path | str, name: str, count: int, seed: int = 0, heldout: float = 0.2, **options: Any
) -> list[Path]:
    """Write `clip-00000.mp4` …, `clip-00000.truth.json` … and `captions.jsonl` into `folder`; returns the videos' paths.

    A truth has `world`, `seed`, `options`, `fps`, `frames`, `caption`, `label`, `heldout`, and the world's own as `truth`. It
    is written last: a video whose truth is that of these arguments is kept, all else is made again.

    Args:
        heldout: share of the videos that are of held-out combinations, spread evenly.
        options: of the world, in place of its own.

    Raises:
        UserError: no such world or option, an option of another type, count or seed out of range.
    """
    world = worlds.load(known(name))
    chosen = options_of(name, world, options)
    if count < 1 or seed < 0 or not 0 <= heldout <= 1:
        raise UserError(f"count must be >= 1, seed >= 0 and heldout 0 to 1, got {count}, {seed} and {heldout:g}")
    folder, lines = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"clip-{index:05d}.mp4" for index in range(count)]
    for index, path in enumerate(tqdm(paths, desc=name, unit="clip")):
        apart = int((index + 1) * heldout + 1e-9) > int(index * heldout + 1e-9)
        number = seed * 1_000_000 + index
        video = world.render(number, apart, **chosen)
        facts = {"world": name, "seed": number, "options": chosen, "fps": video.fps, "frames": video.length}
        facts |= {"caption": video.caption, "label": video.label, "heldout": video.heldout, "truth": dict(video.truth)}
        lines.append(json.dumps({"uri": path.name, "caption": video.caption, "label": video.label}) + "\n")
        record, text = path.with_suffix(".truth.json"), json.dumps(facts)
        if path.exists() and record.exists() and record.read_text() == text:
            continue
        record.unlink(missing_ok=True)
        _write(path, video)
        _replace(record, text)
    _replace(folder / MANIFEST, "".join(lines))
    return paths


def known(name: str) -> str:
    """The name, if it is a world's. UserError with those that there are."""
    if name not in worlds.WORLDS:
        raise UserError(f"--world {name}: no such world; there are {', '.join(worlds.WORLDS)}")
    return name


def options_of(name: str, world: worlds.World, given: Mapping[str, Any]) -> dict[str, Any]:
    """The world's options with those given. UserError for one that it has not, of another type, or out of range."""
    for key, value in given.items():
        if key not in world.options:
            raise UserError(f"{key}: is no option of the world {name}; it has {', '.join(world.options) or 'none'}")
        usual = world.options[key]
        if type(value) is not type(usual) and not (type(usual) is float and type(value) is int):
            raise UserError(f"{key}: must be {type(usual).__name__}, as in {key}={usual}, got {value!r}")
        least, most = LIMITS.get(key, USUAL)
        if not isinstance(value, str) and not least <= value <= most:
            raise UserError(f"{key}: must be from {least:g} to {most:g}, got {value!r}")
        if key == "size" and value % 2:
            raise UserError(f"size: must be even, got {value}")
    return dict(world.options) | dict(given)


def _write(path: Path, video: worlds.Video) -> None:
    partial = path.with_name(f".partial-{path.name}")
    write_video(partial, video.frames, video.fps, crf=_CRF)
    if video.sound is not None:
        samples, rate = video.sound
        clip.write_with_sound(partial, partial.read_bytes(), samples[None], rate)
    with partial.open("ab") as file:
        file.write(_BOX)
        for number in numbers():
            file.write(number.to_bytes(8, "big"))
            file.flush()
            share = share_of(str(partial), file.tell())
            if share < LEAST if video.heldout else share >= MOST:
                break
            file.truncate(file.tell() - 8)
    partial.replace(path)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text)
    partial.replace(path)
