"""What a captioner is asked about a clip, and what counts as an answer."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

VERSION = 1  # raise it when the same settings would ask for something else, or take other answers

PROMPT = (
    "These are {frames} frames of one video clip of {seconds} seconds, in order. Describe in one paragraph what is to be"
    " seen: the subjects, what they do and how they move, the place, the light, and how the camera moves. Describe only"
    " what can be seen, and do not speak of frames or of a clip."
)
FIELDS = ("frames", "seconds", "label")  # that a prompt may have in braces

_FENCE = re.compile(r"\A\s*```(json)?|```\s*\Z")  # which some models put around JSON
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Answer:
    """What a captioner has said about a clip."""

    key: str
    base_sha256: str  # of the clip that it has seen
    text: str | None
    reason: str | None = None  # why there is no text: a code of captions.REASONS, and a detail


class Bad(ValueError):
    """An answer that is of no use; says why."""


class Refusal(Bad):
    """An answer in which the captioner does not want to describe the clip."""


def unknown_fields(prompt: str) -> list[str]:
    """The names in braces in a prompt that stand for nothing."""
    return sorted(set(_FIELD.findall(prompt)) - set(FIELDS))


def prompt_of(prompt: str, row: Mapping[str, Any], frames: int) -> str:
    """The prompt for a clip of which this many frames are shown."""
    values = {
        "frames": str(frames),
        "seconds": f"{row['frame_count'] / row['fps']:.3g}",
        "label": row.get("label") or "unknown",
    }
    return _FIELD.sub(lambda match: values.get(match[1], match[0]), prompt)


def token_of(key: str) -> str:
    """A word that an answer has to repeat, so that the answer about another clip is found out."""
    return hashlib.sha256(key.encode()).hexdigest()[:8]


def instruction(token: str) -> str:
    """What is said after the prompt to get an answer that `read` takes."""
    return f'Answer with one JSON object: {{"clip": "{token}", "caption": "your description"}}'


SCHEMA = {
    "type": "object",
    "properties": {
        "clip": {"type": "string", "description": "The word that the request gives for `clip`."},
        "caption": {"type": "string", "description": "The description of the clip."},
    },
    "required": ["clip", "caption"],
    "additionalProperties": False,
}


def read(content: Any, token: str, most: int, clean: Callable[[str], str] = str) -> str:
    """The caption in an answer of at most `most` characters. Raises Bad, which quotes what `clean` leaves of the answer."""
    if not isinstance(content, str) or not content.strip():
        raise Bad("the answer is empty")
    try:
        found = json.loads(_FENCE.sub("", content))
    except (ValueError, RecursionError):
        raise Bad(f"the answer is no JSON, or cut: {clean(content)[-40:]!a}") from None
    if not isinstance(found, dict) or not isinstance(found.get("caption"), str):
        raise Bad("the answer has no caption")
    if found.get("clip") != token:
        raise Bad(f"the answer is about another clip, {clean(str(found.get('clip')))[:20]!a}")
    return checked(found["caption"], most)


def checked(text: str, most: int) -> str:
    """A caption without spaces around it. Raises Bad: it is empty, or has more than `most` characters."""
    text = text.strip()
    if not text:
        raise Bad("the caption is empty")
    if len(text) > most:
        raise Bad(f"the caption has {len(text)} characters, more than max_characters {most}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Bad("the caption has half a character") from None
    return text
