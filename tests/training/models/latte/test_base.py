"""A Latte trained from a base: at first it does what the base does, whatever its classes, size and latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import latent_stages
import pytest
import torch
from flat import nested
from torch import Tensor, nn

from longtake.datasets import latents as column
from longtake.datasets.errors import UserError
from longtake.training import checkpoint, registry
from longtake.training.config import LoraConfig
from longtake.training.engines import lora
from longtake.training.models.common.condition import of_classes
from longtake.training.models.common.dit import sincos
from longtake.training.models.latte import base as latte_base
from longtake.training.models.latte import finetune as finetune_latte
from longtake.training.models.latte.finetune import Config
from longtake.training.models.latte.model import Latte, config_from_preset
from longtake.training.models.memory.config import MemoryConfig
from longtake.training.registry import disk

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"preset": "latte_tiny", "depth": 2, "width": 32, "heads": 2, "channels": 4, "shape": (3, 4, 6)}
KNOWN: dict[str, Any] = {"channels": 4, "shape": (3, 4, 6), "conditioning": 0.3}
T = torch.tensor([0.3, 0.8])


def saved(folder: Path, classes: tuple[str, ...] = (), encoder: str | None = None, **changes: Any) -> str:
    """A model folder whose every weight counts."""
    torch.manual_seed(0)
    model = Latte(config_from_preset(**SMALL | {"classes": len(classes)} | changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.set_statistics(torch.arange(model.config.channels) * 0.1, torch.ones(model.config.channels) * 2)
    facts = {"classes": list(classes), "vae": {"uri": "vae", "encoder": encoder} if encoder else None}
    disk.save(folder, "latte", model.config.model_dump(mode="json"), model.state_dict(), facts)
    return str(folder)


def base_of(uri: str) -> Latte:
    model = registry.load(uri)
    assert isinstance(model, Latte)
    return model.eval()


def noise(side: tuple[int, int] = (4, 6)) -> Tensor:
    return torch.randn(2, 4, 3, *side, generator=torch.Generator().manual_seed(1))


def close(made: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_all_weights_and_the_normalisation_are_taken(tmp_path: Path) -> None:
    uri = saved(tmp_path, ("a", "b"), "enc")
    moments = torch.zeros(4) + 0.5, torch.tensor([1.0, 2.0, 3.0, 2.0])
    latte, notes = latte_base.continue_from(uri, {"label_dropout": 0.2}, KNOWN, ("a", "b"), "enc", moments)
    torch.testing.assert_close(latte.state_dict(), base_of(uri).state_dict(), rtol=0, atol=0)
    assert latte.config == base_of(uri).config.model_copy(update={"label_dropout": 0.2})
    assert notes.startswith(f"base: {uri}: ") and "\n" not in notes
    # (0.5 - 0) / 2 is the farthest mean, 1 / 2 and 3 / 2 the outermost deviations
    assert "means to ±0.25 and deviations of 0.5 to 1.5" in notes and "2 of 2 classes are known" in notes


@torch.no_grad()
@pytest.mark.parametrize("had", [(), ("a", "b", "d")])
def test_a_new_class_begins_as_no_class_and_a_known_one_as_it_was(tmp_path: Path, had: tuple[str, ...]) -> None:
    uri = saved(tmp_path, had)
    classes = ("b", "c", "a")
    latte, notes = latte_base.continue_from(uri, {}, KNOWN, classes)
    base, x = base_of(uri), noise()
    none = base(x, T)
    for number, name in enumerate(classes):
        expected = base(x, T, of_classes([had.index(name)] * 2)) if name in had else none
        close(latte.eval()(x, T, of_classes([number] * 2)), expected)
    close(latte(x, T), none)
    assert ("1 of its classes are left out" in notes) == bool(had) and f"{1 if had else 3} begin as no class" in notes


@torch.no_grad()
def test_without_classes_the_base_goes_on_as_it_is_without_a_class(tmp_path: Path) -> None:
    uri = saved(tmp_path, ("a", "b"))
    latte, notes = latte_base.continue_from(uri, {}, KNOWN)
    assert latte.class_in is None and "its 2 classes are left out" in notes
    close(latte.eval()(noise(), T), base_of(uri)(noise(), T))


@torch.no_grad()
def test_a_larger_frame_is_spread_over_the_positions_of_the_smaller_one(tmp_path: Path) -> None:
    uri = saved(tmp_path / "a")
    latte, notes = latte_base.continue_from(uri, {}, KNOWN | {"shape": (5, 8, 18)})
    assert latte.config.scale == (0.5, 1 / 3) and "windows were 3x4x6 and are 5x8x18" in notes
    seen: list[Tensor] = []
    latte.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    nn.init.zeros_(latte.token_in.weight)
    nn.init.zeros_(latte.token_in.bias)
    latte(noise((8, 18)), T)
    rows, columns = (torch.arange(8) + 0.5) / 2 - 0.5, (torch.arange(18) + 0.5) / 3 - 0.5
    space = torch.cat(
        [sincos(rows, 16)[:, None].expand(-1, 18, -1), sincos(columns, 16)[None].expand(8, -1, -1)], dim=-1
    )
    expected = sincos(torch.arange(3), 32)[:, None] + space.flatten(0, 1)
    close(seen[0][0], expected)
    # whose centres are those of the smaller frame, and so is a base of a base
    assert rows[0] + rows[-1] == 3
    disk.save(tmp_path / "b", "latte", latte.config.model_dump(mode="json"), latte.state_dict(), {"classes": []})
    again, _ = latte_base.continue_from(str(tmp_path / "b"), {}, KNOWN | {"shape": (5, 16, 18)})
    assert again.config.scale == (0.25, 1 / 3)
    fixed, _ = latte_base.continue_from(uri, {"scale": (1.0, 1.0)}, KNOWN | {"shape": (5, 8, 18)})
    assert fixed.config.scale == (1.0, 1.0)


def test_a_base_that_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    latents, pixels = saved(tmp_path / "latents", encoder="enc"), saved(tmp_path / "pixels")
    vae = latent_stages.saved(latent_stages.vae(), tmp_path / "vae")
    cases: list[tuple[str, dict[str, Any], str | None, str]] = [
        (vae, {}, "enc", "is a PVVAE, not a Latte; name a `finetune_latte` model"),
        (latents, {}, "other", "has learned latents of another autoencoder, vae; encode by that one"),
        (latents, {}, None, "has learned latents, and these are pixels; name a base of pixels"),
        (pixels, {}, "enc", "has learned pixels, and these are latents"),
        (latents, {"width": 64}, "enc", "token_in.weight is 32x4 there, 64x4 here; leave out of `model` what differs"),
        (latents, {"depth": 4}, "enc", r"layers\.2\.\S+ is not there"),
        (latents, {"depth": 3}, "enc", "model: depth is 3; blocks over space and time alternate"),
    ]
    for uri, changes, encoder, said in cases:
        with pytest.raises(UserError, match=said) as e:
            latte_base.continue_from(uri, changes, KNOWN, (), encoder)
        assert "\n" not in str(e.value)


def test_classes_that_are_new_beside_a_low_rank_change_learn_in_full(tmp_path: Path) -> None:
    uri = saved(tmp_path, ("a", "b"))
    for classes, learns in ((("a", "b"), False), (("a", "c"), True)):
        latte, _ = latte_base.continue_from(uri, {}, KNOWN, classes)
        lora.attach(latte, LoraConfig(rank=2))
        assert latte.class_in is not None and latte.class_in.weight.requires_grad == learns


# the stage


@pytest.fixture(scope="module")
def inputs(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("based")
    found = latent_stages.inputs(root, dataset, join=0.0)
    encoder = column.read_latents(found["latents"]).encoder["digest"]
    base = saved(root / "base", ("a", "z"), encoder, channels=8, shape=(3, 2, 3))
    return {name: found[name] for name in ("dataset", "latents")} | {"base": base}


def config(**changes: Any) -> Config:
    quick = latent_stages.QUICK | {"kind": "finetune_latte", "base": "base", "model": None, "classes": True}
    return Config(**{n: v for n, v in nested(quick).items() if n in Config.model_fields} | changes)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 2}}])
def test_a_prior_goes_on_from_its_base_and_a_stopped_one_ends_with_the_same_weights(
    inputs: dict[str, str], tmp_path: Path, changes: dict[str, Any]
) -> None:
    chosen = config(**changes)

    def fit(folder: Path, steps: int) -> dict[str, Tensor]:
        latent_stages.fit(finetune_latte, chosen, inputs, folder, steps)
        return checkpoint.trained(folder, chosen)

    straight = fit(tmp_path / "a", 4)
    fit(tmp_path / "b", 2)
    torch.testing.assert_close(fit(tmp_path / "b", 4), straight, rtol=0, atol=0)
    before = base_of(inputs["base"]).state_dict()
    assert straight.keys() == before.keys() and torch.equal(straight["latent_mean"], before["latent_mean"])
    moved = (straight["token_in.weight"] - before["token_in.weight"]).abs().max()
    assert 0 < moved < 0.05
    # class a is known, class b new, z is gone
    assert straight["class_in.weight"].shape == (3, 32) and not torch.equal(
        straight["class_in.weight"][1], before["class_in.weight"][2]
    )


def test_a_stage_as_a_base_is_checked_with_the_recipe() -> None:
    base = Config(kind="finetune_latte", dataset="dataset", latents=None, size=(32, 32), frames=3)
    with pytest.raises(ValueError, match="base: one of the two learns latents, the other pixels"):
        finetune_latte.check(config(), {"base": base})
    memory = MemoryConfig(**nested(latent_stages.QUICK))
    object.__setattr__(memory, "kind", "pretrain_memory")
    with pytest.raises(ValueError, match="base: a pretrain_memory stage makes no Latte"):
        finetune_latte.check(config(), {"base": memory})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": None, "lora": {"rank": 2}}, "lora: without a base all else would stay random"),
        ({"model": {"preset": "latte_s"}}, "model: preset: the base has its own"),
        ({"model": {"wide": 3}}, "model: unknown wide; there are depth, width"),
        ({"model": {"channels": 8}}, "channels follows from the stage's other settings"),
    ],
)
def test_settings_that_a_base_does_not_take_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(**changes)
