"""What a trained MAVIN is measured by: filled gaps beside what takes no model, by length; the judge; what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import latent_stages
import numpy as np
import pytest
import torch
from flat import nested
from latent_stages import prepared
from priors import awake
from pydantic import ValidationError
from torch import Tensor, nn

from longtake.datasets import clip
from longtake.datasets.errors import UserError
from longtake.datasets.latents import encoder_digest
from longtake.datasets.loader import to_model
from longtake.infra.report import StageRun, build
from longtake.training.data import HELDOUT
from longtake.training.metrics import transitions
from longtake.training.metrics.distance import video_distance
from longtake.training.metrics.perceptual import lpips
from longtake.training.models import judge_of
from longtake.training.models.generator import InfillSettings
from longtake.training.models.kind import Judged
from longtake.training.models.mavin import evaluate, finetune
from longtake.training.models.mavin.baselines import faded, held
from longtake.training.models.mavin.encode import encode_apart, frames_of_span
from longtake.training.models.mavin.finetune import Config, plan_of, window_of
from longtake.training.models.mavin.infill import Hints, sample
from longtake.training.models.mavin.mixer import Mixer, initial
from longtake.training.models.mavin.spans import spans_to_measure
from longtake.training.models.mavin.windows import Window
from longtake.training.registry.gate import Window as GateWindow

pytestmark = pytest.mark.usefixtures("one_thread", "group")

MODEL: dict[str, Any] = {"preset": "mavin_tiny", "depth": 2, "width": 16, "heads": 2, "patch": 4}
QUICK: dict[str, Any] = {
    "kind": "finetune_mavin",
    "dataset": "dataset",
    "model": MODEL,
    "frames": 12,
    "size": (16, 16),
    "workers": 0,
    "sample_steps": 2,
    "eval_clips": 3,
    "eval_videos": 2,
}
LATENTS: dict[str, Any] = {"vae": "vae", "frames": 14, "size": (32, 32), "model": MODEL | {"patch": 1}}
# a rank of an evaluation, for each job that is a line
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from longtake.training import engines
from longtake.training.models.mavin import finetune
from latent_stages import prepared
from priors import awake

if __name__ == "__main__":
    with engines.process_group() as (rank, world):
        torch.set_num_threads(1)
        for line in sys.stdin:
            job = json.loads(line)
            config, folder = finetune.Config(**job["settings"]), Path(job["folder"])
            setup = prepared(config, job["inputs"], Path(job["folder"] + str(rank)), finetune)
            awake(setup.model)
            folder.mkdir(exist_ok=True)
            print(json.dumps(finetune.evaluate(config, setup, folder)), flush=True)
"""


class Colours(nn.Module):
    """Images -> mean colours."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=[2, 3])


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("networks") / "colours.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Colours()).save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def inputs(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        "dataset": dataset,
        "vae": latent_stages.saved(latent_stages.vae(), tmp_path_factory.mktemp("mavin") / "vae"),
    }


def config(**changes: Any) -> Config:
    return Config(**nested(QUICK | changes))


def measured(inputs: dict[str, str], folder: Path, **changes: Any) -> tuple[dict[str, Any], Config, finetune.Setup]:
    chosen = config(**changes)
    needed = ("dataset", "vae") if chosen.vae else ("dataset",)
    setup = prepared(chosen, {name: inputs[name] for name in needed}, folder / "stage", finetune)
    awake(setup.model)
    return finetune.evaluate(chosen, setup, folder), chosen, setup


def clips(chosen: Config, setup: finetune.Setup, count: int) -> list[dict[str, Any]]:
    return list(finetune.loader_of(chosen, setup, "val", **HELDOUT))[:count]


def between(window: Window) -> tuple[Tensor, Tensor]:
    begin, stop = window.frames
    return window.video[:, :, :begin], window.video[:, :, stop:]


@torch.no_grad()
def test_figures_are_those_of_gaps_as_users_get_them_and_of_what_takes_no_model(
    inputs: dict[str, str], colours: str, tmp_path: Path
) -> None:
    """Each figure once more, from the definition of how gaps are filled."""
    networks = {"features": colours, "perceptual": colours}
    mixer = {"mixer": "per_frame", "noise": "fresh", "cutoff": 0.9, "fall": 0.2}
    summary, chosen, setup = measured(inputs, tmp_path, **networks, **mixer, shift=2.0, image_guidance=1.5, frames=18)
    record = json.loads((tmp_path / evaluate.SUMMARY).read_text())
    assert record["summary"] == json.loads(json.dumps(summary))
    assert (summary["clips"], summary["videos"]) == (3, 2)
    settings = InfillSettings(2, 2.0, 1.0, 1.5, "per_frame", "fresh", 0.9, 0.2)
    assert chosen.sampling == settings
    assert asdict(settings) == finetune.facts(chosen, setup, {"inputs": {}})["sampling"]

    plan = plan_of(chosen, setup)
    spans = spans_to_measure(setup.spans)
    judges = plan.judges
    assert judges.perceptual and judges.network and judges.embedder
    rows, fakes, places = list[dict[str, float]](), list[Tensor](), list[int]()
    reach = spans[-1][1] - spans[-1][0] + 4
    assert [stop - begin for begin, stop in spans] == [2, 7, 12] and reach == 16
    for number, batch in enumerate(clips(chosen, setup, 2)):
        for begin, stop in spans:
            video = to_model(batch["video"])
            before, after = video[:, :, :begin], video[:, :, stop:]
            image = finetune.boundary_tokens(setup.encoder, torch.stack([before[:, :, -1], after[:, :, 0]], 1))  # type: ignore[arg-type]
            draws = []
            for seed in (0, 1):
                noise = initial(
                    Mixer("per_frame", "fresh", 0.9, 0.2), before[0], after[0], stop - begin, (seed, number)
                )
                whole = sample(setup.model, before, after, noise[None], Hints(image=image), settings)
                draws.append(whole[:, :, begin:stop].clamp(-1, 1))
            true, n = video[:, :, begin:stop], stop - begin
            row: dict[str, Any] = {"length": n, "diversity": transitions.diversity(torch.cat(draws)).mean()}
            for way, gap in (
                ("", draws[0]),
                ("_faded", faded(before, after, n)),
                ("_held", held(before, after, n)),
                ("_true", true),
            ):
                joined = torch.cat([before, gap, after], 2)
                seen = [
                    transitions.embedded(judges.embedder.embeddings, each[0, :, begin - 1 : stop + 1])
                    for each in (joined, video)
                ]
                row[f"clip_rs{way}"] = transitions.clip_rs(*seen)
                row |= {f"{name}{way}": value for name, value in transitions.joints(joined, begin, n).items()}
                row[f"middle_psnr{way}"] = transitions.middle(gap, true)["psnr"]
                row[f"middle_lpips{way}"] = float(lpips(judges.perceptual, gap, true))
                row[f"closeness{way}"] = float(transitions.closeness(gap, before[:, :, -1], after[:, :, 0]).mean())
                row[f"joint_error{way}"] = float((gap - true)[:, :, [0, -1]].abs().mean() / 2)
                if way == "":
                    # two frames more on each side than the longest gap has, the gap in their middle
                    places.append(max(0, min((begin + stop) // 2 - reach // 2, 18 - reach)))
                    fakes.append(joined[:, :, places[-1] : places[-1] + reach])
            rows.append(row)
    table = transitions.by_length(rows)
    # of means over videos, which one video that stands still does not decide
    for figures in table.values():
        for way in ("", "_held", "_faded", "_true"):
            pairs = {
                name: (figures.pop(f"{name}_at{way}"), figures.pop(f"{name}_inside{way}")) for name in ("seam", "bend")
            }
            figures |= {f"{name}_ratio{way}": at / inside for name, (at, inside) in pairs.items()}
    series = {name[: -len("_by_gap")] for name in summary["series"]}
    assert {name.removesuffix("_held") for name in series} >= {"clip_rs", "middle_psnr", "middle_ssim", "seam_ratio"}
    assert not {"middle_psnr_true", "middle_psnr_latent", "clip_rs_code"} & series
    for name in series - {"heldout_loss", "heldout_loss_mean"} - {each for each in series if "ssim" in each}:
        expected = [(length, figures[name]) for length, figures in table.items() if name in figures]
        assert summary["series"][f"{name}_by_gap"] == [
            (length, pytest.approx(value, rel=1e-3, abs=1e-5)) for length, value in expected
        ], name
        assert summary[name] == pytest.approx(np.mean([value for _, value in expected]), rel=1e-3, abs=1e-5), name

    videos = [to_model(batch["video"]) for batch in clips(chosen, setup, 3)]
    real = [video[:, :, start : start + reach] for video in videos for start in sorted(set(places))]
    found = video_distance(real, fakes, judges.network, split="val", seed=0)
    assert summary["frechet_seam"] == pytest.approx(found["frechet"], rel=1e-4)
    assert summary["distance"]["frames"] == reach and summary["distance"]["videos_fake"] == 6
    assert summary["frechet_seam_faded"] > 0 and summary["kernel_seam_held"] is not None
    assert "against" in summary and {each["trivial"] for each in summary["against"]} >= {"a cross-fade", "hold and cut"}


class Knowing(nn.Module):
    """The exact velocity towards latents that it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(clean_time="zero")
        self.data = torch.empty(0)

    def forward(self, x: Tensor, times: Tensor, length: Tensor, *hints: Tensor | None) -> Tensor:
        return (x - self.data) / times.clamp_min(1e-6)[:, None, :, None, None]

    @staticmethod
    def normalise(latent: Tensor) -> Tensor:
        return latent.float()

    denormalise = normalise


def test_a_model_that_knows_the_gap_is_perfect_by_all_figures(
    inputs: dict[str, str], colours: str, tmp_path: Path
) -> None:
    chosen = config(features=colours, eval_videos=3)
    setup = prepared(chosen, {"dataset": inputs["dataset"]}, tmp_path / "stage", finetune)
    model: Any = Knowing()

    def window(batch: dict[str, Any], span: tuple[int, int]) -> Window:
        found = window_of(setup, batch, span)
        model.data = found.latents
        return found

    plan = plan_of(chosen, setup)._replace(window=window, spans=[spans_to_measure(setup.spans)[-1]])
    heldout = finetune.loader_of(chosen, setup, "val", **HELDOUT)
    summary = evaluate.evaluate(model, setup.codec, heldout, plan, tmp_path)
    assert summary["heldout_loss"] == pytest.approx(0, abs=1e-4) and summary["middle_psnr"] > 60
    assert summary["clip_rs"] == pytest.approx(1, abs=1e-4) and summary["middle_ssim"] == pytest.approx(1, abs=1e-3)
    assert summary["joint_error"] < 1e-3 and summary["diversity"] < 1e-3
    assert summary["seam_ratio"] == pytest.approx(summary["seam_ratio_true"], rel=1e-2)
    assert summary["frechet_seam"] == pytest.approx(0, abs=1e-3) and summary["frechet_seam_held"] > 1e-5
    assert summary["clip_rs_held"] < 1 and all(each["beats"] for each in summary["against"])


@torch.no_grad()
def test_with_an_autoencoder_latents_are_interpolated_and_decoded_as_gaps_are(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    summary, chosen, setup = measured(inputs, tmp_path, **LATENTS, eval_draws=1)
    assert "diversity" not in summary
    assert [length for length, _ in summary["series"]["heldout_loss_by_gap"]] == [4, 8, 12]
    found = []
    for batch in clips(chosen, setup, 2):
        video = to_model(batch["video"])
        for start, end in spans_to_measure(setup.spans):
            begin, stop = frames_of_span(setup.codec, start, end)
            sides = encode_apart(setup.codec, video[:, :, :begin], video[:, :, stop:])
            decoded = setup.codec.decode(torch.cat([sides[0], faded(*sides, end - start)], 2))[:, :, begin:stop]
            found.append(transitions.middle(decoded.clamp(-1, 1), video[:, :, begin:stop])["psnr"])
    assert summary["middle_psnr_latent"] == pytest.approx(np.mean(found), abs=0.05)


def test_frames_that_are_made_are_framed_in_the_videos(inputs: dict[str, str], tmp_path: Path) -> None:
    summary, _, setup = measured(inputs, tmp_path)
    rows = json.loads((tmp_path / evaluate.SUMMARY).read_text())["videos"]
    assert [row["file"] for row in rows] == ["filled-0.mp4", "filled-1.mp4"]
    frames = clip.decode((tmp_path / "filled-0.mp4").read_bytes()).astype(int)
    assert frames.shape == (12, 60, 3 * 60, 3)
    begin, stop = spans_to_measure(setup.spans)[-1]
    red = frames[:, :4, :, 0].mean(1)  # of the room above each of the three panels of 20 x 20, times three
    panels = red[:, :60].mean(1), red[:, 60:120].mean(1), red[:, 120:].mean(1)
    assert (panels[0] < 40).all()
    for panel in panels[1:]:
        assert (panel[begin:stop] > 180).all() and (panel[:begin] < 60).all() and (panel[stop:] < 60).all()
    assert summary["videos"] == 2


def test_the_report_draws_figures_by_gap(inputs: dict[str, str], colours: str, tmp_path: Path) -> None:
    seen = tmp_path / "artifacts" / "heldout"
    seen.mkdir(parents=True)
    measured(inputs, seen, features=colours)
    stage = StageRun("gaps", "finetune_mavin", "FINISHED", False, 1.0, "1", "", {}, {}, {}, seen.parent)
    page = " ".join(build(tmp_path / "page", "r", [stage], None, None, "").read_text().split())
    assert page.count("<video") == 2
    for words in (
        "PSNR of gaps",
        "CLIP-RS of gaps",
        "change at joints to that elsewhere",
        "PSNR of filled gaps beats hold and cut: no",
        "windows of 12 frames, 6 filled and 3 val ones",
        "by an encoder of digest own-2 (pixels)",
        "8 frames are made",
    ):
        assert words in page, words


def test_clip_rs_is_by_the_encoder_that_is_named(inputs: dict[str, str], colours: str, tmp_path: Path) -> None:
    own, named = (
        measured(inputs, tmp_path / str(n), image=None, **change)[0]
        for n, change in enumerate(({"embedder": "own"}, {"embedder": colours}))
    )
    blind = measured(inputs, tmp_path / "2", image=None)[0]
    assert own["embedder"] == {"embedding": "pixels", "digest": "own-2"} and named["embedder"]["embedding"] == "pooled"
    assert own["clip_rs_held"] != named["clip_rs_held"] and own["middle_psnr"] == named["middle_psnr"]
    assert "clip_rs" not in blind and "embedder" not in blind


def test_the_released_variant_is_measured_with_clip(inputs: dict[str, str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=6)
    transformers.CLIPVisionModelWithProjection(settings).save_pretrained(tmp_path / "clip")
    summary, chosen, setup = measured(inputs, tmp_path / "run", embedder=str(tmp_path / "clip"), eval_videos=1)
    assert summary["embedder"]["embedding"] == "projected" and 0 < summary["clip_rs"] <= 1
    encoder = plan_of(chosen, setup).judges.embedder
    assert encoder
    window = window_of(setup, clips(chosen, setup, 1)[0], spans_to_measure(setup.spans)[0])
    begin, stop = window.frames
    pair = [
        encoder.tokens(each[0, :, begin - 1 : stop + 1].transpose(0, 1))
        for each in (window.joined(held(*between(window), window.length)), window.video)
    ]
    (_, first), *_ = summary["series"]["clip_rs_code_held_by_gap"]
    assert first == pytest.approx(transitions.clip_rs_code(*pair), rel=1e-4)
    # a model that is measured by another one trains nothing else, but is measured again where its files change
    before = finetune.outside(chosen)
    described = json.loads((tmp_path / "clip" / "config.json").read_text())
    (tmp_path / "clip" / "config.json").write_text(json.dumps(described | {"image_size": 12}))
    assert before != finetune.outside(chosen) != finetune.outside(config())


def test_other_files_are_another_outside(colours: str, tmp_path: Path) -> None:
    assert finetune.outside(config()) == finetune.outside(config(embedder="own", image=None)) == ""
    named = {finetune.outside(config(**{name: colours})) for name in ("features", "perceptual", "image", "embedder")}
    assert len(named) == 1 and named != {""}
    (tmp_path / "unet").mkdir()
    chosen = config(unet=str(tmp_path), model={"preset": "mavin_unet_tiny"})
    keys = set[str]()
    for content in (b"1", b"2"):
        (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(content)
        keys.add(finetune.outside(chosen))
    assert len(keys) == 2


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(
    inputs: dict[str, str], colours: str, tmp_path: Path, module_ranks: Callable[[int, str], Any]
) -> None:
    pair = module_ranks(2, SCRIPT)
    # of the two, the one measures a single clip and fills none
    changes = {"features": colours, "eval_videos": 2, "eval_clips": 3, "eval_draws": 1}
    alone = json.loads(json.dumps(measured(inputs, tmp_path / "one", **changes)[0]))
    job = {"settings": config(**changes).model_dump(mode="json"), "inputs": {"dataset": inputs["dataset"]}}
    pair.send(job | {"folder": str(tmp_path / "two")})
    both = pair.answers()
    assert both[0] == both[1] and both[0].keys() == alone.keys()
    for name, value in alone.items():
        if isinstance(value, float):
            assert both[0][name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
    assert both[0]["series"].keys() == alone["series"].keys()


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_the_judge_fills_a_gap_and_knows_the_autoencoder(inputs: dict[str, str], tmp_path: Path, kind: str) -> None:
    _, chosen, setup = measured(inputs, tmp_path, **(LATENTS if kind == "latents" else {}), sample_steps=9)
    origin = {"vae": {"uri": inputs["vae"]}} if kind == "latents" else {}
    facts = finetune.facts(chosen, setup, {"inputs": origin}) | {"kind": "mavin", "model": "mavin"}
    judge = judge_of(facts)
    batch = clips(chosen, setup, 1)[0]
    judged = Judged(str(tmp_path / "judged"), setup.model, facts)
    options = judge.options(judged, {}, GateWindow(frames=chosen.frames))
    assert options["size"] == chosen.size
    figures = judge.figures(judged, batch, None, 0, 1.0)
    assert figures.keys() == judge.better.keys() == {"loss", "middle_psnr", "joint"}
    assert figures == judge.figures(judged, batch, None, 0, 1.0) != judge.figures(judged, batch, None, 1, 1.0)
    # in no more than eight steps
    window = window_of(setup, batch, spans_to_measure(setup.spans)[1])
    made = finetune.filled(setup.model, setup.codec, window, replace(chosen.sampling, steps=8), (0, 0))
    assert figures["middle_psnr"] == pytest.approx(transitions.middle(made, window.truth)["psnr"], rel=1e-4)
    assert figures["joint"] == pytest.approx(transitions.joint_error(made, window.truth), rel=1e-4)

    if kind == "latents":
        assert facts["vae"]["encoder"] == encoder_digest(setup.codec)
        other = Judged("m", setup.model, facts | {"vae": facts["vae"] | {"encoder": "0"}})
        with pytest.raises(UserError, match="has another encoder than the latents that m was trained on") as e:
            judge.figures(other, batch, None, 0, 1.0)
        assert "\n" not in str(e.value)
    unlike = Judged("m", setup.model, facts | {"image": facts["image"] | {"digest": "0"}})
    with pytest.raises(UserError, match="m: has learned from another image encoder than own"):
        judge.figures(unlike, batch, None, 0, 1.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"features": "x.pt", "eval_videos": 1}, "eval_videos: 1; a distance needs 2"),
        ({"perceptual_linear": "x.pt"}, "perceptual_linear: belongs to a network"),
        ({"cutoff": 0.4}, "cutoff: has no effect without a mixer"),
        ({"noise": "fresh"}, "noise: has no effect without a mixer"),
        ({"mixer": "paper", "cutoff": 0.0}, "cutoff is 0.0"),
        ({"mixer": "paper", "fall": -1.0}, "fall -1.0"),
        ({"guidance": 4.0}, "guidance: leads to a text, and the stage has none"),
        ({"image_guidance": 2.0, "image": None}, "image_guidance: leads to frames that the model does not see"),
    ],
)
def test_settings_without_effect_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        config(**changes)


@pytest.mark.parametrize("name", ["features", "perceptual", "embedder"])
def test_a_network_that_cannot_measure_is_refused_before_training(
    inputs: dict[str, str], tmp_path: Path, name: str
) -> None:
    given = {"dataset": inputs["dataset"]}
    setup = prepared(config(), given, tmp_path, finetune)
    with pytest.raises(UserError, match=r"none.pt: no such file"):
        finetune.objective(config(**{name: "none.pt"}), setup)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(nn.Conv2d(3, 2, 40)).save(str(tmp_path / "wide.pt"))
    with pytest.raises(UserError, match=rf"{name}: .*wide.pt: takes no (videos of 12 )?frames of 16x16"):
        finetune.objective(config(**{name: str(tmp_path / "wide.pt")}), setup)
