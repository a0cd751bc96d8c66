"""How smoothly a filled gap goes over into the clips beside it, in an image encoder's eyes (CLIP-RS, arXiv 2405.18003)."""

from __future__ import annotations

from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.measures.gaps import cases, conditions
from longtake.training.evaluation.record import Result, Unit
from longtake.training.evaluation.subject import Subject
from longtake.training.metrics import transitions


def run(subject: Subject, material: Material) -> Result:
    """CLIP-RS of the frames that are made and of the one on each side, of the first draw."""
    embed = material.embedder().embeddings
    rows = dict[tuple[Unit, str], dict[str, float]]()
    for case in cases(subject, material):
        around = slice(case.begin - 1, case.begin + case.made.shape[2] + 1)
        made, true = (transitions.embedded(embed, video[0, :, around]) for video in (case.filled, case.video))
        rows[case.clip.unit, case.clip.key] = {"clip_rs": transitions.clip_rs(made, true)}
    return Result(rows)


MEASURE = Measure(
    what="CLIP-RS: how alike neighbouring frames are in a filled gap, against the true ones (arXiv 2405.18003)",
    version=1,
    of="fills",
    figures={"clip_rs": "higher"},
    networks=("embedder",),
    conditions=conditions,
    run=run,
)
