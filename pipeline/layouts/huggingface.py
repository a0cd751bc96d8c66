"""A folder for `datasets.load_dataset("videofolder", data_dir=FOLDER)`: videos, and beside them metadata.jsonl with what is
known of each: `file_name`, `text`, a caption, `captions`, all of them with their seconds, `label`, and other facts."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longtake.datasets import storage
from longtake.datasets.errors import UserError
from longtake.pipeline.layouts.chosen import Chosen, clips_of, texts_of
from longtake.pipeline.tables import ROW_BYTES

_SPLITS = {"train": "train", "val": "validation"}
_METADATA = "metadata.jsonl"
_CAPTIONS = ("text", "caption")


def _folder(chosen: Chosen, split: str, number: int, folder: Path) -> Path:
    return folder / _SPLITS[split] / chosen.bases[split].name(number)


def exported(chosen: Chosen, split: str, number: int, folder: Path) -> bool:
    """Whether a shard is there."""
    return (_folder(chosen, split, number, folder) / _METADATA).exists()


def export(chosen: Chosen, split: str, number: int, folder: Path) -> None:
    """Write `SPLIT/SHARD/` with the clips, and their metadata last. Raises Failure: see `clips_of`."""
    to, lines = _folder(chosen, split, number, folder), []
    shutil.rmtree(to, ignore_errors=True)  # of a stopped command
    to.mkdir(parents=True)
    for mp4, facts in clips_of(chosen, split, number):
        (to / f"{facts['key']}.mp4").write_bytes(mp4)
        about = {name: value for name, value in facts.items() if name != "split"}
        text = (texts_of(facts) or [""])[0]
        lines.append({"file_name": f"{facts['key']}.mp4", "text": text, **about})
    storage.write(str(to / _METADATA), "".join(json.dumps(line) + "\n" for line in lines).encode())


def rows(folder: Path, beside: Path) -> Iterator[dict[str, Any]]:
    """A row for each video that a metadata.jsonl or metadata.csv below a folder names; nothing is unpacked.

    Raises UserError: a line has no `file_name`, or one that leads out of the folder or to no file.
    """
    for path in sorted([*folder.rglob(_METADATA), *folder.rglob("metadata.csv")]):
        for number, facts in enumerate(_lines(path), 1):
            name = facts.get("file_name") or facts.get("video_file_name")
            if not isinstance(name, str) or not name:
                raise UserError(f"{path}: row {number} has no file_name; see `videofolder` of Hugging Face's datasets")
            video = (path.parent / name).resolve()
            if not video.is_relative_to(folder.resolve()) or not video.is_file():
                raise UserError(f"{path}: row {number}: {storage.printable(name)[:200]} is no file of this folder")
            row: dict[str, Any] = {"uri": str(video)}
            if said := facts.get("captions"):
                row["captions"] = said
            elif text := next((facts[each] for each in _CAPTIONS if facts.get(each)), None):
                row["caption"] = text
            if facts.get("label") not in (None, ""):
                row["label"] = str(facts["label"])
            yield row


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table in JSON lines or CSV."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                yield from csv.DictReader(file)
                return
            while line := file.readline(ROW_BYTES):
                if len(line) == ROW_BYTES:
                    raise ValueError(f"a line of more than {ROW_BYTES} bytes")
                facts = json.loads(line) if line.strip() else None
                if isinstance(facts, dict):
                    yield facts
                elif facts is not None:
                    raise ValueError(f"{line.strip()[:80]!r} is no object")
    except (ValueError, OSError, RecursionError, csv.Error) as e:
        raise UserError(f"{path}: not readable ({' '.join(str(e).split())[:300]}); correct it") from e
