"""Long videos chunk by chunk and joint by joint, against closed forms and the same figures of whole videos."""

import math

import judged
import materials
import pytest
import torch

from longtake.datasets.loader import to_model
from longtake.training.evaluation import record, run, table, windows
from longtake.training.evaluation.measures import coherence, degradation, drift, seam_distance, seams
from longtake.training.evaluation.record import Pooled, Result
from longtake.training.evaluation.suite import Networks
from longtake.training.metrics.coherence import coherence as whole_coherence
from longtake.training.metrics.distance import frechet_distance, moments
from longtake.training.metrics.seams import around, bends, between, changes
from longtake.training.metrics.seams import seams as whole_seams

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORKS = {"features": materials.network("corners", materials.corners), "classifier": materials.judge()}


def coloured(order: str, chunk: int = 4) -> torch.Tensor:
    """A video (3, T, 8, 8) with a chunk of each of these colours, r g b."""
    video = torch.full((3, chunk * len(order), 8, 8), 10, dtype=torch.uint8)
    for number, colour in enumerate(order):
        video["rgb".index(colour), number * chunk : (number + 1) * chunk] = 200
    return video


def long(videos: list[torch.Tensor], held_out: int = 10, **fields) -> materials.Fixed:
    clips = materials.clips(materials.noisy(held_out, low=60))
    made = materials.generated(videos, joints=fields.pop("joints", ()), piece=fields.pop("piece", None))
    return materials.Fixed(materials.short(length=videos[0].shape[1], **fields), clips, made, NETWORKS)


def test_classes_are_kept_in_the_share_of_chunks_that_has_the_first_ones():
    orders = ["rrrr", "rgrb", "gbbb", "bbgb"]
    result = coherence.MEASURE.run(None, long([coloured(order) for order in orders]))
    ccs = [row["ccs"] for row in result.rows.values()]
    assert ccs == pytest.approx([1, 1 / 3, 0, 2 / 3])
    assert [*result.curves["ccs_by_second"]] == [0, 0.5, 1, 1.5]  # chunks of 4 frames, at 8 a second
    assert list(result.curves["ccs_by_second"][1].values()) == [1, 1, 0, 0]
    # logits of 200/16 and 10/16 twice: KL between two such classes
    p = torch.tensor([200.0, 10, 10]).div(16).log_softmax(0).double()
    kl = float((p.exp() * (p - p.roll(1))).sum())
    assert list(result.rows.values())[1]["ics"] == pytest.approx(2 * kl / 3)


def test_coherence_of_all_videos_is_that_of_their_probabilities():
    videos = materials.noisy(6, frames=12)
    result = coherence.MEASURE.run(None, long(videos, piece=5))
    log_p = torch.stack([materials.colours(torch.stack(video.float().split(4, 1))).log_softmax(1) for video in videos])
    expected = whole_coherence(log_p.double())
    for name, values in (("ccs", expected.ccs), ("ics", expected.ics)):
        assert sum(row[name] for row in result.rows.values()) / 6 == pytest.approx(float(values[1:].mean()), rel=1e-5)
    assert result.notes == [f"ccs by chance is {expected.chance:.3g}"]


def test_chunks_are_as_far_from_clips_as_their_own_distances_say():
    videos = [torch.cat([part, part // 2], 1) for part in materials.noisy(12, frames=8, low=60, seed=1)]
    found = long(videos)
    result = degradation.MEASURE.run(None, found)
    assert [*result.curves["frechet_by_second"]] == [0, 0.5, 1, 1.5]
    real = moments(materials.corners(torch.stack([clip.video[0] for clip in found.held]).float()))
    expected = []
    for begin in (0, 4, 8, 12):
        rows = materials.corners(torch.stack([video[:, begin : begin + 4] for video in videos]).float())
        expected.append(frechet_distance(real, moments(rows)))
    points = list(result.curves["frechet_by_second"].values())
    assert [point.value for point in points] == pytest.approx(expected, rel=1e-4)
    rise = result.pooled["frechet_rise"]
    assert rise.value == pytest.approx(expected[3] - expected[0], rel=1e-4)
    assert rise.value > 0.5
    assert rise.replicates[7] == points[3].replicates[7] - points[0].replicates[7]


def test_chunks_that_are_longer_than_clips_are_compared_by_their_beginnings():
    videos = materials.noisy(12, frames=16)
    found = long(videos, chunk=8)
    curve = degradation.MEASURE.run(None, found).curves["frechet_by_second"]
    assert [*curve] == [0, 1]
    rows = materials.corners(torch.stack([video[:, 8:12] for video in videos]).float())
    real = materials.corners(torch.stack([clip.video[0] for clip in found.held]).float())
    assert curve[1].value == pytest.approx(frechet_distance(moments(real), moments(rows)), rel=1e-4)


@pytest.mark.parametrize("measure", [coherence, degradation, drift])
def test_a_single_chunk_has_no_course(measure):
    result = measure.MEASURE.run(None, long(materials.noisy(10, frames=7)))
    assert "single chunk" in result.notes[-1]
    assert not result.rows and not result.pooled


def test_drift_is_the_angle_between_a_chunk_and_the_first():
    def turned(levels):
        angle = levels.mean((1, 2, 3, 4)) / 255 * math.pi / 2
        return torch.stack([angle.cos(), angle.sin()], 1)

    video = torch.cat([torch.full((3, 4, 8, 8), level, dtype=torch.uint8) for level in (0, 85, 170, 255)], 1)
    found = long([video, video[:, :4].repeat(1, 4, 1, 1)])._replace(
        networks={"features": materials.network("t", turned)}
    )
    result = drift.MEASURE.run(None, found)
    assert [row["drift"] for row in result.rows.values()] == pytest.approx([1, 0], abs=1e-6)
    curve = [units["video-000"] for units in result.curves["drift_by_second"].values()]
    assert curve == pytest.approx([1 - math.cos(n * math.pi / 6) for n in range(4)], abs=1e-6)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("CUDA out of memory. Tried to")])
def test_a_full_gpu_is_not_taken_for_a_video_that_the_network_refuses(error):
    def full(levels):
        raise error

    found = long(materials.noisy(2, frames=8))._replace(networks={"features": materials.network("full", full)})
    with pytest.raises(torch.OutOfMemoryError):
        drift.MEASURE.run(None, found)


@pytest.mark.parametrize("piece", [1, 2, 5, 40])
def test_seams_are_those_of_whole_videos_however_they_are_read(piece):
    videos = materials.noisy(5, frames=20)
    result = seams.MEASURE.run(None, long(videos, joints=[6, 13], piece=piece))
    video = to_model(torch.stack(videos))
    expected = whole_seams(changes(video), bends(video), [6, 13])
    assert result.pooled["seam_ratio"].value == pytest.approx(expected.ratio, rel=1e-5)
    assert result.pooled["bend_ratio"].value == pytest.approx(expected.bend_ratio, rel=1e-5)
    assert (len(result.pooled["seam_ratio"].replicates), result.pooled["seam_ratio"].units) == (100, 5)


def test_a_jump_of_ten_times_the_usual_change_has_that_ratio():
    steps = torch.tensor([0, 2, 4, 6, 26, 28, 30, 32], dtype=torch.uint8)
    video = steps[None, :, None, None].expand(3, 8, 8, 8)
    result = seams.MEASURE.run(None, long([video, video], joints=[4]))
    assert result.pooled["seam_ratio"].value == pytest.approx(10, rel=1e-5)
    assert result.pooled["seam_ratio"].replicates == pytest.approx([10] * 100, rel=1e-5)


@pytest.mark.parametrize("piece", [1, 3, 40])
def test_frames_that_a_lower_rate_shows_again_are_no_joints(piece):
    steady = torch.arange(0, 48, 2, dtype=torch.uint8).repeat_interleave(3)[None, :, None, None].expand(3, 72, 8, 8)
    torn = steady.clone()
    torn[:, 36:] += 18
    for video, ratio in ((steady, 1), (torn, 10)):
        made = long([video, video], joints=[36])._replace(
            videos=materials.generated([video, video], joints=[36], piece=piece, every=3)
        )
        assert seams.MEASURE.run(None, made).pooled["seam_ratio"].value == pytest.approx(ratio, rel=1e-5)


def test_videos_that_are_made_at_once_have_no_seams():
    assert seams.MEASURE.run(None, long(materials.noisy(3, frames=8))).notes == [
        "no video has joints with frames between them"
    ]
    still = seams.MEASURE.run(None, long([coloured("rr")] * 2, joints=[3]))
    assert not still.pooled and still.notes == ["nothing moves between the joints"]


def test_windows_over_joints_and_between_them_are_compared_each_with_clips():
    videos = materials.noisy(10, frames=20)
    found = long(videos, joints=[6, 13], piece=3)
    pooled = seam_distance.MEASURE.run(None, found).pooled
    real = moments(materials.corners(torch.stack([clip.video[0] for clip in found.held]).float()))
    # of the three windows between joints the first and the last, as many as there are joints
    for name, cut, kept in (("seam", around, [0, 1]), ("inner", between, [0, 2])):
        rows = [materials.corners(cut(video[None], [6, 13], 4)[kept].float()) for video in videos]
        assert pooled[f"frechet_{name}"].value == pytest.approx(
            frechet_distance(real, moments(torch.cat(rows))), rel=1e-4
        )
    gap = pooled["frechet_gap"]
    assert gap.value == pooled["frechet_seam"].value - pooled["frechet_inner"].value
    assert gap.replicates[3] == pooled["frechet_seam"].replicates[3] - pooled["frechet_inner"].replicates[3]


def test_joints_too_close_for_a_window_between_them_are_said():
    result = seam_distance.MEASURE.run(None, long(materials.noisy(10, frames=9), joints=[3, 6]))
    assert set(result.pooled) == {"frechet_seam", "kernel_seam"}
    assert "no video has 4 frames without a joint" in result.notes


def test_windows_are_where_they_were_asked_for():
    video = torch.arange(30, dtype=torch.uint8)[None, :, None, None].expand(3, 30, 2, 2)
    made = materials.generated([video], piece=7)[0]
    found = [
        ((w[0, 0, :, 0, 0] + 1) * 127.5).round().int().tolist() for w in windows.windows_at(made, [9, 3, 5, 27], 3)
    ]
    assert found == [[3, 4, 5], [5, 6, 7], [9, 10, 11], [27, 28, 29]]
    found = [float((w[0, 0, 0, 0, 0] + 1) * 127.5) for w in windows.windows(made, 3, 8)]
    assert found == pytest.approx([0, 8, 16, 24], abs=1e-4)


def test_a_result_with_both_kinds_of_curves_is_read_back():
    curves = {"a": {0.0: {"unit": 1.0, "all": 2.0}}, "b": {0.5: Pooled(2.0, [1.0, 3.0], 4)}}
    result = Result({("unit", "key"): {"x": 1.0}}, {"p": Pooled(1.0, [0.5], 3)}, curves, ["said"])
    assert record.parsed(record.plain(result)) == result


def test_a_curve_of_all_videos_together_has_its_bounds_in_the_table():
    replicates = torch.linspace(1, 3, 101).tolist()
    result = Result(curves={"frechet_by_second": {0.5: Pooled(5.0, replicates, 20), 0.0: Pooled(1.0, [], 1)}})
    conditions = {"clips": 20, "sources": 20}
    measured = table.Measured("degradation", "", {}, "m", conditions, "d", 101, 0, [], result)
    [group] = table.made([{"digest": "m"}], [measured], []).groups
    first, second = group["curves"]["frechet_by_second"]["m"]
    assert first == [0.0, 1.0, None, None]
    assert second[:2] == [0.5, 5.0]
    assert second[2:] == pytest.approx([4, 6], abs=0.05)


def test_videos_of_each_length_are_measured_by_themselves(models, squares, tmp_path):
    videos = [{"frames": 9, "seeds": (0, 1, 2)}, {"frames": 24, "seeds": (0, 1)}]
    suite = judged.suite(videos=videos, measures=("seams", "diversity"))
    made = run.evaluate(
        [str(models / name) for name in ("latte", "tats")], squares, None, suite, Networks(), tmp_path, str
    )
    groups = {(group["measure"], group["conditions"]["videos"][0]["frames"]): group["figures"] for group in made.groups}
    assert sorted(groups) == [("diversity", 9), ("diversity", 24), ("seams", 9), ("seams", 24)]
    assert [len(groups["diversity", n]["diversity_without_prompts"]["values"]) for n in (9, 24)] == [2, 2]
    assert not groups["seams", 9]  # all are made at once
    [(model, value)] = groups["seams", 24]["seam_ratio"]["values"].items()
    assert made.models[0]["digest"] == model and value["units"] == 2
    assert value["low"] <= value["value"] <= value["high"]
    assert "seams: no video has joints with frames between them" in made.models[1]["notes"]
    assert "seams: 4 clips of 4 sources, 9 frames of 32x32 at 12 a second, videos of 24 frames" in table.printed(made)


def test_figures_are_those_of_the_first_draw_and_of_no_other_video_of_its_clip():
    videos = [{"key": key, "file": f"{key}-{seed}", "seed": seed} for key in "ab" for seed in (0, 1)]
    result = Result({("unit", key): {"gap_psnr": value} for key, value in (("a", 20.0), ("b", 30.0))})
    measured = table.Measured("gaps", "", {"gap_psnr": "higher"}, "m", {}, "d", 100, 0, videos, result)
    made = table.made([{"digest": "m"}], [measured], [])
    assert [video["scores"].get("gap_psnr") for video in made.videos] == [20.0, None, 30.0, None]
