"""The adversarial piece: how much of the discriminator the generator hears, when, and how it goes from parent to child."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flat import nested
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from longtake.datasets.loader import Loader, to_model
from longtake.infra import recipe as recipes
from longtake.training import checkpoint, registry
from longtake.training.loop import train
from longtake.training.models.common import adversarial
from longtake.training.models.common.adversarial import GANConfig
from longtake.training.models.pv_vae import pretrain as pretrain_vae
from longtake.training.models.pv_vae.model import PVVAE
from longtake.training.objective import Turn
from longtake.training.registry import cache as pull
from longtake.training.registry import disk

pytestmark = pytest.mark.usefixtures("one_thread", "group")

TINY = {"discriminator": {"preset": "patchgan_tiny"}}
RECIPES = Path(recipes.__file__).with_name("recipes")


def config(**changes: Any) -> GANConfig:
    return GANConfig(**TINY | {"steps": 20, "gan_start": 0} | changes)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state() -> dict[str, Tensor]:
    return adversarial.begin(config())[1]


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), min_size=1, max_size=8))
def test_the_ratio_is_that_of_the_norms_smoothed_and_bounded(norms: list[tuple[float, float]]) -> None:
    squares, sums = torch.zeros(2), [0.0, 0.0]
    unit = random(3, 5) / random(3, 5).norm()
    for norm in norms:
        ratio, smoothed = adversarial.balance(squares, norm[0] * unit, norm[1] * unit)
        sums = [0.95 * before + 0.05 * now**2 for before, now in zip(sums, norm, strict=True)]
        assert ratio.item() == pytest.approx(min(10.0, norm[0] / norm[1]), rel=1e-4)
        assert smoothed.item() == pytest.approx(min(10.0, math.sqrt(sums[0] / sums[1])), rel=1e-4)


def test_what_is_not_finite_or_nothing_does_not_spoil_the_ratio() -> None:
    squares = torch.zeros(2)
    assert adversarial.balance(squares, torch.full((4,), math.nan), torch.ones(4))[1] == 0
    adversarial.balance(squares, torch.ones(4), 2 * torch.ones(4))
    before = squares.clone()
    _, smoothed = adversarial.balance(squares, torch.ones(4), torch.full((4,), math.inf))
    assert torch.equal(squares, before) and smoothed.item() == pytest.approx(0.5)
    assert adversarial.balance(torch.zeros(2), torch.ones(4), torch.zeros(4))[1] == 10


@pytest.mark.parametrize("kind", ["adaptive", "fixed"])
def test_the_generators_gradient_and_loss_are_those_of_the_weighed_sum(kind: str) -> None:
    weights, real = random(6, 6).requires_grad_(), random(4, 6, seed=1)
    judge = torch.nn.Linear(6, 1)
    settings = config(lambda_gan=0.3, gan_weight=kind)

    def error(made: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return (made - real).square().mean(), {"error": torch.tensor(7.0)}

    made = torch.tanh(real @ weights)
    loss, terms = adversarial.generator_loss(settings, state(), made, error, judge)
    (got,) = torch.autograd.grad(loss, weights)

    made = torch.tanh(real @ weights)
    parts = error(made)[0], -judge(made).mean()
    pulls = [torch.autograd.grad(part, made, retain_graph=True)[0].norm() for part in parts]
    ratio = pulls[0] / pulls[1]
    weight = 0.3 * ratio if kind == "adaptive" else torch.tensor(0.3)
    expected = parts[0] + weight.detach() * parts[1]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(got, torch.autograd.grad(expected, weights)[0])
    assert {k: float(v) for k, v in terms.items()} == pytest.approx(
        {"error": 7.0, "gan": float(parts[1]), "gan_ratio": float(ratio), "gan_weight": float(weight)}, rel=1e-4
    )


def test_the_generator_hears_a_discriminator_that_has_learned_enough_itself_or_as_the_parents() -> None:
    new, kept = state(), state()
    kept["gan_learned"].fill_(70)
    trains = adversarial.trains_generator
    assert [trains(config(gan_warmup=3, gan_start=2), new, 2 + n) for n in range(5)] == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert [trains(config(gan_warmup=0, gan_start=2), new, 2 + n) for n in range(3)] == [False, True, True]
    assert [trains(config(gan_warmup=72, gan_start=2), kept, 2 + n) for n in range(4)] == [False, False, True, True]
    assert [trains(config(gan_warmup=9, gan_start=2), kept, 2 + n) for n in range(2)] == [False, True]


def test_lecam_is_that_of_its_formula_and_follows_the_logits() -> None:
    real, made = torch.tensor([2.0, -1.0]), torch.tensor([-2.0, 0.5])
    value = adversarial.lecam(real, made, torch.tensor(1.0), torch.tensor(-0.5))
    assert value.item() == pytest.approx((2.5**2 + 0) / 2 + (3.0**2 + 0.5**2) / 2)
    held, videos = state(), torch.zeros(4, 3, 1, 8, 8)
    plain, _ = adversarial.discriminator_loss(
        config(), held, lambda x: x.mean((1, 2, 3, 4)) + 2, videos[:2], videos[2:]
    )
    assert held["gan_logits"].tolist() == [0, 0]
    for average in (0.0, 0.02):
        loss, terms = adversarial.discriminator_loss(
            config(lambda_lecam=0.5), held, lambda x: x.mean((1, 2, 3, 4)) + 2, videos[:2], videos[2:]
        )
        # only of the real ones: the made ones, at 2, are above the average of real ones
        assert float(terms["lecam"]) == pytest.approx((2 - average) ** 2, rel=1e-4)
        assert float(loss - plain) == pytest.approx(0.5 * float(terms["lecam"]), rel=1e-4)
    assert held["gan_logits"].tolist() == pytest.approx([0.0398, 0.0398])


def test_the_discriminator_has_a_rate_betas_and_a_schedule_of_its_own() -> None:
    own = adversarial.settings(config(steps=30, gan_start=10, discriminator_lr=3e-4, discriminator_betas=(0.0, 0.99)))
    assert (own.lr, own.betas, own.steps) == (3e-4, (0.0, 0.99), 20)
    assert adversarial.settings(config(lr=2e-5)).lr == 2e-5
    with pytest.raises(ValueError, match="unknown preset 'huge'"):
        config(discriminator={"preset": "huge"})


def parent(folder: Path, **changes: Any) -> dict[str, Tensor]:
    """Leave a discriminator that has learned 15 steps; returns its weights."""
    torch.manual_seed(5)
    weights = adversarial.PatchGAN(adversarial.model_config_of(TINY["discriminator"])).state_dict()
    kept = {"gan_learned": [0]}
    adversarial.save(folder / adversarial.FILE, config(gan_start=5, **changes), weights, kept)
    return weights


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_fitting_discriminator_of_the_parent_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = parent(tmp_path)
    model, kept = adversarial.begin(config(), str(tmp_path))
    assert same(dict(model.state_dict()), weights) and kept["gan_learned"].tolist() == [15]
    assert capsys.readouterr().err == f"discriminator: goes on with that of {tmp_path}, which has learned 15 steps\n"


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("none", "has none"),
        ("other", "has other settings"),
        ("bytes", "is damaged"),
        ("tensors", "its tensors are not those of its settings"),
        ("pickle", "is damaged"),
    ],
)
def test_one_that_does_not_fit_begins_anew_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str, says: str
) -> None:
    path = tmp_path / adversarial.FILE
    other = {"discriminator": {"preset": "patchgan_tiny", "groups": 4}}
    if fault != "none":
        weights = parent(tmp_path, **other if fault == "other" else {})
    if fault == "bytes":
        path.write_bytes(path.read_bytes()[:1000])
    if fault == "tensors":
        name = next(iter(weights))
        content = {"config": '{"channels": 3, "groups": 8, "layers": 2, "width": 16}', "learned": "9"}
        save_file(load_file(path) | {name: weights[name][:1].contiguous()}, path, content)
    if fault == "pickle":
        torch.save(weights, path)
    torch.manual_seed(0)
    model, kept = adversarial.begin(config(), str(tmp_path))
    torch.manual_seed(0)
    assert same(dict(model.state_dict()), dict(adversarial.begin(config())[0].state_dict()))
    assert kept["gan_learned"].tolist() == [0]
    said = capsys.readouterr().err
    assert said.startswith("discriminator: begins anew (") and says in said and said.count("\n") == 1


def test_the_run_of_a_registered_parent_hands_its_discriminator_on_and_the_model_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    try:
        client = mlflow.MlflowClient()
        run = client.create_run(client.create_experiment("e", f"{tmp_path}/artifacts")).info.run_id
        vae = PVVAE(pretrain_vae.config_from_preset("pv_vae_tiny"))
        disk.save(tmp_path / "model", "pv_vae", vae.config.model_dump(mode="json"), vae.state_dict(), {})
        version = registry.register(tmp_path / "model", "vae", run)
        adversarial.begin(config(), version)
        assert "begins anew" in (said := capsys.readouterr().err) and "its run has left no" in said
        weights = parent(tmp_path / "left")
        client.log_artifacts(run, str(tmp_path / "left" / "discriminator"), "discriminator")
        for name in (version, "models:/vae@candidate", f"runs:/{run}/model"):
            model, kept = adversarial.begin(config(), name)
            assert same(dict(model.state_dict()), weights) and kept["gan_learned"].tolist() == [15], name
        assert not list(pull.pull(version).glob("*discriminator*"))
        monkeypatch.setenv("LONGTAKE_OFFLINE", "1")
        capsys.readouterr()
        assert adversarial.begin(config(), version)[1]["gan_learned"].tolist() == [0]
        assert "LONGTAKE_OFFLINE is set" in capsys.readouterr().err
    finally:
        mlflow.set_tracking_uri(None)


def vae_config(dataset: str, **changes: Any) -> pretrain_vae.Config:
    settings = {
        "kind": "pretrain_vae", "dataset": dataset, "model": {"preset": "pv_vae_tiny"}, "frames": 1, "max_drop": 0.0,
        "sizes": [[32, 32]], "batch": 4, "workers": 0, "sample_every": 0, "checkpoint_every": 1000, "ema_half_lives": [], **TINY,
    }  # fmt: skip
    return pretrain_vae.Config(**nested(settings | changes))


def started(settings: pretrain_vae.Config) -> pretrain_vae.Setup:
    """What the stage works with before its first step, without a parent."""
    return pretrain_vae.Setup({"dataset": settings.dataset}, pretrain_vae.begin(settings, {}), None)


def fit(settings: pretrain_vae.Config, folder: Path, begun: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights after a training."""
    torch.manual_seed(0)
    setup = started(settings)
    if begun:
        setup.model.load_state_dict(begun)
    window = {"columns": ("video",), "frames": settings.frames, "size": settings.sizes[0]}
    loader = Loader(settings.dataset, **window, batch=settings.batch, crop="random", last="pad")
    train(replace(pretrain_vae.objective(settings, setup), heldout=()), loader, settings, folder)
    return checkpoint.trained(folder, settings)


@pytest.mark.usefixtures("group")
def test_the_first_held_out_clip_is_the_sample_each_time_however_few_there_are(dataset: str, tmp_path: Path) -> None:
    settings = vae_config(dataset, steps=3, sample_every=1, heldout_every=1, lambda_gan=0, frames=5, lr=1e-12)
    window = {"columns": ("video",), "frames": 5, "size": (32, 32)}
    shown: list[Any] = []

    class Log:
        def log(self, step: int, values: dict[str, float]) -> None: ...

        def video(self, step: int, name: str, video: Any, fps: float) -> None:
            shown.append(video[:, :, :32])

    made = pretrain_vae.objective(settings, started(settings))
    loader = Loader(dataset, **window, batch=4)
    train(made, loader, settings, tmp_path, Log())  # type: ignore[arg-type]
    assert len(shown) == 3 and all((video == shown[0]).all() for video in shown)


@pytest.mark.slow
def test_a_stage_leaves_its_discriminator_with_its_run_for_the_next(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    try:
        client, parents = mlflow.MlflowClient(), dict[str, Any]()
        experiment = client.create_experiment("e", f"{tmp_path}/artifacts")
        for stage in ("one", "two"):
            monkeypatch.setenv("MLFLOW_RUN_ID", client.create_run(experiment).info.run_id)
            settings = vae_config(dataset, steps=4, batch=2, gan_start=1, gan_warmup=2, eval_clips=1, **parents)
            made = pretrain_vae.run(settings, {"dataset": dataset} | parents, str(tmp_path / stage))
            parents = {"parent": made["uri"]}
        assert "goes on with that of models:/pv-vae/1, which has learned 3 steps" in capsys.readouterr().err
        assert adversarial.begin(config(), made["uri"])[1]["gan_learned"].tolist() == [6]
    finally:
        mlflow.set_tracking_uri(None)


@torch.no_grad()
def psnr(settings: pretrain_vae.Config, weights: dict[str, Tensor]) -> float:
    model = PVVAE(settings.vae()).eval()
    model.load_state_dict(weights)
    window = {"columns": ("video",), "frames": settings.frames, "size": settings.sizes[0]}
    loader = Loader(settings.dataset, "val", **window, batch=1, shuffle=False, epochs=1, last="pad")
    videos = [to_model(batch["video"]) for batch in loader]
    return sum(-10 * math.log10(float((model.reconstruct(v) - v).square().mean()) / 4) for v in videos) / len(videos)


def weighed() -> list[dict[str, Any]]:
    """The settings of losses that the recipes which come with longtake train a GAN with, each once."""
    found = {}
    for path in sorted(RECIPES.glob("*.yaml")):
        for stage in yaml.safe_load(path.read_text()).get("stages", {}).values():
            if stage.get("kind") == "pretrain_vae" and stage.get("lambda_gan", 0.5):
                of_losses = {k: v for k, v in stage.items() if k.startswith(("lambda_", "gan_weight"))}
                found[str(of_losses)] = of_losses
    return list(found.values())


@pytest.mark.slow
def test_the_recipes_weights_of_a_gan_keep_what_was_reconstructed(dataset: str, tmp_path: Path) -> None:
    begun = fit(vae_config(dataset, steps=80, lr=2e-3, gradient_clip=0.1, lambda_gan=0), tmp_path / "begun")
    after = {"steps": 36, "gan_start": 0, "gan_warmup": 6, "lr": 2e-4}
    without = vae_config(dataset, **after | {"lambda_gan": 0})
    expected = psnr(without, fit(without, tmp_path / "without", begun))
    assert weighed(), "the recipes of the papers train a GAN"
    for number, weights in enumerate(weighed()):
        settings = vae_config(dataset, **after | weights)
        reached = psnr(settings, fit(settings, tmp_path / f"{number}", begun))
        assert reached > expected - 0.5, weights


def test_all_ranks_show_the_encoder_as_many_frames_any_number_of_them_as_often() -> None:
    settings = vae_config("d", frames=17, max_drop=1.0, lambda_gan=0)
    model = pretrain_vae.begin(settings, {})
    seen = []

    class Stop(Exception):
        pass

    def encoder(video: Tensor, visible: int, rng: torch.Generator) -> Any:
        seen.append(visible)
        raise Stop

    batch = {"video": torch.zeros(1, 3, 17, 32, 32, dtype=torch.uint8)}
    for seed in range(200):
        for rank in range(2):
            rng = torch.Generator().manual_seed(seed * 2 + rank)
            turn = Turn("generator", {"generator": encoder}, batch, 0, rng, seed, {})
            with pytest.raises(Stop):
                pretrain_vae._loss(settings, model.config, None, {}, turn)
    assert seen[::2] == seen[1::2]
    assert sorted(set(seen)) == [1, 2, 3, 4, 5] and min(seen.count(n) for n in range(1, 6)) > 50


def test_losses_that_teach_nothing_are_warned_about() -> None:
    def said(**changes: Any) -> list[str]:
        long = {"steps": 20, "gan_start": 5, "gan_warmup": 4, "perceptual": "vgg.pth"}
        texts = pretrain_vae.warnings(vae_config("d", **long | changes))
        assert not any("\n" in text for text in texts)
        return [text.partition(";")[0] for text in texts]

    without = "lambda_gan: without a perceptual loss nothing but squared errors holds the discriminator's detail to what was there"
    unused = "lambda_perceptual: is 0, so the network in `perceptual` measures, and teaches nothing"
    assert not said() and not said(perceptual=None, lambda_gan=0)
    assert said(perceptual=None) == [without]
    assert said(lambda_perceptual=0) == [unused, without]
    assert said(lambda_perceptual=0, lambda_gan=0) == [unused]


@pytest.mark.parametrize("changes", [{}, {"parent": "images"}, {"gan_warmup": 0}])
def test_a_gan_that_ends_before_it_acts_is_warned_about(changes: dict[str, Any]) -> None:
    # a parent's discriminator has learned; either learns once before it is heard
    heard = 9 if not changes else 6
    for steps in (heard - 1, heard, heard + 1):
        settings = {"steps": steps, "gan_start": 5, "gan_warmup": 4, "perceptual": "vgg.pth"}
        config = vae_config("d", **settings | changes)
        learned = {"gan_learned": torch.tensor([100 if "parent" in changes else 0])}
        acts = any(adversarial.trains_generator(config, learned, step) for step in range(steps))
        texts = pretrain_vae.warnings(config)
        assert bool(texts) is not acts, steps
        assert (
            acts
            or f"ends at step {steps}, and the generator would hear the discriminator from step {heard}" in texts[0]
        )
    assert not pretrain_vae.warnings(vae_config("d", steps=1, lambda_gan=0))
