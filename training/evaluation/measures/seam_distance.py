"""How far windows over joints of long videos are from held-out clips, beside windows without any."""

from longtake.training.evaluation.distances import difference, distances
from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.record import Pooled, Result
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.windows import Side, asked, clips, conditions_by_chunk, joined, side, windows_at
from longtake.training.metrics.agreement import places
from longtake.training.metrics.seams import starts_around, starts_between


def run(subject: Subject, material: Material) -> Result:
    """`frechet_seam`, `frechet_inner` and `frechet_gap`, by how much the first is above the second; the same of `kernel`.

    A video gives as many windows of each kind, since Fréchet distances are larger of fewer.
    """
    suite, network = material.suite, material.features()
    frames = min(suite.chunk, suite.clips.frames)
    sides: dict[str, list[Side]] = {"seam": [], "inner": []}
    for made in material.generated(subject, asked(suite)):
        if not made.joints:
            continue
        starts = {
            "seam": starts_around(made.joints, made.length, frames),
            "inner": starts_between(made.joints, made.length, frames),
        }
        if all(starts.values()):
            fewer = min(map(len, starts.values()))
            starts = {name: [each[at] for at in places(len(each), fewer)] for name, each in starts.items()}
        for name, firsts in starts.items():
            what = {"seam": "windows over joints", "inner": f"windows of {frames} frames between joints"}[name]
            part = side(what, network, ((made.unit, window) for window in windows_at(made, firsts, frames)))
            sides[name] += [part] if part.videos else []
    if not sides["seam"]:
        return Result(notes=[f"no video has a joint with {frames // 2} frames on each side"])
    real = side("held-out clips", network, clips(material, frames))
    pooled, notes = dict[str, Pooled](), list[str]()
    for name, parts in sides.items():
        if not parts:
            notes.append(f"no video has {frames} frames without a joint")
            continue
        found = distances(real, joined(parts), suite.resamples, suite.seed)
        pooled |= {f"{distance}_{name}": value for distance, value in found.pooled.items()}
        notes += [note for note in found.notes if note not in notes]
    for distance in ("frechet", "kernel"):
        both = [pooled.get(f"{distance}_{name}") for name in ("seam", "inner")]
        if both[0] and both[1] and len(both[0].replicates) == len(both[1].replicates):
            pooled[f"{distance}_gap"] = difference(both[0], both[1])
    return Result(pooled=pooled, notes=notes)


MEASURE = Measure(
    what="joints of long videos: Fréchet and kernel distance to held-out clips of windows with a joint in their middle, and of"
    " as many windows without any; our own definition",
    version=2,
    of="generates",
    figures={f"{name}_{part}": "lower" for name in ("frechet", "kernel") for part in ("seam", "inner", "gap")},
    networks=("features",),
    conditions=conditions_by_chunk,
    run=run,
)
