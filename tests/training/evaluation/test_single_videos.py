"""Agreement with prompts, motion, diversity and VBench's dimensions of generated videos, against their definitions."""

import json
from itertools import combinations
from pathlib import Path

import materials
import numpy as np
import pytest
import tiny_pictures
import torch

from longtake.datasets.errors import UserError
from longtake.training.evaluation import vbench as layout
from longtake.training.evaluation.bootstrap import draws
from longtake.training.evaluation.measures import (
    agreement,
    background,
    consistency,
    diversity,
    diversity_lpips,
    motion,
    vbench,
)
from longtake.training.metrics.agreement import agreement as one_agreement
from longtake.training.metrics.features import FeatureNetwork
from longtake.training.metrics.perceptual import Perceptual, lpips

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["a red square moves to the left", "two people walk", "it rains at night"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_pictures.folder("clip", tmp_path_factory.mktemp("clip"))


def test_agreement_is_the_cosine_that_the_library_gives(clip):
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    videos = materials.noisy(6, size=16)
    prompts = [PROMPTS[n % 3] for n in range(6)]
    found = materials.Fixed(materials.short(), [], materials.generated(videos, prompts), {"dual": clip})
    result = agreement.MEASURE.run(None, found)

    model, pad = CLIPModel.from_pretrained(clip).eval(), {"return_tensors": "pt", "padding": True}
    with torch.inference_mode():
        texts = model.get_text_features(**AutoTokenizer.from_pretrained(clip)(PROMPTS, **pad)).pooler_output
        means = []
        for video in videos:
            frames = list(video.permute(1, 2, 3, 0).numpy())
            inputs = AutoImageProcessor.from_pretrained(clip, backend="pil")(images=frames, return_tensors="pt")
            vectors = model.get_image_features(**inputs).pooler_output
            means.append(torch.cosine_similarity(vectors[:, None], texts[None], dim=2).mean(0))
    for number, ((unit, _), row) in enumerate(result.rows.items()):
        assert unit == prompts[number]
        assert row["agreement"] == pytest.approx(float(means[number][number % 3]), abs=1e-5)
        assert row["agreement_first"] == float(means[number].argmax() == number % 3)
    assert result.notes == ["agreement_first by chance is 0.333"]


class Colours:
    """A dual encoder of colours, and of their names."""

    def pictures(self, frames: np.ndarray) -> np.ndarray:
        return np.eye(3, dtype=np.float32)[frames.mean((1, 2)).argmax(1)]

    def texts(self, texts: list[str]) -> np.ndarray:
        return np.eye(3, dtype=np.float32)[[("red", "green", "blue").index(text) for text in texts]]


def test_a_video_that_does_not_hold_its_prompt_beyond_a_clip_agrees_less(monkeypatch):
    monkeypatch.setattr(agreement, "dual_encoder", lambda _: Colours())
    holds = torch.zeros(3, 49, 8, 8, dtype=torch.uint8)
    holds[0] = 200
    turns = torch.cat([holds[:, :17], holds.roll(1, 0)[:, 17:]], 1)
    found = materials.Fixed(
        materials.short(17, 49), [], materials.generated([holds, turns, holds.roll(1, 0)], ["red", "red", "green"])
    )
    rows = list(agreement.MEASURE.run(None, found).rows.values())
    assert [row["agreement"] for row in rows] == [1, 3 / 8, 1]  # of frames 0, 7, 14, 21, ..., 48
    assert [row["agreement_first"] for row in rows] == [1, 0, 1]


def test_backgrounds_are_compared_by_the_vectors_of_pictures(clip):
    from longtake.datasets import dual
    from longtake.datasets.pictures import opened

    videos = materials.noisy(2, size=16)
    still = videos[0][:, :1].expand(3, 4, 16, 16)
    result = background.MEASURE.run(
        None, materials.Fixed(materials.short(), [], materials.generated([still, *videos]), {"dual": clip})
    )
    found = [row["background_consistency"] for row in result.rows.values()]
    vectors = dual.load(opened(clip), "cpu").pictures(videos[0].permute(1, 2, 3, 0).numpy()).astype(np.float64)
    cosines = vectors @ vectors.T
    expected = np.mean([(max(0, cosines[n, 0]) + max(0, cosines[n, n - 1])) / 2 for n in range(1, 4)])
    assert found[:2] == pytest.approx([1, expected], abs=1e-5)


def test_texts_that_agree_alike_share_the_first_place():
    frames, texts = torch.eye(3)[:1], torch.eye(3)
    assert one_agreement(frames, texts, 0) == (1.0, 1.0)
    assert one_agreement(frames, texts, 1) == (0.0, 0.0)
    assert one_agreement(frames, texts[[0, 0, 1]], 1) == (1.0, 0.5)


def test_a_model_without_prompts_agrees_with_nothing(clip):
    found = materials.Fixed(materials.short(), [], materials.generated(materials.noisy(2)), {"dual": clip})
    assert agreement.MEASURE.run(None, found).notes == ["takes no prompts, so nothing can agree with them"]


def test_a_folder_that_is_no_dual_encoder_is_one_line(tmp_path):
    folder = tiny_pictures.folder("vit", tmp_path / "vit")
    found = materials.Fixed(
        materials.short(), [], materials.generated(materials.noisy(2), PROMPTS[:2]), {"dual": folder}
    )
    with pytest.raises(UserError, match=r"^dual: .*encodes no texts; name a dual encoder"):
        agreement.MEASURE.run(None, found)


def shifting(step: int, seed: int, frames: int = 4, size: int = 24) -> torch.Tensor:
    """A picture that moves to the right by so many pixels a frame, (3, T, H, W) uint8."""
    wide = materials.noisy(1, 1, 2 * size, seed)[0][:, 0]
    return torch.stack([wide.roll(step * t, 2)[:, 8 : 8 + size, 8 : 8 + size] for t in range(frames)], 1)


def moved(steps: list[int]) -> materials.Fixed:
    clips = [shifting(1, seed) for seed in range(8)]
    videos = [shifting(step, 20 + seed) for seed, step in enumerate(steps)]
    return materials.Fixed(materials.short(), materials.clips(clips), materials.generated(videos), {})


def test_videos_that_move_alike_are_close_in_speed_and_direction():
    alike, fast, back = (motion.MEASURE.run(None, moved([step] * 8)).pooled for step in (1, 2, -1))
    assert alike["speed_distance"].value < 0.005
    assert fast["speed_distance"].value == pytest.approx(1 / 24, rel=0.2)
    assert back["speed_distance"].value < 0.005
    assert back["direction_distance"].value > 0.8
    assert alike["direction_distance"].value < 0.1
    assert (len(alike["speed_distance"].replicates), alike["speed_distance"].units) == (100, 8)
    assert np.std(motion.MEASURE.run(None, moved([1, 2] * 4)).pooled["speed_distance"].replicates) > 0.003


def test_a_model_of_a_third_of_the_rate_moves_as_far():
    clips = [shifting(1, seed, 7) for seed in range(8)]
    videos = [shifting(3, 20 + seed, 3).repeat_interleave(3, 1)[:, :7] for seed in range(8)]
    found = materials.Fixed(materials.short(7, 7), materials.clips(clips), materials.generated(videos, every=3), {})
    assert motion.MEASURE.run(None, found).pooled["speed_distance"].value < 0.005


def test_motion_of_few_videos_or_single_frames_is_refused():
    found = moved([1] * 7)
    assert motion.MEASURE.run(None, found).notes == [
        "7 generated videos are too few for a distance; it needs 8 at least"
    ]
    assert "single frame" in motion.MEASURE.run(None, found._replace(suite=materials.short(frames=1))).notes[0]


def rmse(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a.double() - b.double()) / 255).square().mean().sqrt())


def test_diversity_is_the_mean_over_pairs_of_each_prompt():
    videos, prompts = materials.noisy(7), ["a", "a", "a", "b", "b", "c", "b"]
    found = materials.Fixed(materials.short(), [], materials.generated(videos, prompts), {})
    pooled = diversity.MEASURE.run(None, found).pooled["diversity"]
    means = [
        np.mean([rmse(videos[i], videos[j]) for i, j in combinations([n for n in range(7) if prompts[n] == p], 2)])
        for p in "ab"
    ]
    assert pooled.value == pytest.approx(np.mean(means), rel=1e-5)
    drawn = draws(2, 100, 0)
    assert pooled.replicates == pytest.approx([np.mean([means[n] for n in each]) for each in drawn], rel=1e-5)


def test_videos_without_prompts_are_drawn_themselves():
    videos = materials.noisy(5)
    [(name, pooled)] = diversity.MEASURE.run(
        None, materials.Fixed(materials.short(), [], materials.generated(videos), {})
    ).pooled.items()
    # which is not compared with that of one prompt
    assert name == "diversity_without_prompts" and name in diversity.MEASURE.figures
    assert pooled.value == pytest.approx(np.mean([rmse(a, b) for a, b in combinations(videos, 2)]), rel=1e-5)
    for each, replicate in zip(draws(5, 100, 0)[:10], pooled.replicates, strict=False):
        pairs = [rmse(videos[i], videos[j]) for i in each for j in each if i != j]
        assert replicate == pytest.approx(np.mean(pairs), rel=1e-5)


def test_equal_videos_have_no_diversity_and_single_ones_none_to_tell():
    same = materials.noisy(1) * 3
    assert (
        diversity.MEASURE.run(None, materials.Fixed(materials.short(), [], materials.generated(same), {}))
        .pooled["diversity_without_prompts"]
        .value
        == 0
    )
    single = materials.Fixed(materials.short(), [], materials.generated(materials.noisy(2), ["a", "b"]), {})
    result = diversity.MEASURE.run(None, single)
    assert not result.pooled
    assert result.notes == ["no prompt has two videos; give the suite prompts and two seeds, or more"]


def test_diversity_to_a_network_is_lpips():
    perceptual = Perceptual(FeatureNetwork("n", "n", "signed", None, images=lambda x: [x]))
    videos = materials.noisy(3)
    found = materials.Fixed(materials.short(), [], materials.generated(videos), {"perceptual": perceptual})
    signed = [video[None].float() / 127.5 - 1 for video in videos]
    expected = np.mean([float(lpips(perceptual, a, b)) for a, b in combinations(signed, 2)])
    [(name, pooled)] = diversity_lpips.MEASURE.run(None, found).pooled.items()
    assert name == "diversity_lpips_without_prompts" and name in diversity_lpips.MEASURE.figures
    assert pooled.value == pytest.approx(expected, rel=1e-5)


def test_vbench_figures_are_of_each_video():
    videos = [shifting(2, 0, 5), shifting(0, 1, 5)]
    result = vbench.MEASURE.run(
        None, materials.Fixed(materials.short(frames=5, length=5), [], materials.generated(videos), {})
    )
    assert [row["dynamic_degree"] for row in result.rows.values()] == [1, 0]
    moving, still = (row["temporal_flickering"] for row in result.rows.values())
    assert still == 1
    maes = (videos[0][:, 1:].float() - videos[0][:, :-1].float()).abs().mean()
    assert moving == pytest.approx(1 - float(maes) / 255, rel=1e-5)


def test_movement_that_block_matching_does_not_see_is_not_called_none():
    video = shifting(8, 0, 5, 64)
    slow = materials.short(frames=5, length=5)
    slow = slow.model_copy(update={"clips": slow.clips.model_copy(update={"fps": 2.0})})
    result = vbench.MEASURE.run(None, materials.Fixed(slow, [], materials.generated([video]), {}))
    assert [row.keys() for row in result.rows.values()] == [{"temporal_flickering"}]
    assert result.notes == [
        "dynamic_degree is left out: at 2 frames a second a movement has 6 pixels or more, and block matching sees 4;"
        " raise suite.clips.fps"
    ]


def test_consistency_needs_a_network_of_pictures():
    images = materials.network("mean", images=lambda x: [torch.nn.functional.adaptive_avg_pool2d(x, 1)])
    videos = materials.generated([materials.noisy(1)[0][:, :1].expand(3, 4, 8, 8), *materials.noisy(1, seed=3)])
    result = consistency.MEASURE.run(None, materials.Fixed(materials.short(), [], videos, {"features": images}))
    still, noisy = (row["subject_consistency"] for row in result.rows.values())
    assert still == pytest.approx(1) and noisy < 1
    whole = materials.Fixed(
        materials.short(), [], videos, {"features": materials.network("corners", materials.corners)}
    )
    assert "needs a network of pictures" in consistency.MEASURE.run(None, whole).notes[0]


def written(folder: Path, prompts: list[str] | None, name: str = "out") -> Path:
    made = materials.generated(materials.noisy(4), prompts)
    for number, each in enumerate(made):
        (folder / each.file).write_bytes(bytes([number]))
    layout.write(folder / name, made, folder)
    return folder / name


def test_vbench_finds_each_video_by_its_prompt(tmp_path):
    """As `build_full_info_json` looks for them, in the standard mode and in the custom one."""
    out = written(tmp_path, ["a cat, running", "a dog's tail", "a cat, running", "a dog's tail"])
    for prompt, contents in (("a cat, running", (0, 2)), ("a dog's tail", (1, 3))):
        for number, content in enumerate(contents):
            assert (out / "videos" / f"{prompt}-{number}.mp4").read_bytes() == bytes([content])
    prompts = json.loads((out / "prompts.json").read_text())
    assert set(prompts) == {path.name for path in (out / "videos").iterdir()}
    assert all(name.rpartition("-")[0] == prompt for name, prompt in prompts.items())
    info = json.loads((out / "full_info.json").read_text())
    found = [path for row in info if "temporal_flickering" in row["dimension"] for path in row["video_list"]]
    assert len(found) == 4 and all(Path(path).is_file() for path in found)


def test_a_prompt_that_no_file_can_be_named_by_is_in_the_list_of_prompts(tmp_path):
    odd = ["either/or", "x" * 300, "either or", "é" * 200]
    out = written(tmp_path, odd)
    prompts = json.loads((out / "prompts.json").read_text())
    assert sorted(prompts.values()) == sorted(odd)
    assert len(list((out / "videos").iterdir())) == 4
    assert "either or-0.mp4" in prompts


def test_writing_again_replaces_its_own_videos_and_refuses_others(tmp_path):
    out = written(tmp_path, ["a", "b", "c", "d"])
    written(tmp_path, ["a", "a", "b", "b"])
    assert {path.name for path in (out / "videos").iterdir()} == {"a-0.mp4", "a-1.mp4", "b-0.mp4", "b-1.mp4"}
    (out / "videos" / "holiday.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"has 'holiday\.mp4' of something else; name an empty folder"):
        written(tmp_path, None)
    assert len(list((out / "videos").iterdir())) == 5


def test_videos_without_prompts_are_numbered(tmp_path):
    out = written(tmp_path, None)
    assert {path.name for path in (out / "videos").iterdir()} == {f"video-{n}.mp4" for n in range(4)}
