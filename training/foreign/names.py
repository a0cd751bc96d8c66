"""Names of the layers of three transformers: in diffusers, and in their authors' own code, which ComfyUI and musubi use.

The authors' layers may hold several of diffusers': HunyuanVideo's `img_attn_qkv` is `to_q`, `to_k` and `to_v`, row below row.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

WAN, LTX, HUNYUAN = "WanTransformer3DModel", "LTXVideoTransformer3DModel", "HunyuanVideoTransformer3DModel"


class Layer(NamedTuple):
    """A layer of the authors' code.

    native   its name there; `*` is the number of a block
    parts    the layers of diffusers whose rows it holds, from above
    swapped  whether the halves of its rows stand the other way round in diffusers (shift and scale of a norm)
    """

    native: str
    parts: tuple[str, ...]
    swapped: bool = False


def _same(names: str) -> tuple[Layer, ...]:
    return tuple(Layer(name, (name,)) for name in names.split())


_WAN = (
    Layer("patch_embedding", ("patch_embedding",)),
    Layer("time_embedding.0", ("condition_embedder.time_embedder.linear_1",)),
    Layer("time_embedding.2", ("condition_embedder.time_embedder.linear_2",)),
    Layer("time_projection.1", ("condition_embedder.time_proj",)),
    Layer("text_embedding.0", ("condition_embedder.text_embedder.linear_1",)),
    Layer("text_embedding.2", ("condition_embedder.text_embedder.linear_2",)),
    Layer("img_emb.proj.1", ("condition_embedder.image_embedder.ff.net.0.proj",)),
    Layer("img_emb.proj.3", ("condition_embedder.image_embedder.ff.net.2",)),
    Layer("blocks.*.self_attn.q", ("blocks.*.attn1.to_q",)),
    Layer("blocks.*.self_attn.k", ("blocks.*.attn1.to_k",)),
    Layer("blocks.*.self_attn.v", ("blocks.*.attn1.to_v",)),
    Layer("blocks.*.self_attn.o", ("blocks.*.attn1.to_out.0",)),
    Layer("blocks.*.cross_attn.q", ("blocks.*.attn2.to_q",)),
    Layer("blocks.*.cross_attn.k", ("blocks.*.attn2.to_k",)),
    Layer("blocks.*.cross_attn.v", ("blocks.*.attn2.to_v",)),
    Layer("blocks.*.cross_attn.o", ("blocks.*.attn2.to_out.0",)),
    Layer("blocks.*.cross_attn.k_img", ("blocks.*.attn2.add_k_proj",)),
    Layer("blocks.*.cross_attn.v_img", ("blocks.*.attn2.add_v_proj",)),
    Layer("blocks.*.ffn.0", ("blocks.*.ffn.net.0.proj",)),
    Layer("blocks.*.ffn.2", ("blocks.*.ffn.net.2",)),
    Layer("head.head", ("proj_out",)),
)

_LTX = (
    Layer("patchify_proj", ("proj_in",)),
    Layer("adaln_single.emb.timestep_embedder.linear_1", ("time_embed.emb.timestep_embedder.linear_1",)),
    Layer("adaln_single.emb.timestep_embedder.linear_2", ("time_embed.emb.timestep_embedder.linear_2",)),
    Layer("adaln_single.linear", ("time_embed.linear",)),
    *_same(
        """caption_projection.linear_1 caption_projection.linear_2
        transformer_blocks.*.attn1.to_q transformer_blocks.*.attn1.to_k transformer_blocks.*.attn1.to_v
        transformer_blocks.*.attn1.to_out.0
        transformer_blocks.*.attn2.to_q transformer_blocks.*.attn2.to_k transformer_blocks.*.attn2.to_v
        transformer_blocks.*.attn2.to_out.0
        transformer_blocks.*.ff.net.0.proj transformer_blocks.*.ff.net.2
        proj_out"""
    ),
)

_REFINER = "context_embedder.token_refiner.refiner_blocks.*"
_HUNYUAN = (
    Layer("img_in.proj", ("x_embedder.proj",)),
    Layer("txt_in.input_embedder", ("context_embedder.proj_in",)),
    Layer("txt_in.t_embedder.mlp.0", ("context_embedder.time_text_embed.timestep_embedder.linear_1",)),
    Layer("txt_in.t_embedder.mlp.2", ("context_embedder.time_text_embed.timestep_embedder.linear_2",)),
    Layer("txt_in.c_embedder.linear_1", ("context_embedder.time_text_embed.text_embedder.linear_1",)),
    Layer("txt_in.c_embedder.linear_2", ("context_embedder.time_text_embed.text_embedder.linear_2",)),
    Layer(
        "txt_in.individual_token_refiner.blocks.*.self_attn_qkv",
        (f"{_REFINER}.attn.to_q", f"{_REFINER}.attn.to_k", f"{_REFINER}.attn.to_v"),
    ),
    Layer("txt_in.individual_token_refiner.blocks.*.self_attn_proj", (f"{_REFINER}.attn.to_out.0",)),
    Layer("txt_in.individual_token_refiner.blocks.*.mlp.fc1", (f"{_REFINER}.ff.net.0.proj",)),
    Layer("txt_in.individual_token_refiner.blocks.*.mlp.fc2", (f"{_REFINER}.ff.net.2",)),
    Layer("txt_in.individual_token_refiner.blocks.*.adaLN_modulation.1", (f"{_REFINER}.norm_out.linear",)),
    Layer("time_in.mlp.0", ("time_text_embed.timestep_embedder.linear_1",)),
    Layer("time_in.mlp.2", ("time_text_embed.timestep_embedder.linear_2",)),
    Layer("vector_in.in_layer", ("time_text_embed.text_embedder.linear_1",)),
    Layer("vector_in.out_layer", ("time_text_embed.text_embedder.linear_2",)),
    Layer("guidance_in.mlp.0", ("time_text_embed.guidance_embedder.linear_1",)),
    Layer("guidance_in.mlp.2", ("time_text_embed.guidance_embedder.linear_2",)),
    Layer("double_blocks.*.img_mod.linear", ("transformer_blocks.*.norm1.linear",)),
    Layer("double_blocks.*.txt_mod.linear", ("transformer_blocks.*.norm1_context.linear",)),
    Layer(
        "double_blocks.*.img_attn_qkv",
        ("transformer_blocks.*.attn.to_q", "transformer_blocks.*.attn.to_k", "transformer_blocks.*.attn.to_v"),
    ),
    Layer("double_blocks.*.img_attn_proj", ("transformer_blocks.*.attn.to_out.0",)),
    Layer(
        "double_blocks.*.txt_attn_qkv",
        (
            "transformer_blocks.*.attn.add_q_proj",
            "transformer_blocks.*.attn.add_k_proj",
            "transformer_blocks.*.attn.add_v_proj",
        ),
    ),
    Layer("double_blocks.*.txt_attn_proj", ("transformer_blocks.*.attn.to_add_out",)),
    Layer("double_blocks.*.img_mlp.fc1", ("transformer_blocks.*.ff.net.0.proj",)),
    Layer("double_blocks.*.img_mlp.fc2", ("transformer_blocks.*.ff.net.2",)),
    Layer("double_blocks.*.txt_mlp.fc1", ("transformer_blocks.*.ff_context.net.0.proj",)),
    Layer("double_blocks.*.txt_mlp.fc2", ("transformer_blocks.*.ff_context.net.2",)),
    Layer(
        "single_blocks.*.linear1",
        (
            "single_transformer_blocks.*.attn.to_q",
            "single_transformer_blocks.*.attn.to_k",
            "single_transformer_blocks.*.attn.to_v",
            "single_transformer_blocks.*.proj_mlp",
        ),
    ),
    Layer("single_blocks.*.linear2", ("single_transformer_blocks.*.proj_out",)),
    Layer("single_blocks.*.modulation.linear", ("single_transformer_blocks.*.norm.linear",)),
    Layer("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
    Layer("final_layer.linear", ("proj_out",)),
)

# embedders of HunyuanVideo that ComfyUI renames when it loads the model, but not when it loads an adapter
RENAMED = ("time_in.", "guidance_in.", "txt_in.t_embedder.", "txt_in.c_embedder.")

LAYERS: Mapping[str, tuple[Layer, ...]] = {WAN: _WAN, LTX: _LTX, HUNYUAN: _HUNYUAN}  # by class


def by_part(class_name: str, name: str) -> Layer | None:
    """The native layer that holds the layer `name` of diffusers; None if the class has no such layer."""
    return _found(class_name, name, lambda layer: layer.parts)


def by_native(class_name: str, name: str) -> Layer | None:
    """The native layer `name`, or the one that musubi calls so, with `_` for `.`; None if the class has none."""
    return _found(class_name, name, lambda layer: (layer.native, layer.native.replace(".", "_")))


def _found(class_name: str, name: str, names: Callable[[Layer], tuple[str, ...]]) -> Layer | None:
    for layer in LAYERS[class_name]:
        for pattern in names(layer):
            if match := re.fullmatch(re.escape(pattern).replace(r"\*", "([0-9]{1,4})"), name):
                block = "".join(match.groups())
                return Layer(
                    layer.native.replace("*", block), tuple(p.replace("*", block) for p in layer.parts), layer.swapped
                )
    return None
