"""WebDataset: tars of KEY.mp4, KEY.json and KEY.txt, a caption. Others' tars may have KEY.cls, a label, as well."""

import json
import shutil
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from longtake.datasets import storage
from longtake.datasets.errors import UserError
from longtake.datasets.shard import write_tar
from longtake.pipeline.layouts.chosen import Chosen, clips_of, place_of, state_of, texts_of

_VIDEOS = ("mp4", "webm", "mov", "mkv", "avi", "m4v")
_TEXTS = ("json", "txt", "cls")
_TEXT_BYTES = 1 << 20  # of a text about a clip
_ROWS = "rows.jsonl"  # what a tar has, written when all its videos are unpacked, below a line with the state of the tar


def _tar(chosen: Chosen, split: str, number: int, folder: Path) -> Path:
    return folder / f"{split}-{chosen.bases[split].name(number)}.tar"


def exported(chosen: Chosen, split: str, number: int, folder: Path) -> bool:
    """Whether a shard is there."""
    return _tar(chosen, split, number, folder).exists()


def export(chosen: Chosen, split: str, number: int, folder: Path) -> None:
    """Write `SPLIT-SHARD.tar`. Raises Failure: see `clips_of`."""

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for mp4, facts in clips_of(chosen, split, number):
            texts = texts_of(facts)
            caption = {"txt": texts[0].encode()} if texts else {}
            yield facts["key"], {"mp4": mp4, "json": json.dumps(facts, sort_keys=True).encode(), **caption}

    with storage.staged(str(_tar(chosen, split, number, folder))) as path:
        write_tar(path, samples())


def rows(folder: Path, beside: Path) -> Iterator[dict[str, Any]]:
    """A row for each video in the tars below a folder; the videos are unpacked to `beside`, a folder for each tar.

    Raises UserError: a tar is none, or a text is too long or no text.
    """
    for tar in sorted(path for path in folder.rglob("*.tar") if path.is_file()):
        to, state = place_of(beside, folder, tar), state_of([tar])
        if not (to / _ROWS).exists() or _lines(to)[0] != state:
            _unpack(tar, to, state)
        for line in _lines(to)[1:]:
            row = json.loads(line)
            yield row | {"uri": str((to / row["uri"]).absolute())}


def _lines(to: Path) -> list[str]:
    return (to / _ROWS).read_text().split("\n")[:-1]


def _unpack(tar: Path, to: Path, state: str) -> None:
    shutil.rmtree(to, ignore_errors=True)  # of a stopped command, or of a tar that was here before
    to.mkdir(parents=True)
    found = []
    try:
        with tarfile.open(tar, "r:") as file:
            # a sample is the files of one name that follow each other; links and devices are no part of one
            members = (_whole(member) for member in file if member.isfile())
            for number, (key, parts) in enumerate(groupby(members, lambda member: _parts(member.name)[0])):
                row: dict[str, Any] = {}
                for member in parts:
                    ending = _parts(member.name)[1]
                    if ending in _VIDEOS and "uri" not in row:
                        # a name of ours: theirs may lead anywhere
                        row["uri"] = f"{number:08d}.{ending}"
                        with (to / row["uri"]).open("wb") as target:
                            shutil.copyfileobj(file.extractfile(member), target, 1 << 20)  # type: ignore[arg-type]
                    elif ending in _TEXTS:
                        row |= _said(f"{tar}: {storage.printable(key)[:200]}.{ending}", file, member, ending)
                if row.get("captions"):
                    # those of the list are all that is said
                    row.pop("caption", None)
                if "uri" in row:
                    found.append(row)
            # tarfile takes any nonsense after the first member for the end
            file.fileobj.seek(file.offset)
            if file.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"cut short or damaged at byte {file.offset}")
    except (tarfile.TarError, EOFError) as e:
        raise UserError(f"{tar}: not a readable tar ({e}); download it again, or move it away") from e
    lines = [state, *(json.dumps(row) for row in found)]
    storage.write(str(to / _ROWS), "".join(line + "\n" for line in lines).encode())


def _whole(member: tarfile.TarInfo) -> tarfile.TarInfo:
    # one with holes may become larger than any disk
    if member.issparse():
        raise tarfile.ReadError(f"{storage.printable(member.name)[:200]} has holes; pack it without --sparse")
    return member


def _parts(name: str) -> tuple[str, str]:
    """The key of a member, its path up to the first dot of its last part, and its ending."""
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return folder + slash + stem, ending.rpartition(".")[2].lower()


def _said(name: str, file: tarfile.TarFile, member: tarfile.TarInfo, ending: str) -> dict[str, Any]:
    """What a text says of a video, as columns of a manifest."""
    if member.size > _TEXT_BYTES:
        raise UserError(f"{name}: has {member.size} bytes; {_TEXT_BYTES} are allowed")
    try:
        text = file.extractfile(member).read().decode()  # type: ignore[union-attr]
        if ending == "txt":
            return {"caption": text.strip()}
        if ending == "cls":
            return {"label": text.strip()}
        facts = json.loads(text)
        if not isinstance(facts, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as e:
        raise UserError(f"{name}: not readable ({str(e)[:200]}); correct it, or leave it out") from e
    return {name: facts[name] for name in ("caption", "captions", "label") if facts.get(name) is not None}
