"""What a trained EncGAN3 is measured by: reconstructions, exchanged clips, joints and bins of long videos; what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from flat import nested
from latent_stages import prepared
from priors import awake
from pydantic import ValidationError
from torch import Tensor, nn

from longtake.datasets import clip
from longtake.datasets.errors import UserError
from longtake.datasets.loader import to_model
from longtake.infra.report import StageRun, build
from longtake.training.data import HELDOUT
from longtake.training.metrics.coherence import inception_score
from longtake.training.metrics.distance import video_distance
from longtake.training.metrics.seams import bends, changes, seams
from longtake.training.models.encgan3 import evaluate, pretrain
from longtake.training.models.encgan3.pretrain import Config

pytestmark = pytest.mark.usefixtures("one_thread", "group")

MODEL: dict[str, Any] = {
    "preset": "encgan3_tiny",
    "size": 16,
    "width": 2,
    "content": 5,
    "movement": 3,
    "attention": None,
}
QUICK: dict[str, Any] = {
    "kind": "pretrain_encgan3",
    "dataset": "dataset",
    "model": MODEL | {"groups": 1},
    "recall": True,
    "workers": 0,
    "eval_clips": 3,
    "eval_swaps": 2,
    "eval_videos": 4,
    "eval_frames": 60,
    "eval_bin": 20,
    "eval_splits": 2,
    "eval_batch": 3,
}


class Colours(nn.Module):
    """Images -> mean colours."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=[2, 3])


class Classes(nn.Module):
    """Clips in 0..255 -> logits of three classes, by their mean colours."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.mean(dim=[2, 3, 4]) - 128) * 0.2


def script(module: nn.Module, folder: Path) -> str:
    path = folder / f"{type(module).__name__.lower()}.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("networks")
    colours = script(Colours(), folder)
    return {"features": colours, "perceptual": colours, "classifier": script(Classes(), folder)}


def config(**changes: Any) -> Config:
    return Config(**nested(QUICK | changes))


def measured(dataset: str, folder: Path, **changes: Any) -> tuple[dict[str, Any], pretrain.Setup]:
    chosen = config(**changes)
    setup = prepared(chosen, {"dataset": dataset}, folder / "stage", pretrain)
    awake(setup.model).train()
    folder.mkdir(exist_ok=True)
    summary = pretrain.evaluate(chosen, setup, folder)
    assert setup.model.training
    return summary, setup


def test_all_that_is_measured_is_in_the_record(dataset: str, networks: dict[str, str], tmp_path: Path) -> None:
    summary, setup = measured(dataset, tmp_path, **networks)
    record = json.loads((tmp_path / evaluate.SUMMARY).read_text())
    assert record["summary"] == json.loads(json.dumps(summary))
    for row in record["videos"]:
        assert len(clip.decode((tmp_path / row["file"]).read_bytes())) > 0
    assert {row["file"].split("-")[0] for row in record["videos"]} == {"clip", "swap", "continued", "seed"}
    assert 0 <= summary["swap_content"] <= 1 and summary["swaps"] == 2 and summary["clips"] == 3
    # each step adds to those before: joints of clips of 16 frames that overlap by 4
    assert summary["marks"]["change_by_frame"] == [14, 26, 38, 50]
    assert [x for x, _ in summary["series"]["change_by_frame"]] == list(range(1, 60))
    for name in ("frechet", "kernel", "lpips"):
        assert [x for x, _ in summary["series"][f"{name}_by_bin"]] == [0, 20, 40]
    assert summary["frechet_gap"] == pytest.approx(summary["frechet_seam"] - summary["frechet_inner"])
    assert summary["distance"]["frames"] == 12 and summary["distance"]["videos_fake"] == 4 * 4
    assert len(summary["against"]) == 4

    # the same figures from the videos themselves
    videos = torch.cat([torch.cat(list(_rollout(setup, seed).pieces(60)), 1) for seed in range(4)]).transpose(1, 2)
    shown = videos.clamp(-1, 1)
    found = seams(changes(shown), bends(shown), [14, 26, 38, 50])
    assert summary["seam_ratio"] == pytest.approx(found.ratio, rel=1e-4)
    assert summary["bend_ratio"] == pytest.approx(found.bend_ratio, rel=1e-4)
    assert summary["out_of_range"] == pytest.approx(float((videos.abs() > 1.001).float().mean()), rel=1e-3)
    levels = ((shown + 1) * 127.5).round()[:, :, :16]
    first = shown[:, :, :1].expand(-1, -1, 60, -1, -1)
    for name, at in (("lpips_by_bin", (19, 39, 59)),):
        colours = [
            nn.functional.normalize(each[:, :, list(at)].mean((3, 4)), dim=1) for each in (pixels(shown), pixels(first))
        ]
        expected = (colours[0] - colours[1]).square().sum(1).mean(0)
        assert [y for _, y in summary["series"][name]] == pytest.approx(expected.tolist(), rel=1e-3)
    score = inception_score(((levels.mean((2, 3, 4)) - 128) * 0.2).log_softmax(1), 2, 0)
    assert summary["inception_score"] == pytest.approx(score.mean, rel=1e-5)


def pixels(video: Tensor) -> Tensor:
    """As a network of images gets them."""
    mean, std = (torch.tensor(each)[:, None, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return ((video + 1) / 2 - mean) / std


def test_bins_are_those_of_the_video_in_order(dataset: str, networks: dict[str, str], tmp_path: Path) -> None:
    summary, setup = measured(dataset, tmp_path, features=networks["features"], eval_swaps=0)
    plan = pretrain.plan_of(config(features=networks["features"]), setup)
    video = torch.cat([torch.cat(list(_rollout(setup, seed).pieces(60)), 1) for seed in range(4)]).transpose(1, 2)
    assert plan.judges.network
    for number, (begin, value) in enumerate(summary["series"]["frechet_by_bin"]):
        window = video[:, :, begin : begin + 12].clamp(-1, 1)
        found = video_distance(plan_real(dataset, setup), [window], plan.judges.network, split="val", seed=0)
        assert number * 20 == begin and value == pytest.approx(found["frechet"], rel=1e-3)


def plan_real(dataset: str, setup: pretrain.Setup) -> list[Tensor]:
    """The held-out windows that the evaluation compares with."""
    heldout = pretrain.loader_of(config(), setup, "val", **HELDOUT, columns=("video",), frames=12)
    return [to_model(batch["video"]) for batch in heldout][:3]


def test_a_model_that_moves_nothing_is_as_good_as_repeating_the_reference(dataset: str, tmp_path: Path) -> None:
    chosen = config()
    setup = prepared(chosen, {"dataset": dataset}, tmp_path / "stage", pretrain)
    for parameter in setup.model.generator.to_differences.parameters():
        nn.init.zeros_(parameter)
    summary = pretrain.evaluate(chosen, setup, tmp_path)
    assert (
        summary["l1"] == pytest.approx(summary["l1_copy"], rel=1e-5) == pytest.approx(summary["l1_unmoved"], rel=1e-5)
    )
    assert summary["swap_content"] == 1.0 and summary["path_content"] == 0.0
    assert (summary["seam_ratio"], summary["change"], summary["level_drift"]) == (None, 0.0, 0.0)


def _rollout(setup: pretrain.Setup, seed: int) -> Any:
    return pretrain.plan_of(config(), setup).rollout([seed])


def test_the_figures_do_not_depend_on_the_batch_and_networks_may_be_missing(dataset: str, tmp_path: Path) -> None:
    first, second = (measured(dataset, tmp_path / str(n), eval_batch=n)[0] for n in (1, 4))
    assert first.keys() == second.keys() and "frechet_seam" not in first and "lpips_last" not in first
    for name in ("seam_ratio", "bend_ratio", "change", "level_drift", "swap_movement", "l1", "l1_unmoved"):
        assert first[name] == pytest.approx(second[name], rel=1e-3), name


def test_a_model_without_recall_is_measured_on_single_clips(dataset: str, tmp_path: Path) -> None:
    summary, _ = measured(dataset, tmp_path, recall=False, eval_swaps=0)
    assert "seam" not in summary and "seam_ratio_heldout" not in summary and "swap_content" not in summary
    assert len(summary["against"]) == 2


def test_the_report_shows_the_videos_and_marks_the_joints(
    dataset: str, networks: dict[str, str], tmp_path: Path
) -> None:
    seen = tmp_path / "artifacts" / "heldout"
    seen.parent.mkdir()
    summary, _ = measured(dataset, seen, features=networks["features"], eval_swaps=1)

    def drawn(folder: Path) -> tuple[str, str]:
        """The page, and its picture of changes."""
        stage = StageRun("gan", "pretrain_encgan3", "FINISHED", False, 1.0, "1", "", {}, {}, {}, seen.parent)
        page = build(folder, "r", [stage], None, None, "").read_text()
        return page, next(folder.rglob("*change_from_frame*.svg")).read_text()

    page, picture = drawn(tmp_path / "page")
    assert page.count("<video") == 3 + 1 + 3 + 4 and "Videos joined clip by clip" in page
    for words in (
        "content of the first, movement of the second",
        "turns at joints to those inside",
        "windows of 12 frames, 16 generated and 3 val ones",
        "Reconstruction beats repeating the reference frame: no",
    ):
        assert words in " ".join(page.split()), words
    record = json.loads((seen / evaluate.SUMMARY).read_text())
    record["summary"]["marks"] = {}
    (seen / evaluate.SUMMARY).write_text(json.dumps(record))
    unmarked = drawn(tmp_path / "bare")[1]
    joints = summary["marks"]["change_by_frame"]
    assert picture.count("stroke-dasharray") - unmarked.count("stroke-dasharray") == len(joints) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"features": "x.pt", "eval_videos": 1}, "eval_videos: 1; a distance needs 2"),
        ({"classifier": "x.pt", "eval_splits": 3}, "eval_splits: 3 parts need 6 videos"),
        ({"perceptual_linear": "x.pt"}, "perceptual_linear: belongs to a network"),
        ({"eval_frames": 10}, "eval_frames: 10 are less than a bin, 20"),
    ],
)
def test_settings_that_measure_nothing_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(**changes)


def test_a_network_that_does_not_take_the_videos_is_refused_before_training(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        chosen = config(features="none.pt")
        setup = prepared(config(), {"dataset": dataset}, tmp_path, pretrain)
        pretrain.objective(chosen, setup)
