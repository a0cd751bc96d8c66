"""Training a part of a module: low-rank changes of its layers, and frozen parameters, at every ZeRO stage."""

from pathlib import Path
from typing import Any

import pytest
import small
import torch
from flat import nested
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.training import checkpoint, engines
from longtake.training.config import LoraConfig, TrainConfig
from longtake.training.engines import lora
from longtake.training.models.common.causal import NormSiLUConv
from longtake.training.models.common.streaming import Past

STAGES = pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "bf16"])
LORA = {"rank": 2, "alpha": 4.0}


def before(kind: str) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in small.module(kind).state_dict().items()}


@pytest.mark.parametrize("kind", ["mlp", "clip"])
def test_an_attached_change_alters_nothing_at_first_and_survives_a_copy(kind: str) -> None:
    import copy

    module, plain = small.module(kind), small.module(kind)
    lora.attach(module, LoraConfig(**LORA))
    x = torch.randn(3, small.WIDTH)
    assert torch.equal(module(x), plain(x))
    assert all(p.requires_grad == ("lora_" in name) for name, p in module.named_parameters())
    copied = copy.deepcopy(module)
    for name, p in copied.named_parameters():
        if "lora_up" in name:
            torch.nn.init.normal_(p)
    assert not torch.allclose(copied(x), plain(x)) and torch.equal(module(x), plain(x))


@PRECISIONS
@STAGES
@pytest.mark.parametrize("kind", ["mlp", "clip"])
def test_only_the_low_rank_change_learns_and_merging_it_gives_the_same_outputs(
    tmp_path: Path, group: None, kind: str, zero_stage: int, precision: str
) -> None:
    made = small.objective(kind)
    settings = {"zero_stage": zero_stage, "precision": precision, "lora": LORA}
    trained = small.fit(tmp_path, made, **settings, ema_half_lives=[5])
    plain = before(kind)
    wide = torch.float32 if precision == "fp32" else torch.bfloat16
    for name, value in plain.items():
        assert torch.equal(trained[name], value.to(wide)), name
    changed = [k for k, v in trained.items() if k.endswith("lora_up.weight") and v.abs().max() > 1e-3]
    assert len(changed) == 2 and all("lora_" in name for name in trained.keys() - plain.keys())

    wrapped, merged = small.module(kind), small.module(kind)
    lora.attach(wrapped, LoraConfig(**LORA))
    averaged = small.weights(tmp_path, "5")
    wrapped.load_state_dict(averaged)
    merged.load_state_dict(
        checkpoint.trained(tmp_path, TrainConfig(**nested(small.SETTINGS | settings | {"ema_half_lives": [5]})))
    )
    x = torch.randn(3, small.WIDTH)
    assert torch.allclose(wrapped(x), merged(x), atol=1e-5)
    assert not torch.allclose(merged(x), small.module(kind)(x), atol=1e-2)


@STAGES
def test_a_change_below_the_precision_of_passes_is_merged_into_the_weights_as_they_were(
    tmp_path: Path, group: None, zero_stage: int
) -> None:
    settings = {"zero_stage": zero_stage, "precision": "bf16", "lr": 1e-5, "lora": LORA}
    learned, plain = small.fit(tmp_path, **settings), before("mlp")
    config = TrainConfig(**nested(small.SETTINGS | settings))
    merged = checkpoint.trained(tmp_path, config, small.module())
    for layer in ("0", "2"):
        change = 2.0 * learned[f"{layer}.lora_up.weight"] @ learned[f"{layer}.lora_down.weight"]
        assert 0 < change.abs().max() < 1e-4
        torch.testing.assert_close(merged[f"{layer}.weight"] - plain[f"{layer}.weight"], change, rtol=0, atol=1e-7)
        assert torch.equal(merged[f"{layer}.bias"], plain[f"{layer}.bias"])


def test_the_change_of_a_layer_with_a_norm_of_its_own_is_merged_exactly() -> None:
    torch.manual_seed(0)
    layer, plain = torch.nn.Sequential(NormSiLUConv(4)), torch.nn.Sequential(NormSiLUConv(4))
    torch.nn.init.uniform_(layer[0].norm)
    plain.load_state_dict(layer.state_dict())
    config = LoraConfig(rank=2)
    lora.attach(layer, config)
    torch.nn.init.normal_(layer[0].lora_up.weight)
    plain.load_state_dict(dict(lora.merged(layer.state_dict(), config)))
    x = torch.randn(1, 4, 5, 3, 3)
    assert torch.allclose(layer(x), plain(x), atol=1e-5)
    past = Past()
    pieces = []
    for piece in (x[:, :, :2], x[:, :, 2:]):
        pieces.append(layer[0](piece, past))
        past.begun = True
    assert torch.allclose(torch.cat(pieces, 2), plain(x), atol=1e-5)


@STAGES
def test_parameters_named_in_full_learn_beside_the_low_rank_change_and_resume_exactly(
    tmp_path: Path, group: None, zero_stage: int
) -> None:
    settings = {"zero_stage": zero_stage, "lora": LORA | {"full": ["2"]}, "ema_half_lives": [2]}
    trained = small.fit(tmp_path / "a", **settings)
    plain = before("mlp")
    assert torch.equal(trained["0.weight"], plain["0.weight"]) and torch.equal(trained["0.bias"], plain["0.bias"])
    assert not torch.allclose(trained["2.weight"], plain["2.weight"], atol=1e-3)
    assert not torch.allclose(trained["2.bias"], plain["2.bias"], atol=1e-3)
    assert sorted(trained.keys() - plain.keys()) == ["0.lora_down.weight", "0.lora_up.weight"]
    config = TrainConfig(**nested(small.SETTINGS | settings))
    merged = checkpoint.trained(tmp_path / "a", config)
    assert merged.keys() == plain.keys() and torch.equal(
        merged["2.weight"], small.weights(tmp_path / "a", "2")["2.weight"]
    )
    small.fit(tmp_path / "b", **settings | {"steps": 3})
    assert small.same(trained, small.fit(tmp_path / "b", **settings))


def test_alpha_is_the_rank_unless_it_is_said_and_the_effective_scale_is_told() -> None:
    for alpha, scale in ((None, 1.0), (2.0, 0.25), (16.0, 2.0)):
        config = LoraConfig(rank=8, alpha=alpha, full=("2.bias",))
        module, plain = small.module(), small.module()
        line = lora.attach(module, config)
        assert f"2 layers learn a change of rank 8, which counts {scale:g} (alpha / rank), and 1 tensors" in line
        up, down = torch.randn(8, 8), module[0].lora_down.weight
        torch.nn.init.zeros_(module[2].lora_up.weight)
        module[0].lora_up.weight.data = up
        x = torch.randn(3, small.WIDTH)
        torch.testing.assert_close(module[0](x) - plain[0](x), scale * x @ (up @ down).T)
        merged = dict(lora.merged(module.state_dict(), config))
        torch.testing.assert_close(merged["0.weight"] - plain[0].weight, scale * up @ down)


def test_what_began_anew_learns_in_full_but_where_it_is_frozen() -> None:
    module = small.module()
    lora.let_learn(module, ["2.weight", "2.bias"])
    engines.freeze(module, ("2.bias",))
    lora.attach(module, LoraConfig(rank=2))
    learning = [name for name, p in module.named_parameters() if p.requires_grad]
    assert learning == ["0.lora_down.weight", "0.lora_up.weight", "2.weight"]


def test_what_is_frozen_is_neither_changed_nor_learned_in_full() -> None:
    module = small.module()
    engines.freeze(module, ("2",))
    lora.attach(module, LoraConfig(**LORA, full=("2", "0.bias")))
    learning = [name for name, p in module.named_parameters() if p.requires_grad]
    assert learning == ["0.bias", "0.lora_down.weight", "0.lora_up.weight"]


@STAGES
def test_resuming_a_low_rank_training_is_bit_exact(tmp_path: Path, group: None, zero_stage: int) -> None:
    settings = {"zero_stage": zero_stage, "lora": LORA, "ema_half_lives": [2]}
    straight = small.fit(tmp_path / "a", small.objective("clip"), **settings)
    small.fit(tmp_path / "b", small.objective("clip"), **settings | {"steps": 3})
    assert small.same(straight, small.fit(tmp_path / "b", small.objective("clip"), **settings))
    assert small.same(small.weights(tmp_path / "a", "2"), small.weights(tmp_path / "b", "2"))


@PRECISIONS
@STAGES
def test_frozen_parts_stand_still_bit_for_bit_and_are_in_the_checkpoint(
    tmp_path: Path, group: None, zero_stage: int, precision: str
) -> None:
    settings = {"zero_stage": zero_stage, "precision": precision, "freeze": ["0", "2.bias"], "ema_half_lives": [2]}
    straight = small.fit(tmp_path / "a", **settings)
    plain = before("mlp")
    config = TrainConfig(**nested(small.SETTINGS | settings))
    whole = checkpoint.trained(tmp_path / "a", config, small.module())
    wide = torch.float32 if precision == "fp32" else torch.bfloat16
    for name in ("0.weight", "0.bias", "2.bias"):
        assert torch.equal(straight[name], plain[name].to(wide)), name
        assert torch.equal(small.weights(tmp_path / "a", "2")[name], straight[name])
        assert torch.equal(whole[name], plain[name])
    assert not torch.allclose(straight["2.weight"], plain["2.weight"], atol=1e-3)
    small.fit(tmp_path / "b", **settings | {"steps": 3})
    assert small.same(straight, small.fit(tmp_path / "b", **settings))


def test_what_cannot_be_trained_is_one_line(group: None) -> None:
    def refused(**changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            engines.engines_of(
                {"generator": small.module()}, "generator", TrainConfig(**nested(small.SETTINGS | changes)), 1
            )
        return str(caught.value)

    assert refused(lora={"targets": ["nowhere"]}) == (
        "lora.targets: 'nowhere' matches no linear or convolution layer, such as 0"
    )
    assert refused(lora={"full": ["nowhere"]}) == (
        "lora.full: 'nowhere' matches no parameter; their names begin with 0, 1, 2"
    )
    assert refused(freeze=["nowhere"]) == "freeze: 'nowhere' matches no parameter; their names begin with 0, 1, 2"
    assert refused(freeze=["0", "2"]) == "freeze: nothing is left to learn in generator"
    grouped = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1, groups=2))
    with pytest.raises(UserError, match="a convolution of 2 groups"):
        lora.attach(grouped, LoraConfig())
    for wrong in ({"freeze": ["("]}, {"lora": {"targets": ["("]}}, {"lora": {"full": ["("]}}):
        with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
            TrainConfig(**nested(small.SETTINGS | wrong))
