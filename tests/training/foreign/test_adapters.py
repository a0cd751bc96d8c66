"""Adapters of ours in the loaders of diffusers and PEFT, and theirs in ours: the same output, the same matrices."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_foreign
import torch
from called import assert_close, called
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from longtake.datasets.errors import Failure, UserError
from longtake.training.config import LoraConfig
from longtake.training.engines import lora
from longtake.training.foreign import adapters
from longtake.training.foreign.names import HUNYUAN, LTX, WAN

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = pytest.mark.parametrize("class_name", [WAN, LTX, HUNYUAN])
TARGETS = {
    WAN: r"net\.blocks\.\d+\.(attn\d\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))",
    LTX: r"net\.transformer_blocks\.\d+\.(attn\d\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))",
    HUNYUAN: r"net\.(single_)?transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|proj_mlp|proj_out)",
}  # fmt: skip
LAYER = {WAN: "blocks.0.attn1.to_q", LTX: "transformer_blocks.0.attn1.to_q", HUNYUAN: "transformer_blocks.0.attn.to_q"}
PIPELINE = {WAN: "wan", LTX: "ltx", HUNYUAN: "hunyuan"}


class Held(nn.Module):
    """A transformer of diffusers as a Backbone holds it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


def tiny(class_name: str, seed: int = 0) -> Any:
    _, make, *_ = tiny_foreign.PIPELINES[PIPELINE[class_name]]
    return make(seed)


def trained(class_name: str, config: LoraConfig) -> tuple[dict[str, Tensor], Tensor]:
    """What a LoRA of a tiny transformer has learned, here at random, and what the transformer says with it."""
    module = Held(tiny(class_name))
    lora.attach(module, config)
    learned = {name: value for name, value in module.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for value in learned.values():
            value.normal_(0, 0.1)
    return {name: value.detach() for name, value in learned.items()}, called(module.net)


def says(path: Path, class_name: str) -> Tensor:
    """What a tiny transformer says with an adapter that we read."""
    module = Held(tiny(class_name))
    adapters.load_into(module, adapters.read(path, class_name))
    return called(module.net)


def changes(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The change of each layer's weight."""
    layers = {name.rpartition(".lora_")[0] for name in tensors}
    pairs = {layer: (tensors[f"{layer}.lora_up.weight"], tensors[f"{layer}.lora_down.weight"]) for layer in layers}
    return {layer: scale * up.double() @ down.double() for layer, (up, down) in pairs.items()}


def assert_same_changes(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for layer, change in ours.items():
        assert (change - theirs[layer]).abs().max() <= 1e-6 * theirs[layer].abs().max()


@CLASSES
def test_diffusers_and_peft_load_an_adapter_of_ours_to_the_same_output(tmp_path: Path, class_name: str) -> None:
    config = LoraConfig(rank=4, alpha=3.0, targets=(TARGETS[class_name],))
    learned, output = trained(class_name, config)
    adapters.write(tmp_path, learned, config, class_name, "peft")

    by_folder, by_tensors, by_peft_file, by_pipeline = (tiny(class_name) for _ in range(4))
    before = called(by_folder)
    by_folder.load_lora_adapter(str(tmp_path), use_safetensors=True)
    # who passes tensors passes no alpha
    by_tensors.load_lora_adapter(load_file(tmp_path / adapters.DIFFUSERS_FILE))
    by_peft_file.load_lora_adapter(load_file(tmp_path / adapters.PEFT_FILE), prefix="base_model.model")
    tiny_foreign.pipeline(PIPELINE[class_name], transformer=by_pipeline, vae=None).load_lora_weights(str(tmp_path))
    by_peft = peft.PeftModel.from_pretrained(tiny(class_name), str(tmp_path))

    assert not torch.allclose(before, output, atol=1e-2)
    for loaded in (by_folder, by_tensors, by_peft_file, by_pipeline, by_peft.base_model.model):
        assert_close(called(loaded), output)
        assert sum(name.endswith("lora_A") for name, _ in loaded.named_modules()) == len(learned) / 2
    assert_close(says(tmp_path, class_name), output)


@CLASSES
def test_diffusers_loads_our_file_with_native_names_to_the_same_output(tmp_path: Path, class_name: str) -> None:
    # diffusers knows HunyuanVideo's single blocks of one width alone: see the test of names
    targets = TARGETS[class_name].replace("(single_)?", "")
    config = LoraConfig(rank=4, alpha=3.0, targets=(targets,))
    learned, output = trained(class_name, config)
    adapters.write(tmp_path, learned, config, class_name, "comfyui")

    loaded = tiny(class_name)
    tiny_foreign.pipeline(PIPELINE[class_name], transformer=loaded, vae=None).load_lora_weights(str(tmp_path))
    assert_close(called(loaded), output)
    assert_close(says(tmp_path, class_name), output)


def test_a_layer_whose_name_ends_others_is_changed_alone(tmp_path: Path) -> None:
    config = LoraConfig(rank=2, targets=(r"net\.proj_out",))
    learned, output = trained(HUNYUAN, config)
    adapters.write(tmp_path, learned, config, HUNYUAN, "peft")
    loaded = peft.PeftModel.from_pretrained(tiny(HUNYUAN), str(tmp_path)).base_model.model
    # each single block has a proj_out too
    assert [name for name, _ in loaded.named_modules() if name.endswith("lora_A")] == ["proj_out.lora_A"]
    assert_close(called(loaded), output)


def test_a_convolution_and_layers_outside_the_blocks_are_changed_too(tmp_path: Path) -> None:
    config = LoraConfig(rank=2, alpha=5.0, targets=(r"net\.(patch_embedding|proj_out|condition_embedder\..*)",))
    learned, output = trained(WAN, config)
    adapters.write(tmp_path, learned, config, WAN, "peft")
    adapters.write(tmp_path / "native", learned, config, WAN, "comfyui")
    loaded = peft.PeftModel.from_pretrained(tiny(WAN), str(tmp_path)).base_model.model
    assert_close(called(loaded), output)
    for path in (tmp_path / adapters.PEFT_FILE, tmp_path / "native"):
        assert_close(says(path, WAN), output)


def test_each_of_two_experts_takes_an_adapter_of_its_own(tmp_path: Path) -> None:
    config = LoraConfig(rank=2, targets=(TARGETS[WAN],))
    learned, output = trained(WAN, config)
    adapters.write(tmp_path, learned, config, WAN, "peft")
    first, second = tiny(WAN, 1), tiny(WAN)
    before = called(first)
    pipeline = tiny_foreign.pipeline("wan22_a14b", transformer=first, transformer_2=second, vae=None)
    pipeline.load_lora_weights(str(tmp_path), load_into_transformer_2=True)
    assert_close(called(second), output)
    assert torch.equal(called(first), before)


@CLASSES
def test_an_adapter_that_diffusers_saved_is_read_with_its_patterns(tmp_path: Path, class_name: str) -> None:
    transformer = tiny(class_name)
    layer = LAYER[class_name]
    names = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    other = next(name for name in names if name.endswith("to_out.0"))
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=[layer, other],
        rank_pattern={layer: 2},
        alpha_pattern={f"^{layer}": 5},
        init_lora_weights=False,
    )
    transformer.add_adapter(config)
    transformer.save_lora_adapter(str(tmp_path / "ours"))
    pipeline = tiny_foreign.PIPELINES[PIPELINE[class_name]][0]
    getattr(diffusers, pipeline).save_lora_weights(
        str(tmp_path / "pipeline"),
        transformer_lora_layers=peft.get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    for folder in ("ours", "pipeline"):
        assert_close(says(tmp_path / folder, class_name), called(transformer))


@CLASSES
def test_an_alpha_by_a_regular_expression_is_refused(tmp_path: Path, class_name: str) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q"], alpha_pattern={".*to_q": 5})
    peft.get_peft_model(tiny(class_name), config).save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=r"alpha_pattern '\.\*to_q' is a regular expression; name each layer"):
        says(tmp_path, class_name)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"alpha_pattern": [5]}))
    with pytest.raises(UserError, match=r"alpha_pattern of its adapter_config\.json is no object"):
        says(tmp_path, class_name)


@CLASSES
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_peft_saved_is_read_with_its_alpha(tmp_path: Path, class_name: str, rslora: bool) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=2, use_rslora=rslora, target_modules=["to_q", "to_out.0"], init_lora_weights=False
    )
    model = peft.get_peft_model(tiny(class_name), config)
    model.save_pretrained(str(tmp_path))
    assert_close(says(tmp_path, class_name), called(model.base_model.model))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    class_name=st.sampled_from([WAN, LTX, HUNYUAN]),
    layout=st.sampled_from(["peft", "comfyui"]),
    rank=st.integers(1, 5),
    alpha=st.none() | st.floats(1e-3, 1e3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_what_is_written_is_read_as_the_same_change(
    tmp_path: Path,
    class_name: str,
    layout: adapters.Layout,
    rank: int,
    alpha: float | None,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    # a part of the layers, for HunyuanVideo also only some of those that are one in the authors' code
    shapes = {
        name: module.weight.shape
        for name, module in tiny(class_name).named_modules()
        if isinstance(module, nn.Linear) and not (class_name == HUNYUAN and "time_text_embed" in name)
    }
    chosen = data.draw(st.sets(st.sampled_from(sorted(shapes)), min_size=1))
    learned = {}
    for layer in chosen:
        out, width = shapes[layer]
        learned[f"net.{layer}.lora_down.weight"] = torch.randn(rank, width, dtype=dtype)
        learned[f"net.{layer}.lora_up.weight"] = torch.randn(out, rank, dtype=dtype)
    config = LoraConfig(rank=rank, alpha=alpha)
    folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    adapters.write(folder, learned, config, class_name, layout)

    read = adapters.read(folder, class_name)
    assert read.rank == rank
    assert_same_changes(changes(read.tensors, read.alpha / read.rank), changes(learned, config.scale))


def saved(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def pair(
    layer: str, rank: int = 2, width: int = 24, out: int = 24, names: tuple[str, str] = ("lora_A", "lora_B")
) -> Any:
    torch.manual_seed(rank)
    return {
        f"{layer}.{names[0]}.weight": torch.randn(rank, width),
        f"{layer}.{names[1]}.weight": torch.randn(out, rank),
    }


def test_an_adapter_without_alpha_counts_one(tmp_path: Path) -> None:
    read = adapters.read(saved(tmp_path / "a.safetensors", pair("transformer.blocks.0.attn1.to_q", 3)), WAN)
    assert (read.rank, read.alpha) == (3, 3.0)
    assert read.lora.scale == 1


def test_alphas_and_ranks_that_differ_are_read_as_one_of_each(tmp_path: Path) -> None:
    names = ("lora_down", "lora_up")
    first, second = (
        pair("lora_unet_blocks_0_self_attn_q", 2, names=names),
        pair("lora_unet_blocks_1_ffn_0", 4, names=names),
    )
    alphas = {
        "lora_unet_blocks_0_self_attn_q.alpha": torch.tensor(1.0),
        "lora_unet_blocks_1_ffn_0.alpha": torch.tensor(8.0),
    }
    read = adapters.read(saved(tmp_path / "a.safetensors", {**first, **second, **alphas}), WAN)
    assert (read.rank, read.alpha) == (4, 4.0)
    expected = {
        f"net.{layer}": scale * up.double() @ down.double()
        for layer, (down, up), scale in [
            ("blocks.0.attn1.to_q", first.values(), 0.5),
            ("blocks.1.ffn.net.0.proj", second.values(), 2.0),
        ]
    }
    assert_same_changes(changes(read.tensors, 1.0), expected)


def test_a_base_in_bf16_takes_an_adapter_and_stays_so(tmp_path: Path) -> None:
    module = Held(tiny(WAN)).to(torch.bfloat16)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    read = adapters.read(saved(tmp_path / "a.safetensors", pair("transformer.blocks.0.attn1.to_q")), WAN)
    adapters.load_into(module, read)
    after = module.state_dict()
    name = "net.blocks.0.attn1.to_q.weight"
    assert [key for key in after if not torch.equal(after[key], before[key])] == [name]
    change = changes(read.tensors, 1.0)["net.blocks.0.attn1.to_q"]
    assert torch.equal(after[name], (before[name].float() + change.float()).bfloat16())


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "family": (pair("transformer.transformer_blocks.0.attn1.to_q"), f"is an adapter of {LTX}, and the base is {WAN}"),
    "layer": (pair("transformer.blocks.0.attn9.to_q"), "has no layer blocks.0.attn9.to_q; name the base"),
    "dora": (
        pair("transformer.blocks.0.attn1.to_q") | {"transformer.blocks.0.attn1.to_q.dora_scale": torch.ones(24)},
        "dora_scale' is no part of a LoRA",
    ),
    "half": ({"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 24)}, "has no up matrix; get the whole"),
    "ranks": (
        {
            "transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 24),
            "transformer.blocks.0.attn1.to_q.lora_B.weight": torch.ones(24, 3),
        },
        r"matrices \(2, 24\) and \(24, 3\) do not fit",
    ),
    "nan": (
        pair("transformer.blocks.0.attn1.to_q") | {"transformer.blocks.0.attn1.to_q.lora_B.weight": torch.full((24, 2), torch.nan)},
        "has numbers that are not finite; get it again",
    ),
    "alpha": (
        pair("diffusion_model.blocks.0.self_attn.q") | {"diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(0.0)},
        "is no positive number",
    ),
    "experts": (
        pair("transformer.blocks.0.attn1.to_q") | pair("transformer_2.blocks.1.attn1.to_q"),
        "transformer. and transformer_2., as of two models; split it",
    ),
    "twice": (
        pair("transformer.blocks.0.attn1.to_q") | pair("transformer.blocks.0.attn1.to_q", names=("lora_down", "lora_up")),
        "comes twice",
    ),
    "int8": (
        {name: tensor.to(torch.int8) for name, tensor in pair("transformer.blocks.0.attn1.to_q").items()},
        "is torch.int8; save it in fp32",
    ),
    "nothing": ({}, "has no tensors; name an adapter"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_file_that_is_no_adapter_of_the_base_is_refused_in_a_line(tmp_path: Path, bad: str) -> None:
    tensors, line = BAD[bad]
    with pytest.raises((UserError, Failure), match=line) as caught:
        adapters.read(saved(tmp_path / "a.safetensors", tensors), WAN)
    assert str(caught.value).startswith(str(tmp_path / "a.safetensors"))
    assert "\n" not in str(caught.value)


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    bomb = tmp_path / "adapter_model.bin"
    bomb.write_bytes(pickle.dumps({}))
    for path in (bomb, tmp_path):
        with pytest.raises(UserError, match=r"adapter_model\.bin: is a pickle, .* save it as safetensors"):
            adapters.read(path, WAN)


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        adapters.read(tmp_path / "none", WAN)
    with pytest.raises(UserError, match="has no adapter in safetensors"):
        adapters.read(tmp_path, WAN)
    torn = saved(tmp_path / "a.safetensors", pair("transformer.blocks.0.attn1.to_q"))
    torn.write_bytes(torn.read_bytes()[:-8])
    with pytest.raises(Failure, match=r"cannot be read .*; get it again"):
        adapters.read(torn, WAN)
    saved(tmp_path / "b.safetensors", pair("transformer.blocks.0.attn1.to_q"))
    with pytest.raises(UserError, match="has 2 safetensors files; name one"):
        adapters.read(tmp_path, WAN)


@pytest.mark.parametrize("text", ["[]", "{", '{"lora_alpha": "much"}', '{"lora_alpha": [1]}', " " * (2 << 20)])
def test_settings_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    saved(tmp_path / adapters.PEFT_FILE, pair("base_model.model.blocks.0.attn1.to_q"))
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(Failure, match=r"JSON object|no positive number"):
        adapters.read(tmp_path, WAN)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"peft_type": "LOHA"}, "of the kind LOHA, and only plain LoRA"),
        ({"r": 7}, "has rank 2, and its settings say 7"),
    ],
)
def test_settings_of_another_adapter_are_refused(tmp_path: Path, settings: dict[str, Any], line: str) -> None:
    saved(tmp_path / adapters.PEFT_FILE, pair("base_model.model.blocks.0.attn1.to_q"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises((UserError, Failure), match=line):
        adapters.read(tmp_path, WAN)


def test_a_file_is_for_whom_any_new_file_is(tmp_path: Path) -> None:
    config = LoraConfig(rank=2, targets=(TARGETS[WAN],))
    adapters.write(tmp_path / "out", trained(WAN, config)[0], config, WAN, "comfyui")
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "out" / adapters.COMFYUI_FILE, tmp_path / "new")}
    assert len(modes) == 1


def test_dora_is_refused_by_its_settings(tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.use_dora": True})}
    file = saved(tmp_path / "a.safetensors", pair("transformer.blocks.0.attn1.to_q"), metadata)
    with pytest.raises(UserError, match="only plain LoRA is read"):
        adapters.read(file, WAN)


def test_a_base_of_another_size_is_not_touched(tmp_path: Path) -> None:
    module = Held(tiny(WAN))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for wrong, line in [
        (pair("blocks.1.attn1.to_q", width=99), r"\(24, 24\) in the base, and the change is of \(24, 99\)"),
        (pair("blocks.77.attn1.to_q"), "the base has no layer blocks.77.attn1.to_q"),
    ]:
        file = saved(tmp_path / "a.safetensors", pair("blocks.0.attn1.to_q") | wrong)
        with pytest.raises(UserError, match=line):
            adapters.load_into(module, adapters.read(file, WAN))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_layer_that_comfyui_would_skip_is_refused(tmp_path: Path) -> None:
    learned = {
        f"net.time_text_embed.guidance_embedder.linear_1.lora_{name}.weight": torch.ones(2, 2)
        for name in ("down", "up")
    }
    with pytest.raises(UserError, match=r"time_text_embed.*ComfyUI gives .*; take --format peft"):
        adapters.write(tmp_path, learned, LoraConfig(rank=2), HUNYUAN, "comfyui")
    strange = {f"net.strange.lora_{name}.weight": torch.ones(2, 2) for name in ("down", "up")}
    with pytest.raises(UserError, match="strange: has no name in ComfyUI's layout of Wan"):
        adapters.write(tmp_path, strange, LoraConfig(rank=2), WAN, "comfyui")


def test_what_learned_in_full_is_in_no_adapter(tmp_path: Path) -> None:
    config = LoraConfig(rank=2, targets=(TARGETS[WAN],), full=("net.proj_out",))
    learned, _ = trained(WAN, config)
    with pytest.raises(UserError, match=r"lora.full: net.proj_out.* learned in full.*--format diffusers"):
        adapters.write(tmp_path, learned, config, WAN, "peft")


def test_a_training_that_left_no_finite_numbers_is_not_written(tmp_path: Path) -> None:
    learned, _ = trained(WAN, config := LoraConfig(rank=2, targets=(TARGETS[WAN],)))
    next(iter(learned.values()))[0, 0] = torch.inf
    with pytest.raises(Failure, match="not finite; train it again"):
        adapters.write(tmp_path, learned, config, WAN, "peft")
    assert not list(tmp_path.iterdir())
