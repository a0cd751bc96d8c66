"""Generated videos in the layout that VBench reads (arXiv 2311.17982), so that its tool runs on them.

FOLDER/videos/PROMPT-INDEX.mp4   its names, in the standard and in the custom mode
FOLDER/prompts.json              prompts by names of files: `--prompt_file` of the custom mode
FOLDER/full_info.json            what it makes of the custom mode itself: prompts, dimensions, videos

vbench evaluate --videos_path FOLDER/videos --dimension D                        for prompts of its own suite
vbench evaluate --videos_path FOLDER/videos --dimension D --mode=custom_input --prompt_file FOLDER/prompts.json
"""

import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from longtake.datasets.errors import UserError
from longtake.training.evaluation.material import Generated

PROMPTS, INFO, VIDEOS = "prompts.json", "full_info.json", "videos"
DIMENSIONS = (  # of the custom mode: those that need nothing to be known of a prompt
    "subject_consistency", "background_consistency", "aesthetic_quality", "imaging_quality", "temporal_style",
    "overall_consistency", "human_action", "temporal_flickering", "motion_smoothness", "dynamic_degree",
)  # fmt: skip
_LONGEST = 240  # bytes of a prompt in a name of a file


def write(folder: Path, generated: Iterable[Generated], root: Path) -> None:
    """Write the videos of a model for VBench, those of a prompt numbered in the order of their seeds.

    What an earlier call has written there is written anew.

    Args:
        root: the evaluation's folder, which the videos' files are named from.

    Raises:
        UserError: the folder has other videos too, which VBench would take for this model's.
    """
    by_prompt = defaultdict[str | None, list[Generated]](list)
    for made in generated:
        by_prompt[made.prompt].append(made)
    place = folder / VIDEOS
    _clear(folder)
    place.mkdir(parents=True, exist_ok=True)
    prompts, info = dict[str, str](), []
    for prompt, videos in by_prompt.items():
        names = [f"{_name(prompt)}-{number}.mp4" for number in range(len(videos))]
        prompts |= dict.fromkeys(names, prompt or "")
        # first, so that the next call knows what is its own
        (folder / PROMPTS).write_text(json.dumps(prompts, indent=4))
        for name, made in zip(names, sorted(videos, key=lambda each: each.seed), strict=True):
            shutil.copyfile(root / made.file, place / name)
        paths = [str(place / name) for name in names]
        info.append({"prompt_en": prompt or "", "dimension": list(DIMENSIONS), "video_list": paths})
    (folder / INFO).write_text(json.dumps(info, indent=4))


def _clear(folder: Path) -> None:
    try:
        names = set(json.loads((folder / PROMPTS).read_bytes()))
    except (OSError, ValueError, TypeError):
        names = set()
    there = {path.name for path in (folder / VIDEOS).glob("*")}
    if others := sorted(there - names):
        raise UserError(f"vbench: {folder}: has {others[0]!r} of something else; name an empty folder")
    for name in there:
        (folder / VIDEOS / name).unlink()


def _name(prompt: str | None) -> str:
    """A prompt as VBench looks for it in names; with its digest where it cannot be one."""
    if prompt is None:
        return "video"
    name = prompt.replace("/", " ").replace("\0", " ").lstrip(".").encode()[:_LONGEST].decode(errors="ignore")
    if name == prompt and name:
        return name
    return f"{name[:40].strip()} {hashlib.sha256(prompt.encode()).hexdigest()[:8]}".strip()
