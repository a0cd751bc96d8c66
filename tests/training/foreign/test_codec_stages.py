"""Foreign autoencoders in the stages: their latents as a column, their decoder fine-tuned, and prediction on top of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_foreign
import torch
from click.testing import CliRunner

from longtake.datasets.errors import UserError
from longtake.datasets.latents import encoder_digest
from longtake.datasets.loader import Loader, to_model
from longtake.datasets.stage import content
from longtake.training import checkpoint
from longtake.training.foreign.codec import ForeignCodec
from longtake.training.loop import train
from longtake.training.models import judge_of
from longtake.training.models.common.codec import decoder_of, load_codec
from longtake.training.models.kind import Judged
from longtake.training.models.pv_vae import pretrain
from longtake.training.registry import disk

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW = {"frames": 9, "sizes": [[32, 32]], "batch": 2, "steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of diffusers with a tiny Wan 2.1 autoencoder alone."""
    path = tmp_path_factory.mktemp("wan") / "vae"
    tiny_foreign.tiny_wan_vae().save_pretrained(path, safe_serialization=True)
    return str(path)


def settings(dataset: str, parent: str, **changes: Any) -> pretrain.Config:
    run = {"sample_every": 0, "workers": 0, "checkpoint_every": 100, "log_every": 1}
    fields = {
        "kind": "pretrain_vae",
        "dataset": dataset,
        "parent": parent,
        "lambda_gan": 0.0,
        "eval_clips": 1,
        "run": run,
    }
    return pretrain.Config(**fields | {"eval_long": 0, "ema_half_lives": []} | WINDOW | changes)  # type: ignore[arg-type]


def test_a_parent_is_begun_with_as_its_phase_needs_it(dataset: str, folder: str) -> None:
    decoder = pretrain.begin(settings(dataset, folder, phase="decoder"), {"parent": folder})
    assert isinstance(decoder, ForeignCodec) and decoder.padding is None and decoder.training
    learns = {name.split(".")[1] for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    assert learns == {"decoder", "post_quant_conv"}
    predictive = pretrain.begin(settings(dataset, folder, phase="predictive", recompute=True), {"parent": folder})
    assert predictive.padding is not None and predictive.config.activation_checkpointing
    assert encoder_digest(predictive) == encoder_digest(decoder)
    noise = pretrain.begin(settings(dataset, folder, phase="predictive", padding="noise"), {"parent": folder})
    assert noise.config.padding == "noise" and not list(noise.padding.parameters())  # type: ignore[union-attr]


def test_stages_from_before_there_were_foreign_parents_keep_their_outputs(dataset: str) -> None:
    for phase in ("image", "predictive", "decoder"):
        plain = pretrain.Config(kind="pretrain_vae", dataset=dataset, phase=phase)
        assert not {"padding", "recompute"} & content(plain).keys()
    assert plain.freeze == ("encoder",)
    assert content(settings(dataset, "models:/wan/1", padding="noise", recompute=True)).keys() >= {
        "padding",
        "recompute",
    }


def test_what_does_not_fit_a_parent_is_one_line(dataset: str, folder: str, tmp_path: Path) -> None:
    for changes, says in (
        ({"frames": 10}, r"frames 10: the model needs 1 \+ 4n frames, such as 9 or 13"),
        ({"sizes": [[36, 32]]}, "sizes 36x32: the model needs multiples of 8"),
        ({"model": {"preset": "pv_vae_tiny"}}, "model: is not that of the parent .*; leave it out"),
    ):
        with pytest.raises(UserError, match=says):
            pretrain.begin(settings(dataset, folder, **changes), {"parent": folder})
    with pytest.raises(ValueError, match="recompute: is of a parent"):
        pretrain.Config(kind="pretrain_vae", dataset=dataset, recompute=True)


def test_in_the_decoder_phase_the_encoder_stays_as_it_is(
    dataset: str, folder: str, tmp_path: Path, group: None
) -> None:
    config = settings(dataset, folder, phase="decoder", steps=20, lr=3e-3)
    torch.manual_seed(0)
    setup = pretrain.Setup({"dataset": dataset}, pretrain.begin(config, {"parent": folder}), None)
    clips = to_model(next(iter(Loader(dataset, **window())))["video"])
    before = (setup.model.reconstruct(clips) - clips).square().mean()
    train(pretrain.objective(config, setup), pretrain.loader(config, setup, 0, 1), config, tmp_path / "run")
    trained = load_codec(folder)
    digest = encoder_digest(trained)
    trained.load_state_dict(checkpoint.trained(tmp_path / "run", config))
    assert encoder_digest(trained) == digest
    assert (trained.reconstruct(clips) - clips).square().mean() < 0.95 * before


def window() -> dict[str, Any]:
    return {"columns": ("video",), "frames": 9, "size": (32, 32), "batch": 4, "split": "train"}


@pytest.mark.slow
def test_a_decoder_and_a_predictive_one_are_registered_and_used(
    dataset: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any autoencoder: loaded, decoded with, judged, reconstructed from the command line, and gone on with."""
    import mlflow

    from longtake.infra.cli.reconstruct import reconstruct

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    try:
        client = mlflow.MlflowClient()
        experiment = client.create_experiment("e", f"{tmp_path}/artifacts")
        parent, made = folder, dict[str, str]()
        for phase, precision in (("decoder", "bf16"), ("predictive", "fp32")):
            monkeypatch.setenv("MLFLOW_RUN_ID", client.create_run(experiment).info.run_id)
            config = settings(dataset, parent, phase=phase, name=phase, precision=precision)
            result = pretrain.run(config, {"dataset": dataset, "parent": parent}, str(tmp_path / phase))
            made[phase] = parent = result["uri"]
            assert ("psnr_predicted" in result["metrics"]) == (phase == "predictive") and result["metrics"][
                "psnr_all"
            ] > 5

        codec, facts = load_codec(made["decoder"]), disk.read_config(_folder_of(made["decoder"]))
        digest = encoder_digest(load_codec(folder))
        assert facts["model"] == "foreign_vae" and encoder_digest(codec) == digest
        decoder, _ = decoder_of("models:/prior/1", {"uri": folder, "encoder": digest}, made["decoder"])
        assert isinstance(decoder, ForeignCodec) and decoder.padding is None
        with pytest.raises(UserError, match="has another encoder"):
            decoder_of("models:/prior/1", {"uri": folder, "encoder": digest}, made["predictive"])

        judge = judge_of(facts)
        batch = next(iter(Loader(dataset, **window() | {"batch": 1})))
        figures = judge.figures(Judged(made["predictive"], load_codec(made["predictive"]), facts), batch, None, 0, 1.0)
        assert set(figures) == set(judge.better)

        out = tmp_path / "out.mp4"
        arguments = [made["predictive"], _video(tmp_path), "--visible", "5", "--out", str(out)]
        CliRunner().invoke(reconstruct, arguments, catch_exceptions=False, standalone_mode=False)
        assert out.stat().st_size
    finally:
        mlflow.set_tracking_uri(None)


def _folder_of(uri: str) -> Path:
    from longtake.training.registry import cache

    return cache.pull(uri)


def _video(folder: Path) -> str:
    from longtake.datasets import clip

    path = folder / "in.mp4"
    clip.write(path, np.random.default_rng(0).integers(0, 255, (11, 32, 40, 3), np.uint8), fps=6)
    return str(path)
