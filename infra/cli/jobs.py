"""Which videos a command asks for, and what their files are called."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from longtake.datasets.errors import UserError

_MOST_OF_A_PROMPT = 40  # characters of it in the name of a file


class Job(NamedTuple):
    """A video to make: its seed, a class by name or number, and the number of its prompt, from 0; None for none."""

    seed: int
    name: str | None
    prompt: int | None


def prompts_in(path: str) -> list[str]:
    """The prompts of a file, one a line."""
    lines = [line.strip() for line in text_of("--prompts", path).split("\n")]
    if not any(lines):
        raise UserError(f"--prompts: {path}: has no prompt; write one a line")
    return [line for line in lines if line]


def text_of(option: str, path: str) -> str:
    """The text of a file that an option names."""
    try:
        return Path(path).read_text("utf-8-sig")
    except OSError as e:
        raise UserError(f"{option}: {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{option}: {path}: not a text file") from e


def seeds_of(first: int, count: int | None, listing: str | None) -> list[int]:
    """The seeds of the options, in order."""
    if listing is None:
        return list(range(first, first + (count or 1)))
    if count is not None:
        raise UserError("--seeds and --count: give one of them")
    found: list[int] = []
    for part in listing.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and (not high.isdecimal() or int(high) < int(low))):
            raise UserError(f"--seeds: {part.strip()!r} is no seed; write numbers and ranges, such as 0,7,40-47")
        found += range(int(low), int(high or low) + 1)
    return found


def file_names(out: str, jobs: Sequence[Job], words: Sequence[str]) -> list[str]:
    """`out` for each job, with what tells several apart before its suffix: the prompt, the class, the seed."""
    several = {name for name, values in zip(Job._fields, zip(*jobs, strict=True), strict=True) if len(set(values)) > 1}

    def name(job: Job) -> str:
        parts = [out.removesuffix(".mp4")]
        if "prompt" in several and job.prompt is not None:
            parts.append(_short(job.prompt, words))
        if "name" in several:
            parts.append(str(job.name).replace("/", "_"))
        if "seed" in several:
            parts.append(f"seed{job.seed}")
        return "-".join(parts) + ".mp4"

    return [name(job) for job in jobs]


def _short(number: int, words: Sequence[str]) -> str:
    """A prompt in a file's name: its number, from 1, and its first words."""
    start = re.sub(r"\W+", "-", words[number])[:_MOST_OF_A_PROMPT].strip("-")
    return "-".join([f"{number + 1:0{len(str(len(words)))}}", start]).strip("-")
