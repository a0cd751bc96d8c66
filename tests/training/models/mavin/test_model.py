"""The model: both bodies, what they are told, and the public U-Net's weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from public_unet import folder
from pydantic import ValidationError
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.training.models.common.dit import sincos
from longtake.training.models.mavin.config import PARTS, PRESETS, config_from_preset
from longtake.training.models.mavin.model import Mavin
from longtake.training.models.mavin.unet import UNet, fields_of_folder, load_folder

pytestmark = pytest.mark.usefixtures("one_thread")

BODIES = {
    "dit": {"preset": "mavin_tiny", "depth": 2, "width": 32, "heads": 2},
    "unet": {"preset": "mavin_unet_tiny", "widths": (16, 32)},
}
TOLD = {"text_width": 12, "text_null": "learned", "image_width": 48}


def model(body: str, seed: int = 0, **changes: Any) -> Mavin:
    """Random weights, none of them zero."""
    torch.manual_seed(seed)
    made = Mavin(config_from_preset(**BODIES[body] | TOLD | {"channels": 3} | changes)).eval()
    for parameter in made.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return made


def given(batch: int = 2, frames: int = 5, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    mask = torch.zeros(batch, frames)
    mask[:, 1:3] = 1
    return {
        "latents": torch.randn(batch, 3, frames, 6, 10, generator=rng),
        "times": mask * 0.7,
        "length": torch.full((batch,), 2),
        "text": torch.randn(batch, 4, 12, generator=rng),
        "text_mask": torch.ones(batch, 4, dtype=torch.bool),
        "image": torch.randn(batch, 2, 9, 48, generator=rng),
    }


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("frames", [1, 4, 5])
@torch.no_grad()
def test_any_window_has_a_velocity(body: str, frames: int) -> None:
    inputs = given(frames=max(frames, 3))
    inputs["latents"], inputs["times"] = inputs["latents"][:, :, :frames], inputs["times"][:, :frames]
    out = model(body)(**inputs)
    assert out.shape == inputs["latents"].shape and out.isfinite().all() and out.std() > 0


@pytest.mark.parametrize("body", BODIES)
@torch.no_grad()
def test_all_that_the_model_is_told_counts(body: str) -> None:
    net, inputs = model(body), given()
    whole = net(**inputs)
    changes: dict[str, dict[str, Any]] = {
        "length": {"length": inputs["length"] + 1},
        "time of a clean latent": {"times": inputs["times"] + torch.eye(5)[4] * 0.5},
        "a clean latent": {"latents": inputs["latents"] + torch.eye(5)[4][:, None, None]},
        "text": {"text": inputs["text"].flip(2)},
        "no text": {"text": None, "text_mask": None},
        "image": {"image": inputs["image"].flip(3)},
        "sides of the image": {"image": inputs["image"].flip(1)},
        "one side": {"image_mask": torch.tensor([[True, False]] * 2)},
        "no image": {"image": None},
    }
    for what, change in changes.items():
        other = net(**inputs | change)
        assert (other - whole)[:, :, 1:3].abs().max() > 1e-4, what


@pytest.mark.parametrize("body", BODIES)
@torch.no_grad()
def test_a_sample_that_loses_its_text_or_frames_is_as_one_without(body: str) -> None:
    net, inputs = model(body), given()
    lost = inputs | {"text_mask": torch.tensor([[True] * 4, [False] * 4])}
    without = inputs | {"text": None, "text_mask": None}
    torch.testing.assert_close(net(**lost)[1], net(**without)[1], atol=1e-5, rtol=1e-4)
    blind = inputs | {"image_mask": torch.tensor([[True, True], [False, False]])}
    torch.testing.assert_close(net(**blind)[1], net(**inputs | {"image": None})[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(net(**blind)[0], net(**inputs)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("body", BODIES)
@torch.no_grad()
def test_samples_do_not_see_each_other(body: str) -> None:
    net, inputs = model(body), given()
    alone = net(**{name: value[:1] for name, value in inputs.items()})
    torch.testing.assert_close(net(**inputs)[:1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("body", BODIES)
def test_every_weight_learns_and_recomputing_changes_nothing(body: str) -> None:
    grads = []
    for recompute in (False, True):
        net = model(body, activation_checkpointing=recompute).train()
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        net(**given()).square().mean().backward()
        grads.append({name: p.grad for name, p in net.named_parameters()})
    # nobody reads the null of texts here
    silent = [name for name, grad in grads[0].items() if (grad is None or not grad.any()) and "null" not in name]
    assert not silent
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], msg=name)


@pytest.mark.parametrize("body", BODIES)
def test_the_parts_that_can_be_trained_are_there_and_apart(body: str) -> None:
    import re

    names = [name for name, _ in model(body).named_parameters()]
    parts = {part: {name for name in names if re.match(pattern, name)} for part, pattern in PARTS[body].items()}
    assert all(parts.values()) and len(set.union(*parts.values())) < len(names)
    if body == "unet":
        assert {"body.transformer_in.transformer_blocks.0.attn1.to_q.weight"} <= parts["attention"]
        assert {"body.time_embedding.cond_proj.weight"} <= parts["embedding"]
        assert not parts["temporal"] & parts["attention"]


@torch.no_grad()
def test_without_positions_attention_over_time_knows_no_order_but_the_model_does() -> None:
    for body in BODIES:
        net, inputs = model(body), given()
        backward = inputs | {"latents": inputs["latents"].flip(2), "times": inputs["times"].flip(1)}
        assert (net(**backward).flip(2) - net(**inputs)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("body", BODIES)
@torch.no_grad()
def test_a_mask_is_a_further_channel_that_says_what_is_to_be_made(body: str) -> None:
    inputs, module = given(), model(body, mask_channel=True)
    entry = module.body.token_in if body == "dit" else module.body.conv_in  # type: ignore[union-attr]
    before = module(**inputs)
    assert before.shape == inputs["latents"].shape
    # the weights of the last channel alone: with none the model sees what others do
    entry.weight.view(len(entry.weight), 4, -1)[:, 3] = 0  # type: ignore[operator, union-attr, index]
    assert not torch.equal(before, module(**inputs))
    with pytest.raises(ValidationError, match="mask_channel: is read off the times"):
        model(body, mask_channel=True, clean_time="same")


def test_what_does_not_fit_is_refused() -> None:
    net, inputs = model("dit", text_width=0, image_width=0), given()
    for change, message in (
        ({"latents": inputs["latents"][:, :2]}, "this model needs"),
        ({"times": inputs["times"][:, :2]}, "these latents need"),
        ({"image": None}, "text: this model takes none"),
        ({"text": None}, "image: this model takes none"),
    ):
        with pytest.raises(ValueError, match=message):
            net(**inputs | change)
    with pytest.raises(ValueError, match="image has shape"):
        model("dit")(**inputs | {"image": inputs["image"][..., :5]})
    for preset, changes in (
        ("mavin_tiny", {"depth": 3}),
        ("mavin_unet_tiny", {"widths": (30,)}),
        ("mavin_tiny", {"x": 1}),
    ):
        with pytest.raises(ValidationError):
            config_from_preset(preset, **changes)
    with pytest.raises(ValueError, match="unknown preset"):
        config_from_preset("huge")
    assert set(PRESETS) == {"mavin", "mavin_small", "mavin_tiny", "mavin_unet", "mavin_unet_tiny"}


# The public U-Net


def diffusers() -> Any:
    return pytest.importorskip("diffusers")


def public(widths: tuple[int, ...], groups: int = 8) -> Any:
    torch.manual_seed(0)
    count = len(widths) - 1
    net = (
        diffusers()
        .UNet3DConditionModel(
            in_channels=3,
            out_channels=3,
            block_out_channels=widths,
            layers_per_block=2,
            cross_attention_dim=24,
            attention_head_dim=8,
            norm_num_groups=groups,
            time_cond_proj_dim=widths[0],
            down_block_types=("CrossAttnDownBlock3D",) * count + ("DownBlock3D",),
            up_block_types=("UpBlock3D",) + ("CrossAttnUpBlock3D",) * count,
        )
        .eval()
    )
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return net


@pytest.mark.parametrize("widths", [(32, 64), (16, 32, 32)])
@torch.no_grad()
def test_it_computes_what_the_public_one_does_with_the_same_weights(widths: tuple[int, ...], tmp_path: Path) -> None:
    theirs = public(widths)
    theirs.save_pretrained(tmp_path / "unet")
    ours = UNet(config_from_preset("mavin_unet", **fields_of_folder(str(tmp_path)))).eval()
    load_folder(ours, str(tmp_path))
    rng = torch.Generator().manual_seed(0)
    # an odd height, which no level halves evenly
    x, tokens = torch.randn(2, 3, 5, 9, 8, generator=rng), torch.randn(2, 7, 24, generator=rng)
    t, length = torch.tensor([0.25, 0.7]), torch.tensor([3, 4])
    expected = theirs(x, 1000 * t, tokens, timestep_cond=sincos(length, widths[0])).sample
    out = ours(x, t[:, None].expand(2, 5), length, tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_base_without_lengths_begins_as_it_was(tmp_path: Path) -> None:
    path = folder(tmp_path / "unet")
    ours = UNet(config_from_preset("mavin_unet", **fields_of_folder(path))).eval()
    load_folder(ours, path)
    x, times = torch.randn(1, 3, 4, 8, 8), torch.rand(1, 4)
    one, two = (ours(x, times, torch.tensor([n])) for n in (1, 9))
    assert torch.equal(one, two)


def test_other_networks_are_refused(tmp_path: Path) -> None:
    for number, (changes, message) in enumerate(
        (
            ({"_class_name": "UNet2DConditionModel"}, "is a UNet2DConditionModel, not"),
            ({"down_block_types": ["DownBlock3D", "DownBlock3D"]}, "down_block_types is"),
        )
    ):
        with pytest.raises(UserError, match=message):
            fields_of_folder(folder(tmp_path / str(number), **changes))
    with pytest.raises(UserError, match="no readable config"):
        fields_of_folder(str(tmp_path))
    path = folder(tmp_path / "wide", cross_attention_dim=40)
    with pytest.raises(UserError, match="has shape"):
        load_folder(UNet(config_from_preset("mavin_unet", **fields_of_folder(path))), path)
    (tmp_path / "wide" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="has no diffusion_pytorch_model"):
        load_folder(UNet(config_from_preset("mavin_unet", **fields_of_folder(path))), path)
