"""What a TATS's generated videos are measured by: distances, classes and coherence by chunk, and what is refused."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import latent_stages
import pytest
import tats_stages
import torch
from flat import nested
from pydantic import ValidationError
from torch import Tensor, nn

from longtake.datasets import clip
from longtake.datasets.errors import UserError
from longtake.datasets.loader import to_model
from longtake.training.metrics.coherence import coherence, inception_score
from longtake.training.metrics.distance import video_distance
from longtake.training.metrics.features import load_network
from longtake.training.models.common.video import concatenated
from longtake.training.models.tats import train as pretrain_tats
from longtake.training.models.tats.sample import videos_of
from longtake.training.models.tats.train import Config

pytestmark = pytest.mark.usefixtures("one_thread", "group")

QUICK: dict[str, Any] = {
    "kind": "pretrain_tats",
    "dataset": "dataset",
    "tokens": "tokens",
    "model": tats_stages.TINY,
    "every": tats_stages.EVERY,
    "workers": 0,
    "eval_clips": 2,
    "eval_videos": 5,
    "eval_frames": 28,
    "eval_chunk": tats_stages.FRAMES,
    "eval_splits": 2,
}


class Colours(nn.Module):
    """Images -> mean colours."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=[2, 3])


class Classes(nn.Module):
    """Clips in 0..255 -> logits of three classes, by their mean colours and how these move."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.mean(dim=[2, 3, 4]) - 128) * 0.2 + (x[:, :, -1] - x[:, :, 0]).mean(dim=[2, 3]) * 0.1


def script(module: nn.Module, folder: Path) -> str:
    path = folder / f"{type(module).__name__.lower()}.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("networks")
    return {"features": script(Colours(), folder), "classifier": script(Classes(), folder)}


@pytest.fixture(scope="module")
def made(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Read them, do not change them."""
    found = tats_stages.inputs(tmp_path_factory.mktemp("tats"), dataset)
    return {name: found[name] for name in ("dataset", "tokens")}


def config(**changes: Any) -> Config:
    return Config(**nested(QUICK | changes))


def started(chosen: Config, made: dict[str, str], folder: Path) -> Any:
    torch.manual_seed(0)
    setup = latent_stages.prepared(chosen, made, folder, pretrain_tats)
    setup.model.eval()
    # so that what it draws is not the same everywhere
    with torch.no_grad():
        setup.model.head.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    return setup


def measured(chosen: Config, made: dict[str, str], folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    setup = started(chosen, made, folder)
    (folder / "heldout").mkdir()
    pretrain_tats.evaluate(chosen, setup, folder / "heldout")
    record = json.loads((folder / "heldout" / "drawn.json").read_bytes())
    return record["summary"], record["videos"]


def test_figures_by_chunk_are_those_of_the_videos_and_their_conditions_are_beside_them(
    made: dict[str, str], networks: dict[str, str], tmp_path: Path
) -> None:
    chosen = config(**networks, eval_batch=2)
    summary, entries = measured(chosen, made, tmp_path / "run")
    setup = started(chosen, made, tmp_path / "again")
    plan = setup.rollout(chosen, setup.model, range(5), None)
    videos = to_model(torch.from_numpy(concatenated(videos_of(plan, setup.vqgan, 7))).permute(0, 4, 1, 2, 3))
    assert videos.shape[2] == 28
    chunks = [videos[:, :, :12], videos[:, :, 12:24]]  # of the third four frames are missing

    record = summary["distance"]
    real = list(pretrain_tats._real(chosen, setup))
    network = load_network(networks["features"])
    truth = [video_distance(real, [chunk], network, split="val", seed=0) for chunk in chunks]
    for name in ("frechet", "kernel"):
        expected = [found[name] for found in truth]
        assert [frame for frame, _ in summary["series"][f"{name}_by_chunk"]] == [0, 12]
        assert [value for _, value in summary["series"][f"{name}_by_chunk"]] == pytest.approx(expected, rel=1e-6)
        assert summary[name] == pytest.approx(expected[0]) and record[name] == summary[name]
        assert summary[f"{name}_rise"] == pytest.approx(expected[1] - expected[0], rel=1e-4, abs=1e-9)
    digests = {name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for name, path in networks.items()}
    assert record["network_digest"] == digests["features"]
    assert (record["videos_fake"], record["videos_real"], record["frames"]) == (5, len(real), 12)

    levels = [((chunk + 1) * 127.5).round() for chunk in chunks]
    log_p = torch.stack([Classes()(chunk).double().log_softmax(1) for chunk in levels], 1)
    score, kept = inception_score(log_p[:, 0], 2, 0), coherence(log_p)
    assert (summary["inception_score"], summary["inception_score_std"]) == pytest.approx(score, rel=1e-5)
    assert [value for _, value in summary["series"]["ccs_by_chunk"]] == pytest.approx(kept.ccs.tolist())
    assert [value for _, value in summary["series"]["ics_by_chunk"]] == pytest.approx(kept.ics.tolist(), rel=1e-4)
    assert (summary["ccs"], summary["ccs_chance"]) == pytest.approx((float(kept.ccs[1]), kept.chance))
    expected = {"classifier": "classes", "classifier_digest": digests["classifier"], "classes": 3, "gives": "logits"}
    assert summary["classified"] == expected | {"splits": 2, "seed": 0, "videos": 5, "frames": 12}
    assert [what["what"] for what in summary["against"]][-1] == "share of later chunks with the class of their first"

    assert {entry["file"]: entry["frames"] for entry in entries} == {f"seed-{n}.mp4": 28 for n in range(5)}
    for entry in entries:
        assert len(clip.decode((tmp_path / "run" / "heldout" / entry["file"]).read_bytes())) == 28


def rounded(summary: dict[str, Any]) -> Any:
    """The summary but for the last digits, which depend on the order of sums."""
    return json.loads(json.dumps(summary), parse_float=lambda digits: round(float(digits), 9))


def test_how_many_are_generated_at_once_changes_nothing(
    made: dict[str, str], networks: dict[str, str], tmp_path: Path
) -> None:
    one, three = (measured(config(**networks, eval_batch=n), made, tmp_path / str(n))[0] for n in (1, 3))
    assert rounded(one) == rounded(three)


def test_without_networks_one_video_is_longer_and_none_is_measured(made: dict[str, str], tmp_path: Path) -> None:
    summary, entries = measured(config(eval_videos=2), made, tmp_path)
    assert {entry["file"]: entry["frames"] for entry in entries} == {
        "seed-0.mp4": 12,
        "seed-1.mp4": 12,
        "longer.mp4": 28,
    }
    assert summary["distance"] is None and set(summary["series"]) == {"heldout_loss_by_step"}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"eval_frames": 30}, "eval_frames: 30; the model makes 4n frames, such as 28 or 32"),
        ({"features": "none.pt"}, "none.pt: no such file"),
        ({"features": "features", "eval_frames": None, "eval_chunk": 52}, "eval_chunk: 52 frames: .*no usable sample"),
    ],
    ids=["frames", "no file", "clips too short"],
)
def test_what_cannot_be_measured_is_refused_before_the_first_step(
    made: dict[str, str], networks: dict[str, str], tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    given = {name: networks.get(value, value) if name == "features" else value for name, value in changes.items()}
    chosen = config(**given)
    with pytest.raises(UserError, match=why) as e:
        pretrain_tats.objective(chosen, started(chosen, made, tmp_path))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"mode": "anchors", "features": "x.pt"}, "features: mode anchors makes no whole videos"),
        ({"classifier": "x.pt", "eval_splits": 3}, "eval_splits: 3 parts need 6 videos or more; raise eval_videos, which is 5"),
        ({"classifier": "x.pt", "eval_frames": 8}, "eval_frames: 8 are less than a chunk, 12"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        config(**changes)


def test_other_networks_are_another_outside(networks: dict[str, str]) -> None:
    assert pretrain_tats.outside(config()) == ""
    assert len({pretrain_tats.outside(config(**{name: path})) for name, path in networks.items()}) == 2
