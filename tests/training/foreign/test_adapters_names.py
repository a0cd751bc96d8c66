"""The names of layers, against a table of published ones and the converters of diffusers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_foreign
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from longtake.training.config import LoraConfig
from longtake.training.foreign import adapters, names
from longtake.training.foreign.names import HUNYUAN, LTX, WAN

pytest.importorskip("diffusers")
pytest.importorskip("peft")
CLASSES = pytest.mark.parametrize("class_name", [WAN, LTX, HUNYUAN])

# class -> keys of published adapters: of the authors' names, of musubi, and of diffusers, of the same matrix
PUBLISHED = {
    WAN: [
        ("blocks.0.self_attn.q", "blocks_0_self_attn_q", "blocks.0.attn1.to_q"),
        ("blocks.11.self_attn.o", "blocks_11_self_attn_o", "blocks.11.attn1.to_out.0"),
        ("blocks.3.cross_attn.v", "blocks_3_cross_attn_v", "blocks.3.attn2.to_v"),
        ("blocks.3.cross_attn.k_img", "blocks_3_cross_attn_k_img", "blocks.3.attn2.add_k_proj"),
        ("blocks.39.ffn.0", "blocks_39_ffn_0", "blocks.39.ffn.net.0.proj"),
        ("blocks.39.ffn.2", "blocks_39_ffn_2", "blocks.39.ffn.net.2"),
        ("time_projection.1", "time_projection_1", "condition_embedder.time_proj"),
        ("text_embedding.0", "text_embedding_0", "condition_embedder.text_embedder.linear_1"),
        ("head.head", "head_head", "proj_out"),
    ],
    LTX: [
        (
            "transformer_blocks.27.attn1.to_q",
            "transformer_blocks_27_attn1_to_q",
            "transformer_blocks.27.attn1.to_q",
        ),
        (
            "transformer_blocks.0.attn2.to_out.0",
            "transformer_blocks_0_attn2_to_out_0",
            "transformer_blocks.0.attn2.to_out.0",
        ),
        ("transformer_blocks.0.ff.net.0.proj", "transformer_blocks_0_ff_net_0_proj", "transformer_blocks.0.ff.net.0.proj"),
        ("patchify_proj", "patchify_proj", "proj_in"),
        ("adaln_single.linear", "adaln_single_linear", "time_embed.linear"),
    ],
    HUNYUAN: [
        ("double_blocks.0.img_attn_proj", "double_blocks_0_img_attn_proj", "transformer_blocks.0.attn.to_out.0"),
        ("double_blocks.19.txt_mlp.fc1", "double_blocks_19_txt_mlp_fc1", "transformer_blocks.19.ff_context.net.0.proj"),
        ("double_blocks.0.img_mod.linear", "double_blocks_0_img_mod_linear", "transformer_blocks.0.norm1.linear"),
        ("single_blocks.39.linear2", "single_blocks_39_linear2", "single_transformer_blocks.39.proj_out"),
        ("single_blocks.0.modulation.linear", "single_blocks_0_modulation_linear", "single_transformer_blocks.0.norm.linear"),
        ("txt_in.input_embedder", "txt_in_input_embedder", "context_embedder.proj_in"),
        ("img_in.proj", "img_in_proj", "x_embedder.proj"),
    ],
}  # fmt: skip


@CLASSES
def test_published_names_are_those_of_diffusers_layers(tmp_path: Path, class_name: str) -> None:
    for native, musubi, layer in PUBLISHED[class_name]:
        down, up = torch.randn(2, 3), torch.randn(4, 2)
        for prefix, name, ends in [
            ("diffusion_model.", native, ("lora_down", "lora_up")),
            ("diffusion_model.", native, ("lora_A", "lora_B")),
            ("lora_unet_", musubi, ("lora_down", "lora_up")),
            ("transformer.", layer, ("lora_A", "lora_B")),
            ("base_model.model.", layer, ("lora_A", "lora_B")),
            ("", layer, ("lora_A.default", "lora_B.default")),
        ]:
            file = tmp_path / "adapter.safetensors"
            save_file({f"{prefix}{name}.{ends[0]}.weight": down, f"{prefix}{name}.{ends[1]}.weight": up}, file)
            read = adapters.read(file, class_name).tensors
            assert read.keys() == {f"net.{layer}.lora_down.weight", f"net.{layer}.lora_up.weight"}
            assert torch.equal(read[f"net.{layer}.lora_up.weight"], up)


def test_a_file_for_comfyui_has_the_published_keys(tmp_path: Path) -> None:
    keys = {
        WAN: {
            "diffusion_model.blocks.1.self_attn.q.lora_down.weight": (2, 24),
            "diffusion_model.blocks.1.self_attn.q.lora_up.weight": (24, 2),
            "diffusion_model.blocks.1.self_attn.q.alpha": (),
        },
        LTX: {
            "diffusion_model.transformer_blocks.1.attn1.to_q.lora_A.weight": (2, 24),
            "diffusion_model.transformer_blocks.1.attn1.to_q.lora_B.weight": (24, 2),
        },
        # three layers in one
        HUNYUAN: {
            "diffusion_model.double_blocks.1.img_attn_qkv.lora_A.weight": (2, 24),
            "diffusion_model.double_blocks.1.img_attn_qkv.lora_B.weight": (72, 2),
        },
    }
    layers = {
        WAN: "blocks.1.attn1.to_q",
        LTX: "transformer_blocks.1.attn1.to_q",
        HUNYUAN: "transformer_blocks.1.attn.to_q",
    }
    for class_name, layer in layers.items():
        learned = {f"net.{layer}.lora_down.weight": torch.ones(2, 24), f"net.{layer}.lora_up.weight": torch.ones(24, 2)}
        adapters.write(tmp_path / class_name, learned, LoraConfig(rank=2, alpha=6.0), class_name, "comfyui")
        written = loaded(tmp_path / class_name / adapters.COMFYUI_FILE)
        assert {name: tuple(tensor.shape) for name, tensor in written.items()} == keys[class_name]
        if class_name == WAN:
            assert written["diffusion_model.blocks.1.self_attn.q.alpha"] == 2


@CLASSES
def test_every_layer_of_a_class_has_a_name_in_the_authors_code(class_name: str) -> None:
    for transformer in transformers(class_name):
        for name, module in transformer.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
                row = names.by_part(class_name, name)
                assert row, name
                assert name in row.parts
                assert names.by_native(class_name, row.native) == row


@CLASSES
def test_the_names_are_those_by_which_diffusers_reads_the_authors_weights(class_name: str) -> None:
    from diffusers.loaders import single_file_utils

    convert = {
        WAN: single_file_utils.convert_wan_transformer_to_diffusers,
        LTX: single_file_utils.convert_ltx_transformer_checkpoint_to_diffusers,
        HUNYUAN: single_file_utils.convert_hunyuan_video_transformer_to_diffusers,
    }[class_name]
    # of layers in parts, the converter knows HunyuanVideo's own width alone
    rows, width = {}, 3072
    for layer in names.LAYERS[class_name]:
        row = names.by_native(class_name, layer.native.replace("*", "5"))
        assert row
        rows[row] = torch.randn(width * len(row.parts) + (7 if len(row.parts) == 4 else 0), 1)
    converted = convert({f"{row.native}.weight": value.clone() for row, value in rows.items()})
    expected = {}
    for row, value in rows.items():
        whole = torch.cat(value.chunk(2)[::-1]) if row.swapped else value
        sizes = [width] * (len(row.parts) - 1)
        for part, rows_of_it in zip(row.parts, whole.split([*sizes, len(whole) - sum(sizes)]), strict=True):
            expected[f"{part}.weight"] = rows_of_it
    assert converted.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in converted.items())


def test_native_adapters_are_read_as_the_converters_of_diffusers_read_them(tmp_path: Path) -> None:
    from diffusers.loaders import lora_conversion_utils as utils

    wan = [layer.native for layer in names.LAYERS[WAN] if layer.native != "patch_embedding"]
    blocks = [name for name in wan if name.startswith("blocks")]
    for class_name, prefix, natives, alphas, convert in [
        (WAN, "diffusion_model.", wan, True, utils._convert_non_diffusers_wan_lora_to_diffusers),
        (WAN, "lora_unet_", blocks, True, utils._convert_musubi_wan_lora_to_diffusers),
        (
            LTX,
            "diffusion_model.",
            [layer.native for layer in names.LAYERS[LTX] if layer.native == layer.parts[0]],
            False,
            utils._convert_non_diffusers_ltxv_lora_to_diffusers,
        ),
        # it divides also the lower matrices of the refiner's qkv, and swaps those of the last norm: no adapter's change
        (
            HUNYUAN,
            "diffusion_model.",
            [
                layer.native
                for layer in names.LAYERS[HUNYUAN]
                if not layer.swapped and not layer.native.endswith("self_attn_qkv")
            ],
            False,
            utils._convert_hunyuan_video_lora_to_diffusers,
        ),
    ]:
        tensors = native_adapter(class_name, prefix, natives, alphas)
        file = tmp_path / "adapter.safetensors"
        save_file(tensors, file)
        ours = adapters.read(file, class_name)
        scale = ours.alpha / ours.rank
        theirs = convert({name: tensor.clone() for name, tensor in tensors.items()})
        for name in [name for name in theirs if name.endswith("lora_A.weight")]:
            layer = name.removesuffix(".lora_A.weight")
            x = torch.randn(theirs[name].shape[1], 3)
            change = theirs[f"{layer}.lora_B.weight"] @ (theirs[name] @ x)
            net = layer.replace("transformer.", "net.", 1)
            up, down = (ours.tensors[f"{net}.lora_{which}.weight"] for which in ("up", "down"))
            torch.testing.assert_close(scale * up @ (down @ x), change, atol=1e-5, rtol=1e-5)
        assert len(ours.tensors) == len(theirs)


def native_adapter(class_name: str, prefix: str, natives: list[str], alphas: bool) -> dict[str, Tensor]:
    """A random adapter of blocks 0 and 1 by the authors' names; with alphas in the blocks."""
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for native in natives:
        for block in ("0", "1") if "*" in native else ("",):
            name = native.replace("*", block)
            row = names.by_native(class_name, name)
            assert row
            width = 3072 if len(row.parts) > 1 else 6
            out = {1: 10, 3: 3 * width, 4: 3 * width + 20}[len(row.parts)]
            key = prefix + (name if prefix.endswith(".") else name.replace(".", "_"))
            ends = ("lora_down", "lora_up") if alphas else ("lora_A", "lora_B")
            tensors[f"{key}.{ends[0]}.weight"] = torch.randn(2, width)
            tensors[f"{key}.{ends[1]}.weight"] = torch.randn(out, 2)
            if alphas and "*" in native:
                tensors[f"{key}.alpha"] = torch.tensor(3.0)
    return tensors


@CLASSES
def test_diffusers_reads_our_native_file_as_the_change_that_was_written(tmp_path: Path, class_name: str) -> None:
    from diffusers import HunyuanVideoPipeline, LTXPipeline, WanPipeline

    # the layers that training changes, and HunyuanVideo's own width
    layers = {
        WAN: ["blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.1.ffn.net.2", "condition_embedder.time_proj"],
        LTX: ["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.0.proj"],
        HUNYUAN: [
            "transformer_blocks.0.attn.to_q",
            "transformer_blocks.0.attn.to_v",
            "transformer_blocks.0.attn.add_k_proj",
            "single_transformer_blocks.2.attn.to_k",
            "single_transformer_blocks.2.proj_mlp",
            "single_transformer_blocks.2.proj_out",
        ],
    }[class_name]
    torch.manual_seed(0)
    width = 3072 if class_name == HUNYUAN else 8
    learned = {}
    for layer in layers:
        learned[f"net.{layer}.lora_down.weight"] = torch.randn(2, width)
        learned[f"net.{layer}.lora_up.weight"] = torch.randn(4 * width if layer.endswith("proj_mlp") else width, 2)
    config = LoraConfig(rank=2, alpha=3.0)
    adapters.write(tmp_path, learned, config, class_name, "comfyui")

    pipeline: Any = {WAN: WanPipeline, LTX: LTXPipeline, HUNYUAN: HunyuanVideoPipeline}[class_name]
    theirs = pipeline.lora_state_dict(str(tmp_path / adapters.COMFYUI_FILE))
    seen = set()
    for name in [name for name in theirs if name.endswith("lora_A.weight")]:
        layer = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
        x = torch.randn(theirs[name].shape[1], 3)
        change = theirs[f"transformer.{layer}.lora_B.weight"] @ (theirs[name] @ x)
        if layer in layers:
            up, down = (learned[f"net.{layer}.lora_{which}.weight"] for which in ("up", "down"))
            torch.testing.assert_close(change, 1.5 * up @ (down @ x), atol=1e-4, rtol=1e-4)
            seen.add(layer)
        else:
            assert not change.any()
    assert seen == set(layers)


def transformers(class_name: str) -> list[nn.Module]:
    """Tiny ones of a class, with all the layers that it may have."""
    return {
        WAN: lambda: [tiny_foreign.tiny_wan_i2v_transformer(**tiny_foreign.WAN_I2V_21)],
        LTX: lambda: [tiny_foreign.tiny_ltx_transformer()],
        HUNYUAN: lambda: [tiny_foreign.tiny_hunyuan_transformer()],
    }[class_name]()


def loaded(file: Path) -> Mapping[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def test_a_native_change_is_that_of_the_authors_weights_converted(tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers as convert

    torch.manual_seed(0)
    # of every kind of row: several parts, halves the other way round, the name alone
    for native in (
        "final_layer.adaLN_modulation.1",
        "txt_in.individual_token_refiner.blocks.1.self_attn_qkv",
        "txt_in.individual_token_refiner.blocks.1.adaLN_modulation.1",
        "single_blocks.3.linear1",
    ):
        # it knows single blocks of HunyuanVideo's own width alone
        width, height = (3072, 3 * 3072 + 20) if native.endswith("linear1") else (24, 72)
        down, up = torch.randn(2, width), torch.randn(height, 2)
        file = tmp_path / "adapter.safetensors"
        save_file(
            {f"diffusion_model.{native}.lora_A.weight": down, f"diffusion_model.{native}.lora_B.weight": up}, file
        )
        ours = adapters.read(file, HUNYUAN).tensors
        for name, change in convert({f"{native}.weight": up @ down}).items():
            layer = f"net.{name.removesuffix('.weight')}"
            made = ours[f"{layer}.lora_up.weight"] @ ours[f"{layer}.lora_down.weight"]
            torch.testing.assert_close(made, change, atol=1e-5, rtol=1e-5)

        # and back
        back = tmp_path / native
        adapters.write(back, ours, LoraConfig(rank=2), HUNYUAN, "comfyui")
        again = adapters.read(back, HUNYUAN).tensors
        written = loaded(back / adapters.COMFYUI_FILE)
        assert written.keys() == loaded(file).keys()
        assert again.keys() == ours.keys()
