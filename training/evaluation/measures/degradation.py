"""How long videos get worse: how far each of their chunks is from held-out clips."""

from longtake.training.evaluation.distances import difference, distances
from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.record import Pooled, Result
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.windows import Side, chunks, clips, conditions_by_chunk, joined, seconds, side

_RESAMPLES = 200  # at most: there may be a hundred chunks


def run(subject: Subject, material: Material) -> Result:
    """`frechet_rise` and `kernel_rise`, by how much the last chunk is farther than the first, and both distances by second."""
    suite, network = material.suite, material.features()
    frames = min(suite.chunk, suite.clips.frames)
    real = side("held-out clips", network, clips(material, frames))
    by_chunk = list[list[Side]]()
    for made, parts in chunks(material, subject):
        for number, part in enumerate(parts):
            if number == len(by_chunk):
                by_chunk.append([])
            window = part[:, :, :frames]
            by_chunk[number].append(side("generated videos", network, [(made.unit, window)]))
    curves: dict[str, dict[float, Pooled]] = {"frechet": {}, "kernel": {}}
    notes = list[str]()
    for number, sides in enumerate(by_chunk):
        found = distances(real, joined(sides), min(suite.resamples, _RESAMPLES), suite.seed)
        notes += [note for note in found.notes if note not in notes]
        for name, pooled in found.pooled.items():
            curves[name][seconds(suite, number)] = pooled
    if len(by_chunk) < 2:
        notes.append("videos of a single chunk cannot get worse; make them longer, or the suite's chunk shorter")
    rises = {
        f"{name}_rise": difference(curve[max(curve)], curve[min(curve)])
        for name, curve in curves.items()
        if len(curve) > 1
    }
    return Result(pooled=rises, curves={f"{name}_by_second": curve for name, curve in curves.items()}, notes=notes)


MEASURE = Measure(
    what="long videos by chunks: Fréchet and kernel distance of each chunk to held-out clips, and by how much the last one is"
    " above the first (after arXiv 2204.03638)",
    version=1,
    of="generates",
    figures={"frechet_rise": "lower", "kernel_rise": "lower"},
    networks=("features",),
    conditions=conditions_by_chunk,
    run=run,
)
