"""Whether generated videos show what their prompts say, in the eyes of an encoder of pictures and texts."""

import torch

from longtake.datasets.dual import Dual
from longtake.training.evaluation import windows
from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.record import Result, Unit
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.suite import Suite
from longtake.training.evaluation.windows import asked, dual_encoder, pictures, windows_at
from longtake.training.metrics.agreement import agreement, places

_FRAMES = 8  # of a whole video, at most, spread evenly


def conditions(suite: Suite) -> dict[str, object]:
    """What figures depend on beside the clips and the encoder."""
    return {**windows.conditions(suite), "looked_at": _FRAMES}


def run(subject: Subject, material: Material) -> Result:
    """`agreement` of each video, and `agreement_first`, whether no other prompt agrees more; means are over prompts."""
    found, wanted, keys = list[torch.Tensor](), list[str](), list[tuple[Unit, str]]()
    encoder: Dual | None = None
    for made in material.generated(subject, asked(material.suite)):
        if made.prompt is None:
            return Result(notes=["takes no prompts, so nothing can agree with them"])
        encoder = encoder or dual_encoder(material)
        frames = torch.cat(list(windows_at(made, places(made.length, _FRAMES), 1)), 2)
        found.append(pictures(encoder, frames))
        wanted.append(made.prompt)
        keys.append((made.unit, made.key))
    if encoder is None:
        return Result()
    texts = sorted(set(wanted))
    vectors = torch.from_numpy(encoder.texts(texts))
    rows = {}
    for key, prompt, frames_of in zip(keys, wanted, found, strict=True):
        own, is_first = agreement(frames_of, vectors, texts.index(prompt))
        rows[key] = {"agreement": own} | ({"agreement_first": is_first} if len(texts) > 1 else {})
    notes = [f"agreement_first by chance is {1 / len(texts):.3g}"] if len(texts) > 1 else []
    return Result(rows, notes=notes)


MEASURE = Measure(
    what="generated videos and their prompts: mean cosine of frames and prompt in an encoder such as CLIP (CLIPSIM, arXiv"
    " 2104.14806), and how often no other prompt has a higher one",
    version=2,
    of="generates",
    figures={"agreement": "higher", "agreement_first": "higher"},
    networks=("dual",),
    conditions=conditions,
    run=run,
)
